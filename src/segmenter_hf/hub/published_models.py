"""The published models: where they are, and the numbers that their sources report."""

from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.json_files import read_json_object


if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PUBLISHED_MODELS = Path(__file__).parent / "published_models.json"


@dataclass(frozen=True)
class PublishedModel:
    """A model of `published_models.json`. mIoU in percent; what its source does not report is `None`.

    Windows and their strides, in pixels, are those of the source's configuration for the evaluation. The weights are
    at `checkpoint_url` (with a configuration at `config_url` to lie beside them, and the encoder of a head that is published
    alone at `encoder_url`), or behind `share_url`, which only a
    browser opens, or not published at all.
    """

    name: str
    family: str
    source: str
    backbone: str
    decoder: str
    dataset: str
    crop_size: int
    reported_in: str
    miou_single_scale: float | None = None
    miou_multi_scale_flip: float | None = None
    miou_in_paper: float | None = None
    report_url: str | None = None
    window_size: int | None = None
    window_stride: int | None = None
    checkpoint_url: str | None = None
    config_url: str | None = None
    encoder_url: str | None = None
    sha256_prefix: str | None = None
    share_url: str | None = None
    share_password: str | None = None
    parameters: str | None = None
    iterations: int | None = None
    batch_size: int | None = None
    memory_gb: float | None = None
    fps: float | None = None
    device: str | None = None
    note: str | None = None

    @property
    def scores(self) -> dict[str, float]:
        """mIoU in percent by protocol, of those that the source reports."""
        scores = {"single scale": self.miou_single_scale, "multi-scale + flip": self.miou_multi_scale_flip}
        return {protocol: score for protocol, score in scores.items() if score is not None}


@cache
def load_published_models() -> dict[str, PublishedModel]:
    """The published models by name, in the order of the file."""
    models = read_json_object(PUBLISHED_MODELS)["models"]
    return {model["name"]: PublishedModel(**model) for model in models}


def get_published_model(name: str, config: "PreTrainedConfig | None" = None) -> PublishedModel:
    """The published model of a name.

    Args:
        name (`str`): The name.
        config (`PreTrainedConfig`, *optional*): The configuration of a model that is said to be that one.

    Returns:
        `PublishedModel`: The published model.

    Raises:
        ValueError: If there is none, with the names that look like it, or the configuration is of another family, decoder
            or number of classes.
    """
    models = load_published_models()
    if name not in models:
        close = get_close_matches(name, models, n=3) or [known for known in models if name in known][:3]
        hint = f"Did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(f"No published model is called {name!r}. {hint}".rstrip())
    published = models[name]
    if config is not None:
        from ..data.label_sets import load_label_set  # takes a second, which a list of models needs not

        expected = (published.family, published.decoder, load_label_set(published.dataset).num_labels)
        got = (config.model_type, config.decoder_type.removesuffix("_transformer"), config.num_labels)
        if got != expected:
            raise ValueError(
                f"{name} is a {expected[0]} with {expected[1]} decoder and {expected[2]} classes, the model a {got[0]} "
                f"with {got[1]} decoder and {got[2]} classes: name the published model whose weights these are."
            )
    return published


__all__ = [
    "PublishedModel",
    "get_published_model",
    "load_published_models",
]
