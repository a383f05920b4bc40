"""Images of any size and number: windows go through the network in batches, and nothing is held longer than needed."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from segmenter_hf import (
    SegmenterConfig,
    SegmenterForSemanticSegmentation,
    SegmenterImageProcessor,
    SetrConfig,
    SetrForSemanticSegmentation,
)
from segmenter_hf.models.sliding_window import WindowMerger, merge_windows
from segmenter_hf.models.window_geometry import Window, window_corners

from ..prediction import make_predictor, segment_images
from ..tiny_models import spread_weights


FIELDS = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
FIELDS |= {"image_size": 32, "patch_size": 8, "num_labels": 5}


def make_model(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if name == "segmenter":
        model = SegmenterForSemanticSegmentation(SegmenterConfig(**FIELDS))
    else:
        heads = {"decoder_type": "pup", "decoder_hidden_size": 8, "out_indices": [0, 1], "auxiliary_loss_weight": 0}
        model = SetrForSemanticSegmentation(SetrConfig(**FIELDS, **heads))
    return spread_weights(model)


@pytest.fixture(params=["segmenter", "setr"])
def model(request) -> torch.nn.Module:
    return make_model(request.param)


@pytest.fixture
def processor() -> SegmenterImageProcessor:
    return SegmenterImageProcessor(size={"shortest_edge": 40}, window_size=32, window_stride=24, patch_size=8)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def windows_of_views(view_sizes: list[tuple[int, int]], size: tuple[int, int], stride: int) -> list[Window]:
    return [
        Window(0, view, view % 2, *corner, 32, 32, *view_size, *size)
        for view, view_size in enumerate(view_sizes)
        for corner in window_corners(*view_size, 32, stride)
    ]


@pytest.mark.parametrize("stride", [32, 24, 7])
@pytest.mark.parametrize("in_order", [True, False])
def test_windows_merged_as_they_come_give_the_map_of_all_at_once(stride, in_order) -> None:
    windows = windows_of_views([(64, 90), (64, 90), (133, 61)], (100, 77), stride)
    logits = torch.randn(len(windows), 6, 4, 4)
    ((segmentation, scores),) = merge_windows(logits, torch.tensor(windows), 8, return_scores=True)
    merger = WindowMerger(windows, 8, return_scores=True, dtype=torch.uint8)
    order = list(range(len(windows)))
    if not in_order:
        random.Random(0).shuffle(order)
    for start in range(0, len(order), 3):
        assert not merger.is_complete
        indices = order[start : start + 3]
        merger.add([windows[index] for index in indices], logits[indices])
    assert merger.is_complete
    assert merger.segmentation.dtype == torch.uint8
    assert torch.equal(merger.segmentation.long(), segmentation)
    assert torch.equal(merger.scores, scores)


def test_logits_that_no_later_row_needs_are_dropped() -> None:
    windows = windows_of_views([(32 * 40, 70), (32 * 40, 70)], (32 * 40, 70), 32)
    windows.sort(key=lambda window: window.top)
    merger = WindowMerger(windows, 8)
    logits = torch.randn(2, 6, 4, 4)
    for window in windows:
        merger.add([window], logits[:1])
        held = [view.logits for view in merger._views.values() if view.logits is not None]
        assert all(len(of_view) <= 2 * 4 for of_view in held)  # patch rows of two rows of windows
        assert sum(len(row) for view in merger._views.values() for row in view.waiting.values()) <= 6
    assert merger.is_complete


@pytest.mark.parametrize("multi_scale_flip", [False, True])
def test_batches_of_windows_of_several_images_give_what_each_gives_alone(model, processor, multi_scale_flip) -> None:
    images = [picture(50, 70), picture(45, 41, seed=1), picture(33, 90, seed=2)]
    arguments = {"multi_scale_flip": multi_scale_flip, "return_segmentation_scores": True}
    alone = [segment_images(model, processor, [image], window_batch_size=1, **arguments)[0] for image in images]
    for window_batch_size in (2, 7, 1000):
        together = segment_images(model, processor, images, window_batch_size=window_batch_size, **arguments)
        for ours, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(ours.segmentation_scores, expected.segmentation_scores, rtol=0, atol=1e-5)
            assert (ours.segmentation == expected.segmentation).float().mean() > 0.999


@torch.no_grad()
def test_images_at_full_resolution_are_those_of_the_processor_without_resize(model, processor) -> None:
    image = picture(150, 110)
    outputs = model(**processor(image, do_resize=False))
    (expected,) = processor.post_process_semantic_segmentation(outputs)
    (streamed,) = segment_images(model, processor, [image], full_resolution=True, dtype=torch.uint8)
    assert streamed.dtype == torch.uint8
    assert (streamed.long() == expected).float().mean() > 0.999
    (resized,) = segment_images(model, processor, [image])
    assert (resized == expected).float().mean() < 0.99


def test_whole_images_without_windows_may_have_different_sizes(processor) -> None:
    model = make_model("segmenter")
    processor.do_split_windows = False
    images = [picture(40, 60), picture(40, 60, seed=1), picture(40, 44, seed=2)]
    together = segment_images(model, processor, images)
    for image, segmentation in zip(images, together, strict=True):
        assert (segment_images(model, processor, [image])[0] == segmentation).float().mean() > 0.999


def test_images_are_taken_when_they_are_needed(processor) -> None:
    taken = []

    def images():
        for seed in range(10):
            taken.append(seed)
            yield seed, picture(40, 40, seed)  # four windows

    maps = make_predictor(make_model("segmenter"), processor, window_batch_size=4).stream(images())
    assert taken == []
    next(maps)
    assert taken == [0, 1]
    assert len(list(maps)) == 9


def test_types_that_cannot_hold_the_classes_are_refused(processor) -> None:
    model = make_model("segmenter")
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(ValueError, match="integer type"):
            segment_images(model, processor, [picture(40, 40)], dtype=dtype)
    model.config.num_labels = 300
    with pytest.raises(ValueError, match="300 classes"):
        segment_images(model, processor, [picture(40, 40)], dtype=torch.uint8)
