"""What may be chosen in the benchmarks; light to import, for the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

if TYPE_CHECKING:
    import torch

__all__ = [
    "BenchSettings",
    "ControllerStudySettings",
    "DataSettings",
    "DecodeSettings",
    "ModelSettings",
    "OpsSettings",
    "PrefillSettings",
    "TrainSettings",
]

RESULTS = Path("benchmarks/results")
"""Where results go whose `--output` is a mere name."""

PASSES = {"forward": False, "forward + backward": True}
"""What ops are timed of, by name: whether with gradients."""
WARM_UP_TOKENS = 64
"""Tokens of the call before memory is measured."""

SizeName = Literal["tiny", "30m", "43m", "0.4b", "1.4b"]


@dataclass(frozen=True)
class BenchSettings:
    """What every benchmark lets one choose."""

    repeats: int = 5
    """Turns of every variant, after one to warm up."""
    limit: float = 60.0
    """Seconds after which a variant takes no further turn."""
    peers: bool = True
    """Measure other implementations in the same run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 on CUDA, float32 elsewhere."""
    threads: int | None = None
    """Of PyTorch on the CPU; left out: as many as PyTorch takes (OMP_NUM_THREADS)."""
    seed: int = 0
    """Of the random inputs and weights."""
    quick: bool = False
    """Tiny sizes and few repeats, whatever else is given: to see that everything runs."""
    output: str | None = None
    """Write all numbers, every sample included: to this .json file, or as a mere name into benchmarks/results."""
    plot: Path | None = None
    """Draw them into this file (png, svg or pdf)."""

    def __post_init__(self) -> None:
        require_at_least(1, repeats=self.repeats, threads=self.threads)
        require_at_least(0, seed=self.seed)
        if not self.limit > 0:
            raise ValueError(f"limit must be above 0 seconds, got {self.limit}.")
        if self.output == "" or (self.output is not None and Path(self.output).is_dir()):
            raise ValueError(f"output is {self.output!r}; give a name, or a path that ends in .json.")

    @property
    def output_path(self) -> Path | None:
        """Where the numbers go."""
        if self.output is None:
            return None
        path = Path(self.output)
        if path.suffix == ".json":
            return path
        return RESULTS / f"{self.output}.json" if path.name == self.output else path.with_name(f"{path.name}.json")

    def resolve(self) -> tuple[torch.device, torch.dtype]:
        """The device and the dtype to measure with; sets the threads and the seed of PyTorch.

        Raises:
            ValueError: if CUDA is asked for and there is none.
        """
        import torch

        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("there is no CUDA device here; give --device cpu.")
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        torch.manual_seed(self.seed)
        on_cuda = self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())
        automatic = "bfloat16" if on_cuda else "float32"
        name = automatic if self.dtype == "auto" else self.dtype
        return torch.device("cuda" if on_cuda else "cpu"), getattr(torch, name)

    def to_dict(self) -> dict[str, Any]:
        """What the numbers depend on, as plain values, ready for JSON."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in ("output", "plot")}

    _QUICK: ClassVar[Mapping[str, Any]] = {}
    """What a quick run changes."""

    def effective(self) -> Self:
        """These settings, or the tiny ones of a quick run."""
        return dataclasses.replace(self, **self._QUICK) if self.quick else self


@dataclass(frozen=True)
class OpsSettings(BenchSettings):
    """Attention, scorer, eviction and the gated delta rule alone: time and peak memory, forward and backward."""

    only: tuple[Literal["attention", "sparse", "step", "scorer", "retention", "delta"], ...] = (
        "attention",
        "sparse",
        "step",
        "scorer",
        "retention",
        "delta",
    )
    """What to measure; sparse: native sparse attention; step: attention of one decoded token; scorer: the network
    that decides what is kept."""
    tokens: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    """Lengths of the sequences that attention, sparse attention and the scorer read."""
    batch_size: int = 1
    heads: int = 8
    kv_heads: int | None = None
    """Key/value heads; left out: as many as heads."""
    head_dim: int = 64
    window: int = 768
    kept: int = 512
    """Keys kept per head outside the window."""
    group_size: int = 8
    """Of sparse attention: query heads per key/value head, also of the full attention beside it (published: 16)."""
    block_size: int = 64
    """Of sparse attention: tokens of a block."""
    num_blocks: int = 16
    """Of sparse attention: blocks that a query reads in full."""
    sparse_window: int = 512
    """Of sparse attention: counts the token itself."""
    step_batches: tuple[int, ...] = (1, 64)
    """Of a decoding step: rows."""
    retention_tokens: int = 131072
    """Length of the sequence whose scores the eviction reads."""
    delta_shapes: tuple[tuple[int, int, int, int], ...] = ((8, 512, 4, 64), (1, 4096, 4, 64))
    """Batch, tokens, heads and head dimension of the gated delta rule."""
    memory: bool = True
    """Measure peak memory too, each in a new process."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, tokens=self.tokens, batch_size=self.batch_size, heads=self.heads, kv_heads=self.kv_heads)
        require_at_least(1, head_dim=self.head_dim, window=self.window, kept=self.kept)
        require_at_least(1, block_size=self.block_size, num_blocks=self.num_blocks, sparse_window=self.sparse_window)
        require_at_least(1, group_size=self.group_size, retention_tokens=self.retention_tokens)
        require_at_least(1, step_batches=self.step_batches)
        for shape in self.delta_shapes:
            require_at_least(1, delta_shapes=shape)
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads}).")
        if "sparse" in self.only and self.heads % self.group_size:
            raise ValueError(f"heads ({self.heads}) must be a multiple of group_size ({self.group_size}).")

    _QUICK: ClassVar[Mapping[str, Any]] = {
        "repeats": 2,
        "tokens": (128, 256),
        "heads": 2,
        "kv_heads": None,
        "head_dim": 16,
        "window": 32,
        "kept": 16,
        "group_size": 2,
        "block_size": 8,
        "num_blocks": 4,
        "sparse_window": 16,
        "step_batches": (1, 3),
        "retention_tokens": 1024,
        "delta_shapes": ((2, 96, 2, 16),),
        "memory": False,
    }


@dataclass(frozen=True)
class ModelSettings(BenchSettings):
    """What the benchmarks of whole models let one choose besides."""

    size: SizeName = "43m"
    """Of the model; others are made as large. 30m: 8 layers, hidden size 512; 43m: 12 layers, laLTE then has 46 M."""
    mixers: tuple[str, ...] = ("gated_deltanet", "learned_eviction")
    """The token mixer of each layer; a short list repeats."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.mixers:
            raise ValueError("mixers is empty; name at least one.")


@dataclass(frozen=True)
class PrefillSettings(ModelSettings):
    """Seconds until a prompt has been read, by its length."""

    tokens: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    """Lengths of the prompts."""
    chunk: int = 2048
    """Tokens that this library's model reads in one call."""
    peer_chunk: int | None = None
    """The same for other models; left out: the whole prompt, which is fastest for them."""
    repeats: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, tokens=self.tokens, chunk=self.chunk, peer_chunk=self.peer_chunk)

    _QUICK: ClassVar[Mapping[str, Any]] = {"size": "tiny", "repeats": 2, "tokens": (48, 96), "chunk": 32}


@dataclass(frozen=True)
class DecodeSettings(ModelSettings):
    """Seconds per generated token, by the tokens that have been read before."""

    contexts: tuple[int, ...] = (2048, 8192, 32768, 65536)
    """Tokens read before the first step that is timed."""
    steps: int = 500
    """Steps of every model and context, in turns of 20."""
    batch_size: int = 1
    compiled: bool = False
    """Measure this library's step also as torch.compile makes it in the mode reduce-overhead: one CUDA graph, on a
    GPU."""
    repeats: int = 5
    """Not used: --steps says how many."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, contexts=self.contexts, steps=self.steps, batch_size=self.batch_size)

    _QUICK: ClassVar[Mapping[str, Any]] = {"size": "tiny", "contexts": (48, 96), "steps": 40, "batch_size": 2}


@dataclass(frozen=True)
class TrainSettings(ModelSettings):
    """Tokens per second of training: forward, backward and a step of AdamW."""

    batch_size: int = 2
    tokens: int = 2048
    """Length of each sequence."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, batch_size=self.batch_size, tokens=self.tokens)

    _QUICK: ClassVar[Mapping[str, Any]] = {"size": "tiny", "repeats": 2, "tokens": 96}


@dataclass(frozen=True)
class DataSettings:
    """Tokens per second of the stream of text, and memory over a pass."""

    source: str | None = None
    """Text, as a recipe names it; left out: made-up documents of 5 to 30 words."""
    documents: int = 1_000_000
    """How many to make up."""
    tokenizers: tuple[str, ...] = ("byte", "bpe")
    """"bpe": trained here, 4,096 tokens; else as a recipe names them."""
    workers: tuple[int, ...] = (0, 1, 2)
    """Processes that read and tokenize."""
    length: int = 512
    """Tokens per block."""
    shuffle: int = 1024
    """Blocks that are shuffled among each other."""
    seconds: float = 10.0
    """For which each rate is measured."""
    memory: bool = True
    """Follow memory over a whole pass too, with the last of the tokenizers."""
    seed: int = 0
    """Of the made-up documents."""
    output: Path | None = None
    """Write all numbers to this .json file."""

    def __post_init__(self) -> None:
        require_at_least(1, documents=self.documents, shuffle=self.shuffle)
        require_at_least(2, length=self.length)
        require_at_least(0, workers=self.workers, seed=self.seed)
        if not self.tokenizers:
            raise ValueError("tokenizers is empty; name at least one.")
        if not self.seconds > 0:
            raise ValueError(f"seconds must be above 0, got {self.seconds}.")


@dataclass(frozen=True)
class ControllerStudySettings:
    """The budget controller's interval and tolerance, on heads that a formula simulates. Nothing is timed."""

    intervals: tuple[int, ...] = (4, 8, 16, 32, 64, 128)
    """Steps between updates of λ."""
    tolerances: tuple[tuple[float, float], ...] = ((0.95, 1.0), (0.8, 1.2))
    """(lo, hi) of the published rule, as shares of the budget."""
    factors: tuple[tuple[float, float], ...] = ((1.5, 2.0), (1.3, 1.3))
    """By which λ is multiplied, and divided; of the proportional rule, the first of each pair."""
    dampings: tuple[float | None, ...] = (None, 0.0, 4.0)
    """None: the published rule. A number: λ in proportion to the distance from the budget, damped so much."""
    time_constants: tuple[float, ...] = (20.0, 100.0, 500.0)
    """Steps in which a head comes to what λ leaves it, but for a third."""
    paces: tuple[float, ...] = (0.03, 0.1)
    """Of heads that move as fast whatever the size of λ, as Adam moves a scorer: log-odds per step."""
    heads: int = 16
    """Simulated for each time constant and pace; their medians are shown."""
    steps: int = 8000
    budget: int = 64
    positions: int = 506
    """Pairs that a head could keep."""
    valued: float = 3e-3
    """λ at which a head would keep half of them, at first."""
    walk: float = 0.35
    """Standard deviation of the logarithm of that after 1,000 steps."""
    noise: float = 0.1
    """Relative standard deviation of a step's count."""
    shared_noise: float = 0.1
    """The same of what a batch does to all heads' counts."""
    seed: int = 0
    output: Path | None = None
    """Write all numbers to this .json file."""
    plot: Path | None = None
    """Draw them into this file (png, svg or pdf)."""

    def __post_init__(self) -> None:
        require_at_least(1, intervals=self.intervals, heads=self.heads, steps=self.steps, budget=self.budget)
        require_at_least(self.budget, positions=self.positions)
        if not (self.tolerances and self.factors and self.dampings):
            raise ValueError("give a tolerance, a pair of factors, and a damping (None: the published rule).")
        if (
            not (*self.time_constants, *self.paces)
            or min((1.0, *self.time_constants)) < 1
            or min((1.0, *self.paces)) <= 0
        ):
            raise ValueError("give time constants of 1 step or more, or paces above 0.")


def require_at_least(least: int, **values: int | tuple[int, ...] | None) -> None:
    """Raise ValueError naming the first value, or the first in a tuple, that is below `least` or missing."""
    for name, value in values.items():
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        if value == ():
            raise ValueError(f"{name} is empty; give at least one number.")
        if low := [number for number in numbers if number < least]:
            raise ValueError(f"{name} must be at least {least}, got {low[0]}.")
