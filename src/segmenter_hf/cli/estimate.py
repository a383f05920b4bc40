"""Estimate the memory and time of a training from parameter and operation counts, before renting anything.

    python scripts/estimate.py --recipe segmenter_ade20k --model_size base --num_devices 8 --num_images 20210

Peaks in bfloat16 by NVIDIA's data sheets: 312 for an A100, 989 for an H100 or H200 (without sparsity). Two fifths of the peak
is a usual share for a ViT of this size. Nothing here is measured.
"""

import math
from dataclasses import dataclass, field

from transformers import HfArgumentParser

from ..data.label_sets import load_label_set
from ..training.arguments import resolve_batch_size
from ..training.estimates import estimate_training
from ..training.recipes import parse_training_arguments
from ..training.run import build_model_and_processor
from ..utils.commands import command, parse_arguments


@dataclass
class Arguments:
    recipe: str = field(metadata={"help": "Recipe whose training is estimated."})
    model_size: str | None = field(default=None, metadata={"help": "Size of the model, if not that of the recipe."})
    num_images: int | None = field(
        default=None, metadata={"help": "Images of the training set, for recipes in epochs."}
    )
    num_devices: int = field(default=1, metadata={"help": "Devices that share the batch."})
    per_device_train_batch_size: int | None = field(default=None, metadata={"help": "Crops at once on a device."})
    peak_tflops: float = field(default=312.0, metadata={"help": "Peak of a device in bfloat16, 10^12 operations/s."})
    utilization: float = field(default=0.4, metadata={"help": "Share of the peak that is reached."})


@command()
def main() -> None:
    (args,) = parse_arguments(HfArgumentParser(Arguments))
    words = ["--recipe", args.recipe, "--output_dir", "", "--use_cpu"]
    words += ["--model_size", args.model_size] if args.model_size else []
    model_args, data_args, training_args = parse_training_arguments(words)
    model, _ = build_model_and_processor(model_args, data_args, load_label_set(data_args.label_set or "scenes"))
    total = training_args.total_batch_size
    per_device, accumulation = resolve_batch_size(total, args.num_devices, args.per_device_train_batch_size)
    steps = training_args.max_steps
    if steps < 1:
        if (args.num_images or 0) < 1:
            raise ValueError(f"{args.recipe} counts epochs: give the number of images with --num_images.")
        steps = math.ceil(training_args.num_train_epochs * args.num_images / total)
    estimate = estimate_training(
        model.config,
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
