"""Describe programs for the page: nodes, equal values, and the memory that they take."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx import Node

from ..debug import Line, Stage
from ..graph import output_node
from ..partition.cost import Roofline, flops, nbytes
from ..partition.memory import live_bytes
from ..partition.ops import is_view
from ..partition.report import dtype_text
from .layout import arranged

_FILES = Path(__file__).parent
_COST = Roofline(fused=1.0)


def page(title: str, stages: Iterable[Stage]) -> str:
    """Return the HTML page of these programs."""
    values = ValueNumbers()
    shown = [described(stage, values) for stage in stages]
    mark_halves(shown)
    text = (_FILES / "page.html").read_text(encoding="utf-8")
    for name in ("page.css", "page.js"):
        text = text.replace(f"/* {name} */", (_FILES / name).read_text(encoding="utf-8"))
    # nothing in the data ends the script element that it stands in
    data = json.dumps({"title": title, "stages": shown}).replace("</", "<\\/")
    return text.replace("/* data */", data)


class ValueNumbers:
    """Numbers for values: one value has one number in all stages.

    Two nodes of different stages stand for one value if they call one op with the same values,
    or, where a pass changed these, if they have one op, one name and one line of the user's."""

    def __init__(self) -> None:
        self.of: dict[Any, int] = {}
        self.count = 0
        self.derived: dict[int, int | None] = {}  # the value whose derivative another one computes

    def numbers(self, nodes: Sequence[Node], lines: Sequence[str]) -> dict[Node, int]:
        """Return the number of each node of a program."""
        found: dict[Node, int] = {}
        taken = set()
        for n, line in zip(nodes, lines):
            keys: list[Any] = [n.name]
            if n.op == "call_function":
                args = fx.node.map_arg((n.args, n.kwargs), lambda a: f"%{found[a]}")
                keys = [(n.name, line)]  # a kernel has the name of the value that it stores
                if isinstance(n.target, OpOverload):
                    keys = [(str(n.target), str(args)), (n.name, line, str(n.target))]
            known = [self.of[k] for k in keys if k in self.of and self.of[k] not in taken]
            self.count += not known
            number = found[n] = known[0] if known else self.count
            taken.add(number)
            self.of.update(dict.fromkeys((*keys, (n.name, line), n.name), number))
        named = {n.name: number for n, number in found.items()}
        for n, number in found.items():
            self.derived.setdefault(number, named.get(n.meta.get("of")))
        return found


def described(stage: Stage, values: ValueNumbers) -> dict[str, Any]:
    """Return what the page shows of one stage."""
    nodes = [n for n in stage.graph.nodes if n.op != "output"]
    index = {n: i for i, n in enumerate(nodes)}
    lines = [node_line(n) for n in nodes]
    numbers = values.numbers(nodes, [text for text, *_ in lines])
    results = set(output_node(stage.graph).all_input_nodes)
    live = live_bytes(nodes, results)
    rows = [
        {
            "name": n.name,
            "op": node_title(n),
            "kind": kind(n),
            "type": type_text(n.meta.get("val")),
            "bytes": nbytes(n.meta.get("val")),
            "flops": flops(n),
            "cost": _COST.time(n),
            "line": text,
            "function": function,
            "module": module,
            "value": numbers[n],
            "of": values.derived[numbers[n]],
            "result": n in results,
            "code": n.format_node() or "",
            "live": live[i],
        }
        for i, (n, (text, function, module)) in enumerate(zip(nodes, lines))
    ]
    edges = [(index[a], i) for n, i in index.items() for a in n.all_input_nodes]
    named = lambda what: [row[what] or row["name"] for row in rows]
    levels = {
        "ops": named("name"),
        "lines": named("line"),
        "functions": named("function"),
        "modules": named("module"),
        "outer modules": [numbered_module(row["module"]) or row["name"] for row in rows],
    }
    return {
        "made_by": stage.made_by,
        "size": stage.size,
        "code": stage.code,
        "nodes": rows,
        "edges": edges,
        "levels": {level: collapsed(keys, edges) for level, keys in levels.items()},
    }


def mark_halves(stages: list[dict[str, Any]]) -> None:
    """Mark what a forward saves for the backward that follows it, and what that computes again."""
    forward: dict[int, dict[str, Any]] = {}
    for stage in stages:
        if stage["made_by"] == "forward":
            forward = {row["value"]: row for row in stage["nodes"]}
        elif stage["made_by"] == "backward":
            for row in stage["nodes"]:
                before = forward.get(row["value"])
                if before is not None and row["kind"] == "input":
                    row["mark"] = before["mark"] = "saved"
                elif before is not None:
                    row["mark"] = "recomputed"


def collapsed(keys: Sequence[str], edges: Iterable[tuple[int, int]]) -> dict[str, Any]:
    """Return the graph of groups: nodes of one key are one, named after it."""
    numbers: dict[str, int] = {}
    group = [numbers.setdefault(key, len(numbers)) for key in keys]
    return {"group": group, "names": [*numbers], "places": arranged(group, edges)}


def node_line(n: Node) -> tuple[str, str, str]:
    """Return a node's user line, the function it is in, and the module being called."""
    line = n.meta.get("line")
    if isinstance(line, Line):
        function = line.code.co_qualname.replace("<locals>.", "")
        return str(line), function, getattr(line, "module", "")
    place = str(line or "").partition(": ")[0]
    return str(line or ""), place.partition(" in ")[2], ""


def numbered_module(module: str) -> str:
    """Return the name up to its first number.

    >>> [numbered_module(m) for m in ("encoder.layers.0.self_attn", "head", "stem.conv")]
    ['encoder.layers.0', 'head', 'stem']
    """
    return re.match(r"(?:[^.]+\.)*?\d+(?=\.|$)|[^.]*", module)[0]  # type: ignore[index]


def node_title(n: Node) -> str:
    if n.op != "call_function":
        return str(n.meta.get("role", "constant" if n.op == "get_attr" else "input"))
    return getattr(n.target, "__name__", str(n.target)).removesuffix(".default")


def kind(n: Node) -> str:
    """Return what colours a node."""
    op = n.target
    if n.op != "call_function":
        return "input"
    if op is operator.getitem or (isinstance(op, OpOverload) and is_view(n)):
        return "view"
    if not isinstance(op, OpOverload):
        return "kernel"
    if flops(n):
        return "product"
    return "pointwise" if torch.Tag.pointwise in op.tags else "other"


def type_text(val: Any) -> str:
    if isinstance(val, tuple | list):
        return ", ".join(map(type_text, val))
    if not hasattr(val, "dtype"):
        return "" if val is None else str(val)
    return f"{dtype_text(val.dtype)}{list(val.shape)}"
