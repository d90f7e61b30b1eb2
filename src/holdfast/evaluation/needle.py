"""How well a model answers the needle task, by the distance between question and answer."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.ticker import ScalarFormatter
from torch import nn
from torch.nn import functional as F

from holdfast.data.needle import NeedleTask
from holdfast.data.progress import track
from holdfast.evaluation.arguments import check_kind, check_log, check_model
from holdfast.evaluation.inference import device_of, evaluating, perplexity
from holdfast.evaluation.intervals import Share, draw_shares, effective_count
from holdfast.evaluation.sample_log import SampleLog
from holdfast.pictures import picture

__all__ = ["DistanceBin", "NeedleResult", "Tally", "evaluate_needle", "plot_accuracy_by_distance"]


@dataclasses.dataclass(frozen=True)
class Tally(Share):
    """What is counted over a set of answers; an answer is right where its token had the highest logit.

    Attributes:
        nll: sum of the negative log-likelihoods of the answers, in nats.
    """

    nll: float

    @property
    def perplexity(self) -> float | None:
        """exp of the mean negative log-likelihood; a uniform guess among the values gives `num_values`."""
        return perplexity(self.nll / self.count) if self.count else None

    def to_dict(self) -> dict[str, Any]:
        """Counts and what follows from them, ready for JSON."""
        return super().to_dict() | {"nll": self.nll, "perplexity": self.perplexity}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Tally":
        """Inverse of `to_dict`."""
        effective = data.get("effective")
        return cls(count=data["count"], correct=data["correct"], nll=data["nll"], effective=effective)


@dataclasses.dataclass(frozen=True)
class DistanceBin:
    """Answers at distances `low` to `high`, both included."""

    low: int
    high: int
    tally: Tally


@dataclasses.dataclass(frozen=True)
class NeedleResult:
    """Result of `evaluate_needle`.

    Attributes:
        task: the task, window included.
        samples: how many samples were drawn.
        seed: the seed that they were drawn with.
        total: all answers.
        within: answers at a distance of at most the window.
        beyond: answers farther away.
        bins: answers by distance, in rising order; an edge lies at the window. Only bins that answers can fall in.
    """

    task: NeedleTask
    samples: int
    seed: int
    total: Tally
    within: Tally
    beyond: Tally
    bins: tuple[DistanceBin, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists, ready for JSON."""
        return {
            "task": dataclasses.asdict(self.task),
            "samples": self.samples,
            "seed": self.seed,
            "total": self.total.to_dict(),
            "within": self.within.to_dict(),
            "beyond": self.beyond.to_dict(),
            "bins": [{"low": part.low, "high": part.high, **part.tally.to_dict()} for part in self.bins],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "NeedleResult":
        """Inverse of `to_dict`."""
        return cls(
            task=NeedleTask(**data["task"]),
            samples=data["samples"],
            seed=data["seed"],
            total=Tally.from_dict(data["total"]),
            within=Tally.from_dict(data["within"]),
            beyond=Tally.from_dict(data["beyond"]),
            bins=tuple(DistanceBin(part["low"], part["high"], Tally.from_dict(part)) for part in data["bins"]),
        )


def evaluate_needle(
    model: nn.Module,
    task: NeedleTask,
    *,
    samples: int = 512,
    batch_size: int = 64,
    seed: int = 0,
    log: SampleLog | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> NeedleResult:
    """Ask a model the questions of freshly drawn samples, with the earlier answers given (teacher forcing).

    The samples depend on `seed` and `task` only, not on `batch_size`. The model is read in eval mode without gradients,
    and put back in the mode that it came in.

    Args:
        model: called as `model(input_ids=…, use_cache=False)`, int64 [B, length]; its `.logits` are [B, length, V] with
            V at least the task's `vocab_size`. It stays where it is.
        task: the task; `dataclasses.replace(task, length=…)` asks at another length.
        samples: samples to draw, at least 1.
        batch_size: samples per call, at least 1.
        seed: seed of the samples; take one that training did not see.
        log: where the answers to each sample are kept and, after an interruption, found again; None keeps none. Records
            are named by the place of the sample; the model, the task (but for its window) and the seed are for the log
            to tell apart.
        device: where the inputs go; None is the device of the model's first parameter, or the CPU.
        progress: show a progress bar when standard error is a terminal.

    Raises:
        TypeError: an argument is no model, no task or no log.
        ValueError: `samples` or `batch_size` is below 1, or the model's vocabulary is smaller than the task's.
    """
    if samples < 1 or batch_size < 1:
        raise ValueError(f"samples is {samples} and batch_size is {batch_size}; give at least 1 for both.")
    check_model(model)
    check_kind("task", task, NeedleTask, "a NeedleTask")
    check_log(log)
    device = device_of(model) if device is None else torch.device(device)
    log = SampleLog(None, {}) if log is None else log
    generator = np.random.default_rng(seed)
    with evaluating(model):
        for start in track(range(0, samples, batch_size), "needle", progress=progress):
            batch = task.sample(generator, min(batch_size, samples - start))  # drawn in any case: later ones follow
            waiting = [row for row in range(len(batch["input_ids"])) if str(start + row) not in log.records]
            if waiting:
                answered = _answer(model, task, {name: rows[waiting] for name, rows in batch.items()}, device)
                log.append({str(start + row): record for row, record in zip(waiting, answered, strict=True)})
    return _result(task, [log.records[str(index)] for index in range(samples)], seed)


def plot_accuracy_by_distance(results: Mapping[str, NeedleResult], path: str | Path) -> Path:
    """Draw accuracy by distance, one line per result with its 95 % interval, and the window of each task.

    Args:
        results: results by the name to print in the legend.
        path: file to write; its ending gives the format (png, svg, pdf). Replaced only when the picture is complete.

    Returns:
        The path written.

    Raises:
        ValueError: `results` is empty.
    """
    if not results:
        raise ValueError("results is empty; give at least one result to plot.")
    with picture(path, (7, 4)) as figure:
        axes = figure.add_subplot()
        for name, result in results.items():
            asked = [part for part in result.bins if part.tally.count]
            middle = [(part.low + part.high) / 2 for part in asked]
            draw_shares(axes, middle, [part.tally for part in asked], name)
        for window in sorted({result.task.window for result in results.values()}):
            axes.axvline(window + 0.5, color="0.4", linestyle="--", linewidth=1, label=f"window {window}")
        for chance in sorted({1 / result.task.num_values for result in results.values()}):
            axes.axhline(chance, color="0.7", linestyle=":", linewidth=1, label=f"guess {chance:.3f}")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("distance between question and answer (tokens)")
        axes.set_ylabel("accuracy")
        axes.legend(fontsize="small")
    return Path(path)


def _result(task: NeedleTask, records: Sequence[Mapping[str, Any]], seed: int) -> NeedleResult:
    distance, correct, nll = (
        np.concatenate([np.asarray(record[name], dtype=np.float64) for record in records])
        for name in ("distance", "correct", "nll")
    )
    sample = np.arange(len(records)).repeat(task.answers)

    def tally(selected: np.ndarray) -> Tally:
        effective = effective_count(sample[selected], correct[selected])
        return Tally(int(selected.sum()), int(correct[selected].sum()), float(nll[selected].sum()), effective=effective)

    edges = _distance_edges(task)
    return NeedleResult(
        task=task,
        samples=len(records),
        seed=seed,
        total=tally(distance > 0),
        within=tally(distance <= task.window),
        beyond=tally(distance > task.window),
        bins=tuple(
            DistanceBin(low + 1, high, tally((low < distance) & (distance <= high)))
            for low, high in itertools.pairwise(edges)
        ),
    )


def _answer(
    model: nn.Module, task: NeedleTask, batch: dict[str, torch.Tensor], device: torch.device
) -> list[dict[str, Any]]:
    """A record for each sample: distance, correctness and negative log-likelihood of its answers."""
    logits = model(input_ids=batch["input_ids"].to(device), use_cache=False).logits
    if logits.shape[-1] < task.vocab_size:
        raise ValueError(
            f"the model has {logits.shape[-1]} token ids, the task {task.vocab_size}; give a larger model."
        )
    row, position = batch["distance"].nonzero(as_tuple=True)
    # The logits before an answer predict it.
    predicted = logits[row.to(device), position.to(device) - 1].float()
    answer = batch["labels"][row, position].to(device)
    nll = F.cross_entropy(predicted, answer, reduction="none")
    correct = predicted.argmax(-1) == answer
    found = {"distance": batch["distance"][row, position], "correct": correct, "nll": nll.double()}
    by_sample = {name: values.view(-1, task.answers).tolist() for name, values in found.items()}
    return [dict(zip(by_sample, values, strict=True)) for values in zip(*by_sample.values(), strict=True)]


def _distance_edges(task: NeedleTask) -> list[int]:
    """0, then w/2, w, 3w/2, 2w, 3w, 4w, 6w, … (two bins per doubling) up to the longest distance there can be."""
    longest = task.length - 4  # from the value behind bos to the last question
    edges, step = {0, longest}, max(task.window, 2)
    edges |= {task.window, step // 2}
    while step < longest:
        edges |= {step, step + step // 2}
        step *= 2
    return sorted(edge for edge in edges if edge <= longest)
