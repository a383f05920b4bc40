"""Estimate the memory and time of a training from parameter and operation counts, before renting anything.

    segmenter-hf estimate --recipe segmenter_ade20k --model_size base --num_devices 8 --num_images 20210
    segmenter-hf estimate --recipe segmenter_ade20k --model_name_or_path facebook/dinov2-base --crop_size 504 --num_images 20210

Peaks in bfloat16 by NVIDIA's data sheets: 312 for an A100, 989 for an H100 or H200 (without sparsity). Two fifths of the peak
is a usual share for a ViT of this size. Nothing here is measured.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from ..conversion.pretrained import resolve_model
from ..data.label_sets import load_label_set
from ..models.configuration_vit_encoder import VitEncoderConfig
from ..training.arguments import resolve_batch_size
from ..training.estimates import estimate_training
from ..training.recipes import resolve_training_arguments
from ..training.run import build_model_and_processor
from .errors import cli_main
from .parsing import build_parser, parse_arguments


@dataclass
class Arguments:
    """Which training, on what devices."""

    _argument_group_name = "training and devices"

    recipe: str = field(metadata={"help": "Recipe whose training is estimated."})
    model_size: str | None = field(default=None, metadata={"help": "Size of the model, if not that of the recipe."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Encoder or model to start from, instead of a new model of a size."}
    )
    decoder_type: str | None = field(default=None, metadata={"help": "Decoder, if not that of the recipe."})
    crop_size: int | None = field(default=None, metadata={"help": "Side of the crops, if not that of the recipe."})
    num_images: int | None = field(
        default=None, metadata={"help": "Images of the training set, for recipes in epochs."}
    )
    num_devices: int = field(default=1, metadata={"help": "Devices that share the batch."})
    per_device_train_batch_size: int | None = field(default=None, metadata={"help": "Crops at once on a device."})
    peak_tflops: float = field(default=312.0, metadata={"help": "Peak of a device in bfloat16, 10^12 operations/s."})
    utilization: float = field(default=0.4, metadata={"help": "Share of the peak that is reached."})


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    """Print the estimate."""
    (args,) = parse_arguments(build_parser("estimate", __doc__, [Arguments]), argv)
    values = {"recipe": args.recipe, "output_dir": "", "use_cpu": True}
    for name in ("model_size", "decoder_type", "crop_size"):
        values |= {} if getattr(args, name) is None else {name: getattr(args, name)}
    if args.crop_size is not None:
        values["window_stride"] = args.crop_size
    model_args, data_args, training_args = resolve_training_arguments(values)
    if args.model_name_or_path is not None:
        model_args.model_name_or_path = resolve_model(args.model_name_or_path, model_args.model_type)
    model, _ = build_model_and_processor(model_args, data_args, load_label_set(data_args.label_set or "scenes"))
    total = training_args.total_batch_size or training_args.effective_batch_size
    per_device, accumulation = resolve_batch_size(total, args.num_devices, args.per_device_train_batch_size)
    steps = training_args.max_steps
    if steps < 1:
        if (args.num_images or 0) < 1:
            raise ValueError(f"{args.recipe} counts epochs: give the number of images with --num_images.")
        steps = math.ceil(training_args.num_train_epochs * args.num_images / total)
    estimate = estimate_training(
        cast(VitEncoderConfig, model.config),
        data_args.crop_size,
        steps=steps,
        per_device_batch_size=per_device,
        accumulation=accumulation,
        optimizer="adamw" if "adam" in training_args.optim else "sgd",
        peak_flops=args.peak_tflops * 1e12,
        utilization=args.utilization,
    )
    print(f"{estimate.parameters / 1e6:.1f} M parameters, {estimate.forward_flops / 1e9:.0f} GFLOPs per crop forward")
    print(f"{steps} steps of {total} = {args.num_devices} devices x {per_device} crops x {accumulation} accumulated")
    print(
        f"estimated memory per device {estimate.memory_bytes / 2**30:.1f} GiB, time {estimate.seconds / 3600:.1f} hours"
    )
