"""Where a patch or a class looks: attention probabilities of single tokens, and images of them.

Only the rows that are asked for are computed, from the input of their layer: (heads, tokens) numbers for each query instead
of (heads, tokens, tokens) for every layer. They are the same whatever attention implementation the model runs with.
"""

import threading
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedModel
from transformers.image_utils import ImageInput

from ..models.configuration_vit_encoder import VitEncoderConfig
from ..models.modeling_vit_encoder import VitEncoderLayer, VitEncoderModel
from ..models.token_merging import MergedTokens
from ..models.window_geometry import Window
from .predictor import Predictor
from .runtimes import RuntimeNetwork
from .visualization import attention_overlay, image_table, preview


MAX_CLASSES_SHOWN = 6


@torch.no_grad()
def attention_rows(
    model: PreTrainedModel,
    pixel_values: torch.Tensor,
    queries: Sequence[int] | None = None,
    layer: int = -1,
    *,
    decoder: bool = False,
) -> torch.Tensor:
    """Attention probabilities of some tokens in one layer.

    Args:
        model (`PreTrainedModel`): A semantic segmentation model of this package, in evaluation mode.
        pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`): Normalized images.
        queries (`Sequence[int]`, *optional*): The tokens that attend; all by default. In the encoder the class token and, for
            DeiT, the distillation token come first, then the register tokens and then the patches, row by row; in the
            decoder the patches come first and then the classes.
        layer (`int`, defaults to -1): The layer, counted from 0; negative ones from the end.
        decoder (`bool`, defaults to `False`): Whether a layer of the mask transformer is meant instead of the encoder.

    Returns:
        `torch.FloatTensor` of shape `(batch_size, num_heads, num_queries, num_tokens)`: Rows that add up to 1, float32.

    Raises:
        ValueError: If there is no such layer or token.
    """
    encoder = cast(VitEncoderModel, model.base_model)
    attention = _layer(model, layer, decoder).attention
    (tokens, rotary), merges = _captured_inputs(model, attention, pixel_values)
    merged = _merged_before(model, merges, layer, decoder)
    sides = (
        (0, cast(VitEncoderConfig, model.config).num_labels) if decoder else (encoder.embeddings.num_prefix_tokens, 0)
    )
    num_tokens = tokens.shape[1] if merged is None else merged.source.shape[1] + sum(sides)
    if queries is not None and not all(-num_tokens <= query < num_tokens for query in queries):
        raise ValueError(f"`queries` must be tokens from 0 to {num_tokens - 1}, got {list(queries)}.")
    query, key = (
        attention.project(projection, tokens, rotary).float() for projection in (attention.q_proj, attention.k_proj)
    )
    if merged is None:
        query = query if queries is None else query[:, :, list(queries)]
        return (query @ key.transpose(2, 3) * attention.scaling).softmax(dim=-1)
    padding = nn.functional.pad(merged.sizes == 0, sides, value=False)
    scores = (query @ key.transpose(2, 3) * attention.scaling).masked_fill(padding[:, None, None], -torch.inf)
    return merged.expand_attention(scores.softmax(dim=-1), sides[0], sides[1], queries=queries)


def _captured_inputs(
    model: PreTrainedModel, attention: nn.Module, pixel_values: torch.Tensor
) -> tuple[tuple[torch.Tensor, Any], list[MergedTokens]]:
    """The tokens and rotations that an attention module gets in a forward pass of this thread, and the merges of tokens."""
    thread = threading.get_ident()  # other threads may be using the model
    captured: list[tuple[torch.Tensor, Any]] = []
    merges: list[MergedTokens] = []

    def capture(module: nn.Module, inputs: tuple[torch.Tensor, ...], options: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            captured.append((inputs[0], options.get("rotary")))

    def capture_merging(module: nn.Module, inputs: tuple[torch.Tensor, ...], outputs: Any) -> None:
        if threading.get_ident() == thread:
            merges.extend(outputs.merged_tokens or ())

    hooks = [
        attention.register_forward_pre_hook(capture, with_kwargs=True),
        model.base_model.register_forward_hook(capture_merging),
    ]
    try:
        model(pixel_values=pixel_values.to(model.device, model.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    (inputs_of_attention,) = captured
    return inputs_of_attention, merges


def _merged_before(
    model: PreTrainedModel, merges: list[MergedTokens], layer: int, decoder: bool
) -> MergedTokens | None:
    """What the tokens are that a layer attends to, where token merging took place before it."""
    layers = list(model.config.token_merging_layers or ())
    index = range(model.config.num_hidden_layers)[layer] if not decoder else model.config.num_hidden_layers
    number = bisect_left(layers, index)
    return merges[number - 1] if number else None


def patch_attention(predictor: Predictor, image: ImageInput, point: tuple[int, int], layer: int = -1) -> np.ndarray:
    """How much the patch under a point of an image attends to each patch, in one layer of the encoder.

    The image is resized as for prediction and goes through the network whole, not in windows.

    Args:
        predictor ([`Predictor`]): The model and its image processor.
        image (`ImageInput`): One image, as the processor takes it.
        point (`tuple[int, int]`): `(x, y)` in pixels of the image.
        layer (`int`, defaults to -1): The layer, counted from 0; negative ones from the end.

    Returns:
        `np.ndarray` of shape `(num_heads, rows, columns)` and dtype `float32`: Probabilities for each patch of a grid that
        covers the image; what is missing to 1 goes to the class, distillation and register tokens.

    Raises:
        ValueError: If the point is not in the image or there is no such layer.
    """
    model = torch_model(predictor)
    pixel_values, (rows, columns), (height, width) = _whole_image(predictor, image)
    x, y = point
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(f"`point` must be (x, y) in an image of {width} x {height} pixels, got {point}.")
    prefix = cast(VitEncoderModel, model.base_model).embeddings.num_prefix_tokens
    query = prefix + int(y * rows / height) * columns + int(x * columns / width)
    probabilities = attention_rows(model, pixel_values, [query], layer)
    return probabilities[0, :, 0, prefix:].unflatten(-1, (rows, columns)).cpu().numpy()


def class_attention(predictor: Predictor, image: ImageInput, class_id: int, layer: int = -1) -> np.ndarray:
    """How much the embedding of a class attends to each patch, in one layer of the mask transformer.

    Args:
        predictor ([`Predictor`]), image (`ImageInput`): As for `patch_attention`.
        class_id (`int`): The class, from 0; of a model with one class that is 1, for 0 is the background, which has no
            embedding.
        layer (`int`, defaults to -1): The layer of the decoder, counted from 0; negative ones from the end.

    Returns:
        `np.ndarray` of shape `(num_heads, rows, columns)` and dtype `float32`: Probabilities for each patch of a grid that
        covers the image; what is missing to 1 goes to the classes.

    Raises:
        ValueError: If the decoder has no class embeddings, or there is no such class or layer.
    """
    model = torch_model(predictor)
    pixel_values, (rows, columns), _ = _whole_image(predictor, image)
    classes = _attending_classes(model)
    if class_id not in classes:
        raise ValueError(f"`class_id` must be from {classes[0]} to {classes[-1]}, got {class_id}.")
    query = rows * columns + classes.index(class_id)
    probabilities = attention_rows(model, pixel_values, [query], layer, decoder=True)
    return probabilities[0, :, 0, : rows * columns].unflatten(-1, (rows, columns)).cpu().numpy()


def _attending_classes(model: PreTrainedModel) -> range:
    """The classes that have an embedding: all of them, and of one class and background the class."""
    num_labels = cast(VitEncoderConfig, model.config).num_labels
    return range(num_labels) if num_labels > 1 else range(1, 2)


def has_class_attention(model: PreTrainedModel | RuntimeNetwork) -> bool:
    """Whether the model has class embeddings that attend to patches: a Segmenter with a mask transformer, run by torch."""
    return not isinstance(model, RuntimeNetwork) and hasattr(model.decode_head, "class_embeddings")


def torch_model(predictor: Predictor) -> PreTrainedModel:
    """The model of a predictor.

    Raises:
        ValueError: If it is an exported one.
    """
    if isinstance(predictor.model, RuntimeNetwork):
        raise ValueError(
            f"An exported model gives logits and no attention: load the model itself, with the runtime 'torch' instead of "
            f"{predictor.runtime!r}."
        )
    return predictor.model


def attention_image(
    predictor: Predictor, image: Image.Image | np.ndarray, class_map: np.ndarray, layer: int = -1
) -> Image.Image:
    """Attention, averaged over the heads, of the largest classes of an image.

    The first row shows the patch nearest to the middle of each class (marked by a cross) in the last layer of the
    encoder; for a mask transformer a second row shows the class itself in the last layer of the decoder.

    Args:
        predictor ([`Predictor`]): The model and its image processor.
        image (`PIL.Image.Image` or `np.ndarray` of shape `(channels, height, width)`): The image.
        class_map (integer `np.ndarray` of shape `(height, width)`): Its predicted classes.
        layer (`int`, defaults to -1): The layer of the encoder, counted from 0; negative ones from the end.

    Returns:
        `PIL.Image.Image`: RGB image.

    Raises:
        ValueError: If there is no such layer.
    """
    classes, areas = np.unique(class_map, return_counts=True)
    largest = [int(class_id) for class_id in classes[np.argsort(-areas, kind="stable")][:MAX_CLASSES_SHOWN]]
    points = [central_pixel(class_map == class_id) for class_id in largest]
    shown = preview(image, channels_first=True)
    rows = {
        "patch in the encoder": [
            attention_overlay(shown, patch_attention(predictor, image, point, layer).mean(0), point)
            for point in points
        ]
    }
    if has_class_attention(predictor.model):
        attending = _attending_classes(torch_model(predictor))
        rows["class in the decoder"] = [
            attention_overlay(shown, class_attention(predictor, image, class_id).mean(0))
            if class_id in attending
            else shown
            for class_id in largest
        ]
    return image_table(rows, [predictor.label_set.labels[class_id] for class_id in largest])


def central_pixel(mask: np.ndarray) -> tuple[int, int]:
    """The pixel `(x, y)` of a non-empty boolean mask (height, width) that is nearest to its center of mass."""
    y, x = np.nonzero(mask)
    nearest = np.argmin((y - y.mean()) ** 2 + (x - x.mean()) ** 2)
    return int(x[nearest]), int(y[nearest])


def _whole_image(predictor: Predictor, image: ImageInput) -> tuple[torch.Tensor, tuple[int, int], tuple[int, int]]:
    """Pixel values (1, channels, height, width) in whole patches, their grid, and the size of the image as it came."""
    arguments: dict[str, Any] = {"do_split_windows": False, "scales": [1.0], "do_flip": False}
    inputs = predictor.processor(image, return_tensors="pt", **arguments)
    (window,) = (Window(*row) for row in inputs["window_offsets"].tolist())
    pixel_values, patch_size = inputs["pixel_values"], predictor.model.config.patch_size
    rows, columns = (max(round(side / patch_size), 1) for side in pixel_values.shape[-2:])
    size = (rows * patch_size, columns * patch_size)
    pixel_values = nn.functional.interpolate(pixel_values, size=size, mode="bilinear", align_corners=False)
    return pixel_values, (rows, columns), (window.image_height, window.image_width)


def _layer(model: PreTrainedModel, index: int, decoder: bool) -> VitEncoderLayer:
    if decoder and not has_class_attention(model):
        raise ValueError(
            f"A decoder of type {model.config.decoder_type!r} has no class embeddings: class attention needs a Segmenter "
            "with the decoder 'mask_transformer'."
        )
    layers = cast(nn.ModuleList, cast(nn.Module, model.decode_head if decoder else model.base_model).layers)
    if not -len(layers) <= index < len(layers):
        raise ValueError(f"`layer` must be from {-len(layers)} to {len(layers) - 1}, got {index}.")
    return cast(VitEncoderLayer, layers[index])


__all__ = [
    "attention_image",
    "attention_rows",
    "class_attention",
    "has_class_attention",
    "patch_attention",
    "torch_model",
]
