"""Sizes, windows, labels and inputs of the image processor, the same for both backends."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate
from transformers import AutoImageProcessor

from segmenter_hf import SegmenterImageProcessor, SegmenterImageProcessorPil
from segmenter_hf.models import image_io as image_io
from segmenter_hf.models import resampling
from segmenter_hf.models.image_io import pil_to_array
from segmenter_hf.models.resampling import resize_image, resize_labels, resized_size
from segmenter_hf.models.window_geometry import Window


BACKENDS = [SegmenterImageProcessor, SegmenterImageProcessorPil]
FIELDS = {"size": {"shortest_edge": 32, "longest_edge": 64}, "window_size": 32, "window_stride": 24}


@pytest.fixture(params=BACKENDS)
def processor(request) -> SegmenterImageProcessor:
    return request.param(**FIELDS)


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def windows_of(inputs) -> list[Window]:
    return [Window(*row) for row in inputs["window_offsets"].tolist()]


@pytest.mark.parametrize(
    ("image", "edges", "expected"),
    [
        ((101, 150), (64, 256), (64, 95)),  # 150 * 64 / 101 = 95.05
        ((150, 101), (64, 256), (95, 64)),
        ((100, 900), (64, 256), (28, 256)),  # the long edge is the limit; 28.44
        ((512, 683), (512, 2048), (512, 683)),
        ((10, 15), (5, None), (5, 8)),  # 7.5 is rounded up
        ((1, 5000), (64, 256), (1, 256)),
    ],
)
def test_sizes_are_those_of_mmcv(image, edges, expected) -> None:
    assert resized_size(*image, *edges) == expected


def test_both_backends_give_the_same_numbers() -> None:
    images = [Image.fromarray(picture(50, 77)), Image.fromarray(picture(90, 40))]
    first, second = (backend(**FIELDS)(images, scales=[0.5, 1.0, 1.5], do_flip=True) for backend in BACKENDS)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_windows_scales_and_flips_are_described_in_order(processor) -> None:
    inputs = processor(picture(40, 60), scales=[1.0, 1.5], do_flip=True)
    rows = windows_of(inputs)
    views = [(row.view, row.flip, row.view_height, row.view_width) for row in rows]
    assert list(dict.fromkeys(views)) == [(0, 0, 32, 48), (1, 1, 32, 48), (2, 0, 48, 72), (3, 1, 48, 72)]
    assert [(row.top, row.left) for row in rows if row.view == 0] == [(0, 0), (0, 16)]
    assert {(row.image_height, row.image_width, row.height, row.width) for row in rows} == {(40, 60, 32, 32)}
    assert inputs["pixel_values"].shape == (len(rows), 3, 32, 32)
    assert inputs["pixel_values"].dtype == torch.float32
    first_flipped = next(index for index, row in enumerate(rows) if row.view == 1 and row.left == 16)
    assert torch.equal(inputs["pixel_values"][first_flipped], inputs["pixel_values"][0].flip(-1))


def test_pixels_are_resized_without_antialiasing_rounded_and_normalized(processor) -> None:
    image = picture(64, 64)
    pixels = interpolate(torch.from_numpy(image).permute(2, 0, 1)[None].float(), size=(32, 32), mode="bilinear")
    expected = (pixels.round() / 255 - 0.5) / 0.5
    torch.testing.assert_close(processor(image)["pixel_values"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(30, 77), (211, 260), (97, 131)])
def test_resized_pixels_are_those_of_torch_rounded_to_the_nearest(monkeypatch, size) -> None:
    image = torch.from_numpy(picture(97, 131)).permute(2, 0, 1)
    whole = resize_image(image, size)
    exact = interpolate(image[None].double(), size=size, mode="bilinear")[0]
    assert whole.dtype == torch.uint8
    assert (whole - exact).abs().max() < 0.5 + 1e-4
    monkeypatch.setattr(resampling, "CPU_BAND", 1000)
    assert torch.equal(resize_image(image, size), whole)


@pytest.mark.parametrize(
    "mode", ["RGB", "L", "1", "LA", "RGBA", "CMYK", "palette", "transparent palette", "I;16", "F"]
)
@pytest.mark.parametrize("do_convert_rgb", [True, False])
def test_large_images_are_read_in_parts(monkeypatch, mode, do_convert_rgb) -> None:
    image = as_rgb_and_as(mode)[1]
    whole = pil_to_array(image, do_convert_rgb)
    monkeypatch.setattr(image_io, "PIXELS_AT_ONCE", 300)
    parts = pil_to_array(image, do_convert_rgb)
    assert parts.dtype == whole.dtype
    assert np.array_equal(parts, whole)


@pytest.mark.parametrize("size", [(50, 77), (20, 31)])
@pytest.mark.parametrize("fields", [{}, {"scales": [0.5, 1.5], "do_flip": True}, {"do_resize": False}])
def test_windows_made_one_at_a_time_are_those_of_the_whole(processor, size, fields) -> None:
    image = picture(*size)
    inputs, lazy = processor(image, **fields), processor.lazy_windows(image, **fields)
    assert windows_of(inputs) == lazy.windows
    assert torch.equal(inputs["pixel_values"], torch.stack([lazy.pixel_values(window) for window in lazy.windows]))
    with pytest.raises(ValueError, match="scales"):
        processor.lazy_windows(image, scales=[])


def test_images_shorter_than_the_window_are_enlarged_after_normalization(processor) -> None:
    inputs = processor(picture(20, 50), do_resize=False)
    assert {(row.view_height, row.view_width) for row in windows_of(inputs)} == {(32, int(50 / 20 * 32))}
    small = torch.from_numpy(picture(20, 50)).permute(2, 0, 1)[None].float()
    expected = interpolate((small / 255 - 0.5) / 0.5, size=(32, 80), mode="bilinear")
    torch.testing.assert_close(inputs["pixel_values"][0], expected[0, :, :, :32], rtol=0, atol=1e-5)


def test_a_batch_gives_what_its_images_give_alone(processor) -> None:
    images = [picture(40, 60), picture(33, 32, seed=1)]
    together = processor(images)
    alone = [processor(image) for image in images]
    assert torch.equal(together["pixel_values"], torch.cat([inputs["pixel_values"] for inputs in alone]))
    counts = [len(inputs["pixel_values"]) for inputs in alone]
    assert [row.image for row in windows_of(together)] == [0] * counts[0] + [1] * counts[1]


def test_labels_go_with_their_windows(processor) -> None:
    labels = np.arange(64 * 96).reshape(64, 96)
    image = np.repeat(picture(64, 96, 1), 3, axis=-1)
    inputs = processor(image, labels, do_flip=True)
    assert inputs["labels"].shape == inputs["pixel_values"].shape[:1] + (32, 32)
    assert inputs["labels"].dtype == torch.int64
    resized = resize_labels(torch.from_numpy(labels), (32, 48))
    assert torch.equal(inputs["labels"][0], resized[:, :32])
    assert torch.equal(inputs["labels"][-1], resized.flip(-1)[:, 16:])
    pil = Image.fromarray(labels.astype(np.int32)).resize((48, 32), Image.Resampling.NEAREST)
    assert np.array_equal(resized.numpy(), np.asarray(pil))


def test_training_crops_pass_whole_with_their_labels(processor) -> None:
    crops = [picture(48, 48), picture(48, 48, seed=1)]
    labels = [np.full((48, 48), 7), np.full((48, 48), 0)]
    inputs = processor(crops, labels, do_resize=False, do_split_windows=False, do_reduce_labels=True)
    assert inputs["pixel_values"].shape == (2, 3, 48, 48)
    assert inputs["labels"].unique().tolist() == [6, 255]
    assert [(row.image, row.height, row.view_width) for row in windows_of(inputs)] == [(0, 48, 48), (1, 48, 48)]


def as_rgb_and_as(mode: str) -> tuple[Image.Image, Image.Image]:
    color = Image.fromarray(picture(32, 40))
    if mode == "palette":
        return color.quantize(64).convert("RGB"), color.quantize(64)
    if mode == "transparent palette":
        quantized = color.quantize(64)
        other = quantized.copy()
        other.info["transparency"] = bytes(range(0, 128, 2))
        return quantized.convert("RGB"), other
    if mode in ("I;16", "I"):
        gray = np.asarray(color.convert("L"))
        wide = Image.fromarray(gray.astype(np.uint16) * 257)
        return Image.fromarray(gray).convert("RGB"), wide if mode == "I;16" else wide.convert("I")
    if mode == "RGBA":
        other = color.copy()
        other.putalpha(Image.fromarray(picture(32, 40, 1)[..., 0]))
        return color, other
    return color.convert(mode).convert("RGB"), color.convert(mode)


@pytest.mark.parametrize("mode", ["L", "1", "LA", "RGBA", "CMYK", "palette", "transparent palette", "I;16", "I"])
def test_every_mode_of_image_is_seen_as_its_rgb_form(processor, mode) -> None:
    rgb, other = as_rgb_and_as(mode)
    assert torch.equal(processor(rgb)["pixel_values"], processor(other)["pixel_values"])


def test_arrays_and_tensors_of_any_layout_are_seen_as_images(processor) -> None:
    image = picture(32, 40)
    expected = processor(Image.fromarray(image))["pixel_values"]
    for other in (
        image,
        image.transpose(2, 0, 1),
        torch.from_numpy(image).permute(2, 0, 1),
        image.astype(np.int64),
        image.astype(np.float32),
        image.astype(np.uint16) * 257,
    ):
        assert torch.equal(processor(other)["pixel_values"], expected)
    gray = picture(32, 40, 1)[..., 0]
    assert torch.equal(processor(gray)["pixel_values"], processor(Image.fromarray(gray))["pixel_values"])
    unit = processor(image.astype(np.float32) / 255, do_rescale=False)["pixel_values"]
    torch.testing.assert_close(unit, expected, rtol=0, atol=1e-2)  # floats are not rounded after the resize


def test_other_numbers_of_channels_work() -> None:
    processor = SegmenterImageProcessor(**FIELDS, image_mean=[0.1] * 5, image_std=[0.2] * 5, do_convert_rgb=False)
    assert processor(picture(32, 40, 5))["pixel_values"].shape == (2, 5, 32, 32)


def test_files_are_read_upright(processor, tmp_path) -> None:
    image = Image.fromarray(picture(32, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    upright = processor(image.transpose(Image.Transpose.ROTATE_270))
    for path in (tmp_path / "turned.png", str(tmp_path / "turned.png")):
        assert torch.equal(processor(path)["pixel_values"], upright["pixel_values"])


@pytest.mark.parametrize(
    ("image", "labels", "message"),
    [
        (np.full((32, 32, 3), np.nan, dtype=np.float32), None, "NaN"),
        (np.full((32, 32, 3), 0.5, dtype=np.float32), None, "do_rescale=False"),
        (np.full((32, 32, 3), -1), None, "0 to 65535"),
        (picture(32, 32), np.zeros((32, 31), dtype=np.int64), "segmentation map of its"),
        (picture(32, 32), np.zeros((32, 32, 3), dtype=np.uint8), "shape \\(height, width\\)"),
        (picture(32, 32), np.zeros((32, 32), dtype=np.float32), "integers"),
    ],
)
def test_impossible_inputs_are_refused(processor, image, labels, message) -> None:
    with pytest.raises(ValueError, match=message):
        processor(image, labels)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scales": []}, "scales"),
        ({"scales": [0]}, "scales"),
        ({"scales": [-1.0]}, "scales"),
        ({"scales": [1000.0]}, "scales"),
        ({"window_stride": 0}, "window_stride"),
        ({"window_stride": 33}, "window_stride"),
        ({"window_size": 40}, "patch_size"),
        ({"window_size": 0}, "window_size"),
        ({"size": {"height": 3, "width": 4}}, "shortest_edge"),
        ({"size": {"shortest_edge": 0}}, "shortest_edge"),
        ({"resample": 1}, "resample"),
    ],
)
def test_impossible_fields_are_refused_when_made_and_when_called(processor, fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        type(processor)(**{**FIELDS, **fields})
    with pytest.raises(ValueError, match=message):
        processor(picture(32, 32), **fields)


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
def test_a_saved_processor_comes_back_whole(tmp_path, backend) -> None:
    made = SegmenterImageProcessor(**FIELDS, image_mean=[0.1, 0.2, 0.3], scales=[0.5, 1.0], do_flip=True)
    made.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
    assert loaded.backend == backend
    image = picture(40, 50)
    assert torch.equal(loaded(image)["pixel_values"], made(image)["pixel_values"])


def test_tensors_can_be_numpy_or_lists(processor) -> None:
    assert isinstance(processor(picture(32, 40), return_tensors="np")["pixel_values"], np.ndarray)
    assert len(processor(picture(32, 40), return_tensors=None)["pixel_values"]) == 2


def test_logits_without_windows_are_whole_images(processor) -> None:
    outputs = SimpleNamespace(logits=torch.randn(2, 4, 6, 7))
    maps = processor.post_process_semantic_segmentation(outputs)
    assert torch.equal(torch.stack(maps), outputs.logits.argmax(1))
    (first, second) = processor.post_process_semantic_segmentation(outputs, [(30, 41), (5, 6)])
    for segmentation, logits in ((first, outputs.logits[0]), (second, outputs.logits[1])):
        plain = interpolate(logits[None], size=segmentation.shape, mode="bilinear")[0].argmax(0)
        assert torch.equal(segmentation, plain)
    for sizes in (torch.tensor([[30, 41], [5, 6]]), np.array([[30, 41], [5, 6]])):
        assert torch.equal(processor.post_process_semantic_segmentation(outputs, sizes)[0], first)
    with pytest.raises(ValueError, match="target_sizes"):
        processor.post_process_semantic_segmentation(outputs, [(3, 3)])


def test_label_maps_may_have_a_last_axis_of_one(processor) -> None:
    labels = np.random.default_rng(0).integers(0, 4, (32, 40), dtype=np.uint8)
    expected = processor(picture(32, 40), labels)["labels"]
    assert torch.equal(processor(picture(32, 40), labels[..., None])["labels"], expected)
    assert torch.equal(processor([picture(32, 40)], [labels[..., None]])["labels"], expected)


def test_16_bits_of_either_byte_order_are_the_same(processor) -> None:
    values = picture(32, 40).astype("<u2")
    expected = processor(values)["pixel_values"]
    assert torch.equal(processor(values.astype(">u2"))["pixel_values"], expected)


@pytest.mark.parametrize(
    "field",
    [{"do_center_crop": True, "crop_size": 8}, {"do_pad": True, "pad_size": 8}, {"data_format": "channels_last"}],
)
def test_steps_of_other_image_processors_are_refused(processor, field) -> None:
    with pytest.raises(ValueError, match="is no part of the protocol"):
        processor(picture(32, 40), **field)


def test_maps_and_scores_have_the_size_of_each_picture(processor) -> None:
    inputs = processor([picture(37, 61), picture(90, 45)], scales=[0.5, 1.25], do_flip=True)
    outputs = SimpleNamespace(
        logits=torch.randn(len(inputs["pixel_values"]), 3, 2, 2), window_offsets=inputs["window_offsets"]
    )
    results = processor.post_process_semantic_segmentation(outputs, return_segmentation_scores=True)
    assert [tuple(result.segmentation.shape) for result in results] == [(37, 61), (90, 45)]
    for result in results:
        assert result.segmentation_scores.shape == (3, *result.segmentation.shape)
        torch.testing.assert_close(result.segmentation_scores.sum(0), torch.ones(result.segmentation.shape))
        assert torch.equal(result.segmentation_scores.argmax(0), result.segmentation)
