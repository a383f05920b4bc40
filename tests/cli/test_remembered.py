"""What a training was told holds for the commands that use its model, unless they are told otherwise."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segmenter_hf.cli.evaluate import main as evaluate
from segmenter_hf.cli.predict import main as predict
from segmenter_hf.cli.publish import CardArguments, EvaluationArguments, collect_facts
from segmenter_hf.cli.train import main as train
from segmenter_hf.data import decoding, mask_values
from segmenter_hf.data.label_sets import label_set_from_names

from ..data import formats


SMALL = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32,patch_size=8"
TRAINING = (
    f"--config_overrides {SMALL} --crop_size 32 --image_size 32 --max_steps 1 --eval_strategy no --save_strategy no "
    "--load_best_model_at_end false --report_to none --disable_tqdm true --use_cpu true --validation_fraction 0.4 --data_seed 3"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model that was trained on a folder without splits, and another folder like it."""
    root = tmp_path_factory.mktemp("remembered")
    for name in ("data", "other"):
        (root / name).mkdir()
        formats.one_folder(root / name)
    train(["--dataset_name", str(root / "data"), "--output_dir", str(root / "model"), *TRAINING])
    return root


def results(folder: Path, *options: str) -> dict:
    output = ["--output_dir", str(folder / "evaluation"), "--num_worst", "0", "--device", "cpu"]
    evaluate(["--model_name_or_path", str(folder / "model"), *output, *options])
    return json.loads((folder / "evaluation" / "results.json").read_text())


def test_evaluation_takes_dataset_and_split_from_the_recipe(folder, capsys) -> None:
    found = results(folder)
    assert found["num_images"] == 2 and found["dataset"] == str(folder / "data")
    trained = json.loads((folder / "model" / "results.json").read_text())
    assert found["per_category_iou"] == pytest.approx(trained["per_category_iou"], nan_ok=True)
    assert "--validation_fraction 0.4 --data_seed 3" in capsys.readouterr().out


def test_options_of_the_command_come_before_those_of_the_recipe(folder, capsys) -> None:
    assert results(folder, "--validation_fraction", "0.2")["num_images"] == 1
    assert "--validation_fraction" not in capsys.readouterr().out
    other = results(folder, "--data_seed", "0")
    assert other["num_images"] == 2 and "--data_seed" not in capsys.readouterr().out


def test_another_dataset_is_split_in_the_same_way(folder) -> None:
    found = results(folder, "--dataset_name", str(folder / "other"))
    assert found["dataset"] == str(folder / "other") and found["num_images"] == 2


def predicted(folder: Path, output: Path, *options: str) -> list[str]:
    arguments = ["--output_dir", str(output), "--output_format", "png", "--device", "cpu"]
    predict(["--model_name_or_path", str(folder / "model"), *arguments, *options])
    return sorted(path.stem for path in output.rglob("*.png"))


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_train_is_what_was_trained_on_and_validation_the_rest(folder, tmp_path, streaming) -> None:
    data = ("--dataset_name", str(folder / "data"), "--streaming", streaming)
    train_ids = predicted(folder, tmp_path / "train", *data, "--split", "train")
    validation_ids = predicted(folder, tmp_path / "validation", *data, "--split", "validation")
    assert len(train_ids) == 3 and sorted(train_ids + validation_ids) == [f"plant{seed}" for seed in range(5)]
    assert len(predicted(folder, tmp_path / "all", *data, "--validation_fraction", "0")) == 5
    worst = results(folder, "--split", "train", "--num_worst", "3")
    assert (folder / "evaluation" / "worst.png").is_file()
    assert worst["num_images"] == 3 and {image["id"] for image in worst["worst_images"]} <= set(train_ids)
    assert results(folder, "--split", "train", "--validation_fraction", "0")["num_images"] == 5
    assert not (folder / "evaluation" / "worst.png").exists()


def test_of_another_dataset_train_is_whole_unless_a_fraction_is_given(folder, tmp_path, capsys) -> None:
    other = ("--dataset_name", str(folder / "other"), "--split", "train")
    assert results(folder, *other)["num_images"] == 5
    assert len(predicted(folder, tmp_path / "maps", *other)) == 5
    assert "--validation_fraction" not in capsys.readouterr().out
    assert len(predicted(folder, tmp_path / "part", *other, "--validation_fraction", "0.4")) == 3


def test_a_new_model_says_that_it_starts_from_random_weights(tmp_path, caplog) -> None:
    (tmp_path / "data").mkdir()
    formats.one_folder(tmp_path / "data")
    train(["--dataset_name", str(tmp_path / "data"), "--output_dir", str(tmp_path / "model"), *TRAINING])
    assert "training from random weights" in caplog.text


def test_training_reads_each_mask_once_to_check_it(tmp_path, monkeypatch) -> None:
    (tmp_path / "data").mkdir()
    formats.black_and_white(tmp_path / "data")
    read = []

    def open_pair(row: dict, *args: object) -> tuple:
        read.append(row["id"])
        return decoding.open_pair(row, *args)

    monkeypatch.setattr(mask_values, "open_pair", open_pair)
    train(["--dataset_name", str(tmp_path / "data"), "--output_dir", str(tmp_path / "model"), *TRAINING])
    assert sorted(read) == [f"plant{seed}" for seed in range(5)]


def test_an_ignore_index_of_the_command_comes_before_that_of_the_training(tmp_path, folder) -> None:
    (tmp_path / "data").mkdir()
    formats.void_id(tmp_path / "data")
    arguments = ["--dataset_name", str(tmp_path / "data"), "--output_dir", str(tmp_path / "model"), *TRAINING]
    train([*arguments, "--ignore_index", "11"])
    assert json.loads((tmp_path / "model" / "recipe.json").read_text())["arguments"]["ignore_index"] == 11
    assert np.isfinite(results(tmp_path)["per_category_accuracy"]).all()
    with pytest.raises(SystemExit, match=r"references must lie in \[0, 3\) or be the ignore_index 255, got 11"):
        results(tmp_path, "--ignore_index", "255")
    other = results(tmp_path, "--dataset_name", str(folder / "data"), "--ignore_index", "7")
    assert np.isfinite(other["per_category_accuracy"]).all()  # the ids 0 to 2, and no 11


def test_the_label_set_of_the_training_is_what_it_was_there_when_it_is_named_again(tmp_path) -> None:
    """Without it, labels that training shifted by one would be evaluated as they are stored."""
    (tmp_path / "data").mkdir()
    formats.ade20k(tmp_path / "data")
    (tmp_path / "names.txt").write_text("a\nb\nc")
    (tmp_path / "other.txt").write_text("a\nb\nc")
    arguments = ["--dataset_name", str(tmp_path / "data"), "--output_dir", str(tmp_path / "model"), *TRAINING]
    train([*arguments, "--label_set", str(tmp_path / "names.txt"), "--do_reduce_labels", "true"])
    expected = results(tmp_path)["per_category_iou"]
    assert results(tmp_path, "--label_set", str(tmp_path / "names.txt"))["per_category_iou"] == expected
    with pytest.raises(SystemExit, match=r"references must lie in \[0, 3\) or be the ignore_index 255, got 3"):
        results(tmp_path, "--label_set", str(tmp_path / "other.txt"))


def test_a_card_gets_the_numbers_of_an_evaluation(tmp_path) -> None:
    """Masks of 0 and 255, which the label set of the training was adapted to, and is not named again."""
    for split in ("train", "validation"):
        for kind in ("images", "masks"):
            (tmp_path / "data" / kind / split).mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / "images" / split / "a.png")
        Image.fromarray((pixels[..., 0] > 99).astype(np.uint8) * 255).save(
            tmp_path / "data" / "masks" / split / "a.png"
        )
    (tmp_path / "labels.json").write_text('["ground", "crack"]')
    model, data = str(tmp_path / "model"), str(tmp_path / "data")
    options = [
        "--config_overrides",
        SMALL,
        "--crop_size",
        "32",
        "--image_size",
        "32",
        "--max_steps",
        "1",
        "--use_cpu",
        "true",
    ]
    options += ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
    train(["--dataset_name", data, "--label_set", str(tmp_path / "labels.json"), "--output_dir", model, *options])
    (tmp_path / "labels.json").unlink()
    evaluate(["--model_name_or_path", model, "--output_dir", str(tmp_path / "out"), "--device", "cpu"])
    expected = json.loads((tmp_path / "out" / "results.json").read_text())
    assert expected["hub_dataset"] is None and expected["per_category_iou"][1] > 0
    for label_set in (Path(model) / "label_set.json", None):  # adapted, and as it was named
        facts = collect_facts(model, CardArguments(), EvaluationArguments(evaluate=data, device="cpu"))
        assert facts.results[-1]["per_category_iou"] == expected["per_category_iou"]
        if label_set is not None:
            label_set_from_names(["ground", "crack"]).save(label_set)


def test_a_model_that_says_nothing_of_its_dataset_is_not_evaluated_on_another(folder, tmp_path, capsys) -> None:
    silent = shutil.copytree(folder / "model", tmp_path / "model")
    (silent / "recipe.json").unlink()
    with pytest.raises(SystemExit):
        evaluate(["--model_name_or_path", str(silent), "--output_dir", str(tmp_path / "out"), "--device", "cpu"])
    assert "give --dataset_name" in capsys.readouterr().err and not (tmp_path / "out").exists()
