"""`pipeline("image-segmentation")` in batches, of images as they are stored, and with the models of others."""

from collections.abc import Callable, Iterable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    ImageSegmentationPipeline,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
    pipeline,
)
from transformers.pipelines.pt_utils import KeyDataset

from segmenter_hf import SegmenterForSemanticSegmentation
from segmenter_hf.models.pipeline_segmenter import SegmenterPipeline

from ..tiny_models import spread_weights, tiny_scenes_config, tiny_scenes_processor


SIZES = [(40, 40), (30, 77), (64, 45), (40, 56), (90, 41)]  # several windows each, of different numbers


def images() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(256, size=(*size, 3), dtype=np.uint8)) for size in SIZES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    spread_weights(SegmenterForSemanticSegmentation(tiny_scenes_config())).save_pretrained(path)
    tiny_scenes_processor().save_pretrained(path)
    return path


def as_list(given: list[Image.Image]) -> list[Image.Image]:
    return given


def as_generator(given: list[Image.Image]) -> Iterable[Image.Image]:
    return (image for image in given)


def as_key_dataset(given: list[Image.Image]) -> KeyDataset:
    features = datasets.Features({"photo": datasets.Image()})
    return KeyDataset(datasets.Dataset.from_dict({"photo": given}, features=features), "photo")


def maps(results: Iterable[list[dict]]) -> list[dict[str, bytes]]:
    return [{part["label"]: part["mask"].tobytes() for part in parts} for parts in results]


@pytest.mark.parametrize("given", [as_list, as_generator, as_key_dataset])
def test_a_batch_gives_the_maps_of_single_images(given: Callable, folder) -> None:
    segment = pipeline("image-segmentation", model=str(folder))
    assert isinstance(segment, ImageSegmentationPipeline)
    single = [segment(image) for image in images()]
    assert [part["mask"].size for parts in single for part in parts[:1]] == [size[::-1] for size in SIZES]
    assert len({part["label"] for parts in single for part in parts}) > 1
    for batch_size in (1, 2, 4, 8):
        assert maps(segment(given(images()), batch_size=batch_size)) == maps(single)


def test_few_windows_go_through_the_network_at_once(folder, monkeypatch) -> None:
    segment = pipeline("image-segmentation", model=str(folder), window_batch_size=3)
    sizes, forward = [], segment.model.forward
    monkeypatch.setattr(segment.model, "forward", lambda **kw: sizes.append(len(kw["pixel_values"])) or forward(**kw))
    segment(images(), batch_size=4)
    assert max(sizes) == 3
    with pytest.raises(ValueError, match="`window_batch_size` must be at least 1, got 0"):
        segment(images()[0], window_batch_size=0)


@pytest.mark.parametrize("as_file", [True, False])
def test_16_bit_images_keep_their_range(as_file, folder, tmp_path) -> None:
    values = np.random.default_rng(0).integers(65536, size=(45, 60), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    processor, segment = tiny_scenes_processor(), pipeline("image-segmentation", model=str(folder))
    with torch.no_grad():
        outputs = segment.model(**processor(Image.open(tmp_path / "deep.png")))
    (expected,) = processor.post_process_semantic_segmentation(outputs)
    parts = segment(str(tmp_path / "deep.png") if as_file else Image.open(tmp_path / "deep.png"))
    label2id = segment.model.config.label2id
    found = sum(label2id[part["label"]] * (np.asarray(part["mask"]) == 255) for part in parts)
    assert np.array_equal(found, expected.numpy())


def test_images_are_turned_upright(folder, tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    images()[1].save(tmp_path / "turned.jpg", exif=exif)
    segment = pipeline("image-segmentation", model=str(folder))
    for source in (str(tmp_path / "turned.jpg"), Image.open(tmp_path / "turned.jpg")):
        assert segment(source)[0]["mask"].size == (30, 77)


def test_what_is_no_image_is_refused(folder) -> None:
    with pytest.raises(ValueError, match="nowhere.png"):
        pipeline("image-segmentation", model=str(folder))("nowhere.png")


def test_models_of_others_are_treated_as_by_transformers() -> None:
    sizes = {"num_encoder_blocks": 1, "depths": [1], "sr_ratios": [1], "hidden_sizes": [8], "num_attention_heads": [1]}
    more = {"patch_sizes": [3], "strides": [4], "mlp_ratios": [1], "decoder_hidden_size": 8, "num_labels": 3}
    model = spread_weights(SegformerForSemanticSegmentation(SegformerConfig(**sizes, **more)))
    processor = SegformerImageProcessor(size={"height": 32, "width": 32})
    segment = pipeline("image-segmentation", model=model, image_processor=processor)
    theirs = ImageSegmentationPipeline(model=model, image_processor=processor, device="cpu")
    assert isinstance(segment, SegmenterPipeline)
    for batch_size in (1, 2):
        found = segment(images(), batch_size=batch_size)
        assert maps(found) == maps(theirs(images(), batch_size=batch_size))
