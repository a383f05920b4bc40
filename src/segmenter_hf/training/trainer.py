"""Trainer for segmentation: augmented crops in, counts of pixels out, checkpoints that are whole."""

import itertools
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from huggingface_hub import CommitInfo
from PIL import Image
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from transformers import (
    AutoModelForSemanticSegmentation,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerState,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, get_last_checkpoint, rotate_checkpoints

from ..data.augmentation import SegmentationAugmentation
from ..data.decoding import decode_example
from ..data.label_sets import LabelSet
from ..evaluation.evaluate import collate_examples, confusion_matrices, save_prediction_grid
from ..evaluation.metrics import MeanIoU
from ..hub.publishing import PREDICTIONS_PICTURE, publish_model
from ..inference.predictor import Predictor
from ..inference.protocol import InferenceProtocol
from ..inference.visualization import training_curves
from ..models.image_processing_segmenter import SegmenterImageProcessor
from ..utils.atomic_files import atomic_write, move_directory


logger = logging.getLogger(__name__)

CURVES_PICTURE = "curves.png"
SHUFFLE_BUFFER = 1000  # rows of a stream that are shuffled at once


class TrainDataset(Dataset):
    """Augmented crops, the same for the same seed, epoch and row whatever the number of workers and processes.

    Args:
        dataset (`datasets.Dataset`): As from `load_segmentation_datasets`.
        label_set (`LabelSet`): Says what the stored labels mean.
        augmentation (`SegmentationAugmentation`): Joint transform of image and mask.
        processor (`BaseImageProcessor`): Normalises the crop.
        seed (`int`): Seed of all draws.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        label_set: LabelSet,
        augmentation: SegmentationAugmentation,
        processor: SegmenterImageProcessor,
        seed: int,
    ) -> None:
        self.dataset = dataset
        self.label_set = label_set
        self.augmentation = augmentation
        self.processor = processor
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()  # workers may live for all epochs

    def set_epoch(self, epoch: int) -> None:
        """Give every epoch its own draws."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`pixel_values` (channels, crop, crop) and `labels` (crop, crop) of one row."""
        return self.crop(self.dataset[index], index)

    def crop(self, row: dict[str, Any], *numbers: int) -> dict[str, torch.Tensor]:
        """An augmented crop of a row; the numbers tell its draws from those of other rows."""
        image, labels = decode_example(row, self.label_set)
        image, labels = self.augmentation(
            image, labels, np.random.default_rng((self.seed, int(self._epoch), *numbers))
        )
        # The labels are reduced already, once, where they were decoded.
        inputs = self.processor(image, labels, do_resize=False, do_split_windows=False, do_reduce_labels=False)
        return {"pixel_values": inputs["pixel_values"][0], "labels": inputs["labels"][0]}


class StreamedTrainingExamples(IterableDataset):
    """[`TrainDataset`] of a stream without end, which begins anew, in another order, when all rows were there.

    It is shuffled in a buffer. Workers share its rows: each row comes once in a visit. As there is one epoch, a run that goes
    on finds its place by passing over as many batches as it had.

    Args:
        examples (`TrainDataset`): What makes crops of rows; its dataset is a `datasets.IterableDataset`.
        share_files (`bool`, defaults to `True`): Whether workers may share the files of the stream, where these are enough.
            Else each reads all rows and makes crops of its own. Of `dataset.take(n)`, files cannot be shared: `datasets`
            would take a part of the n rows from each worker's files, however few they hold.
    """

    def __init__(self, examples: TrainDataset, share_files: bool = True) -> None:
        self.examples = examples
        self.share_files = share_files

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        for epoch in itertools.count():
            rows = self.examples.dataset.shuffle(seed=self.examples.seed + epoch, buffer_size=SHUFFLE_BUFFER)
            if info is not None and not (self.share_files and rows.num_shards >= info.num_workers):
                # A loop over the rows would get those of the worker's files alone; `iter` gives all to each worker.
                batches = itertools.islice(rows.iter(batch_size=1), worker, None, info.num_workers)
                rows = ({name: values[0] for name, values in batch.items()} for batch in batches)
            number = -1
            for number, row in enumerate(rows):
                yield self.examples.crop(row, epoch, worker, number)
            if number < 0:
                return


class _SetEpoch(TrainerCallback):
    """Tells the training set which epoch it is before the workers start."""

    def on_epoch_begin(self, args, state, control, train_dataloader: DataLoader | None = None, **kwargs) -> None:
        if hasattr(train_dataloader.dataset, "set_epoch"):
            train_dataloader.dataset.set_epoch(int((state.epoch or 0) + 1e-6))


class _StopAtNan(TrainerCallback):
    """A loss that is no number ends the training: nothing good comes after it."""

    def on_log(self, args, state, control, logs: dict[str, float] | None = None, **kwargs) -> None:
        for name in ("loss", "train_loss"):  # since the last log; at the end, of all steps, also those of no log
            loss = (logs or {}).get(name, 0.0)
            if not math.isfinite(float(loss)):
                raise FloatingPointError(
                    _nan_message(f"The loss became {loss} at or before step {state.global_step}.")
                )


class _ShowProgress(TrainerCallback):
    """Draws curves and predictions after every evaluation, into the output directory and to the trackers in use."""

    def __init__(self, trainer: "SegmentationTrainer") -> None:
        self.trainer = trainer

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        trainer = self.trainer
        # Parts of a sharded model cannot predict in one process alone.
        if not state.is_world_process_zero or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            return
        if not trainer.is_in_train:
            return
        try:
            self._draw(Path(args.output_dir), state)
        except OSError as error:  # a full disk is a matter of the checkpoints, which say what to do
            logger.warning("The pictures of step %d could not be written: %s.", state.global_step, error)

    def _draw(self, output_dir: Path, state: TrainerState) -> None:
        trainer, curves = self.trainer, training_curves(state.log_history)
        if curves is not None:
            with atomic_write(output_dir / CURVES_PICTURE) as temporary:
                curves.save(temporary)
        trainer.save_predictions(trainer.model, output_dir / PREDICTIONS_PICTURE)
        _report_picture(trainer, output_dir / PREDICTIONS_PICTURE, state.global_step)


def _report_picture(trainer: "SegmentationTrainer", path: Path, step: int) -> None:
    """Send a picture of predictions to the trackers that Trainer reports to."""
    reporters = {type(callback).__name__: callback for callback in trainer.callback_handler.callbacks}
    if "TensorBoardCallback" in reporters and reporters["TensorBoardCallback"].tb_writer is not None:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        reporters["TensorBoardCallback"].tb_writer.add_image("eval/predictions", pixels, step, dataformats="HWC")
    if "WandbCallback" in reporters:
        import wandb

        wandb.log({"eval/predictions": wandb.Image(str(path)), "train/global_step": step})
    if "TrackioCallback" in reporters:
        import trackio

        trackio.log({"eval/predictions": trackio.Image(str(path)), "train/global_step": step})


class SegmentationTrainer(Trainer):
    """Trainer that evaluates with the published protocol at original size and never holds the logits of a dataset.

    The training set is a [`TrainDataset`], the evaluation set an [`EvaluationDataset`]. Each evaluated image
    becomes one (num_labels, num_labels) matrix of counts; these are gathered over all processes and added up. With
    several processes the loss is the mean over the pixels of all of them, as one process has it with the whole batch. A
    checkpoint is written under another name and moved when it is complete.

    Args:
        label_set (`LabelSet`): The classes.
        window_batch_size (`int`, defaults to 8): Windows that go through the network at once in evaluation.
        kwargs: Arguments of `Trainer`; `processing_class` is the image processor.
    """

    def __init__(self, *, label_set: LabelSet, window_batch_size: int = 8, **kwargs: Any) -> None:
        self.label_set = label_set
        self.window_batch_size = window_batch_size
        self.metric = MeanIoU(label_set.num_labels, label_set.ignore_index)
        self._partial: Path | None = None
        self._whole_model: PreTrainedModel | None = None
        super().__init__(compute_metrics=self.update_metric, **kwargs)
        for callback in (_SetEpoch(), _StopAtNan(), _ShowProgress(self)):
            self.add_callback(callback)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's optimiser, with a learning rate of their own for the heads where the arguments say so."""
        if self.optimizer is None and self._has_head_rate:
            model = self.model if model is None else model
            optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args, model)
            decayed = set(self.get_decay_parameter_names(model))
            self.optimizer = optimizer_class(self.parameter_groups(model, decayed), **arguments)
        return super().create_optimizer(model)

    @property
    def _has_head_rate(self) -> bool:
        return getattr(self.args, "head_learning_rate_factor", 1.0) != 1

    def parameter_groups(self, model: torch.nn.Module, decayed: set[str]) -> list[dict[str, Any]]:
        """Parameters by whether they are of a head, which learn at a rate of their own, and whether they decay."""
        groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                is_head = any(part in ("decode_head", "auxiliary_heads") for part in name.split("."))
                groups.setdefault((is_head, name in decayed), []).append(parameter)
        rate = self.args.learning_rate
        return [
            {
                "params": parameters,
                "lr": rate * self.args.head_learning_rate_factor if is_head else rate,
                "weight_decay": self.args.weight_decay if decays else 0.0,
            }
            for (is_head, decays), parameters in groups.items()
        ]

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Trainer's schedule. Where heads have a rate of their own, all rates of the polynomial one end at the same value.

        That is the law of mmsegmentation's `PolyLR`, whose `eta_min` holds for every group of parameters.
        """
        if self.lr_scheduler is None and self.args.lr_scheduler_type == "polynomial" and self._has_head_rate:
            optimizer = self.optimizer if optimizer is None else optimizer
            shape = {
                "num_steps": num_training_steps,
                "num_warmup_steps": self.args.get_warmup_steps(num_training_steps),
                "power": self.args.lr_scheduler_kwargs["power"],
            }
            final_rate = self.args.lr_scheduler_kwargs["lr_end"]
            factors = [
                partial(polynomial_factor, final_factor=final_rate / group["lr"], **shape)
                for group in optimizer.param_groups
            ]
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def get_train_dataloader(self) -> DataLoader:
        """Trainer's loader. Workers that live for all epochs draw from a generator of its own.

        A run that goes on starts them once more, and must not draw from the one of the model for that.
        """
        loader = super().get_train_dataloader()
        if self.args.dataloader_persistent_workers:
            getattr(loader, "base_dataloader", loader).generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The loss of this process, weighted by its share of the pixels that count.

        The mean over processes, which is what they exchange, is then the mean over all pixels. A Dice loss is no mean
        over pixels: with it the processes count alike.
        """
        labels = inputs["labels"]
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        config = self.accelerator.unwrap_model(model).config
        if self.args.world_size > 1 and not config.semantic_loss_dice_weight:
            weights = torch.ones(self.label_set.num_labels, device=labels.device, dtype=torch.float64)
            if config.semantic_loss_class_weights is not None:
                weights = weights.new_tensor(config.semantic_loss_class_weights)
            weight = weights[labels[labels != self.label_set.ignore_index]].sum()
            mean_weight = self.accelerator.reduce(weight, reduction="mean")
            loss = loss * torch.where(mean_weight > 0, weight / mean_weight, 0.0).to(loss.dtype)
        return (loss, outputs) if return_outputs else loss

    def get_eval_dataloader(self, eval_dataset: Dataset | str | None = None) -> DataLoader:
        """A loader of whole images, which are collated as lists."""
        training_collator, self.data_collator = self.data_collator, collate_examples
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training_collator

    def unwrapped_model(self, mixed_precision: bool = True) -> PreTrainedModel:
        """The model as a process can run it alone; all processes must ask for it at once where FSDP shares it out.

        Processes evaluate images of different sizes, so they cannot go through the layers in step. Without
        `mixed_precision` it computes as it will be saved, from then on.
        """
        if self.is_fsdp_enabled:
            return gathered_copy(self.model)
        return self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=mixed_precision)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Trainer's loop, with the whole model at hand."""
        self._whole_model = self.unwrapped_model()
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self._whole_model = None

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: Sequence[str] | None = None,
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """No loss, the count matrix of each image, and its number of counted pixels."""
        with self.compute_loss_context_manager():
            predictor = self.predictor(self._whole_model)
            counts = confusion_matrices(predictor, inputs["images"], inputs["label_maps"]).to(self.args.device)
        return None, counts, counts.sum((1, 2))

    def update_metric(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        """Add the counts of a batch; after the last one give the scores."""
        self.metric.add_confusion_matrix(torch.as_tensor(prediction.predictions).sum(0))
        if not compute_result:
            return {}
        scores = self.metric.compute()
        return {name: scores[name] for name in ("mean_iou", "mean_accuracy", "overall_accuracy")}

    def predictor(self, model: PreTrainedModel) -> Predictor:
        """A whole model with what belongs to it, for the single-scale protocol."""
        protocol = InferenceProtocol(window_batch_size=self.window_batch_size)
        return Predictor(model, self.processing_class, self.label_set, protocol)

    def save_predictions(self, model: PreTrainedModel, path: Path) -> None:
        """Draw the first images of the evaluation set with truth and prediction of a whole model."""
        save_prediction_grid(self.predictor(model), self.eval_dataset, path)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | None:
        """Push the repository that `scripts/publish.py` makes of the output directory, in one commit."""
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        return publish_model(
            self.args.output_dir,
            self.hub_model_id,
            private=private if private is not None else self.args.hub_private_repo,
            revision=revision or self.args.hub_revision,
            token=token,
            commit_message=commit_message,
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's saving, of what is finite only.

        Raises:
            FloatingPointError: If a weight is NaN or infinite.
        """
        for name, tensor in itertools.chain(self.model.named_parameters(), self.model.named_buffers()):
            if not torch.isfinite(getattr(tensor, "to_local", tensor.detach)()).all():  # a part, with FSDP
                raise FloatingPointError(_nan_message(f"`{name}` is not finite at step {self.state.global_step}."))
        super().save_model(output_dir, _internal_call)

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._partial is None else str(self._partial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save a checkpoint under another name, and give it its own when all processes have written their part."""
        run_dir, name = Path(self._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with self._explained(run_dir):
            if self.args.should_save:
                remove_partial_checkpoints(run_dir)
            self.accelerator.wait_for_everyone()
            self._partial = run_dir / f".{name}-partial"
            try:
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.state.best_model_checkpoint == str(self._partial / name):
                    self.state.best_model_checkpoint = str(run_dir / name)
                if self.args.should_save:
                    self.state.save_to_json(str(self._partial / name / TRAINER_STATE_NAME))
                    move_directory(self._partial / name, run_dir / name, self._partial / "old")
            finally:
                if self.args.should_save:
                    shutil.rmtree(self._partial, ignore_errors=True)
                self._partial = None
            if self.args.should_save:
                best = self.state.best_model_checkpoint
                rotate_checkpoints(str(run_dir), self.args.save_total_limit, best_model_checkpoint=best)
            self.accelerator.wait_for_everyone()

    @contextmanager
    def _explained(self, run_dir: Path) -> Iterator[None]:
        """Errors of writing a checkpoint, with what is left and what to do."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            last = last_checkpoint(run_dir)
            free = shutil.disk_usage(run_dir if run_dir.exists() else Path.cwd()).free / 2**20
            raise OSError(
                f"The checkpoint of step {self.state.global_step} could not be written to {run_dir}, where {free:.0f} MB are "
                f"free: {error}. "
                + (
                    f"The last complete one is {last}. Make room and run the same command to go on from it."
                    if last
                    else "There is no complete one yet. Make room and run the same command."
                )
            ) from error


def polynomial_factor(step: int, *, num_steps: int, num_warmup_steps: int, power: float, final_factor: float) -> float:
    """Factor of a learning rate at a step: linear from 0 in the warm-up, then polynomial from 1 to `final_factor`."""
    if step < num_warmup_steps:
        return step / num_warmup_steps
    left = max(0.0, 1 - (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps))
    return left**power * (1 - final_factor) + final_factor


def gathered_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy on this device of a model that FSDP shares out over the processes, all of which must call this at once."""
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    copy = AutoModelForSemanticSegmentation.from_config(model.config)
    copy.load_state_dict(weights)
    return copy.to(model.device).eval()


def last_checkpoint(run_dir: str | Path) -> str | None:
    """The newest checkpoint of a run; those that are being written have other names."""
    return get_last_checkpoint(str(run_dir)) if Path(run_dir).is_dir() else None


def remove_partial_checkpoints(run_dir: Path) -> None:
    """Delete what killed runs have left of checkpoints that they were writing."""
    for leftover in run_dir.glob(f".{PREFIX_CHECKPOINT_DIR}-*-partial"):
        shutil.rmtree(leftover)


def _nan_message(what: str) -> str:
    return (
        f"{what} No checkpoint was written since. Start again in another --output_dir with a lower --learning_rate, with "
        "--warmup_steps, with --max_grad_norm 1, or with --bf16 instead of --fp16."
    )
