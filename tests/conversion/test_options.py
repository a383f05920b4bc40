"""What a conversion may change, how it is verified, and how any name of a model becomes one to train from."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import interpolate
from transformers import AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation, HfArgumentParser

from segmenter_hf import SegmenterConfig, SegmenterForSemanticSegmentation, SegmenterModel, SetrModel
from segmenter_hf.conversion import pretrained
from segmenter_hf.conversion.convert import PACKAGE, conversion_version, convert_checkpoint, verify_conversion
from segmenter_hf.conversion.pretrained import resolve_model
from segmenter_hf.data.label_sets import load_label_set
from segmenter_hf.training.run import DataArguments, ModelArguments, build_model_and_processor


FIXTURES = Path(__file__).parents[1] / "fixtures"
TIMM = FIXTURES / "backbones" / "timm_hub_s"
DEIT = FIXTURES / "backbones" / "deit_distilled_s" / "deit.pth"
RSTRUDEL = FIXTURES / "rstrudel" / "seg_vit_mask" / "checkpoint.pth"
MMSEG = FIXTURES / "mmseg" / "segmenter_mask" / "checkpoint.pth"


# Changes


@pytest.mark.parametrize(("source", "number"), [(TIMM, 1), (DEIT, 2)])
def test_position_embeddings_are_resized_to_the_image_size(source, number, tmp_path) -> None:
    """The converted model computes for its new size what the old one computes by resizing."""
    before = AutoModel.from_pretrained(convert_checkpoint(source, tmp_path / "before"))
    after = AutoModel.from_pretrained(convert_checkpoint(source, tmp_path / "after", image_size=96))
    grid = before.embeddings.grid
    assert (before.config.image_size, after.config.image_size) != (96, before.config.image_size)
    assert after.embeddings.grid == (96 // after.config.patch_size,) * 2
    old, new = (model.embeddings.position_embeddings for model in (before, after))
    assert torch.equal(new[:, :number], old[:, :number])
    patches = old[:, number:].unflatten(1, grid).permute(0, 3, 1, 2)
    expected = interpolate(patches, size=after.embeddings.grid, mode="bilinear").flatten(2).transpose(1, 2)
    torch.testing.assert_close(new[:, number:], expected)
    pixel_values = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(
        after(pixel_values).last_hidden_state, before(pixel_values).last_hidden_state, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("source", "num_channels"), [(TIMM, 1), (TIMM, 2), (TIMM, 4), (TIMM, 7), (RSTRUDEL, 4)])
def test_the_patch_embedding_is_inflated_so_that_grey_images_stay_the_same(source, num_channels, tmp_path) -> None:
    before = AutoModel.from_pretrained(convert_checkpoint(source, tmp_path / "before"))
    output_dir = convert_checkpoint(source, tmp_path / "after", num_channels=num_channels)
    after = AutoModel.from_pretrained(output_dir)
    assert after.config.num_channels == num_channels
    old, new = (model.embeddings.patch_embeddings.projection.weight for model in (before, after))
    assert new.shape[1] == num_channels
    if num_channels == 1:
        torch.testing.assert_close(new[:, 0], old.sum(1))
    else:
        for channel in range(num_channels):
            torch.testing.assert_close(new[:, channel] * num_channels / 3, old[:, channel % 3])
    processor = AutoImageProcessor.from_pretrained(output_dir)
    assert len(processor.image_mean) == len(processor.image_std) == num_channels
    image = torch.randint(256, (num_channels, 40, 50), dtype=torch.uint8)
    assert processor(image, do_resize=False, do_split_windows=False)["pixel_values"].shape == (1, num_channels, 40, 50)


def test_an_encoder_becomes_that_of_setr_without_its_final_norm(tmp_path) -> None:
    encoder = AutoModel.from_pretrained(convert_checkpoint(TIMM, tmp_path / "segmenter"))
    output_dir = convert_checkpoint(TIMM, tmp_path / "setr", model_type="setr", image_size=64, verify=True)
    model, info = SetrModel.from_pretrained(output_dir, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        if "position_embeddings" not in name:
            assert torch.equal(tensor, encoder.state_dict()[name]), name
    assert model.config.provenance["model_type"] == "setr"
    whole = AutoModelForSemanticSegmentation.from_pretrained(output_dir, num_labels=5)
    assert torch.equal(whole.setr.layers[0].mlp.fc1.weight, model.layers[0].mlp.fc1.weight)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (TIMM, {"image_size": 50}, "multiple of the patch size 16, got 50"),
        (TIMM, {"image_size": 0}, "multiple of the patch size 16, got 0"),
        (TIMM, {"image_size": 100_000}, "at most 8192, got 100000"),
        (TIMM, {"num_channels": 0}, "at least 1 and at most 1000, got 0"),
        (TIMM, {"num_channels": 1001}, "at most 1000, got 1001"),
        (TIMM, {"model_type": "beit"}, "one of segmenter, setr, got 'beit'"),
        (MMSEG, {"model_type": "setr"}, "is a whole segmenter model"),
    ],
)
def test_changes_that_cannot_be_made_are_refused(source, options, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(source, tmp_path / "model", **options)
    assert not (tmp_path / "model").exists()


# Encoders of mmsegmentation, labels


def test_encoders_that_mmsegmentation_converted_have_their_place(tmp_path) -> None:
    """Its names are put on the weights of timm, as its own tool does (tools/model_converters/vit2mmseg.py)."""
    weights = load_file(TIMM / "model.safetensors")
    names = (
        ("patch_embed.proj", "patch_embed.projection"),
        ("blocks.", "layers."),
        ("norm1", "ln1"),
        ("norm2", "ln2"),
        ("attn.qkv.", "attn.attn.in_proj_"),
        ("attn.proj", "attn.attn.out_proj"),
        ("mlp.fc1", "ffn.layers.0.0"),
        ("mlp.fc2", "ffn.layers.1"),
    )
    renamed = {}
    for key, tensor in weights.items():
        for old, new in names:
            key = key.replace(old, new)
        key = "ln1." + key.removeprefix("norm.") if key.startswith("norm.") else key
        if not key.startswith("head"):
            renamed[key] = tensor
    torch.save(renamed, tmp_path / "vit.pth")
    converted = AutoModel.from_pretrained(convert_checkpoint(tmp_path / "vit.pth", tmp_path / "mmseg"))
    expected = AutoModel.from_pretrained(convert_checkpoint(TIMM, tmp_path / "timm"))
    assert converted.config.provenance["source"] == "open-mmlab/mmsegmentation"
    for name, tensor in expected.state_dict().items():
        assert torch.equal(converted.state_dict()[name], tensor), name
    del renamed["patch_embed.projection.bias"]
    torch.save(renamed, tmp_path / "vit.pth")
    without_bias = AutoModel.from_pretrained(convert_checkpoint(tmp_path / "vit.pth", tmp_path / "without"))
    assert not without_bias.embeddings.patch_embeddings.projection.bias.any()


def test_names_and_colors_of_the_checkpoint_become_the_label_set(tmp_path) -> None:
    content = torch.load(MMSEG)
    content["meta"]["PALETTE"] = [[index, 0, 200] for index in range(7)]
    torch.save(content, tmp_path / "checkpoint.pth")
    output_dir = convert_checkpoint(tmp_path / "checkpoint.pth", tmp_path / "model")
    label_set = load_label_set(output_dir / "label_set.json")
    assert label_set.labels == tuple(f"class_{index}" for index in range(7))
    assert label_set.colors[3] == (3, 0, 200)
    content["meta"]["PALETTE"] = [[index, 0, 999] for index in range(7)]
    torch.save(content, tmp_path / "checkpoint.pth")
    output_dir = convert_checkpoint(tmp_path / "checkpoint.pth", tmp_path / "without_colors")
    assert len(load_label_set(output_dir / "label_set.json").colors) == 7


def test_names_of_a_packaged_label_set_are_recognized(tmp_path) -> None:
    content = torch.load(MMSEG)
    names = load_label_set("scenes").labels[:7]
    content["meta"]["CLASSES"] = names
    torch.save(content, tmp_path / "checkpoint.pth")
    output_dir = convert_checkpoint(tmp_path / "checkpoint.pth", tmp_path / "model")
    assert load_label_set(output_dir / "label_set.json").name == "checkpoint"
    for key in ("decode_head.cls_emb", "decode_head.mask_norm.weight", "decode_head.mask_norm.bias"):
        axis = 1 if key.endswith("cls_emb") else 0
        tensor = content["state_dict"][key]
        content["state_dict"][key] = torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)
    content["meta"]["CLASSES"] = load_label_set("scenes").labels
    torch.save(content, tmp_path / "checkpoint.pth")
    output_dir = convert_checkpoint(tmp_path / "checkpoint.pth", tmp_path / "scenes")
    assert load_label_set(output_dir / "label_set.json") == load_label_set("scenes")


# Verification


def test_verification_says_what_was_compared(tmp_path, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="segmenter_hf"):
        output_dir = convert_checkpoint(TIMM, tmp_path / "model", verify=True)
    report = verify_conversion(TIMM, output_dir)
    assert str(report) in caplog.text
    model = SegmenterModel.from_pretrained(output_dir)
    assert report.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert report.source_tensors == len(load_file(TIMM / "model.safetensors"))
    assert set(report.unused) == {key for key in load_file(TIMM / "model.safetensors") if key.startswith("head")}
    assert report.forward_sha256[:16] in str(report)


def test_verification_finds_a_weight_that_was_changed(tmp_path) -> None:
    output_dir = convert_checkpoint(MMSEG, tmp_path / "model")
    verify_conversion(MMSEG, output_dir)
    weights = load_file(output_dir / "model.safetensors")
    weights["segmenter.layers.0.mlp.fc2.bias"][3] += 1e-3
    save_file(weights, output_dir / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="`segmenter.layers.0.mlp.fc2.bias` of the loaded model differ"):
        verify_conversion(MMSEG, output_dir)


def test_verification_finds_a_configuration_that_was_changed(tmp_path) -> None:
    output_dir = convert_checkpoint(MMSEG, tmp_path / "model")
    config = json.loads((output_dir / "config.json").read_text())
    config["layer_norm_eps"] = 1e-3
    (output_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="computes something else than the source"):
        verify_conversion(MMSEG, output_dir)


def test_a_conversion_that_does_not_verify_leaves_nothing(tmp_path, monkeypatch) -> None:
    save = SegmenterForSemanticSegmentation.save_pretrained

    def save_something_else(model: SegmenterForSemanticSegmentation, directory: Path) -> None:
        model.decode_head.mask_norm.bias.data[0] += 1
        save(model, directory)
        model.decode_head.mask_norm.bias.data[0] -= 1

    monkeypatch.setattr(SegmenterForSemanticSegmentation, "save_pretrained", save_something_else)
    with pytest.raises(ValueError, match="mask_norm.bias"):
        convert_checkpoint(MMSEG, tmp_path / "model", verify=True)
    assert not list(tmp_path.iterdir())


# Any name of a model


def data_arguments() -> DataArguments:
    return HfArgumentParser(DataArguments).parse_dict({"image_size": 64, "crop_size": 64})[0]


@pytest.mark.parametrize("model_type", ["segmenter", "setr"])
@pytest.mark.parametrize("source", [TIMM, DEIT, FIXTURES / "backbones" / "augreg_npz_s" / "augreg.npz"])
def test_training_starts_from_any_encoder(source, model_type, tmp_path) -> None:
    name = resolve_model(source, model_type, cache_dir=tmp_path)
    assert resolve_model(source, model_type, cache_dir=tmp_path) == name
    assert len(list(tmp_path.iterdir())) == 1
    encoder = AutoModel.from_pretrained(name)
    overrides = "decoder_hidden_size=32" if model_type == "setr" else "decoder_type=linear"
    model_args = ModelArguments(name, config_overrides=overrides)
    model, processor = build_model_and_processor(model_args, data_arguments(), load_label_set("scenes"))
    assert model.config.model_type == model_type
    assert model.config.num_labels == 8
    assert processor.window_size == 64
    base = getattr(model, model_type)
    assert torch.equal(base.layers[-1].mlp.fc2.weight, encoder.layers[-1].mlp.fc2.weight)
    pixel_values = torch.randn(2, 3, 64, 64)
    loss = model(pixel_values, labels=torch.randint(8, (2, 64, 64))).loss
    loss.backward()
    assert base.layers[0].mlp.fc1.weight.grad.abs().sum() > 0


def test_models_of_the_package_are_returned_as_they_are(tmp_path) -> None:
    config = SegmenterConfig(hidden_size=32, num_attention_heads=2, intermediate_size=32, num_hidden_layers=1)
    SegmenterForSemanticSegmentation(config).save_pretrained(tmp_path / "model")
    assert resolve_model(tmp_path / "model", cache_dir=tmp_path / "cache") == str(tmp_path / "model")
    assert not (tmp_path / "cache").exists()


def test_whole_checkpoints_of_other_systems_are_converted_as_they_are(tmp_path) -> None:
    name = resolve_model(MMSEG, "setr", cache_dir=tmp_path)
    assert AutoModelForSemanticSegmentation.from_pretrained(name).config.model_type == "segmenter"


def test_names_on_the_hub_are_fetched_and_converted(tmp_path, monkeypatch) -> None:
    asked = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(shutil.copytree(TIMM, tmp_path / "snapshot", dirs_exist_ok=True))

    monkeypatch.setattr(pretrained, "snapshot_download", fetch)
    name = resolve_model("timm/vit_small_patch16_384.augreg_in21k_ft_in1k", cache_dir=tmp_path / "cache")
    assert asked == [
        (
            "timm/vit_small_patch16_384.augreg_in21k_ft_in1k",
            [
                "config.json",
                "preprocessor_config.json",
                "model.safetensors",
                "model.safetensors.index.json",
                "model-*-of-*.safetensors",
            ],
        )
    ]
    config = AutoModel.from_pretrained(name).config
    assert config.provenance["url"].endswith("/timm/vit_small_patch16_384.augreg_in21k_ft_in1k")


@pytest.mark.parametrize("name", ["timm/vit_base_patch16_384.augreg_in21k_ft_in1k", "no/such/path", "nothing.pth"])
def test_names_that_cannot_be_had_say_what_to_do(name) -> None:
    with pytest.raises(FileNotFoundError, match="Check the name; without a network"):
        resolve_model(name)


def test_a_directory_without_weights_is_an_error(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a directory with one of"):
        resolve_model(tmp_path)


@pytest.mark.parametrize("file", ["conversion/convert.py", "models/resampling.py", "data/label_sets/ade20k.json"])
def test_conversions_by_other_code_are_not_taken_for_those_of_this_code(file, tmp_path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "package", ignore=shutil.ignore_patterns("__pycache__", "demo"))
    assert conversion_version(tmp_path / "package") == conversion_version()
    with (tmp_path / "package" / file).open("ab") as changed:
        changed.write(b"\n")
    conversion_version.cache_clear()
    assert conversion_version(tmp_path / "package") != conversion_version()


def test_a_conversion_is_kept_under_the_digest_of_the_code(tmp_path) -> None:
    assert Path(resolve_model(MMSEG, "setr", cache_dir=tmp_path)).name.endswith(conversion_version())
