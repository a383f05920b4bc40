"""Label maps of whole data sets: streamed in, shared by processes, written in chunks that a later run need not do again."""

import io
import itertools
import json
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, PreTrainedModel

from ..data.encoded_images import encoded_bytes
from ..data.folder_layouts import check_names
from ..data.label_sets import LabelSet
from ..data.loading import (
    HUB_FOLDERS,
    AnyDataset,
    check_name,
    column_names,
    folders_of,
    keep_columns,
    load_from_hub,
    load_local,
    load_segmentation_datasets,
)
from ..models.image_io import decode_image
from ..models.image_processing_segmenter import ImageWindows
from ..utils.atomic_files import atomic_write, write_json
from .predictor import (
    MAX_IMAGE_PIXELS,
    describe_protocol,
    find_pictures,
    process_state,
    protocol_arguments,
    stream_segmentations,
)
from .visualization import label_map_image


RECORD_FILE = "prediction.json"
ROWS_PER_GROUP = 100  # of a parquet file: what a reader holds at once
MAX_NAME_BYTES = 180  # file systems take 255, a temporary name is longer
NUM_SHOWN = 20


@dataclass(frozen=True)
class Row:
    """A row of a data set.

    Args:
        index (`int`): Its place, from 0.
        id (`str`, *optional*): Its `id`, where it has one.
        encoded (`Callable[[], Any]`): Gives the encoded image, `{"bytes", "path"}`.
        name (`str`, defaults to `""`): The name of its PNG file without suffix, once it is known.
    """

    index: int
    id: str | None
    encoded: Callable[[], Any]
    name: str = ""


@dataclass
class DatasetPrediction:
    """What `predict_dataset` did, all processes together.

    Args:
        num_images (`int`): Images that were labelled.
        num_skipped (`int`): Images that an earlier run had labelled.
        seconds (`float`): Time from the first to the last image.
        num_processes (`int`): Processes that shared the images.
        unreadable (`list[dict]`): `index`, `id` and `reason` of the images that have no label map, of earlier runs too.
    """

    num_images: int = 0
    num_skipped: int = 0
    seconds: float = 0.0
    num_processes: int = 1
    unreadable: list[dict[str, Any]] = field(default_factory=list)

    def describe(self) -> str:
        """One line: how many images, in what time, and how many were there before."""
        speed = self.num_images / self.seconds if self.seconds > 0 else 0.0
        processes = "1 process" if self.num_processes == 1 else f"{self.num_processes} processes"
        line = f"Labelled {self.num_images} images in {self.seconds:.1f} s with {processes}: {speed:.2f} images/s."
        return f"{line} Skipped {self.num_skipped} that were there." if self.num_skipped else line

    def raise_if_unreadable(self) -> None:
        """Raises a `ValueError` that names the images which could not be read."""
        if not self.unreadable:
            return
        lines = [
            f"row {row['index']}{'' if row['id'] is None else ' (' + row['id'] + ')'}: {row['reason']}"
            for row in self.unreadable[:NUM_SHOWN]
        ]
        if len(self.unreadable) > NUM_SHOWN:
            lines.append(f"and {len(self.unreadable) - NUM_SHOWN} more")
        total = self.num_images + self.num_skipped + len(self.unreadable)
        raise ValueError(
            f"{len(self.unreadable)} of {total} images cannot be read, the others are done:\n  " + "\n  ".join(lines)
        )


# Loading


def load_image_dataset(
    dataset_name: str,
    split: str = "train",
    *,
    dataset_config: str | None = None,
    revision: str | None = None,
    image_column: str = "image",
    streaming: bool = True,
) -> AnyDataset:
    """Load the images of a split, which needs no masks.

    Args:
        dataset_name (`str`): A data set of the Hub; a folder of parquet files; a folder of pictures, where a split is
            the folder `images/SPLIT`, `SPLIT/images` or `SPLIT`, and "train" may also be `images` or all of it; or
            "scenes".
        split (`str`, defaults to `"train"`): The split.
        dataset_config (`str`, *optional*): Configuration of a Hub data set.
        revision (`str`, *optional*): Branch, tag or commit of a Hub data set.
        image_column (`str`, defaults to `"image"`): Column of the images, for parquet files and the Hub.
        streaming (`bool`, defaults to `True`): Whether Hub and parquet files are read as they are needed, in place of
            being downloaded and prepared first.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: The columns `image`, encoded as `{"bytes", "path"}`, and `id`
        where there is one; for pictures the path below the folder without its suffix.

    Raises:
        ValueError: If the split or the column is missing, or a name of a file is no text.
        FileNotFoundError: If `dataset_name` is a path that is no folder, or the folder holds no picture.
        OSError: If the Hub data set cannot be reached.
    """
    root, folders = Path(dataset_name), ()
    if dataset_name == "scenes":
        dataset = load_segmentation_datasets(dataset_name, splits=[split])[split]
    elif root.is_dir() and not any(root.rglob("*.parquet")):
        pictures = find_pictures([_picture_folder(root, split)])
        check_names(pictures.values())
        columns = {image_column: [str(path) for path in pictures.values()], "id": list(pictures)}
        features = datasets.Features({image_column: datasets.Image(), "id": datasets.Value("string")})
        dataset = datasets.Dataset.from_dict(columns, features=features)
    elif root.is_dir():
        dataset, folders = load_local(root, split, dataset_config, streaming), folders_of(root)
    else:
        check_name(dataset_name)
        dataset = load_from_hub(dataset_name, dataset_config, revision, streaming, split)
        folders = HUB_FOLDERS
    return keep_columns(dataset, {image_column: "image"}, folders)


def _picture_folder(root: Path, split: str) -> Path:
    candidates = [root / "images" / split, root / split / "images", root / split]
    if split == "train":
        candidates += [root / "images", root]
    found = next((folder for folder in candidates if folder.is_dir()), None)
    if found is None:
        expected = ", ".join(map(str, candidates))
        raise ValueError(f"{root} has no split {split!r}: expected parquet files, or pictures in {expected}.")
    return found


def numbered_rows(dataset: AnyDataset) -> Iterator[Row]:
    """All rows in order. Of a data set with random access, images are read only when they are asked for."""
    if isinstance(dataset, datasets.Dataset):
        ids = dataset["id"] if "id" in dataset.column_names else itertools.repeat(None, len(dataset))
        for index, row_id in enumerate(ids):
            yield Row(index, _text(row_id), lambda index=index: dataset[index]["image"])
    else:
        for index, row in enumerate(dataset):
            yield Row(index, _text(row.get("id")), lambda row=row: row["image"])


def _text(row_id: Any) -> str | None:
    return None if row_id is None else str(row_id)


def named_rows(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows with names that are safe for files, and differ.

    A name is the id without what could lead out of the folder, or the place where there is no id. The second row of a
    name becomes `NAME+2`: no name holds a plus by itself.
    """
    times: Counter[str] = Counter()
    for row in rows:
        name = f"{row.index:08d}" if row.id is None else re.sub(r"[^\w.-]", "_", row.id).lstrip(".")
        name = name.encode()[:MAX_NAME_BYTES].decode(errors="ignore") or "_"
        times[name.casefold()] += 1  # some file systems hold capitals equal
        count = times[name.casefold()]
        yield replace(row, name=name if count == 1 else f"{name}+{count}")


# Labelling


def predict_dataset(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    dataset: AnyDataset,
    output_dir: str | Path,
    label_set: LabelSet,
    *,
    split: str = "train",
    source: dict[str, Any] | None = None,
    output_format: Literal["parquet", "png"] = "parquet",
    rows_per_file: int = 500,
    with_images: bool = False,
    overwrite: bool = False,
    multi_scale_flip: bool = False,
    scales: Sequence[float] | None = None,
    full_resolution: bool = False,
    window_batch_size: int = 8,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    show_progress: bool = True,
) -> DatasetPrediction:
    """Write the label map of every image of a data set; memory does not grow with the data set.

    The rows are numbered, and each `rows_per_file` of them are a chunk. With several processes (`accelerate launch`)
    each takes every n-th chunk that is not there yet, and all together write what one would: windows are batched within
    a chunk only, so that its label maps depend on nothing else. A run that was interrupted is continued by the same
    call, and its output is that of an undisturbed one.

    The folder gets `prediction.json`, which says what the label maps depend on, and

    - as parquet `SPLIT-00012.parquet` for each chunk, with the columns `index`, `id` where there is one, `image` if wanted
      and `label_map`, a PNG of class ids;
    - as PNG one file for each row, named by its id or its place, and for each chunk `SPLIT-00012.json`: `index`, `id` and
      `label_map` of its rows.

    Args:
        model (`PreTrainedModel`), processor (`BaseImageProcessor`): The model and its image processor.
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): As from `load_image_dataset`.
        output_dir (`str` or `Path`): A new or empty folder, or that of an interrupted run.
        label_set (`LabelSet`): Colours of the classes, in which viewers show the label maps.
        split (`str`, defaults to `"train"`): Name of the split, which names the files.
        source (`dict`, *optional*): What `prediction.json` says besides: where the data come from.
        output_format (`str`, defaults to `"parquet"`): "parquet" or "png".
        rows_per_file (`int`, defaults to 500): Rows of a chunk. At most this many are done again after an interruption.
        with_images (`bool`, defaults to `False`): Whether parquet files hold the images too, as they were encoded.
        overwrite (`bool`, defaults to `False`): Whether to remove the label maps of an earlier run and begin anew. PNG
            files of a chunk that was not finished stay, unless they are written again.
        multi_scale_flip, scales, full_resolution, window_batch_size: As for `stream_segmentations`.
        max_image_pixels (`int`, defaults to 178956970): Images with more pixels are not read.
        show_progress (`bool`, defaults to `True`): Whether the first process shows a progress bar.

    Returns:
        `DatasetPrediction`: What was done by all processes together, and the rows that could not be read, which have no
        label map.

    Raises:
        ValueError: If an argument is out of range, the data set is empty, or the folder holds something else or label
            maps of other arguments.
    """
    if rows_per_file < 1:
        raise ValueError(f"`rows_per_file` must be at least 1, got {rows_per_file}.")
    if output_format not in ("parquet", "png"):
        raise ValueError(f"`output_format` must be 'parquet' or 'png', got {output_format!r}.")
    if with_images and output_format == "png":
        raise ValueError("`with_images` is for parquet files: PNG files hold the label maps only.")
    if not re.fullmatch(r"\w[\w.-]*", split):
        raise ValueError(f"`split` must be the name of a split, which files can be named by; got {split!r}.")
    model.eval()
    state = process_state()
    folder = Path(output_dir)
    record = {
        "model": model.name_or_path,
        "dtype": str(model.dtype).removeprefix("torch."),
        **(source or {}),
        "split": split,
        "protocol": describe_protocol(processor, multi_scale_flip, scales) | {"full_resolution": full_resolution},
        "labels": list(label_set.labels),
        "format": output_format,
        "rows_per_file": rows_per_file,
        "with_images": with_images,
    }
    if state.is_main_process:
        prepare_folder(folder, record, overwrite)
    state.wait_for_everyone()
    done = finished_chunks(folder, split, output_format)
    state.wait_for_everyone()  # all must see the same before one adds to it

    columns = {"index": datasets.Value("int64")}
    columns |= {"id": datasets.Value("string")} if "id" in column_names(dataset) else {}
    columns |= {"image": datasets.Image()} if with_images else {}
    schema = datasets.Features({**columns, "label_map": datasets.Image()}).arrow_schema
    rows = numbered_rows(dataset) if output_format == "parquet" else named_rows(numbered_rows(dataset))
    num_images, unreadable = 0, []
    started = time.perf_counter()
    with tqdm(
        total=_share(dataset, rows_per_file, done, state),
        desc="Labelling" if state.num_processes == 1 else f"Labelling (process 1 of {state.num_processes})",
        unit="image",
        disable=not (show_progress and state.is_main_process),
    ) as progress:
        turn, chunk = itertools.count(), None
        for chunk, of_chunk in itertools.groupby(rows, lambda row: row.index // rows_per_file):
            if chunk in done or next(turn) % state.num_processes != state.process_index:
                continue
            failures: list[dict[str, Any]] = []
            labelled = label_rows(
                model,
                processor,
                of_chunk,
                label_set,
                failures,
                progress,
                max_image_pixels=max_image_pixels,
                multi_scale_flip=multi_scale_flip,
                scales=scales,
                full_resolution=full_resolution,
                window_batch_size=window_batch_size,
            )
            path = folder / f"{split}-{chunk:05d}"
            if output_format == "parquet":
                num_images += write_parquet(path.with_name(f"{path.name}.parquet"), labelled, schema, failures)
            else:
                num_images += write_pngs(path.with_name(f"{path.name}.json"), labelled, failures)
            unreadable += failures
    if chunk is None:
        raise ValueError("The split has no images: check the name of the data set and of the split.")
    if state.num_processes > 1:
        gathered = gather_object([(num_images, unreadable)])
        num_images = sum(count for count, _ in gathered)
        unreadable = [row for _, of_process in gathered for row in of_process]
    unreadable += [row for _, of_chunk in done.values() for row in of_chunk]
    return DatasetPrediction(
        num_images=num_images,
        num_skipped=sum(count for count, _ in done.values()),
        seconds=time.perf_counter() - started,
        num_processes=state.num_processes,
        unreadable=sorted(unreadable, key=lambda row: row["index"]),
    )


def _share(dataset: AnyDataset, rows_per_file: int, done: dict[int, Any], state: PartialState) -> int | None:
    """Rows that fall to this process, where the length of the data set is known."""
    if not isinstance(dataset, datasets.Dataset):
        return None
    starts = [start for start in range(0, len(dataset), rows_per_file) if start // rows_per_file not in done]
    own = starts[state.process_index :: state.num_processes]
    return sum(min(rows_per_file, len(dataset) - start) for start in own)


def label_rows(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    rows: Iterable[Row],
    label_set: LabelSet,
    failures: list[dict[str, Any]],
    progress: tqdm,
    *,
    max_image_pixels: int,
    multi_scale_flip: bool = False,
    scales: Sequence[float] | None = None,
    full_resolution: bool = False,
    **kwargs: Any,
) -> Iterator[tuple[Row, bytes, bytes]]:
    """Label rows one after the other.

    Args:
        model (`PreTrainedModel`), processor (`BaseImageProcessor`): The model and its image processor.
        rows (`Iterable[Row]`): The rows.
        label_set (`LabelSet`): Colours of the classes.
        failures (`list[dict]`): Gets `index`, `id` and `reason` of the rows that cannot be read.
        progress (`tqdm`): Is told of each row.
        max_image_pixels (`int`): Images with more pixels are not read.
        multi_scale_flip, scales, full_resolution, kwargs: As for `stream_segmentations`.

    Yields:
        `tuple[Row, bytes, bytes]`: A row, its encoded image, and its label map as a PNG file.
    """
    waiting: deque[tuple[Row, bytes]] = deque()
    arguments = protocol_arguments(multi_scale_flip, scales, full_resolution)

    def readable() -> Iterator[ImageWindows]:
        for row in rows:
            try:
                content = encoded_bytes(row.encoded() or {"bytes": None, "path": None})
                image = decode_image(io.BytesIO(content), f"row {row.index}", max_image_pixels)
                windows = [processor.lazy_windows(image, **arguments)]
                del image
            except (FileNotFoundError, ValueError) as error:  # others may pass by: the row may yet have an image
                failures.append({"index": row.index, "id": row.id, "reason": str(error)})
                progress.update()
                continue
            waiting.append((row, content))
            yield windows.pop()  # a large image is not held here too

    dtype = torch.uint8 if model.config.num_labels <= 256 else torch.int32
    for segmentation in stream_segmentations(model, processor, readable(), dtype=dtype, **kwargs):
        row, content = waiting.popleft()
        buffer = io.BytesIO()
        label_map_image(segmentation.cpu().numpy(), label_set.palette).save(buffer, format="PNG")
        progress.update()
        yield row, content, buffer.getvalue()


# Writing


def prepare_folder(folder: Path, record: dict[str, Any], overwrite: bool) -> None:
    """Make the output folder and its `prediction.json`, or hold those that are there to the record of this run.

    Raises:
        ValueError: If the folder holds label maps of other arguments and is not to be overwritten, or something else; with
            `overwrite` too: what no run wrote is not removed.
    """
    path, record = folder / RECORD_FILE, json.loads(json.dumps(record))
    if path.is_file():
        there = read_record(path)
        others = [key for key in {**there, **record} if there.get(key) != record.get(key)]
        if others and not overwrite:
            listed = "\n  ".join(f"{key}: {there.get(key)!r} there, {record.get(key)!r} here" for key in others)
            raise ValueError(
                f"{folder} holds label maps of another run:\n  {listed}\n"
                "Give another folder, or begin this one anew with --overwrite."
            )
    elif folder.is_dir() and any(not file.name.startswith(".") for file in folder.iterdir()):
        raise ValueError(
            f"{folder}: expected a new or empty folder, or one with the {RECORD_FILE} of an interrupted run; "
            "got other files. Give another folder."
        )
    if overwrite and path.is_file():
        chunks = list(chunk_files(folder, str(there["split"])))
        for file in [folder / name for chunk in chunks for name in read_chunk(chunk)[2]] + chunks:
            file.unlink(missing_ok=True)
    write_json(path, record)
    for file in folder.glob(".*"):  # of a run that was killed
        if re.fullmatch(r"\..+-[0-9a-f]{32}\.(json|parquet|png)", file.name):
            file.unlink()


def read_record(path: Path) -> dict[str, Any]:
    """Read the `prediction.json` of a run.

    Raises:
        ValueError: If it is something else.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        record = error
    if not isinstance(record, dict) or not record.keys() >= {"split", "format", "rows_per_file", "labels"}:
        raise ValueError(f"{path}: expected the record of an earlier run, got {record!r:.100}. Give another folder.")
    return record


def read_chunk(path: Path) -> tuple[int, list[dict[str, Any]], list[str]]:
    """A finished chunk: the number of its label maps, its unreadable rows, and the names of its PNG files.

    Raises:
        ValueError: If the file is damaged or something else.
    """
    try:
        if path.suffix == ".parquet":
            metadata = pq.read_metadata(path)
            num_rows, names, unreadable = metadata.num_rows, [], json.loads(metadata.metadata[b"unreadable"])
        else:
            content = json.loads(path.read_text(encoding="utf-8"))
            names, unreadable = [row["label_map"] for row in content["rows"]], content["unreadable"]
            num_rows = len(names)
        if not all(Path(name).name == name and name.endswith(".png") for name in names):
            raise ValueError("a label map is no PNG file of the folder")
        texts = [
            {"index": int(row["index"]), "id": _text(row["id"]), "reason": str(row["reason"])} for row in unreadable
        ]
        return num_rows, texts, names
    except (KeyError, OSError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: expected a chunk of label maps, got a file that is damaged or something else "
            f"({type(error).__name__}: {error}). Delete it to have its rows done again."
        ) from error


def chunk_files(folder: Path, split: str) -> dict[Path, int]:
    """The files of a folder that are named as chunks, and their numbers."""
    pattern = re.compile(rf"{re.escape(split)}-(\d{{5,}})\.(?:json|parquet)", re.ASCII)
    matches = ((file, pattern.fullmatch(file.name)) for file in sorted(folder.iterdir()))
    return {file: int(match[1]) for file, match in matches if match}


def finished_chunks(folder: Path, split: str, output_format: str) -> dict[int, tuple[int, list[dict[str, Any]]]]:
    """The chunks that are complete: the number of label maps and the unreadable rows of each, by chunk."""
    present = {file.name for file in folder.iterdir()}
    done = {}
    for path, chunk in chunk_files(folder, split).items():
        if (path.suffix == ".parquet") == (output_format == "parquet"):
            num_rows, unreadable, names = read_chunk(path)
            if present.issuperset(names):
                done[chunk] = num_rows, unreadable
    return done


def write_parquet(
    path: Path, labelled: Iterable[tuple[Row, bytes, bytes]], schema: pa.Schema, failures: list[dict[str, Any]]
) -> int:
    """Write a chunk as a parquet file, whose metadata name the unreadable rows; returns its number of rows."""
    num_rows = 0
    columns = (
        {
            "index": row.index,
            "id": row.id,
            "image": {"bytes": content, "path": None},
            "label_map": {"bytes": png, "path": None},
        }
        for row, content, png in labelled
    )
    with atomic_write(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        while group := list(itertools.islice(columns, ROWS_PER_GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            num_rows += len(group)
        writer.add_key_value_metadata({"unreadable": json.dumps(failures)})
    return num_rows


def write_pngs(path: Path, labelled: Iterable[tuple[Row, bytes, bytes]], failures: list[dict[str, Any]]) -> int:
    """Write a chunk as PNG files, and then the JSON file that names them; returns their number."""
    rows = []
    for row, _, png in labelled:
        file = path.with_name(f"{row.name}.png")
        with atomic_write(file) as temporary:
            temporary.write_bytes(png)
        rows.append({"index": row.index, "id": row.id, "label_map": file.name})
    write_json(path, {"rows": rows, "unreadable": failures})
    return len(rows)
