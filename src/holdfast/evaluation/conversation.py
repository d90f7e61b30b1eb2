"""Conversations with a model: what is said is read once, and the cache carries it through all turns.

Shapes: B conversations side by side, T columns of one call (shorter rows begin with pads), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from holdfast.cache import HybridCache
from holdfast.evaluation.inference import device_of

__all__ = ["Conversation", "first_line", "line_break_tokens"]

COLUMNS_AT_ONCE = 2048  # read per call: a prompt of any length then needs the memory of so many tokens


class Conversation:
    """B conversations side by side. Call it inside of `holdfast.evaluation.inference.evaluating`.

    Args:
        model: a `HybridForCausalLM`.

    Attributes:
        cache: the model's memory of what it has read.
        tokens_said: [B] int64, tokens of each conversation so far: those given to `read`, and those answered.
        tokens_read: [B] int64, tokens that the model was called with. Behind `tokens_said` by the last answered token
            where that has not been read yet, and never ahead of it: nothing is read twice.
        ended_by: [B] the token that ended each of the last answers, in a list; an empty one where none did.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cache = HybridCache(model.config)
        self.tokens_said = torch.zeros(0, dtype=torch.long)
        self.tokens_read = torch.zeros(0, dtype=torch.long)
        self.ended_by: list[list[int]] = []
        self._unread = torch.zeros(0, 0, dtype=torch.long)  # [B, 0 or 1], the tokens answered last
        self._is_unread = self._unread.bool()
        self._logits = torch.zeros(0, 0)

    @torch.no_grad()
    def read(self, rows: Sequence[Sequence[int]]) -> None:
        """Read on: for each conversation the ids that follow what was said before.

        Raises:
            ValueError: if a row is empty, or their number changes between calls.
        """
        if any(len(row) == 0 for row in rows):
            raise ValueError("there is nothing to read in a row; give at least one token to each.")
        if not len(self.tokens_said):
            self._begin(len(rows))
        if len(rows) != len(self.tokens_said):
            raise ValueError(f"{len(rows)} rows for {len(self.tokens_said)} conversations; give one row for each.")
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
        real = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
        self.tokens_said += real.sum(1)
        self._call(torch.cat([self._unread, ids], dim=1), torch.cat([self._is_unread, real], dim=1))

    @torch.no_grad()
    def answer(self, max_new_tokens: int, stop: Collection[int] = ()) -> list[list[int]]:
        """The likeliest continuation of each conversation, token by token; once after each `read`.

        Args:
            max_new_tokens: tokens at the most, at least 1.
            stop: ids that end an answer. The one that did is neither returned nor part of the conversation; it stands
                in `ended_by`.

        Returns:
            The ids of each answer; empty where its first token was one of `stop`.

        Raises:
            ValueError: if there is nothing to answer, or `max_new_tokens` is below 1.
        """
        if not len(self.tokens_said) or self._unread.shape[1]:
            raise ValueError("there is nothing to answer; read the next turn first.")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; give at least 1.")
        stop_ids = torch.tensor(sorted(stop), dtype=torch.long)
        answers: list[list[int]] = [[] for _ in self.tokens_said]
        self.ended_by = [[] for _ in answers]
        open_rows = torch.ones(len(answers), dtype=torch.bool)
        for _ in range(max_new_tokens):
            if self._is_unread.any():
                self._call(self._unread, self._is_unread)
            tokens = self._logits.argmax(-1).cpu()
            ends = open_rows & torch.isin(tokens, stop_ids)
            for row in ends.nonzero().flatten().tolist():
                self.ended_by[row] = [int(tokens[row])]
            open_rows &= ~ends
            if not open_rows.any():
                break
            self._unread, self._is_unread = tokens[:, None], open_rows[:, None].clone()
            self.tokens_said += open_rows
            for row in open_rows.nonzero().flatten().tolist():
                answers[row].append(int(tokens[row]))
        return answers

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is said inside is forgotten: the conversation then goes on as if it had not been, without reading again.

        The cache returns to a copy that is made here; O(its bytes).
        """
        cache = self.cache.snapshot()
        kept = (self.tokens_said.clone(), self.tokens_read.clone(), self._unread, self._is_unread, self._logits)
        try:
            yield
        finally:
            self.cache.restore(cache)
            self.tokens_said, self.tokens_read, self._unread, self._is_unread, self._logits = kept

    def _begin(self, rows: int) -> None:
        self.tokens_said = torch.zeros(rows, dtype=torch.long)
        self.tokens_read = torch.zeros(rows, dtype=torch.long)
        self._forget_unread(rows)

    def _forget_unread(self, rows: int) -> None:
        self._unread = torch.zeros(rows, 0, dtype=torch.long)
        self._is_unread = self._unread.bool()

    def _call(self, ids: Tensor, real: Tensor) -> None:
        """Let the model read [B, T] ids, of which `real` are tokens, and keep the logits of the last column."""
        device = device_of(self.model)
        self.tokens_read += real.sum(1)
        for piece, mask in zip(ids.split(COLUMNS_AT_ONCE, 1), real.split(COLUMNS_AT_ONCE, 1), strict=True):
            output = self.model(
                piece.to(device),
                attention_mask=None if mask.all() else mask.long().to(device),
                past_key_values=self.cache,
                logits_to_keep=1,
            )
        self._logits = output.logits[:, -1]
        self._forget_unread(len(ids))


def first_line(text: str) -> str:
    """What stands before the first line break.

    An answer that one of `line_break_tokens` ended is judged by the first line of it and that token together: the token
    may hold the end of the answer too.
    """
    return text.partition("\n")[0]


def line_break_tokens(tokenizer: Any) -> frozenset[int]:
    """Ids whose text holds a line break, and the end token: what ends an answer of one line. O(vocabulary)."""
    texts: Iterable[str] = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    breaks = {token for token, text in enumerate(texts) if "\n" in text}
    return frozenset(breaks | ({tokenizer.eos_token_id} - {None}))
