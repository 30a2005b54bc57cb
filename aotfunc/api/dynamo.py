"""A transform in a function that torch.compile compiles: one node of Dynamo's graph.

Where Dynamo meets a transform it reads another function instead (:mod:`.readings`). That calls
``f`` on stand-ins for what is differentiated or batched, so that ``f`` becomes a subgraph with
what it closes over among its inputs, and computes tensors that look like the transform's results.
The transform itself is called on the subgraph whenever the graph runs: on real tensors, or by
AOTAutograd, which then sees its ops."""

from __future__ import annotations

import functools
import operator
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from ..debug import _OURS, at, user_line
from ..errors import CaptureError
from ..trace.entering import entry
from ..trace.kinds import is_fake
from ..trace.traced import quiet


def read_by_dynamo(reads: Callable, runs: Callable) -> Callable:
    """Make a decorator for a transform ``(f, *options) -> function``: Dynamo reads ``reads(f,
    args, kwargs, *options)`` where it meets a call of that function, and the graph calls ``runs``
    (see :func:`node`)."""

    def decorate(transform: Callable) -> Callable:
        @functools.wraps(transform)
        def make(func: Callable, *options: Any, **named: Any) -> Callable:
            def in_graph(*args: Any, **kwargs: Any) -> Any:
                def plain(
                    func: Callable, args: tuple, kwargs: dict, *options: Any, **named: Any
                ) -> Any:
                    return transform(func, *options, **named)(*args, **kwargs)

                return node(transform, reads, runs, plain, func, args, kwargs, *options, **named)

            if is_dynamo_compiling():
                return in_graph
            return entry(transform(func, *options, **named), in_graph)

        return make

    return decorate


def read_as(reads: Callable) -> Callable:
    """Make a decorator of a transform that takes the arguments of ``f`` too, read likewise."""
    return lambda transform: entry(transform, reads(transform))


def node(
    transform: Callable,
    reads: Callable,
    runs: Callable,
    plain: Callable,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Let Dynamo read ``reads(*args, **kwargs)`` as one node of its graph. When the graph runs,
    the node calls ``runs(transform, body, given, more, *options)`` with the arguments of
    :func:`leave`. Where Dynamo cannot read it, ``plain`` is called."""
    from torch._higher_order_ops.wrap import dynamo_bypassing_wrapper

    def body(plain: Callable, args: tuple, kwargs: dict) -> Any:
        return reads(*args, **kwargs)

    prepare()
    return dynamo_bypassing_wrapper(
        functools.partial(run, transform, runs), body, plain, args, kwargs
    )


def prepare() -> None:
    """Make the two functions nodes of Dynamo's graphs; Dynamo calls this while it reads."""
    torch.compiler.allow_in_graph(enter)
    torch.compiler.allow_in_graph(leave)


prepare._dynamo_marked_constant = True  # type: ignore[attr-defined]


def enter(x: Tensor, differentiated: bool) -> Tensor:
    """Return the stand-ins for tensors in the call of ``f``. Only their metadata counts."""
    if differentiated:
        return x.detach().requires_grad_().clone()
    sample = x.view_as(x)
    if not x.dim() and is_fake(x) and x.dtype in INDICES:
        with quiet():
            # indexing reads the value
            sample.constant = torch.zeros((), dtype=x.dtype).as_subclass(TracedIndex)
    return sample


#: dtypes of 0-dim tensors that may be an index
INDICES = (torch.int64, torch.int32, torch.int16, torch.int8)


class TracedIndex(Tensor):
    """An index as Dynamo reads it, and values computed from it. It breaks the graph where PyTorch
    2.11's Dynamo would keep the item of a list for good."""

    def numel(self) -> int:
        return 0


def leave(
    examples: Sequence[Tensor],
    given: Any,
    more: Any,
    entered: Any,
    outs: Any,
    aux: Any,
    options: Any,
) -> list:
    """Return results like ``examples``. ``given``: the tensors that ``entered`` stands for;
    ``more``: others that the transform takes; ``outs``, ``aux``: the results of ``f``."""
    return [x.clone() for x in examples]


# ----- when the graph runs -----------------------------------------------------------------------


def run(transform: Callable, runs: Callable, graph: Any) -> Callable:
    """Return the node's work, as a function of what the subgraph takes."""
    if not isinstance(graph, GraphModule):  # Dynamo did not read it
        return lambda plain, args, kwargs: plain(*args, **kwargs)
    if "aotfunc" not in graph.meta:
        graph.meta["aotfunc"] = SubgraphBody(graph)
    body: SubgraphBody = graph.meta["aotfunc"]

    def call(*operands: Any) -> tuple:
        operands = tuple(map(of_one_size, operands))
        given, more = ([operands[i] for i in places] for places in (body.given, body.more))

        def of_entered(*entered: Any) -> tuple[tuple, tuple]:
            return body(*entered, *operands)

        of_entered.__name__ = body.name
        results = runs(transform, of_entered, given, more, *body.options(*operands))
        return tuple([results[i] for i in body.results])

    return call


def of_one_size(x: Any) -> Any:
    """Return an operand with numbers for symbols: the compiled function is guarded on them."""
    if isinstance(x, torch.SymInt | torch.SymFloat | torch.SymBool):
        return {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}[type(x)](x)
    if isinstance(x, Tensor) and any(isinstance(s, torch.SymInt) for s in (*x.shape, *x.stride())):
        return x.as_strided([*map(int, x.shape)], [*map(int, x.stride())], int(x.storage_offset()))
    return x


class SubgraphBody:
    """``f`` as a function of the tensors that enter and a subgraph's inputs."""

    def __init__(self, graph: GraphModule) -> None:
        nodes = list(graph.graph.nodes)
        end = next(n for n in nodes if n.target is leave)
        examples, given, more, entered, outs, aux, options = end.args
        operands = [n for n in nodes if n.op == "placeholder"]
        self.options = values_of(options, graph, operands)
        self.name = next(filter(None, map(where_called, reversed(nodes))), "the function")
        self.given, self.more = ([operands.index(n) for n in part] for part in (given, more))
        results = nodes[-1].args[0]
        if not all(n.target is operator.getitem and n.args[0] is end for n in results):
            raise CaptureError(
                "under torch.compile a tensor leaves a transformed function otherwise than as a "
                "result; return it, or call the transform outside of torch.compile"
            )
        self.results = [n.args[1] for n in results]
        for_show = nodes_behind([*examples, *entered], (*outs, *aux, *operands))
        ours = Graph()
        env: dict[Node, Node] = {
            n: ours.placeholder(f"entered_{k}") for k, n in enumerate(entered)
        }
        for n in nodes[: nodes.index(end)]:
            if n not in env and n not in for_show:
                env[n] = ours.node_copy(n, env.__getitem__)
        ours.output((tuple([env[n] for n in outs]), tuple([env[n] for n in aux])))
        module = GraphModule(graph, ours)
        indexed = any(getattr(example_value(n), "constant", None) is not None for n in nodes)
        self.call = Checked(module).run if indexed else module

    def __call__(self, *tensors: Any) -> tuple[tuple, tuple]:
        return self.call(*tensors)


class Checked(Interpreter):
    """The index of each sample, which Dynamo has read as 0; it may only serve as an index."""

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if target is operator.getitem:  # brackets around it make it an index
            x, index = args
            if isinstance(x, Tensor):  # one of AOTAutograd's would ask the index for a number
                x = x.view_as(x)
            return x[index]
        return super().call_function(target, args, kwargs)

    def run_node(self, n: Node) -> Any:
        value, read = super().run_node(n), example_value(n)
        number = n.target == "item" and not isinstance(read, torch.SymInt)
        if number or (
            isinstance(value, Tensor) and isinstance(read, Tensor) and other_size(value, read)
        ):
            raise CaptureError(
                "vmap under torch.compile: a number is asked of a value that differs between "
                f"samples, in {n.format_node()}{at(user_line())}; use it as an index, x[i], or "
                "call vmap outside of torch.compile"
            )
        return value


def other_size(value: Tensor, read: Tensor) -> bool:
    """Return whether shapes differ in a dimension or a size that is a number in both."""
    sizes = zip(value.shape, read.shape, strict=False)
    plain = [(a, b) for a, b in sizes if isinstance(a, int) and isinstance(b, int)]
    return value.dim() != read.dim() or any(a != b for a, b in plain)


def where_called(n: Node) -> str:
    """Return the function of the user's that a reading called, and its line; "" for a reading's
    own ops."""
    frames = re.findall(r'File "(.+)", line (\d+), in (\S+)', n.meta.get("stack_trace") or "")
    found = ""
    for path, line, name in reversed(frames):
        if path.startswith(_OURS):
            return found
        found = f"{name} ({os.path.basename(path)}:{line})"
    return ""


def values_of(options: Any, graph: GraphModule, operands: Sequence[Node]) -> Callable:
    """Return a function of a subgraph's inputs: ``options`` with numbers for nodes, which stand
    for sizes."""
    asked: list[Node] = []
    map_arg(options, asked.append)
    if not asked:
        return lambda *operands: options
    ours = Graph()
    env = {n: ours.node_copy(n) for n in operands}
    needed = nodes_behind(asked, operands)
    for n in graph.graph.nodes:
        if n in needed and n not in env:
            env[n] = ours.node_copy(n, env.__getitem__)
    ours.output(map_arg(options, env.__getitem__))
    return GraphModule(graph, ours)


def example_value(n: Node) -> Any:
    """Return Dynamo's example of a node's value."""
    return n.meta.get("example_value")


def nodes_behind(nodes: Sequence[Node], stop: Sequence[Node]) -> set[Node]:
    """Return these nodes and all that they depend on, up to ``stop``."""
    found: set[Node] = set()
    queue = list(nodes)
    while queue:
        n = queue.pop()
        if n not in found and n not in stop:
            found.add(n)
            queue += n.all_input_nodes
    return found
