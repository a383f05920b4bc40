"""Configuration of Segmenter (Strudel et al., ICCV 2021)."""

from typing import Any, Literal

from .configuration_vit_encoder import DERIVED, Derived, VitEncoderConfig, strict_config


@strict_config
class SegmenterConfig(VitEncoderConfig):
    r"""Configuration of [`SegmenterModel`] and [`SegmenterForSemanticSegmentation`].

    The defaults are Segmenter-B-Mask/16 of the paper. The number of classes comes from `num_labels` or `id2label`.

    Args:
        decoder_type (`"mask_transformer"` or `"linear"`, defaults to `"mask_transformer"`): The decoder (section 3.2).
        out_indices (`list[int]`, *optional*): Layers, counted from 0 and ascending, whose patch tokens the linear decoder
            sees: each through the final norm, side by side. The last layer by default.
        decoder_norm (`"none"` or `"batch_norm"`, defaults to `"none"`): What comes before the linear layer. Features of
            DINO want batch normalization.
        decoder_num_hidden_layers (`int`, defaults to 2): Layers of the mask transformer.
        decoder_num_attention_heads (`int`, *optional*): Heads of its attention; the encoder's by default.
        decoder_hidden_size (`int`, *optional*): Width of its tokens; the encoder's by default.
        decoder_intermediate_size (`int`, *optional*): Width of its MLPs; the encoder's by default.
        decoder_layer_norm_eps (`float`, defaults to 1e-5): Epsilon of its LayerNorms.
        decoder_mask_norm_eps (`float`, *optional*): Epsilon of the LayerNorm over the classes; that of the others by
            default.
        decoder_hidden_dropout_prob (`float`, defaults to 0.1): Dropout after its attention and MLP layers.
        decoder_attention_probs_dropout_prob (`float`, defaults to 0.1): Dropout of its attention probabilities.
        decoder_drop_path_rate (`float`, defaults to 0.0): Stochastic depth of its last layer; rises linearly
            from 0.

    The other arguments are those of the shared encoder: see [`VitEncoderConfig`].

    Raises:
        ValueError: If a value is out of its range or values contradict each other.

    Example:

    ```python
    >>> from segmenter_hf import SegmenterConfig, SegmenterForSemanticSegmentation

    >>> tiny = SegmenterConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768, num_labels=150)
    >>> model = SegmenterForSemanticSegmentation(tiny)
    ```
    """

    model_type = "segmenter"
    remote_classes = {
        "AutoModel": "modeling_segmenter.SegmenterModel",
        "AutoModelForSemanticSegmentation": "modeling_segmenter.SegmenterForSemanticSegmentation",
    }

    decoder_type: Literal["mask_transformer", "linear"] = "mask_transformer"
    out_indices: list[int] | tuple[int, ...] | None = None
    decoder_norm: Literal["none", "batch_norm"] = "none"
    decoder_num_hidden_layers: int = 2
    decoder_num_attention_heads: Derived[int] = DERIVED
    decoder_hidden_size: Derived[int] = DERIVED
    decoder_intermediate_size: Derived[int] = DERIVED
    decoder_layer_norm_eps: float | int = 1e-5
    decoder_mask_norm_eps: Derived[float | int] = DERIVED
    decoder_hidden_dropout_prob: float | int = 0.1
    decoder_attention_probs_dropout_prob: float | int = 0.1
    decoder_drop_path_rate: float | int = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.decoder_num_attention_heads is None:
            self.decoder_num_attention_heads = self.num_attention_heads
        if self.decoder_hidden_size is None:
            self.decoder_hidden_size = self.hidden_size
        if self.decoder_intermediate_size is None:
            self.decoder_intermediate_size = self.intermediate_size
        if self.decoder_mask_norm_eps is None:
            self.decoder_mask_norm_eps = self.decoder_layer_norm_eps
        if self.out_indices is not None:
            self.out_indices = list(self.out_indices)
        super().__post_init__(**kwargs)

    def validate_linear_decoder(self) -> None:
        """Layers and norm are options of the linear decoder, and the layers exist."""
        indices, last = self.out_indices, self.num_hidden_layers - 1
        if self.decoder_type != "linear" and (indices is not None or self.decoder_norm != "none"):
            raise ValueError(
                f'`out_indices` and `decoder_norm` are options of `decoder_type="linear"`, got {indices} and '
                f"{self.decoder_norm!r} with {self.decoder_type!r}."
            )
        if indices is not None and (
            not indices or indices != sorted({*indices}) or indices[0] < 0 or indices[-1] > last
        ):
            raise ValueError(f"`out_indices` must be ascending layers from 0 to {last}, got {indices}.")


SegmenterConfig.register_for_auto_class()

__all__ = ["SegmenterConfig"]
