"""The arguments that the subcommands share which run a model: which one and how, and on which labelled images."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ..inference.predictor import Predictor
from ..inference.protocol import InferenceProtocol


@dataclass
class PredictionArguments:
    """Which model to run, by which protocol, and where."""

    _argument_group_name = "model and protocol"

    model_name_or_path: str = field(metadata={"help": "Directory or Hub name of the model."})
    label_set: str | None = field(
        default=None,
        metadata={
            "help": "Name or file (JSON, text, CSV): names, colors, and how stored labels map to the model's classes."
        },
    )
    multi_scale_flip: bool = field(default=False, metadata={"help": "Average over six scales, each also mirrored."})
    scales: list[float] | None = field(default=None, metadata={"help": "Average over these scales instead."})
    window_batch_size: int = field(default=8, metadata={"help": "Windows at once through the network."})
    device: str | None = field(default=None, metadata={"help": "Device of the model; a GPU where there is one."})
    bf16: bool = field(default=False, metadata={"help": "Weights and arithmetic in bfloat16: approximate, faster."})
    int8: bool = field(default=False, metadata={"help": "Weights in 8 bits: approximate, less memory. Needs torchao."})
    compile: bool = field(default=False, metadata={"help": "Compile the network first; pays for many images."})
    token_merging: bool = field(
        default=False, metadata={"help": "Merge similar patches in the network: approximate, faster."}
    )
    token_merging_threshold: float | None = field(
        default=None, metadata={"help": "The same, of patches at least so similar: up to 1, and slower towards it."}
    )
    patch_size: int | None = field(
        default=None,
        metadata={"help": "Resize the patches of the network: larger ones are approximate and faster, as 32 for 16."},
    )
    runtime: Literal["torch", "onnxruntime", "openvino"] = field(
        default="torch",
        metadata={"help": "What runs the network; others than torch run what `segmenter-hf export` wrote."},
    )
    precision: str | None = field(
        default=None, metadata={"help": "Of an exported model, one that it was exported in; by default the first."}
    )

    def load_predictor(self, **fields: Any) -> Predictor:
        """The model with what belongs to it and the protocol, of which `fields` are further ones."""
        fields["window_batch_size"] = self.window_batch_size
        if self.scales is not None:
            fields["scales"] = tuple(self.scales)
        make_protocol = InferenceProtocol.multi_scale_flip if self.multi_scale_flip else InferenceProtocol
        return Predictor.from_pretrained(
            self.model_name_or_path,
            make_protocol(**fields),
            device=self.device,
            dtype=torch.bfloat16 if self.bf16 else torch.float32,
            runtime=self.runtime,
            precision=self.precision,
            label_set=self.label_set,
            int8=self.int8,
            compile=self.compile,
            token_merging=self.token_merging,
            token_merging_threshold=self.token_merging_threshold,
            patch_size=self.patch_size,
        )


@dataclass
class EvaluationDataArguments:
    """Which images to evaluate, as [`~segmenter_hf.data.loading.load_split`] takes them."""

    _argument_group_name = "images of the dataset"

    split: str | None = field(
        default=None, metadata={"help": "Split to evaluate; by default that of the training, validation."}
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub dataset, or the kind of masks of a folder with two."}
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub dataset."})
    image_column: str | None = field(default=None, metadata={"help": "Column of the images. By default it is found."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the masks. By default it is found."})
    validation_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Share of train that is the validation split; train is the rest. As in the training by default; 0 for none."
        },
    )
    data_seed: int | None = field(
        default=None, metadata={"help": "Seed of that split, as in the training by default."}
    )
    max_samples: int | None = field(default=None, metadata={"help": "Evaluate the first so many images only."})


__all__ = ["EvaluationDataArguments", "PredictionArguments"]
