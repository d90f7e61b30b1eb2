"""Retained attention on a CPU in C++ (native.cpp): what `blocked` does in tiles, without a score in main memory.

All tensors here are rows as in `blocked`: queries [rows, Tq·G, D] that carry scale / ln 2, keys [rows, Tk, D], values
[rows, Tk, Dv].
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.ops.native import VECTORS, load_library
from holdfast.ops.threads import in_threads

_SOURCE = Path(__file__).with_name("native.cpp")
# Query rows of a group must fit in a tile.
_LARGEST_GROUP = 32


def is_available() -> bool:
    """Whether there is a compiled library; the first call compiles it."""
    return load_library(_SOURCE, VECTORS) is not None


def supports(q: Tensor, groups: int) -> bool:
    """Whether the library can serve query rows of this dtype and device, with `groups` query heads per KV head."""
    fits = q.device.type == "cpu" and q.dtype == torch.float32 and groups <= _LARGEST_GROUP
    return fits and is_available()


def forward(q: Tensor, k: Tensor, v: Tensor, until: Tensor, groups: int, window: int) -> tuple[Tensor, Tensor]:
    """Output rows [rows, Tq·G, Dv] and the base-2 log-sum-exp [rows, Tq·G, 1], +∞ where a query sees nothing.

    `until` [rows or 1, Tk], int64, holds the last query that sees each key, at most Tk. fp32 only.
    """
    call = _Call(q, k, v, until, groups, window)
    out, log_sum = q.new_empty(*q.shape[:2], call.value_dim), q.new_empty(*q.shape[:2], 1)
    call.run("holdfast_forward", k_turned=_turned(call.k, call.panel), out=out, log_sum=log_sum)
    return out[..., : v.shape[2]].contiguous(), log_sum


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    until: Tensor,
    groups: int,
    window: int,
    log_sum: Tensor,
    grad_out: Tensor,
    inner: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the rows q, k and v; `inner` [rows, Tq·G, 1] is ⟨out, grad_out⟩."""
    call = _Call(q, k, v, until, groups, window)
    dq, dk, dv = torch.empty_like(call.q), torch.zeros_like(call.k), torch.zeros_like(call.v)
    call.run(
        "holdfast_backward",
        k_turned=_turned(call.k, call.panel),
        v_turned=_turned(call.v, call.panel),
        log_sum=log_sum,
        grad_out=_padded(grad_out, 0, call.panel),
        inner=inner,
        dq=dq,
        dk=dk,
        dv=dv,
    )
    keys = k.shape[1]
    # Without the padding, whose strides a compiler could not foresee.
    gradients = dq[..., : q.shape[2]], dk[:, :keys, : k.shape[2]], dv[:, :keys, : v.shape[2]]
    return gradients[0].contiguous(), gradients[1].contiguous(), gradients[2].contiguous()


class _Sizes(ctypes.Structure):
    """`Sizes` of native.cpp."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ["queries", "keys", "padded_keys", "groups", "dim", "value_dim", "window", "until_stride"]
    ]


class _Tensors(ctypes.Structure):
    """`Tensors` of native.cpp."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in [
            "q",
            "k",
            "k_turned",
            "v",
            "v_turned",
            "until",
            "out",
            "log_sum",
            "grad_out",
            "inner",
            "dq",
            "dk",
            "dv",
        ]
    ]


class _Call:
    """Inputs in the layout of native.cpp: channels and keys padded with zeros to whole panels."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, until: Tensor, groups: int, window: int) -> None:
        library = load_library(_SOURCE, VECTORS)
        assert library is not None
        self.library, self.panel = library, library.holdfast_panel()
        self.q = _padded(q, 0, self.panel)
        self.k, self.v = (_padded(x, -k.shape[1] % self.panel, self.panel) for x in (k, v))
        self.until = F.pad(until.int(), (0, self.k.shape[1] - until.shape[1]), value=-1).contiguous()
        self.value_dim = self.v.shape[2]
        stride = 0 if until.shape[0] == 1 else self.until.shape[1]
        padded_keys, dim = self.k.shape[1:]
        self.sizes = _Sizes(q.shape[1] // groups, k.shape[1], padded_keys, groups, dim, self.value_dim, window, stride)

    def run(self, name: str, **tensors: Tensor) -> None:
        """Call the function for all rows, in as many threads as PyTorch has."""
        tensors |= {"q": self.q, "k": self.k, "v": self.v, "until": self.until}
        assert all(tensor.is_contiguous() for tensor in tensors.values())
        pointers = _Tensors(**{key: tensor.data_ptr() for key, tensor in tensors.items()})
        function = getattr(self.library, name)
        run = functools.partial(_run, function, self.sizes, pointers)
        in_threads(run, self.q.shape[0], torch.get_num_threads())


def _run(function: Callable[..., object], sizes: _Sizes, tensors: _Tensors, first: int, end: int) -> None:
    function(ctypes.byref(sizes), ctypes.byref(tensors), ctypes.c_int64(first), ctypes.c_int64(end))


def _padded(rows: Tensor, length: int, panel: int) -> Tensor:
    """Contiguous rows with `length` more of zeros, and zero channels up to a whole panel."""
    channels = -rows.shape[2] % panel
    return F.pad(rows, (0, channels, 0, length)).contiguous() if channels or length else rows.contiguous()


def _turned(rows: Tensor, panel: int) -> Tensor:
    """[rows, Tk, D] → [rows, Tk / panel, D, panel]."""
    return rows.unflatten(1, (-1, panel)).transpose(2, 3).contiguous()
