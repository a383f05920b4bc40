"""Windows of an image, and the exact merge of their patch logits as two small matrices.

The published protocol (rstrudel/segmenter, segm/model/utils.py) upsamples the patch logits of each window to pixels,
adds them up, divides by the number of windows over each pixel, resizes the result to the original size and flips it
back. All of this is linear, and separable into rows and columns. With the patch logits of the windows side by side in
one array L of shape (patch rows, patch columns, labels) it is

    scores = A_rows @ L @ A_columns^T

where A_rows has one row per pixel row of the original image. The matrices are built once per geometry in float64. They
are applied tile by tile, with the few columns that are not zero in a tile, so that the upsampled logits of a whole
image never exist.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.nn.functional import interpolate


TILE_HEIGHT, TILE_WIDTH = 16, 64


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


class Tile(NamedTuple):
    """Pixels `start` to `stop` of an axis as `weights` (stop - start, n) times the patches `patches` (n) of the axis."""

    start: int
    stop: int
    patches: torch.Tensor
    weights: torch.Tensor


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


def split_windows(
    image: torch.Tensor, window_size: int, window_stride: int
) -> tuple[list[torch.Tensor], list[tuple[int, int]]]:
    """Cut an image into windows.

    Args:
        image (`torch.Tensor` of shape `(..., height, width)`): An image or a label map.
        window_size (`int`): Side of a window in pixels.
        window_stride (`int`): Distance of two windows in pixels.

    Returns:
        `tuple[list[torch.Tensor], list[tuple[int, int]]]`: Views of `image` of shape `(..., window_size, window_size)`
        row by row, and the (top, left) pixel of each.

    Raises:
        ValueError: If the windows cannot cover the image.
    """
    height, width = image.shape[-2:]
    offsets = [
        (top, left)
        for top in window_starts(height, window_size, window_stride)
        for left in window_starts(width, window_size, window_stride)
    ]
    return [image[..., top : top + window_size, left : left + window_size] for top, left in offsets], offsets


def merge_matrix(
    starts: Sequence[int], window: int, padded_window: int, patches: int, view_side: int, side: int
) -> torch.Tensor:
    """The matrix from the patch logits of the windows along an axis to the pixels of the original image.

    Args:
        starts (`Sequence[int]`): First pixel of each window.
        window (`int`): Length of a window in pixels.
        padded_window (`int`): Length after the model padded it to whole patches.
        patches (`int`): Patch logits of a window along this axis; they span `padded_window` pixels.
        view_side (`int`): Length in pixels of the side that the windows cover.
        side (`int`): Length in pixels of the side of the original image.

    Returns:
        `torch.DoubleTensor` of shape `(side, len(starts) * patches)`; each row sums to 1.
    """
    basis = torch.eye(patches, dtype=torch.float64)[None]
    upsample = interpolate(basis, size=padded_window, mode="linear", align_corners=False)[0, :, :window]
    matrix = torch.zeros(len(starts) * patches, view_side, dtype=torch.float64)
    count = torch.zeros(view_side, dtype=torch.float64)
    for index, start in enumerate(starts):
        matrix[index * patches : (index + 1) * patches, start : start + window] += upsample
        count[start : start + window] += 1
    return interpolate((matrix / count)[None], size=side, mode="linear", align_corners=False)[0].T


@lru_cache(maxsize=256)
def merge_tiles(
    starts: tuple[int, ...],
    window: int,
    padded_window: int,
    patches: int,
    view_side: int,
    side: int,
    flip: bool,
    tile_size: int,
    device: torch.device,
) -> tuple[Tile, ...]:
    """[`merge_matrix`] in float32, mirrored for a flipped view, cut into tiles without their zero columns."""
    matrix = merge_matrix(starts, window, padded_window, patches, view_side, side)
    if flip:
        matrix = matrix.flip(0)
    tiles = []
    for start in range(0, side, tile_size):
        rows = matrix[start : start + tile_size]
        columns = rows.count_nonzero(0).nonzero()[:, 0]
        weights = rows[:, columns].float().contiguous()
        tiles.append(Tile(start, start + len(rows), columns.to(device), weights.to(device)))
    return tuple(tiles)


class _View(NamedTuple):
    """Patch logits (patch columns, patch rows, labels) of a view, and the tiles of both axes."""

    logits: torch.Tensor
    rows: tuple[Tile, ...]
    columns: tuple[Tile, ...]


def _missing_windows(view: Window, number: int) -> ValueError:
    return ValueError(
        f"The {number} window(s) of image {view.image} do not cover its {view.view_height} x {view.view_width} pixels. "
        "All windows of an image must be merged together: call the pipeline with `batch_size=1`, and pass the model's "
        "outputs for all rows of `pixel_values` at once."
    )


def _arrange_view(
    logits: torch.Tensor, windows: list[tuple[int, Window]], patch_size: int, size: tuple[int, int]
) -> _View:
    """Put the patch logits of the windows of one view side by side and look its tiles up."""
    windows = sorted(windows, key=lambda item: (item[1].top, item[1].left))
    view = windows[0][1]
    grid, tiles = [], []
    for axis, (starts, window, patches, view_side, side) in enumerate(
        (
            ({w.top for _, w in windows}, view.height, logits.shape[2], view.view_height, size[0]),
            ({w.left for _, w in windows}, view.width, logits.shape[3], view.view_width, size[1]),
        )
    ):
        starts = sorted(starts)
        gaps = [after - before > window for before, after in zip(starts, starts[1:])]
        if starts[0] != 0 or starts[-1] + window != view_side or any(gaps):
            raise _missing_windows(view, len(windows))
        padded_window = -(-window // patch_size) * patch_size
        if padded_window % patches and patches % padded_window:
            raise ValueError(
                f"Logits of {patches} patches do not fit a window of {window} pixels and a patch size of {patch_size}: "
                "set `patch_size` of the image processor to that of the model."
            )
        flip = bool(view.flip) and axis == 1
        tile_size = (TILE_HEIGHT, TILE_WIDTH)[axis]
        geometry = (tuple(starts), window, padded_window, patches, view_side, side, flip)
        tiles.append(merge_tiles(*geometry, tile_size, logits.device))
        grid.append(len(starts))
    if not len(windows) == len({(w.top, w.left) for _, w in windows}) == grid[0] * grid[1]:
        raise _missing_windows(view, len(windows))

    indices = torch.tensor([index for index, _ in windows], device=logits.device)
    patches = logits[indices].float().unflatten(0, grid)  # (rows, columns, labels, height, width)
    return _View(patches.permute(1, 4, 0, 3, 2).flatten(2, 3).flatten(0, 1).contiguous(), *tiles)


def _merge_image(
    views: list[_View], size: tuple[int, int], return_scores: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Class map (height, width) and, on request, mean softmax (labels, height, width) over the views."""
    num_labels = views[0].logits.shape[-1]
    new_empty = views[0].logits.new_empty
    segmentation = new_empty(size, dtype=torch.long)
    scores = new_empty(num_labels, *size) if return_scores else None
    # Tiles are computed in place: fresh memory for each would cost more than the arithmetic.
    tile_pixels = min(TILE_HEIGHT, size[0]) * min(TILE_WIDTH, size[1])
    values, probabilities, total = (new_empty(tile_pixels * num_labels) for _ in range(3))
    for columns in zip(*(view.columns for view in views)):
        left, right = columns[0].start, columns[0].stop
        bands = []
        for view, tile in zip(views, columns):
            band = tile.weights @ view.logits[tile.patches].flatten(1)  # (width, patch rows * labels)
            bands.append(band.unflatten(1, (-1, num_labels)).transpose(0, 1).flatten(1))
        for rows in zip(*(view.rows for view in views)):
            top, bottom = rows[0].start, rows[0].stop
            shape = (bottom - top, (right - left) * num_labels)
            merged, softmax, logits = (
                buffer[: shape[0] * shape[1]].view(shape) for buffer in (total, probabilities, values)
            )
            for index, (band, tile) in enumerate(zip(bands, rows)):
                torch.mm(tile.weights, band[tile.patches], out=logits)
                if len(views) == 1 and not return_scores:
                    merged = logits
                    continue
                target = merged if index == 0 else softmax
                torch.softmax(logits.view(-1, num_labels), -1, out=target.view(-1, num_labels))
                if index > 0:
                    merged.add_(softmax)
            merged = merged.view(bottom - top, right - left, num_labels)
            segmentation[top:bottom, left:right] = merged.max(-1).indices
            if return_scores:
                torch.div(merged.permute(2, 0, 1), len(views), out=scores[:, top:bottom, left:right])
    return segmentation, scores


def merge_windows(
    logits: torch.Tensor,
    window_offsets: torch.Tensor,
    patch_size: int,
    target_sizes: Sequence[tuple[int, int]] | None = None,
    return_scores: bool = False,
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Merge the patch logits of windows into a class map of each image.

    Computed in float32 whatever the dtype of the logits. The result is that of the published protocol: bilinear
    upsampling to pixels, mean over the windows at a pixel, bilinear resize to the original size, softmax, mean over the
    views (scales and flips), argmax.

    Args:
        logits (`torch.FloatTensor` of shape `(num_windows, num_labels, patch_height, patch_width)`): The model's output.
        window_offsets (`torch.LongTensor` of shape `(num_windows, 11)`): A [`Window`] per row, in any order.
        patch_size (`int`): Side in pixels to whose multiple the model pads its input.
        target_sizes (`Sequence[tuple[int, int]]`, *optional*): (height, width) in pixels of each map; the original
            sizes by default.
        return_scores (`bool`, defaults to `False`): Whether class probabilities are wanted too.

    Returns:
        `list[tuple[torch.LongTensor, torch.FloatTensor | None]]`: For each image the class map (height, width) and the
        class probabilities (num_labels, height, width) from 0 to 1, or `None`.

    Raises:
        ValueError: If windows are missing, or logits, windows and target sizes do not fit each other.
    """
    if window_offsets.ndim != 2 or window_offsets.shape != (len(logits), len(Window._fields)):
        raise ValueError(
            f"`window_offsets` must have the shape ({len(logits)}, {len(Window._fields)}), a row for each window of the "
            f"logits, got {tuple(window_offsets.shape)}. Pass the image processor's outputs to the model unchanged."
        )
    images: dict[int, dict[int, list]] = defaultdict(lambda: defaultdict(list))
    for index, row in enumerate(window_offsets.tolist()):
        window = Window(*row)
        images[window.image][window.view].append((index, window))
    if target_sizes is not None and len(target_sizes) != len(images):
        raise ValueError(
            f"`target_sizes` must have one (height, width) for each of the {len(images)} images, got {len(target_sizes)}."
        )
    logits, merged = logits.detach(), []
    for position, image in enumerate(sorted(images)):
        first = next(iter(images[image].values()))[0][1]
        size = (first.image_height, first.image_width) if target_sizes is None else target_sizes[position]
        size = (int(size[0]), int(size[1]))
        views = [_arrange_view(logits, windows, patch_size, size) for windows in images[image].values()]
        merged.append(_merge_image(views, size, return_scores))
    return merged


__all__ = ["Window", "merge_matrix", "merge_windows", "split_windows", "window_starts"]
