"""`holdfast evaluate perplexity`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.table import Table

from holdfast.cli.common import model_directory, output_console, read_model
from holdfast.cli.errors import UsageError
from holdfast.cli.evaluate.common import require_positive, shown_names
from holdfast.files import write_json


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of text, overall and by position in the context."""

    model: tyro.conf.Positional[str]
    """Directory of a trained model with its tokenizer."""
    data: str
    """A file (parquet, jsonl, json, txt), a directory of them or of prepared text, or the name of a hub data set."""
    split: str = "validation"
    """Split of a directory or of a data set; a single file is read whole."""
    column: str = "text"
    config: str | None = None
    """Configuration of a data set on the hub."""
    length: int = 512
    """Tokens per block; it may be longer than in training."""
    batch_size: int = 8
    max_blocks: int | None = None
    """Read the first blocks only."""
    bins: int = 8
    """Parts of the context that are shown one by one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    json: Path | None = None
    """Write all numbers to this file."""

    def __post_init__(self) -> None:
        if self.length < 2:
            raise UsageError(f"--length is {self.length}; give at least 2 tokens.")
        require_positive(self, "batch_size", "max_blocks", "bins")

    def run(self) -> list[Table]:
        """Evaluate, and show a table; returns it."""
        from holdfast.data.text import PackedText, is_prepared, load_text, load_tokenizer, open_prepared
        from holdfast.data.tokenizers import fingerprint
        from holdfast.evaluation.perplexity import evaluate_perplexity

        directory = model_directory(self.model)
        tokenizer = load_tokenizer(directory)
        if is_prepared(self.data):
            if fingerprint(load_tokenizer(self.data)) != fingerprint(tokenizer):
                raise UsageError(f"{self.data} was prepared with another tokenizer than that of {directory}.")
            blocks: Any = open_prepared(self.data, self.length, split=self.split)
        else:
            texts = load_text(self.data, split=self.split, text_column=self.column, config=self.config)
            max_tokens = None if self.max_blocks is None else (self.max_blocks + 1) * self.length
            blocks = PackedText.from_texts(texts, tokenizer, self.length, max_tokens=max_tokens)
        result = evaluate_perplexity(
            read_model(directory, self.dtype),
            (blocks[index] for index in range(len(blocks))),
            batch_size=self.batch_size,
            max_blocks=self.max_blocks,
            position_bins=self.bins,
        )
        name = shown_names([directory])[directory]
        table = Table(title=f"{name}: {result.tokens:,} tokens in {result.blocks:,} blocks of {self.length:,}")
        for heading in ("positions", "tokens", "perplexity"):
            table.add_column(heading, justify="right")
        for part in result.bins:
            shown = "–" if part.perplexity is None else f"{part.perplexity:.3f}"
            table.add_row(f"{part.start:,} to {part.stop - 1:,}", f"{part.tokens:,}", shown)
        table.add_section()
        table.add_row("all", f"{result.tokens:,}", f"{result.perplexity:.3f}")
        output_console().print(table)
        output_console().print(f"{result.bits_per_token:.4f} bits per token")
        if self.json is not None:
            write_json(self.json, result.to_dict())
        return [table]
