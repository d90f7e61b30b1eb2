"""The model: one block, one stack, one causal language model, for every choice of mixers.

Shapes: B batch, T tokens, V vocabulary, L layers with a retention scorer, Hkv key/value heads.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from holdfast.cache import HybridCache
from holdfast.configuration import HybridConfig
from holdfast.inputs import check_inputs, check_labels, require_hybrid_cache
from holdfast.loading import load_checked
from holdfast.losses import next_token_loss
from holdfast.mixers import MIXERS, LearnedEviction, MixerOutput, MixerState, TokenLayout, TokenMixer
from holdfast.mixers.base import projected_dtype
from holdfast.mixers.layout import (
    checked_cu_seqlens,
    document_of_column,
    left_aligned_order,
    real_columns,
    restore_order,
)
from holdfast.mixers.penalty import Float32Buffers, count_kept, retention_penalty
from holdfast.ops.linear import apply_linear
from holdfast.ops.norms import rms_norm
from holdfast.ops.swiglu import swiglu
from holdfast.outputs import HybridCausalLMOutput, HybridModelOutput, RetentionOutput

logger = logging.get_logger(__name__)


class HybridPreTrainedModel(PreTrainedModel):
    """Initialisation and loading, shared by the stack and the language model."""

    config: HybridConfig
    config_class = HybridConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the Trainer averages the losses of accumulated batches
    _no_split_modules = ["HybridBlock"]  # noqa: RUF012
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["l1_lambda", "num_kept"]  # noqa: RUF012  (λ begins at 1e-9, which fp16 lacks)
    _is_stateful = True  # what was evicted cannot be rolled back: assisted generation must refuse

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if self.config.tie_word_embeddings and module is getattr(self, "lm_head", None):
            return  # its weight is the embeddings'; after a start on the meta device it would be drawn a second time
        if isinstance(module, (nn.Linear, nn.Embedding)):
            shrink = math.sqrt(2 * self.config.num_hidden_layers) if getattr(module, "writes_residual", False) else 1
            init.normal_(module.weight, mean=0.0, std=std / shrink)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, HybridModel) and module.has_scorers:
            init.zeros_(module.l1_lambda)
            init.zeros_(module.num_kept)
        elif not isinstance(module, PreTrainedModel) and callable(initialise := getattr(module, "init_weights", None)):
            initialise(init)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Load a model from a directory or the hub, in this library's or the published format.

        As in transformers, but nothing is initialised silently: see `holdfast.loading.load_checked`.
        """
        return load_checked(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, *_: Any, **__: Any) -> None:
        """Nothing, as for `HybridConfig`."""


class RMSNorm(nn.Module):
    """x · weight / √(mean(x²) + eps) over the last dimension, computed in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def init_weights(self, init: Any) -> None:
        init.ones_(self.weight)


class SwiGLU(nn.Module):
    """down(SiLU(gate(x)) · up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return apply_linear(self.down_proj, swiglu(apply_linear(self.gate_proj, x), apply_linear(self.up_proj, x)))


class HybridBlock(GradientCheckpointingLayer):
    """x += mixer(norm(x)), then x += mlp(norm(x))."""

    def __init__(self, config: HybridConfig, index: int) -> None:
        super().__init__()
        assert config.mixers is not None
        assert config.intermediate_size is not None
        name = config.mixers[index]
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn: TokenMixer = MIXERS[name](config.hidden_size, config.rms_norm_eps, config.options_for(name))
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        if config.scale_residual_init:
            for output in (self.attn.o_proj, self.mlp.down_proj):
                output.writes_residual = True  # type: ignore[union-attr]

    def forward(self, hidden: Tensor, layout: TokenLayout, state: MixerState | None = None) -> MixerOutput:
        if state is not None:
            state.begin_call(hidden.shape[0], projected_dtype(hidden), hidden.device)
        mixed = self.attn(self.attn_norm(hidden), layout.to(hidden.device), state)
        hidden = hidden + mixed.hidden
        return mixed._replace(hidden=hidden + self.mlp(self.mlp_norm(hidden)))


class HybridModel(Float32Buffers, HybridPreTrainedModel):
    """The stack of blocks, without the language-model head."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # noqa: RUF012  (a language model's checkpoint serves)

    l1_lambda: Tensor
    num_kept: Tensor

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([HybridBlock(config, index) for index in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        scorers = self.eviction_layers()
        self.has_scorers = bool(scorers)
        if scorers:
            if scorers[0].options.scorer_sharing == "all":
                self.router = scorers[0].options.build_scorer()
                for layer in scorers:
                    layer.use_scorer(self.router)
            shape = (len(scorers), scorers[0].options.kv_heads)
            self.register_buffer("l1_lambda", torch.zeros(shape))
            self.register_buffer("num_kept", torch.zeros(shape))
        self.post_init()

    def eviction_layers(self) -> list[LearnedEviction]:
        """The LTE mixers, in the order of the rows of `l1_lambda` and `num_kept`."""
        return [block.attn for block in self.layers if isinstance(block.attn, LearnedEviction)]

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_selection: bool = False,
    ) -> HybridModelOutput:
        """Run the blocks. Arguments as in `HybridForCausalLM.forward`."""
        check_inputs(input_ids, inputs_embeds, self.config.hidden_size)
        hidden = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        cache = self._cache(past_key_values, use_cache, cu_seqlens, hidden)
        hidden, layout, order = self._arrange(hidden, attention_mask, cu_seqlens, cache)
        states = cache.layers if cache is not None else [None] * len(self.layers)
        every: list[Tensor] = []
        scores: list[Tensor] = []
        selection: list[Tensor] = []
        for block, state in zip(self.layers, states, strict=True):
            every.append(hidden)
            hidden, block_scores, block_choice = block(hidden, layout, state)
            if block_scores is not None:
                scores.append(block_scores.to(layout.positions.device))
            if output_selection and block_choice is not None:
                selection.append(block_choice)
        hidden = self.norm(hidden)
        retention = self._retention(scores, layout, order, whole=cache is None) if scores else None
        if cache is not None:  # last, since the layout reads from it
            cache.advance(layout.length, layout.num_real)
        return HybridModelOutput(
            last_hidden_state=restore_order(hidden, order),
            past_key_values=cache,
            hidden_states=tuple(restore_order(h, order) for h in (*every, hidden)) if output_hidden_states else None,
            retention=retention,
            selection=tuple(restore_order(blocks, order) for blocks in selection) if output_selection else None,
        )

    def _cache(
        self, cache: HybridCache | None, use_cache: bool | None, cu_seqlens: Tensor | None, hidden: Tensor
    ) -> HybridCache | None:
        require_hybrid_cache(cache)
        asked = use_cache is True
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if cu_seqlens is not None:
            if cache is not None:
                raise ValueError("cu_seqlens packs whole documents and cannot be combined with past_key_values")
            if asked:
                raise ValueError("cu_seqlens packs whole documents, of which no cache can be made: leave use_cache out")
            return None
        if self.training and self.gradient_checkpointing:
            if cache is not None:
                raise ValueError("gradient checkpointing would advance past_key_values twice: leave the cache out")
            if asked:
                logger.warning_once(
                    "`use_cache=True` is incompatible with gradient checkpointing: no cache is returned"
                )
            return None
        if cache is None and use_cache:
            cache = HybridCache(self.config)
        if cache is not None:
            cache.begin_call(hidden.shape[0], hidden.device)
        return cache

    def _arrange(
        self, hidden: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, cache: HybridCache | None
    ) -> tuple[Tensor, TokenLayout, Tensor | None]:
        """Hidden states with each row's pads in front, their layout, and the column order used [B, T] (None: as is)."""
        batch, length = hidden.shape[:2]
        if cache is not None and cache.seen is not None:
            seen, fresh = cache.seen, cache.is_fresh
        else:
            seen, fresh = torch.zeros(batch, dtype=torch.long, device=hidden.device), True
        columns = torch.arange(length, device=hidden.device).expand(batch, -1)
        if cu_seqlens is not None:
            if mask is not None:
                raise ValueError("attention_mask and cu_seqlens exclude each other: packed documents have no pads")
            cu_seqlens = checked_cu_seqlens(cu_seqlens, batch, length).to(hidden.device, torch.long)
            starts = cu_seqlens[document_of_column(cu_seqlens, length)]
            return hidden, TokenLayout(seen, columns - starts, None, cu_seqlens), None
        real = real_columns(mask, batch, length)
        if real is None:
            return hidden, TokenLayout(seen, seen.unsqueeze(1) + columns, None, None, fresh), None
        order = left_aligned_order(real)
        real = real.gather(1, order)
        positions = seen.unsqueeze(1) + (real.cumsum(1) - 1).clamp(min=0)
        hidden = hidden.gather(1, order.unsqueeze(2).expand_as(hidden))
        return hidden, TokenLayout(seen, positions, real, None, fresh), order

    def _retention(
        self, scores: list[Tensor], layout: TokenLayout, order: Tensor | None, whole: bool
    ) -> RetentionOutput:
        reach = self.eviction_layers()[0].router.reach
        penalised = layout.followed_by(reach)
        stored = [lte.stored(s, layout) for lte, s in zip(self.eviction_layers(), scores, strict=True) if whole]
        return RetentionOutput(
            scores=tuple(restore_order(s, order) for s in scores),
            kept=count_kept(scores, penalised, layout.num_sequences),
            penalised=restore_order(penalised, order),
            stored=torch.stack(stored) if whole else None,
        )


class HybridForCausalLM(HybridPreTrainedModel, GenerationMixin):
    """Causal language model whose layers' token mixers are chosen by name."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.model = HybridModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embeddings = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_selection: bool = False,
        return_dict: bool | None = None,
    ) -> HybridCausalLMOutput | tuple[Any, ...]:
        """Predict the next token at every column.

        Args:
            input_ids: [B, T]. inputs_embeds: [B, T, hidden_size] instead.
            attention_mask: [B, T] (or [B, past + T], of which the last T columns count); 0 at pads, which may stand
                anywhere and change nothing for the tokens.
            past_key_values: a `HybridCache`; any number of tokens may follow in one call.
            labels: [B, T], aligned with input_ids, −100 where nothing is to be predicted. A token that follows a pad
                or begins a packed document is not predicted.
            use_cache: return a cache. Default: config.use_cache in evaluation, False in training.
            cu_seqlens: [N + 1] integer offsets of documents packed into one row (B = 1, no mask, no cache).
            logits_to_keep: compute logits only for the last n columns (0: all), or for the columns in a 1-D tensor.
            output_attentions: refused. No attention matrix is ever formed; see `output.retention`.
            output_selection: return the blocks that each query of native sparse attention read in full.

        Raises:
            ValueError: for arguments that exclude each other or do not fit.
        """
        self._refuse_attentions(output_attentions)
        check_labels(labels, input_ids, inputs_embeds)
        returned = {"output_hidden_states": output_hidden_states, "output_selection": output_selection}
        outputs = self.model(
            input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, cu_seqlens, **returned
        )
        columns = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = apply_linear(self.lm_head, outputs.last_hidden_state[:, columns])
        loss = lm_loss = retention_loss = None
        if labels is not None:
            lm_loss = next_token_loss(logits, labels, attention_mask, cu_seqlens)
            retention_loss = self._retention_loss(outputs.retention, logits)
            loss = lm_loss + retention_loss
        result = HybridCausalLMOutput(
            loss=loss,
            lm_loss=lm_loss,
            retention_loss=retention_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            retention=outputs.retention,
            selection=outputs.selection,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return result if return_dict else result.to_tuple()

    def _refuse_attentions(self, output_attentions: bool | None) -> None:
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError(
                "attention weights cannot be returned: no attention matrix is ever formed. "
                "What each head keeps is in output.retention; output_selection=True gives what it selects."
            )

    def _retention_loss(self, retention: RetentionOutput | None, like: Tensor) -> Tensor:
        if retention is None:
            return like.new_zeros((), dtype=torch.float32)
        assert retention.scores is not None
        assert retention.penalised is not None
        l1_lambda = self.model.l1_lambda.to(retention.penalised.device)
        return retention_penalty(retention.scores, l1_lambda, retention.penalised).to(like.device)

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        if (given := model_kwargs.get("past_key_values")) is not None:
            require_hybrid_cache(given)
            given._is_user_defined = True  # generate then leaves it whole
            return
        if generation_config.use_cache is False:
            return
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} does not apply: a HybridCache holds "
                "what each mixer needs, of fixed size wherever the mixer allows; leave the setting out"
            )
        model_kwargs["past_key_values"] = HybridCache(self.config)


AutoModel.register(HybridConfig, HybridModel)
AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM)
