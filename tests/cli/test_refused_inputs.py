"""Every refused dataset ends a command with a message that names the file, what was found, and what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from segmenter_hf.cli.main import main

from ..data import formats


SMALL = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32,patch_size=8"
TRAINING = (  # noqa: SIM905
    "--crop_size 32 --image_size 32 --max_steps 1 --eval_strategy no --save_strategy no --load_best_model_at_end false "
    "--per_device_train_batch_size 2 --report_to none --disable_tqdm true --use_cpu true"
).split()


def train(root: Path, *options: str) -> None:
    options = options if "--config_overrides" in options else (*options, "--config_overrides", SMALL)
    main(["train", "--dataset_name", str(root), "--output_dir", str(root.parent / "model"), *TRAINING, *options])


def two_folders(change: Callable[[Path], object], write: Callable[[Path], None] = formats.two_folders):
    """A format with something wrong in it."""

    def make(root: Path) -> None:
        write(root)
        change(root)

    return make


def image(root: Path) -> Path:
    return root / "images" / "train" / "plant0.jpg"


def mask(root: Path) -> Path:
    return root / "masks" / "train" / "plant0.png"


def save_mask(pixels: object) -> Callable[[Path], None]:
    return lambda root: Image.fromarray(np.asarray(pixels)).save(mask(root))


def edit_json(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        content = json.loads((root / name).read_text())
        change(content)
        (root / name).write_text(json.dumps(content))

    return edit


def coco(change: Callable[[dict], object], write: Callable[[Path], None] = formats.coco_polygons):
    return two_folders(edit_json("annotations/instances_train2017.json", change), write)


def shape(**fields: object):
    change = edit_json("train/plant0.json", lambda content: content["shapes"][0].update(fields))
    return two_folders(change, formats.labelme)


def deep(pixels: np.ndarray):
    def change(root: Path) -> None:
        image(root).unlink()
        tifffile.imwrite(image(root).with_suffix(".tif"), pixels, photometric="minisblack", planarconfig="contig")

    return two_folders(change)


def objects(root: Path) -> None:
    image(root).unlink()
    np.save(image(root).with_suffix(".npy"), np.array([[{"a": 1}]], dtype=object), allow_pickle=True)


SIZE = (formats.HEIGHT, formats.WIDTH)
IDS = np.zeros(SIZE, np.uint8)
COLORED = np.zeros((*SIZE, 3), np.uint8) + np.array([9, 8, 7], np.uint8)
FOUR = ("--config_overrides", f"{SMALL},num_channels=4")
# What is written, further options, and what the message has to hold: file, what was found, what to do.
REFUSED = {
    "no dataset": (lambda root: None, (), ("data", "expected train-*.parquet", "got []")),
    "only text": (lambda root: (root / "a.txt").write_text("x"), (), ("data", "got ['a.txt']")),
    "no masks": (two_folders(lambda root: shutil.rmtree(root / "masks")), (), ("5 images|3 images", "no masks in")),
    "a missing mask": (
        two_folders(lambda root: mask(root).unlink()),
        (),
        ("plant0.jpg", "without a mask", "Add what"),
    ),
    "a missing image": (two_folders(lambda root: image(root).unlink()), (), ("plant0.png", "without an image")),
    "two images of a name": (
        two_folders(lambda root: shutil.copy(image(root), image(root).with_suffix(".png"))),
        (),
        ("plant0",),
    ),
    "an empty image": (two_folders(lambda root: image(root).write_bytes(b"")), (), ("plant0.jpg", "cannot be read")),
    "a cut image": (
        two_folders(lambda root: image(root).write_bytes(image(root).read_bytes()[:300])),
        (),
        ("plant0", "cannot be read|truncated"),
    ),
    "an empty mask": (two_folders(lambda root: mask(root).write_bytes(b"")), (), ("plant0.png", "cannot be read")),
    "arrays as masks": (
        two_folders(lambda root: (np.save(mask(root).with_suffix(".npy"), IDS), mask(root).unlink())),
        (),
        ("plant0.npy", "none of BMP, GIF, JPEG", "masks as PNG"),
    ),
    "an archive": (
        lambda root: (root.rmdir(), root.write_bytes(b"PK")),
        (),
        ("data: expected a folder, got a file", "Unpack"),
    ),
    "another size": (two_folders(save_mask(IDS[:9])), (), ("plant0", "(40, 9)", "(40, 24)")),
    "colors without names": (two_folders(save_mask(COLORED)), (), ("plant0.png", "(9, 8, 7) in 960", "`--label_set`")),
    "an unknown color": (
        two_folders(save_mask(COLORED), formats.colors_json),
        (),
        ("plant0.png", "(9, 8, 7) in 960", "__ignore__"),
    ),
    "floats as mask": (
        two_folders(lambda root: tifffile.imwrite(mask(root), IDS.astype(np.float32))),
        (),
        ("plant0.png", "mode F", "gray or palette"),
    ),
    "a void id": (
        two_folders(save_mask(IDS + 11)),
        ("--num_labels", "3"),
        ("plant0.png", "ids [11]", "`--num_labels 12`"),
    ),
    "smooth edges": (
        two_folders(
            lambda root: Image.fromarray(IDS + 77).save(root / "masks" / "plant0.png"), formats.black_and_white
        ),
        ("--validation_fraction", "0.4", "--num_labels", "2"),
        ("plant0.png", "77"),
    ),
    "nothing but void": (
        two_folders(lambda root: [Image.fromarray(IDS + 255).save(path) for path in root.glob("masks/*/*.png")]),
        ("--num_labels", "3"),
        ("all are 255", "`--ignore_index`"),
    ),
    "no validation split": (
        two_folders(lambda root: [shutil.rmtree(root / name / "val") for name in ("images", "masks")]),
        (),
        ("data has no split ['validation']", "`--validation_fraction`"),
    ),
    "VOC without lists": (
        formats.voc_without_lists,
        (),
        ("ImageSets/Segmentation/SPLIT.txt, which alone is missing: all 5 pairs are train", "`--validation_fraction`"),
    ),
    "VOC that lists what is not there": (
        two_folders(lambda root: (root / "ImageSets/Segmentation/train.txt").write_text("a\n"), formats.voc),
        (),
        ("train.txt", "a.jpg"),
    ),
    "metadata that is no JSON": (
        two_folders(lambda root: (root / "train" / "metadata.jsonl").write_text("{"), formats.metadata),
        (),
        ("metadata.jsonl:1", "expected JSON"),
    ),
    "metadata of files outside": (
        two_folders(
            lambda root: (root / "train" / "metadata.jsonl").write_text('{"file_name": "../../../a.jpg"}'),
            formats.metadata,
        ),
        (),
        ("metadata.jsonl", "../../../a.jpg"),
    ),
    "COCO of boxes": (
        coco(lambda content: content["annotations"][0].update(segmentation=[])),
        (),
        ("instances_train2017.json: annotation 0", "boxes without a segmentation", "Export polygons or masks"),
    ),
    "COCO of an unknown category": (
        coco(lambda content: content["annotations"][0].update(category_id=4)),
        (),
        ("instances_train2017.json: annotation 0", "[7, 9], got 4"),
    ),
    "COCO of two points": (
        coco(lambda content: content["annotations"][0].update(segmentation=[[1, 2, 3, 4]])),
        (),
        ("plant0", "three or more points", "got 4 numbers"),
    ),
    "COCO far outside": (
        coco(lambda content: content["annotations"][0].update(segmentation=[[1, 2, 3, 4, 1e9, 5]])),
        (),
        ("plant0", "coordinates in pixels of an image of 24 x 40", "1000000000.0"),
    ),
    "COCO of missing images": (
        coco(lambda content: [entry.update(file_name="b.jpg") for entry in content["images"]]),
        (),
        ("instances_train2017.json names the image 'b.jpg'", "Put the images there"),
    ),
    "COCO without a name": (
        coco(lambda content: content["categories"][0].pop("name")),
        (),
        ("instances_train2017.json: category", "expected `name` to be str, got None"),
    ),
    "COCO run lengths of another size": (
        two_folders(
            edit_json(
                "train/_annotations.coco.json",
                lambda content: content["annotations"][0]["segmentation"].update(counts=[5, 6]),
            ),
            formats.coco_run_lengths,
        ),
        (),
        ("plant0", "add up to 960 pixels"),
    ),
    "panoptic without PNG files": (
        two_folders(lambda root: shutil.rmtree(root / "annotations" / "panoptic_train2017"), formats.coco_panoptic),
        (),
        ("panoptic_train2017.json", "expected the panoptic PNG files in"),
    ),
    "labelme, unknown shape": (shape(shape_type="spline"), (), ("plant0", "polygon, rectangle, circle", "'spline'")),
    "labelme, one point": (shape(points=[[1, 2]]), (), ("plant0", "with their points", "'polygon'")),
    "labelme without label": (shape(label=None), (), ("plant0.json: shape", "expected `label` to be str, got None")),
    "other channels": (
        deep(np.zeros((*SIZE, 5), np.uint8)),
        (),
        ("plant0.tif", "5 channels, and the model takes 3", "`--config_overrides num_channels=5`"),
    ),
    "RGB for four channels": (formats.two_folders, FOUR, ("plant0.jpg", "3 channels, and the model takes 4")),
    "floats without range": (
        formats.channels_format(".tif", 4, 1, np.float32),
        FOUR,
        ("plant0.tif", "got float32", "`--value_range`"),
    ),
    "pickled objects": (two_folders(objects), (), ("plant0.npy", "expected numbers in two or three dimensions")),
    "no crop": (formats.two_folders, ("--crop_size", "0"), ("`--crop_size` must be at least 1",)),
    "scales in another order": (
        formats.two_folders,
        ("--min_scale", "3"),
        ("`--min_scale`", "`--max_scale`", "3.0 and 2.0"),
    ),
    "a wrong range": (formats.two_folders, ("--value_range", "9", "3"), ("`--value_range`", "[9.0, 3.0]", "0, 4095")),
    "a class dictionary without colors": (
        two_folders(lambda root: (root / "class_dict.csv").write_text("name,red\nleaf,3\n"), formats.deepglobe),
        ("--validation_fraction", "0.4"),
        ("class_dict.csv", "name, r, g, b", "['name', 'red']"),
    ),
    "a label set and another number": (
        formats.colors_json,
        ("--num_labels", "7"),
        ("`--num_labels` is 7", "has 3 classes"),
    ),
    "an unknown column": (
        formats.parquet,
        ("--label_column", "truth"),
        ("truth", "segmentation_map", "`--label_column`"),
    ),
    "a label set that is not there": (formats.two_folders, ("--label_set", "nowhere.json"), ("nowhere.json",)),
    "one name for three classes": (
        two_folders(lambda root: (root / "class_names.txt").write_text("leaf\nstem\n")),
        (),
        ("plant0.png", "ids [2]", "`--ignore_index 2`"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_dataset_is_explained(name, tmp_path) -> None:
    make, options, expected = REFUSED[name]
    root = tmp_path / "data"
    root.mkdir()
    make(root)
    with pytest.raises(SystemExit) as caught:
        train(root, *options)
    message = str(caught.value.code)
    assert message.startswith("error: ")
    missing = [part for part in expected if not any(each in message for each in part.split("|"))]
    assert not missing, f"{missing} not in: {message}"
    assert not (tmp_path / "model" / "model.safetensors").exists()


def test_the_run_of_a_refused_dataset_can_be_corrected_in_its_folder(tmp_path) -> None:
    root = tmp_path / "data"
    formats.channels_format(".tif", 4, 255, np.uint8)(root)
    with pytest.raises(SystemExit, match="4 channels, and the model takes 3"):
        train(root)
    train(root, *FOUR)
    assert (tmp_path / "model" / "model.safetensors").exists()
