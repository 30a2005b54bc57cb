"""The grammar of legal graphs, and the program that carries one.

    graph       := placeholder* call* output
    placeholder    an input, or (behind the inputs) a closed-over tensor; meta["role"] says which
    call        := call_function(target, args, kwargs)
    target      := OpOverload that neither mutates nor (after functionalisation) aliases
                 | operator.getitem                       one output of an op with several | Target
                 a nested compiled call, a custom derivative, control flow
    args        := node | literal | list of these output      := (tuple,)
    flat: results, then the new values of mutated inputs

Every node has ``meta["val"]``, its signature (a tuple of them for several outputs): shape, stride,
dtype, device, nothing real; ``meta["line"]``, the user's line, where it is known; and
``meta["region"]`` inside a checkpointed region; ``meta["again"]``, a name of its own, where it
runs once more on purpose; ``meta["named"]``, what the user calls the value.
``aten.detach`` and ``aotfunc.hidden_write`` carry the user's intent about derivatives and are
removed only when a graph is compiled."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx import Node

from . import debug
from .cache import Cache
from .errors import GraphError


@runtime_checkable
class Target(Protocol):
    """The target of a node that is no op: it has programs, and each pass asks it for its part."""

    __name__: str

    @property
    def dissolved_with(self) -> str | None:
        """Return the kind that ``lowered`` dissolves it with: "calls", "customs", "bodies" for a
        node that stays with other bodies, or None for one that stays as it is."""

    def __call__(self, *tensors: Any) -> Sequence[Any]:
        """Run it and return its flat results."""

    def inline(self, b: Any, args: Sequence[Any], inner: Callable[[Program], Program]) -> list:
        """Return its results as nodes of ``b`` for ``args``; ``inner`` lowers its programs."""

    def pull(
        self, b: Any, n: Node, g: dict[int, Node], active: Any, again: Any
    ) -> tuple[list, list]:
        """Return ``(arguments, their cotangents)`` of the node ``n`` for the cotangents ``g`` of
        its results, in reverse mode; values may be read from the node ``again``."""

    def push(self, b: Any, n: Node, new: Node, env: dict, tangents: dict) -> list:
        """Return tangents of the results of ``n``, which has become ``new`` in forward mode."""

    def batch(self, walk: Any, n: Node) -> tuple[Any, Any]:
        """Return ``(results, which are batched)`` of ``n``, with arguments in ``walk.env``."""


class Program:
    """A functional graph with the facts needed to call it.

    The graph's placeholders are ``n_inputs`` inputs followed by closed-over tensors; its flat
    outputs are ``n_outputs`` results (nodes or literals) followed by the new value of each
    placeholder in ``mutated``."""

    def __init__(
        self,
        graph: fx.Graph,
        n_inputs: int,
        n_outputs: int,
        mutated: Sequence[int] = (),
        name: str = "",
    ) -> None:
        self.graph, self.n_inputs, self.n_outputs = graph, n_inputs, n_outputs
        self.mutated, self.name = tuple(mutated), name
        self.cache: dict[Any, Any] = {}  # what belongs to it: see once
        if debug.LEVEL:
            verify_graph(graph, name)
        if debug.watched is not None or debug.LEVEL >= 3:
            debug.note(name, graph, lambda: self.code, n_ops(graph))

    @property
    def weight(self) -> int:
        """Return its number of nodes, as a measure of memory."""
        return len(self.graph.nodes)

    @property
    def placeholders(self) -> list[Node]:
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    @property
    def outputs(self) -> tuple:
        return output_node(self.graph).args[0]

    @property
    def vals(self) -> list:
        """Return the signature of each result; literals stand for themselves."""
        return [
            o.meta["val"] if isinstance(o, Node) else o for o in self.outputs[: self.n_outputs]
        ]

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return ``make()``, kept under ``key`` as long as this program: facts, code, halves."""
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]

    def derived(self, key: tuple, make: Callable[[], Any]) -> Any:
        """Return the program that a transform makes of this one. There may be many (one for each
        size of a batch), so the cache of all programs forgets them in time."""
        key = (self, *key)
        program = _derived[key]
        if program is None:
            _derived.put(key, program := make())
        return program

    def flat(self) -> Program:
        """Return the same graph, with closed-over tensors as inputs and new values as results."""
        outs = self.n_outputs + len(self.mutated)
        return self.once(
            "flat", lambda: Program(self.graph, len(self.placeholders), outs, (), self.name)
        )

    @property
    def code(self) -> str:
        """Return the program as a Python function."""
        text = self.graph.python_code("self").src.strip()
        name = self.name.replace(" ", "_") or "program"
        text = text.replace("def forward(self, ", f"def {name}(", 1)
        for n in self.graph.nodes:
            for body in getattr(n.target, "bodies", ()):
                text += f"\n\n# {n.name} is a {n.target!r} of\n{body.code}"
        return text

    def __repr__(self) -> str:
        head = f"<{self.name or 'program'}: {self.signature}, {n_ops(self.graph)} nodes>"
        return f"{head}\n{self.graph}"

    @property
    def signature(self) -> str:
        """Return the signature: inputs, closed-over tensors included, and results."""
        given = ", ".join([str(p.meta["val"]) for p in self.placeholders])
        return f"({given}) -> ({', '.join(map(str, self.vals))})"


class Times(int):
    """A literal multiple of a batch's size, in code shared by programs of several sizes."""


def weight(made: Any) -> int:
    """Return how many nodes a program has, or what carries one, or several of these."""
    if isinstance(made, tuple):
        return sum(map(weight, made))
    return getattr(getattr(made, "program", made), "weight", 1)


_derived = Cache(1 << 16, weight)


def output_node(graph: fx.Graph) -> Node:
    return next(iter(reversed(graph.nodes)))


def dependents(graph: fx.Graph, inputs: Iterable[Node]) -> set[Node]:
    """Return these inputs and all nodes that depend on them."""
    found = set(inputs)
    for n in graph.nodes:
        if n.op == "call_function" and any(i in found for i in n._input_nodes):
            found.add(n)
    return found


def needed_for(nodes: Sequence[Node], outs: Iterable[Any]) -> set[Any]:
    """Return ``outs``, draws and effects among ``nodes``, and all that they depend on."""
    found = set(outs)
    for n in reversed(nodes):
        if n in found or kept_alive(n):
            found.update((n, *n._input_nodes))
    return found


def recomputes(n: Node) -> bool:
    """Return whether a node computes a value of a checkpointed region again."""
    region = n.meta.get("region")
    return region.__class__ is tuple and region[0] == "again"


def cut(
    graph: fx.Graph,
    late_inputs: Sequence[Node],
    early_outs: Sequence[Any],
    late_outs: Sequence[Any],
) -> tuple[list[Node], list[Node], list[Node]]:
    """Split by reachability: ``(early nodes, late nodes, residuals)``.

    Late is what depends on ``late_inputs``, or recomputes a checkpointed region, and is needed for
    ``late_outs``; everything else that is needed is early; residuals are the early values (or
    other placeholders) that late nodes or late outputs read."""
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    before = needed_for(nodes, early_outs)
    again = [n for n in nodes if n not in before and recomputes(n)]
    dependent = dependents(graph, [*late_inputs, *again])
    late_wanted = {o for o in late_outs if isinstance(o, Node)}
    early_wanted = {o for o in early_outs if isinstance(o, Node)}
    residuals: dict[Node, None] = {
        o: None for o in late_outs if isinstance(o, Node) and o not in dependent
    }
    late: list[Node] = []
    for n in reversed(nodes):
        if n in dependent and n in late_wanted:
            late.append(n)
            for i in n._input_nodes:
                if i in dependent:
                    late_wanted.add(i)
                else:
                    residuals[i] = None
    early_wanted.update(residuals)
    free = [n for n in nodes if n not in dependent]
    wanted = needed_for(free, early_wanted)
    early = [n for n in free if n in wanted]
    order = {n: k for k, n in enumerate(graph.nodes)}
    # an op with several outputs crosses as its items
    whole = [r for r in residuals if isinstance(r.meta["val"], tuple)]
    for r in whole:
        del residuals[r]
        for item in r.users:
            if item.target is operator.getitem and item in late:
                late.remove(item)
                early.append(item)
                residuals[item] = None
    early.sort(key=order.__getitem__)
    late.sort(key=order.__getitem__)
    return early, late, sorted(residuals, key=order.__getitem__)


def kept_alive(n: Node) -> bool:
    """Return whether a node must stay although it is not read: a draw moves the generator on, an
    effect is seen outside, a derivative reads what stands for a result."""
    return draws(n) or acts(n) or getattr(n.target, "stays", False)


#: libraries whose functional-looking ops talk to other processes: no call may be left out, doubled
#: or moved past another, as all processes have to make the same calls in the same order
COLLECTIVE = (
    "c10d",
    "_c10d_functional",
    "_c10d_functional_autograd",
    "_dtensor",
    "aotfunc_layout",
)


def acts(n: Node) -> bool:
    """Return whether a node's op writes, returns nothing, or talks to other processes."""
    return isinstance(n.target, OpOverload) and acting(n.target)


@cache
def acting(op: OpOverload) -> bool:
    return op._schema.is_mutable or not op._schema.returns or op.namespace in COLLECTIVE


def draws(n: Node) -> bool:
    """Return whether a node draws random numbers; attention with dropout_p=0 and dropout in
    evaluation are tagged as if they did."""
    op = n.target
    if not isinstance(op, OpOverload):
        return bool(getattr(op, "draws", False))
    switches = drawing(op)
    for i, a in switches or ():
        given = n.args[i] if i < len(n.args) else n.kwargs.get(a.name, a.default_value)
        if given is not None and not isinstance(given, Node) and not given:
            return False
    return switches is not None


@cache
def drawing(op: OpOverload) -> list[tuple[int, Any]] | None:
    """Return None for an op that never draws, else the arguments whose zeros stop it."""
    arguments = list(enumerate(op._schema.arguments))
    tagged = torch.Tag.nondeterministic_seeded in op.tags
    if not tagged and not any("Generator" in str(a.type) for _, a in arguments):
        return None
    return [
        (i, a) for i, a in arguments if a.name in ("dropout_p", "dropout", "train", "training")
    ]


def op_of(n: Node) -> Node:
    """Return the call that makes a value; for a part of a tuple the one that makes the tuple."""
    return op_of(n.args[0]) if n.target is operator.getitem else n  # type: ignore[arg-type]


def n_ops(graph: fx.Graph) -> int:
    """Return how many ops a graph has: calls without ``getitem``."""
    return sum(n.op == "call_function" and n.target is not operator.getitem for n in graph.nodes)


def verify_graph(graph: fx.Graph, made_by: str = "") -> None:
    """Check the grammar; raises :class:`GraphError` naming the pass that made the graph."""

    def wrong(what: str) -> GraphError:
        return GraphError(f"{made_by or 'a pass'} made an illegal graph: {what}\n{graph}")

    seen: set[Node] = set()
    stage = 0
    for n in graph.nodes:
        order = {"placeholder": 0, "get_attr": 0, "call_function": 1, "output": 2}.get(n.op)
        if order is None or order < stage or stage == 2:
            raise wrong(f"a {n.op} node {n} is not allowed here")
        stage = order
        if any(i not in seen for i in n.all_input_nodes):
            raise wrong(f"{n} reads a value that is not there yet")
        if n.op != "output" and "val" not in n.meta:
            raise wrong(f"{n} has no meta['val']")
        if n.op == "call_function":
            target = n.target
            if isinstance(target, OpOverload):
                if target._schema.is_mutable:
                    raise wrong(f"{n} mutates: {target}")
            elif target is not operator.getitem and not isinstance(target, Target):
                raise wrong(f"{n} calls {target}, which is neither an op nor a Target")
        seen.add(n)
    if stage != 2:
        raise wrong("it has no output")
