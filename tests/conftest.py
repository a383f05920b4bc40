"""Every test runs without a network and with the same seeds."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from segmenter_hf import SegmenterForSemanticSegmentation, SegmenterImageProcessor

from .tiny_models import spread_weights, tiny_scenes_config, tiny_scenes_processor


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def model() -> SegmenterForSemanticSegmentation:
    """A small model of the embedded scenes, unless a file has its own."""
    return spread_weights(SegmenterForSemanticSegmentation(tiny_scenes_config()))


@pytest.fixture
def processor() -> SegmenterImageProcessor:
    """What goes with it, unless a file has its own."""
    return tiny_scenes_processor()
