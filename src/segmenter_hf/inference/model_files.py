"""The files of a model: which ones there are, and before they are read: regular ones of a size that fits."""

import hashlib
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import torch
from transformers import AutoModelForSemanticSegmentation, PreTrainedConfig
from transformers.utils import (
    CONFIG_NAME,
    IMAGE_PROCESSOR_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
)

from ..utils.folders import regular_size
from ..utils.json_files import MAX_JSON_BYTES, read_json_object


RECIPE_FILE = "recipe.json"  # beside a model: the arguments that it was trained with
SPARE_WEIGHTS = 2**28  # of heads that a file lacks; weights that are missing are named one by one later
WEIGHT_SUFFIXES = (".safetensors", ".bin")
REMEDY = "Download or save it again, or convert the checkpoint with `convert_checkpoint`."
MODEL_TYPES = ("segmenter", "setr")
# What the directory of a saved or published model holds.
MODEL_FILES = (
    *("README.md", "config.json", "label_set.json", "model_card.json", "preprocessor_config.json"),
    *("model*.safetensors", "model.safetensors.index.json", "sample.png", "predictions.png", ".eval_results"),
    *(
        "configuration_*.py",
        "handler.py",
        "modeling_*.py",
        "image_*.py",
        "pipeline_*.py",
        "segmentation_loss.py",
        "sliding_window.py",
    ),
    *sorted(path.name for path in (Path(__file__).parents[1] / "models").glob("[a-z]*.py")),
)


def check_model_files(name_or_path: str | Path) -> None:
    """Refuse a directory with files that would be waited for or fill the memory when they are read.

    Args:
        name_or_path (`str` or `Path`): Directory of a model; a name on the Hub passes.

    Raises:
        ValueError: If a file is a pipe or a device, a configuration is no JSON or far too large, or files name others
            elsewhere.
    """
    folder = Path(name_or_path)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix not in (".json", *WEIGHT_SUFFIXES) or not path.exists():
            continue
        size = regular_size(path)
        if path.suffix == ".json" and size > MAX_JSON_BYTES:
            raise ValueError(f"{path}: expected JSON of at most {MAX_JSON_BYTES} bytes, got {size}. {REMEDY}")
    if (folder / "adapter_config.json").exists():  # transformers would load the model that it names, wherever that is
        raise ValueError(f"{folder}: expected a whole model, got an adapter. Merge it into its model and save that.")
    for name in (CONFIG_NAME, IMAGE_PROCESSOR_NAME):
        if (folder / name).exists():
            read_json_object(folder / name)  # errors name the file
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    parts = read_json_object(index).get("weight_map") if index.exists() else {}
    if not isinstance(parts, dict) or any(
        not isinstance(part, str) or Path(part).name != part for part in parts.values()
    ):
        raise ValueError(f"{index}: expected a `weight_map` to files beside it, got something else. {REMEDY}")


def check_stored_config(name_or_path: str | Path, config: PreTrainedConfig, revision: str | None = None) -> None:
    """Refuse a configuration that asks for code, or for far more weights than the files of its model hold, before any is made.

    Args:
        name_or_path (`str` or `Path`): Directory or Hub name of the model.
        config (`PreTrainedConfig`): What its `config.json` says; those of other packages are not looked at.
        revision (`str`, *optional*): Branch, tag or commit on the Hub; the main branch by default.

    Raises:
        ValueError: If it does.
    """
    if not type(config).__module__.startswith("segmenter_hf."):
        return
    if "/" in str(config._attn_implementation):  # transformers would fetch a kernel from there and run it
        raise ValueError(
            f"{name_or_path}: its configuration names code on the Hub for the attention, {config._attn_implementation!r:.200}. "
            "Remove `attn_implementation` from its config.json."
        )
    folder = Path(name_or_path)
    if folder.is_dir():
        files = [path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES and path.exists()]
    else:
        options = {"revision": revision or "main", "_raise_exceptions_for_missing_entries": False}
        file = cached_file(str(name_or_path), SAFE_WEIGHTS_NAME, **options)
        files = [] if file is None else [Path(file)]
    stored, wanted = sum(path.stat().st_size for path in files), count_weights(config)
    if files and wanted > stored + SPARE_WEIGHTS:  # a weight takes a byte or more
        raise ValueError(
            f"{name_or_path}: its configuration asks for {wanted} weights, and the files of the weights have {stored} bytes. "
            f"{REMEDY}"
        )


def count_weights(config: PreTrainedConfig) -> int:
    """Return how many values the weights of a semantic segmentation model have, without making them."""
    with torch.device("meta"):
        model = AutoModelForSemanticSegmentation.from_config(config)
    return sum(weight.numel() for weight in model.state_dict().values())


def weights_digest(name_or_path: str | Path | None, config: PreTrainedConfig) -> str | None:
    """What changes with the weights of a model: the SHA-256 of the files of a directory, or the commit on the Hub, where known."""
    folder = Path(name_or_path or "")
    if not name_or_path or not folder.is_dir():
        return getattr(config, "_commit_hash", None)
    digest = hashlib.sha256()
    for pattern in ("*.safetensors", "onnx/*", "openvino/*"):
        for path in sorted(filter(Path.is_file, folder.glob(pattern))):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def check_replaceable(directory: Path, overwrite: bool, names: Sequence[str]) -> None:
    """Refuse to write over anything but a directory of a model of this package, and that only when told to.

    Args:
        directory (`Path`): The directory to write.
        overwrite (`bool`): Whether it may be replaced.
        names (`Sequence[str]`): Patterns of all names that such a directory holds.

    Raises:
        FileExistsError: If it must not be written.
    """
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not directory.is_dir():
        raise FileExistsError(f"{directory} is not the directory of a model but a file: give a directory.")
    if not overwrite:
        raise FileExistsError(
            f"{directory} exists and is not empty: give a new directory, or set `overwrite` to replace it."
        )
    held = sorted(path.name for path in directory.iterdir())
    others = [name for name in held if not any(fnmatch(name, pattern) for pattern in names)]
    if others or not _is_model(directory):
        raise FileExistsError(
            f"{directory} is not the directory of a model of this package alone: it holds {(others or held)[0]}, which would "
            "be lost. Give a new directory."
        )


def _is_model(directory: Path) -> bool:
    try:
        return read_json_object(directory / "config.json").get("model_type") in MODEL_TYPES
    except (OSError, ValueError):
        return False


__all__ = [
    "MODEL_FILES",
    "REMEDY",
    "check_model_files",
    "check_replaceable",
    "check_stored_config",
    "count_weights",
    "weights_digest",
]
