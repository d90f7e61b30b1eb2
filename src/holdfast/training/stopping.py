"""Runs that are told to end: a SIGTERM, which schedulers send before they kill, is answered by a checkpoint."""

from __future__ import annotations

import contextlib
import signal
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)

STATUS = 128 + signal.SIGTERM
"""Exit status of a run that was told to end, as shells report it."""


class TrainingStopped(SystemExit):
    """A SIGTERM ended `holdfast.training.train`, after a checkpoint of `step`. Uncaught, it ends the process."""

    def __init__(self, step: int) -> None:
        super().__init__(STATUS)
        self.step = step

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.step,)


class StopOnTermination(TrainerCallback):
    """After a SIGTERM: ends the step, has a checkpoint written, and stops; of several processes all at the same step.

    transformers' own (`enable_jit_checkpoint`) lets every process decide for itself, so that one waits in a step for
    another that is writing. Here they ask each other after every step: one number by gloo, which no device waits for.

    Signals arrive in the main thread; elsewhere, and where SIGTERM is ignored, this does nothing. A Trainer that has it
    ends `train` early, without an error. Call `close` afterwards, in a `finally`: transformers calls no callback when
    training ends by an exception.

    Attributes:
        has_stopped: whether it ended a run.
    """

    def __init__(self) -> None:
        self.has_stopped = False
        self._is_asked = False
        self._before: Any = None
        self._group: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()
        self.has_stopped = self._is_asked = False
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")
        # None: a handler that was not installed by Python, and cannot be put back.
        if signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, None):
            with contextlib.suppress(ValueError):  # not in the main thread
                self._before = signal.signal(signal.SIGTERM, self._ask)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._is_agreed() or state.global_step >= state.max_steps:
            return
        if state.is_world_process_zero:
            logger.warning(f"SIGTERM: stopping after step {state.global_step}, with a checkpoint.")
        control.should_save = control.should_training_stop = self.has_stopped = True
        control.should_evaluate = False  # there may be little time

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the signal back; safe to call twice."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None

    def pass_on(self) -> None:
        """Send a SIGTERM that came too late to stop the run, in its last step, to whoever has the signal now."""
        if self._is_asked and not self.has_stopped:
            self._is_asked = False
            signal.raise_signal(signal.SIGTERM)

    def _ask(self, signum: int, frame: Any) -> None:
        self._is_asked = True

    def _is_agreed(self) -> bool:
        """Whether any process has been told to end."""
        if self._group is None:
            return self._is_asked
        asked = torch.tensor(int(self._is_asked))
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group)
        return bool(asked.item())
