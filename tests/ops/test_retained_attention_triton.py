"""retained_attention by Triton against the dense reference: by its interpreter, or on a GPU at real sizes too."""

import functools
import importlib.util
import os
from typing import Any

import pytest
import retained_attention_inputs as shared
import torch
from retained_attention_inputs import KINDS, outputs_and_gradients
from torch import Tensor

from holdfast.ops.retained_attention import BACKENDS, FOREVER, retained_attention
from holdfast.ops.retained_attention.triton import operators, retained_attention_triton, sizes, supports

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here, not interpreted")

# The memory of these tests is poisoned, for which PyTorch asks every operation to be deterministic, cuBLAS's too.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tensors(keys: int, queries: int | None = None, **sizes: Any) -> tuple[Tensor, Tensor, Tensor]:
    """One small row in float32 unless the sizes say otherwise, on the GPU if there is one."""
    made = shared.tensors(keys, queries, **({"batch": 1, "kv_heads": 1, "dtype": torch.float32} | sizes))
    q, k, v = (tensor.detach().to(DEVICE).requires_grad_() for tensor in made)
    return q, k, v


def visibility(kind: str, k: Tensor, window: int | None, budget: int = 11) -> Tensor | None:
    until = shared.visibility(kind, k.cpu(), window, budget=budget)
    return None if until is None else until.to(k.device)


def assert_like_reference(
    inputs: tuple[Tensor, ...], until: Tensor | None, window: int | None, reference: str = "reference"
) -> None:
    """Output and all gradients within rounding of the reference computed in float64."""
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    attend = functools.partial(retained_attention, visible_until=until, window=window)
    expected = outputs_and_gradients(functools.partial(attend, backend=reference), *exact)
    actual = outputs_and_gradients(functools.partial(attend, backend="triton"), *inputs)
    dtype = inputs[0].dtype
    limits = {torch.float32: (2e-6, 1e-5), torch.float16: (1e-3, 2e-3), torch.bfloat16: (2e-3, 1e-2)}[dtype]
    if dtype == torch.bfloat16 and not torch.cuda.is_available():
        limits = (8e-3, 2e-2)  # the interpreter cuts off what the hardware rounds
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        assert ours.dtype == dtype
        error = (ours.double() - theirs).norm() / theirs.norm().clamp_min(1.0)
        assert error < limits[name != "out"], f"{name} is off by {error:.2e}"


@pytest.fixture(autouse=True)
def poisoned(poisoned_memory: None) -> None:
    """What the kernels leave unwritten is NaN."""


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_mask(kind: str) -> None:
    inputs = tensors(101)
    assert_like_reference(inputs, visibility(kind, inputs[1], 9), 9)


@pytest.mark.parametrize("kind", ["plain", "pads", "random"])
@pytest.mark.parametrize(("keys", "queries", "window"), [(129, 50, 40), (70, 70, None)])
def test_queries_behind_cached_keys_and_no_window(keys: int, queries: int, window: int | None, kind: str) -> None:
    inputs = tensors(keys, queries)
    assert_like_reference(inputs, visibility(kind, inputs[1], window), window)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves(dtype: torch.dtype) -> None:
    inputs = tensors(140, dim=32, dtype=dtype)
    assert_like_reference(inputs, visibility("budget", inputs[1], 20), 20)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["large", "medium"])
def test_the_tiles_of_large_devices(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are as large as a test is long: the interpreter takes the smaller ones otherwise."""
    monkeypatch.setattr(sizes, "device_kind", lambda device: kind)
    inputs = tensors(150, dim=64, dtype=dtype)
    assert_like_reference(inputs, visibility("budget", inputs[1], 40), 40)


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "dim", "value_dim"), [(2, 3, 1, 24, 40), (1, 2, 2, 1, 5), (1, 1, 1, 256, 256)]
)
def test_heads_and_dims(batch: int, heads: int, kv_heads: int, dim: int, value_dim: int) -> None:
    inputs = tensors(50, batch=batch, heads=heads, kv_heads=kv_heads, dim=dim, value_dim=value_dim)
    assert_like_reference(inputs, visibility("budget", inputs[1], 10, budget=5), 10)


@pytest.mark.parametrize(("keys", "queries", "window"), [(1, 1, 0), (80, 1, 5), (66, 66, 0), (65, 17, 300)])
def test_edges_of_lengths_and_windows(keys: int, queries: int, window: int) -> None:
    inputs = tensors(keys, queries)
    assert_like_reference(inputs, visibility("some", inputs[1], window), window)


def test_lifetimes_of_many_classes() -> None:
    """Long enough for three classes of lifetimes, and for tiles that nothing masks."""
    inputs = tensors(330, heads=1)
    generator = torch.Generator().manual_seed(5)
    until = torch.arange(330) + 80 + torch.randint(0, 250, (330,), generator=generator)
    assert_like_reference(inputs, until[None, :, None].to(inputs[0].device), 80)


def test_chunks_equal_one_pass() -> None:
    q, k, v = (tensor.detach() for tensor in tensors(120))
    until = visibility("budget", k, 12)
    whole = retained_attention_triton(q, k, v, until, 12, 0.25)
    for start, end in ((0, 50), (50, 51), (51, 120)):
        part = retained_attention_triton(q[:, start:end], k[:, :end], v[:, :end], until[:, :end], 12, 0.25)
        torch.testing.assert_close(part, whole[:, start:end])


def test_a_query_that_sees_nothing_gives_zero_and_no_gradient() -> None:
    q, k, v = tensors(90, heads=4, kv_heads=2)
    until = torch.full(k.shape[:3], FOREVER, device=k.device)
    until[:, :, 1] = -1
    attend = functools.partial(retained_attention, visible_until=until, window=20, backend="triton")
    for tensor in outputs_and_gradients(attend, q, k, v):
        seeing, blind = tensor.chunk(2, dim=2)
        assert not blind.any()
        assert bool(seeing.any())
        assert bool(seeing.isfinite().all())


@pytest.mark.filterwarnings("ignore:overflow encountered")  # of masked scores, in the interpreter
def test_large_scores_do_not_overflow() -> None:
    q, k, v = tensors(100)
    with torch.no_grad():
        q.mul_(100.0)
        k.mul_(100.0)
    attend = functools.partial(retained_attention, visible_until=visibility("some", k, 16), window=16, backend="triton")
    assert all(bool(tensor.isfinite().all()) for tensor in outputs_and_gradients(attend, q, k, v))


def test_inputs_and_gradients_that_are_not_contiguous() -> None:
    packed = torch.cat(tensors(60, heads=2, kv_heads=2), dim=2).transpose(1, 2).detach().contiguous().requires_grad_()

    def gradient(name: str) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in packed.split(2, dim=1))
        return torch.autograd.grad(retained_attention(q, k, v, None, 9, backend=name).sum(), packed)[0]

    torch.testing.assert_close(gradient("triton"), gradient("reference"))


@pytest.mark.parametrize("length", [0, 30])
def test_empty_inputs(length: int) -> None:
    q, k, v = tensors(length, 0)
    out, *gradients = outputs_and_gradients(
        lambda *inputs: retained_attention(*inputs, None, 3, backend="triton"), q, k, v
    )
    assert out.shape == q.shape
    assert [gradient.shape for gradient in gradients] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("masked", [False, True])
def test_operators_keep_their_promises(masked: bool) -> None:
    q, k, v = tensors(40, 30, dim=8)
    plan: tuple[Tensor | None, ...] = (None,) * 4
    if masked:
        until = visibility("budget", k, 6)
        torch.library.opcheck(operators.retention_plan, (until, 30, 6))
        plan = operators.retention_plan(until, 30, 6)
    torch.library.opcheck(operators.attend, (q, k, v, *plan, 6, 0.3))


def test_in_one_compiled_graph() -> None:
    q, k, v = tensors(40)
    until = visibility("budget", k, 6)

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return retained_attention(q.sin(), k, v, until, 6, backend="triton").cos()

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(
        outputs_and_gradients(compiled, q, k, v), outputs_and_gradients(model, q, k, v), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_plan_sorts_what_outlives_the_window() -> None:
    """Every such key once, the classes apart, each in the order of positions; tables of linear size."""
    keys, queries, window = 1000, 900, 30
    generator = torch.Generator().manual_seed(3)
    until = torch.randint(-1, keys + 50, (2, keys, 2), generator=generator)
    clamped, order, offsets, starts = (
        table.cpu() for table in operators.retention_plan(until.to(DEVICE), queries, window)
    )
    blocks = starts.shape[1]
    assert order.numel() + offsets.numel() + starts.numel() < 2 * until.numel()
    for row in range(4):
        last = until[row // 2, :, row % 2].clamp(max=keys - 1)
        assert torch.equal(clamped[row].long(), last)
        position = torch.arange(keys)
        lifetime = last - position - window
        far = (lifetime > 0) & (last >= keys - queries)
        group = (lifetime.clamp(min=0) // sizes.KEY_BLOCK + 1).log2().floor().long()
        expected = [j for c in range(sizes.CLASSES) for j in position[far & (group == c)].tolist()]
        assert order[row, : offsets[row, sizes.CLASSES * blocks]].tolist() == expected
        for block in range(blocks):
            seen = (last >= block * sizes.KEY_BLOCK).nonzero()
            assert starts[row, block] == seen[0] // sizes.KEY_BLOCK


@interpreted
def test_the_backend_is_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors(20)
    monkeypatch.setitem(BACKENDS, "triton", lambda *_: pytest.fail("CPU tensors went to Triton"))
    retained_attention(q, k, v, None, 3)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not supports(q, k, v)
    with pytest.raises(ValueError, match="needs a GPU"):
        retained_attention_triton(q, k, v, None, 3, 1.0)


@pytest.mark.parametrize(
    ("error", "message", "wrong"),
    [
        (TypeError, "no kernels for torch.float64", {"dtype": torch.float64}),
        (ValueError, "1 to 256 channels, not 300", {"dim": 300}),
        (ValueError, "query heads per key/value head here, not 512", {"heads": 512}),
    ],
)
def test_what_the_kernels_cannot_take_is_named(error: type[Exception], message: str, wrong: dict) -> None:
    inputs = tensors(20, **wrong)
    assert not supports(*inputs)
    with pytest.raises(error, match=message):
        retained_attention(*inputs, None, 3, backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
class TestOnTheGPU:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("dim", [16, 64, 128, 256])
    @pytest.mark.parametrize("kind", KINDS)
    def test_real_sizes(self, kind: str, dim: int, dtype: torch.dtype) -> None:
        inputs = tensors(3001, heads=8, kv_heads=2, dim=dim, dtype=dtype)
        until = visibility(kind, inputs[1], 768, budget=512)
        assert_like_reference(inputs, until, 768, reference="blocked")

    def test_long_sequences(self) -> None:
        inputs = tensors(65_537, heads=4, kv_heads=1, dim=64, dtype=torch.bfloat16)
        assert_like_reference(inputs, visibility("budget", inputs[1], 768, budget=512), 768, reference="blocked")

    def test_gradients_are_the_same_bits_each_time(self) -> None:
        inputs = tensors(5000, heads=8, kv_heads=2, dim=64, dtype=torch.bfloat16)
        until = visibility("budget", inputs[1], 768, budget=512)
        attend = functools.partial(retained_attention, visible_until=until, window=768, backend="triton")
        once, again = outputs_and_gradients(attend, *inputs), outputs_and_gradients(attend, *inputs)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(once, again, strict=True))

    def test_nothing_waits_for_the_device(self) -> None:
        inputs = tensors(2000, heads=8, kv_heads=2, dim=64, dtype=torch.bfloat16)
        until = visibility("budget", inputs[1], 768, budget=512)
        attend = functools.partial(retained_attention, visible_until=until, window=768, backend="triton")
        outputs_and_gradients(attend, *inputs)
        gradient = torch.randn_like(inputs[0])
        torch.cuda.set_sync_debug_mode("error")
        try:
            gradients = torch.autograd.grad(attend(*inputs), inputs, gradient)
            with pytest.raises(RuntimeError, match="synchroniz"):  # that it would have been noticed
                gradient[0, 0, 0, 0].item()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(found.isfinite().all() for found in gradients)
