"""The fields of the plain ViT / DeiT encoder that Segmenter and SETR share, and their validation."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Optional, TypeVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers.configuration_utils import PreTrainedConfig

from .configuration_checks import (
    check_labels,
    validate_activation,
    validate_attention_heads,
    validate_loss,
    validate_numbers,
    validate_positions,
    validate_sizes,
    validate_token_merging,
)


REMOTE_PIPELINES = {
    "image-segmentation": {"impl": "pipeline_segmenter.SegmenterPipeline", "pt": ["AutoModelForSemanticSegmentation"]}
}
# A field that may be left out or `None`, in whose place `__post_init__` puts a value: whoever reads it gets a `Field`.
Field = TypeVar("Field")
if TYPE_CHECKING:
    Derived = Annotated[Field, "or `None` when the configuration is made"]
else:
    Derived = Optional
DERIVED: Any = None


def with_background_name(id2label: Mapping[int, str] | Mapping[str, str]) -> dict[int, str]:
    """Name the labels 0 and 1 of a model with one class: a background, and the class.

    Args:
        id2label (`Mapping[int, str]`): The name of the class alone.

    Returns:
        `dict[int, str]`: Both names.
    """
    (name,) = id2label.values()
    return {0: "background" if name != "background" else "foreground", 1: name}


@contextmanager
def _invalid_fields_as_value_errors(name: str) -> Iterator[None]:
    try:
        yield
    except StrictDataclassError as error:
        raise ValueError(f"{name}: {error.__cause__ or error}") from error


def check_fields(config: Any) -> Any:
    """Return a strict configuration whose fields were set one by one, once they are checked as its constructor does."""
    check_labels(type(config).__name__, config.id2label, None)
    with _invalid_fields_as_value_errors(type(config).__name__):
        config.validate()
    return config


def strict_config(cls: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """Make `cls` a strict data class whose constructor reports every invalid field as `ValueError`."""
    cls = strict(cls)
    original_init = cls.__init__

    @wraps(original_init)
    def __init__(self: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        check_labels(cls.__name__, kwargs.get("id2label"), kwargs.get("num_labels"))
        with _invalid_fields_as_value_errors(cls.__name__):
            original_init(self, *args, **kwargs)

    setattr(cls, "__init__", __init__)  # noqa: B010 - an assignment is no valid override for type checkers
    return cls


@strict_config
class VitEncoderConfig(PreTrainedConfig):
    r"""Fields of the encoder: a Vision Transformer (Dosovitskiy et al., ICLR 2021) with pre-norm layers.

    Args:
        hidden_size (`int`, defaults to 768): Width of the tokens.
        num_hidden_layers (`int`, defaults to 12): Number of transformer layers.
        num_attention_heads (`int`, defaults to 12): Heads of each attention layer; must divide `hidden_size`.
        intermediate_size (`int`, defaults to 3072): Width of the hidden layer of each MLP.
        hidden_act (`str`, defaults to `"gelu"`): Activation of the MLPs; `"gelu"` is the exact one.
        hidden_dropout_prob (`float`, defaults to 0.0): Dropout after the embeddings, attention and both MLP layers.
        attention_probs_dropout_prob (`float`, defaults to 0.0): Dropout of the attention probabilities.
        drop_path_rate (`float`, defaults to 0.1): Stochastic depth of the last layer; rises linearly from 0.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the truncated normal initialization.
        layer_norm_eps (`float`, defaults to 1e-6): Epsilon of the encoder's LayerNorms.
        image_size (`int` or `[height, width]`, defaults to 512): Pixels of the grid of position embeddings. Other input
            sizes work too: the position embeddings are resized.
        patch_size (`int`, defaults to 16): Side of a square patch in pixels; must divide `image_size`.
        num_channels (`int`, defaults to 3): Channels of the images.
        padding (`"end"` or `"center"`, defaults to `"end"`): Where inputs that the patch does not divide are padded with 0.
            `"end"`: right and bottom, and the logits of the padding are cut off. `"center"`: half on each side, the smaller
            half left and top, and the logits are resized to the input with nothing cut off, as DINOv2's heads do.
        qkv_bias (`bool`, defaults to `True`): Whether query, key and value projections have a bias; also in decoders.
        query_bias, key_bias, value_bias (`bool`, *optional*): The same for single projections of the encoder; `qkv_bias` by
            default. DINOv3 has no key bias.
        layerscale_value (`float`, *optional*): Initial value of the learned scale (LayerScale, Touvron et al., ICCV 2021)
            of each channel after attention and MLP; no scale by default.
        use_gated_mlp (`bool`, defaults to `False`): Whether the encoder's MLPs are gated (Shazeer, 2020, SwiGLU with
            `hidden_act="silu"`).
        num_register_tokens (`int`, defaults to 0): Learned tokens between the class token and the patches (Darcet et al.,
            ICLR 2024), which have no position.
        use_class_token (`bool`, defaults to `True`): Whether the class token, and the distillation token where there is
            one, go through the layers with the patches. The weights have them either way.
        use_distillation_token (`bool`, defaults to `False`): Whether DeiT's second token follows the class token.
        use_final_layer_norm (`bool`, defaults to `True`): Whether a LayerNorm follows the last layer.
        use_pre_layer_norm (`bool`, defaults to `False`): Whether a LayerNorm follows the embeddings, as in CLIP.
        position_embedding_type (`"absolute"` or `"rotary"`, defaults to `"absolute"`): Learned embeddings that are added to
            the tokens; or rotations of queries and keys by the place of a patch in the image, as in DINOv3.
        rope_theta (`float`, defaults to 100.0): Base of the periods of rotary positions.
        position_embedding_interpolation (`"bilinear"` or `"bicubic"`, defaults to `"bilinear"`): How the position
            embeddings are resized (`align_corners=False`).
        position_embedding_antialias (`bool`, defaults to `False`): Whether that is antialiased.
        position_embedding_offset (`float`, defaults to 0.0): What is added to the number of patches of a side before the
            scale is computed, (n + offset) / trained n: 0.1 in Meta's DINOv2 without registers. Not with antialiasing.
        token_merging_layers (`list[int]`, *optional*): Layers, from 0, in which similar patches become one token (ALGM, Norouzi et
            al., CVPR 2024): in the first one within windows, in the others wherever they lie. All patches stay apart by default.
        token_merging_window_size (`int` or `[height, width]`, defaults to 2): Patches of these windows.
        token_merging_threshold (`float`, defaults to 0.88): The least mean cosine similarity of a window that is merged.
        token_merging_batchwise (`bool`, defaults to `False`): Whether all images of a batch keep as many tokens as the one
            that keeps most, as in the original. Otherwise each image is merged by itself, whatever else is in the batch.
        semantic_loss_ignore_index (`int`, defaults to 255): Label of pixels that the loss leaves out.
        semantic_loss_class_weights (`list[float]`, *optional*): Weight of each class in the cross-entropy; all 1 by default.
            With one class they are those of the background and of the class.
        semantic_loss_label_smoothing (`float`, defaults to 0.0): Share of each label that is spread over all classes.
        semantic_loss_dice_weight (`float`, defaults to 0.0): Weight of a soft Dice loss beside the cross-entropy, for tasks
            with few classes; it holds the upsampled logits in memory.
        semantic_loss_focal_gamma (`float`, defaults to 0.0): With a positive one, the cross-entropy of a pixel is multiplied
            by (1 - probability of its class)^gamma (focal loss, Lin et al., ICCV 2017); it holds the upsampled logits in
            memory, as the next one.
        semantic_loss_ohem_fraction (`float`, defaults to 1.0): Below 1, only this share of the valid pixels of a batch
            counts, those of the highest loss (online hard example mining, Shrivastava et al., CVPR 2016).
        semantic_loss_normalization (`"valid_pixels"` or `"all_pixels"`, defaults to `"valid_pixels"`): What the sum of the
            cross-entropy over the valid pixels is divided by: their number (with class weights, the sum of their weights), or
            the number of all pixels of the labels, ignored ones included, as mmsegmentation does by default
            (`avg_non_ignore=False`).
        use_tiled_loss (`bool`, defaults to `True`): Whether the loss is computed tile by tile, without the upsampled
            logits. `False` is the plain path, equal and slower.
        use_single_logit (`bool`, defaults to `False`): Whether the model has one logit, which tells label 1 from label 0,
            the background. Set by `num_labels=1` or a single name in `id2label`; `num_labels` stays 1, and `id2label`
            names both labels, so that every label of a segmentation map has a name.

    Raises:
        ValueError: If a value is out of its range or values contradict each other.
    """

    # `Trainer` gathers the other outputs in an evaluation; these describe windows and have no labels to compare.
    keys_to_ignore_at_inference = ["window_offsets"]
    # The classes of `auto_map`: a repository of either holds the code of both.
    remote_classes: ClassVar[dict[str, str]] = {}

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.1
    initializer_range: float | int = 0.02
    layer_norm_eps: float | int = 1e-6
    image_size: int | list[int] | tuple[int, ...] = 512
    patch_size: int = 16
    num_channels: int = 3
    padding: Literal["end", "center"] = "end"
    qkv_bias: bool = True
    query_bias: Derived[bool] = DERIVED
    key_bias: Derived[bool] = DERIVED
    value_bias: Derived[bool] = DERIVED
    layerscale_value: float | int | None = None
    use_gated_mlp: bool = False
    num_register_tokens: int = 0
    use_class_token: bool = True
    use_distillation_token: bool = False
    use_final_layer_norm: bool = True
    use_pre_layer_norm: bool = False
    position_embedding_type: Literal["absolute", "rotary"] = "absolute"
    rope_theta: float | int = 100.0
    position_embedding_interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    position_embedding_antialias: bool = False
    position_embedding_offset: float | int = 0.0
    token_merging_layers: list[int] | tuple[int, ...] | None = None
    token_merging_window_size: int | list[int] | tuple[int, ...] = 2
    token_merging_threshold: float | int = 0.88
    token_merging_batchwise: bool = False
    semantic_loss_ignore_index: int = 255
    semantic_loss_class_weights: list[float | int] | tuple[float | int, ...] | None = None
    semantic_loss_label_smoothing: float | int = 0.0
    semantic_loss_dice_weight: float | int = 0.0
    semantic_loss_focal_gamma: float | int = 0.0
    semantic_loss_ohem_fraction: float | int = 1.0
    semantic_loss_normalization: Literal["valid_pixels", "all_pixels"] = "valid_pixels"
    use_tiled_loss: bool = True
    use_single_logit: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("query_bias", "key_bias", "value_bias"):
            if getattr(self, name) is None:
                setattr(self, name, self.qkv_bias)
        num_labels, names = kwargs.get("num_labels"), self.id2label
        if names is None and (num_labels == 1 or (num_labels is None and self.use_single_logit)):
            names = {0: "LABEL_0"}
        if names is not None:
            number = len(names)
            self.use_single_logit = number == 1 or (number == 2 and (num_labels == 1 or self.use_single_logit))
            if number == 1:
                self.id2label = with_background_name(names)
                self.label2id = {name: label for label, name in self.id2label.items()}
            if self.use_single_logit:
                kwargs.pop("num_labels", None)  # transformers would count the names
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        # As `from_pretrained(..., id2label={0: "leaf"}, label2id={"leaf": 0})` sets them, after the constructor.
        if "use_single_logit" in vars(self) and name in ("id2label", "label2id") and value and len(value) == 1:
            names = with_background_name(value if name == "id2label" else {0: next(iter(value))})
            value = names if name == "id2label" else {label: index for index, label in names.items()}
            super().__setattr__("use_single_logit", True)
        super().__setattr__(name, value)

    def to_dict(self) -> dict[str, Any]:
        """Fields of the configuration; as remote code it names the classes of the encoder, the model and the pipeline."""
        fields = super().to_dict()
        fields.pop("_saved_sizes", None)  # of a patch size that was changed while loading
        if "auto_map" in fields:
            fields["auto_map"] = {**fields["auto_map"], **self.remote_classes}
            fields["custom_pipelines"] = REMOTE_PIPELINES
        return fields

    @property
    def custom_pipelines(self) -> dict[str, Any]:
        """What `pipeline` loads from the repository: nothing where this package is installed and registers its own."""
        is_remote = type(self).__module__.startswith("transformers_modules.")
        return copy.deepcopy(REMOTE_PIPELINES) if is_remote else {}  # transformers writes into it

    @custom_pipelines.setter
    def custom_pipelines(self, value: Any) -> None:
        """Take what a file says for granted: `to_dict` writes it."""

    @property
    def num_labels(self) -> int:
        """Number of logits of a pixel: that of the names in `id2label`, or 1 with `use_single_logit`."""
        if self.id2label is None:
            return None  # type: ignore[return-value]  # only while transformers makes the configuration
        return 1 if self.use_single_logit and len(self.id2label) <= 2 else len(self.id2label)

    @num_labels.setter
    def num_labels(self, num_labels: int) -> None:
        if self.num_labels == num_labels:
            return
        self.use_single_logit = num_labels == 1
        names = {label: f"LABEL_{label}" for label in range(num_labels)}
        self.id2label = with_background_name(names) if self.use_single_logit else names
        self.label2id = {name: label for label, name in self.id2label.items()}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; with `patch_size` the one of [`~VitEncoderConfig.change_patch_size`]."""
        patch_size, weights = kwargs.pop("patch_size", None), "semantic_loss_class_weights"
        if weights in kwargs:  # transformers checks what is stored with the new `num_labels` first
            config_dict = {**config_dict, weights: kwargs[weights]}
        loaded = super().from_dict(config_dict, **kwargs)
        config = check_fields(loaded[0] if isinstance(loaded, tuple) else loaded)
        if patch_size is not None:
            config.change_patch_size(patch_size)
        return loaded

    def change_patch_size(self, patch_size: int) -> None:
        """Set another patch size, and round `image_size`, the grid of the positions, up to whole patches.

        The weights are resized by [`~VitEncoderPreTrainedModel.change_patch_size`] of the model. Where a model is then loaded
        with this configuration, `from_pretrained` does so.

        Args:
            patch_size (`int`): Side of the patches in pixels.

        Raises:
            ValueError: If that is no size, or larger than the images.
        """
        largest = min(self.image_height_and_width)
        if type(patch_size) is not int or not 1 <= patch_size <= largest:
            raise ValueError(
                f"`patch_size` must be a whole number of pixels from 1 to the {largest} of `image_size`, got {patch_size!r}."
            )
        if patch_size == self.patch_size:
            return
        saved = self.patch_size, self.image_size
        sides = [-(-side // patch_size) * patch_size for side in self.image_height_and_width]
        self.patch_size = patch_size
        self.image_size = sides[0] if isinstance(self.image_size, int) else sides
        self.validate_sizes()
        self._saved_sizes = getattr(self, "_saved_sizes", saved)

    def with_saved_patch_size(self) -> "VitEncoderConfig":
        """A copy with the patch size that it had in its file, before [`~VitEncoderConfig.change_patch_size`]."""
        config = copy.deepcopy(self)
        config.patch_size, config.image_size = getattr(self, "_saved_sizes", (self.patch_size, self.image_size))
        config.__dict__.pop("_saved_sizes", None)
        return config

    @property
    def image_height_and_width(self) -> tuple[int, int]:
        """(height, width) in pixels of the grid of position embeddings."""
        height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        return height, width

    @property
    def token_merging_window_height_and_width(self) -> tuple[int, int]:
        """(height, width) in patches of the windows of token merging."""
        if isinstance(self.token_merging_window_size, int):
            return self.token_merging_window_size, self.token_merging_window_size
        height, width = self.token_merging_window_size
        return height, width

    # `strict` calls what has a name of this kind on every new configuration.
    validate_sizes = validate_sizes
    validate_attention_heads = validate_attention_heads
    validate_positions = validate_positions
    validate_token_merging = validate_token_merging
    validate_numbers = validate_numbers
    validate_loss = validate_loss
    validate_activation = validate_activation


__all__ = ["VitEncoderConfig"]
