"""Georeferenced scenes of any size: windows read from the file, a GeoTIFF of classes, and polygons on request.

Needs rasterio: `pip install segmenter-hf[geo]`.
"""

import errno
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..models.image_io import scale_values
from ..models.image_processing_segmenter import AnyImageProcessor
from ..models.image_windows import ImageWindows, Normalization, enlarged_size
from ..models.window_geometry import Window, window_corners
from ..utils.atomic_files import atomic_write
from .predictor import Predictor


MAX_SCENE_PIXELS = 2**31  # the class map is held in memory, a byte for a pixel
GDAL_CACHE_MEGABYTES = 256
ROWS_AT_ONCE = 512
WHOLE_SCENE: dict[str, Any] = {"do_resize": False, "do_split_windows": True, "scales": [1.0], "do_flip": False}
NO_CLASS = 255  # in a map of 8 bits; 65535 in one of 16


def is_scene(path: Path, max_image_pixels: int) -> bool:
    """Whether rasterio is available and a file is a TIFF to read by windows.

    That is a TIFF with a coordinate reference system, one that is stored in tiles, and one that is too large to read whole.

    Args:
        path (`Path`): The file.
        max_image_pixels (`int`): Images with more pixels are too large.
    """
    if path.suffix.lower() not in (".tif", ".tiff"):
        return False
    try:
        import rasterio
    except ImportError:
        return False
    try:
        with _open_scene(path) as scene:
            is_large = scene.height * scene.width > max_image_pixels
            return scene.crs is not None or scene.profile.get("tiled", False) or is_large
    except rasterio.errors.RasterioError:
        return False


@contextmanager
def _open_scene(path: Path) -> Iterator[Any]:
    """A TIFF opened by rasterio, which says nothing where it has no coordinate reference system."""
    import rasterio

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path, driver="GTiff") as scene:
            yield scene


class SceneWindows(ImageWindows):
    """The windows of an opened scene at its own size; each is read from the file when it is asked for.

    Args:
        scene (`rasterio.DatasetReader`): The opened file, of the channels of the model and at least a window.
        processor (`BaseImageProcessor`): The image processor of the model.
    """

    def __init__(self, scene: Any, processor: AnyImageProcessor) -> None:
        size = processor.window_size
        corners = window_corners(scene.height, scene.width, size, processor.window_stride)
        sides = (size, size, scene.height, scene.width, scene.height, scene.width)
        super().__init__([Window(0, 0, 0, top, left, *sides) for top, left in corners], [], 1)
        self._scene, self._processor = scene, processor

    def pixel_values(self, window: Window) -> torch.Tensor:
        """The normalized pixels (channels, height, width) of a window, float32."""
        from rasterio.windows import Window as RasterWindow

        processor = self._processor
        pixels = self._scene.read(window=RasterWindow(window.left, window.top, window.width, window.height))
        if np.issubdtype(pixels.dtype, np.floating):
            pixels = np.nan_to_num(pixels)  # where there is no data; left out of the class map
        pixels = torch.from_numpy(scale_values(pixels, processor.value_range))
        pixels = pixels.expand(processor.num_channels, -1, -1)
        normalize = Normalization(
            processor.rescale_factor if processor.do_rescale else None,
            *((processor.image_mean, processor.image_std) if processor.do_normalize else (None, None)),
        )
        return normalize(pixels)


def scene_windows(scene: Any, processor: AnyImageProcessor) -> ImageWindows:
    """The windows of an opened scene at its own size, of a small one as of other images: read whole and enlarged to a window.

    Args:
        scene (`rasterio.DatasetReader`): The opened file.
        processor (`BaseImageProcessor`): The image processor of the model.

    Returns:
        `ImageWindows`: The windows.

    Raises:
        ValueError: If the scene has other channels than the model, too many pixels, or no known range of pixel values.
    """
    channels, size = processor.num_channels, (scene.height, scene.width)
    if scene.count not in {channels, 1 if processor.do_convert_rgb else channels}:
        raise ValueError(
            f"{scene.name}: the scene has {scene.count} channels, and the model takes {channels} (`num_channels`). Give "
            f"scenes of {channels} channels, or train a model of {scene.count} with "
            f"`config_overrides=num_channels={scene.count}`."
        )
    if scene.height * scene.width > MAX_SCENE_PIXELS:
        raise ValueError(
            f"{scene.name}: expected at most {MAX_SCENE_PIXELS} pixels, got {scene.width} x {scene.height}. Cut the scene."
        )
    if scene.dtypes[0] not in ("uint8", "uint16") and processor.value_range is None:
        raise ValueError(
            f"{scene.name}: pixel values of {scene.dtypes[0]} need a range: train with `value_range`, or set it in the "
            "image processor."
        )
    if min(size) >= processor.window_size:
        return SceneWindows(scene, processor)
    enlarged_size(size, processor.window_size, size)  # before it is read
    pixels = np.nan_to_num(scene.read())
    return processor.lazy_windows(pixels, input_data_format="channels_first", **WHOLE_SCENE)


def predict_scene(predictor: Predictor, path: Path, output: Path, polygons: Path | None = None) -> Path:
    """Segment a georeferenced scene at its own size, with the memory of its class map and some windows.

    Args:
        predictor ([`Predictor`]): The model and the protocol, of one scale without flip.
        path (`Path`): The GeoTIFF.
        output (`Path`): The GeoTIFF of classes to write: with coordinate reference system and transform, where the scene has
            them, with a color table, and 255 (or 65535) where the scene has no data.
        polygons (`Path`, *optional*): A GeoJSON file to write: a polygon in WGS 84 for each connected region, with the
            properties `class_id` and `label`.

    Returns:
        `Path`: The output.

    Raises:
        ImportError: If rasterio is missing.
        ValueError: If the protocol has several views, or the scene does not fit the model.
    """
    import rasterio

    if predictor.protocol.scales != (1.0,) or predictor.protocol.flip:
        raise ValueError(
            f"{path}: scenes are segmented at one scale without flip: leave out `scales` and `multi_scale_flip`."
        )
    with rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE_MEGABYTES), _open_scene(path) as scene:
        if polygons is not None and scene.crs is None:
            raise ValueError(
                f"{path}: polygons need a coordinate reference system, and this TIFF has none: leave out `vectorize`, or "
                "assign one, for example with `gdal_edit.py -a_srs EPSG:32633`."
            )
        windows = scene_windows(scene, predictor.processor)
        (result,) = predictor.stream([(path, windows)], dtype=predictor.class_map_dtype)
        class_map = result.known_class_map().cpu().numpy()
        if class_map.dtype != np.uint8 or predictor.label_set.num_labels > NO_CLASS:
            class_map = class_map.astype(np.uint16)
        _leave_out_no_data(class_map, scene)
        with atomic_write(output) as temporary:
            _write_classes(temporary, class_map, scene, predictor)
            _check_written(temporary, class_map)
        if polygons is not None:
            with atomic_write(polygons) as temporary:
                _write_polygons(temporary, class_map, scene, predictor.label_set.labels)
    return output


def _no_class(class_map: np.ndarray) -> int:
    return NO_CLASS if class_map.dtype == np.uint8 else 2**16 - 1


def _leave_out_no_data(class_map: np.ndarray, scene: Any) -> None:
    """Mark the pixels without data, some rows at a time."""
    from rasterio.windows import Window as RasterWindow

    for top in range(0, scene.height, ROWS_AT_ONCE):
        rows = class_map[top : top + ROWS_AT_ONCE]
        valid = scene.dataset_mask(window=RasterWindow(0, top, scene.width, len(rows)))
        rows[valid == 0] = _no_class(class_map)


def _write_classes(path: Path, class_map: np.ndarray, scene: Any, predictor: Predictor) -> None:
    import rasterio
    from rasterio.windows import Window as RasterWindow

    label_set = predictor.label_set
    profile = {"driver": "GTiff", "count": 1, "dtype": class_map.dtype.name, "nodata": _no_class(class_map)}
    profile |= {"height": scene.height, "width": scene.width, "crs": scene.crs, "transform": scene.transform}
    profile |= {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate", "BIGTIFF": "IF_SAFER"}
    with rasterio.open(path, "w", **profile) as output:
        if class_map.dtype == np.uint8:
            output.write_colormap(1, {index: (*color, 255) for index, color in enumerate(label_set.colors)})
        output.update_tags(1, **{f"CLASS_{index}": label for index, label in enumerate(label_set.labels)})
        for top in range(0, scene.height, ROWS_AT_ONCE):
            rows = class_map[top : top + ROWS_AT_ONCE]
            output.write(rows, 1, window=RasterWindow(0, top, scene.width, len(rows)))


def _check_written(path: Path, class_map: np.ndarray) -> None:
    """Read a class map back: GDAL writes its last blocks as it closes a file, and says nothing where the disk is full then.

    Raises:
        OSError: If it is not whole.
    """
    import rasterio
    from rasterio.windows import Window as RasterWindow

    height, width = class_map.shape
    try:
        with rasterio.open(path) as written:
            for top in range(0, height, ROWS_AT_ONCE):
                rows = class_map[top : top + ROWS_AT_ONCE]
                if not np.array_equal(written.read(1, window=RasterWindow(0, top, width, len(rows))), rows):
                    raise rasterio.errors.RasterioIOError("other values than were written")
    except rasterio.errors.RasterioIOError as error:
        raise OSError(errno.ENOSPC, f"the class map could not be written whole ({error})") from error


def _write_polygons(path: Path, class_map: np.ndarray, scene: Any, labels: tuple[str, ...]) -> None:
    from rasterio.features import shapes
    from rasterio.warp import transform_geom

    valid = class_map != _no_class(class_map)
    with path.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for number, (polygon, value) in enumerate(shapes(class_map, mask=valid, transform=scene.transform)):
            properties = {"class_id": int(value), "label": labels[int(value)]}
            geometry = transform_geom(scene.crs, "EPSG:4326", polygon)  # as RFC 7946 asks for
            feature = {"type": "Feature", "properties": properties, "geometry": geometry}
            file.write(f"{',' if number else ''}\n{json.dumps(feature)}")
        file.write("\n]}\n")


__all__ = ["SceneWindows", "is_scene", "predict_scene", "scene_windows"]
