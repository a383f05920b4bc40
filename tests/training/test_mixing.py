"""Training on two datasets: how often images of each are drawn, what their masks mean, and a run that does so."""

import json
from collections import Counter
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from segmenter_hf.cli.main import main
from segmenter_hf.data.label_sets import label_set_from_names, load_label_set
from segmenter_hf.data.loading import load_segmentation_datasets
from segmenter_hf.data.synthetic_scenes import save_scenes
from segmenter_hf.training.arguments import DataArguments, SegmentationTrainingArguments
from segmenter_hf.training.datasets import build_train_dataset
from segmenter_hf.training.mixing import MixedTrainDataset, extra_row
from segmenter_hf.training.splits import extra_label_set, load_extra_set

from ..run_training import words
from ..tiny_models import save_tiny_scenes_model


SCENES = load_label_set("scenes")


def train_dataset(num_images: int, processor, tmp_path, seed: int = 3):
    (scenes,) = load_segmentation_datasets(
        splits=["train"], scenes_size=(40, 56), scenes_train=num_images, seed=seed
    ).values()
    args = SegmentationTrainingArguments(str(tmp_path), use_cpu=True, seed=7)
    return build_train_dataset(scenes, SCENES, processor, DataArguments(image_size=40, crop_size=32), args)


@pytest.mark.parametrize("weight", [0.1, 0.5, 1.0, 2.5])
def test_extra_images_are_drawn_so_many_times_as_often(processor, tmp_path, weight) -> None:
    labelled, extra = train_dataset(3, processor, tmp_path), train_dataset(5, processor, tmp_path)
    mixed = MixedTrainDataset(labelled, extra, weight)
    seen = []
    extra.crop = lambda row, *numbers: seen.append(row["image"]["bytes"])
    labelled_seen = []
    for epoch in range(20):
        mixed.set_epoch(epoch)
        assert len(mixed) == 3 + max(round(5 * weight), 1)
        for index in range(len(mixed)):
            if index < 3:
                labelled_seen.append(mixed[index]["labels"])
            else:
                mixed[index]

    # Naively: one permutation after the other, cut into epochs.
    wanted = 20 * max(round(5 * weight), 1)
    rows = [extra_row_of_turn(turn, 5) for turn in range(wanted // 5 + 1)]
    expected = [extra.dataset[int(row)]["image"]["bytes"] for row in np.concatenate(rows)[:wanted]]
    assert seen == expected and len(labelled_seen) == 60
    counts = Counter(seen)
    assert len(counts) == 5 and max(counts.values()) - min(counts.values()) <= 1


def extra_row_of_turn(turn: int, num_rows: int) -> np.ndarray:
    return np.random.default_rng((7, turn, num_rows)).permutation(num_rows)


def test_crops_are_those_of_their_sets_with_draws_of_their_own(processor, tmp_path) -> None:
    labelled, extra = train_dataset(3, processor, tmp_path), train_dataset(5, processor, tmp_path, seed=9)
    mixed = MixedTrainDataset(labelled, extra, 1.0)
    mixed.set_epoch(1)
    alone = train_dataset(3, processor, tmp_path)
    alone.set_epoch(1)
    for index in range(3):
        assert torch.equal(mixed[index]["pixel_values"], alone[index]["pixel_values"])
    other = train_dataset(5, processor, tmp_path, seed=9)
    other.set_epoch(1)
    for index in range(3, 8):
        expected = other.crop(other.dataset[extra_row(5 + index - 3, 5, 7)], index)
        assert torch.equal(mixed[index]["labels"], expected["labels"])


@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_weights_that_draw_nothing_are_refused(processor, tmp_path, weight) -> None:
    both = train_dataset(1, processor, tmp_path)
    with pytest.raises(ValueError, match="`extra_weight` must be above 0"):
        MixedTrainDataset(both, both, weight)


class OwnLabels(datasets.Image):
    """A column of masks with a label set, as `RowImage` has it."""

    label_set = None


def rows_with(label_set) -> datasets.Dataset:
    (scenes,) = load_segmentation_datasets(splits=["train"], scenes_train=1).values()
    scenes.info.features["annotation"].label_set = label_set
    return scenes


def test_masks_of_the_extra_set_are_read_by_its_own_label_set() -> None:
    mapped = replace(SCENES, label_id_to_train_id={7: 0, 8: 1})
    assert extra_label_set(rows_with(None), mapped) is mapped
    assert extra_label_set(rows_with(SCENES), mapped) == SCENES  # stored classes, not the ids of the labelled set
    other = extra_label_set(rows_with(SCENES), replace(mapped, ignore_index=-1))
    assert other.ignore_index == -1 and other.label_id_to_train_id == {index: index for index in range(8)}
    table = extra_label_set(
        rows_with(replace(SCENES, label_id_to_train_id={5: 255, 6: 1})), replace(SCENES, ignore_index=9)
    )
    assert table.label_id_to_train_id == {5: 9, 6: 1}
    with pytest.raises(ValueError, match=r"other classes.*2 \(a, b\) there, 8 \(sky"):
        extra_label_set(rows_with(label_set_from_names(["a", "b"])), SCENES)


def test_black_and_white_masks_of_the_extra_set_are_read_as_those_of_the_labelled_one() -> None:
    label_set = label_set_from_names(["ground", "leaf"])
    masks = [Image.fromarray(np.kron([[0, 255]], np.ones((8, 8))).astype(np.uint8))] * 2
    features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
    extra = datasets.Dataset.from_dict({"image": masks, "annotation": masks}, features=features)
    extra.info.features["annotation"].label_set = label_set
    assert extra_label_set(extra, label_set).label_id_to_train_id == {0: 0, 255: 1}


def test_a_stream_takes_no_extra_set() -> None:
    with pytest.raises(ValueError, match="known length"):
        load_extra_set(DataArguments(extra_dataset_name="somewhere", streaming=True), SCENES)


def test_a_model_trains_on_its_own_labels(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny_scenes_model(tmp_path / "model")
    save_scenes(tmp_path / "more", 3, (40, 56), seed=2)
    predict = "predict --model_name_or_path model --dataset_name more --min_confidence 0.13 --output_dir pseudo"
    main(predict.split())
    more = "--extra_dataset_name pseudo --extra_weight 0.7 --label_set scenes --eval_strategy no --save_strategy no"
    more += " --load_best_model_at_end false --num_train_epochs 1"
    main(["train", *words("run", *more.split())])
    assert "Masks of pseudo:" in capsys.readouterr().out
    arguments = json.loads((tmp_path / "run" / "recipe.json").read_text())["arguments"]
    assert (arguments["extra_dataset_name"], arguments["extra_weight"]) == ("pseudo", 0.7)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "pseudo, weight 0.7" in card
    assert f"| images | {arguments['scenes_train'] + 2} |" in card
