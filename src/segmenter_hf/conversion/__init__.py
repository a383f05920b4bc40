"""Convert checkpoints of other systems into directories that `from_pretrained` reads."""

import os
from pathlib import Path
from typing import Any

import torch

from ..files import replaced_directory
from ..image_processing_segmenter import SegmenterImageProcessor
from ..label_sets import LabelSet, load_label_set
from . import mmsegmentation, paddlevit, rstrudel, setr, vit_checkpoints
from .safe_loading import Checkpoint, read_checkpoint, sha256_of
from .state_dicts import Conversion, load_weights, rename_weights


CONVERSION_VERSION = "0.1.0"
SOURCE_FORMATS = {
    "rstrudel": rstrudel,
    "mmsegmentation": mmsegmentation,
    "setr": setr,
    "paddlevit": paddlevit,
    "vit": vit_checkpoints,
}


def convert_checkpoint(
    checkpoint_path: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    config_path: str | os.PathLike | None = None,
    source_format: str = "auto",
    label_set: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Convert a checkpoint of another system into a directory with model, configuration and image processor.

    Nothing in the files is run, every weight is accounted for, and the directory appears only when it is complete.

    Args:
        checkpoint_path (`str` or `os.PathLike`): The file of the weights, or a directory that holds one.
        output_dir (`str` or `os.PathLike`): The directory to write.
        config_path (`str` or `os.PathLike`, *optional*): The configuration that belongs to the weights. By default
            `variant.yml` beside the checkpoint for rstrudel/segmenter.
        source_format (`str`, defaults to `"auto"`): One of `SOURCE_FORMATS`, or `"auto"` to tell by the keys.
        label_set (`str`, *optional*): Name of a label set, or path of a JSON file with one. By default the checkpoint
            and the name of its dataset say what the classes are called.
        overwrite (`bool`, defaults to `False`): Whether to replace a model that is already in `output_dir`.

    Returns:
        `Path`: `output_dir`, for `AutoModelForSemanticSegmentation.from_pretrained` and
        `AutoImageProcessor.from_pretrained` (`AutoModel` for an encoder).

    Raises:
        FileNotFoundError: If a file is missing.
        FileExistsError: If `output_dir` holds anything and is not to be overwritten.
        ValueError: If a file is damaged, hostile, of an unknown format, or weights are missing, left over, of another
            shape or not finite, or the label set has another number of classes.

    Example:

    ```python
    >>> from segmenter_hf import convert_checkpoint

    >>> convert_checkpoint("seg_tiny_mask/checkpoint.pth", "segmenter-tiny-mask-ade20k")
    ```
    """
    checkpoint_path, output_dir = Path(checkpoint_path), Path(output_dir)
    check_output(output_dir, overwrite, checkpoint_path)
    labels = None if label_set is None else load_label_set(label_set)

    checkpoint = read_checkpoint(checkpoint_path)
    module = SOURCE_FORMATS[detect_format(checkpoint, source_format)]
    conversion = module.convert(checkpoint, None if config_path is None else Path(config_path))
    weights = rename_weights(conversion, checkpoint.path)
    label_config, do_reduce_labels = resolve_labels(conversion, labels)
    provenance = {
        "source": conversion.source,
        "file": checkpoint.path.name,
        "sha256": sha256_of(checkpoint.path),
        "conversion_version": CONVERSION_VERSION,
    }
    try:
        with torch.device("meta"):
            config = conversion.model_class.config_class(**conversion.config, **label_config, provenance=provenance)
            model = conversion.model_class(config)
        processor = SegmenterImageProcessor(**conversion.processor | {"do_reduce_labels": do_reduce_labels})
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: what its configuration says is not valid. {error}") from error
    load_weights(model, weights, checkpoint.path)

    with replaced_directory(output_dir.absolute()) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        check_output(output_dir, overwrite, checkpoint_path)
    return output_dir


def detect_format(checkpoint: Checkpoint, source_format: str = "auto") -> str:
    """Name of the format of a checkpoint.

    Args:
        checkpoint (`Checkpoint`): The weights.
        source_format (`str`, defaults to `"auto"`): The name, if it is known.

    Returns:
        `str`: A key of `SOURCE_FORMATS`.

    Raises:
        ValueError: If the keys are of no known format, or not of the one named.
    """
    if source_format not in (*SOURCE_FORMATS, "auto"):
        raise ValueError(f"`source_format` must be auto or one of {', '.join(SOURCE_FORMATS)}, got {source_format!r}.")
    for name in SOURCE_FORMATS if source_format == "auto" else [source_format]:
        if SOURCE_FORMATS[name].matches(checkpoint):
            return name
    raise ValueError(
        f"{checkpoint.path}: expected the keys of {' or '.join(SOURCE_FORMATS)}"
        f"{'' if source_format == 'auto' else f', said to be {source_format}'}, got {list(checkpoint.state_dict)[:5]}."
    )


def resolve_labels(conversion: Conversion, label_set: LabelSet | None) -> tuple[dict[str, Any], bool]:
    """What the classes are called, and whether stored label 0 is none of them.

    The label set that was asked for comes first, then the names in the checkpoint, then the packaged set of its dataset
    with as many classes, then names by number.

    Returns:
        `tuple[dict[str, Any], bool]`: Arguments of the configuration, and `do_reduce_labels` of the processor.

    Raises:
        ValueError: If names were given for another number of classes.
    """
    count, do_reduce_labels = conversion.num_labels, conversion.processor.get("do_reduce_labels", False)
    if count is None:
        if label_set is not None:
            raise ValueError(f"An encoder has no classes: do not give the label set {label_set.name!r}.")
        return {}, do_reduce_labels
    if label_set is None and not conversion.class_names:
        packaged = [load_label_set(name) for name in conversion.label_sets]
        label_set = next((candidate for candidate in packaged if candidate.num_labels == count), None)
    if label_set is not None:
        names, do_reduce_labels = label_set.labels, label_set.reduce_labels
    else:
        names = conversion.class_names or tuple(f"LABEL_{i}" for i in range(count))
    if len(names) != count:
        raise ValueError(
            f"Expected the names of {count} classes, as many as the checkpoint has, got {len(names)}: {list(names)[:3]}... "
            "Give a fitting label_set: a name, or a JSON file with a list of names."
        )
    id2label = dict(enumerate(names))
    return {"id2label": id2label, "label2id": {name: i for i, name in id2label.items()}}, do_reduce_labels


def check_output(output_dir: Path, overwrite: bool, checkpoint_path: Path) -> None:
    """Refuse to write over anything but a model, and that only when told to, and never over the source.

    Raises:
        FileExistsError: If `output_dir` must not be written.
    """
    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{output_dir} exists and is not empty. Choose another directory, or set overwrite.")
    if not (output_dir / "config.json").is_file():
        raise FileExistsError(
            f"{output_dir} is not the directory of a model, so it is not overwritten. Choose another."
        )
    if checkpoint_path.resolve().is_relative_to(output_dir.resolve()):
        raise FileExistsError(f"{output_dir} holds the checkpoint itself. Choose another directory.")


__all__ = ["SOURCE_FORMATS", "convert_checkpoint"]
