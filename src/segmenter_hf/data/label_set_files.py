"""Files of class names and colors, in the forms that people have them: JSON, CSV, or plain text with a name per line."""

import csv
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..utils.json_files import parse_json


IGNORE_NAME = "__ignore__"  # as in labelme's lists: not a class, its pixels are ignored
LABEL_FILES = (
    "label_set.json",
    "colors.json",
    "class_dict.csv",
    "label_class_dict.csv",
    "labelmap.txt",
    "class_names.txt",
)  # looked for beside the data
MAX_BYTES = 2**24
_FILE_KEYS = {
    *("name", "title", "note", "num_labels", "ignore_index", "reduce_labels", "label_id_to_train_id", "labels"),
    *("color_masks", "ignore_colors"),
}
_CSV_COLUMNS = {
    "name": ("name", "class", "label", "class_name"),
    "r": ("r", "red"),
    "g": ("g", "green"),
    "b": ("b", "blue"),
}
_NAME_COLOR = re.compile(r"(.+?):(\d+),(\d+),(\d+)(?::.*)?$")  # CVAT's labelmap.txt
_COLOR_NAME = re.compile(r"(\d+)\s+(\d+)\s+(\d+)\s+(\S.*)$")  # CamVid's label_colors.txt

Entry = tuple[Any, Any]  # a name, and its color or None; not checked yet


def find_label_file(folder: Path) -> Path | None:
    """The file of class names that lies in the folder of a dataset, if there is one of `LABEL_FILES`."""
    return next((folder / name for name in LABEL_FILES if (folder / name).is_file()), None)


def read_label_file(path: Path) -> dict[str, Any]:
    """Read the fields of a label set; a color that the file does not give is `None`.

    Args:
        path (`Path`): `*.json`: a list of names, an object of colors by name, a list of `{"name", "color"}` or
            `{"name", "r", "g", "b"}`, or what `LabelSet.save` writes. `*.csv`: columns name, r, g, b. Anything else: a
            name per line, alone, as `name:r,g,b` or as `r g b name`. The name `__ignore__` is not a class. Where each class has
            an `id`, that is what masks store.

    Returns:
        `dict`: Arguments of `LabelSet`.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is too large or not of such a form.
    """
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: expected class names in at most {MAX_BYTES} bytes, got {path.stat().st_size}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected class names in UTF-8, got a file that is not text: {error}") from error
    if path.suffix.lower() == ".csv":
        return _fields(_csv_entries(text, path), path) | _id_map(_csv_ids(text), path)
    if path.suffix.lower() != ".json":
        return _fields(map(_text_entry, _lines(text)), path)
    content = parse_json(text, path)
    if isinstance(content, dict) and isinstance(content.get("labels"), list):
        return _object_fields(content, path)
    items = content if isinstance(content, list) else []
    ids = [item.get("id") for item in items if isinstance(item, dict) and item.get("name") != IGNORE_NAME]
    return _fields(_json_entries(content, path), path) | _id_map(ids, path)


def _fields(entries: Iterable[Entry], path: Path) -> dict[str, Any]:
    entries = list(entries)
    classes = [entry for entry in entries if entry[0] != IGNORE_NAME]
    return {
        "name": path.stem,
        "title": path.stem,
        "labels": tuple(name for name, _ in classes),
        "colors": [color for _, color in classes],
        "ignore_colors": tuple(color for name, color in entries if name == IGNORE_NAME and color is not None),
    }


def _id_map(ids: list[Any], path: Path) -> dict[str, Any]:
    """What masks store for the classes of a file that gives each an id, where that is not the place of the class.

    Raises:
        ValueError: If the ids are no different integers, or a class has none while others have.
    """
    if len(ids) < 2 or all(number is None for number in ids) or ids == list(range(len(ids))):
        return {}
    if not all(type(number) is int for number in ids) or len(set(ids)) < len(ids):
        raise ValueError(f"{path}: expected an integer of its own as the id of each class, got {ids[:10]}.")
    return {"label_id_to_train_id": {number: place for place, number in enumerate(ids)}}


def _csv_ids(text: str) -> list[Any]:
    """The ids in a column of that name."""
    header, *rows = [row for row in csv.reader(text.splitlines()) if any(cell.strip() for cell in row)]
    names = [cell.strip().lower() for cell in header]
    if "id" not in names:
        return []
    name, place = next(names.index(name) for name in _CSV_COLUMNS["name"] if name in names), names.index("id")
    ids = [(row[place : place + 1] or [""])[0].strip() for row in rows if row[name].strip() != IGNORE_NAME]
    return [int(number) if number.lstrip("-").isdecimal() else number for number in ids]


def _lines(text: str) -> Iterable[str]:
    return (line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#"))


def _text_entry(line: str) -> Entry:
    if match := _NAME_COLOR.match(line):
        return match[1].strip(), tuple(map(int, match.groups()[1:]))
    if match := _COLOR_NAME.match(line):
        return match[4], tuple(map(int, match.groups()[:3]))
    return line, None


def _csv_entries(text: str, path: Path) -> Iterable[Entry]:
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines())]
    except csv.Error as error:  # which is no `ValueError`
        raise ValueError(f"{path}: expected comma-separated values, got something else: {error}.") from error
    rows = [row for row in rows if any(row)]
    header = [cell.lower() for cell in rows[0]] if rows else []
    found = {key: [header.index(name) for name in names if name in header] for key, names in _CSV_COLUMNS.items()}
    if not all(found.values()):
        raise ValueError(f"{path}: expected the columns name, r, g, b in the first line, got {header[:10]}.")
    for number, row in enumerate(rows[1:], start=2):
        try:
            name, *color = (row[indices[0]] for indices in found.values())
            yield name, tuple(map(int, color))
        except (IndexError, ValueError) as error:
            raise ValueError(f"{path}: expected name, r, g, b in row {number}, got {row[:10]}.") from error


def _json_entries(content: Any, path: Path) -> Iterable[Entry]:
    if isinstance(content, list) and not any(isinstance(item, dict) for item in content):
        return [(name, None) for name in content]
    if isinstance(content, list):
        return [_json_entry(item, index, path) for index, item in enumerate(content)]
    if isinstance(content, dict) and content and all(isinstance(c, list) and len(c) == 3 for c in content.values()):
        return [(name, tuple(color)) for name, color in content.items()]
    raise ValueError(
        f"{path}: expected a list of names or an object with a list of `labels`, or colors as in "
        '{"sky": [112, 172, 226]}.'
    )


def _json_entry(item: Any, index: int, path: Path) -> Entry:
    if isinstance(item, dict) and {"name", "r", "g", "b"} <= item.keys():
        return item["name"], (item["r"], item["g"], item["b"])
    if isinstance(item, dict) and "name" in item and isinstance(item.get("color", []), list):
        return item["name"], tuple(item["color"]) if "color" in item else None
    raise ValueError(
        f'{path}: expected {{"name": ..., "color": [r, g, b]}} as item {index}, got {item!r:.200}. The color may be left '
        "out."
    )


def _object_fields(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The fields of what `LabelSet.save` writes; most may be left out."""
    if unknown := sorted(set(content) - _FILE_KEYS):
        raise ValueError(f"{path}: expected only the keys {sorted(_FILE_KEYS)}, got also {unknown}.")
    labels = content["labels"]
    for i, label in enumerate(labels):
        keys = set(label) if isinstance(label, dict) else set()
        if not {"id", "name"} <= keys <= {"id", "name", "color"} or label["id"] != i:
            raise ValueError(
                f'{path}: expected {{"id": {i}, "name": ..., "color": [r, g, b]}} (color is optional) as label {i}, got '
                f"{label!s:.200}."
            )
    if content.get("num_labels", len(labels)) != len(labels):
        raise ValueError(f"{path}: num_labels is {content['num_labels']}, but there are {len(labels)} labels.")
    label_map = content.get("label_id_to_train_id")
    if not isinstance(label_map, (dict, type(None))):
        raise ValueError(f"{path}: expected an object as label_id_to_train_id, got {label_map!r:.200}.")
    if not all(isinstance(label.get("color", []), list) for label in labels):
        raise ValueError(f"{path}: expected [r, g, b] as the color of each label, or none, got {labels!s:.200}.")
    if not all(re.fullmatch(r"-?\d{1,20}", key, re.ASCII) for key in label_map or {}):
        raise ValueError(f"{path}: expected ids as keys of label_id_to_train_id, got {list(label_map or {})[:10]}.")
    ignore_colors = content.get("ignore_colors", [])
    if not isinstance(ignore_colors, list) or not all(isinstance(color, list) for color in ignore_colors):
        raise ValueError(f"{path}: expected a list of [r, g, b] as ignore_colors, got {ignore_colors!r:.200}.")
    name = content.get("name", path.stem)
    return {
        "name": name,
        "title": content.get("title", name),
        "labels": tuple(label["name"] for label in labels),
        "colors": [tuple(label["color"]) if "color" in label else None for label in labels],
        "ignore_index": content.get("ignore_index", 255),
        "reduce_labels": content.get("reduce_labels", False),
        "label_id_to_train_id": None if label_map is None else {int(key): value for key, value in label_map.items()},
        "color_masks": content.get("color_masks", False),
        "ignore_colors": tuple(tuple(color) for color in ignore_colors),
    }
