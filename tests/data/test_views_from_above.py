"""Flips and rotations for images without an up: image and mask move together."""

import numpy as np
import pytest

from segmenter_hf.data.augmentation import SegmentationAugmentation


FIXED = {"size": 24, "max_ratio": 4, "ratio_range": (1, 1), "cat_max_ratio": 1.0, "photometric_distortion": False}


def example() -> tuple[np.ndarray, np.ndarray]:
    mask = np.arange(24 * 24, dtype=np.int32).reshape(24, 24) % 200
    return np.repeat(mask[..., None], 3, axis=2).astype(np.uint8), mask


def test_all_flips_and_turns_occur_and_move_image_and_mask_together() -> None:
    augmentation = SegmentationAugmentation(
        crop_size=24, vertical_flip_probability=0.5, right_angle_rotations=True, **FIXED
    )
    image, mask = example()
    seen = set()
    for seed in range(80):
        pixels, labels = augmentation(image, mask, np.random.default_rng(seed))
        assert np.array_equal(pixels[..., 0], labels) and labels.flags.c_contiguous
        seen.add(labels.tobytes())
    expected = {
        np.ascontiguousarray(np.rot90(turned, turns)).tobytes()
        for turned in (mask, mask[:, ::-1])
        for turns in range(4)
    }
    assert seen == expected


def test_a_vertical_flip_is_one() -> None:
    image, mask = example()
    augmentation = SegmentationAugmentation(crop_size=24, flip_probability=0, vertical_flip_probability=1.0, **FIXED)
    assert np.array_equal(augmentation(image, mask, np.random.default_rng(0))[1], mask[::-1])


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="vertical_flip_probability must be in"):
        SegmentationAugmentation(crop_size=24, vertical_flip_probability=2, **FIXED)
    with pytest.raises(ValueError, match="need a square crop"):
        SegmentationAugmentation(crop_size=(24, 16), right_angle_rotations=True, **FIXED)
