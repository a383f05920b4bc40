"""Callbacks of the Trainer: epochs for the training set, images of the progress, an end at a loss that is NaN."""

import logging
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..evaluation.evaluate import save_prediction_grid
from ..hub.publishing import PREDICTIONS_IMAGE
from ..inference.visualization import training_curves
from ..utils.atomic_files import atomic_write
from ..utils.json_files import read_json_object
from .averaging import WeightAverage
from .checkpoints import remove_partial_checkpoints
from .recipes import save_recipe


if TYPE_CHECKING:
    from .trainer import SegmentationTrainer


logger = logging.getLogger(__name__)

CURVES_IMAGE = "curves.png"


class StartRun(TrainerCallback):
    """Deletes what the run replaces and notes what is trained, now that no mistake in the arguments can end it."""

    def __init__(self, recipe: dict[str, Any], alone: bool = True) -> None:
        self.recipe, self.alone = recipe, alone

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not args.should_save:
            return
        output_dir = Path(args.output_dir)
        if self.alone:
            remove_partial_checkpoints(output_dir)
        if args.overwrite_output_dir:
            for old in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-[0-9]*"):
                shutil.rmtree(old)
        save_recipe(output_dir, self.recipe)
        batch = self.recipe["batch"]
        print(
            f"Batch {args.effective_batch_size} = {batch['devices']} devices x {batch['per_device']} crops x "
            f"{batch['accumulation']} accumulated."
        )


class SetEpoch(TrainerCallback):
    """Tells the training set which epoch it is before the workers start."""

    def on_epoch_begin(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: DataLoader | None = None,
        **kwargs: Any,
    ) -> None:
        if train_dataloader is not None and hasattr(train_dataloader.dataset, "set_epoch"):
            train_dataloader.dataset.set_epoch(int((state.epoch or 0) + 1e-6))


class FindBestCheckpoint(TrainerCallback):
    """Finds the best checkpoint of a run whose folder was moved: the state has its old path, which Trainer drops."""

    def __init__(self, trainer: "SegmentationTrainer") -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        resumed_from = self.trainer.resumed_from
        if resumed_from is None or state.best_model_checkpoint is not None:
            return
        stored = read_json_object(Path(resumed_from) / TRAINER_STATE_NAME).get("best_model_checkpoint")
        if stored is not None and (moved := Path(args.output_dir, Path(stored).name)).is_dir():
            state.best_model_checkpoint = str(moved)


class StopEarly(EarlyStoppingCallback):
    """Ends the training after some evaluations without a better one, those before an interruption among them."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        stored: Any = state.stateful_callbacks or {}  # of the checkpoint, where one is resumed from
        count = stored.get(type(self).__name__, self.state())["attributes"]["early_stopping_patience_counter"]
        self.early_stopping_patience_counter = count
        control.should_training_stop = count >= self.early_stopping_patience


class AverageWeights(TrainerCallback):
    """Averages the weights after each step, and ends the training with the average in the model."""

    def __init__(self, trainer: "SegmentationTrainer", decay: float) -> None:
        self.trainer = trainer
        self.decay = decay

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer.average = WeightAverage(trainer.model, self.decay)
        if trainer.resumed_from is not None:
            trainer.average.load(trainer.resumed_from)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.average is not None:
            self.trainer.average.update(state.global_step)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.average is not None:
            self.trainer.average.copy_to_model()
        self.trainer.average = None


class StopAtNan(TrainerCallback):
    """A loss that is no number ends the training: nothing good comes after it."""

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        for name in ("loss", "train_loss"):  # since the last log; at the end, of all steps, also those of no log
            loss = (logs or {}).get(name, 0.0)
            if not math.isfinite(float(loss)):
                raise FloatingPointError(nan_message(f"The loss became {loss} at or before step {state.global_step}."))


class ShowProgress(TrainerCallback):
    """Draws curves and predictions after every evaluation, into the output directory and to the trackers in use."""

    def __init__(self, trainer: "SegmentationTrainer") -> None:
        self.trainer = trainer

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self.trainer
        # Parts of a sharded model cannot predict in one process alone.
        if not state.is_world_process_zero or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            return
        if not trainer.is_in_train:
            return
        try:
            self._draw(Path(args.output_dir), state)
        except OSError as error:  # a full disk is a matter of the checkpoints, which say what to do
            logger.warning("The images of step %d could not be written: %s.", state.global_step, error)

    def _draw(self, output_dir: Path, state: TrainerState) -> None:
        trainer, curves = self.trainer, training_curves(state.log_history)
        if curves is not None:
            with atomic_write(output_dir / CURVES_IMAGE) as temporary:
                curves.save(temporary)
        save_predictions(trainer, trainer.model, output_dir / PREDICTIONS_IMAGE)
        _report_image(trainer, output_dir / PREDICTIONS_IMAGE, state.global_step)


def save_predictions(trainer: "SegmentationTrainer", model: PreTrainedModel, path: Path) -> None:
    """Draw the first images of the evaluation set with truth and prediction of a whole model."""
    with trainer.averaged_weights():
        save_prediction_grid(trainer.predictor(model), trainer.eval_dataset, path)


def _report_image(trainer: "SegmentationTrainer", path: Path, step: int) -> None:
    """Send an image of predictions to the trackers that Trainer reports to."""
    reporters = {type(callback).__name__: callback for callback in trainer.callback_handler.callbacks}
    if "TensorBoardCallback" in reporters and reporters["TensorBoardCallback"].tb_writer is not None:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        reporters["TensorBoardCallback"].tb_writer.add_image("eval/predictions", pixels, step, dataformats="HWC")
    if "WandbCallback" in reporters:
        import wandb  # type: ignore[import-not-found]  # there where Trainer reports to it

        wandb.log({"eval/predictions": wandb.Image(str(path)), "train/global_step": step})
    if "TrackioCallback" in reporters:
        import trackio  # type: ignore[import-not-found]  # as above

        trackio.log({"eval/predictions": trackio.Image(str(path)), "train/global_step": step})


def nan_message(what: str) -> str:
    return (
        f"{what} No checkpoint was written since. Start again in another `output_dir` with a lower `learning_rate`, with "
        "`warmup_steps`, with a `max_grad_norm` of 1, or with `bf16` instead of `fp16`."
    )
