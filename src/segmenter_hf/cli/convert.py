"""Convert a published checkpoint into a directory that `from_pretrained` reads.

    segmenter-hf convert --model seg-t-mask-16-ade20k --output_dir outputs/seg-t-mask-16-ade20k
    segmenter-hf convert --checkpoint_path seg_tiny_mask/checkpoint.pth --output_dir outputs/segmenter-t
    segmenter-hf models

`--model` downloads one of the published models that `segmenter-hf models` lists. Files of rstrudel/segmenter (with variant.yml beside
them), mmsegmentation, its DeiT reproduction, PaddleViT, SETR's authors and DINOv2's heads become models; AugReg, timm, DeiT and Hugging
Face ViTs become encoders to train from.
"""

import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoConfig

from ..conversion.convert import SOURCE_FORMATS, check_output, convert_checkpoint
from ..conversion.download import cache_folder, download_checkpoint, encoder_beside
from ..hub.published_models import PublishedModel, get_published_model
from ..utils.messages import one_line
from .errors import cli_main
from .models import list_published_models
from .parsing import build_parser, parse_arguments


@dataclass
class ConversionArguments:
    """What to convert, and where to."""

    _argument_group_name = "conversion"

    model: str | None = field(
        default=None, metadata={"help": "Published model to download, by its name in `segmenter-hf models`."}
    )
    checkpoint_path: str | None = field(
        default=None, metadata={"help": "File of the weights, or a directory that holds one."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Directory to write."})
    list: bool = field(default=False, metadata={"help": "Print the published models and end."})
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder of downloads; segmenter_hf/checkpoints in HF_HOME by default."}
    )
    config_path: str | None = field(
        default=None,
        metadata={"help": "Configuration of the weights; variant.yml beside them for rstrudel/segmenter."},
    )
    encoder_path: str | None = field(
        default=None, metadata={"help": "Encoder of a checkpoint that is a head alone, as DINOv2's heads are."}
    )
    source_format: str = field(
        default="auto", metadata={"help": f"Format of the checkpoint: auto, {', '.join(SOURCE_FORMATS)}."}
    )
    label_set: str | None = field(
        default=None,
        metadata={
            "help": "Names of the classes, such as ade20k, or a file with them (JSON, text, CSV); those of the dataset for --model."
        },
    )
    model_type: str | None = field(
        default=None, metadata={"help": "What an encoder is for: segmenter (the default) or setr."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side in pixels to which the position embeddings are resized."}
    )
    num_channels: int | None = field(
        default=None, metadata={"help": "Channels of the images, to which the patch embedding is adapted."}
    )
    verify: bool = field(default=False, metadata={"help": "Load the result and compare it with the source."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a model that is already in output_dir."})


def convert(args: ConversionArguments) -> tuple[Path, PublishedModel | None]:
    """Convert the file or the published model that the arguments name, and say which model that is.

    Raises:
        ValueError: If the arguments do not go together, or as [`download_checkpoint`] and [`convert_checkpoint`].
        OSError: As [`download_checkpoint`] and [`convert_checkpoint`].
    """
    if (args.model is None) == (args.checkpoint_path is None):
        got = "neither" if args.model is None else "both"
        raise ValueError(
            f"Give --model NAME (`segmenter-hf models` lists the names) or --checkpoint_path FILE, not {got}."
        )
    if "://" in (args.checkpoint_path or ""):
        raise ValueError(f"{args.checkpoint_path} is an address: download it, and give the path of the file.")
    if args.output_dir is None:
        raise ValueError("Give --output_dir DIR, the directory to write.")
    published: PublishedModel | None = None
    checkpoint_path: str | Path | None = args.checkpoint_path
    encoder_path: str | Path | None = args.encoder_path
    label_set = args.label_set
    if args.model is not None:
        try:
            published = get_published_model(args.model)
        except ValueError as error:
            raise ValueError(f"{error} `segmenter-hf models` lists all of them.") from error
        label_set = label_set or published.dataset
        # before a long download
        check_output(Path(args.output_dir), args.overwrite, cache_folder(published, args.cache_dir))
        downloaded = download(published, args)
        checkpoint_path, encoder_path = downloaded, encoder_path or encoder_beside(published, downloaded)
    output_dir = convert_checkpoint(
        str(checkpoint_path),
        args.output_dir,
        config_path=args.config_path,
        encoder_path=encoder_path,
        source_format=args.source_format,
        label_set=label_set,
        image_size=args.image_size,
        num_channels=args.num_channels,
        model_type=args.model_type,
        source_url=(published.checkpoint_url or published.share_url) if published else None,
        verify=args.verify,
        overwrite=args.overwrite,
    )
    return output_dir, published


def download(published: PublishedModel, args: ConversionArguments) -> Path:
    """[`download_checkpoint`], whose errors end with the command to run when what they ask for is done."""
    try:
        return download_checkpoint(published, args.cache_dir)
    except (ConnectionError, FileNotFoundError) as error:
        given = {"--model": args.model, "--output_dir": args.output_dir, "--cache_dir": args.cache_dir}
        options = [word for name, value in given.items() if value is not None for word in (name, value)]
        raise type(error)(f"{error} The command:\n  {shlex.join(['segmenter-hf', 'convert', *options])}") from error


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    """Convert what the command line says, and print what was written and what to do with it."""
    (args,) = parse_arguments(build_parser("convert", __doc__, [ConversionArguments]), argv)
    if args.list:
        print(list_published_models())
        return
    if args.verify:  # it logs what was compared
        logging.basicConfig(format="%(message)s")
        logging.getLogger("segmenter_hf.conversion.convert").setLevel(logging.INFO)
    output_dir, published = convert(args)
    config = AutoConfig.from_pretrained(output_dir)
    (architecture,) = config.architectures
    print(f"Wrote {output_dir}: {', '.join(sorted(path.name for path in output_dir.iterdir()))}")
    print(f"{architecture} from {config.provenance['source']}, sha256 {config.provenance['sha256']}")
    if published is not None:
        scores = ", ".join(f"{score:.2f} % {protocol}" for protocol, score in published.scores.items()) or "none"
        print(f"mIoU published, not measured: {scores} ({published.reported_in})")
    if architecture.endswith("ForSemanticSegmentation"):
        print(f"{config.num_labels} classes: {', '.join(map(one_line, list(config.id2label.values())[:5]))}, ...")
        call = f"pipeline('image-segmentation', '{output_dir}')('image.jpg')"
        print(f'Next: python -c "import segmenter_hf; from transformers import pipeline; print({call})"')
    else:
        print(
            f"Next: train from it, with AutoModelForSemanticSegmentation.from_pretrained('{output_dir}', num_labels=...)"
        )
