"""Checkpoints of PaddleViT's Segmenter: `.pdparams` files, with the YAML of the training run where there is one."""

from pathlib import Path
from typing import Any

import torch
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, IMAGENET_STANDARD_MEAN

from ..models.modeling_segmenter import SegmenterForSemanticSegmentation
from .configuration_files import lookup, read_yaml
from .safe_loading import Checkpoint
from .state_dicts import (
    Conversion,
    Rename,
    count_layers,
    get_tensor,
    infer_num_heads,
    square_image_size,
    timm_layers,
)


LABEL_SETS = {
    "ADE20K": ("ade20k",),
    "PascalContext": ("pascal_context_60", "pascal_context_59"),
    "Cityscapes": ("cityscapes",),
}


def vit_layers(source: str, target: str) -> list[Rename]:
    """Table of the layers of PaddleViT's ViT; `source` is a regular expression."""
    return timm_layers(source, target, norms=("attn_norm", "mlp_norm"), out="out")


VIT = r"encoder\.transformer\.embeddings"
RENAMES = [
    Rename(VIT + r"\.cls_token", "segmenter.embeddings.cls_token"),
    Rename(VIT + r"\.position_embeddings", "segmenter.embeddings.position_embeddings"),
    Rename(VIT + r"\.patch_embeddings\.(weight|bias)", r"segmenter.embeddings.patch_embeddings.projection.\1"),
    *vit_layers(r"encoder\.transformer\.encoder\.layers", "segmenter.layers"),
    Rename(r"encoder\.class_token", "segmenter.embeddings.cls_token"),
    Rename(r"encoder\.distill_token", "segmenter.embeddings.distillation_token"),
    Rename(r"encoder\.pos_embed", "segmenter.embeddings.position_embeddings"),
    Rename(r"encoder\.patch_embed\.proj\.(weight|bias)", r"segmenter.embeddings.patch_embeddings.projection.\1"),
    *timm_layers(r"encoder\.layers", "segmenter.layers"),
    Rename(r"norm\.(weight|bias)", r"segmenter.layernorm.\1"),
    Rename(r"decoder\.head\.(weight|bias)", r"decode_head.classifier.\1"),
    Rename(r"decoder\.mask_tokens", "decode_head.class_embeddings"),
    Rename(r"decoder\.proj_decoder\.(weight|bias)", r"decode_head.projection.\1"),
    *vit_layers(r"decoder\.layers", "decode_head.layers"),
    Rename(r"decoder\.decoder_norm\.(weight|bias)", r"decode_head.layernorm.\1"),
    Rename(r"decoder\.proj_patch\.weight", "decode_head.patch_projection.weight"),
    Rename(r"decoder\.proj_class\.weight", "decode_head.class_projection.weight"),
    Rename(r"decoder\.mask_norm\.(weight|bias)", r"decode_head.mask_norm.\1"),
]


def matches(checkpoint: Checkpoint) -> bool:
    """Whether the keys are those of PaddleViT's Segmenter."""
    return any(key.startswith(("encoder.transformer.", "encoder.class_token")) for key in checkpoint.state_dict)


def convert(checkpoint: Checkpoint, config_path: Path | None) -> Conversion:
    """Describe the model that the tensors make.

    Args:
        checkpoint (`Checkpoint`): The weights.
        config_path (`Path`, *optional*): The YAML of the training run. It knows the dataset, the normalization, the
            windows and the heads, which otherwise are those that PaddleViT has for an encoder and a crop of this size.

    Returns:
        `Conversion`: A Segmenter with a linear or a mask transformer decoder.

    Raises:
        ValueError: If tensors are missing, or the YAML lacks a value.
    """
    state_dict, path = transpose_linears(checkpoint.state_dict), checkpoint.path
    is_deit = "encoder.class_token" in state_dict
    is_linear = "decoder.head.weight" in state_dict
    embeddings = "encoder" if is_deit else "encoder.transformer.embeddings"
    layers = "encoder.layers" if is_deit else "encoder.transformer.encoder.layers"
    names = ("patch_embed.proj", "pos_embed") if is_deit else ("patch_embeddings", "position_embeddings")
    patches = get_tensor(state_dict, f"{embeddings}.{names[0]}.weight", 4, path)
    positions = get_tensor(state_dict, f"{embeddings}.{names[1]}", 3, path)
    image_size = square_image_size(positions, 2 if is_deit else 1, patches.shape[-1], path)
    yaml = {} if config_path is None else read_yaml(config_path)
    heads = lookup(yaml, "MODEL.TRANS.NUM_HEADS", int, config_path) if yaml else infer_num_heads(patches.shape[0])
    config = {
        "hidden_size": patches.shape[0],
        "num_channels": patches.shape[1],
        "patch_size": patches.shape[-1],
        "image_size": image_size,
        "num_hidden_layers": count_layers(state_dict, layers.replace(".", r"\.")),
        "num_attention_heads": heads,
        "intermediate_size": get_tensor(state_dict, f"{layers}.0.mlp.fc1.weight", 2, path).shape[0],
        "qkv_bias": f"{layers}.0.attn.qkv.bias" in state_dict,
        "drop_path_rate": 0.0,
        "layer_norm_eps": 1e-6,  # 1e-5 in the final norm: 5e-6 in its output
        "use_distillation_token": is_deit,
        "decoder_type": "linear" if is_linear else "mask_transformer",
        "decoder_hidden_dropout_prob": 0.0,
        "decoder_attention_probs_dropout_prob": 0.0,
        "decoder_layer_norm_eps": 1e-6,  # 1e-5 in decoder_norm, which changes its output by about 5e-6
        "decoder_mask_norm_eps": 1e-5,  # its inputs are small
    }
    if is_linear:
        num_labels = get_tensor(state_dict, "decoder.head.weight", 2, path).shape[0]
    else:
        num_labels = get_tensor(state_dict, "decoder.mask_tokens", 3, path).shape[1]
        config["decoder_num_hidden_layers"] = count_layers(state_dict, r"decoder\.layers")
    return Conversion(
        source="BR-IDL/PaddleViT",
        model_class=SegmenterForSemanticSegmentation,
        config=config,
        state_dict=state_dict,
        renames=RENAMES,
        unused=["StructuredToParameterName@@"],  # Paddle's own names
        processor=processor_config(yaml, config_path, is_deit, image_size) | {"patch_size": patches.shape[-1]},
        num_labels=num_labels,
        label_sets=LABEL_SETS.get(lookup(yaml, "DATA.DATASET", str, config_path), ()) if yaml else (),
    )


def transpose_linears(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Weights as torch has them: Paddle's Linear holds the transpose, and no other weight has two axes."""
    return {
        key: value.t() if isinstance(value, torch.Tensor) and value.ndim == 2 else value
        for key, value in state_dict.items()
    }


def processor_config(yaml: dict[str, Any], where: Path | None, is_deit: bool, image_size: int) -> dict[str, Any]:
    """Arguments of the image processor; PaddleViT bounds no long side."""
    mean, std = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if is_deit else (IMAGENET_STANDARD_MEAN,) * 2
    size = window = stride = image_size
    if yaml:
        size = lookup(yaml, "VAL.IMAGE_BASE_SIZE", int, where)
        window, _ = lookup(yaml, "VAL.CROP_SIZE", list, where)
        stride, _ = lookup(yaml, "VAL.STRIDE_SIZE", list, where)
        mean, std = (
            [value / 255 for value in lookup(yaml, f"VAL.{name}", list, where, [255 * value for value in default])]
            for name, default in (("MEAN", IMAGENET_DEFAULT_MEAN), ("STD", IMAGENET_DEFAULT_STD))
        )
    return {
        "image_mean": mean,
        "image_std": std,
        "size": {"shortest_edge": size},
        "window_size": window,
        "window_stride": stride,
        "do_reduce_labels": lookup(yaml, "DATA.DATASET", str, where, "unknown") == "ADE20K",
    }
