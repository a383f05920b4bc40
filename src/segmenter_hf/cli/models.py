"""List the published models with the mean IoU that their sources report, and how to get them.

    segmenter-hf models

mIoU is in percent: "ss" is single scale, "ms+flip" is multi-scale + flip.
"""

from collections.abc import Sequence

from ..hub.published_models import list_published_models
from .errors import cli_main
from .parsing import build_parser, parse_arguments


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parse_arguments(build_parser("models", __doc__, []), argv)
    print(list_published_models())
    print("\nGet one: segmenter-hf convert --model NAME --output_dir DIR")
