"""The common tests of transformers on the SETR models."""

import unittest

from segmenter_hf import SetrConfig, SetrForSemanticSegmentation, SetrModel

from ..transformers_common.segmentation_models import SegmentationModelTestMixin


class SetrModelTestMixin(SegmentationModelTestMixin):
    config_class = SetrConfig
    all_model_classes = (SetrModel, SetrForSemanticSegmentation)


class SetrNaiveTest(SetrModelTestMixin, unittest.TestCase):
    config_arguments = {"decoder_type": "naive", "decoder_hidden_size": 16, "out_indices": [0, 1]}


class SetrPupTest(SetrModelTestMixin, unittest.TestCase):
    config_arguments = {"decoder_type": "pup", "decoder_hidden_size": 16, "out_indices": [0, 1]}


class SetrMlaTest(SetrModelTestMixin, unittest.TestCase):
    config_arguments = {"decoder_type": "mla", "decoder_hidden_size": 16, "out_indices": [0, 1]}
    num_prefix_tokens = 0
