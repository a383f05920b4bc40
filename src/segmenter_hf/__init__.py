"""Segmenter and SETR, plain-transformer semantic segmentation, as Hugging Face Transformers models.

Importing the package registers its classes with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForSemanticSegmentation

from .configuration_segmenter import SegmenterConfig
from .modeling_segmenter import SegmenterForSemanticSegmentation, SegmenterModel


AutoConfig.register("segmenter", SegmenterConfig)
AutoModel.register(SegmenterConfig, SegmenterModel)
AutoModelForSemanticSegmentation.register(SegmenterConfig, SegmenterForSemanticSegmentation)

__all__ = ["SegmenterConfig", "SegmenterForSemanticSegmentation", "SegmenterModel"]
