"""Trainer for segmentation: augmented crops in, counts of pixels out, checkpoints that are whole."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import CommitInfo
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoModelForSemanticSegmentation,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput

from ..data.label_sets import LabelSet
from ..evaluation.evaluate import EvaluationDataset, collate_examples, confusion_matrices
from ..evaluation.metrics import ConfusionMatrix
from ..hub.publishing import publish_model
from ..inference.predictor import Predictor
from ..inference.protocol import InferenceProtocol
from ..models.image_processing_segmenter import SegmenterImageProcessor
from ..models.modeling_vit_encoder import VitEncoderPreTrainedModel
from .arguments import METRICS, SegmentationTrainingArguments
from .averaging import WeightAverage
from .callbacks import AverageWeights, FindBestCheckpoint, SetEpoch, ShowProgress, StopAtNan, StopEarly, nan_message
from .checkpoints import check_loaded, check_state, reading_checkpoint, writing_checkpoint
from .features import encoder_replaced_by
from .freezing import FreezeEncoder
from .optimization import decays, has_own_rates, loss_share, loss_weight, parameter_groups, polynomial_scheduler
from .termination import EvaluationTerminated, SaveAtTermination, end_training, note_due_evaluation, shield_workers


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

    args: SegmentationTrainingArguments
    model: VitEncoderPreTrainedModel
    processing_class: SegmenterImageProcessor
    train_dataset: Any  # a `TrainDataset`, a stream of its crops, or `CachedFeatures`
    eval_dataset: EvaluationDataset

    def __init__(self, *, label_set: LabelSet, window_batch_size: int = 8, **kwargs: Any) -> None:
        self.label_set = label_set
        self.window_batch_size = window_batch_size
        self.counts = ConfusionMatrix(label_set.num_labels, label_set.ignore_index)
        self._partial: Path | None = None
        self._unwrapped_model: PreTrainedModel | None = None
        self.resumed_from: str | None = None  # the checkpoint, once it is loaded
        super().__init__(compute_metrics=self.update_metric, **kwargs)  # type: ignore[arg-type]  # with batch_eval_metrics
        self.average: WeightAverage | None = None
        self._freezing: FreezeEncoder | None = None
        self._termination = SaveAtTermination(self)
        if getattr(self.args, "freeze_encoder", False):
            self._freezing = FreezeEncoder(self.model.base_model, self.args.unfreeze_at_step)
        for callback in segmentation_callbacks(self, self._freezing, self._termination):
            self.add_callback(callback)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Parameters that weight decay is for: see [`decays`]."""
        return [name for name, parameter in model.named_parameters() if decays(name, parameter)]

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's optimizer, with learning rates of their own for heads and layers where the arguments say so."""
        if self.optimizer is None and has_own_rates(self.args):
            model = self.model if model is None else cast(VitEncoderPreTrainedModel, model)
            optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(parameter_groups(model, self.args), **arguments)
        return super().create_optimizer(model)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Trainer's schedule, but for the polynomial one: see [`polynomial_scheduler`]."""
        if self.lr_scheduler is None and self.args.lr_scheduler_type == "polynomial":
            optimizer = cast(torch.optim.Optimizer, self.optimizer if optimizer is None else optimizer)
            self.lr_scheduler = polynomial_scheduler(optimizer, self.args, num_training_steps)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def get_train_dataloader(self) -> DataLoader:
        """Trainer's loader, whose workers do not end with the process that is told to."""
        return shield_workers(with_own_generator(super().get_train_dataloader(), self.args))

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, torch.Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor | None]:
        """The batches of a step, and what they weigh together, those of the other processes included.

        In place of Trainer's number of items, which would count ignored pixels: see [`loss_weight`].
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        weight = torch.stack([loss_weight(batch["labels"], self.model.config) for batch in batches]).sum().to(device)
        return batches, self.accelerator.reduce(weight, reduction="sum") if self.args.world_size > 1 else weight

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch, weighted by its share of what all batches of the step weigh.

        A step then follows the mean over the pixels of the effective batch, however it is divided among processes and
        accumulated batches: Trainer averages over both.
        """
        if self._freezing is not None:
            self._freezing.keep_in_eval_mode()
        whole = self.accelerator.unwrap_model(model)
        with encoder_replaced_by(whole, inputs) if "features" in inputs else nullcontext(inputs) as model_inputs:
            loss, outputs = super().compute_loss(model, model_inputs, return_outputs=True)
        if num_items_in_batch is not None:
            parts = self.current_gradient_accumulation_steps * self.args.world_size
            share = loss_share(inputs["labels"], self.model.config, torch.as_tensor(num_items_in_batch))
            loss = loss * (share * parts).to(loss.dtype)
        return (loss, outputs) if return_outputs else loss

    def get_eval_dataloader(self, eval_dataset: Dataset | str | None = None) -> DataLoader:
        """A loader of whole images, which are collated as lists."""
        with collating_images(self):
            return shield_workers(super().get_eval_dataloader(eval_dataset))

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """As [`get_eval_dataloader`], for `predict`."""
        with collating_images(self):
            return super().get_test_dataloader(test_dataset)

    def unwrapped_model(self, mixed_precision: bool = True) -> PreTrainedModel:
        """The model as a process can run it alone; all processes must ask for it at once where FSDP shares it out.

        Processes evaluate images of different sizes, so they cannot go through the layers in step. Without
        `mixed_precision` it computes as it will be saved, from then on.
        """
        if self.is_fsdp_enabled:
            return gathered_copy(self.model)
        return self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=mixed_precision)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Trainer's loop, with the whole model available, and without the counts of an evaluation that was interrupted."""
        self.counts.reset()
        self._unwrapped_model = self.unwrapped_model()
        try:
            with self.averaged_weights():
                return super().evaluation_loop(*args, **kwargs)
        finally:
            self._unwrapped_model = None

    def averaged_weights(self) -> AbstractContextManager[None]:
        """The model with the averaged weights, where they are averaged, and with its own ones afterwards."""
        return nullcontext() if self.average is None else self.average.applied()

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: Sequence[str] | None = None,
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """No loss, the count matrix of each image, and its number of counted pixels."""
        with self.compute_loss_context_manager():
            predictor = self.predictor(cast(PreTrainedModel, self._unwrapped_model))
            counts = confusion_matrices(predictor, inputs["images"], inputs["label_maps"]).to(self.args.device)
        return None, counts, counts.sum((1, 2))

    def update_metric(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        """Add the counts of a batch; after the last one give the scores."""
        self.counts.merge(torch.as_tensor(prediction.predictions).sum(0))
        if not compute_result:
            return {}
        scores = self.counts.compute()
        return {name: scores[name] for name in METRICS}

    def predictor(self, model: PreTrainedModel) -> Predictor:
        """A whole model with what belongs to it, for the single-scale protocol."""
        protocol = InferenceProtocol(window_batch_size=self.window_batch_size)
        return Predictor(model, self.processing_class, self.label_set, protocol)

    def push_to_hub(  # type: ignore[override]  # processes other than the first push nothing
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | None:
        """Push the repository that [`build_repository`] makes of the output directory, in one commit."""
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        return publish_model(
            self.args.output_dir,
            str(self.hub_model_id),
            private=private if private is not None else self.args.hub_private_repo,
            revision=revision or self.args.hub_revision,
            token=token,
            commit_message=commit_message or "End of training",
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's saving, of what is finite only.

        Raises:
            FloatingPointError: If a weight is NaN or infinite.
        """
        check_finite_weights(self.model, self.state.global_step)
        super().save_model(output_dir, _internal_call)

    # Checkpoints

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trainer's training, which SIGTERM ends with a checkpoint.

        Raises:
            TrainingTerminated: If the process was told to end; a checkpoint is written.
        """
        with self._termination.handling_sigterm():
            return super().train(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if not (self.control.should_training_stop or self.state.global_step >= self.state.max_steps):  # it had ended
            super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, model: Any, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except EvaluationTerminated:
            note_due_evaluation(self)
            self._save_checkpoint(model, trial)
            end_training(self)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._partial is None else str(self._partial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        with reading_checkpoint(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            check_state(resume_from_checkpoint)
        self.resumed_from = resume_from_checkpoint

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        check_loaded(load_result.missing_keys, load_result.unexpected_keys)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading_checkpoint(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading_checkpoint(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.average is not None and self.state.best_model_checkpoint is not None:
            self.average.load(self.state.best_model_checkpoint)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save a checkpoint under another name, and give it its own when all processes have written their part."""
        checkpoint = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with writing_checkpoint(self, checkpoint) as self._partial:
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._partial = None


@contextmanager
def collating_images(trainer: SegmentationTrainer) -> Iterator[None]:
    """Let the loaders that are made in the block collate whole images, as lists."""
    training_collator, trainer.data_collator = trainer.data_collator, collate_examples
    try:
        yield
    finally:
        trainer.data_collator = training_collator


def segmentation_callbacks(
    trainer: SegmentationTrainer, freezing: FreezeEncoder | None, termination: SaveAtTermination
) -> Iterator[TrainerCallback]:
    """What happens at some steps of every run, and what the arguments want done.

    Raises:
        ValueError: If the weights of a sharded model are to be averaged, or low-rank updates of them trained.
    """
    yield from (SetEpoch(), StopAtNan(), ShowProgress(trainer), FindBestCheckpoint(trainer))
    if freezing is not None:
        yield freezing
    if (decay := getattr(trainer.args, "ema_decay", None)) is not None:
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError("`ema_decay` averages whole weights, which sharded models do not have: leave it out.")
        yield AverageWeights(trainer, decay)
    if getattr(trainer.args, "lora_rank", None) is not None and trainer.is_fsdp_enabled:
        raise ValueError("`lora_rank` merges its updates into whole weights, which FSDP shares out: leave one out.")
    if (patience := getattr(trainer.args, "early_stopping_patience", None)) is not None:
        yield StopEarly(patience)
    yield termination  # last: it evaluates as training begins, with the averaged weights


def with_own_generator(loader: DataLoader, args: SegmentationTrainingArguments) -> DataLoader:
    """A loader whose workers, where they live for all epochs, draw from a generator of its own.

    A run that is resumed starts them once more, and must not draw from the one of the model for that.
    """
    if args.dataloader_persistent_workers:
        getattr(loader, "base_dataloader", loader).generator = torch.Generator().manual_seed(args.seed)
    return loader


def check_finite_weights(model: torch.nn.Module, step: int) -> None:
    """Refuse a model that no training can continue with.

    Raises:
        FloatingPointError: If a weight is NaN or infinite.
    """
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if not torch.isfinite(getattr(tensor, "to_local", tensor.detach)()).all():  # a part, with FSDP
            raise FloatingPointError(nan_message(f"`{name}` is not finite at step {step}."))


def gathered_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy on this device of a model that FSDP shares out over the processes, all of which must call this at once."""
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    copy = AutoModelForSemanticSegmentation.from_config(model.config)
    copy.load_state_dict(weights)
    return copy.to(model.device).eval()
