"""Triton's kernels on the CPU, by its interpreter, where there is no GPU.

Importing this module turns it on. It must come before whatever imports Triton, which reads the variable at once.
"""

import importlib.util
import inspect
import os
from types import FunctionType
from typing import Any

import torch


def _prepare() -> None:
    if importlib.util.find_spec("triton") is None or torch.cuda.is_available():
        return
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: type, scope: Any) -> None:
        """Loop bounds are arrays of one element there, which NumPy from 2.4 on refuses to take for integers."""
        patch_tensor(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_mend
    interpreter._patch_lang = _PatchOnce(interpreter._patch_lang)


class _PatchOnce:
    """Patches Triton's language once a launch, not at every call of one function of a kernel by another.

    The interpreter's own does the latter, and takes nine tenths of the time with it.
    """

    def __init__(self, patch: Any) -> None:
        self._patch = patch
        self._patched: set[int] = set()
        self._scopes: list[Any] = []

    def __call__(self, function: FunctionType) -> "_PatchOnce":
        modules = {id(value) for value in function.__globals__.values() if inspect.ismodule(value)}
        if not modules <= self._patched:
            self._patched |= modules
            self._scopes.append(self._patch(function))
        return self

    def restore(self) -> None:
        """What the interpreter calls at the end of a launch."""
        while self._scopes:
            self._scopes.pop().restore()
        self._patched.clear()


_prepare()
