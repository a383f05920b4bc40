"""Feed the readers of checkpoints, configurations, label sets and images damaged files, for some time.

    python tests/fuzz/fuzz.py --seconds 60 --output_dir outputs/fuzz --checkpoints tests/fixtures/*/*/checkpoint.pth

Files that are good are changed at random: bytes, numbers of a header, whole ranges, the end; and the weights and notes of
`--checkpoints`, which may be any that can be converted: left out, renamed, exchanged, replaced by something strange. A reader may take a file or
refuse it with one of the errors that it documents, in bounded time and memory; whatever else it does is a find. Its file is
written to `output_dir` with a name that says what happened, and the exit status is 1. Each seed tries the same files.
"""

import faulthandler
import io
import json
import pickle
import random
import re
import resource
import shutil
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import HfArgumentParser

from segmenter_hf.cli.errors import cli_main
from segmenter_hf.cli.parsing import parse_arguments
from segmenter_hf.conversion.configuration_files import read_python_config, read_yaml
from segmenter_hf.conversion.convert import convert_checkpoint
from segmenter_hf.conversion.safe_loading import read_checkpoint
from segmenter_hf.data.label_sets import load_label_set
from segmenter_hf.models.image_processing_segmenter import SegmenterImageProcessor
from segmenter_hf.utils.json_files import read_json_object


EXPECTED = (ValueError, FileNotFoundError)
IMAGES = {
    "bmp": {},
    "gif": {"save_all": True},
    "jpg": {},
    "jp2": {},
    "png": {},
    "ppm": {},
    "tif": {},
    "webp": {},
}
PNG = b"\x89PNG\r\n\x1a\n"
INTERESTING = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**62, 2**64 - 1]


@dataclass
class Arguments:
    output_dir: str = field(metadata={"help": "Directory for the files that were found."})
    seconds: float = field(default=60.0, metadata={"help": "How long to go on."})
    checkpoints: list[str] = field(
        default_factory=list, metadata={"help": "Checkpoints whose values are changed, small ones."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the changes."})
    seconds_per_file: float = field(default=20.0, metadata={"help": "A file that takes longer is a find."})
    max_memory_gib: float = field(
        default=8.0, metadata={"help": "Address space that the process may ask for beyond its own."}
    )


def image_files() -> dict[str, bytes]:
    """Small images in every format, mode and kind of compression."""
    values = np.random.default_rng(0).integers(0, 256, (24, 33, 3), dtype=np.uint8)
    color = Image.fromarray(values)
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures = {f"image.{suffix}": (color, options) for suffix, options in IMAGES.items()}
    pictures |= {
        "turned.jpg": (color, {"exif": exif}),
        "turned.png": (color, {"exif": exif}),
        "cmyk.jpg": (color.convert("CMYK"), {}),
        "palette.png": (color.quantize(16), {"transparency": 3}),
        "deep.png": (Image.fromarray(values[..., 0].astype(np.uint16) * 257), {}),
        "float.tif": (Image.fromarray(values[..., 0].astype(np.float32)), {}),
        "lzw.tif": (color, {"compression": "tiff_lzw"}),
        "several.tif": (color, {"save_all": True, "append_images": [color]}),
    }
    files = {}
    for name, (picture, options) in pictures.items():
        buffer = io.BytesIO()
        kind = {"jpg": "JPEG", "jp2": "JPEG2000", "tif": "TIFF"}.get(name.rpartition(".")[2], name.rpartition(".")[2])
        picture.save(buffer, kind, **options)
        files[name] = buffer.getvalue()
    return files


def checkpoint_files(folder: Path) -> dict[str, bytes]:
    """The same small weights in every format."""
    weights = {"norm.weight": torch.arange(6.0).view(2, 3), "norm.bias": torch.zeros(40)}
    arrays = {key: tensor.numpy() for key, tensor in weights.items()}
    torch.save({"model": weights, "meta": {"CLASSES": ("a", "b")}}, folder / "new.pth")
    torch.save(weights, folder / "old.pth", _use_new_zipfile_serialization=False)
    save_file(weights, folder / "model.safetensors")
    np.savez(folder / "plain.npz", **arrays)
    np.savez_compressed(folder / "compressed.npz", **arrays)
    for protocol in (2, 4):
        (folder / f"protocol{protocol}.pdparams").write_bytes(pickle.dumps(arrays, protocol=protocol))
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def text_files() -> dict[str, bytes]:
    """Configurations and label sets."""
    labels = {"labels": [{"id": 0, "name": "sky", "color": [1, 2, 3]}], "label_id_to_train_id": {"7": 0}}
    return {
        "variant.yml": b"a: &x !!python/tuple [1, 2.5e-3]\nb: {c: [*x, *x], d: null}\n<<: {e: 'f'}\n",
        "config.json": b'{"model_type": "vit", "hidden_size": 64, "id2label": {"0": "a"}, "x": [1.5, null, true]}',
        "config.py": b"model = dict(a=[1, -2.5, (3,)], b={'c': None})\nother = call(model)\n",
        "labels.json": json.dumps(labels).encode(),
    }


def changed(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Some random changes of a file, and now and then a part of another one."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        start = rng.randrange(max(min(len(data), rng.choice((32, 256, len(data) + 1))), 1))
        kind, length = rng.randrange(8), rng.choice((1, 2, 4, 8))
        if kind == 0 and data:
            data[start % len(data)] = rng.randrange(256)
        elif kind == 1 and data:
            data[start % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 2:
            number = rng.choice(INTERESTING) % 256**length
            data[start : start + length] = number.to_bytes(length, rng.choice(("little", "big")))
        elif kind == 3:
            del data[start : start + rng.randrange(1, 64)]
        elif kind == 4:
            data[start:start] = rng.randbytes(rng.randrange(1, 16))
        elif kind == 5:
            data[start:start] = data[start : start + rng.randrange(1, 128)] * rng.randrange(1, 4)
        elif kind == 6:
            del data[rng.randrange(len(data) + 1) :]
        else:
            other = rng.choice(others)
            begin = rng.randrange(len(other))
            data[start : start + length] = other[begin : begin + rng.randrange(1, 64)]
    return bytes(data)


def changed_within(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """The same below the checksums that would give a change away: in a member of an archive, in the chunks of a PNG."""
    if content.startswith(b"PK"):
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
            chosen = rng.choice(old.namelist())
            for name in old.namelist():
                data = old.read(name)
                new.writestr(name, changed(data, others, rng) if name == chosen else data)
        return buffer.getvalue()
    data = changed(content, others, rng)
    if not data.startswith(PNG):
        return data
    parts, start = [PNG], len(PNG)
    while start + 12 <= len(data):
        end = start + 8 + int.from_bytes(data[start : start + 4], "big")
        parts.append(data[start:end] + zlib.crc32(data[start + 4 : end]).to_bytes(4, "big"))
        start = end + 4
    return b"".join(parts)


STRANGE = [None, True, -1, 0, 2**70, float("nan"), "", "x" * 1000, b"", [], {}, (64, 96), [[1]], {"a": 1}, {1: 2}]
STRANGE += [
    torch.zeros(0),
    torch.tensor(1.0),
    torch.ones(3, dtype=torch.int64),
    torch.zeros(1, 1, 1, 1),
    torch.ones(64),
]
STRANGE += [torch.full((2, 2), torch.nan), torch.zeros(1).expand(10**6, 10**6), torch.eye(3).to_sparse()]
STRANGE += [torch.ones(2, dtype=torch.complex64), torch.zeros(2, dtype=torch.bool), torch.zeros(3, 64, 16, 16)]


def changed_values(path: Path, rng: random.Random) -> bytes:
    """A checkpoint with some random changes of its weights and notes."""
    checkpoint = read_checkpoint(path)
    weights, notes = dict(checkpoint.state_dict), dict(checkpoint.meta)
    for _ in range(rng.choice((1, 1, 2, 4))):
        values = rng.choice((weights, weights, notes))
        if not values:
            continue
        name = rng.choice(list(values))
        value = values.pop(name)
        kind = rng.randrange(5)
        if kind == 1:
            values[rng.choice((name + ".x", name.replace("weight", "bias"), re.sub(r"\d", "7", name)))] = value
        elif kind == 2 and values:
            values[name] = values[rng.choice(list(values))]
        elif kind == 3 and isinstance(value, torch.Tensor) and value.ndim:
            values[name] = rng.choice(
                (value[None], value.flatten(), value[:1], value.half(), value.int(), value[..., :0])
            )
        elif kind:
            values[name] = rng.choice(STRANGE)
    buffer = io.BytesIO()
    torch.save({"model" if checkpoint.wrapper == "model" else "state_dict": weights, "meta": notes}, buffer)
    return buffer.getvalue()


def readers(folder: Path) -> dict[str, Callable[[Path], object]]:
    """What reads a file, by its ending."""
    processor = SegmenterImageProcessor(
        size={"shortest_edge": 24, "longest_edge": 96}, window_size=16, window_stride=16
    )

    def checkpoint(path: Path) -> None:
        read_checkpoint(path)
        convert_checkpoint(path, folder / "converted", overwrite=True)

    found = dict.fromkeys(IMAGES, lambda path: processor(path))
    found |= dict.fromkeys(("pth", "safetensors", "npz", "pdparams"), checkpoint)
    found |= {"yml": read_yaml, "json": lambda path: (read_json_object(path), load_label_set(path))}
    return found | {"py": lambda path: read_python_config(path.read_bytes().decode("latin1"), ["model"], str(path))}


def fuzz(args: Arguments, folder: Path) -> tuple[Counter, int]:
    """Try files until the time is over; what came of them, and how many of them were finds."""
    rng, output_dir, read_by = random.Random(args.seed), Path(args.output_dir), readers(folder)
    (folder / "good").mkdir()
    files = image_files() | checkpoint_files(folder / "good") | text_files()
    for name, content in files.items():  # also warms up what is imported on first use
        outcome(read_by[name.rpartition(".")[2]], folder / name, content)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + int(args.max_memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    outcomes, finds, end = Counter(), 0, time.monotonic() + args.seconds
    while time.monotonic() < end:
        if args.checkpoints and rng.random() < 0.5:
            source = Path(rng.choice(args.checkpoints))
            name, content = f"{source.parent.name}.pth", changed_values(source, rng)
            if (source.parent / "variant.yml").is_file():
                shutil.copy(source.parent / "variant.yml", folder)
        else:
            name = rng.choice(list(files))
            content = rng.choice((changed, changed_within))(files[name], list(files.values()), rng)
        current = output_dir / f"running-{name}"
        output_dir.mkdir(parents=True, exist_ok=True)
        current.write_bytes(content)  # is left behind by a crash or a hang
        faulthandler.dump_traceback_later(args.seconds_per_file, exit=True)
        result = outcome(read_by[name.rpartition(".")[2]], folder / name, content)
        faulthandler.cancel_dump_traceback_later()
        outcomes[result] += 1
        if result not in ("read", *(error.__name__ for error in EXPECTED)):
            finds += 1
            current.rename(output_dir / f"{result}-{sum(outcomes.values())}-{name}")
        current.unlink(missing_ok=True)
    return outcomes, finds


def outcome(read: Callable[[Path], object], path: Path, content: bytes) -> str:
    """ "read", or the name of the error that reading ended in."""
    path.write_bytes(content)
    try:
        read(path)
    except EXPECTED as error:
        return next(kind.__name__ for kind in EXPECTED if isinstance(error, kind))
    except Exception as error:  # a find
        return type(error).__name__
    return "read"


@cli_main
def main() -> None:
    (args,) = parse_arguments(HfArgumentParser(Arguments))
    faulthandler.enable()
    with tempfile.TemporaryDirectory() as folder:
        outcomes, finds = fuzz(args, Path(folder))
    print(f"{sum(outcomes.values())} files: " + ", ".join(f"{name} {n}" for name, n in outcomes.most_common()))
    if finds:
        raise SystemExit(f"{finds} finds: see {args.output_dir}.")


if __name__ == "__main__":
    main()
