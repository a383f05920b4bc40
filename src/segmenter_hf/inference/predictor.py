"""One object for prediction: a model with its image processor, its label set and the protocol."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel

from ..data.label_sets import LabelSet
from ..models.configuration_vit_encoder import VitEncoderConfig
from ..models.image_io import read_channels
from ..models.image_processing_segmenter import AnyImageProcessor
from ..models.image_windows import ImageWindows
from ..models.sliding_window import WindowMerger
from ..models.window_geometry import Window
from .model_loading import check_label_set, is_out_of_memory, load_model
from .protocol import InferenceProtocol
from .runtimes import RuntimeNetwork, load_network


CLASS_MAP_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)

InputImage = str | os.PathLike[str] | Image.Image | np.ndarray | torch.Tensor


class Segmentation(NamedTuple):
    """The result of one image.

    Args:
        key (`Any`): What the caller calls the image.
        class_map (`torch.Tensor` of shape `(height, width)`, *optional*): The class of each pixel at the original size, on the
            device of the model; `None` where the image cannot be read.
        scores (`torch.FloatTensor` of shape `(num_labels, height, width)`, *optional*): Class probabilities from 0 to 1, where
            they were asked for.
        error (`ValueError`, *optional*): Why the image cannot be read.
    """

    key: Any = None
    class_map: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    error: ValueError | None = None

    def known_class_map(self) -> torch.Tensor:
        """The class map of an image that was read.

        Returns:
            `torch.Tensor` of shape `(height, width)`: `class_map`.

        Raises:
            ValueError: If the image cannot be read: `error`.
        """
        if self.class_map is None:
            raise self.error or ValueError(f"{self.key}: expected a class map, got none.")
        return self.class_map


class Predictor:
    """Segments images with the published protocol.

    ```python
    predictor = Predictor.from_pretrained("outputs/demo/model")
    predictor("street.jpg").class_map  # (height, width)
    ```

    Args:
        model (`PreTrainedModel` or [`RuntimeNetwork`]): A semantic segmentation model of this package; it is put into
            evaluation mode. Or its network in another runtime.
        processor (`BaseImageProcessor`): Its image processor.
        label_set (`LabelSet`): Its classes.
        protocol (`InferenceProtocol`, *optional*): How images are seen; single scale by default.

    Raises:
        ValueError: If the label set does not fit the model.
    """

    def __init__(
        self,
        model: PreTrainedModel | RuntimeNetwork,
        processor: AnyImageProcessor,
        label_set: LabelSet,
        protocol: InferenceProtocol | None = None,
    ) -> None:
        check_label_set(model, label_set)
        self.model: PreTrainedModel | RuntimeNetwork = model.eval()
        self.processor = processor
        self.label_set = label_set
        self.protocol = InferenceProtocol() if protocol is None else protocol

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        protocol: InferenceProtocol | None = None,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        runtime: str = "torch",
        precision: str | None = None,
        **kwargs: Any,
    ) -> "Predictor":
        """Load a model with all that belongs to it.

        Args:
            name_or_path (`str` or `Path`): Directory or Hub name of the model.
            protocol (`InferenceProtocol`, *optional*): How images are seen; single scale by default.
            device (`str`, *optional*): Where the model goes; by default a GPU where there is one.
            dtype (`torch.dtype`, *optional*): Type of the weights; float32 by default. For `"torch"` only.
            runtime (`str`, defaults to `"torch"`): What runs the network: `"torch"`, or `"onnxruntime"` or `"openvino"` for
                a directory that `export_model` wrote for it. Everything but the network stays the same.
            precision (`str`, *optional*): With an exported model one of the precisions it was exported in: `"float32"`,
                `"bfloat16"`, `"float16"`, `"int8"` or `"int8-dynamic"`; by default the first of them.
            kwargs: Further arguments of [`load_model`]: `label_set`, `revision`, `int8`, `compile`, `token_merging`,
                `token_merging_threshold`, `patch_size`.

        Returns:
            `Predictor`: The predictor.

        Raises:
            ImportError: If the runtime is not installed.
            OSError: If there is no such model, or a file is missing.
            ValueError: If there is no such runtime or precision, an argument is not for the runtime, or as [`load_model`].
        """
        if runtime != "torch":
            of_torch = ("compile", "int8", "patch_size", "token_merging", "token_merging_threshold")
            given = {name: kwargs.pop(name) for name in of_torch if name in kwargs}
            refused = [name for name, value in given.items() if value is not None and value is not False]
            refused += ["dtype"] if dtype not in (None, torch.float32) else []
            if refused:
                raise ValueError(
                    f"`{refused[0]}` is for the runtime 'torch' only: a model is exported with its precision, and "
                    f"{runtime!r} runs it as it is. Leave it out, or give `precision`."
                )
            return cls(*load_network(name_or_path, runtime, precision=precision, device=device, **kwargs), protocol)
        if precision is not None:
            raise ValueError("`precision` is for exported models: give `dtype` with the runtime 'torch'.")
        dtype = torch.float32 if dtype is None else dtype
        return cls(*load_model(name_or_path, device=device, dtype=dtype, **kwargs), protocol)

    def with_protocol(self, protocol: InferenceProtocol) -> "Predictor":
        """Return the same model with another protocol."""
        return type(self)(self.model, self.processor, self.label_set, protocol)

    @property
    def config(self) -> VitEncoderConfig:
        """The configuration of the model."""
        return cast(VitEncoderConfig, self.model.config)

    @property
    def runtime(self) -> str:
        """What runs the network: `"torch"`, `"onnxruntime"` or `"openvino"`."""
        return self.model.runtime if isinstance(self.model, RuntimeNetwork) else "torch"

    @property
    def precision(self) -> str:
        """What the network computes in, such as `"float32"`, `"bfloat16"` or `"int8"`."""
        if isinstance(self.model, RuntimeNetwork):
            return self.model.precision
        return str(self.model.dtype).removeprefix("torch.")

    def describe_network(self) -> dict[str, Any]:
        """Return what to save beside results.

        That is `dtype`; `patch_size` where it was changed; `runtime` where it is another than torch; and the fields of
        token merging where the network merges tokens.
        """
        described: dict[str, Any] = {"dtype": self.precision}
        if self.config.patch_size != self.config.with_saved_patch_size().patch_size:
            described["patch_size"] = self.config.patch_size
        if self.runtime != "torch":
            described["runtime"] = self.runtime
        if self.config.token_merging_layers:
            names = [f"token_merging_{name}" for name in ("layers", "window_size", "threshold", "batchwise")]
            described |= {name: getattr(self.config, name) for name in names}
        return described

    @property
    def class_map_dtype(self) -> torch.dtype:
        """The smallest of the types `uint8` and `int32` that holds the classes."""
        return torch.uint8 if self.config.num_labels <= 256 else torch.int32

    @torch.no_grad()
    def compute_logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Run the network; the only place where that happens.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_windows, num_channels, height, width)`): Normalized windows in
                float32 on the CPU.

        Returns:
            `torch.FloatTensor` of shape `(num_windows, num_labels, patch_height, patch_width)`: Patch logits, on any device.
        """
        if isinstance(self.model, RuntimeNetwork):
            return self.model(pixel_values)
        pixel_values = pixel_values.to(self.model.device, self.model.dtype)
        return self.model(pixel_values=pixel_values, return_dict=True).logits

    def prepare(self, image: "InputImage | ImageWindows") -> ImageWindows:
        """Return the windows of an image by the protocol, which are cut and normalized when they are asked for.

        Args:
            image (path, PIL image, array, tensor or [`ImageWindows`]): The image; windows are taken as they are.

        Returns:
            `ImageWindows`: The windows.

        Raises:
            ValueError: If it is no image, or has too many pixels.
        """
        if isinstance(image, ImageWindows):
            return image
        if isinstance(image, (str, os.PathLike)):
            image = read_channels(image, self.processor.num_channels, self.protocol.max_image_pixels)
        return self.processor.lazy_windows(image, **self.protocol.processor_kwargs())

    def __call__(
        self,
        images: "InputImage | list[InputImage] | tuple[InputImage, ...]",
        *,
        return_scores: bool = False,
        dtype: torch.dtype = torch.long,
    ) -> "Segmentation | list[Segmentation]":
        """Segment an image, or several of any sizes.

        Args:
            images (path, PIL image, array or tensor, or a list of them): The images.
            return_scores (`bool`, defaults to `False`): Whether class probabilities are wanted too.
            dtype (`torch.dtype`, defaults to `torch.long`): Integer type of the class maps.

        Returns:
            [`Segmentation`] or a list of them: The key is the path of an image, or its place in the list.

        Raises:
            FileNotFoundError: If there is no such file.
            MemoryError: If the memory does not suffice; says what needs less.
            ValueError: If an image cannot be read, or `dtype` cannot hold the classes.
        """
        given = list(images) if isinstance(images, (list, tuple)) else [images]
        items = (
            (image if isinstance(image, (str, os.PathLike)) else index, image) for index, image in enumerate(given)
        )
        results = []
        for result in self.stream(items, return_scores=return_scores, dtype=dtype):
            if result.error is not None:
                missing = result.error.__cause__
                raise missing if isinstance(missing, FileNotFoundError) else result.error
            results.append(result)
        return results if isinstance(images, (list, tuple)) else results[0]

    def stream(
        self,
        items: "Iterable[tuple[Any, InputImage | ImageWindows | Callable[[], InputImage | ImageWindows]]]",
        *,
        return_scores: bool = False,
        dtype: torch.dtype = torch.long,
    ) -> Iterator[Segmentation]:
        """Segment images of any sizes one after the other.

        Windows of all scales, flips and images go through the network in batches. They are cut and normalized for their
        batch only, and rows of a map are merged as soon as the windows over them are through. Besides the image and its
        map the memory holds a batch, and the patch logits of about two rows of windows for each scale and flip.

        Args:
            items (`Iterable` of pairs): A key of any kind, and an image: a path, PIL image, array, tensor, what `prepare`
                returns, or a callable that gives one of these. They are taken when they are needed.
            return_scores (`bool`, defaults to `False`): Whether class probabilities are wanted too.
            dtype (`torch.dtype`, defaults to `torch.long`): Integer type of the class maps. A large map of up to 256
                classes needs an eighth of the memory as `torch.uint8`.

        Yields:
            [`Segmentation`]: The result of each item, in their order, with its key. An image that cannot be read (a
            `ValueError` or a missing file) has an error instead of a class map.

        Raises:
            MemoryError: If the memory of the device or of this machine does not suffice; says what needs less.
            ValueError: If `dtype` cannot hold the classes.
        """
        num_labels = self.config.num_labels
        if dtype not in CLASS_MAP_DTYPES or num_labels - 1 > torch.iinfo(dtype).max:
            raise ValueError(f"`dtype` must be an integer type that holds {num_labels} classes, got {dtype}.")
        batch = _WindowBatch(self, return_scores, dtype)
        with translate_memory_errors(self.protocol.window_batch_size):
            for key, image in items:
                try:
                    windows = self.prepare(image() if callable(image) else image)
                except (FileNotFoundError, ValueError) as error:
                    batch.fail(key, error)
                else:
                    del image  # only its windows are held from here on
                    yield from batch.add(key, windows)
                    del windows  # before the next image is read
                yield from batch.finished()
            yield from batch.run()


class _Pending(NamedTuple):
    """An image whose result was not yielded yet: its merger, or why it cannot be read."""

    key: Any
    merger: WindowMerger | None
    error: ValueError | None


class _WindowBatch:
    """The windows that go through the network next, and the images that wait for theirs."""

    def __init__(self, predictor: Predictor, return_scores: bool, dtype: torch.dtype) -> None:
        self.predictor, self.return_scores, self.dtype = predictor, return_scores, dtype
        self._pending: deque[_Pending] = deque()
        self._windows: list[tuple[WindowMerger, Window, torch.Tensor]] = []

    def fail(self, key: Any, error: FileNotFoundError | ValueError) -> None:
        """Take an image that cannot be read."""
        if isinstance(error, FileNotFoundError):
            missing, error = error, ValueError(str(error))
            error.__cause__ = missing
        self._pending.append(_Pending(key, None, error))

    def add(self, key: Any, source: ImageWindows) -> Iterator[Segmentation]:
        """Take the windows of an image; the results that are complete meanwhile."""
        # From top to bottom in all views at once, so that rows can be merged and forgotten.
        windows = sorted(source.windows, key=lambda window: window.top / window.view_height)
        processor = self.predictor.processor
        merger = WindowMerger(windows, processor.patch_size, None, self.return_scores, self.dtype, processor.padding)
        self._pending.append(_Pending(key, merger, None))
        for window in windows:
            pixels = source.pixel_values(window)
            is_full = len(self._windows) == self.predictor.protocol.window_batch_size
            if is_full or (self._windows and self._windows[0][2].shape != pixels.shape):
                yield from self.run()
            self._windows.append((merger, window, pixels))

    def run(self) -> Iterator[Segmentation]:
        """Take the batch through the network; the results that are then complete."""
        if self._windows:
            logits = self.predictor.compute_logits(torch.stack([pixels for _, _, pixels in self._windows]))
            first = 0
            while first < len(self._windows):  # the windows of an image stand together
                merger, last = self._windows[first][0], first
                while last < len(self._windows) and self._windows[last][0] is merger:
                    last += 1
                merger.add([window for _, window, _ in self._windows[first:last]], logits[first:last])
                first = last
            self._windows.clear()
        yield from self.finished()

    def finished(self) -> Iterator[Segmentation]:
        """The results that are complete, and whose forerunners were."""
        while self._pending and (self._pending[0].merger is None or self._pending[0].merger.is_complete):
            key, merger, error = self._pending.popleft()
            if merger is None:
                yield Segmentation(key, error=error)
            else:
                yield Segmentation(key, merger.segmentation, merger.scores)


@contextmanager
def translate_memory_errors(window_batch_size: int) -> Iterator[None]:
    """Turn errors of memory that does not suffice for a segmentation into ones that say what needs less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        fewer = f"`window_batch_size=1` instead of {window_batch_size}, " if window_batch_size > 1 else ""
        raise MemoryError(
            f"The memory does not suffice for the segmentation ({reason}). Less is needed with {fewer}the dtype bfloat16, "
            "and one scale instead of several. Windows are streamed, so beside them only the image, its map and some rows "
            "of logits are held: with `full_resolution` give a smaller image, or leave it out."
        ) from error


__all__ = ["InputImage", "Predictor", "Segmentation"]
