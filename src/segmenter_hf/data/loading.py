"""Datasets of images and masks, loaded from anywhere.

A dataset comes from the Hub, from parquet files, from a folder of images and masks, or is drawn by `synthetic_scenes.py`.
Whatever the source, it has the columns `image` and `annotation`, which hold the encoded files: `decoding.py` turns a row
into arrays, `mask_checks.py` counts what the masks hold.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from huggingface_hub.constants import HF_HUB_CACHE

from ..utils.http import translate_http_errors
from .encoded_images import CACHES, RowImage
from .folder_layouts import load_folder, stream_parquet
from .synthetic_scenes import embedded_scenes


logger = logging.getLogger(__name__)

AnyDataset = datasets.Dataset | datasets.IterableDataset

HUB_FOLDERS = ("hf://", HF_HUB_CACHE, *CACHES)  # where files that rows of the Hub name may lie


def load_segmentation_datasets(
    dataset_name: str | None = None,
    *,
    splits: Sequence[str] = ("train", "validation"),
    dataset_config: str | None = None,
    revision: str | None = None,
    image_column: str = "image",
    label_column: str = "annotation",
    validation_fraction: float | None = None,
    scenes_size: tuple[int, int] = (128, 160),
    scenes_train: int = 500,
    scenes_validation: int = 100,
    seed: int = 0,
    streaming: bool = False,
) -> dict[str, AnyDataset]:
    """Loads the splits of a semantic segmentation dataset, with columns `image`, `annotation` and, where given, `id`.

    A local folder is read in these layouts; `folder_layouts.py` says which names its files have in each:

    | layout | what tells it |
    | --- | --- |
    | parquet, as downloaded from the Hub | `train-*.parquet`, also under `data/` |
    | metadata of image and mask | `train/metadata.jsonl` or `train/metadata.csv` |
    | two folders | `images/train` beside `masks/train`, or `train/images` beside `train/masks`; no `train`: no splits |
    | ADE20K | `images/training` beside `annotations/training`, in the folder or its `ADEChallengeData2016` |
    | Cityscapes | `leftImg8bit/train` beside `gtFine/train` |
    | Pascal VOC | `ImageSets/Segmentation/train.txt`, in the folder or its `VOCdevkit/VOC2012` |
    | Pascal Context, as in mmsegmentation | `ImageSets/SegmentationContext/train.txt`, the same for `VOC2010` |

    Args:
        dataset_name (`str`, *optional*):
            "scenes" (the default): the embedded street scenes; or a local folder; or a dataset of the Hub.
        splits (sequence of `str`, *optional*, defaults to `("train", "validation")`):
            Splits to load.
        dataset_config (`str`, *optional*):
            Configuration of a Hub dataset; or, of a VOC folder with two kinds of masks, the folder of those to load.
        revision (`str`, *optional*):
            Branch, tag or commit of a Hub dataset.
        image_column (`str`, *optional*, defaults to `"image"`):
            Column of the images, for parquet files, metadata and the Hub.
        label_column (`str`, *optional*, defaults to `"annotation"`):
            Column of the masks, for parquet files, metadata and the Hub.
        validation_fraction (`float`, *optional*):
            Where there is no validation split, this share of the train split becomes one. Without it, that is an error.
        scenes_size (`tuple[int, int]`, *optional*, defaults to `(128, 160)`):
            Height and width of the embedded scenes, in pixels.
        scenes_train (`int`, *optional*, defaults to 500):
            Number of embedded scenes in the train split.
        scenes_validation (`int`, *optional*, defaults to 100):
            Number of embedded scenes in the validation split. No scene is in both.
        seed (`int`, *optional*, defaults to 0):
            Seed of the embedded scenes and of the split by `validation_fraction`.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to return iterable datasets, and read Hub and parquet files as they are needed.

    Returns:
        `dict[str, datasets.Dataset]` (of `datasets.IterableDataset` if `streaming`): the splits by name. The columns hold
        encoded images, `{"bytes", "path"}`: read rows with `decode_example`.

    Raises:
        `ValueError`: If a split, its masks or a column are missing, both columns are one, images and masks do not
            pair up, or metadata name files outside of the folder.
        `FileNotFoundError`: If `dataset_name` is a path that is no folder.
        `OSError`: If the Hub dataset cannot be reached.
    """
    if image_column == label_column:
        raise ValueError(
            f"Expected two columns, one of images and one of masks, got {image_column!r} for both. Name them with "
            "--image_column and --label_column."
        )
    without_masks, folders = {}, ()
    if dataset_name in (None, "scenes"):
        sizes = {"train": scenes_train, "validation": scenes_validation}
        found = {
            split: embedded_scenes(num_images, scenes_size, seed=2 * seed + (split == "validation"))
            for split, num_images in sizes.items()
            if split in splits
        }
    elif Path(dataset_name).is_dir():
        found, without_masks = load_folder(
            Path(dataset_name),
            splits,
            dataset_config=dataset_config,
            image_column=image_column,
            label_column=label_column,
            streaming=streaming,
        )
        folders = folders_of(Path(dataset_name))
    else:
        check_name(dataset_name)
        folders = HUB_FOLDERS
        found = dict(load_from_hub(dataset_name, dataset_config, revision, streaming))

    if "validation" in splits and "validation" not in found and "train" in found and validation_fraction is not None:
        if isinstance(found["train"], datasets.IterableDataset):
            raise ValueError("validation_fraction needs a dataset of known length: load it without streaming.")
        found["train"], found["validation"] = split_train_validation(found["train"], validation_fraction, seed)
    missing = [split for split in splits if split not in found]
    if missing:
        advice = "".join(f" {without_masks[split]}." for split in missing if split in without_masks)
        if missing == ["validation"]:
            advice += " Give a validation_fraction to split off a part of train."
        available = sorted(found) if dataset_name not in (None, "scenes") else ["train", "validation"]
        raise ValueError(f"{dataset_name or 'scenes'} has no split {missing}, only {available}.{advice}")
    columns = {image_column: "image", label_column: "annotation"}
    kept = {split: keep_columns(found[split], columns, folders) for split in splits}
    if not streaming:
        return kept
    return {
        split: dataset.to_iterable_dataset() if isinstance(dataset, datasets.Dataset) else dataset
        for split, dataset in kept.items()
    }


def load_split(
    dataset_name: str,
    split: str,
    *,
    dataset_config: str | None = None,
    dataset_revision: str | None = None,
    image_column: str = "image",
    label_column: str = "annotation",
    max_samples: int | None = None,
) -> AnyDataset:
    """Load one split, or its first images, as [`load_segmentation_datasets`] does.

    Args:
        dataset_name (`str`), dataset_config (`str`), dataset_revision (`str`), image_column (`str`), label_column (`str`):
            Where and how the images are found: see [`load_segmentation_datasets`].
        split (`str`): The split.
        max_samples (`int`, *optional*): Keep the first so many images only.

    Returns:
        `datasets.Dataset`: Columns `image`, `annotation`, and `id` where there is one.
    """
    loaded = load_segmentation_datasets(
        dataset_name,
        splits=[split],
        dataset_config=dataset_config,
        revision=dataset_revision,
        image_column=image_column,
        label_column=label_column,
    )
    return first_rows(loaded[split], max_samples)


def split_train_validation(
    dataset: datasets.Dataset, fraction: float = 0.1, seed: int = 0
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Splits a dataset at random into a train and a validation part, and logs the sizes.

    Args:
        dataset (`datasets.Dataset`):
            Of two examples at least.
        fraction (`float`, *optional*, defaults to 0.1):
            Share of the validation part, which has one example at least.
        seed (`int`, *optional*, defaults to 0):
            Seed of the permutation.

    Returns:
        `tuple[datasets.Dataset, datasets.Dataset]`: train and validation.

    Raises:
        `ValueError`: If `fraction` is not in (0, 1) or the dataset has fewer than two examples.
    """
    if not 0 < fraction < 1 or len(dataset) < 2:
        raise ValueError(
            f"Expected a fraction in (0, 1) and at least 2 examples to split, got {fraction} and {len(dataset)}."
        )
    order = np.random.default_rng(seed).permutation(len(dataset))
    num_validation = min(max(round(fraction * len(dataset)), 1), len(dataset) - 1)
    logger.warning(
        "No validation split: %d of the %d train examples, drawn with seed %d, are kept for validation.",
        num_validation,
        len(dataset),
        seed,
    )
    return dataset.select(np.sort(order[num_validation:])), dataset.select(np.sort(order[:num_validation]))


# Sources


def check_name(name: str) -> None:
    """Refuses a name that can only be a path, where there is no folder.

    Raises:
        `FileNotFoundError`: If there is none.
    """
    if not Path(name).is_dir() and (Path(name).is_absolute() or name.startswith(("./", "../", "~"))):
        raise FileNotFoundError(f"{name}: no such folder. Expected a folder, a Hub dataset or 'scenes'.")


def load_from_hub(
    name: str, config: str | None, revision: str | None, streaming: bool, split: str | None = None
) -> Any:
    """What `datasets.load_dataset` gives for these arguments; where it cannot be reached, an `OSError` says what to do."""
    try:
        with translate_http_errors(name):
            return datasets.load_dataset(name, config, split=split, revision=revision, streaming=streaming)
    except OSError as error:  # no connection, offline mode, no such dataset: all are OSErrors
        raise OSError(
            f"Dataset {name!r} is no local folder, and could not be loaded from the Hub: {error}\n"
            "Check the name and the connection, or, where there is one, run "
            f"`hf download {name} --repo-type dataset --local-dir FOLDER` and give that folder instead."
        ) from error


def load_local(root: Path, split: str, config: str | None, streaming: bool) -> AnyDataset:
    """What `datasets.load_dataset` gives for a folder, but streamed parquet files are read a few rows at a time."""
    if streaming:
        builder = datasets.load_dataset_builder(str(root), config)
        files = (builder.config.data_files or {}).get(split)
        if builder.name == "parquet" and files:
            return stream_parquet(files, builder.info.features)
    return datasets.load_dataset(str(root), config, split=split, streaming=streaming)


def folders_of(root: Path) -> tuple[str, ...]:
    """Where files that the rows of a local data set name may lie: in its folder, or in what was unpacked from it."""
    return os.path.abspath(root), os.path.realpath(root), *CACHES


def column_names(dataset: AnyDataset) -> list[str]:
    """The columns of a dataset; those of its first row where a stream does not say."""
    return dataset.column_names or list(next(iter(dataset), {}))


def keep_columns(dataset: AnyDataset, columns: Mapping[str, str], folders: tuple[str, ...] = ()) -> AnyDataset:
    """Keeps columns of images under new names, and `id` where there is one.

    Decoding is left to `decode_example`, as `datasets.Image` would turn a mask by an EXIF tag that its image lacks.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            The dataset.
        columns (`Mapping[str, str]`):
            New name of each column, `image` or `annotation`.
        folders (`tuple[str, ...]`, *optional*):
            Where the files that rows name must lie: see `RowImage`. By default anywhere.

    Raises:
        `ValueError`: If a column is missing.
    """
    present = column_names(dataset)
    missing = [column for column in columns if column not in present]
    if missing:
        options = {"image": "--image_column", "annotation": "--label_column"}
        raise ValueError(
            f"The dataset has no column {' or '.join(map(repr, missing))}, only {present}. "
            f"Name the columns with {' and '.join(options[name] for name in columns.values())}."
        )
    dataset = dataset.select_columns([*columns, *(["id"] if "id" in present else [])])
    dataset = dataset.rename_columns({old: new for old, new in columns.items() if old != new})
    feature = RowImage(folders=folders) if folders else datasets.Image(decode=False)
    for column in columns.values():
        dataset = dataset.cast_column(column, feature)
    return dataset


def first_rows(dataset: AnyDataset, limit: int | None) -> AnyDataset:
    """The first so many rows of a dataset, or all."""
    if limit is None:
        return dataset
    if isinstance(dataset, datasets.Dataset):
        return dataset.select(range(min(limit, len(dataset))))
    return dataset.take(limit)


def limited_split(split: str, limit: int | None) -> str:
    """Name of the first so many rows of a split, as `datasets` writes it."""
    return split if limit is None else f"{split}[:{limit}]"
