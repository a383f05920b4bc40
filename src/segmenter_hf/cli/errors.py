"""Ends a user's mistake with a message instead of a traceback."""

import functools
import gc
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ..utils.messages import describe_os_error, printable


TRACEBACK_VARIABLE = "SEGMENTER_HF_TRACEBACK"  # set to anything, it brings the traceback back
KNOWN_OPTIONS: ContextVar[frozenset[str]] = ContextVar(
    "KNOWN_OPTIONS", default=frozenset()
)  # of the command that runs
CLEANING_SECONDS = 10.0  # in which a further SIGTERM is ignored; batch systems and launchers send several
RESEND_SECONDS = 0.1
# Functions that messages of the library name, and the commands that do the same.
COMMANDS = {
    "convert_checkpoint": "segmenter-hf convert",
    "export_model": "segmenter-hf export",
    "load_published_models": "segmenter-hf models",
}
USER_ERRORS = (FloatingPointError, ImportError, MemoryError, OSError, ValueError)


class UsageError(ValueError):
    """A command line that does not fit the options of its command."""


class Terminated(BaseException):
    """The process was told to end (SIGTERM, as Slurm and Kubernetes send it); its text, if any, is for the user."""


def cli_main(main: Callable[..., None]) -> Callable[..., None]:
    """Make the `main` of a command end with `error: MESSAGE` and exit code 1 where its user can fix what is wrong.

    That is so for `FloatingPointError` (a training that diverged), `ImportError`, `MemoryError`, `OSError` and `ValueError`; a
    [`UsageError`] has exit code 2, as other wrong options have. All other errors are bugs and keep their traceback.
    `SEGMENTER_HF_TRACEBACK=1` shows it for all. Ctrl-C and SIGTERM drop what is not finished, remove its temporary files and end
    with a line and exit code 130 or 143.

    Args:
        main (`Callable`): The function.

    Returns:
        `Callable`: The function with this ending.
    """

    @functools.wraps(main)
    def ending(*args: Any, **kwargs: Any) -> None:
        try:
            with _sigterm_as_exception():
                try:
                    main(*args, **kwargs)
                finally:
                    # A stream of a parquet file that is not at its end would abort the interpreter as it ends
                    # (https://github.com/apache/arrow/issues/45214).
                    gc.collect()
                    _leave_process_group(failed=sys.exc_info()[0] is not None)
        except SystemExit:
            raise
        except BaseException as error:
            signaled = _find_signal(error)
            if signaled is None or os.environ.get(TRACEBACK_VARIABLE):
                _end_with_error(error)
                raise
            is_terminated = isinstance(signaled, Terminated)
            if os.environ.get("RANK", "0") == "0":  # a launcher passes the signal on to all processes: one says it
                print(str(signaled) or "terminated" if is_terminated else "interrupted", file=sys.stderr)
            raise SystemExit(128 + (signal.SIGTERM if is_terminated else signal.SIGINT)) from error

    return ending


def _find_signal(error: BaseException) -> BaseException | None:
    """Return the Ctrl-C or SIGTERM that an error comes from: libraries such as torch's exporter wrap them in errors."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        if isinstance(found, (KeyboardInterrupt, Terminated)):
            return found
        seen.add(id(found))
        found = found.__cause__ or found.__context__
    return None


def _end_with_error(error: BaseException) -> None:
    """End the process with the line of an error that its user can fix; return for others."""
    if not isinstance(error, _user_errors()) or os.environ.get(TRACEBACK_VARIABLE):
        return
    message = describe_error(error)
    if not isinstance(error, UsageError):
        raise SystemExit(message) from error
    print(message, file=sys.stderr)
    raise SystemExit(2) from error


@contextmanager
def _sigterm_as_exception() -> Iterator[None]:
    """Let SIGTERM raise [`Terminated`] in the block, so that it cleans up, where nothing else handles the signal."""
    is_main_thread = threading.current_thread() is threading.main_thread()
    if not is_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    last = -math.inf

    def terminate(*_: Any) -> None:
        nonlocal last
        if time.monotonic() - last >= CLEANING_SECONDS:  # the cleaning after the first is not interrupted
            last = time.monotonic()
            raise Terminated

    def send_again(unraisable: Any) -> None:
        """What is raised while an object is deleted, or in a callback of a library, Python ignores: the signal comes again."""
        nonlocal last
        if not issubclass(unraisable.exc_type, Terminated):
            earlier_hook(unraisable)
            return
        last = -math.inf
        threading.Timer(RESEND_SECONDS, os.kill, (os.getpid(), signal.SIGTERM)).start()

    earlier_hook, sys.unraisablehook = sys.unraisablehook, send_again
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.unraisablehook = earlier_hook


def _user_errors() -> tuple[type[BaseException], ...]:
    """Return the errors of users, and those of the Hub's client where it is loaded: a connection that fails is no bug."""
    hub_errors = sys.modules.get("huggingface_hub.errors")
    return USER_ERRORS if hub_errors is None else (*USER_ERRORS, hub_errors.HTTPError)


def describe_error(error: BaseException) -> str:
    """Return the line for an error: with the options of the command, and without characters that a terminal would act on."""
    said = describe_os_error(error) if isinstance(error, OSError) else str(error)
    lines = "\n".join(map(printable, name_options(said).split("\n")))
    return f"error: {lines or type(error).__name__}"


def name_options(message: str) -> str:
    """Name options for the arguments of the library, `--ignore_index 11` for `ignore_index=11`, and commands for functions."""

    def as_option(match: re.Match[str]) -> str:
        name, value = match.groups()
        if name in COMMANDS:
            return f"`{COMMANDS[name]}`"
        if name not in KNOWN_OPTIONS.get():
            return match[0]
        value = value.lower() if value in ("True", "False") else value
        return f"`--{name}`" if value is None else f"`--{name} {value}`"

    return re.sub(r"`([a-z]\w*)(?:=([^`\s]+))?`", as_option, message)


def _leave_process_group(failed: bool) -> None:
    """End the threads of the process group while the interpreter is whole: Gloo's may abort it otherwise.

    NCCL would wait here for processes that are still at work, and hide the error of this one from the launcher.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        return
    if not failed or "nccl" not in distributed.get_backend():
        distributed.destroy_process_group()


__all__ = ["Terminated", "UsageError", "cli_main"]
