"""A model that knows the answers to questions about magic numbers it has read, for tests of what is made of answers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn

from holdfast import HybridConfig
from holdfast.cache import HybridCache
from holdfast.data.text import byte_tokenizer

TOLD = re.compile(r"One of the special magic \w+ for (\S+) is: (\S+)\.")
ASKED = re.compile(r"[Tt]he special magic \w+ for ([^?:]+?)(?: mentioned in the provided text)? (?:is|are)([^?:]*)$")


def config(**settings: int) -> HybridConfig:
    options = {"gated_deltanet": {"num_heads": 1, "head_dim": 4}}
    sizes = {"vocab_size": 259, "hidden_size": 8, "num_hidden_layers": 1}
    return HybridConfig(mixers=["gated_deltanet"], mixer_options=options, **(sizes | settings))


class Listener(nn.Module):
    """Continues a question about needles by their values and a line break. Bytes are its tokens.

    Args:
        reach: it knows so many of the last bytes read.
        garble: what it makes of the answer.

    Attributes:
        calls: the mask of each call.
    """

    def __init__(self, reach: float = math.inf, garble: Callable[[str], str] = str, **settings: int) -> None:
        super().__init__()
        self.config = config(**settings)
        self.reach = reach
        self.garble = garble
        self.tokenizer = byte_tokenizer()
        self.calls: list[torch.Tensor] = []
        self._heard: list[list[int]] = []

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: HybridCache,
        logits_to_keep: int,
    ) -> SimpleNamespace:
        assert logits_to_keep == 1
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self.calls.append(mask)
        past_key_values.allocate(len(input_ids), torch.float32)
        if not int(past_key_values.seen.sum()):
            self._heard = [[] for _ in input_ids]
        logits = torch.zeros(len(input_ids), 1, self.config.vocab_size)
        for row, (ids, real, seen) in enumerate(zip(input_ids, mask.bool(), past_key_values.seen, strict=True)):
            # What was forgotten by a cache that was restored is forgotten here too.
            self._heard[row] = self._heard[row][: int(seen)] + ids[real].tolist()
            logits[row, 0, self._next(self.tokenizer.decode(self._heard[row]))] = 1
        past_key_values.advance(input_ids.shape[1], mask.sum(1))
        return SimpleNamespace(logits=logits)

    def _next(self, text: str) -> int:
        asked = ASKED.search(text)
        if asked is None:
            return ord("x")
        keys = re.split(r",? and |, ", asked[1])
        known = text[-int(min(self.reach, len(text))) :]
        values = [value for key in keys for told, value in TOLD.findall(known) if told == key]
        answer = self.garble(" " + ", ".join(values)) + "\n"
        said = len(asked[2])
        return ord(answer[said]) if said < len(answer) else self.tokenizer.eos_token_id


class MergingListener(Listener):
    """Says the last digit of an answer and the line break behind it in one token."""

    def __init__(self) -> None:
        super().__init__(vocab_size=269)
        self.tokenizer.add_tokens([f"{digit}\n" for digit in range(10)])

    def _next(self, text: str) -> int:
        token = super()._next(text)
        ends = 48 <= token < 58 and super()._next(text + chr(token)) == ord("\n")
        return self.tokenizer.convert_tokens_to_ids(f"{chr(token)}\n") if ends else token
