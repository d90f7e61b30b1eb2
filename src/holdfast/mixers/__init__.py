"""Token mixers: the layers that move information between tokens, by name.

A new mixer is one file and one line here.
"""

from holdfast.mixers.base import MixerOptions, MixerOutput, TokenMixer
from holdfast.mixers.gated_deltanet import GatedDeltaNet
from holdfast.mixers.layout import TokenLayout
from holdfast.mixers.learned_eviction import LearnedEviction, LearnedEvictionOptions
from holdfast.mixers.native_sparse_attention import NativeSparseAttention
from holdfast.mixers.penalty import RetentionPenalty
from holdfast.mixers.softmax_attention import FullAttention, SlidingAttention
from holdfast.mixers.state import MixerState

MIXERS: dict[str, type[TokenMixer]] = {
    "gated_deltanet": GatedDeltaNet,
    "full_attention": FullAttention,
    "sliding_attention": SlidingAttention,
    "learned_eviction": LearnedEviction,
    "native_sparse_attention": NativeSparseAttention,
}

__all__ = [
    "MIXERS",
    "FullAttention",
    "GatedDeltaNet",
    "LearnedEviction",
    "LearnedEvictionOptions",
    "MixerOptions",
    "MixerOutput",
    "MixerState",
    "NativeSparseAttention",
    "RetentionPenalty",
    "SlidingAttention",
    "TokenLayout",
    "TokenMixer",
]
