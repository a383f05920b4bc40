"""Read checkpoints without running anything that they contain.

Pickles name functions and have them called.
Here a file can only produce tensors, numbers, strings and containers of these; anything else that it names is refused.
Every way in which a file can be wrong ends in a `ValueError` that names the file.
"""

import hashlib
import pickle
import pickletools
import re
import reprlib
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..utils.json_files import read_json_object
from ..utils.messages import one_line


INDEX_FILE = "model.safetensors.index.json"  # of weights in several files
MAX_ARCHIVE_BYTES = 64 << 30  # all arrays of an .npz, unpacked
MAX_COMPRESSION = 16  # weights hardly shrink: by more than that only files made to fill the memory do
MAX_SHARING = 4  # how often the tensors of a file may use its bytes: tied weights twice


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Args:
        path (`Path`): The file of the weights.
        state_dict (`dict[str, Any]`): Its weights under their own names; values may turn out not to be tensors.
        wrapper (`str`, *optional*): Key of the file under which the weights lie, where there is one.
        meta (`dict[str, Any]`): mmsegmentation's notes: the configuration as text, class names.
        config (`dict[str, Any]`, *optional*): `config.json` of a directory.
        encoder (`Checkpoint`, *optional*): The encoder of a head that is a file of its own.
    """

    path: Path
    state_dict: dict[str, Any]
    wrapper: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    encoder: "Checkpoint | None" = None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a file of weights, or a directory with a `config.json` beside one.

    Args:
        path (`Path`): A `.pth`, `.pt`, `.bin`, `.safetensors`, `.npz` or `.pdparams` file, or a directory that holds
            `model.safetensors` (also in parts, with their index), `pytorch_model.bin` or `checkpoint.pth`.

    Returns:
        `Checkpoint`: Its contents.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, is not what its name says, or asks for anything but weights.
    """
    config = None
    if path.is_dir():
        config = read_json_object(path / "config.json") if (path / "config.json").is_file() else None
        path = weights_file(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Give the path of a checkpoint.")
    readers = {".npz": _read_npz, ".pdparams": _read_pdparams, ".safetensors": _read_safetensors}
    readers |= dict.fromkeys((".pth", ".pt", ".bin"), _read_torch)
    if path.name == INDEX_FILE:
        readers[path.suffix] = _read_parts
    if path.suffix not in readers:
        raise ValueError(
            f"{path}: expected a file that ends in {', '.join(readers)}, got {path.suffix or 'no ending'!r}."
        )
    content = readers[path.suffix](path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dictionary of weights, got {type(content).__name__}.")
    wrapper = next((key for key in ("model", "state_dict") if isinstance(content.get(key), dict)), None)
    state_dict = content[wrapper] if wrapper else content
    if not state_dict or not all(isinstance(key, str) for key in state_dict):
        raise ValueError(f"{path}: expected weights under their names, got the keys {list(state_dict)[:5]}.")
    if path.suffix != ".npz":
        tensors = filter(is_dense, state_dict.values())
        _check_sharing(path, sum(tensor.numel() * tensor.element_size() for tensor in tensors))
    meta = content.get("meta") if wrapper else None
    notes = {key: note for key, note in meta.items() if not torch.is_tensor(note)} if isinstance(meta, dict) else {}
    return Checkpoint(path, state_dict, wrapper, notes, config)


def _check_sharing(path: Path, size: int) -> None:
    """The tensors of a file do not repeat what is in it: a small file must not fill the memory.

    Raises:
        ValueError: If they do.
    """
    num_bytes = sum(part.stat().st_size for part in _parts(path))
    if size > MAX_SHARING * num_bytes:
        raise ValueError(
            f"{path}: its tensors would fill {size} bytes, expected about the {num_bytes} of the file: they repeat "
            "what is in it. If you trust its author, save clones of the tensors."
        )


def is_dense(value: Any) -> bool:
    """Whether a value is a tensor with its values one after the other."""
    return isinstance(value, torch.Tensor) and value.layout == torch.strided


def weights_file(path: Path) -> Path:
    """The file of the weights: `path` itself, or the one in it if it is a directory.

    Raises:
        FileNotFoundError: If there is none in the directory.
    """
    if not path.is_dir():
        return path
    names = ("model.safetensors", INDEX_FILE, "pytorch_model.bin", "checkpoint.pth")
    files = [path / name for name in names if (path / name).is_file()]
    if not files:
        raise FileNotFoundError(f"{path}: expected a directory with one of {', '.join(names)}; it has none of them.")
    return files[0]


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file; of the index of parts, that of the parts one after the other."""
    digest = hashlib.sha256()
    for part in _parts(path):
        with part.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# ---- PyTorch ----


class IgnoredGlobal:
    """Stands for an object of a checkpoint that no conversion reads, such as a log; it keeps nothing."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# What training software stores beside the weights: mmengine's log of numbers, DeiT's arguments, numpy scalars.
INERT_GLOBALS = [
    "argparse.Namespace",
    "builtins.getattr",  # a method of the log; it is not looked up either
    "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
]


def _read_torch(path: Path) -> Any:
    head = _head(path)
    is_archive = head.startswith(b"PK")
    if is_archive:
        members = _archive_members(path)
        if not any(Path(member.filename).name == "data.pkl" for member in members):
            raise ValueError(f"{path}: expected a PyTorch checkpoint, got {describe_file(path)}.")
        # torch.save stores its members as they are, so their sizes must fit into the file
        size = sum(member.file_size for member in members)
        if size > path.stat().st_size or any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError(
                f"{path}: expected the uncompressed archive that torch.save writes, got one that unpacks to {size} bytes. "
                "Download it again, or write it again with torch.save."
            )
    elif not head.startswith(b"\x80"):
        raise ValueError(f"{path}: expected a PyTorch checkpoint, got {describe_file(path)}.")
    try:
        with (
            warnings.catch_warnings(),
            torch.serialization.safe_globals([(IgnoredGlobal, name) for name in INERT_GLOBALS]),
        ):
            warnings.simplefilter("ignore")  # about pickle protocols; what is not supported raises
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except Exception as error:  # a damaged pickle can fail in any way
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named or "Unsupported operand" in str(error):
            raise _refusal(path, [named[1]] if named else _globals_of(path)) from error
        raise _damaged(path, error) from error


def _globals_of(path: Path) -> list[str]:
    """Names that the pickle of a PyTorch checkpoint asks for, as far as it can be read, without loading it."""
    names: list[str] = []
    strings: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(_pickle_of(path)):
            if opcode.name in ("GLOBAL", "INST"):
                names.append(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                names.append(".".join(strings[-2:]))
            elif isinstance(argument, str):
                strings.append(argument)
    except (ValueError, OSError, zipfile.BadZipFile, NotImplementedError):  # as far as it can be read
        pass
    return sorted(set(names)) or ["instructions that weights do not need"]


def _pickle_of(path: Path) -> bytes:
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(name for name in archive.namelist() if Path(name).name == "data.pkl"))


# ---- Paddle ----


class PickledDtype:
    """A numpy dtype of plain numbers, read from a pickle."""

    def __init__(self, spec: str, *args: Any) -> None:
        if not re.fullmatch(r"[fiub][1248]", spec):
            raise pickle.UnpicklingError(f"arrays of dtype {spec!r} are not weights")
        self.dtype = np.dtype(spec)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class PickledArray:
    """A numpy array, read from a pickle."""

    def __init__(self, *args: Any) -> None:
        self.array = np.zeros(0, np.float32)

    def __setstate__(self, state: tuple) -> None:
        _, shape, pickled, is_fortran, data = state
        self.array = np.frombuffer(data, pickled.dtype).reshape(shape, order="F" if is_fortran else "C")

    def tensor(self) -> torch.Tensor:
        """A copy, in the order of bytes of this machine."""
        return torch.from_numpy(self.array.astype(self.array.dtype.newbyteorder("="), order="C"))


class PickledBytes(bytes):
    """Bytes of pickle protocol 2, which writes them as text."""

    def __new__(cls, text: str, encoding: str) -> "PickledBytes":
        return super().__new__(cls, text, "latin1")

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("bytes have no state")


class ArrayUnpickler(pickle.Unpickler):
    """Knows numpy arrays and plain containers, and nothing else that a pickle may name."""

    # Classes alone, each with its own __setstate__: a pickle can set no attribute of any of them.
    known = {
        "_codecs.encode": PickledBytes,
        "collections.OrderedDict": dict,
        "numpy.core.multiarray._reconstruct": PickledArray,
        "numpy._core.multiarray._reconstruct": PickledArray,
        "numpy.ndarray": PickledArray,
        "numpy.dtype": PickledDtype,
    }

    def find_class(self, module: str, name: str) -> type:
        if f"{module}.{name}" not in self.known:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return self.known[f"{module}.{name}"]


def _check_memo(path: Path) -> None:
    """Refuse a pickle with an entry of its memo far beyond the others: Python would make room for all before it."""
    with path.open("rb") as file:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if "PUT" in opcode.name and int(argument or 0) > number:
                raise pickle.UnpicklingError(f"instruction {number} asks for {argument} entries of the memo")


def _read_pdparams(path: Path) -> Any:
    if not _head(path).startswith(b"\x80"):
        raise ValueError(f"{path}: expected a file of paddle.save, got {describe_file(path)}.")
    try:
        _check_memo(path)
        with path.open("rb") as file:
            content = ArrayUnpickler(file).load()
    except Exception as error:  # a damaged pickle can fail in any way
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise (_refusal(path, [named[1]]) if named else _damaged(path, error)) from error
    if not isinstance(content, dict):
        return content
    _check_sharing(path, sum(value.array.nbytes for value in content.values() if isinstance(value, PickledArray)))
    return {key: value.tensor() if isinstance(value, PickledArray) else value for key, value in content.items()}


# ---- NumPy and safetensors ----


def _read_npz(path: Path) -> dict[str, torch.Tensor]:
    if not _head(path).startswith(b"PK"):
        raise ValueError(f"{path}: expected a NumPy archive, got {describe_file(path)}.")
    members = _archive_members(path)
    if not all(member.filename.endswith(".npy") for member in members):
        raise ValueError(f"{path}: expected a NumPy archive, got {describe_file(path)}.")
    size = sum(member.file_size for member in members)
    largest = min(MAX_ARCHIVE_BYTES, MAX_COMPRESSION * path.stat().st_size)
    if size > largest:
        raise ValueError(f"{path}: its arrays unpack to {size} bytes, expected at most {largest}. Download it again.")
    tensors, name = {}, ""
    try:
        with np.load(path, allow_pickle=False) as archive:
            for name in archive.files:
                tensors[name] = torch.from_numpy(archive[name])
    except Exception as error:  # a damaged archive can fail in any way
        if "allow_pickle" in str(error):
            raise _refusal(path, [f"pickled Python objects in the array {name!r}"]) from error
        raise _damaged(path, error) from error
    return tensors


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    _head(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected safetensors, got {describe_file(path)} ({error}).") from error


def _parts(path: Path) -> list[Path]:
    """The files of weights that an index names, in order; of any other file itself.

    Raises:
        FileNotFoundError: If one of them is missing.
        ValueError: If it is no index, or names files that do not lie beside it.
    """
    if path.name != INDEX_FILE:
        return [path]
    names = read_json_object(path).get("weight_map")
    names = names.values() if isinstance(names, dict) else ["no `weight_map`"]
    wrong = [name for name in names if not (isinstance(name, str) and re.fullmatch(r"[\w-]+\.safetensors", name))]
    if wrong or not names:
        raise ValueError(f"{path}: expected the names of safetensors files beside it, got {reprlib.repr(wrong)}.")
    parts = [path.with_name(name) for name in sorted({*names})]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise FileNotFoundError(f"{path}: expected its parts beside it, but there is no {', '.join(missing[:5])}.")
    return parts


def _read_parts(path: Path) -> dict[str, torch.Tensor]:
    content: dict[str, torch.Tensor] = {}
    for part in _parts(path):
        tensors = _read_safetensors(part)
        if twice := content.keys() & tensors.keys():
            raise ValueError(f"{part}: expected tensors of its own, got {sorted(twice)[:5]} of another part.")
        content |= tensors
    return content


# ---- what is wrong with a file ----


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise ValueError(f"{path}: the file is empty. Download it again.")
    return head


def describe_file(path: Path) -> str:
    """What a file is instead, and what to do about it."""
    head = _head(path)
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page: the download led to a page, not to the file. Download the file itself"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer: run `git lfs pull`, or download the file itself"
    if head.startswith(b"PK"):
        return "another zip archive. Give it its right ending (.npz for arrays, .pth for torch.save)"
    if head[8:9] == b"{":
        return "what looks like safetensors. Give it its right ending, .safetensors"
    if head.startswith(b"\x80"):
        return "a pickle. Give it its right ending (.pth for torch.save, .pdparams for paddle.save)"
    return f"a file that starts with {head[:8]!r}. Download it again, and check its name"


def _archive_members(path: Path) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except Exception as error:  # a damaged archive can fail in any way
        raise _damaged(path, error) from error


def _refusal(path: Path, names: list[str]) -> ValueError:
    return ValueError(
        f"{path}: refused, because it asks for {', '.join(names)}, which weights do not need. Nothing was run. If you "
        "trust its author, load it with the software that wrote it and save the state_dict alone."
    )


def _damaged(path: Path, error: Exception) -> ValueError:
    # Around this torch advises to trust the file.
    said = str(error).partition("WeightsUnpickler error:")[2].partition("Check the documentation")[0] or str(error)
    return ValueError(
        f"{path}: the file is damaged or cut short, download it again. {type(error).__name__}: {one_line(said)}"
    )
