"""The plain ViT / DeiT encoder that Segmenter and SETR share: embeddings, attention, layers.

The layers follow the ViT of Dosovitskiy et al. (ICLR 2021), the distillation token DeiT (Touvron et al., ICML 2021).
What DINOv2, DINOv3, CLIP and others add to them are options of the configuration.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

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
from .patch_resizing import resize_patch_kernel
from .resampling import resize_position_embeddings
from .segmentation_loss import (
    plain_upsampled_cross_entropy,
    total_label_weight,
    upsampled_cross_entropy,
    upsampled_dice_loss,
    upsampled_hard_pixel_loss,
)
from .sliding_window import with_background
from .token_merging import MergedTokens, expand_merged_tokens, merge_tokens, token_attention_mask


if TYPE_CHECKING:  # never imported here: transformers copies the files that these lines name with a saved model
    from .pipeline_segmenter import SegmenterPipeline  # noqa: F401

# torch before 2.7 does not say; nothing is exported with it.
is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)


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
        merged_hidden_state (`torch.FloatTensor` of shape `(batch_size, prefix + tokens, hidden_size)`): With token merging,
            `last_hidden_state` before each patch took the token that holds it. All other tensors are of patches.
        merged_tokens (`tuple[MergedTokens]`): With token merging, which token holds each patch after each merging layer.
    """

    feature_states: tuple[torch.Tensor, ...] | None = None
    merged_hidden_state: torch.Tensor | None = None
    merged_tokens: tuple[MergedTokens, ...] | None = None


def patch_grid(pixel_values: torch.Tensor, patch_size: int) -> tuple[int, int]:
    """Rows and columns of the patches of (..., height, width), rounded up.

    Without negative numbers: ONNX divides them towards 0.
    """
    height, width = pixel_values.shape[-2:]
    return (height + patch_size - 1) // patch_size, (width + patch_size - 1) // patch_size


def pad_to_patches(values: torch.Tensor, patch_size: int, padding: str, value: float = 0.0) -> torch.Tensor:
    """(..., height, width) with both sides padded to whole patches: see `padding` of [`VitEncoderConfig`]."""
    (height, width), grid = values.shape[-2:], patch_grid(values, patch_size)
    rows, columns = grid[0] * patch_size - height, grid[1] * patch_size - width
    top, left = (rows // 2, columns // 2) if padding == "center" else (0, 0)
    return nn.functional.pad(values, (left, columns - left, top, rows - top), value=value)


def rotary_angles(grid: tuple[int, int], head_dim: int, theta: float, device: torch.device) -> torch.Tensor:
    """Angles by which queries and keys are rotated (DINOv3, `rope_position_encoding.py`).

    A patch has the coordinates of its center, from -1 to 1 in each direction. Angles are 2 pi times the row, then the column,
    over head_dim / 4 periods each, all of them twice.

    Args:
        grid (`tuple[int, int]`): Rows and columns of patches.
        head_dim (`int`): Channels of a head, a multiple of 4.
        theta (`float`): Base of the periods.
        device (`torch.device`): Where to compute.

    Returns:
        `torch.FloatTensor` of shape `(patches, head_dim)`.
    """
    periods = theta ** (torch.arange(head_dim // 4, device=device) * (4 / head_dim))
    rows, columns = (
        2 * math.pi * (2 * (torch.arange(n, device=device) + 0.5) / n - 1)[:, None] / periods for n in grid
    )
    rows, columns = rows[:, None].expand(-1, grid[1], -1), columns[None].expand(grid[0], -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1).tile(2)


def cosines_and_sines(angles: torch.Tensor, num_prefix_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of angles (..., patches, head_dim), behind those of tokens before the patches, which are not rotated."""
    prefix = (0, 0, num_prefix_tokens, 0)
    return nn.functional.pad(angles.cos(), prefix, value=1.0), nn.functional.pad(angles.sin(), prefix)


def rotate(states: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """(..., tokens, head_dim) rotated: channel i and i + head_dim / 2 are a point in a plane."""
    first, second = states.chunk(2, dim=-1)
    return states * cosines.to(states.dtype) + torch.cat([-second, first], dim=-1) * sines.to(states.dtype)


class VitEncoderPatchEmbeddings(nn.Module):
    """Project each square patch of an image to a token; sizes the patch does not divide are padded with 0."""

    def __init__(self, num_channels: int, hidden_size: int, patch_size: int, padding: str = "end") -> None:
        super().__init__()
        self.num_channels = num_channels
        self.patch_size = patch_size
        self.padding = padding
        self.projection = nn.Conv2d(num_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def change_patch_size(self, patch_size: int) -> None:
        """Resize the weights for patches of another size."""
        weight = resize_patch_kernel(self.projection.weight.detach(), patch_size)
        self.projection.weight = nn.Parameter(weight, requires_grad=self.projection.weight.requires_grad)
        self.projection.kernel_size = self.projection.stride = (patch_size, patch_size)
        self.patch_size = patch_size

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) pixels to (batch, hidden, ceil(height / patch), ceil(width / patch))."""
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"`pixel_values` must have the shape (batch_size, {self.num_channels}, height, width), got "
                f"{tuple(pixel_values.shape)}. The number of channels is `num_channels` of the configuration."
            )
        pixel_values = pixel_values.to(self.projection.weight.dtype)
        return self.projection(pad_to_patches(pixel_values, self.patch_size, self.padding))


class VitEncoderEmbeddings(nn.Module):
    """Patch tokens behind the class, distillation and register tokens, plus positions resized to the input's grid."""

    def __init__(self, config: VitEncoderConfig) -> None:
        super().__init__()
        self.config = config
        height, width = config.image_height_and_width
        self.grid = (height // config.patch_size, width // config.patch_size)
        self.num_special_tokens = 2 if config.use_distillation_token else 1
        self.num_prefix_tokens = config.num_register_tokens + (
            self.num_special_tokens if config.use_class_token else 0
        )
        num_positions = self.num_special_tokens + self.grid[0] * self.grid[1]

        def tokens(number: int) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros(1, number, config.hidden_size)) if number else None

        self.cls_token = tokens(1)
        self.distillation_token = tokens(1 if config.use_distillation_token else 0)
        self.register_tokens = tokens(config.num_register_tokens)
        self.position_embeddings = tokens(num_positions if config.position_embedding_type == "absolute" else 0)
        self.patch_embeddings = VitEncoderPatchEmbeddings(
            config.num_channels, config.hidden_size, config.patch_size, config.padding
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layernorm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.use_pre_layer_norm else nn.Identity()
        )

    def change_patch_size(self, patch_size: int, image_size: tuple[int, int]) -> None:
        """Resize the patch embedding for patches of another size, and the positions to the grid of an image."""
        self.patch_embeddings.change_patch_size(patch_size)
        grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        if self.position_embeddings is not None and grid != self.grid:
            positions = self.position_embeddings_for(grid).detach()
            self.position_embeddings = nn.Parameter(positions, self.position_embeddings.requires_grad)
        self.grid = grid

    def position_embeddings_for(self, grid: tuple[int, int]) -> torch.Tensor:
        """Position embeddings (1, special tokens + grid height * grid width, hidden) of a grid of patches.

        An export always resizes, so that the exported model serves every size.
        """
        positions = self.position_embeddings
        if positions is None:
            raise ValueError("The positions of this encoder are rotary: it has no position embeddings.")
        if not is_exporting() and grid == self.grid:
            return positions
        return resize_position_embeddings(
            positions,
            self.grid,
            grid,
            self.config.position_embedding_interpolation,
            self.config.position_embedding_antialias,
            self.config.position_embedding_offset,
        )

    def rotary_positions_for(
        self, grid: tuple[int, int], device: torch.device, merged: MergedTokens | None = None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cosines and sines of the tokens of a grid of patches; `None` where positions are learned.

        A merged token stands where its patches stand on average.
        """
        if self.position_embeddings is not None:
            return None
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        angles = rotary_angles(grid, head_dim, self.config.rope_theta, device)
        if merged is not None:
            angles = merged.average(angles)[:, None]  # (batch, 1 for the heads, tokens, head_dim)
        return cosines_and_sines(angles, self.num_prefix_tokens)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels (batch, channels, height, width) to tokens (batch, prefix + patches, hidden)."""
        patches = self.patch_embeddings(pixel_values)
        batch_size, grid = patches.shape[0], (patches.shape[2], patches.shape[3])
        special = [
            token.expand(batch_size, -1, -1)
            for token in (self.cls_token, self.distillation_token)
            if token is not None
        ]
        tokens = torch.cat([*special, patches.flatten(2).transpose(1, 2)], dim=1)
        if self.position_embeddings is not None:
            tokens = tokens + self.position_embeddings_for(grid)
        tokens = tokens[:, self.num_special_tokens + self.config.num_register_tokens - self.num_prefix_tokens :]
        if self.register_tokens is not None:
            registers = self.register_tokens.expand(batch_size, -1, -1)
            first_patch = self.num_prefix_tokens - self.config.num_register_tokens
            tokens = torch.cat([tokens[:, :first_patch], registers, tokens[:, first_patch:]], dim=1)
        return self.layernorm(self.dropout(tokens))


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
        self,
        config: VitEncoderConfig,
        hidden_size: int,
        num_attention_heads: int,
        attention_probs_dropout_prob: float,
        biases: tuple[bool, bool, bool],
    ) -> None:
        super().__init__()
        self.config = config
        self.head_dim = hidden_size // num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = attention_probs_dropout_prob
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(hidden_size, hidden_size, bias=bias) for bias in biases)
        self.o_proj = nn.Linear(hidden_size, hidden_size)

    def project(
        self,
        projection: nn.Linear,
        hidden_states: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Tokens (batch, tokens, hidden) to queries, keys or values (batch, heads, tokens, head_dim)."""
        batch_size, num_tokens, _ = hidden_states.shape
        states = projection(hidden_states).view(batch_size, num_tokens, -1, self.head_dim).transpose(1, 2)
        return states if rotary is None else rotate(states, *rotary)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens (batch, tokens, hidden) to the same shape, and probabilities (batch, heads, tokens, tokens).

        `attention_mask` has the form that the attention implementation wants: see [`token_attention_mask`].
        """
        batch_size, num_tokens, hidden_size = hidden_states.shape
        query = self.project(self.q_proj, hidden_states, rotary)
        key = self.project(self.k_proj, hidden_states, rotary)
        value = self.project(self.v_proj, hidden_states)
        attention: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, probabilities = attention(
            self,
            query,
            key,
            value,
            attention_mask,
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


class VitEncoderGatedMlp(nn.Module):
    """An MLP whose hidden layer is multiplied by a second one (Shazeer, "GLU Variants Improve Transformer", 2020)."""

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str, hidden_dropout_prob: float) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size)
        self.up_proj = nn.Linear(hidden_size, intermediate_size)
        self.activation = ACT2FN[hidden_act]
        self.down_proj = nn.Linear(intermediate_size, hidden_size)
        self.dropout = nn.Dropout(hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, hidden) to the same shape."""
        gated = self.activation(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return self.dropout(self.down_proj(self.dropout(gated)))


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
    """A pre-norm transformer layer; the mask transformer of Segmenter is made of the same ones.

    `layerscale_value`, `use_gated_mlp` and `biases` (of query, key and value) are options of the encoder's layers.
    """

    layer_scale1: nn.Parameter | None  # behind the attention
    layer_scale2: nn.Parameter | None  # behind the MLP

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
        layerscale_value: float | None = None,
        use_gated_mlp: bool = False,
        biases: tuple[bool, bool, bool] | None = None,
    ) -> None:
        super().__init__()
        self.layerscale_value = layerscale_value
        self.layernorm_before = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.attention = VitEncoderAttention(
            config, hidden_size, num_attention_heads, attention_probs_dropout_prob, biases or (config.qkv_bias,) * 3
        )
        self.layernorm_after = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        mlp_class = VitEncoderGatedMlp if use_gated_mlp else VitEncoderMlp
        self.mlp = mlp_class(hidden_size, intermediate_size, config.hidden_act, hidden_dropout_prob)
        for name in ("layer_scale1", "layer_scale2"):
            scale = None if layerscale_value is None else nn.Parameter(torch.full((hidden_size,), layerscale_value))
            self.register_parameter(name, scale)
        self.dropout = nn.Dropout(hidden_dropout_prob)
        self.drop_path = VitEncoderDropPath(drop_path_rate)

    def forward(
        self,
        hidden_states: torch.Tensor,
        merge: Callable[[torch.Tensor], tuple[torch.Tensor, MergedTokens]] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None, MergedTokens | None]:
        """Tokens (batch, tokens, hidden) to the same shape, the attention probabilities where they exist, and `None`.

        With `merge`, which stands between attention and MLP, to the tokens that it leaves, and what it says of them.
        """
        merged = None
        attended, probabilities = self.attention(self.layernorm_before(hidden_states), **kwargs)
        hidden_states = hidden_states + self.drop_path(self._scale(self.dropout(attended), self.layer_scale1))
        if merge is not None:
            hidden_states, merged = merge(hidden_states)
        transformed = self.mlp(self.layernorm_after(hidden_states))
        hidden_states = hidden_states + self.drop_path(self._scale(transformed, self.layer_scale2))
        return hidden_states, probabilities, merged

    @staticmethod
    def _scale(hidden_states: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        return hidden_states if scale is None else hidden_states * scale


class VitEncoderPreTrainedModel(PreTrainedModel):
    """What the models of both families have in common: abilities, recorded outputs, initialization."""

    config: VitEncoderConfig
    config_class: type[VitEncoderConfig]
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]  # annotated as a list, and a tuple in all of transformers
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

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Load a model as transformers does, with another patch size where `patch_size` is given.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Directory or Hub name.
            patch_size (`int`, *optional*): Side in pixels of the patches, for which the patch embedding and the positions are
                resized: see [`~VitEncoderPreTrainedModel.change_patch_size`]. By default that of the file.
            kwargs: Further arguments of transformers.

        Returns:
            The model, and what transformers says of it with `output_loading_info=True`.

        Raises:
            ValueError: If there cannot be such patches.
        """
        patch_size = kwargs.pop("patch_size", None)
        config = kwargs.get("config")
        # As the Auto classes pass it, with the new patch size in it. Remote code has several classes of one name.
        if config is not None and hasattr(config, "with_saved_patch_size"):
            kwargs["config"] = config.with_saved_patch_size()
            patch_size = config.patch_size if patch_size is None else patch_size
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        if patch_size is not None:
            (loaded[0] if isinstance(loaded, tuple) else loaded).change_patch_size(patch_size)
        return loaded

    @torch.no_grad()
    def change_patch_size(self, patch_size: int) -> None:
        """Resize the patch embedding and the positions, so that the model takes patches of another size.

        The embedding is multiplied by the pseudo-inverse of the resize of a patch (FlexiViT): an image that is enlarged by the
        same factor as its patches has the tokens that it had. Images of the same size then have fewer tokens, and a result
        that is faster and less exact. The model is saved with the new size. `patch_size` of its image processor must be the same.

        Args:
            patch_size (`int`): Side in pixels of the patches.

        Raises:
            ValueError: If that is no size, or larger than the images.
        """
        encoder = cast("VitEncoderModel", self.base_model)
        self.config.change_patch_size(patch_size)
        if encoder.config is not self.config:
            encoder.config.change_patch_size(patch_size)
        if encoder.embeddings.patch_embeddings.patch_size != patch_size:
            encoder.embeddings.change_patch_size(patch_size, self.config.image_height_and_width)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Truncated normal weights, zero biases, identity norms (rstrudel/segmenter, segm/model/utils.py)."""
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.trunc_normal_(module.weight, std=std)
        elif isinstance(module, VitEncoderEmbeddings):
            for name in ("cls_token", "distillation_token", "register_tokens", "position_embeddings"):
                if (token := getattr(module, name)) is not None:
                    init.trunc_normal_(token, std=std)
        elif isinstance(module, VitEncoderLayer) and module.layerscale_value is not None:
            for scale in (module.layer_scale1, module.layer_scale2):
                if scale is not None:
                    init.constant_(scale, module.layerscale_value)

    def compute_loss(self, logits: torch.Tensor, labels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Loss of logits upsampled to the padded input, whose padding is labelled as ignored.

        With `padding="center"` they are upsampled to the input itself, as in prediction.

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
        ignore_index = self.config.semantic_loss_ignore_index
        if 0 <= ignore_index < max(self.config.num_labels, 2):
            raise ValueError(
                f"`semantic_loss_ignore_index` {ignore_index} is also one of the {self.config.num_labels} classes, which would "
                "never be learnt: set it to -100, and so the pixels without a class."
            )
        num_pixels, labels = labels.numel(), labels.long()
        if self.config.padding == "end":
            labels = pad_to_patches(labels, self.config.patch_size, "end", value=ignore_index)
        logits = with_background(logits)
        of_classes = self.config.semantic_loss_class_weights
        weights = None if of_classes is None else logits.new_tensor(of_classes, dtype=torch.float32)
        loss_function: Callable[..., torch.Tensor] = (
            upsampled_cross_entropy if self.config.use_tiled_loss else plain_upsampled_cross_entropy
        )
        focal_gamma, ohem_fraction = self.config.semantic_loss_focal_gamma, self.config.semantic_loss_ohem_fraction
        if focal_gamma or ohem_fraction < 1:
            loss_function = partial(upsampled_hard_pixel_loss, focal_gamma=focal_gamma, ohem_fraction=ohem_fraction)
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
                layerscale_value=config.layerscale_value,
                use_gated_mlp=config.use_gated_mlp,
                biases=(config.query_bias, config.key_bias, config.value_bias),
            )
            for index in range(config.num_hidden_layers)
        )
        self.layernorm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            if config.use_final_layer_norm
            else nn.Identity()
        )
        self.out_indices = tuple(getattr(config, "out_indices", None) or ())
        self.post_init()

    def merge_in_layer(
        self, index: int, grid: tuple[int, int], merged: MergedTokens | None
    ) -> Callable[[torch.Tensor], tuple[torch.Tensor, MergedTokens]] | None:
        """What merges the tokens in a layer, from the result of the merging layer before; `None` in other layers."""
        if index not in (self.config.token_merging_layers or ()):
            return None
        return partial(
            merge_tokens,
            merged=merged,
            num_prefix_tokens=self.embeddings.num_prefix_tokens,
            grid=grid,
            window_size=self.config.token_merging_window_height_and_width,
            threshold=self.config.token_merging_threshold,
            layer=index + 1,
            batchwise=self.config.token_merging_batchwise,
        )

    @expand_merged_tokens
    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> VitEncoderOutput:
        r"""Encode images of any size.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`): Normalized images.
                Sides that `patch_size` does not divide are padded with 0, where `padding` of the configuration says.

        Returns:
            [`VitEncoderOutput`]: `last_hidden_state` has the prefix (the class token and, for DeiT, the distillation
            token, neither without `use_class_token`; then the register tokens) and then the patches, the rows of the (ceil(height / patch_size),
            ceil(width / patch_size)) grid. On request `hidden_states` (the embeddings and each layer's output, before
            the final norm) and `attentions` (each layer's probabilities of shape `(batch_size, num_attention_heads,
            tokens, tokens)`, with eager attention).
        """
        hidden_states = self.embeddings(pixel_values)
        grid = patch_grid(pixel_values, self.config.patch_size)
        rotary = self.embeddings.rotary_positions_for(grid, hidden_states.device)
        prefix, mask, merged = self.embeddings.num_prefix_tokens, None, None
        states, merged_tokens = {}, []
        for index, layer in enumerate(self.layers):
            merge = self.merge_in_layer(index, grid, merged)
            hidden_states, _, newly_merged = layer(
                hidden_states, merge=merge, rotary=rotary, attention_mask=mask, **kwargs
            )
            if newly_merged is not None:
                merged = newly_merged
                merged_tokens.append(merged)
                mask = token_attention_mask(self.config, hidden_states, merged, prefix)
                rotary = self.embeddings.rotary_positions_for(grid, hidden_states.device, merged)
            if index in self.out_indices:
                states[index] = hidden_states if merged is None else merged.expand(hidden_states, prefix)
        return VitEncoderOutput(
            last_hidden_state=self.layernorm(hidden_states),
            feature_states=tuple(states[index] for index in self.out_indices) or None,
            merged_tokens=tuple(merged_tokens) or None,
        )


__all__ = [
    "VitEncoderModel",
    "VitEncoderOutput",
    "VitEncoderPreTrainedModel",
]
