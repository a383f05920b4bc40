"""Small files that stand for gigantic contents, checkpoints of crossed formats, and code of strangers: refused, nothing run.

`test_safe_loading.py` has the attacks on the formats themselves; here are those that the fuzzer and a second look found.
"""

import json
import os
import pickle
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModelForSemanticSegmentation

from segmenter_hf import SegmenterConfig, SegmenterForSemanticSegmentation, SegmenterImageProcessor
from segmenter_hf.conversion.configuration_files import lookup, read_yaml
from segmenter_hf.conversion.convert import convert_checkpoint
from segmenter_hf.conversion.pretrained import resolve_model
from segmenter_hf.conversion.safe_loading import read_checkpoint
from segmenter_hf.data.decoding import decode_example
from segmenter_hf.data.label_sets import load_label_set
from segmenter_hf.data.loading import load_segmentation_datasets
from segmenter_hf.inference.model_loading import load_model
from segmenter_hf.training.arguments import DataArguments, ModelArguments
from segmenter_hf.training.model_building import build_model_and_processor

from ..tiny_models import tiny_scenes_config


FIXTURES = Path(__file__).parents[1] / "fixtures"
RSTRUDEL = FIXTURES / "rstrudel" / "seg_vit_linear"
MMSEG = FIXTURES / "mmseg" / "segmenter_linear" / "checkpoint.pth"
PADDLE = FIXTURES / "paddlevit" / "segmenter_vit_mask" / "model.pdparams"
VIT = FIXTURES / "backbones" / "hf_vit_s"


def rstrudel(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A checkpoint of rstrudel/segmenter with its content changed in place."""
    content = torch.load(RSTRUDEL / "checkpoint.pth")
    change(content)
    torch.save(content, folder / "checkpoint.pth")
    shutil.copy(RSTRUDEL / "variant.yml", folder)
    return folder / "checkpoint.pth"


def refused(path: Path, message: str, error: type[Exception] = ValueError, **options: Any) -> None:
    """Converting it raises the error, and leaves nothing behind."""
    before = sorted(path.parent.iterdir())
    with pytest.raises(error, match=message):
        convert_checkpoint(path, path.parent / "out", **options)
    assert sorted(path.parent.iterdir()) == before


def rename(weights: dict[str, Any], old: str, new: str) -> None:
    weights[new] = weights.pop(old)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda content: rename(content["model"], "encoder.norm.weight", "encoder.norm.gamma"),
            r"no place in .*`encoder\.norm\.gamma`",
        ),
        (
            lambda content: rename(content["model"], "encoder.blocks.1.norm1.bias", "encoder.blocks.7.norm1.bias"),
            "n_layers` is 2, but .* has 3",
        ),
        (lambda content: content["model"].update(x=torch.ones(9)), "no place in .*`x`"),
        (lambda content: content["model"].clear(), "expected weights under their names"),
        (
            lambda content: content["model"].update({"encoder.cls_token": torch.zeros(1, 1, 1).expand(1, 1, 2**40)}),
            "its tensors would fill .* bytes, expected about the .* of the file",
        ),
        (
            lambda content: content["model"].update(
                {"encoder.norm.weight": torch.zeros(64), "encoder.pos_embed": torch.zeros(1).expand(1, 2**20, 64)}
            ),
            "they repeat what is in it",
        ),
        (
            lambda content: content["model"].update({"encoder.norm.weight": torch.ones(64).to_sparse()}),
            "`encoder.norm.weight` to be a tensor of floats",
        ),
        (
            lambda content: content["model"].update({"encoder.norm.weight": torch.tensor(1.0)}),
            r"`encoder\.norm\.weight` to be a tensor of floats, got \(\)",
        ),
        (
            lambda content: content["model"].update({"encoder.norm.weight": torch.ones(64, dtype=torch.cfloat)}),
            "complex64",
        ),
        (lambda content: content.update(model=[1, 2]), "expected the keys of"),
    ],
)
def test_changed_weights_are_refused_by_name(change, message, tmp_path) -> None:
    refused(rstrudel(tmp_path, change), message)


@pytest.mark.parametrize("said", ["mmsegmentation", "setr", "paddlevit", "vit"])
def test_a_checkpoint_of_one_system_is_not_one_of_another(said, tmp_path) -> None:
    refused(rstrudel(tmp_path, lambda content: None), f"said to be {said}, got .*encoder", source_format=said)


def test_weights_of_two_systems_in_one_file_are_refused(tmp_path) -> None:
    others = torch.load(MMSEG, weights_only=False)["state_dict"]
    refused(rstrudel(tmp_path, lambda content: content["model"].update(others)), r"no place .* and \d+ more")


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize(
    "source", [RSTRUDEL / "checkpoint.pth", PADDLE, VIT / "model.safetensors"], ids=lambda p: p.name
)
def test_half_a_checkpoint_is_refused(source, share, tmp_path) -> None:
    shutil.copytree(source.parent, tmp_path / "source")
    path = tmp_path / "source" / source.name
    path.write_bytes(source.read_bytes()[: int(share * source.stat().st_size)])
    refused(path, path.name)


@pytest.mark.parametrize(
    ("notes", "error"),
    [
        ({"CLASSES": torch.ones(3)}, None),
        ({"CLASSES": torch.ones(0)}, None),
        ({"CLASSES": [["a"], {"b": 1}]}, None),
        ({"config": torch.ones(3)}, "expected the text of its configuration"),
        ({"config": 5}, "expected the text of its configuration"),
    ],
)
def test_strange_notes_beside_weights_do_no_harm(notes, error, tmp_path) -> None:
    content = torch.load(MMSEG, weights_only=False)
    for name in ("CLASSES", "classes", "cfg", "dataset_meta"):
        content["meta"].pop(name, None)
    content["meta"].update(notes)
    torch.save(content, tmp_path / "checkpoint.pth")
    if error:
        refused(tmp_path / "checkpoint.pth", error)
    else:
        assert (convert_checkpoint(tmp_path / "checkpoint.pth", tmp_path / "out") / "config.json").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "`num_hidden_layers` is 1000000000, the weights have 1"),
        ({"hidden_size": 2**70}, "hidden_size|heads"),
        ({"intermediate_size": 2**70}, "`intermediate_size` must be at most"),
        ({"hidden_size": None}, "expected `hidden_size` of type int, got nothing"),
        ({"layer_norm_eps": "x"}, "expected `layer_norm_eps` of type float or int, got 'x'"),
        ({"hidden_act": "__import__('os')"}, "hidden_act"),
        ({"model_type": ["vit"]}, "config.json"),
        ({"auto_map": {"AutoConfig": "stranger/code--config.Config"}}, None),
    ],
)
def test_a_config_json_can_not_ask_for_more_than_its_weights(changes, message, tmp_path) -> None:
    shutil.copytree(VIT, tmp_path / "vit")
    config = {**json.loads((VIT / "config.json").read_text()), **changes}
    (tmp_path / "vit" / "config.json").write_text(json.dumps(config))
    if message is None:
        convert_checkpoint(tmp_path / "vit", tmp_path / "out")
        assert "stranger" not in (tmp_path / "out" / "config.json").read_text()
    else:
        refused(tmp_path / "vit", message)


def test_a_pretrained_cfg_that_is_none_is_refused(tmp_path) -> None:
    folder = tmp_path / "timm"
    shutil.copytree(FIXTURES / "backbones" / "timm_hub_s", folder)
    (folder / "config.json").write_text(json.dumps({"pretrained_cfg": 0.5}))
    refused(folder, "expected `pretrained_cfg` of type dict, got 0.5")


# ---- small files that unpack to gigantic ones ----


@pytest.fixture
def little_memory():
    """At most 2 GiB more than the process has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the memory as Linux does")


@linux
@pytest.mark.parametrize("index", [2**24, 2**28, 2**32 - 1])
def test_a_pickle_of_20_bytes_gets_no_gigabytes_of_memo(index, little_memory, tmp_path) -> None:
    path = tmp_path / "model.pdparams"
    path.write_bytes(b"\x80\x02}r" + index.to_bytes(4, "little") + b".")  # LONG_BINPUT
    with pytest.raises(ValueError, match=rf"model\.pdparams: .*asks for {index} entries of the memo"):
        read_checkpoint(path)


@linux
@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04\x95" + (2**62).to_bytes(8, "little"),  # FRAME
        b"\x80\x04\x8e" + (2**40).to_bytes(8, "little"),  # BINBYTES8
        b"\x80\x04B" + (2**32 - 1).to_bytes(4, "little"),  # BINBYTES
    ],
)
def test_a_pickle_that_declares_more_than_the_file_is_refused(content, little_memory, tmp_path) -> None:
    (tmp_path / "model.pdparams").write_bytes(content)
    with pytest.raises(ValueError, match="model.pdparams"):
        read_checkpoint(tmp_path / "model.pdparams")


def test_pickles_of_paddle_with_many_entries_are_read(tmp_path) -> None:
    arrays = {f"layers.{number}.weight": np.full((2, 2), number, np.float32) for number in range(3000)}
    for protocol in (2, 4):
        (tmp_path / "model.pdparams").write_bytes(pickle.dumps(arrays, protocol=protocol))
        assert read_checkpoint(tmp_path / "model.pdparams").state_dict.keys() == arrays.keys()


def test_archives_that_unpack_to_a_multiple_are_refused(tmp_path) -> None:
    np.savez_compressed(tmp_path / "zeros.npz", zeros=np.zeros(10**6))
    with pytest.raises(ValueError, match=r"zeros\.npz: its arrays unpack to 8000128 bytes, expected at most"):
        read_checkpoint(tmp_path / "zeros.npz")
    noise = np.random.default_rng(0).normal(size=10**5).astype(np.float32)
    np.savez_compressed(tmp_path / "noise.npz", noise=noise)
    assert read_checkpoint(tmp_path / "noise.npz").state_dict["noise"].shape == noise.shape


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_tied_weights_are_read(ending, tmp_path) -> None:
    tied = torch.randn(1000)
    path = tmp_path / f"model{ending}"
    weights = {"a": tied, "b": tied, "c": tied[:500]}
    torch.save(weights, path) if ending == ".pth" else save_file({key: w.clone() for key, w in weights.items()}, path)
    assert torch.equal(read_checkpoint(path).state_dict["b"], tied)


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20)),
        "a0: &a0 {k: v}\n" + "".join(f"a{i}: &a{i} {{p: *a{i - 1}, q: *a{i - 1}}}\n" for i in range(1, 40)),
        "a: &a [*a]\n",
        "a: &a {b: *a}\n",
    ],
)
def test_aliases_of_yaml_that_grow_are_refused(text, tmp_path) -> None:
    (tmp_path / "variant.yml").write_text(text)
    with pytest.raises(ValueError, match=r"variant\.yml: .*aliases .* repeat too much"):
        read_yaml(tmp_path / "variant.yml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1,\nb: 2", "ParserError: line 2, column 5: expected ',' or ']', but got '<stream end>'"),
        ("a: 1\n\tb: 2", r"ScannerError: line 2, column 1: found character '\t' that cannot start any token"),
        ("a: *x", "ComposerError: line 1, column 4: found undefined alias 'x'"),
        ("a: !!python/object:os.system {}", "ConstructorError: line 1, column 4: could not determine a constructor"),
        ("a: \x01", "ReaderError: unacceptable character #x0001: special characters are not allowed"),
        ("a: 2020-99-99", "ValueError: month must be in 1..12"),
    ],
)
def test_errors_of_yaml_are_one_line(text, said, tmp_path) -> None:
    (tmp_path / "variant.yml").write_text(text)
    with pytest.raises(ValueError, match=r"variant\.yml: expected YAML") as caught:
        read_yaml(tmp_path / "variant.yml")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_errors_of_torch_are_one_line_without_its_advice_to_trust_the_file(tmp_path) -> None:
    (tmp_path / "model.pth").write_bytes(b"\x80\x02N(estca\x01")
    with pytest.raises(
        ValueError, match=r"model\.pth: .*UnpicklingError: Can only (append to|extend) lists.*NoneType'>$"
    ):
        read_checkpoint(tmp_path / "model.pth")


def test_aliases_and_merge_keys_of_yaml_work(tmp_path) -> None:
    shared = [1, 2]
    (tmp_path / "variant.yml").write_text(
        yaml.dump({"a": shared, "b": shared}) + "c: &c {d: 1}\ne:\n  <<: *c\n  f: 2\n"
    )
    read = read_yaml(tmp_path / "variant.yml")
    assert read == {"a": [1, 2], "b": [1, 2], "c": {"d": 1}, "e": {"d": 1, "f": 2}}


def test_the_error_about_a_value_that_repeats_itself_is_short() -> None:
    value: list = ["x"]
    for _ in range(60):
        value = [value] * 9
    with pytest.raises(ValueError, match="expected `a` of type int, got ") as caught:
        lookup({"a": value}, "a", int, "variant.yml")
    assert len(str(caught.value)) < 2000


# ---- code of strangers ----


@pytest.fixture
def hostile(tmp_path) -> tuple[Path, Path]:
    """A model whose directory names code of its own for everything, and the file that this code would leave behind."""
    folder, marker = tmp_path / "model", tmp_path / "marker"
    SegmenterForSemanticSegmentation(tiny_scenes_config()).save_pretrained(folder)
    SegmenterImageProcessor(window_size=32, window_stride=32, patch_size=8).save_pretrained(folder)
    (folder / "stranger.py").write_text(f"open({str(marker)!r}, 'w')\nclass Stranger: pass\n")
    for name in ("config.json", "preprocessor_config.json"):
        content = json.loads((folder / name).read_text())
        kinds = ("AutoConfig", "AutoModelForSemanticSegmentation", "AutoModel", "AutoImageProcessor")
        content["auto_map"] = dict.fromkeys(kinds, "stranger.Stranger")
        (folder / name).write_text(json.dumps(content))
    return folder, marker


def test_a_model_that_names_code_of_its_own_is_loaded_with_ours(hostile) -> None:
    folder, marker = hostile
    model, processor, _ = load_model(folder, device="cpu")
    assert type(model) is SegmenterForSemanticSegmentation
    assert isinstance(processor, SegmenterImageProcessor)
    assert type(AutoModelForSemanticSegmentation.from_pretrained(folder)) is SegmenterForSemanticSegmentation
    assert isinstance(AutoImageProcessor.from_pretrained(folder), SegmenterImageProcessor)
    assert resolve_model(folder) == str(folder)
    assert not marker.exists()


def _make_unknown(folder, monkeypatch) -> None:
    """Name a model type that only code of the folder knows, and fail where somebody is asked whether to run it."""
    for name in ("config.json", "preprocessor_config.json"):
        content = json.loads((folder / name).read_text())
        content.pop("image_processor_type", None)
        (folder / name).write_text(json.dumps({**content, "model_type": "stranger"}))
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("somebody was asked"))


def test_a_model_of_another_type_with_code_of_its_own_is_refused_without_asking(hostile, monkeypatch) -> None:
    folder, marker = hostile
    _make_unknown(folder, monkeypatch)
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(folder, device="cpu")
    with pytest.raises(ValueError, match="expected the keys of"):
        resolve_model(folder)
    assert not marker.exists()
    with pytest.raises(Exception):  # noqa: B017 - the marker does appear where the code is trusted
        AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert marker.exists()


def test_weights_in_a_pickle_run_nothing(hostile) -> None:
    folder, marker = hostile
    (folder / "model.safetensors").unlink()

    class Attack:
        def __reduce__(self) -> tuple:
            return open, (str(marker), "w")

    torch.save({"segmenter.layernorm.weight": Attack()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="UnpicklingError: Weights only load failed"):
        load_model(folder, device="cpu")
    assert not marker.exists()


def test_a_configuration_of_a_few_bytes_can_not_ask_for_millions_of_layers(tmp_path) -> None:
    for fields in ({"num_hidden_layers": 10**9}, {"num_labels": 10**9}, {"decoder_num_hidden_layers": 10**9}):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "segmenter", **fields}))
        with pytest.raises(ValueError, match=f"`{next(iter(fields))}` must be .*at most"):
            AutoConfig.from_pretrained(tmp_path)
    assert SegmenterConfig(num_hidden_layers=1000).num_hidden_layers == 1000


@pytest.mark.parametrize(
    "fields", [{"hidden_size": 2**14, "num_hidden_layers": 900}, {"image_size": 2**18}, {"intermediate_size": 2**24}]
)
def test_a_small_file_of_weights_is_not_grown_to_a_large_model(fields, tmp_path) -> None:
    SegmenterForSemanticSegmentation(tiny_scenes_config()).save_pretrained(tmp_path)
    SegmenterImageProcessor(window_size=32, window_stride=32, patch_size=8).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | fields))
    with pytest.raises(ValueError, match=r"asks for \d+ weights, and the files of the weights have \d+ bytes"):
        load_model(tmp_path, device="cpu")
    with pytest.raises(ValueError, match="asks for"):
        arguments = ModelArguments(model_name_or_path=str(tmp_path))
        build_model_and_processor(arguments, DataArguments(), load_label_set("scenes"))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("config.json", {"attn_implementation": "evil/repo"}, "names code on the Hub for the attention, 'evil/repo'"),
        ("config.json", {"attn_implementation": "kernels-community/flash-attn2"}, "names code on the Hub"),
        ("config.json", {"token_merging_layers": list(range(10**5))}, "`token_merging_layers` must be rising"),
        ("config.json", {"id2label": dict.fromkeys(range(2**16 + 1), "x")}, "`id2label` must have at most 65536"),
        ("config.json", {"model_type": None, "auto_map": None}, "got a config.json without its `model_type`"),
        ("preprocessor_config.json", {"scales": [1.0] * 65}, "`scales` must be 1 to 64 factors"),
    ],
)
def test_a_configuration_that_asks_for_code_or_hours_is_refused(name, fields, message, tmp_path) -> None:
    SegmenterForSemanticSegmentation(tiny_scenes_config()).save_pretrained(tmp_path)
    SegmenterImageProcessor(window_size=32, window_stride=32, patch_size=8).save_pretrained(tmp_path)
    content = json.loads((tmp_path / name).read_text()) | fields
    (tmp_path / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    with pytest.raises(ValueError, match=message) as refused:
        load_model(tmp_path, device="cpu")
    assert len(str(refused.value)) < 1000


def test_files_of_a_model_name_no_others_elsewhere_and_no_device(tmp_path) -> None:
    folder = tmp_path / "model"
    SegmenterForSemanticSegmentation(tiny_scenes_config()).save_pretrained(folder)
    SegmenterImageProcessor(window_size=32, window_stride=32, patch_size=8).save_pretrained(folder)
    content = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(content | {"device": "cuda:9"}))
    assert load_model(folder, device="cpu")[1].device is None
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/repo", "peft_type": "LORA"}')
    with pytest.raises(ValueError, match="expected a whole model, got an adapter"):
        load_model(folder, device="cpu")
    (folder / "adapter_config.json").unlink()
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    for part in ("../model.safetensors", str(tmp_path / "model.safetensors"), 1):
        index = {"metadata": {}, "weight_map": {"segmenter.layernorm.weight": part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="expected a `weight_map` to files beside it"):
            load_model(folder, device="cpu")


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors", "label_set.json"])
def test_pipes_and_endless_files_of_a_model_are_refused(name, tmp_path) -> None:
    SegmenterForSemanticSegmentation(tiny_scenes_config()).save_pretrained(tmp_path)
    SegmenterImageProcessor(window_size=32, window_stride=32, patch_size=8).save_pretrained(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: expected a file, got a pipe or a device"):
        load_model(tmp_path, device="cpu")
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=f"{name}: expected a file, got a pipe or a device"):
        load_model(tmp_path, device="cpu")
    if name != "model.safetensors":
        (tmp_path / name).unlink()
        with open(tmp_path / name, "wb") as file:
            file.truncate(2**34)  # takes no room
        with pytest.raises(ValueError, match=f"{name}: expected JSON of at most"):
            load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("addition", ['"x": ' + 100_000 * "9", '"x": ' + 100_000 * "[", '"x"', '"\ud800": "'])
def test_a_configuration_that_is_no_json_is_named(name, addition, tmp_path) -> None:
    SegmenterForSemanticSegmentation(tiny_scenes_config()).save_pretrained(tmp_path)
    SegmenterImageProcessor(window_size=32, window_stride=32, patch_size=8).save_pretrained(tmp_path)
    content = (tmp_path / name).read_text().rstrip().removesuffix("}")
    (tmp_path / name).write_text(f"{content}, {addition}}}", errors="surrogatepass")
    with pytest.raises(ValueError, match=f"{tmp_path / name}: expected JSON") as refused:
        load_model(tmp_path, device="cpu")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 1000


def test_training_asks_nobody_whether_to_run_code_either(hostile, monkeypatch) -> None:
    folder, marker = hostile
    _make_unknown(folder, monkeypatch)
    with pytest.raises(ValueError, match="trust_remote_code"):
        build_model_and_processor(
            ModelArguments(model_name_or_path=str(folder)), DataArguments(), load_label_set("scenes")
        )
    assert not marker.exists()


def test_a_parquet_file_with_objects_of_python_or_a_script_beside_it_runs_nothing(tmp_path) -> None:
    marker = tmp_path / "marker"
    attack = b"cbuiltins\nopen\n(X" + len(str(marker)).to_bytes(4, "little") + str(marker).encode() + b"X\1\0\0\0wtR."
    table = pyarrow.table({"image": [attack], "annotation": [attack]})
    schema = table.schema.with_metadata({b"pandas": attack})
    (tmp_path / "data").mkdir()
    pyarrow.parquet.write_table(table.cast(schema), tmp_path / "data" / "train-0.parquet")
    (tmp_path / "data" / "data.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        decode_example(load_segmentation_datasets(str(tmp_path / "data"), splits=["train"])["train"][0])
    assert not marker.exists()
