"""Compiled functions: captured once per signature, partitioned, compiled, and differentiable to any order.

A :class:`Compiled` function looks its entry up by the signature of the call (:mod:`.guards`). An entry carries its program; inside a capture a call of it is
one node that transforms rewrite, outside it runs behind one ``torch.autograd.Function``: forward half, saved residuals, backward half. Where the backward is itself to be differentiated
(``create_graph=True``) it is the gradient program of the inputs that runs, compiled the same way and differentiable in turn.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from . import backends
from .backends.eager import compile_graph
from .debug import at, outside_dynamo, user_line
from .errors import ArgumentError
from .graph import Program, output_node
from .guards import closure_key, environment_key, leaf_key
from .module import graph_module
from .partition import default_partition, min_cut_rematerialization_partition
from .trace.emit import carried, paused_gc, remap, remap_dict
from .trace.shapes import make_sig
from .trace.tracer import Traced, current, storage_id
from .trace.tree import Arguments, unflatten
from .transforms.capture import Recording, parameter_names, record
from .transforms.decompose import decomposed
from .transforms.fresh import fresh
from .transforms.lower import lowered
from .transforms.run import execute, run_eager, write_back
from .transforms.steps import CompiledCall, CompiledStep
from .transforms.vjp import differentiable, vjp
from .transforms.walk import builder

Compiler = Callable[[fx.GraphModule, list[Tensor]], Callable]
Partition = Callable[..., tuple[fx.GraphModule, fx.GraphModule]]


class Entry:
    """What was captured for one signature."""

    def __init__(self, rec: Recording, call: CompiledCall) -> None:
        self.rec, self.call = rec, call
        self.step = CompiledStep(call, run_eager)
        # by reference: an optimizer's update is seen. Values of an outer recording are only good for that one.
        self.closed = list(rec.closed_over)
        self.sharing = sharing([*rec.trace.origins, *self.closed]) if rec.trace.mutates else None
        self.reusable = not any(t.__class__ is Traced for t in self.closed)
        rec.trace.origins = []
        rec.trace.concrete_inputs = None


def sharing(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """For each tensor, the number of its storage among them."""
    numbers: dict[Any, int] = {}
    return tuple([numbers.setdefault(storage_id(t), len(numbers)) for t in tensors])


class Compiled:
    """A function compiled by ``forward_compiler`` and ``backward_compiler``; see :func:`jit` and :func:`aot_function`."""

    def __init__(
        self,
        f: Callable,
        forward_compiler: Compiler,
        backward_compiler: Compiler,
        partition: Partition,
        decompositions: dict | None,
        static_argnums: int | Sequence[int] | None,
        name: str,
    ) -> None:
        functools.update_wrapper(self, f)
        self.f, self.name = f, name
        self.forward_compiler, self.backward_compiler = forward_compiler, backward_compiler
        self.partition, self.decompositions = partition, decompositions
        self.static = (static_argnums,) if isinstance(static_argnums, int) else tuple(static_argnums or ())
        self.entries: dict[tuple, Entry] = {}
        self.closure = closure_key(f)
        self.warned = False

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    # ----- calling ----------------------------------------------------------------------------------------------------

    @outside_dynamo
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = Arguments(args, kwargs)
        key = (*[leaf_key(x) for x in arguments.leaves], arguments.key, self.closure(), environment_key())
        try:
            entry = self.entries.get(key)
        except TypeError as e:
            raise ArgumentError(
                f"{self.name}: a Python argument is not hashable ({e}); pass it as a tensor, or as a tuple"
            ) from None
        tensors = [x for x in arguments.leaves if isinstance(x, Tensor)]
        if entry is not None and entry.sharing is not None and entry.sharing != sharing([*tensors, *entry.closed]):
            # what a write reaches depends on which arguments share memory
            key = (*key, sharing([*tensors, *entry.closed]))
            entry = self.entries.get(key)
        if entry is None:
            entry = self.capture(arguments, args, kwargs)
            if entry.reusable:
                self.entries[key] = entry
                self.check_growth(arguments)
        tensors += entry.closed
        trace = current()
        outs = trace.record(entry.step, tensors) if trace is not None else run(entry.call, tensors)
        rec = entry.rec
        leaves = list(rec.leaves)
        for i, t in zip(rec.tensors, outs, strict=True):
            leaves[i] = t
        return unflatten(leaves, rec.spec)

    def capture(self, arguments: Arguments, args: tuple, kwargs: dict) -> Entry:
        rec = record(
            self.f,
            arguments.leaves,
            arguments.rebuilt,
            why_not=f"{self.name} captures the function once for all values",
            constants=False,
            name_of=parameter_names(self.f, arguments),
        )
        program = fresh(rec.program(), rec.aliases)
        if self.decompositions:
            program = decomposed(program, self.decompositions)
        whole = Program(program.graph, len(program.placeholders), program.n_outputs, program.mutated, self.name)
        call = CompiledCall(whole, self.compile_forward, self.split, self.name)
        for i in rec.tensors:  # keep the structure, not the traced values
            rec.leaves[i] = None
        return Entry(rec, call)

    def check_growth(self, arguments: Arguments) -> None:
        if len(self.entries) >= 64 and not self.warned:
            self.warned = True
            changing = [
                f"leaf {i}"
                for i, x in enumerate(arguments.leaves)
                if not isinstance(x, Tensor) and isinstance(x, int | float)
            ]
            torch._C._log_api_usage_once("aotfunc.recompile")
            import warnings

            warnings.warn(
                f"{self.name} of {getattr(self.f, '__name__', self.f)} has been captured {len(self.entries)} times{at(user_line())}; "
                + (
                    f"Python numbers among its arguments ({', '.join(changing)}) specialise it: pass them as tensors"
                    if changing
                    else "its arguments keep changing shape"
                ),
                stacklevel=3,
            )

    # ----- compiling --------------------------------------------------------------------------------------------------

    def compile_forward(self, program: Program, tensors: Sequence[Tensor]) -> Callable:
        return compiled_by(self.forward_compiler, program, tensors)

    def compile_backward(self, program: Program, tensors: Sequence[Tensor]) -> Callable:
        return compiled_by(self.backward_compiler, program, tensors)

    def split(self, joint: Program, n_primals: int, n_early: int) -> tuple[CompiledCall, CompiledCall]:
        """The two halves of a joint program ``(primals, cotangents) -> (n_early results, gradients)``."""
        forward, backward = partitioned(self.partition, joint, n_primals, n_early)
        return (
            CompiledCall(forward, self.compile_forward, self.split, f"{self.name}_forward"),
            CompiledCall(backward, self.compile_backward, self.split, f"{self.name}_backward"),
        )


def compiled_by(compiler: Compiler, program: Program, tensors: Sequence[Tensor]) -> Callable:
    """Hand the program to a compiler as a GraphModule with example inputs."""
    if compiler is backends.lookup("eager"):
        return compile_graph(lowered(program, calls=True).graph)
    table = getattr(compiler, "decompositions", None)
    if table is not None:
        program = decomposed(program, table())
    gm = graph_module(program, program.name or "Graph")
    fn = compiler(gm, [t.detach() for t in tensors])
    boxed = getattr(fn, "_boxed_call", False)

    def call(*args: Tensor) -> Sequence:
        outs = fn(list(args)) if boxed else fn(*args)
        return outs if isinstance(outs, list | tuple) else (outs,)

    return call


def partitioned(partition: Partition, joint: Program, n_primals: int, n_early: int) -> tuple[Program, Program]:
    """Let a functorch partition function cut the joint program; its two modules as programs."""
    gm = graph_module(joint, "joint", lower=True)
    for n, p in zip([n for n in gm.graph.nodes if n.op == "placeholder"], joint.placeholders, strict=True):
        n.meta["role"] = p.meta.get("role") if p.meta.get("role") in ("param", "tangent") else "primal"
    inputs = [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"]
    fw, bw = partition(gm, inputs, num_fwd_outputs=n_early)
    forward, backward = imported(fw.graph, n_primals), imported(bw.graph, None)
    return forward, backward


def imported(graph: fx.Graph, n_inputs: int | None) -> Program:
    """A graph of somebody else's as a program: its metadata becomes signatures."""
    with paused_gc():
        b = builder()
        env: dict[Node, Any] = {}
        count = 0
        for n in graph.nodes:
            if n.op == "placeholder":
                env[n] = b.placeholder(n.name, sig_from(n.meta["val"]), role=n.meta.get("role"))
                count += 1
            elif n.op == "call_function":
                b.meta = carried(n)
                env[n] = b.node(n.target, remap(n.args, env), remap_dict(n.kwargs, env), sig_from(n.meta["val"]))
        outs = [remap(o, env) for o in output_node(graph).args[0]]
        return Program(b.finish(outs), count, len(outs))


def sig_from(val: Any) -> Any:
    if isinstance(val, Tensor):
        return make_sig(tuple(val.shape), tuple(val.stride()), val.dtype, val.device, val.storage_offset())
    return tuple(sig_from(v) for v in val) if isinstance(val, list | tuple) else val


# ----- running --------------------------------------------------------------------------------------------------------


def run(call: CompiledCall, tensors: Sequence[Tensor]) -> Sequence:
    """The results of a compiled call on real tensors, written inputs updated, differentiable if an input requires grad."""
    program = call.program
    if torch._C._functorch.peek_interpreter_stack() is not None:  # inside torch.func's transforms: theirs differentiate
        return execute(program, tensors)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        outs = Differentiated.apply(call, *tensors)
    else:
        outs = call(*tensors)
    if program.mutated:
        write_back(program, tensors, outs)
    return outs[: program.n_outputs]


class Differentiated(torch.autograd.Function):
    """A compiled call under autograd."""

    @staticmethod
    def forward(ctx: Any, call: CompiledCall, *tensors: Tensor) -> tuple:  # type: ignore[override]
        program = call.program
        wrt = tuple(i for i, t in enumerate(tensors) if t.requires_grad and (t.is_floating_point() or t.is_complex()))
        count = program.n_outputs + len(program.mutated)
        halves = call_halves(call, wrt)
        outs = halves[0](*tensors)
        results, residuals = outs[:count], outs[count:]
        ctx.call, ctx.wrt, ctx.halves, ctx.count = call, wrt, halves, len(tensors)
        kept = [r if isinstance(r, Tensor) else None for r in residuals]
        ctx.numbers = [None if isinstance(r, Tensor) else r for r in residuals]
        ctx.save_for_backward(*tensors, *kept)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *[o for o in results if isinstance(o, Tensor) and not (o.is_floating_point() or o.is_complex())]
        )
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *cts: Tensor | None) -> tuple:
        saved = ctx.saved_tensors
        tensors, residuals = saved[: ctx.count], list(saved[ctx.count :])
        result: list = [None] * (ctx.count + 1)
        vals = all_floating(ctx.call.program)
        if torch.is_grad_enabled():
            have = tuple(yes and c is not None for yes, c in zip(vals, cts, strict=True))
            gradient = gradient_call(ctx.call, ctx.wrt, have)
            grads = run(gradient, [*tensors, *(c.contiguous() for c, yes in zip(cts, have, strict=True) if yes)])
        else:
            residuals = [n if r is None else r for r, n in zip(residuals, ctx.numbers, strict=True)]
            filled = [
                zeros_like_val(v) if c is None else c.contiguous()
                for c, v, yes in zip(cts, whole_vals(ctx.call.program), vals, strict=True)
                if yes
            ]
            grads = ctx.halves[1](*residuals, *filled)
        for i, g in zip(ctx.wrt, grads, strict=True):
            result[i + 1] = g
        return tuple(result)


def whole(program: Program) -> Program:
    """The program with the new values of written inputs among its results."""
    made = program.cache.get("whole")
    if made is None:
        outs = program.n_outputs + len(program.mutated)
        made = program.cache["whole"] = Program(program.graph, len(program.placeholders), outs, (), program.name)
    return made


def whole_vals(program: Program) -> list:
    return whole(program).vals


def all_floating(program: Program) -> list[bool]:
    return [differentiable(v) for v in whole_vals(program)]


def zeros_like_val(val: Any) -> Tensor:
    return torch.zeros(val.shape, dtype=val.dtype, device=val.device)


def call_halves(call: CompiledCall, wrt: tuple[int, ...]) -> tuple[CompiledCall, CompiledCall]:
    """Forward and backward half for gradients of ``wrt``."""
    cache = call.program.cache
    halves = cache.get(("halves", wrt))
    if halves is None:
        base = whole(call.program)
        joint = vjp(base, wrt, recompute=False)
        halves = cache[("halves", wrt)] = call.split(joint, base.n_inputs, base.n_outputs)
    return halves


def gradient_call(call: CompiledCall, wrt: tuple[int, ...], have: tuple[bool, ...]) -> CompiledCall:
    """``(inputs, cotangents) -> gradients`` as one compiled call."""
    return call.derived(("gradient", wrt, have), lambda: vjp(whole(call.program), wrt, have, keep=()), "gradient")


# ----- the public functions -------------------------------------------------------------------------------------------


def jit(f: Callable, backend: str | Compiler = "eager", static_argnums: int | Sequence[int] | None = None) -> Compiled:
    """``f`` captured once per signature and compiled by ``backend`` (a name, see ``aotfunc.backends``, or a ``compiler(gm, example_inputs)``).

    The signature: tree, shapes, strides, dtypes, devices and requires_grad of the arguments, values of Python arguments, grad and autocast mode, and what ``f``
    reaches directly: its closure, globals that it names, parameters and modes of modules. Closed-over tensors are read by reference. Results are
    differentiable to any order, and transforms of the jitted function stay compiled. ``static_argnums`` is accepted for compatibility: Python
    arguments are always static. Raises CaptureError if ``f`` asks for values.

    >>> jit(lambda x: torch.sin(x) * 2)(torch.zeros(2))
    tensor([0., 0.])
    """
    compiler = backends.lookup(backend)
    return Compiled(f, compiler, compiler, min_cut_rematerialization_partition, None, static_argnums, "jit")


def aot_function(
    fn: Callable,
    fw_compiler: str | Compiler,
    bw_compiler: str | Compiler | None = None,
    partition_fn: Partition = default_partition,
    decompositions: dict | None = None,
    static_argnums: int | Sequence[int] | None = None,
    **_: Any,
) -> Compiled:
    """``fn`` with its forward and backward captured ahead of time, partitioned by ``partition_fn`` and compiled.

    ``fw_compiler`` and ``bw_compiler`` (default: the same) take ``(gm, example_inputs)`` and return a callable, or are names of backends. ``partition_fn(joint_module, joint_inputs, *,
    num_fwd_outputs)`` returns the forward module ``inputs -> (results, residuals)`` and the backward module ``(residuals, cotangents) -> gradients``. Guards and guarantees
    are those of :func:`jit`.

    >>> f = aot_function(lambda x: torch.sin(x), "eager")
    >>> x = torch.zeros(2, requires_grad=True)
    >>> f(x).sum().backward(); x.grad
    tensor([1., 1.])
    """
    forward = backends.lookup(fw_compiler)
    backward = forward if bw_compiler is None else backends.lookup(bw_compiler)
    return Compiled(fn, forward, backward, partition_fn, decompositions, static_argnums, "aot_function")


class CompiledModule(nn.Module):
    """A module whose forward is compiled; parameters and buffers are the original's."""

    def __init__(self, module: nn.Module, compiled: Compiled) -> None:
        super().__init__()
        self.orig_module = module
        self._compiled = compiled

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._compiled(*args, **kwargs)


def aot_module(mod: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """:func:`aot_function` of a module: a module with the same parameters and buffers whose forward is compiled."""
    return CompiledModule(mod, aot_function(mod, *args, **kwargs))
