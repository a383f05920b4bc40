"""Fine-tuning from arguments to a finished directory: data, model, Trainer, results, card."""

import logging
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from accelerate.utils import broadcast_object_list
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    PreTrainedModel,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data.augmentation import SegmentationAugmentation
from ..data.label_resolution import resolve_label_set
from ..data.label_sets import LABEL_SET_FILE, LabelSet
from ..data.loading import AnyDataset, first_rows, limited_split, load_segmentation_datasets
from ..data.mask_checks import MaskReport, check_masks
from ..evaluation.evaluate import EvaluationDataset, evaluate_segmentation, save_results
from ..hub.model_card import CardFacts, hub_name, recorded_result, write_model_card
from ..hub.publishing import PREDICTIONS_PICTURE
from ..inference.model_loading import check_weights, translate_loading_errors
from ..models.configuration_vit_encoder import VitEncoderConfig
from ..models.image_processing_segmenter import SegmenterImageProcessor
from ..utils.atomic_files import move_files
from ..utils.processes import process_state
from .arguments import (
    CONFIGS,
    MODEL_SIZES,
    NORMALIZATIONS,
    DataArguments,
    ModelArguments,
    SegmentationTrainingArguments,
)
from .recipes import RECIPE_FILE, check_same_run, resolved_recipe, save_recipe
from .trainer import (
    SegmentationTrainer,
    StreamedTrainingExamples,
    TrainDataset,
    last_checkpoint,
    remove_partial_checkpoints,
)


logger = logging.getLogger(__name__)

TRACKER_FOLDERS = ("runs", "wandb", "mlruns")  # what may be in an output directory before the run is noted there
FINISHED = ".finished-partial"  # where the results of a run are put together
STREAM_SCAN = 1000  # masks of a stream that are checked where nothing else is said


def train_segmenter(
    model_args: ModelArguments, data_args: DataArguments, training_args: SegmentationTrainingArguments
) -> dict[str, Any]:
    """Fine-tune a model, evaluate it, and write everything that is needed to use and share it into `output_dir`.

    The directory then holds the model with the best mean IoU on the validation split, its image processor,
    `results.json`, `per_class.md`, `recipe.json`, a model card, `curves.png`, and `predictions.png`, a picture of
    predictions beside the truth. A run that was interrupted goes on from its last checkpoint with the same arguments.

    Args:
        model_args (`ModelArguments`), data_args (`DataArguments`), training_args (`SegmentationTrainingArguments`):
            What to train, on what, and how.

    Returns:
        `dict`: The results on the validation split: see `evaluate_segmentation`.

    Raises:
        FileExistsError: If `output_dir` holds files that are of no run.
        FloatingPointError: If the loss or a weight becomes NaN or infinite.
        OSError: If a checkpoint cannot be written.
        ValueError: If the arguments contradict each other or those of the run that `output_dir` holds, or label maps cannot
            be trained on.
    """
    set_seed(training_args.seed)  # Trainer does so too, but after the model is made
    recipe = resolved_recipe(model_args, data_args, training_args)
    checkpoint = find_checkpoint(training_args, recipe)
    train_set, validation_set = load_splits(data_args, training_args)
    label_set = find_label_set(data_args, train_set)
    one_class, label_set = label_set, label_set.with_background()
    report = scan_masks(train_set, validation_set, label_set, data_args)

    weights = class_weights(model_args.class_weights, report)
    model, processor = build_model_and_processor(model_args, data_args, one_class, weights)
    augmentation = SegmentationAugmentation(
        crop_size=data_args.crop_size,
        size=data_args.image_size,
        max_ratio=data_args.max_ratio,
        ratio_range=(data_args.min_scale, data_args.max_scale),
        cat_max_ratio=data_args.cat_max_ratio,
        photometric_distortion=data_args.photometric_distortion,
        ignore_index=label_set.ignore_index,
        pad_value=tuple(round(255 * mean) for mean in processor.image_mean),
    )
    if (
        training_args.ddp_find_unused_parameters is None
    ):  # only the class token of a model that goes without it is unused
        training_args.ddp_find_unused_parameters = not model.config.use_class_token
    examples = TrainDataset(train_set, label_set, augmentation, processor, training_args.seed)
    if data_args.streaming:
        examples = StreamedTrainingExamples(examples, share_files=data_args.max_train_samples is None)
        if "epoch" in (training_args.eval_strategy, training_args.save_strategy):
            logger.warning(
                "A stream has no epochs: evaluation and checkpoints come at the end only. Give --eval_strategy steps "
                "--save_strategy steps with --eval_steps and --save_steps for more."
            )
    trainer = SegmentationTrainer(
        model=model,
        args=training_args,
        train_dataset=examples,
        eval_dataset=EvaluationDataset(validation_set, label_set),
        processing_class=processor,
        label_set=label_set,
        window_batch_size=data_args.window_batch_size,
        callbacks=[_StartRun(recipe)],
    )
    if trainer.is_world_process_zero():
        batch = recipe["batch"]
        print(
            f"Batch {training_args.effective_batch_size} = {batch['devices']} devices x {batch['per_device']} crops x "
            f"{batch['accumulation']} accumulated."
        )
    trainer.train(resume_from_checkpoint=checkpoint)
    unwrapped_model = trainer.unwrapped_model(mixed_precision=False)
    results = evaluate_segmentation(trainer.predictor(unwrapped_model), validation_set)
    save_trained_model(trainer, unwrapped_model, results, recipe, data_args)
    return results


def find_checkpoint(training_args: SegmentationTrainingArguments, recipe: dict[str, Any]) -> str | None:
    """Find the checkpoint to go on from, if there is one; nothing is changed yet.

    Returns:
        `str`, *optional*: The directory of the checkpoint.

    Raises:
        FileExistsError: If the output directory holds files that are of no run, and they may not be replaced.
        ValueError: If it holds a run with other arguments, or the checkpoint to go on from would be deleted.
    """
    output_dir, checkpoint = Path(training_args.output_dir), training_args.resume_from_checkpoint
    if training_args.overwrite_output_dir:
        if checkpoint is not None and Path(checkpoint).resolve().is_relative_to(output_dir.resolve()):
            raise ValueError(f"--overwrite_output_dir would delete {checkpoint}, from which to go on: leave out one.")
        return checkpoint
    if not (output_dir / RECIPE_FILE).is_file():
        names = sorted(path.name for path in output_dir.iterdir()) if output_dir.is_dir() else []
        if found := [name for name in names if not name.startswith(".") and name not in TRACKER_FOLDERS]:
            raise FileExistsError(
                f"{output_dir} holds files that are of no run: {', '.join(found[:5])}. Give another --output_dir, or "
                "--overwrite_output_dir to replace those whose names the run needs."
            )
    elif checkpoint is None:
        check_same_run(output_dir, recipe)
        checkpoint = last_checkpoint(output_dir)
        if checkpoint is not None and training_args.should_save:
            print(f"Going on from {checkpoint}; --overwrite_output_dir starts anew.")
    return checkpoint


class _StartRun(TrainerCallback):
    """Deletes what the run replaces and notes what is trained, now that no mistake in the arguments can end it."""

    def __init__(self, recipe: dict[str, Any]) -> None:
        self.recipe = recipe

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if not args.should_save:
            return
        output_dir = Path(args.output_dir)
        remove_partial_checkpoints(output_dir)
        if args.overwrite_output_dir:
            for old in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-[0-9]*"):
                shutil.rmtree(old)
        save_recipe(output_dir, self.recipe)


def load_splits(
    data_args: DataArguments, training_args: SegmentationTrainingArguments
) -> tuple[AnyDataset, datasets.Dataset]:
    """The training split, a stream if that is wanted, and the validation split."""
    if data_args.dataset_name is None:
        raise ValueError(
            f"The recipe {data_args.recipe!r} names no data set, since it cannot be downloaded freely: give its folder with "
            "--dataset_name."
        )
    if data_args.streaming and training_args.max_steps < 1:
        raise ValueError("The length of a stream is not known: give the number of steps with --max_steps.")
    splits = (data_args.train_split, data_args.validation_split)
    loaded = load_segmentation_datasets(
        data_args.dataset_name,
        splits=splits,
        dataset_config=data_args.dataset_config,
        revision=data_args.dataset_revision,
        image_column=data_args.image_column,
        label_column=data_args.label_column,
        validation_fraction=data_args.validation_fraction,
        scenes_train=data_args.scenes_train,
        scenes_validation=data_args.scenes_validation,
        seed=training_args.data_seed or 0,
        streaming=data_args.streaming,
    )
    limits = (data_args.max_train_samples, data_args.max_eval_samples)
    train_set, validation_set = (first_rows(loaded[split], limit) for split, limit in zip(splits, limits))
    if data_args.streaming:  # evaluation visits the same images again and again, and must know how many they are
        rows = list(validation_set)
        validation_set = datasets.Dataset.from_list(rows, features=validation_set.features)
    for split, dataset in zip(splits, (train_set, validation_set)):
        if isinstance(dataset, datasets.Dataset) and len(dataset) == 0:
            raise ValueError(f"The split {split!r} of {data_args.dataset_name} has no images.")
    return train_set, validation_set


def find_label_set(data_args: DataArguments, train_set: AnyDataset) -> LabelSet:
    """The label set that was named, that of the embedded scenes, or what [`resolve_label_set`] finds."""
    return resolve_label_set(
        train_set,
        data_args.label_set or ("scenes" if data_args.dataset_name == "scenes" else None),
        num_labels=data_args.num_labels,
        ignore_index=data_args.ignore_index,
        do_reduce_labels=data_args.do_reduce_labels,
        max_images=data_args.max_scanned_masks or (STREAM_SCAN if data_args.streaming else None),
    )


def scan_masks(
    train_set: AnyDataset, validation_set: datasets.Dataset, label_set: LabelSet, data_args: DataArguments
) -> MaskReport | None:
    """Read the masks of both splits, say what is in them, and stop if they cannot be trained on.

    Returns:
        `MaskReport`, *optional*: What the training masks hold; nothing if none were to be read.

    Raises:
        ValueError: If a mask is impossible; names the file, the values and the remedy.
    """
    limit = data_args.max_scanned_masks
    if limit == 0:
        return None
    if limit is None and data_args.streaming:
        limit = STREAM_SCAN
    state, reports = process_state(), [None]
    if state.is_main_process:
        for split, dataset in ((data_args.train_split, train_set), (data_args.validation_split, validation_set)):
            reports.append(check_masks(dataset, label_set.num_labels, label_set, max_images=limit))
            reports[-1].raise_if_impossible()
            print(f"Masks of the split {split!r}:\n{reports[-1].describe(label_set.labels)}")
        reports = reports[1:2]
    if state.num_processes > 1:
        broadcast_object_list(reports)
    return reports[0]


def class_weights(text: str | None, report: MaskReport | None) -> list[float] | None:
    """Weights of the classes as a configuration has them, from an argument.

    "balanced" gives each class N / (C n), with n of the N pixels of C classes, as scikit-learn does; 1 to a class that does
    not occur.

    Raises:
        ValueError: If the argument is not of the form above, or there are no frequencies.
    """
    if text is None:
        return None
    if text == "balanced":
        if report is None:
            raise ValueError(
                "`--class_weights balanced` needs the frequencies of the classes: leave --max_scanned_masks out."
            )
        counts = report.pixels_per_class
        weights = counts.sum() / (len(counts) * np.maximum(counts, 1))
        return np.where(counts > 0, weights, 1.0).round(6).tolist()
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f'`--class_weights` must be "balanced" or numbers as in "1,2.5,1", got {text!r}.') from error


def parse_overrides(text: str, config: VitEncoderConfig) -> dict[str, Any]:
    """`"patch_size=8,out_indices=2/5/8/11"` to a dict, with the types that the fields have in a configuration.

    Raises:
        ValueError: If an item is not `name=value` or names no field.
    """
    overrides, known = {}, config.to_dict()
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, separator, value = item.partition("=")
        if not separator or name not in known:
            raise ValueError(
                f'Expected "field=value" with a field of {type(config).__name__} in `config_overrides`, got {item!r}.'
            )
        kind = type(known[name])
        try:
            if kind is bool:
                overrides[name] = {"true": True, "false": False}[value.lower()]
            else:
                overrides[name] = [int(item) for item in value.split("/")] if kind is list else kind(value)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"`{name}` in `config_overrides` must be a {kind.__name__}, got {value!r}.") from error
    return overrides


def override_config(config: VitEncoderConfig, overrides: dict[str, Any]) -> VitEncoderConfig:
    """A configuration with some fields replaced. With another decoder, fields that follow from it do so again."""
    fields = config.to_dict()
    if overrides.get("decoder_type", config.decoder_type) != config.decoder_type:
        follow = ("decoder_", "auxiliary_", "out_indices", "use_class_token")
        fields = {name: value for name, value in fields.items() if not name.startswith(follow)}
    return type(config)(**fields | overrides)


def build_model_and_processor(
    model_args: ModelArguments, data_args: DataArguments, label_set: LabelSet, weights: list[float] | None = None
) -> tuple[PreTrainedModel, SegmenterImageProcessor]:
    """Load a model to fine-tune, with a new head where the classes differ, or make a new one; and its processor."""
    labels = {
        "id2label": label_set.id2label,
        "label2id": label_set.label2id,
        "use_single_logit": label_set.num_labels == 1,
        "semantic_loss_ignore_index": label_set.ignore_index,
    }
    chosen = {
        "semantic_loss_class_weights": weights,
        "semantic_loss_label_smoothing": model_args.label_smoothing or 0.0,
        "semantic_loss_dice_weight": model_args.dice_weight or 0.0,
    }
    for name in ("decoder_type", "drop_path_rate"):
        if getattr(model_args, name) is not None:
            chosen[name] = getattr(model_args, name)
    pixels = {
        "size": {
            "shortest_edge": data_args.image_size,
            "longest_edge": int(data_args.max_ratio * data_args.image_size),
        },
        "window_size": data_args.crop_size,
        "window_stride": data_args.crop_size if data_args.window_stride is None else data_args.window_stride,
        "do_reduce_labels": label_set.reduce_labels,
    }
    if model_args.normalization is not None:
        pixels["image_mean"], pixels["image_std"] = NORMALIZATIONS[model_args.normalization]
    if model_args.model_name_or_path is not None:
        name = model_args.model_name_or_path
        with translate_loading_errors(name):
            config = AutoConfig.from_pretrained(name, **labels)
            chosen |= parse_overrides(model_args.config_overrides, config)
            model, loading_info = AutoModelForSemanticSegmentation.from_pretrained(
                name,
                config=override_config(config, chosen),
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                attn_implementation=model_args.attn_implementation,
            )
            check_weights(name, model, loading_info, new_heads=True)
            return model, AutoImageProcessor.from_pretrained(name, **pixels)
    width, layers, heads = MODEL_SIZES[model_args.model_size]
    config_class = CONFIGS[model_args.model_type]
    fields = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "image_size": data_args.crop_size,
        **chosen,
        **parse_overrides(model_args.config_overrides, config_class()),
    }
    config = config_class(**fields, **labels)
    model = AutoModelForSemanticSegmentation.from_config(config, attn_implementation=model_args.attn_implementation)
    return model, SegmenterImageProcessor(patch_size=model.config.patch_size, **pixels)


def save_trained_model(
    trainer: SegmentationTrainer,
    unwrapped_model: PreTrainedModel,
    results: dict[str, Any],
    recipe: dict[str, Any],
    data_args: DataArguments,
) -> None:
    """Put the model, its processor, results, card and pictures together, and move them into the output directory."""
    output_dir = Path(trainer.args.output_dir)
    folder = output_dir / FINISHED
    if trainer.args.should_save:
        shutil.rmtree(folder, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(folder), _internal_call=True)  # pushed below, once everything is there
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        trainer.label_set.save(folder / LABEL_SET_FILE)
        split = limited_split(data_args.validation_split, data_args.max_eval_samples)
        result = recorded_result(results, data_args.dataset_name, split, trainer.label_set.name)
        save_results(folder, result, trainer.label_set.labels)
        trainer.save_predictions(unwrapped_model, folder / PREDICTIONS_PICTURE)
        facts = CardFacts(
            results=(result,),
            training=training_facts(trainer, recipe),
            datasets=tuple(filter(None, [hub_name(data_args.dataset_name)])),
            base_model=hub_name(unwrapped_model.config.name_or_path),
            picture=PREDICTIONS_PICTURE,
        )
        write_model_card(folder, model=unwrapped_model, facts=facts, location=str(output_dir))
        move_files(folder, output_dir)
        shutil.rmtree(folder)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def training_facts(trainer: SegmentationTrainer, recipe: dict[str, Any]) -> dict[str, Any]:
    """What the card says of the training, name by name."""
    arguments, batch = recipe["arguments"], recipe["batch"]
    streamed = isinstance(trainer.train_dataset, StreamedTrainingExamples)
    facts = {
        "recipe": recipe["recipe"],
        "data set": Path(arguments["dataset_name"]).name,
        "label set": trainer.label_set.name,
        "images": "a stream" if streamed else len(trainer.train_dataset),
        "epochs": None if streamed else round(trainer.state.epoch, 2),
        "steps": trainer.state.global_step,
        "batch": f"{trainer.args.effective_batch_size} = {batch['devices']} devices x {batch['per_device']} crops x "
        f"{batch['accumulation']} accumulated",
        "optimiser": " ".join(filter(None, [arguments["optim"], arguments["optim_args"]])),
        "learning rate": arguments["learning_rate"],
        "learning rate of the heads": f"x {arguments['head_learning_rate_factor']}",
        "schedule": arguments["lr_scheduler_type"],
        "warm-up": f"{arguments['warmup_steps']} steps" if arguments["warmup_steps"] else None,
        "weight decay": arguments["weight_decay"],
        "largest norm of the gradient": arguments["max_grad_norm"] or None,
        "drop path": trainer.model.config.drop_path_rate,
        "image size": f"{arguments['image_size']}, long side up to {arguments['max_ratio']} times",
        "crop": arguments["crop_size"],
        "greatest share of a class in a crop": arguments["cat_max_ratio"],
        "photometric distortion": arguments["photometric_distortion"],
        "random resize": f"{arguments['min_scale']} to {arguments['max_scale']}",
        "class weights": arguments["class_weights"],
        "label smoothing": arguments["label_smoothing"],
        "Dice weight": arguments["dice_weight"],
        "precision": "bf16" if arguments["bf16"] else "fp16" if arguments["fp16"] else "fp32",
        "seed": arguments["seed"],
    }
    if "adam" in str(arguments["optim"]):
        facts["betas of Adam"] = f"{arguments['adam_beta1']}, {arguments['adam_beta2']}"
    if arguments["lr_scheduler_type"] == "polynomial":
        facts["schedule"] = f"polynomial, power {arguments['poly_power']}, to {arguments['min_learning_rate']}"
    return {name: value for name, value in facts.items() if value is not None}


__all__ = [
    "DataArguments",
    "ModelArguments",
    "SegmentationTrainer",
    "SegmentationTrainingArguments",
    "TrainDataset",
    "train_segmenter",
]
