"""Small datasets in the formats that people have: each function writes one, all of the same scenes."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import tifffile
from PIL import Image


HEIGHT, WIDTH = 24, 40
NAMES = ("background", "leaf", "stem")
COLORS = ((0, 0, 0), (0, 128, 0), (128, 128, 128))
SPLITS = {"train": range(3), "val": range(3, 5)}


def boxes(seed: int) -> list[tuple[str, int, int, int, int]]:
    """Class, left, top, width and height of the two objects of a scene, which do not touch."""
    return [("leaf", 2 + seed, 3, 10, 12 + seed), ("stem", 20, 2 + seed, 12 + seed, 9)]


def scene_ids(seed: int) -> np.ndarray:
    """Class ids of a scene."""
    ids = np.zeros((HEIGHT, WIDTH), np.uint8)
    for name, left, top, width, height in boxes(seed):
        ids[top : top + height, left : left + width] = NAMES.index(name)
    return ids


def scene_image(seed: int) -> np.ndarray:
    """A photograph of a scene: its classes in noise."""
    noise = np.random.default_rng(seed).integers(0, 60, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return noise + np.array([[20], [90], [180]], np.uint8)[scene_ids(seed)]


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def save_all(root: Path, image: str, mask: str, masks: Callable[[int], np.ndarray] = scene_ids) -> None:
    """Save every scene under patterns with {split} and {stem}."""
    for split, seeds in SPLITS.items():
        for seed in seeds:
            save(root / image.format(split=split, stem=f"plant{seed}"), scene_image(seed))
            save(root / mask.format(split=split, stem=f"plant{seed}"), masks(seed))


def two_folders(root: Path) -> None:
    save_all(root, "images/{split}/{stem}.jpg", "masks/{split}/{stem}.png")


def folders_in_splits(root: Path) -> None:
    save_all(root, "{split}/images/{stem}.jpg", "{split}/labels/{stem}.png")


def one_folder(root: Path) -> None:
    save_all(root, "{stem}.jpg", "{stem}_mask.png")


def one_folder_per_split(root: Path) -> None:
    save_all(root, "{split}/{stem}.jpg", "{split}/{stem}.png")


def masks_with_endings(root: Path) -> None:
    save_all(root, "imgs/{split}/{stem}.jpg", "masks/{split}/{stem}_mask.png")


def singular_folders(root: Path) -> None:
    save_all(root, "image/{stem}.png", "label/{stem}.png")


def segnet_camvid(root: Path) -> None:
    save_all(root, "{split}/{stem}.png", "{split}annot/{stem}.png")


def deepglobe(root: Path) -> None:
    save_all(root, "train/{stem}_sat.jpg", "train/{stem}_mask.png", color_mask)
    class_dict(root)


def voc_without_lists(root: Path) -> None:
    save_all(root, "JPEGImages/{stem}.jpg", "SegmentationClass/{stem}.png")


def voc(root: Path) -> None:
    voc_without_lists(root)
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    for split, seeds in SPLITS.items():
        stems = "".join(f"plant{seed}\n" for seed in seeds)
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(stems)


def cityscapes(root: Path) -> None:
    image = "leftImg8bit/{split}/ulm/{stem}_leftImg8bit.png"
    save_all(root, image, "gtFine/{split}/ulm/{stem}_gtFine_labelTrainIds.png")


def ade20k(root: Path) -> None:
    for split, seeds in (("training", range(3)), ("validation", range(3, 5))):
        for seed in seeds:
            save(root / "images" / split / f"plant{seed}.jpg", scene_image(seed))
            save(root / "annotations" / split / f"plant{seed}.png", scene_ids(seed) + 1)


def metadata(root: Path) -> None:
    save_all(root, "{split}/x/{stem}.jpg", "{split}/y/{stem}.png")
    for split, seeds in SPLITS.items():
        rows = [{"file_name": f"x/plant{seed}.jpg", "mask_file_name": f"y/plant{seed}.png"} for seed in seeds]
        (root / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def scene_channels(seed: int, num_channels: int, high: int, dtype: type) -> np.ndarray:
    """A scene of any number of channels, (height, width, channels), with values from 0 to `high`."""
    gray = scene_image(seed).astype(np.float64)[..., :1] / 240
    factors = np.linspace(1, 0.4, num_channels)
    return (gray * factors * high).astype(dtype)


def save_channels(path: Path, pixels: np.ndarray, **tags: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, pixels)
    elif path.suffix == ".png":
        Image.fromarray(pixels[..., 0]).save(path)
    else:
        tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig", **tags)


def channels_format(suffix: str, num_channels: int, high: int, dtype: type, **tags: object) -> Callable[[Path], None]:
    """A writer of two folders, whose images have any number of channels."""

    def write(root: Path) -> None:
        for split, seeds in SPLITS.items():
            for seed in seeds:
                pixels = scene_channels(seed, num_channels, high, dtype)
                save_channels(root / "images" / split / f"plant{seed}{suffix}", pixels, **tags)
                save(root / "masks" / split / f"plant{seed}.png", scene_ids(seed))

    return write


def geotiff(root: Path) -> None:
    """Two folders, whose images are GeoTIFF of 4 channels with a coordinate reference system."""
    import rasterio

    for split, seeds in SPLITS.items():
        for seed in seeds:
            pixels = np.moveaxis(scene_channels(seed, 4, 255, np.uint8), -1, 0)
            path = root / "images" / split / f"plant{seed}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            profile = {"driver": "GTiff", "count": 4, "dtype": "uint8", "height": HEIGHT, "width": WIDTH}
            profile |= {"crs": "EPSG:32633", "transform": rasterio.transform.from_origin(5e5, 5e6, 10, 10)}
            with rasterio.open(path, "w", **profile) as scene:
                scene.write(pixels)
            save(root / "masks" / split / f"plant{seed}.png", scene_ids(seed))


def encoded(pixels: np.ndarray) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def rows(split: str, label_column: str) -> datasets.Dataset:
    seeds = SPLITS[split]
    columns = {"image": [encoded(scene_image(s)) for s in seeds], label_column: [encoded(scene_ids(s)) for s in seeds]}
    columns["id"] = [f"plant{seed}" for seed in seeds]
    image = datasets.Image()
    features = {"image": image, label_column: image, "id": datasets.Value("string")}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def parquet_of(label_column: str) -> Callable[[Path], None]:
    """A writer of parquet files with this column of masks."""

    def write(root: Path) -> None:
        for split, name in (("train", "train"), ("val", "validation")):
            rows(split, label_column).to_parquet(root / f"{name}-00000-of-00001.parquet")

    return write


parquet = parquet_of("segmentation_map")


def saved_to_disk(root: Path) -> None:
    datasets.DatasetDict({split: rows(split, "label") for split in SPLITS}).save_to_disk(root)


def black_and_white(root: Path) -> None:
    save_all(root, "images/{stem}.jpg", "masks/{stem}.png", lambda seed: (scene_ids(seed) > 0).astype(np.uint8) * 255)


def color_mask(seed: int) -> np.ndarray:
    return np.array(COLORS, np.uint8)[scene_ids(seed)]


def class_dict(root: Path) -> None:
    lines = [f"{name},{','.join(map(str, color))}" for name, color in zip(NAMES, COLORS)]
    (root / "class_dict.csv").write_text("\n".join(["name,r,g,b", *lines]) + "\n")


def colors_json(root: Path) -> None:
    save_all(root, "images/{split}/{stem}.jpg", "masks/{split}/{stem}.png", color_mask)
    (root / "colors.json").write_text(json.dumps(dict(zip(NAMES, COLORS))))


def cvat_voc(root: Path) -> None:
    save_all(root, "JPEGImages/{stem}.jpg", "SegmentationClass/{stem}.png", color_mask)
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation" / "default.txt").write_text("".join(f"plant{s}\n" for s in range(5)))
    lines = [f"{name}:{','.join(map(str, color))}::" for name, color in zip(NAMES, COLORS)]
    (root / "labelmap.txt").write_text("# label:color_rgb:parts:actions\n" + "\n".join(lines) + "\n")


def void_id(root: Path) -> None:
    def masks(seed: int) -> np.ndarray:
        ids = scene_ids(seed)
        ids[:2] = 11
        return ids

    save_all(root, "images/{split}/{stem}.jpg", "masks/{split}/{stem}.png", masks)


def write_coco(path: Path, seeds: range, annotate: Callable[[int, int, tuple], dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"id": s, "file_name": f"plant{s}.jpg", "height": HEIGHT, "width": WIDTH} for s in seeds]
    annotations = [annotate(s, number, box) for s in seeds for number, box in enumerate(boxes(s))]
    categories = [{"id": 7, "name": "leaf", "supercategory": "plant"}, {"id": 9, "name": "stem"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def polygon(seed: int, number: int, box: tuple) -> dict:
    name, left, top, width, height = box
    right, bottom = left + width, top + height
    points = [left, top, right, top, right, bottom, left, bottom]
    number += 10 * seed
    category = {"leaf": 7, "stem": 9}[name]
    return {"id": number, "image_id": seed, "category_id": category, "segmentation": [points], "iscrowd": 0}


def run_lengths(seed: int, number: int, box: tuple) -> dict:
    mask = (scene_ids(seed) == NAMES.index(box[0])).T.reshape(-1)
    changes = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8)])))
    counts = np.diff([0, *changes, mask.size]).tolist()
    return {**polygon(seed, number, box), "segmentation": {"size": [HEIGHT, WIDTH], "counts": counts}, "iscrowd": 1}


def compressed_run_lengths(seed: int, number: int, box: tuple) -> dict:
    from pycocotools import mask

    annotation = run_lengths(seed, number, box)
    encoded_mask = mask.frPyObjects(annotation["segmentation"], HEIGHT, WIDTH)
    counts = encoded_mask["counts"].decode()
    return {**annotation, "segmentation": {"size": [HEIGHT, WIDTH], "counts": counts}}


def coco_images(root: Path, pattern: str) -> None:
    for split, seeds in SPLITS.items():
        for seed in seeds:
            save(root / pattern.format(split=split, stem=f"plant{seed}"), scene_image(seed))


def coco_polygons(root: Path) -> None:
    coco_images(root, "{split}2017/{stem}.jpg")
    for split, seeds in SPLITS.items():
        write_coco(root / "annotations" / f"instances_{split}2017.json", seeds, polygon)


def coco_run_lengths(root: Path) -> None:
    coco_images(root, "{split}/{stem}.jpg")
    write_coco(root / "train" / "_annotations.coco.json", SPLITS["train"], run_lengths)
    write_coco(root / "val" / "_annotations.coco.json", SPLITS["val"], compressed_run_lengths)


def coco_panoptic(root: Path) -> None:
    coco_images(root, "{split}2017/{stem}.jpg")
    for split, seeds in SPLITS.items():
        file = root / "annotations" / f"panoptic_{split}2017.json"
        write_coco(file, seeds, polygon)
        content = json.loads(file.read_text())
        content["categories"].insert(0, {"id": 1, "name": "background"})
        content["annotations"] = []
        for seed in seeds:
            segments = scene_ids(seed).astype(int) * 300 + 5  # ids of two bytes
            digits = np.stack([segments % 256, segments // 256, segments * 0], axis=-1).astype(np.uint8)
            save(file.with_suffix("") / f"plant{seed}.png", digits)
            found = [{"id": 300 * k + 5, "category_id": category} for k, category in enumerate((1, 7, 9))]
            entry = {"image_id": seed, "file_name": f"plant{seed}.png", "segments_info": found}
            content["annotations"].append(entry)
        file.write_text(json.dumps(content))


def labelme(root: Path) -> None:
    coco_images(root, "{split}/{stem}.jpg")
    for split, seeds in SPLITS.items():
        for seed in seeds:
            shapes = []
            for name, left, top, width, height in boxes(seed):  # labelme's points are pixels, the last ones too
                right, bottom = left + width - 1, top + height - 1
                corners = [[left, top], [right, top], [right, bottom], [left, bottom]]
                shape = {"label": name, "points": corners, "group_id": None, "shape_type": "polygon", "flags": {}}
                if name == "stem":
                    shape |= {"points": corners[::2], "shape_type": "rectangle"}
                shapes.append(shape)
            content = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": f"plant{seed}.jpg"}
            content |= {"imageData": None, "imageHeight": HEIGHT, "imageWidth": WIDTH}
            (root / split / f"plant{seed}.json").write_text(json.dumps(content))
