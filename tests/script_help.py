"""Scripts and the console command run inside the tests' process: importing torch again takes seconds each time."""

import contextlib
import io
import runpy
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from unittest import mock

from segmenter_hf.cli.main import main


def run_script(script: Path, argv: Sequence[str]) -> str:
    """What `python SCRIPT ARGV` prints; fails where the script does."""
    path = [str(script.parent), *sys.path]  # as Python has it for a script
    with mock.patch.multiple(sys, argv=[str(script), *argv], path=path):
        return _printed(partial(runpy.run_path, str(script), run_name="__main__"), [script.name, *argv])


def run_command(argv: Sequence[str]) -> str:
    """What `segmenter-hf ARGV` prints; fails where the command does."""
    return _printed(partial(main, argv), argv)


def _printed(run: Callable[[], object], words: Sequence[str]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            run()
        except SystemExit as end:
            if end.code:
                raise AssertionError(f"{' '.join(words)} ends with {end.code}") from end
    return printed.getvalue()


@cache
def help_of(subcommand: str) -> str:
    """The text that `segmenter-hf SUBCOMMAND --help` prints."""
    return run_command([subcommand, "--help"])
