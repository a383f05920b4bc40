"""Fine-tune a Segmenter with Trainer, on the embedded street scenes or on your own images.

    python scripts/train.py --output_dir outputs/scenes --model_size tiny --crop_size 128 --image_size 192

On a folder with `images/train`, `masks/train`, `images/validation` and `masks/validation`:

    python scripts/train.py --dataset_name my_photos --label_set my_labels.json --output_dir outputs/my_model \
        --model_name_or_path org/segmenter-vit-b-mask

`--model_name_or_path` is also any encoder to start from: a checkpoint file of timm, DeiT, AugReg or mmsegmentation, or a
ViT on the Hub, as in `--model_name_or_path timm/vit_base_patch16_384.augreg_in21k_ft_in1k`. It is converted once.

Every argument of `TrainingArguments` works too; `--help` lists them all. A JSON file of arguments works instead:

    python scripts/train.py scripts/configs/demo.json
"""

import sys


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its evaluate.py would hide the library of that name

from transformers import HfArgumentParser

from segmenter_hf.conversion.pretrained import resolve_model
from segmenter_hf.evaluation import as_percent
from segmenter_hf.training import DataArguments, ModelArguments, SegmentationTrainingArguments, train_segmenter


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, SegmentationTrainingArguments))
    from_file = len(sys.argv) == 2 and sys.argv[1].endswith(".json")
    model_args, data_args, training_args = (
        parser.parse_json_file(sys.argv[1]) if from_file else parser.parse_args_into_dataclasses()
    )
    if model_args.model_name_or_path is not None:
        try:
            model_args.model_name_or_path = resolve_model(model_args.model_name_or_path, model_args.model_type)
        except (OSError, ValueError) as error:
            raise SystemExit(f"error: {error}") from error
    results = train_segmenter(model_args, data_args, training_args)
    print(f"Mean IoU {as_percent(results['mean_iou'])} on {results['num_images']} images, single scale.")
    print(f"Model, card and pictures are in {training_args.output_dir}. Next:")
    print(
        f"  python scripts/predict.py --model_name_or_path {training_args.output_dir} --images PICTURE --output_dir OUT"
    )


if __name__ == "__main__":
    main()
