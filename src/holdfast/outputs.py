"""What the models return.

Shapes: B batch, T tokens, V vocabulary, L layers with a retention scorer, Hkv key/value heads, n selected blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

from holdfast.cache import HybridCache


@dataclass
class RetentionOutput(ModelOutput):
    """What the scorers said in one forward pass.

    Attributes:
        scores: per LTE layer [B, T, Hkv] fp32, s = σ(logit) − threshold; above 0: worth keeping. With a cache,
            scores of the last R // 2 tokens are not final: NaN in calls of a token or a few, in longer ones what the
            scorer says so far. Pads have any value.
        kept: [L, Hkv] fp32, no gradient: pairs with s > 0 per sequence, among the positions that the penalty counts.
            These are candidates, whether or not they are in the window still, and however many slots the store has.
        penalised: [B, T] bool: those positions, real tokens with as many tokens of future as the scorer reads.
        stored: [L, Hkv] fp32, no gradient: pairs that the store holds after the last token of a sequence, sinks
            included, at most the budget; the mean over sequences. None with a cache, which can be asked itself.
    """

    scores: tuple[Tensor, ...] | None = None
    kept: Tensor | None = None
    penalised: Tensor | None = None
    stored: Tensor | None = None


@dataclass
class HybridModelOutput(ModelOutput):
    """Output of `HybridModel`: last_hidden_state [B, T, hidden_size], and what `HybridCausalLMOutput` says."""

    last_hidden_state: Tensor | None = None
    past_key_values: HybridCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    retention: RetentionOutput | None = None
    selection: tuple[Tensor, ...] | None = None


@dataclass
class HybridCausalLMOutput(ModelOutput):
    """Output of `HybridForCausalLM`.

    Attributes:
        loss: lm_loss + retention_loss, where labels were given.
        lm_loss: mean cross-entropy of the next token.
        retention_loss: mean over positions, layers and KV heads of λ·ReLU(s) (specification §3.6).
        logits: [B, T or logits_to_keep, V].
        past_key_values: the cache, advanced.
        hidden_states: inputs of every block and the final norm's output, where asked for.
        retention: scores and kept counts of the LTE layers; None without such layers.
        selection: where asked for, per layer of native sparse attention [B, T, Hkv, n] int64: the blocks of its
            sequence that a query read in full, in rising order, −1 where there were fewer and at pads.
    """

    loss: Tensor | None = None
    lm_loss: Tensor | None = None
    retention_loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: HybridCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    retention: RetentionOutput | None = None
    selection: tuple[Tensor, ...] | None = None
