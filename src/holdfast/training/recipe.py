"""Recipes: everything that determines a training run, in one small TOML file.

The sections are dataclasses, so a command line can override any key (`--training.max-steps 1000`) by

    tyro.cli(Recipe, default=load_recipe(name), args=overrides)

A recipe may name another as its `base`; its own keys are laid over that one's.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from holdfast.configuration import HybridConfig
from holdfast.data.needle import NeedleTask
from holdfast.settings import SettingsError, from_mapping, suggest
from holdfast.training.controller import ControllerConfig
from holdfast.training.schedule import RetentionSchedule


@dataclass(frozen=True)
class NeedleData:
    """Generated key-value recall; see `holdfast.data.needle.NeedleTask`."""

    kind: Literal["needle"] = "needle"
    task: NeedleTask = field(default_factory=NeedleTask)
    """The task at its full difficulty."""
    curriculum: tuple[tuple[int, int, int], ...] = ()
    """Stages (first optimizer step, pairs, length), the first from step 0; none: full difficulty throughout."""
    eval_samples: int = 256
    """Held-out samples for the evaluations during training."""


@dataclass(frozen=True)
class TextData:
    """Text packed into blocks; see `holdfast.data.text`."""

    source: str
    """A local file, a directory of files that are named after their split, the name of a data set on the hub (which is
    streamed), or a directory that `holdfast prepare` wrote, which brings its own tokenizer."""
    kind: Literal["text"] = "text"
    config: str | None = None
    """Configuration of a data set on the hub, such as sample-100BT. It goes with its source: another source, on the
    command line or in a recipe with a base, has none unless it is named too."""
    split: str = "train"
    validation_split: str | None = None
    """Split for evaluations during training; None: none are made."""
    validation_tokens: int | None = 131_072
    """Read the first blocks of that split with so many tokens, so that an evaluation stays short; None: all."""
    column: str = "text"
    tokenizer: str = "byte"
    """"byte", "train" (a byte-level BPE of model.vocab_size, learned from the text), a directory, or a hub name."""
    length: int = 512
    """Tokens per block."""
    max_tokens: int | None = None
    """Read the first blocks with so many tokens and no more, cutting a longer document; None: all."""
    isolate: bool = False
    """Whether documents packed into one block are kept from seeing each other."""
    in_memory: int = 64
    """Local files of up to so many MiB together are tokenized at the start and shuffled whole; others are streamed."""
    shuffle: int = 4096
    """Blocks of a stream that are shuffled among each other, and held in memory for it."""
    lanes: int = 16
    """Parts in which a stream is read; a multiple of the number of devices. The most workers that can be busy."""

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("source is empty: give a file, a directory or the name of a data set.")
        if self.length < 2:
            raise ValueError(f"length must be at least 2 tokens, got {self.length}.")
        least = {"in_memory": 0, "shuffle": 0, "lanes": 1, "max_tokens": 1, "validation_tokens": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ValueError(f"{name} must be {lowest} or more, got {value}.")


@dataclass(frozen=True)
class TrainingSection:
    """Optimizer and schedule: AdamW, linear warm-up, cosine down to `final_lr_share`.

    Raises:
        ValueError: naming the setting, when one is out of range.
    """

    max_steps: int
    """Optimizer steps."""
    batch_size: int = 32
    """Sequences per micro-batch: what one device computes at once."""
    accumulation: int = 1
    """Micro-batches per optimizer step, shared by all devices: on n devices each takes 1/n of them, so that a recipe
    trains the same model on any number of devices that divides this."""
    learning_rate: float = 3e-4
    scorer_lr_scale: float = 1.0
    """Factor on the learning rate of the scorers of learned eviction."""
    scorer_weight_decay: float | None = None
    """On all parameters of the scorers; left out: like the rest. Keeps their sigmoids from saturating."""
    warmup_steps: int = 0
    final_lr_share: float = 0.1
    """Learning rate of the last step over the highest."""
    scorer_final_lr_share: float | None = None
    """The same for the scorers; left out: like the rest. λ holds heads to their budget only as long as the scorers
    learn as fast as the keys and values that they read drift."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    """On matrices only."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 switches clipping off."""
    seed: int = 0
    """Of the initial weights, the data and dropout."""
    bf16: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    """Whether torch.compile takes the model."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several processes (started by torchrun or `accelerate launch`) share the model: each holds all of it, or
    weights, gradients and optimizer are sharded (FSDP2)."""
    log_every: int = 10
    """Steps between lines of metrics."""
    save_every: int = 500
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints kept; older ones are removed."""
    eval_every: int = 0
    """Steps between evaluations; 0: none."""
    workers: int = 0
    """Processes that prepare batches; 0: the training process itself."""
    report_to: tuple[str, ...] = ()
    """Where logs go besides metrics.jsonl, as in transformers: tensorboard, wandb, trackio, …"""
    peak_flops: float | None = None
    """Operations per second that a device could make, for the utilisation; left out: measured when training begins."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "accumulation", "log_every", "save_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("warmup_steps", "weight_decay", "clip", "eval_every", "workers", "scorer_lr_scale", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}.")
        if self.seed >= 2**32:
            raise ValueError(f"seed must be below 2^32, got {self.seed}.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}.")
        if self.warmup_steps > self.max_steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}, but there are only {self.max_steps} steps (max_steps), so the "
                "learning rate would never be reached: add --training.warmup-steps with fewer, such as "
                f"{max(1, self.max_steps // 20)}."
            )
        if self.scorer_weight_decay is not None and not 0 <= self.scorer_weight_decay < math.inf:
            raise ValueError(f"scorer_weight_decay must be 0 or more, got {self.scorer_weight_decay}.")
        if self.peak_flops is not None and not 0 < self.peak_flops < math.inf:
            raise ValueError(f"peak_flops must be above 0, got {self.peak_flops}.")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}.")
        for name in ("final_lr_share", "scorer_final_lr_share"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {share}.")
        if self.parallel not in ("ddp", "fsdp"):
            raise ValueError(f"parallel must be 'ddp' or 'fsdp', got {self.parallel!r}.")


@dataclass(frozen=True)
class OutputSection:
    """Where a run is written: `directory`/NAME."""

    directory: str = "runs"
    overwrite: bool = False
    """Whether to start over in a directory that already holds something."""


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a training run.

    Raises:
        ValueError: if the name is none for a directory.
    """

    name: str
    """Names the run directory."""
    model: dict[str, Any]
    """Keyword arguments of `holdfast.HybridConfig`; `mixers` may be a pattern that repeats."""
    training: TrainingSection
    data: Annotated[NeedleData | TextData, tyro.conf.AvoidSubcommands]
    description: str = ""
    controller: ControllerConfig = field(default_factory=ControllerConfig)
    retention: RetentionSchedule = field(default_factory=RetentionSchedule)
    output: OutputSection = field(default_factory=OutputSection)

    def __post_init__(self) -> None:
        if self.name in ("", ".", "..") or set(self.name) & {"/", "\\", "\0"}:
            raise ValueError(
                f"name must be that of a directory inside output.directory, without separators, got {self.name!r}."
            )

    def build_config(self) -> HybridConfig:
        """The model's configuration.

        Raises:
            ValueError: naming the key that `HybridConfig` does not know, or the value that it refuses.
        """
        known = {entry.name for entry in dataclasses.fields(HybridConfig) if entry.init} - {"controller"}
        for key in self.model:
            if key not in known:
                raise ValueError(f"unknown key 'model.{key}'{suggest(key, known)}.")
        try:
            config = HybridConfig(**self.model)
        except (TypeError, ValueError) as error:
            raise ValueError(f"[model] {error}") from error
        if "learned_eviction" in (config.mixers or ()):
            config.controller = json.loads(json.dumps(dataclasses.asdict(self.controller)))
        return config


def load_recipe(path_or_name: str | Path) -> Recipe:
    """Read and check a recipe.

    Args:
        path_or_name: path of a TOML file, or the name of a recipe that comes with the package.

    Raises:
        FileNotFoundError: if there is no such recipe; the message lists those that come with the package.
        SettingsError: naming the file and the key that is unknown, missing or wrong.
    """
    values, source = _read(path_or_name, seen=())
    values.setdefault("name", Path(source).stem)
    recipe = from_mapping(Recipe, values, source)
    try:
        recipe.build_config()
    except ValueError as error:
        raise SettingsError(f"{source}: {error}") from error
    return recipe


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package, sorted."""
    folder = resources.files("holdfast") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def _read(path_or_name: str | Path, seen: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    text, source = _find(path_or_name)
    if source in seen:
        raise SettingsError(f"{source}: `base` leads back to this recipe.")
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{source}: not valid TOML: {error}.") from error
    base = values.pop("base", None)
    if base is None:
        return values, source
    if not isinstance(base, str):
        raise SettingsError(f"{source}: base must be the name or path of a recipe, got {base!r}.")
    beside = Path(source).parent / base
    inherited, _ = _read(beside if beside.is_file() else base, (*seen, source))
    inherited.pop("name", None)
    return _overlay(inherited, values), source


def _find(path_or_name: str | Path) -> tuple[str, str]:
    path = Path(path_or_name)
    if path.suffix == ".toml" or path.is_file():
        if not path.is_file():
            raise FileNotFoundError(f"There is no recipe file {path}.")
        return path.read_text(encoding="utf-8"), str(path)
    if str(path_or_name) not in list_recipes():
        raise FileNotFoundError(
            f"There is no recipe {str(path_or_name)!r}{suggest(str(path_or_name), list_recipes())}."
        )
    entry = resources.files("holdfast") / "recipes" / f"{path_or_name}.toml"
    return entry.read_text(encoding="utf-8"), str(entry)


def _overlay(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` over `base`, table by table; a table of another `kind` replaces the base's, as do options of mixers.

    Nor is the `config` of one `source` that of another.
    """
    if "kind" in changes and changes["kind"] != base.get("kind"):
        return dict(changes)
    merged = dict(base)
    if changes.get("source", base.get("source")) != base.get("source"):
        merged.pop("config", None)
    for key, value in changes.items():
        inherited = merged.get(key)
        both_tables = isinstance(inherited, Mapping) and isinstance(value, Mapping)
        merged[key] = _overlay(inherited, value) if both_tables else value  # type: ignore[arg-type]
    if "mixers" in changes and "mixer_options" in merged:
        options: Mapping[str, Any] = merged["mixer_options"]
        merged["mixer_options"] = {mixer: options[mixer] for mixer in options if mixer in changes["mixers"]}
    return merged
