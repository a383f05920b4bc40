"""Estimates of the memory and time of a training, from counts: no number here was measured."""

import math
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSemanticSegmentation

from ..models.configuration_vit_encoder import VitEncoderConfig


# Bytes per parameter in mixed precision: float32 weights and gradients, and the optimizer's float32 state.
STATE_BYTES = {"sgd": 4 + 4 + 4, "adamw": 4 + 4 + 8}
BACKWARD = 2  # forward passes that a backward pass costs: a product for the inputs, another for the weights


@dataclass(frozen=True)
class TrainingEstimate:
    """What a training needs, estimated from counts.

    Args:
        parameters (`int`): Parameters of the model.
        forward_flops (`int`): Floating-point operations of a forward pass of one crop, two for a multiplication and addition.
        memory_bytes (`int`): Memory of a device: weights, gradients, optimizer, what the layers keep for the backward pass.
        seconds (`float`): Time of all steps.
    """

    parameters: int
    forward_flops: int
    memory_bytes: int
    seconds: float


def estimate_training(
    config: VitEncoderConfig,
    crop_size: int,
    *,
    steps: int,
    per_device_batch_size: int,
    accumulation: int = 1,
    optimizer: str = "sgd",
    peak_flops: float = 312e12,
    utilization: float = 0.4,
) -> TrainingEstimate:
    """Estimate a training in bfloat16 with attention that keeps no matrix of probabilities, whole models on each device.

    Operations and kept tensors are counted while the model runs on no data (torch's meta device). The time is that of
    three forward passes per crop at a share of the device's peak; reading images, evaluation and the exchange between
    devices are left out.

    Args:
        config (`VitEncoderConfig`): The model.
        crop_size (`int`): Side of the crops in pixels.
        steps (`int`): Steps of the training.
        per_device_batch_size (`int`): Crops at once on a device.
        accumulation (`int`, defaults to 1): Batches that are accumulated for a step.
        optimizer (`str`, defaults to `"sgd"`): `"sgd"` (with momentum) or `"adamw"`.
        peak_flops (`float`, defaults to 312e12): Floating-point operations per second of a device, by its data sheet; the
            default is an A100's in bfloat16.
        utilization (`float`, defaults to 0.4): Share of it that is reached.

    Returns:
        `TrainingEstimate`: The estimate.

    Raises:
        ValueError: If the optimizer is not known, or a number is not positive and finite.
    """
    numbers = {
        "crop_size": crop_size,
        "steps": steps,
        "per_device_batch_size": per_device_batch_size,
        "accumulation": accumulation,
        "peak_flops": peak_flops,
        "utilization": utilization,
    }
    for name, number in numbers.items():
        if not 0 < number < math.inf:
            raise ValueError(f"`{name}` must be positive and finite, got {number}.")
    if optimizer not in STATE_BYTES:
        raise ValueError(f"`optimizer` must be one of {list(STATE_BYTES)}, got {optimizer!r}.")
    with torch.device("meta"):
        model = AutoModelForSemanticSegmentation.from_config(config, dtype=torch.bfloat16).train()
        pixel_values = torch.empty(1, config.num_channels, crop_size, crop_size, dtype=torch.bfloat16)
    flops, kept = _count(model, pixel_values)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    memory = parameters * STATE_BYTES[optimizer] + per_device_batch_size * kept
    crops = steps * accumulation * per_device_batch_size
    return TrainingEstimate(parameters, flops, memory, crops * flops * (1 + BACKWARD) / (peak_flops * utilization))


def _count(model: torch.nn.Module, pixel_values: torch.Tensor) -> tuple[int, int]:
    """Operations of a forward pass, and bytes that it keeps for the backward pass beside the parameters."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        is_attention_matrix = (
            tensor.ndim >= 3 and tensor.shape[-1] == tensor.shape[-2]
        )  # which fast kernels do not keep
        if storage._cdata not in weights and not is_attention_matrix:
            kept[storage._cdata] = storage
        return tensor

    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        model(pixel_values=pixel_values)
    return counter.get_total_flops(), sum(storage.nbytes() for storage in kept.values())
