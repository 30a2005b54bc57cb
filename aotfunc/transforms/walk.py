"""Trace a rule once per signature into a fragment and copy that from then on, for all walkers.

:func:`apply` is the whole mechanism. Its key is the rule's tag, the signatures of the nodes and
the literals. The first time ``make`` builds the result on placeholders, tidied; later calls splice
that fragment.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from ..cache import Cache
from ..debug import Line, at, line_in_a_rule
from ..errors import RuleError
from ..trace.emit import Builder, remap, remap_dict
from ..trace.functionalize import Functionalizer
from ..trace.modes import off, outside_inference_mode
from ..trace.nested import leaves, map_nested, mapped
from ..trace.recording import record_into
from ..trace.shapes.instr import SIMPLE, encode, env_key
from ..trace.shapes.sig import Sig, Slot, fill
from ..trace.traced import Traced, quiet
from ..trace.tracer import Trace
from .tidy import REWRITES

aten = torch.ops.aten

#: a function that makes a result of nodes: ``(builder, *args) -> nested nodes``
Make = Callable[..., Any]


class Fragment:
    """A rule's graph for one signature: its inputs, its calls with all that they are made of, and
    its results."""

    __slots__ = ("calls", "inputs", "outputs")

    def __init__(self, inputs: list[Node], graph: fx.Graph, outputs: Any) -> None:
        self.inputs, self.outputs = inputs, outputs
        calls = [n for n in graph.nodes if n.op == "call_function"]
        self.calls = [(n, n.target, n.args, n.kwargs, n.meta["val"]) for n in calls]
        for n in graph.nodes:
            n.meta.clear()  # copies get the line of the op that the rule is for


_fragments = Cache(1 << 15, lambda fragment: 1 + len(fragment.calls))


def builder() -> Builder:
    """Return a builder that merges equal nodes and simplifies as it goes."""
    return Builder(REWRITES)


def apply(b: Builder, tag: tuple, make: Make, *args: Any) -> Any:
    """Return the result of ``make(builder, *args)`` in ``b``, by way of the fragment cache.
    ``args``: nested nodes and literals."""
    key: list = [tag]
    nodes: list[Node] = []

    def sink(n: Node) -> tuple[Slot, Sig]:
        nodes.append(n)
        return Slot(len(nodes) - 1), n.meta["val"]

    for a in args:
        if a.__class__ is Node:
            nodes.append(a)
            key.append(a.meta["val"])
        elif a.__class__ in SIMPLE:
            key += (a.__class__, a)
        else:
            encode(a, key, sink)
    key.append(env_key())
    frozen = tuple(key)
    fragment = _fragments.get(frozen)
    if fragment is None:
        fb, nodes = builder(), []
        template = [encode(a, [], sink) for a in args]
        inputs = [fb.placeholder("x", n.meta["val"]) for n in nodes]
        outputs = make(fb, *fill(template, inputs))
        graph = fb.finish([o for o in leaves(outputs) if isinstance(o, Node)])
        fragment = Fragment(inputs, graph, outputs)
        _fragments.put(frozen, fragment)
    env: dict[Node, Any] = dict(zip(fragment.inputs, nodes, strict=True))
    for n, target, given, kwargs, val in fragment.calls:
        env[n] = b.node(target, remap(given, env), remap_dict(kwargs, env), val)
    return remap(fragment.outputs, env)


def traced(fn: Callable, intent: bool = True, opened: dict | None = None) -> Make:
    """Return the ``make`` that records tensor code ``fn(*args)`` and puts its functional graph
    into the builder; ``opened``: functions for ops that a recording answers."""

    @outside_inference_mode
    def make(b: Builder, *args: Any) -> Any:
        trace = Trace("a rule may not look at values", constants=False, intent=intent)
        trace.opened, trace.of_a_rule = opened or {}, True
        nodes: list[Node] = []

        def wrap(a: Any) -> Any:
            if isinstance(a, Node):
                nodes.append(a)
                return trace.input_like(a.meta["val"])
            return a

        wrapped = [map_nested(wrap, a) for a in args]
        with off():
            results = record_into(trace, lambda: fn(*wrapped))
        return placed(b, fn, trace, results, nodes, intent)

    return make


def placed(
    b: Builder, fn: Callable, trace: Trace, results: Any, nodes: list[Node], intent: bool = True
) -> Any:
    """Put the graph of ``results``, recorded by ``fn``, into the builder, on these nodes."""
    with quiet():  # a rule may look at the values of its own constants
        known = {r: made_node(b, trace.lifted[-1 - r]) for r in trace.made_inside}
    consts = [known.get(-1 - i) or constant_node(b, t) for i, t in enumerate(trace.lifted)]
    f = Functionalizer(trace, b, [*nodes, *consts], intent)
    kept, b.meta = b.meta, {}
    f.run()
    b.meta = kept
    for index, _ in f.mutated():
        raise RuleError(f"{fn} writes to its argument {index}")

    def unwrap(r: Any) -> Any:
        if isinstance(r, Tensor):
            return (
                f.read(r.ref, intent)
                if r.__class__ is Traced and r.tracer is trace
                else constant_node(b, r)
            )
        return r

    return mapped(unwrap, results)


def as_graph(make: Make, args: Any) -> tuple[Builder, Any, dict[Node, Node]]:
    """Build ``make``'s result for ``args`` as a graph of its own; return its builder, the results,
    and the node among ``args`` that each placeholder stands for."""
    b, holes = builder(), dict[Node, Node]()

    def hole(a: Any) -> Any:
        if not isinstance(a, Node):
            return a
        if a not in holes:
            holes[a] = b.placeholder("x", a.meta["val"])
        return holes[a]

    results = make(b, *mapped(hole, args))
    return b, results, {p: a for a, p in holes.items()}


@contextmanager
def errors_of(kind: str, n: Node, rule: Callable) -> Iterator[None]:
    """Raise RuleError for an error in a rule inside, naming the op, the rule's line, and the
    user's. A rule raises NotImplementedError for arguments that it does not cover."""
    try:
        yield
    except RuleError:
        raise
    except NotImplementedError as e:
        raise RuleError(f"no {kind} rule for {n.target}{at(n.meta.get('line'))}: {e}") from None
    except Exception as e:
        code = inspect.unwrap(rule).__code__
        place = line_in_a_rule(e) or Line(code, 0)
        line = at(n.meta.get("line"))
        raise RuleError(
            f"the {kind} rule of {n.target} ({place}) failed{line}: {type(e).__name__}: "
            f"{str(e).removesuffix(line)}"
        ) from e


def check_count(results: Sequence[Any], count: int) -> None:
    """Raise ValueError for too many results of a rule; those left out are absent."""
    if len(results) > count:
        raise ValueError(f"it returned {len(results)} results where there are {count}")


def constant_node(b: Builder, t: Tensor) -> Node:
    """Return a number that a rule made, as a node."""
    if t.dim():
        raise RuleError(
            f"a rule closes over a tensor of shape {tuple(t.shape)}; only numbers may be constants"
        )
    return b.call(aten.full.default, [], t.item(), dtype=t.dtype, device=t.device)


def made_node(b: Builder, t: Tensor) -> Node:
    """Return a few numbers that a rule put into a tensor, as nodes."""
    if not t.dim():
        return constant_node(b, t)
    if t.numel() > FEW:
        raise RuleError(
            f"a rule makes a tensor of shape {tuple(t.shape)} of Python numbers, which may be "
            f"{FEW} at most; make it of ops (torch.arange)"
        )
    if not t.numel():
        return b.call(aten.full.default, list(t.shape), 0, dtype=t.dtype, device=t.device)
    numbers = [constant_node(b, x) for x in t.flatten()]
    return b.call(aten.view.default, b.call(aten.stack.default, numbers), list(t.shape))


#: how many numbers of one tensor become nodes
FEW = 64


def filled_node(b: Builder, value: Any, sig: Sig) -> Node:
    """Return a tensor like ``sig``, filled with a number."""
    return b.call(aten.full.default, list(sig.shape), value, dtype=sig.dtype, device=sig.device)


def unknown(b: Builder, sig: Sig) -> Node:
    """Return any tensor like ``sig``: an unread input of a linear result, dropped later."""
    kwargs = {"dtype": sig.dtype, "device": sig.device}
    return b.make("call_function", aten.empty.memory_format, (list(sig.shape),), kwargs, sig)


def node_outputs(b: Builder, n: Node) -> Any:
    """Return a node's outputs as a rule's argument: itself, or nested lists of outputs."""
    val = n.meta["val"]
    if not isinstance(val, tuple):
        return n
    return [
        node_outputs(b, output(b, n, i)) if isinstance(v, Sig | tuple) else v
        for i, v in enumerate(val)
    ]


def output(b: Builder, n: Node, i: int) -> Any:
    """Return output ``i`` of a node: the value that others read, which has its hooks."""
    read = [u for u in n.users if u.target is operator.getitem and u.args == (n, i)]
    return read[0] if read else b.item(n, i)
