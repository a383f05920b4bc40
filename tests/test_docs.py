"""What README and docs show runs: Python blocks as they stand, commands by their flags, configurations by making them."""

import json
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from PIL import Image
from safetensors.torch import load_file

import segmenter_hf
from segmenter_hf.cli.main import SUBCOMMANDS
from segmenter_hf.data.label_sets import load_label_set
from segmenter_hf.data.synthetic_scenes import save_scenes
from segmenter_hf.inference.runtimes import openvino_has_bfloat16

from .script_help import help_of, run_command, run_script
from .tiny_models import save_tiny_scenes_model
from .versions import TORCH


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path, language: str) -> list[str]:
    """The fenced code blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The commands of a text: the console command and what Python runs, in words from the name on, continued lines joined."""
    joined = re.sub(r"\\\s*\n\s*", " ", text)
    console = r"(?:\$\(VENV\)/bin/|\s*)segmenter-hf |\s*(?:accelerate launch|torchrun) .*?-m segmenter_hf "
    found = [f"segmenter-hf {words}" for words in re.findall(rf"^(?:{console})(.*)$", joined, re.MULTILINE)]
    found += re.findall(r"^\s*python .*?\b(outputs/demo/onnx/\w+\.py.*)$", joined, re.MULTILINE)
    return [shlex.split(command.partition("#")[0]) for command in found]


@pytest.fixture
def workplace(tmp_path) -> Path:
    """A directory with what the pages expect: models, checkpoints, photographs with masks, class names."""
    for name in ("demo/model", "my_model", "segmenter-b"):
        save_tiny_scenes_model(tmp_path / "outputs" / name)
    save_scenes(tmp_path / "my_photos" / "train", 2, (40, 56))
    save_scenes(tmp_path / "my_photos" / "validation", 2, (40, 56), seed=1)
    save_scenes(tmp_path / "photos", 1, (40, 56), seed=2)
    shutil.copytree(tmp_path / "photos" / "images", tmp_path / "my_photos" / "new")
    (tmp_path / "my_labels.json").write_text(json.dumps(load_label_set("scenes").labels))
    picture = Image.open(next((tmp_path / "photos" / "images").iterdir()))
    for name in ("street.jpg", "aerial.tif"):
        picture.save(tmp_path / name)
    fixtures = ROOT / "tests" / "fixtures"
    shutil.copytree(fixtures / "rstrudel" / "seg_vit_mask", tmp_path / "seg_base_mask")
    weights = load_file(fixtures / "backbones" / "timm_hub_s" / "model.safetensors")
    torch.save(weights, tmp_path / "jx_vit_large_p16_384-b3be5167.pth")
    return tmp_path


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path, "python")], ids=lambda path: path.name)
def test_python_blocks_run_as_they_stand(path, workplace, monkeypatch) -> None:
    monkeypatch.chdir(workplace)
    names = {"__name__": "__main__"}
    for block in blocks(path, "python"):
        if '"org/' in block:  # stands for a model of the Hub
            continue
        if "import peft" in block or "from peft" in block:
            pytest.importorskip("peft", reason="the block needs the extra `peft`")
        exec(compile(block, str(path), "exec"), names)


# Commands that a test cannot run, by what they hold.
NOT_RUN = {
    "--model ": "downloads a checkpoint",
    "org/": "needs a model or dataset of the Hub",
    "timm/": "needs a model of the Hub",
    "facebook/": "needs a model of the Hub",
    "dinov2_vitb14": "needs weights that were downloaded",
    "ADEChallengeData2016": "needs a dataset that is not free",
    "--dataset_name camvid": "needs a dataset that is not free",
    "--recipe": "needs a dataset of the Hub, or minutes",
    "segmenter-hf demo": "serves a page until it is stopped; see test_app.py",
    "benchmarks/benchmark.py": "takes minutes; see test_benchmark.py",
    "tests/fuzz/fuzz.py": "takes minutes",
    "NAME": "stands for several commands",
}
SHORT = (
    "--max_steps 1 --use_cpu --image_size 40 --crop_size 32 --eval_strategy no --save_strategy no --disable_tqdm true"
)
SHORT += " --load_best_model_at_end false"
FRESH = ("convert", "train")  # the page may start from what they make further down


@pytest.mark.parametrize(
    "path", [path for path in PAGES if commands("".join(blocks(path, "shell")))], ids=lambda p: p.name
)
def test_commands_run_as_they_stand(path, workplace, monkeypatch) -> None:
    monkeypatch.chdir(workplace)
    for program, *argv in (words for block in blocks(path, "shell") for words in commands(block)):
        line = " ".join([program, *argv, ""])
        if any(part in line for part in NOT_RUN if (argv[0], part) != ("estimate", "--recipe")):
            continue
        if argv[0] == "publish" and "--dry_run" not in argv:  # which only writes a directory
            continue
        if program != "segmenter-hf":
            run_script(Path(program), argv)
            continue
        if "openvino" in argv:
            pytest.importorskip("openvino", reason="the page needs the extra `openvino`")
        if argv[0] == "export" and Version("2.10") > TORCH:
            pytest.skip("the export with open sizes needs torch 2.10")
        if "bfloat16" in argv and argv[0] != "export" and not openvino_has_bfloat16():
            argv[argv.index("bfloat16")] = "float32"
        if argv[0] in FRESH and "--output_dir" in argv:
            shutil.rmtree(argv[argv.index("--output_dir") + 1], ignore_errors=True)
        run_command(argv + (SHORT.split() if argv[0] == "train" else []))


def test_commands_have_the_options_that_pages_and_help_show() -> None:
    texts = [block for path in PAGES for block in blocks(path, "shell")]
    texts += [help_of(name) for name in SUBCOMMANDS]
    texts += [(ROOT / "Makefile").read_text(encoding="utf-8").replace("\t", "")]
    shown = [words[1:] for text in texts for words in commands(text) if words[0] == "segmenter-hf"]
    assert len(shown) > 40 and {subcommand for subcommand, *_ in shown} == set(SUBCOMMANDS)
    for subcommand, *argv in shown:
        for option in (word.partition("=")[0] for word in argv if word.startswith("--")):
            assert re.search(rf"{re.escape(option)}\b", help_of(subcommand)), f"{subcommand} has no {option}"


def test_files_of_the_clone_that_pages_name_are_there() -> None:
    pattern = re.compile(r"`((?:tests|scripts|benchmarks|notebooks)/[\w./-]+\.\w+)`")
    named = {name: page.name for page in PAGES for name in pattern.findall(page.read_text(encoding="utf-8"))}
    assert len(named) > 10
    assert {name: page for name, page in named.items() if not (ROOT / name).is_file()} == {}
    tests = {path.name for path in (ROOT / "tests").rglob("*.py")}
    named = {name: page.name for page in PAGES for name in re.findall(r"`(test_\w+\.py)`", page.read_text("utf-8"))}
    assert {name: page for name, page in named.items() if name not in tests} == {}


def test_configurations_of_the_papers_can_be_made() -> None:
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    shown = re.findall(r"`((?:Segmenter|Setr)Config\(.*?\))`", text)
    assert len(shown) > 10
    for expression in shown:
        name, _, arguments = expression.partition("(")
        config = eval(f"{name}({arguments}", {name: getattr(segmenter_hf, name)})
        assert config.hidden_size % config.num_attention_heads == 0


def test_pages_of_the_site_load_nothing_from_elsewhere() -> None:
    """Material's script asks the API of GitHub about the element that it finds by this attribute, in 404.html too."""
    shown = '<a href="https://github.com/segmenter-hf" class="md-source" data-md-component="source">'
    hooks = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
    for hook in (hooks["on_post_page"](output=shown), hooks["on_post_template"](output_content=shown)):
        assert hook == shown.replace(' data-md-component="source"', "")
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "font: false" in settings
    (polyfill,) = re.findall(r"^    - (\S+iframe-worker\S*)$", settings, re.MULTILINE)
    assert (ROOT / "docs" / polyfill).is_file()


def test_a_site_that_loads_something_from_elsewhere_is_not_built() -> None:
    hooks = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
    own = '<a href="https://e.org"></a><img src=demo.png><link rel=canonical href="https://e.org/"><script src="a/b.js"></script>'
    assert hooks["loads_from_elsewhere"](own) == []
    for tag in (
        "<script src=https://e.org/a></script>",
        '<img alt="a" src="//e.org/a">',
        '<link href="https://e.org/a" rel="stylesheet">',
    ):
        (found,) = hooks["loads_from_elsewhere"](own + tag)
        assert found.endswith("//e.org/a")


def test_types_of_docstrings_are_shown_without_marks() -> None:
    plain = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["on_page_content"]
    page = '<div class="doc object"><code>`int` or [`~a.Name`], *optional*</code> as [<code>Name</code>] has <code>x[0]</code></div>'
    shown = (
        '<div class="doc object"><code>int or a.Name, optional</code> as <code>Name</code> has <code>x[0]</code></div>'
    )
    assert plain(html=page) == shown
    assert plain(html="[<code>Name</code>]") == "[<code>Name</code>]"
