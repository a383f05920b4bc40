"""Parsers of the subcommands: options from data classes, and one form of help for all."""

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from transformers import HfArgumentParser

from .errors import KNOWN_OPTIONS, UsageError


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """One spelling of each option, what kind of value it takes, whether it is required, and its default if there is one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.nargs == 0:
            return ", ".join(action.option_strings)
        return f"{action.option_strings[0]} {_value(action)}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = (action.help or "").strip()
        if action.required:
            return f"{text} (required)"
        shows_default = action.default not in (None, "", [], argparse.SUPPRESS) and action.nargs != 0
        return f"{text} (default: {_as_typed(action.default)})" if shows_default else text


class SubcommandParser(HfArgumentParser):
    """Spells each missing option once, and says where models come from."""

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"/--[\w-]+", "", message)  # other spellings of an option
        if "required: --model_name_or_path" in message:
            message += (
                ". A model is a directory or a name on the Hub: `segmenter-hf models` lists the published ones and how to get "
                "them, `segmenter-hf train` makes your own"
            )
        super().error(message)


def _value(action: argparse.Action) -> str:
    """What to type after an option."""
    if isinstance(action.default, bool):
        return "[true|false]" if action.nargs == "?" else "true|false"
    if action.choices and len(list(action.choices)) < 10:
        return "{" + ",".join(map(str, action.choices)) + "}"
    kinds: dict[Any, str] = {int: "N", float: "X", str: "TEXT"}
    kind = kinds.get(action.type, "VALUE")
    return f"{kind} [{kind} ...]" if action.nargs == "+" else kind


def _as_typed(value: Any) -> str:
    """A default as one would type it, safe for argparse's formatting."""
    if isinstance(value, (list, tuple)):
        text = " ".join(map(str, value))
    else:
        text = str(value).lower() if isinstance(value, bool) else str(value)
    return text.replace("%", "%%")


def build_parser(subcommand: str, doc: str | None, dataclass_types: Sequence[type], **kwargs: Any) -> HfArgumentParser:
    """The parser of a subcommand.

    Args:
        subcommand (`str`): Its name.
        doc (`str`): The docstring of its module: a sentence, then examples and what else there is to say.
        dataclass_types (`Sequence[type]`): The options, a group of the help for each data class that has a title as
            `_argument_group_name`.
        kwargs: Further arguments of `HfArgumentParser`.

    Returns:
        `HfArgumentParser`: The parser.
    """
    summary, _, more = (doc or "").partition("\n\n")
    parser = SubcommandParser(
        dataclass_types,  # type: ignore[arg-type]
        prog=f"segmenter-hf {subcommand}",
        description=" ".join(summary.split()),
        epilog=more.strip("\n"),
        formatter_class=HelpFormatter,
        **kwargs,
    )
    for action in parser._actions:
        if action.option_strings[0].startswith("--no_"):
            action.help = argparse.SUPPRESS  # the option itself takes false
    required = [f"{action.option_strings[0]} {_value(action)}" for action in parser._actions if action.required]
    parser.usage = parser.usage or " ".join(["%(prog)s", *required, "[option ...]"])
    return parser


def parse_arguments(parser: HfArgumentParser, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Read a command line.

    Args:
        parser (`HfArgumentParser`): Knows the options.
        argv (`Sequence[str]`, *optional*): The command line; that of this process by default.

    Returns:
        `tuple`: An instance of each of the parser's data classes.

    Raises:
        UsageError: If something is left over; names the nearest option.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    KNOWN_OPTIONS.set(
        frozenset(action.dest for action in parser._actions if f"--{action.dest}" in action.option_strings)
    )
    *arguments, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if not unknown:
        return tuple(arguments)
    option = unknown[0].partition("=")[0]
    if not option.startswith("-"):
        raise UsageError(f"unexpected {option!r}: it belongs to no option; see --help")
    known = [name for action in parser._actions for name in action.option_strings]
    nearest = difflib.get_close_matches(option, known, n=1)
    raise UsageError(f"unknown option {option}{f', did you mean {nearest[0]}?' if nearest else ''}; see --help")


__all__ = ["HelpFormatter", "build_parser", "parse_arguments"]
