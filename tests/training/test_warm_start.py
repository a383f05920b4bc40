"""A decoder made from a linear probe begins as the probe, for either decoder, any width and any number of classes."""

import pytest
import torch

from segmenter_hf import SetrConfig, SetrForSemanticSegmentation
from segmenter_hf.cli.train import parse_training_arguments
from segmenter_hf.training.run import train_segmenter
from segmenter_hf.training.warm_start import (
    choose_crops,
    collect_tokens,
    count_classes,
    fit_probe,
    row_space_basis,
    warm_start_decoder,
)

from ..run_training import words
from .test_fine_tuning_tools import Crops, tiny_model


def accuracy(model: torch.nn.Module, crops: Crops) -> float:
    right = []
    model.eval()
    for index in range(len(crops)):
        with torch.no_grad():
            logits = model(crops[index]["pixel_values"][None]).logits
        if logits.shape[1] == 1:
            logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
        right.append((logits.argmax(1)[0] == crops[index]["labels"][::8, ::8]).float().mean().item())
    return sum(right) / len(right)


@pytest.mark.parametrize("num_labels", [1, 2, 3, 7])
@pytest.mark.parametrize(
    "fields",
    [
        {"decoder_type": "linear"},
        {"decoder_type": "mask_transformer"},
        {"decoder_type": "mask_transformer", "decoder_hidden_size": 12},
        {"decoder_type": "mask_transformer", "decoder_hidden_size": 24},
    ],
    ids=["linear", "mask", "narrow mask", "wide mask"],
)
def test_a_decoder_begins_as_good_as_the_probe(fields, num_labels) -> None:
    crops = Crops(num_labels=max(num_labels, 2))
    model = tiny_model(num_labels=num_labels, **fields)
    training = model.train().training
    probe = warm_start_decoder(model, crops, num_crops=12, batch_size=3)
    assert model.training == training
    assert probe.accuracy > 0.95
    # The cosines of the mask transformer do not know the lengths of the rows of the probe.
    assert accuracy(model, crops) > 0.7 * probe.accuracy


@pytest.mark.parametrize("threshold", [0.5, 0.88])
def test_merged_tokens_are_counted_for_their_patches(threshold) -> None:
    merging = {"token_merging_layers": [0, 1], "token_merging_threshold": threshold}
    crops, model = Crops(), tiny_model(**merging)
    tokens, counts = collect_tokens(model, crops, 8, 2, torch.Generator().manual_seed(0))
    assert len(tokens) == len(counts) == 8 * 4 * 5
    assert warm_start_decoder(model, crops, num_crops=12, batch_size=3).accuracy > 0.9


def test_the_linear_decoder_computes_the_probe() -> None:
    crops, model = Crops(), tiny_model(decoder_type="linear")
    probe = warm_start_decoder(model, crops, num_crops=8)
    tokens, _ = collect_tokens(model, crops, 8, 2, torch.Generator().manual_seed(0))
    expected = ((tokens - probe.mean) / probe.deviation) @ probe.weight.T + probe.bias
    torch.testing.assert_close(model.decode_head(tokens[None])[0][0], expected, rtol=1e-4, atol=1e-4)


def test_the_start_depends_on_the_seed_alone() -> None:
    first, second, other = (tiny_model() for _ in range(3))
    warm_start_decoder(first, Crops(), num_crops=8, seed=1)
    state = torch.get_rng_state()
    warm_start_decoder(second, Crops(), num_crops=8, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    warm_start_decoder(other, Crops(), num_crops=8, seed=2)
    assert torch.equal(first.decode_head.class_embeddings, second.decode_head.class_embeddings)
    assert not torch.equal(first.decode_head.class_embeddings, other.decode_head.class_embeddings)


def test_classes_are_counted_patch_by_patch() -> None:
    labels = torch.randint(0, 4, (2, 13, 10), generator=torch.Generator().manual_seed(0))
    labels[labels == 3] = 255
    counts = count_classes(labels, 4, 3, 255)
    assert counts.shape == (2 * 4 * 3, 3)
    expected = [
        [int((labels[image, row : row + 4, column : column + 4] == label).sum()) for label in range(3)]
        for image in range(2)
        for row in range(0, 13, 4)
        for column in range(0, 10, 4)
    ]
    assert counts.tolist() == expected


def test_labels_of_no_class_are_refused_before_the_probe() -> None:
    with pytest.raises(ValueError, match=r"Labels must be from 0 to 2 or the ignored 255, got \[9\]"):
        count_classes(torch.tensor([[[0, 9], [255, 1]]]), 2, 3, 255)


def test_rows_come_again_after_all_others_only() -> None:
    crops = Crops(length=4)
    chosen = list(choose_crops(crops, 8, torch.Generator().manual_seed(0)))
    same = [
        [torch.equal(example["labels"], crops[index]["labels"]) for index in range(4)].index(True)
        for example in chosen
    ]
    assert sorted(same[:4]) == sorted(same[4:]) == [0, 1, 2, 3]


def test_directions_hold_the_rows() -> None:
    rows = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    basis = row_space_basis(rows, 4)
    torch.testing.assert_close(basis @ basis.T, torch.eye(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(rows @ basis.T @ basis, rows, rtol=0, atol=1e-5)
    assert torch.equal(row_space_basis(rows, 12), torch.eye(12, 10))


def test_a_constant_channel_does_no_harm() -> None:
    tokens = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    tokens[:, 2] = 7.0
    counts = torch.nn.functional.one_hot((tokens[:, 0] > 0).long(), 2).float()
    probe = fit_probe(tokens, counts, 2, torch.Generator().manual_seed(0))
    assert probe.weight.isfinite().all() and probe.accuracy > 0.9


def test_a_decoder_of_convolutions_is_refused() -> None:
    tiny = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
    model = SetrForSemanticSegmentation(SetrConfig(**tiny, decoder_type="naive", decoder_hidden_size=8))
    with pytest.raises(
        ValueError, match="linear decoder or the mask transformer of Segmenter.*got SetrUpsamplingHead"
    ):
        warm_start_decoder(model, Crops())
    crops = Crops(length=2)
    crops.labels[:] = 255
    with pytest.raises(ValueError, match="No pixel of 4 crops has a class"):
        warm_start_decoder(tiny_model(), crops, num_crops=4)


@pytest.mark.parametrize("decoder_type", ["linear", "mask_transformer"])
def test_training_starts_from_the_probe(decoder_type, tmp_path) -> None:
    once = [
        "--max_steps",
        "1",
        "--learning_rate",
        "1e-12",
        "--min_learning_rate",
        "0",
        "--decoder_type",
        decoder_type,
        "--warm_start_crops",
        "16",
    ]
    cold = train_segmenter(*parse_training_arguments(words(str(tmp_path / "cold"), *once)))
    warm = ["--decoder_warm_start", "linear_probe"]
    started = train_segmenter(*parse_training_arguments(words(str(tmp_path / "warm"), *once, *warm)))
    assert started["mean_iou"] > cold["mean_iou"] + 0.05
