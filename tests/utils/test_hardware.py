"""Bfloat16 where the hardware has it, float32 where it would be emulated."""

import logging

import pytest
import torch

from segmenter_hf.cli.train import parse_training_arguments
from segmenter_hf.inference.predictor import Predictor
from segmenter_hf.training.recipes import recipe_arguments, resolve_training_arguments
from segmenter_hf.utils import hardware

from ..tiny_models import save_tiny_scenes_model


@pytest.fixture(params=[False, True], ids=["emulated", "in hardware"])
def is_fast(request, monkeypatch, caplog) -> bool:
    """A machine without an accelerator, whose CPU has bfloat16 or not; warnings are logged, whatever ran before."""
    for name in (None, "segmenter_hf", "segmenter_hf.training.recipes", "segmenter_hf.utils.hardware"):
        caplog.set_level(logging.WARNING, logger=name)
        monkeypatch.setattr(logging.getLogger(name), "disabled", False)
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: request.param)
    return request.param


def test_recipes_train_in_bfloat16_only_where_the_hardware_has_it(is_fast, tmp_path, caplog) -> None:
    given = {"recipe": "scenes", "output_dir": str(tmp_path)}
    _, _, arguments = resolve_training_arguments(given)
    assert arguments.bf16 is is_fast
    assert ("Recipe scenes: float32 in place of bfloat16" in caplog.text) is not is_fast
    _, _, arguments = parse_training_arguments(["--recipe", "scenes", "--output_dir", str(tmp_path)])
    assert arguments.bf16 is is_fast
    assert recipe_arguments("segmenter_ade20k").get("bf16", False) is False


def test_what_is_asked_for_is_done_with_a_warning(is_fast, tmp_path, caplog) -> None:
    given = ["--recipe", "scenes", "--bf16", "true", "--output_dir", str(tmp_path)]
    caplog.clear()
    assert parse_training_arguments(given)[2].bf16
    assert ("only emulates bfloat16 (cpu)" in caplog.text) is not is_fast
    save_tiny_scenes_model(tmp_path / "model")
    caplog.clear()
    predictor = Predictor.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert predictor.precision == "bfloat16"
    assert ("only emulates bfloat16 (cpu)" in caplog.text) is not is_fast


def test_a_gpu_that_emulates_bfloat16_is_found(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not hardware.has_fast_bfloat16("cuda") and hardware.has_fast_bfloat16("xpu")
