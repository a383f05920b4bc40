"""Export to ONNX, with batch, height and width left open, compared with the model before anything is kept."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel

from ..data.label_sets import LABEL_SET_FILE
from ..inference.predictor import load_model
from ..utils.atomic_files import atomic_directory, check_replaceable, write_json


MODEL_FILE = "model.onnx"
EXAMPLE_FILE = "run_onnx.py"
FILES = (MODEL_FILE, f"{MODEL_FILE}.data", "config.json", "preprocessor_config.json", LABEL_SET_FILE, EXAMPLE_FILE)
# Float32 in another order of summation; of the largest logit. A wrong operator is further off by far.
TOLERANCE = 1e-4

Shape = tuple[int, int, int, int]  # batch, channels, height, width


class OnnxExport(NamedTuple):
    """What was written.

    Args:
        directory (`Path`): The directory.
        opset (`int`): Version of the ONNX operators.
        differences (`dict[tuple[int, int, int, int], float]`): The largest difference of a logit from the model's, for
            each shape (batch, channels, height, width) of the input that was compared.
    """

    directory: Path
    opset: int
    differences: dict[Shape, float]


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
    """Export a model to a file; weights of more than about 2 GB go into another, with `.data` behind its name.

    Args:
        model (`PreTrainedModel`): A semantic segmentation model of this package, on the CPU, in evaluation mode.
        path (`Path`): The file to write. Its input `pixel_values` and its output `logits` are those of the model.
        opset (`int`, *optional*): Version of the ONNX operators; by default the one that torch recommends.

    Returns:
        `int`: The version of the ONNX operators.

    Raises:
        ValueError: If torch cannot export for that version.
    """
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
    written = program.model.opset_imports[""]
    if opset not in (None, written):
        raise ValueError(f"torch cannot export this model for opset {opset}: it gave opset {written}. Use that one.")
    ClearMetadataAndDocStringPass()(program.model)  # stack traces with the paths of this machine
    program.save(path)
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
                f"{limit:.2g}. Nothing was kept: try another `--opset`, or other versions of torch and onnxscript."
            )
        differences[shape] = difference
    return differences


def fields_of(part: PreTrainedConfig | BaseImageProcessor) -> dict[str, Any]:
    """What its JSON file holds, without the names of code files, for they are not beside an exported model."""
    fields = json.loads(part.to_json_string())
    fields.pop("auto_map", None)
    return fields


def export_onnx(
    model_name_or_path: str | Path, output_dir: str | Path, *, opset: int | None = None, overwrite: bool = False
) -> OnnxExport:
    """Export a segmentation model to a directory that needs neither torch nor transformers.

    It holds `model.onnx`, `config.json`, `preprocessor_config.json`, `label_set.json`, and `run_onnx.py`, an example
    that segments a picture with numpy, onnxruntime and Pillow.

    Args:
        model_name_or_path (`str` or `Path`): Directory or Hub name of a model of this package.
        output_dir (`str` or `Path`): The directory to write; appears when it is complete and compared.
        opset (`int`, *optional*): Version of the ONNX operators; by default the one that torch recommends.
        overwrite (`bool`, defaults to `False`): Whether to replace an earlier export in `output_dir`.

    Returns:
        [`OnnxExport`]: The directory, and how exactly the exported model agrees with the model.

    Raises:
        FileExistsError: If `output_dir` holds anything but an export that is to be replaced.
        ImportError: If onnx, onnxruntime or onnxscript is missing.
        ValueError: If the exported model does not agree with the model, or torch cannot export for `opset`.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"The export needs onnx, onnxruntime and onnxscript: `pip install segmenter-hf[onnx]` ({error})."
        ) from error
    output_dir = Path(output_dir)
    check_replaceable(output_dir, overwrite, FILES)
    model, processor, label_set = load_model(model_name_or_path, device="cpu")
    with atomic_directory(output_dir.absolute()) as temporary:
        opset = write_onnx(model, temporary / MODEL_FILE, opset)
        differences = compare_with_model(model, temporary / MODEL_FILE)
        write_json(temporary / "config.json", fields_of(model.config))
        write_json(temporary / "preprocessor_config.json", fields_of(processor))
        label_set.save(temporary / LABEL_SET_FILE)
        shutil.copyfile(Path(__file__).parent / EXAMPLE_FILE, temporary / EXAMPLE_FILE)
    return OnnxExport(output_dir, opset, differences)


__all__ = ["OnnxExport", "compare_with_model", "export_onnx", "write_onnx"]
