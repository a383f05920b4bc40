"""What the Segmenter models promise beyond the common tests: sizes, loss, precision, loading, initialization."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForSemanticSegmentation, pipeline

from segmenter_hf import (
    SegmenterConfig,
    SegmenterForSemanticSegmentation,
    SegmenterImageProcessor,
    SegmenterModel,
)
from segmenter_hf.models.modeling_vit_encoder import VitEncoderDropPath, VitEncoderEmbeddings

from ..versions import needs_compile


DECODER_TYPES = ("mask_transformer", "linear")


def tiny_config(**changes: object) -> SegmenterConfig:
    fields = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "image_size": (16, 24),
        "patch_size": 8,
        "num_labels": 5,
    }
    return SegmenterConfig(**{**fields, **changes})


def tiny_model(**changes: object) -> SegmenterForSemanticSegmentation:
    """A tiny model in evaluation mode, with weights large enough for every part to have an effect."""
    model = SegmenterForSemanticSegmentation(tiny_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def images(height: int = 16, width: int = 24, batch_size: int = 2) -> torch.Tensor:
    return torch.randn(batch_size, 3, height, width)


def random_labels(height: int = 16, width: int = 24, batch_size: int = 2) -> torch.Tensor:
    labels = torch.randint(5, (batch_size, height, width))
    labels[:, :3] = 255
    return labels


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# Sizes


@pytest.mark.parametrize("decoder_type", DECODER_TYPES)
@pytest.mark.parametrize(
    "height, width, grid", [(16, 24, (2, 3)), (24, 16, (3, 2)), (17, 31, (3, 4)), (40, 8, (5, 1)), (5, 9, (1, 2))]
)
def test_images_of_any_size_give_one_row_of_scores_for_each_patch(
    decoder_type: str, height: int, width: int, grid: tuple[int, int]
) -> None:
    model = tiny_model(decoder_type=decoder_type)
    assert model(images(height, width)).logits.shape == (2, 5, *grid)
    assert model.segmenter(images(height, width)).last_hidden_state.shape == (2, 1 + grid[0] * grid[1], 32)


def test_images_are_padded_with_zeros_to_the_right_and_at_the_bottom() -> None:
    model, pixel_values = tiny_model(), images(17, 21)
    padded = torch.zeros(2, 3, 24, 24)
    padded[:, :, :17, :21] = pixel_values
    torch.testing.assert_close(model(pixel_values).logits, model(padded).logits, rtol=0, atol=0)


def test_without_attention_a_pixel_moves_the_scores_of_its_own_patch_alone() -> None:
    """Rows and columns of the logits are those of the image: on a non-square grid a transposition would show."""
    model = tiny_model(decoder_type="linear")
    for layer in model.segmenter.layers:
        nn.init.zeros_(layer.attention.o_proj.weight)
    pixel_values = images(24, 40, batch_size=1)
    changed = pixel_values.clone()
    changed[:, :, 9, 30] += 1.0
    difference = model(changed).logits - model(pixel_values).logits
    assert difference.abs().sum(1)[0].nonzero().tolist() == [[1, 3]]


def test_the_scores_follow_the_order_of_the_class_embeddings() -> None:
    model, pixel_values, order = tiny_model(), images(), torch.tensor([3, 0, 4, 1, 2])
    expected = model(pixel_values).logits[:, order]
    head = model.decode_head
    with torch.no_grad():
        head.class_embeddings.copy_(head.class_embeddings[:, order])
        head.mask_norm.weight.copy_(head.mask_norm.weight[order])
        head.mask_norm.bias.copy_(head.mask_norm.bias[order])
    torch.testing.assert_close(model(pixel_values).logits, expected)


def test_images_of_the_wrong_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(batch_size, 3, height, width\), got \(2, 4, 16, 24\)"):
        tiny_model()(torch.zeros(2, 4, 16, 24))
    with pytest.raises(ValueError, match=r"got \(3, 16, 24\)"):
        tiny_model()(torch.zeros(3, 16, 24))
    assert tiny_model(num_channels=4)(torch.zeros(2, 4, 16, 24)).logits.shape == (2, 5, 2, 3)


# Loss


@pytest.mark.parametrize("ignore_index", [255, -100])
@pytest.mark.parametrize("size, padded_size", [((16, 24), (16, 24)), ((13, 27), (16, 32))])
def test_the_loss_is_the_cross_entropy_at_the_padded_size(
    size: tuple[int, int], padded_size: tuple[int, int], ignore_index: int
) -> None:
    model = tiny_model(semantic_loss_ignore_index=ignore_index)
    pixel_values, labels = images(*size), random_labels(*size)
    labels[labels == 255] = ignore_index
    loss = model(pixel_values, labels=labels).loss
    loss.backward()

    reference = SegmenterForSemanticSegmentation(model.config).eval().double()
    reference.load_state_dict(model.state_dict())
    padded_labels = torch.full((2, *padded_size), ignore_index)
    padded_labels[:, : size[0], : size[1]] = labels
    upsampled = F.interpolate(reference(pixel_values).logits, size=padded_size, mode="bilinear")
    expected = F.cross_entropy(upsampled, padded_labels, ignore_index=ignore_index)
    expected.backward()

    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for name, gradient in gradients(reference).items():
        torch.testing.assert_close(gradients(model)[name].double(), gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("decoder_type", DECODER_TYPES)
def test_a_batch_of_ignored_pixels_gives_zero_loss_and_zero_gradients(decoder_type: str) -> None:
    model = tiny_model(decoder_type=decoder_type).train()
    loss = model(images(), labels=torch.full((2, 16, 24), 255)).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients(model).values())


def test_labels_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`labels` must have the height and width of `pixel_values`, \(16, 24\)"):
        tiny_model()(images(), labels=torch.zeros(2, 2, 3, dtype=torch.long))


def test_trainer_divides_the_loss_by_the_accumulation_steps() -> None:
    assert SegmenterForSemanticSegmentation.accepts_loss_kwargs is False


# Attention, checkpointing, compilation, precision


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_every_attention_implementation_agrees_with_the_written_out_one(attention: str) -> None:
    model, pixel_values = tiny_model(), images()
    model.set_attn_implementation("eager")
    expected = model(pixel_values).logits
    model.set_attn_implementation(attention)
    with torch.compiler.set_stance("force_eager"), torch.no_grad():  # flex attention would compile for half a minute
        logits = model(pixel_values).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_attention_dropout_acts_in_training_only() -> None:
    model = tiny_model(attention_probs_dropout_prob=0.5, drop_path_rate=0.0).segmenter
    model.set_attn_implementation("eager")
    pixel_values = images()
    assert torch.equal(model(pixel_values).last_hidden_state, model(pixel_values).last_hidden_state)
    model.train()
    assert not torch.equal(model(pixel_values).last_hidden_state, model(pixel_values).last_hidden_state)


@pytest.mark.parametrize("decoder_type", DECODER_TYPES)
def test_gradient_checkpointing_keeps_loss_and_gradients(decoder_type: str) -> None:
    model = tiny_model(decoder_type=decoder_type, drop_path_rate=0.3, hidden_dropout_prob=0.1).train()
    pixel_values, labels = images(), random_labels()

    def train_step() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        torch.manual_seed(3)
        loss = model(pixel_values, labels=labels).loss
        loss.backward()
        return loss.detach(), gradients(model)

    expected = train_step()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    torch.testing.assert_close(train_step(), expected)


@needs_compile
@pytest.mark.parametrize("decoder_type", DECODER_TYPES)
def test_the_model_compiles_without_a_graph_break(decoder_type: str) -> None:
    torch.compiler.reset()  # what other tests compiled counts towards the limit
    model = tiny_model(decoder_type=decoder_type)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    pixel_values, labels = images(17, 27), random_labels(17, 27)
    expected, output = model(pixel_values, labels=labels), compiled(pixel_values, labels=labels)
    torch.testing.assert_close(output.logits, expected.logits)
    torch.testing.assert_close(output.loss, expected.loss)
    with torch.no_grad():
        torch.testing.assert_close(compiled(pixel_values).logits, expected.logits)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.2), (torch.float16, 0.02)])
@pytest.mark.parametrize("decoder_type", DECODER_TYPES)
def test_half_precision_stays_close(decoder_type: str, dtype: torch.dtype, tolerance: float) -> None:
    model, pixel_values, labels = tiny_model(decoder_type=decoder_type), images(17, 27), random_labels(17, 27)
    expected = model(pixel_values, labels=labels)
    output = model.to(dtype)(pixel_values, labels=labels)  # pixels stay float32: the model casts them
    assert output.logits.dtype == dtype
    assert output.loss.dtype == torch.float32
    error = (output.logits.float() - expected.logits).abs().max() / expected.logits.abs().max()
    assert error < tolerance
    torch.testing.assert_close(output.loss, expected.loss, rtol=tolerance, atol=0)


def test_autocast_stays_close() -> None:
    model, pixel_values, labels = tiny_model(), images(), random_labels()
    expected = model(pixel_values, labels=labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(pixel_values, labels=labels)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected.loss, rtol=0.1, atol=0)


# Drop path


def test_drop_path_rises_linearly_over_the_layers_of_encoder_and_decoder() -> None:
    model = SegmenterForSemanticSegmentation(
        tiny_config(num_hidden_layers=5, drop_path_rate=0.2, decoder_drop_path_rate=0.3)
    )
    assert [layer.drop_path.rate for layer in model.segmenter.layers] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert [layer.drop_path.rate for layer in model.decode_head.layers] == [0, 0.3]
    assert SegmenterModel(tiny_config(num_hidden_layers=1, drop_path_rate=0.2)).layers[0].drop_path.rate == 0


def test_drop_path_drops_whole_images_and_keeps_the_mean() -> None:
    drop_path = VitEncoderDropPath(0.25)
    dropped = drop_path(torch.ones(20_000, 2, 3))
    assert (dropped == dropped[:, :1, :1]).all()
    values = dropped[:, 0, 0]
    assert values.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (values == 0).float().mean() == pytest.approx(0.25, abs=0.01)
    assert values.mean() == pytest.approx(1.0, abs=0.015)


def test_drop_path_does_nothing_in_evaluation_or_at_rate_zero() -> None:
    hidden_states = torch.randn(3, 2, 4)
    assert VitEncoderDropPath(0.9).eval()(hidden_states) is hidden_states
    assert VitEncoderDropPath(0.0).train()(hidden_states) is hidden_states


# Embeddings


def test_the_distillation_token_follows_the_class_token_and_is_not_decoded() -> None:
    model, pixel_values = tiny_model(use_distillation_token=True, decoder_type="linear"), images()
    tokens = model.segmenter(pixel_values).last_hidden_state
    assert tokens.shape == (2, 2 + 6, 32)
    masks = model.decode_head.classifier(tokens[:, 2:])
    torch.testing.assert_close(model(pixel_values).logits, masks.transpose(1, 2).reshape(2, 5, 2, 3))

    embeddings = model.segmenter.embeddings
    prefix = embeddings(pixel_values)[0, :2]
    torch.testing.assert_close(prefix[0], embeddings.cls_token[0, 0] + embeddings.position_embeddings[0, 0])
    torch.testing.assert_close(prefix[1], embeddings.distillation_token[0, 0] + embeddings.position_embeddings[0, 1])


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("grid", [(4, 3), (1, 7), (5, 6)])
def test_position_embeddings_are_resized_to_the_grid(mode: str, grid: tuple[int, int]) -> None:
    embeddings = VitEncoderEmbeddings(tiny_config(position_embedding_interpolation=mode, use_distillation_token=True))
    nn.init.normal_(embeddings.position_embeddings)
    resized = embeddings.position_embeddings_for(grid)
    assert torch.equal(resized[:, :2], embeddings.position_embeddings[:, :2])
    trained = embeddings.position_embeddings[:, 2:].view(2, 3, 32).permute(2, 0, 1)[None]
    expected = F.interpolate(trained, grid, mode=mode)[0].permute(1, 2, 0).reshape(1, -1, 32)
    torch.testing.assert_close(resized[:, 2:], expected)


def test_position_embeddings_of_the_trained_grid_are_used_as_they_are() -> None:
    embeddings = VitEncoderEmbeddings(tiny_config())
    assert embeddings.position_embeddings_for((2, 3)) is embeddings.position_embeddings


# Outputs


def test_states_and_attentions_of_encoder_and_decoder_have_their_shapes() -> None:
    model = tiny_model(decoder_hidden_size=24, decoder_num_attention_heads=3, decoder_num_hidden_layers=3)
    model.set_attn_implementation("eager")
    pixel_values = images(17, 24)
    output = model(pixel_values, output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 1 + 9, 32)] * 3
    assert [tuple(attention.shape) for attention in output.attentions] == [(2, 4, 10, 10)] * 2
    assert [tuple(state.shape) for state in output.decoder_hidden_states] == [(2, 9 + 5, 24)] * 4
    assert [tuple(attention.shape) for attention in output.decoder_attentions] == [(2, 3, 14, 14)] * 3
    for attention in (*output.attentions, *output.decoder_attentions):
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))
    encoder = model.segmenter
    torch.testing.assert_close(output.hidden_states[0], encoder.embeddings(pixel_values))
    torch.testing.assert_close(
        encoder.layernorm(output.hidden_states[-1]),
        encoder(pixel_values).last_hidden_state,
        msg="before the last norm",
    )


def test_the_linear_decoder_has_no_states_of_its_own() -> None:
    model = tiny_model(decoder_type="linear")
    model.set_attn_implementation("eager")
    output = model(images(), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3
    assert len(output.attentions) == 2
    assert output.decoder_hidden_states is None
    assert output.decoder_attentions is None


def test_states_and_attentions_come_on_request_only() -> None:
    output = tiny_model()(images(), labels=random_labels())
    assert list(output) == ["loss", "logits"]


def test_window_offsets_pass_through_unchanged() -> None:
    window_offsets = torch.arange(22).view(2, 11)
    output = tiny_model()(images(), window_offsets=window_offsets)
    assert output.window_offsets is window_offsets


def test_outputs_are_a_tuple_on_request() -> None:
    model, pixel_values, labels = tiny_model(), images(), random_labels()
    output = model(pixel_values, labels=labels)
    loss, logits = model(pixel_values, labels=labels, return_dict=False)
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)


# Pipeline


def test_the_pipeline_runs_the_sliding_window_protocol() -> None:
    model = tiny_model()
    processor = SegmenterImageProcessor(size={"shortest_edge": 16}, window_size=16, window_stride=12, patch_size=8)
    pixels = np.random.default_rng(0).integers(256, size=(21, 50, 3), dtype=np.uint8)
    inputs = processor(pixels)
    assert len(inputs.pixel_values) == 3
    [expected] = processor.post_process_semantic_segmentation(model(**inputs))

    segmenter = pipeline("image-segmentation", model=model, image_processor=processor)
    regions = segmenter(PIL.Image.fromarray(pixels))
    assert {region["label"] for region in regions} == {
        model.config.id2label[label] for label in expected.unique().tolist()
    }
    for region in regions:
        mask = torch.from_numpy(np.array(region["mask"])) == 255
        assert torch.equal(mask, expected == model.config.label2id[region["label"]])
    batch = segmenter([PIL.Image.fromarray(pixels)] * 2, batch_size=2)
    assert [[region["mask"].tobytes() for region in one] for one in batch] == [
        [r["mask"].tobytes() for r in regions]
    ] * 2


# Loading


@pytest.mark.parametrize("decoder_type", DECODER_TYPES)
@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
def test_a_saved_model_loads_to_the_same_scores(tmp_path: Path, decoder_type: str, device_map: str | None) -> None:
    model, pixel_values = tiny_model(decoder_type=decoder_type), images(17, 27)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForSemanticSegmentation.from_pretrained(
        tmp_path, device_map=device_map, output_loading_info=True
    )
    assert type(loaded) is SegmenterForSemanticSegmentation
    assert not any(info.values())
    logits = loaded.to("cpu")(pixel_values).logits
    torch.testing.assert_close(logits, model(pixel_values).logits, rtol=0, atol=0)


def test_the_encoder_loads_from_a_whole_model(tmp_path: Path) -> None:
    model, pixel_values = tiny_model(), images()
    model.save_pretrained(tmp_path)
    encoder = AutoModel.from_pretrained(tmp_path)
    assert type(encoder) is SegmenterModel
    expected = model.segmenter(pixel_values).last_hidden_state
    torch.testing.assert_close(encoder(pixel_values).last_hidden_state, expected, rtol=0, atol=0)


@pytest.mark.parametrize("decoder_type", DECODER_TYPES)
def test_an_encoder_loads_under_a_new_initialised_head(tmp_path: Path, decoder_type: str) -> None:
    encoder = tiny_model(hidden_size=64).segmenter
    encoder.save_pretrained(tmp_path)
    model, info = SegmenterForSemanticSegmentation.from_pretrained(
        tmp_path, decoder_type=decoder_type, num_labels=150, output_loading_info=True
    )
    head = {f"decode_head.{name}" for name in model.decode_head.state_dict()}
    assert info["missing_keys"] == head
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(model.segmenter.state_dict()[name], tensor), name
    check_initialization(model.decode_head)


def test_a_model_loads_with_another_number_of_labels(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        SegmenterForSemanticSegmentation.from_pretrained(tmp_path, num_labels=150)
    loaded, info = SegmenterForSemanticSegmentation.from_pretrained(
        tmp_path, num_labels=150, ignore_mismatched_sizes=True, output_loading_info=True
    )
    names = {key for key, *_ in info["mismatched_keys"]}
    assert names == {f"decode_head.{name}" for name in ("class_embeddings", "mask_norm.weight", "mask_norm.bias")}
    assert loaded(images()).logits.shape == (2, 150, 2, 3)
    assert torch.equal(loaded.decode_head.projection.weight, model.decode_head.projection.weight)
    assert loaded.decode_head.class_embeddings.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(loaded.decode_head.mask_norm.weight, torch.ones(150))


# Initialization


def check_initialization(module: nn.Module, width: int = 64) -> None:
    """Norms are the identity, biases 0, the products of the mask decoder normal with width^-0.5, the rest with 0.02."""
    for name, parameter in module.named_parameters():
        if "norm" in name or name.endswith("bias"):
            expected = torch.ones_like(parameter) if name.endswith("weight") else torch.zeros_like(parameter)
            assert torch.equal(parameter, expected), name
        else:
            is_product = name.endswith(("patch_projection.weight", "class_projection.weight"))
            std = width**-0.5 if is_product else 0.02
            error = 4 * std / parameter.numel() ** 0.5
            assert parameter.mean().item() == pytest.approx(0, abs=error), name
            assert parameter.std().item() == pytest.approx(std, abs=error), name


@pytest.mark.parametrize("decoder_type", DECODER_TYPES)
def test_new_weights_have_the_statistics_of_the_original(decoder_type: str) -> None:
    check_initialization(
        SegmenterForSemanticSegmentation(
            tiny_config(decoder_type=decoder_type, hidden_size=64, num_labels=150, use_distillation_token=True)
        )
    )


def test_the_initializer_range_is_the_configuration_s() -> None:
    model = SegmenterModel(tiny_config(initializer_range=0.1))
    assert model.layers[0].mlp.fc1.weight.std().item() == pytest.approx(0.1, rel=0.1)
