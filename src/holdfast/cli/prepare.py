"""`holdfast prepare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from holdfast.cli.common import TextOptions, output_console, quieten_transformers
from holdfast.cli.errors import UsageError, usage_errors
from holdfast.cli.parsing import parse
from holdfast.units import format_bytes, format_count

DESCRIPTION = """\
Tokenize text once, into files that training maps into memory: it then starts at once, shuffles all of the text, and
holds none of it. Give TARGET as the `data.source` of a recipe; the tokenizer lies in there too.

examples:
  holdfast prepare books/ prepared/books --tokenizer byte --splits train validation
  holdfast prepare corpus/ prepared/corpus --tokenizer tokenizers/mine --workers 8
  holdfast prepare HuggingFaceFW/fineweb-edu prepared/edu --config sample-10BT --tokenizer tokenizers/mine --workers 16
"""


@dataclass(frozen=True)
class Prepare(TextOptions):
    """Tokenize text into a directory."""

    target: tyro.conf.Positional[str]
    """Directory to write; it may hold other splits already."""
    tokenizer: str
    """"byte", a directory (`holdfast tokenizer` makes one), or a name on the hub."""
    splits: tuple[str, ...] = ("train",)
    """Splits to read; each keeps its name."""
    workers: int = 1
    """Processes; each writes one shard."""


def run(arguments: Sequence[str]) -> None:
    """Parse and prepare."""
    settings = parse(Prepare, arguments or ["--help"], prog="holdfast prepare", description=DESCRIPTION)
    if settings.workers < 1:
        raise UsageError(f"--workers is {settings.workers}; give 1 or more.")
    if not settings.splits:
        raise UsageError("--splits is empty; name at least one.")

    from holdfast.data.prepared import check_target
    from holdfast.data.sources import LocalText
    from holdfast.data.splits import check_told_apart
    from holdfast.data.text import load_tokenizer, prepare

    splits = tuple(dict.fromkeys(settings.splits))
    quieten_transformers()
    with usage_errors():
        check_told_apart(settings.source, splits, "prepare one of them only (--splits train)")
        tokenizer = load_tokenizer(settings.tokenizer)
        for split in splits:  # a mistake shows before hours of work
            check_target(settings.target, split, tokenizer)
    sources = {split: settings.open(split) for split in splits}
    for source in sources.values():
        if isinstance(source, LocalText):
            source.check()
    for split, source in sources.items():
        written = prepare(source, settings.target, tokenizer, split=split, workers=settings.workers)
        output_console().print(
            f"{settings.target}, {split}: {format_count(written.tokens)} tokens of {format_count(written.documents)} "
            f"documents in {format_bytes(written.bytes)}.",
            soft_wrap=True,
        )
