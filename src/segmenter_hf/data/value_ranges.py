"""The range of pixel values that image files declare, in the tags of TIFF and in the metadata of GDAL."""

import io
import re
from typing import Any

import numpy as np

from ..models.image_io import TIFF_PREFIXES


_GDAL_ITEM = re.compile(r'<Item name="(NBITS|STATISTICS_MINIMUM|STATISTICS_MAXIMUM)"[^>]{0,200}>([^<]{1,60})</Item>')
_LOW_TAGS, _HIGH_TAGS = ("SMinSampleValue", "MinSampleValue"), ("SMaxSampleValue", "MaxSampleValue")


def stored_value_range(content: bytes) -> tuple[float, float] | None:
    """The lowest and the highest pixel value that a TIFF declares.

    The tags `SMaxSampleValue` and `MaxSampleValue` count first, then the number of bits (`BitsPerSample`, or GDAL's `NBITS`), then
    GDAL's statistics.

    Args:
        content (`bytes`): The file.

    Returns:
        `tuple[float, float]`, *optional*: Nothing where the file declares none, or no less than all that its dtype holds.
    """
    if content[:4] not in TIFF_PREFIXES:
        return None
    try:
        import tifffile

        with tifffile.TiffFile(io.BytesIO(content)) as tiff:
            return _page_range(tiff.pages[0])
    except Exception:  # tifffile is missing or the file is damaged, which is said where its pixels are read
        return None


def _page_range(page: Any) -> tuple[float, float] | None:
    found = _GDAL_ITEM.findall(str(page.tags.valueof("GDAL_METADATA", "")))
    items = {name: [float(text) for each, text in found if each == name] for name, _ in found}
    low, high = (_tag(page, names, pick) for names, pick in ((_LOW_TAGS, min), (_HIGH_TAGS, max)))
    whole = float(np.iinfo(page.dtype).max) if np.issubdtype(page.dtype, np.integer) else None
    bits = int(max(items.get("NBITS", [page.bitspersample])))
    if high is None and whole is not None and 2**bits - 1 < whole:
        low, high = 0.0, float(2**bits - 1)
    if high is None and "STATISTICS_MAXIMUM" in items:
        high = max(items["STATISTICS_MAXIMUM"])
        low = min(items.get("STATISTICS_MINIMUM", [0.0]))
    low = 0.0 if low is None else low
    if high is None or not np.isfinite([low, high]).all() or low >= high or (low <= 0 and high == whole):
        return None
    return low, high


def _tag(page: Any, names: tuple[str, ...], pick: Any) -> float | None:
    """The value of the first of some tags that is there; of several channels that of `pick`."""
    for name in names:
        value = page.tags.valueof(name)
        if value is not None:
            return float(pick(value)) if isinstance(value, tuple) else float(value)
    return None


__all__ = ["stored_value_range"]
