"""Annotation files of strangers: what they say is drawn, or refused with a `ValueError` that names the file."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from segmenter_hf.data import described_masks
from segmenter_hf.data.annotation_files import coco_split, labelme_split
from segmenter_hf.data.described_masks import describe, draw_mask
from segmenter_hf.data.label_sets import label_set_from_names


HEIGHT, WIDTH = 24, 40
LABELS = label_set_from_names(["background", "tree"])
SQUARE = [2, 2, 12, 2, 12, 12, 2, 12]
CORNERS = [[2, 2], [12, 2], [12, 12]]


def save_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(path)


def coco(segmentation: Any, **image: Any) -> dict[str, Any]:
    return {
        "images": [{"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH, **image}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "segmentation": segmentation}],
        "categories": [{"id": 3, "name": "tree"}],
    }


def draw_coco(folder: Path, content: dict[str, Any] | str) -> np.ndarray:
    save_image(folder / "a.png")
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "annotations.json").write_text(text)
    split = coco_split(folder, None)
    assert split is not None
    (mask,) = split.masks.values()
    return np.asarray(draw_mask(mask, LABELS, "a.png"))


def draw_labelme(folder: Path, shape: dict[str, Any], **fields: Any) -> np.ndarray:
    save_image(folder / "a.png")
    content = {
        "shapes": [{"label": "tree", **shape}],
        "imagePath": "a.png",
        "imageHeight": HEIGHT,
        "imageWidth": WIDTH,
    }
    (folder / "a.json").write_text(json.dumps({**content, **fields}))
    split = labelme_split(folder, folder)
    assert split is not None
    (mask,) = split.masks.values()
    return np.asarray(draw_mask(mask, LABELS, "a.png"))


def test_the_image_that_labelme_names_is_taken(tmp_path) -> None:
    draw_labelme(tmp_path, {"shape_type": "polygon", "points": CORNERS})
    save_image(tmp_path / "a.jpg")
    split = labelme_split(tmp_path, tmp_path)
    assert split is not None and [path.name for path in split.images.values()] == ["a.png"]
    (tmp_path / "a.json").write_text((tmp_path / "a.json").read_text().replace("a.png", "b.png"))
    with pytest.raises(ValueError, match=r"names the image 'b.png', and beside it lie a.jpg, a.png"):
        labelme_split(tmp_path, tmp_path)


def test_images_in_another_folder_than_the_files_of_labelme_are_used(tmp_path, monkeypatch, caplog) -> None:
    draw_labelme(tmp_path, {"shape_type": "polygon", "points": CORNERS}, imagePath="../images/a.png")
    for name, file in {"images": "a.png", "labels": "a.json"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / file).rename(tmp_path / name / file)
    monkeypatch.chdir(tmp_path.parent)
    root = Path(tmp_path.name)
    split = labelme_split(root, root)
    assert split is not None and len(split.images) == 1 and not caplog.records


def test_of_several_coco_files_the_one_with_images_is_taken(tmp_path) -> None:
    (tmp_path / "annotations").mkdir()
    for year in ("2014", "2017"):
        content = coco([SQUARE])
        content["images"][0]["file_name"] = f"{year}.png"
        (tmp_path / "annotations" / f"instances_train{year}.json").write_text(json.dumps(content))
    save_image(tmp_path / "train2017" / "2017.png")
    split = coco_split(tmp_path, "train")
    assert split is not None and list(split.images) == ["2017"]
    save_image(tmp_path / "train2014" / "2014.png")
    with pytest.raises(ValueError, match=r"several COCO files.*instances_train2014.json, instances_train2017.json"):
        coco_split(tmp_path, "train")


NUMBERS = [float("nan"), float("inf"), -float("inf"), 1e308, 10**400, -(10**9), "7", None, [1], {}]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: repr(number)[:12])
def test_coordinates_that_are_none_of_the_image_are_refused(number, tmp_path) -> None:
    pytest.importorskip("pycocotools")
    with pytest.raises(ValueError, match="expected coordinates in pixels of an image of 24 x 40"):
        draw_coco(tmp_path / "coco", coco([[number, *SQUARE[1:]]]))
    with pytest.raises(ValueError, match="expected coordinates in pixels of an image of 24 x 40"):
        draw_labelme(tmp_path / "labelme", {"shape_type": "polygon", "points": [[number, 2], *CORNERS]})


def counts(*numbers: Any) -> dict[str, Any]:
    return {"size": [HEIGHT, WIDTH], "counts": list(numbers)}


@pytest.mark.parametrize(
    "segmentation",
    [
        counts(10**30),
        counts(-5, HEIGHT * WIDTH + 5),
        counts(HEIGHT * WIDTH - 1),
        counts(HEIGHT * WIDTH, 2**32),  # 0 in 32 bits
        counts(float(HEIGHT * WIDTH)),
        counts(float("nan")),
        counts([1], 2),
        counts(),
        {"size": [HEIGHT, WIDTH], "counts": "oooooooooooooooooooo"},
        {"size": [HEIGHT, WIDTH], "counts": "\x00\x7f"},
        {"size": [HEIGHT, WIDTH], "counts": None},
        {"size": [2**31, 2**31], "counts": [2**62]},
        {"size": "abc", "counts": [1]},
        {"counts": [1]},
        [[1, 2, 3]],
        [[]],
        ["abcdef"],
        [{"a": 1}],
        7,
        "polygon",
        {"size": [HEIGHT, WIDTH]},
    ],
    ids=lambda segmentation: repr(segmentation)[:40],
)
def test_shapes_of_coco_that_are_none_are_refused(segmentation, tmp_path) -> None:
    pytest.importorskip("pycocotools")
    with pytest.raises(ValueError, match=r"a\.png|annotations\.json"):
        draw_coco(tmp_path, coco(segmentation))


@pytest.mark.parametrize(
    "shape",
    [
        {"shape_type": "polygon", "points": 5},
        {"shape_type": ["polygon"], "points": CORNERS},
        {"shape_type": "polygon", "points": [[1, 2, 3], *CORNERS]},
        {"shape_type": "__class__", "points": CORNERS},
        {"shape_type": "mask", "points": CORNERS, "mask": "!"},
        {"shape_type": "mask", "points": CORNERS, "mask": "iVBORw0KGgo="},
        {"shape_type": "mask", "points": CORNERS},
    ],
    ids=lambda shape: repr(shape)[:50],
)
def test_shapes_of_labelme_that_are_none_are_refused(shape, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"a\.png"):
        draw_labelme(tmp_path, shape)


@pytest.mark.parametrize("size", [(2**31, 2**31), (10**30, 1), (0, 5), (-24, -40), (1.5, 4), ("9", 9), (None, 9)])
def test_sizes_that_no_image_has_are_refused_before_anything_is_drawn(size, tmp_path) -> None:
    height, width = size
    with pytest.raises(ValueError, match="expected"):
        draw_coco(tmp_path / "coco", coco([SQUARE], height=height, width=width))
    if None not in size:  # without a size it is that of the image
        fields = {"imageHeight": height, "imageWidth": width}
        with pytest.raises(ValueError, match="expected"):
            draw_labelme(tmp_path / "labelme", {"shape_type": "polygon", "points": CORNERS}, **fields)


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/hostname", "x/../../secret.png", "..\\secret.png", "a\0.png", ""]
)
def test_annotations_name_no_files_outside_of_their_folder(name, tmp_path) -> None:
    save_image(tmp_path / "secret.png")
    with pytest.raises(ValueError, match="stays in|which is in none of"):
        draw_coco(tmp_path / "coco", coco([SQUARE], file_name=name))
    folder = tmp_path / "labelme"
    folder.mkdir()
    (folder / "b.json").write_text(json.dumps({"shapes": [], "imagePath": name}))
    with pytest.raises(ValueError, match="stays in|do not exist"):
        labelme_split(folder, folder)


def test_a_pipe_that_an_annotation_names_is_not_waited_for(tmp_path) -> None:
    os.mkfifo(tmp_path / "b.png")
    with pytest.raises(ValueError, match="which is in none of"):
        draw_coco(tmp_path, coco([SQUARE], file_name="b.png"))


def test_of_two_values_for_a_key_the_last_counts_and_nothing_fails(tmp_path) -> None:
    pytest.importorskip("pycocotools")
    text = json.dumps(coco([SQUARE])).replace('"category_id": 3', '"category_id": 9, "category_id": 3')
    assert draw_coco(tmp_path, text).sum() == 100


def test_two_images_of_one_id_are_refused(tmp_path) -> None:
    content = coco([SQUARE])
    content["images"].append({**content["images"][0], "file_name": "b.png"})
    with pytest.raises(ValueError, match="an `id` of its own for each image"):
        draw_coco(tmp_path, content)


def test_json_that_is_nested_without_end_is_no_annotation(tmp_path, caplog) -> None:
    save_image(tmp_path / "a.png")
    (tmp_path / "annotations.json").write_text('{"images": ' + "[" * 200_000 + "]" * 200_000 + "}")
    assert coco_split(tmp_path, None) is None
    assert "expected JSON" in caplog.text


def test_a_polygon_that_runs_to_and_fro_without_end_is_refused(tmp_path, monkeypatch) -> None:
    """pycocotools would allocate 5 points for each pixel of the way."""
    pytest.importorskip("pycocotools")
    monkeypatch.setattr(described_masks, "MAX_OUTLINE", 1000)
    with pytest.raises(ValueError, match="at most 1000 pixels around, got 78078"):
        draw_coco(tmp_path, coco([[0, 0, 39, 23] * 1001]))


def test_many_polygons_of_an_object_are_drawn(tmp_path) -> None:
    pytest.importorskip("pycocotools")
    polygons = [[x, y, x + 1, y, x + 1, y + 1, x, y + 1] for y in range(HEIGHT) for x in range(WIDTH)] * 50
    value = describe("a.json", {"size": [HEIGHT, WIDTH], "objects": [["tree", {"polygons": polygons}]]})
    assert np.asarray(draw_mask(value, LABELS, "a.png")).all()
