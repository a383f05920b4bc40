"""Labels of a model to train on: the ignore index where it is unsure, by one threshold or by one for each class."""

import io
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from segmenter_hf.cli.main import main
from segmenter_hf.data.decoding import decode_example
from segmenter_hf.data.label_resolution import dataset_label_set
from segmenter_hf.data.label_sets import label_set_from_names, load_label_set
from segmenter_hf.data.loading import load_segmentation_datasets
from segmenter_hf.data.synthetic_scenes import save_scenes
from segmenter_hf.inference import datasets as dataset_prediction
from segmenter_hf.inference.dataset_files import OutputLayout
from segmenter_hf.inference.datasets import predict_dataset
from segmenter_hf.inference.files import predict_files
from segmenter_hf.inference.predictor import Predictor
from segmenter_hf.inference.protocol import InferenceProtocol
from segmenter_hf.inference.pseudo_labels import NUM_BINS, ConfidenceRule, pseudo_label_set
from segmenter_hf.models.sliding_window import plain_merge_windows

from ..tiny_models import save_tiny_scenes_model
from .test_datasets import as_process as as_process


SCENES = load_label_set("scenes")


def encoded(height: int, width: int, seed: int) -> dict:
    """An image of blocks, which the model takes for several classes."""
    blocks = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)[:height, :width]).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def images() -> datasets.Dataset:
    columns = {"image": [encoded(40 + 3 * index, 61 - 2 * index, index) for index in range(7)]}
    columns["id"] = [f"street/{index}" for index in range(7)]
    features = datasets.Features({"image": datasets.Image(decode=False), "id": datasets.Value("string")})
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture(params=[False, True], ids=["single scale", "scales and flips"])
def predictor(request, model, processor) -> Predictor:
    protocol = InferenceProtocol(scales=(0.75, 1.0), flip=True) if request.param else InferenceProtocol()
    return Predictor(model, processor, SCENES, protocol)


def opened(row: dict) -> Image.Image:
    return Image.open(io.BytesIO(row["bytes"]))


def naive_confidence(predictor: Predictor, row: dict) -> tuple[np.ndarray, np.ndarray]:
    """Class and probability of each pixel: windows upsampled, averaged, resized, softmax; all in float64."""
    windows = predictor.prepare(opened(row).convert("RGB"))
    logits = [predictor.compute_logits(windows.pixel_values(window)[None])[0] for window in windows.windows]
    classes, scores = plain_merge_windows(torch.stack(logits).double(), windows.windows, 8)
    return classes.numpy(), scores.amax(0).numpy()


def label_maps(folder: Path) -> list[np.ndarray]:
    columns = [pq.read_table(file).column("label_map").to_pylist() for file in sorted(folder.glob("*.parquet"))]
    return [np.array(opened(value)) for column in columns for value in column]


def predict(predictor: Predictor, output_dir: Path, rule: ConfidenceRule, **layout):
    fields = {"rows_per_file": 3, "with_images": True, "confidence": rule, **layout}
    return predict_dataset(predictor, images(), output_dir, OutputLayout(**fields), show_progress=False)


def check_pixels(found: np.ndarray, classes: np.ndarray, confidence: np.ndarray, thresholds: np.ndarray) -> None:
    """A pixel keeps its class from the threshold on; those within the rounding of float32 of it may do either."""
    distance = confidence - thresholds[classes]
    clear = np.abs(distance) > 1e-5
    expected = np.where(distance >= 0, classes, 255)
    assert np.array_equal(found[clear], expected[clear]) and clear.mean() > 0.99
    assert set(np.unique(found[~clear])) <= {*np.unique(classes), 255}


def test_pixels_below_the_confidence_get_the_ignore_index(predictor, tmp_path) -> None:
    naive = [naive_confidence(predictor, row["image"]) for row in images()]
    middle = float(np.median(np.concatenate([confidence.ravel() for _, confidence in naive])))
    predict(predictor, tmp_path / "out", ConfidenceRule(middle))
    found = label_maps(tmp_path / "out")
    assert len(found) == len(naive) == 7
    for label_map, (classes, confidence) in zip(found, naive):
        check_pixels(label_map, classes, confidence, np.full(8, middle))
    unsure = np.mean(np.concatenate([label_map.ravel() for label_map in found]) == 255)
    assert 0.49 < unsure < 0.51


def test_each_class_keeps_its_share_whatever_its_confidence(predictor, tmp_path) -> None:
    naive = [naive_confidence(predictor, row["image"]) for row in images()]
    classes, confidence = (np.concatenate([pair[part].ravel() for pair in naive]) for part in (0, 1))
    predict(predictor, tmp_path / "out", ConfidenceRule(min_class_fraction=0.3))
    kept = np.concatenate([label_map.ravel() for label_map in label_maps(tmp_path / "out")])
    thresholds = json.loads((tmp_path / "out" / "thresholds.json").read_text())["thresholds"]
    assert len(np.unique(classes)) > 1
    for index, threshold in enumerate(thresholds):
        of_class = np.sort(confidence[classes == index])[::-1]
        if not len(of_class):
            assert threshold is None
            continue
        wanted = int(np.ceil(0.3 * len(of_class)))
        exact = of_class[wanted - 1]  # the least confidence among the share, by sorting
        assert exact - 1 / NUM_BINS - 1e-5 <= threshold <= exact + 1e-5
        assert wanted - 2 <= np.sum(kept == index) <= np.sum(of_class >= threshold - 1e-5)


def test_with_both_rules_a_pixel_keeps_its_class_where_either_says_so(predictor, tmp_path) -> None:
    naive = [naive_confidence(predictor, row["image"]) for row in images()]
    middle = float(np.median(np.concatenate([confidence.ravel() for _, confidence in naive])))
    for name, rule in {
        "both": ConfidenceRule(middle, 0.3),
        "first": ConfidenceRule(middle),
        "second": ConfidenceRule(None, 0.3),
    }.items():
        predict(predictor, tmp_path / name, rule)
    both, first, second = (label_maps(tmp_path / name) for name in ("both", "first", "second"))
    for index in range(7):
        assert np.array_equal(both[index] != 255, (first[index] != 255) | (second[index] != 255))
    assert any((one != other).any() for one, other in zip(first, second))


def test_the_folder_is_a_dataset_with_images_and_classes(predictor, tmp_path) -> None:
    predict(predictor, tmp_path / "out", ConfidenceRule(0.5))
    (dataset,) = load_segmentation_datasets(str(tmp_path / "out"), splits=["train"]).values()
    label_set = dataset_label_set(dataset)
    assert label_set.labels == SCENES.labels and label_set.ignore_index == 255
    for row, source, stored in zip(dataset, images(), label_maps(tmp_path / "out")):
        image, labels = decode_example(row, label_set)
        assert np.array_equal(image, np.array(opened(source["image"]).convert("RGB")))
        assert np.array_equal(labels, stored)


def test_processes_and_a_resumed_run_have_the_thresholds_of_one(
    predictor,
    tmp_path,
    as_process,
    monkeypatch,
) -> None:
    rule = ConfidenceRule(0.9, 0.4)
    predict(predictor, tmp_path / "alone", rule)
    expected = label_maps(tmp_path / "alone")
    (tmp_path / "alone" / "train-00001.parquet").unlink()
    monkeypatch.setattr(dataset_prediction, "count_confidences", lambda *_: pytest.fail("the thresholds are there"))
    predict(predictor, tmp_path / "alone", rule)
    assert all(np.array_equal(*pair) for pair in zip(label_maps(tmp_path / "alone"), expected))
    monkeypatch.undo()

    gathered = []
    for index in (0, 1):
        as_process(index, 2)
        monkeypatch.setattr(dataset_prediction, "gather_object", lambda parts: gathered.extend(parts) or parts)
        layout = OutputLayout("train", "parquet", 3, True, rule)
        (tmp_path / f"process{index}").mkdir()
        dataset_prediction.find_thresholds(predictor, images(), tmp_path / f"process{index}", layout, False)
    saved = json.loads((tmp_path / "alone" / "thresholds.json").read_text())["thresholds"]
    together = rule.thresholds(sum(gathered))
    assert [None if np.isinf(value) else float(value) for value in together] == saved


def test_another_rule_is_another_run(predictor, tmp_path) -> None:
    predict(predictor, tmp_path / "out", ConfidenceRule(0.9, 0.4))
    with pytest.raises(ValueError, match="confidence"):
        predict(predictor, tmp_path / "out", ConfidenceRule(0.8, 0.4))
    layout = OutputLayout("train", "parquet", 3, True, ConfidenceRule(0.8, 0.9))
    before = (tmp_path / "out" / "thresholds.json").read_text()
    predict_dataset(predictor, images(), tmp_path / "out", layout, overwrite=True, show_progress=False)
    assert (tmp_path / "out" / "thresholds.json").read_text() != before


def test_damaged_thresholds_are_named(predictor, tmp_path) -> None:
    predict(predictor, tmp_path / "out", ConfidenceRule(0.9, 0.4))
    for content in ('{"thresholds": [0.5]}', '{"thresholds": "high"}', "{"):
        (tmp_path / "out" / "thresholds.json").write_text(content)
        with pytest.raises(ValueError, match=r"thresholds\.json"):
            predict(predictor, tmp_path / "out", ConfidenceRule(0.9, 0.4))


def test_images_get_the_ignore_index_too(predictor, tmp_path) -> None:
    source = encoded(43, 61, 5)
    (tmp_path / "street.png").write_bytes(source["bytes"])
    classes, confidence = naive_confidence(predictor, source)
    middle = float(np.median(confidence))
    written = predict_files(
        predictor, [tmp_path / "street.png"], tmp_path / "out", min_confidence=middle, show_progress=False
    )
    check_pixels(np.array(Image.open(written["street"])), classes, confidence, np.full(8, middle))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "neither"),
        ({"min_confidence": 0.0}, "min_confidence"),
        ({"min_class_fraction": 1.5}, "min_class_fraction"),
    ],
)
def test_rules_out_of_range_are_refused(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        ConfidenceRule(**fields)


def test_the_stored_label_set_holds_the_classes_themselves() -> None:
    names = [f"class {index}" for index in range(256)]
    with pytest.raises(ValueError, match="256 classes leave no value"):
        pseudo_label_set(label_set_from_names(names, ignore_index=-1))
    assert pseudo_label_set(label_set_from_names(names[:8], ignore_index=-100)).ignore_index == 255
    assert pseudo_label_set(label_set_from_names([*names, "one more"], ignore_index=-100)).ignore_index == 65535
    mapped = load_label_set("ade20k")
    assert mapped.reduce_labels and not pseudo_label_set(mapped).reduce_labels
    one = pseudo_label_set(label_set_from_names(["leaf"]))
    assert one.labels == ("background", "leaf") and one.label_id_to_train_id == {0: 0, 1: 1}


def test_both_thresholds_of_the_command_line_are_used(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny_scenes_model(tmp_path / "model")
    save_scenes(tmp_path / "drawn", 2, (40, 56), seed=2)
    given = ["predict", "--model_name_or_path", "model", "--min_confidence", "0.99"]
    main([*given, "--images", "drawn/images", "--output_dir", "files"])
    maps = [np.array(Image.open(tmp_path / "files" / path.name)) for path in (tmp_path / "drawn" / "images").iterdir()]
    assert len(maps) == 2 and all((each == 255).all() for each in maps)
    main([*given, "--dataset_name", "drawn", "--min_class_fraction", "0.5", "--output_dir", "rows"])
    (file,) = (tmp_path / "rows").rglob("*.parquet")
    maps = [np.array(Image.open(io.BytesIO(row["bytes"]))) for row in pq.read_table(file)["label_map"].to_pylist()]
    kept = np.concatenate([each.ravel() != 255 for each in maps]).mean()
    assert 0.4 < kept < 0.9
