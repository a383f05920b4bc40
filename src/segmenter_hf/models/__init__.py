"""The models, their configurations and image processors. Importing them registers them with transformers' Auto classes."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation, __version__
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_segmenter import SegmenterConfig
from .configuration_setr import SetrConfig
from .image_processing_segmenter import SegmenterImageProcessor, SegmenterImageProcessorPil
from .modeling_segmenter import SegmenterForSemanticSegmentation, SegmenterModel
from .modeling_setr import SetrForSemanticSegmentation, SetrModel


if getattr(AutoImageProcessor, "is_dummy", False):
    raise ImportError(
        f"transformers {__version__} reads images only with torchvision, which is not installed: `pip install torchvision`, "
        'or `pip install "transformers>=5.18"`, which reads them without it.'
    )
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

# A subclass of what is there, which treats the models of others as before; imported by the first pipeline of that kind.
_task = PIPELINE_REGISTRY.supported_tasks["image-segmentation"]
if isinstance(_task["impl"], str):
    _task["impl"] = f"{__name__}.pipeline_segmenter.SegmenterPipeline"
else:  # early releases of transformers hold classes
    from .pipeline_segmenter import SegmenterPipeline

    _task["impl"] = SegmenterPipeline
