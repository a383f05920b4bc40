"""A saved directory works as Hub code where the package is not installed, and runs nothing without being trusted."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel

from segmenter_hf import (
    SegmenterConfig,
    SegmenterForSemanticSegmentation,
    SetrConfig,
    SetrForSemanticSegmentation,
)

from ..tiny_models import tiny_scenes_processor


# For each directory that is named: not trusted, both processor backends, the pipeline, and saved again.
PROGRAM = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "segmenter_hf":
            raise ImportError("the package is not installed here")

sys.meta_path.insert(0, Blocked())

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation, pipeline

for directory in sys.argv[1:]:
    try:
        AutoModelForSemanticSegmentation.from_pretrained(directory, trust_remote_code=False)
        raise SystemExit("code that was not trusted has been loaded")
    except ValueError as error:
        assert "trust_remote_code" in str(error), error

    model = AutoModelForSemanticSegmentation.from_pretrained(directory, trust_remote_code=True)
    image = Image.open(directory + "/picture.png")
    scores = {}
    for backend in ("torchvision", "pil"):
        processor = AutoImageProcessor.from_pretrained(directory, backend=backend, trust_remote_code=True)
        assert processor.backend == backend
        with torch.no_grad():
            outputs = model(**processor(image))
        (result,) = processor.post_process_semantic_segmentation(outputs, return_segmentation_scores=True)
        scores[backend] = result.segmentation_scores.numpy()
    segment = pipeline("image-segmentation", model=directory, trust_remote_code=True)
    parts = segment(image)
    assert {part["mask"].size for part in parts} == {image.size}
    batch = segment([image, image.rotate(90, expand=True), image], batch_size=2)
    assert [part["mask"].tobytes() for part in batch[2]] == [part["mask"].tobytes() for part in parts]
    encoder = AutoModel.from_pretrained(directory, trust_remote_code=True)
    assert type(encoder).__name__ in ("SegmenterModel", "SetrModel"), type(encoder)
    theirs = getattr(model, model.base_model_prefix).state_dict()
    assert encoder.state_dict().keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in encoder.state_dict().items())
    resized = AutoModelForSemanticSegmentation.from_pretrained(
        directory, trust_remote_code=True, patch_size=4, ignore_mismatched_sizes=True
    ).state_dict()
    expected = type(model).from_pretrained(directory, patch_size=4).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resized.items())
    model.save_pretrained(directory + "/again")
    processor.save_pretrained(directory + "/again")
    again = AutoModelForSemanticSegmentation.from_pretrained(directory + "/again", trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained(directory + "/again", trust_remote_code=True)
    with torch.no_grad():
        outputs = again(**processor(image))
    (result,) = processor.post_process_semantic_segmentation(outputs, return_segmentation_scores=True)
    np.savez(directory + "/scores.npz", again=result.segmentation_scores.numpy(), **scores)
"""

ENCODER = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32, "patch_size": 8}
MODELS = {
    "mask_transformer": (SegmenterForSemanticSegmentation, SegmenterConfig(num_hidden_layers=1, **ENCODER)),
    "dinov2_linear": (
        SegmenterForSemanticSegmentation,
        SegmenterConfig(
            num_hidden_layers=2,
            decoder_type="linear",
            decoder_norm="batch_norm",
            out_indices=[0, 1],
            layerscale_value=1.0,
            num_register_tokens=2,
            use_gated_mlp=True,
            **ENCODER,
        ),
    ),
    "dinov3_mask_transformer": (
        SegmenterForSemanticSegmentation,
        SegmenterConfig(num_hidden_layers=1, position_embedding_type="rotary", key_bias=False, **ENCODER),
    ),
    "pup": (SetrForSemanticSegmentation, SetrConfig(num_hidden_layers=4, decoder_hidden_size=8, **ENCODER)),
    "mla": (
        SetrForSemanticSegmentation,
        SetrConfig(decoder_type="mla", num_hidden_layers=4, decoder_hidden_size=8, **ENCODER),
    ),
}
PROCESSOR = tiny_scenes_processor()


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> dict[str, tuple[PreTrainedModel, Path]]:
    """The models and their directories, once the program ran on them in a process of its own."""
    folder = tmp_path_factory.mktemp("remote")
    torch.manual_seed(0)
    models = {}
    for name, (model_class, config) in MODELS.items():
        model, directory = model_class(config).eval(), folder / name
        model.save_pretrained(directory)
        PROCESSOR.save_pretrained(directory)
        image = np.random.default_rng(0).integers(0, 256, (45, 60, 3), dtype=np.uint8)
        Image.fromarray(image).save(directory / "picture.png")
        models[name] = (model, directory)
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, *(str(directory) for _, directory in models.values())],
        env={**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    return models


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_directory_gives_the_same_without_the_package(ran, name) -> None:
    model, directory = ran[name]
    with torch.no_grad():
        outputs = model(**PROCESSOR(Image.open(directory / "picture.png")))
    (expected,) = PROCESSOR.post_process_semantic_segmentation(outputs, return_segmentation_scores=True)
    with np.load(directory / "scores.npz") as scores:
        for way in ("torchvision", "pil", "again"):
            assert np.array_equal(scores[way], expected.segmentation_scores.numpy())


@pytest.mark.parametrize("name", MODELS)
def test_saving_again_keeps_the_directory_complete(ran, name) -> None:
    _, directory = ran[name]
    kept = {path.name for path in directory.iterdir() if path.is_file()} - {"picture.png", "scores.npz"}
    assert {path.name for path in (directory / "again").iterdir() if path.is_file()} == kept
