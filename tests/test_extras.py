"""Each extra of setup.cfg brings what the package promises of it.

An extra that is not installed is skipped, unless the environment variable `EXTRA` names it: the workflow `build` installs each
one alone and says so.
"""

import importlib
import importlib.metadata
import os
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement


ROOT = Path(__file__).parents[1]
# The package's own modules and, where these import lazily, the packages that they ask for.
PROMISES = {
    "bench": ["timm", "torchmetrics"],
    "browser": ["playwright.sync_api"],
    "coco": ["pycocotools.mask", "segmenter_hf.data.described_masks"],
    "demo": ["gradio", "segmenter_hf.demo.app", "segmenter_hf.demo.uploads"],
    "dev": ["build", "check_wheel_contents", "ipykernel", "mypy", "nbclient", "pytest_cov", "torchvision", "twine"],
    "docs": ["material", "mkdocs", "mkdocstrings"],
    "geo": ["rasterio", "segmenter_hf.inference.scenes"],
    "int8": ["torchao"],
    "onnx": ["onnx", "onnxruntime", "onnxscript", "segmenter_hf.export.onnx", "segmenter_hf.inference.runtimes"],
    "openvino": ["nncf", "openvino", "segmenter_hf.export.openvino", "segmenter_hf.export.quantization"],
    "peft": ["peft", "segmenter_hf.training.adapters"],
    "test": ["hypothesis", "parameterized", "pytest", "tensorboard", "xdist"],
}


def declared_extras() -> dict[str, str]:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return dict(config["options.extras_require"])


def missing_distributions(extra: str) -> list[str]:
    """What the extra asks for and the environment lacks, or has in another version."""
    missing = []
    for requirement in map(Requirement, declared_extras()[extra].split("\n")[1:]):
        if requirement.name == "segmenter-hf":
            missing += [name for other in sorted(requirement.extras) for name in missing_distributions(other)]
            continue
        try:
            is_met = requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True)
        except importlib.metadata.PackageNotFoundError:
            is_met = False
        if not is_met:
            missing.append(str(requirement))
    return missing


def test_every_extra_promises_something() -> None:
    assert declared_extras().keys() == PROMISES.keys()


@pytest.mark.parametrize("extra", PROMISES)
def test_an_extra_brings_what_it_promises(extra) -> None:
    missing = missing_distributions(extra)
    if missing and os.environ.get("EXTRA") != extra:
        pytest.skip(f"segmenter-hf[{extra}] is not installed: {', '.join(missing)}")
    assert not missing
    for name in PROMISES[extra]:
        importlib.import_module(name)
