"""Models that are loaded with another patch size: the embedding is resized by the pseudo-inverse, the positions with it."""

import pytest
import torch
from torch.nn.functional import interpolate
from transformers import AutoConfig, AutoModelForSemanticSegmentation

from segmenter_hf import (
    Predictor,
    SegmenterConfig,
    SegmenterForSemanticSegmentation,
    SegmenterImageProcessor,
    SetrConfig,
    SetrForSemanticSegmentation,
)
from segmenter_hf.data.label_sets import load_label_set
from segmenter_hf.models.modeling_vit_encoder import resize_position_embeddings
from segmenter_hf.models.patch_resizing import patch_resize_matrix, resize_patch_kernel
from segmenter_hf.models.sliding_window import plain_merge_windows
from segmenter_hf.training.arguments import DataArguments, ModelArguments
from segmenter_hf.training.model_building import build_model_and_processor

from ..tiny_models import save_tiny_scenes_model, spread_weights


SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": [48, 64],
    "patch_size": 8,
    "num_labels": 5,
}
# As DINOv2: bicubic positions with an offset, registers, padding on both sides, and a side that few patch sizes divide.
DINOV2 = {
    "image_size": 70,
    "patch_size": 14,
    "position_embedding_interpolation": "bicubic",
    "position_embedding_offset": 0.1,
    "num_register_tokens": 2,
    "layerscale_value": 0.5,
    "padding": "center",
    "decoder_type": "linear",
}


def save_model(folder, model_class=SegmenterForSemanticSegmentation, config_class=SegmenterConfig, **fields):
    torch.manual_seed(0)
    heads = {"decoder_num_attention_heads": 2} if config_class is SegmenterConfig else {}
    model = spread_weights(model_class(config_class(**{**SMALL, **heads, **fields})))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("old", "new"), [(8, 16), (14, 16), (8, 12), (16, 8), (7, 3)])
def test_a_kernel_is_that_of_the_naive_pseudo_inverse(old, new) -> None:
    kernel = torch.randn(6, 3, old, old, generator=torch.Generator().manual_seed(0))
    basis = torch.eye(old * old, dtype=torch.float64).view(old * old, 1, old, old)
    antialias = new < old
    images = interpolate(basis, (new, new), mode="bilinear", align_corners=False, antialias=antialias)
    matrix = images.flatten(1).T  # (new * new, old * old)
    expected = kernel.double().flatten(2) @ torch.linalg.pinv(matrix.T).T
    torch.testing.assert_close(
        resize_patch_kernel(kernel, new).double(), expected.unflatten(2, (new, new)), rtol=0, atol=1e-5
    )


def test_rows_of_the_resize_matrix_are_averages() -> None:
    matrix = patch_resize_matrix(5, 9)
    assert matrix.shape == (9, 5) and matrix.dtype == torch.float64
    torch.testing.assert_close(matrix.sum(1), torch.ones(9, dtype=torch.float64))


@pytest.mark.parametrize(("fields", "patch_size"), [({}, 16), ({}, 12), (DINOV2, 16), (DINOV2, 28)])
def test_enlarged_patches_have_the_tokens_that_they_had(tmp_path, fields, patch_size) -> None:
    old = save_model(tmp_path, **fields)
    new = SegmenterForSemanticSegmentation.from_pretrained(tmp_path, patch_size=patch_size)
    side = old.config.patch_size
    patches = torch.randn(7, 3, side, side, generator=torch.Generator().manual_seed(0))
    constant = torch.linspace(-1, 1, 7)[:, None, None, None].expand(7, 3, patch_size, patch_size)
    enlarged = interpolate(patches, (patch_size, patch_size), mode="bilinear", align_corners=False)
    embed, embed_new = (model.segmenter.embeddings.patch_embeddings for model in (old, new))
    with torch.no_grad():
        torch.testing.assert_close(embed_new(enlarged), embed(patches), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(embed_new(constant), embed(constant[..., :side, :side]), rtol=1e-4, atol=1e-4)


def test_positions_are_those_of_the_new_grid(tmp_path) -> None:
    old = save_model(tmp_path, **DINOV2)
    new = SegmenterForSemanticSegmentation.from_pretrained(tmp_path, patch_size=16)
    assert (new.config.patch_size, new.config.image_size) == (16, 80)
    expected = resize_position_embeddings(
        old.segmenter.embeddings.position_embeddings, (5, 5), (5, 5), "bicubic", False, 0.1
    )
    torch.testing.assert_close(new.segmenter.embeddings.position_embeddings, expected)
    new = SegmenterForSemanticSegmentation.from_pretrained(tmp_path, patch_size=35)
    expected = resize_position_embeddings(
        old.segmenter.embeddings.position_embeddings, (5, 5), (2, 2), "bicubic", False, 0.1
    )
    torch.testing.assert_close(new.segmenter.embeddings.position_embeddings, expected)
    logits = new.eval()(torch.randn(1, 3, 70, 100)).logits
    assert logits.shape == (1, 5, 2, 3)


@torch.no_grad()
def test_the_patch_size_of_the_file_changes_nothing(tmp_path) -> None:
    old = save_model(tmp_path).eval()
    new = SegmenterForSemanticSegmentation.from_pretrained(tmp_path, patch_size=8)
    assert new.config.to_dict() == SegmenterForSemanticSegmentation.from_pretrained(tmp_path).config.to_dict()
    assert all(map(torch.equal, new.state_dict().values(), old.state_dict().values()))


@torch.no_grad()
@pytest.mark.parametrize("patch_size", [16, 4, 12])
def test_a_model_keeps_its_patch_size_when_it_is_saved(tmp_path, patch_size) -> None:
    save_model(tmp_path / "old")
    model = SegmenterForSemanticSegmentation.from_pretrained(tmp_path / "old", patch_size=patch_size).eval()
    model.save_pretrained(tmp_path / "new")
    again = SegmenterForSemanticSegmentation.from_pretrained(tmp_path / "new").eval()
    pixels = torch.randn(1, 3, 50, 70)
    assert again.config.patch_size == patch_size
    assert torch.equal(again(pixels).logits, model(pixels).logits)
    assert "_saved_sizes" not in (tmp_path / "new" / "config.json").read_text()


@torch.no_grad()
def test_auto_classes_take_it_too(tmp_path) -> None:
    save_model(tmp_path)
    expected = SegmenterForSemanticSegmentation.from_pretrained(tmp_path, patch_size=16).eval()
    config = AutoConfig.from_pretrained(tmp_path, patch_size=16)
    pixels = torch.randn(1, 3, 50, 70)
    for arguments in ({"patch_size": 16}, {"config": config}):
        model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, **arguments).eval()
        assert torch.equal(model(pixels).logits, expected(pixels).logits)


@torch.no_grad()
def test_rotary_positions_and_setr_take_it_too(tmp_path) -> None:
    save_model(tmp_path / "rotary", position_embedding_type="rotary", decoder_type="linear")
    model = SegmenterForSemanticSegmentation.from_pretrained(tmp_path / "rotary", patch_size=16).eval()
    assert model(torch.randn(1, 3, 48, 64)).logits.shape == (1, 5, 3, 4)
    setr = {"decoder_type": "naive", "decoder_hidden_size": 8, "auxiliary_hidden_size": 8, "out_indices": [1]}
    save_model(tmp_path / "setr", SetrForSemanticSegmentation, SetrConfig, **setr)
    sides = [
        SetrForSemanticSegmentation.from_pretrained(tmp_path / "setr", patch_size=size)
        .eval()(torch.randn(1, 3, 48, 64))
        .logits.shape[-1]
        for size in (8, 16)
    ]
    assert sides[0] == 2 * sides[1]


@pytest.mark.parametrize("padding", ["end", "center"])
@pytest.mark.parametrize("decoder_type", ["mask_transformer", "linear", "naive", "pup", "mla"])
def test_every_decoder_is_merged_by_the_definition_with_any_patch_size(tmp_path, decoder_type, padding) -> None:
    label_set = load_label_set("scenes")
    model_class, config_class, fields = SegmenterForSemanticSegmentation, SegmenterConfig, {}
    if decoder_type in ("naive", "pup", "mla"):
        model_class, config_class = SetrForSemanticSegmentation, SetrConfig
        fields = {"decoder_hidden_size": 8, "auxiliary_hidden_size": 8, "out_indices": [0, 1, 1, 1]}
    fields |= {"id2label": label_set.id2label, "label2id": label_set.label2id, "num_labels": label_set.num_labels}
    save_model(tmp_path, model_class, config_class, decoder_type=decoder_type, padding=padding, **fields)
    label_set.save(tmp_path / "label_set.json")
    windows = {"window_size": 48, "window_stride": 32, "patch_size": 8, "padding": padding}
    SegmenterImageProcessor(size={"shortest_edge": 48}, **windows).save_pretrained(tmp_path)
    image = torch.randint(256, (3, 53, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for patch_size in (4, 12, 16, 20, 24):
        predictor = Predictor.from_pretrained(tmp_path, patch_size=patch_size)
        source = predictor.prepare(image)
        logits = predictor.compute_logits(torch.stack([source.pixel_values(window) for window in source.windows]))
        _, expected = plain_merge_windows(logits, source.windows, patch_size, padding=padding)
        scores = predictor(image, return_scores=True).scores
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("patch_size", [0, -8, 49, 2.5, "16", True])
def test_a_patch_size_that_cannot_be_is_refused(tmp_path, patch_size) -> None:
    save_model(tmp_path)
    for model_class in (SegmenterForSemanticSegmentation, AutoModelForSemanticSegmentation):
        with pytest.raises(ValueError, match=r"`patch_size` must be a whole number of pixels from 1 to the 48"):
            model_class.from_pretrained(tmp_path, patch_size=patch_size)


def test_a_predictor_has_windows_of_whole_patches(tmp_path) -> None:
    save_tiny_scenes_model(tmp_path)
    image = torch.randint(256, (3, 45, 61), dtype=torch.uint8)
    for patch_size, window_size in ((16, 32), (12, 36), (8, 32)):
        predictor = Predictor.from_pretrained(tmp_path, patch_size=patch_size)
        assert predictor.model.config.patch_size == predictor.processor.patch_size == patch_size
        assert (predictor.processor.window_size, predictor.processor.window_stride) == (window_size, 16)
        assert predictor(image).class_map.shape == (45, 61)
    plain = Predictor.from_pretrained(tmp_path)
    assert torch.equal(plain(image).class_map, predictor(image).class_map)
    assert plain.processor.to_dict() == predictor.processor.to_dict()


def test_training_starts_from_a_resized_model(tmp_path) -> None:
    save_tiny_scenes_model(tmp_path)
    saved = SegmenterForSemanticSegmentation.from_pretrained(tmp_path, patch_size=16)
    arguments = ModelArguments(model_name_or_path=str(tmp_path), patch_size=16, token_merging=True)
    model, processor = build_model_and_processor(
        arguments, DataArguments(image_size=32, crop_size=32), load_label_set("scenes")
    )
    assert processor.patch_size == model.config.patch_size == 16 and model.config.token_merging_layers == [0]
    assert isinstance(processor, SegmenterImageProcessor)
    assert torch.equal(
        model.segmenter.embeddings.patch_embeddings.projection.weight,
        saved.segmenter.embeddings.patch_embeddings.projection.weight,
    )
    with pytest.raises(ValueError, match="window_size"):
        build_model_and_processor(
            ModelArguments(model_name_or_path=str(tmp_path), patch_size=12),
            DataArguments(image_size=32, crop_size=32),
            load_label_set("scenes"),
        )
    arguments = ModelArguments(patch_size=8, token_merging=True)
    model, processor = build_model_and_processor(
        arguments, DataArguments(image_size=32, crop_size=32), load_label_set("scenes")
    )
    assert (model.config.patch_size, processor.patch_size, model.config.token_merging_layers) == (8, 8, [0, 4])
