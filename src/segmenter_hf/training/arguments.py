"""The arguments of training: model, data, and those of Trainer."""

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from ..models.configuration_segmenter import SegmenterConfig
from ..models.configuration_setr import SetrConfig
from ..utils.hardware import warn_of_slow_bfloat16
from ..utils.versions import require_version


# The sizes of the paper (Strudel et al., ICCV 2021, table 1): width, layers, heads.
MODEL_SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
CONFIGS = {"segmenter": SegmenterConfig, "setr": SetrConfig}
DECODERS = ["linear", "mask_transformer", "naive", "pup", "mla"]
NORMALIZATIONS = {
    "half": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
    "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
}
NUMBERS_AS_TEXT = ("class_weights", "config_overrides", "optim_args")
METRICS = ("mean_iou", "mean_accuracy", "overall_accuracy")  # of an evaluation while training


def check_choices(arguments: Any) -> None:
    """Each argument is one of its choices, or its default.

    Raises:
        ValueError: If one is not.
    """
    for argument in fields(arguments):
        choices, value = argument.metadata.get("choices"), getattr(arguments, argument.name)
        if choices is not None and value not in (*choices, argument.default):
            raise ValueError(f"`{argument.name}` must be one of {', '.join(choices)}, got {value!r}.")


def check_finite(arguments: Any) -> None:
    """No argument is NaN or infinite, nor a number in a list, a dictionary, or text such as "momentum=nan".

    Raises:
        ValueError: If one is.
    """
    for name, value in vars(arguments).items():
        parts = re.split("[,=]", value) if name in NUMBERS_AS_TEXT and isinstance(value, str) else value
        for number in _numbers(parts):
            if not math.isfinite(number):
                raise ValueError(
                    f"`{name}` must be {'a finite number' if number is value else 'finite'}, got {value}."
                )


def check_trackers(names: Sequence[str]) -> None:
    """Refuse reports to a tracker that is not installed, before anything is read; names that are none are refused by transformers.

    Raises:
        ImportError: If there is such.
    """
    available = get_available_reporting_integrations()
    for name in names:
        if name in INTEGRATION_TO_CALLBACK and name not in (*available, "flyte"):  # which is never listed
            raise ImportError(f"`report_to={name}` needs {name}, which is not installed: `pip install {name}`.")


def _numbers(value: Any) -> Iterator[float]:
    """All floats in a value, those that are written as text in a list too."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            with contextlib.suppress(ValueError):
                yield from _numbers(float(part) if isinstance(part, str) else part)


@dataclass
class ModelArguments:
    """Which model to train."""

    _argument_group_name = "model"  # title of the group in the help of a parser

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Directory or Hub name to start from; without it a new model is made."}
    )
    model_type: str = field(default="segmenter", metadata={"help": "Family of a new model.", "choices": list(CONFIGS)})
    model_size: str = field(default="tiny", metadata={"help": "Size of a new model.", "choices": list(MODEL_SIZES)})
    decoder_type: str | None = field(
        default=None, metadata={"help": "Decoder; by default that of the model.", "choices": DECODERS}
    )
    drop_path_rate: float | None = field(
        default=None, metadata={"help": "Stochastic depth of the encoder; by default that of the model."}
    )
    patch_size: int | None = field(
        default=None,
        metadata={
            "help": "Side of the patches in pixels; a model to start from is resized. By default that of the model."
        },
    )
    token_merging: bool = field(
        default=False, metadata={"help": "Merge similar patches in the encoder (ALGM): faster; saved with the model."}
    )
    config_overrides: str = field(
        default="",
        metadata={"help": 'Other fields of the configuration, as in "patch_size=8,num_hidden_layers=4".'},
    )
    normalization: str | None = field(
        default=None,
        metadata={
            "help": "Mean and standard deviation of the pixels; by default those of the model. dataset: measured.",
            "choices": [*NORMALIZATIONS, "dataset"],
        },
    )
    class_weights: str | None = field(
        default=None,
        metadata={
            "help": 'Weights of the classes in the loss, as in "1,2.5,1"; "balanced" makes them from the frequencies, '
            '"balanced_sqrt" from the roots of these.'
        },
    )
    label_smoothing: float | None = field(
        default=None, metadata={"help": "Share of each label that is spread over all classes."}
    )
    dice_weight: float | None = field(
        default=None, metadata={"help": "Weight of a Dice loss beside the cross-entropy, for few classes."}
    )
    focal_gamma: float | None = field(
        default=None, metadata={"help": "Focal loss: pixels weigh (1 - probability of their class)^gamma, as 2."}
    )
    ohem_fraction: float | None = field(
        default=None,
        metadata={"help": "Share of the pixels of a batch, those of the highest loss, that count, as 0.25."},
    )
    loss_normalization: str = field(
        default="valid_pixels",
        metadata={
            "help": "What the loss is divided by: the pixels that are not ignored, or all pixels, as mmsegmentation does.",
            "choices": ["valid_pixels", "all_pixels"],
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention: sdpa, flash_attention_2, eager; eager is fastest for bf16 on a CPU."},
    )

    def __post_init__(self) -> None:
        check_finite(self)
        check_choices(self)


@dataclass
class DataArguments:
    """Which images to train on, and what happens to them."""

    _argument_group_name = "data"

    recipe: str | None = field(
        default=None, metadata={"help": "Named values of all arguments; others on the command line replace them."}
    )
    dataset_name: str | None = field(
        default="scenes",
        metadata={"help": 'Hub name, folder of parquet files or of images; "scenes" are the embedded street scenes.'},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub dataset."})
    streaming: bool = field(
        default=False, metadata={"help": "Read the dataset while training instead of first; needs max_steps."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: str = field(default="validation", metadata={"help": "Split to evaluate on."})
    validation_fraction: float | None = field(
        default=None, metadata={"help": "Share of the train split to evaluate on where there is no validation split."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of the images. By default it is found."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the masks. By default it is found."})
    label_set: str | None = field(
        default=None,
        metadata={
            "help": "Name of a label set or path of a file of names (text, CSV, JSON); without it the classes are counted."
        },
    )
    num_labels: int | None = field(
        default=None, metadata={"help": "Number of classes, where no label set says so; by default they are counted."}
    )
    ignore_index: int | None = field(
        default=None, metadata={"help": "Label of pixels without a class; by default that of the label set, 255."}
    )
    do_reduce_labels: bool = field(
        default=False, metadata={"help": "Stored 0 means no class, and the classes are stored from 1 on."}
    )
    max_scanned_masks: int | None = field(
        default=None, metadata={"help": "Check the first so many masks only before training; 0 checks none."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many images only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate the first so many images only."})
    extra_dataset_name: str | None = field(
        default=None,
        metadata={"help": "A second dataset to train on beside the first, such as a folder of predicted labels."},
    )
    extra_split: str = field(default="train", metadata={"help": "Split of the second dataset."})
    extra_image_column: str | None = field(
        default=None, metadata={"help": "Column of the images of the second dataset. By default it is found."}
    )
    extra_label_column: str | None = field(
        default=None, metadata={"help": "Column of the masks of the second dataset. By default it is found."}
    )
    extra_weight: float = field(
        default=1.0,
        metadata={"help": "How many times as often as one of the first dataset an image of the second one is drawn."},
    )
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
    horizontal_flip_probability: float = field(
        default=0.5, metadata={"help": "How often crops are flipped left to right."}
    )
    vertical_flip_probability: float = field(
        default=0.0, metadata={"help": "How often crops are flipped top to bottom, for images without an up."}
    )
    right_angle_rotations: bool = field(
        default=False, metadata={"help": "Turn crops by 0, 90, 180 or 270 degrees, for images without an up."}
    )
    value_range: list[float] | None = field(
        default=None,
        metadata={
            "help": "Pixel values that become black and white, as in 0 4095; by default what TIFF files declare, or those of 8 or 16 bits."
        },
    )
    photometric_distortion: bool = field(default=True, metadata={"help": "Change colors at random in training."})
    window_batch_size: int = field(default=8, metadata={"help": "Windows at once through the network in evaluation."})

    def __post_init__(self) -> None:
        check_finite(self)
        check_choices(self)
        for name in ("image_size", "crop_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.extra_weight <= 0:
            raise ValueError(f"`extra_weight` must be above 0, got {self.extra_weight}.")
        if not 0 < self.min_scale <= self.max_scale:
            raise ValueError(
                f"`min_scale` and `max_scale` must be positive and in order, got {self.min_scale} and {self.max_scale}."
            )


@dataclass
class SegmentationTrainingArguments(TrainingArguments):
    """Trainer's arguments with the defaults of segmentation: poly schedule, best mean IoU kept, nothing reported.

    `total_batch_size` is the effective batch: devices x `per_device_train_batch_size` x `gradient_accumulation_steps`. Where
    it is given, the accumulation follows from it and the batch of a device, or, without that, the batch of a device.

    Raises:
        ValueError: If the batch cannot be put together so, nothing would be trained, or arguments are not for segmentation.
    """

    _argument_group_name = "training"

    if TYPE_CHECKING:
        output_dir: str = ""

    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate at the first step."})
    lr_scheduler_type: str = field(default="polynomial", metadata={"help": "Schedule of the learning rate."})
    poly_power: float = field(default=0.9, metadata={"help": "Power of the polynomial schedule."})
    min_learning_rate: float = field(default=1e-6, metadata={"help": "Where the polynomial schedule ends."})
    head_learning_rate_factor: float = field(
        default=1.0, metadata={"help": "Factor of the learning rate of the decoder and the auxiliary heads."}
    )
    layer_decay: float = field(
        default=1.0,
        metadata={
            "help": "Factor of the learning rate from each layer of the encoder to the one below it, as 0.75; 1: none."
        },
    )
    freeze_encoder: bool = field(
        default=False, metadata={"help": "Train the decoder alone, on features computed without gradients."}
    )
    unfreeze_at_step: int | None = field(
        default=None, metadata={"help": "With freeze_encoder: the step from which the encoder is trained too."}
    )
    cache_feature_epochs: int = field(
        default=0,
        metadata={
            "help": "With freeze_encoder: epochs of crops whose features are kept on disk and repeated; 0 keeps none."
        },
    )
    ema_decay: float | None = field(
        default=None,
        metadata={"help": "Average the weights over the steps with this decay, as 0.999; evaluated and saved."},
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "End the training after so many evaluations without a better one."}
    )
    decoder_warm_start: str = field(
        default="none",
        metadata={
            "help": "Make the decoder from a linear probe of seconds on frozen features before training.",
            "choices": ["none", "linear_probe"],
        },
    )
    warm_start_crops: int = field(default=256, metadata={"help": "Training crops that the linear probe is fitted to."})
    lora_rank: int | None = field(
        default=None, metadata={"help": "Train low-rank updates of the encoder of this rank in place of its weights."}
    )
    lora_alpha: float | None = field(
        default=None,
        metadata={"help": "Scale of the low-rank updates, divided by the rank; twice the rank by default."},
    )
    lora_targets: str = field(
        default="q_proj,k_proj,v_proj,o_proj",
        metadata={
            "help": "Linear layers of each encoder layer that get low-rank updates; fc1 and fc2 are the others."
        },
    )
    per_device_train_batch_size: int | None = field(  # type: ignore[assignment]  # a number once the batch is shared out
        default=None, metadata={"help": "Crops at once on a device; 8 by default, or what total_batch_size leaves."}
    )
    total_batch_size: int | None = field(
        default=None, metadata={"help": "Crops of a step over all devices and accumulated batches."}
    )
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Whether to end with the best checkpoint."})
    metric_for_best_model: str | None = field(default="mean_iou", metadata={"help": "What best means."})
    greater_is_better: bool | None = field(default=True, metadata={"help": "Whether more of it is better."})
    batch_eval_metrics: bool = field(default=True, metadata={"help": "Whether counts are added batch by batch."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Transforms need all columns."})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "Images at once in evaluation."})
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Whether to pin memory, for a GPU."}
    )
    hub_strategy: str = field(default="end", metadata={"help": "When to push with push_to_hub; end: once, complete."})
    logging_steps: float = field(default=50, metadata={"help": "Steps from log line to log line."})
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Whether a loss that is no number is left out of the log; it is an error here."},
    )
    report_to: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={"help": "Where to report: tensorboard, wandb, trackio; any of them."},
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Delete the checkpoints of an earlier run in output_dir, replace its other files, start again."
        },
    )

    def __post_init__(self) -> None:
        check_finite(self)
        if self.max_steps < 1 and (self.max_steps != -1 or self.num_train_epochs <= 0):
            raise ValueError(
                f"Nothing would be trained in {self.num_train_epochs} epochs or {self.max_steps} steps: give a positive "
                "`num_train_epochs` or `max_steps`."
            )
        if wrong := [item for item in (self.optim_args or "=").split(",") if item.count("=") != 1]:
            raise ValueError(f'`optim_args` must be as in "momentum=0.9,nesterov=true", got {wrong[0]!r}.')
        if self.label_smoothing_factor:
            raise ValueError(
                "`label_smoothing_factor` is for text: use `label_smoothing`, which leaves ignored pixels out."
            )
        if self.lr_scheduler_type == "polynomial" and not self.lr_scheduler_kwargs:
            self.lr_scheduler_kwargs = self.polynomial_shape
        if not torch.accelerator.is_available():
            self.use_cpu = True  # transformers refuses bf16 on a machine without a GPU that was not told so
        super().__post_init__()
        if self.bf16:
            warn_of_slow_bfloat16(self.device.type)
        if self.torch_compile:
            require_version("torch", "2.11", "Compilation (`torch_compile`)")
        check_finite(self)  # what was JSON is read now
        self.enable_jit_checkpoint = False  # SegmentationTrainer always writes a checkpoint at SIGTERM, in its own way
        if self.metric_for_best_model is not None and self.metric_for_best_model.removeprefix("eval_") not in METRICS:
            raise ValueError(
                f"`metric_for_best_model` must be one of {', '.join(METRICS)}, got {self.metric_for_best_model!r}."
            )
        check_trackers(self.report_to)
        self._check_tools()
        self._resolve_batch_size()

    def _check_tools(self) -> None:
        """The options of fine-tuning are in range and fit together."""
        self.early_stopping_patience = self.early_stopping_patience or None  # 0 turns that of a recipe off
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"`layer_decay` must be above 0 and at most 1, got {self.layer_decay}.")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be at least 0 and below 1, got {self.ema_decay}.")
        at_least = {
            "unfreeze_at_step": 1,
            "cache_feature_epochs": 0,
            "early_stopping_patience": 1,
            "warm_start_crops": 1,
            "lora_rank": 1,
        }
        for name, least in at_least.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        for name in ("head_learning_rate_factor", "lora_alpha"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"`{name}` must be above 0, got {value}.")
        if self.unfreeze_at_step is not None and 0 < self.max_steps <= self.unfreeze_at_step:
            raise ValueError(
                f"`unfreeze_at_step` {self.unfreeze_at_step} comes after the last step, {self.max_steps}."
            )
        if not self.freeze_encoder and (self.unfreeze_at_step is not None or self.cache_feature_epochs):
            raise ValueError("`unfreeze_at_step` and `cache_feature_epochs` need `freeze_encoder`.")
        if self.unfreeze_at_step is not None and self.cache_feature_epochs:
            raise ValueError("Features can be kept only while the encoder is frozen: leave out `unfreeze_at_step`.")
        if self.lora_rank is not None and self.freeze_encoder:
            raise ValueError("`lora_rank` trains updates of the encoder, which `freeze_encoder` forbids: give one.")
        is_scored = self.load_best_model_at_end and self.eval_strategy != "no"
        if self.early_stopping_patience is not None and not is_scored:
            raise ValueError("`early_stopping_patience` needs `load_best_model_at_end`, and evaluations.")
        if self.cache_feature_epochs and self.n_gpu > 1:
            raise ValueError(
                "Cached features are for one GPU of each process: start the training by `accelerate launch`."
            )

    @property
    def polynomial_shape(self) -> dict[str, float]:
        """`lr_scheduler_kwargs` of the polynomial schedule where nothing else is said."""
        return {"power": self.poly_power, "lr_end": self.min_learning_rate}

    @property
    def num_devices(self) -> int:
        """Devices that a step runs on."""
        return self.world_size * max(self.n_gpu, 1)

    @property
    def effective_batch_size(self) -> int:
        """Crops of a step: devices x batch x accumulation."""
        return self.num_devices * (self.per_device_train_batch_size or 0) * self.gradient_accumulation_steps

    def _resolve_batch_size(self) -> None:
        total, devices = self.total_batch_size, self.num_devices
        per_device, accumulation = self.per_device_train_batch_size, self.gradient_accumulation_steps
        if total is None:
            per_device = 8 if per_device is None else per_device
            total = devices * per_device * accumulation
        self.per_device_train_batch_size, self.gradient_accumulation_steps = resolve_batch_size(
            total, devices, per_device, accumulation
        )


def resolve_batch_size(
    total_batch_size: int, num_devices: int, per_device: int | None = None, accumulation: int = 1
) -> tuple[int, int]:
    """Put an effective batch together from what the devices take at once.

    Args:
        total_batch_size (`int`): Crops of a step: `num_devices` x `per_device` x `accumulation`.
        num_devices (`int`): Devices that share it.
        per_device (`int`, *optional*): Crops at once on a device. Where it is given, `accumulation` follows from it.
        accumulation (`int`, defaults to 1): Batches that are accumulated for a step.

    Returns:
        `tuple[int, int]`: Crops at once on a device, and accumulated batches.

    Raises:
        ValueError: If a number is not positive, or no whole ones give the batch.
    """
    if min(total_batch_size, num_devices, accumulation, 1 if per_device is None else per_device) < 1:
        raise ValueError(
            f"Batches and numbers of devices must be positive, got `total_batch_size` {total_batch_size}, {num_devices} "
            f"devices, `per_device_train_batch_size` {per_device}, `gradient_accumulation_steps` {accumulation}."
        )
    if per_device is None:
        per_device = total_batch_size // (num_devices * accumulation)
    else:
        accumulation = total_batch_size // (num_devices * per_device)
    if not accumulation or num_devices * per_device * accumulation != total_batch_size:
        raise ValueError(
            f"`total_batch_size` {total_batch_size} is not {num_devices} devices x a whole batch: got {per_device} crops per "
            f"device and {accumulation} accumulated batches. Give other values of `per_device_train_batch_size`, "
            "`gradient_accumulation_steps` or `total_batch_size`."
        )
    return per_device, accumulation
