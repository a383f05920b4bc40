"""Decoding of rows: encoded files to an image and its mask of class ids, the one place where masks get their meaning."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ..models.image_io import IMAGE_FORMATS, pil_to_array
from .encoded_images import encoded_bytes
from .folder_layouts import TRAIN_IDS_ENDING
from .label_sets import LabelSet, map_labels


def decode_example(
    example: dict[str, Any],
    label_set: LabelSet | None = None,
    *,
    ignore_index: int = 255,
    reduce_labels: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes a row into an image and its mask of class ids.

    An EXIF orientation of the image is applied. The mask is drawn over the image as it is seen, so its own EXIF
    orientation is applied only if the image has one.

    A file named `*_labelTrainIds.png`, as Cityscapes' tools write it, holds class ids already: the map of the label set is
    not applied to it.

    Args:
        example (`dict`):
            A row with `image` and `annotation`, each encoded (`{"bytes", "path"}`) or a PIL image. Masks may be grey in 1,
            8, 16 or 32 bits, palette images (the index counts), or RGB with three equal channels.
        label_set (`LabelSet`, *optional*):
            Gives the map from stored ids to class ids and the ignore index; excludes the next two.
        ignore_index (`int`, *optional*, defaults to 255):
            Label of pixels without a class.
        reduce_labels (`bool`, *optional*, defaults to `False`):
            Whether stored 0 means "no class" and becomes `ignore_index`, and the other ids shift down by one.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: the image, uint8 of shape `(height, width, 3)`, and the mask of shape `(height,
        width)`: uint8 if all ids fit, else int32.

    Raises:
        `ValueError`: If a file cannot be decoded, is of an unexpected kind, or the sizes of image and mask differ.
    """
    image, mask = open_pair(example)
    if image.mode == "F":
        raise ValueError(f"{row_name(example)}: expected an image of 8 or 16 bits per channel, got floats.")
    stored = stored_ids(mask, row_name(example, "annotation"))
    with _translate_decoding_errors(row_name(example, "image")):
        pixels = np.ascontiguousarray(np.moveaxis(pil_to_array(image, do_convert_rgb=True), 0, -1))
    return pixels, class_ids(stored, row_label_set(example, label_set), ignore_index, reduce_labels)


def open_pair(example: dict[str, Any]) -> tuple[Image.Image, Image.Image]:
    """Opens image and mask, both upright, without decoding more than needed."""
    image, mask = _open_image(example, "image"), _open_image(example, "annotation")
    with _translate_decoding_errors(row_name(example, "image")):
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        image = ImageOps.exif_transpose(image) if turned else image
    with _translate_decoding_errors(row_name(example, "annotation")):
        mask = ImageOps.exif_transpose(mask) if turned else mask
    if image.size != mask.size:
        raise ValueError(
            f"{row_name(example)}: expected a mask of the size of the image, got (width, height) {mask.size} "
            f"for an image of {image.size}."
        )
    return image, mask


def _open_image(example: dict[str, Any], column: str) -> Image.Image:
    value = example[column]
    if value is None:
        raise ValueError(f"{row_name(example)}: the row has no {column}. Give it one, or leave the row out.")
    if isinstance(value, Image.Image):
        return value
    with _translate_decoding_errors(row_name(example, column)):
        return Image.open(io.BytesIO(encoded_bytes(value)), formats=IMAGE_FORMATS)


@contextmanager
def _translate_decoding_errors(name: str) -> Iterator[None]:
    """Turns PIL's errors, which do not say which file they are about, into a `ValueError` that does."""
    try:
        yield
    except (Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise ValueError(f"{name}: cannot be read as an image: {error}") from error


def row_name(example: dict[str, Any], column: str = "annotation") -> str:
    """Returns what to call a row, or the file in one of its columns, in a message."""
    value = example.get(column)
    path = value.get("path") if isinstance(value, dict) else None
    names = [str(name) for name in (example.get("id"), path) if name is not None]
    return f"{names[0]} ({names[1]})" if len(names) == 2 else names[0] if names else f"an {column} without a name"


def stored_ids(mask: Image.Image, name: str) -> np.ndarray:
    """Returns the ids as stored, of shape (height, width) and some integer dtype."""
    with _translate_decoding_errors(name):
        ids = np.asarray(mask)
    if mask.mode in ("RGB", "RGBA", "LA"):
        colors = ids[..., :3] if mask.mode != "LA" else ids[..., :1]
        if (colors != colors[..., :1]).any():
            raise ValueError(
                f"{name}: expected a mask of class ids, got an RGB picture with colours. Convert it with the palette "
                "that it was made with: one id per colour, saved as an 8-bit grey PNG."
            )
        ids = colors[..., 0]
    if ids.dtype == bool:
        ids = ids.astype(np.uint8)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{name}: expected a mask of class ids in grey or palette mode, got mode {mask.mode}.")
    return ids


def row_label_set(example: dict[str, Any], label_set: LabelSet | None) -> LabelSet | None:
    """The label set without its map where the name of the mask says that it holds class ids."""
    value = example["annotation"]
    path = value.get("path") if isinstance(value, dict) else None
    if label_set is None or not (path or "").endswith(TRAIN_IDS_ENDING):
        return label_set
    return replace(label_set, label_id_to_train_id=None)


def class_ids(stored: np.ndarray, label_set: LabelSet | None, ignore_index: int, reduce_labels: bool) -> np.ndarray:
    """Maps stored ids to class ids: uint8 if they fit, else int32."""
    if label_set is not None:
        ignore_index, reduce_labels = label_set.ignore_index, label_set.reduce_labels
        if label_set.label_id_to_train_id is not None:
            stored = map_labels(stored, label_set.label_id_to_train_id, ignore_index)
    if reduce_labels:
        ignored = (stored == 0) | (stored == ignore_index)
        stored = np.where(ignored, ignore_index, stored.astype(np.int32) - 1)
    fits = stored.dtype == np.uint8 or (stored.min(initial=0) >= 0 and stored.max(initial=0) <= 255)
    return stored.astype(np.uint8 if fits else np.int32, copy=False)
