"""Recipes: named values of the arguments of training, those of the papers among them."""

import json
import logging
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_type_hints

from ..inference.model_files import RECIPE_FILE
from ..utils.atomic_files import write_json
from ..utils.hardware import accelerator_type, has_fast_bfloat16
from ..utils.json_files import check_types, read_json_object
from .arguments import DataArguments, ModelArguments, SegmentationTrainingArguments


logger = logging.getLogger(__name__)

RECIPES = Path(__file__).parent / "recipes.json"
ARGUMENTS = (ModelArguments, DataArguments, SegmentationTrainingArguments)
# The arguments of Trainer that make a run what it is; the others say where it is written, how it is shown, on what it runs.
TRAINER_ARGUMENTS = (
    "num_train_epochs",
    "max_steps",
    "optim",
    "optim_args",
    "learning_rate",
    "head_learning_rate_factor",
    "layer_decay",
    "freeze_encoder",
    "unfreeze_at_step",
    "cache_feature_epochs",
    "ema_decay",
    "early_stopping_patience",
    "decoder_warm_start",
    "warm_start_crops",
    "lora_rank",
    "lora_alpha",
    "lora_targets",
    "lr_scheduler_type",
    "poly_power",
    "min_learning_rate",
    "lr_scheduler_kwargs",
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
NOT_OF_THE_RUN = ("recipe", "max_scanned_masks", "window_batch_size")


@cache
def load_recipes() -> dict[str, dict[str, Any]]:
    """The recipes by name: `description`, `source`, and `arguments`, the values of the arguments of training."""
    return read_json_object(RECIPES)["recipes"]


def recipe_arguments(name: str, use_cpu: bool = False) -> dict[str, Any]:
    """The values of a recipe, by the name of the argument.

    A recipe in bfloat16 is one in float32 on a device that only emulates bfloat16; a line says so.

    Args:
        name (`str`): Name of the recipe.
        use_cpu (`bool`, defaults to `False`): Whether the training stays on the CPU where there is a GPU.

    Raises:
        ValueError: If there is no such recipe.
    """
    recipes = load_recipes()
    if name not in recipes:
        raise ValueError(f"There is no recipe {name!r}, only {', '.join(recipes)}.")
    arguments = recipes[name]["arguments"]
    if arguments.get("bf16") and not has_fast_bfloat16((None if use_cpu else accelerator_type()) or "cpu"):
        logger.warning("Recipe %s: float32 in place of bfloat16, which this machine only emulates.", name)
        return {**arguments, "bf16": False}
    return arguments


def resolve_training_arguments(
    values: Mapping[str, Any],
) -> tuple[ModelArguments, DataArguments, SegmentationTrainingArguments]:
    """The arguments of training from values by name, over those of the recipe among them, over the defaults.

    Args:
        values (`Mapping[str, Any]`): The values, such as those of [`read_arguments`].

    Returns:
        `tuple[ModelArguments, DataArguments, SegmentationTrainingArguments]`: The arguments.

    Raises:
        ValueError: If there is no such recipe, or a name is no argument of training.
    """
    name = values.get("recipe")
    values = {**({} if name is None else recipe_arguments(name, bool(values.get("use_cpu")))), **values}
    known = {field.name: each for each in ARGUMENTS for field in fields(each)}
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"Training has no arguments {', '.join(unknown)}.")
    return tuple(  # type: ignore[return-value]
        each(**{name: value for name, value in values.items() if known[name] is each}) for each in ARGUMENTS
    )


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


def resolved_recipe(
    model_args: ModelArguments, data_args: DataArguments, training_args: SegmentationTrainingArguments
) -> dict[str, Any]:
    """Everything that makes a run what it is, as it will be. [`read_arguments`] reads the file of it.

    Returns:
        `dict`: `recipe` (its name, if any), `arguments`, and `batch`: how the effective batch is put together, from
        `devices`, `per_device` and `accumulation`.
    """
    values = asdict(model_args) | asdict(data_args)
    values |= {name: getattr(training_args, name) for name in TRAINER_ARGUMENTS}
    values["total_batch_size"] = training_args.effective_batch_size
    if values["lr_scheduler_kwargs"] == training_args.polynomial_shape:
        values["lr_scheduler_kwargs"] = None  # as the other arguments say
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


def _defaults() -> dict[str, Any]:
    """The defaults of the arguments that have a plain one."""
    known = (field for each in ARGUMENTS for field in fields(each))
    return {field.name: field.default for field in known if field.default is not MISSING}


def check_same_run(directory: str | Path, recipe: dict[str, Any]) -> None:
    """What a directory was trained with is what is about to be trained there again.

    Raises:
        ValueError: If arguments that matter differ, which it names, or the directory's recipe is not one.
    """
    path = Path(directory) / RECIPE_FILE
    before, now = read_json_object(path).get("arguments"), recipe["arguments"]
    if not isinstance(before, dict):
        raise ValueError(f"{path}: expected the arguments of a run, got {before!r:.200}. Give another `output_dir`.")
    before = _defaults() | before  # a run of an earlier version does not name the arguments that it did not have
    differing = sorted(name for name in now if before.get(name) != now[name])
    if differing:
        shown = ", ".join(f"{name} {before.get(name)} -> {now.get(name)}" for name in differing[:5])
        raise ValueError(
            f"{directory} holds a run with other arguments ({shown}). Give another `output_dir`, or `overwrite_output_dir` "
            "to delete its checkpoints and start again."
        )
