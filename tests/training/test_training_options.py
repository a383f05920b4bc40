"""Training with one class, from a stream, with weights; and data that cannot be trained on."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig

from segmenter_hf.cli.train import parse_training_arguments
from segmenter_hf.data.loading import load_segmentation_datasets
from segmenter_hf.data.mask_checks import MaskReport
from segmenter_hf.evaluation.evaluate import evaluate_segmentation
from segmenter_hf.inference.files import predict_files
from segmenter_hf.inference.predictor import Predictor
from segmenter_hf.training.arguments import SegmentationTrainingArguments
from segmenter_hf.training.run import class_weights, train_segmenter
from segmenter_hf.utils.atomic_files import locked_directory

from ..run_training import words


ONCE = ["--max_steps", "1", "--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]


def train(output_dir: Path, *more: str) -> dict:
    return train_segmenter(*parse_training_arguments(words(str(output_dir), *ONCE, *more)))


def save_pictures(folder: Path, masks: dict[str, np.ndarray], split: str) -> None:
    for kind in ("images", "masks"):
        (folder / kind / split).mkdir(parents=True)
    for name, mask in masks.items():
        pixels = np.repeat(np.clip(mask, 0, 1)[..., None] * 200, 3, axis=2).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / split / f"{name}.png")
        Image.fromarray(mask.astype(np.uint8)).save(folder / "masks" / split / f"{name}.png")


@pytest.fixture
def leaves(tmp_path) -> Path:
    """Pictures that are bright where the one class is."""
    mask = np.zeros((48, 64), dtype=np.uint8)
    mask[:, 32:] = 1
    for split in ("train", "validation"):
        save_pictures(tmp_path / "leaves", {"a": mask, "b": mask[:, ::-1]}, split)
    (tmp_path / "labels.json").write_text('["leaf"]')
    return tmp_path


@pytest.mark.parametrize("decoder_type", ["linear", "mask_transformer"])
def test_one_class_is_trained_evaluated_and_predicted(leaves, decoder_type) -> None:
    more = ["--dataset_name", str(leaves / "leaves"), "--label_set", str(leaves / "labels.json")]
    more += ["--decoder_type", decoder_type, "--max_steps", "40", "--learning_rate", "0.01", "--image_size", "48"]
    more += ["--dice_weight", "0.5", "--photometric_distortion", "false"]
    results = train(leaves / "model", *more)
    assert results["mean_iou"] > 0.9 and len(results["per_category_iou"]) == 2
    assert AutoConfig.from_pretrained(leaves / "model").id2label == {0: "background", 1: "leaf"}
    predictor = Predictor.from_pretrained(leaves / "model")
    assert predictor.label_set.labels == ("background", "leaf")
    written = predict_files(predictor, [leaves / "leaves" / "images" / "train"], leaves / "out")
    assert set(np.unique(np.asarray(Image.open(written["a"])))) == {0, 1}


def test_a_stream_is_trained_on(tmp_path) -> None:
    loaded = load_segmentation_datasets(scenes_train=6, scenes_validation=2)
    (tmp_path / "scenes").mkdir()
    for split, dataset in loaded.items():
        dataset.to_parquet(tmp_path / "scenes" / f"{split}-00000.parquet")
    more = ["--dataset_name", str(tmp_path / "scenes"), "--label_set", "scenes", "--streaming"]
    results = train(tmp_path / "model", *more, "--max_steps", "7", "--dataloader_num_workers", "2")
    assert results["num_images"] == 2
    assert "| images | a stream |" in (tmp_path / "model" / "README.md").read_text()
    with pytest.raises(ValueError, match="give the number of steps with `max_steps`"):
        train(tmp_path / "other", *more, "--max_steps", "-1")


def test_weights_are_balanced_by_the_frequencies(tmp_path) -> None:
    train(tmp_path, "--class_weights", "balanced", "--label_smoothing", "0.1")
    config = AutoConfig.from_pretrained(tmp_path)
    weights = config.semantic_loss_class_weights
    assert len(weights) == 8 and min(weights) < 0.6 and max(weights) > 1.5
    assert config.semantic_loss_label_smoothing == 0.1


def test_weights_are_numbers_or_balanced() -> None:
    assert class_weights("1,2.5", None) == [1.0, 2.5]
    with pytest.raises(ValueError, match='must be "balanced", "balanced_sqrt" or numbers'):
        class_weights("heavy", None)
    for name in ("balanced", "balanced_sqrt"):
        with pytest.raises(ValueError, match=f'"{name}" needs the frequencies'):
            class_weights(name, None)


def test_roots_of_frequencies_weigh_a_rare_class_less() -> None:
    report = MaskReport(4, 255, np.array([160, 40, 0, 10]), np.array([2, 2, 0, 1]), 2, 0, [], {})
    balanced, roots = (np.array(class_weights(name, report)) for name in ("balanced", "balanced_sqrt"))
    assert balanced[2] == roots[2] == 1  # does not occur
    assert balanced[3] / balanced[0] == pytest.approx(16) and roots[3] / roots[0] == pytest.approx(4)
    assert roots[[0, 1, 3]] @ [160, 40, 10] == pytest.approx(210)


def write_parquet(folder: Path, rows: int = 2, **columns) -> None:
    folder.mkdir()
    pictures = [Image.new("RGB", (64, 48))] * rows
    masks = [Image.fromarray(np.full((48, 64), 1, dtype=np.uint8))] * rows
    features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
    data = {"image": pictures, "annotation": masks, **columns}
    for split in ("train", "validation"):
        dataset = datasets.Dataset.from_dict(data, features=features)
        dataset.to_parquet(folder / f"{split}-00000.parquet")


@pytest.mark.parametrize(
    ("rows", "columns", "more", "message"),
    [
        (0, {}, [], "the split 'train' has no rows"),
        (2, {}, ["--label_column", "mask"], "has no column 'mask'.*`image_column` and `label_column`"),
        (2, {}, ["--validation_split", "dev"], "has no split"),
        (2, {"annotation": [None, None]}, [], "the row has no annotation. Give it one"),
        (2, {"annotation": [Image.new("L", (64, 48), 255)] * 2}, [], "all are 255"),
        (2, {"annotation": [Image.new("L", (64, 48), 9)] * 2}, [], r"9.*expected 0 to 7 and 255"),
        (2, {"annotation": [Image.new("L", (48, 64), 1)] * 2}, [], "expected a mask of the size of the image"),
    ],
    ids=["empty", "wrong column", "wrong split", "missing mask", "no valid pixel", "label too large", "wrong size"],
)
def test_data_that_cannot_be_trained_on_is_named(rows, columns, more, message, tmp_path) -> None:
    write_parquet(tmp_path / "data", rows, **columns)
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", "--dataset_name", str(tmp_path / "data"), "--label_set", "scenes", *more)
    assert not (tmp_path / "run").exists()


def test_a_recipe_without_a_free_data_set_asks_for_one(tmp_path) -> None:
    given = ["--recipe", "segmenter_cityscapes", "--output_dir", str(tmp_path), "--use_cpu"]
    with pytest.raises(ValueError, match="names no dataset.*`dataset_name`"):
        train_segmenter(*parse_training_arguments(given))


def test_a_finished_directory_says_what_it_was_trained_with(tmp_path) -> None:
    train(tmp_path, "--recipe", "scenes", "--attn_implementation", "sdpa", "--bf16", "false")
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert recipe["recipe"] == "scenes" and recipe["arguments"]["adam_beta2"] == 0.95
    assert "| recipe | scenes |" in (tmp_path / "README.md").read_text()


def test_classes_are_counted_where_no_label_set_is_named(leaves) -> None:
    for mask in (leaves / "leaves" / "masks").rglob("b.png"):
        Image.fromarray(2 * np.asarray(Image.open(mask))).save(mask)  # 0 and 2
    train(leaves / "counted", "--dataset_name", str(leaves / "leaves"))
    assert AutoConfig.from_pretrained(leaves / "counted").num_labels == 3
    train(leaves / "reduced", "--dataset_name", str(leaves / "leaves"), "--do_reduce_labels", "--ignore_index", "254")
    config = AutoConfig.from_pretrained(leaves / "reduced")
    assert (config.num_labels, config.semantic_loss_ignore_index) == (2, 254)
    label_set = json.loads((leaves / "reduced" / "label_set.json").read_text())
    assert label_set["reduce_labels"] and label_set["ignore_index"] == 254


def test_another_run_starts_again_where_it_may_overwrite(tmp_path) -> None:
    saving = ["--save_strategy", "steps", "--save_steps", "1"]
    train(tmp_path, *saving)
    with pytest.raises(ValueError, match="`overwrite_output_dir`"):
        train(tmp_path, *saving, "--learning_rate", "0.1")
    train(tmp_path, *saving, "--learning_rate", "0.1", "--overwrite_output_dir", "--max_scanned_masks", "0")
    assert json.loads((tmp_path / "recipe.json").read_text())["arguments"]["learning_rate"] == 0.1


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("finished")
    train(output_dir, "--save_strategy", "steps", "--save_steps", "1")
    return output_dir


def test_a_second_run_in_the_same_directory_is_refused(tmp_path) -> None:
    partial = tmp_path / ".checkpoint-1-partial"
    partial.mkdir()
    with locked_directory(tmp_path):
        for overwrite in ([], ["--overwrite_output_dir"]):
            with pytest.raises(BlockingIOError, match="another run is writing to"):
                train(tmp_path, *overwrite)
    assert partial.is_dir()


@pytest.mark.parametrize("overwrite", [[], ["--overwrite_output_dir"]])
@pytest.mark.parametrize("wrong", [["--dataset_name", "nowhere"], ["--optim", "sgd", "--optim_args", "momentum=x"]])
def test_a_mistake_leaves_a_finished_run_as_it_was(finished, overwrite, wrong) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises((OSError, ValueError)):
        train(finished, *overwrite, *wrong)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_the_checkpoint_to_go_on_from_is_not_deleted(finished) -> None:
    with pytest.raises(ValueError, match="would delete"):
        train(finished, "--overwrite_output_dir", "--resume_from_checkpoint", str(finished / "checkpoint-1"))


def test_files_that_are_of_no_run_are_not_replaced(tmp_path) -> None:
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(FileExistsError, match="of no run: config.json.*`overwrite_output_dir`"):
        train(tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--ignore_index", "3"], "ignore_index 3 is also the id"), (["--window_stride", "0"], "`window_stride`.*got 0")],
)
def test_arguments_are_not_taken_as_their_defaults(more, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        train(tmp_path, *more)


def test_weights_that_become_infinite_after_the_last_loss_are_not_saved(tmp_path) -> None:
    with pytest.raises(FloatingPointError, match="is not finite"):
        train(tmp_path, "--optim", "sgd", "--learning_rate", "1e38", "--weight_decay", "1000")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]


def test_the_recorded_results_are_those_of_the_saved_model_after_mixed_precision_too(tmp_path) -> None:
    results = train(tmp_path, "--bf16", "true", "--max_steps", "12", "--scenes_validation", "5")
    (dataset,) = load_segmentation_datasets(splits=["validation"], scenes_validation=5).values()
    again = evaluate_segmentation(Predictor.from_pretrained(tmp_path), dataset, show_progress=False)
    assert results["per_category_iou"] == pytest.approx(again["per_category_iou"], abs=1e-6, nan_ok=True)


def test_bfloat16_needs_no_option_on_a_machine_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    arguments = SegmentationTrainingArguments(str(tmp_path), bf16=True)
    assert arguments.use_cpu and arguments.device.type == "cpu"


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_named_before_anything_is_read(tmp_path, monkeypatch, name) -> None:
    monkeypatch.setattr("segmenter_hf.training.arguments.get_available_reporting_integrations", lambda: ["trackio"])
    with pytest.raises(ImportError, match=f"`report_to={name}` needs {name}, which is not installed"):
        SegmentationTrainingArguments(output_dir=str(tmp_path / "run"), report_to=[name], use_cpu=True)
    assert not (tmp_path / "run").exists()
