"""The web page: what the server finds, how it refuses, and the page itself in a browser on a desk and a phone."""

import base64
import configparser
import contextlib
import io
import itertools
import json
import runpy
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from segmenter_hf import SegmenterConfig, SegmenterForSemanticSegmentation, SegmenterImageProcessor
from segmenter_hf.cli.demo import main
from segmenter_hf.data.label_sets import load_label_set
from segmenter_hf.inference.attention import class_attention, patch_attention
from segmenter_hf.inference.predictor import Predictor
from segmenter_hf.inference.protocol import InferenceProtocol

from ..tiny_models import tiny_scenes_config, tiny_scenes_processor


gr = pytest.importorskip("gradio", reason="the page needs the extra `demo`")

from segmenter_hf.demo.app import (  # noqa: E402
    MAX_IMAGE_PIXELS,
    build_page,
    describe_attention,
    describe_segmentation,
    launch_page,
    load_models,
    open_upload,
    short_names,
    train_scenes_model,
)


ROOT = Path(__file__).parents[2]
CHROMIUM_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]

# What the layer over the photograph shows, as text.
PAINTED = """() => {
    const canvas = document.querySelector(".layer");
    return canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.join();
}"""


@pytest.fixture(scope="module")
def loaded() -> Predictor:
    """A model that sees several classes in noise."""
    torch.manual_seed(0)
    config = SegmenterConfig(**tiny_scenes_config().to_dict() | {"initializer_range": 0.5})
    return Predictor(
        SegmenterForSemanticSegmentation(config).eval(), tiny_scenes_processor(), load_label_set("scenes")
    )


@pytest.fixture(scope="module")
def picture_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("images") / "noise.png"
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((90, 60), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture(scope="module")
def address(loaded) -> Iterator[str]:
    page = build_page({"tiny": loaded})
    launch_page(page, prevent_thread_lock=True, quiet=True)
    yield page.local_url
    page.close()


def from_data_url(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_the_browser_gets_classes_probabilities_and_areas(loaded, picture_path) -> None:
    image = open_upload(picture_path, MAX_IMAGE_PIXELS)
    predictor = loaded.with_protocol(InferenceProtocol.multi_scale_flip())
    expected = predictor(image, return_scores=True)
    segmentation = expected.class_map.numpy()
    found = describe_segmentation(predictor, image)
    pixels = np.asarray(from_data_url(found["pixels"])).astype(int)
    np.testing.assert_array_equal(pixels[..., 0] + 256 * pixels[..., 1], segmentation)
    np.testing.assert_allclose(pixels[..., 2] / 255, expected.scores.amax(0).numpy(), atol=1 / 255)
    np.testing.assert_array_equal(np.asarray(from_data_url(found["label_map"])), segmentation)
    assert (found["width"], found["height"]) == from_data_url(found["photograph"]).size == (90, 60)
    shares = {entry["name"]: entry["share"] for entry in found["classes"]}
    assert len(shares) > 1 and list(shares.values()) == sorted(shares.values(), reverse=True)
    assert shares == pytest.approx(
        {loaded.label_set.labels[i]: (segmentation == i).mean() for i in np.unique(segmentation)}
    )
    json.dumps(found)


def test_large_images_are_reduced_and_their_label_maps_are_not(loaded, tmp_path) -> None:
    Image.new("L", (2000, 3000), 90).save(tmp_path / "large.jpg")
    found = describe_segmentation(loaded, open_upload(tmp_path / "large.jpg", MAX_IMAGE_PIXELS))
    assert from_data_url(found["pixels"]).size == (found["width"], found["height"]) == (853, 1280)
    assert from_data_url(found["label_map"]).size == (2000, 3000)


def test_uploads_are_turned_upright(tmp_path) -> None:
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (20, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    upright = open_upload(tmp_path / "turned.png", MAX_IMAGE_PIXELS)
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5)) == (255, 0, 0) and upright.getpixel((10, 35)) == (0, 0, 255)


def test_bad_uploads_are_refused_in_words(tmp_path, picture_path) -> None:
    (tmp_path / "text.png").write_text("no image")
    damaged = picture_path.read_bytes()
    (tmp_path / "damaged.png").write_bytes(damaged[: len(damaged) // 2])
    Image.new("1", (901, 100)).save(tmp_path / "narrow.png")
    Image.new("1", (15_000, 12_000)).save(tmp_path / "bomb.png")
    Image.new("RGBA", (90, 60)).save(tmp_path / "four.tif")
    for name, limit, said in [
        ("text.png", 10_000, "cannot be read"),
        ("damaged.png", 10_000, "damaged"),
        (picture_path, 5_000, "90 x 60 pixels, and this page takes at most 5,000"),
        ("narrow.png", 100_000, "8 times"),
        ("bomb.png", 10_000, "much too large"),
        ("four.tif", 10_000, "has 4 channels, and this page"),
        ("missing.png", 10_000, "Choose it again"),
    ]:
        with pytest.raises(gr.Error, match=said):
            open_upload(tmp_path / name, limit)


def test_attention_is_the_average_and_each_head(loaded, picture_path) -> None:
    image = open_upload(picture_path, MAX_IMAGE_PIXELS)
    for asked, expected in [
        ({"x": 80, "y": 10}, patch_attention(loaded, image, (80, 10), 0)),
        ({"class_id": 3}, class_attention(loaded, image, 3, 0)),
    ]:
        found = describe_attention(loaded, image, **asked, layer=0)
        maps = np.frombuffer(base64.b64decode(found["maps"]), np.uint8).reshape(-1, found["rows"], found["columns"])
        assert maps.shape == (1 + len(expected), *expected.shape[1:])
        for found_map, attention in zip(maps, [expected.mean(0), *expected]):
            np.testing.assert_allclose(found_map / 255, attention / attention.max(), atol=1 / 255)


@pytest.mark.parametrize("asked", [{}, {"x": 90, "y": 0}, {"x": 0, "y": 0, "layer": 7}, {"class_id": "sky"}])
def test_attention_of_nothing_is_refused(loaded, picture_path, asked) -> None:
    with pytest.raises(gr.Error):
        describe_attention(loaded, open_upload(picture_path, MAX_IMAGE_PIXELS), **asked)


def test_a_page_needs_a_model() -> None:
    with pytest.raises(ValueError, match="at least one model"):
        build_page({})


def test_fifty_requests_at_once_are_answered_after_a_client_has_left(address, picture_path) -> None:
    config = httpx.get(f"{address}config").json()
    (segment,) = (event["id"] for event in config["dependencies"] if event["api_name"] == "segment")
    with picture_path.open("rb") as file:
        (uploaded,) = httpx.post(f"{address}gradio_api/upload", files={"files": file}).json()
    payload = {"path": uploaded, "meta": {"_type": "gradio.FileData"}}

    def join(visitor: str, multi_scale_flip: bool) -> None:
        asked = {"data": [payload, "tiny", multi_scale_flip], "fn_index": segment, "session_hash": visitor}
        httpx.post(f"{address}gradio_api/queue/join", json=asked, timeout=120).raise_for_status()

    def messages(visitor: str) -> contextlib.AbstractContextManager[httpx.Response]:
        return httpx.stream("GET", f"{address}gradio_api/queue/data", params={"session_hash": visitor}, timeout=120)

    join("leaves", multi_scale_flip=True)
    with messages("leaves") as response:
        response.raise_for_status()  # and nothing is read

    def answer(number: int) -> dict:
        join(f"visitor {number}", multi_scale_flip=number % 2 == 1)
        with messages(f"visitor {number}") as response:
            told = (
                json.loads(line.removeprefix("data:")) for line in response.iter_lines() if line.startswith("data:")
            )
            (done,) = itertools.islice((each for each in told if each["msg"] == "process_completed"), 1)
        assert done["success"], done
        return done["output"]["data"][0]

    with ThreadPoolExecutor(50) as threads:
        answers = list(threads.map(answer, range(50)))
    for number, found in enumerate(answers):
        assert found == answers[number % 2]
    assert answers[0]["value"]["classes"] != answers[1]["value"]["classes"]


def test_the_page_works_in_a_browser(address, picture_path, tmp_path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs the extra `browser`")
    with playwright.sync_playwright() as browsers:
        found = shutil.which("chromium") or shutil.which("google-chrome") or browsers.chromium.executable_path
        if not Path(found).exists():
            pytest.skip("there is no Chromium: `playwright install chromium` gets one")
        browser = browsers.chromium.launch(executable_path=found, args=CHROMIUM_ARGUMENTS)
        page = browser.new_page(viewport={"width": 375, "height": 812})  # a phone
        asked, failed = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: failed.append(error))
        page.goto(address)

        (tmp_path / "text.png").write_text("no image")
        page.set_input_files("input[type=file]", tmp_path / "text.png")
        page.get_by_text("This file cannot be read as an image").wait_for()
        page.set_input_files("input[type=file]", picture_path)
        page.locator(".legend button").first.wait_for()

        classes = page.evaluate(PAINTED)
        page.locator(".stage").hover()
        assert page.locator(".tip").inner_text().endswith("% sure")
        page.locator(".legend button").first.click()
        assert page.evaluate(PAINTED) != classes
        page.locator(".opacity input").fill("30")
        assert page.locator(".layer").evaluate("canvas => canvas.style.opacity") == "0.3"
        page.get_by_text("How sure", exact=True).click()
        assert page.locator(".average").inner_text().endswith("%")
        assert page.evaluate("document.documentElement.scrollWidth") == 375

        page.get_by_text("Attention", exact=True).click()
        page.wait_for_function("document.querySelectorAll('.head option').length == 3")  # the average and two heads
        average = page.evaluate(PAINTED)
        page.locator(".head select").select_option("2")
        second_head = page.evaluate(PAINTED)
        assert second_head != average
        page.locator(".stage").click(position={"x": 5, "y": 5})
        page.wait_for_function(f"before => ({PAINTED})() !== before", arg=second_head)
        of_corner = page.evaluate(PAINTED)
        page.locator(".source select").select_option(index=1)
        page.wait_for_function(f"before => ({PAINTED})() !== before", arg=of_corner)

        with page.expect_download() as download:
            page.locator(".download").click()
        assert Image.open(download.value.path()).size == (90, 60)
        page.set_viewport_size({"width": 1280, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") == 1280
        assert not failed
        assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
        browser.close()


def test_the_default_model_is_trained_into_the_directory_asked_for(tmp_path) -> None:
    demo = json.loads((ROOT / "src" / "segmenter_hf" / "training" / "demo.json").read_text(encoding="utf-8"))
    small = {"scenes_train": 4, "scenes_validation": 1, "max_steps": 1, "eval_strategy": "no", "save_strategy": "no"}
    small |= {"load_best_model_at_end": False, "bf16": False, "disable_tqdm": True}
    (tmp_path / "small.json").write_text(json.dumps(demo | small), encoding="utf-8")
    train_scenes_model(tmp_path / "small.json", tmp_path / "model")
    ((name, loaded),) = load_models([tmp_path / "model"]).items()
    assert name == f"{tmp_path.name}/model" and loaded.label_set == load_label_set("scenes")
    assert (tmp_path / "model" / "results.json").is_file()


def test_the_space_is_complete(loaded, tmp_path, monkeypatch) -> None:
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.processor.save_pretrained(tmp_path / "model")
    shutil.copytree(ROOT / "space", tmp_path, dirs_exist_ok=True)
    front_matter = yaml.safe_load((tmp_path / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    monkeypatch.delenv("MODELS", raising=False)
    page = runpy.run_path(str(tmp_path / front_matter["app_file"]))["page"]
    assert isinstance(page, gr.Blocks)

    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    assert (ROOT / "space" / "requirements.txt").read_text().split() == setup["options"]["install_requires"].split()
    least = setup["options.extras_require"]["demo"].strip().partition(">=")[2].partition(",")[0]
    assert front_matter["sdk"] == "gradio" and front_matter["sdk_version"].startswith(f"{least}.")


def test_a_plain_client_asks_the_api_of_the_page(address, loaded, picture_path) -> None:
    with picture_path.open("rb") as file:
        (uploaded,) = httpx.post(f"{address}gradio_api/upload", files={"files": file}).json()
    asked = {"data": [{"path": uploaded, "meta": {"_type": "gradio.FileData"}}, "tiny", False]}
    event = httpx.post(f"{address}gradio_api/call/segment", json=asked).raise_for_status().json()["event_id"]
    answer = httpx.get(f"{address}gradio_api/call/segment/{event}", timeout=120).raise_for_status().text
    kind, _, told = answer.strip().rpartition("\n")
    assert kind.endswith("event: complete")
    (found,) = json.loads(told.removeprefix("data: "))
    expected = describe_segmentation(loaded, open_upload(picture_path, MAX_IMAGE_PIXELS))
    assert found["value"]["classes"] == json.loads(json.dumps(expected["classes"]))
    label_map = np.asarray(from_data_url(found["value"]["label_map"]))
    np.testing.assert_array_equal(label_map, np.asarray(from_data_url(expected["label_map"])))


def test_models_have_short_names_that_differ(tmp_path) -> None:
    for folder in ("a/streets/model", "b/streets/model", "fields"):
        (tmp_path / folder).mkdir(parents=True)
    streets, other, fields = (str(tmp_path / name) for name in ("a/streets/model", "b/streets/model", "fields"))
    assert list(short_names([streets, fields, "owner/name"]).values()) == ["streets/model", "fields", "owner/name"]
    assert list(short_names([streets, other, streets]).values()) == ["a/streets/model", "b/streets/model"]


def test_drawings_are_offered_only_to_models_of_their_classes(loaded, tmp_path) -> None:
    config = SegmenterConfig(**tiny_scenes_config().to_dict() | {"id2label": {0: "a", 1: "b"}, "num_labels": 2})
    SegmenterForSemanticSegmentation(config).save_pretrained(tmp_path / "other")
    tiny_scenes_processor().save_pretrained(tmp_path / "other")
    (other,) = load_models([tmp_path / "other"]).values()
    for models, visible in (({"scenes": loaded, "other": other}, True), ({"other": other, "scenes": loaded}, False)):
        page = build_page(models)
        (group,) = (block for block in page.blocks.values() if isinstance(block, gr.Group))
        assert group.visible is visible
        (change,) = (fn for fn in page.fns.values() if fn.outputs == [group])
        assert [change.fn(name)["visible"] for name in ("scenes", "other")] == [True, False]


def test_long_class_names_are_shown_whole() -> None:
    css = (ROOT / "src" / "segmenter_hf" / "demo" / "app.css").read_text(encoding="utf-8")
    (rule,) = (part for part in css.split("}") if part.strip().startswith(".legend .name"))
    assert "overflow-wrap: anywhere" in rule and "ellipsis" not in css


def test_a_model_of_other_channels_is_refused(tmp_path) -> None:
    config = tiny_scenes_config()
    config.num_channels = 4
    SegmenterForSemanticSegmentation(config).save_pretrained(tmp_path / "model")
    SegmenterImageProcessor(image_mean=[0.5] * 4, image_std=[0.5] * 4, do_convert_rgb=False).save_pretrained(
        tmp_path / "model"
    )
    with pytest.raises(ValueError, match="the demo shows RGB images, and the model takes 4 channels"):
        load_models([tmp_path / "model"])
    SegmenterForSemanticSegmentation(tiny_scenes_config()).save_pretrained(tmp_path / "deep")
    SegmenterImageProcessor(value_range=[0, 4095]).save_pretrained(tmp_path / "deep")
    with pytest.raises(ValueError, match=r"shows images of 8 bits, and the model takes values of \[0, 4095\]"):
        load_models([tmp_path / "deep"])


def test_an_export_is_not_trained_over(tmp_path, monkeypatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("segmenter_hf.demo.app.train_scenes_model", lambda *_: pytest.fail("trained"))
    with pytest.raises(SystemExit):
        main(["--output_dir", str(tmp_path), "--runtime", "onnxruntime"])
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
