"""Label sets: class names, colours, the ignore index and the map from stored ids to classes."""

import colorsys
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import cached_file

from ..utils.atomic_files import write_json


LABEL_SET_FILE = "label_set.json"  # beside a model: the label set it was trained with
MAX_TABLE = 2**20  # entries of a table of ids; a map with ids further apart is looked up one by one
_FOLDER = Path(__file__).parent / "label_sets"
_FILE_KEYS = {
    "name",
    "title",
    "note",
    "num_labels",
    "ignore_index",
    "reduce_labels",
    "label_id_to_train_id",
    "labels",
}


@dataclass(frozen=True)
class LabelSet:
    """The classes of a dataset, and how its masks store them.

    Args:
        name (`str`):
            Short name, as in `load_label_set(name)`.
        title (`str`):
            Name for people.
        labels (`tuple[str, ...]`):
            Class names, all different; the position is the class id.
        colors (`tuple[tuple[int, int, int], ...]`):
            One RGB colour in `[0, 255]` per class. Published palettes may give two classes one colour.
        ignore_index (`int`, *optional*, defaults to 255):
            Label of pixels that belong to no class.
        reduce_labels (`bool`, *optional*, defaults to `False`):
            Whether stored label 0 means "no class" and the classes are stored from 1 on.
        label_id_to_train_id (`dict[int, int]`, *optional*):
            Class id of each stored id, for `map_labels`; a stored id that is not in it becomes `ignore_index`. `None`:
            masks store the class ids. Excludes `reduce_labels`, which is a map of its own.

    Raises:
        `ValueError`: If the fields do not fit together.
    """

    name: str
    title: str
    labels: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    ignore_index: int = 255
    reduce_labels: bool = False
    label_id_to_train_id: dict[int, int] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        where = f"label set {self.name!r}"
        if not isinstance(self.name, str) or not isinstance(self.title, str):
            raise ValueError(f"{where}: name and title must be strings, got {self.name!r} and {self.title!r}.")
        if not self.labels or not all(isinstance(label, str) for label in self.labels):
            raise ValueError(f"{where}: expected at least one label and only strings, got {self.labels}.")
        repeated = sorted(label for label, count in Counter(self.labels).items() if count > 1)
        if repeated:
            raise ValueError(f"{where}: label names must be different, got {repeated} more than once. Rename them.")
        if not isinstance(self.ignore_index, int) or not isinstance(self.reduce_labels, bool):
            raise ValueError(
                f"{where}: ignore_index must be an integer and reduce_labels true or false, got {self.ignore_index!r} and "
                f"{self.reduce_labels!r}."
            )
        if len(self.colors) != self.num_labels:
            raise ValueError(f"{where}: expected {self.num_labels} colors, one per label, got {len(self.colors)}.")
        for label, color in zip(self.labels, self.colors):
            if len(color) != 3 or not all(isinstance(c, int) and 0 <= c <= 255 for c in color):
                raise ValueError(f"{where}: the color of {label!r} must be 3 integers in [0, 255], got {color}.")
        # Masks of one class hold 0 for the background and 1 for the class.
        stored = self.labels if self.num_labels > 1 else ("background", *self.labels)
        if 0 <= self.ignore_index < len(stored):
            raise ValueError(
                f"{where}: ignore_index {self.ignore_index} is also the id of {stored[self.ignore_index]!r}. "
                f"Choose one outside of [0, {len(stored)})."
            )
        if self.label_id_to_train_id is not None:
            if self.reduce_labels:
                raise ValueError(f"{where}: give either reduce_labels or label_id_to_train_id, got both.")
            ids = [*self.label_id_to_train_id, *self.label_id_to_train_id.values()]
            if not ids or not all(isinstance(i, int) and abs(i) < 2**31 for i in ids):
                raise ValueError(
                    f"{where}: label_id_to_train_id must map integers of 32 bits to such, got {ids[:10]}."
                )
            wrong = set(self.label_id_to_train_id.values()) - set(range(len(stored))) - {self.ignore_index}
            if wrong:
                raise ValueError(
                    f"{where}: label_id_to_train_id must map to [0, {len(stored)}) or to the ignore_index "
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
        """Colours as an `np.ndarray` of shape `(num_labels, 3)` and dtype `uint8`, RGB."""
        return np.array(self.colors, dtype=np.uint8)

    def with_background(self) -> "LabelSet":
        """Of one class: the two that its masks and maps hold, 0 for the background and 1 for the class; else itself."""
        if self.num_labels > 1:
            return self
        background = "background" if self.labels[0] != "background" else "foreground"
        return replace(self, labels=(background, *self.labels), colors=((64, 64, 64), *self.colors))

    def save(self, path: str | Path) -> None:
        """Writes the label set as a JSON file that `load_label_set` reads."""
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
        write_json(path, content)


def list_label_sets() -> list[str]:
    """Returns the names of the label sets that come with the package, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def load_label_set(name_or_path: str | Path) -> LabelSet:
    """Loads a label set of the package by name, or any other from a JSON file.

    The file holds either a list of names, which get the colours of `default_palette`, or an object like those in the
    `label_sets` folder of the package: `{"labels": [{"id": 0, "name": "sky", "color": [112, 172, 226]}, ...]}` with,
    optionally, the other fields of `LabelSet`, `num_labels` and a `note`.

    Args:
        name_or_path (`str` or `Path`):
            One of `list_label_sets()`, or the path of a JSON file.

    Returns:
        `LabelSet`: The label set.

    Raises:
        `FileNotFoundError`: If it is neither a known name nor a file.
        `ValueError`: If the file is not of the form above.
    """
    path = _FOLDER / f"{name_or_path}.json" if str(name_or_path) in list_label_sets() else Path(name_or_path)
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a label set, one of {list_label_sets()}, or the path of a JSON file, got {str(name_or_path)!r}."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got a file that is not: {error}") from error
    try:
        if isinstance(content, list):
            return label_set_from_names(content, name=path.stem)
        return _from_json_object(content, path)
    except (TypeError, ValueError) as error:
        raise ValueError(error if str(path) in str(error) else f"{path}: {error}") from error


def get_model_label_set(name_or_path: str | Path, id2label: dict[int, str], revision: str | None = None) -> LabelSet:
    """Finds the label set that a model was trained with.

    Args:
        name_or_path (`str` or `Path`):
            Directory or Hub name of the model.
        id2label (`dict[int, str]`):
            Names of its classes, as in its configuration.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub; the main branch by default.

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
    """Makes a label set of class names, with the colours of `default_palette`.

    Args:
        names (sequence of `str`):
            Class names, all different, in the order of the class ids.
        name (`str`, *optional*, defaults to `"custom"`):
            Name and title of the label set.
        ignore_index (`int`, *optional*, defaults to 255):
            Label of pixels that belong to no class.

    Returns:
        `LabelSet`: The label set.

    Raises:
        `ValueError`: If a name is not a string, names repeat, or `ignore_index` is a class id.
    """
    if isinstance(names, str):
        raise ValueError(f"names must be a list of strings, got the string {names!r}.")
    colors = tuple(tuple(color) for color in default_palette(len(names)).tolist())
    return LabelSet(name=name, title=name, labels=tuple(names), colors=colors, ignore_index=ignore_index)


def default_palette(num_labels: int) -> np.ndarray:
    """Returns distinct, bright colours; the colour of a class does not depend on `num_labels`.

    The hue walks in steps of the golden ratio, which keeps any number of hues apart; saturation and value walk in steps
    that share no period with it (the powers of the inverse plastic number), so that a hue that comes close to an earlier
    one differs in those.

    Args:
        num_labels (`int`):
            Number of colours; all are different up to at least 4000.

    Returns:
        `np.ndarray` of shape `(num_labels, 3)` and dtype `uint8`: RGB colours.
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
    """Maps stored ids to class ids through a table.

    Args:
        mask (integer `np.ndarray` of any shape, or a PIL image of mode "L", "P" or "I"):
            Stored ids.
        label_map (`dict[int, int]`):
            New id of each stored id, as `LabelSet.label_id_to_train_id`.
        ignore_index (`int`, *optional*, defaults to 255):
            New id of every stored id that is not in `label_map`.

    Returns:
        `np.ndarray` of the shape of `mask`: new ids, `uint8` if all of `label_map` and `ignore_index` fit, otherwise a
        wider integer dtype.

    Raises:
        `ValueError`: If `label_map` is empty or `mask` has no integer dtype.
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


def _from_json_object(content: Any, path: Path) -> LabelSet:
    if not isinstance(content, dict) or not isinstance(content.get("labels"), list):
        raise ValueError(f"{path}: expected a list of names or an object with a list of `labels`.")
    unknown = sorted(set(content) - _FILE_KEYS)
    if unknown:
        raise ValueError(f"{path}: expected only the keys {sorted(_FILE_KEYS)}, got also {unknown}.")
    labels = content["labels"]
    for i, label in enumerate(labels):
        if not isinstance(label, dict) or set(label) != {"id", "name", "color"} or label["id"] != i:
            raise ValueError(
                f'{path}: expected {{"id": {i}, "name": ..., "color": [r, g, b]}} as label {i}, got {label}.'
            )
    if content.get("num_labels", len(labels)) != len(labels):
        raise ValueError(f"{path}: num_labels is {content['num_labels']}, but there are {len(labels)} labels.")
    name = content.get("name", path.stem)
    label_map = content.get("label_id_to_train_id")
    if not isinstance(label_map, (dict, type(None))):
        raise ValueError(f"{path}: expected an object as label_id_to_train_id, got {label_map!r:.200}.")
    return LabelSet(
        name=name,
        title=content.get("title", name),
        labels=tuple(label["name"] for label in labels),
        colors=tuple(tuple(label["color"]) for label in labels if isinstance(label["color"], list)),
        ignore_index=content.get("ignore_index", 255),
        reduce_labels=content.get("reduce_labels", False),
        label_id_to_train_id=None
        if label_map is None
        else {int(stored): train for stored, train in label_map.items()},
    )
