"""What the site does to pages and docstrings: a page may be a file of the repository's root, roles
of Sphinx become code, examples become blocks of code, and their copy button copies the code."""

import html
import re
from doctest import DocTestParser
from pathlib import Path

import griffe


def on_page_markdown(markdown, page, **_):
    """Return the text of the page or of the file that its ``from`` names, with links between
    pages."""
    if source := page.meta.get("from"):
        markdown = Path(source).read_text()
    return re.sub(r"\]\(docs/", "](", shown(markdown))


def on_page_content(content, **_):
    """Return the page where what is copied of an example is its code, without prompts and output:
    the theme copies the attribute ``data-copy`` instead of the text."""
    return re.sub(r'<div class="highlight">(?=(.*?)</div>)', copied, content, flags=re.DOTALL)


def copied(block):
    text = html.unescape(re.sub("<.*?>", "", block[1]))
    code = "".join(example.source for example in DocTestParser().get_examples(text))
    return f'{block[0][:-1]} data-copy="{html.escape(code)}">' if code else block[0]


class Docstrings(griffe.Extension):
    """Rewrites the docstrings of the reference."""

    def on_instance(self, *, obj, **_):
        if obj.docstring:
            text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", obj.docstring.value)
            obj.docstring.value = re.sub(r"(?m)(?:^>>> (?:.+\n?)+)", fenced, text)


def fenced(example):
    return f"```pycon\n{shown(example[0].rstrip())}\n```\n"


def shown(examples):
    """Return examples without what only their tests need."""
    return re.sub(r"(?m)^<BLANKLINE>$|  # doctest: .*$", "", examples)
