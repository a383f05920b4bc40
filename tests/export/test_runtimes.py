"""Exported models predict, evaluate and are shown in other runtimes with the protocol and the maps of the model.

Exports take some seconds each; each is made once.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from unittest.mock import Mock

import datasets
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image

from segmenter_hf import Predictor, SegmenterConfig, SegmenterForSemanticSegmentation, SegmenterImageProcessor
from segmenter_hf.cli.export import main as export_main
from segmenter_hf.cli.predict import main as predict_main
from segmenter_hf.evaluation.evaluate import evaluate_segmentation
from segmenter_hf.export.openvino import export_model
from segmenter_hf.export.quantization import calibration_windows, check_calibration
from segmenter_hf.inference import runtimes
from segmenter_hf.inference.attention import patch_attention
from segmenter_hf.inference.dataset_files import OutputLayout
from segmenter_hf.inference.datasets import describe_run
from segmenter_hf.inference.files import predict_files
from segmenter_hf.inference.protocol import InferenceProtocol
from segmenter_hf.inference.runtimes import RUNTIME_FILES, openvino_has_bfloat16

from ..versions import needs_export
from .test_onnx import FIELDS, WINDOWS, save_model


RUNTIMES = ("onnxruntime", "openvino")
QUANTIZED = {"mask_transformer"}


def draw_image(seed: int, height: int = 60, width: int = 90, channels: int = 3) -> np.ndarray:
    """Blocks of 10 pixels in random colors."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 10, width // 10, channels))
    return np.kron(blocks, np.ones((10, 10, 1))).astype(np.uint8)


def save_five_channels(directory: Path) -> Path:
    """A small model of 5 channels."""
    torch.manual_seed(0)
    SegmenterForSemanticSegmentation(SegmenterConfig(num_hidden_layers=1, num_channels=5, **FIELDS)).save_pretrained(
        directory
    )
    values = {**WINDOWS, "image_mean": [0.5] * 5, "image_std": [0.2] * 5}
    SegmenterImageProcessor(size={"shortest_edge": 44, "longest_edge": 90}, **values).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(3):
        Image.fromarray(draw_image(seed)).save(folder / f"{seed}.png")
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory, photos) -> Callable[[str, str], tuple[Path, Path]]:
    """The directories of a model of a name and of its export for a runtime, each made once."""
    folder = tmp_path_factory.mktemp("exports")

    @cache
    def checkpoint(name: str) -> Path:
        return save_five_channels(folder / name) if name == "five_channels" else save_model(name, folder / name)

    @cache
    def export(name: str, runtime: str) -> tuple[Path, Path]:
        if runtime == "onnxruntime" and needs_export.args[0]:
            pytest.skip(needs_export.kwargs["reason"])
        if runtime == "openvino":
            for package in ("openvino", "nncf"):
                pytest.importorskip(package, reason="exports for OpenVINO need the extra `openvino`")
        precisions = list(RUNTIME_FILES[runtime]) if name in QUANTIZED else ["float32"]
        directory = folder / f"{name}-{runtime}"
        export_model(checkpoint(name), directory, runtime=runtime, precisions=precisions, calibration_images=photos)
        return checkpoint(name), directory

    return export


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", ["mask_transformer", "pup", "one_class", "five_channels"])
def test_a_runtime_gives_the_logits_and_maps_of_torch(name, runtime, exported) -> None:
    checkpoint, directory = exported(name, runtime)
    expected, found = Predictor.from_pretrained(checkpoint), Predictor.from_pretrained(directory, runtime=runtime)
    channels = expected.processor.num_channels
    windows = torch.randn(3, channels, 32, 32)
    reference = expected.compute_logits(windows)
    assert float(reference.std()) > 0.01
    torch.testing.assert_close(found.compute_logits(windows), reference, rtol=0, atol=1e-4)
    images = [draw_image(seed, 60 + 20 * seed, 90, channels) for seed in range(3)]
    maps = [(expected(image).class_map, found(image).class_map) for image in images]
    assert all(float((one == two).float().mean()) >= 0.999 for one, two in maps)
    assert found.label_set == expected.label_set and (found.runtime, found.precision) == (runtime, "float32")
    assert not list(directory.rglob("*.safetensors"))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_runtime_has_the_whole_protocol(runtime, exported) -> None:
    checkpoint, directory = exported("mask_transformer", runtime)
    protocol = InferenceProtocol(scales=(0.75, 1.0, 1.5), flip=True, window_batch_size=3)
    expected = Predictor.from_pretrained(checkpoint, protocol)
    found = Predictor.from_pretrained(directory, protocol, runtime=runtime)
    items = [(seed, Image.fromarray(draw_image(seed, 60 + 30 * seed))) for seed in range(2)]
    pairs = zip(expected.stream(items, return_scores=True), found.stream(items, return_scores=True))
    for one, two in pairs:
        assert one.key == two.key and one.class_map.shape == two.class_map.shape
        torch.testing.assert_close(two.scores, one.scores, rtol=0, atol=1e-4)
        assert float((one.class_map == two.class_map).float().mean()) >= 0.999


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_each_precision_agrees_and_is_told(runtime, exported) -> None:
    checkpoint, directory = exported("mask_transformer", runtime)
    fields = json.loads((directory / "config.json").read_text())
    assert fields["exported_precisions"] == {runtime: list(RUNTIME_FILES[runtime])}
    image = draw_image(7)
    expected = Predictor.from_pretrained(checkpoint)
    reference, windows = expected(image, return_scores=True).scores, torch.randn(2, 3, 32, 32)
    exact = expected.compute_logits(windows)
    differences = {}
    for precision in RUNTIME_FILES[runtime]:
        if precision == "bfloat16" and not openvino_has_bfloat16():
            continue
        predictor = Predictor.from_pretrained(directory, runtime=runtime, precision=precision)
        assert predictor.precision == precision
        differences[precision] = float((predictor.compute_logits(windows) - exact).abs().max())
        # sums of 8 bits that overflow, as on CPUs without VNNI, make this 0.023 and more
        assert float((predictor(image, return_scores=True).scores - reference).abs().mean()) < 0.015, precision
    assert differences["float32"] == min(differences.values()) < 1e-4
    assert all(difference > 1e-4 for name, difference in differences.items() if name != "float32"), differences


def test_8_bits_have_a_scale_for_each_channel_and_leave_attention_alone(exported) -> None:
    _, directory = exported("mask_transformer", "onnxruntime")
    graph = onnx.load(directory / RUNTIME_FILES["onnxruntime"]["int8"]).graph
    sizes = {weight.name: list(weight.dims) for weight in graph.initializer}
    scales = [sizes[node.input[1]] for node in graph.node if node.op_type == "DequantizeLinear"]
    assert [size for size in scales if size and size[0] > 1]
    quantized = {output for node in graph.node if node.op_type == "DequantizeLinear" for output in node.output}
    products = [node for node in graph.node if node.op_type == "MatMul"]
    assert any(set(node.input) <= quantized for node in products)
    assert any(not set(node.input) & quantized for node in products)


def test_threads_of_onnxruntime_sleep_while_they_wait(exported, monkeypatch) -> None:
    _, directory = exported("mask_transformer", "onnxruntime")
    session = Mock(wraps=onnxruntime.InferenceSession)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    Predictor.from_pretrained(directory, runtime="onnxruntime")
    assert session.call_args.args[1].get_session_config_entry("session.intra_op.allow_spinning") == "0"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_evaluation_and_predicted_datasets_say_the_runtime(runtime, exported) -> None:
    checkpoint, directory = exported("mask_transformer", runtime)
    expected, found = Predictor.from_pretrained(checkpoint), Predictor.from_pretrained(directory, runtime=runtime)
    masks = [np.random.default_rng(seed).integers(0, expected.label_set.num_labels, (60, 90)) for seed in range(3)]
    rows = {
        "image": [Image.fromarray(draw_image(seed)) for seed in range(3)],
        "annotation": [Image.fromarray(mask.astype(np.uint8)) for mask in masks],
    }
    dataset = datasets.Dataset.from_dict(rows, datasets.Features(image=datasets.Image(), annotation=datasets.Image()))
    scores = [evaluate_segmentation(predictor, dataset, show_progress=False) for predictor in (expected, found)]
    assert scores[0]["mean_iou"] == pytest.approx(scores[1]["mean_iou"], abs=1e-4)
    assert scores[0]["protocol"] == scores[1]["protocol"]
    layout = OutputLayout("train", "png", 10, False)
    described = describe_run(found, layout, {})
    assert described["runtime"] == runtime and described["dtype"] == "float32"
    assert "runtime" not in describe_run(expected, layout, {})


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_page_shows_classes_and_no_attention(runtime, exported) -> None:
    pytest.importorskip("gradio", reason="the page needs the extra `demo`")
    from segmenter_hf.demo.app import describe_attention, describe_segmentation

    _, directory = exported("mask_transformer", runtime)
    predictor = Predictor.from_pretrained(directory, runtime=runtime)
    picture = Image.fromarray(draw_image(0))
    result = describe_segmentation(predictor, picture)
    assert result["classes"] and result["encoder_layers"] == result["decoder_layers"] == 0
    with pytest.raises(Exception, match="shows classes only"):
        describe_attention(predictor, picture, 1, 1)
    with pytest.raises(ValueError, match="gives logits and no attention"):
        patch_attention(predictor, picture, (1, 1))


def test_commands_export_and_predict(exported, photos, tmp_path, capsys) -> None:
    checkpoint, directory = exported("mask_transformer", "openvino")
    trained = shutil.copytree(checkpoint, tmp_path / "trained")
    (trained / "recipe.json").write_text('{"arguments": {"dataset_name": "photos"}}')
    export_main(
        ["--model_name_or_path", str(trained), "--output_dir", str(tmp_path / "export"), "--runtime", "openvino"]
        + ["--precision", "bfloat16"]
    )
    assert (tmp_path / "export" / "recipe.json").read_text() == (trained / "recipe.json").read_text()
    if openvino_has_bfloat16():
        assert re.search(r"bfloat16: \d+\.\d+% of the pixels", capsys.readouterr().out)
        assert Predictor.from_pretrained(tmp_path / "export", runtime="openvino").precision == "bfloat16"
    else:
        assert "bfloat16: " not in capsys.readouterr().out
        with pytest.raises(ValueError, match="This CPU has no bfloat16: give the precision 'float32'"):
            Predictor.from_pretrained(tmp_path / "export", runtime="openvino")
    for precision in ("float32", "int8"):
        predict_main(
            ["--model_name_or_path", str(directory), "--runtime", "openvino", "--precision", precision]
            + ["--images", str(photos / "0.png"), "--output_dir", str(tmp_path / precision)]
        )
        assert Image.open(tmp_path / precision / "0.png").size == (90, 60)


SIGNALLED = """
import os, signal, sys
from segmenter_hf import Predictor
from segmenter_hf.export.openvino import export_model

checkpoint, directory, images = sys.argv[1:]
predictors = [Predictor.from_pretrained(directory, runtime="openvino") for _ in range(2)]
export_model(checkpoint, directory + "_int8", runtime="openvino", precisions=["int8"], calibration_images=images)
while predictors:
    del predictors[0]
signal.signal(signal.SIGINT, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGINT)
"""


def test_signals_are_handled_after_models_were_dropped(exported, photos) -> None:
    """OpenVINO leaves a stack for signals that is freed where its cores go in the order in which they came."""
    paths = map(str, (*exported("mask_transformer", "openvino"), photos))
    run = subprocess.run([sys.executable, "-c", SIGNALLED, *paths], capture_output=True, text=True, check=False)
    assert run.returncode == 0 and run.stdout.endswith("handled\n"), run.stderr


def test_what_does_not_go_together_is_refused(exported, photos, tmp_path) -> None:
    checkpoint, directory = exported("mask_transformer", "onnxruntime")
    load = Predictor.from_pretrained
    for name in ("compile", "int8", "token_merging", "token_merging_threshold", "patch_size"):
        with pytest.raises(ValueError, match=rf"`{name}` is for the runtime 'torch' only"):
            load(directory, runtime="onnxruntime", **{name: True})
    with pytest.raises(ValueError, match="no attention"):
        predict_files(load(directory, runtime="onnxruntime"), [photos], tmp_path / "out", attention=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="`dtype` is for the runtime 'torch' only"):
        load(directory, runtime="onnxruntime", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="`precision` is for exported models"):
        load(checkpoint, precision="float32")
    with pytest.raises(ValueError, match="`runtime` must be 'torch' or 'onnxruntime' or 'openvino', got 'tensorrt'"):
        load(directory, runtime="tensorrt")
    with pytest.raises(ValueError, match="`device` must be 'cpu'"):
        load(directory, runtime="onnxruntime", device="cuda")
    with pytest.raises(ValueError, match="is not exported for openvino"):
        load(directory, runtime="openvino")
    with pytest.raises(ValueError, match="is not exported for onnxruntime"):
        load(checkpoint, runtime="onnxruntime")
    with pytest.raises(ValueError, match="`precision` must be 'float32' or .*, got 'bfloat16'"):
        load(directory, runtime="onnxruntime", precision="bfloat16")
    with pytest.raises(
        ValueError, match="`precisions` must be a list of some of .* with onnxruntime, got .'bfloat16'"
    ):
        export_model(checkpoint, tmp_path / "a", precisions=["bfloat16"])
    for runtime in RUNTIMES:
        if importlib.util.find_spec(runtime) is not None:
            with pytest.raises(ValueError, match="`calibration_images`"):
                export_model(checkpoint, tmp_path / "a", runtime=runtime, precisions=["int8"])
    with pytest.raises(FileNotFoundError, match="nowhere: no image there"):
        calibration_windows(load(checkpoint).processor, tmp_path / "nowhere")
    assert not (tmp_path / "a").exists()


def test_calibration_sees_all_parts_of_images(exported, tmp_path, caplog) -> None:
    """Of many images one window each: corners alone would be sky."""
    half = np.zeros((60, 180, 3), np.uint8)
    half[:, 60:] = 255
    for index in range(64):
        Image.fromarray(half).save(tmp_path / f"{index}.png")
    (tmp_path / "photo.heic").touch()
    processor = Predictor.from_pretrained(exported("mask_transformer", "onnxruntime")[0]).processor
    windows = calibration_windows(processor, tmp_path)
    assert len(windows) == 64 and sum(window.max() > 0 for window in windows) > 20
    assert all(map(np.array_equal, windows, calibration_windows(processor, tmp_path)))
    assert "1 images are left out" in caplog.text
    check_calibration(False, tmp_path)
    assert "`calibration_images` are not used" in caplog.text


def test_a_device_in_a_file_is_not_used(copied) -> None:
    directory = copied("onnxruntime")
    path = directory / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"device": "cuda"}))
    assert Predictor.from_pretrained(directory, runtime="onnxruntime").processor.device is None


@pytest.fixture
def copied(exported, tmp_path) -> Callable[[str], Path]:
    def copy(runtime: str) -> Path:
        return Path(shutil.copytree(exported("linear", runtime)[1], tmp_path / runtime))

    return copy


def test_weights_of_other_files_are_not_read(copied, tmp_path) -> None:
    directory = copied("onnxruntime")
    path = directory / "onnx" / "model.onnx"
    (tmp_path / "secret").write_bytes(bytes(range(256)) * 64)
    original = onnx.load(path)
    for location in ("../../secret", str(tmp_path / "secret"), "other_data"):
        model = onnx.ModelProto()
        model.CopyFrom(original)
        weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        size = len(weight.raw_data)
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=location)
        weight.external_data.add(key="length", value=str(size))
        path.write_bytes(model.SerializeToString())
        with pytest.raises(ValueError, match=r"weights may lie in model.onnx_data only"):
            Predictor.from_pretrained(directory, runtime="onnxruntime")


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_files_that_lead_out_of_the_directory_are_not_read(runtime, copied, tmp_path) -> None:
    directory = copied(runtime)
    path = directory / RUNTIME_FILES[runtime]["float32"]
    for inside in {path, path.with_suffix(".bin") if runtime == "openvino" else path.with_name("model.onnx_data")}:
        outside = tmp_path / f"outside-{inside.name}"
        shutil.move(inside, outside) if inside.exists() else outside.write_bytes(b"0")
        inside.symlink_to(outside)
        with pytest.raises(ValueError, match="leads out of"):
            Predictor.from_pretrained(directory, runtime=runtime)
        inside.unlink()
        shutil.copyfile(outside, inside)


def test_operators_that_may_read_files_are_refused(copied) -> None:
    directory = copied("onnxruntime")
    path = directory / "onnx" / "model.onnx"
    original = onnx.load(path)
    context = helper.make_node(
        "EPContext", ["pixel_values"], ["x"], domain="com.microsoft", ep_cache_context="/etc/passwd"
    )
    branch = helper.make_graph([helper.make_node("Custom", [], ["y"], domain="evil")], "branch", [], [])
    condition = helper.make_node("If", ["c"], ["x"], then_branch=branch, else_branch=branch)
    for node, name in ((context, "com.microsoft.EPContext"), (condition, "evil.Custom")):
        model = onnx.ModelProto()
        model.CopyFrom(original)
        model.graph.node.append(node)
        path.write_bytes(model.SerializeToString())
        with pytest.raises(ValueError, match=rf"needs the operator {name}"):
            Predictor.from_pretrained(directory, runtime="onnxruntime")


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_files_that_are_too_large_or_damaged_are_refused(runtime, copied, monkeypatch) -> None:
    directory = copied(runtime)
    path = directory / RUNTIME_FILES[runtime]["float32"]
    with monkeypatch.context() as patch:
        patch.setattr(runtimes, "SPARE_BYTES", -(2**20))
        with pytest.raises(ValueError, match="expected at most"):
            Predictor.from_pretrained(directory, runtime=runtime)
    content = path.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"no network", b'<?xml version="1.0"?><!DOCTYPE net><net/>'):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=str(directory)):
            Predictor.from_pretrained(directory, runtime=runtime)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_network_of_another_model_is_refused(runtime, copied, exported) -> None:
    directory, other = copied(runtime), exported("five_channels", runtime)[1]
    folder = Path(RUNTIME_FILES[runtime]["float32"]).parent
    shutil.copytree(other / folder, directory / folder, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="of 3 channels, got"):
        Predictor.from_pretrained(directory, runtime=runtime)
    one_class = exported("one_class", runtime)[1]
    shutil.copytree(one_class / folder, directory / folder, dirs_exist_ok=True)
    predictor = Predictor.from_pretrained(directory, runtime=runtime)
    with pytest.raises(ValueError, match="does not belong to config.json"):
        predictor(draw_image(0))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_runtime_that_is_missing_is_named_with_its_extra(runtime, exported, monkeypatch) -> None:
    _, directory = exported("linear", runtime)
    extra = {"onnxruntime": "onnx", "openvino": "openvino"}[runtime]
    monkeypatch.setitem(__import__("sys").modules, runtime, None)
    with pytest.raises(ImportError, match=rf"pip install segmenter-hf\[{extra}\]"):
        Predictor.from_pretrained(directory, runtime=runtime)
