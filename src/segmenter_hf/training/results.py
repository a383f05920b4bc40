"""What a finished run leaves: model, processor, results, card and images, moved into the output directory."""

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..data.label_sets import LABEL_SET_FILE
from ..data.loading import limited_split
from ..evaluation.evaluate import save_results
from ..hub.model_card import CardFacts, hub_name, recorded_result, write_model_card
from ..hub.publishing import PREDICTIONS_IMAGE
from ..utils.atomic_files import move_files
from .arguments import DataArguments
from .callbacks import save_predictions
from .datasets import StreamedTrainDataset
from .trainer import SegmentationTrainer


FINISHED = ".finished-partial"  # where the results of a run are put together


def save_trained_model(
    trainer: SegmentationTrainer,
    unwrapped_model: PreTrainedModel,
    results: dict[str, Any],
    recipe: dict[str, Any],
    data_args: DataArguments,
) -> None:
    """Put the model, its processor, results, card and images together, and move them into the output directory."""
    output_dir = Path(trainer.args.output_dir)
    folder = output_dir / FINISHED
    if trainer.args.should_save:
        shutil.rmtree(folder, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(folder), _internal_call=True)  # pushed below, once everything is there
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        trainer.label_set.save(folder / LABEL_SET_FILE)
        split = limited_split(data_args.validation_split, data_args.max_eval_samples)
        result = recorded_result(results, str(data_args.dataset_name), split, trainer.label_set.name)
        save_results(folder, result, trainer.label_set.labels)
        save_predictions(trainer, unwrapped_model, folder / PREDICTIONS_IMAGE)
        facts = CardFacts(
            results=(result,),
            training=training_facts(trainer, recipe),
            datasets=tuple(filter(None, [hub_name(data_args.dataset_name)])),
            base_model=hub_name(unwrapped_model.config.name_or_path),
            picture=PREDICTIONS_IMAGE,
        )
        write_model_card(folder, model=unwrapped_model, facts=facts, location=str(output_dir))
        move_files(folder, output_dir)
        shutil.rmtree(folder)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def training_facts(trainer: SegmentationTrainer, recipe: dict[str, Any]) -> dict[str, Any]:
    """What the card says of the training, name by name."""
    arguments, batch = recipe["arguments"], recipe["batch"]
    streamed = isinstance(trainer.train_dataset, StreamedTrainDataset)
    facts = {
        "recipe": recipe["recipe"],
        "dataset": Path(arguments["dataset_name"]).name,
        "label set": trainer.label_set.name,
        "extra dataset": None
        if arguments["extra_dataset_name"] is None
        else f"{Path(arguments['extra_dataset_name']).name}, weight {arguments['extra_weight']}",
        "images": "a stream" if streamed else len(trainer.train_dataset),
        "epochs": None if streamed else round(trainer.state.epoch, 2),
        "steps": trainer.state.global_step,
        "batch": f"{trainer.args.effective_batch_size} = {batch['devices']} devices x {batch['per_device']} crops x "
        f"{batch['accumulation']} accumulated",
        "optimizer": " ".join(filter(None, [arguments["optim"], arguments["optim_args"]])),
        "learning rate": arguments["learning_rate"],
        "learning rate of the heads": f"x {arguments['head_learning_rate_factor']}",
        "schedule": arguments["lr_scheduler_type"],
        "warm-up": f"{arguments['warmup_steps']} steps" if arguments["warmup_steps"] else None,
        "weight decay": arguments["weight_decay"],
        "largest norm of the gradient": arguments["max_grad_norm"] or None,
        "drop path": trainer.model.config.drop_path_rate,
        "image size": f"{arguments['image_size']}, long side up to {arguments['max_ratio']} times",
        "crop": arguments["crop_size"],
        "greatest share of a class in a crop": arguments["cat_max_ratio"],
        "photometric distortion": arguments["photometric_distortion"],
        "random resize": f"{arguments['min_scale']} to {arguments['max_scale']}",
        "class weights": arguments["class_weights"],
        "label smoothing": arguments["label_smoothing"],
        "Dice weight": arguments["dice_weight"],
        "gamma of the focal loss": arguments["focal_gamma"],
        "share of the hardest pixels that count": arguments["ohem_fraction"],
        "flips": f"left to right {arguments['horizontal_flip_probability']}, top to bottom "
        f"{arguments['vertical_flip_probability']}",
        "rotations": "by right angles" if arguments["right_angle_rotations"] else None,
        "precision": "bf16" if arguments["bf16"] else "fp16" if arguments["fp16"] else "fp32",
        "seed": arguments["seed"],
    }
    if "adam" in str(arguments["optim"]):
        facts["betas of Adam"] = f"{arguments['adam_beta1']}, {arguments['adam_beta2']}"
    if arguments["lr_scheduler_type"] == "polynomial":
        shape = {"power": arguments["poly_power"], "lr_end": arguments["min_learning_rate"]}
        shape |= arguments.get("lr_scheduler_kwargs") or {}
        facts["schedule"] = f"polynomial, power {shape['power']}, to {shape['lr_end']}"
    facts |= fine_tuning_facts(arguments)
    return {name: value for name, value in facts.items() if value is not None}


def fine_tuning_facts(arguments: dict[str, Any]) -> dict[str, Any]:
    """What the card says of the tools of fine-tuning; `None` for those that were not used."""
    facts: dict[str, Any] = {
        "layer-wise decay of the learning rate": arguments["layer_decay"] if arguments["layer_decay"] != 1 else None,
        "averaged weights": None if arguments["ema_decay"] is None else f"decay {arguments['ema_decay']}",
    }
    if arguments["freeze_encoder"]:
        until = arguments["unfreeze_at_step"]
        facts["encoder"] = "frozen" if until is None else f"frozen for {until} steps"
    if arguments["decoder_warm_start"] == "linear_probe":
        facts["start of the decoder"] = f"a linear probe of {arguments['warm_start_crops']} crops"
    if arguments["lora_rank"] is not None:
        alpha = 2 * arguments["lora_rank"] if arguments["lora_alpha"] is None else arguments["lora_alpha"]
        targets = ", ".join(name.strip() for name in arguments["lora_targets"].split(","))
        facts["low-rank updates"] = f"rank {arguments['lora_rank']}, alpha {alpha}, of {targets}, merged"
    return facts
