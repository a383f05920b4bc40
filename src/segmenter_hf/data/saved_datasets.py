"""Folders that `datasets.save_to_disk` wrote."""

from pathlib import Path

import datasets

from ..utils.json_files import read_json
from ..utils.messages import one_line
from .folder_files import SPLIT_ALIASES, check_existence, path_inside


_SPLITS = {alias: split for split, aliases in SPLIT_ALIASES.items() for alias in aliases if alias != split}


def is_saved_dataset(root: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of a dataset, or of a dictionary of them."""
    return (root / "dataset_dict.json").is_file() or (root / "state.json").is_file()


def load_saved_dataset(root: Path) -> dict[str, datasets.Dataset]:
    """Load the splits of a folder that `save_to_disk` wrote; a single dataset is the train split.

    Raises:
        ValueError: If a file is missing, or one is named that lies outside of the folder.
    """
    if not (root / "dataset_dict.json").is_file():
        return {"train": _load(root, root)}
    file = root / "dataset_dict.json"
    content = read_json(file)
    splits = content.get("splits") if isinstance(content, dict) else None
    names = [split for split in splits if isinstance(split, str)] if isinstance(splits, list) else []
    if not isinstance(splits, list) or len(names) < len(splits):
        raise ValueError(f"{file}: expected a list of `splits`, got {content!r:.200}.")
    known = {split: split if _SPLITS.get(split) in names else _SPLITS.get(split, split) for split in names}
    if len(set(known.values())) < len(names):
        raise ValueError(
            f"{file}: expected one split for training, validation and test each, got {names}. Rename them."
        )
    return {name: _load(root, path_inside(root, root, split, str(file))) for split, name in known.items()}


def _load(root: Path, folder: Path) -> datasets.Dataset:
    state = folder / "state.json"
    check_existence(root, [state, folder / "dataset_info.json"])
    content = read_json(state)
    files = content.get("_data_files") if isinstance(content, dict) else None
    given = [file.get("filename") for file in files if isinstance(file, dict)] if isinstance(files, list) else []
    names = [name for name in given if isinstance(name, str)]
    if not names or len(names) < len(given):
        raise ValueError(f"{state}: expected a list of `_data_files`, got {files!r:.200}.")
    check_existence(state, [path_inside(root, folder, name, str(state)) for name in names])
    try:
        return datasets.load_from_disk(str(folder))
    except (ArithmeticError, LookupError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: expected a dataset as `save_to_disk` writes it: {one_line(error)}") from error
