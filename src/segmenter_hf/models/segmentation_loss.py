"""Cross-entropy between the pixels of a label map and bilinearly upsampled logits, without the upsampled logits.

Upsampling is linear and separable, so a tile of pixels is a product of two small matrices and the logits around it. In one
pass over the tiles the loss is added up, and the gradient of each tile, softmax minus one-hot, is pushed back through the
same matrices into a gradient of the size of the logits. That gradient is all that is kept; backward multiplies it by the
incoming scalar. Memory is that of the logits and a tile, not that of the pixels times the classes.
"""

import hashlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import nn

from .resampling import linear_matrix
from .sliding_window import product_dtype
from .window_geometry import Axis, merge_tiles
from .worker_threads import run_in_threads


# Pixels of a tile: on the CPU its values stay in cache, on a GPU few launches matter more. A narrow tile is made of few
# columns of logits, which each of its rows is multiplied with.
CPU_TILE, GPU_TILE = (64, 64), (128, 512)
# Scores are taken to the base 2, whose power is several times faster than that of e. It needs no pass for its maximum
# where no class is further than this below the best one of its position.
MAX_LOGIT_RANGE = 86.0
NAMESPACE = "segmenter_hf"


def upsampled_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int = 255,
    class_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Mean cross-entropy over the pixels that are not ignored, tile by tile.

    Equal to [`plain_upsampled_cross_entropy`] to the rounding of float32, with a fraction of its time and memory. It is
    differentiable once, by the logits.

    Args:
        logits (`torch.FloatTensor` of shape `(batch_size, num_labels, logits_height, logits_width)`): Scores before
            softmax, at any resolution. Computed in float32, or in float64 if that is their dtype.
        labels (`torch.LongTensor` of shape `(batch_size, height, width)`): Classes from 0 to `num_labels - 1`, or
            `ignore_index`.
        ignore_index (`int`, defaults to 255): Label of the pixels that are left out.
        class_weights (`torch.FloatTensor` of shape `(num_labels,)`, *optional*): Weight of each class; the mean is
            weighted by those of the labels, as in torch.
        label_smoothing (`float`, defaults to 0.0): Share of each label that is spread over all classes, from 0 to 1.

    Returns:
        `torch.FloatTensor` of shape `()`: The loss; 0 with a zero gradient if all pixels are ignored.

    Raises:
        ValueError: If shapes or options do not fit, or, on the CPU, a label is no class.
    """
    check_arguments(logits, labels, class_weights, label_smoothing)
    needs_gradient = logits.requires_grad and torch.is_grad_enabled()
    loss, _ = _operator(logits, labels, ignore_index, class_weights, float(label_smoothing), needs_gradient)
    return loss


def plain_upsampled_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int = 255,
    class_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """[`upsampled_cross_entropy`] by `interpolate` and `cross_entropy` of torch, for comparison.

    Args, Returns, Raises: As there.
    """
    check_arguments(logits, labels, class_weights, label_smoothing)
    upsampled = upsample_logits(logits, labels)
    total = total_label_weight(labels, ignore_index, class_weights).to(upsampled.dtype)
    loss = nn.functional.cross_entropy(
        upsampled,
        labels.long(),
        weight=None if class_weights is None else class_weights.to(upsampled),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    return loss * (total > 0) / total.where(total > 0, 1.0)


def upsampled_hard_pixel_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int = 255,
    class_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
    ohem_fraction: float = 1.0,
) -> torch.Tensor:
    """Mean cross-entropy that pixels of a high loss rule: focal loss and online hard example mining.

    The loss of a pixel whose class t has the probability p[t] is (1 - p[t])^gamma times its cross-entropy (Lin et al., ICCV
    2017, equation 4). Of the valid pixels of the batch the `ohem_fraction` of the highest losses counts (Shrivastava et al.,
    CVPR 2016). The sum is divided by the class weights of the pixels that count. Holds the upsampled logits.

    Args:
        logits, labels, ignore_index, class_weights, label_smoothing: As in [`upsampled_cross_entropy`].
        focal_gamma (`float`, defaults to 0.0): The exponent; 0 is the cross-entropy.
        ohem_fraction (`float`, defaults to 1.0): Share of the valid pixels that counts, rounded up; 1 is all of them.

    Returns:
        `torch.FloatTensor` of shape `()`: The loss; 0 with a zero gradient if all pixels are ignored.

    Raises:
        ValueError: If shapes or options do not fit.
    """
    check_arguments(logits, labels, class_weights, label_smoothing)
    if not focal_gamma >= 0 or not 0 < ohem_fraction <= 1:
        raise ValueError(
            f"`focal_gamma` must be at least 0 and `ohem_fraction` from 0 to 1, got {focal_gamma} and {ohem_fraction}."
        )
    upsampled = upsample_logits(logits, labels)
    valid = labels != ignore_index
    scores = upsampled.movedim(1, -1)[valid]  # (valid pixels, labels)
    targets = labels[valid].long()
    if not len(targets):
        return upsampled.sum() * 0.0
    weights = None if class_weights is None else class_weights.to(scores)
    losses = nn.functional.cross_entropy(
        scores, targets, weight=weights, label_smoothing=label_smoothing, reduction="none"
    )
    if focal_gamma:
        of_target = scores.log_softmax(1).gather(1, targets[:, None])[:, 0].exp()
        losses = losses * (1 - of_target).clamp(min=1e-7) ** focal_gamma
    divisors = torch.ones_like(losses) if weights is None else weights[targets]
    if ohem_fraction < 1:
        losses, chosen = losses.topk(math.ceil(ohem_fraction * len(losses)))
        divisors = divisors[chosen]
    return losses.sum() / divisors.sum().clamp(min=1e-12)


def upsampled_dice_loss(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = 255) -> torch.Tensor:
    """Soft Dice loss: 1 - 2 sum(p t) / (sum(p) + sum(t)), as a mean over the classes that occur.

    p are probabilities after bilinear upsampling, t is 1 where the label is the class; sums run over the pixels of the
    batch that are not ignored (as `DiceLoss` of segmentation_models.pytorch, losses/dice.py). Holds the upsampled logits.

    Args, Raises: As [`upsampled_cross_entropy`].

    Returns:
        `torch.FloatTensor` of shape `()`: The loss, from 0 to 1; 0 with a zero gradient if all pixels are ignored.
    """
    check_arguments(logits, labels, None, 0.0)
    upsampled = upsample_logits(logits, labels)
    valid = labels != ignore_index
    probabilities = upsampled.softmax(dim=1) * valid[:, None]
    truth = nn.functional.one_hot(labels.where(valid, 0).long(), logits.shape[1]).movedim(-1, 1) * valid[:, None]
    overlap, of_truth = (probabilities * truth).sum((0, 2, 3)), truth.sum((0, 2, 3))
    losses = 1 - 2 * overlap / (probabilities.sum((0, 2, 3)) + of_truth).clamp(min=1e-7)
    occurs = of_truth > 0
    return (losses * occurs).sum() / occurs.sum().clamp(min=1)


def upsample_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Logits (batch, labels, height, width) bilinearly at the size of the labels, in float32 or float64."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return nn.functional.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)


def total_label_weight(
    labels: torch.Tensor, ignore_index: int = 255, class_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """What a mean cross-entropy divides its sum by: the weights of the classes of all pixels that are not ignored.

    Args:
        labels (`torch.LongTensor` of shape `(batch_size, height, width)`): Classes, or `ignore_index`.
        ignore_index (`int`, defaults to 255): Label of the pixels that are left out.
        class_weights (`torch.FloatTensor` of shape `(num_labels,)`, *optional*): Weight of each class; 1 by default.

    Returns:
        `torch.DoubleTensor` of shape `()`: The sum of the weights.
    """
    valid = labels[labels != ignore_index]
    if class_weights is None:
        return labels.new_tensor(valid.numel(), dtype=torch.float64)
    # The loss itself refuses labels that are no class.
    return class_weights.to(labels.device, torch.float64)[valid.long().clamp(0, len(class_weights) - 1)].sum()


def check_arguments(
    logits: torch.Tensor, labels: torch.Tensor, class_weights: torch.Tensor | None, label_smoothing: float
) -> None:
    """Shapes and options fit each other.

    Raises:
        ValueError: If they do not.
    """
    if logits.ndim != 4 or labels.ndim != 3 or len(logits) != len(labels):
        raise ValueError(
            "Expected logits of shape (batch_size, num_labels, height, width) and labels of shape (batch_size, height, "
            f"width), got {tuple(logits.shape)} and {tuple(labels.shape)}."
        )
    if labels.is_floating_point():
        raise ValueError(f"Expected labels of an integer type, got {labels.dtype}.")
    if class_weights is not None and class_weights.shape != (logits.shape[1],):
        raise ValueError(f"Expected {logits.shape[1]} class weights, got the shape {tuple(class_weights.shape)}.")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"`label_smoothing` must be from 0 to 1, got {label_smoothing}.")


class _LossTile(NamedTuple):
    """Pixels of an axis, the logits that they are made of, and the matrix (pixels, logits) from these to those."""

    pixels: slice
    logits: slice
    weights: torch.Tensor


@lru_cache(maxsize=64)
def _loss_tiles(
    logits_side: int, side: int, tile_size: int, device: torch.device, dtype: torch.dtype
) -> tuple[_LossTile, ...]:
    """The tiles of an axis: those of the merge of one window that is the whole side."""
    tiles = []
    for tile in merge_tiles(Axis((0,), side, side, logits_side, side, side), tile_size, device, dtype):
        weights = tile.weights
        if tile.patches is not None:  # where pixels are fewer than logits, some logits are not used
            weights = weights.new_zeros(len(weights), tile.last_patch - tile.first_patch)
            weights[:, tile.patches] = tile.weights
        tiles.append(_LossTile(slice(tile.start, tile.stop), slice(tile.first_patch, tile.last_patch), weights))
    return tuple(tiles)


class _BandPixels(NamedTuple):
    """The pixels of a band, each tensor of shape (pixels, 1), and what its tiles find out about them.

    The small operations on them are done for a whole band: they cost the threads, which take turns at Python, more than
    their arithmetic.
    """

    target: torch.Tensor
    hard: torch.Tensor  # weight of the label in the mean
    soft: torch.Tensor | None  # weight of all classes, with label smoothing
    share: torch.Tensor  # both
    sums: torch.Tensor  # of the powers of all scores
    of_target: torch.Tensor  # score of the label
    of_all: torch.Tensor | None  # weighted sum of all scores, with label smoothing

    def split(self, sizes: list[int]) -> Iterator["_BandPixels"]:
        """The pixels of each tile."""
        parts = ([None] * len(sizes) if values is None else values.split(sizes) for values in self)
        return (_BandPixels(*part) for part in zip(*parts))

    def loss(self) -> torch.Tensor:
        """The loss of the pixels in units of log 2, in float64."""
        total = (self.sums.log2() * self.share - self.of_target * self.hard).sum(dtype=torch.float64)
        if self.soft is not None and self.of_all is not None:
            total -= (self.of_all * self.soft).sum(dtype=torch.float64)
        return total


class _TiledLoss:
    """The loss of a batch and its gradient, an image after the other, and of an image a band of tiles in each thread.

    With p the softmax of a pixel of class t, w the weights, W their sum, e the smoothing, C the number of classes and N
    the sum of w[t] over the pixels, the loss of the pixel is ((1 - e) w[t] (-log p[t]) + e / C sum(w (-log p))) / N, and
    its gradient ((1 - e) w[t] + e W / C) p - (1 - e) w[t] onehot(t) - e w / C, over N.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        ignore_index: int,
        class_weights: torch.Tensor | None,
        label_smoothing: float,
    ) -> None:
        self.logits, self.labels, self.ignore_index = logits, labels, ignore_index
        self.device, self.num_labels = logits.device, logits.shape[1]
        self.dtype = torch.float64 if logits.dtype == torch.float64 else product_dtype(self.device)
        self.weights = torch.ones(self.num_labels, device=self.device, dtype=self.dtype)
        self.all_weights_are_one = class_weights is None
        if class_weights is not None:
            self.weights = class_weights.to(self.device, self.dtype)
        self.weight_sum = self.weights.sum()
        tile_size = CPU_TILE if self.device.type == "cpu" else GPU_TILE
        self.rows, self.columns = (
            _loss_tiles(*axis, self.device, self.dtype) for axis in zip(logits.shape[2:], labels.shape[1:], tile_size)
        )
        prepared = run_in_threads(self._prepare_image, range(len(logits)), self.device)
        self.values = [values for values, _, _ in prepared]
        # A look at values of the device: one for the batch.
        needs_max = torch.stack([largest > MAX_LOGIT_RANGE for _, largest, _ in prepared]).tolist() if prepared else []
        self.needs_max_subtraction: list[bool] = needs_max
        total = sum((weight for _, _, weight in prepared), torch.zeros((), device=self.device, dtype=torch.float64))
        scale = torch.where(total > 0, 1 / total, 0.0).to(self.dtype)
        self.hard_factor = (1 - label_smoothing) * scale
        self.soft_factor = label_smoothing / self.num_labels * scale if label_smoothing else None

    def _prepare_image(self, image: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits (height, width, labels) in units of log 2 and at most 0, their spread, and the weight of the labels."""
        values = self.logits[image].permute(1, 2, 0).contiguous().to(self.dtype) / math.log(2)
        greatest = values.amax(-1, keepdim=True)
        spread = (greatest - values.amin(-1, keepdim=True)).max()
        values -= greatest  # softmax does not change, and the powers stay in range
        target, valid = self._targets(self.labels[image])
        if self.device.type == "cpu":
            self._check_targets(target)
        return values, spread, self._label_weights(target, valid).sum(dtype=torch.float64)

    def _targets(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Classes, 0 where a label is ignored, and which labels are not."""
        labels = labels.long()
        valid = labels != self.ignore_index
        return labels.where(valid, 0), valid

    def _check_targets(self, target: torch.Tensor) -> None:
        if target.numel() and not 0 <= int(target.min()) <= int(target.max()) < self.num_labels:
            wrong = sorted({*target[(target < 0) | (target >= self.num_labels)].tolist()})[:5]
            raise ValueError(
                f"Labels must be from 0 to {self.num_labels - 1} or the ignored {self.ignore_index}, got {wrong}. Check "
                "the number of labels, and whether the masks need `do_reduce_labels` or a label map."
            )

    def run(self, needs_gradient: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss `()` and its gradient by the logits; an empty tensor where it is not needed."""
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        gradient = self.logits.new_empty(0)
        if needs_gradient:
            gradient = self.logits.new_empty(self.logits.shape, dtype=_gradient_dtype(self.logits))
        for image in range(len(self.logits)):
            loss_of_band = partial(self._band, image, needs_gradient=needs_gradient)
            bands = run_in_threads(loss_of_band, self.rows, self.device)
            total += torch.stack([loss for loss, _ in bands]).sum()
            if needs_gradient:
                of_bands = [of_band for _, of_band in bands if of_band is not None]
                run_in_threads(partial(self._add_bands, gradient[image]), [of_bands], self.device)
        result_dtype = torch.float64 if self.logits.dtype == torch.float64 else torch.float32
        return (total * math.log(2)).to(result_dtype), gradient

    def _band(self, image: int, row: _LossTile, needs_gradient: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Loss of a band of tiles in units of log 2, and the gradient by the rows of logits that it is made of."""
        height = len(row.weights)
        pixels = self._pixels(self.labels[image, row.pixels])
        band = row.weights @ self.values[image][row.logits].flatten(1)
        # (columns, height, labels)
        band = band.view(height, -1, self.num_labels).transpose(0, 1).contiguous()
        gradient = torch.zeros_like(band) if needs_gradient else None
        # Tiles are computed in place: fresh memory for each would cost more than the arithmetic.
        buffer = band.new_empty(max(len(column.weights) for column in self.columns) * height * self.num_labels)
        parts = pixels.split([len(column.weights) * height for column in self.columns])
        for column, part in zip(self.columns, parts):
            tile = buffer[: len(part.target) * self.num_labels].view(len(column.weights), -1)
            torch.mm(column.weights, band[column.logits].flatten(1), out=tile)
            self._tile(tile.view(-1, self.num_labels), part, self.needs_max_subtraction[image], needs_gradient)
            if gradient is not None:
                gradient[column.logits].flatten(1).addmm_(column.weights.T, tile)
        if gradient is not None:
            gradient = row.weights.T @ gradient.transpose(0, 1).reshape(height, -1)
        return pixels.loss(), gradient

    def _pixels(self, labels: torch.Tensor) -> _BandPixels:
        """The pixels of a band, column after column."""
        target, valid = self._targets(labels.T.reshape(-1, 1))
        hard = self._label_weights(target, valid) * self.hard_factor
        if self.soft_factor is None:
            soft, of_all, share = None, None, hard
        else:
            soft, of_all = valid * self.soft_factor, torch.empty_like(hard)
            share = hard + self.weight_sum * soft
        return _BandPixels(target, hard, soft, share, torch.empty_like(hard), torch.empty_like(hard), of_all)

    def _label_weights(self, target: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """The weight of the class of each pixel, 0 where it is ignored."""
        return valid.to(self.dtype) if self.all_weights_are_one else self.weights[target] * valid

    def _tile(
        self, scores: torch.Tensor, pixels: _BandPixels, needs_max_subtraction: bool, needs_gradient: bool
    ) -> None:
        """Note what the loss needs of some pixels; their scores (pixels, labels) become the gradient."""
        if needs_max_subtraction:
            scores -= scores.amax(-1, keepdim=True)
        torch.gather(scores, 1, pixels.target, out=pixels.of_target)
        if pixels.of_all is not None:
            torch.mm(scores, self.weights[:, None], out=pixels.of_all)
        scores.exp2_()
        torch.sum(scores, -1, keepdim=True, out=pixels.sums)
        if needs_gradient:
            scores *= pixels.share / pixels.sums
            scores.scatter_add_(1, pixels.target, -pixels.hard)
            if pixels.soft is not None:
                scores.addmm_(pixels.soft, self.weights[None], alpha=-1)

    def _add_bands(self, gradient: torch.Tensor, bands: list[torch.Tensor]) -> None:
        """Write the gradient (labels, height, width) of an image, whose rows of logits occur in several bands."""
        _, height, width = gradient.shape
        total = bands[0].new_zeros(height, width * self.num_labels)
        for row, band in zip(self.rows, bands):
            total[row.logits] += band
        gradient.copy_(total.view(height, width, -1).permute(2, 0, 1))


def loss_and_gradient(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    class_weights: torch.Tensor | None,
    label_smoothing: float,
    needs_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss `()` and its gradient by the logits; an empty tensor where it is not needed."""
    return _TiledLoss(logits, labels, ignore_index, class_weights, label_smoothing).run(needs_gradient)


def _shapes(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    class_weights: torch.Tensor | None,
    label_smoothing: float,
    needs_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the operator returns, without values, for the compiler."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    gradient = logits.new_empty(logits.shape, dtype=_gradient_dtype(logits)) if needs_gradient else logits.new_empty(0)
    return logits.new_empty((), dtype=dtype), gradient


def _gradient_dtype(logits: torch.Tensor) -> torch.dtype:
    """What holds the gradient of the unscaled loss, most of which is too small for float16."""
    return torch.float32 if logits.dtype == torch.float16 else logits.dtype


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.logits_dtype = inputs[0].dtype


def _multiply_gradient(
    ctx: Any, loss_gradient: torch.Tensor, _: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("The tiled loss is differentiable once: set `use_tiled_loss=False` for second derivatives.")
    (gradient,) = ctx.saved_tensors
    product = loss_gradient.to(gradient.dtype) * gradient
    return product.to(ctx.logits_dtype), None, None, None, None, None


def _operator_name() -> str:
    """A name that other versions of this file, and of those that it imports, do not have.

    An operator is registered once in a process, and remote code of several versions may be loaded into one.
    """
    parts = (product_dtype, merge_tiles, linear_matrix, run_in_threads, loss_and_gradient)
    sources = [inspect.getsource(sys.modules[part.__module__]) for part in parts]
    return f"upsampled_cross_entropy_{hashlib.sha256(''.join(sources).encode()).hexdigest()[:12]}"


def _register() -> "Callable[..., tuple[torch.Tensor, torch.Tensor]]":
    """The operator, made once in a process even if this file is loaded twice, as remote code may be."""
    name = _operator_name()
    if hasattr(getattr(torch.ops, NAMESPACE), name):
        registered: Callable[..., tuple[torch.Tensor, torch.Tensor]] = getattr(getattr(torch.ops, NAMESPACE), name)
        return registered
    schema = (
        "(Tensor logits, Tensor labels, int ignore_index, Tensor? class_weights, float label_smoothing, "
        "bool needs_gradient) -> (Tensor, Tensor)"
    )
    operator = torch.library.custom_op(f"{NAMESPACE}::{name}", loss_and_gradient, mutates_args=(), schema=schema)
    operator.register_fake(_shapes)
    operator.register_autograd(_multiply_gradient, setup_context=_keep_gradient)
    return operator


_operator = _register()

__all__ = [
    "plain_upsampled_cross_entropy",
    "total_label_weight",
    "upsampled_cross_entropy",
    "upsampled_dice_loss",
    "upsampled_hard_pixel_loss",
]
