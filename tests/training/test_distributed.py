"""Two gloo processes on the CPU: the losses of one with the whole batch, and exactly its counts."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from segmenter_hf.cli.train import parse_training_arguments
from segmenter_hf.data.loading import load_segmentation_datasets
from segmenter_hf.evaluation.evaluate import evaluate_segmentation
from segmenter_hf.inference.predictor import Predictor
from segmenter_hf.training.run import train_segmenter

from ..run_training import TINY, words


ROOT = Path(__file__).parents[2]
# No random draws inside the model: they would differ between one process and two.
STILL = TINY + ",decoder_hidden_dropout_prob=0,decoder_attention_probs_dropout_prob=0"
MORE = ["--config_overrides", STILL, "--drop_path_rate", "0", "--total_batch_size", "4", "--class_weights", "balanced"]


def launch(*command: str) -> str:
    """Run a module or script in two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "CUDA_VISIBLE_DEVICES": "",
    }
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port), *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stdout[-5000:]
    return run.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    printed = launch("-m", "tests.run_training", str(folder / "two"), *MORE)
    assert "Batch 4 = 2 devices x 2 crops x 1 accumulated." in printed
    train_segmenter(*parse_training_arguments(words(str(folder / "one"), *MORE)))
    accumulated = words(str(folder / "accumulated"), *MORE, "--per_device_train_batch_size", "1")
    train_segmenter(*parse_training_arguments(accumulated))
    return {name: folder / name for name in ("one", "two", "accumulated")}


def history(output_dir: Path, key: str) -> list[float]:
    state = json.loads((output_dir / "checkpoint-6" / "trainer_state.json").read_text())
    return [entry[key] for entry in state["log_history"] if key in entry]


@pytest.mark.parametrize("divided", ["two", "accumulated"])
def test_a_batch_divided_among_processes_or_accumulated_has_the_losses_of_the_whole(runs, divided) -> None:
    whole, parts = history(runs["one"], "loss"), history(runs[divided], "loss")
    assert len(whole) == 6 and len(set(whole)) == 6
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-5)


def test_two_processes_count_what_one_counts_of_three_images(runs) -> None:
    predictor = Predictor.from_pretrained(runs["two"] / "checkpoint-6", device="cpu", label_set="scenes")
    (dataset,) = load_segmentation_datasets(splits=["validation"], scenes_validation=3).values()
    alone = evaluate_segmentation(predictor, dataset)
    for key in ("mean_iou", "overall_accuracy"):
        assert history(runs["two"], f"eval_{key}")[-1] == alone[key]


def test_the_script_for_evaluation_gives_the_same_results_in_two_processes(runs) -> None:
    launched, alone = (runs["one"].parent / name for name in ("launched", "alone"))
    common = [
        "-m",
        "segmenter_hf",
        "evaluate",
        "--model_name_or_path",
        str(runs["one"]),
        "--max_samples",
        "3",
        "--device",
        "cpu",
    ]
    printed = launch(*common, "--output_dir", str(launched))
    subprocess.run(
        [sys.executable, *common, "--output_dir", str(alone)], cwd=ROOT, check=True, capture_output=True, timeout=500
    )
    assert "2/2" in printed and "3/3" not in printed  # each took its share
    together, expected = (json.loads((folder / "results.json").read_text()) for folder in (launched, alone))
    assert together == expected and expected["num_images"] == 3 and len(expected["worst_images"]) == 3
    assert (launched / "worst.png").read_bytes() == (alone / "worst.png").read_bytes()


def test_two_processes_leave_one_whole_directory(runs) -> None:
    one, two = ({path.name for path in runs[name].iterdir()} for name in ("one", "two"))
    assert one == two
    recipe = json.loads((runs["two"] / "recipe.json").read_text())
    assert recipe["batch"] == {"devices": 2, "per_device": 2, "accumulation": 1}


def test_a_shared_out_model_is_evaluated_whole() -> None:
    printed = launch("-m", "tests.run_sharded")
    assert "equal in process 0" in printed and "equal in process 1" in printed


TOOLS = {
    "warm start, average and layer decay": [
        *("--decoder_warm_start", "linear_probe", "--warm_start_crops", "8"),
        *("--ema_decay", "0.9", "--layer_decay", "0.8"),
    ],
    "updates of low rank": ["--lora_rank", "2", "--ema_decay", "0.9"],
    "an encoder that is trained later": ["--freeze_encoder", "true", "--unfreeze_at_step", "3"],
    "kept features": ["--freeze_encoder", "true", "--cache_feature_epochs", "2", "--ema_decay", "0.9"],
}


@pytest.mark.parametrize("name", TOOLS)
def test_tools_of_fine_tuning_train_in_two_processes_as_in_one(name, tmp_path) -> None:
    if "--lora_rank" in TOOLS[name]:
        pytest.importorskip("peft")
    more = [*MORE[:-2], *TOOLS[name]]
    launch("-m", "tests.run_training", str(tmp_path / "two"), *more)
    train_segmenter(*parse_training_arguments(words(str(tmp_path / "one"), *more)))
    whole, parts = history(tmp_path / "one", "loss"), history(tmp_path / "two", "loss")
    assert len(whole) == 6 and len(set(whole)) == 6
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-4)
    one, two = (load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "two"))
    assert one.keys() == two.keys()
    for key in one:  # averaged, merged, as they are saved
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=2e-3, msg=lambda text, key=key: f"{key}: {text}")
    best, other = (history(tmp_path / folder, "eval_overall_accuracy") for folder in ("one", "two"))
    np.testing.assert_allclose(best, other, rtol=0, atol=2e-3)
