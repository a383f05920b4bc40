"""Prediction with the published protocol: images in memory, and files to label maps and overlays."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from safetensors import safe_open
from tqdm.auto import tqdm
from transformers import (
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    BaseImageProcessor,
    PreTrainedModel,
)
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
from transformers.utils import CONFIG_NAME, cached_file

from ..data.label_sets import LabelSet, get_model_label_set, load_label_set
from ..models.image_io import read_image
from ..models.image_processing_segmenter import ImageWindows
from ..models.sliding_window import Window, WindowMerger
from ..utils.atomic_files import atomic_write
from .attention import attention_picture
from .visualization import as_rgb, label_map_image, overlay, with_legend


MULTI_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)
MAX_IMAGE_PIXELS = 2 * 89_478_485  # what Pillow refuses by itself
MAX_NAME_BYTES = 255  # of a file, on nearly all file systems
MAX_OVERLAY_SIDE = 4096  # pixels; larger pictures are reduced before they are painted
# What libraries say instead of raising `MemoryError` or `torch.OutOfMemoryError`, in lower case.
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "alloc_failed", "bad_alloc")
REMEDY = "Download or save it again, or convert the checkpoint with scripts/convert_checkpoint.py."

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
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    int8: bool = False,
    compile: bool = False,
) -> tuple[PreTrainedModel, BaseImageProcessor, LabelSet]:
    """Load a model with its image processor and label set: whole, finite, and of this package, or not at all.

    Args:
        name_or_path (`str` or `Path`): Directory or Hub name of the model.
        label_set (`str`, *optional*): Name or JSON file of a label set; by default the one that belongs to the model.
        device (`str`, *optional*): Where the model goes; by default a GPU where there is one.
        revision (`str`, *optional*): Branch, tag or commit on the Hub; the main branch by default.
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
        ValueError: If there is no such device, the label set does not fit, or as [`load_model_and_processor`].
    """
    target_device = find_device(device)
    arguments: dict[str, Any] = {"dtype": dtype}
    if int8:
        try:
            from torchao.quantization import Int8WeightOnlyConfig
            from transformers import TorchAoConfig
        except ImportError as error:
            raise ImportError("8-bit weights need torchao: `pip install segmenter-hf[int8]`.") from error
        arguments["quantization_config"] = TorchAoConfig(Int8WeightOnlyConfig())
    model, processor = load_model_and_processor(name_or_path, revision, **arguments)
    if label_set is None:
        found = get_model_label_set(name_or_path, model.config.id2label, revision)
    else:
        found = load_label_set(label_set)
    found = found.with_background()
    check_label_set(model, found)
    model = model.to(target_device).eval()
    if compile:
        model.compile(fullgraph=True)
    return model, processor, found


def find_device(name: str | None) -> torch.device:
    """The device of that name, or by default a GPU where there is one.

    Raises:
        ValueError: If there is no such device here; names those that there are.
    """
    if name is None:
        return process_state().device
    names = ["cpu"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        names += [kind, *(f"{kind}:{index}" for index in range(torch.accelerator.device_count()))]
    if name not in names:
        raise ValueError(f"`device` must be {' or '.join(names)} on this machine, got {name!r}.")
    return torch.device(name)


def load_model_and_processor(
    name_or_path: str | Path, revision: str | None = None, **kwargs: Any
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Load a semantic segmentation model of this package with its image processor, and none of its repository's code.

    Args:
        name_or_path (`str` or `Path`): Directory or Hub name of the model.
        revision (`str`, *optional*): Branch, tag or commit on the Hub; the main branch by default.
        kwargs: Further arguments of the model's `from_pretrained`.

    Returns:
        `tuple[PreTrainedModel, BaseImageProcessor]`: The model and its image processor.

    Raises:
        OSError: If there is no such model, or a file is missing.
        ValueError: If it is damaged or of another kind, or weights are missing, left over, of another shape or not finite.
    """
    name = str(name_or_path)
    if not Path(name).is_dir() and (Path(name).is_absolute() or name.count("/") > 1 or name.startswith((".", "~"))):
        raise FileNotFoundError(
            f"{name}: no such directory. Expected the directory of a model or its name on the Hub."
        )
    with translate_loading_errors(name_or_path):
        # The classes of this package, whatever code the configuration names: nobody is asked whether to run it.
        model, loading_info = AutoModelForSemanticSegmentation.from_pretrained(
            name_or_path,
            revision=revision or "main",
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **kwargs,
        )
        processor = AutoImageProcessor.from_pretrained(
            name_or_path, revision=revision or "main", trust_remote_code=False
        )
        for part, expected in ((model, "Segmenter or SETR model"), (processor, "SegmenterImageProcessor")):
            if not type(part).__module__.startswith("segmenter_hf."):
                raise ValueError(f"{name_or_path}: expected a {expected}, got a {type(part).__name__}. {REMEDY}")
        check_weights(name_or_path, model, loading_info)
    return model, processor


@contextmanager
def translate_loading_errors(name_or_path: str | Path) -> Iterator[None]:
    """Whatever a model that is damaged or something else raises, as a `ValueError` that names it.

    Here, and only here, files of strangers go through transformers, safetensors, torch and their readers of JSON and pickles.
    Each of them fails in ways of its own, which are documented nowhere, so that any `Exception` may come of a bad file.
    """
    try:
        yield
    except (ImportError, MemoryError, OSError, ValueError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryError(f"{name_or_path}: the memory does not suffice for the model. {error}") from error
        said = str(error).split("\n")[0].split(". ")[0]  # what follows is long, and may advise to trust the file
        raise ValueError(
            f"{name_or_path}: expected a model of this package, got one that is damaged or something else. {REMEDY} "
            f"{type(error).__name__}: {said:.300}"
        ) from error


def check_weights(
    name_or_path: str | Path, model: PreTrainedModel, loading_info: Mapping[str, Any], *, new_heads: bool = False
) -> None:
    """Refuse a model whose weights are not all from its file, or are no finite floating-point numbers.

    Args:
        name_or_path (`str` or `Path`): Where it was loaded from.
        model (`PreTrainedModel`): The model.
        loading_info (`dict`): What `from_pretrained` returned beside it with `output_loading_info=True`.
        new_heads (`bool`, defaults to `False`): Whether only the encoder must be from the file, and weights may be left over,
            for training goes on with other heads.

    Raises:
        ValueError: If weights are missing, left over, of another shape or no finite floating-point numbers.
    """
    wrong = {
        "missing": loading_info["missing_keys"],
        "of another shape": {key for key, *_ in loading_info["mismatched_keys"]},
    }
    if new_heads:
        encoder = f"{model.base_model_prefix}."
        wrong = {problem: [key for key in keys if key.startswith(encoder)] for problem, keys in wrong.items()}
    else:
        wrong["left over"] = loading_info["unexpected_keys"]
    weights = dict(model.named_parameters())
    expected = weights.keys() | dict(model.base_model.named_parameters()).keys()
    wrong["no floating-point numbers"] = stored_integers(name_or_path) & expected
    # Those in 8 bits are back in floats for a moment, others are as they were.
    wrong["NaN or infinite"] = [key for key in weights if not torch.isfinite(weights[key].detach().dequantize()).all()]
    listed = [
        f"{len(keys)} {problem} ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})"
        for problem, keys in wrong.items()
        if keys
    ]
    if listed:
        raise ValueError(f"{name_or_path}: the weights are not those of the model: {'; '.join(listed)}. {REMEDY}")


def stored_integers(name_or_path: str | Path) -> set[str]:
    """The weights that the safetensors files of a model hold as integers; a loaded model has them as floats."""
    folder, found = Path(cached_file(str(name_or_path), CONFIG_NAME)).parent, set()
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {key for key in file.keys() if "F" not in file.get_slice(key).get_dtype()}  # noqa: SIM118
    return found


def check_label_set(model: PreTrainedModel, label_set: LabelSet) -> None:
    """Refuse a label set that is not for the model, or whose names cannot be written.

    Raises:
        ValueError: If it has another number of classes (two for a model of one), or a name is no text.
    """
    if label_set.num_labels != max(model.config.num_labels, 2):
        raise ValueError(
            f"The model has {model.config.num_labels} classes and the label set {label_set.name!r} "
            f"{label_set.num_labels}: choose the label set that the model was trained with."
        )
    for name in label_set.labels:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"The label set {label_set.name!r} has the name {name!r:.200}, which holds half a character and cannot be "
                "written: rename the class."
            ) from error


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
        MemoryError: If the memory of the device or of this machine does not suffice; says what needs less.
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
        logits = model(pixel_values=pixel_values, return_dict=True).logits
        for merger in mergers:
            indices = [index for index, (window_merger, _, _) in enumerate(batch) if window_merger is merger]
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

    with translate_memory_errors(window_batch_size):
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


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that the memory does not suffice."""
    is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return is_memory or any(words in str(error).lower() for words in OUT_OF_MEMORY)


@contextmanager
def translate_memory_errors(window_batch_size: int) -> Iterator[None]:
    """Errors of memory that does not suffice for a segmentation, with what needs less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        fewer = f"`--window_batch_size 1` instead of {window_batch_size}, " if window_batch_size > 1 else ""
        raise MemoryError(
            f"The memory does not suffice for the segmentation ({reason}). Less is needed with {fewer}`--bf16`, and one "
            "scale instead of several. Windows are streamed, so beside them only the image, its map and some rows of "
            "logits are held: with `--full_resolution` give a smaller image, or leave it out."
        ) from error


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
        MemoryError, ValueError: As `stream_segmentations`.
    """
    return list(stream_segmentations(model, processor, images, **kwargs))


IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def find_pictures(paths: Sequence[str | Path]) -> dict[str, Path]:
    """The pictures among files and below folders, by the name that their results get.

    Args:
        paths (`Sequence` of `str` or `Path`): Picture files, which may have any suffix, and folders of pictures, of
            which hidden files are none.

    Returns:
        `dict[str, Path]`: The file of each name. A name is the path below its folder without the suffix, and is made
        unique with a number where two files share it.

    Raises:
        FileNotFoundError: If a path does not exist or a folder holds no picture.
    """
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        if path.is_dir():
            files = sorted(file for file in path.rglob("[!.]*") if file.suffix.lower() in IMAGE_SUFFIXES)
            files = [file for file in files if not file.is_dir()]
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


def plan_results(pictures: Mapping[str, Path], output_dir: Path, endings: Sequence[str]) -> dict[str, list[Path]]:
    """The files to write for each picture, before anything is written.

    Args:
        pictures (`Mapping[str, Path]`): The file of each name, as from `find_pictures`.
        output_dir (`Path`): Where the results go.
        endings (`Sequence[str]`): What follows the name in the name of each result.

    Returns:
        `dict[str, list[Path]]`: By the name of the picture, in the order of `endings`.

    Raises:
        ValueError: If one would replace a picture or another, or its name is too long.
    """
    inputs = {_identity(path) for path in pictures.values() if path.exists()}
    planned: dict[Path, str] = {}
    results: dict[str, list[Path]] = {}
    for name, picture in pictures.items():
        results[name] = [output_dir / f"{name}{ending}" for ending in endings]
        for path in results[name]:
            if len(os.fsencode(path.name)) > MAX_NAME_BYTES:
                raise ValueError(
                    f"{picture}: the name of its result {path.name} would be too long: rename the picture."
                )
            if path.exists() and _identity(path) in inputs:
                raise ValueError(f"{path} is one of the pictures and would be lost: give another `--output_dir`.")
            if path in planned:
                both = f"{pictures[planned[path]]} and {picture}"
                raise ValueError(f"{both} would both be written to {path}: rename one, or give them one by one.")
            planned[path] = name
    return results


def _identity(path: Path) -> tuple[int, int]:
    """What files have in common that are one, whatever they are called."""
    status = path.stat()
    return status.st_dev, status.st_ino


def open_image(path: Path, max_image_pixels: int) -> Image.Image:
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
    with atomic_write(path) as temporary:
        label_map_image(segmentation, label_set.palette).save(temporary)


def reduced(picture: Image.Image, segmentation: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    """A picture and its segmentation (height, width), by a whole factor smaller where it is too large to look at."""
    factor = -(-max(picture.size) // MAX_OVERLAY_SIDE)
    if factor > 1:
        width, height = (side // factor for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BOX)
        segmentation = segmentation[factor // 2 :: factor, factor // 2 :: factor][:height, :width]
    return as_rgb(picture), segmentation


def save_overlay(picture: Image.Image, segmentation: np.ndarray, label_set: LabelSet, path: Path) -> None:
    """Write a picture with its segmentation and a legend."""
    shown = overlay(picture, segmentation, label_set.palette)
    with atomic_write(path) as temporary:
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
        ValueError: If the label set does not fit the model, or a result would replace a picture or another result, before
            anything is written. If pictures cannot be read or segmented, after all others are done; names each.
    """
    check_label_set(model, label_set)
    model.eval()
    pictures = find_pictures(paths)
    endings = [".png", "_overlay.png", *(["_attention.png"] if attention else [])]
    results = plan_results(pictures, Path(output_dir), endings)
    waiting: deque[str] = deque()
    unreadable: list[str] = []

    arguments = protocol_arguments(multi_scale_flip, scales, full_resolution)

    def readable() -> Iterator[ImageWindows]:
        for name, path in pictures.items():
            try:
                windows = [processor.lazy_windows(open_image(path, max_image_pixels), **arguments)]
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
            label_map, overlaid, *attended = results[name]
            save_label_map(segmentation, label_set, label_map)
            # Read again: to keep large pictures until their maps are there would take more than the maps.
            picture, segmentation = reduced(open_image(pictures[name], max_image_pixels), segmentation)
            save_overlay(picture, segmentation, label_set, overlaid)
            for path in attended:
                shown = attention_picture(model, processor, picture, segmentation, label_set)
                with atomic_write(path) as temporary:
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
