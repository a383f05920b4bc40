"""The HTTP client of huggingface_hub, and what to do when a server gives no answer now.

huggingface_hub 1 brings httpx and 2 brings httpx2, which have the same names. Whichever it is, it is the only client of this
package, so that errors of the Hub and of downloads are of one kind.
"""

import errno
import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled


http_client: Any = importlib.import_module(HTTPError.__module__.partition(".")[0])

ATTEMPTS = 5
RETRY_SECONDS = 1.0  # before the second attempt, and twice as long before each that follows
MAX_RETRY_SECONDS = 60.0  # that a server may ask for
TRANSIENT_STATUS = (408, 425, 429)  # and all from 500
# Of a network drive, or of a process that has opened too much: nothing is wrong with the file.
TRANSIENT_ERRNO = {
    getattr(errno, name)
    for name in (
        "EAGAIN",
        "EMFILE",
        "ENFILE",
        "ENOBUFS",
        "ENOMEM",
        "ENETDOWN",
        "ENETUNREACH",
        "EHOSTUNREACH",
        "ESTALE",
    )
    if hasattr(errno, name)
}

Result = TypeVar("Result")


def status_code(error: BaseException) -> int | None:
    """Return the status of the answer that an error comes from, if a server answered."""
    return next(filter(None, (getattr(_response(each), "status_code", None) for each in _chain(error))), None)


def is_transient(error: BaseException) -> bool:
    """Return whether the same request can succeed later: a time-out, a lost connection, a busy server."""
    status = status_code(error)
    if status is not None:
        return status in TRANSIENT_STATUS or status >= 500
    final = (OfflineModeIsEnabled, http_client.UnsupportedProtocol, http_client.LocalProtocolError)
    passing = (http_client.TransportError, ConnectionError, TimeoutError)
    for each in _chain(error):
        if isinstance(each, final):
            return False
        if isinstance(each, passing) or (isinstance(each, OSError) and each.errno in TRANSIENT_ERRNO):
            return True
    return False


def retry_seconds(failures: int, error: BaseException | None = None, first: float | None = None) -> float:
    """Return how long to wait after so many failures in a row, or as long as the server asks for.

    Args:
        failures (`int`): Failures so far, from 1.
        error (`BaseException`, *optional*): The last one.
        first (`float`, *optional*): Seconds after the first failure; 1 by default.
    """
    seconds = (RETRY_SECONDS if first is None else first) * 2 ** (failures - 1)
    response = next(filter(None, map(_response, _chain(error))), None) if error is not None else None
    asked = str(getattr(response, "headers", {}).get("Retry-After", ""))
    return max(seconds, min(float(asked), MAX_RETRY_SECONDS)) if asked.isascii() and asked.isdigit() else seconds


def with_retries(read: Callable[[], Result], name: str) -> Result:
    """Read something that a server or a drive may not give now.

    Args:
        read (`Callable`): Reads it.
        name (`str`): What to call it in an error.

    Returns:
        What `read` returns.

    Raises:
        ConnectionError: If five attempts failed for reasons that may pass. Other errors are those of `read`.
    """
    for failures in range(1, ATTEMPTS + 1):
        try:
            return read()
        except Exception as error:
            if not is_transient(error):
                raise
            if failures == ATTEMPTS:
                raise ConnectionError(
                    f"{name} could not be read in {ATTEMPTS} attempts, the last one failed with {describe(error)}. Nothing "
                    "is wrong with it for all that is known: run the same again when the connection or the server is back."
                ) from error
            time.sleep(retry_seconds(failures, error))
    raise AssertionError("unreachable")


@contextmanager
def translate_http_errors(name: str) -> Iterator[None]:
    """Turn errors of the HTTP client, which are no `OSError`, into a `ConnectionError` that says what could not be read."""
    try:
        yield
    except HTTPError as error:
        raise ConnectionError(f"{name} could not be read: {describe(error)}. Run the same again later.") from error


def describe(error: BaseException) -> str:
    """Return an error in a line."""
    status = status_code(error)
    answer = "" if status is None else f"the server answered {status}: "
    said = str(error).strip().split("\n")[0]
    return f"{answer}{type(error).__name__}: {said:.300}" if said else f"{answer}{type(error).__name__}"


def _response(error: BaseException) -> Any:
    try:
        return getattr(error, "response", None)
    except RuntimeError:  # of a client that has none yet
        return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it comes from."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        yield current
        seen.add(id(current))
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


__all__ = [
    "describe",
    "http_client",
    "is_transient",
    "retry_seconds",
    "status_code",
    "translate_http_errors",
    "with_retries",
]
