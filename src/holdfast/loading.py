"""Loading weights without surprises: nothing unpickled by default, nothing initialised in silence."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from holdfast.files import UnreadableError

PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def load_checked(load: Callable[..., Any], source: str | os.PathLike[str] | None, *args: Any, **kwargs: Any) -> Any:
    """Call transformers' `from_pretrained` and check what it did.

    Args:
        load: the bound `PreTrainedModel.from_pretrained`.
        source: directory or hub id.
        use_safetensors: True by default, and where it is None; False also reads pickled weights
            (`pytorch_model.bin`), which can run code of whoever made them.
        strict: True by default; False accepts weights that are missing (initialised anew) or left over.
        ignore_mismatched_sizes: False by default; True initialises weights of the wrong shape anew.

    Raises:
        OSError: if there are no weights, or only pickled ones.
        UnreadableError: naming the file of weights that is damaged.
        ValueError: naming the weights that are missing, left over or of the wrong shape.
    """
    strict = kwargs.pop("strict", True)
    with_info = kwargs.pop("output_loading_info", False)
    if kwargs.get("use_safetensors") is None:  # transformers would take pickled weights where there are no others
        kwargs["use_safetensors"] = True
    if kwargs["use_safetensors"] and source is not None:
        _refuse_pickles(source)
    reshape = kwargs.pop("ignore_mismatched_sizes", False)
    # transformers' own error about shapes does not name the weights, so it is asked to go on and report them.
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": strict or reshape}
    try:
        model, info = load(source, *args, **kwargs)
    except SafetensorError as error:  # which does not name the file
        raise UnreadableError(f"{_damaged(source)} cannot be read ({error}); copy or download it once more.") from error
    except OSError as error:
        if "no file named" not in str(error):
            raise
        raise OSError(f"{source} holds no weights (model.safetensors); has its training finished?") from error
    faults = [
        f"{kind} {_names(info[key])}"
        for kind, key in FAULTS
        if info.get(key) and not (reshape and key == "mismatched_keys")
    ]
    if faults and strict:
        raise ValueError(f"the weights in {source} do not fit the configuration: {'; '.join(faults)}")
    return (model, info) if with_info else model


FAULTS = (
    ("missing", "missing_keys"),
    ("not part of the model:", "unexpected_keys"),
    ("wrong shape:", "mismatched_keys"),
)


def _names(keys: Any) -> str:
    names = sorted(_name(key) for key in keys)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _name(key: Any) -> str:
    if isinstance(key, str):
        return key
    name, found, expected = key
    return f"{name} ({list(found)} instead of {list(expected)})"


def _damaged(source: str | os.PathLike[str] | None) -> str:
    """The first file of weights whose header and length do not agree; `source` where there is none to be found."""
    for path in sorted(Path(source).glob("*.safetensors")) if source is not None else ():
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:
            return str(path)
    return f"a file of weights in {source}"


def _refuse_pickles(source: str | os.PathLike[str]) -> None:
    folder = Path(source)
    if not folder.is_dir() or any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json")):
        return
    pickles = sorted(path.name for pattern in PICKLE_PATTERNS for path in folder.glob(pattern))
    if pickles:
        raise OSError(
            f"{folder} holds only pickled weights ({', '.join(pickles)}), which can run code when read. "
            "If you trust them, pass use_safetensors=False, and save_pretrained writes safetensors."
        )
