"""Windows, scales, flips, merge and training of the original system, through converted models and the processor."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, get_scheduler

from segmenter_hf import convert_checkpoint

from ..prediction import segment_images


FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = ["seg_vit_linear", "seg_vit_mask", "seg_deit_linear", "seg_deit_mask"]
SCALES = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
TENSORS = {"do_resize": False, "do_rescale": False, "do_normalize": False, "input_data_format": "channels_first"}


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("converted")
    return {name: convert_checkpoint(FIXTURES / "rstrudel" / name / "checkpoint.pth", folder / name) for name in NAMES}


def load(directory: Path):
    return (
        AutoModelForSemanticSegmentation.from_pretrained(directory).eval(),
        AutoImageProcessor.from_pretrained(directory),
    )


def arrays_of(*parts: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES.joinpath(*parts)) as arrays:
        return {name: arrays[name].astype(np.float32) for name in arrays}


def agreement(segmentation: torch.Tensor, scores: np.ndarray) -> float:
    """Share of the pixels with the class of the greatest score; the float16 of the stored scores makes some ties."""
    chosen = np.take_along_axis(scores, segmentation.numpy()[None], axis=0)
    return float((chosen[0] == scores.max(0)).mean())


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_windows_of_a_tensor_give_the_scores_of_the_original(converted, name) -> None:
    model, processor = load(converted[name])
    expected = arrays_of("rstrudel", name, "expected.npz")
    inputs = processor(torch.from_numpy(expected["slide_pixel_values"][0]), **TENSORS)
    outputs = model(**inputs)
    for target, golden in ((None, "slide_scores"), ((-7, 5), "slide_scores_resized")):
        height, width = expected["slide_pixel_values"].shape[-2:]
        sizes = None if target is None else [(height + target[0], width + target[1])]
        (result,) = processor.post_process_semantic_segmentation(outputs, sizes, return_segmentation_scores=True)
        assert np.abs(result.segmentation_scores.numpy() - expected[golden]).max() < 5e-3
        assert agreement(result.segmentation, expected[golden]) >= 0.999


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_six_scales_and_flips_give_the_scores_of_the_original(converted, name) -> None:
    model, processor = load(converted[name])
    expected = arrays_of("rstrudel", name, "expected.npz")
    image = torch.from_numpy(expected["slide_pixel_values"][0])
    outputs = model(**processor(image, scales=SCALES, do_flip=True, **TENSORS))
    (result,) = processor.post_process_semantic_segmentation(outputs, return_segmentation_scores=True)
    assert np.abs(result.segmentation_scores.numpy() - expected["ms_flip_scores"]).max() < 5e-3
    assert agreement(result.segmentation, expected["ms_flip_scores"]) >= 0.999


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
@pytest.mark.parametrize(("multi_scale_flip", "golden"), [(False, "ss_scores"), (True, "ms_flip_scores")])
def test_an_image_goes_through_the_whole_protocol_of_the_original(
    converted, backend, multi_scale_flip, golden
) -> None:
    folder = FIXTURES / "protocol" / "inference"
    protocol = json.loads((folder / "protocol.json").read_text())
    directory = converted[protocol["checkpoint"]]
    model, _ = load(directory)
    processor = AutoImageProcessor.from_pretrained(directory, backend=backend)
    assert dict(processor.size) == {
        "shortest_edge": protocol["im_size"],
        "longest_edge": protocol["max_ratio"] * protocol["im_size"],
    }
    image = Image.open(folder / "image.png")
    (result,) = segment_images(
        model, processor, [image], multi_scale_flip=multi_scale_flip, return_segmentation_scores=True
    )
    expected = arrays_of("protocol", "inference", "expected.npz")[golden]
    # cv2's fixed-point resize rounds differently; antialiasing would be ten times as far off
    assert np.abs(result.segmentation_scores.numpy() - expected).mean() < 2e-3
    assert agreement(result.segmentation, expected) >= 0.99


def test_six_training_steps_give_the_losses_of_the_original(converted) -> None:
    about = json.loads((FIXTURES / "protocol" / "training" / "about.json").read_text())
    with np.load(FIXTURES / "protocol" / "training" / "expected.npz") as arrays:
        expected = {name: arrays[name] for name in arrays}
    model = AutoModelForSemanticSegmentation.from_pretrained(
        converted[about["checkpoint"]],
        drop_path_rate=about["drop_path"],
        decoder_hidden_dropout_prob=about["dropout"],
        decoder_attention_probs_dropout_prob=about["dropout"],
    ).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=about["learning_rate"], momentum=0.9, nesterov=True)
    scheduler = get_scheduler("polynomial", optimizer, 0, 12, scheduler_specific_kwargs={"power": 0.9, "lr_end": 1e-5})
    losses, learning_rates = [], []
    for pixel_values, labels in zip(expected["pixel_values"], expected["labels"]):
        loss = model(torch.from_numpy(pixel_values).float(), labels=torch.from_numpy(labels)).loss
        learning_rates.append(scheduler.get_last_lr()[0])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(losses, expected["losses"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(learning_rates, expected["learning_rates"], rtol=0, atol=1e-9)
    with torch.no_grad():
        pixel_values = torch.from_numpy(expected["pixel_values"][0]).float()
        logits = model.eval()(pixel_values).logits
    upsampled = torch.nn.functional.interpolate(logits, size=pixel_values.shape[-2:], mode="bilinear")
    assert np.abs(upsampled.numpy() - expected["final_logits"].astype(np.float32)).max() < 5e-3
