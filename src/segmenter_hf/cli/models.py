"""List the published models with the mean IoU that their sources report, and how to get them.

    segmenter-hf models

mIoU is in percent: "ss" is single scale, "ms+flip" is multi-scale + flip. Weights are downloaded by `segmenter-hf convert --model NAME`
("by name"), or in a browser first ("by hand": the same command says from where). docs/model_zoo.md has sources and protocols.
"""

from collections.abc import Sequence

from ..hub.published_models import PublishedModel, load_published_models
from .errors import cli_main
from .parsing import build_parser, parse_arguments


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parse_arguments(build_parser("models", __doc__, []), argv)
    print(list_published_models())
    print("\nGet one: segmenter-hf convert --model NAME --output_dir DIR")


def list_published_models() -> str:
    """Table of the published models for a terminal of 100 columns, mIoU in percent as their sources report it."""
    rows = [("name", "backbone", "decoder", "crop", "ss", "ms+flip", "weights")]
    for model in load_published_models().values():
        weights = "by name" if model.checkpoint_url else "by hand" if model.share_url else "none"
        backbone = model.backbone.partition(" ")[0]
        rows.append((model.name, backbone, model.decoder, str(model.crop_size), *_scores(model), weights))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def published_models_table() -> str:
    """Markdown table of the published models with the protocol and the numbers that their sources report.

    mIoU is in percent; the protocol is the side of a window and the stride, in pixels.
    """
    columns = ("model", "source", "backbone", "decoder", "dataset", "crop", "protocol", "ss", "ms+flip", "command")
    rows = [columns, ("---",) * len(columns)]
    for model in load_published_models().values():
        weights, option = model.checkpoint_url or model.share_url, f"`--model {model.name}`"
        if model.share_url:
            password = f", password `{model.share_password}`" if model.share_password else ""
            option += f" once [downloaded by hand]({model.share_url}){password}"
        rows.append(
            (
                _link(model.name, weights),
                _link(model.source, model.report_url),
                *_description(model),
                _protocol(model),
                *_scores(model),
                option if weights else "no weights published",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _description(model: PublishedModel) -> tuple[str, str, str, str]:
    return model.backbone, model.decoder, model.dataset, str(model.crop_size)


def _scores(model: PublishedModel) -> tuple[str, str]:
    single, multi = (
        "-" if score is None else f"{score:.2f}" for score in (model.miou_single_scale, model.miou_multi_scale_flip)
    )
    return single, multi


def _protocol(model: PublishedModel) -> str:
    """Window and stride, in pixels."""
    if model.window_size is None:
        return "-"
    if model.window_stride is None:
        name = _file_name(model.config_url) if model.config_url else "its configuration"
        return f"{model.window_size}/in {_link(name, model.config_url)}"
    return f"{model.window_size}/{model.window_stride}"


def _file_name(url: str | None) -> str:
    """`variant.yml` or `config.py`: the kind of configuration, without the model's name before it."""
    return "config.py" if (url or "").endswith("_config.py") else (url or "").rsplit("/", 1)[-1]


def _link(text: str, url: str | None) -> str:
    return f"[{text}]({url})" if url else text


__all__ = ["list_published_models", "published_models_table"]
