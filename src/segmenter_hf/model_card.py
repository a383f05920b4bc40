"""The model card: what a model is, how to use it, and the mIoU that was measured, with its protocol."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from .evaluation import as_percent, per_class_table
from .files import write_text


TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
PUBLISHED_MODELS = Path(__file__).parent / "published_models.json"


def write_model_card(
    output_dir: str | Path,
    *,
    model: PreTrainedModel,
    results: Sequence[dict[str, Any]],
    training: dict[str, Any] | None = None,
    picture: str | None = None,
) -> Path:
    """Write the card of a model as `README.md` into its directory.

    Args:
        output_dir (`str` or `Path`): The directory of the model; its name is the name in the card.
        model (`PreTrainedModel`): The model.
        results (`Sequence[dict]`): What `evaluate_segmentation` returned, each with `dataset` and `split`.
        training (`dict`, *optional*): What it was trained with, name by name.
        picture (`str`, *optional*): File name of a picture of predictions in the directory.

    Returns:
        `Path`: The card.
    """
    name = Path(output_dir).resolve().name
    config = model.config
    data = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="image-segmentation",
        license="apache-2.0",
        tags=["semantic-segmentation", "vision", config.model_type, "segmenter-hf"],
        eval_results=[
            EvalResult(
                task_type="image-segmentation",
                task_name=f"Semantic segmentation, {result['protocol']['name']}",
                dataset_type=Path(result["dataset"]).name,
                dataset_name=Path(result["dataset"]).name,
                dataset_split=result["split"],
                metric_type="mean_iou",
                metric_name="mean IoU",
                metric_value=round(result["mean_iou"], 6),
            )
            for result in results
        ],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        architecture=type(model).__name__,
        decoder=config.decoder_type.replace("_", " "),
        num_parameters=f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}",
        patch_size=config.patch_size,
        labels=", ".join(config.id2label.values()),
        num_labels=config.num_labels,
        table=results_table(results),
        per_class=[
            (result["protocol"]["name"], per_class_table(result, list(config.id2label.values()))) for result in results
        ],
        training=training or {},
        picture=picture,
    )
    path = Path(output_dir) / "README.md"
    write_text(path, card.content)
    return path


def results_table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown table with a row for each measured result, in percent."""
    lines = [
        "| dataset | split | images | protocol | mIoU | mean accuracy | pixel accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        scores = [as_percent(result[key]) for key in ("mean_iou", "mean_accuracy", "overall_accuracy")]
        cells = [Path(result["dataset"]).name, result["split"], str(result["num_images"]), result["protocol"]["name"]]
        lines.append(f"| {' | '.join([*cells, *scores])} |")
    return "\n".join(lines)


def published_models_table() -> str:
    """Markdown table of the published models with the numbers that their sources report, in percent."""
    lines = [
        "| model | source | backbone | decoder | dataset | crop | ss | ms+flip |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in json.loads(PUBLISHED_MODELS.read_text(encoding="utf-8"))["models"]:
        name = f"[{model['name']}]({model['checkpoint_url']})" if model.get("checkpoint_url") else model["name"]
        scores = [model.get(key) for key in ("miou_single_scale", "miou_multi_scale_flip")]
        cells = [model[key] for key in ("source", "backbone", "decoder", "dataset", "crop_size")]
        cells += ["-" if score is None else f"{score:.2f}" for score in scores]
        lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
