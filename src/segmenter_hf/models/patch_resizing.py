"""Another patch size for a trained encoder: fewer tokens, or more (FlexiViT; Beyer et al., CVPR 2023, section 3.4)."""

import torch
from torch.nn.functional import interpolate


def patch_resize_matrix(old: int, new: int) -> torch.Tensor:
    """The matrix of the bilinear resize of a side, with antialiasing where it becomes smaller, as in FlexiViT.

    Args:
        old (`int`), new (`int`): Lengths in pixels.

    Returns:
        `torch.DoubleTensor` of shape `(new, old)`.
    """
    identity = torch.eye(old, dtype=torch.float64)[None, None]
    # Columns of the identity are resized; the length of the other side stays.
    return interpolate(identity, (new, old), mode="bilinear", align_corners=False, antialias=True)[0, 0]


def resize_patch_kernel(kernel: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Resize the weights of a patch embedding, so that its product with a resized patch is that with the patch.

    Let B be the matrix that resizes a patch. The weights are multiplied by the pseudo-inverse of the transpose of B: of all
    kernels with the least squared error over patches of white noise that is the smallest one. Where patches become larger, the
    error is 0. B is the product of a matrix for the rows and one for the columns, and so is its pseudo-inverse.

    Args:
        kernel (`torch.FloatTensor` of shape `(hidden_size, num_channels, old, old)`): The weights.
        patch_size (`int`): The new side in pixels.

    Returns:
        `torch.FloatTensor` of shape `(hidden_size, num_channels, patch_size, patch_size)`: In the dtype and on the device of
        the weights; computed in float64.
    """
    if kernel.shape[-1] == patch_size:
        return kernel
    inverse = torch.linalg.pinv(patch_resize_matrix(kernel.shape[-1], patch_size).T)  # (new, old)
    resized = inverse @ kernel.to("cpu", torch.float64) @ inverse.T
    return resized.to(kernel.device, kernel.dtype)


__all__ = ["patch_resize_matrix", "resize_patch_kernel"]
