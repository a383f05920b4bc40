"""Writing files so that what exists is complete: under a temporary name first, then moved."""

import json
import math
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replaced_file(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path in the folder of `path`, which takes its place when the block ends without an error.

    Args:
        path (`str` or `os.PathLike`): The file to write; folders above it are made.

    Yields:
        `Path`: Where to write.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replaced_directory(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder beside `path`, which takes its place when the block ends without an error.

    Args:
        path (`str` or `os.PathLike`): The folder to write. What it held before is gone afterwards.

    Yields:
        `Path`: Where to write.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        temporary, old = Path(folder) / "new", Path(folder) / "old"
        temporary.mkdir()
        yield temporary
        move_directory(temporary, path, old)


def move_directory(directory: Path, path: Path, old: Path) -> None:
    """Move a folder to `path`; what was there goes to `old`, or comes back where the move fails. All on one file system."""
    if path.exists():
        path.rename(old)
    try:
        directory.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise


def move_files(directory: Path, target: Path) -> None:
    """Move every file below a folder to the same place below another, over those that are there."""
    for file in sorted(directory.rglob("*")):
        if file.is_file():
            destination = target / file.relative_to(directory)
            destination.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, destination)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with replaced_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write a JSON file, whole or not at all; NaN, which JSON does not know, becomes null."""
    write_text(path, json.dumps(_without_nan(content), indent=2) + "\n")


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content
