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


def test_a_busy_core_is_measured_and_left_alone(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(benchmark, "IMAGE_SIZE", (70, 90))
    monkeypatch.setattr(benchmark, "NUM_LABELS", 3)
    monkeypatch.setattr(benchmark, "SIZES", {"T": (16, 1, 2)})
    loops, popen = [], benchmark.subprocess.Popen

    def started(*args, **kwargs):
        loops.append(popen(*args, **kwargs))
        return loops[-1]

    monkeypatch.setattr(benchmark.subprocess, "Popen", started)
    threads = benchmark.torch.get_num_threads()
    benchmark.main(["--busy_core", "--repeats", "1", "--output_dir", str(tmp_path)])
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert len({row["case"] for row in rows}) == 4 and len(loops) == len(rows) == 8
    assert all(loop.poll() is not None for loop in loops)
    assert benchmark.torch.get_num_threads() == threads
    for row in rows:
        assert row["busy_to_quiet"] == pytest.approx(row["busy_s"] / row["quiet_s"])
    assert len((tmp_path / "benchmark.md").read_text().splitlines()) == len(rows) + 2


def test_a_busy_loop_ends_by_itself() -> None:
    with benchmark.busy_core(seconds=0.1) as process:
        assert process.wait(timeout=30) == 0
