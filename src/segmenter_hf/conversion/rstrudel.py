"""Checkpoints of rstrudel/segmenter: `checkpoint.pth` with `variant.yml` beside it."""

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

from ..models.modeling_segmenter import SegmenterForSemanticSegmentation
from .configuration_files import lookup, read_yaml
from .safe_loading import Checkpoint
from .state_dicts import Conversion, Rename, count_layers, get_tensor, timm_layers


SOURCE = "rstrudel/segmenter"
LAYER_NORM_EPS = 1e-5  # torch's default, in the encoder, the decoder and mask_norm
NORMALIZATION = {
    "vit": {"image_mean": IMAGENET_STANDARD_MEAN, "image_std": IMAGENET_STANDARD_STD},
    "deit": {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD},
}
LABEL_SETS = {
    "ade20k": ("ade20k",),
    "pascal_context": ("pascal_context_60", "pascal_context_59"),
    "cityscapes": ("cityscapes",),
}
MAX_RATIO = {"ade20k": 4, "pascal_context": 8, "cityscapes": 2}  # of the sides of the resized image

ENCODER = [
    Rename(r"encoder\.cls_token", "segmenter.embeddings.cls_token"),
    Rename(r"encoder\.dist_token", "segmenter.embeddings.distillation_token"),
    Rename(r"encoder\.pos_embed", "segmenter.embeddings.position_embeddings"),
    Rename(r"encoder\.patch_embed\.proj\.(weight|bias)", r"segmenter.embeddings.patch_embeddings.projection.\1"),
    *timm_layers(r"encoder\.blocks", "segmenter.layers"),
    Rename(r"encoder\.norm\.(weight|bias)", r"segmenter.layernorm.\1"),
]


def decoder_renames(prefix: str) -> list[Rename]:
    """Table of the decoders; `prefix` is a regular expression of the name of the decoder."""
    return [
        Rename(prefix + r"\.head\.(weight|bias)", r"decode_head.classifier.\1"),
        Rename(prefix + r"\.cls_emb", "decode_head.class_embeddings"),
        Rename(prefix + r"\.proj_dec\.(weight|bias)", r"decode_head.projection.\1"),
        *timm_layers(prefix + r"\.blocks", "decode_head.layers"),
        Rename(prefix + r"\.decoder_norm\.(weight|bias)", r"decode_head.layernorm.\1"),
        # plain matrices that the tokens are multiplied by from the left; a Linear layer holds the transpose
        Rename(prefix + r"\.proj_patch", "decode_head.patch_projection.weight", torch.t),
        Rename(prefix + r"\.proj_classes", "decode_head.class_projection.weight", torch.t),
        Rename(prefix + r"\.mask_norm\.(weight|bias)", r"decode_head.mask_norm.\1"),
    ]


def matches(checkpoint: Checkpoint) -> bool:
    """Whether the keys are those of rstrudel/segmenter."""
    return any(re.match(r"encoder\.blocks\.\d+\.attn\.qkv\.", key) for key in checkpoint.state_dict)


def convert(checkpoint: Checkpoint, config_path: Path | None) -> Conversion:
    """Read `variant.yml` and describe the model.

    Args:
        checkpoint (`Checkpoint`): The weights.
        config_path (`Path`, *optional*): The `variant.yml`; the one beside the checkpoint by default.

    Returns:
        `Conversion`: A Segmenter with a linear or a mask transformer decoder.

    Raises:
        FileNotFoundError: If there is no `variant.yml`.
        ValueError: If it lacks a value or does not fit the checkpoint.
    """
    path = config_path or checkpoint.path.with_name("variant.yml")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file. A checkpoint of {SOURCE} needs the variant.yml that is published with it: put it "
            "beside the checkpoint or give its path as config_path."
        )
    variant = read_yaml(path)
    config = model_config(variant, checkpoint, path)
    if config["decoder_type"] == "linear":
        num_labels = get_tensor(checkpoint.state_dict, "decoder.head.weight", 2, checkpoint.path).shape[0]
    else:
        num_labels = get_tensor(checkpoint.state_dict, "decoder.cls_emb", 3, checkpoint.path).shape[1]
    return Conversion(
        source=SOURCE,
        model_class=SegmenterForSemanticSegmentation,
        config=config,
        state_dict=checkpoint.state_dict,
        renames=ENCODER + decoder_renames("decoder"),
        unused=[r"encoder\.head(_dist)?\.(weight|bias)"],  # ImageNet classes
        processor=processor_config(variant, path),
        num_labels=agreed(variant, "net_kwargs.n_cls", num_labels, checkpoint, path),
        label_sets=LABEL_SETS.get(lookup(variant, "dataset_kwargs.dataset", str, path), ()),
    )


def model_config(variant: dict[str, Any], checkpoint: Checkpoint, path: Path) -> dict[str, Any]:
    """Arguments of the configuration (segm/model/factory.py says what the YAML does not)."""
    hidden_size = lookup(variant, "net_kwargs.d_model", int, path)
    dropout = lookup(variant, "net_kwargs.dropout", float, path)
    num_layers = count_layers(checkpoint.state_dict, r"encoder\.blocks")
    image_size = lookup(variant, "net_kwargs.image_size", (tuple, list), path)
    decoder = lookup(variant, "net_kwargs.decoder.name", str, path)
    if decoder not in ("linear", "mask_transformer"):
        raise ValueError(f"{path}: expected the decoder linear or mask_transformer, got {decoder!r}.")
    config = {
        "hidden_size": hidden_size,
        "num_hidden_layers": agreed(variant, "net_kwargs.n_layers", num_layers, checkpoint, path),
        "num_attention_heads": lookup(variant, "net_kwargs.n_heads", int, path),
        "intermediate_size": 4 * hidden_size,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "drop_path_rate": lookup(variant, "net_kwargs.drop_path_rate", float, path),
        "layer_norm_eps": LAYER_NORM_EPS,
        "image_size": image_size[0] if len(image_size) == 2 and len(set(image_size)) == 1 else list(image_size),
        "patch_size": lookup(variant, "net_kwargs.patch_size", int, path),
        "num_channels": 3,
        "use_distillation_token": lookup(variant, "net_kwargs.distilled", bool, path, False),
        "position_embedding_interpolation": "bilinear",
        "decoder_type": decoder,
        "decoder_layer_norm_eps": LAYER_NORM_EPS,
        **token_merging_config(variant, path),
    }
    if decoder == "mask_transformer":
        dropout = lookup(variant, "net_kwargs.decoder.dropout", float, path)
        num_layers = count_layers(checkpoint.state_dict, r"decoder\.blocks")
        config |= {
            "decoder_num_hidden_layers": agreed(variant, "net_kwargs.decoder.n_layers", num_layers, checkpoint, path),
            "decoder_num_attention_heads": hidden_size // 64,
            "decoder_hidden_dropout_prob": dropout,
            "decoder_attention_probs_dropout_prob": dropout,
            "decoder_drop_path_rate": lookup(variant, "net_kwargs.decoder.drop_path_rate", float, path),
        }
    return config


def token_merging_config(variant: dict[str, Any], path: Path) -> dict[str, Any]:
    """Arguments of token merging, where the model was trained with ALGM (tue-mps/algm-segmenter); layers count from 1 there."""
    patch_type = lookup(variant, "dataset_kwargs.patch_type", str, path, "pure")
    if patch_type not in ("pure", "algm"):
        raise ValueError(f"{path}: expected the patch_type pure or algm, got {patch_type!r}.")
    if patch_type == "pure":
        return {}
    layers = lookup(variant, "dataset_kwargs.selected_layers", (tuple, list), path)
    if not all(isinstance(layer, int) for layer in layers):
        raise ValueError(f"{path}: expected `dataset_kwargs.selected_layers` to be numbers, got {layers!r:.200}.")
    return {
        "token_merging_layers": [layer - 1 for layer in layers],
        "token_merging_window_size": list(lookup(variant, "dataset_kwargs.merging_window_size", (tuple, list), path)),
        "token_merging_threshold": lookup(variant, "dataset_kwargs.threshold", float, path),
    }


def agreed(variant: dict[str, Any], name: str, found: int, checkpoint: Checkpoint, path: Path) -> int:
    """A number that the YAML says, which must be the one found in the checkpoint."""
    said = lookup(variant, name, int, path)
    if said != found:
        raise ValueError(
            f"{path}: `{name}` is {said}, but {checkpoint.path} has {found}. Is it the variant.yml of this checkpoint?"
        )
    return said


def processor_config(variant: dict[str, Any], path: Path) -> dict[str, Any]:
    """Arguments of the image processor: the protocol that the model was evaluated with."""
    dataset = lookup(variant, "dataset_kwargs.dataset", str, path)
    normalization = lookup(variant, "net_kwargs.normalization", str, path)
    if normalization not in NORMALIZATION:
        raise ValueError(f"{path}: expected the normalization {' or '.join(NORMALIZATION)}, got {normalization!r}.")
    size = lookup(variant, "inference_kwargs.im_size", int, path)
    return {
        **NORMALIZATION[normalization],
        # datasets that rstrudel/segmenter does not have are resized like ADE20K
        "size": {"shortest_edge": size, "longest_edge": MAX_RATIO.get(dataset, 4) * size},
        "window_size": lookup(variant, "inference_kwargs.window_size", int, path),
        "window_stride": lookup(variant, "inference_kwargs.window_stride", int, path),
        "patch_size": lookup(variant, "net_kwargs.patch_size", int, path),
        "do_reduce_labels": dataset == "ade20k",
    }
