"""Which of several processes this one is."""

import torch
from accelerate import PartialState


def process_state() -> PartialState:
    """Return which of how many processes this is, as `accelerate launch` or `torch.distributed.run` started them."""
    return PartialState(cpu=not torch.cuda.is_available())  # or else processes on CPUs do not know of each other


__all__ = ["process_state"]
