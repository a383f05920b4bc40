"""The number formats of an exported model, under the file names that transformers.js looks for."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .quantization import write_static_onnx


if TYPE_CHECKING:
    import onnx


# What transformers.js appends to `model` for each `dtype` (`src/utils/dtypes.js` of its version 4).
DTYPE_SUFFIXES = {
    "fp32": "",
    "fp16": "_fp16",
    "q8": "_quantized",
    "int8": "_int8",
    "uint8": "_uint8",
    "static": "_static",  # of this package: a `dtype` with a name that transformers.js does not know
    "q4": "_q4",
    "q4f16": "_q4f16",
    "bnb4": "_bnb4",
}
DEFAULT_DTYPES = ("fp32", "fp16", "q8")
PRECISION_DTYPES = {
    "float32": "fp32",
    "float16": "fp16",
    "int8": "static",
    "int8-dynamic": "q8",
}  # that onnxruntime runs
MAX_PROTOBUF_BYTES = 2**31 - 2**20  # what a file without external data may have, less some for what is not a weight
# All layers of the encoder and the decoders are matrix products, apart from the convolutions, which stay as they are.
QUANTIZED_OPERATORS = ["MatMul", "Gemm"]
BLOCK_SIZE = 32  # values of a weight that share a scale in 4 bits


def model_file(dtype: str) -> str:
    """Return the name of the model file of a dtype, such as `model_quantized.onnx` for `"q8"`."""
    return f"model{DTYPE_SUFFIXES[dtype]}.onnx"


def external_data(path: Path) -> Path:
    """Return where the weights of a model file lie that are too large for it, as transformers.js looks for them."""
    return path.with_name(f"{path.name}_data")


def save_model(model: "onnx.ModelProto", path: Path) -> None:
    """Save a model to a file, and its weights to another if one cannot hold them.

    Args:
        model (`onnx.ModelProto`): The model, with its weights in memory.
        path (`Path`): The file to write.
    """
    import onnx

    if model.ByteSize() < MAX_PROTOBUF_BYTES:
        onnx.save(model, path)
    else:
        onnx.save(model, path, save_as_external_data=True, location=external_data(path).name)


def check_dtypes(dtypes: Sequence[str]) -> None:
    """Refuse dtypes that cannot be written.

    Args:
        dtypes (`Sequence[str]`): Keys of `DTYPE_SUFFIXES`.

    Raises:
        ValueError: If one is unknown, or there is none.
    """
    unknown = [dtype for dtype in dtypes if dtype not in DTYPE_SUFFIXES]
    if unknown or not dtypes or isinstance(dtypes, str):
        raise ValueError(f"`dtypes` must be a list of some of {list(DTYPE_SUFFIXES)}, got {unknown or dtypes!r}.")


def write_dtype(source: Path, dtype: str, path: Path, windows: list[np.ndarray] | None = None) -> None:
    """Write a float32 model in another number format; its inputs and outputs stay float32.

    `"fp16"` stores and computes in float16. `"q8"`, `"int8"` and `"uint8"` keep the weights of matrix products in 8 bits,
    with a scale for each output channel, and quantize their inputs while they run. `"q4"`, `"q4f16"` and `"bnb4"` keep
    these weights in 4 bits, with a scale for each block. `"static"` has 8 bits too, with ranges of inputs from images.

    Args:
        source (`Path`): The float32 model.
        dtype (`str`): One of `DTYPE_SUFFIXES` but `"fp32"`.
        path (`Path`): The file to write.
        windows (`list[np.ndarray]`, *optional*): Pixel values to calibrate `"static"` with.
    """
    import onnx

    if dtype == "static":
        write_static_onnx(source, path, windows or [])
        return
    model = onnx.load(source)
    if dtype in ("q8", "int8", "uint8"):
        from onnxruntime.quantization import QuantType, quantize_dynamic

        # Says that shapes are inferred already, without which onnxruntime advises to do so.
        onnx.helper.set_model_props(model, {"onnx.infer": "onnxruntime.quant"})
        weight_type = QuantType.QUInt8 if dtype == "uint8" else QuantType.QInt8
        # Signed weights have 7 bits: sums of 8-bit products overflow on CPUs without VNNI, and the file may meet one.
        options = {"per_channel": True, "reduce_range": dtype != "uint8", "weight_type": weight_type}
        quantize_dynamic(model, path, QUANTIZED_OPERATORS, **options)
        return
    if dtype in ("q4", "q4f16"):
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(model, block_size=BLOCK_SIZE, is_symmetric=True)
        quantizer.process()
        model = quantizer.model.model
    elif dtype == "bnb4":
        from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer

        quantizer = MatMulBnb4Quantizer(model, quant_type=MatMulBnb4Quantizer.NF4, block_size=2 * BLOCK_SIZE)
        quantizer.process()
        model = quantizer.model.model
    if dtype in ("fp16", "q4f16"):
        from onnxruntime.transformers.float16 import convert_float_to_float16

        model = convert_float_to_float16(model, keep_io_types=True, disable_shape_infer=True)
    save_model(model, path)


__all__ = [
    "DEFAULT_DTYPES",
    "DTYPE_SUFFIXES",
    "PRECISION_DTYPES",
    "check_dtypes",
    "external_data",
    "model_file",
    "save_model",
    "write_dtype",
]
