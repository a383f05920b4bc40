"""What a script prints for `--help`, without a process of its own: importing torch anew takes seconds each time."""

import contextlib
import io
import runpy
import sys
from functools import cache
from pathlib import Path
from unittest import mock


@cache
def help_of(script: Path) -> str:
    """The text that `python SCRIPT --help` prints."""
    printed = io.StringIO()
    path = [str(script.parent), *sys.path]  # as Python has it for a script
    with mock.patch.multiple(sys, argv=[str(script), "--help"], path=path), contextlib.redirect_stdout(printed):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise AssertionError(f"{script.name} --help ends with {end.code}") from end
    return printed.getvalue()
