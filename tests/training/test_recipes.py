"""Recipes: the tables of the papers as arguments, and what replaces what."""

import json
from dataclasses import fields

import pytest

from segmenter_hf.cli.train import parse_training_arguments
from segmenter_hf.data.label_sets import load_label_set
from segmenter_hf.training.recipes import (
    ARGUMENTS,
    check_same_run,
    load_recipes,
    resolve_training_arguments,
    resolved_recipe,
    save_recipe,
)
from segmenter_hf.training.run import build_model_and_processor


FINE_TUNING = ("probe", "finetune_small_dataset", "camvid_dinov2")
PAPERS = sorted(name for name in load_recipes() if name.startswith(("segmenter", "setr")))


def parse(tmp_path, *words: str):
    return parse_training_arguments([*words, "--output_dir", str(tmp_path / "run"), "--use_cpu"])


def test_every_family_and_data_set_has_its_recipe() -> None:
    setr = [f"setr_{decoder}_{dataset}" for decoder in ("naive", "pup", "mla") for dataset in ("ade20k", "cityscapes")]
    segmenter = ["segmenter_ade20k", "segmenter_pascal_context", "segmenter_cityscapes"]
    assert sorted(load_recipes()) == sorted([*segmenter, *setr, "camvid", "scenes", *FINE_TUNING])
    assert all(recipe["source"] and recipe["description"] for recipe in load_recipes().values())


@pytest.mark.parametrize("name", list(load_recipes()))
def test_a_recipe_is_made_of_arguments_and_makes_a_model(name, tmp_path) -> None:
    known = {field.name for each in ARGUMENTS for field in fields(each)}
    assert load_recipes()[name]["arguments"].keys() <= known
    more = ["--config_overrides", "patch_size=14"] if name == "camvid_dinov2" else []  # as its encoder
    model_args, data_args, training_args = parse(tmp_path, "--recipe", name, "--model_size", "tiny", *more)
    assert training_args.effective_batch_size == load_recipes()[name]["arguments"]["total_batch_size"]
    label_set = load_label_set(data_args.label_set or "scenes")
    model, processor = build_model_and_processor(model_args, data_args, label_set)
    assert model.config.model_type == name.partition("_")[0] or name in ("camvid", "scenes", *FINE_TUNING)
    assert model.config.num_labels == label_set.num_labels
    assert processor.window_size == data_args.crop_size and data_args.crop_size % model.config.patch_size == 0
    if name.startswith("setr"):
        assert model.config.decoder_type == name.split("_")[1]
        assert tuple(processor.image_mean) == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("segmenter_ade20k", (1e-3, 1e-5, 64, 8, 512, 4.0, 512, 512)),
        ("segmenter_pascal_context", (1e-3, 1e-5, 256, 16, 520, 8.0, 480, 320)),
        ("segmenter_cityscapes", (1e-2, 1e-5, 216, 8, 1024, 2.0, 768, 512)),
    ],
)
def test_the_table_of_segmenter(name, expected, tmp_path) -> None:
    model_args, data_args, training_args = parse(tmp_path, "--recipe", name)
    rates = (training_args.learning_rate, training_args.min_learning_rate)
    data = (data_args.image_size, data_args.max_ratio, data_args.crop_size, data_args.window_stride)
    assert (*rates, training_args.num_train_epochs, training_args.effective_batch_size, *data) == expected
    assert (str(training_args.optim.value), training_args.optim_args) == ("sgd", "momentum=0.9,nesterov=true")
    assert training_args.lr_scheduler_kwargs == {"power": 0.9, "lr_end": 1e-5}
    assert (model_args.drop_path_rate, training_args.weight_decay, training_args.max_grad_norm) == (0.1, 0, 0)


@pytest.mark.parametrize(
    ("name", "rate", "auxiliary_convs"),
    [
        ("setr_naive_ade20k", 1e-2, 2),
        ("setr_pup_ade20k", 1e-3, 2),
        ("setr_mla_ade20k", 1e-3, 0),
        ("setr_naive_cityscapes", 1e-2, 1),
        ("setr_pup_cityscapes", 1e-2, 2),
        ("setr_mla_cityscapes", 2e-3, 0),
    ],
)
def test_the_table_of_setr(name, rate, auxiliary_convs, tmp_path) -> None:
    model_args, data_args, training_args = parse(tmp_path, "--recipe", name, "--model_size", "tiny")
    model, _ = build_model_and_processor(model_args, data_args, load_label_set(data_args.label_set))
    assert (training_args.learning_rate, training_args.min_learning_rate) == (rate, 1e-4)
    assert model.config.auxiliary_num_convs == auxiliary_convs


@pytest.mark.parametrize("name", PAPERS)
def test_the_heads_of_setr_learn_ten_times_as_fast(name, tmp_path) -> None:
    _, _, training_args = parse(tmp_path, "--recipe", name)
    assert training_args.head_learning_rate_factor == (10 if name.startswith("setr") else 1)


def test_the_command_line_replaces_the_file_and_the_file_the_recipe(tmp_path) -> None:
    file = tmp_path / "arguments.json"
    file.write_text(json.dumps({"recipe": "segmenter_ade20k", "crop_size": 256, "learning_rate": 0.5}))
    _, data_args, training_args = parse(tmp_path, str(file), "--learning_rate", "0.25")
    assert (data_args.image_size, data_args.crop_size, training_args.learning_rate) == (512, 256, 0.25)


def test_a_resolved_recipe_is_a_file_of_arguments(tmp_path) -> None:
    given = parse(tmp_path, "--recipe", "scenes", "--learning_rate", "0.01", "--per_device_train_batch_size", "2")
    recipe = resolved_recipe(*given)
    assert recipe["recipe"] == "scenes"
    assert recipe["batch"] == {"devices": 1, "per_device": 2, "accumulation": 2}
    save_recipe(tmp_path, recipe)
    assert resolved_recipe(*parse(tmp_path, str(tmp_path / "recipe.json")))["arguments"] == recipe["arguments"]


def test_the_shape_of_a_schedule_is_part_of_the_recipe(tmp_path) -> None:
    plain = resolved_recipe(*parse(tmp_path, "--recipe", "scenes"))
    assert plain["arguments"]["lr_scheduler_kwargs"] is None
    shape = {"power": 2.0, "lr_end": 1e-7}
    given = parse(tmp_path, "--recipe", "scenes", "--lr_scheduler_kwargs", json.dumps(shape))
    recipe = resolved_recipe(*given)
    assert recipe["arguments"]["lr_scheduler_kwargs"] == shape
    save_recipe(tmp_path, recipe)
    *_, again = parse(tmp_path, str(tmp_path / "recipe.json"))
    assert again.lr_scheduler_kwargs == shape
    with pytest.raises(ValueError, match="lr_scheduler_kwargs"):
        check_same_run(tmp_path, plain)


def test_a_directory_with_another_run_is_refused_and_the_difference_named(tmp_path) -> None:
    recipe = resolved_recipe(*parse(tmp_path, "--recipe", "scenes"))
    save_recipe(tmp_path, recipe)
    check_same_run(tmp_path, resolved_recipe(*parse(tmp_path, "--recipe", "scenes", "--logging_steps", "7")))
    with pytest.raises(ValueError, match=r"\(learning_rate 0.0008 -> 0.1\).*`overwrite_output_dir`"):
        check_same_run(tmp_path, resolved_recipe(*parse(tmp_path, "--recipe", "scenes", "--learning_rate", "0.1")))


@pytest.mark.parametrize(
    ("words", "shares"),
    [
        ([], (8, 1)),
        (["--total_batch_size", "12"], (12, 1)),
        (["--total_batch_size", "12", "--per_device_train_batch_size", "3"], (3, 4)),
        (["--total_batch_size", "12", "--gradient_accumulation_steps", "2"], (6, 2)),
        (["--per_device_train_batch_size", "3", "--gradient_accumulation_steps", "2"], (3, 2)),
    ],
)
def test_the_batch_is_put_together(words, shares, tmp_path) -> None:
    _, _, training_args = parse(tmp_path, *words)
    assert (training_args.per_device_train_batch_size, training_args.gradient_accumulation_steps) == shares


def test_what_cannot_be_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="There is no recipe 'ade', only segmenter_ade20k"):
        parse(tmp_path, "--recipe", "ade")
    with pytest.raises(ValueError, match="is not 1 devices x a whole batch"):
        parse(tmp_path, "--total_batch_size", "10", "--per_device_train_batch_size", "4")
    with pytest.raises(ValueError, match="must be positive, got `total_batch_size` 10, 1 devices"):
        parse(tmp_path, "--total_batch_size", "10", "--per_device_train_batch_size", "0")
    with pytest.raises(ValueError, match="use `label_smoothing`"):
        parse(tmp_path, "--label_smoothing_factor", "0.1")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_ratio", "nan", "must be a finite number, got nan"),
        ("dice_weight", "inf", "must be a finite number, got inf"),
        ("poly_power", "nan", "must be a finite number, got nan"),
        ("value_range", ["0", "inf"], r"`value_range` must be finite, got \[0.0, inf\]"),
        ("class_weights", "1,nan,2", "`class_weights` must be finite, got 1,nan,2"),
        ("config_overrides", "drop_path_rate=-inf", "`config_overrides` must be finite, got drop_path_rate=-inf"),
        ("optim_args", "momentum=nan", "`optim_args` must be finite, got momentum=nan"),
        ("lr_scheduler_kwargs", '{"power": NaN}', "`lr_scheduler_kwargs` must be finite, got .*nan"),
        ("learning_rate", "inf", "must be a finite number, got inf"),
        ("max_grad_norm", "nan", "must be a finite number, got nan"),
        ("optim_args", "foo", "must be as in .*, got 'foo'"),
        ("metric_for_best_model", "foo", "must be one of mean_iou, .*, got 'foo'"),
        ("gradient_accumulation_steps", "0", "must be positive, .*`gradient_accumulation_steps` 0"),
        ("per_device_train_batch_size", "0", "must be positive, .*`per_device_train_batch_size` 0"),
        ("num_train_epochs", "-1", "give a positive `num_train_epochs`"),
        ("max_steps", "0", "Nothing would be trained"),
    ],
)
def test_values_that_nothing_can_be_trained_with_are_refused(name, value, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        parse(tmp_path, f"--{name}", *([value] if isinstance(value, str) else value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"crop": 3}', "does not know: crop"),
        ("no JSON", "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        ("[1]", r"expected a JSON object, got \[1\]"),
        ('{"arguments": [1]}', "`arguments` to be dict"),
        ('{"recipe": ["a"]}', "`recipe`"),
        ('{"max_ratio": null}', "`max_ratio` to be float, got None"),
        ('{"learning_rate": {}}', "`learning_rate`"),
        ('{"label_set": 5}', r"`label_set` to be str \| None, got 5"),
        ('{"class_weights": [1, 2]}', "`class_weights`"),
        ('{"crop_size": true}', "`crop_size` to be int"),
        ('{"model_type": "x"}', "`model_type` to be .*setr.*, got 'x'"),
        ('{"normalization": "x"}', "`normalization`"),
    ],
)
def test_a_file_that_holds_no_arguments_is_named(text, message, tmp_path) -> None:
    (tmp_path / "wrong.json").write_text(text)
    with pytest.raises(ValueError, match=f"wrong.json.*{message}"):
        parse(tmp_path, str(tmp_path / "wrong.json"))


@pytest.mark.parametrize("text", ["[]", "{}", "5", '{"arguments": 5}'])
def test_a_directory_whose_recipe_is_none_is_refused(text, tmp_path) -> None:
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(ValueError, match="recipe.json: expected"):
        check_same_run(tmp_path, resolved_recipe(*parse(tmp_path)))


@pytest.mark.parametrize("name", ["finetune_small_dataset", "camvid_dinov2"])
def test_recipes_of_fine_tuning_start_the_decoder_from_a_probe(name, tmp_path) -> None:
    model_args, _, training_args = parse_training_arguments(["--recipe", name, "--output_dir", str(tmp_path)])
    assert model_args.decoder_type == "mask_transformer" and training_args.decoder_warm_start == "linear_probe"
    assert training_args.layer_decay < 1 and training_args.ema_decay is not None


@pytest.mark.parametrize(("name", "choices"), [("model_size", "tiny, small"), ("normalization", "half, imagenet")])
def test_an_argument_with_choices_is_one_of_them(name, choices, tmp_path) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be one of {choices}.*, got 'nope'"):
        resolve_training_arguments({"recipe": "scenes", "output_dir": str(tmp_path), name: "nope"})
