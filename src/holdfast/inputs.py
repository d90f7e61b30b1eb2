"""What a model can read, checked once and by name before anything is computed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from holdfast.cache import HybridCache


def check_inputs(input_ids: Tensor | None, inputs_embeds: Tensor | None, hidden_size: int) -> None:
    """Refuse inputs that are not one of input_ids [B, T] and inputs_embeds [B, T, hidden_size], B and T at least 1.

    Raises:
        ValueError: naming the argument and its shape.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds")
    if input_ids is not None:
        name, given, fits = "input_ids", input_ids, input_ids.dim() == 2 and not input_ids.is_floating_point()
        expected = "integers [B, T]"
    else:
        assert inputs_embeds is not None
        name, given = "inputs_embeds", inputs_embeds
        fits, expected = given.dim() == 3 and given.shape[2] == hidden_size, f"[B, T, {hidden_size}]"
    if not fits:
        raise ValueError(f"{name} must be {expected}, got {given.dtype} {list(given.shape)}")
    if given.shape[0] == 0 or given.shape[1] == 0:
        raise ValueError(
            f"{name} is empty: its shape is {list(given.shape)}, at least one row and one token are needed"
        )


def check_labels(labels: Tensor | None, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
    """Refuse labels that do not stand at the columns of the input.

    Raises:
        ValueError: naming both shapes.
    """
    given = input_ids if input_ids is not None else inputs_embeds
    if labels is not None and given is not None and labels.shape != given.shape[:2]:
        raise ValueError(f"labels must have the shape of the input, {list(given.shape[:2])}, got {list(labels.shape)}")


def require_hybrid_cache(cache: Any) -> None:
    """Refuse another library's cache as past_key_values."""
    if cache is not None and not isinstance(cache, HybridCache):
        raise ValueError(f"past_key_values must be a holdfast.HybridCache(config), got a {type(cache).__name__}")
