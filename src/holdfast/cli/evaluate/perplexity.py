"""`holdfast evaluate perplexity`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table

from holdfast.cli.common import error_console, output_console, read_model
from holdfast.cli.errors import UsageError, usage_errors
from holdfast.cli.evaluate.common import (
    NOT_COVERED,
    Models,
    check_picture,
    model_directories,
    open_log,
    read_text_models,
    refuse_lengths,
    refuse_unknown_tokens,
    require_positive,
    show_number,
    show_ratio,
    shown_names,
    write_results,
)

if TYPE_CHECKING:
    from holdfast.data.text import TextSource
    from holdfast.data.token_bytes import TokenBytes
    from holdfast.evaluation.perplexity import PerplexityResult

TOKENS_AT_ONCE = 16_384
"""Of blocks that are read side by side, unless --batch-size says how many."""


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of text, overall and by position in the context, and bits per byte.

    Each number has a 95 % interval over blocks, and so has the difference of each further model to the first, block by
    block where both read the same tokens. Intervals tell what other blocks of this text would give; they do not cover
    the seeds of training. Bits per byte compare models with different tokenizers: the bits of all predicted tokens,
    ends of documents too, per UTF-8 byte of the text that they stand for."""

    models: Models
    """Directories of trained models, or models on the hub (OWNER/NAME[@REVISION]), with their tokenizers."""
    data: str
    """A file (parquet, jsonl, json, txt), a directory of them or of prepared text, or the name of a hub data set."""
    split: str = "validation"
    """Split of a directory or of a data set; a single file is read whole."""
    column: str = "text"
    """That holds the text, in files with columns and in data sets on the hub."""
    config: str | None = None
    """Configuration of a data set on the hub."""
    length: int | None = None
    """Tokens per block; default: 512, or what the models were trained on where that is less."""
    isolate: bool = False
    """By document: each is read by itself, and positions count from its start, as in training with data.isolate. Where
    a block ends inside a document, the next block reads the rest as a document of its own, from position 0 on: what
    stood before is unknown there."""
    beyond: bool = False
    """Allow blocks longer than a model was trained on, to measure how it extrapolates: --length 4096 --beyond."""
    batch_size: int | None = None
    """Blocks read side by side; default: as many as hold 16,384 tokens, at least 1."""
    samples: int | None = None
    """Read so many blocks, the first ones; default: all. Models with different tokenizers read the same text, to within
    a block: that of the one whose blocks hold least."""
    bins: int = 8
    """Parts of the context that are shown one by one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights, and of what is computed with them."""
    json: Path | None = None
    """Write all numbers to this file (NAME.json), sums over every block among them, and each block's when it is read to
    NAME.samples.jsonl, where a run that was interrupted goes on."""
    plot: Path | None = None
    """Draw perplexity by position into this file (png, svg or pdf), with the length of training; below it how far
    further models are from the first."""

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 2:
            raise UsageError(f"--length is {self.length}; give at least 2 tokens.")
        require_positive(self, "batch_size", "samples", "bins")
        check_picture(self.plot)

    def run(self) -> list[Table]:
        """Evaluate, and show a table; returns it."""
        from holdfast.evaluation.perplexity import evaluate_perplexity

        directories = model_directories(self.models, "perplexity")
        tokenizers = read_text_models(directories, english=False)
        length = block_length(directories, self.length, self.beyond)
        text = TextBlocks(self.data, self.split, self.column, self.config, length, self.samples, self.isolate)
        names = shown_names(directories)
        results = {}
        for number, (directory, reading) in enumerate(_readings(text, tokenizers).items(), start=1):
            # Beside the blocks, whose content names them.
            determining = {"dtype": self.dtype, "bins": self.bins, "bytes": reading.sizes is not None}
            results[names[directory]] = evaluate_perplexity(
                read_model(directory, self.dtype),
                reading.blocks,
                batch_size=self.batch_size or max(1, TOKENS_AT_ONCE // length),
                max_blocks=reading.count,
                position_bins=self.bins,
                token_bytes=reading.sizes,
                log=open_log(self.json, "perplexity", directory, determining, "blocks"),
                description="perplexity" if len(names) == 1 else f"perplexity, model {number} of {len(names)}",
            )
        read = max(result.blocks for result in results.values())
        if self.samples is not None and read < self.samples:
            remark = f"{self.data} has {read:,} blocks, fewer than --samples {self.samples:,}."
            error_console().print(remark, soft_wrap=True)
        table = _show(results, text)
        if self.json is not None:
            settings = {**text.to_dict(), "bins": self.bins, "dtype": self.dtype, "seed": None}  # nothing is drawn
            write_results(self.json, "perplexity", settings, _compared(results))
        if self.plot is not None:
            self._draw(self.plot, results, {names[directory]: directory for directory in directories})
        return [table]

    def _draw(self, path: Path, results: Mapping[str, PerplexityResult], directories: Mapping[str, Path]) -> None:
        from holdfast.configuration import HybridConfig
        from holdfast.evaluation.perplexity import plot_perplexity

        configs = {name: HybridConfig.from_pretrained(directory) for name, directory in directories.items()}
        trained = {name: config.max_position_embeddings for name, config in configs.items()}
        plot_perplexity(results, path, trained=trained)


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
            UsageError: if there is no such text, too little of it, it was prepared with another tokenizer, or has a
                token that the model does not know.
        """
        blocks = self._read(tokenizer, directory)
        self.check(blocks, tokenizer, directory)
        return blocks

    def check(self, blocks: Any, tokenizer: Any, directory: Path) -> None:
        """Refuse blocks of `read` with a token that the model in `directory` does not know.

        Raises:
            UsageError: naming the token and the model.
        """
        count = min(len(blocks), self.max_blocks or len(blocks))
        texts = (blocks[index]["input_ids"].tolist() for index in range(count))
        refuse_unknown_tokens(texts, tokenizer, directory)

    def _read(self, tokenizer: Any, directory: Path) -> Any:
        from holdfast.data.text import PackedText, is_prepared, load_tokenizer, open_prepared
        from holdfast.data.tokenizers import fingerprint

        with usage_errors("--data"):
            if is_prepared(self.data):
                self._refuse_raw()
                if fingerprint(load_tokenizer(self.data)) != fingerprint(tokenizer):
                    raise UsageError(f"{self.data} was prepared with another tokenizer than that of {directory}.")
                return open_prepared(self.data, self.length, split=self.split, isolate=self.isolate)
            texts = self._load()
            max_tokens = None if self.max_blocks is None else (self.max_blocks + 1) * self.length
            return PackedText.from_texts(texts, tokenizer, self.length, isolate=self.isolate, max_tokens=max_tokens)

    def _load(self) -> TextSource:
        from holdfast.data.recall import is_published_squad
        from holdfast.data.text import load_text

        try:
            return load_text(self.data, split=self.split, text_column=self.column, config=self.config)
        except ValueError as error:
            if not is_published_squad(self.data):
                raise
            read_by = f"`holdfast evaluate recall MODEL --data {self.data}` asks them"
            raise ValueError(f"{self.data} holds SQuAD's questions, and no text to be read on: {read_by}.") from error

    def _refuse_raw(self) -> None:
        """Options about raw text must not be given for prepared text: they would be ignored."""
        for option, given in (("column", self.column != "text"), ("config", self.config is not None)):
            if given:
                raise UsageError(f"{self.data} holds prepared text, that is tokens; leave --{option} out.")

    @property
    def name(self) -> str:
        """Of a path its last part."""
        return Path(self.data).name

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "data": self.name}


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


@dataclass(frozen=True)
class _Reading:
    """What a model reads: blocks, of which `count` at the most, and the bytes of their tokens if they are known."""

    blocks: Any
    count: int | None
    sizes: TokenBytes | None


def _readings(text: TextBlocks, tokenizers: Mapping[Path, Any]) -> dict[Path, _Reading]:
    """The blocks of each model; all read the same text even if their tokenizers differ, to within a block.

    Blocks of different tokenizers hold different amounts of text: each model reads those that lie in the bytes of which
    all have blocks. O(tokens) there, and the text is tokenized once for each tokenizer.
    """
    from holdfast.data.token_bytes import TokenBytes
    from holdfast.data.tokenizers import fingerprint

    kinds = {directory: fingerprint(tokenizer) for directory, tokenizer in tokenizers.items()}
    readings: dict[str, _Reading] = {}
    for directory, tokenizer in tokenizers.items():
        if kinds[directory] not in readings:
            blocks = text.read(tokenizer, directory)
            readings[kinds[directory]] = _Reading(blocks, text.max_blocks, TokenBytes.of(tokenizer))
        else:
            text.check(readings[kinds[directory]].blocks, tokenizer, directory)
    if len(readings) > 1:
        ends = {kind: _ends(reading) for kind, reading in readings.items()}
        if None in ends.values():
            told = "The tokenizers differ, and one loses some of a text: the models may not read the same text."
            error_console().print(told, soft_wrap=True)
        else:
            shortest = min(found[-1] for found in ends.values() if found)
            for kind, found in ends.items():
                count = max(1, sum(end <= shortest for end in found or ()))
                readings[kind] = replace(readings[kind], count=count)
    return {directory: readings[kind] for directory, kind in kinds.items()}


def _ends(reading: _Reading) -> list[int] | None:
    """The bytes of text up to the end of each block; None if they are not known."""
    if reading.sizes is None:
        return None
    count = min(len(reading.blocks), reading.count or len(reading.blocks))
    sizes = (int(reading.sizes(reading.blocks[index]["input_ids"]).sum()) for index in range(count))
    return list(itertools.accumulate(sizes))


def _compared(results: Mapping[str, PerplexityResult]) -> dict[str, Any]:
    """Results by model, ready for JSON, each with its difference to the first where they read the same blocks: of mean
    negative log-likelihoods, in all and by bin."""
    reference = next(iter(results))
    models = {}
    for name, result in results.items():
        models[name] = result.to_dict() | {"difference": None}
        if name != reference and (found := result.difference(results[reference])) is not None:
            by_bin = (result.difference(results[reference], index) for index in range(len(result.bins)))
            bins = [None if part is None else part.to_dict() for part in by_bin]
            models[name]["difference"] = {"to": reference, **found.to_dict(), "bins": bins}
    return models


def _show(results: Mapping[str, PerplexityResult], text: TextBlocks) -> Table:
    """One row per bin of positions, one column per model."""
    found = list(results.values())
    blocks = _listed([result.blocks for result in found])
    table = Table(title=f"perplexity of {text.name} by position, {blocks} blocks of {text.length:,} (95 % interval)")
    table.add_column("positions", justify="right", no_wrap=True)
    table.add_column("tokens", justify="right")
    for name in results:
        table.add_column(name, justify="right")
    for index, part in enumerate(found[0].bins):
        tokens = _listed([result.bins[index].tokens for result in found])
        table.add_row(f"{part.start:,} to {part.stop - 1:,}", tokens, *_cells(found, index))
    table.add_section()
    table.add_row("all", _listed([result.tokens for result in found]), *_cells(found))
    table.add_section()
    table.add_row("bits per token", "", *(f"{result.bits_per_token:.4f}" for result in found))
    bits = (show_number(result.bits_per_byte, result.bits_per_byte_interval, digits=4) for result in found)
    table.add_row("bits per byte", "", *bits)
    table.add_row("bytes", "", *("–" if result.bytes is None else f"{result.bytes:,}" for result in found))
    if len(found) > 1:
        table.caption = f"Percents: how much greater the perplexity is than that of {next(iter(results))}."
        table.caption_justify = "left"
    output_console().print(table)
    output_console().print(NOT_COVERED, soft_wrap=True)
    return table


def _listed(counts: Sequence[int]) -> str:
    """Counts of models, once where they are the same."""
    return " / ".join(dict.fromkeys(f"{count:,}" for count in counts))


def _cells(results: Sequence[PerplexityResult], index: int | None = None) -> list[str]:
    """Perplexities in a bin of positions, or in all, and those of further models also beside that of the first."""
    shown = []
    for result in results:
        part = result if index is None else result.bins[index]
        cell = show_number(part.perplexity, part.perplexity_interval)
        if result is not results[0] and part.tokens:
            cell += f"\n{show_ratio(result.difference(results[0], index))}"
        shown.append(cell)
    return shown
