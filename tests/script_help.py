"""Scripts run inside the tests' process: importing torch anew takes seconds each time."""

import contextlib
import io
import runpy
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from unittest import mock


def run_script(script: Path, arguments: Sequence[str]) -> str:
    """What `python SCRIPT ARGUMENTS` prints; fails where the script does."""
    printed = io.StringIO()
    path = [str(script.parent), *sys.path]  # as Python has it for a script
    with mock.patch.multiple(sys, argv=[str(script), *arguments], path=path), contextlib.redirect_stdout(printed):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise AssertionError(f"{script.name} {' '.join(arguments)} ends with {end.code}") from end
    return printed.getvalue()


@cache
def help_of(script: Path) -> str:
    """The text that `python SCRIPT --help` prints."""
    return run_script(script, ["--help"])
