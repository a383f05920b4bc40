"""Masks that store 0 for "no class", where the ignore index is also a stored id."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from segmenter_hf.data.decoding import decode_example
from segmenter_hf.data.label_sets import label_set_from_names
from segmenter_hf.data.mask_checks import check_masks, infer_num_labels


def test_the_last_reduced_class_is_kept_where_its_stored_id_is_the_ignore_index() -> None:
    mask = np.array([[0, 1, 2, 3]], dtype=np.uint8)
    row = {"image": Image.new("RGB", (4, 1)), "annotation": Image.fromarray(mask)}
    label_set = dataclasses.replace(label_set_from_names(["a", "b", "c"]), ignore_index=3, reduce_labels=True)
    assert decode_example(row, label_set)[1].tolist() == [[3, 0, 1, 2]]
    report = check_masks([row], 3, label_set, show_progress=False)
    assert report.pixels_per_class.tolist() == [1, 1, 1] and report.num_ignored_pixels == 1
    far = dataclasses.replace(label_set, ignore_index=9)
    other = {**row, "annotation": Image.fromarray(np.array([[0, 1, 9, 3]], dtype=np.uint8))}
    assert decode_example(other, far)[1].tolist() == [[9, 0, 9, 2]]


def test_classes_are_not_counted_where_the_ignore_index_may_be_the_last_of_them() -> None:
    mask = np.array([[0, 1, 2, 3]], dtype=np.uint8)
    row = {"image": Image.new("RGB", (4, 1)), "annotation": Image.fromarray(mask)}
    with pytest.raises(ValueError, match="store the id 3, which is both `ignore_index` and the class after 2"):
        infer_num_labels([row], ignore_index=3, reduce_labels=True, show_progress=False)
    for ignore_index in (255, 9):
        assert infer_num_labels([row], ignore_index=ignore_index, reduce_labels=True, show_progress=False) == 3
    assert infer_num_labels([row], ignore_index=3, show_progress=False) == 3
