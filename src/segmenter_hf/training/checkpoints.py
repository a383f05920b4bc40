"""Checkpoints of a run: which one to resume from, and how one is written completely or not at all."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints
from transformers.utils import SAFE_WEIGHTS_NAME

from ..inference.model_files import RECIPE_FILE
from ..inference.model_loading import describe_keys, is_out_of_memory
from ..utils.atomic_files import move_directory
from ..utils.folders import lies_within
from ..utils.json_files import check_types, read_json_object
from ..utils.messages import one_line
from .arguments import SegmentationTrainingArguments
from .recipes import check_same_run


if TYPE_CHECKING:
    from .trainer import SegmentationTrainer


STATE_TYPES = {"epoch": float | None, "global_step": int, "log_history": list, "best_model_checkpoint": str | None}
TRACKER_FOLDERS = ("runs", "wandb", "mlruns")  # what may be in an output directory before the run is noted there


def find_checkpoint(training_args: SegmentationTrainingArguments, recipe: dict[str, Any]) -> str | None:
    """Find the checkpoint to resume from, if there is one; nothing is changed yet.

    Returns:
        `str`, *optional*: The directory of the checkpoint.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        FileExistsError: If the output directory holds files that are of no run, and they may not be replaced.
        ValueError: If it holds a run with other arguments, or the checkpoint to resume from would be deleted.
    """
    output_dir, checkpoint = Path(training_args.output_dir), training_args.resume_from_checkpoint
    is_replaced = training_args.overwrite_output_dir
    if is_replaced and checkpoint is not None and lies_within(checkpoint, output_dir):
        raise ValueError(f"`overwrite_output_dir` would delete {checkpoint}, from which to resume: leave out one.")
    if checkpoint is not None and not Path(checkpoint).is_dir():
        raise FileNotFoundError(
            f"{checkpoint}: no such checkpoint. Give a directory such as {output_dir / PREFIX_CHECKPOINT_DIR}-100, or leave out "
            f"`resume_from_checkpoint`: a run resumes from its last one."
        )
    if is_replaced:
        return checkpoint
    if not (output_dir / RECIPE_FILE).is_file():
        names = sorted(path.name for path in output_dir.iterdir()) if output_dir.is_dir() else []
        if found := [name for name in names if not name.startswith(".") and name not in TRACKER_FOLDERS]:
            raise FileExistsError(
                f"{output_dir} holds files that are of no run: {', '.join(found[:5])}. Give another `output_dir`, or "
                "`overwrite_output_dir` to replace those whose names the run needs."
            )
    elif checkpoint is None:
        checkpoint = last_checkpoint(output_dir)
        if (
            checkpoint is not None or (output_dir / SAFE_WEIGHTS_NAME).is_file()
        ):  # a run that failed at once left neither
            check_same_run(output_dir, recipe)
        if checkpoint is not None and training_args.should_save:
            print(f"Resuming from {checkpoint}; `overwrite_output_dir` starts again.")
    return checkpoint


def last_checkpoint(run_dir: str | Path) -> str | None:
    """The newest checkpoint of a run; those that are being written have other names."""
    return get_last_checkpoint(str(run_dir)) if Path(run_dir).is_dir() else None


@contextmanager
def reading_checkpoint(checkpoint: str | None) -> Iterator[None]:
    """Whatever a checkpoint raises that is damaged or of another model, as a `ValueError` that names it.

    Its files go through torch, safetensors and readers of JSON, each of which fails in ways of its own.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"{checkpoint}: training cannot resume from it, for it is damaged or of another model. Give another "
            f"`resume_from_checkpoint`, or `overwrite_output_dir` to start again. {type(error).__name__}: {one_line(error)}"
        ) from error


def check_state(checkpoint: str) -> None:
    """Refuse a checkpoint whose state of the Trainer is none.

    Raises:
        OSError: If it is not there.
        ValueError: If it holds something else.
    """
    path = Path(checkpoint) / TRAINER_STATE_NAME
    content = read_json_object(path)
    check_types(path, vars(TrainerState(**content)), STATE_TYPES)


def check_loaded(missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Refuse a checkpoint whose weights are not those of the model.

    Raises:
        ValueError: If some are missing or left over.
    """
    if described := describe_keys({"missing": missing, "left over": unexpected}):
        raise ValueError(f"the weights are of another model: {described}")


def remove_partial_checkpoints(run_dir: Path) -> None:
    """Delete what killed runs have left of checkpoints that they were writing."""
    for leftover in run_dir.glob(f".{PREFIX_CHECKPOINT_DIR}-*-partial"):
        shutil.rmtree(leftover)


@contextmanager
def writing_checkpoint(trainer: "SegmentationTrainer", checkpoint: Path) -> Iterator[Path]:
    """The folder for a checkpoint, which gets its own name after the block, when all processes have written their part.

    Args:
        trainer ([`SegmentationTrainer`]): The trainer.
        checkpoint (`Path`): What the checkpoint is called in the end, in the output directory of the run.

    Raises:
        OSError: If it cannot be written; says what is left and what to do.
    """
    run_dir, name, state = checkpoint.parent, checkpoint.name, trainer.state
    should_save, wait = trainer.args.should_save, trainer.accelerator.wait_for_everyone
    partial = run_dir / f".{name}-partial"
    with explain_writing_errors(run_dir, state.global_step):
        if should_save:
            shutil.rmtree(partial, ignore_errors=True)  # of a killed run at this step
        wait()
        try:
            yield partial
            wait()
            if state.best_model_checkpoint == str(partial / name):
                state.best_model_checkpoint = str(checkpoint)
            if should_save:
                state.save_to_json(str(partial / name / TRAINER_STATE_NAME))
                if trainer.average is not None:
                    trainer.average.save(partial / name)
                move_directory(partial / name, checkpoint, partial / "old")
        finally:
            if should_save:
                shutil.rmtree(partial, ignore_errors=True)
        if should_save:
            best = state.best_model_checkpoint
            rotate_checkpoints(str(run_dir), trainer.args.save_total_limit, best_model_checkpoint=best)
        wait()


@contextmanager
def explain_writing_errors(run_dir: Path, step: int) -> Iterator[None]:
    """Errors of writing a checkpoint, with what is left and what to do."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        last = last_checkpoint(run_dir)
        free = shutil.disk_usage(run_dir if run_dir.exists() else Path.cwd()).free / 2**20
        raise OSError(
            f"The checkpoint of step {step} could not be written to {run_dir}, where {free:.0f} MB are free: {error}. "
            + (
                f"The last complete one is {last}. Make room and run the same command to resume from it."
                if last
                else "There is no complete one yet. Make room and run the same command."
            )
        ) from error
