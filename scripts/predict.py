"""Segment pictures: a label map and an overlay with a legend for each.

python scripts/predict.py --model_name_or_path outputs/scenes --images street.jpg photos/ --output_dir outputs/predictions

`--full_resolution` segments pictures at their own size, which may be very large: windows are streamed.
"""

import sys
from dataclasses import dataclass, field


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its evaluate.py would hide the library of that name

import torch
from transformers import HfArgumentParser

from segmenter_hf.prediction import MAX_IMAGE_PIXELS, load_model, predict_files


@dataclass
class Arguments:
    model_name_or_path: str = field(metadata={"help": "Directory or Hub name of the model."})
    images: list[str] = field(metadata={"help": "Pictures, and folders of pictures."})
    output_dir: str = field(metadata={"help": "Directory for the label maps and overlays."})
    label_set: str | None = field(
        default=None, metadata={"help": "Name or JSON file of a label set, for its colours."}
    )
    multi_scale_flip: bool = field(default=False, metadata={"help": "Average over six scales, each also mirrored."})
    scales: list[float] | None = field(default=None, metadata={"help": "Average over these scales instead."})
    window_batch_size: int = field(default=8, metadata={"help": "Windows at once through the network."})
    full_resolution: bool = field(
        default=False, metadata={"help": "Keep the size of the pictures instead of resizing them for the model."}
    )
    max_image_pixels: int = field(
        default=MAX_IMAGE_PIXELS,
        metadata={"help": "Larger pictures are refused: files may be made to fill the memory."},
    )
    attention: bool = field(
        default=False, metadata={"help": "Write NAME_attention.png too: what the largest classes attend to."}
    )
    device: str | None = field(default=None, metadata={"help": "Device of the model; a GPU where there is one."})
    bf16: bool = field(default=False, metadata={"help": "Weights and arithmetic in bfloat16: approximate, faster."})
    int8: bool = field(default=False, metadata={"help": "Weights in 8 bits: approximate, less memory. Needs torchao."})
    compile: bool = field(default=False, metadata={"help": "Compile the network first; pays for many images."})


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    model, processor, label_set = load_model(
        args.model_name_or_path,
        args.label_set,
        args.device,
        dtype=torch.bfloat16 if args.bf16 else torch.float32,
        int8=args.int8,
        compile=args.compile,
    )
    written = predict_files(
        model,
        processor,
        args.images,
        args.output_dir,
        label_set,
        multi_scale_flip=args.multi_scale_flip,
        scales=args.scales,
        window_batch_size=args.window_batch_size,
        full_resolution=args.full_resolution,
        max_image_pixels=args.max_image_pixels,
        attention=args.attention,
    )
    print(f"Wrote a label map and an overlay of {len(written)} pictures to {args.output_dir}.")


if __name__ == "__main__":
    main()
