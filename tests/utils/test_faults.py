"""Killed, out of disk, out of memory, or told to write where nobody can: what is there is whole, and the message helps."""

import multiprocessing
import os
import resource
import runpy
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from segmenter_hf import SegmenterForSemanticSegmentation, SegmenterImageProcessor
from segmenter_hf.cli.errors import TRACEBACK_VARIABLE, cli_main
from segmenter_hf.data.image_loading import find_images
from segmenter_hf.utils.atomic_files import atomic_directory, write_text

from ..hub_server import TOKEN, Handler, running_hub
from ..prediction import segment_images
from ..tiny_models import save_tiny_scenes_model
from ..versions import needs_export


ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "tests" / "fixtures" / "rstrudel" / "seg_vit_linear" / "checkpoint.pth"
COMMANDS = {  # in the folder of a test: a card names its directory
    "convert_checkpoint": f"--checkpoint_path {CHECKPOINT} --output_dir out",
    "export_onnx": "--model_name_or_path model --output_dir out",
    "publish": "--checkpoint_dir model --output_dir out --dry_run",
    "evaluate": "--model_name_or_path model --output_dir out --dataset_name data --num_worst 1",
    "predict": "--model_name_or_path model --output_dir out --images a.png",
}
NAMES = [pytest.param(name, marks=needs_export) if name == "export_onnx" else name for name in COMMANDS]
# Forked from a process that has imported everything, for that takes seconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "tests.utils.test_faults",
        "onnxruntime",
        "onnxscript",
        *(f"segmenter_hf.cli.{name}" for name in ("convert", "evaluate", "export", "predict", "publish", "train")),
    ]
)


def run_script(name: str, words: list[str], folder: Path, fault: Callable[..., None], *arguments: object) -> None:
    """What a process does: run a script in a folder, with a fault made before."""
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.argv = [f"{name}.py", *words]
    sys.path.insert(0, str(ROOT / "scripts"))  # as Python does for a script, which takes it off
    with (folder / "printed").open("w", buffering=1) as printed:
        sys.stdout = sys.stderr = printed
        fault(*arguments)
        try:
            runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
        except SystemExit as end:  # as Python ends
            if isinstance(end.code, str):
                print(end.code)
                sys.exit(1)
            raise
        except Exception:
            traceback.print_exc()
            sys.exit(1)


def start(
    name: str, folder: Path, fault: Callable[..., None], *arguments: object, words: str = ""
) -> ForkServerProcess:
    process = PROCESSES.Process(
        target=run_script, args=(name, (words or COMMANDS[name]).split(), folder, fault, *arguments)
    )
    process.start()
    return process


def run(name: str, folder: Path, *fault_and_arguments: object, words: str = "") -> tuple[int, str]:
    """Exit code and output of a script, negative where a signal ended it."""
    fault, *arguments = fault_and_arguments or (no_fault,)
    process = start(name, folder, fault, *arguments, words=words)
    process.join(300)
    return process.exitcode, (folder / "printed").read_text()


def no_fault() -> None:
    """Nothing goes wrong."""


def kill_at(folder: Path, kind: str, number: int) -> None:
    """Be killed when the given number of files below a folder have been opened for writing, or moved."""
    before = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal before
        if event != kind or not isinstance(arguments[0], (str, os.PathLike)):
            return
        changes = event == "os.rename" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if changes and Path(arguments[0]).absolute().is_relative_to(folder):
            if before == number:
                os.kill(os.getpid(), signal.SIGKILL)
            before += 1

    sys.addaudithook(watch)


def limit_files(size: int) -> None:
    """No file can have more bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def limit_memory(more: int) -> None:
    """The process can have so many bytes more than it has."""
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + more, has + more))


def publish_to(endpoint: str, folder: Path) -> None:
    """Use a Hub on this machine, and a folder of the test for temporary files."""
    constants.ENDPOINT, constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = endpoint, False, True
    os.environ |= {"HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1"}
    tempfile.tempdir = str(folder)


def make_folder(folder: Path) -> Path:
    """A model, a picture, and a dataset of two."""
    save_tiny_scenes_model(folder / "model")
    generator = np.random.default_rng(0)
    for path, shape in {
        "a.png": (40, 56, 3),
        "data/images/validation/a.png": (41, 52, 3),
        "data/images/validation/b.png": (50, 48, 3),
        "data/masks/validation/a.png": (41, 52),
        "data/masks/validation/b.png": (50, 48),
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        values = generator.integers(0, 256 if len(shape) == 3 else 8, shape, dtype=np.uint8)
        Image.fromarray(values).save(folder / path)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_folder(tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    """What a person sees in a folder."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and not file.name.startswith(".")
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Callable[[str], dict[str, bytes]]:
    """What a command writes when nothing happens to it."""
    written: dict[str, dict[str, bytes]] = {}

    def undisturbed(name: str) -> dict[str, bytes]:
        if name not in written:
            folder = make_folder(tmp_path_factory.mktemp(name))
            code, printed = run(name, folder)
            assert code == 0, printed
            written[name] = contents(folder / "out")
        return written[name]

    return undisturbed


# Killed


@pytest.mark.parametrize("name", NAMES)
def test_killed_while_it_writes_a_command_leaves_whole_files_and_works_again(name, folder, undisturbed) -> None:
    wanted = undisturbed(name)
    at_once = name not in ("evaluate", "predict")  # the others write file by file
    moments = [("open", 0), ("os.rename", 0), ("open", 1)]
    for kind, number in moments[1:2] if name == "export_onnx" else moments:  # over what the one before left
        code, printed = run(name, folder, kill_at, folder, kind, number)
        assert code == -signal.SIGKILL, printed
        left = contents(folder / "out")
        assert left.items() <= wanted.items()
        assert not (at_once and left)
    assert list((folder if at_once else folder / "out").glob(".*-partial-*"))
    code, printed = run(name, folder)
    assert code == 0, printed
    assert contents(folder / "out") == wanted


def test_what_was_to_be_replaced_is_found_in_what_a_kill_leaves(folder, undisturbed) -> None:
    (folder / "out").mkdir()
    content = '{"model_type": "segmenter"}'
    write_text(folder / "out" / "config.json", content)
    words = COMMANDS["convert_checkpoint"] + " --overwrite"
    code, printed = run("convert_checkpoint", folder, kill_at, folder, "os.rename", 1, words=words)
    assert code == -signal.SIGKILL, printed
    (left,) = folder.glob(".out-partial-*")
    assert not (folder / "out").exists() and contents(left / "old") == {"config.json": content.encode()}
    assert contents(left / "new") == undisturbed("convert_checkpoint")
    assert run("convert_checkpoint", folder, words=words)[0] == 0
    assert contents(folder / "out") == undisturbed("convert_checkpoint")


def test_a_push_that_is_killed_makes_no_commit_and_succeeds_later(folder, monkeypatch) -> None:
    arrived, killed, put = threading.Event(), threading.Event(), Handler.do_PUT

    def wait(handler: Handler) -> None:
        arrived.set()
        killed.wait(300)
        handler.close_connection = True

    words = "--checkpoint_dir model --hub_model_id org/scenes"
    with running_hub() as hub:
        monkeypatch.setattr(Handler, "do_PUT", wait)
        process = start("publish", folder, publish_to, hub.endpoint, folder, words=words)
        assert arrived.wait(300), (folder / "printed").read_text()
        process.kill()
        process.join(300)
        killed.set()
        assert [commit.message for commit in hub.models["org/scenes"].branches["main"]] == ["initial commit"]
        assert [path.name for path in folder.glob("segmenter_hf-publish-*")]  # which says what it is
        monkeypatch.setattr(Handler, "do_PUT", put)
        code, printed = run("publish", folder, publish_to, hub.endpoint, folder, words=words)
        assert code == 0, printed
        commit = hub.models["org/scenes"].branches["main"][1]
    weights = (folder / "model" / "model.safetensors").read_bytes()
    assert commit.message == "Publish the model" and commit.files["model.safetensors"] == weights


def test_what_a_kill_leaves_is_no_image_of_a_folder(tmp_path) -> None:
    for name in ("a.png", ".a-partial-0.png", "deep/b.png", "deep/._b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list(find_images([tmp_path])) == ["a", "deep/b"]


# No room, no right


@pytest.mark.parametrize("name", NAMES)
def test_on_a_full_disk_a_command_says_what_it_could_not_write_and_leaves_nothing_half(
    name, folder, undisturbed
) -> None:
    sizes = sorted(len(content) for content in undisturbed(name).values())
    code, printed = run(name, folder, limit_files, sizes[-1] - 1)
    assert code == 1
    assert "error: " in printed and "Traceback" not in printed
    assert "could not be written: " in printed and "File too large" in printed
    assert "MB are free there: make room or give another disk." in printed
    assert contents(folder / "out").items() <= undisturbed(name).items()
    assert not [path for path in folder.rglob(".*") if "partial" in path.name]


def test_a_full_disk_names_what_may_be_deleted(tmp_path) -> None:
    (tmp_path / ".model-partial-x").mkdir()
    with (
        pytest.raises(
            OSError, match=r"model could not be written: .*File too large.*be deleted.*: \.model-partial-x\.$"
        ),
        atomic_directory(tmp_path / "model"),
    ):
        raise RuntimeError("I/O error: File too large (os error 27)")


@pytest.mark.parametrize("name", NAMES)
def test_a_place_that_cannot_be_written_is_named(name, folder) -> None:
    (folder / "file").write_text("no folder")
    before = contents(folder)
    code, printed = run(name, folder, words=COMMANDS[name].replace(" out", " file/out"))
    assert code == 1
    assert "error: " in printed and "Traceback" not in printed
    assert "file/out" in printed and "Give a place that can be written." in printed
    assert {**contents(folder), "printed": b""} == {**before, "printed": b""}


@pytest.mark.skipif(os.geteuid() == 0, reason="the permissions of folders do not bind the superuser")
def test_a_folder_without_the_right_to_write_is_named(folder) -> None:
    (folder / "locked").mkdir(mode=0o555)
    code, printed = run("predict", folder, words=COMMANDS["predict"].replace(" out", " locked"))
    assert code == 1 and "locked/a.png could not be written: [Errno 13] Permission denied" in printed


# Memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_too_little_memory_ends_in_advice(error, folder, monkeypatch) -> None:
    model = SegmenterForSemanticSegmentation.from_pretrained(folder / "model").eval()
    processor = SegmenterImageProcessor.from_pretrained(folder / "model")
    image = Image.open(folder / "a.png")

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(
        MemoryError, match="`window_batch_size=1` instead of 8, the dtype bfloat16.*`full_resolution`"
    ) as caught:
        segment_images(model, processor, [image])
    assert caught.value.__cause__ is error
    with pytest.raises(MemoryError) as caught:
        segment_images(model, processor, [image], window_batch_size=1)
    assert "window_batch_size" not in str(caught.value)


def test_another_error_of_the_network_stays_what_it_is(folder, monkeypatch) -> None:
    model = SegmenterForSemanticSegmentation.from_pretrained(folder / "model").eval()
    monkeypatch.setattr(model, "forward", lambda **inputs: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        segment_images(
            model, SegmenterImageProcessor.from_pretrained(folder / "model"), [Image.open(folder / "a.png")]
        )


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="says how much memory the process has")
def test_a_process_with_little_memory_gives_advice_about_a_large_picture(folder) -> None:
    Image.new("RGB", (8000, 6000)).save(folder / "a.png")
    words = COMMANDS["predict"] + " --full_resolution"
    code, printed = run("predict", folder, limit_memory, 2**27, words=words)
    assert code == 1, printed
    assert "error: The memory does not suffice" in printed and "`--window_batch_size 1`" in printed
    assert not contents(folder / "out")


# Messages


def test_only_mistakes_of_the_user_lose_their_traceback(monkeypatch) -> None:
    def main(error: Exception) -> None:
        raise error

    for mistake in (ValueError("wrong"), FileNotFoundError("gone"), ImportError("missing"), MemoryError()):
        with pytest.raises(SystemExit, match=f"^error: {str(mistake) or 'MemoryError'}$") as ended:
            cli_main(main)(mistake)
        assert ended.value.__cause__ is mistake
    for bug in (TypeError("bug"), KeyError("bug"), RuntimeError("bug")):
        with pytest.raises(type(bug)):
            cli_main(main)(bug)
    with pytest.raises(SystemExit, match="error: too large"):
        cli_main(main)(FloatingPointError("too large"))
    monkeypatch.setenv(TRACEBACK_VARIABLE, "1")
    with pytest.raises(ValueError, match="wrong"):
        cli_main(main)(ValueError("wrong"))


# The same again


def test_predictions_repeat_to_the_bit_and_to_rounding_in_other_batches(folder) -> None:
    model = SegmenterForSemanticSegmentation.from_pretrained(folder / "model").eval()
    processor = SegmenterImageProcessor.from_pretrained(folder / "model")
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform, so that differences would show
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5)

    def predict(window_batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        picture = Image.open(folder / "data" / "images" / "validation" / "b.png")
        options = {"window_batch_size": window_batch_size, "return_segmentation_scores": True}
        (result,) = segment_images(model, processor, [picture], scales=[0.75, 1.0], **options)
        return result.segmentation, result.segmentation_scores

    class_map, scores = predict(8)
    assert all(torch.equal(*pair) for pair in zip((class_map, scores), predict(8), strict=True))
    assert class_map.unique().numel() > 2
    for window_batch_size in (1, 3, 64):
        other_map, other_scores = predict(window_batch_size)
        torch.testing.assert_close(other_scores, scores, rtol=0, atol=1e-6)
        assert torch.equal(other_map, class_map)
