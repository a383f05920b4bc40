"""The plain ViT / DeiT encoder that Segmenter and SETR share: embeddings, attention, layers.

The layers follow the ViT of Dosovitskiy et al. (ICLR 2021), the distillation token DeiT (Touvron et al., ICML 2021).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_vit_encoder import VitEncoderConfig
from .segmentation_loss import (
    plain_upsampled_cross_entropy,
    total_label_weight,
    upsampled_cross_entropy,
    upsampled_dice_loss,
)
from .sliding_window import with_background


@dataclass
class VitEncoderOutput(BaseModelOutput):
    """Output of the encoder.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, prefix + patches, hidden_size)`): The tokens after
            the last layer and, where there is one, the final norm.
        hidden_states (`tuple[torch.FloatTensor]`, on request): Embeddings and the output of each layer.
        attentions (`tuple[torch.FloatTensor]`, on request): Attention probabilities of each layer.
        feature_states (`tuple[torch.FloatTensor]`): The outputs of the layers `out_indices` of the configuration, before
            the final norm, where it names any.
    """

    feature_states: tuple[torch.FloatTensor, ...] | None = None


class VitEncoderPatchEmbeddings(nn.Module):
    """Project each square patch of an image to a token; sizes the patch does not divide are padded with 0."""

    def __init__(self, num_channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.patch_size = patch_size
        self.projection = nn.Conv2d(num_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) pixels to (batch, hidden, ceil(height / patch), ceil(width / patch))."""
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"`pixel_values` must have the shape (batch_size, {self.num_channels}, height, width), got "
                f"{tuple(pixel_values.shape)}. The number of channels is `num_channels` of the configuration."
            )
        height, width = pixel_values.shape[-2:]
        padding = (0, -width % self.patch_size, 0, -height % self.patch_size)
        return self.projection(nn.functional.pad(pixel_values.to(self.projection.weight.dtype), padding))


class VitEncoderEmbeddings(nn.Module):
    """Patch tokens behind the class and distillation tokens, plus position embeddings resized to the input's grid."""

    def __init__(self, config: VitEncoderConfig) -> None:
        super().__init__()
        height, width = config.image_height_and_width
        self.grid = (height // config.patch_size, width // config.patch_size)
        self.interpolation = config.position_embedding_interpolation
        self.num_special_tokens = 2 if config.use_distillation_token else 1
        self.num_prefix_tokens = self.num_special_tokens if config.use_class_token else 0
        num_positions = self.num_special_tokens + self.grid[0] * self.grid[1]

        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.distillation_token = (
            nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if config.use_distillation_token else None
        )
        self.position_embeddings = nn.Parameter(torch.zeros(1, num_positions, config.hidden_size))
        self.patch_embeddings = VitEncoderPatchEmbeddings(config.num_channels, config.hidden_size, config.patch_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def position_embeddings_for(self, grid: tuple[int, int]) -> torch.Tensor:
        """Position embeddings (1, special tokens + grid height * grid width, hidden) of a grid of patches.

        The embeddings of the patches are resized in float32 with `align_corners=False`, those of the special tokens
        kept. An export always resizes, so that the exported model serves every size.
        """
        if not torch.compiler.is_exporting() and grid == self.grid:
            return self.position_embeddings
        sizes = [self.num_special_tokens, self.grid[0] * self.grid[1]]
        special, patches = self.position_embeddings.split(sizes, dim=1)
        patches = patches.unflatten(1, self.grid).permute(0, 3, 1, 2).float()  # (1, hidden, height, width)
        patches = nn.functional.interpolate(patches, size=grid, mode=self.interpolation, align_corners=False)
        return torch.cat([special, patches.flatten(2).transpose(1, 2).to(special.dtype)], dim=1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels (batch, channels, height, width) to tokens (batch, prefix + patches, hidden)."""
        patches = self.patch_embeddings(pixel_values)
        positions = self.position_embeddings_for((patches.shape[2], patches.shape[3]))
        special = [token for token in (self.cls_token, self.distillation_token) if token is not None]
        special = [token.expand(patches.shape[0], -1, -1) for token in special]
        tokens = torch.cat([*special, patches.flatten(2).transpose(1, 2)], dim=1) + positions
        return self.dropout(tokens[:, self.num_special_tokens - self.num_prefix_tokens :])


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled dot-product attention written out, the one implementation that also returns its probabilities."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


class VitEncoderAttention(nn.Module):
    """Multi-head self-attention over all tokens, through the attention implementation that the config names."""

    is_causal = False

    def __init__(
        self, config: VitEncoderConfig, hidden_size: int, num_attention_heads: int, attention_probs_dropout_prob: float
    ) -> None:
        super().__init__()
        self.config = config
        self.head_dim = hidden_size // num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = attention_probs_dropout_prob
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens (batch, tokens, hidden) to the same shape, and probabilities (batch, heads, tokens, tokens)."""
        batch_size, num_tokens, hidden_size = hidden_states.shape
        query, key, value = (
            projection(hidden_states).view(batch_size, num_tokens, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, probabilities = attention(
            self,
            query,
            key,
            value,
            None,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(batch_size, num_tokens, hidden_size)), probabilities


class VitEncoderMlp(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str, hidden_dropout_prob: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.activation = ACT2FN[hidden_act]
        self.fc2 = nn.Linear(intermediate_size, hidden_size)
        self.dropout = nn.Dropout(hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, hidden) to the same shape."""
        return self.dropout(self.fc2(self.dropout(self.activation(self.fc1(hidden_states)))))


class VitEncoderDropPath(nn.Module):
    """Stochastic depth (Huang et al., ECCV 2016): in training, drop a residual branch for whole images."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, ...) to the same shape; what is kept is divided by the probability of keeping it."""
        if not self.training or self.rate == 0.0:
            return hidden_states
        keep = 1.0 - self.rate
        kept = hidden_states.new_empty(hidden_states.shape[0], *[1] * (hidden_states.ndim - 1)).bernoulli_(keep)
        return hidden_states * kept / keep

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class VitEncoderLayer(GradientCheckpointingLayer):
    """A pre-norm transformer layer; the mask transformer of Segmenter is made of the same ones."""

    def __init__(
        self,
        config: VitEncoderConfig,
        hidden_size: int,
        num_attention_heads: int,
        intermediate_size: int,
        hidden_dropout_prob: float,
        attention_probs_dropout_prob: float,
        drop_path_rate: float,
        layer_norm_eps: float,
    ) -> None:
        super().__init__()
        self.layernorm_before = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.attention = VitEncoderAttention(config, hidden_size, num_attention_heads, attention_probs_dropout_prob)
        self.layernorm_after = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.mlp = VitEncoderMlp(hidden_size, intermediate_size, config.hidden_act, hidden_dropout_prob)
        self.dropout = nn.Dropout(hidden_dropout_prob)
        self.drop_path = VitEncoderDropPath(drop_path_rate)

    def forward(
        self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens (batch, tokens, hidden) to the same shape, and the attention probabilities where they exist."""
        attended, probabilities = self.attention(self.layernorm_before(hidden_states), **kwargs)
        hidden_states = hidden_states + self.drop_path(self.dropout(attended))
        hidden_states = hidden_states + self.drop_path(self.mlp(self.layernorm_after(hidden_states)))
        return hidden_states, probabilities


class VitEncoderPreTrainedModel(PreTrainedModel):
    """What the models of both families have in common: abilities, recorded outputs, initialisation."""

    config: VitEncoderConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["VitEncoderEmbeddings", "VitEncoderLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": VitEncoderLayer, "attentions": VitEncoderAttention}
    _input_embed_layer = "patch_embeddings"
    # The loss is already a mean over pixels: Trainer divides it by the accumulation steps.
    accepts_loss_kwargs = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Truncated normal weights, zero biases, identity norms (rstrudel/segmenter, segm/model/utils.py)."""
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.trunc_normal_(module.weight, std=std)
        elif isinstance(module, VitEncoderEmbeddings):
            for token in (module.cls_token, module.distillation_token, module.position_embeddings):
                if token is not None:
                    init.trunc_normal_(token, std=std)

    def compute_loss(self, logits: torch.Tensor, labels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Loss of logits upsampled to the padded input; the padding is labelled as ignored.

        The cross-entropy, with the class weights and the label smoothing of the configuration, plus its weight times the
        Dice loss. The one logit of a model with one class is that of the class, beside a background of 0: labels are 0 and
        1, and the cross-entropy is the binary one.

        Args:
            logits (`torch.FloatTensor` of shape `(batch_size, num_labels, logits_height, logits_width)`): The scores.
            labels (`torch.LongTensor` of shape `(batch_size, height, width)`): The classes of the pixels.
            size (`tuple[int, int]`): Height and width of `pixel_values`.

        Returns:
            `torch.FloatTensor` of shape `()`: The loss; 0 where all pixels are ignored.

        Raises:
            ValueError: If the labels are not of that size.
        """
        if tuple(labels.shape[-2:]) != tuple(size):
            raise ValueError(
                f"`labels` must have the height and width of `pixel_values`, {tuple(size)}, got "
                f"{tuple(labels.shape[-2:])}. Resize masks with nearest, as the image processor does."
            )
        patch_size, ignore_index = self.config.patch_size, self.config.semantic_loss_ignore_index
        padding = (0, -size[1] % patch_size, 0, -size[0] % patch_size)
        num_pixels = labels.numel()
        labels = nn.functional.pad(labels, padding, value=ignore_index)
        logits = with_background(logits)
        weights = self.config.semantic_loss_class_weights
        weights = None if weights is None else logits.new_tensor(weights, dtype=torch.float32)
        loss_function = upsampled_cross_entropy if self.config.use_tiled_loss else plain_upsampled_cross_entropy
        loss = loss_function(
            logits,
            labels,
            ignore_index=ignore_index,
            class_weights=weights,
            label_smoothing=self.config.semantic_loss_label_smoothing,
        )
        if self.config.semantic_loss_normalization == "all_pixels":
            loss = loss * (total_label_weight(labels, ignore_index, weights) / num_pixels).to(loss.dtype)
        if self.config.semantic_loss_dice_weight:
            loss = loss + self.config.semantic_loss_dice_weight * upsampled_dice_loss(logits, labels, ignore_index)
        return loss


class VitEncoderModel(VitEncoderPreTrainedModel):
    """The encoder: embeddings, `num_hidden_layers` layers, and a final LayerNorm unless the configuration has none."""

    def __init__(self, config: VitEncoderConfig) -> None:
        super().__init__(config)
        self.embeddings = VitEncoderEmbeddings(config)
        last = max(config.num_hidden_layers - 1, 1)
        self.layers = nn.ModuleList(
            VitEncoderLayer(
                config,
                hidden_size=config.hidden_size,
                num_attention_heads=config.num_attention_heads,
                intermediate_size=config.intermediate_size,
                hidden_dropout_prob=config.hidden_dropout_prob,
                attention_probs_dropout_prob=config.attention_probs_dropout_prob,
                drop_path_rate=config.drop_path_rate * index / last,
                layer_norm_eps=config.layer_norm_eps,
            )
            for index in range(config.num_hidden_layers)
        )
        self.layernorm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            if config.use_final_layer_norm
            else nn.Identity()
        )
        self.out_indices = tuple(getattr(config, "out_indices", ()))
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> VitEncoderOutput:
        r"""Encode images of any size.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`): Normalised images.
                Sides that `patch_size` does not divide are padded with 0 to the right and at the bottom.

        Returns:
            [`VitEncoderOutput`]: `last_hidden_state` has the prefix (the class token and, for DeiT, the distillation
            token; nothing without `use_class_token`) and then the patches, the rows of the (ceil(height / patch_size),
            ceil(width / patch_size)) grid. On request `hidden_states` (the embeddings and each layer's output, before
            the final norm) and `attentions` (each layer's probabilities of shape `(batch_size, num_attention_heads,
            tokens, tokens)`, with eager attention).
        """
        hidden_states = self.embeddings(pixel_values)
        states = {}
        for index, layer in enumerate(self.layers):
            hidden_states, _ = layer(hidden_states, **kwargs)
            if index in self.out_indices:
                states[index] = hidden_states
        return VitEncoderOutput(
            last_hidden_state=self.layernorm(hidden_states),
            feature_states=tuple(states[index] for index in self.out_indices) or None,
        )


__all__ = ["VitEncoderModel", "VitEncoderOutput", "VitEncoderPreTrainedModel"]
