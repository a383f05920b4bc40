"""Segment a picture with the exported model beside this file; needs numpy, onnxruntime and Pillow, nothing else.

    python run_onnx.py street.jpg labels.png

The pixels of the label map are class ids, shown in the colours of `label_set.json`.

This is the single-scale protocol of the published numbers: resize, sliding windows, mean of the logits that overlap,
resize to the picture's own size. It agrees with `post_process_semantic_segmentation` of segmenter-hf but for the rounding of
float32, which may decide where two classes are as good as equal. It is written to be read: `scales`, `do_flip` and
`do_split_windows` of `preprocessor_config.json` are not used, pictures have 8 bits, windows go through one at a time, and
the scores of all classes at all pixels of the resized picture are in memory at once.
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


def prepare(picture: Image.Image, settings: dict[str, Any]) -> np.ndarray:
    """Resize and normalise a picture: float32 (height, width, 3), no side shorter than a window."""
    if settings["resample"] != Image.Resampling.BILINEAR:
        raise SystemExit("error: this example resizes bilinearly, preprocessor_config.json asks for something else.")
    if picture.mode.startswith(("I", "F")):
        raise SystemExit(f"error: expected a picture with 8 bits, got the mode {picture.mode!r}: convert it first.")
    values = np.asarray(picture.convert("RGB"))
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


def segment(picture: Image.Image, session: onnxruntime.InferenceSession, settings: dict[str, Any]) -> np.ndarray:
    """The class ids (height, width) of a picture."""
    values, window, stride = prepare(picture, settings), settings["window_size"], settings["window_stride"]
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
    width, height = picture.size
    bands = [slice(first, first + 64) for first in range(0, height, 64)]  # rows of a large picture, a few at a time
    return np.concatenate([resize(scores, height, width, rows).argmax(-1) for rows in bands])


def label_map(ids: np.ndarray, colors: list[list[int]]) -> Image.Image:
    """A picture whose pixels are class ids; of more than 256 classes it has no colours."""
    if len(colors) > 256:
        return Image.fromarray(ids.astype(np.uint16))
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(colors)] = colors
    picture = Image.fromarray(ids.astype(np.uint8))
    picture.putpalette(palette.tobytes())
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", help="Picture to segment.")
    parser.add_argument("output", help="PNG file of the label map.")
    args = parser.parse_args()
    settings = json.loads((HERE / "preprocessor_config.json").read_text(encoding="utf-8"))
    labels = json.loads((HERE / "label_set.json").read_text(encoding="utf-8"))["labels"]
    # On a GPU: the package onnxruntime-gpu, and "CUDAExecutionProvider" before this one.
    session = onnxruntime.InferenceSession(HERE / "model.onnx", providers=["CPUExecutionProvider"])
    try:
        with Image.open(args.picture) as opened:
            picture = ImageOps.exif_transpose(opened)
    except OSError as error:  # also what is no picture
        raise SystemExit(f"error: {args.picture} cannot be read: {error}") from error
    ids = segment(picture, session, settings)
    label_map(ids, [label["color"] for label in labels]).save(args.output)
    present = sorted(((ids == label["id"]).mean(), label["name"]) for label in labels)[::-1]
    print(f"Wrote {args.output}: {', '.join(f'{name} {share:.1%}' for share, name in present if share)}")


if __name__ == "__main__":
    main()
