"""Checkpoints of mmsegmentation: its Segmenter, its SETR, and the DeiT reproduction of Segmenter built on top of it."""

import re
from pathlib import Path
from typing import Any

import torch

from ..models.modeling_segmenter import SegmenterForSemanticSegmentation
from . import setr
from .configuration_files import lookup
from .mmsegmentation_common import (
    DEFAULT_EPS,
    backbone_renames,
    class_names,
    encoder_config,
    layer_renames,
    palette,
    processor_config,
    read_config,
)
from .rstrudel import decoder_renames
from .safe_loading import Checkpoint
from .state_dicts import Conversion, Rename, count_layers, get_tensor


BACKBONE = [
    *backbone_renames("segmenter"),
    Rename(r"backbone\.ln1\.(weight|bias)", r"segmenter.layernorm.\1"),
]
FCN_HEAD = [
    Rename(r"decode_head\.conv_seg\.weight", "decode_head.classifier.weight", lambda kernel: kernel.flatten(1)),
    Rename(r"decode_head\.conv_seg\.bias", "decode_head.classifier.bias"),
]
# The norms and class embeddings of both mask decoders, and all of the reproduction's, are called as in rstrudel/segmenter.
MASK_HEAD = [
    *decoder_renames("decode_head"),
    Rename(r"decode_head\.dec_proj\.(weight|bias)", r"decode_head.projection.\1"),
    *layer_renames(r"decode_head\.layers", "decode_head.layers"),
    Rename(r"decode_head\.patch_proj\.weight", "decode_head.patch_projection.weight"),
    Rename(r"decode_head\.classes_proj\.weight", "decode_head.class_projection.weight"),
]


def matches(checkpoint: Checkpoint) -> bool:
    """Whether the keys are those of a transformer in mmsegmentation."""
    return any(re.match(r"backbone\.layers\.\d+\.attn\.attn\.in_proj_", key) for key in checkpoint.state_dict)


def convert(checkpoint: Checkpoint, config_path: Path | None) -> Conversion:
    """Describe the model that the tensors and the configuration in the checkpoint make.

    Args:
        checkpoint (`Checkpoint`): The weights, and mmsegmentation's notes on them.
        config_path (`Path`, *optional*): A configuration as mmsegmentation dumps it, with nothing inherited; instead of
            the one in the checkpoint.

    Returns:
        `Conversion`: A SETR; or a Segmenter with a linear (one 1x1 convolution) or a mask transformer decoder.

    Raises:
        ValueError: If there is no configuration, or it is not that of one of them.
    """
    state_dict, path = dict(checkpoint.state_dict), checkpoint.path
    config, where = read_config(checkpoint, config_path)
    if any(key.startswith("decode_head.up_convs.") for key in state_dict):
        return setr.convert_mmsegmentation(checkpoint, config, where)
    backbone = lookup(config, "model.backbone", dict, where)
    patches = get_tensor(state_dict, "backbone.patch_embed.projection.weight", 4, path)
    # mmsegmentation's patch embedding has no bias
    state_dict.setdefault("backbone.patch_embed.projection.bias", torch.zeros(patches.shape[0]))
    is_fcn = not any(key.startswith(("decode_head.head.", "decode_head.cls_emb")) for key in state_dict)
    processor = processor_config(config, where, is_deit="backbone.dist_token" in state_dict)
    return Conversion(
        source="EricKani/Segmenter-Based-on-OpenMMLab" if is_reproduction(state_dict) else "open-mmlab/mmsegmentation",
        model_class=SegmenterForSemanticSegmentation,
        config={
            **encoder_config(backbone, state_dict, path, where),
            **decoder_config(lookup(config, "model.decode_head", dict, where), state_dict, path, where),
        },
        state_dict=state_dict,
        renames=BACKBONE + (FCN_HEAD if is_fcn else MASK_HEAD),
        unused=[] if is_fcn else [r"decode_head\.conv_seg\.(weight|bias)"],  # of the base class
        processor=processor | {"patch_size": patches.shape[-1]},
        num_labels=num_labels(state_dict, path),
        class_names=class_names(checkpoint),
        palette=palette(checkpoint),
    )


def is_reproduction(state_dict: dict[str, Any]) -> bool:
    """Whether the decoder is one of the DeiT reproduction."""
    return any(key.startswith(("decode_head.head.", "decode_head.blocks.")) for key in state_dict)


def num_labels(state_dict: dict[str, Any], path: Path) -> int:
    """Number of classes, by the last tensors of the decoder."""
    if "decode_head.cls_emb" in state_dict:
        return get_tensor(state_dict, "decode_head.cls_emb", 3, path).shape[1]
    if "decode_head.head.weight" in state_dict:
        return get_tensor(state_dict, "decode_head.head.weight", 2, path).shape[0]
    return get_tensor(state_dict, "decode_head.conv_seg.weight", 4, path).shape[0]


def decoder_config(head: dict[str, Any], state_dict: dict[str, Any], path: Path, where: str) -> dict[str, Any]:
    """Arguments of the decoder; the defaults are those of mmsegmentation's SegmenterMaskTransformerHead."""
    if "decode_head.cls_emb" not in state_dict:
        return {"decoder_type": "linear"}
    config = {
        "decoder_type": "mask_transformer",
        "decoder_hidden_size": get_tensor(state_dict, "decode_head.cls_emb", 3, path).shape[2],
    }
    if is_reproduction(state_dict):
        dropout = lookup(head, "dropout", float, where)
        fc1 = get_tensor(state_dict, "decode_head.blocks.0.mlp.fc1.weight", 2, path)
        return config | {
            "decoder_num_hidden_layers": count_layers(state_dict, r"decode_head\.blocks"),
            "decoder_num_attention_heads": lookup(head, "n_heads", int, where),
            "decoder_intermediate_size": fc1.shape[0],
            "decoder_hidden_dropout_prob": dropout,
            "decoder_attention_probs_dropout_prob": dropout,
            "decoder_drop_path_rate": lookup(head, "drop_path_rate", float, where),
            "decoder_layer_norm_eps": DEFAULT_EPS,
        }
    fc1 = get_tensor(state_dict, "decode_head.layers.0.ffn.layers.0.0.weight", 2, path)
    return config | {
        "decoder_num_hidden_layers": count_layers(state_dict, r"decode_head\.layers"),
        "decoder_num_attention_heads": lookup(head, "num_heads", int, where),
        "decoder_intermediate_size": fc1.shape[0],
        "decoder_hidden_dropout_prob": lookup(head, "drop_rate", float, where, 0.0),
        "decoder_attention_probs_dropout_prob": lookup(head, "attn_drop_rate", float, where, 0.0),
        "decoder_drop_path_rate": lookup(head, "drop_path_rate", float, where, 0.1),
        "decoder_layer_norm_eps": lookup(head, "norm_cfg.eps", float, where, DEFAULT_EPS),
    }
