"""holdfast: language models whose memory does not grow, and which still remember.

`import holdfast` registers the models with transformers' Auto classes. The command line alone does without until it
needs a model: PyTorch and transformers take seconds to import, and a help text needs neither.
"""

from __future__ import annotations

import sys

from holdfast.process import end_on_interrupt, is_command_line

if is_command_line():
    end_on_interrupt()  # before anything else is imported

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or not is_command_line():
    from holdfast.cache import HybridCache
    from holdfast.configuration import HybridConfig
    from holdfast.modeling import HybridCausalLMOutput, HybridForCausalLM, HybridModel, RetentionOutput

__version__ = "0.1.0"

__all__ = [
    "HybridCache",
    "HybridCausalLMOutput",
    "HybridConfig",
    "HybridForCausalLM",
    "HybridModel",
    "RetentionOutput",
]


def __getattr__(name: str) -> Any:
    """What the command line has not imported yet."""
    if name not in __all__:
        raise AttributeError(f"module 'holdfast' has no attribute {name!r}")
    from holdfast import cache, configuration, modeling

    return next(vars(module)[name] for module in (configuration, cache, modeling) if name in vars(module))


def __dir__() -> list[str]:
    """The names for users and the submodules imported so far, without what is at work here."""
    submodules = {name for name in globals() if f"{__name__}.{name}" in sys.modules}
    return sorted({*__all__, *submodules, *(name for name in globals() if name.startswith("__"))})
