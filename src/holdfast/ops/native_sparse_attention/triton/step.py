"""A few queries behind many keys, as in decoding: five launches, the keys divided among programs."""

from dataclasses import replace

from torch import Tensor

from holdfast.ops.native_sparse_attention.triton.forward import Splits, run_attend, run_choose
from holdfast.ops.native_sparse_attention.triton.gates import run_gated_sum
from holdfast.ops.native_sparse_attention.triton.launch import Shape
from holdfast.ops.native_sparse_attention.triton.sizes import Sizes
from holdfast.ops.retained_attention.triton.sizes import Tile
from holdfast.ops.window_step.kernels import programs_of, split


def run_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    means_k: Tensor,
    means_v: Tensor,
    lengths: Tensor | None,
    shape: Shape,
    window: int,
    scale: float,
    sizes: Sizes,
    programs: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and chosen blocks, as the operator `step` returns them; `programs` at once, None: as the device hides."""
    programs = programs or programs_of(q.device)
    of_means, of_keys = divide(shape, window, sizes.listed, programs)
    shared = (lengths, None, shape, scale)
    compressed, compressed_logs = run_attend(q, means_k, means_v, None, *shared, shape.single(sizes.listed), of_means)
    choice = shape.single(replace(sizes.choice, queries=sizes.listed.queries))
    blocks = run_choose(q, means_k, compressed_logs, *shared, choice, of_means.count)
    out, logs = run_attend(q, k, v, blocks, *shared, sizes.listed, of_keys, window)
    branches = (compressed, out[: of_keys.count], out[of_keys.count :])
    log_sums = (compressed_logs, logs[: of_keys.count], logs[of_keys.count :])
    return run_gated_sum(gates, branches, log_sums, q.dtype), blocks


def divide(shape: Shape, window: int, tile: Tile, programs: int) -> tuple[Splits, Splits]:
    """How the means and how the chosen keys and those in the window are divided, so that `programs` run at once."""
    tiles, count = split(max(shape.complete, 1), tile.keys, shape.users, programs)
    of_means = Splits(tiles * tile.keys, count)
    chosen = min(shape.num_blocks, shape.blocks) * shape.block_size
    recent = min(window, shape.keys)
    tiles, _ = split(chosen + recent, tile.keys, shape.users, programs)
    each = tiles * tile.keys
    return of_means, Splits(each, -(-chosen // each), -(-recent // each))
