"""Features of a frozen encoder, computed once for the crops of some epochs and read from disk after that."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..models.modeling_vit_encoder import VitEncoderOutput
from ..utils.atomic_files import atomic_directory
from ..utils.processes import process_state
from .datasets import TrainDataset


FEATURES_FOLDER = ".features"  # in the output directory of a run, until its end
BATCH_SIZE = 8


class CachedFeatures(Dataset):
    """Features and labels of the crops of the first epochs, which later epochs repeat in turn.

    Args:
        directory (`Path`): Where `features.npy` and `labels.npy` are.
        num_examples (`int`): Crops of an epoch.
    """

    def __init__(self, directory: Path, num_examples: int) -> None:
        self.directory = directory
        self.num_examples = num_examples
        self.features = np.load(
            directory / "features.npy", mmap_mode="r"
        )  # (epochs * examples, levels, tokens, width)
        self.labels = np.load(directory / "labels.npy", mmap_mode="r")  # (epochs * examples, height, width)
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()  # workers may live for all epochs

    def set_epoch(self, epoch: int) -> None:
        """Choose the crops of an epoch."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`features` (levels, tokens, width) in float16 and `labels` (height, width) of a crop."""
        place = int(self._epoch) % (len(self.labels) // self.num_examples) * self.num_examples + index
        return {
            "features": torch.from_numpy(np.array(self.features[place])),
            "labels": torch.from_numpy(self.labels[place].astype(np.int64)),
        }


def cache_features(
    model: PreTrainedModel, examples: TrainDataset, num_epochs: int, output_dir: Path
) -> CachedFeatures:
    """Compute the features of the crops of some epochs, unless an earlier start of the same run has done so.

    Args:
        model (`PreTrainedModel`): The model, whose encoder is frozen.
        examples (`TrainDataset`): Makes the crops of each epoch.
        num_epochs (`int`): Epochs whose crops are kept.
        output_dir (`Path`): Directory of the run, in which they are kept.

    Returns:
        [`CachedFeatures`]: The training set of features.

    Raises:
        ValueError: If the training set is a stream, or the decoder sees merged tokens.
    """
    if not isinstance(examples, TrainDataset):
        raise ValueError(
            "The crops of a stream cannot be kept: set `cache_feature_epochs` to 0, or `streaming` to false."
        )
    if model.config.token_merging_layers and model.config.decoder_type == "mask_transformer":
        raise ValueError(
            "Tokens that were merged cannot be kept: set `cache_feature_epochs` to 0, or `token_merging` to false."
        )
    directory, state = Path(output_dir) / FEATURES_FOLDER, process_state()
    if state.is_main_process and not directory.is_dir():
        for leftover in directory.parent.glob(f".{FEATURES_FOLDER}-partial-*"):  # of a killed run
            shutil.rmtree(leftover, ignore_errors=True)
        with atomic_directory(directory) as partial:
            _write_features(model, examples, num_epochs, partial)
    state.wait_for_everyone()
    return CachedFeatures(directory, len(examples))


@torch.no_grad()
def _write_features(model: PreTrainedModel, examples: TrainDataset, num_epochs: int, directory: Path) -> None:
    encoder, was_training = model.base_model, model.training
    encoder.eval()
    files: list[np.memmap] = []
    total, place = num_epochs * len(examples), 0
    with tqdm(total=total, desc="Computing features", unit="crop") as progress:
        for epoch in range(num_epochs):
            examples.set_epoch(epoch)
            for batch in DataLoader(examples, BATCH_SIZE, generator=torch.Generator().manual_seed(0)):
                states = _levels(encoder(batch["pixel_values"].to(encoder.device)))
                features = torch.stack(states, dim=1).half().cpu().numpy()
                labels = batch["labels"].numpy()
                if not files:
                    dtype: Any = np.uint8 if _fits(model) else np.int32
                    files = [
                        _new_file(directory / name, kind, (total, *values.shape[1:]))
                        for name, kind, values in (
                            ("features.npy", np.float16, features),
                            ("labels.npy", dtype, labels),
                        )
                    ]
                files[0][place : place + len(features)], files[1][place : place + len(labels)] = features, labels
                place += len(features)
                progress.update(len(features))
    for file in files:
        file.flush()
    examples.set_epoch(0)
    model.train(was_training)


def _new_file(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
    """An array on disk whose place is reserved: a disk that is full later would end the process by a signal.

    Raises:
        OSError: If there is no place for it.
    """
    file = open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as reserved:
            os.posix_fallocate(reserved.fileno(), 0, path.stat().st_size)
    return file


def _fits(model: PreTrainedModel) -> bool:
    """Whether a byte can hold the labels."""
    return len(model.config.id2label or ()) <= 256 and 0 <= model.config.semantic_loss_ignore_index <= 255


def _levels(outputs: VitEncoderOutput) -> tuple[torch.Tensor, ...]:
    """The states that the decoder sees, each (batch, tokens, width)."""
    return outputs.feature_states or outputs[:1]  # else the last hidden state


@contextmanager
def encoder_replaced_by(model: PreTrainedModel, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A model whose encoder returns the features among some inputs; gives the inputs that it then takes.

    Args:
        model (`PreTrainedModel`): The model.
        inputs (`dict`): `features` (batch, levels, tokens, width) and `labels` (batch, height, width).
    """
    encoder, labels = model.base_model, inputs["labels"]
    features = inputs["features"].to(encoder.dtype)
    states = features.unbind(1)
    outputs = VitEncoderOutput(last_hidden_state=states[-1], feature_states=states if encoder.out_indices else None)
    # The model takes no more than the size from the pixels.
    shape = (len(labels), model.config.num_channels, *labels.shape[1:])
    encoder.forward = lambda *args, **kwargs: outputs
    try:
        yield {"labels": labels, "pixel_values": features.new_zeros(1).expand(shape)}
    finally:
        del encoder.forward
