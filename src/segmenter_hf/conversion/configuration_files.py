"""Read the configuration files of other systems without running anything that they contain.

YAML tags name classes to build, and configurations of mmsegmentation are Python source. Here a file can only produce numbers,
strings and containers of these; anything else that it names is refused, with a `ValueError` that names the file.
"""

import ast
import math
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from ..utils.messages import one_line
from .safe_loading import describe_file


MAX_TEXT_BYTES = 1 << 20
# What PyYAML's constructors raise for values that are not of their tag, beside its own errors.
CONSTRUCTOR_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
MAX_YAML_NODES = 100_000  # with everything that aliases repeat


class VariantLoader(yaml.SafeLoader):
    """YAML of plain values, plus the tuples that yaml.dump writes."""

    def get_single_node(self) -> yaml.Node | None:
        """Refuse aliases and merge keys that repeat each other: a short text of them stands for a gigantic one."""
        node = super().get_single_node()
        if node is not None and _expanded_size(node, {}) > MAX_YAML_NODES:
            raise yaml.constructor.ConstructorError(None, None, "aliases (*) or merge keys (<<) repeat too much")
        return node


def _expanded_size(node: yaml.Node, sizes: dict[yaml.Node, float]) -> float:
    """Number of nodes below a node with everything that aliases repeat; infinite if a node holds itself."""
    if node not in sizes:
        sizes[node] = math.inf
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
        sizes[node] = 1 + sum(_expanded_size(part, sizes) for part in parts)
    return sizes[node]


def _construct_tuple(loader: yaml.SafeLoader, node: yaml.SequenceNode) -> tuple[Any, ...]:
    return tuple(loader.construct_sequence(node))


VariantLoader.add_constructor("tag:yaml.org,2002:python/tuple", _construct_tuple)


def read_text(path: Path) -> str:
    """Read a text file that is not suspiciously large."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise ValueError(
            f"{path}: expected at most {MAX_TEXT_BYTES} bytes, got {path.stat().st_size}. Is it the right file?"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got {describe_file(path)}.") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of plain values and `!!python/tuple`, such as the `variant.yml` of rstrudel/segmenter."""
    text = read_text(path)
    try:
        content = yaml.load(text, Loader=VariantLoader)
    except (yaml.YAMLError, *CONSTRUCTOR_ERRORS) as error:
        said = one_line(error)
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:  # it ends in the line and a caret below
            mark = error.problem_mark
            said = f"line {mark.line + 1}, column {mark.column + 1}: {one_line(str(error.problem))}"
        raise ValueError(
            f"{path}: expected YAML of plain values and tuples. {type(error).__name__}: {said}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected named values, got {describe_file(path)}.")
    return content


def read_python_config(text: str, names: Iterable[str], where: str) -> dict[str, Any]:
    """Read some variables of a configuration of mmsegmentation, which is Python source, without running it.

    Args:
        text (`str`): The source, with literals and `dict(...)` only, as mmcv writes it into checkpoints.
        names (`Iterable[str]`): The variables to read; the others may hold anything.
        where (`str`): What to call the source in errors.

    Returns:
        `dict[str, Any]`: Values of those variables that the source assigns.

    Raises:
        ValueError: If it is not Python, or one of the variables is not made of literals.
    """
    wanted, values = set(names), {}
    if len(text) > MAX_TEXT_BYTES:
        raise ValueError(f"{where}: expected at most {MAX_TEXT_BYTES} characters, got {len(text)}.")
    try:
        for statement in ast.parse(text).body:
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                name = statement.targets[0].id
                if name in wanted:
                    values[name] = _literal(statement.value)
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{where}: expected Python source of literals and dict(...) only. {error}") from error
    return values


def _literal(node: ast.expr) -> Any:
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "dict"
        and not node.args
        and all(keyword.arg for keyword in node.keywords)
    ):
        return {keyword.arg: _literal(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Dict) and all(node.keys):
        return {_literal(key): _literal(value) for key, value in zip(node.keys, node.values) if key is not None}
    if isinstance(node, ast.List):
        return [_literal(element) for element in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_literal(element) for element in node.elts)
    if isinstance(node, (ast.Constant, ast.UnaryOp)):
        return ast.literal_eval(node)
    raise ValueError(f"Line {node.lineno} asks for {ast.unparse(node)[:100]}.")


def lookup(
    config: dict[str, Any], name: str, kind: type | tuple[type, ...], where: Path | str | None, default: Any = None
) -> Any:
    """Get a value from nested dictionaries.

    Args:
        config (`dict[str, Any]`): The outermost dictionary.
        name (`str`): Keys joined by dots.
        kind (`type` or `tuple[type, ...]`): What the value must be; whole numbers are floats too.
        where (`Path` or `str`): Where the dictionary is from, for the error.
        default (*optional*): What to return where there is no value.

    Returns:
        The value.

    Raises:
        ValueError: If there is neither a value nor a default, or the value is of another kind.
    """
    value: Any = config
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if value is None and default is not None:
        return default
    kinds = kind if isinstance(kind, tuple) else (float, int) if kind is float else (kind,)
    if not isinstance(value, kinds) or isinstance(value, bool) and bool not in kinds:
        expected = " or ".join(kind.__name__ for kind in kinds)
        got = "nothing" if value is None else reprlib.repr(value)[:100]
        raise ValueError(f"{where}: expected `{name}` of type {expected}, got {got}.")
    return value


__all__ = ["lookup", "read_python_config", "read_text", "read_yaml"]
