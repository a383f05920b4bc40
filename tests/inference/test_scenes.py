"""Georeferenced scenes: windows from the file, a GeoTIFF of classes, polygons."""

import json

import numpy as np
import pytest
import torch

from segmenter_hf import InferenceProtocol, Predictor, SegmenterForSemanticSegmentation, SegmenterImageProcessor
from segmenter_hf.cli.main import main
from segmenter_hf.data.label_sets import load_label_set
from segmenter_hf.inference import scenes
from segmenter_hf.inference.scenes import SceneWindows

from ..tiny_models import spread_weights, tiny_scenes_config


rasterio = pytest.importorskip("rasterio")
HEIGHT, WIDTH = 90, 130


def write_scene(
    path, channels=4, dtype="uint16", high=4096, nodata=None, tiled=True, crs=True, size=(HEIGHT, WIDTH)
) -> np.ndarray:
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(1, high, size=(channels, *size)).astype(dtype)
    if nodata is not None:
        pixels[:, :10] = nodata
    profile = {
        "driver": "GTiff",
        "count": channels,
        "dtype": dtype,
        "height": size[0],
        "width": size[1],
        "nodata": nodata,
    }
    if crs:
        profile |= {"crs": "EPSG:32633", "transform": rasterio.transform.from_origin(500000, 5000000, 10, 10)}
    if tiled:
        profile |= {"tiled": True, "blockxsize": 64, "blockysize": 64}
    with rasterio.open(path, "w", **profile) as scene:
        scene.write(pixels)
    return pixels


@pytest.fixture
def folder(tmp_path):
    config = tiny_scenes_config()
    config.num_channels = 4
    spread_weights(SegmenterForSemanticSegmentation(config)).save_pretrained(tmp_path / "model")
    SegmenterImageProcessor(
        size={"shortest_edge": 40},
        window_size=32,
        window_stride=16,
        patch_size=8,
        image_mean=[0.5] * 4,
        image_std=[0.5] * 4,
        do_convert_rgb=False,
        value_range=[0, 4095],
    ).save_pretrained(tmp_path / "model")
    return tmp_path


def predict(folder, *more) -> None:
    given = ["--model_name_or_path", str(folder / "model"), "--images", str(folder / "scene.tif"), "--device", "cpu"]
    main(["predict", *given, "--output_dir", str(folder / "out"), *more])


def test_a_scene_becomes_a_geotiff_of_classes_and_polygons(folder) -> None:
    pixels = write_scene(folder / "scene.tif", nodata=0)
    predict(folder, "--full_resolution", "--vectorize")
    predictor = Predictor.from_pretrained(folder / "model", InferenceProtocol(full_resolution=True), device="cpu")
    expected = predictor(pixels).class_map.numpy()
    assert len(np.unique(expected)) > 1
    with rasterio.open(folder / "out" / "scene.tif") as output, rasterio.open(folder / "scene.tif") as scene:
        found = output.read(1)
        assert output.crs == scene.crs and output.transform == scene.transform and output.nodata == 255
        colors = output.colormap(1)
    assert (found[:10] == 255).all() and np.array_equal(found[10:], expected[10:])
    label_set = load_label_set("scenes")
    assert [colors[index][:3] for index in range(label_set.num_labels)] == [tuple(color) for color in label_set.colors]
    collection = json.loads((folder / "out" / "scene.geojson").read_text())
    labels = {feature["properties"]["label"] for feature in collection["features"]}
    assert labels == {label_set.labels[index] for index in np.unique(found[10:])}
    longitude, latitude = collection["features"][0]["geometry"]["coordinates"][0][0]
    assert 14 < longitude < 16 and 44 < latitude < 46
    assert not list((folder / "out").glob("*.png"))


class Watched:
    """A scene that keeps the sizes of what is read from it."""

    def __init__(self, scene) -> None:
        self.scene, self.sizes = scene, set()

    def __getattr__(self, name):
        return getattr(self.scene, name)

    def read(self, window):
        self.sizes.add((window.height, window.width))
        return self.scene.read(window=window)


def test_the_scene_is_never_read_whole(folder) -> None:
    write_scene(folder / "scene.tif")
    predictor = Predictor.from_pretrained(folder / "model", device="cpu")
    with rasterio.open(folder / "scene.tif") as scene:
        watched = Watched(scene)
        windows = SceneWindows(watched, predictor.processor)
        assert windows.pixel_values(windows.windows[5]).dtype == torch.float32
        (result,) = predictor.stream([("scene", windows)])
    assert result.class_map.shape == (HEIGHT, WIDTH) and watched.sizes == {(32, 32)}


@pytest.mark.parametrize("size", [(20, 25), (20, 100), (100, 20)])
def test_a_scene_smaller_than_a_window_is_enlarged_as_other_images(size, folder) -> None:
    pixels = write_scene(folder / "scene.tif", nodata=0, size=size)
    predict(folder, "--full_resolution", "--vectorize")
    predictor = Predictor.from_pretrained(folder / "model", InferenceProtocol(full_resolution=True), device="cpu")
    expected = predictor(pixels).class_map.numpy()
    with rasterio.open(folder / "out" / "scene.tif") as output, rasterio.open(folder / "scene.tif") as scene:
        found = output.read(1)
        assert output.crs == scene.crs and output.transform == scene.transform
    assert (found[:10] == 255).all() and np.array_equal(found[10:], expected[10:])
    assert json.loads((folder / "out" / "scene.geojson").read_text())["features"]


def test_a_scene_too_thin_to_be_enlarged_is_refused_before_it_is_read(folder) -> None:
    write_scene(folder / "scene.tif", size=(1, 70000))
    with pytest.raises(SystemExit, match=r"scene.tif: An image of 1 x 70000 pixels is too thin for windows of 32"):
        predict(folder, "--full_resolution")


def test_other_channels_are_refused_with_both_numbers(folder) -> None:
    write_scene(folder / "scene.tif", channels=5)
    with pytest.raises(SystemExit, match="the scene has 5 channels, and the model takes 4"):
        predict(folder, "--full_resolution")


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize(("tiled", "limit"), [(True, 10**6), (False, HEIGHT * WIDTH - 1)])
def test_a_large_tiff_without_coordinates_is_read_by_windows_too(tiled, limit, folder, recwarn) -> None:
    pixels = write_scene(folder / "scene.tif", tiled=tiled, crs=False)
    predict(folder, "--full_resolution", "--max_image_pixels", str(limit))
    predictor = Predictor.from_pretrained(folder / "model", InferenceProtocol(full_resolution=True), device="cpu")
    with rasterio.open(folder / "out" / "scene.tif") as output:
        assert output.crs is None and np.array_equal(output.read(1), predictor(pixels).class_map.numpy())
    with pytest.raises(SystemExit, match=r"scene.tif: polygons need a coordinate reference system.*`--vectorize`"):
        predict(folder, "--full_resolution", "--max_image_pixels", str(limit), "--vectorize")


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_a_small_tiff_without_coordinates_is_an_image(folder) -> None:
    write_scene(folder / "scene.tif", tiled=False, crs=False)
    predict(folder, "--full_resolution")
    assert {path.name for path in (folder / "out").iterdir()} == {"scene.png", "scene_overlay.png"}


def test_a_class_map_that_is_not_whole_does_not_replace_another(folder, monkeypatch) -> None:
    """GDAL says nothing where the disk is full when it closes a file."""
    write_scene(folder / "scene.tif")
    predict(folder, "--full_resolution")
    before = (folder / "out" / "scene.tif").read_bytes()
    write = scenes._write_classes

    def cut(path, *arguments) -> None:
        write(path, *arguments)
        path.write_bytes(path.read_bytes()[:-40])

    monkeypatch.setattr(scenes, "_write_classes", cut)
    with pytest.raises((OSError, SystemExit), match="could not be written whole|full"):
        predict(folder, "--full_resolution")
    assert (folder / "out" / "scene.tif").read_bytes() == before


@pytest.mark.parametrize("views", [["--multi_scale_flip"], ["--scales", "0.5", "1"]])
def test_scenes_of_several_scales_are_refused_by_the_options(views, folder) -> None:
    write_scene(folder / "scene.tif")
    with pytest.raises(SystemExit, match=r"one scale without flip: leave out `--scales` and `--multi_scale_flip`"):
        predict(folder, "--full_resolution", *views)


def test_a_damaged_scene_does_not_stop_the_others(folder) -> None:
    write_scene(folder / "scenes" / "a.tif")
    write_scene(folder / "scenes" / "b.tif")
    content = bytearray((folder / "scenes" / "a.tif").read_bytes())
    (folder / "scenes" / "a.tif").write_bytes(content[: len(content) // 2])
    given = ["--model_name_or_path", str(folder / "model"), "--images", str(folder / "scenes"), "--device", "cpu"]
    with pytest.raises(SystemExit, match=r"1 of 2 images cannot be read, the others are done:(.|\n)*a.tif"):
        main(["predict", *given, "--output_dir", str(folder / "out"), "--full_resolution"])
    assert (folder / "out" / "b.tif").is_file() and not (folder / "out" / "a.tif").exists()


def test_a_small_file_of_too_many_pixels_is_refused_by_its_header(folder, monkeypatch) -> None:
    profile = {"driver": "GTiff", "count": 4, "dtype": "uint16", "height": 32769, "width": 65536, "crs": "EPSG:32633"}
    with rasterio.open(
        folder / "scene.tif", "w", tiled=True, blockxsize=8192, blockysize=8192, sparse_ok=True, **profile
    ):
        pass  # one row more than 2^31 pixels; nothing is stored
    assert (folder / "scene.tif").stat().st_size < 2**20
    monkeypatch.setattr(SceneWindows, "pixel_values", lambda *args: pytest.fail("the scene was read"))
    with pytest.raises(SystemExit, match="at most 2147483648 pixels, got 65536 x 32769"):
        predict(folder, "--full_resolution")
    assert not list((folder / "out").glob("**/*.tif"))
