"""`holdfast tokenizer`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from holdfast.cli.common import TextOptions, output_console, quieten_transformers
from holdfast.cli.errors import UsageError, usage_errors
from holdfast.cli.parsing import parse

DESCRIPTION = """\
Train a byte-level BPE tokenizer on one's own text. It loses nothing, whatever the text; its ids are 0 pad, 1 bos,
2 eos, the 256 bytes, and what it has learned. Give OUT as the `data.tokenizer` of a recipe, or to `holdfast prepare`.

examples:
  holdfast tokenizer books/ tokenizers/books --vocab-size 4096
  holdfast tokenizer HuggingFaceFW/fineweb-edu tokenizers/edu --config sample-10BT --vocab-size 32000
"""


@dataclass(frozen=True)
class TrainTokenizer(TextOptions):
    """Train a tokenizer and save it."""

    out: tyro.conf.Positional[str]
    """Directory to write; it must not hold a tokenizer."""
    vocab_size: int
    """Number of ids, special tokens included: at least 259."""
    split: str = "train"
    characters: int = 1_000_000_000
    """Read about as many characters; more teach it little, and memory grows with the different words among them."""


def run(arguments: Sequence[str]) -> None:
    """Parse, train and save."""
    settings = parse(TrainTokenizer, arguments or ["--help"], prog="holdfast tokenizer", description=DESCRIPTION)
    if settings.characters < 1:
        raise UsageError(f"--characters is {settings.characters}; give 1 or more.")
    if (Path(settings.out) / "tokenizer.json").exists():
        raise UsageError(f"{settings.out} holds a tokenizer already; give another directory.")

    from holdfast.data.text import train_tokenizer
    from holdfast.files import write_files

    quieten_transformers()
    with usage_errors():
        tokenizer = train_tokenizer(settings.open(settings.split), settings.vocab_size, characters=settings.characters)
    write_files(settings.out, tokenizer.save_pretrained)
    output_console().print(f"A tokenizer of {len(tokenizer):,} tokens is in {settings.out}.", soft_wrap=True)
