"""Static quantization to 8 bits: ranges of what layers take in come from images, each output channel of a weight has a scale."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..data.image_loading import find_images
from ..models.image_io import read_channels


logger = logging.getLogger(__name__)

MAX_CALIBRATION_WINDOWS = 64  # more of them change the ranges little
NNCF_CI = "NNCF_CI"  # nncf reports each use to its makers unless this is set when it is imported


def check_calibration(is_calibrated: bool, images: str | Path | None) -> None:
    """Images belong to calibrated 8 bits; a warning says so where they are for nothing.

    Raises:
        ValueError: If they are missing.
    """
    if is_calibrated and not images:
        raise ValueError(
            "8 bits without 'dynamic' need `calibration_images`, a folder of images as the model will see."
        )
    if images and not is_calibrated:
        logger.warning(
            "`calibration_images` are not used: they are for the precision 'int8' (the dtype 'static') alone."
        )


def calibration_windows(processor: Any, images: str | Path) -> list[np.ndarray]:
    """Cut the images of a folder into windows as prediction does, at a single scale.

    Args:
        processor (`SegmenterImageProcessor`): The image processor of the model.
        images (`str` or `Path`): A folder of images, or one image.

    Returns:
        `list[np.ndarray]`: Pixel values of shape (1, channels, height, width) and dtype `float32`: of at most 64 windows, from
        images all over the folder and, of each, from anywhere in it; the same each time.

    Raises:
        FileNotFoundError: If there is no image there.
        ValueError: If an image cannot be read.
    """
    paths = list(find_images([images]).values())
    paths = paths[:: -(-len(paths) // MAX_CALIBRATION_WINDOWS)]
    each = -(-MAX_CALIBRATION_WINDOWS // len(paths))
    rng = np.random.default_rng(0)
    windows = []
    for path in paths:
        source = processor.lazy_windows(read_channels(path, processor.num_channels), scales=[1.0], do_flip=False)
        chosen = rng.permutation(len(source.windows))[:each]  # corners alone would be mostly sky
        windows += [source.pixel_values(source.windows[index])[None].numpy() for index in chosen]
    return windows[:MAX_CALIBRATION_WINDOWS]


class _WindowReader:
    """Windows in the form in which onnxruntime asks for them."""

    def __init__(self, windows: list[np.ndarray]) -> None:
        self._windows: Iterator[np.ndarray] = iter(windows)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next window, or `None` after the last."""
        window = next(self._windows, None)
        return None if window is None else {"pixel_values": window}


def write_static_onnx(source: Path, path: Path, windows: list[np.ndarray]) -> None:
    """Quantize the products of a float32 model with its weights; those between activations, in attention, stay.

    Args:
        source (`Path`): The float32 model.
        path (`Path`): The file to write.
        windows (`list[np.ndarray]`): Pixel values to calibrate with, from `calibration_windows`.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    graph = onnx.load(source, load_external_data=False).graph
    weights = {weight.name for weight in graph.initializer}
    nodes = [node.name for node in graph.node if node.op_type in ("Gemm", "MatMul") and node.input[1] in weights]
    quantize_static(
        source,
        path,
        _WindowReader(windows),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=True,  # 7 bits: sums of 8-bit products overflow on CPUs without VNNI
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        nodes_to_quantize=nodes,
    )


def quantize_openvino(model: Any, windows: list[np.ndarray] | None) -> Any:
    """Quantize a model of OpenVINO to 8 bits with nncf.

    Args:
        model (`openvino.Model`): The float32 model; it may be changed.
        windows (`list[np.ndarray]`, *optional*): Pixel values to calibrate with. Without them only weights are quantized
            and what layers take in is quantized while it runs.

    Returns:
        `openvino.Model`: The quantized model.

    Raises:
        ImportError: If nncf is missing.
    """
    reports = os.environ.get(NNCF_CI)
    os.environ[NNCF_CI] = "1"
    try:
        import nncf
    except ImportError as error:
        raise ImportError(f"8 bits for OpenVINO need nncf: `pip install segmenter-hf[openvino]` ({error}).") from error
    finally:
        if reports is None:
            del os.environ[NNCF_CI]
    nncf.set_log_level("ERROR")
    if windows is None:
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    dataset = nncf.Dataset([{"pixel_values": window} for window in windows])
    # 7 bits of weights, as for onnxruntime
    options = nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE)
    return nncf.quantize(
        model,
        dataset,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(windows),
        advanced_parameters=options,
    )


__all__ = ["calibration_windows", "check_calibration", "quantize_openvino", "write_static_onnx"]
