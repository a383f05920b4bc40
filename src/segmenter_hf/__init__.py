"""Segmenter and SETR, plain-transformer semantic segmentation, as Hugging Face Transformers models.

Importing the package registers its classes with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation

from .conversion.convert import convert_checkpoint
from .models.configuration_segmenter import SegmenterConfig
from .models.configuration_setr import SetrConfig
from .models.image_processing_segmenter import SegmenterImageProcessor, SegmenterImageProcessorPil
from .models.modeling_segmenter import SegmenterForSemanticSegmentation, SegmenterModel
from .models.modeling_setr import SetrForSemanticSegmentation, SetrModel


for _config, _model, _segmentation_model in (
    (SegmenterConfig, SegmenterModel, SegmenterForSemanticSegmentation),
    (SetrConfig, SetrModel, SetrForSemanticSegmentation),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    AutoImageProcessor.register(
        _config, image_processor_classes={"torchvision": SegmenterImageProcessor, "pil": SegmenterImageProcessorPil}
    )
    AutoModelForSemanticSegmentation.register(_config, _segmentation_model)

__all__ = [
    "SegmenterConfig",
    "SegmenterForSemanticSegmentation",
    "SegmenterImageProcessor",
    "SegmenterImageProcessorPil",
    "SegmenterModel",
    "SetrConfig",
    "SetrForSemanticSegmentation",
    "SetrModel",
    "convert_checkpoint",
]
