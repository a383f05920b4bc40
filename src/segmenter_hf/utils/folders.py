"""What is in a folder of the user."""

import os
from collections.abc import Collection
from pathlib import Path


def visible_files(folder: str | Path, endings: Collection[str]) -> list[Path]:
    """Return the files in a folder and those below it, without hidden files and all that is in hidden folders.

    Args:
        folder (`str` or `Path`): The folder, which may be hidden itself, or may not exist.
        endings (`Collection[str]`): How their names end, in lower case, such as `.png`; the case of a name does not matter.

    Returns:
        `list[Path]`: Their paths, sorted. Folders that are links are not entered.
    """
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        visible = [name for name in names if not name.startswith(".")]
        found += [Path(parent, name) for name in visible if name.lower().endswith(tuple(endings))]
    return sorted(found)


__all__ = ["visible_files"]
