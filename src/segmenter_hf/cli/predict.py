r"""Segment images: a label map and an overlay with a legend for each; or label a whole dataset.

    segmenter-hf predict --model_name_or_path outputs/scenes --images street.jpg photos/ --output_dir outputs/predictions

`--full_resolution` segments images at their own size, which may be very large: windows are streamed.

Whole datasets, of the Hub or in folders of parquet files or images, are shared by several processes and become parquet or
PNG files. What is there already is not done again, so an interrupted run is continued by the same command:

    accelerate launch --num_processes 8 -m segmenter_hf predict --model_name_or_path org/segmenter-vit-l-mask \
        --dataset_name org/photos --split train --output_dir outputs/photo_labels

Without GPUs accelerate starts one process only: `torchrun --nproc_per_node 2 -m segmenter_hf predict ...`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..data.image_loading import load_image_dataset
from ..inference.dataset_files import OutputLayout
from ..inference.datasets import predict_dataset
from ..inference.files import SAMPLE_IMAGE, predict_files
from ..inference.protocol import MAX_IMAGE_PIXELS
from ..inference.pseudo_labels import ConfidenceRule
from ..utils.processes import process_state
from .errors import cli_main
from .parsing import build_parser, parse_arguments
from .prediction_arguments import PredictionArguments
from .remembered import recall_data_arguments


# What is taken from the recipe of the model where the command line says nothing.
DATA_ARGUMENTS = (
    "dataset_config",
    "dataset_revision",
    "image_column",
    "label_column",
    "validation_fraction",
    "data_seed",
)


@dataclass
class InputArguments:
    """What to segment: images, or a dataset."""

    _argument_group_name = "input"

    images: list[str] | None = field(
        default=None, metadata={"help": "Images, and folders of images. By default a sample image."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Instead of images, a dataset: Hub name, folder or 'scenes'."}
    )
    split: str = field(default="train", metadata={"help": "Split of the dataset."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub dataset."})
    image_column: str | None = field(
        default=None, metadata={"help": "Column of the images of the dataset. By default it is found."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column of its masks, where a share of train is the validation split."}
    )
    validation_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Share of train that is the validation split; train is the rest. For the dataset of the training as there "
            "by default; 0 for none."
        },
    )
    data_seed: int | None = field(
        default=None, metadata={"help": "Seed of that split, as in the training by default."}
    )
    streaming: bool = field(default=True, metadata={"help": "Read the dataset as it is needed, not all at first."})
    full_resolution: bool = field(
        default=False, metadata={"help": "Keep the size of the images instead of resizing them for the model."}
    )
    max_image_pixels: int = field(
        default=MAX_IMAGE_PIXELS,
        metadata={"help": "Larger images are refused: files may be made to fill the memory."},
    )


@dataclass
class OutputArguments:
    """Where the label maps go, and in what form."""

    _argument_group_name = "output"

    output_dir: str = field(metadata={"help": "Directory for the label maps and overlays."})
    attention: bool = field(
        default=False, metadata={"help": "Write NAME_attention.png too: what the largest classes attend to."}
    )
    vectorize: bool = field(
        default=False, metadata={"help": "Write NAME.geojson too: the regions of a georeferenced scene as polygons."}
    )
    output_format: Literal["parquet", "png"] = field(
        default="parquet", metadata={"help": "Files for the label maps of a dataset."}
    )
    rows_per_file: int = field(
        default=500, metadata={"help": "Rows of a parquet file, and of what a process takes at once, PNG files too."}
    )
    with_images: bool = field(default=False, metadata={"help": "Put the images into the parquet files too."})
    min_confidence: float | None = field(
        default=None,
        metadata={
            "help": "Write the ignore index where the probability of the class is lower, as 0.9; with a dataset, images are "
            "written too, so that it can be trained on."
        },
    )
    min_class_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Of the pixels of each class in the dataset at least this share keeps it, the surest ones; with "
            "min_confidence, pixels keep their class where either says so. Takes a second pass."
        },
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "Remove the label maps that an earlier run left in output_dir, and begin again."},
    )


def _output_layout(split: str, args: OutputArguments) -> OutputLayout:
    """How the label maps of a dataset are stored; pseudo-labels in parquet files with their images."""
    chosen = (args.min_confidence, args.min_class_fraction)
    confidence = None if chosen == (None, None) else ConfidenceRule(*chosen)
    with_images = args.with_images or (confidence is not None and args.output_format == "parquet")
    return OutputLayout(split, args.output_format, args.rows_per_file, with_images, confidence)


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    """Segment what the command line names."""
    parser = build_parser("predict", __doc__, [PredictionArguments, InputArguments, OutputArguments])
    prediction_args, input_args, output_args = parse_arguments(parser, argv)
    if input_args.images is not None and input_args.dataset_name is not None:
        parser.error("give either --images or --dataset_name")
    if input_args.images is None and input_args.dataset_name is None:
        print("Neither --images nor --dataset_name is given: segmenting the sample image of the package.")
        input_args.images = [str(SAMPLE_IMAGE)]
    if output_args.attention and input_args.dataset_name is not None:
        parser.error("--attention is for --images only")
    if output_args.min_class_fraction is not None and input_args.images is not None:
        parser.error("--min_class_fraction looks at a whole dataset: give --dataset_name, or --min_confidence alone")
    predictor = prediction_args.load_predictor(
        full_resolution=input_args.full_resolution, max_image_pixels=input_args.max_image_pixels
    )
    output_dir = output_args.output_dir
    if input_args.images is not None:
        written = predict_files(
            predictor,
            input_args.images,
            output_dir,
            attention=output_args.attention,
            vectorize=output_args.vectorize,
            min_confidence=output_args.min_confidence,
        )
        print(f"Wrote the label maps of {len(written)} images to {output_dir}.")
        return
    recall_data_arguments(prediction_args.model_name_or_path, input_args.dataset_name, input_args, *DATA_ARGUMENTS)
    dataset = load_image_dataset(
        input_args.dataset_name,
        input_args.split,
        dataset_config=input_args.dataset_config,
        revision=input_args.dataset_revision,
        image_column=input_args.image_column,
        label_column=input_args.label_column,
        validation_fraction=input_args.validation_fraction,
        data_seed=input_args.data_seed or 0,
        streaming=input_args.streaming,
    )
    result = predict_dataset(
        predictor,
        dataset,
        output_dir,
        _output_layout(input_args.split, output_args),
        source={
            "dataset": input_args.dataset_name,
            "dataset_config": input_args.dataset_config,
            "revision": input_args.dataset_revision,
            "image_column": input_args.image_column,
            "validation_fraction": input_args.validation_fraction,
            "data_seed": input_args.data_seed,
            "int8_weights": prediction_args.int8,
        },
        overwrite=output_args.overwrite,
    )
    if process_state().is_main_process:
        print(result.describe())
        print(f"Written to {output_dir}.")
        result.raise_if_unreadable()
