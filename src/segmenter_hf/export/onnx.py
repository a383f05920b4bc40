"""Export to ONNX, with batch, height and width left open, compared with the model before anything is kept."""

import json
import shutil
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..data.label_sets import LABEL_SET_FILE, LabelSet
from ..inference.model_files import RECIPE_FILE, check_replaceable
from ..inference.model_loading import load_model
from ..inference.runtimes import EXPORT_FIELD
from ..models.image_processing_segmenter import AnyImageProcessor
from ..models.sliding_window import merge_windows
from ..utils.atomic_files import atomic_directory, write_json
from ..utils.versions import require_version
from .dtypes import (
    DEFAULT_DTYPES,
    PRECISION_DTYPES,
    check_dtypes,
    external_data,
    model_file,
    save_model,
    write_dtype,
)
from .quantization import calibration_windows, check_calibration


ONNX_FOLDER = "onnx"
EXAMPLE_FILE = "run_onnx.py"
OPENVINO_FOLDER = "openvino"
EARLIER_FILES = ("model.onnx", "model.onnx.data")
FILES = (
    *(ONNX_FOLDER, OPENVINO_FOLDER, "config.json", "preprocessor_config.json"),
    *(LABEL_SET_FILE, RECIPE_FILE, EXAMPLE_FILE),
    *EARLIER_FILES,
)
# Float32 in another order of summation; of the largest logit. A wrong operator is further off by far.
TOLERANCE = 1e-4
LEAST_AGREEMENT = 0.999  # of the pixels of a label map, for float32
CHECKED_IMAGE_SIZE = (60, 90)  # pixels; longer than high, so that most protocols cut it into several windows
WINDOWS_AT_ONCE = 4

Shape = tuple[int, int, int, int]  # batch, channels, height, width


class OnnxExport(NamedTuple):
    """What was written.

    Args:
        directory (`Path`): The directory.
        opset (`int`): Version of the ONNX operators.
        differences (`dict[tuple[int, int, int, int], float]`): The largest difference of a float32 logit from the
            model's, for each shape (batch, channels, height, width) of the input that was compared.
        agreements (`dict[str, float]`): For each dtype the share of pixels, from 0 to 1, whose class is the model's, in
            an image of random blocks.
    """

    directory: Path
    opset: int
    differences: dict[Shape, float]
    agreements: dict[str, float]


class PatchLogits(nn.Module):
    """A segmentation model that takes nothing but pixels and returns nothing but logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) pixels to logits (batch, labels, logits height, logits width)."""
        return self.model(pixel_values=pixel_values, return_dict=True).logits


def example_shape(config: PreTrainedConfig) -> Shape:
    """The shape to export with: larger than the grid of position embeddings, and no two sides equal."""
    patches, patch_size = config.image_height_and_width[0] // config.patch_size, config.patch_size
    return 2, config.num_channels, (patches + 1) * patch_size, (patches + 2) * patch_size


def unseen_shapes(config: PreTrainedConfig) -> list[Shape]:
    """Shapes to compare at: the model's own size, sides that the patch does not divide, and very few patches."""
    (height, width), patch_size = config.image_height_and_width, config.patch_size
    sizes = [(1, height, width), (2, height + patch_size // 2, width // 2 + 1), (3, patch_size, 2 * patch_size)]
    return [(batch, config.num_channels, *size) for batch, *size in sizes]


def write_onnx(model: PreTrainedModel, path: Path, opset: int | None = None) -> int:
    """Export a model to a file; weights of more than about 2 GB go into another, with `_data` behind its name.

    Args:
        model (`PreTrainedModel`): A semantic segmentation model of this package, on the CPU, in evaluation mode.
        path (`Path`): The file to write. Its input `pixel_values` and its output `logits` are those of the model.
        opset (`int`, *optional*): Version of the ONNX operators; by default the one that torch recommends.

    Returns:
        `int`: The version of the ONNX operators.

    Raises:
        ImportError: If torch is too early to leave the sizes open.
        ValueError: If torch cannot export for that version.
    """
    require_version("torch", "2.10", "The export with open sizes")
    import onnx
    from onnxscript.ir.passes.common import ClearMetadataAndDocStringPass

    sides = {0: "batch", 2: "height", 3: "width"}
    program = torch.onnx.export(
        PatchLogits(model).eval(),
        (torch.zeros(example_shape(model.config)),),
        dynamo=True,
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_shapes={"pixel_values": {axis: torch.export.Dim(name) for axis, name in sides.items()}},
        opset_version=opset,
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch.onnx.export gave no program, although one was asked for with `dynamo=True`.")
    written = program.model.opset_imports[""]
    if opset not in (None, written):
        raise ValueError(f"torch cannot export this model for opset {opset}: it gave opset {written}. Use that one.")
    ClearMetadataAndDocStringPass()(program.model)  # stack traces with the paths of this machine
    program.save(path)
    if path.with_name(f"{path.name}.data").exists():  # torch's name, which transformers.js does not look for
        save_model(onnx.load(path), path)
        path.with_name(f"{path.name}.data").unlink()
    return written


@torch.no_grad()
def compare_with_model(model: PreTrainedModel, path: Path) -> dict[Shape, float]:
    """Run an exported model with onnxruntime at shapes that the export has not seen, and compare the logits.

    Args:
        model (`PreTrainedModel`): The model that was exported, on the CPU, in evaluation mode.
        path (`Path`): The exported file.

    Returns:
        `dict[tuple[int, int, int, int], float]`: The largest difference for each shape of the input.

    Raises:
        ValueError: If shapes of logits differ, or logits by more than 1e-4 of the largest one.
    """
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    differences = {}
    for shape in unseen_shapes(model.config):
        pixel_values = torch.randn(shape, generator=generator)
        expected = model(pixel_values=pixel_values).logits.numpy()
        (logits,) = session.run(["logits"], {"pixel_values": pixel_values.numpy()})
        if logits.shape != expected.shape:
            raise ValueError(f"For an input {shape} the exported model gives {logits.shape}, not {expected.shape}.")
        difference, limit = float(np.abs(logits - expected).max()), TOLERANCE * float(np.abs(expected).max())
        if not difference <= limit:
            raise ValueError(
                f"For an input {shape} the exported model differs from the model by {difference:.2g}, more than "
                f"{limit:.2g}. Nothing was kept: try another `opset`, or other versions of torch and onnxscript."
            )
        differences[shape] = difference
    return differences


def compare_label_maps(model: PreTrainedModel, processor: AnyImageProcessor, path: Path) -> float:
    """Segment an image with a model and with a file of its export in onnxruntime: see `label_map_agreement`.

    Args:
        model (`PreTrainedModel`): The model that was exported, on the CPU, in evaluation mode.
        processor (`BaseImageProcessor`): Its image processor.
        path (`Path`): The exported file.

    Returns:
        `float`: The share of pixels, from 0 to 1, that have the same class.
    """
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(pixel_values: torch.Tensor) -> torch.Tensor:
        (logits,) = session.run(["logits"], {"pixel_values": pixel_values.numpy()})
        return torch.from_numpy(logits)

    return label_map_agreement(model, processor, run, path.name)


@torch.no_grad()
def label_map_agreement(
    model: PreTrainedModel, processor: AnyImageProcessor, run: Callable[[torch.Tensor], torch.Tensor], name: str
) -> float:
    """Segment an image of random blocks with a model and with its export, by the whole protocol at a single scale.

    Args:
        model (`PreTrainedModel`): The model that was exported, on the CPU, in evaluation mode.
        processor (`BaseImageProcessor`): Its image processor.
        run (`Callable`): Computes the logits of pixel values with the exported file.
        name (`str`): The name of the file, for messages.

    Returns:
        `float`: The share of pixels, from 0 to 1, that have the same class.

    Raises:
        ValueError: If the exported model gives NaN or infinite logits.
    """
    height, width = CHECKED_IMAGE_SIZE
    blocks = np.random.default_rng(0).integers(0, 256, (height // 10, width // 10, model.config.num_channels))
    image = np.kron(blocks, np.ones((10, 10, 1))).astype(np.uint8)
    # Of 8 bits, whatever the model's images have.
    arguments: dict[str, Any] = {
        "input_data_format": "channels_last",
        "value_range": None,
        "scales": [1.0],
        "do_flip": False,
    }
    inputs = processor(image, **arguments)
    expected, found = [], []
    for pixel_values in inputs["pixel_values"].split(WINDOWS_AT_ONCE):
        expected.append(model(pixel_values=pixel_values).logits)
        found.append(run(pixel_values).float())
    if not all(bool(logits.isfinite().all()) for logits in found):
        raise ValueError(
            f"{name} gives NaN or infinite logits: the model needs more range than that dtype has. Nothing was kept: "
            "leave it out of `dtypes`."
        )
    maps = [
        merge_windows(torch.cat(logits), inputs["window_offsets"], processor.patch_size, padding=processor.padding)[0][
            0
        ]
        for logits in (expected, found)
    ]
    return float((maps[0] == maps[1]).float().mean())


def write_all_dtypes(
    model: PreTrainedModel,
    processor: AnyImageProcessor,
    folder: Path,
    dtypes: Sequence[str],
    opset: int | None,
    windows: list[np.ndarray] | None = None,
) -> tuple[int, dict[Shape, float], dict[str, float]]:
    """Write the model files of an export into a folder and compare each with the model.

    Returns:
        `tuple[int, dict, dict]`: The version of the ONNX operators, and `differences` and `agreements` of [`OnnxExport`].

    Raises:
        ValueError: If a file cannot be written or does not agree with the model.
    """
    folder.mkdir()
    source = folder / model_file("fp32")
    opset = write_onnx(model, source, opset)
    differences = compare_with_model(model, source)
    agreements = {}
    for dtype in dict.fromkeys(("fp32", *dtypes)):
        path = folder / model_file(dtype)
        if dtype != "fp32":
            write_dtype(source, dtype, path, windows)
        agreements[dtype] = compare_label_maps(model, processor, path)
    check_agreement(agreements["fp32"])
    if "fp32" not in dtypes:
        source.unlink()
        external_data(source).unlink(missing_ok=True)
    return opset, differences, agreements


def check_agreement(share: float) -> None:
    """Refuse a float32 model whose label map is another.

    Raises:
        ValueError: If fewer than 99.9 % of the pixels have the class of the model.
    """
    if not share >= LEAST_AGREEMENT:
        raise ValueError(
            f"The exported model gives the class of the model at {share:.2%} of the pixels, expected "
            f"{LEAST_AGREEMENT:.1%}. Nothing was kept: try another `opset`, or other versions of torch and onnxscript."
        )


def fields_of(part: PreTrainedConfig | AnyImageProcessor) -> dict[str, Any]:
    """What its JSON file holds, without the names of code files, for they are not beside an exported model."""
    fields = json.loads(part.to_json_string())
    for name in ("auto_map", "custom_pipelines"):
        fields.pop(name, None)
    return fields


def check_export_directory(directory: Path, overwrite: bool) -> None:
    """Refuse to write over anything but an earlier export, and that only when told to.

    Raises:
        FileExistsError: If `directory` must not be written.
    """
    check_replaceable(directory, overwrite, FILES)
    patterns = ("model*.onnx", "model*.onnx_data", "model*.xml", "model*.bin")
    held = [*(directory / ONNX_FOLDER).glob("*"), *(directory / OPENVINO_FOLDER).glob("*")]
    for path in sorted(held):
        if not any(fnmatch(path.name, pattern) for pattern in patterns):
            raise FileExistsError(f"{path} is not of an export and would be lost: give a new directory.")


def load_for_export(
    model_name_or_path: str | Path, output_dir: Path, overwrite: bool
) -> tuple[PreTrainedModel, AnyImageProcessor, LabelSet]:
    """Load a model after checking that it can be exported to a directory.

    Raises:
        FileExistsError: If the directory must not be written.
        ImportError: If onnx, onnxruntime or onnxscript is missing.
        ValueError: If the model cannot be exported.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"The export needs onnx, onnxruntime and onnxscript: `pip install segmenter-hf[onnx]` ({error})."
        ) from error
    check_export_directory(output_dir, overwrite)
    model, processor, label_set = load_model(model_name_or_path, device="cpu")
    if model.config.token_merging_layers:
        raise ValueError(
            "A model that merges tokens cannot be exported: their number depends on the image. Set `token_merging_layers` to "
            "null in its config.json; the weights are the same."
        )
    return model, processor, label_set


def write_companions(
    model: PreTrainedModel,
    processor: AnyImageProcessor,
    label_set: LabelSet,
    directory: Path,
    fields: dict[str, Any],
) -> None:
    """Write what belongs to model files: `config.json` with further fields, the image processor, the label set, the recipe."""
    write_json(directory / "config.json", {**fields_of(model.config), **fields})
    write_json(directory / "preprocessor_config.json", fields_of(processor))
    label_set.save(directory / LABEL_SET_FILE)
    recipe = Path(str(model.name_or_path)) / RECIPE_FILE
    if recipe.is_file():  # `evaluate` asks it for the dataset
        shutil.copyfile(recipe, directory / RECIPE_FILE)


def export_onnx(
    model_name_or_path: str | Path,
    output_dir: str | Path,
    *,
    dtypes: Sequence[str] = DEFAULT_DTYPES,
    calibration_images: str | Path | None = None,
    opset: int | None = None,
    overwrite: bool = False,
) -> OnnxExport:
    """Export a segmentation model to a directory that needs neither torch nor transformers.

    It has the layout of transformers.js: `onnx/model.onnx`, `onnx/model_fp16.onnx`, `onnx/model_quantized.onnx`, and
    `config.json` and `preprocessor_config.json` beside that folder. `label_set.json` holds the names and colors of the
    classes, and `run_onnx.py` is an example that segments an image with numpy, onnxruntime and Pillow.

    Args:
        model_name_or_path (`str` or `Path`): Directory or Hub name of a model of this package.
        output_dir (`str` or `Path`): The directory to write; appears when it is complete and compared.
        dtypes (`Sequence[str]`, defaults to `("fp32", "fp16", "q8")`): The number formats to write, as transformers.js
            names them: `"fp32"`, `"fp16"`, `"q8"`, `"int8"`, `"uint8"`, `"q4"`, `"q4f16"`, `"bnb4"`; or `"static"`, 8 bits calibrated with
            images.
        calibration_images (`str` or `Path`, *optional*): Folder of images as the model will see, for `"static"`.
        opset (`int`, *optional*): Version of the ONNX operators; by default the one that torch recommends.
        overwrite (`bool`, defaults to `False`): Whether to replace an earlier export in `output_dir`.

    Returns:
        [`OnnxExport`]: The directory, and how exactly the exported model agrees with the model.

    Raises:
        FileExistsError: If `output_dir` holds anything but an export that is to be replaced.
        ImportError: If onnx, onnxruntime or onnxscript is missing, or torch earlier than 2.10.
        ValueError: If a dtype is unknown, `"static"` has no images, the exported model does not agree, or torch cannot export for
            `opset`.
    """
    check_dtypes(dtypes)
    check_calibration("static" in dtypes, calibration_images)
    output_dir = Path(output_dir)
    model, processor, label_set = load_for_export(model_name_or_path, output_dir, overwrite)
    windows = calibration_windows(processor, calibration_images or "") if "static" in dtypes else None
    with atomic_directory(output_dir.absolute()) as temporary:
        folder = temporary / ONNX_FOLDER
        opset, differences, agreements = write_all_dtypes(model, processor, folder, dtypes, opset, windows)
        precisions = {dtype: precision for precision, dtype in PRECISION_DTYPES.items()}
        runnable = [precisions[dtype] for dtype in dict.fromkeys(dtypes) if dtype in precisions]
        fields: dict[str, Any] = {EXPORT_FIELD: {"onnxruntime": runnable}}
        split = {path.name: 1 for path in sorted(folder.glob("*.onnx")) if external_data(path).exists()}
        if split:
            fields["transformers.js_config"] = {"use_external_data_format": split}
        write_companions(model, processor, label_set, temporary, fields)
        shutil.copyfile(Path(__file__).parent / EXAMPLE_FILE, temporary / EXAMPLE_FILE)
    return OnnxExport(output_dir, opset, differences, {dtype: agreements[dtype] for dtype in dtypes})


__all__ = ["OnnxExport", "compare_label_maps", "compare_with_model", "export_onnx", "write_onnx"]
