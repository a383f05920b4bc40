"""The notebooks run from top to bottom on small data, and are stored without outputs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from segmenter_hf.data.synthetic_scenes import save_scenes

from .tiny_models import save_tiny_scenes_model
from .versions import needs_export


nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COLAB = "https://colab.research.google.com/github/segmenter-hf/segmenter-hf/blob/main/notebooks"


def test_there_are_four_each_linked_from_the_readme_and_the_documentation() -> None:
    pages = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/notebooks.md")]
    assert len(NOTEBOOKS) == 4
    for path in NOTEBOOKS:
        assert all(f"{COLAB}/{path.name}" in page for page in [*pages, path.read_text(encoding="utf-8")])


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=needs_export) if "export" in path.name else path for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_a_notebook_runs(path, tmp_path, monkeypatch) -> None:
    save_tiny_scenes_model(tmp_path / "tiny")
    for split in ("train", "validation"):
        save_scenes(tmp_path / "labelled" / split, 2, (40, 56))
    program = tmp_path / "bin" / "segmenter-hf"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m segmenter_hf "$@"\n')
    program.chmod(0o755)
    settings = {
        "STEPS": "2",
        "MODEL": "tiny",
        "DATASET": "labelled",
        "ENCODER": str(ROOT / "tests" / "fixtures" / "backbones" / "timm_hub_s"),
        "PATH": os.pathsep.join([str(program.parent), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    command = [sys.executable, ROOT / "tests" / "run_notebook.py", path, tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
