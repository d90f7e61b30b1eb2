"""Which files of a directory belong to which split: their names tell it, as they do for `datasets`.

A word of a file's path inside the directory tells a split when it is one of `KEYWORDS`, in any case. Words end at
whatever is no letter: `train.parquet`, `data/train-00000-of-00004.parquet`, `my_validation_set.txt`, `test/17.txt`.
Folders are asked before the file itself, so that in `train/a-test-of-time.txt` it is `train`; where one of them has
several such words, the last counts. Where no path tells a split, all files are `train`. Where some do, files whose
path tells none belong to no split: they are left out, which is said.
"""

import functools
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from holdfast.data.readers import ENDINGS, reader_of

__all__ = ["check_told_apart", "files_of_split"]

logger = logging.getLogger(__name__)

KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def files_of_split(directory: Path, split: str | None) -> list[Path]:
    """The text files of a split (None: all text files), at any depth, in the order of their paths.

    What is left out of every split, for want of a name or of a known type, is counted in one warning.

    Raises:
        ValueError: the directory holds no text files, or none of this split.
    """
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    found = [file for file in files if reader_of(file) is not None]
    if not found:
        raise ValueError(f"{directory} holds no text files; give a directory of {', '.join(ENDINGS)} files.")
    if split is None:
        return found
    splits = {file: _split_of(file.relative_to(directory)) for file in found}
    told = {name: file for file, name in splits.items() if name is not None}
    if not told:
        splits = dict.fromkeys(found, "train")
    chosen = [file for file in found if splits[file] == split]
    if not chosen:
        raise ValueError(_absent(directory, split, told))
    untold = [file for file in found if splits[file] is None]
    unknown = [file for file in files if reader_of(file) is None and not _is_hidden(file.relative_to(directory))]
    if (untold or unknown) and os.environ.get("RANK", "0") == "0":  # said once, however many processes train
        _warn_once(f"{directory}: {_describe_left_out(untold, unknown)}.")
    return chosen


def check_told_apart(source: str | Path, splits: Sequence[str], way_out: str) -> None:
    """Raise where several splits of a source would be one text, as those of a single file are: it is read whole.

    Args:
        source: as for `load_text`.
        splits: what is to be read of it.
        way_out: what else to give than another source, for the message.

    Raises:
        ValueError: naming the source and the ways out.
    """
    names = " and ".join(repr(split) for split in splits)
    if len(set(splits)) < len(splits):
        raise ValueError(f"the splits {names} of {source} are one; name another, or {way_out}.")
    if len(splits) > 1 and Path(source).expanduser().is_file():
        files = " and ".join(f"{split}.txt" for split in splits)
        raise ValueError(
            f"{source} is one file, so its splits {names} would be the same text: give a directory with files or "
            f"folders named after each split (such as {files}), or {way_out}."
        )


def _split_of(path: Path) -> str | None:
    """The split that a relative path tells: its folders, or else its file."""
    for names in (str(path.parent), path.name):
        words = re.split(r"[\W\d_]+", names.lower())
        if told := [split for word in words for split, keywords in KEYWORDS.items() if word in keywords]:
            return told[-1]
    return None


def _absent(directory: Path, split: str, told: Mapping[str, Path]) -> str:
    """What to say of a directory without a split, given a file for each of those that its names tell."""
    if not told:
        found = "its file names tell no split, so all of it is train"
    else:
        name, file = min(told.items())
        found = f"its file names tell the splits {', '.join(sorted(told))} only ({file.relative_to(directory)}: {name})"
    if split not in KEYWORDS:
        return f"cannot read {directory} (split {split}): {found}; a directory can have {', '.join(KEYWORDS)}."
    folders = " and ".join(f"{name}/" for name in dict.fromkeys(("train", "validation", split)))
    return (
        f"cannot read {directory} (split {split}): {found}; put its files into folders named {folders}, begin their "
        "names so, or ask for a split that is there."
    )


def _describe_left_out(untold: Sequence[Path], unknown: Sequence[Path]) -> str:
    parts = []
    if untold:
        parts.append(f"{len(untold)} whose names tell no split while those of others do, such as {untold[0].name}")
    if unknown:
        parts.append(f"{len(unknown)} that are no {', '.join(ENDINGS)} files, such as {unknown[0].name}")
    return f"files left out: {'; '.join(parts)}"


@functools.cache
def _warn_once(message: str) -> None:
    """Every split of a directory leaves out the same files."""
    logger.warning("%s", message)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
