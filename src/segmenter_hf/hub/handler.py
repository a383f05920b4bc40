"""Inference Endpoints of Hugging Face: an image in, its masks and labels out.

The service imports this file from the repository of the model, makes an `EndpointHandler` and calls it with each request.
It needs torch, transformers and Pillow, and not the package that wrote it: the code of the model lies beside it. TIFF of other
channels or depth than RGB of 8 bits needs tifffile too.

    {"inputs": "<image in base64>", "parameters": {"scales": [0.75, 1.0, 1.25], "flip": true}}
"""

import base64
import binascii
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation
from transformers.utils import ModelOutput


# Decoded by libraries alone. Pillow hands others to programs that run what is in them.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 50_000_000  # of all images of a request
MAX_WINDOW_PIXELS = 150_000_000  # of all their windows: thin images and large scales become many
MAX_LOGIT_BYTES = 4_000_000_000  # of the scores of all their windows
MAX_SCALES = 16
PARAMETERS = ("flip", "format", "scales", "window_batch_size")


class EndpointHandler:
    """Segments the images of requests with the model of a repository.

    Args:
        path (`str`): The directory of the repository.
    """

    def __init__(self, path: str = "") -> None:
        directory = Path(path or ".").resolve()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = AutoModelForSemanticSegmentation.from_pretrained(directory, trust_remote_code=True)
        self.model = model.to(self.device).eval()
        self.processor = AutoImageProcessor.from_pretrained(directory, trust_remote_code=True)
        self.labels = _class_names(directory, model.config.id2label)

    @torch.inference_mode()
    def __call__(self, data: dict[str, Any]) -> list[Any] | dict[str, Any]:
        """Segment the image or the images of a request.

        Args:
            data (`dict`): `inputs`, an image or a list of images: bytes of an image file, also of a TIFF or a `.npy` array of
                as many channels as the model takes; a string in base64, with or without `data:image/png;base64,` before it;
                or a PIL image, which the service makes of a body that is an image file, in RGB. And `parameters`, which may hold

                - `scales` (`list[float]`): factors of the size that are averaged over; by default those of the processor.
                - `flip` (`bool`): whether each scale is also seen mirrored.
                - `window_batch_size` (`int`, defaults to 8): windows that go through the network at once, of all images.
                - `format` (`str`, defaults to `"masks"`): or `"class_map"`.

        Returns:
            `list[dict]`: For an image one entry for each class that is present, largest first: `label`, `score` (always
            `None`, as in `pipeline("image-segmentation")`), `share` of the pixels from 0 to 1, and `mask`, a PNG file in
            base64 that is 255 where the class is. With `"class_map"` a dict of `class_map`, a PNG file in base64 whose pixels
            are class ids, and `labels`, a list of `id`, `label` and `share`. For a list of images a list of these.

        Raises:
            ValueError: If the request is not of this form.
        """
        if not isinstance(data, dict) or "inputs" not in data:
            raise ValueError('Expected {"inputs": ..., "parameters": ...}, and there is no "inputs".')
        settings = _check_parameters(data.get("parameters") or {})
        inputs = data["inputs"]
        images = self._read_images(inputs if isinstance(inputs, (list, tuple)) else [inputs])
        class_maps = self._segment(images, **settings["protocol"])
        describe = self._masks if settings["format"] == "masks" else self._class_map
        results = [describe(class_map) for class_map in class_maps]
        return results if isinstance(inputs, (list, tuple)) else results[0]

    def _read_images(self, inputs: list[Any] | tuple[Any, ...]) -> list[Image.Image | np.ndarray]:
        """The images of a request, decoded and upright."""
        if not inputs:
            raise ValueError("`inputs` is an empty list: give at least one image.")
        files = [_image_or_bytes(image) for image in inputs]
        sizes = [_count_pixels(file) for file in files]
        if sum(sizes) > MAX_PIXELS:  # before any of them is decoded
            raise ValueError(
                f"The request holds {sum(sizes)} pixels, expected at most {MAX_PIXELS}: make the images smaller."
            )
        images: list[Image.Image | np.ndarray] = []
        left = MAX_PIXELS - sum(sizes)
        for number, (file, size) in enumerate(zip(files, sizes), 1):
            image = self._decode(file, f"image {number} of the request", size or left)
            images.append(image)
            if not size and isinstance(image, np.ndarray):
                left -= image.shape[-2] * image.shape[-1]
        return images

    def _decode(self, file: Image.Image | bytes, name: str, max_pixels: int) -> Image.Image | np.ndarray:
        """The image of a file, in the channels of the model."""
        if isinstance(file, Image.Image):
            num_bands, num_channels = len(file.getbands()), self.processor.num_channels
            if num_channels not in (3, num_bands):
                raise ValueError(
                    f"{name} has {num_bands} channels, and the model takes {num_channels}. Send the bytes of a TIFF or .npy "
                    "file of so many in base64: the service turns files that are the body into RGB."
                )
            return ImageOps.exif_transpose(file)
        return self.processor.decode_image(file, name, max_pixels)

    def _segment(
        self, images: list[Image.Image | np.ndarray], window_batch_size: int, **kwargs: Any
    ) -> list[np.ndarray]:
        """The class map (height, width) of each image; windows of all of them share the batches."""
        sources = [self.processor.lazy_windows(image, **kwargs) for image in images]
        pairs = [
            (source, window._replace(image=index)) for index, source in enumerate(sources) for window in source.windows
        ]
        pixels = sum(window.height * window.width for _, window in pairs)
        if pixels > MAX_WINDOW_PIXELS:
            raise ValueError(
                f"The windows of the request hold {pixels} pixels, expected at most {MAX_WINDOW_PIXELS}: send fewer or less "
                "narrow images, or lower `scales`."
            )
        logits = []
        for first in range(0, len(pairs), window_batch_size):
            part = [source.pixel_values(window) for source, window in pairs[first : first + window_batch_size]]
            logits.append(self.model(pixel_values=torch.stack(part).to(self.device)).logits)
            num_bytes = logits[0][0].numel() * logits[0].element_size() * len(pairs)
            if num_bytes > MAX_LOGIT_BYTES:
                raise ValueError(
                    f"The scores of the request would take {num_bytes} bytes, expected at most {MAX_LOGIT_BYTES}: send fewer or "
                    "smaller images, or lower `scales`."
                )
        offsets = torch.tensor([window for _, window in pairs])
        outputs = ModelOutput(logits=torch.cat(logits), window_offsets=offsets)
        return [found.cpu().numpy() for found in self.processor.post_process_semantic_segmentation(outputs)]

    def _present(self, class_map: np.ndarray) -> list[dict[str, Any]]:
        counts = np.bincount(class_map.ravel(), minlength=len(self.labels))
        present = [index for index in np.argsort(-counts, kind="stable").tolist() if counts[index]]
        return [{"id": i, "label": self.labels[i], "share": float(counts[i] / class_map.size)} for i in present]

    def _masks(self, class_map: np.ndarray) -> list[dict[str, Any]]:
        masks = []
        for entry in self._present(class_map):
            mask = Image.fromarray((class_map == entry.pop("id")).astype(np.uint8) * 255)
            masks.append({"score": None, **entry, "mask": _png(mask)})
        return masks

    def _class_map(self, class_map: np.ndarray) -> dict[str, Any]:
        dtype = np.uint8 if len(self.labels) <= 256 else np.uint16
        return {"class_map": _png(Image.fromarray(class_map.astype(dtype))), "labels": self._present(class_map)}


def _class_names(directory: Path, id2label: dict[int, str]) -> list[str]:
    """Names by class id; those of the label set, where the repository holds one."""
    path = directory / "label_set.json"
    names = [id2label[index] for index in range(len(id2label))]
    if path.is_file():
        try:
            found = [label["name"] for label in json.loads(path.read_text(encoding="utf-8"))["labels"]]
        except (KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a label set: expected `labels`, a list of objects with a `name`."
            ) from error
        if len(found) < len(names):
            raise ValueError(f"{path} names {len(found)} classes, and the model has {len(names)}.")
        names = found
    # A model of one class has one logit, and its maps hold 0 for the background.
    return names if len(names) > 1 else ["background" if names[0] != "background" else "foreground", *names]


def _check_parameters(parameters: Any) -> dict[str, Any]:
    """The parameters of a request, checked, with their defaults."""
    if not isinstance(parameters, dict) or not parameters.keys() <= set(PARAMETERS):
        raise ValueError(f"`parameters` may hold {', '.join(PARAMETERS)}, got {str(parameters):.200}.")
    protocol: dict[str, Any] = {"window_batch_size": parameters.get("window_batch_size", 8)}
    if type(protocol["window_batch_size"]) is not int or not 1 <= protocol["window_batch_size"] <= 1024:
        raise ValueError(f"`window_batch_size` must be from 1 to 1024, got {protocol['window_batch_size']!r:.100}.")
    if "scales" in parameters:
        scales = parameters["scales"]
        if not isinstance(scales, list) or not 1 <= len(scales) <= MAX_SCALES:
            raise ValueError(f"`scales` must be a list of 1 to {MAX_SCALES} factors, got {scales!r:.100}.")
        if not all(type(scale) in (int, float) and 0 < scale <= 4 for scale in scales):
            raise ValueError(f"`scales` must be numbers above 0 and up to 4, got {scales!r:.100}.")
        protocol["scales"] = scales
    if "flip" in parameters:
        if type(parameters["flip"]) is not bool:
            raise ValueError(f"`flip` must be true or false, got {parameters['flip']!r:.100}.")
        protocol["do_flip"] = parameters["flip"]
    format = parameters.get("format", "masks")
    if format not in ("masks", "class_map"):
        raise ValueError(f'`format` must be "masks" or "class_map", got {format!r:.100}.')
    return {"protocol": protocol, "format": format}


def _image_or_bytes(image: Any) -> Image.Image | bytes:
    """What an input holds. Strings are base64 and nothing else: neither paths nor addresses."""
    if isinstance(image, (Image.Image, bytes)):
        return image
    if isinstance(image, bytearray):
        return bytes(image)
    if not isinstance(image, str):
        raise ValueError(f"Expected an image as bytes, base64 or PIL image, got {type(image).__name__}.")
    content = image.partition(";base64,")[2] if image.startswith("data:") else image
    try:
        return base64.b64decode("".join(content.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"Expected an image in base64, got a string that is not: {image[:40]!r}.") from error


def _count_pixels(image: Image.Image | bytes) -> int:
    """The pixels of an image by its header; 0 where Pillow does not read it."""
    try:
        opened = image if isinstance(image, Image.Image) else Image.open(io.BytesIO(image), formats=IMAGE_FORMATS)
    except Image.DecompressionBombError:
        return MAX_PIXELS + 1
    except (OSError, SyntaxError, ValueError):
        return 0
    return opened.width * opened.height


def _png(image: Image.Image) -> str:
    """A PNG file in base64."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
