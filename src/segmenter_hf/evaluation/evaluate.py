"""Evaluation with the published protocol: one matrix of counts per image, added up, turned into numbers."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..data.decoding import decode_example
from ..data.label_sets import LabelSet
from ..inference.dataset_files import optional_text
from ..inference.predictor import InputImage, Predictor
from ..inference.visualization import prediction_grid, preview
from ..utils.atomic_files import atomic_write, write_json, write_text
from ..utils.markdown import markdown_cell
from ..utils.processes import process_state
from .metrics import ConfusionMatrix, confusion_matrix, scores_from_confusion_matrix


class EvaluationDataset(Dataset[dict[str, Any]]):
    """Decoded rows of a dataset: an image and its mask of class ids, at the original size.

    Args:
        dataset (`datasets.Dataset`): As from `load_segmentation_datasets`.
        label_set (`LabelSet`): Says what the stored labels mean.
        num_channels (`int`, defaults to 3): Channels of the model, which the images must have.
    """

    def __init__(self, dataset: datasets.Dataset, label_set: LabelSet, num_channels: int = 3) -> None:
        self.dataset = dataset
        self.label_set = label_set
        self.num_channels = num_channels

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, labels = decode_example(self.dataset[index], self.label_set, num_channels=self.num_channels)
        return {"index": index, "image": image, "labels": labels}


def collate_examples(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Batch rows of `EvaluationDataset`, whose sizes differ, as lists."""
    return {
        "index": torch.tensor([example["index"] for example in examples]),
        "images": [example["image"] for example in examples],
        "label_maps": [example["labels"] for example in examples],
    }


def confusion_matrices(
    predictor: Predictor, images: Sequence[InputImage], label_maps: Sequence[np.ndarray]
) -> torch.Tensor:
    """Confusion matrix of each image, at its original size.

    Args:
        predictor ([`Predictor`]): The model and the protocol.
        images (`Sequence` of images): What [`Predictor`] takes.
        label_maps (`Sequence[np.ndarray]`): The true classes of each image, of shape `(height, width)`.

    Returns:
        `torch.LongTensor` of shape `(num_images, num_labels, num_labels)`: Pixels by true and by predicted class. One class
        has the two labels 0 and 1.

    Raises:
        ValueError: If an image cannot be read, or a label map does not fit its image or the classes.
    """
    label_set = predictor.label_set
    matrices = [
        confusion_matrix(result.class_map.cpu(), labels, label_set.num_labels, label_set.ignore_index)
        for result, labels in zip(predictor(list(images)), label_maps)
    ]
    return torch.from_numpy(np.stack(matrices))


def evaluate_segmentation(
    predictor: Predictor, dataset: datasets.Dataset, *, num_worst: int = 0, show_progress: bool = True
) -> dict[str, Any]:
    """Evaluate a model on a split with the published protocol; memory does not grow with the split.

    Windows of several images go through the network together. With several processes (`accelerate launch`) each takes its
    share of the images, and all return the results of the whole split.

    Args:
        predictor ([`Predictor`]): The model, the protocol, and the label set that says what the stored labels mean.
        dataset (`datasets.Dataset`): A split, as from `load_segmentation_datasets`.
        num_worst (`int`, defaults to 0): How many images of the lowest mean IoU to name.
        show_progress (`bool`, defaults to `True`): Whether to show a progress bar.

    Returns:
        `dict`: What [`ConfusionMatrix.compute`] returns, with `protocol` (what the numbers depend on), `num_images` and, if wanted,
        `worst_images`: `index`, `id` (or `None`) and `mean_iou` of each, the worst first.

    Raises:
        ValueError: If `num_worst` is negative, a mask is impossible, or the split is empty or has no pixel of a class.
    """
    if num_worst < 0:
        raise ValueError(f"`num_worst` must be at least 0, got {num_worst}.")
    if len(dataset) == 0:
        raise ValueError("The split has no images: check the name of the dataset and of the split.")
    label_set, state = predictor.label_set, process_state()
    share = range(state.process_index, len(dataset), state.num_processes)
    total = ConfusionMatrix(label_set.num_labels, label_set.ignore_index)
    worst: list[tuple[float, int]] = []
    hidden = not (show_progress and state.is_main_process)
    counted = count_pixels(predictor, EvaluationDataset(dataset, label_set, predictor.processor.num_channels), share)
    for index, counts in tqdm(counted, "Evaluating", len(share), unit="image", disable=hidden):
        total.merge(counts)
        if num_worst and counts.any():
            worst = sorted([*worst, (scores_from_confusion_matrix(counts)["mean_iou"], index)])[:num_worst]
    if state.num_processes > 1:
        gathered = gather_object([(total.matrix, worst)])
        total.reset()
        for counts, _ in gathered:
            total.merge(counts)
        worst = sorted(item for _, of_process in gathered for item in of_process)[:num_worst]
    if not total.matrix.any():
        raise ValueError(
            f"No pixel of {len(dataset)} images belongs to a class: all are {label_set.ignore_index}. Check the label set."
        )
    results = {
        **total.compute(),
        "protocol": predictor.protocol.describe(predictor.processor),
        "num_images": len(dataset),
    }
    if num_worst:
        results["worst_images"] = [
            {"index": index, "id": optional_text(dataset[index].get("id")), "mean_iou": mean_iou}
            for mean_iou, index in worst
        ]
    return results


def count_pixels(
    predictor: Predictor, examples: EvaluationDataset, indices: Sequence[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """The index and the confusion matrix (num_labels, num_labels) of some images, one after the other.

    Raises:
        ValueError: If an image cannot be read or a mask is impossible.
    """
    label_set = predictor.label_set
    items = (((index, example["labels"]), example["image"]) for index in indices for example in [examples[index]])
    for result in predictor.stream(items):
        index, labels = result.key
        yield (
            index,
            confusion_matrix(result.known_class_map().cpu(), labels, label_set.num_labels, label_set.ignore_index),
        )


def save_prediction_grid(
    predictor: Predictor, examples: EvaluationDataset, path: str | Path, *, indices: Sequence[int] = range(4)
) -> None:
    """Draw some images of an evaluation set with truth and prediction.

    Args:
        predictor ([`Predictor`]): The model and the protocol.
        examples (`EvaluationDataset`): The images and their masks.
        path (`str` or `Path`): The image file to write.
        indices (`Sequence[int]`, defaults to the first 4): Which images; those beyond the end are left out.
    """
    shown = [examples[index] for index in indices if index < len(examples)]
    rows = []
    for example in shown:
        (result,) = predictor.stream([(None, example["image"])])
        rows.append((preview(example["image"]), example["labels"], result.known_class_map().cpu()))
    label_set = predictor.label_set
    grid = prediction_grid(rows, label_set.palette, label_set.id2label, ignore_index=label_set.ignore_index)
    with atomic_write(path) as temporary:
        grid.save(temporary)


def per_class_table(results: dict[str, Any], names: Sequence[str]) -> str:
    """Markdown table of IoU and accuracy of each class in percent; classes that do not occur have a dash."""
    lines = ["| class | IoU | accuracy |", "|---|---|---|"]
    for name, iou, accuracy in zip(names, results["per_category_iou"], results["per_category_accuracy"]):
        lines.append(f"| {markdown_cell(name)} | {as_percent(iou)} | {as_percent(accuracy)} |")
    lines.append(f"| **mean** | **{as_percent(results['mean_iou'])}** | **{as_percent(results['mean_accuracy'])}** |")
    return "\n".join(lines) + "\n"


def as_percent(share: float | None) -> str:
    """A share as a percentage with two decimals, as the published tables have it; a dash for none."""
    return "-" if share is None or np.isnan(share) else f"{100 * share:.2f}"


def save_results(output_dir: str | Path, results: dict[str, Any], names: Sequence[str]) -> None:
    """Write `results.json` and the table of classes, `per_class.md`, into a directory."""
    write_json(Path(output_dir) / "results.json", {**results, "labels": list(names)})
    write_text(Path(output_dir) / "per_class.md", per_class_table(results, names))
