import json
from dataclasses import replace

import numpy as np
import pytest

from segmenter_hf.data.label_sets import (
    LabelSet,
    default_palette,
    label_set_from_names,
    list_label_sets,
    load_label_set,
    map_labels,
)


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def label_set(**fields):
    colors = ((1, 2, 3), (4, 5, 6))
    return LabelSet(**{"name": "two", "title": "Two", "labels": ("sky", "road"), "colors": colors, **fields})


@pytest.mark.parametrize(
    ("name", "num_labels", "reduce_labels", "first", "last"),
    [
        ("ade20k", 150, True, "wall", "flag"),
        ("camvid", 11, False, "sky", "bicyclist"),
        ("cityscapes", 19, False, "road", "bicycle"),
        ("pascal_context_59", 59, True, "aeroplane", "wood"),
        ("pascal_context_60", 60, False, "background", "wood"),
        ("pascal_voc", 21, False, "background", "tvmonitor"),
        ("scenes", 8, False, "sky", "sign"),
    ],
)
def test_packaged_label_sets_are_complete(name, num_labels, reduce_labels, first, last):
    labels = load_label_set(name)
    assert labels.name == name
    assert labels.num_labels == len(labels.id2label) == len(labels.label2id) == num_labels
    assert (labels.reduce_labels, labels.ignore_index) == (reduce_labels, 255)
    assert (labels.id2label[0], labels.id2label[num_labels - 1]) == (first, last)
    assert all(labels.label2id[label] == i for i, label in labels.id2label.items())
    assert labels.palette.shape == (num_labels, 3) and labels.palette.dtype == np.uint8


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.json", '[{"id": 2, "name": "sky"}, {"id": 5, "name": "road"}, {"name": "__ignore__"}]'),
        ("labels.csv", "id,name,r,g,b\n2,sky,1,2,3\n5,road,4,5,6\n"),
    ],
)
def test_the_ids_of_a_file_are_what_masks_store(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    assert load_label_set(tmp_path / name).label_id_to_train_id == {2: 0, 5: 1}
    (tmp_path / name).write_text(text.replace("2", "0").replace("5", "1"))
    assert load_label_set(tmp_path / name).label_id_to_train_id is None
    (tmp_path / name).write_text(text.replace("5", "2"))
    with pytest.raises(ValueError, match=rf"{name}: expected an integer of its own as the id"):
        load_label_set(tmp_path / name)


def test_names_are_compared_with_few_others():
    comparisons = []

    class Name(str):
        __hash__ = str.__hash__

        def __eq__(self, other):
            comparisons.append(other)
            return str(self) == str(other)

    label_set_from_names([Name(index) for index in range(500)], ignore_index=-1)
    assert len(comparisons) < 5000


def test_every_packaged_label_set_is_listed():
    assert list_label_sets() == [
        "ade20k",
        "camvid",
        "cityscapes",
        "pascal_context_59",
        "pascal_context_60",
        "pascal_voc",
        "scenes",
    ]


def test_the_street_scenes_have_their_classes_in_order():
    labels = load_label_set("scenes").labels
    assert labels == ("sky", "building", "road", "pavement", "tree", "car", "person", "sign")


def test_camvid_turns_its_unlabelled_id_into_the_ignore_index():
    camvid = load_label_set("camvid")
    mask = np.arange(12, dtype=np.uint8).reshape(3, 4)
    mapped = map_labels(mask, camvid.label_id_to_train_id, camvid.ignore_index)
    assert mapped.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 255]]


def test_cityscapes_maps_its_34_ids_to_19_classes():
    cityscapes = load_label_set("cityscapes")
    mapped = map_labels(np.arange(-1, 34), cityscapes.label_id_to_train_id)
    assert mapped[[8, 9, 27, 34]].tolist() == [0, 1, 13, 18]  # road 7, sidewalk 8, car 26, bicycle 33
    assert sorted(set(mapped.tolist())) == [*range(19), 255]
    assert (mapped == 255).sum() == 35 - 19


def test_a_file_of_the_packaged_form_loads_alike(tmp_path):
    content = {
        "name": "two",
        "title": "Two",
        "num_labels": 2,
        "ignore_index": 7,
        "note": "any text",
        "label_id_to_train_id": {"3": 0, "5": 1},
        "labels": [
            {"id": 0, "name": "sky", "color": [1, 2, 3]},
            {"id": 1, "name": "road", "color": [4, 5, 6]},
        ],
    }
    expected = label_set(ignore_index=7, label_id_to_train_id={3: 0, 5: 1})
    path = write(tmp_path / "file.json", content)
    assert load_label_set(path) == load_label_set(str(path)) == expected


def test_only_labels_are_required_in_a_file(tmp_path):
    path = write(tmp_path / "mine.json", {"labels": [{"id": 0, "name": "sky", "color": [1, 2, 3]}]})
    assert load_label_set(path) == LabelSet("mine", "mine", ("sky",), ((1, 2, 3),))


def test_a_list_of_names_gets_the_default_colors(tmp_path):
    loaded = load_label_set(write(tmp_path / "mine.json", ["Straße", "ciel", "木"]))
    assert (loaded.name, loaded.labels) == ("mine", ("Straße", "ciel", "木"))
    assert np.array_equal(loaded.palette, default_palette(3))
    assert loaded == label_set_from_names(["Straße", "ciel", "木"], name="mine")


def test_a_color_may_be_left_out(tmp_path):
    labels = [{"id": 0, "name": "sky"}, {"id": 1, "name": "road", "color": [4, 5, 6]}]
    loaded = load_label_set(write(tmp_path / "mine.json", {"labels": labels}))
    assert loaded.labels == ("sky", "road")
    assert loaded.colors == (tuple(default_palette(2)[0].tolist()), (4, 5, 6))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("colors.json", '{"sky": [1, 2, 3], "__ignore__": [0, 0, 0], "road": [4, 5, 6]}'),
        ("colors.json", '[{"name": "sky", "r": 1, "g": 2, "b": 3}, {"name": "road", "color": [4, 5, 6]}]'),
        ("class_dict.csv", "\ufeffname, r, g, b\nsky, 1, 2, 3\n__ignore__, 0, 0, 0\n\nroad, 4, 5, 6\n"),
        ("class_dict.csv", "Name,R,G,B\r\nsky,1,2,3\r\nroad,4,5,6\r\n"),
        ("labelmap.txt", "# label:color_rgb:parts:actions\nsky:1,2,3::\n__ignore__:0,0,0::\nroad:4,5,6::\n"),
        ("label_colors.txt", "1 2 3\t\tsky\n4 5 6\t\troad\n"),
    ],
)
def test_names_with_colors_are_read_from_files_of_others(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    loaded = load_label_set(tmp_path / name)
    assert (loaded.labels, loaded.colors) == (("sky", "road"), ((1, 2, 3), (4, 5, 6)))
    assert loaded.ignore_colors == (((0, 0, 0),) if "__ignore__" in text else ())


def test_a_text_file_has_a_name_per_line(tmp_path):
    (tmp_path / "classes.txt").write_text("__ignore__\n_background_\nStraße\n\n  traffic light \n", encoding="utf-8")
    loaded = load_label_set(tmp_path / "classes.txt")
    assert (loaded.name, loaded.labels) == ("classes", ("_background_", "Straße", "traffic light"))
    assert np.array_equal(loaded.palette, default_palette(3))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("class_dict.csv", b"sky,1,2,3\n", "expected the columns name, r, g, b in the first line"),
        ("class_dict.csv", b"name,r,g,b\nsky,1,2\n", "class_dict.csv: expected name, r, g, b in row 2, got .'sky'"),
        ("class_dict.csv", b"name,r,g,b\nsky,1,2,x\n", "in row 2"),
        ("class_dict.csv", b"name,r,g,b\n" + b"x" * 200_000, "class_dict.csv: .*field larger than field limit"),
        ("names.txt", b"\x89PNG\r\n\x1a\n\xff", "names.txt: expected class names in UTF-8"),
        ("names.txt", b"", "names.txt: .*at least one label"),
        ("names.txt", b"sky\nsky\n", "names.txt: .*'sky'. more than once"),
        ("names.txt", bytes(2**24 + 1), "names.txt: expected class names in at most"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,  # 16 MB of it would be the name of a test
)
def test_files_of_names_that_are_not_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_label_set(tmp_path / name)


def test_masks_of_colors_survive_being_saved(tmp_path):
    colored = label_set(color_masks=True, ignore_colors=((0, 0, 0),))
    colored.save(tmp_path / "two.json")
    assert load_label_set(tmp_path / "two.json") == colored


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(FileNotFoundError, match="one of .*'ade20k'.* got 'ade20'"):
        load_label_set("ade20")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"names": ["sky"]}, "list of names or an object with a list of `labels`"),
        ("sky", "list of names or an object"),
        ({"labels": ["sky"]}, "as label 0, got sky"),
        ({"labels": [{"id": 1, "name": "sky", "color": [1, 2, 3]}]}, "as label 0, got .*'id': 1"),
        ({"labels": [{"id": 0, "color": [1, 2, 3]}]}, "as label 0"),
        ({"sky": [1, 2, 300]}, "color of 'sky' must be 3 integers"),
        ([{"name": "sky"}, {"r": 1}], "as item 1, got .*'r': 1"),
        (
            {"labels": [{"id": 0, "name": "sky"}], "ignore_colors": [0]},
            r"list of \[r, g, b\] as ignore_colors, got \[0\]",
        ),
        ({"labels": [], "ignore_indx": 0}, "got also .*ignore_indx"),
        ({"labels": [{"id": 0, "name": "sky", "color": [1, 2, 3]}], "num_labels": 2}, "num_labels is 2, .* 1 labels"),
        ([], "at least one label"),
        ([1, 2], "only strings"),
        (["sky", "road", "sky"], r"got \['sky'\] more than once"),
        (
            [{"name": "sky", "id": 1}, {"name": "road", "id": 0}, {"name": "tree"}],
            r"id of each class, got \[1, 0, None\]",
        ),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        load_label_set(write(tmp_path / "mine.json", content))


def test_a_file_that_is_not_json_is_named(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text("sky, road")
    with pytest.raises(ValueError, match="mine.json: expected JSON"):
        load_label_set(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": ("sky", "sky")}, r"must be different, got \['sky'\]"),
        ({"colors": ((1, 2, 3),)}, "expected 2 colors, one per label, got 1"),
        ({"colors": ((1, 2, 3), (4, 5, 256))}, "color of 'road' .* got .*256"),
        ({"colors": ((1, 2, 3), (4, 5))}, "color of 'road' must be 3 integers"),
        ({"ignore_index": 1}, "ignore_index 1 is also the id of 'road'"),
        ({"labels": ("leaf",), "colors": ((0, 0, 0),), "ignore_index": 1}, "ignore_index 1 is also the id of 'leaf'"),
        ({"label_id_to_train_id": {0: 0, 1: 2}}, r"must map to \[0, 2\) or to the ignore_index 255, got \[2\]"),
        ({"label_id_to_train_id": {0: 0}, "reduce_labels": True}, "either reduce_labels or label_id_to_train_id"),
        ({"label_id_to_train_id": {0: 0}, "color_masks": True}, "either color_masks or label_id_to_train_id"),
        ({"colors": ((1, 2, 3), (1, 2, 3)), "color_masks": True}, r"a color for each class, got \[\(1, 2, 3\)\]"),
        ({"ignore_colors": ((1, 2),)}, "color of '__ignore__' must be 3 integers"),
    ],
)
def test_fields_that_do_not_fit_together_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        label_set(**fields)


def test_a_string_is_not_a_list_of_names():
    with pytest.raises(ValueError, match="got the string 'sky'"):
        label_set_from_names("sky")


def test_more_than_255_names_need_another_ignore_index():
    names = [f"class {i}" for i in range(300)]
    with pytest.raises(ValueError, match="ignore_index 255 is also the id of 'class 255'"):
        label_set_from_names(names)
    assert label_set_from_names(names, ignore_index=65535).num_labels == 300


def test_a_label_set_is_hashable_and_does_not_change():
    labels = label_set(label_id_to_train_id={3: 0})
    assert len({labels, label_set(label_id_to_train_id={3: 0})}) == 1
    with pytest.raises(AttributeError):
        labels.ignore_index = 0


def test_default_colors_are_distinct_and_none_is_near_black():
    colors = default_palette(1000).astype(int)
    assert len(np.unique(colors, axis=0)) == 1000
    assert colors.max(axis=1).min() > 100
    distance = np.abs(colors[:20, None] - colors[None, :20]).sum(axis=-1)
    assert distance[~np.eye(20, dtype=bool)].min() >= 40


def test_default_colors_do_not_depend_on_the_number_of_labels():
    assert default_palette(7).dtype == np.uint8
    assert np.array_equal(default_palette(7), default_palette(256)[:7])
    assert default_palette(0).shape == (0, 3)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.uint64])
def test_map_labels_equals_a_plain_loop(dtype):
    mask = np.random.default_rng(0).integers(0, 40, (13, 7)).astype(dtype)
    label_map = {4: 1, 9: 0, 30: 2, 31: 1, 100: 3}
    mapped = map_labels(mask, label_map)
    assert mapped.dtype == np.uint8
    assert mapped.tolist() == [[label_map.get(int(stored), 255) for stored in row] for row in mask]


@pytest.mark.parametrize(
    ("label_map", "ignore_index", "dtype", "expected"),
    [
        ({-1: 4, 2: 300}, 255, np.uint16, [4, 255, 300, 255]),
        ({0: 1}, -100, np.int16, [-100, 1, -100, -100]),
    ],
)
def test_map_labels_holds_large_and_negative_ids(label_map, ignore_index, dtype, expected):
    mapped = map_labels(np.array([-1, 0, 2, 10**12]), label_map, ignore_index)
    assert mapped.dtype == dtype
    assert mapped.tolist() == expected


def test_map_labels_refuses_what_it_cannot_map():
    with pytest.raises(ValueError, match="integer dtype, got float64"):
        map_labels(np.zeros((2, 3)), {0: 1})
    with pytest.raises(ValueError, match="label_map must not be empty"):
        map_labels(np.zeros((2, 3), int), {})


def test_masks_of_one_class_may_store_any_two_numbers() -> None:
    one = LabelSet("one", "One", ("leaf",), ((0, 255, 0),), ignore_index=254, label_id_to_train_id={0: 0, 255: 1})
    assert one.with_background().labels == ("background", "leaf")
    assert map_labels(np.array([0, 255, 7]), one.label_id_to_train_id, one.ignore_index).tolist() == [0, 1, 254]
    assert replace(one, labels=("background",)).with_background().labels == ("foreground", "background")
