"""What exists is complete: a failure leaves the old content and nothing else."""

import json

import pytest

from segmenter_hf.utils.atomic_files import atomic_directory, atomic_write, write_json, write_text


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


def test_nan_becomes_null(tmp_path) -> None:
    write_json(tmp_path / "numbers.json", {"iou": [0.5, float("nan")], "mean": float("nan")})
    assert json.loads((tmp_path / "numbers.json").read_text()) == {"iou": [0.5, None], "mean": None}
