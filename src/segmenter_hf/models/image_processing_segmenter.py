"""Image processor of Segmenter and SETR: resize, windows, normalisation, and the merge of the model's outputs."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import numpy as np
import PIL.Image
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassError
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    is_torch_tensor,
    is_valid_image,
    make_flat_list_of_images,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import ModelOutput, TensorType

from .image_io import channel_axis, pil_to_array, read_image, to_uint8
from .resampling import resize_image, resize_labels, resized_size
from .sliding_window import merge_windows
from .window_geometry import Window, window_corners


INTERPOLATION = {
    PILImageResampling.NEAREST: "nearest-exact",
    PILImageResampling.BILINEAR: "bilinear",
    PILImageResampling.BICUBIC: "bicubic",
}
# What an image may be resized to, and enlarged to as float32 where it is shorter than a window: what is far beyond any
# real use would only fill the memory.
MAX_RESIZED_PIXELS, MAX_ENLARGED_PIXELS = 2**30, 2**26
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


class ScaledImage(NamedTuple):
    """An image (channels, height, width) at one scale, what normalises parts of it, and its labels (height, width)."""

    pixels: torch.Tensor
    normalize: Callable[[torch.Tensor], torch.Tensor] | None
    labels: torch.Tensor | None


class ImageWindows:
    """The windows of an image, whose pixel values are made when they are asked for.

    Args:
        windows (`list[Window]`): All windows of all views of the image.
        scaled_images (`list[ScaledImage]`): The image at each scale.
        views_per_scale (`int`): 2 with flips, otherwise 1.
    """

    def __init__(self, windows: list[Window], scaled_images: list[ScaledImage], views_per_scale: int) -> None:
        self.windows = windows
        self._scaled_images = scaled_images
        self._views_per_scale = views_per_scale

    def pixel_values(self, window: Window) -> torch.Tensor:
        """The normalised pixels (channels, height, width) of a window, float32."""
        scaled = self._scaled_images[window.view // self._views_per_scale]
        pixels = self._cut(scaled.pixels, window)
        return pixels if scaled.normalize is None else scaled.normalize(pixels)

    def labels(self, window: Window) -> torch.Tensor:
        """The labels (height, width) of a window, int64."""
        return self._cut(self._scaled_images[window.view // self._views_per_scale].labels, window)

    @staticmethod
    def _cut(array: torch.Tensor, window: Window) -> torch.Tensor:
        left = window.view_width - window.left - window.width if window.flip else window.left
        part = array[..., window.top : window.top + window.height, left : left + window.width]
        return part.flip(-1) if window.flip else part


class _SegmenterImageProcessing:
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
            validate_typed_dict(self.valid_kwargs, {name: kwargs[name] for name in checked & kwargs.keys()})
        super().__init__(**kwargs)
        self._validate_preprocess_kwargs(**{name: getattr(self, name) for name in self._valid_kwargs_names})

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        return_tensors: str | TensorType | None = "pt",
        **kwargs: Unpack[SegmenterImageProcessorKwargs],
    ) -> BatchFeature:
        r"""Prepare images, and label maps where given, for the model.

        Args:
            images (`ImageInput`): One image or a list of them, of any sizes: paths or URLs, PIL images, numpy arrays or
                torch tensors; grey, palette, RGB, RGBA, CMYK; 8 or 16 bit, or floats from 0 to 255 (from 0 to 1 with
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
        kwargs["return_tensors"] = return_tensors
        if segmentation_maps is not None and not kwargs.keys() & {"do_split_windows", "scales", "do_flip"}:
            kwargs = {
                "do_resize_to_window": True,
                "do_split_windows": False,
                "scales": [1.0],
                "do_flip": False,
            } | kwargs
        with _value_errors():
            return super().preprocess(images, segmentation_maps, **kwargs)

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
        arguments = {"image_like_kwargs": {"lazily": True}, "return_tensors": "pt", **kwargs}
        with _value_errors():
            (windows,) = super().preprocess(image, None, **arguments)
        return windows

    def _validate_preprocess_kwargs(self, **kwargs) -> None:
        super()._validate_preprocess_kwargs(**kwargs)
        size, window_size, stride = kwargs["size"], kwargs["window_size"], kwargs["window_stride"]
        patch_size, scales = kwargs["patch_size"], kwargs["scales"]
        edges = [] if size is None else [size.shortest_edge, size.longest_edge]
        edges = [edge for edge in edges if edge is not None]
        if not all(type(edge) is int and edge > 0 for edge in edges) or (
            kwargs["do_resize"] and not size.shortest_edge
        ):
            raise ValueError(
                '`size` must have a "shortest_edge" and may have a "longest_edge", in pixels, positive integers; got '
                f"{dict(size)}."
            )
        if patch_size < 1 or window_size < 1 or kwargs["padding"] == "end" and window_size % patch_size:
            raise ValueError(
                f"`window_size` must be a positive multiple of the model's `patch_size`, got {window_size} and {patch_size}."
            )
        if not 1 <= stride <= window_size:
            raise ValueError(
                f"`window_stride` must be from 1 to `window_size` ({window_size}), or pixels are left out; got {stride}."
            )
        if len(scales) == 0 or not all(0 < scale <= 16 for scale in scales):
            raise ValueError(f"`scales` must be one or more factors above 0 and up to 16, got {scales}.")
        if not isinstance(kwargs["resample"], int) or kwargs["resample"] not in INTERPOLATION:
            names = [method.name for method in INTERPOLATION]
            raise ValueError(f"`resample` must be one of {names}, got {kwargs['resample']!r}.")
        largest = LARGEST_FACTOR
        for name, used, smallest in (
            ("rescale_factor", kwargs["do_rescale"], 1 / largest),
            ("image_mean", kwargs["do_normalize"], -largest),
            ("image_std", kwargs["do_normalize"], 1 / largest),
        ):
            value = kwargs[name]
            numbers = value if isinstance(value, (list, tuple)) and name != "rescale_factor" else [value]
            fitting = [
                isinstance(n, (int, float)) and type(n) is not bool and smallest <= n <= largest for n in numbers
            ]
            if used and not (fitting and all(fitting)):
                kind = "be a number" if name == "rescale_factor" else "be made of numbers"
                raise ValueError(f"`{name}` must {kind} from {smallest:g} to {largest:g}, got {value!r:.200}.")

    def fetch_images(self, image_url_or_urls: ImageInput) -> ImageInput:
        """Read paths and URLs; images pass through."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image) for image in image_url_or_urls]
        if isinstance(image_url_or_urls, (str, os.PathLike)):
            return read_image(image_url_or_urls)
        return image_url_or_urls

    def _prepare_images_structure(self, images: ImageInput, expected_ndims: int = 3) -> list:
        """A flat list of images, in which grey arrays (height, width) have a channel too."""
        images = self.fetch_images(images)
        given = images if isinstance(images, (list, tuple)) else [images]
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
        return make_flat_list_of_images(images, expected_ndims=expected_ndims)

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: "str | torch.device | None" = None,
        **kwargs,
    ) -> torch.Tensor:
        """Bring one image to (channels, height, width), uint8 or float32."""
        if isinstance(image, PIL.Image.Image):
            image, input_data_format = pil_to_array(image, bool(do_convert_rgb)), ChannelDimension.FIRST
        if is_torch_tensor(image):
            image = image.detach().to("cpu")
            image = (image.float() if image.is_floating_point() else image).numpy()  # numpy has no bfloat16
        array = np.asarray(image)
        if array.ndim == 2:
            array, input_data_format = array[None], ChannelDimension.FIRST
        if array.ndim != 3:
            raise ValueError(f"An image must have two or three dimensions, got the shape {array.shape}.")
        if not (array.dtype == np.bool_ or issubclass(array.dtype.type, (np.integer, np.floating))):
            raise ValueError(f"An image must hold integers, floats or booleans, got {array.dtype}.")
        if input_data_format is None:
            channels = len(self.image_mean) if isinstance(self.image_mean, Sequence) else 3
            input_data_format = channel_axis(array.shape, channels)
        if input_data_format == ChannelDimension.LAST:
            array = np.moveaxis(array, -1, 0)
        if np.issubdtype(array.dtype, np.floating):
            array = array.astype(np.float32)
            if not np.isfinite(array).all():
                raise ValueError("The image holds NaN or infinite values: replace them before processing.")
        else:
            array = to_uint8(array)
        if do_convert_rgb and len(array) == 1:
            array = np.repeat(array, 3, axis=0)
        elif do_convert_rgb and len(array) == 4:
            array = array[:3]
        flags = array.flags
        if not (flags.c_contiguous and flags.writeable and min(array.strides) >= 0):  # -1 in a mirrored single column
            array = array.copy()
        return torch.from_numpy(array).to(device or "cpu")

    def process_segmentation_map(self, segmentation_map: ImageInput, do_reduce_labels: bool) -> torch.Tensor:
        """Bring one label map to (height, width), int64."""
        array = np.array(segmentation_map.detach().cpu() if is_torch_tensor(segmentation_map) else segmentation_map)
        if not (array.dtype == np.bool_ or issubclass(array.dtype.type, np.integer)):
            raise ValueError(
                f"A segmentation map must hold integers, got {array.dtype}. Convert it to class ids first."
            )
        labels = torch.from_numpy(array.astype(np.int64))
        if labels.ndim == 3 and 1 in (labels.shape[0], labels.shape[-1]):
            labels = labels.squeeze(0 if labels.shape[0] == 1 else -1)
        if labels.ndim != 2:
            raise ValueError(
                f"A segmentation map must have the shape (height, width), got {tuple(labels.shape)}. Convert colour-coded "
                "masks to class ids first."
            )
        if do_reduce_labels:
            labels = torch.where((labels == 0) | (labels == 255), 255, labels - 1)
        return labels

    def _preprocess_image_like_inputs(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None,
        do_convert_rgb: bool,
        do_reduce_labels: bool,
        input_data_format: ChannelDimension | None,
        return_tensors: str | TensorType | None,
        device: "str | torch.device | None" = None,
        lazily: bool = False,
        **kwargs,
    ) -> BatchFeature | list[ImageWindows]:
        images = self._prepare_image_like_inputs(
            images, do_convert_rgb=do_convert_rgb, input_data_format=input_data_format, device=device
        )
        maps = [None] * len(images)
        if segmentation_maps is not None:
            maps = self._prepare_images_structure(segmentation_maps, expected_ndims=2)
            if len(maps) != len(images):
                raise ValueError(
                    f"{len(images)} image(s) need as many segmentation maps of the shape (height, width), got {len(maps)}. "
                    "Convert a colour-coded mask to class ids first."
                )
            maps = [self.process_segmentation_map(labels, do_reduce_labels).to(device or "cpu") for labels in maps]
            sizes = [tuple(image.shape[-2:]) for image in images]
            if sizes != [tuple(labels.shape) for labels in maps]:
                raise ValueError(
                    "Each image needs one segmentation map of its (height, width); got images of "
                    f"{sizes} and maps of {[tuple(labels.shape) for labels in maps]}."
                )
        prepared = [
            self._preprocess(image, labels, index, **kwargs) for index, (image, labels) in enumerate(zip(images, maps))
        ]
        if lazily:
            return prepared
        pairs = [(image, window) for image in prepared for window in image.windows]
        data = {
            "pixel_values": [image.pixel_values(window) for image, window in pairs],
            "window_offsets": [torch.tensor(window) for _, window in pairs],
        }
        if segmentation_maps is not None:
            data["labels"] = [image.labels(window) for image, window in pairs]
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _preprocess(
        self,
        image: torch.Tensor,
        labels: torch.Tensor | None,
        image_index: int,
        *,
        do_split_windows: bool,
        window_size: int,
        window_stride: int,
        scales: Sequence[float],
        do_flip: bool,
        **kwargs,
    ) -> ImageWindows:
        """The windows of all views of one image."""
        smallest_side = window_size if do_split_windows else 1
        kwargs["fixed_side"] = window_size if kwargs.pop("do_resize_to_window") else None
        scaled_images = [self._scale(image, labels, scale, smallest_side, **kwargs) for scale in scales]
        windows = []
        for index, scaled in enumerate(scaled_images):
            height, width = scaled.pixels.shape[-2:]
            size = (window_size, window_size) if do_split_windows else (height, width)
            corners = window_corners(height, width, window_size, window_stride) if do_split_windows else [(0, 0)]
            for flip in range(1 + do_flip):
                view = (image_index, index * (1 + do_flip) + flip, flip)
                windows += [Window(*view, *corner, *size, height, width, *image.shape[-2:]) for corner in corners]
        return ImageWindows(windows, scaled_images, 1 + do_flip)

    def _scale(
        self,
        image: torch.Tensor,
        labels: torch.Tensor | None,
        scale: float,
        smallest_side: int,
        *,
        do_resize: bool,
        size: SizeDict,
        fixed_side: int | None,
        resample: PILImageResampling,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | Sequence[float],
        image_std: float | Sequence[float],
        **kwargs,
    ) -> ScaledImage:
        """An image (channels, height, width) and its labels (height, width) at one scale, at least `smallest_side`."""
        if do_rescale and image.is_floating_point() and 0 < image.max() <= 1:
            raise ValueError(
                "The image holds floats up to 1, but `do_rescale=True` expects 0 to 255: pass `do_rescale=False`."
            )
        height, width = image.shape[-2:]
        if do_resize and fixed_side is not None:
            height = width = max(int(fixed_side * scale), 1)
        elif do_resize:
            longest_edge = None if size.longest_edge is None else int(size.longest_edge * scale)
            height, width = resized_size(height, width, int(size.shortest_edge * scale), longest_edge)
        else:
            height, width = resized_size(height, width, min(height, width) * scale)
        if height * width > max(MAX_RESIZED_PIXELS, image.shape[-2] * image.shape[-1]):
            raise ValueError(
                f"An image of {image.shape[-2]} x {image.shape[-1]} pixels would become one of {height} x {width}, expected at "
                f'most {MAX_RESIZED_PIXELS} pixels: lower `size` or `scales`, or give `size` a "longest_edge".'
            )
        pixels = resize_image(image, (height, width), INTERPOLATION[resample])
        labels = None if labels is None else resize_labels(labels, (height, width))

        def normalize(part: torch.Tensor) -> torch.Tensor:
            return self.rescale_and_normalize(part, do_rescale, rescale_factor, do_normalize, image_mean, image_std)

        if min(height, width) >= smallest_side:
            return ScaledImage(pixels, normalize, labels)
        # The protocol enlarges after normalisation, and cuts the longer side to whole pixels instead of rounding.
        if height < width:
            height, width = smallest_side, int(width / height * smallest_side)
        else:
            height, width = int(height / width * smallest_side), smallest_side
        if height * width > MAX_ENLARGED_PIXELS:
            raise ValueError(
                f"An image of {image.shape[-2]} x {image.shape[-1]} pixels is too thin for windows of {smallest_side}: it "
                f"would become one of {height} x {width}, expected at most {MAX_ENLARGED_PIXELS} pixels. Crop or pad it."
            )
        labels = None if labels is None else resize_labels(labels, (height, width))
        return ScaledImage(resize_image(normalize(pixels), (height, width)), None, labels)

    def rescale_and_normalize(
        self,
        image: torch.Tensor,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | Sequence[float],
        image_std: float | Sequence[float],
    ) -> torch.Tensor:
        """(image * rescale_factor - mean) / std of (channels, height, width), in float32."""
        image = image.to(torch.float32, copy=True)
        if do_rescale:
            image.mul_(rescale_factor)
        if do_normalize:
            mean, std = (
                torch.as_tensor(v, device=image.device).float().reshape(-1, 1, 1) for v in (image_mean, image_std)
            )
            if len(mean) not in (1, len(image)) or len(std) not in (1, len(image)):
                raise ValueError(
                    f"`image_mean` and `image_std` must have one value for each of the {len(image)} channels of the "
                    f"image, got {image_mean} and {image_std}."
                )
            image.sub_(mean).div_(std)
        return image

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
        logits, patch_size = outputs.logits, self.patch_size
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

    def to_dict(self) -> dict:
        """Fields of the processor; as remote code it names the classes of both backends."""
        fields = super().to_dict()
        if "auto_map" in fields:
            name = f"{type(self).__module__.split('.')[-1]}.SegmenterImageProcessor"
            fields["auto_map"] = {"AutoImageProcessor": {"torchvision": name, "pil": f"{name}Pil"}}
        return fields


class SegmenterImageProcessor(_SegmenterImageProcessing, TorchvisionBackend):
    r"""Image processor of Segmenter and SETR, the default where torchvision is installed.

    It carries out the protocol of the published results: resize with the aspect ratio kept and without antialiasing,
    overlapping windows, normalisation; and after the model the exact merge to maps of the original sizes.

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
        do_reduce_labels (`bool`, defaults to `False`): Whether stored label 0 is ignored and the others shift down.
        scales (`list[float]`, defaults to `[1.0]`): Factors of the size that are averaged over.
        do_flip (`bool`, defaults to `False`): Whether each scale is also seen mirrored.

    Raises:
        ValueError: If the arguments contradict each other.
    """


class SegmenterImageProcessorPil(_SegmenterImageProcessing, PilBackend):
    r"""[`SegmenterImageProcessor`] without torchvision: the same arguments, and the same results to the bit."""


for _processor in (SegmenterImageProcessor, SegmenterImageProcessorPil):
    _processor.register_for_auto_class("AutoImageProcessor")

__all__ = ["SegmenterImageProcessor", "SegmenterImageProcessorPil"]
