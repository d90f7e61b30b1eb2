"""What a training run shows: a file of metrics, one JSON object a line, and a progress bar."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from holdfast.files import naming, write_text
from holdfast.training.trainer import HybridTrainer


class MetricsFile(TrainerCallback):
    """Appends what the Trainer logs to a file, with the kept pairs and λ of every layer and head.

    Each record has `step`, `seconds` (of training, resumed parts included) and the Trainer's own logs; where a loss was
    logged also the metrics of `RetentionCallback.drain`.

    At every checkpoint and after the last step there is a line too. Each line is one write, so a killed run leaves at
    most one broken line, the last. When a run resumes, lines past the step it resumes from are taken out, so that every
    step stands there once.

    Args:
        path: the file; made anew when a run starts from step 0.
        trainer: where the metrics per head come from.
    """

    def __init__(self, path: str | os.PathLike[str], trainer: HybridTrainer) -> None:
        self.path = Path(path)
        self.trainer = trainer
        self._started = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.monotonic()
        if state.is_world_process_zero:
            before = [line for line in read_metrics(self.path) if line["step"] <= state.global_step]
            before = before if state.global_step else []
            self._started -= before[-1]["seconds"] if before else 0
            write_text(self.path, "".join(map(_line, before)))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # What is logged are means since the last log, which a checkpoint does not hold: none may span one, or a resumed
        # run would log other numbers than one that was never interrupted.
        control.should_log |= control.should_save or state.global_step >= state.max_steps

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        # The Trainer's last words are means over what was trained since the run was resumed: no metrics of the run.
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        record: dict[str, Any] = {"step": state.global_step, "seconds": round(time.monotonic() - self._started, 3)}
        record |= logs
        if "loss" in logs:
            record |= self.trainer.last_metrics
        with naming(self.path), open(self.path, "ab", buffering=0) as file:
            file.write(_line(record).encode())


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that was cut short is left out. No file: no lines.

    Raises:
        ValueError: naming the file and the line, when a line that is not the last is not JSON.
    """
    path = Path(path)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not JSON: {error}.") from error
    return records


class _BarWithText(Progress):
    """A bar, and below it text that wraps where the terminal is narrow."""

    text = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.text)


class ProgressBar(TrainerCallback):
    """A bar on standard error with loss, speed, stored and kept pairs, and λ; without a terminal one line per log.

    `stored` is what a head's store holds on average, at most the budget; `kept` how many pairs it scores above the
    threshold, which is what λ steers.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar: _BarWithText | None = None
        self._task = TaskID(0)
        self._evaluated = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        if state.global_step:
            text = f"Continuing after step {state.global_step} of {state.max_steps}."
            self._console.print(text, highlight=False, soft_wrap=True)
        if not self._console.is_terminal:
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = _BarWithText(*columns, console=self._console)
        self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step)
        self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._evaluated += 1
            total = f"/{len(eval_dataloader)}" if has_length(eval_dataloader) else ""
            self._bar.text = f"evaluating: batch {self._evaluated}{total}"

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._evaluated = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or not logs.keys() & {"loss", "eval_loss"}:
            return
        text = "  ".join(show(logs[name]) for name, show in _SHOWN.items() if name in logs)
        if self._bar is not None:
            self._bar.text = text
        else:
            self._console.print(f"step {state.global_step}/{state.max_steps}  {text}", highlight=False, soft_wrap=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back; safe to call twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


_SHOWN: dict[str, Callable[[float], str]] = {
    "loss": "loss {:.4g}".format,
    "lm_loss": "lm_loss {:.4g}".format,
    "eval_loss": "eval_loss {:.4g}".format,
    "tokens_per_second": "{:,.0f} tokens/s".format,
    "utilisation": "utilisation {:.1%}".format,
    "stored_mean": "stored {:.4g}".format,
    "kept_mean": "kept {:.4g}".format,
    "lambda_mean": "λ {:.3g}".format,
}
"""How the bar shows what is logged, in this order."""


def _line(record: dict[str, Any]) -> str:
    finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in record.items()}
    return json.dumps(finite) + "\n"
