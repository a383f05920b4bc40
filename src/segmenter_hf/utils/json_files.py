"""Read JSON files that others may have written: of bounded size, with errors of one line that name the file."""

import json
import os
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from .folders import regular_size
from .messages import one_line


MAX_JSON_BYTES = 1 << 24  # a configuration with the names of 21,000 classes


def read_json(path: str | os.PathLike, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file, in UTF-8 with or without a byte order mark.

    Args:
        path (`str` or `os.PathLike`): The file.
        max_bytes (`int`, defaults to `MAX_JSON_BYTES`): Size from which it is not read.

    Returns:
        What it holds.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is larger, no file, no JSON or nested too deep; names the file.
    """
    size = regular_size(path)
    if size > max_bytes:
        raise ValueError(f"{path}: expected JSON of at most {max_bytes} bytes, got {size}. Is it the right file?")
    return parse_json(Path(path).read_bytes(), path)


def parse_json(content: str | bytes, where: str | os.PathLike) -> Any:
    """Parse JSON.

    Args:
        content (`str` or `bytes`): The text.
        where (`str` or `os.PathLike`): What to call its source in errors.

    Returns:
        What it holds.

    Raises:
        ValueError: If it is no JSON or nested too deep.
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: expected JSON, got something else: it is not text in UTF-8") from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        said = one_line(error) if text.strip() else "it is empty"
        raise ValueError(f"{where}: expected JSON, got something else: {said}") from error


def read_json_object(path: str | os.PathLike) -> dict[str, Any]:
    """Read a JSON file that holds an object; errors are those of [`read_json`], and a `ValueError` for anything else."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {content!r:.200}.")
    return content


def check_types(where: str | os.PathLike, values: dict[str, Any], types: dict[str, Any]) -> None:
    """Values that were read are of the types that they should have.

    Args:
        where (`str` or `os.PathLike`): What to call their source in errors.
        values (`dict[str, Any]`): The values by name.
        types (`dict[str, Any]`): Type of each name, as from `typing.get_type_hints`; others are not looked at.

    Raises:
        ValueError: If a value is of another type.
    """
    for name, kind in types.items():
        if name in values and not _has_type(values[name], kind):
            expected = kind if get_args(kind) else kind.__name__
            raise ValueError(f"{where}: expected `{name}` to be {expected}, got {values[name]!r:.200}.")


def _has_type(value: Any, kind: Any) -> bool:
    """Whether a value fits an annotation; lists and tuples are alike, and whole numbers are floats too."""
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return any(_has_type(value, other) for other in inner)
    if origin in (list, tuple):
        return isinstance(value, (list, tuple)) and all(_has_type(item, inner[0]) for item in value if inner)
    if origin in (int, float):
        return isinstance(value, (int, origin)) and not isinstance(value, bool)
    if origin is Literal:
        return value in inner
    return origin is Any or isinstance(value, origin)


__all__ = ["check_types", "parse_json", "read_json", "read_json_object"]
