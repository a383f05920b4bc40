"""Which label set fits a dataset: the one that was named, the one that lies beside the data, or one made of its masks."""

import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from PIL import Image

from .decoding import has_colors, stored_ids
from .label_sets import BINARY_MASK_IDS, BINARY_OR_BIT_IDS, LabelSet, label_set_from_names, load_label_set
from .loading import AnyDataset
from .mask_checks import infer_num_labels
from .mask_values import AnyMasks, MaskReader, as_reader


logger = logging.getLogger(__name__)

BINARY_NAMES = ("background", "foreground")
NUM_PALETTES = 100  # that are compared with the colors of the classes


def resolve_label_set(
    masks: AnyMasks,
    name_or_path: str | None = None,
    *,
    num_labels: int | None = None,
    ignore_index: int | None = None,
    do_reduce_labels: bool = False,
    max_images: int | None = None,
) -> LabelSet:
    """Find the classes of a dataset, and how its masks store them.

    Args:
        masks (`datasets.Dataset`, `datasets.IterableDataset` or `MaskReader`):
            The dataset, as from `load_segmentation_datasets`; or a reader of it, to read the masks once for this and
            `check_masks`.
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
            Look at so many masks of a dataset at most.

    Returns:
        `LabelSet`: It also says whether masks store colors, or 0 and 255: see `fit_to_masks`.

    Raises:
        FileNotFoundError: If there is no such label set.
        ValueError: If the arguments do not fit together, or the masks cannot be used.
    """
    changes: dict[str, Any] = {} if ignore_index is None else {"ignore_index": ignore_index}
    if do_reduce_labels:
        changes["reduce_labels"] = True
    reader = as_reader(masks, max_images)
    found = load_label_set(name_or_path) if name_or_path is not None else dataset_label_set(reader.dataset)
    if found is None:
        return _made_of_masks(reader, num_labels, changes)
    if num_labels not in (None, found.num_labels):
        raise ValueError(
            f"`num_labels` is {num_labels}, but the label set {found.name!r} has {found.num_labels} classes: give one of both."
        )
    found = replace(found, **changes)
    return fit_to_masks(found, reader, keep_ignored=ignore_index is not None)


def dataset_label_set(dataset: AnyDataset) -> LabelSet | None:
    """The label set that came with a dataset: in a file beside its images, or in its annotations."""
    return getattr((dataset.features or {}).get("annotation"), "label_set", None)


def fit_to_masks(label_set: LabelSet, masks: AnyMasks, *, keep_ignored: bool = False) -> LabelSet:
    """Adapt a label set to masks that store colors, or 0 and 255 for two classes (one beside the background).

    Args:
        label_set (`LabelSet`): The classes.
        masks (`datasets.Dataset`, `datasets.IterableDataset` or `MaskReader`): See `resolve_label_set`.
        keep_ignored (`bool`, *optional*, defaults to `False`): Whether the ignore index means "no class" even where it is all
            there is beside 0.

    Returns:
        `LabelSet`: With `color_masks`, or with a `label_id_to_train_id`, or as it was.
    """
    reader = as_reader(masks)
    if label_set.color_masks:
        return label_set
    if store_colors(reader):
        return replace(label_set, color_masks=True, label_id_to_train_id=None, reduce_labels=False)
    if label_set.label_id_to_train_id is not None or label_set.reduce_labels:
        return label_set
    if store_grays(reader, label_set, label_set.ignore_index if keep_ignored else None):
        return replace(label_set, color_masks=True)
    if palettes_differ(reader, label_set):
        logger.warning("The palettes of the masks hold the colors of the classes in another order: the colors count.")
        return replace(label_set, color_masks=True)
    if keep_ignored or label_set.num_labels > 2 or not are_binary(reader):
        return label_set
    logger.warning(
        "All masks hold 0 and 255 only: 255 is the class %r. If it marks pixels without a class, give it as the ignore index.",
        label_set.labels[-1],
    )
    has_bits = any(pixels.mode == "1" for pixels, _ in _stored_pixels(reader))
    return replace(label_set, label_id_to_train_id=dict(BINARY_OR_BIT_IDS if has_bits else BINARY_MASK_IDS))


def fit_changed_to_masks(label_set: LabelSet, masks: AnyMasks, changes: Mapping[str, Any]) -> LabelSet:
    """The label set with what was said otherwise, such as another ignore index, adapted as by [`fit_to_masks`]."""
    return fit_to_masks(replace(label_set, **changes), masks, keep_ignored="ignore_index" in changes)


def _made_of_masks(reader: MaskReader, num_labels: int | None, changes: dict[str, Any]) -> LabelSet:
    if num_labels in (None, 1, 2) and not changes:
        binary_names = BINARY_NAMES[-1:] if num_labels == 1 else BINARY_NAMES
        binary = fit_to_masks(label_set_from_names(binary_names, "binary"), reader)
        if binary.label_id_to_train_id is not None:
            return binary
    if num_labels is None:
        num_labels = infer_num_labels(reader, **changes)
        logger.warning("Found %d classes in the masks; name them with `label_set`.", num_labels)
    names = [f"class {index}" for index in range(num_labels)]
    made = label_set_from_names(names, ignore_index=changes.get("ignore_index", 255))
    return replace(made, reduce_labels="reduce_labels" in changes)


# What masks store


def store_colors(masks: AnyMasks) -> bool:
    """Whether the masks of a dataset store colors: they are RGB, and the channels of one differ somewhere."""
    for pixels, _ in _stored_pixels(masks):
        if pixels.mode not in ("RGB", "RGBA"):
            return False
        if has_colors(pixels, ""):
            return True
    return False


def store_grays(masks: AnyMasks, label_set: LabelSet, ignored: int | None = None) -> bool:
    """Whether gray masks hold the colors of a label set, as 255 for white, and not class ids or `ignored`."""
    colors = [color for color in (*label_set.colors, *label_set.ignore_colors) if len(set(color)) == 1]
    grays = {color[0] for color in colors} - {ignored}
    found: set[int] = set()
    for pixels, name in _stored_pixels(masks):
        if not grays or pixels.mode not in ("1", "L", "RGB", "RGBA"):
            return False
        stored = stored_ids(pixels, name) * (255 if pixels.mode == "1" else 1)
        found.update(stored.ravel().tolist())
        if not found <= grays:
            return False
    return not found <= set(range(label_set.num_labels))


def palettes_differ(masks: AnyMasks, label_set: LabelSet) -> bool:
    """Whether palette masks show only colors of a label set, and one of the first another class than its index.

    So programs that make PNG smaller store masks of colors.
    """
    colors = [*label_set.colors, *label_set.ignore_colors]
    if len(set(colors)) < len(colors):
        return False
    by_color, differ = replace(label_set, color_masks=True), False
    for pixels, name in itertools.islice(_stored_pixels(masks), NUM_PALETTES):
        if pixels.mode != "P":
            return False
        try:
            differ |= bool((stored_ids(pixels, name, by_color) != stored_ids(pixels, name)).any())
        except ValueError:  # a color of no class
            return False
    return differ


def are_binary(masks: AnyMasks) -> bool:
    """Whether the masks of a dataset hold no values but 0 and 255, or bits, and one holds 255. Stops at the first other value."""
    found: set[int] = set()
    for pixels, name in _stored_pixels(masks):
        stored = set(stored_ids(pixels, name).ravel().tolist())
        if not stored <= BINARY_MASK_IDS.keys() and pixels.mode != "1":
            return False
        found |= stored
    return 255 in found


def _stored_pixels(masks: AnyMasks) -> Iterator[tuple[Image.Image, str]]:
    """The distinct pixels of stored masks that can be read, and their names: `check_masks` reports the others.

    It ends at the first mask that is described: it names its classes.
    """
    for mask in as_reader(masks):
        if mask.is_described:
            return
        if mask.pixels is not None:
            yield mask.pixels, mask.name
