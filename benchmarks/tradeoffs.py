"""Measure what fewer tokens cost and bring: token merging over thresholds, and other patch sizes, on a trained model.

    python benchmarks/tradeoffs.py --model_name_or_path outputs/camvid --dataset_name camvid --label_set camvid \
        --max_samples 20 --output_dir outputs/tradeoffs

Each point is the model changed in one way: the mean number of tokens after the last layer that merges, seconds of an image (network,
merge and preprocessing), the share of pixels of the same class as the unchanged model, and the mean IoU of all images. Images are
segmented by all points in turns, so that a machine that becomes slower does so for all. `tradeoffs.json` holds the points, `tradeoffs.md` a
table and `tradeoffs.png` a picture.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser

from segmenter_hf.cli.errors import cli_main
from segmenter_hf.cli.parsing import parse_arguments
from segmenter_hf.data.label_resolution import fit_to_masks
from segmenter_hf.data.loading import load_split
from segmenter_hf.evaluation.evaluate import EvaluationDataset
from segmenter_hf.evaluation.metrics import ConfusionMatrix
from segmenter_hf.inference.predictor import Predictor
from segmenter_hf.utils.atomic_files import atomic_write, write_json, write_text


@dataclass
class Arguments:
    model_name_or_path: str = field(metadata={"help": "Directory or Hub name of a trained model."})
    output_dir: str = field(metadata={"help": "Directory for tradeoffs.json, tradeoffs.md and tradeoffs.png."})
    dataset_name: str = field(default="scenes", metadata={"help": "Images with masks: Hub name, folder or scenes."})
    label_set: str | None = field(default=None, metadata={"help": "Name or file of the label set of the dataset."})
    split: str = field(default="validation", metadata={"help": "Split of the dataset."})
    max_samples: int = field(default=20, metadata={"help": "Number of images, the first ones."})
    thresholds: list[float] = field(
        default_factory=lambda: [0.98, 0.95, 0.92, 0.88, 0.8, 0.6], metadata={"help": "Of token merging."}
    )
    patch_sizes: list[int] = field(default_factory=list, metadata={"help": "Other patch sizes in pixels."})


@dataclass
class Point:
    name: str
    kind: str
    tokens: float
    seconds: float
    agreement: float
    mean_iou: float

    def as_line(self) -> str:
        """A row of the table in Markdown."""
        return (
            f"| {self.name} | {self.tokens:.0f} | {1e3 * self.seconds:.0f} ms | {100 * self.agreement:.2f} % | "
            f"{100 * self.mean_iou:.2f} |"
        )


HEADER = "| change | tokens of a window | time of an image | same class | mean IoU |\n|---|---|---|---|---|"


class Variant:
    """The model changed in one way, and what it did so far."""

    def __init__(self, predictor: Predictor, name: str, kind: str) -> None:
        self.predictor, self.name, self.kind = predictor, name, kind
        self.tokens: list[float] = []
        self.seconds: list[float] = []
        self.same_pixels = self.pixels = 0
        self.matrix = ConfusionMatrix(predictor.model.config.num_labels)
        predictor.model.base_model.register_forward_hook(self._count_tokens)

    def _count_tokens(self, encoder: torch.nn.Module, inputs: tuple, outputs: object) -> None:
        prefix = encoder.embeddings.num_prefix_tokens
        if outputs.merged_tokens:
            self.tokens += (outputs.merged_tokens[-1].sizes > 0).sum(1).tolist()
        else:
            self.tokens += [outputs.last_hidden_state.shape[1] - prefix] * len(outputs.last_hidden_state)

    def segment(self, image: object, labels: torch.Tensor, expected: torch.Tensor | None) -> torch.Tensor:
        """Segment an image, and count how well."""
        start = time.perf_counter()
        class_map = self.predictor(image).class_map
        self.seconds.append(time.perf_counter() - start)
        self.matrix.update(class_map.cpu().numpy(), labels.numpy())
        self.same_pixels += int((class_map == (class_map if expected is None else expected)).sum())
        self.pixels += class_map.numel()
        return class_map

    def point(self) -> Point:
        """What was measured."""
        scores = self.matrix.compute()
        return Point(
            self.name,
            self.kind,
            statistics.mean(self.tokens),
            statistics.median(self.seconds),
            self.same_pixels / self.pixels,
            scores["mean_iou"],
        )


def make_variants(args: Arguments) -> list[Variant]:
    """The unchanged model, then all changed ones."""
    load = Predictor.from_pretrained
    name, kwargs = args.model_name_or_path, {"label_set": args.label_set}
    plain = load(name, **kwargs)
    variants = [Variant(plain, "none", "unchanged")]
    for threshold in args.thresholds:
        predictor = load(name, token_merging=True, **kwargs)
        predictor.model.config.token_merging_threshold = threshold
        predictor.model.base_model.config.token_merging_threshold = threshold
        variants.append(Variant(predictor, f"token merging, threshold {threshold}", "token merging"))
    for patch_size in args.patch_sizes:
        predictor = load(name, patch_size=patch_size, **kwargs)
        before = plain.model.config.patch_size
        variants.append(Variant(predictor, f"patches of {patch_size} pixels instead of {before}", "patch size"))
    return variants


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
            of_kind = sorted((point for point in points if point.kind == kind), key=lambda point: point.tokens)
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
    variants = make_variants(args)
    plain = variants[0].predictor
    dataset = load_split(args.dataset_name, split=args.split, max_samples=args.max_samples)
    examples = EvaluationDataset(dataset, fit_to_masks(plain.label_set, dataset), plain.processor.num_channels)
    for index in range(len(dataset)):
        example = examples[index]
        image, labels = example["image"], torch.as_tensor(example["labels"])
        if index == 0:  # to warm up
            for variant in variants:
                variant.predictor(image)
                variant.tokens.clear()
        expected = None
        for variant in variants:
            class_map = variant.segment(image, labels, expected)
            expected = class_map if expected is None else expected
    points = [variant.point() for variant in variants]
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    machine = {
        "date": time.strftime("%Y-%m-%d"),
        "threads": torch.get_num_threads(),
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
