"""Several threads at once get what one thread gets, and do not change what the others find."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from PIL import Image

from segmenter_hf.conversion.convert import convert_checkpoint
from segmenter_hf.inference.files import open_image

from .prediction import segment_images


THREADS = 4
SIZES = [(48, 64), (90, 41), (33, 33), (64, 48), (50, 120), (32, 70), (41, 41), (77, 60)]


@pytest.fixture
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]


@pytest.fixture
def several_cores():
    """torch with more than one thread of its own, whatever the tests run with."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def at_once(function, arguments) -> list:
    """The results of a function for each of the arguments, from threads that start together."""
    barrier = threading.Barrier(THREADS)

    def waiting(argument):
        barrier.wait(timeout=60)
        return function(argument)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(waiting, arguments, timeout=120))


def test_segmenting_in_threads_gives_what_one_thread_gives(model, processor, pictures, several_cores) -> None:
    options = {"multi_scale_flip": True, "scales": [0.75, 1.0], "return_segmentation_scores": True}
    expected = segment_images(model, processor, pictures, **options)
    for _ in range(3):
        results = at_once(lambda picture: segment_images(model, processor, [picture], **options)[0], pictures)
        for result, wanted in zip(results, expected):
            torch.testing.assert_close(result.segmentation_scores, wanted.segmentation_scores, rtol=0, atol=1e-5)
            differ = result.segmentation != wanted.segmentation
            best = wanted.segmentation_scores.topk(2, dim=0).values
            assert (best[0] - best[1])[differ].max().item() < 1e-5 if differ.any() else True


@torch.no_grad()
def test_processor_model_and_merge_in_threads_give_what_one_thread_gives(model, processor, pictures) -> None:
    def segment(picture: Image.Image) -> torch.Tensor:
        return processor.post_process_semantic_segmentation(model(**processor(picture)))[0]

    expected = [segment(picture) for picture in pictures]

    def in_thread(picture: Image.Image) -> torch.Tensor:
        with torch.no_grad():
            return segment(picture)

    assert all(torch.equal(result, wanted) for result, wanted in zip(at_once(in_thread, pictures), expected))
    inputs = [processor(picture)["pixel_values"] for picture in pictures]
    got = at_once(lambda picture: processor(picture)["pixel_values"], pictures)
    assert all(torch.equal(result, wanted) for result, wanted in zip(got, inputs))


def test_a_limit_of_pixels_holds_for_its_call_alone(pictures, tmp_path, monkeypatch) -> None:
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)
    seen = set()

    def read(number: int) -> bool:
        seen.add(PIL.Image.MAX_IMAGE_PIXELS)
        limit = 10_000 if number % 2 else 100
        try:
            open_image(tmp_path / f"{number % len(SIZES)}.png", limit)
        except ValueError:
            return False
        finally:
            seen.add(PIL.Image.MAX_IMAGE_PIXELS)
        return True

    assert at_once(read, range(80)) == [bool(number % 2) for number in range(80)]
    assert seen == {1000}


def test_checkpoints_are_converted_in_threads(tmp_path) -> None:
    source = Path(__file__).parent / "fixtures" / "rstrudel" / "seg_vit_linear" / "checkpoint.pth"
    folders = at_once(lambda number: convert_checkpoint(source, tmp_path / str(number)), range(8))
    expected = (folders[0] / "model.safetensors").read_bytes()
    assert all((folder / "model.safetensors").read_bytes() == expected for folder in folders)
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(number) for number in range(8)]
