"""Evaluation with the published protocol: one matrix of counts per image, added up, turned into numbers."""

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, PreTrainedModel

from ..data.decoding import decode_example
from ..data.label_sets import LabelSet
from ..inference.predictor import (
    Picture,
    check_label_set,
    describe_protocol,
    process_state,
    segment_images,
    stream_segmentations,
)
from ..inference.visualization import prediction_grid
from ..utils.atomic_files import atomic_write, write_json, write_text
from .metrics import MeanIoU, confusion_matrix


class EvaluationDataset(Dataset):
    """Decoded rows of a dataset: an image and its mask of class ids, at the original size.

    Args:
        dataset (`datasets.Dataset`): As from `load_segmentation_datasets`.
        label_set (`LabelSet`): Says what the stored labels mean.
    """

    def __init__(self, dataset: datasets.Dataset, label_set: LabelSet) -> None:
        self.dataset = dataset
        self.label_set = label_set

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, labels = decode_example(self.dataset[index], self.label_set)
        return {"index": index, "image": image, "labels": labels}


def collate_examples(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Batch rows of `EvaluationDataset`, whose sizes differ, as lists."""
    return {
        "index": torch.tensor([example["index"] for example in examples]),
        "images": [example["image"] for example in examples],
        "label_maps": [example["labels"] for example in examples],
    }


def confusion_matrices(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    images: Sequence[Picture],
    label_maps: Sequence[np.ndarray],
    ignore_index: int = 255,
    **kwargs: Any,
) -> torch.Tensor:
    """Confusion matrix of each image, at its original size.

    Args:
        model (`PreTrainedModel`), processor (`BaseImageProcessor`), images (`Sequence`): As for `segment_images`.
        label_maps (`Sequence[np.ndarray]`): The true classes of each image, of shape `(height, width)`.
        ignore_index (`int`, defaults to 255): Label of the pixels that do not count.
        kwargs: Further arguments of `stream_segmentations`.

    Returns:
        `torch.LongTensor` of shape `(num_images, num_labels, num_labels)`: Pixels by true and by predicted class. One class
        has the two labels 0 and 1.
    """
    predictions = segment_images(model, processor, images, **kwargs)
    matrices = [
        confusion_matrix(prediction.cpu(), labels, max(model.config.num_labels, 2), ignore_index)
        for prediction, labels in zip(predictions, label_maps)
    ]
    return torch.from_numpy(np.stack(matrices))


def evaluate_segmentation(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    dataset: datasets.Dataset,
    label_set: LabelSet,
    *,
    multi_scale_flip: bool = False,
    scales: Sequence[float] | None = None,
    window_batch_size: int = 8,
    num_worst: int = 0,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Evaluate a model on a split with the published protocol; memory does not grow with the split.

    Windows of several images go through the network together, `window_batch_size` at once. With several processes
    (`accelerate launch`) each takes its share of the images, and all return the results of the whole split.

    Args:
        model (`PreTrainedModel`), processor (`BaseImageProcessor`): The model and its image processor.
        dataset (`datasets.Dataset`): A split, as from `load_segmentation_datasets`.
        label_set (`LabelSet`): The classes of the model, and what the stored labels mean.
        multi_scale_flip (`bool`, defaults to `False`): Whether to average over six scales, each also mirrored.
        scales (`Sequence[float]`, *optional*): Other scales than these six, or than 1.
        window_batch_size (`int`, defaults to 8): Windows that go through the network at once.
        num_worst (`int`, defaults to 0): How many images of the lowest mean IoU to name.
        show_progress (`bool`, defaults to `True`): Whether to show a progress bar.

    Returns:
        `dict`: What [`MeanIoU.compute`] returns, with `protocol` (what the numbers depend on), `num_images` and, if wanted,
        `worst_images`: `index`, `id` (or `None`) and `mean_iou` of each, the worst first.

    Raises:
        ValueError: If the label set does not fit the model, `num_worst` is negative, a mask is impossible, or the split is empty
            or has no pixel of a class.
    """
    check_label_set(model, label_set)
    if num_worst < 0:
        raise ValueError(f"`num_worst` must be at least 0, got {num_worst}.")
    if len(dataset) == 0:
        raise ValueError("The split has no images: check the name of the data set and of the split.")
    model.eval()
    state = process_state()
    rows = EvaluationDataset(dataset, label_set)
    share = range(state.process_index, len(rows), state.num_processes)
    num_labels = label_set.num_labels
    total = np.zeros((num_labels, num_labels), dtype=np.int64)
    worst: list[tuple[float, int]] = []
    references: deque[np.ndarray] = deque()

    def images() -> Iterator[Picture]:
        for index in share:
            example = rows[index]
            references.append(example["labels"])
            yield example["image"]

    predictions = stream_segmentations(
        model,
        processor,
        images(),
        multi_scale_flip=multi_scale_flip,
        scales=scales,
        window_batch_size=window_batch_size,
    )
    hidden = not (show_progress and state.is_main_process)
    for prediction, index in zip(tqdm(predictions, "Evaluating", len(share), unit="image", disable=hidden), share):
        counts = confusion_matrix(prediction.cpu(), references.popleft(), num_labels, label_set.ignore_index)
        total += counts
        if num_worst and counts.any():
            worst = sorted([*worst, (scores_of(counts, label_set)["mean_iou"], index)])[:num_worst]
    if state.num_processes > 1:
        gathered = gather_object([(total, worst)])
        total = sum(counts for counts, _ in gathered)
        worst = sorted(item for _, of_process in gathered for item in of_process)[:num_worst]
    if not total.any():
        raise ValueError(
            f"No pixel of {len(rows)} images belongs to a class: all are {label_set.ignore_index}. Check the label set."
        )
    results = {
        **scores_of(total, label_set),
        "protocol": describe_protocol(processor, multi_scale_flip, scales),
        "num_images": len(rows),
    }
    if num_worst:
        results["worst_images"] = [
            {"index": index, "id": dataset[index].get("id"), "mean_iou": mean_iou} for mean_iou, index in worst
        ]
    return results


def scores_of(counts: np.ndarray, label_set: LabelSet) -> dict[str, Any]:
    """What [`MeanIoU.compute`] returns for a matrix of counts (num_labels, num_labels)."""
    metric = MeanIoU(label_set.num_labels, label_set.ignore_index)
    metric.add_confusion_matrix(counts)
    return metric.compute()


def save_prediction_grid(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    examples: EvaluationDataset,
    label_set: LabelSet,
    path: str | Path,
    *,
    indices: Sequence[int] = range(4),
    **kwargs: Any,
) -> None:
    """Draw some images of an evaluation set with truth and prediction.

    Args:
        model (`PreTrainedModel`), processor (`BaseImageProcessor`): The model and its image processor.
        examples (`EvaluationDataset`): The images and their masks.
        label_set (`LabelSet`): The classes.
        path (`str` or `Path`): The picture to write.
        indices (`Sequence[int]`, defaults to the first 4): Which images; those beyond the end are left out.
        kwargs: Further arguments of `stream_segmentations`.
    """
    rows = []
    for example in (examples[index] for index in indices if index < len(examples)):
        (prediction,) = segment_images(model, processor, [example["image"]], **kwargs)
        rows.append((example["image"], example["labels"], prediction.cpu()))
    grid = prediction_grid(rows, label_set.palette, label_set.id2label, ignore_index=label_set.ignore_index)
    with atomic_write(path) as temporary:
        grid.save(temporary)


def per_class_table(results: dict[str, Any], names: Sequence[str]) -> str:
    """Markdown table of IoU and accuracy of each class in percent; classes that do not occur have a dash."""
    lines = ["| class | IoU | accuracy |", "|---|---|---|"]
    for name, iou, accuracy in zip(names, results["per_category_iou"], results["per_category_accuracy"]):
        lines.append(f"| {name} | {as_percent(iou)} | {as_percent(accuracy)} |")
    lines.append(f"| **mean** | **{as_percent(results['mean_iou'])}** | **{as_percent(results['mean_accuracy'])}** |")
    return "\n".join(lines) + "\n"


def as_percent(share: float | None) -> str:
    """A share as a percentage with two decimals, as the published tables have it; a dash for none."""
    return "-" if share is None or np.isnan(share) else f"{100 * share:.2f}"


def save_results(output_dir: str | Path, results: dict[str, Any], names: Sequence[str]) -> None:
    """Write `results.json` and the table of classes, `per_class.md`, into a directory."""
    write_json(Path(output_dir) / "results.json", {**results, "labels": list(names)})
    write_text(Path(output_dir) / "per_class.md", per_class_table(results, names))
