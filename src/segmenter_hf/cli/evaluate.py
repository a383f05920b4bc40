r"""Evaluate a model with the published protocol.

    segmenter-hf evaluate --model_name_or_path outputs/scenes --dataset_name scenes --output_dir outputs/scenes_eval

`--multi_scale_flip` averages over six scales, each also mirrored, as the tables of the papers do. Several processes share the
images and give exactly the numbers of one:

    accelerate launch --num_processes 8 -m segmenter_hf evaluate --model_name_or_path org/segmenter-vit-l-mask \
        --dataset_name ADEChallengeData2016 --label_set ade20k --output_dir outputs/ade20k
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..data.label_resolution import fit_changed_to_masks
from ..data.label_sets import load_label_set
from ..data.loading import limited_split, load_split
from ..evaluation.evaluate import (
    EvaluationDataset,
    as_percent,
    evaluate_segmentation,
    per_class_table,
    save_prediction_grid,
    save_results,
)
from ..hub.model_card import hub_name
from ..utils.processes import process_state
from .errors import cli_main
from .parsing import build_parser, parse_arguments
from .prediction_arguments import EvaluationDataArguments, PredictionArguments
from .remembered import recall_data_arguments, recall_label_changes


@dataclass
class Arguments:
    """On what dataset, and where to."""

    _argument_group_name = "dataset and output"

    output_dir: str = field(metadata={"help": "Directory for results.json and the table of classes."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub name or folder; by default that of the training."}
    )
    ignore_index: int | None = field(
        default=None, metadata={"help": "Label of pixels without a class; by default that of the model's label set."}
    )
    num_worst: int = field(default=4, metadata={"help": "Show so many images of the lowest mean IoU in worst.png."})


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate the model, write the results and print the table."""
    parser = build_parser("evaluate", __doc__, [PredictionArguments, Arguments, EvaluationDataArguments])
    prediction_args, args, data_args = parse_arguments(parser, argv)
    args.dataset_name = recall_data_arguments(
        prediction_args.model_name_or_path, args.dataset_name, data_args, *vars(data_args)
    )
    data_args.split = data_args.split or "validation"
    predictor = prediction_args.load_predictor()
    if args.dataset_name is None:
        if predictor.label_set.labels != load_label_set("scenes").labels:
            parser.error("nothing beside the model says what it was trained on: give --dataset_name")
        args.dataset_name = "scenes"
    dataset = load_split(args.dataset_name, **vars(data_args))
    changes = recall_label_changes(prediction_args.model_name_or_path, prediction_args.label_set)
    if args.ignore_index is not None:
        changes["ignore_index"] = args.ignore_index
    predictor.label_set = label_set = fit_changed_to_masks(predictor.label_set, dataset, changes)
    results = evaluate_segmentation(predictor, dataset, num_worst=args.num_worst)
    if not process_state().is_main_process:
        return
    results |= {
        "dataset": args.dataset_name,
        "hub_dataset": hub_name(args.dataset_name),
        "split": limited_split(data_args.split, data_args.max_samples),
        "model": prediction_args.model_name_or_path,
        **predictor.describe_network(),
        "int8_weights": prediction_args.int8,
        "token_merging": prediction_args.token_merging or prediction_args.token_merging_threshold is not None,
    }
    save_results(args.output_dir, results, label_set.labels)
    grid = Path(args.output_dir, "worst.png")
    grid.unlink(missing_ok=True)  # of an earlier run
    if args.num_worst:
        save_prediction_grid(
            predictor,
            EvaluationDataset(dataset, label_set, predictor.processor.num_channels),
            grid,
            indices=[image["index"] for image in results["worst_images"]],
        )
    print(per_class_table(results, label_set.labels))
    print(
        f"Mean IoU {as_percent(results['mean_iou'])}, {results['protocol']['name']}, {results['num_images']} images of "
        f"{args.dataset_name}."
    )
    print(f"Written to {args.output_dir}: results.json, per_class.md{', worst.png' if args.num_worst else ''}.")
