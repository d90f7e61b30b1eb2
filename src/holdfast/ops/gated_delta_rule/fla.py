"""The gated delta rule by the CUDA kernels of fla-core (Yang et al., flash-linear-attention)."""

import functools
import importlib.util

import torch
from torch import Tensor

from holdfast.ops.precision import allows_tf32


@functools.cache
def is_available() -> bool:
    """Whether fla-core can be imported; it is not imported before its first use."""
    return importlib.util.find_spec("fla") is not None and importlib.util.find_spec("triton") is not None


def supports(dtype: torch.dtype) -> bool:
    """Whether the kernels keep the precision of dtype: they multiply float32 matrices in TF32."""
    if dtype == torch.float32:
        return allows_tf32()
    return dtype in (torch.bfloat16, torch.float16)


def gated_delta_rule_fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Arguments and result as in `holdfast.ops.gated_delta_rule.gated_delta_rule`; T ≥ 1, state in the compute dtype.

    With cu_seqlens the final state means nothing. Backward passes keep O(T) memory, as the kernels recompute states.

    Raises:
        ImportError: fla-core is not installed.
    """
    if not is_available():
        raise ImportError("backend 'fla' needs fla-core: install holdfast[cuda], or take backend 'chunked'.")
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    groups = v.shape[2] // k.shape[2]
    if groups > 1:
        q, k = q.repeat_interleave(groups, dim=2), k.repeat_interleave(groups, dim=2)
    packed = cu_seqlens is not None
    if cu_seqlens is not None:
        # fla-core 0.5 misplaces every sequence after an empty one.
        cu_seqlens = cu_seqlens.long().unique_consecutive()
    out, final_state = chunk_gated_delta_rule(
        q=q.to(v.dtype),
        k=k.to(v.dtype),
        v=v,
        g=g.float(),
        beta=beta.float(),
        scale=scale,
        initial_state=None if packed else state,
        output_final_state=not packed,
        cu_seqlens=cu_seqlens,
    )
    return out, state if packed else final_state
