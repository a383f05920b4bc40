"""Every format through the commands: train, evaluate, predict; and the model in the stock pipeline and as ONNX."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from transformers import pipeline

from segmenter_hf.cli.evaluate import main as evaluate
from segmenter_hf.cli.predict import main as predict
from segmenter_hf.cli.train import main as train
from segmenter_hf.data.encoded_images import encoded_bytes
from segmenter_hf.data.loading import load_split
from segmenter_hf.export import run_onnx
from segmenter_hf.export.onnx import export_onnx
from segmenter_hf.inference.predictor import Predictor
from segmenter_hf.models.image_io import read_channels

from ..data import formats
from ..versions import needs_export


SMALL = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32,patch_size=8"
TRAINING = (
    f"--config_overrides {SMALL} --crop_size 32 --image_size 32 --max_steps 2 --eval_strategy no --save_strategy no "
    "--load_best_model_at_end false --per_device_train_batch_size 2 --report_to none --disable_tqdm true"
).split()
SPLIT = ("--validation_fraction", "0.4", "--data_seed", "3")


def names_file(root: Path, *names: str) -> str:
    (root.parent / "names.txt").write_text("\n".join(names))
    return str(root.parent / "names.txt")


def with_channels(number: int, *more: str) -> tuple[str, ...]:
    return ("--config_overrides", f"{SMALL},num_channels={number}", *more)


# Writer, further options of train, and the classes of the model; by the first column of the table in docs/data.md.
FORMATS = {
    "two folders": (formats.two_folders, (), None),
    "folders in splits": (formats.folders_in_splits, (), None),
    "masks with endings": (formats.masks_with_endings, (), None),
    "one folder": (formats.one_folder, SPLIT, None),
    "one folder for each split": (formats.one_folder_per_split, (), None),
    "singular folders": (formats.singular_folders, SPLIT, None),
    "SegNet's CamVid": (formats.segnet_camvid, (), None),
    "metadata": (formats.metadata, (), None),
    "parquet, `annotation`": (formats.parquet_of("annotation"), (), None),
    "parquet, `mask`": (formats.parquet_of("mask"), (), None),
    "parquet, `label`": (formats.parquet_of("label"), (), None),
    "parquet, `labels`": (formats.parquet_of("labels"), (), None),
    "parquet, `segmentation_map`": (formats.parquet, (), None),
    "`save_to_disk`": (formats.saved_to_disk, (), None),
    "ADE20K": (formats.ade20k, ("--do_reduce_labels", "true"), None),
    "Cityscapes": (formats.cityscapes, (), None),
    "Pascal VOC": (formats.voc, (), None),
    "VOC without `ImageSets`": (formats.voc_without_lists, SPLIT, None),
    "VOC of CVAT": (formats.cvat_voc, SPLIT, formats.NAMES),
    "COCO polygons": (formats.coco_polygons, (), formats.NAMES),
    "COCO run lengths": (formats.coco_run_lengths, (), formats.NAMES),
    "COCO panoptic": (formats.coco_panoptic, (), formats.NAMES),
    "labelme": (formats.labelme, (), formats.NAMES),
    "black and white": (formats.black_and_white, SPLIT, ("background", "foreground")),
    "black and white, two names": (formats.black_and_white, (*SPLIT, "--label_set", ("soil", "plant")), None),
    "one class": (formats.black_and_white, (*SPLIT, "--label_set", ("plant",)), None),
    "colors, `colors.json`": (formats.colors_json, (), formats.NAMES),
    "colors, `class_dict.csv`": (formats.deepglobe, SPLIT, formats.NAMES),
    "void id": (formats.void_id, ("--ignore_index", "11"), ("class 0", "class 1", "class 2")),
    "TIFF, 4 channels": (formats.channels_format(".tif", 4, 255, np.uint8), with_channels(4), None),
    "TIFF, 6 channels, 16 bits": (
        formats.channels_format(".tif", 6, 4095, np.uint16),
        with_channels(6, "--value_range", "0", "4095", "--normalization", "dataset"),
        None,
    ),
    "TIFF, RGB, 16 bits": (formats.channels_format(".tif", 3, 65535, np.uint16), (), None),
    "PNG, gray, 16 bits": (formats.channels_format(".png", 1, 65535, np.uint16), (), None),
    "GeoTIFF": (formats.geotiff, with_channels(4), None),
    "`.npy`": (
        formats.channels_format(".npy", 2, 1, np.float32),
        with_channels(2, "--value_range", "0", "1"),
        None,
    ),
}


class Exports:
    """An export of five seconds for each kind of model, made of the first one that was trained."""

    def __init__(self, root: Path) -> None:
        self.root, self.made = root, {}

    def segment_both(self, model: Path, image: Path) -> tuple[np.ndarray, np.ndarray]:
        """The class map of an image file by the model of its kind and by its export."""
        config = json.loads((model / "config.json").read_text())
        processing = json.loads((model / "preprocessor_config.json").read_text())
        kind = (config["num_channels"], len(config["id2label"]), config.get("use_single_logit"))
        kind = str((*kind, processing.get("value_range")))
        if kind not in self.made:
            folder = export_onnx(str(model), self.root / str(len(self.made)), dtypes=("fp32",)).directory
            (file,) = folder.rglob("*.onnx")
            settings = json.loads((folder / "preprocessor_config.json").read_text())
            self.made[kind] = (Predictor.from_pretrained(model), onnxruntime.InferenceSession(file), settings)
        predictor, session, settings = self.made[kind]
        opened = read_channels(image, predictor.processor.num_channels)
        found = run_onnx.segment(run_onnx.read_image(image, settings), session, settings)
        return predictor(opened).class_map.numpy(), found


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> Exports:
    return Exports(tmp_path_factory.mktemp("exports"))


def first_image(root: Path, model: Path, folder: Path) -> Path:
    """The first validation image of a dataset, as the file that it is stored as."""
    recipe = json.loads((model / "recipe.json").read_text())["arguments"]
    given = {name: recipe.get(name) for name in ("validation_fraction", "data_seed", "image_column", "label_column")}
    encoded = load_split(str(root), "validation", **given)[0]["image"]
    file = folder / f"image{Path(encoded.get('path') or 'x.png').suffix}"
    file.write_bytes(encoded_bytes(encoded))
    return file


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_goes_through_all_commands(tmp_path, name, exports) -> None:
    if name == "GeoTIFF":
        pytest.importorskip("rasterio")
    write, options, names = FORMATS[name]
    root, model = tmp_path / "data", tmp_path / "model"
    root.mkdir()
    write(root)
    options = [names_file(root, *option) if isinstance(option, tuple) else option for option in options]
    train(["--dataset_name", str(root), "--output_dir", str(model), *TRAINING, *options])
    trained = json.loads((model / "results.json").read_text())
    assert trained["num_images"] == 2
    assert names is None or tuple(trained["labels"]) == names

    evaluate(["--model_name_or_path", str(model), "--output_dir", str(tmp_path / "evaluation"), "--num_worst", "1"])
    evaluated = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert evaluated["num_images"] == 2
    assert np.allclose(evaluated["per_category_iou"], trained["per_category_iou"], equal_nan=True) or (
        evaluated["per_category_iou"] == trained["per_category_iou"]
    )

    arguments = ["--dataset_name", str(root), "--split", "validation", "--output_format", "png"]
    predict(["--model_name_or_path", str(model), "--output_dir", str(tmp_path / "maps"), *arguments])
    maps = sorted((tmp_path / "maps").rglob("*.png"))
    assert [Image.open(path).size for path in maps] == [(formats.WIDTH, formats.HEIGHT)] * 2
    file = first_image(root, model, tmp_path)
    predict(["--model_name_or_path", str(model), "--output_dir", str(tmp_path / "map"), "--images", str(file)])
    class_map = np.asarray(Image.open(tmp_path / "map" / "image.png"))
    assert any(np.array_equal(class_map, np.asarray(Image.open(path))) for path in maps)

    segments = pipeline("image-segmentation", model=str(model))(str(file))
    shown = np.full(class_map.shape, -1)
    for segment in segments:
        shown[np.asarray(segment["mask"]) > 0] = trained["labels"].index(segment["label"])
    assert np.array_equal(shown, class_map)

    if not needs_export.args[0]:
        expected, found = exports.segment_both(model, file)
        assert found.shape == expected.shape and (found == expected).mean() > 0.99


def test_the_table_of_formats_is_what_is_tested() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    head = next(index for index, row in enumerate(rows) if row[0] == "format")
    assert rows[head] == ["format", "files", "train", "evaluate", "predict", "pipeline", "ONNX"]
    table = [row for row in rows[head + 2 :] if len(row) == 7]
    assert [row[0] for row in table] == list(FORMATS)
    assert all(row[2:] == ["yes"] * 5 for row in table)


def test_a_void_id_is_told_by_the_option_of_the_command(tmp_path) -> None:
    formats.void_id(tmp_path)
    arguments = ["--dataset_name", str(tmp_path), "--num_labels", "11", "--output_dir", str(tmp_path / "model")]
    with pytest.raises(
        SystemExit, match=r"plant0.png\): ids \[11\](.|\n)*`--ignore_index 11`; .*`--do_reduce_labels true`"
    ):
        train([*arguments, *TRAINING])
