"""native_sparse_attention: every backend against the dense reference, forward and backward.

Which blocks are chosen is discrete. Random inputs in float64 have no two blocks whose importance differs by rounding
alone, and those of lower precision are compared where all blocks are read, or with the choice itself.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from native_sparse_inputs import assert_like_reference, outputs_and_gradients, tensors
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from holdfast.ops.native_sparse_attention import (
    BACKENDS,
    blocked,
    compressed,
    native_sparse_attention,
    packing,
    selected,
    tiles,
)
from holdfast.ops.retained_attention import retained_attention

pytestmark = pytest.mark.usefixtures("poisoned_memory")
FAST_BACKENDS = [name for name in BACKENDS if name not in ("reference", "triton")]
WAYS = ["gathered", "masked", "by block"]


@pytest.fixture(params=FAST_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The way in which "blocked" reads selected blocks, whatever would be cheapest, and tiles of a few scores."""
    monkeypatch.setattr(selected, "_FEW_QUERIES", 1 << 30 if request.param == "gathered" else 0)
    monkeypatch.setattr(selected, "_VISIT", 1 << 40 if request.param == "masked" else -(1 << 40))
    monkeypatch.setattr(tiles, "_CPU_SCORES", 600)
    return str(request.param)


@pytest.mark.parametrize(
    ("block_size", "num_blocks", "window"), [(4, 3, 5), (7, 4, 1), (1, 5, 3), (16, 1, 9), (5, 2, 7)]
)
@pytest.mark.parametrize("length", [1, 3, 63, 130])
def test_lengths_and_sizes(length: int, block_size: int, num_blocks: int, window: int, backend: str, way: str) -> None:
    sizes = {"block_size": block_size, "num_blocks": num_blocks, "window": window}
    assert_like_reference(tensors(length), backend, **sizes)


@pytest.mark.parametrize("queries", [1, 2, 16, 17, 90])
def test_queries_behind_cached_keys(queries: int, backend: str, way: str) -> None:
    inputs = tensors(101, queries, value_dim=5)
    assert_like_reference(inputs, backend, block_size=6, num_blocks=4, window=11)
    lengths = torch.tensor([101, 47])  # rows of another length; for many queries some have no index
    assert_like_reference(inputs, backend, block_size=6, num_blocks=4, window=11, lengths=lengths)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 33), (32, 2, 16), (3, 1, 64), (6, 3, 1)])
def test_heads_dims_and_dtypes(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, backend: str, way: str) -> None:
    """All blocks are read, so that no precision changes the choice."""
    inputs = tensors(60, heads=heads, kv_heads=kv_heads, dim=dim, value_dim=dim + 3, dtype=dtype)
    assert_like_reference(inputs, backend, block_size=9, num_blocks=7, window=10)


@settings(max_examples=60)
@given(
    lengths=st.tuples(st.integers(1, 90), st.integers(0, 80)),
    heads=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3)),
    dims=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 9), st.integers(1, 100)),
    held=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    lengths: tuple[int, int],
    heads: tuple[int, int, int],
    dims: tuple[int, int],
    sizes: tuple[int, int, int],
    held: tuple[float, float],
    seed: int,
) -> None:
    (keys, behind), (batch, kv_heads, groups), (dim, value_dim) = lengths, heads, dims
    shape = {"batch": batch, "heads": kv_heads * groups, "kv_heads": kv_heads, "dim": dim, "value_dim": value_dim}
    inputs = tensors(keys, max(1, keys - behind), seed=seed, **shape)
    arguments = dict(zip(("block_size", "num_blocks", "window"), sizes, strict=True))
    rows = torch.tensor([round(share * keys) for share in held[:batch]])
    for name in FAST_BACKENDS:
        assert_like_reference(inputs, name, **arguments)
        assert_like_reference(inputs, name, **arguments, lengths=rows)


def one_query(i: int, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    """Row 0, head 0, one head per group, in the words of the definition."""
    size, count, window = sizes
    complete = (i + 1) // size
    means_k, means_v = (x[: complete * size].unflatten(0, (complete, size)).mean(1) for x in (k, v))
    weights = (means_k @ q * q.shape[0] ** -0.5).softmax(0)
    importance = {block: float(weight) for block, weight in enumerate(weights)} | {0: 1.0}
    importance |= {i // size: 1.0, max(i // size - 1, 0): 1.0}
    best = sorted(importance, key=lambda block: -importance[block])[:count]
    read = [j for j in range(i + 1) if j // size in best]
    recent = slice(max(0, i - window + 1), i + 1)
    selected, sliding = ((k[rows] @ q * q.shape[0] ** -0.5).softmax(0) @ v[rows] for rows in (read, recent))
    return gates[0] * (weights @ means_v) + gates[1] * selected + gates[2] * sliding


@pytest.mark.parametrize("name", ["reference", *FAST_BACKENDS])
def test_the_definition_query_by_query(name: str) -> None:
    q, k, v, gates = (tensor.detach() for tensor in tensors(45, batch=1, heads=1, kv_heads=1))
    out, _ = native_sparse_attention(q, k, v, gates, block_size=4, num_blocks=5, window=6, backend=name)
    for i in range(45):
        expected = one_query(i, q[0, i, 0], k[0, :, 0], v[0, :, 0], gates[0, i, 0], (4, 5, 6))
        torch.testing.assert_close(out[0, i, 0], expected)


@pytest.mark.parametrize("name", ["reference", *FAST_BACKENDS])
def test_what_is_chosen(name: str) -> None:
    """Block 0, the own and the previous block always; then what all heads of a group together look at most."""
    q, k, v, gates = (tensor.detach().clone() for tensor in tensors(64, heads=2, kv_heads=1))
    k[:, 24:32] += 3 * q[:, -1:, :1]  # block 3 of 8 keys each, for the last query's first head
    choose = functools.partial(native_sparse_attention, q, k, v, gates, block_size=8, window=1, backend=name)
    blocks = choose(num_blocks=4)[1]
    assert blocks.shape == (2, 64, 1, 4)
    assert blocks[:, -1, 0].tolist() == [[0, 3, 6, 7]] * 2
    assert blocks[0, :17:8, 0].tolist() == [[0, -1, -1, -1], [0, 1, -1, -1], [0, 1, 2, -1]]
    assert choose(num_blocks=1)[1][0, -1, 0].tolist() == [7]
    assert choose(num_blocks=2)[1][0, -1, 0].tolist() == [6, 7]
    assert choose(num_blocks=3)[1][0, -1, 0].tolist() == [0, 6, 7]
    assert choose(num_blocks=9)[1][0, -1, 0].tolist() == [*range(8), -1]


def test_with_all_blocks_the_selected_branch_is_full_attention(backend: str, way: str) -> None:
    q, k, v, gates = (tensor.detach() for tensor in tensors(50))
    gates = torch.zeros_like(gates)
    gates[..., 1] = 1.0
    out, _ = native_sparse_attention(q, k, v, gates, block_size=8, num_blocks=7, window=1, backend=backend)
    torch.testing.assert_close(out, retained_attention(q, k, v, None, None))


def test_chunks_of_any_length_equal_one_pass(backend: str) -> None:
    """Also with the means of blocks given, of which those of blocks to come are never read."""
    q, k, v, gates = (tensor.detach() for tensor in tensors(130))
    attend = functools.partial(native_sparse_attention, block_size=5, num_blocks=4, window=7, backend=backend)
    whole, chosen = attend(q, k, v, gates)
    means = [x.unflatten(1, (26, 5)).mean(2) for x in (k, v)]
    start = 0
    for chunk in (1, 60, 16, 1, 20, 1, 1, 30):
        end = start + chunk
        unknown = [torch.cat([x[:, : end // 5], torch.full_like(x[:, end // 5 :], 1e9)], dim=1) for x in means]
        for known in (None, tuple(unknown)):
            rows = q[:, start:end], k[:, :end], v[:, :end], gates[:, start:end]
            part, blocks = attend(*rows, compressed=known)
            torch.testing.assert_close(part, whole[:, start:end])
            assert torch.equal(blocks, chosen[:, start:end])
        start = end
    assert start == 130


def test_gradients_of_given_means(backend: str) -> None:
    inputs = tensors(40, 23)
    means = tuple(x.detach().unflatten(1, (8, 5)).mean(2).requires_grad_() for x in inputs[1:3])
    results = []
    for name in ("reference", backend):
        attend = functools.partial(native_sparse_attention, block_size=5, num_blocks=4, window=3, backend=name)
        out, _ = attend(*inputs, compressed=means)
        results.append(torch.autograd.grad(out.square().sum(), (*inputs, *means)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("lengths", [[0, 17, 1, 0, 40, 5, 0], [24, 32, 8], [1] * 6 + [50], [0, 0]])
@pytest.mark.parametrize(("block_size", "num_blocks", "window"), [(4, 4, 6), (8, 2, 40), (1, 9, 1)])
@pytest.mark.parametrize("looks", [True, False])
def test_packed_sequences_equal_separate_ones(
    lengths: list[int],
    block_size: int,
    num_blocks: int,
    window: int,
    looks: bool,
    backend: str,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a look at their lengths there is more room than they need, as on an accelerator."""
    monkeypatch.setattr(packing, "_can_look", lambda _: looks)
    inputs = tensors(sum(lengths), batch=1)
    sizes = {"block_size": block_size, "num_blocks": num_blocks, "window": window}
    attend = functools.partial(native_sparse_attention, **sizes, backend=backend)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    packed, chosen = outputs_and_gradients(functools.partial(attend, cu_seqlens=ends), *inputs)

    def separate(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        documents = zip(*(x.split(lengths, dim=1) for x in inputs), strict=True)
        outputs, blocks = zip(*(attend(*document) for document in documents), strict=True)
        return torch.cat(outputs, dim=1), torch.cat(blocks, dim=1)

    alone, blocks = outputs_and_gradients(separate, *inputs)
    assert torch.equal(chosen, blocks)
    for ours, theirs in zip(packed, alone, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_packed_sequences_of_any_number_are_one_graph(backend: str) -> None:
    """And one more when their number changes, and when the length of the row does; one sequence is not packed."""
    attend = functools.partial(native_sparse_attention, block_size=4, num_blocks=3, window=6, backend=backend)
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(attend, backend=count, fullgraph=True)
    several = ([0, 7, 40], [0, 7, 7, 30, 40], [0, 1, 2, 20, 22, 37, 40], [0, 3, 41], [0, 9, 20, 57], [0, 9, 9, 80])
    for ends in (*several, [0, 40]):
        inputs, cu_seqlens = tensors(ends[-1], batch=1), torch.tensor(ends)
        direct, chosen = outputs_and_gradients(functools.partial(attend, cu_seqlens=cu_seqlens), *inputs)
        results, blocks = outputs_and_gradients(functools.partial(compiled, cu_seqlens=cu_seqlens), *inputs)
        assert torch.equal(blocks, chosen)
        for ours, theirs in zip(results, direct, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert graphs <= 4


@pytest.mark.parametrize("columns", [[0, 5, 5, 17, 18, 40], [0, 8, 40], [0, 0, 40, 40]])
def test_where_packed_sequences_stand(columns: list[int]) -> None:
    packed = packing.Packing.of(torch.tensor(columns), 40, 4)
    place, begins = [], []
    for first, end in itertools.pairwise(columns):
        place += range(4 * len(begins), 4 * len(begins) + end - first)
        begins += [len(begins)] * -(-(end - first) // 4)
    assert packed.place.tolist() == place
    assert packed.begins.tolist() == begins
    ends = packing.ends_of(packed.begins).tolist()
    assert all(
        begins[end - 1] == begin and begins[end:][:1] != [begin] for begin, end in zip(begins, ends, strict=True)
    )
    x = torch.randn(1, 40, 3)
    spread = packed.spread(x)
    assert torch.equal(packed.gather(spread, torch.zeros(spread.shape[:2], dtype=torch.int64)[..., None, None])[0], x)
    assert spread.shape == (1, 4 * len(begins), 3)
    assert spread.count_nonzero() == x.count_nonzero()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_queries_without_an_index_and_unseen_keys(dtype: torch.dtype, backend: str, way: str) -> None:
    inputs = tensors(40, 30, dtype=dtype)
    attend = functools.partial(native_sparse_attention, block_size=4, num_blocks=9, window=40, backend=backend)
    lengths = torch.tensor([0, 12])
    (out, dq, dk, dv, _), blocks = outputs_and_gradients(functools.partial(attend, lengths=lengths), *inputs)
    for unseen in (out[0], dq[0], dk[0], dv[0], out[1, :18], dq[1, :18], dk[1, 12:], dv[1, 12:]):
        assert not unseen.any()
    for seen in (out[1, 18:], dq[1, 19:], dk[1, :12], dv[1, :12]):  # the first query has no choice: dq is 0
        assert bool(seen.isfinite().all())
        assert bool(seen.flatten(1).any(1).all())
    assert bool((blocks[0] == -1).all())
    assert bool((blocks[1, :18] == -1).all())
    q, k, v, gates = (x.detach()[1:] for x in inputs)
    alone, _ = attend(q[:, 18:], k[:, :12], v[:, :12], gates[:, 18:])
    torch.testing.assert_close(out[1:, 18:], alone)


def test_large_scores_do_not_overflow(backend: str, way: str) -> None:
    q, k, v, gates = tensors(90, dtype=torch.float32)
    with torch.no_grad():
        q.mul_(300.0)
        k.mul_(300.0)
    attend = functools.partial(native_sparse_attention, block_size=4, num_blocks=4, window=9, backend=backend)
    for tensor in outputs_and_gradients(attend, q, k, v, gates)[0]:
        assert bool(tensor.isfinite().all())


@pytest.mark.parametrize("queries", [9, 7])
def test_gradients_by_finite_differences(queries: int, backend: str, way: str) -> None:
    inputs = tensors(9, queries, batch=1, heads=2, kv_heads=1, dim=2)

    def attend(*inputs: Tensor) -> Tensor:
        return native_sparse_attention(*inputs, block_size=2, num_blocks=4, window=4, backend=backend)[0]

    assert torch.autograd.gradcheck(attend, inputs)


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 40, 40), (2, 0, 0), (2, 0, 30), (0, 1, 1)])
def test_empty_inputs(batch: int, queries: int, keys: int, backend: str) -> None:
    inputs = tensors(keys, queries, batch=batch)
    for name in ("reference", backend):
        results, blocks = outputs_and_gradients(
            lambda *x, name=name: native_sparse_attention(*x, block_size=3, num_blocks=2, window=2, backend=name),
            *inputs,
        )
        assert results[0].shape == (batch, queries, 4, 8)
        assert blocks.shape == (batch, queries, 2, 2)
        assert not any(bool(gradient.any()) for gradient in results)
    packed = native_sparse_attention(
        *(x[:, :0] for x in tensors(3, batch=1)), block_size=3, num_blocks=2, window=2, cu_seqlens=torch.tensor([0, 0])
    )
    assert packed[0].shape == (1, 0, 4, 8)


def test_under_checkpointing_autocast_and_compilation(backend: str) -> None:
    inputs = tensors(20, dtype=torch.float32)
    attend = functools.partial(native_sparse_attention, block_size=4, num_blocks=3, window=5, backend=backend)

    def model(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
        out, blocks = attend(q.sin(), k, v, gates)
        return out.cos(), blocks

    direct, chosen = outputs_and_gradients(model, *inputs)
    again, _ = outputs_and_gradients(lambda *x: checkpoint(model, *x, use_reentrant=False), *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        lowered, blocks = outputs_and_gradients(model, *inputs)
    assert torch.equal(blocks, chosen)
    compiled, blocks = outputs_and_gradients(torch.compile(model, backend="aot_eager"), *inputs)
    assert torch.equal(blocks, chosen)
    for results in (again, lowered, compiled):
        for ours, theirs in zip(results, direct, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_the_custom_ops_are_what_they_are_registered_as() -> None:
    q, k, v = torch.randn(2, 20, 3, 4), torch.randn(2, 24, 4), torch.randn(2, 24, 5)
    positions = torch.arange(3, 23)[None]
    means_k, means_v = (x.unflatten(1, (6, 4)).mean(2)[:, :5] for x in (k, v))
    blocks = compressed.compressed_attention(q, means_k, means_v, positions, None, 23, 4, 2)[2]
    for op, arguments in (
        (compressed.compressed_attention, (q, means_k, means_v, positions, None, 23, 4, 2)),
        (selected.selected_attention, (q, k, v, positions, blocks, 4)),
    ):
        for tensor in arguments[:3]:
            tensor.requires_grad_()
        torch.library.opcheck(op, arguments)


def test_what_autograd_holds_grows_linearly() -> None:
    saved = []
    for length in (1024, 4096):
        inputs = tensors(length, batch=1, heads=1, kv_heads=1, dim=4, dtype=torch.float32)
        kept_bytes = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal kept_bytes
            kept_bytes += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            native_sparse_attention(*inputs, block_size=32, num_blocks=4, window=16, backend="blocked")
        saved.append(kept_bytes)
    assert 0 < saved[1] <= 4 * saved[0]


@pytest.mark.parametrize("way", ["masked", "by block"], indirect=True)
def test_tiles_of_both_passes_are_small(way: str) -> None:
    """Inside the custom ops, where a dispatch mode looks only if they are called without their dispatcher."""
    largest = []
    for length in (512, 2048):
        q, k, v = torch.randn(3, 1, length, 4)
        q, positions = q.unsqueeze(2), torch.arange(length)[None]
        means_k, means_v = (x.unflatten(1, (-1, 32)).mean(2) for x in (k, v))
        with LargestTensor() as mode:
            blocks_of = (q, means_k, means_v, positions, None)
            out, log_sum, blocks = compressed.compressed_attention._init_fn(*blocks_of, length, 32, 4)
            compressed._backward._init_fn(*blocks_of, log_sum, out.sum(-1), out, length, 32)
            read_by = (q, k, v, positions, blocks)
            out, log_sum = selected.selected_attention._init_fn(*read_by, 32)
            selected._backward._init_fn(*read_by, log_sum, out.sum(-1), out, 32)
        largest.append(mode.elements)
    # A masked tile holds 16 queries and all keys.
    assert largest[1] <= 4 * largest[0]
    assert largest[1] <= 2048 * 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_copies_only_what_it_reads(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind 8,192 cached keys, in a buffer with room for more: neither they nor their means are converted or moved."""
    q, k, v, gates = (tensor.detach() for tensor in tensors(8704, 1, batch=1, dim=4, dtype=dtype))
    k, v = (x.transpose(1, 2).contiguous()[:, :, :8192].transpose(1, 2) for x in (k, v))
    means = tuple(x.float().unflatten(1, (-1, 16)).mean(2).transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    sizes = {"block_size": 16, "num_blocks": 4, "window": 64, "lengths": torch.tensor([8190]), "compressed": means}
    for module, name in ((compressed, "compressed_attention"), (selected, "selected_attention")):
        monkeypatch.setattr(blocked, name, getattr(module, name)._init_fn)  # a dispatch mode does not look inside ops
    with LargestTensor(k, v, *means) as mode:
        native_sparse_attention(q, k, v, gates, **sizes)
    assert 0 < mode.elements <= 8192
