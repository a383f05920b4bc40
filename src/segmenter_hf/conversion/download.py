"""Download published checkpoints into a cache: resumed where it stopped, checked, and under its name only when whole."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock
from tqdm.auto import tqdm

from ..hub.published_models import PublishedModel
from ..utils.atomic_files import translate_writing_errors
from ..utils.http import http_client, is_transient, retry_seconds
from .safe_loading import sha256_of


MAX_CHECKPOINT_BYTES = 20 << 30
MAX_CONFIG_BYTES = 1 << 20
TIMEOUT_SECONDS = 30.0  # to connect, and between two pieces of an answer
ATTEMPTS = 5  # that bring nothing, in a row
RETRY_SECONDS = 0.5  # before the second attempt, and twice as long before each that follows
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
CHECKPOINT_SUFFIXES = (".pdparams", ".pth", ".pt")


def download_checkpoint(
    model: PublishedModel,
    cache_dir: str | os.PathLike | None = None,
    show_progress: bool = True,
    *,
    allow_local_http: bool = False,
) -> Path:
    """Bring the weights of a published model here, or find them in the cache.

    What was interrupted is resumed. Where the source publishes the beginning of a SHA-256, the file is held to it, also
    when it was put into the cache by hand. Several processes may ask for the same model at once.

    Args:
        model (`PublishedModel`): The model.
        cache_dir (`str` or `os.PathLike`, *optional*): The folder of the cache, with a folder for each model. By default
            `segmenter_hf/checkpoints` in the home of Hugging Face (`HF_HOME`).
        show_progress (`bool`, defaults to `True`): Whether to show a progress bar.
        allow_local_http (`bool`, defaults to `False`): Whether a server on this machine may be asked without encryption.

    Returns:
        `Path`: The file of the weights, with its configuration, and the encoder of a head, beside it where there is one.

    Raises:
        ConnectionError: If the file is neither in the cache nor available, or `HF_HUB_OFFLINE` is set.
        FileNotFoundError: If it is behind a share link and nobody has downloaded it by hand.
        ValueError: If the weights are not published, too large, at an address that is not encrypted, or damaged.
    """
    folder = cache_folder(model, cache_dir)
    if model.checkpoint_url is None:
        return _find_by_hand(model, folder)
    checkpoint = folder / _file_name(model.checkpoint_url)
    files = {checkpoint: model.checkpoint_url}
    if model.config_url is not None:
        files = {folder / _file_name(model.config_url): model.config_url} | files
    if model.encoder_url is not None:
        files[folder / _file_name(model.encoder_url)] = model.encoder_url
    missing = {path: url for path, url in files.items() if not path.is_file()}
    if checkpoint not in missing:
        _check_sha256(checkpoint, model.sha256_prefix, "Delete it and try again.")
    if not missing:
        return checkpoint
    by_hand = "\n".join(f"  {url}\n    as {path}" for path, url in missing.items())
    by_hand = f"Where there is a network, try again; or download\n{by_hand}\nand try again."
    if constants.is_offline_mode():
        raise ConnectionError(f"{model.name} is not in the cache, and HF_HUB_OFFLINE is set. {by_hand}")
    try:
        with translate_writing_errors(checkpoint), locked(folder):
            for path, url in missing.items():
                is_config, is_checkpoint = url == model.config_url, path == checkpoint
                _download(
                    url,
                    path,
                    max_bytes=MAX_CONFIG_BYTES if is_config else MAX_CHECKPOINT_BYTES,
                    sha256_prefix=model.sha256_prefix if is_checkpoint else None,
                    show_progress=show_progress and not is_config,
                    allow_local_http=allow_local_http,
                )
    except ConnectionError as error:
        raise ConnectionError(f"{error} {by_hand}") from error
    return checkpoint


def encoder_beside(model: PublishedModel, checkpoint: Path) -> Path | None:
    """The encoder that lies beside a downloaded head; `None` for a whole model."""
    return None if model.encoder_url is None else checkpoint.with_name(_file_name(model.encoder_url))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder, and let no other process download into it meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder / ".lock"):
        yield


def cache_folder(model: PublishedModel, cache_dir: str | os.PathLike | None = None) -> Path:
    """The folder in the cache of a published model; `cache_dir` as for [`download_checkpoint`]."""
    root = Path(constants.HF_HOME, "segmenter_hf", "checkpoints") if cache_dir is None else Path(cache_dir)
    return root / model.name


def _find_by_hand(model: PublishedModel, folder: Path) -> Path:
    """The file that somebody put into the folder, under any name."""
    if model.share_url is None:
        raise ValueError(
            f"{model.name} is known by its numbers only: {model.source} publishes no weights"
            f"{f' ({model.note})' if model.note else ''}. Choose a published model that is available by name."
        )
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(path for path in folder.iterdir() if path.suffix in CHECKPOINT_SUFFIXES)
    if not files:
        password = f" (password: {model.share_password})" if model.share_password else ""
        raise FileNotFoundError(
            f"{model.name} is behind a share link, which only a browser opens. Download the weights from\n"
            f"  {model.share_url}{password}\nput the file ({' or '.join(CHECKPOINT_SUFFIXES)}) into\n  {folder}\n"
            "and try again."
        )
    if len(files) > 1:
        raise ValueError(
            f"{folder}: expected one file of weights, got {', '.join(path.name for path in files)}. "
            f"Leave that of {model.name}."
        )
    return files[0]


def _download(
    url: str, path: Path, *, max_bytes: int, sha256_prefix: str | None, show_progress: bool, allow_local_http: bool
) -> None:
    """Download a file as `path.part`, in as many attempts as it takes, and move it to `path` when it is whole."""
    if path.is_file():  # another process brought it while this one waited
        return
    part, version = (path.with_name(path.name + suffix) for suffix in (".part", ".version"))
    failures = 0
    try:
        with (
            _client(allow_local_http) as client,
            tqdm(desc=path.name, unit="B", unit_scale=True, unit_divisor=1024, disable=not show_progress) as progress,
        ):
            while True:
                before = _size(part)
                try:
                    _receive(client, url, part, version, max_bytes, progress)
                    break
                except http_client.HTTPError as error:
                    failures = 1 if _size(part) > before else failures + 1
                    if failures == ATTEMPTS or not is_transient(error):
                        raise ConnectionError(f"{url} could not be downloaded: {_reason(error)}.") from error
                    delay = retry_seconds(failures, error, RETRY_SECONDS)
                time.sleep(delay)
        _check_sha256(part, sha256_prefix, f"It was deleted. Should that happen again, {url} is another file now.")
    except ValueError:
        part.unlink(missing_ok=True)
        version.unlink(missing_ok=True)
        raise
    os.replace(part, path)
    version.unlink()


def _receive(client: Any, url: str, part: Path, version: Path, max_bytes: int, progress: tqdm) -> None:
    """Append to `part` what it lacks, if the server still has the version that `part` began with; else begin again."""
    saved = version.read_text(encoding="utf-8") if version.is_file() else None
    start = _size(part) if saved else 0
    headers = {"Accept-Encoding": "identity"}  # or sizes would be those of what is unpacked
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": saved or ""}
    with client.stream("GET", url, headers=headers) as response:
        if start and response.status_code in (206, 416):
            begins = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            if not begins or _version(response) not in (saved, None):
                part.unlink()
                raise http_client.RemoteProtocolError(f"the server cannot resume at byte {start}")
        response.raise_for_status()
        if not start or response.status_code != 206:
            start = 0
            part.unlink(missing_ok=True)  # before its version: what is left must never be taken for another version
            version.write_text(_version(response) or "", encoding="utf-8")
        size = _total_bytes(response)
        if size is not None and size > max_bytes:
            raise ValueError(f"{url}: expected at most {max_bytes} bytes, got {size}. It is not downloaded.")
        progress.total, progress.n, progress.initial = size, start, start
        progress.refresh()
        with part.open("ab") as file:
            for block in response.iter_raw():
                start += len(block)
                if start > max_bytes:
                    raise ValueError(f"{url}: expected at most {max_bytes} bytes, got more. It is not downloaded.")
                file.write(block)
                progress.update(len(block))
    if size is not None and _size(part) != size:
        raise http_client.RemoteProtocolError(f"it ended after {_size(part)} of {size} bytes")


def _client(allow_local_http: bool) -> Any:
    """A client that follows redirects, to encrypted addresses only."""

    def check(request: Any) -> None:
        if request.url.scheme != "https" and not (allow_local_http and request.url.host in LOCAL_HOSTS):
            raise ValueError(f"{request.url}: expected an address that begins with https://. It is not asked.")

    return http_client.Client(follow_redirects=True, timeout=TIMEOUT_SECONDS, event_hooks={"request": [check]})


def _reason(error: Any) -> str:
    if isinstance(error, http_client.HTTPStatusError):
        return f"the server answered {error.response.status_code} {error.response.reason_phrase}"
    return str(error) or type(error).__name__


def _version(response: Any) -> str | None:
    """What tells versions of a file apart: its strong ETag, else its date."""
    etag = response.headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")


def _total_bytes(response: Any) -> int | None:
    """Size of the whole file, if the server says it."""
    said = response.headers.get("Content-Length", "")
    if response.status_code == 206:
        said = response.headers.get("Content-Range", "").rpartition("/")[2]
    return int(said) if said.isdecimal() else None


def _check_sha256(path: Path, prefix: str | None, advice: str) -> None:
    if prefix is not None and not (sha256 := sha256_of(path)).startswith(prefix):
        raise ValueError(f"{path}: expected a SHA-256 that begins with {prefix}, got {sha256}. {advice}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _file_name(url: str) -> str:
    return Path(urlsplit(url).path).name


__all__ = ["cache_folder", "download_checkpoint"]
