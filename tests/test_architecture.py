"""Which folder may import which."""

import ast
import inspect
import re
from pathlib import Path

import pytest

from segmenter_hf.inference.datasets import predict_dataset


ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "segmenter_hf"
# Each folder may import those that are named with it, whatever these may import, and itself.
ALLOWED = {
    "models": (),
    "utils": (),
    "data": ("models", "utils"),
    "inference": ("data",),
    "evaluation": ("inference",),
    "export": ("inference",),
    "hub": ("evaluation",),
    "training": ("hub",),
    "conversion": ("hub",),
    "demo": ("training",),
    "cli": ("conversion", "demo", "export"),
}
FILES = sorted(SOURCE.glob("*/**/*.py"))
MODEL_FILES = sorted(SOURCE.glob("models/*.py"))


def reachable(folder: str) -> set[str]:
    return {folder}.union(*(reachable(other) for other in ALLOWED[folder]))


def internal_imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, as dotted names below `segmenter_hf`."""
    package = path.relative_to(SOURCE).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            found.add(".".join([*base, *filter(None, [node.module])]))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("segmenter_hf"):
            found.add(node.module.removeprefix("segmenter_hf").removeprefix("."))
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("segmenter_hf") for alias in node.names), path
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_import_only_from_the_folders_below(path) -> None:
    allowed = reachable(path.relative_to(SOURCE).parts[0])
    assert {name.partition(".")[0] for name in internal_imports(path)} <= allowed


@pytest.mark.parametrize("path", MODEL_FILES, ids=lambda path: path.stem)
def test_model_files_are_flat_and_do_not_need_torchvision(path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    relative = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    assert all(node.level == 1 and node.module and "." not in node.module for node in relative)
    modules = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    assert not [module for module in modules if module and module.startswith("torchvision")]


@pytest.mark.parametrize(
    "path", [path for path in FILES if "cli" not in path.parts], ids=lambda path: str(path.relative_to(SOURCE))
)
def test_library_code_names_arguments_instead_of_options_and_scripts(path) -> None:
    if path.name == "run_onnx.py":  # a command of its own
        return
    strings = [
        node.value for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Constant)
    ]
    named = [
        text
        for text in strings
        if isinstance(text, str) and re.search(r"(?<![\w-])--[a-z]|scripts/|\.py\b.* --", text)
    ]
    assert not named


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_functions_have_at_most_60_lines_and_classes_250(path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    limits = {
        ast.FunctionDef: 60,
        ast.AsyncFunctionDef: 60,
        ast.ClassDef: 10**6 if path.name == "synthetic_scenes.py" else 250,
    }
    nodes = [node for node in ast.walk(tree) if type(node) in limits]
    assert not [node.name for node in nodes if node.end_lineno - node.lineno >= limits[type(node)]]


def test_predicting_a_dataset_takes_at_most_8_arguments() -> None:
    assert len(inspect.signature(predict_dataset).parameters) <= 8
