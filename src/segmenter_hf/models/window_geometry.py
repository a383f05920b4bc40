"""Which window lies where, and what patch logits a pixel of the original image is made of.

The published protocol (rstrudel/segmenter, segm/model/utils.py) upsamples the patch logits of each window to pixels,
adds them up, divides by the number of windows over each pixel, resizes the result to the original size and flips it
back. All of this is linear, and separable into rows and columns. With the patch logits of the windows side by side in
one array L of shape (patch rows, patch columns, labels) it is

    scores = A_rows @ L @ A_columns^T

where A_rows has one row per pixel row of the original image. These matrices are built here, once per geometry, in float64,
and cut into tiles with the few columns that are not zero in each.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from .resampling import linear_matrix, linear_taps


MAX_WINDOWS = 2**20  # of a view; their description alone takes some 100 MB


class Window(NamedTuple):
    """One row of `window_offsets`: where a window lies, in pixels, in a view (an image resized and maybe flipped)."""

    image: int
    view: int
    flip: int
    top: int
    left: int
    height: int
    width: int
    view_height: int
    view_width: int
    image_height: int
    image_width: int


class Axis(NamedTuple):
    """Windows along an axis of a view, and the side of the map that they are merged to.

    Args:
        starts (`tuple[int, ...]`): First pixel of each window.
        window (`int`): Length of a window in pixels.
        padded_window (`int`): Length after the model padded it to whole patches.
        patches (`int`): Patch logits of a window along this axis; they span `padded_window` pixels.
        view_side (`int`): Length in pixels of the side that the windows cover.
        side (`int`): Length in pixels of the side of the map.
        flip (`bool`, defaults to `False`): Whether the view is mirrored along this axis.
    """

    starts: tuple[int, ...]
    window: int
    padded_window: int
    patches: int
    view_side: int
    side: int
    flip: bool = False


class Tile(NamedTuple):
    """Pixels `start` to `stop` of an axis as `weights` (stop - start, n) times n patches of the axis.

    These lie from `first_patch` to `last_patch` (exclusive); `patches` (n) counts from the first and is `None` for all.
    """

    start: int
    stop: int
    first_patch: int
    last_patch: int
    patches: torch.Tensor | None
    weights: torch.Tensor

    def select(self, values: torch.Tensor, offset: int = 0) -> torch.Tensor:
        """Its patches out of `values`, whose first row is the patch `offset`."""
        values = values[self.first_patch - offset : self.last_patch - offset]
        return values if self.patches is None else values.index_select(0, self.patches)


def window_starts(side: int, window_size: int, window_stride: int) -> list[int]:
    """First pixels of the windows along a side: multiples of the stride, and one window that ends at the border.

    Args:
        side (`int`): Length of the side in pixels, at least `window_size`.
        window_size (`int`): Length of a window in pixels.
        window_stride (`int`): Distance of two windows in pixels, from 1 to `window_size`.

    Returns:
        `list[int]`: Ascending first pixels.

    Raises:
        ValueError: If the windows cannot cover the side.
    """
    if not 1 <= window_stride <= window_size:
        raise ValueError(
            f"`window_stride` must be from 1 to `window_size` ({window_size}), or pixels are left out; got "
            f"{window_stride}."
        )
    if side < window_size:
        raise ValueError(
            f"A side of {side} pixels is shorter than `window_size` {window_size}: resize the image first."
        )
    return [*range(0, side - window_size, window_stride), side - window_size]


def window_corners(height: int, width: int, window_size: int, window_stride: int) -> list[tuple[int, int]]:
    """The (top, left) pixels of the windows of an image, row by row.

    Args:
        height (`int`), width (`int`): Size of the image in pixels.
        window_size (`int`): Side of a window in pixels.
        window_stride (`int`): Distance of two windows in pixels.

    Returns:
        `list[tuple[int, int]]`: The corners.

    Raises:
        ValueError: If the windows cannot cover the image.
    """
    lefts, tops = (window_starts(side, window_size, window_stride) for side in (width, height))
    if len(tops) * len(lefts) > MAX_WINDOWS:
        raise ValueError(
            f"An image of {height} x {width} pixels would have {len(tops) * len(lefts)} windows, expected at most "
            f"{MAX_WINDOWS}: raise `window_stride`, which is {window_stride}."
        )
    return [(top, left) for top in tops for left in lefts]


def merge_matrix(axis: Axis, first: int = 0, last: int | None = None) -> np.ndarray:
    """The matrix from the patch logits of the windows along an axis to pixels of the map, not mirrored.

    Args:
        axis (`Axis`): The windows.
        first (`int`, defaults to 0), last (`int`, *optional*): The pixels of the map that are wanted.

    Returns:
        `np.ndarray` of shape `(last - first, len(axis.starts) * axis.patches)`, float64; each row sums to 1.
    """
    lower, upper, share = linear_taps(axis.view_side, axis.side, first, last)
    begin, end = lower[0], upper[-1] + 1
    upsampling = linear_matrix(axis.patches, axis.padded_window, 0, axis.window)
    matrix, count = np.zeros((end - begin, len(axis.starts) * axis.patches)), np.zeros((end - begin, 1))
    for index, start in enumerate(axis.starts):
        low, high = max(begin, start), min(end, start + axis.window)
        if low < high:
            columns = slice(index * axis.patches, (index + 1) * axis.patches)
            matrix[low - begin : high - begin, columns] += upsampling[low - start : high - start]
            count[low - begin : high - begin] += 1
    matrix /= count
    return (1 - share[:, None]) * matrix[lower - begin] + share[:, None] * matrix[upper - begin]


@lru_cache(maxsize=256)
def merge_tiles(axis: Axis, tile_size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tile, ...]:
    """[`merge_matrix`], mirrored for a flipped view, cut into tiles without their zero columns."""
    tiles = []
    for start in range(0, axis.side, tile_size):
        stop = min(start + tile_size, axis.side)
        pixels = (axis.side - stop, axis.side - start) if axis.flip else (start, stop)
        rows = merge_matrix(axis, *pixels)
        used = np.flatnonzero(rows.any(0))
        weights = torch.from_numpy(np.ascontiguousarray(rows[::-1, used] if axis.flip else rows[:, used]))
        first_patch, last_patch = int(used[0]), int(used[-1]) + 1
        gaps = len(used) < last_patch - first_patch
        columns = torch.from_numpy(used - first_patch).to(device) if gaps else None
        tiles.append(Tile(start, stop, first_patch, last_patch, columns, weights.to(dtype).to(device)))
    return tuple(tiles)


__all__ = ["Axis", "Tile", "Window", "merge_matrix", "merge_tiles", "window_corners", "window_starts"]
