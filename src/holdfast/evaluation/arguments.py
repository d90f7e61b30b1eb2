"""What evaluations refuse from Python callers at once: arguments that are likely to be mistaken for others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.configuration import HybridConfig
from holdfast.evaluation.sample_log import SampleLog

__all__ = ["as_blocks", "check_kind", "check_log", "check_model", "check_token_ids", "check_tokenizer_kind"]


def check_model(model: Any, *, hybrid: bool = False) -> None:
    """Refuse what is no model, such as the path of one.

    Args:
        model: given by a caller.
        hybrid: whether it must be one of this library: its cache or its layers are looked at.

    Raises:
        TypeError: saying what to give instead.
    """
    if isinstance(model, str | Path):
        raise TypeError(
            f"model is the path {str(model)!r}: load it first, HybridForCausalLM.from_pretrained({str(model)!r})."
        )
    wanted = "a HybridForCausalLM" if hybrid else "a model, such as a HybridForCausalLM"
    if not isinstance(model, nn.Module) or (hybrid and not isinstance(getattr(model, "config", None), HybridConfig)):
        raise TypeError(f"model is {_kind(model)}: give {wanted}.")


def check_tokenizer_kind(tokenizer: Any) -> None:
    """Refuse what is no tokenizer, such as the name of one.

    Raises:
        TypeError: saying what to give instead.
    """
    if isinstance(tokenizer, str | Path):
        raise TypeError(
            f"tokenizer is the name {str(tokenizer)!r}: load it first, "
            f"holdfast.data.text.load_tokenizer({str(tokenizer)!r})."
        )
    if not callable(tokenizer) or not hasattr(tokenizer, "batch_decode"):
        raise TypeError(f"tokenizer is {_kind(tokenizer)}: give that of the model, a tokenizer of transformers.")


def check_kind(name: str, value: Any, kind: Any, wanted: str) -> None:
    """Refuse a value that is no `kind`, and text where it is taken for a sequence; `wanted` ends the line that says so.

    Raises:
        TypeError: f"{name} is …: give {wanted}."
    """
    if not isinstance(value, kind) or (isinstance(value, str) and kind is not str):
        raise TypeError(f"{name} is {_kind(value)}: give {wanted}.")


def check_log(log: Any) -> None:
    """Refuse a log that is no `SampleLog`, such as its path.

    Raises:
        TypeError: saying what to give instead.
    """
    if log is not None:
        check_kind("log", log, SampleLog, "SampleLog(path, determines), which says what the answers follow from")


def check_token_ids(name: str, ids: Any, shape: str) -> None:
    """Refuse what is no tensor of integers; `shape`, for the line, is what it should have.

    Raises:
        TypeError: saying what to give instead.
    """
    integers = isinstance(ids, Tensor) and not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if not integers:
        found = f"a tensor of {ids.dtype}" if isinstance(ids, Tensor) else _kind(ids)
        raise TypeError(f"{name} is {found}: give token ids, an int64 tensor {shape}.")


def as_blocks(blocks: Any) -> Iterator[dict[str, Tensor]]:
    """Blocks of text, one by one, from dictionaries with `input_ids` or from bare tensors of token ids [L].

    Raises:
        TypeError, ValueError: naming the first that is neither.
    """
    can_iterate = hasattr(blocks, "__iter__") or hasattr(blocks, "__getitem__")  # data sets may have the latter alone
    if isinstance(blocks, str | Path | Mapping) or not can_iterate:
        raise TypeError(f"blocks is {_kind(blocks)}: {_BLOCKS}.")
    if isinstance(blocks, Tensor):
        check_token_ids("blocks", blocks, "[N, L]")
        if blocks.dim() != 2:
            raise ValueError(f"blocks is a tensor of shape {list(blocks.shape)}: give [N, L], N blocks of L tokens.")
    return (_block(index, block) for index, block in enumerate(blocks))


_BLOCKS = "give blocks of token ids, such as PackedText.from_texts(texts, tokenizer, length=512), or int64 [N, L]"


def _block(index: int, block: Any) -> dict[str, Tensor]:
    name = f"block {index}"
    if isinstance(block, Tensor):
        block = {"input_ids": block}
    if not isinstance(block, Mapping):
        raise TypeError(f"{name} is {_kind(block)}: {_BLOCKS}.")
    if "input_ids" not in block:
        raise ValueError(f"{name} has no input_ids, but {', '.join(map(str, block)) or 'nothing'}: {_BLOCKS}.")
    ids = block["input_ids"]
    check_token_ids(f"{name}'s input_ids", ids, "[L]")
    if ids.dim() != 1:
        raise ValueError(f"{name}'s input_ids have the shape {list(ids.shape)}: give one sequence [L] for each block.")
    return dict(block)


def _kind(value: Any) -> str:
    """What a value is, in words: its type, and itself where it is short."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    kind = type(value).__name__
    return f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"
