"""`holdfast evaluate perplexity`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich.table import Table

from holdfast.cli.common import model_directory, output_console, read_model
from holdfast.cli.errors import UsageError
from holdfast.cli.evaluate.common import (
    open_log,
    read_text_models,
    refuse_lengths,
    require_positive,
    shown_names,
    usage_errors,
    write_results,
)

if TYPE_CHECKING:
    from holdfast.evaluation.perplexity import PerplexityResult

TOKENS_AT_ONCE = 16_384
"""Of blocks that are read side by side, unless --batch-size says how many."""


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of text, overall and by position in the context."""

    model: tyro.conf.Positional[str]
    """Directory of a trained model, or a model on the hub (OWNER/NAME[@REVISION]), with its tokenizer."""
    data: str
    """A file (parquet, jsonl, json, txt), a directory of them or of prepared text, or the name of a hub data set."""
    split: str = "validation"
    """Split of a directory or of a data set; a single file is read whole."""
    column: str = "text"
    """That holds the text, in files with columns and in data sets on the hub."""
    config: str | None = None
    """Configuration of a data set on the hub."""
    length: int | None = None
    """Tokens per block; default: 512, or what the model was trained on where that is less."""
    isolate: bool = False
    """By document: each is read by itself, and positions count from its start, as in training with data.isolate. Where
    a block ends inside a document, the next block reads the rest as a document of its own, from position 0 on: what
    stood before is unknown there."""
    beyond: bool = False
    """Allow blocks longer than the model was trained on, to measure how it extrapolates: --length 4096 --beyond."""
    batch_size: int | None = None
    """Blocks read side by side; default: as many as hold 16,384 tokens, at least 1."""
    max_blocks: int | None = None
    """Read the first blocks only."""
    bins: int = 8
    """Parts of the context that are shown one by one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights, and of what is computed with them."""
    json: Path | None = None
    """Write all numbers to this file (NAME.json), and those of every block beside it to NAME.samples.jsonl, where a run
    that was interrupted goes on."""

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 2:
            raise UsageError(f"--length is {self.length}; give at least 2 tokens.")
        require_positive(self, "batch_size", "max_blocks", "bins")

    def run(self) -> list[Table]:
        """Evaluate, and show a table; returns it."""
        from holdfast.evaluation.perplexity import evaluate_perplexity

        directory = model_directory(self.model)
        tokenizers = read_text_models([directory], english=False)
        length = block_length([directory], self.length, self.beyond)
        text = TextBlocks(self.data, self.split, self.column, self.config, length, self.max_blocks, self.isolate)
        blocks = text.read(tokenizers[directory], directory)
        determining = {"dtype": self.dtype, "bins": self.bins}  # beside the blocks, whose content names them
        result = evaluate_perplexity(
            read_model(directory, self.dtype),
            blocks,
            batch_size=self.batch_size or max(1, TOKENS_AT_ONCE // length),
            max_blocks=self.max_blocks,
            position_bins=self.bins,
            log=open_log(self.json, "perplexity", directory, determining, "blocks"),
        )
        table = _show(directory, result, length)
        if self.json is not None:
            settings = {**text.to_dict(), "bins": self.bins, "dtype": self.dtype, "seed": None}  # nothing is drawn
            write_results(self.json, "perplexity", settings, {shown_names([directory])[directory]: result.to_dict()})
        return [table]


@dataclass(frozen=True)
class TextBlocks:
    """Which text is read, in blocks of which length."""

    data: str
    split: str
    column: str
    config: str | None
    length: int
    max_blocks: int | None
    isolate: bool = False

    def read(self, tokenizer: Any, directory: Path) -> Any:
        """The blocks, as a map-style dataset; there may be more than `max_blocks`.

        Args:
            tokenizer: of the model.
            directory: of the model, for errors.

        Raises:
            UsageError: if there is no such text, too little of it, or it was prepared with another tokenizer.
        """
        from holdfast.data.text import PackedText, is_prepared, load_text, load_tokenizer, open_prepared
        from holdfast.data.tokenizers import fingerprint

        with usage_errors():
            if is_prepared(self.data):
                self._refuse_raw()
                if fingerprint(load_tokenizer(self.data)) != fingerprint(tokenizer):
                    raise UsageError(f"{self.data} was prepared with another tokenizer than that of {directory}.")
                return open_prepared(self.data, self.length, split=self.split, isolate=self.isolate)
            texts = load_text(self.data, split=self.split, text_column=self.column, config=self.config)
            max_tokens = None if self.max_blocks is None else (self.max_blocks + 1) * self.length
            return PackedText.from_texts(texts, tokenizer, self.length, isolate=self.isolate, max_tokens=max_tokens)

    def _refuse_raw(self) -> None:
        """Options about raw text must not be given for prepared text: they would be ignored."""
        for option, given in (("column", self.column != "text"), ("config", self.config is not None)):
            if given:
                raise UsageError(f"{self.data} holds prepared text, that is tokens; leave --{option} out.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; of a path the name."""
        return {**asdict(self), "data": Path(self.data).name}


def block_length(directories: Sequence[Path], given: int | None, beyond: bool) -> int:
    """The length of blocks that was asked for, or one that all models were told of.

    Raises:
        UsageError: if a model was not told of so many tokens, unless `beyond`.
    """
    from holdfast.configuration import HybridConfig

    told = (HybridConfig.from_pretrained(directory).max_position_embeddings for directory in directories)
    length = min(512, *told) if given is None else given
    refuse_lengths(directories, length, beyond)
    return length


def _show(directory: Path, result: PerplexityResult, length: int) -> Table:
    """One row per bin of positions."""
    name = shown_names([directory])[directory]
    table = Table(title=f"{name}: {result.tokens:,} tokens in {result.blocks:,} blocks of {length:,}")
    for heading in ("positions", "tokens", "perplexity"):
        table.add_column(heading, justify="right")
    for part in result.bins:
        shown = "–" if part.perplexity is None else f"{part.perplexity:.3f}"
        table.add_row(f"{part.start:,} to {part.stop - 1:,}", f"{part.tokens:,}", shown)
    table.add_section()
    table.add_row("all", f"{result.tokens:,}", f"{result.perplexity:.3f}")
    output_console().print(table)
    output_console().print(f"{result.bits_per_token:.4f} bits per token")
    return table
