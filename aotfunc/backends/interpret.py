"""Run a graph as a list of calls, as long as it may run only a few times; generate Python when it
runs often.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import fx
from torch.fx import Node

from .. import debug
from ..trace.marks import IDENTITIES, hidden_write
from .eager import as_said, compare, compile_graph, entry_of, last_uses, unsure

#: generated code saves half a microsecond a node and run, and costs 30 to make
OFTEN = 50


class Interpreted:
    """A function of the graph's placeholders that returns its flat outputs as a tuple. From the
    second run on it runs ``dissolved()``, the same graph without marks of intent."""

    def __init__(self, graph: fx.Graph, dissolved: Callable[[], fx.Graph] | None = None) -> None:
        self.graph, self.dissolved, self.runs = graph, dissolved, 0
        self.run: Callable[..., tuple] | None = None

    def __call__(self, *inputs: Any) -> tuple:
        self.runs += 1
        run, dissolved = self.run, self.dissolved  # another thread may run it, too
        shown = debug.LEVEL >= 4  # the code
        if dissolved is not None and (shown or self.runs > 1):
            self.graph, self.dissolved, run = dissolved(), None, None
        if run is None:
            run = self.run = compile_graph(self.graph) if shown else Calls(self.graph)
        elif self.runs >= OFTEN and run.__class__ is Calls:
            run = self.run = compile_graph(self.graph)
        return run(*inputs)


class Calls:
    """The calls of a graph in order. Each reads its arguments, literals included, from a list of
    values, writes its result there, and drops values after their last use."""

    def __init__(self, graph: fx.Graph) -> None:
        inputs = [n for n in graph.nodes if n.op == "placeholder"]
        self.places = {n: i for i, n in enumerate(inputs)}
        self.start: list[Any] = [None] * len(inputs)  # the list before the first call
        self.steps: list[tuple[Callable, list[int], dict[str, int], int, list[int]]] = []
        self.lists: list[int] = []  # the places of the next call's arguments
        last = last_uses(graph)
        for n in graph.nodes:
            if n.op == "output":
                self.outputs = [self.place(a) for a in n.args[0]]
            elif n.op == "placeholder":
                if debug.LEVEL >= 2 and n.meta.get("role") != "tangent":
                    look = partial(compare, n)
                    self.steps.append((look, [self.places[n]], {}, self.new(None), []))
            elif n.op == "get_attr":
                self.places[n] = self.new(getattr(graph.owning_module, n.target))
            else:
                args = [self.place(a) for a in n.args]
                kwargs = {k: self.place(a) for k, a in n.kwargs.items()}
                self.places[n] = out = self.new(None)
                dead = [self.places[d] for d in last.get(n, ())]
                self.steps.append((call_of(n), args, kwargs, out, [*dead, *self.lists]))
                self.lists.clear()

    def new(self, value: Any) -> int:
        self.start.append(value)
        return len(self.start) - 1

    def place(self, a: Any) -> int:
        """Return the place of an argument; a call of its own makes a list with nodes in it."""
        if a.__class__ is Node:
            return self.places[a]
        if isinstance(a, list | tuple) and any(isinstance(x, Node | list | tuple) for x in a):
            parts = [self.place(x) for x in a]
            out = self.new(None)
            self.steps.append((build_list, parts, {}, out, []))
            self.lists.append(out)
            return out
        return self.new(list(a) if isinstance(a, list | tuple) else a)

    def __call__(self, *inputs: Any) -> tuple:
        values = self.start.copy()
        values[: len(inputs)] = inputs
        for call, args, kwargs, out, dead in self.steps:
            if kwargs:
                named = {k: values[i] for k, i in kwargs.items()}
                values[out] = call(*[values[i] for i in args], **named)
            else:
                values[out] = call(*[values[i] for i in args])
            for i in dead:
                values[i] = None
        return tuple([values[i] for i in self.outputs])


def build_list(*parts: Any) -> list:
    return list(parts)


#: mark of intent -> its value
MARKS: dict[Any, Callable] = {
    **dict.fromkeys(IDENTITIES, lambda x: x),
    hidden_write: lambda old, new: new,
}


def call_of(n: Node) -> Callable:
    call = MARKS.get(n.target) or entry_of(n)
    if n.target is operator.getitem or not (unsure(n) or debug.LEVEL >= 2):
        return call

    def checked(*args: Any, **kwargs: Any) -> Any:
        value = call(*args, **kwargs)
        if unsure(n):
            value = as_said(n, value)
        if debug.LEVEL >= 2:
            compare(n, value)
        return value

    return checked
