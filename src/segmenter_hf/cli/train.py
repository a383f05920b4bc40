"""Fine-tune a Segmenter with Trainer, on the embedded street scenes or on your own images.

    python scripts/train.py --output_dir outputs/scenes --model_size tiny --crop_size 128 --image_size 192

On a folder with `images/train`, `masks/train`, `images/validation` and `masks/validation`:

    python scripts/train.py --dataset_name my_photos --label_set my_labels.json --output_dir outputs/my_model \
        --model_name_or_path org/segmenter-vit-b-mask

`--model_name_or_path` is also any encoder to start from: a checkpoint file of timm, DeiT, AugReg or mmsegmentation, or a
ViT on the Hub, as in `--model_name_or_path timm/vit_base_patch16_384.augreg_in21k_ft_in1k`. It is converted once.

The recipes of the papers, and two small ones, set all arguments; any of them can be replaced. `--list_recipes` names them:

    python scripts/train.py --recipe segmenter_ade20k --model_name_or_path timm/vit_base_patch16_384.augreg_in21k_ft_in1k \
        --output_dir outputs/segmenter-b-ade20k --per_device_train_batch_size 2

A JSON file of arguments may come first, such as the `recipe.json` of an earlier run:

    python scripts/train.py outputs/scenes/recipe.json --output_dir outputs/scenes_again --seed 1

A run that was interrupted goes on from its last checkpoint with the same command. `accelerate launch` in front of it, with one
of `scripts/configs/*.yaml`, trains on several GPUs or machines. Every argument of `TrainingArguments` works too.
"""

import sys

from ..conversion.pretrained import resolve_model
from ..evaluation.evaluate import as_percent
from ..training.recipes import parse_training_arguments
from ..training.run import train_segmenter
from ..utils.commands import command


@command(FloatingPointError)
def main() -> None:
    model_args, data_args, training_args = parse_training_arguments(sys.argv[1:])
    if model_args.model_name_or_path is not None:
        model_args.model_name_or_path = resolve_model(model_args.model_name_or_path, model_args.model_type)
    results = train_segmenter(model_args, data_args, training_args)
    if not training_args.should_save:
        return
    print(f"Mean IoU {as_percent(results['mean_iou'])} on {results['num_images']} images, single scale.")
    print(f"Model, card and pictures are in {training_args.output_dir}. Next:")
    print(
        f"  python scripts/predict.py --model_name_or_path {training_args.output_dir} --images PICTURE --output_dir OUT"
    )
