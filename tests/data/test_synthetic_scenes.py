"""The embedded street scenes: exact, repeatable, and not to be told apart by color alone."""

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d, interpolate, one_hot

from segmenter_hf.data.label_sets import load_label_set
from segmenter_hf.data.loading import load_segmentation_datasets
from segmenter_hf.data.synthetic_scenes import PERSON, SIGN, draw_scene, embedded_scenes, save_scenes
from segmenter_hf.evaluation.metrics import MeanIoU


NUM_LABELS = load_label_set("scenes").num_labels


@pytest.fixture(scope="module")
def scenes() -> list[tuple[np.ndarray, np.ndarray]]:
    return [draw_scene(seed) for seed in range(60)]


def test_a_scene_is_named_by_its_seed_and_size() -> None:
    image, mask = draw_scene(3, (96, 130))
    again, mask_again = draw_scene(3, (96, 130))
    assert (image.shape, image.dtype, mask.shape, mask.dtype) == ((96, 130, 3), np.uint8, (96, 130), np.uint8)
    assert (image == again).all()
    assert (mask == mask_again).all()
    assert (draw_scene(4, (96, 130))[0] != image).any()


def test_every_class_is_in_most_scenes_and_no_other_label_is(scenes) -> None:
    occurs = np.array([np.bincount(mask.ravel(), minlength=NUM_LABELS) > 0 for _, mask in scenes])
    assert occurs.shape[1] == NUM_LABELS
    assert occurs.mean(0).min() >= 0.6


def test_people_and_signs_are_not_vanishingly_small(scenes) -> None:
    shares = np.mean([np.bincount(mask.ravel(), minlength=NUM_LABELS) / mask.size for _, mask in scenes], axis=0)
    assert shares[[PERSON, SIGN]].min() > 0.01


def test_color_alone_does_not_tell_the_classes_apart(scenes) -> None:
    counts = np.ones((8**3, NUM_LABELS))

    def bins(image: np.ndarray) -> np.ndarray:
        return (image.astype(int) // 32) @ [64, 8, 1]

    for image, mask in scenes[:40]:
        np.add.at(counts, (bins(image), mask), 1)
    metric = MeanIoU(NUM_LABELS)
    classes = counts.argmax(1)
    for image, mask in scenes[40:]:
        metric.add(prediction=classes[bins(image)], reference=mask)
    assert metric.compute()["mean_iou"] < 0.45


def test_patches_of_eight_pixels_are_fine_enough_for_the_objects(scenes) -> None:
    metric = MeanIoU(NUM_LABELS)
    for _, mask in scenes[:20]:
        exact = one_hot(torch.from_numpy(mask).long(), NUM_LABELS).permute(2, 0, 1)[None].float()
        patches = interpolate(avg_pool2d(exact, 8), size=mask.shape, mode="bilinear")
        metric.add(prediction=patches[0].argmax(0), reference=mask)
    assert metric.compute()["mean_iou"] > 0.88


def test_datasets_of_different_seeds_share_no_scene() -> None:
    first, second = embedded_scenes(3, (48, 64), seed=0), embedded_scenes(2, (48, 64), seed=1)
    assert first[0]["image"].size == (64, 48)
    assert first[0]["annotation"].mode == "L"
    assert not set(first["id"]) & set(second["id"])
    assert (np.asarray(first[0]["image"]) == draw_scene(0, (48, 64))[0]).all()


def test_saved_scenes_are_a_dataset_folder(tmp_path) -> None:
    save_scenes(tmp_path, 2, (48, 64), seed=5)
    (rows,) = load_segmentation_datasets(str(tmp_path), splits=["train"]).values()
    assert len(rows) == 2
    save_scenes(tmp_path, 2, (32, 32), seed=5)  # again
    with pytest.raises(ValueError, match="images holds other images, such as scene_05000001.png"):
        save_scenes(tmp_path, 1, (48, 64), seed=5)


def test_a_side_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 32"):
        draw_scene(0, (16, 64))
