"""The handler of a published repository, called as Inference Endpoints call it, where the package is not installed."""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from segmenter_hf import SegmenterConfig, SegmenterForSemanticSegmentation
from segmenter_hf.data.label_sets import load_label_set
from segmenter_hf.hub.handler import EndpointHandler
from segmenter_hf.hub.publishing import build_repository
from segmenter_hf.inference.predictor import Predictor

from ..tiny_models import spread_weights, tiny_scenes_config, tiny_scenes_processor


SCENES = load_label_set("scenes")

# As huggingface_inference_toolkit does it: the file is imported by its path under a name of its own, with the directory on
# the path of modules; bodies that are images become {"inputs": PIL image}, others are JSON; the answer becomes JSON.
SERVICE = """
import importlib.util
import io
import json
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "segmenter_hf":
            raise ImportError("the package is not installed here")

sys.meta_path.insert(0, Blocked())

from PIL import Image

directory = sys.argv[1]
spec = importlib.util.spec_from_file_location("handler.EndpointHandler", directory + "/handler.py")
sys.path.insert(0, directory)
module = importlib.util.module_from_spec(spec)
sys.modules["handler.EndpointHandler"] = module
spec.loader.exec_module(module)
handler = module.EndpointHandler(directory)
answers = [handler({"inputs": Image.open(io.BytesIO(open(sys.argv[2], "rb").read())).convert("RGB")})]
answers += [handler(request) for request in json.load(open(sys.argv[3]))]
json.dump(answers, open(sys.argv[4], "w"))
"""


def save_repository(config: SegmenterConfig, folder: Path, seed: int = 0) -> Path:
    """A repository as it would be pushed."""
    torch.manual_seed(seed)
    spread_weights(SegmenterForSemanticSegmentation(config)).save_pretrained(folder / "model")
    processor = tiny_scenes_processor()
    if config.num_channels != 3:
        processor.image_mean = processor.image_std = [0.5] * config.num_channels
        processor.do_convert_rgb = False
    processor.save_pretrained(folder / "model")
    return build_repository(folder / "model", folder / "repository")


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    return save_repository(tiny_scenes_config(), tmp_path_factory.mktemp("handler"))


@pytest.fixture(scope="module")
def handler(repository) -> EndpointHandler:
    return EndpointHandler(str(repository))


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def as_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def as_base64(image: Image.Image) -> str:
    return base64.b64encode(as_png(image)).decode()


def from_base64(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def expected_map(repository: Path, image: Image.Image, **kwargs: Any) -> np.ndarray:
    """The class map of the package."""
    model = SegmenterForSemanticSegmentation.from_pretrained(repository).eval()
    processor = tiny_scenes_processor()
    with torch.no_grad():
        outputs = model(**processor(image, **kwargs))
    return processor.post_process_semantic_segmentation(outputs)[0].numpy()


def test_the_service_gets_masks_and_labels_without_the_package(repository, tmp_path) -> None:
    images = [noise(90, 61), noise(50, 77, seed=1)]
    (tmp_path / "image.png").write_bytes(as_png(images[0]))
    coded = [as_base64(image) for image in images]
    requests = [
        {"inputs": coded, "parameters": {"format": "class_map", "window_batch_size": 3}},
        {"inputs": f"data:image/png;base64,{coded[1]}", "parameters": {"scales": [0.5, 1.5], "flip": True}},
    ]
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    command = [sys.executable, "-c", SERVICE, repository, tmp_path / "image.png", tmp_path / "requests.json"]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(
        [*map(str, command), str(tmp_path / "answers.json")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    single, batch, thorough = json.loads((tmp_path / "answers.json").read_text())

    expected = expected_map(repository, images[0])
    assert len(single) == len(np.unique(expected)) > 1
    assert [part["share"] for part in single] == sorted((part["share"] for part in single), reverse=True)
    for part in single:
        mask = expected == SCENES.labels.index(part["label"])
        np.testing.assert_array_equal(from_base64(part["mask"]), 255 * mask)
        assert part["share"] == pytest.approx(mask.mean()) and part["score"] is None
    for image, answer in zip(images, batch):
        np.testing.assert_array_equal(from_base64(answer["class_map"]), expected_map(repository, image))
        assert all(SCENES.labels[entry["id"]] == entry["label"] for entry in answer["labels"])
    expected = expected_map(repository, images[1], scales=[0.5, 1.5], do_flip=True)
    assert not np.array_equal(expected, expected_map(repository, images[1]))
    for part in thorough:
        mask = expected == SCENES.labels.index(part["label"])
        np.testing.assert_array_equal(from_base64(part["mask"]), 255 * mask)


def test_bytes_and_images_that_lie_on_their_side_are_taken(repository, handler, tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    buffer = io.BytesIO()
    noise(90, 61).save(buffer, "PNG", exif=exif)
    answer = handler({"inputs": buffer.getvalue(), "parameters": {"format": "class_map"}})
    expected = expected_map(repository, noise(90, 61).transpose(Image.Transpose.ROTATE_270))
    np.testing.assert_array_equal(from_base64(answer["class_map"]), expected)


def test_a_model_of_one_class_has_a_background(tmp_path) -> None:
    fields = {**tiny_scenes_config().to_dict(), "id2label": {0: "road"}, "label2id": {"road": 0}}
    repository = save_repository(SegmenterConfig(**fields, num_labels=1), tmp_path)
    answer = EndpointHandler(str(repository))({"inputs": as_base64(noise(90, 61))})
    assert {part["label"] for part in answer} <= {"background", "road"}
    assert sum(part["share"] for part in answer) == pytest.approx(1)


def channels_model(num_channels: int, folder: Path) -> Path:
    fields = {**tiny_scenes_config().to_dict(), "num_channels": num_channels}
    return save_repository(SegmenterConfig(**fields), folder, seed=3)  # of several classes in its maps


def as_tiff(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, photometric="minisblack", planarconfig="contig")
    return buffer.getvalue()


def class_map_of(handler: EndpointHandler, image: Any) -> np.ndarray:
    return from_base64(handler({"inputs": image, "parameters": {"format": "class_map"}})["class_map"])


def test_a_model_of_four_channels_takes_files_of_four(tmp_path) -> None:
    repository = channels_model(4, tmp_path)
    handler = EndpointHandler(str(repository))
    pixels = np.concatenate([np.asarray(noise(90, 61)), np.asarray(noise(90, 61, seed=1))[..., :1]], axis=-1)
    (tmp_path / "scene.tif").write_bytes(as_tiff(pixels))
    expected = Predictor.from_pretrained(repository)(tmp_path / "scene.tif").class_map.numpy()
    assert len(np.unique(expected)) > 1
    buffer = io.BytesIO()
    np.save(buffer, pixels)
    for content in (as_tiff(pixels), as_tiff(pixels.astype(np.uint16) * 257), buffer.getvalue()):
        np.testing.assert_array_equal(class_map_of(handler, content), expected)
        np.testing.assert_array_equal(class_map_of(handler, base64.b64encode(content).decode()), expected)
    for wrong in (noise(90, 61), as_png(noise(90, 61)), as_base64(noise(90, 61))):
        with pytest.raises(ValueError, match="image 1 of the request.* has 3 channels, and the model takes 4"):
            handler({"inputs": wrong})
    six = as_tiff(np.concatenate([pixels, pixels[..., :2]], axis=-1))
    with pytest.raises(ValueError, match="image 2 of the request: the image has 6 channels, and the model takes 4"):
        handler({"inputs": [as_tiff(pixels), six]})


def test_a_model_of_one_channel_takes_gray_images(tmp_path) -> None:
    repository = channels_model(1, tmp_path)
    handler = EndpointHandler(str(repository))
    gray = noise(90, 61).convert("L")
    gray.save(tmp_path / "gray.png")
    expected = Predictor.from_pretrained(repository)(tmp_path / "gray.png").class_map.numpy()
    assert len(np.unique(expected)) > 1
    # A palette in another order holds other numbers for the same grays.
    palette = Image.fromarray(255 - np.asarray(gray))
    palette.putpalette([255 - i // 3 for i in range(768)])
    for image in (gray, as_png(gray), as_base64(gray), as_png(palette), palette):
        np.testing.assert_array_equal(class_map_of(handler, image), expected)
    with pytest.raises(ValueError, match="has 3 channels, and the model takes 1"):
        handler({"inputs": as_png(noise(90, 61))})


def test_pixels_of_arrays_count_before_they_are_decoded(handler, monkeypatch) -> None:
    monkeypatch.setattr("segmenter_hf.hub.handler.MAX_PIXELS", 1000)
    half = as_tiff(np.zeros((30, 20, 3), np.uint16))
    assert handler({"inputs": half})
    with pytest.raises(ValueError, match="image 2 of the request.*20 x 30 pixels are more than 400"):
        handler({"inputs": [half, half]})


def test_thin_images_do_not_keep_the_service_busy(handler, monkeypatch) -> None:
    """What the network sees counts: a line of 100 pixels is enlarged to the side of a window, and so becomes many."""
    thin = as_png(Image.new("RGB", (100, 1)))
    assert handler({"inputs": thin})
    monkeypatch.setattr("segmenter_hf.hub.handler.MAX_WINDOW_PIXELS", 50_000)
    monkeypatch.setattr(handler, "model", None)  # refused before the network
    for bad in (
        {"inputs": thin},
        {"inputs": [noise(90, 61)] * 30},
        {"inputs": noise(90, 61), "parameters": {"scales": [4.0]}},
    ):
        with pytest.raises(ValueError, match="expected at most 50000: send fewer or less narrow images"):
            handler(bad)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"labels": {"road": 1}}', "is not a label set"),
        ('["road"]', "is not a label set"),
        ("{", "is not a label set"),
        ("[" * 100_000, "is not a label set"),
        ('{"labels": [{"name": "road"}, {"name": "car"}]}', "names 2 classes, and the model has"),
    ],
)
def test_a_label_set_of_another_kind_is_named(content, said, repository, tmp_path) -> None:
    shutil.copytree(repository, tmp_path / "repository")
    (tmp_path / "repository" / "label_set.json").write_text(content)
    with pytest.raises(ValueError, match=f"label_set.json {said}"):
        EndpointHandler(str(tmp_path / "repository"))


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"image": "x"}, 'there is no "inputs"'),
        ({"inputs": []}, "empty list"),
        ({"inputs": "/etc/passwd"}, "Expected an image file|in base64"),
        ({"inputs": "https://example.org/a.png"}, "Expected an image in base64"),
        ({"inputs": 5}, "got int"),
        ({"inputs": b"no image"}, "image 1 of the request: expected an image .*or something else"),
        ({"inputs": as_png(noise(90, 61))[:200]}, "image 1 of the request.*damaged"),
        ({"inputs": as_png(Image.new("1", (9000, 6000)))}, "54000000 pixels, expected at most 50000000"),
        ({"inputs": b"", "parameters": {"size": 5}}, "may hold flip, format, scales, window_batch_size"),
        ({"inputs": b"", "parameters": {"scales": [100.0]}}, "above 0 and up to 4"),
        ({"inputs": b"", "parameters": {"scales": [1.0] * 17}}, "list of 1 to 16"),
        ({"inputs": b"", "parameters": {"flip": "yes"}}, "true or false"),
        ({"inputs": b"", "parameters": {"window_batch_size": 0}}, "from 1 to 1024"),
        ({"inputs": b"", "parameters": {"format": "gif"}}, '"masks" or "class_map"'),
    ],
)
def test_bad_requests_are_refused_in_words(request_, said, handler) -> None:
    with pytest.raises(ValueError, match=said):
        handler(request_)
