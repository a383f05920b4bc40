"""Resampling, in one place: where a new sample looks, as taps and as a matrix; the resize of images, labels and positions.

Taps and images follow `torch.nn.functional.interpolate` with `align_corners=False` and without antialiasing.
"""

from functools import lru_cache

import numpy as np
import torch
from torch.nn.functional import grid_sample, interpolate

from .worker_threads import run_in_threads


CPU_BAND, GPU_BAND = 2**18, 2**22  # pixels of a band of an image that is resized


def resized_size(height: int, width: int, shortest_edge: float, longest_edge: float | None = None) -> tuple[int, int]:
    """(height, width) of an image resized to fit both edges with its aspect ratio kept, in pixels rounded half up.

    The rule of mmcv's `rescale_size`, which the published results were computed with.
    """
    factor = shortest_edge / min(height, width)
    if longest_edge is not None:
        factor = min(factor, longest_edge / max(height, width))
    return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)


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
def linear_matrix(old: int, new: int, first: int = 0, last: int | None = None) -> np.ndarray:
    """[`linear_taps`] as a matrix of shape `(last - first, old)` in float64."""
    lower, upper, share = linear_taps(old, new, first, last)
    matrix, rows = np.zeros((len(lower), old)), np.arange(len(lower))
    matrix[rows, lower] += 1 - share
    matrix[rows, upper] += share
    return matrix


def resize_image(image: torch.Tensor, size: tuple[int, int], mode: str = "bilinear") -> torch.Tensor:
    """Resize (channels, height, width) without antialiasing; uint8 stays uint8, rounded to the nearest."""
    if image.shape[-2:] == size:
        return image
    if image.dtype == torch.uint8 and mode == "bilinear":
        return resize_bilinear_uint8(image, size)
    align = {} if mode == "nearest-exact" else {"align_corners": False}
    resized = interpolate(image[None].float(), size=size, mode=mode, **align)[0]
    return resized.round_().clamp_(0, 255).to(torch.uint8) if image.dtype == torch.uint8 else resized


def resize_bilinear_uint8(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize uint8 (channels, height, width): only the pixels that are looked at become floats, a band of rows at a time."""
    rows, columns = (
        tuple(torch.from_numpy(values).to(image.device) for values in linear_taps(old, new))
        for old, new in zip(image.shape[-2:], size)
    )
    resized = torch.empty(image.shape[0], *size, dtype=torch.uint8, device=image.device)
    step = max((CPU_BAND if image.device.type == "cpu" else GPU_BAND) // max(image.shape[-1], size[1]), 1)

    def resize_band(start: int) -> None:
        upper, lower, share = (values[start : start + step] for values in rows)
        band = torch.lerp(image[:, upper].float(), image[:, lower].float(), share.float()[:, None])
        band = torch.lerp(band[..., columns[0]], band[..., columns[1]], columns[2].float())
        resized[:, start : start + step] = band.round_()

    run_in_threads(resize_band, range(0, size[0], step), image.device)
    return resized


def resize_labels(labels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize a label map (height, width) of any integer dtype to `size` with nearest (pixel centers, as PIL)."""
    for axis, (new, old) in enumerate(zip(size, labels.shape)):
        if new != old:
            centers = (torch.arange(new, device=labels.device, dtype=torch.float64) + 0.5) * old / new
            labels = labels.index_select(axis, centers.long())
    return labels


def resize_position_embeddings(
    positions: torch.Tensor,
    old: tuple[int, int],
    new: tuple[int, int],
    mode: str = "bilinear",
    antialias: bool = False,
    offset: float = 0.0,
) -> torch.Tensor:
    """Resize the learned positions of a grid of patches to another, in float32 with `align_corners=False`.

    Args:
        positions (`torch.FloatTensor` of shape `(1, special tokens + old rows * old columns, hidden_size)`): The learned
            ones; those of the class and distillation tokens stay.
        old (`tuple[int, int]`), new (`tuple[int, int]`): Rows and columns.
        mode (`str`, defaults to `"bilinear"`), antialias (`bool`, defaults to `False`), offset (`float`, defaults to
            0.0): As `position_embedding_interpolation`, `_antialias` and `_offset` of [`VitEncoderConfig`].

    Returns:
        `torch.FloatTensor` of shape `(1, special tokens + new rows * new columns, hidden_size)`.
    """
    number = positions.shape[1] - old[0] * old[1]
    special, patches = positions.split([number, old[0] * old[1]], dim=1)
    patches = patches.unflatten(1, old).permute(0, 3, 1, 2).float()  # (1, hidden, rows, columns)
    if offset:
        # `interpolate` with the scale (n + offset) / old, which an export would fix to the size that it has seen. Nothing is
        # resized where nothing changes: in tensors, since an export does not know it.
        counts = [torch.full((), n, device=patches.device) for n in new]
        is_same = (counts[0] == old[0]) & (counts[1] == old[1])
        lengths = [count + torch.where(is_same, 0.0, offset) for count in counts]
        rows, columns = (
            2 * (torch.arange(n, device=patches.device) + 0.5) / length - 1 for n, length in zip(new, lengths)
        )
        where = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)[None]  # (1, rows, columns, 2)
        patches = grid_sample(patches, where, mode, padding_mode="border", align_corners=False)
    else:
        patches = interpolate(patches, new, mode=mode, align_corners=False, antialias=antialias)
    return torch.cat([special, patches.flatten(2).transpose(1, 2).to(special.dtype)], dim=1)


__all__ = [
    "linear_matrix",
    "linear_taps",
    "resize_image",
    "resize_labels",
    "resize_position_embeddings",
    "resized_size",
]
