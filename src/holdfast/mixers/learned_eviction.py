"""Sliding-window attention with learned token eviction (LTE): a window, sinks, and a store of fixed size.

He & Garner, "Alleviating Forgetfulness of Linear Attention by Hybrid Sparse Attention and Contextualized Learnable
Token Eviction", arXiv 2510.20787; specification §3.3 to §3.6.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from holdfast.mixers.base import MixerOutput, count_weights, require, straight_through
from holdfast.mixers.layout import TokenLayout, count_documents, document_of_column, gapped_columns
from holdfast.mixers.scorers import ConvScorer, receptive_field
from holdfast.mixers.softmax_attention import AttentionOptions, SoftmaxAttention, confine, gather_rows
from holdfast.mixers.state import MixerState
from holdfast.mixers.window_state import WindowState
from holdfast.ops.gated_attention import gated_retained_attention
from holdfast.ops.retained_attention import retained_attention
from holdfast.ops.retention import FOREVER, streaming_retention

# Of a pair that the scorer is sure to drop: its logarithm and the gradient of that must stay finite.
_LEAST_GATE = 1e-6


@dataclass(frozen=True)
class LearnedEvictionOptions(AttentionOptions):
    """Settings of learned eviction: those of full attention, and

    Attributes:
        window: a query sees this many past keys, and itself.
        budget: pairs kept per KV head outside the window, sinks included.
        sinks: first tokens of a sequence, never dropped.
        conv_size, conv_dilation: the scorer's convolutions. (1, 1, 1), (1, 1, 1) makes it a network without context
            (an MLP of the same depth), (3, 3, 3), (1, 1, 1) one with R = 7.
        scorer_causal: the scorer reads no token after a pair, and R − 1 before it, so that nothing is deferred.
        dropout: of the scorer, in training.
        threshold: a pair is worth keeping where σ(logit) is above it. With 0 the store holds the best `budget` pairs,
            whatever their scores; only their order counts.
        scorer_sharing: "head" (one network per KV head), "layer" (one for all heads of a layer) or "all" (one for the
            whole model).
    """

    window: int = 768
    budget: int = 512
    sinks: int = 4
    conv_size: tuple[int, ...] = (3, 3, 3)
    conv_dilation: tuple[int, ...] = (2, 2, 2)
    dropout: float = 0.1
    threshold: float = 0.5
    scorer_sharing: Literal["head", "layer", "all"] = "head"
    scorer_causal: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.window >= 0, f"window must be 0 or more, got {self.window}")
        require(self.receptive_field >= 1, "the scorer reads at least the token that it scores")
        require(self.budget >= 1, f"budget must be at least 1, got {self.budget}")
        require(
            0 <= self.sinks <= self.budget, f"sinks ({self.sinks}) must lie between 0 and the budget ({self.budget})"
        )
        require(0 <= self.dropout < 1, f"dropout must lie in [0, 1), got {self.dropout}")
        require(0 <= self.threshold < 1, f"threshold must lie in [0, 1), got {self.threshold}")
        require(
            self.scorer_sharing in ("head", "layer", "all"),
            f"scorer_sharing must be 'head', 'layer' or 'all', got {self.scorer_sharing!r}",
        )
        require(
            self.window + 1 >= self.scorer_reach,
            f"window ({self.window}) is shorter than the future that the scorer reads ({self.scorer_reach})",
        )
        require(
            self.head_dim is None or (2 * self.head_dim) >> len(self.conv_size) >= 1,
            f"each of the scorer's {len(self.conv_size)} convolutions halves 2 · head_dim channels, and head_dim "
            f"{self.head_dim} leaves none: raise it, or give a shorter conv_size and conv_dilation",
        )

    @property
    def receptive_field(self) -> int:
        return receptive_field(self.conv_size, self.conv_dilation)

    @property
    def scorer_reach(self) -> int:
        """Tokens after a pair that its score depends on: it is final so many steps later."""
        return 0 if self.scorer_causal else self.receptive_field // 2

    def build_scorer(self) -> ConvScorer:
        """A scorer with these settings, for one layer, or with scorer_sharing "all" for the whole model."""
        scorer = ConvScorer(
            self.kv_heads,
            2 * self.dim,
            self.conv_size,
            self.conv_dilation,
            self.dropout,
            shared=self.scorer_sharing != "head",
            threshold=self.threshold,
            causal=self.scorer_causal,
        )
        with torch.random.fork_rng(devices=[]):  # a scorer's own start, which moves nothing else that a seed decides
            for module in scorer.modules():
                if callable(initialise := getattr(module, "init_weights", None)):
                    initialise(nn.init)
        return scorer


class _scheduled:  # noqa: N801
    """A number that changes between steps. Passes read it off a tensor, so that torch.compile need not trace again."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_{name}"

    def __get__(self, layer: nn.Module | None, owner: type | None = None) -> float:
        return 0.0 if layer is None else layer.__dict__.get(f"{self._name}_value", 0.0)

    def __set__(self, layer: nn.Module, value: float) -> None:
        with torch.inference_mode(False):
            layer.__dict__[self._name] = torch.tensor(value, dtype=torch.float32, device="cpu")
        layer.__dict__ |= {f"{self._name}_value": value, f"{self._name}_is_on": value > 0}


class LearnedEviction(SoftmaxAttention):
    """Attention over the window and over the pairs that a trained scorer chose to keep.

    In evaluation the store has `budget` slots; in training every pair with a positive score stays. One pass, a
    prefill in chunks and decoding give the same result. With a cache a layer always does as in evaluation: its store
    has `budget` slots, and `eviction`, `training_budget` and `exploration` are not read.

    Attributes:
        router: the scorer (its published name).
        eviction: False lets every query see everything while training, and gives the scorer gradients of zero, from
            the penalty too (a schedule switches it on).
        training_budget: slots of the store in training, so that what is kept is decided by rank; None: no cap.
        exploration: share of the dropped pairs that stay visible while training, so that they are taught too; at most
            `budget` at a time, a random sample of them.
        substitute: where it is set, it scores in place of the router, in passes without a cache (see
            `holdfast.evaluation.scorers`): called with queries [B, T, H, D] and keys [B, T, Hkv, D] after RoPE, the
            router's features [B, T, Hkv, 2D] and the layout, it returns scores [B, T, Hkv].
        soft_gate: while training, σ(logit) to this power multiplies a pair's weight for queries beyond its window: a
            second path by which these teach the scorer. 0: the cut is hard.
    """

    Options = LearnedEvictionOptions
    eviction: bool = True
    training_budget: int | None = None
    exploration = _scheduled()
    substitute: Callable[[Tensor, Tensor, Tensor, TokenLayout], Tensor] | None = None
    soft_gate = _scheduled()
    _exploration: Tensor
    _exploration_is_on: bool = False
    _soft_gate: Tensor
    _soft_gate_is_on: bool = False

    def __init__(self, hidden_size: int, norm_eps: float, options: LearnedEvictionOptions) -> None:
        super().__init__(hidden_size, norm_eps, options)
        if options.scorer_sharing != "all":
            self.router = options.build_scorer()

    def use_scorer(self, scorer: ConvScorer) -> None:
        """Score with a network that belongs to the whole model, not to this layer; scorer_sharing "all" asks for it.

        `HybridForCausalLM` sees to it. In a model of your own make one by `options.build_scorer()`, let it be a
        submodule of the model, and give it to every layer.
        """
        object.__setattr__(self, "router", scorer)  # not a submodule: its weights are the model's, and saved there

    @classmethod
    def make_state(cls, options: LearnedEvictionOptions) -> WindowState:
        scorer = (options.receptive_field, options.scorer_reach)
        return WindowState(options.kv_heads, options.dim, options.window, options.budget, *scorer)

    def flops_per_token(self, context: int) -> int:
        options = self.options
        pairs = min(context, options.window + 1 + options.budget)
        return self._attention_flops(pairs) + self.scorer_flops_per_token

    @property
    def scorer_flops_per_token(self) -> int:
        """The scorer's share of `flops_per_token`."""
        return 2 * count_weights(self.router) * (self.options.kv_heads if self.router.shared else 1)

    def forward(self, hidden: Tensor, layout: TokenLayout, state: MixerState | None = None) -> MixerOutput:
        q, k, v = self.project(hidden)
        features = torch.cat([k, v], dim=-1)
        q, k = self.rotate(q, layout), self.rotate(k, layout)
        if not isinstance(state, WindowState):
            return self._whole(q, k, v, features, layout)
        if self.substitute is not None:
            raise ValueError("a substitute for the scorer works in one pass only; pass use_cache=False.")
        if state.is_short(q, layout):
            return self._steps(q, k, v, features, layout, state)
        return self._chunk(q, k, v, features, layout, state)

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, features: Tensor, layout: TokenLayout) -> MixerOutput:
        """All tokens at once, without a cache."""
        substitute = self.substitute
        scores = self.score(features, layout) if substitute is None else substitute(q, k, features, layout)
        if self.training and not self.eviction:
            scores = scores.detach() + 0 * scores  # in the graph still, as DistributedDataParallel asks
        else:
            v = self._teaching(v, scores)
        visible_until = confine(self._retention(scores, layout), layout)
        if self.training and self.eviction and self._soft_gate_is_on:
            log_gate = self._log_gate(scores, layout)
            out = gated_retained_attention(q, k, v, visible_until, self.options.window, log_gate)
        else:
            out = retained_attention(q, k, v, visible_until, self.options.window)
        return MixerOutput(self.output(out), scores)

    def _chunk(
        self, q: Tensor, k: Tensor, v: Tensor, features: Tensor, layout: TokenLayout, state: WindowState
    ) -> MixerOutput:
        """A prompt or a part of it: the past in front, then as in one pass. O(budget + window) more than without."""
        tail = state.extended_tail(features, layout)
        scores = self._score_tail(tail, layout)
        v = self._teaching(v, scores[:, -layout.length :])
        rows = gather_rows(k, v, scores, layout, state)
        effective = self._effective(rows.scores, rows.positions)
        visible_until = streaming_retention(effective, self.options.budget, self.options.window)
        visible_until = visible_until.masked_fill(rows.positions < 0, -1)
        out = retained_attention(q, rows.keys, rows.values, visible_until, self.options.window)
        rows = type(rows)(rows.keys, rows.values, effective, rows.positions)
        state.write_rows(rows, visible_until, layout)
        state.tail.copy_(tail[:, tail.shape[1] - state.tail.shape[1] :])
        return MixerOutput(self.output(out), scores[:, -layout.length :])

    def _steps(
        self, q: Tensor, k: Tensor, v: Tensor, features: Tensor, layout: TokenLayout, state: WindowState
    ) -> MixerOutput:
        """A token or a few, in place. O(T·(budget + window)) time."""
        tail = state.extended_tail(features, layout)
        scores = self.router(tail, layout.latest_exist(tail.shape[1]))  # of the tokens `reach` before
        out = state.steps(q, k, v, scores, self.options.sinks, layout.real)
        state.tail.copy_(tail[:, layout.length :])
        final = torch.full_like(scores, torch.nan)
        if layout.length > (reach := self.router.reach):
            final[:, : layout.length - reach] = scores[:, reach:]
        return MixerOutput(self.output(out), final)

    def _teaching(self, v: Tensor, scores: Tensor) -> Tensor:
        """The values, unchanged; their gradients also reach the scores."""
        return straight_through(v, scores) if torch.is_grad_enabled() and scores.requires_grad else v

    def _log_gate(self, scores: Tensor, layout: TokenLayout) -> Tensor:
        """soft_gate · log σ(logit), [B, T, Hkv] fp32; 0 for sinks, whose score decides nothing."""
        probability = (scores + self.options.threshold).clamp(min=_LEAST_GATE)
        sinks = layout.token_positions.unsqueeze(2) < self.options.sinks
        return (self._soft_gate * probability.log()).masked_fill(sinks, 0)

    @torch.no_grad()
    def stored(self, scores: Tensor, layout: TokenLayout) -> Tensor:
        """Pairs in the store after the last token of a sequence, [Hkv] fp32, a mean over the sequences.

        A candidate takes a free slot while there is one, so the store then holds as many as have left the window, or
        `budget`: with the budget enforced exactly this, in training without it what a cache would hold.

        Args:
            scores: [B, T, Hkv] of whole sequences. layout: theirs.
        """
        is_sink = layout.token_positions.unsqueeze(2) < self.options.sinks
        candidates = ((scores > 0) | is_sink) & layout.followed_by(self.options.window + 1).unsqueeze(2)
        if layout.cu_seqlens is None:
            counts = candidates.sum(dim=1)
        else:
            document = document_of_column(layout.cu_seqlens, layout.length)
            counts = document.new_zeros(len(layout.cu_seqlens) - 1, scores.shape[2])
            counts.index_add_(0, document, candidates[0].long())
        sequences = len(counts) if layout.cu_seqlens is None else count_documents(layout.cu_seqlens)
        return counts.clamp(max=self.options.budget).float().sum(dim=0) / sequences

    def score(self, features: Tensor, layout: TokenLayout) -> Tensor:
        """Scores [B, T, Hkv] of whole sequences."""
        around = (self.router.lookback, self.router.reach)
        if layout.cu_seqlens is None:
            valid = layout.real
            if valid is None:
                valid = torch.ones(1, layout.length, dtype=torch.bool, device=features.device)
            return self.router(F.pad(features, (0, 0, 0, 0, *around)), F.pad(valid, around))
        columns, length = gapped_columns(layout.cu_seqlens, layout.length, self.router.lookback)
        spread = features.new_zeros(1, length, *features.shape[2:]).index_copy(1, columns, features)
        valid = torch.zeros(1, length, dtype=torch.bool, device=features.device).index_fill(1, columns, True)
        scores = self.router(F.pad(spread, (0, 0, 0, 0, *around)), F.pad(valid, around))
        return scores.index_select(1, columns)

    def _score_tail(self, tail: Tensor, layout: TokenLayout) -> Tensor:
        """Scores [B, reach + T, Hkv] of the tokens that were not final before and of this call's.

        The last `reach` are not final yet: their future is missing. They are in the window, where no score is needed.
        """
        reach = self.router.reach
        valid = layout.latest_exist(tail.shape[1])
        return self.router(F.pad(tail, (0, 0, 0, 0, 0, reach)), F.pad(valid, (0, reach)))

    def _effective(self, scores: Tensor, positions: Tensor) -> Tensor:
        """Scores that decide: +∞ for sinks, −∞ for rows that hold no token."""
        scores = scores.detach().masked_fill(positions < self.options.sinks, torch.inf)
        return scores.masked_fill(positions < 0, -torch.inf)

    def _retention(self, scores: Tensor, layout: TokenLayout) -> Tensor:
        """visible_until [B, T, Hkv] of whole sequences."""
        effective = self._effective(scores, layout.token_positions.unsqueeze(2))
        if not self.training:
            return streaming_retention(effective, self.options.budget, self.options.window, starts=layout.starts)
        if not self.eviction:
            return torch.full_like(effective, FOREVER, dtype=torch.long)
        visible_until = streaming_retention(effective, self.training_budget, self.options.window, starts=layout.starts)
        return self._explored(visible_until, layout) if self._exploration_is_on else visible_until

    def _explored(self, visible_until: Tensor, layout: TokenLayout) -> Tensor:
        """`visible_until` with a random share of the dropped pairs left visible, at most `budget` of them at a time.

        They share a second store, where random numbers decide as scores do in the first: at every step it holds a
        uniform sample of what has been drawn so far, and a query reads a fixed number of pairs more.
        """
        chances = torch.rand(visible_until.shape, device=visible_until.device)
        drawn = (chances < self._exploration) & (visible_until < FOREVER)
        ranks = chances.masked_fill(~drawn, -torch.inf)
        options = self.options
        return visible_until.maximum(streaming_retention(ranks, options.budget, options.window, starts=layout.starts))
