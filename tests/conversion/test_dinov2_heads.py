"""DINOv2's published heads: two files and a configuration that is read, not run, become one model."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from segmenter_hf import Predictor
from segmenter_hf.cli import convert
from segmenter_hf.conversion.convert import convert_checkpoint
from segmenter_hf.data.label_sets import label_set_from_names
from segmenter_hf.models.sliding_window import Window, merge_windows

from .test_encoders import golden


@pytest.fixture
def linear(tmp_path) -> Path:
    """A copy of the golden of the linear head, to be changed."""
    return Path(shutil.copytree(golden("dinov2_heads/linear"), tmp_path / "linear"))


@pytest.mark.parametrize("name", ["linear", "ms"])
@torch.no_grad()
def test_logits_of_heads_are_those_of_the_original_at_every_size(name, tmp_path) -> None:
    folder = golden(f"dinov2_heads/{name}")
    output_dir = convert_checkpoint(
        folder / "head.pth", tmp_path / "model", encoder_path=folder / "encoder.pth", verify=True
    )
    model = AutoModelForSemanticSegmentation.from_pretrained(output_dir).eval()
    processor = AutoImageProcessor.from_pretrained(output_dir)
    assert model.config.padding == processor.padding == "center"
    arrays = np.load(folder / "expected.npz")
    for index in range(sum(key.startswith("pixel_values") for key in arrays)):
        pixel_values = torch.from_numpy(arrays[f"pixel_values_{index}"]).float()
        expected, pixels = (torch.from_numpy(arrays[f"{key}_{index}"]) for key in ("patch_logits", "logits"))
        logits = model(pixel_values).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        # What the processor makes of one window, and what the loss is computed on, is the original's resize.
        size = tuple(pixel_values.shape[-2:])
        window = torch.tensor([Window(0, 0, 0, 0, 0, *size, *size, *size)])
        ((classes, scores),) = merge_windows(logits, window, 14, return_scores=True, padding="center")
        torch.testing.assert_close(scores, pixels[0].softmax(0), rtol=0, atol=1e-4)
        assert (classes == pixels[0].argmax(0)).float().mean() > 0.999
        labels = pixels.argmax(1)
        loss = torch.nn.functional.cross_entropy(pixels, labels)
        torch.testing.assert_close(model(pixel_values, labels=labels).loss, loss, rtol=0, atol=1e-4)


def test_the_configuration_gives_layers_and_windows_that_the_patch_does_not_divide(linear, tmp_path) -> None:
    output_dir = convert_checkpoint(linear / "head.pth", tmp_path / "model", encoder_path=linear / "encoder.pth")
    model = AutoModelForSemanticSegmentation.from_pretrained(output_dir).eval()
    config = model.config
    assert (config.out_indices, config.decoder_type, config.decoder_norm) == ([3], "linear", "batch_norm")
    assert config.num_labels == 7
    assert (config.position_embedding_offset, config.layerscale_value) == (0.1, 1.0)
    processor = AutoImageProcessor.from_pretrained(output_dir)
    assert (processor.window_size, processor.window_stride, processor.patch_size) == (64, 42, 14)
    labels = label_set_from_names(list(config.id2label.values()))
    segmentation = Predictor(model, processor, labels)(np.zeros((70, 93, 3), np.uint8))
    assert segmentation.class_map.shape == (70, 93)


def test_the_published_configurations_choose_one_of_four_layers(linear, tmp_path) -> None:
    text = (linear / "config.py").read_text().replace("out_indices=[3]", "out_indices=[0, 1, 2, 3]")
    text = text.replace("in_index=[0]", "in_index=[3]")
    (linear / "config.py").rename(linear / "unused.py")
    (linear / "dinov2_vits14_ade20k_linear_config.py").write_text("import os\nwork_dir = os.getcwd()\n" + text)
    head = (linear / "head.pth").rename(linear / "dinov2_vits14_ade20k_linear_head.pth")
    output_dir = convert_checkpoint(head, tmp_path / "model", encoder_path=linear / "encoder.pth")
    assert AutoModelForSemanticSegmentation.from_pretrained(output_dir).config.out_indices == [3]


def test_the_command_line_takes_head_and_encoder(linear, tmp_path, capsys) -> None:
    arguments = ["--checkpoint_path", str(linear / "head.pth"), "--encoder_path", str(linear / "encoder.pth")]
    convert.main([*arguments, "--output_dir", str(tmp_path / "model"), "--verify"])
    assert "SegmenterForSemanticSegmentation from facebookresearch/dinov2" in capsys.readouterr().out


def test_what_does_not_fit_together_is_refused_by_name(linear, tmp_path) -> None:
    head, encoder = linear / "head.pth", linear / "encoder.pth"
    with pytest.raises(ValueError, match="without its encoder: give .* encoder_path"):
        convert_checkpoint(head, tmp_path / "model")
    with pytest.raises(ValueError, match="is one: leave out `encoder_path`"):
        convert_checkpoint(encoder, tmp_path / "model", encoder_path=encoder)
    with pytest.raises(ValueError, match="expected the keys of"):
        convert_checkpoint(head, tmp_path / "model", encoder_path=head)
    text = (linear / "config.py").read_text()
    for old, new, message in (
        ("out_indices=[3]", "out_indices=[2, 3]", None),  # `in_index` chooses the first
        ("in_index=[0]", "in_index=[1]", "expected layers by their numbers"),
        ("in_index=[0]", "in_index=[0, 0]", "the head sees 128 channels, but the layers .* have 256"),
        ("align_corners=False", "align_corners=True", "align_corners=False"),
        ("out_indices=[3]", "out_indices=__import__('os').listdir()", "literals and dict"),
    ):
        (linear / "config.py").write_text(text.replace(old, new))
        if message is None:
            convert_checkpoint(head, tmp_path / "other", encoder_path=encoder)
            continue
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(head, tmp_path / "model", encoder_path=encoder)
    (linear / "config.py").unlink()
    with pytest.raises(ValueError, match="give it as config_path"):
        convert_checkpoint(head, tmp_path / "model", encoder_path=encoder)
