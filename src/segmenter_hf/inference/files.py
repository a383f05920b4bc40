"""Image files to label maps and overlays."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ..data.image_loading import find_images
from ..data.label_sets import LabelSet
from ..models.image_io import read_channels
from ..utils.atomic_files import atomic_write
from .attention import attention_image, torch_model
from .predictor import Predictor, Segmentation
from .protocol import InferenceProtocol
from .pseudo_labels import ConfidenceRule, confident_classes, pseudo_label_set
from .scenes import is_scene, predict_scene
from .visualization import as_rgb, label_map_image, overlay, preview, with_legend


SAMPLE_IMAGE = Path(__file__).parent / "sample.jpg"  # a drawn street scene, for whoever has no image yet
MAX_NAME_BYTES = 255  # of a file, on nearly all file systems
MAX_OVERLAY_SIDE = 4096  # pixels; larger images are reduced before they are painted


def plan_results(images: Mapping[str, Path], output_dir: Path, endings: Sequence[str]) -> dict[str, list[Path]]:
    """The files to write for each image, before anything is written.

    Args:
        images (`Mapping[str, Path]`): The file of each name, as from `find_images`.
        output_dir (`Path`): Where the results go.
        endings (`Sequence[str]`): What follows the name in the name of each result.

    Returns:
        `dict[str, list[Path]]`: By the name of the image, in the order of `endings`.

    Raises:
        ValueError: If one would replace an image or another, or its name is too long.
    """
    inputs = {_identity(path) for path in images.values() if path.exists()}
    planned: dict[Path, str] = {}
    results: dict[str, list[Path]] = {}
    for name, image in images.items():
        results[name] = [output_dir / f"{name}{ending}" for ending in endings]
        for path in results[name]:
            if len(os.fsencode(path.name)) > MAX_NAME_BYTES:
                raise ValueError(f"{image}: the name of its result {path.name} would be too long: rename the image.")
            if path.exists() and _identity(path) in inputs:
                raise ValueError(f"{path} is one of the images and would be lost: give another `output_dir`.")
            if path in planned:
                both = f"{images[planned[path]]} and {image}"
                raise ValueError(f"{both} would both be written to {path}: rename one, or give them one by one.")
            planned[path] = name
    return results


def _identity(path: Path) -> tuple[int, int]:
    """What files have in common that are one, whatever they are called."""
    status = path.stat()
    return status.st_dev, status.st_ino


def open_image(path: Path, max_image_pixels: int, num_channels: int = 3) -> Image.Image | np.ndarray:
    """Read an image file of a bounded size, upright: see [`read_channels`].

    Raises:
        ValueError: If it has more pixels, or is none.
    """
    try:
        return read_channels(path, num_channels, max_image_pixels)
    except OSError as error:
        raise ValueError(str(error)) from error


def save_label_map(segmentation: np.ndarray, label_set: LabelSet, path: Path) -> None:
    """Write a label map."""
    with atomic_write(path) as temporary:
        label_map_image(segmentation, label_set.palette).save(temporary)


def reduced(
    image: Image.Image | np.ndarray, segmentations: Sequence[np.ndarray]
) -> tuple[Image.Image | np.ndarray, list[np.ndarray]]:
    """An image and segmentations (height, width) of it, by a whole factor smaller where it is too large to look at.

    An array (channels, height, width) stays one.
    """
    height, width = segmentations[0].shape
    factor = -(-max(height, width) // MAX_OVERLAY_SIDE)
    if factor == 1:
        return image, list(segmentations)
    rows, columns = (
        np.minimum(np.arange(max(side // factor, 1)) * factor + factor // 2, side - 1) for side in (height, width)
    )
    if isinstance(image, np.ndarray):
        image = image[:, rows][:, :, columns]
    else:
        image = as_rgb(image.resize((len(columns), len(rows)), Image.Resampling.BOX))
    return image, [segmentation[rows][:, columns] for segmentation in segmentations]


def save_overlay(image: Image.Image, segmentation: np.ndarray, label_set: LabelSet, path: Path) -> None:
    """Write an image with its segmentation and a legend."""
    shown = overlay(image, segmentation, label_set.palette, ignore_index=label_set.ignore_index)
    with atomic_write(path) as temporary:
        with_legend(
            shown, segmentation, label_set.id2label, label_set.palette, ignore_index=label_set.ignore_index
        ).save(temporary)


def predict_files(
    predictor: Predictor,
    paths: Sequence[str | Path],
    output_dir: str | Path,
    *,
    attention: bool = False,
    vectorize: bool = False,
    min_confidence: float | None = None,
    show_progress: bool = True,
) -> dict[str, Path]:
    """Segment image files; write `NAME.png`, the label map, and `NAME_overlay.png`, the image with a legend.

    The pixels of a label map are class ids; it has the size of the image, turned upright by its EXIF orientation. The
    overlay of an image with a side of more than 4096 pixels is reduced by a whole factor.

    With `full_resolution` of the protocol, a TIFF that has a coordinate reference system, is stored in tiles or is too large
    gives `NAME.tif` instead: see [`predict_scene`]. Needs rasterio.

    Args:
        predictor ([`Predictor`]): The model and the protocol.
        paths (`Sequence` of `str` or `Path`): Image files and folders of them.
        output_dir (`str` or `Path`): Where the results go.
        attention (`bool`, defaults to `False`): Whether to write `NAME_attention.png` too: what the largest classes of the
            image attend to (see [`attention_image`]).
        vectorize (`bool`, defaults to `False`): Whether to write `NAME.geojson` too, the regions of a scene as polygons.
        min_confidence (`float`, *optional*): Pixels whose class has a lower probability get the ignore index.
        show_progress (`bool`, defaults to `True`): Whether to show a progress bar.

    Returns:
        `dict[str, Path]`: The label map of each image, by name.

    Raises:
        FileNotFoundError: If a path does not exist or a folder holds no image.
        ValueError: If a result would replace an image or another result, or there is no such result of a scene or of an
            exported model, before anything is written. If images cannot be read or segmented, after all others are done;
            names each.
    """
    images, scenes = _split_scenes(find_images(paths), predictor.protocol)
    if attention:
        torch_model(predictor)
    _check_options(images, scenes, vectorize, {"attention": attention, "min_confidence": min_confidence is not None})
    outputs = {
        **plan_results(scenes, Path(output_dir), [".tif", *([".geojson"] if vectorize else [])]),
        **plan_results(images, Path(output_dir), [".png", "_overlay.png", *(["_attention.png"] if attention else [])]),
    }
    rule = None if min_confidence is None else ConfidenceRule(min_confidence)
    with tqdm(total=len(images), desc="Segmenting", unit="image", disable=not show_progress) as progress:
        errors = _predict_scenes(predictor, scenes, outputs)
        errors |= _predict_images(predictor, images, outputs, rule, progress)
    if errors:
        listed = "\n  ".join(errors.values())
        raise ValueError(f"{len(errors)} of {len(outputs)} images cannot be read, the others are done:\n  {listed}")
    return {name: paths[0] for name, paths in outputs.items()}


def _split_scenes(images: Mapping[str, Path], protocol: InferenceProtocol) -> tuple[dict[str, Path], dict[str, Path]]:
    """The images that are read as a whole, and the scenes, which are streamed."""
    is_streamed = {
        name: protocol.full_resolution and is_scene(path, protocol.max_image_pixels) for name, path in images.items()
    }
    whole, streamed = (
        {name: path for name, path in images.items() if is_streamed[name] == wanted} for wanted in (False, True)
    )
    return whole, streamed


def _check_options(
    images: Mapping[str, Path], scenes: Mapping[str, Path], vectorize: bool, of_images: Mapping[str, bool]
) -> None:
    """Refuse options that some of the images or scenes have no results of; `of_images` are those of images, if given.

    Raises:
        ValueError: If there are such.
    """
    if vectorize and images:
        raise ValueError(
            f"{next(iter(images.values()))}: polygons are for a GeoTIFF with a coordinate reference system, segmented with "
            "`full_resolution`, by rasterio (`pip install segmenter-hf[geo]`)."
        )
    name = next((name for name, is_given in of_images.items() if is_given), None)
    if scenes and name is not None:
        raise ValueError(
            f"{next(iter(scenes.values()))}: `{name}` is for images, not for a scene that is streamed by "
            "`full_resolution`. Leave one of both out."
        )


def _predict_scenes(
    predictor: Predictor, scenes: Mapping[str, Path], outputs: Mapping[str, Sequence[Path]]
) -> dict[str, str]:
    """Segment and write scenes; what is wrong with those that cannot be read, by name."""
    errors = {}
    for name, path in scenes.items():
        try:
            predict_scene(predictor, path, *outputs[name])
        except (OSError, ValueError) as error:
            errors[name] = _naming(path, error)
    return errors


def _predict_images(
    predictor: Predictor,
    images: Mapping[str, Path],
    outputs: Mapping[str, Sequence[Path]],
    rule: ConfidenceRule | None,
    progress: "tqdm[Any]",
) -> dict[str, str]:
    """Segment and write images; what is wrong with those that cannot be read, by name."""
    limit, channels = predictor.protocol.max_image_pixels, predictor.processor.num_channels
    items = ((name, partial(open_image, path, limit, channels)) for name, path in images.items())
    errors = {}
    for result in predictor.stream(items, return_scores=rule is not None, dtype=predictor.class_map_dtype):
        name, path = result.key, images[result.key]
        if result.error is not None:
            errors[name] = _naming(path, result.error)
        else:
            save_results(predictor, result, path, outputs[name], rule)
        del result  # a large map is not held while the next image is read
        progress.update()
    return errors


def _naming(path: Path, error: Exception) -> str:
    """What is wrong with a file, with its path."""
    message = str(error)
    return message if str(path) in message else f"{path}: {message}"


def save_results(
    predictor: Predictor,
    result: Segmentation,
    path: Path,
    outputs: Sequence[Path],
    rule: ConfidenceRule | None = None,
) -> None:
    """Write the label map, the overlay and, for a third output, the attention of one image.

    Args:
        predictor ([`Predictor`]): What segmented it.
        result ([`Segmentation`]): Its segmentation.
        path (`Path`): The image. It is read again: to keep large images until their maps are there would take more memory
            than the maps.
        outputs (`Sequence[Path]`): The files to write.
        rule ([`ConfidenceRule`], *optional*): Which pixels keep their class; the result then has scores.
    """
    label_set, classes = predictor.label_set, result.known_class_map().cpu().numpy()
    class_map = classes
    if rule is not None:
        label_set = pseudo_label_set(label_set)
        thresholds = np.full(label_set.num_labels, rule.min_confidence, np.float32)
        class_map = confident_classes(result, thresholds, label_set.ignore_index)
    label_map, overlaid, *attended = outputs
    save_label_map(class_map, label_set, label_map)
    opened = open_image(path, predictor.protocol.max_image_pixels, predictor.processor.num_channels)
    image, (class_map, classes) = reduced(opened, [class_map, classes])
    save_overlay(preview(image, channels_first=True), class_map, label_set, overlaid)
    for output in attended:
        shown = attention_image(predictor, image, classes)
        with atomic_write(output) as temporary:
            shown.save(temporary)


__all__ = ["SAMPLE_IMAGE", "predict_files"]
