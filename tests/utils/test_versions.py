"""A feature that needs a later version says which, and what is installed."""

import re
from importlib import metadata

import pytest

from segmenter_hf.utils.versions import require_version


def test_an_earlier_version_is_named_with_the_one_that_is_needed(monkeypatch) -> None:
    monkeypatch.setattr(metadata, "version", {"torch": "2.9.1+cpu"}.__getitem__)
    message = 'Export needs torch 2.10 or later, and 2.9.1+cpu is installed: `pip install -U "torch>=2.10"`.'
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        require_version("torch", "2.10", "Export")


@pytest.mark.parametrize("installed", ["2.10", "2.10.0+cu128", "2.14.1"])
def test_the_same_version_and_later_ones_pass(installed, monkeypatch) -> None:
    monkeypatch.setattr(metadata, "version", {"torch": installed}.__getitem__)
    require_version("torch", "2.10", "Export")
