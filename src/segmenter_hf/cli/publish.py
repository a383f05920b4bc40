"""Publish a trained or converted model on the Hub: weights, code, image processor, card and pictures in one commit.

    python scripts/publish.py --checkpoint_dir outputs/demo/model --hub_model_id your-name/segmenter-scenes

Look first, without pushing anything:

    python scripts/publish.py --checkpoint_dir outputs/demo/model --hub_model_id your-name/segmenter-scenes \
        --output_dir outputs/segmenter-scenes --dry_run

`--evaluate DATASET` measures the mIoU for the card; `--results` takes it from recorded runs of scripts/evaluate.py.
"""

from dataclasses import dataclass, field, replace

from transformers import HfArgumentParser

from ..hub.model_card import read_card_facts, save_card_facts
from ..hub.publishing import (
    PublishingError,
    build_repository,
    check_push,
    measure,
    publish_model,
    read_recorded_result,
)
from ..utils.atomic_files import read_json_object
from ..utils.commands import command, parse_arguments
from .prediction_arguments import EvaluationDataArguments


@dataclass
class Arguments:
    checkpoint_dir: str = field(metadata={"help": "Directory of a trained or converted model."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Where it goes on the Hub, as owner/name."})
    private: bool = field(default=False, metadata={"help": "Make a new repository private."})
    revision: str | None = field(default=None, metadata={"help": "Branch to push to; made where there is none."})
    commit_message: str = field(default="Publish the model", metadata={"help": "First line of the commit."})
    dry_run: bool = field(default=False, metadata={"help": "Only write what would be pushed into output_dir."})
    output_dir: str | None = field(default=None, metadata={"help": "Directory to write with --dry_run."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the model that output_dir holds."})
    published_model: str | None = field(
        default=None, metadata={"help": "Model of published_models.json whose converted weights these are."}
    )
    license: str | None = field(default=None, metadata={"help": "Licence of the weights, such as apache-2.0."})
    results: list[str] | None = field(
        default=None, metadata={"help": "Files results.json of scripts/evaluate.py to put into the card."}
    )
    speed: str | None = field(
        default=None, metadata={"help": "JSON file with what a recorded run measured, name by name, for the card."}
    )
    evaluate: str | None = field(
        default=None, metadata={"help": "Hub name, folder or scenes: measure the mIoU on it."}
    )


@dataclass
class EvaluationArguments(EvaluationDataArguments):
    label_set: str | None = field(
        default=None, metadata={"help": "Name or JSON file; says how stored labels map to the model's classes."}
    )
    multi_scale_flip: bool = field(default=False, metadata={"help": "Measure multi-scale + flip too."})
    window_batch_size: int = field(default=8, metadata={"help": "Windows at once through the network."})
    device: str | None = field(default=None, metadata={"help": "Device of the model; a GPU where there is one."})


@command(PublishingError)
def main() -> None:
    args, evaluation_args = parse_arguments(HfArgumentParser((Arguments, EvaluationArguments)))
    if args.dry_run and args.output_dir is None:
        raise ValueError("--dry_run needs --output_dir, the directory to write.")
    if not args.dry_run and args.hub_model_id is None:
        raise ValueError("Give --hub_model_id owner/name, or --dry_run with --output_dir.")
    if not args.dry_run:
        check_push(args.hub_model_id)
    facts = read_card_facts(args.checkpoint_dir)
    facts = replace(
        facts,
        published_model=args.published_model or facts.published_model,
        license=args.license or facts.license,
        speed=read_json_object(args.speed) if args.speed else facts.speed,
    )
    facts = facts.with_results([read_recorded_result(path) for path in args.results or []])
    if args.evaluate is not None:
        facts = facts.with_results(measure(args.checkpoint_dir, args.evaluate, **vars(evaluation_args)))
        save_card_facts(args.checkpoint_dir, facts)
        print(f"Recorded in {args.checkpoint_dir}: from now on the card has these numbers without --evaluate.")
    if args.dry_run:
        directory = build_repository(
            args.checkpoint_dir,
            args.output_dir,
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
        args.hub_model_id,
        facts=facts,
        private=args.private or None,
        revision=args.revision,
        commit_message=args.commit_message,
    )
    print(f"Published {args.hub_model_id}: {commit.commit_url}")
    at = f', revision="{args.revision}"' if args.revision else ""
    print(f'Next: pipeline("image-segmentation", "{args.hub_model_id}"{at}, trust_remote_code=True)')
