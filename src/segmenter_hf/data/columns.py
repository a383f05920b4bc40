"""Which columns of a dataset hold the images and the masks."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import datasets


AnyDataset: TypeAlias = datasets.Dataset | datasets.IterableDataset

# Names that columns have in the datasets of the Hub, lower case; the first that is there counts for images.
IMAGE_COLUMNS = ("image", "images", "img", "pixel_values", "photo", "picture")
LABEL_COLUMNS = (
    *("annotation", "annotations", "mask", "masks", "label", "labels", "segmentation_map", "segmentation_maps"),
    *("segmentation_mask", "segmentation", "semantic_segmentation", "semantic_map", "label_map", "gt", "ground_truth"),
)


def find_columns(dataset: AnyDataset, image_column: str | None, label_column: str | None) -> tuple[str, str]:
    """The columns of the images and of the masks.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): The dataset.
        image_column (`str`, *optional*), label_column (`str`, *optional*): Their names. Without one it is found: by a usual
            name of a column that holds images, or, for masks, as the only other column of images.

    Returns:
        `tuple[str, str]`: Both names.

    Raises:
        ValueError: If a column is missing, or several may be meant.
    """
    images = image_columns(dataset)
    image_column = image_column or find_image_column(dataset)
    if label_column is None:
        others = [name for name in images if name != image_column]
        named = [name for name in others if name.lower() in LABEL_COLUMNS]
        if "annotation" in named:
            named = ["annotation"]
        candidates = named or [name for name in others if name.lower() not in IMAGE_COLUMNS]
        if len(candidates) > 1:
            raise ValueError(
                f"The columns {candidates} may all hold the masks: choose one with `label_column`. {_describe(dataset)}"
            )
        label_column = candidates[0] if candidates else "annotation"
    if image_column == label_column:
        raise ValueError(
            f"Expected two columns, one of images and one of masks, got {image_column!r} for both. Name them with "
            "`image_column` and `label_column`."
        )
    check_columns(dataset, {image_column: "image_column", label_column: "label_column"})
    return image_column, label_column


def find_image_column(dataset: AnyDataset) -> str:
    """The column of images that has a usual name, or is the only one; "image" where there is none."""
    images = image_columns(dataset)
    named = {name.lower(): name for name in images}
    found = next((named[name] for name in IMAGE_COLUMNS if name in named), None)
    return found or (images[0] if len(images) == 1 else "image")


def check_columns(dataset: AnyDataset, arguments: Mapping[str, str]) -> None:
    """Refuse columns that are not there; `arguments` has the argument that names each.

    Raises:
        ValueError: If one is missing.
    """
    present = column_names(dataset)
    if missing := [column for column in arguments if column not in present]:
        raise ValueError(
            f"The dataset has no column {' or '.join(map(repr, missing))}, only {present}. Name the columns with "
            f"{' and '.join(f'`{name}`' for name in arguments.values())}. {_describe(dataset)}".strip()
        )


def column_names(dataset: AnyDataset) -> list[str]:
    """The columns of a dataset; those of its first row where a stream does not say."""
    return dataset.column_names or list(next(iter(dataset), {}))


def image_columns(dataset: AnyDataset) -> list[str]:
    """The columns that hold images: by their type, or by the first row where a stream does not say."""
    if dataset.features is None:
        return [name for name, value in next(iter(dataset), {}).items() if _is_image_value(value)]
    return [name for name, feature in dataset.features.items() if _is_image_feature(feature)]


def _is_image_feature(feature: Any) -> bool:
    if isinstance(feature, datasets.Image):
        return True
    if isinstance(feature, datasets.Value):
        return feature.dtype in ("binary", "large_binary")
    return isinstance(feature, Mapping) and {"bytes", "path"} <= feature.keys()


def _is_image_value(value: Any) -> bool:
    is_encoded = isinstance(value, Mapping) and {"bytes", "path"} <= value.keys()
    return is_encoded or isinstance(value, bytes) or hasattr(value, "convert")


def _describe(dataset: AnyDataset) -> str:
    images: Sequence[str] = image_columns(dataset)
    return f"Columns of images: {', '.join(images) or 'none'}."
