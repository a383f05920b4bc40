"""Windows of an image, and the exact merge of their patch logits as two small matrices.

The published protocol (rstrudel/segmenter, segm/model/utils.py) upsamples the patch logits of each window to pixels,
adds them up, divides by the number of windows over each pixel, resizes the result to the original size and flips it
back. All of this is linear, and separable into rows and columns. With the patch logits of the windows side by side in
one array L of shape (patch rows, patch columns, labels) it is

    scores = A_rows @ L @ A_columns^T

where A_rows has one row per pixel row of the original image. The matrices are built once per geometry in float64. They
are applied tile by tile, with the few columns that are not zero in a tile, so that the upsampled logits of a whole
image never exist. Rows of the image are merged as soon as the windows over them are there, and logits that no later row
needs are dropped: an image of any height needs the memory of about two rows of windows.
"""

import math
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch


# Values of a tile: on the CPU as many as fit its cache, on a GPU enough to keep it busy.
CPU_TILE_VALUES, GPU_TILE_VALUES = 2**17, 2**25
CPU_TILE_HEIGHT = 32
MAX_WINDOWS = 2**20  # of a view; their description alone takes some 100 MB
# Softmax is taken without a pass for its maximum where no class is further than this below the best one of its patch:
# the sum of a pixel is then at least e^-60, far from the smallest float32.
MAX_LOGIT_RANGE = 60.0


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


def linear_taps(
    old: int, new: int, first: int = 0, last: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where `interpolate(mode="linear", align_corners=False)` from `old` to `new` samples looks for `first` to `last`.

    Returns:
        `tuple[np.ndarray, np.ndarray, np.ndarray]`: Two old samples of each new one, and the weight of the second one.
    """
    positions = np.maximum((np.arange(first, new if last is None else last) + 0.5) * (old / new) - 0.5, 0)
    lower = np.minimum(positions.astype(np.int64), old - 1)
    return lower, np.minimum(lower + 1, old - 1), positions - lower


@lru_cache(maxsize=16)
def upsampling_matrix(patches: int, padded_window: int, window: int) -> np.ndarray:
    """The matrix (window, patches) from the patches of a window to its pixels, in float64."""
    lower, upper, share = linear_taps(patches, padded_window, 0, window)
    matrix, pixels = np.zeros((window, patches)), np.arange(window)
    matrix[pixels, lower] += 1 - share
    matrix[pixels, upper] += share
    return matrix


def merge_matrix(
    starts: Sequence[int],
    window: int,
    padded_window: int,
    patches: int,
    view_side: int,
    side: int,
    first: int = 0,
    last: int | None = None,
) -> np.ndarray:
    """The matrix from the patch logits of the windows along an axis to pixels of the original image.

    Args:
        starts (`Sequence[int]`): First pixel of each window.
        window (`int`): Length of a window in pixels.
        padded_window (`int`): Length after the model padded it to whole patches.
        patches (`int`): Patch logits of a window along this axis; they span `padded_window` pixels.
        view_side (`int`): Length in pixels of the side that the windows cover.
        side (`int`): Length in pixels of the side of the original image.
        first (`int`, defaults to 0), last (`int`, *optional*): The pixels of the original image that are wanted.

    Returns:
        `np.ndarray` of shape `(last - first, len(starts) * patches)`, float64; each row sums to 1.
    """
    lower, upper, share = linear_taps(view_side, side, first, last)
    begin, end = lower[0], upper[-1] + 1
    upsampling = upsampling_matrix(patches, padded_window, window)
    matrix, count = np.zeros((end - begin, len(starts) * patches)), np.zeros((end - begin, 1))
    for index, start in enumerate(starts):
        low, high = max(begin, start), min(end, start + window)
        if low < high:
            matrix[low - begin : high - begin, index * patches : (index + 1) * patches] += upsampling[
                low - start : high - start
            ]
            count[low - begin : high - begin] += 1
    matrix /= count
    return (1 - share[:, None]) * matrix[lower - begin] + share[:, None] * matrix[upper - begin]


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
    tiles = []
    for start in range(0, side, tile_size):
        stop = min(start + tile_size, side)
        pixels = (side - stop, side - start) if flip else (start, stop)
        rows = merge_matrix(starts, window, padded_window, patches, view_side, side, *pixels)
        used = rows.any(0).nonzero()[0]
        weights = torch.from_numpy(np.ascontiguousarray(rows[::-1, used] if flip else rows[:, used], np.float32))
        first_patch, last_patch = int(used[0]), int(used[-1]) + 1
        gaps = len(used) < last_patch - first_patch
        columns = torch.from_numpy(used - first_patch).to(device) if gaps else None
        tiles.append(Tile(start, stop, first_patch, last_patch, columns, weights.to(device)))
    return tuple(tiles)


def tile_size(size: tuple[int, int], num_labels: int, device: torch.device) -> tuple[int, int]:
    """(height, width) in pixels of the tiles of a map of that size: whole rows on a GPU, small on the CPU."""
    if device.type == "cpu":
        return CPU_TILE_HEIGHT, max(CPU_TILE_VALUES // (CPU_TILE_HEIGHT * num_labels), 1)
    return max(GPU_TILE_VALUES // (size[1] * num_labels), 1), size[1]


_settings_lock = threading.Lock()
_inside: Counter[str] = Counter()  # threads within `full_float32`
_outside: dict[str, str] = {}  # the precision that they found


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Products of float32 in float32, not in TF32 or bfloat16, whatever is set outside."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    matmul = torch.backends.cuda.matmul if kind == "cuda" else torch.backends.mkldnn.matmul
    with _settings_lock:  # one setting for all threads: the first one in changes it, the last one out puts it back
        if _inside[kind] == 0:
            _outside[kind] = matmul.fp32_precision
            if _outside[kind] != "ieee":
                matmul.fp32_precision = "ieee"
        _inside[kind] += 1
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        with _settings_lock:
            _inside[kind] -= 1
            if _inside[kind] == 0 and _outside[kind] != "ieee":
                matmul.fp32_precision = _outside[kind]


@contextmanager
def single_thread() -> Iterator[None]:
    """Operations of the CPU on the calling thread alone.

    To share operations of some microseconds out to threads gains little, and costs milliseconds for each while another
    process wants the cores.
    """
    previous = torch.get_num_threads()
    if previous == 1:
        yield
        return
    torch.set_num_threads(1)
    # That holds for this thread, and for good in all that are started from now on: for those another thread takes it back.
    others = threading.Thread(target=torch.set_num_threads, args=(previous,))
    others.start()
    others.join()
    try:
        yield
    finally:
        torch.set_num_threads(previous)


class _View:
    """The windows of a view: where they lie, and the logits of their complete rows.

    `logits` (patch rows, patch columns, labels) begins at the patch row `first_patch` of the view and holds what is
    still needed.
    """

    def __init__(self, windows: Sequence[Window]) -> None:
        self.window = windows[0]
        self.tops = sorted({window.top for window in windows})
        self.lefts = sorted({window.left for window in windows})
        grid = {(window.top, window.left) for window in windows}
        complete = len(windows) == len(grid) == len(self.tops) * len(self.lefts)
        for starts, length, side in (
            (self.tops, self.window.height, self.window.view_height),
            (self.lefts, self.window.width, self.window.view_width),
        ):
            gaps = any(after - before > length for before, after in zip(starts, starts[1:]))
            complete = complete and starts[0] == 0 and starts[-1] + length == side and not gaps
        if not complete:
            raise _missing_windows(self.window, len(windows))
        self.waiting: dict[int, dict[int, torch.Tensor]] = defaultdict(dict)
        self.complete_rows = 0
        self.first_patch = 0
        self.logits: torch.Tensor | None = None
        self.needs_max_subtraction = False

    def make_tiles(
        self,
        patches: Sequence[int],
        patch_size: int,
        size: tuple[int, int],
        tile: tuple[int, int],
        device: torch.device,
    ) -> None:
        """Look up the tiles of both axes of a map of `size`, for windows of `patches` (rows, columns) patch logits."""
        window, self.patch_rows, tiles = self.window, patches[0], []
        for axis, (starts, length, view_side) in enumerate(
            ((self.tops, window.height, window.view_height), (self.lefts, window.width, window.view_width))
        ):
            padded = -(-length // patch_size) * patch_size
            if padded % patches[axis] and patches[axis] % padded:
                raise ValueError(
                    f"Logits of {patches[axis]} patches do not fit a window of {length} pixels and a patch size of "
                    f"{patch_size}: set `patch_size` of the image processor to that of the model."
                )
            flip = bool(window.flip) and axis == 1
            geometry = (tuple(starts), length, padded, patches[axis], view_side, size[axis], flip)
            tiles.append(merge_tiles(*geometry, tile[axis], device))
        self.rows, self.columns = tiles

    def add(self, top: int, left: int, logits: torch.Tensor) -> None:
        """Keep the logits (labels, height, width) of a window."""
        self.waiting[top][left] = logits.permute(1, 2, 0)

    def take_complete_rows(self, for_softmax: bool) -> None:
        """Put the windows of the next rows of windows side by side."""
        parts = [] if self.logits is None else [self.logits]
        while self.complete_rows < len(self.tops):
            row = self.waiting[self.tops[self.complete_rows]]
            if len(row) < len(self.lefts):
                break
            part = torch.cat([row[left] for left in self.lefts], 1).float()
            if for_softmax:
                # In units of log 2, because `exp2` is several times as fast as `exp`; at most 0, so that it cannot overflow.
                part = (part - part.amax(-1, keepdim=True)) * math.log2(math.e)
                self.needs_max_subtraction |= not bool(part.amin() >= -MAX_LOGIT_RANGE * math.log2(math.e))
            parts.append(part)
            del self.waiting[self.tops[self.complete_rows]]
            self.complete_rows += 1
        if parts:
            self.logits = torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()

    def forget(self, first_patch: int) -> None:
        """Drop the patch rows before this one."""
        self.logits = self.logits[first_patch - self.first_patch :].clone()
        self.first_patch = first_patch


def _missing_windows(view: Window, number: int) -> ValueError:
    return ValueError(
        f"The {number} window(s) of image {view.image} do not cover its {view.view_height} x {view.view_width} pixels. "
        "All windows of an image must be merged together: call the pipeline with `batch_size=1`, and pass the model's "
        "outputs for all rows of `pixel_values` at once."
    )


def argmax_classes(values: torch.Tensor) -> torch.Tensor:
    """Argmax over the last axis; of equal ones the first."""
    if values.device.type == "cpu":  # numpy's is vectorised, that of torch is not
        return torch.from_numpy(values.numpy().argmax(-1))
    return values.max(-1).indices


def with_background(logits: torch.Tensor) -> torch.Tensor:
    """The one logit (batch, 1, height, width) of a model with one class beside a background of 0; others unchanged.

    The softmax of the two is the sigmoid of the one, and 0 stays 0 whatever linear steps follow.
    """
    return torch.cat([torch.zeros_like(logits), logits], dim=1) if logits.shape[1] == 1 else logits


class WindowMerger:
    """Merges the patch logits of the windows of one image into its class map, as they come.

    Args:
        windows (`Sequence[Window]`): All windows of all views of the image.
        patch_size (`int`): Side in pixels to whose multiple the model pads its input.
        size (`tuple[int, int]`, *optional*): (height, width) in pixels of the map; the original size by default.
        return_scores (`bool`, defaults to `False`): Whether class probabilities are wanted too.
        dtype (`torch.dtype`, defaults to `torch.long`): Integer type of the class map.

    Raises:
        ValueError: If the windows do not cover the image.
    """

    def __init__(
        self,
        windows: Sequence[Window],
        patch_size: int,
        size: tuple[int, int] | None = None,
        return_scores: bool = False,
        dtype: torch.dtype = torch.long,
    ) -> None:
        views = defaultdict(list)
        for window in windows:
            views[window.view].append(window)
        self._views = {view: _View(of_view) for view, of_view in views.items()}
        self.size = (windows[0].image_height, windows[0].image_width) if size is None else (int(size[0]), int(size[1]))
        self.patch_size, self.return_scores, self.dtype = patch_size, return_scores, dtype
        self.segmentation: torch.Tensor | None = None
        self.scores: torch.Tensor | None = None
        self._merged_tiles = 0

    def add(self, windows: Sequence[Window], logits: torch.Tensor) -> None:
        """Take the logits of some windows, and merge the rows of the image that are then complete.

        Args:
            windows (`Sequence[Window]`): Some of the windows, each once in the life of the merger.
            logits (`torch.FloatTensor` of shape `(len(windows), num_labels, patch_height, patch_width)`): Their logits.

        Raises:
            ValueError: If the logits do not fit the windows.
        """
        logits = with_background(logits.detach())
        if self.segmentation is None:
            self._prepare(logits)
        for window, window_logits in zip(windows, logits):
            self._views[window.view].add(window.top, window.left, window_logits)
        with full_float32(logits.device), single_thread():
            self._merge_complete_rows(list(self._views.values()))

    def _merge_complete_rows(self, views: list[_View]) -> None:
        for view in views:
            view.take_complete_rows(for_softmax=self.return_scores or len(views) > 1)
        number = len(views[0].rows)
        ready = self._merged_tiles
        while ready < number and all(v.rows[ready].last_patch <= v.complete_rows * v.patch_rows for v in views):
            ready += 1
        if ready == self._merged_tiles:
            return
        self._merge_rows(views, range(self._merged_tiles, ready))
        self._merged_tiles = ready
        for view in views:
            view.forget(view.rows[ready].first_patch if ready < number else view.rows[-1].last_patch)

    @property
    def is_complete(self) -> bool:
        """Whether all windows were added, so that `segmentation` and `scores` are whole."""
        return self.segmentation is not None and self._merged_tiles * self._tile[0] >= self.size[0]

    def _prepare(self, logits: torch.Tensor) -> None:
        num_labels = logits.shape[1]
        self._tile = tile_size(self.size, num_labels, logits.device)
        for view in self._views.values():
            view.make_tiles(logits.shape[2:], self.patch_size, self.size, self._tile, logits.device)
        self.segmentation = torch.empty(self.size, dtype=self.dtype, device=logits.device)
        if self.return_scores:
            self.scores = torch.empty(num_labels, *self.size, device=logits.device)

    def _merge_rows(self, views: list[_View], tiles: range) -> None:
        """Merge the rows of the image in these tiles."""
        num_labels = views[0].logits.shape[-1]
        needs_softmax = self.return_scores or len(views) > 1
        # Tiles are computed in place: fresh memory for each would cost more than the arithmetic.
        pixels = min(self._tile[0], self.size[0]) * min(self._tile[1], self.size[1])
        buffers = torch.empty(2, pixels * num_labels, device=self.segmentation.device)
        for row in tiles:
            bands = []
            for view in views:
                tile = view.rows[row]
                top, bottom = tile.start, tile.stop
                band = tile.weights @ tile.select(view.logits, view.first_patch).flatten(1)
                band = band.view(bottom - top, -1, num_labels).transpose(0, 1)
                bands.append(band.flatten(1))  # (patch columns, height * labels)
            for column in range(len(views[0].columns)):
                left, right = views[0].columns[column].start, views[0].columns[column].stop
                shape = (right - left, (bottom - top) * num_labels)
                values, total = (buffer[: shape[0] * shape[1]].view(shape) for buffer in buffers)
                by_pixel, merged = values.view(-1, num_labels), total.view(-1, num_labels)
                if needs_softmax:
                    merged.zero_()
                for view, band in zip(views, bands):
                    tile = view.columns[column]
                    torch.mm(tile.weights, tile.select(band), out=values)
                    if needs_softmax:
                        if view.needs_max_subtraction:
                            by_pixel.sub_(by_pixel.amax(-1, keepdim=True))
                        values.exp2_()
                        merged.addcdiv_(by_pixel, by_pixel.sum(-1, keepdim=True))
                merged = (merged if needs_softmax else values).view(right - left, bottom - top, num_labels)
                self.segmentation[top:bottom, left:right] = argmax_classes(merged).T
                if self.return_scores:
                    torch.div(merged.permute(2, 1, 0), len(views), out=self.scores[:, top:bottom, left:right])


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
    if logits.ndim != 4 or 0 in logits.shape:
        raise ValueError(
            "`logits` must have the shape (num_windows, num_labels, patch_height, patch_width), nothing of it 0; got "
            f"{tuple(logits.shape)}."
        )
    if window_offsets.ndim != 2 or window_offsets.shape != (len(logits), len(Window._fields)):
        raise ValueError(
            f"`window_offsets` must have the shape ({len(logits)}, {len(Window._fields)}), a row for each window of the "
            f"logits, got {tuple(window_offsets.shape)}. Pass the image processor's outputs to the model unchanged."
        )
    images: dict[int, list[int]] = defaultdict(list)
    windows = [Window(*row) for row in window_offsets.tolist()]
    for index, window in enumerate(windows):
        images[window.image].append(index)
    if target_sizes is not None and len(target_sizes) != len(images):
        raise ValueError(
            f"`target_sizes` must have one (height, width) for each of the {len(images)} images, got {len(target_sizes)}."
        )
    if any(len(size) != 2 or min(size) < 1 for size in target_sizes or ()):
        raise ValueError(f"`target_sizes` must be (height, width) of at least one pixel each, got {target_sizes}.")
    merged = []
    for position, image in enumerate(sorted(images)):
        indices = images[image]
        of_image = [windows[index] for index in indices]
        size = None if target_sizes is None else target_sizes[position]
        merger = WindowMerger(of_image, patch_size, size, return_scores)
        merger.add(of_image, logits if len(images) == 1 else logits[indices])
        merged.append((merger.segmentation, merger.scores))
    return merged


__all__ = [
    "Window",
    "WindowMerger",
    "linear_taps",
    "merge_matrix",
    "merge_windows",
    "window_corners",
    "window_starts",
]
