"""From any name of a model to start from to a directory that `from_pretrained` reads."""

import os
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ..utils.json_files import read_json_object
from .adaptation import ENCODERS
from .convert import conversion_version, convert_checkpoint, detect_format
from .safe_loading import INDEX_FILE, read_checkpoint, sha256_of, weights_file


HUB_FILES = ["config.json", "preprocessor_config.json", "model.safetensors", INDEX_FILE, "model-*-of-*.safetensors"]


def resolve_model(
    name_or_path: str | os.PathLike, model_type: str = "segmenter", cache_dir: str | os.PathLike | None = None
) -> str:
    """Find a model to start from, and convert it where it is not one of this package.

    Args:
        name_or_path (`str` or `os.PathLike`): A directory or Hub name of a Segmenter or SETR model, which is returned as
            it is; or of a ViT or DeiT of timm or transformers; or a checkpoint file of any known format.
        model_type (`str`, defaults to `"segmenter"`): "segmenter" or "setr": what an encoder becomes.
        cache_dir (`str` or `os.PathLike`, *optional*): Where conversions are kept, by the hashes of their weights and of the code that
            converts; by default `segmenter_hf/converted` in the cache of Hugging Face.

    Returns:
        `str`: What `from_pretrained` takes.

    Raises:
        FileNotFoundError: If it is neither a path nor a model that is available from the Hub.
        ValueError: If it is not of a known format.
    """
    path = Path(name_or_path)
    url = None
    if not path.exists():
        path, url = download_snapshot(str(name_or_path))
    config_path = path / "config.json"
    if config_path.is_file() and read_json_object(config_path).get("model_type") in ENCODERS:
        return str(name_or_path)
    weights = weights_file(path)
    folder = Path(cache_dir or Path(constants.HF_HOME) / "segmenter_hf" / "converted")
    output_dir = folder / f"{path.stem}-{sha256_of(weights)[:16]}-{model_type}-{conversion_version()}"
    if not (output_dir / "config.json").is_file():
        is_encoder = detect_format(read_checkpoint(path)) == "vit"
        convert_checkpoint(path, output_dir, source_url=url, model_type=model_type if is_encoder else None)
    return str(output_dir)


def download_snapshot(name: str) -> tuple[Path, str]:
    """Fetch configuration and weights of a model from the Hub, or find them in its cache.

    Returns:
        `tuple[Path, str]`: The directory, and the address of the model.

    Raises:
        FileNotFoundError: If there is no such model, or no network and it is not in the cache.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES)), f"{constants.ENDPOINT}/{name}"
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{name}: no such file or directory, and it is not available from the Hub either ({type(error).__name__}). "
            "Check the name; without a network download the model elsewhere and give its directory."
        ) from error


__all__ = ["resolve_model"]
