"""Export a model to ONNX: batch, height and width stay open, and the result is compared with the model.

    segmenter-hf export --model_name_or_path outputs/demo/model --output_dir outputs/demo/onnx

The directory has the layout of transformers.js: `onnx/model.onnx`, `onnx/model_fp16.onnx`, `onnx/model_quantized.onnx`, and
what belongs to them. `run_onnx.py` in it segments an image without torch. The directory appears only if onnxruntime gives the
logits of the model, at three sizes that the export has not seen, and its label map of an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..export.dtypes import DEFAULT_DTYPES, DTYPE_SUFFIXES
from ..export.onnx import export_onnx
from .errors import cli_main
from .parsing import build_parser, parse_arguments


@dataclass
class Arguments:
    """What to export, and where to."""

    _argument_group_name = "export"

    model_name_or_path: str = field(metadata={"help": "Directory or Hub name of the model."})
    output_dir: str = field(metadata={"help": "Directory to write."})
    dtypes: list[str] = field(
        default_factory=lambda: list(DEFAULT_DTYPES),
        metadata={"help": f"Number formats to write, as transformers.js names them: {', '.join(DTYPE_SUFFIXES)}."},
    )
    opset: int | None = field(
        default=None, metadata={"help": "Version of the ONNX operators; what torch recommends by default."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace an earlier export in output_dir."})


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    """Export the model and print how far its logits differ."""
    (args,) = parse_arguments(build_parser("export", __doc__, [Arguments]), argv)
    export = export_onnx(
        args.model_name_or_path, args.output_dir, dtypes=args.dtypes, opset=args.opset, overwrite=args.overwrite
    )
    files = sorted(
        path.relative_to(export.directory).as_posix() for path in export.directory.rglob("*") if path.is_file()
    )
    print(f"Wrote {export.directory}, opset {export.opset}: {', '.join(files)}")
    for shape, difference in export.differences.items():
        print(f"Input {' x '.join(map(str, shape))}: the logits differ by at most {difference:.2g}")
    print(f"Largest difference: {max(export.differences.values()):.2g}")
    for dtype, agreement in export.agreements.items():
        print(f"{dtype}: {agreement:.2%} of the pixels of an image of random blocks have the model's class")
    print(f"Next: python {export.directory / 'run_onnx.py'} image.jpg labels.png")
