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
from segmenter_hf.export.onnx import export_onnx

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


# Writer, further options of train, and the classes of the model.
FORMATS = {
    "two folders": (formats.two_folders, (), None),
    "folders in splits": (formats.folders_in_splits, (), None),
    "masks with endings": (formats.masks_with_endings, (), None),
    "one folder": (formats.one_folder, SPLIT, None),
    "one folder per split": (formats.one_folder_per_split, (), None),
    "singular folders": (formats.singular_folders, SPLIT, None),
    "SegNet's CamVid": (formats.segnet_camvid, (), None),
    "metadata": (formats.metadata, (), None),
    "parquet": (formats.parquet, (), None),
    "save_to_disk": (formats.saved_to_disk, (), None),
    "ADE20K": (formats.ade20k, ("--do_reduce_labels", "true"), None),
    "Cityscapes": (formats.cityscapes, (), None),
    "Pascal VOC": (formats.voc, (), None),
    "VOC without lists": (formats.voc_without_lists, SPLIT, None),
    "VOC of CVAT": (formats.cvat_voc, SPLIT, formats.NAMES),
    "COCO polygons": (formats.coco_polygons, (), formats.NAMES),
    "COCO run lengths": (formats.coco_run_lengths, (), formats.NAMES),
    "COCO panoptic": (formats.coco_panoptic, (), formats.NAMES),
    "labelme": (formats.labelme, (), formats.NAMES),
    "black and white": (formats.black_and_white, SPLIT, ("background", "foreground")),
    "black and white, two names": (formats.black_and_white, (*SPLIT, "--label_set", ("soil", "plant")), None),
    "black and white, one name": (formats.black_and_white, (*SPLIT, "--label_set", ("plant",)), None),
    "colors.json": (formats.colors_json, (), formats.NAMES),
    "class_dict.csv": (formats.deepglobe, SPLIT, formats.NAMES),
    "void id": (formats.void_id, ("--ignore_index", "11"), ("class 0", "class 1", "class 2")),
}


# An export takes ten seconds and sees the model alone: one for each kind of label set.
EXPORTED = ("two folders", "black and white, one name", "colors.json", "COCO polygons")


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_goes_through_all_commands(tmp_path, name, capsys) -> None:
    write, options, names = FORMATS[name]
    root, model = tmp_path / "data", tmp_path / "model"
    root.mkdir()
    write(root)
    options = [names_file(root, *option) if isinstance(option, tuple) else option for option in options]
    train(["--dataset_name", str(root), "--output_dir", str(model), *TRAINING, *options])
    trained = json.loads((model / "results.json").read_text())
    assert trained["num_images"] == 2
    assert names is None or tuple(trained["labels"]) == names

    evaluate(["--model_name_or_path", str(model), "--output_dir", str(tmp_path / "evaluation"), "--num_worst", "0"])
    evaluated = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert evaluated["num_images"] == 2
    assert np.allclose(evaluated["per_category_iou"], trained["per_category_iou"], equal_nan=True) or (
        evaluated["per_category_iou"] == trained["per_category_iou"]
    )

    arguments = ["--dataset_name", str(root), "--split", "validation", "--output_format", "png"]
    predict(["--model_name_or_path", str(model), "--output_dir", str(tmp_path / "maps"), *arguments])
    maps = list((tmp_path / "maps").rglob("*.png"))
    assert [Image.open(path).size for path in maps] == [(formats.WIDTH, formats.HEIGHT)] * 2

    image = Image.fromarray(formats.scene_image(0))
    segments = pipeline("image-segmentation", model=str(model))(image)
    assert {segment["label"] for segment in segments} <= {*trained["labels"]}
    assert (
        sum(np.asarray(segment["mask"]).astype(bool).sum() for segment in segments) == formats.HEIGHT * formats.WIDTH
    )

    if name in EXPORTED and not needs_export.args[0]:
        export_onnx(str(model), tmp_path / "onnx", dtypes=("fp32",))
        (file,) = (tmp_path / "onnx").rglob("*.onnx")
        assert onnxruntime.InferenceSession(file).get_inputs()[0].name == "pixel_values"


def test_a_void_id_is_told_by_the_option_of_the_command(tmp_path) -> None:
    formats.void_id(tmp_path)
    arguments = ["--dataset_name", str(tmp_path), "--num_labels", "11", "--output_dir", str(tmp_path / "model")]
    with pytest.raises(
        SystemExit, match=r"plant0.png\): ids \[11\](.|\n)*`--ignore_index 11`; .*`--do_reduce_labels true`"
    ):
        train([*arguments, *TRAINING])
