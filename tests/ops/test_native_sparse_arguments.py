"""native_sparse_attention: what it refuses, and how it names it."""

from typing import Any

import pytest
import torch

from holdfast.ops.native_sparse_attention import native_sparse_attention

GOOD: dict[str, Any] = {
    "q": torch.zeros(2, 5, 4, 8),
    "k": torch.zeros(2, 7, 2, 8),
    "v": torch.zeros(2, 7, 2, 3),
    "gates": torch.zeros(2, 5, 4, 3),
    "block_size": 3,
    "num_blocks": 2,
    "window": 3,
}
MEANS = torch.zeros(2, 2, 2, 8), torch.zeros(2, 2, 2, 3)


@pytest.mark.parametrize(
    ("error", "message", "wrong"),
    [
        (ValueError, "q must have four dimensions", {"q": torch.zeros(5, 4, 8)}),
        (TypeError, "k is torch.float64 and q torch.float32", {"k": torch.zeros(2, 7, 2, 8, dtype=torch.float64)}),
        (TypeError, "floating", {"gates": torch.zeros(2, 5, 4, 3, dtype=torch.bool)}),
        (ValueError, "k is on meta", {"k": torch.zeros(2, 7, 2, 8, device="meta")}),
        (ValueError, "do not fit", {"k": torch.zeros(2, 7, 2, 9)}),
        (ValueError, r"gates must have the shape \[2, 5, 4, 3\]", {"gates": torch.zeros(2, 5, 4, 2)}),
        (ValueError, "not a multiple of 3", {"k": torch.zeros(2, 7, 3, 8), "v": torch.zeros(2, 7, 3, 3)}),
        (
            ValueError,
            "9 queries need at least as many keys",
            {"q": torch.zeros(2, 9, 4, 8), "gates": torch.zeros(2, 9, 4, 3)},
        ),
        (ValueError, "block_size must be at least 1, but is 0", {"block_size": 0}),
        (ValueError, "num_blocks must be at least 1, but is -2", {"num_blocks": -2}),
        (ValueError, "window must be at least 1, but is 0", {"window": 0}),
        (
            ValueError,
            r"compressed keys must have the shape \[2, 2 or more",
            {"compressed": (MEANS[0][:, 1:], MEANS[1])},
        ),
        (ValueError, "compressed values must have the shape", {"compressed": (MEANS[0], MEANS[0])}),
        (TypeError, "compressed keys must be floating", {"compressed": (MEANS[0].long(), MEANS[1])}),
        (TypeError, "lengths must be int64", {"lengths": torch.ones(2)}),
        (ValueError, r"lengths must have the shape \[2\]", {"lengths": torch.ones(3, dtype=torch.int64)}),
        (ValueError, "between 0 and the 7 keys, but one is 8", {"lengths": torch.tensor([3, 8])}),
        (ValueError, "excludes lengths", {"cu_seqlens": torch.tensor([0, 5]), "compressed": MEANS}),
        (ValueError, "offsets into one row", {"cu_seqlens": torch.tensor([0, 5])}),
        (ValueError, "backend 'quick' does not exist: choose one of 'reference'", {"backend": "quick"}),
    ],
)
def test_wrong_arguments_are_named(error: type[Exception], message: str, wrong: dict[str, Any]) -> None:
    assert native_sparse_attention(**GOOD)[0].shape == (2, 5, 4, 3)
    with pytest.raises(error, match=message):
        native_sparse_attention(**(GOOD | wrong))


def test_offsets_that_do_not_rise_to_the_length_are_refused() -> None:
    inputs = torch.zeros(1, 10, 4, 8), torch.zeros(1, 10, 2, 8), torch.zeros(1, 10, 2, 8), torch.zeros(1, 10, 4, 3)
    for ends in ([0, 4], [1, 10], [0, 7, 4, 10]):
        with pytest.raises(ValueError, match="must rise from 0 to the length 10"):
            native_sparse_attention(*inputs, block_size=2, num_blocks=2, window=2, cu_seqlens=torch.tensor(ends))
