"""The decoding step in C++, for float32 on a CPU."""

from torch import Tensor

from holdfast.ops import one_token
from holdfast.ops.window_step.slots import Slots


def supports(q: Tensor, key: Tensor, value: Tensor, slots: Slots, score: Tensor | None, real: Tensor | None) -> bool:
    """Whether the compiled step can serve these tensors, in their layout and without a gradient."""
    whole = all(x is None or x.is_contiguous() for x in (slots.seen, slots.positions, real))
    return whole and one_token.serves(q, key, value, slots.keys, slots.values, slots.scores, score)


def window_step_native(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Slots,
    score: Tensor | None,
    real: Tensor | None,
    sinks: int,
    delay: int,
    scale: float,
) -> Tensor:
    """The contract of `window_step`.

    Raises:
        ValueError: the compiled step cannot serve these inputs, or there is none.
    """
    if not supports(q, key, value, slots, score, real):
        raise ValueError(
            "backend 'native' needs a C++ compiler, and contiguous float32 on a CPU without gradients: "
            "take backend 'pytorch'."
        )
    state = (slots.keys, slots.values, slots.seen, slots.scores, slots.positions)
    return one_token.step(q, key, value, score, real, state, sinks, delay, scale)
