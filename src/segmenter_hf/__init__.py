"""Segmenter and SETR, plain-transformer semantic segmentation, as Hugging Face Transformers models.

Importing the package registers its classes with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation

from .configuration_segmenter import SegmenterConfig
from .conversion import convert_checkpoint
from .image_processing_segmenter import SegmenterImageProcessor, SegmenterImageProcessorPil
from .modeling_segmenter import SegmenterForSemanticSegmentation, SegmenterModel


AutoConfig.register("segmenter", SegmenterConfig)
AutoModel.register(SegmenterConfig, SegmenterModel)
AutoImageProcessor.register(
    SegmenterConfig,
    image_processor_classes={"torchvision": SegmenterImageProcessor, "pil": SegmenterImageProcessorPil},
)
AutoModelForSemanticSegmentation.register(SegmenterConfig, SegmenterForSemanticSegmentation)

__all__ = [
    "SegmenterConfig",
    "SegmenterForSemanticSegmentation",
    "SegmenterImageProcessor",
    "SegmenterImageProcessorPil",
    "SegmenterModel",
    "convert_checkpoint",
]
