"""Segmenter (Strudel et al., "Segmenter: Transformer for Semantic Segmentation", ICCV 2021)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .batch_norm import VitEncoderBatchNorm
from .configuration_segmenter import SegmenterConfig
from .modeling_vit_encoder import (
    VitEncoderLayer,
    VitEncoderModel,
    VitEncoderPreTrainedModel,
    patch_grid,
)
from .token_merging import MergedTokens, token_attention_mask


@dataclass
class SegmenterSemanticSegmenterOutput(ModelOutput):
    """Output of [`SegmenterForSemanticSegmentation`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, when `labels` are given): Mean cross-entropy over valid pixels.
        logits (`torch.FloatTensor` of shape `(batch_size, num_labels, ceil(height / patch), ceil(width / patch))`):
            Scores of each patch before softmax.
        hidden_states (`tuple[torch.FloatTensor]`, on request): Embeddings and the output of each encoder layer.
        attentions (`tuple[torch.FloatTensor]`, on request): Attention probabilities of each encoder layer.
        decoder_hidden_states (`tuple[torch.FloatTensor]`, on request): Input and output of each decoder layer, of
            shape `(batch_size, patches + num_labels, decoder_hidden_size)`; none for the linear decoder.
        decoder_attentions (`tuple[torch.FloatTensor]`, on request): Attention probabilities of each decoder layer.
        window_offsets (`torch.LongTensor` of shape `(batch_size, 11)`, when given): Passed on for the image processor.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    decoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    decoder_attentions: tuple[torch.Tensor, ...] | None = None
    window_offsets: torch.Tensor | None = None


class SegmenterLinearDecoder(nn.Module):
    """A linear layer from each patch token to the classes (section 3.2), after batch normalization where it is wanted."""

    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__()
        width = config.hidden_size * len(config.out_indices or [-1])
        self.batch_norm = VitEncoderBatchNorm(width) if config.decoder_norm == "batch_norm" else None
        self.classifier = nn.Linear(width, config.num_labels)

    def forward(self, patches: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> tuple[torch.Tensor, None, None]:
        """Patch tokens (batch, patches, layers * hidden) to masks (batch, patches, labels); no states, no attentions."""
        if self.batch_norm is not None:
            patches = self.batch_norm(patches.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)
        return self.classifier(patches), None, None


class SegmenterMaskTransformerDecoder(nn.Module):
    """Patches and learned class embeddings attend to each other; their products are the masks (section 3.2)."""

    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__()
        self.config = config
        width, last = config.decoder_hidden_size, max(config.decoder_num_hidden_layers - 1, 1)
        self.projection = nn.Linear(config.hidden_size, width)
        self.class_embeddings = nn.Parameter(torch.zeros(1, config.num_labels, width))
        self.layers = nn.ModuleList(
            VitEncoderLayer(
                config,
                hidden_size=width,
                num_attention_heads=config.decoder_num_attention_heads,
                intermediate_size=config.decoder_intermediate_size,
                hidden_dropout_prob=config.decoder_hidden_dropout_prob,
                attention_probs_dropout_prob=config.decoder_attention_probs_dropout_prob,
                drop_path_rate=config.decoder_drop_path_rate * index / last,
                layer_norm_eps=config.decoder_layer_norm_eps,
            )
            for index in range(config.decoder_num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(width, eps=config.decoder_layer_norm_eps)
        self.patch_projection = nn.Linear(width, width, bias=False)
        self.class_projection = nn.Linear(width, width, bias=False)
        # A LayerNorm over one class would leave nothing of it: only its scale and offset remain.
        self.mask_norm = (
            nn.Linear(1, 1)
            if config.num_labels == 1
            else nn.LayerNorm(config.num_labels, eps=config.decoder_mask_norm_eps)
        )

    def forward(
        self, patches: torch.Tensor, merged: MergedTokens | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Patch tokens (batch, patches, hidden) to masks (batch, patches, labels), layer states and attentions.

        With `merged` the tokens that hold the patches; what is returned is of patches all the same.
        """
        classes = self.class_embeddings.expand(patches.shape[0], -1, -1)
        tokens = torch.cat([self.projection(patches), classes], dim=1)
        mask = token_attention_mask(self.config, tokens, merged, num_suffix_tokens=classes.shape[1])
        hidden_states, attentions = [tokens], []
        for layer in self.layers:
            tokens, probabilities, _ = layer(tokens, attention_mask=mask, **kwargs)
            hidden_states.append(tokens)
            attentions.append(probabilities)
        tokens = self.layernorm(tokens)
        patches, classes = tokens.split([patches.shape[1], classes.shape[1]], dim=1)
        patches, classes = (
            # The usual least norm of 1e-12 is 0 in float16, and a vector of zeros would become NaN.
            nn.functional.normalize(vectors, dim=-1, eps=max(1e-12, torch.finfo(vectors.dtype).smallest_normal))
            for vectors in (self.patch_projection(patches), self.class_projection(classes))
        )
        masks = self.mask_norm(patches @ classes.transpose(1, 2))
        attentions = [probabilities for probabilities in attentions if probabilities is not None]
        if merged is not None:
            masks, suffix = merged.expand(masks), classes.shape[1]
            hidden_states = [merged.expand(states, num_suffix_tokens=suffix) for states in hidden_states]
            attentions = [merged.expand_attention(values, num_suffix_tokens=suffix) for values in attentions]
        return masks, tuple(hidden_states), tuple(attentions)


class SegmenterPreTrainedModel(VitEncoderPreTrainedModel):
    """Configuration, prefix and initialization of the Segmenter models."""

    config: SegmenterConfig
    base_model_prefix = "segmenter"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the encoder; the two products of the mask decoder are normal with standard deviation width^-0.5."""
        super()._init_weights(module)
        if isinstance(module, SegmenterMaskTransformerDecoder):
            init.trunc_normal_(module.class_embeddings, std=self.config.initializer_range)
            for projection in (module.patch_projection, module.class_projection):
                init.normal_(projection.weight, std=self.config.decoder_hidden_size**-0.5)
            if self.config.num_labels == 1:
                init.ones_(module.mask_norm.weight)


class SegmenterModel(SegmenterPreTrainedModel, VitEncoderModel):
    """The encoder of Segmenter. `forward` takes images and returns their tokens: see [`VitEncoderModel.forward`]."""


class SegmenterForSemanticSegmentation(SegmenterPreTrainedModel):
    """The encoder with a linear or mask transformer decoder, which gives scores of each patch for each class."""

    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__(config)
        self.segmenter = SegmenterModel(config)
        self.decode_head = (
            SegmenterLinearDecoder(config)
            if config.decoder_type == "linear"
            else SegmenterMaskTransformerDecoder(config)
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        window_offsets: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SegmenterSemanticSegmenterOutput:
        r"""Segment images of any size.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`): Normalized images
                or windows of images. Sides that `patch_size` does not divide are padded with 0 for the network.
            labels (`torch.LongTensor` of shape `(batch_size, height, width)`, *optional*): Classes from 0 to
                `num_labels - 1`, or `semantic_loss_ignore_index`; the loss is computed when they are given.
            window_offsets (`torch.LongTensor` of shape `(batch_size, 11)`, *optional*): The image processor's
                description of the windows, passed on to its `post_process_semantic_segmentation`.

        Returns:
            [`SegmenterSemanticSegmenterOutput`]

        Raises:
            ValueError: If the channels are not the configuration's or the labels do not have the size of the images.
        """
        height, width = pixel_values.shape[-2:]
        outputs = self.segmenter(pixel_values, **kwargs)
        options: dict[str, Any] = {**kwargs}
        tokens = outputs.last_hidden_state
        if outputs.feature_states is not None:
            tokens = torch.cat([self.segmenter.layernorm(states) for states in outputs.feature_states], dim=-1)
        if outputs.merged_tokens and self.config.decoder_type == "mask_transformer":
            tokens, options["merged"] = outputs.merged_hidden_state, outputs.merged_tokens[-1]
        patches = tokens[:, self.segmenter.embeddings.num_prefix_tokens :]
        masks, decoder_hidden_states, decoder_attentions = self.decode_head(patches, **options)
        grid = patch_grid(pixel_values, self.config.patch_size)
        logits = masks.transpose(1, 2).unflatten(2, grid)  # (batch, labels, grid height, grid width)

        loss = None
        if labels is not None:
            loss = self.compute_loss(logits, labels, (height, width))
        return SegmenterSemanticSegmenterOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            decoder_hidden_states=None if outputs.hidden_states is None else decoder_hidden_states,
            decoder_attentions=None if outputs.attentions is None else decoder_attentions,
            window_offsets=window_offsets,
        )


# The image-segmentation pipeline looks the name of the class up here.
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES.setdefault("segmenter", "SegmenterForSemanticSegmentation")
SegmenterModel.register_for_auto_class("AutoModel")
SegmenterForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")

__all__ = [
    "SegmenterForSemanticSegmentation",
    "SegmenterModel",
    "SegmenterPreTrainedModel",
    "SegmenterSemanticSegmenterOutput",
]
