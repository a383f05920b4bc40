"""Masks that annotation files describe, as polygons, run lengths or segments: kept in rows as JSON, drawn when decoded."""

import base64
import binascii
import io
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..models.image_io import IMAGE_FORMATS, MAX_IMAGE_PIXELS
from ..utils.json_files import parse_json
from .encoded_images import DESCRIBED_MASK, encoded_bytes
from .label_set_files import IGNORE_NAME
from .label_sets import LabelSet


BACKGROUND_NAMES = ("background", "_background_")
MAX_OUTLINE = 4_000_000  # pixels along a polygon; pycocotools allocates 5 points for each, and crashes where it cannot
LINE_WIDTH, POINT_RADIUS = 10, 5  # pixels, as labelme draws lines and points


def describe(path: str, content: dict[str, Any]) -> dict[str, Any]:
    """A row's mask, `{"bytes", "path"}`, of what an annotation file says.

    Args:
        path (`str`): The annotation file, or the PNG file of `segments`.
        content (`dict`): Either `size` (height, width) and `objects`, pairs of a class name and what it covers, of which later
            ones lie above earlier ones: `{"polygons": [[x, y, ...], ...]}` and `{"counts", "size"}` as in COCO, where large
            ones lie below small ones, or `{"shape_type", "points"}` as in labelme. Or `segments`: the class name of each id
            of a panoptic PNG.
    """
    return {"bytes": DESCRIBED_MASK + json.dumps(content, separators=(",", ":")).encode(), "path": path}


def is_described(value: Any) -> bool:
    """Whether the mask of a row is described, not stored."""
    return isinstance(value, dict) and (value["bytes"] or b"").startswith(DESCRIBED_MASK)


def draw_mask(value: dict[str, Any], label_set: LabelSet | None, name: str) -> Image.Image:
    """Draw a described mask.

    Args:
        value (`dict`): As from `describe`, and `folders` as for `encoded_bytes`.
        label_set (`LabelSet`): The classes by name. What no object covers is the class background, or ignored where there is
            none.
        name (`str`): What to call the mask in errors.

    Returns:
        `Image.Image`: Class ids.

    Raises:
        ImportError: If pycocotools, which draws what COCO describes, is missing.
        ValueError: If there is no label set, it lacks a class, or the description is wrong.
    """
    if label_set is None:
        raise ValueError(
            f"{name}: the mask names its classes: give a label set, such as `dataset_label_set` of the dataset."
        )
    try:
        content = parse_json(value["bytes"][len(DESCRIBED_MASK) :], name)
        if "segments" in content:
            ids = _segment_ids(value, content["segments"], label_set, name)
        else:
            ids = _object_ids(content, label_set, name)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{name}: the annotation is not of the form that it should have: {error!r}.") from error
    fits = ids.min(initial=0) >= 0 and ids.max(initial=0) <= 255
    return Image.fromarray(ids.astype(np.uint8 if fits else np.int32))


def _class_id(label: str, label_set: LabelSet, name: str) -> int:
    if label == IGNORE_NAME:
        return label_set.ignore_index
    if label in label_set.labels:
        return label_set.label2id[label]
    if label.lower() in BACKGROUND_NAMES:
        return _background_id(label_set)
    raise ValueError(
        f"{name}: the annotation names the class {label!r}, which the label set {label_set.name!r} does not have: "
        f"{', '.join(label_set.labels[:20])}. Add it to the label set, or leave `label_set` out."
    )


def _background_id(label_set: LabelSet) -> int:
    found = [index for index, label in enumerate(label_set.labels) if label.lower() in BACKGROUND_NAMES]
    return found[0] if found else label_set.ignore_index


def _segment_ids(value: dict[str, Any], segments: dict[str, str], label_set: LabelSet, name: str) -> np.ndarray:
    """The class ids of a panoptic PNG, whose red, green and blue are the digits of segment ids, red the lowest."""
    encoded = encoded_bytes({"bytes": None, "path": value["path"], "folders": value.get("folders")})
    try:
        with Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS) as image:
            pixels = np.asarray(image.convert("RGB")).astype(np.int32)
    except (Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise ValueError(f"{name}: cannot be read as an image: {error}") from error
    stored, places = np.unique(pixels @ np.array([1, 256, 256**2], dtype=np.int32), return_inverse=True)
    if unknown := [i for i in stored.tolist() if i and str(i) not in segments]:
        raise ValueError(f"{name}: expected the segments that the annotation lists, got also {unknown[:5]}.")
    ids = [_class_id(segments[str(i)], label_set, name) if i else label_set.ignore_index for i in stored.tolist()]
    return np.array(ids, dtype=np.int32)[places].reshape(pixels.shape[:2])


def _object_ids(content: dict[str, Any], label_set: LabelSet, name: str) -> np.ndarray:
    height, width = content["size"]
    if not all(isinstance(side, int) and side > 0 for side in (height, width)) or height * width > MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{name}: expected a height and width of at most {MAX_IMAGE_PIXELS} pixels, got {content['size']}."
        )
    ids = np.full((height, width), _background_id(label_set), dtype=np.int32)
    described = [(_class_id(label, label_set, name), shape) for label, shape in content["objects"]]
    run_lengths = [
        (label, _coco_run_length(shape, height, width, name)) for label, shape in described if _is_coco(shape)
    ]
    if run_lengths:
        draw = _coco_mask_module()
        for label, run_length in sorted(run_lengths, key=lambda item: draw.area(item[1]), reverse=True):
            ids[draw.decode(run_length).astype(bool)] = label
    for label, shape in described:
        if not _is_coco(shape):
            ids[_labelme_mask(shape, height, width, name)] = label
    return ids


# COCO


def _is_coco(shape: dict[str, Any]) -> bool:
    return "shape_type" not in shape


def _coco_mask_module() -> Any:
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ImportError("Annotations of COCO are drawn by pycocotools: `pip install segmenter-hf[coco]`.") from error
    return mask


def _coco_run_length(shape: dict[str, Any], height: int, width: int, name: str) -> dict[str, Any]:
    """What pycocotools draws, checked: it trusts its input."""
    draw = _coco_mask_module()
    if "polygons" in shape:
        polygons = shape["polygons"]
        for polygon in polygons:
            if len(polygon) < 6 or len(polygon) % 2:
                raise ValueError(
                    f"{name}: expected polygons of three or more points x, y, got {len(polygon)} numbers."
                )
            _check_coordinates(polygon, height, width, name)
            _check_outline(polygon, name)
        if not polygons:
            raise ValueError(f"{name}: expected a polygon, got none.")
        return draw.merge(
            draw.frPyObjects([[float(value) for value in polygon] for polygon in polygons], height, width)
        )
    if shape["size"] != [height, width]:
        raise ValueError(f"{name}: expected run lengths for (height, width) {[height, width]}, got {shape['size']}.")
    counts = shape["counts"]
    counts = decode_counts(counts, name) if isinstance(counts, str) else counts
    if not all(isinstance(count, int) and count >= 0 for count in counts) or sum(counts) != height * width:
        raise ValueError(f"{name}: expected run lengths that add up to {height * width} pixels, got others.")
    return draw.frPyObjects({"size": [height, width], "counts": counts}, height, width)


def decode_counts(text: str, name: str) -> list[int]:
    """The run lengths of a string of COCO: digits of 5 bits, the lowest first; from the fourth number on differences to the
    one before the last (cocoapi, `rleFrString` in common/maskApi.c).

    Raises:
        ValueError: If it is no such string.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        digit = ord(character) - 48
        if not 0 <= digit < 64 or shift > 30:
            raise ValueError(f"{name}: expected a string of run lengths as COCO writes it, got {text!r:.60}.")
        value |= (digit & 31) << shift
        shift += 5
        if not digit & 32:
            if digit & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError(f"{name}: expected a string of run lengths as COCO writes it, got one that is cut off.")
    return counts


def _check_coordinates(values: Sequence[Any], height: int, width: int, name: str) -> None:
    """Coordinates may lie somewhat outside, but not so far that drawing them would never end."""
    limit = 2 * max(height, width)
    if not all(isinstance(v, (int, float)) and abs(v) <= limit for v in values):  # neither NaN nor infinity is
        raise ValueError(
            f"{name}: expected coordinates in pixels of an image of {height} x {width}, got {values!r:.100}."
        )


def _check_outline(polygon: Sequence[float], name: str) -> None:
    """A polygon that runs to and fro without end would fill the memory."""
    corners = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
    length = np.abs(corners - np.roll(corners, 1, axis=0)).max(axis=1).sum()
    if length > MAX_OUTLINE:
        raise ValueError(f"{name}: expected polygons of at most {MAX_OUTLINE} pixels around, got {length:.0f}.")


# labelme


def _labelme_mask(shape: dict[str, Any], height: int, width: int, name: str) -> np.ndarray:
    """The pixels of a shape, drawn as labelme's `shape_to_mask` does."""
    points = [tuple(point) for point in shape["points"]]
    _check_coordinates([value for point in points for value in point], height, width, name)
    kind = shape["shape_type"] or "polygon"
    counts = {"polygon": 3, "rectangle": 2, "circle": 2, "line": 2, "linestrip": 2, "point": 1, "mask": 2}
    if kind not in counts or len(points) < counts[kind] or any(len(point) != 2 for point in points):
        raise ValueError(
            f"{name}: expected shapes of the types {', '.join(counts)} with their points, got {kind!r:.40}."
        )
    canvas = Image.new("1", (width, height))
    draw = ImageDraw.Draw(canvas)
    if kind == "mask":
        left, top = (int(min(values)) for values in zip(*points))
        canvas.paste(_embedded_mask(shape["mask"], height, width, name), (left, top))
    else:
        _labelme_drawers(draw)[kind](points)
    return np.asarray(canvas)


def _labelme_drawers(draw: ImageDraw.ImageDraw) -> dict[str, Callable[[list[tuple[float, float]]], None]]:
    def around(point: tuple[float, float], radius: float) -> None:
        x, y = point
        draw.ellipse([(x - radius, y - radius), (x + radius, y + radius)], fill=1)

    def rectangle(points: list[tuple[float, float]]) -> None:
        (left, right), (top, bottom) = (sorted(values) for values in zip(*points[:2]))
        draw.rectangle([(left, top), (right, bottom)], fill=1)

    def line(points: list[tuple[float, float]]) -> None:
        draw.line(points, fill=1, width=LINE_WIDTH)

    return {
        "polygon": lambda points: draw.polygon(points, outline=1, fill=1),
        "rectangle": rectangle,
        "circle": lambda points: around(points[0], math.dist(*points[:2])),
        "line": line,
        "linestrip": line,
        "point": lambda points: around(points[0], POINT_RADIUS),
    }


def _embedded_mask(text: str, height: int, width: int, name: str) -> Image.Image:
    """The mask of a shape, a PNG in base64 that is as large as its box."""
    try:
        image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
        if image.width > width or image.height > height:
            raise ValueError(
                f"{name}: expected a mask of at most {height} x {width}, got {image.height} x {image.width}."
            )
        return Image.fromarray(np.asarray(image.convert("L")) > 0)  # labelme stores 0 and 1, or 0 and 255
    except (binascii.Error, Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise ValueError(f"{name}: expected the mask of a shape as PNG in base64: {error}") from error
