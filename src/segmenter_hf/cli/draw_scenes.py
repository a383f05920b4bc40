"""Draw synthetic street scenes as a folder of images and masks, which is also an example of a dataset folder.

    segmenter-hf draw-scenes --num_images 6 --output_dir outputs/scenes

The same seed gives the same scenes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..data.synthetic_scenes import save_scenes
from .errors import cli_main
from .parsing import build_parser, parse_arguments


@dataclass
class Arguments:
    """How many scenes of what size, and where to."""

    _argument_group_name = "scenes"

    output_dir: str = field(metadata={"help": "Folder for `images/` and `masks/`."})
    num_images: int = field(default=6, metadata={"help": "Number of scenes."})
    height: int = field(default=192, metadata={"help": "Height in pixels."})
    width: int = field(default=256, metadata={"help": "Width in pixels."})
    seed: int = field(default=0, metadata={"help": "Seed of the scenes."})


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    """Draw the scenes."""
    (args,) = parse_arguments(build_parser("draw-scenes", __doc__, [Arguments]), argv)
    save_scenes(args.output_dir, args.num_images, (args.height, args.width), args.seed)
    print(f"Wrote {args.num_images} scenes to {args.output_dir}/images and their masks to {args.output_dir}/masks.")
