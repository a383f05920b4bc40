"""Trains a tiny model on a few scenes, for the tests that start processes: `python -m tests.run_training DIR ARGUMENT...`."""

import sys
from pathlib import Path

from segmenter_hf.cli.errors import cli_main
from segmenter_hf.cli.train import parse_training_arguments
from segmenter_hf.training.run import train_segmenter


TINY = (
    "patch_size=8,hidden_size=32,num_attention_heads=2,intermediate_size=64,num_hidden_layers=2,"
    "decoder_num_hidden_layers=1"
)
ARGUMENTS = {
    "config_overrides": TINY,
    "scenes_train": 8,
    "scenes_validation": 3,
    "image_size": 64,
    "crop_size": 48,
    "window_stride": 32,
    "total_batch_size": 2,
    "learning_rate": 1e-3,
    "num_train_epochs": 3,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "logging_steps": 1,
}


def words(output_dir: str, *more: str) -> list[str]:
    """The command line of a tiny run on the CPU."""
    given = [word for name, value in ARGUMENTS.items() for word in (f"--{name}", str(value))]
    return [*given, "--use_cpu", "--disable_tqdm", "true", "--output_dir", output_dir, *more]


@cli_main
def main() -> None:
    train_segmenter(*parse_training_arguments(words(*sys.argv[1:])))


def gloo_threads() -> list[str]:
    """Threads of the process group, where the system tells them."""
    names = (path.read_text(encoding="utf-8") for path in Path("/proc/self/task").glob("*/comm"))
    return [name.strip() for name in names if "gloo" in name]


if __name__ == "__main__":
    main()
    assert not gloo_threads(), "they could abort the interpreter as it ends"
