"""The tiled loss equals interpolation and cross-entropy, in value and gradient, under everything training does to it."""

import importlib.util
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from segmenter_hf.models import segmentation_loss
from segmenter_hf.models.segmentation_loss import (
    plain_upsampled_cross_entropy,
    upsampled_cross_entropy,
    upsampled_dice_loss,
)

from ..versions import needs_compile


def make_inputs(
    batch_size: int = 2,
    num_labels: int = 5,
    logits_size: tuple[int, int] = (4, 6),
    size: tuple[int, int] = (37, 50),
    ignored: float = 0.2,
    dtype: torch.dtype = torch.float32,
    scale: float = 3.0,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch_size, num_labels, *logits_size, generator=generator, dtype=torch.float64) * scale
    labels = torch.randint(num_labels, (batch_size, *size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < ignored] = 255
    return logits.to(dtype).requires_grad_(), labels


def value_and_gradient(function, logits: torch.Tensor, labels: torch.Tensor, **options) -> tuple:
    loss = function(logits, labels, **options)
    return loss, *torch.autograd.grad(loss, logits)


def reference(logits: torch.Tensor, labels: torch.Tensor, **options) -> tuple:
    """By torch, in float64."""
    logits = logits.detach().double().requires_grad_()
    upsampled = nn.functional.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    weight = options.pop("class_weights", None)
    options = {"ignore_index": 255, "weight": None if weight is None else weight.double(), **options}
    loss = nn.functional.cross_entropy(upsampled, labels, **options)
    return loss, *torch.autograd.grad(loss, logits)


def assert_equal(got: tuple, expected: tuple, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(got[0].double(), expected[0], rtol=tolerance, atol=tolerance)
    largest = float(expected[1].abs().max())
    torch.testing.assert_close(got[1].double(), expected[1], rtol=0, atol=tolerance * (largest + 1e-2))


@settings(max_examples=60, deadline=None)
@example(num_labels=2, logits_size=(1, 1), size=(55, 129), ignored=0.0, weighted=False, label_smoothing=0.0, seed=0)
@given(
    num_labels=st.integers(1, 7),
    logits_size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 70), st.integers(1, 140)),
    ignored=st.sampled_from([0.0, 0.5, 0.95]),
    weighted=st.booleans(),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(0, 1000),
)
def test_value_and_gradient_are_those_of_torch(
    num_labels, logits_size, size, ignored, weighted, label_smoothing, seed
) -> None:
    logits, labels = make_inputs(2, num_labels, logits_size, size, ignored, seed=seed)
    labels[0, 0, 0] = 0  # at least one pixel counts
    options = {"label_smoothing": label_smoothing}
    if weighted:
        options["class_weights"] = torch.rand(num_labels, generator=torch.Generator().manual_seed(seed)) + 0.1
    expected = reference(logits, labels, **options)
    assert_equal(value_and_gradient(upsampled_cross_entropy, logits, labels, **options), expected)
    # In float64: in float32 torch adds the gradients of all pixels of a patch one by one, which alone costs 3e-5 of 7,000 pixels.
    exact = logits.detach().double().requires_grad_()
    assert_equal(value_and_gradient(plain_upsampled_cross_entropy, exact, labels, **options), expected, 1e-9)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "class_weights": torch.tensor([0.5, 1.0, 2.0])}])
def test_the_gradient_is_that_of_the_loss_in_float64(options) -> None:
    logits, labels = make_inputs(2, 3, (2, 3), (9, 10), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda values: upsampled_cross_entropy(values, labels, **options), logits)
    got = value_and_gradient(upsampled_cross_entropy, logits, labels, **options)
    assert got[0].dtype == got[1].dtype == torch.float64
    assert_equal(got, reference(logits, labels, **options), 1e-12)
    plain = value_and_gradient(plain_upsampled_cross_entropy, logits, labels, **options)
    assert plain[0].dtype == plain[1].dtype == torch.float64
    assert_equal(plain, reference(logits, labels, **options), 1e-12)


@pytest.mark.parametrize("logits_size", [(37, 50), (74, 100), (10, 13)])
def test_logits_may_have_any_resolution(logits_size) -> None:
    logits, labels = make_inputs(logits_size=logits_size)
    for function in (upsampled_cross_entropy, plain_upsampled_cross_entropy):
        assert_equal(value_and_gradient(function, logits, labels), reference(logits, labels))


@pytest.mark.parametrize("scale", [30.0, 1e4])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_logits_may_have_any_spread(scale, label_smoothing) -> None:
    logits, labels = make_inputs(scale=scale)
    got = value_and_gradient(upsampled_cross_entropy, logits, labels, label_smoothing=label_smoothing)
    assert_equal(got, reference(logits, labels, label_smoothing=label_smoothing), 1e-4)


def test_neighbors_may_contradict_each_other_by_any_spread() -> None:
    """Between them no class is near the best one of either."""
    logits = torch.tensor([[1000.0, -1000.0, 1000.0], [-1000.0, 1000.0, -1000.0]])[None, :, None].requires_grad_()
    labels = torch.arange(15).view(1, 1, 15) % 2
    assert_equal(value_and_gradient(upsampled_cross_entropy, logits, labels), reference(logits, labels))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_precision_is_computed_in_float32(dtype, tolerance) -> None:
    logits, labels = make_inputs(dtype=dtype)
    expected = reference(logits, labels)
    for function in (upsampled_cross_entropy, plain_upsampled_cross_entropy):
        loss, gradient = value_and_gradient(function, logits, labels)
        assert (loss.dtype, gradient.dtype) == (torch.float32, dtype)
        torch.testing.assert_close(loss.double(), expected[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(gradient.double(), expected[1], rtol=tolerance, atol=tolerance * 1e-2)


@pytest.mark.parametrize("function", [upsampled_cross_entropy, plain_upsampled_cross_entropy])
def test_the_scale_of_a_gradient_scaler_fits_into_float16(function) -> None:
    logits, labels = make_inputs(logits_size=(64, 64), size=(128, 128), dtype=torch.float16)
    _, expected = reference(logits, labels)
    logits.requires_grad_()
    (function(logits, labels) * 65536).backward()
    found = logits.grad.double() / 65536
    assert (found == 0).double().mean() < 0.01
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize("function", [upsampled_cross_entropy, plain_upsampled_cross_entropy])
def test_a_batch_of_ignored_pixels_gives_zero_and_a_zero_gradient(function) -> None:
    logits, labels = make_inputs()
    for options in ({}, {"class_weights": torch.rand(5), "label_smoothing": 0.1}):
        loss, gradient = value_and_gradient(function, logits, torch.full_like(labels, 255), **options)
        assert loss == 0
        assert torch.equal(gradient, torch.zeros_like(logits))


@pytest.mark.parametrize("function", [upsampled_cross_entropy, plain_upsampled_cross_entropy])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_labels_without_weight_give_zero_and_a_zero_gradient(function, label_smoothing) -> None:
    logits, labels = make_inputs()
    options = {"class_weights": torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0]), "label_smoothing": label_smoothing}
    loss, gradient = value_and_gradient(function, logits, labels.where(labels == 255, 0), **options)
    assert loss == 0
    assert torch.equal(gradient, torch.zeros_like(logits))


def test_dice_of_one_pixel_is_that_of_its_class_alone() -> None:
    logits, labels = make_inputs(ignored=1.0)
    labels[1, 3, 4] = 2
    upsampled = nn.functional.interpolate(logits, size=labels.shape[-2:], mode="bilinear")
    probability = upsampled.softmax(1)[1, 2, 3, 4]
    torch.testing.assert_close(upsampled_dice_loss(logits, labels), 1 - 2 * probability / (probability + 1))


def test_any_label_may_be_the_ignored_one() -> None:
    logits, labels = make_inputs(ignored=0)
    for ignore_index in (-100, 2):
        changed = labels.clone()
        changed[:, :5] = ignore_index
        got = value_and_gradient(upsampled_cross_entropy, logits, changed, ignore_index=ignore_index)
        assert_equal(got, reference(logits, changed, ignore_index=ignore_index))


def test_layout_and_integer_type_do_not_matter() -> None:
    logits, labels = make_inputs()
    expected = value_and_gradient(upsampled_cross_entropy, logits, labels)
    changed = logits.detach().to(memory_format=torch.channels_last).requires_grad_()
    got = value_and_gradient(upsampled_cross_entropy, changed, labels.mT.contiguous().mT.to(torch.uint8))
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("function", [upsampled_cross_entropy, plain_upsampled_cross_entropy])
def test_what_does_not_fit_is_refused(function) -> None:
    logits, labels = make_inputs()
    for arguments, message in (
        ((logits[0], labels), "Expected logits of shape"),
        ((logits[:, 0], labels), "Expected logits of shape"),
        ((logits, labels[:, 0]), "Expected logits of shape"),
        ((logits, labels[:1]), "Expected logits of shape"),
        ((logits, labels.float()), "integer type"),
        ((logits, labels, 255, torch.ones(4)), "Expected 5 class weights"),
        ((logits, labels, 255, None, 1.5), "from 0 to 1"),
        ((logits, labels, 255, None, -0.5), "from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            function(*arguments)


@pytest.mark.parametrize("wrong", [5, 254, -1])
def test_labels_that_are_no_class_are_refused(wrong) -> None:
    logits, labels = make_inputs()
    labels[1, 3, 4] = wrong
    with pytest.raises(ValueError, match=rf"from 0 to 4 or the ignored 255, got \[{wrong}\]"):
        upsampled_cross_entropy(logits, labels)


def test_at_most_five_wrong_labels_are_named() -> None:
    logits, labels = make_inputs()
    labels[0, 0, :9] = torch.arange(9)
    with pytest.raises(ValueError, match=r"got \[5, 6, 7, 8\]"):
        upsampled_cross_entropy(logits, labels)
    labels[0, 0, 9:12] = torch.arange(9, 12)
    with pytest.raises(ValueError, match=r"got \[5, 6, 7, 8, 9\]"):
        upsampled_cross_entropy(logits, labels)


def test_without_gradient_only_the_loss_is_computed() -> None:
    logits, labels = make_inputs(size=(37, 150))  # two tiles wide
    with mock.patch.object(segmentation_loss, "_operator", wraps=segmentation_loss._operator) as operator:
        expected = upsampled_cross_entropy(logits, labels)
        with torch.no_grad():
            loss = upsampled_cross_entropy(logits, labels)
        assert torch.equal(loss, expected)
        assert not loss.requires_grad
        assert not upsampled_cross_entropy(logits.detach(), labels).requires_grad
        with torch.inference_mode():
            assert torch.equal(upsampled_cross_entropy(logits, labels), expected)
    assert [call.args[-1] for call in operator.call_args_list] == [True, False, False, False]


def test_second_derivatives_are_refused_and_not_wrong() -> None:
    logits, labels = make_inputs()
    with pytest.raises(RuntimeError, match="use_tiled_loss=False"):
        torch.autograd.grad(upsampled_cross_entropy(logits, labels), logits, create_graph=True)


class Head(nn.Module):
    """A convolution with the loss behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 1)

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return upsampled_cross_entropy(self.conv(features), labels, label_smoothing=0.1)


def head_and_inputs() -> tuple[Head, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    head, features, labels = Head(), torch.randn(2, 3, 4, 6), make_inputs(size=(32, 48))[1]
    head(features, labels).backward()
    expected = head.conv.weight.grad.clone()
    head.zero_grad()
    return head, features, labels, expected


def test_gradients_are_the_same_under_checkpointing_and_accumulation() -> None:
    head, features, labels, expected = head_and_inputs()
    checkpoint(head, features, labels, use_reentrant=False).backward()
    assert torch.equal(head.conv.weight.grad, expected)
    head.zero_grad()
    for _ in range(4):
        (head(features, labels) / 4).backward()
    torch.testing.assert_close(head.conv.weight.grad, expected)


def test_autocast_leaves_the_products_in_float32() -> None:
    logits, labels = make_inputs()
    expected = value_and_gradient(upsampled_cross_entropy, logits, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = value_and_gradient(upsampled_cross_entropy, logits, labels)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@needs_compile
def test_the_loss_compiles_without_a_graph_break() -> None:
    head, features, labels, expected = head_and_inputs()
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    compiled(features, labels).backward()
    torch.testing.assert_close(head.conv.weight.grad, expected)


@pytest.mark.parametrize("needs_gradient", [True, False])
def test_the_operator_is_sound(needs_gradient) -> None:
    logits, labels = make_inputs(size=(9, 12))
    operator = segmentation_loss._operator
    arguments = (logits, labels, 255, torch.rand(5), 0.1, needs_gradient)
    torch.library.opcheck(
        operator, arguments, test_utils=["test_schema", "test_autograd_registration", "test_faketensor"]
    )


def parallel_step(rank: int, store: str, results: dict) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    head, features, labels, _ = head_and_inputs()
    parallel = nn.parallel.DistributedDataParallel(head)
    parallel(features[rank : rank + 1], labels[rank : rank + 1]).backward()
    results[rank] = head.conv.weight.grad.tolist()
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_average_their_gradients(tmp_path: Path) -> None:
    head, features, labels, _ = head_and_inputs()
    for rank in range(2):
        (head(features[rank : rank + 1], labels[rank : rank + 1]) / 2).backward()
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(parallel_step, (str(tmp_path / "store"), results), nprocs=2)
        for rank in range(2):
            torch.testing.assert_close(torch.tensor(results[rank]), head.conv.weight.grad)


def test_the_file_can_be_loaded_twice() -> None:
    """As the package and as remote code, in one process."""
    logits, labels = make_inputs()
    expected = value_and_gradient(upsampled_cross_entropy, logits, labels)
    name = "segmenter_hf.models.segmentation_loss_again"
    spec = importlib.util.spec_from_file_location(name, segmentation_loss.__file__)
    again = importlib.util.module_from_spec(spec)
    sys.modules[name] = again
    try:
        spec.loader.exec_module(again)
        for function in (again.upsampled_cross_entropy, upsampled_cross_entropy):
            assert torch.equal(value_and_gradient(function, logits, labels)[1], expected[1])
    finally:
        del sys.modules[name]
