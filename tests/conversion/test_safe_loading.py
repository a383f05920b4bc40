"""Files can be hostile, damaged or something else than they say: each ends in a clear error, and nothing runs."""

import argparse
import io
import os
import pickle
import shutil
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from segmenter_hf.conversion import safe_loading
from segmenter_hf.conversion.configuration_files import lookup, read_python_config, read_yaml
from segmenter_hf.conversion.convert import convert_checkpoint
from segmenter_hf.conversion.safe_loading import read_checkpoint
from segmenter_hf.utils.json_files import read_json_object


FIXTURES = Path(__file__).parents[1] / "fixtures"


class Call:
    """Pickles into an instruction to call a function."""

    def __init__(self, function: Callable, *arguments) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple:
        return self.reduced


def attacks(marker: Path) -> dict[str, Call]:
    """Ways to leave a file behind, by the name of the function that they ask for."""
    return {
        f"{os.system.__module__}.system": Call(os.system, f"touch {marker}"),
        "eval": Call(eval, f"open({str(marker)!r}, 'w')"),
        "exec": Call(exec, f"open({str(marker)!r}, 'w')"),
        "io.open": Call(open, str(marker), "w"),
    }


ATTACKS = list(attacks(Path()))


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize(
    "save",
    [
        lambda content, path: torch.save(content, path),
        lambda content, path: torch.save(content, path, pickle_protocol=4),
        lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
        lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2)),
        lambda content, path: path.write_bytes(pickle.dumps(content)),
    ],
    ids=["torch", "torch protocol 4", "torch before 1.6", "pickle protocol 2", "pickle"],
)
def test_a_hostile_pth_is_refused_by_name_and_runs_nothing(save, attack, tmp_path) -> None:
    path, marker = tmp_path / "checkpoint.pth", tmp_path / "marker"
    save({"epoch": attacks(marker)[attack], "model": {"encoder.cls_token": torch.ones(2)}}, path)
    with pytest.raises(ValueError, match=rf"checkpoint\.pth: refused, .*{attack}"):
        read_checkpoint(path)
    assert not marker.exists()


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_hostile_pdparams_is_refused_by_name_and_runs_nothing(protocol, attack, tmp_path) -> None:
    path, marker = tmp_path / "model.pdparams", tmp_path / "marker"
    path.write_bytes(pickle.dumps({"norm.weight": attacks(marker)[attack]}, protocol=protocol))
    with pytest.raises(ValueError, match=rf"model\.pdparams: refused, .*{attack}"):
        read_checkpoint(path)
    assert not marker.exists()


def test_the_marker_of_the_attacks_appears_where_pickles_are_trusted(tmp_path) -> None:
    for name, attack in attacks(tmp_path / "marker").items():
        pickle.loads(pickle.dumps(attack))
        assert (tmp_path / "marker").exists(), name
        (tmp_path / "marker").unlink()


def test_getattr_in_a_pth_gives_nothing_that_can_be_called(tmp_path) -> None:
    path, marker = tmp_path / "checkpoint.pth", tmp_path / "marker"
    text = lambda value: b"X" + len(value).to_bytes(4, "little") + value.encode()  # noqa: E731
    found = b"c__builtin__\ngetattr\n(" + text("a string") + text("format") + b"tR"
    path.write_bytes(b"\x80\x02" + found + b"(" + text(f"touch {marker}") + b"tR.")
    with pytest.raises(ValueError, match=r"checkpoint\.pth"):
        read_checkpoint(path)
    assert not marker.exists()


class Sharing:
    """Pickles as an array of bytes, which several may share."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __reduce__(self) -> tuple:
        reconstruct, arguments, _ = np.zeros(0, np.uint8).__reduce__()
        return reconstruct, arguments, (1, (len(self.data),), np.dtype(np.uint8), False, self.data)


def test_a_pdparams_whose_arrays_share_bytes_is_refused_before_they_are_copied(tmp_path, monkeypatch) -> None:
    path, copies = tmp_path / "model.pdparams", []
    monkeypatch.setattr(safe_loading.PickledArray, "tensor", copies.append)
    data = bytes(2**16)
    path.write_bytes(pickle.dumps({str(index): Sharing(data) for index in range(300)}, protocol=4))
    with pytest.raises(ValueError, match=r"model.pdparams: its tensors would fill 19660800 bytes"):
        read_checkpoint(path)
    assert not copies


def test_a_pdparams_can_not_change_the_classes_that_read_it(tmp_path) -> None:
    for name in ("numpy\nndarray", "numpy\ndtype", "_codecs\nencode", "collections\nOrderedDict"):
        path = tmp_path / "model.pdparams"
        # BUILD with a state for the slots: setattr(cls, "known", None)
        path.write_bytes(b"\x80\x02c" + name.encode() + b"\n(N}X\x05\x00\x00\x00knownNstb.")
        with pytest.raises(ValueError, match=r"model\.pdparams"):
            read_checkpoint(path)
    assert not any(hasattr(known, "known") for known in safe_loading.ArrayUnpickler.known.values())


@pytest.mark.parametrize(
    "text",
    ["a: !!bool foo", "a: !!int ''", "a: !!float ''", "a: !!timestamp x", "? !!python/tuple [a, [b]]\n: 1"],
)
def test_values_that_are_not_of_their_tag_are_refused(text, tmp_path) -> None:
    (tmp_path / "variant.yml").write_text(text)
    with pytest.raises(ValueError, match=r"variant\.yml: expected YAML of plain values and tuples"):
        read_yaml(tmp_path / "variant.yml")


def test_an_npz_with_pickled_objects_is_refused(tmp_path) -> None:
    path, marker = tmp_path / "augreg.npz", tmp_path / "marker"
    np.savez(path, cls=np.zeros(2), head=np.array([Call(os.system, f"touch {marker}")], dtype=object))
    with pytest.raises(ValueError, match=r"augreg\.npz: refused, .*pickled Python objects in the array 'head'"):
        read_checkpoint(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "tag",
    ["python/object/apply:os.system", "python/object/new:os.system", "python/name:os.system", "python/module:os"],
)
def test_a_hostile_variant_is_refused_by_its_tag_and_runs_nothing(tag, tmp_path) -> None:
    path, marker = tmp_path / "variant.yml", tmp_path / "marker"
    argument = f"['touch {marker}']" if tag.startswith("python/object") else "''"
    path.write_text(f"net_kwargs: !!{tag} {argument}\n")
    with pytest.raises(ValueError, match=rf"variant\.yml: .*{tag}"):
        read_yaml(path)
    assert not marker.exists()


def test_a_hostile_configuration_of_mmsegmentation_is_refused_and_runs_nothing(tmp_path) -> None:
    marker = tmp_path / "marker"
    command = f"__import__('os').system('touch {marker}')"
    with pytest.raises(ValueError, match=r"checkpoint\.pth: .*Line 2 asks for __import__\('os'\)\.system"):
        read_python_config(f"gpus = 1\nmodel = dict(a=[{command}])", ["model"], "checkpoint.pth")
    assert read_python_config(f"gpus = {command}\nmodel = dict(a=(-1, 2.5))", ["model"], "") == {
        "model": {"a": (-1, 2.5)}
    }
    assert not marker.exists()


@pytest.mark.parametrize(
    "source", ["model = dict(**other)", "model = {**other}", "model = dict(1)", "model = {[]: 1}"]
)
def test_a_configuration_that_is_not_of_literals_is_refused(source) -> None:
    with pytest.raises(ValueError, match="literals"):
        read_python_config(source, ["model"], "checkpoint.pth")


def test_a_hostile_checkpoint_is_not_converted(tmp_path) -> None:
    marker = tmp_path / "marker"
    torch.save({"model": attacks(marker)["eval"]}, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match="refused"):
        convert_checkpoint(tmp_path / "checkpoint.pth", tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]


ENDINGS = [".pth", ".pt", ".bin", ".npz", ".pdparams", ".safetensors"]
STATE_DICT = {"norm.weight": torch.arange(6.0).view(2, 3), "norm.bias": torch.zeros(200)}


def write(path: Path) -> None:
    """Write `STATE_DICT` in the format that the ending of `path` says."""
    arrays = {key: tensor.numpy() for key, tensor in STATE_DICT.items()}
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".pdparams":
        path.write_bytes(pickle.dumps(arrays, protocol=4))
    elif path.suffix == ".safetensors":
        save_file(STATE_DICT, path)
    else:
        torch.save(STATE_DICT, path)


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_format_gives_the_same_tensors(ending, tmp_path) -> None:
    path = tmp_path / f"weights{ending}"
    write(path)
    state_dict = read_checkpoint(path).state_dict
    assert state_dict.keys() == STATE_DICT.keys()
    assert all(torch.equal(state_dict[key], STATE_DICT[key]) for key in STATE_DICT)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><title>Google Drive - Virus scan warning</title></html>", "web page"),
        (b"\n<HTML>\n<head><title>404 Not Found</title>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 99\n", "Git LFS"),
        (b"not a checkpoint at all, but long enough to look at", "Download it again"),
    ],
    ids=["empty", "page", "error page", "pointer", "text"],
)
def test_what_is_no_checkpoint_is_said_to_be_what_it_is(content, message, ending, tmp_path) -> None:
    path = tmp_path / f"weights{ending}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"weights{ending}: .*{message}"):
        read_checkpoint(path)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_file_that_is_cut_short_is_refused(share, ending, tmp_path) -> None:
    path = tmp_path / f"weights{ending}"
    write(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=rf"weights{ending}"):
        read_checkpoint(path)


@pytest.mark.parametrize("ending", [".pth", ".npz", ".pdparams", ".safetensors"])
@pytest.mark.parametrize("said", [".pth", ".npz", ".pdparams", ".safetensors"])
def test_a_file_with_the_ending_of_another_format_is_refused(said, ending, tmp_path) -> None:
    if said == ending:
        return
    write(tmp_path / f"weights{ending}")
    path = (tmp_path / f"weights{ending}").rename(tmp_path / f"weights{said}")
    with pytest.raises(ValueError, match=rf"weights{said}"):
        read_checkpoint(path)


def test_a_path_that_is_no_checkpoint_is_an_error(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing.pth"):
        read_checkpoint(tmp_path / "nothing.pth")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        read_checkpoint(tmp_path)
    (tmp_path / "weights.h5").write_bytes(b"\x89HDF")
    with pytest.raises(ValueError, match=r"weights\.h5: expected a file that ends in"):
        read_checkpoint(tmp_path / "weights.h5")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth: expected a dictionary"):
        read_checkpoint(tmp_path / "list.pth")
    torch.save({"model": {1: torch.ones(1)}}, tmp_path / "numbers.pth")
    with pytest.raises(ValueError, match=r"numbers\.pth: expected weights under their names"):
        read_checkpoint(tmp_path / "numbers.pth")


def test_archives_that_unpack_to_more_than_they_may_are_refused(tmp_path, monkeypatch) -> None:
    np.savez_compressed(tmp_path / "zeros.npz", zeros=np.zeros(100_000))
    monkeypatch.setattr(safe_loading, "MAX_ARCHIVE_BYTES", 1000)
    with pytest.raises(ValueError, match=r"zeros\.npz: its arrays unpack to 800128 bytes, expected at most 1000"):
        read_checkpoint(tmp_path / "zeros.npz")
    torch.save({"zeros": torch.zeros(100_000)}, tmp_path / "stored.pth")
    with (
        zipfile.ZipFile(tmp_path / "stored.pth") as stored,
        zipfile.ZipFile(tmp_path / "zeros.pth", "w", zipfile.ZIP_DEFLATED) as compressed,
    ):
        for name in stored.namelist():
            compressed.writestr(name, stored.read(name))
    with pytest.raises(ValueError, match=r"zeros\.pth: expected the uncompressed archive that torch\.save writes"):
        read_checkpoint(tmp_path / "zeros.pth")


def test_an_npz_that_declares_a_gigantic_array_is_refused(tmp_path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**40, 2**10)})
    with zipfile.ZipFile(tmp_path / "augreg.npz", "w") as archive:
        archive.writestr("cls.npy", header.getvalue() + bytes(64))
    with pytest.raises(ValueError, match=r"augreg\.npz"):
        read_checkpoint(tmp_path / "augreg.npz")


def test_configurations_that_are_too_large_or_grow_are_refused(tmp_path) -> None:
    (tmp_path / "variant.yml").write_text("a: " + "x" * (1 << 20))
    with pytest.raises(ValueError, match=r"variant\.yml: expected at most 1048576 bytes"):
        read_yaml(tmp_path / "variant.yml")
    bomb = "a0: &a0 {k: v}\n" + "".join(
        f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 20)
    )
    (tmp_path / "variant.yml").write_text(bomb)
    with pytest.raises(ValueError, match=r"variant\.yml: .*merge keys"):
        read_yaml(tmp_path / "variant.yml")
    (tmp_path / "variant.yml").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"variant\.yml"):
        read_yaml(tmp_path / "variant.yml")
    with pytest.raises(ValueError, match="at most"):
        read_python_config("#" * (1 << 20) + "#", ["model"], "checkpoint.pth")
    with pytest.raises(ValueError, match=r"checkpoint\.pth"):
        read_python_config("model = " + "(" * 10_000, ["model"], "checkpoint.pth")


@pytest.mark.parametrize("read", [read_yaml, read_json_object])
@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html></html>", b"\xff\xfe\x00", b"[1, 2]", b"{"])
def test_a_configuration_that_is_none_is_refused(content, read, tmp_path) -> None:
    path = tmp_path / "config"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)):
        read(path)


def test_a_variant_keeps_its_tuples(tmp_path) -> None:
    path = tmp_path / "variant.yml"
    path.write_text("net_kwargs:\n  image_size: !!python/tuple\n  - 64\n  - 96\n  lr: 1.0e-05\n  clip: null\n")
    variant = read_yaml(path)
    assert variant == {"net_kwargs": {"image_size": (64, 96), "lr": 1e-5, "clip": None}}
    assert lookup(variant, "net_kwargs.image_size", tuple, path) == (64, 96)
    assert lookup(variant, "net_kwargs.clip", int, path, 3) == 3
    with pytest.raises(ValueError, match=r"variant\.yml: expected `net_kwargs\.n_cls` of type int, got nothing"):
        lookup(variant, "net_kwargs.n_cls", int, path)
    with pytest.raises(ValueError, match=r"expected `net_kwargs\.image_size` of type int, got \(64, 96\)"):
        lookup(variant, "net_kwargs.image_size", int, path)


def test_what_training_software_keeps_beside_the_weights_is_loaded_and_forgotten(tmp_path, monkeypatch) -> None:
    module = types.ModuleType("mmengine.logging.history_buffer")
    exec(
        "class HistoryBuffer:\n"
        "    def mean(self): pass\n"
        "    def __getstate__(self): return {**self.__dict__, 'statistics_methods': {'mean': HistoryBuffer.mean}}\n",
        module.__dict__,
    )
    for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
        monkeypatch.setitem(sys.modules, name, module)
    log = module.HistoryBuffer()
    log.values, log.best = np.arange(5.0), np.float32(0.4)
    content = {
        "state_dict": OrderedDict(STATE_DICT),
        "meta": {"CLASSES": ("road", "sky"), "best": np.float64(48.5)},
        "message_hub": {"log": log},
        "args": argparse.Namespace(lr=0.1),
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
    }
    path = tmp_path / "checkpoint.pth"
    for new in (True, False):
        torch.save(content, path, _use_new_zipfile_serialization=new)
        checkpoint = read_checkpoint(path)
        assert torch.equal(checkpoint.state_dict["norm.weight"], STATE_DICT["norm.weight"])
        assert checkpoint.wrapper == "state_dict"
        assert checkpoint.meta["CLASSES"] == ("road", "sky")
        assert isinstance(checkpoint.meta["best"], safe_loading.IgnoredGlobal)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_a_pdparams_of_any_protocol_order_and_dtype_is_read(protocol, tmp_path) -> None:
    arrays = OrderedDict(
        rows=np.arange(6, dtype=np.float32).reshape(2, 3),
        columns=np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
        swapped=np.arange(3, dtype=">f4"),
        half=np.ones((1, 2), np.float16),
        whole=np.array([1, -2]),
    )
    names = {"StructuredToParameterName@@": {"rows": "linear_0.w_0"}}
    path = tmp_path / "model.pdparams"
    path.write_bytes(pickle.dumps({**arrays, **names}, protocol=protocol))
    state_dict = read_checkpoint(path).state_dict
    assert state_dict.pop("StructuredToParameterName@@") == {"rows": "linear_0.w_0"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(state_dict[name].numpy(), array)


def test_a_pdparams_with_an_array_of_objects_is_refused(tmp_path) -> None:
    path = tmp_path / "model.pdparams"
    path.write_bytes(pickle.dumps({"a": np.array([{}, {}], dtype=object)}))
    with pytest.raises(ValueError, match=r"model\.pdparams: .*dtype 'O8'"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "header",
    [
        b"\xff" * 7 + b"\x7f" + b"{}",  # a header longer than any file
        (2**40).to_bytes(8, "little") + b"{",
        (8).to_bytes(8, "little") + b"not JSON",
        (62).to_bytes(8, "little") + b'{"a": {"dtype": "F32", "shape": [1000000], "data_offsets": [0, 4000000]}}'[:62],
        b'{"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 9999999]}}',
        b'{"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"w": {"dtype": "PICKLE", "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_a_safetensors_file_with_a_false_header_is_refused(header, tmp_path) -> None:
    if header.startswith(b"{"):
        header = len(header).to_bytes(8, "little") + header
    (tmp_path / "model.safetensors").write_bytes(header + b"\0" * 16)
    with pytest.raises(ValueError, match="model.safetensors"):
        read_checkpoint(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "content", ["", "[]", '{"model_type": ', '{"model_type": {"__reduce__": "os.system"}}', "null"]
)
def test_a_config_json_that_is_none_is_refused(content, tmp_path) -> None:
    shutil.copy(FIXTURES / "backbones" / "hf_vit_s" / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json"):
        convert_checkpoint(tmp_path, tmp_path / "model")
    assert not (tmp_path / "model").exists()
