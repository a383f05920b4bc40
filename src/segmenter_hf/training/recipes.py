"""Recipes: named values of the arguments of training, those of the papers among them."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_type_hints

from transformers import HfArgumentParser

from ..utils.atomic_files import check_types, read_json_object, write_json
from ..utils.commands import parse_arguments
from .arguments import DataArguments, ModelArguments, SegmentationTrainingArguments


RECIPES = Path(__file__).parent / "recipes.json"
RECIPE_FILE = "recipe.json"  # beside a model: the arguments that it was trained with
ARGUMENTS = (ModelArguments, DataArguments, SegmentationTrainingArguments)
# The arguments of Trainer that make a run what it is; the others say where it is written, how it is shown, on what it runs.
TRAINER_ARGUMENTS = (
    "num_train_epochs",
    "max_steps",
    "optim",
    "optim_args",
    "learning_rate",
    "head_learning_rate_factor",
    "lr_scheduler_type",
    "poly_power",
    "min_learning_rate",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "bf16",
    "fp16",
    "seed",
    "data_seed",
    "eval_strategy",
    "eval_steps",
    "save_strategy",
    "save_steps",
    "load_best_model_at_end",
    "metric_for_best_model",
)
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
NOT_OF_THE_RUN = ("recipe", "max_scanned_masks", "window_batch_size")


@cache
def load_recipes() -> dict[str, dict[str, Any]]:
    """The recipes by name: `description`, `source`, and `arguments`, the values of the arguments of training."""
    return json.loads(RECIPES.read_text(encoding="utf-8"))["recipes"]


def recipe_arguments(name: str) -> dict[str, Any]:
    """The values of a recipe, by the name of the argument.

    Raises:
        ValueError: If there is no such recipe.
    """
    recipes = load_recipes()
    if name not in recipes:
        raise ValueError(f"There is no recipe {name!r}, only {', '.join(recipes)}.")
    return recipes[name]["arguments"]


def parse_training_arguments(
    words: Sequence[str],
) -> tuple[ModelArguments, DataArguments, SegmentationTrainingArguments]:
    """The arguments of a command line, over those of a JSON file, over those of a recipe, over the defaults.

    Args:
        words (`Sequence[str]`): The command line. The first word may be a JSON file of arguments, such as the `recipe.json` of
            another run.

    Returns:
        `tuple[ModelArguments, DataArguments, SegmentationTrainingArguments]`: The arguments.

    Raises:
        ValueError: If the recipe, an option or an argument in the file is not known, or one in the file is of another type.
    """
    words, from_file = list(words), {}
    if words and words[0].endswith(".json"):
        from_file = read_arguments(words.pop(0))
    only_recipe = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_recipe.add_argument("--recipe", default=from_file.get("recipe"))
    name = only_recipe.parse_known_args(words)[0].recipe
    parser = argument_parser(show_all="--help_all" in words)
    parser.set_defaults(**({} if name is None else recipe_arguments(name)) | from_file)
    return parse_arguments(parser, words)


def read_arguments(path: str | Path) -> dict[str, Any]:
    """Read a JSON file of arguments of training, such as a `recipe.json`.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it does not hold arguments of training with values of their types; names the file.
    """
    content = read_json_object(path)
    check_types(path, content, {"arguments": dict})
    arguments = content.get("arguments", content)
    types: dict[str, Any] = {}
    for each in ARGUMENTS:
        types |= get_type_hints(each)
        chosen = [field for field in fields(each) if "choices" in field.metadata]
        types |= {field.name: Literal[(*field.metadata["choices"], field.default)] for field in chosen}
    if wrong := sorted(arguments.keys() - types):
        raise ValueError(f"{path} has arguments that training does not know: {', '.join(wrong)}.")
    check_types(path, arguments, types)
    return arguments


def argument_parser(show_all: bool = False) -> HfArgumentParser:
    """The parser of all arguments, whose help is in groups and leaves out those of Trainer that are seldom used here.

    Args:
        show_all (`bool`, defaults to `False`): Whether the help has all arguments of Trainer.
    """
    parser = HfArgumentParser(
        ARGUMENTS,
        usage="%(prog)s [FILE.json] [--recipe NAME] --output_dir DIR [argument ...]",
        description="Fine-tune a Segmenter or SETR with Trainer, by a recipe or by your own arguments.",
        epilog="Boolean arguments take true or false. Every other argument of transformers.TrainingArguments works too: "
        "--help_all lists them.",
        formatter_class=_ShortHelp,
    )
    unkept = {"dest": argparse.SUPPRESS, "default": argparse.SUPPRESS}
    parser.add_argument("--help_all", action="help", help="show all arguments of Trainer too and exit", **unkept)
    parser.add_argument("--list_recipes", action=_ListRecipes, nargs=0, help="print the recipes and exit", **unkept)
    groups = {
        "model": [field.name for field in fields(ModelArguments)],
        "data": [field.name for field in fields(DataArguments)],
        "training": [*TRAINER_ARGUMENTS, *OFTEN_USED],
    }
    if show_all:
        groups["training"] += [field.name for field in fields(SegmentationTrainingArguments)]
    positive = [action for action in parser._actions if not action.option_strings[0].startswith("--no_")]
    for title, names in groups.items():
        section = parser.add_argument_group(title)
        section._group_actions += [action for action in positive if action.dest in names]
    parser._optionals._group_actions = [
        action for action in parser._actions if action.dest in ("help", argparse.SUPPRESS)
    ]
    return parser


class _ShortHelp(argparse.HelpFormatter):
    """One spelling of each argument, what kind of value it takes, and its default where there is one to tell."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.nargs == 0:
            return ", ".join(action.option_strings)
        kinds = {int: "N", float: "X", str: "TEXT"}
        value = kinds.get(action.type, "VALUE")
        if action.choices and len(action.choices) < 10:
            value = "{" + ",".join(map(str, action.choices)) + "}"
        return f"{action.option_strings[0]} {'true|false' if isinstance(action.default, bool) else value}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = (action.help or "").strip()
        shows_default = action.default not in (None, "", argparse.SUPPRESS) and action.nargs != 0
        return f"{text} (default: {str(action.default).replace('%', '%%')})" if shows_default else text


class _ListRecipes(argparse.Action):
    """Prints the recipes and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        for name, recipe in load_recipes().items():
            print(f"{name:<28} {recipe['description']} ({recipe['source']})")
        parser.exit()


def resolved_recipe(
    model_args: ModelArguments, data_args: DataArguments, training_args: SegmentationTrainingArguments
) -> dict[str, Any]:
    """Everything that makes a run what it is, as it will be. `scripts/train.py` takes the file of it as arguments.

    Returns:
        `dict`: `recipe` (its name, if any), `arguments`, and `batch`: how the effective batch is put together, from
        `devices`, `per_device` and `accumulation`.
    """
    values = asdict(model_args) | asdict(data_args)
    values |= {name: getattr(training_args, name) for name in TRAINER_ARGUMENTS}
    values["total_batch_size"] = training_args.effective_batch_size
    values = json.loads(
        json.dumps(values, default=lambda value: getattr(value, "value", str(value)))
    )  # enums to strings
    batch = {
        "devices": training_args.num_devices,
        "per_device": training_args.per_device_train_batch_size,
        "accumulation": training_args.gradient_accumulation_steps,
    }
    arguments = {name: value for name, value in values.items() if name not in NOT_OF_THE_RUN}
    return {"recipe": data_args.recipe, "arguments": arguments, "batch": batch}


def save_recipe(directory: str | Path, recipe: dict[str, Any]) -> None:
    """Write `recipe.json` into the directory of a run."""
    write_json(Path(directory) / RECIPE_FILE, recipe)


def check_same_run(directory: str | Path, recipe: dict[str, Any]) -> None:
    """What a directory was trained with is what is about to be trained there again.

    Raises:
        ValueError: If arguments that matter differ, which it names, or the directory's recipe is not one.
    """
    path = Path(directory) / RECIPE_FILE
    before, now = read_json_object(path).get("arguments"), recipe["arguments"]
    if not isinstance(before, dict):
        raise ValueError(f"{path}: expected the arguments of a run, got {before!r:.200}. Give another --output_dir.")
    differing = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if differing:
        shown = ", ".join(f"{name} {before.get(name)} -> {now.get(name)}" for name in differing[:5])
        raise ValueError(
            f"{directory} holds a run with other arguments ({shown}). Give another --output_dir, or --overwrite_output_dir "
            "to delete its checkpoints and start anew."
        )
