"""What the operators tell a compiler of their results, strides included, is what they return.

Inductor plans with the strides of the fake results, and `opcheck` does not compare them.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from holdfast.ops.native_sparse_attention import compressed, selected
from holdfast.ops.retained_attention import blocked

Case = tuple[Callable[..., Any], tuple[Any, ...]]


def retained(heads: int, kv_heads: int, tokens: int, dim: int, value_dim: int) -> Iterator[Case]:
    q, k, v = (torch.randn(1, tokens, h, d) for h, d in ((heads, dim), (kv_heads, dim), (kv_heads, value_dim)))
    until = torch.full((1, tokens, kv_heads), tokens)
    yield blocked._tiled, (q, k, v, until, 9, 0.3)
    out, log_sum = blocked._tiled(q, k, v, until, 9, 0.3)
    yield blocked._tiled_backward, (q, k, v, until, out, log_sum, torch.randn_like(out), 9, 0.3)


def sparse(heads: int, kv_heads: int, tokens: int, dim: int, value_dim: int) -> Iterator[Case]:
    """Rows as views of [B, T, heads, D], as "blocked" makes them."""
    size = 4
    length = tokens // size * size
    rows = torch.randn(1, length, kv_heads, heads // kv_heads, dim).transpose(1, 2).flatten(0, 1)
    keys, values = (torch.randn(1, length, kv_heads, d).transpose(1, 2).flatten(0, 1) for d in (dim, value_dim))
    means = tuple(x.unflatten(1, (-1, size)).mean(2) for x in (keys, values))
    positions = torch.arange(length)[None]
    begins = torch.tensor([0] * 5 + [5] * (length // size - 5))
    asked = (rows, *means, positions, begins, length, size, 3)
    yield compressed.compressed_attention, asked
    out, log_sum, blocks = compressed.compressed_attention(*asked)
    yield compressed._backward, (*asked[:5], log_sum, out.sum(-1), out, length, size)
    asked = (rows, keys, values, positions, blocks, size)
    yield selected.selected_attention, asked
    out, log_sum = selected.selected_attention(*asked)
    yield selected._backward, (*asked[:5], log_sum, out.sum(-1), out, size)


@pytest.mark.parametrize(
    ("cases", "native"), [(retained, True), (retained, False), (sparse, None)], ids=["native", "blocked", "sparse"]
)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "value_dim"), [(2, 2, 8, 8), (4, 2, 16, 5), (3, 1, 16, 16)])
@pytest.mark.parametrize("tokens", [52, 48])
def test_fake_results_have_the_layout_of_real_ones(
    cases: Callable[..., Iterator[Case]],
    native: bool | None,
    heads: int,
    kv_heads: int,
    dim: int,
    value_dim: int,
    tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`native`: whether the C++ kernels, where they exist, compute what is retained; sparse attention has none."""
    if native is False:
        monkeypatch.setattr(blocked.native, "supports", lambda *_: False)
    for op, arguments in cases(heads, kv_heads, tokens, dim, value_dim):
        with FakeTensorMode() as mode:
            fakes = op(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments))
        for number, (fake, real) in enumerate(zip(fakes, op(*arguments), strict=True)):
            assert layout(real) == layout(fake), f"result {number} of {op}"


def layout(x: Tensor) -> tuple[torch.Size, list[int], torch.dtype]:
    """Of a dimension of one element the stride means nothing, to a compiler either."""
    return x.shape, [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1], x.dtype
