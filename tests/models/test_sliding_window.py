"""Windows cover images, and their merge equals upsampling, adding, dividing and resizing one by one."""

import random
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from segmenter_hf.models import sliding_window
from segmenter_hf.models.resampling import linear_taps
from segmenter_hf.models.sliding_window import (
    WindowMerger,
    merge_windows,
    plain_merge_windows,
    product_dtype,
    tile_size,
)
from segmenter_hf.models.window_geometry import Axis, Window, merge_matrix, window_corners, window_starts

from ..versions import needs_precision


@given(st.integers(1, 60), st.data())
@settings(max_examples=100, deadline=None)
def test_windows_cover_every_pixel_and_end_at_the_border(window_size, data) -> None:
    side = data.draw(st.integers(window_size, 200))
    stride = data.draw(st.integers(1, window_size))
    starts = window_starts(side, window_size, stride)
    covered = {pixel for start in starts for pixel in range(start, start + window_size)}
    assert covered == set(range(side))
    assert starts[:-1] == [start for start in range(0, side, stride) if start < side - window_size]
    assert starts[-1] == side - window_size


@pytest.mark.parametrize("stride", [0, -1, 17])
def test_strides_that_leave_pixels_out_are_refused(stride) -> None:
    with pytest.raises(ValueError, match="window_stride"):
        window_starts(40, 16, stride)


def test_a_side_shorter_than_the_window_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter than"):
        window_starts(15, 16, 8)


def test_windows_go_row_by_row() -> None:
    assert window_corners(30, 50, 20, 20) == [(0, 0), (0, 20), (0, 30), (10, 0), (10, 20), (10, 30)]


def test_more_windows_than_can_be_described_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2000 x 1500 pixels would have 2947725 windows.*raise `window_stride`"):
        window_corners(2000, 1500, window_size=16, window_stride=1)


@pytest.mark.parametrize(("old", "new"), [(4, 11), (11, 4), (1, 3), (5, 5)])
def test_taps_are_those_of_linear_interpolation(old, new) -> None:
    values = torch.randn(old, dtype=torch.float64)
    lower, upper, share = linear_taps(old, new)
    expected = interpolate(values[None, None], size=new, mode="linear")[0, 0]
    np.testing.assert_allclose((1 - share) * values.numpy()[lower] + share * values.numpy()[upper], expected)


def test_every_pixel_is_a_weighted_mean_of_patches() -> None:
    matrix = merge_matrix(Axis((0, 12, 20), window=16, padded_window=16, patches=4, view_side=36, side=50))
    assert matrix.shape == (50, 12)
    np.testing.assert_allclose(matrix.sum(1), 1)
    assert matrix.min() >= 0


def describe(image, view, flip, offsets, window, view_size, image_size) -> list[Window]:
    return [Window(image, view, flip, top, left, *window, *view_size, *image_size) for top, left in offsets]


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_the_merge_equals_the_naive_loop_in_float64(data) -> None:
    patch, per_patch = data.draw(st.sampled_from([(4, 1), (8, 1), (8, 2), (5, 1), (2, 6), (7, 4)]))
    window = patch * data.draw(st.integers(1, 4))
    stride = data.draw(st.integers(1, window))
    num_labels = data.draw(st.integers(2, 6))
    size = (data.draw(st.integers(1, 90)), data.draw(st.integers(1, 150)))
    rows = []
    for view in range(data.draw(st.integers(1, 3))):
        view_size = (window + data.draw(st.integers(0, 30)), window + data.draw(st.integers(0, 30)))
        offsets = window_corners(*view_size, window, stride)
        rows += describe(0, view, view % 2, offsets, (window, window), view_size, size)
    random.Random(0).shuffle(rows)
    patches = window // patch * per_patch
    spread = data.draw(st.sampled_from([5, 100]))
    logits = spread * torch.randn(len(rows), num_labels, patches, patches)
    _, expected = plain_merge_windows(logits.double(), rows, patch)
    tile = {
        "CPU_TILE_VALUES": data.draw(st.sampled_from([1, 500, 2**18])),
        "CPU_TILE_HEIGHT": data.draw(st.sampled_from([1, 7, 64])),
    }
    with mock.patch.multiple(sliding_window, **tile):
        ((segmentation, scores),) = merge_windows(logits, torch.tensor(rows), patch, return_scores=True)
        ((without_scores, none),) = merge_windows(logits, torch.tensor(rows), patch)
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=spread * 4e-7)
    assert none is None
    best_two = expected.topk(2, dim=0).values
    clear = best_two[0] - best_two[1] > spread * 2e-6
    assert torch.equal(segmentation[clear], expected.argmax(0)[clear])
    assert torch.equal(without_scores[clear], expected.argmax(0)[clear])


@pytest.mark.parametrize("padding", ["end", "center"])
def test_the_plain_merge_is_the_definition_of_the_fast_one_with_either_padding(padding) -> None:
    windows = describe(0, 0, 0, [(0, 0), (0, 13)], (30, 27), (30, 40), (35, 47))
    windows += describe(0, 1, 1, [(0, 0), (0, 13)], (30, 27), (30, 40), (35, 47))
    logits = torch.randn(4, 1, 4, 4)  # of one class
    ((class_map, scores),) = merge_windows(logits, torch.tensor(windows), 8, return_scores=True, padding=padding)
    plain_map, plain_scores = plain_merge_windows(logits.double(), windows, 8, padding=padding)
    torch.testing.assert_close(scores.double(), plain_scores, rtol=0, atol=1e-6)
    assert plain_scores.shape == (2, 35, 47) and (class_map == plain_map).float().mean() > 0.999


@pytest.mark.parametrize(("height", "width"), [(50, 77), (77, 50)])
def test_a_whole_image_that_patches_do_not_fill_is_cut_after_upsampling(height, width) -> None:
    rows = describe(0, 0, 0, [(0, 0)], (height, width), (height, width), (height, width))
    padded = (-(-height // 16) * 16, -(-width // 16) * 16)
    logits = torch.randn(1, 3, padded[0] // 16, padded[1] // 16)
    ((_, scores),) = merge_windows(logits, torch.tensor(rows), 16, return_scores=True)
    expected = interpolate(logits, size=padded, mode="bilinear")[0, :, :height, :width].softmax(0)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)


def test_images_of_a_batch_are_merged_each_by_itself_and_to_the_sizes_asked_for() -> None:
    sizes = [(20, 36), (31, 16)]
    rows, logits = [], []
    for image, size in enumerate(sizes):
        offsets = window_corners(*size, 16, 12)
        rows += describe(image, 0, 0, offsets, (16, 16), size, size)
        logits.append(torch.randn(len(offsets), 4, 2, 2))
    together = merge_windows(torch.cat(logits), torch.tensor(rows), 8, [(10, 11), (12, 13)], return_scores=True)
    alone = [row._replace(image=0) for row in rows if row.image == 1]
    (second,) = merge_windows(logits[1], torch.tensor(alone), 8, [(12, 13)], return_scores=True)
    assert [tuple(segmentation.shape) for segmentation, _ in together] == [(10, 11), (12, 13)]
    assert torch.equal(together[1][1], second[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_of_half_precision_are_merged_in_float32(dtype) -> None:
    rows = torch.tensor(describe(0, 0, 0, [(0, 0)], (16, 16), (16, 16), (40, 30)))
    logits = torch.randn(1, 3, 2, 2).to(dtype)
    ((_, scores),) = merge_windows(logits, rows, 8, return_scores=True)
    ((_, expected),) = merge_windows(logits.float(), rows, 8, return_scores=True)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, expected)


def test_extreme_logits_give_finite_probabilities() -> None:
    rows = describe(0, 0, 0, [(0, 0)], (16, 16), (16, 16), (16, 16))
    rows += describe(0, 1, 1, [(0, 0)], (16, 16), (16, 16), (16, 16))
    ((_, scores),) = merge_windows(1e4 * torch.randn(2, 5, 2, 2), torch.tensor(rows), 8, return_scores=True)
    torch.testing.assert_close(scores.sum(0), torch.ones(16, 16))


@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_a_constant_on_all_logits_changes_nothing(shift) -> None:
    rows = torch.tensor(describe(0, 0, 0, [(0, 0)], (16, 16), (16, 16), (40, 30)))
    logits = torch.randn(1, 3, 2, 2) + shift
    ((_, scores),) = merge_windows(logits, rows, 8, return_scores=True)
    ((_, expected),) = merge_windows(logits - shift, rows, 8, return_scores=True)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)


def test_missing_and_repeated_windows_are_noticed() -> None:
    rows = describe(0, 0, 0, [(0, 0), (0, 16), (16, 0), (16, 16)], (16, 16), (32, 32), (32, 32))
    logits = torch.randn(4, 2, 2, 2)
    for kept in ([0], [0, 1, 2], [1, 3], [0, 1, 2, 2]):
        with pytest.raises(ValueError, match="do not cover"):
            merge_windows(logits[kept], torch.tensor([rows[index] for index in kept]), 8)


def test_what_does_not_fit_together_is_refused() -> None:
    rows = torch.tensor(describe(0, 0, 0, [(0, 0)], (16, 16), (16, 16), (16, 16)))
    with pytest.raises(ValueError, match="window_offsets"):
        merge_windows(torch.randn(2, 3, 2, 2), rows, 8)
    with pytest.raises(ValueError, match="`logits` must have the shape"):
        merge_windows(torch.randn(1, 0, 2, 2), rows, 8)
    for target_sizes in ([(4, 4), (5, 5)], [(4, 4, 4)], [(0, 4)]):
        with pytest.raises(ValueError, match="target_sizes"):
            merge_windows(torch.randn(1, 3, 2, 2), rows, 8, target_sizes)
    with pytest.raises(ValueError, match="patch_size"):
        merge_windows(torch.randn(1, 3, 3, 3), rows, 8)


@needs_precision
def test_whatever_is_set_outside_the_merge_is_in_float32_and_the_settings_stay() -> None:
    rows = torch.tensor(describe(0, 0, 0, [(0, 0)], (16, 16), (16, 16), (40, 30)))
    logits = torch.randn(1, 3, 2, 2)
    ((_, expected),) = merge_windows(logits, rows, 8, return_scores=True)
    matmul, threads = torch.backends.mkldnn.matmul, torch.get_num_threads()
    previous = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"
        torch.set_num_threads(2)
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            ((_, scores),) = merge_windows(logits, rows, 8, return_scores=True)
        with pytest.raises(ValueError, match="patch_size"):
            merge_windows(torch.randn(1, 3, 3, 3), rows, 8)
        assert (matmul.fp32_precision, torch.get_num_threads()) == ("bf16", 2)
    finally:
        matmul.fp32_precision = previous
        torch.set_num_threads(threads)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)


def test_a_map_may_have_one_pixel_and_scores_are_kept_only_if_they_are_wanted() -> None:
    windows = describe(0, 0, 0, [(0, 0)], (16, 16), (16, 16), (16, 16))
    merger = WindowMerger(windows, patch_size=8, size=(1, 1))
    merger.add(windows, torch.randn(1, 3, 2, 2))
    assert merger.segmentation.shape == (1, 1) and merger.scores is None
    ((segmentation, _),) = merge_windows(torch.randn(1, 3, 2, 2), torch.tensor(windows), 8, [(1, 1)])
    assert segmentation.shape == (1, 1)


@needs_precision
@pytest.mark.parametrize(("precision", "dtype"), [("none", "float32"), ("ieee", "float32"), ("bf16", "float64")])
def test_products_are_exact_whatever_is_set(precision, dtype) -> None:
    matmul = torch.backends.mkldnn.matmul
    previous = matmul.fp32_precision
    try:
        matmul.fp32_precision = precision
        assert product_dtype(torch.device("cpu")) == getattr(torch, dtype)
        assert matmul.fp32_precision == precision
    finally:
        matmul.fp32_precision = previous


@pytest.mark.parametrize(("precision", "dtype"), [("highest", "float32"), ("high", "float64"), ("medium", "float64")])
def test_products_are_exact_where_torch_has_one_setting_for_all_devices(precision, dtype, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends, "mkldnn", SimpleNamespace())
    previous = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert product_dtype(torch.device("cpu")) == getattr(torch, dtype)
    finally:
        torch.set_float32_matmul_precision(previous)


def test_tiles_are_bounded_on_every_device() -> None:
    assert tile_size((512, 683), 150, torch.device("cpu")) == (64, 27)
    assert tile_size((4, 5), 10**6, torch.device("cpu")) == (64, 1)
    height, width = tile_size((512, 683), 150, torch.device("cuda"))
    assert width == 683
    assert height * width * 150 <= sliding_window.GPU_TILE_VALUES
    assert tile_size((4, 10**5), 1000, torch.device("cuda"))[0] == 1
