"""Image processor of Segmenter and SETR: resize, windows, normalization, and the merge of the model's outputs."""

import io
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassError
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import (
    ImageInput,
    PILImageResampling,
    SizeDict,
    is_valid_image,
    make_flat_list_of_images,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import ModelOutput, TensorType

from .image_io import decode_channels, image_to_array, label_map_to_array, read_channels, read_image
from .image_windows import ImageWindows, Normalization, ScaledImage, scaled_size
from .resampling import resize_image, resize_labels
from .sliding_window import merge_windows


try:
    from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
except ImportError:  # transformers before 5.13

    class SemanticSegmentationPostProcessorOutput(BatchFeature):  # type: ignore[no-redef]
        """Class map and scores of one image, as transformers 5.13 and later have them."""

        segmentation: torch.Tensor
        segmentation_scores: torch.Tensor | None


INTERPOLATION = {
    PILImageResampling.NEAREST: "nearest-exact",
    PILImageResampling.BILINEAR: "bilinear",
    PILImageResampling.BICUBIC: "bicubic",
}
MAX_SCALES = 64
LARGEST_FACTOR = 1e12  # of pixel values, so that they stay finite in float32


class SegmenterImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    window_size (`int`, *optional*, defaults to `self.window_size`):
        Side of the square windows in pixels; a multiple of `patch_size`, but for `padding="center"`.
    window_stride (`int`, *optional*, defaults to `self.window_stride`):
        Distance of two windows in pixels.
    patch_size (`int`, *optional*, defaults to `self.patch_size`):
        Side of the model's patches in pixels.
    padding (`"end"` or `"center"`, *optional*, defaults to `self.padding`):
        Where the model pads what the patch does not divide, as in its configuration.
    do_split_windows (`bool`, *optional*, defaults to `self.do_split_windows`):
        Whether to cut images into windows. Off for training crops.
    value_range (`list[float]`, *optional*, defaults to `self.value_range`):
        The pixel values that become black and white; by default those of the dtype, 0 to 255 or to 65535.
    do_resize_to_window (`bool`, *optional*, defaults to `self.do_resize_to_window`):
        Whether to resize images to one window, whatever their aspect ratio, instead of to `size`.
    do_reduce_labels (`bool`, *optional*, defaults to `self.do_reduce_labels`):
        Whether stored label 0 is ignored (255) and the others shift down by one, as in ADE20K.
    scales (`list[float]`, *optional*, defaults to `self.scales`):
        Factors of the size; the class probabilities are averaged over them.
    do_flip (`bool`, *optional*, defaults to `self.do_flip`):
        Whether each scale is also seen mirrored.
    """

    window_size: int
    window_stride: int
    patch_size: int
    padding: Literal["end", "center"]
    do_split_windows: bool
    do_resize_to_window: bool
    value_range: list[float | int] | tuple[float | int, ...] | None
    do_reduce_labels: bool
    scales: list[float | int] | tuple[float | int, ...]
    do_flip: bool


@contextmanager
def _value_errors() -> Iterator[None]:
    """Report an argument of another type, which transformers has an error of its own for, as `ValueError`."""
    try:
        yield
    except StrictDataclassError as error:
        raise ValueError(f"{error.__cause__ or error}") from error


def check_window_fields(
    do_resize: bool,
    size: SizeDict | None,
    window_size: int,
    window_stride: int,
    patch_size: int,
    padding: str,
    scales: Sequence[float],
) -> None:
    """Check that sizes, windows and scales fit each other.

    Raises:
        ValueError: If they do not.
    """
    shortest, longest = (None, None) if size is None else (size.shortest_edge, size.longest_edge)
    edges = [edge for edge in (shortest, longest) if edge is not None]
    if not all(type(edge) is int and edge > 0 for edge in edges) or (do_resize and not shortest):
        raise ValueError(
            '`size` must have a "shortest_edge" and may have a "longest_edge", in pixels, positive integers; got '
            f"{None if size is None else dict(size)}."
        )
    if patch_size < 1 or window_size < 1 or padding == "end" and window_size % patch_size:
        raise ValueError(
            f"`window_size` must be a positive multiple of the model's `patch_size`, got {window_size} and {patch_size}."
        )
    if not 1 <= window_stride <= window_size:
        raise ValueError(
            f"`window_stride` must be from 1 to `window_size` ({window_size}), or pixels are left out; got {window_stride}."
        )
    if not 0 < len(scales) <= MAX_SCALES or not all(0 < scale <= 16 for scale in scales):
        shown = f"{len(scales)} factors, {str(scales[:99]):.200}"
        raise ValueError(f"`scales` must be 1 to {MAX_SCALES} factors above 0 and up to 16, got {shown}.")


def check_pixel_fields(resample: PILImageResampling, factors: dict[str, Any]) -> None:
    """Check that resampling and normalization are possible; `factors` are those that are used.

    Raises:
        ValueError: If they are not.
    """
    if not isinstance(resample, int) or resample not in INTERPOLATION:
        names = [method.name for method in INTERPOLATION]
        raise ValueError(f"`resample` must be one of {names}, got {resample!r}.")
    for name, value in factors.items():
        smallest = -LARGEST_FACTOR if name == "image_mean" else 1 / LARGEST_FACTOR
        numbers = value if isinstance(value, (list, tuple)) and name != "rescale_factor" else [value]
        fitting = [
            isinstance(n, (int, float)) and type(n) is not bool and smallest <= n <= LARGEST_FACTOR for n in numbers
        ]
        if not (fitting and all(fitting)):
            kind = "be a number" if name == "rescale_factor" else "be made of numbers"
            raise ValueError(f"`{name}` must {kind} from {smallest:g} to {LARGEST_FACTOR:g}, got {value!r:.200}.")


def check_value_range(value_range: Sequence[float] | None) -> None:
    """Check that a range of pixel values is two numbers in order.

    Raises:
        ValueError: If it is not.
    """
    if value_range is not None and not (
        len(value_range) == 2 and all(map(math.isfinite, value_range)) and value_range[0] < value_range[1]
    ):
        raise ValueError(f"`value_range` must be two numbers in order, such as [0, 4095], got {value_range!r:.200}.")


def check_label_maps(image_sizes: Sequence[Sequence[int]], map_sizes: Sequence[Sequence[int]]) -> None:
    """Check that each image has one label map of its size.

    Raises:
        ValueError: If not.
    """
    if len(map_sizes) != len(image_sizes):
        raise ValueError(
            f"{len(image_sizes)} image(s) need as many segmentation maps of the shape (height, width), got "
            f"{len(map_sizes)}. Convert a color-coded mask to class ids first."
        )
    if list(map(tuple, image_sizes)) != list(map(tuple, map_sizes)):
        raise ValueError(
            "Each image needs one segmentation map of its (height, width); got images of "
            f"{list(map(tuple, image_sizes))} and maps of {list(map(tuple, map_sizes))}."
        )


def _read_maps(maps: Any) -> Any:
    """Read label maps that are given as paths; others lose a last axis of one channel."""
    if isinstance(maps, (list, tuple)):
        return [_read_maps(labels) for labels in maps]
    if isinstance(maps, (str, os.PathLike)):
        return read_image(maps)
    return maps[..., 0] if getattr(maps, "ndim", 0) == 3 and maps.shape[-1] == 1 else maps


def scale_image(image: torch.Tensor, labels: torch.Tensor | None, fields: dict[str, Any]) -> list[ScaledImage]:
    """An image (channels, height, width) and its labels (height, width) at each scale."""
    if fields["do_rescale"] and fields["value_range"] is None and image.is_floating_point() and 0 < image.max() <= 1:
        raise ValueError(
            "The image holds floats from 0 to 1, and 0 to 255 is expected: multiply it by 255, save files with 8 or 16 bits, or "
            "pass `do_rescale=False` to the image processor."
        )
    normalize = Normalization(
        fields["rescale_factor"] if fields["do_rescale"] else None,
        *((fields["image_mean"], fields["image_std"]) if fields["do_normalize"] else (None, None)),
    )
    normalize.check_channels(len(image))
    image_size = (image.shape[-2], image.shape[-1])
    edges, fixed_side = fields["size"] if fields["do_resize"] else None, None
    if edges is not None:
        fixed_side = fields["window_size"] if fields["do_resize_to_window"] else None
        edges = (edges.shortest_edge, edges.longest_edge)
    scaled_images = []
    for scale in fields["scales"]:
        size = scaled_size(image_size, scale, edges, fixed_side)
        pixels = resize_image(image, size, INTERPOLATION[fields["resample"]])
        scaled = ScaledImage(pixels, normalize, None if labels is None else resize_labels(labels, size))
        smallest_side = fields["window_size"] if fields["do_split_windows"] else 1
        scaled_images.append(scaled.enlarged(smallest_side, image_size))
    return scaled_images


class _SegmenterImageProcessing(BaseImageProcessor):
    """What both backends share, which is everything: they differ in what must be installed."""

    valid_kwargs = SegmenterImageProcessorKwargs
    model_input_names = ["pixel_values", "window_offsets"]
    resample = PILImageResampling.BILINEAR
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    size = {"shortest_edge": 512, "longest_edge": 2048}
    default_to_square = False
    window_size = 512
    window_stride = 512
    patch_size = 16
    padding = "end"
    scales = [1.0]
    do_flip = False
    do_split_windows = True
    do_resize_to_window = False
    value_range: tuple[float, float] | list[float] | None = None
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    do_reduce_labels = False

    def __init__(self, **kwargs: Unpack[SegmenterImageProcessorKwargs]) -> None:
        checked = SegmenterImageProcessorKwargs.__annotations__.keys() - ImagesKwargs.__annotations__.keys()
        checked |= {"do_convert_rgb", "do_resize", "do_rescale", "do_normalize"}
        with _value_errors():
            self._validate_types({name: value for name, value in kwargs.items() if name in checked})
        super().__init__(**kwargs)  # type: ignore[misc]  # takes the keys of `valid_kwargs`
        self._validate_preprocess_kwargs(**{name: getattr(self, name) for name in self._valid_kwargs_names})

    def _validate_types(self, fields: dict[str, Any]) -> None:
        # Its annotation asks for a dictionary, and its documentation for the class of one.
        validate_typed_dict(self.valid_kwargs, fields)  # type: ignore[type-var]

    def preprocess(  # type: ignore[misc]  # `return_tensors` is among the base class's own keys
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        return_tensors: str | TensorType | None = "pt",
        **kwargs: Unpack[SegmenterImageProcessorKwargs],
    ) -> BatchFeature:
        r"""Prepare images, and label maps where given, for the model.

        Args:
            images (`ImageInput`): One image or a list of them, of any sizes: paths or URLs, PIL images, numpy arrays or
                torch tensors; gray, palette, RGB, RGBA, CMYK; 8 or 16 bit, or floats from 0 to 255 (from 0 to 1 with
                `do_rescale=False`).
            segmentation_maps (`ImageInput`, *optional*): One map of classes for each image, of its size: PIL images
                (also palette ones), numpy arrays or torch tensors of shape `(height, width)`, of integers.
            return_tensors (`str`, *optional*, defaults to `"pt"`): `"pt"`, `"np"`, or `None` for lists.
            kwargs: Any field of the processor, for this call. `scales=[0.5, 0.75, 1.0, 1.25, 1.5, 1.75]` with
                `do_flip=True` is the multi-scale + flip protocol of the papers.

        Returns:
            `BatchFeature` with

            - `pixel_values` (`torch.FloatTensor` of shape `(num_windows, num_channels, height, width)`): All windows of
              all scales and flips of all images, row by row.
            - `window_offsets` (`torch.LongTensor` of shape `(num_windows, 11)`): What each window is: see
              [`~sliding_window.Window`]. Passes through the model to `post_process_semantic_segmentation`.
            - `labels` (`torch.LongTensor` of shape `(num_windows, height, width)`), when label maps are given: The same
              windows of the label maps, resized with nearest.

            With label maps the call is one for training, unless it says `do_split_windows`, `scales` or `do_flip`: one row
            for each image, which is resized to `window_size` x `window_size`, so that a batch can be stacked. With
            `do_resize=False` crops of one size stay as they are.

        Raises:
            ValueError: If an argument, an image or a label map is not as described.
        """
        if segmentation_maps is not None and not kwargs.keys() & {"do_split_windows", "scales", "do_flip"}:
            training = {"do_resize_to_window": True, "do_split_windows": False, "scales": [1.0], "do_flip": False}
            kwargs = {**training, **kwargs}
        images_windows = self._split_windows(images, segmentation_maps, return_tensors=return_tensors, **kwargs)
        pairs = [(image, window) for image in images_windows for window in image.windows]
        data = {
            "pixel_values": [image.pixel_values(window) for image, window in pairs],
            "window_offsets": [torch.tensor(window) for _, window in pairs],
        }
        if segmentation_maps is not None:
            data["labels"] = [image.labels(window) for image, window in pairs]
        return BatchFeature(data=data, tensor_type=return_tensors)

    def lazy_windows(self, image: ImageInput, **kwargs: Unpack[SegmenterImageProcessorKwargs]) -> ImageWindows:
        """The windows that `preprocess` gives for one image, each made when it is asked for.

        Args:
            image (`ImageInput`): One image, as for `preprocess`.
            kwargs: Any field of the processor, for this call.

        Returns:
            `ImageWindows`: Descriptions of the windows, and their pixel values one at a time.

        Raises:
            ValueError: If an argument or the image is not as described in `preprocess`.
        """
        (windows,) = self._split_windows(image, None, **kwargs)
        return windows

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:  # type: ignore[override]  # called by names
        super()._validate_preprocess_kwargs(**kwargs)
        names = ("do_resize", "size", "window_size", "window_stride", "patch_size", "padding", "scales")
        check_window_fields(**{name: kwargs[name] for name in names})
        check_value_range(kwargs["value_range"])
        unused = {"do_center_crop": (None, False), "do_pad": (None, False), "data_format": (None, "channels_first")}
        for name, usual in unused.items():
            if kwargs.get(name) not in usual:
                raise ValueError(f"`{name}` is no part of the protocol of this image processor: leave it out.")
        used = ["rescale_factor"] if kwargs["do_rescale"] else []
        used += ["image_mean", "image_std"] if kwargs["do_normalize"] else []
        check_pixel_fields(kwargs["resample"], {name: kwargs[name] for name in used})

    @property
    def num_channels(self) -> int:
        """Channels of the images: one for each value of `image_mean`, 3 where it is one number for all."""
        return len(self.image_mean) if isinstance(self.image_mean, Sequence) else 3

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Read paths and URLs; images pass through."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image) for image in image_url_or_urls]
        if isinstance(image_url_or_urls, (str, os.PathLike)):
            return read_channels(image_url_or_urls, self.num_channels)
        return image_url_or_urls

    def decode_image(
        self, content: bytes, name: str = "the image", max_pixels: int | None = None
    ) -> PIL.Image.Image | np.ndarray:
        """Decode the bytes of an image file with the channels that the model takes: see [`read_channels`]."""
        return decode_channels(io.BytesIO(content), name, self.num_channels, max_pixels)

    def _prepare_images_structure(self, images: ImageInput, expected_ndims: int = 3) -> list[Any]:
        """A flat list of images, in which gray arrays (height, width) have a channel too."""
        images = self.fetch_images(images) if expected_ndims == 3 else _read_maps(images)
        given: list[Any] = list(images) if isinstance(images, (list, tuple)) else [images]
        flat = [part for image in given for part in (image if isinstance(image, (list, tuple)) else [image])]
        wrong = [type(image).__name__ for image in flat if not is_valid_image(image)]
        if wrong or not flat:
            raise ValueError(
                "Expected one or more images or label maps (paths, PIL images, numpy arrays or torch tensors), got "
                f"{wrong[0] if wrong else 'none'}."
            )
        if any(0 in (image.size if isinstance(image, PIL.Image.Image) else image.shape) for image in flat):
            raise ValueError("Expected images and label maps of at least one pixel, got an empty one: leave it out.")
        if expected_ndims == 3:
            given = [image[None] if getattr(image, "ndim", 0) == 2 else image for image in given]
            images = given if isinstance(images, (list, tuple)) else given[0]
        images_flat: Any = make_flat_list_of_images(images, expected_ndims=expected_ndims)  # a list of them
        return list(images_flat)

    def process_image(self, image: ImageInput, **kwargs: Any) -> torch.Tensor:
        """Bring one image to (channels, height, width), uint8 or float32."""
        array = image_to_array(
            image,
            bool(kwargs.get("do_convert_rgb")),
            kwargs.get("input_data_format"),
            self.num_channels,
            kwargs.get("value_range"),
        )
        return torch.from_numpy(array).to(kwargs.get("device") or "cpu")

    def process_segmentation_map(self, segmentation_map: ImageInput, do_reduce_labels: bool) -> torch.Tensor:
        """Bring one label map to (height, width), int64."""
        return torch.from_numpy(label_map_to_array(segmentation_map, do_reduce_labels))

    def _split_windows(
        self, images: ImageInput, segmentation_maps: ImageInput | None, **kwargs: Any
    ) -> list[ImageWindows]:
        """The windows of each image."""
        with _value_errors():
            self._validate_types(kwargs)
            fields = {name: getattr(self, name, None) for name in self._valid_kwargs_names} | kwargs
            fields = self._standardize_kwargs(**fields)
            self._validate_preprocess_kwargs(**fields)
        convert = {name: fields[name] for name in ("do_convert_rgb", "input_data_format", "device", "value_range")}
        arrays = [self.process_image(image, **convert) for image in self._prepare_images_structure(images)]
        maps: Sequence[torch.Tensor | None] = [None] * len(arrays)
        if segmentation_maps is not None:
            given = self._prepare_images_structure(segmentation_maps, expected_ndims=2)
            label_maps = [self.process_segmentation_map(labels, fields["do_reduce_labels"]) for labels in given]
            check_label_maps([array.shape[-2:] for array in arrays], [labels.shape for labels in label_maps])
            maps = [labels.to(array.device) for labels, array in zip(label_maps, arrays)]
        return [
            ImageWindows.split(
                scale_image(array, labels, fields),
                index,
                (array.shape[-2], array.shape[-1]),
                fields["do_flip"],
                fields["window_size"] if fields["do_split_windows"] else None,
                fields["window_stride"],
            )
            for index, (array, labels) in enumerate(zip(arrays, maps))
        ]

    def post_process_semantic_segmentation(
        self,
        outputs: ModelOutput,
        target_sizes: Sequence[tuple[int, int]] | None = None,
        return_segmentation_scores: bool = False,
    ) -> "list[torch.Tensor] | list[SemanticSegmentationPostProcessorOutput]":
        r"""Merge the model's outputs into maps of the original sizes.

        Args:
            outputs ([`SegmenterSemanticSegmenterOutput`] or [`SetrSemanticSegmenterOutput`]): Outputs of the model with
                `logits` and the `window_offsets` that came with its inputs. Without `window_offsets` each row of the
                logits is one whole image, and its size is that of the logits.
            target_sizes (`Sequence[tuple[int, int]]`, *optional*): (height, width) in pixels of each image; the
                original sizes by default.
            return_segmentation_scores (`bool`, defaults to `False`): Whether to return class probabilities too.

        Returns:
            `list[torch.LongTensor]`: A class map (height, width) for each image; or, with scores, a list of
            `SemanticSegmentationPostProcessorOutput` with `segmentation` and `segmentation_scores`
            (`torch.FloatTensor` of shape `(num_labels, height, width)`): softmax, averaged over scales and flips.

        Raises:
            ValueError: If windows are missing, or the number of target sizes is not that of the images.
        """
        of_model: Any = outputs  # of any class that has the fields
        logits, patch_size = of_model.logits, self.patch_size
        window_offsets = getattr(outputs, "window_offsets", None)
        if window_offsets is None:
            patch_size, sizes = 1, logits.shape[-2:] * 3
            window_offsets = torch.tensor([(image, 0, 0, 0, 0, *sizes) for image in range(len(logits))])
        merged = merge_windows(
            logits, window_offsets, patch_size, target_sizes, return_segmentation_scores, self.padding
        )
        if not return_segmentation_scores:
            return [segmentation for segmentation, _ in merged]
        return [
            SemanticSegmentationPostProcessorOutput(data={"segmentation": segmentation, "segmentation_scores": scores})
            for segmentation, scores in merged
        ]

    def to_dict(self) -> dict[str, Any]:
        """Fields of the processor; as remote code it names the classes of both backends."""
        fields = super().to_dict()
        if "auto_map" in fields:
            name = f"{type(self).__module__.split('.')[-1]}.SegmenterImageProcessor"
            fields["auto_map"] = {"AutoImageProcessor": {"torchvision": name, "pil": f"{name}Pil"}}
        return fields


# Their `process_image` has options by position, which nothing calls: `_split_windows` calls ours.
class SegmenterImageProcessor(_SegmenterImageProcessing, TorchvisionBackend):  # type: ignore[misc]
    r"""Image processor of Segmenter and SETR, the default where torchvision is installed.

    It carries out the protocol of the published results: resize with the aspect ratio kept and without antialiasing,
    overlapping windows, normalization; and after the model the exact merge to maps of the original sizes.

    Args:
        size (`dict[str, int]`, defaults to `{"shortest_edge": 512, "longest_edge": 2048}`): The image is resized to the
            largest size that exceeds neither edge, in pixels. "longest_edge" may be left out.
        window_size (`int`, defaults to 512): Side of the windows in pixels. Images shorter than that are enlarged.
        window_stride (`int`, defaults to 512): Distance of two windows in pixels.
        patch_size (`int`, defaults to 16): Side of the model's patches in pixels; divides `window_size`, but for
            `padding="center"`.
        padding (`"end"` or `"center"`, defaults to `"end"`): Where the model pads windows that the patch does not divide.
        do_split_windows (`bool`, defaults to `True`): Whether to cut windows. Off for training crops, which must then
            be of one size.
        image_mean (`float` or `list[float]`, defaults to 0.5): Mean of each channel.
        image_std (`float` or `list[float]`, defaults to 0.5): Standard deviation of each channel.
        do_resize_to_window (`bool`, defaults to `False`): Whether images are resized to one window, whatever their aspect
            ratio, as training with label maps does by default.
        value_range (`list[float]`, *optional*): The pixel values that become black and white, such as `[0, 4095]` of a sensor
            of 12 bits; by default those of the dtype, 0 to 255 or to 65535.
        do_reduce_labels (`bool`, defaults to `False`): Whether stored label 0 is ignored and the others shift down.
        scales (`list[float]`, defaults to `[1.0]`): Factors of the size that are averaged over.
        do_flip (`bool`, defaults to `False`): Whether each scale is also seen mirrored.

    Raises:
        ValueError: If the arguments contradict each other.
    """


class SegmenterImageProcessorPil(_SegmenterImageProcessing, PilBackend):  # type: ignore[misc]
    r"""[`SegmenterImageProcessor`] without torchvision: the same arguments, and the same results, bitwise."""


AnyImageProcessor = SegmenterImageProcessor | SegmenterImageProcessorPil


for _processor in (SegmenterImageProcessor, SegmenterImageProcessorPil):
    _processor.register_for_auto_class("AutoImageProcessor")

__all__ = ["SegmenterImageProcessor", "SegmenterImageProcessorPil"]
