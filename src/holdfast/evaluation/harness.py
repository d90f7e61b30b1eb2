"""The models in EleutherAI's lm-evaluation-harness, as its model `holdfast`. Needs `pip install 'holdfast[eval]'`.

`holdfast evaluate lm-eval` runs the harness with this model in it. The harness's own command knows models of other
packages by entry points in the group `lm_eval.models`, as pyproject.toml declares this one, only in versions after
0.4.13, where `lm-eval run --model holdfast` works; with 0.4.13 and before it takes
`lm-eval run --model hf --model_args pretrained=DIR,trust_remote_code=True`, which gives the same answers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from lm_eval._cli import HarnessCLI
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import setup_logging

from holdfast.configuration import HybridConfig
from holdfast.modeling import HybridForCausalLM

__all__ = ["HoldfastLM", "run_harness"]


@register_model("holdfast")
class HoldfastLM(HFLM):
    """The harness's own transformers model, whose configuration may also be of the published format.

    All it does is inherited: loglikelihood, rolling loglikelihood and generate_until, in batches with pads. Pads behind
    a text change nothing in it, for what a scorer reads of the future is never older than the window.
    """

    AUTO_MODEL_CLASS = HybridForCausalLM

    def _get_config(self, pretrained: str, *, revision: str = "main", **_: Any) -> None:
        self._config = HybridConfig.from_pretrained(pretrained, revision=revision)


def run_harness(model: str, arguments: Sequence[str]) -> None:
    """Run the harness's command line with this library's model in it.

    Args:
        model: directory or hub id of a checkpoint with its tokenizer.
        arguments: any options of `lm-eval run`; they win over what is set here.

    Raises:
        SystemExit: as the harness ends, on a wrong option or after help.
    """
    setup_logging()
    before = sys.argv
    sys.argv = ["lm-eval", "run", "--model", "holdfast", "--model_args", f"pretrained={model}", *arguments]
    try:
        harness = HarnessCLI()
        harness.execute(harness.parse_args())
    finally:
        sys.argv = before
