"""JSON that somebody else wrote is read, or refused with a line that names the file."""

import pytest

from segmenter_hf.utils.json_files import read_json, read_json_object


def test_a_byte_order_mark_is_no_part_of_the_content(tmp_path) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(b"\xef\xbb\xbf" + '{"Straße": [1.5, null]}'.encode())
    assert read_json(path) == {"Straße": [1.5, None]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected JSON"),
        (b"<!doctype html>", "expected JSON"),
        (b"\xff\xfe{}", "expected JSON"),
        (b"[" * 100_000, "expected JSON"),
        (b"[" + b"9" * 5000 + b"]", "expected JSON"),
        (b" " * 200 + b"{}", "expected JSON of at most 200 bytes, got 202"),
        (b"[1]", "expected a JSON object, got .1."),
    ],
)
def test_what_is_not_the_json_that_is_expected_is_refused_in_one_line(content, message, tmp_path, monkeypatch) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_json(path, 200) if len(content) == 202 else read_json_object(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
