"""A training set of two: labelled images, and further ones, such as images with labels that a model gave them."""

from functools import lru_cache

import numpy as np
import torch

from .datasets import TrainDataset


class MixedTrainDataset(TrainDataset):
    """The crops of a labelled set, and among them crops of an extra set, whose images are drawn `weight` times as often.

    An epoch has each labelled image once and `round(weight * extra images)` extra ones, at least one. These go on where the
    epoch before ended, in an endless row of permutations of the extra images: no image comes again before all the others
    came. The order of an epoch is left to the sampler, which shuffles both together.

    Args:
        labelled ([`TrainDataset`]): The labelled set.
        extra ([`TrainDataset`]): The extra set, with the same augmentation.
        weight (`float`): How many times as often as a labelled image an extra image is drawn.

    Raises:
        ValueError: If `weight` is not above 0, or the extra set is empty.
    """

    def __init__(self, labelled: TrainDataset, extra: TrainDataset, weight: float) -> None:
        if not weight > 0:
            raise ValueError(f"`extra_weight` must be above 0, got {weight}.")
        if not len(extra):
            raise ValueError("The extra dataset has no images.")
        super().__init__(
            labelled.dataset, labelled.label_set, labelled.augmentation, labelled.processor, labelled.seed
        )
        self.extra = extra
        self.num_extra = max(round(weight * len(extra)), 1)

    def set_epoch(self, epoch: int) -> None:
        """Give every epoch its own draws, and its own extra images."""
        super().set_epoch(epoch)
        self.extra.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset) + self.num_extra

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`pixel_values` (channels, crop, crop) and `labels` (crop, crop): of a labelled image, or beyond them of an extra one."""
        if index < len(self.dataset):
            return super().__getitem__(index)
        place = int(self._epoch) * self.num_extra + index - len(self.dataset)
        row = extra_row(place, len(self.extra), self.seed)
        return self.extra.crop(self.extra.dataset[row], index)


def extra_row(place: int, num_rows: int, seed: int) -> int:
    """The row at a place of the endless row of permutations."""
    turn, place = divmod(place, num_rows)
    return int(_permutation(num_rows, seed, turn)[place])


@lru_cache(maxsize=4)
def _permutation(num_rows: int, seed: int, turn: int) -> np.ndarray:
    return np.random.default_rng((seed, turn, num_rows)).permutation(num_rows)
