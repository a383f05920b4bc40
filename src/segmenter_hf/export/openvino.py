"""Export for OpenVINO, and one function for exports to any runtime."""

import functools
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from ..inference.runtimes import (
    EXPORT_FIELD,
    RUNTIME_FILES,
    RunFunction,
    load_openvino,
    openvino_core,
    openvino_has_bfloat16,
)
from ..models.image_processing_segmenter import AnyImageProcessor
from ..utils.atomic_files import atomic_directory
from .dtypes import PRECISION_DTYPES
from .onnx import (
    OnnxExport,
    Shape,
    check_agreement,
    compare_with_model,
    export_onnx,
    label_map_agreement,
    load_for_export,
    write_companions,
    write_onnx,
)
from .quantization import calibration_windows, check_calibration, quantize_openvino


logger = logging.getLogger(__name__)


def export_model(
    model_name_or_path: str | Path,
    output_dir: str | Path,
    *,
    runtime: str = "onnxruntime",
    precisions: Sequence[str] = ("float32",),
    calibration_images: str | Path | None = None,
    opset: int | None = None,
    overwrite: bool = False,
) -> OnnxExport:
    """Export a segmentation model to a directory that `Predictor.from_pretrained(..., runtime=...)` runs.

    Args:
        model_name_or_path (`str` or `Path`): Directory or Hub name of a model of this package.
        output_dir (`str` or `Path`): The directory to write; appears when it is complete and compared.
        runtime (`str`, defaults to `"onnxruntime"`): `"onnxruntime"` or `"openvino"`.
        precisions (`Sequence[str]`, defaults to `("float32",)`): What to compute in, the preferred one first: `"float32"`,
            `"float16"`, `"int8"` (calibrated with images), `"int8-dynamic"`, and for OpenVINO `"bfloat16"`.
        calibration_images (`str` or `Path`, *optional*): Folder of images as the model will see, for `"int8"`.
        opset (`int`, *optional*): Version of the ONNX operators; by default the one that torch recommends.
        overwrite (`bool`, defaults to `False`): Whether to replace an earlier export in `output_dir`.

    Returns:
        [`OnnxExport`]: The directory, and how exactly the exported model agrees with the model; bfloat16 of OpenVINO is
        compared only where the CPU has it.

    Raises:
        FileExistsError: If `output_dir` holds anything but an export that is to be replaced.
        ImportError: If a package of the extra is missing.
        ValueError: If the runtime does not have a precision, the exported model does not agree with the model, or as
            [`export_onnx`].
    """
    if runtime not in RUNTIME_FILES:
        raise ValueError(f"`runtime` must be {' or '.join(map(repr, RUNTIME_FILES))} for an export, got {runtime!r}.")
    unknown = [precision for precision in precisions if precision not in RUNTIME_FILES[runtime]]
    if unknown or not precisions or isinstance(precisions, str):
        raise ValueError(
            f"`precisions` must be a list of some of {list(RUNTIME_FILES[runtime])} with {runtime}, got "
            f"{unknown or precisions!r}."
        )
    precisions = list(dict.fromkeys(precisions))
    if runtime == "openvino":
        return _export_openvino(model_name_or_path, Path(output_dir), precisions, calibration_images, opset, overwrite)
    names = {PRECISION_DTYPES[precision]: precision for precision in precisions}
    export = export_onnx(
        model_name_or_path,
        output_dir,
        dtypes=list(names),
        calibration_images=calibration_images,
        opset=opset,
        overwrite=overwrite,
    )
    return export._replace(agreements={names[dtype]: share for dtype, share in export.agreements.items()})


def _export_openvino(
    model_name_or_path: str | Path,
    output_dir: Path,
    precisions: list[str],
    calibration_images: str | Path | None,
    opset: int | None,
    overwrite: bool,
) -> OnnxExport:
    openvino_core()  # an error where it is missing
    check_calibration("int8" in precisions, calibration_images)
    model, processor, label_set = load_for_export(model_name_or_path, output_dir, overwrite)
    windows = calibration_windows(processor, calibration_images or "") if "int8" in precisions else None
    with atomic_directory(output_dir.absolute()) as temporary:
        opset, differences, agreements = _write_openvino(model, processor, temporary, precisions, windows, opset)
        write_companions(model, processor, label_set, temporary, {EXPORT_FIELD: {"openvino": precisions}})
    return OnnxExport(output_dir, opset, differences, agreements)


def _write_openvino(
    model: PreTrainedModel,
    processor: AnyImageProcessor,
    directory: Path,
    precisions: list[str],
    windows: list[np.ndarray] | None,
    opset: int | None,
) -> tuple[int, dict[Shape, float], dict[str, float]]:
    """Write the model files by way of ONNX, and compare each with the model."""
    import openvino

    agreements = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.onnx"
        opset = write_onnx(model, source, opset)
        differences = compare_with_model(model, source)
        for precision in precisions:
            path = directory / RUNTIME_FILES["openvino"][precision]
            path.parent.mkdir(exist_ok=True)
            if not path.exists():  # float32 and bfloat16 share one
                exported = openvino_core().read_model(source)
                if precision.startswith("int8"):
                    exported = quantize_openvino(exported, windows if precision == "int8" else None)
                openvino.save_model(exported, path, compress_to_fp16=precision == "float16")
            if precision == "bfloat16" and not openvino_has_bfloat16():
                logger.warning("bfloat16 is not compared with the model: this CPU has none.")
                continue
            run = load_openvino(path, model.config, precision)
            agreements[precision] = label_map_agreement(
                model, processor, functools.partial(_run_on_tensor, run), path.name
            )
    check_agreement(agreements.get("float32", 1.0))
    return opset, differences, agreements


def _run_on_tensor(run: RunFunction, pixels: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(run(pixels.numpy()))


__all__ = ["export_model"]
