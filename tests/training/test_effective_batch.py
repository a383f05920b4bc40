"""One effective batch means one thing, however it is divided; and what an interrupted evaluation leaves."""

from pathlib import Path

import pytest
import torch
from transformers import get_scheduler

from segmenter_hf import SegmenterConfig, SegmenterForSemanticSegmentation, SetrConfig
from segmenter_hf.data.label_sets import load_label_set
from segmenter_hf.data.loading import load_segmentation_datasets
from segmenter_hf.evaluation.evaluate import EvaluationDataset
from segmenter_hf.models.modeling_setr import SetrForSemanticSegmentation
from segmenter_hf.models.segmentation_loss import total_label_weight
from segmenter_hf.training.arguments import SegmentationTrainingArguments
from segmenter_hf.training.model_building import parse_overrides
from segmenter_hf.training.trainer import SegmentationTrainer

from ..tiny_models import tiny_scenes_config, tiny_scenes_processor


class UnequalExamples(torch.utils.data.Dataset):
    """Rows with more and more ignored pixels."""

    def __init__(self, num_labels: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = []
        for ignored in (0, 700, 1100, 1240):
            labels = torch.randint(0, num_labels, (32, 40), generator=generator)
            labels.flatten()[:ignored] = 255
            pixels = torch.randn(3, 32, 40, generator=generator)
            self.rows.append({"pixel_values": pixels, "labels": labels})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


def one_step(output_dir: Path, per_device: int, accumulation: int, **fields) -> tuple[dict[str, torch.Tensor], float]:
    torch.manual_seed(0)
    config = tiny_scenes_config()
    for name, value in {"decoder_hidden_dropout_prob": 0, "decoder_attention_probs_dropout_prob": 0, **fields}.items():
        setattr(config, name, value)
    config.drop_path_rate = 0.0
    model = SegmenterForSemanticSegmentation(config)
    label_set = load_label_set("scenes")
    arguments = SegmentationTrainingArguments(
        str(output_dir),
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
    )
    trainer = SegmentationTrainer(
        model=model, args=arguments, train_dataset=UnequalExamples(label_set.num_labels), label_set=label_set
    )
    trainer.train()
    return dict(model.named_parameters()), trainer.state.log_history[0]["loss"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"semantic_loss_class_weights": [1, 2, 3, 4, 5, 6, 7, 8]},
        {"semantic_loss_normalization": "all_pixels"},
        {"semantic_loss_label_smoothing": 0.1},
    ],
    ids=["plain", "weighted", "all pixels", "smoothed"],
)
@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulated_batches_give_the_step_of_the_whole_batch(fields, accumulation, tmp_path) -> None:
    whole, loss = one_step(tmp_path, 4, 1, **fields)
    accumulated, accumulated_loss = one_step(tmp_path, 4 // accumulation, accumulation, **fields)
    assert accumulated_loss == pytest.approx(loss, abs=1e-5)
    for name, parameter in whole.items():
        torch.testing.assert_close(accumulated[name], parameter, rtol=0, atol=1e-5)


def test_the_loss_is_divided_by_all_pixels_on_request() -> None:
    torch.manual_seed(0)
    config = SetrConfig(
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        image_size=32,
        patch_size=8,
        decoder_type="naive",
        decoder_hidden_size=8,
        num_labels=3,
    )
    model = SetrForSemanticSegmentation(config).eval()
    pixel_values, labels = torch.randn(2, 3, 29, 40), torch.randint(0, 3, (2, 29, 40))
    labels[0, :20] = 255
    valid = model(pixel_values, labels).loss
    config.semantic_loss_normalization = "all_pixels"
    share = (labels != 255).double().mean().item()
    assert model(pixel_values, labels).loss.item() == pytest.approx(valid.item() * share, abs=1e-6)
    with pytest.raises(ValueError, match="semantic_loss_normalization"):
        SetrConfig(semantic_loss_normalization="half")


def test_the_weight_of_labels_is_that_of_a_naive_sum() -> None:
    labels = torch.tensor([[[0, 1, 255], [2, 1, 9]]])
    assert total_label_weight(labels, 255).item() == 5
    assert total_label_weight(labels[..., :2], 255, torch.tensor([0.5, 2.0, 3.0])).item() == 0.5 + 2 + 3 + 2


@pytest.fixture
def trainer(tmp_path) -> SegmentationTrainer:
    torch.manual_seed(0)
    label_set = load_label_set("scenes")
    (dataset,) = load_segmentation_datasets(splits=["validation"], scenes_validation=3, scenes_size=(40, 56)).values()
    return SegmentationTrainer(
        model=SegmenterForSemanticSegmentation(tiny_scenes_config()),
        args=SegmentationTrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True),
        train_dataset=EvaluationDataset(dataset, label_set),
        eval_dataset=EvaluationDataset(dataset, label_set),
        processing_class=tiny_scenes_processor(),
        label_set=label_set,
    )


def test_an_interrupted_evaluation_leaves_no_counts(trainer, monkeypatch) -> None:
    expected = trainer.evaluate()
    prediction_step, seen = SegmentationTrainer.prediction_step, []

    def interrupted(self, *args, **kwargs):
        seen.append(None)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return prediction_step(self, *args, **kwargs)

    monkeypatch.setattr(SegmentationTrainer, "prediction_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate()
    again = trainer.evaluate()
    for name in ("eval_mean_iou", "eval_mean_accuracy", "eval_overall_accuracy"):
        assert again[name] == expected[name]


def test_predict_scores_a_test_set(trainer) -> None:
    expected, metrics = trainer.evaluate(), trainer.predict(trainer.eval_dataset).metrics
    assert metrics["test_mean_iou"] == expected["eval_mean_iou"]
    assert trainer.data_collator is not None and "images" not in trainer.data_collator([{"a": 1}])


def test_a_rate_that_is_stored_as_0_is_overridden_by_a_fraction() -> None:
    config = SegmenterConfig(hidden_dropout_prob=0, drop_path_rate=0)
    assert parse_overrides("hidden_dropout_prob=0.1,drop_path_rate=0.25", config) == {
        "hidden_dropout_prob": 0.1,
        "drop_path_rate": 0.25,
    }
    with pytest.raises(ValueError, match="`num_channels` .* must be a int, got '0.5'"):
        parse_overrides("num_channels=0.5", config)


def test_a_schedule_without_its_end_is_named(trainer) -> None:
    trainer.args.head_learning_rate_factor, trainer.args.lr_scheduler_kwargs = 10.0, {"power": 1}
    with pytest.raises(ValueError, match=r"must have `power` and `lr_end`.*\['lr_end'\]"):
        trainer.create_optimizer_and_scheduler(num_training_steps=4)


@pytest.mark.parametrize("num_steps", [4, 12])
def test_training_may_end_with_its_warm_up(trainer, num_steps) -> None:
    trainer.args.warmup_steps = 4
    trainer.create_optimizer_and_scheduler(num_training_steps=num_steps)
    rates = []
    for _ in range(num_steps + 1):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    top = trainer.args.learning_rate
    assert rates[:5] == pytest.approx([0, top / 4, top / 2, top * 3 / 4, top])
    if num_steps > 4:
        named = {"power": 0.9, "lr_end": 1e-6}
        peer = get_scheduler(
            "polynomial", trainer.optimizer, 4, num_steps, scheduler_specific_kwargs=named
        ).lr_lambdas[0]
        assert rates == pytest.approx([top * peer(step) for step in range(num_steps + 1)], rel=1e-12)
