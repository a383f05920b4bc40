"""Measure what a faster prediction costs: fewer tokens, other number formats and other runtimes, on a trained model.

    python benchmarks/tradeoffs.py --model_name_or_path outputs/camvid --dataset_name FOLDER --max_samples 20 \
        --thresholds 0.95 0.9 0.8 --patch_sizes 16 28 --output_dir outputs/tradeoffs
    python benchmarks/tradeoffs.py --model_name_or_path outputs/camvid --dataset_name FOLDER --export_dir outputs/exports \
        --runtimes torch/bfloat16 onnxruntime/float32 openvino/bfloat16 --output_dir outputs/tradeoffs

Each variant is the model changed in one way: the mean number of tokens after the last layer that merges, seconds of an image (preprocessing,
network and merge), the share of pixels of the same class as the unchanged model, and the mean IoU of all images. The variants segment
each image in turns, twice, of which the second is timed, so that a machine that becomes slower does so for all. `--plain_path` adds
the path of the published code, and gives speeds beside it. `--times_from` takes the times of another run, with fewer images on a quiet machine. `tradeoffs.json` holds the figures, `tradeoffs.md` a table and `tradeoffs.png` an image.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser

from segmenter_hf.cli.errors import cli_main
from segmenter_hf.cli.parsing import parse_arguments
from segmenter_hf.data.label_resolution import fit_to_masks
from segmenter_hf.data.loading import load_split
from segmenter_hf.evaluation.evaluate import EvaluationDataset
from segmenter_hf.evaluation.metrics import ConfusionMatrix
from segmenter_hf.export.openvino import export_model
from segmenter_hf.inference.predictor import Predictor, Segmentation
from segmenter_hf.models.sliding_window import with_background
from segmenter_hf.utils.atomic_files import atomic_write, write_json, write_text


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Arguments:
    model_name_or_path: str = field(metadata={"help": "Directory or Hub name of a trained model."})
    output_dir: str = field(metadata={"help": "Directory for tradeoffs.json, tradeoffs.md and tradeoffs.png."})
    dataset_name: str = field(default="scenes", metadata={"help": "Images with masks: Hub name, folder or scenes."})
    label_set: str | None = field(default=None, metadata={"help": "Name or file of the label set of the dataset."})
    split: str = field(default="validation", metadata={"help": "Split of the dataset."})
    max_samples: int = field(default=20, metadata={"help": "Number of images, the first ones."})
    thresholds: list[float] = field(default_factory=list, metadata={"help": "Of token merging."})
    patch_sizes: list[int] = field(default_factory=list, metadata={"help": "Other patch sizes in pixels."})
    runtimes: list[str] = field(
        default_factory=list,
        metadata={
            "help": "As RUNTIME/PRECISION: torch/bfloat16, torch/compiled, onnxruntime/int8, openvino/bfloat16 and so on; "
            "torch/bfloat16/0.9 merges tokens too, with that threshold."
        },
    )
    plain_path: bool = field(
        default=False,
        metadata={
            "help": "Measure the path of the published code too, and give speeds beside it: attention spelt out, logits of "
            "each window upsampled to pixels, added, divided and resized."
        },
    )
    export_dir: str | None = field(
        default=None,
        metadata={"help": "Directory of the exports onnxruntime and openvino; made where they are missing."},
    )
    calibration_images: str | None = field(default=None, metadata={"help": "Folder of images for the precision int8."})
    repeats: int = field(default=2, metadata={"help": "Times that each image is segmented; the last one is timed."})
    clock: str = field(
        default="wall",
        metadata={
            "help": "wall, or cpu: the time of all threads on cores, for a machine that does something else too."
        },
    )
    times_from: str | None = field(
        default=None,
        metadata={"help": "tradeoffs.json of a run with fewer images on a quiet machine: its times are taken."},
    )
    num_threads: int | None = field(default=None, metadata={"help": "Threads; by default as many as torch takes."})


@dataclass
class Point:
    name: str
    kind: str
    tokens: float | None
    seconds: float
    spread_percent: float
    agreement: float
    mean_iou: float
    speedup: float

    def as_line(self) -> str:
        """A row of the table in Markdown."""
        tokens = "-" if self.tokens is None else f"{self.tokens:.0f}"
        return (
            f"| {self.name} | {tokens} | {1e3 * self.seconds:.0f} ms ± {self.spread_percent:.0f} % | {self.speedup:.2f}x | "
            f"{100 * self.agreement:.2f} % | {100 * self.mean_iou:.2f} |"
        )


HEADER = (
    "| change | tokens of a window | time of an image | speed | same class | mean IoU |\n|---|---|---|---|---|---|"
)


class PlainPredictor(Predictor):
    """The path of the published code with the same weights: the plain operations on whole tensors."""

    @torch.inference_mode()
    def __call__(self, image: Any, *, return_scores: bool = False, dtype: torch.dtype = torch.long) -> Segmentation:
        """Segment an image; there are no scores."""
        from benchmark import plain_scores

        inputs = self.processor(image, **self.protocol.processor_kwargs())
        chunks = inputs["pixel_values"].split(self.protocol.window_batch_size)
        logits = torch.cat([self.compute_logits(chunk) for chunk in chunks])
        size = tuple(inputs["window_offsets"][0, -2:].tolist())
        scores = plain_scores(with_background(logits), inputs["window_offsets"], size)
        return Segmentation(class_map=scores.argmax(0).to(dtype))


class Variant:
    """The model changed in one way, and what it did so far."""

    matrix: ConfusionMatrix  # of the classes of the dataset, given before the first image

    def __init__(self, predictor: Predictor, name: str, kind: str) -> None:
        self.predictor, self.name, self.kind = predictor, name, kind
        self.tokens: list[float] = []
        self.seconds: list[float] = []
        self.same_pixels = self.pixels = 0
        if predictor.runtime == "torch" and kind != "compiled":  # a compiled network has no place for a hook
            predictor.model.base_model.register_forward_hook(self._count_tokens)

    def _count_tokens(self, encoder: torch.nn.Module, inputs: tuple, outputs: object) -> None:
        prefix = encoder.embeddings.num_prefix_tokens
        if outputs.merged_tokens:
            self.tokens += (outputs.merged_tokens[-1].sizes > 0).sum(1).tolist()
        else:
            self.tokens += [outputs.last_hidden_state.shape[1] - prefix] * len(outputs.last_hidden_state)

    def segment(
        self,
        image: object,
        labels: torch.Tensor,
        expected: torch.Tensor | None,
        repeats: int,
        clock: Callable[[], float],
    ) -> torch.Tensor:
        """Segment an image, and count how well."""
        for _ in range(repeats):  # the first fills the caches again, which another variant used
            start = clock()
            class_map = self.predictor(image, dtype=self.predictor.class_map_dtype).class_map.cpu()  # when it is done
            seconds = clock() - start
        self.seconds.append(seconds)
        self.matrix.update(class_map.numpy(), labels.numpy())
        self.same_pixels += int((class_map == (class_map if expected is None else expected)).sum())
        self.pixels += class_map.numel()
        return class_map

    def point(self, compared_seconds: float) -> Point:
        """What was measured, beside the time of the unchanged model or of the path of the published code."""
        middle = statistics.median(self.seconds)
        low, _, high = statistics.quantiles(self.seconds, n=4) if len(self.seconds) > 1 else (middle,) * 3
        return Point(
            self.name,
            self.kind,
            statistics.mean(self.tokens) if self.tokens else None,
            middle,
            100 * (high - low) / 2 / middle,
            self.same_pixels / self.pixels,
            self.matrix.compute()["mean_iou"],
            compared_seconds / middle,
        )


def make_variants(args: Arguments) -> list[Variant]:
    """The unchanged model, then all changed ones."""
    load = Predictor.from_pretrained
    name, kwargs = args.model_name_or_path, {"label_set": args.label_set}
    plain = load(name, **kwargs)
    variants = [Variant(plain, "none", "unchanged")]
    if args.plain_path:
        published = PlainPredictor.from_pretrained(name, **kwargs)
        published.model.set_attn_implementation("eager")
        variants.append(Variant(published, "none, by the path of the published code", "plain path"))
    for threshold in args.thresholds:
        predictor = load(name, token_merging_threshold=threshold, **kwargs)
        variants.append(Variant(predictor, f"token merging, threshold {threshold}", "token merging"))
    for patch_size in args.patch_sizes:
        predictor = load(name, patch_size=patch_size, **kwargs)
        before = plain.model.config.patch_size
        variants.append(Variant(predictor, f"patches of {patch_size} pixels instead of {before}", "patch size"))
    variants += [make_runtime_variant(args, runtime) for runtime in args.runtimes]
    return variants


def make_runtime_variant(args: Arguments, runtime: str) -> Variant:
    """The model in a number format, compiled, or exported for another runtime."""
    name, (runtime, precision, *threshold) = runtime.replace("/", " "), runtime.split("/")
    if runtime != "torch":
        predictor = Predictor.from_pretrained(Path(args.export_dir) / runtime, runtime=runtime, precision=precision)
        return Variant(predictor, name, "runtime")
    if precision == "compiled":
        return Variant(Predictor.from_pretrained(args.model_name_or_path, compile=True), name, "compiled")
    kwargs: dict[str, Any] = {"dtype": getattr(torch, precision), "label_set": args.label_set}
    if threshold:
        kwargs["token_merging_threshold"] = float(threshold[0])
        name = f"torch {precision}, token merging, threshold {threshold[0]}"
    return Variant(Predictor.from_pretrained(args.model_name_or_path, **kwargs), name, "runtime")


def write_exports(args: Arguments) -> None:
    """Export the model for the runtimes that were asked for, where that was not done before."""
    for runtime in ("onnxruntime", "openvino"):
        precisions = [part.split("/")[1] for part in args.runtimes if part.startswith(f"{runtime}/")]
        if precisions and args.export_dir is None:
            raise SystemExit(f"`--runtimes` names {runtime}: give `--export_dir` too.")
        if precisions and not (Path(args.export_dir) / runtime).exists():
            export_model(
                args.model_name_or_path,
                Path(args.export_dir) / runtime,
                runtime=runtime,
                precisions=precisions,
                calibration_images=args.calibration_images,
            )


def take_times(points: Sequence[Point], timed: Sequence[dict[str, Any]]) -> None:
    """Replace the times by those of the same variants in another run."""
    times = {point["name"]: point for point in timed}
    for point in points:
        if point.name not in times:
            raise SystemExit(f"`--times_from` has no {point.name!r}: give the same variants in both runs.")
        for name in ("seconds", "spread_percent", "speedup"):
            setattr(point, name, times[point.name][name])


def draw(points: Sequence[Point], path: Path) -> None:
    """Time and mean IoU over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    for axis, attribute, factor, label in (
        (axes[0], "seconds", 1e3, "time of an image (ms)"),
        (axes[1], "mean_iou", 100, "mean IoU"),
    ):
        for kind, marker in (("unchanged", "*"), ("token merging", "o"), ("patch size", "s")):
            of_kind = sorted(
                (point for point in points if point.kind == kind and point.tokens is not None),
                key=lambda point: point.tokens,
            )
            xs, ys = [point.tokens for point in of_kind], [factor * getattr(point, attribute) for point in of_kind]
            if of_kind:
                axis.plot(xs, ys, marker=marker, label=kind, markersize=12 if marker == "*" else 6)
        axis.set_xlabel("tokens of a window, mean")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    """Segment the images by all variants and write what was measured."""
    (args,) = parse_arguments(HfArgumentParser(Arguments), argv)
    if args.clock not in CLOCKS:
        raise SystemExit(f"`--clock` must be {' or '.join(CLOCKS)}, got {args.clock}.")
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    write_exports(args)
    variants = make_variants(args)
    plain = variants[0].predictor
    dataset = load_split(args.dataset_name, split=args.split, max_samples=args.max_samples)
    label_set = fit_to_masks(plain.label_set, dataset)
    for variant in variants:
        variant.matrix = ConfusionMatrix(label_set.num_labels, label_set.ignore_index)
    examples = EvaluationDataset(dataset, label_set, plain.processor.num_channels)
    for index in range(len(dataset)):
        example = examples[index]
        image, labels = example["image"], torch.tensor(example["labels"])
        if index == 0:  # to warm up
            for variant in variants:
                variant.predictor(image)
                variant.predictor(image)
                variant.tokens.clear()
        expected = None
        for variant in variants:
            class_map = variant.segment(image, labels, expected, args.repeats, CLOCKS[args.clock])
            expected = class_map if expected is None else expected
    compared = variants[1] if args.plain_path else variants[0]
    points = [variant.point(statistics.median(compared.seconds)) for variant in variants]
    if args.times_from is not None:
        take_times(points, json.loads(Path(args.times_from).read_text())["points"])
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    machine = {
        "date": time.strftime("%Y-%m-%d"),
        "threads": torch.get_num_threads(),
        "device": str(plain.model.device),
        "clock": args.clock,
        "times_from": args.times_from,
        "torch": torch.__version__,
        "images": len(dataset),
        "dataset": args.dataset_name,
    }
    write_json(output_dir / "tradeoffs.json", {"machine": machine, "points": [asdict(point) for point in points]})
    table = "\n".join([HEADER, *(point.as_line() for point in points)])
    write_text(output_dir / "tradeoffs.md", table + "\n")
    draw(points, output_dir / "tradeoffs.png")
    print(table)


if __name__ == "__main__":
    main()
