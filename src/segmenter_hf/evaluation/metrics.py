"""Mean intersection over union from streamed integer counts, plain and as a metric of the `evaluate` library."""

from collections.abc import Sequence
from typing import Any, cast

import datasets
import evaluate
import numpy as np
import torch


LabelMap = np.ndarray | torch.Tensor

_DESCRIPTION = """\
Mean intersection over union (mIoU), mean accuracy and overall (pixel) accuracy of semantic segmentation, from the totals
over all maps. Only the `(num_labels, num_labels)` matrix of pixel counts is kept, in memory.
"""

_INPUTS_DESCRIPTION = """
Inputs of the metric:
    predictions: integer label maps, values in `[0, num_labels)`; the maps may differ in size.
    references: integer label maps of the same sizes, values in `[0, num_labels)` or `ignore_index`.
"""

_CITATION = """\
@inproceedings{long2015fully,
  title={Fully Convolutional Networks for Semantic Segmentation},
  author={Long, Jonathan and Shelhamer, Evan and Darrell, Trevor},
  booktitle={IEEE Conference on Computer Vision and Pattern Recognition},
  pages={3431--3440},
  year={2015}
}
"""


def confusion_matrix(
    predictions: LabelMap, references: LabelMap, num_labels: int, ignore_index: int = 255
) -> np.ndarray:
    """Count the pixels of one label map by reference class and predicted class.

    Args:
        predictions (`np.ndarray` or `torch.Tensor` of any integer dtype and shape, usually `(height, width)`):
            Predicted classes in `[0, num_labels)`, also where the reference is ignored.
        references (`np.ndarray` or `torch.Tensor` of any integer dtype, of the shape of `predictions`): True classes
            in `[0, num_labels)`, or `ignore_index`.
        num_labels (`int`): Number of classes.
        ignore_index (`int`, defaults to 255): Pixels with this reference are not counted. A value in `[0, num_labels)`
            leaves that class out.

    Returns:
        `np.ndarray` of shape `(num_labels, num_labels)` and dtype `int64`: rows are references, columns predictions.

    Raises:
        ValueError: If the shapes differ, a dtype is not an integer, or a value is none of the above.
    """
    predictions = _integer_array(predictions, "predictions")
    references = _integer_array(references, "references")
    if predictions.shape != references.shape:
        raise ValueError(
            f"predictions and references must have one shape, got {predictions.shape} and {references.shape}. "
            "Resize the scores, not the classes, to the size of the reference before the argmax."
        )
    if predictions.size == 0:
        return np.zeros((num_labels, num_labels), dtype=np.int64)
    if predictions.min() < 0 or predictions.max() >= num_labels:
        wrong = predictions[(predictions < 0) | (predictions >= num_labels)]
        raise ValueError(f"predictions must lie in [0, {num_labels}), got {_distinct(wrong)}.")

    if references.dtype == np.uint8 and num_labels <= 256:
        # 16 bits hold a pair of 8-bit values, and a row for each stored value leaves the other checks for afterwards
        codes = references.astype(np.uint16) * np.uint16(num_labels) + predictions.astype(np.uint16)
        counts = np.bincount(codes.ravel(), minlength=256 * num_labels).reshape(256, num_labels)
        if 0 <= ignore_index < 256:
            counts[ignore_index] = 0
        if counts[num_labels:].any():
            wrong = np.flatnonzero(counts[num_labels:].any(1)) + num_labels
            raise _wrong_references(wrong, num_labels, ignore_index)
        return counts[:num_labels]

    # bincount works on intp: anything narrower is converted inside it, which costs as much as doing it here
    ignored = references == ignore_index
    rows = references.astype(np.intp)
    np.copyto(rows, num_labels, where=ignored)
    if rows.min() < 0 or rows.max() > num_labels or np.any((references == num_labels) & ~ignored):
        wrong = references[~ignored & ((references < 0) | (references >= num_labels))]
        raise _wrong_references(wrong, num_labels, ignore_index)
    rows *= num_labels
    rows += predictions.astype(np.intp, copy=False)
    counts = np.bincount(rows.ravel(), minlength=(num_labels + 1) * num_labels)
    return counts[: num_labels * num_labels].reshape(num_labels, num_labels)


def scores_from_confusion_matrix(matrix: np.ndarray) -> dict[str, Any]:
    """Compute mean IoU, mean accuracy and pixel accuracy from pixel counts (Long et al., CVPR 2015, section 5).

    Absent classes: the IoU of a class that is neither in the references nor in the predictions is `nan`, and so is the
    accuracy of a class that is not in the references; the means skip them. A class that is predicted but never in the
    references has an IoU of 0, which counts. Without any counted pixel all scores are `nan`.

    The counts are exact. Ratios and means are rounded to single precision, as mmsegmentation does: the published numbers
    come out to the last bit.

    Args:
        matrix (`np.ndarray` of shape `(num_labels, num_labels)`): Pixel counts, rows are references, columns
            predictions.

    Returns:
        `dict` with the floats `mean_iou`, `mean_accuracy` and `overall_accuracy`, and the lists of `num_labels` floats
        `per_category_iou` and `per_category_accuracy`; all are fractions in `[0, 1]` or `nan`.

    Raises:
        ValueError: If the matrix is not square.
    """
    matrix = np.asarray(matrix)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix must have shape (num_labels, num_labels), got {matrix.shape}.")
    correct = np.diag(matrix).astype(np.float64)
    labelled = matrix.sum(axis=1)
    union = labelled + matrix.sum(axis=0) - correct
    with np.errstate(invalid="ignore"):  # 0 / 0 is the nan of an absent class
        iou = (correct / union).astype(np.float32)
        accuracy = (correct / labelled).astype(np.float32)
        overall_accuracy = np.float32(correct.sum() / labelled.sum())
    return {
        "mean_iou": _mean_of_present(iou),
        "mean_accuracy": _mean_of_present(accuracy),
        "overall_accuracy": float(overall_accuracy),
        "per_category_iou": iou.tolist(),
        "per_category_accuracy": accuracy.tolist(),
    }


class ConfusionMatrix:
    """Pixel counts of any number of label maps; memory does not grow with them.

    ```python
    counts = ConfusionMatrix(num_labels=150)
    for prediction, reference in maps:  # of any sizes
        counts.update(prediction, reference)
    counts.compute()["mean_iou"]
    ```

    Counts are integers, so the sum over processes ([`merge`]) is exactly what one process counts.

    Args:
        num_labels (`int`): Number of classes.
        ignore_index (`int`, defaults to 255): Pixels with this reference are not counted.

    Raises:
        ValueError: If `num_labels` is less than 1.
    """

    def __init__(self, num_labels: int, ignore_index: int = 255) -> None:
        if num_labels < 1:
            raise ValueError(f"num_labels must be at least 1, got {num_labels}.")
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self.reset()

    def reset(self) -> None:
        """Start again from zero."""
        self.matrix = np.zeros((self.num_labels, self.num_labels), dtype=np.int64)

    def update(
        self, predictions: LabelMap | Sequence[LabelMap], references: LabelMap | Sequence[LabelMap]
    ) -> np.ndarray:
        """Add a map, or a list of maps of one or of different sizes.

        Args:
            predictions (integer array or tensor, usually of shape `(height, width)`, or a list of them): Predicted classes in
                `[0, num_labels)`.
            references (of the shape of `predictions`, or as many): True classes in `[0, num_labels)`, or `ignore_index`.

        Returns:
            `np.ndarray` of shape `(num_labels, num_labels)` and dtype `int64`: What was added.

        Raises:
            ValueError: If the numbers of maps differ, and as [`confusion_matrix`]; the counts are then unchanged.
        """
        if not isinstance(predictions, (list, tuple)):
            predictions, references = [cast(LabelMap, predictions)], [cast(LabelMap, references)]
        if len(predictions) != len(references):
            raise ValueError(
                f"predictions and references must be as many maps, got {len(predictions)} and {len(references)}."
            )
        added = np.zeros_like(self.matrix)
        for prediction, reference in zip(predictions, references):
            added += confusion_matrix(prediction, reference, self.num_labels, self.ignore_index)
        self.matrix += added
        return added

    def merge(self, counts: "ConfusionMatrix | np.ndarray | torch.Tensor") -> None:
        """Add counts made elsewhere, for instance by another process.

        Args:
            counts ([`ConfusionMatrix`], or integer array or tensor of shape `(num_labels, num_labels)`): Pixel counts, rows
                are references, columns predictions.

        Raises:
            ValueError: If the shape or the dtype is another, or a count is negative.
        """
        matrix = _integer_array(counts.matrix if isinstance(counts, ConfusionMatrix) else counts, "matrix")
        if matrix.shape != self.matrix.shape or matrix.min() < 0:
            raise ValueError(
                f"matrix must hold counts >= 0 of shape {self.matrix.shape}, got shape {matrix.shape} and values "
                f"{_distinct(matrix)}."
            )
        self.matrix += matrix.astype(np.int64)

    def compute(self) -> dict[str, Any]:
        """Compute the scores of everything added so far: see [`scores_from_confusion_matrix`]."""
        return scores_from_confusion_matrix(self.matrix)


class MeanIoU(evaluate.Metric):  # type: ignore[misc]  # evaluate has no annotations
    """[`ConfusionMatrix`] as a metric of the `evaluate` library, which counts maps instead of storing them.

    ```python
    metric = MeanIoU(num_labels=150)
    for prediction, reference in maps:  # of any sizes
        metric.add(prediction=prediction, reference=reference)
    metric.compute()["mean_iou"]
    ```

    Args:
        num_labels (`int`): Number of classes.
        ignore_index (`int`, defaults to 255): Pixels with this reference are not counted.
        kwargs: Further arguments of `evaluate.Metric`.

    Raises:
        ValueError: If `num_labels` is less than 1.
    """

    def __init__(self, num_labels: int, ignore_index: int = 255, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.info.module_name = "mean_iou"  # not "mean_io_u", which the base class makes of the class name
        self.counts = ConfusionMatrix(num_labels, ignore_index)
        self._has_maps = False

    def _info(self) -> evaluate.MetricInfo:
        label_map = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features({"predictions": label_map, "references": label_map}),
        )

    def add(self, *, prediction: LabelMap, reference: LabelMap) -> None:
        """Add one map: see [`ConfusionMatrix.update`]."""
        self.add_batch(predictions=[prediction], references=[reference])

    def add_batch(self, *, predictions: Sequence[LabelMap], references: Sequence[LabelMap]) -> None:
        """Add several maps, as lists or stacked: see [`ConfusionMatrix.update`]."""
        self.counts.update(list(predictions), list(references))
        self._has_maps = self._has_maps or len(predictions) > 0

    def add_confusion_matrix(self, matrix: np.ndarray | torch.Tensor) -> None:
        """Add counts made elsewhere: see [`ConfusionMatrix.merge`]."""
        self.counts.merge(matrix)
        self._has_maps = True

    def compute(
        self, *, predictions: Sequence[LabelMap] | None = None, references: Sequence[LabelMap] | None = None
    ) -> dict[str, Any]:
        """Compute the scores of everything added since the last call, and start again from zero.

        Args:
            predictions (as in `add_batch`, *optional*): Last maps to add.
            references (as in `add_batch`, *optional*): Last maps to add; given if and only if `predictions` is.

        Returns:
            `dict`: See [`scores_from_confusion_matrix`], which also says what absent classes do.

        Raises:
            ValueError: If nothing was added, one argument is given without the other, and as `add_batch`.
        """
        if predictions is not None and references is not None:
            self.add_batch(predictions=predictions, references=references)
        elif predictions is not None or references is not None:
            raise ValueError("compute() needs both predictions and references, or neither; got one of them.")
        if not self._has_maps:
            raise ValueError("There is nothing to compute: call `add`, `add_batch` or `add_confusion_matrix` first.")
        scores = self.counts.compute()
        self.counts.reset()
        self._has_maps = False
        return scores


def _integer_array(values: LabelMap, name: str) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values  # NumPy does not know it
    array = np.asarray(values)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must have an integer dtype, got {array.dtype}. Take the argmax of scores first.")
    return array


def _wrong_references(wrong: np.ndarray, num_labels: int, ignore_index: int) -> ValueError:
    return ValueError(
        f"references must lie in [0, {num_labels}) or be the ignore_index {ignore_index}, got {_distinct(wrong)}. "
        "Check `ignore_index`, and that the masks store the ids of these classes or that their label set says how to get them: "
        "reduce_labels or label_id_to_train_id."
    )


def _distinct(values: np.ndarray, limit: int = 10) -> str:
    distinct = np.unique(values).tolist()
    return ", ".join(map(str, distinct[:limit])) + (", ..." if len(distinct) > limit else "")


def _mean_of_present(values: np.ndarray) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else float("nan")


__all__ = ["ConfusionMatrix", "MeanIoU", "confusion_matrix", "scores_from_confusion_matrix"]
