"""C++ that is compiled where it first runs, and kept for the next process.

A source is plain C++ without PyTorch's headers (two seconds to compile) and is called through `ctypes`, which lets
other threads run meanwhile: `in_threads` is all that it takes to use the other cores. Where there is no
compiler, or `HOLDFAST_NATIVE=0` is set, nothing is compiled and the caller takes its way in PyTorch.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from holdfast.files import replacing

__all__ = ["GRIDS", "VECTORS", "Functions", "is_plain", "is_transformed", "is_watched", "load_library"]

VECTORS = Path(__file__).with_name("vectors.h")
"""Vectors of floats and products of small matrices, for C++ sources."""

GRIDS = Path(__file__).with_name("grids.h")
"""Small matrices that lie well in the cache, for sources that include `VECTORS` through it."""

_COMPILERS = ("c++", "g++", "clang++")
_OPTIONS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno")
# What PyTorch found the processor to have; elsewhere (ARM) the compiler's default includes the vectors.
_VECTORS = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
}


_PLAIN = (Tensor, nn.Parameter)


def is_transformed() -> bool:
    """Whether a compiler, or a transformation such as vmap or jvp, makes something else of PyTorch's operations."""
    return bool(
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack()
    )


def is_watched() -> bool:
    """Whether something follows or transforms PyTorch's operations: it would not see what C++ does."""
    return is_transformed() or bool(torch._C._len_torch_dispatch_stack())  # FLOP counters, fake tensors


def is_plain(x: Tensor) -> bool:
    """Whether C++ can read x: float32 in main memory, nothing lazy, no subclass."""
    ours = type(x) in _PLAIN and x.dtype == torch.float32 and x.device.type == "cpu"
    return ours and x.layout == torch.strided and not x.is_neg()


class Functions:
    """The functions of one C++ source.

    Args:
        signatures: their arguments, as types of `ctypes`, by name; none returns anything.
        source, headers: as for `load_library`.
    """

    def __init__(self, signatures: Mapping[str, Any], source: Path, *headers: Path) -> None:
        self._signatures, self._files = signatures, (source, *headers)

    def are_there(self) -> bool:
        """Whether they can be called; the first question compiles them."""
        return self._library is not None

    def call(self, name: str, *arguments: object) -> None:
        """Call one; a tensor stands for its first number."""
        values = (argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments)
        getattr(self._library, name)(*values)

    @functools.cached_property
    def _library(self) -> ctypes.CDLL | None:
        library = load_library(*self._files)
        if library is not None:
            for name, types in self._signatures.items():
                getattr(library, name).argtypes = types
                getattr(library, name).restype = None
        return library


@functools.cache
def load_library(source: Path, *headers: Path) -> ctypes.CDLL | None:
    """The library compiled from `source`, which includes `headers`; None where there is no compiler or it fails, which
    is said once.

    It lies in `HOLDFAST_CACHE` (`~/.cache/holdfast` if unset), under a name that changes with all that went into it.
    """
    if os.environ.get("HOLDFAST_NATIVE", "1") == "0":
        return None
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        _warn("no C++ compiler was found")
        return None
    command = [*compiler.split(), *_OPTIONS, *_VECTORS.get(torch.backends.cpu.get_cpu_capability(), ())]
    try:
        return ctypes.CDLL(str(_compiled([source, *headers], command)))
    except OSError as error:
        _warn(f"the C++ compiler failed ({error})")
        return None


def _compiled(sources: Sequence[Path], command: list[str]) -> Path:
    """Path of the library; OSError if it cannot be made."""
    parts = [path.read_bytes() for path in sources] + [word.encode() for word in command]
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    folder = Path(os.environ.get("HOLDFAST_CACHE") or Path.home() / ".cache" / "holdfast")
    target = folder / f"{sources[0].stem}-{name}.so"
    if target.is_file():
        return target
    with replacing(target) as fresh:  # other processes may be compiling the same
        done = subprocess.run([*command, str(sources[0]), "-o", str(fresh)], capture_output=True, text=True)
        if done.returncode:
            raise OSError(next(iter(done.stderr.strip().splitlines()), f"exit status {done.returncode}"))
    return target


def _warn(reason: str) -> None:
    warnings.warn(
        f"{reason}, so models run on slower PyTorch code: install g++ or clang++, or name one in CXX "
        "(HOLDFAST_NATIVE=0 says that you know).",
        stacklevel=4,
    )
