"""The model card: what a model is, how to use it, what made it, and its mIoU, published beside measured."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from PIL import Image
from transformers import PreTrainedModel

from ..data.label_sets import load_label_set
from ..data.synthetic_scenes import draw_scene
from ..evaluation.evaluate import as_percent, per_class_table
from ..utils.atomic_files import atomic_write, write_json, write_text
from ..utils.json_files import check_types, read_json_object
from ..utils.markdown import markdown_cell
from .published_models import PublishedModel, get_published_model, load_published_models


TEMPLATE = Path(__file__).parent / "model_card.md"
FACTS_FILE = "model_card.json"  # beside a model: what its card says and the model itself does not know
SAMPLE_IMAGE = "sample.png"
EVAL_RESULTS_FILE = ".eval_results/semantic_segmentation.yaml"

# What the name of a folder of a dataset has in it, where that is not the name of its label set.
_CONTEXT_WORDS = ("context", "voc2010")
DATASET_WORDS = {
    "ade20k": ("ade",),
    "pascal_context_59": _CONTEXT_WORDS,
    "pascal_context_60": _CONTEXT_WORDS,
    "pascal_voc": ("voc",),
}
# Names on the Hub of the datasets that published models were trained on, where one is known.
HUB_DATASETS = {"ade20k": "zhoubolei/scene_parse_150", "cityscapes": "Chris1/cityscapes_segmentation"}
# The license files of these repositories; that of other sources is not known.
SOURCE_LICENSES = {
    "rstrudel/segmenter": "mit",
    "open-mmlab/mmsegmentation": "apache-2.0",
    "BR-IDL/PaddleViT": "apache-2.0",
    "facebookresearch/dinov2": "apache-2.0",
}
# Names on the Hub of the weights that training started from, by source (none: any source) and backbone.
_AUGREG = "timm/vit_{}_patch16_384.augreg_in21k_ft_in1k"
HUB_BACKBONES = {
    ("rstrudel/segmenter", "ViT-T/16"): _AUGREG.format("tiny"),
    ("rstrudel/segmenter", "ViT-S/16"): _AUGREG.format("small"),
    ("rstrudel/segmenter", "ViT-B/16"): _AUGREG.format("base"),
    ("rstrudel/segmenter", "ViT-L/16"): _AUGREG.format("large"),
    ("facebookresearch/dinov2", "ViT-S/14 (DINOv2)"): "facebook/dinov2-small",
    ("facebookresearch/dinov2", "ViT-B/14 (DINOv2)"): "facebook/dinov2-base",
    ("facebookresearch/dinov2", "ViT-L/14 (DINOv2)"): "facebook/dinov2-large",
    ("facebookresearch/dinov2", "ViT-g/14 (DINOv2)"): "facebook/dinov2-giant",
    (None, "DeiT-B/16 distilled 384"): "facebook/deit-base-distilled-patch16-384",
}
# What a recorded evaluation holds: see `recorded_result`; a class that does not occur has none of the numbers.
_RESULT_TYPES = {
    "dataset": str,
    "split": str,
    "protocol": dict[str, Any],
    "num_images": int,
    **dict.fromkeys(("mean_iou", "mean_accuracy", "overall_accuracy"), float | None),
    **dict.fromkeys(("per_category_iou", "per_category_accuracy"), list[float | None]),
}
# What a source reports of a published model besides its mIoU: the field, and what the card calls it.
_REPORTED = {
    "crop_size": "crop, in pixels",
    "iterations": "iterations",
    "batch_size": "batch size",
    "memory_gb": "training memory, in GB, as reported",
    "fps": "images per second, as reported",
    "device": "device, as reported",
    "note": "note",
}


@dataclass(frozen=True)
class CardFacts:
    """What a card says that the model itself does not know; kept as `model_card.json` beside the model.

    Args:
        results (`tuple[dict, ...]`): Recorded evaluations: see [`recorded_result`].
        training (`dict[str, Any]`): What it was trained with, name by name.
        datasets (`tuple[str, ...]`): Names on the Hub of the datasets it was trained on.
        base_model (`str`, *optional*): Name on the Hub of the model that training started from.
        published_model (`str`, *optional*): The model of `published_models.json` whose weights these are.
        license (`str`, *optional*): License of the weights, as the Hub names it; it is not stated by default.
        speed (`dict[str, Any]`): What a recorded run measured, name by name.
        picture (`str`, *optional*): File name of the image of predictions beside the model.

    Raises:
        ValueError: If a field is of another type, or a result lacks something.
    """

    results: tuple[dict[str, Any], ...] = ()
    training: dict[str, Any] = field(default_factory=dict)
    datasets: tuple[str, ...] = ()
    base_model: str | None = None
    published_model: str | None = None
    license: str | None = None
    speed: dict[str, Any] = field(default_factory=dict)
    picture: str | None = None

    def __post_init__(self) -> None:
        check_types("The facts of a model card", vars(self), get_type_hints(CardFacts))
        for result in self.results:
            check_result("A result of a model card", result)

    def with_results(self, results: Sequence[dict[str, Any]]) -> "CardFacts":
        """The same with further results; a new one replaces that of the same split and protocol."""
        merged = {_result_key(result): result for result in (*self.results, *results)}
        return replace(self, results=tuple(merged.values()))


def read_card_facts(directory: str | Path) -> CardFacts:
    """Read `model_card.json` beside a model; without it nothing is known.

    Raises:
        ValueError: If the file is not what [`write_model_card`] writes.
    """
    path = Path(directory) / FACTS_FILE
    if not path.exists():
        return CardFacts()
    content = read_json_object(path)
    try:
        facts: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in content.items()
        }
        return CardFacts(**facts)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: expected what training or publishing wrote, got {error}. Delete the file."
        ) from error


def save_card_facts(directory: str | Path, facts: CardFacts) -> None:
    """Write `model_card.json` beside a model."""
    write_json(Path(directory) / FACTS_FILE, asdict(facts))


def recorded_result(
    results: dict[str, Any], dataset_name: str, split: str, label_set: str | None = None
) -> dict[str, Any]:
    """What `evaluate_segmentation` returned, with the data that it belongs to."""
    return {
        **results,
        "dataset": dataset_name,
        "hub_dataset": hub_name(dataset_name),
        "split": split,
        "label_set": label_set,
    }


def check_result(where: str | Path, result: dict[str, Any]) -> None:
    """A recorded evaluation has what a card tells of it.

    Args:
        where (`str` or `Path`): What to call its source in errors.
        result (`dict[str, Any]`): As from [`recorded_result`].

    Raises:
        ValueError: If something is missing or of another type.
    """
    types = {**_RESULT_TYPES, **dict.fromkeys(("hub_dataset", "label_set"), str | None)}
    if missing := [name for name in _RESULT_TYPES if name not in result]:
        raise ValueError(f"{where}: expected the results.json of an evaluation, got no {', '.join(missing)}.")
    check_types(where, result, types)
    check_types(where, {"protocol.name": result["protocol"].get("name")}, {"protocol.name": str})


def hub_name(name: str | Path | None) -> str | None:
    """The name of a model or dataset if it is one on the Hub, `None` for folders and for what has no owner."""
    found = name is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) and not Path(name).exists()
    return str(name) if found else None


def write_model_card(
    output_dir: str | Path,
    *,
    model: PreTrainedModel,
    facts: CardFacts,
    hub_model_id: str | None = None,
    revision: str | None = None,
    location: str | None = None,
) -> Path:
    """Write the card of a model, `README.md`, and what belongs to it, into the directory of the model.

    These are `model_card.json`, `.eval_results/*.yaml`, and the image of its examples, `sample.png`, unless there is
    one.

    Args:
        output_dir (`str` or `Path`): The directory of the model.
        model (`PreTrainedModel`): The model.
        facts (`CardFacts`): What the model itself does not know.
        hub_model_id (`str`, *optional*): Name on the Hub for the title and the examples.
        revision (`str`, *optional*): Branch for the examples; the main one by default.
        location (`str`, *optional*): Directory for them where there is no name on the Hub; `output_dir` by default.

    Returns:
        `Path`: The card.

    Raises:
        ValueError: If `facts` name a published model that this one cannot be, or have results of other classes.
    """
    output_dir, config = Path(output_dir), model.config
    published = None
    if facts.published_model is not None:
        published = get_published_model(facts.published_model, config)
        facts = _with_published(facts, published)
    _check_classes(facts.results, max(int(config.num_labels or 0), 2))
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    card = _render(
        hub_model_id or location or output_dir.as_posix(),
        on_hub=hub_model_id is not None,
        revision=revision,
        family=config.model_type,
        architecture=[
            f"{config.num_hidden_layers} layers of width {config.hidden_size}",
            f"patches of {config.patch_size} pixels",
            f"{config.decoder_type.replace('_', ' ')} decoder",
            f"{num_parameters / 1e6:.1f} million parameters"
            if num_parameters >= 1e5
            else f"{num_parameters} parameters",
        ],
        labels=list((config.id2label or {}).values()),
        facts=facts,
        published=published,
    )
    if not (output_dir / SAMPLE_IMAGE).exists():
        with atomic_write(output_dir / SAMPLE_IMAGE) as temporary:
            Image.fromarray(draw_scene(seed=2000)[0]).save(temporary)
    save_card_facts(output_dir, facts)
    return _write_card(output_dir, card, facts.results, published)


def _check_classes(results: Sequence[dict[str, Any]], expected: int) -> None:
    """Results are of a model of so many classes.

    Raises:
        ValueError: If one is not.
    """
    for result in results:
        if (found := len(result["per_category_iou"])) != expected:
            raise ValueError(
                f"A result on {result['dataset']} has {found} classes, and the model {expected}: it is of another model."
            )


def write_published_model_cards(output_dir: str | Path) -> list[Path]:
    """Write the card of every published model as `NAME/README.md`, with `NAME/.eval_results`.

    The measured columns are empty: nothing was measured.

    Args:
        output_dir (`str` or `Path`): The folder of the cards.

    Returns:
        `list[Path]`: The cards.
    """
    written = []
    for name, published in load_published_models().items():
        facts = _with_published(CardFacts(published_model=name), published)
        card = _render(
            f"outputs/{name}",
            on_hub=False,
            family=published.family,
            architecture=[f"{published.backbone} encoder", f"{published.decoder} decoder"]
            + ([f"{published.parameters} parameters"] if published.parameters else []),
            labels=load_label_set(published.dataset).labels,
            facts=facts,
            published=published,
        )
        written.append(_write_card(Path(output_dir) / name, card, (), published))
    return written


def results_table(results: Sequence[dict[str, Any]], published: PublishedModel | None = None) -> str:
    """Markdown table with a row for each split and protocol, in percent; what was not measured is empty."""
    rows = {}
    if published is not None:
        for protocol, score in published.scores.items():
            rows[published.dataset, "validation", protocol] = {"published": f"{score:.2f}"}
    for result in results:
        dataset, split, protocol = _result_key(result)
        if published is not None and _is_of_published(result, published):
            key = published.dataset, split, protocol
            dataset = dataset if "measured" in rows.get(key, {}) else published.dataset
        rows.setdefault((dataset, split, protocol), {}).update(
            images=result["num_images"],
            measured=as_percent(result["mean_iou"]),
            mean_accuracy=as_percent(result["mean_accuracy"]),
            overall_accuracy=as_percent(result["overall_accuracy"]),
        )
    columns = {
        "published": "mIoU published",
        "measured": "mIoU measured",
        "images": "images",
        "mean_accuracy": "mean accuracy",
        "overall_accuracy": "pixel accuracy",
    }
    if published is None:
        del columns["published"]
    cells = [["dataset", "split", "protocol", *columns.values()], ["---"] * (3 + len(columns))]
    cells += [[*key, *(str(row.get(column, "")) for column in columns)] for key, row in rows.items()]
    return "\n".join(f"| {' | '.join(map(markdown_cell, line))} |" for line in cells)


def _is_of_published(result: dict[str, Any], published: PublishedModel) -> bool:
    """Whether a result is on the dataset of a published model, which its label set alone does not say."""
    known = result.get("hub_dataset") == HUB_DATASETS.get(published.dataset, published.dataset)
    words, folder = DATASET_WORDS.get(published.dataset, (published.dataset,)), Path(result["dataset"]).name.lower()
    return result.get("label_set") == published.dataset and (known or any(word in folder for word in words))


def _result_key(result: dict[str, Any]) -> tuple[str, str, str]:
    return Path(result["dataset"]).name, result["split"], result_title(result)


def result_title(result: dict[str, Any]) -> str:
    """The protocol of a result, and in what the network was another one than the model as it is saved."""
    parts = [result["protocol"]["name"]]
    parts += ["full resolution"] if result["protocol"].get("full_resolution") else []
    parts += [str(result[name]) for name in ("runtime", "dtype") if result.get(name) not in (None, "float32")]
    parts += ["weights in 8 bits"] if result.get("int8_weights") else []
    parts += [f"patches of {result['patch_size']}"] if result.get("patch_size") else []
    parts += [f"tokens merged above {result.get('token_merging_threshold')}"] if result.get("token_merging") else []
    return ", ".join(parts)


def _repository(published: PublishedModel) -> str:
    """`owner/name` on GitHub of the source, which a remark may follow."""
    return published.source.split()[0]


def _with_published(facts: CardFacts, published: PublishedModel) -> CardFacts:
    """The facts, completed with what the source of a published model says."""
    source, dataset = _repository(published), HUB_DATASETS.get(published.dataset)
    backbones = (HUB_BACKBONES.get((owner, published.backbone)) for owner in (source, None))
    reported = {title: getattr(published, name, None) for name, title in _REPORTED.items()}
    return replace(
        facts,
        license=facts.license or SOURCE_LICENSES.get(source),
        datasets=facts.datasets or tuple(filter(None, [dataset])),
        base_model=facts.base_model or next(filter(None, backbones), None),
        training=facts.training or {title: value for title, value in reported.items() if value is not None},
    )


def _model_index(results: Sequence[dict[str, Any]], published: PublishedModel | None) -> list[EvalResult]:
    """The measured mIoU; where there is none, the published one with its source. A share of 1."""
    task: dict[str, Any] = {
        "task_type": "image-segmentation",
        "task_name": "Semantic segmentation",
        "metric_type": "mean_iou",
    }
    if published is not None and not results:
        return [
            EvalResult(
                **task,
                dataset_type=HUB_DATASETS.get(published.dataset, published.dataset),
                dataset_name=load_label_set(published.dataset).title,
                dataset_split="validation",
                metric_name=f"mean IoU, {protocol}, as reported by the source",
                metric_value=round(score / 100, 6),
                source_name=published.source,
                source_url=f"https://github.com/{_repository(published)}",
            )
            for protocol, score in published.scores.items()
        ]
    return [
        EvalResult(
            **task,
            dataset_type=result.get("hub_dataset") or Path(result["dataset"]).name,
            dataset_name=Path(result["dataset"]).name,
            dataset_split=result["split"],
            metric_name=f"mean IoU, {result_title(result)}",
            metric_value=round(result["mean_iou"], 6),
        )
        for result in results
        if result["mean_iou"] is not None
    ]


def eval_result_entries(
    results: Sequence[dict[str, Any]], published: PublishedModel | None = None
) -> list[EvalResultEntry]:
    """The mIoU, a share of 1, on datasets of the Hub: published and measured, each with where it comes from."""
    entries = []
    if published is not None and published.dataset in HUB_DATASETS:
        for protocol, score in published.scores.items():
            entries.append(
                EvalResultEntry(
                    dataset_id=HUB_DATASETS[published.dataset],
                    task_id="semantic-segmentation",
                    value=round(score / 100, 6),
                    source_url=f"https://github.com/{_repository(published)}",
                    source_name=published.source,
                    notes=f"mean IoU, {protocol}, validation split, as reported by the source; not measured here",
                )
            )
    for result in results:
        if result.get("hub_dataset") and result["mean_iou"] is not None:
            notes = f"mean IoU, {result_title(result)}, {result['split']} split, {result['num_images']} images"
            entries.append(
                EvalResultEntry(
                    dataset_id=result["hub_dataset"],
                    task_id="semantic-segmentation",
                    value=round(result["mean_iou"], 6),
                    notes=notes,
                )
            )
    return entries


def _render(
    location: str,
    *,
    on_hub: bool,
    revision: str | None = None,
    family: str,
    architecture: Sequence[str],
    labels: Sequence[str],
    facts: CardFacts,
    published: PublishedModel | None,
) -> ModelCard:
    """The card of a model that is at `location`, a directory or a name on the Hub."""
    name = Path(location).name or Path(location).resolve().name
    index = _model_index(facts.results, published)
    data = ModelCardData(
        model_name=name if index else None,
        library_name="transformers",
        pipeline_tag="image-segmentation",
        license=facts.license or "other",
        license_name=None if facts.license else "not-stated",
        tags=["semantic-segmentation", "vision", family, "segmenter-hf"],
        datasets=list(facts.datasets) or None,
        base_model=facts.base_model,
        metrics=["mean_iou"],
        widget=[{"src": SAMPLE_IMAGE, "example_title": "Street scene"}],
        eval_results=index or None,
    )
    protocols = {result_title(result): result["protocol"] for result in facts.results}
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        cell=markdown_cell,
        name=name,
        location=location,
        on_hub=on_hub,
        at=f', revision="{revision}"' if revision else "",
        sample=SAMPLE_IMAGE,
        family=family,
        architecture=", ".join(architecture),
        labels=labels,
        facts=facts,
        published=published,
        trained_on=None if published is None else load_label_set(published.dataset).title,
        repository=None if published is None else _repository(published),
        protocols={
            title: ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in protocol.items() if key != "name")
            for title, protocol in protocols.items()
        },
        table=results_table(facts.results, published),
        per_class=[(*_result_key(result), per_class_table(result, labels)) for result in facts.results],
        drawn=any(result["dataset"] == "scenes" for result in facts.results),
    )


def _write_card(
    directory: Path, card: ModelCard, results: Sequence[dict[str, Any]], published: PublishedModel | None
) -> Path:
    entries = eval_result_entries(results, published)
    if entries:
        text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
        write_text(directory / EVAL_RESULTS_FILE, text)
    else:
        (directory / EVAL_RESULTS_FILE).unlink(missing_ok=True)
    path = directory / "README.md"
    write_text(path, card.content)
    return path
