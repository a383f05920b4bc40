"""Exported models give the logits and label maps of the model, in each dtype, and run where torch is not.

The slow test is `test_an_export_gives_the_logits_of_the_model_at_other_sizes`: six exports of some seconds each.
"""

import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnxruntime import InferenceSession
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor

from segmenter_hf import (
    SegmenterConfig,
    SegmenterForSemanticSegmentation,
    SegmenterImageProcessor,
    SetrConfig,
    SetrForSemanticSegmentation,
)
from segmenter_hf.data.label_sets import load_label_set
from segmenter_hf.export import onnx as onnx_export
from segmenter_hf.export import run_onnx
from segmenter_hf.export.dtypes import DTYPE_SUFFIXES
from segmenter_hf.export.onnx import OnnxExport, compare_with_model, export_onnx, write_onnx
from segmenter_hf.inference.model_loading import load_model
from segmenter_hf.models.image_io import image_to_array, read_channels

from ..models.test_encoder_families import FAMILIES, make_model
from ..versions import needs_export


pytestmark = needs_export
ROOT = Path(__file__).parents[2]
SCENES = load_label_set("scenes")
# Weights as large as these make logits that differ from place to place.
FIELDS = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": [32, 40],
    "patch_size": 8,
    "initializer_range": 0.3,
    "id2label": SCENES.id2label,
    "label2id": SCENES.label2id,
}
SETR = {"num_hidden_layers": 2, "out_indices": [0, 1], "decoder_hidden_size": 8, **FIELDS}
CONFIGS = {
    "linear": SegmenterConfig(
        num_hidden_layers=1,
        decoder_type="linear",
        use_distillation_token=True,
        position_embedding_interpolation="bicubic",
        **FIELDS,
    ),
    "mask_transformer": SegmenterConfig(num_hidden_layers=1, **FIELDS),
    "naive": SetrConfig(decoder_type="naive", **SETR),
    "pup": SetrConfig(decoder_type="pup", decoder_num_convs=2, **SETR),
    "mla": SetrConfig(decoder_type="mla", decoder_align_corners=True, **SETR),
}
CONFIGS["one_class"] = SegmenterConfig(
    num_hidden_layers=1, **FIELDS | {"id2label": {0: "road"}, "label2id": {"road": 0}}
)
WINDOWS = {"window_size": 32, "window_stride": 24, "patch_size": 8, "image_std": [0.2, 0.25, 0.3]}

DTYPES = {"mask_transformer": list(DTYPE_SUFFIXES), "one_class": ["fp32", "fp16", "q8"]}

# What follows runs as if torch and transformers were not installed.
WITHOUT_TORCH = """
import runpy
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "segmenter_hf"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocked())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def save_model(name: str, directory: Path, seed: int = 0) -> Path:
    """A small model with its image processor, in a directory."""
    torch.manual_seed(seed)
    config = CONFIGS[name]
    model_class = SetrForSemanticSegmentation if isinstance(config, SetrConfig) else SegmenterForSemanticSegmentation
    model = model_class(config).eval()
    if config.num_labels == 1:  # logits on both sides of 0
        with torch.no_grad():
            model.decode_head.mask_norm.bias -= model(torch.randn(4, 3, 32, 40)).logits.mean()
    model.save_pretrained(directory)
    SegmenterImageProcessor(size={"shortest_edge": 44, "longest_edge": 90}, **WINDOWS).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Callable[[str], tuple[Path, OnnxExport]]:
    """The model of a name and its export, each made once."""
    folder = tmp_path_factory.mktemp("onnx")

    @cache
    def export(name: str) -> tuple[Path, OnnxExport]:
        checkpoint = save_model(name, folder / name)
        blocks = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
        Image.fromarray(blocks.repeat(10, axis=0).repeat(10, axis=1)).save(folder / "blocks.png")
        dtypes, images = DTYPES.get(name, ["fp32"]), folder / "blocks.png"
        return checkpoint, export_onnx(checkpoint, folder / f"{name}-onnx", dtypes=dtypes, calibration_images=images)

    return export


@pytest.mark.parametrize("name", CONFIGS)
def test_an_export_gives_the_logits_of_the_model_at_other_sizes(name, exported) -> None:
    checkpoint, export = exported(name)
    model, _, _ = load_model(checkpoint, device="cpu")
    session = InferenceSession(export.directory / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    for shape in ((1, 3, 32, 48), (2, 3, 45, 19), (3, 3, 7, 96)):
        assert shape not in export.differences
        pixel_values = torch.randn(shape)
        with torch.no_grad():
            expected = model(pixel_values=pixel_values).logits.numpy()
        (logits,) = session.run(None, {"pixel_values": pixel_values.numpy()})
        assert np.ptp(expected) > 0.1
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_a_directory_holds_what_belongs_to_the_model_and_no_paths(exported) -> None:
    checkpoint, export = exported("linear")
    assert {path.relative_to(export.directory).as_posix() for path in export.directory.rglob("*")} == {
        "config.json",
        "label_set.json",
        "onnx",
        "onnx/model.onnx",
        "preprocessor_config.json",
        "run_onnx.py",
    }
    for auto_class in (AutoConfig, AutoImageProcessor):
        kept, original = (auto_class.from_pretrained(directory) for directory in (export.directory, checkpoint))
        fields = onnx_export.fields_of(kept)
        if auto_class is AutoConfig:
            assert fields.pop("exported_precisions") == {"onnxruntime": ["float32"]}
        assert fields == onnx_export.fields_of(original)
    assert load_label_set(export.directory / "label_set.json").labels == SCENES.labels
    assert str(ROOT).encode() not in (export.directory / "onnx" / "model.onnx").read_bytes()
    model = onnx.load(export.directory / "onnx" / "model.onnx")
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": export.opset}


def test_each_dtype_has_the_name_that_transformers_js_looks_for(exported) -> None:
    _, export = exported("mask_transformer")
    names = ["", "_bnb4", "_fp16", "_int8", "_q4", "_q4f16", "_quantized", "_static", "_uint8"]
    assert sorted(path.name for path in (export.directory / "onnx").iterdir()) == [f"model{n}.onnx" for n in names]


def test_8_and_16_bits_are_smaller_and_agree(exported) -> None:
    _, export = exported("mask_transformer")
    operators = {
        dtype: {node.op_type for node in onnx.load(export.directory / "onnx" / f"model{suffix}.onnx").graph.node}
        for dtype, suffix in DTYPE_SUFFIXES.items()
    }
    assert {dtype for dtype, names in operators.items() if "MatMulInteger" in names} == {"q8", "int8", "uint8"}
    assert {dtype for dtype, names in operators.items() if "MatMulNBits" in names} == {"q4", "q4f16"}
    weights = onnx.load(export.directory / "onnx" / "model_fp16.onnx").graph.initializer
    assert onnx.TensorProto.FLOAT not in {weight.data_type for weight in weights}
    assert list(export.agreements) == list(DTYPE_SUFFIXES)
    assert export.agreements["fp32"] >= 0.999
    assert export.agreements["fp16"] > 0.99 and export.agreements["q8"] > 0.9
    assert export.agreements["q4"] > 0.5


def test_every_dtype_takes_and_gives_float32_at_any_size(exported) -> None:
    _, export = exported("mask_transformer")
    pixel_values = np.random.default_rng(0).normal(size=(2, 3, 45, 19)).astype(np.float32)
    for suffix in DTYPE_SUFFIXES.values():
        session = InferenceSession(
            export.directory / "onnx" / f"model{suffix}.onnx", providers=["CPUExecutionProvider"]
        )
        (logits,) = session.run(["logits"], {"pixel_values": pixel_values})
        assert logits.dtype == np.float32 and logits.shape == (2, SCENES.num_labels, 6, 3)


def test_dtypes_without_float32_leave_it_out(tmp_path) -> None:
    export = export_onnx(save_model("linear", tmp_path / "model"), tmp_path / "onnx", dtypes=["q8"])
    assert [path.name for path in (tmp_path / "onnx" / "onnx").iterdir()] == ["model_quantized.onnx"]
    assert list(export.agreements) == ["q8"]


@pytest.mark.parametrize("dtypes", [["fp32", "q3"], [], "fp32"])
def test_unknown_dtypes_are_refused(dtypes, tmp_path) -> None:
    with pytest.raises(ValueError, match="`dtypes` must be a list of some of"):
        export_onnx(tmp_path / "model", tmp_path / "onnx", dtypes=dtypes)


def test_weights_that_one_file_cannot_hold_lie_where_transformers_js_looks(tmp_path, monkeypatch) -> None:
    checkpoint = save_model("linear", tmp_path / "model")
    save_as_torch_does = torch.onnx.ONNXProgram.save
    monkeypatch.setattr(
        torch.onnx.ONNXProgram, "save", lambda program, path: save_as_torch_does(program, path, external_data=True)
    )
    monkeypatch.setattr("segmenter_hf.export.dtypes.MAX_PROTOBUF_BYTES", 1)
    export_onnx(checkpoint, tmp_path / "onnx", dtypes=["fp32", "fp16"])
    names = ["model.onnx", "model.onnx_data", "model_fp16.onnx", "model_fp16.onnx_data"]
    assert sorted(path.name for path in (tmp_path / "onnx" / "onnx").iterdir()) == names
    config = json.loads((tmp_path / "onnx" / "config.json").read_text())
    split = {"model.onnx": 1, "model_fp16.onnx": 1}
    assert config["transformers.js_config"] == {"use_external_data_format": split}


@pytest.mark.parametrize("name", ["mask_transformer", "one_class"])
@pytest.mark.parametrize("size", [(151, 83), (80, 200), (23, 31)])
def test_the_example_gives_the_map_of_the_image_processor_without_torch(name, size, exported, tmp_path) -> None:
    checkpoint, export = exported(name)
    model, processor, labels = load_model(checkpoint, device="cpu")
    coarse = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    image.save(tmp_path / "image.png")
    command = [sys.executable, "-c", WITHOUT_TORCH, export.directory / "run_onnx.py"]
    command += [tmp_path / "image.png", tmp_path / "labels.png"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert printed.returncode == 0, printed.stderr

    with torch.no_grad():
        outputs = model(**processor(image))
    (expected,) = processor.post_process_semantic_segmentation(outputs)
    with Image.open(tmp_path / "labels.png") as label_map:
        assert label_map.size == size
        colors = np.array(label_map.getpalette()).reshape(-1, 3)
        assert np.array_equal(colors[: labels.num_labels], labels.palette)
        found = np.array(label_map)
    assert len(expected.unique()) > min(labels.num_labels - 1, 2)
    assert (found == expected.numpy()).mean() > 0.999
    most = labels.labels[expected.flatten().bincount().argmax()]
    assert f"labels.png: {most} " in printed.stdout


@pytest.mark.parametrize("channels", [1, 3])
def test_the_example_reads_palette_images_as_the_image_processor(channels, tmp_path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 5, (9, 12), dtype=np.uint8))
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 90, 90, 90, 255, 255, 255])
    image.save(tmp_path / "palette.png")
    assert Image.open(tmp_path / "palette.png").mode == "P"
    found = run_onnx.read_image(tmp_path / "palette.png", {"image_mean": [0.5] * channels})
    opened = read_channels(tmp_path / "palette.png", channels)
    expected = image_to_array(opened, channels == 3, None, channels)
    assert np.array_equal(np.moveaxis(found, -1, 0), expected)


@pytest.mark.parametrize(("dtype", "value_range"), [("uint16", [0, 4095]), ("uint16", None), ("int32", None)])
def test_the_example_reads_deep_tiff_as_the_image_processor(dtype, value_range, tmp_path) -> None:
    tifffile = pytest.importorskip("tifffile")
    values = np.random.default_rng(0).integers(0, 60000, (9, 12, 3)).astype(dtype)
    tifffile.imwrite(tmp_path / "deep.tif", values, photometric="rgb")
    found = run_onnx.read_image(tmp_path / "deep.tif", {"image_mean": 0.5, "value_range": value_range})
    expected = image_to_array(read_channels(tmp_path / "deep.tif", 3), True, None, 3, value_range)
    np.testing.assert_allclose(np.moveaxis(found, -1, 0), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "fields", "message"),
    [
        (np.full((9, 12), np.nan), {}, "holds NaN or infinite"),
        (np.full((9, 12), 0.5), {}, "floats from 0 to 1"),
        (
            np.full((9, 12), 7, np.uint8),
            {"value_range": [0, 4095]},
            "has 8 bits, and the model takes values up to 4095",
        ),
    ],
)
def test_the_example_refuses_pixels_as_the_image_processor(values, fields, message, tmp_path) -> None:
    processor = SegmenterImageProcessor(**fields)
    np.save(tmp_path / "image.npy", values)
    with pytest.raises(SystemExit, match=message):
        run_onnx.read_image(tmp_path / "image.npy", processor.to_dict())
    with pytest.raises(ValueError, match=r"NaN|floats from 0 to 1|8-bit"):
        processor(tmp_path / "image.npy")


@pytest.mark.parametrize("values", [np.eye(9) > 0, np.full((9, 12), 200, ">u2")], ids=["booleans", "big-endian"])
def test_the_example_reads_arrays_as_the_image_processor(values, tmp_path) -> None:
    np.save(tmp_path / "image.npy", values)
    found = run_onnx.read_image(tmp_path / "image.npy", SegmenterImageProcessor().to_dict())
    expected = image_to_array(read_channels(tmp_path / "image.npy"), True, None, 3)
    assert np.array_equal(np.moveaxis(found, -1, 0), expected) and found.dtype == np.uint8


@pytest.mark.parametrize("channels", [1, 3])
def test_the_example_reads_pages_as_the_image_processor(channels, tmp_path) -> None:
    tifffile = pytest.importorskip("tifffile")
    pages = np.random.default_rng(0).integers(256, size=(3, 9, 12), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "pages.tif", pages, photometric="minisblack")
    found = run_onnx.read_image(tmp_path / "pages.tif", {"image_mean": [0.5] * channels})
    expected = image_to_array(read_channels(tmp_path / "pages.tif", channels), channels == 3, None, channels)
    assert np.array_equal(np.moveaxis(found, -1, 0), expected) and len(expected) == channels


def test_the_example_refuses_what_it_does_not_do() -> None:
    settings = SegmenterImageProcessor(do_resize_to_window=True).to_dict()
    with pytest.raises(SystemExit, match="aspect ratio"):
        run_onnx.prepare(np.zeros((9, 12, 3), np.uint8), settings)


def test_the_example_runs_the_model_it_is_given(exported, tmp_path) -> None:
    _, export = exported("one_class")
    Image.effect_noise((50, 40), 90).save(tmp_path / "image.png")
    command = [sys.executable, export.directory / "run_onnx.py", tmp_path / "image.png", tmp_path / "labels.png"]
    printed = subprocess.run(
        [*command, "--model", tmp_path / "missing.onnx"], capture_output=True, text=True, timeout=300
    )
    assert printed.returncode == 1 and "missing.onnx" in printed.stderr
    subprocess.run([*command, "--model", export.directory / "onnx" / "model_quantized.onnx"], check=True, timeout=300)
    assert Image.open(tmp_path / "labels.png").size == (50, 40)


def test_a_label_map_that_differs_is_found(exported, tmp_path) -> None:
    for name in ("mask_transformer", "one_class"):
        checkpoint, export = exported(name)
        model, processor, _ = load_model(checkpoint, device="cpu")
        path = export.directory / "onnx" / "model.onnx"
        assert onnx_export.compare_label_maps(model, processor, path) >= 0.999
        other, _, _ = load_model(save_model(name, tmp_path / name, seed=1), device="cpu")
        assert onnx_export.compare_label_maps(other, processor, path) < 0.9


def test_a_label_map_that_differs_leaves_nothing(exported, tmp_path, monkeypatch) -> None:
    checkpoint, export = exported("one_class")
    written = export.directory / "onnx" / "model.onnx"
    monkeypatch.setattr(onnx_export, "write_onnx", lambda model, path, opset: shutil.copyfile(written, path) and 20)
    monkeypatch.setattr(onnx_export, "compare_label_maps", lambda *args: 0.99)
    with pytest.raises(ValueError, match=r"the class of the model at 99.00% of the pixels, expected 99.9%"):
        export_onnx(checkpoint, tmp_path / "onnx")
    assert not list(tmp_path.iterdir())


def test_a_dtype_without_the_range_of_the_model_is_refused(tmp_path, monkeypatch) -> None:
    checkpoint = save_model("linear", tmp_path / "model")
    model, processor, _ = load_model(checkpoint, device="cpu")
    with torch.no_grad():
        model.decode_head.classifier.weight.mul_(1e6)
    model.save_pretrained(checkpoint)
    with pytest.raises(ValueError, match=r"model_fp16.onnx gives NaN or infinite logits"):
        export_onnx(checkpoint, tmp_path / "onnx", dtypes=["fp32", "fp16"])
    assert not (tmp_path / "onnx").exists()


def test_the_example_says_what_it_cannot_read(exported, tmp_path) -> None:
    _, export = exported("mask_transformer")
    (tmp_path / "text.jpg").write_text("no image")
    for name in ("text.jpg", "nowhere.jpg"):
        command = [sys.executable, export.directory / "run_onnx.py", tmp_path / name, tmp_path / "labels.png"]
        printed = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert printed.returncode == 1 and printed.stderr.startswith(f"error: {tmp_path / name} cannot be read: ")


def test_a_model_that_differs_leaves_nothing(exported, tmp_path, monkeypatch) -> None:
    _, export = exported("mask_transformer")
    other = save_model("mask_transformer", tmp_path / "model", seed=1)

    def write_another_model(model, path, opset) -> int:
        shutil.copyfile(export.directory / "onnx" / "model.onnx", path)
        return export.opset

    monkeypatch.setattr(onnx_export, "write_onnx", write_another_model)
    with pytest.raises(ValueError, match="differs from the model by"):
        export_onnx(other, tmp_path / "onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_logits_of_another_shape_are_refused(exported, tmp_path) -> None:
    _, export = exported("linear")
    setr, _, _ = load_model(save_model("naive", tmp_path / "model"), device="cpu")
    with pytest.raises(ValueError, match=r"gives \(1, 8, 4, 5\), not \(1, 8, 16, 20\)"):
        onnx_export.compare_with_model(setr, export.directory / "onnx" / "model.onnx")


def test_an_opset_that_torch_cannot_write_is_refused(exported, tmp_path) -> None:
    checkpoint, _ = exported("linear")
    with pytest.raises(ValueError, match="torch cannot export this model for opset 11"):
        export_onnx(checkpoint, tmp_path / "onnx", opset=11)
    assert not list(tmp_path.iterdir())


def test_only_an_earlier_export_is_replaced_and_only_when_told_to(exported, tmp_path) -> None:
    checkpoint, export = exported("linear")
    directory = tmp_path / "onnx"
    shutil.copytree(export.directory, directory)
    with pytest.raises(FileExistsError, match="`overwrite`"):
        export_onnx(checkpoint, directory)
    for name in ("model.safetensors", "onnx/notes.txt"):
        (directory / name).touch()
        with pytest.raises(FileExistsError, match=f"{Path(name).name}.* would be lost"):
            export_onnx(checkpoint, directory, overwrite=True)
        (directory / name).unlink()
    with pytest.raises(FileExistsError):
        export_onnx(checkpoint, directory / "config.json", overwrite=True)
    assert (directory / "onnx" / "model.onnx").is_file()


def test_missing_packages_are_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install segmenter-hf\[onnx\]"):
        export_onnx(tmp_path / "model", tmp_path / "onnx")


def test_the_script_replaces_an_export_and_prints_the_largest_difference(
    exported, tmp_path, monkeypatch, capsys
) -> None:
    checkpoint, export = exported("linear")
    directory = tmp_path / "onnx"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "segmenter"}')

    def write_again(model, path, opset) -> int:
        assert opset == export.opset
        shutil.copyfile(export.directory / "onnx" / "model.onnx", path)
        return opset

    monkeypatch.setattr(onnx_export, "write_onnx", write_again)
    words = f"--model_name_or_path {checkpoint} --output_dir {directory} --opset {export.opset} --overwrite --dtypes fp32 uint8".split()
    monkeypatch.setattr(sys, "argv", ["export_onnx.py", *words])
    runpy.run_path(str(ROOT / "scripts" / "export_onnx.py"))["main"]()
    printed = capsys.readouterr().out
    assert f"Largest difference: {max(export.differences.values()):.2g}\n" in printed
    assert "onnx/model_uint8.onnx" in printed and "uint8: " in printed
    assert json.loads((directory / "config.json").read_text())["model_type"] == "segmenter"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_encoder_of_every_family_is_exported_with_open_sizes(family, tmp_path) -> None:
    model = make_model(family, "linear" if "dinov2" in family else "mask_transformer")
    write_onnx(model, tmp_path / "model.onnx")
    differences = compare_with_model(model, tmp_path / "model.onnx")
    assert len(differences) == 3
