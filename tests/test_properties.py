"""What holds for all sizes, windows, strides, labels and fields, tried on random ones, always the same.

The naive loops for the merge, the metric and the loss are in `test_sliding_window.py`, `test_metrics.py` and
`test_segmentation_loss.py`; here are the properties of the parts together, and of what is saved and loaded.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch.nn.functional import cross_entropy, interpolate
from transformers import AutoConfig

from segmenter_hf import SegmenterConfig, SegmenterImageProcessor, SetrConfig
from segmenter_hf.data.label_sets import LabelSet, load_label_set, map_labels
from segmenter_hf.evaluation.metrics import MeanIoU, confusion_matrix, scores_from_confusion_matrix
from segmenter_hf.inference.visualization import label_map_image
from segmenter_hf.models.image_io import channel_axis, pil_to_array, to_uint8
from segmenter_hf.models.resampling import resized_size
from segmenter_hf.models.segmentation_loss import upsampled_cross_entropy
from segmenter_hf.models.sliding_window import merge_windows
from segmenter_hf.models.window_geometry import Window, window_corners


few = settings(max_examples=30, deadline=None, derandomize=True, database=None)
sides = st.integers(1, 70)


@st.composite
def windows(draw) -> tuple[int, int, int]:
    """Size and stride of windows, and the size of patches."""
    patch = draw(st.sampled_from([1, 2, 4, 8, 5]))
    size = patch * draw(st.integers(1, 5))
    return size, draw(st.integers(1, size)), patch


@st.composite
def processors(draw) -> SegmenterImageProcessor:
    """An image processor of random windows, sizes, scales and flips."""
    size, stride, patch = draw(windows())
    shortest = draw(st.integers(1, 50))
    return SegmenterImageProcessor(
        size={"shortest_edge": shortest, "longest_edge": draw(st.integers(shortest, 90))},
        window_size=size,
        window_stride=max(stride, size // 3),
        patch_size=patch,
        scales=draw(st.lists(st.sampled_from([0.5, 0.75, 1.0, 1.6]), min_size=1, max_size=2)),
        do_flip=draw(st.booleans()),
        do_resize=draw(st.booleans()),
    )


def picture(height: int, width: int) -> Image.Image:
    values = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@few
@given(windows(), sides, sides)
def test_windows_cover_every_pixel_of_an_image(window, more_height, more_width) -> None:
    size, stride, _ = window
    covered = np.zeros((size + more_height - 1, size + more_width - 1), int)
    for top, left in window_corners(*covered.shape, size, stride):
        part = covered[top : top + size, left : left + size]
        assert part.shape == (size, size)
        part += 1
    assert covered.min() >= 1


@few
@given(processors(), st.lists(st.tuples(sides, sides), min_size=1, max_size=3), st.integers(1, 5))
def test_what_is_processed_and_merged_has_the_size_of_each_image(processor, sizes, num_labels) -> None:
    assume(all(max(size) <= 12 * min(size) for size in sizes))
    inputs = processor([picture(*size) for size in sizes])
    rows = inputs["window_offsets"]
    assert inputs["pixel_values"].shape == (len(rows), 3, processor.window_size, processor.window_size)
    side = processor.window_size // processor.patch_size
    merged = merge_windows(torch.randn(len(rows), num_labels, side, side), rows, processor.patch_size, None, True)
    assert [tuple(segmentation.shape) for segmentation, _ in merged] == sizes
    for segmentation, scores in merged:
        torch.testing.assert_close(scores.sum(0), torch.ones(segmentation.shape), rtol=0, atol=1e-5)
        assert 0 <= segmentation.min() <= segmentation.max() < max(num_labels, 2)  # one class has a background


@few
@given(processors(), sides, sides, st.integers(0, 4))
def test_logits_that_are_the_same_everywhere_give_the_same_everywhere(processor, height, width, best) -> None:
    """A constant passes windows, scales and flips unchanged: every pixel is a weighted mean."""
    assume(max(height, width) <= 12 * min(height, width))
    rows = processor(picture(height, width))["window_offsets"]
    side = processor.window_size // processor.patch_size
    logits = torch.zeros(len(rows), 5, side, side)
    logits[:, best] = 3.0
    ((segmentation, scores),) = merge_windows(logits, rows, processor.patch_size, return_scores=True)
    assert (segmentation == best).all()
    torch.testing.assert_close(
        scores, torch.zeros(5, 1, 1).index_fill_(0, torch.tensor(best), 3).softmax(0).expand_as(scores)
    )


@few
@given(windows(), sides, sides, st.tuples(sides, sides))
def test_the_merge_of_a_flipped_view_is_the_flipped_merge(window, more_height, more_width, size) -> None:
    side, stride, patch = window
    view = (side + more_height - 1, side + more_width - 1)
    corners = window_corners(*view, side, stride)
    logits = torch.randn(len(corners), 3, side // patch, side // patch)
    plain, flipped = (
        merge_windows(
            logits,
            torch.tensor([Window(0, 0, flip, *c, side, side, *view, *size) for c in corners]),
            patch,
            None,
            True,
        )[0][1]
        for flip in (0, 1)
    )
    torch.testing.assert_close(flipped, plain.flip(-1), rtol=0, atol=1e-5)


@few
@given(processors(), sides, sides)
def test_the_order_of_windows_and_of_scales_does_not_matter(processor, height, width) -> None:
    assume(max(height, width) <= 12 * min(height, width))
    rows = processor(picture(height, width))["window_offsets"]
    side = processor.window_size // processor.patch_size
    logits, order = torch.randn(len(rows), 3, side, side), torch.randperm(len(rows))
    (_, expected), (_, got) = (
        merge_windows(logits[o], rows[o], processor.patch_size, None, True)[0]
        for o in (torch.arange(len(rows)), order)
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@few
@given(processors(), sides, sides)
def test_the_windows_of_a_mirrored_image_are_those_of_the_flip(processor, height, width) -> None:
    assume(max(height, width) <= 12 * min(height, width))
    image = picture(height, width)
    both = processor(image, do_flip=True)
    mirrored = processor(ImageOps.mirror(image), do_flip=False)
    is_flip = both["window_offsets"][:, 2] == 1
    torch.testing.assert_close(both["pixel_values"][is_flip], mirrored["pixel_values"], rtol=0, atol=0.02)


@few
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 900), st.none() | st.integers(1, 3000))
def test_resized_sizes_fit_both_edges_and_keep_the_aspect(height, width, shortest, longest) -> None:
    got = resized_size(height, width, shortest, longest)
    factor = min(shortest / min(height, width), (longest or 1e9) / max(height, width))
    assert all(
        abs(new - max(old * factor, 1)) <= 0.5 + 1e-6 for new, old in zip(got, (height, width)) if old * factor > 1
    )
    assert min(got) >= 1
    assert min(got) <= max(shortest, 1)
    assert longest is None or max(got) <= max(longest, 1)


@few
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([np.uint8, np.uint16, np.int32, np.bool_]))
def test_depths_map_full_range_to_full_range(height, width, dtype) -> None:
    top = {np.uint8: 255, np.bool_: 1}.get(dtype, 65535)
    values = np.linspace(0, top, height * width).reshape(height, width).round().astype(dtype)
    deep = dtype in (np.uint16, np.int32)
    got = to_uint8(values, is_16_bit=deep)
    assert got.dtype == np.uint8
    assert np.abs(got / 255 - values.astype(float) / top).max() <= 0.5 / 255 + 1e-9
    if deep:
        assert np.array_equal(pil_to_array(Image.fromarray(values), True), np.stack([got] * 3))


@few
@given(st.integers(1, 80), st.integers(5, 80), st.sampled_from([1, 3, 4]))
def test_the_channels_of_an_image_are_found_at_either_end(height, width, channels) -> None:
    assume(height not in (1, 3, 4))
    assert channel_axis((channels, height, width), 3) == "channels_first"
    assert channel_axis((height, width, channels), 3) == "channels_last"


@few
@given(st.integers(1, 6), st.integers(0, 40), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_the_metric_is_that_of_one_map_however_it_is_cut_and_renamed(num_labels, length, parts, seed) -> None:
    rng = np.random.default_rng(seed)
    prediction = rng.integers(0, num_labels, length)
    reference = np.where(rng.random(length) < 0.2, 255, rng.integers(0, num_labels, length))
    whole = confusion_matrix(prediction, reference, num_labels, 255)
    metric, cut = MeanIoU(num_labels, 255), np.zeros_like(whole)
    for one, other in zip(np.array_split(prediction, parts), np.array_split(reference, parts)):
        metric.add(prediction=one[None], reference=other[None])
        cut += confusion_matrix(one, other, num_labels, 255)
    assert np.array_equal(cut, whole)
    np.testing.assert_equal(metric.compute(), scores_from_confusion_matrix(whole))
    new_names = rng.permutation(num_labels)
    renamed = np.where(reference == 255, 255, new_names[np.where(reference == 255, 0, reference)])
    matrix = confusion_matrix(new_names[prediction] if length else prediction, renamed, num_labels, 255)
    assert np.array_equal(matrix[np.ix_(new_names, new_names)], whole)


@few
@given(st.integers(1, 6), st.tuples(st.integers(1, 6), st.integers(1, 6)), st.tuples(sides, sides), st.floats(-9, 9))
def test_the_loss_is_that_of_torch_and_does_not_see_a_constant(num_labels, patches, size, constant) -> None:
    logits, labels = torch.randn(2, num_labels, *patches), torch.randint(num_labels, (2, *size))
    labels[0, 0, 0] = 255
    upsampled = interpolate(logits.double(), size=size, mode="bilinear", align_corners=False)
    expected = cross_entropy(upsampled, labels, ignore_index=255).float()
    assume(bool((labels != 255).any()))
    torch.testing.assert_close(upsampled_cross_entropy(logits, labels), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(upsampled_cross_entropy(logits + constant, labels), expected, rtol=1e-4, atol=1e-5)
    flipped = upsampled_cross_entropy(logits.flip(-1), labels.flip(-1))
    torch.testing.assert_close(flipped, expected, rtol=1e-4, atol=1e-5)


@st.composite
def configurations(draw) -> SegmenterConfig | SetrConfig:
    """A valid configuration of either family."""
    heads, patch = draw(st.integers(1, 4)), draw(st.sampled_from([4, 8, 16]))
    layers = draw(st.integers(1, 30))
    shared = {
        "hidden_size": heads * draw(st.integers(1, 16)),
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "intermediate_size": draw(st.integers(1, 64)),
        "patch_size": patch,
        "image_size": draw(st.integers(1, 8).map(lambda n: n * patch) | st.just([patch, 3 * patch])),
        "drop_path_rate": draw(st.floats(0, 0.99)),
        "id2label": dict(enumerate(draw(st.lists(st.text(min_size=1), min_size=1, max_size=4, unique=True)))),
        "use_distillation_token": draw(st.booleans()),
        "position_embedding_interpolation": draw(st.sampled_from(["bilinear", "bicubic"])),
    }
    if draw(st.booleans()):
        return SegmenterConfig(decoder_type=draw(st.sampled_from(["mask_transformer", "linear"])), **shared)
    indices = draw(st.none() | st.sets(st.integers(0, layers - 1), min_size=1, max_size=4).map(sorted))
    decoder_type = draw(st.sampled_from(["naive", "pup", "mla"]))
    return SetrConfig(decoder_type=decoder_type, out_indices=indices, decoder_hidden_size=32, **shared)


@few
@given(configurations())
def test_a_configuration_comes_back_from_a_file_and_from_a_dictionary(config) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        loaded = AutoConfig.from_pretrained(folder)
    assert type(loaded) is type(config)
    assert loaded.to_diff_dict() == config.to_diff_dict()
    again = type(config).from_dict(json.loads(config.to_json_string(use_diff=False)))
    assert again.to_dict() == config.to_dict()
    assert loaded.num_labels == (1 if config.use_single_logit else len(config.id2label))
    assert loaded.image_height_and_width == config.image_height_and_width


@few
@given(processors())
def test_an_image_processor_comes_back_from_a_file(processor) -> None:
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        loaded = SegmenterImageProcessor.from_pretrained(folder)
    assert loaded.to_dict() == processor.to_dict()


@st.composite
def label_sets(draw) -> LabelSet:
    names = draw(st.lists(st.text(min_size=1), min_size=1, max_size=6, unique=True))
    ids = st.integers(0, len(names) - 1)
    label_map = draw(st.none() | st.dictionaries(st.integers(-9, 70_000), ids | st.just(255), min_size=1, max_size=6))
    channel = st.integers(0, 255)
    return LabelSet(
        name=draw(st.text()),
        title=draw(st.text()),
        labels=tuple(names),
        colors=tuple(draw(st.tuples(channel, channel, channel)) for _ in names),
        reduce_labels=label_map is None and draw(st.booleans()),
        label_id_to_train_id=label_map,
    )


@few
@given(label_sets())
def test_a_label_set_comes_back_from_a_file(label_set) -> None:
    with tempfile.TemporaryDirectory() as folder:
        label_set.save(Path(folder) / "labels.json")
        assert load_label_set(Path(folder) / "labels.json") == label_set


@few
@given(st.dictionaries(st.integers(-100, 10**7), st.integers(0, 254), min_size=1, max_size=8), st.data())
def test_mapped_labels_are_those_of_a_loop(label_map, data) -> None:
    ids = data.draw(st.lists(st.sampled_from(sorted(label_map)) | st.integers(-200, 10**8), max_size=12))
    mapped = map_labels(np.array(ids, dtype=np.int64), label_map)
    assert mapped.tolist() == [label_map.get(stored, 255) for stored in ids]
    assert mapped.dtype == np.uint8


@few
@given(st.integers(1, 300), sides, sides)
def test_a_saved_label_map_comes_back_from_a_file(num_labels, height, width) -> None:
    segmentation = np.random.default_rng(width).integers(0, num_labels, (height, width))
    with tempfile.TemporaryDirectory() as folder:
        label_map_image(segmentation, np.zeros((num_labels, 3), np.uint8)).save(Path(folder) / "map.png")
        with Image.open(Path(folder) / "map.png") as image:
            assert np.array_equal(np.asarray(image), segmentation)
