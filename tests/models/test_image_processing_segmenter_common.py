"""The common tests of transformers on the image processors."""

import subprocess
import sys
import tempfile
import textwrap
import unittest

import pytest
import torch
from transformers import set_seed

from segmenter_hf import SegmenterImageProcessor, SegmenterImageProcessorPil
from segmenter_hf.models.modeling_segmenter import SegmenterSemanticSegmenterOutput

from ..transformers_common import (
    ImageProcessingTester,
    ImageProcessingTestMixin,
    PostProcessSemanticSegmentationTestMixin,
)


if ImageProcessingTester is None or PostProcessSemanticSegmentationTestMixin is None:
    pytest.skip("the common tests of this release of transformers have another form", allow_module_level=True)


class SegmenterImageProcessingTester(ImageProcessingTester):
    """Windows of 32 pixels, so that square images are one window each and others more."""

    only_squares = False
    num_labels = 5

    def __init__(self, parent: unittest.TestCase) -> None:
        super().__init__(
            parent,
            batch_size=3,
            min_resolution=20,
            max_resolution=80,
            size={"shortest_edge": 32, "longest_edge": 128},
            window_size=32,
            window_stride=24,
            patch_size=8,
            image_mean=[0.4, 0.5, 0.6],
            image_std=[0.2, 0.3, 0.4],
            do_reduce_labels=True,
        )

    def _get_image_processing_classes(self) -> dict[str, type]:
        return {"torchvision": SegmenterImageProcessor, "pil": SegmenterImageProcessorPil}

    def prepare_image_inputs(self, *args: object, equal_resolution: bool = False, **kwargs: object) -> list:
        equal_resolution = equal_resolution or self.only_squares
        return super().prepare_image_inputs(*args, equal_resolution=equal_resolution, **kwargs)

    def prepare_post_process_semantic_segmentation_inputs(self) -> tuple[dict, dict]:
        processor = SegmenterImageProcessor(**self.prepare_image_processor_dict())
        window_offsets = processor(torch.zeros(self.batch_size, 3, 24, 60)).window_offsets
        logits = torch.randn(len(window_offsets), self.num_labels, 4, 4)
        outputs = SegmenterSemanticSegmenterOutput(logits=logits, window_offsets=window_offsets)
        return {"outputs": outputs}, {"num_labels": self.num_labels, "height": 24, "width": 60}


class SegmenterImageProcessingTest(
    ImageProcessingTestMixin, PostProcessSemanticSegmentationTestMixin, unittest.TestCase
):
    image_processor_tester_class = SegmenterImageProcessingTester
    backend_equivalence_atol = 0.0
    test_cast_dtype = True

    def setUp(self) -> None:
        set_seed(0)
        super().setUp()
        # These tests expect one row of pixel values for each image.
        self.image_processor_tester.only_squares = self._testMethodName.startswith("test_call_")

    def test_images_of_any_shape_become_all_their_windows(self) -> None:
        images = self.image_processor_tester.prepare_image_inputs(numpify=True)
        resized = [max(32, round(32 * max(image.shape[:2]) / min(image.shape[:2]))) for image in images]
        num_windows = sum(1 + max(0, -(-(side - 32) // 24)) for side in resized)
        assert num_windows > len(images)
        for image_processing_class in self.image_processing_classes.values():
            pixel_values = image_processing_class(**self.image_processor_dict)(images).pixel_values
            assert pixel_values.shape == (num_windows, 3, 32, 32)

    def test_pil_can_run_without_torchvision(self) -> None:
        """In the place of the common test, whose new process does not import the package and so knows no class."""
        script = """
            import sys
            sys.modules["torchvision"] = None
            import torch
            import segmenter_hf
            from transformers import AutoImageProcessor
            processor = AutoImageProcessor.from_pretrained(sys.argv[1])
            print(type(processor).__name__, processor(torch.full((3, 24, 60), 7)).pixel_values.sum().item())
        """
        processor = SegmenterImageProcessor(**self.image_processor_dict)
        with tempfile.TemporaryDirectory() as folder:
            processor.save_pretrained(folder)
            command = [sys.executable, "-c", textwrap.dedent(script), folder]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        expected = processor(torch.full((3, 24, 60), 7)).pixel_values.sum().item()
        assert printed.split() == ["SegmenterImageProcessorPil", str(expected)]
