"""Folders of images and masks: the layouts in use, and how their files pair up.

What a folder may hold, relative to it. SPLIT is the name of the split, where "train" may also be spelt `training`;
"validation" `val`, `valid` or `dev`; and "test" `testing`:

| layout | images | masks | label set |
| --- | --- | --- | --- |
| parquet | column of `SPLIT-*.parquet` or `SPLIT.parquet`, also under `data/` | another column | |
| metadata | `SPLIT/metadata.jsonl` or `.csv`: `image_file_name` or `file_name` | `mask_file_name`, `annotation_file_name` or `label_file_name` | |
| two folders | `images/SPLIT/**` or `SPLIT/images/**`; also `imgs`, `image`, `img` | `masks`, `annotations`, `labels`, `mask`, `annotation`, `label` or `gt` instead of `images`, and the same name up to the suffix, or with an ending as `_mask` | |
| folders side by side | `SPLIT/**` | `SPLITannot/**`, as SegNet's CamVid; `SPLIT_masks`, `SPLIT_labels` | `camvid` |
| one folder | `SPLIT/**/X.jpg` | `SPLIT/**/X_mask.png`; also `_label`, `_seg`, `_gt`, or `X.png` alone | |
| COCO | named in `annotations/instances_SPLIT*.json`, `annotations/panoptic_SPLIT*.json`, `SPLIT/_annotations.coco.json` | polygons and run lengths there, or PNG files in `annotations/panoptic_SPLIT*/` | categories |
| labelme | `SPLIT/**/X.jpg` | `SPLIT/**/X.json` | labels |
| ADE20K | `images/training/*.jpg` | `annotations/training/*.png` | `ade20k` |
| Cityscapes | `leftImg8bit/SPLIT/CITY/X_leftImg8bit.png` | `gtFine/SPLIT/CITY/X_gtFine_labelIds.png`, else `X_gtFine_labelTrainIds.png` | `cityscapes`, for both |
| Pascal VOC | `JPEGImages/X.jpg` with X in `ImageSets/Segmentation/SPLIT.txt` | `SegmentationClass/X.png` | `pascal_voc` |
| Pascal Context | `JPEGImages/X.jpg` with X in `ImageSets/SegmentationContext/SPLIT.txt` | `SegmentationClassContext/X.png` | `pascal_context_59`, `pascal_context_60` |

The folder given may also be the one around `ADEChallengeData2016`, `VOC2012`, `VOC2010`, or `VOCdevkit` with one of the
latter. All layouts but Cityscapes may leave SPLIT out: then all is train. Metadata may also name its files by the columns asked
for, as in `image_file_name`. `colors.json`, `class_dict.csv`, `labelmap.txt` or `class_names.txt` in the folder is its label
set.

A split that has images and no masks is reported, and cannot be loaded; one where some masks are missing is an error.
"""

import csv
import glob
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.iterable_dataset import ArrowExamplesIterable
from datasets.table import table_cast

from ..utils.folders import visible_files
from ..utils.json_files import parse_json
from ..utils.messages import one_line
from .annotation_files import coco_split, labelme_split
from .encoded_images import RowImage
from .folder_files import (
    NUM_SHOWN,
    SPLIT_ALIASES,
    FolderSplit,
    Mask,
    check_existence,
    files_by_stem,
    image_files,
    path_inside,
    warn_of_unread_images,
)
from .label_set_files import find_label_file
from .label_sets import LabelSet, label_set_from_names, load_label_set


logger = logging.getLogger(__name__)

TRAIN_IDS_ENDING = "_labelTrainIds.png"  # so Cityscapes names masks that hold class ids, not its label ids

ROWS_AT_ONCE = 8  # of a parquet file, unpacked
READ_AT_ONCE = 2**20  # bytes of a parquet file, as they are

_IMAGE_FOLDERS = ("images", "imgs", "image", "img")
_MASK_FOLDERS = ("masks", "annotations", "labels", "mask", "annotation", "label", "gt")
# What follows the name of a split in the name of the folder of its masks, in capitals or not.
_SIDE_ENDINGS = (
    "annot",
    "_annot",
    "_annotations",
    "_masks",
    "_mask",
    "masks",
    "_labels",
    "_label",
    "labels",
    "_gt",
    "_seg",
)
# What follows the name of an image in the names of masks, and what an image may have there instead.
_MASK_ENDINGS = ("_mask", "_masks", "_label", "_labels", "_seg", "_segmentation", "_gt", "_annotation", "_l", "-mask")
_IMAGE_ENDINGS = ("_image", "_img", "_sat", "_rgb")
_CITYSCAPES_ENDINGS = ("_gtFine_labelIds.png", f"_gtFine{TRAIN_IDS_ENDING}")
_VOC_LISTS = {"SegmentationClass": "Segmentation", "SegmentationClassContext": "SegmentationContext"}
_VOC_MASK_FOLDERS = ("SegmentationClass", "SegmentationClassPNG", "SegmentationClassContext")
_KNOWN_FOLDERS = ("ADEChallengeData2016", "VOC2012", "VOC2010", "VOCdevkit/VOC2012", "VOCdevkit/VOC2010")


class LoadedFolder(NamedTuple):
    """What a folder holds.

    Args:
        splits (`dict[str, datasets.Dataset | datasets.IterableDataset]`): Each with an `id` that is its own in the split
            (parquet files: where they have one).
        notes (`dict[str, str]`): Of splits that are missing or without masks, what is the matter.
        label_set (`LabelSet`, *optional*): The classes, where a file or the annotations name them.
    """

    splits: dict[str, datasets.Dataset | datasets.IterableDataset]
    notes: dict[str, str]
    label_set: LabelSet | None


def load_folder(
    root: Path,
    splits: Sequence[str],
    *,
    dataset_config: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
) -> LoadedFolder:
    """Load every split of a local folder, which holds one of the layouts above.

    Args:
        root (`Path`): The folder.
        splits (sequence of `str`): Splits to look for beside train, validation and test, as `trainval` of Pascal VOC.
        dataset_config (`str`, *optional*): `SegmentationClass` or `SegmentationClassContext`, for a folder of Pascal
            VOC that holds both; `instances` or `panoptic` for one of COCO.
        image_column (`str`, *optional*), label_column (`str`, *optional*): What metadata name images and masks by, and
            the columns of the result; "image" and "annotation" by default.
        streaming (`bool`, defaults to `False`): Whether to read parquet files as they are needed.

    Returns:
        `LoadedFolder`: The datasets by split, and the classes.

    Raises:
        ValueError: If the folder holds none of the layouts, images and masks do not pair up, or a file is named that does
            not exist or lies outside of the folder.
    """
    columns = (image_column or "image", label_column or "annotation")
    names = {split: SPLIT_ALIASES.get(split, (split,)) for split in (*SPLIT_ALIASES, *splits)}
    root, found = _find_layout(root, names, columns, dataset_config)
    warn_of_unread_images(root)
    loaded, notes = {}, {}
    for split, files in found.items():
        if isinstance(files, list):
            loaded[split] = load_parquet(split, files, streaming)
        elif files.masks:
            loaded[split] = _dataset_of_pairs(files, *columns)
        else:
            held = sorted(os.listdir(files.expected))[:3] if os.path.isdir(files.expected) else []
            held_text = f", which holds {', '.join(held)}" if held else ""
            notes[split] = f"{split!r} has {len(files.images)} images but no masks in {files.expected}{held_text}"
            logger.warning("%s: %s.", root, notes[split])
    if (root / "JPEGImages").is_dir() and not (root / "ImageSets").is_dir():
        missing = f"{root} is a folder of Pascal VOC without ImageSets/Segmentation/SPLIT.txt"
        notes.setdefault(
            "validation", f"{missing}, which alone is missing: all {len(loaded['train'])} pairs are train"
        )
    return LoadedFolder(loaded, notes, folder_label_set(root, found.values()))


def _find_layout(
    root: Path, names: Mapping[str, Sequence[str]], columns: tuple[str, str], dataset_config: str | None
) -> tuple[Path, dict[str, list[Path] | FolderSplit]]:
    """The splits of a folder, or of the one dataset that lies in it, and which folder that is.

    Raises:
        ValueError: If it holds none of the layouts, or several datasets.
    """
    found = _find_splits(root, names, columns, dataset_config)
    if not found:
        inside = [name for name in _KNOWN_FOLDERS if (root / name).is_dir()]
        if len(inside) > 1:
            raise ValueError(f"{root} holds several datasets, {', '.join(inside)}: give the folder of one of them.")
        root = root / inside[0] if inside else root
        found = _find_splits(root, names, columns, dataset_config) if inside else {}
    if not found:
        raise ValueError(
            f"{root}: expected train-*.parquet, metadata.jsonl, images/ beside masks/, annotations/ or labels/ (each of "
            "them or a folder around them per split), X.jpg beside X_mask.png, train/ beside trainannot/, JSON files of COCO "
            "or labelme, or the folders of ADE20K, Cityscapes or Pascal VOC, got "
            f"{sorted(path.name for path in root.iterdir())[:20]}."
        )
    return root, found


def split_images(root: Path, split: str, dataset_config: str | None = None) -> dict[str, Path]:
    """The images of a split of a folder of images and masks by name; none where the folder has none of the layouts."""
    names = {split: SPLIT_ALIASES.get(split, (split,))}
    found = _find_splits(root, names, ("image", "annotation"), dataset_config).get(split)
    if not isinstance(found, FolderSplit) or not found.masks:
        return {}
    warn_of_unread_images(root)
    return found.images


def folder_label_set(root: Path, found: Iterable[list[Path] | FolderSplit] = ()) -> LabelSet | None:
    """The classes of a folder: of a file in it, or those that the annotations of all splits name."""
    file = find_label_file(root)
    if file is not None:
        return load_label_set(file)
    names = dict.fromkeys(name for files in found if isinstance(files, FolderSplit) for name in files.names)
    return label_set_from_names(list(names), name=root.resolve().name) if names else None


def load_parquet(split: str, files: list[Path], streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    if not any(pq.read_metadata(file).num_rows for file in files):
        raise ValueError(f"{files[0]}: the split {split!r} has no rows. Write the images into it, or ask for another.")
    if streaming:
        return stream_parquet([str(file) for file in files])
    names = [glob.escape(str(file)) for file in files]
    try:
        return datasets.load_dataset("parquet", data_files={split: names}, split=split)
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno is not None:
            raise cause from None
        raise ValueError(
            f"{files[0].parent}: the parquet files of {split!r} cannot be read as one: {one_line(cause)}"
        ) from error


def stream_parquet(files: Sequence[str], features: datasets.Features | None = None) -> datasets.IterableDataset:
    """Stream the rows of parquet files, few at a time: `datasets.load_dataset` unpacks a whole row group.

    Args:
        files (sequence of `str`): Local files, one at least. Each is a shard.
        features (`datasets.Features`, *optional*): What the columns hold; by default as the first file says.
    """
    features = features or datasets.Features.from_arrow_schema(pq.read_schema(files[0]))
    tables = ArrowExamplesIterable(partial(_parquet_tables, features), {"files": list(files)})
    return datasets.IterableDataset(tables, info=datasets.DatasetInfo(features=features))


def _parquet_tables(features: datasets.Features, files: list[str]) -> Iterator[tuple[tuple[str, int], pa.Table]]:
    for file in files:
        with pq.ParquetFile(file, buffer_size=READ_AT_ONCE) as parquet:
            batches = parquet.iter_batches(batch_size=ROWS_AT_ONCE, use_threads=False)
            for number, batch in enumerate(batches):
                yield (file, number), table_cast(pa.Table.from_batches([batch]), features.arrow_schema)


def _find_splits(
    root: Path, names: Mapping[str, Sequence[str]], columns: tuple[str, str], config: str | None
) -> dict[str, list[Path] | FolderSplit]:
    """Files of each split that is there under one of its names: parquet files, or images and masks.

    Raises:
        ValueError: If a split is there under two names, with other images.
    """
    found: dict[str, list[Path] | FolderSplit] = {}
    for split, aliases in names.items():
        files = find_parquet_files(root, aliases) or _best_alias(
            root, {alias: _best(_split_layouts(root, alias, columns, config)) for alias in aliases}
        )
        if files:
            found[split] = files
    if not any(isinstance(files, list) or files.masks for files in found.values()):
        single = _best(_whole_layouts(root, columns, config))
        if single and (single.masks or not found):
            found["train"] = single
    return found


def _best_alias(root: Path, found: dict[str, FolderSplit | None]) -> FolderSplit | None:
    """The best of what a split is under each of its names."""
    with_masks = {
        alias: set(split.images.values()) for alias, split in found.items() if split is not None and split.masks
    }
    first, *others = with_masks or [""]
    for other in others:
        if with_masks[other] != with_masks[first]:
            raise ValueError(
                f"{root} holds one split under two names, {first!r} and {other!r}: put their files together."
            )
    return _best(found.values())


def _best(candidates: Iterable[FolderSplit | None]) -> FolderSplit | None:
    """The first that has masks, or else the first that has images."""
    without_masks = None
    for candidate in candidates:
        if candidate is not None and candidate.masks:
            return candidate
        without_masks = without_masks or candidate
    return without_masks


def _split_layouts(
    root: Path, name: str, columns: tuple[str, str], config: str | None
) -> Iterator[FolderSplit | None]:
    yield _metadata_split(root, root / name, columns)
    yield _two_folders(root, f"{name}/{{}}")
    yield _two_folders(root, f"{{}}/{name}")
    yield _cityscapes_split(root, name)
    yield _voc_split(root, name, config)
    yield _side_folders(root, name)
    yield coco_split(root, name, config)
    yield labelme_split(root, root / name)
    yield labelme_split(root, root / "images" / name)
    yield _one_folder(root / name)


def _whole_layouts(root: Path, columns: tuple[str, str], config: str | None) -> Iterator[FolderSplit | None]:
    yield _metadata_split(root, root, columns)
    yield _two_folders(root, "{}")
    yield _voc_without_lists(root, config)
    yield coco_split(root, None, config)
    yield labelme_split(root, root)
    yield _one_folder(root)


def find_parquet_files(root: Path, names: Iterable[str]) -> list[Path]:
    """The parquet files of a split under the first of its names: in the folder `data`, as on the Hub, or else beside it."""
    for folder in (root / "data", root):
        found = {}
        for name in names:
            pattern = glob.escape(name)
            if files := [*folder.glob(f"{pattern}-*.parquet"), *folder.glob(f"{pattern}.parquet")]:
                found[name] = sorted(files)
        if found:
            first, *others = found
            if others:
                logger.warning("%s: %s is read as the split, and %s left out.", folder, first, ", ".join(others))
            return found[first]
    return []


# Layouts


def _two_folders(root: Path, pattern: str) -> FolderSplit | None:
    """Images and masks in two folders: `pattern` with "images", and with "masks", or one of their other names."""
    folders = (files_by_stem(root / pattern.format(name)) for name in _IMAGE_FOLDERS)
    images = next(filter(None, folders), None)
    if images is None:
        return None
    candidates = [root / pattern.format(name) for name in _MASK_FOLDERS]
    present = [folder for folder in candidates if folder.is_dir()]
    for folder in present:
        if masks := files_by_stem(folder):
            return FolderSplit(images, match_masks(images, masks), str(folder))
    return FolderSplit(images, {}, " or ".join(map(str, present or candidates)))


def _side_folders(root: Path, name: str) -> FolderSplit | None:
    """Images in a folder named as the split, and masks in one beside it whose name goes on, as in train/ and trainannot/."""
    if not (root / name).is_dir():
        return None
    endings = {f"{name}{ending}".lower() for ending in _SIDE_ENDINGS}
    for folder in sorted(path for path in root.iterdir() if path.name.lower() in endings):
        if (masks := files_by_stem(folder)) and (images := files_by_stem(root / name)):
            return FolderSplit(images, match_masks(images, masks), str(folder))
    return None


def _one_folder(folder: Path) -> FolderSplit | None:
    """Images and masks in one folder: masks have an ending as in X_mask.png, or are the PNG files of JPEG files."""
    files: dict[str, list[Path]] = {}
    for path in image_files(folder):
        files.setdefault(path.relative_to(folder).with_suffix("").as_posix(), []).append(path)
    masks = {stem: paths[0] for stem, paths in files.items() if _image_name(stem, files)}
    if masks:
        if double := next((paths for paths in files.values() if len(paths) > 1), None):
            raise ValueError(f"{folder}: two files have one name, {double[0].name} and {double[1].name}. Keep one.")
        images = {stem: paths[0] for stem, paths in files.items() if stem not in masks}
        return FolderSplit(images, match_masks(images, masks), f"{folder}, named X_mask.png")
    jpeg = {stem: [p for p in paths if p.suffix.lower() in (".jpg", ".jpeg")] for stem, paths in files.items()}
    if not files or not all(len(files[stem]) == 2 and len(jpeg[stem]) == 1 for stem in files):
        return None
    images = {stem: paths[0] for stem, paths in jpeg.items()}
    return FolderSplit(
        images, {stem: next(p for p in files[stem] if p != images[stem]) for stem in files}, str(folder)
    )


def match_masks(images: Mapping[str, Path], masks: Mapping[str, Path]) -> dict[str, Mask]:
    """The masks by the names of their images, which are the same or lack an ending such as `_mask`.

    Raises:
        ValueError: If an image has two masks.
    """
    matched: dict[str, Path] = {}
    for stem, path in masks.items():
        name = stem if stem in images else _image_name(stem, images) or stem
        if name in matched:
            raise ValueError(
                f"{path.parent}: one image has two masks, {matched[name].name} and {path.name}. Keep one."
            )
        matched[name] = path
    return {**matched}


def _image_name(stem: str, images: Collection[str]) -> str | None:
    """The name of the image that a mask with an ending is for, if there is one."""
    for ending in _MASK_ENDINGS:
        if stem.lower().endswith(ending):
            names = (stem[: -len(ending)] + other for other in ("", *_IMAGE_ENDINGS))
            return next((name for name in names if name in images), None)
    return None


def _cityscapes_split(root: Path, name: str) -> FolderSplit | None:
    images = _files_by_ending(root / "leftImg8bit" / name, "_leftImg8bit.png")
    folder = root / "gtFine" / name
    masks = next(filter(None, (_files_by_ending(folder, ending) for ending in _CITYSCAPES_ENDINGS)), {})
    expected = f"{folder}, named CITY/X{' or CITY/X'.join(_CITYSCAPES_ENDINGS)}"
    return FolderSplit(images, {**masks}, expected) if images else None


def _files_by_ending(folder: Path, ending: str) -> dict[str, Path]:
    """Files of a folder and those in it, by their path there without the ending."""
    paths = visible_files(folder, [ending.lower()])
    return {path.relative_to(folder).as_posix()[: -len(ending)]: path for path in paths}


def _voc_split(root: Path, name: str, config: str | None) -> FolderSplit | None:
    lists = {masks: _voc_list(root / "ImageSets" / folder, name) for masks, folder in _VOC_LISTS.items()}
    present = {masks: file for masks, file in lists.items() if file is not None and config in (None, masks)}
    if not present:
        return None
    if len(present) > 1:
        raise ValueError(
            f"{root} holds masks of Pascal VOC and of Pascal Context: choose with `dataset_config` "
            f"{' or '.join(present)}."
        )
    ((kind, file),) = present.items()
    with _translate_text_errors(file):
        lines = (line.strip().strip('"') for line in file.read_text(encoding="utf-8").splitlines())
        stems = dict.fromkeys(filter(None, lines))
    found, found_masks = files_by_stem(root / "JPEGImages"), files_by_stem(root / kind, arrays=False)
    images = {
        stem: found.get(stem) or path_inside(root, root / "JPEGImages", f"{stem}.jpg", str(file)) for stem in stems
    }
    check_existence(file, images.values())
    return FolderSplit(images, {stem: found_masks[stem] for stem in stems if stem in found_masks}, str(root / kind))


def _voc_list(folder: Path, name: str) -> Path | None:
    """The file that lists the images of a split; the only one there, such as CVAT's default.txt, is that of train."""
    file = folder / f"{name}.txt"
    if file.is_file():
        return file
    files = list(folder.glob("[!.]*.txt")) if name == "train" else []
    known = {alias for aliases in SPLIT_ALIASES.values() for alias in aliases}
    return files[0] if len(files) == 1 and files[0].stem not in known else None


def _voc_without_lists(root: Path, config: str | None) -> FolderSplit | None:
    """All images of a folder of Pascal VOC that have masks, where no file in ImageSets says which split they are of."""
    images = files_by_stem(root / "JPEGImages")
    for name in _VOC_MASK_FOLDERS:
        if config in (None, name) and (masks := files_by_stem(root / name, arrays=False)):  # labelme writes arrays too
            with_mask = {stem: path for stem, path in images.items() if stem in masks}
            return FolderSplit(with_mask, dict(masks), str(root / name)) if images else None
    return None


def _metadata_split(root: Path, folder: Path, columns: tuple[str, str]) -> FolderSplit | None:
    """Read `metadata.jsonl` or `metadata.csv`; returns nothing where there is neither."""
    file = next((path for path in (folder / "metadata.jsonl", folder / "metadata.csv") if path.is_file()), None)
    if file is None:
        return None
    image_keys = (f"{columns[0]}_file_name", "image_file_name", "file_name")
    mask_keys = (f"{columns[1]}_file_name", "mask_file_name", "annotation_file_name", "label_file_name")
    split = FolderSplit({}, {}, f"{file}, named by {', '.join(dict.fromkeys(mask_keys))}")
    for where, row in _metadata_rows(file):
        image, mask = (next((row[key] for key in keys if row.get(key)), None) for keys in (image_keys, mask_keys))
        if not isinstance(image, str) or not isinstance(mask, str | None):
            raise ValueError(f"{where}: expected image_file_name and mask_file_name, got {sorted(map(str, row))}.")
        stem = PurePosixPath(image).with_suffix("").as_posix()
        if stem in split.images:
            raise ValueError(f"{where}: expected one row per image, got a second one of {stem!r}.")
        split.images[stem] = path_inside(root, folder, image, where)
        if mask:
            split.masks[stem] = path_inside(root, folder, mask, where)
    files = [mask for mask in split.masks.values() if isinstance(mask, Path)]
    check_existence(file, [*split.images.values(), *files])
    return split


@contextmanager
def _translate_text_errors(file: Path) -> Iterator[None]:
    """Errors of a file that is no text, or no table of it, as a `ValueError` that names the file."""
    try:
        yield
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file}: expected text in UTF-8, got something else: {one_line(error)}") from error


def _metadata_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a metadata file, each with where it stands."""
    with _translate_text_errors(file), file.open(encoding="utf-8-sig", newline="") as lines:
        if file.suffix == ".csv":
            reader = csv.DictReader(lines)
            yield from ((f"{file}:{reader.line_num}", row) for row in reader)
            return
        for number, line in enumerate(lines, start=1):
            if line.strip():
                row = parse_json(line, f"{file}:{number}")
                if not isinstance(row, dict):
                    raise ValueError(f"{file}:{number}: expected a JSON object, got {line.strip()[:80]}.")
                yield f"{file}:{number}", row


# Pairs


def check_names(paths: Iterable[Path]) -> None:
    """Refuse file names that a dataset cannot hold.

    Raises:
        ValueError: If one is no text in UTF-8.
    """
    wrong = [repr(str(path)) for path in paths if str(path).encode(errors="replace").decode() != str(path)]
    if wrong:
        raise ValueError(
            f"expected file names in UTF-8, got {len(wrong)} others: {', '.join(wrong[:NUM_SHOWN])}. Rename them."
        )


def _dataset_of_pairs(files: FolderSplit, image_column: str, label_column: str) -> datasets.Dataset:
    """A row per image and its mask, in the order of their names.

    Raises:
        ValueError: If an image has no mask, or a mask no image.
    """
    sources = {name: mask["path"] if isinstance(mask, dict) else str(mask) for name, mask in files.masks.items()}
    for what, lacking, ours, others in (
        ("images", f"a mask in {files.expected}", files.images, sources),
        ("masks", "an image", sources, files.images),
    ):
        unpaired = [str(ours[name]) for name in sorted(ours.keys() - others.keys())]
        if unpaired:
            raise ValueError(
                f"{len(unpaired)} {what} are without {lacking}: {', '.join(unpaired[:NUM_SHOWN])}. Add what is missing, or "
                f"take these {what} away."
            )
    check_names([*files.images.values(), *map(Path, sources.values())])
    names = sorted(files.images)
    stems = [name.rpartition("/")[2] for name in names]
    columns = {
        image_column: [str(files.images[name]) for name in names],
        label_column: [
            mask if isinstance(mask, dict) else {"bytes": None, "path": str(mask)}
            for mask in map(files.masks.get, names)
        ],
        "id": stems if len(set(stems)) == len(stems) else names,
    }
    features = {image_column: datasets.Image(), label_column: RowImage(), "id": datasets.Value("string")}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))
