"""The image segmentation pipeline of transformers, with batches of images of several windows, and images of any depth."""

import base64
import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from transformers.image_utils import load_image
from transformers.pipelines.image_segmentation import ImageSegmentationPipeline
from transformers.utils import ModelOutput

from .image_io import decode_channels, read_channels


class SegmenterPipeline(ImageSegmentationPipeline):
    """`pipeline("image-segmentation")` for models of this package; with any other model it is the one of transformers.

    transformers' own pipeline takes one row of a batch for one image, so that it needs `batch_size=1` where images have
    several windows, and it brings every image to 8-bit RGB before the image processor sees it. This one keeps the windows
    of an image together, and hands images over as they are stored.

    The further argument `window_batch_size` (`int`, defaults to 8), of the constructor or of a call, is the number of
    windows that go through the network at once.
    """

    @property
    def _has_windows(self) -> bool:
        return "window_offsets" in getattr(self.image_processor, "model_input_names", ())

    def _sanitize_parameters(
        self, window_batch_size: int | None = None, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if window_batch_size is not None:
            if window_batch_size < 1:
                raise ValueError(f"`window_batch_size` must be at least 1, got {window_batch_size}.")
            forward["window_batch_size"] = window_batch_size
        return preprocess, forward, postprocess

    def preprocess(  # type: ignore[override]  # as in the base class, which narrows its own base
        self,
        image: "str | os.PathLike[str] | PIL.Image.Image | np.ndarray | torch.Tensor",
        subtask: str | None = None,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        """Cut one image into windows: `{"image": {"pixel_values", "window_offsets"}}`."""
        if not self._has_windows:
            return super().preprocess(image, subtask=subtask, timeout=timeout)
        processor: Any = self.image_processor
        inputs = processor(images=[read_input(image, timeout, processor.num_channels)], return_tensors="pt")
        inputs = inputs.to(self.dtype)
        return {"image": dict(inputs)}  # one value for an image, so that transformers collates a list of images

    def _forward(  # type: ignore[override]  # as in the base class, which narrows its own base
        self, model_inputs: dict[str, Any], window_batch_size: int = 8
    ) -> Any:
        """Windows of one image, or of a list of images, through the network; the logits of each image apart."""
        if "image" not in model_inputs:
            return super()._forward(model_inputs)
        images = model_inputs["image"]
        of_images: Sequence[dict[str, torch.Tensor]] = [images] if isinstance(images, dict) else images
        windows = torch.cat([image["pixel_values"] for image in of_images])
        parts = [self.model(pixel_values=part, return_dict=True).logits for part in windows.split(window_batch_size)]
        logits = torch.cat(parts).split([len(image["pixel_values"]) for image in of_images])
        outputs = [
            {"logits": of_image, "window_offsets": image["window_offsets"]}
            for of_image, image in zip(logits, of_images)
        ]
        return {"image": outputs[0] if isinstance(images, dict) else outputs}

    def postprocess(  # type: ignore[override]  # all arguments are passed on
        self, model_outputs: Any, **kwargs: Any
    ) -> list[dict[str, Any]]:
        """Merge the windows of one image into a mask for each class that occurs."""
        if "image" in model_outputs:
            model_outputs = ModelOutput({**model_outputs["image"], "target_size": None})  # the size of the image
        return super().postprocess(model_outputs, **kwargs)


def read_input(image: Any, timeout: float | None = None, num_channels: int = 3) -> Any:
    """Read what `pipeline` is given for an image, with the channels and the depth that it is stored with.

    Args:
        image (`str`, `os.PathLike`, `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`): A path, an address, a string in
            base64, or an image.
        timeout (`float`, *optional*): Seconds for an address; those of [`read_channels`] by default.
        num_channels (`int`, defaults to 3): Channels of the model.

    Returns:
        What the image processor takes, upright.
    """
    if isinstance(image, PIL.Image.Image):
        return PIL.ImageOps.exif_transpose(image)
    if not isinstance(image, (str, os.PathLike)):
        return image
    text = str(image)
    if text.startswith(("http://", "https://", "data:")) or os.path.exists(image):
        return read_channels(image, num_channels, timeout=timeout)
    try:
        content = base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        return load_image(text)  # which says what is expected
    return decode_channels(io.BytesIO(content), text[:200], num_channels)


__all__ = ["SegmenterPipeline"]
