"""Convert checkpoints of other systems into directories that `from_pretrained` reads."""

import hashlib
import logging
import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from ..data.label_sets import LABEL_SET_FILE, LabelSet, label_set_from_names, list_label_sets, load_label_set
from ..inference.model_files import MODEL_FILES, check_replaceable
from ..models.image_processing_segmenter import SegmenterImageProcessor
from ..utils.atomic_files import atomic_directory
from ..utils.folders import lies_within
from ..utils.messages import one_line
from . import dinov2_heads, mmsegmentation, paddlevit, rstrudel, setr, vit_checkpoints
from .adaptation import adapt
from .safe_loading import Checkpoint, read_checkpoint, sha256_of
from .state_dicts import Conversion, load_weights, rename_weights
from .verification import Verification, verify_directory


logger = logging.getLogger(__name__)


PACKAGE = Path(__file__).parents[1]
CODE = (
    "conversion/*.py",
    "models/*.py",
    "data/label_sets/*.json",
    "data/label_set*.py",
)  # what the result of a conversion depends on
SOURCE_FORMATS = {
    "rstrudel": rstrudel,
    "mmsegmentation": mmsegmentation,
    "setr": setr,
    "paddlevit": paddlevit,
    "dinov2_head": dinov2_heads,
    "vit": vit_checkpoints,
}


class Converted(NamedTuple):
    """A model in memory with what is saved beside it, and the keys of its source, used and knowingly unused."""

    model: PreTrainedModel
    processor: SegmenterImageProcessor
    labels: LabelSet | None
    source_keys: list[str]
    unused: list[str]

    def save(self, directory: Path) -> None:
        """Write the model, its image processor and its label set."""
        self.model.save_pretrained(directory)
        self.processor.save_pretrained(directory)
        if self.labels is not None:
            self.labels.save(directory / LABEL_SET_FILE)

    def verify(self, directory: Path) -> Verification:
        """Compare what was written with the model: see [`verify_directory`]."""
        return verify_directory(self.model, directory, self.source_keys, self.unused)


def convert_checkpoint(
    checkpoint_path: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    config_path: str | os.PathLike | None = None,
    encoder_path: str | os.PathLike | None = None,
    source_format: str = "auto",
    label_set: str | None = None,
    image_size: int | None = None,
    num_channels: int | None = None,
    model_type: str | None = None,
    source_url: str | None = None,
    verify: bool = False,
    overwrite: bool = False,
) -> Path:
    """Convert a checkpoint of another system into a directory with model, configuration and image processor.

    Nothing in the files is run, every weight is accounted for, and the directory appears only when it is complete.

    Args:
        checkpoint_path (`str` or `os.PathLike`): The file of the weights, or a directory that holds one.
        output_dir (`str` or `os.PathLike`): The directory to write.
        config_path (`str` or `os.PathLike`, *optional*): The configuration of the weights. By default `variant.yml` beside
            the checkpoint for rstrudel/segmenter, `..._config.py` for a head of DINOv2.
        encoder_path (`str` or `os.PathLike`, *optional*): The encoder of a checkpoint that is a head alone.
        source_format (`str`, defaults to `"auto"`): One of `SOURCE_FORMATS`, or `"auto"` to tell by the keys.
        label_set (`str`, *optional*): Name of a label set, or path of a file with one. By default the checkpoint
            and the name of its dataset say what the classes are called.
        image_size (`int`, *optional*): Side in pixels of the grid to which the position embeddings are resized.
        num_channels (`int`, *optional*): Channels of the images, to which the patch embedding is adapted.
        model_type (`str`, *optional*): `"segmenter"` (the default) or `"setr"`, for a checkpoint that is an encoder.
        source_url (`str`, *optional*): Where the checkpoint is from, to be noted in the configuration.
        verify (`bool`, defaults to `False`): Whether to compare the result with the source: see [`verify_conversion`].
        overwrite (`bool`, defaults to `False`): Whether to replace a model that is already in `output_dir`.

    Returns:
        `Path`: `output_dir`, for `from_pretrained` of the Auto classes (`AutoModel` for an encoder).

    Raises:
        FileNotFoundError: If a file is missing.
        FileExistsError: If `output_dir` holds anything and is not to be overwritten.
        ValueError: If a file is damaged, hostile, of an unknown format, or weights are missing, left over, of another
            shape or not finite, or the label set has another number of classes, or an option does not fit.

    Example: `convert_checkpoint("seg_tiny_mask/checkpoint.pth", "segmenter-tiny-mask-ade20k")`.
    """
    checkpoint_path, output_dir = Path(checkpoint_path), Path(output_dir)
    check_output(output_dir, overwrite, checkpoint_path)
    converted = build(
        checkpoint_path, config_path, encoder_path, source_format, label_set, image_size, num_channels, model_type
    )
    if source_url is not None:
        converted.model.config.provenance["url"] = source_url
    with atomic_directory(output_dir.absolute()) as temporary:
        converted.save(temporary)
        if verify:
            logger.info("%s", converted.verify(temporary))
        check_output(output_dir, overwrite, checkpoint_path)
    return output_dir


def verify_conversion(
    checkpoint_path: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    config_path: str | os.PathLike | None = None,
    encoder_path: str | os.PathLike | None = None,
    source_format: str = "auto",
    image_size: int | None = None,
    num_channels: int | None = None,
    model_type: str | None = None,
) -> Verification:
    """Compare a converted directory with its source: all tensors, and the output of a forward pass.

    Args:
        checkpoint_path (`str` or `os.PathLike`): The checkpoint that was converted.
        output_dir (`str` or `os.PathLike`): What it was converted into.
        config_path, encoder_path, source_format, image_size, num_channels, model_type: As they were for [`convert_checkpoint`].

    Returns:
        `Verification`: What was compared; `str()` of it is a sentence.

    Raises:
        ValueError: If weights or the output differ.
    """
    converted = build(
        Path(checkpoint_path), config_path, encoder_path, source_format, None, image_size, num_channels, model_type
    )
    return converted.verify(Path(output_dir))


@cache
def conversion_version(package: Path = PACKAGE) -> str:
    """Digest of the code that converts, so that what other code converted is not taken for what this one would.

    Args:
        package (`Path`): The folder of the package; a parameter for tests.

    Returns:
        `str`: The first 16 hexadecimal digits of a SHA-256.
    """
    digest = hashlib.sha256()
    for path in sorted(path for pattern in CODE for path in package.glob(pattern)):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def build(
    checkpoint_path: Path,
    config_path: str | os.PathLike | None,
    encoder_path: str | os.PathLike | None,
    source_format: str,
    label_set: str | None,
    image_size: int | None,
    num_channels: int | None,
    model_type: str | None,
) -> Converted:
    """Read a checkpoint and make its model; arguments and errors are those of [`convert_checkpoint`]."""
    labels = None if label_set is None else load_label_set(label_set)
    checkpoint = read_checkpoint(checkpoint_path)
    name = detect_format(checkpoint, source_format)
    if encoder_path is not None:
        checkpoint = with_encoder(checkpoint, Path(encoder_path), name)
    module = SOURCE_FORMATS[name]
    conversion = module.convert(checkpoint, None if config_path is None else Path(config_path))
    weights = rename_weights(conversion, checkpoint.path)
    changes: dict[str, Any] = {"image_size": image_size, "num_channels": num_channels, "model_type": model_type}
    conversion, weights = adapt(conversion, weights, **changes)
    labels = resolve_labels(conversion, labels)
    provenance = {
        "source": conversion.source,
        "file": checkpoint.path.name,
        "sha256": sha256_of(checkpoint.path),
        "conversion_version": conversion_version(),
        **{name: value for name, value in changes.items() if value is not None},
    }
    source_keys = list(checkpoint.state_dict)
    if checkpoint.encoder is not None:
        provenance["encoder_file"] = checkpoint.encoder.path.name
        provenance["encoder_sha256"] = sha256_of(checkpoint.encoder.path)
        source_keys += list(checkpoint.encoder.state_dict)
    try:
        with torch.device("meta"):
            fields = {**conversion.config, **label_fields(conversion, labels), "provenance": provenance}
            model = conversion.model_class(conversion.model_class.config_class(**fields))
        reduce = {} if labels is None else {"do_reduce_labels": labels.reduce_labels}
        processor = SegmenterImageProcessor(**conversion.processor | reduce)
    except (ValueError, RuntimeError) as error:  # sizes whose product overflows
        raise ValueError(f"{checkpoint.path}: what its configuration says is not valid. {one_line(error)}") from error
    load_weights(model, weights, checkpoint.path)
    used = {weight.source for weight in weights.values()}
    return Converted(model, processor, labels, source_keys, [key for key in source_keys if key not in used])


def with_encoder(checkpoint: Checkpoint, encoder_path: Path, source_format: str) -> Checkpoint:
    """A head with its encoder.

    Raises:
        ValueError: If the checkpoint is no head, or the encoder is none.
    """
    if source_format != "dinov2_head":
        raise ValueError(f"{checkpoint.path} has an encoder, or is one: leave out `encoder_path` ({encoder_path}).")
    encoder = read_checkpoint(encoder_path)
    detect_format(encoder, "vit")
    return replace(checkpoint, encoder=encoder)


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
    vit_checkpoints.check_plain(checkpoint)
    raise ValueError(
        f"{checkpoint.path}: expected the keys of {' or '.join(SOURCE_FORMATS)}"
        f"{'' if source_format == 'auto' else f', said to be {source_format}'}, got {list(checkpoint.state_dict)[:5]}."
    )


def resolve_labels(conversion: Conversion, label_set: LabelSet | None) -> LabelSet | None:
    """What the classes are called, their colors, and whether stored label 0 is none of them.

    The label set that was asked for comes first, then the names in the checkpoint, then the packaged set of its dataset
    with as many classes; else the names are not known.

    Raises:
        ValueError: If names were given for another number of classes.
    """
    count = conversion.num_labels
    if count is None:
        if label_set is not None:
            raise ValueError(f"An encoder has no classes: do not give the label set {label_set.name!r}.")
        return None
    names = conversion.class_names
    if label_set is None and not names:
        packaged = [load_label_set(name) for name in conversion.label_sets]
        label_set = next((candidate for candidate in packaged if candidate.num_labels == count), None)
        if label_set is None:
            return None
    names = names if label_set is None else label_set.labels
    if len(names) != count:
        raise ValueError(
            f"Expected the names of {count} classes, as many as the checkpoint has, got {len(names)}: {list(names)[:3]}... "
            "Give a fitting label_set: a name, or a file with a list of names."
        )
    label_set = label_set or next(
        (known for known in map(load_label_set, list_label_sets()) if known.labels == names), None
    )
    if label_set is not None:
        return label_set
    named = label_set_from_names(names, name="checkpoint")
    reduce_labels = conversion.processor.get("do_reduce_labels", False)
    colors = conversion.palette if len(conversion.palette) == count else named.colors
    return replace(named, colors=colors, reduce_labels=reduce_labels)


def label_fields(conversion: Conversion, labels: LabelSet | None) -> dict[str, Any]:
    """Names of the classes as arguments of the configuration, by number where they are not known."""
    if conversion.num_labels is None:
        return {}
    if labels is None:
        return {"num_labels": conversion.num_labels}
    return {
        "id2label": labels.id2label,
        "label2id": labels.label2id,
        "semantic_loss_ignore_index": labels.ignore_index,
    }


def check_output(output_dir: Path, overwrite: bool, checkpoint_path: Path) -> None:
    """Refuse to write over anything but a model, and that only when told to, and never over the source.

    Raises:
        FileExistsError: If `output_dir` must not be written.
    """
    if lies_within(checkpoint_path, output_dir):
        raise FileExistsError(f"{output_dir} holds the checkpoint itself. Choose another directory.")
    check_replaceable(output_dir, overwrite, MODEL_FILES)


__all__ = ["SOURCE_FORMATS", "Verification", "convert_checkpoint", "verify_conversion"]
