"""The trade-offs of fewer tokens, other number formats and runtimes are measured for a model."""

import importlib.util
import json
from pathlib import Path

import pytest

from .tiny_models import save_tiny_scenes_model


SCRIPT = Path(__file__).parents[1] / "benchmarks" / "tradeoffs.py"
spec = importlib.util.spec_from_file_location("tradeoffs", SCRIPT)
tradeoffs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tradeoffs)


def test_each_change_has_its_tokens_its_time_and_its_agreement(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    save_tiny_scenes_model(tmp_path / "model")
    arguments = ["--model_name_or_path", str(tmp_path / "model"), "--max_samples", "2", "--output_dir", str(tmp_path)]
    arguments += ["--thresholds", "-1", "1", "--patch_sizes", "16", "--runtimes", "torch/bfloat16", "torch/float32/-1"]
    tradeoffs.main(arguments)
    points = json.loads((tmp_path / "tradeoffs.json").read_text())["points"]
    none, merged, unmerged, larger, bfloat16, both = points
    assert none["agreement"] == 1 and none["speedup"] == 1 and none["tokens"] == bfloat16["tokens"]
    assert merged["tokens"] < unmerged["tokens"] <= none["tokens"] and larger["tokens"] < none["tokens"]
    assert merged["tokens"] == both["tokens"] and merged["agreement"] == both["agreement"]
    assert all(point["seconds"] > 0 and 0 <= point["mean_iou"] <= 1 for point in points)
    assert len((tmp_path / "tradeoffs.md").read_text().splitlines()) == 2 + len(points)
    assert (tmp_path / "tradeoffs.png").read_bytes().startswith(b"\x89PNG")
    again = [
        *arguments[:4],
        "--repeats",
        "1",
        "--clock",
        "cpu",
        "--output_dir",
        str(tmp_path / "again"),
        *arguments[6:],
    ]
    tradeoffs.main([*again, "--times_from", str(tmp_path / "tradeoffs.json")])
    assert json.loads((tmp_path / "again" / "tradeoffs.json").read_text())["points"] == points


def test_the_path_of_the_published_code_gives_the_same_maps_and_is_what_speeds_are_beside(
    tmp_path, monkeypatch
) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("evaluate")
    monkeypatch.syspath_prepend(SCRIPT.parent)
    save_tiny_scenes_model(tmp_path / "model")
    arguments = ["--model_name_or_path", str(tmp_path / "model"), "--max_samples", "2", "--output_dir", str(tmp_path)]
    tradeoffs.main([*arguments, "--plain_path"])
    ours, published = json.loads((tmp_path / "tradeoffs.json").read_text())["points"]
    assert published["agreement"] > 0.999 and published["tokens"] == ours["tokens"]
    assert published["speedup"] == 1 and ours["speedup"] == published["seconds"] / ours["seconds"]


def test_runtimes_need_a_place_for_their_exports(tmp_path) -> None:
    save_tiny_scenes_model(tmp_path / "model")
    with pytest.raises(SystemExit, match="--export_dir"):
        tradeoffs.main(
            [
                "--model_name_or_path",
                str(tmp_path / "model"),
                "--output_dir",
                str(tmp_path),
                "--runtimes",
                "openvino/int8",
            ]
        )
