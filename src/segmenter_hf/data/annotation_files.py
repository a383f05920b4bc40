"""Annotation files that describe masks: COCO (polygons, run lengths, panoptic) and labelme."""

import glob
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from ..models.image_io import IMAGE_FORMATS
from ..utils.folders import visible_files
from ..utils.json_files import read_json
from .described_masks import BACKGROUND_NAMES, describe
from .folder_files import NUM_SHOWN, FolderSplit, check_existence, image_files, path_inside
from .label_set_files import IGNORE_NAME


logger = logging.getLogger(__name__)

COCO_KINDS = ("instances", "panoptic")
MAX_ANNOTATION_BYTES = 2**31  # labelme embeds the image
# Where COCO files are, relative to the folder, with the name of the split.
_COCO_SPLIT_FILES = (
    *("{0}/_annotations.coco.json", "{0}/annotations.json", "{0}/coco.json", "{0}/labels.json"),
    *("annotations/instances_{0}*.json", "annotations/panoptic_{0}*.json", "annotations/{0}*.json"),
    *("{0}.json", "instances_{0}*.json", "panoptic_{0}*.json", "{0}_annotations.json", "annotations_{0}.json"),
)
# The same for a folder without splits.
_COCO_FILES = (
    *("_annotations.coco.json", "annotations/instances_default.json", "annotations/annotations.json"),
    *("annotations.json", "instances.json", "coco.json", "labels.json", "result.json"),
)


def coco_split(root: Path, name: str | None, config: str | None = None) -> FolderSplit | None:
    """The images and masks of a COCO file.

    Args:
        root (`Path`): The folder of the dataset.
        name (`str`, *optional*): Name of the split; without it a file without splits.
        config (`str`, *optional*): "instances" or "panoptic", where there are both.

    Returns:
        `FolderSplit`, *optional*: Nothing if there is no COCO file of the split.

    Raises:
        ValueError: If there are both kinds and none is chosen, several files of a split, or the file is wrong.
    """
    patterns = _COCO_FILES if name is None else [pattern.format(glob.escape(name)) for pattern in _COCO_SPLIT_FILES]
    patterns_of: dict[Path, str] = {}
    for pattern in patterns:
        for file in sorted(root.glob(pattern)):
            if not file.name.startswith("."):
                patterns_of.setdefault(file, pattern)
    found = {file: content for file in patterns_of if _is_coco(content := _read_quietly(file))}
    kinds = {file: "panoptic" if _is_panoptic(content) else "instances" for file, content in found.items()}
    if config in COCO_KINDS:
        found = {file: content for file, content in found.items() if kinds[file] == config}
    elif len(set(kinds.values())) > 1:
        raise ValueError(
            f"{root} holds COCO annotations of instances and panoptic ones ({', '.join(path.name for path in kinds)}): choose "
            "with `dataset_config` instances or panoptic."
        )
    if not found:
        return None
    pattern = patterns_of[next(iter(found))]
    alike = [file for file in found if patterns_of[file] == pattern]
    if len(alike) > 1:  # such as those of 2014 and of 2017, where only the images of one are there
        complete = [file for file in alike if _has_images(root, name, file, found[file])]
        if len(complete) != 1:
            shown = ", ".join(file.name for file in alike)
            raise ValueError(f"{root} holds several COCO files of one split: {shown}. Merge them, or keep one.")
        alike = complete
    return _coco_file_split(root, name, alike[0], found[alike[0]])


def _has_images(root: Path, name: str | None, file: Path, content: dict[str, Any]) -> bool:
    """Whether the first image of a COCO file is there."""
    first = content["images"][0] if content["images"] else None
    try:
        _coco_image_folder(root, name, file, _entry(first, "file_name", str, f"{file}: image"))
    except ValueError:
        return False
    return True


def _read_quietly(file: Path) -> Any:
    """The content of a JSON file, or nothing if it is none: it may have nothing to do with COCO."""
    try:
        return read_json(file, MAX_ANNOTATION_BYTES)
    except ValueError as error:
        logger.warning("%s", error)
        return None


def _is_coco(content: Any) -> bool:
    keys = ("images", "annotations", "categories")
    return isinstance(content, dict) and all(isinstance(content.get(key), list) for key in keys)


def _is_panoptic(content: dict[str, Any]) -> bool:
    return any(isinstance(entry, dict) and "segments_info" in entry for entry in content["annotations"][:1])


def _coco_file_split(root: Path, name: str | None, file: Path, content: dict[str, Any]) -> FolderSplit:
    categories = {
        _entry(category, "id", int, f"{file}: category"): _entry(category, "name", str, f"{file}: category")
        for category in content["categories"]
    }
    entries = {_entry(image, "id", int, f"{file}: image"): image for image in content["images"]}
    if len(entries) < len(content["images"]):
        raise ValueError(f"{file}: expected an `id` of its own for each image, got several with the same one.")
    names = {number: _entry(image, "file_name", str, f"{file}: image {number}") for number, image in entries.items()}
    folder = _coco_image_folder(root, name, file, next(iter(names.values()), ""))
    images = {number: path_inside(root, folder, each.replace("\\", "/"), str(file)) for number, each in names.items()}
    check_existence(file, images.values())
    if _is_panoptic(content):
        masks = dict(_panoptic_masks(root, file, content, categories))
        classes = tuple(dict.fromkeys(categories.values()))
    else:
        masks = dict(_instance_masks(file, content, entries, categories))
        classes = with_background(list(categories.values()))
    relative = {number: Path(os.path.relpath(path, folder)) for number, path in images.items()}
    stems = {number: path.with_suffix("").as_posix() for number, path in relative.items()}
    if len(set(stems.values())) < len(stems):
        stems = {number: f"{stem} {number}" for number, stem in stems.items()}
    return FolderSplit(
        {stems[number]: path for number, path in images.items()},
        {stems[number]: mask for number, mask in masks.items() if number in stems},
        str(file),
        classes,
    )


def with_background(names: Sequence[str]) -> tuple[str, ...]:
    """The names without repetitions, after the background if none of them is that."""
    classes = tuple(dict.fromkeys(name for name in names if name != IGNORE_NAME))
    return classes if any(name.lower() in BACKGROUND_NAMES for name in classes) else ("background", *classes)


def _entry(entry: Any, key: str, kind: type, where: str) -> Any:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{where}: expected `{key}` to be {kind.__name__}, got {value!r:.100} in {entry!r:.200}.")
    return value


def _coco_image_folder(root: Path, name: str | None, file: Path, first: str) -> Path:
    """The folder that the names of the images are relative to: where the first of them lies."""
    endings = [file.stem, file.stem.partition("_")[2], *([name] if name else [])]
    candidates = [folder / ending for ending in endings if ending for folder in (root, root / "images")]
    candidates = [file.parent, file.parent / "images", *candidates, root / "images", root / "data", root]
    for folder in candidates:
        if first and path_inside(root, folder, first.replace("\\", "/"), str(file)).is_file():
            return folder
    searched = ", ".join(dict.fromkeys(map(str, candidates)))
    raise ValueError(f"{file} names the image {first!r}, which is in none of {searched}. Put the images there.")


def _instance_masks(
    file: Path, content: dict[str, Any], entries: dict[int, Any], categories: dict[int, str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The described mask of each image, by its id."""
    objects: dict[int, list[Any]] = {number: [] for number in entries}
    boxes, unknown = [], []
    for annotation in content["annotations"]:
        where = f"{file}: annotation {annotation.get('id') if isinstance(annotation, dict) else annotation!r:.50}"
        number, category = (_entry(annotation, key, int, where) for key in ("image_id", "category_id"))
        if category not in categories:
            raise ValueError(f"{where}: expected a category of the file, {sorted(categories)[:20]}, got {category}.")
        segmentation = annotation.get("segmentation")
        if not segmentation:
            boxes.append(where)
        elif number in objects:
            shape = segmentation if isinstance(segmentation, dict) else {"polygons": segmentation}
            objects[number].append([categories[category], shape])
        else:
            unknown.append(where)
    if unknown:
        logger.warning(
            "%d annotations are of images that the file does not list, such as %s.", len(unknown), unknown[0]
        )
    if boxes:
        raise ValueError(
            f"{len(boxes)} of {len(content['annotations'])} annotations are boxes without a segmentation: "
            f"{', '.join(boxes[:NUM_SHOWN])}. Export polygons or masks, or take these annotations away."
        )
    for number, image in entries.items():
        size = [_entry(image, key, int, f"{file}: image {number}") for key in ("height", "width")]
        yield number, describe(str(file), {"size": size, "objects": objects[number]})


def _panoptic_masks(
    root: Path, file: Path, content: dict[str, Any], categories: dict[int, str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    folders = [file.with_suffix(""), root / file.stem, root / "annotations" / file.stem]
    folder = next((each for each in folders if each.is_dir()), None)
    if folder is None:
        raise ValueError(f"{file}: expected the panoptic PNG files in {' or '.join(map(str, folders))}, found none.")
    paths = []
    for annotation in content["annotations"]:
        number = _entry(annotation, "image_id", int, f"{file}: annotation")
        where = f"{file}: annotation of image {number}"
        paths.append(path_inside(root, folder, _entry(annotation, "file_name", str, where), str(file)))
        segments = {}
        for segment in _entry(annotation, "segments_info", list, where):
            category = _entry(segment, "category_id", int, where)
            if category not in categories:
                raise ValueError(
                    f"{where}: expected a category of the file, {sorted(categories)[:20]}, got {category}."
                )
            segments[str(_entry(segment, "id", int, where))] = categories[category]
        yield number, describe(str(paths[-1]), {"segments": segments})
    check_existence(file, paths)


# labelme


def labelme_split(root: Path, folder: Path) -> FolderSplit | None:
    """The images below a folder with labelme's JSON files beside them, if there are such.

    Args:
        root (`Path`): The folder of the dataset, which no file may lie outside of.
        folder (`Path`): Where to look.

    Returns:
        `FolderSplit`, *optional*: Nothing if there are no files of labelme.

    Raises:
        ValueError: If a file is not as labelme writes it, or its image is missing.
    """
    files = [path for path in visible_files(folder, [".json"]) if path.is_file()]
    if not files or not _is_labelme(_read_quietly(files[0])):
        return None
    beside: dict[Path, list[Path]] = {}
    for path in image_files(folder):
        beside.setdefault(path.with_suffix(""), []).append(path)
    images: dict[str, Path] = {}
    masks: dict[str, Path | dict[str, Any]] = {}
    names: set[str] = set()
    for file in files:
        content = read_json(file, MAX_ANNOTATION_BYTES)
        if not _is_labelme(content):
            raise ValueError(f"{file}: expected a file of labelme with `shapes` and `imagePath`, as {files[0]} is.")
        stem = file.relative_to(folder).with_suffix("").as_posix()
        images[stem] = _labelme_image(root, file, content["imagePath"], beside.get(file.with_suffix(""), []))
        objects = []
        for shape in content["shapes"]:
            label = _entry(shape, "label", str, f"{file}: shape")
            objects.append([label, {key: shape.get(key) for key in ("shape_type", "points", "mask")}])
            names.add(label)
        size = _labelme_size(file, content, images[stem])
        masks[stem] = describe(str(file), {"size": size, "objects": objects})
    used = {path.absolute() for path in images.values()}
    if left_out := [paths for paths in beside.values() if not used.intersection(path.absolute() for path in paths)]:
        logger.warning("%s: %d images without a JSON file of labelme are left out.", folder, len(left_out))
    return FolderSplit(images, masks, f"JSON files of labelme in {folder}", with_background(sorted(names)))


def _is_labelme(content: Any) -> bool:
    if not isinstance(content, dict):
        return False
    return isinstance(content.get("shapes"), list) and isinstance(content.get("imagePath"), str)


def _labelme_size(file: Path, content: dict[str, Any], image: Path) -> list[int]:
    """Height and width; those of the image where the file does not say."""
    if content.get("imageHeight") is None or content.get("imageWidth") is None:
        try:
            with Image.open(image, formats=IMAGE_FORMATS) as header:
                return [header.height, header.width]
        except (Image.DecompressionBombError, OSError, SyntaxError) as error:
            raise ValueError(f"{image}: cannot be read as an image: {error}") from error
    return [_entry(content, key, int, str(file)) for key in ("imageHeight", "imageWidth")]


def _labelme_image(root: Path, file: Path, name: str, beside: list[Path]) -> Path:
    """The image of a file: the one that it names, of those that are called as the file; else the only one of these.

    Raises:
        ValueError: If there are several, or the image that the file names is missing.
    """
    name = name.replace("\\", "/")
    chosen = [path for path in beside if path.name == PurePosixPath(name).name] or beside
    if len(chosen) > 1:
        shown = ", ".join(path.name for path in chosen)
        raise ValueError(
            f"{file} names the image {name!r}, and beside it lie {shown}. Keep the one that was labelled."
        )
    path = chosen[0] if chosen else path_inside(root, file.parent, name, str(file))
    check_existence(file, [path])
    return path
