"""What the masks of a dataset hold, checked and counted before a model is trained on them."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..utils.messages import one_line
from .decoding import class_ids
from .label_sets import BINARY_MASK_IDS, BINARY_OR_BIT_IDS, LabelSet
from .mask_values import AnyMasks, MaskValues, as_reader


logger = logging.getLogger(__name__)

_NUM_SHOWN = 5
_MAP = "give a `label_set` with label_id_to_train_id"


@dataclass
class MaskReport:
    """What the masks of a dataset hold.

    Args:
        num_labels (`int`):
            Number of classes expected.
        ignore_index (`int`):
            Label of pixels without a class.
        pixels_per_class (`np.ndarray` of shape `(num_labels,)` and dtype `int64`):
            Pixels of each class.
        images_per_class (`np.ndarray` of shape `(num_labels,)` and dtype `int64`):
            Masks that each class occurs in.
        num_images (`int`):
            Masks seen.
        first_mask (`str`):
            Name of the first of them, for messages about all.
        num_ignored_pixels (`int`):
            Pixels with the label `ignore_index`.
        problems (`list[str]`):
            One line per example that cannot be trained on, with its position and name.
        wrong_ids (`dict[int, int]`):
            Ids that are neither a class nor `ignore_index`, and the number of their pixels.
    """

    num_labels: int
    ignore_index: int
    pixels_per_class: np.ndarray
    images_per_class: np.ndarray
    num_images: int = 0
    first_mask: str = ""
    num_ignored_pixels: int = 0
    problems: list[str] = field(default_factory=list)
    wrong_ids: dict[int, int] = field(default_factory=dict)

    @property
    def ignored_fraction(self) -> float:
        """Share of the pixels that belong to no class; those with wrong ids count as pixels."""
        num_pixels = int(self.pixels_per_class.sum()) + self.num_ignored_pixels + sum(self.wrong_ids.values())
        return self.num_ignored_pixels / max(num_pixels, 1)

    def describe(self, names: Sequence[str], max_rows: int = 20) -> str:
        """Say in some lines how many pixels are of each class, the most frequent first, and which classes are missing.

        Args:
            names (sequence of `str`):
                Names of the classes.
            max_rows (`int`, *optional*, defaults to 20):
                Classes that are listed.
        """
        names = [one_line(name) for name in names]
        num_pixels = max(int(self.pixels_per_class.sum()), 1)
        order = np.argsort(-self.pixels_per_class, kind="stable")
        present = [i for i in order if self.pixels_per_class[i]]
        lines = [
            f"  {names[i]:<24} {100 * self.pixels_per_class[i] / num_pixels:6.2f} % of the pixels, in "
            f"{self.images_per_class[i]} images"
            for i in present[:max_rows]
        ]
        if len(present) > max_rows:
            lines.append(f"  and {len(present) - max_rows} more classes")
        absent = [names[i] for i in range(self.num_labels) if not self.pixels_per_class[i]]
        if absent:
            lines.append(f"  not there: {', '.join(absent[:max_rows])}{' ...' if len(absent) > max_rows else ''}")
        head = f"  {self.num_images} images, {len(present)} of {self.num_labels} classes, "
        return "\n".join([f"{head}{100 * self.ignored_fraction:.2f} % of the pixels ignored", *lines])

    def raise_if_impossible(self) -> None:
        """Raise a `ValueError`, which says what to do, if a model cannot be trained on these masks."""
        if self.problems:
            shown = "\n  ".join(self.problems[:_NUM_SHOWN])
            more = f"\n  and {len(self.problems) - _NUM_SHOWN} more" if len(self.problems) > _NUM_SHOWN else ""
            raise ValueError(f"{len(self.problems)} masks cannot be used:\n  {shown}{more}\n{self._remedy()}".rstrip())
        if self.num_images == 0:
            raise ValueError("There are no masks: the dataset or the split is empty.")
        if not self.pixels_per_class.any():
            raise ValueError(
                f"No pixel of {self.num_images} masks, of which the first is {self.first_mask}, belongs to a class: all are "
                f"{self.ignore_index}. "
                "Check the masks, `ignore_index`, `do_reduce_labels` and the label_id_to_train_id of the `label_set`."
            )
        only_first = self.pixels_per_class[0] and np.count_nonzero(self.pixels_per_class) == 1
        if only_first and self.num_ignored_pixels and self.num_labels > 1:
            raise ValueError(
                f"The {self.num_images} masks, of which the first is {self.first_mask}, hold only class 0 and "
                f"{self.ignore_index}, which is ignored. If they are black and white "
                f"(0 and {self.ignore_index}), do not set `ignore_index`, and give a `label_set` of one name or two, or none."
            )

    def _remedy(self) -> str:
        """What to do about ids out of range; the options are named as arguments."""
        if not self.wrong_ids:
            return ""
        wrong = sorted(self.wrong_ids)
        found = f"Ids out of range: {wrong[:20]}; expected 0 to {self.num_labels - 1} and {self.ignore_index}."
        last = wrong[-1]
        if wrong == [255] and self.num_labels == 2:
            return f"{found} Black and white masks: set no `ignore_index`, and give a `label_set` of one name or two, or none."
        if wrong == [255]:
            return f"{found} 255 mostly means no class: set `ignore_index=255`."
        if wrong[0] < 0 or last > 255:
            void = f" If {last} marks pixels without a class, set `ignore_index={last}`." if len(wrong) == 1 else ""
            return f"{found} Map the stored ids to class ids with a label map: {_MAP}.{void}"
        void = f"if {last} marks pixels without a class, set `ignore_index={last}`"
        shift = "if 0 is background or 'other' and the classes start at 1, set `do_reduce_labels=True`"
        more = f"there are more classes, {last + 1} or more: give a `label_set` of as many, or none and `num_labels={last + 1}`"
        mapped = f"or the stored ids need a label map: {_MAP}"
        if wrong == [self.num_labels]:
            first, second = (void, shift) if self.pixels_per_class[0] else (shift, void)
            return f"{found} {_upper(first)}; {second}; if all are classes, {more}."
        if len(wrong) == 1:
            return f"{found} {_upper(void)}. Otherwise either {more}, {mapped}."
        return f"{found} Either {more}, {mapped}."

    def count(self, pixels_per_id: Mapping[int, int]) -> dict[int, int]:
        """Add the pixels of a mask; returns those of ids that are neither a class nor ignored."""
        wrong = {}
        for class_id, num_pixels in pixels_per_id.items():
            if class_id == self.ignore_index:
                self.num_ignored_pixels += num_pixels
            elif 0 <= class_id < self.num_labels:
                self.pixels_per_class[class_id] += num_pixels
                self.images_per_class[class_id] += 1
            else:
                wrong[class_id] = num_pixels
                self.wrong_ids[class_id] = self.wrong_ids.get(class_id, 0) + num_pixels
        return wrong


def _upper(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def check_masks(
    masks: AnyMasks,
    num_labels: int,
    label_set: LabelSet | None = None,
    *,
    ignore_index: int = 255,
    reduce_labels: bool = False,
    max_images: int | None = None,
    show_progress: bool = True,
) -> MaskReport:
    """Read the masks of a dataset and count what is in them.

    Args:
        masks (`datasets.Dataset`, `datasets.IterableDataset` or `MaskReader`):
            The dataset, as from `load_segmentation_datasets`; or a reader of it, which the last two arguments do not apply to:
            what it has read already is not read again, and is not kept.
        num_labels (`int`):
            Number of classes of the model.
        label_set (`LabelSet`, *optional*):
            As for `decode_example`, like the next two.
        ignore_index (`int`, *optional*, defaults to 255):
            Label of pixels without a class.
        reduce_labels (`bool`, *optional*, defaults to `False`):
            Whether stored 0 means "no class".
        max_images (`int`, *optional*):
            Read only so many masks from the beginning.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `MaskReport`: the counts and the problems; call its `raise_if_impossible` before training.
    """
    if label_set is not None:
        ignore_index = label_set.ignore_index
    counts = np.zeros((2, num_labels), dtype=np.int64)
    report = MaskReport(num_labels, ignore_index, pixels_per_class=counts[0], images_per_class=counts[1])
    id_map = None if label_set is None else label_set.label_id_to_train_id
    binary_ids = id_map.keys() if id_map in (BINARY_MASK_IDS, BINARY_OR_BIT_IDS) else None
    mapped_ids: set[int] = set()
    reader = as_reader(masks, max_images, show_progress)
    for i, (name, ids, mapped, problem) in enumerate(
        _class_counts(reader.consume(), label_set, ignore_index, reduce_labels)
    ):
        report.num_images += 1
        report.first_mask = report.first_mask or name
        mapped_ids.update(mapped)
        if wrong := report.count(ids):
            problem = f"{name}: ids {sorted(wrong)[:20]} in {sum(wrong.values())} pixels"
        if binary_ids is not None and (others := sorted(set(mapped) - binary_ids)):
            problem = (
                f"{name}: ids {others[:20]} in a mask of 0 and 255. Save it as PNG of these two, without smooth edges"
            )
        if problem:
            report.problems.append(f"example {i}, {problem}")
    if label_set is not None and mapped_ids:
        _warn_of_mapped_twice(label_set, mapped_ids, num_labels)
    return report


def _warn_of_mapped_twice(label_set: LabelSet, mapped_ids: set[int], num_labels: int) -> None:
    """Warn where a label map is applied to ids that look like classes already."""
    label_map = label_set.label_id_to_train_id or {}
    largest = max(
        mapped_ids if label_set.ignore_index in label_map else mapped_ids - {label_set.ignore_index}, default=-1
    )
    if 0 <= largest < num_labels <= max(label_map, default=-1):
        logger.warning(
            "The stored ids end at %d, but the label set %r maps ids up to %d to its %d classes. If the masks hold class ids "
            "already, use a label set without label_id_to_train_id.",
            largest,
            label_set.name,
            max(label_map),
            num_labels,
        )


def infer_num_labels(
    masks: AnyMasks,
    *,
    ignore_index: int = 255,
    reduce_labels: bool = False,
    max_images: int | None = None,
    show_progress: bool = True,
) -> int:
    """Return the largest class id of a dataset's masks plus one. Arguments as for `check_masks`.

    Raises:
        ValueError: If a mask cannot be decoded or is saved as JPEG, no pixel belongs to a class, the masks are black and
            white with smooth edges, or labels are reduced and it is not clear whether the stored id `ignore_index` is the last
            class.
    """
    found: Counter[int] = Counter()
    smooth = ""
    # Reduced labels are counted with -1 for "no class", so that the stored id `ignore_index` shows among them.
    ignored = -1 if reduce_labels else ignore_index
    reader = as_reader(masks, max_images, show_progress)
    for name, ids, _, problem in _class_counts(_without_jpeg(reader), None, ignored, reduce_labels):
        if problem:
            raise ValueError(problem)
        found.update(ids)
        smooth = smooth or (name if max(ids.keys() - {255}, default=0) >= 128 else "")
    if smooth and found[0] and found[255] and found[0] + found[255] > 0.9 * found.total():
        raise ValueError(
            f"{smooth}: the masks are black and white with smooth edges: {found.total() - found[0] - found[255]} of their "
            f"{found.total()} pixels are neither 0 nor 255. Save them as PNG of these two. If all values are ids of classes, set "
            "`num_labels`, or name them with `label_set`."
        )
    stored_ignored = ignore_index - 1 if reduce_labels else ignore_index
    largest = max(found.keys() - {ignored, stored_ignored}, default=-1)
    if reduce_labels and stored_ignored in found and stored_ignored == largest + 1:
        raise ValueError(
            f"The masks store the id {ignore_index}, which is both `ignore_index` and the class after {largest + 1} where "
            "stored 0 means no class. Name the classes with a label set, or give another `ignore_index`, such as 255."
        )
    if largest < 0:
        raise ValueError(
            f"No pixel belongs to a class: every label is {ignore_index}. Check the masks and `do_reduce_labels`."
        )
    return largest + 1


def _without_jpeg(masks: Iterable[MaskValues]) -> Iterator[MaskValues]:
    """The masks, from which classes are counted, unless one is a JPEG file, where ids blur into others."""
    for mask in masks:
        if mask.is_jpeg:
            found = np.unique(np.asarray(mask.pixels))
            raise ValueError(
                f"{mask.name}: classes cannot be counted in a mask that is saved as JPEG, which blurs its ids: it holds "
                f"{len(found)} values from {found[0]} to {found[-1]}. Save the masks as PNG."
            )
        yield mask


def _class_counts(
    masks: Iterable[MaskValues], label_set: LabelSet | None, ignore_index: int, reduce_labels: bool
) -> Iterator[tuple[str, dict[int, int], list[int], str]]:
    """Yield per mask its name, pixels of each id, stored ids that a label map applied to, and what is wrong or ""."""
    for mask in masks:
        try:
            values, counts = mask.count_stored_ids(label_set)
        except ValueError as error:
            yield mask.name, {}, [], str(error)
            continue
        label_set_here = mask.row_label_set(label_set)
        ids: Counter[int] = Counter()
        for class_id, count in zip(class_ids(values, label_set_here, ignore_index, reduce_labels), counts.tolist()):
            ids[int(class_id)] += count
        is_mapped = label_set_here is not None and label_set_here.label_id_to_train_id is not None
        yield mask.name, ids, values.tolist() if is_mapped else [], ""
