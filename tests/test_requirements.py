"""The lowest versions that are tested are those that setup.cfg declares."""

import re
from configparser import ConfigParser
from pathlib import Path


ROOT = Path(__file__).parents[1]


def declared(text: str, operator: str) -> dict[str, str]:
    """Names and versions of requirements, one a line."""
    return dict(re.findall(rf"^([\w.-]+){operator}([\d.]+)", text, flags=re.MULTILINE))


def test_the_lowest_versions_are_tested() -> None:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    bounds = declared(config["options"]["install_requires"].strip(), ">=")
    pinned = declared((ROOT / "tests" / "requirements" / "lowest.txt").read_text(encoding="utf-8"), "==")
    assert bounds == pinned


def test_the_versions_of_colab_are_allowed() -> None:
    bounds = declared((ROOT / "tests" / "requirements" / "lowest.txt").read_text(encoding="utf-8"), "==")
    present = declared((ROOT / "tests" / "requirements" / "colab.txt").read_text(encoding="utf-8"), "==")
    assert len(present) > 4
    for name, version in present.items():
        lowest = bounds.get(name, "0")
        assert [int(part) for part in version.split(".")] >= [int(part) for part in lowest.split(".")], name
