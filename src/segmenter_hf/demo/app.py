"""A web page that segments images: classes, how sure the model is of them, and what it attends to.

The server sends what it found once; opacity, hover, confidence, highlights and heads are drawn in the browser by
`app.js`. Models are only read, one image at a time goes through them, and the others wait.
"""

import base64
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from PIL import Image


try:
    import gradio as gr
except ImportError as error:
    raise ImportError("The page needs Gradio: `pip install segmenter-hf[demo]`.") from error

from ..data.label_sets import load_label_set
from ..data.synthetic_scenes import draw_scene
from ..inference.attention import class_attention, has_class_attention, patch_attention
from ..inference.predictor import Predictor
from ..inference.protocol import PAPER_PROTOCOLS
from ..inference.pseudo_labels import confidences
from ..inference.visualization import as_rgb, label_map_image
from ..models.image_io import IMAGE_FORMATS, decode_image
from ..training.recipes import read_arguments, resolve_training_arguments
from ..training.run import train_segmenter
from .uploads import MAX_UPLOAD_BYTES, NOT_UNDERSTOOD, GuardedBlocks, open_upload_file, refusal, upload_path


MAX_IMAGE_PIXELS = 50_000_000  # what the cameras of phones make
MAX_ASPECT_RATIO = 8  # the short side is brought to the size of the model, and a narrower image would be too long
MAX_SHOWN_SIDE = 1280  # pixels; larger images are reduced before they are segmented and shown
MAX_PROFILE_BYTES = 65_000  # of the colors of a photograph, which go to the browser with it
KEEP_UPLOADS = 3600  # seconds
MAX_WAITING = 200  # events in the queue; who comes later is told to try again

UNTOLD = ("model", "best", "final")  # names of directories that do not say which model it is

# One image at a time: requests to the API do not wait in Gradio's queue, and each of their threads would keep memory.
WORKER = ThreadPoolExecutor(1, "segmenting")

TEMPLATES = Path(__file__).parent
INTRODUCTION = """# What is where in this image?
Give it a photograph, and a vision transformer says for every single pixel what it shows:
[Segmenter](https://arxiv.org/abs/2105.05633) or [SETR](https://arxiv.org/abs/2012.15840)."""


def build_page(models: Mapping[str, Predictor], max_image_pixels: int = MAX_IMAGE_PIXELS) -> gr.Blocks:
    """The page, to be served by `launch_page`.

    Args:
        models (`Mapping[str, Predictor]`): The models to choose from, by the name that the page shows.
        max_image_pixels (`int`, defaults to 50000000): Images with more pixels are refused.

    Returns:
        `gr.Blocks`: The page.

    Raises:
        ValueError: If there is no model.
    """
    if not models:
        raise ValueError("Expected at least one model to show, got none.")

    def describe(path: str, what: Callable[[Image.Image], dict[str, Any]]) -> dict[str, Any]:
        return _in_turn(lambda: what(open_upload(upload_path(path, upload.GRADIO_CACHE), max_image_pixels)))

    def segment(path: str | None, name: str, thorough: bool) -> dict[str, Any]:
        """Say what each pixel of an image shows, with class names, areas and probabilities."""
        if path is None:
            return nothing()
        predictor = models[name].with_protocol(PAPER_PROTOCOLS["multi-scale + flip" if thorough else "single scale"])
        return gr.update(value=describe(path, partial(describe_segmentation, predictor)), attention=None)

    def attend(path: str | None, name: str, event: gr.EventData) -> dict[str, Any]:
        if path is None:
            raise refusal("Choose an image first.")
        asked = event._data
        if not isinstance(asked, dict) or not asked.keys() <= {"x", "y", "class_id", "layer"}:
            raise refusal(NOT_UNDERSTOOD)
        return gr.update(attention=describe(path, partial(describe_attention, models[name], **asked)))

    def nothing() -> dict[str, Any]:
        return gr.update(value=None, attention=None)

    scenes = load_label_set("scenes").labels
    fits_drawings = {name: predictor.label_set.labels == scenes for name, predictor in models.items()}
    with GuardedBlocks(title="What is where?", analytics_enabled=False, delete_cache=(600, KEEP_UPLOADS)) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                upload, model, thoroughness, drawings = _show_inputs(fits_drawings)
            with gr.Column(scale=3, min_width=280):
                viewer = _show_viewer()
        hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        model.change(lambda name: gr.update(visible=fits_drawings[name]), model, drawings, queue=False, **hidden)
        network: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "network", "trigger_mode": "always_last"}
        segmenting = gr.on(
            [upload.change, model.change, thoroughness.change],
            segment,
            [upload, model, thoroughness],
            viewer,
            **network,
        )
        segmenting.failure(nothing, None, viewer, **hidden)
        viewer.select(attend, [upload, model], viewer, show_progress="minimal", api_visibility="private", **network)
    return page.queue(max_size=MAX_WAITING)


def _in_turn(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return WORKER.submit(work).result()
    except CancelledError as error:
        raise refusal("The page was stopped.") from error


def _show_inputs(fits_drawings: Mapping[str, bool]) -> tuple[gr.Image, gr.Dropdown, gr.Radio, gr.Group]:
    """Show what a visitor chooses: an image, the model, how thoroughly, and drawings for the models that know their classes."""
    names = list(fits_drawings)
    upload = gr.Image(type="filepath", sources=["upload", "clipboard"], label="Your image", height=260)
    # The file is opened by `open_upload` only: bounded, upright, and with errors in words.
    upload.preprocess = _uploaded_path  # type: ignore[method-assign]  # a hook of this component alone
    model = gr.Dropdown(names, value=names[0], label="Model", visible=len(names) > 1)
    thoroughness = gr.Radio(
        [("Quick: one look", False), ("Thorough: six sizes, each also mirrored", True)],
        value=False,
        label="How thoroughly?",
    )
    with gr.Group(visible=fits_drawings[names[0]]) as drawings:
        gr.Examples([[draw_scene(seed)[0]] for seed in range(4)], upload, label="Or one of these drawings")
    return upload, model, thoroughness, drawings


def _show_viewer() -> gr.HTML:
    """Show where the results go, which the browser draws."""
    return gr.HTML(
        value=None,
        attention=None,
        html_template=(TEMPLATES / "app.html").read_text(encoding="utf-8"),
        css_template=(TEMPLATES / "app.css").read_text(encoding="utf-8"),
        js_on_load=(TEMPLATES / "app.js").read_text(encoding="utf-8"),
        apply_default_css=False,
    )


def _uploaded_path(payload: Any) -> str | None:
    return payload and payload.path


def launch_page(page: gr.Blocks, **kwargs: Any) -> None:
    """Serve a page of `build_page`, which loads nothing from elsewhere and reports to nobody.

    Args:
        page (`gr.Blocks`): The page.
        kwargs: Further arguments of `gr.Blocks.launch`.
    """
    system_fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    page.launch(
        theme=gr.themes.Default(primary_hue="blue", **system_fonts),
        css=".html-container { padding: 0; }",
        footer_links=[],
        max_file_size=MAX_UPLOAD_BYTES,
        show_error=False,
        ssr_mode=False,
        **kwargs,
    )


def load_models(
    names: Sequence[str | Path], device: str | None = None, runtime: str = "torch"
) -> dict[str, Predictor]:
    """Load models for `build_page`, by names that are short and differ.

    Args:
        names (`Sequence` of `str` or `Path`): Directories or Hub names.
        device (`str`, *optional*): Where the models go; by default a GPU where there is one.
        runtime (`str`, defaults to `"torch"`): What runs the networks; others show no attention.

    Returns:
        `dict[str, Predictor]`: The models by the names that the page shows.

    Raises:
        ValueError: If a model takes other images than RGB of 8 bits, which a browser cannot show.
    """
    shown = short_names(names)
    predictors = {shown[name]: Predictor.from_pretrained(name, device=device, runtime=runtime) for name in shown}
    for name, predictor in zip(shown, predictors.values()):
        channels = predictor.processor.num_channels
        if channels != 3:
            raise ValueError(
                f"{name}: the demo shows RGB images, and the model takes {channels} channels (`num_channels`). Segment its "
                "images with `segmenter-hf predict`."
            )
        value_range = predictor.processor.value_range
        if value_range is not None and tuple(value_range) != (0, 255):
            raise ValueError(
                f"{name}: the demo shows images of 8 bits, and the model takes values of {list(value_range)} (`value_range`). "
                "Segment its images with `segmenter-hf predict`."
            )
    return predictors


def short_names(names: Sequence[str | Path]) -> dict[str | Path, str]:
    """Return what the page calls each model: the last parts of its path, as many as tell the models apart.

    A name on the Hub stays whole. Directories that training always calls alike say nothing by themselves, so that
    `outputs/streets/model` becomes `streets/model`.

    Args:
        names (`Sequence` of `str` or `Path`): Directories or Hub names; each is taken once.

    Returns:
        `dict[str | Path, str]`: The name to show of each, in their order.
    """
    parts = {
        name: list(Path(name).resolve().parts if Path(name).is_dir() else Path(str(name)).parts)
        for name in dict.fromkeys(names)
    }
    lengths = {name: 2 if path[-1] in UNTOLD or not Path(name).is_dir() else 1 for name, path in parts.items()}

    def shown(name: str | Path) -> str:
        return "/".join(parts[name][-lengths[name] :])

    longest = max(map(len, parts.values()), default=0)
    for _ in range(longest):
        counts = Counter(map(shown, parts))
        for name in [name for name in parts if counts[shown(name)] > 1]:
            lengths[name] += 1
    return {name: shown(name) for name in parts}


def train_scenes_model(config_path: str | Path, output_dir: str | Path) -> None:
    """Train a model as a JSON file of training arguments says, into another directory.

    Args:
        config_path (`str` or `Path`): The arguments, as [`read_arguments`] takes them.
        output_dir (`str` or `Path`): Where the model goes.
    """
    values = {**read_arguments(config_path), "output_dir": str(output_dir)}
    train_segmenter(*resolve_training_arguments(values))


def open_upload(path: str | Path, max_image_pixels: int) -> Image.Image:
    """Read an uploaded image upright, in RGB and reduced to at most 1280 pixels on its longer side.

    The image that is returned knows its size before the reduction as `image.info["full_size"]`.

    Args:
        path (`str` or `Path`): The file.
        max_image_pixels (`int`): Images with more pixels are refused, before they are decoded.

    Returns:
        `PIL.Image.Image`: The image.

    Raises:
        gr.Error: If it is no image, too large or too narrow.
    """
    with open_upload_file(path) as file:
        check_header(file, max_image_pixels)
        file.seek(0)
        try:
            image = decode_image(file, "upload", max_image_pixels)
            full_size, profile = image.size, image.info.get("icc_profile")
            has_four = image.mode == "RGBA" and image.format == "TIFF"  # no transparency: as in `check_channels`
            image = as_rgb(image)
        except ValueError as error:
            raise refusal("The image is damaged or incomplete: it cannot be read to its end.") from error
    if has_four:
        raise refusal("The image has 4 channels, and this page takes images of 3.")
    factor = min(1.0, MAX_SHOWN_SIDE / max(full_size))
    if factor < 1:
        width, height = (max(1, round(factor * side)) for side in full_size)
        image = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3)
    image.info = {"full_size": full_size}  # Pillow would write comments, EXIF tags and the like into what is sent
    if isinstance(profile, bytes) and len(profile) <= MAX_PROFILE_BYTES:
        image.info["icc_profile"] = profile
    return image


def check_header(file: BinaryIO, max_image_pixels: int) -> None:
    """Refuse a file whose beginning is none of an image that the page takes.

    Raises:
        gr.Error: If it is no image, too large or too narrow.
    """
    try:
        width, height = Image.open(file, formats=IMAGE_FORMATS).size
    except Image.DecompressionBombError as error:
        raise refusal(f"The image is much too large: this page takes at most {max_image_pixels:,} pixels.") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can fail in any way
        raise refusal("This file cannot be read as an image. JPEG, PNG and WebP work.") from error
    if width * height > max_image_pixels:
        raise refusal(
            f"The image has {width} x {height} pixels, and this page takes at most {max_image_pixels:,} pixels. "
            "Make it smaller and try again."
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise refusal(
            f"The image has {width} x {height} pixels: its long side may be at most {MAX_ASPECT_RATIO} times the "
            "short one. Cut a part out of it and try again."
        )


def describe_segmentation(predictor: Predictor, image: Image.Image) -> dict[str, Any]:
    """Segment an image; what the browser needs to show it.

    Args:
        predictor ([`Predictor`]): The model and the protocol.
        image (`PIL.Image.Image`): RGB image, from `open_upload`.

    Returns:
        `dict`: `photograph`, `pixels` (as `pack_pixels` says) and `label_map` (of the size before any reduction) as data
        URLs; `width` and `height`; `classes`, those that are present by area, with `id`, `name`, `color` and `share`; and
        the numbers of layers with attention in the encoder and, for classes, in the decoder.
    """
    model, label_set = predictor.model, predictor.label_set
    (result,) = predictor.stream([(None, image)], return_scores=True)
    segmentation, confidence = confidences(result)
    label_map = label_map_image(segmentation, label_set.palette)
    areas = np.bincount(segmentation.ravel(), minlength=label_set.num_labels)
    return {
        "photograph": data_url(image, "JPEG", quality=90),
        "pixels": data_url(pack_pixels(segmentation, confidence), "PNG"),
        "label_map": data_url(
            label_map.resize(image.info.get("full_size", image.size), Image.Resampling.NEAREST), "PNG"
        ),
        "width": image.width,
        "height": image.height,
        "classes": [
            {
                "id": class_id,
                "name": label_set.labels[class_id],
                "color": label_set.colors[class_id],
                "share": float(areas[class_id] / segmentation.size),
            }
            for class_id in np.argsort(-areas, kind="stable").tolist()
            if areas[class_id]
        ],
        "encoder_layers": model.config.num_hidden_layers if predictor.runtime == "torch" else 0,
        "decoder_layers": model.config.decoder_num_hidden_layers if has_class_attention(model) else 0,
    }


def describe_attention(
    predictor: Predictor,
    image: Image.Image,
    x: int | None = None,
    y: int | None = None,
    class_id: int | None = None,
    layer: int = -1,
) -> dict[str, Any]:
    """What a spot of an image, or a class, attends to; what the browser needs to show it.

    Args:
        predictor ([`Predictor`]): The model.
        image (`PIL.Image.Image`): RGB image, from `open_upload`.
        x (`int`, *optional*), y (`int`, *optional*): The spot, in pixels.
        class_id (`int`, *optional*): The class, for the decoder, instead of a spot.
        layer (`int`, defaults to -1): The layer, counted from 0.

    Returns:
        `dict`: `rows` and `columns` of the grid, and `maps`: base64 of bytes (1 + heads, rows, columns), the average of all
        heads first, each map with 255 at its largest.

    Raises:
        gr.Error: If there is no such spot, class or layer.
    """
    asked = (x, y, layer) if class_id is None else (class_id, layer)
    if any(type(number) is not int for number in asked):
        raise refusal(NOT_UNDERSTOOD)
    if predictor.runtime != "torch":
        raise refusal("This model is an exported one, which shows classes only.")
    try:
        if class_id is None:
            attention = patch_attention(predictor, image, cast("tuple[int, int]", (x, y)), layer)
        else:
            attention = class_attention(predictor, image, class_id, layer)
    except ValueError as error:
        raise refusal("The image has no such spot, or the model no such class or layer.") from error
    maps = np.concatenate([attention.mean(axis=0, keepdims=True), attention])
    levels = np.rint(255 * maps / maps.max(axis=(1, 2), keepdims=True).clip(min=1e-12)).astype(np.uint8)
    _, rows, columns = levels.shape
    return {"rows": rows, "columns": columns, "maps": base64.b64encode(levels.tobytes()).decode()}


def pack_pixels(segmentation: np.ndarray, confidence: np.ndarray) -> Image.Image:
    """Class ids and probabilities as one image: red + 256 * green is the id, blue / 255 the probability.

    Args:
        segmentation (integer `np.ndarray` of shape `(height, width)`): Class ids in `[0, 65535]`.
        confidence (`np.ndarray` of shape `(height, width)`): Probability of each pixel's class, in `[0, 1]`.

    Returns:
        `PIL.Image.Image`: RGB image.
    """
    channels = [segmentation & 255, segmentation >> 8, np.rint(255 * confidence)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def data_url(image: Image.Image, format: str, **kwargs: Any) -> str:
    """An image as a `data:` URL; `kwargs` go to its `save`."""
    buffer = io.BytesIO()
    image.save(buffer, format, **kwargs)
    return f"data:{Image.MIME[format]};base64,{base64.b64encode(buffer.getvalue()).decode()}"
