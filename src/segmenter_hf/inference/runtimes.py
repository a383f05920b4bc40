"""Networks that another runtime than torch runs: onnxruntime or OpenVINO, from the files of an export.

Files may come from anybody. They are read as data only: a model file names no other file than its weights beside it, uses no
operators but those that runtimes bring along, and is no larger than the network of its configuration.
"""

import functools
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from transformers import (
    AutoConfig,
    PreTrainedConfig,
)
from transformers.utils import cached_file

from ..data.label_sets import LabelSet
from ..models.image_processing_segmenter import AnyImageProcessor
from ..utils.folders import lies_within
from .model_files import REMEDY, check_model_files, count_weights
from .model_loading import check_is_ours, label_set_for, load_processor, translate_loading_errors


if TYPE_CHECKING:
    import onnx

RUNTIMES = ("torch", "onnxruntime", "openvino")
EXPORT_FIELD = "exported_precisions"  # of config.json: the precisions of each runtime, the preferred one first
# Which file holds which precision. OpenVINO computes in bfloat16 from the float32 file.
RUNTIME_FILES = {
    "onnxruntime": {
        "float32": "onnx/model.onnx",
        "float16": "onnx/model_fp16.onnx",
        "int8": "onnx/model_static.onnx",
        "int8-dynamic": "onnx/model_quantized.onnx",
    },
    "openvino": {
        "float32": "openvino/model.xml",
        "bfloat16": "openvino/model.xml",
        "float16": "openvino/model_fp16.xml",
        "int8": "openvino/model_int8.xml",
        "int8-dynamic": "openvino/model_int8_dynamic.xml",
    },
}
# Operators beyond the ONNX standard that exports use; others may read files.
CONTRIBUTED_OPERATORS = ("MatMulBnb4", "MatMulNBits")
SPARE_BYTES = 2**25  # for what is not a weight
MAX_GRAPH_BYTES = 2**26  # of the XML file of OpenVINO
QUANTIZATION_GROUP_SIZE = 64  # inputs that share a scale where they are quantized while OpenVINO runs

RunFunction = Callable[[np.ndarray], np.ndarray]


class RuntimeNetwork:
    """A network in a runtime, with what a predictor needs to know of a model.

    Args:
        run (`Callable`): Computes logits (batch, num_labels, height, width) of pixel values (batch, num_channels, height,
            width), both `float32`.
        config (`PreTrainedConfig`): The configuration of the model.
        runtime (`str`): What runs it.
        precision (`str`): In which precision.
        name_or_path (`str`): Where it was loaded from.
    """

    device = torch.device("cpu")  # where pixel values and logits lie
    dtype = torch.float32  # of both

    def __init__(
        self, run: RunFunction, config: PreTrainedConfig, runtime: str, precision: str, name_or_path: str
    ) -> None:
        self._run = run
        self.config = config
        self.runtime = runtime
        self.precision = precision
        self.name_or_path = name_or_path

    def eval(self) -> "RuntimeNetwork":
        """Return the network, which has no other mode."""
        return self

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Compute the patch logits.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, num_channels, height, width)`): Normalized windows.

        Returns:
            `torch.FloatTensor` of shape `(batch, num_labels, patch_height, patch_width)`: Patch logits, on the CPU.

        Raises:
            ValueError: If the file computes something else.
        """
        pixels = np.ascontiguousarray(pixel_values.numpy(force=True), dtype=np.float32)
        logits = np.asarray(self._run(pixels))
        expected = (len(pixels), self.config.num_labels)
        if logits.ndim != 4 or logits.shape[:2] != expected or logits.dtype != np.float32:
            raise ValueError(
                f"{self.name_or_path}: expected float32 logits (batch, labels, height, width) with {expected} first, got "
                f"{logits.dtype} {logits.shape}: the file does not belong to config.json. Export the model again."
            )
        return torch.from_numpy(logits)


def load_network(
    name_or_path: str | Path,
    runtime: str,
    *,
    precision: str | None = None,
    label_set: str | None = None,
    device: str | None = None,
    revision: str | None = None,
) -> tuple[RuntimeNetwork, AnyImageProcessor, LabelSet]:
    """Load an exported model for a runtime, with its image processor and label set, without weights of torch.

    Args:
        name_or_path (`str` or `Path`): Directory or Hub name of an export.
        runtime (`str`): `"onnxruntime"` or `"openvino"`.
        precision (`str`, *optional*): One of those that were exported; by default the one that was named first.
        label_set (`str`, *optional*): Name or file of a label set; by default the one that belongs to the model.
        device (`str`, *optional*): `"cpu"`, which is also the default.
        revision (`str`, *optional*): Branch, tag or commit on the Hub; the main branch by default.

    Returns:
        `tuple[RuntimeNetwork, AnyImageProcessor, LabelSet]`: The network, and what belongs to it.

    Raises:
        ImportError: If the runtime is not installed.
        OSError: If there is no such model, or a file is missing.
        ValueError: If the precision was not exported, or the files are damaged or refer to others.
    """
    if runtime not in RUNTIME_FILES:
        raise ValueError(f"`runtime` must be {' or '.join(map(repr, RUNTIMES))}, got {runtime!r}.")
    if device not in (None, "cpu"):
        raise ValueError(f"`device` must be 'cpu' with the runtime {runtime!r}, got {device!r}.")
    name = str(name_or_path)
    with translate_loading_errors(name_or_path):
        check_model_files(name_or_path)
        config = AutoConfig.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
        processor = load_processor(name, revision)
        processor.device = None  # where it computes is said by its user, not by a file
        check_is_ours(name, config, processor)
        precision = choose_precision(name, config, runtime, precision)
        path = find_model_file(name, RUNTIME_FILES[runtime][precision], revision)
        load = load_onnx if runtime == "onnxruntime" else load_openvino
        run = load(path, config, precision)
    network = RuntimeNetwork(run, config, runtime, precision, name)
    return network, processor, label_set_for(network, name, label_set, revision)


def choose_precision(name: str, config: PreTrainedConfig, runtime: str, precision: str | None) -> str:
    """Return the precision to run: the one that is wanted, else the first that was exported.

    Raises:
        ValueError: If there is no such precision, or the model was not exported for the runtime.
    """
    fields = getattr(config, EXPORT_FIELD, None)
    exported = fields.get(runtime) if isinstance(fields, dict) else None
    if not isinstance(exported, (list, tuple)) or not exported:
        raise ValueError(
            f"{name} is not exported for {runtime}: its config.json names no precision of it in {EXPORT_FIELD!r}. Export "
            f"the model with `export_model` and `runtime={runtime}`."
        )
    files = RUNTIME_FILES[runtime]
    available = [known for known in files if any(files[known] == files.get(kept) for kept in exported)]
    precision = exported[0] if precision is None else precision
    if precision not in available:
        raise ValueError(
            f"`precision` must be {' or '.join(map(repr, available))}, which {name} was exported in for {runtime}, got "
            f"{precision!r}."
        )
    return precision


def find_model_file(name: str, file: str, revision: str | None) -> Path:
    """Return where a file of an export lies, whose weights are beside it if it has any in a file of their own.

    Raises:
        OSError: If it is missing.
        ValueError: If it leads out of the directory.
    """
    path = Path(cast(str, cached_file(name, file, revision=revision or "main")))
    weights = f"{file.removesuffix('.xml')}.bin" if file.endswith(".xml") else f"{file}_data"
    cached_file(name, weights, revision=revision or "main", _raise_exceptions_for_missing_entries=False)
    for found in (path, path.parent / Path(weights).name) if Path(name).is_dir() else ():
        if not lies_within(found, name):
            raise ValueError(f"{found} leads out of {name}: expected a file in it. {REMEDY}")
    return path


def max_weight_bytes(config: PreTrainedConfig) -> int:
    """Return how large the files of a network can be that holds the weights of a configuration."""
    return SPARE_BYTES + 5 * count_weights(config)


def check_size(paths: Iterable[Path], config: PreTrainedConfig) -> None:
    """Refuse files that hold more than the weights of a configuration.

    Raises:
        ValueError: If they are too large together.
    """
    paths = list(paths)
    size, limit = sum(path.stat().st_size for path in paths if path.exists()), max_weight_bytes(config)
    if size > limit:
        raise ValueError(
            f"{paths[0]}: expected at most {limit / 2**20:.0f} MB for the network of config.json, got {size / 2**20:.0f} MB. "
            f"{REMEDY}"
        )


def load_onnx(path: Path, config: PreTrainedConfig, precision: str) -> RunFunction:
    """Load a model file into onnxruntime.

    Args:
        path (`Path`): The file.
        config (`PreTrainedConfig`): The configuration of the model.
        precision (`str`): What it was exported in; the file says it too.

    Returns:
        `Callable`: Computes logits of pixel values.

    Raises:
        ImportError: If onnx or onnxruntime is missing.
        ValueError: If the file is damaged, too large, or refers to others.
    """
    try:
        import onnx
        from onnxruntime import InferenceSession, SessionOptions
    except ImportError as error:
        raise ImportError(
            f"The runtime 'onnxruntime' needs onnx and onnxruntime: `pip install segmenter-hf[onnx]` ({error})."
        ) from error
    weights = path.with_name(f"{path.name}_data")
    check_size((path, weights), config)
    check_onnx_graph(onnx.load(path, format="protobuf", load_external_data=False), path, weights.name)
    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads sleep while they wait, as with OMP_WAIT_POLICY=PASSIVE: spinning ones take the cores that another process needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (pixel_values,), (logits,) = session.get_inputs(), session.get_outputs()
    check_ports(path, config, pixel_values.name, logits.name, pixel_values.shape)

    def run(pixels: np.ndarray) -> np.ndarray:
        return np.asarray(session.run(["logits"], {"pixel_values": pixels})[0])

    return run


def check_onnx_graph(model: "onnx.ModelProto", path: Path, weights: str) -> None:
    """Refuse a model that refers to other files or needs operators of others.

    Args:
        model (`onnx.ModelProto`): The model, without weights that lie in another file.
        path (`Path`): Its file, for messages.
        weights (`str`): Name of the only file that may hold weights, beside it.

    Raises:
        ValueError: If it does.
    """
    import onnx

    if model.functions:
        raise ValueError(f"{path} defines operators of its own, which exports of this package do not. {REMEDY}")
    graphs, tensors = [model.graph], []
    while graphs:
        graph = graphs.pop()
        tensors += [*graph.initializer, *(part for s in graph.sparse_initializer for part in (s.values, s.indices))]
        for node in graph.node:
            allowed = node.domain in ("", "ai.onnx") or (
                node.domain == "com.microsoft" and node.op_type in CONTRIBUTED_OPERATORS
            )
            if not allowed:
                raise ValueError(
                    f"{path} needs the operator {node.domain}.{node.op_type:.100}, which exports of this package do not "
                    f"use. {REMEDY}"
                )
            for attribute in node.attribute:
                graphs += [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
                tensors += [*attribute.tensors, *([attribute.t] if attribute.HasField("t") else [])]
                for sparse in (*attribute.sparse_tensors, attribute.sparse_tensor):
                    tensors += [sparse.values, sparse.indices]
    for tensor in tensors:
        outside = {entry.value for entry in tensor.external_data if entry.key == "location"} - {weights}
        if tensor.data_location == onnx.TensorProto.EXTERNAL and not tensor.external_data or outside:
            raise ValueError(
                f"{path} refers to the file {next(iter(outside), '')!r:.200}: weights may lie in {weights} only. {REMEDY}"
            )


def openvino_core() -> Any:
    """The `openvino.Core` of the process.

    Raises:
        ImportError: If OpenVINO is missing.
    """
    try:
        import openvino  # noqa: F401
    except ImportError as error:
        raise ImportError(f"OpenVINO is not installed: `pip install segmenter-hf[openvino]` ({error}).") from error
    return _only_core()


@functools.cache
def _only_core() -> Any:
    """A core that lives as long as the process.

    Each core that uses the CPU gives its thread a stack for signals and takes it back when it goes. Where two go in the order in which
    they came, the thread is left with one that is freed, and the next signal, such as Ctrl-C, ends the process with a segmentation
    fault (seen with OpenVINO 2026.4; the stack is that of https://github.com/openvinotoolkit/openvino/pull/11894).
    """
    import openvino

    core = openvino.Core()
    core.get_property("CPU", "FULL_DEVICE_NAME")  # from here on it uses the CPU: before the cores that nncf makes
    return core


def openvino_has_bfloat16() -> bool:
    """Whether OpenVINO, which must be installed, computes in bfloat16 on this CPU."""
    return "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def load_openvino(path: Path, config: PreTrainedConfig, precision: str) -> RunFunction:
    """Load a model file into OpenVINO, for the CPU.

    Args:
        path (`Path`): The XML file; its weights lie beside it.
        config (`PreTrainedConfig`): The configuration of the model.
        precision (`str`): What to compute in.

    Returns:
        `Callable`: Computes logits of pixel values.

    Raises:
        ImportError: If OpenVINO is missing.
        ValueError: If a file is damaged or too large, or the machine does not compute in that precision.
    """
    core = openvino_core()
    import openvino

    if precision == "bfloat16" and not openvino_has_bfloat16():
        raise ValueError("This CPU has no bfloat16: give the precision 'float32'.")
    weights = path.with_suffix(".bin")
    check_size((weights,), config)
    if path.stat().st_size > MAX_GRAPH_BYTES:
        raise ValueError(f"{path}: expected a graph of at most {MAX_GRAPH_BYTES / 2**20:.0f} MB. {REMEDY}")
    graph = path.read_bytes()
    if not graph.lstrip().startswith(b"<?xml") or b"<!" in graph or b"<net" not in graph:
        raise ValueError(f"{path}: expected a network of OpenVINO in XML, got something else. {REMEDY}")
    # From memory, so that a file of another kind, which may name more files, is not recognized by its path.
    constants = openvino.Tensor(np.fromfile(weights, dtype=np.uint8))
    model = core.read_model(model=graph, weights=constants)
    (pixel_values,), (logits,) = model.inputs, model.outputs
    shape = [None if side.is_dynamic else side.get_length() for side in pixel_values.get_partial_shape()]
    check_ports(path, config, pixel_values.get_any_name(), logits.get_any_name(), shape)
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bfloat16" else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    if precision == "int8-dynamic":
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = QUANTIZATION_GROUP_SIZE
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    lock = threading.Lock()  # a request is for one thread at a time

    def run(pixels: np.ndarray) -> np.ndarray:
        with lock:
            return np.array(request.infer({"pixel_values": pixels}, share_inputs=True)["logits"])

    return run


def check_ports(path: Path, config: PreTrainedConfig, first: str, last: str, shape: Any) -> None:
    """Refuse a file whose input or output are not those of a segmentation model of a configuration.

    Raises:
        ValueError: If names or the number of channels are others.
    """
    if (first, last) != ("pixel_values", "logits") or len(shape) != 4 or shape[1] != config.num_channels:
        raise ValueError(
            f"{path}: expected `logits` from `pixel_values` of {config.num_channels} channels, got `{last:.100}` from "
            f"`{first:.100}` of shape {list(shape)}. {REMEDY}"
        )


__all__ = ["RUNTIMES", "RUNTIME_FILES", "RuntimeNetwork", "load_network"]
