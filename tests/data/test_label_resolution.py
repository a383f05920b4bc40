"""Which label set a dataset gets, and masks of colors and of black and white."""

from dataclasses import replace

import datasets
import numpy as np
import pytest
from PIL import Image

from segmenter_hf.data.decoding import decode_example, stored_ids
from segmenter_hf.data.label_resolution import resolve_label_set
from segmenter_hf.data.label_sets import LabelSet, label_set_from_names
from segmenter_hf.data.mask_checks import check_masks
from segmenter_hf.data.mask_values import MaskReader, distinct_pixels

from .test_loading import HEIGHT, WIDTH, dataset_of, encoded, example, mask_array


SKY, ROAD, VOID = (10, 200, 30), (128, 128, 128), (0, 0, 0)
TWO_COLORS = LabelSet("two", "Two", ("sky", "road"), (SKY, ROAD), ignore_colors=(VOID,))


def colored(ids: np.ndarray, *colors: tuple[int, int, int]) -> Image.Image:
    return Image.fromarray(np.array(colors or (SKY, ROAD, VOID), np.uint8)[ids])


def decoded(mask, label_set) -> list:
    return decode_example(example(mask), label_set)[1].tolist()


@pytest.fixture
def two_names(tmp_path) -> str:
    (tmp_path / "names.txt").write_text("other\nleaf\n")
    return str(tmp_path / "names.txt")


@pytest.fixture
def two_colors(tmp_path) -> str:
    TWO_COLORS.save(tmp_path / "two.json")
    return str(tmp_path / "two.json")


# Masks of colors


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_masks_of_colors_are_decoded_through_the_label_set(two_colors, mode):
    ids = [mask_array(seed) for seed in range(2)]
    gray = np.full((HEIGHT, WIDTH), 1, np.uint8)  # the color of this class is gray: alone it could be an id, 128
    first = colored(ids[0]).convert("RGB")
    masks = [first, *(colored(each).convert(mode, palette=Image.Palette.ADAPTIVE) for each in (ids[1], gray))]
    label_set = resolve_label_set(dataset_of(masks), two_colors)
    assert label_set.color_masks
    for mask, expected in zip(masks, [*ids, gray]):
        assert decoded(mask, label_set) == np.where(expected == 2, 255, expected).tolist()
    report = check_masks(dataset_of(masks), 2, label_set, show_progress=False)
    report.raise_if_impossible()
    assert report.pixels_per_class[1] == sum((each == 1).sum() for each in (*ids, gray))


def palette_mask(indices: np.ndarray, *colors: tuple[int, int, int]) -> Image.Image:
    mask = Image.fromarray(indices)
    mask.putpalette(np.array(colors, np.uint8).tobytes())
    return mask


def test_palettes_of_another_order_are_masks_of_colors(two_colors, caplog):
    ids = mask_array(num_labels=2)
    swapped = [palette_mask(ids, SKY, ROAD), palette_mask(1 - ids, ROAD, SKY)]
    label_set = resolve_label_set(dataset_of(swapped), two_colors)
    assert "palettes" in caplog.text and label_set.color_masks
    assert [decoded(mask, label_set) for mask in swapped] == [ids.tolist()] * 2


def test_palettes_in_order_or_of_other_colors_hold_ids(two_colors):
    ids = mask_array(num_labels=2)
    for colors in ((SKY, ROAD), (ROAD, (9, 9, 9))):
        label_set = resolve_label_set(dataset_of([palette_mask(ids, *colors)]), two_colors)
        assert not label_set.color_masks and decoded(palette_mask(ids, *colors), label_set) == ids.tolist()


def test_colors_replace_the_map_of_stored_ids(tmp_path):
    LabelSet("x", "x", ("sky", "road"), (SKY, ROAD), label_id_to_train_id={7: 0, 8: 1}).save(tmp_path / "x.json")
    mask = mask_array(num_labels=2)
    label_set = resolve_label_set(dataset_of([colored(mask)]), str(tmp_path / "x.json"))
    assert decoded(colored(mask), label_set) == mask.tolist()


def test_one_class_of_a_color_lies_on_black():
    label_set = LabelSet("x", "x", ("leaf",), ((255, 0, 0),), color_masks=True).with_background()
    mask = mask_array(num_labels=2)
    assert decoded(colored(mask, (0, 0, 0), (255, 0, 0)), label_set) == mask.tolist()


def test_unknown_colors_are_refused_with_file_color_and_count(two_colors):
    mask = colored(mask_array(), SKY, ROAD, VOID)
    mask.putpixel((3, 2), (1, 2, 3))
    mask.putpixel((4, 2), (1, 2, 3))
    rows = dataset_of([colored(mask_array()), mask])
    label_set = resolve_label_set(rows, two_colors)
    said = r"street 1.*: 2 of 54 pixels have colors .* label set 'two': \(1, 2, 3\) in 2 pixels"
    with pytest.raises(ValueError, match=said):
        decode_example(rows[1], label_set)
    with pytest.raises(ValueError, match=said):
        check_masks(rows, 2, label_set, show_progress=False).raise_if_impossible()


def test_colors_without_a_label_set_are_shown():
    with pytest.raises(
        ValueError, match=r"RGB image with colors, \(10, 200, 30\) in \d+ pixels.*`label_set`.*class_dict.csv"
    ):
        resolve_label_set(dataset_of([colored(mask_array())]))


def test_rgb_masks_of_ids_stay_ids(two_colors):
    mask = np.repeat(mask_array(num_labels=2)[..., None], 3, axis=2)
    label_set = resolve_label_set(dataset_of([mask]), two_colors)
    assert not label_set.color_masks
    assert decoded(mask, label_set) == mask[..., 0].tolist()


# Black and white


@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_black_and_white_masks_need_no_label_set(mode):
    ids = mask_array(num_labels=2)
    blank = np.zeros_like(ids)
    masks = [
        Image.fromarray(each * 255).convert(mode) if mode != "P" else Image.fromarray(each * 255)
        for each in (blank, ids)
    ]
    label_set = resolve_label_set(dataset_of(masks))
    assert label_set.labels == ("background", "foreground")
    assert decoded(masks[1], label_set) == ids.tolist()
    report = check_masks(dataset_of(masks), 2, label_set, show_progress=False)
    report.raise_if_impossible()
    assert report.num_ignored_pixels == 0


def test_bits_and_black_and_white_may_be_mixed():
    ids = mask_array(num_labels=2)
    masks = [Image.fromarray(ids * 255).convert("1"), Image.fromarray(ids * 255)]
    label_set = resolve_label_set(dataset_of(masks))
    assert label_set.labels == ("background", "foreground")
    assert [decoded(mask, label_set) for mask in masks] == [ids.tolist()] * 2


def test_black_and_white_masks_take_two_names(two_names):
    ids = mask_array(num_labels=2)
    label_set = resolve_label_set(dataset_of([ids * 255]), two_names)
    assert label_set.labels == ("other", "leaf")
    assert decoded(ids * 255, label_set) == ids.tolist()


def test_black_and_white_masks_take_one_name(tmp_path, caplog):
    (tmp_path / "names.txt").write_text("leaf")
    ids = mask_array(num_labels=2)
    label_set = resolve_label_set(dataset_of([ids * 255]), str(tmp_path / "names.txt"))
    assert label_set.labels == ("leaf",)
    assert decoded(ids * 255, label_set.with_background()) == ids.tolist()
    assert "255 is the class 'leaf'" in caplog.text


def test_black_and_white_masks_take_one_class_without_a_name():
    ids = mask_array(num_labels=2)
    label_set = resolve_label_set(dataset_of([ids * 255]), num_labels=1)
    assert label_set.labels == ("foreground",)
    assert decoded(ids * 255, label_set.with_background()) == ids.tolist()
    assert resolve_label_set(dataset_of([ids]), num_labels=1).labels == ("class 0",)


def test_a_split_of_one_class_beside_pixels_without_one_can_be_used():
    rows = dataset_of([np.where(mask_array(num_labels=2), np.uint8(255), np.uint8(2))])
    check_masks(rows, 4, show_progress=False).raise_if_impossible()


def test_other_values_keep_255_ignored(two_names):
    masks = [mask_array(num_labels=2) * 255, np.full((HEIGHT, WIDTH), 1, np.uint8)]
    label_set = resolve_label_set(dataset_of(masks), two_names)
    assert label_set.label_id_to_train_id is None
    assert set(np.unique(decoded(masks[0], label_set))) == {0, 255}


def test_255_stays_ignored_where_that_is_said(two_names):
    rows = dataset_of([mask_array(num_labels=2) * 255])
    label_set = resolve_label_set(rows, two_names, ignore_index=255)
    assert label_set.label_id_to_train_id is None
    with pytest.raises(ValueError, match="first is street 0,.* black and white .* do not set `ignore_index`"):
        check_masks(rows, 2, label_set, show_progress=False).raise_if_impossible()


def test_gray_edges_of_black_and_white_masks_are_refused(two_names):
    ids = mask_array(num_labels=2) * 255
    label_set = resolve_label_set(dataset_of([ids]), two_names)
    edge = ids.copy()
    edge[0, 0] = 127
    with pytest.raises(ValueError, match=r"street 1: ids \[127\] in a mask of 0 and 255"):
        check_masks(dataset_of([ids, edge]), 2, label_set, show_progress=False).raise_if_impossible()


@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_black_and_white_follow_the_colors_of_the_label_set(tmp_path, mode):
    """The first class is white, as in DeepGlobe's roads: a map of 0 to the first class would swap both."""
    (tmp_path / "class_dict.csv").write_text("name,r,g,b\nroad,255,255,255\nbackground,0,0,0\n")
    ids = mask_array(num_labels=2)
    mask = Image.fromarray((1 - ids) * 255).convert(mode)
    label_set = resolve_label_set(dataset_of([mask]), str(tmp_path / "class_dict.csv"))
    assert label_set.color_masks and decoded(mask, label_set) == ids.tolist()
    check_masks(dataset_of([mask]), 2, label_set, show_progress=False).raise_if_impossible()


def test_gray_masks_of_colors_are_decoded_where_their_values_are_no_ids(tmp_path):
    colors = ((0, 0, 0), (128, 128, 128), (255, 255, 255))
    label_set = LabelSet("x", "x", ("sea", "ice", "snow"), colors)
    label_set.save(tmp_path / "x.json")
    ids = mask_array()
    grays = np.array([0, 128, 255], np.uint8)[ids]
    found = resolve_label_set(dataset_of([grays]), str(tmp_path / "x.json"))
    assert found.color_masks and decoded(grays, found) == ids.tolist()
    assert not resolve_label_set(dataset_of([ids]), str(tmp_path / "x.json")).color_masks
    white_is_void = resolve_label_set(dataset_of([grays % 255]), str(tmp_path / "x.json"), ignore_index=255)
    assert white_is_void.color_masks  # no 255 is there
    assert not resolve_label_set(dataset_of([grays]), str(tmp_path / "x.json"), ignore_index=255).color_masks


# Masks are read once


@pytest.mark.parametrize("factor", [1, 255])
def test_finding_the_classes_and_checking_reads_each_mask_once(factor):
    rows, read = dataset_of([mask_array(seed, num_labels=2) * factor for seed in range(4)]), []

    def generate():
        for row in rows:
            read.append(row["id"])
            yield row

    reader = MaskReader(datasets.IterableDataset.from_generator(generate), show_progress=False)
    label_set = resolve_label_set(reader)
    report = check_masks(reader, label_set.num_labels, label_set)
    assert read == rows["id"][:]
    assert (
        report.pixels_per_class.tolist()
        == check_masks(rows, 2, label_set, show_progress=False).pixels_per_class.tolist()
    )
    assert check_masks(reader, 2, label_set).num_images == 4  # a reader that gave its masks away starts again
    assert len(read) == 8


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I", "I;16"])
def test_distinct_pixels_decode_as_the_mask_does(mode):
    colors = mode in ("P", "RGB", "RGBA")
    mask = colored(mask_array()) if colors else Image.fromarray(mask_array(num_labels=2))
    mask = mask.convert(mode, palette=Image.Palette.ADAPTIVE)
    pixels, counts = distinct_pixels(mask)
    assert pixels.mode == mode and counts.sum() == HEIGHT * WIDTH and pixels.size == (len(counts), 1)
    label_set = replace(TWO_COLORS, color_masks=True) if colors else None
    ids, few = stored_ids(mask, "x", label_set), stored_ids(pixels, "x", label_set)[0]
    assert {i: int((ids == i).sum()) for i in np.unique(ids).tolist()} == dict(zip(few.tolist(), counts.tolist()))


# Numbers of classes


def test_classes_are_counted_or_numbered():
    rows = dataset_of([mask_array(num_labels=4)])
    assert resolve_label_set(rows).labels == ("class 0", "class 1", "class 2", "class 3")
    assert resolve_label_set(rows, num_labels=6).num_labels == 6
    assert resolve_label_set(rows, ignore_index=3).num_labels == 3
    reduced = resolve_label_set(rows, do_reduce_labels=True)
    assert (reduced.num_labels, reduced.reduce_labels) == (3, True)


def test_classes_are_not_counted_in_jpeg_masks():
    mask = np.kron(mask_array(num_labels=2)[:2, :2], np.full((13, 9), 255, np.uint8))
    row = {"image": encoded(np.zeros((*mask.shape, 3), np.uint8)), "annotation": encoded(mask, "JPEG"), "id": "street"}
    with pytest.raises(
        ValueError, match=r"street: classes cannot be counted .* JPEG.* from 0 to 255\. Save .* as PNG"
    ):
        resolve_label_set(datasets.Dataset.from_list([row]))


def test_smooth_edges_are_not_counted_as_classes():
    mask = np.zeros((20, 30), np.uint8)
    mask[5:15, 5:15], mask[5:15, 15] = 255, 130
    row = {"image": encoded(np.zeros((20, 30, 3), np.uint8)), "annotation": encoded(mask), "id": "street"}
    rows = datasets.Dataset.from_list([row])
    with pytest.raises(ValueError, match=r"street: .* smooth edges: 10 of their 600 pixels .* `num_labels`"):
        resolve_label_set(rows)
    assert resolve_label_set(rows, num_labels=131).num_labels == 131


def test_a_label_set_and_another_number_of_classes_contradict(two_names):
    with pytest.raises(ValueError, match=r"`num_labels` is 3, but the label set 'names' has 2 classes"):
        resolve_label_set(dataset_of([mask_array()]), two_names, num_labels=3)


def test_a_stored_void_id_is_told_by_its_option():
    rows = dataset_of([np.resize(np.arange(12, dtype=np.uint8), (HEIGHT, WIDTH))])
    label_set = resolve_label_set(rows, num_labels=11)
    with pytest.raises(ValueError, match="If 11 marks pixels without a class, set `ignore_index=11`"):
        check_masks(rows, 11, label_set, show_progress=False).raise_if_impossible()
    label_set = resolve_label_set(rows, num_labels=11, ignore_index=11)
    assert check_masks(rows, 11, label_set, show_progress=False).num_ignored_pixels == 4
    assert label_set == label_set_from_names(label_set.labels, ignore_index=11)
