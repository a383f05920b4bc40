"""What the SETR models promise beyond the common tests: resolutions, auxiliary heads, loss, batch norm, loading."""

import copy
from pathlib import Path

import PIL.Image
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, pipeline

from segmenter_hf import SegmenterImageProcessor, SetrConfig, SetrForSemanticSegmentation, SetrModel
from segmenter_hf.models.modeling_setr import SetrBatchNorm

from ..versions import needs_compile


DECODER_TYPES = ("naive", "pup", "mla")


def tiny_config(**changes: object) -> SetrConfig:
    fields = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "image_size": (32, 48),
        "patch_size": 16,
        "decoder_hidden_size": 16,
        "num_labels": 5,
    }
    return SetrConfig(**{**fields, **changes})


def tiny_model(**changes: object) -> SetrForSemanticSegmentation:
    """A tiny model in evaluation mode, with weights large enough for every part to have an effect."""
    model = SetrForSemanticSegmentation(tiny_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


# Configuration


def test_the_defaults_are_those_of_the_paper() -> None:
    config = SetrConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (1024, 24, 4096)
    assert (config.decoder_hidden_size, config.auxiliary_loss_weight) == (256, 0.4)
    assert not config.use_final_layer_norm
    expected = {"naive": [9, 14, 19, 23], "pup": [9, 14, 19, 23], "mla": [5, 11, 17, 23]}
    for decoder_type, out_indices in expected.items():
        config = SetrConfig(decoder_type=decoder_type)
        assert config.out_indices == out_indices
        assert config.use_class_token == (decoder_type != "mla")
        assert SetrConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_type": "aspp"}, "decoder_type"),
        ({"out_indices": [3, 1]}, "ascending layers from 0 to 3"),
        ({"out_indices": [0, 4]}, "ascending layers from 0 to 3"),
        ({"out_indices": []}, "ascending layers"),
        ({"decoder_kernel_size": 2}, "must be odd"),
        ({"decoder_num_convs": -1}, "at least 0"),
        ({"auxiliary_upsample_factor": 0}, "at least 1"),
        ({"decoder_type": "mla", "decoder_hidden_size": 15}, "even"),
        ({"auxiliary_loss_weight": -0.1}, "at least 0"),
    ],
)
def test_impossible_configurations_are_refused(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


# Resolutions


@pytest.mark.parametrize(("decoder_type", "stride"), [("naive", 4), ("pup", 1), ("mla", 4)])
@pytest.mark.parametrize("size", [(32, 48), (33, 20)])
def test_logits_have_the_resolution_of_the_head(decoder_type, stride, size) -> None:
    model = tiny_model(decoder_type=decoder_type)
    outputs = model(torch.randn(2, 3, *size), output_auxiliary_logits=True)
    grid = [-(-side // 16) for side in size]
    assert outputs.logits.shape == (2, 5, *(16 // stride * side for side in grid))
    auxiliary_side = 1 if decoder_type == "mla" else 16
    assert [logits.shape for logits in outputs.auxiliary_logits] == [
        (2, 5, *(auxiliary_side * side for side in grid))
    ] * (4 if decoder_type == "mla" else 3)
    assert model(torch.randn(2, 3, *size)).auxiliary_logits is None


def test_without_attention_a_pixel_moves_the_scores_around_its_own_patch_alone() -> None:
    """Rows and columns of the logits are those of the image: on a non-square grid a transposition would show."""
    model = tiny_model(decoder_type="naive")
    for layer in model.setr.layers:
        nn.init.zeros_(layer.attention.o_proj.weight)
    pixel_values = torch.randn(1, 3, 48, 80)
    changed = pixel_values.clone()
    changed[:, :, 20, 40] += 1.0  # patch (1, 2)
    moved = (model(changed).logits - model(pixel_values).logits).abs().sum(1)[0] > 0
    rows, columns = moved.nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 9, 6, 13)  # 4 to 7 and 8 to 11, and 2 around


def test_the_deepest_level_of_the_neck_comes_first() -> None:
    model = tiny_model(decoder_type="mla")
    features = [torch.randn(1, 32, 2, 3) for _ in range(4)]
    changed = [features[0] + 1.0, *features[1:]]
    moved = [not torch.equal(a, b) for a, b in zip(model.neck(features), model.neck(changed))]
    assert moved == [False, False, False, True]


def test_a_factor_of_one_leaves_the_upsampling_to_the_end() -> None:
    once = tiny_model(decoder_type="naive", decoder_upsample_factor=1, auxiliary_upsample_factor=1)
    outputs = once(torch.randn(1, 3, 32, 48), output_auxiliary_logits=True)
    assert outputs.logits.shape == (1, 5, 2, 3)
    assert {logits.shape for logits in outputs.auxiliary_logits} == {(1, 5, 2, 3)}


def test_the_class_token_is_dropped_before_the_layers() -> None:
    with_token, without = tiny_model(use_class_token=True).setr, tiny_model(use_class_token=False).setr
    pixel_values = torch.randn(1, 3, 32, 48)
    assert with_token(pixel_values).last_hidden_state.shape == (1, 7, 32)
    before = without(pixel_values).last_hidden_state
    assert before.shape == (1, 6, 32)
    nn.init.ones_(without.embeddings.cls_token)
    assert torch.equal(without(pixel_values).last_hidden_state, before)


def test_feature_states_are_the_outputs_of_the_named_layers() -> None:
    model = tiny_model(out_indices=[0, 2, 2]).setr
    outputs = model(torch.randn(1, 3, 32, 48), output_hidden_states=True)
    for states, index in zip(outputs.feature_states, [0, 2, 2], strict=True):
        assert torch.equal(states, outputs.hidden_states[index + 1])
    assert isinstance(model.layernorm, nn.Identity)


# Loss


@pytest.mark.parametrize("decoder_type", DECODER_TYPES)
@pytest.mark.parametrize("use_tiled_loss", [True, False])
def test_the_loss_adds_that_of_each_auxiliary_head(decoder_type, use_tiled_loss) -> None:
    model = tiny_model(decoder_type=decoder_type, use_tiled_loss=use_tiled_loss)
    pixel_values, labels = torch.randn(2, 3, 27, 41), torch.randint(5, (2, 27, 41))
    labels[:, :4] = 255
    outputs = model(pixel_values, labels=labels, output_auxiliary_logits=True)
    padded = F.pad(labels, (0, 7, 0, 5), value=255)
    losses = [
        F.cross_entropy(F.interpolate(logits.double(), size=(32, 48), mode="bilinear"), padded, ignore_index=255)
        for logits in (outputs.logits, *outputs.auxiliary_logits)
    ]
    torch.testing.assert_close(outputs.loss.double(), losses[0] + 0.4 * sum(losses[1:]), rtol=1e-5, atol=0)
    outputs.loss.backward()
    for head in model.auxiliary_heads:
        assert head.classifier.weight.grad.abs().sum() > 0


def test_without_auxiliary_heads_the_loss_is_that_of_the_head() -> None:
    model = tiny_model(use_auxiliary_head=False)
    labels = torch.randint(5, (2, 32, 48))
    outputs = model(torch.randn(2, 3, 32, 48), labels=labels, output_auxiliary_logits=True)
    assert outputs.auxiliary_logits == ()
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits, labels))


# Batch norm in distributed training


def train_step(model: nn.Module, features: torch.Tensor) -> torch.Tensor:
    output = model(features)
    output.square().sum().backward()
    return output.detach()


def synchronised_step(rank: int, store: str, model: nn.Module, features: torch.Tensor, results: dict) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = copy.deepcopy(model)  # spawned processes share the tensors of what they are given
    share = features[:1] if rank == 0 else features[1:]  # of unequal size
    output = train_step(model, share)
    gradient = model.weight.grad
    dist.all_reduce(gradient)
    results[rank] = [tensor.tolist() for tensor in (output, gradient, model.running_mean, model.running_var)]
    dist.barrier()
    dist.destroy_process_group()


def test_batch_norm_in_two_processes_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    model = SetrBatchNorm(3)
    nn.init.normal_(model.weight)
    features = torch.randn(3, 3, 4, 5) * 2 + 1
    whole = copy.deepcopy(model)
    expected = train_step(whole, features)
    plain = nn.BatchNorm2d(3)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(features), expected)

    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(synchronised_step, (str(tmp_path / "store"), model, features, results), nprocs=2)
        results = [[torch.tensor(values) for values in results[rank]] for rank in range(2)]
    torch.testing.assert_close(torch.cat([output for output, *_ in results]), expected)
    for _, gradient, running_mean, running_var in results:
        torch.testing.assert_close(gradient, whole.weight.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(running_mean, whole.running_mean)
        torch.testing.assert_close(running_var, whole.running_var)


# Loading and use


@pytest.mark.parametrize("decoder_type", DECODER_TYPES)
def test_a_saved_model_loads_to_the_same_scores(tmp_path: Path, decoder_type: str) -> None:
    model, pixel_values = tiny_model(decoder_type=decoder_type), torch.randn(1, 3, 40, 33)
    model.decode_head(model.neck([torch.randn(2, 32, 2, 3)] * 4) if model.neck else torch.randn(2, 32, 2, 3))
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(loaded(pixel_values).logits, model(pixel_values).logits)
    without, info = SetrForSemanticSegmentation.from_pretrained(
        tmp_path, use_auxiliary_head=False, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(without(pixel_values).logits, model(pixel_values).logits)


def test_an_encoder_loads_under_each_head(tmp_path: Path) -> None:
    encoder = tiny_model().setr
    encoder.save_pretrained(tmp_path)
    for decoder_type in DECODER_TYPES:
        config = tiny_config(decoder_type=decoder_type, image_size=(64, 48))
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            SetrForSemanticSegmentation.from_pretrained(tmp_path, config=config)
        model = SetrForSemanticSegmentation.from_pretrained(tmp_path, config=tiny_config(decoder_type=decoder_type))
        assert torch.equal(model.setr.layers[1].mlp.fc1.weight, encoder.layers[1].mlp.fc1.weight)
        assert torch.equal(model.setr.embeddings.position_embeddings, encoder.embeddings.position_embeddings)
    assert isinstance(SetrModel.from_pretrained(tmp_path), SetrModel)


@pytest.mark.parametrize("decoder_type", DECODER_TYPES)
def test_the_pipeline_runs_the_sliding_window_protocol(tmp_path: Path, decoder_type: str) -> None:
    """The scores are those of the plain way: upsample each window, average, upsample, softmax."""
    model = tiny_model(decoder_type=decoder_type)
    processor = SegmenterImageProcessor(size={"shortest_edge": 40}, window_size=32, window_stride=16)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    image = torch.randint(256, (3, 50, 70), dtype=torch.uint8)
    inputs = AutoImageProcessor.from_pretrained(tmp_path)(image)
    with torch.no_grad():
        outputs = model(**inputs)
    (result,) = processor.post_process_semantic_segmentation(outputs, return_segmentation_scores=True)

    total, count = torch.zeros(5, 40, 56), torch.zeros(40, 56)
    for logits, (_, _, _, top, left, *_) in zip(outputs.logits, inputs["window_offsets"].tolist(), strict=True):
        upsampled = F.interpolate(logits[None], size=(32, 32), mode="bilinear")[0]
        total[:, top : top + 32, left : left + 32] += upsampled
        count[top : top + 32, left : left + 32] += 1
    expected = F.interpolate((total / count)[None], size=(50, 70), mode="bilinear")[0].softmax(0)
    torch.testing.assert_close(result.segmentation_scores, expected, rtol=0, atol=1e-5)

    parts = pipeline("image-segmentation", model=str(tmp_path))(PIL.Image.fromarray(image.permute(1, 2, 0).numpy()))
    assert {part["label"] for part in parts} == {
        model.config.id2label[i] for i in result.segmentation.unique().tolist()
    }


@needs_compile
@pytest.mark.parametrize("decoder_type", DECODER_TYPES)
def test_the_model_compiles_without_a_graph_break(decoder_type: str) -> None:
    torch.compiler.reset()  # what other tests compiled counts towards the limit
    model, pixel_values = tiny_model(decoder_type=decoder_type), torch.randn(1, 3, 32, 48)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(pixel_values).logits, model(pixel_values).logits)


def test_gradient_checkpointing_keeps_the_gradients() -> None:
    model, pixel_values, labels = tiny_model(), torch.randn(1, 3, 32, 48), torch.randint(5, (1, 32, 48))
    model(pixel_values, labels=labels).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model.train()
    for module in model.modules():
        if isinstance(module, SetrBatchNorm):
            module.eval()
    model(pixel_values, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)
