"""The benchmark runs, both sides give the same results, and its rows can be read."""

import importlib.util
import json
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[1] / "benchmarks" / "benchmark.py"
spec = importlib.util.spec_from_file_location("benchmark", SCRIPT)
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)


def test_both_sides_give_the_same_results(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(benchmark, "IMAGE_SIZE", (70, 90))
    monkeypatch.setattr(benchmark, "NUM_LABELS", 7)
    monkeypatch.setattr(benchmark, "SIZES", {"T": (16, 1, 2)})
    path = tmp_path / "rows.json"
    tasks = ["predict", "augment", "metric", "preprocess"]
    benchmark.main(["--task", *tasks, "--repeats", "1", "--json", str(path), "--output_dir", str(tmp_path)])
    written = json.loads(path.read_text())
    assert written["machine"]["repeats"] == 1
    rows = written["rows"]
    assert {row["task"] for row in rows} == set(tasks)
    for row in rows:
        assert row["ours_s"] > 0
        if row["peer_s"] is not None:
            assert row["ratio"] == pytest.approx(row["peer_s"] / row["ours_s"])
            limit = 0.05 if row["task"] == "preprocess" else 1e-4  # with antialiasing there and without it here
            assert row["max_difference"] < limit, row
    table = (tmp_path / "benchmark.md").read_text().splitlines()
    assert len(table) == len(rows) + 2


def test_unknown_tasks_are_named() -> None:
    with pytest.raises(SystemExit, match=r"expected some of predict, .*, got fly"):
        benchmark.main(["--task", "fly"])
