"""What all scripts do alike: read the command line, and end a user's mistake with a message instead of a traceback."""

import difflib
import functools
import gc
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed
from transformers import HfArgumentParser


TRACEBACK_VARIABLE = "SEGMENTER_HF_TRACEBACK"  # set to anything, it brings the traceback back
USER_ERRORS = (ImportError, MemoryError, OSError, ValueError)


class UnknownOptionError(ValueError):
    """A word of the command line that the script does not know."""


def command(*further_errors: type[Exception]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make the `main` of a script end with `error: MESSAGE` and exit code 1 where its user can mend what is wrong.

    That is so for `ValueError`, `OSError`, `ImportError` and `MemoryError`; an unknown option has exit code 2, as other wrong
    options have. All other errors are bugs and keep their traceback. `SEGMENTER_HF_TRACEBACK=1` shows it for all.

    Args:
        further_errors (`type[Exception]`): Errors of this script that its user can mend too.

    Returns:
        `Callable`: The decorator.
    """

    def decorate(main: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(main)
        def ending(*args: Any, **kwargs: Any) -> None:
            try:
                main(*args, **kwargs)
            except (*USER_ERRORS, *further_errors) as error:
                if os.environ.get(TRACEBACK_VARIABLE):
                    raise
                message = f"error: {str(error) or type(error).__name__}"
                if not isinstance(error, UnknownOptionError):
                    raise SystemExit(message) from error
                print(message, file=sys.stderr)
                raise SystemExit(2) from error
            finally:
                # A stream of a parquet file that is not at its end would abort the interpreter as it ends
                # (https://github.com/apache/arrow/issues/45214).
                gc.collect()
                _leave_process_group(failed=sys.exc_info()[0] is not None)

        return ending

    return decorate


def _leave_process_group(failed: bool) -> None:
    """End the threads of the process group while the interpreter is whole: Gloo's may abort it otherwise.

    NCCL would wait here for processes that are still at work, and hide the error of this one from the launcher.
    """
    if not torch.distributed.is_initialized():
        return
    if not failed or "nccl" not in torch.distributed.get_backend():
        torch.distributed.destroy_process_group()


def parse_arguments(parser: HfArgumentParser, words: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Read a command line.

    Args:
        parser (`HfArgumentParser`): Knows the options.
        words (`Sequence[str]`, *optional*): The command line; that of this process by default.

    Returns:
        `tuple`: An instance of each of the parser's data classes.

    Raises:
        UnknownOptionError: If a word is left over; names the nearest option.
    """
    *arguments, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if not unknown:
        return tuple(arguments)
    word = unknown[0].partition("=")[0]
    if not word.startswith("-"):
        raise UnknownOptionError(f"unexpected {word!r}: it belongs to no option; see --help")
    known = [option for action in parser._actions for option in action.option_strings]
    nearest = difflib.get_close_matches(word, known, n=1)
    raise UnknownOptionError(f"unknown option {word}{f', did you mean {nearest[0]}?' if nearest else ''}; see --help")


__all__ = ["UnknownOptionError", "command", "parse_arguments"]
