"""Joint augmentation: image and mask move together, the drawn quantities follow their law."""

import colorsys
from collections import Counter
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from segmenter_hf.data.augmentation import (
    SegmentationAugmentation,
    adjust_levels,
    adjust_saturation_and_hue,
    draw_crop_window,
    horizontal_flip,
    is_balanced,
    pad_to_crop,
    photometric_distortion,
    rescaled_size,
    resize_image,
    resize_mask,
)


def noise_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def blocks_mask(height: int, width: int) -> np.ndarray:
    """Vertical stripes of the classes 0, 1, 2, each 5 pixels wide."""
    return np.broadcast_to((np.arange(width) // 5 % 3).astype(np.uint8), (height, width)).copy()


@pytest.mark.parametrize(
    ("image_size", "size", "max_ratio", "ratio", "expected"),
    [
        ((360, 480), 512, 4, 1.0, (512, 683)),  # the short side decides
        ((480, 360), 512, 4, 1.0, (683, 512)),
        ((360, 480), 512, 4, 0.5, (256, 341)),
        ((100, 1000), 512, 4, 1.0, (205, 2048)),  # the long side decides
        ((1024, 2048), 1024, 2, 2.0, (2048, 4096)),
        ((1, 500), 64, 2, 0.5, (1, 64)),  # never empty
    ],
)
def test_rescaled_size_fits_the_box_and_rounds_half_up(image_size, size, max_ratio, ratio, expected):
    assert rescaled_size(image_size, size, max_ratio, ratio) == expected


@pytest.mark.parametrize("size", [(41, 67), (20, 31), (97, 150), (37, 53), (5, 7)])
def test_resized_image_equals_plain_bilinear_interpolation(size):
    image = noise_image(37, 53)
    expected = F.interpolate(torch.from_numpy(image).permute(2, 0, 1)[None].double(), size=size, mode="bilinear")
    difference = resize_image(image, size) - expected[0].permute(1, 2, 0).numpy()
    assert np.abs(difference).max() < 0.5 + 1e-4


@pytest.mark.parametrize("size", [(41, 67), (20, 31), (97, 150), (37, 53), (5, 7)])
def test_resized_mask_equals_the_nearest_of_pil(size):
    mask = np.random.default_rng(0).integers(0, 256, (37, 53), dtype=np.uint8)
    expected = Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST)
    assert np.array_equal(resize_mask(mask, size), np.asarray(expected))


@pytest.mark.parametrize("size", [(64, 90), (20, 33)])
@pytest.mark.parametrize("window", [(0, 0, 20, 33), (3, 5, 11, 17), (9, 20, 11, 13)])
def test_resizing_a_window_gives_the_window_of_the_resized(size, window):
    image, mask = noise_image(37, 53), np.random.default_rng(0).integers(0, 9, (37, 53))
    top, left, height, width = window
    area = slice(top, top + height), slice(left, left + width)
    assert np.array_equal(resize_image(image, size, window), resize_image(image, size)[area])
    assert np.array_equal(resize_mask(mask, size, window), resize_mask(mask, size)[area])


def test_labels_above_255_survive_the_resize():
    mask = np.arange(12, dtype=np.int32).reshape(3, 4) * 1000
    assert np.array_equal(np.unique(resize_mask(mask, (9, 8))), np.unique(mask))


def test_image_and_mask_move_together():
    height, width = 60, 80
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([rows * 3, columns * 3, np.zeros_like(rows)], axis=-1).astype(np.uint8)
    mask = (rows * width + columns).astype(np.int32)
    augment = SegmentationAugmentation(
        (40, 56), size=60, max_ratio=2, cat_max_ratio=1.0, photometric_distortion=False, ignore_index=-1
    )
    for seed in range(30):
        new_image, new_mask = augment(image, mask, np.random.default_rng(seed))
        valid = new_mask >= 0
        assert valid.any()
        # Nearest takes a pixel at most half a source pixel away (0.5 * 3 levels), plus the rounding of bilinear.
        assert np.abs(new_image[..., 0][valid] - (new_mask[valid] // width) * 3.0).max() <= 2
        assert np.abs(new_image[..., 1][valid] - (new_mask[valid] % width) * 3.0).max() <= 2


def test_crops_come_from_everywhere_and_are_both_mirrored_and_not():
    image, mask = noise_image(40, 60), np.arange(2400, dtype=np.int32).reshape(40, 60)
    augment = SegmentationAugmentation(16, 40, 2, ratio_range=(1.0, 1.0), cat_max_ratio=1.0, ignore_index=-1)
    corners, mirrored = [], 0
    for seed in range(400):
        _, crop = augment(image, mask, np.random.default_rng(seed))
        mirrored += crop[0, 0] > crop[0, -1]
        corners.append(min(crop[0, 0], crop[0, -1]))
    tops, lefts = {c // 60 for c in corners}, {c % 60 for c in corners}
    assert tops == set(range(25)) and lefts == set(range(45))
    assert abs(np.mean([c // 60 for c in corners]) - 12) < 1.5 and abs(np.mean([c % 60 for c in corners]) - 22) < 2.5
    assert 160 < mirrored < 240


def test_ratio_is_drawn_uniformly():
    image, mask = noise_image(30, 40), blocks_mask(30, 40)
    augment = SegmentationAugmentation((100, 200), 30, 4, photometric_distortion=False)
    heights = []
    for seed in range(500):
        _, crop = augment(image, mask, np.random.default_rng(seed))
        heights.append((crop != 255).any(axis=1).sum())
    ratios = np.array(heights) / 30
    assert ratios.min() < 0.54 and ratios.max() > 1.96
    assert abs(ratios.mean() - 1.25) < 0.06
    assert abs(ratios.std() - 1.5 / 12**0.5) < 0.04


def test_masks_hold_only_labels_of_the_input_and_the_ignore_index():
    image, mask = noise_image(45, 70), blocks_mask(45, 70)
    mask[:10] = 255
    augment = SegmentationAugmentation((64, 48), size=50, max_ratio=4)
    seen = set()
    for seed in range(40):
        new_image, new_mask = augment(image, mask, np.random.default_rng(seed))
        assert new_image.shape == (64, 48, 3) and new_image.dtype == np.uint8
        assert new_mask.shape == (64, 48) and new_mask.dtype == np.uint8
        seen |= set(np.unique(new_mask).tolist())
    assert seen == {0, 1, 2, 255}


def test_the_same_generator_gives_the_same_pair_and_leaves_the_input_alone():
    image, mask = noise_image(45, 70), blocks_mask(45, 70)
    image_before, mask_before = image.copy(), mask.copy()
    augment = SegmentationAugmentation(32, size=50, max_ratio=4)
    first, second, other = (augment(image, mask, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])
    assert not np.array_equal(first[0], other[0])
    assert np.array_equal(image, image_before) and np.array_equal(mask, mask_before)


def test_balance_needs_two_classes_below_the_limit_among_valid_pixels():
    assert not is_balanced(np.zeros((4, 4), np.uint8), 0.75, 255)
    assert not is_balanced(np.full((4, 4), 255, np.uint8), 0.75, 255)
    assert not is_balanced(np.array([[0, 0, 0, 1]]), 0.75, 255)
    assert is_balanced(np.array([[0, 0, 0, 1]]), 0.76, 255)
    assert not is_balanced(np.array([[0, 0, 0, 1, 255, 255]]), 0.75, 255)  # ignored pixels do not count
    assert is_balanced(np.array([[0, 0, 1, 255, 255, 255]]), 0.75, 255)


def test_crops_are_drawn_again_until_balanced():
    mask = np.zeros((20, 200), np.uint8)
    mask[:, 100:] = 1
    rng = np.random.default_rng(0)
    shares = {1.0: [], 0.75: []}
    for limit, found in shares.items():
        for _ in range(300):
            _, left, _, width = draw_crop_window(mask, mask.shape, (20, 40), limit, 255, rng)
            found.append(mask[0, left : left + width].mean())
    unbalanced = {limit: np.mean([not 0.25 < share < 0.75 for share in found]) for limit, found in shares.items()}
    assert unbalanced[1.0] > 0.8
    assert abs(unbalanced[0.75] - unbalanced[1.0] ** 11) < 0.1


@pytest.mark.parametrize(("cat_max_ratio", "num_draws"), [(0.75, 11), (1.0, 1)])
def test_a_crop_is_drawn_eleven_times_at_most_as_mmsegmentation_does_and_once_where_any_will_do(
    cat_max_ratio, num_draws
):
    rng = Mock(wraps=np.random.default_rng(0))
    draw_crop_window(np.zeros((30, 40), np.uint8), (30, 40), (16, 16), cat_max_ratio, 255, rng)
    assert rng.integers.call_count == 2 * num_draws  # top and left


def test_a_crop_that_cannot_be_balanced_is_still_made():
    window = draw_crop_window(np.zeros((30, 40), np.uint8), (30, 40), (16, 16), 0.75, 255, np.random.default_rng(0))
    assert window[2:] == (16, 16)


def test_crop_larger_than_the_image_takes_all_of_it():
    mask = blocks_mask(30, 40)
    assert draw_crop_window(mask, (30, 40), (64, 20), 0.75, 255, np.random.default_rng(0))[::2] == (0, 30)


def test_flip_mirrors_image_and_mask():
    image, mask = noise_image(5, 8), blocks_mask(5, 8)
    flipped_image, flipped_mask = horizontal_flip(image, mask)
    for x in range(8):
        assert np.array_equal(flipped_image[:, x], image[:, 7 - x])
        assert np.array_equal(flipped_mask[:, x], mask[:, 7 - x])


@pytest.mark.parametrize("ignore_index", [-100, -1, 256])
def test_padding_of_8_bits_holds_any_ignore_index(ignore_index):
    _, mask = pad_to_crop(noise_image(2, 3), np.full((2, 3), 255, np.uint8), (4, 3), 127, ignore_index)
    assert np.unique(mask).tolist() == sorted([255, ignore_index])


def test_padding_goes_right_and_down_with_the_given_color_and_the_ignore_index():
    image, mask = noise_image(5, 8), blocks_mask(5, 8)
    padded_image, padded_mask = pad_to_crop(image, mask, (7, 12), (124, 116, 104), 254)
    assert np.array_equal(padded_image[:5, :8], image) and np.array_equal(padded_mask[:5, :8], mask)
    assert (padded_image[5:] == (124, 116, 104)).all() and (padded_image[:, 8:] == (124, 116, 104)).all()
    assert (padded_mask[5:] == 254).all() and (padded_mask[:, 8:] == 254).all()


def test_levels_are_scaled_shifted_and_cut():
    image = np.array([[[0, 100, 250]]], np.uint8)
    assert adjust_levels(image, 1.5, 0).tolist() == [[[0, 150, 255]]]
    assert adjust_levels(image, 1, -32).tolist() == [[[0, 68, 218]]]
    assert adjust_levels(image, 0.5, 20.3).tolist() == [[[20, 70, 145]]]


@pytest.mark.parametrize(("factor", "degrees"), [(1.3, 0), (0.6, 0), (1, 30), (1, -36), (1.5, 25), (0, 0), (1, 180)])
def test_saturation_and_hue_equal_a_loop_over_colorsys(factor, degrees):
    image = noise_image(12, 15)
    image[0] = image[0, :, :1]  # gray pixels have no hue
    image[1] = image[1].max(axis=1, keepdims=True) * np.array([1, 0, 1], np.uint8)
    result = adjust_saturation_and_hue(image, factor, degrees)
    for pixel, new in zip(image.reshape(-1, 3), result.reshape(-1, 3)):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel / 255)
        expected = colorsys.hsv_to_rgb((hue + degrees / 360) % 1, min(saturation * factor, 1), value)
        assert np.abs(np.array(expected) * 255 - new).max() <= 0.51


def test_each_distortion_happens_half_of_the_time(monkeypatch):
    calls = []

    def levels(image, factor, delta):
        calls.append(("contrast", factor) if factor != 1 else ("brightness", delta))
        return image

    def saturation_and_hue(image, factor, degrees):
        calls.extend([("saturation", factor), ("hue", degrees)])
        return image

    monkeypatch.setattr("segmenter_hf.data.augmentation.adjust_levels", levels)
    monkeypatch.setattr("segmenter_hf.data.augmentation.adjust_saturation_and_hue", saturation_and_hue)
    image, rng = noise_image(2, 2), np.random.default_rng(0)
    values = {"brightness": [], "contrast": [], "saturation": [], "hue": []}
    contrast_first, together = 0, Counter()
    for _ in range(2000):
        calls.clear()
        photometric_distortion(image, rng)
        names = [name for name, _ in calls]
        contrast_first += "contrast" in names and names.index("contrast") < names.index("saturation")
        for name, value in calls:
            if value not in (0, 1):
                values[name].append(value)
        together[frozenset(name for name, value in calls if value not in (0, 1))] += 1
    for name, low, high in (
        ("brightness", -32, 32),
        ("contrast", 0.5, 1.5),
        ("saturation", 0.5, 1.5),
        ("hue", -36, 36),
    ):
        drawn = np.array(values[name])
        assert 900 < len(drawn) < 1100, name
        assert low <= drawn.min() < low + 0.02 * (high - low) and high >= drawn.max() > high - 0.02 * (high - low)
        assert abs(drawn.mean() - (low + high) / 2) < 0.05 * (high - low)
    assert 430 < contrast_first < 570
    assert len(together) == 16  # each of the four whatever the others
    assert min(together.values()) > 80 and max(together.values()) < 170


def test_distortion_keeps_shape_and_dtype_and_often_leaves_grey_alone():
    image, rng = np.full((6, 9, 3), 100, np.uint8), np.random.default_rng(0)
    unchanged = 0
    for _ in range(400):
        result = photometric_distortion(image, rng)
        assert result.shape == image.shape and result.dtype == np.uint8
        unchanged += np.array_equal(result, image)
    assert 60 < unchanged < 140  # a quarter: gray has no hue and no saturation, so only brightness and contrast show


def test_only_the_image_is_distorted():
    image, mask = noise_image(30, 40), blocks_mask(30, 40)
    augment = SegmentationAugmentation((30, 40), 30, 2, ratio_range=(1, 1), flip_probability=0)
    new_image, new_mask = augment(image, mask, np.random.default_rng(3))
    assert np.array_equal(new_mask, mask) and not np.array_equal(new_image, image)


@pytest.mark.parametrize(
    "fields",
    [
        {"crop_size": 0},
        {"size": 0},
        {"max_ratio": 0.5},
        {"ratio_range": (2.0, 0.5)},
        {"ratio_range": (0.0, 1.0)},
        {"cat_max_ratio": 0.0},
        {"flip_probability": 1.5},
        {"pad_value": 300},
    ],
)
def test_fields_out_of_range_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        SegmentationAugmentation(**{"crop_size": 32, "size": 32, "max_ratio": 4, **fields})


def test_images_and_masks_that_do_not_fit_are_refused():
    augment = SegmentationAugmentation(32, size=32, max_ratio=4)
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="uint8"):
        augment(noise_image(8, 9).astype(np.float32), np.zeros((8, 9), np.uint8), rng)
    with pytest.raises(ValueError, match="height, width, 3"):
        augment(noise_image(8, 9)[..., 0], np.zeros((8, 9), np.uint8), rng)
    with pytest.raises(ValueError, match="size of the image"):
        augment(noise_image(8, 9), np.zeros((9, 8), np.uint8), rng)
