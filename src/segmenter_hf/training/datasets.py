"""Training sets: augmented crops of rows, with draws that depend on the seed, the epoch and the row alone."""

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..data.augmentation import SegmentationAugmentation
from ..data.decoding import decode_example
from ..data.label_sets import LabelSet
from ..data.loading import AnyDataset
from ..models.image_io import scale_values
from ..models.image_processing_segmenter import SegmenterImageProcessor
from .arguments import DataArguments, SegmentationTrainingArguments


logger = logging.getLogger(__name__)

SHUFFLE_BUFFER = 1000  # rows of a stream that are shuffled at once


class TrainDataset(Dataset):
    """Augmented crops, the same for the same seed, epoch and row whatever the number of workers and processes.

    Args:
        dataset (`datasets.Dataset`): As from `load_segmentation_datasets`.
        label_set (`LabelSet`): Says what the stored labels mean.
        augmentation (`SegmentationAugmentation`): Joint transform of image and mask.
        processor (`BaseImageProcessor`): Normalizes the crop.
        seed (`int`): Seed of all draws.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        label_set: LabelSet,
        augmentation: SegmentationAugmentation,
        processor: SegmenterImageProcessor,
        seed: int,
    ) -> None:
        self.dataset = dataset
        self.label_set = label_set
        self.augmentation = augmentation
        self.processor = processor
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()  # workers may live for all epochs

    def set_epoch(self, epoch: int) -> None:
        """Give every epoch its own draws."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`pixel_values` (channels, crop, crop) and `labels` (crop, crop) of one row."""
        return self.crop(self.dataset[index], index)

    def crop(self, row: dict[str, Any], *numbers: int) -> dict[str, torch.Tensor]:
        """An augmented crop of a row; the numbers tell its draws from those of other rows."""
        image, labels = decode_example(row, self.label_set, num_channels=self.processor.num_channels)
        image = scale_values(image, self.processor.value_range)
        if image.dtype != np.uint8:
            image = np.rint(image * 257).astype(np.uint16)
        image, labels = self.augmentation(
            image, labels, np.random.default_rng((self.seed, int(self._epoch), *numbers))
        )
        # The labels are reduced already, once, where they were decoded; the values have their range.
        fields: dict[str, Any] = {"do_resize": False, "do_split_windows": False, "do_reduce_labels": False}
        if image.dtype != np.uint8:
            fields |= {"value_range": (0, 65535), "input_data_format": "channels_last"}
        inputs = self.processor(image, labels, **fields)
        return {"pixel_values": inputs["pixel_values"][0], "labels": inputs["labels"][0]}


class StreamedTrainDataset(IterableDataset):
    """[`TrainDataset`] of a stream without end, which begins again, in another order, when all rows were there.

    It is shuffled in a buffer. Workers share its rows: each row comes once in a pass. As there is one epoch, a resumed
    run finds its place by passing over as many batches as it had.

    Args:
        examples (`TrainDataset`): What makes crops of rows; its dataset is a `datasets.IterableDataset`.
        share_files (`bool`, defaults to `True`): Whether workers may share the files of the stream, where these are enough.
            Else each reads all rows and makes crops of its own. Of `dataset.take(n)`, files cannot be shared: `datasets`
            would take a part of the n rows from each worker's files, however few they hold.
    """

    def __init__(self, examples: TrainDataset, share_files: bool = True) -> None:
        self.examples = examples
        self.share_files = share_files

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        for epoch in itertools.count():
            rows = self.examples.dataset.shuffle(seed=self.examples.seed + epoch, buffer_size=SHUFFLE_BUFFER)
            if info is not None and not (self.share_files and rows.num_shards >= info.num_workers):
                # A loop over the rows would get those of the worker's files alone; `iter` gives all to each worker.
                batches = itertools.islice(rows.iter(batch_size=1), worker, None, info.num_workers)
                rows = ({name: values[0] for name, values in batch.items()} for batch in batches)
            number = -1
            for number, row in enumerate(rows):
                yield self.examples.crop(row, epoch, worker, number)
            if number < 0:
                return


def build_augmentation(
    data_args: DataArguments, ignore_index: int, processor: SegmenterImageProcessor
) -> SegmentationAugmentation:
    """The augmentation that the arguments ask for; crops are padded with the mean color of the processor."""
    return SegmentationAugmentation(
        crop_size=data_args.crop_size,
        size=data_args.image_size,
        max_ratio=data_args.max_ratio,
        ratio_range=(data_args.min_scale, data_args.max_scale),
        flip_probability=data_args.horizontal_flip_probability,
        vertical_flip_probability=data_args.vertical_flip_probability,
        right_angle_rotations=data_args.right_angle_rotations,
        cat_max_ratio=data_args.cat_max_ratio,
        photometric_distortion=data_args.photometric_distortion,
        ignore_index=ignore_index,
        pad_value=tuple(round(255 * mean) for mean in processor.image_mean),
    )


def build_train_dataset(
    train_set: AnyDataset,
    label_set: LabelSet,
    processor: SegmenterImageProcessor,
    data_args: DataArguments,
    training_args: SegmentationTrainingArguments,
) -> "TrainDataset | StreamedTrainDataset":
    """Make augmented crops of a split, in the order of a stream if it is one."""
    augmentation = build_augmentation(data_args, label_set.ignore_index, processor)
    examples = TrainDataset(train_set, label_set, augmentation, processor, training_args.seed)
    if not data_args.streaming:
        return examples
    if "epoch" in (training_args.eval_strategy, training_args.save_strategy):
        logger.warning(
            "A stream has no epochs: evaluation and checkpoints come at the end only. Set `eval_strategy` and "
            "`save_strategy` to steps, with `eval_steps` and `save_steps`, for more."
        )
    return StreamedTrainDataset(examples, share_files=data_args.max_train_samples is None)
