"""One image at several scales, and its windows, whose pixel values are made when they are asked for."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .resampling import resize_image, resize_labels, resized_size
from .window_geometry import Window, window_corners
from .worker_threads import run_in_threads


# What an image may be resized to, and enlarged to as float32 where it is shorter than a window: what is far beyond any
# real use would only fill the memory.
MAX_RESIZED_PIXELS, MAX_ENLARGED_PIXELS = 2**30, 2**26

Size = tuple[int, int]  # height, width


class Normalization(NamedTuple):
    """(pixels * factor - mean) / std, by channel; without what is `None`."""

    factor: float | None
    mean: float | Sequence[float] | None
    std: float | Sequence[float] | None

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Normalize (channels, height, width), in float32.

        Raises:
            ValueError: If the numbers of channels differ.
        """
        self.check_channels(len(image))
        (normalized,) = run_in_threads(self._normalize, [image], image.device)
        return normalized

    def check_channels(self, channels: int) -> None:
        """An image of so many channels can be normalized.

        Raises:
            ValueError: If the numbers of channels differ.
        """
        for values in (self.mean, self.std):
            if isinstance(values, Sequence) and len(values) != channels:
                raise ValueError(
                    f"The image has {channels} channels, and the model takes {len(values)}, one for each value of "
                    f"`image_mean` and `image_std`. Give an image of {len(values)} channels."
                )

    def _normalize(self, image: torch.Tensor) -> torch.Tensor:
        image = image.to(torch.float32, copy=True)
        if self.factor is not None:
            image.mul_(self.factor)
        if self.mean is not None:
            mean, std = (
                torch.as_tensor(v, device=image.device).float().reshape(-1, 1, 1) for v in (self.mean, self.std)
            )
            image.sub_(mean).div_(std)
        return image


class ScaledImage(NamedTuple):
    """An image (channels, height, width) at one scale, what normalizes parts of it, and its labels (height, width)."""

    pixels: torch.Tensor
    normalize: Normalization | None
    labels: torch.Tensor | None

    @property
    def size(self) -> Size:
        """(height, width) in pixels."""
        return self.pixels.shape[-2], self.pixels.shape[-1]

    def enlarged(self, smallest_side: int, image_size: Size) -> "ScaledImage":
        """The image of that size, which messages name, enlarged where a side is now shorter than `smallest_side`.

        The protocol enlarges after normalization, and cuts the longer side to whole pixels instead of rounding.

        Raises:
            ValueError: If it would become too large.
        """
        if min(self.size) >= smallest_side:
            return self
        size = enlarged_size(self.size, smallest_side, image_size)
        pixels = self.pixels if self.normalize is None else self.normalize(self.pixels)
        labels = None if self.labels is None else resize_labels(self.labels, size)
        return ScaledImage(resize_image(pixels, size), None, labels)


def enlarged_size(size: Size, smallest_side: int, image_size: Size) -> Size:
    """(height, width) of an image of that size after its shorter side was enlarged to `smallest_side` pixels.

    Args:
        size (`tuple[int, int]`): (height, width) in pixels; one is shorter than `smallest_side`.
        smallest_side (`int`): What the shorter side becomes.
        image_size (`tuple[int, int]`): The size that the message names: that of the image before it was resized.

    Returns:
        `tuple[int, int]`: Height and width in pixels.

    Raises:
        ValueError: If there would be too many pixels.
    """
    height, width = size
    if height < width:
        size = smallest_side, int(width / height * smallest_side)
    else:
        size = int(height / width * smallest_side), smallest_side
    if size[0] * size[1] > MAX_ENLARGED_PIXELS:
        raise ValueError(
            f"An image of {image_size[0]} x {image_size[1]} pixels is too thin for windows of {smallest_side}: it would become one of "
            f"{size[0]} x {size[1]}, expected at most {MAX_ENLARGED_PIXELS} pixels. Crop or pad it."
        )
    return size


def scaled_size(
    size: Size, scale: float, edges: tuple[int | None, int | None] | None, fixed_side: int | None = None
) -> Size:
    """(height, width) of an image of that size at a scale.

    Args:
        size (`tuple[int, int]`): (height, width) of the image in pixels.
        scale (`float`): Factor of the size.
        edges (`tuple[int, int]`, *optional*): Shortest and longest edge of the image at the scale 1, where it is resized.
        fixed_side (`int`, *optional*): Both sides of the image at the scale 1, where it is resized to a square.

    Returns:
        `tuple[int, int]`: Height and width in pixels.

    Raises:
        ValueError: If there are too many pixels.
    """
    if fixed_side is not None:
        height = width = max(int(fixed_side * scale), 1)
    elif edges is None:
        height, width = resized_size(*size, min(size) * scale)
    else:
        shortest, longest = (None if edge is None else int(edge * scale) for edge in edges)
        height, width = resized_size(*size, shortest or 0, longest)
    if height * width > max(MAX_RESIZED_PIXELS, size[0] * size[1]):
        raise ValueError(
            f"An image of {size[0]} x {size[1]} pixels would become one of {height} x {width}, expected at most "
            f'{MAX_RESIZED_PIXELS} pixels: lower `size` or `scales`, or give `size` a "longest_edge".'
        )
    return height, width


class ImageWindows:
    """The windows of an image, whose pixel values are made when they are asked for.

    Args:
        windows (`list[Window]`): All windows of all views of the image.
        scaled_images (`list[ScaledImage]`): The image at each scale.
        views_per_scale (`int`): 2 with flips, otherwise 1.
    """

    def __init__(self, windows: list[Window], scaled_images: list[ScaledImage], views_per_scale: int) -> None:
        self.windows = windows
        self._scaled_images = scaled_images
        self._views_per_scale = views_per_scale

    @classmethod
    def split(
        cls,
        scaled_images: list[ScaledImage],
        image_index: int,
        image_size: Size,
        do_flip: bool,
        window_size: int | None,
        window_stride: int,
    ) -> "ImageWindows":
        """Cut windows of the images of all scales; without `window_size` each is one window.

        Raises:
            ValueError: If an image would have too many windows.
        """
        windows = []
        for index, scaled in enumerate(scaled_images):
            height, width = scaled.size
            size, corners = scaled.size, [(0, 0)]
            if window_size is not None:
                size, corners = (window_size, window_size), window_corners(height, width, window_size, window_stride)
            for flip in range(1 + do_flip):
                view = (image_index, index * (1 + do_flip) + flip, flip)
                windows += [Window(*view, *corner, *size, height, width, *image_size) for corner in corners]
        return cls(windows, scaled_images, 1 + do_flip)

    def pixel_values(self, window: Window) -> torch.Tensor:
        """The normalized pixels (channels, height, width) of a window, float32."""
        scaled = self._scaled_images[window.view // self._views_per_scale]
        pixels = self._cut(scaled.pixels, window)
        return pixels if scaled.normalize is None else scaled.normalize(pixels)

    def labels(self, window: Window) -> torch.Tensor:
        """The labels (height, width) of a window, int64."""
        labels = self._scaled_images[window.view // self._views_per_scale].labels
        if labels is None:
            raise ValueError("Expected an image that was given with a label map, got one without.")
        return self._cut(labels, window)

    @staticmethod
    def _cut(array: torch.Tensor, window: Window) -> torch.Tensor:
        left = window.view_width - window.left - window.width if window.flip else window.left
        part = array[..., window.top : window.top + window.height, left : left + window.width]
        return part.flip(-1) if window.flip else part


__all__ = ["ImageWindows", "Normalization", "ScaledImage", "enlarged_size", "scaled_size"]
