"""How many UTF-8 bytes of text each token stands for: with it models are compared whose tokenizers differ."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from holdfast.data.tokenizers import bare

__all__ = ["TokenBytes"]

PROBE = "The key is  7,\tnot ÜBER-größe:\n\n  東京 ﬁ 🙂 ½ x²; 'tis\u00a0naïve.\n"
"""Whatever a tokenizer may lose: letter case, runs of blanks, line breaks, compatible characters, rare ones."""


@dataclass(frozen=True, eq=False)
class TokenBytes:
    """Bytes of tokens, exact wherever a text is cut: a token that is a part of a character counts the bytes it holds.

    Special tokens, such as the end of a document, stand for no text and count 0. Text counts after a normalization
    into composed characters (NFC), where a tokenizer has one.

    Attributes:
        table: int64 [V], by token id.
        prefix: bytes that the tokenizer puts before a document, which do not count.
        end: id of the end token, behind which a document begins.
    """

    table: torch.Tensor
    prefix: int
    end: int | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> TokenBytes | None:
        """Those of a tokenizer; None if it loses some of a text, so that its tokens stand for no bytes.

        Known are byte-level tokenizers, and those with metaspaces and bytes (`▁the`, `<0x0A>`). A document that begins
        with a blank may count one byte too few with those that put one before each document.
        """
        backend = bare(tokenizer)
        described = json.loads(backend.to_str())
        special = {token["id"] for token in described["added_tokens"] if token["special"]}
        added = {token["id"]: len(token["content"].encode()) for token in described["added_tokens"]}
        of_bytes = '"ByteLevel"' in json.dumps(described["decoder"])
        table = torch.zeros(1 + max(backend.get_vocab(with_added_tokens=True).values()), dtype=torch.int64)
        for piece, token in backend.get_vocab(with_added_tokens=False).items():
            table[token] = len(piece) if of_bytes else _written_bytes(piece)
        for token, size in added.items():
            table[token] = 0 if token in special else size
        ids = backend.encode(PROBE, add_special_tokens=False).ids
        prefix = int(table[ids].sum()) - len(PROBE.encode())
        if prefix not in (0, 1) or backend.decode(ids, skip_special_tokens=False) not in (PROBE, " " * prefix + PROBE):
            return None
        return cls(table, prefix, tokenizer.eos_token_id)

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Bytes of each token, int64 of the shape of `input_ids` [..., T]; before the first, text is taken to go on."""
        found = self.table[input_ids.cpu()]
        if self.prefix and self.end is not None:
            found[..., 1:] -= self.prefix * (input_ids[..., :-1].cpu() == self.end) * (found[..., 1:] > 0)
        return found


def _written_bytes(piece: str) -> int:
    """Of a piece such as `▁the`, or `<0x0A>` for a byte that no piece holds."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return 1
    return len(piece.replace("▁", " ").encode())
