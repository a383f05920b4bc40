"""Segment an image with the exported model beside this file; needs numpy, onnxruntime and Pillow, nothing else.

    python run_onnx.py street.jpg labels.png
    python run_onnx.py street.jpg labels.png --model onnx/model_quantized.onnx

The pixels of the label map are class ids, shown in the colors of `label_set.json`. A model of one class has one logit: where
it is above 0 the pixel is 1, the class, and elsewhere 0, the background.

This is the single-scale protocol of the published numbers: resize, sliding windows, mean of the logits that overlap,
resize to the image's own size. It agrees with `post_process_semantic_segmentation` of segmenter-hf but for the rounding of
float32, which may decide where two classes are as good as equal. It is written to be read: `scales`, `do_flip` and
`do_split_windows` of `preprocessor_config.json` are not used, images have 8 bits, windows go through one at a time, and
the scores of all classes at all pixels of the resized image are in memory at once.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


HERE = Path(__file__).resolve().parent


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


def prepare(image: Image.Image, settings: dict[str, Any]) -> np.ndarray:
    """Resize and normalise an image: float32 (height, width, 3), no side shorter than a window."""
    if settings["resample"] != Image.Resampling.BILINEAR:
        raise SystemExit("error: this example resizes bilinearly, preprocessor_config.json asks for something else.")
    if image.mode.startswith(("I", "F")):
        raise SystemExit(f"error: expected an image with 8 bits, got the mode {image.mode!r}: convert it first.")
    values = np.asarray(image.convert("RGB"))
    height, width = values.shape[:2]
    if settings["do_resize"]:
        size = settings["size"]
        factor = size["shortest_edge"] / min(height, width)
        if size.get("longest_edge"):
            factor = min(factor, size["longest_edge"] / max(height, width))
        height, width = (max(int(side * factor + 0.5), 1) for side in (height, width))
        values = np.rint(resize(values, height, width))
    values = values.astype(np.float32)
    if settings["do_rescale"]:
        values *= np.float32(settings["rescale_factor"])
    if settings["do_normalize"]:
        values = (values - np.float32(settings["image_mean"])) / np.float32(settings["image_std"])
    shorter, window = min(height, width), settings["window_size"]
    if shorter < window:
        values = resize(
            values, *(window if side == shorter else int(side / shorter * window) for side in (height, width))
        )
    return values


def segment(image: Image.Image, session: onnxruntime.InferenceSession, settings: dict[str, Any]) -> np.ndarray:
    """The class ids (height, width) of an image."""
    values, window, stride = prepare(image, settings), settings["window_size"], settings["window_stride"]
    height, width = values.shape[:2]
    scores, count = None, np.zeros((height, width, 1), np.float32)
    for top in starts(height, window, stride):
        for left in starts(width, window, stride):
            part = (slice(top, top + window), slice(left, left + window))
            pixel_values = np.ascontiguousarray(values[part].transpose(2, 0, 1)[None])
            (logits,) = session.run(["logits"], {"pixel_values": pixel_values})
            if scores is None:
                scores = np.zeros((height, width, logits.shape[1]), np.float32)
            scores[part] += resize(logits[0].transpose(1, 2, 0), window, window)
            count[part] += 1
    scores /= count
    width, height = image.size
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
        with Image.open(args.image) as opened:
            image = ImageOps.exif_transpose(opened)
    except OSError as error:  # also what is no image
        raise SystemExit(f"error: {args.image} cannot be read: {error}") from error
    ids = segment(image, session, settings)
    label_map(ids, [label["color"] for label in labels]).save(args.output)
    present = sorted(((ids == label["id"]).mean(), label["name"]) for label in labels)[::-1]
    print(f"Wrote {args.output}: {', '.join(f'{name} {share:.1%}' for share, name in present if share)}")


if __name__ == "__main__":
    main()
