"""What holds for a ViT holds for the encoder of every family: decoders, attention, sizes, gradients, export."""

import pytest
import torch
from torch import nn

from segmenter_hf import (
    SegmenterConfig,
    SegmenterForSemanticSegmentation,
    SetrConfig,
    SetrForSemanticSegmentation,
)
from segmenter_hf.inference.attention import attention_rows
from segmenter_hf.models.modeling_vit_encoder import (
    cosines_and_sines,
    rotary_angles,
    rotate,
)
from segmenter_hf.models.resampling import resize_position_embeddings

from ..tiny_models import spread_weights
from ..versions import needs_compile


SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}
BICUBIC = {"position_embedding_interpolation": "bicubic"}
LAYER_SCALE = {"layerscale_value": 1.0, "patch_size": 14, "image_size": 56}
FAMILIES = {
    "dinov2": {**LAYER_SCALE, **BICUBIC, "position_embedding_offset": 0.1},
    "dinov2_with_registers": {
        **LAYER_SCALE,
        **BICUBIC,
        "position_embedding_antialias": True,
        "num_register_tokens": 4,
        "use_gated_mlp": True,
        "hidden_act": "silu",
        "padding": "center",
    },
    "dinov3": {
        "layerscale_value": 1.0,
        "patch_size": 8,
        "image_size": 32,
        "num_register_tokens": 4,
        "position_embedding_type": "rotary",
        "key_bias": False,
    },
    "siglip": {**BICUBIC, "patch_size": 8, "image_size": 32, "use_class_token": False},
    "clip": {**BICUBIC, "patch_size": 8, "image_size": 32, "use_pre_layer_norm": True, "hidden_act": "quick_gelu"},
}
DECODERS = {
    "linear": {"decoder_type": "linear", "decoder_norm": "batch_norm", "out_indices": [1, 3]},
    "mask_transformer": {"decoder_type": "mask_transformer"},
    "naive": {"decoder_type": "naive", "decoder_hidden_size": 16},
    "pup": {"decoder_type": "pup", "decoder_hidden_size": 16},
    "mla": {"decoder_type": "mla", "decoder_hidden_size": 16},
}


def make_model(family: str, decoder: str = "mask_transformer", **changes: object) -> nn.Module:
    """A tiny model in evaluation mode whose weights are far from their initial ones."""
    torch.manual_seed(0)
    fields = {**SIZES, **FAMILIES[family], **DECODERS[decoder], "num_labels": 5, "drop_path_rate": 0.0, **changes}
    if decoder in ("linear", "mask_transformer"):
        return spread_weights(SegmenterForSemanticSegmentation(SegmenterConfig(**fields)))
    return spread_weights(SetrForSemanticSegmentation(SetrConfig(**fields)))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_decoder_learns_on_every_encoder_at_sizes_that_the_patch_does_not_divide(family, decoder) -> None:
    model = make_model(family, decoder).train()
    patch_size = model.config.patch_size
    pixel_values = torch.randn(2, 3, 3 * patch_size + 3, 2 * patch_size + 1)
    labels = torch.randint(5, (2, *pixel_values.shape[-2:]))
    outputs = model(pixel_values, labels=labels)
    outputs.loss.backward()
    unused = (
        "cls_token",
        "layernorm.weight",
        "layernorm.bias",
    )  # of encoders whose decoder needs no such token or norm
    still = [
        name
        for name, parameter in model.named_parameters()
        if (parameter.grad is None or not parameter.grad.any()) and not name.endswith(unused)
    ]
    # Softmax over the keys does not see a number that is added to all of them.
    assert not [name for name in still if not name.endswith("k_proj.bias")]
    assert outputs.logits.shape[:2] == (2, 5)
    assert outputs.logits.isfinite().all()


@needs_compile
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_compiled_model_agrees(family) -> None:
    model = make_model(family)
    pixel_values = torch.randn(2, 3, 5 * model.config.patch_size + 3, 3 * model.config.patch_size)
    expected = model(pixel_values).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(pixel_values).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_implementations_of_attention_agree(family) -> None:
    model = make_model(family)
    patch_size = model.config.patch_size
    pixel_values = torch.randn(2, 3, 5 * patch_size + 3, 3 * patch_size)
    expected = model(pixel_values).logits
    model.set_attn_implementation("eager")
    outputs = model(pixel_values, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(outputs.logits, expected, rtol=1e-4, atol=1e-4)
    prefix = model.segmenter.embeddings.num_prefix_tokens
    assert outputs.hidden_states[0].shape == (2, prefix + 6 * 3, 32)
    for layer in (0, 3):
        rows = attention_rows(model, pixel_values, [0, prefix + 4], layer)
        torch.testing.assert_close(rows, outputs.attentions[layer][:, :, [0, prefix + 4]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_keeps_the_gradients_of_every_encoder(family) -> None:
    model = make_model(family).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    pixel_values = torch.randn(1, 3, 2 * model.config.patch_size, 3 * model.config.patch_size)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(pixel_values).logits.square().mean().backward()
        gradients.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_saved_model_of_every_family_is_the_same_after_loading(family, tmp_path) -> None:
    model = make_model(family, "linear")
    model.save_pretrained(tmp_path)
    loaded = SegmenterForSemanticSegmentation.from_pretrained(tmp_path).eval()
    pixel_values = torch.randn(1, 3, 50, 33)
    assert torch.equal(loaded(pixel_values).logits, model(pixel_values).logits)


@torch.no_grad()
def test_layers_of_the_linear_decoder_go_through_the_final_norm_side_by_side() -> None:
    model = make_model("dinov2_with_registers", "linear")
    pixel_values = torch.randn(2, 3, 28, 42)
    states = model(pixel_values, output_hidden_states=True).hidden_states
    encoder, decoder = model.segmenter, model.decode_head
    features = torch.cat([encoder.layernorm(states[index + 1])[:, 5:] for index in (1, 3)], dim=-1)
    norm = decoder.batch_norm
    features = (features - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    expected = decoder.classifier(features).transpose(1, 2).unflatten(2, (2, 3))
    torch.testing.assert_close(model(pixel_values).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_registers_stand_between_class_token_and_patches_without_a_position() -> None:
    embeddings = make_model("dinov2_with_registers").segmenter.embeddings
    tokens = embeddings(torch.randn(2, 3, 42, 28))
    assert tokens.shape == (2, 1 + 4 + 6, 32)
    assert torch.equal(tokens[:, 1:5], embeddings.register_tokens.expand(2, -1, -1))
    assert torch.equal(
        tokens[:, 0], (embeddings.cls_token + embeddings.position_embeddings[:, :1])[:, 0].expand(2, -1)
    )


def test_initial_layer_scale_is_the_one_of_the_configuration_and_decoders_have_none() -> None:
    model = SegmenterForSemanticSegmentation(
        SegmenterConfig(**SIZES, **{**FAMILIES["dinov2"], "layerscale_value": 0.5})
    )
    scales = {name: value for name, value in model.named_parameters() if "layer_scale" in name}
    assert {f"segmenter.layers.{i}.layer_scale{j}" for i in range(4) for j in (1, 2)} == set(scales)
    assert all(torch.equal(scale, torch.full((32,), 0.5)) for scale in scales.values())


def test_rotary_positions_are_those_of_a_loop() -> None:
    rows, columns, head_dim, theta = 2, 3, 16, 100.0
    angles = rotary_angles((rows, columns), head_dim, theta, torch.device("cpu"))
    cosines, sines = cosines_and_sines(angles, 2)
    states = torch.randn(2 + rows * columns, head_dim)
    rotated = rotate(states, cosines, sines)
    assert torch.equal(rotated[:2], states[:2])
    for index in range(rows * columns):
        center = (2 * (index // columns + 0.5) / rows - 1, 2 * (index % columns + 0.5) / columns - 1)
        for half in range(head_dim // 2):
            angle = torch.tensor(2 * torch.pi * center[half // 4] / theta ** (half % 4 / 4))
            first, second = states[2 + index, half], states[2 + index, half + head_dim // 2]
            expected = first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()
            got = rotated[2 + index, half], rotated[2 + index, half + head_dim // 2]
            torch.testing.assert_close(torch.stack(got), torch.stack(expected))


@pytest.mark.parametrize(("offset", "mode"), [(0.1, "bicubic"), (0.25, "bilinear")])
def test_the_offset_is_in_the_scale_of_the_resize(offset, mode) -> None:
    positions, old, new = torch.randn(1, 1 + 20, 8), (4, 5), (7, 3)
    patches = positions[:, 1:].unflatten(1, old).permute(0, 3, 1, 2)
    scale = [(n + offset) / m for n, m in zip(new, old)]
    expected = nn.functional.interpolate(patches, scale_factor=scale, mode=mode, align_corners=False)
    got = resize_position_embeddings(positions, old, new, mode, offset=offset)
    assert torch.equal(got[:, 0], positions[:, 0])
    torch.testing.assert_close(got[:, 1:], expected.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position_embedding_offset": 0.1, "position_embedding_antialias": True}, "exclude each other"),
        ({"position_embedding_type": "rotary", "hidden_size": 36, "num_attention_heads": 6}, "multiple of 4 channels"),
        ({"position_embedding_offset": 1.0}, "below 1"),
        ({"rope_theta": 0.0}, "`rope_theta` must be positive"),
        ({"num_register_tokens": -1}, "`num_register_tokens` must be from 0"),
        ({"layerscale_value": float("inf")}, "`layerscale_value` must be finite"),
        ({"padding": "left"}, "padding"),
        ({"out_indices": [1]}, 'options of `decoder_type="linear"`'),
        ({"decoder_norm": "batch_norm"}, 'options of `decoder_type="linear"`'),
        ({"decoder_type": "linear", "out_indices": [1, 12]}, "from 0 to 11"),
        ({"decoder_type": "linear", "out_indices": []}, "from 0 to 11"),
        ({"decoder_type": "linear", "out_indices": [2, 2]}, "ascending"),
    ],
)
def test_options_that_do_not_fit_are_refused(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        SegmenterConfig(**fields)


def test_single_biases_follow_from_all_biases_and_old_configurations_stay_as_they_were() -> None:
    old = SegmenterConfig(qkv_bias=False)
    assert (old.query_bias, old.key_bias, old.value_bias) == (False, False, False)
    plain = SegmenterConfig()
    assert (plain.query_bias, plain.num_register_tokens, plain.layerscale_value) == (True, 0, None)
    assert (plain.padding, plain.position_embedding_type, plain.use_gated_mlp) == ("end", "absolute", False)
    model = SegmenterForSemanticSegmentation(SegmenterConfig(**SIZES, key_bias=False))
    names = {name for name, _ in model.named_parameters()}
    assert "segmenter.layers.0.attention.q_proj.bias" in names
    assert "segmenter.layers.0.attention.k_proj.bias" not in names
    assert "decode_head.layers.0.attention.k_proj.bias" in names
