"""The protocol applied to images, files and a dataset."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from segmenter_hf import SegmenterConfig, SegmenterForSemanticSegmentation, SegmenterImageProcessor
from segmenter_hf.data import decode_example, load_segmentation_datasets
from segmenter_hf.evaluation import evaluate_segmentation, per_class_table, save_results
from segmenter_hf.label_sets import LABEL_SET_FILE, label_set_from_names, label_set_of_model, load_label_set
from segmenter_hf.metrics import MeanIoU
from segmenter_hf.prediction import MULTI_SCALES, find_pictures, predict_files, segment_images


SCENES = load_label_set("scenes")


@pytest.fixture
def model() -> SegmenterForSemanticSegmentation:
    config = SegmenterConfig(
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=32,
        num_hidden_layers=1,
        image_size=32,
        patch_size=8,
        id2label=SCENES.id2label,
        label2id=SCENES.label2id,
    )
    model = SegmenterForSemanticSegmentation(config).eval()
    with torch.no_grad():  # far from uniform, so that differences would show
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    return model


@pytest.fixture
def processor() -> SegmenterImageProcessor:
    return SegmenterImageProcessor(size={"shortest_edge": 40}, window_size=32, window_stride=16, patch_size=8)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("multi_scale_flip", [False, True])
@torch.no_grad()
def test_windows_can_go_through_the_network_in_any_batches(model, processor, multi_scale_flip) -> None:
    images = [picture(50, 70), picture(45, 41, seed=1)]
    scales = list(MULTI_SCALES) if multi_scale_flip else [1.0]
    outputs = model(**processor(images, scales=scales, do_flip=multi_scale_flip))
    expected = processor.post_process_semantic_segmentation(outputs, return_segmentation_scores=True)
    for window_batch_size in (1, 5, 1000):
        results = segment_images(
            model,
            processor,
            images,
            multi_scale_flip=multi_scale_flip,
            window_batch_size=window_batch_size,
            return_segmentation_scores=True,
        )
        for result, wanted in zip(results, expected):
            torch.testing.assert_close(result.segmentation_scores, wanted.segmentation_scores, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="window_batch_size"):
        segment_images(model, processor, images, window_batch_size=0)


def test_pictures_are_found_and_named_apart(tmp_path) -> None:
    for name in ("a.png", "deep/a.jpg", "deep/b.JPG", "deep/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_pictures([tmp_path, tmp_path / "deep", tmp_path / "a.png"])
    assert list(found) == ["a", "deep/a", "deep/b", "a-2", "b", "a-3"]
    assert found["a-2"] == tmp_path / "deep" / "a.jpg"
    for missing in (tmp_path / "nothing.png", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(FileNotFoundError, match="no picture"):
            find_pictures([missing])


def test_each_file_gets_a_label_map_and_an_overlay_of_its_upright_size(model, processor, tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(48, 64).save(tmp_path / "turned.jpg", exif=exif)
    written = predict_files(model, processor, [tmp_path], tmp_path / "out", SCENES, show_progress=False)
    label_map = Image.open(written["turned"])
    assert label_map.size == (48, 64)
    assert set(np.unique(np.asarray(label_map))) <= set(range(8))
    (expected,) = segment_images(model, processor, [str(tmp_path / "turned.jpg")])
    assert np.array_equal(np.asarray(label_map), expected.numpy())
    assert (tmp_path / "out" / "turned_overlay.png").is_file()


def test_unreadable_pictures_are_named_after_the_others_are_done(model, processor, tmp_path) -> None:
    picture(48, 64).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:200])
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(ValueError, match="2 of 3 pictures cannot be read") as caught:
        predict_files(model, processor, [tmp_path], tmp_path / "out", SCENES, show_progress=False)
    assert "bad.png" in str(caught.value)
    assert "empty.jpg" in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["good.png", "good_overlay.png"]


@pytest.mark.parametrize("multi_scale_flip", [False, True])
def test_evaluation_counts_the_maps_at_original_size(model, processor, tmp_path, multi_scale_flip) -> None:
    (dataset,) = load_segmentation_datasets(splits=["validation"], scenes_size=(48, 64), scenes_validation=3).values()
    results = evaluate_segmentation(
        model, processor, dataset, SCENES, multi_scale_flip=multi_scale_flip, show_progress=False
    )
    metric = MeanIoU(8)
    for row in dataset:
        image, labels = decode_example(row, SCENES)
        metric.add(
            prediction=segment_images(model, processor, [image], multi_scale_flip=multi_scale_flip)[0],
            reference=labels,
        )
    expected = metric.compute()
    assert {name: results[name] for name in expected} == expected
    assert results["num_images"] == 3
    assert results["protocol"]["do_flip"] is multi_scale_flip
    assert results["protocol"]["window_stride"] == 16
    save_results(tmp_path, results, SCENES.labels)
    saved = json.loads((tmp_path / "results.json").read_text())
    assert {*expected, "protocol", "num_images"} <= saved.keys()
    assert (tmp_path / "per_class.md").read_text() == per_class_table(results, SCENES.labels)


def test_a_label_set_of_other_classes_is_refused(model, processor) -> None:
    (dataset,) = load_segmentation_datasets(splits=["validation"], scenes_validation=1).values()
    with pytest.raises(ValueError, match="8 classes"):
        evaluate_segmentation(model, processor, dataset, load_label_set("camvid"))


def test_the_label_set_of_a_model_is_the_one_beside_it_or_of_its_names(tmp_path) -> None:
    assert label_set_of_model(tmp_path, SCENES.id2label) == SCENES
    assert label_set_of_model(tmp_path, {0: "a", 1: "b"}).labels == ("a", "b")
    label_set_from_names(["a", "b"], name="mine").save(tmp_path / LABEL_SET_FILE)
    assert label_set_of_model(tmp_path, {0: "a", 1: "b"}).name == "mine"
    load_label_set("camvid").save(tmp_path / LABEL_SET_FILE)
    assert label_set_of_model(tmp_path, {}) == load_label_set("camvid")
