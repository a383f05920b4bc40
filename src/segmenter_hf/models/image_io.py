"""Image files of any kind to PIL images, and images of any kind to arrays of 8 bits."""

import concurrent.futures
import http.client
import io
import os
import threading
import urllib.request
from typing import Any, BinaryIO

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from transformers.image_utils import ChannelDimension


# A large image is brought to 8 bits, and resized, in parts: twice in memory it would be what limits its size.
PIXELS_AT_ONCE = 2**22
MAX_IMAGE_PIXELS = 2 * 89_478_485  # what Pillow refuses by itself
# Decoded by libraries alone. Pillow hands others to programs that run what is in them: PostScript to Ghostscript.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
TIFF_PREFIXES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# What files in folders end in, in lower case, that are predicted and trained on.
IMAGE_SUFFIXES = (
    *(".bmp", ".gif", ".png", ".tif", ".tiff", ".webp"),
    *(".jfif", ".jpe", ".jpeg", ".jpg", ".j2k", ".jp2"),
    *(".pbm", ".pgm", ".pnm", ".ppm"),
)
ARRAY_SUFFIXES = (".npy",)
MAX_DOWNLOAD_BYTES = 2**28
DOWNLOAD_TIMEOUT = 30  # seconds without an answer
DOWNLOAD_SECONDS = 300  # of a whole download


def to_uint8(values: np.ndarray, is_16_bit: bool = False) -> np.ndarray:
    """Boolean and 16-bit pixel values to 8 bit, full range to full range; 8-bit ones in any integer dtype unchanged."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ValueError(f"Integer images must hold values from 0 to 65535, got {low} to {high}.")
    if is_16_bit or (values.dtype.kind, values.dtype.itemsize) == ("u", 2) or high > 255:  # of either byte order
        return np.round(values / 257.0).astype(np.uint8)
    return values.astype(np.uint8)


def pil_to_array(image: PIL.Image.Image, do_convert_rgb: bool) -> np.ndarray:
    """PIL image of any mode to (channels, height, width), 8 bit unless it holds floats; transparency is dropped."""
    step = max(PIXELS_AT_ONCE // image.width, 1)
    if image.height > step:
        array: np.ndarray | None = None
        for top in range(0, image.height, step):
            bottom = min(top + step, image.height)
            rows = pil_to_array(image.crop((0, top, image.width, bottom)), do_convert_rgb)
            if array is None:
                array = np.empty((len(rows), image.height, image.width), rows.dtype)
            array[:, top:bottom] = rows
        if array is not None:
            return array
    if image.mode.startswith("I"):
        image = PIL.Image.fromarray(to_uint8(np.asarray(image), is_16_bit=True))
    if do_convert_rgb and image.mode not in ("RGB", "F"):
        image = image.convert("RGBA" if "transparency" in image.info else "RGB").convert("RGB")
    elif image.mode == "P":  # what it holds are places in its palette
        image = image.convert("L")
    array = np.array(image)
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)


def image_to_array(
    image: Any,
    do_convert_rgb: bool,
    input_data_format: "str | ChannelDimension | None",
    num_channels: int,
    value_range: "tuple[float, float] | list[float] | None" = None,
) -> np.ndarray:
    """Bring an image of any kind to (channels, height, width), contiguous, uint8 or float32.

    Args:
        image (PIL image, numpy array or torch tensor): The image.
        do_convert_rgb (`bool`): Whether it becomes RGB.
        input_data_format (`ChannelDimension`, *optional*): Where an array has its channels.
        num_channels (`int`): How many channels are expected, by which they are found where that is not said.
        value_range (`tuple[float, float]`, *optional*): What becomes 0 and 255: see [`scale_values`].

    Returns:
        `np.ndarray`: The pixels.

    Raises:
        ValueError: If it is no image.
    """
    if isinstance(image, PIL.Image.Image) and value_range is not None and image.mode.startswith("I"):
        image = np.asarray(image)
    if isinstance(image, PIL.Image.Image):
        image, input_data_format = pil_to_array(image, do_convert_rgb), ChannelDimension.FIRST
    if isinstance(image, torch.Tensor):
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
        input_data_format = channel_axis(array.shape, num_channels)
    if input_data_format == ChannelDimension.LAST:
        array = np.moveaxis(array, -1, 0)
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        raise ValueError("The image holds NaN or infinite values: replace them before processing.")
    array = scale_values(array, value_range)
    if do_convert_rgb and len(array) == 1:
        array = np.repeat(array, 3, axis=0)
    elif do_convert_rgb and len(array) == 4:
        array = array[:3]
    flags = array.flags
    if not (flags.c_contiguous and flags.writeable and min(array.strides) >= 0):  # -1 in a mirrored single column
        array = array.copy()
    return array


def label_map_to_array(label_map: Any, do_reduce_labels: bool) -> np.ndarray:
    """Bring a label map of any kind to (height, width), int64.

    Args:
        label_map (PIL image, numpy array or torch tensor): The label map.
        do_reduce_labels (`bool`): Whether label 0 becomes 255 and the others shift down by one.

    Returns:
        `np.ndarray`: The labels.

    Raises:
        ValueError: If it is no map of integers.
    """
    array = np.array(label_map.detach().cpu() if isinstance(label_map, torch.Tensor) else label_map)
    if not (array.dtype == np.bool_ or issubclass(array.dtype.type, np.integer)):
        raise ValueError(f"A segmentation map must hold integers, got {array.dtype}. Convert it to class ids first.")
    labels = array.astype(np.int64)
    if labels.ndim == 3 and 1 in (labels.shape[0], labels.shape[-1]):
        labels = labels.squeeze(0 if labels.shape[0] == 1 else -1)
    if labels.ndim != 2:
        raise ValueError(
            f"A segmentation map must have the shape (height, width), got {labels.shape}. Convert color-coded masks to "
            "class ids first."
        )
    return np.where((labels == 0) | (labels == 255), 255, labels - 1) if do_reduce_labels else labels


def read_image(source: "str | os.PathLike[str]", max_pixels: int | None = None) -> PIL.Image.Image:
    """Read the first image of an image file, turned upright by its EXIF orientation, in its own mode.

    Args:
        source (`str` or `os.PathLike`): A path, or text that is an address: it begins with `https://`, `http://` or `data:`.
        max_pixels (`int`, *optional*): Larger images are refused before they are decoded; by default those that Pillow
            refuses, of more than twice `PIL.Image.MAX_IMAGE_PIXELS`.

    Returns:
        `PIL.Image.Image`: The image, decoded.

    Raises:
        OSError: If there is no such file, or the address cannot be reached.
        ValueError: If it is no image of `IMAGE_FORMATS`, is damaged, or has too many pixels.
    """
    name = os.fspath(source)
    name = name if len(name) <= 200 else f"{name[:200]}..."
    if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
        return decode_image(io.BytesIO(download(source, name)), name, max_pixels)
    if os.path.isdir(source):
        raise IsADirectoryError(f"{name}: expected an image file, got a folder. Give the files in it.")
    if not os.path.isfile(source):
        raise FileNotFoundError(f"{name}: expected an image file, but there is none. Check the path.")
    with open(source, "rb") as file:
        return decode_image(file, name, max_pixels)


def decode_image(file: BinaryIO, name: str, max_pixels: int | None = None) -> PIL.Image.Image:
    """Decode an opened image file: see [`read_image`]; `name` is what errors call it."""
    if max_pixels is None and PIL.Image.MAX_IMAGE_PIXELS is not None:
        max_pixels = 2 * PIL.Image.MAX_IMAGE_PIXELS
    try:
        image = _open_image(file)
        too_large = max_pixels is not None and image.width * image.height > max_pixels
        if not too_large:
            image.load()
            PIL.ImageOps.exif_transpose(image, in_place=True)
            return image
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(
            f"{name}: expected an image ({', '.join(IMAGE_FORMATS)}), got a file that is damaged or something else. "
            f"Download or save it again. {type(error).__name__}: {error}"
        ) from error
    raise ValueError(
        f"{name}: {image.width} x {image.height} pixels are more than {max_pixels}, which guards against files made to "
        "fill the memory. If the image is meant to be that large, raise `max_image_pixels`, or "
        "`PIL.Image.MAX_IMAGE_PIXELS`."
    )


def read_channels(
    source: "str | os.PathLike[str]",
    num_channels: int = 3,
    max_pixels: int | None = None,
    timeout: float | None = None,
) -> PIL.Image.Image | np.ndarray:
    """Read an image file with the channels that a model takes, and the depth that it is stored with.

    Args:
        source (`str` or `os.PathLike`): A path or an address, as for [`read_image`]; also of a TIFF with any number of
            channels, or of a `.npy` array.
        num_channels (`int`, defaults to 3): Channels of the model.
        max_pixels (`int`, *optional*): Larger images are refused before they are decoded.
        timeout (`float`, *optional*): Seconds for the whole download of an address; `DOWNLOAD_SECONDS` by default.

    Returns:
        `PIL.Image.Image` or `np.ndarray` of shape `(channels, height, width)`: What Pillow reads, or else the array.

    Raises:
        OSError: If there is no such file, or the address cannot be reached.
        ValueError: If it is no image, is damaged, has too many pixels, or has another number of channels.
    """
    if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
        name = source if len(source) <= 200 else f"{source[:200]}..."
        return decode_channels(io.BytesIO(download(source, name, timeout)), name, num_channels, max_pixels)
    if not os.path.isfile(source):
        read_image(source)  # says what is there instead
    with open(source, "rb") as file:
        return decode_channels(file, os.fspath(source), num_channels, max_pixels)


def decode_channels(
    file: BinaryIO, name: str, num_channels: int = 3, max_pixels: int | None = None
) -> PIL.Image.Image | np.ndarray:
    """Decode an opened image file: see [`read_channels`]; `name` is what errors call it."""
    array = load_array(file, name, num_channels, max_pixels)
    image = decode_image(file, name, max_pixels) if array is None else array
    check_channels(image, num_channels, name)
    return image


def load_array(
    file: BinaryIO, name: str, num_channels: int | None = None, max_pixels: int | None = None
) -> np.ndarray | None:
    """Decode what Pillow does not read: arrays, and TIFF with many channels or 16 bits.

    Args:
        file (`BinaryIO`): The opened file; it is at its start afterwards.
        name (`str`): What errors call it.
        num_channels (`int`, *optional*): Channels of the model, which tell what the axes of an array are.
        max_pixels (`int`, *optional*): Larger images are refused before they are decoded.

    Returns:
        `np.ndarray` of shape `(channels, height, width)`, *optional*: Nothing for what Pillow reads.

    Raises:
        ValueError: If the file is damaged, holds no numbers, or has too many pixels.
    """
    limit = 2 * PIL.Image.MAX_IMAGE_PIXELS if max_pixels is None and PIL.Image.MAX_IMAGE_PIXELS else max_pixels
    prefix = file.read(8)
    file.seek(0)
    array = None
    try:
        if prefix.startswith(b"\x93NUMPY"):
            array = _load_npy(file, num_channels, limit)
        elif prefix[:4] in TIFF_PREFIXES:
            array = _load_tiff(file, name, num_channels, limit)
    except (MemoryError, _ChannelError):
        raise
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(
            f"{name}: expected an image that can be read as an array of channels. {type(error).__name__}: {error}"
        ) from error
    file.seek(0)
    return array


def check_channels(image: PIL.Image.Image | np.ndarray, num_channels: int, name: str) -> None:
    """Refuse an image file with other channels than the model's. Gray and palette images become RGB.

    Raises:
        ValueError: If the numbers differ; names both.
    """
    if isinstance(image, PIL.Image.Image):
        # The fourth band of PNG is transparency. That of TIFF may be anything, such as near infrared.
        is_rgb = num_channels == 3 and (image.mode != "RGBA" or image.format != "TIFF")
        found = num_channels if is_rgb else len(image.getbands())
    else:
        found = 3 if num_channels == 3 and len(image) == 1 else len(image)
    _check_count(found, num_channels, name)


class _ChannelError(ValueError):
    """An image has other channels than the model."""


def _check_count(found: int, num_channels: int, name: str) -> None:
    if found != num_channels:
        raise _ChannelError(
            f"{name}: the image has {found} channels, and the model takes {num_channels} (`num_channels`). Give images of "
            f"{num_channels} channels, or train a model of {found} with `config_overrides=num_channels={found}`."
        )


def _check_pixels(height: int, width: int, limit: int | None) -> None:
    if limit is not None and height * width > limit:
        raise ValueError(f"{width} x {height} pixels are more than {limit}: raise `max_image_pixels`.")


def _load_npy(file: BinaryIO, num_channels: int | None, limit: int | None) -> np.ndarray:
    """A `.npy` array as (channels, height, width); the objects that such a file can hold are never made."""
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if len(shape) not in (2, 3) or dtype.hasobject or dtype.kind not in "biuf":
        raise ValueError(f"expected numbers in two or three dimensions, got {dtype} of the shape {shape}.")
    is_first = len(shape) == 3 and (shape[0] == num_channels or (shape[-1] != num_channels and shape[0] < shape[-1]))
    sides = shape if len(shape) == 2 else shape[1:] if is_first else shape[:2]
    _check_pixels(sides[0], sides[1], limit)
    file.seek(0)
    array = np.load(file, allow_pickle=False)
    return array[None] if array.ndim == 2 else array if is_first else np.moveaxis(array, -1, 0)


def _load_tiff(file: BinaryIO, name: str, num_channels: int | None, limit: int | None) -> np.ndarray | None:
    """A TIFF as (channels, height, width); nothing where Pillow reads it whole: gray, and 8-bit RGB, palette and CMYK."""
    try:
        import tifffile
    except ImportError:
        return None
    with tifffile.TiffFile(file) as tiff:
        page, series = tiff.pages.first, tiff.series[0]
        samples = page.samplesperpixel
        _check_pixels(page.imagelength, page.imagewidth, limit)
        is_stack = samples == 1 and series.ndim == 3 and num_channels not in (None, 1)  # a page for each channel
        if num_channels == 3:  # else the first page, which becomes RGB
            is_stack &= len(series.pages) == 3 and page.photometric == tifffile.PHOTOMETRIC.MINISBLACK
        is_cmyk = page.photometric == tifffile.PHOTOMETRIC.SEPARATED
        if not is_stack and (samples == 1 or (page.dtype == np.uint8 and (samples == 3 or is_cmyk))):
            return None
        if page.tags.valueof("Orientation", 1) != 1:
            raise ValueError(
                "the TIFF is stored turned (tag Orientation), and its pixels are read as they are. Save it upright."
            )
        if num_channels is not None:  # before what may fill the memory is decoded
            _check_count(series.shape[0] if is_stack else samples, num_channels, name)
        if is_stack:
            return series.asarray()
        array = page.asarray()
        return array if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE else np.moveaxis(array, -1, 0)


def scale_values(values: np.ndarray, value_range: "tuple[float, float] | list[float] | None") -> np.ndarray:
    """Bring pixel values to what 8-bit images have: by [`to_uint8`], or from a range to 0 to 255 as float32.

    Args:
        values (`np.ndarray`): Pixel values of any shape and dtype.
        value_range (`tuple[float, float]`, *optional*): What becomes 0 and 255; values beyond are cut.

    Returns:
        `np.ndarray`: Of the same shape: `uint8` of integers without a range, else `float32`.

    Raises:
        ValueError: If the range goes beyond the 8 bits that the values have, as of 16-bit RGB PNG, which Pillow cuts.
    """
    if value_range is None:
        return values.astype(np.float32) if np.issubdtype(values.dtype, np.floating) else to_uint8(values)
    low, high = value_range
    if values.dtype == np.uint8 and high > 255:
        raise ValueError(
            f"The image was read as 8-bit values, and `value_range` [{low:g}, {high:g}] goes beyond their 255. Color PNG of 16 "
            "bits are read as 8: save them as TIFF or .npy. For 8-bit images leave `value_range` out."
        )
    scaled = values.astype(np.float32)
    scaled -= np.float32(low)
    scaled *= np.float32(255 / (high - low))
    return scaled.clip(0, 255, out=scaled)


def _open_image(file: BinaryIO) -> PIL.Image.Image:
    """`PIL.Image.open` for `IMAGE_FORMATS`, without its limit of pixels, which is one for all threads."""
    PIL.Image.init()
    prefix = file.read(16)
    for name in IMAGE_FORMATS:
        factory, accept = PIL.Image.OPEN[name]
        if accept is None or accept(prefix) is True:
            file.seek(0)
            return factory(file, "")
    raise ValueError(f"no image begins with {prefix[:8]!r}")


def download(url: str, name: str, timeout: float | None = None) -> bytes:
    """The bytes at an address, all of which have come after `timeout` seconds, by default `DOWNLOAD_SECONDS`.

    Raises:
        OSError: If it cannot be reached, does not answer in time, or holds too much to be an image.
    """
    answer: concurrent.futures.Future[bytes] = concurrent.futures.Future()

    def fetch() -> None:
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "segmenter-hf"})
            with urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT) as response:
                answer.set_result(response.read(MAX_DOWNLOAD_BYTES + 1))
        except Exception as error:
            answer.set_exception(error)

    # A server can keep every single read short and never end: only another thread can give up on all of them.
    threading.Thread(target=fetch, daemon=True).start()
    try:
        content = answer.result(DOWNLOAD_SECONDS if timeout is None else timeout)
    except (OSError, ValueError, http.client.HTTPException, concurrent.futures.TimeoutError) as error:
        raise OSError(
            f"{name}: expected an image at this address, but it is not available ({type(error).__name__}: {error}). Check the "
            "address and the network, or give a file."
        ) from error
    if len(content) > MAX_DOWNLOAD_BYTES:
        raise OSError(
            f"{name}: expected an image of at most {MAX_DOWNLOAD_BYTES} bytes, got more. Download it and give the file."
        )
    return content


def channel_axis(shape: tuple[int, ...], num_channels: int) -> ChannelDimension:
    """Where the channels of an image are: the axis of `num_channels`, or else of 3, 4 or 1, the first axis before the last.

    Raises:
        ValueError: If neither axis has as many.
    """
    for count in dict.fromkeys((num_channels, 3, 4, 1)):
        if shape[0] == count:
            return ChannelDimension.FIRST
        if shape[-1] == count:
            return ChannelDimension.LAST
    raise ValueError(
        f"Expected an image of {num_channels} channels (or 1, 3 or 4), first or last; got the shape {tuple(shape)}. For other "
        "numbers of channels give `image_mean` and `image_std` one value for each and set `do_convert_rgb=False`."
    )


__all__ = [
    "ARRAY_SUFFIXES",
    "IMAGE_FORMATS",
    "IMAGE_SUFFIXES",
    "MAX_IMAGE_PIXELS",
    "PIXELS_AT_ONCE",
    "channel_axis",
    "check_channels",
    "decode_channels",
    "decode_image",
    "image_to_array",
    "label_map_to_array",
    "load_array",
    "pil_to_array",
    "read_channels",
    "read_image",
    "scale_values",
    "to_uint8",
]
