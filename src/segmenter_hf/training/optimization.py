"""Groups of parameters with learning rates of their own, the schedules of these rates, and what a batch weighs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from ..models.configuration_vit_encoder import VitEncoderConfig
from ..models.segmentation_loss import total_label_weight
from .arguments import SegmentationTrainingArguments


HEADS = ("decode_head", "auxiliary_heads")


def is_head(name: str) -> bool:
    """Whether a parameter of this name belongs to a decoder or an auxiliary head."""
    return any(part in HEADS for part in name.split("."))


def decays(name: str, parameter: torch.nn.Parameter) -> bool:
    """Whether weight decay is for this parameter: for matrices and kernels, not for norms, biases, LayerScale, tokens, positions."""
    leaf = name.rpartition(".")[2]
    return parameter.ndim > 1 and not leaf.endswith(("token", "tokens", "embeddings"))


def depth_from_top(name: str, encoder_name: str, num_layers: int) -> int:
    """How many layers a parameter lies below the heads: 0 for heads and the final norm, most for the embeddings.

    Args:
        name (`str`): Name of the parameter in the model.
        encoder_name (`str`): Name of the encoder in the model: its `base_model_prefix`.
        num_layers (`int`): Layers of the encoder.

    Returns:
        `int`: 0 for what is not of the encoder and for its final norm; 1 for the last layer; `num_layers` for the first one;
        `num_layers + 1` for the embeddings.
    """
    part, _, rest = name.partition(f"{encoder_name}.")[2].partition(".")
    if not name.startswith(f"{encoder_name}."):
        return 0
    if part == "layers":
        return num_layers - int(rest.partition(".")[0])
    return num_layers + 1 if part == "embeddings" else 0


def has_own_rates(args: TrainingArguments) -> bool:
    """Whether groups of parameters have learning rates of their own."""
    return getattr(args, "head_learning_rate_factor", 1.0) != 1 or getattr(args, "layer_decay", 1.0) != 1


def parameter_groups(model: PreTrainedModel, args: SegmentationTrainingArguments) -> list[dict[str, Any]]:
    """Group the trainable parameters by their learning rate and by whether they decay.

    The rate of a head is `learning_rate * head_learning_rate_factor`; that of an encoder layer is `learning_rate *
    layer_decay**depth` with its depth below the heads (layer-wise decay, as BEiT, https://arxiv.org/abs/2106.08254, and
    EoMT fine-tune).

    Args:
        model (`PreTrainedModel`): The model.
        args (`SegmentationTrainingArguments`): The learning rate, its factors, and the weight decay.

    Returns:
        `list[dict]`: Groups of an optimizer of torch, those of the highest rate of the encoder first, whose rate is logged.
        `layer_factor` is the factor of the layer-wise decay.
    """
    groups: dict[tuple[bool, int, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            depth = depth_from_top(name, model.base_model_prefix, model.config.num_hidden_layers)
            depth = 0 if args.layer_decay == 1 else depth
            groups.setdefault((is_head(name), depth, not decays(name, parameter)), []).append(parameter)
    return [
        {
            "params": groups[of_head, depth, spared],
            "lr": args.learning_rate * args.layer_decay**depth * (args.head_learning_rate_factor if of_head else 1.0),
            "weight_decay": 0.0 if spared else args.weight_decay,
            "layer_factor": args.layer_decay**depth,
        }
        for of_head, depth, spared in sorted(groups)
    ]


def polynomial_scheduler(
    optimizer: torch.optim.Optimizer, args: SegmentationTrainingArguments, num_training_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Make the polynomial schedule by which the rates of all groups end at the same value, times their layer-wise decay.

    That is the law of mmsegmentation's `PolyLR`, whose `eta_min` holds for every group of parameters. Training may end within
    the warm-up, where transformers' own schedule divides by zero.

    Raises:
        ValueError: If `lr_scheduler_kwargs` does not have `power` and `lr_end`.
    """
    shape: Any = args.lr_scheduler_kwargs or {}  # read from JSON by transformers
    if missing := sorted({"power", "lr_end"} - shape.keys()):
        raise ValueError(
            f"`lr_scheduler_kwargs` of the polynomial schedule must have `power` and `lr_end`, got {shape} without "
            f"{missing}. `poly_power` and `min_learning_rate` set both."
        )
    warmup_steps = args.get_warmup_steps(num_training_steps)
    factors: list[Callable[[int], float]] = [
        partial(
            polynomial_factor,
            num_steps=num_training_steps,
            num_warmup_steps=warmup_steps,
            power=shape["power"],
            final_factor=shape["lr_end"] * group.get("layer_factor", 1.0) / group["lr"],
        )
        for group in optimizer.param_groups
    ]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factors)


def polynomial_factor(step: int, *, num_steps: int, num_warmup_steps: int, power: float, final_factor: float) -> float:
    """Factor of a learning rate at a step: linear from 0 in the warm-up, then polynomial from 1 to `final_factor`."""
    if step < num_warmup_steps:
        return step / num_warmup_steps
    left = max(0.0, 1 - (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps))
    return left**power * (1 - final_factor) + final_factor


def loss_weight(labels: torch.Tensor, config: VitEncoderConfig) -> torch.Tensor:
    """What a batch weighs in a mean over several: the divisor of its loss, so that `loss * loss_weight` is a sum.

    A Dice loss is no mean over pixels: with it, batches weigh by their images.

    Args:
        labels (`torch.LongTensor` of shape `(batch_size, height, width)`): The labels of the batch.
        config (`VitEncoderConfig`): Its `semantic_loss_*` fields say how the loss is averaged.

    Returns:
        `torch.DoubleTensor` of shape `()`: Number of images or pixels, or sum of the class weights of the valid pixels.
    """
    if config.semantic_loss_dice_weight:
        return labels.new_tensor(len(labels), dtype=torch.float64)
    if config.semantic_loss_normalization == "all_pixels":
        return labels.new_tensor(labels.numel(), dtype=torch.float64)
    class_weights = config.semantic_loss_class_weights
    weights = None if class_weights is None else torch.tensor(class_weights, device=labels.device)
    return total_label_weight(labels, config.semantic_loss_ignore_index, weights)


def loss_share(labels: torch.Tensor, config: VitEncoderConfig, total: torch.Tensor) -> torch.Tensor:
    """Share of a batch in `total`, what all batches of a step weigh: see [`loss_weight`]. 0 where no pixel counts."""
    return torch.where(total > 0, loss_weight(labels, config) / total, 0.0)
