"""Where torchvision is not installed, everything works on the processor's PIL backend and gives the same results."""

import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, pipeline

import segmenter_hf
from segmenter_hf import SegmenterImageProcessor, SegmenterImageProcessorPil

from .tiny_models import save_tiny_scenes_model
from .versions import READS_IMAGES_ALONE, needs_auto_classes


PROGRAM = """
import sys

sys.modules["torchvision"] = None  # not found, and an ImportError where it is imported all the same

import importlib
from pathlib import Path

from transformers.utils import is_torchvision_available

from tests.test_without_torchvision import package_modules, results_of

assert not is_torchvision_available()
for name in package_modules():
    importlib.import_module(name)
results_of(Path(sys.argv[1]), Path(sys.argv[2]))
assert not [name for name in sys.modules if name.startswith("torchvision.")]
"""
ROOT = Path(__file__).parents[1]


def package_modules() -> list[str]:
    """The names of all modules of the package."""
    return [module.name for module in pkgutil.walk_packages(segmenter_hf.__path__, "segmenter_hf.")]


def results_of(directory: Path, file: Path) -> None:
    """Write what the Auto classes and the pipeline make of the picture in a model's directory."""
    model = AutoModelForSemanticSegmentation.from_pretrained(directory)
    processor = AutoImageProcessor.from_pretrained(directory)
    image = PIL.Image.open(directory / "picture.png")
    mask = np.asarray(image.convert("L")) % 4
    inputs = processor(image, segmentation_maps=mask, scales=[0.75, 1.0], do_flip=True)
    with torch.no_grad():
        outputs = model(inputs["pixel_values"], window_offsets=inputs["window_offsets"])
    (result,) = processor.post_process_semantic_segmentation(outputs, return_segmentation_scores=True)
    segment = pipeline("image-segmentation", model=str(directory))
    parts = segment(image)
    np.savez(
        file,
        processors=[type(processor).__name__, type(segment.image_processor).__name__],
        scores=result.segmentation_scores,
        part_labels=[part["label"] for part in parts],
        part_masks=[np.asarray(part["mask"]) for part in parts],
        **inputs,
    )


@pytest.mark.skipif(READS_IMAGES_ALONE, reason="transformers from 5.18 on reads images without torchvision")
def test_earlier_versions_of_transformers_ask_for_torchvision() -> None:
    code = "import sys; sys.modules['torchvision'] = None; import segmenter_hf.models"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "reads images only with torchvision, which is not installed: `pip install torchvision`" in run.stderr


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A model, its processor with the backend left open, and a picture of several windows."""
    folder = tmp_path_factory.mktemp("model")
    save_tiny_scenes_model(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (45, 70, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(folder / "picture.png")
    return folder


@needs_auto_classes
def test_results_without_torchvision_are_those_with_it(directory, tmp_path) -> None:
    results_of(directory, tmp_path / "with.npz")
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, directory, tmp_path / "without.npz"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    with np.load(tmp_path / "with.npz") as expected, np.load(tmp_path / "without.npz") as got:
        assert set(expected["processors"]) == {SegmenterImageProcessor.__name__}
        assert set(got["processors"]) == {SegmenterImageProcessorPil.__name__}
        assert len(expected["window_offsets"]) > 4 and len(expected["part_labels"]) > 1
        for name in set(expected.files) - {"processors"}:
            assert np.array_equal(got[name], expected[name]), name
