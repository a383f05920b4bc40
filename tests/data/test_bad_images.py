"""Whatever is given as an image: it is seen as its RGB form, or ends in an error that says what to do and writes nothing."""

import contextlib
import http.server
import io
import socket
import struct
import subprocess
import threading
import zlib

import numpy as np
import PIL.Image
import pytest
import torch
from PIL import Image

from segmenter_hf import SegmenterForSemanticSegmentation, SegmenterImageProcessor
from segmenter_hf.inference.files import predict_files
from segmenter_hf.models import image_io as image_io
from segmenter_hf.models.image_io import read_image

from ..prediction import make_predictor, segment_images
from ..tiny_models import spread_weights, tiny_scenes_config


FIELDS = {"size": {"shortest_edge": 40}, "window_size": 32, "window_stride": 16, "patch_size": 8}
COLOR = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
GRAY = COLOR[..., 0]


@pytest.fixture
def processor() -> SegmenterImageProcessor:
    return SegmenterImageProcessor(**FIELDS)


@pytest.fixture
def model() -> SegmenterForSemanticSegmentation:
    return SegmenterForSemanticSegmentation(tiny_scenes_config()).eval()


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, bits: int = 8, color: int = 2, pixels: bytes = b"") -> bytes:
    """A PNG with this header and these rows of pixels, each after a byte for its filter."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def with_dimension(kind: str) -> bytes:
    """The same file as `encoded`, whose header says 60000 x 60000."""
    content = bytearray(encoded(Image.fromarray(COLOR), kind))
    if kind == "BMP":
        content[18:26] = struct.pack("<ii", 60000, 60000)
    else:  # GIF: the screen, and the picture on it
        content[6:10] = struct.pack("<HH", 60000, 60000)
        place = content.index(b"," + bytes(4) + struct.pack("<HH", 56, 40))
        content[place + 5 : place + 9] = struct.pack("<HH", 60000, 60000)
    return bytes(content)


JPEG, PNG = (encoded(Image.fromarray(COLOR), kind) for kind in ("JPEG", "PNG"))
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
BAD_FILES = {
    "empty.png": (b"", "damaged or something else"),
    "header only.png": (PNG[:30], "damaged or something else"),
    "half.png": (PNG[: len(PNG) // 2], "damaged or something else"),
    "nearly whole.png": (PNG[:-40], "damaged or something else"),
    "header only.jpg": (JPEG[:100], "damaged or something else"),
    "half.jpg": (JPEG[: len(JPEG) // 2], "damaged or something else"),
    "a changed byte.png": (PNG[:200] + bytes([PNG[200] ^ 255]) + PNG[201:], "damaged or something else"),
    "text.jpg": (b"hello, I am no picture at all", r"no image begins with b'hello, I'"),
    "page.jpg": (b"<!DOCTYPE html><html></html>", "damaged or something else"),
    "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "damaged or something else"),
    "no pixels.png": (png(0, 5), "damaged or something else"),
    "bomb.png": (png(30000, 30000), "30000 x 30000 pixels are more than 178956970.*max_image_pixels"),
    "largest.png": (png(2**31 - 1, 2**31 - 1), "2147483647 x 2147483647 pixels are more than"),
    "bomb.bmp": (with_dimension("BMP"), "60000 x 60000 pixels are more than"),
    "bomb.gif": (with_dimension("GIF"), "60000 x 60000 pixels are more than"),
    "script.eps": (EPS, "expected an image .BMP, GIF"),
    "script.png": (EPS, "expected an image .BMP, GIF"),
    "nan.tif": (encoded(Image.fromarray(np.where(GRAY > 9, GRAY, np.nan).astype(np.float32)), "TIFF"), "NaN"),
    "unit.tif": (encoded(Image.fromarray(GRAY.astype(np.float32) / 255), "TIFF"), "do_rescale=False"),
    "deep.tif": (encoded(Image.fromarray(GRAY.astype(np.int32) * 1000), "TIFF"), "0 to 65535"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_and_nothing_is_written(processor, model, name, tmp_path) -> None:
    content, message = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        processor(path)
    with pytest.raises(ValueError, match=message):
        segment_images(model, processor, [str(path)])
    with pytest.raises(ValueError, match=rf"1 of 1 images cannot be read.*\n  .*{name}: .*{message}"):
        predict_files(make_predictor(model, processor), [path], tmp_path / "out", show_progress=False)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_bad_files_do_not_keep_the_others_from_being_segmented(processor, model, tmp_path) -> None:
    (tmp_path / "in").mkdir()
    for name, (content, _) in BAD_FILES.items():
        (tmp_path / "in" / name).write_bytes(content)
    Image.fromarray(COLOR).save(tmp_path / "in" / "good.png")
    with pytest.raises(ValueError, match=r"18 of 19 images cannot be read") as caught:
        predict_files(make_predictor(model, processor), [tmp_path / "in"], tmp_path / "out", show_progress=False)
    pictures = [name for name in BAD_FILES if not name.endswith((".svg", ".eps"))]
    assert all(str(caught.value).count(str(tmp_path / "in" / name)) == 1 for name in pictures)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["good.png", "good_overlay.png"]


def test_postscript_is_not_handed_to_a_program(processor, monkeypatch, tmp_path) -> None:
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: started.append(args))
    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", lambda: True)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    (tmp_path / "script.png").write_bytes(EPS)
    with pytest.raises(Exception):  # noqa: B017 - Pillow does
        PIL.Image.open(tmp_path / "script.png").load()
    assert len(started) == 1
    with pytest.raises(ValueError, match="script.png"):
        processor(tmp_path / "script.png")
    assert len(started) == 1


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("{}/missing.png", FileNotFoundError, "missing.png: expected an image file.*Check the path"),
        ("{}", IsADirectoryError, "expected an image file, got a folder. Give the files"),
        ("", FileNotFoundError, "expected an image file"),
        ("a\0b.png", FileNotFoundError, "expected an image file"),
        ("x" * 5000, FileNotFoundError, r"x\.\.\.: expected an image file"),
        ("file:///etc/hostname", FileNotFoundError, "expected an image file"),
        ("/dev/zero", FileNotFoundError, "expected an image file"),
        ("http://127.0.0.1:9/a.png", OSError, "a.png: expected an image at this address.*the network, or give a file"),
        ("https://", OSError, "expected an image at this address"),
        *(
            (f"http://127.0.0.1:{place}", OSError, "InvalidURL")
            for place in ("abc/a.png", "9/a b.png", "9/\nb", "9/\0")
        ),
        ("data:image/png;base64,%%%", ValueError, "data:image/png.*no image begins with"),
        ("data:nothing", OSError, "expected an image at this address"),
    ],
)
def test_a_source_that_is_no_file_is_named(processor, source, error, message, tmp_path) -> None:
    with pytest.raises(error, match=message) as caught:
        processor(source.format(tmp_path))
    assert len(str(caught.value)) < 600


@pytest.fixture
def server(tmp_path):
    """The address of a folder."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args) -> None:
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_address_gives_what_the_file_gives(processor, server, tmp_path, monkeypatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(GRAY.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(COLOR).save(tmp_path / "turned.jpg", exif=exif)
    for name in ("deep.png", "turned.jpg"):
        expected = processor(tmp_path / name)["pixel_values"]
        assert torch.equal(processor(f"{server}/{name}")["pixel_values"], expected)
    (tmp_path / "page.png").write_text("<html></html>")
    with pytest.raises(ValueError, match="page.png: expected an image"):
        processor(f"{server}/page.png")
    with pytest.raises(OSError, match="missing.png: expected an image at this address.*404"):
        processor(f"{server}/missing.png")
    monkeypatch.setattr(image_io, "MAX_DOWNLOAD_BYTES", 100)
    with pytest.raises(OSError, match="deep.png: expected an image of at most 100 bytes"):
        processor(f"{server}/deep.png")


@pytest.fixture
def raw_server():
    """A function that starts a server which says these bytes, and then a byte after the other without an end."""
    stop, listeners = threading.Event(), []

    def start(answer: bytes, endless: bool = False) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                connection.sendall(answer)
                while endless and not stop.wait(0.02):
                    connection.sendall(b"x")

        threading.Thread(target=serve, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/a.png"

    yield start
    stop.set()
    for listener in listeners:
        listener.close()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 abc OK\r\n\r\n", "BadStatusLine"),
        (b"HTTP/1.1 200 OK\r\nA: " + b"x" * 70000 + b"\r\n\r\n", "LineTooLong"),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n", "HTTPException"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nab", "IncompleteRead"),
    ],
)
def test_an_answer_that_is_no_http_is_an_os_error_with_the_address(processor, raw_server, answer, error) -> None:
    with pytest.raises(OSError, match=rf"http.*a\.png: expected an image at this address.*{error}"):
        processor(raw_server(answer))


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nA: "])
def test_an_answer_without_an_end_is_given_up(processor, raw_server, answer, monkeypatch) -> None:
    monkeypatch.setattr(image_io, "DOWNLOAD_SECONDS", 0.2)
    with pytest.raises(OSError, match="a.png: expected an image at this address.*TimeoutError"):
        processor(raw_server(answer, endless=True))


UNIT = np.random.default_rng(1).random((40, 56, 3))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "got NoneType"),
        (5, "got int"),
        (b"bytes", "got bytes"),
        ({}, "got dict"),
        ([], "got none"),
        ([[]], "got none"),
        ([[1, 2], [3, 4]], "got int"),
        (COLOR[:0], "at least one pixel"),
        (COLOR[:, :0], "at least one pixel"),
        (Image.new("RGB", (0, 5)), "at least one pixel"),
        (torch.zeros(3, 0, 5), "at least one pixel"),
        (COLOR[0, 0], "images"),
        (COLOR[None, None], "images"),
        (np.zeros((40, 56, 5), np.uint8), r"Expected an image of 3 channels.*\(40, 56, 5\).*do_convert_rgb=False"),
        (np.zeros((40, 56, 2), np.uint8), r"Expected an image of 3 channels.*\(40, 56, 2\)"),
        (np.full((40, 56, 3), np.nan), "NaN"),
        (np.full((40, 56, 3), -np.inf), "infinite"),
        (UNIT, "do_rescale=False"),
        (UNIT * 2 - 1, "do_rescale=False"),
        (torch.from_numpy(UNIT), "do_rescale=False"),
        (np.full((40, 56), -1), "0 to 65535, got -1"),
        (np.full((40, 56), 65536), "0 to 65535, got 65536"),
        (np.full((40, 56), 2**64 - 1, np.uint64), "0 to 65535"),
        (UNIT.astype(complex), "integers, floats or booleans, got complex128"),
        (np.full((40, 56, 3), "a"), "integers, floats or booleans, got <U1"),
        (np.full((40, 56, 3), None), "integers, floats or booleans, got object"),
        (np.zeros((40, 56, 3), "datetime64[s]"), "integers, floats or booleans, got datetime64"),
    ],
)
def test_what_is_no_image_is_refused(processor, image, message) -> None:
    with pytest.raises(ValueError, match=message):
        processor(image)
    with pytest.raises(ValueError, match=message):
        processor.lazy_windows(image)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5000), (3000, 1), (7, 3), (32, 33)])
def test_images_of_any_shape_get_a_map_of_their_size(processor, model, height, width) -> None:
    processor.size = {"shortest_edge": 40, "longest_edge": 160}
    (segmentation,) = segment_images(model, processor, [Image.new("RGB", (width, height), (9, 99, 199))])
    assert segmentation.shape == (height, width)


@pytest.mark.parametrize("height", [1, 3, 4])
def test_low_images_are_not_taken_for_ones_with_the_channels_first(processor, height) -> None:
    if height == 3:  # both ends have three: the first one it is, as everywhere in transformers
        assert processor(COLOR[:3])["window_offsets"][0, 9:].tolist() == [56, 3]
        assert processor(COLOR[:3], input_data_format="channels_last")["window_offsets"][0, 9:].tolist() == [3, 56]
        return
    expected = processor(Image.fromarray(COLOR[:height]))
    got = processor(COLOR[:height])
    assert torch.equal(got["pixel_values"], expected["pixel_values"])
    assert got["window_offsets"][0, 9:].tolist() == [height, 56]


def test_what_would_fill_the_memory_is_refused_before_it_does() -> None:
    processor = SegmenterImageProcessor()  # the published protocol
    with pytest.raises(ValueError, match=r"1 x 5000 pixels is too thin for windows of 512.*Crop or pad it"):
        processor(np.zeros((1, 5000, 3), np.uint8))
    for fields in ({"size": {"shortest_edge": 10**9}}, {"size": {"shortest_edge": 2**14}, "scales": [16.0]}):
        with pytest.raises(ValueError, match="pixels would become one of .*expected at most 1073741824 pixels"):
            processor(COLOR, **fields)
    with pytest.raises(ValueError, match="windows, expected at most 1048576: raise `window_stride`"):
        processor(COLOR, size={"shortest_edge": 2000}, window_size=16, window_stride=1)


def test_mirrored_views_of_arrays_are_seen_as_they_are(processor) -> None:
    for image in (COLOR, COLOR[:, :1], COLOR[:1]):
        for view in (image[:, ::-1], image[::-1], image[::-1, ::-1]):
            expected = processor(Image.fromarray(view.copy()))["pixel_values"]
            assert torch.equal(processor(view)["pixel_values"], expected)
            assert processor(view, view[..., 0], do_split_windows=True)["labels"].shape == expected[:, 0].shape


def test_tensors_of_any_kind_are_seen_as_images(processor) -> None:
    expected = processor(COLOR)["pixel_values"]
    floats = torch.from_numpy(COLOR).permute(2, 0, 1).float()
    for image in (floats.bfloat16().float(), floats.requires_grad_()):
        assert processor(image)["pixel_values"].shape == expected.shape
    assert torch.equal(processor(floats.detach().half())["pixel_values"], expected)


def test_every_depth_of_a_file_gives_the_map_of_its_rgb_form(processor, model, tmp_path) -> None:
    spread_weights(model)
    gray, color = Image.fromarray(GRAY), Image.fromarray(COLOR)
    palette = color.quantize(32)
    transparent = color.copy()
    transparent.putalpha(gray)
    pairs = {
        "gray.png": (gray, gray.convert("RGB")),
        "palette.png": (palette, palette.convert("RGB")),
        "transparent.png": (transparent, color),
        "gray16.png": (Image.fromarray(GRAY.astype(np.uint16) * 257), gray.convert("RGB")),
        "gray16.tif": (Image.fromarray(GRAY.astype(np.uint16) * 257), gray.convert("RGB")),
        "cmyk.tif": (color.convert("CMYK"), color.convert("CMYK").convert("RGB")),
        "bits.png": (gray.convert("1"), gray.convert("1").convert("RGB")),
    }
    for name, (image, _) in pairs.items():
        image.save(tmp_path / name)
    rows = np.repeat(COLOR, 2, axis=-1).astype(np.uint8)  # 65535 for 255
    (tmp_path / "color16.png").write_bytes(png(56, 40, 16, 2, b"".join(b"\0" + row.tobytes() for row in rows)))
    pairs["color16.png"] = (None, color)
    for name, (_, rgb) in pairs.items():
        (expected,), (got,) = (segment_images(model, processor, [image]) for image in (rgb, str(tmp_path / name)))
        assert torch.equal(got, expected), name
    assert len(expected.unique()) > 1


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_upright_wherever_they_are_read(processor, model, orientation, suffix, tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == "webp" else {}
    image = Image.fromarray(COLOR)
    image.save(tmp_path / f"turned.{suffix}", exif=exif, **options)
    image.save(tmp_path / f"plain.{suffix}", **options)
    turned = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # numbers of PIL.Image.Transpose
    upright = Image.open(tmp_path / f"plain.{suffix}")
    upright = upright.transpose(turned[orientation]) if orientation > 1 else upright
    assert np.array_equal(np.asarray(read_image(tmp_path / f"turned.{suffix}")), np.asarray(upright))
    got = processor(str(tmp_path / f"turned.{suffix}"))
    assert torch.equal(got["pixel_values"], processor(upright)["pixel_values"])
    written = predict_files(
        make_predictor(model, processor), [tmp_path / f"turned.{suffix}"], tmp_path / "out", show_progress=False
    )
    assert Image.open(written["turned"]).size == upright.size


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_is_none_leaves_the_image_as_it_is(value, tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    Image.fromarray(COLOR).save(tmp_path / "picture.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "picture.png")), COLOR)


def test_the_first_image_of_several_is_read_whatever_the_file_is_called(tmp_path) -> None:
    first, second = Image.fromarray(COLOR), Image.fromarray(COLOR[::-1].copy())
    for kind, name in (("PNG", "a.jpg"), ("TIFF", "b.png"), ("WEBP", "c")):
        options = {"lossless": True} if kind == "WEBP" else {}
        first.save(tmp_path / name, kind, save_all=True, append_images=[second], **options)
        assert np.array_equal(np.asarray(read_image(tmp_path / name)), COLOR), kind
    first.save(tmp_path / "d.gif", save_all=True, append_images=[second])
    shown = np.asarray(Image.open(tmp_path / "d.gif").convert("RGB"))
    assert np.array_equal(np.asarray(read_image(tmp_path / "d.gif").convert("RGB")), shown)


def test_the_limit_of_pixels_is_that_of_the_call_and_else_of_pillow(tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(COLOR).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1119)
    with pytest.raises(ValueError, match="56 x 40 pixels are more than 2238"):
        read_image(path)
    assert read_image(path, 2240).size == (56, 40)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1120)
    assert read_image(path).size == (56, 40)
    with pytest.raises(ValueError, match="56 x 40 pixels are more than 2239"):
        read_image(path, 2239)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read_image(path).size == (56, 40)


def test_the_overlay_of_16_bits_is_scaled_and_not_clipped(processor, model, tmp_path) -> None:
    overlays = {}
    for name, image in {"deep": Image.fromarray(GRAY.astype(np.uint16) * 257), "plain": Image.fromarray(GRAY)}.items():
        image.save(tmp_path / f"{name}.png")
        predict_files(
            make_predictor(model, processor), [tmp_path / f"{name}.png"], tmp_path / "out", show_progress=False
        )
        overlays[name] = np.asarray(Image.open(tmp_path / "out" / f"{name}_overlay.png"))
    assert np.array_equal(overlays["deep"], overlays["plain"])
