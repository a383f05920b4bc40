"""Focal loss and online hard example mining against naive loops."""

import math

import pytest
import torch
from torch import nn

from segmenter_hf import SegmenterConfig, SegmenterForSemanticSegmentation
from segmenter_hf.models.segmentation_loss import plain_upsampled_cross_entropy, upsampled_hard_pixel_loss


@pytest.fixture
def example() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (2, 9, 14), generator=generator)
    labels[0, :4] = 255
    return torch.randn(2, 4, 3, 5, generator=generator) * 3, labels


def naive(logits, labels, weights, gamma: float, fraction: float) -> float:
    upsampled = nn.functional.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    losses = []
    for image in range(len(labels)):
        for row in range(labels.shape[1]):
            for column in range(labels.shape[2]):
                label = int(labels[image, row, column])
                if label != 255:
                    probability = float(upsampled[image, :, row, column].softmax(0)[label])
                    weight = float(weights[label])
                    losses.append((-weight * (1 - probability) ** gamma * math.log(probability), weight))
    losses = sorted(losses, reverse=True)[: math.ceil(fraction * len(losses))]
    return sum(loss for loss, _ in losses) / sum(weight for _, weight in losses)


@pytest.mark.parametrize(("gamma", "fraction"), [(2.0, 1.0), (0.0, 0.3), (1.5, 0.1)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_that_of_a_naive_loop(example, gamma, fraction, weighted) -> None:
    logits, labels = example
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0]) if weighted else None
    loss = upsampled_hard_pixel_loss(logits, labels, class_weights=weights, focal_gamma=gamma, ohem_fraction=fraction)
    expected = naive(logits, labels, torch.ones(4) if weights is None else weights, gamma, fraction)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_without_both_it_is_the_cross_entropy(example) -> None:
    logits, labels = example
    torch.testing.assert_close(
        upsampled_hard_pixel_loss(logits, labels, label_smoothing=0.1),
        plain_upsampled_cross_entropy(logits, labels, label_smoothing=0.1),
    )


def test_where_all_pixels_are_ignored_it_is_0_with_a_gradient_of_0(example) -> None:
    logits = example[0].requires_grad_()
    loss = upsampled_hard_pixel_loss(logits, torch.full((2, 9, 14), 255), focal_gamma=2.0, ohem_fraction=0.5)
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def test_a_certain_pixel_has_a_finite_gradient() -> None:
    logits = torch.tensor([200.0, -200.0]).reshape(1, 2, 1, 1).requires_grad_()
    upsampled_hard_pixel_loss(logits, torch.zeros(1, 1, 1, dtype=torch.long), focal_gamma=0.5).backward()
    assert logits.grad.isfinite().all()


def test_a_model_takes_both_from_its_configuration() -> None:
    torch.manual_seed(0)
    tiny = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "image_size": 32, "patch_size": 8}
    config = SegmenterConfig(**tiny, num_labels=4, semantic_loss_focal_gamma=2.0, semantic_loss_ohem_fraction=0.5)
    model = SegmenterForSemanticSegmentation(config).eval()
    labels = torch.randint(0, 4, (1, 24, 32))
    outputs = model(torch.randn(1, 3, 24, 32), labels=labels)
    expected = upsampled_hard_pixel_loss(outputs.logits, labels, focal_gamma=2.0, ohem_fraction=0.5)
    assert outputs.loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for wrong in ({"semantic_loss_focal_gamma": -1}, {"semantic_loss_ohem_fraction": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SegmenterConfig(**tiny, **wrong)
