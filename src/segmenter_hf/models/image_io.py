"""Image files of any kind to pictures, and pictures of any kind to arrays of 8 bits."""

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
# Decoded by libraries alone. Pillow hands others to programs that run what is in them: PostScript to Ghostscript.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# What files in folders end in, in lower case, that are predicted and trained on.
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
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
    if is_16_bit or values.dtype == np.uint16 or high > 255:
        return np.round(values / 257.0).astype(np.uint8)
    return values.astype(np.uint8)


def pil_to_array(image: PIL.Image.Image, do_convert_rgb: bool) -> np.ndarray:
    """PIL image of any mode to (channels, height, width), 8 bit unless it holds floats; transparency is dropped."""
    step = max(PIXELS_AT_ONCE // image.width, 1)
    if image.height > step:
        array = None
        for top in range(0, image.height, step):
            bottom = min(top + step, image.height)
            rows = pil_to_array(image.crop((0, top, image.width, bottom)), do_convert_rgb)
            if array is None:
                array = np.empty((len(rows), image.height, image.width), rows.dtype)
            array[:, top:bottom] = rows
        return array
    if image.mode.startswith("I"):
        image = PIL.Image.fromarray(to_uint8(np.asarray(image), is_16_bit=True))
    if do_convert_rgb and image.mode not in ("RGB", "F"):
        image = image.convert("RGBA" if "transparency" in image.info else "RGB").convert("RGB")
    array = np.array(image)
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)


def image_to_array(
    image: Any, do_convert_rgb: bool, input_data_format: "str | ChannelDimension | None", num_channels: int
) -> np.ndarray:
    """Bring an image of any kind to (channels, height, width), contiguous, uint8 or float32.

    Args:
        image (PIL image, numpy array or torch tensor): The image.
        do_convert_rgb (`bool`): Whether it becomes RGB.
        input_data_format (`ChannelDimension`, *optional*): Where an array has its channels.
        num_channels (`int`): How many channels are expected, by which they are found where that is not said.

    Returns:
        `np.ndarray`: The pixels.

    Raises:
        ValueError: If it is no image.
    """
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
            f"A segmentation map must have the shape (height, width), got {labels.shape}. Convert colour-coded masks to "
            "class ids first."
        )
    return np.where((labels == 0) | (labels == 255), 255, labels - 1) if do_reduce_labels else labels


def read_image(source: "str | os.PathLike", max_pixels: int | None = None) -> PIL.Image.Image:
    """Read the first picture of an image file, turned upright by its EXIF orientation, in its own mode.

    Args:
        source (`str` or `os.PathLike`): A path, or text that is an address: it begins with `https://`, `http://` or `data:`.
        max_pixels (`int`, *optional*): Larger images are refused before they are decoded; by default those that Pillow
            refuses, of more than twice `PIL.Image.MAX_IMAGE_PIXELS`.

    Returns:
        `PIL.Image.Image`: The picture, decoded.

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
        "fill the memory. If the picture is meant to be that large, raise `max_image_pixels`, or "
        "`PIL.Image.MAX_IMAGE_PIXELS`."
    )


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


def download(url: str, name: str) -> bytes:
    """The bytes at an address.

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
        content = answer.result(DOWNLOAD_SECONDS)
    except (OSError, ValueError, http.client.HTTPException, concurrent.futures.TimeoutError) as error:
        raise OSError(
            f"{name}: expected an image at this address, but it cannot be had ({type(error).__name__}: {error}). Check the "
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
    "IMAGE_FORMATS",
    "IMAGE_SUFFIXES",
    "PIXELS_AT_ONCE",
    "channel_axis",
    "decode_image",
    "image_to_array",
    "label_map_to_array",
    "pil_to_array",
    "read_image",
    "to_uint8",
]
