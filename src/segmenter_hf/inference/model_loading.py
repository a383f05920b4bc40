"""Models from directories and the Hub: whole, finite and of this package, or not at all."""

import functools
import itertools
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    PreTrainedModel,
)
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, ModelOutput, cached_file

from ..data.label_sets import LabelSet, get_model_label_set, load_label_set
from ..models.configuration_vit_encoder import VitEncoderConfig
from ..models.image_processing_segmenter import AnyImageProcessor
from ..utils.hardware import accelerator_type, warn_of_slow_bfloat16
from ..utils.http import translate_http_errors
from ..utils.messages import one_line
from ..utils.processes import process_state
from ..utils.versions import require_version
from .model_files import REMEDY, check_model_files, check_stored_config


# What libraries say instead of raising `MemoryError` or `torch.OutOfMemoryError`, in lower case.
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "alloc_failed", "bad_alloc")
# What transformers says at length, with its advice to trust the code, and what that means.
UNFIT_CONFIGURATIONS = {
    "Unrecognized model in": "a config.json without its `model_type`",
    "contains custom code": "one that needs code of its own, which is not run (`trust_remote_code`)",
}
_compiled_models = itertools.count()
WHERE_FROM = (
    "Give the directory of a model or its name on the Hub. `convert_checkpoint` makes a directory of a published checkpoint; "
    "`load_published_models` has their names."
)


def load_model(
    name_or_path: str | Path,
    label_set: str | None = None,
    device: str | None = None,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    int8: bool = False,
    compile: bool = False,
    token_merging: bool = False,
    token_merging_threshold: float | None = None,
    patch_size: int | None = None,
) -> tuple[PreTrainedModel, AnyImageProcessor, LabelSet]:
    """Load a model with its image processor and label set: whole, finite, and of this package, or not at all.

    Args:
        name_or_path (`str` or `Path`): Directory or Hub name of the model.
        label_set (`str`, *optional*): Name or file of a label set; by default the one that belongs to the model.
        device (`str`, *optional*): Where the model goes; by default a GPU where there is one.
        revision (`str`, *optional*): Branch, tag or commit on the Hub; the main branch by default.
        dtype (`torch.dtype`, defaults to `torch.float32`): Type of the weights. `torch.bfloat16` is approximate, and
            fast where the hardware has it, which a line says where it does not; results are merged in float32 anyway.
        int8 (`bool`, defaults to `False`): Whether to keep the weights of linear layers in 8 bits: approximate, and for
            memory. Needs torchao (`pip install segmenter-hf[int8]`).
        compile (`bool`, defaults to `False`): Whether to compile the network on its first use. Each number of windows at
            once is compiled again, which takes up to a minute; it pays for many images.
        token_merging (`bool`, defaults to `False`): Whether similar patches become one token, in a model that was trained
            without it too: faster and approximate. Layers are those of the configuration, where it names some.
        token_merging_threshold (`float`, *optional*): How similar they must be, from -1 to 1, in place of the value of the
            configuration; turns it on.
        patch_size (`int`, *optional*): Side of the patches in pixels, for which the patch embedding and the positions are
            resized (FlexiViT): approximate, and faster with larger ones. By default that of the model. The windows are rounded
            up to whole patches.

    Returns:
        `tuple[PreTrainedModel, AnyImageProcessor, LabelSet]`: The model in evaluation mode, and what belongs to it.

    Raises:
        ImportError: If `int8` is wanted and torchao is missing.
        ValueError: If there is no such device, the label set does not fit, or as [`load_model_and_processor`].
    """
    target_device = find_device(device)
    arguments: dict[str, Any] = {"dtype": dtype} if patch_size is None else {"dtype": dtype, "patch_size": patch_size}
    if int8:
        arguments["quantization_config"] = int8_quantization()
    model, processor = load_model_and_processor(name_or_path, revision, **arguments)
    found = label_set_for(model, name_or_path, label_set, revision)
    if dtype == torch.bfloat16:
        warn_of_slow_bfloat16(target_device.type)
    model = model.to(target_device).eval()  # type: ignore[arg-type]  # transformers wraps `to` without its `self`
    if token_merging or token_merging_threshold is not None:
        enable_token_merging(model.config, token_merging_threshold)
    if compile:
        compile_network(model)
    return model, processor, found


def int8_quantization() -> Any:
    """The configuration by which transformers keeps the weights of linear layers in 8 bits.

    Raises:
        ImportError: If torchao is missing.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig
    except ImportError as error:
        raise ImportError("8-bit weights need torchao: `pip install segmenter-hf[int8]`.") from error
    return TorchAoConfig(Int8WeightOnlyConfig())


def enable_token_merging(config: VitEncoderConfig, threshold: float | None = None) -> None:
    """Name the layers that merge tokens, where a configuration names none: the first, and the one after a third of them.

    Args:
        config (`VitEncoderConfig`): Changed in place.
        threshold (`float`, *optional*): The new `token_merging_threshold`.

    Raises:
        ValueError: If the threshold is not from -1 to 1.
    """
    if not config.token_merging_layers:
        config.token_merging_layers = sorted({0, config.num_hidden_layers // 3})  # 1 and 5 of 12 in ALGM
    if threshold is not None:
        config.token_merging_threshold = threshold
        config.validate_token_merging()


def compile_network(model: PreTrainedModel) -> None:
    """Compile the network of a model on its first use.

    The compiler keeps what it made with the code of a function and only for some variants of it. The methods of all models
    share their code, so each model is entered through a function with code of its own.

    On a GPU kernels are chosen by timing them, the network runs as one CUDA graph for each number of windows, and weights of
    convolutions lie with the channels last. That was written without a GPU and is not measured.

    Args:
        model (`PreTrainedModel`): The model, on its device; its `forward` is replaced.

    Raises:
        ImportError: If torch is earlier than 2.11, the first one whose compiler was seen to take the models.
        ValueError: If the model merges tokens.
    """
    if model.config.token_merging_layers:
        raise ValueError(
            "`compile` and `token_merging` exclude each other: the number of tokens depends on the image."
        )
    require_version("torch", "2.11", "Compilation")
    network = model.forward

    @functools.wraps(network)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return network(*args, **kwargs)

    forward.__code__ = forward.__code__.replace(  # type: ignore[attr-defined]  # `wraps` is annotated as an object, and gives a function
        co_name=f"forward_of_model_{next(_compiled_models)}"
    )
    if model.device.type == "cuda":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-arg]  # as in `load_model`
    model.forward = torch.compile(forward, fullgraph=True, **compile_options(model.device))
    if model.device.type == "cuda":
        model.forward = copy_results(model.forward)


def compile_options(device: torch.device) -> dict[str, Any]:
    """The arguments of `torch.compile` for a device: on a GPU `max-autotune`, which uses CUDA graphs, elsewhere none.

    Args:
        device (`torch.device`): Where the network runs.

    Returns:
        `dict[str, Any]`: The arguments.
    """
    return {"mode": "max-autotune"} if device.type == "cuda" else {}


def copy_results(forward: Callable[..., ModelOutput]) -> Callable[..., ModelOutput]:
    """Copy the tensors that a CUDA graph gives: its next run writes to the same memory.

    Args:
        forward (`Callable`): Gives a `ModelOutput`.

    Returns:
        `Callable`: The same, with results of their own in each call.
    """

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> ModelOutput:
        torch.compiler.cudagraph_mark_step_begin()
        outputs = forward(*args, **kwargs)
        copies = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in outputs.items()}
        return type(outputs)(**copies)

    return run


def find_device(name: str | None) -> torch.device:
    """The device of that name, or by default a GPU where there is one.

    Raises:
        ValueError: If there is no such device here; names those that there are.
    """
    if name is None:
        return process_state().device
    names = ["cpu"]
    if kind := accelerator_type():
        names += [kind, *(f"{kind}:{index}" for index in range(torch.accelerator.device_count()))]
    if name not in names:
        raise ValueError(f"`device` must be {' or '.join(names)} on this machine, got {name!r}.")
    return torch.device(name)


def load_model_and_processor(
    name_or_path: str | Path, revision: str | None = None, **kwargs: Any
) -> tuple[PreTrainedModel, AnyImageProcessor]:
    """Load a semantic segmentation model of this package with its image processor, and none of its repository's code.

    Args:
        name_or_path (`str` or `Path`): Directory or Hub name of the model.
        revision (`str`, *optional*): Branch, tag or commit on the Hub; the main branch by default.
        kwargs: Further arguments of the model's `from_pretrained`.

    Returns:
        `tuple[PreTrainedModel, AnyImageProcessor]`: The model and its image processor.

    Raises:
        OSError: If there is no such model, or a file is missing.
        ValueError: If it is damaged or of another kind, or weights are missing, left over, of another shape or not finite.
    """
    name = str(name_or_path)
    if not Path(name).is_dir() and (Path(name).is_absolute() or name.count("/") > 1 or name.startswith((".", "~"))):
        raise FileNotFoundError(f"{name}: no such directory. {WHERE_FROM}")
    with translate_loading_errors(name_or_path):
        check_model_files(name_or_path)
        config = AutoConfig.from_pretrained(name_or_path, revision=revision or "main", trust_remote_code=False)
        check_stored_config(name_or_path, config, revision)
        # The classes of this package, whatever code the configuration names: nobody is asked whether to run it.
        with without_loading_report():
            model, loading_info = AutoModelForSemanticSegmentation.from_pretrained(
                name_or_path,
                revision=revision or "main",
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **kwargs,
            )
        processor = load_processor(name_or_path, revision)
        processor.device = None  # where it computes is said by its user, not by a file
        check_is_ours(name_or_path, model, processor)
        check_weights(name_or_path, model, loading_info, revision=revision)
    if kwargs.get("patch_size") is not None:
        processor = with_patch_size(processor, model.config.patch_size)
    return model, processor


def has_processor(name_or_path: str | Path) -> bool:
    """Whether a model comes with a file of its image processor; a name on the Hub passes."""
    folder = Path(name_or_path)
    return not folder.is_dir() or any((folder / name).is_file() for name in (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME))


def load_processor(name_or_path: str | Path, revision: str | None = None, advice: str = "", **fields: Any) -> Any:
    """Load the image processor of a model, and none of its repository's code.

    Args:
        name_or_path (`str` or `Path`): Directory or Hub name of the model.
        revision (`str`, *optional*): Branch, tag or commit on the Hub; the main branch by default.
        advice (`str`, defaults to `""`): What can be done about a missing file besides saving it.
        fields: Fields of the image processor that replace those of the file.

    Returns:
        `BaseImageProcessor`: The image processor.

    Raises:
        OSError: If there is no such model, or no file of its image processor.
        ValueError: If the file is damaged.
    """
    if not has_processor(name_or_path):
        raise FileNotFoundError(
            f"{Path(name_or_path) / IMAGE_PROCESSOR_NAME}: no such file, and it says how the model takes its images. Save the "
            f"image processor into the directory with `save_pretrained`, as the model was saved{advice}."
        )
    return AutoImageProcessor.from_pretrained(
        name_or_path, revision=revision or "main", trust_remote_code=False, **fields
    )


def with_patch_size(processor: AnyImageProcessor, patch_size: int) -> AnyImageProcessor:
    """The image processor for another patch size: windows, and strides as long as they, become whole patches.

    Args:
        processor (`BaseImageProcessor`): The image processor, which stays as it is.
        patch_size (`int`): Side of the patches in pixels.

    Returns:
        `BaseImageProcessor`: One for patches of that size.
    """
    fields = processor.to_dict()
    window_size, stride = processor.window_size, processor.window_stride
    if processor.padding == "end":
        window_size = -(-window_size // patch_size) * patch_size
    stride = window_size if stride == processor.window_size else stride
    return type(processor)(**fields | {"patch_size": patch_size, "window_size": window_size, "window_stride": stride})


def _why_not_found(error: OSError) -> str:
    """Why there is no model of a name, neither as a directory nor on the Hub, in a sentence or two."""
    if isinstance(error.__cause__, GatedRepoError):
        return "no such directory, and on the Hub it is for those only who accepted its terms and log in with `hf auth login`."
    if isinstance(error.__cause__, RepositoryNotFoundError):
        return "no such directory, and the Hub has no such model, or not for this account."
    if isinstance(error.__cause__, (LocalEntryNotFoundError, OfflineModeIsEnabled)) or "connect to" in str(error):
        return "no such directory, and the Hub, where it may be, cannot be reached."
    return one_line(error)


@contextmanager
def translate_loading_errors(name_or_path: str | Path) -> Iterator[None]:
    """Whatever a model that is damaged or something else raises, as a `ValueError` that names it.

    Here, and only here, untrusted files go through transformers, safetensors, torch and their readers of JSON and pickles.
    Each of them fails in ways of its own, which are documented nowhere, so that any `Exception` may come of a bad file.
    """
    try:
        with translate_http_errors(str(name_or_path)):  # a Hub that gives no answer now is no damaged model
            yield
    except OSError as error:
        # transformers' own, which has several lines and no number of the system
        if type(error) is not OSError or error.errno is not None or Path(name_or_path).is_dir():
            raise
        raise OSError(f"{name_or_path}: {_why_not_found(error)} {WHERE_FROM}") from error
    except (ImportError, MemoryError):
        raise
    except ValueError as error:
        for said, got in UNFIT_CONFIGURATIONS.items():
            if said in str(error):
                raise ValueError(f"{name_or_path}: expected a model of this package, got {got}. {REMEDY}") from error
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryError(f"{name_or_path}: the memory does not suffice for the model. {error}") from error
        said = str(error).split("\n")[0].split(". ")[0]  # what follows is long, and may advise to trust the file
        raise ValueError(
            f"{name_or_path}: expected a model of this package, got one that is damaged or something else. {REMEDY} "
            f"{type(error).__name__}: {said:.300}"
        ) from error


@contextmanager
def without_loading_report() -> Iterator[None]:
    """Leave out transformers' table of the weights that are not from the file; its other messages stay."""

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in str(record.msg)

    source = logging.getLogger("transformers.modeling_utils")
    source.addFilter(is_other)
    try:
        yield
    finally:
        source.removeFilter(is_other)


def check_weights(
    name_or_path: str | Path,
    model: PreTrainedModel,
    loading_info: Mapping[str, Any],
    *,
    revision: str | None = None,
    new_heads: bool = False,
) -> None:
    """Refuse a model whose weights are not all from its file, or are no finite floating-point numbers.

    Args:
        name_or_path (`str` or `Path`): Where it was loaded from.
        model (`PreTrainedModel`): The model.
        loading_info (`dict`): What `from_pretrained` returned beside it with `output_loading_info=True`.
        revision (`str`, *optional*): Branch, tag or commit on the Hub that it was loaded from; the main branch by default.
        new_heads (`bool`, defaults to `False`): Whether only the encoder must be from the file, and weights may be left over,
            for training continues with other heads.

    Raises:
        ValueError: If weights are missing, left over, of another shape or no finite floating-point numbers.
    """
    wrong = {
        "missing": loading_info["missing_keys"],
        "of another shape": {key for key, *_ in loading_info["mismatched_keys"]},
    }
    if new_heads:
        encoder = f"{model.base_model_prefix}."
        wrong = {problem: [key for key in keys if key.startswith(encoder)] for problem, keys in wrong.items()}
    else:
        wrong["left over"] = loading_info["unexpected_keys"]
    weights = dict(model.named_parameters())
    expected = weights.keys() | dict(model.base_model.named_parameters()).keys()
    wrong["no floating-point numbers"] = stored_integers(name_or_path, revision) & expected
    # Those in 8 bits are back in floats for a moment, others are as they were.
    wrong["NaN or infinite"] = [key for key in weights if not torch.isfinite(weights[key].detach().dequantize()).all()]
    if described := describe_keys(wrong):
        raise ValueError(f"{name_or_path}: the weights are not those of the model: {described}. {REMEDY}")


def describe_keys(problems: Mapping[str, Collection[str]]) -> str:
    """Say how many weights have each problem, and the names of the first ones; nothing where none has one."""
    return "; ".join(
        f"{len(keys)} {problem} ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})"
        for problem, keys in problems.items()
        if keys
    )


def stored_integers(name_or_path: str | Path, revision: str | None = None) -> set[str]:
    """The weights that the safetensors files of a model hold as integers; a loaded model has them as floats."""
    config_file = cast(str, cached_file(str(name_or_path), CONFIG_NAME, revision=revision or "main"))
    found: set[str] = set()
    for path in Path(config_file).parent.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {key for key in file.keys() if "F" not in file.get_slice(key).get_dtype()}  # noqa: SIM118
    return found


class _HasConfig(Protocol):
    config: Any


def check_is_ours(name_or_path: str | Path, model: Any, processor: Any) -> None:
    """Refuse what was loaded if it is not of this package.

    Args:
        name_or_path (`str` or `Path`): Where it was loaded from.
        model (`PreTrainedModel` or `PreTrainedConfig`): The model, or its configuration.
        processor (`BaseImageProcessor`): Its image processor.

    Raises:
        ValueError: If one is of another class.
    """
    for part, expected in ((model, "Segmenter or SETR model"), (processor, "SegmenterImageProcessor")):
        if not type(part).__module__.startswith("segmenter_hf."):
            raise ValueError(f"{name_or_path}: expected a {expected}, got a {type(part).__name__}. {REMEDY}")


def label_set_for(
    model: _HasConfig, name_or_path: str | Path, label_set: str | None = None, revision: str | None = None
) -> LabelSet:
    """The label set of a name or file, or by default the one that belongs to a model, with two classes for one logit.

    Args:
        model (`PreTrainedModel`): The model, or something else with its `config`.
        name_or_path (`str` or `Path`): Directory or Hub name of the model.
        label_set (`str`, *optional*): Name or file of a label set.
        revision (`str`, *optional*): Branch, tag or commit on the Hub; the main branch by default.

    Raises:
        FileNotFoundError: If there is no such label set.
        ValueError: If it does not fit the model.
    """
    if label_set is None:
        found = get_model_label_set(name_or_path, model.config.id2label or {}, revision)
    else:
        found = load_label_set(label_set)
    found = found.with_background()
    check_label_set(model, found)
    return found


def check_label_set(model: _HasConfig, label_set: LabelSet) -> None:
    """Refuse a label set that is not for the model, or whose names cannot be written.

    Raises:
        ValueError: If it has another number of classes (two for a model of one), or a name is no text.
    """
    if label_set.num_labels != max(model.config.num_labels, 2):
        raise ValueError(
            f"The model has {model.config.num_labels} classes and the label set {label_set.name!r} "
            f"{label_set.num_labels}: choose the label set that the model was trained with."
        )
    for name in label_set.labels:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"The label set {label_set.name!r} has the name {name!r:.200}, which holds half a character and cannot be "
                "written: rename the class."
            ) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that the memory does not suffice."""
    is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return is_memory or any(words in str(error).lower() for words in OUT_OF_MEMORY)
