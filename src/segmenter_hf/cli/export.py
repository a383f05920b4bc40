"""Export a model to ONNX: batch, height and width stay open, and the result is compared with the model.

    python scripts/export_onnx.py --model_name_or_path outputs/demo/model --output_dir outputs/demo/onnx

The directory holds `model.onnx`, what belongs to it, and `run_onnx.py`, which segments a picture without torch. It appears
only if onnxruntime gives the logits of the model, at three sizes that the export has not seen.
"""

from dataclasses import dataclass, field

from transformers import HfArgumentParser

from ..export.onnx import export_onnx
from ..utils.commands import command, parse_arguments


@dataclass
class Arguments:
    model_name_or_path: str = field(metadata={"help": "Directory or Hub name of the model."})
    output_dir: str = field(metadata={"help": "Directory to write."})
    opset: int | None = field(
        default=None, metadata={"help": "Version of the ONNX operators; what torch recommends by default."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace an earlier export in output_dir."})


@command()
def main() -> None:
    (args,) = parse_arguments(HfArgumentParser(Arguments))
    export = export_onnx(args.model_name_or_path, args.output_dir, opset=args.opset, overwrite=args.overwrite)
    print(
        f"Wrote {export.directory}, opset {export.opset}: {', '.join(sorted(p.name for p in export.directory.iterdir()))}"
    )
    for shape, difference in export.differences.items():
        print(f"Input {' x '.join(map(str, shape))}: the logits differ by at most {difference:.2g}")
    print(f"Largest difference: {max(export.differences.values()):.2g}")
    print(f"Next: python {export.directory / 'run_onnx.py'} picture.jpg labels.png")
