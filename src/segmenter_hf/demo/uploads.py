"""What visitors of the page send: files of the upload cache and plain values; everything else is refused alike.

Gradio checks only the values of an event that carry its own mark (`meta`), logs a traceback for each hostile one, and fetches
addresses. What a request may hold is decided here, before gradio looks at it.
"""

import logging
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO


try:
    import gradio as gr
except ImportError as error:
    raise ImportError("The page needs Gradio: `pip install segmenter-hf[demo]`.") from error


logger = logging.getLogger(__name__)

MAX_UPLOAD_BYTES = 50_000_000
NOT_UPLOADED = "This image is not here: it was not uploaded, or has been deleted after an hour. Choose it again."
NOT_UNDERSTOOD = "The page does not understand this request. Reload it and try again."
OPEN_FLAGS = os.O_RDONLY
for flag in ("O_BINARY", "O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK"):  # those that the system knows
    OPEN_FLAGS |= getattr(os, flag, 0)
FILE_MARK = {"_type": "gradio.FileData"}


def refusal(message: str) -> gr.Error:
    """Return an error that the page shows to its visitor and that is no concern of the server's log."""
    return gr.Error(message, print_exception=False)


class GuardedBlocks(gr.Blocks):
    """A page whose events take uploaded files and plain values only, whatever a request holds."""

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Prepare the inputs of an event as gradio does, and refuse what is no value of their components."""
        if len(inputs) < len(block_fn.inputs):
            raise refusal(NOT_UNDERSTOOD)
        checked = [check_value(value, block) for value, block in zip(inputs, block_fn.inputs)]
        try:
            return await super().preprocess_data(block_fn, checked, *args, **kwargs)
        except Exception as error:  # of gradio, about a value: its text shows values of the server
            logger.debug("A request was refused.", exc_info=True)
            raise refusal(NOT_UNDERSTOOD) from error

    async def postprocess_data(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Bring the outputs of an event into the form that the browser gets.

        Gradio takes a property of `gr.HTML` whose name the JavaScript quotes for an event, and would send its `repr`.
        """
        outputs = await super().postprocess_data(*args, **kwargs)
        return [
            {key: part for key, part in output.items() if not callable(part)} if isinstance(output, dict) else output
            for output in outputs
        ]


def check_value(value: Any, block: gr.components.Component) -> Any:
    """Return the value of an input as gradio may have it: an uploaded file with nothing but its path, or a plain value.

    Raises:
        gr.Error: If it is anything else.
    """
    if isinstance(block, gr.Image):
        if value is None:
            return None
        path = value.get("path") if isinstance(value, dict) else None
        return {"path": str(upload_path(path, block.GRADIO_CACHE)), "meta": FILE_MARK}
    if isinstance(block, gr.Dataset):
        if type(value) is not int or not 0 <= value < len(block.samples):
            raise refusal(NOT_UNDERSTOOD)
    elif not isinstance(value, (str, bool)):
        raise refusal(NOT_UNDERSTOOD)
    return value


def upload_path(path: Any, cache: str | os.PathLike) -> Path:
    """Return the path of an uploaded file, without links.

    Args:
        path (`Any`): What a request calls the path.
        cache (`str` or `os.PathLike`): The folder of the uploads.

    Raises:
        gr.Error: If it is not the path of a regular file in the cache. The message is the same for all others, so that it
            tells nothing about them.
    """
    real_cache = os.path.realpath(cache)
    named = Path(os.path.normpath(path)) if isinstance(path, str) else None
    if named is None or not any(named.is_relative_to(folder) for folder in (os.path.abspath(cache), real_cache)):
        raise refusal(NOT_UPLOADED)  # what lies elsewhere is not even looked for
    try:
        real = Path(os.path.realpath(named, strict=True))
        if not real.is_relative_to(real_cache) or not stat.S_ISREG(os.lstat(real).st_mode):
            raise refusal(NOT_UPLOADED)
    except (OSError, ValueError) as error:
        raise refusal(NOT_UPLOADED) from error
    return real


def open_upload_file(path: str | os.PathLike) -> BinaryIO:
    """Open a file that `upload_path` returned; it waits for no pipe that may have taken its place.

    Raises:
        gr.Error: If it is no longer a regular file, or is too large to have been uploaded.
    """
    try:
        descriptor = os.open(path, OPEN_FLAGS)
    except (OSError, ValueError) as error:
        raise refusal(NOT_UPLOADED) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_UPLOAD_BYTES:
        os.close(descriptor)
        raise refusal(NOT_UPLOADED)
    return os.fdopen(descriptor, "rb")


__all__ = ["GuardedBlocks", "open_upload_file", "refusal", "upload_path"]
