"""Text of users, such as names of classes, in Markdown."""

from typing import Any

from .messages import printable


def markdown_cell(value: Any) -> str:
    """Return a value as it stands in a table or a line: in one printable line, and with no bar that would end its cell."""
    return printable(" ".join(str(value).split())).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


__all__ = ["markdown_cell"]
