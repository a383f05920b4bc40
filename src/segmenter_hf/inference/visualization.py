"""Images of segmentations: colors, overlays on the photograph, legends and grids of predictions."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..models.image_io import pil_to_array
from .legend import (
    BACKGROUND,
    FAINT_TEXT,
    TEXT,
    em,
    legend_column,
    legend_entries,
    legend_rows,
    load_font,
    shorten,
)


ImageOrArray = Image.Image | np.ndarray
LabelMap = np.ndarray | torch.Tensor

# Black over red and orange to white, 256 steps: readable in gray too, as its brightness only rises.
_HEAT = np.stack([np.clip(np.arange(256) * 3 - 255 * channel, 0, 255) for channel in range(3)], 1).astype(np.uint8)
_SMALLEST_SIDE = 400  # pixels, geometric mean of width and height of an image beside a legend


def as_rgb(image: Image.Image) -> Image.Image:
    """An image in RGB as the models see it: 16 bits are scaled to 8, where Pillow and `pipeline` clip them.

    Args:
        image (`PIL.Image.Image`): Image of any mode.

    Returns:
        `PIL.Image.Image`: RGB image.
    """
    if image.mode.startswith("I"):
        return Image.fromarray(np.moveaxis(pil_to_array(image, do_convert_rgb=True), 0, -1))
    return image.convert("RGB")


def preview(image: Image.Image | np.ndarray, channels_first: bool = False) -> Image.Image:
    """An image with any channels and depth in 8-bit RGB, to look at.

    Args:
        image (`PIL.Image.Image` or `np.ndarray` of shape `(height, width, channels)`): The image. Of an array the first
            three channels are shown, or the first; other values than 8-bit ones from their least to their greatest.
        channels_first (`bool`, defaults to `False`): Whether an array has the shape `(channels, height, width)`.

    Returns:
        `PIL.Image.Image`: RGB image.
    """
    if isinstance(image, Image.Image):
        return as_rgb(image)
    image = np.moveaxis(image, 0, -1) if channels_first else image
    shown = image[..., :3] if image.shape[2] >= 3 else image[..., :1].repeat(3, axis=2)
    if shown.dtype != np.uint8:
        low, high = float(shown.min()), float(shown.max())
        shown = ((shown.astype(np.float32) - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(shown))


def colorize(segmentation: LabelMap, palette: np.ndarray, ignore_index: int = 255) -> Image.Image:
    """Paint every pixel in the color of its class.

    Args:
        segmentation (integer `np.ndarray` or `torch.Tensor` of shape `(height, width)`): Class ids in `[0,
            num_labels)`, or `ignore_index`.
        palette (`np.ndarray` of shape `(num_labels, 3)` and dtype `uint8`): RGB colors, as `LabelSet.palette`.
        ignore_index (`int`, defaults to 255): Pixels with this id are black.

    Returns:
        `PIL.Image.Image`: RGB image of size `(width, height)`.

    Raises:
        ValueError: If the segmentation has another shape, dtype or class ids than above.
    """
    ids, ignored = _class_ids(segmentation, len(palette), ignore_index)
    colors = np.asarray(palette, dtype=np.uint8)[ids]
    colors[ignored] = 0
    return Image.fromarray(colors)


def label_map_image(segmentation: LabelMap, palette: np.ndarray) -> Image.Image:
    """Make an image that stores the class ids themselves, for saving as PNG.

    Args:
        segmentation (integer `np.ndarray` or `torch.Tensor` of shape `(height, width)`): Class ids in `[0, 255]`,
            among them any ignore index; in `[0, 65535]` if the palette has more than 256 colors.
        palette (`np.ndarray` of shape `(num_labels, 3)` and dtype `uint8`): RGB colors in which viewers show the ids;
            ids beyond are black.

    Returns:
        `PIL.Image.Image`: Image of mode "P", or of mode "I;16" and without colors for more than 256 of them.

    Raises:
        ValueError: If the segmentation has another shape, dtype or class ids than above.
    """
    dtype = np.uint16 if len(palette) > 256 else np.uint8
    array = _map_array(segmentation)
    if array.min(initial=0) < 0 or array.max(initial=0) > np.iinfo(dtype).max:
        raise ValueError(
            f"with {len(palette)} colors, class ids must lie in [0, {np.iinfo(dtype).max}], "
            f"got values from {array.min()} to {array.max()}."
        )
    image = Image.fromarray(array.astype(dtype))
    if dtype is np.uint8:
        full_palette = np.zeros((256, 3), dtype=np.uint8)  # PNG would cut ids to the bits that a shorter one needs
        full_palette[: len(palette)] = palette
        image.putpalette(full_palette.tobytes())
    return image


def overlay(
    image: ImageOrArray,
    segmentation: LabelMap,
    palette: np.ndarray,
    alpha: float = 0.5,
    boundaries: bool = True,
    ignore_index: int = 255,
) -> Image.Image:
    """Lay the colors of the classes over the photograph.

    Args:
        image (`PIL.Image.Image`, or `np.ndarray` of shape `(height, width, 3)` or `(height, width)` and dtype
            `uint8`): Photograph.
        segmentation (integer `np.ndarray` or `torch.Tensor` of shape `(height, width)`): Class ids in `[0,
            num_labels)`, or `ignore_index`.
        palette (`np.ndarray` of shape `(num_labels, 3)` and dtype `uint8`): RGB colors, as `LabelSet.palette`.
        alpha (`float`, defaults to 0.5): Opacity of the colors in `[0, 1]`.
        boundaries (`bool`, defaults to `True`): Whether to line each class with a brighter tone of its color. Images
            below about 225 x 225 pixels have no lines: they would hide the small things.
        ignore_index (`int`, defaults to 255): Pixels with this id stay as in the photograph.

    Returns:
        `PIL.Image.Image`: RGB image of the size of `image`.

    Raises:
        ValueError: If the sizes differ, `alpha` is out of range, or an argument has another form than above.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}.")
    photograph = _rgb(image)
    ids, ignored = _class_ids(segmentation, len(palette), ignore_index)
    _check_sizes(photograph, ids)
    palette = np.asarray(palette, dtype=np.uint8)
    blended = np.array(Image.blend(photograph, Image.fromarray(palette[ids]), alpha))
    thickness = round(math.sqrt(ids.size) / 450)
    if boundaries and thickness:
        lines = _boundaries(np.where(ignored, -1, ids), thickness)
        bright = np.rint(0.65 * palette + 0.35 * 255).astype(np.uint8)
        blended[lines] = bright[ids[lines]]
    blended[ignored] = np.asarray(photograph)[ignored]
    return Image.fromarray(blended)


def with_legend(
    image: ImageOrArray,
    segmentation: LabelMap,
    id2label: Mapping[int, str],
    palette: np.ndarray,
    max_entries: int = 20,
    ignore_index: int = 255,
) -> Image.Image:
    """Put a legend to the right of an image: the classes that are present, by area.

    Small images are enlarged by a whole factor, so that the legend is readable.

    Args:
        image (`PIL.Image.Image`, or `np.ndarray` of shape `(height, width, 3)` or `(height, width)` and dtype
            `uint8`): Image of the size of `segmentation`, usually from `overlay` or `colorize`.
        segmentation (integer `np.ndarray` or `torch.Tensor` of shape `(height, width)`): Class ids in `[0,
            num_labels)`, or `ignore_index`.
        id2label (`Mapping[int, str]`): Class names, as `LabelSet.id2label`.
        palette (`np.ndarray` of shape `(num_labels, 3)` and dtype `uint8`): RGB colors, as `LabelSet.palette`.
        max_entries (`int`, defaults to 20): Number of classes listed; the smaller ones are summed up in one line.
        ignore_index (`int`, defaults to 255): Pixels with this id are left out; the percentages are of the other
            pixels.

    Returns:
        `PIL.Image.Image`: RGB image, wider than `image`.

    Raises:
        ValueError: If the sizes differ, a class that is present has no name, or an argument has another form than
            above.
    """
    image = _rgb(image)
    _check_sizes(image, _map_array(segmentation))
    factor = math.ceil(_SMALLEST_SIDE / math.sqrt(image.width * image.height))
    if factor > 1:
        image = image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    entries = legend_entries(
        _count_classes([segmentation], len(palette), ignore_index), id2label, palette, max_entries
    )
    panel = legend_column(entries, load_font(0.03 * math.sqrt(image.width * image.height)))
    canvas = Image.new("RGB", (image.width + panel.width, max(image.height, panel.height)), BACKGROUND)
    canvas.paste(image, (0, 0))
    canvas.paste(panel, (image.width, 0))
    return canvas


def prediction_grid(
    rows: Sequence[tuple[ImageOrArray, LabelMap | None, LabelMap]],
    palette: np.ndarray,
    id2label: Mapping[int, str],
    column_titles: tuple[str, str, str] = ("image", "ground truth", "prediction"),
    row_height: int = 240,
    max_entries: int = 30,
    ignore_index: int = 255,
) -> Image.Image:
    """Show images beside their ground truth and prediction, with one legend below.

    Args:
        rows (sequence of `(image, truth, prediction)`): Photograph, true classes or `None`, and predicted classes, as
            `overlay` takes them. Without any truth, its column is left out.
        palette (`np.ndarray` of shape `(num_labels, 3)` and dtype `uint8`): RGB colors, as `LabelSet.palette`.
        id2label (`Mapping[int, str]`): Class names, as `LabelSet.id2label`.
        column_titles (`tuple[str, str, str]`, *optional*): Titles of the columns.
        row_height (`int`, defaults to 240): Height of every image, in pixels.
        max_entries (`int`, defaults to 30): Number of classes in the legend, the largest first.
        ignore_index (`int`, defaults to 255): Pixels with this id show the photograph.

    Returns:
        `PIL.Image.Image`: RGB image.

    Raises:
        ValueError: If there are no rows, the sizes within a row differ, or as `overlay` and `with_legend`.
    """
    if not rows:
        raise ValueError("rows must hold at least one (image, truth, prediction), got none.")
    has_truth = any(truth is not None for _, truth, _ in rows)
    titles = column_titles if has_truth else column_titles[::2]
    shown = [(truth, prediction) if has_truth else (prediction,) for _, truth, prediction in rows]
    images = [_thumbnail(_rgb(image), row_height) for image, _, _ in rows]
    overlays = [
        [
            segmentation
            if segmentation is None
            else _thumbnail(overlay(image, segmentation, palette, alpha=0.7, ignore_index=ignore_index), row_height)
            for segmentation in of_row
        ]
        for (image, _, _), of_row in zip(rows, shown)
    ]
    segmentations = [segmentation for of_row in shown for segmentation in of_row if segmentation is not None]
    return _draw_grid(
        images, overlays, segmentations, titles, palette, id2label, row_height, max_entries, ignore_index
    )


def _draw_grid(
    images: Sequence[Image.Image],
    overlays: Sequence[Sequence[Image.Image | None]],
    segmentations: Sequence[LabelMap],
    titles: Sequence[str],
    palette: np.ndarray,
    id2label: Mapping[int, str],
    row_height: int,
    max_entries: int,
    ignore_index: int,
) -> Image.Image:
    """Images of one height in rows and columns, with titles above and the legend of the segmentations below."""
    font = load_font(row_height / 14)
    gap, title_height = em(font) // 2, 2 * em(font)
    column_width = max(image.width for image in images)
    width = gap + len(titles) * (column_width + gap)
    counts = _count_classes(segmentations, len(palette), ignore_index)
    entries = legend_entries(counts, id2label, palette, max_entries)
    legend = legend_rows(entries, font, width)
    height = title_height + len(images) * (row_height + gap) + legend.height
    canvas = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    centers = [gap + column * (column_width + gap) + column_width // 2 for column in range(len(titles))]
    for center, title in zip(centers, titles):
        title = shorten(title, font, column_width)
        draw.text((center, title_height // 2), title, fill=TEXT, font=font, anchor="mm")
    for row, cells in enumerate([image, *of_image] for image, of_image in zip(images, overlays)):
        top = title_height + row * (row_height + gap)
        for center, cell in zip(centers, cells):
            if cell is None:
                draw.text((center, top + row_height // 2), "none", fill=FAINT_TEXT, font=font, anchor="mm")
            else:
                canvas.paste(cell, (center - cell.width // 2, top))
    canvas.paste(legend, (0, height - legend.height))
    return canvas


def attention_overlay(
    image: ImageOrArray, attention: np.ndarray, point: tuple[int, int] | None = None, alpha: float = 0.7
) -> Image.Image:
    """Lay attention over a darkened photograph, from nothing over red and orange to white.

    Args:
        image (`PIL.Image.Image`, or `np.ndarray` of shape `(height, width, 3)` or `(height, width)` and dtype
            `uint8`): Photograph.
        attention (`np.ndarray` of shape `(rows, columns)`): Non-negative numbers for a grid that covers the
            photograph. The colors run up to the largest of them.
        point (`tuple[int, int]`, *optional*): `(x, y)` in pixels of the photograph, where a cross is drawn.
        alpha (`float`, defaults to 0.7): How much the attention hides of the photograph, in `[0, 1]`.

    Returns:
        `PIL.Image.Image`: RGB image of the size of `image`.

    Raises:
        ValueError: If `attention` has another form, or `alpha` is out of range.
    """
    attention = np.asarray(attention, dtype=np.float32)
    if attention.ndim != 2 or not np.isfinite(attention).all() or attention.min(initial=0) < 0:
        raise ValueError(
            f"attention must be a grid of non-negative numbers of shape (rows, columns), got shape {attention.shape}."
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}.")
    photograph = _rgb(image)
    levels = np.rint(255 * attention / max(float(attention.max()), 1e-12)).astype(np.uint8)
    heat = Image.fromarray(_HEAT[levels]).resize(photograph.size, Image.Resampling.BICUBIC)
    shown = Image.blend(photograph, heat, alpha)
    if point is not None:
        _draw_cross(shown, point)
    return shown


def image_table(
    rows: Mapping[str, Sequence[Image.Image]], column_titles: Sequence[str], height: int = 200
) -> Image.Image:
    """Put images of one size into a table with titles.

    Args:
        rows (`Mapping[str, Sequence[PIL.Image.Image]]`): Title and images of each row, as many as there are columns.
        column_titles (`Sequence[str]`): Titles of the columns.
        height (`int`, defaults to 200): Height of every image, in pixels.

    Returns:
        `PIL.Image.Image`: RGB image.
    """
    font = load_font(height / 14)
    gap, line = em(font) // 2, 2 * em(font)
    cells = {title: [_thumbnail(image, height) for image in images] for title, images in rows.items()}
    column_width = max(image.width for images in cells.values() for image in images)
    row_titles = max(math.ceil(font.getlength(title)) for title in cells) + 2 * gap
    canvas = Image.new(
        "RGB",
        (row_titles + len(column_titles) * (column_width + gap), line + len(cells) * (height + gap)),
        BACKGROUND,
    )
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(column_titles):
        center = row_titles + column * (column_width + gap) + column_width // 2
        draw.text((center, line // 2), shorten(title, font, column_width), fill=TEXT, font=font, anchor="mm")
    for row, (title, images) in enumerate(cells.items()):
        top = line + row * (height + gap)
        draw.text((gap, top + height // 2), title, fill=FAINT_TEXT, font=font, anchor="lm")
        for column, image in enumerate(images):
            canvas.paste(image, (row_titles + column * (column_width + gap), top))
    return canvas


def training_curves(log_history: Sequence[Mapping[str, float]]) -> Image.Image | None:
    """Draw loss, learning rate and mean IoU over the steps of a training.

    Args:
        log_history (sequence of `Mapping[str, float]`): What Trainer logged: entries with `step` and `loss`,
            `learning_rate` or `eval_mean_iou`.

    Returns:
        `PIL.Image.Image`: RGB image, one plot beside the other; `None` if nothing was logged yet.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = {
        title: [(entry["step"], factor * entry[key]) for entry in log_history if key in entry and "step" in entry]
        for title, key, factor in (
            ("training loss", "loss", 1),
            ("learning rate", "learning_rate", 1),
            ("mean IoU, percent (validation)", "eval_mean_iou", 100),
        )
    }
    curves = {title: points for title, points in curves.items() if points}
    if not curves:
        return None
    figure = Figure(figsize=(4.5 * len(curves), 3.2), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for axes, (title, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items()):
        axes.plot(*zip(*points), marker="o" if len(points) < 30 else None, markersize=3)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _draw_cross(image: Image.Image, point: tuple[int, int]) -> None:
    """Draw a cross that is seen on light and on dark."""
    arm = max(3, round(math.sqrt(image.width * image.height) / 50))
    draw, (x, y) = ImageDraw.Draw(image), point
    for color, width in (((0, 0, 0), max(3, arm // 2)), ((255, 255, 255), max(1, arm // 4))):
        draw.line((x - arm, y, x + arm, y), fill=color, width=width)
        draw.line((x, y - arm, x, y + arm), fill=color, width=width)


def _map_array(segmentation: LabelMap) -> np.ndarray:
    if isinstance(segmentation, torch.Tensor):
        segmentation = segmentation.detach().cpu()
        segmentation = segmentation.float() if segmentation.dtype == torch.bfloat16 else segmentation
    array = np.asarray(segmentation)
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"segmentation must be an integer map of shape (height, width), got {array.dtype} of shape {array.shape}."
        )
    return array


def _class_ids(segmentation: LabelMap, num_labels: int, ignore_index: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the class ids, 0 at ignored pixels, and where those are."""
    array = _map_array(segmentation)
    ignored = array == ignore_index
    ids = np.where(ignored, 0, array.astype(np.intp))
    wrong = np.unique(ids[(ids < 0) | (ids >= num_labels)])
    if wrong.size:
        raise ValueError(
            f"class ids must lie in [0, {num_labels}), the length of the palette, or be the ignore_index "
            f"{ignore_index}, got {wrong[:10].tolist()}."
        )
    return ids, ignored


def _rgb(image: ImageOrArray) -> Image.Image:
    if isinstance(image, Image.Image):
        return as_rgb(image)
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
        raise ValueError(
            "expected a PIL image, or a uint8 array of shape (height, width, 3) or (height, width), "
            f"got {image.dtype} of shape {tuple(image.shape)}."
        )
    return Image.fromarray(image).convert("RGB")


def _check_sizes(image: Image.Image, segmentation: np.ndarray) -> None:
    size = (image.height, image.width)
    if segmentation.shape != size:
        raise ValueError(
            f"image and segmentation must have one (height, width), got {size} and {segmentation.shape}. "
            "Pass the size of the image as `target_sizes` to `post_process_semantic_segmentation`."
        )


def _thumbnail(image: Image.Image, height: int) -> Image.Image:
    """The image at this height, or lower where it would be longer than four times that."""
    factor = min(height / image.height, 4 * height / image.width)
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    return image.resize(size, Image.Resampling.LANCZOS)


def _boundaries(ids: np.ndarray, thickness: int) -> np.ndarray:
    """Mark the pixels within `thickness` pixels, along rows and columns, of another class."""
    marked = np.zeros(ids.shape, dtype=bool)
    for array, lines in ((ids, marked), (ids.T, marked.T)):
        different = array[thickness:] != array[:-thickness]
        lines[thickness:] |= different
        lines[:-thickness] |= different
    return marked


def _count_classes(segmentations: Sequence[LabelMap], num_labels: int, ignore_index: int) -> np.ndarray:
    """Pixels of each class (num_labels,) in all segmentations together."""
    counts = np.zeros(num_labels, dtype=np.int64)
    for segmentation in segmentations:
        ids, ignored = _class_ids(segmentation, num_labels, ignore_index)
        counts += np.bincount(ids[~ignored], minlength=num_labels)
    return counts
