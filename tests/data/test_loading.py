"""Loading, decoding and checking of datasets of images and masks."""

import io
import itertools
import logging
import struct
import zipfile
import zlib
from pathlib import Path
from unittest.mock import Mock

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from segmenter_hf.data.decoding import decode_example
from segmenter_hf.data.encoded_images import encoded_bytes
from segmenter_hf.data.image_loading import load_image_dataset
from segmenter_hf.data.label_sets import LabelSet, label_set_from_names, load_label_set
from segmenter_hf.data.loading import load_segmentation_datasets, load_split, split_train_validation
from segmenter_hf.data.mask_checks import check_masks, infer_num_labels
from segmenter_hf.models.image_io import read_image
from segmenter_hf.training.datasets import StreamedTrainDataset, TrainDataset

from . import formats


CAMVID = Path(__file__).parents[3] / "shared" / "data" / "camvid"
HEIGHT, WIDTH = 6, 9


def image_array(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def mask_array(seed: int = 0, num_labels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, num_labels, (HEIGHT, WIDTH), dtype=np.uint8)


def png(color_type: int, depth: int, rows: bytes, width: int, height: int) -> bytes:
    """A PNG of any depth, which Pillow does not write."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_masks_of_other_depths_are_what_they_store_or_refused() -> None:
    image = encoded(np.zeros((1, 4, 3), np.uint8))
    for depth, row in ((2, b"\0\x1b"), (4, b"\0\x01\x23")):
        mask = {"bytes": png(0, depth, row, 4, 1), "path": None}
        _, ids = decode_example({"image": image, "annotation": mask})
        assert ids.tolist() == [[0, 1, 2, 3]]
    deep = {"bytes": png(2, 16, b"\0" + bytes([0, 1] * 12), 4, 1), "path": "deep.png"}
    with pytest.raises(ValueError, match=r"deep.png: .*16 bits in several channels"):
        decode_example({"image": image, "annotation": deep})


def test_a_saved_dataset_keeps_splits_that_have_names_of_ours(tmp_path) -> None:
    scenes = load_split("scenes", "validation", max_samples=3)
    parts = {"train": scenes, "validation": scenes.select([0, 1]), "val": scenes.select([0])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    found = load_segmentation_datasets(str(tmp_path / "saved"), splits=["train", "validation"])
    assert [len(found[split]) for split in ("train", "validation")] == [3, 2]


def encoded(picture: np.ndarray | Image.Image, format: str = "PNG", **options) -> dict:
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    buffer = io.BytesIO()
    picture.save(buffer, format=format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def example(mask: np.ndarray | Image.Image, image: np.ndarray | None = None) -> dict:
    return {"image": encoded(image_array() if image is None else image), "annotation": encoded(mask)}


def dataset_of(masks: list) -> datasets.Dataset:
    rows = [example(mask) | {"id": f"street {i}"} for i, mask in enumerate(masks)]
    image = datasets.Image(decode=False)
    features = datasets.Features({"image": image, "annotation": image, "id": datasets.Value("string")})
    return datasets.Dataset.from_list(rows, features=features)


def save(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def save_pairs(images: Path, masks: Path, stems: list[str]) -> None:
    for seed, stem in enumerate(stems):
        save(images / f"{stem}.jpg", image_array(seed))
        save(masks / f"{stem}.png", mask_array(seed))


def assert_holds_pairs(dataset: datasets.Dataset, stems: list[str]) -> None:
    rows = list(dataset)
    assert [row["id"] for row in rows] == stems
    for seed, row in enumerate(rows):
        image, mask = decode_example(row)
        assert image.shape == (HEIGHT, WIDTH, 3)
        assert np.array_equal(mask, mask_array(seed))


# Sources


def test_scenes_are_the_default_and_their_splits_share_no_scene():
    found = load_segmentation_datasets(scenes_size=(32, 48), scenes_train=3, scenes_validation=2, seed=1)
    assert {split: len(dataset) for split, dataset in found.items()} == {"train": 3, "validation": 2}
    assert not set(found["train"]["id"]) & set(found["validation"]["id"])
    image, mask = decode_example(found["train"][0], load_label_set("scenes"))
    assert image.shape == (32, 48, 3) and mask.shape == (32, 48) and mask.max() < 8
    again = load_segmentation_datasets("scenes", splits=["train"], scenes_size=(32, 48), scenes_train=1, seed=2)
    assert not set(again["train"]["id"]) & (set(found["train"]["id"]) | set(found["validation"]["id"]))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("folder", ["", "data"])
def test_parquet_files_are_read_like_on_the_hub(tmp_path, folder, streaming):
    (tmp_path / folder).mkdir(exist_ok=True)
    for split, seeds in (("train", (0, 1)), ("validation", (0,))):
        rows = dataset_of([mask_array(seed) for seed in seeds])
        rows = rows.cast_column("image", datasets.Image()).cast_column("annotation", datasets.Image())
        rows = rows.rename_columns({"annotation": "label"}).add_column("scene_category", ["x"] * len(seeds))
        rows.to_parquet(tmp_path / folder / f"{split}-00000-of-00001.parquet")
    found = load_segmentation_datasets(str(tmp_path), label_column="label", streaming=streaming)
    assert isinstance(found["train"], datasets.IterableDataset if streaming else datasets.Dataset)
    assert_holds_pairs(found["train"], ["street 0", "street 1"])
    assert_holds_pairs(found["validation"], ["street 0"])
    assert set(next(iter(found["train"]))) == {"image", "annotation", "id"}


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_files_of_one_split_are_read_once(tmp_path, streaming, caplog):
    folder = tmp_path / "br [v2]"
    (folder / "data").mkdir(parents=True)
    dataset_of([mask_array()]).to_parquet(folder / "train.parquet")
    dataset_of([mask_array(0), mask_array(1)]).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    found = load_segmentation_datasets(str(folder), splits=["train"], streaming=streaming)["train"]
    assert len(list(found)) == len(list(load_image_dataset(str(folder), streaming=streaming))) == 2
    dataset_of([mask_array()]).to_parquet(folder / "data" / "training.parquet")
    again = load_segmentation_datasets(str(folder), splits=["train"], streaming=streaming)["train"]
    assert len(list(again)) == 2 and "train is read as the split, and training left out" in caplog.text


def test_a_readme_says_what_the_splits_of_a_folder_are(tmp_path):
    for name, seeds in (("data/train-0", (0,)), ("other/train-0", (0, 1))):
        (tmp_path / name).parent.mkdir()
        dataset_of([mask_array(seed) for seed in seeds]).to_parquet(tmp_path / f"{name}.parquet")
    configs = "".join(
        f"- config_name: {name}\n  data_files: {folder}/*\n" for name, folder in (("a", "data"), ("b", "other"))
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for streaming in (True, False):
        assert len(list(load_image_dataset(str(tmp_path), dataset_config="b", streaming=streaming))) == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_files_of_plain_bytes_and_of_any_split_are_predicted(tmp_path, streaming):
    content = encoded(image_array())["bytes"]
    pq.write_table(pa.table({"image": [content]}), tmp_path / "trainval.parquet")
    (row,) = load_image_dataset(str(tmp_path), "trainval", streaming=streaming)
    assert row["image"] == {"bytes": content, "path": None}


def test_parquet_files_that_differ_are_refused_in_words(tmp_path):
    dataset_of([mask_array()]).to_parquet(tmp_path / "train-0.parquet")
    pq.write_table(pa.table({"image": [1], "annotation": [2]}), tmp_path / "train-1.parquet")
    with pytest.raises(ValueError, match="the parquet files of 'train' cannot be read as one"):
        load_segmentation_datasets(str(tmp_path), splits=["train"])


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_name_files_from_the_folder_of_the_dataset(tmp_path, streaming, monkeypatch):
    save(tmp_path / "images" / "a.png", image_array())
    feature = datasets.Features({"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})
    rows = [{"image": {"bytes": None, "path": "images/a.png"}}]
    datasets.Dataset.from_list(rows, features=feature).to_parquet(tmp_path / "train.parquet")
    save(tmp_path / "elsewhere" / "images" / "a.png", image_array(1))
    monkeypatch.chdir(tmp_path / "elsewhere")
    expected = (tmp_path / "images" / "a.png").read_bytes()
    (row,) = load_image_dataset(str(tmp_path), streaming=streaming)
    assert encoded_bytes(row["image"]) == expected
    pq.write_table(pa.table({"image": ["images/a.png"]}), tmp_path / "train.parquet")
    (row,) = load_image_dataset(str(tmp_path), image_column="image", streaming=streaming)
    assert encoded_bytes(row["image"]) == expected


def test_a_folder_may_be_streamed(tmp_path):
    save_pairs(tmp_path / "images", tmp_path / "masks", ["a", "b"])
    found = load_segmentation_datasets(str(tmp_path), splits=["train"], streaming=True)
    assert isinstance(found["train"], datasets.IterableDataset)
    assert_holds_pairs(found["train"], ["a", "b"])


@pytest.mark.parametrize("num_rows", [None, 5])
@pytest.mark.parametrize("file_sizes", [[6], [1, 6], [2, 3, 2]])
@pytest.mark.parametrize("num_workers", [0, 2, 3])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_visit_every_row_of_a_stream_once(tmp_path, monkeypatch, num_workers, file_sizes, num_rows):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)  # 5 s after each epoch
    rows = dataset_of([mask_array(seed) for seed in range(sum(file_sizes))])
    for number, (size, end) in enumerate(zip(file_sizes, np.cumsum(file_sizes))):
        rows.select(range(end - size, end)).to_parquet(tmp_path / f"train-{number:05d}.parquet")
    stream = load_segmentation_datasets(str(tmp_path), splits=["train"], streaming=True)["train"]
    stream = stream if num_rows is None else stream.take(num_rows)
    expected = [row["id"] for row in stream]
    assert expected == rows["id"][:num_rows]

    examples = Mock(spec=TrainDataset, dataset=stream, seed=0)
    examples.crop = lambda row, *numbers: (row["id"], numbers)
    loader = DataLoader(
        StreamedTrainDataset(examples, share_files=num_rows is None), batch_size=None, num_workers=num_workers
    )
    # Workers end their shares at different times: with one, the first visit is over before the second begins.
    visits = {}
    for row, numbers in itertools.islice(loader, 4 * len(expected) * max(1, num_workers)):
        visits.setdefault(numbers[0], []).append((row, tuple(numbers)))
    for visit in (0, 1):
        assert sorted(row for row, _ in visits[visit]) == sorted(expected)
        assert len({numbers for _, numbers in visits[visit]}) == len(expected)
    assert [row for row, _ in visits[0]] != [row for row, _ in visits[1]]


def test_a_missing_column_is_named_with_those_present_and_the_arguments(tmp_path):
    dataset_of([mask_array()]).to_parquet(tmp_path / "train-00000.parquet")
    with pytest.raises(
        ValueError, match="'segmentation'.*'image', 'annotation', 'id'.*`image_column` and `label_column`"
    ):
        load_segmentation_datasets(str(tmp_path), splits=["train"], label_column="segmentation")


def test_the_splits_of_the_scenes_are_named():
    with pytest.raises(ValueError, match=r"scenes has no split \['test'\], only \['train', 'validation'\]"):
        load_segmentation_datasets("scenes", splits=["test"])


@pytest.mark.parametrize("number", [0, -1])
def test_at_least_one_image_is_kept(number):
    with pytest.raises(ValueError, match=f"at least 1 image, got {number}"):
        load_split("scenes", "validation", max_samples=number)


def test_a_missing_validation_split_is_an_error_unless_a_fraction_is_given(tmp_path, caplog):
    save_pairs(tmp_path / "images", tmp_path / "masks", [f"{i:02d}" for i in range(10)])
    with pytest.raises(ValueError, match="no split .'validation'., only .'train'.*validation_fraction"):
        load_segmentation_datasets(str(tmp_path))
    with caplog.at_level(logging.WARNING, logger="segmenter_hf.data.loading"):
        found = load_segmentation_datasets(str(tmp_path), validation_fraction=0.2, seed=3)
    assert "2 of the 10" in caplog.text
    ids = found["train"]["id"][:] + found["validation"]["id"][:]
    assert len(found["validation"]) == 2 and sorted(ids) == [f"{i:02d}" for i in range(10)]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_that_is_loaded_alone_is_that_of_the_pair(tmp_path, split):
    save_pairs(tmp_path / "images", tmp_path / "masks", [f"{i:02d}" for i in range(10)])
    pair = load_segmentation_datasets(str(tmp_path), validation_fraction=0.2, seed=3)
    (alone,) = load_segmentation_datasets(str(tmp_path), splits=[split], validation_fraction=0.2, seed=3).values()
    assert alone["id"][:] == pair[split]["id"][:]
    (whole,) = load_segmentation_datasets(str(tmp_path), splits=["train"], validation_fraction=0.0).values()
    assert len(whole) == 10


def test_no_part_of_train_is_split_off_where_there_is_a_validation_split(tmp_path):
    for split, names in (("train", ["a", "b", "c"]), ("val", ["d"])):
        save_pairs(tmp_path / "images" / split, tmp_path / "masks" / split, names)
    (train,) = load_segmentation_datasets(str(tmp_path), splits=["train"], validation_fraction=0.4).values()
    assert train["id"][:] == ["a", "b", "c"]
    (scenes,) = load_segmentation_datasets(splits=["train"], scenes_train=4, validation_fraction=0.5).values()
    assert len(scenes) == 4


def test_a_stream_cannot_be_split(tmp_path):
    formats.rows("train", "mask").to_parquet(tmp_path / "train.parquet")
    for splits in (["train"], ["validation"]):
        with pytest.raises(ValueError, match="known length: load it without `streaming`"):
            load_segmentation_datasets(str(tmp_path), splits=splits, validation_fraction=0.4, streaming=True)


def test_a_split_depends_on_its_seed_alone():
    rows = datasets.Dataset.from_dict({"id": list(range(20))})
    first, second, other = (split_train_validation(rows, 0.25, seed)[1]["id"][:] for seed in (0, 0, 1))
    assert first == second != other
    assert len(split_train_validation(rows, 0.001)[1]) == 1
    with pytest.raises(ValueError, match="fraction in"):
        split_train_validation(rows, 1.0)
    with pytest.raises(ValueError, match="at least 2 examples"):
        split_train_validation(rows.select([0]))


def test_a_path_that_is_no_folder_is_not_looked_for_on_the_hub(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_segmentation_datasets(str(tmp_path / "nowhere"))


def test_offline_the_hub_error_says_how_to_get_the_data():
    with pytest.raises(OSError, match="snapshot_download\\('someone/streets', repo_type='dataset'"):
        load_segmentation_datasets("someone/streets")


# Decoding


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "I", "RGB", "LA"])
def test_masks_of_many_modes_hold_the_same_ids(mode):
    mask = mask_array()
    picture = {
        "L": lambda: Image.fromarray(mask),
        "P": lambda: Image.fromarray(mask).convert("P"),
        "I;16": lambda: Image.fromarray(mask.astype(np.uint16)),
        "I": lambda: Image.fromarray(mask.astype(np.int32)),
        "RGB": lambda: Image.fromarray(np.repeat(mask[..., None], 3, axis=2)),
        "LA": lambda: Image.fromarray(mask).convert("LA"),
    }[mode]()
    if mode == "P":
        picture.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    annotation = encoded(picture, format="TIFF" if mode == "I" else "PNG")
    result = decode_example({"image": encoded(image_array()), "annotation": annotation})[1]
    assert result.dtype == np.uint8 and np.array_equal(result, mask)


def test_masks_of_one_bit_hold_0_and_1():
    mask = mask_array(num_labels=2)
    result = decode_example(example(Image.fromarray(mask * 255).convert("1")))[1]
    assert np.array_equal(result, mask)


@pytest.mark.parametrize("header", [b"P5 5 1 4\n", b"P5 5 1 15\n", b"P2 5 1 9\n"])
def test_masks_of_pgm_hold_what_the_file_stores(header):
    pixels = bytes(range(5)) if header[:2] == b"P5" else b"0 1 2 3 4"
    row = {"image": encoded(image_array(0, 1, 5)), "annotation": {"bytes": header + pixels, "path": None}}
    assert decode_example(row)[1].tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("content", [b"P5 1 1 1000\n\0\7", b"P6 1 1 15\n\7\7\7"])
def test_masks_of_pgm_and_ppm_of_another_range_are_refused(content):
    row = {"image": encoded(image_array(0, 1, 1)), "annotation": {"bytes": content, "path": None}}
    with pytest.raises(ValueError, match="values up to 255 or 65535, got 1"):
        decode_example(row)


def test_large_ids_are_kept_or_mapped_into_uint8():
    stored = mask_array().astype(np.uint16) * 1000
    plain = decode_example(example(stored))[1]
    assert plain.dtype == np.int32 and np.array_equal(plain, stored)
    label_set = LabelSet("x", "x", ("a", "b"), ((0, 0, 0), (1, 1, 1)), label_id_to_train_id={0: 1, 2000: 0})
    mapped = decode_example(example(stored), label_set)[1]
    assert mapped.dtype == np.uint8
    assert np.array_equal(mapped, np.select([stored == 0, stored == 2000], [1, 0], 255))


def test_reduced_labels_shift_down_once_and_leave_the_ignore_index():
    stored = np.array([[0, 1, 2, 150, 255]], np.uint8)
    row = example(stored, image_array(0, 1, 5))
    assert decode_example(row, reduce_labels=True)[1].tolist() == [[255, 0, 1, 149, 255]]
    assert decode_example(row, load_label_set("ade20k"))[1].tolist() == [[255, 0, 1, 149, 255]]
    assert decode_example(row)[1].tolist() == stored.tolist()


def test_a_colored_mask_is_refused_with_advice():
    with pytest.raises(ValueError, match="convert the mask with its palette"):
        decode_example(example(image_array(1)))


def test_a_float_mask_is_refused():
    picture = Image.fromarray(mask_array().astype(np.float32))
    row = {"image": encoded(image_array()), "annotation": encoded(picture, "TIFF")}
    with pytest.raises(ValueError, match="got mode F"):
        decode_example(row)


def test_grey_images_become_rgb_and_deep_ones_keep_their_depth():
    gray = image_array()[..., 0]
    expected = np.repeat(gray[..., None], 3, axis=2)
    assert np.array_equal(decode_example(example(mask_array(), gray))[0], expected)
    deep = gray.astype(np.uint16) * 257  # is not cut: the image processor knows the range
    assert np.array_equal(decode_example(example(mask_array(), deep))[0], expected.astype(np.uint16) * 257)
    row = {"image": Image.fromarray(gray.astype(np.float32)), "annotation": Image.fromarray(mask_array())}
    with pytest.raises(ValueError, match="8 or 16 bits per channel, got floats"):
        decode_example(row)


ADDRESSES = [
    *(
        f"{chain}http://127.0.0.1:9/a.png"
        for chain in ("", "simplecache::", "filecache::", "zip://x::", "reference://x::")
    ),
    *("HTTP://127.0.0.1:9/a.png", "ftp::x", "s3://a/b", "github://a:b@c/d", "hf://a://b", "zip://x::memory://y"),
]


@pytest.mark.parametrize("path", ADDRESSES)
def test_a_row_asks_no_server(path):
    row = example(mask_array()) | {"image": {"bytes": None, "path": path}}
    with pytest.raises(ValueError, match="expected an image in the row, got an address"):
        decode_example(row)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_a_folder_read_no_files_of_others(tmp_path, streaming):
    save(tmp_path / "set" / "a.png", image_array())
    save(tmp_path / "other" / "b.png", image_array())
    for folder in ("set", "other"):
        with zipfile.ZipFile(tmp_path / folder / "c.zip", "w") as archive:
            archive.write(tmp_path / "other" / "b.png", "b.png")
    good = [str(tmp_path / "set" / "a.png"), f"zip://b.png::{tmp_path}/set/c.zip"]
    bad = [
        f"{tmp_path}/other/b.png",
        f"file://{tmp_path}/other/b.png",
        f"{tmp_path}/set/../other/b.png",
        f"zip://b.png::{tmp_path}/other/c.zip",
        "hf://datasets/someone/streets/a.png",
    ]
    mask = encoded(mask_array())
    rows = [{"image": {"bytes": None, "path": path}, "annotation": mask} for path in good + bad]
    features = datasets.Features({"image": datasets.Image(decode=False), "annotation": datasets.Image(decode=False)})
    table = datasets.Dataset.from_list(rows, features=features).data.table
    pq.write_table(table, tmp_path / "set" / "train-0.parquet")
    found = list(load_segmentation_datasets(str(tmp_path / "set"), splits=["train"], streaming=streaming)["train"])
    assert len(found) == len(rows)
    for row in found[: len(good)]:
        assert np.array_equal(decode_example(row)[0], image_array())
    for row in found[len(good) :]:
        with pytest.raises(ValueError, match="a file in .*set, got one outside of it"):
            decode_example(row)


@pytest.mark.parametrize(
    "name", ["a::b.png", "zip::x.png", "data:a.png", "-a.png", "a\nb.png", "a'\"b.png", "\u00e4*[x]?.png"]
)
def test_file_names_are_no_addresses(tmp_path, monkeypatch, name):
    save(tmp_path / "plain.png", image_array())
    (tmp_path / "plain.png").rename(tmp_path / name)
    for folders in ((), (str(tmp_path),)):
        row = {"image": {"bytes": None, "path": str(tmp_path / name), "folders": folders}}
        assert np.array_equal(decode_example(row | {"annotation": encoded(mask_array())})[0], image_array())
    monkeypatch.chdir(tmp_path)
    assert read_image(Path(name)).size == image_array().shape[1::-1]


def test_a_stream_of_parquet_files_holds_few_rows_at_once(tmp_path):
    row = {"bytes": bytes(2**20), "path": None}
    image = pa.array([row] * 100, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pq.write_table(pa.table({"image": image, "annotation": image}), tmp_path / "train-0.parquet", compression="zstd")
    del image
    before = pa.total_allocated_bytes()
    stream = iter(load_segmentation_datasets(str(tmp_path), splits=["train"], streaming=True)["train"])
    next(stream)
    assert pa.total_allocated_bytes() - before < 50 * 2**20
    assert len(list(stream)) == 99


def test_images_and_masks_are_two_columns():
    with pytest.raises(ValueError, match="two columns.*got 'annotation' for both"):
        load_segmentation_datasets(image_column="annotation", scenes_train=1, scenes_validation=1)


def test_postscript_in_a_row_is_not_handed_to_a_program():
    row = example(mask_array()) | {
        "image": {"bytes": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "path": None}
    }
    with pytest.raises(ValueError, match="cannot be read as an image"):
        decode_example(row)


def test_pil_images_are_accepted():
    row = {"image": Image.fromarray(image_array()), "annotation": Image.fromarray(mask_array())}
    image, mask = decode_example(row)
    assert np.array_equal(image, image_array()) and np.array_equal(mask, mask_array())


def turned(picture: np.ndarray) -> dict:
    """Encodes a picture turned to the left, with the EXIF tag that says to turn it to the right."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(np.rot90(picture).copy(), exif=exif)


def test_images_are_turned_by_exif_and_masks_only_along_with_them():
    image, mask = image_array(), mask_array()
    for row in (
        {"image": turned(image), "annotation": encoded(mask)},
        {"image": turned(image), "annotation": turned(mask)},
    ):
        new_image, new_mask = decode_example(row)
        assert np.array_equal(new_image, image) and np.array_equal(new_mask, mask)
    upright = {"image": encoded(image_array(0, WIDTH, HEIGHT)), "annotation": turned(mask)}
    assert np.array_equal(decode_example(upright)[1], np.rot90(mask))


def test_sizes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"size of the image.*\(9, 6\).*\(9, 7\)"):
        decode_example(example(mask_array(), image_array(0, 7, 9)))


@pytest.mark.parametrize("column", ["image", "annotation"])
def test_damaged_and_huge_files_are_named(tmp_path, monkeypatch, column):
    save(tmp_path / "a.png", image_array(0, 60, 90))
    save(tmp_path / "b.png", np.random.default_rng(0).integers(0, 9, (60, 90), dtype=np.uint8))
    row = {"image": {"bytes": None, "path": str(tmp_path / "a.png")}}
    row["annotation"] = {"bytes": None, "path": str(tmp_path / "b.png")}
    path = Path(row[column]["path"])
    content = path.read_bytes()

    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{path.name}: cannot be read"):
        decode_example(row)
    path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=f"{path.name}: cannot be read"):
        decode_example(row)
    path.write_bytes(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"\.png: cannot be read.*exceeds limit"):
        decode_example(row)
    path.unlink()
    monkeypatch.undo()
    with pytest.raises(ValueError, match=f"{path.name}: cannot be read"):
        decode_example(row)


# Checks


def test_report_counts_pixels_and_images():
    masks = [mask_array(seed, 4) for seed in range(3)] + [np.zeros((HEIGHT, WIDTH), np.uint8)]
    masks[1][:2] = 255
    report = check_masks(dataset_of(masks), num_labels=5, show_progress=False)
    for label in range(5):
        assert report.pixels_per_class[label] == sum((mask == label).sum() for mask in masks)
        assert report.images_per_class[label] == sum((mask == label).any() for mask in masks)
    assert report.num_images == 4 and report.num_ignored_pixels == 2 * WIDTH
    assert report.ignored_fraction == 2 / (4 * HEIGHT)
    assert report.problems == []
    report.raise_if_impossible()


def test_report_can_stop_early_and_read_a_stream():
    rows = dataset_of([mask_array(seed) for seed in range(3)]).to_iterable_dataset()
    assert check_masks(rows, 3, max_images=2, show_progress=False).num_images == 2
    assert check_masks(rows, 3, show_progress=False).num_images == 3


def test_problems_name_the_example_and_what_is_wrong():
    rows = [example(mask_array()), example(mask_array(num_labels=9)), example(mask_array(), image_array(0, 3, 4))]
    report = check_masks([row | {"id": f"street {i}"} for i, row in enumerate(rows)], 3, show_progress=False)
    assert len(report.problems) == 2
    assert report.problems[0].startswith("example 1, street 1: ids [3, 4, 5, 6, 7, 8] in ")
    assert "example 2, street 2: expected a mask of the size of the image" in report.problems[1]
    with pytest.raises(ValueError, match=r"2 masks cannot be used(.|\n)*there are more classes, 9 or more"):
        report.raise_if_impossible()


@pytest.mark.parametrize(
    ("values", "options", "advice"),
    [
        ((0, 255), {"num_labels": 2}, "black and white.*`label_set` of one name or two, or none"),
        ((0, 255), {"num_labels": 2, "ignore_index": 254}, "Black and white.*no `ignore_index`.* one name or two"),
        ((0, 1, 2, 255), {"num_labels": 3, "ignore_index": 254}, "set `ignore_index=255`"),
        (
            (0, 1, 2, 3),
            {"num_labels": 3},
            "If 3 marks .* `ignore_index=3`; .* `do_reduce_labels=True`; .* `num_labels=4`",
        ),
        ((1, 2, 3), {"num_labels": 3}, "If 0 is background .* `do_reduce_labels=True`; if 3 .* `ignore_index=3`"),
        ((0, 1, 2, 7), {"num_labels": 3}, r"If 7 .* `ignore_index=7`.*there are more classes, 8 or more"),
        (
            (0, 1, 2, 3, 4),
            {"num_labels": 3},
            r"Either there are more classes, 5 or more: .* or none and `num_labels=5`",
        ),
        ((255,), {"num_labels": 3}, "No pixel .* belongs to a class"),
        ((0,), {"num_labels": 3, "reduce_labels": True}, "No pixel .* belongs to a class"),
    ],
)
def test_impossible_masks_are_refused_with_the_remedy(values, options, advice):
    mask = np.resize(np.array(values, np.uint8), (HEIGHT, WIDTH))
    with pytest.raises(ValueError, match=advice):
        check_masks(dataset_of([mask]), **options, show_progress=False).raise_if_impossible()


def test_large_stored_ids_ask_for_a_label_map():
    mask = mask_array().astype(np.uint16) * 1000
    with pytest.raises(ValueError, match="label map"):
        check_masks(dataset_of([mask]), 3, show_progress=False).raise_if_impossible()


@pytest.mark.parametrize("value", [0, 2])
def test_a_mask_of_one_class_is_fine(value):
    masks = [np.full((HEIGHT, WIDTH), value, np.uint8)]
    check_masks(dataset_of(masks), 3, show_progress=False).raise_if_impossible()


def test_a_label_set_is_applied_before_the_check():
    masks = dataset_of([np.array(np.resize([0, 1, 150], (HEIGHT, WIDTH)), np.uint8)])
    report = check_masks(masks, 150, load_label_set("ade20k"), show_progress=False)
    report.raise_if_impossible()
    assert report.pixels_per_class[[0, 149]].tolist() == [18, 18] and report.num_ignored_pixels == 18


def test_class_ids_under_the_label_map_of_other_ids_are_suspected(caplog):
    label_set = load_label_set("cityscapes")
    train_ids = np.resize(np.array([0, 1, 7, 18, 255], np.uint8), (HEIGHT, WIDTH))
    check_masks(dataset_of([train_ids]), 19, label_set, show_progress=False)
    assert "The stored ids end at 18, but the label set 'cityscapes' maps ids up to 33" in caplog.text
    caplog.clear()
    check_masks(dataset_of([train_ids, train_ids + 15]), 19, label_set, show_progress=False)
    check_masks(dataset_of([train_ids % 11]), 11, load_label_set("camvid"), show_progress=False)
    binary = LabelSet("x", "x", ("a", "b"), ((0, 0, 0), (1, 1, 1)), label_id_to_train_id={0: 0, 255: 1})
    check_masks(dataset_of([mask_array(num_labels=2) * 255]), 2, binary, show_progress=False)
    assert not caplog.text


def test_number_of_labels_is_read_from_the_masks():
    masks = dataset_of([mask_array(0, 3), mask_array(1, 7), np.full((HEIGHT, WIDTH), 255, np.uint8)])
    assert infer_num_labels(masks, show_progress=False) == 7
    assert infer_num_labels(masks, reduce_labels=True, show_progress=False) == 6
    assert infer_num_labels(masks, max_images=1, show_progress=False) == 3
    with pytest.raises(ValueError, match="No pixel belongs to a class"):
        infer_num_labels(masks.select([2]), show_progress=False)
    with pytest.raises(ValueError, match="palette"):
        infer_num_labels(dataset_of([image_array()]), show_progress=False)


@pytest.mark.skipif(not CAMVID.is_dir(), reason="CamVid is not beside the repository (research use only)")
def test_camvid_is_read_from_parquet_and_fits_its_label_set():
    found = load_segmentation_datasets(str(CAMVID), streaming=True)
    label_set = load_label_set("camvid")
    image, mask = decode_example(next(iter(found["train"])), label_set)
    assert image.shape == (360, 480, 3) and mask.shape == (360, 480)
    report = check_masks(found["validation"], 11, label_set, max_images=10, show_progress=False)
    report.raise_if_impossible()
    assert report.images_per_class[label_set.labels.index("road")] == 10
    unmapped = check_masks(found["validation"], 11, label_set_from_names(label_set.labels), max_images=10)
    assert set(unmapped.wrong_ids) == {11}


def test_the_list_of_classes_has_a_line_for_each_whatever_its_name():
    report = check_masks(dataset_of([mask_array(num_labels=2)]), 3, show_progress=False)
    lines = report.describe(["two\nlines", "tab\tand  spaces", "not\r\nthere"]).splitlines()
    assert sorted(line.split("  ")[1] for line in lines[1:]) == ["not there: not there", "tab and spaces", "two lines"]
