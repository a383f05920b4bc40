"""Decoding of rows: encoded files to an image and its mask of class ids, the one place where masks get their meaning."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ..models.image_io import IMAGE_FORMATS, check_channels, load_array, pil_to_array
from .described_masks import draw_mask, is_described
from .encoded_images import encoded_bytes
from .folder_layouts import TRAIN_IDS_ENDING
from .label_sets import LabelSet, map_labels


def decode_example(
    example: dict[str, Any],
    label_set: LabelSet | None = None,
    *,
    ignore_index: int = 255,
    reduce_labels: bool = False,
    num_channels: int = 3,
) -> tuple[np.ndarray, np.ndarray]:
    """Decode a row into an image and its mask of class ids.

    An EXIF orientation of the image is applied. The mask is drawn over the image as it is seen, so its own EXIF
    orientation is applied only if the image has one.

    A file named `*_labelTrainIds.png`, as Cityscapes' tools write it, holds class ids already: the map of the label set is
    not applied to it.

    Args:
        example (`dict`):
            A row with `image` and `annotation`, each encoded (`{"bytes", "path"}`) or a PIL image. Masks may be gray in 1,
            8, 16 or 32 bits, palette images (the index counts), or RGB with three equal channels; with the `color_masks` of
            a label set, images of its colors in any mode.
        label_set (`LabelSet`, *optional*):
            Says what is stored: colors, or ids and the map to class ids, and the ignore index; excludes the next two.
        ignore_index (`int`, *optional*, defaults to 255):
            Label of pixels without a class.
        reduce_labels (`bool`, *optional*, defaults to `False`):
            Whether stored 0 means "no class" and becomes `ignore_index`, and the other ids shift down by one.
        num_channels (`int`, *optional*, defaults to 3):
            Channels of the model, which the image must have.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: the image of shape `(height, width, num_channels)`, uint8 or, where it has more
        depth, in the dtype that it is stored in; and the mask of shape `(height, width)`: uint8 if all ids fit, else int32.

    Raises:
        ValueError: If a file cannot be decoded, is of an unexpected kind, or the sizes of image and mask differ.
    """
    image, mask = open_pair(example, label_set, num_channels)
    stored = stored_ids(mask, row_name(example, "annotation"), label_set)
    ids = class_ids(stored, row_label_set(example, label_set), ignore_index, reduce_labels)
    if isinstance(image, Image.Image) and image.mode == "F" and num_channels == 1:
        with translate_decoding_errors(row_name(example, "image")):
            image = np.asarray(image)[None]
    if isinstance(image, np.ndarray):
        if np.issubdtype(image.dtype, np.floating) and not np.isfinite(image).all():
            raise ValueError(
                f"{row_name(example, 'image')}: the image holds NaN or infinite values. Replace them, for example with 0."
            )
        return np.ascontiguousarray(np.moveaxis(image, 0, -1)), ids
    if image.mode == "F":
        raise ValueError(
            f"{row_name(example, 'image')}: expected an image of 8 or 16 bits per channel, got floats of one channel. Save "
            "it as .npy, or as TIFF with all channels."
        )
    with translate_decoding_errors(row_name(example, "image")):
        if num_channels in (1, 3) and image.mode.startswith("I"):
            return np.repeat(gray_values(image)[..., None], num_channels, axis=2), ids
        pixels = np.ascontiguousarray(np.moveaxis(pil_to_array(image, do_convert_rgb=num_channels == 3), 0, -1))
    return pixels, ids


def gray_values(image: Image.Image) -> np.ndarray:
    """The values of a gray image of 16 bits or more: uint16 if they fit."""
    values = np.asarray(image)
    fits = values.dtype == np.uint16 or (values.min(initial=0) >= 0 and values.max(initial=0) <= 65535)
    return values.astype(np.uint16) if fits else values


def open_pair(
    example: dict[str, Any], label_set: LabelSet | None = None, num_channels: int | None = 3
) -> tuple[Image.Image | np.ndarray, Image.Image]:
    """Open image and mask, both upright, without decoding more than needed; a mask that is described is drawn.

    Images that Pillow does not read, with more channels or depth, come as an array (channels, height, width). Without
    `num_channels` they may have any number.
    """
    image, mask = open_channels(example, num_channels), open_image(example, "annotation", label_set)
    if isinstance(image, np.ndarray):
        _check_sizes(example, image.shape[:0:-1], mask.size)
        return image, mask
    with translate_decoding_errors(row_name(example, "image")):
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        image = ImageOps.exif_transpose(image) if turned else image
    with translate_decoding_errors(row_name(example, "annotation")):
        mask = ImageOps.exif_transpose(mask) if turned else mask
    _check_sizes(example, image.size, mask.size)
    return image, mask


def _check_sizes(example: dict[str, Any], image_size: tuple[int, ...], mask_size: tuple[int, int]) -> None:
    if image_size != mask_size:
        raise ValueError(
            f"{row_name(example)}: expected a mask of the size of the image, got (width, height) {mask_size} "
            f"for an image of {image_size}."
        )


def open_channels(example: dict[str, Any], num_channels: int | None = 3) -> Image.Image | np.ndarray:
    """Open the image of a row: see [`read_channels`] for the kinds of files; JPEG, PNG and others are not decoded yet."""
    value, name = example["image"], row_name(example, "image")
    image: Image.Image | np.ndarray
    if not isinstance(value, dict):
        image = open_image(example, "image")
    else:
        try:
            content = encoded_bytes(value)
        except FileNotFoundError as error:
            raise ValueError(f"{name}: cannot be read as an image: {error}") from error
        array = load_array(io.BytesIO(content), name, num_channels)
        if array is not None:
            image = array
        else:
            with translate_decoding_errors(name):
                image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
    if num_channels is not None:
        check_channels(image, num_channels, name)
    return image


def open_image(example: dict[str, Any], column: str, label_set: LabelSet | None = None) -> Image.Image:
    """Open the image in a column of a row, whose pixels are not decoded yet; a mask that is described is drawn."""
    value = example[column]
    if value is None:
        raise ValueError(f"{row_name(example)}: the row has no {column}. Give it one, or leave the row out.")
    if isinstance(value, Image.Image):
        return value
    if column == "annotation" and is_described(value):
        return draw_mask(value, label_set, row_name(example))
    name = row_name(example, column)
    try:
        content = encoded_bytes(value)  # a server that gives no answer now is no error of the file
    except FileNotFoundError as error:
        raise ValueError(f"{name}: cannot be read as an image: {error}") from error
    with translate_decoding_errors(name):
        image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
        return unstretched(image, name) if column == "annotation" else image


def unstretched(mask: Image.Image, name: str) -> Image.Image:
    """A mask whose pixels are what the file stores: Pillow spreads gray of 2 and 4 bits, and of other PGM, over 0 to 255.

    Raises:
        ValueError: If it has 16 bits in each of several channels, of which Pillow drops half, or is spread over 16 bits.
    """
    tile: Any = mask.tile[0] if mask.tile else ("", None, 0, "")  # type: ignore[attr-defined]  # what will decode it
    decoder, _, _, parameters = tile
    stored = parameters[0] if isinstance(parameters, tuple) and parameters else parameters
    if isinstance(stored, str) and stored.startswith(("RGB", "LA")) and "16" in stored:
        raise ValueError(
            f"{name}: expected a mask of class ids, got one of 16 bits in several channels, which would be cut to 8. Save it "
            "as gray of 8 or 16 bits."
        )
    if decoder in ("ppm", "ppm_plain"):
        highest = parameters[-1]
    else:
        highest = {"L;2": 3, "L;4": 15}.get(str(stored))
    if highest not in (None, 255, 65535) and mask.mode in ("I", "RGB"):
        raise ValueError(f"{name}: expected a mask of values up to 255 or 65535, got {highest}. Save it as PNG.")
    if mask.mode != "L" or highest is None:
        return mask
    return mask.point([round(value * highest / 255) for value in range(256)])


@contextmanager
def translate_decoding_errors(name: str) -> Iterator[None]:
    """Turn PIL's errors, which do not say which file they are about, into a `ValueError` that does."""
    try:
        yield
    except UnidentifiedImageError as error:  # its text is that of an object in memory
        raise ValueError(
            f"{name}: cannot be read as an image: it is damaged, or none of {', '.join(IMAGE_FORMATS)}. Save it again; masks as PNG."
        ) from error
    except (Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise ValueError(f"{name}: cannot be read as an image: {error}") from error


def row_name(example: dict[str, Any], column: str = "annotation") -> str:
    """What to call a row, or the file in one of its columns, in a message."""
    value = example.get(column)
    path = value.get("path") if isinstance(value, dict) else None
    names = [str(name) for name in (example.get("id"), path) if name is not None]
    return f"{names[0]} ({names[1]})" if len(names) == 2 else names[0] if names else f"an {column} without a name"


def stored_ids(
    mask: Image.Image, name: str, label_set: LabelSet | None = None, counts: np.ndarray | None = None
) -> np.ndarray:
    """The ids as stored, or those of the classes whose colors are stored.

    Args:
        mask (`Image.Image`): The mask.
        name (`str`): What to call it in errors.
        label_set (`LabelSet`, *optional*): Says whether masks store colors, and which.
        counts (`np.ndarray`, *optional*): How many pixels each pixel of `mask` stands for in errors; by default one.

    Returns:
        `np.ndarray` of shape `(height, width)`: Of some integer dtype.

    Raises:
        ValueError: If it cannot be decoded, holds something else, or a color of no class.
    """
    if label_set is not None and label_set.color_masks:
        return color_ids(_rgb_array(mask, name), label_set, name, counts)
    with translate_decoding_errors(name):
        ids = np.asarray(mask)
    if mask.mode in ("RGB", "RGBA", "LA"):
        colors = ids[..., :3] if mask.mode != "LA" else ids[..., :1]
        if (colors != colors[..., :1]).any():
            raise ValueError(
                f"{name}: expected a mask of class ids, got an RGB image with colors, {_most_frequent(_codes(colors), counts)}. Give "
                "the classes of the colors: as `label_set` with colors, or as colors.json or class_dict.csv (name, r, g, b) "
                "beside the data; or convert the mask with its palette to ids, saved as an 8-bit gray PNG."
            )
        ids = colors[..., 0]
    if ids.dtype == bool:
        ids = ids.astype(np.uint8)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{name}: expected a mask of class ids in gray or palette mode, got mode {mask.mode}.")
    return ids


def has_colors(mask: Image.Image, name: str) -> bool:
    """Whether a mask stores colors: it is RGB, and somewhere its channels differ."""
    if mask.mode not in ("RGB", "RGBA"):
        return False
    colors = _rgb_array(mask, name)
    return bool((colors != colors[..., :1]).any())


def color_ids(colors: np.ndarray, label_set: LabelSet, name: str, counts: np.ndarray | None = None) -> np.ndarray:
    """The class ids of colors.

    Args:
        colors (`np.ndarray` of shape `(height, width, 3)` and dtype `uint8`): RGB.
        label_set (`LabelSet`): The color of each class.
        name (`str`): What to call the mask in errors.
        counts (`np.ndarray`, *optional*): How many pixels each color stands for in errors; by default one.

    Returns:
        `np.ndarray` of shape `(height, width)` and dtype `int32`: The ids; `ignore_index` where the color is ignored.

    Raises:
        ValueError: If a color is of no class; names the colors and the number of their pixels.
    """
    known = _codes(np.array([*label_set.colors, *label_set.ignore_colors], dtype=np.uint8).reshape(-1, 3))
    ids = np.full(len(known), label_set.ignore_index, dtype=np.int32)
    ids[: label_set.num_labels] = np.arange(label_set.num_labels)
    order = np.argsort(known)
    codes = _codes(colors)
    places = np.searchsorted(known[order], codes).clip(max=len(known) - 1)
    is_wrong = known[order][places] != codes
    if is_wrong.any():
        counts = np.ones(codes.shape, np.int64) if counts is None else counts.reshape(codes.shape)
        found = _most_frequent(codes[is_wrong], counts[is_wrong])
        raise ValueError(
            f"{name}: {counts[is_wrong].sum()} of {counts.sum()} pixels have colors that are not in the label set "
            f"{label_set.name!r}: {found}. Add them to its file: with the name of their class, or as `__ignore__` where there "
            "is none. If there are many, the mask was saved as JPEG or enlarged smoothly: save it as PNG without either."
        )
    return ids[order][places]


def _rgb_array(mask: Image.Image, name: str) -> np.ndarray:
    if mask.mode not in ("1", "L", "P", "RGB", "RGBA"):
        raise ValueError(f"{name}: expected a mask of colors in RGB or palette mode, got mode {mask.mode}.")
    with translate_decoding_errors(name):
        return np.asarray(mask.convert("RGB"))


def _codes(colors: np.ndarray) -> np.ndarray:
    """Colors of shape (..., 3) as one integer each."""
    return colors.astype(np.int32) @ np.array([2**16, 2**8, 1], dtype=np.int32)


def _most_frequent(codes: np.ndarray, counts: np.ndarray | None = None, limit: int = 5) -> str:
    """The most frequent of some colors with the number of their pixels, in words."""
    values, places = np.unique(codes, return_inverse=True)
    sums = np.bincount(places.ravel(), None if counts is None else counts.ravel()).astype(np.int64)
    shown = [
        f"({value >> 16}, {value >> 8 & 255}, {value & 255}) in {count} pixels"
        for count, value in sorted(zip(sums.tolist(), values.tolist()), reverse=True)[:limit]
    ]
    return ", ".join(shown) + (f" and {len(values) - limit} more" if len(values) > limit else "")


def row_label_set(example: dict[str, Any], label_set: LabelSet | None) -> LabelSet | None:
    """The label set for what `stored_ids` gives: without its map where that holds class ids already.

    That is so for masks that are described, and for files that are named as Cityscapes' tools name those of class ids.
    """
    value = example["annotation"]
    path = value.get("path") if isinstance(value, dict) else None
    if label_set is None or not (is_described(value) or (path or "").endswith(TRAIN_IDS_ENDING)):
        return label_set
    return replace(
        label_set, label_id_to_train_id=None, reduce_labels=label_set.reduce_labels and not is_described(value)
    )


def class_ids(stored: np.ndarray, label_set: LabelSet | None, ignore_index: int, reduce_labels: bool) -> np.ndarray:
    """Map stored ids to class ids: uint8 if they fit, else int32."""
    if label_set is not None:
        ignore_index, reduce_labels = label_set.ignore_index, label_set.reduce_labels
        if label_set.label_id_to_train_id is not None:
            stored = map_labels(stored, label_set.label_id_to_train_id, ignore_index)
    if reduce_labels:
        stored = stored.astype(np.int32)
        # Of n classes the last is stored as n, which `ignore_index` may be too: it is the class then.
        is_class = label_set is not None and ignore_index == label_set.num_labels
        ignored = (stored == 0) | ((stored == ignore_index) & (not is_class))
        stored = np.where(ignored, ignore_index, stored - 1)
    fits = stored.dtype == np.uint8 or (stored.min(initial=0) >= 0 and stored.max(initial=0) <= 255)
    return stored.astype(np.uint8 if fits else np.int32, copy=False)
