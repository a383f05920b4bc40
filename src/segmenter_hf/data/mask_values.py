"""The distinct pixels of the masks of a dataset: enough to find the classes and to count them, with each mask read once."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import datasets
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from .columns import AnyDataset
from .decoding import open_pair, row_label_set, row_name, stored_ids, translate_decoding_errors
from .described_masks import is_described
from .label_sets import LabelSet


@dataclass(frozen=True)
class MaskValues:
    """The distinct pixels of a mask.

    Args:
        row (`dict`): The row, with its image only where the mask is described, for it is drawn when its classes are known.
        pixels (`Image.Image`, *optional*): The distinct pixels in one line, in the mode of the mask; nothing where the mask is
            described or cannot be used.
        counts (`np.ndarray` of shape `(num_pixels,)`): How often each occurs.
        problem (`str`): Why the mask cannot be used.
        is_jpeg (`bool`): Whether it is stored as JPEG, which changes pixels.
    """

    row: dict[str, Any]
    pixels: Image.Image | None = None
    counts: np.ndarray | None = None
    problem: str = ""
    is_jpeg: bool = False

    @property
    def name(self) -> str:
        """What to call the mask in messages."""
        return row_name(self.row)

    @property
    def is_described(self) -> bool:
        """Whether the mask is described, not stored."""
        return self.pixels is None and not self.problem

    def count_stored_ids(self, label_set: LabelSet | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The distinct ids of [`stored_ids`] and the number of their pixels.

        Raises:
            ValueError: If the mask cannot be used, or not with this label set.
        """
        if self.problem:
            raise ValueError(self.problem)
        if self.pixels is None or self.counts is None:
            _, mask = open_pair(self.row, label_set, None)
            values, counts = np.unique(stored_ids(mask, self.name, label_set), return_counts=True)
            return values, counts
        ids = stored_ids(self.pixels, self.name, label_set, self.counts)
        values, places = np.unique(ids, return_inverse=True)
        counts = np.zeros(len(values), np.int64)
        np.add.at(counts, places.ravel(), self.counts)
        return values, counts

    def row_label_set(self, label_set: LabelSet | None) -> LabelSet | None:
        """The label set for the stored ids: see [`row_label_set`]."""
        return row_label_set(self.row, label_set)


class MaskReader:
    """The masks of a dataset, each read once: what iterations read is kept, until `consume` gives it away.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): As from `load_segmentation_datasets`.
        max_images (`int`, *optional*): Read only so many masks from the beginning.
        show_progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.
    """

    def __init__(self, dataset: AnyDataset, max_images: int | None = None, show_progress: bool = True) -> None:
        self.dataset, self.max_images, self.show_progress = dataset, max_images, show_progress
        self._restart()

    def _restart(self) -> None:
        self._kept: list[MaskValues] = []
        self._unread = self._read()

    def _read(self) -> Iterator[MaskValues]:
        length = len(self.dataset) if isinstance(self.dataset, datasets.Dataset) else None
        total = self.max_images if length is None else min(length, self.max_images or length)
        rows = itertools.islice(self.dataset, self.max_images)
        for row in tqdm(rows, "Checking masks", total, disable=not self.show_progress, unit="image"):
            yield mask_values(row)

    def __iter__(self) -> Iterator[MaskValues]:
        for index in itertools.count():
            if index == len(self._kept):
                values = next(self._unread, None)
                if values is None:
                    return
                self._kept.append(values)
            yield self._kept[index]

    def consume(self) -> Iterator[MaskValues]:
        """All masks once more; what was not read yet is read, and nothing is kept."""
        yield from itertools.chain(self._kept, self._unread)
        self._restart()


AnyMasks: TypeAlias = AnyDataset | MaskReader


def as_reader(masks: AnyMasks, max_images: int | None = None, show_progress: bool = False) -> MaskReader:
    """The reader that was given, or one of a dataset."""
    return masks if isinstance(masks, MaskReader) else MaskReader(masks, max_images, show_progress)


def mask_values(row: dict[str, Any]) -> MaskValues:
    """The distinct pixels of the mask of a row, which has the size of its image."""
    annotation = row["annotation"]
    if is_described(annotation):
        return MaskValues(row)
    path = annotation.get("path") if isinstance(annotation, dict) else None
    kept = {"id": row.get("id"), "annotation": {"bytes": None, "path": path}}
    try:
        _, mask = open_pair(row, None, None)
        with translate_decoding_errors(row_name(row)):
            mask.load()
    except ValueError as error:
        return MaskValues(kept, problem=str(error))
    return MaskValues(kept, *distinct_pixels(mask), is_jpeg=getattr(mask, "format", None) == "JPEG")


def distinct_pixels(mask: Image.Image) -> tuple[Image.Image, np.ndarray]:
    """An image of one line that holds each pixel of a mask once, in the mode of the mask, and how often each occurs.

    Modes that no mask may have are left as they are.
    """
    array = np.asarray(mask)
    if mask.mode in ("RGB", "RGBA", "LA"):
        num_channels = array.shape[-1]
        codes = array.astype(np.uint32) @ (2 ** (8 * np.arange(num_channels, dtype=np.uint32)))
        values, counts = np.unique(codes, return_counts=True)
        digits = values.astype("<u4")[:, None].view(np.uint8)[None, :, :num_channels]
        return Image.fromarray(np.ascontiguousarray(digits)), counts
    if mask.mode not in ("1", "L", "P", "I", "I;16"):
        return mask, np.ones(array.size, np.int64)
    if array.dtype == np.uint8:
        histogram = np.bincount(array.ravel(), minlength=256)
        values = np.flatnonzero(histogram).astype(np.uint8)
        counts = histogram[values]
    else:
        values, counts = np.unique(array, return_counts=True)
    pixels = Image.fromarray(values[None])
    if mask.mode == "P":
        pixels.putpalette(mask.getpalette("RGB") or [], "RGB")
    return pixels, counts
