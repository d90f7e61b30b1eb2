"""`holdfast inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from holdfast.cli.common import model_directory, output_console, read_model, read_task
from holdfast.cli.errors import UsageError
from holdfast.cli.evaluate.common import check_page, read_text_models, reads_text, refuse_unknown_tokens
from holdfast.cli.parsing import parse
from holdfast.files import UnreadableError

if TYPE_CHECKING:
    from torch import Tensor

DESCRIPTION = """\
Write a page that shows what a model holds at every step of a text: tokens coloured by retention score, per layer and
head; what is in the window, what in the store, what was dropped and when; for laNSA the blocks that are read. The page
opens in any browser, without network. A model without layers of learned eviction or native sparse attention, such as
pure Gated DeltaNet, chooses nothing that could be shown: it is refused, exit status 2.

examples:
  holdfast inspect runs/books-lalte "It was the best of times, it was the worst of times"
  holdfast inspect runs/books-lalte --file chapter.txt --output chapter.html
  holdfast inspect runs/demo/needle-lalte --needle
"""

MOST_TOKENS = 65_536
"""Of a page: a browser redraws every one of them at each step."""


@dataclass(frozen=True)
class Inspect:
    """Look into a model."""

    model: tyro.conf.Positional[str]
    """Directory of a trained model, or a model on the hub (OWNER/NAME[@REVISION])."""
    prompt: tyro.conf.Positional[str | None] = None
    """Text to read."""
    file: Path | None = None
    """File with the text to read."""
    needle: bool = False
    """Read a sample of the model's needle task."""
    seed: int | None = None
    """Of the sample of --needle; default: 0."""
    max_tokens: int | None = None
    """Longer texts are cut, for the page grows with them; at most 65,536. Default: 4096, or what the model was trained
    on where that is less."""
    output: Path = Path("inspect.html")
    """Page to write; one that is there is replaced."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights, and of what is computed with them."""

    def __post_init__(self) -> None:
        given = [self.prompt is not None, self.file is not None, self.needle]
        if sum(given) != 1:
            raise UsageError("Give one thing to read: a PROMPT, --file FILE or --needle.")
        if self.seed is not None and not self.needle:
            raise UsageError("--seed draws the sample of --needle, and text is read as it is; leave --seed out.")
        if self.max_tokens is not None and not 1 <= self.max_tokens <= MOST_TOKENS:
            raise UsageError(f"--max-tokens is {self.max_tokens:,}; give 1 to {MOST_TOKENS:,}.")
        check_page(self.output)


def run(arguments: Sequence[str]) -> None:
    """Parse, read and write the page."""
    settings = parse(Inspect, arguments or ["--help"], prog="holdfast inspect", description=DESCRIPTION)
    directory = model_directory(settings.model)
    _refuse_without_choice(directory)

    from holdfast.evaluation.inspection import inspect_sequence, write_inspection

    ids, tokens = _needle(settings, directory) if settings.needle else _text(settings, directory)
    layers = inspect_sequence(read_model(directory, settings.dtype), ids)
    page = write_inspection(layers, tokens, settings.output, title=f"{directory}: {len(tokens):,} tokens")
    output_console().print(f"Open {page} in a browser.", soft_wrap=True)


def _refuse_without_choice(directory: Path) -> None:
    """Refuse before its weights are read a model of which every page would be empty."""
    from holdfast.configuration import HybridConfig

    mixers = HybridConfig.from_pretrained(directory).mixers or ()
    if not {"learned_eviction", "native_sparse_attention"} & set(mixers):
        raise UsageError(
            f"{directory} neither evicts nor selects, its layers are {' and '.join(sorted(set(mixers)))}; give a model "
            f"with learned_eviction or native_sparse_attention. `holdfast info {directory}` shows what its cache holds."
        )


def _needle(settings: Inspect, directory: Path) -> tuple[Tensor, list[str]]:
    task = read_task(directory)
    ids = _first(task.sample(settings.seed or 0, 1)["input_ids"], settings, directory)
    return ids, [f"{word} " for word in task.describe(ids[0].tolist()).split()]


def _text(settings: Inspect, directory: Path) -> tuple[Tensor, list[str]]:
    if not reads_text(directory):
        raise UsageError(f"{directory} has no tokenizer.json, so it cannot read text; try --needle.")
    tokenizer = read_text_models([directory], english=False)[directory]
    ids = tokenizer(_read(settings), return_tensors="pt")["input_ids"]
    if not ids.numel():
        raise UsageError("The text is empty; give at least one character.")
    ids = _first(ids, settings, directory)
    refuse_unknown_tokens(ids.tolist(), tokenizer, directory)
    return ids, [tokenizer.decode([token]) for token in ids[0].tolist()]


def _first(ids: Tensor, settings: Inspect, directory: Path) -> Tensor:
    """The first tokens of ids [1, T], as many as are to be read; says so where some are left out."""
    from holdfast.configuration import HybridConfig

    told = HybridConfig.from_pretrained(directory).max_position_embeddings
    count = settings.max_tokens or min(4096, told)
    if ids.shape[1] > count:
        output_console().print(f"Of {ids.shape[1]:,} tokens the first {count:,} are read; --max-tokens sets how many.")
    ids = ids[:, :count]
    if ids.shape[1] > told:
        output_console().print(f"{ids.shape[1]:,} tokens are more than the {told:,} that {directory} was trained on.")
    return ids


def _read(settings: Inspect) -> str:
    if settings.file is None:
        return settings.prompt or ""
    try:
        return settings.file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UsageError(f"There is no file {settings.file}; give one with text.") from error
    except UnicodeDecodeError as error:
        raise UnreadableError(f"{settings.file} cannot be read: {error}") from error
