"""What `pip install segmenter-hf` brings is enough to load, predict, train, evaluate and publish.

The tests run in an environment that has the requirements of setup.cfg, theirs, and nothing else: links to these packages in a
folder of their own, which is all that the other interpreter sees.
"""

import configparser
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from .tiny_models import save_tiny_scenes_model
from .versions import needs_auto_classes


ROOT = Path(__file__).parents[1]
PROGRAM = """
import importlib, pkgutil, sys
from pathlib import Path

folder = Path(sys.argv[1])
assert importlib.util.find_spec("pytest") is None and importlib.util.find_spec("gradio") is None
import segmenter_hf

lacking = {}
for module in pkgutil.walk_packages(segmenter_hf.__path__, "segmenter_hf."):
    if not module.name.endswith(("__main__", ".run_onnx")):  # which stands alone, beside an exported model
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            lacking[module.name] = str(error)
for name, message in lacking.items():
    assert name.split(".")[1] in ("demo", "export") and "pip install" in message, (name, message)

from segmenter_hf import Predictor
assert Predictor.from_pretrained(folder)(folder / "image.png").class_map.shape == (20, 30)
print("works without", *lacking)
"""


def plain_distributions() -> set[str]:
    """The distributions that a plain install brings."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    found: set[str] = set()
    waiting = [(Requirement(line), "") for line in setup["options"]["install_requires"].split("\n") if line]
    seen = set()
    while waiting:
        requirement, extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (requirement.marker is not None and not requirement.marker.evaluate({"extra": extra})) or (
            (name, extra) in seen
        ):
            continue
        seen.add((name, extra))
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a requirement of another system
        found.add(name)
        for line in distribution.requires or []:
            waiting += [(Requirement(line), part) for part in ("", *requirement.extras)]
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """A folder of links to the packages of a plain install."""
    folder = tmp_path_factory.mktemp("environment")
    for name in plain_distributions():
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            source, link = Path(distribution.locate_file(top)), folder / top
            if source.exists() and not link.exists():
                link.symlink_to(source)
    (folder / "segmenter_hf").symlink_to(ROOT / "src" / "segmenter_hf")
    return folder


@needs_auto_classes
def test_the_core_works_without_any_extra(environment, tmp_path) -> None:
    save_tiny_scenes_model(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    finished = subprocess.run(
        [sys.executable, "-S", "-c", PROGRAM, tmp_path],
        env={**os.environ, "PYTHONPATH": str(environment)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    assert "segmenter_hf.demo.app" in finished.stdout
