"""Masks, configurations, arguments, datasets and command lines that are wrong: the error says so, and nothing is written.

Images are in `test_bad_images.py`, checkpoints in `test_safe_loading.py` and `test_bad_checkpoints.py`.
"""

import io
import json
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from segmenter_hf import (
    SegmenterConfig,
    SegmenterForSemanticSegmentation,
    SegmenterImageProcessor,
    SegmenterImageProcessorPil,
    SetrConfig,
)
from segmenter_hf.cli.main import main
from segmenter_hf.data.decoding import decode_example
from segmenter_hf.data.label_sets import label_set_from_names, load_label_set, map_labels
from segmenter_hf.data.loading import load_segmentation_datasets, load_split
from segmenter_hf.data.mask_checks import check_masks
from segmenter_hf.evaluation.evaluate import evaluate_segmentation
from segmenter_hf.evaluation.metrics import confusion_matrix
from segmenter_hf.inference.predictor import Predictor
from segmenter_hf.models.configuration_vit_encoder import VitEncoderConfig
from segmenter_hf.models.segmentation_loss import upsampled_cross_entropy

from ..tiny_models import tiny_scenes_config


FIELDS = {"size": {"shortest_edge": 40}, "window_size": 32, "window_stride": 16, "patch_size": 8}
COLOR = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
ZEROS = np.zeros((40, 56), np.uint8)
NAN = float("nan")


@pytest.fixture
def processor() -> SegmenterImageProcessor:
    return SegmenterImageProcessor(**FIELDS)


# ---- masks ----


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.fromarray(COLOR), r"\(40, 56, 3\). Convert color-coded masks to class ids"),
        (Image.fromarray(COLOR).convert("RGBA"), r"\(40, 56, 4\)"),
        (Image.fromarray(COLOR).convert("LA"), r"\(40, 56, 2\)"),
        (Image.fromarray(COLOR).convert("F"), "must hold integers, got float32"),
        (ZEROS.astype(float), "must hold integers, got float64"),
        (np.full((40, 56), NAN), "must hold integers, got float64"),
        (ZEROS.astype(complex), "must hold integers, got complex128"),
        (ZEROS.astype(str), "must hold integers"),
        (ZEROS.astype(object), "must hold integers, got object"),
        (torch.zeros(40, 56), "must hold integers"),
        (ZEROS[:, :9], r"images of \[\(40, 56\)\] and maps of \[\(40, 9\)\]"),
        (ZEROS.T, r"maps of \[\(56, 40\)\]"),
        (ZEROS[:0], "at least one pixel"),
        ([ZEROS, ZEROS], "as many segmentation maps"),
        ([], "got none"),
        (ZEROS.tolist(), "got int"),
        (5, "got int"),
    ],
)
def test_what_is_no_label_map_is_refused_by_the_processor(processor, mask, message) -> None:
    with pytest.raises(ValueError, match=message):
        processor(COLOR, mask)


@pytest.mark.parametrize(
    "mask",
    [
        ZEROS + 7,
        (ZEROS + 7).astype(np.uint16),
        (ZEROS + 7).astype(np.int64),
        torch.from_numpy(ZEROS + 7),
        Image.fromarray(ZEROS + 7),
        Image.fromarray(ZEROS + 7).convert("P"),
        Image.fromarray((ZEROS + 7).astype(np.uint16)),
        Image.fromarray((ZEROS + 7).astype(np.int32)),
        [ZEROS + 7],
    ],
)
def test_label_maps_of_every_kind_hold_their_ids(processor, mask) -> None:
    assert processor(COLOR, mask)["labels"].unique().tolist() == [7]


@pytest.mark.parametrize("value", [-1, 8, 254, 2**31])
def test_labels_that_are_no_class_do_not_become_a_loss(processor, value) -> None:
    labels = processor(COLOR, np.full((40, 56), value))["labels"]
    with pytest.raises((ValueError, RuntimeError, IndexError), match=f"{value}"):
        upsampled_cross_entropy(torch.zeros(len(labels), 8, 4, 4), labels)


def row(image: Image.Image | bytes, mask: Image.Image | bytes, name: str = "photo 7") -> dict:
    def stored(picture: Image.Image | bytes) -> dict:
        if isinstance(picture, bytes):
            return {"bytes": picture, "path": None}
        buffer = io.BytesIO()
        picture.save(buffer, "TIFF" if picture.mode == "F" else "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    return {"id": name, "image": stored(image), "annotation": stored(mask)}


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.fromarray(COLOR), "RGB image with colors, .* pixels.*Give the classes of the colors"),
        (Image.fromarray(COLOR).convert("RGBA"), "RGB image with colors"),
        (Image.fromarray(COLOR).convert("F"), "class ids in gray or palette mode, got mode F"),
        (Image.fromarray(ZEROS.T.copy()), "mask of the size of the image"),
        (b"", "cannot be read as an image"),
        (b"\x89PNG\r\n\x1a\n", "cannot be read as an image"),
    ],
)
def test_what_is_no_mask_is_refused_when_decoded_and_counted(mask, message) -> None:
    example = row(Image.fromarray(COLOR), mask)
    with pytest.raises(ValueError, match=f"photo 7.*{message}"):
        decode_example(example)
    report = check_masks([example], 8, show_progress=False)
    assert report.num_images == len(report.problems) == 1
    with pytest.raises(ValueError, match=f"1 masks cannot be used.*\n.*photo 7.*{message}"):
        report.raise_if_impossible()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (8, "Ids out of range: .8.; expected 0 to 7 and 255.*do_reduce_labels"),
        (
            77,
            "If 77 marks .* `ignore_index=77`. Otherwise either there are more classes, 78 or more.*need a label map",
        ),
        (300, "Map the stored ids to class ids with a label map"),
        (255, "No pixel of 1 masks, of which the first is .*, belongs to a class"),
    ],
)
def test_masks_of_wrong_ids_end_in_a_remedy(value, message) -> None:
    mask = np.full((40, 56), value, np.uint16 if value > 255 else np.uint8)
    with pytest.raises(ValueError, match=message):
        check_masks([row(Image.fromarray(COLOR), Image.fromarray(mask))], 8, show_progress=False).raise_if_impossible()


# ---- arguments of the image processor and of what follows the model ----


@pytest.mark.parametrize("processor_class", [SegmenterImageProcessor, SegmenterImageProcessorPil])
@pytest.mark.parametrize(
    "fields",
    [
        {"scales": 1.0},
        {"scales": None},
        {"scales": "1"},
        {"scales": ["1"]},
        {"scales": [None]},
        {"scales": [True]},
        {"scales": [NAN]},
        {"scales": [float("inf")]},
        {"scales": [1.0, -1.0]},
        {"scales": [16.5]},
        {"do_flip": "yes"},
        {"do_flip": 2},
        {"do_split_windows": None},
        {"do_reduce_labels": 1},
        *({name: "no"} for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")),
        {"window_size": 32.0},
        {"window_size": None},
        {"window_size": -32},
        {"window_size": 33},
        {"window_stride": None},
        {"window_stride": 1.5},
        {"window_stride": True},
        {"window_stride": -1},
        {"window_stride": 40},
        {"patch_size": 0},
        {"patch_size": -8},
        {"patch_size": None},
        {"size": {}},
        {"size": {"shortest_edge": -3}},
        {"size": {"shortest_edge": 40, "longest_edge": 0}},
        *({"size": {"shortest_edge": edge}} for edge in ("40", 40.7, True)),
        {"size": {"shortest_edge": 40, "longest_edge": "50"}},
        *({"resample": value} for value in ([2], {}, 2.0)),
        {"resample": 99},
        {"resample": "bilinear"},
        {"image_std": [0.0, 0.5, 0.5]},
        {"image_std": [-0.5] * 3},
        {"image_std": [NAN] * 3},
        {"image_std": [1e-320] * 3},
        {"image_std": []},
        {"image_mean": [float("inf")] * 3},
        {"image_mean": [1e300] * 3},
        {"image_mean": "a"},
        *({"rescale_factor": value} for value in (1e300, 10**40, 10**400, [1.0], True)),
        {"rescale_factor": 0.0},
        {"rescale_factor": NAN},
        {"rescale_factor": None},
    ],
    ids=str,
)
def test_an_impossible_field_is_a_value_error_that_names_it(processor_class, fields) -> None:
    (name,) = fields
    with pytest.raises(ValueError, match=name):
        processor_class(**{**FIELDS, **fields})
    with pytest.raises(ValueError, match=name):
        processor_class(**FIELDS)(COLOR, **fields)


@pytest.mark.parametrize(
    ("change", "target_sizes", "message"),
    [
        (lambda logits, windows: (logits[:, :0], windows), None, "`logits` must have the shape"),
        (lambda logits, windows: (logits[..., :0], windows), None, "`logits` must have the shape"),
        (lambda logits, windows: (logits[0], windows), None, "`logits` must have the shape"),
        (lambda logits, windows: (logits, windows[:2]), None, "`window_offsets` must have the shape"),
        (lambda logits, windows: (logits, 0 * windows), None, "do not cover"),
        (lambda logits, windows: (logits, -windows), None, "do not cover"),
        (lambda logits, windows: (logits[:2], windows[:2]), None, "do not cover"),
        (lambda logits, windows: (logits, windows), [(0, 5)], "at least one pixel each"),
        (lambda logits, windows: (logits, windows), [(-1, 5)], "at least one pixel each"),
        (lambda logits, windows: (logits, windows), [(4, 5, 6)], "at least one pixel each"),
        (lambda logits, windows: (logits, windows), [(4, 5)] * 2, "one .height, width. for each of the 1 images"),
    ],
)
def test_outputs_that_are_not_of_the_inputs_are_refused(processor, change, target_sizes, message) -> None:
    windows = processor(COLOR)["window_offsets"]
    logits, windows = change(torch.zeros(len(windows), 5, 4, 4), windows)
    outputs = SimpleNamespace(logits=logits, window_offsets=windows)
    with pytest.raises(ValueError, match=message):
        processor.post_process_semantic_segmentation(outputs, target_sizes)


# ---- configurations ----

OF_ALL = [
    {"num_labels": 0},
    {"num_labels": -1},
    {"num_labels": "a"},
    {"num_labels": 10**9},
    {"id2label": {}},
    {"id2label": {5: "a"}},
    {"id2label": {"a": "b"}},
    {"id2label": ["a"]},
    *({name: value} for name in ("hidden_size", "patch_size", "num_channels") for value in (0, -1, 2**40, True, 1.5)),
    *({name: value} for name in ("num_attention_heads", "intermediate_size") for value in (0, -1, "2")),
    *({"image_size": value} for value in (0, -16, 100, True, "512", [16.0, 16], [512], [], [0, 16], [16] * 3)),
    *({name: value} for name in ("hidden_dropout_prob", "drop_path_rate") for value in (-0.1, 1, NAN, "0")),
    {"attention_probs_dropout_prob": 1.5},
    *({"layer_norm_eps": value} for value in (0, -1e-5, NAN, float("inf"), "1")),
    *({"initializer_range": value} for value in (-1, NAN, float("inf"), "1")),
    {"num_hidden_layers": 2000},
    {"num_hidden_layers": 2.0},
    {"num_hidden_layers": True},
    {"hidden_act": "gelo"},
    {"hidden_act": 5},
    {"qkv_bias": 1},
    {"use_class_token": "yes"},
    {"use_distillation_token": 0},
    {"use_final_layer_norm": "no"},
    {"use_tiled_loss": 1},
    {"position_embedding_interpolation": "nearest"},
    {"semantic_loss_ignore_index": 25.5},
]
OF_SEGMENTER = [
    {"decoder_type": "mla"},
    {"decoder_type": ["linear"]},
    {"decoder_num_hidden_layers": 0},
    {"decoder_num_hidden_layers": 2000},
    {"decoder_num_attention_heads": 5},
    {"decoder_num_attention_heads": 0},
    {"decoder_hidden_size": -1},
    {"decoder_hidden_size": 7},
    {"decoder_intermediate_size": 0},
    {"decoder_layer_norm_eps": 0},
    {"decoder_mask_norm_eps": -1.0},
    {"decoder_hidden_dropout_prob": 1},
    {"decoder_attention_probs_dropout_prob": -1},
    {"decoder_drop_path_rate": NAN},
]
OF_SETR = [
    {"decoder_type": "linear"},
    {"decoder_type": None},
    *({"out_indices": value} for value in ([], [-1, 0], [99], [3, 1], "abc", 5, [1.5])),
    *({name: -1} for name in ("decoder_num_convs", "auxiliary_num_convs")),
    *({name: 2000} for name in ("decoder_num_convs", "auxiliary_num_convs")),
    *({name: value} for name in ("decoder_upsample_factor", "auxiliary_upsample_factor") for value in (0, -2, 2.0)),
    *(
        {name: value}
        for name in ("decoder_kernel_size", "auxiliary_kernel_size", "decoder_classifier_kernel_size")
        for value in (0, -1, 2)
    ),
    {"decoder_hidden_size": 0},
    {"decoder_hidden_size": 7, "decoder_type": "mla"},
    {"decoder_num_convs": 0, "decoder_type": "mla"},
    *({"auxiliary_loss_weight": value} for value in (-1, NAN, float("inf"), "1")),
    {"decoder_align_corners": 1},
    {"use_auxiliary_head": "yes"},
]


@pytest.mark.parametrize(
    ("config_class", "fields"),
    [
        *((VitEncoderConfig, fields) for fields in OF_ALL),
        *((SegmenterConfig, fields) for fields in OF_ALL + OF_SEGMENTER),
        *((SetrConfig, fields) for fields in OF_ALL + OF_SETR),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value),
)
def test_an_impossible_configuration_is_a_value_error_that_names_the_field(config_class, fields, tmp_path) -> None:
    name = next(iter(fields))
    with pytest.raises(ValueError, match=name):
        config_class(**fields)
    if (
        config_class is not VitEncoderConfig
    ):  # the same from a file; JSON knows neither NaN nor infinity, but Python's does
        (tmp_path / "config.json").write_text(json.dumps({"model_type": config_class.model_type, **fields}))
        with pytest.raises(ValueError, match=name):
            config_class.from_pretrained(tmp_path)


# ---- label sets ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ignore_index": "255"}, "ignore_index must be an integer"),
        ({"ignore_index": None}, "ignore_index must be an integer"),
        ({"reduce_labels": "no"}, "color_masks and reduce_labels true or false"),
        ({"reduce_labels": 1}, "color_masks and reduce_labels true or false"),
        ({"label_id_to_train_id": [1]}, "expected an object as label_id_to_train_id"),
        ({"label_id_to_train_id": {}}, "must map integers"),
        ({"label_id_to_train_id": {"a": 0}}, "label_id_to_train_id|invalid literal"),
        ({"label_id_to_train_id": {"1": "0"}}, "must map integers"),
        ({"label_id_to_train_id": {str(10**12): 0}}, "must map integers of 32 bits"),
        ({"name": 5}, "name and title must be strings"),
        ({"title": ["x"]}, "name and title must be strings"),
        ({"labels": [{"id": 0, "name": "a", "color": 5}]}, r"expected \[r, g, b\] as the color of each label"),
        ({"labels": [{"id": 0, "name": "a", "color": ["1", 2, 3]}]}, "must be 3 integers"),
        ({"labels": [{"id": 0, "name": {}, "color": [1, 2, 3]}]}, "only strings"),
    ],
)
def test_a_label_set_with_a_strange_field_is_refused_by_file_and_field(changes, message, tmp_path) -> None:
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({"labels": [{"id": 0, "name": "a", "color": [1, 2, 3]}], **changes}))
    with pytest.raises(ValueError, match=rf"labels\.json.*{message}"):
        load_label_set(path)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000, b"", b"5" * 5000, b'{"labels": 5}'])
def test_a_label_set_that_is_no_json_is_named(content, tmp_path) -> None:
    (tmp_path / "labels.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"labels\.json: expected"):
        load_label_set(tmp_path / "labels.json")


def test_ids_far_apart_need_no_table_of_all_between_them() -> None:
    mask = np.array([[0, 10**9], [5, -7]])
    expected = [[1, 2], [255, 3]]
    assert map_labels(mask, {0: 1, 10**9: 2, -7: 3}).tolist() == expected
    assert map_labels(mask[:0], {0: 1, 10**9: 2}).shape == (0, 2)


# ---- datasets ----


def write_pairs(folder: Path, sizes: dict[str, tuple[int, int]], value: int = 0) -> None:
    for name, (height, width) in sizes.items():
        for kind, picture in {
            "images": np.zeros((height, width, 3), np.uint8),
            "masks": np.full((height, width), value, np.uint8),
        }.items():
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(folder / kind / f"{name}.png")


def test_an_empty_split_is_refused_with_what_was_expected(tmp_path) -> None:
    for folder in ("images/train", "masks/train"):
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(ValueError, match="expected train-.*parquet, metadata.jsonl, images"):
        load_segmentation_datasets(str(tmp_path), splits=["train"])
    write_pairs(tmp_path / "train", {"a": (4, 5)})
    with pytest.raises(ValueError, match=r"has no split \['validation'\], only \['train'\].*validation_fraction"):
        load_segmentation_datasets(str(tmp_path))


def test_images_of_mixed_sizes_and_masks_of_one_class_are_fine(tmp_path) -> None:
    write_pairs(tmp_path, {"a": (40, 50), "b": (7, 90), "c": (1, 1)}, value=3)
    dataset = load_segmentation_datasets(str(tmp_path), splits=["train"])["train"]
    report = check_masks(dataset, 8, show_progress=False)
    report.raise_if_impossible()
    assert report.pixels_per_class.tolist() == [0, 0, 0, 40 * 50 + 7 * 90 + 1, 0, 0, 0, 0]
    model = SegmenterForSemanticSegmentation(tiny_scenes_config()).eval()
    predictor = Predictor(model, SegmenterImageProcessor(**FIELDS), load_label_set("scenes"))
    results = evaluate_segmentation(predictor, dataset, show_progress=False)
    assert results["num_images"] == 3


def test_a_label_set_of_another_data_set_is_refused(tmp_path) -> None:
    write_pairs(tmp_path, {"a": (40, 50)}, value=7)
    dataset = load_segmentation_datasets(str(tmp_path), splits=["train"])["train"]
    with pytest.raises(ValueError, match="expected 0 to 1 and 255"):
        check_masks(dataset, 2, label_set_from_names(["a", "b"]), show_progress=False).raise_if_impossible()


# ---- command lines ----


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model and a picture."""
    SegmenterForSemanticSegmentation(tiny_scenes_config()).save_pretrained(tmp_path / "model")
    SegmenterImageProcessor(**FIELDS).save_pretrained(tmp_path / "model")
    Image.fromarray(COLOR).save(tmp_path / "a.png")
    (tmp_path / "file").write_text("not a folder")
    return tmp_path


PREDICT = "--model_name_or_path {0}/model --images {0}/a.png --output_dir {0}/out"
CONVERT = "--checkpoint_path {0}/model/model.safetensors --output_dir {0}/out"


@pytest.mark.parametrize(
    ("script", "line", "code", "message"),
    [
        ("predict", PREDICT + " --xyz 3", 2, "error: unknown option --xyz; see --help"),
        ("predict", PREDICT + " --windw_batch_size 3", 2, "--windw_batch_size, did you mean --window_batch_size?"),
        ("predict", PREDICT + " --bf16 yes no", 2, "unexpected 'no'"),
        ("predict", PREDICT + " --window_batch_size", 2, "expected one argument"),
        ("predict", PREDICT + " --window_batch_size x", 2, "invalid int value: 'x'"),
        ("predict", PREDICT + " --scales a", 2, "invalid float value: 'a'"),
        ("predict", "--images {0}/a.png", 2, "required: --model_name_or_path"),
        ("predict", PREDICT + " --window_batch_size 0", 1, "window_batch_size"),
        ("predict", PREDICT + " --scales -1", 1, "scales"),
        ("predict", PREDICT + " --label_set nothing", 1, "expected a label set"),
        ("predict", PREDICT + " --max_image_pixels 9", 1, "56 x 40 pixels are more than 9"),
        ("predict", PREDICT.replace("a.png", "b.png"), 1, "no image there"),
        ("predict", PREDICT.replace("/out", "/file/out"), 1, "file"),
        ("predict", PREDICT.replace("/model ", "/file "), 1, "file"),
        ("convert_checkpoint", CONVERT + " --no_such_option", 2, "error: unknown option --no_such_option; see --help"),
        ("convert_checkpoint", "--checkpoint_path", 2, "expected one argument"),
        ("convert_checkpoint", "--output_dir {0}/out", 1, "not neither"),
        ("convert_checkpoint", CONVERT + " --model x", 1, "not both"),
        ("convert_checkpoint", CONVERT.replace("/out", "/model"), 1, "holds the checkpoint itself"),
        ("convert_checkpoint", CONVERT.replace("/out", "/file"), 1, "file"),
        ("convert_checkpoint", CONVERT, 1, "expected the keys of"),
        ("convert_checkpoint", CONVERT + " --image_size x", 2, "invalid int value: 'x'"),
    ],
)
def test_a_wrong_command_line_ends_in_a_message_and_writes_nothing(
    script, line, code, message, folder, monkeypatch, capsys
) -> None:
    path = Path(__file__).parents[2] / "scripts" / f"{script}.py"
    monkeypatch.setattr(sys, "argv", [str(path), *line.format(folder).split()])
    before = {entry: entry.stat().st_mtime_ns for entry in folder.rglob("*")}
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])  # as Python does for a script, which takes it off
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().err
    if code == 1:  # Python prints what is no number, and ends with 1
        printed = caught.value.code
        assert printed.startswith("error: ")
    else:
        assert caught.value.code == code
    assert message in printed
    assert {entry: entry.stat().st_mtime_ns for entry in folder.rglob("*")} == before


# ---- advice ----


def options_of(subcommand: str, capsys) -> set[str]:
    with pytest.raises(SystemExit):
        main([subcommand, "--help"])
    return set(re.findall(r"--(\w+)", capsys.readouterr().out))


def advised(error: pytest.ExceptionInfo) -> set[str]:
    return set(re.findall(r"`(\w+)[`=]", str(error.value)))


@pytest.mark.parametrize("values", [(7,), (8,), (77,), (78, 79), (300,), (255,), (1, 255), (0, 12)])
@pytest.mark.parametrize("num_labels", [2, 7])
def test_advice_about_masks_names_options_of_training(values, num_labels, capsys) -> None:
    mask = np.resize(np.array(values, np.uint16), (40, 56))
    mask = mask if max(values) > 255 else mask.astype(np.uint8)
    report = check_masks(
        [row(Image.fromarray(COLOR), Image.fromarray(mask))], num_labels, ignore_index=254, show_progress=False
    )
    with pytest.raises(ValueError, match="give|set") as error:
        report.raise_if_impossible()
    assert advised(error) <= options_of("train", capsys)
    assert "num_labels=" not in str(error.value) or "give a `label_set` of as many, or none and" in str(error.value)


def test_advice_about_references_names_options_of_evaluation(capsys) -> None:
    with pytest.raises(ValueError, match="references must lie in") as error:
        confusion_matrix(np.zeros((2, 3), int), np.full((2, 3), 9), num_labels=5)
    assert advised(error) == {"ignore_index"} <= options_of("evaluate", capsys)
    assert "num_labels" not in str(error.value)


def test_advice_about_a_missing_split_names_options_of_all_that_load_one(tmp_path, capsys) -> None:
    write_pairs(tmp_path / "train", {"a": (4, 5)})
    with pytest.raises(ValueError, match="has no split") as error:
        load_split(str(tmp_path), "validation")
    for subcommand in ("train", "evaluate", "predict", "publish"):
        assert advised(error) == {"validation_fraction"} <= options_of(subcommand, capsys)
