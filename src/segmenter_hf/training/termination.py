"""A checkpoint when the process is told to end (SIGTERM), as Slurm and Kubernetes do some time before they kill it."""

import atexit
import multiprocessing
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


if TYPE_CHECKING:
    from .trainer import SegmentationTrainer


EVALUATION_DUE = "evaluation_due"  # in an entry of the log of a checkpoint whose evaluation was left out


class TrainingTerminated(Exception):
    """Training was told to end by SIGTERM, and wrote a checkpoint.

    Args:
        checkpoint (`Path`): Directory of the checkpoint.
        step (`int`): Its step.
    """

    def __init__(self, checkpoint: Path, step: int) -> None:
        super().__init__(f"Step {step} is saved in {checkpoint}, from which training can resume.")
        self.checkpoint, self.step = checkpoint, step


class EvaluationTerminated(Exception):
    """The evaluation of a step was cut short by SIGTERM; its checkpoint is not written yet."""


class SaveAtTermination(TrainerCallback):
    """After SIGTERM ends the step at work, writes a checkpoint and raises [`TrainingTerminated`].

    transformers' `enable_jit_checkpoint` waits for three seconds, writes under the final name, and lets an evaluation and
    the end of training follow. Several processes agree after each step, because all of them write a checkpoint together.
    An evaluation that was due at the step is left out and made up for when training resumes.
    """

    def __init__(self, trainer: "SegmentationTrainer") -> None:
        self.trainer = trainer
        self.is_requested = False

    @contextmanager
    def handling_sigterm(self) -> Iterator[None]:
        """Note SIGTERM in the block instead of ending; in threads other than the main one signals stay as they are."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.is_requested = False
        previous = signal.signal(signal.SIGTERM, self._request)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)

    def _request(self, *_: Any) -> None:
        self.is_requested = True

    def _is_agreed(self) -> bool:
        """Whether any process was told to end; all of them must ask at once."""
        args = self.trainer.args
        if args.world_size == 1:
            return self.is_requested
        requests = torch.tensor(float(self.is_requested), device=args.device)
        return bool(self.trainer.accelerator.reduce(requests, reduction="sum") > 0)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer, due = self.trainer, [entry for entry in state.log_history if EVALUATION_DUE in entry]
        if trainer.resumed_from is None or not due:
            return
        state.log_history = [entry for entry in state.log_history if entry not in due]
        if trainer._determine_best_metric(trainer._evaluate(None, None), trial=None):
            state.best_model_checkpoint = trainer.resumed_from

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Its evaluation, if one is due, is begun and cut short: it draws a random number that the checkpoint must have.
        ends_epoch = args.eval_strategy == "epoch" and float(state.epoch).is_integer()
        if self._is_agreed() and not ends_epoch:
            control.should_save = True

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._is_agreed():
            control.should_save = True

    def on_prediction_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Several processes have the same number of steps, but cannot agree in each: they finish the evaluation.
        if self.is_requested and args.world_size == 1 and self.trainer.is_in_train:
            raise EvaluationTerminated

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._is_agreed():
            end_training(self.trainer)


def note_due_evaluation(trainer: "SegmentationTrainer") -> None:
    """Have the next checkpoint say that its step was not evaluated."""
    state = trainer.state
    state.log_history.append({"epoch": state.epoch, "step": state.global_step, EVALUATION_DUE: True})


def end_training(trainer: "SegmentationTrainer") -> NoReturn:
    """Raise [`TrainingTerminated`] for the checkpoint that was just written."""
    step = trainer.state.global_step
    raise TrainingTerminated(Path(trainer.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}", step)


def shield_workers(loader: DataLoader) -> DataLoader:
    """Let the workers of a loader ignore SIGTERM, which a batch system sends to all processes of a job.

    They end when the loader does, or when its process is gone. Where something still holds the loader as the process ends, such as
    the traceback of an error, Python would send them the signal that they ignore, and wait for ever.
    """
    atexit.unregister(_kill_workers)
    atexit.register(_kill_workers)  # after the import of multiprocessing, and so before its own function
    base = getattr(loader, "base_dataloader", loader)
    base.worker_init_fn = _IgnoreSigterm(base.worker_init_fn)
    return loader


def _kill_workers() -> None:
    """Kill the processes that Python would terminate now, without torch taking that for a failure."""
    if hasattr(signal, "SIGCHLD"):  # not on Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


class _IgnoreSigterm:
    """A function for the start of workers that can be sent to them."""

    def __init__(self, then: Any) -> None:
        self.then = then

    def __call__(self, worker_id: int) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self.then is not None:
            self.then(worker_id)
