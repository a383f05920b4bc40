"""What mkdocs does besides: the command line's page is written from the parsers, and links out of docs/ lead to the repository."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any


REPOSITORY = "https://github.com/segmenter-hf/segmenter-hf/blob/main/"
PLACE = "<!-- the help of every subcommand -->"


def help_text(arguments: list[str]) -> str:
    """What `segmenter-hf ARGUMENTS` prints, at a fixed width."""
    from unittest import mock

    from segmenter_hf.cli.main import main

    printed = io.StringIO()
    with (
        mock.patch.dict("os.environ", COLUMNS="82"),
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


def on_page_content(html: str, **kwargs: Any) -> str:
    """Docstrings say types and names as in transformers, [`Name`] and `int`, *optional*: what marks them is left out."""

    def plain(match: re.Match[str]) -> str:
        return "<code>" + re.sub(r"\[?`~?([^`]*)`\]?", r"\1", match[1]).replace("*optional*", "optional") + "</code>"

    return re.sub(r"\[?<code>~?([^<]*)</code>\]?", plain, html) if 'class="doc ' in html else html


def on_post_page(output: str, **kwargs: Any) -> str:
    """Keep the link to the repository, without the script that asks GitHub for its stars: pages load nothing from elsewhere."""
    return output.replace(' data-md-component="source"', "")


def on_post_template(output_content: str, **kwargs: Any) -> str:
    return on_post_page(output_content)  # 404.html


def on_post_build(config: Any) -> None:
    """Check that pages load nothing from elsewhere."""
    from mkdocs.exceptions import PluginError

    for path in Path(config["site_dir"]).rglob("*.html"):
        if loaded := loads_from_elsewhere(path.read_text(encoding="utf-8")):
            raise PluginError(f"{path} loads {', '.join(loaded)}: keep a copy in docs/ instead.")


def loads_from_elsewhere(html: str) -> list[str]:
    """What a page loads from other servers when it is opened."""
    linked = re.findall(r"<link\b[^>]*>", html)
    loaded = [tag for tag in linked if re.search(r"rel=[\"']?(stylesheet|preload|preconnect|icon)", tag)]
    loaded += re.findall(r"<(?:script|img|iframe|source)\b[^>]*>", html)
    return [found for tag in loaded for found in re.findall(r"(?:src|href)=[\"']?((?:https?:)?//[^\"' >]+)", tag)]
