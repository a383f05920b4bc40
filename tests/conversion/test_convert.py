"""Checkpoints of rstrudel/segmenter become models that compute what the original computes; see fixtures/rstrudel."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.nn.functional import interpolate
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from segmenter_hf import SegmenterForSemanticSegmentation, SegmenterImageProcessor
from segmenter_hf.cli import convert
from segmenter_hf.conversion.convert import convert_checkpoint
from segmenter_hf.data.label_sets import load_label_set


FIXTURES = Path(__file__).parents[1] / "fixtures" / "rstrudel"
NAMES = ["seg_vit_linear", "seg_vit_mask", "seg_deit_linear", "seg_deit_mask"]


@pytest.fixture(scope="module", params=NAMES)
def converted(request, tmp_path_factory) -> tuple[str, Path]:
    """Name of a checkpoint, and the directory that it was converted to."""
    output_dir = tmp_path_factory.mktemp("converted") / request.param
    return request.param, convert_checkpoint(FIXTURES / request.param / "checkpoint.pth", output_dir)


@pytest.fixture(scope="module")
def expected(converted) -> dict[str, torch.Tensor]:
    """Inputs and outputs of the original."""
    arrays = np.load(FIXTURES / converted[0] / "expected.npz")
    return {name: torch.from_numpy(arrays[name]).float() for name in arrays}


@pytest.fixture(scope="module")
def model(converted) -> SegmenterForSemanticSegmentation:
    return AutoModelForSemanticSegmentation.from_pretrained(converted[1], attn_implementation="eager").eval()


@pytest.mark.parametrize("i", [0, 1])
@torch.no_grad()
def test_tokens_and_patch_logits_are_those_of_the_original(model, expected, i) -> None:
    pixel_values = expected[f"pixel_values_{i}"]
    tokens = model.segmenter(pixel_values).last_hidden_state
    torch.testing.assert_close(tokens, expected[f"encoder_{i}"], rtol=0, atol=1e-4)
    torch.testing.assert_close(model(pixel_values).logits, expected[f"patch_logits_{i}"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("i", [0, 1, 2])
@torch.no_grad()
def test_upsampled_logits_are_those_of_the_original_at_sizes_that_patches_do_not_fill(model, expected, i) -> None:
    pixel_values = expected[f"pixel_values_{i}"]
    height, width = pixel_values.shape[-2:]
    logits = model(pixel_values).logits
    size = [side * model.config.patch_size for side in logits.shape[-2:]]
    upsampled = interpolate(logits, size=size, mode="bilinear", align_corners=False)[..., :height, :width]
    torch.testing.assert_close(upsampled, expected[f"logits_{i}"], rtol=0, atol=5e-3)


@torch.no_grad()
def test_attention_maps_of_every_layer_are_those_of_the_original(model, expected) -> None:
    outputs = model(expected["pixel_values_0"], output_attentions=True)
    maps = {"encoder": outputs.attentions, "decoder": outputs.decoder_attentions}
    names = [name for name in expected if name.startswith("attention_")]
    assert names
    for name in names:
        _, part, layer = name.split("_")
        torch.testing.assert_close(maps[part][int(layer)], expected[name], rtol=0, atol=1e-4)


def test_the_configuration_says_what_the_variant_says(converted, model) -> None:
    name, _ = converted
    is_deit, is_mask = "deit" in name, "mask" in name
    config = model.config
    assert config.architectures == ["SegmenterForSemanticSegmentation"]
    assert config.decoder_type == ("mask_transformer" if is_mask else "linear")
    assert config.use_distillation_token is is_deit
    assert (config.hidden_size, config.num_attention_heads) == ((128, 2) if name == "seg_vit_mask" else (64, 1))
    assert (config.image_size, config.patch_size) == (64, 16)
    assert config.layer_norm_eps == config.decoder_layer_norm_eps == 1e-5
    assert (config.drop_path_rate, config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.1, 0.0, 0.0)
    assert config.position_embedding_interpolation == "bilinear"
    if is_mask:
        assert config.decoder_num_hidden_layers == 2
        assert config.decoder_num_attention_heads == config.num_attention_heads
        assert config.decoder_hidden_dropout_prob == config.decoder_attention_probs_dropout_prob == 0.1
        assert config.decoder_drop_path_rate == 0.0
    assert config.id2label == {i: f"LABEL_{i}" for i in range(5 if is_deit else 7)}
    assert config.provenance["source"] == "rstrudel/segmenter"
    assert config.provenance["file"] == "checkpoint.pth"
    assert len(config.provenance["sha256"]) == 64


def test_the_image_processor_has_the_protocol_of_the_variant(converted) -> None:
    name, output_dir = converted
    processor = AutoImageProcessor.from_pretrained(output_dir)
    assert dict(processor.size) == {"shortest_edge": 64, "longest_edge": 256}
    assert (processor.window_size, processor.patch_size) == (64, 16)
    assert processor.window_stride == {"seg_vit_linear": 64, "seg_vit_mask": 48}.get(name, 32)
    mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if "deit" in name else ([0.5] * 3, [0.5] * 3)
    assert list(processor.image_mean) == list(mean)
    assert list(processor.image_std) == list(std)
    assert processor.do_reduce_labels  # ADE20K


# ---- checkpoints that are changed ----


def write_checkpoint(
    folder: Path,
    name: str = "seg_vit_linear",
    weights: Callable[[dict[str, Any]], Any] = lambda state_dict: None,
    variant: Callable[[dict[str, Any]], Any] = lambda variant: None,
) -> Path:
    """Write a fixture with its weights and its variant changed in place; return the path of the checkpoint."""
    content = torch.load(FIXTURES / name / "checkpoint.pth")
    weights(content["model"])
    torch.save(content, folder / "checkpoint.pth")
    config = yaml.load((FIXTURES / name / "variant.yml").read_text(), Loader=yaml.FullLoader)
    variant(config)
    (folder / "variant.yml").write_text(yaml.dump(config))
    return folder / "checkpoint.pth"


def with_classes(folder: Path, dataset: str, num_labels: int, im_size: int = 64) -> Path:
    """Write a checkpoint of a dataset with that many classes."""

    def weights(state_dict: dict[str, Any]) -> None:
        state_dict["decoder.head.weight"] = torch.zeros(num_labels, 64)
        state_dict["decoder.head.bias"] = torch.arange(num_labels) / num_labels

    def variant(config: dict[str, Any]) -> None:
        config["dataset_kwargs"]["dataset"] = dataset
        config["net_kwargs"]["n_cls"] = num_labels
        config["inference_kwargs"]["im_size"] = im_size

    return write_checkpoint(folder, weights=weights, variant=variant)


@pytest.mark.parametrize(
    ("dataset", "label_set", "max_ratio"),
    [
        ("ade20k", "ade20k", 4),
        ("pascal_context", "pascal_context_60", 8),
        ("pascal_context", "pascal_context_59", 8),
        ("cityscapes", "cityscapes", 2),
    ],
)
def test_the_dataset_gives_names_and_protocol_where_the_classes_agree(dataset, label_set, max_ratio, tmp_path) -> None:
    labels = load_label_set(label_set)
    checkpoint = with_classes(tmp_path, dataset, labels.num_labels, im_size=520)
    output_dir = convert_checkpoint(checkpoint, tmp_path / "model")
    config = AutoModelForSemanticSegmentation.from_pretrained(output_dir).config
    assert config.id2label == labels.id2label
    assert config.label2id == labels.label2id
    processor = AutoImageProcessor.from_pretrained(output_dir)
    assert processor.do_reduce_labels == (label_set in ("ade20k", "pascal_context_59"))
    assert dict(processor.size) == {"shortest_edge": 520, "longest_edge": 520 * max_ratio}


def test_a_label_set_that_is_asked_for_comes_first(tmp_path) -> None:
    checkpoint = with_classes(tmp_path, "ade20k", 7)
    (tmp_path / "names.json").write_text(json.dumps(list("abcdefg")))
    output_dir = convert_checkpoint(checkpoint, tmp_path / "model", label_set=str(tmp_path / "names.json"))
    assert AutoModelForSemanticSegmentation.from_pretrained(output_dir).config.id2label[6] == "g"
    assert not AutoImageProcessor.from_pretrained(output_dir).do_reduce_labels


def test_a_label_set_of_another_number_of_classes_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="names of 7 classes, as many as the checkpoint has, got 150"):
        convert_checkpoint(write_checkpoint(tmp_path), tmp_path / "model", label_set="ade20k")
    with pytest.raises(FileNotFoundError, match="nonsense"):
        convert_checkpoint(tmp_path / "checkpoint.pth", tmp_path / "model", label_set="nonsense")
    assert not (tmp_path / "model").exists()


@torch.no_grad()
def test_other_patch_sizes_and_images_that_are_not_square_are_converted(tmp_path) -> None:
    def weights(state_dict: dict[str, Any]) -> None:
        state_dict["encoder.patch_embed.proj.weight"] = torch.randn(64, 3, 8, 8)
        state_dict["encoder.pos_embed"] = torch.randn(1, 1 + 8 * 12, 64)

    def variant(config: dict[str, Any]) -> None:
        config["net_kwargs"] |= {"patch_size": 8, "image_size": (64, 96)}

    output_dir = convert_checkpoint(write_checkpoint(tmp_path, weights=weights, variant=variant), tmp_path / "model")
    model = AutoModelForSemanticSegmentation.from_pretrained(output_dir)
    assert (model.config.patch_size, model.config.image_size) == (8, [64, 96])
    assert model(torch.randn(1, 3, 64, 96)).logits.shape == (1, 7, 8, 12)
    assert AutoImageProcessor.from_pretrained(output_dir).patch_size == 8


def test_weights_in_half_precision_are_written_as_float32(tmp_path) -> None:
    def weights(state_dict: dict[str, Any]) -> None:
        state_dict.update({key: tensor.half() for key, tensor in state_dict.items()})

    output_dir = convert_checkpoint(write_checkpoint(tmp_path, weights=weights), tmp_path / "model")
    model = AutoModelForSemanticSegmentation.from_pretrained(output_dir)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_whole_numbers_serve_as_rates(tmp_path) -> None:
    checkpoint = write_checkpoint(tmp_path, variant=lambda config: config["net_kwargs"].update(drop_path_rate=0))
    output_dir = convert_checkpoint(checkpoint, tmp_path / "model")
    assert AutoModelForSemanticSegmentation.from_pretrained(output_dir).config.drop_path_rate == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: weights.update({"decoder.extra.weight": torch.ones(2)}),
            r"no place in .*`decoder\.extra\.weight`",
        ),
        (lambda weights: weights.update({"encoder.norm_pre.bias": torch.ones(2)}), r"`encoder\.norm_pre\.bias`"),
        (lambda weights: weights.pop("encoder.norm.weight"), r"nothing for `segmenter\.layernorm\.weight`"),
        (lambda weights: weights.pop("encoder.cls_token"), r"nothing for `segmenter\.embeddings\.cls_token`"),
        (lambda weights: weights.pop("decoder.head.weight"), r"`decoder\.head\.weight` of 2 axes, got none"),
        (
            lambda weights: weights.update({"encoder.norm.weight": torch.ones(65)}),
            r"`encoder\.norm\.weight` of shape \(65,\) .*expected \(64,\)",
        ),
        (
            lambda weights: weights.update({"encoder.pos_embed": torch.ones(1, 26, 64)}),
            r"`encoder\.pos_embed` of shape \(1, 26, 64\) .*expected \(1, 17, 64\)",
        ),
        (
            lambda weights: weights.update({"encoder.blocks.1.attn.qkv.weight": torch.ones(64, 64)}),
            r"expected `encoder\.blocks\.1\.attn\.qkv\.weight` to stack 3 tensors",
        ),
        (
            lambda weights: weights.update({"encoder.dist_token": torch.ones(1, 1, 64)}),
            r"no place for `encoder\.dist_token`",
        ),
        (
            lambda weights: weights["encoder.blocks.1.attn.qkv.weight"][0, 0].fill_(torch.nan),
            r"NaN or infinite values in `encoder\.blocks\.1\.attn\.qkv\.weight`",
        ),
        (
            lambda weights: weights["decoder.head.bias"][3].fill_(-torch.inf),
            r"NaN or infinite values in `decoder\.head\.bias`",
        ),
        (
            lambda weights: weights.update({"encoder.norm.weight": 1.0}),
            r"expected `encoder\.norm\.weight` to be a tensor",
        ),
        (
            lambda weights: weights.update({"encoder.norm.weight": torch.ones(64, dtype=torch.int64)}),
            r"expected `encoder\.norm\.weight` to be a tensor of floats, got \(64,\) of torch\.int64",
        ),
    ],
)
def test_weights_that_do_not_add_up_are_refused_by_name(change, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=rf"checkpoint\.pth.*{message}"):
        convert_checkpoint(write_checkpoint(tmp_path, weights=change), tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pth", "variant.yml"]


def test_a_matrix_with_another_number_of_axes_is_refused_by_name(tmp_path) -> None:
    def weights(state_dict: dict[str, Any]) -> None:
        state_dict["decoder.proj_patch"] = torch.ones(128, 128, 1)

    with pytest.raises(ValueError, match=r"`decoder\.proj_patch` has the wrong number of axes, got \(128, 128, 1\)"):
        convert_checkpoint(write_checkpoint(tmp_path, "seg_vit_mask", weights=weights), tmp_path / "model")


def test_classifiers_of_the_pretraining_are_left_out(tmp_path) -> None:
    def weights(state_dict: dict[str, Any]) -> None:
        for name in ("head", "head_dist"):
            state_dict[f"encoder.{name}.weight"] = torch.full((1000, 64), torch.nan)
            state_dict[f"encoder.{name}.bias"] = torch.zeros(1000)

    convert_checkpoint(write_checkpoint(tmp_path, "seg_deit_linear", weights=weights), tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda config: config.pop("net_kwargs"),
            r"variant\.yml: expected `net_kwargs\.d_model` of type int, got nothing",
        ),
        (lambda config: config["net_kwargs"].update(d_model="64"), r"`net_kwargs\.d_model` of type int, got '64'"),
        (lambda config: config["net_kwargs"].update(n_layers=12), r"`net_kwargs\.n_layers` is 12, but .* has 2"),
        (lambda config: config["net_kwargs"].update(n_cls=150), r"`net_kwargs\.n_cls` is 150, but .* has 7"),
        (lambda config: config["net_kwargs"].update(d_model=128), r"do not fit together: .*`encoder\.cls_token`"),
        (lambda config: config["net_kwargs"].update(patch_size=8), r"do not fit together: .*`encoder\.patch_embed"),
        (lambda config: config["net_kwargs"].update(n_heads=3), r"is not valid\. .*num_attention_heads"),
        (lambda config: config["net_kwargs"].update(dropout=2.0), r"is not valid\. .*hidden_dropout_prob"),
        (lambda config: config["net_kwargs"].update(image_size=(64, 64, 64)), r"is not valid\. .*image_size"),
        (lambda config: config["net_kwargs"].update(normalization="none"), r"normalization vit or deit, got 'none'"),
        (
            lambda config: config["net_kwargs"]["decoder"].update(name="deeplab_dec"),
            r"decoder linear or mask_transformer",
        ),
        (lambda config: config["inference_kwargs"].update(window_stride=100), r"is not valid\. .*window_stride"),
        (lambda config: config.pop("inference_kwargs"), r"variant\.yml: expected `inference_kwargs\.im_size`"),
    ],
)
def test_a_variant_that_does_not_fit_is_refused(change, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        convert_checkpoint(write_checkpoint(tmp_path, variant=change), tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model").exists()


def test_the_variant_is_beside_the_checkpoint_or_where_config_path_says(tmp_path) -> None:
    checkpoint = write_checkpoint(tmp_path)
    variant = (tmp_path / "variant.yml").rename(tmp_path / "elsewhere.yml")
    with pytest.raises(FileNotFoundError, match=r"variant\.yml: no such file.*beside the checkpoint.*config_path"):
        convert_checkpoint(checkpoint, tmp_path / "model")
    convert_checkpoint(str(checkpoint), str(tmp_path / "model"), config_path=str(variant))


def test_a_directory_with_checkpoint_and_variant_is_converted(tmp_path) -> None:
    output_dir = convert_checkpoint(FIXTURES / "seg_vit_linear", tmp_path / "model", source_format="rstrudel")
    assert (output_dir / "model.safetensors").is_file()


def test_formats_that_are_not_known_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="must be auto or one of rstrudel, .*got 'strudel'"):
        convert_checkpoint(FIXTURES / "seg_vit_linear", tmp_path / "model", source_format="strudel")
    with pytest.raises(ValueError, match="expected the keys of .*said to be mmsegmentation, got .*encoder"):
        convert_checkpoint(FIXTURES / "seg_vit_linear", tmp_path / "model", source_format="mmsegmentation")
    torch.save({"conv1.weight": torch.ones(1)}, tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"expected the keys of rstrudel or .*, got \['conv1\.weight'\]"):
        convert_checkpoint(tmp_path / "resnet.pth", tmp_path / "model")


# ---- the output directory ----


def test_a_directory_that_holds_anything_is_not_touched(tmp_path) -> None:
    output_dir = tmp_path / "model"
    output_dir.mkdir()
    convert_checkpoint(FIXTURES / "seg_vit_linear", output_dir)  # empty
    before = {path: path.read_bytes() for path in output_dir.iterdir()}
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        convert_checkpoint(FIXTURES / "seg_deit_linear", output_dir)
    assert {path: path.read_bytes() for path in output_dir.iterdir()} == before


def test_overwriting_replaces_a_model_as_a_whole(tmp_path) -> None:
    output_dir = convert_checkpoint(FIXTURES / "seg_vit_linear", tmp_path / "model")
    (output_dir / "model.safetensors.index.json").write_text("{}")
    convert_checkpoint(FIXTURES / "seg_deit_linear", output_dir, overwrite=True)
    assert not (output_dir / "model.safetensors.index.json").exists()
    assert AutoModelForSemanticSegmentation.from_pretrained(output_dir).config.use_distillation_token
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_overwriting_spares_what_is_no_model_and_the_checkpoint_itself(tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="not the directory of a model"):
        convert_checkpoint(FIXTURES / "seg_vit_linear", tmp_path, overwrite=True)
    with pytest.raises(FileExistsError, match="not the directory of a model"):
        convert_checkpoint(FIXTURES / "seg_vit_linear", tmp_path / "notes.txt", overwrite=True)
    shutil.copytree(FIXTURES / "seg_vit_linear", tmp_path / "source")
    (tmp_path / "source" / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="holds the checkpoint itself"):
        convert_checkpoint(tmp_path / "source" / "checkpoint.pth", tmp_path / "source", overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "precious"


def test_a_failure_while_writing_leaves_the_old_model_and_nothing_else(tmp_path, monkeypatch) -> None:
    output_dir = convert_checkpoint(FIXTURES / "seg_vit_linear", tmp_path / "model")
    before = {path: path.read_bytes() for path in output_dir.iterdir()}

    def fail(self, save_directory, **kwargs) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(SegmenterImageProcessor, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        convert_checkpoint(FIXTURES / "seg_deit_linear", output_dir, overwrite=True)
    assert {path: path.read_bytes() for path in output_dir.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failure_while_moving_brings_the_old_model_back(tmp_path, monkeypatch) -> None:
    output_dir = convert_checkpoint(FIXTURES / "seg_vit_linear", tmp_path / "model")
    before = {path: path.read_bytes() for path in output_dir.iterdir()}
    rename = Path.rename

    def fail_for_the_new_one(self, target) -> Path:
        if self.name == "new":
            raise OSError("Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(OSError, match="busy"):
        convert_checkpoint(FIXTURES / "seg_deit_linear", output_dir, overwrite=True)
    assert {path: path.read_bytes() for path in output_dir.iterdir()} == before


# ---- the script ----


@pytest.fixture(scope="module")
def main() -> Callable[[list[str]], None]:
    return convert.main


def test_the_script_says_what_it_wrote_and_what_comes_next(main, tmp_path, capsys) -> None:
    checkpoint, output_dir = FIXTURES / "seg_vit_linear" / "checkpoint.pth", tmp_path / "model"
    main(["--checkpoint_path", str(checkpoint), "--output_dir", str(output_dir)])
    printed = capsys.readouterr().out
    assert f"Wrote {output_dir}: batch_norm.py, config.json" in printed
    assert "SegmenterForSemanticSegmentation from rstrudel/segmenter" in printed
    assert "Next: python -c" in printed
    with pytest.raises(SystemExit, match="error: .*exists and is not empty"):
        main(["--checkpoint_path", str(checkpoint), "--output_dir", str(output_dir)])
    main(["--checkpoint_path", str(checkpoint), "--output_dir", str(output_dir), "--overwrite"])
