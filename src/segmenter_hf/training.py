"""Fine-tuning with Trainer: arguments, data as the model takes it, evaluation with the published protocol."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from huggingface_hub import CommitInfo
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from .augmentation import SegmentationAugmentation
from .configuration_segmenter import SegmenterConfig
from .configuration_setr import SetrConfig
from .configuration_vit_encoder import VitEncoderConfig
from .data import check_masks, decode_example, infer_num_labels, load_segmentation_datasets
from .evaluation import (
    EvaluationExamples,
    collate_examples,
    count_pixels,
    evaluate_segmentation,
    save_results,
)
from .image_processing_segmenter import SegmenterImageProcessor
from .label_sets import LABEL_SET_FILE, LabelSet, label_set_from_names, load_label_set
from .metrics import MeanIoU
from .model_card import CardFacts, hub_name, recorded_result, write_model_card
from .publishing import PREDICTIONS_PICTURE, publish_model, save_prediction_grid


logger = logging.getLogger(__name__)

# The sizes of the paper (Strudel et al., ICCV 2021, table 1): width, layers, heads.
MODEL_SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
CONFIGS = {"segmenter": SegmenterConfig, "setr": SetrConfig}


@dataclass
class ModelArguments:
    """Which model to train."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Directory or Hub name to start from; without it a new model is made."}
    )
    model_type: str = field(default="segmenter", metadata={"help": "Family of a new model.", "choices": list(CONFIGS)})
    model_size: str = field(default="tiny", metadata={"help": "Size of a new model.", "choices": list(MODEL_SIZES)})
    config_overrides: str = field(
        default="",
        metadata={"help": 'Fields of the configuration, as in "decoder_type=linear,num_hidden_layers=4".'},
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention: sdpa, flash_attention_2, eager; eager is fastest for bf16 on a CPU."},
    )


@dataclass
class DataArguments:
    """Which images to train on, and what happens to them."""

    dataset_name: str = field(
        default="scenes",
        metadata={"help": 'Hub name, folder of parquet files or of images; "scenes" are the embedded street scenes.'},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub dataset."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: str = field(default="validation", metadata={"help": "Split to evaluate on."})
    validation_fraction: float | None = field(
        default=None, metadata={"help": "Share of the train split to evaluate on where there is no validation split."}
    )
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str = field(default="annotation", metadata={"help": "Column of the label maps."})
    label_set: str | None = field(
        default=None,
        metadata={"help": "Name of a label set or path of a JSON file; without it the classes are counted."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many images only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate the first so many images only."})
    scenes_train: int = field(default=500, metadata={"help": "Number of embedded scenes to train on."})
    scenes_validation: int = field(default=100, metadata={"help": "Number of embedded scenes to evaluate on."})
    image_size: int = field(default=512, metadata={"help": "Short side in pixels to which images are resized."})
    max_ratio: float = field(default=4.0, metadata={"help": "The long side is at most so many times `image_size`."})
    crop_size: int = field(default=512, metadata={"help": "Side in pixels of training crops and of the windows."})
    window_stride: int | None = field(
        default=None, metadata={"help": "Distance of two windows in pixels; `crop_size` by default."}
    )
    min_scale: float = field(default=0.5, metadata={"help": "Least factor of the random resize."})
    max_scale: float = field(default=2.0, metadata={"help": "Greatest factor of the random resize."})
    cat_max_ratio: float = field(default=0.75, metadata={"help": "Greatest share of one class in a training crop."})
    photometric_distortion: bool = field(default=True, metadata={"help": "Change colours at random in training."})
    window_batch_size: int = field(default=8, metadata={"help": "Windows at once through the network in evaluation."})


@dataclass
class SegmentationTrainingArguments(TrainingArguments):
    """Trainer's arguments with the defaults of segmentation: poly schedule, best mean IoU kept, nothing reported."""

    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate at the first step."})
    lr_scheduler_type: str = field(default="polynomial", metadata={"help": "Schedule of the learning rate."})
    poly_power: float = field(default=0.9, metadata={"help": "Power of the polynomial schedule."})
    min_learning_rate: float = field(default=1e-6, metadata={"help": "Where the polynomial schedule ends."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Whether to end with the best checkpoint."})
    metric_for_best_model: str | None = field(default="mean_iou", metadata={"help": "What best means."})
    greater_is_better: bool | None = field(default=True, metadata={"help": "Whether more of it is better."})
    batch_eval_metrics: bool = field(default=True, metadata={"help": "Whether counts are added batch by batch."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Transforms need all columns."})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "Images at once in evaluation."})
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Whether to pin memory, for a GPU."}
    )
    hub_strategy: str = field(default="end", metadata={"help": "When to push with push_to_hub; end: once, complete."})
    logging_steps: float = field(default=50, metadata={"help": "Steps from log line to log line."})
    report_to: None | str | list[str] = field(
        default="none", metadata={"help": "Where to report, such as tensorboard."}
    )

    def __post_init__(self) -> None:
        if self.lr_scheduler_type == "polynomial" and not self.lr_scheduler_kwargs:
            self.lr_scheduler_kwargs = {"power": self.poly_power, "lr_end": self.min_learning_rate}
        super().__post_init__()


class TrainingExamples(Dataset):
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
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Give every epoch its own draws."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`pixel_values` (channels, crop, crop) and `labels` (crop, crop) of one row."""
        image, labels = decode_example(self.dataset[index], self.label_set)
        image, labels = self.augmentation(image, labels, np.random.default_rng((self.seed, self.epoch, index)))
        inputs = self.processor(image, labels, do_resize=False, do_split_windows=False)
        return {"pixel_values": inputs["pixel_values"][0], "labels": inputs["labels"][0]}


class _SetEpoch(TrainerCallback):
    """Tells the training set which epoch it is before the workers start."""

    def on_epoch_begin(self, args, state, control, train_dataloader: DataLoader | None = None, **kwargs) -> None:
        train_dataloader.dataset.set_epoch(int((state.epoch or 0) + 1e-6))


class SegmentationTrainer(Trainer):
    """Trainer that evaluates with the published protocol at original size and never holds the logits of a dataset.

    The training set is a [`TrainingExamples`], the evaluation set an [`EvaluationExamples`]. Each evaluated image
    becomes one (num_labels, num_labels) matrix of counts; these are gathered over all processes and added up.

    Args:
        label_set (`LabelSet`): The classes.
        window_batch_size (`int`, defaults to 8): Windows that go through the network at once in evaluation.
        kwargs: Arguments of `Trainer`; `processing_class` is the image processor.
    """

    def __init__(self, *, label_set: LabelSet, window_batch_size: int = 8, **kwargs: Any) -> None:
        self.label_set = label_set
        self.window_batch_size = window_batch_size
        self.metric = MeanIoU(label_set.num_labels, label_set.ignore_index)
        super().__init__(compute_metrics=self.add_counts, callbacks=[_SetEpoch()], **kwargs)

    def get_eval_dataloader(self, eval_dataset: Dataset | str | None = None) -> DataLoader:
        """A loader of whole images, which are collated as lists."""
        training_collator, self.data_collator = self.data_collator, collate_examples
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training_collator

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: Sequence[str] | None = None,
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """No loss, the count matrix of each image, and its number of counted pixels."""
        with self.compute_loss_context_manager():
            counts = count_pixels(
                self.accelerator.unwrap_model(model),
                self.processing_class,
                inputs["images"],
                inputs["label_maps"],
                self.label_set.ignore_index,
                window_batch_size=self.window_batch_size,
            ).to(self.args.device)
        return None, counts, counts.sum((1, 2))

    def add_counts(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        """Add the counts of a batch; after the last one give the scores."""
        self.metric.add_confusion_matrix(torch.as_tensor(prediction.predictions).sum(0))
        if not compute_result:
            return {}
        scores = self.metric.compute()
        return {name: scores[name] for name in ("mean_iou", "mean_accuracy", "overall_accuracy")}

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


def override_config(config: VitEncoderConfig, text: str) -> VitEncoderConfig:
    """A configuration with some fields replaced. With another decoder, fields that follow from it do so again."""
    overrides, fields = parse_overrides(text, config), config.to_dict()
    if overrides.get("decoder_type", config.decoder_type) != config.decoder_type:
        follow = ("decoder_", "auxiliary_", "out_indices", "use_class_token")
        fields = {name: value for name, value in fields.items() if not name.startswith(follow)}
    return type(config)(**fields | overrides)


def build_model_and_processor(
    model_args: ModelArguments, data_args: DataArguments, label_set: LabelSet
) -> tuple[PreTrainedModel, SegmenterImageProcessor]:
    """Load a model to fine-tune, with a new head where the classes differ, or make a new one; and its processor."""
    labels = {
        "id2label": label_set.id2label,
        "label2id": label_set.label2id,
        "semantic_loss_ignore_index": label_set.ignore_index,
    }
    sizes = {
        "size": {
            "shortest_edge": data_args.image_size,
            "longest_edge": int(data_args.max_ratio * data_args.image_size),
        },
        "window_size": data_args.crop_size,
        "window_stride": data_args.window_stride or data_args.crop_size,
        "do_reduce_labels": label_set.reduce_labels,
    }
    if model_args.model_name_or_path is not None:
        config = AutoConfig.from_pretrained(model_args.model_name_or_path, **labels)
        model = AutoModelForSemanticSegmentation.from_pretrained(
            model_args.model_name_or_path,
            config=override_config(config, model_args.config_overrides),
            ignore_mismatched_sizes=True,
            attn_implementation=model_args.attn_implementation,
        )
        processor = AutoImageProcessor.from_pretrained(model_args.model_name_or_path, **sizes)
        return model, processor
    width, layers, heads = MODEL_SIZES[model_args.model_size]
    config_class = CONFIGS[model_args.model_type]
    fields = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "image_size": data_args.crop_size,
        **parse_overrides(model_args.config_overrides, config_class()),
    }
    config = config_class(**fields, **labels)
    model = AutoModelForSemanticSegmentation.from_config(config, attn_implementation=model_args.attn_implementation)
    return model, SegmenterImageProcessor(patch_size=model.config.patch_size, **sizes)


def resolve_label_set(data_args: DataArguments, train_set: datasets.Dataset) -> LabelSet:
    """The label set that was named, that of the embedded scenes, or one with as many classes as the masks hold."""
    if data_args.label_set is not None:
        return load_label_set(data_args.label_set)
    if data_args.dataset_name == "scenes":
        return load_label_set("scenes")
    num_labels = infer_num_labels(train_set)
    logger.warning("Found %d classes in the label maps; name them with --label_set.", num_labels)
    return label_set_from_names([f"class {index}" for index in range(num_labels)])


def train_segmenter(
    model_args: ModelArguments, data_args: DataArguments, training_args: SegmentationTrainingArguments
) -> dict[str, Any]:
    """Fine-tune a model, evaluate it, and write everything that is needed to use and share it into `output_dir`.

    The directory then holds the model with the best mean IoU on the validation split, its image processor,
    `results.json`, `per_class.md`, a model card and `predictions.png`, a picture of predictions beside the truth.

    Args:
        model_args (`ModelArguments`), data_args (`DataArguments`), training_args (`SegmentationTrainingArguments`):
            What to train, on what, and how.

    Returns:
        `dict`: The results on the validation split: see `evaluate_segmentation`.

    Raises:
        ValueError: If the arguments contradict each other or label maps cannot be trained on.
    """
    splits = [data_args.train_split, data_args.validation_split]
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
    )
    limits = (data_args.max_train_samples, data_args.max_eval_samples)
    train_set, validation_set = (
        loaded[split].select(range(min(limit or len(loaded[split]), len(loaded[split]))))
        for split, limit in zip(splits, limits)
    )
    label_set = resolve_label_set(data_args, train_set)
    for dataset in (train_set, validation_set):
        check_masks(dataset, label_set.num_labels, label_set).raise_if_impossible()

    model, processor = build_model_and_processor(model_args, data_args, label_set)
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
    trainer = SegmentationTrainer(
        model=model,
        args=training_args,
        train_dataset=TrainingExamples(train_set, label_set, augmentation, processor, training_args.seed),
        eval_dataset=EvaluationExamples(validation_set, label_set),
        processing_class=processor,
        label_set=label_set,
        window_batch_size=data_args.window_batch_size,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    results = evaluate_segmentation(
        trainer.model, processor, validation_set, label_set, window_batch_size=data_args.window_batch_size
    )
    if trainer.is_world_process_zero():
        save_trained_model(trainer, results, data_args)
    return results


def save_trained_model(trainer: SegmentationTrainer, results: dict[str, Any], data_args: DataArguments) -> None:
    """Write the model, its processor, results, card and a picture into the output directory of a trainer."""
    output_dir = Path(trainer.args.output_dir)
    trainer.save_model(_internal_call=True)  # pushed below, once everything is there
    trainer.label_set.save(output_dir / LABEL_SET_FILE)
    names = list(trainer.label_set.labels)
    result = recorded_result(results, data_args.dataset_name, data_args.validation_split, trainer.label_set.name)
    save_results(output_dir, result, names)
    save_prediction_grid(
        trainer.model,
        trainer.processing_class,
        trainer.eval_dataset,
        trainer.label_set,
        output_dir / PREDICTIONS_PICTURE,
        window_batch_size=trainer.window_batch_size,
    )
    facts = CardFacts(
        results=(result,),
        training={
            "data set": Path(data_args.dataset_name).name,
            "images": len(trainer.train_dataset),
            "epochs": trainer.args.num_train_epochs,
            "steps": trainer.state.global_step,
            "batch size": trainer.args.train_batch_size
            * trainer.args.world_size
            * trainer.args.gradient_accumulation_steps,
            "optimiser": str(trainer.args.optim.value),
            "learning rate": trainer.args.learning_rate,
            "schedule": str(trainer.args.lr_scheduler_type.value),
            "crop": data_args.crop_size,
            "seed": trainer.args.seed,
        },
        datasets=tuple(filter(None, [hub_name(data_args.dataset_name)])),
        base_model=hub_name(trainer.model.config.name_or_path),
        picture=PREDICTIONS_PICTURE,
    )
    write_model_card(output_dir, model=trainer.model, facts=facts)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


__all__ = [
    "DataArguments",
    "ModelArguments",
    "SegmentationTrainer",
    "SegmentationTrainingArguments",
    "TrainingExamples",
    "train_segmenter",
]
