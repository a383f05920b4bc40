"""How a command ends that is interrupted or terminated."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from segmenter_hf import SegmenterConfig
from segmenter_hf.cli.errors import TRACEBACK_VARIABLE, Terminated, cli_main
from segmenter_hf.cli.train import main as train
from segmenter_hf.inference.model_loading import WHERE_FROM
from segmenter_hf.inference.runtimes import choose_precision
from segmenter_hf.utils.atomic_files import atomic_directory, atomic_write
from segmenter_hf.utils.markdown import markdown_cell
from segmenter_hf.utils.messages import one_line


@pytest.mark.parametrize(
    ("number", "code", "line"), [(signal.SIGTERM, 143, "terminated\n"), (signal.SIGINT, 130, "interrupted\n")]
)
def test_a_signal_drops_what_is_not_finished_and_ends_with_a_line(
    number, code, line, tmp_path, capsys, monkeypatch, request
) -> None:
    monkeypatch.delenv(TRACEBACK_VARIABLE, raising=False)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    @cli_main
    def main() -> None:
        with atomic_write(tmp_path / "done.txt") as temporary:
            temporary.write_text("whole")
        with atomic_directory(tmp_path / "model") as folder, atomic_write(Path(tmp_path / "half.txt")) as temporary:
            (folder / "config.json").touch()
            temporary.write_text("half")
            os.kill(os.getpid(), number)

    with pytest.raises(SystemExit) as ended:
        cli_main(main)()  # the console command and its subcommand
    assert ended.value.code == code
    assert capsys.readouterr().err == line
    assert [path.name for path in tmp_path.iterdir()] == ["done.txt"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_after_the_work_ends_with_a_line_too(number, code, capsys, monkeypatch, request) -> None:
    monkeypatch.delenv(TRACEBACK_VARIABLE, raising=False)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    monkeypatch.setattr("gc.collect", lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as ended:
        cli_main(lambda: None)()
    assert ended.value.code == code
    assert capsys.readouterr().err in ("terminated\n", "interrupted\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_that_a_library_wraps_in_an_error_stays_one(number, code, capsys, monkeypatch, request) -> None:
    monkeypatch.delenv(TRACEBACK_VARIABLE, raising=False)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    @cli_main
    def main() -> None:  # as torch.export does
        try:
            os.kill(os.getpid(), number)
        except BaseException as error:
            raise RuntimeError("the graph cannot be traced") from error

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    assert capsys.readouterr().err in ("terminated\n", "interrupted\n")


def test_a_second_sigterm_does_not_interrupt_the_cleaning(capsys, monkeypatch) -> None:
    monkeypatch.delenv(TRACEBACK_VARIABLE, raising=False)
    cleaned = []

    @cli_main
    def main() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            cleaned.append(True)

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 143 and cleaned == [True]


def test_a_sigterm_while_an_object_is_deleted_is_not_lost(capsys, monkeypatch) -> None:
    monkeypatch.delenv(TRACEBACK_VARIABLE, raising=False)
    hook = sys.unraisablehook

    class Deleted:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    @cli_main
    def main() -> None:
        Deleted()
        time.sleep(30)
        pytest.fail("the signal was lost")

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 143 and capsys.readouterr().err == "terminated\n" and sys.unraisablehook is hook


def test_of_several_processes_one_says_that_they_were_terminated(capsys, monkeypatch) -> None:
    monkeypatch.delenv(TRACEBACK_VARIABLE, raising=False)
    for rank, said in (("0", "terminated: saved\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert ending(Terminated("terminated: saved")) == "143"
        assert capsys.readouterr().err == said


def ending(error: BaseException) -> str:
    @cli_main
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        main()
    return str(ended.value.code)


def test_functions_of_the_library_are_named_as_commands(monkeypatch) -> None:
    monkeypatch.delenv(TRACEBACK_VARIABLE, raising=False)
    said = ending(OSError(f"no such directory. {WHERE_FROM}"))
    assert "`segmenter-hf convert` makes a directory" in said and "`segmenter-hf models` has their names" in said


def test_a_model_that_is_not_exported_names_the_command_that_exports(monkeypatch) -> None:
    monkeypatch.delenv(TRACEBACK_VARIABLE, raising=False)
    with pytest.raises(ValueError) as refused:
        choose_precision("model", SegmenterConfig(), "openvino", None)
    assert "Export the model with `segmenter-hf export`" in ending(refused.value)


def test_errors_of_the_system_name_the_file_first(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv(TRACEBACK_VARIABLE, raising=False)
    assert (
        ending(FileNotFoundError(2, "No such file or directory", "a.png")) == "error: a.png: no such file or directory"
    )
    assert ending(OSError("as it is")) == "error: as it is"
    assert ending(BlockingIOError(11, "another run is writing to out")) == "error: another run is writing to out"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file or directory"),
        ("folder", "is a directory"),
        (b"", "it is empty"),
        (bytes(range(256)), "it is not text in UTF-8"),
        (b"[" * 100_000, "maximum recursion depth exceeded"),
        (b"[]", "expected a JSON object, got []."),
    ],
)
def test_a_file_of_arguments_that_is_none_is_named_in_a_line(content, said, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv(TRACEBACK_VARIABLE, raising=False)
    path = tmp_path / "arguments.json"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        train([str(path), "--output_dir", str(tmp_path / "out")])
    message = str(ended.value.code)
    assert message.startswith(f"error: {path}: ") and said in message and "\n" not in message


CONTROL = "a\x1b[31m\x00\u202eb\r"


def test_no_control_characters_reach_terminals_and_cards(monkeypatch) -> None:
    monkeypatch.delenv(TRACEBACK_VARIABLE, raising=False)
    escaped = r"a\x1b[31m\x00\u202eb"
    assert ending(ValueError(f"the class {CONTROL}")) == rf"error: the class {escaped}\r"
    assert one_line(CONTROL) == escaped
    assert markdown_cell(CONTROL) == escaped.replace("\\", r"\\")
    assert one_line("grün, 木, नमस्ते") == "grün, 木, नमस्ते"
