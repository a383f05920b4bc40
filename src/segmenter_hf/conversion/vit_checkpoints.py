"""Pretrained encoders: AugReg's `.npz`, timm's and DeiT's `.pth`, those that mmsegmentation converted from them, and the
Hub directories of timm and transformers."""

import re
from pathlib import Path
from typing import Any

import torch
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
)

from ..models.modeling_segmenter import SegmenterModel
from .mmsegmentation_common import layer_renames
from .safe_loading import Checkpoint, lookup, read_json
from .state_dicts import Conversion, Rename, count_layers, get_tensor, infer_num_heads, square_image_size, timm_layers


EPS = 1e-6
TIMM = [
    Rename("cls_token", "embeddings.cls_token"),
    Rename("dist_token", "embeddings.distillation_token"),
    Rename("pos_embed", "embeddings.position_embeddings"),
    Rename(r"patch_embed\.proj\.(weight|bias)", r"embeddings.patch_embeddings.projection.\1"),
    *timm_layers("blocks", "layers"),
    Rename(r"norm\.(weight|bias)", r"layernorm.\1"),
]
TIMM_UNUSED = [r"(head|head_dist|pre_logits\.fc)\.(weight|bias)"]

MMSEGMENTATION = [
    Rename("cls_token", "embeddings.cls_token"),
    Rename("pos_embed", "embeddings.position_embeddings"),
    Rename(r"patch_embed\.projection\.(weight|bias)", r"embeddings.patch_embeddings.projection.\1"),
    *layer_renames("layers", "layers"),
    Rename(r"ln1\.(weight|bias)", r"layernorm.\1"),
]

BLOCK = r"Transformer/encoderblock_(\d+)/"
ATTENTION = BLOCK + "MultiHeadDotProductAttention_1/"
AUGREG = [
    Rename("cls", "embeddings.cls_token"),
    Rename("Transformer/posembed_input/pos_embedding", "embeddings.position_embeddings"),
    # (height, width, channels, hidden) to (hidden, channels, height, width)
    Rename(
        "embedding/kernel", "embeddings.patch_embeddings.projection.weight", lambda kernel: kernel.permute(3, 2, 0, 1)
    ),
    Rename("embedding/bias", "embeddings.patch_embeddings.projection.bias"),
    Rename(BLOCK + "LayerNorm_0/scale", r"layers.\1.layernorm_before.weight"),
    Rename(BLOCK + "LayerNorm_0/bias", r"layers.\1.layernorm_before.bias"),
    # (hidden, heads, channels) to (heads * channels, hidden), and back for the output
    *(
        rename
        for name in ("query", "key", "value")
        for rename in (
            Rename(
                f"{ATTENTION}{name}/kernel",
                rf"layers.\1.attention.{name[0]}_proj.weight",
                lambda kernel: kernel.flatten(1).t(),
            ),
            Rename(f"{ATTENTION}{name}/bias", rf"layers.\1.attention.{name[0]}_proj.bias", torch.flatten),
        )
    ),
    Rename(ATTENTION + "out/kernel", r"layers.\1.attention.o_proj.weight", lambda kernel: kernel.flatten(0, 1).t()),
    Rename(ATTENTION + "out/bias", r"layers.\1.attention.o_proj.bias"),
    Rename(BLOCK + "LayerNorm_2/scale", r"layers.\1.layernorm_after.weight"),
    Rename(BLOCK + "LayerNorm_2/bias", r"layers.\1.layernorm_after.bias"),
    Rename(BLOCK + "MlpBlock_3/Dense_0/kernel", r"layers.\1.mlp.fc1.weight", torch.t),
    Rename(BLOCK + "MlpBlock_3/Dense_0/bias", r"layers.\1.mlp.fc1.bias"),
    Rename(BLOCK + "MlpBlock_3/Dense_1/kernel", r"layers.\1.mlp.fc2.weight", torch.t),
    Rename(BLOCK + "MlpBlock_3/Dense_1/bias", r"layers.\1.mlp.fc2.bias"),
    Rename("Transformer/encoder_norm/scale", "layernorm.weight"),
    Rename("Transformer/encoder_norm/bias", "layernorm.bias"),
]
AUGREG_UNUSED = ["(head|pre_logits)/(kernel|bias)"]

MODEL = r"(?:(?:vit|deit)\.)?"  # absent in checkpoints of the bare models
LAYER = MODEL + r"encoder\.layer\.(\d+)\."
TRANSFORMERS = [
    Rename(MODEL + r"embeddings\.(cls_token|distillation_token|position_embeddings)", r"embeddings.\1"),
    Rename(
        MODEL + r"embeddings\.patch_embeddings\.projection\.(weight|bias)",
        r"embeddings.patch_embeddings.projection.\1",
    ),
    Rename(LAYER + r"layernorm_(before|after)\.(weight|bias)", r"layers.\1.layernorm_\2.\3"),
    *(
        Rename(LAYER + rf"attention\.attention\.{name}\.(weight|bias)", rf"layers.\1.attention.{name[0]}_proj.\2")
        for name in ("query", "key", "value")
    ),
    Rename(LAYER + r"attention\.output\.dense\.(weight|bias)", r"layers.\1.attention.o_proj.\2"),
    Rename(LAYER + r"intermediate\.dense\.(weight|bias)", r"layers.\1.mlp.fc1.\2"),
    Rename(LAYER + r"output\.dense\.(weight|bias)", r"layers.\1.mlp.fc2.\2"),
    Rename(MODEL + r"layernorm\.(weight|bias)", r"layernorm.\1"),
]
TRANSFORMERS_UNUSED = [
    MODEL + r"(pooler\.dense|classifier|cls_classifier|distillation_classifier)\.(weight|bias)",
    MODEL + r"embeddings\.mask_token",
]


def matches(checkpoint: Checkpoint) -> bool:
    """Whether the keys are those of a ViT or DeiT."""
    first_layer = (
        r"Transformer/encoderblock_0/.*",
        r"blocks\.0\.attn\.qkv\..*",
        r"layers\.0\.attn\.attn\.in_proj_.*",
        rf"{MODEL}encoder\.layer\.0\..*",
    )
    return any(re.fullmatch("|".join(first_layer), key) for key in checkpoint.state_dict)


def convert(checkpoint: Checkpoint, config_path: Path | None) -> Conversion:
    """Describe the encoder that the tensors, and `config.json` in a directory, make.

    Args:
        checkpoint (`Checkpoint`): The weights.
        config_path (`Path`, *optional*): A `config.json`, instead of the one beside the weights.

    Returns:
        `Conversion`: A [`SegmenterModel`]. Its classification heads are left out, its image processor has the recipe's
        window of 512 pixels, as far as patches fill it.

    Raises:
        ValueError: If tensors or values of the configuration are missing.
    """
    config = read_json(config_path) if config_path else checkpoint.config
    if "Transformer/encoder_norm/scale" in checkpoint.state_dict:
        source, model = "google-research/vision_transformer", augreg_config(checkpoint)
        renames, unused = AUGREG, AUGREG_UNUSED
        mean, std = IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
    elif "patch_embed.projection.weight" in checkpoint.state_dict:
        source, model = "open-mmlab/mmsegmentation", mmsegmentation_config(checkpoint)
        renames, unused = MMSEGMENTATION, TIMM_UNUSED
        mean, std = IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
    elif "pos_embed" in checkpoint.state_dict:
        source = "facebookresearch/deit" if is_deit(checkpoint) else "huggingface/pytorch-image-models"
        model, renames, unused = timm_config(checkpoint), TIMM, TIMM_UNUSED
        mean, std = timm_normalization(checkpoint, config)
    else:
        source, model = "huggingface/transformers", transformers_config(checkpoint, config)
        renames, unused = TRANSFORMERS, TRANSFORMERS_UNUSED
        mean, std = transformers_normalization(checkpoint, model["use_distillation_token"])
    window_size = 512 - 512 % model["patch_size"]
    return Conversion(
        source=source,
        model_class=SegmenterModel,
        config=model,
        state_dict=with_patch_bias(checkpoint.state_dict, model["hidden_size"]),
        renames=renames,
        unused=unused,
        processor={
            "image_mean": mean,
            "image_std": std,
            "window_size": window_size,
            "window_stride": window_size,
            "patch_size": model["patch_size"],
        },
    )


def with_patch_bias(state_dict: dict[str, Any], hidden_size: int) -> dict[str, Any]:
    """The weights with a zero bias of the patch embedding where mmsegmentation has none."""
    if "patch_embed.projection.weight" not in state_dict:
        return state_dict
    return {"patch_embed.projection.bias": torch.zeros(hidden_size), **state_dict}


def is_deit(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint with timm's names is DeiT's own: distilled, or wrapped as its training saves it."""
    return checkpoint.wrapper == "model" or "dist_token" in checkpoint.state_dict


def augreg_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Arguments of the configuration, all from the arrays of an AugReg checkpoint."""
    state_dict, path = checkpoint.state_dict, checkpoint.path
    patches = get_tensor(state_dict, "embedding/kernel", 4, path)
    positions = get_tensor(state_dict, "Transformer/posembed_input/pos_embedding", 3, path)
    block = "Transformer/encoderblock_0/"
    query = get_tensor(state_dict, f"{block}MultiHeadDotProductAttention_1/query/kernel", 3, path)
    layers = {match[1] for match in (re.match(BLOCK, key) for key in state_dict) if match}
    return {
        "hidden_size": patches.shape[3],
        "num_channels": patches.shape[2],
        "patch_size": patches.shape[0],
        "image_size": square_image_size(positions, 1, patches.shape[0], path),
        "num_hidden_layers": len(layers),
        "num_attention_heads": query.shape[1],
        "intermediate_size": get_tensor(state_dict, f"{block}MlpBlock_3/Dense_0/kernel", 2, path).shape[1],
        "layer_norm_eps": EPS,
    }


def mmsegmentation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Arguments of the configuration, from the tensors of a ViT that mmsegmentation converted."""
    state_dict, path = checkpoint.state_dict, checkpoint.path
    patches = get_tensor(state_dict, "patch_embed.projection.weight", 4, path)
    positions = get_tensor(state_dict, "pos_embed", 3, path)
    return {
        "hidden_size": patches.shape[0],
        "num_channels": patches.shape[1],
        "patch_size": patches.shape[-1],
        "image_size": square_image_size(positions, 1, patches.shape[-1], path),
        "num_hidden_layers": count_layers(state_dict, "layers"),
        "num_attention_heads": infer_num_heads(patches.shape[0]),
        "intermediate_size": get_tensor(state_dict, "layers.0.ffn.layers.0.0.weight", 2, path).shape[0],
        "qkv_bias": "layers.0.attn.attn.in_proj_bias" in state_dict,
        "layer_norm_eps": EPS,
    }


def timm_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Arguments of the configuration, from the tensors of a timm or DeiT checkpoint."""
    state_dict, path = checkpoint.state_dict, checkpoint.path
    patches = get_tensor(state_dict, "patch_embed.proj.weight", 4, path)
    is_distilled = "dist_token" in state_dict
    positions = get_tensor(state_dict, "pos_embed", 3, path)
    return {
        "hidden_size": patches.shape[0],
        "num_channels": patches.shape[1],
        "patch_size": patches.shape[-1],
        "image_size": square_image_size(positions, 2 if is_distilled else 1, patches.shape[-1], path),
        "num_hidden_layers": count_layers(state_dict, "blocks"),
        "num_attention_heads": infer_num_heads(patches.shape[0]),
        "intermediate_size": get_tensor(state_dict, "blocks.0.mlp.fc1.weight", 2, path).shape[0],
        "qkv_bias": "blocks.0.attn.qkv.bias" in state_dict,
        "layer_norm_eps": EPS,
        "use_distillation_token": is_distilled,
    }


def transformers_config(checkpoint: Checkpoint, config: dict[str, Any] | None) -> dict[str, Any]:
    """Arguments of the configuration, from the `config.json` of transformers."""
    where = checkpoint.path.with_name("config.json")
    if config is None:
        raise ValueError(
            f"{where}: no such file. Keep config.json beside the weights, or give its path as config_path."
        )
    model_type = lookup(config, "model_type", str, where)
    if model_type not in ("vit", "deit"):
        raise ValueError(f"{where}: expected the model_type vit or deit, got {model_type!r}.")
    integers = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "image_size",
        "patch_size",
    )
    layers = count_layers(checkpoint.state_dict, MODEL + r"encoder\.layer")
    if config.get("num_hidden_layers") != layers:
        raise ValueError(
            f"{where}: `num_hidden_layers` is {config.get('num_hidden_layers')}, the weights have {layers}."
        )
    return {
        **{name: lookup(config, name, int, where) for name in integers},
        **{
            name: config[name]
            for name in (
                "num_channels",
                "hidden_act",
                "qkv_bias",
                "hidden_dropout_prob",
                "attention_probs_dropout_prob",
            )
            if name in config
        },
        "layer_norm_eps": lookup(config, "layer_norm_eps", float, where),
        "use_distillation_token": model_type == "deit",
    }


def timm_normalization(checkpoint: Checkpoint, config: dict[str, Any] | None) -> tuple[list[float], list[float]]:
    """Mean and standard deviation that timm's `config.json` says; else DeiT's for its files, AugReg's for the others."""
    pretrained = lookup(config or {}, "pretrained_cfg", dict, "config.json", config or {})
    if "mean" in pretrained and "std" in pretrained:
        return tuple(lookup(pretrained, name, (list, tuple), "config.json") for name in ("mean", "std"))
    if is_deit(checkpoint):
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD


def transformers_normalization(checkpoint: Checkpoint, is_distilled: bool) -> tuple[list[float], list[float]]:
    """Mean and standard deviation that `preprocessor_config.json` says; else DeiT's or ViT's."""
    path = checkpoint.path.with_name("preprocessor_config.json")
    if path.is_file():
        config = read_json(path)
        return tuple(lookup(config, name, (list, tuple), path) for name in ("image_mean", "image_std"))
    if is_distilled:
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
