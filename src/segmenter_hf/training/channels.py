"""What pixels of training images are: their statistics by channel, and how much of their range they use."""

import itertools
import logging
from typing import Any

import numpy as np
from PIL import Image

from ..data.decoding import gray_values, open_channels, row_name
from ..data.encoded_images import encoded_bytes
from ..data.loading import AnyDataset
from ..data.value_ranges import stored_value_range
from ..models.image_io import pil_to_array, scale_values
from ..models.image_processing_segmenter import SegmenterImageProcessor


logger = logging.getLogger(__name__)

MEASURED_IMAGES, WATCHED_IMAGES = 1000, 20  # of the training set, the first ones
LITTLE = 0.25  # of the range of 16 bits


def read_pixels(row: dict[str, Any], num_channels: int) -> np.ndarray:
    """The image of a row as (channels, height, width), in the depth that it is stored with."""
    image = open_channels(row, num_channels)
    if not isinstance(image, Image.Image):
        return image
    is_deep = num_channels in (1, 3) and image.mode.startswith("I")
    return gray_values(image)[None] if is_deep else pil_to_array(image, do_convert_rgb=num_channels == 3)


def measure_statistics(dataset: AnyDataset, processor: SegmenterImageProcessor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over the first 1000 images, of pixel values from 0 to 1.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): The training set.
        processor (`SegmenterImageProcessor`): Its channels and value range count.

    Returns:
        `tuple[list[float], list[float]]`: `image_mean` and `image_std`.

    Raises:
        ValueError: If an image has other channels than the model, or a channel is the same everywhere.
    """
    count, total, squares = 0, np.zeros(processor.num_channels), np.zeros(processor.num_channels)
    for row in itertools.islice(dataset, MEASURED_IMAGES):
        pixels = read_pixels(row, processor.num_channels)
        pixels = np.broadcast_to(pixels, (processor.num_channels, *pixels.shape[1:]))
        values = scale_values(pixels, processor.value_range).reshape(len(total), -1).astype(np.float64) / 255
        count += values.shape[1]
        total += values.sum(1)
        squares += np.square(values).sum(1)
    mean = total / max(count, 1)
    std = np.sqrt(np.maximum(squares / max(count, 1) - mean**2, 0))
    if not (std > 1e-6).all():
        constant = np.flatnonzero(std <= 1e-6).tolist()
        raise ValueError(
            f"Channels {constant} of the training images are the same everywhere, so `normalization` cannot be 'dataset'. "
            "Leave these channels out, or check `value_range`."
        )
    return mean.round(6).tolist(), std.round(6).tolist()


def find_value_range(dataset: AnyDataset, processor: SegmenterImageProcessor) -> None:
    """Give the processor the range of pixel values that the first images declare, unless it has one.

    Without one, warn where 16-bit images use little of their range, as those of sensors with 10, 12 or 14 bits do.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): The training set.
        processor (`SegmenterImageProcessor`): Its `value_range` is set.

    Raises:
        ValueError: If images hold floats, and no range is known.
    """
    if processor.value_range is not None:
        return
    deep: list[np.ndarray] = []
    ranges: list[Any] = []
    floats: str | None = None
    for row in itertools.islice(dataset, WATCHED_IMAGES):
        image = open_raw(row)
        if image is None:
            continue
        deep.append(image)
        ranges.append(row_value_range(row))
        if np.issubdtype(image.dtype, np.floating):
            floats = floats or f"{row_name(row, 'image')}: expected pixel values of 8 or 16 bits, got {image.dtype}"
    if ranges and None not in ranges:
        lows, highs = zip(*ranges)
        low, high = min(lows), max(highs)
        processor.value_range = [low, high]
        logger.warning(
            "The image files say that their values are from %g to %g: that is the `value_range` now.", low, high
        )
    elif floats is not None:
        raise ValueError(f"{floats}. Say which values are black and white with `value_range`, such as 0 1.")
    else:
        warn_of_little_range(deep)


def row_value_range(row: dict[str, Any]) -> tuple[float, float] | None:
    """The range that the image file of a row declares."""
    return stored_value_range(encoded_bytes(row["image"])) if isinstance(row["image"], dict) else None


def warn_of_little_range(deep: list[np.ndarray]) -> None:
    """Warn where 16-bit images use little of their range."""
    highest = max((int(image.max()) for image in deep), default=65535)
    if highest < LITTLE * 65535:
        bits = max(highest, 1).bit_length()
        logger.warning(
            "The 16-bit images use values up to %d of 65535, so that they are nearly black. Give the range of the sensor, "
            "such as `value_range` 0 %d.",
            highest,
            2**bits - 1,
        )


def open_raw(row: dict[str, Any]) -> np.ndarray | None:
    """The pixels of an image of 16 bits or floats; nothing of others, nor of one that cannot be read.

    What cannot be read is reported where the masks are checked, or in training.
    """
    try:
        image = open_channels(row, None)
        if isinstance(image, Image.Image):
            return np.asarray(image) if image.mode.startswith(("I", "F")) else None
    except (OSError, SyntaxError, ValueError):
        return None
    return image if image.dtype == np.uint16 or np.issubdtype(image.dtype, np.floating) else None
