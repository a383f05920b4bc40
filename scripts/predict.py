"""Segment pictures: a label map and an overlay with a legend for each.

python scripts/predict.py --model_name_or_path outputs/scenes --images street.jpg photos/ --output_dir outputs/predictions
"""

import sys
from dataclasses import dataclass, field


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its evaluate.py would hide the library of that name

from transformers import HfArgumentParser

from segmenter_hf.prediction import load_model, predict_files


@dataclass
class Arguments:
    model_name_or_path: str = field(metadata={"help": "Directory or Hub name of the model."})
    images: list[str] = field(metadata={"help": "Pictures, and folders of pictures."})
    output_dir: str = field(metadata={"help": "Directory for the label maps and overlays."})
    label_set: str | None = field(
        default=None, metadata={"help": "Name or JSON file of a label set, for its colours."}
    )
    multi_scale_flip: bool = field(default=False, metadata={"help": "Average over six scales, each also mirrored."})
    window_batch_size: int = field(default=8, metadata={"help": "Windows at once through the network."})
    device: str | None = field(default=None, metadata={"help": "Device of the model; a GPU where there is one."})


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    model, processor, label_set = load_model(args.model_name_or_path, args.label_set, args.device)
    written = predict_files(
        model,
        processor,
        args.images,
        args.output_dir,
        label_set,
        multi_scale_flip=args.multi_scale_flip,
        window_batch_size=args.window_batch_size,
    )
    print(f"Wrote a label map and an overlay of {len(written)} pictures to {args.output_dir}.")


if __name__ == "__main__":
    main()
