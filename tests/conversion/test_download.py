"""Published checkpoints come whole, of one version and checked, or not at all; and the script that brings them."""

import hashlib
import json
import shlex
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from segmenter_hf.cli import convert as script
from segmenter_hf.conversion import download
from segmenter_hf.conversion.download import cache_folder, download_checkpoint, encoder_beside
from segmenter_hf.hub import published_models
from segmenter_hf.hub.published_models import PublishedModel, load_published_models


FIXTURES = Path(__file__).parents[1] / "fixtures"
WEIGHTS = bytes(torch.randint(256, (300_000,), generator=torch.Generator().manual_seed(1), dtype=torch.uint8).tolist())
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()


@dataclass
class Server:
    """What the server holds, how it misbehaves, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    address: str = ""
    ranges: bool = True
    honours_if_range: bool = True
    cuts: list[int] = field(default_factory=list)  # bytes of an answer after which the connection ends, by request
    statuses: list[int] = field(default_factory=list)  # answers, by request
    redirect: str | None = None
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # path and range

    def model(self, **changes: object) -> PublishedModel:
        published = load_published_models()["mmseg-segmenter-vit-t-mask-ade20k"]
        url = f"{self.address}/weights-{SHA256[:8]}.pth"
        return replace(published, **{"checkpoint_url": url, "sha256_prefix": SHA256[:8], **changes})


class Handler(BaseHTTPRequestHandler):
    server_state: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        state = self.server_state
        asked = self.headers.get("Range")
        state.asked.append((self.path, asked))
        if state.redirect:
            return self.answer(302, b"", {"Location": state.redirect})
        if state.statuses and (status := state.statuses.pop(0)) != 200:
            return self.answer(status, b"")
        if self.path not in state.files:
            return self.answer(404, b"")
        content = state.files[self.path]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        same = not state.honours_if_range or self.headers.get("If-Range") == headers["ETag"]
        if not (asked and state.ranges and same):
            return self.answer(200, content, headers)
        start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if start >= len(content):
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.answer(206, content[start:], headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        cut = self.server_state.cuts.pop(0) if body and self.server_state.cuts else len(body)
        self.wfile.write(body[:cut])
        self.close_connection = cut < len(body)


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(download, "RETRY_SECONDS", 0)
    monkeypatch.setenv("NO_PROXY", "*")
    state = Server()
    http = ThreadingHTTPServer(("127.0.0.1", 0), type("StatefulHandler", (Handler,), {"server_state": state}))
    state.address = f"http://127.0.0.1:{http.server_port}"
    state.files[f"/weights-{SHA256[:8]}.pth"] = WEIGHTS
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


def fetch(model: PublishedModel, cache_dir: Path) -> Path:
    return download_checkpoint(model, cache_dir, show_progress=False, allow_local_http=True)


def files_of(model: PublishedModel, cache_dir: Path) -> list[str]:
    return sorted(path.name for path in cache_folder(model, cache_dir).iterdir() if path.name != ".lock")


def test_a_checkpoint_comes_whole_and_only_once(server, tmp_path, capfd) -> None:
    model = server.model()
    path = download_checkpoint(model, tmp_path, allow_local_http=True)
    assert path == tmp_path / model.name / f"weights-{SHA256[:8]}.pth"
    assert path.read_bytes() == WEIGHTS
    assert files_of(model, tmp_path) == [path.name]
    assert "293k/293k" in capfd.readouterr().err
    assert fetch(model, tmp_path) == path
    assert len(server.asked) == 1


def test_the_configuration_lies_beside_the_checkpoint(server, tmp_path) -> None:
    server.files["/variant.yml"] = b"amp: false\n"
    path = fetch(server.model(config_url=f"{server.address}/variant.yml"), tmp_path)
    assert path.with_name("variant.yml").read_bytes() == b"amp: false\n"


def test_dropped_connections_are_resumed(server, tmp_path) -> None:
    server.cuts = [100_000, 50_000]
    assert fetch(server.model(), tmp_path).read_bytes() == WEIGHTS
    assert [asked for _, asked in server.asked] == [None, "bytes=100000-", "bytes=150000-"]


def test_a_later_run_resumes(server, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    server.cuts = [100_000]
    with pytest.raises(ConnectionError, match="could not be downloaded"):
        fetch(server.model(), tmp_path)
    assert files_of(server.model(), tmp_path) == [f"weights-{SHA256[:8]}.pth.{end}" for end in ("part", "version")]
    assert fetch(server.model(), tmp_path).read_bytes() == WEIGHTS
    assert server.asked[-1][1] == "bytes=100000-"
    assert len(files_of(server.model(), tmp_path)) == 1


def test_a_server_that_cannot_resume_sends_all_again(server, tmp_path) -> None:
    server.ranges, server.cuts = False, [100_000, 200_000]
    assert fetch(server.model(), tmp_path).read_bytes() == WEIGHTS
    assert len(server.asked) == 3


@pytest.mark.parametrize("honours_if_range", [True, False])
def test_a_file_that_changed_in_between_is_downloaded_again(honours_if_range, server, tmp_path, monkeypatch) -> None:
    old = bytes(len(WEIGHTS))
    (name,) = server.files
    server.files[name], server.cuts, server.honours_if_range = old, [100_000], honours_if_range
    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        patch.setattr(download, "ATTEMPTS", 1)
        fetch(server.model(), tmp_path)
    server.files[name] = WEIGHTS
    assert fetch(server.model(), tmp_path).read_bytes() == WEIGHTS


def test_a_part_that_is_longer_than_the_file_is_downloaded_again(server, tmp_path) -> None:
    model = server.model()
    part = cache_folder(model, tmp_path) / f"weights-{SHA256[:8]}.pth.part"
    part.parent.mkdir()
    part.write_bytes(WEIGHTS + b"more")
    part.with_suffix(".version").write_text(f'"{SHA256}"')
    assert fetch(model, tmp_path).read_bytes() == WEIGHTS


def test_another_file_than_the_published_one_is_deleted(server, tmp_path) -> None:
    (name,) = server.files
    server.files[name] = b"x" + WEIGHTS[1:]
    with pytest.raises(ValueError, match=f"begins with {SHA256[:8]}, got .*It was deleted"):
        fetch(server.model(), tmp_path)
    assert files_of(server.model(), tmp_path) == []


def test_a_file_put_into_the_cache_by_hand_is_checked_too(server, tmp_path) -> None:
    path = cache_folder(server.model(), tmp_path) / f"weights-{SHA256[:8]}.pth"
    path.parent.mkdir()
    path.write_bytes(WEIGHTS[:-1])
    with pytest.raises(ValueError, match="Delete it and try again"):
        fetch(server.model(), tmp_path)
    path.write_bytes(WEIGHTS)
    assert fetch(server.model(), tmp_path) == path
    assert server.asked == []


def test_a_file_that_never_arrives_ends_in_an_error(server, tmp_path) -> None:
    server.cuts = [100_000] + [0] * 20
    with pytest.raises(ConnectionError, match=r"(?s)could not be downloaded.*or download\n.*as .*weights"):
        fetch(server.model(), tmp_path)
    assert len(server.asked) == 1 + download.ATTEMPTS - 1
    assert not (cache_folder(server.model(), tmp_path) / f"weights-{SHA256[:8]}.pth").exists()


def test_a_passing_failure_of_the_server_is_tried_again(server, tmp_path) -> None:
    server.statuses = [503, 429, 200]
    assert fetch(server.model(), tmp_path).read_bytes() == WEIGHTS


def test_a_missing_file_is_not_asked_for_again(server, tmp_path) -> None:
    model = server.model(checkpoint_url=f"{server.address}/gone.pth")
    with pytest.raises(ConnectionError, match="(?s)gone.pth could not.*404 Not Found.*try again"):
        fetch(model, tmp_path)
    assert len(server.asked) == 1
    assert files_of(model, tmp_path) == []


def test_a_file_that_is_too_large_is_refused(server, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(download, "MAX_CHECKPOINT_BYTES", len(WEIGHTS) - 1)
    with pytest.raises(ValueError, match="expected at most 299999 bytes, got 300000"):
        fetch(server.model(), tmp_path)
    assert files_of(server.model(), tmp_path) == []


def test_only_encrypted_addresses_are_asked(server, tmp_path) -> None:
    with pytest.raises(ValueError, match="https://"):
        download_checkpoint(server.model(), tmp_path)
    with pytest.raises(ValueError, match="https://"):
        fetch(server.model(checkpoint_url="http://example.org/weights.pth"), tmp_path)
    assert server.asked == []
    server.redirect = "http://example.org/weights.pth"
    with pytest.raises(ValueError, match="http://example.org.*https://"):
        fetch(server.model(), tmp_path)


def test_without_a_network_the_way_by_hand_is_said(server, tmp_path, monkeypatch) -> None:
    model = server.model(checkpoint_url="http://127.0.0.1:9/weights.pth")  # nothing listens there
    with pytest.raises(ConnectionError) as error:
        fetch(model, tmp_path)
    assert "http://127.0.0.1:9/weights.pth could not be downloaded" in str(error.value)
    assert str(error.value).endswith(f"as {tmp_path / model.name / 'weights.pth'}\nand try again.")


def test_offline_mode_asks_nobody(server, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="(?s)HF_HUB_OFFLINE is set.*weights-"):
        fetch(server.model(), tmp_path)
    assert server.asked == []
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    path = fetch(server.model(), tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(server.model(), tmp_path) == path


def test_two_at_once_share_one_download(server, tmp_path) -> None:
    server.cuts = [100_000]
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetch(server.model(), tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert found[0].read_bytes() == WEIGHTS
    assert len(server.asked) == 2


def test_the_cache_is_in_the_home_of_hugging_face(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    model = load_published_models()["setr-pup-ade20k"]
    assert cache_folder(model) == tmp_path / "segmenter_hf" / "checkpoints" / "setr-pup-ade20k"


def test_a_share_link_is_for_the_hand(tmp_path) -> None:
    model = load_published_models()["paddlevit-segmenter-vit-t-mask-ade20k"]
    folder = tmp_path / model.name
    with pytest.raises(FileNotFoundError) as error:
        download_checkpoint(model, tmp_path)
    assert "https://pan.baidu.com/s/1nZptBc-IY_3PFramXSlovQ (password: 1k97)" in str(error.value)
    assert str(error.value).endswith(f"into\n  {folder}\nand try again.")
    (folder / "iter_160000.pdparams").write_bytes(b"")
    assert download_checkpoint(model, tmp_path) == folder / "iter_160000.pdparams"
    (folder / "other.pdparams").write_bytes(b"")
    with pytest.raises(ValueError, match="expected one file.*iter_160000.pdparams, other.pdparams"):
        download_checkpoint(model, tmp_path)


def test_a_model_without_weights_says_so(tmp_path) -> None:
    with pytest.raises(ValueError, match="numbers only.*links point at another model"):
        download_checkpoint(load_published_models()["mmseg-0.21-segmenter-vit-b-mask-ade20k"], tmp_path)


# The script


def test_the_script_brings_a_published_model_by_its_name(server, tmp_path, monkeypatch, capsys, caplog) -> None:
    source = FIXTURES / "rstrudel" / "seg_vit_mask"
    server.files |= {f"/{name}": (source / name).read_bytes() for name in ("checkpoint.pth", "variant.yml")}
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps(["wall", "sky", "tree", "road", "car", "boat", "lamp"]))
    model = replace(
        load_published_models()["seg-t-mask-16-ade20k"],
        name="seg-tiny",
        dataset=str(labels),
        checkpoint_url=f"{server.address}/checkpoint.pth",
        config_url=f"{server.address}/variant.yml",
    )
    monkeypatch.setattr(published_models, "load_published_models", lambda: {"seg-tiny": model})
    monkeypatch.setattr(script, "download_checkpoint", partial(download_checkpoint, allow_local_http=True))
    arguments = [
        "--model",
        "seg-tiny",
        "--output_dir",
        str(tmp_path / "model"),
        "--cache_dir",
        str(tmp_path / "cache"),
    ]
    script.main([*arguments, "--verify"])

    printed = capsys.readouterr().out
    assert "mIoU published, not measured: 38.10 % single scale, 38.80 % multi-scale + flip" in printed
    assert "Next: python" in printed
    assert "Verified: " in caplog.text
    converted = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "model")
    assert converted.config.id2label[3] == "road"
    assert converted.config.provenance["url"] == model.checkpoint_url
    assert AutoImageProcessor.from_pretrained(tmp_path / "model").window_stride == 48

    asked = len(server.asked)
    with pytest.raises(SystemExit, match="exists and is not empty"):
        script.main(arguments)
    script.main([*arguments, "--overwrite"])
    assert len(server.asked) == asked


def test_the_script_lists_the_published_models(capsys) -> None:
    script.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(load_published_models())
    assert lines[0].split()[:2] == ["name", "backbone"]
    assert next(line for line in lines if line.startswith("setr-pup-ade20k ")).endswith("48.24  49.99    by name")


def test_the_script_ends_what_is_left_to_do_with_the_command_to_run(tmp_path) -> None:
    arguments = ["--model", "paddlevit-segmenter-vit-t-mask-ade20k", "--output_dir", f"{tmp_path}/a model"]
    arguments += ["--cache_dir", str(tmp_path / "cache")]
    with pytest.raises(SystemExit) as error:
        script.main(arguments)
    assert str(error.value).endswith(f"and try again. The command:\n  segmenter-hf convert {shlex.join(arguments)}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output_dir", "x"], "error: Give --model NAME .* not neither"),
        (["--model", "a", "--checkpoint_path", "b", "--output_dir", "x"], "error: Give .* not both"),
        (["--model", "seg-b-mask-16-ade20k"], "error: Give --output_dir"),
        (
            ["--checkpoint_path", "https://a.org/b.pth", "--output_dir", "x"],
            "error: https://a.org/b.pth is an address: download",
        ),
        (["--model", "seg-b-mask-ade20k", "--output_dir", "x"], "Did you mean .*seg-b-mask-16-ade20k"),
    ],
)
def test_the_script_says_what_is_missing(arguments, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        script.main(arguments)
    assert list(tmp_path.iterdir()) == []


def test_the_encoder_of_a_head_comes_with_it(server, tmp_path) -> None:
    encoder, config = f"{server.address}/dinov2_vits14_pretrain.pth", f"{server.address}/head_config.py"
    server.files |= {"/dinov2_vits14_pretrain.pth": WEIGHTS[:1000], "/head_config.py": b"model = dict()"}
    model = server.model(encoder_url=encoder, config_url=config)
    checkpoint = fetch(model, tmp_path)
    beside = encoder_beside(model, checkpoint)
    assert beside.read_bytes() == WEIGHTS[:1000]
    assert files_of(model, tmp_path) == sorted([checkpoint.name, beside.name, "head_config.py"])
    assert encoder_beside(server.model(), checkpoint) is None
