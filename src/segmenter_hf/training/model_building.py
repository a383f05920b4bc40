"""The model that is trained and its image processor, from the arguments of training."""

import logging
from dataclasses import fields
from typing import Any, get_args

import torch
from transformers import AutoConfig, AutoModelForSemanticSegmentation, PreTrainedConfig, PreTrainedModel

from ..data.label_sets import LabelSet
from ..inference.model_files import check_model_files, check_stored_config
from ..inference.model_loading import (
    check_weights,
    enable_token_merging,
    has_processor,
    load_processor,
    translate_loading_errors,
    without_loading_report,
)
from ..models.configuration_vit_encoder import VitEncoderConfig
from ..models.image_processing_segmenter import SegmenterImageProcessor
from .arguments import CONFIGS, MODEL_SIZES, NORMALIZATIONS, DataArguments, ModelArguments


logger = logging.getLogger(__name__)


def build_model_and_processor(
    model_args: ModelArguments, data_args: DataArguments, label_set: LabelSet, weights: list[float] | None = None
) -> tuple[PreTrainedModel, SegmenterImageProcessor]:
    """Load a model to fine-tune, with a new head where the classes differ, or make a new one; and its processor.

    Args:
        model_args (`ModelArguments`), data_args (`DataArguments`): Which model, and the sizes of images and windows.
        label_set (`LabelSet`): The classes.
        weights (`list[float]`, *optional*): Weights of the classes in the loss.

    Returns:
        `tuple[PreTrainedModel, SegmenterImageProcessor]`: The model, in training mode or not as it was loaded, and its
        processor.

    Raises:
        OSError: If the model cannot be found or read.
        ValueError: If it is damaged, or a field of its configuration is not possible.
    """
    labels = {
        "id2label": label_set.id2label,
        "label2id": label_set.label2id,
        "use_single_logit": label_set.num_labels == 1,
        "semantic_loss_ignore_index": label_set.ignore_index,
    }
    chosen = _chosen_fields(model_args, weights)
    pixels = _processor_fields(model_args, data_args, label_set)
    if model_args.model_name_or_path is not None:
        model = _load_model(model_args.model_name_or_path, model_args, labels, chosen)
        processor = _load_processor(model_args, model.config, pixels)
        return model, _with_channels(processor, model.config.num_channels)
    config = _new_config(model_args, data_args.crop_size, labels, chosen)
    model = AutoModelForSemanticSegmentation.from_config(config, attn_implementation=model_args.attn_implementation)
    config = model.config
    return model, _with_channels(_new_processor(config, pixels), config.num_channels)


def _new_processor(config: PreTrainedConfig, pixels: dict[str, Any]) -> SegmenterImageProcessor:
    return SegmenterImageProcessor(**{"patch_size": config.patch_size, "padding": config.padding} | pixels)


def _load_processor(
    model_args: ModelArguments, config: PreTrainedConfig, pixels: dict[str, Any]
) -> SegmenterImageProcessor:
    """The image processor of the model to start from; a new one where it has none and the normalization is given."""
    name = str(model_args.model_name_or_path)
    if model_args.normalization is not None and not has_processor(name):
        return _new_processor(config, pixels)
    choices = ", ".join([*NORMALIZATIONS, "dataset"])
    with translate_loading_errors(name):
        return load_processor(name, advice=f", or give `normalization` ({choices})", **pixels)


def _with_channels(processor: SegmenterImageProcessor, num_channels: int) -> SegmenterImageProcessor:
    """The processor with a mean and standard deviation for each channel of the model; 0.5 where it has others."""
    if processor.num_channels != num_channels:
        processor.image_mean, processor.image_std = [0.5] * num_channels, [0.5] * num_channels
    processor.do_convert_rgb = num_channels == 3
    return processor


def _chosen_fields(model_args: ModelArguments, weights: list[float] | None) -> dict[str, Any]:
    """Fields of the configuration that arguments of their own set."""
    chosen: dict[str, Any] = {
        "semantic_loss_class_weights": weights,
        "semantic_loss_label_smoothing": model_args.label_smoothing or 0.0,
        "semantic_loss_dice_weight": model_args.dice_weight or 0.0,
        "semantic_loss_focal_gamma": model_args.focal_gamma or 0.0,
        "semantic_loss_ohem_fraction": 1.0 if model_args.ohem_fraction is None else model_args.ohem_fraction,
        "semantic_loss_normalization": model_args.loss_normalization,
    }
    for name in ("decoder_type", "drop_path_rate"):
        if getattr(model_args, name) is not None:
            chosen[name] = getattr(model_args, name)
    return chosen


def _processor_fields(model_args: ModelArguments, data_args: DataArguments, label_set: LabelSet) -> dict[str, Any]:
    """Arguments of the image processor."""
    pixels: dict[str, Any] = {
        "size": {
            "shortest_edge": data_args.image_size,
            "longest_edge": int(data_args.max_ratio * data_args.image_size),
        },
        "window_size": data_args.crop_size,
        "window_stride": data_args.crop_size if data_args.window_stride is None else data_args.window_stride,
        "do_reduce_labels": label_set.reduce_labels,
    }
    if data_args.value_range is not None:
        pixels["value_range"] = data_args.value_range
    if model_args.patch_size is not None and model_args.model_name_or_path is not None:
        pixels["patch_size"] = model_args.patch_size
    if model_args.normalization in NORMALIZATIONS:
        pixels["image_mean"], pixels["image_std"] = NORMALIZATIONS[model_args.normalization]
    return pixels


def _load_model(
    name: str, model_args: ModelArguments, labels: dict[str, Any], chosen: dict[str, Any]
) -> PreTrainedModel:
    """Load the model to start from, whose encoder must be complete."""
    with translate_loading_errors(name):
        check_model_files(name)
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **labels)
        check_stored_config(name, config)
        chosen = chosen | parse_overrides(model_args.config_overrides, config)
        config = override_config(config, chosen)
        if model_args.token_merging:
            enable_token_merging(config)
        with without_loading_report():
            model, loading_info = AutoModelForSemanticSegmentation.from_pretrained(
                name,
                config=config,
                dtype=torch.float32,  # whatever the file has: updates would be rounded away in less
                trust_remote_code=False,
                patch_size=model_args.patch_size,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                attn_implementation=model_args.attn_implementation,
            )
        check_weights(name, model, loading_info, new_heads=True)
    if line := describe_new_weights(name, model, loading_info):
        logger.warning(line)
    return model


def describe_new_weights(name: str, model: PreTrainedModel, loading_info: dict[str, Any]) -> str | None:
    """Say in a line which weights start at random, because the file lacks them or has them for other classes.

    Args:
        name (`str`): What was loaded.
        model (`PreTrainedModel`): The model.
        loading_info (`dict`): What `from_pretrained` returned beside it with `output_loading_info=True`.

    Returns:
        `str`, *optional*: The line; nothing where all weights are from the file.
    """
    new = {*loading_info["missing_keys"], *(key for key, *_ in loading_info["mismatched_keys"])}
    parameters = {key: value.numel() for key, value in model.named_parameters() if key in new}
    if not parameters:
        return None
    parts = ", ".join(sorted({key.partition(".")[0] for key in parameters}))
    return f"{name}: the encoder is loaded; {sum(parameters.values())} weights of {parts} start at random."


def _new_config(
    model_args: ModelArguments, crop_size: int, labels: dict[str, Any], chosen: dict[str, Any]
) -> VitEncoderConfig:
    """Configuration of a new model of one of the named sizes."""
    logger.warning("No `model_name_or_path`: training from random weights.")
    width, layers, heads = MODEL_SIZES[model_args.model_size]
    config_class = CONFIGS[model_args.model_type]
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "image_size": crop_size,
    }
    if model_args.patch_size is not None:
        sizes["patch_size"] = model_args.patch_size
    overrides = parse_overrides(model_args.config_overrides, config_class())
    config = config_class(**sizes | chosen | overrides, **labels)
    if model_args.token_merging:
        enable_token_merging(config)
    return config


def parse_overrides(text: str, config: VitEncoderConfig) -> dict[str, Any]:
    """`"patch_size=8,out_indices=2/5/8/11"` to a dict, with the types that the fields have in a configuration.

    Raises:
        ValueError: If an item is not `name=value` or names no field.
    """
    overrides: dict[str, Any] = {}
    known = config.to_dict()
    annotations = {field.name: get_args(field.type) or (field.type,) for field in fields(config)}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, separator, value = item.partition("=")
        if not separator or name not in known:
            raise ValueError(
                f'Expected "field=value" with a field of {type(config).__name__} in `config_overrides`, got {item!r}.'
            )
        kind: Any = list if name == "out_indices" else type(known[name])  # it may be unset
        if kind is int and float in annotations.get(name, ()):
            kind = float  # a rate that is stored as 0
        try:
            if kind is bool:
                overrides[name] = {"true": True, "false": False}[value.lower()]
            else:
                overrides[name] = [int(item) for item in value.split("/")] if kind is list else kind(value)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"`{name}` in `config_overrides` must be a {kind.__name__}, got {value!r}.") from error
    return overrides


def override_config(config: VitEncoderConfig, overrides: dict[str, Any]) -> VitEncoderConfig:
    """A configuration with some fields replaced. With another decoder, fields that follow from it do so again."""
    kept = config.to_dict()
    if overrides.get("decoder_type", config.decoder_type) != config.decoder_type:
        follow = ("decoder_", "auxiliary_", "out_indices", "use_class_token")
        kept = {name: value for name, value in kept.items() if not name.startswith(follow)}
    return type(config)(**kept | overrides)
