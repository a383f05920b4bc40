"""Label sets: class names, colors, the ignore index and the map from stored ids to classes."""

import colorsys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import cached_file

from ..utils.atomic_files import write_json
from .label_set_files import read_label_file


LABEL_SET_FILE = "label_set.json"  # beside a model: the label set it was trained with
MAX_TABLE = 2**20  # entries of a table of ids; a map with ids further apart is looked up one by one
BINARY_MASK_IDS = {0: 0, 255: 1}  # class ids of black and white masks, as `label_id_to_train_id`
BINARY_OR_BIT_IDS = BINARY_MASK_IDS | {1: 1}  # the same where some masks are bits
_FOLDER = Path(__file__).parent / "label_sets"


@dataclass(frozen=True)
class LabelSet:
    """The classes of a dataset, and how its masks store them.

    Args:
        name (`str`): Short name, as in `load_label_set(name)`.
        title (`str`): Name for people.
        labels (`tuple[str, ...]`): Class names, all different; the position is the class id.
        colors (`tuple[tuple[int, int, int], ...]`): One RGB color in `[0, 255]` per class. Published palettes may give
            two classes one color.
        ignore_index (`int`, defaults to 255): Label of pixels that belong to no class.
        reduce_labels (`bool`, defaults to `False`): Whether stored label 0 means "no class" and the classes are stored
            from 1 on.
        label_id_to_train_id (`dict[int, int]`, *optional*): Class id of each stored id, for `map_labels`; a stored id
            that is not in it becomes `ignore_index`. `None`: masks store the class ids. Excludes `reduce_labels`,
            which is a map of its own.
        color_masks (`bool`, defaults to `False`): Whether masks store the colors, which must then differ, in place of
            ids. Excludes both maps.
        ignore_colors (`tuple[tuple[int, int, int], ...]`, *optional*): Colors that masks store for pixels without a
            class.

    Raises:
        ValueError: If the fields do not fit together.
    """

    name: str
    title: str
    labels: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    ignore_index: int = 255
    reduce_labels: bool = False
    label_id_to_train_id: dict[int, int] | None = field(default=None, hash=False)
    color_masks: bool = False
    ignore_colors: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        where = f"label set {self.name!r}"
        if not isinstance(self.name, str) or not isinstance(self.title, str):
            raise ValueError(f"{where}: name and title must be strings, got {self.name!r} and {self.title!r}.")
        if not self.labels or not all(isinstance(label, str) for label in self.labels):
            raise ValueError(f"{where}: expected at least one label and only strings, got {self.labels}.")
        repeated = sorted(label for label, count in Counter(self.labels).items() if count > 1)
        if repeated:
            raise ValueError(f"{where}: label names must be different, got {repeated} more than once. Rename them.")
        kinds = (int, bool, bool)
        values = (self.ignore_index, self.reduce_labels, self.color_masks)
        if not all(isinstance(value, kind) for value, kind in zip(values, kinds)):
            raise ValueError(
                f"{where}: ignore_index must be an integer, and color_masks and reduce_labels true or false, got {values}."
            )
        # Masks of one class hold 0 for the background and 1 for the class.
        stored = self.labels if self.num_labels > 1 else ("background", *self.labels)
        if 0 <= self.ignore_index < len(stored):
            raise ValueError(
                f"{where}: ignore_index {self.ignore_index} is also the id of {stored[self.ignore_index]!r}. "
                f"Choose one outside of [0, {len(stored)}), or leave that class out of the label set."
            )
        self._check_colors(where)
        self._check_label_map(where, len(stored))

    def _check_colors(self, where: str) -> None:
        if len(self.colors) != self.num_labels:
            raise ValueError(f"{where}: expected {self.num_labels} colors, one per label, got {len(self.colors)}.")
        for label, color in [*zip(self.labels, self.colors), *(("__ignore__", color) for color in self.ignore_colors)]:
            if len(color) != 3 or not all(isinstance(c, int) and 0 <= c <= 255 for c in color):
                raise ValueError(f"{where}: the color of {label!r} must be 3 integers in [0, 255], got {color}.")
        repeated = [color for color, count in Counter((*self.colors, *self.ignore_colors)).items() if count > 1]
        if self.color_masks and repeated:
            raise ValueError(
                f"{where}: masks of colors need a color for each class, got {repeated[:5]} more than once."
            )

    def _check_label_map(self, where: str, num_stored: int) -> None:
        if self.label_id_to_train_id is None:
            if self.color_masks and self.reduce_labels:
                raise ValueError(f"{where}: give either reduce_labels or color_masks, got both.")
            return
        if self.reduce_labels or self.color_masks:
            other = "reduce_labels" if self.reduce_labels else "color_masks"
            raise ValueError(f"{where}: give either {other} or label_id_to_train_id, got both.")
        ids = [*self.label_id_to_train_id, *self.label_id_to_train_id.values()]
        if not ids or not all(isinstance(i, int) and abs(i) < 2**31 for i in ids):
            raise ValueError(f"{where}: label_id_to_train_id must map integers of 32 bits to such, got {ids[:10]}.")
        wrong = set(self.label_id_to_train_id.values()) - set(range(num_stored)) - {self.ignore_index}
        if wrong:
            raise ValueError(
                f"{where}: label_id_to_train_id must map to [0, {num_stored}) or to the ignore_index "
                f"{self.ignore_index}, got {sorted(wrong)}."
            )

    @property
    def num_labels(self) -> int:
        """Number of classes."""
        return len(self.labels)

    @property
    def id2label(self) -> dict[int, str]:
        """Class name of each class id, as in a transformers configuration."""
        return dict(enumerate(self.labels))

    @property
    def label2id(self) -> dict[str, int]:
        """Class id of each class name, as in a transformers configuration."""
        return {label: i for i, label in enumerate(self.labels)}

    @property
    def palette(self) -> np.ndarray:
        """Colors as an `np.ndarray` of shape `(num_labels, 3)` and dtype `uint8`, RGB."""
        return np.array(self.colors, dtype=np.uint8)

    def with_background(self) -> "LabelSet":
        """Of one class: the two that its masks and maps hold, 0 for the background and 1 for the class; else itself."""
        if self.num_labels > 1:
            return self
        background = "background" if self.labels[0] != "background" else "foreground"
        color = (0, 0, 0) if self.color_masks else (64, 64, 64)
        return replace(self, labels=(background, *self.labels), colors=(color, *self.colors))

    def save(self, path: str | Path) -> None:
        """Write the label set as a JSON file that `load_label_set` reads."""
        colors = [list(color) for color in self.colors]
        content = {
            "name": self.name,
            "title": self.title,
            "num_labels": self.num_labels,
            "ignore_index": self.ignore_index,
            "reduce_labels": self.reduce_labels,
            "labels": [{"id": i, "name": self.labels[i], "color": colors[i]} for i in range(self.num_labels)],
        }
        if self.label_id_to_train_id is not None:
            content["label_id_to_train_id"] = {str(key): value for key, value in self.label_id_to_train_id.items()}
        if self.color_masks:
            content["color_masks"] = True
        if self.ignore_colors:
            content["ignore_colors"] = [list(color) for color in self.ignore_colors]
        write_json(path, content)


def list_label_sets() -> list[str]:
    """Return the names of the label sets that come with the package, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def load_label_set(name_or_path: str | Path) -> LabelSet:
    """Load a label set of the package by name, or any other from a file.

    The file is plain text with a name per line; a CSV with the columns name, r, g, b; or JSON: a list of names, colors by name,
    or an object like those in the `label_sets` folder of the package,
    `{"labels": [{"id": 0, "name": "sky", "color": [112, 172, 226]}, ...]}` with, optionally, the other fields of `LabelSet`,
    `num_labels` and a `note`. Colors may be left out anywhere: those of `default_palette` fill in.

    Args:
        name_or_path (`str` or `Path`): One of `list_label_sets()`, or the path of a file.

    Returns:
        `LabelSet`: The label set.

    Raises:
        FileNotFoundError: If it is neither a known name nor a file.
        ValueError: If the file is not of one of the forms above.
    """
    path = _FOLDER / f"{name_or_path}.json" if str(name_or_path) in list_label_sets() else Path(name_or_path)
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a label set, one of {list_label_sets()}, or the path of a file of names (text, CSV or JSON), got "
            f"{str(name_or_path)!r}."
        )
    try:
        fields = read_label_file(path)
        colors = fill_colors(fields.pop("colors"))
        return LabelSet(colors=colors, **fields)
    except (TypeError, ValueError) as error:
        raise ValueError(error if str(path) in str(error) else f"{path}: {error}") from error


def fill_colors(colors: Sequence[tuple[int, int, int] | None]) -> tuple[tuple[int, int, int], ...]:
    """Colors of which those that are `None` are replaced by the color of `default_palette` at their place."""
    palette = default_palette(len(colors)).tolist() if None in colors else []
    return tuple(tuple(palette[i]) if color is None else color for i, color in enumerate(colors))


def get_model_label_set(
    name_or_path: str | Path, id2label: Mapping[Any, str], revision: str | None = None
) -> LabelSet:
    """Find the label set that a model was trained with.

    Args:
        name_or_path (`str` or `Path`): Directory or Hub name of the model.
        id2label (`dict[int, str]`): Names of its classes, as in its configuration.
        revision (`str`, *optional*): Branch, tag or commit on the Hub; the main branch by default.

    Returns:
        `LabelSet`: The one saved beside the model; else the packaged one with the same names; else one made of the
        names.
    """
    saved = cached_file(
        str(name_or_path), LABEL_SET_FILE, revision=revision, _raise_exceptions_for_missing_entries=False
    )
    if saved is not None:
        return load_label_set(saved)
    names = tuple(id2label[index] for index in range(len(id2label)))
    packaged = (load_label_set(name) for name in list_label_sets())
    return next((candidate for candidate in packaged if candidate.labels == names), label_set_from_names(names))


def label_set_from_names(names: Sequence[str], name: str = "custom", ignore_index: int = 255) -> LabelSet:
    """Make a label set of class names, with the colors of `default_palette`.

    Args:
        names (sequence of `str`): Class names, all different, in the order of the class ids.
        name (`str`, defaults to `"custom"`): Name and title of the label set.
        ignore_index (`int`, defaults to 255): Label of pixels that belong to no class.

    Returns:
        `LabelSet`: The label set.

    Raises:
        ValueError: If a name is not a string, names repeat, or `ignore_index` is a class id.
    """
    if isinstance(names, str):
        raise ValueError(f"names must be a list of strings, got the string {names!r}.")
    colors = tuple(tuple(color) for color in default_palette(len(names)).tolist())
    return LabelSet(name=name, title=name, labels=tuple(names), colors=colors, ignore_index=ignore_index)


def default_palette(num_labels: int) -> np.ndarray:
    """Return distinct, bright colors; the color of a class does not depend on `num_labels`.

    The hue walks in steps of the golden ratio, which keeps any number of hues apart; saturation and value walk in steps
    that share no period with it (the powers of the inverse plastic number), so that a hue that comes close to an earlier
    one differs in those.

    Args:
        num_labels (`int`): Number of colors; all are different up to at least 4000.

    Returns:
        `np.ndarray` of shape `(num_labels, 3)` and dtype `uint8`: RGB colors.
    """
    hue_step, saturation_step, value_step = 0.6180339887, 0.7548776662, 0.5698402910
    colors = [
        colorsys.hsv_to_rgb(
            (0.58 + i * hue_step) % 1, 0.85 - 0.5 * (i * saturation_step % 1), 0.95 - 0.45 * (i * value_step % 1)
        )
        for i in range(num_labels)
    ]
    return np.rint(255 * np.array(colors).reshape(num_labels, 3)).astype(np.uint8)


def map_labels(mask: np.ndarray, label_map: dict[int, int], ignore_index: int = 255) -> np.ndarray:
    """Map stored ids to class ids through a table.

    Args:
        mask (integer `np.ndarray` of any shape, or a PIL image of mode "L", "P" or "I"): Stored ids.
        label_map (`dict[int, int]`): New id of each stored id, as `LabelSet.label_id_to_train_id`.
        ignore_index (`int`, defaults to 255): New id of every stored id that is not in `label_map`.

    Returns:
        `np.ndarray` of the shape of `mask`: new ids, `uint8` if all of `label_map` and `ignore_index` fit, otherwise a
        wider integer dtype.

    Raises:
        ValueError: If `label_map` is empty or `mask` has no integer dtype.
    """
    mask = np.asarray(mask)
    if not np.issubdtype(mask.dtype, np.integer):
        raise ValueError(f"mask must have an integer dtype, got {mask.dtype}.")
    if not label_map:
        raise ValueError("label_map must not be empty: every pixel would become the ignore index.")
    new_ids = [*label_map.values(), ignore_index]
    dtype = np.result_type(np.min_scalar_type(min(new_ids)), np.min_scalar_type(max(new_ids)))
    first, last = min(label_map), max(label_map)
    if last - first > MAX_TABLE:
        stored, places = np.unique(mask, return_inverse=True)
        mapped = [label_map.get(stored_id, ignore_index) for stored_id in stored.tolist()]
        return np.array(mapped, dtype=dtype)[places].reshape(mask.shape)
    table = np.full(last - first + 3, ignore_index, dtype=dtype)  # both ends stand for all ids beyond them
    for stored_id, new_id in label_map.items():
        table[stored_id - first + 1] = new_id
    return table[np.clip(mask.astype(np.int64), first - 1, last + 1) - (first - 1)]
