"""Heads that facebookresearch/dinov2 publishes for its frozen encoders: batch normalization and a linear layer.

Such a head is a file beside the encoder's, and says of itself only its weights: the layers that it sees and the windows stand in
a configuration of mmsegmentation 0.x, which is read as text and never run.
"""

from pathlib import Path
from typing import Any

from ..models.modeling_segmenter import SegmenterForSemanticSegmentation
from . import vit_checkpoints
from .configuration_files import lookup, read_python_config, read_text
from .mmsegmentation_common import class_names, palette, processor_config
from .safe_loading import Checkpoint
from .state_dicts import Conversion, Rename, get_tensor


VARIABLES = ("model", "img_norm_cfg", "train_pipeline", "test_pipeline", "test_cfg")
HEAD = [
    Rename(r"decode_head\.bn\.(weight|bias|running_mean|running_var)", r"decode_head.batch_norm.\1"),
    Rename(r"decode_head\.conv_seg\.weight", "decode_head.classifier.weight", lambda kernel: kernel.flatten(1)),
    Rename(r"decode_head\.conv_seg\.bias", "decode_head.classifier.bias"),
]
HEAD_UNUSED = [r"decode_head\.bn\.num_batches_tracked"]


def matches(checkpoint: Checkpoint) -> bool:
    """Whether the keys are those of a head without its encoder."""
    keys = checkpoint.state_dict
    return "decode_head.bn.weight" in keys and not any(key.startswith("backbone.") for key in keys)


def convert(checkpoint: Checkpoint, config_path: Path | None) -> Conversion:
    """Describe the model that the head, its encoder and its configuration make.

    Args:
        checkpoint (`Checkpoint`): The head, with its encoder.
        config_path (`Path`, *optional*): The configuration; by default the one beside the head.

    Returns:
        `Conversion`: A Segmenter with the linear decoder, centered padding and the windows of the configuration.

    Raises:
        ValueError: If the encoder or the configuration is missing, or they do not fit together.
    """
    path = checkpoint.path
    if checkpoint.encoder is None:
        raise ValueError(
            f"{path}: a head without its encoder: give the encoder's file as encoder_path, such as "
            "dinov2_vits14_pretrain.pth for a head of ViT-S/14."
        )
    config_path = config_path or find_config(path)
    where = str(config_path)
    config = read_python_config(read_text(config_path), VARIABLES, where)
    encoder = vit_checkpoints.convert(checkpoint.encoder, None)
    kernel = get_tensor(checkpoint.state_dict, "decode_head.conv_seg.weight", 4, path)
    layers = read_layers(config, where)
    width = len(layers) * encoder.config["hidden_size"]
    if kernel.shape[1] != width:
        raise ValueError(
            f"{path}: the head sees {kernel.shape[1]} channels, but the layers {layers} of {checkpoint.encoder.path} have "
            f"{width}. Give the encoder and the configuration that belong to the head."
        )
    return Conversion(
        source="facebookresearch/dinov2",
        model_class=SegmenterForSemanticSegmentation,
        config={
            **encoder.config,
            "decoder_type": "linear",
            "decoder_norm": "batch_norm",
            "out_indices": layers,
            "padding": "center",
        },
        state_dict={**encoder.state_dict, **checkpoint.state_dict},
        renames=[*HEAD, *(rename._replace(target=with_prefix(rename.target)) for rename in encoder.renames)],
        unused=[*HEAD_UNUSED, *encoder.unused],
        processor={
            **processor_config(config, where, is_deit=True),
            "patch_size": encoder.config["patch_size"],
            "padding": "center",
        },
        num_labels=kernel.shape[0],
        class_names=class_names(checkpoint),
        palette=palette(checkpoint),
        label_sets=("ade20k", "pascal_voc"),
    )


def find_config(path: Path) -> Path:
    """The configuration beside a head: `..._config.py` of the same name, or `config.py`.

    Raises:
        ValueError: If there is none.
    """
    names = [path.stem.removesuffix("_head") + "_config.py", "config.py"]
    for name in names:
        if path.with_name(name).is_file():
            return path.with_name(name)
    raise ValueError(f"{path}: expected its configuration {' or '.join(names)} beside it: give it as config_path.")


def read_layers(config: dict[str, Any], where: str) -> list[int]:
    """The layers of the encoder, counted from 0, whose tokens the head sees.

    Raises:
        ValueError: If the configuration names none, or is that of another head.
    """
    sequence = (list, tuple)
    layers = list(lookup(config, "model.backbone.out_indices", sequence, where))
    chosen = lookup(config, "model.decode_head.in_index", (int, list, tuple), where, list(range(len(layers))))
    chosen = [chosen] if isinstance(chosen, int) else list(chosen)
    is_whole = all(type(index) is int for index in [*layers, *chosen])
    if not chosen or not is_whole or not all(-len(layers) <= index < len(layers) for index in chosen):
        raise ValueError(f"{where}: expected layers by their numbers, got {layers} and of these {chosen}.")
    if lookup(config, "model.decode_head.align_corners", bool, where, False):
        raise ValueError(f"{where}: expected a head with `align_corners=False`, got one with True.")
    return [layers[index] for index in chosen]


def with_prefix(target: str | tuple[str | None, ...]) -> str | tuple[str | None, ...]:
    """A target of the encoder's rename table in a whole model."""
    if isinstance(target, str):
        return f"segmenter.{target}"
    return tuple(None if part is None else f"segmenter.{part}" for part in target)
