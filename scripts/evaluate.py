"""Evaluate a model with the published protocol.

    python scripts/evaluate.py --model_name_or_path outputs/scenes --dataset_name scenes --output_dir outputs/scenes_eval

`--multi_scale_flip` averages over six scales, each also mirrored, as the tables of the papers do. Several processes share the
images and give exactly the numbers of one:

    accelerate launch --num_processes 8 scripts/evaluate.py --model_name_or_path org/segmenter-vit-l-mask \
        --dataset_name ADEChallengeData2016 --label_set ade20k --output_dir outputs/ade20k
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its evaluate.py would hide the library of that name

import torch
from transformers import HfArgumentParser

from segmenter_hf.data import load_segmentation_datasets
from segmenter_hf.evaluation import (
    EvaluationExamples,
    as_percent,
    evaluate_segmentation,
    per_class_table,
    save_prediction_grid,
    save_results,
)
from segmenter_hf.prediction import load_model, process_state


@dataclass
class Arguments:
    model_name_or_path: str = field(metadata={"help": "Directory or Hub name of the model."})
    output_dir: str = field(metadata={"help": "Directory for results.json and the table of classes."})
    dataset_name: str = field(default="scenes", metadata={"help": "Hub name or folder."})
    split: str = field(default="validation", metadata={"help": "Split to evaluate."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub dataset."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str = field(default="annotation", metadata={"help": "Column of the label maps."})
    label_set: str | None = field(
        default=None, metadata={"help": "Name or JSON file; says how stored labels map to the model's classes."}
    )
    max_samples: int | None = field(default=None, metadata={"help": "Evaluate the first so many images only."})
    multi_scale_flip: bool = field(default=False, metadata={"help": "Average over six scales, each also mirrored."})
    scales: list[float] | None = field(default=None, metadata={"help": "Average over these scales instead."})
    num_worst: int = field(default=4, metadata={"help": "Show so many images of the lowest mean IoU in worst.png."})
    window_batch_size: int = field(default=8, metadata={"help": "Windows at once through the network."})
    device: str | None = field(default=None, metadata={"help": "Device of the model; a GPU where there is one."})
    bf16: bool = field(default=False, metadata={"help": "Weights and arithmetic in bfloat16: approximate, faster."})
    int8: bool = field(default=False, metadata={"help": "Weights in 8 bits: approximate, less memory. Needs torchao."})
    compile: bool = field(default=False, metadata={"help": "Compile the network first; pays for many images."})


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    model, processor, label_set = load_model(
        args.model_name_or_path,
        args.label_set,
        args.device,
        dtype=torch.bfloat16 if args.bf16 else torch.float32,
        int8=args.int8,
        compile=args.compile,
    )
    dataset = load_segmentation_datasets(
        args.dataset_name,
        splits=[args.split],
        dataset_config=args.dataset_config,
        revision=args.dataset_revision,
        image_column=args.image_column,
        label_column=args.label_column,
    )[args.split]
    dataset = dataset.select(range(min(args.max_samples or len(dataset), len(dataset))))
    results = evaluate_segmentation(
        model,
        processor,
        dataset,
        label_set,
        multi_scale_flip=args.multi_scale_flip,
        scales=args.scales,
        window_batch_size=args.window_batch_size,
        num_worst=args.num_worst,
    )
    if not process_state().is_main_process:
        return
    results = {**results, "dataset": args.dataset_name, "split": args.split, "model": args.model_name_or_path}
    results |= {"dtype": str(model.dtype).removeprefix("torch."), "int8_weights": args.int8}
    save_results(args.output_dir, results, label_set.labels)
    if args.num_worst:
        save_prediction_grid(
            model,
            processor,
            EvaluationExamples(dataset, label_set),
            label_set,
            Path(args.output_dir) / "worst.png",
            indices=[image["index"] for image in results["worst_images"]],
            multi_scale_flip=args.multi_scale_flip,
            scales=args.scales,
            window_batch_size=args.window_batch_size,
        )
    print(per_class_table(results, label_set.labels))
    print(
        f"Mean IoU {as_percent(results['mean_iou'])}, {results['protocol']['name']}, {results['num_images']} images."
    )
    print(f"Written to {args.output_dir}: results.json, per_class.md{', worst.png' if args.num_worst else ''}.")


if __name__ == "__main__":
    main()
