"""Segment pictures: a label map and an overlay with a legend for each; or label a whole data set.

    python scripts/predict.py --model_name_or_path outputs/scenes --images street.jpg photos/ --output_dir outputs/predictions

`--full_resolution` segments pictures at their own size, which may be very large: windows are streamed.

Whole data sets, of the Hub or in folders of parquet files or pictures, are shared by several processes and become parquet or
PNG files. What is there already is not done again, so an interrupted run is continued by the same command:

    accelerate launch --num_processes 8 scripts/predict.py --model_name_or_path org/segmenter-vit-l-mask \
        --dataset_name org/photos --split train --output_dir outputs/photo_labels

Without GPUs accelerate starts one process only: `python -m torch.distributed.run --nproc_per_node 2 scripts/predict.py ...`.
"""

from dataclasses import dataclass, field
from typing import Literal

from transformers import HfArgumentParser

from ..inference.datasets import load_image_dataset, predict_dataset
from ..inference.predictor import MAX_IMAGE_PIXELS, predict_files, process_state
from ..utils.commands import command, parse_arguments
from .prediction_arguments import PredictionArguments


@dataclass
class Arguments:
    output_dir: str = field(metadata={"help": "Directory for the label maps and overlays."})
    images: list[str] | None = field(default=None, metadata={"help": "Pictures, and folders of pictures."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Instead of pictures, a data set: Hub name, folder or 'scenes'."}
    )
    split: str = field(default="train", metadata={"help": "Split of the data set."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub data set."})
    image_column: str = field(default="image", metadata={"help": "Column of the images of the data set."})
    streaming: bool = field(default=True, metadata={"help": "Read the data set as it is needed, not all at first."})
    output_format: Literal["parquet", "png"] = field(
        default="parquet", metadata={"help": "Files for the label maps of a data set."}
    )
    rows_per_file: int = field(
        default=500, metadata={"help": "Rows of a parquet file, and of what a process takes at once, PNG files too."}
    )
    with_images: bool = field(default=False, metadata={"help": "Put the images into the parquet files too."})
    overwrite: bool = field(
        default=False,
        metadata={"help": "Remove the label maps that an earlier run left in output_dir, and begin anew."},
    )
    full_resolution: bool = field(
        default=False, metadata={"help": "Keep the size of the pictures instead of resizing them for the model."}
    )
    max_image_pixels: int = field(
        default=MAX_IMAGE_PIXELS,
        metadata={"help": "Larger pictures are refused: files may be made to fill the memory."},
    )
    attention: bool = field(
        default=False, metadata={"help": "Write NAME_attention.png too: what the largest classes attend to."}
    )


@command()
def main() -> None:
    parser = HfArgumentParser((PredictionArguments, Arguments))
    prediction_args, args = parse_arguments(parser)
    if (args.images is None) == (args.dataset_name is None):
        parser.error("give either --images or --dataset_name")
    if args.attention and args.dataset_name is not None:
        parser.error("--attention is for --images only")
    model, processor, label_set = prediction_args.load_model()
    options = {
        **prediction_args.options,
        "full_resolution": args.full_resolution,
        "max_image_pixels": args.max_image_pixels,
    }
    if args.images is not None:
        written = predict_files(
            model, processor, args.images, args.output_dir, label_set, attention=args.attention, **options
        )
        print(f"Wrote a label map and an overlay of {len(written)} pictures to {args.output_dir}.")
        return
    dataset = load_image_dataset(
        args.dataset_name,
        args.split,
        dataset_config=args.dataset_config,
        revision=args.dataset_revision,
        image_column=args.image_column,
        streaming=args.streaming,
    )
    result = predict_dataset(
        model,
        processor,
        dataset,
        args.output_dir,
        label_set,
        split=args.split,
        source={
            "dataset": args.dataset_name,
            "dataset_config": args.dataset_config,
            "revision": args.dataset_revision,
            "image_column": args.image_column,
            "int8_weights": prediction_args.int8,
        },
        output_format=args.output_format,
        rows_per_file=args.rows_per_file,
        with_images=args.with_images,
        overwrite=args.overwrite,
        **options,
    )
    if process_state().is_main_process:
        print(result.describe())
        print(f"Written to {args.output_dir}.")
        result.raise_if_unreadable()
