r"""Fine-tune a Segmenter with Trainer, on the embedded street scenes or on your own images.

    segmenter-hf train --output_dir outputs/scenes --model_size tiny --crop_size 128 --image_size 192

On a folder with `images/train`, `masks/train`, `images/validation` and `masks/validation`:

    segmenter-hf train --dataset_name my_photos --label_set my_labels.json --output_dir outputs/my_model \
        --model_name_or_path org/segmenter-vit-b-mask

`--model_name_or_path` is also any encoder to start from: a checkpoint file of timm, DeiT, AugReg or mmsegmentation, or a
ViT on the Hub, as in `--model_name_or_path timm/vit_base_patch16_384.augreg_in21k_ft_in1k`. It is converted once.

The recipes of the papers, and two small ones, set all arguments; any of them can be replaced. `--list_recipes` lists them:

    segmenter-hf train --recipe segmenter_ade20k --model_name_or_path timm/vit_base_patch16_384.augreg_in21k_ft_in1k \
        --output_dir outputs/segmenter-b-ade20k --per_device_train_batch_size 2

A JSON file of arguments may come first, such as the `recipe.json` of an earlier run:

    segmenter-hf train outputs/scenes/recipe.json --output_dir outputs/scenes_again --seed 1

A run that was interrupted resumes from its last checkpoint with the same command; SIGTERM (Slurm, Kubernetes) ends it with
a checkpoint. `accelerate launch -m segmenter_hf train ...`,
with one of `scripts/configs/*.yaml`, trains on several GPUs or machines. Boolean options take true or false. Every other
argument of `TrainingArguments` works too: `--help_all` lists them.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from transformers import HfArgumentParser

from ..conversion.pretrained import resolve_model
from ..evaluation.evaluate import as_percent
from ..training.arguments import DataArguments, ModelArguments, SegmentationTrainingArguments
from ..training.recipes import (
    ARGUMENTS,
    TRAINER_ARGUMENTS,
    load_recipes,
    read_arguments,
    recipe_arguments,
)
from ..training.run import TrainingTerminated, train_segmenter
from .errors import Terminated, UsageError, cli_main
from .parsing import build_parser, parse_arguments


# Arguments of Trainer that the help has beside those of a recipe; the others are in that of `--help_all`.
OFTEN_USED = (
    "output_dir",
    "total_batch_size",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "save_total_limit",
    "logging_steps",
    "report_to",
    "disable_tqdm",
    "dataloader_num_workers",
    "train_sampling_strategy",
    "torch_compile",
    "use_cpu",
    "full_determinism",
    "push_to_hub",
    "hub_model_id",
)


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    """Train what the command line says, and print the result and what to do with it."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv:
        parser = training_parser()
        parser.print_usage(sys.stderr)
        raise UsageError(
            "give at least --output_dir DIR: without a dataset the model is trained on synthetic street scenes; see --help"
        )
    model_args, data_args, training_args = parse_training_arguments(argv)
    if model_args.model_name_or_path is not None:
        model_args.model_name_or_path = resolve_model(model_args.model_name_or_path, model_args.model_type)
    try:
        results = train_segmenter(model_args, data_args, training_args)
    except TrainingTerminated as terminated:
        raise Terminated(describe_resumption(terminated, training_args)) from terminated
    if not training_args.should_save:
        return
    print(f"Mean IoU {as_percent(results['mean_iou'])} on {results['num_images']} images, single scale.")
    print(f"Model, card and images are in {training_args.output_dir}. Next:")
    print(f"  segmenter-hf predict --model_name_or_path {training_args.output_dir} --images IMAGE --output_dir OUT")


def describe_resumption(terminated: TrainingTerminated, training_args: SegmentationTrainingArguments) -> str:
    """Say where a training that was told to end has its checkpoint, and how to resume from it."""
    names = ("overwrite_output_dir", "resume_from_checkpoint")
    without = " and ".join(f"`--{name}`" for name in names if getattr(training_args, name))
    command = "the same command" + (f" without {without}" if without else "")
    return f"terminated: step {terminated.step} is saved in {terminated.checkpoint}; run {command} to resume"


def parse_training_arguments(
    argv: Sequence[str],
) -> tuple[ModelArguments, DataArguments, SegmentationTrainingArguments]:
    """The arguments of a command line, over those of a JSON file, over those of a recipe, over the defaults.

    Args:
        argv (`Sequence[str]`): The command line. It may start with a JSON file of arguments, such as the `recipe.json` of
            another run.

    Returns:
        `tuple[ModelArguments, DataArguments, SegmentationTrainingArguments]`: The arguments.

    Raises:
        ValueError: If the recipe, an option or an argument in the file is not known, or one in the file is of another type.
    """
    argv, from_file = list(argv), {}
    if argv and argv[0].endswith(".json"):
        from_file = read_arguments(argv.pop(0))
    only_recipe = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_recipe.add_argument("--recipe", default=from_file.get("recipe"))
    name = only_recipe.parse_known_args(argv)[0].recipe
    parser = training_parser(show_all="--help_all" in argv)
    defaults = ({} if name is None else recipe_arguments(name, bool(from_file.get("use_cpu")))) | from_file
    parser.set_defaults(**defaults)
    for action in parser._actions:
        action.required = action.dest == "output_dir" and "output_dir" not in defaults
    return parse_arguments(parser, argv)


def training_parser(show_all: bool = False) -> HfArgumentParser:
    """The parser of all arguments, whose help leaves out those of Trainer that are seldom used here.

    Args:
        show_all (`bool`, defaults to `False`): Whether the help has all arguments of Trainer.
    """
    usage = "%(prog)s [FILE.json] [--recipe NAME] --output_dir DIR [option ...]"
    parser = build_parser("train", __doc__, ARGUMENTS, usage=usage)
    unkept: dict[str, Any] = {"dest": argparse.SUPPRESS, "default": argparse.SUPPRESS}
    parser.add_argument("--help_all", action="help", help="show all arguments of Trainer too and exit", **unkept)
    parser.add_argument("--list_recipes", action=_ListRecipes, nargs=0, help="print the recipes and exit", **unkept)
    if not show_all:
        seldom_used = {field.name for field in fields(SegmentationTrainingArguments)}.difference(
            TRAINER_ARGUMENTS, OFTEN_USED
        )
        for action in parser._actions:
            if action.dest in seldom_used:
                action.help = argparse.SUPPRESS
    return parser


class _ListRecipes(argparse.Action):
    """Prints the recipes and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        for name, recipe in load_recipes().items():
            print(f"{name:<28} {recipe['description']} ({recipe['source']})")
        parser.exit()
