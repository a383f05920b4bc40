"""The tools of fine-tuning: layer-wise rates, frozen encoders, averaged weights, low-rank updates, early stopping."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSemanticSegmentation

from segmenter_hf import SegmenterConfig, SegmenterForSemanticSegmentation
from segmenter_hf.cli.train import parse_training_arguments
from segmenter_hf.data.label_sets import label_set_from_names
from segmenter_hf.training.adapters import add_adapters, merge_adapters
from segmenter_hf.training.arguments import SegmentationTrainingArguments
from segmenter_hf.training.averaging import AVERAGE_FILE, WeightAverage
from segmenter_hf.training.callbacks import StopEarly
from segmenter_hf.training.datasets import build_augmentation
from segmenter_hf.training.model_building import build_model_and_processor
from segmenter_hf.training.optimization import decays, depth_from_top
from segmenter_hf.training.run import train_segmenter
from segmenter_hf.training.trainer import SegmentationTrainer, segmentation_callbacks

from ..run_training import words
from ..tiny_models import save_tiny_scenes_model


def tiny_model(**fields) -> SegmenterForSemanticSegmentation:
    torch.manual_seed(0)
    defaults = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "decoder_num_hidden_layers": 1,
        "image_size": 32,
        "patch_size": 8,
        "num_labels": 3,
        "drop_path_rate": 0.5,
        "hidden_dropout_prob": 0.5,
    }
    return SegmenterForSemanticSegmentation(SegmenterConfig(**defaults | fields))


class Crops(torch.utils.data.Dataset):
    """Rows whose class can be told from the color."""

    def __init__(self, length: int = 8, num_labels: int = 3) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.randint(0, num_labels, (length, 4, 5), generator=generator)
        self.labels = self.labels.repeat_interleave(8, 1).repeat_interleave(8, 2)
        self.colors = torch.randn(num_labels, 3, generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = self.labels[index]
        return {"pixel_values": self.colors[labels.clamp(max=len(self.colors) - 1)].movedim(-1, 0), "labels": labels}


def make_trainer(output_dir: Path, model: SegmenterForSemanticSegmentation, **kwargs) -> SegmentationTrainer:
    defaults = {
        "use_cpu": True,
        "disable_tqdm": True,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
    }
    arguments = SegmentationTrainingArguments(str(output_dir), **defaults | kwargs)
    labels = label_set_from_names([str(index) for index in range(model.config.num_labels)])
    return SegmentationTrainer(model=model, args=arguments, train_dataset=Crops(), label_set=labels)


def test_tokens_positions_norms_and_biases_are_not_decayed_with_one_rate_either(tmp_path) -> None:
    model = tiny_model()
    trainer = make_trainer(tmp_path, model, weight_decay=0.1)
    trainer.create_optimizer_and_scheduler(num_training_steps=10)
    decayed = {id(p) for group in trainer.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert {"segmenter.layers.0.mlp.fc1.weight", "decode_head.projection.weight"} <= names
    assert not [name for name in names if "norm" in name or name.endswith(("bias", "token", "embeddings"))]


def test_rates_fall_from_the_heads_to_the_embeddings(tmp_path) -> None:
    model = tiny_model()
    trainer = make_trainer(
        tmp_path, model, learning_rate=1.0, layer_decay=0.5, head_learning_rate_factor=10.0, weight_decay=0.1
    )
    trainer.create_optimizer_and_scheduler(num_training_steps=10)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates, decay = {}, {}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            rates[names[id(parameter)]], decay[names[id(parameter)]] = group["initial_lr"], group["weight_decay"]
    assert rates.keys() == dict(model.named_parameters()).keys()
    assert rates["decode_head.projection.weight"] == rates["decode_head.layers.0.mlp.fc1.weight"] == 10
    assert rates["segmenter.layernorm.weight"] == 1
    assert [rates[f"segmenter.layers.{layer}.mlp.fc1.weight"] for layer in range(3)] == [0.125, 0.25, 0.5]
    assert rates["segmenter.embeddings.position_embeddings"] == 0.0625
    for spared in (
        "segmenter.embeddings.cls_token",
        "segmenter.embeddings.position_embeddings",
        "decode_head.class_embeddings",
        "segmenter.layers.0.layernorm_before.weight",
        "segmenter.layers.0.mlp.fc1.bias",
        "decode_head.mask_norm.weight",
    ):
        assert decay[spared] == 0, spared
    assert decay["segmenter.layers.0.mlp.fc1.weight"] == decay["decode_head.projection.weight"] == 0.1
    for _ in range(10):
        trainer.lr_scheduler.step()
    ends = {name: group["lr"] for group in trainer.optimizer.param_groups for name in [group["layer_factor"]]}
    assert ends == pytest.approx({factor: 1e-6 * factor for factor in (1, 0.5, 0.25, 0.125, 0.0625)}, rel=1e-6)


def test_no_decay_is_for_scales_of_layers_and_tokens() -> None:
    vector, matrix = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(1, 4, 4))
    assert not decays("segmenter.layers.0.layer_scale1", vector)
    assert not decays("segmenter.embeddings.register_tokens", matrix)
    assert decays("segmenter.embeddings.patch_embeddings.projection.weight", matrix)
    assert depth_from_top("decode_head.layers.0.mlp.fc1.weight", "segmenter", 12) == 0
    assert depth_from_top("segmenter.layers.11.mlp.fc1.weight", "segmenter", 12) == 1
    assert depth_from_top("segmenter.embeddings.cls_token", "segmenter", 12) == 13


def changed(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def test_a_frozen_encoder_stays_as_it_is_and_has_no_dropout(tmp_path) -> None:
    model = tiny_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    seen = []
    model.base_model.register_forward_hook(
        lambda module, arguments, output: seen.append((module.training, output.last_hidden_state.requires_grad))
    )
    trainer = make_trainer(tmp_path, model, freeze_encoder=True, max_steps=3)
    trainer.train()
    assert seen == [(False, False)] * 3
    names = changed(model, before)
    assert names and all(name.startswith("decode_head.") for name in names)
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert not held & {id(parameter) for parameter in model.base_model.parameters()}


def test_an_encoder_is_trained_from_the_step_at_which_it_thaws(tmp_path) -> None:
    model, trained = tiny_model(), []
    trainer = make_trainer(tmp_path, model, freeze_encoder=True, unfreeze_at_step=2, max_steps=4, layer_decay=0.75)
    encoder = model.base_model
    encoder.register_forward_hook(
        lambda module, arguments, output: trained.append((module.training, output.last_hidden_state.requires_grad))
    )
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer.train()
    assert trained == [(False, False)] * 2 + [(True, True)] * 2
    assert "segmenter.layers.0.mlp.fc1.weight" in changed(model, before)


def test_the_average_is_that_of_a_naive_loop(tmp_path) -> None:
    model = tiny_model()
    average = WeightAverage(model, 0.9)
    parameter = model.decode_head.projection.weight
    expected = parameter.detach().clone()
    for step in range(1, 6):
        with torch.no_grad():
            parameter.add_(step)
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * parameter.detach()
    own = parameter.detach().clone()
    with average.applied():
        torch.testing.assert_close(parameter.detach(), expected)
    assert torch.equal(parameter, own)
    average.save(tmp_path)
    other = WeightAverage(model, 0.9)
    other.load(tmp_path)
    assert torch.equal(other.values["decode_head.projection.weight"], average.values["decode_head.projection.weight"])
    with pytest.raises(ValueError, match="averages of another model"):
        WeightAverage(tiny_model(hidden_size=32), 0.9).load(tmp_path)


def test_buffers_of_batch_norm_are_averaged_too() -> None:
    model = tiny_model(decoder_type="linear", decoder_norm="batch_norm")
    average = WeightAverage(model, 0.9)
    (name,) = (name for name, _ in model.named_buffers() if name.endswith("running_mean"))
    model.get_buffer(name).fill_(1.0)
    average.update(1)
    expected = 1 - min(0.9, 2 / 11)
    with average.applied():
        torch.testing.assert_close(model.get_buffer(name), torch.full_like(model.get_buffer(name), expected))
    assert bool((model.get_buffer(name) == 1).all())


def run(output_dir: Path, *more: str) -> dict:
    return train_segmenter(*parse_training_arguments(words(str(output_dir), *more)))


def test_averaged_weights_are_evaluated_saved_and_resumed(tmp_path) -> None:
    more = ["--ema_decay", "0.8", "--save_total_limit", "9"]
    results = run(tmp_path / "run", *more)
    state = json.loads((tmp_path / "run" / "checkpoint-12" / "trainer_state.json").read_text())
    scores = [entry["eval_mean_iou"] for entry in state["log_history"] if "eval_mean_iou" in entry]
    assert results["mean_iou"] == max(scores)  # of the averaged weights of the best checkpoint
    best = Path(state["best_model_checkpoint"])
    saved, average = load_file(tmp_path / "run" / "model.safetensors"), load_file(best / AVERAGE_FILE)
    own = load_file(best / "model.safetensors")
    assert all(torch.equal(saved[name], average[name]) for name in average)
    assert not all(torch.equal(own[name], average[name]) for name in average)
    first, last = (load_file(tmp_path / "run" / f"checkpoint-{step}" / AVERAGE_FILE) for step in (2, 12))
    assert not torch.equal(first["decode_head.projection.weight"], last["decode_head.projection.weight"])
    again = tmp_path / "again"
    run(again, *more, "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-6"))
    repeated = load_file(again / "checkpoint-12" / AVERAGE_FILE)
    expected = load_file(tmp_path / "run" / "checkpoint-12" / AVERAGE_FILE)
    assert all(torch.equal(repeated[name], expected[name]) for name in expected)


def test_updates_of_low_rank_are_trained_resumed_and_merged(tmp_path) -> None:
    pytest.importorskip("peft", reason="`lora_rank` needs the extra `peft`")
    more = ["--lora_rank", "2", "--lora_targets", "q_proj,fc1", "--save_total_limit", "9"]
    more += ["--load_best_model_at_end", "false", "--learning_rate", "0.01"]
    results = run(tmp_path / "run", *more)
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert not [name for name in weights if "lora" in name or "base_layer" in name]
    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "run")
    assert model.config.model_type == "segmenter"
    first = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    last = load_file(tmp_path / "run" / "checkpoint-12" / "model.safetensors")
    layer = "segmenter.layers.0.attention.q_proj"
    assert torch.equal(first[f"{layer}.base_layer.weight"], last[f"{layer}.base_layer.weight"])
    update = last[f"{layer}.lora_B.default.weight"] @ last[f"{layer}.lora_A.default.weight"] * 2
    torch.testing.assert_close(weights[f"{layer}.weight"], last[f"{layer}.base_layer.weight"] + update)
    assert update.abs().max() > 0
    assert "segmenter.layers.0.attention.v_proj.weight" in last  # no target
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| low-rank updates | rank 2, alpha 4, of q_proj, fc1, merged |" in card
    again = run(tmp_path / "again", *more, "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-6"))
    assert again["mean_iou"] == results["mean_iou"]


def test_merged_weights_give_the_logits_of_the_updates() -> None:
    pytest.importorskip("peft", reason="`lora_rank` needs the extra `peft`")
    model = tiny_model().eval()
    expected_names = set(model.state_dict())
    add_adapters(model, 2, 8, "q_proj, v_proj")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    heads = {name for name in expected_names if name.startswith("decode_head.")}
    assert heads <= trained and all("lora_" in name for name in trained - heads)
    assert not any(name.startswith("decode_head.") and "lora_" in name for name in dict(model.named_parameters()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    pixel_values = torch.randn(1, 3, 32, 40)
    layer = "segmenter.layers.0.attention.q_proj"
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    update = weights[f"{layer}.lora_B.default.weight"] @ weights[f"{layer}.lora_A.default.weight"]
    with torch.no_grad():
        before = model(pixel_values).logits
        merge_adapters(model)
        merged = model.state_dict()[f"{layer}.weight"]
        torch.testing.assert_close(merged, weights[f"{layer}.base_layer.weight"] + 8 / 2 * update)  # alpha / rank
        torch.testing.assert_close(model(pixel_values).logits, before, rtol=1e-4, atol=1e-5)
    assert set(model.state_dict()) == expected_names


def test_training_ends_after_so_many_evaluations_without_a_better_one(tmp_path) -> None:
    still = ["--learning_rate", "1e-12", "--min_learning_rate", "0", "--num_train_epochs", "9"]
    run(tmp_path, "--early_stopping_patience", "2", *still)
    state = json.loads(next(tmp_path.glob("checkpoint-6/trainer_state.json")).read_text())
    assert state["global_step"] == 6  # the first evaluation is the best one
    assert StopEarly.__name__ in state["stateful_callbacks"]
    run(tmp_path, "--early_stopping_patience", "2", *still)  # resumes from there
    assert not (tmp_path / "checkpoint-8").exists()
    last = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert last["global_step"] == 6


def test_evaluations_before_an_interruption_count(tmp_path) -> None:
    more = ["--learning_rate", "1e-12", "--min_learning_rate", "0", "--num_train_epochs", "9"]
    more += ["--early_stopping_patience", "2", "--save_total_limit", "9"]
    run(tmp_path / "whole", *more)
    run(tmp_path / "again", *more, "--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-4"))
    assert sorted(path.name for path in (tmp_path / "again").glob("checkpoint-*")) == ["checkpoint-6"]


def test_a_model_that_is_stored_in_less_is_trained_in_float32(tmp_path) -> None:
    save_tiny_scenes_model(tmp_path / "start")
    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "start", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "start")
    more = ["--model_name_or_path", str(tmp_path / "start"), "--config_overrides", "", "--num_train_epochs", "1"]
    run(tmp_path / "run", *more)
    assert {value.dtype for value in load_file(tmp_path / "start" / "model.safetensors").values()} == {torch.bfloat16}
    assert {value.dtype for value in load_file(tmp_path / "run" / "model.safetensors").values()} == {torch.float32}


def test_what_whole_weights_are_needed_for_is_refused_where_they_are_shared_out() -> None:
    for name, value in (("ema_decay", 0.9), ("lora_rank", 2)):
        trainer = SimpleNamespace(
            args=SimpleNamespace(**{name: value}), is_fsdp_enabled=True, is_deepspeed_enabled=False
        )
        with pytest.raises(ValueError, match=f"`{name}`.*whole weights"):
            list(segmentation_callbacks(trainer, None, None))


def test_kept_features_are_for_one_gpu_of_a_process(tmp_path) -> None:
    more = ["--freeze_encoder", "true", "--cache_feature_epochs", "1"]
    *_, training_args = parse_training_arguments(words(str(tmp_path), *more))
    training_args._n_gpu = 2
    with pytest.raises(ValueError, match="accelerate launch"):
        training_args._check_tools()


def test_options_reach_the_crops_and_the_loss(tmp_path) -> None:
    options = {"vertical_flip_probability": 0.3, "min_scale": 0.7, "max_scale": 1.7, "focal_gamma": 2.0}
    options |= {"ohem_fraction": 0.25, "dice_weight": 0.5}
    more = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    model_args, data_args, _ = parse_training_arguments(words(str(tmp_path), *more, "--right_angle_rotations", "true"))
    label_set = label_set_from_names(["a", "b"])
    model, processor = build_model_and_processor(model_args, data_args, label_set)
    augmentation = build_augmentation(data_args, label_set.ignore_index, processor)
    assert augmentation.vertical_flip_probability == 0.3 and augmentation.right_angle_rotations is True
    assert augmentation.ratio_range == (0.7, 1.7)
    assert model.config.semantic_loss_focal_gamma == 2.0
    assert model.config.semantic_loss_ohem_fraction == 0.25
    assert model.config.semantic_loss_dice_weight == 0.5


def test_early_stopping_of_a_recipe_is_turned_off_by_0(tmp_path) -> None:
    more = ["--early_stopping_patience", "0", "--eval_strategy", "no", "--load_best_model_at_end", "false"]
    _, _, args = parse_training_arguments(words(str(tmp_path), *more))
    assert args.early_stopping_patience is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--layer_decay", "1.5"], "`layer_decay` must be above 0 and at most 1, got 1.5"),
        (["--ema_decay", "1"], "`ema_decay` must be at least 0 and below 1"),
        (["--unfreeze_at_step", "3"], "need `freeze_encoder`"),
        (
            ["--unfreeze_at_step", "9", "--freeze_encoder", "true", "--max_steps", "9"],
            "9 comes after the last step, 9",
        ),
        (["--head_learning_rate_factor", "0"], "`head_learning_rate_factor` must be above 0, got 0"),
        (["--lora_rank", "2", "--lora_alpha", "0"], "`lora_alpha` must be above 0, got 0"),
        (["--extra_weight", "-1"], "`extra_weight` must be above 0, got -1"),
        (["--lora_rank", "0"], "`lora_rank` must be at least 1"),
        (["--lora_rank", "2", "--freeze_encoder", "true"], "`freeze_encoder` forbids"),
        (["--early_stopping_patience", "1", "--load_best_model_at_end", "false"], "needs `load_best_model_at_end`"),
        (["--early_stopping_patience", "1", "--eval_strategy", "no", "--save_strategy", "no"], "and evaluations"),
        (["--lora_rank", "2", "--lora_targets", "queries"], "must be names of .*q_proj.*got 'queries'"),
    ],
)
def test_options_that_do_not_fit_are_named(more, message, tmp_path) -> None:
    if "--lora_targets" in more:
        pytest.importorskip("peft", reason="`lora_rank` needs the extra `peft`")
    with pytest.raises(ValueError, match=message):
        run(tmp_path, *more)
