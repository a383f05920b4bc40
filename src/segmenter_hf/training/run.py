"""Fine-tuning from arguments to a finished directory: data, model, Trainer, results, card."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

from transformers import set_seed

from ..evaluation.evaluate import EvaluationDataset, evaluate_segmentation
from ..utils.atomic_files import locked_directory
from .adapters import add_adapters, merge_adapters
from .arguments import DataArguments, ModelArguments, SegmentationTrainingArguments
from .callbacks import StartRun
from .channels import find_value_range, measure_statistics
from .checkpoints import find_checkpoint
from .datasets import TrainDataset, build_train_dataset
from .features import FEATURES_FOLDER, cache_features
from .mixing import MixedTrainDataset
from .model_building import build_model_and_processor, override_config, parse_overrides
from .recipes import resolved_recipe
from .results import save_trained_model
from .splits import class_weights, find_label_set, load_extra_set, load_splits, read_masks, scan_masks
from .termination import TrainingTerminated
from .trainer import SegmentationTrainer
from .warm_start import warm_start_decoder


def train_segmenter(
    model_args: ModelArguments, data_args: DataArguments, training_args: SegmentationTrainingArguments
) -> dict[str, Any]:
    """Fine-tune a model, evaluate it, and write everything that is needed to use and share it into `output_dir`.

    The directory then holds the model with the best mean IoU on the validation split, its image processor,
    `results.json`, `per_class.md`, `recipe.json`, a model card, `curves.png`, and `predictions.png`, an image of
    predictions beside the truth. A run that was interrupted resumes from its last checkpoint with the same arguments.

    Args:
        model_args (`ModelArguments`), data_args (`DataArguments`), training_args (`SegmentationTrainingArguments`):
            What to train, on what, and how.

    Returns:
        `dict`: The results on the validation split: see `evaluate_segmentation`.

    Raises:
        BlockingIOError: If another run writes to `output_dir`.
        FileExistsError: If `output_dir` holds files that are of no run.
        FloatingPointError: If the loss or a weight becomes NaN or infinite.
        OSError: If a checkpoint cannot be written.
        TrainingTerminated: If the process was told to end by SIGTERM in training; it names the checkpoint to resume from.
        ValueError: If the arguments contradict each other or those of the run that `output_dir` holds, or label maps cannot
            be trained on.
    """
    is_first_process = training_args.process_index == 0
    with locked_directory(training_args.output_dir) if is_first_process else nullcontext(False) as alone:
        return _train(model_args, data_args, training_args, alone)


def _train(
    model_args: ModelArguments, data_args: DataArguments, training_args: SegmentationTrainingArguments, alone: bool
) -> dict[str, Any]:
    set_seed(training_args.seed)  # Trainer does so too, but after the model is made
    recipe = resolved_recipe(model_args, data_args, training_args)
    checkpoint = find_checkpoint(training_args, recipe)
    train_set, validation_set = load_splits(data_args, training_args)
    masks = read_masks(data_args, train_set)
    label_set = find_label_set(data_args, masks)
    one_class, label_set = label_set, label_set.with_background()
    extra = load_extra_set(data_args, label_set)
    report = scan_masks(masks, validation_set, label_set, data_args, extra)
    del masks  # with what it keeps
    weights = class_weights(model_args.class_weights, report)
    model, processor = build_model_and_processor(model_args, data_args, one_class, weights)
    if training_args.lora_rank is not None:
        add_adapters(model, training_args.lora_rank, training_args.lora_alpha, training_args.lora_targets)
    find_value_range(train_set, processor)
    if model_args.normalization == "dataset":
        processor.image_mean, processor.image_std = measure_statistics(train_set, processor)
    if training_args.ddp_find_unused_parameters is None:
        # Only the class token of a model that goes without it is unused, and an encoder that is trained later.
        later = training_args.unfreeze_at_step is not None
        training_args.ddp_find_unused_parameters = later or not model.config.use_class_token
    train_dataset = build_train_dataset(train_set, label_set, processor, data_args, training_args)
    if extra is not None:
        further = build_train_dataset(*extra, processor, data_args, training_args)
        train_dataset = MixedTrainDataset(
            cast(TrainDataset, train_dataset), cast(TrainDataset, further), data_args.extra_weight
        )
    trainer = SegmentationTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=EvaluationDataset(validation_set, label_set, processor.num_channels),
        processing_class=processor,
        label_set=label_set,
        window_batch_size=data_args.window_batch_size,
        callbacks=[StartRun(recipe, alone)],
    )
    prepare_decoder(trainer, is_new=checkpoint is None)
    trainer.train(resume_from_checkpoint=checkpoint)
    if training_args.lora_rank is not None:
        merge_adapters(trainer.model)
    unwrapped_model = trainer.unwrapped_model(mixed_precision=False)
    results = evaluate_segmentation(trainer.predictor(unwrapped_model), validation_set)
    save_trained_model(trainer, unwrapped_model, results, recipe, data_args)
    if training_args.should_save:
        shutil.rmtree(Path(training_args.output_dir) / FEATURES_FOLDER, ignore_errors=True)
    return results


def prepare_decoder(trainer: SegmentationTrainer, is_new: bool) -> None:
    """Before the first step: make the decoder from a linear probe, and compute the features of a frozen encoder.

    Args:
        trainer (`SegmentationTrainer`): The Trainer, whose arguments say what is wanted.
        is_new (`bool`): Whether the run starts; one that is resumed has its decoder already.
    """
    args = trainer.args
    if is_new and args.decoder_warm_start == "linear_probe":
        crops, model = args.warm_start_crops, trainer.model
        probe = warm_start_decoder(model, trainer.train_dataset, num_crops=crops, seed=args.seed)
        if trainer.is_world_process_zero():
            print(
                f"The decoder starts from a linear probe of {crops} crops, right in {100 * probe.accuracy:.1f} % of its pixels."
            )
    if args.cache_feature_epochs:
        # Those of an earlier start are of this run only where it finds its checkpoint by itself.
        if (is_new or args.resume_from_checkpoint) and trainer.is_world_process_zero():
            shutil.rmtree(Path(args.output_dir) / FEATURES_FOLDER, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
        with trainer.accelerator.autocast():  # in the precision of the training, which has the same features then
            trainer.train_dataset = cache_features(
                trainer.model, trainer.train_dataset, args.cache_feature_epochs, Path(args.output_dir)
            )


__all__ = [
    "DataArguments",
    "ModelArguments",
    "SegmentationTrainer",
    "SegmentationTrainingArguments",
    "TrainDataset",
    "TrainingTerminated",
    "build_model_and_processor",
    "class_weights",
    "override_config",
    "parse_overrides",
    "train_segmenter",
]
