"""Evaluation with the published protocol: one matrix of counts per image, added up, turned into numbers."""

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, PreTrainedModel

from .data import decode_example
from .files import write_json, write_text
from .label_sets import LabelSet
from .metrics import MeanIoU, confusion_matrix
from .prediction import Picture, describe_protocol, segment_images, stream_segmentations


class EvaluationExamples(Dataset):
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
    """Batch rows of `EvaluationExamples`, whose sizes differ, as lists."""
    return {
        "index": torch.tensor([example["index"] for example in examples]),
        "images": [example["image"] for example in examples],
        "label_maps": [example["labels"] for example in examples],
    }


def count_pixels(
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
        `torch.LongTensor` of shape `(num_images, num_labels, num_labels)`: Pixels by true and by predicted class.
    """
    predictions = segment_images(model, processor, images, **kwargs)
    matrices = [
        confusion_matrix(prediction.cpu(), labels, model.config.num_labels, ignore_index)
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
    show_progress: bool = True,
) -> dict[str, Any]:
    """Evaluate a model on a split with the published protocol; memory does not grow with the split.

    Windows of several images go through the network together, `window_batch_size` at once.

    Args:
        model (`PreTrainedModel`), processor (`BaseImageProcessor`): The model and its image processor.
        dataset (`datasets.Dataset`): A split, as from `load_segmentation_datasets`.
        label_set (`LabelSet`): The classes of the model, and what the stored labels mean.
        multi_scale_flip (`bool`, defaults to `False`): Whether to average over six scales, each also mirrored.
        scales (`Sequence[float]`, *optional*): Other scales than these six, or than 1.
        window_batch_size (`int`, defaults to 8): Windows that go through the network at once.
        show_progress (`bool`, defaults to `True`): Whether to show a progress bar.

    Returns:
        `dict`: What [`MeanIoU.compute`] returns, with `protocol` (what the numbers depend on) and `num_images`.

    Raises:
        ValueError: If the label set has another number of classes than the model, or a mask is impossible.
    """
    if label_set.num_labels != model.config.num_labels:
        raise ValueError(
            f"The model has {model.config.num_labels} classes and the label set {label_set.name!r} "
            f"{label_set.num_labels}: choose the label set that the model was trained with."
        )
    model.eval()
    metric = MeanIoU(label_set.num_labels, label_set.ignore_index)
    total = np.zeros((label_set.num_labels, label_set.num_labels), dtype=np.int64)
    rows = EvaluationExamples(dataset, label_set)
    references: deque[np.ndarray] = deque()

    def images() -> Iterator[Picture]:
        for index in range(len(rows)):
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
    for prediction in tqdm(predictions, "Evaluating", len(rows), unit="image", disable=not show_progress):
        reference = references.popleft()
        total += confusion_matrix(prediction.cpu(), reference, label_set.num_labels, label_set.ignore_index)
    metric.add_confusion_matrix(total)
    return {
        **metric.compute(),
        "protocol": describe_protocol(processor, multi_scale_flip, scales),
        "num_images": len(rows),
    }


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
