"""Proof that a converted directory holds the weights of its source and computes what was computed before saving."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForSemanticSegmentation, PreTrainedModel

from .state_dicts import listing


@dataclass(frozen=True)
class Verification:
    """What was compared.

    Args:
        source_tensors (`int`): Tensors in the source.
        unused (`tuple[str, ...]`): Those that are knowingly left out, such as classifiers of the pretraining.
        parameters (`int`): Numbers in the model.
        forward_sha256 (`str`): SHA-256 of the output for a fixed input, equal before saving and after loading.
    """

    source_tensors: int
    unused: tuple[str, ...]
    parameters: int
    forward_sha256: str

    def __str__(self) -> str:
        left_out = f", left out {listing(self.unused)}" if self.unused else ""
        return (
            f"Verified: {self.source_tensors} tensors in the source, {self.source_tensors - len(self.unused)} used"
            f"{left_out}; {self.parameters:,} parameters, all equal after loading; forward pass bitwise equal, SHA-256 "
            f"{self.forward_sha256[:16]}."
        )


def verify_directory(
    model: PreTrainedModel, directory: Path, source_keys: Sequence[str], unused: Sequence[str]
) -> Verification:
    """Load a directory with the Auto class and compare it with the model that the source makes.

    Args:
        model (`PreTrainedModel`): The model, with the weights of the source.
        directory (`Path`): Where it was saved.
        source_keys (`Sequence[str]`): All keys of the source.
        unused (`Sequence[str]`): Those that are knowingly left out.

    Returns:
        `Verification`: What was compared.

    Raises:
        ValueError: If weights or the output of a forward pass differ.
    """
    is_encoder = not type(model).__name__.endswith("ForSemanticSegmentation")
    loaded = (AutoModel if is_encoder else AutoModelForSemanticSegmentation).from_pretrained(directory)
    expected, got = model.state_dict(), loaded.state_dict()
    wrong = [
        name
        for name in {**expected, **got}
        if name not in expected or name not in got or not _equal(expected, got, name)
    ]
    if wrong:
        raise ValueError(
            f"{directory}: {listing(wrong)} of the loaded model differ from the source. The directory was changed, or the "
            "disk is at fault: convert again."
        )
    before, after = forward_sha256(model), forward_sha256(loaded)
    if before != after:
        raise ValueError(
            f"{directory}: the loaded model computes something else than the source (SHA-256 {after[:16]} and "
            f"{before[:16]}): its configuration was changed. Convert again."
        )
    return Verification(len(source_keys), tuple(unused), sum(p.numel() for p in model.parameters()), before)


def _equal(expected: dict[str, torch.Tensor], got: dict[str, torch.Tensor], name: str) -> bool:
    return expected[name].dtype == got[name].dtype and torch.equal(expected[name], got[name])


@torch.no_grad()
def forward_sha256(model: PreTrainedModel) -> str:
    """SHA-256 of the output of a model for a fixed input of 4x6 patches, in evaluation mode."""
    config, training = model.config, model.training
    pixel_values = torch.randn(
        1,
        config.num_channels,
        4 * config.patch_size,
        6 * config.patch_size,
        generator=torch.Generator().manual_seed(0),
    )
    output = model.eval()(pixel_values)
    model.train(training)
    values = output.logits if "logits" in output else output.last_hidden_state
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()


__all__ = ["Verification", "forward_sha256", "verify_directory"]
