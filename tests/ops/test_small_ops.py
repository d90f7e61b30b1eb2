"""Short convolution, rotary embedding and norms, each against its definition written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from holdfast.ops.norms import gated_rms_norm, l2_norm, rms_norm
from holdfast.ops.rotary import apply_rotary, rotary_tables
from holdfast.ops.short_convolution import short_convolution


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def convolution_reference(x: Tensor, weight: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Token by token: y_t = SiLU(Σ_i weight[i] · input[t + i]), the inputs being state, then x."""
    (B, T, C), W = x.shape, weight.shape[-1]
    past = x.new_zeros(B, C, W - 1) if state is None else state
    inputs = [past[:, :, i] for i in range(W - 1)] + [x[:, t] for t in range(T)]
    y = [F.silu(sum(inputs[t + i] * weight[:, 0, i] for i in range(W))) for t in range(T)]
    return torch.stack(y, dim=1), torch.stack(inputs[T:], dim=2)


class TestShortConvolution:
    @settings(max_examples=40, deadline=None)
    @given(
        B=st.integers(1, 3), T=st.integers(1, 12), C=st.integers(1, 9), W=st.integers(2, 6), with_state=st.booleans()
    )
    def test_values_and_gradients(self, B: int, T: int, C: int, W: int, with_state: bool) -> None:
        leaves = [randn(B, T, C), randn(C, 1, W, seed=1)] + [randn(B, C, W - 1, seed=2)] * with_state
        leaves = [x.clone().requires_grad_() for x in leaves]
        actual, expected = short_convolution(*leaves), convolution_reference(*leaves)
        torch.testing.assert_close(actual, expected)
        weights = [randn(*x.shape, seed=3 + i) for i, x in enumerate(expected)]
        gradients = [
            torch.autograd.grad(sum((x * w).sum() for x, w in zip(pair, weights, strict=True)), leaves)
            for pair in (actual, expected)
        ]
        torch.testing.assert_close(*gradients)

    @pytest.mark.parametrize("T", [1, 3])
    def test_width_one_has_no_state(self, T: int) -> None:
        x, weight = randn(2, T, 3), randn(3, 1, 1, seed=1)
        y, state = short_convolution(x, weight)
        torch.testing.assert_close(y, F.silu(x * weight[:, 0, 0]))
        assert state.shape == (2, 3, 0)

    @pytest.mark.parametrize("cuts", [[1, 2, 3], [2, 9], [5, 6, 7, 8, 20]])
    def test_any_cuts_equal_one_pass(self, cuts: list[int]) -> None:
        x, weight = randn(2, 21, 6, dtype=torch.float32), randn(6, 1, 4, seed=1, dtype=torch.float32)
        expected, final_state = short_convolution(x, weight)
        pieces, state = [], None
        for piece in torch.tensor_split(x, cuts, dim=1):
            y, state = short_convolution(piece, weight, state)
            pieces.append(y)
        torch.testing.assert_close(torch.cat(pieces, dim=1), expected)
        assert torch.equal(state, final_state)

    @pytest.mark.parametrize("offsets", [[0, 30], [0, 1, 2, 4, 30], [0, 0, 7, 7, 30, 30]])
    def test_packed_equals_separate(self, offsets: list[int]) -> None:
        leaves = [x.requires_grad_() for x in (randn(1, 30, 5), randn(5, 1, 4, seed=1))]
        packed, _ = short_convolution(*leaves, cu_seqlens=torch.tensor(offsets, dtype=torch.int32))
        pieces = [x for x in torch.tensor_split(leaves[0], offsets[1:-1], dim=1) if x.shape[1]]
        separate = torch.cat([short_convolution(x, leaves[1])[0] for x in pieces], dim=1)
        torch.testing.assert_close(packed, separate)
        weight = randn(1, 30, 5, seed=4)
        gradients = (torch.autograd.grad((y * weight).sum(), leaves) for y in (packed, separate))
        torch.testing.assert_close(*gradients)

    def test_packed_sequences_do_not_see_another(self) -> None:
        x = randn(1, 9, 3, dtype=torch.float32)
        x[:, :4] = torch.nan
        y, _ = short_convolution(x, randn(3, 1, 4, dtype=torch.float32), cu_seqlens=torch.tensor([0, 4, 9]))
        assert y[:, :4].isnan().all()
        assert y[:, 4:].isfinite().all()

    def test_zeros_in_front_act_as_the_start(self) -> None:
        x, weight = randn(1, 9, 3), randn(3, 1, 4, seed=1)
        expected, state = short_convolution(x, weight)
        padded, padded_state = short_convolution(F.pad(x, (0, 0, 5, 0)), weight)
        torch.testing.assert_close(padded[:, 5:], expected)
        assert torch.equal(padded_state, state)

    @pytest.mark.parametrize("T", [1, 40])
    def test_low_precision_sums_in_float32(self, T: int) -> None:
        x, weight = randn(2, T, 16, dtype=torch.bfloat16), randn(16, 1, 4, seed=1, dtype=torch.bfloat16)
        y, state = short_convolution(x, weight)
        expected, _ = convolution_reference(x.float(), weight.float())
        assert y.dtype == state.dtype == torch.bfloat16
        # One rounding to bfloat16 and no more: half a unit in the last of eight bits.
        torch.testing.assert_close(y.float(), expected, rtol=2**-8, atol=1e-6)

    def test_autocast_does_not_lower_float32(self) -> None:
        x, weight = randn(2, 20, 16, dtype=torch.float32), randn(16, 1, 4, seed=1, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, _ = short_convolution(x, weight)
        assert torch.equal(y, short_convolution(x, weight)[0])

    def test_without_activation_it_is_linear(self) -> None:
        x, weight = randn(1, 9, 3), randn(3, 1, 4, seed=1)
        y, _ = short_convolution(x, weight, activation=False)
        torch.testing.assert_close(short_convolution(-3 * x, weight, activation=False)[0], -3 * y)
        torch.testing.assert_close(F.silu(y), short_convolution(x, weight)[0])

    def test_neither_input_nor_state_is_modified_or_kept(self) -> None:
        x, weight, state = randn(1, 2, 3), randn(3, 1, 4, seed=1), randn(1, 3, 3, seed=2)
        copies = x.clone(), state.clone()
        _, new_state = short_convolution(x, weight, state)
        new_state.zero_()
        assert torch.equal(x, copies[0])
        assert torch.equal(state, copies[1])

    @pytest.mark.parametrize(
        ("shapes", "words"),
        [
            (((2, 0, 3), (3, 1, 4), None), "at least one token"),
            (((2, 3), (3, 1, 4), None), "at least one token"),
            (((2, 5, 3), (4, 1, 4), None), r"\[3, 1, W\]"),
            (((2, 5, 3), (3, 4), None), r"\[3, 1, W\]"),
            (((2, 5, 3), (3, 1, 4), (2, 3, 4)), r"\[2, 3, 3\]"),
        ],
    )
    def test_bad_shapes_are_named(self, shapes: tuple, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            short_convolution(*(None if s is None else torch.zeros(s) for s in shapes))

    def test_packing_excludes_state_and_batches(self) -> None:
        offsets = torch.tensor([0, 5])
        with pytest.raises(ValueError, match="exclude"):
            short_convolution(torch.zeros(1, 5, 3), torch.zeros(3, 1, 4), torch.zeros(1, 3, 3), cu_seqlens=offsets)
        with pytest.raises(ValueError, match="batch of 1"):
            short_convolution(torch.zeros(2, 5, 3), torch.zeros(3, 1, 4), cu_seqlens=offsets)


class TestRotary:
    def test_rotates_pairs_of_halves(self) -> None:
        positions = torch.tensor([[0, 1, 7], [100, 5000, 131071]])
        x = randn(2, 3, 2, 6)
        out = apply_rotary(x, *rotary_tables(positions, 6, theta=500.0))
        for b, t in ((0, 0), (0, 2), (1, 1), (1, 2)):
            for c in range(3):
                # Frequencies are float32 numbers.
                angle = int(positions[b, t]) * torch.tensor(1 / 500.0 ** (2 * c / 6)).item()
                first, second = x[b, t, :, c], x[b, t, :, c + 3]
                expected = torch.stack(
                    (
                        first * math.cos(angle) - second * math.sin(angle),
                        second * math.cos(angle) + first * math.sin(angle),
                    )
                )
                tolerance = {"atol": 2e-2, "rtol": 0} if positions[b, t] > 1000 and c else {"atol": 1e-5, "rtol": 0}
                torch.testing.assert_close(out[b, t, :, [c, c + 3]].T, expected, **tolerance)

    @pytest.mark.parametrize("offset", [0, 10**4, 2**20, 2**30])
    def test_scores_depend_on_distance_alone(self, offset: int) -> None:
        q, k = randn(1, 1, 1, 64, dtype=torch.float32), randn(1, 1, 1, 64, seed=1, dtype=torch.float32)
        scores = []
        for start in (0, offset):
            rotated = [apply_rotary(x, *rotary_tables(torch.tensor([[p + start]]), 64)) for x, p in ((q, 700), (k, 3))]
            scores.append((rotated[0] * rotated[1]).sum())
        torch.testing.assert_close(scores[0], scores[1], atol=1e-5, rtol=0)

    def test_tables_shape_and_dtype(self) -> None:
        cos, sin = rotary_tables(torch.arange(5, dtype=torch.int32)[None], 8)
        assert cos.shape == sin.shape == (1, 5, 4)
        assert cos.dtype == sin.dtype == torch.float32
        assert torch.equal(cos[:, 0], torch.ones(1, 4))
        assert torch.equal(sin[:, 0], torch.zeros(1, 4))

    def test_tables_of_one_row_serve_the_batch(self) -> None:
        x, positions = randn(3, 4, 2, 8), torch.arange(4)[None]
        shared = apply_rotary(x, *rotary_tables(positions, 8))
        torch.testing.assert_close(shared, apply_rotary(x, *rotary_tables(positions.expand(3, 4), 8)))

    def test_bfloat16_is_rounded_once(self) -> None:
        x = randn(2, 9, 2, 16, dtype=torch.bfloat16)
        tables = rotary_tables(torch.arange(9)[None] + 1000, 16)
        out = apply_rotary(x, *tables)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, apply_rotary(x.float(), *tables).to(torch.bfloat16))

    def test_gradient(self) -> None:
        tables = rotary_tables(torch.arange(3)[None] + 11, 4)
        assert torch.autograd.gradcheck(lambda x: apply_rotary(x, *tables), randn(2, 3, 2, 4).requires_grad_())

    def test_bad_arguments_are_named(self) -> None:
        positions = torch.arange(3)[None]
        with pytest.raises(ValueError, match="even"):
            rotary_tables(positions, 5)
        with pytest.raises(TypeError, match="integers"):
            rotary_tables(positions.float(), 4)
        tables = rotary_tables(positions, 4)
        for shape in ((1, 4, 2, 4), (1, 3, 2, 8), (1, 3, 2, 5)):
            with pytest.raises(ValueError, match="do not fit"):
                apply_rotary(torch.zeros(shape), *tables)
        with pytest.raises(ValueError, match="do not fit"):
            apply_rotary(torch.zeros(3, 3, 2, 4), *rotary_tables(positions.expand(2, 3), 4))


class TestNorms:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_definitions(self, dtype: torch.dtype) -> None:
        x, gate = randn(3, 5, 7, dtype=dtype), randn(3, 5, 7, seed=1, dtype=dtype)
        weight = randn(7, seed=2, dtype=dtype)
        rms = x / (x.pow(2).sum(-1, keepdim=True) / 7 + 0.1).sqrt() * weight
        torch.testing.assert_close(rms_norm(x, weight, 0.1), rms)
        torch.testing.assert_close(gated_rms_norm(x, gate, weight, 0.1), rms * gate / (1 + (-gate).exp()))
        torch.testing.assert_close(l2_norm(x, 0.1), x / (x.pow(2).sum(-1, keepdim=True) + 0.1).sqrt())

    def test_l2_norm_gives_unit_length(self) -> None:
        lengths = l2_norm(100 * randn(4, 3, 16, dtype=torch.float32)).norm(dim=-1)
        torch.testing.assert_close(lengths, torch.ones(4, 3))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision_is_rounded_once(self, dtype: torch.dtype) -> None:
        # In float16, these squares would overflow.
        x, gate, weight = 300 * randn(4, 64, dtype=dtype), randn(4, 64, seed=1, dtype=dtype), randn(64, seed=2)
        wide, weight = x.float(), weight.float()
        for actual, expected in (
            (l2_norm(x), l2_norm(wide)),
            (rms_norm(x, weight), rms_norm(wide, weight)),
            (gated_rms_norm(x, gate, weight), gated_rms_norm(wide, gate.float(), weight)),
        ):
            assert actual.dtype == dtype
            assert torch.equal(actual, expected.to(dtype))

    def test_zero_vectors_stay_zero_with_finite_gradients(self) -> None:
        for norm in (l2_norm, lambda x: rms_norm(x, torch.ones(4)), lambda x: gated_rms_norm(x, x, torch.ones(4))):
            x = torch.zeros(2, 4, requires_grad=True)
            y = norm(x)
            assert torch.equal(y, torch.zeros(2, 4))
            assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()

    def test_gradients(self) -> None:
        x, gate, weight = (randn(*s, seed=i).requires_grad_() for i, s in enumerate(((2, 5), (2, 5), (5,))))
        assert torch.autograd.gradcheck(l2_norm, x)
        assert torch.autograd.gradcheck(rms_norm, (x, weight))
        assert torch.autograd.gradcheck(gated_rms_norm, (x, gate, weight))

    def test_bad_shapes_are_named(self) -> None:
        with pytest.raises(ValueError, match="weight has shape"):
            rms_norm(torch.zeros(2, 4), torch.ones(1))
        with pytest.raises(ValueError, match="gate has shape"):
            gated_rms_norm(torch.zeros(2, 4), torch.zeros(1, 4), torch.ones(4))
