"""Estimates against what can be counted by hand."""

from pathlib import Path

import pytest

from segmenter_hf import SegmenterConfig, SetrConfig
from segmenter_hf.training.estimates import estimate_training


BASE = SegmenterConfig(decoder_type="linear", num_labels=150)


def test_operations_of_a_linear_segmenter_are_those_of_its_formula() -> None:
    tokens, width, layers = 32 * 32 + 1, 768, 12
    per_layer = 2 * tokens * (4 * width**2 + 2 * 4 * width**2) + 2 * 2 * tokens**2 * width
    around = 2 * (tokens - 1) * (16 * 16 * 3 * width + width * 150)
    estimate = estimate_training(BASE, 512, steps=10, per_device_batch_size=2, peak_flops=1e12, utilization=0.5)
    assert estimate.forward_flops == layers * per_layer + around
    assert estimate.seconds == pytest.approx(10 * 2 * 3 * estimate.forward_flops / 0.5e12)
    assert 86e6 < estimate.parameters < 87e6


def test_memory_grows_with_the_batch_by_what_a_crop_keeps() -> None:
    one, two, adam = (
        estimate_training(BASE, 512, steps=1, per_device_batch_size=size, optimizer=optimizer).memory_bytes
        for size, optimizer in ((1, "sgd"), (2, "sgd"), (1, "adamw"))
    )
    assert adam - one == 4 * estimate_training(BASE, 512, steps=1, per_device_batch_size=1).parameters
    per_layer = (two - one) / 12 / (1025 * 768 * 2)  # tensors of tokens x width in bfloat16 that a layer keeps
    assert (
        10 < per_layer < 30
    )  # norms, q, k, v, their product, the MLP's two wide ones; probabilities are not among them


def test_setr_is_estimated_too_and_other_optimizers_are_refused() -> None:
    config = SetrConfig(hidden_size=64, num_attention_heads=2, num_hidden_layers=4, image_size=64, decoder_type="pup")
    assert estimate_training(config, 64, steps=1, per_device_batch_size=1).forward_flops > 0
    with pytest.raises(ValueError, match="must be one of"):
        estimate_training(config, 64, steps=1, per_device_batch_size=1, optimizer="lion")


@pytest.mark.parametrize(
    "wrong", [{"steps": -5}, {"peak_flops": 0.0}, {"utilization": -1.0}, {"utilization": float("nan")}]
)
def test_numbers_of_an_estimate_are_positive_and_finite(wrong) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be positive and finite"):
        estimate_training(BASE, 512, **{"steps": 1, "per_device_batch_size": 1, **wrong})


@pytest.mark.parametrize(
    ("row", "fields", "crop"),
    [
        ("DINOv2 S", {"patch_size": 14, "image_size": 518, "layerscale_value": 1.0}, 504),
        (
            "DINOv3 S",
            {
                "num_register_tokens": 4,
                "position_embedding_type": "rotary",
                "image_size": 224,
                "layerscale_value": 1.0,
            },
            512,
        ),
        ("ViT (AugReg) S", {"image_size": 224}, 512),
    ],
)
def test_the_table_of_encoders_has_the_computed_numbers(row, fields, crop) -> None:
    page = (Path(__file__).parents[2] / "docs" / "encoders.md").read_text(encoding="utf-8")
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {row} |")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    config = SegmenterConfig(
        hidden_size=384,
        num_attention_heads=6,
        intermediate_size=1536,
        decoder_type="linear",
        num_labels=150,
        drop_path_rate=0.0,
        **fields,
    )
    one, two = (estimate_training(config, crop, steps=1, per_device_batch_size=size) for size in (1, 2))
    assert cells[1] == f"{one.parameters / 1e6:.1f}"
    assert cells[6] == f"{one.forward_flops / 1e9:.0f}"
    assert cells[7] == f"{(two.memory_bytes - one.memory_bytes) / 2**30:.2f}"
