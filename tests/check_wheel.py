"""Run every subcommand of an installed package from an empty directory, without extras and without the repository.

    python tests/check_wheel.py ENVIRONMENT/bin/segmenter-hf

`make test-wheel` builds the wheel, installs it into an environment of its own, and calls this. Nothing of the package is
imported here, so any Python can run it.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path


TRAIN = (
    "train --dataset_name scenes --output_dir model --model_size tiny --scenes_train 4 --scenes_validation 2 --max_steps 2 "
    "--image_size 64 --crop_size 48 --use_cpu --eval_strategy no --save_strategy no --load_best_model_at_end false "
    "--config_overrides num_hidden_layers=2"
)
# Each command, and a pattern of what it prints; one that begins with `^error: `: it fails with a line that says what to do.
COMMANDS = [
    ("--help", "usage:"),
    ("--version", "segmenter-hf"),
    ("models", "seg-b-mask-16-ade20k"),
    ("draw-scenes --num_images 2 --output_dir drawn", ""),
    (TRAIN, "Mean IoU"),
    ("evaluate --model_name_or_path model --dataset_name scenes --max_samples 2 --output_dir evaluation", "Mean IoU"),
    ("predict --model_name_or_path model --images drawn/images --output_dir predictions", "predictions"),
    ("predict --model_name_or_path model --output_dir sample", "sample"),
    ("predict --model_name_or_path not-there --images drawn/images --output_dir x", "^error: .*segmenter-hf models"),
    (
        "predict --model_name_or_path seg-b-mask-16-ade20k --images drawn/images --output_dir x",
        "^error: .*segmenter-hf convert",
    ),
    ("predict --model_name_or_path model --images not-there.png --output_dir x", "^error: "),
    ("evaluate --model_name_or_path model --dataset_name not-there --output_dir x", "^error: "),
    ("train --dataset_name not-there --output_dir x", "^error: "),
    ("publish --checkpoint_dir not-there --output_dir x --dry_run", "^error: "),
    ("draw-scenes --num_images 0 --output_dir x", "^error: "),
    ("publish --checkpoint_dir model --output_dir repository --dry_run", "repository"),
    ("estimate --recipe scenes", ""),
    ("convert --checkpoint_path nothing.pth --output_dir x", "^error: "),
    ("export --model_name_or_path model --output_dir onnx", "^error: "),  # needs an extra, and says which
    ("demo --model_name_or_path model", "^error: "),
]


def main() -> None:
    program = Path(sys.argv[1]).absolute()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        for line, expected in COMMANDS:
            command = [program, *shlex.split(line)]
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
            printed = done.stdout + done.stderr
            good = done.returncode == int(expected.startswith("^error: ")) and re.search(
                expected, printed, re.MULTILINE
            )
            good = good and "Traceback" not in printed
            print(f"{'ok  ' if good else 'FAIL'} segmenter-hf {line}")
            if not good:
                raise SystemExit(f"exit code {done.returncode}\n{printed}")
        results = json.loads((Path(folder) / "evaluation" / "results.json").read_text(encoding="utf-8"))
        assert 0 <= results["mean_iou"] <= 1 and results["num_images"] == 2, results
        print(f"{len(COMMANDS)} passed, 0 failed")


if __name__ == "__main__":
    main()
