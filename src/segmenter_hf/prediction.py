"""Prediction with the published protocol: images in memory, and files to label maps and overlays."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import (
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    BaseImageProcessor,
    PreTrainedModel,
)

from .files import replaced_file
from .image_processing_segmenter import read_image
from .label_sets import LabelSet, label_set_of_model, load_label_set
from .visualization import label_map_image, overlay, with_legend


MULTI_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)

Picture = Image.Image | np.ndarray | torch.Tensor


def protocol_arguments(multi_scale_flip: bool) -> dict[str, Any]:
    """The processor's arguments for the single-scale or the multi-scale + flip protocol of the papers."""
    return {"scales": list(MULTI_SCALES) if multi_scale_flip else [1.0], "do_flip": multi_scale_flip}


def describe_protocol(processor: BaseImageProcessor, multi_scale_flip: bool) -> dict[str, Any]:
    """Everything that a number depends on besides model and data, to be saved beside it."""
    return {
        "name": "multi-scale + flip" if multi_scale_flip else "single scale",
        **protocol_arguments(multi_scale_flip),
        "size": dict(processor.size),
        "window_size": processor.window_size,
        "window_stride": processor.window_stride,
        "resample": "bilinear without antialiasing",
        "resolution": "original size of each image",
    }


def load_model(
    name_or_path: str | Path, label_set: str | None = None, device: str | None = None
) -> tuple[PreTrainedModel, BaseImageProcessor, LabelSet]:
    """Load a model with its image processor and label set.

    Args:
        name_or_path (`str` or `Path`): Directory or Hub name of the model.
        label_set (`str`, *optional*): Name or JSON file of a label set; by default the one that belongs to the model.
        device (`str`, *optional*): Where the model goes; by default a GPU where there is one.

    Returns:
        `tuple[PreTrainedModel, BaseImageProcessor, LabelSet]`: The model in evaluation mode, and what belongs to it.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForSemanticSegmentation.from_pretrained(name_or_path).to(device).eval()
    processor = AutoImageProcessor.from_pretrained(name_or_path)
    if label_set is not None:
        return model, processor, load_label_set(label_set)
    return model, processor, label_set_of_model(name_or_path, model.config.id2label)


@torch.no_grad()
def segment_images(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    images: Sequence[Picture],
    *,
    multi_scale_flip: bool = False,
    window_batch_size: int = 8,
    return_segmentation_scores: bool = False,
) -> list:
    """Segment images of any sizes with the published protocol.

    Args:
        model (`PreTrainedModel`): A semantic segmentation model of this package, in evaluation mode.
        processor (`BaseImageProcessor`): Its image processor.
        images (`Sequence` of PIL images, arrays or tensors): The images, one by one through the network.
        multi_scale_flip (`bool`, defaults to `False`): Whether to average over six scales, each also mirrored.
        window_batch_size (`int`, defaults to 8): Windows that go through the network at once; bounds its memory.
        return_segmentation_scores (`bool`, defaults to `False`): Whether class probabilities are wanted too.

    Returns:
        `list`: What `processor.post_process_semantic_segmentation` returns for each image, on the model's device.

    Raises:
        ValueError: If `window_batch_size` is below 1 or an image is not one.
    """
    if window_batch_size < 1:
        raise ValueError(f"`window_batch_size` must be at least 1, got {window_batch_size}.")
    results = []
    for image in images:
        inputs = processor(images=image, return_tensors="pt", **protocol_arguments(multi_scale_flip))
        chunks = zip(*(inputs[name].split(window_batch_size) for name in ("pixel_values", "window_offsets")))
        outputs = None
        logits = []
        for pixel_values, window_offsets in chunks:
            outputs = model(pixel_values=pixel_values.to(model.device, model.dtype), window_offsets=window_offsets)
            logits.append(outputs.logits)
        outputs.logits, outputs.window_offsets = torch.cat(logits), inputs["window_offsets"]
        results += processor.post_process_semantic_segmentation(
            outputs, return_segmentation_scores=return_segmentation_scores
        )
    return results


IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def find_pictures(paths: Sequence[str | Path]) -> dict[str, Path]:
    """The pictures among files and below folders, by the name that their results get.

    Args:
        paths (`Sequence` of `str` or `Path`): Picture files, which may have any suffix, and folders of pictures.

    Returns:
        `dict[str, Path]`: The file of each name. A name is the path below its folder without the suffix, and is made
        unique with a number where two files share it.

    Raises:
        FileNotFoundError: If a path does not exist or a folder holds no picture.
    """
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
            names = [file.relative_to(path).with_suffix("") for file in files]
        else:
            files, names = [path] if path.is_file() else [], [Path(path.stem)]
        if not files:
            raise FileNotFoundError(
                f"{path}: no picture there. Expected a picture, or a folder with {', '.join(sorted(IMAGE_SUFFIXES))} files."
            )
        for file, name in zip(files, names):
            unique, number = name.as_posix(), 1
            while unique in found:
                number += 1
                unique = f"{name.as_posix()}-{number}"
            found[unique] = file
    return found


def predict_files(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    paths: Sequence[str | Path],
    output_dir: str | Path,
    label_set: LabelSet,
    *,
    multi_scale_flip: bool = False,
    window_batch_size: int = 8,
    show_progress: bool = True,
) -> dict[str, Path]:
    """Segment picture files; write `NAME.png`, the label map, and `NAME_overlay.png`, the picture with a legend.

    The pixels of a label map are class ids; it has the size of the picture, turned upright by its EXIF orientation.

    Args:
        model (`PreTrainedModel`), processor (`BaseImageProcessor`): The model and its image processor.
        paths (`Sequence` of `str` or `Path`): Picture files and folders of them.
        output_dir (`str` or `Path`): Where the results go.
        label_set (`LabelSet`): Names and colours of the model's classes.
        multi_scale_flip (`bool`, defaults to `False`): Whether to average over six scales, each also mirrored.
        window_batch_size (`int`, defaults to 8): Windows that go through the network at once.
        show_progress (`bool`, defaults to `True`): Whether to show a progress bar.

    Returns:
        `dict[str, Path]`: The label map of each picture, by name.

    Raises:
        FileNotFoundError: If a path does not exist or a folder holds no picture.
        ValueError: If pictures cannot be read, after all others are done; names each.
    """
    model.eval()
    written: dict[str, Path] = {}
    unreadable: list[str] = []
    pictures = find_pictures(paths)
    for name, path in tqdm(pictures.items(), desc="Segmenting", unit="image", disable=not show_progress):
        try:
            picture = read_image(path)
            picture.load()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            unreadable.append(f"{path}: {error}")
            continue
        (segmentation,) = segment_images(
            model, processor, [picture], multi_scale_flip=multi_scale_flip, window_batch_size=window_batch_size
        )
        segmentation = segmentation.cpu().numpy()
        shown = overlay(picture.convert("RGB"), segmentation, label_set.palette)
        shown = with_legend(shown, segmentation, label_set.id2label, label_set.palette)
        label_map = Path(output_dir) / f"{name}.png"
        for target, image in (
            (label_map, label_map_image(segmentation, label_set.palette)),
            (label_map.with_name(f"{label_map.stem}_overlay.png"), shown),
        ):
            with replaced_file(target) as temporary:
                image.save(temporary)
        written[name] = label_map
    if unreadable:
        listed = "\n  ".join(unreadable)
        raise ValueError(
            f"{len(unreadable)} of {len(pictures)} pictures cannot be read, the others are done:\n  {listed}"
        )
    return written
