"""Retained attention in plain PyTorch, one tile of queries at a time.

A tile of queries reads two sets of keys: the *near* ones, a slice that ends with the tile and begins `window` keys
before it, and the *far* ones, gathered by index: those before the slice that are still visible. One softmax runs over
both. The backward pass walks over the same tiles and computes the weights anew from the log-sum-exp, so that neither
pass ever holds more than one tile of scores.

A row is one KV head of one sequence. In shapes, N rows of a tile, L its queries, G query heads per KV head, C its keys,
the far ones first. Queries are held as [rows, Tq·G, D], so that a tile of them is a slice.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.ops.flops import attention_flops, count_with, retained_pairs
from holdfast.ops.precision import compute_dtype, without_autocast
from holdfast.ops.retained_attention import native
from holdfast.ops.second_derivatives import refuse_in

# Up to this many queries (decoding, short chunks) all keys are read at once.
_FEW_QUERIES = 16
# A whole sequence of up to this many tokens, of which none was evicted, takes PyTorch's causal attention: tiles cost as
# much as so little work (at 64 tokens they took 2.2 times as long).
_FEW_TOKENS = 256
# As many numbers are looked at one by one in Python.
_FEW_NUMBERS = 64
# Most queries in a tile. On a CPU, tiles of 256 took a sixth longer at 512 to 2,048 tokens: they read more keys beyond
# the window and the diagonal.
_CPU_LONGEST_TILE = 128
_ACCELERATOR_LONGEST_TILE = 256
# Scores in one tile. On a CPU they should stay in the cache from one pass over them to the next; an accelerator wants
# work enough for every kernel.
_CPU_SCORES = 1 << 19
_ACCELERATOR_SCORES = 1 << 24


def retained_attention_blocked(
    q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor | None, window: int | None, scale: float
) -> Tensor:
    """The contract of `retained_attention` in O(Tq·(window + kept)) time and O(Tk) memory, on any device.

    Plain causal attention, and a few queries on many keys, go to PyTorch's fused attention.
    """
    if q.shape[1] == k.shape[1] and _is_causal(visible_until, window, k.shape[1]):
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped).transpose(1, 2)
    if q.shape[1] <= _FEW_QUERIES or q.shape[0] == 0:
        return _few_queries(q, k, v, visible_until, window, scale)
    return _in_tiles(q, k, v, visible_until, window, scale)


def _is_causal(visible_until: Tensor | None, window: int | None, length: int) -> bool:
    """Whether every query of a whole sequence is known to see all keys before it.

    Values are looked at where that is cheap: of a short sequence, on a CPU, outside of a compiler's graph.
    """
    if visible_until is None:
        return window is None or window >= length - 1
    if length > _FEW_TOKENS or type(visible_until) is not Tensor or torch.compiler.is_compiling():
        return False
    if not visible_until.is_cpu or visible_until.numel() == 0:
        return False
    if visible_until.numel() > _FEW_NUMBERS:
        return visible_until.min().item() >= length - 1
    # A call of PyTorch less.
    return all(until >= length - 1 for rows in visible_until.tolist() for heads in rows for until in heads)


def _few_queries(
    q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor | None, window: int | None, scale: float
) -> Tensor:
    """One tile of all keys. The G heads of a group are further queries, so that keys are never repeated."""
    if visible_until is None and window is not None:
        needed = q.shape[1] + window
        k, v = k[:, -needed:], v[:, -needed:]
    queries, keys, kv_heads = q.shape[1], *k.shape[1:3]
    j = torch.arange(keys, device=q.device)
    i = torch.arange(keys - queries, keys, device=q.device)[:, None]
    if visible_until is not None:
        visible = (j <= i) & (i <= visible_until.transpose(1, 2)[:, :, None, :])  # [B, Hkv, Tq, Tk]
    else:
        visible = ((j <= i) if window is None else (j <= i) & (i <= j + window))[None, None]
    groups = q.shape[2] // kv_heads
    grouped = q.unflatten(2, (kv_heads, groups)).transpose(1, 2).flatten(2, 3)  # [B, Hkv, Tq·G, D]
    out = F.scaled_dot_product_attention(
        grouped, k.transpose(1, 2), v.transpose(1, 2), visible.repeat_interleave(groups, dim=2), scale=scale
    )
    return out.unflatten(2, (queries, groups)).transpose(1, 2).flatten(2, 3)


def _in_tiles(
    q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor | None, window: int | None, scale: float
) -> Tensor:
    return _tiled(q, k, v, visible_until, window, scale)[0]


@torch.library.custom_op("holdfast::retained_attention_tiled", mutates_args=())
def _tiled(
    q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor | None, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The output, and for the backward pass the base-2 log-sum-exp [rows, Tq·G, 1].

    A custom op, so that a compiler does not unroll the tiles into one graph, and into another for every mask.
    """
    kv_heads = k.shape[2]
    # Powers of two are twice as fast as powers of e: log2(e) goes into the scale.
    q_rows, k_rows, v_rows = _query_rows(q, kv_heads) * (scale / math.log(2)), _key_rows(k), _key_rows(v)
    walk = _Walk(q, k, visible_until, window)
    if native.supports(q_rows, walk.groups):
        out, log_sum = native.forward(q_rows, k_rows, v_rows, walk.until, walk.groups, walk.window)
        return _from_query_rows(out, q), log_sum
    out, log_sum = _empty_outputs(q_rows, v)
    with without_autocast(q):
        for tile in walk:
            weights = tile.hide(torch.bmm(q_rows[tile.queries], tile.read(k_rows).transpose(1, 2)))
            highest = weights.amax(dim=-1, keepdim=True)
            if walk.cut:  # a query that sees nothing has weights of 2^−∞
                highest.masked_fill_(highest == -torch.inf, 0.0)
            total = weights.sub_(highest).exp2_().sum(dim=-1, keepdim=True)
            if walk.cut:
                total.masked_fill_(total == 0, 1.0)
            out_tile = torch.bmm(weights, tile.read(v_rows))
            out[tile.queries] = out_tile.div_(total)
            log_sum[tile.queries] = highest.add_(total.log2_())
    return _from_query_rows(out, q), log_sum


@_tiled.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor | None, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    out, log_sum = _empty_outputs(_query_rows(q, k.shape[2]), v)
    return _from_query_rows(out, q), log_sum


def _empty_outputs(q_rows: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    rows = q_rows.shape[:2]
    return q_rows.new_empty(*rows, v.shape[-1]), q_rows.new_empty(*rows, 1)


@torch.library.custom_op("holdfast::retained_attention_tiled_backward", mutates_args=())
def _tiled_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible_until: Tensor | None,
    out: Tensor,
    log_sum: Tensor,
    grad_out: Tensor,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv."""
    kv_heads = k.shape[2]
    q_rows, k_rows, v_rows = _query_rows(q, kv_heads) * (scale / math.log(2)), _key_rows(k), _key_rows(v)
    grad_rows = _query_rows(grad_out, kv_heads)
    inner = (grad_rows * _query_rows(out, kv_heads)).sum(dim=-1, keepdim=True)
    walk = _Walk(q, k, visible_until, window)
    if native.supports(q_rows, walk.groups):
        dq, dk, dv = native.backward(
            q_rows, k_rows, v_rows, walk.until, walk.groups, walk.window, log_sum, grad_rows, inner
        )
        return _from_query_rows(dq.mul_(scale), q), _from_key_rows(dk.mul_(math.log(2)), k), _from_key_rows(dv, v)
    dq, dk, dv = q_rows.new_empty(q_rows.shape), torch.zeros_like(k_rows), torch.zeros_like(v_rows)
    with without_autocast(q):
        for tile in walk:
            q_tile, grad_tile, keys = q_rows[tile.queries], grad_rows[tile.queries], tile.read(k_rows)
            scores = torch.bmm(q_tile, keys.transpose(1, 2)).sub_(log_sum[tile.queries])
            weights = tile.hide(scores).exp2_()
            tile.add(dv, torch.bmm(weights.transpose(1, 2), grad_tile))
            grad_weights = torch.bmm(grad_tile, tile.read(v_rows).transpose(1, 2)).sub_(inner[tile.queries])
            grad_scores = weights.mul_(grad_weights)
            dq[tile.queries] = torch.bmm(grad_scores, keys)
            tile.add(dk, torch.bmm(grad_scores.transpose(1, 2), q_tile))
    # The queries carry scale / ln 2.
    return _from_query_rows(dq.mul_(scale), q), _from_key_rows(dk.mul_(math.log(2)), k), _from_key_rows(dv, v)


@_tiled_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible_until: Tensor | None,
    out: Tensor,
    log_sum: Tensor,
    grad_out: Tensor,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q_rows, k_rows, v_rows = _query_rows(q, k.shape[2]), _key_rows(k), _key_rows(v)
    dq, dk, dv = (rows.new_empty(rows.shape) for rows in (q_rows, k_rows, v_rows))
    return _from_query_rows(dq, q), _from_key_rows(dk, k), _from_key_rows(dv, v)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 6
    return *_tiled_backward(*ctx.saved_tensors, grad_out, ctx.window, ctx.scale), None, None, None


_tiled.register_autograd(_differentiate, setup_context=_save_for_backward)
refuse_in("retained_attention", "blocked", _tiled_backward)


def _flops(
    q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor | None, window: int | None, *, backward: bool = False
) -> int:
    (batch, keys, kv_heads, dim), groups = k.shape, q.shape[2] // k.shape[2]
    window = window if visible_until is None else None
    pairs = groups * retained_pairs(visible_until, batch * kv_heads, q.shape[1], keys, window)
    return attention_flops(pairs, dim, v.shape[3], backward=backward)


def _backward_flops(q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor | None, *others: Any) -> int:
    return _flops(q, k, v, visible_until, others[-2], backward=True)


count_with(lambda q, k, v, visible_until, window, _: _flops(q, k, v, visible_until, window), _tiled)
count_with(_backward_flops, _tiled_backward)


@dataclass(frozen=True)
class _Tile:
    """What one tile of queries reads, and what it may not see of that."""

    queries: tuple[slice, slice]  # rows, and queries times G
    near: tuple[slice, slice]  # rows, and keys
    far: Tensor | None  # [N·F] indices into [rows·Tk], F for each row
    groups: int  # G
    causal: Tensor  # [L, L] of 0 and −∞, added to the last L keys
    losing: slice  # the keys that some query may have lost
    lost: Tensor | None  # [N or 1, L, losing keys] of 0 and −∞, added to those

    def read(self, rows: Tensor) -> Tensor:
        """The keys or values of the tile, [N, C, D], from [rows, Tk, D]."""
        near = rows[self.near]
        if self.far is None:
            return near
        far = rows.flatten(0, 1).index_select(0, self.far)
        return torch.cat([far.view(near.shape[0], -1, near.shape[2]), near], dim=1)

    def add(self, rows: Tensor, gradient: Tensor) -> None:
        """Add the gradient of what `read` returned to that of the rows."""
        near = self.near[1].stop - self.near[1].start
        rows[self.near].add_(gradient[:, -near:])
        if self.far is not None:
            rows.flatten(0, 1).index_add_(0, self.far, gradient[:, :-near].flatten(0, 1))

    def hide(self, scores: Tensor) -> Tensor:
        """Set the scores [N, L·G, C] of what a query does not see to −∞, in place."""
        by_query = scores.unflatten(1, (-1, self.groups))
        by_query[..., -self.causal.shape[1] :].add_(self.causal[:, None, :])
        if self.lost is not None:
            by_query[..., self.losing].add_(self.lost[:, :, None, :])
        return scores


class _Walk:
    """The tiles of one call, in order."""

    def __init__(self, q: Tensor, k: Tensor, visible_until: Tensor | None, window: int | None) -> None:
        (batch, self.queries, heads), (self.keys, kv_heads) = q.shape[:3], k.shape[1:3]
        self.rows, self.groups = batch * kv_heads, heads // kv_heads
        self.window = self.keys if window is None else min(window, self.keys)
        self.dtype = compute_dtype(q)
        window_end = torch.arange(self.window, self.keys + self.window, device=q.device).clamp_(max=self.keys)
        if visible_until is None:
            # [rows or 1, Tk]; whether keys are lost inside the window; how many at most are seen beyond it.
            self.until, self.cut, self.kept = window_end[None], False, 0
        else:
            self.until = visible_until.transpose(1, 2).clamp(-1, self.keys).reshape(self.rows, self.keys)
            cut, kept = (self.until < window_end).any(), (self.until > window_end).sum(dim=1).max()
            self.cut, self.kept = torch.stack([cut, kept]).tolist()

    def __iter__(self) -> Iterator[_Tile]:
        rows, length = self._tile_size()
        causal = torch.full((length, length), -torch.inf, dtype=self.dtype, device=self.until.device).triu_(1)
        for start in range(0, self.rows, rows):
            yield from self._tiles_of(slice(start, min(start + rows, self.rows)), length, causal)

    def _tile_size(self) -> tuple[int, int]:
        """Rows and queries of a tile.

        A long tile reads keys beyond the window of most of its queries; a short one gathers the far keys more often.
        """
        on_cpu = self.until.device.type == "cpu"
        budget = _CPU_SCORES if on_cpu else _ACCELERATOR_SCORES
        longest = _CPU_LONGEST_TILE if on_cpu else _ACCELERATOR_LONGEST_TILE
        shortest = max(_FEW_QUERIES, 64 // self.groups)
        keys = min(self.keys, self.window + self.kept // 2)  # on average, since far keys become more and more
        length = min(1 << (self.window // 3).bit_length(), budget // (self.groups * max(keys, 1)), longest)
        length = min(max(length, shortest), self.queries)
        return max(1, budget // (self.groups * length * (keys + length))), length

    def _tiles_of(self, rows: slice, length: int, causal: Tensor) -> Iterator[_Tile]:
        until = self.until if self.until.shape[0] == 1 else self.until[rows]
        offset = torch.arange(rows.start, rows.stop, device=until.device)[:, None] * self.keys
        far = _FarKeys(until)
        for start in range(0, self.queries, length):
            stop = min(start + length, self.queries)
            first, last = self.keys - self.queries + start, self.keys - self.queries + stop - 1
            near = slice(max(0, first - self.window), last + 1)
            if self.kept:
                far.advance(near.start, first, last)
            # Near keys may be lost where the window of the last query has not begun yet, unless pads lie anywhere.
            losing_near = near.stop if self.cut else max(near.start, last - self.window)
            ends = torch.cat([far.until[:, far.safe :], until[:, near.start : losing_near]], dim=1)
            yield _Tile(
                queries=(rows, slice(start * self.groups, stop * self.groups)),
                near=(rows, near),
                far=(far.index + offset).flatten() if far.count else None,
                groups=self.groups,
                causal=causal[: stop - start, : stop - start],
                losing=slice(far.safe, far.safe + ends.shape[1]),
                lost=self._lost(ends, first, last) if ends.shape[1] else None,
            )

    def _lost(self, ends: Tensor, first: int, last: int) -> Tensor:
        """[N, L, keys] from [N, keys]: 0 where a query first … last still sees a key that ends there, −∞ where not."""
        # Arithmetic on small floats, since comparing and selecting are several times slower on a CPU.
        query = torch.arange(last - first + 1, dtype=self.dtype, device=ends.device)
        left = (ends - first).clamp_(-1, last - first).to(self.dtype)[:, None, :] - query[:, None]
        return torch.threshold_(left, -0.5, -torch.inf).clamp_(max=0.0)


class _FarKeys:
    """The keys before the near ones that some query of the tile sees; those that all its queries see come first."""

    def __init__(self, until: Tensor) -> None:
        self.row_until = until  # [N or 1, Tk]
        self.entered = 0
        self.count = 0  # F
        self.safe = 0  # how many of them all queries see, in every row
        self.index = torch.empty(until.shape[0], 0, dtype=torch.int64, device=until.device)  # [N, F]
        self.until = torch.empty_like(self.index)

    def advance(self, near_start: int, first: int, last: int) -> None:
        """Move on to the queries first … last, whose near keys begin at `near_start`."""
        entering = torch.arange(self.entered, near_start, device=self.index.device).expand(self.index.shape[0], -1)
        index = torch.cat([self.index, entering], dim=1)
        until = torch.cat([self.until, self.row_until[:, self.entered : near_start]], dim=1)
        self.entered = near_start
        if index.shape[1] == 0:
            return
        seen, safe = until >= first, until >= last
        self.count, self.safe = torch.stack([seen.sum(dim=1).max(), safe.sum(dim=1).min()]).tolist()
        # Rows that see fewer are filled up with keys that they have lost, which the tile hides.
        order = (2 - seen.byte() - safe.byte()).argsort(dim=1, stable=True)[:, : self.count]
        self.index, self.until = index.gather(1, order), until.gather(1, order)


def _query_rows(q: Tensor, kv_heads: int) -> Tensor:
    """[B, Tq, H, D] → [B·Hkv, Tq·G, D] in fp32 or fp64."""
    exact = q.to(compute_dtype(q))
    return exact.unflatten(2, (kv_heads, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)


def _from_query_rows(rows: Tensor, q: Tensor) -> Tensor:
    """The inverse of `_query_rows`, in the dtype of q."""
    batch, queries, heads = q.shape[:3]
    groups = rows.shape[1] // queries
    by_head = rows.to(q.dtype).view(batch, heads // groups, queries, groups, -1).transpose(1, 2)
    return by_head.reshape(batch, queries, heads, -1)


def _key_rows(k: Tensor) -> Tensor:
    """[B, Tk, Hkv, D] → contiguous [B·Hkv, Tk, D] in fp32 or fp64."""
    return k.to(compute_dtype(k)).transpose(1, 2).contiguous().flatten(0, 1)


def _from_key_rows(rows: Tensor, k: Tensor) -> Tensor:
    """The inverse of `_key_rows`, in the dtype of k."""
    return rows.to(k.dtype).view(k.shape[0], k.shape[2], k.shape[1], -1).transpose(1, 2)
