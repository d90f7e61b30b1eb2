"""`holdfast convert`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from holdfast.cli.common import model_directory, output_console
from holdfast.cli.errors import UsageError
from holdfast.cli.parsing import parse

DESCRIPTION = """\
Rewrite a checkpoint: weights as safetensors, the configuration, what generation takes for granted, recipe.toml, and the
tokenizer if there is one. SOURCE may be in this library's or in the published format and is not changed.

The published format has no place for two_sided, proportional, damping and budget of the controller, and none for a λ
below 0, which becomes 0 there; this library's has none for the published schedule of the scorer's training. The model
computes the same; only further training differs. A warning names what was lost. A model that the published format
cannot say is refused: one with another threshold than 0.5, such as the demo's laLTE, with a causal scorer, or with
several kinds of attention.

examples:
  holdfast convert downloads/gated-deltanet-lte-0.4B-10B models/lte --format holdfast
  holdfast convert runs/books-lalte published/books-lalte --format published
"""


@dataclass(frozen=True)
class Convert:
    """Rewrite a checkpoint in another format."""

    source: tyro.conf.Positional[str]
    """Directory of a saved model, in either format, or a model on the hub (OWNER/NAME[@REVISION])."""
    target: tyro.conf.Positional[str]
    """Directory to write; one that exists is replaced only with --overwrite."""
    format: Literal["holdfast", "published"]
    """Names and configuration: those of this library, or of the published checkpoints."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Convert the weights to this type; left out: as they are."""
    overwrite: bool = False
    """Replace TARGET, with all that is in it, if it exists."""
    allow_pickle: bool = False
    """Read pickled weights (pytorch_model.bin) of a directory too, which can run code of whoever made them; none are
    downloaded from the hub."""


def run(arguments: Sequence[str]) -> None:
    """Parse and convert."""
    settings = parse(Convert, arguments or ["--help"], prog="holdfast convert", description=DESCRIPTION)
    if Path(settings.target).exists() and not settings.overwrite:
        raise UsageError(f"{settings.target} exists already; give another TARGET, or --overwrite to replace it.")
    source = model_directory(settings.source)

    import torch
    from transformers.utils import logging

    from holdfast.checkpoints import convert

    logging.disable_progress_bar()
    try:
        written = convert(
            source,
            settings.target,
            format=settings.format,
            overwrite=settings.overwrite,
            allow_pickle=settings.allow_pickle,
            dtype=None if settings.dtype is None else getattr(torch, settings.dtype),
        )
    except FileExistsError as error:  # SOURCE itself lies there
        raise UsageError(str(error)) from error
    output_console().print(f"The converted model is in {written}.", soft_wrap=True)
