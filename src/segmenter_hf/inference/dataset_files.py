"""The output folder of a labelled dataset: its record, and chunks of label maps that a later run need not do again."""

import itertools
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from ..data.loading import AnyDataset, column_names
from ..utils.atomic_files import atomic_write, write_json
from ..utils.json_files import parse_json, read_json_object
from .pseudo_labels import THRESHOLDS_FILE, ConfidenceRule


RECORD_FILE = "prediction.json"
ROWS_PER_GROUP = 100  # of a parquet file: what a reader holds at once


@dataclass(frozen=True)
class Row:
    """A row of a dataset.

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


@dataclass(frozen=True)
class OutputLayout:
    """How the label maps of a split are stored.

    - As parquet: `SPLIT-00012.parquet` for each chunk of rows, with the columns `index`, `id` where there is one, `image` if
      wanted and `label_map`, a PNG of class ids.
    - As PNG: one file for each row, named by its id or its place, and for each chunk `SPLIT-00012.json`: `index`, `id` and
      `label_map` of its rows.

    Args:
        split (`str`, defaults to `"train"`): Name of the split, which names the files.
        output_format (`str`, defaults to `"parquet"`): "parquet" or "png".
        rows_per_file (`int`, defaults to 500): Rows of a chunk. At most this many are done again after an interruption.
        with_images (`bool`, defaults to `False`): Whether parquet files hold the images too, as they were encoded.
        confidence ([`ConfidenceRule`], *optional*): Which pixels keep their class; the others get the ignore index. By default
            all keep it.

    Raises:
        ValueError: If a field is out of range.
    """

    split: str = "train"
    output_format: Literal["parquet", "png"] = "parquet"
    rows_per_file: int = 500
    with_images: bool = False
    confidence: ConfidenceRule | None = None

    def __post_init__(self) -> None:
        if self.rows_per_file < 1:
            raise ValueError(f"`rows_per_file` must be at least 1, got {self.rows_per_file}.")
        if self.output_format not in ("parquet", "png"):
            raise ValueError(f"`output_format` must be 'parquet' or 'png', got {self.output_format!r}.")
        if self.with_images and self.output_format == "png":
            raise ValueError("`with_images` is for parquet files: PNG files hold the label maps only.")
        if not re.fullmatch(r"\w[\w.-]*", self.split):
            raise ValueError(f"`split` must be the name of a split, which files can be named by; got {self.split!r}.")

    def describe(self) -> dict[str, Any]:
        """Return what `prediction.json` says of it."""
        described = {
            "format": self.output_format,
            "rows_per_file": self.rows_per_file,
            "with_images": self.with_images,
        }
        return described | ({} if self.confidence is None else {"confidence": asdict(self.confidence)})

    def write_chunk(
        self,
        folder: Path,
        chunk: int,
        dataset: AnyDataset,
        labelled: "Iterable[tuple[Row, bytes, bytes]]",
        failures: list[dict[str, Any]],
    ) -> int:
        """Write the label maps of a chunk.

        Args:
            folder (`Path`): The output folder.
            chunk (`int`): Number of the chunk.
            dataset (`datasets.Dataset` or `datasets.IterableDataset`): The dataset, whose columns say whether rows have an id.
            labelled (`Iterable[tuple[Row, bytes, bytes]]`): Rows, their encoded images and their label maps as PNG files.
            failures (`list[dict]`): The unreadable rows, which are complete when `labelled` is exhausted.

        Returns:
            `int`: The number of label maps.
        """
        path = folder / f"{self.split}-{chunk:05d}"
        if self.output_format == "png":
            return write_pngs(path.with_name(f"{path.name}.json"), labelled, failures)
        columns = {"index": datasets.Value("int64")}
        columns |= {"id": datasets.Value("string")} if "id" in column_names(dataset) else {}
        columns |= {"image": datasets.Image()} if self.with_images else {}
        schema = datasets.Features({**columns, "label_map": datasets.Image()}).arrow_schema
        return write_parquet(path.with_name(f"{path.name}.parquet"), labelled, schema, failures)


def prepare_folder(folder: Path, record: dict[str, Any], overwrite: bool, *, alone: bool) -> None:
    """Make the output folder and its `prediction.json`, or hold those that are there to the record of this run.

    Args:
        folder (`Path`): The output folder.
        record (`dict[str, Any]`): What the label maps of this run depend on.
        overwrite (`bool`): Whether the label maps of another run are removed.
        alone (`bool`): Whether no other run writes there, so that temporary files are those of killed runs.

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
                "Give another folder, or start this one again with `overwrite`."
            )
    elif folder.is_dir() and any(not file.name.startswith(".") for file in folder.iterdir()):
        raise ValueError(
            f"{folder}: expected a new or empty folder, or one with the {RECORD_FILE} of an interrupted run; "
            "got other files. Give another folder."
        )
    if overwrite and path.is_file():
        chunks = list(chunk_files(folder, str(there["split"])))
        for file in [folder / name for chunk in chunks for name in read_chunk(chunk).names] + chunks:
            file.unlink(missing_ok=True)
        (folder / THRESHOLDS_FILE).unlink(missing_ok=True)
    write_json(path, record)
    for file in folder.glob(".*") if alone else ():
        if re.fullmatch(r"\..+-[0-9a-f]{32}\.(json|parquet|png)", file.name):
            file.unlink()


def read_record(path: Path) -> dict[str, Any]:
    """Read the `prediction.json` of a run.

    Raises:
        ValueError: If it is something else.
    """
    try:
        record = read_json_object(path)
    except ValueError as error:
        raise ValueError(f"{path}: expected the record of an earlier run. {error} Give another folder.") from error
    if not record.keys() >= {"split", "format", "rows_per_file", "labels"}:
        raise ValueError(f"{path}: expected the record of an earlier run, got {record!r:.100}. Give another folder.")
    return record


@dataclass(frozen=True)
class FinishedChunk:
    """A chunk that is complete.

    Args:
        path (`Path`): Its file.
        labelled (`list[tuple[int, str | None]]`): `index` and `id` of the rows that have a label map.
        unreadable (`list[dict]`): `index`, `id` and `reason` of the others.
        names (`list[str]`): The names of its PNG files.
    """

    path: Path
    labelled: list[tuple[int, str | None]]
    unreadable: list[dict[str, Any]]
    names: list[str]

    def check_rows(self, rows: Iterable[Row]) -> None:
        """Refuse a dataset that has other rows in its place.

        Raises:
            ValueError: If one differs in its id, or there are more or fewer.
        """
        known = sorted(
            [*self.labelled, *((row["index"], row["id"]) for row in self.unreadable)], key=lambda row: row[0]
        )
        if known != [(row.index, row.id) for row in rows]:
            raise ValueError(
                f"{self.path} holds label maps of other images: the dataset was changed since. Give another folder, or start "
                "again with `overwrite`."
            )


def read_chunk(path: Path) -> FinishedChunk:
    """Read a finished chunk.

    Raises:
        ValueError: If the file is damaged or something else.
    """
    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                rows = file.read([name for name in ("index", "id") if name in file.schema_arrow.names]).to_pylist()
                names, unreadable = [], parse_json(file.metadata.metadata[b"unreadable"], path)
        else:
            content = read_json_object(path)
            rows, unreadable = content["rows"], content["unreadable"]
            names = [row["label_map"] for row in rows]
        if not all(Path(name).name == name and name.endswith(".png") for name in names):
            raise ValueError("a label map is no PNG file of the folder")
        labelled = [(int(row["index"]), optional_text(row.get("id"))) for row in rows]
        texts = [
            {"index": int(row["index"]), "id": optional_text(row["id"]), "reason": str(row["reason"])}
            for row in unreadable
        ]
        return FinishedChunk(path, labelled, texts, names)
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


def finished_chunks(folder: Path, split: str, output_format: str) -> dict[int, FinishedChunk]:
    """The chunks that are complete, by their number."""
    present = {file.name for file in folder.iterdir()}
    done = {}
    for path, chunk in chunk_files(folder, split).items():
        if (path.suffix == ".parquet") == (output_format == "parquet"):
            finished = read_chunk(path)
            if present.issuperset(finished.names):
                done[chunk] = finished
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


def optional_text(row_id: Any) -> str | None:
    """The id of a row as text, where it has one."""
    return None if row_id is None else str(row_id)
