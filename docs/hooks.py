"""What mkdocs does besides: the command line's page is written from the parsers, and links out of docs/ lead to the repository."""

import contextlib
import io
import re
from typing import Any


REPOSITORY = "https://github.com/segmenter-hf/segmenter-hf/blob/main/"
PLACE = "<!-- the help of every subcommand -->"


def help_text(arguments: list[str]) -> str:
    """What `segmenter-hf ARGUMENTS` prints, at a fixed width."""
    from unittest import mock

    from segmenter_hf.cli.main import main

    printed = io.StringIO()
    with (
        mock.patch.dict("os.environ", COLUMNS="110"),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        main(arguments)
    return printed.getvalue()


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    if PLACE in markdown:
        from segmenter_hf.cli.main import SUBCOMMANDS

        sections = [
            f"## segmenter-hf {name}\n\n```text\n{help_text([name, '--help']).strip()}\n```" for name in SUBCOMMANDS
        ]
        overview = f"```text\n{help_text(['--help']).strip()}\n```"
        markdown = markdown.replace(PLACE, "\n\n".join([overview, *sections]))
    return re.sub(r"\]\(\.\./(?!reference)([^)#]+)", rf"]({REPOSITORY}\1", markdown)


def on_post_page(output: str, **kwargs: Any) -> str:
    """Keep the link to the repository, without the script that asks GitHub for its stars: pages load nothing from elsewhere."""
    return output.replace(' data-md-component="source"', "")
