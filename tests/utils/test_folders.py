"""Paths of the user that lead in circles, wait, or have no end."""

import json
import os
from pathlib import Path

import pytest

from segmenter_hf.conversion.convert import convert_checkpoint
from segmenter_hf.hub.publishing import build_repository
from segmenter_hf.training.arguments import SegmentationTrainingArguments
from segmenter_hf.training.checkpoints import find_checkpoint
from segmenter_hf.utils.folders import lies_within, regular_size
from segmenter_hf.utils.json_files import read_json


@pytest.fixture
def loop(tmp_path) -> Path:
    """Two links to each other."""
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    return tmp_path / "a"


def test_what_lies_within_a_folder_is_told_with_links_followed(tmp_path, loop) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    assert lies_within(tmp_path / "link" / "x", tmp_path / "folder")
    assert not lies_within(tmp_path, tmp_path / "folder") and not lies_within(
        tmp_path / "folder2", tmp_path / "folder"
    )
    assert not lies_within(tmp_path / "folder", loop) and not lies_within(loop, tmp_path / "folder")


def test_links_in_a_circle_are_errors_of_the_system(tmp_path, loop) -> None:
    (tmp_path / "weights.pth").touch()
    with pytest.raises((OSError, ValueError)):
        convert_checkpoint(loop, tmp_path / "out")
    with pytest.raises((OSError, ValueError)):
        convert_checkpoint(tmp_path / "weights.pth", loop)
    with pytest.raises((OSError, ValueError)):
        build_repository(loop, tmp_path / "out")
    arguments = SegmentationTrainingArguments(
        output_dir=str(loop), overwrite_output_dir=True, resume_from_checkpoint=str(tmp_path / "b"), use_cpu=True
    )
    with pytest.raises(FileNotFoundError, match="no such checkpoint. Give a directory"):
        find_checkpoint(arguments, {})


def test_pipes_and_devices_are_not_read(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", Path("/dev/zero")):
        for read in (read_json, regular_size):
            with pytest.raises(ValueError, match=f"{path}: expected a file, got a pipe or a device"):
                read(path)
    (tmp_path / "file.json").write_text(json.dumps([1]))
    assert read_json(tmp_path / "file.json") == [1] and regular_size(tmp_path / "file.json") == 3
