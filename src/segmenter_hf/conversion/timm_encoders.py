"""Encoders under timm's names: timm's own ViTs, and the files of Meta (DeiT, DeiT III, DINO, MAE, DINOv2, DINOv3).

Nothing but the tensors says what a file of Meta holds, so each property is read from the tensors that have it.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from .configuration_files import lookup
from .safe_loading import Checkpoint
from .state_dicts import (
    Rename,
    count_layers,
    get_tensor,
    infer_num_heads,
    square_image_size,
    timm_layers,
)


REGISTERS = ("register_tokens", "reg_token", "storage_tokens")
ROTARY_IMAGE_SIZE = 224  # that of DINOv3 in transformers; rotary positions have no grid
BLOCK = r"blocks\.(\d+)\."
RENAMES = [
    Rename("cls_token", "embeddings.cls_token"),
    Rename("dist_token", "embeddings.distillation_token"),
    Rename("reg_token|register_tokens|storage_tokens", "embeddings.register_tokens"),
    Rename("pos_embed", "embeddings.position_embeddings"),
    Rename(r"patch_embed\.proj\.(weight|bias)", r"embeddings.patch_embeddings.projection.\1"),
    Rename(r"norm_pre\.(weight|bias)", r"embeddings.layernorm.\1"),
    Rename(BLOCK + r"(?:ls|gamma_)([12])(?:\.gamma)?", r"layers.\1.layer_scale\2"),
    Rename(BLOCK + r"attn\.([qv])_bias", r"layers.\1.attention.\2_proj.bias"),
    *timm_layers("blocks", "layers"),
    Rename(r"norm\.(weight|bias)", r"layernorm.\1"),
]
# The key biases of DINOv3 are multiplied by 0.
MASKED_KEY_BIAS = Rename(
    BLOCK + r"attn\.qkv\.bias", (r"layers.\1.attention.q_proj.bias", None, r"layers.\1.attention.v_proj.bias")
)
GATED_MLP = [
    Rename(BLOCK + r"mlp\.(?:w12|fc1)\.(weight|bias)", (r"layers.\1.mlp.gate_proj.\2", r"layers.\1.mlp.up_proj.\2")),
    Rename(BLOCK + r"mlp\.(?:w1|fc1_g)\.(weight|bias)", r"layers.\1.mlp.gate_proj.\2"),
    Rename(BLOCK + r"mlp\.(?:w2|fc1_x)\.(weight|bias)", r"layers.\1.mlp.up_proj.\2"),
    Rename(BLOCK + r"mlp\.(?:w3|fc2)\.(weight|bias)", r"layers.\1.mlp.down_proj.\2"),
]
UNUSED = [
    r"(head|head_dist|pre_logits\.fc)\.(weight|bias)",
    r"mask_token",
    r"decoder_.*",  # of MAE
    r"attn_pool\..*",  # of SigLIP
    r"rope_embed\.periods|rope\.periods",
    BLOCK + r"attn\.qkv\.bias_mask",
    r"local_cls_norm\.(weight|bias)",  # of DINOv3's training
]


class Kind(NamedTuple):
    """What checkpoints with certain tensors have in common.

    Args:
        source (`str`): Name of the system that made them.
        normalization (`tuple`): Mean and standard deviation of the images.
        fields (`dict[str, Any]`): Fields of our configuration; positions are resized as the source resizes them.
    """

    source: str
    normalization: tuple[Sequence[float], Sequence[float]]
    fields: dict[str, Any]


TIMM = "huggingface/pytorch-image-models"
IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
STANDARD = (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD)
BICUBIC = {"position_embedding_interpolation": "bicubic"}
ANTIALIASED = {**BICUBIC, "position_embedding_antialias": True}
OFFSET = {**BICUBIC, "position_embedding_offset": 0.1}
SIGLIP = {**ANTIALIASED, "use_class_token": False, "hidden_act": "gelu_pytorch_tanh"}
ROTARY = {"position_embedding_type": "rotary", "layer_norm_eps": 1e-5}
KINDS = {
    "dinov3": Kind("facebookresearch/dinov3", IMAGENET, ROTARY),
    "dinov3_timm": Kind(TIMM, IMAGENET, ROTARY),
    "dinov2": Kind("facebookresearch/dinov2", IMAGENET, OFFSET),
    "dinov2_registers": Kind("facebookresearch/dinov2", IMAGENET, ANTIALIASED),
    "deit3": Kind("facebookresearch/deit", IMAGENET, BICUBIC),
    "layer_scale": Kind(TIMM, IMAGENET, ANTIALIASED),  # DINOv2 and DeiT III in timm
    "siglip": Kind(TIMM, STANDARD, SIGLIP),
    "clip": Kind(
        TIMM,
        (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
        {**ANTIALIASED, "use_pre_layer_norm": True, "layer_norm_eps": 1e-5},
    ),
    "deit": Kind("facebookresearch/deit", IMAGENET, {}),
    "mae": Kind("facebookresearch/mae", IMAGENET, BICUBIC),
    "dino": Kind("facebookresearch/dino", IMAGENET, OFFSET),
    "timm": Kind(TIMM, STANDARD, {}),
}


def kind_of(checkpoint: Checkpoint, config: dict[str, Any] | None) -> str:
    """Key of `KINDS` that the tensors belong to."""
    keys, is_wrapped, has_head = (
        checkpoint.state_dict,
        checkpoint.wrapper == "model",
        "head.weight" in checkpoint.state_dict,
    )
    if "pos_embed" not in keys:
        return "dinov3" if "storage_tokens" in keys else "dinov3_timm"
    if "cls_token" not in keys:
        return "siglip"
    if "norm_pre.weight" in keys:
        return "clip"
    if "blocks.0.ls1.gamma" in keys or "blocks.0.gamma_1" in keys:
        if "mask_token" in keys:  # of Meta's training; timm leaves it out
            return "dinov2_registers" if "register_tokens" in keys else "dinov2"
        return "deit3" if is_wrapped else "layer_scale"
    if "dist_token" in keys or is_wrapped and has_head:
        return "deit"
    if is_wrapped:
        return "mae"
    return "timm" if has_head or config else "dino"


def encoder_config(checkpoint: Checkpoint, config: dict[str, Any] | None) -> tuple[dict[str, Any], Kind]:
    """Arguments of our configuration, from the tensors; and what the checkpoint is.

    Raises:
        ValueError: If tensors are missing or of another shape.
    """
    state_dict, path = checkpoint.state_dict, checkpoint.path
    kind = KINDS[kind_of(checkpoint, config)]
    patches = get_tensor(state_dict, "patch_embed.proj.weight", 4, path)
    registers = next((name for name in REGISTERS if name in state_dict), None)
    is_gated, width = mlp_config(state_dict, path)
    fields: dict[str, Any] = {
        "hidden_size": patches.shape[0],
        "num_channels": patches.shape[1],
        "patch_size": patches.shape[-1],
        "num_hidden_layers": count_layers(state_dict, "blocks"),
        "num_attention_heads": infer_num_heads(patches.shape[0]),
        "intermediate_size": width,
        "use_gated_mlp": is_gated,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state_dict,
        "num_register_tokens": 0 if registers is None else get_tensor(state_dict, registers, 3, path).shape[1],
        "use_distillation_token": "dist_token" in state_dict,
        "layer_norm_eps": 1e-6,
    }
    if is_gated:
        fields["hidden_act"] = "silu"
    elif "quickgelu" in str((config or {}).get("architecture")):
        fields["hidden_act"] = "quick_gelu"
    if "blocks.0.ls1.gamma" in state_dict or "blocks.0.gamma_1" in state_dict:
        fields["layerscale_value"] = 1.0
    if kind.fields.get("position_embedding_type") == "rotary":
        fields |= rotary_config(state_dict, fields, path)
    else:
        positions, special = get_tensor(state_dict, "pos_embed", 3, path), num_positioned_tokens(state_dict, path)
        fields["image_size"] = square_image_size(positions, special, fields["patch_size"], path)
    return fields | kind.fields, kind


def mlp_config(state_dict: dict[str, Any], path: Path) -> tuple[bool, int]:
    """Whether the MLPs are gated, and their width; a gated one may have both halves in one tensor."""
    for name in ("w1", "fc1_g"):
        if f"blocks.0.mlp.{name}.weight" in state_dict:
            return True, get_tensor(state_dict, f"blocks.0.mlp.{name}.weight", 2, path).shape[0]
    if "blocks.0.mlp.w12.weight" in state_dict:
        return True, get_tensor(state_dict, "blocks.0.mlp.w12.weight", 2, path).shape[0] // 2
    first = get_tensor(state_dict, "blocks.0.mlp.fc1.weight", 2, path).shape[0]
    second = get_tensor(state_dict, "blocks.0.mlp.fc2.weight", 2, path).shape[1]
    return (True, second) if first == 2 * second else (False, first)


def rotary_config(state_dict: dict[str, Any], fields: dict[str, Any], path: Path) -> dict[str, Any]:
    """Heads, base of the periods and biases of DINOv3.

    Heads have 64 channels, 128 in the 7B model: Meta's file has a quarter as many periods.

    Raises:
        ValueError: If periods or masks are none of DINOv3's.
    """
    width, patch_size = fields["hidden_size"], fields["patch_size"]
    head_dim, theta = 128 if width == 4096 else 64, 100.0
    if "rope_embed.periods" in state_dict:
        periods = get_tensor(state_dict, "rope_embed.periods", 1, path).double()
        number = len(periods)
        head_dim = 4 * number
        expected = theta ** (torch.arange(number) / max(number, 1))
        if not number or not torch.allclose(periods, expected.double(), rtol=1e-2):
            raise ValueError(f"{path}: expected `rope_embed.periods` of base {theta:g}, got {periods[:4].tolist()}...")
    if width % head_dim:
        raise ValueError(f"{path}: expected a multiple of the {head_dim} channels of a head, got {width} channels.")
    has_mask = "blocks.0.attn.qkv.bias_mask" in state_dict
    for key in (key for key in state_dict if key.endswith(".bias_mask")):
        query, keys, value = get_tensor(state_dict, key, 1, path).chunk(3)
        if keys.any() or not (query.eq(1).all() and value.eq(1).all()):
            raise ValueError(f"{path}: expected `{key}` to mask the biases of the keys alone.")
    has_bias = fields["qkv_bias"] or "blocks.0.attn.q_bias" in state_dict
    return {
        "num_attention_heads": width // head_dim,
        "rope_theta": theta,
        "image_size": max(ROTARY_IMAGE_SIZE // patch_size, 1) * patch_size,
        "qkv_bias": True,  # of decoders
        "query_bias": has_bias,
        "key_bias": fields["qkv_bias"] and not has_mask,
        "value_bias": has_bias,
    }


def num_positioned_tokens(state_dict: dict[str, Any], path: Path) -> int:
    """Class and distillation tokens that have a position: none in DeiT III, timm's registers and SigLIP."""
    number = get_tensor(state_dict, "pos_embed", 3, path).shape[1]
    return 0 if math.isqrt(number) ** 2 == number else 2 if "dist_token" in state_dict else 1


def renames(state_dict: dict[str, Any], fields: dict[str, Any]) -> list[Rename]:
    """The rename table for these tensors."""
    masked = [MASKED_KEY_BIAS] if any(key.endswith(".bias_mask") for key in state_dict) else []
    return [*masked, *(GATED_MLP if fields["use_gated_mlp"] else []), *RENAMES]


def add_missing_weights(checkpoint: Checkpoint, fields: dict[str, Any]) -> dict[str, Any]:
    """The weights with zeros for what the model lacks: a bias of the patches, a class token, or its position."""
    state_dict, path = dict(checkpoint.state_dict), checkpoint.path
    state_dict.setdefault("patch_embed.proj.bias", torch.zeros(fields["hidden_size"]))
    state_dict.setdefault("cls_token", torch.zeros(1, 1, fields["hidden_size"]))
    if "pos_embed" in state_dict and not num_positioned_tokens(state_dict, path):
        positions = get_tensor(state_dict, "pos_embed", 3, path)
        special = positions.new_zeros(1, 2 if "dist_token" in state_dict else 1, positions.shape[2])
        state_dict["pos_embed"] = torch.cat([special, positions], dim=1)
    return state_dict


def normalization(kind: Kind, config: dict[str, Any] | None) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation that timm's `config.json` says; else those of the kind."""
    pretrained = lookup(config or {}, "pretrained_cfg", dict, "config.json", config or {})
    if "mean" in pretrained and "std" in pretrained:
        mean, std = (lookup(pretrained, name, (list, tuple), "config.json") for name in ("mean", "std"))
        return mean, std
    return kind.normalization
