import json
import math
import pickle
import warnings
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from segmenter_hf.evaluation.metrics import ConfusionMatrix, MeanIoU, confusion_matrix, scores_from_confusion_matrix


GOLDEN = Path(__file__).parents[1] / "fixtures" / "protocol" / "mean_iou"


def random_maps(seed, shapes, num_labels, ignore_index=255, dtype=np.uint8):
    rng = np.random.default_rng(seed)
    predictions = [rng.integers(0, num_labels, shape).astype(dtype) for shape in shapes]
    references = [rng.integers(0, num_labels, shape).astype(dtype) for shape in shapes]
    for reference in references:
        reference[rng.random(reference.shape) < 0.2] = ignore_index
    return predictions, references


def naive_confusion_matrix(prediction, reference, num_labels, ignore_index):
    matrix = [[0] * num_labels for _ in range(num_labels)]
    for predicted, true in zip(prediction.ravel().tolist(), reference.ravel().tolist()):
        if true != ignore_index:
            matrix[true][predicted] += 1
    return matrix


def naive_scores(matrix):
    classes = range(len(matrix))
    iou, accuracy = [], []
    for i in classes:
        labelled = sum(matrix[i])
        union = labelled + sum(matrix[j][i] for j in classes) - matrix[i][i]
        iou.append(matrix[i][i] / union if union else math.nan)
        accuracy.append(matrix[i][i] / labelled if labelled else math.nan)
    total = sum(map(sum, matrix))
    present_iou = [x for x in iou if not math.isnan(x)]
    present_accuracy = [x for x in accuracy if not math.isnan(x)]
    return {
        "mean_iou": sum(present_iou) / len(present_iou) if present_iou else math.nan,
        "mean_accuracy": sum(present_accuracy) / len(present_accuracy) if present_accuracy else math.nan,
        "overall_accuracy": sum(matrix[i][i] for i in classes) / total if total else math.nan,
        "per_category_iou": iou,
        "per_category_accuracy": accuracy,
    }


def assert_same_scores(scores, expected):
    """A ratio is rounded to float32, by at most 2^-25; sum and mean of up to six add at most 4 * 2^-24."""
    assert scores.keys() == expected.keys()
    for key, value in expected.items():
        tolerance = 5 * 2**-24 if key in ("mean_iou", "mean_accuracy") else 2**-24
        np.testing.assert_allclose(scores[key], value, rtol=0, atol=tolerance, equal_nan=True, err_msg=key)


@st.composite
def map_pairs(draw):
    num_labels = draw(st.integers(1, 6))
    ignore_index = draw(st.sampled_from([255, -100, 0, num_labels, num_labels + 1]))
    size = draw(st.integers(0, 30))
    labels = st.integers(0, num_labels - 1)
    prediction = draw(st.lists(labels, min_size=size, max_size=size))
    reference = draw(st.lists(labels | st.just(ignore_index), min_size=size, max_size=size))
    return np.array(prediction, dtype=np.int64), np.array(reference, dtype=np.int64), num_labels, ignore_index


# Thirds and halves whose mean in float32 is off by 7.3e-8.
@example((np.array([0, 0, 0, 0, 0, 0, 1, 0, 0, 2]), np.array([0, 0, 1, 1, 255, 255, 1, 255, 255, 2]), 3, 255))
@given(map_pairs())
@settings(max_examples=200, deadline=None)
def test_counts_and_scores_equal_a_plain_loop(case):
    prediction, reference, num_labels, ignore_index = case
    matrix = confusion_matrix(prediction, reference, num_labels, ignore_index)
    expected = naive_confusion_matrix(prediction, reference, num_labels, ignore_index)
    assert matrix.dtype == np.int64
    assert matrix.tolist() == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_scores(scores_from_confusion_matrix(matrix), naive_scores(expected))


def test_scores_equal_those_of_mmsegmentation():
    maps = np.load(GOLDEN / "maps.npz")
    expected = json.loads((GOLDEN / "expected.json").read_text())
    metric = MeanIoU(expected["num_labels"], expected["ignore_index"])
    for i in range(expected["n"]):
        metric.add(prediction=maps[f"pred_{i}"], reference=maps[f"gt_{i}"])
    scores = metric.compute()

    names = {
        "mean_iou": "mIoU",
        "mean_accuracy": "mAcc",
        "overall_accuracy": "aAcc",
        "per_category_iou": "IoU",
        "per_category_accuracy": "Acc",
    }
    for name, golden_name in names.items():
        golden = np.array(expected[golden_name], dtype=np.float64)  # null becomes nan
        np.testing.assert_allclose(scores[name], golden, rtol=0, atol=1e-9, equal_nan=True, err_msg=name)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int32, np.int64, np.uint64])
def test_every_integer_dtype_of_arrays_and_tensors_gives_the_same_counts(dtype):
    (prediction,), (reference,) = random_maps(0, [(13, 17)], num_labels=7, ignore_index=100)
    expected = naive_confusion_matrix(prediction, reference, 7, 100)
    prediction, reference = prediction.astype(dtype), reference.astype(dtype)
    assert confusion_matrix(prediction, reference, 7, 100).tolist() == expected
    tensors = torch.from_numpy(prediction), torch.from_numpy(reference)
    assert confusion_matrix(*tensors, 7, 100).tolist() == expected


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 6, 255, 256])
def test_maps_of_bytes_may_ignore_any_value(ignore_index):
    stored = ignore_index if 0 <= ignore_index < 256 else 3
    (prediction,), (reference,) = random_maps(0, [(13, 17)], num_labels=7, ignore_index=stored)
    matrix = confusion_matrix(prediction, reference, 7, ignore_index)
    assert matrix.tolist() == naive_confusion_matrix(prediction, reference, 7, ignore_index)
    if ignore_index != 255:
        with pytest.raises(ValueError, match="got 255"):
            confusion_matrix(prediction, np.full_like(reference, 255), 7, ignore_index)


@pytest.mark.parametrize("num_labels", [255, 256, 257, 300])
def test_maps_of_bytes_may_have_more_labels_than_a_byte_holds(num_labels):
    prediction = np.arange(num_labels, dtype=np.uint16)
    reference = (prediction % 256).astype(np.uint8)
    expected = naive_confusion_matrix(prediction, reference, num_labels, 254)
    assert confusion_matrix(prediction, reference, num_labels, ignore_index=254).tolist() == expected


def test_counts_do_not_change_the_inputs():
    (prediction,), (reference,) = random_maps(0, [(13, 17)], num_labels=7, dtype=np.int64)
    before = prediction.copy(), reference.copy()
    confusion_matrix(prediction, reference, 7)
    assert np.array_equal(prediction, before[0]) and np.array_equal(reference, before[1])


def test_counts_of_maps_that_are_not_contiguous_are_right():
    (prediction,), (reference,) = random_maps(0, [(14, 18)], num_labels=7)
    matrix = confusion_matrix(prediction[::2, ::3], reference.T[::3, ::2].T, 7)
    assert matrix.tolist() == naive_confusion_matrix(prediction[::2, ::3], reference[::2, ::3], 7, 255)


def test_thousands_of_labels_are_counted_exactly():
    num_labels = 3000
    prediction = np.array([[2999, 2999, 0], [2998, 256, 2999]], dtype=np.uint16)
    reference = np.array([[2999, 2998, 2999], [0, 255, 2999]], dtype=np.uint16)
    matrix = confusion_matrix(prediction, reference, num_labels, ignore_index=65535)
    assert matrix.sum() == 6
    assert matrix[2999, 2999] == 2
    assert matrix[2998, 2999] == matrix[2999, 0] == matrix[0, 2998] == matrix[255, 256] == 1


@pytest.mark.parametrize(
    ("prediction", "reference", "message"),
    [
        (np.zeros((3, 4), int), np.zeros((4, 3), int), r"\(3, 4\) and \(4, 3\)"),
        (np.full((3, 4), 5), np.zeros((3, 4), int), r"predictions must lie in \[0, 5\), got 5"),
        (np.full((3, 4), 255, np.uint8), np.zeros((3, 4), int), "predictions .* got 255"),
        (np.full((3, 4), -1), np.zeros((3, 4), int), "predictions .* got -1"),
        (np.zeros((3, 4), int), np.full((3, 4), 5), "references .* ignore_index 255, got 5"),
        (np.zeros((3, 4), int), np.full((3, 4), 254, np.uint8), "references .* got 254"),
        (np.zeros((3, 4), int), np.full((3, 4), -1), "references .* got -1"),
        (np.zeros((3, 4), int), np.full((3, 4), 2**64 - 1, np.uint64), "references .* got 18446744073709551615"),
        (np.zeros((3, 4)), np.zeros((3, 4), int), "predictions must have an integer dtype, got float64"),
        (np.zeros((3, 4), int), torch.zeros(3, 4, dtype=torch.bfloat16), "references must have an integer dtype"),
    ],
)
def test_wrong_maps_are_refused_by_value(prediction, reference, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(prediction, reference, num_labels=5)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_only_the_wrong_values_are_named_and_at_most_ten(dtype):
    right, wrong = np.array([0, 4, 1]), np.array([0, 4, 9], dtype)
    with pytest.raises(ValueError, match=r"predictions .* got 9\.$"):
        confusion_matrix(wrong, right, num_labels=5)
    with pytest.raises(ValueError, match=r"references .* got 9\. "):
        confusion_matrix(right, wrong, num_labels=5)
    for last, named in ((15, "14, 15"), (16, r"14, 15, \.\.\.")):
        values = np.arange(6, last + 1, dtype=dtype)
        with pytest.raises(ValueError, match=rf"got 6, 7, .*, {named}\. "):
            confusion_matrix(np.zeros_like(values), values, num_labels=5)


def test_a_prediction_out_of_range_is_refused_even_where_the_reference_is_ignored():
    with pytest.raises(ValueError, match="got 255"):
        confusion_matrix(np.full((2, 3), 255), np.full((2, 3), 255), num_labels=5)


def test_absent_classes_are_nan_and_skipped_by_the_means():
    # class 0 is right, class 1 is always taken for class 2, class 2 is never in the references, class 3 nowhere
    matrix = np.array([[4, 0, 0, 0], [0, 0, 6, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    scores = scores_from_confusion_matrix(matrix)
    np.testing.assert_equal(scores["per_category_iou"], [1.0, 0.0, 0.0, math.nan])
    np.testing.assert_equal(scores["per_category_accuracy"], [1.0, 0.0, math.nan, math.nan])
    assert scores["mean_iou"] == pytest.approx(1 / 3)
    assert scores["mean_accuracy"] == pytest.approx(1 / 2)
    assert scores["overall_accuracy"] == pytest.approx(0.4)


def test_an_empty_matrix_gives_nan_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = scores_from_confusion_matrix(np.zeros((3, 3), dtype=np.int64))
    assert all(np.isnan(value).all() for value in scores.values())


def test_a_matrix_that_is_not_square_is_refused():
    with pytest.raises(ValueError, match=r"\(num_labels, num_labels\), got \(2, 3\)"):
        scores_from_confusion_matrix(np.zeros((2, 3)))


def test_every_way_of_adding_gives_the_same_scores():
    shapes = [(5, 9), (11, 4), (7, 7), (2, 30)]
    predictions, references = random_maps(1, shapes, num_labels=6)
    total = sum(confusion_matrix(p, r, 6) for p, r in zip(predictions, references))
    expected = scores_from_confusion_matrix(total)
    metric = MeanIoU(num_labels=6)

    for prediction, reference in zip(predictions, references):
        metric.add(prediction=prediction, reference=reference)
    assert metric.compute() == expected

    metric.add_batch(predictions=predictions[:1], references=references[:1])
    metric.add_batch(predictions=predictions[1:], references=references[1:])
    assert metric.compute() == expected

    metric.add_confusion_matrix(torch.from_numpy(total))
    assert metric.compute() == expected

    metric.add_batch(predictions=predictions[:3], references=references[:3])
    assert metric.compute(predictions=predictions[3:], references=references[3:]) == expected


def test_stacked_maps_are_a_batch():
    predictions, references = random_maps(2, [(5, 9)] * 3, num_labels=6)
    metric = MeanIoU(num_labels=6)
    expected = metric.compute(predictions=predictions, references=references)
    stacked = np.stack(predictions), np.stack(references)
    assert metric.compute(predictions=stacked[0], references=stacked[1]) == expected
    assert metric.compute(predictions=torch.tensor(stacked[0]), references=torch.tensor(stacked[1])) == expected


def test_scores_are_plain_floats_that_json_can_hold():
    predictions, references = random_maps(3, [(5, 9)], num_labels=6)
    scores = MeanIoU(num_labels=6).compute(predictions=predictions, references=references)
    assert json.loads(json.dumps(scores)) == scores


def test_compute_starts_again_from_zero():
    metric = MeanIoU(num_labels=3)
    metric.add(prediction=np.zeros((2, 3), int), reference=np.ones((2, 3), int))
    assert metric.compute()["overall_accuracy"] == 0
    metric.add(prediction=np.zeros((2, 3), int), reference=np.zeros((2, 3), int))
    assert metric.compute()["overall_accuracy"] == 1


def test_compute_without_maps_says_what_to_call():
    metric = MeanIoU(num_labels=3)
    with pytest.raises(ValueError, match="call `add`"):
        metric.compute()
    with pytest.raises(ValueError, match="call `add`"):
        metric.compute(predictions=[], references=[])


def test_a_map_that_is_ignored_everywhere_counts_as_added():
    metric = MeanIoU(num_labels=3)
    metric.add(prediction=np.zeros((2, 3), int), reference=np.full((2, 3), 255))
    assert math.isnan(metric.compute()["mean_iou"])


def test_a_refused_batch_leaves_the_counts_as_they_were():
    good = np.zeros((2, 3), int)
    metric = MeanIoU(num_labels=3)
    metric.add(prediction=good, reference=good)
    with pytest.raises(ValueError, match="got 7"):
        metric.add_batch(predictions=[good + 1, good], references=[good, good + 7])
    with pytest.raises(ValueError, match="got 2 and 1"):
        metric.add_batch(predictions=[good + 1, good], references=[good])
    assert metric.compute()["overall_accuracy"] == 1


def test_one_argument_of_compute_without_the_other_is_refused():
    with pytest.raises(ValueError, match="both predictions and references"):
        MeanIoU(num_labels=3).compute(predictions=[np.zeros((2, 3), int)])


@pytest.mark.parametrize("matrix", [np.zeros((2, 2), int), np.full((3, 3), -1), np.zeros((3, 3))])
def test_a_wrong_confusion_matrix_is_refused(matrix):
    with pytest.raises(ValueError, match="matrix must h"):
        MeanIoU(num_labels=3).add_confusion_matrix(matrix)


def test_an_added_confusion_matrix_is_copied():
    matrix = np.eye(3, dtype=np.int64)
    metric = MeanIoU(num_labels=3)
    metric.add_confusion_matrix(matrix)
    matrix[:] = 0
    assert metric.compute()["mean_iou"] == 1


def test_no_classes_are_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        MeanIoU(num_labels=0)


def test_one_class_is_enough():
    zeros = np.zeros((2, 3), int)
    assert MeanIoU(num_labels=1).compute(predictions=[zeros], references=[zeros])["mean_iou"] == 1


def test_maps_are_given_by_name_so_that_they_cannot_be_swapped():
    metric, zeros = MeanIoU(num_labels=2), np.zeros((1, 2, 3), int)
    for call in (metric.add, metric.add_batch, metric.compute):
        with pytest.raises(TypeError, match="positional"):
            call(zeros, zeros)


def test_maps_are_counted_and_not_written_to_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "metrics"))
    predictions, references = random_maps(4, [(5, 9), (3, 8)], num_labels=6)
    metric = MeanIoU(num_labels=6)
    metric.add_batch(predictions=predictions, references=references)
    metric.compute()
    assert Path(metric.data_dir).is_relative_to(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_counts_of_parts_merge_to_those_of_the_whole():
    predictions, references = random_maps(5, [(5, 9), (3, 8), (7, 2)], num_labels=6)
    whole, one, two = (ConfusionMatrix(6) for _ in range(3))
    added = whole.update(predictions, references)
    assert np.array_equal(added, whole.matrix) and whole.matrix.dtype == np.int64
    for prediction, reference in zip(predictions[:2], references[:2]):
        one.update(prediction, reference)
    two.update(torch.from_numpy(predictions[2]), references[2])
    one.merge(two)
    one.merge(two.matrix * 0)
    assert np.array_equal(one.matrix, whole.matrix)
    assert one.compute() == whole.compute() == whole.compute() == scores_from_confusion_matrix(added)
    whole.reset()
    assert not whole.matrix.any() and math.isnan(whole.compute()["mean_iou"])
    with pytest.raises(ValueError, match="got 9"):
        two.update([predictions[0], np.array([9])], [references[0], np.array([0])])
    assert two.matrix.sum() == (references[2] != 255).sum()


def test_two_instances_do_not_share_counts():
    zeros, ones = np.zeros((2, 3), int), np.ones((2, 3), int)
    right, wrong = MeanIoU(num_labels=2), MeanIoU(num_labels=2)
    right.add(prediction=zeros, reference=zeros)
    wrong.add(prediction=zeros, reference=ones)
    assert right.compute()["overall_accuracy"] == 1
    assert wrong.compute()["overall_accuracy"] == 0


def test_a_pickled_metric_goes_on_counting():
    zeros, ones = np.zeros((2, 3), int), np.ones((2, 3), int)
    metric = MeanIoU(num_labels=2)
    metric.add(prediction=zeros, reference=zeros)
    copy = pickle.loads(pickle.dumps(metric))
    copy.add(prediction=zeros, reference=ones)
    assert copy.compute()["overall_accuracy"] == 0.5
    assert metric.compute()["overall_accuracy"] == 1


def test_it_is_a_metric_of_evaluate():
    metric = MeanIoU(num_labels=2)
    assert isinstance(metric, evaluate.Metric)
    assert metric.name == "mean_iou"
    assert set(metric.features) == {"predictions", "references"}
    zeros = np.zeros((1, 2, 3), int)
    assert evaluate.combine([metric]).compute(predictions=zeros, references=zeros)["mean_iou"] == 1
