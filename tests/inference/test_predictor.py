"""The protocol applied to images, files and a dataset."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from segmenter_hf import SegmenterConfig, SegmenterForSemanticSegmentation, SegmenterImageProcessor
from segmenter_hf.data.decoding import decode_example
from segmenter_hf.data.image_loading import find_images
from segmenter_hf.data.label_sets import LABEL_SET_FILE, get_model_label_set, label_set_from_names, load_label_set
from segmenter_hf.data.loading import load_segmentation_datasets
from segmenter_hf.evaluation.evaluate import evaluate_segmentation, per_class_table, save_results
from segmenter_hf.evaluation.metrics import MeanIoU
from segmenter_hf.inference import files as prediction
from segmenter_hf.inference.attention import class_attention
from segmenter_hf.inference.files import predict_files
from segmenter_hf.inference.predictor import Predictor
from segmenter_hf.inference.protocol import MULTI_SCALES, InferenceProtocol

from ..prediction import make_predictor, segment_images
from ..tiny_models import save_tiny_scenes_model, spread_weights


SCENES = load_label_set("scenes")
TINY_FIELDS = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "image_size": 32,
}
TINY_FIELDS |= {"patch_size": 8}


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


def test_images_are_found_and_named_apart(tmp_path) -> None:
    for name in ("a.png", "deep/a.jpg", "deep/b.JPG", "deep/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_images([tmp_path, tmp_path / "deep", tmp_path / "a.png"])
    assert list(found) == ["a", "deep/a", "deep/b", "a-2", "b", "a-3"]
    assert found["a-2"] == tmp_path / "deep" / "a.jpg"
    for missing in (tmp_path / "nothing.png", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(FileNotFoundError, match="no image"):
            find_images([missing])


def test_each_file_gets_a_label_map_and_an_overlay_of_its_upright_size(model, processor, tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(48, 64).save(tmp_path / "turned.jpg", exif=exif)
    written = predict_files(make_predictor(model, processor), [tmp_path], tmp_path / "out", show_progress=False)
    label_map = Image.open(written["turned"])
    assert label_map.size == (48, 64)
    assert set(np.unique(np.asarray(label_map))) <= set(range(8))
    (expected,) = segment_images(model, processor, [str(tmp_path / "turned.jpg")])
    assert np.array_equal(np.asarray(label_map), expected.numpy())
    assert (tmp_path / "out" / "turned_overlay.png").is_file()


def test_attention_is_written_where_it_is_wanted(model, processor, tmp_path) -> None:
    picture(50, 70).save(tmp_path / "street.png")
    predict_files(make_predictor(model, processor), [tmp_path / "street.png"], tmp_path / "out", attention=True)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"street.png", "street_overlay.png", "street_attention.png"}


@pytest.mark.parametrize(("num_labels", "num_channels"), [(3, 3), (1, 3), (3, 4)])
def test_attention_goes_with_unsure_pixels_one_class_and_any_channels(num_labels, num_channels, tmp_path) -> None:
    torch.manual_seed(0)
    config = SegmenterConfig(**TINY_FIELDS, num_labels=num_labels, num_channels=num_channels)
    model = spread_weights(SegmenterForSemanticSegmentation(config))
    half = [0.5] * num_channels
    fields = {"size": {"shortest_edge": 40}, "window_size": 32, "window_stride": 32, "patch_size": 8}
    processor = SegmenterImageProcessor(**fields, image_mean=half, image_std=half, do_convert_rgb=num_channels == 3)
    values = np.random.default_rng(0).integers(0, 256, (50, 70, num_channels), dtype=np.uint8)
    np.save(tmp_path / "street.npy", values)
    label_set = label_set_from_names(list("abc"[:num_labels]), ignore_index=11).with_background()
    predictor = Predictor(model, processor, label_set)
    paths, options = [tmp_path / "street.npy"], {"attention": True, "show_progress": False}
    predict_files(predictor, paths, tmp_path / "out", min_confidence=0.999, **options)
    assert 11 in np.unique(np.asarray(Image.open(tmp_path / "out" / "street.png")))
    assert (tmp_path / "out" / "street_attention.png").is_file() and (
        tmp_path / "out" / "street_overlay.png"
    ).is_file()
    if num_labels == 1:
        with pytest.raises(ValueError, match="`class_id` must be from 1 to 1, got 0"):
            class_attention(predictor, str(paths[0]), 0)


def test_an_image_of_one_column_is_overlaid(model, processor, tmp_path) -> None:
    picture(4500, 1).save(tmp_path / "thin.png")
    written = predict_files(make_predictor(model, processor), [tmp_path], tmp_path / "out", show_progress=False)
    assert Image.open(written["thin"]).size == (1, 4500)
    assert Image.open(tmp_path / "out" / "thin_overlay.png").height >= 2250


def test_an_image_of_other_channels_does_not_end_a_stream() -> None:
    model = SegmenterForSemanticSegmentation(SegmenterConfig(**TINY_FIELDS, num_labels=3, num_channels=4))
    fields = {"size": {"shortest_edge": 40}, "window_size": 32, "window_stride": 32, "patch_size": 8}
    processor = SegmenterImageProcessor(**fields, image_mean=[0.5] * 4, image_std=[0.5] * 4, do_convert_rgb=False)
    items = [("three", picture(40, 50)), ("four", np.zeros((4, 40, 50), np.uint8))]
    three, four = make_predictor(model, processor).stream(items)
    assert "has 3 channels" in str(three.error) and four.class_map.shape == (40, 50)


def test_what_the_network_was_run_with_is_described(tmp_path) -> None:
    save_tiny_scenes_model(tmp_path)
    load = Predictor.from_pretrained
    plain = load(tmp_path, device="cpu").describe_network()
    assert plain == {"dtype": "float32"}
    assert load(tmp_path, device="cpu", patch_size=16).describe_network() == {"dtype": "float32", "patch_size": 16}
    merging = load(tmp_path, device="cpu", token_merging_threshold=0.5).describe_network()
    assert merging["token_merging_threshold"] == 0.5 and merging["token_merging_layers"] == [0]
    json.dumps(merging)


def test_unreadable_images_are_named_after_the_others_are_done(model, processor, tmp_path) -> None:
    picture(48, 64).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:200])
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(ValueError, match="2 of 3 images cannot be read") as caught:
        predict_files(make_predictor(model, processor), [tmp_path], tmp_path / "out", show_progress=False)
    assert "bad.png" in str(caught.value)
    assert "empty.jpg" in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["good.png", "good_overlay.png"]


@pytest.mark.parametrize("multi_scale_flip", [False, True])
def test_evaluation_counts_the_maps_at_original_size(model, processor, tmp_path, multi_scale_flip) -> None:
    (dataset,) = load_segmentation_datasets(splits=["validation"], scenes_size=(48, 64), scenes_validation=3).values()
    protocol = InferenceProtocol.multi_scale_flip() if multi_scale_flip else InferenceProtocol()
    predictor = Predictor(model, processor, SCENES, protocol)
    results = evaluate_segmentation(predictor, dataset, show_progress=False)
    metric = MeanIoU(8)
    for row in dataset:
        image, labels = decode_example(row, SCENES)
        metric.add(
            prediction=predictor(image).class_map,
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
    with pytest.raises(ValueError, match="8 classes"):
        Predictor(model, processor, load_label_set("camvid"))


def test_the_label_set_of_a_model_is_the_one_beside_it_or_of_its_names(tmp_path) -> None:
    assert get_model_label_set(tmp_path, SCENES.id2label) == SCENES
    assert get_model_label_set(tmp_path, {0: "a", 1: "b"}).labels == ("a", "b")
    label_set_from_names(["a", "b"], name="mine").save(tmp_path / LABEL_SET_FILE)
    assert get_model_label_set(tmp_path, {0: "a", 1: "b"}).name == "mine"
    load_label_set("camvid").save(tmp_path / LABEL_SET_FILE)
    assert get_model_label_set(tmp_path, {}) == load_label_set("camvid")


@pytest.mark.parametrize(
    ("multi_scale_flip", "scales", "name"),
    [
        (False, None, "single scale"),
        (True, None, "multi-scale + flip"),
        (False, [1.0], "single scale"),
        (False, [0.5, 1.0], "scales 0.5, 1.0"),
        (True, [1.0], "scales 1.0 + flip"),
    ],
)
def test_a_protocol_is_named_by_what_it_does(processor, multi_scale_flip, scales, name) -> None:
    fields = {} if scales is None else {"scales": scales}
    make_protocol = InferenceProtocol.multi_scale_flip if multi_scale_flip else InferenceProtocol
    described = make_protocol(**fields, flip=multi_scale_flip).describe(processor)
    assert described["name"] == name
    assert described["do_flip"] is multi_scale_flip
    assert described["scales"] == (scales or (list(MULTI_SCALES) if multi_scale_flip else [1.0]))


def test_images_beyond_the_limit_are_refused_until_it_is_raised(model, processor, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's own limit would refuse the picture too
    picture(48, 64).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match="64 x 48 pixels are more than 3071.*max_image_pixels"):
        predictor = make_predictor(model, processor, max_image_pixels=3071)
        predict_files(predictor, [tmp_path], tmp_path / "out", show_progress=False)
    predictor = make_predictor(model, processor, max_image_pixels=3072)
    written = predict_files(predictor, [tmp_path], tmp_path / "out", show_progress=False)
    assert list(written) == ["large"]
    assert Image.MAX_IMAGE_PIXELS == 1000


@pytest.mark.parametrize("mode", ["RGB", "P", "L", "I;16"])
def test_the_overlay_of_a_large_image_is_reduced_and_its_label_map_is_not(
    model, processor, tmp_path, monkeypatch, mode
) -> None:
    monkeypatch.setattr(prediction, "MAX_OVERLAY_SIDE", 50)
    image = picture(148, 151)
    image = (
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16)) if mode == "I;16" else image.convert(mode)
    )
    image.save(tmp_path / "large.png")
    drawn = []
    monkeypatch.setattr(
        prediction,
        "overlay",
        lambda image, segmentation, palette, **_: drawn.append((image.size, segmentation)) or image,
    )
    predictor = make_predictor(model, processor, full_resolution=True)
    written = predict_files(predictor, [tmp_path], tmp_path / "out", show_progress=False)
    label_map = np.asarray(Image.open(written["large"]))
    assert label_map.shape == (148, 151)
    ((size, reduced),) = drawn
    assert size == (37, 37)
    assert np.array_equal(reduced, label_map[2:148:4, 2:150:4])


def test_other_precisions_give_nearly_the_same_scores_in_float32(model, processor, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    images = [picture(50, 70), picture(45, 41, seed=1)]
    expected = segment_images(model, processor, images)
    options = [{}, {"dtype": torch.bfloat16}]
    try:
        import torchao  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="torchao"):
            Predictor.from_pretrained(tmp_path, int8=True)
    else:
        options += [{"int8": True}, {"int8": True, "dtype": torch.bfloat16}]
    for option in options:
        predictor = Predictor.from_pretrained(tmp_path, device="cpu", **option)
        assert predictor.model.dtype == option.get("dtype", torch.float32)
        results = predictor(images, return_scores=True)
        if not option:
            exact = [result.scores for result in results]
            for result, wanted in zip(results, expected, strict=True):
                assert (result.class_map == wanted).float().mean() > 0.999
        # Maps are not compared: the classes of random weights are too close to each other.
        for result, scores in zip(results, exact, strict=True):
            assert result.scores.dtype == torch.float32
            assert (result.scores - scores).abs().mean() < 0.05
