"""What is in a folder of the user."""

import os
import stat
from collections.abc import Collection
from pathlib import Path


def visible_files(folder: str | Path, endings: Collection[str]) -> list[Path]:
    """Return the files in a folder and those below it, without hidden files and all that is in hidden folders.

    Args:
        folder (`str` or `Path`): The folder, which may be hidden itself, or may not exist.
        endings (`Collection[str]`): How their names end, in lower case, such as `.png`; the case of a name does not matter.

    Returns:
        `list[Path]`: Their paths, sorted. Folders that are links are entered, each folder once.
    """
    found, entered = [], {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, followlinks=True):
        below = {
            name: os.path.realpath(os.path.join(parent, name)) for name in sorted(folders) if not name.startswith(".")
        }
        folders[:] = [name for name, place in below.items() if place not in entered]
        entered.update(below.values())
        visible = [name for name in names if not name.startswith(".")]
        found += [Path(parent, name) for name in visible if name.lower().endswith(tuple(endings))]
    return sorted(found)


def lies_within(path: str | Path, folder: str | Path) -> bool:
    """Return whether a path is a folder or lies below it, links followed; neither need exist, and links may lead in circles."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def regular_size(path: str | os.PathLike) -> int:
    """Return the size of a file in bytes, before it is read.

    Raises:
        OSError: If there is no such file, or it is a folder.
        ValueError: If it is a pipe, which would be waited for, or a device, which may have no end.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(
        status.st_mode
    ):  # reading a folder says itself what is wrong
        raise ValueError(
            f"{os.fspath(path)}: expected a file, got a pipe or a device. Give a file that is stored on a disk."
        )
    return status.st_size


__all__ = ["lies_within", "regular_size", "visible_files"]
