"""Checkpoints that are whole or not there: written aside, renamed when complete, and read with errors that say which.

A run directory holds `checkpoint-N` for every kept step N. What is being written, or about to be removed, lies in its
directory `.incomplete`, which neither this library nor the Trainer ever resumes from.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from transformers.trainer_callback import TrainerState
from transformers.utils import logging

from holdfast.files import NO_ROOM, publish_directory

logger = logging.get_logger(__name__)

INCOMPLETE = ".incomplete"
STATE_FILE = "trainer_state.json"
# What the file system, torch and safetensors raise where a file cannot be written. CheckpointException, of sharded
# checkpoints, is no Exception.
_WRITE_FAILURES = (OSError, RuntimeError, SafetensorError, CheckpointException)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which, why, and what to do."""


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run directory, oldest step first."""
    found = [path for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which the checkpoint was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def saved_step(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint of any name says it was written after.

    Raises:
        CheckpointError: if it cannot be read.
    """
    with explaining_reads(str(checkpoint), "training state"):
        return TrainerState.load_from_json(str(checkpoint / STATE_FILE)).global_step


def last_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint that can be resumed from; None, with a warning, where there is none.

    One whose state file is missing or broken was damaged, or written by a program that does not write aside: it is left
    out with a warning.

    Raises:
        CheckpointError: if there are checkpoints, and none can be resumed from: what they hold is not to be lost.
    """
    found = checkpoints(run)
    for checkpoint in reversed(found):
        try:
            TrainerState.load_from_json(str(checkpoint / STATE_FILE))  # the Trainer writes it last
        except (OSError, ValueError, TypeError):
            logger.warning(f"{checkpoint} is incomplete: an earlier checkpoint is used.")
        else:
            return checkpoint
    if found:
        raise CheckpointError(
            f"No checkpoint of {run} can be resumed from: {found[-1] / STATE_FILE} is missing or damaged. Remove the "
            "checkpoints to train from the beginning."
        )
    logger.warning(f"{run} has no checkpoint yet: training starts from the beginning.")
    return None


def check_complete(checkpoint: Path) -> None:
    """See to it that nothing is missing that the Trainer would go on without, in silence.

    Raises:
        CheckpointError: if the state of the optimizer, of the schedule or of the random numbers is not there.
    """
    for what, pattern in (("optimizer", "optimizer*"), ("schedule", "scheduler.pt"), ("random", "rng_state*.pth")):
        if not any(checkpoint.glob(pattern)):
            raise CheckpointError(
                f"{checkpoint} holds no {what} state ({pattern}): resume from another checkpoint; of the weights alone "
                "training cannot go on as it was."
            )


def discard_incomplete(run: Path) -> None:
    """Remove what a run that was killed left half written or half removed, and say so."""
    leftovers = run / INCOMPLETE
    if leftovers.exists():
        names = ", ".join(sorted(path.name for path in leftovers.iterdir()))
        shutil.rmtree(leftovers, ignore_errors=True)
        if names:
            logger.warning(f"{run}: removed what an interrupted run left incomplete ({names}).")


def publish(staged: Path, run: Path, keep: int | None, protected: str | None) -> None:
    """Give a complete checkpoint its name, and remove the oldest ones beyond `keep`.

    Args:
        staged: the complete checkpoint, in `run`/.incomplete.
        run: the run directory.
        keep: checkpoints to keep; None or 0: all.
        protected: path of a checkpoint that stays, such as the best one.
    """
    target = run / staged.name
    if target.exists():
        _remove(target)
    publish_directory(staged, target)
    if keep:
        stays = {target.name} | ({Path(protected).name} if protected else set())
        excess = max(0, len(checkpoints(run)) - max(keep, len(stays)))
        for checkpoint in [path for path in checkpoints(run) if path.name not in stays][:excess]:
            _remove(checkpoint)
    with contextlib.suppress(OSError):
        staged.parent.rmdir()


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint; should the process die meanwhile, no half of it bears its name."""
    doomed = checkpoint.parent / INCOMPLETE / f"old-{checkpoint.name}"
    doomed.parent.mkdir(exist_ok=True)
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


@contextlib.contextmanager
def explaining_writes(run: Path, what: str) -> Iterator[None]:
    """Turn any failure to write `what` to a run into a `CheckpointError`, and free the space it took."""
    try:
        yield
    except CheckpointError:
        raise
    except _WRITE_FAILURES as error:
        shutil.rmtree(run / INCOMPLETE, ignore_errors=True)
        free = shutil.disk_usage(run).free
        advice = "make room and " if _wants_room(error) else ""
        advice += "resume; earlier checkpoints are whole" if checkpoints(run) else "start again; there is no checkpoint"
        raise CheckpointError(
            f"The {what} could not be written to {run} ({_reason(error)}; {free / 2**20:,.0f} MiB are free there): "
            f"{advice}."
        ) from error


def _wants_room(error: BaseException) -> bool:
    """Whether a full disk may be why nothing could be written; torch and safetensors say so in words only."""
    if isinstance(error, OSError):
        return error.errno in NO_ROOM
    return any(word in str(error).lower() for word in ("no space", "write", "writing", "os error"))


@contextlib.contextmanager
def explaining_reads(checkpoint: str | None, what: str, refusal: type[Exception] = CheckpointError) -> Iterator[None]:
    """Turn any failure to read `what` from a checkpoint into a `CheckpointError`; a `refusal` is let through."""
    try:
        yield
    except refusal:
        raise
    # A reader that meets arbitrary bytes raises what it likes, an IndexError among others.
    except (Exception, CheckpointException) as error:
        raise CheckpointError(
            f"The {what} of {checkpoint} cannot be read ({_reason(error)}): remove that directory, if it is damaged "
            "and not of another version, and resume from an earlier checkpoint."
        ) from error


def _reason(error: BaseException) -> str:
    """The first line of an error, without the stack of C++ calls that some of torch's carry."""
    text = " ".join(str(error).split("\n", 1)[0].split()).rstrip(".")
    if not isinstance(error, OSError | RuntimeError) or not text:  # else: "pop from empty list", "'\\x85'"
        text = f"{type(error).__name__}: {text}".rstrip(": ")
    return text[:200]
