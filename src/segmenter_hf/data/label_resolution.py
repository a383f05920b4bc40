"""Which label set fits a dataset: the one that was named, the one that lies beside the data, or one made of its masks."""

import itertools
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from .decoding import has_colors, open_image, row_name, stored_ids
from .described_masks import is_described
from .label_sets import BINARY_MASK_IDS, LabelSet, label_set_from_names, load_label_set
from .loading import AnyDataset
from .mask_checks import infer_num_labels


logger = logging.getLogger(__name__)

BINARY_NAMES = ("background", "foreground")


def resolve_label_set(
    dataset: AnyDataset,
    name_or_path: str | None = None,
    *,
    num_labels: int | None = None,
    ignore_index: int | None = None,
    do_reduce_labels: bool = False,
    max_images: int | None = None,
) -> LabelSet:
    """Find the classes of a dataset, and how its masks store them.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            As from `load_segmentation_datasets`.
        name_or_path (`str`, *optional*):
            Name or file of the label set. By default that of the dataset, where it has one, or else as many classes as the
            masks hold; masks of 0 and 255 have the two classes background and foreground.
        num_labels (`int`, *optional*):
            Number of classes, where nothing names them.
        ignore_index (`int`, *optional*):
            Label of pixels without a class; by default that of the label set.
        do_reduce_labels (`bool`, *optional*, defaults to `False`):
            Whether stored 0 means "no class" and the classes are stored from 1 on.
        max_images (`int`, *optional*):
            Look at so many masks at most.

    Returns:
        `LabelSet`: It also says whether masks store colors, or 0 and 255: see `fit_to_masks`.

    Raises:
        FileNotFoundError: If there is no such label set.
        ValueError: If the arguments do not fit together, or the masks cannot be used.
    """
    changes: dict[str, Any] = {} if ignore_index is None else {"ignore_index": ignore_index}
    if do_reduce_labels:
        changes["reduce_labels"] = True
    found = load_label_set(name_or_path) if name_or_path is not None else dataset_label_set(dataset)
    if found is None:
        return _made_of_masks(dataset, num_labels, changes, max_images)
    if num_labels not in (None, found.num_labels):
        raise ValueError(
            f"`num_labels` is {num_labels}, but the label set {found.name!r} has {found.num_labels} classes: give one of both."
        )
    found = replace(found, **changes)
    return fit_to_masks(found, dataset, keep_ignored=ignore_index is not None, max_images=max_images)


def dataset_label_set(dataset: AnyDataset) -> LabelSet | None:
    """The label set that came with a dataset: in a file beside its images, or in its annotations."""
    return getattr((dataset.features or {}).get("annotation"), "label_set", None)


def fit_to_masks(
    label_set: LabelSet, dataset: AnyDataset, *, keep_ignored: bool = False, max_images: int | None = None
) -> LabelSet:
    """Adapt a label set to masks that store colors, or 0 and 255 for two classes (one beside the background).

    Args:
        label_set (`LabelSet`): The classes.
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): As from `load_segmentation_datasets`.
        keep_ignored (`bool`, *optional*, defaults to `False`): Whether 255 means "no class" even where it is all there is
            beside 0.
        max_images (`int`, *optional*): Look at so many masks at most.

    Returns:
        `LabelSet`: With `color_masks`, or with a `label_id_to_train_id`, or as it was.
    """
    if label_set.color_masks:
        return label_set
    if store_colors(dataset, max_images):
        return replace(label_set, color_masks=True, label_id_to_train_id=None, reduce_labels=False)
    has_map = label_set.label_id_to_train_id is not None or label_set.reduce_labels
    if keep_ignored or has_map or label_set.num_labels > 2 or not are_binary(dataset, max_images):
        return label_set
    logger.warning(
        "All masks hold 0 and 255 only: 255 is the class %r. If it marks pixels without a class, set `ignore_index=255`.",
        label_set.labels[-1],
    )
    return replace(label_set, label_id_to_train_id=dict(BINARY_MASK_IDS))


def _made_of_masks(
    dataset: AnyDataset, num_labels: int | None, changes: dict[str, Any], max_images: int | None
) -> LabelSet:
    if num_labels in (None, 2) and not changes:
        binary = fit_to_masks(label_set_from_names(BINARY_NAMES, "binary"), dataset, max_images=max_images)
        if binary.label_id_to_train_id is not None:
            return binary
    if num_labels is None:
        num_labels = infer_num_labels(dataset, max_images=max_images, **changes)
        logger.warning("Found %d classes in the masks; name them with `label_set`.", num_labels)
    names = [f"class {index}" for index in range(num_labels)]
    made = label_set_from_names(names, ignore_index=changes.get("ignore_index", 255))
    return replace(made, reduce_labels="reduce_labels" in changes)


# What masks store


def store_colors(dataset: AnyDataset, max_images: int | None = None) -> bool:
    """Whether the masks of a dataset store colors: they are RGB, and the channels of one differ somewhere."""
    for mask, name in _masks(dataset, max_images):
        if mask.mode not in ("RGB", "RGBA"):
            return False
        if has_colors(mask, name):
            return True
    return False


def are_binary(dataset: AnyDataset, max_images: int | None = None) -> bool:
    """Whether the masks of a dataset hold no values but 0 and 255, and one holds 255. Stops at the first other value."""
    found: set[int] = set()
    for mask, name in _masks(dataset, max_images):
        found.update(np.unique(stored_ids(mask, name)).tolist())
        if not found <= BINARY_MASK_IDS.keys():
            return False
    return 255 in found


def _masks(dataset: AnyDataset, max_images: int | None) -> Iterator[tuple[Image.Image, str]]:
    """The stored masks that can be read, each with its name: `check_masks` reports the others."""
    column = dataset.select_columns(["annotation", *(["id"] if "id" in (dataset.column_names or []) else [])])
    for example in itertools.islice(column, max_images):
        name = row_name(example)
        if is_described(example["annotation"]):
            continue
        try:
            mask = open_image(example, "annotation")
            mask.load()
        except (OSError, SyntaxError, ValueError):
            continue
        yield mask, name
