"""The merge of the windows of an image into its class map: plain, and fast.

[`plain_merge_windows`] says what it is: upsample the patch logits of each window, add, divide, resize, flip back, softmax,
mean over the views, argmax. [`merge_windows`] gives the same from the matrices of `window_geometry`, tile by tile, so that the
upsampled logits of a whole image never exist. Rows of the image are merged as soon as the windows over them are there, and
logits that no later row needs are dropped: an image of any height needs the memory of about two rows of windows.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import interpolate

from .window_geometry import Axis, Tile, Window, merge_tiles
from .worker_threads import run_in_threads


# Values of a tile: on the CPU as many as stay near its cores, on a GPU enough to keep it busy.
CPU_TILE_VALUES, GPU_TILE_VALUES = 2**18, 2**25
CPU_TILE_HEIGHT = 64
# Softmax is taken without a pass for its maximum where no class is further than this below the best one of its patch:
# the sum of a pixel is then at least e^-60, far from the smallest float32.
MAX_LOGIT_RANGE = 60.0


def product_dtype(device: torch.device) -> torch.dtype:
    """The type in which products of matrices are exact to float32: float64 where those of float32 are set to less.

    That is so with `torch.set_float32_matmul_precision("high")`, for instance. The setting is one for all threads, and not of
    this file: it is looked at and not changed.
    """
    matmul: Any = (
        torch.backends.cuda.matmul if device.type == "cuda" else getattr(torch.backends.mkldnn, "matmul", None)
    )
    if not hasattr(matmul, "fp32_precision"):  # torch before 2.9
        return torch.float32 if torch.get_float32_matmul_precision() == "highest" else torch.float64
    return torch.float32 if matmul.fp32_precision in ("none", "ieee") else torch.float64


def tile_size(size: tuple[int, int], num_labels: int, device: torch.device) -> tuple[int, int]:
    """(height, width) in pixels of the tiles of a map of that size: whole rows on a GPU, small on the CPU."""
    if device.type == "cpu":
        return CPU_TILE_HEIGHT, max(CPU_TILE_VALUES // (CPU_TILE_HEIGHT * num_labels), 1)
    return max(GPU_TILE_VALUES // (size[1] * num_labels), 1), size[1]


def plain_merge_windows(
    logits: torch.Tensor,
    windows: Sequence[Window],
    patch_size: int,
    size: tuple[int, int] | None = None,
    padding: str = "end",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of the merge for one image, one window after the other; holds the upsampled logits.

    Args:
        logits (`torch.FloatTensor` of shape `(num_windows, num_labels, patch_height, patch_width)`): The model's output.
        windows (`Sequence[Window]`): What each row of the logits is.
        patch_size (`int`): Side in pixels to whose multiple the model pads its input.
        size (`tuple[int, int]`, *optional*): (height, width) in pixels of the map; the original size by default.
        padding (`"end"` or `"center"`, defaults to `"end"`): As for [`WindowMerger`].

    Returns:
        `tuple[torch.LongTensor, torch.FloatTensor]`: The class map (height, width) and the class probabilities (num_labels,
        height, width), in the type of the logits.
    """
    logits = with_background(logits)
    probabilities = []
    for view in sorted({window.view for window in windows}):
        indices = [index for index, window in enumerate(windows) if window.view == view]
        first = windows[indices[0]]
        total = logits.new_zeros(logits.shape[1], first.view_height, first.view_width)
        count = logits.new_zeros(first.view_height, first.view_width)
        spanned = [first.height, first.width]
        if padding == "end":
            spanned = [-(-side // patch_size) * patch_size for side in spanned]
        for index in indices:
            _, _, _, top, left, height, width, *_ = windows[index]
            pixels = interpolate(logits[index][None], size=spanned, mode="bilinear")[0]
            total[:, top : top + height, left : left + width] += pixels[:, :height, :width]
            count[top : top + height, left : left + width] += 1
        map_size = (first.image_height, first.image_width) if size is None else size
        merged = interpolate((total / count)[None], size=map_size, mode="bilinear")[0]
        probabilities.append((merged.flip(-1) if first.flip else merged).softmax(0))
    scores = torch.stack(probabilities).mean(0)
    return scores.argmax(0), scores


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
        self.patch_rows = 0
        self.rows: tuple[Tile, ...] = ()
        self.columns: tuple[Tile, ...] = ()

    def make_tiles(
        self,
        patches: Sequence[int],
        patch_size: int,
        padding: str,
        size: tuple[int, int],
        tile: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Look up the tiles of both axes of a map of `size`, for windows of `patches` (rows, columns) patch logits."""
        window, tiles = self.window, []
        for index, (starts, length, view_side) in enumerate(
            ((self.tops, window.height, window.view_height), (self.lefts, window.width, window.view_width))
        ):
            padded = -(-length // patch_size) * patch_size
            # Logits are larger or smaller than pixels by a whole factor, or a whole number of them spans a patch.
            if padded % patches[index] and patches[index] % padded and patches[index] % (padded // patch_size):
                raise ValueError(
                    f"Logits of {patches[index]} patches do not fit a window of {length} pixels and a patch size of "
                    f"{patch_size}: set `patch_size` of the image processor to that of the model."
                )
            flip = bool(window.flip) and index == 1
            spanned = length if padding == "center" else padded
            axis = Axis(tuple(starts), length, spanned, patches[index], view_side, size[index], flip)
            tiles.append(merge_tiles(axis, tile[index], device, dtype))
        self.patch_rows, (self.rows, self.columns) = patches[0], tiles

    def add(self, top: int, left: int, logits: torch.Tensor) -> None:
        """Keep the logits (labels, height, width) of a window."""
        self.waiting[top][left] = logits.permute(1, 2, 0)

    def take_complete_rows(self, for_softmax: bool, dtype: torch.dtype) -> None:
        """Put the windows of the next rows of windows side by side."""
        parts = [] if self.logits is None else [self.logits]
        while self.complete_rows < len(self.tops):
            row = self.waiting[self.tops[self.complete_rows]]
            if len(row) < len(self.lefts):
                break
            part = torch.cat([row[left] for left in self.lefts], 1).to(dtype)
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
        if self.logits is not None:
            self.logits = self.logits[first_patch - self.first_patch :].clone()
        self.first_patch = first_patch

    def merge_row(self, row: int) -> torch.Tensor:
        """The logits of a row of tiles, merged along the rows only: (patch columns, height * labels)."""
        tile, logits = self.rows[row], self.logits
        assert logits is not None  # a row is merged when its windows were added
        band = tile.weights @ tile.select(logits, self.first_patch).flatten(1)
        return band.view(len(tile.weights), -1, logits.shape[-1]).transpose(0, 1).flatten(1)


def _missing_windows(view: Window, number: int) -> ValueError:
    return ValueError(
        f"The {number} window(s) of image {view.image} do not cover its {view.view_height} x {view.view_width} pixels. "
        "All windows of an image must be merged together: call the pipeline with `batch_size=1`, and pass the model's "
        "outputs for all rows of `pixel_values` at once."
    )


def argmax_classes(values: torch.Tensor) -> torch.Tensor:
    """Argmax over the last axis; of equal ones the first."""
    if values.device.type == "cpu":  # numpy's is vectorized, that of torch is not
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
        padding (`"end"` or `"center"`, defaults to `"end"`): As `padding` of the configuration: whether the logits span a
            window with its padding right and bottom, or are resized to the window with nothing cut off.

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
        padding: str = "end",
    ) -> None:
        views = defaultdict(list)
        for window in windows:
            views[window.view].append(window)
        self._views = {view: _View(of_view) for view, of_view in views.items()}
        self.size = (windows[0].image_height, windows[0].image_width) if size is None else (int(size[0]), int(size[1]))
        self.patch_size, self.padding, self.return_scores, self.dtype = patch_size, padding, return_scores, dtype
        self._needs_softmax = return_scores or len(self._views) > 1
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
        self._merge_complete_rows(list(self._views.values()), logits.device)

    def _prepare(self, logits: torch.Tensor) -> None:
        num_labels, device = logits.shape[1], logits.device
        self._tile = tile_size(self.size, num_labels, device)
        self._product_dtype = product_dtype(device)
        for view in self._views.values():
            view.make_tiles(
                logits.shape[2:], self.patch_size, self.padding, self.size, self._tile, device, self._product_dtype
            )
        self.segmentation = torch.empty(self.size, dtype=self.dtype, device=device)
        if self.return_scores:
            self.scores = torch.empty(num_labels, *self.size, device=device)

    @property
    def is_complete(self) -> bool:
        """Whether all windows were added, so that `segmentation` and `scores` are whole."""
        return self.segmentation is not None and self._merged_tiles * self._tile[0] >= self.size[0]

    def _merge_complete_rows(self, views: list[_View], device: torch.device) -> None:
        run_in_threads(lambda view: view.take_complete_rows(self._needs_softmax, self._product_dtype), views, device)
        number = len(views[0].rows)
        ready = self._merged_tiles
        while ready < number and all(v.rows[ready].last_patch <= v.complete_rows * v.patch_rows for v in views):
            ready += 1
        if ready == self._merged_tiles:
            return
        run_in_threads(lambda row: self._merge_row(views, row), range(self._merged_tiles, ready), device)
        self._merged_tiles = ready
        for view in views:
            view.forget(view.rows[ready].first_patch if ready < number else view.rows[-1].last_patch)

    def _merge_row(self, views: list[_View], row: int) -> None:
        """Merge a row of tiles of the map."""
        segmentation = self.segmentation
        assert segmentation is not None  # made when the first windows were added
        bands = [view.merge_row(row) for view in views]
        top, bottom = views[0].rows[row].start, views[0].rows[row].stop
        # Tiles are computed in place: fresh memory for each would cost more than the arithmetic.
        values = bands[0].new_empty(min(self._tile[1], self.size[1]) * bands[0].shape[1])
        total = torch.empty_like(values) if self._needs_softmax else values
        num_labels = bands[0].shape[1] // (bottom - top)
        for column, tile in enumerate(views[0].columns):
            left, right = tile.start, tile.stop
            merged = total[: (right - left) * bands[0].shape[1]].view(-1, num_labels)
            if self._needs_softmax:
                merged.zero_()
            for view, band in zip(views, bands):
                tile = view.columns[column]
                logits = values[: merged.numel()].view(right - left, -1)
                torch.mm(tile.weights, tile.select(band), out=logits)
                if self._needs_softmax:
                    add_softmax(merged, logits.view(-1, num_labels), view.needs_max_subtraction)
            merged = merged.view(right - left, bottom - top, num_labels)
            segmentation[top:bottom, left:right] = argmax_classes(merged).T
            if self.scores is not None:
                self.scores[:, top:bottom, left:right] = merged.permute(2, 1, 0) / len(views)


def add_softmax(total: torch.Tensor, logits: torch.Tensor, needs_max_subtraction: bool) -> None:
    """Add the softmax of logits (pixels, labels) in units of log 2 to a total of that shape; the logits are lost."""
    if needs_max_subtraction:
        logits.sub_(logits.amax(-1, keepdim=True))
    logits.exp2_()
    total.addcdiv_(logits, logits.sum(-1, keepdim=True))


def merge_windows(
    logits: torch.Tensor,
    window_offsets: torch.Tensor,
    patch_size: int,
    target_sizes: Sequence[tuple[int, int]] | None = None,
    return_scores: bool = False,
    padding: str = "end",
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Merge the patch logits of windows into a class map of each image.

    Computed in float32 whatever the dtype of the logits. The result is that of the published protocol: bilinear
    upsampling to pixels, mean over the windows at a pixel, bilinear resize to the original size, softmax, mean over the
    views (scales and flips), argmax.

    Args:
        logits (`torch.FloatTensor` of shape `(num_windows, num_labels, patch_height, patch_width)`): The model's output.
        window_offsets (`torch.LongTensor` of shape `(num_windows, 11)`): A [`Window`] per row, in any order.
        patch_size (`int`): Side in pixels to whose multiple the model pads its input.
        target_sizes (`Sequence[tuple[int, int]]`, *optional*): (height, width) of each map; the original sizes by default.
        return_scores (`bool`, defaults to `False`): Whether class probabilities are wanted too.
        padding (`"end"` or `"center"`, defaults to `"end"`): As for [`WindowMerger`].

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
    sizes = None if target_sizes is None else [list(map(int, size)) for size in target_sizes]  # of numbers or tensors
    if sizes is not None and len(sizes) != len(images):
        raise ValueError(
            f"`target_sizes` must have one (height, width) for each of the {len(images)} images, got {len(sizes)}."
        )
    if any(len(size) != 2 or min(size) < 1 for size in sizes or ()):
        raise ValueError(f"`target_sizes` must be (height, width) of at least one pixel each, got {target_sizes}.")
    merged: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for position, image in enumerate(sorted(images)):
        indices = images[image]
        of_image = [windows[index] for index in indices]
        size = None if sizes is None else (sizes[position][0], sizes[position][1])
        merger = WindowMerger(of_image, patch_size, size, return_scores, padding=padding)
        merger.add(of_image, logits if len(images) == 1 else logits[indices])
        if merger.segmentation is not None:  # it is, for every image has windows and logits
            merged.append((merger.segmentation, merger.scores))
    return merged


__all__ = ["WindowMerger", "merge_windows", "plain_merge_windows"]
