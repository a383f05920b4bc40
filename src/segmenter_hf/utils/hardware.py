"""What the devices of this machine compute fast."""

import logging

import torch


logger = logging.getLogger(__name__)


def accelerator_type() -> str | None:
    """The type of the accelerator of this machine, such as `"cuda"`, where there is one."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if accelerator is None else accelerator.type


def has_fast_bfloat16(device_type: str) -> bool:
    """Whether a device multiplies matrices of bfloat16 in hardware.

    Others emulate it: the results are right, but torch's fallback on a CPU with AVX2 alone is many times slower than float32.

    Args:
        device_type (`str`): `"cpu"`, `"cuda"` and so on. Devices other than these two are taken to be fast.
    """
    if device_type == "cpu":
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return device_type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def warn_of_slow_bfloat16(device_type: str) -> None:
    """Say that float32 is faster, where a device only emulates bfloat16."""
    if not has_fast_bfloat16(device_type):
        logger.warning("This machine only emulates bfloat16 (%s): float32 is many times faster.", device_type)
