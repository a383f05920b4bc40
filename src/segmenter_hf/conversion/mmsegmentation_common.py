"""What checkpoints of mmsegmentation and of the systems built on it have in common: their transformer layers, and the
text of the configuration inside. Sizes are read from the tensors, from the text what they do not show."""

from pathlib import Path
from typing import Any

from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .configuration_files import lookup, read_python_config, read_text
from .safe_loading import Checkpoint
from .state_dicts import Rename, count_layers, get_tensor, qkv


VARIABLES = ("model", "data_preprocessor", "img_norm_cfg", "train_pipeline", "test_pipeline", "test_cfg")
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


def backbone_renames(target: str) -> list[Rename]:
    """Table of mmsegmentation's VisionTransformer, without its final norm; `target` is the prefix of the encoder."""
    return [
        Rename(r"backbone\.cls_token", f"{target}.embeddings.cls_token"),
        Rename(r"backbone\.dist_token", f"{target}.embeddings.distillation_token"),
        Rename(r"backbone\.pos_embed", f"{target}.embeddings.position_embeddings"),
        Rename(
            r"backbone\.patch_embed\.projection\.(weight|bias)",
            rf"{target}.embeddings.patch_embeddings.projection.\1",
        ),
        *layer_renames(r"backbone\.layers", f"{target}.layers"),
    ]


def read_config(checkpoint: Checkpoint, config_path: Path | None) -> tuple[dict[str, Any], str]:
    """The configuration, and what to call it in errors.

    Raises:
        ValueError: If there is none, or it is more than literals.
    """
    text, where = config_text(checkpoint, config_path)
    return read_python_config(text, VARIABLES, where), where


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


def note(checkpoint: Checkpoint, name: str) -> Any:
    """What mmsegmentation 0.x (in capitals) or 1.x notes of the dataset."""
    dataset = checkpoint.meta.get("dataset_meta")
    return checkpoint.meta.get(name.upper()) or (dataset.get(name) if isinstance(dataset, dict) else None)


def class_names(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Class names that mmsegmentation 0.x and 1.x note beside the weights."""
    names = note(checkpoint, "classes")
    return tuple(names) if isinstance(names, (tuple, list)) and all(isinstance(n, str) for n in names) else ()


def palette(checkpoint: Checkpoint) -> tuple[tuple[int, int, int], ...]:
    """Colors of the classes that mmsegmentation 0.x and 1.x note beside the weights; none if they are no colors."""
    colors = note(checkpoint, "palette")
    if not isinstance(colors, (tuple, list)) or not all(is_color(color) for color in colors):
        return ()
    return tuple((red, green, blue) for red, green, blue in colors)


def is_color(color: Any) -> bool:
    """Whether a value is red, green and blue from 0 to 255."""
    is_triple = isinstance(color, (tuple, list)) and len(color) == 3
    return is_triple and all(isinstance(value, int) and 0 <= value <= 255 for value in color)


def encoder_config(backbone: dict[str, Any], state_dict: dict[str, Any], path: Path, where: str) -> dict[str, Any]:
    """Arguments of the encoder; the defaults are those of mmsegmentation's VisionTransformer."""
    patches = get_tensor(state_dict, "backbone.patch_embed.projection.weight", 4, path)
    image_size = lookup(backbone, "img_size", (int, tuple, list), where, 224)
    sides = [image_size] if isinstance(image_size, int) else list(image_size)
    return {
        "hidden_size": patches.shape[0],
        "num_channels": patches.shape[1],
        "patch_size": patches.shape[-1],
        "image_size": sides[0] if len(set(sides)) == 1 else sides,
        "num_hidden_layers": count_layers(state_dict, r"backbone\.layers"),
        "num_attention_heads": lookup(backbone, "num_heads", int, where, 12),
        "intermediate_size": get_tensor(state_dict, "backbone.layers.0.ffn.layers.0.0.weight", 2, path).shape[0],
        "qkv_bias": "backbone.layers.0.attn.attn.in_proj_bias" in state_dict,
        "hidden_dropout_prob": lookup(backbone, "drop_rate", float, where, 0.0),
        "attention_probs_dropout_prob": lookup(backbone, "attn_drop_rate", float, where, 0.0),
        "drop_path_rate": lookup(backbone, "drop_path_rate", float, where, 0.0),
        "layer_norm_eps": lookup(backbone, "norm_cfg.eps", float, where, DEFAULT_EPS),
        "use_class_token": lookup(backbone, "with_cls_token", bool, where, True),
        "use_distillation_token": "backbone.dist_token" in state_dict,
        "position_embedding_interpolation": lookup(backbone, "interpolate_mode", str, where, "bicubic"),
    }


def processor_config(config: dict[str, Any], where: str, is_deit: bool) -> dict[str, Any]:
    """Arguments of the image processor, from the test pipeline of mmsegmentation 0.x or 1.x.

    Where the text has no normalization it is that of the pretrained encoder; where it has no resize, the short side is
    the window and the long side at most 4 times that, as for ADE20K.
    """
    sequence = (list, tuple)
    places = ("model.data_preprocessor", "data_preprocessor", "img_norm_cfg")
    found = [lookup(config, place, dict, where, {}) for place in places]
    normalization: dict[str, Any] = next((values for values in found if "mean" in values), {})
    if False in (normalization.get("bgr_to_rgb"), normalization.get("to_rgb")):
        raise ValueError(f"{where}: expected a model of RGB images, got one of BGR images, which is not supported.")
    mean, std = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if is_deit else ([0.5] * 3, [0.5] * 3)
    if normalization:
        mean, std = ([value / 255 for value in lookup(normalization, key, sequence, where)] for key in ("mean", "std"))
    # test_cfg stood beside the model in the earliest releases
    test = lookup(config, "model.test_cfg", dict, where, config.get("test_cfg", {}))
    crop, stride = lookup(test, "crop_size", sequence, where), lookup(test, "stride", sequence, where)
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
