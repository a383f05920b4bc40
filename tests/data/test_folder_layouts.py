"""Local folders in the layouts of the field, written small."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segmenter_hf.data.decoding import decode_example
from segmenter_hf.data.folder_layouts import split_images
from segmenter_hf.data.label_sets import load_label_set
from segmenter_hf.data.loading import load_segmentation_datasets
from segmenter_hf.data.mask_checks import check_masks

from .test_loading import HEIGHT, WIDTH, assert_holds_pairs, image_array, mask_array, save, save_pairs


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("images/{}", "masks/{}"),
        ("images/{}", "annotations/{}"),
        ("{}/images", "{}/masks"),
        ("{}/images", "{}/labels"),
    ],
)
@pytest.mark.parametrize("names", [("train", "validation"), ("training", "val")])
def test_folders_of_images_and_masks_are_paired_by_name(tmp_path, images, masks, names):
    for name, stems in zip(names, (["a", "b", "c"], ["d"])):
        save_pairs(tmp_path / images.format(name), tmp_path / masks.format(name), stems)
    found = load_segmentation_datasets(str(tmp_path))
    assert_holds_pairs(found["train"], ["a", "b", "c"])
    assert_holds_pairs(found["validation"], ["d"])


def test_a_folder_without_splits_is_all_train(tmp_path):
    save_pairs(tmp_path / "images", tmp_path / "masks", ["a", "b"])
    assert_holds_pairs(load_segmentation_datasets(str(tmp_path), splits=["train"])["train"], ["a", "b"])


def test_nested_folders_are_paired_by_their_path(tmp_path):
    for i, city in enumerate(("ulm", "bonn")):
        save(tmp_path / "images" / "train" / city / "000.png", image_array(i))
        save(tmp_path / "masks" / "train" / city / "000.png", mask_array(i))
    rows = load_segmentation_datasets(str(tmp_path), splits=["train"])["train"]
    assert rows["id"][:] == ["bonn/000", "ulm/000"]
    assert np.array_equal(decode_example(rows[0])[1], mask_array(1))  # bonn comes first
    assert np.array_equal(decode_example(rows[1])[1], mask_array(0))


def test_folders_that_are_links_are_entered_once(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "more").symlink_to(tmp_path / name)
    save_pairs(tmp_path / "images", tmp_path / "masks", ["a", "b"])
    save_pairs(tmp_path / "data" / "images", tmp_path / "data" / "masks", ["c"])
    (tmp_path / "images" / "round").symlink_to(tmp_path / "data" / "images")
    rows = load_segmentation_datasets(str(tmp_path / "data"), splits=["train"])["train"]
    assert rows["id"][:] == ["c", "a", "b"]  # c, more/a, more/b


def test_two_files_of_one_name_in_one_folder_are_refused(tmp_path):
    for name in ("x.jpg", "x.png", "x_mask.png"):
        save(tmp_path / name, mask_array())
    with pytest.raises(ValueError, match=r"two files have one name, x\.\w+ and x\.\w+. Keep one."):
        load_segmentation_datasets(str(tmp_path), splits=["train"])


def test_a_split_under_two_names_is_refused(tmp_path):
    for name, stems in {"train": ["a", "b"], "training": ["c"]}.items():
        save_pairs(tmp_path / "images" / name, tmp_path / "masks" / name, stems)
    with pytest.raises(ValueError, match="one split under two names, 'train' and 'training'"):
        load_segmentation_datasets(str(tmp_path), splits=["train"])


def test_images_of_kinds_that_are_not_read_are_named(tmp_path, caplog):
    save_pairs(tmp_path / "images", tmp_path / "masks", ["a"])
    (tmp_path / "images" / "b.HEIC").write_bytes(b"")
    load_segmentation_datasets(str(tmp_path), splits=["train"])
    assert "1 images are left out" in caplog.text and "b.HEIC" in caplog.text
    caplog.clear()
    assert list(split_images(tmp_path, "train")) == ["a"] and "b.HEIC" in caplog.text


def test_files_without_a_partner_are_listed_up_to_five(tmp_path):
    save_pairs(tmp_path / "images", tmp_path / "masks", ["a"])
    for i in range(7):
        save(tmp_path / "images" / f"lonely{i}.jpg", image_array())
    with pytest.raises(ValueError, match="7 images are without a mask in .*masks: .*lonely0.*lonely4.jpg") as error:
        load_segmentation_datasets(str(tmp_path), splits=["train"])
    assert "lonely5" not in str(error.value)


def test_a_mask_without_an_image_is_listed(tmp_path):
    save_pairs(tmp_path / "images", tmp_path / "masks", ["a"])
    save(tmp_path / "masks" / "b.png", mask_array())
    with pytest.raises(ValueError, match="1 masks are without an image: .*b.png"):
        load_segmentation_datasets(str(tmp_path), splits=["train"])


def test_a_folder_is_no_image_and_a_name_that_is_no_text_is_refused(tmp_path):
    save_pairs(tmp_path / "images", tmp_path / "masks", ["a"])
    (tmp_path / "images" / "b.png").mkdir()
    assert_holds_pairs(load_segmentation_datasets(str(tmp_path), splits=["train"])["train"], ["a"])
    save_pairs(tmp_path / "images", tmp_path / "masks", ["\udcff"])
    with pytest.raises(ValueError, match=r"file names in UTF-8, got 2 others: .*udcff.jpg.*Rename them"):
        load_segmentation_datasets(str(tmp_path), splits=["train"])


def test_two_files_of_one_name_are_refused(tmp_path):
    save_pairs(tmp_path / "images", tmp_path / "masks", ["a"])
    save(tmp_path / "images" / "a.png", image_array())
    with pytest.raises(ValueError, match="a.jpg and a.png"):
        load_segmentation_datasets(str(tmp_path), splits=["train"])


@pytest.mark.parametrize("image_key", ["image_file_name", "file_name"])
@pytest.mark.parametrize("mask_key", ["mask_file_name", "annotation_file_name"])
def test_metadata_names_the_pairs(tmp_path, image_key, mask_key):
    folder = tmp_path / "train"
    save_pairs(folder / "x", folder / "y", ["a", "b"])
    rows = [{image_key: f"x/{stem}.jpg", mask_key: f"y/{stem}.png"} for stem in "ab"]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert_holds_pairs(load_segmentation_datasets(str(tmp_path), splits=["train"])["train"], ["a", "b"])


def test_metadata_that_names_missing_files_or_no_mask_is_refused(tmp_path):
    save(tmp_path / "a.png", image_array())
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text('{"image_file_name": "a.png", "mask_file_name": "b.png"}')
    with pytest.raises(ValueError, match="do not exist: .*b.png"):
        load_segmentation_datasets(str(tmp_path), splits=["train"])
    metadata.write_text('{"image_file_name": "a.png"}')
    with pytest.raises(ValueError, match="'train' has 1 images but no masks in .*metadata.jsonl.* mask_file_name"):
        load_segmentation_datasets(str(tmp_path), splits=["train"])
    metadata.write_text('\n{"picture": "a.png", "mask_file_name": "a.png"}')
    with pytest.raises(
        ValueError, match="metadata.jsonl:2: expected image_file_name and mask_file_name, got .*picture"
    ):
        load_segmentation_datasets(str(tmp_path), splits=["train"])
    metadata.write_text('{"image_file_name": "a.png"')
    with pytest.raises(ValueError, match="metadata.jsonl:1: expected JSON"):
        load_segmentation_datasets(str(tmp_path), splits=["train"])
    metadata.write_text('{"image_file_name": "a.png", "mask_file_name": "a.png"}\n' * 2)
    with pytest.raises(ValueError, match="metadata.jsonl:2: expected one row per image"):
        load_segmentation_datasets(str(tmp_path), splits=["train"])


def test_metadata_may_be_csv_and_name_the_columns_that_are_asked_for(tmp_path):
    save_pairs(tmp_path / "train" / "x", tmp_path / "y", ["a", "b, c"])
    lines = ["picture_file_name,ids_file_name", "x/a.jpg,../y/a.png", '"x/b, c.jpg","../y/b, c.png"']
    (tmp_path / "train" / "metadata.csv").write_text("\n".join(lines) + "\n")
    found = load_segmentation_datasets(str(tmp_path), splits=["train"], image_column="picture", label_column="ids")
    assert_holds_pairs(found["train"], ["a", "b, c"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train/metadata.csv", b"file_name\n" + b"x" * 200_000, "metadata.csv: .*field larger than field limit"),
        ("train/metadata.csv", b"id,mask\na,b,c,d\n", "metadata.csv:2: expected image_file_name"),
        ("train/metadata.csv", b"file_name\n\xff.png\n", "metadata.csv: expected text in UTF-8"),
        ("train/metadata.jsonl", b'{"file_name": "\xff.png"}', "metadata.jsonl: expected text in UTF-8"),
        ("ImageSets/Segmentation/train.txt", b"\xff", "train.txt: expected text in UTF-8"),
    ],
)
def test_lists_of_files_that_are_no_text_are_named(tmp_path, name, content, message):
    save_pairs(tmp_path / "train", tmp_path / "train", ["a"])
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_segmentation_datasets(str(tmp_path), splits=["train"])


@pytest.mark.parametrize("key", ["image_file_name", "mask_file_name"])
@pytest.mark.parametrize("leave", ["../../other/{}", "x/../../../other/{}", "{other}/{}"])
def test_metadata_must_not_name_files_of_others(tmp_path, key, leave):
    save_pairs(tmp_path / "set" / "train" / "x", tmp_path / "set" / "train" / "x", ["a"])
    save_pairs(tmp_path / "other", tmp_path / "other", ["a"])
    row = {"image_file_name": "x/a.jpg", "mask_file_name": "x/a.png"}
    row[key] = leave.format(Path(row[key]).name, other=tmp_path / "other")
    (tmp_path / "set" / "train" / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match="metadata.jsonl:1: expected a relative path that stays in .*other"):
        load_segmentation_datasets(str(tmp_path / "set"), splits=["train"])


def ade20k(root: Path) -> None:
    for split, stems in (("training", ["ADE_train_1", "ADE_train_2"]), ("validation", ["ADE_val_1"])):
        save_pairs(root / "images" / split, root / "annotations" / split, stems)


@pytest.mark.parametrize("inside", ["", "ADEChallengeData2016"])
def test_ade20k_is_read_from_its_folder_or_the_one_around_it(tmp_path, inside):
    ade20k(tmp_path / inside)
    found = load_segmentation_datasets(str(tmp_path))
    assert_holds_pairs(found["train"], ["ADE_train_1", "ADE_train_2"])
    assert_holds_pairs(found["validation"], ["ADE_val_1"])
    assert set(np.unique(decode_example(found["train"][0], load_label_set("ade20k"))[1])) == {0, 1, 255}


def cityscapes(root: Path, kinds: dict[str, np.ndarray]) -> None:
    names = {"train": ["ulm_000000_000019", "bonn_000001_000019"], "val": ["frankfurt_000000_000294"]}
    for split, stems in names.items():
        for seed, stem in enumerate(sorted(stems)):
            city = stem.split("_")[0]
            save(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", image_array(seed))
            save(root / "gtFine" / split / city / f"{stem}_gtFine_color.png", image_array(seed))
            for kind, ids in kinds.items():
                save(root / "gtFine" / split / city / f"{stem}_gtFine_{kind}.png", ids[mask_array(seed)])
    save(root / "leftImg8bit" / "test" / "berlin" / "berlin_000000_000019_leftImg8bit.png", image_array())


LABEL_IDS, TRAIN_IDS = np.array([7, 8, 3], np.uint8), np.array([0, 1, 255], np.uint8)  # road, sidewalk, no class


@pytest.mark.parametrize(
    "kinds",
    [
        {"labelIds": LABEL_IDS},
        {"labelTrainIds": TRAIN_IDS},
        {"labelIds": LABEL_IDS, "labelTrainIds": TRAIN_IDS + 5, "instanceIds": LABEL_IDS},
    ],
)
def test_cityscapes_gives_train_ids_whichever_masks_there_are(tmp_path, kinds):
    cityscapes(tmp_path, kinds)
    label_set = load_label_set("cityscapes")
    found = load_segmentation_datasets(str(tmp_path))
    assert found["train"]["id"][:] == ["bonn_000001_000019", "ulm_000000_000019"]
    assert found["validation"]["id"][:] == ["frankfurt_000000_000294"]
    for seed, row in enumerate(found["train"]):
        image, mask = decode_example(row, label_set)
        assert np.array_equal(image, image_array(seed)) and np.array_equal(mask, TRAIN_IDS[mask_array(seed)])
    report = check_masks(found["train"], label_set.num_labels, label_set, show_progress=False)
    report.raise_if_impossible()
    assert report.pixels_per_class[:2].sum() + report.num_ignored_pixels == 2 * HEIGHT * WIDTH


def test_a_split_without_masks_is_reported_and_cannot_be_loaded(tmp_path, caplog):
    cityscapes(tmp_path, {"labelIds": LABEL_IDS})
    assert sorted(load_segmentation_datasets(str(tmp_path))) == ["train", "validation"]
    assert "'test' has 1 images but no masks in" in caplog.text
    with pytest.raises(ValueError, match=r"no split \['test'\].* 'test' has 1 images but no masks .*gtFine.*labelIds"):
        load_segmentation_datasets(str(tmp_path), splits=["test"])


def test_two_folders_may_have_a_split_without_masks(tmp_path, caplog):
    save_pairs(tmp_path / "images", tmp_path / "masks", ["train/a"])
    save(tmp_path / "images" / "test" / "b.jpg", image_array())
    assert_holds_pairs(load_segmentation_datasets(str(tmp_path), splits=["train"])["train"], ["a"])
    assert "'test' has 1 images but no masks" in caplog.text


def test_a_mask_that_lacks_from_a_tree_is_named(tmp_path):
    cityscapes(tmp_path, {"labelIds": LABEL_IDS})
    next((tmp_path / "gtFine" / "train").rglob("ulm*labelIds.png")).unlink()
    with pytest.raises(ValueError, match="1 images are without a mask in .*gtFine.*: .*ulm_000000_000019_leftImg8bit"):
        load_segmentation_datasets(str(tmp_path))


def voc(root: Path, masks: str, lists: str) -> None:
    for split, stems in (("train", ["2007_1", "2007_2"]), ("val", ["2008_1"]), ("trainval", ["2007_1", "2007_2"])):
        (root / "ImageSets" / lists).mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / lists / f"{split}.txt").write_text("\n".join(stems) + "\n")
        for seed, stem in enumerate(stems):
            save(root / "JPEGImages" / f"{stem}.jpg", image_array(seed))
            picture = Image.fromarray(mask_array(seed)).convert("P")
            picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
            (root / masks).mkdir(exist_ok=True)
            picture.save(root / masks / f"{stem}.png")
    save(root / "JPEGImages" / "of_another_task.jpg", image_array())


VOC, CONTEXT = ("SegmentationClass", "Segmentation"), ("SegmentationClassContext", "SegmentationContext")


@pytest.mark.parametrize(
    ("inside", "kind"),
    [("", VOC), ("VOC2012", VOC), ("VOCdevkit/VOC2012", VOC), ("VOCdevkit/VOC2010", CONTEXT), ("", CONTEXT)],
)
def test_pascal_voc_and_context_are_read_by_their_lists(tmp_path, inside, kind):
    voc(tmp_path / inside, *kind)
    found = load_segmentation_datasets(str(tmp_path), splits=["train", "validation", "trainval"])
    assert_holds_pairs(found["train"], ["2007_1", "2007_2"])
    assert_holds_pairs(found["validation"], ["2008_1"])
    assert_holds_pairs(found["trainval"], ["2007_1", "2007_2"])


def test_voc_names_may_have_spaces_and_suffixes_capitals_and_arrays_lie_beside_masks(tmp_path):
    save(tmp_path / "JPEGImages" / "my image.JPG", image_array())
    save(tmp_path / "SegmentationClass" / "my image.png", mask_array())
    np.save(tmp_path / "SegmentationClass" / "my image.npy", mask_array())
    assert_holds_pairs(load_segmentation_datasets(str(tmp_path), splits=["train"])["train"], ["my image"])
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Segmentation" / "train.txt").write_text('"my image"\n')
    assert_holds_pairs(load_segmentation_datasets(str(tmp_path), splits=["train"])["train"], ["my image"])


def test_a_voc_list_without_masks_is_reported_and_names_existing_images_of_its_own(tmp_path):
    voc(tmp_path, *VOC)
    (tmp_path / "ImageSets" / "Segmentation" / "test.txt").write_text("of_another_task\n")
    with pytest.raises(ValueError, match="'test' has 1 images but no masks in .*SegmentationClass"):
        load_segmentation_datasets(str(tmp_path), splits=["test"])
    for name, message in (("2012_1", "names 1 files that do not exist: .*2012_1.jpg"), ("../../a", "stays in")):
        (tmp_path / "ImageSets" / "Segmentation" / "val.txt").write_text(name)
        with pytest.raises(ValueError, match=f"val.txt.* {message}"):
            load_segmentation_datasets(str(tmp_path))


def test_of_several_kinds_of_masks_or_data_sets_one_must_be_chosen(tmp_path):
    voc(tmp_path / "VOC2010", *VOC)
    voc(tmp_path / "VOC2010", *CONTEXT)
    save(tmp_path / "VOC2010" / "SegmentationClassContext" / "2008_1.png", mask_array(5))
    with pytest.raises(ValueError, match="`dataset_config` SegmentationClass or SegmentationClassContext"):
        load_segmentation_datasets(str(tmp_path))
    for config, seed in (("SegmentationClass", 0), ("SegmentationClassContext", 5)):
        found = load_segmentation_datasets(str(tmp_path), dataset_config=config)
        assert np.array_equal(decode_example(found["validation"][0])[1], mask_array(seed))
    ade20k(tmp_path / "ADEChallengeData2016")
    with pytest.raises(ValueError, match="several datasets, ADEChallengeData2016, VOC2010"):
        load_segmentation_datasets(str(tmp_path))


def test_a_folder_of_something_else_says_what_is_expected(tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(ValueError, match="expected train-.*metadata.jsonl.*images.*got .'pictures'"):
        load_segmentation_datasets(str(tmp_path))


def test_annotations_of_another_kind_are_named(tmp_path):
    save(tmp_path / "images" / "a.png", image_array())
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("0 0.5 0.5 0.1 0.1")
    with pytest.raises(ValueError, match=r"'train' has 1 images but no masks in .*labels, which holds a\.txt"):
        load_segmentation_datasets(str(tmp_path), splits=["train"])
