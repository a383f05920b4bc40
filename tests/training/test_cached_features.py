"""Features of a frozen encoder that are computed once: the training is that of features computed again and again."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from segmenter_hf import SegmenterModel
from segmenter_hf.cli.train import parse_training_arguments
from segmenter_hf.training.features import FEATURES_FOLDER, encoder_replaced_by
from segmenter_hf.training.run import train_segmenter

from ..run_training import TINY, words
from .test_fine_tuning_tools import Crops, tiny_model


# No random draws inside the decoder, so that both runs draw the same.
STILL = TINY + ",decoder_hidden_dropout_prob=0,decoder_attention_probs_dropout_prob=0"
FROZEN = ["--freeze_encoder", "true", "--config_overrides", STILL, "--save_total_limit", "9"]


def run(output_dir: Path, *more: str) -> list[float]:
    train_segmenter(*parse_training_arguments(words(str(output_dir), *FROZEN, *more)))
    state = json.loads((output_dir / "checkpoint-12" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def test_kept_features_give_the_losses_of_computed_ones(tmp_path, monkeypatch) -> None:
    expected = run(tmp_path / "computed")
    kept = run(tmp_path / "kept", "--cache_feature_epochs", "3")  # all epochs of the run
    assert kept == pytest.approx(expected, abs=2e-3)  # they are kept in float16
    assert not (tmp_path / "kept" / FEATURES_FOLDER).exists()

    calls, forward = [], SegmenterModel.forward
    monkeypatch.setattr(
        SegmenterModel,
        "forward",
        lambda self, *args, **kwargs: calls.append(self.training) or forward(self, *args, **kwargs),
    )
    never = ["--eval_strategy", "no", "--load_best_model_at_end", "false", "--max_eval_samples", "1"]
    repeated = run(tmp_path / "repeated", "--cache_feature_epochs", "1", *never)
    assert repeated[:4] == pytest.approx(expected[:4], abs=2e-3) and repeated[4:] != pytest.approx(
        expected[4:], abs=2e-3
    )
    crops_of_an_epoch, windows_of_an_evaluation = 1, 2
    assert len(calls) <= crops_of_an_epoch + 4 * windows_of_an_evaluation and not any(calls)


@pytest.mark.parametrize("bf16", [False, True])
def test_features_are_computed_in_the_precision_of_the_training(tmp_path, monkeypatch, bf16) -> None:
    precisions, forward = [], SegmenterModel.forward
    monkeypatch.setattr(
        SegmenterModel,
        "forward",
        lambda self, *args, **kwargs: (
            precisions.append(torch.is_autocast_enabled("cpu")) or forward(self, *args, **kwargs)
        ),
    )
    run(tmp_path, "--cache_feature_epochs", "1", "--bf16", str(bf16).lower())
    assert precisions[0] is bf16  # before the first step


def test_an_interrupted_run_repeats_the_same_features(tmp_path) -> None:
    whole = run(tmp_path / "whole", "--cache_feature_epochs", "2")
    again = run(
        tmp_path / "again",
        "--cache_feature_epochs",
        "2",
        "--resume_from_checkpoint",
        str(tmp_path / "whole" / "checkpoint-6"),
    )
    assert again == whole


@pytest.mark.parametrize(
    "fields", [{}, {"decoder_type": "linear", "out_indices": [0, 2], "decoder_norm": "batch_norm"}]
)
def test_the_model_sees_the_features_in_place_of_its_encoder(fields) -> None:
    model, example = tiny_model(**fields).eval(), Crops()[0]
    pixel_values, labels = example["pixel_values"][None], example["labels"][None]
    encoder = model.base_model
    with torch.no_grad():
        expected = model(pixel_values=pixel_values, labels=labels)
        outputs = encoder(pixel_values)
        features = torch.stack(outputs.feature_states or (outputs.last_hidden_state,), dim=1)
        with encoder_replaced_by(model, {"features": features, "labels": labels}) as inputs:
            replaced = model(**inputs)
        after = model(pixel_values=pixel_values)
    torch.testing.assert_close(replaced.loss, expected.loss)
    assert torch.equal(after.logits, expected.logits)


def test_a_full_disk_is_an_error_and_leaves_no_features(tmp_path, monkeypatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match=r"\.features could not be written: .* make room"):
        run(tmp_path, "--cache_feature_epochs", "1")
    assert not list(tmp_path.glob(".features*"))


def test_features_of_a_trained_encoder_or_a_stream_are_not_kept(tmp_path) -> None:
    with pytest.raises(ValueError, match="need `freeze_encoder`"):
        run(tmp_path / "a", "--freeze_encoder", "false", "--cache_feature_epochs", "1")
    with pytest.raises(ValueError, match="only while the encoder is frozen"):
        run(tmp_path / "b", "--unfreeze_at_step", "2", "--cache_feature_epochs", "1")
