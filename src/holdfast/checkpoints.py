"""Checkpoints in this library's and in the published format, one into the other (specification §4)."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME, logging

from holdfast.configuration import AUTO_FILE, HybridConfig
from holdfast.files import read_json
from holdfast.loading import PICKLE_PATTERNS
from holdfast.modeling import HybridForCausalLM
from holdfast.published import PUBLISHED_TYPES, to_published, unread_settings, unwritten_settings

logger = logging.get_logger(__name__)

TOKENIZER_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "chat_template*",
)
RECIPE = "recipe.toml"
"""Beside the weights: which task the model was trained on, without which it cannot be asked for needles of its own."""


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format: Literal["holdfast", "published"],
    overwrite: bool = False,
    allow_pickle: bool = False,
    dtype: torch.dtype | None = None,
) -> Path:
    """Read a checkpoint in either format and write it in `format`: config.json, safetensors, generation_config.json,
    tokenizer files, and recipe.toml.

    Everything is written to a temporary directory next to `target`, which takes its place when it is complete. What the
    format has no place for is left out, and one warning of this module's logger names it.

    Args:
        source: directory or hub id.
        target: directory to make.
        format: "holdfast" or "published". Weights are the same; config.json differs. The published one has no place
            for `two_sided`, `proportional`, `damping` and `budget` of the controller and for `scale_residual_init`, and
            a λ below 0, which its rule does not know, becomes 0. The model computes the same; further training
            differs.
        overwrite: replace `target` if it exists.
        allow_pickle: also read pickled weights, which can run code of whoever made them.
        dtype: of the weights; None keeps theirs.

    Returns:
        The path of `target`.

    Raises:
        ValueError: the format is unknown or cannot say what the configuration says, or the weights do not fit it.
        UnreadableError: naming the file of `source` that is damaged.
        FileExistsError: `target` exists, or it is to be replaced and holds `source`.
        OSError: there are no weights, or only pickled ones.
    """
    if format not in ("holdfast", "published"):
        raise ValueError(f"format must be 'holdfast' or 'published', got {format!r}")
    target = Path(target).resolve()
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists already: choose another target, or give overwrite=True.")
    folder = _local_folder(source, allow_pickle)
    _check(folder, target)
    if format == "published":
        to_published(HybridConfig.from_pretrained(folder))  # before the weights are read
    use_safetensors = not allow_pickle or any(folder.glob("*.safetensors"))  # which are taken where both are there
    model = HybridForCausalLM.from_pretrained(folder, use_safetensors=use_safetensors, dtype=dtype or "auto")
    published = to_published(model.config) if format == "published" else None
    lost = _unread(folder) + ([] if published is None else [*unwritten_settings(model.config), *_raise_lambda(model)])
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        made = Path(scratch) / "new"
        _write(model, published, folder, made)
        if target.exists():
            target.rename(Path(scratch) / "old")  # deleted with the scratch directory
        made.rename(target)
    if lost:
        logger.warning(
            f"{target} is without what has no place in its format: {'; '.join(lost)}. The model computes the same; "
            "only further training differs, and what other programs do that read these."
        )
    return target


def _write(model: HybridForCausalLM, published: dict[str, Any] | None, folder: Path, made: Path) -> None:
    """Write a directory with the model, with the `published` config.json if there is one, and what lies in `folder`."""
    model.save_pretrained(made)
    if published is not None:
        (made / AUTO_FILE).unlink()
        (made / "config.json").write_text(json.dumps(published, indent=2) + "\n", encoding="utf-8")
    for path in _beside_the_weights(folder):
        if path.name != GENERATION_CONFIG_NAME:  # which the model has written
            shutil.copyfile(path, made / path.name)


def _check(folder: Path, target: Path) -> None:
    """Refuse what would lose something.

    Raises:
        FileExistsError: `target` holds `folder`.
        UnreadableError: naming the file beside the weights that is damaged.
    """
    if target in (folder.resolve(), *folder.resolve().parents):
        raise FileExistsError(f"{target} holds the source, which would be lost: choose another target.")
    for path in _beside_the_weights(folder):
        if path.suffix == ".json":  # transformers would go on without it
            read_json(path)


def _beside_the_weights(folder: Path) -> list[Path]:
    patterns = (*TOKENIZER_PATTERNS, RECIPE, GENERATION_CONFIG_NAME)
    return [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]


def _unread(folder: Path) -> list[str]:
    """What this library does not take from the configuration in `folder`."""
    values, _ = PreTrainedConfig.get_config_dict(folder)
    return unread_settings(values) if values.get("model_type") in PUBLISHED_TYPES else []


def _raise_lambda(model: HybridForCausalLM) -> list[str]:
    """Set every λ below 0 to 0; says how many there were."""
    if not model.model.has_scorers:
        return []
    below = int((model.model.l1_lambda < 0).sum())
    model.model.l1_lambda.clamp_(min=0)
    return [f"λ below 0, now 0, of {below} of {model.model.l1_lambda.numel()} heads"] if below else []


def _local_folder(source: str | os.PathLike[str], allow_pickle: bool) -> Path:
    """The directory `source`, or that of a download from the hub with the files that matter."""
    if Path(source).is_dir():
        return Path(source)
    patterns = ["*.json", "*.safetensors", RECIPE, *TOKENIZER_PATTERNS, *(PICKLE_PATTERNS if allow_pickle else ())]
    return Path(snapshot_download(os.fspath(source), allow_patterns=patterns))
