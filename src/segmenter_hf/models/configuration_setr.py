"""Configuration of SETR (Zheng et al., CVPR 2021)."""

import math
from typing import Any, Literal

from .configuration_vit_encoder import DERIVED, Derived, VitEncoderConfig, strict_config


# Fields that follow from the decoder where they are not given: sections 3.2 and 4.1 of the paper, and the settings of
# mmsegmentation (configs/setr, ADE20K) for the auxiliary heads.
DECODER_DEFAULTS = {
    "naive": {
        "decoder_num_convs": 1,
        "decoder_kernel_size": 1,
        "decoder_upsample_factor": 4,
        "auxiliary_num_convs": 2,
        "auxiliary_kernel_size": 1,
        "auxiliary_upsample_factor": 4,
        "use_class_token": True,
    },
    "pup": {
        "decoder_num_convs": 4,
        "decoder_kernel_size": 3,
        "decoder_upsample_factor": 2,
        "auxiliary_num_convs": 2,
        "auxiliary_kernel_size": 3,
        "auxiliary_upsample_factor": 4,
        "use_class_token": True,
    },
    "mla": {
        "decoder_num_convs": 2,
        "decoder_kernel_size": 3,
        "decoder_upsample_factor": 4,
        "auxiliary_num_convs": 0,
        "auxiliary_kernel_size": 1,
        "auxiliary_upsample_factor": 1,
        "use_class_token": False,
    },
}
# The layers of 24 that the heads see, counted from 1; those of other depths are in proportion.
LAYERS = {"naive": (10, 15, 20, 24), "pup": (10, 15, 20, 24), "mla": (6, 12, 18, 24)}


@strict_config
class SetrConfig(VitEncoderConfig):
    r"""Configuration of [`SetrModel`] and [`SetrForSemanticSegmentation`].

    The defaults are SETR-PUP of the paper, with the ViT-L/16 encoder. The number of classes comes from `num_labels` or
    `id2label`. Fields that are `None` take the value that belongs to the decoder:

    | field | naive | pup | mla |
    |---|---|---|---|
    | `out_indices`, of 24 layers | 9, 14, 19, 23 | 9, 14, 19, 23 | 5, 11, 17, 23 |
    | `use_class_token` | yes | yes | no |
    | `decoder_num_convs` | 1 | 4 | 2 at each level |
    | `decoder_kernel_size` | 1 | 3 | 3 |
    | `decoder_upsample_factor` | 4 | 2 after each convolution | 4 |
    | `auxiliary_num_convs` | 2 | 2 | 0 |
    | `auxiliary_kernel_size` | 1 | 3 | 1 |
    | `auxiliary_upsample_factor` | 4 after each convolution | 4 after each convolution | 1 |

    Args:
        decoder_type (`"naive"`, `"pup"` or `"mla"`, defaults to `"pup"`): The decoder (section 3.2): a convolution;
            progressive upsampling; or multi-level aggregation.
        out_indices (`list[int]`, *optional*): The layers that the heads see, counted from 0, ascending. "naive"
            and "pup" decode the last of them and have an auxiliary head on each other; "mla" decodes all of them and has
            an auxiliary head on each level of its neck.
        use_class_token (`bool`, *optional*): Whether the class token goes through the layers with the patches.
        decoder_hidden_size (`int`, defaults to 256): Channels of the convolutions; in "mla" those of the neck, and the
            head has half as many.
        decoder_num_convs (`int`, *optional*): Convolutions of the head.
        decoder_kernel_size (`int`, *optional*): Side of their kernels; odd.
        decoder_upsample_factor (`int`, *optional*): Factor of the bilinear upsampling after each of them, or after the
            last of each level in "mla". 1 leaves all upsampling to the end, as the authors' repository has it for
            "naive" and its auxiliary heads.
        decoder_align_corners (`bool`, defaults to `False`): How "mla" upsamples; the authors' repository aligns corners.
        decoder_classifier_kernel_size (`int`, defaults to 1): Side of the last convolution's kernel; 3 in the "mla" of
            the authors' repository.
        use_auxiliary_head (`bool`, defaults to `True`): Whether there are auxiliary heads for training.
        auxiliary_loss_weight (`float`, defaults to 0.4): Weight of the loss of each auxiliary head.
        auxiliary_num_convs (`int`, *optional*): Convolutions of an auxiliary head.
        auxiliary_kernel_size (`int`, *optional*): Side of their kernels; odd.
        auxiliary_upsample_factor (`int`, *optional*): Factor of the bilinear upsampling after each of them.

    The other arguments are those of the shared encoder: see [`VitEncoderConfig`]. Their defaults here are those of
    ViT-L/16 without final norm, dropout and drop path.

    Raises:
        ValueError: If a value is out of its range or values contradict each other.

    Example:

    ```python
    >>> from segmenter_hf import SetrConfig, SetrForSemanticSegmentation

    >>> config = SetrConfig(decoder_type="mla", hidden_size=192, num_hidden_layers=12, num_attention_heads=3)
    >>> config.out_indices
    [2, 5, 8, 11]
    >>> model = SetrForSemanticSegmentation(config)
    ```
    """

    model_type = "setr"
    remote_classes = {
        "AutoModel": "modeling_setr.SetrModel",
        "AutoModelForSemanticSegmentation": "modeling_setr.SetrForSemanticSegmentation",
    }

    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: Derived[int] = DERIVED
    drop_path_rate: float | int = 0.0
    use_class_token: Derived[bool] = DERIVED
    use_final_layer_norm: bool = False
    decoder_type: Literal["naive", "pup", "mla"] = "pup"
    out_indices: Derived[list[int] | tuple[int, ...]] = DERIVED
    decoder_hidden_size: int = 256
    decoder_num_convs: Derived[int] = DERIVED
    decoder_kernel_size: Derived[int] = DERIVED
    decoder_upsample_factor: Derived[int] = DERIVED
    decoder_align_corners: bool = False
    decoder_classifier_kernel_size: int = 1
    use_auxiliary_head: bool = True
    auxiliary_loss_weight: float | int = 0.4
    auxiliary_num_convs: Derived[int] = DERIVED
    auxiliary_kernel_size: Derived[int] = DERIVED
    auxiliary_upsample_factor: Derived[int] = DERIVED

    def __post_init__(self, **kwargs: Any) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        for name, value in DECODER_DEFAULTS.get(self.decoder_type, {}).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.out_indices is None:
            layers = LAYERS.get(self.decoder_type, ())
            self.out_indices = [max(layer * self.num_hidden_layers // 24, 1) - 1 for layer in layers]
        self.out_indices = list(self.out_indices)
        super().__post_init__(**kwargs)

    def validate_out_indices(self) -> None:
        """The layers exist and are in order."""
        indices, last = self.out_indices, self.num_hidden_layers - 1
        if not indices or indices != sorted(indices) or indices[0] < 0 or indices[-1] > last:
            raise ValueError(f"`out_indices` must be ascending layers from 0 to {last}, got {indices}.")

    def validate_convolutions(self) -> None:
        """Kernels have a middle, factors are whole, and the head of "mla" can have half of the channels."""
        for prefix in ("decoder", "auxiliary"):
            convs, factor = getattr(self, f"{prefix}_num_convs"), getattr(self, f"{prefix}_upsample_factor")
            if convs < 0 or factor < 1:
                raise ValueError(
                    f"`{prefix}_num_convs` must be at least 0 and `{prefix}_upsample_factor` at least 1, got {convs} and "
                    f"{factor}."
                )
        for name in ("decoder_kernel_size", "auxiliary_kernel_size", "decoder_classifier_kernel_size"):
            if getattr(self, name) % 2 == 0:
                raise ValueError(f"`{name}` must be odd, got {getattr(self, name)}.")
        if self.decoder_type == "mla" and (self.decoder_hidden_size % 2 or not self.decoder_num_convs):
            raise ValueError(
                "The head of SETR-MLA has at least one convolution and half as many channels as its neck: expected an even "
                f"`decoder_hidden_size` and a positive `decoder_num_convs`, got {self.decoder_hidden_size} and "
                f"{self.decoder_num_convs}."
            )
        if not 0 <= self.auxiliary_loss_weight < math.inf:
            raise ValueError(f"`auxiliary_loss_weight` must be at least 0, got {self.auxiliary_loss_weight}.")


SetrConfig.register_for_auto_class()

__all__ = ["SetrConfig"]
