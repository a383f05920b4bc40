"""The arguments that the subcommands share which run a model: which one and how, and on which labelled images."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import BaseImageProcessor, PreTrainedModel

from ..data.label_sets import LabelSet
from ..inference.predictor import load_model


@dataclass
class PredictionArguments:
    """Which model to run, by which protocol, and where."""

    _argument_group_name = "model and protocol"

    model_name_or_path: str = field(metadata={"help": "Directory or Hub name of the model."})
    label_set: str | None = field(
        default=None,
        metadata={"help": "Name or JSON file: names, colors, and how stored labels map to the model's classes."},
    )
    multi_scale_flip: bool = field(default=False, metadata={"help": "Average over six scales, each also mirrored."})
    scales: list[float] | None = field(default=None, metadata={"help": "Average over these scales instead."})
    window_batch_size: int = field(default=8, metadata={"help": "Windows at once through the network."})
    device: str | None = field(default=None, metadata={"help": "Device of the model; a GPU where there is one."})
    bf16: bool = field(default=False, metadata={"help": "Weights and arithmetic in bfloat16: approximate, faster."})
    int8: bool = field(default=False, metadata={"help": "Weights in 8 bits: approximate, less memory. Needs torchao."})
    compile: bool = field(default=False, metadata={"help": "Compile the network first; pays for many images."})

    @property
    def options(self) -> dict[str, Any]:
        """What functions that predict take of this."""
        names = ("multi_scale_flip", "scales", "window_batch_size")
        return {name: getattr(self, name) for name in names}

    def load_model(self) -> tuple[PreTrainedModel, BaseImageProcessor, LabelSet]:
        """The model with its image processor and label set."""
        return load_model(
            self.model_name_or_path,
            self.label_set,
            self.device,
            dtype=torch.bfloat16 if self.bf16 else torch.float32,
            int8=self.int8,
            compile=self.compile,
        )


@dataclass
class EvaluationDataArguments:
    """Which images to evaluate, as [`~segmenter_hf.data.loading.load_split`] takes them."""

    _argument_group_name = "images of the dataset"

    split: str = field(default="validation", metadata={"help": "Split to evaluate."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub dataset."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str = field(default="annotation", metadata={"help": "Column of the label maps."})
    max_samples: int | None = field(default=None, metadata={"help": "Evaluate the first so many images only."})


__all__ = ["EvaluationDataArguments", "PredictionArguments"]
