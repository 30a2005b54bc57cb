"""The pipeline of a compiled function's programs: decompositions, partition, compilers."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from .. import backends, debug
from ..backends import Backend
from ..backends.auto import automatic, possible, suited
from ..backends.eager import compile_graph
from ..backends.results import is_lazy, listing_results, takes_a_list
from ..capture.blocks import in_blocks
from ..capture.bodies import dense, results_as
from ..capture.calls import CompiledCall
from ..capture.captured import Captured
from ..errors import AotfuncError, BackendError
from ..graph import Program, n_ops, output_node
from ..partition import Cost, Report, min_cut_rematerialization_partition
from ..partition.foreign import cut_by
from ..partition.partitions import as_cost, under
from ..partition.report import report_on
from ..progress import doing
from ..trace.emit import Builder, paused_gc, remap, remap_dict
from ..trace.shapes.instr import Instr
from ..trace.shapes.sig import make_sig
from ..transforms.contractions import reassociated
from ..transforms.decompose import decomposed
from ..transforms.lower import CALLS, EVERYTHING, lowered
from ..transforms.walk import builder
from .aliasing import donated
from .failed import kept_as_script
from .graph_module import graph_module
from .redraw import generator_states, redrawn

Compiler = Callable[[fx.GraphModule, list[Tensor]], Callable]
Partition = Callable[..., tuple[fx.GraphModule, fx.GraphModule]]


class Pipeline:
    """The compilers, partition and decompositions of a compiled function's programs, and whether
    values must be ``exact``, as the ops compute them.

    Compiled code knows its pipeline and not the function, so it does not keep alive what that
    closes over."""

    def __init__(
        self,
        name: str,
        compiler: str | Compiler,
        backward_compiler: str | Compiler | None = None,
        partition: Partition = min_cut_rematerialization_partition,
        decompositions: dict | None = None,
        exact: bool = False,
        inference_compiler: str | Compiler | None = None,
    ) -> None:
        self.name, self.partition, self.decompositions = name, partition, decompositions
        self.exact = exact
        given = compiler, backward_compiler, inference_compiler
        #: of the forward half, of the backward half, and of a program that is not cut in halves
        self.compilers = tuple([compiler if c is None else c for c in given])
        self.backends = tuple(map(backends.lookup, self.compilers))
        #: ops that a backend runs eagerly, by half, and why
        self.eagerly: list[tuple[str, dict[str, str]]] = []

    def __reduce__(self) -> Any:  # ops and backends by their names
        table = self.decompositions and {str(op): body for op, body in self.decompositions.items()}
        forward, backward, whole = self.compilers
        return loaded, (self.name, forward, backward, self.partition, table, self.exact, whole)

    def __deepcopy__(self, memo: dict) -> Pipeline:
        return self

    def __repr__(self) -> str:
        names = dict.fromkeys(
            [
                c if isinstance(c, str) else function_name(backends.lookup(c).compile)
                for c in self.compilers
            ]
        )
        return f"compiled by {' and '.join(names)}"

    def whole(self, program: Program, tensors: Sequence[Tensor]) -> Callable:
        return self.compiled(self.backends[2], program, tensors, "forward")

    def forward(self, program: Program, tensors: Sequence[Tensor]) -> Callable:
        return self.compiled(self.backends[0], program, tensors, "forward")

    def backward(self, program: Program, tensors: Sequence[Tensor]) -> Callable:
        return self.compiled(self.backends[1], program, tensors, "backward")

    def compiled(
        self, backend: Backend, program: Program, tensors: Sequence[Tensor], half: str
    ) -> Callable:
        given, program = donated(program), self.opened(program)
        if self.reassociates(program, backend):
            program = reassociated(in_blocks(lowered(program, EVERYTHING)))
        step = lambda: f"{self.name}, {half} of {n_ops(program.graph):,} ops"
        with naming(f"{self.name}_{half}"), doing(step):
            fn = compiled_by(backend, program, tensors, f"{self.name}: {half}", given)
        if (eagerly := getattr(fn, "eagerly", None)) is not None:
            self.eagerly.append((half, eagerly))
        return fn

    def reassociates(self, program: Program, *compilers: Backend) -> bool:
        """Return whether all of these want, and may have, sums of products in another order."""
        return not self.exact and all([suited(program.graph, b).reassociates for b in compilers])

    @property
    def rounds(self) -> bool:
        """Return whether an input may be rounded to low precision where eager is exact."""
        ours = (backends.AUTO, backends.CPP, backends.EAGER)
        return not all([b in ours for b in self.backends])

    @property
    def rolls(self) -> bool:
        """Return whether loops of small ops run in native code."""
        return {*self.backends} <= {backends.AUTO, backends.CPP} and possible()

    def takes_numbers(self, rec: Captured) -> bool:
        """Return whether Python numbers may be inputs of its programs."""
        if not self.rounds:
            return True
        counted = [
            instr
            for instr, *_ in rec.trace.records
            if instr.__class__ is Instr and instr.number is not None
        ]
        return not any(
            s.dtype in (torch.float16, torch.bfloat16) for instr in counted for s in instr.sigs
        )

    def opened(self, program: Program) -> Program:
        """Apply the user's decompositions, which need not be differentiable: last."""
        return (
            decomposed(program, Declining(self.decompositions)) if self.decompositions else program
        )

    def split(
        self, joint: Program, n_early: int, last: bool = False
    ) -> tuple[CompiledCall, CompiledCall]:
        """Return the two halves of a joint program ``(primals, cotangents) -> (n_early results,
        gradients)``. Unless they are the ``last`` that is made of it they keep their marks of
        intent, for higher derivatives."""
        joint, dissolve = self.prepared(joint, last), EVERYTHING if last else CALLS
        cut = under(self.partition, self.cost(joint))
        with doing(lambda: f"{self.name}, partition of {n_ops(joint.graph):,} ops"):
            early, late = cut_by(cut, to_cut(joint, dissolve), n_early)
            forward, backward = imported(early, "forward"), imported(late, "backward")
        return (
            CompiledCall(forward, self.forward, self.split, f"{self.name}_forward"),
            CompiledCall(backward, self.backward, self.split, f"{self.name}_backward"),
        )

    def report(self, joint: Program, n_early: int) -> Report:
        """Return the report on the cut that :meth:`split` makes of a joint program that is split
        for the last time. It cuts once more, so that no compiled function holds its joint."""
        joint = self.prepared(joint, last=True)
        cost = self.cost(joint)
        early, _ = cut_by(under(self.partition, cost), to_cut(joint, EVERYTHING), n_early)
        return report_on(self.partition, to_cut(joint, EVERYTHING), early, n_early, cost)

    def prepared(self, joint: Program, last: bool) -> Program:
        """Return a joint program as it is cut."""
        joint, dissolve = self.opened(joint), EVERYTHING if last else CALLS
        if self.reassociates(joint, *self.backends[:2]):
            joint = reassociated(lowered(joint, dissolve))
        return joint

    def cost(self, joint: Program) -> Cost:
        """Return what computing again costs on its backend."""
        return as_cost("fused" if suited(joint.graph, self.backends[0]).fuses else "roofline")


class Naming(threading.local):
    """The names of the graphs that this thread is compiling, the innermost last."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.count = 0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.names.append(f"{name}_{self.count}")
        self.count += 1
        try:
            yield
        finally:
            self.names.pop()


naming = Naming()


class Declining(dict):
    """A table of decompositions. One that answers NotImplemented leaves the op as it is."""

    def get(self, op: Any, default: Any = None) -> Any:
        body = super().get(op)
        if body is None:
            return default

        @functools.wraps(body)
        def call(*args: Any, **kwargs: Any) -> Any:
            out = body(*args, **kwargs)
            return op(*args, **kwargs) if out is NotImplemented else out

        return call


def loaded(
    name: str,
    forward: Any,
    backward: Any,
    partition: Partition,
    table: dict | None,
    exact: bool = False,
    whole: Any = None,
) -> Pipeline:
    """Make a pipeline of its pickled parts."""
    ops = table and {
        functools.reduce(getattr, op.split("."), torch.ops): body for op, body in table.items()
    }
    return Pipeline(name, forward, backward, partition, ops, exact, whole)


def compiled_by(
    backend: Backend,
    program: Program,
    tensors: Sequence[Tensor],
    what: str,
    donated: dict[int, int] | None = None,
) -> Callable:
    """Return a function of a list of inputs, which it may empty: the program handed to a backend
    as a GraphModule with example inputs, of which the ``donated`` ones may be written to. Raises
    BackendError, which keeps the graph, where the compiler raises an error that is not ours."""
    if backend == backends.EAGER:
        return compile_graph(lowered(program, EVERYTHING).graph).boxed
    if backend == backends.AUTO:
        return automatic(program.graph, lambda b: compiled_by(b, program, tensors, what, donated))
    table, compiler = backend.table, backend.compile
    if table is not None:
        program = decomposed(lowered(program, EVERYTHING), Declining(table))
    gm = graph_module(program, program.name.replace(" ", "_") or "Graph")
    gm.meta["donated"] = donated or {}
    flow = compile_bodies(gm.graph, backend, what)
    if debug.watched is not None or debug.LEVEL >= 3:
        debug.note(
            f"compiled by {function_name(compiler)}",
            gm.graph,
            lambda: gm.code.strip(),
            n_ops(gm.graph),
        )
    if flow and backend != backends.CPP:  # whose ops know nothing of bodies
        return compile_graph(gm.graph).boxed
    try:
        with redrawn(generator_states(program)):  # it may run the graph on the examples
            fn = compiler(gm, [t.detach() for t in tensors])
    except AotfuncError:
        raise
    except Exception as e:
        try:
            script = f" It is kept as a script in {kept_as_script(gm, backend, e)}"
        except OSError:
            script = ""
        raise BackendError(
            f"{what}: the compiler {function_name(compiler)} failed on {gm._get_name()} "
            f"({len(gm.graph.nodes)} nodes): {type(e).__name__}: {e}\nThe graph is this error's "
            f".graph_module.{script}\n{short_code(gm.code)}",
            graph_module=gm,
        ) from e
    if hasattr(fn, "boxed"):  # of ours: it returns a tuple
        return fn.boxed
    boxed = backend.boxed or takes_a_list(fn)
    whose = f"{what}: the code of {function_name(compiler)}"
    return listing_results(fn, boxed, program.outputs, whose)


def compile_bodies(graph: fx.Graph, backend: Backend, what: str) -> bool:
    """Let control flow run bodies that are compiled as the graph is, each once; whether there is
    any. Compilers that are not ours get the bodies alone."""
    found = [n for n in graph.nodes if hasattr(n.target, "bodies")]

    def compiled(body: Program) -> Callable:
        if backend == backends.CPP:  # which has loops in native code for results that are dense
            body = body.once(dense, lambda: results_as(body, [dense(v) for v in body.vals]))
        return body.once(
            ("compiled", backend.compile),
            lambda: unboxed(compiled_by(backend, body, examples(body), f"{what}, {body.name}")),
        )

    for n in found:
        target: Any = n.target
        bodies = list(map(compiled, target.bodies))
        run: Any = functools.partial(run_bodies, target, bodies)
        if backend == backends.CPP:
            run = backends.flow_runner(target, bodies, run)
        run.__name__, run.flow = target.__name__, (target, bodies)
        n.target = run
    return bool(found)


def unboxed(body: Callable[[list], Sequence]) -> Callable[..., Sequence]:
    """Return a compiled body as a function of its arguments, perhaps ``unchecked``."""

    def call(*args: Tensor) -> Sequence:
        return body([*args])

    call.unchecked = getattr(body, "unchecked", call)  # type: ignore[attr-defined]
    call.steady = getattr(body, "steady", None)  # type: ignore[attr-defined]
    return call


def run_bodies(target: Any, bodies: Sequence[Callable], *tensors: Tensor) -> Sequence:
    """Return control flow's results; kernels' checks are made once for all steps."""
    if all([t.__class__ in (Tensor, torch.nn.Parameter) and not is_lazy(t) for t in tensors]):
        bodies = [body.unchecked for body in bodies]  # type: ignore[attr-defined]
    return target.run(bodies, tensors)


def examples(program: Program) -> list[Tensor]:
    """Return tensors as the program takes them, to compile with."""
    return [
        torch.empty_like(p.meta["val"].proto, device=p.meta["val"].device)
        for p in program.placeholders
    ]


def to_cut(joint: Program, dissolve: frozenset[str]) -> fx.GraphModule:
    """Return a joint program as functorch's partition functions take it."""
    gm = graph_module(joint, "joint", dissolve=dissolve)
    for n, p in zip(
        [n for n in gm.graph.nodes if n.op == "placeholder"], joint.placeholders, strict=True
    ):
        n.meta["role"] = (
            p.meta.get("role") if p.meta.get("role") in ("param", "tangent") else "primal"
        )
    return gm


def imported(gm: fx.GraphModule, name: str) -> Program:
    """Import a foreign graph as a program: its metadata becomes signatures."""
    with paused_gc():
        b = builder()
        inputs = gm.graph.find_nodes(op="placeholder")
        env: dict[Node, Any] = {
            n: b.placeholder(n.name, sig_from(n.meta["val"]), role=n.meta.get("role"))
            for n in inputs
        }
        for n in gm.graph.find_nodes(op="get_attr"):
            env[n] = getattr(gm, n.target)
        b.copy(gm.graph.nodes, env, with_sig)
        outs = remap(output_node(gm.graph).args[0], env)
        return Program(b.finish(outs), len(inputs), len(outs), (), name)


def with_sig(b: Builder, n: Node, env: dict[Node, Any]) -> Any:
    args, kwargs = remap(n.args, env), remap_dict(n.kwargs, env)
    return b.node(n.target, args, kwargs, sig_from(n.meta["val"]))


def sig_from(val: Any) -> Any:
    if isinstance(val, Tensor):
        return make_sig(
            tuple(val.shape), tuple(val.stride()), val.dtype, val.device, val.storage_offset()
        )
    return tuple(sig_from(v) for v in val) if isinstance(val, list | tuple) else val


def function_name(f: Any) -> str:
    return getattr(f, "__qualname__", None) or f"a {type(f).__name__}"


def title(f: Any) -> str:
    """Return the name of a function for messages, with its parameters if they are known."""
    try:
        return f"{function_name(f)}{inspect.signature(f)}"
    except (TypeError, ValueError):
        return function_name(f)


def short_code(code: str) -> str:
    """Return the first lines of a graph's code, for an error."""
    lines = code.strip().splitlines()
    if (more := len(lines) - 40) > 0:
        lines[40:] = [f"… {more} more lines"]
    return "\n".join(lines)
