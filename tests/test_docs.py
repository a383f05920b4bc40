"""What README and docs show runs: Python blocks as they stand, commands by their flags, configurations by making them."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import segmenter_hf
from segmenter_hf import SegmenterForSemanticSegmentation, SegmenterImageProcessor

from .script_help import help_of
from .tiny_models import tiny_scenes_config


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path, language: str) -> list[str]:
    """The fenced code blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The `python scripts/...` commands of a text, in words, with continued lines joined."""
    joined = re.sub(r"\\\s*\n\s*", " ", text)
    found = re.findall(r"^(?:\$\(PY\)|\s*(?:\S+/)?python) (scripts/\w+\.py .*)$", joined, flags=re.MULTILINE)
    return [shlex.split(command.partition("#")[0]) for command in found]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A directory with a model where the pages expect it, and a picture."""
    folder = tmp_path_factory.mktemp("docs")
    SegmenterForSemanticSegmentation(tiny_scenes_config()).save_pretrained(folder / "outputs" / "demo" / "model")
    processor = SegmenterImageProcessor(size={"shortest_edge": 40}, window_size=32, window_stride=16, patch_size=8)
    processor.save_pretrained(folder / "outputs" / "demo" / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "street.jpg")
    return folder


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path, "python")], ids=lambda path: path.name)
def test_python_blocks_run_as_they_stand(path, workplace, monkeypatch) -> None:
    monkeypatch.chdir(workplace)
    for block in blocks(path, "python"):
        exec(compile(block, str(path), "exec"), {"__name__": "__main__"})


def test_commands_have_the_flags_that_pages_and_scripts_show() -> None:
    texts = [block for path in PAGES for block in blocks(path, "shell")]
    texts += [path.read_text(encoding="utf-8").split('"""')[1] for path in sorted((ROOT / "scripts").glob("*.py"))]
    texts += [(ROOT / "Makefile").read_text(encoding="utf-8").replace("\t", "")]
    shown = [words for text in texts for words in commands(text)]
    scripts = sorted({words[0] for words in shown})
    assert len(shown) > 10 and {"scripts/train.py", "scripts/convert_checkpoint.py"} <= set(scripts)
    known = {script: help_of(ROOT / script) for script in scripts}
    for words in shown:
        for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
            assert re.search(rf"{re.escape(flag)}\b", known[words[0]]), f"{words[0]} has no {flag}"


def test_configurations_of_the_papers_can_be_made() -> None:
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    shown = re.findall(r"`((?:Segmenter|Setr)Config\(.*?\))`", text)
    assert len(shown) > 10
    for expression in shown:
        name, _, arguments = expression.partition("(")
        config = eval(f"{name}({arguments}", {name: getattr(segmenter_hf, name)})
        assert config.hidden_size % config.num_attention_heads == 0
