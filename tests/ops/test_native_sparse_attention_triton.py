"""native_sparse_attention by Triton against the dense reference: by its interpreter, or on a GPU at real sizes too.

Which blocks are chosen is discrete. The random inputs in float32 have no two blocks whose importance differs by
rounding alone; halves read all blocks, and at real sizes only queries count that choose alike.
"""

import functools
import importlib.util
import os
from typing import Any

import native_sparse_inputs as shared
import pytest
import torch
from native_sparse_inputs import outputs_and_gradients
from torch import Tensor

from holdfast.mixers import native_sparse_attention as mixer
from holdfast.ops.native_sparse_attention import BACKENDS, native_sparse_attention, packing
from holdfast.ops.native_sparse_attention.triton import native_sparse_attention_triton, operators, supports
from holdfast.ops.native_sparse_attention.triton.launch import Shape, by_rows
from holdfast.ops.native_sparse_attention.triton.sizes import sizes_for

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here, not interpreted")

# The memory of these tests is poisoned, for which PyTorch asks every operation to be deterministic, cuBLAS's too.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tensors(keys: int, queries: int | None = None, **sizes: Any) -> tuple[Tensor, ...]:
    """One small row in float32 unless the sizes say otherwise, on the GPU if there is one."""
    defaults = {"batch": 1, "heads": 2, "kv_heads": 1, "dtype": torch.float32}
    return tuple(x.detach().to(DEVICE).requires_grad_() for x in shared.tensors(keys, queries, **(defaults | sizes)))


def assert_like_reference(inputs: tuple[Tensor, ...], **arguments: Any) -> None:
    if inputs[0].dtype == torch.float32:
        shared.assert_like_reference(inputs, "triton", **arguments)
        return
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    attend = functools.partial(native_sparse_attention, **arguments)
    expected, chosen = outputs_and_gradients(functools.partial(attend, backend="reference"), *exact)
    actual, blocks = outputs_and_gradients(functools.partial(attend, backend="triton"), *inputs)
    assert torch.equal(blocks, chosen)
    limit = 2e-3 if inputs[0].dtype == torch.float16 else 2e-2
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == inputs[0].dtype
        assert (ours.double() - theirs).norm() < limit * theirs.norm()


@pytest.fixture(autouse=True)
def poisoned(poisoned_memory: None) -> None:
    """What the kernels leave unwritten is NaN."""


@pytest.fixture
def many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and queries are divided among programs, as on a device of many processors."""
    for module in ("step", "backward"):
        monkeypatch.setattr(f"holdfast.ops.native_sparse_attention.triton.{module}.programs_of", lambda device: 12)


@pytest.mark.parametrize(
    ("length", "block_size", "num_blocks", "window"), [(1, 3, 2, 1), (17, 4, 3, 5), (12, 5, 4, 30), (9, 1, 5, 3)]
)
def test_lengths_and_sizes(length: int, block_size: int, num_blocks: int, window: int) -> None:
    inputs = tensors(length, heads=4, kv_heads=2 if length > 12 else 1)
    assert_like_reference(inputs, block_size=block_size, num_blocks=num_blocks, window=window)


@pytest.mark.usefixtures("many_programs")
def test_many_segments_and_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many users of a block, many blocks, and gradients in several parts."""
    monkeypatch.setattr("holdfast.ops.native_sparse_attention.triton.segments.SHORTEST", 4)
    assert_like_reference(tensors(25), block_size=2, num_blocks=3, window=4)


@pytest.mark.parametrize("queries", [17, 2])
def test_queries_behind_cached_keys_of_rows_of_other_lengths(queries: int) -> None:
    inputs = tensors(33, queries, batch=2, value_dim=5)
    lengths = torch.tensor([33, 9], device=DEVICE)
    assert_like_reference(inputs, block_size=6, num_blocks=3, window=11, lengths=lengths)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves(dtype: torch.dtype) -> None:
    assert_like_reference(tensors(13, dim=32, dtype=dtype), block_size=3, num_blocks=5, window=10)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "value_dim"), [(3, 1, 24, 40), (4, 2, 1, 5), (40, 1, 8, 8), (1, 1, 256, 256)]
)
def test_heads_and_dims(heads: int, kv_heads: int, dim: int, value_dim: int) -> None:
    """40 heads are more than a tile holds."""
    inputs = tensors(7, heads=heads, kv_heads=kv_heads, dim=dim, value_dim=value_dim)
    assert_like_reference(inputs, block_size=2, num_blocks=3, window=4)


@pytest.mark.usefixtures("many_programs")
def test_steps_and_chunks_equal_one_pass() -> None:
    """The keys in a buffer with room for more, as in a cache, and the means of blocks to come never read."""
    q, k, v, gates = (tensor.detach() for tensor in tensors(60))
    attend = functools.partial(native_sparse_attention, block_size=4, num_blocks=4, window=9)
    whole, chosen = attend(q, k, v, gates, backend="reference")
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    means = [x.unflatten(1, (15, 4)).mean(2) for x in (k, v)]
    start = 20
    for end, given in ((37, True), (38, True), (40, False), (57, False), (60, True)):
        known = [torch.cat([x[:, : end // 4], torch.full_like(x[:, end // 4 :], 1e9)], dim=1) for x in means]
        rows = q[:, start:end], k[:, :end], v[:, :end], gates[:, start:end]
        part, blocks = attend(*rows, compressed=(known[0], known[1]) if given else None, backend="triton")
        torch.testing.assert_close(part, whole[:, start:end])
        assert torch.equal(blocks, chosen[:, start:end])
        start = end


@pytest.mark.usefixtures("many_programs")
def test_a_step_of_rows_of_other_lengths_in_keys_that_are_whole_blocks() -> None:
    q, k, v, gates = (tensor.detach() for tensor in tensors(72, 2, batch=3, heads=40))
    arguments: dict[str, Any] = {"block_size": 8, "num_blocks": 3, "window": 20}
    arguments["lengths"] = torch.tensor([66, 1, 23], device=DEVICE)
    expected, chosen = native_sparse_attention(q, k, v, gates, **arguments, backend="reference")
    out, blocks = native_sparse_attention(q, k, v, gates, **arguments, backend="triton")
    torch.testing.assert_close(out, expected)
    assert torch.equal(blocks, chosen)
    assert not out[1, :1].any()


@pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")  # of what nobody sees, in the interpreter
@pytest.mark.usefixtures("many_programs")
def test_a_step_whose_keys_and_means_are_divided() -> None:
    """70 means, 60 chosen keys and a window of 50, in tiles of 32."""
    q, k, v, gates = (tensor.detach() for tensor in tensors(70, 1))
    lengths = torch.tensor([69], device=DEVICE)
    attend = functools.partial(native_sparse_attention, block_size=1, num_blocks=60, window=50, lengths=lengths)
    (out, blocks), (expected, chosen) = (attend(q, k, v, gates, backend=name) for name in ("triton", "reference"))
    torch.testing.assert_close(out, expected)
    assert torch.equal(blocks, chosen)


def test_a_step_in_halves_with_means_in_float32() -> None:
    q, k, v, gates = (tensor.detach() for tensor in tensors(30, 1, dim=20, dtype=torch.bfloat16))
    means = tuple(x.double().unflatten(1, (-1, 5)).mean(2) for x in (k, v))
    attend = functools.partial(native_sparse_attention, block_size=5, num_blocks=6, window=7)
    exact = (x.double() for x in (q, k, v, gates))
    expected, _ = attend(*exact, backend="reference")
    out, _ = attend(q, k, v, gates, compressed=(means[0].float(), means[1].float()), backend="triton")
    assert (out.double() - expected).norm() < 1e-2 * expected.norm()


def test_gradients_of_given_means() -> None:
    inputs = tensors(15, 11)
    means = tuple(x.detach().unflatten(1, (3, 5)).mean(2).requires_grad_() for x in inputs[1:3])
    results = []
    for name in ("reference", "triton"):
        attend = functools.partial(native_sparse_attention, block_size=5, num_blocks=3, window=3, backend=name)
        out, _ = attend(*inputs, compressed=(means[0], means[1]))
        results.append(torch.autograd.grad(out.square().sum(), (*inputs, *means)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # of masked scores, in the interpreter
def test_large_scores_do_not_overflow() -> None:
    q, k, v, gates = tensors(13)
    with torch.no_grad():
        q.mul_(300.0)
        k.mul_(300.0)
    attend = functools.partial(native_sparse_attention, block_size=4, num_blocks=3, window=5, backend="triton")
    for tensor in outputs_and_gradients(attend, q, k, v, gates)[0]:
        assert bool(tensor.isfinite().all())


def test_inputs_that_are_not_contiguous() -> None:
    leaf = torch.randn(1, 6, 12, 8, device=DEVICE, requires_grad=True)  # heads before tokens, channels in halves
    gates = torch.rand(1, 2, 12, 3, device=DEVICE)

    def gradient(name: str) -> Tensor:
        q, k, v = (part.transpose(1, 2)[..., :4] for part in leaf.split(2, dim=1))
        arguments = {"block_size": 4, "num_blocks": 3, "window": 5}
        out, _ = native_sparse_attention(q, k, v, gates.transpose(1, 2), **arguments, backend=name)
        return torch.autograd.grad(out.square().sum(), leaf)[0]

    torch.testing.assert_close(gradient("triton"), gradient("reference"))


def test_keys_in_a_cache_are_not_copied() -> None:
    buffer = torch.zeros(2, 3, 80, 16)
    keys = buffer[:, :, :50].transpose(1, 2)
    assert by_rows(keys) is keys
    assert by_rows(buffer[..., 1:6]).is_contiguous()


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 20, 20), (2, 0, 30), (1, 3, 3)])
def test_empty_inputs_and_no_complete_block(batch: int, queries: int, keys: int) -> None:
    inputs = tensors(keys, queries, batch=batch)
    assert_like_reference(inputs, block_size=5, num_blocks=2, window=2)
    out, blocks = native_sparse_attention(
        *(x.detach() for x in inputs), block_size=5, num_blocks=2, window=2, backend="triton"
    )
    assert out.shape == (batch, queries, 2, 8)
    assert blocks.shape == (batch, queries, 1, 2)


@pytest.mark.usefixtures("many_programs")
@pytest.mark.parametrize(
    ("ends", "block_size", "num_blocks", "looks"),
    [([0, 0, 14, 15, 33], 4, 3, False), ([0, 1, 2, 3, 33], 2, 6, True), ([0, 16, 20, 33], 1, 2, False)],
)
def test_packed_sequences(
    ends: list[int], block_size: int, num_blocks: int, looks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_can_look", lambda _: looks)
    arguments: dict[str, Any] = {"block_size": block_size, "num_blocks": num_blocks, "window": 6}
    assert_like_reference(tensors(33, batch=1), **arguments, cu_seqlens=torch.tensor(ends, device=DEVICE))


def test_operators_keep_their_promises() -> None:
    q, k, v, gates = (x.detach() for x in tensors(8, 5, heads=1, dim=4, value_dim=5))
    means = [x.unflatten(1, (2, 4)).mean(2) for x in (k, v)]
    blocks = operators.compressed_attention(q, *means, None, None, 8, 4, 2, 0.5)[2]
    branches = [torch.randn(1, 5, 1, 5, device=DEVICE) for _ in range(3)]
    torch.library.opcheck(operators.step, (q, k, v, gates, *means, None, 4, 2, 3, 0.5))
    for tensor in (q, k, v, gates, *means, *branches):
        tensor.requires_grad_()
    torch.library.opcheck(operators.compressed_attention, (q, *means, None, None, 8, 4, 2, 0.5))
    torch.library.opcheck(operators.selected_attention, (q, k, v, blocks, None, None, 4, 0.5))
    torch.library.opcheck(operators.gated_sum, (gates, *branches))


def test_in_one_compiled_graph() -> None:
    inputs = tensors(9)

    def model(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
        arguments = {"block_size": 4, "num_blocks": 3, "window": 5}
        out, blocks = native_sparse_attention(q.sin(), k, v, gates, **arguments, backend="triton")
        return out.cos(), blocks

    compiled, chosen = outputs_and_gradients(torch.compile(model, backend="aot_eager", fullgraph=True), *inputs)
    direct, blocks = outputs_and_gradients(model, *inputs)
    assert torch.equal(blocks, chosen)
    for ours, theirs in zip(compiled, direct, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_segments_are_bounded_by_a_multiple_of_the_blocks() -> None:
    from holdfast.ops.native_sparse_attention.triton.segments import find_segments

    q, k, v, gates = (x.detach() for x in shared.tensors(3000, batch=1, heads=1, kv_heads=1, dtype=torch.float32))
    blocks = native_sparse_attention(q, k, v, gates, block_size=32, num_blocks=8, window=1)[1]
    shape = Shape.of(q, v, 3000, 32, 8, None)
    found = find_segments(blocks, shape)
    assert found.most <= 2 * shape.blocks
    users = [found.order[start:end] // 8 for start, end in zip(found.starts[:-1], found.starts[1:], strict=True)]
    assert len(users) == 94
    for block, those in enumerate(users):
        assert torch.equal(those, (blocks == block).any(-1).flatten().nonzero().flatten())
        parts = int(found.first[block + 1] - found.first[block])
        assert parts == -(-len(those) // found.size)
        assert (found.owner == block).sum() == parts


@interpreted
def test_a_model_decodes_with_it(small_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left padding, a prefill in chunks, single tokens."""
    model = small_model("native_sparse_attention")
    ids = torch.randint(0, 100, (2, 22), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        attend = functools.partial(native_sparse_attention, backend="triton")
        monkeypatch.setattr(mixer, "native_sparse_attention", attend)
        cache, parts = None, []
        for start, end in ((0, 3), (3, 20), (20, 21), (21, 22)):
            output = model(input_ids=ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
            cache, parts = output.past_key_values, [*parts, output.logits]
    error = (torch.cat(parts, dim=1) - expected)[mask.bool()].abs().max()
    assert error < 1e-4


@interpreted
def test_the_backend_is_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, gates = tensors(8)
    monkeypatch.setitem(BACKENDS, "triton", lambda *_: pytest.fail("CPU tensors went to Triton"))
    native_sparse_attention(q, k, v, gates, block_size=3, num_blocks=2, window=2)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not supports(q, v, 2)
    with pytest.raises(ValueError, match="needs a GPU"):
        native_sparse_attention_triton(q, k, v, gates, 3, 2, 2, None, None, None, 1.0)


@pytest.mark.parametrize(
    ("error", "message", "wrong", "num_blocks"),
    [
        (TypeError, "no kernels for torch.float64", {"dtype": torch.float64}, 2),
        (ValueError, "1 to 256 channels, not 300", {"dim": 300}, 2),
        (ValueError, "at most 128 blocks, not 129", {}, 129),
    ],
)
def test_what_the_kernels_cannot_take_is_named(
    error: type[Exception], message: str, wrong: dict[str, Any], num_blocks: int
) -> None:
    q, k, v, gates = tensors(8, **wrong)
    assert not supports(q, v, num_blocks)
    with pytest.raises(error, match=message):
        native_sparse_attention(q, k, v, gates, block_size=3, num_blocks=num_blocks, window=2, backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
class TestOnTheGPU:
    SIZES: dict[str, Any] = {"block_size": 64, "num_blocks": 16, "window": 512}  # noqa: RUF012

    def assert_like_blocked(self, inputs: tuple[Tensor, ...], **arguments: Any) -> None:
        """With "blocked" in float64, means rounded alike, and no gradient from queries that do not choose alike."""
        size, dtype = arguments["block_size"], inputs[0].dtype
        complete = inputs[1].shape[1] // size
        means = (x[:, : complete * size].unflatten(1, (complete, size)).double().mean(2).to(dtype) for x in inputs[1:3])
        inputs = (*inputs, *(mean.detach().requires_grad_() for mean in means))
        results = []
        for name, those in (("triton", inputs), ("blocked", [x.detach().double().requires_grad_() for x in inputs])):
            out, blocks = native_sparse_attention(*those[:4], **arguments, compressed=those[4:], backend=name)
            results.append((those, out, blocks))
        alike = (results[0][2] == results[1][2]).all(-1)
        assert alike.float().mean() > 0.98
        alike = alike.repeat_interleave(inputs[0].shape[2] // inputs[1].shape[2], dim=2).unsqueeze(3)
        gradient = torch.randn_like(results[0][1]) * alike
        limit = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
        ours, theirs = (
            [out * alike, *torch.autograd.grad(out, those, gradient.to(out.dtype))] for those, out, _ in results
        )
        for one, other in zip(ours, theirs, strict=True):
            assert one.dtype == dtype
            assert (one.double() - other).norm() < limit * other.norm()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("dim", [16, 64, 128, 256])
    @pytest.mark.parametrize("groups", [1, 4, 16, 48])
    def test_real_sizes(self, groups: int, dim: int, dtype: torch.dtype) -> None:
        self.assert_like_blocked(tensors(3001, heads=2 * groups, kv_heads=2, dim=dim, dtype=dtype), **self.SIZES)

    @pytest.mark.parametrize("sizes", [(16, 7, 100), (48, 100, 512), (256, 3, 1), (1, 20, 5)])
    def test_other_blocks(self, sizes: tuple[int, int, int]) -> None:
        arguments = dict(zip(("block_size", "num_blocks", "window"), sizes, strict=True))
        self.assert_like_blocked(tensors(2000, heads=8, kv_heads=2, dim=64, dtype=torch.bfloat16), **arguments)

    @pytest.mark.parametrize("lengths", [[2000, 1, 800, 200], [100] * 30])
    def test_packed_sequences(self, lengths: list[int]) -> None:
        inputs = tensors(sum(lengths), heads=16, kv_heads=2, dim=64, dtype=torch.bfloat16)
        ends = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
        self.assert_like_blocked(inputs, **self.SIZES, cu_seqlens=ends)

    def test_long_sequences(self) -> None:
        self.assert_like_blocked(tensors(32_769, heads=16, kv_heads=1, dim=64, dtype=torch.bfloat16), **self.SIZES)

    @pytest.mark.parametrize("keys", [50, 5000, 131_072])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_steps(self, dtype: torch.dtype, keys: int) -> None:
        q, k, v, gates = (x.detach() for x in tensors(keys, 2, batch=2, heads=32, kv_heads=2, dim=64, dtype=dtype))
        lengths = torch.tensor([keys, keys // 2], device=DEVICE)
        ours, theirs = (
            native_sparse_attention(
                *(x.to(exact) for x in (q, k, v, gates)), **self.SIZES, lengths=lengths, backend=name
            )
            for name, exact in (("triton", dtype), ("blocked", torch.float64))
        )
        alike = (ours[1] == theirs[1]).all(-1).repeat_interleave(16, dim=2)
        assert alike.float().mean() >= 0.75
        error = (ours[0] - theirs[0])[alike].norm() / theirs[0][alike].norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2)

    def test_gradients_are_the_same_bits_each_time(self) -> None:
        inputs = tensors(5000, heads=32, kv_heads=2, dim=64, dtype=torch.bfloat16)
        attend = functools.partial(native_sparse_attention, **self.SIZES, backend="triton")
        once, again = outputs_and_gradients(attend, *inputs)[0], outputs_and_gradients(attend, *inputs)[0]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(once, again, strict=True))

    def test_nothing_waits_for_the_device(self) -> None:
        inputs = tensors(2000, heads=32, kv_heads=2, dim=64, dtype=torch.bfloat16)
        lengths, ends = torch.tensor([1900], device=DEVICE), torch.tensor([0, 700, 1200, 2000], device=DEVICE)
        attend = functools.partial(native_sparse_attention, **self.SIZES, backend="triton")
        one = (inputs[0][:, :1].detach(), *(x.detach() for x in inputs[1:3]), inputs[3][:, :1].detach())
        gradient = torch.randn_like(inputs[0])
        for mode in ("default", "error"):  # the first time compiles
            torch.cuda.set_sync_debug_mode(mode)
            try:
                gradients = torch.autograd.grad(attend(*inputs, lengths=lengths)[0], inputs, gradient)
                gradients += torch.autograd.grad(attend(*inputs, cu_seqlens=ends)[0], inputs, gradient)
                attend(*one, lengths=lengths)
                if mode == "error":  # that it would have been noticed
                    with pytest.raises(RuntimeError, match="synchroniz"):
                        gradient[0, 0, 0, 0].item()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert all(found.isfinite().all() for found in gradients)


def test_every_device_has_sizes() -> None:
    for kind in ("large", "medium", "small"):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for dim in (1, 16, 65, 256):
                sizes = sizes_for(kind, dtype, dim)
                assert min(sizes.listed.queries, sizes.choice.queries, sizes.of_keys.queries) >= 16
