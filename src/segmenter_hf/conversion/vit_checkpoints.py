"""Pretrained encoders: AugReg's `.npz`, what mmsegmentation converted from it, and those under the names of timm
(`timm_encoders.py`) and transformers (`transformers_encoders.py`)."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD

from ..models.modeling_segmenter import SegmenterModel
from ..utils.json_files import read_json_object
from . import timm_encoders, transformers_encoders
from .mmsegmentation_common import layer_renames
from .safe_loading import Checkpoint
from .state_dicts import Conversion, Rename, count_layers, get_tensor, infer_num_heads, square_image_size


EPS = 1e-6
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
NOT_PLAIN = {
    "relative position biases, as BEiT has": r".*relative_position(_bias_table|_index).*|rel_pos_bias\..*",
    "another attention and MLP, as EVA-02 has": r"blocks\.0\.(attn\.(q_proj|norm|inner_attn_ln)|mlp\.(ffn_ln|norm))\..*",
    "layers of several resolutions": r"(.*\.)?(layers|stages)\.\d+\.(blocks|layers)\.\d+\..*|(.*\.)?stages\.\d+\..*",
}
PLAIN = "Plain ViTs are ViT, DeiT, DeiT III, DINO, DINOv2, DINOv3 ViT, MAE, CLIP and SigLIP"


def check_plain(checkpoint: Checkpoint) -> None:
    """Refuse backbones that are known not to be plain ViTs.

    Raises:
        ValueError: If the checkpoint is one of them.
    """
    for what, pattern in NOT_PLAIN.items():
        key = next((key for key in checkpoint.state_dict if re.fullmatch(pattern, key)), None)
        if key is not None:
            raise ValueError(f"{checkpoint.path}: expected a plain ViT, got one with {what} (`{key}`). {PLAIN}.")


def matches(checkpoint: Checkpoint) -> bool:
    """Whether the keys are those of a ViT or DeiT."""
    first_layer = (
        r"Transformer/encoderblock_0/.*",
        r"blocks\.0\.attn\.qkv\..*",
        r"layers\.0\.attn\.attn\.in_proj_.*",
    )
    keys = checkpoint.state_dict
    return any(re.fullmatch("|".join(first_layer), key) for key in keys) or transformers_encoders.matches(keys)


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
    check_plain(checkpoint)
    config, state_dict = read_json_object(config_path) if config_path else checkpoint.config, checkpoint.state_dict
    if "Transformer/encoder_norm/scale" in checkpoint.state_dict:
        mean: Sequence[float]
        std: Sequence[float]
        source, model = "google-research/vision_transformer", augreg_config(checkpoint)
        renames, unused = AUGREG, AUGREG_UNUSED
        mean, std = IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
    elif "patch_embed.projection.weight" in checkpoint.state_dict:
        source, model = "open-mmlab/mmsegmentation", mmsegmentation_config(checkpoint)
        state_dict = with_patch_bias(checkpoint.state_dict, model["hidden_size"])
        renames, unused = MMSEGMENTATION, timm_encoders.UNUSED
        mean, std = IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
    elif "patch_embed.proj.weight" in checkpoint.state_dict:
        model, kind = timm_encoders.encoder_config(checkpoint, config)
        source, state_dict = kind.source, timm_encoders.add_missing_weights(checkpoint, model)
        renames, unused = timm_encoders.renames(state_dict, model), timm_encoders.UNUSED
        mean, std = timm_encoders.normalization(kind, config)
    else:
        source = "huggingface/transformers"
        model, family = transformers_encoders.encoder_config(checkpoint, config)
        state_dict = transformers_encoders.add_missing_weights(checkpoint, model)
        renames, unused = transformers_encoders.renames(model), transformers_encoders.UNUSED
        mean, std = transformers_encoders.normalization(checkpoint, family)
    window_size = 512 - 512 % model["patch_size"]
    return Conversion(
        source=source,
        model_class=SegmenterModel,
        config=model,
        state_dict=state_dict,
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
    return {"patch_embed.projection.bias": torch.zeros(hidden_size), **state_dict}


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
