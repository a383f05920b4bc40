"""The common tests of transformers on the Segmenter models."""

import unittest

import pytest
import torch

from segmenter_hf import SegmenterConfig, SegmenterForSemanticSegmentation, SegmenterModel

from ..transformers_common.segmentation_models import SegmentationModelTestMixin


class SegmenterModelTestMixin(SegmentationModelTestMixin):
    config_class = SegmenterConfig
    all_model_classes = (SegmenterModel, SegmenterForSemanticSegmentation)
    num_hidden_states_types = (1, 2)

    def test_attention_outputs(self) -> None:
        """It counts the kinds of hidden states: those of the encoder and, where there are layers, of the decoder."""
        for model_class, num_hidden_states_types in zip(type(self).all_model_classes, self.num_hidden_states_types):
            self.all_model_classes = (model_class,)
            self.model_tester.num_hidden_states_types = num_hidden_states_types
            super().test_attention_outputs()


class SegmenterMaskTransformerTest(SegmenterModelTestMixin, unittest.TestCase):
    config_arguments = {"decoder_type": "mask_transformer", "decoder_hidden_size": 24}


class SegmenterLinearTest(SegmenterModelTestMixin, unittest.TestCase):
    config_arguments = {"decoder_type": "linear"}
    num_hidden_states_types = (1, 1)


class SegmenterWithDistillationTokenTest(SegmenterModelTestMixin, unittest.TestCase):
    config_arguments = {"use_distillation_token": True, "position_embedding_interpolation": "bicubic"}
    num_prefix_tokens = 2


class SegmenterOnDinov2WithRegistersTest(SegmenterModelTestMixin, unittest.TestCase):
    config_arguments = {
        "decoder_type": "linear",
        "decoder_norm": "batch_norm",
        "out_indices": [0, 1],
        "layerscale_value": 1.0,
        "num_register_tokens": 2,
        "use_gated_mlp": True,
        "padding": "center",
        "position_embedding_interpolation": "bicubic",
        "position_embedding_antialias": True,
    }
    num_hidden_states_types = (1, 1)
    num_prefix_tokens = 3


class SegmenterOnDinov3Test(SegmenterModelTestMixin, unittest.TestCase):
    config_arguments = {
        "layerscale_value": 1.0,
        "num_register_tokens": 2,
        "position_embedding_type": "rotary",
        "key_bias": False,
    }
    num_prefix_tokens = 3


class SegmenterOnSiglipTest(SegmenterModelTestMixin, unittest.TestCase):
    config_arguments = {"use_class_token": False, "hidden_act": "gelu_pytorch_tanh"}
    num_prefix_tokens = 0


class SegmenterOnClipTest(SegmenterModelTestMixin, unittest.TestCase):
    config_arguments = {"use_pre_layer_norm": True, "use_final_layer_norm": False, "hidden_act": "quick_gelu"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_a_vector_of_zeros_has_finite_masks_in_every_type(dtype) -> None:
    config = SegmenterConfig(
        hidden_size=16, num_attention_heads=2, intermediate_size=32, num_hidden_layers=1, num_labels=3
    )
    model = SegmenterForSemanticSegmentation(config).eval().to(dtype)
    model.decode_head.patch_projection.weight.zero_()
    assert model(torch.randn(1, 3, 32, 48, dtype=dtype)).logits.isfinite().all()
