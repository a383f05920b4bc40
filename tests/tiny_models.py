"""A configuration that several tests make small models of."""

from segmenter_hf import SegmenterConfig
from segmenter_hf.label_sets import load_label_set


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
