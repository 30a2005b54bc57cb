"""PyTorch's Inductor as a backend: C++, Triton, and eager kernels for ops it fails on."""

from __future__ import annotations

import operator
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from ..errors import BackendError, BackendWarning
from ..graph import draws, output_node
from ..progress import doing
from ..trace.node_views import storage_root
from .eager import compile_graph
from .formulas import FORMULAS, LOW
from .inductor_steps import compiling
from .results import Results, resolved

aten = torch.ops.aten

#: ops with a factor as a positional argument
ALPHA = (aten.add.Scalar, aten.sub.Scalar, aten.rsub.Scalar)

#: ops that divide integers if their result is an integer
INTEGER_DIVISIONS = (aten.div, aten.floor_divide, aten.remainder, aten.fmod)

#: Inductor's settings, and its table of known ops, belong to the process: one compile at a time
_LOCK = threading.RLock()


def inductor(gm: fx.GraphModule, example_inputs: list) -> InductorGraph:
    """Compile a functional aten graph with Inductor's inner compiler; decompositions are applied
    first.

    Random ops draw eager's numbers. An op that Inductor fails on is called eagerly, and if that
    does not help the whole graph is; in both cases a BackendWarning and the attribute ``eagerly``
    of the result say so. Raises BackendError if Inductor, or the C++ compiler that it needs, is
    not installed."""
    try:
        import torch._inductor.compile_fx
    except ImportError as e:
        raise BackendError(f"the inductor backend needs a torch build with Inductor: {e}") from e
    if (
        not any(t.is_cuda for t in example_inputs if isinstance(t, torch.Tensor))
        and shutil.which("g++") is None
    ):
        raise BackendError("the inductor backend needs a C++ compiler on the CPU: install g++")
    return InductorGraph(gm)


class InductorGraph:
    """A graph compiled by Inductor, callable as the graph is."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.results = Results(gm.graph)
        own = any(n.op == "get_attr" for n in gm.graph.nodes)
        self.eager: Callable = gm.forward if own else compile_graph(gm.graph)
        self.draws = any(n.op == "call_function" and draws(n) for n in gm.graph.nodes)
        self.eagerly: dict[str, str] = {}  # what is run eagerly, and why
        self.repairs: list | None = None  # known after the first call
        self.fn: Callable | None = None
        try:
            self.fn = compiled_by_inductor(gm, self.say)
        except Exception as e:
            self.say("the whole graph", e)

    def say(self, what: str, error: Exception) -> None:
        error = getattr(error, "inner_exception", error)
        why = self.eagerly[what] = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
        warnings.warn(
            f"inductor: {what} is run eagerly, for the compiler says {why}",
            BackendWarning,
            stacklevel=2,
        )

    def __call__(self, *args: Tensor) -> Sequence:
        if self.fn is None:
            return self.eager(*args)
        # a lazy value: its memory does not yet hold it
        if any([a.is_conj() or a.is_neg() for a in args]):
            args = tuple([resolved(a) for a in args])
        first = self.repairs is None
        state = torch.get_rng_state() if first and self.draws else None
        try:
            outs = self.fn(list(args))
            if self.repairs is None:
                self.repairs = self.results.repairs(args, outs)
        except Exception as e:
            if state is not None:
                torch.set_rng_state(state)
            outs = self.eager(*args)  # eager's own error, if it has one
            if first:
                self.fn = None
                self.say("the whole graph", e)
            return outs
        if self.repairs:
            outs = list(outs)
            for k, repair in self.repairs:
                outs[k] = repair(args, outs)
        return outs


def compiled_by_inductor(gm: fx.GraphModule, say: Callable[[str, Exception], None]) -> Callable:
    """Compile a graph by Inductor. Run ops that it fails on eagerly; tell ``say`` of them."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner

    for n in gm.graph.nodes:
        if (
            n.op == "call_function"
            and not isinstance(n.target, OpOverload)
            and n.target is not operator.getitem
        ):
            raise BackendError(f"{n.name} is Python code")
        given = [getattr(gm, n.target)] if n.op == "get_attr" else [*n.args, *n.kwargs.values()]
        # code from the disk cache would draw from a copy
        if any(isinstance(a, torch.Generator) for a in given):
            raise BackendError(f"{n.name} takes a torch.Generator")
    failing: set[Any] = set()
    count = len(output_node(gm.graph).args[0])  # type: ignore[arg-type]
    with settled(gm):
        while True:
            ours = prepared(gm, failing)
            more = len(output_node(ours.graph).args[0]) > count  # type: ignore[arg-type]
            # the key of the disk cache is the code
            marked = any("should_fallback" in n.meta for n in ours.graph.nodes)
            fakes = [n.meta["val"] for n in ours.graph.nodes if n.op == "placeholder"]
            try:
                caches = config.patch(force_disable_caches=True) if marked else nullcontext()
                with caches, compiling():
                    fn = compile_fx_inner(ours, fakes)
                return first_results(fn, count) if more else fn
            except Exception as e:
                named = re.findall(r"target: (\S+)", str(e))
                ops = sorted(ops_of(gm), key=str)
                culprit = next((op for op in ops if str(op) in named), None)
                if culprit is None or culprit in failing:
                    raise
                failing.add(culprit)
                say(str(culprit), e)


@contextmanager
def settled(gm: fx.GraphModule) -> Iterator[None]:
    """Set Inductor's surroundings: random ops left alone, low precision rounded as in eager, and a
    mode of fake tensors with a ShapeEnv, which its disk cache needs."""
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.codegen.cpp import CppKernel
    from torch._inductor.lowering import (
        _maybe_layout_constraints,
        constrain_to_fx_strides,
        fallback_handler,
        lowerings,
    )
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    vals = [v for n in gm.graph.nodes for v in [n.meta.get("val")] if hasattr(v, "fake_mode")]
    mode = vals[0].fake_mode if vals else FakeTensorMode(allow_non_fake_inputs=True)
    if mode.shape_env is None:
        mode.shape_env = ShapeEnv()  # the mode stays static
    with ExitStack() as stack:
        # Inductor's own function for this op draws into a copy, at an undetermined time
        bernoulli = fallback_handler(aten.bernoulli.p, add_to_fallback_set=False)
        drawing = patch.dict(lowerings, {aten.bernoulli.p: bernoulli})
        # the order in memory is that of the numbers
        drawn = {n.target: constrain_to_fx_strides for n in gm.graph.nodes if draws(n)}
        laid = patch.dict(_maybe_layout_constraints, drawn)
        settings = config.patch(fallback_random=True, emulate_precision_casts=True)
        # PyTorch 2.13 keeps draws in order by itself
        chained = torch.__version__ < "2.13" and sum(map(draws, gm.graph.nodes)) > 1
        order = config.patch(post_grad_custom_post_pass=chain_draws) if chained else nullcontext()
        # before PyTorch 2.13 its C++ keeps the exact float32 of a value that is rounded to
        # bfloat16
        rounded = patch.object(CppKernel, "cache_dtype_convert", lambda *args: None)
        around = tracing(TracingContext(mode))
        for context in (_LOCK, settings, order, drawing, laid, rounded, around):
            stack.enter_context(context)
        for context in (V.set_fake_mode(mode), torch.no_grad(), torch._C._DisableAutocast()):
            stack.enter_context(context)
        yield


def prepared(gm: fx.GraphModule, failing: set) -> fx.GraphModule:
    """Return a copy for Inductor, which rewrites its input."""
    from torch._inductor.decomposition import decompositions
    from torch._inductor.lowering import constrain_to_fx_strides, lowerings, make_fallback

    graph = fx.Graph()
    out = graph.output(graph.graph_copy(gm.graph, {}))
    out.args = ([*out.args[0], *unread_draws(graph)],)  # type: ignore[misc]
    # results, and residuals of a backward half, have the strides of the graph
    out.meta["user_visible_output_idxs"] = [
        i for i, o in enumerate(out.args[0]) if isinstance(o, fx.Node)
    ]
    for n in graph.nodes:
        if n.target in (aten.t.default, aten.transpose.int):
            n.target, n.args = aten.permute.default, (n.args[0], swapped(n))
        low = getattr(n.meta.get("val"), "dtype", None) in LOW
        n.meta["low_precision_pointwise_barrier"] = low  # round it in fused kernels, too
        unrounded = low and n.target is aten.nextafter.default
        if n.target in failing or misplaced(n) or unrounded or may_end_the_process(n):
            n.meta["should_fallback"] = True
        if n.kwargs.get("generator", 0) is None:  # some of Inductor's functions take none
            n.kwargs = {k: v for k, v in n.kwargs.items() if k != "generator"}
        if len(n.args) == 3 and n.target in ALPHA:  # some take it by keyword only
            n.args, n.kwargs = n.args[:2], {"alpha": n.args[2]}
    for op in ops_of(gm):
        if op not in lowerings and op in decompositions:  # its decomposition is not for this case
            make_fallback(op, constrain_to_fx_strides, warn=False, override_decomp=True)
    return fx.GraphModule(gm, graph)


def first_results(fn: Callable, count: int) -> Callable:
    """Return the first results of a compiled graph; unread draws follow them."""
    return lambda args: fn(args)[:count]


def unread_draws(graph: fx.Graph) -> Iterator[fx.Node]:
    """List the drawn numbers that no node reads; as results they are still drawn, in order."""
    for n in list(graph.nodes):
        if n.op == "call_function" and draws(n) and not n.users:
            val = n.meta["val"]
            if isinstance(val, tuple | list):
                with graph.inserting_after(n):
                    n = graph.call_function(operator.getitem, (n, 0))
                n.meta["val"] = val[0]
            yield n


def chain_draws(graph: fx.Graph) -> None:
    """Make each draw depend on the one before, so that Inductor does not reorder them."""
    from torch._inductor.fx_passes.control_dependencies import preserve_node_ordering
    from torch.utils._ordered_set import OrderedSet

    after, last = {}, None
    for n in [n for n in graph.nodes if n.op == "call_function" and draws(n)]:
        if last is not None:
            after[n] = OrderedSet([last])
        last = n
        if not isinstance(n.meta["val"], Tensor):
            with graph.inserting_after(n):
                last = graph.call_function(operator.getitem, (n, 0))
            last.meta["val"] = n.meta["val"][0]
    preserve_node_ordering(graph, after)


def misplaced(n: fx.Node) -> bool:
    """Return whether an offset of the node counts from the beginning of an input's storage;
    Inductor would count from the input."""
    if n.target not in (aten.as_strided.default, aten.as_strided_scatter.default):
        return False
    source = storage_root(n.args[0])
    return source.op == "placeholder" and source.meta["val"].storage_offset() != 0


def may_end_the_process(n: fx.Node) -> bool:
    """Return whether a node divides integers: older Inductors do not check for zeros."""
    val = n.meta.get("val")
    return (
        torch.__version__ < "2.13"
        and getattr(n.target, "overloadpacket", None) in INTEGER_DIVISIONS
        and isinstance(val, Tensor)
        and val.device.type == "cpu"
        and not val.dtype.is_floating_point
    )


def swapped(n: fx.Node) -> list[int]:
    """Return a transpose's order as for ``permute``, the only form that Inductor knows."""
    order = list(range(n.args[0].meta["val"].dim()))  # type: ignore[union-attr]
    i, j = n.args[1:] if n.target is aten.transpose.int else (0, -1)
    if order:
        order[i], order[j] = order[j], order[i]
    return order


def ops_of(gm: fx.GraphModule) -> set[OpOverload]:
    return {n.target for n in gm.graph.nodes if isinstance(n.target, OpOverload)}


def decompositions() -> dict:
    """Return the decompositions that Inductor applies before it compiles."""
    with doing(lambda: "import of Inductor"):
        # a decomposition may ask what a lowering can do
        from torch._inductor import decomposition, lowering  # noqa: F401

    random = torch.Tag.nondeterministic_seeded  # another way of drawing gives other numbers
    table = {
        op: f
        for op, f in decomposition.decompositions.items()
        if random not in getattr(op, "tags", ())
    }
    return {**table, **FORMULAS}
