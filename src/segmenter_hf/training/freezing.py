"""Training of the decoder alone, on features of an encoder that stays as it is, for all steps or for the first ones."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState


class FreezeEncoder(TrainerCallback):
    """Freezes the encoder, and makes it trainable at a step where one is given.

    A frozen encoder has no gradients and no dropout. It is frozen for good before the optimizer is made, which then does
    not know it; one that is trained later belongs to the optimizer from the start.

    Args:
        encoder (`nn.Module`): The encoder.
        unfreeze_at_step (`int`, *optional*): The first step that trains it, counted from 0.
    """

    def __init__(self, encoder: nn.Module, unfreeze_at_step: int | None = None) -> None:
        self.encoder = encoder
        self.unfreeze_at_step = unfreeze_at_step
        self.is_frozen = unfreeze_at_step is None
        if self.is_frozen:
            encoder.requires_grad_(False)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.unfreeze_at_step is None:
            return
        freezes = state.global_step < self.unfreeze_at_step
        if freezes != self.is_frozen:
            self.encoder.requires_grad_(not freezes)
            self.is_frozen = freezes

    def keep_in_eval_mode(self) -> None:
        """Turn dropout and drop path of a frozen encoder off, after Trainer has set the model to training mode."""
        if self.is_frozen:
            self.encoder.eval()
