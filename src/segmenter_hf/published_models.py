"""The published models, with the numbers that their sources report."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path


PUBLISHED_MODELS = Path(__file__).parent / "published_models.json"


@dataclass(frozen=True)
class PublishedModel:
    """A model of `published_models.json`. mIoU in percent; what its source does not report is `None`."""

    name: str
    family: str
    source: str
    backbone: str
    decoder: str
    dataset: str
    crop_size: int
    reported_in: str
    miou_single_scale: float
    miou_multi_scale_flip: float | None = None
    miou_in_paper: float | None = None
    checkpoint_url: str | None = None
    config_url: str | None = None
    sha256_prefix: str | None = None
    parameters: str | None = None
    iterations: int | None = None
    batch_size: int | None = None
    memory_gb: float | None = None
    fps: float | None = None
    device: str | None = None
    note: str | None = None


@cache
def load_published_models() -> dict[str, PublishedModel]:
    """The published models by name, in the order of the file."""
    models = json.loads(PUBLISHED_MODELS.read_text(encoding="utf-8"))["models"]
    return {model["name"]: PublishedModel(**model) for model in models}


__all__ = ["PublishedModel", "load_published_models"]
