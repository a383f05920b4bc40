"""The page as an attacker sees it: over HTTP, with files that nobody uploaded and values that no page sends."""

import contextlib
import io
import itertools
import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, PngImagePlugin

from segmenter_hf import SegmenterConfig, SegmenterForSemanticSegmentation
from segmenter_hf.data.label_sets import load_label_set
from segmenter_hf.inference.predictor import Predictor

from ..tiny_models import tiny_scenes_config, tiny_scenes_processor


httpx = pytest.importorskip("httpx", reason="gradio brings it")
pytest.importorskip("gradio", reason="the page needs the extra `demo`")

from segmenter_hf.demo import app  # noqa: E402
from segmenter_hf.demo.app import build_page, describe_segmentation, launch_page, open_upload  # noqa: E402
from segmenter_hf.demo.uploads import NOT_UNDERSTOOD, NOT_UPLOADED  # noqa: E402


MARK = {"_type": "gradio.FileData"}
PATHS = {
    "a file outside": "{root}/secret.png",
    "a folder up": "{cache}/../secret.png",
    "a link to a file": "{cache}/link.png",
    "a link to a folder": "{cache}/folder/secret.png",
    "a link to itself": "{cache}/loop",
    "a pipe": "{cache}/pipe",
    "a pipe outside": "{root}/pipe",
    "a huge file": "{cache}/huge.png",
    "nothing": "{cache}/missing.png",
    "nothing outside": "{root}/missing.png",
    "no image outside": "{root}/text.txt",
    "the cache": "{cache}",
    "a neighbor of the cache": "{cache}-other/secret.png",
    "the environment": "/proc/self/environ",
    "a device": "/dev/zero",
    "an empty name": "",
    "a relative name": "secret.png",
    "a zero byte": "{cache}/a\0b",
    "a surrogate": "{cache}/\ud800",
    "a long name": "{cache}/" + 5000 * "x",
    "an address": "http://127.0.0.1:9/image.png",
    "a data address": "data:image/png;base64,AAAA",
}
VALUES = [
    {"path": None, "url": "/gradio_api/file=/etc/passwd", "meta": MARK},
    {"path": ["/etc/passwd"]},
    {"path": {"path": "/etc/passwd", "meta": MARK}},
    "/etc/passwd",
    ["/etc/passwd"],
    3,
    {},
]


@pytest.fixture(scope="module")
def loaded() -> Predictor:
    torch.manual_seed(0)
    config = SegmenterConfig(**tiny_scenes_config().to_dict() | {"initializer_range": 0.5})
    return Predictor(
        SegmenterForSemanticSegmentation(config).eval(), tiny_scenes_processor(), load_label_set("scenes")
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A server's disk: a cache of uploads, with what somebody put into it, and files beside it."""
    root = tmp_path_factory.mktemp("disk")
    (root / "cache").mkdir()
    (root / "cache-other").mkdir()
    Image.new("RGB", (60, 40), "red").save(root / "secret.png")
    Image.new("RGB", (60, 40), "red").save(root / "cache-other" / "secret.png")
    (root / "text.txt").write_text("no image")
    (root / "cache" / "link.png").symlink_to(root / "secret.png")
    (root / "cache" / "folder").symlink_to(root)
    (root / "cache" / "loop").symlink_to(root / "cache" / "loop")
    os.mkfifo(root / "pipe")
    os.mkfifo(root / "cache" / "pipe")
    with (root / "cache" / "huge.png").open("wb") as file:
        file.write((root / "secret.png").read_bytes())
        file.truncate(1 << 31)
    return root


@pytest.fixture(scope="module")
def api(loaded, root) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(root / "cache"))
        page = build_page({"tiny": loaded, "/models/secret": loaded})
        launch_page(page, prevent_thread_lock=True, quiet=True)
        yield f"{page.local_url}gradio_api/"
        page.close()


@pytest.fixture(scope="module")
def uploaded(api, root) -> dict[str, Any]:
    with (root / "secret.png").open("rb") as file:
        (path,) = httpx.post(f"{api}upload", files={"files": file}).json()
    return {"path": path, "meta": MARK}


def post(api: str, event: str, data: Any, **more: Any) -> dict[str, Any]:
    """What a direct call answers."""
    content = json.dumps({"data": data, **more})
    response = httpx.post(f"{api}{event}", content=content, headers={"Content-Type": "application/json"}, timeout=20)
    assert " at 0x" not in response.text and "Traceback" not in response.text
    return response.json()


def call(api: str, data: Any) -> str:
    """The last line that `call` sends."""
    event = post(api, "call/segment", data)["event_id"]
    with httpx.stream("GET", f"{api}call/segment/{event}", timeout=20) as response:
        return [line for line in response.iter_lines() if line][-1]


def join(api: str, function: int, data: Any, **more: Any) -> dict[str, Any]:
    """What the queue sends at the end."""
    visitor = os.urandom(8).hex()
    post(api, "queue/join", data, fn_index=function, session_hash=visitor, **more)
    with httpx.stream("GET", f"{api}queue/data", params={"session_hash": visitor}, timeout=20) as response:
        told = (json.loads(line.removeprefix("data:")) for line in response.iter_lines() if line.startswith("data:"))
        (done,) = itertools.islice((each for each in told if each["msg"] == "process_completed"), 1)
    return done["output"]


@pytest.fixture(scope="module")
def functions(api) -> dict[str, int]:
    config = httpx.get(api.replace("gradio_api/", "config")).json()
    return {event["api_name"]: event["id"] for event in config["dependencies"]}


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("name", PATHS)
def test_only_uploaded_files_are_read(api, root, capfd, name, marked) -> None:
    value = {"path": PATHS[name].format(root=root, cache=root / "cache")} | ({"meta": MARK} if marked else {})
    assert post(api, "run/segment", [value, "tiny", False])["error"] == NOT_UPLOADED
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("value", VALUES)
def test_what_is_no_file_is_refused_alike(api, capfd, value) -> None:
    assert post(api, "run/segment", [value, "tiny", False])["error"] == NOT_UPLOADED
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["a file outside", "a link to a file", "a pipe", "nothing"])
def test_the_queue_reads_uploaded_files_only(api, root, functions, name) -> None:
    value = {"path": PATHS[name].format(root=root, cache=root / "cache")}
    assert join(api, functions["segment"], [value, "tiny", False])["error"] == NOT_UPLOADED
    assert join(api, functions["attend"], [value, "tiny"], event_data={"x": 1, "y": 1})["error"] == NOT_UPLOADED
    assert NOT_UPLOADED in call(api, [value, "tiny", False])


@pytest.mark.parametrize(
    "asked",
    [None, [], "x", {"loaded": 1}, {"image": 1, "x": 1}, {"x": 1}, {"x": "a", "y": {}}, {"x": True, "y": True}]
    + [{"class_id": 1.5}, {"class_id": [1]}, {"x": 0, "y": 0, "layer": None}, {"x": 0, "y": 0, "other": 1}]
    + [{"x": float("nan"), "y": 0}, {"x": 1e308, "y": 0}],
)
def test_hostile_events_are_refused_in_words(api, functions, uploaded, capfd, asked) -> None:
    output = join(api, functions["attend"], [uploaded, "tiny"], event_data=asked)
    assert output["error"] == NOT_UNDERSTOOD
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("asked", [{"x": 60, "y": 0}, {"x": -1, "y": 0}, {"class_id": 8}, {"class_id": 10**30}])
def test_spots_and_classes_that_do_not_exist_are_refused(api, functions, uploaded, asked) -> None:
    output = join(api, functions["attend"], [uploaded, "tiny"], event_data={**asked, "layer": 0})
    assert "no such spot" in output["error"]


@pytest.mark.parametrize(
    "data",
    [["nothing else"], ["tiny"], ["other", False], [["tiny"], False], [None, False], ["tiny", None], ["tiny", "x"]]
    + [
        ["tiny", {"path": "http://127.0.0.1:9/image.png", "meta": MARK}],
        [{"path": "/etc/passwd", "meta": MARK}, False],
    ]
    + [["tiny", 1e308], ["tiny", [True]]],
)
def test_other_values_are_refused_without_a_word_of_the_server(api, uploaded, capfd, data) -> None:
    assert post(api, "run/segment", [uploaded, *data])["error"] == NOT_UNDERSTOOD
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("number", [99, -1, None, "x", {"path": "/etc/passwd", "meta": MARK}, [0, ["/etc/passwd"]]])
def test_only_drawings_that_exist_are_loaded(api, capfd, number) -> None:
    assert post(api, "run/load_example", [number])["error"] == NOT_UNDERSTOOD
    assert "Traceback" not in capfd.readouterr().err


def test_direct_calls_are_answered_one_after_the_other(api, uploaded, monkeypatch) -> None:
    """Each has an image of up to 50 million pixels in memory, and they do not wait in Gradio's queue."""
    at_work, most = [], []

    def count(*args):
        at_work.append(args)
        most.append(len(at_work))
        time.sleep(0.05)
        image = open_upload(*args)
        at_work.pop()
        return image

    monkeypatch.setattr(app, "open_upload", count)
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: post(api, "run/segment", [uploaded, "tiny", False]), range(6)))
    assert all("data" in answer for answer in answers) and most == [1] * 6


def test_calls_that_wait_as_the_page_stops_are_told_so(api, uploaded, monkeypatch, capfd) -> None:
    with ThreadPoolExecutor(1) as worker, ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(app, "WORKER", worker)
        go_on = threading.Event()
        worker.submit(go_on.wait)
        waiting = [pool.submit(post, api, "run/segment", [uploaded, "tiny", False]) for _ in range(2)]
        while worker._work_queue.qsize() < 2:
            time.sleep(0.01)
        worker.shutdown(wait=False, cancel_futures=True)
        go_on.set()
        assert {each.result()["error"] for each in waiting} == {"The page was stopped."}
    assert "Traceback" not in capfd.readouterr().err


def test_visitors_still_get_their_images_and_drawings(api, functions, uploaded) -> None:
    (found,) = post(api, "run/segment", [uploaded, "tiny", False])["data"]
    assert found["value"]["width"] == 60
    (found,) = join(api, functions["attend"], [uploaded, "tiny"], event_data={"x": 1, "y": 1, "layer": 0})["data"]
    assert found["props"]["attention"]["rows"] == 5 and set(found) == {"props", "__type__"}
    (drawing,) = post(api, "run/load_example", [0])["data"]
    (found,) = post(api, "run/segment", [drawing.get("value", drawing), "tiny", False])["data"]
    assert found["value"]["classes"]


def test_what_an_image_says_besides_its_pixels_stays_here(loaded, tmp_path) -> None:
    exif = Image.Exif()
    exif[0x010E] = 70_000 * "x"  # more than a JPEG takes
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "secret")
    Image.new("RGB", (60, 40), "red").save(tmp_path / "image.png", exif=exif, pnginfo=text, dpi=(72, 72))
    image = open_upload(tmp_path / "image.png", 10_000)
    assert set(image.info) == {"full_size"}
    photograph = describe_segmentation(loaded, image)["photograph"]
    with contextlib.closing(io.BytesIO()) as buffer:
        image.save(buffer, "JPEG", quality=90)
        assert len(photograph) < 2 * len(buffer.getvalue())
