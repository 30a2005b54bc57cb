"""``show``: the programs of a call as a page that one can look around in."""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ..api.export import load
from ..api.jit import aot_module, jit
from ..debug import Stages, stages
from .page import page


class Page:
    """One self-contained HTML page; a notebook shows it as the result of a cell."""

    def __init__(self, text: str, found: Stages) -> None:
        self.html, self.stages = text, found

    def save(self, file: str | Path) -> None:
        """Write the page to a file."""
        Path(file).write_text(self.html, encoding="utf-8")

    def _repr_html_(self) -> str:
        source = html.escape(self.html)
        return f'<iframe srcdoc="{source}" style="width: 100%; height: 720px"></iframe>'

    def __repr__(self) -> str:
        names = ", ".join(stage.made_by for stage in self.stages)
        return f"<page of {len(self.stages)} programs: {names}>"


def show(
    f: Callable | str | Path, *args: Any, to: str | Path | None = "aotfunc.html", **kwargs: Any
) -> Page:
    """Call ``f`` and write the programs of this call, stage by stage, to the HTML page ``to``.

    ``f`` is what :func:`debug.stages` takes, or else a plain function or a module, which is
    compiled by ``jit`` or ``aot_module`` for this, or the name of a file of ``export``. The page
    needs no network: graphs with shapes, bytes, costs and the user's lines, collapsed to lines,
    functions or modules, each of which a click opens alone; pointing at a value marks it in every
    stage, its derivative, and lighter what else came of the same line; values that the forward
    saves and ops that the backward computes again are coloured; a curve shows the bytes that live
    while each op runs.
    ``to=None`` writes no file. The arrangement of graphs is igraph's (``pip install
    aotfunc[show]``), after Sugiyama, Tagawa and Toda (1981).

    >>> show(grad(lambda x: x.sin()), torch.zeros(()), to=None)
    <page of 2 programs: capture, vjp>
    """
    name = getattr(f, "__name__", type(f).__name__)
    if isinstance(f, str | Path):
        name, f = Path(f).name, load(f)
    found = stages(f)(*args, **kwargs)
    if not found:  # no transform, not compiled
        compiled = aot_module(f) if isinstance(f, nn.Module) else jit(f)
        found = stages(compiled)(*args, **kwargs)
    made = Page(page(name, found), found)
    if to is not None:
        made.save(to)
    return made
