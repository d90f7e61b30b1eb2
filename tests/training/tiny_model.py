"""A model and a task so small that a training step takes milliseconds."""

from holdfast.data.needle import NeedleTask

TASK = NeedleTask(length=32, num_pairs=3, num_keys=5, num_values=5, num_noise=4, window=8)
MODEL = {
    "vocab_size": TASK.vocab_size,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "initializer_range": 0.1,
    "mixers": ["gated_deltanet", "learned_eviction"],
    "mixer_options": {
        "gated_deltanet": {"num_heads": 2, "head_dim": 8},
        "learned_eviction": {"num_heads": 2, "head_dim": 8, "window": 8, "budget": 4, "sinks": 1, "dropout": 0.2},
    },
}
