"""Files of a folder: images by name, paths that must stay inside."""

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..models.image_io import ARRAY_SUFFIXES, IMAGE_SUFFIXES
from ..utils.folders import visible_files


logger = logging.getLogger(__name__)

NUM_SHOWN = 5
UNREAD_SUFFIXES = (".arw", ".avif", ".cr2", ".dng", ".heic", ".heif", ".jxl", ".nef", ".tga")

SPLIT_ALIASES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}

# A file, or what `described_masks.describe` makes of an annotation.
Mask = Path | dict[str, Any]


class FolderSplit(NamedTuple):
    """The files of a split.

    Args:
        images (`dict[str, Path]`): By the name that pairs them.
        masks (`dict[str, Path | dict]`): By the same names: files, or encoded masks as `described_masks.describe` makes them.
        expected (`str`): Where masks were looked for, in words.
        names (`tuple[str, ...]`): The classes that the annotations name, where they do.
    """

    images: dict[str, Path]
    masks: dict[str, Mask]
    expected: str
    names: tuple[str, ...] = ()


def image_files(folder: Path) -> list[Path]:
    """The images in a folder and those below it, sorted; hidden files and folders are left out."""
    return visible_files(folder, (*IMAGE_SUFFIXES, *ARRAY_SUFFIXES))


def warn_of_unread_images(folder: Path) -> None:
    """Say which files of a folder are images of kinds that are not read, and so left out."""
    if left_out := visible_files(folder, UNREAD_SUFFIXES):
        logger.warning(
            "%s: %d images are left out, for their kind is not read, such as %s. Convert them to JPEG or PNG.",
            folder,
            len(left_out),
            left_out[0].name,
        )


def files_by_stem(folder: Path, *, arrays: bool = True) -> dict[str, Path]:
    """The images in a folder and below it, by their path there without the suffix; with `.npy` or without.

    Raises:
        ValueError: If two have one name.
    """
    files: dict[str, Path] = {}
    for path in image_files(folder):
        if path.suffix.lower() in ARRAY_SUFFIXES and not arrays:
            continue
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in files:
            raise ValueError(f"{folder}: two files have one name, {files[stem].name} and {path.name}. Keep one.")
        files[stem] = path
    return files


def path_inside(root: Path, folder: Path, name: str, where: str) -> Path:
    """The path of a file that a dataset names. One that leads out of its folder would read a file of the user.

    Raises:
        ValueError: If it is absolute or leads out of `root`; `where` says what names it.
    """
    path = Path(os.path.abspath(folder / name))
    if os.path.isabs(name) or "\0" in name or not path.is_relative_to(os.path.abspath(root)):
        raise ValueError(f"{where}: expected a relative path that stays in {root}, got {name!r}.")
    return path


def check_existence(source: Path, paths: Iterable[Path]) -> None:
    """Refuse a list of files of which some are missing.

    Raises:
        ValueError: If one does not exist; `source` is what names them.
    """
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise ValueError(f"{source} names {len(missing)} files that do not exist: {', '.join(missing[:NUM_SHOWN])}.")
