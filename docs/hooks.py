"""What the site does to pages and docstrings on their way in: a page may be a file of the
repository's root, roles of Sphinx become code, and examples become blocks of code."""

import re
from pathlib import Path

import griffe


def on_page_markdown(markdown, page, **_):
    """Return the text of the file that the page's ``from`` names, with links between pages."""
    if source := page.meta.get("from"):
        markdown = Path(source).read_text()
    return re.sub(r"\]\(docs/", "](", markdown)


class Docstrings(griffe.Extension):
    """Rewrites the docstrings of the reference."""

    def on_instance(self, *, obj, **_):
        if obj.docstring:
            text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", obj.docstring.value)
            obj.docstring.value = re.sub(r"(?m)(?:^>>> (?:.+\n?)+)", fenced, text)


def fenced(example):
    return f"```pycon\n{example[0].rstrip()}\n```\n"
