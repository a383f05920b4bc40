"""The npm package and the page that segment in the browser: the class maps of the Python package, in headless Chromium."""

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from segmenter_hf import (
    SegmenterConfig,
    SegmenterForSemanticSegmentation,
    SegmenterImageProcessor,
    SetrConfig,
    SetrForSemanticSegmentation,
)
from segmenter_hf.data.label_sets import load_label_set

from ..tiny_models import tiny_scenes_config
from ..versions import needs_export


pytest.importorskip("onnxruntime", reason="exports need the extra `onnx`")
playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs the extra `browser`")

from segmenter_hf.export.onnx import export_onnx  # noqa: E402


pytestmark = needs_export


WEB = Path(__file__).parents[2] / "demo" / "web"
NO_NETWORK = re.compile(
    "ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENETUNREACH|EHOSTUNREACH|ERR_SOCKET_TIMEOUT"
)
CHROMIUM_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
SCENES = load_label_set("scenes")
WINDOWS = {"window_size": 32, "window_stride": 24, "patch_size": 8, "image_std": [0.2, 0.25, 0.3]}
SIZES = [(151, 83), (80, 200), (23, 31), (44, 44)]  # width, height: resized, cut, shorter than a window, as it is

# Runs in the page: segments images with the package, and gives the maps as lists.
SEGMENT = """async ({model, images, load, options}) => {
    const {Segmenter} = await import("/dist/index.js");
    const progress = new Set();
    const segmenter = await Segmenter.from(model, {...load, onProgress: ({stage}) => progress.add(stage)});
    const found = [];
    for (const image of images) {
        const blob = await (await fetch(image)).blob();
        const onProgress = ({stage}) => progress.add(stage);
        const {classMap, labels, height, width, confidence} = await segmenter(blob, {...options, onProgress});
        found.push({classMap: [...classMap], labels, height, width, confidence: confidence && [...confidence]});
    }
    const {device, labels} = segmenter;
    segmenter.dispose();
    return {found, device, names: labels.map(({name}) => name), progress: [...progress]};
}"""


def run(command: list[str], folder: Path, timeout: int = 300) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Iterator[Path]:
    """A copy of `demo/web` with its dependencies, built."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("there is no node or npm: install Node.js 20 or later")
    version = run(["node", "--version"], WEB).stdout.strip()
    if int(version.lstrip("v").split(".")[0]) < 20:
        pytest.skip(f"node is {version}: install Node.js 20 or later")
    folder = tmp_path_factory.mktemp("web") / "web"
    shutil.copytree(WEB, folder, ignore=shutil.ignore_patterns("node_modules", "dist", "build", ".test-build"))
    if (WEB / "node_modules").is_dir():
        (folder / "node_modules").symlink_to(WEB / "node_modules")
    else:
        installed = run(["npm", "ci", "--prefer-offline"], folder)
        if installed.returncode and NO_NETWORK.search(installed.stderr):
            pytest.skip("the npm registry cannot be reached: run `npm ci` in demo/web once")
        assert installed.returncode == 0, installed.stderr
    finished = run(["npm", "run", "build"], folder)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    yield folder
    shutil.rmtree(folder)  # onnxruntime-web is large


class Served(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, with the headers that `demo/web/page/README.md` asks a Space for."""

    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        super().end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """The address of a folder on this machine."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Served, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class TinyModel(NamedTuple):
    model: torch.nn.Module
    processor: SegmenterImageProcessor


def make_models() -> dict[str, TinyModel]:
    """Models whose logits differ from place to place: several classes, one class, logits finer than patches, padded on all sides."""
    torch.manual_seed(0)
    fields = {**tiny_scenes_config().to_dict(), "initializer_range": 0.3}
    one_class = {**fields, "id2label": {0: "road"}, "label2id": {"road": 0}, "num_labels": 1}
    setr = {name: fields[name] for name in ("hidden_size", "num_attention_heads", "intermediate_size", "image_size")}
    setr |= {"patch_size": 8, "num_hidden_layers": 1, "out_indices": [0], "decoder_hidden_size": 8}
    setr |= {"id2label": SCENES.id2label, "label2id": SCENES.label2id, "initializer_range": 0.3}
    models = {
        "several": SegmenterForSemanticSegmentation(SegmenterConfig(**fields)),
        "one_class": SegmenterForSemanticSegmentation(SegmenterConfig(**one_class)),
        "setr": SetrForSemanticSegmentation(SetrConfig(decoder_type="pup", decoder_num_convs=2, **setr)),
        "centered": SegmenterForSemanticSegmentation(SegmenterConfig(**{**fields, "padding": "center"})),
    }
    size = {"shortest_edge": 44, "longest_edge": 90}
    processors = dict.fromkeys(models, SegmenterImageProcessor(size=size, **WINDOWS))
    processors["setr"] = SegmenterImageProcessor(size=size, scales=[0.75, 1.25], do_flip=True, **WINDOWS)
    odd = {**WINDOWS, "window_size": 36, "window_stride": 28, "padding": "center"}  # no multiple of the patches
    processors["centered"] = SegmenterImageProcessor(size=size, **odd)
    with torch.no_grad():  # logits on both sides of 0
        norm = models["one_class"].decode_head.mask_norm
        norm.bias -= models["one_class"].eval()(torch.randn(4, 3, 32, 40)).logits.mean()
    return {name: TinyModel(model.eval(), processors[name]) for name, model in models.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[dict[str, TinyModel], Path]:
    """The models and the folder with their exports."""
    folder = tmp_path_factory.mktemp("models")
    models = make_models()
    for name, (model, processor) in models.items():
        model.save_pretrained(folder / "saved" / name)
        processor.save_pretrained(folder / "saved" / name)
        export_onnx(folder / "saved" / name, folder / name, dtypes=["fp32", "fp16", "q8"])
    coarse = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    (folder / "images").mkdir()
    for width, height in SIZES:
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        image.save(folder / "images" / f"{width}x{height}.png")
    return models, folder


@pytest.fixture(scope="module")
def address(built, models) -> Iterator[str]:
    _, folder = models
    (built / "build" / "models").symlink_to(folder)
    (built / "build" / "dist").symlink_to(built / "dist")
    (built / "build" / "empty.html").write_text("<!doctype html><title>empty</title>")
    with serve(built / "build") as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as browsers:
        found = shutil.which("chromium") or shutil.which("google-chrome") or browsers.chromium.executable_path
        if not Path(found).exists():
            pytest.skip("there is no Chromium: `playwright install chromium` gets one")
        browser = browsers.chromium.launch(executable_path=found, args=CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address) -> Iterator["playwright.Page"]:
    """A page that may ask no other server, and whose errors fail the test."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    asked, failed = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: failed.append(error))
    yield page
    page.close()
    assert not failed
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]


def expected_result(
    models: dict[str, TinyModel], name: str, path: Path, **kwargs: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The class map of the Python package and the probability of each pixel's class."""
    model, processor = models[name]
    with torch.no_grad(), Image.open(path) as image:
        outputs = model(**processor(image, **kwargs))
    (result,) = processor.post_process_semantic_segmentation(outputs, return_segmentation_scores=True)
    return result.segmentation.numpy(), result.segmentation_scores.amax(0).numpy()


def segment_in(page: "playwright.Page", address: str, name: str, load: dict, options: dict) -> dict[str, Any]:
    page.goto(f"{address}/empty.html")
    images = [f"/models/images/{width}x{height}.png" for width, height in SIZES]
    return page.evaluate(SEGMENT, {"model": f"/models/{name}", "images": images, "load": load, "options": options})


@pytest.mark.parametrize("name", ["several", "one_class", "setr", "centered"])
def test_class_maps_are_those_of_the_package(name, page, address, models) -> None:
    told = segment_in(page, address, name, {}, {"confidence": True})
    assert told["device"] == "wasm" and set(told["progress"]) == {"download", "prepare", "windows", "merge"}
    seen = set()
    for (width, height), found in zip(SIZES, told["found"]):
        classes, confidence = expected_result(models[0], name, models[1] / "images" / f"{width}x{height}.png")
        assert (found["height"], found["width"]) == classes.shape == (height, width)
        class_map = np.array(found["classMap"]).reshape(height, width)
        assert (class_map == classes).mean() >= 0.999
        np.testing.assert_allclose(np.reshape(found["confidence"], (height, width)), confidence, atol=2e-3)
        shares = [label["share"] for label in found["labels"]]
        assert shares == pytest.approx(np.bincount(class_map.ravel(), minlength=len(shares)) / class_map.size)
        seen |= set(classes.ravel().tolist())
    assert len(seen) > (1 if name == "one_class" else 2)
    assert told["names"] == (["background", "road"] if name == "one_class" else list(SCENES.labels))


def test_scales_and_flip_are_those_of_the_package(page, address, models) -> None:
    told = segment_in(page, address, "several", {}, {"scales": [0.5, 1.5], "flip": True, "windowBatchSize": 3})
    for (width, height), found in zip(SIZES, told["found"]):
        path = models[1] / "images" / f"{width}x{height}.png"
        classes, _ = expected_result(models[0], "several", path, scales=[0.5, 1.5], do_flip=True)
        assert (np.array(found["classMap"]).reshape(height, width) == classes).mean() >= 0.999


@pytest.mark.parametrize(("dtype", "least"), [("fp16", 0.98), ("q8", 0.9)])
def test_other_dtypes_run_in_the_browser(dtype, least, page, address, models) -> None:
    told = segment_in(page, address, "several", {"dtype": dtype}, {})
    for (width, height), found in zip(SIZES, told["found"]):
        classes, _ = expected_result(models[0], "several", models[1] / "images" / f"{width}x{height}.png")
        assert (np.array(found["classMap"]).reshape(height, width) == classes).mean() >= least


def test_a_missing_model_is_an_error_in_words(page, address) -> None:
    page.goto(f"{address}/empty.html")
    for model, load, said in [
        ("/models/nowhere/", {}, "there is no preprocessor_config.json"),
        ("/models/several/", {"dtype": "q4"}, "there is no onnx/model_q4.onnx"),
        ("ftp://127.0.0.1/", {}, "Expected the http address"),
    ]:
        with pytest.raises(playwright.Error, match=said):
            page.evaluate(SEGMENT, {"model": model, "images": [], "load": load, "options": {}})


# What the layer over the image shows, as text.
PAINTED = """() => {
    const canvas = document.querySelector("#overlay");
    return canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.join();
}"""


@pytest.mark.parametrize("width", [375, 1280])
def test_the_page_segments_on_a_phone_and_a_desk(width, page, address, models, tmp_path) -> None:
    page.set_viewport_size({"width": width, "height": 812})
    page.goto(f"{address}/?model=models/several/")
    page.get_by_text(f"{len(SCENES.labels)} classes, runs on the processor").wait_for()
    (tmp_path / "text.png").write_text("no image")
    page.set_input_files("#image", tmp_path / "text.png")
    page.get_by_text("This file cannot be read as an image").wait_for()

    path = models[1] / "images" / "151x83.png"
    page.set_input_files("#image", path)
    page.locator(".legend button").first.wait_for()
    assert page.locator("#error").is_hidden() and page.locator("#working").is_hidden()
    expected, _ = expected_result(models[0], "several", path)
    present = sorted(set(expected.ravel().tolist()), key=lambda label: -(expected == label).sum())
    shares = page.locator(".share").all_inner_texts()
    assert page.locator(".legend .name").all_inner_texts() == [SCENES.labels[label] for label in present]
    assert shares[0] == f"{100 * (expected == present[0]).mean():.1f} %"

    classes = page.evaluate(PAINTED)
    page.locator("#overlay").hover(position={"x": 3, "y": 3})
    assert re.fullmatch(f"{SCENES.labels[expected[0, 0]]}, \\d+ % sure", page.locator("#tip").inner_text())
    page.locator(".legend button").first.click()
    assert page.evaluate(PAINTED) != classes
    page.locator(".legend button").first.click()
    assert page.evaluate(PAINTED) == classes
    page.locator("#opacity").fill("30")
    assert page.locator("#overlay").evaluate("canvas => canvas.style.opacity") == "0.3"
    page.get_by_text("How sure").click()
    assert page.evaluate(PAINTED) != classes
    assert page.evaluate("document.documentElement.scrollWidth") == width

    with page.expect_download() as download:
        page.get_by_role("button", name="Label map").click()
    assert download.value.suggested_filename == "151x83_labels.png"
    with Image.open(download.value.path()) as label_map:
        assert (np.array(label_map) == expected).mean() >= 0.999
        assert np.array_equal(np.reshape(label_map.getpalette(), (-1, 3))[: SCENES.num_labels], SCENES.palette)
    with page.expect_download() as download:
        page.get_by_role("button", name="Overlay").click()
    assert Image.open(download.value.path()).size == (151, 83)


def test_a_model_comes_from_a_folder_or_an_archive(page, address, models, tmp_path) -> None:
    folder = models[1] / "one_class"
    with zipfile.ZipFile(tmp_path / "one_class.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in folder.rglob("*"):
            archive.write(path, path.relative_to(folder.parent))
    page.goto(address)
    page.set_input_files("#image", models[1] / "images" / "80x200.png")
    page.get_by_text("Choose a model to see what is where").wait_for()
    for selector, source in (("#files", tmp_path / "one_class.zip"), ("#folder", folder)):
        page.set_input_files(selector, source)
        page.get_by_text(f"{source.name}: 2 classes").wait_for()
        page.locator("#working").wait_for(state="hidden")
        assert set(page.locator(".legend .name").all_inner_texts()) == {"background", "road"}
    (tmp_path / "notes.zip").write_text("no archive")
    page.set_input_files("#folder", folder)
    page.set_input_files("#files", tmp_path / "notes.zip")  # while the other is loaded
    page.get_by_text("Expected a ZIP archive").wait_for()


def test_the_page_shows_the_image_chosen_last_and_says_what_is_left_out(page, address, models, tmp_path) -> None:
    page.goto(f"{address}/?model=models/several/&dtype=q4")
    page.get_by_text("asks for dtype=q4: expected fp32").wait_for()
    page.goto(f"{address}/?model=models/several/")
    page.get_by_text("runs on the processor").wait_for()
    Image.new("RGB", (4000, 3000), "green").save(tmp_path / "large.png")
    page.set_input_files("#image", tmp_path / "large.png")
    page.set_input_files("#image", models[1] / "images" / "80x200.png")  # which is decoded first
    page.locator(".legend button").first.wait_for()
    page.locator("#working").wait_for(state="hidden")
    assert page.evaluate("[photo.width, photo.height]") == [80, 200]
    # The dialog of files gives one, a drop may hold several.
    page.evaluate("""async () => {
        const transfer = new DataTransfer();
        for (const name of ["80x200.png", "151x83.png"]) {
            const answer = await fetch(`models/images/${name}`);
            transfer.items.add(new File([await answer.blob()], name));
        }
        document.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer }));
    }""")
    page.get_by_text("the first is taken, 1 more is left out").wait_for()


def test_an_image_too_long_for_the_browser_is_an_error_in_words(page, address, models) -> None:
    Image.new("RGB", (70000, 20), "white").save(models[1] / "images" / "long.png")
    page.goto(f"{address}/empty.html")
    images = ["/models/images/long.png"]
    with pytest.raises(playwright.Error, match="cannot read an image of 70000 x 20 pixels"):
        page.evaluate(SEGMENT, {"model": "/models/several", "images": images, "load": {}, "options": {}})


def test_the_page_works_in_a_worker_and_paints_before_the_model(page, address) -> None:
    page.goto(f"{address}/?model=models/several/")
    page.get_by_text("runs on the processor").wait_for()
    assert [worker.url for worker in page.workers] == [f"{address}/lib/worker.js"]
    before_paint = page.evaluate("""() => {
        const [paint] = performance.getEntriesByName("first-contentful-paint");
        return performance.getEntriesByType("resource").filter((entry) => entry.startTime < paint.startTime);
    }""")
    assert not [entry["name"] for entry in before_paint if entry["name"].endswith((".wasm", ".onnx"))]


def test_the_node_tests_pass(built) -> None:
    finished = run(["npm", "test"], built)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_the_package_holds_what_it_says(built) -> None:
    package = json.loads((built / "package.json").read_text())
    packed = json.loads(run(["npm", "pack", "--dry-run", "--json"], built).stdout)[0]
    names = {file["path"] for file in packed["files"]}
    targets = {target for entry in (".", "./core") for target in package["exports"][entry].values()}
    assert {target.removeprefix("./") for target in targets} <= names
    assert {"dist/worker.js", "dist/ort/ort-wasm-simd-threaded.wasm"} <= names
    assert all(name.startswith("dist/") or name in {"package.json", "README.md"} for name in names)
    lock = (WEB / "package-lock.json").read_text()
    assert '"resolved"' not in lock and json.loads(lock)["packages"][""]["version"] == package["version"]
    page = (WEB / "page" / "index.html").read_text()
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page)
    assert os.path.getsize(built / "build" / "page.js") < 50_000


@pytest.mark.parametrize("name", ["several", "one_class"])
def test_transformers_js_loads_the_export(name, models, tmp_path) -> None:
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("there is no node or npm: install Node.js 20 or later")
    example = WEB / "examples" / "transformers"
    folder = tmp_path / "example"
    shutil.copytree(example, folder, ignore=shutil.ignore_patterns("node_modules"))
    if (example / "node_modules").is_dir():
        (folder / "node_modules").symlink_to(example / "node_modules")
    else:
        installed = run(["npm", "ci", "--prefer-offline"], folder)
        if installed.returncode and NO_NETWORK.search(installed.stderr):
            pytest.skip("the npm registry cannot be reached: run `npm ci` in demo/web/examples/transformers once")
        assert installed.returncode == 0, installed.stderr
    model, processor = models[0][name]
    path = tmp_path / "image.png"  # of the size that the processor resizes to
    image = Image.open(models[1] / "images" / "151x83.png").crop((0, 0, 60, 44))
    image.save(path)
    finished = run(["node", "segment.mjs", str(models[1]), name, str(path)], folder)
    shutil.rmtree(folder)
    assert finished.returncode == 0, finished.stderr
    with torch.no_grad():
        logits = model(processor(image, scales=[1.0], do_flip=False)["pixel_values"][:1]).logits[0]
    classes = (logits[0] > 0).long() if name == "one_class" else logits.argmax(0)
    names = ["background", "road"] if name == "one_class" else list(SCENES.labels)
    expected = classes.flatten().bincount(minlength=len(names)).tolist()
    assert json.loads(finished.stdout) == dict(zip(names, expected))
