"""What a conversion may change on request: the grid of the position embeddings, the channels, the family of an encoder."""

from dataclasses import replace
from typing import Any

from ..models.modeling_segmenter import SegmenterModel
from ..models.modeling_setr import SetrModel
from ..models.resampling import resize_position_embeddings
from .state_dicts import Conversion, Weight


ENCODERS = {"segmenter": SegmenterModel, "setr": SetrModel}
POSITIONS = "embeddings.position_embeddings"
PATCHES = "embeddings.patch_embeddings.projection.weight"
MAX_GRID = 512  # patches along a side, 8192 pixels for patches of 16
MAX_CHANNELS = 1000


def adapt(
    conversion: Conversion,
    weights: dict[str, Weight],
    *,
    image_size: int | None = None,
    num_channels: int | None = None,
    model_type: str | None = None,
) -> tuple[Conversion, dict[str, Weight]]:
    """Apply the changes that were asked for to a conversion and its renamed weights.

    Args:
        conversion (`Conversion`), weights (`dict[str, Weight]`): What the checkpoint makes as it is.
        image_size (`int`, *optional*): Side in pixels of the new grid of position embeddings, which are resized as the
            model resizes them for inputs of another size: by `position_embedding_interpolation` of the configuration.
        num_channels (`int`, *optional*): Channels of the images.
        model_type (`str`, *optional*): "segmenter" or "setr", for a checkpoint that is an encoder.

    Returns:
        `tuple[Conversion, dict[str, Weight]]`: The changed ones.

    Raises:
        ValueError: If the checkpoint cannot be changed so.
    """
    weights = dict(weights)
    if model_type is not None and model_type != conversion.model_class.config_class.model_type:
        conversion = convert_family(conversion, weights, model_type)
    if image_size is not None:
        conversion = resize_positions(conversion, weights, image_size)
    if num_channels is not None and num_channels != conversion.config["num_channels"]:
        conversion = adapt_input_conv(conversion, weights, num_channels)
    return conversion, weights


def convert_family(conversion: Conversion, weights: dict[str, Weight], model_type: str) -> Conversion:
    """Make an encoder that of another family. SETR has no final norm: that of the checkpoint is left out."""
    if model_type not in ENCODERS:
        raise ValueError(f"`model_type` must be one of {', '.join(ENCODERS)}, got {model_type!r}.")
    if conversion.num_labels is not None:
        family = conversion.model_class.config_class.model_type
        raise ValueError(
            f"The checkpoint is a whole {family} model: `model_type` {model_type!r} is for encoders alone."
        )
    if model_type == "setr":
        for name in ("layernorm.weight", "layernorm.bias"):
            weights.pop(name, None)
    return replace(conversion, model_class=ENCODERS[model_type])


def resize_positions(conversion: Conversion, weights: dict[str, Weight], image_size: int) -> Conversion:
    """Resize the position embeddings of the patches; those of class and distillation token stay."""
    config = conversion.config
    patch_size, old_size = config["patch_size"], config["image_size"]
    if image_size < patch_size or image_size % patch_size:
        raise ValueError(f"`image_size` must be a multiple of the patch size {patch_size}, got {image_size}.")
    if image_size > MAX_GRID * patch_size:
        raise ValueError(f"`image_size` must be at most {MAX_GRID * patch_size}, got {image_size}.")
    height, width = (old_size, old_size) if isinstance(old_size, int) else old_size
    grid, new = (height // patch_size, width // patch_size), (image_size // patch_size, image_size // patch_size)
    for name in (name for name in weights if name.endswith(POSITIONS)):  # none where positions are rotary
        resized = resize_position_embeddings(
            weights[name].tensor.float(),
            grid,
            new,
            config.get("position_embedding_interpolation", "bilinear"),
            config.get("position_embedding_antialias", False),
            config.get("position_embedding_offset", 0.0),
        )
        weights[name] = weights[name]._replace(tensor=resized)
    return replace(conversion, config=config | {"image_size": image_size})


def adapt_input_conv(conversion: Conversion, weights: dict[str, Weight], num_channels: int) -> Conversion:
    """Repeat the kernels of the channels in turn, scaled so that equal channels give what they gave before.

    The rule of timm (`timm/models/_manipulate.py`, `adapt_input_conv`), which adds the kernels up for one channel. Mean
    and standard deviation of the image processor follow.
    """
    if not 1 <= num_channels <= MAX_CHANNELS:
        raise ValueError(f"`num_channels` must be at least 1 and at most {MAX_CHANNELS}, got {num_channels}.")
    name = next(name for name in weights if name.endswith(PATCHES))
    kernel, old = weights[name].tensor.float(), conversion.config["num_channels"]
    order = [channel % old for channel in range(num_channels)]
    adapted = kernel.sum(1, keepdim=True) if num_channels == 1 else kernel[:, order] * (old / num_channels)
    weights[name] = weights[name]._replace(tensor=adapted)
    processor: dict[str, Any] = {**conversion.processor, "do_convert_rgb": num_channels == 3}
    for statistic in ("image_mean", "image_std"):
        values = list(processor[statistic])
        processor[statistic] = [sum(values) / len(values)] if num_channels == 1 else [values[i] for i in order]
    return replace(conversion, config=conversion.config | {"num_channels": num_channels}, processor=processor)
