"""What is trained on: the splits of a dataset, their label set, and the check of their masks."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import datasets
import numpy as np
from accelerate.utils import broadcast_object_list

from ..data.label_resolution import dataset_label_set, fit_to_masks, resolve_label_set
from ..data.label_sets import LabelSet
from ..data.loading import AnyDataset, first_rows, load_segmentation_datasets, load_split
from ..data.mask_checks import MaskReport, check_masks
from ..data.mask_values import AnyMasks, MaskReader
from ..utils.processes import process_state
from .arguments import DataArguments, SegmentationTrainingArguments


STREAM_SCAN = 1000  # masks of a stream that are checked where nothing else is said


def load_splits(
    data_args: DataArguments, training_args: SegmentationTrainingArguments
) -> tuple[AnyDataset, datasets.Dataset]:
    """The training split, a stream if that is wanted, and the validation split."""
    if data_args.dataset_name is None:
        raise ValueError(
            f"The recipe {data_args.recipe!r} names no dataset, since it cannot be downloaded freely: give its folder with "
            "`dataset_name`."
        )
    if data_args.streaming and training_args.max_steps < 1:
        raise ValueError("The length of a stream is not known: give the number of steps with `max_steps`.")
    splits = (data_args.train_split, data_args.validation_split)
    loaded = load_segmentation_datasets(
        data_args.dataset_name,
        splits=splits,
        dataset_config=data_args.dataset_config,
        revision=data_args.dataset_revision,
        image_column=data_args.image_column,
        label_column=data_args.label_column,
        validation_fraction=data_args.validation_fraction,
        scenes_train=data_args.scenes_train,
        scenes_validation=data_args.scenes_validation,
        seed=training_args.data_seed or 0,
        streaming=data_args.streaming,
    )
    limits = (data_args.max_train_samples, data_args.max_eval_samples)
    train_set, validation_set = (first_rows(loaded[split], limit) for split, limit in zip(splits, limits))
    if data_args.streaming:  # evaluation visits the same images again and again, and must know how many they are
        rows = list(validation_set)
        validation_set = datasets.Dataset.from_list(rows, features=validation_set.features)
    for split, dataset in zip(splits, (train_set, validation_set)):
        if isinstance(dataset, datasets.Dataset) and len(dataset) == 0:
            raise ValueError(f"The split {split!r} of {data_args.dataset_name} has no images.")
    return train_set, validation_set


class ExtraSet(NamedTuple):
    """Further images to train on, and what their masks store."""

    dataset: datasets.Dataset
    label_set: LabelSet


def load_extra_set(data_args: DataArguments, label_set: LabelSet) -> ExtraSet | None:
    """The images that are mixed into the training split, if a dataset of them is named.

    Raises:
        ValueError: If there is no such split, the training split is a stream, or the classes are not those of `label_set`.
    """
    if data_args.extra_dataset_name is None:
        return None
    if data_args.streaming:
        raise ValueError("`extra_dataset_name` needs a training set of known length: leave `streaming` out.")
    dataset = load_split(
        data_args.extra_dataset_name,
        data_args.extra_split,
        image_column=data_args.extra_image_column,
        label_column=data_args.extra_label_column,
    )
    return ExtraSet(dataset, extra_label_set(dataset, label_set))


def extra_label_set(extra: datasets.Dataset, label_set: LabelSet) -> LabelSet:
    """What the masks of an extra set store: by its own label set where it has one, else as those of the labelled set.

    Args:
        extra (`datasets.Dataset`): The extra set.
        label_set (`LabelSet`): That of the labelled set.

    Returns:
        `LabelSet`: It gives pixels without a class the ignore index of the labelled set.

    Raises:
        ValueError: If the classes are not those of the labelled set.
    """
    found = dataset_label_set(extra)
    if found is None:
        return label_set
    found = fit_to_masks(found.with_background(), extra)
    if found.labels != label_set.labels:
        different = [index for index, pair in enumerate(zip(found.labels, label_set.labels)) if pair[0] != pair[1]]
        first = f", and class {different[0]} differs first" if different else ""
        raise ValueError(
            f"The extra dataset has other classes than the labelled one, or another order: {_listed(found.labels)} there, "
            f"{_listed(label_set.labels)} here{first}. Label it with a model of the same classes."
        )
    if found.ignore_index == label_set.ignore_index:
        return found
    table = found.label_id_to_train_id
    if table is None and not found.reduce_labels and not found.color_masks:
        table = {index: index for index in range(found.num_labels)}  # what is not listed gets the ignore index
    if table is not None:
        table = {
            stored: label_set.ignore_index if index == found.ignore_index else index for stored, index in table.items()
        }
    return replace(found, ignore_index=label_set.ignore_index, label_id_to_train_id=table)


def _listed(labels: Sequence[str]) -> str:
    return f"{len(labels)} ({', '.join(labels[:5])}{', ...' if len(labels) > 5 else ''})"


def read_masks(data_args: DataArguments, train_set: AnyDataset) -> MaskReader:
    """A reader of the training masks, for both [`find_label_set`] and [`scan_masks`]."""
    limit = data_args.max_scanned_masks or (STREAM_SCAN if data_args.streaming else None)
    return MaskReader(train_set, limit, show_progress=process_state().is_main_process)


def find_label_set(data_args: DataArguments, masks: AnyMasks) -> LabelSet:
    """The label set that was named, that of the embedded scenes, or what [`resolve_label_set`] finds."""
    return resolve_label_set(
        masks,
        data_args.label_set or ("scenes" if data_args.dataset_name == "scenes" else None),
        num_labels=data_args.num_labels,
        ignore_index=data_args.ignore_index,
        do_reduce_labels=data_args.do_reduce_labels,
    )


def scan_masks(
    train_masks: AnyMasks,
    validation_set: datasets.Dataset,
    label_set: LabelSet,
    data_args: DataArguments,
    extra: ExtraSet | None = None,
) -> MaskReport | None:
    """Read the masks of both splits and of an extra set, say what is in them, and stop if they cannot be trained on.

    Returns:
        `MaskReport`, *optional*: What the training masks hold; nothing if none were to be read.

    Raises:
        ValueError: If a mask is impossible; names the file, the values and the remedy.
    """
    limit = data_args.max_scanned_masks
    if limit == 0:
        return None
    if limit is None and data_args.streaming:
        limit = STREAM_SCAN
    state = process_state()
    reports: list[MaskReport | None] = []
    if state.is_main_process:
        checked = [
            (f"the split {data_args.train_split!r}", train_masks, label_set),
            (f"the split {data_args.validation_split!r}", validation_set, label_set),
            *([] if extra is None else [(str(data_args.extra_dataset_name), *extra)]),
        ]
        for name, masks, stored in checked:
            report = check_masks(masks, stored.num_labels, stored, max_images=limit)
            report.raise_if_impossible()
            print(f"Masks of {name}:\n{report.describe(stored.labels)}")
            reports.append(report)
    reports = reports[:1] or [None]  # that of the training masks; the others get it
    if state.num_processes > 1:
        broadcast_object_list(reports)
    return reports[0]


def class_weights(text: str | None, report: MaskReport | None) -> list[float] | None:
    """Weights of the classes as a configuration has them, from an argument.

    "balanced" gives each class N / (C n), with n of the N pixels of C classes, as scikit-learn does. "balanced_sqrt" gives the
    square roots of these, scaled so that the mean weight of the pixels is 1. A class that does not occur gets 1.

    Raises:
        ValueError: If the argument is not of the form above, or there are no frequencies.
    """
    if text is None:
        return None
    if text in ("balanced", "balanced_sqrt"):
        if report is None:
            raise ValueError(
                f'`class_weights` "{text}" needs the frequencies of the classes: leave `max_scanned_masks` out.'
            )
        counts = report.pixels_per_class
        weights = counts.sum() / (len(counts) * np.maximum(counts, 1))
        if text == "balanced_sqrt":
            weights = np.sqrt(weights) * counts.sum() / (np.sqrt(weights) * counts).sum()
        return np.where(counts > 0, weights, 1.0).round(6).tolist()
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(
            f'`class_weights` must be "balanced", "balanced_sqrt" or numbers as in "1,2.5,1", got {text!r}.'
        ) from error
