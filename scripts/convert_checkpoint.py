"""Convert a published checkpoint into a directory that `from_pretrained` reads.

    python scripts/convert_checkpoint.py --checkpoint_path seg_tiny_mask/checkpoint.pth --output_dir segmenter-tiny-mask

Checkpoints of rstrudel/segmenter (with variant.yml beside them), mmsegmentation, its DeiT reproduction and PaddleViT
become models; AugReg, timm, DeiT and Hugging Face ViTs become encoders to train from.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its evaluate.py would hide the library of that name

from transformers import AutoConfig, HfArgumentParser

from segmenter_hf.conversion import SOURCE_FORMATS, convert_checkpoint


@dataclass
class ConversionArguments:
    """What to convert, and where to."""

    checkpoint_path: str = field(metadata={"help": "File of the weights, or a directory that holds one."})
    output_dir: str = field(metadata={"help": "Directory to write."})
    config_path: str | None = field(
        default=None,
        metadata={"help": "Configuration of the weights; variant.yml beside them for rstrudel/segmenter."},
    )
    source_format: str = field(
        default="auto", metadata={"help": f"Format of the checkpoint: auto, {', '.join(SOURCE_FORMATS)}."}
    )
    label_set: str | None = field(
        default=None, metadata={"help": "Names of the classes, such as ade20k, or a JSON file with them."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace a model that is already in output_dir."})


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert what the command line says, and print what was written and what to do with it."""
    (args,) = HfArgumentParser(ConversionArguments).parse_args_into_dataclasses(arguments)
    try:
        output_dir = convert_checkpoint(**vars(args))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    config = AutoConfig.from_pretrained(output_dir)
    (architecture,) = config.architectures
    print(f"Wrote {output_dir}: {', '.join(sorted(path.name for path in output_dir.iterdir()))}")
    print(f"{architecture} from {config.provenance['source']}, sha256 {config.provenance['sha256']}")
    if architecture.endswith("ForSemanticSegmentation"):
        print(f"{config.num_labels} classes: {', '.join(list(config.id2label.values())[:5])}, ...")
        call = f"pipeline('image-segmentation', '{output_dir}')('image.jpg')"
        print(f'Next: python -c "import segmenter_hf; from transformers import pipeline; print({call})"')
    else:
        print(
            f"Next: train from it, with AutoModelForSemanticSegmentation.from_pretrained('{output_dir}', num_labels=...)"
        )


if __name__ == "__main__":
    main()
