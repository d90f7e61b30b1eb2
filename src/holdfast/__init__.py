"""holdfast: language models whose memory does not grow, and which still remember."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from holdfast.cache import HybridCache
from holdfast.configuration import HybridConfig
from holdfast.modeling import HybridCausalLMOutput, HybridForCausalLM, HybridModel, RetentionOutput

__version__ = "0.1.0"

AutoConfig.register("holdfast", HybridConfig)
AutoModel.register(HybridConfig, HybridModel)
AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM)

__all__ = [
    "HybridCache",
    "HybridCausalLMOutput",
    "HybridConfig",
    "HybridForCausalLM",
    "HybridModel",
    "RetentionOutput",
]
