"""Legends of segmentations: swatch, name and share of each class, and text that fits its place."""

import math
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
from PIL import Image, ImageDraw, ImageFont


Entry = tuple[tuple[int, int, int] | None, str, str]  # color of the swatch, name, share

TEXT, FAINT_TEXT, BACKGROUND = (30, 30, 30), (110, 110, 110), (255, 255, 255)
SMALLEST_FONT = 14  # pixels; smaller ones of the built-in font are hard to read
LONGEST_NAME = 200  # characters; more of a class name are not shown, and Pillow measures a million only


def legend_entries(
    counts: np.ndarray, id2label: Mapping[int, str], palette: np.ndarray, max_entries: int
) -> list[Entry]:
    """Color, name and share of the classes that are present, the largest first, and of all smaller ones together.

    Args:
        counts (integer `np.ndarray` of shape `(num_labels,)`): Pixels of each class.
        id2label (`Mapping[int, str]`): Class names.
        palette (`np.ndarray` of shape `(num_labels, 3)` and dtype `uint8`): RGB colors.
        max_entries (`int`): Number of classes that get an entry of their own.

    Raises:
        ValueError: If a class that is present has no name.
    """
    present = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
    unnamed = [i for i in present if i not in id2label]
    if unnamed:
        raise ValueError(f"id2label must name every class that is present, got none for {unnamed[:10]}.")
    shares = counts / max(1, counts.sum())
    entries: list[Entry] = []
    for i in present[:max_entries]:
        red, green, blue = palette[i].tolist()
        entries.append(((red, green, blue), id2label[i], _percent(shares[i])))
    rest = present[max_entries:]
    if rest:
        entries.append((None, f"+ {len(rest)} more", _percent(shares[rest].sum())))
    return entries


def legend_column(entries: Sequence[Entry], font: ImageFont.FreeTypeFont) -> Image.Image:
    """Draw swatch, name and share of one class per line."""
    line, swatch, padding = round(1.5 * em(font)), em(font), em(font)
    names = [shorten(name, font, 12 * em(font)) for _, name, _ in entries]
    name_width = max((math.ceil(font.getlength(name)) for name in names), default=0)
    share_width = max((math.ceil(font.getlength(share)) for _, _, share in entries), default=0)
    name_left = padding + swatch + swatch // 2
    right = name_left + name_width + em(font) + share_width
    panel = Image.new("RGB", (right + padding, 2 * padding + len(entries) * line), BACKGROUND)
    draw = ImageDraw.Draw(panel)
    for i, (name, (color, _, share)) in enumerate(zip(names, entries)):
        middle = padding + i * line + line // 2
        _draw_swatch(draw, color, padding, middle, swatch)
        draw.text((name_left, middle), name, fill=TEXT, font=font, anchor="lm")
        draw.text((right, middle), share, fill=FAINT_TEXT, font=font, anchor="rm")
    return panel


def legend_rows(entries: Sequence[Entry], font: ImageFont.FreeTypeFont, width: int) -> Image.Image:
    """Draw swatch and name of the classes side by side, in columns, on as many lines as needed."""
    line, swatch, padding = round(1.5 * em(font)), em(font), em(font) // 2
    space = swatch + swatch // 2 + em(font)
    names = [shorten(name, font, min(12 * em(font), width - 2 * padding - space)) for _, name, _ in entries]
    cell = space + max((math.ceil(font.getlength(name)) for name in names), default=0)
    columns = max(1, (width - 2 * padding) // cell)
    panel = Image.new("RGB", (width, 2 * padding + math.ceil(len(entries) / columns) * line), BACKGROUND)
    draw = ImageDraw.Draw(panel)
    for i, (name, (color, _, _)) in enumerate(zip(names, entries)):
        left, middle = padding + i % columns * cell, padding + i // columns * line + line // 2
        _draw_swatch(draw, color, left, middle, swatch)
        draw.text((left + swatch + swatch // 2, middle), name, fill=TEXT, font=font, anchor="lm")
    return panel


def _draw_swatch(
    draw: ImageDraw.ImageDraw, color: tuple[int, int, int] | None, left: int, middle: int, size: int
) -> None:
    if color is not None:
        top = middle - size // 2
        draw.rounded_rectangle((left, top, left + size, top + size), radius=size // 5, fill=color, outline=FAINT_TEXT)


def em(font: ImageFont.FreeTypeFont) -> int:
    """The size of a font in pixels, which `load_font` makes whole."""
    return int(font.size)


def load_font(size: float) -> ImageFont.FreeTypeFont:
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size=max(SMALLEST_FONT, round(size))))


def shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Cut a text to a width in pixels, with an ellipsis at the end if something is missing."""
    text = " ".join(text[: LONGEST_NAME + 1].split())  # in one line
    if len(text) <= LONGEST_NAME and font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1].rstrip()
    return text + "…"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.0005 else "< 0.1 %"
