"""The console command `segmenter-hf`, which imports a subcommand when it is called and answers `--help` without torch."""

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence
from importlib import metadata

from .errors import cli_main


SUBCOMMANDS = {
    "train": "fine-tune a model on your images, or by a recipe of the papers",
    "evaluate": "measure the mean IoU of a model",
    "predict": "segment images, or label a whole dataset",
    "convert": "convert a checkpoint of another system",
    "publish": "push a model with its card to the Hub",
    "export": "write a model as ONNX or for OpenVINO",
    "demo": "serve a web page that segments images",
    "models": "list the published models and how to get them",
    "estimate": "estimate memory and time of a training",
    "draw-scenes": "draw synthetic street scenes with masks",
}


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    """Run the subcommand that the command line names.

    Args:
        argv (`Sequence[str]`, *optional*): The command line; that of this process by default.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _build_parser()
    if not argv:
        parser.print_usage(sys.stderr)
        parser.exit(2, "Give a subcommand; `segmenter-hf --help` lists them.\n")
    name, *rest = argv
    if name.startswith("-"):
        parser.parse_args([name])
    if name not in SUBCOMMANDS:
        nearest = difflib.get_close_matches(name, SUBCOMMANDS, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"choose from {', '.join(SUBCOMMANDS)}."
        parser.error(f"unknown subcommand {name!r}, {hint}")
    importlib.import_module(f".{name.replace('-', '_')}", __package__).main(rest)


def _build_parser() -> argparse.ArgumentParser:
    width = max(map(len, SUBCOMMANDS))
    parser = argparse.ArgumentParser(
        "segmenter-hf",
        usage="segmenter-hf SUBCOMMAND [option ...]",
        description="Segmenter and SETR, plain-transformer semantic segmentation.",
        epilog="subcommands:\n"
        + "\n".join(f"  {name:<{width}}  {what}" for name, what in SUBCOMMANDS.items())
        + "\n\n`segmenter-hf SUBCOMMAND --help` describes the options and shows an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"segmenter-hf {metadata.version('segmenter-hf')}")
    return parser
