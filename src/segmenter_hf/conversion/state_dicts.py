"""Rename the weights of another system, account for every one of them, and load them strictly."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..models.modeling_vit_encoder import VitEncoderPreTrainedModel


class Rename(NamedTuple):
    """A rule of a rename table.

    Args:
        source (`str`): Regular expression that matches whole source keys.
        target (`str` or `tuple[str | None, ...]`): The new key, with groups as in `re.sub`. A tuple: the tensor is split
            into as many equal parts along its first axis, and those without a key are left out.
        convert (`Callable`, *optional*): What is done to the tensor before that.
    """

    source: str
    target: str | tuple[str | None, ...]
    convert: Callable[[torch.Tensor], torch.Tensor] | None = None


class Weight(NamedTuple):
    """A tensor and the source key that it is from."""

    source: str
    tensor: torch.Tensor


@dataclass(frozen=True)
class Conversion:
    """What a source format says about a checkpoint.

    Args:
        source (`str`): Name of the system that made it.
        model_class (`type[VitEncoderPreTrainedModel]`): The model to build.
        config (`dict[str, Any]`): Arguments of its configuration, without labels.
        state_dict (`dict[str, Any]`): The weights under their source keys.
        renames (`Sequence[Rename]`): The ordered rename table.
        unused (`Sequence[str]`): Regular expressions of whole source keys that are knowingly left out.
        processor (`dict[str, Any]`): Arguments of the image processor.
        num_labels (`int`, *optional*): Number of classes; none for an encoder.
        class_names (`tuple[str, ...]`): Names of the classes, where the checkpoint has them.
        palette (`tuple[tuple[int, int, int], ...]`): Their colors, where the checkpoint has them.
        label_sets (`tuple[str, ...]`): Packaged label sets that the classes may be, by the name of the dataset.
    """

    source: str
    model_class: type[VitEncoderPreTrainedModel]
    config: dict[str, Any]
    state_dict: dict[str, Any]
    renames: Sequence[Rename]
    unused: Sequence[str] = ()
    processor: dict[str, Any] = field(default_factory=dict)
    num_labels: int | None = None
    class_names: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    label_sets: tuple[str, ...] = ()


def qkv(target: str) -> tuple[str, ...]:
    """Targets of a stacked projection: `target` with q, k and v in place of its braces."""
    return tuple(target.replace("{}", letter) for letter in "qkv")


def timm_layers(
    source: str, target: str, norms: tuple[str, str] = ("norm1", "norm2"), out: str = "proj"
) -> list[Rename]:
    """Table of the layers of timm's ViT, whose names rstrudel/segmenter, DeiT and PaddleViT's DeiT share.

    Args:
        source (`str`): Regular expression of the list of layers, as in `r"encoder\\.blocks"`.
        target (`str`): The new name of the list.
        norms (`tuple[str, str]`): Names of the LayerNorms before attention and MLP, where they are others.
        out (`str`): Name of the output projection of the attention.
    """
    source, target = source + r"\.(\d+)\.", target + r".\1."
    return [
        Rename(source + rf"{norms[0]}\.(weight|bias)", target + r"layernorm_before.\2"),
        Rename(source + r"attn\.qkv\.(weight|bias)", qkv(target + r"attention.{}_proj.\2")),
        Rename(source + rf"attn\.{out}\.(weight|bias)", target + r"attention.o_proj.\2"),
        Rename(source + rf"{norms[1]}\.(weight|bias)", target + r"layernorm_after.\2"),
        Rename(source + r"mlp\.(fc1|fc2)\.(weight|bias)", target + r"mlp.\2.\3"),
    ]


def count_layers(state_dict: dict[str, Any], layers: str) -> int:
    """Number of layers under the names `<layers>.<index>.`; `layers` is a regular expression."""
    matches = (re.match(layers + r"\.(\d+)\.", key) for key in state_dict)
    return len({match[1] for match in matches if match})


def get_tensor(state_dict: dict[str, Any], key: str, ndim: int, path: Path) -> torch.Tensor:
    """The tensor of a key that sizes are read from.

    Raises:
        ValueError: If it is missing, or is not a tensor of `ndim` axes.
    """
    tensor = state_dict.get(key)
    if not isinstance(tensor, torch.Tensor) or tensor.ndim != ndim:
        got = "none" if tensor is None else describe(tensor)
        raise ValueError(f"{path}: expected a tensor `{key}` of {ndim} axes, got {got}.")
    return tensor


def square_image_size(positions: torch.Tensor, num_prefix_tokens: int, patch_size: int, path: Path) -> int:
    """Side in pixels of the square image that position embeddings (1, prefix + patches, hidden) are of.

    Raises:
        ValueError: If the patches are not those of a square.
    """
    num_patches = positions.shape[1] - num_prefix_tokens
    side = round(max(num_patches, 0) ** 0.5)
    if side**2 != num_patches or side == 0:
        raise ValueError(f"{path}: expected position embeddings of a square of patches, got {num_patches} patches.")
    return side * patch_size


def infer_num_heads(hidden_size: int) -> int:
    """Attention heads of a ViT of a width, which the tensors do not show: 64 channels each, but 16 in the larger ones.

    These are ViT-SO400M, ViT-H, ViT-g and ViT-G.
    """
    return 16 if hidden_size in (1152, 1280, 1408, 1664) else hidden_size // 64


def rename_weights(conversion: Conversion, path: Path) -> dict[str, Weight]:
    """Apply the rename table: each rule takes its keys away, and none may remain.

    Args:
        conversion (`Conversion`): The weights, the table, and what is left out.
        path (`Path`): The file, for errors.

    Returns:
        `dict[str, Weight]`: Weights by their new keys.

    Raises:
        ValueError: If keys remain, two become one, or a value is no tensor that can be split so.
    """
    remaining = dict(conversion.state_dict)
    renamed: dict[str, Weight] = {}
    for rule in conversion.renames:
        pattern = re.compile(rule.source)
        for key in [key for key in remaining if pattern.fullmatch(key)]:
            tensor = remaining.pop(key)
            if not is_plain(tensor):
                raise ValueError(f"{path}: expected `{key}` to be a tensor of floats, got {describe(tensor)}.")
            try:
                tensor = rule.convert(tensor) if rule.convert else tensor
            except (IndexError, RuntimeError) as error:
                raise ValueError(f"{path}: `{key}` has the wrong number of axes, got {describe(tensor)}.") from error
            targets = (rule.target,) if isinstance(rule.target, str) else rule.target
            if tensor.shape[0] % len(targets):
                raise ValueError(f"{path}: expected `{key}` to stack {len(targets)} tensors, got {describe(tensor)}.")
            for template, part in zip(targets, tensor.chunk(len(targets))):
                if template is None:
                    continue
                target = pattern.sub(template, key)
                if target in renamed:
                    raise ValueError(f"{path}: `{key}` and `{renamed[target].source}` are both `{target}`.")
                renamed[target] = Weight(key, part)
    leftovers = [key for key in remaining if not any(re.fullmatch(pattern, key) for pattern in conversion.unused)]
    if leftovers:
        raise ValueError(
            f"{path}: these keys have no place in a {conversion.source} model: {listing(leftovers)}. It is a variant that "
            "is not supported, or another format: see `source_format`."
        )
    return renamed


def load_weights(model: VitEncoderPreTrainedModel, weights: dict[str, Weight], path: Path) -> None:
    """Load weights as float32 into a model on the meta device, strictly.

    Args:
        model (`PreTrainedModel`): The model; its parameters are replaced.
        weights (`dict[str, Weight]`): Weights by the keys of the model.
        path (`Path`): The file, for errors.

    Raises:
        ValueError: If weights are missing, have no place, have another shape, or hold NaN or infinity.
    """
    # Counters of batches are no weights: they start again.
    expected, counters = model.state_dict(), {}
    for key in [key for key in expected if key.endswith(".num_batches_tracked")]:
        counters[key] = torch.zeros_like(expected.pop(key), device="cpu")
    problems = []
    if missing := [key for key in expected if key not in weights]:
        problems.append(f"nothing for {listing(missing)}")
    if unexpected := [weight.source for key, weight in weights.items() if key not in expected]:
        problems.append(f"no place for {listing(unexpected)}")
    problems += [
        f"`{weights[key].source}` of shape {tuple(weights[key].tensor.shape)} for {key}, expected {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in weights and weights[key].tensor.shape != tensor.shape
    ]
    if problems:
        raise ValueError(f"{path} and its configuration do not fit together: {'; '.join(problems)}.")
    # A copy of its own for each: parts of one tensor, and tensors mapped from the file, do not outlive it.
    tensors = {
        key: weight.tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        for key, weight in weights.items()
    }
    if broken := [weights[key].source for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise ValueError(
            f"{path}: NaN or infinite values in {listing(broken)}. The training diverged or the file is damaged."
        )
    model.load_state_dict(tensors | counters, strict=True, assign=True)


def is_plain(value: Any) -> bool:
    """Whether a value is a dense tensor of floats with at least one axis."""
    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.ndim > 0
    )


def describe(value: Any) -> str:
    """Shape and dtype of a tensor, the type of anything else."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{tuple(value.shape)} of {value.dtype}"


def listing(keys: Iterable[str]) -> str:
    """Keys for an error: the first ten, and how many more there are."""
    keys = list(keys)
    more = f" and {len(keys) - 10} more" if len(keys) > 10 else ""
    return ", ".join(f"`{key}`" for key in keys[:10]) + more
