"""Folders of images and masks: the layouts in use, and how their files pair up.

What a folder may hold, relative to it. SPLIT is the name of the split, where "train" may also be spelt `training`;
"validation" `val`, `valid` or `dev`; and "test" `testing`:

| layout | images | masks | label set |
| --- | --- | --- | --- |
| parquet | column of `SPLIT-*.parquet` or `SPLIT.parquet`, also under `data/` | another column | |
| metadata | `SPLIT/metadata.jsonl` or `.csv`: `image_file_name` or `file_name` | `mask_file_name`, `annotation_file_name` or `label_file_name` | |
| two folders | `images/SPLIT/**` or `SPLIT/images/**` | `masks`, `annotations` or `labels` instead of `images`, and the same name up to the suffix | |
| ADE20K | `images/training/*.jpg` | `annotations/training/*.png` | `ade20k` |
| Cityscapes | `leftImg8bit/SPLIT/CITY/X_leftImg8bit.png` | `gtFine/SPLIT/CITY/X_gtFine_labelIds.png`, else `X_gtFine_labelTrainIds.png` | `cityscapes`, for both |
| Pascal VOC | `JPEGImages/X.jpg` with X in `ImageSets/Segmentation/SPLIT.txt` | `SegmentationClass/X.png` | `pascal_voc` |
| Pascal Context | `JPEGImages/X.jpg` with X in `ImageSets/SegmentationContext/SPLIT.txt` | `SegmentationClassContext/X.png` | `pascal_context_59`, `pascal_context_60` |

The folder given may also be the one around `ADEChallengeData2016`, `VOC2012`, `VOC2010`, or `VOCdevkit` with one of the
latter. Metadata and the two folders may leave SPLIT out: then all is train. Metadata may also name its files by the
columns asked for, as in `picture_file_name`.

A split that has images and no masks is reported, and cannot be loaded; one where some masks are missing is an error.
"""

import csv
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.iterable_dataset import ArrowExamplesIterable
from datasets.table import table_cast

from ..models.image_io import IMAGE_SUFFIXES


logger = logging.getLogger(__name__)

TRAIN_IDS_ENDING = "_labelTrainIds.png"  # so Cityscapes names masks that hold class ids, not its label ids

ROWS_AT_ONCE = 8  # of a parquet file, unpacked
READ_AT_ONCE = 2**20  # bytes of a parquet file, as they are

_SPLIT_ALIASES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
_MASK_FOLDERS = ("masks", "annotations", "labels")
_CITYSCAPES_ENDINGS = ("_gtFine_labelIds.png", f"_gtFine{TRAIN_IDS_ENDING}")
_VOC_LISTS = {"SegmentationClass": "Segmentation", "SegmentationClassContext": "SegmentationContext"}
_KNOWN_FOLDERS = ("ADEChallengeData2016", "VOC2012", "VOC2010", "VOCdevkit/VOC2012", "VOCdevkit/VOC2010")
_NUM_SHOWN = 5


class FolderSplit(NamedTuple):
    """The files of a split by the name that pairs them, and where its masks were looked for."""

    images: dict[str, Path]
    masks: dict[str, Path]
    expected: str


def load_folder(
    root: Path,
    splits: Sequence[str],
    *,
    dataset_config: str | None = None,
    image_column: str = "image",
    label_column: str = "annotation",
    streaming: bool = False,
) -> tuple[dict[str, datasets.Dataset | datasets.IterableDataset], dict[str, str]]:
    """Loads every split of a local folder, which holds one of the layouts above.

    Args:
        root (`Path`):
            The folder.
        splits (sequence of `str`):
            Splits to look for beside train, validation and test, as `trainval` of Pascal VOC.
        dataset_config (`str`, *optional*):
            `SegmentationClass` or `SegmentationClassContext`, for a folder of Pascal VOC that holds both.
        image_column (`str`, *optional*, defaults to `"image"`):
            Column of the images in parquet files, and in the result.
        label_column (`str`, *optional*, defaults to `"annotation"`):
            Column of the masks in parquet files, and in the result.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read parquet files as they are needed.

    Returns:
        `tuple[dict, dict]`: the data sets by split, each with an `id` that is its own in the split (parquet files: where they
        have one); and of the splits without masks what is missing, in words.

    Raises:
        `ValueError`: If the folder holds none of the layouts, images and masks do not pair up, or a file is named that does
            not exist or lies outside of the folder.
    """
    columns = (image_column, label_column)
    names = {split: _SPLIT_ALIASES.get(split, (split,)) for split in (*_SPLIT_ALIASES, *splits)}
    found = _find_splits(root, names, columns, dataset_config)
    if not found:
        inside = [name for name in _KNOWN_FOLDERS if (root / name).is_dir()]
        if len(inside) > 1:
            raise ValueError(f"{root} holds several data sets, {', '.join(inside)}: give the folder of one of them.")
        found = _find_splits(root / inside[0], names, columns, dataset_config) if inside else {}
    if not found:
        raise ValueError(
            f"{root}: expected train-*.parquet, metadata.jsonl, images/ beside masks/, annotations/ or labels/ (each of "
            "them or a folder around them per split), or the folders of ADE20K, Cityscapes or Pascal VOC, got "
            f"{sorted(path.name for path in root.iterdir())[:20]}."
        )
    loaded, without_masks = {}, {}
    for split, files in found.items():
        if isinstance(files, list):
            parquet = {split: [str(file) for file in files]}
            if not any(pq.read_metadata(file).num_rows for file in files):
                raise ValueError(
                    f"{files[0]}: the split {split!r} has no rows. Write the images into it, or ask for another."
                )
            loaded[split] = (
                stream_parquet(parquet[split])
                if streaming
                else datasets.load_dataset("parquet", data_files=parquet, split=split)
            )
        elif files.masks:
            loaded[split] = _dataset_of_pairs(files, *columns)
        else:
            without_masks[split] = f"{split!r} has {len(files.images)} images but no masks in {files.expected}"
            logger.warning("%s: %s.", root, without_masks[split])
    return loaded, without_masks


def stream_parquet(files: Sequence[str], features: datasets.Features | None = None) -> datasets.IterableDataset:
    """Streams the rows of parquet files, few at a time: `datasets.load_dataset` unpacks a whole row group.

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
    """Files of each split that is there under one of its names: parquet files, or images and masks."""
    found = {}
    for split, aliases in names.items():
        parquet = [file for alias in aliases for file in _parquet_files(root, alias)]
        candidates = (_find_split(root, alias, columns, config) for alias in aliases)
        files = parquet or next(filter(None, candidates), None)
        if files:
            found[split] = files
    if not any(isinstance(files, list) or files.masks for files in found.values()):
        single = _metadata_split(root, root, columns) or _two_folders(root, "{}")
        if single and (single.masks or not found):
            found["train"] = single
    return found


def _find_split(root: Path, name: str, columns: tuple[str, str], config: str | None) -> FolderSplit | None:
    return (
        _metadata_split(root, root / name, columns)
        or _two_folders(root, f"{name}/{{}}")
        or _two_folders(root, f"{{}}/{name}")
        or _cityscapes_split(root, name)
        or _voc_split(root, name, config)
    )


def _parquet_files(root: Path, name: str) -> list[Path]:
    patterns = (f"{name}-*.parquet", f"{name}.parquet")
    return sorted(file for folder in (root, root / "data") for pattern in patterns for file in folder.glob(pattern))


# Layouts


def _two_folders(root: Path, pattern: str) -> FolderSplit | None:
    """Images and masks in two folders: `pattern` with "images", and with "masks" or one of its other names."""
    images = _files_by_stem(root / pattern.format("images"))
    mask_folders = [root / pattern.format(name) for name in _MASK_FOLDERS]
    mask_folder = next((folder for folder in mask_folders if folder.is_dir()), None)
    expected = str(mask_folder) if mask_folder else " or ".join(map(str, mask_folders))
    return FolderSplit(images, _files_by_stem(mask_folder) if mask_folder else {}, expected) if images else None


def _files_by_stem(folder: Path) -> dict[str, Path]:
    files = {}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and not path.is_dir():
            stem = path.relative_to(folder).with_suffix("").as_posix()
            if stem in files:
                raise ValueError(f"{folder}: two files have one name, {files[stem].name} and {path.name}. Keep one.")
            files[stem] = path
    return files


def _cityscapes_split(root: Path, name: str) -> FolderSplit | None:
    images = _files_by_ending(root / "leftImg8bit" / name, "_leftImg8bit.png")
    folder = root / "gtFine" / name
    masks = next(filter(None, (_files_by_ending(folder, ending) for ending in _CITYSCAPES_ENDINGS)), {})
    expected = f"{folder}, named CITY/X{' or CITY/X'.join(_CITYSCAPES_ENDINGS)}"
    return FolderSplit(images, masks, expected) if images else None


def _files_by_ending(folder: Path, ending: str) -> dict[str, Path]:
    """Files of a folder and those in it, by their path there without the ending."""
    paths = sorted(folder.rglob(f"*{ending}")) if folder.is_dir() else ()
    return {path.relative_to(folder).as_posix().removesuffix(ending): path for path in paths}


def _voc_split(root: Path, name: str, config: str | None) -> FolderSplit | None:
    lists = {masks: root / "ImageSets" / folder / f"{name}.txt" for masks, folder in _VOC_LISTS.items()}
    present = [masks for masks, file in lists.items() if file.is_file() and config in (None, masks)]
    if not present:
        return None
    if len(present) > 1:
        raise ValueError(
            f"{root} holds masks of Pascal VOC and of Pascal Context: choose with --dataset_config {present[0]} or "
            f"{present[1]}."
        )
    file, folder = lists[present[0]], root / present[0]
    stems = dict.fromkeys(file.read_text(encoding="utf-8").split())
    images = {stem: _path_inside(root, root / "JPEGImages", f"{stem}.jpg", str(file)) for stem in stems}
    masks = {stem: _path_inside(root, folder, f"{stem}.png", str(file)) for stem in stems}
    _check_existence(file, images.values())
    return FolderSplit(images, {stem: path for stem, path in masks.items() if path.is_file()}, str(folder))


def _metadata_split(root: Path, folder: Path, columns: tuple[str, str]) -> FolderSplit | None:
    """Reads `metadata.jsonl` or `metadata.csv`; returns nothing where there is neither."""
    file = next((path for path in (folder / "metadata.jsonl", folder / "metadata.csv") if path.is_file()), None)
    if file is None:
        return None
    image_keys = (f"{columns[0]}_file_name", "image_file_name", "file_name")
    mask_keys = (f"{columns[1]}_file_name", "mask_file_name", "annotation_file_name", "label_file_name")
    split = FolderSplit({}, {}, f"{file}, named by {', '.join(dict.fromkeys(mask_keys))}")
    for where, row in _metadata_rows(file):
        image, mask = (next((row[key] for key in keys if row.get(key)), None) for keys in (image_keys, mask_keys))
        if not isinstance(image, str) or not isinstance(mask, str | None):
            raise ValueError(f"{where}: expected image_file_name and mask_file_name, got {sorted(row)}.")
        stem = PurePosixPath(image).with_suffix("").as_posix()
        if stem in split.images:
            raise ValueError(f"{where}: expected one row per image, got a second one of {stem!r}.")
        split.images[stem] = _path_inside(root, folder, image, where)
        if mask:
            split.masks[stem] = _path_inside(root, folder, mask, where)
    _check_existence(file, [*split.images.values(), *split.masks.values()])
    return split


def _metadata_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a metadata file, each with where it stands."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        if file.suffix == ".csv":
            reader = csv.DictReader(lines)
            yield from ((f"{file}:{reader.line_num}", row) for row in reader)
            return
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{file}:{number}: expected a line of JSON: {error}") from error
                if not isinstance(row, dict):
                    raise ValueError(f"{file}:{number}: expected a JSON object, got {line.strip()[:80]}.")
                yield f"{file}:{number}", row


def _path_inside(root: Path, folder: Path, name: str, where: str) -> Path:
    """The path of a file that a data set names. One that leads out of its folder would read a file of the user."""
    path = Path(os.path.abspath(folder / name))
    if os.path.isabs(name) or not path.is_relative_to(os.path.abspath(root)):
        raise ValueError(f"{where}: expected a relative path that stays in {root}, got {name!r}.")
    return path


def _check_existence(source: Path, paths: Sequence[Path]) -> None:
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"{source} names {len(missing)} files that do not exist: {', '.join(missing[:_NUM_SHOWN])}.")


# Pairs


def check_names(paths: Iterable[Path]) -> None:
    """Refuses file names that a data set cannot hold.

    Raises:
        `ValueError`: If one is no text in UTF-8.
    """
    wrong = [repr(str(path)) for path in paths if str(path).encode(errors="replace").decode() != str(path)]
    if wrong:
        raise ValueError(
            f"expected file names in UTF-8, got {len(wrong)} others: {', '.join(wrong[:_NUM_SHOWN])}. Rename them."
        )


def _dataset_of_pairs(files: FolderSplit, image_column: str, label_column: str) -> datasets.Dataset:
    """A row per image and its mask, in the order of their names.

    Raises:
        `ValueError`: If an image has no mask, or a mask no image.
    """
    for what, lacking, ours, others in (
        ("images", f"a mask in {files.expected}", files.images, files.masks),
        ("masks", "an image", files.masks, files.images),
    ):
        unpaired = [str(ours[name]) for name in sorted(ours.keys() - others.keys())]
        if unpaired:
            raise ValueError(
                f"{len(unpaired)} {what} are without {lacking}: {', '.join(unpaired[:_NUM_SHOWN])}. Add what is missing, or "
                f"take these {what} away."
            )
    check_names([*files.images.values(), *files.masks.values()])
    names = sorted(files.images)
    stems = [name.rpartition("/")[2] for name in names]
    columns = {
        image_column: [str(files.images[name]) for name in names],
        label_column: [str(files.masks[name]) for name in names],
        "id": stems if len(set(stems)) == len(stems) else names,
    }
    features = {image_column: datasets.Image(), label_column: datasets.Image(), "id": datasets.Value("string")}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))
