"""Prediction with a model and an image processor that are made in a test."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import BaseImageProcessor, PreTrainedModel

from segmenter_hf.data.label_sets import label_set_from_names
from segmenter_hf.inference.predictor import Predictor
from segmenter_hf.inference.protocol import InferenceProtocol
from segmenter_hf.models.image_processing_segmenter import SemanticSegmentationPostProcessorOutput


def make_predictor(
    model: PreTrainedModel, processor: BaseImageProcessor, *, multi_scale_flip: bool = False, **fields: Any
) -> Predictor:
    """A predictor whose classes have the names of the model's configuration; `fields` are those of the protocol."""
    label_set = label_set_from_names(list(model.config.id2label.values()), ignore_index=-1).with_background()
    make_protocol = InferenceProtocol.multi_scale_flip if multi_scale_flip else InferenceProtocol
    return Predictor(model, processor, label_set, make_protocol(**fields))


def segment_images(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    images: Sequence[Any],
    *,
    return_segmentation_scores: bool = False,
    dtype: torch.dtype = torch.long,
    **fields: Any,
) -> list:
    """Class maps, or what `post_process_semantic_segmentation` returns with scores; `fields` as for `make_predictor`."""
    predictor = make_predictor(model, processor, **fields)
    results = predictor(list(images), return_scores=return_segmentation_scores, dtype=dtype)
    if not return_segmentation_scores:
        return [result.class_map for result in results]
    return [
        SemanticSegmentationPostProcessorOutput(
            data={"segmentation": result.class_map, "segmentation_scores": result.scores}
        )
        for result in results
    ]
