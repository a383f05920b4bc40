"""Writing files so that what exists is complete: under a temporary name first, then moved.

A process that is killed leaves its temporary name beside the target: `.NAME-partial-...`. It is not deleted, for another
process may be writing it, and `old` in it is what was to be replaced, if the kill came between the two moves. Delete it when no
process writes there. Runs that write many files into a folder hold it with `locked_directory`: only then do they delete what
a killed run has left in it.
"""

import errno
import json
import math
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


try:
    import fcntl
except ImportError:  # where there is none, runs are not kept apart, and nothing is deleted
    fcntl = None  # type: ignore[assignment]


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG)
MAX_MOVES = 10  # of processes that replace the same folder at once
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems that have none
LOCK_FILE = ".segmenter-hf.lock"
MAX_STEM_BYTES = 180  # of a name in a temporary one: file systems take 255


@contextmanager
def translate_writing_errors(path: str | os.PathLike) -> Iterator[None]:
    """Errors of a full disk or a place that cannot be written, with what was to be written and what to do.

    Args:
        path (`str` or `os.PathLike`): What the block writes, as the user knows it.
    """
    path = Path(path)
    if any(part.startswith(".") and "-partial" in part for part in path.parts[:-1]):
        yield  # a part of something whose writing is explained
        return
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # Libraries that are not Python say it in their text only.
        if getattr(error, "errno", None) in FULL or any(os.strerror(code) in str(error) for code in FULL):
            place = next(parent for parent in path.absolute().parents if parent.is_dir())
            message = f"{shutil.disk_usage(place).free / 2**20:.0f} MB are free there: make room or give another disk."
            if partial := sorted(other.name for other in place.glob(".*-partial*")):
                message += (
                    " What killed runs left (`old` in it is what they were to replace) can be deleted where no run "
                )
                message += f"still writes it: {', '.join(partial)}."
            raise OSError(f"{path} could not be written: {error}. {message}") from error
        if isinstance(error, OSError) and error.errno in FORBIDDEN:
            advice = "a shorter name" if error.errno == errno.ENAMETOOLONG else "a place that can be written"
            raise type(error)(f"{path} could not be written: {error}. Give {advice}.") from error
        raise


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path in the folder of `path`, which takes its place when the block ends without an error.

    Args:
        path (`str` or `os.PathLike`): The file to write; folders above it are made.

    Yields:
        `Path`: Where to write.
    """
    path = Path(path)
    temporary = path.with_name(f".{_short(path.stem)}-partial-{uuid.uuid4().hex}{path.suffix}")
    with translate_writing_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder beside `path`, which takes its place when the block ends without an error.

    Args:
        path (`str` or `os.PathLike`): The folder to write. What it held before is gone afterwards.

    Yields:
        `Path`: Where to write.
    """
    path = Path(path)
    with translate_writing_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{_short(path.name)}-partial-") as folder:
            temporary, old = Path(folder) / "new", Path(folder) / "old"
            temporary.mkdir()
            yield temporary
            move_directory(temporary, path, old)


@contextmanager
def locked_directory(directory: str | os.PathLike) -> Iterator[bool]:
    """Make a folder and keep other runs out of it until the block ends; the lock of a process that is killed ends with it.

    Args:
        directory (`str` or `os.PathLike`): The folder that the run writes.

    Yields:
        `bool`: Whether no other run writes there for sure, so that temporary files in it are those of killed runs. It is
        `False` where the file system has no locks.

    Raises:
        BlockingIOError: If another run holds the folder.
    """
    path = Path(directory) / LOCK_FILE
    is_new = not path.parent.exists()
    with translate_writing_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _take_lock(path)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)  # before it is released: who opened it meanwhile sees that it is gone
            os.close(descriptor)
        if is_new:
            with suppress(OSError):  # what holds files stays
                path.parent.rmdir()


def _take_lock(path: Path) -> int | None:
    while fcntl is not None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
            os.close(descriptor)  # the run that made this file has ended and removed it
        except OSError as error:
            os.close(descriptor)
            if error.errno in NO_LOCKS:
                path.unlink(missing_ok=True)
                return None
            if isinstance(error, BlockingIOError):
                raise BlockingIOError(
                    error.errno,
                    f"another run is writing to {path.parent}: wait until it has ended, or give another folder",
                ) from error
            raise
    return None


def _short(name: str) -> str:
    return os.fsencode(name)[:MAX_STEM_BYTES].decode(errors="ignore")


def move_directory(directory: Path, path: Path, old: Path) -> None:
    """Move a folder to `path`; what was there goes to `old`, or comes back where the move fails. All on one file system."""
    attempt = 0
    while True:
        replaced = old if attempt == 0 else old.with_name(f"{old.name}-{attempt}")
        try:
            with suppress(FileNotFoundError):  # another process has moved it in between
                path.rename(replaced)
            directory.rename(path)
            return
        except BaseException as error:  # a signal too, which may come between the two moves
            is_taken = isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST)
            if is_taken and path.is_dir() and attempt < MAX_MOVES:
                attempt += 1  # another process has put its own there
                continue
            if replaced.exists() and not path.exists():
                replaced.rename(path)
            raise


def move_files(directory: Path, target: Path) -> None:
    """Move every file below a folder to the same place below another, over those that are there."""
    for file in sorted(directory.rglob("*")):
        if file.is_file():
            destination = target / file.relative_to(directory)
            destination.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, destination)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write a JSON file atomically; NaN, which JSON does not know, becomes null."""
    write_text(path, json.dumps(_without_nan(content), indent=2) + "\n")


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content
