"""Every format gives the same scenes, whatever its files look like."""

import json
import shutil

import numpy as np
import pytest

from segmenter_hf.data.decoding import decode_example
from segmenter_hf.data.label_resolution import resolve_label_set
from segmenter_hf.data.loading import load_segmentation_datasets
from segmenter_hf.data.mask_checks import check_masks

from . import formats


WITH_SPLITS = [
    *(formats.two_folders, formats.folders_in_splits, formats.one_folder_per_split, formats.masks_with_endings),
    *(
        formats.segnet_camvid,
        formats.voc,
        formats.cityscapes,
        formats.metadata,
        formats.parquet,
        formats.saved_to_disk,
    ),
    *(formats.colors_json, formats.coco_polygons, formats.coco_run_lengths, formats.coco_panoptic, formats.labelme),
]
WITHOUT_SPLITS = [
    *(formats.one_folder, formats.singular_folders, formats.deepglobe, formats.voc_without_lists, formats.cvat_voc),
]


@pytest.mark.parametrize("write", WITH_SPLITS + WITHOUT_SPLITS, ids=lambda write: write.__name__)
def test_every_format_gives_the_same_scenes(tmp_path, write):
    write(tmp_path)
    fraction = 0.4 if write in WITHOUT_SPLITS else None
    found = load_segmentation_datasets(str(tmp_path), validation_fraction=fraction)
    assert {split: len(rows) for split, rows in found.items()} == {"train": 3, "validation": 2}
    label_set = resolve_label_set(found["train"])
    assert label_set.labels in (formats.NAMES, ("class 0", "class 1", "class 2"))
    seeds = []
    for rows in found.values():
        check_masks(rows, 3, label_set, show_progress=False).raise_if_impossible()
        for row in rows:
            seed = int(row["id"].removesuffix("_sat")[-1])
            seeds.append(seed)
            image, mask = decode_example(row, label_set)
            assert np.array_equal(mask, formats.scene_ids(seed))
            assert image.shape == (formats.HEIGHT, formats.WIDTH, 3)
    assert sorted(seeds) == list(range(5))


@pytest.mark.parametrize("write", WITH_SPLITS + WITHOUT_SPLITS, ids=lambda write: write.__name__)
def test_a_folder_may_be_given_by_a_relative_path(tmp_path, write, monkeypatch):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    found = load_segmentation_datasets("data", splits=["train"])["train"]
    label_set = resolve_label_set(found)
    for row in found:
        seed = int(row["id"].removesuffix("_sat")[-1])
        assert np.array_equal(decode_example(row, label_set)[1], formats.scene_ids(seed))


def test_coco_may_name_images_beside_the_folder_of_its_file(tmp_path):
    formats.coco_polygons(tmp_path)
    file = tmp_path / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    for image in content["images"]:
        image["file_name"] = f"../train2017/{image['file_name']}"
    file.write_text(json.dumps(content))
    found = load_segmentation_datasets(str(tmp_path), splits=["train"])["train"]
    assert found["id"][:] == ["plant0", "plant1", "plant2"]


@pytest.mark.parametrize(
    "write",
    [
        *(formats.two_folders, formats.one_folder, formats.cityscapes, formats.cvat_voc, formats.coco_polygons),
        formats.labelme,
    ],
    ids=lambda write: write.__name__,
)
def test_hidden_files_and_folders_are_left_out(tmp_path, write):
    write(tmp_path)
    for file in [path for path in tmp_path.rglob("*") if path.is_file()]:
        for hidden in (file.with_name(f"._{file.name}"), file.parent / ".thumbnails" / file.name):
            hidden.parent.mkdir(exist_ok=True)
            shutil.copy(file, hidden)
    fraction = 0.4 if write in WITHOUT_SPLITS else None
    found = load_segmentation_datasets(str(tmp_path), validation_fraction=fraction)
    assert {split: len(rows) for split, rows in found.items()} == {"train": 3, "validation": 2}


CSV = "\n".join(
    ["name,r,g,b", *(f"{name},{','.join(map(str, color))}" for name, color in zip(formats.NAMES, formats.COLORS))]
)
CLASS_FILES = {
    "colors.json": json.dumps(dict(zip(formats.NAMES, formats.COLORS))),
    "class_dict.csv": CSV,
    "label_class_dict.csv": CSV,
    "labelmap.txt": "\n".join(f"{n}:{r},{g},{b}::" for n, (r, g, b) in zip(formats.NAMES, formats.COLORS)),
}


@pytest.mark.parametrize("name", CLASS_FILES)
def test_a_file_of_colors_beside_the_data_is_found_by_its_name(tmp_path, name):
    formats.save_all(tmp_path, "images/{stem}.png", "masks/{stem}.png", formats.color_mask)
    (tmp_path / name).write_text(CLASS_FILES[name])
    found = load_segmentation_datasets(str(tmp_path), splits=["train"])["train"]
    label_set = resolve_label_set(found)
    assert (label_set.labels, label_set.colors) == (formats.NAMES, formats.COLORS)
    for seed, row in enumerate(found):
        assert np.array_equal(decode_example(row, label_set)[1], formats.scene_ids(seed))
