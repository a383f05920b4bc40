"""A saved directory works as Hub code where the package is not installed, and runs nothing without being trusted."""

import os
import subprocess
import sys

import numpy as np
import torch
from PIL import Image

from segmenter_hf import SegmenterConfig, SegmenterForSemanticSegmentation, SegmenterImageProcessor


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
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, pipeline

directory = sys.argv[1]
try:
    AutoModelForSemanticSegmentation.from_pretrained(directory, trust_remote_code=False)
    raise SystemExit("code that was not trusted has been loaded")
except ValueError as error:
    assert "trust_remote_code" in str(error), error

model = AutoModelForSemanticSegmentation.from_pretrained(directory, trust_remote_code=True).eval()
image = Image.open(directory + "/picture.png")
scores = {}
for backend in ("torchvision", "pil"):
    processor = AutoImageProcessor.from_pretrained(directory, backend=backend, trust_remote_code=True)
    assert processor.backend == backend
    with torch.no_grad():
        outputs = model(**processor(image))
    (result,) = processor.post_process_semantic_segmentation(outputs, return_segmentation_scores=True)
    scores[backend] = result.segmentation_scores.numpy()
parts = pipeline("image-segmentation", model=directory, trust_remote_code=True)(image)
assert {part["mask"].size for part in parts} == {image.size}
model.save_pretrained(directory + "/again")
processor.save_pretrained(directory + "/again")
again = AutoModelForSemanticSegmentation.from_pretrained(directory + "/again", trust_remote_code=True)
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
np.savez(directory + "/scores.npz", **scores)
"""


def test_a_saved_directory_works_without_the_package(tmp_path) -> None:
    config = SegmenterConfig(
        hidden_size=16, num_attention_heads=2, intermediate_size=32, num_hidden_layers=1, image_size=32, patch_size=8
    )
    model = SegmenterForSemanticSegmentation(config).eval()
    processor = SegmenterImageProcessor(size={"shortest_edge": 40}, window_size=32, window_stride=16, patch_size=8)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (45, 60, 3), dtype=np.uint8))
    image.save(tmp_path / "picture.png")
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), str(tmp_path)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    with torch.no_grad():
        outputs = model(**processor(image))
    (expected,) = processor.post_process_semantic_segmentation(outputs, return_segmentation_scores=True)
    with np.load(tmp_path / "scores.npz") as scores:
        for backend in ("torchvision", "pil"):
            assert np.array_equal(scores[backend], expected.segmentation_scores.numpy())
