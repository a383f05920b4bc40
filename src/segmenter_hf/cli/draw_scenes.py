"""Draw embedded street scenes as a folder of images and masks, which is also an example of a dataset folder.

python scripts/draw_scenes.py --num_images 6 --output_dir outputs/pictures
"""

from dataclasses import dataclass, field

from transformers import HfArgumentParser

from ..data.synthetic_scenes import save_scenes
from ..utils.commands import command, parse_arguments


@dataclass
class Arguments:
    output_dir: str = field(metadata={"help": "Folder for `images/` and `masks/`."})
    num_images: int = field(default=6, metadata={"help": "Number of scenes."})
    height: int = field(default=192, metadata={"help": "Height in pixels."})
    width: int = field(default=256, metadata={"help": "Width in pixels."})
    seed: int = field(default=0, metadata={"help": "Seed of the scenes."})


@command()
def main() -> None:
    (args,) = parse_arguments(HfArgumentParser(Arguments))
    save_scenes(args.output_dir, args.num_images, (args.height, args.width), args.seed)
    print(f"Wrote {args.num_images} scenes to {args.output_dir}/images and their masks to {args.output_dir}/masks.")
