r"""Export a model to ONNX, or for OpenVINO: batch, height and width stay open, and the result is compared with the model.

    segmenter-hf export --model_name_or_path outputs/demo/model --output_dir outputs/demo/onnx

The directory has the layout of transformers.js: `onnx/model.onnx`, `onnx/model_fp16.onnx`, `onnx/model_quantized.onnx`, and
what belongs to them. `run_onnx.py` in it segments an image without torch. The directory appears only if onnxruntime gives the
logits of the model, at three sizes that the export has not seen, and its label map of an image.

`predict`, `evaluate` and `demo` run it with `--runtime`, in the precision that was named first:

    segmenter-hf export --model_name_or_path outputs/demo/model --output_dir outputs/demo/openvino \
        --runtime openvino --precision int8 float32 --calibration_images photos
    segmenter-hf evaluate --model_name_or_path outputs/demo/openvino --runtime openvino --output_dir outputs/demo/int8
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..export.dtypes import DEFAULT_DTYPES, DTYPE_SUFFIXES
from ..export.onnx import export_onnx
from ..export.openvino import export_model
from ..inference.runtimes import RUNTIME_FILES
from .errors import cli_main
from .parsing import build_parser, parse_arguments


@dataclass
class Arguments:
    """What to export, and where to."""

    _argument_group_name = "export"

    model_name_or_path: str = field(metadata={"help": "Directory or Hub name of the model."})
    output_dir: str = field(metadata={"help": "Directory to write."})
    runtime: Literal["onnxruntime", "openvino"] = field(
        default="onnxruntime", metadata={"help": "What will run the model. For a browser leave it as it is."}
    )
    precision: list[str] | None = field(
        default=None,
        metadata={
            "help": f"What to compute in, the preferred one first: {', '.join(RUNTIME_FILES['openvino'])}. bfloat16 is for "
            "openvino, whose default is float32."
        },
    )
    calibration_images: str | None = field(
        default=None, metadata={"help": "Folder of images as the model will see, for the precision int8."}
    )
    dtypes: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Instead of precisions number formats as transformers.js names them: {', '.join(DTYPE_SUFFIXES)}. By "
            f"default {' '.join(DEFAULT_DTYPES)}, for onnxruntime."
        },
    )
    opset: int | None = field(
        default=None, metadata={"help": "Version of the ONNX operators; what torch recommends by default."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace an earlier export in output_dir."})


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    """Export the model and print how far its logits differ."""
    parser = build_parser("export", __doc__, [Arguments])
    (args,) = parse_arguments(parser, argv)
    if args.dtypes is not None and (args.precision is not None or args.runtime != "onnxruntime"):
        parser.error("--dtypes is for --runtime onnxruntime without --precision")
    options = {"calibration_images": args.calibration_images, "opset": args.opset, "overwrite": args.overwrite}
    if args.precision is None and args.runtime == "onnxruntime":
        export = export_onnx(args.model_name_or_path, args.output_dir, dtypes=args.dtypes or DEFAULT_DTYPES, **options)
    else:
        export = export_model(
            args.model_name_or_path,
            args.output_dir,
            runtime=args.runtime,
            precisions=args.precision or ["float32"],
            **options,
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
    if (export.directory / "run_onnx.py").exists():
        print(f"Next: python {export.directory / 'run_onnx.py'} image.jpg labels.png")
    print(
        f"Or: segmenter-hf predict --model_name_or_path {export.directory} --runtime {args.runtime} --images image.jpg "
        "--output_dir outputs/predictions"
    )
