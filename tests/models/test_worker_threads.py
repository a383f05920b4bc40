"""Small operations run on one core each, in as many threads as the caller has set, and nobody's settings change."""

import importlib.util
import multiprocessing
import os
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch

from segmenter_hf.models import segmentation_loss, sliding_window
from segmenter_hf.models.segmentation_loss import upsampled_cross_entropy
from segmenter_hf.models.sliding_window import merge_windows
from segmenter_hf.models.window_geometry import Window, window_corners
from segmenter_hf.models.worker_threads import run_in_threads


@pytest.fixture
def several_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def in_new_thread(function) -> object:
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    windows = [
        Window(0, view, view, *corner, 32, 32, 70, 90, 75, 100)
        for view in range(2)
        for corner in window_corners(70, 90, 32, 24)
    ]
    logits = torch.randn(len(windows), 6, 4, 4, generator=generator)
    pixels = torch.randn(2, 6, 5, 7, generator=generator)
    return logits, torch.tensor(windows), pixels, torch.randint(6, (2, 75, 150), generator=generator)


def outputs() -> list[torch.Tensor]:
    logits, windows, pixels, labels = inputs()
    pixels.requires_grad_()
    loss = upsampled_cross_entropy(pixels, labels, label_smoothing=0.1)
    ((class_map, scores),) = merge_windows(logits, windows, 8, return_scores=True)
    return [class_map, scores, loss.detach(), *torch.autograd.grad(loss, pixels)]


def test_results_are_bitwise_identical_with_any_number_of_threads(several_cores) -> None:
    expected = outputs()
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        assert all(map(torch.equal, outputs(), expected))


def test_tiles_are_computed_on_one_core_each_and_all_settings_stay(several_cores) -> None:
    before = in_new_thread(torch.get_num_threads)
    seen = []

    def spied(function):
        def spy(*args):
            seen.append((torch.get_num_threads(), threading.current_thread() is threading.main_thread()))
            return function(*args)

        return spy

    tile = segmentation_loss._TiledLoss._tile
    with (
        mock.patch.object(sliding_window, "add_softmax", spied(sliding_window.add_softmax)),
        mock.patch.object(segmentation_loss._TiledLoss, "_tile", lambda self, *args: spied(tile)(self, *args)),
    ):
        outputs()
    assert len(seen) > 10 and set(seen) == {(1, False)}
    assert torch.get_num_threads() == 3
    assert in_new_thread(torch.get_num_threads) == before


def test_each_item_has_its_result_and_the_first_error_is_raised(several_cores) -> None:
    assert run_in_threads(lambda number: number**2, range(20)) == [number**2 for number in range(20)]
    with pytest.raises(ZeroDivisionError):
        run_in_threads(lambda number: 1 / number, [2, 1, 0, 3])
    assert run_in_threads(abs, []) == []


@pytest.mark.parametrize("num_threads", [1, 3])
def test_modes_of_the_caller_are_those_of_the_threads(several_cores, num_threads) -> None:
    torch.set_num_threads(num_threads)

    def modes(_: int) -> tuple[bool, bool, bool]:
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")

    with torch.autocast("cpu", torch.bfloat16):
        assert run_in_threads(modes, range(4)) == [(False, False, False)] * 4
        with torch.inference_mode():
            assert run_in_threads(modes, range(4)) == [(True, False, False)] * 4
            outputs_of_inference = merge_windows(*inputs()[:2], 8)
    assert outputs_of_inference[0][0].shape == (75, 100)


def _in_fork(queue) -> None:
    torch.set_num_threads(1)  # threads of OpenMP are not copied either
    torch.set_num_threads(3)
    queue.put(run_in_threads(lambda number: number + 1, range(4)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_has_threads_of_its_own(several_cores) -> None:
    run_in_threads(abs, range(4))
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_in_fork, args=(queue,))
    process.start()
    process.join(timeout=60)
    try:
        assert not process.is_alive() and queue.get() == [1, 2, 3, 4]
    finally:
        process.kill()


def test_another_version_of_the_loss_has_an_operator_of_its_own(tmp_path) -> None:
    source = Path(segmentation_loss.__file__).read_text(encoding="utf-8")
    changed = source.replace("total * math.log(2)", "3 * total * math.log(2)")
    assert changed != source
    (tmp_path / "segmentation_loss.py").write_text(changed, encoding="utf-8")
    name = "segmenter_hf.models.segmentation_loss_of_another_version"
    spec = importlib.util.spec_from_file_location(name, tmp_path / "segmentation_loss.py")
    other = importlib.util.module_from_spec(spec)
    sys.modules[name] = other
    try:
        spec.loader.exec_module(other)
        _, _, pixels, labels = inputs()
        torch.testing.assert_close(
            other.upsampled_cross_entropy(pixels, labels), 3 * upsampled_cross_entropy(pixels, labels)
        )
    finally:
        del sys.modules[name]
