"""The common pipeline tests of transformers, and what `pipeline` does with images of more than one window."""

import base64
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import PIL.Image
import pytest
from transformers import Pipeline, pipeline

from segmenter_hf import (
    SegmenterConfig,
    SegmenterForSemanticSegmentation,
    SegmenterImageProcessor,
    SegmenterModel,
)
from segmenter_hf.models.pipeline_segmenter import read_input

from ..transformers_common import PipelineTesterMixin, test_pipeline_mixin


def tiny_processor() -> SegmenterImageProcessor:
    return SegmenterImageProcessor(size={"shortest_edge": 32}, window_size=32, window_stride=24, patch_size=8)


def tiny_config() -> SegmenterConfig:
    return SegmenterConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
        id2label={0: "road", 1: "sky", 2: "tree"},
        label2id={"road": 0, "sky": 1, "tree": 2},
    )


def random_image(height: int, width: int, mode: str = "RGB") -> PIL.Image.Image:
    pixels = np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels).convert(mode)


class SegmentationPipelineCheck:
    """What the mixin does with a pipeline; the classes of transformers for it are not distributed."""

    def get_test_pipeline(
        self, model: SegmenterForSemanticSegmentation, tokenizer: None, image_processor: object, dtype: str
    ) -> tuple[Pipeline, list[PIL.Image.Image]]:
        segmenter = pipeline("image-segmentation", model=model, image_processor=image_processor, dtype=dtype)
        return segmenter, [random_image(40, 40), random_image(24, 24)]

    def run_pipeline_test(self, segmenter: Pipeline, examples: list[PIL.Image.Image]) -> None:
        for image in [*examples, random_image(24, 57), random_image(57, 24, "RGBA"), random_image(30, 40, "L")]:
            regions = segmenter(image)
            assert regions
            assert {region["label"] for region in regions} <= {"road", "sky", "tree"}
            assert all(region["score"] is None for region in regions)
            assert all(region["mask"].size == image.size for region in regions)
            assert (sum(np.asarray(region["mask"]) // 255 for region in regions) == 1).all()


def test_images_in_base64_keep_their_depth(tmp_path) -> None:
    values = np.linspace(0, 65535, 1200).reshape(30, 40).astype(np.uint16)
    PIL.Image.fromarray(values).save(tmp_path / "deep.png")
    text = base64.encodebytes((tmp_path / "deep.png").read_bytes()).decode()
    assert np.array_equal(np.asarray(read_input(text)), values)
    random_image(30, 40).convert("RGBA").save(tmp_path / "four.png")
    text = base64.b64encode((tmp_path / "four.png").read_bytes()).decode()
    assert read_input(text, num_channels=4).mode == "RGBA"
    for wrong in ("missing.png", "abcd"):
        with pytest.raises(ValueError, match=wrong):
            read_input(wrong)


class FeaturePipelineCheck:
    """As above, for the encoder alone."""

    def get_test_pipeline(
        self, model: SegmenterModel, tokenizer: None, image_processor: object, dtype: str
    ) -> tuple[Pipeline, list[PIL.Image.Image]]:
        extractor = pipeline("image-feature-extraction", model=model, image_processor=image_processor, dtype=dtype)
        return extractor, [random_image(40, 40), random_image(24, 24)]

    def run_pipeline_test(self, extractor: Pipeline, examples: list[PIL.Image.Image]) -> None:
        for image in examples:
            features = extractor(image, return_tensors=True)
            assert features.shape == (1, 1 + 16, 32)
            assert features.isfinite().all()


def pipeline_check(check: type) -> type | str:
    """A class as the mapping of the installed release holds it: itself, or its path."""
    (held, *_) = (entry["test"] for entry in test_pipeline_mixin.pipeline_test_mapping.values())
    return f"{check.__module__}.{check.__name__}" if isinstance(held, str) else check


class SegmenterPipelineTest(PipelineTesterMixin, unittest.TestCase):
    pipeline_model_mapping = {
        "image-feature-extraction": SegmenterModel,
        "image-segmentation": SegmenterForSemanticSegmentation,
    }

    @classmethod
    def setUpClass(cls) -> None:
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        for model_class in cls.pipeline_model_mapping.values():
            path = Path(folder.name) / "segmenter" / model_class.__name__
            model_class(tiny_config()).save_pretrained(path)
            tiny_processor().save_pretrained(path)
        classes = {"tokenizer_classes": [], "processor_classes": ["SegmenterImageProcessor"]}
        patch = mock.patch.multiple(
            test_pipeline_mixin,
            TRANSFORMERS_TINY_MODEL_PATH=folder.name,
            tiny_model_summary={model_class.__name__: classes for model_class in cls.pipeline_model_mapping.values()},
            pipeline_test_mapping={
                "image-feature-extraction": {"test": pipeline_check(FeaturePipelineCheck)},
                "image-segmentation": {"test": pipeline_check(SegmentationPipelineCheck)},
            },
        )
        patch.start()
        cls.addClassCleanup(patch.stop)

    # In the common class these want timm, for other models' backbones.

    def test_pipeline_image_segmentation(self) -> None:
        self.run_task_tests("image-segmentation")

    def test_pipeline_image_segmentation_fp16(self) -> None:
        self.run_task_tests("image-segmentation", dtype="float16")

    def test_pipeline_image_feature_extraction(self) -> None:
        self.run_task_tests("image-feature-extraction")

    def test_pipeline_image_feature_extraction_fp16(self) -> None:
        self.run_task_tests("image-feature-extraction", dtype="float16")
