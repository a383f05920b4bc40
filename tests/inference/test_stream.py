"""Keys and errors of a stream of images."""

import numpy as np
import pytest
import torch
from PIL import Image

from segmenter_hf.data.image_loading import find_images
from segmenter_hf.data.label_sets import load_label_set
from segmenter_hf.data.loading import load_segmentation_datasets
from segmenter_hf.inference.predictor import Predictor, Segmentation
from segmenter_hf.inference.protocol import InferenceProtocol
from segmenter_hf.models.image_io import IMAGE_SUFFIXES

from ..prediction import make_predictor
from ..tiny_models import save_tiny_scenes_model


def image(height: int = 40, width: int = 52, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_a_directory_is_a_predictor(tmp_path) -> None:
    save_tiny_scenes_model(tmp_path / "model")
    image().save(tmp_path / "street.png")
    predictor = Predictor.from_pretrained(str(tmp_path / "model"), InferenceProtocol(flip=True), device="cpu")
    assert predictor.protocol.flip and predictor.label_set == load_label_set("scenes")
    assert predictor.model.dtype == torch.float32 and not predictor.model.training
    result = predictor(str(tmp_path / "street.png"), return_scores=True)
    assert isinstance(result, Segmentation) and result.error is None
    assert result.key == str(tmp_path / "street.png")
    assert result.class_map.shape == (40, 52) and result.scores.shape == (8, 40, 52)
    torch.testing.assert_close(result.scores.sum(0), torch.ones(40, 52))
    (same,) = predictor([tmp_path / "street.png"])
    assert torch.equal(same.class_map, result.class_map) and same.scores is None
    with pytest.raises(ValueError, match="`runtime` must be .*'torch'.*, got 'abacus'"):
        Predictor.from_pretrained(tmp_path / "model", runtime="abacus")


@pytest.mark.parametrize("window_batch_size", [1, 5, 1000])
def test_each_result_has_the_key_of_its_image_in_order(model, processor, tmp_path, window_batch_size) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    image(seed=3).save(tmp_path / "good.png")
    predictor = make_predictor(model, processor, window_batch_size=window_batch_size)
    items = [
        ("first", image()),
        ("bad", tmp_path / "bad.png"),
        (("a", 1), lambda: image(45, 33, seed=1)),
        (None, tmp_path / "missing.png"),
        ("array", np.asarray(image(seed=2))),
        ("file", str(tmp_path / "good.png")),
        ("thin", Image.new("RGB", (1, 10**7))),
    ]
    results = list(predictor.stream(iter(items)))
    assert [result.key for result in results] == [key for key, _ in items]
    for result in (results[1], results[3], results[6]):
        assert isinstance(result.error, ValueError) and result.class_map is None
    assert "bad.png" in str(results[1].error) and "missing.png" in str(results[3].error)
    for index, alone in ((0, image()), (2, image(45, 33, seed=1)), (4, image(seed=2)), (5, image(seed=3))):
        assert torch.equal(results[index].class_map, predictor(alone).class_map)


def test_an_image_that_cannot_be_read_is_an_error_of_the_call(model, processor, tmp_path) -> None:
    predictor = make_predictor(model, processor, max_image_pixels=1000)
    (tmp_path / "bad.png").write_bytes(b"no image")
    image().save(tmp_path / "large.png")
    with pytest.raises(ValueError, match="bad.png: expected an image"):
        predictor(tmp_path / "bad.png")
    with pytest.raises(ValueError, match="pixels are more than 1000"):
        predictor([tmp_path / "large.png"])
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        predictor(tmp_path / "missing.png")


def test_other_errors_end_the_stream(model, processor) -> None:
    def fail() -> None:
        raise ConnectionError("the network is down")

    with pytest.raises(ConnectionError):
        list(make_predictor(model, processor).stream([("a", fail)]))


def test_whatever_is_predicted_from_a_folder_can_be_trained_on(tmp_path) -> None:
    for suffix in IMAGE_SUFFIXES:
        for folder in ("images", "masks"):
            (tmp_path / folder / "train").mkdir(parents=True, exist_ok=True)
        mode = {".pbm": "1", ".pgm": "L"}.get(suffix, "RGB")
        image().convert(mode).save(tmp_path / "images" / "train" / f"a{suffix[1:]}{suffix}")
        Image.new("L", (52, 40), 1).save(tmp_path / "masks" / "train" / f"a{suffix[1:]}.png")
    dataset = load_segmentation_datasets(str(tmp_path), splits=["train"])["train"]
    assert len(dataset) == len(find_images([tmp_path / "images"])) == len(IMAGE_SUFFIXES)
