"""Groups of parameters with learning rates of their own, the schedules of these rates, and what a batch weighs."""

from functools import partial

import torch

from ..models.configuration_vit_encoder import VitEncoderConfig
from ..models.segmentation_loss import total_label_weight
from .arguments import SegmentationTrainingArguments


HEADS = ("decode_head", "auxiliary_heads")


def is_head(name: str) -> bool:
    """Whether a parameter of this name belongs to a decoder or an auxiliary head."""
    return any(part in HEADS for part in name.split("."))


def parameter_groups(
    model: torch.nn.Module, args: SegmentationTrainingArguments, decayed: set[str]
) -> list[dict[str, object]]:
    """Group the trainable parameters by whether they are of a head, which has its own learning rate, and whether they decay.

    Args:
        model (`torch.nn.Module`): The model.
        args (`SegmentationTrainingArguments`): Has the learning rate, its factor for the heads, and the weight decay.
        decayed (`set[str]`): Names of the parameters that decay.

    Returns:
        `list[dict]`: Groups of an optimizer of torch.
    """
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((is_head(name), name in decayed), []).append(parameter)
    rate = args.learning_rate
    return [
        {
            "params": parameters,
            "lr": rate * args.head_learning_rate_factor if of_head else rate,
            "weight_decay": args.weight_decay if decays else 0.0,
        }
        for (of_head, decays), parameters in groups.items()
    ]


def polynomial_scheduler(
    optimizer: torch.optim.Optimizer, args: SegmentationTrainingArguments, num_training_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Make the polynomial schedule by which the rates of all groups end at the same value.

    That is the law of mmsegmentation's `PolyLR`, whose `eta_min` holds for every group of parameters.

    Raises:
        ValueError: If `lr_scheduler_kwargs` does not have `power` and `lr_end`.
    """
    shape = args.lr_scheduler_kwargs or {}
    if missing := sorted({"power", "lr_end"} - shape.keys()):
        raise ValueError(
            f"`lr_scheduler_kwargs` of the polynomial schedule must have `power` and `lr_end`, got {shape} without "
            f"{missing}. `poly_power` and `min_learning_rate` set both."
        )
    warmup_steps = args.get_warmup_steps(num_training_steps)
    factors = [
        partial(
            polynomial_factor,
            num_steps=num_training_steps,
            num_warmup_steps=warmup_steps,
            power=shape["power"],
            final_factor=shape["lr_end"] / group["lr"],
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
    weights = config.semantic_loss_class_weights
    weights = None if weights is None else torch.tensor(weights, device=labels.device)
    return total_label_weight(labels, config.semantic_loss_ignore_index, weights)
