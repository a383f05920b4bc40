"""Who may import whom, and what the scripts say."""

import ast
from pathlib import Path

import pytest

from .script_help import help_of


ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "segmenter_hf"
MODEL_FILES = {
    path.stem
    for pattern in ("configuration_*.py", "modeling_*.py", "image_processing_*.py")
    for path in SOURCE.glob(pattern)
} | {"image_reading", "segmentation_loss", "sliding_window"}
CONVERSION = {path.stem for path in (SOURCE / "conversion").glob("*.py")} - {"__init__"}
# Each file may import those of the package that are named with it, and whatever these may import.
ALLOWED = {
    **dict.fromkeys(MODEL_FILES, MODEL_FILES),
    "files": set(),
    "commands": set(),
    "metrics": set(),
    "augmentation": set(),
    "label_sets": {"files"},
    "visualization": {"image_reading"},
    "scenes": {"files"},
    "folder_layouts": set(),
    "row_images": set(),
    "data": {"folder_layouts", "image_reading", "row_images", "scenes", "label_sets"},
    "attention": MODEL_FILES | {"label_sets", "visualization"},
    "prediction": MODEL_FILES | {"attention", "files", "label_sets", "visualization"},
    "prediction_arguments": {"label_sets", "prediction"},
    "evaluation": {"data", "files", "label_sets", "metrics", "prediction", "visualization"},
    "dataset_prediction": MODEL_FILES
    | {"data", "files", "folder_layouts", "label_sets", "prediction", "row_images", "visualization"},
    "onnx_export": {"files", "label_sets", "prediction"},
    "published_models": set(),
    "model_card": {"evaluation", "files", "label_sets", "published_models", "scenes"},
    "publishing": {"data", "evaluation", "files", "label_sets", "model_card", "prediction"},
    "training_arguments": MODEL_FILES,
    "recipes": {"commands", "files", "training_arguments"},
    "estimates": MODEL_FILES,
    "trainer": MODEL_FILES
    | {"augmentation", "data", "evaluation", "files", "label_sets", "metrics", "publishing", "visualization"},
    "training": MODEL_FILES
    | {"augmentation", "data", "evaluation", "files", "label_sets", "model_card", "prediction", "publishing"}
    | {"recipes", "trainer", "training_arguments"},
    "demo": {
        "attention",
        "image_reading",
        "label_sets",
        "prediction",
        "recipes",
        "scenes",
        "training",
        "visualization",
    },
    "__init__": MODEL_FILES | {"conversion"},
}


def internal_imports(path: Path) -> set[str]:
    """Names of the package's files that a file imports; a plain `from . import` counts as the dot."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                found.add(node.module or ".")
            elif (node.module or "").startswith("segmenter_hf"):
                found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("segmenter_hf")}
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.glob("*.py")), ids=lambda path: path.stem)
def test_files_import_only_what_they_may(path) -> None:
    assert path.stem in ALLOWED, f"say in {__file__} what {path.name} may import"
    assert internal_imports(path) <= ALLOWED[path.stem]


@pytest.mark.parametrize("path", sorted((SOURCE / "conversion").glob("*.py")), ids=lambda path: path.stem)
def test_conversion_imports_model_files_and_itself(path) -> None:
    assert internal_imports(path) <= MODEL_FILES | CONVERSION | {"files", "label_sets", "published_models", "."}


@pytest.mark.parametrize("name", sorted(MODEL_FILES))
def test_model_files_do_not_need_torchvision(name) -> None:
    tree = ast.parse((SOURCE / f"{name}.py").read_text(encoding="utf-8"))
    modules = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    assert not [module for module in modules if module and module.startswith("torchvision")]


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.stem)
def test_scripts_explain_themselves(script) -> None:
    assert "usage:" in help_of(script) and "--help" in help_of(script)
