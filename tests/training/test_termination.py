"""SIGTERM in training: a checkpoint, one line, exit code 143, and the same weights after resuming."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from segmenter_hf.cli.train import describe_resumption, main, parse_training_arguments
from segmenter_hf.training.checkpoints import last_checkpoint
from segmenter_hf.training.run import train_segmenter
from segmenter_hf.training.termination import EVALUATION_DUE, TrainingTerminated
from segmenter_hf.training.trainer import SegmentationTrainer

from ..run_training import words


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("undisturbed")
    train_segmenter(*parse_training_arguments(words(str(output_dir))))
    return output_dir


def check_same_end(output_dir: Path, undisturbed: Path) -> None:
    weights, expected = (load_file(folder / "model.safetensors") for folder in (output_dir, undisturbed))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert (output_dir / "results.json").read_text() == (undisturbed / "results.json").read_text()


def check_stopped(output_dir: Path, step: int) -> None:
    """Nothing is there but the recipe, pictures of the progress, and checkpoints that are whole."""
    names = {path.name for path in output_dir.iterdir()}
    assert f"checkpoint-{step}" in names
    rest = {name for name in names if not name.startswith("checkpoint-")}
    assert rest <= {"recipe.json", "curves.png", "predictions.png", ".lock"}, rest
    files = {path.name for path in (output_dir / f"checkpoint-{step}").iterdir()}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= files


def test_all_processes_of_a_job_are_terminated_with_a_checkpoint_and_one_line(undisturbed, tmp_path) -> None:
    output_dir = tmp_path / "run"
    command = ["-m", "segmenter_hf", "train", *words(str(output_dir)), "--dataloader_num_workers", "2"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    run = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while not (output_dir / "checkpoint-2").exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.0005)
    os.killpg(run.pid, signal.SIGTERM)
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 143, errors
    step = max(int(path.name.split("-")[1]) for path in output_dir.glob("checkpoint-*"))
    check_stopped(output_dir, step)
    assert errors.strip().splitlines()[-1] == (
        f"terminated: step {step} is saved in {output_dir}/checkpoint-{step}; run the same command to resume"
    )
    assert "Traceback" not in errors
    train_segmenter(*parse_training_arguments(words(str(output_dir))))
    check_same_end(output_dir, undisturbed)


# Evaluations are due at steps 2, 4, ..., 12; steps 3, 7 and 11 are within an epoch of four.
@pytest.mark.parametrize(
    ("method", "call", "step", "is_due"),
    [
        ("compute_loss", 3, 3, False),
        ("compute_loss", 4, 4, True),  # the step ends an epoch
        ("prediction_step", 2, 2, True),
        ("prediction_step", 18, 12, True),  # the last image of the last evaluation
        ("_save_checkpoint", 2, 4, False),
    ],
)
def test_a_terminated_run_resumes_to_the_weights_of_one_that_was_not(
    undisturbed, tmp_path, capsys, monkeypatch, method, call, step, is_due
) -> None:
    original, calls = getattr(SegmentationTrainer, method), []

    def terminated(self, *args, **kwargs):
        calls.append(method)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(SegmentationTrainer, method, terminated)
        main(words(str(tmp_path)))
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    check_stopped(tmp_path, step)
    assert f"terminated: step {step} is saved in {tmp_path}/checkpoint-{step};" in capsys.readouterr().err
    log = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]
    assert any(EVALUATION_DUE in entry for entry in log) == is_due
    main(words(str(tmp_path)))
    check_same_end(tmp_path, undisturbed)
    state = json.loads((tmp_path / "checkpoint-12" / "trainer_state.json").read_text())
    whole = json.loads((undisturbed / "checkpoint-12" / "trainer_state.json").read_text())
    if step < 12:
        assert state["best_metric"] == whole["best_metric"] and state["best_global_step"] == whole["best_global_step"]


def test_an_evaluation_that_ends_an_epoch_is_made_up_for(tmp_path, monkeypatch) -> None:
    more = ["--eval_strategy", "epoch", "--save_strategy", "epoch", "--num_train_epochs", "2"]
    train_segmenter(*parse_training_arguments(words(str(tmp_path / "whole"), *more)))
    compute_loss, calls = SegmentationTrainer.compute_loss, []

    def terminated(self, *args, **kwargs):
        calls.append(self.state.global_step)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute_loss(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(TrainingTerminated) as ended:
        patch.setattr(SegmentationTrainer, "compute_loss", terminated)
        train_segmenter(*parse_training_arguments(words(str(tmp_path / "run"), *more)))
    assert ended.value.step == 4
    train_segmenter(*parse_training_arguments(words(str(tmp_path / "run"), *more)))
    check_same_end(tmp_path / "run", tmp_path / "whole")
    logs = [
        json.loads((tmp_path / name / "checkpoint-8" / "trainer_state.json").read_text())["log_history"]
        for name in ("run", "whole")
    ]
    run, whole = (
        {entry["step"]: entry.get("eval_mean_iou") for entry in log if "eval_mean_iou" in entry} for log in logs
    )
    assert run == whole and set(run) == {4, 8}


def test_the_line_names_the_options_that_would_not_resume(tmp_path) -> None:
    terminated = TrainingTerminated(Path("out/checkpoint-3"), 3)
    arguments = parse_training_arguments(words(str(tmp_path), "--overwrite_output_dir"))[2]
    assert describe_resumption(terminated, arguments) == (
        "terminated: step 3 is saved in out/checkpoint-3; run the same command without `--overwrite_output_dir` to resume"
    )


class Hostile:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def resume_from_changed(undisturbed: Path, run_dir: Path, change: Callable[[Path], None]) -> None:
    """Resume at step 4 from a checkpoint that was changed."""
    run_dir.mkdir()
    shutil.copyfile(undisturbed / "recipe.json", run_dir / "recipe.json")
    found = last_checkpoint(undisturbed)
    assert found is not None
    checkpoint = run_dir / "checkpoint-4"
    shutil.copytree(found, checkpoint)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    (checkpoint / "trainer_state.json").write_text(json.dumps({**state, "global_step": 4}))
    change(checkpoint)
    train_segmenter(*parse_training_arguments(words(str(run_dir))))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_was_tampered_with_runs_nothing(undisturbed, tmp_path, name) -> None:
    run_dir, mark = tmp_path / "run", tmp_path / "was_run"
    with pytest.raises(ValueError, match="cannot resume .* UnpicklingError: Weights only") as ended:
        resume_from_changed(undisturbed, run_dir, lambda folder: torch.save({"state": Hostile(mark)}, folder / name))
    assert not mark.exists() and "\n" not in str(ended.value)


def without_a_weight(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(sorted(weights.items())[1:])


def wider(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([weight, weight]) for name, weight in weights.items()}


def with_another(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**weights, "another": torch.ones(1)}


@pytest.mark.parametrize(
    "change, said",
    [
        (without_a_weight, "1 missing .decode_head"),
        (wider, "size mismatch for"),
        (with_another, "1 left over .another"),
    ],
)
def test_a_checkpoint_of_another_model_is_named_in_a_line(undisturbed, tmp_path, change, said) -> None:
    def write(checkpoint: Path) -> None:
        weights = checkpoint / "model.safetensors"
        save_file(change(load_file(weights)), weights, {"format": "pt"})

    with pytest.raises(ValueError, match=f"{tmp_path}.*checkpoint-4: training cannot resume .*{said}") as ended:
        resume_from_changed(undisturbed, tmp_path / "run", write)
    assert "\n" not in str(ended.value)


@pytest.mark.parametrize("content", [b"PK", b'{"global_step": "many"}'])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
def test_a_damaged_checkpoint_is_named_in_a_line(undisturbed, tmp_path, name, content) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}.*checkpoint-4: training cannot resume ") as ended:
        resume_from_changed(undisturbed, tmp_path / "run", lambda folder: (folder / name).write_bytes(content))
    assert "\n" not in str(ended.value)
