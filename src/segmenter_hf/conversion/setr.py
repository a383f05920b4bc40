"""Checkpoints of SETR: those of mmsegmentation, and those of the authors' repository, fudan-zvg/SETR.

The authors' variant differs in names; its convolutions have a bias before the batch norm, which goes into the running
mean; its SETR-MLA counts the levels from the shallowest, aligns corners and ends with a 3x3 convolution; and its
SETR-Naive and its auxiliary heads upsample once, at the end, which is an upsampling factor of 1 here.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..models.modeling_setr import SetrForSemanticSegmentation
from .configuration_files import lookup
from .mmsegmentation_common import (
    backbone_renames,
    class_names,
    encoder_config,
    palette,
    processor_config,
    read_config,
)
from .safe_loading import Checkpoint
from .state_dicts import Conversion, Rename, count_layers, get_tensor, square_image_size, timm_layers


COUNTERS = r".*\.num_batches_tracked"
PARAMETER = r"(?P<parameter>weight|bias)"
LEVELS = 4  # of SETR-MLA, which the authors call 2 to 5


def conv_layer(source: str, target: str, conv: str = "conv", norm: str = "bn") -> list[Rename]:
    """Table of a convolution with batch norm, which are called `conv` and `norm` in the source."""
    return [
        Rename(rf"{source}{conv}\.weight", rf"{target}.convolution.weight"),
        Rename(
            rf"{source}{norm}\.(?P<statistic>weight|bias|running_mean|running_var)",
            rf"{target}.batch_norm.\g<statistic>",
        ),
    ]


def upsampling_head(source: str, target: str) -> list[Rename]:
    """Table of mmsegmentation's SETRUPHead, and of the classifier of its FCNHead."""
    return [
        Rename(rf"{source}\.norm\.{PARAMETER}", rf"{target}.layernorm.\g<parameter>"),
        *conv_layer(source + r"\.up_convs\.(?P<conv>\d+)\.0\.", target + r".convs.\g<conv>"),
        Rename(rf"{source}\.conv_seg\.{PARAMETER}", rf"{target}.classifier.\g<parameter>"),
    ]


AUXILIARY, AUXILIARY_TARGET = r"auxiliary_head\.(?P<head>\d+)", r"auxiliary_heads.\g<head>"
MMSEGMENTATION = [*backbone_renames("setr"), *upsampling_head(AUXILIARY, AUXILIARY_TARGET)]
MMSEGMENTATION_UP = upsampling_head("decode_head", "decode_head")
MMSEGMENTATION_MLA = [
    Rename(rf"neck\.norm\.(?P<level>\d+)\.{PARAMETER}", r"neck.layernorms.\g<level>.\g<parameter>"),
    *conv_layer(r"neck\.mla\.channel_proj\.(?P<level>\d+)\.", r"neck.projections.\g<level>"),
    *conv_layer(r"neck\.mla\.feat_extract\.(?P<level>\d+)\.", r"neck.convs.\g<level>"),
    *conv_layer(r"decode_head\.up_convs\.(?P<level>\d+)\.(?P<conv>\d+)\.", r"decode_head.levels.\g<level>.\g<conv>"),
    Rename(rf"decode_head\.conv_seg\.{PARAMETER}", r"decode_head.classifier.\g<parameter>"),
]


def authors_head(source: str, target: str, last: int) -> list[Rename]:
    """Table of the authors' head of `last` convolutions with batch norm and one to the classes."""
    return [
        Rename(rf"{source}\.norm\.{PARAMETER}", rf"{target}.layernorm.\g<parameter>"),
        Rename(rf"{source}\.conv_{last}\.{PARAMETER}", rf"{target}.classifier.\g<parameter>"),
        *conv_layer(rf"{source}\.", rf"{target}.convs.\g<conv>", r"conv_(?P<conv>\d+)", r"syncbn_fc_(?P<conv>\d+)"),
    ]


def reverse_levels(kernel: torch.Tensor) -> torch.Tensor:
    """Kernel (labels, levels * channels, height, width) with the levels in reverse order."""
    return torch.cat(kernel.chunk(LEVELS, dim=1)[::-1], dim=1)


AUTHORS = [
    Rename(r"backbone\.cls_token", "setr.embeddings.cls_token"),
    Rename(r"backbone\.pos_embed", "setr.embeddings.position_embeddings"),
    Rename(r"backbone\.patch_embed\.proj\.(weight|bias)", r"setr.embeddings.patch_embeddings.projection.\1"),
    *timm_layers(r"backbone\.blocks", "setr.layers"),
]
AUTHORS_MLA = [
    Rename(r"backbone\.norm_(\d)\.(weight|bias)", r"neck.layernorms.\1.\2"),
    *(
        rename
        for level in range(LEVELS)
        for rename in (
            *conv_layer(rf"backbone\.mla\.mla_p{level + 2}_1x1\.", f"neck.projections.{level}", "0", "1"),
            *conv_layer(rf"backbone\.mla\.mla_p{level + 2}\.", f"neck.convs.{LEVELS - 1 - level}", "0", "1"),
            *conv_layer(rf"decode_head\.mlahead\.head{level + 2}\.", f"decode_head.levels.{3 - level}.0", "0", "1"),
            *conv_layer(rf"decode_head\.mlahead\.head{level + 2}\.", f"decode_head.levels.{3 - level}.1", "3", "4"),
            Rename(
                rf"auxiliary_head\.{level}\.aux\.{PARAMETER}", rf"auxiliary_heads.{3 - level}.classifier.\g<parameter>"
            ),
        )
    ),
    Rename(r"decode_head\.cls\.weight", "decode_head.classifier.weight", reverse_levels),
    Rename(r"decode_head\.cls\.bias", "decode_head.classifier.bias"),
]
AUTHORS_UNUSED = [
    COUNTERS,
    r"(decode_head|auxiliary_head\.\d+)\.conv_seg\.(weight|bias)",
]  # conv_seg: of the base class


def matches(checkpoint: Checkpoint) -> bool:
    """Whether the keys are those of the authors' repository."""
    return all(
        any(key.startswith(prefix) for key in checkpoint.state_dict) for prefix in ("backbone.blocks.", "decode_head.")
    )


def convert(checkpoint: Checkpoint, config_path: Path | None) -> Conversion:
    """Describe the model that a checkpoint of the authors' repository makes.

    Args:
        checkpoint (`Checkpoint`): The weights, with the text of the configuration.
        config_path (`Path`, *optional*): The dumped configuration, instead of the one in the checkpoint.

    Returns:
        `Conversion`: A SETR.

    Raises:
        ValueError: If there is no configuration, or heads differ in ways that the authors' do not.
    """
    config, where = read_config(checkpoint, config_path)
    state_dict, path = fold_biases(checkpoint.state_dict), checkpoint.path
    patches = get_tensor(state_dict, "backbone.patch_embed.proj.weight", 4, path)
    positions = get_tensor(state_dict, "backbone.pos_embed", 3, path)
    backbone = lookup(config, "model.backbone", dict, where)
    describe_heads = authors_mla_heads if "decode_head.cls.weight" in state_dict else authors_upsampling_heads
    heads = describe_heads(state_dict, path, config, where)
    encoder = {
        "hidden_size": patches.shape[0],
        "num_channels": patches.shape[1],
        "patch_size": patches.shape[-1],
        "image_size": square_image_size(positions, 1, patches.shape[-1], path),
        "num_hidden_layers": count_layers(state_dict, r"backbone\.blocks"),
        "num_attention_heads": lookup(backbone, "num_heads", int, where, 16),
        "intermediate_size": get_tensor(state_dict, "backbone.blocks.0.mlp.fc1.weight", 2, path).shape[0],
        "qkv_bias": "backbone.blocks.0.attn.qkv.bias" in state_dict,
        "hidden_dropout_prob": lookup(backbone, "drop_rate", float, where, 0.1),
        "attention_probs_dropout_prob": lookup(backbone, "attn_drop_rate", float, where, 0.0),
        "drop_path_rate": lookup(backbone, "drop_path_rate", float, where, 0.0),
        "layer_norm_eps": 1e-6,
    }
    return Conversion(
        source="fudan-zvg/SETR",
        model_class=SetrForSemanticSegmentation,
        config=encoder | heads.config | auxiliary_loss(state_dict, config, where),
        state_dict=state_dict,
        renames=[*AUTHORS, *heads.renames],
        unused=AUTHORS_UNUSED,
        processor=processor_config(config, where, is_deit=True) | {"patch_size": patches.shape[-1]},
        num_labels=heads.num_labels,
        class_names=class_names(checkpoint),
        palette=palette(checkpoint),
    )


class Heads(NamedTuple):
    """The decoder and the auxiliary heads: their fields of the configuration, their table, and the number of classes."""

    config: dict[str, Any]
    renames: list[Rename]
    num_labels: int


def authors_mla_heads(state_dict: dict[str, Any], path: Path, config: dict[str, Any], where: str) -> Heads:
    """Describe the heads of the authors' SETR-MLA, and add the biases that its auxiliary heads lack.

    Raises:
        ValueError: If the auxiliary heads are on other levels than the first.
    """
    indices = [lookup(head, "in_index", int, where) for head in auxiliary_heads(config, where)]
    num_auxiliaries = count_layers(state_dict, "auxiliary_head")
    check_indices(indices, num_auxiliaries, where)
    num_labels = get_tensor(state_dict, "decode_head.cls.weight", 4, path).shape[0]
    for head in range(num_auxiliaries):
        state_dict.setdefault(f"auxiliary_head.{head}.aux.bias", torch.zeros(num_labels))
    decoder = {
        "decoder_type": "mla",
        "out_indices": list(lookup(config, "model.backbone.mla_index", (list, tuple), where, (5, 11, 17, 23))),
        "decoder_hidden_size": get_tensor(state_dict, "backbone.mla.mla_p2_1x1.0.weight", 4, path).shape[0],
        "decoder_align_corners": True,
        "decoder_classifier_kernel_size": 3,
    }
    return Heads(decoder, AUTHORS_MLA, num_labels)


def authors_upsampling_heads(state_dict: dict[str, Any], path: Path, config: dict[str, Any], where: str) -> Heads:
    """Describe the heads of the authors' SETR-Naive and SETR-PUP.

    Raises:
        ValueError: If the auxiliary heads differ.
    """
    auxiliaries = auxiliary_heads(config, where)
    num_auxiliaries = count_layers(state_dict, "auxiliary_head")
    indices = [lookup(head, "in_index", int, where) for head in auxiliaries]
    layers = [lookup(head, "num_upsampe_layer", int, where, 1) for head in auxiliaries]
    kernels = {side(state_dict, f"auxiliary_head.{head}.conv_0.weight", path) for head in range(num_auxiliaries)}
    convs = {count_convs(state_dict, f"auxiliary_head.{head}") for head in range(num_auxiliaries)}
    if len(indices) != num_auxiliaries or len({*layers}) > 1 or len(kernels) > 1 or convs - {1}:
        raise ValueError(f"{where}: expected auxiliary heads of one kind, each of two convolutions.")
    last = count_convs(state_dict, "decode_head")
    head_layers = lookup(config, "model.decode_head.num_upsampe_layer", int, where, 1)
    decoder = {
        "decoder_type": "naive" if last == 1 else "pup",
        "out_indices": [*indices, lookup(config, "model.decode_head.in_index", int, where)],
        "decoder_hidden_size": get_tensor(state_dict, "decode_head.conv_0.weight", 4, path).shape[0],
        "decoder_num_convs": last,
        "decoder_kernel_size": side(state_dict, "decode_head.conv_0.weight", path),
        "decoder_upsample_factor": 2 if last > 1 else 4 if head_layers == 2 else 1,
        "auxiliary_num_convs": 1,
        "auxiliary_kernel_size": max(kernels, default=1),
        "auxiliary_upsample_factor": 4 if 2 in layers else 1,
    }
    renames = [*authors_head("decode_head", "decode_head", last), *authors_head(AUXILIARY, AUXILIARY_TARGET, 1)]
    return Heads(decoder, renames, get_tensor(state_dict, f"decode_head.conv_{last}.weight", 4, path).shape[0])


def convert_mmsegmentation(checkpoint: Checkpoint, config: dict[str, Any], where: str) -> Conversion:
    """Describe the model that a SETR checkpoint of mmsegmentation makes.

    Args:
        checkpoint (`Checkpoint`): The weights.
        config (`dict[str, Any]`): The configuration in it.
        where (`str`): What to call the configuration in errors.

    Returns:
        `Conversion`: A SETR.

    Raises:
        ValueError: If tensors are missing, or heads differ in ways that mmsegmentation's do not.
    """
    state_dict, path = dict(checkpoint.state_dict), checkpoint.path
    backbone = lookup(config, "model.backbone", dict, where)
    patches = get_tensor(state_dict, "backbone.patch_embed.projection.weight", 4, path)
    # mmsegmentation's patch embedding has no bias
    state_dict.setdefault("backbone.patch_embed.projection.bias", torch.zeros(patches.shape[0]))
    indices = [lookup(head, "in_index", int, where) for head in auxiliary_heads(config, where)]
    check_indices(indices, count_layers(state_dict, "auxiliary_head"), where)
    is_mla = any(key.startswith("neck.") for key in state_dict)
    first = get_tensor(state_dict, "decode_head.up_convs.0.0.conv.weight", 4, path)
    if is_mla:
        num_convs = count_layers(state_dict, r"decode_head\.up_convs\.0")
        width = get_tensor(state_dict, "neck.mla.channel_proj.0.conv.weight", 4, path).shape[0]
        auxiliary = {"auxiliary_num_convs": 0, "auxiliary_upsample_factor": 1}
    else:
        num_convs, width = count_layers(state_dict, r"decode_head\.up_convs"), first.shape[0]
        auxiliary = auxiliary_upsampling(state_dict, path, config, where)
    return Conversion(
        source="open-mmlab/mmsegmentation",
        model_class=SetrForSemanticSegmentation,
        config={
            **encoder_config(backbone, state_dict, path, where),
            "out_indices": list(lookup(backbone, "out_indices", (list, tuple), where)),
            "decoder_type": "mla" if is_mla else "naive" if num_convs == 1 else "pup",
            "decoder_hidden_size": width,
            "decoder_num_convs": num_convs,
            "decoder_kernel_size": first.shape[-1],
            "decoder_upsample_factor": lookup(config, "model.decode_head.up_scale", int, where, 4),
            **auxiliary,
            **auxiliary_loss(state_dict, config, where),
        },
        state_dict=state_dict,
        renames=MMSEGMENTATION + (MMSEGMENTATION_MLA if is_mla else MMSEGMENTATION_UP),
        unused=[COUNTERS],
        processor=processor_config(config, where, is_deit=True) | {"patch_size": patches.shape[-1]},
        num_labels=get_tensor(state_dict, "decode_head.conv_seg.weight", 4, path).shape[0],
        class_names=class_names(checkpoint),
        palette=palette(checkpoint),
    )


def auxiliary_upsampling(state_dict: dict[str, Any], path: Path, config: dict[str, Any], where: str) -> dict[str, int]:
    """Fields of mmsegmentation's auxiliary heads that upsample.

    Raises:
        ValueError: If they differ.
    """
    heads = [f"auxiliary_head.{index}.up_convs" for index in range(count_layers(state_dict, "auxiliary_head"))]
    convs = {count_layers(state_dict, re.escape(head)) for head in heads}
    kernels = {side(state_dict, f"{head}.0.0.conv.weight", path) for head in heads}
    factors = {lookup(head, "up_scale", int, where, 4) for head in auxiliary_heads(config, where)}
    if len(convs) > 1 or len(kernels) > 1 or len(factors) > 1:
        raise ValueError(f"{where}: expected auxiliary heads of one kind, got {convs} convolutions of {kernels}.")
    return {
        "auxiliary_num_convs": max(convs, default=1),
        "auxiliary_kernel_size": max(kernels, default=1),
        "auxiliary_upsample_factor": max(factors, default=4),
    }


def fold_biases(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Take the bias of each convolution before a batch norm into its running mean, which changes no output."""
    folded = dict(state_dict)
    for key in state_dict:
        match = re.fullmatch(r"(.+)\.conv_(\d+)\.bias", key)
        mean = match and f"{match[1]}.syncbn_fc_{match[2]}.running_mean"
        if mean in folded:
            folded[mean] = folded[mean] - folded.pop(key)
    return folded


def count_convs(state_dict: dict[str, Any], head: str) -> int:
    """Convolutions with batch norm of a head of the authors."""
    return sum(re.fullmatch(rf"{re.escape(head)}\.syncbn_fc_\d+\.weight", key) is not None for key in state_dict)


def side(state_dict: dict[str, Any], key: str, path: Path) -> int:
    """Side of a kernel."""
    return get_tensor(state_dict, key, 4, path).shape[-1]


def auxiliary_heads(config: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The auxiliary heads of a configuration."""
    heads = lookup(config, "model.auxiliary_head", (list, dict), where, [])
    return [head for head in ([heads] if isinstance(heads, dict) else heads) if isinstance(head, dict)]


def check_indices(indices: list[int], num_auxiliaries: int, where: str) -> None:
    """The auxiliary heads must see the first levels in order.

    Raises:
        ValueError: If they do not.
    """
    if indices != [*range(num_auxiliaries)]:
        raise ValueError(
            f"{where}: expected auxiliary heads on levels {[*range(num_auxiliaries)]}, as in the weights, got {indices}."
        )


def auxiliary_loss(state_dict: dict[str, Any], config: dict[str, Any], where: str) -> dict[str, Any]:
    """Whether there are auxiliary heads, and the weight of their loss."""
    heads = auxiliary_heads(config, where)
    weights = [lookup(head, "loss_decode.loss_weight", float, where, 0.4) for head in heads]
    return {
        "use_auxiliary_head": count_layers(state_dict, "auxiliary_head") > 0,
        "auxiliary_loss_weight": weights[0] if weights else 0.4,
    }
