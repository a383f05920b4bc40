"""Images without masks: files and folders of them, and a split of any dataset."""

from collections.abc import Sequence
from pathlib import Path

import datasets

from ..models.image_io import IMAGE_SUFFIXES
from ..utils.folders import visible_files
from .columns import find_image_column
from .folder_files import image_files, warn_of_unread_images
from .folder_layouts import check_names, split_images
from .loading import (
    HUB_FOLDERS,
    AnyDataset,
    check_name,
    folders_of,
    keep_columns,
    load_from_hub,
    load_local,
    load_split,
)
from .saved_datasets import is_saved_dataset, load_saved_dataset


def find_images(paths: Sequence[str | Path]) -> dict[str, Path]:
    """The images among files and below folders, by the name that their results get.

    Args:
        paths (`Sequence` of `str` or `Path`): Image files, which may have any suffix, and folders of images.
            Hidden files and hidden folders in them are left out.

    Returns:
        `dict[str, Path]`: The file of each name. A name is the path below its folder without the suffix, and is made
        unique with a number where two files share it.

    Raises:
        FileNotFoundError: If a path does not exist or a folder holds no image.
    """
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        if path.is_dir():
            files = image_files(path)
            warn_of_unread_images(path)
            names = [file.relative_to(path).with_suffix("") for file in files]
        else:
            files, names = [path] if path.is_file() else [], [Path(path.stem)]
        if not files:
            raise FileNotFoundError(
                f"{path}: no image there. Expected an image, or a folder with {', '.join(sorted(IMAGE_SUFFIXES))} files."
            )
        for file, name in zip(files, names):
            unique, number = name.as_posix(), 1
            while unique in found:
                number += 1
                unique = f"{name.as_posix()}-{number}"
            found[unique] = file
    return found


def load_image_dataset(
    dataset_name: str,
    split: str = "train",
    *,
    dataset_config: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    validation_fraction: float | None = None,
    data_seed: int = 0,
    streaming: bool = True,
) -> AnyDataset:
    """Load the images of a split, which needs no masks.

    Args:
        dataset_name (`str`): A dataset of the Hub; a folder of parquet files; a folder of images, where a split is
            the folder `images/SPLIT`, `SPLIT/images` or `SPLIT`, and "train" may also be `images` or all of it; a folder of
            images and masks as for training; or "scenes".
        split (`str`, defaults to `"train"`): The split.
        dataset_config (`str`, *optional*): Configuration of a Hub dataset.
        revision (`str`, *optional*): Branch, tag or commit of a Hub dataset.
        image_column (`str`, *optional*): Column of the images, for parquet files and the Hub; it is found by default.
        validation_fraction (`float`, *optional*), data_seed (`int`, defaults to 0), label_column (`str`, *optional*): How the
            validation split was made, where there is none: see `load_segmentation_datasets`. Train is the rest then.
        streaming (`bool`, defaults to `True`): Whether Hub and parquet files are read as they are needed, in place of
            being downloaded and prepared first.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: The columns `image`, encoded as `{"bytes", "path"}`, and `id`
        where there is one; for images the path below the folder without its suffix.

    Raises:
        ValueError: If the split or the column is missing, or a name of a file is no text.
        FileNotFoundError: If `dataset_name` is a path that is no folder, or the folder holds no image.
        OSError: If the Hub dataset cannot be reached.
    """
    source = (dataset_config, revision, streaming)
    if split in ("train", "validation") and validation_fraction and not _has_validation_split(dataset_name, *source):
        loaded = load_split(
            dataset_name,
            split,
            dataset_config=dataset_config,
            dataset_revision=revision,
            image_column=image_column,
            label_column=label_column,
            validation_fraction=validation_fraction,
            data_seed=data_seed,
        )
        return loaded.remove_columns("annotation")
    dataset, folders = _load_images(dataset_name, split, *source)
    return keep_columns(dataset, {image_column or find_image_column(dataset): "image"}, folders)


def _has_validation_split(
    dataset_name: str, dataset_config: str | None, revision: str | None, streaming: bool
) -> bool:
    try:
        _load_images(dataset_name, "validation", dataset_config, revision, streaming)
    except ValueError:
        return False
    return True


def _load_images(
    dataset_name: str, split: str, dataset_config: str | None, revision: str | None, streaming: bool
) -> tuple[AnyDataset, tuple[str, ...]]:
    """A split with all its columns, and where files that its rows name may lie."""
    root = Path(dataset_name)
    if dataset_name == "scenes":
        return load_split(dataset_name, split), ()
    if not root.is_dir():
        check_name(dataset_name)
        return load_from_hub(dataset_name, dataset_config, revision, streaming, split), HUB_FOLDERS
    if is_saved_dataset(root):
        saved = load_saved_dataset(root)
        if split not in saved:
            raise ValueError(f"{root} has no split {split!r}, only {sorted(saved)}.")
        return saved[split], folders_of(root)
    if visible_files(root, [".parquet"]):
        return load_local(root, split, dataset_config, streaming), folders_of(root)
    images = split_images(root, split, dataset_config) or find_images([_image_folder(root, split)])
    check_names(images.values())
    columns = {"image": [str(path) for path in images.values()], "id": list(images)}
    features = datasets.Features({"image": datasets.Image(), "id": datasets.Value("string")})
    return datasets.Dataset.from_dict(columns, features=features), ()


def _image_folder(root: Path, split: str) -> Path:
    candidates = [root / "images" / split, root / split / "images", root / split]
    if split == "train":
        candidates += [root / "images", root]
    found = next((folder for folder in candidates if folder.is_dir()), None)
    if found is None:
        expected = ", ".join(map(str, candidates))
        raise ValueError(f"{root} has no split {split!r}: expected parquet files, or images in {expected}.")
    return found


__all__ = ["find_images", "load_image_dataset"]
