"""Encoders in the directories of transformers: ViT, DeiT and DINO v1, MAE, DINOv2, DINOv3, CLIP and SigLIP.

One table serves all of them: releases before 5 and the files on the Hub have the longer names, 5.x the shorter ones.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import CONFIG_MAPPING
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from ..utils.json_files import read_json_object
from .configuration_files import lookup
from .safe_loading import Checkpoint
from .state_dicts import Rename, count_layers, get_tensor


IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
STANDARD = (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD)
CLIP = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)


class Family(NamedTuple):
    """What a `model_type` of transformers says.

    Args:
        config_type (`str`): Model type of the configuration class that has the defaults of missing fields.
        normalization (`tuple`): Mean and standard deviation where the directory has no `preprocessor_config.json`.
        fields (`dict[str, Any]`): Fields of our configuration that all its models share.
    """

    config_type: str
    normalization: tuple[list[float], list[float]]
    fields: dict[str, Any]


BICUBIC = {"position_embedding_interpolation": "bicubic"}
ANTIALIASED = {**BICUBIC, "position_embedding_antialias": True}
# The last norm of CLIP is for the pooled token: transformers' tokens of the last layer are without it.
CLIP_FIELDS = {**BICUBIC, "use_pre_layer_norm": True, "use_final_layer_norm": False}
CLIP_VISION = Family("clip_vision_model", CLIP, CLIP_FIELDS)
SIGLIP_VISION = Family("siglip_vision_model", STANDARD, {**BICUBIC, "use_class_token": False})
FAMILIES = {
    "vit": Family("vit", STANDARD, BICUBIC),
    "deit": Family("deit", IMAGENET, {**BICUBIC, "use_distillation_token": True}),
    "vit_mae": Family("vit_mae", IMAGENET, BICUBIC),
    "dinov2": Family("dinov2", IMAGENET, BICUBIC),
    "dinov2_with_registers": Family("dinov2_with_registers", IMAGENET, ANTIALIASED),
    "dinov3_vit": Family("dinov3_vit", IMAGENET, {"position_embedding_type": "rotary"}),
    "clip": CLIP_VISION,
    "clip_vision_model": CLIP_VISION,
    "siglip": SIGLIP_VISION,
    "siglip_vision_model": SIGLIP_VISION,
}

# Models with a head have the encoder under a name.
MODEL = r"(?:(?:vit|deit|dinov2|dinov2_with_registers|dinov3_vit|clip|siglip)\.)?(?:vision_model\.)?"
LAYERS = MODEL + r"(?:encoder\.layers?|(?:model\.)?layers?)"
LAYER = LAYERS + r"\.(\d+)\."
RENAMES = [
    Rename(MODEL + r"embeddings\.(cls_token|distillation_token|register_tokens)", r"embeddings.\1"),
    Rename(MODEL + r"embeddings\.class_embedding", "embeddings.cls_token", lambda tensor: tensor.reshape(1, 1, -1)),
    Rename(MODEL + r"embeddings\.position_embeddings", "embeddings.position_embeddings"),
    Rename(
        MODEL + r"embeddings\.position_embedding\.weight", "embeddings.position_embeddings", lambda table: table[None]
    ),
    Rename(
        MODEL + r"embeddings\.(?:patch_embeddings\.projection|patch_embeddings|patch_embedding)\.(weight|bias)",
        r"embeddings.patch_embeddings.projection.\1",
    ),
    Rename(MODEL + r"pre_layrnorm\.(weight|bias)", r"embeddings.layernorm.\1"),
    Rename(LAYER + r"(?:layernorm_before|norm1|layer_norm1)\.(weight|bias)", r"layers.\1.layernorm_before.\2"),
    Rename(LAYER + r"(?:layernorm_after|norm2|layer_norm2)\.(weight|bias)", r"layers.\1.layernorm_after.\2"),
    *(
        Rename(
            LAYER + rf"(?:attention\.attention\.{name}|(?:attention|self_attn)\.{name[0]}_proj)\.(weight|bias)",
            rf"layers.\1.attention.{name[0]}_proj.\2",
        )
        for name in ("query", "key", "value")
    ),
    Rename(
        LAYER + r"(?:attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.(weight|bias)",
        r"layers.\1.attention.o_proj.\2",
    ),
    Rename(LAYER + r"layer_scale([12])\.lambda1", r"layers.\1.layer_scale\2"),
]
FINAL_NORM = Rename(MODEL + r"(?:layernorm|norm|post_layernorm)\.(weight|bias)", r"layernorm.\1")
MLP = [
    Rename(LAYER + r"(?:intermediate\.dense|mlp\.fc1|mlp\.up_proj)\.(weight|bias)", r"layers.\1.mlp.fc1.\2"),
    Rename(LAYER + r"(?:output\.dense|mlp\.fc2|mlp\.down_proj)\.(weight|bias)", r"layers.\1.mlp.fc2.\2"),
]
GATED_MLP = [
    Rename(
        LAYER + r"mlp\.weights_in\.(weight|bias)",
        (r"layers.\1.mlp.gate_proj.\2", r"layers.\1.mlp.up_proj.\2"),
    ),
    Rename(LAYER + r"mlp\.(gate_proj|up_proj)\.(weight|bias)", r"layers.\1.mlp.\2.\3"),
    Rename(LAYER + r"mlp\.(?:weights_out|down_proj)\.(weight|bias)", r"layers.\1.mlp.down_proj.\2"),
]
UNUSED = [
    MODEL + r"(pooler\.dense|classifier|cls_classifier|distillation_classifier)\.(weight|bias)",
    MODEL + r"embeddings\.(mask_token|position_ids)",
    MODEL + r"head\..*",  # attention pooling of SigLIP
    MODEL + r"post_layernorm\.(weight|bias)",  # of CLIP's pooled token
    r"decoder\..*",  # of MAE
    r"(?:clip\.|siglip\.)?text_model\..*",
    r"(visual|text)_projection\.weight",
    r"logit_(scale|bias)",
]


def matches(state_dict: dict[str, Any]) -> bool:
    """Whether the keys are those of a ViT in transformers."""
    return count_layers(state_dict, LAYERS) > 0


def encoder_config(checkpoint: Checkpoint, config: dict[str, Any] | None) -> tuple[dict[str, Any], Family]:
    """Arguments of our configuration from the `config.json` of transformers, and its family.

    Raises:
        ValueError: If there is no `config.json`, or it is not that of a plain ViT, or does not fit the weights.
    """
    where = checkpoint.path.with_name("config.json")
    if config is None:
        raise ValueError(
            f"{where}: no such file. Keep config.json beside the weights, or give its path as config_path."
        )
    model_type = lookup(config, "model_type", str, where)
    if model_type not in FAMILIES:
        raise ValueError(f"{where}: expected the model_type {', '.join(FAMILIES)}, got {model_type!r}.")
    family = FAMILIES[model_type]
    config = CONFIG_MAPPING[family.config_type]().to_dict() | lookup(config, "vision_config", dict, where, config)
    layers = count_layers(checkpoint.state_dict, LAYERS)
    if config["num_hidden_layers"] != layers:
        raise ValueError(f"{where}: `num_hidden_layers` is {config['num_hidden_layers']}, the weights have {layers}.")
    patch_size = lookup(config, "patch_size", int, where)
    sides = lookup(config, "image_size", (int, list, tuple), where)
    sides = [sides] if isinstance(sides, int) else list(sides)
    if not sides or not all(type(side) is int for side in sides) or patch_size < 1:
        raise ValueError(f"{where}: expected `image_size` and `patch_size` in pixels, got {sides} and {patch_size}.")
    sides = [side - side % patch_size for side in sides]  # as transformers counts the patches
    fields = {
        "hidden_size": lookup(config, "hidden_size", int, where),
        "num_hidden_layers": layers,
        "num_attention_heads": lookup(config, "num_attention_heads", int, where),
        "image_size": sides[0] if len({*sides}) == 1 else sides,
        "patch_size": patch_size,
        "layer_norm_eps": lookup(config, "layer_norm_eps", float, where),
        **mlp_config(config, where),
        **family.fields,
    }
    same = ["num_channels", "qkv_bias", "query_bias", "key_bias", "value_bias", "hidden_dropout_prob"]
    same += ("attention_probs_dropout_prob", "layerscale_value", "num_register_tokens", "rope_theta")
    fields |= {name: config[name] for name in same if name in config}
    if config.get("attention_dropout") is not None:
        fields["attention_probs_dropout_prob"] = config["attention_dropout"]
    return fields, family


def mlp_config(config: dict[str, Any], where: Path) -> dict[str, Any]:
    """Width and activation of the MLPs; DINOv2 gives a factor of the width, of which a gated MLP keeps two thirds."""
    gated = lookup(config, "use_gated_mlp", bool, where, lookup(config, "use_swiglu_ffn", bool, where, False))
    activation = lookup(config, "hidden_act", str, where)
    if "mlp_ratio" not in config:
        width = lookup(config, "intermediate_size", int, where)
    else:
        width = int(lookup(config, "hidden_size", int, where) * lookup(config, "mlp_ratio", float, where))
        if gated:
            width, activation = (int(width * 2 / 3) + 7) // 8 * 8, "silu"
    return {"intermediate_size": width, "hidden_act": activation, "use_gated_mlp": gated}


def renames(fields: dict[str, Any]) -> list[Rename]:
    """The rename table of an encoder with these fields."""
    norm = [FINAL_NORM] if fields.get("use_final_layer_norm", True) else []
    return [*RENAMES, *norm, *(GATED_MLP if fields["use_gated_mlp"] else MLP)]


def add_missing_weights(checkpoint: Checkpoint, fields: dict[str, Any]) -> dict[str, Any]:
    """The weights with zeros for what the family lacks: a bias of the patches, a class token, and its position.

    Registers of which there are none are left out.
    """
    state_dict = {key: value for key, value in checkpoint.state_dict.items() if value.numel() or "register" not in key}
    width = fields["hidden_size"]
    prefix = next(key for key in state_dict if "embeddings.patch_embedding" in key).split("embeddings.")[0]
    if f"{prefix}embeddings.patch_embedding.weight" in state_dict:
        state_dict.setdefault(f"{prefix}embeddings.patch_embedding.bias", torch.zeros(width))
    if not fields.get("use_class_token", True):
        state_dict[f"{prefix}embeddings.class_embedding"] = torch.zeros(width)
        key = f"{prefix}embeddings.position_embedding.weight"
        table = get_tensor(state_dict, key, 2, checkpoint.path)
        state_dict[key] = torch.cat([table.new_zeros(1, table.shape[1]), table])
    return state_dict


def normalization(checkpoint: Checkpoint, family: Family) -> tuple[list[float], list[float]]:
    """Mean and standard deviation that `preprocessor_config.json` says; else those of the family."""
    path = checkpoint.path.with_name("preprocessor_config.json")
    if not path.is_file():
        return family.normalization
    config = read_json_object(path)
    mean, std = (lookup(config, name, (list, tuple), path) for name in ("image_mean", "image_std"))
    return mean, std
