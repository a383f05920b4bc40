"""What exists is complete: a failure leaves the old content and nothing else."""

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from segmenter_hf.utils import atomic_files
from segmenter_hf.utils.atomic_files import (
    atomic_directory,
    atomic_write,
    locked_directory,
    write_json,
    write_text,
)


def test_a_file_appears_whole(tmp_path) -> None:
    write_text(tmp_path / "deep" / "note.txt", "new")
    assert (tmp_path / "deep" / "note.txt").read_text() == "new"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["note.txt"]


def test_a_failure_keeps_the_old_file(tmp_path) -> None:
    write_text(tmp_path / "note.txt", "old")
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "note.txt") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert (tmp_path / "note.txt").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failure_keeps_the_old_directory(tmp_path) -> None:
    with atomic_directory(tmp_path / "model") as temporary:
        write_text(temporary / "a.txt", "old")
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "model") as temporary:
        write_text(temporary / "b.txt", "half")
        raise RuntimeError
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["a.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_signal_between_the_two_moves_keeps_the_old_directory(tmp_path, monkeypatch) -> None:
    with atomic_directory(tmp_path / "model") as temporary:
        write_text(temporary / "a.txt", "old")
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if target == tmp_path / "model" and path.name != "old":  # the second of them
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "model") as temporary:
        write_text(temporary / "b.txt", "new")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["a.txt"]


def test_nan_becomes_null(tmp_path) -> None:
    write_json(tmp_path / "numbers.json", {"iou": [0.5, float("nan")], "mean": float("nan")})
    assert json.loads((tmp_path / "numbers.json").read_text()) == {"iou": [0.5, None], "mean": None}


HOLD = """
import sys
from segmenter_hf.utils.atomic_files import locked_directory
with locked_directory(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_one_run_s_at_a_time(tmp_path) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match="another run is writing to .*run: wait"), locked_directory(folder):
            pass
        other.kill()
        other.wait()
    with locked_directory(folder) as alone:  # the lock of a killed process ends with it
        assert alone
    assert not folder.exists() or list(folder.iterdir()) == []


def test_a_folder_that_was_locked_keeps_what_was_written(tmp_path) -> None:
    for number in range(2):
        with locked_directory(tmp_path / "run"):
            (tmp_path / "run" / f"{number}.txt").write_text("x")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["0.txt", "1.txt"]
    with locked_directory(tmp_path / "empty"):
        pass
    assert not (tmp_path / "empty").exists()


def test_without_locks_nothing_is_taken_for_left_over(tmp_path, monkeypatch) -> None:
    def no_locks(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(atomic_files.fcntl, "flock", no_locks)
    with locked_directory(tmp_path) as alone:
        assert not alone
    assert not list(tmp_path.iterdir())


def test_two_that_replace_a_folder_at_once_leave_one_of_theirs_whole(tmp_path, monkeypatch) -> None:
    target = tmp_path / "model"
    target.mkdir()
    with atomic_directory(target) as first:
        (first / "a").write_text("first")
        rename, others = Path.rename, iter([True])

        def rename_between(self: Path, to: Path) -> Path:
            moved = rename(self, to)
            if next(others, False):  # another process puts its folder there between the two moves of this one
                target.mkdir()
                (target / "b").write_text("second")
            return moved

        monkeypatch.setattr(Path, "rename", rename_between)
    assert [path.name for path in target.iterdir()] == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
