"""Triton's kernels on the CPU, by its interpreter, where there is no GPU.

Importing this module turns it on. It must come before whatever imports Triton, which reads the variable at once.
"""

import importlib.util
import os

import torch


def _prepare() -> None:
    if importlib.util.find_spec("triton") is None or torch.cuda.is_available():
        return
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: type, scope: object) -> None:
        """Loop bounds are arrays of one element there, which NumPy from 2.4 on refuses to take for integers."""
        patch(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_mend


_prepare()
