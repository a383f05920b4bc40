"""Models that merge tokens: the original's outputs, and everything else that models do."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSemanticSegmentation

from segmenter_hf import (
    Predictor,
    SegmenterConfig,
    SegmenterForSemanticSegmentation,
    SetrConfig,
    SetrForSemanticSegmentation,
    convert_checkpoint,
)
from segmenter_hf.export.onnx import export_onnx
from segmenter_hf.inference.attention import attention_rows

from ..tiny_models import save_tiny_scenes_model, spread_weights


ALGM = Path(__file__).parents[1] / "fixtures" / "algm" / "mask"
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 64,
    "patch_size": 8,
    "num_labels": 5,
    "drop_path_rate": 0.0,
}
MERGING = {"token_merging_layers": [0, 2], "token_merging_threshold": 0.3}
MODELS = {
    "mask": (SegmenterForSemanticSegmentation, SegmenterConfig, {"decoder_num_attention_heads": 2}),
    "linear": (SegmenterForSemanticSegmentation, SegmenterConfig, {"decoder_type": "linear"}),
    "linear, two layers": (
        SegmenterForSemanticSegmentation,
        SegmenterConfig,
        {"decoder_type": "linear", "out_indices": [1, 3], "decoder_norm": "batch_norm"},
    ),
    "rotary": (
        SegmenterForSemanticSegmentation,
        SegmenterConfig,
        {
            "position_embedding_type": "rotary",
            "num_register_tokens": 3,
            "key_bias": False,
            "layerscale_value": 0.5,
            "use_gated_mlp": True,
            "decoder_num_attention_heads": 2,
        },
    ),
    "mla": (
        SetrForSemanticSegmentation,
        SetrConfig,
        {
            "decoder_type": "mla",
            "out_indices": [0, 1, 2, 3],
            "neck_hidden_size": 8,
            "decoder_hidden_size": 8,
            "auxiliary_hidden_size": 8,
            "token_merging_threshold": 0.9,
        },
    ),
}


def make_model(name: str, **fields: object) -> torch.nn.Module:
    model_class, config_class, options = MODELS[name]
    fields = {**SMALL, **MERGING, **options, **fields}
    try:
        config = config_class(**fields)
    except (TypeError, ValueError):
        pytest.fail(f"{name}: {fields}")
    return spread_weights(model_class(config))


def images(batch_size: int = 3) -> torch.Tensor:
    """Images of smooth regions, so that each keeps another number of tokens; the patch does not divide their sides."""
    coarse = torch.randn(batch_size, 3, 2, 3) * torch.linspace(0.2, 3, batch_size)[:, None, None, None]
    smooth = torch.nn.functional.interpolate(coarse, (60, 76), mode="nearest")
    return (
        smooth
        + 0.1 * torch.randn(batch_size, 3, 60, 76) * torch.tensor([0.1, 3.0, 8.0])[:batch_size, None, None, None]
    )


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    return convert_checkpoint(ALGM / "checkpoint.pth", tmp_path_factory.mktemp("algm") / "model")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_original_gives_the_same(converted, attention) -> None:
    expected = np.load(ALGM / "expected.npz")
    model = AutoModelForSemanticSegmentation.from_pretrained(converted, attn_implementation=attention).eval()
    assert list(model.config.token_merging_layers) == [0, 2] and model.config.token_merging_threshold == 0.6
    for number in range(3):
        model.config.token_merging_batchwise = number == 2  # a batch of three images
        pixel_values = torch.from_numpy(expected[f"pixel_values_{number}"]).float()
        with torch.no_grad():
            encoded, logits = model.segmenter(pixel_values), model(pixel_values).logits
        tokens = torch.from_numpy(expected[f"encoder_{number}"])
        assert torch.equal(encoded.merged_tokens[-1].source, torch.from_numpy(expected[f"assignment_{number}"]).long())
        assert torch.allclose(encoded.merged_hidden_state, tokens, atol=1e-4)
        assert torch.allclose(logits, torch.from_numpy(expected[f"patch_logits_{number}"]), atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_an_image_gives_the_same_alone_and_in_a_batch(name) -> None:
    model, pixel_values = make_model(name), images()
    with torch.no_grad():
        together = model(pixel_values).logits
        tokens = model.base_model(pixel_values).merged_tokens[-1].sizes
        assert len(set((tokens > 0).sum(1).tolist())) > 1
        for index in range(3):
            alone = model(pixel_values[index : index + 1]).logits
            assert torch.allclose(alone[0], together[index], atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_implementations_of_attention_agree(name) -> None:
    model, pixel_values = make_model(name), images()
    results = []
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            results.append(model(pixel_values).logits)
    assert torch.allclose(*results, atol=1e-4)


@pytest.mark.parametrize("name", ["mask", "rotary", "mla"])
def test_states_and_attentions_are_of_patches(name) -> None:
    model, pixel_values = make_model(name), images()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = model(pixel_values, output_hidden_states=True, output_attentions=True)
        plain = make_model(name, token_merging_layers=None)
        plain.load_state_dict(model.state_dict())
        plain.set_attn_implementation("eager")
        expected = plain(pixel_values, output_hidden_states=True, output_attentions=True)
    prefix = model.base_model.embeddings.num_prefix_tokens
    for states, reference in zip(outputs.hidden_states, expected.hidden_states, strict=True):
        assert states.shape == reference.shape
    assert torch.allclose(outputs.hidden_states[0], expected.hidden_states[0])
    assert torch.allclose(outputs.attentions[0], expected.attentions[0], atol=1e-5)  # a layer attends, then merges
    for index, (attention, reference) in enumerate(zip(outputs.attentions, expected.attentions, strict=True)):
        assert attention.shape == reference.shape
        assert torch.allclose(attention.sum(-1), torch.ones(()), atol=1e-5)
        rows = attention_rows(model, pixel_values, [0, prefix + 5], index)
        assert torch.allclose(rows, attention[:, :, [0, prefix + 5]], atol=1e-5)
    if name != "mla":
        assert outputs.decoder_hidden_states[-1].shape == expected.decoder_hidden_states[-1].shape
        rows = attention_rows(model, pixel_values, [80, 83], 0, decoder=True)
        assert torch.allclose(rows, outputs.decoder_attentions[0][:, :, [80, 83]], atol=1e-5)
    as_tuple = model(pixel_values, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.allclose(as_tuple[0], outputs.logits, atol=1e-5)


@pytest.mark.parametrize("name", ["mask", "linear, two layers", "mla"])
def test_it_trains_with_gradient_checkpointing_too(name) -> None:
    pixel_values, labels = images(), torch.randint(5, (3, 60, 76))
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = make_model(name).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.config.hidden_dropout_prob = 0.0
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
            if hasattr(module, "rate"):
                module.rate = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(pixel_values, labels=labels).loss.backward()
        gradients.append(model.base_model.layers[0].mlp.fc1.weight.grad)
        assert all(
            parameter.grad is not None and torch.isfinite(parameter.grad).all()
            for parameter in model.base_model.layers.parameters()
        )
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6) and gradients[0].abs().sum() > 0


def test_a_model_trained_without_it_can_be_run_with_it(tmp_path) -> None:
    save_tiny_scenes_model(tmp_path / "model")
    image = np.zeros((48, 64, 3), np.uint8)
    plain = Predictor.from_pretrained(tmp_path / "model", device="cpu")
    merging = Predictor.from_pretrained(tmp_path / "model", device="cpu", token_merging=True)
    assert plain.model.config.token_merging_layers is None
    assert list(merging.model.config.token_merging_layers) == [0]
    assert merging(image).class_map.shape == plain(image).class_map.shape
    few = Predictor.from_pretrained(tmp_path / "model", device="cpu", token_merging_threshold=0.95)
    assert list(few.model.config.token_merging_layers) == [0] and few.model.config.token_merging_threshold == 0.95
    with pytest.raises(ValueError, match="from -1 to 1, got 7"):
        Predictor.from_pretrained(tmp_path / "model", device="cpu", token_merging_threshold=7.0)
    with pytest.raises(ValueError, match="exclude each other"):
        Predictor.from_pretrained(tmp_path / "model", device="cpu", token_merging=True, compile=True)


def test_it_is_not_exported(tmp_path) -> None:
    make_model("linear").save_pretrained(tmp_path / "model")
    save_tiny_scenes_model(tmp_path / "other")
    (tmp_path / "other" / "preprocessor_config.json").rename(tmp_path / "model" / "preprocessor_config.json")
    with pytest.raises(ValueError, match="`token_merging_layers` to null"):
        export_onnx(tmp_path / "model", tmp_path / "onnx")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_merging_layers": [4]}, "rising numbers from 0 to 3"),
        ({"token_merging_layers": [2, 0]}, "rising numbers"),
        ({"token_merging_window_size": 1}, "2 patches or more"),
        ({"token_merging_window_size": [2, 2, 2]}, "2 patches or more"),
        ({"token_merging_threshold": 1.5}, "from -1 to 1"),
        ({"token_merging_threshold": float("nan")}, "must be finite"),
    ],
)
def test_impossible_fields_are_refused(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        SegmenterConfig(**SMALL, **{**MERGING, **fields})
