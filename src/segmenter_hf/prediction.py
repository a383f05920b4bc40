"""Prediction with the published protocol: images in memory, and files to label maps and overlays."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from tqdm.auto import tqdm
from transformers import (
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    BaseImageProcessor,
    PreTrainedModel,
)
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput

from .attention import attention_picture
from .files import replaced_file
from .image_processing_segmenter import ImageWindows
from .image_reading import pil_to_array, read_image
from .label_sets import LabelSet, label_set_of_model, load_label_set
from .sliding_window import Window, WindowMerger
from .visualization import label_map_image, overlay, with_legend


MULTI_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)
MAX_IMAGE_PIXELS = 2 * 89_478_485  # what Pillow refuses by itself
MAX_OVERLAY_SIDE = 4096  # pixels; larger pictures are reduced before they are painted

Picture = Image.Image | np.ndarray | torch.Tensor


def protocol_arguments(
    multi_scale_flip: bool = False, scales: Sequence[float] | None = None, full_resolution: bool = False
) -> dict[str, Any]:
    """The processor's arguments for the single-scale or the multi-scale + flip protocol of the papers, or one's own.

    Args:
        multi_scale_flip (`bool`, defaults to `False`): Whether to average over six scales, each also mirrored.
        scales (`Sequence[float]`, *optional*): Other scales than these six, or than 1.
        full_resolution (`bool`, defaults to `False`): Whether images keep their size instead of the processor's.

    Returns:
        `dict`: `scales`, `do_flip`, and `do_resize` where it is not left to the processor.
    """
    preset = MULTI_SCALES if multi_scale_flip else (1.0,)
    arguments = {"scales": list(preset if scales is None else scales), "do_flip": multi_scale_flip}
    return {**arguments, "do_resize": False} if full_resolution else arguments


def describe_protocol(
    processor: BaseImageProcessor, multi_scale_flip: bool = False, scales: Sequence[float] | None = None
) -> dict[str, Any]:
    """Everything that a number depends on besides model and data, to be saved beside it."""
    arguments = protocol_arguments(multi_scale_flip, scales)
    if multi_scale_flip and arguments["scales"] == list(MULTI_SCALES):
        name = "multi-scale + flip"
    elif not multi_scale_flip and arguments["scales"] == [1.0]:
        name = "single scale"
    else:
        name = f"scales {', '.join(map(str, arguments['scales']))}{' + flip' if multi_scale_flip else ''}"
    return {
        "name": name,
        **arguments,
        "size": dict(processor.size),
        "window_size": processor.window_size,
        "window_stride": processor.window_stride,
        "resample": "bilinear without antialiasing",
        "resolution": "original size of each image",
    }


def process_state() -> PartialState:
    """Which of how many processes this is, as `accelerate launch` or `torch.distributed.run` started them."""
    return PartialState(cpu=not torch.cuda.is_available())  # or else processes on CPUs do not know of each other


def load_model(
    name_or_path: str | Path,
    label_set: str | None = None,
    device: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    int8: bool = False,
    compile: bool = False,
) -> tuple[PreTrainedModel, BaseImageProcessor, LabelSet]:
    """Load a model with its image processor and label set.

    Args:
        name_or_path (`str` or `Path`): Directory or Hub name of the model.
        label_set (`str`, *optional*): Name or JSON file of a label set; by default the one that belongs to the model.
        device (`str`, *optional*): Where the model goes; by default a GPU where there is one.
        dtype (`torch.dtype`, defaults to `torch.float32`): Type of the weights. `torch.bfloat16` is approximate, and
            fast where the hardware has it; results are merged in float32 anyway.
        int8 (`bool`, defaults to `False`): Whether to keep the weights of linear layers in 8 bits: approximate, and for
            memory. Needs torchao (`pip install segmenter-hf[int8]`).
        compile (`bool`, defaults to `False`): Whether to compile the network on its first use. Each number of windows at
            once is compiled anew, which takes up to a minute; it pays for many images.

    Returns:
        `tuple[PreTrainedModel, BaseImageProcessor, LabelSet]`: The model in evaluation mode, and what belongs to it.

    Raises:
        ImportError: If `int8` is wanted and torchao is missing.
    """
    device = device or process_state().device
    arguments: dict[str, Any] = {"dtype": dtype}
    if int8:
        try:
            from torchao.quantization import Int8WeightOnlyConfig
            from transformers import TorchAoConfig
        except ImportError as error:
            raise ImportError("8-bit weights need torchao: `pip install segmenter-hf[int8]`.") from error
        arguments["quantization_config"] = TorchAoConfig(Int8WeightOnlyConfig())
    # The classes of this package, whatever code the configuration names: nobody is asked whether to run it.
    arguments["trust_remote_code"] = False
    model = AutoModelForSemanticSegmentation.from_pretrained(name_or_path, **arguments).to(device).eval()
    if compile:
        model.compile(fullgraph=True)
    processor = AutoImageProcessor.from_pretrained(name_or_path, trust_remote_code=False)
    found = label_set_of_model(name_or_path, model.config.id2label) if label_set is None else load_label_set(label_set)
    return model, processor, found.with_background()


@torch.no_grad()
def stream_segmentations(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    images: Iterable[Picture | ImageWindows],
    *,
    multi_scale_flip: bool = False,
    scales: Sequence[float] | None = None,
    full_resolution: bool = False,
    window_batch_size: int = 8,
    return_segmentation_scores: bool = False,
    dtype: torch.dtype = torch.long,
) -> Iterator["torch.Tensor | SemanticSegmentationPostProcessorOutput"]:
    """Segment images of any sizes one after the other with the published protocol.

    Windows of all scales, flips and images go through the network in batches. They are cut and normalised for their
    batch only, and rows of a map are merged as soon as the windows over them are through. Besides the image and its map
    the memory holds a batch, and the patch logits of about two rows of windows for each scale and flip.

    Args:
        model (`PreTrainedModel`): A semantic segmentation model of this package, in evaluation mode.
        processor (`BaseImageProcessor`): Its image processor.
        images (`Iterable` of PIL images, arrays, tensors or paths): The images, taken when they are needed. What
            `processor.lazy_windows` gives for one is taken as it is.
        multi_scale_flip (`bool`, defaults to `False`): Whether to average over six scales, each also mirrored.
        scales (`Sequence[float]`, *optional*): Other scales than these six, or than 1.
        full_resolution (`bool`, defaults to `False`): Whether images keep their size instead of being resized to that of
            the processor.
        window_batch_size (`int`, defaults to 8): Windows that go through the network at once; bounds its memory.
        return_segmentation_scores (`bool`, defaults to `False`): Whether class probabilities are wanted too.
        dtype (`torch.dtype`, defaults to `torch.long`): Integer type of the class maps. A large map of up to 256 classes
            needs an eighth of the memory as `torch.uint8`.

    Yields:
        What `processor.post_process_semantic_segmentation` returns for each image, on the model's device.

    Raises:
        ValueError: If `window_batch_size` is below 1, `dtype` cannot hold the classes, or an image is not one.
    """
    if window_batch_size < 1:
        raise ValueError(f"`window_batch_size` must be at least 1, got {window_batch_size}.")
    if dtype not in INTEGERS or model.config.num_labels - 1 > torch.iinfo(dtype).max:
        raise ValueError(f"`dtype` must be an integer type that holds {model.config.num_labels} classes, got {dtype}.")
    arguments = protocol_arguments(multi_scale_flip, scales, full_resolution)
    mergers: deque[WindowMerger] = deque()
    batch: list[tuple[WindowMerger, Window, torch.Tensor]] = []

    def finished() -> Iterator["torch.Tensor | SemanticSegmentationPostProcessorOutput"]:
        """Take the batch through the network; the maps that are then complete."""
        pixel_values = torch.stack([pixels for _, _, pixels in batch]).to(model.device, model.dtype)
        logits = model(pixel_values=pixel_values).logits
        for merger in mergers:
            indices = [index for index, (of_window, _, _) in enumerate(batch) if of_window is merger]
            if indices:
                merger.add([batch[index][1] for index in indices], logits[indices[0] : indices[-1] + 1])
        batch.clear()
        while mergers and mergers[0].is_complete:
            merger = mergers.popleft()
            if return_segmentation_scores:
                data = {"segmentation": merger.segmentation, "segmentation_scores": merger.scores}
                yield SemanticSegmentationPostProcessorOutput(data=data)
            else:
                yield merger.segmentation

    def prepared(image: Picture | ImageWindows) -> ImageWindows:
        return image if isinstance(image, ImageWindows) else processor.lazy_windows(image, **arguments)

    for source in map(prepared, images):  # which keeps no hold of the image as it came
        # From top to bottom in all views at once, so that rows can be merged and forgotten.
        windows = sorted(source.windows, key=lambda window: window.top / window.view_height)
        mergers.append(
            WindowMerger(windows, processor.patch_size, return_scores=return_segmentation_scores, dtype=dtype)
        )
        merger = mergers[-1]
        for window in windows:
            pixels = source.pixel_values(window)
            if len(batch) == window_batch_size or (batch and batch[0][2].shape != pixels.shape):
                yield from finished()
            batch.append((merger, window, pixels))
        del source  # before the next image is read
    if batch:
        yield from finished()


def segment_images(
    model: PreTrainedModel, processor: BaseImageProcessor, images: Iterable[Picture], **kwargs: Any
) -> list:
    """Segment images of any sizes with the published protocol.

    Args:
        model (`PreTrainedModel`), processor (`BaseImageProcessor`), images (`Iterable`): As for `stream_segmentations`.
        kwargs: Its further arguments.

    Returns:
        `list`: What `processor.post_process_semantic_segmentation` returns for each image, on the model's device.

    Raises:
        ValueError: As `stream_segmentations`.
    """
    return list(stream_segmentations(model, processor, images, **kwargs))


IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def find_pictures(paths: Sequence[str | Path]) -> dict[str, Path]:
    """The pictures among files and below folders, by the name that their results get.

    Args:
        paths (`Sequence` of `str` or `Path`): Picture files, which may have any suffix, and folders of pictures.

    Returns:
        `dict[str, Path]`: The file of each name. A name is the path below its folder without the suffix, and is made
        unique with a number where two files share it.

    Raises:
        FileNotFoundError: If a path does not exist or a folder holds no picture.
    """
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
            names = [file.relative_to(path).with_suffix("") for file in files]
        else:
            files, names = [path] if path.is_file() else [], [Path(path.stem)]
        if not files:
            raise FileNotFoundError(
                f"{path}: no picture there. Expected a picture, or a folder with {', '.join(sorted(IMAGE_SUFFIXES))} files."
            )
        for file, name in zip(files, names):
            unique, number = name.as_posix(), 1
            while unique in found:
                number += 1
                unique = f"{name.as_posix()}-{number}"
            found[unique] = file
    return found


def read_picture(path: Path, max_image_pixels: int) -> Image.Image:
    """Read a picture file of a bounded size, upright.

    Raises:
        ValueError: If it has more pixels, or is none.
    """
    try:
        return read_image(path, max_image_pixels)
    except OSError as error:
        raise ValueError(str(error)) from error


def save_label_map(segmentation: np.ndarray, label_set: LabelSet, path: Path) -> None:
    """Write a label map."""
    with replaced_file(path) as temporary:
        label_map_image(segmentation, label_set.palette).save(temporary)


def reduced(picture: Image.Image, segmentation: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    """A picture and its segmentation (height, width), by a whole factor smaller where it is too large to look at."""
    factor = -(-max(picture.size) // MAX_OVERLAY_SIDE)
    if factor > 1:
        width, height = (side // factor for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BOX)
        segmentation = segmentation[factor // 2 :: factor, factor // 2 :: factor][:height, :width]
    if picture.mode.startswith("I"):  # Pillow would clip 16 bits to 8; the model sees them scaled
        picture = Image.fromarray(np.moveaxis(pil_to_array(picture, do_convert_rgb=True), 0, -1))
    return picture.convert("RGB"), segmentation


def save_overlay(picture: Image.Image, segmentation: np.ndarray, label_set: LabelSet, path: Path) -> None:
    """Write a picture with its segmentation and a legend."""
    shown = overlay(picture, segmentation, label_set.palette)
    with replaced_file(path) as temporary:
        with_legend(shown, segmentation, label_set.id2label, label_set.palette).save(temporary)


def predict_files(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    paths: Sequence[str | Path],
    output_dir: str | Path,
    label_set: LabelSet,
    *,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    attention: bool = False,
    multi_scale_flip: bool = False,
    scales: Sequence[float] | None = None,
    full_resolution: bool = False,
    show_progress: bool = True,
    **kwargs: Any,
) -> dict[str, Path]:
    """Segment picture files; write `NAME.png`, the label map, and `NAME_overlay.png`, the picture with a legend.

    The pixels of a label map are class ids; it has the size of the picture, turned upright by its EXIF orientation. The
    overlay of a picture with a side of more than 4096 pixels is reduced by a whole factor.

    Args:
        model (`PreTrainedModel`), processor (`BaseImageProcessor`): The model and its image processor.
        paths (`Sequence` of `str` or `Path`): Picture files and folders of them.
        output_dir (`str` or `Path`): Where the results go.
        label_set (`LabelSet`): Names and colours of the model's classes.
        max_image_pixels (`int`, defaults to 178956970): Pictures with more pixels are not read.
        attention (`bool`, defaults to `False`): Whether to write `NAME_attention.png` too: what the largest classes of the
            picture attend to (see `attention_picture`).
        multi_scale_flip, scales, full_resolution: As for `stream_segmentations`.
        show_progress (`bool`, defaults to `True`): Whether to show a progress bar.
        kwargs: Further arguments of `stream_segmentations`.

    Returns:
        `dict[str, Path]`: The label map of each picture, by name.

    Raises:
        FileNotFoundError: If a path does not exist or a folder holds no picture.
        ValueError: If pictures cannot be read or segmented, after all others are done; names each.
    """
    model.eval()
    pictures = find_pictures(paths)
    waiting: deque[str] = deque()
    unreadable: list[str] = []

    arguments = protocol_arguments(multi_scale_flip, scales, full_resolution)

    def readable() -> Iterator[ImageWindows]:
        for name, path in pictures.items():
            try:
                windows = [processor.lazy_windows(read_picture(path, max_image_pixels), **arguments)]
            except ValueError as error:
                unreadable.append(str(error) if str(path) in str(error) else f"{path}: {error}")
                continue
            waiting.append(name)
            yield windows.pop()  # a large picture is not held here too

    written: dict[str, Path] = {}
    dtype = torch.uint8 if model.config.num_labels <= 256 else torch.int32
    segmentations = stream_segmentations(model, processor, readable(), dtype=dtype, **kwargs)
    with tqdm(total=len(pictures), desc="Segmenting", unit="image", disable=not show_progress) as progress:
        for segmentation in segmentations:
            name, segmentation = waiting.popleft(), segmentation.cpu().numpy()
            label_map = Path(output_dir) / f"{name}.png"
            save_label_map(segmentation, label_set, label_map)
            # Read again: to keep large pictures until their maps are there would take more than the maps.
            picture, segmentation = reduced(read_picture(pictures[name], max_image_pixels), segmentation)
            save_overlay(picture, segmentation, label_set, label_map.with_name(f"{label_map.stem}_overlay.png"))
            if attention:
                shown = attention_picture(model, processor, picture, segmentation, label_set)
                with replaced_file(label_map.with_name(f"{label_map.stem}_attention.png")) as temporary:
                    shown.save(temporary)
            del picture
            written[name] = label_map
            progress.update()
    if unreadable:
        listed = "\n  ".join(unreadable)
        raise ValueError(
            f"{len(unreadable)} of {len(pictures)} pictures cannot be read, the others are done:\n  {listed}"
        )
    return written
