"""Datasets of images and masks, loaded from anywhere.

A dataset comes from the Hub, from parquet files, from a folder of images and masks, or is drawn by `synthetic_scenes.py`.
Whatever the source, it has the columns `image` and `annotation`, which hold the encoded files: `decoding.py` turns a row
into arrays, `mask_checks.py` counts what the masks hold.
"""

import difflib
import logging
import os
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from huggingface_hub import constants
from huggingface_hub.constants import HF_HUB_CACHE

from ..utils.http import translate_http_errors
from ..utils.messages import one_line
from .columns import AnyDataset, check_columns, column_names, find_columns
from .encoded_images import CACHES, RowImage
from .folder_files import SPLIT_ALIASES
from .folder_layouts import find_parquet_files, folder_label_set, load_folder, load_parquet, stream_parquet
from .label_sets import LabelSet
from .saved_datasets import is_saved_dataset, load_saved_dataset
from .synthetic_scenes import embedded_scenes


logger = logging.getLogger(__name__)

HUB_FOLDERS = ("hf://", HF_HUB_CACHE, *CACHES)  # where files that rows of the Hub name may lie
_DOWNLOAD_ADVICE = "Check the name and the connection, or, where there is one, run " + (
    "huggingface_hub.snapshot_download(%r, repo_type='dataset', local_dir='FOLDER') and give that folder instead."
)


class _Source(NamedTuple):
    """What was loaded: the splits; what is to be said of missing ones; the classes; where files that rows name may lie."""

    splits: dict[str, AnyDataset]
    notes: Mapping[str, str] = {}
    label_set: LabelSet | None = None
    folders: tuple[str, ...] = ()


def load_segmentation_datasets(
    dataset_name: str | None = None,
    *,
    splits: Sequence[str] = ("train", "validation"),
    dataset_config: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    validation_fraction: float | None = None,
    scenes_size: tuple[int, int] = (128, 160),
    scenes_train: int = 500,
    scenes_validation: int = 100,
    seed: int = 0,
    streaming: bool = False,
) -> dict[str, AnyDataset]:
    """Load the splits of a semantic segmentation dataset, with columns `image`, `annotation` and, where given, `id`.

    Args:
        dataset_name (`str`, *optional*): "scenes" (the default): the embedded street scenes; or a local folder in a layout
            of `folder_layouts.py`, or one that `save_to_disk` wrote; or a dataset of the Hub.
        splits (sequence of `str`, defaults to `("train", "validation")`): Splits to load.
        dataset_config (`str`, *optional*): Configuration of a Hub dataset; or, of a folder with two kinds of masks, the
            kind: see `load_folder`.
        revision (`str`, *optional*): Branch, tag or commit of a Hub dataset.
        image_column (`str`, *optional*), label_column (`str`, *optional*): Columns of the images and of the masks, for
            parquet files, metadata and the Hub; found by `find_columns`.
        validation_fraction (`float`, *optional*): Where there is no validation split, this share of the train split becomes
            one, and train is the rest, also where it is loaded alone. Without it, or with 0, a missing validation split is
            an error.
        scenes_size (`tuple[int, int]`, defaults to `(128, 160)`): Height and width of the embedded scenes, in pixels.
        scenes_train (`int`, defaults to 500), scenes_validation (`int`, defaults to 100): Number of embedded scenes in each
            split. No scene is in both.
        seed (`int`, defaults to 0): Seed of the embedded scenes and of the split by `validation_fraction`.
        streaming (`bool`, defaults to `False`): Whether to return iterable datasets, and read Hub and parquet files as they
            are needed.

    Returns:
        `dict[str, datasets.Dataset]` (of `datasets.IterableDataset` if `streaming`): the splits by name. The columns hold
        encoded images, `{"bytes", "path"}`: read rows with `decode_example`. `dataset_label_set` gives the classes, where
        the dataset names them.

    Raises:
        FileNotFoundError: If `dataset_name` is a path that is no folder.
        OSError: If the Hub dataset cannot be reached.
        ValueError: If a split, its masks or a column are missing, both columns are one, images and masks do not
            pair up, or metadata name files outside of the folder.
    """
    columns = (image_column, label_column)
    if dataset_name in (None, "scenes"):
        sizes = {"train": scenes_train, "validation": scenes_validation}
        source = _Source(_load_scenes({name: sizes[name] for name in sizes if name in splits}, scenes_size, seed))
        validation_fraction = None  # there is a validation split, even where it is not drawn
    else:
        source = _load_source(dataset_name, splits, columns, dataset_config, revision, streaming)
    found = _with_validation_split(source.splits, splits, validation_fraction, seed)
    _check_splits(dataset_name or "scenes", splits, found, source.notes)
    return {split: _uniform_columns(found[split], columns, source, streaming) for split in splits}


def _uniform_columns(
    dataset: AnyDataset, columns: tuple[str | None, str | None], source: _Source, streaming: bool
) -> AnyDataset:
    """A split whose columns are called `image` and `annotation`, whatever their names were, as an iterable one if wanted."""
    names = find_columns(dataset, *columns)
    kept = keep_columns(dataset, dict(zip(names, ("image", "annotation"))), source.folders, source.label_set)
    return kept.to_iterable_dataset() if streaming and isinstance(kept, datasets.Dataset) else kept


def _load_scenes(sizes: Mapping[str, int], scenes_size: tuple[int, int], seed: int) -> dict[str, AnyDataset]:
    return {
        split: embedded_scenes(num_images, scenes_size, seed=2 * seed + (split == "validation"))
        for split, num_images in sizes.items()
    }


def _load_source(
    name: str,
    splits: Sequence[str],
    columns: tuple[str | None, str | None],
    config: str | None,
    revision: str | None,
    streaming: bool,
) -> _Source:
    """Every split of a local folder or of a dataset of the Hub."""
    root = Path(name)
    if not root.is_dir():
        check_name(name)
        return _Source(dict(load_from_hub(name, config, revision, streaming)), folders=HUB_FOLDERS)
    if is_saved_dataset(root):
        return _Source(load_saved_dataset(root), label_set=folder_label_set(root), folders=folders_of(root))
    loaded = load_folder(
        root,
        splits,
        dataset_config=config,
        image_column=columns[0],
        label_column=columns[1],
        streaming=streaming,
    )
    return _Source(loaded.splits, loaded.notes, loaded.label_set, folders_of(root))


def _with_validation_split(
    found: dict[str, AnyDataset], splits: Sequence[str], fraction: float | None, seed: int
) -> dict[str, AnyDataset]:
    """The splits, with a part of train as validation split where there is none and a fraction is given.

    Train alone is split too: what the training kept for validation is no part of it.
    """
    is_asked = "train" in splits or "validation" in splits
    if not fraction or not is_asked or "validation" in found or "train" not in found:
        return found
    if isinstance(found["train"], datasets.IterableDataset):
        raise ValueError("`validation_fraction` needs a dataset of known length: load it without `streaming`.")
    train, validation = split_train_validation(found["train"], fraction, seed)
    return {**found, "train": train, "validation": validation}


def _check_splits(name: str, splits: Sequence[str], found: Mapping[str, AnyDataset], notes: Mapping[str, str]) -> None:
    missing = [split for split in splits if split not in found]
    if not missing:
        return
    advice = "".join(f" {notes[split]}." for split in missing if split in notes)
    if missing == ["validation"]:
        advice += " Give a `validation_fraction` to split off a part of train."
    available = sorted(found) if name != "scenes" else ["train", "validation"]
    raise ValueError(f"{name} has no split {missing}, only {available}.{advice}")


def load_split(
    dataset_name: str,
    split: str,
    *,
    dataset_config: str | None = None,
    dataset_revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    validation_fraction: float | None = None,
    data_seed: int | None = None,
    max_samples: int | None = None,
) -> AnyDataset:
    """Load one split, or its first images, as [`load_segmentation_datasets`] does.

    Args:
        dataset_name (`str`), dataset_config (`str`), dataset_revision (`str`), image_column (`str`), label_column
            (`str`): Where and how the images are found: see [`load_segmentation_datasets`].
        validation_fraction (`float`, *optional*), data_seed (`int`, *optional*): How the split was made: its `seed` there.
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
        validation_fraction=validation_fraction,
        seed=data_seed or 0,
    )
    return first_rows(loaded[split], max_samples)


def split_train_validation(
    dataset: datasets.Dataset, fraction: float = 0.1, seed: int = 0
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split a dataset at random into a train and a validation part, and log the sizes.

    Args:
        dataset (`datasets.Dataset`): Of two examples at least.
        fraction (`float`, defaults to 0.1): Share of the validation part, which has one example at least.
        seed (`int`, defaults to 0): Seed of the permutation.

    Returns:
        `tuple[datasets.Dataset, datasets.Dataset]`: train and validation.

    Raises:
        ValueError: If `fraction` is not in (0, 1) or the dataset has fewer than two examples.
    """
    if not 0 < fraction < 1 or len(dataset) < 2:
        raise ValueError(
            "Expected a fraction in (0, 1) as `validation_fraction` and at least 2 examples of train to split, got "
            f"{fraction} and {len(dataset)}."
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
    """Refuse a name that cannot be that of a dataset of the Hub, or that nothing here knows while the Hub is out of reach.

    Raises:
        FileNotFoundError: If there is no such folder, and it can only be one.
        NotADirectoryError: If it is a file.
        OSError: If the Hub cannot be reached and no copy of the dataset is here.
    """
    if Path(name).is_file():
        raise NotADirectoryError(f"{name}: expected a folder, got a file. Unpack an archive, and give its folder.")
    near = difflib.get_close_matches(Path(name).name, [path.name for path in Path(name).parent.glob("*/")], n=1)
    hint = f" Did you mean {Path(name).parent / near[0]}?" if near else ""
    if Path(name).is_absolute() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise FileNotFoundError(f"{name}: no such folder. Expected a folder, a Hub dataset or 'scenes'.{hint}")
    copies = (
        Path(HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}",
        Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___"),
        Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___").lower(),
    )
    if not any(copy.exists() for copy in copies) and not _is_hub_in_reach():
        raise OSError(
            f"Dataset {name!r} is no local folder, and could not be loaded from the Hub, which cannot be reached from here."
            f"{hint} {_DOWNLOAD_ADVICE % name}"
        )


def _is_hub_in_reach() -> bool:
    """Whether the Hub has an address, or a proxy knows it: without this, every request is tried again for half a minute."""
    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return False
    return True


def load_from_hub(
    name: str, config: str | None, revision: str | None, streaming: bool, split: str | None = None
) -> Any:
    """What `datasets.load_dataset` gives for these arguments; where it cannot be reached, an `OSError` says what to do."""
    try:
        with translate_http_errors(name):
            return datasets.load_dataset(name, config, split=split, revision=revision, streaming=streaming)
    except OSError as error:  # no connection, offline mode, no such dataset: all are OSErrors
        raise OSError(
            f"Dataset {name!r} is no local folder, and could not be loaded from the Hub: {one_line(error)} {_DOWNLOAD_ADVICE % name}"
        ) from error


def load_local(root: Path, split: str, config: str | None, streaming: bool) -> AnyDataset:
    """The parquet files of a split by its names, or else what `datasets.load_dataset` gives for the folder.

    Streamed parquet files are read a few rows at a time.
    """
    is_configured = config is not None or (root / "README.md").is_file()  # which may say what belongs to a split
    if not is_configured and (files := find_parquet_files(root, SPLIT_ALIASES.get(split, (split,)))):
        return load_parquet(split, files, streaming)
    if streaming:
        builder = datasets.load_dataset_builder(str(root), config)
        addresses = (builder.config.data_files or {}).get(split)
        if builder.name == "parquet" and addresses:
            return stream_parquet(addresses, builder.info.features)
    return datasets.load_dataset(str(root), config, split=split, streaming=streaming)


def folders_of(root: Path) -> tuple[str, ...]:
    """Where files that the rows of a local dataset name may lie: in its folder, or in what was unpacked from it."""
    return os.path.abspath(root), os.path.realpath(root), *CACHES


def keep_columns(
    dataset: AnyDataset,
    columns: Mapping[str, str],
    folders: tuple[str, ...] = (),
    label_set: LabelSet | None = None,
) -> AnyDataset:
    """Keep columns of images under new names, and `id` where there is one.

    Decoding is left to `decode_example`, as `datasets.Image` would turn a mask by an EXIF tag that its image lacks.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): The dataset.
        columns (`Mapping[str, str]`): New name of each column, `image` or `annotation`.
        folders (`tuple[str, ...]`, *optional*): Where the files that rows name must lie: see `RowImage`. By default
            anywhere.
        label_set (`LabelSet`, *optional*): The classes that came with the dataset.

    Raises:
        ValueError: If a column is missing.
    """
    arguments = {"image": "image_column", "annotation": "label_column"}
    check_columns(dataset, {column: arguments[name] for column, name in columns.items()})
    dataset = dataset.select_columns([*columns, *(["id"] if "id" in column_names(dataset) else [])])
    dataset = dataset.rename_columns({old: new for old, new in columns.items() if old != new})
    for column in columns.values():
        feature = RowImage(folders=folders, label_set=label_set if column == "annotation" else None)
        dataset = dataset.cast_column(column, feature if folders else datasets.Image(decode=False))
    return dataset


def first_rows(dataset: AnyDataset, limit: int | None) -> AnyDataset:
    """The first so many rows of a dataset, or all.

    Raises:
        ValueError: If the number is not positive.
    """
    if limit is None:
        return dataset
    if limit < 1:
        raise ValueError(f"Keep at least 1 image, got {limit}; leave the number of samples out for all.")
    if isinstance(dataset, datasets.Dataset):
        return dataset.select(range(min(limit, len(dataset))))
    return dataset.take(limit)


def limited_split(split: str, limit: int | None) -> str:
    """Name of the first so many rows of a split, as `datasets` writes it."""
    return split if limit is None else f"{split}[:{limit}]"
