"""The models in EleutherAI's lm-evaluation-harness, as its model `holdfast`. Needs `pip install 'holdfast[eval]'`.

`holdfast evaluate lm-eval` runs the harness with this model in it. The harness's own command knows models of other
packages by entry points in the group `lm_eval.models`, as pyproject.toml declares this one, only in versions after
0.4.13, where `lm-eval run --model holdfast` works; with 0.4.13 and before it takes
`lm-eval run --model hf --model_args pretrained=DIR,trust_remote_code=True`, which gives the same answers, but refuses
neither a request that is longer than the model was trained on, whose beginning it cuts off, nor one with tokens that
the model does not know, nor a tokenizer that puts a token behind every prompt.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import setup_logging

from holdfast.configuration import HybridConfig
from holdfast.data.hub import fail_fast_offline
from holdfast.evaluation.harness_command import read_options
from holdfast.evaluation.limits import check_prompts, check_tokens
from holdfast.modeling import HybridForCausalLM

__all__ = ["HoldfastLM", "run_harness"]


@register_model("holdfast")
class HoldfastLM(HFLM):
    """The harness's own transformers model, whose configuration may also be of the published format.

    All it does is inherited: loglikelihood, rolling loglikelihood and generate_until, in batches with pads. Pads behind
    a text change nothing in it, for what a scorer reads of the future is never older than the window.

    A request of more tokens than the model was trained on is refused, unless `max_length` says how many to read: the
    harness would cut off its beginning, where the needles of a long context may lie, and score what is left.

    Nor is a tokenizer taken that puts a token behind every text: no prompt could be continued, and a continuation would
    be scored without its first token. With `add_bos_token=False` the harness has nothing put before or behind a text.

    Requests with a token that the model has no embedding for are refused before the first of their kind is read. A
    tokenizer whose tokens around every text are such is refused before the model is loaded, but with `peft`, where the
    harness gives the embeddings as many rows as the tokenizer has tokens.
    """

    AUTO_MODEL_CLASS = HybridForCausalLM
    _counted: Mapping[str, Sequence[int]] = {}
    """Tokens of the texts that are being read, as they were counted."""

    def __init__(self, *args: Any, peft: str | None = None, **options: Any) -> None:
        self._adapter = peft
        super().__init__(*args, peft=peft, **options)

    def _get_config(self, pretrained: str, *, revision: str = "main", **_: Any) -> None:
        self._config = HybridConfig.from_pretrained(pretrained, revision=revision)

    def _get_backend(self, config: Any, *_: Any, **__: Any) -> None:
        """The harness knows transformers' own types alone, and warns of others."""
        self.backend = "causal"

    def _create_tokenizer(self, pretrained: Any, *args: Any, add_bos_token: bool | None = None, **options: Any) -> None:
        super()._create_tokenizer(pretrained, *args, add_bos_token=add_bos_token, **options)
        is_read = isinstance(pretrained, str)  # else it is a model, which the harness takes as it is
        name = pretrained if is_read else "the model"
        if add_bos_token is not False:
            check_prompts(self.tokenizer, name=name)
            if not (self._adapter and is_read):
                check_tokens(self.tokenizer("").input_ids, self.tokenizer, self.config, name=name)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], *args: Any, **options: Any
    ) -> list[tuple[float, bool]]:
        self._refuse_unknown(*(ids for _, before, after in requests for ids in (before, after)))
        # The last token is scored and not read. Windows of rolling loglikelihood come here too; they fit by their make.
        self._refuse_cutting(max((len(before) + len(after) - 1 for _, before, after in requests), default=0))
        return super()._loglikelihood_tokens(requests, *args, **options)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue the prompts as the harness does.

        Raises:
            ValueError: a prompt and its answer are longer than the model was trained on, and no `max_length` was given,
                or a prompt has a token that the model has no embedding for.
        """
        with self._counting(requests):  # before the first is generated: what comes later would be lost after hours
            self._refuse_cutting(max(map(self._generation_tokens, requests), default=0))
            if len(self._counted) > 1 and self.batch_size != 1:
                self._refuse_unknown([self.tokenizer.pad_token_id])
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score texts of any length as the harness does.

        Raises:
            ValueError: a text has a token that the model has no embedding for.
        """
        with self._counting(requests):
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    @contextmanager
    def _counting(self, requests: Sequence[Instance]) -> Iterator[None]:
        """Meanwhile the tokens of the texts are known, and those of the model."""
        # Arrays: lists of numbers would take ten times the memory of the text.
        self._counted = {text: array("i", self.tok_encode(text)) for text in {r.args[0] for r in requests}}
        try:
            self._refuse_unknown(*self._counted.values())
            yield
        finally:
            self._counted = {}

    def tok_encode(self, string: str, *args: Any, **options: Any) -> list[int]:
        """The tokens of a text, as the harness has them; it sorts prompts by them, which need no second encoding."""
        if string in self._counted and not args and not options:
            return list(self._counted[string])
        return super().tok_encode(string, *args, **options)

    def _generation_tokens(self, request: Instance) -> int:
        prompt, settings = request.args
        return len(self._counted[prompt]) + normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"]

    def _refuse_unknown(self, *texts: Sequence[int]) -> None:
        """Refuse token ids that the model has no embedding for; an adapter may have brought some."""
        for ids in texts:
            check_tokens(ids, self.tokenizer, self.model.config)

    def _refuse_cutting(self, tokens: int) -> None:
        """Refuse a request of so many tokens, those to generate included, that the harness would cut unasked."""
        if not self._max_length and tokens > self.max_length:
            raise ValueError(
                f"a request takes {tokens:,} tokens with its answer, more than the {self.max_length:,} that the model "
                f"was trained on (max_position_embeddings); give --model_args max_length={tokens} or more to measure "
                "what it does beyond."
            )


def run_harness(models: Sequence[str], arguments: Sequence[str]) -> None:
    """Run the harness's command line with this library's model in it, for one model after the other.

    Args:
        models: directories or hub ids of checkpoints with their tokenizers.
        arguments: any options of `lm-eval run`; they win over what is set here.

    Raises:
        ValueError: an option is unknown or wrong.
    """
    setup_logging()
    commands = [read_options(model, arguments) for model in models]
    with fail_fast_offline():
        for harness, options in commands:
            harness.execute(options)
