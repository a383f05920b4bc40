"""Fine-tuning from arguments to a finished directory, on a few small scenes."""

import dataclasses
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModelForSemanticSegmentation, HfArgumentParser

from segmenter_hf import SegmenterConfig, SetrConfig
from segmenter_hf.data.augmentation import SegmentationAugmentation
from segmenter_hf.data.label_sets import label_set_from_names, load_label_set
from segmenter_hf.data.loading import load_segmentation_datasets
from segmenter_hf.data.synthetic_scenes import save_scenes
from segmenter_hf.evaluation.evaluate import EvaluationDataset, evaluate_segmentation
from segmenter_hf.inference.predictor import Predictor
from segmenter_hf.models.image_processing_segmenter import SegmenterImageProcessor
from segmenter_hf.training.run import (
    DataArguments,
    ModelArguments,
    SegmentationTrainer,
    SegmentationTrainingArguments,
    TrainDataset,
    build_model_and_processor,
    override_config,
    parse_overrides,
    train_segmenter,
)


TINY = (
    "patch_size=8,hidden_size=32,num_attention_heads=2,intermediate_size=64,num_hidden_layers=2,"
    "decoder_num_hidden_layers=1,drop_path_rate=0.1"
)
SMALL_SCENES = {"scenes_train": 6, "scenes_validation": 3, "image_size": 64, "crop_size": 48, "window_stride": 32}


def run(output_dir: Path, **kwargs):
    arguments = {
        "output_dir": str(output_dir),
        "config_overrides": TINY,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "disable_tqdm": True,
        **SMALL_SCENES,
        **kwargs,
    }
    parser = HfArgumentParser((ModelArguments, DataArguments, SegmentationTrainingArguments))
    return train_segmenter(*parser.parse_dict(arguments))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("trained") / "tiny-scenes"
    run(output_dir)
    return output_dir


def test_a_run_ends_with_everything_needed_to_use_and_share_the_model(trained) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "label_set.json"} <= names
    assert {"README.md", "results.json", "per_class.md", "predictions.png"} <= names
    results = json.loads((trained / "results.json").read_text())
    assert results["num_images"] == SMALL_SCENES["scenes_validation"]
    assert results["protocol"]["name"] == "single scale"
    assert len(results["per_category_iou"]) == len(results["labels"]) == 8
    card = (trained / "README.md").read_text()
    assert f"{100 * results['mean_iou']:.2f}" in card
    assert "model-index" in card
    assert "pipeline_tag: image-segmentation" in card
    for row in ("betas of Adam | 0.9, 0.999", "greatest share of a class in a crop | 0.75", "label set | scenes"):
        assert f"| {row} |" in card


def test_the_saved_model_gives_the_recorded_results(trained) -> None:
    model = AutoModelForSemanticSegmentation.from_pretrained(trained)
    processor = AutoImageProcessor.from_pretrained(trained)
    assert (processor.window_size, processor.window_stride, processor.patch_size) == (48, 32, 8)
    label_set = load_label_set("scenes")
    assert model.config.id2label == label_set.id2label
    (dataset,) = load_segmentation_datasets(splits=["validation"], scenes_validation=3).values()
    results = evaluate_segmentation(Predictor(model, processor, label_set), dataset, show_progress=False)
    assert results["mean_iou"] == json.loads((trained / "results.json").read_text())["mean_iou"]


def test_training_makes_a_model_better(tmp_path) -> None:
    once = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    first, last = (run(tmp_path / str(steps), max_steps=steps, **once)["mean_iou"] for steps in (1, 60))
    assert last > first + 0.05


def test_the_poly_schedule_is_the_default(tmp_path) -> None:
    arguments = SegmentationTrainingArguments(str(tmp_path), use_cpu=True)
    assert arguments.lr_scheduler_type == "polynomial"
    assert arguments.lr_scheduler_kwargs == {"power": 0.9, "lr_end": 1e-6}


def examples(photometric_distortion: bool = True) -> TrainDataset:
    (dataset,) = load_segmentation_datasets(splits=["train"], scenes_size=(48, 64), scenes_train=3).values()
    augmentation = SegmentationAugmentation(
        crop_size=32, size=48, max_ratio=4, photometric_distortion=photometric_distortion
    )
    return TrainDataset(dataset, load_label_set("scenes"), augmentation, SegmenterImageProcessor(), seed=3)


def test_draws_depend_on_seed_epoch_and_row_alone() -> None:
    first, second = examples(), examples()
    np.random.default_rng().random()
    for index in (2, 0):
        assert torch.equal(first[index]["pixel_values"], second[index]["pixel_values"])
        assert torch.equal(first[index]["labels"], second[index]["labels"])
    second.set_epoch(1)
    assert not torch.equal(first[0]["pixel_values"], second[0]["pixel_values"])


def test_labels_are_reduced_once() -> None:
    mask = np.zeros((48, 64), dtype=np.uint8)
    mask[:, 20:], mask[:, 40:] = 1, 3
    dataset = datasets.Dataset.from_dict(
        {"image": [Image.new("RGB", (64, 48))], "annotation": [Image.fromarray(mask)]},
        features=datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()}),
    )
    label_set = dataclasses.replace(label_set_from_names(["a", "b", "c"]), reduce_labels=True)
    augmentation = SegmentationAugmentation(
        crop_size=64, size=48, max_ratio=4, ratio_range=(1, 1), flip_probability=0, photometric_distortion=False
    )
    processor = SegmenterImageProcessor(do_reduce_labels=True)
    labels = TrainDataset(dataset, label_set, augmentation, processor, seed=0)[0]["labels"]
    assert labels[0, [0, 19, 20, 39, 40, 63]].tolist() == [255, 255, 0, 0, 2, 2]


def test_crops_are_normalised_and_of_one_size() -> None:
    row = examples()[0]
    assert row["pixel_values"].shape == (3, 32, 32)
    assert row["labels"].shape == (32, 32)
    assert row["labels"].dtype == torch.int64
    assert row["pixel_values"].min() >= -1
    assert row["pixel_values"].max() <= 1


@pytest.mark.parametrize("batch_size", [1, 2])
def test_evaluation_inside_trainer_equals_evaluation_outside(trained, tmp_path, batch_size) -> None:
    model = AutoModelForSemanticSegmentation.from_pretrained(trained)
    processor = AutoImageProcessor.from_pretrained(trained)
    label_set = load_label_set("scenes")
    (dataset,) = load_segmentation_datasets(splits=["validation"], scenes_validation=3).values()
    trainer = SegmentationTrainer(
        model=model,
        args=SegmentationTrainingArguments(
            str(tmp_path), use_cpu=True, per_device_eval_batch_size=batch_size, disable_tqdm=True
        ),
        eval_dataset=EvaluationDataset(dataset, label_set),
        train_dataset=EvaluationDataset(dataset, label_set),
        processing_class=processor,
        label_set=label_set,
    )
    inside = trainer.evaluate()
    outside = evaluate_segmentation(Predictor(model, processor, label_set), dataset, show_progress=False)
    for name in ("mean_iou", "mean_accuracy", "overall_accuracy"):
        assert inside[f"eval_{name}"] == outside[name]


def test_a_resumed_run_ends_with_the_weights_of_an_undisturbed_one(tmp_path) -> None:
    arguments = {
        "num_train_epochs": 2,
        "eval_strategy": "no",
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": None,
        "load_best_model_at_end": False,
    }
    run(tmp_path / "whole", **arguments)
    run(tmp_path / "resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"), **arguments)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_model_with_other_classes_gets_a_new_head_and_keeps_its_encoder(trained, tmp_path) -> None:
    save_scenes(tmp_path / "photos", 3, (48, 64))
    names = tmp_path / "labels.json"
    names.write_text(json.dumps([f"thing {index}" for index in range(9)]))
    run(
        tmp_path / "model",
        model_name_or_path=str(trained),
        dataset_name=str(tmp_path / "photos"),
        label_set=str(names),
        validation_fraction=0.34,
        learning_rate=2e-6,
        max_steps=1,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
    )
    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "model")
    assert model.config.id2label[8] == "thing 8"
    before, after = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path / "model"))
    key = "segmenter.layers.0.mlp.fc1.weight"
    assert torch.allclose(before[key], after[key], atol=1e-4)


def test_impossible_masks_stop_before_training(tmp_path) -> None:
    save_scenes(tmp_path / "photos", 2, (48, 64))
    names = tmp_path / "labels.json"
    names.write_text('["one", "two"]')
    with pytest.raises(ValueError, match=r"there are more classes, 8 or more: give a `label_set` of as many"):
        run(tmp_path / "model", dataset_name=str(tmp_path / "photos"), label_set=str(names), validation_fraction=0.5)
    assert not (tmp_path / "model" / "config.json").exists()


def test_overrides_have_the_types_of_the_configuration() -> None:
    text = "patch_size=8, qkv_bias=false,drop_path_rate=0.2,decoder_type=pup,out_indices=2/5/8/11"
    assert parse_overrides(text, SetrConfig()) == {
        "patch_size": 8,
        "qkv_bias": False,
        "drop_path_rate": 0.2,
        "decoder_type": "pup",
        "out_indices": [2, 5, 8, 11],
    }
    for wrong in ("patch=8", "patch_size", "patch_size=big", "qkv_bias=maybe"):
        with pytest.raises(ValueError, match="config_overrides"):
            parse_overrides(wrong, SegmenterConfig())


@pytest.mark.parametrize("decoder_type", ["naive", "pup", "mla"])
def test_setr_trains_on_scenes_and_improves(decoder_type, tmp_path) -> None:
    overrides = TINY.replace("decoder_num_hidden_layers=1", f"decoder_type={decoder_type},decoder_hidden_size=16")
    once = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    arguments = {"model_type": "setr", "config_overrides": overrides, **once}
    first, last = (run(tmp_path / str(steps), max_steps=steps, **arguments)["mean_iou"] for steps in (1, 60))
    assert last > first + 0.05
    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "60")
    assert type(model).__name__ == "SetrForSemanticSegmentation"


def test_another_decoder_brings_its_own_fields(tmp_path) -> None:
    run(tmp_path / "mask", max_steps=1, save_strategy="no", eval_strategy="no", load_best_model_at_end=False)
    config = AutoConfig.from_pretrained(tmp_path / "mask")
    assert override_config(config, {"decoder_type": "linear"}).decoder_type == "linear"
    mla = override_config(SetrConfig(decoder_type="pup"), {"decoder_type": "mla", "drop_path_rate": 0.1})
    assert (mla.out_indices, mla.use_class_token, mla.drop_path_rate) == ([5, 11, 17, 23], False, 0.1)
    assert override_config(SetrConfig(out_indices=[1, 23]), {"drop_path_rate": 0.1}).out_indices == [1, 23]


@pytest.mark.parametrize("damage", ["NaN", "missing"])
def test_training_does_not_start_from_a_damaged_encoder(trained, tmp_path, damage) -> None:
    shutil.copytree(trained, tmp_path / "model", ignore=shutil.ignore_patterns("checkpoint-*"))
    weights = load_file(tmp_path / "model" / "model.safetensors")
    name = next(name for name in weights if name.startswith("segmenter.layers.0."))
    weights[name] = weights[name] * float("nan")
    if damage == "missing":
        del weights[name]
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    arguments = ModelArguments(model_name_or_path=str(tmp_path / "model"))
    with pytest.raises(ValueError, match=f"{damage}.*{name}"):
        build_model_and_processor(arguments, DataArguments(), load_label_set("scenes"))
