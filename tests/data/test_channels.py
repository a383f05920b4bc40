"""More than three channels and 16 bits, from file to model: training, evaluation, prediction and the pipeline."""

import io
import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, pipeline

from segmenter_hf import SegmenterForSemanticSegmentation, SegmenterImageProcessor
from segmenter_hf.cli.main import main
from segmenter_hf.data.augmentation import SegmentationAugmentation
from segmenter_hf.data.decoding import decode_example
from segmenter_hf.data.label_sets import label_set_from_names
from segmenter_hf.evaluation.evaluate import EvaluationDataset
from segmenter_hf.models.image_io import read_channels
from segmenter_hf.training.channels import find_value_range, measure_statistics
from segmenter_hf.training.datasets import TrainDataset

from ..run_training import words
from ..tiny_models import tiny_scenes_config


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, pixels)
    else:
        tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig")


def write_dataset(folder: Path, suffix: str, channels: int, dtype: type, high: int) -> None:
    """Images whose last channel is bright where the class is 1; the first channels say nothing."""
    generator = np.random.default_rng(0)
    for split in ("train", "validation"):
        for index in range(2):
            mask = np.zeros((48, 64), dtype=np.uint8)
            mask[:, 32:] = 1
            mask = mask if index == 0 else mask[:, ::-1]
            pixels = generator.integers(high, size=(48, 64, channels)).astype(dtype)
            pixels[..., -1] = np.where(mask, high, 0)
            save(folder / "images" / split / f"{index}{suffix}", pixels)
            (folder / "masks" / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(folder / "masks" / split / f"{index}.png")


@pytest.mark.parametrize(
    ("suffix", "channels", "dtype", "high", "more"),
    [
        (".tif", 4, np.uint8, 255, []),
        (".tif", 5, np.uint16, 4095, ["--value_range", "0", "4095", "--normalization", "dataset"]),
        (".npy", 2, np.float32, 1, ["--value_range", "0", "1"]),
    ],
)
def test_channels_go_from_the_file_to_the_model(suffix, channels, dtype, high, more, tmp_path, capsys) -> None:
    write_dataset(tmp_path / "data", suffix, channels, dtype, high)
    (tmp_path / "labels.json").write_text('["dark", "bright"]')
    model = str(tmp_path / "model")
    overrides = f"patch_size=8,hidden_size=32,num_attention_heads=2,intermediate_size=64,num_hidden_layers=1,num_channels={channels}"
    given = [
        "--dataset_name",
        str(tmp_path / "data"),
        "--label_set",
        str(tmp_path / "labels.json"),
        "--max_steps",
        "25",
    ]
    given += [
        "--decoder_type",
        "linear",
        "--config_overrides",
        overrides,
        "--learning_rate",
        "0.01",
        "--image_size",
        "48",
    ]
    given += ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false", *more]
    main(["train", *words(model, *given)])
    assert AutoConfig.from_pretrained(model).num_channels == channels
    processor = AutoImageProcessor.from_pretrained(model)
    assert len(processor.image_mean) == channels and not processor.do_convert_rgb
    if "dataset" in more:
        assert 0.45 < processor.image_mean[-1] < 0.55 and processor.image_std[-1] > 0.45 > processor.image_std[0]
    main(
        ["evaluate", "--model_name_or_path", model, "--dataset_name", str(tmp_path / "data"), "--split", "validation"]
        + ["--output_dir", str(tmp_path / "results"), "--device", "cpu"]
    )
    images = str(tmp_path / "data" / "images" / "validation")
    main(["predict", "--model_name_or_path", model, "--images", images, "--output_dir", str(tmp_path / "out")])
    found = np.asarray(Image.open(tmp_path / "out" / "0.png"))
    assert (found[:, :24] == 0).mean() > 0.9 and (found[:, 40:] == 1).mean() > 0.9
    parts = pipeline("image-segmentation", model=model)(f"{images}/0{suffix}")
    masks = {part["label"]: np.asarray(part["mask"]) for part in parts}
    assert np.array_equal(masks["bright"] == 255, found == 1)


@pytest.mark.parametrize("channels", [3, 5])
def test_a_file_of_other_channels_is_refused_with_both_numbers(channels, tmp_path) -> None:
    save(tmp_path / "scene.tif", np.zeros((40, 48, 4), dtype=np.uint8))
    processor = SegmenterImageProcessor(
        image_mean=[0.5] * channels, image_std=[0.5] * channels, do_convert_rgb=channels == 3
    )
    message = rf"scene.tif: the image has 4 channels, and the model takes {channels} \(`num_channels`\)"
    with pytest.raises(ValueError, match=message):
        processor(str(tmp_path / "scene.tif"))
    config = tiny_scenes_config()
    config.num_channels = channels
    SegmenterForSemanticSegmentation(config).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        pipeline("image-segmentation", model=str(tmp_path / "model"))(str(tmp_path / "scene.tif"))


def test_rgb_of_16_bits_keeps_its_depth(tmp_path) -> None:
    pixels = np.random.default_rng(0).integers(65536, size=(40, 48, 3), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "deep.tif", pixels, photometric="rgb")
    assert np.array_equal(read_channels(tmp_path / "deep.tif"), np.moveaxis(pixels, -1, 0))


def test_a_tiff_of_three_gray_pages_has_three_channels(tmp_path) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(3, 40, 48), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "pages.tif", pixels, photometric="minisblack")
    assert np.array_equal(read_channels(tmp_path / "pages.tif"), pixels)
    tifffile.imwrite(tmp_path / "pages.tif", pixels[:2], photometric="minisblack")
    assert np.array_equal(read_channels(tmp_path / "pages.tif"), pixels[0])  # of others the first one, gray
    tifffile.imwrite(tmp_path / "pages.tif", pixels, photometric="miniswhite")
    assert np.array_equal(read_channels(tmp_path / "pages.tif"), 255 - pixels[0])


def test_floats_of_one_channel_are_trained_on_as_they_are_predicted(tmp_path) -> None:
    values = np.random.default_rng(0).random((40, 48), dtype=np.float32) * 255
    Image.fromarray(values).save(tmp_path / "floats.tif")
    row = {"image": {"bytes": (tmp_path / "floats.tif").read_bytes(), "path": None}}
    image, _ = decode_example(row | {"annotation": Image.new("L", (48, 40))}, num_channels=1)
    assert np.array_equal(image, values[..., None])


def test_a_tiff_that_is_stored_turned_is_refused(tmp_path) -> None:
    pixels = np.zeros((40, 48, 3), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "turned.tif", pixels, photometric="rgb", extratags=[("Orientation", "H", 1, 6, True)])
    with pytest.raises(ValueError, match="turned.tif.* stored turned .*Save it upright"):
        read_channels(tmp_path / "turned.tif")


def test_an_array_of_objects_is_never_unpickled(tmp_path) -> None:
    np.save(tmp_path / "bad.npy", np.array([[{"a": 1}]], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="bad.npy"):
        read_channels(tmp_path / "bad.npy")


def test_values_of_a_range_become_those_of_8_bits() -> None:
    processor = SegmenterImageProcessor(size={"shortest_edge": 32}, window_size=32, window_stride=32)
    values = np.full((32, 32, 3), 1000, dtype=np.uint16)
    found = processor(values, value_range=[0, 4000])["pixel_values"]
    torch.testing.assert_close(found, torch.full_like(found, (0.25 - 0.5) / 0.5))
    with pytest.raises(ValueError, match="`value_range` must be two numbers in order"):
        processor(values, value_range=[5, 5])


def test_a_range_beyond_8_bits_is_refused_where_a_reader_cut_them(tmp_path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    row = b"\0" + np.full((32, 3), 3000, ">u2").tobytes()
    header = struct.pack(">IIBBBBB", 32, 32, 16, 2, 0, 0, 0)  # RGB of 16 bits
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * 32)) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    processor = SegmenterImageProcessor(size={"shortest_edge": 32}, window_size=32, window_stride=32)
    assert processor(tmp_path / "deep.png")["pixel_values"].shape == (1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"\[0, 4095\] goes beyond their 255. .* save them as TIFF"):
        processor(tmp_path / "deep.png", value_range=[0, 4095])


def test_augmentation_takes_any_channels_and_16_bits() -> None:
    augment = SegmentationAugmentation(crop_size=40, size=32, max_ratio=4.0, pad_value=(0, 0, 0, 0, 0))
    generator = np.random.default_rng(0)
    mask = generator.integers(3, size=(48, 64)).astype(np.uint8)
    for dtype in (np.uint8, np.uint16):
        image = np.repeat(mask[..., None].astype(dtype) * (100 if dtype == np.uint8 else 20000), 5, axis=2)
        crop, labels = augment(image, mask, np.random.default_rng(1))
        assert crop.shape == (40, 40, 5) and crop.dtype == dtype and labels.shape == (40, 40)
        assert np.array_equal(crop[..., 3], crop[..., 4])  # the channels after the first three are not distorted
        assert not np.array_equal(crop[..., 0], crop[..., 3])


def deep_row(pixels: np.ndarray, **tags: object) -> dict:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, photometric="minisblack", planarconfig="contig", metadata=None, **tags)
    return {"id": "deep", "image": {"bytes": buffer.getvalue(), "path": None}}


@pytest.mark.parametrize("value_range", [[0, 4095], None])
def test_gray_of_16_bits_is_the_same_in_training_evaluation_and_prediction(value_range, tmp_path) -> None:
    values = np.full((32, 32), 1000, np.uint16)
    values[:, 16:] = 3000
    Image.fromarray(values).save(tmp_path / "a.png")
    Image.fromarray((values > 2000).astype(np.uint8)).save(tmp_path / "mask.png")
    row = {"image": {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}}
    row["annotation"] = {"bytes": (tmp_path / "mask.png").read_bytes(), "path": None}
    fields = {"size": {"shortest_edge": 32}, "window_size": 32, "window_stride": 32, "value_range": value_range}
    processor = SegmenterImageProcessor(**fields, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    predicted = processor(str(tmp_path / "a.png"))["pixel_values"][0]
    label_set = label_set_from_names(["dark", "light"])
    fields = {"flip_probability": 0.0, "photometric_distortion": False, "cat_max_ratio": 1.0}
    augmentation = SegmentationAugmentation(crop_size=32, size=32, max_ratio=4.0, ratio_range=(1.0, 1.0), **fields)
    trained = TrainDataset([row], label_set, augmentation, processor, seed=0)[0]["pixel_values"]
    evaluated = processor(EvaluationDataset([row], label_set, 3)[0]["image"])["pixel_values"][0]
    torch.testing.assert_close(trained, predicted, rtol=0, atol=1e-4)
    torch.testing.assert_close(evaluated, predicted, rtol=0, atol=1e-6)
    assert abs(float(predicted.max()) - (3000 / 4095 if value_range else 12 / 255)) < 1e-3
    mean, _ = measure_statistics([row], processor)
    assert mean == pytest.approx([float(predicted.mean())] * 3, abs=1e-4)


def test_little_of_16_bits_is_warned_of(caplog) -> None:
    processor = SegmenterImageProcessor()
    with caplog.at_level(logging.WARNING):
        find_value_range([deep_row(np.full((8, 8, 4), 3000, dtype=np.uint16))], processor)
    assert "`value_range` 0 4095" in caplog.text and processor.value_range is None


GDAL_BITS = '<GDALMetadata>\n<Item name="NBITS" sample="0" role="image_structure">10</Item>\n</GDALMetadata>'
GDAL_STATISTICS = (
    '<GDALMetadata><Item name="STATISTICS_MAXIMUM" sample="0">2900</Item>'
    '<Item name="STATISTICS_MINIMUM" sample="0">7</Item><Item name="STATISTICS_MAXIMUM" sample="1">3100</Item></GDALMetadata>'
)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ([(281, "H", 4, (4095, 4000, 4095, 4095), True)], [0, 4095]),
        ([(280, "H", 4, (50, 60, 70, 80), True), (281, "H", 4, (4095,) * 4, True)], [50, 4095]),
        ([(341, "H", 4, (900,) * 4, True), (281, "H", 4, (4095,) * 4, True)], [0, 900]),
        ([(281, "H", 4, (65535,) * 4, True)], None),
        ([(42112, "s", 0, GDAL_BITS, True)], [0, 1023]),
        ([(42112, "s", 0, GDAL_STATISTICS, True)], [7, 3100]),
        ([(42112, "s", 0, GDAL_STATISTICS.replace("3100", "nan").replace("2900", "nan"), True)], None),
        ([], None),
    ],
)
def test_the_range_of_values_is_that_of_the_metadata(tags, expected, caplog) -> None:
    processor = SegmenterImageProcessor()
    find_value_range([deep_row(np.full((8, 8, 4), 3000, dtype=np.uint16), extratags=tags)], processor)
    assert processor.value_range == expected
    given = SegmenterImageProcessor(value_range=[1, 2])
    find_value_range([deep_row(np.full((8, 8, 4), 3000, dtype=np.uint16), extratags=tags)], given)
    assert given.value_range == [1, 2]


def test_the_range_of_values_holds_for_all_images() -> None:
    pixels = np.full((8, 8, 4), 3000, dtype=np.uint16)
    lower, higher = (deep_row(pixels, extratags=[(281, "H", 1, value, True)]) for value in (1023, 4095))
    for rows, expected in (([lower, higher], [0, 4095]), ([lower, deep_row(pixels)], None)):
        processor = SegmenterImageProcessor()
        find_value_range(rows, processor)
        assert processor.value_range == expected


def test_floats_need_a_range() -> None:
    row = deep_row(np.full((8, 8, 4), 0.5, dtype=np.float32))
    with pytest.raises(ValueError, match=r"deep: expected pixel values of 8 or 16 bits, got float32. .*`value_range`"):
        find_value_range([row], SegmenterImageProcessor())
    find_value_range([row], SegmenterImageProcessor(value_range=[0, 1]))


def test_nan_is_refused_by_the_name_of_the_image() -> None:
    pixels = np.full((8, 8, 4), 0.5, dtype=np.float32)
    pixels[3, 3, 1] = np.nan
    row = deep_row(pixels) | {"annotation": Image.fromarray(np.zeros((8, 8), np.uint8))}
    with pytest.raises(ValueError, match="deep: the image holds NaN or infinite values. Replace them"):
        decode_example(row, num_channels=4)
