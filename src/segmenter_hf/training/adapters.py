"""Low-rank updates of the encoder (LoRA, Hu et al., ICLR 2022), trained in place of its weights and merged into them."""

import re

from torch import nn
from transformers import PreTrainedModel


def add_adapters(model: PreTrainedModel, rank: int, alpha: float | None, targets: str) -> None:
    """Give linear layers of the encoder low-rank updates, and freeze the rest of the encoder.

    The model stays of its class; heads and neck are trained as they are. A checkpoint holds the updates beside the
    weights, so a run resumes from it as from any other.

    Args:
        model (`PreTrainedModel`): The model, which is changed.
        rank (`int`): Rank of the updates.
        alpha (`float`, *optional*): The updates are scaled by `alpha / rank`; by 2 by default.
        targets (`str`): Names of the linear layers in each encoder layer, as in `"q_proj,v_proj"`.

    Raises:
        ImportError: If peft is not installed.
        ValueError: If a layer of the encoder has no linear layer of a name.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("`lora_rank` needs peft: pip install segmenter-hf[peft].") from error
    wanted = [name.strip() for name in targets.split(",") if name.strip()]
    layers = model.base_model.get_submodule("layers")
    known = {name.rpartition(".")[2] for name, module in layers.named_modules() if isinstance(module, nn.Linear)}
    if not wanted or not known.issuperset(wanted):
        raise ValueError(
            f'`lora_targets` must be names of {", ".join(sorted(known))}, as in "q_proj,v_proj", got {targets!r}.'
        )
    names = "|".join(map(re.escape, wanted))
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]  # peft divides it: any number will do
        target_modules=rf"{model.base_model_prefix}\.layers\..*\.({names})",
    )
    encoder_name = f"{model.base_model_prefix}."
    trained = [parameter for name, parameter in model.named_parameters() if not name.startswith(encoder_name)]
    inject_adapter_in_model(config, model)
    for parameter in trained:  # peft freezes all but its own
        parameter.requires_grad_(True)


def merge_adapters(model: PreTrainedModel) -> None:
    """Add the low-rank updates to the weights of their layers, which become plain linear layers again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, BaseTunerLayer):
                module.merge()
                setattr(parent, name, module.get_base_layer())
    model.requires_grad_(True)
