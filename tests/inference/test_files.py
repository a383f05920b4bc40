"""Which files of a folder are segmented."""

import shutil

import pytest

from segmenter_hf.data.image_loading import find_images, load_image_dataset

from ..data import formats


def test_hidden_files_and_folders_are_no_images(tmp_path) -> None:
    folder = tmp_path / ".cache" / "images"  # a folder that is named may be hidden itself
    for name in ("a.png", "b/C.PNG", "._a.png", ".hidden/d.png", "b/.hidden/e/f.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    assert find_images([folder]) == {"a": folder / "a.png", "b/C": folder / "b" / "C.PNG"}
    shutil.rmtree(folder / "b")
    (folder / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match="no image there"):
        find_images([folder])


def test_a_parquet_file_in_a_hidden_folder_does_not_make_a_dataset_of_parquet_files(tmp_path) -> None:
    formats.save(tmp_path / "images" / "a.png", formats.scene_image(0))
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "train.parquet").write_bytes(b"")
    assert load_image_dataset(str(tmp_path))["id"] == ["a"]
