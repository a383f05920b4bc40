"""Augmentation for training: transforms that move an image and its mask together, on uint8 arrays.

The law is that of rstrudel/segmenter and mmsegmentation (`Resize`, `RandomCrop`, `RandomFlip`, `PhotoMetricDistortion`,
`Pad`), in their order. Only the crop is ever computed: resizing is evaluated inside the crop window alone, which gives
the same pixels as resizing everything and cropping.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from ..models.resampling import linear_taps, resized_size


CropBox = tuple[int, int, int, int]  # top, left, height, width, in pixels

_NUM_CROP_DRAWS = 11  # a first one and ten more, as mmsegmentation's RandomCrop; the last one stands unchecked
_BRIGHTNESS_DELTA = 32.0
_CONTRAST_RANGE = (0.5, 1.5)
_SATURATION_RANGE = (0.5, 1.5)
_HUE_DELTA = 36.0  # degrees; 18 in the original, whose full circle is 180


@dataclass
class SegmentationAugmentation:
    """Random resize, balanced random crop, flip, photometric distortion and padding of an image and its mask.

    Args:
        crop_size (`int` or `tuple[int, int]`): Height and width of the result, in pixels; one number for a square.
        size (`int`): Short side of the image at ratio 1, in pixels.
        max_ratio (`float`): The long side at ratio 1 is at most `max_ratio * size`; 4 for ADE20K, 8 for Pascal
            Context, 2 for Cityscapes.
        ratio_range (`tuple[float, float]`, defaults to `(0.5, 2.0)`): The resize ratio is drawn uniformly from this
            range.
        cat_max_ratio (`float`, defaults to 0.75): A crop is drawn again, up to 10 times, while one class has at least
            this share of its valid pixels. 1 accepts any crop.
        flip_probability (`float`, defaults to 0.5): Probability of a horizontal flip.
        photometric_distortion (`bool`, defaults to `True`): Whether to change brightness, contrast, saturation and hue
            at random.
        ignore_index (`int`, defaults to 255): Label of pixels without a class, and of the padding.
        pad_value (`int` or `tuple[int, ...]`, defaults to 127): Color of the padding on the right and at the bottom.
            The original pads with 0 after the normalization, which is the mean color before it: give
            `255 * image_mean`, rounded. The default fits a mean of 0.5 (127.5).
        vertical_flip_probability (`float`, defaults to 0.0): Probability of a flip from top to bottom, for images
            without an up, such as those from above or of tissue.
        right_angle_rotations (`bool`, defaults to `False`): Whether to turn by 0, 90, 180 or 270 degrees, each as
            likely; the crop must be square.

    Raises:
        ValueError: If a field is out of range.
    """

    crop_size: int | tuple[int, int]
    size: int
    max_ratio: float
    ratio_range: tuple[float, float] = (0.5, 2.0)
    cat_max_ratio: float = 0.75
    flip_probability: float = 0.5
    photometric_distortion: bool = True
    ignore_index: int = 255
    pad_value: int | tuple[int, ...] = 127
    vertical_flip_probability: float = 0.0
    right_angle_rotations: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.crop_size, int):
            self.crop_size = (self.crop_size, self.crop_size)
        if min(*self.crop_size, self.size) < 1:
            raise ValueError(f"crop_size and size must be at least 1 pixel, got {self.crop_size} and {self.size}.")
        if self.max_ratio < 1:
            raise ValueError(f"max_ratio, long side to short side, must be at least 1, got {self.max_ratio}.")
        if not 0 < self.ratio_range[0] <= self.ratio_range[1]:
            raise ValueError(f"ratio_range must be two positive numbers in order, got {self.ratio_range}.")
        if not 0 < self.cat_max_ratio <= 1 or not 0 <= self.flip_probability <= 1:
            raise ValueError(
                "cat_max_ratio must be in (0, 1] and flip_probability in [0, 1], "
                f"got {self.cat_max_ratio} and {self.flip_probability}."
            )
        if not 0 <= self.vertical_flip_probability <= 1:
            raise ValueError(f"vertical_flip_probability must be in [0, 1], got {self.vertical_flip_probability}.")
        if self.right_angle_rotations and self.crop_size[0] != self.crop_size[1]:
            raise ValueError(f"right_angle_rotations need a square crop, got crop_size {self.crop_size}.")
        if np.min(self.pad_value) < 0 or np.max(self.pad_value) > 255:
            raise ValueError(f"pad_value must be in [0, 255], got {self.pad_value}.")

    def __call__(self, image: np.ndarray, mask: np.ndarray, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw one augmented pair.

        Args:
            image (`np.ndarray` of shape `(height, width, channels)`): Image, `uint8` or `uint16`. Its first three
                channels are distorted as RGB.
            mask (integer `np.ndarray` of shape `(height, width)`): Class ids and `ignore_index`.
            rng (`np.random.Generator`): Source of all draws; the caller gives every sample its own.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: the image, of shape `(crop height, crop width, channels)` and its dtype, and
            the mask, of shape `(crop height, crop width)` and the dtype of `mask`.

        Raises:
            ValueError: If the image is of another dtype or shape, or the mask is of another size.
        """
        if image.dtype not in (np.uint8, np.uint16) or image.ndim != 3:
            raise ValueError(
                "image must be uint8 or uint16 of shape (height, width, 3), or of another number of channels, got "
                f"{image.dtype} of {image.shape}."
            )
        if mask.shape != image.shape[:2]:
            raise ValueError(f"mask must have the size of the image, {image.shape[:2]}, got {mask.shape}.")
        size = rescaled_size(image.shape[:2], self.size, self.max_ratio, rng.uniform(*self.ratio_range))
        crop_size = self.crop_size if isinstance(self.crop_size, tuple) else (self.crop_size, self.crop_size)
        window = draw_crop_window(mask, size, crop_size, self.cat_max_ratio, self.ignore_index, rng)
        image, mask = resize_image(image, size, window), resize_mask(mask, size, window)
        if rng.random() < self.flip_probability:
            image, mask = horizontal_flip(image, mask)
        if self.vertical_flip_probability and rng.random() < self.vertical_flip_probability:
            image, mask = image[::-1], mask[::-1]
        if self.right_angle_rotations:
            turns = int(rng.integers(4))
            image, mask = np.rot90(image, turns), np.rot90(mask, turns)
        if self.photometric_distortion and image.shape[2] >= 3:
            image = np.concatenate([_distort(image[..., :3], rng), image[..., 3:]], axis=2)
        pad_value = self.pad_value if image.dtype == np.uint8 else tuple(257 * np.atleast_1d(self.pad_value))
        return pad_to_crop(image, mask, crop_size, pad_value, self.ignore_index)


def _distort(image: np.ndarray, rng: Generator) -> np.ndarray:
    """Photometric distortion of 8 or 16 bits; the levels of the latter are 257 times as fine."""
    if image.dtype == np.uint8:
        return photometric_distortion(image, rng)
    return np.rint(photometric_distortion(image.astype(np.float32) / 257, rng) * 257).astype(np.uint16)


def rescaled_size(image_size: tuple[int, int], size: int, max_ratio: float, ratio: float = 1.0) -> tuple[int, int]:
    """Return the size of an image fitted into (max_ratio * size, size) times `ratio`, as mmcv's `imrescale`.

    Args:
        image_size (`tuple[int, int]`): Height and width of the image, in pixels.
        size (`int`): Short side of the box, in pixels.
        max_ratio (`float`): Long side of the box over its short side.
        ratio (`float`, defaults to 1.0): Factor on both sides of the box.

    Returns:
        `tuple[int, int]`: new height and width, the aspect ratio kept up to rounding (half up), each at least 1.
    """
    return resized_size(*image_size, int(size * ratio), int(int(max_ratio * size) * ratio))


def resize_image(image: np.ndarray, size: tuple[int, int], window: CropBox | None = None) -> np.ndarray:
    """Resize an image, bilinear without antialiasing (`align_corners=False`), and return a window of the result.

    Args:
        image (`np.ndarray` of shape `(height, width, channels)` and dtype `uint8`): The image.
        size (`tuple[int, int]`): Height and width to resize to.
        window (`tuple[int, int, int, int]`, *optional*): Top, left, height and width of the part of the result to
            compute. All of it by default.

    Returns:
        `np.ndarray` of shape `(window height, window width, channels)` and dtype `uint8`.
    """
    top, left, height, width = window or (0, 0, *size)
    low_row, high_row, row_weight = linear_taps(image.shape[0], size[0], top, top + height)
    low_column, high_column, column_weight = linear_taps(image.shape[1], size[1], left, left + width)
    first = low_column[0]
    source = image[:, first : high_column[-1] + 1].astype(np.float32)
    rows = source[low_row]
    rows += (source[high_row] - rows) * row_weight.astype(np.float32)[:, None, None]
    result = rows[:, low_column - first]
    result += (rows[:, high_column - first] - result) * column_weight.astype(np.float32)[:, None]
    return np.rint(result, out=result).astype(image.dtype)


def resize_mask(mask: np.ndarray, size: tuple[int, int], window: CropBox | None = None) -> np.ndarray:
    """Resize a mask to the nearest label (pixel centers aligned, as PIL), and return a window of the result.

    Args:
        mask (`np.ndarray` of shape `(height, width)`): Labels of any dtype.
        size (`tuple[int, int]`): Height and width to resize to.
        window (`tuple[int, int, int, int]`, *optional*): Top, left, height and width of the part of the result to
            compute. All of it by default.

    Returns:
        `np.ndarray` of shape `(window height, window width)` and the dtype of `mask`.
    """
    top, left, height, width = window or (0, 0, *size)
    rows = _nearest_taps(mask.shape[0], size[0], top, height)
    columns = _nearest_taps(mask.shape[1], size[1], left, width)
    return mask[rows[:, None], columns]


def _nearest_taps(length: int, new_length: int, start: int, count: int) -> np.ndarray:
    position = (np.arange(start, start + count) + 0.5) * (length / new_length)
    return np.minimum(position.astype(np.intp), length - 1)


def draw_crop_window(
    mask: np.ndarray,
    size: tuple[int, int],
    crop_size: tuple[int, int],
    cat_max_ratio: float,
    ignore_index: int,
    rng: Generator,
) -> CropBox:
    """Draw where to crop, and again up to 10 times until the crop is balanced; the last draw stands.

    Args:
        mask (integer `np.ndarray` of shape `(height, width)`): Labels before the resize.
        size (`tuple[int, int]`): Height and width after the resize, which the crop is cut from.
        crop_size (`tuple[int, int]`): Height and width of the crop.
        cat_max_ratio (`float`): A balanced crop has at least two classes, each with less than this share of the valid
            pixels.
        ignore_index (`int`): Label of pixels that are not valid.
        rng (`np.random.Generator`): Source of the draws.

    Returns:
        `tuple[int, int, int, int]`: top, left, height and width of the crop, in pixels after the resize.
    """
    height, width = min(crop_size[0], size[0]), min(crop_size[1], size[1])
    for draw in range(_NUM_CROP_DRAWS):
        top, left = (int(rng.integers(0, margin + 1)) for margin in (size[0] - height, size[1] - width))
        window = (top, left, height, width)
        is_last = cat_max_ratio >= 1 or draw == _NUM_CROP_DRAWS - 1
        if is_last or is_balanced(resize_mask(mask, size, window), cat_max_ratio, ignore_index):
            break
    return window


def is_balanced(mask: np.ndarray, cat_max_ratio: float, ignore_index: int) -> bool:
    """Say whether a mask has two classes or more, each with less than `cat_max_ratio` of the valid pixels."""
    counts = np.bincount(mask[mask != ignore_index])
    return bool(np.count_nonzero(counts) > 1 and counts.max() < cat_max_ratio * counts.sum())


def horizontal_flip(image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mirror an image and its mask, left to right."""
    return image[:, ::-1], mask[:, ::-1]


def photometric_distortion(image: np.ndarray, rng: Generator) -> np.ndarray:
    """Change brightness, contrast, saturation and hue, each with probability 0.5, as mmsegmentation's class of that name.

    Brightness gets up to 32 levels more or less, contrast and saturation a factor from 0.5 to 1.5, hue a turn of up to 36
    degrees either way. Contrast comes before saturation and hue or after them, by a coin. Saturation and hue are
    changed in HSV, computed in float32 rather than in 8 bits with a hue of 180 steps.

    Args:
        image (`np.ndarray` of shape `(height, width, 3)` and dtype `uint8`): RGB image.
        rng (`np.random.Generator`): Source of the draws.

    Returns:
        `np.ndarray` of the same shape and dtype.
    """
    change_brightness, change_contrast, change_saturation, change_hue, contrast_first = rng.random(5) < 0.5
    delta = rng.uniform(-_BRIGHTNESS_DELTA, _BRIGHTNESS_DELTA) if change_brightness else 0.0
    contrast = rng.uniform(*_CONTRAST_RANGE) if change_contrast else 1.0
    saturation = rng.uniform(*_SATURATION_RANGE) if change_saturation else 1.0
    degrees = rng.uniform(-_HUE_DELTA, _HUE_DELTA) if change_hue else 0.0

    image = adjust_levels(image, 1.0, delta)
    if contrast_first:
        image = adjust_levels(image, contrast, 0.0)
    image = adjust_saturation_and_hue(image, saturation, degrees)
    if not contrast_first:
        image = adjust_levels(image, contrast, 0.0)
    return image


def adjust_levels(image: np.ndarray, factor: float, delta: float) -> np.ndarray:
    """Return `factor * image + delta`, rounded and cut to uint8."""
    if factor == 1 and delta == 0:
        return image
    if image.dtype == np.float32:
        return (image * np.float32(factor) + np.float32(delta)).clip(0, 255)
    table = np.rint(np.arange(256) * factor + delta).clip(0, 255).astype(np.uint8)
    return table[image]


def adjust_saturation_and_hue(image: np.ndarray, factor: float, degrees: float) -> np.ndarray:
    """Multiply the HSV saturation by `factor` (cut at 1) and turns the hue by `degrees`; the value stays.

    Args:
        image (`np.ndarray` of shape `(height, width, 3)` and dtype `uint8`): RGB image.
        factor (`float`): At least 0.
        degrees (`float`): From -180 to 180.

    Returns:
        `np.ndarray` of the same shape and dtype.
    """
    if factor == 1 and degrees == 0:
        return image
    red, green, blue = np.moveaxis(image, 2, 0).astype(np.float32)
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    divisor = np.where(chroma > 0, chroma, 1)  # where it is 0 the hue does not matter
    hue = np.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    hue = np.where(value == red, (green - blue) / divisor, hue) + degrees / 60
    hue[hue < 0] += 6
    hue[hue >= 6] -= 6
    chroma = np.minimum(chroma * factor, value)
    base = value - chroma + (0.5 if image.dtype == np.uint8 else 0)  # the half rounds
    result = np.empty_like(image)
    result[..., 0] = base + chroma * (np.abs(hue - 3) - 1).clip(0, 1)
    result[..., 1] = base + chroma * (2 - np.abs(hue - 2)).clip(0, 1)
    result[..., 2] = base + chroma * (2 - np.abs(hue - 4)).clip(0, 1)
    return result


def pad_to_crop(
    image: np.ndarray,
    mask: np.ndarray,
    crop_size: tuple[int, int],
    pad_value: int | tuple[int, ...],
    ignore_index: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Pad an image with a color and its mask with `ignore_index`, on the right and at the bottom."""
    height, width = mask.shape
    if (height, width) == tuple(crop_size):
        return np.ascontiguousarray(image), np.ascontiguousarray(mask)
    padded_image = np.full((*crop_size, image.shape[2]), pad_value, dtype=image.dtype)
    labels = np.result_type(mask.dtype, np.min_scalar_type(ignore_index))  # ids of 8 bits do not hold every index
    padded_mask = np.full(crop_size, ignore_index, dtype=labels)
    padded_image[:height, :width], padded_mask[:height, :width] = image, mask
    return padded_image, padded_mask
