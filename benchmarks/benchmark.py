"""Measure speed and memory against peers from PyPI: both sides in one process, in turns, on the same tensors.

    python benchmarks/benchmark.py --task all --json outputs/benchmark.json
    python benchmarks/benchmark.py --task predict predict_ms --sizes T S B --dtype bfloat16

Each row is ours beside a peer: median seconds, spread (half the distance of the quartiles, in percent), the ratio, the
peak of memory above the start, and the greatest difference of the results. `growth` shows how cost grows with windows and
classes. `--busy_core` measures the loss, the merge, preprocessing and a training step with 1 and with 2 threads, on a quiet machine
and while a loop of its own keeps a core busy. Peers that are not installed are left out with a message: `pip install -e ".[bench]"`.
"""

import gc
import importlib.util
import io
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
import transformers
from PIL import Image
from torch.nn.functional import cross_entropy, interpolate
from transformers import HfArgumentParser, SegformerImageProcessor

import segmenter_hf
from segmenter_hf import SegmenterConfig, SegmenterForSemanticSegmentation, SegmenterImageProcessor
from segmenter_hf.cli.errors import cli_main
from segmenter_hf.cli.parsing import parse_arguments
from segmenter_hf.data.augmentation import SegmentationAugmentation
from segmenter_hf.data.label_sets import label_set_from_names
from segmenter_hf.evaluation.metrics import MeanIoU
from segmenter_hf.inference.predictor import Predictor
from segmenter_hf.inference.protocol import MULTI_SCALES, InferenceProtocol
from segmenter_hf.models.segmentation_loss import upsampled_cross_entropy
from segmenter_hf.models.sliding_window import merge_windows
from segmenter_hf.training.datasets import TrainDataset
from segmenter_hf.utils.atomic_files import write_json, write_text


SIZES = {"T": (192, 12, 3), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}
IMAGE_SIZE = (512, 683)  # of a photograph of ADE20K at the protocol's scale
NUM_LABELS = 150


@dataclass
class Arguments:
    task: list[str] = field(
        default_factory=lambda: ["all"],
        metadata={
            "help": "predict, predict_ms, loss, train_step, augment, metric, preprocess, growth, growth_of_loss, large; all."
        },
    )
    sizes: list[str] = field(default_factory=lambda: ["T"], metadata={"help": "Sizes of the network: T, S, B, L."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    dtype: str = field(default="float32", metadata={"help": "Of the network: float32 or bfloat16."})
    repeats: int = field(default=5, metadata={"help": "Times that each side is measured, after one to warm up."})
    busy_core: bool = field(
        default=False,
        metadata={
            "help": "Measure with 1 and 2 threads, quiet and beside a loop that keeps a core busy, and nothing else."
        },
    )
    json: str | None = field(default=None, metadata={"help": "File for the rows, with versions and machine."})
    output_dir: str | None = field(default=None, metadata={"help": "Directory for benchmark.json and benchmark.md."})


@dataclass
class Row:
    task: str
    case: str
    peer: str
    ours_s: float
    ours_spread_percent: float
    peer_s: float | None = None
    peer_spread_percent: float | None = None
    ratio: float | None = None
    ours_peak_mb: float | None = None
    peer_peak_mb: float | None = None
    max_difference: float | None = None


# ---- measuring ----


class Bench:
    """Where to run, and how often."""

    def __init__(self, args: Arguments) -> None:
        self.device, self.dtype, self.repeats = torch.device(args.device), getattr(torch, args.dtype), args.repeats

    def seconds(self, function: Callable[[], Any]) -> float:
        self.synchronize()
        start = time.perf_counter()
        function()
        self.synchronize()
        return time.perf_counter() - start

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak_mb(self, function: Callable[[], Any]) -> float | None:
        """Peak of memory above the start while a function runs once: of the GPU, or resident in the process (Linux)."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            start = torch.cuda.memory_allocated()
            function()
            return (torch.cuda.max_memory_allocated() - start) / 1e6
        reset = Path("/proc/self/clear_refs")
        if not reset.exists():
            return None
        reset.write_text("5")  # the peak starts again from what is resident now
        start = _status_kb("VmHWM")
        function()
        return (_status_kb("VmHWM") - start) / 1e3

    def compare(
        self,
        task: str,
        case: str,
        peer: str,
        ours: Callable[[], Any],
        theirs: Callable[[], Any] | None,
        difference: Callable[[Any, Any], float] | None = None,
    ) -> Row:
        """Run both sides in turns and put the figures side by side."""
        sides = [ours] if theirs is None else [ours, theirs]
        results = [side() for side in sides]  # warms up, too
        gap = difference(*results) if difference and theirs else None
        del results
        times: list[list[float]] = [[] for _ in sides]
        for _ in range(self.repeats):
            for side, seconds in zip(sides, times):
                seconds.append(self.seconds(side))
        medians = [statistics.median(seconds) for seconds in times]
        spreads = [_spread_percent(seconds) for seconds in times]
        peaks = [self.peak_mb(side) for side in sides]
        row = Row(task, case, peer, medians[0], spreads[0], ours_peak_mb=peaks[0], max_difference=gap)
        if theirs is not None:
            row.peer_s, row.peer_spread_percent, row.peer_peak_mb = medians[1], spreads[1], peaks[1]
            row.ratio = medians[1] / medians[0]
        print(as_line(row), flush=True)
        return row


def _status_kb(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def _spread_percent(seconds: Sequence[float]) -> float:
    if len(seconds) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(seconds, n=4)
    return 100 * (high - low) / 2 / middle


def max_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Greatest difference of two tensors."""
    return float((ours.double() - theirs.double()).abs().max())


def share_of_other_pixels(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Share of the pixels of two class maps that differ."""
    return float((ours != theirs).double().mean())


def installed(package: str) -> bool:
    """Whether a peer is installed; says so when it is not."""
    found = importlib.util.find_spec(package) is not None
    if not found:
        print(f'{package} is not installed and is left out: pip install -e ".[bench]"')
    return found


# ---- the plain path ----


def plain_scores(logits: torch.Tensor, offsets: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Upsample each window, add, divide, resize, flip back, softmax, mean over views: (labels, height, width)."""
    total = torch.zeros(logits.shape[1], *size, device=logits.device)
    views = sorted({tuple(row) for row in offsets[:, [1, 2, 7, 8]].tolist()})
    for view, flip, height, width in views:
        summed = torch.zeros(logits.shape[1], height, width, device=logits.device)
        count = torch.zeros(height, width, device=logits.device)
        for window, row in zip(logits, offsets.tolist()):
            if row[1] != view:
                continue
            top, left, window_height, window_width = row[3:7]
            upsampled = interpolate(window[None].float(), size=(window_height, window_width), mode="bilinear")[0]
            summed[:, top : top + window_height, left : left + window_width] += upsampled
            count[top : top + window_height, left : left + window_width] += 1
        resized = interpolate((summed / count)[None], size=size, mode="bilinear")[0]
        total += (resized.flip(-1) if flip else resized).softmax(0)
    return total / len(views)


def plain_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Interpolate and cross-entropy."""
    return cross_entropy(interpolate(logits, size=labels.shape[-2:], mode="bilinear"), labels, ignore_index=255)


class PlainMeanIoU(evaluate.Metric):
    """The mean IoU of the `evaluate` Hub metric: maps kept as images, three histograms each."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions: list, references: list, num_labels: int) -> dict[str, float]:
        """Areas of intersection and union, added over the maps."""
        areas = sum(histograms(np.array(p), np.array(r), num_labels) for p, r in zip(predictions, references))
        with np.errstate(invalid="ignore"):
            return {"mean_iou": float(np.nanmean(areas[0] / (areas[1] + areas[2] - areas[0])))}


def histograms(prediction: np.ndarray, reference: np.ndarray, num_labels: int) -> np.ndarray:
    """Pixels of each class in the intersection, the prediction and the reference, without the ignored ones."""
    valid = reference != 255
    prediction, reference = prediction[valid], reference[valid]
    return np.stack(
        [
            np.histogram(values, bins=num_labels, range=(0, num_labels - 1))[0]
            for values in (prediction[prediction == reference], prediction, reference)
        ]
    )


# ---- inputs ----


def make_model(bench: Bench, size: str, image_size: int = 512, **fields: Any) -> SegmenterForSemanticSegmentation:
    """A Segmenter with random weights in evaluation mode."""
    width, layers, heads = SIZES[size]
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }
    config = SegmenterConfig(**{"image_size": image_size, "num_labels": NUM_LABELS, **sizes, **fields})
    return SegmenterForSemanticSegmentation(config).to(bench.device, bench.dtype).eval()


def make_image() -> np.ndarray:
    """A smooth image with some noise, uint8."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.uniform(0, 255, (1, 3, 12, 16))).float()
    smooth = interpolate(coarse, size=IMAGE_SIZE, mode="bicubic")[0].permute(1, 2, 0).numpy()
    return np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)


def make_label_map(seed: int) -> np.ndarray:
    """A label map with blobs of all classes, uint8."""
    coarse = np.random.default_rng(seed).integers(0, NUM_LABELS, (33, 43))
    return coarse.repeat(16, 0).repeat(16, 1)[: IMAGE_SIZE[0], : IMAGE_SIZE[1]].astype(np.uint8)


# ---- tasks ----


@torch.inference_mode()
def predict(bench: Bench, sizes: Sequence[str]) -> Iterator[Row]:
    """Single scale: end to end, the network, the merge."""
    processor, image = SegmenterImageProcessor(), make_image()
    offsets = processor(image)["window_offsets"]
    logits = torch.randn(len(offsets), NUM_LABELS, 32, 32, device=bench.device) * 4
    yield bench.compare(
        "predict",
        f"merge of {len(offsets)} windows to a class map of 512x683",
        "interpolate, add, divide, interpolate, softmax, argmax",
        lambda: merge_windows(logits, offsets, 16)[0][0],
        lambda: plain_scores(logits, offsets, IMAGE_SIZE).argmax(0),
        share_of_other_pixels,
    )
    whole = torch.randn(1, NUM_LABELS, 32, 43, device=bench.device) * 4
    outputs = transformers.utils.ModelOutput(logits=whole)
    segformer = SegformerImageProcessor()
    yield bench.compare(
        "predict",
        "class map of 512x683 from one (150, 32, 43) map",
        "post_process_semantic_segmentation of transformers' Segformer",
        lambda: processor.post_process_semantic_segmentation(outputs, [IMAGE_SIZE])[0],
        lambda: segformer.post_process_semantic_segmentation(outputs, [IMAGE_SIZE])[0],
        share_of_other_pixels,
    )
    for size in sizes:
        yield from predict_with(bench, size, make_model(bench, size))


def predict_with(bench: Bench, size: str, model: SegmenterForSemanticSegmentation) -> Iterator[Row]:
    """Single scale with a network: end to end, the network alone, its encoder."""
    processor, image = SegmenterImageProcessor(), make_image()
    inputs = processor(image)
    pixel_values = inputs["pixel_values"].to(bench.device, bench.dtype)
    yield bench.compare(
        "predict",
        f"{size}: image in, class map out",
        "the same network with the plain merge",
        lambda: processor.post_process_semantic_segmentation(run_windows(bench, model, processor, image))[0],
        lambda: plain_scores(*run_windows(bench, model, processor, image).to_tuple(), IMAGE_SIZE).argmax(0),
        share_of_other_pixels,
    )
    windows = f"{len(pixel_values)} windows"
    yield bench.compare("predict", f"{size}: the network alone, {windows}", "-", lambda: model(pixel_values), None)
    if installed("timm"):
        encoder = timm_encoder(model)
        yield bench.compare(
            "predict",
            f"{size}: encoder, {windows}",
            "timm's ViT with the same weights",
            lambda: model.segmenter(pixel_values).last_hidden_state,
            lambda: encoder.forward_features(pixel_values),
            max_difference,
        )


def run_windows(
    bench: Bench, model: SegmenterForSemanticSegmentation, processor: SegmenterImageProcessor, image: np.ndarray
) -> transformers.utils.ModelOutput:
    """Logits and offsets of all windows of an image, 8 windows at once."""
    inputs = processor(image)
    chunks = inputs["pixel_values"].split(8)
    logits = torch.cat([model(chunk.to(bench.device, bench.dtype)).logits for chunk in chunks])
    return transformers.utils.ModelOutput(logits=logits, window_offsets=inputs["window_offsets"])


def timm_encoder(model: SegmenterForSemanticSegmentation) -> torch.nn.Module:
    """timm's ViT with the weights of the encoder of a model."""
    import timm

    config, weights = model.config, model.segmenter.state_dict()
    encoder = timm.models.VisionTransformer(
        img_size=config.image_size,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_classes=0,
        weight_init="skip",
    )
    renamed = {
        "cls_token": weights["embeddings.cls_token"],
        "pos_embed": weights["embeddings.position_embeddings"],
        "patch_embed.proj.weight": weights["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": weights["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": weights["layernorm.weight"],
        "norm.bias": weights["layernorm.bias"],
    }
    for index in range(config.num_hidden_layers):
        for kind in ("weight", "bias"):
            layer, block = f"layers.{index}", f"blocks.{index}"
            qkv = [weights[f"{layer}.attention.{name}_proj.{kind}"] for name in "qkv"]
            renamed[f"{block}.attn.qkv.{kind}"] = torch.cat(qkv)
            for target, source in (
                ("attn.proj", "attention.o_proj"),
                ("norm1", "layernorm_before"),
                ("norm2", "layernorm_after"),
                ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
            ):
                renamed[f"{block}.{target}.{kind}"] = weights[f"{layer}.{source}.{kind}"]
    encoder.load_state_dict(renamed)
    return encoder.to(model.device, model.dtype).eval()


@torch.inference_mode()
def predict_ms(bench: Bench, sizes: Sequence[str]) -> Iterator[Row]:
    """Multi-scale + flip: the merge, and end to end."""
    processor, image = SegmenterImageProcessor(scales=list(MULTI_SCALES), do_flip=True), make_image()
    offsets = processor(image)["window_offsets"]
    logits = torch.randn(len(offsets), NUM_LABELS, 32, 32, device=bench.device) * 4
    yield bench.compare(
        "predict_ms",
        f"merge of {len(offsets)} windows of 12 views to a class map of 512x683",
        "interpolate, add, divide, interpolate, softmax, mean, argmax",
        lambda: merge_windows(logits, offsets, 16)[0][0],
        lambda: plain_scores(logits, offsets, IMAGE_SIZE).argmax(0),
        share_of_other_pixels,
    )
    for size in sizes:
        yield predict_ms_with(bench, size, make_model(bench, size), processor)


def predict_ms_with(
    bench: Bench, size: str, model: SegmenterForSemanticSegmentation, processor: SegmenterImageProcessor
) -> Row:
    """Multi-scale + flip with a network, end to end."""
    image = make_image()
    return bench.compare(
        "predict_ms",
        f"{size}: image in, class map out",
        "the same network with the plain merge",
        lambda: processor.post_process_semantic_segmentation(run_windows(bench, model, processor, image))[0],
        lambda: plain_scores(*run_windows(bench, model, processor, image).to_tuple(), IMAGE_SIZE).argmax(0),
        share_of_other_pixels,
    )


def loss(bench: Bench, sizes: Sequence[str]) -> Iterator[Row]:
    """Loss, forward and backward."""
    labels = torch.randint(NUM_LABELS, (4, 512, 512), device=bench.device)
    labels[:, :40] = 255
    for grid, name in ((32, "patch logits"), (128, "logits at a quarter of the pixels")):
        logits = torch.randn(4, NUM_LABELS, grid, grid, device=bench.device, requires_grad=True)
        yield bench.compare(
            "loss",
            f"forward and backward, batch 4, 512x512, 150 classes, {name}",
            "interpolate + cross_entropy, as in transformers' Segformer",
            partial(loss_gradient, upsampled_cross_entropy, logits, labels),
            partial(loss_gradient, plain_loss, logits, labels),
            max_difference,
        )


def loss_gradient(
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], logits: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Gradient of a loss by the logits."""
    (gradient,) = torch.autograd.grad(function(logits, labels), logits)
    return gradient


def train_step(bench: Bench, sizes: Sequence[str]) -> Iterator[Row]:
    """A step of training without the optimizer."""
    labels = torch.randint(NUM_LABELS, (4, 512, 512), device=bench.device)
    pixel_values = torch.randn(4, 3, 512, 512, device=bench.device, dtype=bench.dtype)
    for size in sizes:
        models = [make_model(bench, size, use_tiled_loss=use).train() for use in (True, False)]
        models[1].load_state_dict(models[0].state_dict())

        def step(model: SegmenterForSemanticSegmentation) -> torch.Tensor:
            torch.manual_seed(0)
            model.zero_grad()
            model(pixel_values, labels=labels).loss.backward()
            return model.segmenter.layers[0].mlp.fc1.weight.grad

        yield bench.compare(
            "train_step",
            f"{size}: forward and backward, batch 4, 512x512, 150 classes",
            "the same network with interpolate + cross_entropy",
            partial(step, models[0]),
            partial(step, models[1]),
            max_difference,
        )


def augment(bench: Bench, sizes: Sequence[str]) -> Iterator[Row]:
    """The crops of a step, as one worker makes them of encoded rows; no peer."""
    rows = datasets.Dataset.from_dict(
        {"image": [encoded(make_image(), "JPEG")], "annotation": [encoded(make_label_map(0), "PNG")]}
    )
    augmentation = SegmentationAugmentation(crop_size=512, size=512, max_ratio=4.0)
    label_set = label_set_from_names([str(index) for index in range(NUM_LABELS)])
    examples = TrainDataset(rows, label_set, augmentation, SegmenterImageProcessor(), seed=0)
    numbers = itertools.count()

    def crops() -> list[dict[str, torch.Tensor]]:
        return [examples.crop(rows[0], next(numbers)) for _ in range(4)]

    yield bench.compare("augment", "4 crops of 512x512, JPEG and PNG decoded, one process", "-", crops, None)


def encoded(pixels: np.ndarray, file_format: str) -> dict[str, bytes | None]:
    """An image as a row of a dataset holds it."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=file_format)
    return {"bytes": buffer.getvalue(), "path": None}


def metric(bench: Bench, sizes: Sequence[str]) -> Iterator[Row]:
    """Mean IoU of a map of 512x683."""
    prediction, reference = make_label_map(1), make_label_map(2)
    reference[200:] = prediction[200:]
    reference[:20] = 255

    def ours() -> float:
        scores = MeanIoU(NUM_LABELS)
        scores.add(prediction=prediction, reference=reference)
        return scores.compute()["mean_iou"]

    def theirs() -> float:
        scores = PlainMeanIoU()
        scores.add_batch(predictions=[prediction], references=[reference])
        return scores.compute(num_labels=NUM_LABELS)["mean_iou"]

    def gap(ours: float, theirs: float) -> float:
        return abs(ours - theirs)

    case = "one map of 512x683, 150 classes, with the final scores"
    yield bench.compare("metric", case, "evaluate's mean_iou (maps kept as images)", ours, theirs, gap)
    yield bench.compare(
        "metric",
        "update with one map of 512x683, 150 classes",
        "evaluate's histograms alone",
        lambda: segmenter_hf.evaluation.metrics.confusion_matrix(prediction, reference, NUM_LABELS),
        lambda: histograms(prediction, reference, NUM_LABELS),
        lambda ours, theirs: float(np.abs(np.diag(ours) - theirs[0]).max()),
    )
    if installed("torchmetrics"):
        from torchmetrics.classification import MulticlassConfusionMatrix

        peer = MulticlassConfusionMatrix(NUM_LABELS, ignore_index=255)
        tensors = [torch.from_numpy(each).long()[None] for each in (prediction, reference)]
        yield bench.compare(
            "metric",
            "update with one map of 512x683, 150 classes",
            "torchmetrics' confusion matrix",
            lambda: segmenter_hf.evaluation.metrics.confusion_matrix(prediction, reference, NUM_LABELS),
            lambda: (peer.reset(), peer.update(*tensors), peer.confmat.numpy())[-1],
            lambda ours, theirs: float(np.abs(ours - theirs).max()),
        )


def preprocess(bench: Bench, sizes: Sequence[str]) -> Iterator[Row]:
    """A photograph of 1024x1366 to normalized pixels with the short side at 512."""
    image = make_image().repeat(2, 0).repeat(2, 1)
    ours = SegmenterImageProcessor(do_split_windows=False)
    height, width = ours(image)["pixel_values"].shape[-2:]
    size = {"height": height, "width": width}
    theirs = SegformerImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    yield bench.compare(
        "preprocess",
        "1024x1366 uint8 to 512x683 normalized (ours without antialiasing, as the protocol wants)",
        "transformers' SegformerImageProcessor to 512x683, with antialiasing",
        lambda: ours(image, return_tensors="pt")["pixel_values"],
        lambda: theirs(image, return_tensors="pt")["pixel_values"],
        lambda ours, theirs: float((ours.double() - theirs.double()).abs().mean()),
    )


@torch.inference_mode()
def growth(bench: Bench, sizes: Sequence[str]) -> Iterator[Row]:
    """How cost grows with windows and classes; no peer."""
    model = make_model(bench, sizes[0])
    for windows in (1, 4, 16, 64):
        chunks = torch.randn(windows, 3, 512, 512, device=bench.device, dtype=bench.dtype).split(8)
        run = partial(run_chunks, model, chunks)
        yield bench.compare("growth", f"{sizes[0]}: network, {windows} windows, 8 at once", "-", run, None)
    offsets = SegmenterImageProcessor()(make_image())["window_offsets"]
    for labels in (2, 19, 150, 1000):
        logits = torch.randn(len(offsets), labels, 32, 32, device=bench.device)
        merge = partial(merge_windows, logits, offsets, 16)
        yield bench.compare("growth", f"merge of {len(offsets)} windows, {labels} classes", "-", merge, None)


def run_chunks(model: SegmenterForSemanticSegmentation, chunks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Logits of each batch."""
    return [model(chunk).logits for chunk in chunks]


def large(bench: Bench, sizes: Sequence[str]) -> Iterator[Row]:
    """One photograph of 20000x15000 at its own size through a network of one layer, run once; no peer."""
    model = make_model(bench, "T", num_hidden_layers=1, decoder_type="linear")
    label_set = label_set_from_names([str(index) for index in range(NUM_LABELS)])
    predictor = Predictor(model, SegmenterImageProcessor(), label_set, InferenceProtocol(full_resolution=True))

    def run() -> torch.Tensor:
        image = make_image()[:500, :625].repeat(30, 0).repeat(32, 1)
        return predictor(image, dtype=torch.uint8).class_map

    predictor.with_protocol(InferenceProtocol())(make_image())
    start = time.perf_counter()
    peak = bench.peak_mb(run)
    case = "20000x15000 uint8 in, class map of 150 classes out, network of one layer, the image included"
    row = Row("large", case, "-", time.perf_counter() - start, 0.0, ours_peak_mb=peak)
    print(as_line(row), flush=True)
    yield row


def growth_of_loss(bench: Bench, sizes: Sequence[str]) -> Iterator[Row]:
    """How the loss grows with classes; no peer."""
    targets = torch.randint(2, (4, 512, 512), device=bench.device)
    for labels in (2, 19, 150, 1000):
        logits = torch.randn(4, labels, 32, 32, device=bench.device, requires_grad=True)
        step = partial(loss_gradient, upsampled_cross_entropy, logits, targets)
        yield bench.compare("growth", f"loss, batch 4, 512x512, {labels} classes", "-", step, None)


TASKS: dict[str, Callable[[Bench, Sequence[str]], Iterator[Row]]] = {
    "predict": predict,
    "predict_ms": predict_ms,
    "loss": loss,
    "train_step": train_step,
    "augment": augment,
    "metric": metric,
    "preprocess": preprocess,
    "growth": growth,
    "growth_of_loss": growth_of_loss,
    "large": large,
}


# ---- beside other work ----


BUSY_SECONDS = 600  # the loop ends by itself, whatever becomes of this process
THREADS = (1, 2)


@dataclass
class BusyRow:
    case: str
    threads: int
    quiet_s: float
    quiet_spread_percent: float
    busy_s: float
    busy_spread_percent: float
    busy_to_quiet: float
    plain_busy_s: float | None = None

    def as_line(self) -> str:
        """A row of the table in Markdown."""
        plain = "-" if self.plain_busy_s is None else f"{1e3 * self.plain_busy_s:.4g} ms"
        return (
            f"| {self.case} | {self.threads} | {1e3 * self.quiet_s:.4g} ms ± {self.quiet_spread_percent:.0f} % | "
            f"{1e3 * self.busy_s:.4g} ms ± {self.busy_spread_percent:.0f} % | {self.busy_to_quiet:.2f}x | {plain} |"
        )


BUSY_HEADER = "| case | threads | quiet | one core busy | busy / quiet | plain path, busy |\n|---|---|---|---|---|---|"


@contextmanager
def busy_core(seconds: float = BUSY_SECONDS) -> Iterator[subprocess.Popen]:
    """Keep one core busy with a process that counts until the end of the block, or for so many seconds."""
    loop = f"import time\nend = time.monotonic() + {seconds}\nwhile time.monotonic() < end: pass"
    process = subprocess.Popen([sys.executable, "-c", loop])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def busy_cases(bench: Bench, size: str) -> dict[str, tuple[Callable[[], Any], Callable[[], Any] | None]]:
    """What is measured beside a busy core: ours, and the plain path where there is one."""
    processor, image = SegmenterImageProcessor(), make_image()
    offsets = processor(image)["window_offsets"]
    patch_logits = torch.randn(len(offsets), NUM_LABELS, 32, 32) * 4
    labels = torch.randint(NUM_LABELS, (4, 512, 512))
    logits = torch.randn(4, NUM_LABELS, 32, 32, requires_grad=True)
    photograph = image.repeat(2, 0).repeat(2, 1)
    models = [make_model(bench, size, use_tiled_loss=use).train() for use in (True, False)]
    pixel_values, targets = torch.randn(1, 3, 512, 512, dtype=bench.dtype), labels[:1]

    def step(model: SegmenterForSemanticSegmentation) -> None:
        model.zero_grad()
        model(pixel_values, labels=targets).loss.backward()

    return {
        "loss, forward and backward, batch 4": (
            partial(loss_gradient, upsampled_cross_entropy, logits, labels),
            partial(loss_gradient, plain_loss, logits, labels),
        ),
        f"merge of {len(offsets)} windows": (
            lambda: merge_windows(patch_logits, offsets, 16)[0][0],
            lambda: plain_scores(patch_logits, offsets, IMAGE_SIZE).argmax(0),
        ),
        "preprocessing of twice the height and width": (lambda: processor(photograph), None),
        f"{size}: training step, batch 1": (partial(step, models[0]), partial(step, models[1])),
    }


def measure_busy_core(bench: Bench, size: str) -> list[BusyRow]:
    """Time each case with 1 and 2 threads, quiet and beside a busy core, each after a run to warm up."""
    before, rows = torch.get_num_threads(), []

    def times(function: Callable[[], Any], repeats: int) -> list[float]:
        function()
        return [bench.seconds(function) for _ in range(repeats)]

    try:
        for case, (ours, plain) in busy_cases(bench, size).items():
            for threads in THREADS:
                torch.set_num_threads(threads)
                quiet = times(ours, bench.repeats)
                with busy_core():
                    busy = times(ours, bench.repeats)
                    plain_busy = times(plain, 1)[0] if plain is not None else None
                medians = statistics.median(quiet), statistics.median(busy)
                spreads = _spread_percent(quiet), _spread_percent(busy)
                rows.append(
                    BusyRow(
                        case,
                        threads,
                        medians[0],
                        spreads[0],
                        medians[1],
                        spreads[1],
                        medians[1] / medians[0],
                        plain_busy,
                    )
                )
                print(rows[-1].as_line(), flush=True)
    finally:
        torch.set_num_threads(before)
    return rows


# ---- report ----


def as_line(row: Row) -> str:
    """A row of the table in Markdown."""

    def time_of(seconds: float | None, spread: float | None) -> str:
        return "-" if seconds is None else f"{1e3 * seconds:.4g} ms ± {spread:.0f} %"

    def number(value: float | None, form: str, unit: str = "") -> str:
        return "-" if value is None else f"{value:{form}}{unit}"

    return (
        f"| {row.task} | {row.case} | {row.peer} | {time_of(row.ours_s, row.ours_spread_percent)} | "
        f"{time_of(row.peer_s, row.peer_spread_percent)} | {number(row.ratio, '.1f', 'x')} | "
        f"{number(row.ours_peak_mb, '.0f', ' MB')} | {number(row.peer_peak_mb, '.0f', ' MB')} | "
        f"{number(row.max_difference, '.1e')} |"
    )


HEADER = (
    "| task | case | peer | ours | peer's time | ratio | our peak | peer's peak | difference |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def machine(bench: Bench) -> dict[str, Any]:
    """What the figures depend on."""
    is_gpu = bench.device.type == "cuda"
    models = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in models.splitlines() if line.startswith("model name")]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if is_gpu else (names or [platform.processor()])[0],
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "not set"),
        "network_dtype": str(bench.dtype).removeprefix("torch."),
        "repeats": bench.repeats,
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (torch, transformers, np)},
    }


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    """Run the tasks that the command line names, print the rows, and write them where asked."""
    (args,) = parse_arguments(HfArgumentParser(Arguments), argv)
    names = list(TASKS) if "all" in args.task else args.task
    for given, known in ((names, TASKS), (args.sizes, SIZES)):
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"expected some of {', '.join(known)}, got {', '.join(unknown)}.")
    torch.manual_seed(0)
    bench = Bench(args)
    facts = machine(bench)
    header = BUSY_HEADER if args.busy_core else HEADER
    print(json.dumps(facts), header, sep="\n\n")
    if args.busy_core:
        results = measure_busy_core(bench, args.sizes[0])
        lines, rows = [row.as_line() for row in results], [asdict(row) for row in results]
    else:
        rows = [asdict(row) for name in names for row in TASKS[name](bench, args.sizes)]
        lines = [as_line(Row(**row)) for row in rows]
    for path in (args.json, args.output_dir and f"{args.output_dir}/benchmark.json"):
        if path:
            write_json(Path(path), {"machine": facts, "rows": rows})
    if args.output_dir:
        text = "\n".join([header, *lines])
        write_text(Path(args.output_dir) / "benchmark.md", text + "\n")


if __name__ == "__main__":
    main()
