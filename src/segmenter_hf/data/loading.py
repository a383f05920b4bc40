"""Datasets of images and masks: loading from anywhere, decoding in one place, checking the masks before training.

A dataset comes from the Hub, from parquet files, from a folder of images and masks, or is drawn by `scenes.py`. Whatever
the source, it has the columns `image` and `annotation`, which hold the encoded files: `decode_example` turns a row
into arrays.
"""

import io
import itertools
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import ExifTags, Image, ImageOps
from tqdm.auto import tqdm

from ..models.image_io import IMAGE_FORMATS, pil_to_array
from .encoded_images import CACHES, RowImage, encoded_bytes
from .folder_layouts import TRAIN_IDS_ENDING, load_folder, stream_parquet
from .label_sets import LabelSet, map_labels
from .synthetic_scenes import embedded_scenes


logger = logging.getLogger(__name__)

AnyDataset = datasets.Dataset | datasets.IterableDataset

HUB_FOLDERS = ("hf://", HF_HUB_CACHE, *CACHES)  # where files that rows of the Hub name may lie

_NUM_SHOWN = 5


def load_segmentation_datasets(
    dataset_name: str | None = None,
    *,
    splits: Sequence[str] = ("train", "validation"),
    dataset_config: str | None = None,
    revision: str | None = None,
    image_column: str = "image",
    label_column: str = "annotation",
    validation_fraction: float | None = None,
    scenes_size: tuple[int, int] = (128, 160),
    scenes_train: int = 500,
    scenes_validation: int = 100,
    seed: int = 0,
    streaming: bool = False,
) -> dict[str, AnyDataset]:
    """Loads the splits of a semantic segmentation dataset, with columns `image`, `annotation` and, where given, `id`.

    A local folder is read in these layouts; `folder_layouts.py` says which names its files have in each:

    | layout | what tells it |
    | --- | --- |
    | parquet, as downloaded from the Hub | `train-*.parquet`, also under `data/` |
    | metadata of image and mask | `train/metadata.jsonl` or `train/metadata.csv` |
    | two folders | `images/train` beside `masks/train`, or `train/images` beside `train/masks`; no `train`: no splits |
    | ADE20K | `images/training` beside `annotations/training`, in the folder or its `ADEChallengeData2016` |
    | Cityscapes | `leftImg8bit/train` beside `gtFine/train` |
    | Pascal VOC | `ImageSets/Segmentation/train.txt`, in the folder or its `VOCdevkit/VOC2012` |
    | Pascal Context, as in mmsegmentation | `ImageSets/SegmentationContext/train.txt`, the same for `VOC2010` |

    Args:
        dataset_name (`str`, *optional*):
            "scenes" (the default): the embedded street scenes; or a local folder; or a dataset of the Hub.
        splits (sequence of `str`, *optional*, defaults to `("train", "validation")`):
            Splits to load.
        dataset_config (`str`, *optional*):
            Configuration of a Hub dataset; or, of a VOC folder with two kinds of masks, the folder of those to load.
        revision (`str`, *optional*):
            Branch, tag or commit of a Hub dataset.
        image_column (`str`, *optional*, defaults to `"image"`):
            Column of the images, for parquet files, metadata and the Hub.
        label_column (`str`, *optional*, defaults to `"annotation"`):
            Column of the masks, for parquet files, metadata and the Hub.
        validation_fraction (`float`, *optional*):
            Where there is no validation split, this share of the train split becomes one. Without it, that is an error.
        scenes_size (`tuple[int, int]`, *optional*, defaults to `(128, 160)`):
            Height and width of the embedded scenes, in pixels.
        scenes_train (`int`, *optional*, defaults to 500):
            Number of embedded scenes in the train split.
        scenes_validation (`int`, *optional*, defaults to 100):
            Number of embedded scenes in the validation split. No scene is in both.
        seed (`int`, *optional*, defaults to 0):
            Seed of the embedded scenes and of the split by `validation_fraction`.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to return iterable datasets, and read Hub and parquet files as they are needed.

    Returns:
        `dict[str, datasets.Dataset]` (of `datasets.IterableDataset` if `streaming`): the splits by name. The columns hold
        encoded images, `{"bytes", "path"}`: read rows with `decode_example`.

    Raises:
        `ValueError`: If a split, its masks or a column are missing, both columns are one, images and masks do not
            pair up, or metadata name files outside of the folder.
        `FileNotFoundError`: If `dataset_name` is a path that is no folder.
        `OSError`: If the Hub dataset cannot be reached.
    """
    if image_column == label_column:
        raise ValueError(
            f"Expected two columns, one of images and one of masks, got {image_column!r} for both. Name them with "
            "--image_column and --label_column."
        )
    without_masks, folders = {}, ()
    if dataset_name in (None, "scenes"):
        sizes = {"train": scenes_train, "validation": scenes_validation}
        found = {
            split: embedded_scenes(num_images, scenes_size, seed=2 * seed + (split == "validation"))
            for split, num_images in sizes.items()
            if split in splits
        }
    elif Path(dataset_name).is_dir():
        found, without_masks = load_folder(
            Path(dataset_name),
            splits,
            dataset_config=dataset_config,
            image_column=image_column,
            label_column=label_column,
            streaming=streaming,
        )
        folders = folders_of(Path(dataset_name))
    else:
        check_name(dataset_name)
        folders = HUB_FOLDERS
        found = dict(load_from_hub(dataset_name, dataset_config, revision, streaming))

    if "validation" in splits and "validation" not in found and "train" in found and validation_fraction is not None:
        if isinstance(found["train"], datasets.IterableDataset):
            raise ValueError("validation_fraction needs a dataset of known length: load it without streaming.")
        found["train"], found["validation"] = split_train_validation(found["train"], validation_fraction, seed)
    missing = [split for split in splits if split not in found]
    if missing:
        advice = "".join(f" {without_masks[split]}." for split in missing if split in without_masks)
        if missing == ["validation"]:
            advice += " Give a validation_fraction to split off a part of train."
        available = sorted(found) if dataset_name not in (None, "scenes") else ["train", "validation"]
        raise ValueError(f"{dataset_name or 'scenes'} has no split {missing}, only {available}.{advice}")
    columns = {image_column: "image", label_column: "annotation"}
    kept = {split: keep_columns(found[split], columns, folders) for split in splits}
    if not streaming:
        return kept
    return {
        split: dataset.to_iterable_dataset() if isinstance(dataset, datasets.Dataset) else dataset
        for split, dataset in kept.items()
    }


def load_split(
    dataset_name: str,
    split: str,
    *,
    dataset_config: str | None = None,
    dataset_revision: str | None = None,
    image_column: str = "image",
    label_column: str = "annotation",
    max_samples: int | None = None,
) -> AnyDataset:
    """Load one split, or its first images, as [`load_segmentation_datasets`] does.

    Args:
        dataset_name (`str`), dataset_config (`str`), dataset_revision (`str`), image_column (`str`), label_column (`str`):
            Where and how the images are found: see [`load_segmentation_datasets`].
        split (`str`): The split.
        max_samples (`int`, *optional*): Keep the first so many images only.

    Returns:
        `datasets.Dataset`: Columns `image`, `annotation`, and `id` where there is one.
    """
    loaded = load_segmentation_datasets(
        dataset_name,
        splits=[split],
        dataset_config=dataset_config,
        revision=dataset_revision,
        image_column=image_column,
        label_column=label_column,
    )
    return first_rows(loaded[split], max_samples)


def split_train_validation(
    dataset: datasets.Dataset, fraction: float = 0.1, seed: int = 0
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Splits a dataset at random into a train and a validation part, and logs the sizes.

    Args:
        dataset (`datasets.Dataset`):
            Of two examples at least.
        fraction (`float`, *optional*, defaults to 0.1):
            Share of the validation part, which has one example at least.
        seed (`int`, *optional*, defaults to 0):
            Seed of the permutation.

    Returns:
        `tuple[datasets.Dataset, datasets.Dataset]`: train and validation.

    Raises:
        `ValueError`: If `fraction` is not in (0, 1) or the dataset has fewer than two examples.
    """
    if not 0 < fraction < 1 or len(dataset) < 2:
        raise ValueError(
            f"Expected a fraction in (0, 1) and at least 2 examples to split, got {fraction} and {len(dataset)}."
        )
    order = np.random.default_rng(seed).permutation(len(dataset))
    num_validation = min(max(round(fraction * len(dataset)), 1), len(dataset) - 1)
    logger.warning(
        "No validation split: %d of the %d train examples, drawn with seed %d, are kept for validation.",
        num_validation,
        len(dataset),
        seed,
    )
    return dataset.select(np.sort(order[num_validation:])), dataset.select(np.sort(order[:num_validation]))


# Sources


def check_name(name: str) -> None:
    """Refuses a name that can only be a path, where there is no folder.

    Raises:
        `FileNotFoundError`: If there is none.
    """
    if not Path(name).is_dir() and (Path(name).is_absolute() or name.startswith(("./", "../", "~"))):
        raise FileNotFoundError(f"{name}: no such folder. Expected a folder, a Hub dataset or 'scenes'.")


def load_from_hub(
    name: str, config: str | None, revision: str | None, streaming: bool, split: str | None = None
) -> Any:
    """What `datasets.load_dataset` gives for these arguments; where it cannot be reached, an `OSError` says what to do."""
    try:
        return datasets.load_dataset(name, config, split=split, revision=revision, streaming=streaming)
    except OSError as error:  # no connection, offline mode, no such dataset: all are OSErrors
        raise OSError(
            f"Dataset {name!r} is no local folder, and could not be loaded from the Hub: {error}\n"
            "Check the name and the connection, or, where there is one, run "
            f"`hf download {name} --repo-type dataset --local-dir FOLDER` and give that folder instead."
        ) from error


def load_local(root: Path, split: str, config: str | None, streaming: bool) -> AnyDataset:
    """What `datasets.load_dataset` gives for a folder, but streamed parquet files are read a few rows at a time."""
    if streaming:
        builder = datasets.load_dataset_builder(str(root), config)
        files = (builder.config.data_files or {}).get(split)
        if builder.name == "parquet" and files:
            return stream_parquet(files, builder.info.features)
    return datasets.load_dataset(str(root), config, split=split, streaming=streaming)


def folders_of(root: Path) -> tuple[str, ...]:
    """Where files that the rows of a local data set name may lie: in its folder, or in what was unpacked from it."""
    return os.path.abspath(root), os.path.realpath(root), *CACHES


def column_names(dataset: AnyDataset) -> list[str]:
    """The columns of a dataset; those of its first row where a stream does not say."""
    return dataset.column_names or list(next(iter(dataset), {}))


def keep_columns(dataset: AnyDataset, columns: Mapping[str, str], folders: tuple[str, ...] = ()) -> AnyDataset:
    """Keeps columns of images under new names, and `id` where there is one.

    Decoding is left to `decode_example`, as `datasets.Image` would turn a mask by an EXIF tag that its image lacks.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            The dataset.
        columns (`Mapping[str, str]`):
            New name of each column, `image` or `annotation`.
        folders (`tuple[str, ...]`, *optional*):
            Where the files that rows name must lie: see `RowImage`. By default anywhere.

    Raises:
        `ValueError`: If a column is missing.
    """
    present = column_names(dataset)
    missing = [column for column in columns if column not in present]
    if missing:
        options = {"image": "--image_column", "annotation": "--label_column"}
        raise ValueError(
            f"The dataset has no column {' or '.join(map(repr, missing))}, only {present}. "
            f"Name the columns with {' and '.join(options[name] for name in columns.values())}."
        )
    dataset = dataset.select_columns([*columns, *(["id"] if "id" in present else [])])
    dataset = dataset.rename_columns({old: new for old, new in columns.items() if old != new})
    feature = RowImage(folders=folders) if folders else datasets.Image(decode=False)
    for column in columns.values():
        dataset = dataset.cast_column(column, feature)
    return dataset


def first_rows(dataset: AnyDataset, limit: int | None) -> AnyDataset:
    """The first so many rows of a dataset, or all."""
    if limit is None:
        return dataset
    if isinstance(dataset, datasets.Dataset):
        return dataset.select(range(min(limit, len(dataset))))
    return dataset.take(limit)


def limited_split(split: str, limit: int | None) -> str:
    """Name of the first so many rows of a split, as `datasets` writes it."""
    return split if limit is None else f"{split}[:{limit}]"


# Decoding


def decode_example(
    example: dict[str, Any],
    label_set: LabelSet | None = None,
    *,
    ignore_index: int = 255,
    reduce_labels: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes a row into an image and its mask of class ids.

    An EXIF orientation of the image is applied. The mask is drawn over the image as it is seen, so its own EXIF
    orientation is applied only if the image has one.

    A file named `*_labelTrainIds.png`, as Cityscapes' tools write it, holds class ids already: the map of the label set is
    not applied to it.

    Args:
        example (`dict`):
            A row with `image` and `annotation`, each encoded (`{"bytes", "path"}`) or a PIL image. Masks may be grey in 1,
            8, 16 or 32 bits, palette images (the index counts), or RGB with three equal channels.
        label_set (`LabelSet`, *optional*):
            Gives the map from stored ids to class ids and the ignore index; excludes the next two.
        ignore_index (`int`, *optional*, defaults to 255):
            Label of pixels without a class.
        reduce_labels (`bool`, *optional*, defaults to `False`):
            Whether stored 0 means "no class" and becomes `ignore_index`, and the other ids shift down by one.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: the image, uint8 of shape `(height, width, 3)`, and the mask of shape `(height,
        width)`: uint8 if all ids fit, else int32.

    Raises:
        `ValueError`: If a file cannot be decoded, is of an unexpected kind, or the sizes of image and mask differ.
    """
    image, mask = _open_pair(example)
    if image.mode == "F":
        raise ValueError(f"{_name_of(example)}: expected an image of 8 or 16 bits per channel, got floats.")
    stored = _stored_ids(mask, _name_of(example, "annotation"))
    with _naming_damaged_files(_name_of(example, "image")):
        pixels = np.ascontiguousarray(np.moveaxis(pil_to_array(image, do_convert_rgb=True), 0, -1))
    return pixels, _class_ids(stored, _label_set_of(example, label_set), ignore_index, reduce_labels)


def _open_pair(example: dict[str, Any]) -> tuple[Image.Image, Image.Image]:
    """Opens image and mask, both upright, without decoding more than needed."""
    image, mask = _open_image(example, "image"), _open_image(example, "annotation")
    with _naming_damaged_files(_name_of(example, "image")):
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        image = ImageOps.exif_transpose(image) if turned else image
    with _naming_damaged_files(_name_of(example, "annotation")):
        mask = ImageOps.exif_transpose(mask) if turned else mask
    if image.size != mask.size:
        raise ValueError(
            f"{_name_of(example)}: expected a mask of the size of the image, got (width, height) {mask.size} "
            f"for an image of {image.size}."
        )
    return image, mask


def _open_image(example: dict[str, Any], column: str) -> Image.Image:
    value = example[column]
    if value is None:
        raise ValueError(f"{_name_of(example)}: the row has no {column}. Give it one, or leave the row out.")
    if isinstance(value, Image.Image):
        return value
    with _naming_damaged_files(_name_of(example, column)):
        return Image.open(io.BytesIO(encoded_bytes(value)), formats=IMAGE_FORMATS)


@contextmanager
def _naming_damaged_files(name: str) -> Iterator[None]:
    """Turns PIL's errors, which do not say which file they are about, into a `ValueError` that does."""
    try:
        yield
    except (Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise ValueError(f"{name}: cannot be read as an image: {error}") from error


def _name_of(example: dict[str, Any], column: str = "annotation") -> str:
    """Returns what to call a row, or the file in one of its columns, in a message."""
    value = example.get(column)
    path = value.get("path") if isinstance(value, dict) else None
    names = [str(name) for name in (example.get("id"), path) if name is not None]
    return f"{names[0]} ({names[1]})" if len(names) == 2 else names[0] if names else f"an {column} without a name"


def _stored_ids(mask: Image.Image, name: str) -> np.ndarray:
    """Returns the ids as stored, of shape (height, width) and some integer dtype."""
    with _naming_damaged_files(name):
        ids = np.asarray(mask)
    if mask.mode in ("RGB", "RGBA", "LA"):
        colors = ids[..., :3] if mask.mode != "LA" else ids[..., :1]
        if (colors != colors[..., :1]).any():
            raise ValueError(
                f"{name}: expected a mask of class ids, got an RGB picture with colours. Convert it with the palette "
                "that it was made with: one id per colour, saved as an 8-bit grey PNG."
            )
        ids = colors[..., 0]
    if ids.dtype == bool:
        ids = ids.astype(np.uint8)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{name}: expected a mask of class ids in grey or palette mode, got mode {mask.mode}.")
    return ids


def _label_set_of(example: dict[str, Any], label_set: LabelSet | None) -> LabelSet | None:
    """The label set without its map where the name of the mask says that it holds class ids."""
    value = example["annotation"]
    path = value.get("path") if isinstance(value, dict) else None
    if label_set is None or not (path or "").endswith(TRAIN_IDS_ENDING):
        return label_set
    return replace(label_set, label_id_to_train_id=None)


def _class_ids(stored: np.ndarray, label_set: LabelSet | None, ignore_index: int, reduce_labels: bool) -> np.ndarray:
    """Maps stored ids to class ids: uint8 if they fit, else int32."""
    if label_set is not None:
        ignore_index, reduce_labels = label_set.ignore_index, label_set.reduce_labels
        if label_set.label_id_to_train_id is not None:
            stored = map_labels(stored, label_set.label_id_to_train_id, ignore_index)
    if reduce_labels:
        ignored = (stored == 0) | (stored == ignore_index)
        stored = np.where(ignored, ignore_index, stored.astype(np.int32) - 1)
    fits = stored.dtype == np.uint8 or (stored.min(initial=0) >= 0 and stored.max(initial=0) <= 255)
    return stored.astype(np.uint8 if fits else np.int32, copy=False)


# Checks


@dataclass
class MaskReport:
    """What the masks of a dataset hold.

    Args:
        num_labels (`int`):
            Number of classes expected.
        ignore_index (`int`):
            Label of pixels without a class.
        pixels_per_class (`np.ndarray` of shape `(num_labels,)` and dtype `int64`):
            Pixels of each class.
        images_per_class (`np.ndarray` of shape `(num_labels,)` and dtype `int64`):
            Masks that each class occurs in.
        num_images (`int`):
            Masks seen.
        num_ignored_pixels (`int`):
            Pixels with the label `ignore_index`.
        problems (`list[str]`):
            One line per example that cannot be trained on, with its position and name.
        wrong_ids (`dict[int, int]`):
            Ids that are neither a class nor `ignore_index`, and the number of their pixels.
    """

    num_labels: int
    ignore_index: int
    pixels_per_class: np.ndarray
    images_per_class: np.ndarray
    num_images: int = 0
    num_ignored_pixels: int = 0
    problems: list[str] = field(default_factory=list)
    wrong_ids: dict[int, int] = field(default_factory=dict)

    @property
    def ignored_fraction(self) -> float:
        """Share of the pixels that belong to no class; those with wrong ids count as pixels."""
        num_pixels = int(self.pixels_per_class.sum()) + self.num_ignored_pixels + sum(self.wrong_ids.values())
        return self.num_ignored_pixels / max(num_pixels, 1)

    def describe(self, names: Sequence[str], max_rows: int = 20) -> str:
        """Says in some lines how many pixels are of each class, the most frequent first, and which classes are missing.

        Args:
            names (sequence of `str`):
                Names of the classes.
            max_rows (`int`, *optional*, defaults to 20):
                Classes that are listed.
        """
        num_pixels = max(int(self.pixels_per_class.sum()), 1)
        order = np.argsort(-self.pixels_per_class, kind="stable")
        present = [i for i in order if self.pixels_per_class[i]]
        lines = [
            f"  {names[i]:<24} {100 * self.pixels_per_class[i] / num_pixels:6.2f} % of the pixels, in "
            f"{self.images_per_class[i]} images"
            for i in present[:max_rows]
        ]
        if len(present) > max_rows:
            lines.append(f"  and {len(present) - max_rows} more classes")
        absent = [names[i] for i in range(self.num_labels) if not self.pixels_per_class[i]]
        if absent:
            lines.append(f"  not there: {', '.join(absent[:max_rows])}{' ...' if len(absent) > max_rows else ''}")
        head = f"  {self.num_images} images, {len(present)} of {self.num_labels} classes, "
        return "\n".join([f"{head}{100 * self.ignored_fraction:.2f} % of the pixels ignored", *lines])

    def raise_if_impossible(self) -> None:
        """Raises a `ValueError`, which says what to do, if a model cannot be trained on these masks."""
        if self.problems:
            shown = "\n  ".join(self.problems[:_NUM_SHOWN])
            more = f"\n  and {len(self.problems) - _NUM_SHOWN} more" if len(self.problems) > _NUM_SHOWN else ""
            raise ValueError(f"{len(self.problems)} masks cannot be used:\n  {shown}{more}\n{self._remedy()}".rstrip())
        if self.num_images == 0:
            raise ValueError("There are no masks: the data set or the split is empty.")
        if not self.pixels_per_class.any():
            raise ValueError(
                f"No pixel of {self.num_images} masks belongs to a class: all are {self.ignore_index}. "
                "Check the label map and reduce_labels."
            )
        if np.count_nonzero(self.pixels_per_class) == 1 and self.num_ignored_pixels and self.num_labels > 1:
            raise ValueError(
                f"The masks hold only class {int(self.pixels_per_class.argmax())} and {self.ignore_index}, which is "
                f"ignored. If they are black and white (0 and {self.ignore_index}), pass a label map "
                f"(label_id_to_train_id) {{0: 0, {self.ignore_index}: 1}} with another ignore_index."
            )

    def _remedy(self) -> str:
        if not self.wrong_ids:
            return ""
        wrong = sorted(self.wrong_ids)
        found = f"Ids out of range: {wrong[:20]}; expected 0 to {self.num_labels - 1} and {self.ignore_index}."
        if wrong == [255] and self.num_labels == 2:
            return f"{found} Black and white masks: pass a label map (label_id_to_train_id) {{0: 0, 255: 1}}."
        if wrong == [255]:
            return f"{found} 255 mostly means no class: set ignore_index=255."
        if wrong == [self.num_labels]:
            return (
                f"{found} If 0 is background or 'other' and the classes start at 1, set do_reduce_labels; if 0 is a "
                f"class too, num_labels is {self.num_labels + 1}."
            )
        if wrong[0] < 0 or wrong[-1] > 255:
            return f"{found} Map the stored ids to class ids with a label map (label_id_to_train_id)."
        return (
            f"{found} Either num_labels is too small (at least {wrong[-1] + 1}) or the stored ids need a label map "
            "(label_id_to_train_id)."
        )


def check_masks(
    dataset: AnyDataset,
    num_labels: int,
    label_set: LabelSet | None = None,
    *,
    ignore_index: int = 255,
    reduce_labels: bool = False,
    max_images: int | None = None,
    show_progress: bool = True,
) -> MaskReport:
    """Reads the masks of a dataset and counts what is in them.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            As from `load_segmentation_datasets`.
        num_labels (`int`):
            Number of classes of the model.
        label_set (`LabelSet`, *optional*):
            As for `decode_example`, like the next two.
        ignore_index (`int`, *optional*, defaults to 255):
            Label of pixels without a class.
        reduce_labels (`bool`, *optional*, defaults to `False`):
            Whether stored 0 means "no class".
        max_images (`int`, *optional*):
            Read only so many masks from the beginning.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `MaskReport`: the counts and the problems; call its `raise_if_impossible` before training.
    """
    if label_set is not None:
        ignore_index = label_set.ignore_index
    counts = np.zeros((2, num_labels), dtype=np.int64)
    report = MaskReport(num_labels, ignore_index, pixels_per_class=counts[0], images_per_class=counts[1])
    mapped_ids = set()
    for i, (name, ids, mapped, problem) in enumerate(
        _class_counts(dataset, label_set, ignore_index, reduce_labels, max_images, show_progress)
    ):
        report.num_images += 1
        mapped_ids.update(mapped)
        wrong = {}
        for class_id, num_pixels in ids.items():
            if class_id == ignore_index:
                report.num_ignored_pixels += num_pixels
            elif 0 <= class_id < num_labels:
                counts[:, class_id] += num_pixels, 1
            else:
                wrong[class_id] = num_pixels
                report.wrong_ids[class_id] = report.wrong_ids.get(class_id, 0) + num_pixels
        if wrong:
            problem = f"{name}: ids {sorted(wrong)[:20]} in {sum(wrong.values())} pixels"
        if problem:
            report.problems.append(f"example {i}, {problem}")
    mapped_ids.discard(ignore_index)
    if mapped_ids and max(mapped_ids) < num_labels <= max(label_set.label_id_to_train_id):
        logger.warning(
            "The stored ids end at %d, but the label set %r maps ids up to %d to its %d classes. If the masks hold class ids "
            "already, use a label set without label_id_to_train_id.",
            max(mapped_ids),
            label_set.name,
            max(label_set.label_id_to_train_id),
            num_labels,
        )
    return report


def infer_num_labels(
    dataset: AnyDataset,
    *,
    ignore_index: int = 255,
    reduce_labels: bool = False,
    max_images: int | None = None,
    show_progress: bool = True,
) -> int:
    """Returns the largest class id of a dataset's masks plus one. Arguments as for `check_masks`.

    Raises:
        `ValueError`: If a mask cannot be decoded, or no pixel belongs to a class.
    """
    largest = -1
    for _, ids, _, problem in _class_counts(dataset, None, ignore_index, reduce_labels, max_images, show_progress):
        if problem:
            raise ValueError(problem)
        largest = max(largest, *(class_id for class_id in ids if class_id != ignore_index), -1)
    if largest < 0:
        raise ValueError(
            f"No pixel belongs to a class: every label is {ignore_index}. Check the masks and reduce_labels."
        )
    return largest + 1


def _class_counts(
    dataset: AnyDataset,
    label_set: LabelSet | None,
    ignore_index: int,
    reduce_labels: bool,
    max_images: int | None,
    show_progress: bool,
) -> Iterator[tuple[str, dict[int, int], list[int], str]]:
    """Yields per example its name, pixels of each id, stored ids that a label map applied to, and what is wrong or ""."""
    length = len(dataset) if isinstance(dataset, datasets.Dataset) else None
    total = max_images if length is None else min(length, max_images or length)
    rows = itertools.islice(dataset, max_images)
    for example in tqdm(rows, desc="Checking masks", total=total, disable=not show_progress, unit="image"):
        name = _name_of(example)
        try:
            stored = _stored_ids(_open_pair(example)[1], name)
        except ValueError as error:
            yield name, {}, [], str(error)
            continue
        values, counts = np.unique(stored, return_counts=True)
        label_set_here = _label_set_of(example, label_set)
        ids = Counter()
        for class_id, count in zip(_class_ids(values, label_set_here, ignore_index, reduce_labels), counts.tolist()):
            ids[int(class_id)] += count
        is_mapped = label_set_here is not None and label_set_here.label_id_to_train_id is not None
        yield name, ids, values.tolist() if is_mapped else [], ""
