"""What annotation files describe: each shape of labelme, and what COCO needs."""

import socket
import sys

import numpy as np
import pytest

from segmenter_hf.data import annotation_files
from segmenter_hf.data.described_masks import describe, draw_mask
from segmenter_hf.data.label_sets import label_set_from_names
from segmenter_hf.data.loading import load_segmentation_datasets

from . import formats


LABELS = label_set_from_names(["background", "leaf"])


def drawn(**shape: object) -> np.ndarray:
    content = {"size": [40, 60], "objects": [["leaf", shape]]}
    return np.asarray(draw_mask(describe("a.json", content), LABELS, "a.json")) == 1


def distances(x: float, y: float) -> np.ndarray:
    rows, columns = np.mgrid[:40, :60]
    return np.hypot(columns - x, rows - y)


def test_areas_of_labelme_are_filled() -> None:
    expected = np.zeros((40, 60), bool)
    expected[5:16, 10:31] = True
    corners = [[10, 5], [30, 5], [30, 15], [10, 15]]
    assert np.array_equal(drawn(shape_type="polygon", points=corners), expected)
    assert np.array_equal(drawn(shape_type=None, points=corners), expected)
    assert np.array_equal(drawn(shape_type="rectangle", points=[[30, 5], [10, 15]]), expected)


def test_a_circle_is_filled_up_to_its_second_point() -> None:
    found, distance = drawn(shape_type="circle", points=[[30, 20], [30, 30]]), distances(30, 20)
    assert found[distance < 9].all() and not found[distance > 11].any()


def test_lines_and_points_have_the_width_that_labelme_draws() -> None:
    point, distance = drawn(shape_type="point", points=[[30, 20]]), distances(30, 20)
    assert point[distance < 4].all() and not point[distance > 6.5].any()
    for kind, points in (("line", [[10, 20], [50, 20]]), ("linestrip", [[10, 20], [30, 20], [50, 20]])):
        found = drawn(shape_type=kind, points=points)
        assert found[17:24, 12:48].all() and not found[:13].any() and not found[28:].any()


@pytest.mark.parametrize(
    "shape",
    [
        {"shape_type": "polygon", "points": [[1, 2], [3, 4]]},
        {"shape_type": "rectangle", "points": [[1, 2]]},
        {"shape_type": "circle", "points": [[1, 2]]},
        {"shape_type": "point", "points": []},
        {"shape_type": "ellipse", "points": [[1, 2], [3, 4]]},
        {"shape_type": "line", "points": [[1, 2, 3], [4, 5, 6]]},
        {"shape_type": "mask", "points": [[1, 2], [3, 4]], "mask": "no base64"},
        {"shape_type": "polygon", "points": [[1, 2], [3, 4], [1e12, 5]]},
    ],
)
def test_shapes_that_cannot_be_drawn_are_refused_by_file(shape) -> None:
    with pytest.raises(ValueError, match="a.json: expected "):
        drawn(**shape)


def test_without_pycocotools_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ImportError, match=r"pip install segmenter-hf\[coco\]"):
        drawn(polygons=[[1, 2, 9, 2, 9, 9]])


@pytest.mark.parametrize("write", [formats.coco_polygons, formats.coco_run_lengths])
def test_a_file_of_coco_is_read_once(write, tmp_path, monkeypatch) -> None:
    write(tmp_path)
    read, times = annotation_files.read_json, {}

    def counted(path, *args):
        times[path.name, path.parent.name] = times.get((path.name, path.parent.name), 0) + 1
        return read(path, *args)

    monkeypatch.setattr(annotation_files, "read_json", counted)
    load_segmentation_datasets(str(tmp_path))
    assert set(times.values()) == {1}


@pytest.mark.parametrize("name", ["ade20", "someone/ade20"])
def test_a_mistyped_name_fails_at_once_where_the_hub_has_no_address(name, monkeypatch) -> None:
    def no_address(*args: object) -> None:
        raise socket.gaierror("no address")

    def asked(*args: object, **more: object) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("segmenter_hf.data.loading.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("segmenter_hf.data.loading.urllib.request.getproxies", dict)
    monkeypatch.setattr("segmenter_hf.data.loading.socket.getaddrinfo", no_address)
    monkeypatch.setattr("segmenter_hf.data.loading.datasets.load_dataset", asked)
    with pytest.raises(
        OSError, match=f"'{name}' is no local folder, and could not be loaded from the Hub, which cannot be"
    ) as refused:
        load_segmentation_datasets(name)
    assert "\n" not in str(refused.value)
