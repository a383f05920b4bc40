"""Checkpoints of mmsegmentation: its Segmenter, and the DeiT reproduction that was built on top of it.

Sizes are read from the tensors. What they do not show is read from the text of the configuration in the checkpoint.
"""

import re
from pathlib import Path
from typing import Any

import torch
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..modeling_segmenter import SegmenterForSemanticSegmentation
from .rstrudel import decoder_renames
from .safe_loading import Checkpoint, lookup, read_python_config, read_text
from .state_dicts import Conversion, Rename, count_layers, qkv, tensor_of


VARIABLES = ("model", "data_preprocessor", "img_norm_cfg", "train_pipeline", "test_pipeline")
DEFAULT_EPS = 1e-5  # of mmcv's LayerNorm, where the configuration says nothing


def layer_renames(source: str, target: str) -> list[Rename]:
    """Table of mmsegmentation's transformer layers; `source` is a regular expression."""
    source, target = source + r"\.(\d+)\.", target + r".\1."
    return [
        Rename(source + r"ln1\.(weight|bias)", target + r"layernorm_before.\2"),
        Rename(source + r"attn\.attn\.in_proj_(weight|bias)", qkv(target + r"attention.{}_proj.\2")),
        Rename(source + r"attn\.attn\.out_proj\.(weight|bias)", target + r"attention.o_proj.\2"),
        Rename(source + r"ln2\.(weight|bias)", target + r"layernorm_after.\2"),
        Rename(source + r"ffn\.layers\.0\.0\.(weight|bias)", target + r"mlp.fc1.\2"),
        Rename(source + r"ffn\.layers\.1\.(weight|bias)", target + r"mlp.fc2.\2"),
    ]


BACKBONE = [
    Rename(r"backbone\.cls_token", "segmenter.embeddings.cls_token"),
    Rename(r"backbone\.dist_token", "segmenter.embeddings.distillation_token"),
    Rename(r"backbone\.pos_embed", "segmenter.embeddings.position_embeddings"),
    Rename(
        r"backbone\.patch_embed\.projection\.(weight|bias)", r"segmenter.embeddings.patch_embeddings.projection.\1"
    ),
    *layer_renames(r"backbone\.layers", "segmenter.layers"),
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
        `Conversion`: A Segmenter with a linear (one 1x1 convolution) or a mask transformer decoder.

    Raises:
        ValueError: If there is no configuration, or it is not that of a Segmenter.
    """
    state_dict, path = dict(checkpoint.state_dict), checkpoint.path
    text, where = config_text(checkpoint, config_path)
    config = read_python_config(text, VARIABLES, where)
    backbone = lookup(config, "model.backbone", dict, where)
    if not lookup(backbone, "with_cls_token", bool, where, True):
        raise ValueError(f"{where}: expected an encoder with a class token, got with_cls_token=False.")
    patches = tensor_of(state_dict, "backbone.patch_embed.projection.weight", 4, path)
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
    )


def config_text(checkpoint: Checkpoint, config_path: Path | None) -> tuple[str, str]:
    """Text of the configuration, and what to call it in errors."""
    if config_path is not None:
        return read_text(config_path), str(config_path)
    text = checkpoint.meta.get("config") or checkpoint.meta.get("cfg")
    if not isinstance(text, str):
        raise ValueError(
            f"{checkpoint.path}: expected the text of its configuration under meta, got none. Give the path of the dumped "
            "configuration as config_path."
        )
    return text, f"the configuration in {checkpoint.path}"


def is_reproduction(state_dict: dict[str, Any]) -> bool:
    """Whether the decoder is one of the DeiT reproduction."""
    return any(key.startswith(("decode_head.head.", "decode_head.blocks.")) for key in state_dict)


def num_labels(state_dict: dict[str, Any], path: Path) -> int:
    """Number of classes, by the last tensors of the decoder."""
    if "decode_head.cls_emb" in state_dict:
        return tensor_of(state_dict, "decode_head.cls_emb", 3, path).shape[1]
    if "decode_head.head.weight" in state_dict:
        return tensor_of(state_dict, "decode_head.head.weight", 2, path).shape[0]
    return tensor_of(state_dict, "decode_head.conv_seg.weight", 4, path).shape[0]


def class_names(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Class names that mmsegmentation 0.x and 1.x note beside the weights."""
    dataset = checkpoint.meta.get("dataset_meta")
    names = checkpoint.meta.get("CLASSES") or (dataset.get("classes") if isinstance(dataset, dict) else None)
    return tuple(map(str, names)) if isinstance(names, (tuple, list)) else ()


def encoder_config(backbone: dict[str, Any], state_dict: dict[str, Any], path: Path, where: str) -> dict[str, Any]:
    """Arguments of the encoder; the defaults are those of mmsegmentation's VisionTransformer."""
    patches = tensor_of(state_dict, "backbone.patch_embed.projection.weight", 4, path)
    image_size = lookup(backbone, "img_size", (int, tuple, list), where, 224)
    sides = [image_size] if isinstance(image_size, int) else list(image_size)
    return {
        "hidden_size": patches.shape[0],
        "num_channels": patches.shape[1],
        "patch_size": patches.shape[-1],
        "image_size": sides[0] if len(set(sides)) == 1 else sides,
        "num_hidden_layers": count_layers(state_dict, r"backbone\.layers"),
        "num_attention_heads": lookup(backbone, "num_heads", int, where, 12),
        "intermediate_size": tensor_of(state_dict, "backbone.layers.0.ffn.layers.0.0.weight", 2, path).shape[0],
        "qkv_bias": "backbone.layers.0.attn.attn.in_proj_bias" in state_dict,
        "hidden_dropout_prob": lookup(backbone, "drop_rate", float, where, 0.0),
        "attention_probs_dropout_prob": lookup(backbone, "attn_drop_rate", float, where, 0.0),
        "drop_path_rate": lookup(backbone, "drop_path_rate", float, where, 0.0),
        "layer_norm_eps": lookup(backbone, "norm_cfg.eps", float, where, DEFAULT_EPS),
        "use_distillation_token": "backbone.dist_token" in state_dict,
        "position_embedding_interpolation": lookup(backbone, "interpolate_mode", str, where, "bicubic"),
    }


def decoder_config(head: dict[str, Any], state_dict: dict[str, Any], path: Path, where: str) -> dict[str, Any]:
    """Arguments of the decoder; the defaults are those of mmsegmentation's SegmenterMaskTransformerHead."""
    if "decode_head.cls_emb" not in state_dict:
        return {"decoder_type": "linear"}
    config = {
        "decoder_type": "mask_transformer",
        "decoder_hidden_size": tensor_of(state_dict, "decode_head.cls_emb", 3, path).shape[2],
    }
    if is_reproduction(state_dict):
        dropout = lookup(head, "dropout", float, where)
        fc1 = tensor_of(state_dict, "decode_head.blocks.0.mlp.fc1.weight", 2, path)
        return config | {
            "decoder_num_hidden_layers": count_layers(state_dict, r"decode_head\.blocks"),
            "decoder_num_attention_heads": lookup(head, "n_heads", int, where),
            "decoder_intermediate_size": fc1.shape[0],
            "decoder_hidden_dropout_prob": dropout,
            "decoder_attention_probs_dropout_prob": dropout,
            "decoder_drop_path_rate": lookup(head, "drop_path_rate", float, where),
            "decoder_layer_norm_eps": DEFAULT_EPS,
        }
    fc1 = tensor_of(state_dict, "decode_head.layers.0.ffn.layers.0.0.weight", 2, path)
    return config | {
        "decoder_num_hidden_layers": count_layers(state_dict, r"decode_head\.layers"),
        "decoder_num_attention_heads": lookup(head, "num_heads", int, where),
        "decoder_intermediate_size": fc1.shape[0],
        "decoder_hidden_dropout_prob": lookup(head, "drop_rate", float, where, 0.0),
        "decoder_attention_probs_dropout_prob": lookup(head, "attn_drop_rate", float, where, 0.0),
        "decoder_drop_path_rate": lookup(head, "drop_path_rate", float, where, 0.1),
        "decoder_layer_norm_eps": lookup(head, "norm_cfg.eps", float, where, DEFAULT_EPS),
    }


def processor_config(config: dict[str, Any], where: str, is_deit: bool) -> dict[str, Any]:
    """Arguments of the image processor, from the test pipeline of mmsegmentation 0.x or 1.x.

    Where the text has no normalisation it is that of the pretrained encoder; where it has no resize, the short side is
    the window and the long side at most 4 times that, as for ADE20K.
    """
    sequence = (list, tuple)
    places = ("model.data_preprocessor", "data_preprocessor", "img_norm_cfg")
    places = [lookup(config, place, dict, where, {}) for place in places]
    normalization = next((place for place in places if "mean" in place), {})
    if False in (normalization.get("bgr_to_rgb"), normalization.get("to_rgb")):
        raise ValueError(f"{where}: expected a model of RGB images, got one of BGR images, which is not supported.")
    mean, std = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if is_deit else ([0.5] * 3, [0.5] * 3)
    if normalization:
        mean, std = ([value / 255 for value in lookup(normalization, key, sequence, where)] for key in ("mean", "std"))
    crop = lookup(config, "model.test_cfg.crop_size", sequence, where)
    stride = lookup(config, "model.test_cfg.stride", sequence, where)
    if len({*crop}) != 1 or len({*stride}) != 1:
        raise ValueError(f"{where}: expected square windows at equal steps, got windows {crop} and steps {stride}.")
    tests = [step for step in lookup(config, "test_pipeline", list, where, []) if isinstance(step, dict)]
    trains = [step for step in lookup(config, "train_pipeline", list, where, []) if isinstance(step, dict)]
    scales = [step.get("img_scale") or step.get("scale") for step in tests]
    scale = next((scale for scale in scales if scale), (4 * crop[0], crop[0]))
    if not isinstance(scale, sequence) or len(scale) != 2 or not all(isinstance(side, int) for side in scale):
        raise ValueError(f"{where}: expected test images of one scale (longest, shortest side), got {scale}.")
    return {
        "image_mean": mean,
        "image_std": std,
        "size": {"shortest_edge": min(scale), "longest_edge": max(scale)},
        "window_size": crop[0],
        "window_stride": min(stride[0], crop[0]),
        "do_reduce_labels": any(step.get("reduce_zero_label") is True for step in trains),
    }
