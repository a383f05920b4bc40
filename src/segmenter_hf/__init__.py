"""Segmenter and SETR, plain-transformer semantic segmentation, as Hugging Face Transformers models.

Importing the package takes milliseconds: names are imported when they are used, and the models are registered with
transformers' Auto classes when transformers loads these.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from .registration import RegisterWithTransformers


if TYPE_CHECKING:
    from .conversion.convert import convert_checkpoint as convert_checkpoint
    from .evaluation.evaluate import evaluate_segmentation as evaluate_segmentation
    from .evaluation.metrics import MeanIoU as MeanIoU
    from .hub.publishing import publish_model as publish_model
    from .inference.predictor import Predictor as Predictor
    from .inference.predictor import Segmentation as Segmentation
    from .inference.protocol import InferenceProtocol as InferenceProtocol
    from .models.configuration_segmenter import SegmenterConfig as SegmenterConfig
    from .models.configuration_setr import SetrConfig as SetrConfig
    from .models.image_processing_segmenter import SegmenterImageProcessor as SegmenterImageProcessor
    from .models.image_processing_segmenter import SegmenterImageProcessorPil as SegmenterImageProcessorPil
    from .models.modeling_segmenter import SegmenterForSemanticSegmentation as SegmenterForSemanticSegmentation
    from .models.modeling_segmenter import SegmenterModel as SegmenterModel
    from .models.modeling_setr import SetrForSemanticSegmentation as SetrForSemanticSegmentation
    from .models.modeling_setr import SetrModel as SetrModel
    from .training.run import train_segmenter as train_segmenter
    from .training.trainer import SegmentationTrainer as SegmentationTrainer

    __version__: str

# The public names and where they are.
_MODULES = {
    "InferenceProtocol": "inference.protocol",
    "MeanIoU": "evaluation.metrics",
    "Predictor": "inference.predictor",
    "Segmentation": "inference.predictor",
    "SegmentationTrainer": "training.trainer",
    "SegmenterConfig": "models.configuration_segmenter",
    "SegmenterForSemanticSegmentation": "models.modeling_segmenter",
    "SegmenterImageProcessor": "models.image_processing_segmenter",
    "SegmenterImageProcessorPil": "models.image_processing_segmenter",
    "SegmenterModel": "models.modeling_segmenter",
    "SetrConfig": "models.configuration_setr",
    "SetrForSemanticSegmentation": "models.modeling_setr",
    "SetrModel": "models.modeling_setr",
    "convert_checkpoint": "conversion.convert",
    "evaluate_segmentation": "evaluation.evaluate",
    "publish_model": "hub.publishing",
    "train_segmenter": "training.run",
}
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return metadata.version("segmenter-hf")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


RegisterWithTransformers().install()
