"""transformers' own common tests, of the release that is installed.

They are published in its source distribution alone: it is downloaded once with pip and kept under `.cache/`. The few
modules of its test tree that the distribution lacks, or that ask the Hub for files, are replaced here.
"""

import os
import re
import subprocess
import sys
import tarfile
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

import segmenter_hf


CACHE = Path(__file__).parents[2] / ".cache"
PACKAGE = "transformers_own_tests"


def fetch_common_tests(cache: Path) -> Path:
    """The folder of the test files of the installed release, downloaded by the first process that asks.

    Raises:
        subprocess.CalledProcessError: If pip finds no source distribution of this release, or no index.
    """
    release = f"transformers-{version('transformers')}"
    folder = cache / release
    cache.mkdir(exist_ok=True)
    with FileLock(cache / f"{release}.lock"):
        if not folder.exists():
            with TemporaryDirectory(dir=cache) as temporary:
                pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "transformers"]
                pip += ["--no-input", "--retries", "1", "--dest", temporary, release.replace("-", "==")]
                subprocess.run(pip, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
                with tarfile.open(Path(temporary) / f"{release}.tar.gz") as archive:
                    members = [member for member in archive if member.name.startswith(f"{release}/tests/")]
                    archive.extractall(temporary, members, filter="data")
                (Path(temporary) / release).rename(folder)
    return folder / "tests"


def fetch_or_skip() -> Path:
    """The folder of the test files; without it the module that asks is skipped, and in CI (`CI=true`) fails."""
    try:
        return fetch_common_tests(CACHE)
    except subprocess.CalledProcessError as error:
        reason = f"pip cannot download the source distribution of transformers: {error.stderr.strip()[-500:]}"
        if os.environ.get("CI", "").lower() in ("1", "true"):
            raise RuntimeError(reason) from error
        pytest.skip(reason, allow_module_level=True)


def replace_module(name: str, **attributes: object) -> None:
    """Put a module with these attributes where the common tests import `name` from."""
    module = ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module


def drawn_picture(url: str) -> Image.Image:
    """Stands for a photograph of the Hub: color gradients with seeded noise."""
    rows, columns = np.mgrid[:480, :640]
    gradients = np.stack([rows / 2, columns / 3, (rows + columns) / 5], axis=-1)
    noise = np.random.default_rng(0).uniform(-8, 8, gradients.shape)
    return Image.fromarray((gradients + noise).clip(0, 255).astype(np.uint8))


FOLDER = fetch_or_skip()
replace_module(PACKAGE, __path__=[str(FOLDER)])
# Tests of exporters, of generation and of the pipelines are not in the distribution; early releases import the last by name.
for module, name in re.findall(
    r"^from \.(pipelines\.\w+) import (\w+)$",
    (FOLDER / "test_pipeline_mixin.py").read_text(encoding="utf-8"),
    re.MULTILINE,
):
    replace_module(f"{PACKAGE}.{module}", **{name: type(name, (), {})})
replace_module(f"{PACKAGE}.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
replace_module(f"{PACKAGE}.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
replace_module(
    f"{PACKAGE}.utils.test_configuration_utils",
    config_common_kwargs={
        "architectures": ["SomeModel"],
        "chunk_size_feed_forward": 5,
        "dtype": "float16",
        "id2label": {0: "background", 1: "label"},
        "is_encoder_decoder": True,
        "label2id": {"background": 0, "label": 1},
        "output_attentions": True,
        "output_hidden_states": True,
        "problem_type": "regression",
        "return_dict": False,
    },
)
replace_module("fetch_hub_objects_for_ci", url_to_local_path=drawn_picture)

with (
    TemporaryDirectory() as tiny_models,
    # The marks are registered by the conftest of transformers, and have no meaning here.
    mock.patch.object(pytest, "mark", pytest.MarkGenerator(_ispytest=True)),
    # The classes that the tests look up by name are ours; without this, transformers would be imported twice.
    mock.patch("transformers.utils.direct_transformers_import", lambda *args: segmenter_hf),
    mock.patch.dict(os.environ, TRANSFORMERS_TINY_MODEL_PATH=tiny_models),
):
    summary = Path(tiny_models) / "reports" / "tiny_model_summary.json"
    summary.parent.mkdir()
    summary.write_text("{}")
    test_configuration_common = import_module(f"{PACKAGE}.test_configuration_common")
    test_image_processing_common = import_module(f"{PACKAGE}.test_image_processing_common")
    test_modeling_common = import_module(f"{PACKAGE}.test_modeling_common")
    test_pipeline_mixin = import_module(f"{PACKAGE}.test_pipeline_mixin")
    test_training_mixin = import_module(f"{PACKAGE}.test_training_mixin")

ConfigTester = test_configuration_common.ConfigTester
# `None` in releases whose common tests of image processors have another form.
ImageProcessingTester = getattr(test_image_processing_common, "ImageProcessingTester", None)
ImageProcessingTestMixin = test_image_processing_common.ImageProcessingTestMixin
ModelTesterMixin = test_modeling_common.ModelTesterMixin
PostProcessSemanticSegmentationTestMixin = getattr(
    test_image_processing_common, "PostProcessSemanticSegmentationTestMixin", None
)
PipelineTesterMixin = test_pipeline_mixin.PipelineTesterMixin
TrainingTesterMixin = test_training_mixin.TrainingTesterMixin
