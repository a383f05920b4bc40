"""Trainer as it optimizes, stops and saves: the losses of the original, whole checkpoints, and what ends a run."""

import errno
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSemanticSegmentation, TrainerCallback

from segmenter_hf import SetrConfig, SetrForSemanticSegmentation, convert_checkpoint
from segmenter_hf.cli.train import parse_training_arguments
from segmenter_hf.data.label_sets import label_set_from_names
from segmenter_hf.data.loading import load_segmentation_datasets
from segmenter_hf.training.arguments import SegmentationTrainingArguments
from segmenter_hf.training.checkpoints import last_checkpoint
from segmenter_hf.training.run import train_segmenter
from segmenter_hf.training.trainer import SegmentationTrainer

from ..run_training import words


ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"


class FixedExamples(torch.utils.data.Dataset):
    """Rows that are what they are."""

    def __init__(self, pixel_values: np.ndarray, labels: np.ndarray) -> None:
        self.rows = [
            {"pixel_values": torch.from_numpy(pixels).float(), "labels": torch.from_numpy(mask).long()}
            for pixels, mask in zip(pixel_values, labels)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


class StopAfter(TrainerCallback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = state.global_step >= self.steps


def plain_arguments(output_dir: Path, **kwargs) -> SegmentationTrainingArguments:
    return SegmentationTrainingArguments(
        str(output_dir),
        use_cpu=True,
        disable_tqdm=True,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        **{"logging_steps": 1, **kwargs},
    )


def test_trainer_itself_gives_the_losses_and_rates_of_the_original(tmp_path) -> None:
    folder = FIXTURES / "protocol" / "training"
    about = json.loads((folder / "about.json").read_text())
    with np.load(folder / "expected.npz") as arrays:
        expected = {name: arrays[name] for name in arrays}
    model = AutoModelForSemanticSegmentation.from_pretrained(
        convert_checkpoint(FIXTURES / "rstrudel" / about["checkpoint"] / "checkpoint.pth", tmp_path / "start"),
        drop_path_rate=about["drop_path"],
        decoder_hidden_dropout_prob=about["dropout"],
        decoder_attention_probs_dropout_prob=about["dropout"],
    )
    steps, batch_size = expected["labels"].shape[:2]
    recipe = ["--recipe", "segmenter_ade20k", "--learning_rate", str(about["learning_rate"]), "--max_steps", "12"]
    recipe += ["--total_batch_size", str(batch_size), "--eval_strategy", "no", "--save_strategy", "no"]
    recipe += ["--load_best_model_at_end", "false", "--logging_steps", "1", "--train_sampling_strategy", "sequential"]
    recipe += ["--output_dir", str(tmp_path / "run"), "--use_cpu", "--disable_tqdm", "true"]
    _, _, training_args = parse_training_arguments(recipe)
    trainer = SegmentationTrainer(
        model=model,
        args=training_args,
        train_dataset=FixedExamples(
            expected["pixel_values"].reshape(-1, *expected["pixel_values"].shape[2:]),
            expected["labels"].reshape(-1, *expected["labels"].shape[2:]),
        ),
        label_set=label_set_from_names([str(index) for index in range(model.config.num_labels)]),
    )
    trainer.add_callback(StopAfter(steps))
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    np.testing.assert_allclose([entry["loss"] for entry in logs], expected["losses"], rtol=0, atol=1e-4)
    np.testing.assert_allclose([entry["learning_rate"] for entry in logs], expected["learning_rates"], atol=1e-9)
    with torch.no_grad():
        pixel_values = torch.from_numpy(expected["pixel_values"][0]).float()
        logits = model.eval()(pixel_values).logits
    upsampled = torch.nn.functional.interpolate(logits, size=pixel_values.shape[-2:], mode="bilinear")
    assert np.abs(upsampled.numpy() - expected["final_logits"].astype(np.float32)).max() < 5e-3


def test_heads_have_their_own_rate_and_necks_that_of_the_encoder(tmp_path) -> None:
    tiny = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 4, "image_size": 32, "patch_size": 8}
    model = SetrForSemanticSegmentation(SetrConfig(**tiny, decoder_type="mla", decoder_hidden_size=8))
    trainer = SegmentationTrainer(
        model=model,
        args=plain_arguments(tmp_path, learning_rate=0.01, head_learning_rate_factor=10.0, weight_decay=0.5),
        label_set=label_set_from_names(["a", "b"]),
    )
    trainer.create_optimizer_and_scheduler(num_training_steps=10)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = {}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            seen[names[id(parameter)]] = (round(group["lr"], 6), group["weight_decay"])
    assert len(seen) == len(names)
    assert seen["decode_head.classifier.weight"] == seen["auxiliary_heads.0.classifier.weight"] == (0.1, 0.5)
    assert seen["decode_head.classifier.bias"] == (0.1, 0.0)
    assert seen["neck.convs.0.convolution.weight"] == seen["setr.layers.0.mlp.fc1.weight"] == (0.01, 0.5)
    for step in (0, 5, 9, 10):  # PolyLR of mmsegmentation: one `eta_min` for all
        rates = {round(group["lr"], 9) for group in trainer.optimizer.param_groups}
        assert rates == {round((first - 1e-6) * (1 - step / 10) ** 0.9 + 1e-6, 9) for first in (0.01, 0.1)}
        for _ in range({0: 5, 5: 4, 9: 1, 10: 0}[step]):
            trainer.lr_scheduler.step()


def broken_trainer(output_dir: Path, value: float, logging_steps: int = 1) -> SegmentationTrainer:
    rows = FixedExamples(np.full((4, 3, 16, 16), value, dtype=np.float32), np.zeros((4, 16, 16), dtype=np.int64))
    tiny = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
    config = SetrConfig(**tiny, decoder_type="naive", decoder_hidden_size=8, out_indices=[0], use_tiled_loss=False)
    return SegmentationTrainer(
        model=SetrForSemanticSegmentation(config),
        args=plain_arguments(output_dir, max_steps=3, logging_steps=logging_steps),
        train_dataset=rows,
        label_set=label_set_from_names(["a", "b"]),
    )


@pytest.mark.parametrize(("logging_steps", "step"), [(1, 1), (50, 3)])
def test_a_loss_that_is_no_number_ends_the_run(logging_steps, step, tmp_path) -> None:
    message = f"The loss became nan at or before step {step}. .* lower `learning_rate`"
    with pytest.raises(FloatingPointError, match=message):
        broken_trainer(tmp_path, float("nan"), logging_steps).train()


def test_weights_that_are_no_numbers_are_not_saved(tmp_path) -> None:
    trainer = broken_trainer(tmp_path, 0.0)
    with torch.no_grad():
        trainer.model.decode_head.classifier.bias[0] = float("inf")
    for save in (lambda: trainer._save_checkpoint(trainer.model, trial=None), trainer.save_model):
        with pytest.raises(FloatingPointError, match=r"`decode_head.classifier.bias` is not finite"):
            save()
    assert not list(tmp_path.iterdir())


def start(output_dir: Path, *more: str, **kwargs) -> subprocess.Popen:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "tests.run_training", str(output_dir), *more]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("undisturbed")
    train_segmenter(*parse_training_arguments(words(str(output_dir))))
    return output_dir


def same_weights(first: Path, second: Path) -> bool:
    first, second = (load_file(folder / "model.safetensors") for folder in (first, second))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("moment", ["between", "while saving"])
def test_a_killed_run_goes_on_with_the_same_command_and_ends_alike(undisturbed, tmp_path, moment) -> None:
    output_dir = tmp_path / "run"
    run = start(output_dir)
    wanted = "checkpoint-4" if moment == "between" else ".checkpoint-4-partial"
    deadline = time.monotonic() + 300
    while not (output_dir / wanted).exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.0005)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert run.returncode == -signal.SIGKILL, "the run was over before it was killed"
    found = last_checkpoint(output_dir)
    assert found is not None and (Path(found) / "trainer_state.json").is_file()
    again = start(output_dir)
    printed, _ = again.communicate(timeout=300)
    assert again.returncode == 0, printed
    assert "Resuming from" in printed
    assert same_weights(output_dir, undisturbed)
    assert not list(output_dir.glob(".*partial"))


def test_a_half_written_checkpoint_is_never_chosen_and_removed(undisturbed, tmp_path) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / ".checkpoint-9-partial" / "checkpoint-9").mkdir(parents=True)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert last_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize("kind", ["a stream", "workers that stay"])
def test_what_feeds_a_run_finds_its_place_again(tmp_path, monkeypatch, kind) -> None:
    monkeypatch.setattr(
        datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False
    )  # 5 s after each visit of a stream
    more = [
        "--dataloader_num_workers",
        "2",
        "--save_steps",
        "4",
        "--save_total_limit",
        "9",
        "--eval_strategy",
        "no",
        "--load_best_model_at_end",
        "false",
    ]
    if kind == "a stream":
        (tmp_path / "data").mkdir()
        for split, dataset in load_segmentation_datasets(scenes_train=5, scenes_validation=2).items():
            dataset.to_parquet(tmp_path / "data" / f"{split}-00000.parquet")
        more += ["--dataset_name", str(tmp_path / "data"), "--label_set", "scenes", "--streaming", "--max_steps", "8"]
    else:
        more += ["--dataloader_persistent_workers", "true"]
    fed, compute_loss = [], SegmentationTrainer.compute_loss

    def record(self, model, inputs, **kwargs) -> Any:
        state = bytes(torch.get_rng_state().numpy())
        fed.append((inputs["pixel_values"].double().sum().item(), inputs["labels"].sum().item(), state))
        return compute_loss(self, model, inputs, **kwargs)

    monkeypatch.setattr(SegmentationTrainer, "compute_loss", record)
    train_segmenter(*parse_training_arguments(words(str(tmp_path / "whole"), *more)))
    whole = fed.copy()
    fed.clear()
    (tmp_path / "again").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "again" / "checkpoint-4")
    shutil.copyfile(tmp_path / "whole" / "recipe.json", tmp_path / "again" / "recipe.json")
    train_segmenter(*parse_training_arguments(words(str(tmp_path / "again"), *more)))
    assert len(set(whole)) == len(whole) and len(fed) == len(whole) - 4 and fed == whole[4:]
    gc.collect()  # ends the workers that stay


def test_a_full_disk_stops_with_what_is_left_and_what_to_do(tmp_path) -> None:
    limit = 2**17  # bytes that a file may have; the weights are smaller, the optimizer's state is larger

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    run = start(tmp_path / "run", preexec_fn=limited)
    printed, _ = run.communicate(timeout=300)
    assert run.returncode == 1
    assert "error: The checkpoint of step 2 could not be written to" in printed and "MB are free" in printed
    assert "Make room and run the same command" in printed
    assert not list((tmp_path / "run").glob("*checkpoint*"))


def test_the_last_good_checkpoint_stays_when_the_disk_is_full_later(tmp_path, monkeypatch) -> None:
    original = torch.save

    def save(content, file, *args, **kwargs):
        if "checkpoint-4" in str(file) and "optimizer" in str(file):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(content, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match=r"step 4 could not .* No space left .* complete one is .*checkpoint-2\."):
        train_segmenter(*parse_training_arguments(words(str(tmp_path))))
    assert sorted(path.name for path in tmp_path.glob("*checkpoint*")) == ["checkpoint-2"]


def test_the_directory_of_another_run_is_not_continued(undisturbed, tmp_path) -> None:
    with pytest.raises(ValueError, match="holds a run with other arguments"):
        train_segmenter(*parse_training_arguments(words(str(undisturbed), "--weight_decay", "0.5")))


def test_a_finished_run_stays_what_it_is(undisturbed) -> None:
    before = load_file(undisturbed / "model.safetensors")
    results = train_segmenter(*parse_training_arguments(words(str(undisturbed))))
    assert all(
        torch.equal(value, before[name]) for name, value in load_file(undisturbed / "model.safetensors").items()
    )
    assert results["mean_iou"] == json.loads((undisturbed / "results.json").read_text())["mean_iou"]


def test_a_run_that_ended_within_an_epoch_stays_what_it_is_wherever_it_lies(tmp_path) -> None:
    more = ["--max_steps", "3", "--save_steps", "1", "--eval_steps", "1"]
    train_segmenter(*parse_training_arguments(words(str(tmp_path / "run"), *more)))
    before, checkpoints = load_file(tmp_path / "run" / "model.safetensors"), sorted((tmp_path / "run").glob("c*-*"))
    state = json.loads((checkpoints[-1] / "trainer_state.json").read_text())
    best = tmp_path / "moved" / Path(state["best_model_checkpoint"]).name
    (tmp_path / "run").rename(tmp_path / "moved")
    train_segmenter(*parse_training_arguments(words(str(tmp_path / "moved"), *more)))
    after = load_file(tmp_path / "moved" / "model.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert not (tmp_path / "moved" / "checkpoint-4").exists() and best.is_dir()
    assert all(torch.equal(value, after[name]) for name, value in load_file(best / "model.safetensors").items())


def test_curves_and_predictions_are_drawn_and_the_recipe_is_kept(undisturbed) -> None:
    names = {path.name for path in undisturbed.iterdir()}
    assert {"curves.png", "predictions.png", "recipe.json"} <= names
    recipe = json.loads((undisturbed / "recipe.json").read_text())
    assert recipe["arguments"]["learning_rate"] == 1e-3 and recipe["arguments"]["total_batch_size"] == 2
    assert "| batch | 2 = 1 devices x 2 crops x 1 accumulated |" in (undisturbed / "README.md").read_text()


def test_tensorboard_gets_numbers_and_images(tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_segmenter(*parse_training_arguments(words(str(tmp_path), "--report_to", "tensorboard", "--max_steps", "4")))
    (events,) = (tmp_path / "runs").rglob("events*")
    found = EventAccumulator(str(events), size_guidance={"images": 0}).Reload()
    assert {"train/loss", "train/learning_rate", "eval/mean_iou"} <= set(found.Tags()["scalars"])
    assert [image.step for image in found.Images("eval/predictions")] == [2, 4]
