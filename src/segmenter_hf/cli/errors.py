"""Ends a user's mistake with a message instead of a traceback."""

import functools
import gc
import os
import sys
from collections.abc import Callable
from typing import Any


TRACEBACK_VARIABLE = "SEGMENTER_HF_TRACEBACK"  # set to anything, it brings the traceback back
USER_ERRORS = (FloatingPointError, ImportError, MemoryError, OSError, ValueError)


class UsageError(ValueError):
    """A command line that does not fit the options of its command."""


def cli_main(main: Callable[..., None]) -> Callable[..., None]:
    """Make the `main` of a command end with `error: MESSAGE` and exit code 1 where its user can fix what is wrong.

    That is so for `FloatingPointError` (a training that diverged), `ImportError`, `MemoryError`, `OSError` and `ValueError`; a
    [`UsageError`] has exit code 2, as other wrong options have. All other errors are bugs and keep their traceback.
    `SEGMENTER_HF_TRACEBACK=1` shows it for all.

    Args:
        main (`Callable`): The function.

    Returns:
        `Callable`: The function with this ending.
    """

    @functools.wraps(main)
    def ending(*args: Any, **kwargs: Any) -> None:
        try:
            main(*args, **kwargs)
        except _user_errors() as error:
            if os.environ.get(TRACEBACK_VARIABLE):
                raise
            message = f"error: {str(error) or type(error).__name__}"
            if not isinstance(error, UsageError):
                raise SystemExit(message) from error
            print(message, file=sys.stderr)
            raise SystemExit(2) from error
        finally:
            # A stream of a parquet file that is not at its end would abort the interpreter as it ends
            # (https://github.com/apache/arrow/issues/45214).
            gc.collect()
            _leave_process_group(failed=sys.exc_info()[0] is not None)

    return ending


def _user_errors() -> tuple[type[BaseException], ...]:
    """Return the errors of users, and those of the Hub's client where it is loaded: a connection that fails is no bug."""
    hub_errors = sys.modules.get("huggingface_hub.errors")
    return USER_ERRORS if hub_errors is None else (*USER_ERRORS, hub_errors.HTTPError)


def _leave_process_group(failed: bool) -> None:
    """End the threads of the process group while the interpreter is whole: Gloo's may abort it otherwise.

    NCCL would wait here for processes that are still at work, and hide the error of this one from the launcher.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        return
    if not failed or "nccl" not in distributed.get_backend():
        distributed.destroy_process_group()


__all__ = ["UsageError", "cli_main"]
