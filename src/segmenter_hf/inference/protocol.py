"""The inference protocol: everything that a prediction depends on besides the model, its image processor and the image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL.Image import Resampling

from ..models.image_io import MAX_IMAGE_PIXELS
from ..models.image_processing_segmenter import AnyImageProcessor


MULTI_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
MAX_SCALE = 16
# Fields of the image processor that change its pixel values, beside those of the protocol.
PIXEL_FIELDS = (
    "do_convert_rgb",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_split_windows",
    "do_resize_to_window",
    "padding",
    "value_range",
)


@dataclass(frozen=True)
class InferenceProtocol:
    """How images are seen: at which sizes, mirrored or not, and how many windows at once.

    Args:
        scales (`Sequence[float]`, defaults to `(1.0,)`): Factors of the size; class probabilities are averaged over them.
        flip (`bool`, defaults to `False`): Whether each scale is also seen mirrored.
        full_resolution (`bool`, defaults to `False`): Whether images keep their size instead of being resized to that of the
            image processor.
        window_batch_size (`int`, defaults to 8): Windows that go through the network at once; bounds its memory.
        max_image_pixels (`int`, defaults to 178956970): Image files with more pixels are not read.

    Raises:
        ValueError: If a field is out of range.
    """

    scales: Sequence[float] = (1.0,)
    flip: bool = False
    full_resolution: bool = False
    window_batch_size: int = 8
    max_image_pixels: int = MAX_IMAGE_PIXELS

    def __post_init__(self) -> None:
        scales = self.scales if isinstance(self.scales, (list, tuple)) else ()
        if not scales or not all(_is_number(scale) and 0 < scale <= MAX_SCALE for scale in scales):
            raise ValueError(
                f"`scales` must be one or more factors above 0 and up to {MAX_SCALE}, got {self.scales!r}."
            )
        object.__setattr__(self, "scales", tuple(map(float, scales)))
        for name in ("window_batch_size", "max_image_pixels"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
        for name in ("flip", "full_resolution"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")

    @classmethod
    def multi_scale_flip(cls, **fields: Any) -> "InferenceProtocol":
        """Return the multi-scale + flip protocol of the papers: six scales, each also mirrored.

        Args:
            fields: Other fields of the protocol.

        Returns:
            `InferenceProtocol`: The protocol.
        """
        return cls(**{"scales": MULTI_SCALES, "flip": True, **fields})

    @property
    def name(self) -> str:
        """What tables call it."""
        if (self.scales, self.flip) == (MULTI_SCALES, True):
            return "multi-scale + flip"
        if (self.scales, self.flip) == ((1.0,), False):
            return "single scale"
        return f"scales {', '.join(map(str, self.scales))}{' + flip' if self.flip else ''}"

    def processor_kwargs(self) -> dict[str, Any]:
        """Return the arguments of the image processor: `scales`, `do_flip`, and `do_resize` where it is not left to it."""
        arguments: dict[str, Any] = {"scales": list(self.scales), "do_flip": self.flip}
        return {**arguments, "do_resize": False} if self.full_resolution else arguments

    def describe(self, processor: AnyImageProcessor) -> dict[str, Any]:
        """Describe what a number depends on besides model and data, to be saved beside it.

        Args:
            processor (`BaseImageProcessor`): The image processor of the model.

        Returns:
            `dict`: Values that JSON can hold.
        """
        pixel_fields = {name: getattr(processor, name) for name in PIXEL_FIELDS}
        return {
            "name": self.name,
            "scales": list(self.scales),
            "do_flip": self.flip,
            "do_resize": processor.do_resize and not self.full_resolution,
            "size": dict(processor.size),
            "window_size": processor.window_size,
            "window_stride": processor.window_stride,
            "resample": f"{Resampling(processor.resample).name.lower()} without antialiasing",
            "resolution": "original size of each image",
            "full_resolution": self.full_resolution,
            **{name: list(value) if isinstance(value, tuple) else value for name, value in pixel_fields.items()},
        }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and type(value) is not bool


PAPER_PROTOCOLS = {protocol.name: protocol for protocol in (InferenceProtocol(), InferenceProtocol.multi_scale_flip())}

__all__ = ["MAX_IMAGE_PIXELS", "MULTI_SCALES", "PAPER_PROTOCOLS", "InferenceProtocol"]
