"""The lowest versions that are tested are those that setup.cfg declares."""

import re
from configparser import ConfigParser
from pathlib import Path


ROOT = Path(__file__).parents[1]


def test_the_lowest_versions_are_tested() -> None:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    declared = config["options"]["install_requires"]
    pinned = (ROOT / "tests" / "requirements.txt").read_text(encoding="utf-8")
    bounds, versions = (
        re.findall(r"([\w-]+)>=([\d.]+)", declared),
        re.findall(r"^([\w-]+)==([\d.]+)$", pinned, re.MULTILINE),
    )
    assert len(bounds) > 10 and bounds == versions
