"""The protocol: what is accepted, what the image processor gets of it, and what is recorded beside numbers."""

import json

import pytest

from segmenter_hf import SegmenterImageProcessor
from segmenter_hf.inference.protocol import MULTI_SCALES, PAPER_PROTOCOLS, InferenceProtocol


def test_the_protocols_of_the_papers_have_the_names_of_their_columns() -> None:
    assert list(PAPER_PROTOCOLS) == ["single scale", "multi-scale + flip"]
    both = InferenceProtocol.multi_scale_flip(window_batch_size=3)
    assert both == InferenceProtocol(MULTI_SCALES, flip=True, window_batch_size=3)
    assert InferenceProtocol([0.5, 1], flip=True).name == "scales 0.5, 1.0 + flip"


def test_the_processor_gets_its_arguments() -> None:
    assert InferenceProtocol().processor_kwargs() == {"scales": [1.0], "do_flip": False}
    full = InferenceProtocol((0.5,), flip=True, full_resolution=True).processor_kwargs()
    assert full == {"scales": [0.5], "do_flip": True, "do_resize": False}


@pytest.mark.parametrize(
    "fields",
    [
        {"scales": ()},
        {"scales": 1.0},
        {"scales": (0.0, 1.0)},
        {"scales": (17,)},
        {"scales": ("1",)},
        {"scales": (float("nan"),)},
        {"flip": 1},
        {"full_resolution": None},
        {"window_batch_size": 0},
        {"window_batch_size": 2.0},
        {"max_image_pixels": 0},
    ],
    ids=str,
)
def test_fields_out_of_range_are_refused(fields) -> None:
    (name,) = fields
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        InferenceProtocol(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"resample": 3},
        {"do_resize": False},
        {"size": {"shortest_edge": 32}},
        {"window_size": 64},
        {"window_stride": 8},
        {"image_mean": [0.4, 0.5, 0.5]},
        {"image_std": 0.25},
        {"do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 1.0},
        {"do_convert_rgb": False},
        {"do_split_windows": False},
        {"do_resize_to_window": True},
    ],
    ids=str,
)
def test_the_description_changes_with_every_field_that_changes_pixels(fields) -> None:
    usual = {"size": {"shortest_edge": 40}, "window_size": 32, "window_stride": 16, "patch_size": 8}
    protocol = InferenceProtocol()
    described, changed = (protocol.describe(SegmenterImageProcessor(**{**usual, **more})) for more in ({}, fields))
    assert json.loads(json.dumps(described)) == described
    assert described["resample"] == "bilinear without antialiasing" and described["do_resize"] is True
    assert [name for name in described if changed[name] != described[name]] == list(fields)


def test_the_description_changes_with_the_protocol() -> None:
    processor = SegmenterImageProcessor()
    full = InferenceProtocol(full_resolution=True).describe(processor)
    assert full["full_resolution"] and not full["do_resize"]
    assert InferenceProtocol(flip=True).describe(processor)["do_flip"]
