"""Cross-entropy between the pixels of a label map and bilinearly upsampled patch logits."""

import torch
from torch import nn


def upsampled_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int = 255,
    class_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Mean cross-entropy over the pixels that are not ignored.

    Equal to `interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)` followed by
    `cross_entropy`, computed in float32, except that a batch of ignored pixels alone gives 0 with a zero gradient
    where torch gives NaN.

    Args:
        logits (`torch.FloatTensor` of shape `(batch_size, num_labels, logits_height, logits_width)`): Patch logits.
        labels (`torch.LongTensor` of shape `(batch_size, height, width)`): Classes from 0 to `num_labels - 1`, or
            `ignore_index`.
        ignore_index (`int`, defaults to 255): Label of the pixels that are left out.
        class_weights (`torch.FloatTensor` of shape `(num_labels,)`, *optional*): Weight of each class.
        label_smoothing (`float`, defaults to 0.0): Share of each label that is spread over all classes.

    Returns:
        `torch.FloatTensor` of shape `()`: The loss.
    """
    upsampled = nn.functional.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
    valid = (labels != ignore_index).any()
    loss = nn.functional.cross_entropy(
        upsampled,
        labels.long(),
        weight=class_weights,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )
    return torch.where(valid, loss, upsampled.sum() * 0.0)


plain_upsampled_cross_entropy = upsampled_cross_entropy

__all__ = ["upsampled_cross_entropy"]
