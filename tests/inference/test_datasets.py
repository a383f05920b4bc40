"""Label maps of whole datasets: shared by processes, continued after an interruption, read back."""

import io
import json
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from segmenter_hf.data.decoding import decode_example
from segmenter_hf.data.image_loading import load_image_dataset
from segmenter_hf.data.label_sets import load_label_set
from segmenter_hf.data.loading import load_segmentation_datasets
from segmenter_hf.inference import datasets as dataset_prediction
from segmenter_hf.inference.dataset_files import OutputLayout, Row
from segmenter_hf.inference.datasets import named_rows, predict_dataset
from segmenter_hf.inference.predictor import Predictor
from segmenter_hf.utils import http

from ..prediction import make_predictor, segment_images


ROOT = Path(__file__).parents[2]
SCENES = load_label_set("scenes")
LAYOUT_FIELDS = ("split", "output_format", "rows_per_file", "with_images")


def encoded(height: int, width: int, seed: int, **options) -> dict:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format="PNG", **options)
    return {"bytes": buffer.getvalue(), "path": None}


def images(num_images: int = 7) -> datasets.Dataset:
    """Pictures of differing sizes, encoded, with ids."""
    columns = {
        "image": [encoded(40 + 3 * index, 61 - 2 * index, index) for index in range(num_images)],
        "id": [f"street/{index}" for index in range(num_images)],
    }
    features = datasets.Features({"image": datasets.Image(decode=False), "id": datasets.Value("string")})
    return datasets.Dataset.from_dict(columns, features=features)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def predict(model, processor):
    """`predict_dataset` of seven pictures in chunks of three, unless told otherwise."""

    def predict(output_dir: Path, dataset=None, **options) -> dataset_prediction.DatasetPrediction:
        layout = {name: options.pop(name) for name in LAYOUT_FIELDS if name in options}
        arguments = {name: options.pop(name) for name in ("source", "overwrite") if name in options}
        return predict_dataset(
            Predictor(model, processor, SCENES, make_predictor(model, processor, **options).protocol),
            images() if dataset is None else dataset,
            output_dir,
            OutputLayout(**{"rows_per_file": 3, **layout}),
            show_progress=False,
            **arguments,
        )

    return predict


@pytest.fixture
def as_process(monkeypatch):
    """Makes this process the given one of several, without the others."""

    def as_process(index: int, num_processes: int) -> None:
        state = SimpleNamespace(
            process_index=index,
            num_processes=num_processes,
            is_main_process=index == 0,
            wait_for_everyone=lambda: None,
        )
        monkeypatch.setattr(dataset_prediction, "process_state", lambda: state)
        monkeypatch.setattr(dataset_prediction, "gather_object", lambda of_process: of_process)

    return as_process


# Loading


@pytest.mark.parametrize("streaming", [True, False])
def test_parquet_files_need_no_masks(tmp_path, streaming) -> None:
    images(3).rename_column("image", "photo").add_column("other", [1, 2, 3]).to_parquet(
        tmp_path / "test-00000.parquet"
    )
    dataset = load_image_dataset(str(tmp_path), "test", image_column="photo", streaming=streaming)
    assert isinstance(dataset, datasets.IterableDataset if streaming else datasets.Dataset)
    assert list(dataset) == list(images(3))
    assert list(load_image_dataset(str(tmp_path), "test", streaming=streaming)) == list(images(3))
    with pytest.raises(ValueError, match="no column 'image'.*'photo'.*`image_column`"):
        load_image_dataset(str(tmp_path), "test", image_column="image", streaming=streaming)
    with pytest.raises(ValueError, match="validation"):
        load_image_dataset(str(tmp_path), "validation", streaming=streaming)


@pytest.mark.parametrize(
    ("folder", "split", "ids"),
    [
        ("images/validation", "validation", ["a", "deep/b"]),
        ("validation/images", "validation", ["a", "deep/b"]),
        ("validation", "validation", ["a", "deep/b"]),
        ("images", "train", ["a", "deep/b"]),
        ("", "train", ["a", "deep/b"]),
    ],
)
def test_images_of_a_split_are_found_and_masks_beside_them_are_not(tmp_path, folder, split, ids) -> None:
    for name in ("a.png", "deep/b.png"):
        path = tmp_path / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(5, 7, 0)["bytes"])
    if folder:
        (tmp_path / "masks").mkdir()
        (tmp_path / "masks" / "a.png").touch()
    dataset = load_image_dataset(str(tmp_path), split)
    assert dataset["id"][:] == ids
    assert dataset[1]["image"] == {"bytes": None, "path": str(tmp_path / folder / "deep/b.png")}


def test_an_image_whose_name_is_no_text_is_named(tmp_path) -> None:
    (tmp_path / "\udcff.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"file names in UTF-8, got 1 others: .*udcff.png"):
        load_image_dataset(str(tmp_path))


def test_a_data_set_that_is_not_there_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_image_dataset(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"no split 'test'.*images.test"):
        load_image_dataset(str(tmp_path), "test")
    with pytest.raises(OSError, match="'someone/streets' is no local folder"):
        load_image_dataset("someone/streets")


def test_names_of_files_stay_in_the_folder_and_differ() -> None:
    ids = ["../a b", "__a_b", "..hidden", "", "a", "A", "a", None, "é" * 300, "\0/\n"]
    names = [row.name for row in named_rows(Row(index, id, dict) for index, id in enumerate(ids))]
    assert names[:8] == ["_a_b", "__a_b", "hidden", "_", "a", "A+2", "a+3", "00000007"]
    assert len(names[8].encode()) <= 180
    assert names[9] == "___"
    assert len({name.casefold() for name in names}) == len(names)


# Labelling


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("multi_scale_flip", [True, False])
def test_parquet_files_hold_the_label_map_of_each_row(
    predict, model, processor, tmp_path, streaming, multi_scale_flip
) -> None:
    dataset = images().to_iterable_dataset() if streaming else images()
    result = predict(tmp_path, dataset, multi_scale_flip=multi_scale_flip)
    assert (result.num_images, result.num_skipped, result.unreadable) == (7, 0, [])
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "prediction.json",
        "train-00000.parquet",
        "train-00001.parquet",
        "train-00002.parquet",
    ]
    rows = datasets.load_dataset("parquet", data_files=str(tmp_path / "*.parquet"), split="train")
    assert rows.column_names == ["index", "id", "label_map"]
    assert rows["index"][:] == list(range(7))
    assert rows["id"][:] == images()["id"][:]
    pictures = [Image.open(io.BytesIO(row["image"]["bytes"])) for row in images()]
    expected = segment_images(model, processor, pictures, multi_scale_flip=multi_scale_flip)
    for row, wanted in zip(rows, expected, strict=True):
        assert np.array_equal(np.asarray(row["label_map"]), wanted.numpy())


def test_png_files_and_parquet_files_agree(predict, tmp_path) -> None:
    predict(tmp_path / "parquet")
    predict(tmp_path / "png", output_format="png")
    rows = datasets.load_dataset("parquet", data_dir=str(tmp_path / "parquet"), split="train")
    rows = rows.cast_column("label_map", datasets.Image(decode=False))
    for row in rows:
        assert (tmp_path / "png" / f"street_{row['index']}.png").read_bytes() == row["label_map"]["bytes"]
    assert len(list((tmp_path / "png").glob("*.png"))) == len(rows) == 7
    chunk = json.loads((tmp_path / "png" / "train-00002.json").read_text())
    assert chunk == {"rows": [{"index": 6, "id": "street/6", "label_map": "street_6.png"}], "unreadable": []}


def test_rows_without_ids_are_named_by_their_place(predict, tmp_path) -> None:
    predict(tmp_path / "png", images().remove_columns("id"), output_format="png")
    assert {file.stem for file in (tmp_path / "png").glob("*.png")} == {f"{index:08d}" for index in range(7)}
    predict(tmp_path / "parquet", images().remove_columns("id"))
    rows = datasets.load_dataset("parquet", data_dir=str(tmp_path / "parquet"), split="train")
    assert rows.column_names == ["index", "label_map"]


def test_label_maps_with_their_images_are_a_data_set_to_train_on(predict, tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = {"image": encoded(48, 64, 0, exif=exif), "id": None}
    dataset = datasets.Dataset.from_list([turned, *images(2)], features=images().features)
    predict(tmp_path / "validation", dataset, split="validation", with_images=True)
    found = load_segmentation_datasets(str(tmp_path / "validation"), splits=["validation"], label_column="label_map")[
        "validation"
    ]
    predict(tmp_path / "png", dataset, output_format="png")
    names = ["00000000", "street_0", "street_1"]
    for row, given, name in zip(found, dataset, names, strict=True):
        assert row["image"]["bytes"] == given["image"]["bytes"]
        image, labels = decode_example(row, SCENES)
        assert image.shape[:2] == labels.shape
        assert np.array_equal(labels, np.asarray(Image.open(tmp_path / "png" / f"{name}.png")))
    assert decode_example(found[0])[1].shape == (64, 48)


# Processes


@pytest.mark.parametrize("output_format", ["parquet", "png"])
@pytest.mark.parametrize("num_processes", [2, 3, 5])
def test_processes_share_the_rows_and_write_what_one_does(
    predict, as_process, tmp_path, output_format, num_processes
) -> None:
    predict(tmp_path / "one", output_format=output_format)
    shares = []
    for index in range(num_processes):
        as_process(index, num_processes)
        folder = tmp_path / str(index)  # one each: none sees what the others wrote, as if all had begun together
        folder.mkdir()
        predict(folder, output_format=output_format)
        shares.append(contents(folder))
    union = {name: content for share in shares for name, content in share.items()}
    assert union == contents(tmp_path / "one")
    assert sum(len(share) for share in shares) == len(union)


def test_what_is_left_is_shared_evenly(predict, as_process, tmp_path) -> None:
    predict(tmp_path, rows_per_file=1)
    for chunk in (1, 3, 5):  # all of one process, had it died
        (tmp_path / f"train-{chunk:05d}.parquet").unlink()
    before = contents(tmp_path)
    as_process(0, 3)
    result = predict(tmp_path, rows_per_file=1)
    assert (result.num_images, result.num_skipped) == (1, 4)
    assert contents(tmp_path).keys() - before.keys() == {"train-00001.parquet"}


def run_script(monkeypatch, arguments: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["predict.py", *arguments])
    runpy.run_path(str(ROOT / "scripts" / "predict.py"))["main"]()


def test_two_real_processes_write_what_one_does(model, processor, tmp_path, monkeypatch, capsys) -> None:
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    images().to_parquet(tmp_path / "data" / "train-00000.parquet")
    arguments = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "data")]
    arguments += ["--rows_per_file", "2", "--device", "cpu", "--output_dir"]
    run_script(monkeypatch, [*arguments, str(tmp_path / "one")])
    assert "Labelled 7 images" in capsys.readouterr().out
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    processes = [  # what torchrun starts
        subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / "predict.py"), *arguments, str(tmp_path / "two")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    (printed, errors), (nothing, other_errors) = (process.communicate(timeout=300) for process in processes)
    assert [process.returncode for process in processes] == [0, 0], errors + other_errors
    assert "Labelled 7 images" in printed and "with 2 processes" in printed
    assert not nothing
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    run_script(monkeypatch, [*arguments, str(tmp_path / "two")])
    assert "Skipped 7 that were there" in capsys.readouterr().out


def test_the_script_takes_images_or_a_dataset(monkeypatch, capsys) -> None:
    required = ["--model_name_or_path", "model", "--output_dir", "out"]
    for arguments, message in (
        (["--images", "a.png", "--dataset_name", "scenes"], "--images or --dataset_name"),
        (["--dataset_name", "scenes", "--attention"], "--attention is for --images"),
    ):
        with pytest.raises(SystemExit):
            run_script(monkeypatch, required + arguments)
        assert message in capsys.readouterr().err


# Continuing


@pytest.mark.parametrize("output_format", ["parquet", "png"])
@pytest.mark.parametrize("streaming", [True, False])
def test_an_interrupted_run_is_continued_to_the_same_bytes(
    predict, tmp_path, monkeypatch, output_format, streaming
) -> None:
    dataset = images().to_iterable_dataset() if streaming else images()
    predict(tmp_path / "undisturbed", output_format=output_format)
    drawn, draw = [], dataset_prediction.label_map_image

    def draw_five(*args):
        drawn.append(args)
        if len(drawn) > 5:
            raise KeyboardInterrupt
        return draw(*args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(dataset_prediction, "label_map_image", draw_five)
        predict(tmp_path / "out", dataset, output_format=output_format)
    left = contents(tmp_path / "out")
    assert {name for name in left if name.startswith("train")} == {f"train-00000.{output_format}"} or (
        output_format == "png" and "train-00000.json" in left and "train-00001.json" not in left
    )
    # What a process that is killed leaves behind.
    (tmp_path / "out" / f".train-00001-{'0' * 32}.parquet").write_bytes(b"half")
    (tmp_path / "out" / f".street_3-{'0' * 32}.png").write_bytes(b"half")
    result = predict(tmp_path / "out", dataset, output_format=output_format)
    assert (result.num_images, result.num_skipped) == (4, 3)
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_a_png_that_is_gone_is_made_again(predict, tmp_path) -> None:
    predict(tmp_path, output_format="png")
    before = contents(tmp_path)
    (tmp_path / "street_4.png").unlink()
    assert predict(tmp_path, output_format="png").num_skipped == 4
    assert contents(tmp_path) == before


@pytest.mark.parametrize("streaming", [True, False])
def test_images_of_chunks_that_are_there_are_not_read(predict, tmp_path, streaming) -> None:
    for index, row in enumerate(images()):
        (tmp_path / f"{index}.png").write_bytes(row["image"]["bytes"])
    dataset = load_image_dataset(str(tmp_path))
    dataset = dataset.to_iterable_dataset() if streaming else dataset
    predict(tmp_path / "out", dataset)
    (tmp_path / "0.png").unlink()
    (tmp_path / "out" / "train-00001.parquet").unlink()
    result = predict(tmp_path / "out", dataset)
    assert (result.num_images, result.num_skipped, result.unreadable) == (3, 4, [])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rows_per_file": 4}, "rows_per_file: 3 there, 4 here"),
        ({"output_format": "png"}, "format: 'parquet' there, 'png' here"),
        ({"split": "test"}, "split: 'train' there, 'test' here"),
        ({"multi_scale_flip": True}, "protocol: "),
        ({"full_resolution": True}, "protocol: "),
        ({"with_images": True}, "with_images: False there"),
        ({"source": {"dataset": "a", "revision": "2"}}, "revision: '1' there, '2' here"),
    ],
)
def test_label_maps_of_other_arguments_are_not_mixed(predict, tmp_path, options, named) -> None:
    source = {"dataset": "a", "revision": "1"}
    predict(tmp_path / "out", images(4), source=source)
    before = contents(tmp_path / "out")
    options = {"source": source, **options}
    with pytest.raises(ValueError, match=f"another run:\n  {named}(.|\n)*`overwrite`"):
        predict(tmp_path / "out", images(4), **options)
    assert contents(tmp_path / "out") == before
    predict(tmp_path / "out", images(4), overwrite=True, **options)
    predict(tmp_path / "fresh", images(4), **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("output_format", ["parquet", "png"])
@pytest.mark.parametrize("streaming", [True, False])
def test_label_maps_of_other_images_are_not_mixed(predict, tmp_path, output_format, streaming) -> None:
    predict(tmp_path, images(4), output_format=output_format)
    before = contents(tmp_path)
    for rows in ([0, 1, 2, 3, 0], [0, 1, 2], [1, 0, 2, 3]):
        changed = images(4).select(rows)
        with pytest.raises(ValueError, match=r"train-0000\d.* the dataset was changed since.*`overwrite`"):
            predict(tmp_path, changed.to_iterable_dataset() if streaming else changed, output_format=output_format)
        assert contents(tmp_path) == before


def test_label_maps_of_other_weights_are_not_mixed(predict, model, tmp_path, monkeypatch) -> None:
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(model, "name_or_path", str(tmp_path / "model"))
    predict(tmp_path / "out", images(4))
    assert predict(tmp_path / "out", images(4)).num_skipped == 4
    weights = bytearray((tmp_path / "model" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model" / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match="another run:\n  weights: "):
        predict(tmp_path / "out", images(4))


def test_a_folder_of_something_else_is_left_alone(predict, tmp_path) -> None:
    (tmp_path / "train-00000.parquet").write_bytes(b"mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="new or empty folder"):
            predict(tmp_path, overwrite=overwrite)
    assert contents(tmp_path) == {"train-00000.parquet": b"mine"}


def test_only_what_the_run_wrote_is_overwritten(predict, tmp_path) -> None:
    predict(tmp_path / "out", output_format="png")
    strangers = {
        "mine.png": b"1",
        "mine.json": b"2",
        "mine.parquet": b"3",
        "train-1.json": b"4",
        "test-00000.json": b"5",
    }
    for name, content in strangers.items():
        (tmp_path / "out" / name).write_bytes(content)
    predict(tmp_path / "out", overwrite=True)
    predict(tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh") | strangers


DEEP = "[" * 100_000


@pytest.mark.parametrize("content", ["[1]", "5", "null", "{}", "no JSON", DEEP])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_record_of_something_else_is_named_and_left_alone(predict, tmp_path, content, overwrite) -> None:
    (tmp_path / "prediction.json").write_text(content)
    (tmp_path / "train-00000.parquet").write_bytes(b"mine")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"prediction\.json: expected the record of an earlier run"):
        predict(tmp_path, overwrite=overwrite)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", "no JSON", DEEP, '{"rows": 5, "unreadable": []}', '{"rows": [{"label_map": 5}], "unreadable": []}']
    + [
        '{"rows": [{"label_map": "../a.png"}], "unreadable": []}',
        '{"rows": [{"label_map": "a.txt"}], "unreadable": []}',
        '{"rows": [], "unreadable": [{"id": 5}]}',
        None,
    ],
)
def test_a_chunk_of_something_else_is_named(predict, tmp_path, content) -> None:
    output_format, suffix = ("parquet", "parquet") if content is None else ("png", "json")
    predict(tmp_path, output_format=output_format)
    path = tmp_path / f"train-00001.{suffix}"
    if content is None:
        images(2).to_parquet(path)  # without the unreadable rows in its metadata
    else:
        path.write_text(content)
    with pytest.raises(ValueError, match=rf"{path.name}: expected a chunk of label maps.*Delete it"):
        predict(tmp_path, output_format=output_format)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows_per_file": 0}, "rows_per_file.*at least 1"),
        ({"output_format": "jpeg"}, "'parquet' or 'png', got 'jpeg'"),
        ({"output_format": "png", "with_images": True}, "with_images"),
        ({"split": "../train"}, "split"),
    ],
)
def test_impossible_arguments_are_refused_before_anything_is_written(predict, tmp_path, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        predict(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_data_set_without_rows_is_refused(predict, tmp_path) -> None:
    with pytest.raises(ValueError, match="no images"):
        predict(tmp_path, images(1).select([]))


# Unreadable rows


def damaged_images() -> datasets.Dataset:
    """Nine rows of which 1 is cut off, 3 to 5 have no image, a file that is gone, and too many pixels."""
    rows = list(images(9))
    rows[1]["image"]["bytes"] = rows[1]["image"]["bytes"][:200]
    rows[3]["image"] = None
    rows[4]["image"] = {"bytes": None, "path": "/nowhere.png"}
    rows[5]["image"] = encoded(101, 100, 0)
    return datasets.Dataset.from_list(rows, features=images().features)


@pytest.mark.parametrize("output_format", ["parquet", "png"])
@pytest.mark.parametrize("streaming", [True, False])
def test_unreadable_rows_are_left_out_and_named_each_time(predict, tmp_path, output_format, streaming) -> None:
    dataset = damaged_images().to_iterable_dataset() if streaming else damaged_images()
    options = {"output_format": output_format, "max_image_pixels": 10000}
    result = predict(tmp_path, dataset, **options)
    assert result.num_images == 5
    assert [(row["index"], row["id"]) for row in result.unreadable] == [(i, f"street/{i}") for i in (1, 3, 4, 5)]
    with pytest.raises(ValueError, match="4 of 9 images cannot be read, the others are done") as caught:
        result.raise_if_unreadable()
    for text in (r"row 1 (street/1): ", "row 3 (street/3): the row has no image", "nowhere.png", "10100|100 x 101"):
        assert any(option in str(caught.value) for option in text.split("|"))
    if output_format == "png":
        assert {file.stem for file in tmp_path.glob("*.png")} == {f"street_{index}" for index in (0, 2, 6, 7, 8)}
    else:
        rows = datasets.load_dataset("parquet", data_dir=str(tmp_path), split="train")
        assert rows["index"][:] == [0, 2, 6, 7, 8]
    again = predict(tmp_path, dataset, **options)
    assert (again.num_images, again.num_skipped, again.unreadable) == (0, 5, result.unreadable)


@pytest.mark.parametrize("streaming", [True, False])
def test_only_the_rows_that_lead_elsewhere_or_to_no_file_are_unreadable(predict, tmp_path, streaming) -> None:
    (tmp_path / "data" / "folder.png").mkdir(parents=True)
    os.mkfifo(tmp_path / "data" / "pipe.png")
    for folder in ("data", "other"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "a.png").write_bytes(images(1)[0]["image"]["bytes"])
    paths = [f"{tmp_path}/data/a.png", *(f"{tmp_path}/data/{name}.png" for name in ("folder", "pipe", "missing"))]
    paths += [f"{tmp_path}/other/a.png", "simplecache::http://127.0.0.1:9/a", "ftp::x", "s3://a/b"]
    paths += [f"tar://x::{tmp_path}/data/a.png", "hf://datasets/a/b/c.png", "a\0b", ""]
    rows = [{"image": {"bytes": None, "path": path}, "id": None} for path in paths] + list(images(1))
    table = datasets.Dataset.from_list(rows, features=images().features).data.table
    pq.write_table(table, tmp_path / "data" / "train-00000.parquet")
    dataset = load_image_dataset(str(tmp_path / "data"), streaming=streaming)
    result = predict(tmp_path / "out", dataset, with_images=True)
    assert result.num_images == 2
    assert [row["index"] for row in result.unreadable] == list(range(1, len(paths)))


def test_images_that_are_no_files_are_unreadable(predict, tmp_path) -> None:
    (tmp_path / "data" / "b.png").mkdir(parents=True)
    os.mkfifo(tmp_path / "data" / "c.png")
    (tmp_path / "data" / "a.png").write_bytes(images(1)[0]["image"]["bytes"])
    result = predict(tmp_path / "out", load_image_dataset(str(tmp_path / "data")))
    assert result.num_images == 1 and [row["id"] for row in result.unreadable] == ["c"]  # folders are no pictures


class FailingHub:
    """The Hub's file system, whose answers fail until they are used up."""

    def __init__(self, failures: list[Exception]) -> None:
        self.failures = failures

    def open(self, address: str, mode: str) -> io.BytesIO:
        if self.failures:
            raise self.failures.pop(0)
        return io.BytesIO(images(1)[0]["image"]["bytes"])


def answer_error(status: int) -> Exception:
    """What the client of the Hub raises for an answer."""
    request = http.http_client.Request("GET", "https://hub.test/a.png")
    response = http.http_client.Response(status, request=request)
    return http.http_client.HTTPStatusError(f"{status} for url", request=request, response=response)


@pytest.fixture
def on_the_hub(monkeypatch):
    """A dataset of one image on the Hub, which fails in these ways first; nobody waits in between."""

    def on_the_hub(*failures: Exception) -> datasets.Dataset:
        monkeypatch.setattr(http.time, "sleep", lambda seconds: None)
        monkeypatch.setattr("segmenter_hf.data.encoded_images.fsspec.open", FailingHub(list(failures)).open)
        rows = [{"image": {"bytes": None, "path": "hf://datasets/someone/streets/a.png"}, "id": "a"}]
        return datasets.Dataset.from_list(rows, features=images().features)

    return on_the_hub


TRANSIENT = [
    TimeoutError("no answer"),
    http.http_client.ReadTimeout("no answer"),
    answer_error(503),
    answer_error(429),
]


def test_a_second_run_leaves_the_files_of_the_first_alone(predict, tmp_path) -> None:
    written = f".train-00000-partial-{32 * 'a'}.parquet"

    def rows_during_a_second_run() -> Iterator[dict]:
        (tmp_path / written).write_text("being written")
        with pytest.raises(BlockingIOError, match="another run is writing to"):
            predict(tmp_path)
        assert (tmp_path / written).is_file()
        yield from images()

    stream = datasets.IterableDataset.from_generator(rows_during_a_second_run, features=images().features)
    assert predict(tmp_path, stream).num_images == 7
    predict(tmp_path)  # a later one removes what a killed run has left
    assert not (tmp_path / written).exists()


def test_an_image_that_is_fetched_in_the_end_has_its_label_map(predict, tmp_path, on_the_hub) -> None:
    result = predict(tmp_path, on_the_hub(*TRANSIENT))
    assert (result.num_images, result.unreadable) == (1, [])


@pytest.mark.parametrize("error", TRANSIENT)
def test_an_image_that_cannot_be_fetched_now_stops_the_run(predict, tmp_path, on_the_hub, error) -> None:
    dataset = on_the_hub(*(5 * [error]))
    with pytest.raises(ConnectionError, match=r"a\.png could not be read in 5 attempts.*run the same again"):
        predict(tmp_path, dataset)
    assert [file.name for file in tmp_path.iterdir()] == ["prediction.json"]
    assert predict(tmp_path, dataset).num_images == 1  # the Hub is back


def test_an_image_that_the_hub_lacks_is_a_gap(predict, tmp_path, on_the_hub) -> None:
    assert [row["id"] for row in predict(tmp_path, on_the_hub(answer_error(404))).unreadable] == ["a"]


def test_images_that_the_hub_does_not_give_to_this_user_stop_the_run(predict, tmp_path, on_the_hub) -> None:
    with pytest.raises(PermissionError, match="hf auth login"):
        predict(tmp_path, on_the_hub(answer_error(401)))


def test_the_summary_says_how_fast_and_what_was_skipped() -> None:
    result = dataset_prediction.DatasetPrediction(num_images=30, num_skipped=5, seconds=4.0, num_processes=2)
    assert result.describe() == (
        "Labelled 30 images in 4.0 s with 2 processes: 7.50 images/s. Skipped 5 that were there."
    )
    assert dataset_prediction.DatasetPrediction().describe() == (
        "Labelled 0 images in 0.0 s with 1 process: 0.00 images/s."
    )
