"""What the run that trained a model was told about its data, for the commands that use the model."""

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..inference.model_files import RECIPE_FILE
from ..training.recipes import read_arguments


# Options of the data that a model's recipe answers, by the argument of training.
REMEMBERED = {
    "split": "validation_split",
    **{name: name for name in ("image_column", "label_column", "validation_fraction", "data_seed", "ignore_index")},
}
OF_THE_DATASET = ("dataset_config", "dataset_revision")  # only for the dataset that the model was trained on
OF_THE_SPLIT = (
    "validation_fraction",
    "data_seed",
)  # of another dataset the model saw nothing: its train split stays whole


def recall_data_arguments(
    model_name_or_path: str, dataset_name: str | None, arguments: Any, *names: str
) -> str | None:
    """Fill options that were not given from the `recipe.json` beside a model, and say which.

    Args:
        model_name_or_path (`str`): The model. Only of a local directory something is remembered.
        dataset_name (`str`, *optional*): The dataset, where it is given.
        arguments (`Any`): The options, a data class; those that are `None` are filled.
        names (`str`): The options to fill.

    Returns:
        `str`, *optional*: The dataset; by default that of the recipe.
    """
    path = Path(model_name_or_path) / RECIPE_FILE
    recipe = read_arguments(path) if path.is_file() else {}
    trained_on = recipe.get("dataset_name")
    if dataset_name is None:
        dataset_name = trained_on
    is_same = _is_same(dataset_name, trained_on)
    known = {field.name for field in fields(arguments)}
    filled = {}
    for name in names:
        value = recipe.get(REMEMBERED.get(name, name))
        if not is_same and (name in OF_THE_DATASET or (name in OF_THE_SPLIT and arguments.split == "train")):
            continue
        if name in known and value is not None and getattr(arguments, name) is None:
            setattr(arguments, name, value)
            filled[name] = value
    if filled:
        shown = " ".join(f"--{name} {value}" for name, value in filled.items())
        print(f"As in {path}: {shown}")
    return dataset_name


def recall_label_changes(model_name_or_path: str, label_set: str | None) -> dict[str, Any]:
    """What the training of a model changed in its label set, where that is named again as it was for the training.

    Returns:
        `dict`: Fields of `LabelSet`. Without `label_set` none: what is saved with the model has them.
    """
    path = Path(model_name_or_path) / RECIPE_FILE
    recipe = read_arguments(path) if label_set is not None and path.is_file() else {}
    if label_set is None or not _is_same(label_set, recipe.get("label_set")):
        return {}
    changes = {"ignore_index": recipe.get("ignore_index"), "reduce_labels": recipe.get("do_reduce_labels") or None}
    return {name: value for name, value in changes.items() if value is not None}


def _is_same(dataset_name: str | None, trained_on: Any) -> bool:
    if dataset_name is None or not isinstance(trained_on, str):
        return False
    return dataset_name == trained_on or os.path.realpath(dataset_name) == os.path.realpath(trained_on)


__all__ = ["recall_data_arguments", "recall_label_changes"]
