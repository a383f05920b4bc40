"""Cross-entropy between the pixels of a label map and bilinearly upsampled logits, without the upsampled logits.

Upsampling is linear and separable, so a tile of pixels is a product of two small matrices and the logits around it. In one
pass over the tiles the loss is added up, and the gradient of each tile, softmax minus one-hot, is pushed back through the
same matrices into a gradient of the size of the logits. That gradient is all that is kept; backward multiplies it by the
incoming scalar. Memory is that of the logits and a tile, not that of the pixels times the classes.
"""

import math
from functools import lru_cache

import torch
from torch import nn

from .sliding_window import full_float32, merge_tiles


# Pixels of a tile: on the CPU its values stay in cache, on a GPU few launches matter more.
CPU_TILE, GPU_TILE = (32, 128), (128, 512)
# Scores are taken to the base 2, whose power is several times faster than that of e. It needs no pass for its maximum
# where no class is further than this below the best one of its position.
MAX_LOGIT_RANGE = 86.0
OPERATOR = "segmenter_hf::upsampled_cross_entropy"


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
    logits = logits if logits.dtype == torch.float64 else logits.float()
    upsampled = nn.functional.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    loss = nn.functional.cross_entropy(
        upsampled,
        labels.long(),
        weight=None if class_weights is None else class_weights.to(upsampled),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )
    return torch.where((labels != ignore_index).any(), loss, upsampled.sum() * 0.0)


def upsampled_dice_loss(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = 255) -> torch.Tensor:
    """Soft Dice loss: 1 - 2 sum(p t) / (sum(p) + sum(t)), as a mean over the classes that occur.

    p are probabilities after bilinear upsampling, t is 1 where the label is the class; sums run over the pixels of the
    batch that are not ignored (as `DiceLoss` of segmentation_models.pytorch, losses/dice.py). Holds the upsampled logits.

    Args, Raises: As [`upsampled_cross_entropy`].

    Returns:
        `torch.FloatTensor` of shape `()`: The loss, from 0 to 1; 0 with a zero gradient if all pixels are ignored.
    """
    check_arguments(logits, labels, None, 0.0)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    upsampled = nn.functional.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    valid = labels != ignore_index
    probabilities = upsampled.softmax(dim=1) * valid[:, None]
    truth = nn.functional.one_hot(labels.where(valid, 0).long(), logits.shape[1]).movedim(-1, 1) * valid[:, None]
    overlap, of_truth = (probabilities * truth).sum((0, 2, 3)), truth.sum((0, 2, 3))
    losses = 1 - 2 * overlap / (probabilities.sum((0, 2, 3)) + of_truth).clamp(min=1e-7)
    occurs = of_truth > 0
    return (losses * occurs).sum() / occurs.sum().clamp(min=1)


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


@lru_cache(maxsize=64)
def _tiles(
    logits_side: int, side: int, tile: int, device: torch.device, dtype: torch.dtype
) -> list[tuple[slice, slice, torch.Tensor]]:
    """Pixels of each tile of an axis, the logits that they are made of, and the matrix from these to those.

    They are the tiles of the merge, of one window that is the whole side.
    """
    tiles = []
    for each in merge_tiles((0,), side, side, logits_side, side, side, False, tile, device):
        weights = each.weights.to(dtype)
        if each.patches is not None:  # where pixels are fewer than logits, some logits are not used
            weights = weights.new_zeros(len(weights), each.last_patch - each.first_patch)
            weights[:, each.patches] = each.weights.to(dtype)
        tiles.append((slice(each.start, each.stop), slice(each.first_patch, each.last_patch), weights))
    return tiles


def loss_and_gradient(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    class_weights: torch.Tensor | None,
    label_smoothing: float,
    needs_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss `()` and its gradient by the logits; an empty tensor where it is not needed.

    With p the softmax of a pixel of class t, w the weights, W their sum, e the smoothing, C the number of classes and N
    the sum of w[t] over the pixels, the loss of the pixel is ((1 - e) w[t] (-log p[t]) + e / C sum(w (-log p))) / N, and
    its gradient ((1 - e) w[t] + e W / C) p - (1 - e) w[t] onehot(t) - e w / C, over N.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    num_labels, size, device = logits.shape[1], labels.shape[-2:], logits.device
    labels = labels.long()
    valid = labels != ignore_index
    targets = labels.where(valid, 0)
    if device.type == "cpu" and targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < num_labels:
        wrong = sorted({*targets[(targets < 0) | (targets >= num_labels)].tolist()})[:5]
        raise ValueError(
            f"Labels must be from 0 to {num_labels - 1} or the ignored {ignore_index}, got {wrong}. Check the number of "
            "labels, and whether the masks need `do_reduce_labels` or a label map."
        )
    weights = (
        torch.ones(num_labels, device=device, dtype=dtype)
        if class_weights is None
        else class_weights.to(device, dtype)
    )
    hard = weights[targets] * valid
    total_weight = hard.sum(dtype=torch.float64)
    scale = torch.where(total_weight > 0, 1 / total_weight, 0.0).to(dtype)
    hard *= (1 - label_smoothing) * scale
    soft = valid * (label_smoothing / num_labels * scale) if label_smoothing else None
    weight_sum = weights.sum()

    tile_size = CPU_TILE if device.type == "cpu" else GPU_TILE
    rows, columns = (_tiles(*axis, device, dtype) for axis in zip(logits.shape[2:], size, tile_size))
    buffer = torch.empty(
        min(tile_size[0], size[0]) * min(tile_size[1], size[1]) * num_labels, device=device, dtype=dtype
    )
    total = torch.zeros((), device=device, dtype=torch.float64)
    gradient = (
        torch.empty_like(logits, memory_format=torch.contiguous_format) if needs_gradient else logits.new_empty(0)
    )
    with full_float32(device):
        for image in range(len(logits)):
            values = logits[image].permute(1, 2, 0).contiguous().to(dtype) / math.log(2)
            greatest = values.amax(-1, keepdim=True)
            needs_max_subtraction = bool((greatest - values.amin(-1, keepdim=True)).max() > MAX_LOGIT_RANGE)
            values -= greatest  # softmax does not change, and the powers stay in range
            values_gradient = torch.zeros_like(values) if needs_gradient else None
            for row_pixels, of_row, row_weights in rows:
                band = row_weights @ values[of_row].flatten(1)
                band = (
                    band.view(len(row_weights), -1, num_labels).transpose(0, 1).contiguous()
                )  # (columns, height, labels)
                band_gradient = torch.zeros_like(band) if needs_gradient else None
                for column_pixels, of_column, column_weights in columns:
                    pixels = (image, row_pixels, column_pixels)
                    shape = (len(column_weights), len(row_weights) * num_labels)
                    tile = buffer[: shape[0] * shape[1]].view(shape)
                    torch.mm(column_weights, band[of_column].flatten(1), out=tile)
                    scores = tile.view(-1, num_labels)  # (width * height, labels)
                    target = targets[pixels].T.reshape(-1, 1)
                    of_target = hard[pixels].T.reshape(-1, 1)
                    if needs_max_subtraction:
                        scores -= scores.amax(-1, keepdim=True)
                    total -= (scores.gather(1, target) * of_target).sum()
                    share = of_target
                    if soft is not None:
                        of_all = soft[pixels].T.reshape(-1, 1)
                        total -= (scores @ weights[:, None] * of_all).sum()
                        share = of_target + weight_sum * of_all
                    scores.exp2_()
                    sums = scores.sum(-1, keepdim=True)
                    total += (sums.log2() * share).sum()
                    if not needs_gradient:
                        continue
                    scores *= share / sums
                    scores.scatter_add_(1, target, -of_target)
                    if soft is not None:
                        scores.addmm_(of_all, weights[None], alpha=-1)
                    band_gradient[of_column].flatten(1).addmm_(column_weights.T, tile)
                if needs_gradient:
                    band_gradient = band_gradient.transpose(0, 1).reshape(len(row_weights), -1)
                    values_gradient[of_row].flatten(1).addmm_(row_weights.T, band_gradient)
            if needs_gradient:
                gradient[image] = values_gradient.permute(2, 0, 1)
    return (total * math.log(2)).to(dtype), gradient


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
    gradient = logits.new_empty(logits.shape if needs_gradient else 0)
    return logits.new_empty((), dtype=dtype), gradient


def _keep_gradient(ctx, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _multiply_gradient(ctx, loss_gradient: torch.Tensor, _: torch.Tensor | None) -> tuple:
    if torch.is_grad_enabled():
        raise RuntimeError("The tiled loss is differentiable once: set `use_tiled_loss=False` for second derivatives.")
    (gradient,) = ctx.saved_tensors
    return loss_gradient.to(gradient.dtype) * gradient, None, None, None, None, None


def _register() -> "torch.library.CustomOpDef | torch._ops.OpOverload":
    """The operator, made once in a process even if this file is loaded twice, as remote code may be."""
    namespace, name = OPERATOR.split("::")
    if hasattr(getattr(torch.ops, namespace), name):
        return getattr(getattr(torch.ops, namespace), name)
    schema = (
        "(Tensor logits, Tensor labels, int ignore_index, Tensor? class_weights, float label_smoothing, "
        "bool needs_gradient) -> (Tensor, Tensor)"
    )
    operator = torch.library.custom_op(OPERATOR, loss_and_gradient, mutates_args=(), schema=schema)
    operator.register_fake(_shapes)
    operator.register_autograd(_multiply_gradient, setup_context=_keep_gradient)
    return operator


_operator = _register()

__all__ = [
    "plain_upsampled_cross_entropy",
    "total_label_weight",
    "upsampled_cross_entropy",
    "upsampled_dice_loss",
]
