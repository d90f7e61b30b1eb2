"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Numbers of the errors of a full disk."""
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}


class UnreadableError(ValueError):
    """What was asked for is there and cannot be read: it is damaged, or something else."""


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the place of `path` when the block ends without an error.

    Missing folders are made. After an error `path` is as it was, and the temporary file is gone.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}-", suffix=target.suffix)
    os.close(handle)
    try:
        with naming(target):
            yield Path(name)
            os.chmod(name, 0o644)  # mkstemp makes files that only their owner reads
            os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Give the `OSError` of a full disk, which names no file, the path that was being written.

    Others may be those of what is read meanwhile, a connection that broke for instance: they stay as they are.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


@contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a lock on a file, which is made; on a file system that knows no locks, go on without one.

    Raises:
        filelock.Timeout: at once, if another process holds it.
    """
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
    try:
        yield
    finally:
        with suppress(OSError):  # who locks a file that has been removed notices; Windows keeps what is open
            os.unlink(path)
        lock.release()


def write_files(directory: str | os.PathLike[str], save: Callable[[str], object]) -> None:
    """Let `save` write files into a folder of its own; they come to `directory` when all are whole.

    Raises:
        OSError: naming the directory, if they cannot be written; also where `save` raises a bare Exception then.
    """
    target = Path(directory)
    with naming(target):
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=".incomplete-") as folder:
            try:
                save(folder)
            except Exception as error:
                if type(error) is not Exception:  # as that of tokenizers, whatever has happened
                    raise
                raise OSError(f"{target} cannot be written ({' '.join(str(error).split()).rstrip('.')}).") from error
            for path in Path(folder).iterdir():
                os.replace(path, target / path.name)


def publish_directory(source: Path, target: Path) -> None:
    """Rename a directory once all that is in it has reached the disk, so that `target` is whole even after a power cut.

    Raises:
        OSError: if `target` exists and is not empty, or lies on another file system.
    """
    for path in [*source.rglob("*"), source]:
        _flush(path)
    os.rename(source, target)
    _flush(target.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a file of JSON holds.

    Raises:
        UnreadableError: naming the file, if it is no JSON.
        OSError: if it cannot be opened.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:  # also of bytes that are no text
        raise UnreadableError(f"{path} cannot be read: it is no JSON ({error}).") from error


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` as UTF-8; returns the path."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | os.PathLike[str], data: Any) -> Path:
    """Write `data` as indented JSON; returns the path."""
    return write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
