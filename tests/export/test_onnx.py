"""Exported models give the logits of the model at sizes they have not seen, and run where torch is not.

The slow test is `test_an_export_gives_the_logits_of_the_model_at_other_sizes`: five exports of some seconds each.
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
from segmenter_hf.export.onnx import OnnxExport, export_onnx
from segmenter_hf.inference.predictor import load_model


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
WINDOWS = {"window_size": 32, "window_stride": 24, "patch_size": 8, "image_std": [0.2, 0.25, 0.3]}

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
    model_class(config).save_pretrained(directory)
    SegmenterImageProcessor(size={"shortest_edge": 44, "longest_edge": 90}, **WINDOWS).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Callable[[str], tuple[Path, OnnxExport]]:
    """The model of a name and its export, each made once."""
    folder = tmp_path_factory.mktemp("onnx")

    @cache
    def export(name: str) -> tuple[Path, OnnxExport]:
        checkpoint = save_model(name, folder / name)
        return checkpoint, export_onnx(checkpoint, folder / f"{name}-onnx")

    return export


@pytest.mark.parametrize("name", CONFIGS)
def test_an_export_gives_the_logits_of_the_model_at_other_sizes(name, exported) -> None:
    checkpoint, export = exported(name)
    model, _, _ = load_model(checkpoint, device="cpu")
    session = InferenceSession(export.directory / "model.onnx", providers=["CPUExecutionProvider"])
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
    assert {path.name for path in export.directory.iterdir()} == {
        "config.json",
        "label_set.json",
        "model.onnx",
        "preprocessor_config.json",
        "run_onnx.py",
    }
    for auto_class in (AutoConfig, AutoImageProcessor):
        kept, original = (auto_class.from_pretrained(directory) for directory in (export.directory, checkpoint))
        assert onnx_export.fields_of(kept) == onnx_export.fields_of(original)
    assert load_label_set(export.directory / "label_set.json").labels == SCENES.labels
    assert str(ROOT).encode() not in (export.directory / "model.onnx").read_bytes()
    model = onnx.load(export.directory / "model.onnx")
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": export.opset}


@pytest.mark.parametrize("size", [(151, 83), (80, 200), (23, 31)])
def test_the_example_gives_the_map_of_the_image_processor_without_torch(size, exported, tmp_path) -> None:
    checkpoint, export = exported("mask_transformer")
    coarse = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    picture.save(tmp_path / "picture.png")
    command = [sys.executable, "-c", WITHOUT_TORCH, export.directory / "run_onnx.py"]
    command += [tmp_path / "picture.png", tmp_path / "labels.png"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert printed.returncode == 0, printed.stderr

    model, processor, _ = load_model(checkpoint, device="cpu")
    with torch.no_grad():
        outputs = model(**processor(picture))
    (expected,) = processor.post_process_semantic_segmentation(outputs)
    with Image.open(tmp_path / "labels.png") as labels:
        assert labels.size == size
        colors = np.array(labels.getpalette()).reshape(-1, 3)
        assert np.array_equal(colors[: SCENES.num_labels], SCENES.palette)
        found = np.array(labels)
    assert len(expected.unique()) > 2
    assert (found == expected.numpy()).mean() > 0.999
    most = SCENES.labels[expected.flatten().bincount().argmax()]
    assert f"labels.png: {most} " in printed.stdout


def test_the_example_says_what_it_cannot_read(exported, tmp_path) -> None:
    _, export = exported("mask_transformer")
    (tmp_path / "text.jpg").write_text("no picture")
    for name in ("text.jpg", "nowhere.jpg"):
        command = [sys.executable, export.directory / "run_onnx.py", tmp_path / name, tmp_path / "labels.png"]
        printed = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert printed.returncode == 1 and printed.stderr.startswith(f"error: {tmp_path / name} cannot be read: ")


def test_a_model_that_differs_leaves_nothing(exported, tmp_path, monkeypatch) -> None:
    _, export = exported("mask_transformer")
    other = save_model("mask_transformer", tmp_path / "model", seed=1)

    def write_another_model(model, path, opset) -> int:
        shutil.copyfile(export.directory / "model.onnx", path)
        return export.opset

    monkeypatch.setattr(onnx_export, "write_onnx", write_another_model)
    with pytest.raises(ValueError, match="differs from the model by"):
        export_onnx(other, tmp_path / "onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_logits_of_another_shape_are_refused(exported, tmp_path) -> None:
    _, export = exported("linear")
    setr, _, _ = load_model(save_model("naive", tmp_path / "model"), device="cpu")
    with pytest.raises(ValueError, match=r"gives \(1, 8, 4, 5\), not \(1, 8, 16, 20\)"):
        onnx_export.compare_with_model(setr, export.directory / "model.onnx")


def test_an_opset_that_torch_cannot_write_is_refused(exported, tmp_path) -> None:
    checkpoint, _ = exported("linear")
    with pytest.raises(ValueError, match="torch cannot export this model for opset 11"):
        export_onnx(checkpoint, tmp_path / "onnx", opset=11)
    assert not list(tmp_path.iterdir())


def test_only_an_earlier_export_is_replaced_and_only_when_told_to(exported, tmp_path) -> None:
    checkpoint, export = exported("linear")
    directory = tmp_path / "onnx"
    shutil.copytree(export.directory, directory)
    with pytest.raises(FileExistsError, match="--overwrite"):
        export_onnx(checkpoint, directory)
    (directory / "model.safetensors").touch()
    with pytest.raises(FileExistsError, match="model.safetensors, which would be lost"):
        export_onnx(checkpoint, directory, overwrite=True)
    with pytest.raises(FileExistsError):
        export_onnx(checkpoint, directory / "config.json", overwrite=True)
    assert (directory / "model.onnx").is_file()


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
        shutil.copyfile(export.directory / "model.onnx", path)
        return opset

    monkeypatch.setattr(onnx_export, "write_onnx", write_again)
    words = f"--model_name_or_path {checkpoint} --output_dir {directory} --opset {export.opset} --overwrite".split()
    monkeypatch.setattr(sys, "argv", ["export_onnx.py", *words])
    runpy.run_path(str(ROOT / "scripts" / "export_onnx.py"))["main"]()
    printed = capsys.readouterr().out
    assert f"Largest difference: {max(export.differences.values()):.2g}\n" in printed
    assert json.loads((directory / "config.json").read_text())["model_type"] == "segmenter"
