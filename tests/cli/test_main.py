"""The console command, its subcommands' help, the scripts in front of them, and what importing the package loads."""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from PIL import Image

import segmenter_hf
from segmenter_hf.cli.main import SUBCOMMANDS, main
from segmenter_hf.hub.published_models import load_published_models
from segmenter_hf.inference.files import SAMPLE_IMAGE

from ..script_help import help_of, run_command
from ..tiny_models import save_tiny_scenes_model


ROOT = Path(__file__).parents[2]
NAMES = ["train", "evaluate", "predict", "convert", "publish", "export", "demo", "models", "estimate", "draw-scenes"]
REQUIRED = {
    "train": ["output_dir"],
    "evaluate": ["model_name_or_path", "output_dir"],
    "predict": ["model_name_or_path", "output_dir"],
    "publish": ["checkpoint_dir"],
    "export": ["model_name_or_path", "output_dir"],
    "estimate": ["recipe"],
    "draw-scenes": ["output_dir"],
}


def run_python(*argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **variables}
    return subprocess.run([sys.executable, *argv], env=environment, capture_output=True, text=True, timeout=300)


def test_the_subcommands_are_listed_without_importing_torch() -> None:
    code = """
import sys
from segmenter_hf.cli.main import main
try:
    main(["--help"])
finally:
    print("loaded:", *(name for name in ("torch", "transformers", "numpy") if name in sys.modules))
"""
    printed = run_python("-c", code).stdout
    assert list(SUBCOMMANDS) == NAMES
    assert re.findall(r"^  ([a-z][a-z-]+) {2,}\w", printed, re.MULTILINE) == NAMES
    assert printed.endswith("loaded:\n")


def test_the_module_is_the_console_command() -> None:
    run = run_python("-m", "segmenter_hf", "--version")
    assert (run.returncode, run.stdout) == (0, f"segmenter-hf {metadata.version('segmenter-hf')}\n")
    scripts = metadata.entry_points(group="console_scripts")
    text = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    assert "segmenter-hf = segmenter_hf.cli.main:main" in text or "segmenter-hf" in scripts.names


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "segmenter-hf --help"),
        (["trian"], "unknown subcommand 'trian', did you mean train?"),
        (["scripts"], "choose from train, evaluate"),
        (["--no_such_option"], "unrecognized arguments: --no_such_option"),
        (["train"], "give at least --output_dir DIR"),
        (["train", "--use_cpu"], "required: --output_dir\n"),
        (
            ["predict"],
            "required: --model_name_or_path, --output_dir. A model is a directory or a name on the Hub: `segmenter-hf models`",
        ),
        (["models", "seg"], "unexpected 'seg'"),
        (["estimate", "--recip"], "expected one argument"),
    ],
)
def test_a_command_line_that_lacks_something_shows_the_usage(argv, message, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    printed = capsys.readouterr()
    assert ended.value.code == 2 and not printed.out
    assert message in printed.err
    assert printed.err.startswith("usage: segmenter-hf") or argv[:1] == ["models"]


@pytest.mark.parametrize("name", NAMES)
def test_the_help_has_groups_a_description_and_an_example_and_says_what_is_required(name) -> None:
    text = help_of(name)
    assert text.startswith(f"usage: segmenter-hf {name} ")
    description, options = text.split("\n\n", 2)[1:]
    assert description[0].isupper() and description.endswith(".")
    assert re.search(rf"^    segmenter-hf {name}\b", options, re.MULTILINE)
    groups = re.findall(r"^([a-z ]+):$", options, re.MULTILINE)
    assert groups[0] == "options" and (len(groups) > 1 or name == "models")
    required = re.findall(r"^  --(\w+)(?:(?!^  -)[\s\S])*?\(required\)", options, re.MULTILINE)
    assert sorted(required) == REQUIRED.get(name, [])


def test_the_help_of_training_leaves_out_what_is_seldom_used() -> None:
    assert "--adam_beta1" in help_of("train") and "--fsdp" not in help_of("train")
    assert "--fsdp" in run_command(["train", "--help_all"])


def test_the_published_models_are_listed_with_how_to_get_them() -> None:
    printed = run_command(["models"])
    assert all(f"{name} " in printed for name in load_published_models())
    assert "segmenter-hf convert --model NAME" in printed
    assert printed.startswith(run_command(["convert", "--list"]))


@pytest.mark.parametrize(
    ("script", "safe_path"),
    [(path, "") for path in sorted((ROOT / "scripts").glob("*.py"))] + [(ROOT / "scripts" / "train.py", "1")],
    ids=lambda value: value.stem if isinstance(value, Path) else None,
)
def test_scripts_take_nothing_from_the_path_of_their_user(script, safe_path, tmp_path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, sys\n"
        "atexit.register(lambda: print('evaluate' in sys.modules and sys.modules['evaluate'].__file__, sys.path))\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT / "src")])
    run = run_python(str(script), "--help", PYTHONPATH=path, PYTHONSAFEPATH=safe_path)
    assert run.returncode == 0 and run.stdout.startswith("usage: ")
    left = run.stdout.splitlines()[-1]
    assert str(tmp_path) in left and str(ROOT / "scripts") not in left


def test_threads_wait_passively_unless_the_user_says_otherwise() -> None:
    code = "import segmenter_hf.cli, os, sys; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.stdout == "PASSIVE False\n"
    assert run_python("-c", code, OMP_WAIT_POLICY="ACTIVE").stdout == "ACTIVE False\n"


# Importing


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import segmenter_hf, sys; print([n for n in ('torch', 'transformers', 'numpy', 'PIL') if n in sys.modules])"
    )
    assert run_python("-c", code).stdout == "[]\n"


@pytest.mark.parametrize(
    "code",
    [
        "import segmenter_hf; from transformers import AutoConfig",
        "import segmenter_hf; from transformers import pipeline, AutoConfig",
        "import segmenter_hf; from transformers import PreTrainedModel; from transformers import AutoConfig",
        "import segmenter_hf; from transformers import Trainer, AutoConfig",
        "from transformers import AutoConfig; import segmenter_hf",
        "from segmenter_hf.models.modeling_setr import SetrModel; from transformers import AutoConfig",
        "from segmenter_hf.data.label_sets import load_label_set; from transformers import AutoConfig",
        "from segmenter_hf import *; from transformers import AutoConfig; MeanIoU",
    ],
)
def test_the_models_are_registered_whatever_is_imported_first(code) -> None:
    code += """
from transformers import AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
for family in ("segmenter", "setr"):
    config = AutoConfig.for_model(family, num_hidden_layers=1, hidden_size=8, num_attention_heads=1, intermediate_size=8)
    for auto_class in (AutoModel, AutoModelForSemanticSegmentation):
        assert type(config) in auto_class._model_mapping
    assert type(config) in IMAGE_PROCESSOR_MAPPING
print("registered")
"""
    run = run_python("-c", code)
    assert run.stdout == "registered\n", run.stderr


def test_the_public_names_are_what_type_checkers_see() -> None:
    text = Path(segmenter_hf.__file__).read_text(encoding="utf-8")
    checked = {
        name: module for module, name in re.findall(r"^    from \.(\S+) import \w+ as (\w+)$", text, re.MULTILINE)
    }
    assert checked == segmenter_hf._MODULES
    assert set(segmenter_hf.__all__) == {"__version__", *checked}
    assert set(segmenter_hf.__all__) <= set(dir(segmenter_hf))
    for name, module in checked.items():
        assert getattr(segmenter_hf, name).__module__.endswith(module)
    assert segmenter_hf.__version__ == metadata.version("segmenter-hf")
    with pytest.raises(AttributeError, match="no attribute 'Segmentor'"):
        segmenter_hf.Segmentor  # noqa: B018


def test_without_images_the_sample_image_is_segmented(tmp_path, capsys) -> None:
    save_tiny_scenes_model(tmp_path / "model")
    arguments = ["--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")]
    main(["predict", *arguments, "--device", "cpu"])
    assert "sample image" in capsys.readouterr().out
    label_map = Image.open(tmp_path / "out" / "sample.png")
    assert label_map.size == Image.open(SAMPLE_IMAGE).size == (512, 384)
