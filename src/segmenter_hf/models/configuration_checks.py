"""What the fields of the encoder's configuration must be: checks that a configuration runs when it is made."""

import math
from typing import TYPE_CHECKING, Any

from transformers.activations import ACT2FN


if TYPE_CHECKING:
    from .configuration_vit_encoder import VitEncoderConfig


# What a configuration may ask for: a file of a few bytes must not keep a computer busy or fill its memory with layers and
# names of classes.
MAX_LAYERS, MAX_SIZE, MAX_LABELS, MAX_REGISTER_TOKENS = 1000, 2**24, 2**16, 4096
LIMITED = ("_size", "_layers", "_heads", "_channels", "_convs", "_factor")


def check_labels(name: str, id2label: Any, num_labels: Any) -> None:
    """The classes are numbered from 0 without gaps, and there is at least one. `PreTrainedConfig` takes anything."""
    if num_labels is not None and not (type(num_labels) is int and 1 <= num_labels <= MAX_LABELS):
        raise ValueError(f"{name}: `num_labels` must be at least 1 and at most {MAX_LABELS}, got {num_labels!r:.200}.")
    if id2label is None:
        return
    if isinstance(id2label, dict) and len(id2label) > MAX_LABELS:
        raise ValueError(f"{name}: `id2label` must have at most {MAX_LABELS} classes, got {len(id2label)}.")
    if not (isinstance(id2label, dict) and id2label and {*map(str, id2label)} == {*map(str, range(len(id2label)))}):
        raise ValueError(f"{name}: `id2label` must name the classes 0, 1, 2 and so on, got {id2label!r:.200}.")


def validate_sizes(config: "VitEncoderConfig") -> None:
    """Every size is positive, and the patches tile the image."""
    for name, value in config.to_dict().items():
        is_size = name.endswith(("_size", "_layers", "_heads", "num_channels")) and isinstance(value, int)
        if is_size and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
        largest = MAX_LAYERS if name.endswith(("_layers", "_convs")) else MAX_SIZE
        if name.endswith(LIMITED) and isinstance(value, int) and value > largest:
            raise ValueError(f"`{name}` must be at most {largest}, got {value}.")
    if not isinstance(config.image_size, int) and len(config.image_size) != 2:
        raise ValueError(f"`image_size` must be an int or [height, width], got {config.image_size}.")
    if any(side < 1 or side % config.patch_size for side in config.image_height_and_width):
        raise ValueError(
            f"`image_size` must be a positive multiple of `patch_size`, got {config.image_size} and "
            f"{config.patch_size}. Inputs of other sizes are padded by the model and need no change here."
        )


def validate_attention_heads(config: "VitEncoderConfig") -> None:
    """The heads share the width equally, in the encoder and, where there is one, in the decoder."""
    for prefix in ("", "decoder_"):
        width = getattr(config, f"{prefix}hidden_size", None)
        heads = getattr(config, f"{prefix}num_attention_heads", None)
        if width and heads and width % heads:
            raise ValueError(
                f"`{prefix}hidden_size` must be a multiple of `{prefix}num_attention_heads`, got {width} and {heads}."
            )


def validate_positions(config: "VitEncoderConfig") -> None:
    """Rotary positions have four angles of each frequency, and the options of the resize go together."""
    if not 0 <= config.num_register_tokens <= MAX_REGISTER_TOKENS:
        raise ValueError(
            f"`num_register_tokens` must be from 0 to {MAX_REGISTER_TOKENS}, got {config.num_register_tokens}."
        )
    if config.position_embedding_type == "rotary" and config.hidden_size % (4 * config.num_attention_heads):
        raise ValueError(
            "Rotary positions need a multiple of 4 channels in each head, got `hidden_size` "
            f"{config.hidden_size} and `num_attention_heads` {config.num_attention_heads}."
        )
    if not 0 < config.rope_theta < math.inf:
        raise ValueError(f"`rope_theta` must be positive, got {config.rope_theta}.")
    if not 0 <= config.position_embedding_offset < 1:
        raise ValueError(
            f"`position_embedding_offset` must be at least 0 and below 1, got {config.position_embedding_offset}."
        )
    if config.position_embedding_offset and config.position_embedding_antialias:
        raise ValueError(
            "`position_embedding_offset` and `position_embedding_antialias` exclude each other, got "
            f"{config.position_embedding_offset} and {config.position_embedding_antialias}."
        )


def validate_token_merging(config: "VitEncoderConfig") -> None:
    """The layers exist and rise, windows hold two patches or more, and the threshold is a cosine."""
    layers = config.token_merging_layers or ()
    is_short = len(layers) <= config.num_hidden_layers
    if not is_short or list(layers) != sorted({*layers} & {*range(config.num_hidden_layers)}):
        raise ValueError(
            f"`token_merging_layers` must be rising numbers from 0 to {config.num_hidden_layers - 1}, got {str(layers[:99]):.200}."
        )
    size = config.token_merging_window_size
    sides = [size, size] if isinstance(size, int) else list(size)
    if len(sides) != 2 or min(sides) < 1 or max(sides) > MAX_SIZE or sides == [1, 1]:
        raise ValueError(f"`token_merging_window_size` must be 2 patches or more, or [height, width], got {size}.")
    if not -1 <= config.token_merging_threshold <= 1:
        raise ValueError(f"`token_merging_threshold` must be from -1 to 1, got {config.token_merging_threshold}.")


def validate_numbers(config: "VitEncoderConfig") -> None:
    """Dropout and drop path are probabilities below 1, the epsilons of the norms positive."""
    for name, value in config.to_dict().items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"`{name}` must be finite, got {value}.")
        if name.endswith(("dropout_prob", "drop_path_rate")) and not 0 <= value < 1:
            raise ValueError(f"`{name}` must be at least 0 and below 1, got {value}.")
        if name.endswith("norm_eps") and not 0 < value < math.inf:
            raise ValueError(f"`{name}` must be positive, got {value}.")
    if config.layerscale_value is not None and not math.isfinite(config.layerscale_value):
        raise ValueError(f"`layerscale_value` must be finite, got {config.layerscale_value}.")
    if not 0 <= config.initializer_range < math.inf:
        raise ValueError(f"`initializer_range` must be at least 0, got {config.initializer_range}.")


def validate_loss(config: "VitEncoderConfig") -> None:
    """The options of the loss are in range, with one weight for each class."""
    weights, expected = config.semantic_loss_class_weights, max(config.num_labels, 2)
    usable = weights is None or all(0 <= weight < float("inf") for weight in weights) and max(weights, default=0) > 0
    if not usable or weights is not None and len(weights) != expected:
        raise ValueError(
            f"`semantic_loss_class_weights` must be {expected} finite numbers, none below 0 and one above, got {weights}. "
            "To load a model with another `num_labels`, give `semantic_loss_class_weights=None` or new weights with it."
        )
    if not 0 <= config.semantic_loss_focal_gamma < math.inf:
        raise ValueError(
            f"`semantic_loss_focal_gamma` must be at least 0 and finite, got {config.semantic_loss_focal_gamma}."
        )
    if not 0 < config.semantic_loss_ohem_fraction <= 1:
        raise ValueError(
            f"`semantic_loss_ohem_fraction` must be above 0 and at most 1, got {config.semantic_loss_ohem_fraction}."
        )
    if not 0 <= config.semantic_loss_label_smoothing <= 1:
        raise ValueError(
            f"`semantic_loss_label_smoothing` must be from 0 to 1, got {config.semantic_loss_label_smoothing}."
        )
    if not 0 <= config.semantic_loss_dice_weight < math.inf:
        raise ValueError(
            f"`semantic_loss_dice_weight` must be at least 0 and finite, got {config.semantic_loss_dice_weight}."
        )


def validate_activation(config: "VitEncoderConfig") -> None:
    """The activation is one that transformers knows."""
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"`hidden_act` must be one of {sorted(ACT2FN)}, got {config.hidden_act!r}.")


__all__ = [
    "check_labels",
    "validate_sizes",
    "validate_attention_heads",
    "validate_positions",
    "validate_token_merging",
    "validate_numbers",
    "validate_loss",
    "validate_activation",
]
