"""Encoders of every family give the tokens of their source, converted and loaded with the Auto classes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from segmenter_hf.conversion.convert import convert_checkpoint


FIXTURES = Path(__file__).parents[1] / "fixtures"
SHARED = Path(__file__).parents[3] / "shared"
DINOV2_SMALL = SHARED / "encoders" / "dinov2-small"


def golden(name: str) -> Path:
    """A folder of goldens: a copy among the fixtures, or beside the checkout where those that are not copied lie."""
    for folder in (FIXTURES / name, SHARED / "goldens" / name):
        if folder.is_dir():
            return folder
    pytest.skip(f"no folder of goldens {SHARED / 'goldens' / name}")


def randomized(model: PreTrainedModel) -> PreTrainedModel:
    """The model with random weights that let every part of it show."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.eval()


@pytest.mark.parametrize(
    "name",
    ["dinov2/plain", "dinov2/registers", "dinov2/swiglu_registers", "dinov3/vits16", "dinov3/vit7b16"],
)
@torch.no_grad()
def test_tokens_of_files_of_meta_are_those_of_its_code_at_every_size(name, tmp_path) -> None:
    folder = golden(name)
    output_dir = convert_checkpoint(folder / "checkpoint.pth", tmp_path / "encoder", verify=True)
    model = AutoModel.from_pretrained(output_dir).eval()
    about, arrays = json.loads((folder / "about.json").read_text()), np.load(folder / "expected.npz")
    assert model.config.provenance["source"] == f"facebookresearch/{name.split('/')[0]}"
    assert model.config.num_attention_heads == about["num_heads"]
    number = sum(key.startswith("pixel_values") for key in arrays)
    assert number > 1
    for index in range(number):
        outputs = model(torch.from_numpy(arrays[f"pixel_values_{index}"]).float(), output_hidden_states=True)
        parts = {"cls": outputs.last_hidden_state[:, 0]}
        parts["registers"], parts["patches"] = outputs.last_hidden_state[:, 1:].split(
            [
                model.config.num_register_tokens,
                outputs.last_hidden_state.shape[1] - 1 - model.config.num_register_tokens,
            ],
            dim=1,
        )
        for layer, states in enumerate(outputs.hidden_states[1:]):
            patches = model.layernorm(states)[:, 1 + model.config.num_register_tokens :]
            parts[f"layer{layer}"] = patches.transpose(1, 2)
        for part, got in parts.items():
            if f"{part}_{index}" in arrays:
                expected = torch.from_numpy(arrays[f"{part}_{index}"])
                expected = expected.flatten(2) if part.startswith("layer") else expected
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    processor = AutoImageProcessor.from_pretrained(output_dir)
    assert processor.image_mean[0] == pytest.approx(0.485)
    assert processor.patch_size == model.config.patch_size == about["patch_size"]
    assert processor.window_size == 512 - 512 % about["patch_size"]


SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MLP = {**SIZES, "intermediate_size": 96}
DINOV3 = {**MLP, "num_register_tokens": 4}
FAMILIES = {
    "vit": lambda: ViTModel(ViTConfig(**MLP, image_size=48)),
    "dino_v1": lambda: ViTModel(ViTConfig(**MLP, image_size=48, patch_size=8), add_pooling_layer=False),
    "deit": lambda: DeiTModel(DeiTConfig(**MLP, image_size=48)),
    "mae": lambda: ViTMAEModel(ViTMAEConfig(**MLP, image_size=48, mask_ratio=0.0)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SIZES, image_size=56)),
    "dinov2_giant": lambda: Dinov2Model(Dinov2Config(**SIZES, image_size=56, use_swiglu_ffn=True)),
    "dinov2_with_registers": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**SIZES, image_size=56, patch_size=14)
    ),
    "dinov3": lambda: DINOv3ViTModel(DINOv3ViTConfig(**DINOV3)),
    "dinov3_without_registers": lambda: DINOv3ViTModel(DINOv3ViTConfig(**MLP)),
    "dinov3_7b": lambda: DINOv3ViTModel(
        DINOv3ViTConfig(**DINOV3, use_gated_mlp=True, hidden_act="silu", query_bias=False, value_bias=False)
    ),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**MLP, image_size=50)),  # 3 patches, as in SO400M/14 at 384
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**MLP, image_size=48, patch_size=8)),
}
INTERPOLATED = ("vit", "dino_v1", "deit", "mae", "siglip", "clip")


def tokens_of_transformers(name: str, source: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Tokens of an image padded to whole patches, which transformers would cut off."""
    patch_size = source.config.patch_size
    height, width = pixel_values.shape[-2:]
    pixel_values = nn.functional.pad(pixel_values, (0, -width % patch_size, 0, -height % patch_size))
    arguments = {"interpolate_pos_encoding": True} if name in INTERPOLATED else {}
    if name == "mae":  # it shuffles the patches otherwise
        number = (pixel_values.shape[2] // patch_size) * (pixel_values.shape[3] // patch_size)
        arguments["noise"] = torch.arange(number).float().expand(len(pixel_values), -1)
    return source(pixel_values, **arguments).last_hidden_state


@pytest.mark.parametrize("names", ["hub", "new"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_tokens_of_families_are_those_of_transformers(name, names, tmp_path) -> None:
    source = randomized(FAMILIES[name]())
    source.save_pretrained(tmp_path / "source")
    if names == "new":  # as the modules of 5.x are called, without the names of the Hub
        (tmp_path / "source" / "model.safetensors").unlink()
        torch.save(source.state_dict(), tmp_path / "source" / "pytorch_model.bin")
    model = AutoModel.from_pretrained(convert_checkpoint(tmp_path / "source", tmp_path / "encoder")).eval()
    patch_size = source.config.patch_size
    for size in ((3 * patch_size, 3 * patch_size), (4 * patch_size + 3, 2 * patch_size + 5), (patch_size, 70)):
        pixel_values = torch.randn(2, 3, *size)
        expected = tokens_of_transformers(name, source, pixel_values)
        torch.testing.assert_close(model(pixel_values).last_hidden_state, expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(not DINOV2_SMALL.is_dir(), reason=f"no real weights of DINOv2 in {DINOV2_SMALL}")
@torch.no_grad()
def test_real_weights_of_dinov2_give_the_tokens_of_transformers(tmp_path) -> None:
    source = Dinov2Model.from_pretrained(DINOV2_SMALL, dtype=torch.float32).eval()
    output_dir = convert_checkpoint(DINOV2_SMALL, tmp_path / "encoder")
    model = AutoModel.from_pretrained(output_dir).eval()
    pixel_values = torch.randn(1, 3, 140, 101)
    expected = tokens_of_transformers("dinov2", source, pixel_values)
    torch.testing.assert_close(model(pixel_values).last_hidden_state, expected, rtol=0, atol=1e-4)
    processor = AutoImageProcessor.from_pretrained(output_dir)
    assert (processor.patch_size, processor.window_size, processor.window_stride) == (14, 504, 504)
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]


@pytest.mark.parametrize(
    ("name", "mean"),
    [
        ("deit3", 0.485),
        ("dinov2_registers", 0.485),
        ("dinov2_giant", 0.485),
        ("siglip", 0.5),
        ("clip", 0.4815),
        ("dinov3", 0.485),
        ("dinov3_plus", 0.485),
    ],
)
@torch.no_grad()
def test_tokens_of_directories_of_timm_are_those_of_timm(name, mean, tmp_path) -> None:
    folder = FIXTURES / "timm" / name
    output_dir = convert_checkpoint(folder, tmp_path / "encoder", verify=True)
    model, arrays = AutoModel.from_pretrained(output_dir).eval(), np.load(folder / "expected.npz")
    for index in range(2):
        tokens = model(torch.from_numpy(arrays[f"pixel_values_{index}"]).float()).last_hidden_state
        torch.testing.assert_close(tokens, torch.from_numpy(arrays[f"tokens_{index}"]), rtol=0, atol=1e-5)
    assert AutoImageProcessor.from_pretrained(output_dir).image_mean[0] == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("blocks.0.attn.relative_position_bias_table", "relative position biases, as BEiT"),
        ("blocks.0.attn.q_proj.weight", "as EVA-02"),
        ("layers.0.blocks.0.attn.qkv.weight", "several resolutions"),
        ("stages.0.blocks.0.conv_dw.weight", "several resolutions"),
    ],
)
def test_backbones_that_are_no_plain_vits_are_refused_with_the_reason(key, message, tmp_path) -> None:
    torch.save({"cls_token": torch.zeros(1, 1, 64), key: torch.zeros(64, 64)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=rf"other\.pth: expected a plain ViT, got one with .*{message}"):
        convert_checkpoint(tmp_path / "other.pth", tmp_path / "encoder")


@torch.no_grad()
def test_files_of_dino_v1_mae_and_deit3_are_told_apart_by_their_tensors(tmp_path) -> None:
    weights = load_file(FIXTURES / "timm" / "deit3" / "model.safetensors")
    weights = {key: value for key, value in weights.items() if not key.startswith("head")}
    plain = {key: value for key, value in weights.items() if ".ls" not in key}
    plain["pos_embed"] = torch.cat([torch.randn(1, 1, 64), plain["pos_embed"]], dim=1)
    deit3 = {key.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): v for key, v in weights.items()}
    for name, content, source, offset in (
        ("dino_deitsmall16_pretrain", plain, "facebookresearch/dino", 0.1),
        (
            "mae_pretrain_vit_base",
            {"model": {**plain, "decoder_pred.bias": torch.zeros(8)}},
            "facebookresearch/mae",
            0.0,
        ),
        ("deit_3_small_224_21k", {"model": deit3}, "facebookresearch/deit", 0.0),
    ):
        torch.save(content, tmp_path / f"{name}.pth")
        output_dir = convert_checkpoint(tmp_path / f"{name}.pth", tmp_path / name)
        config = AutoModel.from_pretrained(output_dir).config
        assert config.provenance["source"] == source
        assert (config.position_embedding_interpolation, config.position_embedding_offset) == ("bicubic", offset)
        assert AutoImageProcessor.from_pretrained(output_dir).image_mean[0] == pytest.approx(0.485)


def test_a_grid_and_channels_are_changed_with_positions_of_any_kind(tmp_path) -> None:
    for name, patch_size in (("dinov2/registers", 14), ("dinov3/vit7b16", 16)):
        source, size = golden(name) / "checkpoint.pth", 5 * patch_size
        output_dir = convert_checkpoint(source, tmp_path / name.replace("/", "-"), image_size=size, num_channels=4)
        model = AutoModel.from_pretrained(output_dir)
        assert model.config.image_size == size
        assert model(torch.randn(1, 4, size, size)).last_hidden_state.shape[1] == 1 + 4 + 25


@torch.no_grad()
def test_weights_in_several_files_are_read_together(tmp_path) -> None:
    source = randomized(FAMILIES["dinov3"]())
    source.save_pretrained(tmp_path / "source", max_shard_size="60KB")
    assert len(list((tmp_path / "source").glob("model-*-of-*.safetensors"))) > 1
    model = AutoModel.from_pretrained(
        convert_checkpoint(tmp_path / "source", tmp_path / "encoder", verify=True)
    ).eval()
    pixel_values = torch.randn(1, 3, 48, 32)
    expected = tokens_of_transformers("dinov3", source, pixel_values)
    torch.testing.assert_close(model(pixel_values).last_hidden_state, expected, rtol=0, atol=1e-5)
    index = tmp_path / "source" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for name, error, message in (
        ("../model.safetensors", ValueError, "beside it"),
        ("model-9.safetensors", FileNotFoundError, "no model-9.safetensors"),
    ):
        index.write_text(json.dumps({"weight_map": {**content["weight_map"], "norm.weight": name}}))
        with pytest.raises(error, match=message):
            convert_checkpoint(tmp_path / "source", tmp_path / "other")
