"""Options of the loss as a configuration has them: class weights, label smoothing, Dice, and one class alone."""

import pytest
import torch
from torch.nn import functional

from segmenter_hf import (
    SegmenterConfig,
    SegmenterForSemanticSegmentation,
    SegmenterImageProcessor,
    SetrConfig,
    SetrForSemanticSegmentation,
)
from segmenter_hf.data.label_sets import label_set_from_names
from segmenter_hf.models.segmentation_loss import upsampled_dice_loss


TINY = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2, "image_size": 16}
DECODERS = ["linear", "mask_transformer", "naive", "mla"]


def make(decoder_type: str, **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    fields = {**TINY, "patch_size": 8, "decoder_type": decoder_type, **kwargs}
    if decoder_type in ("naive", "mla"):
        config = SetrConfig(**fields, out_indices=[0, 1], decoder_hidden_size=8)
        return SetrForSemanticSegmentation(config)
    return SegmenterForSemanticSegmentation(SegmenterConfig(**fields))


def batch(num_labels: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, num_labels, (2, 16, 24), generator=generator)
    labels[:, :3] = 255
    return torch.randn(2, 3, 16, 24, generator=generator), labels


def test_an_ignored_class_is_refused() -> None:
    model = make("linear", num_labels=300)
    pixel_values, labels = batch(300)
    with pytest.raises(ValueError, match="`semantic_loss_ignore_index` 255 is also one of the 300 classes"):
        model(pixel_values=pixel_values, labels=labels)


def test_labels_of_8_bits_may_be_padded_with_any_label() -> None:
    model = make("linear", num_labels=3, semantic_loss_ignore_index=-100).eval()
    pixel_values, labels = batch(3)
    labels = labels.clamp(max=2)[..., :15, :22]
    losses = [model(pixel_values=pixel_values[..., :15, :22], labels=each).loss for each in (labels, labels.byte())]
    assert torch.equal(*losses)


@pytest.mark.parametrize("use_tiled_loss", [True, False])
def test_weights_and_smoothing_are_those_of_torch(use_tiled_loss) -> None:
    weights = [0.2, 1.0, 3.0]
    model = make(
        "linear",
        num_labels=3,
        semantic_loss_class_weights=weights,
        semantic_loss_label_smoothing=0.1,
        use_tiled_loss=use_tiled_loss,
    )
    pixel_values, labels = batch(3)
    outputs = model(pixel_values, labels=labels)
    upsampled = functional.interpolate(outputs.logits, size=(16, 24), mode="bilinear")
    expected = functional.cross_entropy(
        upsampled, labels, torch.tensor(weights), ignore_index=255, label_smoothing=0.1
    )
    torch.testing.assert_close(outputs.loss, expected)


def test_dice_equals_a_loop_over_the_classes_that_occur() -> None:
    logits = torch.randn(2, 4, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, labels = batch(3)  # the fourth class does not occur
    upsampled = functional.interpolate(logits, size=(16, 24), mode="bilinear").softmax(1)
    losses = []
    for index in range(3):
        probability, truth = (values[labels != 255] for values in (upsampled[:, index], labels == index))
        losses.append(1 - 2 * probability[truth].sum() / (probability.sum() + truth.sum()))
    torch.testing.assert_close(upsampled_dice_loss(logits, labels), torch.stack(losses).mean())
    nothing = upsampled_dice_loss(logits.requires_grad_(), torch.full_like(labels, 255))
    nothing.backward()
    assert nothing == 0 and not logits.grad.any()


def test_dice_is_added_with_its_weight() -> None:
    pixel_values, labels = batch(3)
    without, with_dice = (
        make("linear", num_labels=3, drop_path_rate=0.0, semantic_loss_dice_weight=w) for w in (0.0, 0.5)
    )
    plain, outputs = (model(pixel_values, labels=labels) for model in (without, with_dice))
    torch.testing.assert_close(outputs.loss, plain.loss + 0.5 * upsampled_dice_loss(outputs.logits, labels))


@pytest.mark.parametrize("decoder_type", DECODERS)
def test_the_loss_of_one_class_is_binary_cross_entropy(decoder_type) -> None:
    model = make(decoder_type, num_labels=1)
    pixel_values, labels = batch(2)
    outputs = model.eval()(pixel_values, labels=labels)
    assert outputs.logits.shape[1] == 1
    upsampled = functional.interpolate(outputs.logits, size=(16, 24), mode="bilinear")[:, 0]
    valid = labels != 255
    expected = functional.binary_cross_entropy_with_logits(upsampled[valid], labels[valid].float())
    if decoder_type in ("naive", "mla"):
        assert outputs.loss > expected  # auxiliary heads
    else:
        torch.testing.assert_close(outputs.loss, expected)


@pytest.mark.parametrize("decoder_type", DECODERS)
def test_one_class_is_learned(decoder_type) -> None:
    model = make(decoder_type, num_labels=1, drop_path_rate=0.0)
    pixel_values = torch.zeros(2, 3, 16, 16)
    pixel_values[:, :, :, 8:] = 1
    labels = (pixel_values[:, 0] > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        loss = model(pixel_values, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    processor = SegmenterImageProcessor(size={"shortest_edge": 16}, window_size=16, window_stride=16, patch_size=8)
    picture = torch.zeros(3, 16, 16)
    picture[:, :, 8:] = 1
    plain = {"do_rescale": False, "do_normalize": False, "input_data_format": "channels_first"}
    with torch.no_grad():
        outputs = model.eval()(**processor(picture, **plain))
    (result,) = processor.post_process_semantic_segmentation(outputs, return_segmentation_scores=True)
    assert (result.segmentation[:, :4] == 0).all() and (result.segmentation[:, -4:] == 1).all()
    sigmoid = functional.interpolate(outputs.logits, size=(16, 16), mode="bilinear")[0, 0].sigmoid()
    torch.testing.assert_close(result.segmentation_scores[1], sigmoid, rtol=0, atol=1e-5)


def test_a_label_set_of_one_class_gets_a_background() -> None:
    two = label_set_from_names(["leaf"]).with_background()
    assert two.labels == ("background", "leaf") and two.with_background() is two


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"semantic_loss_class_weights": [1.0, 2.0]}, "must be 3 finite numbers"),
        ({"semantic_loss_class_weights": [1.0, -2.0, 1.0]}, "none below 0"),
        ({"semantic_loss_class_weights": [1.0, float("nan"), 1.0]}, "must be 3 finite numbers"),
        ({"semantic_loss_label_smoothing": 1.5}, "from 0 to 1, got 1.5"),
        ({"semantic_loss_class_weights": [1.0, 2.0]}, "another `num_labels`, give `semantic_loss_class_weights=None`"),
        ({"semantic_loss_dice_weight": -1.0}, "at least 0 and finite, got -1.0"),
        ({"semantic_loss_dice_weight": float("nan")}, "must be (at least 0 and )?finite, got nan"),
        ({"semantic_loss_dice_weight": float("inf")}, "must be (at least 0 and )?finite, got inf"),
    ],
)
def test_options_out_of_range_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        SegmenterConfig(num_labels=3, **options)


@pytest.mark.parametrize("weights", [None, [3.0, 2.0, 1.0]])
def test_a_model_with_weights_of_its_classes_is_loaded_for_others(weights, tmp_path) -> None:
    make("linear", num_labels=5, semantic_loss_class_weights=[1.0, 2.0, 3.0, 4.0, 5.0]).save_pretrained(tmp_path)
    fields = {"num_labels": 3, "semantic_loss_class_weights": weights, "ignore_mismatched_sizes": True}
    found = SegmenterForSemanticSegmentation.from_pretrained(tmp_path, **fields).config
    assert found.num_labels == 3 and found.semantic_loss_class_weights == weights
