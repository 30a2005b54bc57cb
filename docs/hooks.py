"""What the site does to pages and docstrings: a page may be a file of the repository's root, roles
of Sphinx become code, examples become blocks of code, and their copy button copies the code."""

import ast
import html
import re
from doctest import DocTestParser
from pathlib import Path

import griffe
from mkdocs.structure.files import File

SHOWN = """<p>A small network's <a href="show.html">loss and gradient</a>:</p>
<iframe src="show.html" title="show" style="width: 100%; height: 640px"></iframe>"""


def on_files(files, config):
    """Add the page that ``show`` writes of a network's training step, for the tour to show."""
    import torch
    from torch import nn

    from aotfunc import jit, show

    net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4))

    def loss(x):
        return net(x).square().mean()

    page = show(jit(loss, backend="eager"), torch.ones(5, 8), to=None)
    files.append(File.generated(config, "show.html", content=page.html))
    return files


def on_page_markdown(markdown, page, **_):
    """Return the text of the page or of the file that its ``from`` names, with links between
    pages, and with the page of ``show`` in its place."""
    markdown = markdown.replace("<!-- show.html -->", SHOWN)
    if source := page.meta.get("from"):
        markdown = Path(source).read_text()
    return re.sub(r"\]\(docs/", "](", shown(markdown))


def on_page_content(content, **_):
    """Return the page where what is copied of an example is its code, without prompts and output:
    the theme copies the attribute ``data-copy`` instead of the text."""
    return re.sub(r'<div class="highlight">(?=(.*?)</div>)', copied, content, flags=re.DOTALL)


def copied(block):
    code = code_of(html.unescape(re.sub("<.*?>", "", block[1])))
    return f'{block[0][:-1]} data-copy="{html.escape(code)}">' if code else block[0]


class Docstrings(griffe.Extension):
    """Rewrites the docstrings of the reference."""

    def on_package(self, *, pkg, **_):
        objects = [pkg]
        for obj in objects:
            objects += [member for member in obj.members.values() if not member.is_alias]
            if obj.docstring:
                text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", obj.docstring.value)
                fenced = lambda m, obj=obj: f"```pycon\n{imports(m[0], obj)}{shown(m[0])}\n```\n"
                obj.docstring.value = re.sub(r"(?m)(?:^>>> (?:.+\n?)+)", fenced, text)


def imports(example, obj):
    """Return the imports that an example of an object's docstring needs to run by itself."""
    nodes = [*ast.walk(ast.parse(code_of(example)))]
    used = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    lines = ["import torch"] if "torch" in used else []
    used.discard("torch")
    for owner in (obj.package, obj.module):
        names = sorted(used & {*owner.members})
        used.difference_update(names)
        lines += [f"from {owner.path} import {', '.join(names)}"] if names else []
    return "".join(f">>> {line}\n" for line in lines)


def code_of(examples):
    return "".join(example.source for example in DocTestParser().get_examples(examples))


def shown(examples):
    """Return examples without what only their tests need."""
    return re.sub(r"(?m)^<BLANKLINE>$|  # doctest: .*$", "", examples).rstrip()
