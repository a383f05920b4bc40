"""Training with transformers' own Trainer, as its guide and its example script do, and with PEFT."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image
from PIL import Image as PILImage
from torchvision.transforms import v2
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    EvalPrediction,
    SegformerImageProcessor,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from segmenter_hf import SegmenterForSemanticSegmentation, SegmenterImageProcessor, SegmenterModel
from segmenter_hf.cli.train import parse_training_arguments
from segmenter_hf.data.label_sets import load_label_set
from segmenter_hf.evaluation.metrics import MeanIoU
from segmenter_hf.training.model_building import build_model_and_processor

from ..run_training import words
from ..tiny_models import tiny_scenes_config, tiny_scenes_processor


NAMES = {0: "dark", 1: "bright", 2: "other"}


def rows(sizes: list[tuple[int, int]]) -> Dataset:
    """Images whose right half is bright and labelled 1, the left half 0, and a row of ignored pixels."""
    images, labels = [], []
    for height, width in sizes:
        mask = np.zeros((height, width), dtype=np.uint8)
        mask[:, width // 2 :] = 1
        images.append(PILImage.fromarray(np.repeat(mask[..., None] * 200, 3, axis=2)))
        mask[0] = 255
        labels.append(PILImage.fromarray(mask))
    return Dataset.from_dict({"image": images, "label": labels}, features=Features(image=Image(), label=Image()))


@pytest.fixture
def folder(tmp_path) -> Path:
    config = tiny_scenes_config()
    config.id2label, config.label2id = NAMES, {name: index for index, name in NAMES.items()}
    SegmenterForSemanticSegmentation(config).save_pretrained(tmp_path / "model")
    tiny_scenes_processor().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def arguments(folder: Path, **more: object) -> TrainingArguments:
    return TrainingArguments(
        str(folder.parent / "run"),
        max_steps=30,
        learning_rate=0.01,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        **more,
    )


def compute_metrics(evaluation: EvalPrediction) -> dict[str, float]:
    assert isinstance(evaluation.predictions, np.ndarray)  # of several outputs Trainer would make a tuple
    logits = torch.nn.functional.interpolate(
        torch.from_numpy(evaluation.predictions), size=evaluation.label_ids.shape[-2:], mode="bilinear"
    )
    metric = MeanIoU(num_labels=3, ignore_index=255)
    return {
        "mean_iou": metric.compute(predictions=list(logits.argmax(1).numpy()), references=list(evaluation.label_ids))[
            "mean_iou"
        ]
    }


def test_the_processor_in_with_transform(folder) -> None:
    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForSemanticSegmentation.from_pretrained(folder)

    def transform(examples: dict[str, list]) -> dict[str, torch.Tensor]:
        return processor(examples["image"], examples["label"])

    train_set, test_set = (rows([(40, 64), (50, 44), (64, 48)]).with_transform(transform) for _ in range(2))
    trainer = Trainer(
        model=model,
        args=arguments(folder),
        train_dataset=train_set,
        eval_dataset=test_set,
        compute_metrics=compute_metrics,
    )
    trainer.train()
    assert trainer.evaluate()["eval_mean_iou"] > 0.9
    predicted = trainer.predict(test_set)
    assert predicted.predictions.shape == (3, 3, 4, 4) and predicted.label_ids.shape == (3, 32, 32)


def test_an_example_script_that_augments_by_itself(folder) -> None:
    names = {str(index): name for index, name in NAMES.items()}
    config = AutoConfig.from_pretrained(
        folder, id2label={int(k): v for k, v in names.items()}, label2id={v: k for k, v in names.items()}
    )
    model = AutoModelForSemanticSegmentation.from_pretrained(folder, config=config)
    processor = AutoImageProcessor.from_pretrained(folder, do_reduce_labels=False)
    side = processor.size["shortest_edge"]
    resize = v2.Resize((side, side))
    normalize = v2.Normalize(processor.image_mean, processor.image_std)

    def transform(examples: dict[str, list]) -> dict[str, torch.Tensor]:
        images = [normalize(v2.functional.to_image(resize(image)) / 255) for image in examples["image"]]
        labels = [np.array(label.resize((side, side), PILImage.Resampling.NEAREST)) for label in examples["label"]]
        return {"pixel_values": torch.stack(images), "labels": torch.from_numpy(np.stack(labels)).long()}

    data = rows([(40, 64), (64, 48)]).with_transform(transform)
    trainer = Trainer(
        model=model,
        args=arguments(folder),
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=compute_metrics,
        processing_class=processor,
        data_collator=default_data_collator,
    )
    trainer.train()
    trainer.save_model()
    assert trainer.evaluate()["eval_mean_iou"] > 0.8
    saved = AutoModelForSemanticSegmentation.from_pretrained(trainer.args.output_dir)
    assert saved.config.id2label == NAMES
    assert AutoImageProcessor.from_pretrained(trainer.args.output_dir).window_size == 32


def test_labels_mean_training_unless_the_call_says_otherwise() -> None:
    processor = SegmenterImageProcessor(size={"shortest_edge": 64}, window_size=32, window_stride=16, patch_size=8)
    data = rows([(40, 64), (50, 44)])
    images, labels = data["image"][:], data["label"][:]
    inputs = processor(images, labels)
    assert inputs["pixel_values"].shape == (2, 3, 32, 32) and inputs["labels"].shape == (2, 32, 32)
    assert (inputs["labels"][:, 4:, :12] == 0).all() and (inputs["labels"][:, 4:, 20:] == 1).all()
    assert (inputs["pixel_values"][:, :, :, :12] < inputs["pixel_values"][:, :, :, 20:]).all()
    theirs = SegformerImageProcessor(size={"height": 32, "width": 32})(images, labels, return_tensors="pt")
    assert torch.equal(inputs["labels"][:, 4:, :12], theirs["labels"][:, 4:, :12])
    assert len(processor(images)["pixel_values"]) > 2
    for asked in ({"do_split_windows": True}, {"scales": [1.0]}, {"do_flip": False}):
        windows = processor(images, labels, **asked)
        assert len(windows["labels"]) == len(windows["pixel_values"]) > 2
    crops = processor(images[:1] * 2, labels[:1] * 2, do_resize=False)
    assert crops["pixel_values"].shape == (2, 3, 40, 64) and crops["labels"].shape == (2, 40, 64)


def test_a_processor_saved_for_several_scales_trains_on_one() -> None:
    processor = tiny_scenes_processor()
    processor.scales, processor.do_flip = [0.5, 1.0], True
    data = rows([(40, 64)])
    assert processor(data["image"][:], data["label"][:])["pixel_values"].shape == (1, 3, 32, 32)


def test_lora_adapts_the_attention(folder, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForSemanticSegmentation.from_pretrained(folder)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["decode_head"])
    adapted = peft.get_peft_model(model, lora)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert any("q_proj.lora_A" in name for name in trained) and any("decode_head" in name for name in trained)
    assert not any("fc1" in name and "decode_head" not in name for name in trained)
    processor = AutoImageProcessor.from_pretrained(folder)

    def transform(examples: dict[str, list]) -> dict[str, torch.Tensor]:
        return processor(examples["image"], examples["label"])

    data = rows([(40, 64), (64, 48)]).with_transform(transform)
    trainer = Trainer(model=adapted, args=arguments(folder, label_names=["labels"]), train_dataset=data)
    before = trainer.evaluate(data)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(data)["eval_loss"] < before / 2
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        AutoModelForSemanticSegmentation.from_pretrained(folder), tmp_path / "adapter"
    )
    pixel_values = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        found, expected = (m.eval()(pixel_values=pixel_values).logits for m in (again, adapted))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("with_head", [False, True])
def test_fine_tuning_from_an_encoder_says_so_in_one_line(with_head, folder, tmp_path) -> None:
    if not with_head:
        SegmenterModel(tiny_scenes_config()).save_pretrained(tmp_path / "encoder")
        folder = tmp_path / "encoder"
    tiny_scenes_processor().save_pretrained(folder)
    more = ["--model_name_or_path", str(folder), "--config_overrides", ""]
    model_args, data_args, _ = parse_training_arguments(words(str(tmp_path / "run"), *more))
    lines: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.extend(record.getMessage().splitlines())

    kept = Kept(logging.WARNING)
    sources = [logging.getLogger(name) for name in ("transformers", "segmenter_hf")]
    for source in sources:
        source.addHandler(kept)
    try:
        model, _ = build_model_and_processor(model_args, data_args, load_label_set("scenes"))
    finally:
        for source in sources:
            source.removeHandler(kept)
    assert len(lines) == 1, lines
    new = sum(parameter.numel() for parameter in model.decode_head.parameters())
    expected = {False: f"{new} weights of decode_head", True: "weights of decode_head start at random"}
    assert expected[with_head] in lines[0]


def test_an_encoder_without_its_image_processor_needs_the_normalization(tmp_path) -> None:
    SegmenterModel(tiny_scenes_config()).save_pretrained(tmp_path / "encoder")
    more = ["--model_name_or_path", str(tmp_path / "encoder"), "--config_overrides", ""]
    model_args, data_args, _ = parse_training_arguments(words(str(tmp_path / "run"), *more))
    message = r"preprocessor_config.json: no such file, .* or give `normalization` \(half, imagenet, dataset\)"
    with pytest.raises(FileNotFoundError, match=message):
        build_model_and_processor(model_args, data_args, load_label_set("scenes"))
    model_args.normalization = "imagenet"
    model, processor = build_model_and_processor(model_args, data_args, load_label_set("scenes"))
    assert tuple(processor.image_mean) == (0.485, 0.456, 0.406) and processor.patch_size == model.config.patch_size
