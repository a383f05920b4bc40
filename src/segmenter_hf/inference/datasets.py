"""Label maps of whole datasets: streamed in, shared by processes, written in chunks that a later run need not do again."""

import functools
import io
import itertools
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm

from ..data.encoded_images import encoded_bytes
from ..data.label_sets import LABEL_SET_FILE
from ..data.loading import AnyDataset
from ..models.image_io import decode_channels
from ..utils.atomic_files import locked_directory
from ..utils.http import translate_http_errors
from ..utils.processes import process_state
from .dataset_files import FinishedChunk, OutputLayout, Row, finished_chunks, optional_text, prepare_folder
from .model_files import weights_digest
from .predictor import Predictor, Segmentation
from .pseudo_labels import (
    NUM_BINS,
    confident_classes,
    count_confidences,
    pseudo_label_set,
    read_thresholds,
    save_thresholds,
)
from .visualization import label_map_image


MAX_NAME_BYTES = 180  # file systems take 255, a temporary name is longer
NUM_SHOWN = 20


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
        """Raise a `ValueError` that names the images which could not be read."""
        if not self.unreadable:
            return
        lines = [
            f"row {row['index']}{'' if row['id'] is None else ' (' + row['id'] + ')'}: {row['reason']}"
            for row in self.unreadable[:NUM_SHOWN]
        ]
        if len(self.unreadable) > NUM_SHOWN:
            lines.append(f"and {len(self.unreadable) - NUM_SHOWN} more")
        total = self.num_images + self.num_skipped + len(self.unreadable)
        listed = "\n  ".join(lines)
        raise ValueError(
            f"{len(self.unreadable)} of {total} images cannot be read, the others are done:\n  {listed}\n"
            "Where they were repaired, start again with `overwrite`, or without the file of label maps that lacks them."
        )


def numbered_rows(dataset: AnyDataset) -> Iterator[Row]:
    """All rows in order. Of a dataset with random access, images are read only when they are asked for."""
    if isinstance(dataset, datasets.Dataset):
        ids = dataset["id"] if "id" in dataset.column_names else itertools.repeat(None, len(dataset))
        for index, row_id in enumerate(ids):
            yield Row(index, optional_text(row_id), functools.partial(_image_of, dataset, index))
    else:
        with translate_http_errors("The dataset"):
            yield from _streamed_rows(dataset)


def _image_of(dataset: datasets.Dataset, index: int) -> Any:
    return dataset[index]["image"]


def _streamed_rows(dataset: datasets.IterableDataset) -> Iterator[Row]:
    for index, row in enumerate(dataset):
        yield Row(index, optional_text(row.get("id")), functools.partial(row.__getitem__, "image"))


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
    predictor: Predictor,
    dataset: AnyDataset,
    output_dir: str | Path,
    layout: OutputLayout | None = None,
    *,
    source: dict[str, Any] | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
) -> DatasetPrediction:
    """Write the label map of every image of a dataset; memory does not grow with the dataset.

    The rows are numbered, and each `rows_per_file` of them are a chunk. With several processes (`accelerate launch`)
    each takes every n-th chunk that is not there yet, and all together write what one would: windows are batched within
    a chunk only, so that its label maps depend on nothing else. A run that was interrupted is resumed by the same call,
    and its output is that of an undisturbed one.

    The folder gets `prediction.json`, which says what the label maps depend on, and the files of [`OutputLayout`]. Where the
    layout has a rule of confidence it also gets `label_set.json`, and with images it can be trained on as it is.

    Args:
        predictor ([`Predictor`]): The model and the protocol; viewers show the label maps in the colors of its label set.
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): As from `load_image_dataset`.
        output_dir (`str` or `Path`): A new or empty folder, or that of an interrupted run.
        layout ([`OutputLayout`], *optional*): How the label maps are stored.
        source (`dict`, *optional*): What `prediction.json` says besides: where the data come from.
        overwrite (`bool`, defaults to `False`): Whether to remove the label maps of an earlier run and start again. PNG
            files of a chunk that was not finished stay, unless they are written again.
        show_progress (`bool`, defaults to `True`): Whether the first process shows a progress bar.

    Returns:
        `DatasetPrediction`: What was done by all processes together, and the rows that could not be read, which have no
        label map.

    Raises:
        BlockingIOError: If another run writes to the folder.
        ValueError: If the dataset is empty, or the folder holds something else or label maps of other arguments.
    """
    layout = OutputLayout() if layout is None else layout
    state, folder = process_state(), Path(output_dir)
    with locked_directory(folder) if state.is_main_process else nullcontext(False) as alone:
        if state.is_main_process:
            stored = None if layout.confidence is None else pseudo_label_set(predictor.label_set)
            prepare_folder(folder, describe_run(predictor, layout, source or {}), overwrite, alone=alone)
            if stored is not None:
                stored.save(folder / LABEL_SET_FILE)
        return _predict_chunks(predictor, dataset, folder, layout, state, show_progress)


def _predict_chunks(
    predictor: Predictor,
    dataset: AnyDataset,
    folder: Path,
    layout: OutputLayout,
    state: PartialState,
    show_progress: bool,
) -> DatasetPrediction:
    state.wait_for_everyone()
    done = finished_chunks(folder, layout.split, layout.output_format)
    state.wait_for_everyone()  # all must see the same before one adds to it
    result = DatasetPrediction(num_processes=state.num_processes)
    started = time.perf_counter()
    thresholds = find_thresholds(predictor, dataset, folder, layout, show_progress)
    with tqdm(
        total=_share(dataset, layout.rows_per_file, done, state),
        desc="Labelling" if state.num_processes == 1 else f"Labelling (process 1 of {state.num_processes})",
        unit="image",
        disable=not (show_progress and state.is_main_process),
    ) as progress:
        for chunk, rows in own_chunks(dataset, layout, done, state):
            failures: list[dict[str, Any]] = []
            labelled = label_rows(predictor, rows, failures, progress, thresholds)
            result.num_images += layout.write_chunk(folder, chunk, dataset, labelled, failures)
            result.unreadable += failures
    if state.num_processes > 1:
        gathered = gather_object([(result.num_images, result.unreadable)])
        result.num_images = sum(count for count, _ in gathered)
        result.unreadable = [row for _, of_process in gathered for row in of_process]
    result.num_skipped = sum(len(finished.labelled) for finished in done.values())
    result.unreadable += [row for finished in done.values() for row in finished.unreadable]
    result.unreadable.sort(key=lambda row: row["index"])
    result.seconds = time.perf_counter() - started
    return result


def find_thresholds(
    predictor: Predictor, dataset: AnyDataset, folder: Path, layout: OutputLayout, show_progress: bool = True
) -> np.ndarray | None:
    """The least confidence of each class by the rule of the layout, the same in all processes.

    Where the rule looks at the whole dataset, all images are segmented for it, and the folder keeps what was found for a run
    that is resumed.

    Returns:
        `np.ndarray` of shape `(num_classes,)`, *optional*: The thresholds, where there is a rule.
    """
    if layout.confidence is None:
        return None
    state, num_classes = process_state(), predictor.label_set.num_labels
    counts = np.zeros((num_classes, NUM_BINS), np.int64)
    if layout.confidence.min_class_fraction is None:
        return layout.confidence.thresholds(counts)
    thresholds = read_thresholds(folder, num_classes)
    state.wait_for_everyone()
    if thresholds is not None:
        return thresholds
    with tqdm(desc="Measuring confidence", unit="image", disable=not (show_progress and state.is_main_process)) as bar:
        for _, rows in own_chunks(dataset, layout, {}, state):
            for result in _segment_rows(predictor, rows, True):
                bar.update()
                if result.error is None:  # the next pass says what is unreadable
                    count_confidences(counts, result)
    if state.num_processes > 1:
        counts = np.sum(gather_object([counts]), axis=0)
    thresholds = layout.confidence.thresholds(counts)
    if state.is_main_process:
        save_thresholds(folder, thresholds)
    return thresholds


def describe_run(predictor: Predictor, layout: OutputLayout, source: dict[str, Any]) -> dict[str, Any]:
    """What the label maps depend on: the content of `prediction.json`."""
    return {
        "model": predictor.model.name_or_path,
        "weights": weights_digest(predictor.model.name_or_path, predictor.config),
        **predictor.describe_network(),
        **source,
        "split": layout.split,
        "protocol": predictor.protocol.describe(predictor.processor),
        "labels": list(predictor.label_set.labels),
        **layout.describe(),
    }


def own_chunks(
    dataset: AnyDataset, layout: OutputLayout, done: dict[int, FinishedChunk], state: PartialState
) -> Iterator[tuple[int, Iterable[Row]]]:
    """The chunks that fall to this process and are not done: their number and their rows.

    Raises:
        ValueError: If the dataset has no rows at all, or other ones than those of the chunks that are done.
    """
    rows = numbered_rows(dataset)
    rows = rows if layout.output_format == "parquet" else named_rows(rows)
    turn, chunk, left = itertools.count(), None, dict(done)
    for chunk, of_chunk in itertools.groupby(rows, lambda row: row.index // layout.rows_per_file):
        finished = left.pop(chunk, None)
        if finished is not None:
            finished.check_rows(of_chunk)
        elif next(turn) % state.num_processes == state.process_index:
            yield chunk, of_chunk
    if chunk is None:
        raise ValueError("The split has no images: check the name of the dataset and of the split.")
    for finished in left.values():
        finished.check_rows([])


def _share(dataset: AnyDataset, rows_per_file: int, done: dict[int, Any], state: PartialState) -> int | None:
    """Rows that fall to this process, where the length of the dataset is known."""
    if not isinstance(dataset, datasets.Dataset):
        return None
    starts = [start for start in range(0, len(dataset), rows_per_file) if start // rows_per_file not in done]
    own = starts[state.process_index :: state.num_processes]
    return sum(min(rows_per_file, len(dataset) - start) for start in own)


def label_rows(
    predictor: Predictor,
    rows: Iterable[Row],
    failures: list[dict[str, Any]],
    progress: "tqdm[Any]",
    thresholds: np.ndarray | None = None,
) -> Iterator[tuple[Row, bytes, bytes]]:
    """Label rows one after the other.

    Args:
        predictor ([`Predictor`]): The model and the protocol.
        rows (`Iterable[Row]`): The rows.
        failures (`list[dict]`): Gets `index`, `id` and `reason` of the rows that cannot be read.
        progress (`tqdm`): Is told of each row.
        thresholds (`np.ndarray` of shape `(num_classes,)`, *optional*): Least confidence with which pixels of a class keep it;
            the others get the ignore index.

    Yields:
        `tuple[Row, bytes, bytes]`: A row, its encoded image, and its label map as a PNG file.
    """
    label_set = predictor.label_set if thresholds is None else pseudo_label_set(predictor.label_set)
    for result in _segment_rows(predictor, rows, thresholds is not None):
        row = result.key.row
        progress.update()
        if result.error is not None:
            failures.append({"index": row.index, "id": row.id, "reason": str(result.error)})
            continue
        buffer = io.BytesIO()
        class_map = result.known_class_map().cpu().numpy()
        if thresholds is not None:
            class_map = confident_classes(result, thresholds, label_set.ignore_index)
        label_map_image(class_map, label_set.palette).save(buffer, format="PNG")
        yield row, result.key.content, buffer.getvalue()


def _segment_rows(predictor: Predictor, rows: Iterable[Row], return_scores: bool) -> Iterator[Segmentation]:
    """The results of rows; their keys are [`EncodedRow`]."""
    limit, channels = predictor.protocol.max_image_pixels, predictor.processor.num_channels
    items = ((encoded := EncodedRow(row, limit, channels), encoded.decode) for row in rows)
    return predictor.stream(items, return_scores=return_scores, dtype=predictor.class_map_dtype)


class EncodedRow:
    """A row, and its encoded image once it was read.

    Args:
        row (`Row`): The row.
        max_image_pixels (`int`): An image with more pixels is not decoded.
        num_channels (`int`): Channels of the model, which the image must have.
    """

    def __init__(self, row: Row, max_image_pixels: int, num_channels: int) -> None:
        self.row, self.max_image_pixels, self.num_channels = row, max_image_pixels, num_channels
        self.content = b""

    def decode(self) -> Image.Image | np.ndarray:
        """Read the image.

        Raises:
            FileNotFoundError: If it is a file that is not there. Other `OSError` may pass by: the row may yet have an image.
            ValueError: If it is no image, has too many pixels, or other channels than the model.
        """
        encoded = self.row.encoded() or {"bytes": None, "path": None}
        self.content = encoded_bytes(encoded)
        name = f"row {self.row.index}" + (f" ({encoded['path']})" if encoded.get("path") else "")
        return decode_channels(io.BytesIO(self.content), name, self.num_channels, self.max_image_pixels)
