"""Encoded images of rows: their bytes, or those of a file that the row names, if a row may name it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import fsspec

from ..utils.http import status_code, with_retries
from .label_sets import LabelSet


ARCHIVES = {"zip", "tar", "gzip", "bz2", "xz", "zstd", "lz4"}  # that the datasets library reads from
CACHES = (str(datasets.config.DOWNLOADED_DATASETS_PATH), str(datasets.config.EXTRACTED_DATASETS_PATH))
MAX_FILE_BYTES = 2**31
DESCRIBED_MASK = (
    b"segmenter_hf mask: "  # how the bytes of a mask begin that `described_masks.py` draws; no image does so
)


@dataclass
class RowImage(datasets.Image):
    """Column of untrusted encoded images: each comes as `{"bytes", "path", "folders"}`, for `encoded_bytes`.

    Args:
        folders (`tuple[str, ...]`): Where the files that rows name must lie; "hf://" stands for the Hub.
        label_set (`LabelSet`, *optional*): Of a column of masks: the classes that came with the dataset.
    """

    folders: tuple[str, ...] = ()
    label_set: LabelSet | None = None

    def encode_example(self, value: Any) -> Any:
        """The value: `datasets.Image` would prefer a file to the bytes."""
        return value

    def decode_example(
        self, value: dict[str, Any] | bytes | str | None, token_per_repo_id: Any = None
    ) -> dict[str, Any] | None:
        """The value, with the folders if a file that it names may be read.

        Raises:
            ValueError: If the column holds something else than images.
        """
        if isinstance(value, (bytes, str)):  # of a stream, whose columns are not cast
            is_path = isinstance(value, str)
            value = {"bytes": None if is_path else value, "path": value if is_path else None}
        if value is not None and not (isinstance(value, dict) and {"bytes", "path"} <= value.keys()):
            raise ValueError(f"expected encoded images in a column of images, got {value!r:.100}.")
        if value is None or (value["bytes"] is not None and not value["bytes"].startswith(DESCRIBED_MASK)):
            return value
        return {**value, "folders": self.folders}


def encoded_bytes(value: dict[str, Any]) -> bytes:
    """The bytes of an encoded image, `{"bytes", "path"}`, and `folders` if its path may lead into these only.

    Raises:
        FileNotFoundError: If its file is missing.
        ValueError: If there is neither, or the file may not or cannot be read.
        ConnectionError: If the Hub or the drive gives no answer now, after several attempts.
        PermissionError: If the Hub does not give it to this user.
    """
    if value["bytes"] is not None:
        return value["bytes"]
    if value["path"] is None:
        raise ValueError("the row has no image")
    path = str(value["path"])
    address = openable(path, value.get("folders"))
    try:
        content = with_retries(lambda: _read(address), path)
    except (ConnectionError, MemoryError):
        raise
    except Exception as error:  # archives can be damaged in any way
        if "hf://" in str(address) and status_code(error) in (401, 403):
            raise PermissionError(
                f"{path}: the Hub does not give this file to you ({type(error).__name__}). Log in with `hf auth login`, and "
                "ask for access on the page of the dataset where it is gated."
            ) from error
        raise ValueError(f"{path}: the file of the row cannot be read: {type(error).__name__}: {error}") from error
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"{path}: expected an image of at most {MAX_FILE_BYTES} bytes, got more.")
    return content


def _read(address: str | Path) -> bytes:
    with open(address, "rb") if isinstance(address, Path) else fsspec.open(address, "rb") as file:
        return file.read(MAX_FILE_BYTES + 1)


def openable(path: str, folders: Sequence[str] | None = None) -> str | Path:
    """What to open for the path of a row: the path of a file, or the address of one in archives or on the Hub.

    Args:
        path (`str`): As the datasets library writes it: `PLACE` or `ARCHIVE://FILE::PLACE`.
        folders (`Sequence[str]`, *optional*): Where it must lie; "hf://" stands for the Hub.

    Raises:
        FileNotFoundError: If there is no such file, or it is none to read, such as a pipe.
        ValueError: If it is something else: untrusted rows ask no servers and read no other files.
    """
    if folders and os.path.isfile(beside := os.path.join(folders[0], path)):  # a path from the folder of the dataset
        path = beside
    if os.path.isfile(path):  # its name may look like an address
        place = os.path.abspath(path)
        _check_place(path, place, folders)
        return Path(place)
    *archives, place = path.split("::")
    protocol, _, local = place.rpartition("://")
    if protocol not in ("", "file", "hf") or not {hop.partition("://")[0] for hop in archives} <= ARCHIVES:
        raise ValueError(f"{path}: expected an image in the row, got an address. Download it first.")
    if protocol != "hf":
        local = os.path.abspath(local)
    _check_place(path, "hf://" if protocol == "hf" else local, folders)
    if protocol == "hf":
        return path
    if not os.path.isfile(local):
        raise FileNotFoundError(f"{path}: expected an image file, but there is none. Check the path.")
    return "::".join([*archives, f"file://{local}"]) if archives else Path(local)


def _check_place(path: str, place: str, folders: Sequence[str] | None) -> None:
    """Refuse a path that leads to another place than those of the rows, of which "hf://" is the Hub."""
    if folders and not any(place == folder or Path(place).is_relative_to(folder) for folder in folders):
        raise ValueError(
            f"{path}: expected an image in the row or a file in {folders[0]}, got one outside of it. Put it there."
        )
