"""Small models that several tests use."""

from pathlib import Path

import torch
from torch import nn

from segmenter_hf import SegmenterConfig, SegmenterForSemanticSegmentation, SegmenterImageProcessor
from segmenter_hf.data.label_sets import load_label_set


def tiny_scenes_config() -> SegmenterConfig:
    """One layer on patches of 8 pixels, with the classes of the embedded scenes."""
    labels = load_label_set("scenes")
    return SegmenterConfig(
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=32,
        num_hidden_layers=1,
        image_size=32,
        patch_size=8,
        id2label=labels.id2label,
        label2id=labels.label2id,
    )


def tiny_scenes_processor() -> SegmenterImageProcessor:
    """Several overlapping windows for most images of more than 40 pixels."""
    return SegmenterImageProcessor(size={"shortest_edge": 40}, window_size=32, window_stride=16, patch_size=8)


def spread_weights(model: nn.Module) -> nn.Module:
    """The model with random weights that make its results far from uniform, so that differences show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    return model.eval()


def save_tiny_scenes_model(folder: Path) -> None:
    """Save a model of `tiny_scenes_config` with its processor."""
    torch.manual_seed(0)
    SegmenterForSemanticSegmentation(tiny_scenes_config()).save_pretrained(folder)
    tiny_scenes_processor().save_pretrained(folder)
