"""Segment an image with the exported model beside this file; needs numpy, onnxruntime and Pillow, and tifffile for TIFF of
other channels than three or of 16 bits.

    python run_onnx.py street.jpg labels.png
    python run_onnx.py street.jpg labels.png --model onnx/model_quantized.onnx

The pixels of the label map are class ids, shown in the colors of `label_set.json`. A model of one class has one logit: where
it is above 0 the pixel is 1, the class, and elsewhere 0, the background.

This is the single-scale protocol of the published numbers: resize, sliding windows, mean of the logits that overlap,
resize to the image's own size. It agrees with `post_process_semantic_segmentation` of segmenter-hf but for the rounding of
float32, which may decide where two classes are as good as equal. It is written to be read: `scales`, `do_flip` and
`do_split_windows` of `preprocessor_config.json` are not used, windows go through one at a time, and the scores of all
classes at all pixels of the resized image are in memory at once.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


HERE = Path(__file__).resolve().parent
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # tags of TIFF
MIN_IS_BLACK = 1  # its photometric interpretation of plain gray


def taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two old samples that each new one lies between, and the weight of the second, as torch resizes linearly."""
    positions = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0)
    lower = np.minimum(positions.astype(int), old - 1)
    return lower, np.minimum(lower + 1, old - 1), (positions - lower).astype(np.float32)


def blend(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    """`share` of the second and the rest of the first, in float32."""
    first = first.astype(np.float32)
    return first + share * (second - first)


def resize(values: np.ndarray, height: int, width: int, rows: slice = slice(None)) -> np.ndarray:
    """Resize (old height, old width, channels) bilinearly, without antialiasing; only `rows` of it, when given."""
    upper, lower, share = (tap[rows] for tap in taps(values.shape[0], height))
    values = blend(values[upper], values[lower], share[:, None, None])
    left, right, share = taps(values.shape[1], width)
    return blend(values[:, left], values[:, right], share[:, None])


def starts(side: int, window: int, stride: int) -> list[int]:
    """First pixels of the windows along a side; the last window ends at the border."""
    return [*range(0, side - window, stride), side - window]


def read_tiff(path: Path) -> np.ndarray:
    """The first page of a TIFF: (height, width, channels)."""
    try:
        import tifffile
    except ImportError as error:
        raise SystemExit(f"error: {path}: TIFF of this kind is read by tifffile: `pip install tifffile`.") from error
    with tifffile.TiffFile(path) as tiff:
        page, series = tiff.pages.first, tiff.series[0]
        if page.tags.valueof("Orientation", 1) != 1:
            raise ValueError(
                "the TIFF is stored turned (tag Orientation), and its pixels are read as they are. Save it upright."
            )
        is_stack = page.samplesperpixel == 1 and series.ndim == 3  # a page for each channel
        values = series.asarray() if is_stack else page.asarray()
        is_first = is_stack or page.planarconfig == tifffile.PLANARCONFIG.SEPARATE
    return np.moveaxis(values, 0, -1) if is_first and values.ndim == 3 else values


def read_npy(path: Path, channels: int) -> np.ndarray:
    """An array of numbers: (height, width, channels), however its axes are stored."""
    values = np.load(path, allow_pickle=False)
    shape = values.shape
    if len(shape) == 3 and (shape[0] == channels or (shape[-1] != channels and shape[0] < shape[-1])):
        return np.moveaxis(values, 0, -1)
    return values


def read_with_pillow(path: Path, channels: int) -> Image.Image | None:
    """An image, upright; nothing of a TIFF that Pillow does not read, or takes for one with transparency."""
    with open(path, "rb") as file:
        is_tiff = file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    try:
        with open(path, "rb") as file, Image.open(file) as opened:
            # A page for each channel; of gray pages in another number the first one is the image.
            is_stack = is_tiff and channels > 1 and getattr(opened, "n_frames", 1) == channels
            if is_stack and channels == 3:
                is_stack = opened.tag_v2.get(PHOTOMETRIC) == MIN_IS_BLACK  # type: ignore[attr-defined]
            is_whole = opened.mode in ("1", "L", "P", "I;16", "I;16B") and not is_stack
            if opened.mode in ("RGB", "CMYK") and is_tiff:  # of 16 bits, of which Pillow would drop 8
                is_whole = set(opened.tag_v2.get(BITS_PER_SAMPLE, (8,))) == {8}  # type: ignore[attr-defined]
            if not is_tiff or is_whole:
                return ImageOps.exif_transpose(opened)
    except OSError:
        if not is_tiff:
            raise
    return None


def read_image(path: Path, settings: dict[str, Any]) -> np.ndarray:
    """The pixels of an image file: (height, width, channels), of 8 bits or float32 from 0 to 255."""
    mean, value_range = settings["image_mean"], settings.get("value_range")
    channels = len(mean) if isinstance(mean, list) else 3
    is_rgb = channels == 3
    if path.suffix.lower() == ".npy":
        values = read_npy(path, channels)
    else:
        image = read_with_pillow(path, channels)
        if image is None:
            values = read_tiff(path)
        elif image.mode.startswith(("I", "F")):
            values = np.asarray(image)
            values = values.astype(np.uint16) if image.mode.startswith("I") else values
        else:
            wanted = "RGB" if is_rgb else "L" if image.mode in ("1", "P") else image.mode
            values = np.asarray(image.convert(wanted))
    values = values[..., None] if values.ndim == 2 else values
    if is_rgb and values.shape[-1] == 1:
        values = np.repeat(values, 3, axis=-1)
    if values.shape[-1] != channels:
        raise SystemExit(f"error: {path}: the image has {values.shape[-1]} channels, and the model takes {channels}.")
    if values.dtype == bool:
        values = values.astype(np.uint8) * 255
    is_float = np.issubdtype(values.dtype, np.floating)
    if is_float and not np.isfinite(values).all():
        raise SystemExit(f"error: {path}: the image holds NaN or infinite values.")
    if is_float and not value_range and settings["do_rescale"] and 0 < values.max() <= 1:
        raise SystemExit(f"error: {path}: the image holds floats from 0 to 1, and 0 to 255 is expected.")
    if value_range:
        low, high = value_range
        if values.dtype == np.uint8 and high > 255:
            raise SystemExit(f"error: {path}: the image has 8 bits, and the model takes values up to {high:g}.")
        scaled = (values.astype(np.float32) - np.float32(low)) * np.float32(255 / (high - low))
        return np.clip(scaled, 0, 255)
    if is_float:
        return values.astype(np.float32)
    if values.min() < 0 or values.max() > 65535:
        raise SystemExit(f"error: {path}: the pixel values must be from 0 to 65535.")
    is_deep = (values.dtype.kind, values.dtype.itemsize) == ("u", 2) or values.max() > 255  # of either byte order
    return np.round(values / 257.0).astype(np.uint8) if is_deep else values.astype(np.uint8)


def prepare(values: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    """Resize and normalize pixels: float32 (height, width, channels), no side shorter than a window."""
    if settings["resample"] != Image.Resampling.BILINEAR:
        raise SystemExit("error: this example resizes bilinearly, preprocessor_config.json asks for something else.")
    height, width = values.shape[:2]
    if settings["do_resize"] and settings.get("do_resize_to_window"):
        raise SystemExit(
            "error: this example keeps the aspect ratio of images, preprocessor_config.json asks for another."
        )
    if settings["do_resize"]:
        size = settings["size"]
        factor = size["shortest_edge"] / min(height, width)
        if size.get("longest_edge"):
            factor = min(factor, size["longest_edge"] / max(height, width))
        height, width = (max(int(side * factor + 0.5), 1) for side in (height, width))
        resized = resize(values, height, width)
        values = np.rint(resized) if values.dtype == np.uint8 else resized
    values = values.astype(np.float32)
    if settings["do_rescale"]:
        values *= np.float32(settings["rescale_factor"])
    if settings["do_normalize"]:
        values = (values - np.float32(settings["image_mean"])) / np.float32(settings["image_std"])
    shorter, window = min(height, width), settings["window_size"]
    if shorter < window:
        height, width = (window if side == shorter else int(side / shorter * window) for side in (height, width))
        values = resize(values, height, width)
    return values


def segment(pixels: np.ndarray, session: onnxruntime.InferenceSession, settings: dict[str, Any]) -> np.ndarray:
    """The class ids (height, width) of the pixels of an image (height, width, channels)."""
    values, window, stride = prepare(pixels, settings), settings["window_size"], settings["window_stride"]
    height, width = values.shape[:2]
    scores: np.ndarray | None = None
    count = np.zeros((height, width, 1), np.float32)
    for top in starts(height, window, stride):
        for left in starts(width, window, stride):
            part = (slice(top, top + window), slice(left, left + window))
            pixel_values = np.ascontiguousarray(values[part].transpose(2, 0, 1)[None])
            (logits,) = session.run(["logits"], {"pixel_values": pixel_values})
            if scores is None:
                scores = np.zeros((height, width, logits.shape[1]), np.float32)
            scores[part] += resize(logits[0].transpose(1, 2, 0), window, window)
            count[part] += 1
    if scores is None:
        raise ValueError("an image must have at least one window, got none.")
    scores /= count
    height, width = pixels.shape[:2]
    bands = [slice(first, first + 64) for first in range(0, height, 64)]  # rows of a large image, a few at a time
    return np.concatenate([class_ids(resize(scores, height, width, rows)) for rows in bands])


def class_ids(scores: np.ndarray) -> np.ndarray:
    """The class ids (height, width) of scores (height, width, labels): the best of several, or the only one above 0."""
    return scores.argmax(-1) if scores.shape[-1] > 1 else (scores[..., 0] > 0).astype(int)


def label_map(ids: np.ndarray, colors: list[list[int]]) -> Image.Image:
    """An image whose pixels are class ids; of more than 256 classes it has no colors."""
    if len(colors) > 256:
        return Image.fromarray(ids.astype(np.uint16))
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(colors)] = colors
    image = Image.fromarray(ids.astype(np.uint8))
    image.putpalette(palette.tobytes())
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", help="Image to segment.")
    parser.add_argument("output", help="PNG file of the label map.")
    parser.add_argument("--model", default=HERE / "onnx" / "model.onnx", help="Model file to run.")
    args = parser.parse_args()
    settings = json.loads((HERE / "preprocessor_config.json").read_text(encoding="utf-8"))
    labels = json.loads((HERE / "label_set.json").read_text(encoding="utf-8"))["labels"]
    # On a GPU: the package onnxruntime-gpu, and "CUDAExecutionProvider" before this one.
    session = onnxruntime.InferenceSession(args.model, providers=["CPUExecutionProvider"])
    try:
        pixels = read_image(Path(args.image), settings)
    except (OSError, ValueError, Image.DecompressionBombError) as error:  # also what is no image
        raise SystemExit(f"error: {args.image} cannot be read: {error}") from error
    ids = segment(pixels, session, settings)
    label_map(ids, [label["color"] for label in labels]).save(args.output)
    present = sorted(((ids == label["id"]).mean(), label["name"]) for label in labels)[::-1]
    print(f"Wrote {args.output}: {', '.join(f'{name} {share:.1%}' for share, name in present if share)}")


if __name__ == "__main__":
    main()
