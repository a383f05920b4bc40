"""Label maps to train on: pixels of which the model is unsure get the ignore index instead of a class."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from ..data.label_sets import LabelSet
from ..utils.atomic_files import write_json
from ..utils.json_files import check_types, read_json_object
from .predictor import Segmentation


THRESHOLDS_FILE = "thresholds.json"  # in the folder of label maps: the least confidence of each class
NUM_BINS = 2**16  # of confidences; a power of two, so that float32 values fall into them without rounding


@dataclass(frozen=True)
class ConfidenceRule:
    """Which pixels of a label map keep their class. The confidence of a pixel is the probability of its class.

    Args:
        min_confidence (`float`, *optional*): A pixel keeps its class from this confidence on.
        min_class_fraction (`float`, *optional*): Of the pixels of each class in the whole dataset at least this share keeps it,
            those of the highest confidence (Zou et al., ECCV 2018): rare classes, of which a model is seldom sure, stay. Needs
            a pass over the dataset before the one that writes.

    With both, a pixel keeps its class where either rule says so.

    Raises:
        ValueError: If neither is given, or one is not above 0 and at most 1.
    """

    min_confidence: float | None = None
    min_class_fraction: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if not given:
            raise ValueError("Expected `min_confidence`, `min_class_fraction` or both, got neither.")
        for name, value in given.items():
            if not 0 < value <= 1:
                raise ValueError(f"`{name}` must be above 0 and at most 1, got {value}.")

    def thresholds(self, counts: np.ndarray) -> np.ndarray:
        """The least confidence with which a pixel keeps its class.

        Args:
            counts (`np.ndarray` of shape `(num_classes, NUM_BINS)` and dtype `int64`): How many pixels of each class have which
                confidence: see [`count_confidences`]. Only `min_class_fraction` looks at the numbers.

        Returns:
            `np.ndarray` of shape `(num_classes,)` and dtype `float32`: The thresholds. That of `min_class_fraction` is rounded
            down to a multiple of 1 / `NUM_BINS`; a class that does not occur keeps nothing by it.
        """
        none = np.float32(np.inf)
        least = none if self.min_confidence is None else np.float32(self.min_confidence)
        values = np.full(len(counts), least, np.float32)
        if self.min_class_fraction is None:
            return values
        for index, of_class in enumerate(counts):
            if total := int(of_class.sum()):
                at_least = of_class[::-1].cumsum()[::-1]  # pixels in this bin and above
                wanted = int(np.ceil(self.min_class_fraction * total))
                edge = int(np.flatnonzero(at_least >= wanted)[-1]) / NUM_BINS
                values[index] = min(values[index], np.float32(edge))
        return values


def confidences(result: Segmentation) -> tuple[np.ndarray, np.ndarray]:
    """The class of each pixel and its probability, both (height, width), of a result with scores."""
    class_map = result.known_class_map()
    if result.scores is None:
        raise ValueError("`result` must have scores, got none: segment the image with `return_scores=True`.")
    return class_map.cpu().numpy(), result.scores.amax(0).float().cpu().numpy()


def count_confidences(counts: np.ndarray, result: Segmentation) -> None:
    """Add the pixels of a result with scores to `counts` (num_classes, NUM_BINS)."""
    classes, confidence = confidences(result)
    bins = np.minimum((confidence * np.float32(NUM_BINS)).astype(np.int64), NUM_BINS - 1)
    flat = classes.astype(np.int64) * NUM_BINS + bins
    counts += np.bincount(flat.ravel(), minlength=counts.size).reshape(counts.shape)


def confident_classes(result: Segmentation, thresholds: np.ndarray, ignore_index: int) -> np.ndarray:
    """The class map (height, width) of a result with scores, `ignore_index` where its confidence is below the threshold."""
    classes, confidence = confidences(result)
    return np.where(confidence >= thresholds[classes], classes, ignore_index).astype(classes.dtype)


def pseudo_label_set(label_set: LabelSet) -> LabelSet:
    """What the masks of pseudo-labels store: the classes themselves, and an ignore index that a PNG file holds.

    Raises:
        ValueError: If the file has no value left for it.
    """
    stored = label_set.with_background()
    largest = 255 if stored.num_labels <= 256 else 65535
    ignore_index = label_set.ignore_index if 0 <= label_set.ignore_index <= largest else largest
    if ignore_index < stored.num_labels:
        raise ValueError(
            f"{stored.num_labels} classes leave no value up to {largest} for pixels without a class, so that unsure ones cannot "
            "be marked: leave `min_confidence` and `min_class_fraction` out."
        )
    # Two classes are listed, so that masks of 0 and the ignore index alone are not taken for black and white ones.
    identity = {index: index for index in range(stored.num_labels)} if stored.num_labels <= 2 else None
    return replace(
        stored,
        ignore_index=ignore_index,
        label_id_to_train_id=identity,
        reduce_labels=False,
        color_masks=False,
        ignore_colors=(),
    )


def save_thresholds(folder: Path, thresholds: np.ndarray) -> None:
    """Write the thresholds of the classes, in their order; `null` where a class keeps nothing."""
    values = [float(value) if np.isfinite(value) else None for value in thresholds]
    write_json(folder / THRESHOLDS_FILE, {"thresholds": values})


def read_thresholds(folder: Path, num_classes: int) -> np.ndarray | None:
    """The thresholds that an interrupted run found, if it came so far.

    Raises:
        ValueError: If the file holds something else.
    """
    path = folder / THRESHOLDS_FILE
    if not path.is_file():
        return None
    content = read_json_object(path)
    check_types(path, content, {"thresholds": list[float | None]})
    values = content.get("thresholds", [])
    if len(values) != num_classes:
        raise ValueError(
            f"{path}: expected {num_classes} thresholds, got {len(values)}. Delete it to have them found again."
        )
    return np.array([np.inf if value is None else value for value in values], np.float32)
