r"""Publish a trained or converted model on the Hub: weights, code, image processor, card and images in one commit.

    segmenter-hf publish --checkpoint_dir outputs/demo/model --hub_model_id your-name/segmenter-scenes

Look first, without pushing anything:

    segmenter-hf publish --checkpoint_dir outputs/demo/model --hub_model_id your-name/segmenter-scenes \
        --output_dir outputs/segmenter-scenes --dry_run

`--evaluate DATASET` measures the mIoU for the card; `--results` takes it from recorded runs of `segmenter-hf evaluate`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..hub.model_card import CardFacts, read_card_facts, save_card_facts
from ..hub.publishing import (
    PublishingError,
    build_repository,
    check_push,
    measure,
    publish_model,
    read_recorded_result,
)
from ..inference.protocol import InferenceProtocol
from ..utils.json_files import read_json_object
from .errors import UsageError, cli_main
from .parsing import build_parser, parse_arguments
from .prediction_arguments import EvaluationDataArguments
from .remembered import recall_data_arguments, recall_label_changes


@dataclass
class Arguments:
    """Which model goes where on the Hub."""

    _argument_group_name = "model and repository"

    checkpoint_dir: str = field(metadata={"help": "Directory of a trained or converted model."})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Where it goes on the Hub, as owner/name; required without --dry_run."}
    )
    private: bool = field(default=False, metadata={"help": "Make a new repository private."})
    revision: str | None = field(default=None, metadata={"help": "Branch to push to; made where there is none."})
    commit_message: str = field(default="Publish the model", metadata={"help": "First line of the commit."})
    dry_run: bool = field(default=False, metadata={"help": "Only write what would be pushed into output_dir."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Directory to write with --dry_run, where it is required."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace the model that output_dir holds."})


@dataclass
class CardArguments:
    """What the card says beside what is noted with the model."""

    _argument_group_name = "model card"

    published_model: str | None = field(
        default=None,
        metadata={"help": "Name in `segmenter-hf models` of the model whose converted weights these are."},
    )
    license: str | None = field(default=None, metadata={"help": "License of the weights, such as apache-2.0."})
    results: list[str] | None = field(
        default=None, metadata={"help": "Files results.json of `segmenter-hf evaluate` to put into the card."}
    )
    speed: str | None = field(
        default=None, metadata={"help": "JSON file with what a recorded run measured, name by name, for the card."}
    )


@dataclass
class EvaluationArguments(EvaluationDataArguments):
    """The evaluation whose mean IoU the card gets."""

    _argument_group_name = "evaluation"

    evaluate: str | None = field(
        default=None, metadata={"help": "Hub name, folder or scenes: measure the mIoU on it."}
    )
    label_set: str | None = field(
        default=None,
        metadata={"help": "Name or file (JSON, text, CSV); says how stored labels map to the model's classes."},
    )
    multi_scale_flip: bool = field(default=False, metadata={"help": "Measure multi-scale + flip too."})
    window_batch_size: int = field(default=8, metadata={"help": "Windows at once through the network."})
    device: str | None = field(default=None, metadata={"help": "Device of the model; a GPU where there is one."})


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    """Publish what the command line names."""
    parser = build_parser("publish", __doc__, [Arguments, CardArguments, EvaluationArguments])
    args, card_args, evaluation_args = parse_arguments(parser, argv)
    if args.dry_run and args.output_dir is None:
        raise UsageError("--dry_run needs --output_dir, the directory to write.")
    if not args.dry_run and args.hub_model_id is None:
        raise UsageError("Give --hub_model_id owner/name, or --dry_run with --output_dir.")
    try:
        publish(args, card_args, evaluation_args)
    except PublishingError as error:
        raise ConnectionError(str(error)) from error


def publish(args: Arguments, card_args: CardArguments, evaluation_args: EvaluationArguments) -> None:
    """Publish what the arguments name, or write it with `--dry_run`, and print what was done."""
    if not args.dry_run:
        check_push(str(args.hub_model_id))
    facts = collect_facts(args.checkpoint_dir, card_args, evaluation_args)
    if args.dry_run:
        directory = build_repository(
            args.checkpoint_dir,
            str(args.output_dir),
            facts=facts,
            hub_model_id=args.hub_model_id,
            revision=args.revision,
            overwrite=args.overwrite,
        )
        files = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
        print(f"Wrote {directory}, nothing was pushed: {', '.join(files)}")
        return
    commit = publish_model(
        args.checkpoint_dir,
        str(args.hub_model_id),
        facts=facts,
        private=args.private or None,
        revision=args.revision,
        commit_message=args.commit_message,
    )
    print(f"Published {args.hub_model_id}: {commit.commit_url}")
    at = f', revision="{args.revision}"' if args.revision else ""
    print(f'Next: pipeline("image-segmentation", "{args.hub_model_id}"{at}, trust_remote_code=True)')


def collect_facts(checkpoint_dir: str, card_args: CardArguments, evaluation_args: EvaluationArguments) -> CardFacts:
    """What the card is to say: what is noted with the model, what the arguments add, and what is measured now."""
    facts = read_card_facts(checkpoint_dir)
    facts = replace(
        facts,
        published_model=card_args.published_model or facts.published_model,
        license=card_args.license or facts.license,
        speed=read_json_object(card_args.speed) if card_args.speed else facts.speed,
    )
    facts = facts.with_results([read_recorded_result(path) for path in card_args.results or []])
    if evaluation_args.evaluate is not None:
        names = vars(EvaluationDataArguments())  # not the label set: the model has its own
        recall_data_arguments(checkpoint_dir, evaluation_args.evaluate, evaluation_args, *names)
    evaluation_args.split = evaluation_args.split or "validation"
    options = vars(evaluation_args).copy()
    dataset_name = options.pop("evaluate")
    if dataset_name is not None:
        fields = {"window_batch_size": options.pop("window_batch_size")}
        protocols = [InferenceProtocol(**fields)]
        if options.pop("multi_scale_flip"):
            protocols.append(InferenceProtocol.multi_scale_flip(**fields))
        options["label_changes"] = recall_label_changes(checkpoint_dir, evaluation_args.label_set)
        facts = facts.with_results(measure(checkpoint_dir, dataset_name, protocols=protocols, **options))
        save_card_facts(checkpoint_dir, facts)
        print(f"Recorded in {checkpoint_dir}: from now on the card has these numbers without --evaluate.")
    return facts
