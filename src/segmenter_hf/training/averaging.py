"""Weights averaged over the steps of a training (Polyak and Juditsky, 1992), as an exponential moving average."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel


AVERAGE_FILE = "average.safetensors"  # in a checkpoint, beside the weights that training resumes from


class WeightAverage:
    """Moving average of the trainable parameters and the floating-point buffers of a model.

    The decay starts small and rises to `decay`, `min(decay, (1 + n) / (10 + n))` at step n, so that the first weights,
    which are far from good, are forgotten.

    Args:
        model (`PreTrainedModel`): The model.
        decay (`float`): Share of the average that stays at a step, from 0 to below 1.
    """

    def __init__(self, model: PreTrainedModel, decay: float) -> None:
        self.model = model
        self.decay = decay
        self.values = {name: tensor.detach().clone() for name, tensor in self._tensors().items()}

    def _tensors(self) -> dict[str, torch.Tensor]:
        """What is averaged, by name."""
        named = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        buffers = {name: buffer for name, buffer in self.model.named_buffers() if buffer.is_floating_point()}
        return named | buffers

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after a step, counted from 1. A parameter that became trainable is averaged from then on."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, tensor in self._tensors().items():
            value = self.values.get(name)
            if value is None:
                self.values[name] = tensor.detach().clone()
            else:
                value.lerp_(tensor, 1 - decay)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Give the model the averaged weights."""
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        for name, value in self.values.items():
            tensors[name].copy_(value)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the averaged weights, and with its own ones afterwards."""
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        kept = {name: tensors[name].detach().clone() for name in self.values}
        self.copy_to_model()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    tensors[name].copy_(value)

    def save(self, directory: str | Path) -> None:
        """Write the average into a checkpoint."""
        save_file({name: value.contiguous() for name, value in self.values.items()}, Path(directory) / AVERAGE_FILE)

    def load(self, directory: str | Path) -> None:
        """Read the average of a checkpoint.

        Raises:
            FileNotFoundError: If the checkpoint has none.
            ValueError: If it is of another model.
        """
        path = Path(directory) / AVERAGE_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{directory} has no averaged weights ({AVERAGE_FILE}): it was made without `ema_decay`."
            )
        values, tensors = load_file(path), dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        if wrong := sorted(
            name for name in values if name not in tensors or tensors[name].shape != values[name].shape
        ):
            raise ValueError(f"{path} holds averages of another model: {', '.join(wrong[:5])}.")
        self.values = {name: value.to(tensors[name].device, tensors[name].dtype) for name, value in values.items()}
