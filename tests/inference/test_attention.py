"""Attention maps: those of the originals, whatever attention implementation the model runs with."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForSemanticSegmentation

from segmenter_hf import (
    SegmenterConfig,
    SegmenterForSemanticSegmentation,
    SegmenterImageProcessor,
    SetrConfig,
    SetrForSemanticSegmentation,
)
from segmenter_hf.conversion.convert import convert_checkpoint
from segmenter_hf.data.label_sets import label_set_from_names
from segmenter_hf.inference.attention import (
    attention_image,
    attention_rows,
    central_pixel,
    class_attention,
    patch_attention,
)
from segmenter_hf.inference.predictor import Predictor
from segmenter_hf.inference.visualization import attention_overlay

from ..prediction import make_predictor


FIXTURES = Path(__file__).parents[1] / "fixtures" / "rstrudel"
TINY = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2, "image_size": 32}


@pytest.fixture(scope="module")
def model() -> SegmenterForSemanticSegmentation:
    torch.manual_seed(0)
    config = SegmenterConfig(**TINY, patch_size=8, num_labels=3, initializer_range=0.3)
    return SegmenterForSemanticSegmentation(config).eval()


@pytest.fixture(scope="module")
def processor() -> SegmenterImageProcessor:
    return SegmenterImageProcessor(size={"shortest_edge": 44}, window_size=32, window_stride=16, patch_size=8)


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", ["seg_vit_mask", "seg_deit_mask", "seg_deit_linear"])
def test_rows_are_those_of_the_original(name, tmp_path) -> None:
    model = AutoModelForSemanticSegmentation.from_pretrained(
        convert_checkpoint(FIXTURES / name / "checkpoint.pth", tmp_path / name)
    ).eval()
    expected = np.load(FIXTURES / name / "expected.npz")
    maps = [key for key in expected if key.startswith("attention_")]
    assert maps and model.config._attn_implementation == "sdpa"
    pixel_values = torch.from_numpy(expected["pixel_values_0"]).float()
    for key in maps:
        _, part, layer = key.split("_")
        original = torch.from_numpy(expected[key])
        found = attention_rows(model, pixel_values, layer=int(layer), decoder=part == "decoder")
        torch.testing.assert_close(found, original, rtol=0, atol=1e-5)
        some = attention_rows(model, pixel_values, [3, 0], int(layer), decoder=part == "decoder")
        torch.testing.assert_close(some, original[:, :, [3, 0]], rtol=0, atol=1e-5)


def test_a_patch_is_found_under_its_point(model, processor, picture) -> None:
    inputs = processor(picture, do_split_windows=False)["pixel_values"]
    assert inputs.shape[-2:] == (44, 79)
    inputs = torch.nn.functional.interpolate(
        inputs, size=(48, 80), mode="bilinear", align_corners=False
    )  # 6 x 10 patches
    everything = attention_rows(model, inputs, layer=1)[0, :, 1:, 1:]
    found = patch_attention(make_predictor(model, processor), picture, (89, 17), layer=1)
    assert found.shape == (2, 6, 10)
    np.testing.assert_allclose(found, everything[:, 2 * 10 + 9].unflatten(-1, (6, 10)), atol=1e-6)


def test_a_class_attends_to_patches(model, processor, picture) -> None:
    found = class_attention(make_predictor(model, processor), picture, class_id=2, layer=0)
    other = class_attention(make_predictor(model, processor), picture, class_id=1, layer=0)
    assert found.shape == (2, 6, 10) and (found.sum((1, 2)) < 1).all() and not np.allclose(found, other)


def test_what_is_not_there_is_an_error(model, processor, picture) -> None:
    with pytest.raises(ValueError, match=r"`point` must be .* 90 x 50 pixels, got \(90, 0\)"):
        patch_attention(make_predictor(model, processor), picture, (90, 0))
    with pytest.raises(ValueError, match="`layer` must be from -2 to 1, got 2"):
        patch_attention(make_predictor(model, processor), picture, (0, 0), layer=2)
    with pytest.raises(ValueError, match="`class_id` must be from 0 to 2, got 3"):
        class_attention(make_predictor(model, processor), picture, 3)
    with pytest.raises(ValueError, match="`queries` must be tokens from 0 to 16, got .99."):
        attention_rows(model, torch.zeros(1, 3, 32, 32), [99])


@pytest.mark.parametrize("decoder_type", ["linear", "naive"])
def test_without_class_embeddings_only_patches_attend(decoder_type, processor, picture) -> None:
    if decoder_type == "linear":
        config = SegmenterConfig(**TINY, patch_size=8, num_labels=3, decoder_type="linear")
        model = SegmenterForSemanticSegmentation(config).eval()
    else:
        config = SetrConfig(**TINY, patch_size=8, num_labels=3, decoder_type="naive", out_indices=[0, 1])
        model = SetrForSemanticSegmentation(config).eval()
    assert patch_attention(make_predictor(model, processor), picture, (0, 0)).shape == (2, 6, 10)
    with pytest.raises(ValueError, match="has no class embeddings"):
        class_attention(make_predictor(model, processor), picture, 0)


def test_the_image_has_a_column_for_each_large_class(model, processor, picture) -> None:
    segmentation = np.zeros((50, 90), dtype=np.uint8)
    segmentation[:, 60:] = 2
    label_set = label_set_from_names(["sky", "road", "tree"])
    predictor = Predictor(model, processor, label_set)
    two = attention_image(predictor, picture, segmentation)
    one = attention_image(predictor, picture, np.zeros_like(segmentation))
    assert two.width - one.width > 200 and two.height == one.height


def test_the_central_pixel_belongs_to_the_class() -> None:
    ring = np.ones((5, 7), dtype=bool)
    ring[1:4, 1:6] = False
    x, y = central_pixel(ring)
    assert ring[y, x] and central_pixel(np.pad(np.ones((1, 1), dtype=bool), ((2, 0), (3, 1)))) == (3, 2)


def test_the_overlay_is_brightest_where_attention_is(picture) -> None:
    attention = np.zeros((5, 9))
    attention[0, 8] = 0.2
    shown = np.asarray(attention_overlay(Image.new("RGB", (90, 50)), attention))
    assert shown[2, 87].min() > 150 and shown[40, 10].max() == 0
    marked = np.asarray(attention_overlay(Image.new("RGB", (90, 50)), attention, point=(20, 30)))
    assert (marked[30, 20] == 255).all()
    with pytest.raises(ValueError, match="non-negative"):
        attention_overlay(picture, -attention)
