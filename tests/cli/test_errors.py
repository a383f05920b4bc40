"""How a command ends that is interrupted or terminated."""

import os
import signal
from pathlib import Path

import pytest

from segmenter_hf.cli.errors import TRACEBACK_VARIABLE, cli_main
from segmenter_hf.utils.atomic_files import atomic_directory, atomic_write


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
