"""SETR (Zheng et al., "Rethinking Semantic Segmentation from a Sequence-to-Sequence Perspective with Transformers",
CVPR 2021)."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .batch_norm import VitEncoderBatchNorm as SetrBatchNorm
from .configuration_setr import SetrConfig
from .modeling_vit_encoder import VitEncoderModel, VitEncoderPreTrainedModel, patch_grid


@dataclass
class SetrSemanticSegmenterOutput(ModelOutput):
    """Output of [`SetrForSemanticSegmentation`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, when `labels` are given): Mean cross-entropy over valid pixels, plus that
            of each auxiliary head times `auxiliary_loss_weight`.
        logits (`torch.FloatTensor` of shape `(batch_size, num_labels, logits_height, logits_width)`): Scores before
            softmax, at the resolution of the head: with the published settings a quarter of the padded input for "naive"
            and "mla", all of it for "pup".
        auxiliary_logits (`tuple[torch.FloatTensor]`, on request): Scores of each auxiliary head, at its own resolution.
        hidden_states (`tuple[torch.FloatTensor]`, on request): Embeddings and the output of each encoder layer.
        attentions (`tuple[torch.FloatTensor]`, on request): Attention probabilities of each encoder layer.
        window_offsets (`torch.LongTensor` of shape `(batch_size, 11)`, when given): Passed on for the image processor.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    auxiliary_logits: tuple[torch.Tensor, ...] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    window_offsets: torch.Tensor | None = None


class SetrConvLayer(nn.Module):
    """Convolution, batch normalization, ReLU; then bilinear upsampling by a whole factor."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        upsample_factor: int = 1,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.batch_norm = SetrBatchNorm(out_channels)
        self.upsample_factor = upsample_factor
        self.align_corners = align_corners

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(batch, in channels, height, width) to (batch, out channels, factor * height, factor * width)."""
        features = nn.functional.relu(self.batch_norm(self.convolution(features)))
        if self.upsample_factor == 1:
            return features
        size = (self.upsample_factor * features.shape[2], self.upsample_factor * features.shape[3])
        return nn.functional.interpolate(features, size=size, mode="bilinear", align_corners=self.align_corners)


class SetrLayerNorm(nn.LayerNorm):
    """Layer normalization of the channels of a map."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) to the same shape."""
        return super().forward(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SetrUpsamplingHead(nn.Module):
    """Convolutions, each with upsampling behind it, and a 1x1 convolution to the classes (section 3.2).

    SETR-Naive, SETR-PUP and all auxiliary heads are such heads. Those that see the encoder begin with a LayerNorm, those
    on the neck of SETR-MLA do not.
    """

    def __init__(
        self, config: SetrConfig, num_convs: int, kernel_size: int, upsample_factor: int, on_neck: bool = False
    ) -> None:
        super().__init__()
        in_channels = config.decoder_hidden_size if on_neck else config.hidden_size
        widths = [in_channels] + [config.decoder_hidden_size] * num_convs
        self.layernorm = nn.Identity() if on_neck else SetrLayerNorm(in_channels, eps=config.layer_norm_eps)
        self.convs = nn.ModuleList(
            SetrConvLayer(before, after, kernel_size, upsample_factor) for before, after in zip(widths, widths[1:])
        )
        self.classifier = nn.Conv2d(widths[-1], config.num_labels, kernel_size=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) to logits (batch, labels, logits height, logits width)."""
        features = self.layernorm(features)
        for conv in self.convs:
            features = conv(features)
        return self.classifier(features)


class SetrMlaNeck(nn.Module):
    """Levels of the encoder, normalized, projected, and added up from the deepest (section 3.2)."""

    def __init__(self, config: SetrConfig) -> None:
        super().__init__()
        width, levels = config.decoder_hidden_size, range(len(config.out_indices))
        self.layernorms = nn.ModuleList(SetrLayerNorm(config.hidden_size, eps=config.layer_norm_eps) for _ in levels)
        self.projections = nn.ModuleList(SetrConvLayer(config.hidden_size, width, kernel_size=1) for _ in levels)
        self.convs = nn.ModuleList(SetrConvLayer(width, width, kernel_size=3) for _ in levels)

    def forward(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Maps (batch, hidden, height, width) of all levels to as many of `decoder_hidden_size`, the deepest first."""
        projected = [
            projection(layernorm(level))
            for level, layernorm, projection in zip(features, self.layernorms, self.projections)
        ]
        aggregated = [projected[-1]]
        for level in projected[-2::-1]:
            aggregated.append(aggregated[-1] + level)
        return [conv(level) for conv, level in zip(self.convs, aggregated)]


class SetrMlaHead(nn.Module):
    """Convolutions and upsampling of each level of the neck, and a convolution of all to the classes (section 3.2)."""

    def __init__(self, config: SetrConfig) -> None:
        super().__init__()
        channels, num_convs, levels = (
            config.decoder_hidden_size // 2,
            config.decoder_num_convs,
            len(config.out_indices),
        )
        widths = [config.decoder_hidden_size] + [channels] * num_convs
        factors = [1] * (num_convs - 1) + [config.decoder_upsample_factor]
        self.levels = nn.ModuleList(
            nn.Sequential(
                *(
                    SetrConvLayer(before, after, config.decoder_kernel_size, factor, config.decoder_align_corners)
                    for before, after, factor in zip(widths, widths[1:], factors)
                )
            )
            for _ in range(levels)
        )
        kernel_size = config.decoder_classifier_kernel_size
        self.classifier = nn.Conv2d(levels * channels, config.num_labels, kernel_size, padding=kernel_size // 2)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Maps of the neck, the deepest first, to logits (batch, labels, logits height, logits width)."""
        return self.classifier(torch.cat([convs(level) for convs, level in zip(self.levels, features)], dim=1))


class SetrPreTrainedModel(VitEncoderPreTrainedModel):
    """Configuration and prefix of the SETR models."""

    config: SetrConfig
    base_model_prefix = "setr"
    # A model without auxiliary heads loads from a checkpoint with them, and an encoder without norm from one with it.
    _keys_to_ignore_on_load_unexpected = [r"^auxiliary_heads\.", r"^(setr\.)?layernorm\."]


class SetrModel(SetrPreTrainedModel, VitEncoderModel):
    """The encoder of SETR. `forward` takes images and returns their tokens: see [`VitEncoderModel.forward`]."""


class SetrForSemanticSegmentation(SetrPreTrainedModel):
    """The encoder with the Naive, PUP or MLA head, and with auxiliary heads for training."""

    def __init__(self, config: SetrConfig) -> None:
        super().__init__(config)
        self.setr = SetrModel(config)
        is_mla = config.decoder_type == "mla"
        self.neck = SetrMlaNeck(config) if is_mla else None
        self.decode_head = (
            SetrMlaHead(config)
            if is_mla
            else SetrUpsamplingHead(
                config, config.decoder_num_convs, config.decoder_kernel_size, config.decoder_upsample_factor
            )
        )
        num_auxiliary_heads = len(config.out_indices) - (0 if is_mla else 1)
        self.auxiliary_heads = nn.ModuleList(
            SetrUpsamplingHead(
                config,
                config.auxiliary_num_convs,
                config.auxiliary_kernel_size,
                config.auxiliary_upsample_factor,
                on_neck=is_mla,
            )
            for _ in range(num_auxiliary_heads if config.use_auxiliary_head else 0)
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        window_offsets: torch.Tensor | None = None,
        output_auxiliary_logits: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SetrSemanticSegmenterOutput:
        r"""Segment images of any size.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`): Normalized images
                or windows of images. Sides that `patch_size` does not divide are padded with 0 for the network.
            labels (`torch.LongTensor` of shape `(batch_size, height, width)`, *optional*): Classes from 0 to
                `num_labels - 1`, or `semantic_loss_ignore_index`; the loss is computed when they are given.
            window_offsets (`torch.LongTensor` of shape `(batch_size, 11)`, *optional*): The image processor's
                description of the windows, passed on to its `post_process_semantic_segmentation`.
            output_auxiliary_logits (`bool`, defaults to `False`): Whether to return the logits of the auxiliary heads.

        Returns:
            [`SetrSemanticSegmenterOutput`]

        Raises:
            ValueError: If the channels are not the configuration's or the labels do not have the size of the images.
        """
        height, width = pixel_values.shape[-2:]
        outputs = self.setr(pixel_values, **kwargs)
        grid = patch_grid(pixel_values, self.config.patch_size)
        prefix = self.setr.embeddings.num_prefix_tokens
        features = [
            states[:, prefix:].transpose(1, 2).unflatten(2, grid)  # (batch, hidden, grid height, grid width)
            for states in outputs.feature_states
        ]
        if self.neck is not None:
            features = self.neck(features)
        logits = self.decode_head(features if self.neck is not None else features[-1])

        loss: torch.Tensor | None = None
        auxiliary_logits: tuple[torch.Tensor, ...] = ()
        if labels is not None or output_auxiliary_logits:
            auxiliary_logits = tuple(head(level) for head, level in zip(self.auxiliary_heads, features))
        if labels is not None:
            loss = self.compute_loss(logits, labels, (height, width))
            for auxiliary in auxiliary_logits:
                auxiliary_loss = self.compute_loss(auxiliary, labels, (height, width))
                loss = loss + self.config.auxiliary_loss_weight * auxiliary_loss
        return SetrSemanticSegmenterOutput(
            loss=loss,
            logits=logits,
            auxiliary_logits=auxiliary_logits if output_auxiliary_logits else None,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            window_offsets=window_offsets,
        )


# The image-segmentation pipeline looks the name of the class up here.
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES.setdefault("setr", "SetrForSemanticSegmentation")
SetrModel.register_for_auto_class("AutoModel")
SetrForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")

__all__ = ["SetrForSemanticSegmentation", "SetrModel", "SetrPreTrainedModel", "SetrSemanticSegmenterOutput"]
