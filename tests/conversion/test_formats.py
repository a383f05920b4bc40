"""Checkpoints of the other systems become models that compute what the systems compute; see the folders in fixtures."""

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForSemanticSegmentation,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    ViTConfig,
    ViTModel,
)

from segmenter_hf import SegmenterModel
from segmenter_hf.cli import convert
from segmenter_hf.conversion.convert import convert_checkpoint


FIXTURES = Path(__file__).parents[1] / "fixtures"
MMSEG = FIXTURES / "mmseg" / "segmenter_mask" / "checkpoint.pth"


@pytest.mark.parametrize(
    ("file", "outputs", "tolerance"),
    [
        ("mmseg/segmenter_linear/checkpoint.pth", {"head_logits_0", "head_logits_1"}, 1e-4),
        ("mmseg/segmenter_mask/checkpoint.pth", {"head_logits_0", "head_logits_1"}, 1e-4),
        ("openmmlab_reproduction/deit_linear/checkpoint.pth", {"patch_logits_0"}, 1e-4),
        ("openmmlab_reproduction/deit_mask/checkpoint.pth", {"patch_logits_0"}, 1e-4),
        ("paddlevit/segmenter_deit_linear/model.pdparams", {"encoder_0", "patch_logits_0"}, 1e-4),
        ("paddlevit/segmenter_vit_mask/model.pdparams", {"encoder_0", "patch_logits_0"}, 1e-4),
    ],
)
@torch.no_grad()
def test_tokens_and_patch_logits_are_those_of_the_original(file, outputs, tolerance, tmp_path) -> None:
    output_dir = convert_checkpoint(FIXTURES / file, tmp_path / "model")
    model = AutoModelForSemanticSegmentation.from_pretrained(output_dir).eval()
    arrays = np.load((FIXTURES / file).with_name("expected.npz"))
    assert outputs == {name for name in arrays if not name.startswith("pixel_values")}
    for name in outputs:
        pixel_values = torch.from_numpy(arrays[f"pixel_values_{name[-1]}"]).float()
        tokens = name.startswith("encoder")
        got = model.segmenter(pixel_values).last_hidden_state if tokens else model(pixel_values).logits
        torch.testing.assert_close(got, torch.from_numpy(arrays[name]), rtol=0, atol=1e-4 if tokens else tolerance)


# ---- mmsegmentation ----


def write_mmseg(
    path: Path, change: Callable[[dict[str, Any]], Any] = lambda content: None, replace: tuple[str, str] = ("", "")
) -> Path:
    """Write a fixture with its content changed in place and a part of its configuration replaced."""
    content = torch.load(MMSEG)
    assert replace[0] in content["meta"]["config"]
    content["meta"]["config"] = content["meta"]["config"].replace(*replace)
    change(content)
    torch.save(content, path)
    return path


def test_the_configuration_in_the_checkpoint_becomes_that_of_the_model(tmp_path) -> None:
    output_dir = convert_checkpoint(MMSEG, tmp_path / "model")
    config = AutoModelForSemanticSegmentation.from_pretrained(output_dir).config
    assert config.provenance["source"] == "open-mmlab/mmsegmentation"
    assert config.id2label == {i: f"class_{i}" for i in range(7)}
    assert (config.num_attention_heads, config.decoder_num_attention_heads) == (2, 2)
    assert (config.layer_norm_eps, config.decoder_layer_norm_eps) == (1e-6, 1e-5)
    assert (config.drop_path_rate, config.decoder_drop_path_rate) == (0.1, 0.1)
    assert config.decoder_hidden_dropout_prob == config.decoder_attention_probs_dropout_prob == 0.0
    assert config.position_embedding_interpolation == "bicubic"
    processor = AutoImageProcessor.from_pretrained(output_dir)
    assert (processor.window_size, processor.window_stride) == (512, 480)
    assert list(processor.image_mean) == list(processor.image_std) == [0.5] * 3
    assert not processor.do_reduce_labels


@pytest.mark.parametrize("version", ["0.x", "1.x"])
def test_the_pipelines_of_both_versions_become_the_image_processor(version, tmp_path) -> None:
    pipelines = {
        "0.x": "img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)\n"
        "test_pipeline = [dict(type='LoadImageFromFile'), dict(type='MultiScaleFlipAug', img_scale=(2048, 640),\n"
        "    transforms=[dict(type='Resize', keep_ratio=True)])]\n",
        "1.x": "test_pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(2048, 640), keep_ratio=True)]\n"
        "data_preprocessor = dict(bgr_to_rgb=True, mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])\n",
    }

    def change(content: dict[str, Any]) -> None:
        text = content["meta"].pop("config").replace("data_preprocessor=dict(", "other=dict(")
        text += pipelines[version] + "train_pipeline = [dict(type='LoadAnnotations', reduce_zero_label=True)]\n"
        text += "gpu_ids = range(0, 1)\n"
        content["meta"]["config" if version == "0.x" else "cfg"] = text
        names = content["meta"].pop("CLASSES")
        content["meta"] |= {"CLASSES": names} if version == "0.x" else {"dataset_meta": {"classes": names}}

    output_dir = convert_checkpoint(write_mmseg(tmp_path / "iter_160000.pth", change), tmp_path / "model")
    processor = AutoImageProcessor.from_pretrained(output_dir)
    assert processor.image_mean == pytest.approx([0.485, 0.456, 0.406])
    assert processor.image_std == pytest.approx([0.229, 0.224, 0.225])
    assert dict(processor.size) == {"shortest_edge": 640, "longest_edge": 2048}
    assert processor.do_reduce_labels
    assert AutoModelForSemanticSegmentation.from_pretrained(output_dir).config.id2label[6] == "class_6"


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        (("bgr_to_rgb=True", "bgr_to_rgb=False"), "BGR"),
        (("stride=[\n        480,\n        480,\n    ]", "stride=(480, 320)"), "square windows"),
        (("num_heads=2", "num_heads=heads"), "Line .* asks for heads"),
        (("num_heads=2", "num_heads='2'"), "`num_heads` of type int, got '2'"),
        (("num_heads=2", "num_heads=3"), "is not valid"),
        (("model = ", "network = "), "`model.backbone`"),
        (("interpolate_mode='bicubic'", "interpolate_mode='nearest'"), "is not valid"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(replace, message, tmp_path) -> None:
    checkpoint = write_mmseg(tmp_path / "checkpoint.pth", replace=replace)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(checkpoint, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_configuration_that_is_missing_can_be_given(tmp_path) -> None:
    texts = []
    checkpoint = write_mmseg(tmp_path / "stripped.pth", lambda content: texts.append(content["meta"].pop("config")))
    with pytest.raises(ValueError, match=r"stripped\.pth: expected the text of its configuration"):
        convert_checkpoint(checkpoint, tmp_path / "model")
    (tmp_path / "config.py").write_text(texts[0])
    convert_checkpoint(checkpoint, tmp_path / "model", config_path=tmp_path / "config.py")


def test_decoders_that_are_not_of_segmenter_are_refused_by_their_keys(tmp_path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["state_dict"]["decode_head.convs.0.conv.weight"] = torch.ones(1)

    with pytest.raises(ValueError, match=r"no place in .*`decode_head\.convs\.0\.conv\.weight`"):
        convert_checkpoint(write_mmseg(tmp_path / "checkpoint.pth", change), tmp_path / "model")


def test_names_of_another_number_of_classes_in_a_checkpoint_are_refused(tmp_path) -> None:
    checkpoint = write_mmseg(tmp_path / "checkpoint.pth", lambda content: content["meta"].update(CLASSES=("a", "b")))
    with pytest.raises(ValueError, match=r"names of 7 classes, .* got 2: \['a', 'b'\].*label_set"):
        convert_checkpoint(checkpoint, tmp_path / "model")


def test_the_reproduction_is_told_from_mmsegmentation_and_is_a_deit(tmp_path) -> None:
    file = FIXTURES / "openmmlab_reproduction" / "deit_mask" / "checkpoint.pth"
    output_dir = convert_checkpoint(file, tmp_path / "model", source_format="mmsegmentation")
    config = AutoModelForSemanticSegmentation.from_pretrained(output_dir).config
    assert config.provenance["source"] == "EricKani/Segmenter-Based-on-OpenMMLab"
    assert config.use_distillation_token
    assert (config.layer_norm_eps, config.decoder_layer_norm_eps) == (1e-6, 1e-5)
    assert (config.decoder_hidden_dropout_prob, config.decoder_drop_path_rate) == (0.1, 0.0)
    assert list(AutoImageProcessor.from_pretrained(output_dir).image_std) == [0.229, 0.224, 0.225]


# ---- PaddleViT ----


def test_the_yaml_of_paddlevit_gives_dataset_and_protocol(tmp_path) -> None:
    file = FIXTURES / "paddlevit" / "segmenter_vit_mask" / "model.pdparams"
    content = {
        "DATA": {"DATASET": "ADE20K", "CROP_SIZE": "(64,64)"},
        "MODEL": {"TRANS": {"NUM_HEADS": 2}},
        "VAL": {"IMAGE_BASE_SIZE": 96, "CROP_SIZE": [64, 64], "STRIDE_SIZE": [32, 32], "MEAN": [127.5, 127.5, 127.5]},
    }
    (tmp_path / "segmenter.yaml").write_text(yaml.dump(content))
    output_dir = convert_checkpoint(file, tmp_path / "model", config_path=tmp_path / "segmenter.yaml")
    assert AutoModelForSemanticSegmentation.from_pretrained(output_dir).config.num_attention_heads == 2
    processor = AutoImageProcessor.from_pretrained(output_dir)
    assert (processor.size.shortest_edge, processor.size.longest_edge) == (96, None)
    assert (processor.window_size, processor.window_stride) == (64, 32)
    assert processor.image_mean == pytest.approx([0.5, 0.5, 0.5])
    assert processor.image_std == pytest.approx([0.229, 0.224, 0.225])
    assert processor.do_reduce_labels


def test_a_pdparams_without_yaml_has_the_normalisation_of_its_encoder(tmp_path) -> None:
    for name, mean in (("segmenter_vit_mask", 0.5), ("segmenter_deit_linear", 0.485)):
        output_dir = convert_checkpoint(FIXTURES / "paddlevit" / name / "model.pdparams", tmp_path / name)
        processor = AutoImageProcessor.from_pretrained(output_dir)
        assert processor.image_mean[0] == mean
        assert (processor.window_size, processor.window_stride, processor.size.shortest_edge) == (64, 64, 64)


def test_every_weight_of_a_pdparams_has_its_place(tmp_path) -> None:
    file = FIXTURES / "paddlevit" / "segmenter_deit_linear" / "model.pdparams"
    content = pickle.loads(file.read_bytes())
    for name, change in {
        "extra": {"decoder.extra.weight": np.ones(2, np.float32)},
        "positions": {"encoder.pos_embed": np.ones((1, 17, 64), np.float32)},
        "integers": {"norm.bias": np.ones(64, np.int64)},
    }.items():
        path = tmp_path / f"{name}.pdparams"
        path.write_bytes(pickle.dumps(content | change))
        with pytest.raises(ValueError, match=rf"{name}\.pdparams: .*({next(iter(change))}|square)"):
            convert_checkpoint(path, tmp_path / "model")


# ---- encoders ----


def timm_pth(folder: Path) -> Path:
    """The weights of the timm fixture as timm publishes them in a .pth."""
    torch.save(load_file(FIXTURES / "backbones" / "timm_hub_s" / "model.safetensors"), folder / "timm.pth")
    return folder / "timm.pth"


@pytest.mark.parametrize(
    ("name", "file", "source", "mean", "layer_norm_eps"),
    [
        ("augreg_npz_s", "augreg.npz", "google-research/vision_transformer", 0.5, 1e-6),
        ("timm_hub_s", "", "huggingface/pytorch-image-models", 0.5, 1e-6),
        ("timm_hub_s", None, "huggingface/pytorch-image-models", 0.5, 1e-6),
        ("deit_distilled_s", "deit.pth", "facebookresearch/deit", 0.485, 1e-6),
        ("hf_vit_s", "", "huggingface/transformers", 0.5, 1e-12),
    ],
)
@torch.no_grad()
def test_tokens_of_pretrained_encoders_are_those_of_the_original(
    name, file, source, mean, layer_norm_eps, tmp_path
) -> None:
    folder = FIXTURES / "backbones" / name
    checkpoint = timm_pth(tmp_path) if file is None else folder / file
    output_dir = convert_checkpoint(checkpoint, tmp_path / "encoder")
    model = AutoModel.from_pretrained(output_dir).eval()
    assert isinstance(model, SegmenterModel)
    assert (model.config.provenance["source"], model.config.layer_norm_eps) == (source, layer_norm_eps)
    pixel_values = torch.from_numpy(np.load(FIXTURES / "backbones" / "pixel_values.npz")["pixel_values"])
    expected = torch.from_numpy(np.load(folder / "expected.npz")["last_hidden_state"])
    torch.testing.assert_close(model(pixel_values).last_hidden_state, expected, rtol=0, atol=1e-4)
    assert AutoImageProcessor.from_pretrained(output_dir).image_mean[0] == mean


@pytest.mark.parametrize("model_class", [ViTModel, DeiTModel, DeiTForImageClassificationWithTeacher])
@torch.no_grad()
def test_encoders_that_transformers_saves_are_converted(model_class, tmp_path) -> None:
    config_class = ViTConfig if model_class is ViTModel else DeiTConfig
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    source = model_class(config_class(**sizes, image_size=48, patch_size=8)).eval()
    for parameter in source.parameters():
        parameter.normal_(std=0.3)
    source.save_pretrained(tmp_path / "source")
    output_dir = convert_checkpoint(tmp_path / "source", tmp_path / "encoder")
    model = AutoModel.from_pretrained(output_dir).eval()
    pixel_values = torch.randn(2, 3, 48, 48)
    expected = getattr(source, "deit", source)(pixel_values).last_hidden_state
    torch.testing.assert_close(model(pixel_values).last_hidden_state, expected, rtol=0, atol=1e-4)
    assert AutoImageProcessor.from_pretrained(output_dir).image_mean[0] == (0.5 if model_class is ViTModel else 0.485)


def test_the_preprocessor_config_of_a_directory_gives_its_normalization(tmp_path) -> None:
    shutil.copytree(FIXTURES / "backbones" / "hf_vit_s", tmp_path / "source")
    normalization = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "source" / "preprocessor_config.json").write_text(json.dumps(normalization))
    processor = AutoImageProcessor.from_pretrained(convert_checkpoint(tmp_path / "source", tmp_path / "encoder"))
    assert list(processor.image_mean) == normalization["image_mean"]
    assert list(processor.image_std) == normalization["image_std"]


def test_a_plain_deit_has_one_token_before_the_patches(tmp_path) -> None:
    state_dict = load_file(FIXTURES / "backbones" / "timm_hub_s" / "model.safetensors")
    torch.save({"model": state_dict}, tmp_path / "deit.pth")
    output_dir = convert_checkpoint(tmp_path / "deit.pth", tmp_path / "encoder")
    assert not AutoModel.from_pretrained(output_dir).config.use_distillation_token
    assert AutoImageProcessor.from_pretrained(output_dir).image_mean[0] == 0.485


def test_a_model_with_a_decoder_starts_from_a_converted_encoder(tmp_path) -> None:
    output_dir = convert_checkpoint(FIXTURES / "backbones" / "augreg_npz_s" / "augreg.npz", tmp_path / "encoder")
    encoder = AutoModel.from_pretrained(output_dir)
    model, info = AutoModelForSemanticSegmentation.from_pretrained(output_dir, num_labels=3, output_loading_info=True)
    assert model.config.num_labels == 3
    assert all(key.startswith("decode_head.") for key in info["missing_keys"])
    assert not info["unexpected_keys"]
    for key, tensor in model.segmenter.state_dict().items():
        torch.testing.assert_close(tensor, encoder.state_dict()[key], rtol=0, atol=0)


def test_the_axes_of_an_augreg_checkpoint_say_how_many_heads_there_are(tmp_path) -> None:
    arrays = dict(np.load(FIXTURES / "backbones" / "augreg_npz_s" / "augreg.npz"))
    for key, array in arrays.items():
        if "/query/" in key or "/key/" in key or "/value/" in key:
            arrays[key] = array.reshape(*array.shape[:-2], 4, 16)
        elif key.endswith("/out/kernel"):
            arrays[key] = array.reshape(4, 16, 64)
    np.savez(tmp_path / "augreg.npz", **arrays)
    model = AutoModel.from_pretrained(convert_checkpoint(tmp_path / "augreg.npz", tmp_path / "encoder"))
    one_head = convert_checkpoint(FIXTURES / "backbones" / "augreg_npz_s" / "augreg.npz", tmp_path / "one_head")
    assert model.config.num_attention_heads == 4
    for key, tensor in AutoModel.from_pretrained(one_head).state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], tensor, rtol=0, atol=0)


def test_encoders_of_another_design_are_refused_by_their_keys(tmp_path) -> None:
    state_dict = load_file(FIXTURES / "backbones" / "timm_hub_s" / "model.safetensors")
    for name, change, message in (
        ("scaled", {"blocks.0.ls1.gamma": torch.ones(64)}, r"nothing for `layers\.0\.layer_scale2`"),
        ("pooled", {"norm.weight": None, "fc_norm.weight": torch.ones(64)}, r"`fc_norm\.weight`"),
        ("registers", {"pos_embed": torch.ones(1, 21, 64)}, "position embeddings of a square of patches, got 20"),
        ("damaged", {"norm.weight": torch.full((64,), torch.nan)}, r"NaN or infinite values in `norm\.weight`"),
    ):
        weights = {key: tensor for key, tensor in (copy.copy(state_dict) | change).items() if tensor is not None}
        save_file(weights, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=rf"{name}\.safetensors.*{message}"):
            convert_checkpoint(tmp_path / f"{name}.safetensors", tmp_path / "encoder")


def test_a_directory_of_another_model_is_refused(tmp_path) -> None:
    shutil.copytree(FIXTURES / "backbones" / "hf_vit_s", tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    for change, message in (
        ({"model_type": "beit"}, "expected the model_type vit, .*dinov2.*, got 'beit'"),
        ({"num_hidden_layers": 12}, "`num_hidden_layers` is 12, the weights have 1"),
        ({"intermediate_size": 128}, "do not fit together"),
    ):
        (tmp_path / "source" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(tmp_path / "source", tmp_path / "encoder")
    (tmp_path / "source" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        convert_checkpoint(tmp_path / "source", tmp_path / "encoder")


def test_an_encoder_takes_no_label_set(tmp_path) -> None:
    with pytest.raises(ValueError, match="An encoder has no classes"):
        convert_checkpoint(FIXTURES / "backbones" / "hf_vit_s", tmp_path / "encoder", label_set="ade20k")


def test_the_script_says_how_to_train_from_an_encoder(tmp_path, capsys) -> None:
    source, output_dir = FIXTURES / "backbones" / "deit_distilled_s" / "deit.pth", tmp_path / "encoder"
    convert.main(["--checkpoint_path", str(source), "--output_dir", str(output_dir), "--source_format", "vit"])
    assert "SegmenterModel from" in (printed := capsys.readouterr().out)
    assert f"from_pretrained('{output_dir}', num_labels=" in printed
