"""What autograd would hide from a recording, written down: ``autograd.Function``, ``autograd.grad``, ``.backward()``, hooks, checkpoints.

These entry points of torch are redirected while a recording is under way in the calling thread, and do what they always did otherwise. The code object of each function is
exchanged, not its name, so that names bound earlier (``sq = Sq.apply``) come along.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx

from .. import debug
from ..debug import at
from ..errors import CaptureError
from ..graph import Program
from ..trace.tracer import HOOKS, Trace, Traced, current, recording
from .steps import Begin, CustomDerivative, End, GradStep

BEGIN = Begin()

#: the functions as torch defines them
ORIGINALS: dict[str, Callable] = {}


def install() -> None:
    """Redirect torch's entry points, once."""
    if ORIGINALS:
        return
    apply = Function.apply.__func__  # type: ignore[attr-defined]
    redirect("apply", apply, apply_function, _ApplyTemplate.__dict__["apply"].__func__)
    redirect("grad", torch.autograd.grad, autograd_grad, _grad_template)
    redirect("backward", torch.autograd.backward, autograd_backward, _backward_template)
    ORIGINALS["checkpoint"] = torch_checkpoint._checkpoint_without_reentrant_generator
    torch_checkpoint._checkpoint_without_reentrant_generator = checkpoint_region
    HOOKS["register_hook"] = register_hook
    enter = torch.autograd.graph.saved_tensors_hooks.__enter__

    @functools.wraps(enter)
    def refuse(self: Any) -> Any:
        if current() is not None:
            raise CaptureError(f"saved_tensors_hooks inside a captured function are not supported{at(debug.user_line())}")
        return enter(self)

    torch.autograd.graph.saved_tensors_hooks.__enter__ = refuse  # type: ignore[method-assign]


def redirect(name: str, f: types.FunctionType, ours: Callable, template: types.FunctionType) -> None:
    """Exchange the code of ``f`` for the template's, which asks whether a recording is under way."""
    original = types.FunctionType(f.__code__, f.__globals__, f.__name__, f.__defaults__, f.__closure__)
    original.__kwdefaults__ = f.__kwdefaults__
    ORIGINALS[name] = original
    f.__globals__["_aotfunc_recording"] = current
    f.__globals__[f"_aotfunc_{name}"] = ours
    f.__globals__[f"_torch_{name}"] = original
    f.__code__ = template.__code__


class _ApplyTemplate:
    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        __class__  # noqa: B018 - the original has this one free variable
        if _aotfunc_recording() is None:  # type: ignore[name-defined] # noqa: F821
            return _torch_apply(cls, *args, **kwargs)  # type: ignore[name-defined] # noqa: F821
        return _aotfunc_apply(cls, *args, **kwargs)  # type: ignore[name-defined] # noqa: F821


def _grad_template(  # type: ignore[no-untyped-def]
    outputs,
    inputs,
    grad_outputs=None,
    retain_graph=None,
    create_graph=False,
    only_inputs=True,
    allow_unused=None,
    is_grads_batched=False,
    materialize_grads=False,
):
    f = _torch_grad if _aotfunc_recording() is None else _aotfunc_grad  # type: ignore[name-defined] # noqa: F821
    return f(
        outputs,
        inputs,
        grad_outputs,
        retain_graph,
        create_graph,
        only_inputs,
        allow_unused,
        is_grads_batched,
        materialize_grads,
    )


def _backward_template(  # type: ignore[no-untyped-def]
    tensors, grad_tensors=None, retain_graph=None, create_graph=False, grad_variables=None, inputs=None
):
    f = _torch_backward if _aotfunc_recording() is None else _aotfunc_backward  # type: ignore[name-defined] # noqa: F821
    return f(tensors, grad_tensors, retain_graph, create_graph, grad_variables, inputs)


# ----- autograd.grad and .backward() ---------------------------------------------------------------------------------


def autograd_grad(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    only_inputs: bool = True,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> Any:
    """``torch.autograd.grad`` inside a recording: one recorded step."""
    trace = current()
    assert trace is not None
    outs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    keys = list(inputs) if isinstance(inputs, dict) else None
    ins = [inputs] if isinstance(inputs, Tensor) else list(inputs.values() if keys is not None else inputs)
    if not any(isinstance(t, Traced) for t in (*outs, *ins)):
        return ORIGINALS["grad"](
            outputs, inputs, grad_outputs, retain_graph, create_graph, only_inputs, allow_unused, is_grads_batched, materialize_grads
        )
    if is_grads_batched:
        raise CaptureError(f"autograd.grad(is_grads_batched=True) is not captured; use vmap{at(debug.user_line())}")
    gs = [None] * len(outs) if grad_outputs is None else [grad_outputs] if isinstance(grad_outputs, Tensor) else list(grad_outputs)
    for o, g in zip(outs, gs, strict=True):
        if g is None and o.numel() != 1:
            raise RuntimeError("grad can be implicitly created only for scalar outputs")
    lenient = bool(allow_unused) or materialize_grads
    used = [not lenient or reaches(trace, x, outs) for x in ins]
    wanted = [x for x, yes in zip(ins, used, strict=True) if yes]
    found: list = []
    if wanted:
        sigs = [trace.ref_of(x)[1] for x in wanted]
        step = interned(GradStep, tuple(sigs), len(outs), tuple(g is not None for g in gs), bool(create_graph))
        found = list(trace.record(step, [*outs, *(g for g in gs if g is not None), *wanted]))
    results = [found.pop(0) if yes else torch.zeros_like(x) if materialize_grads else None for x, yes in zip(ins, used, strict=True)]
    return dict(zip(keys, results, strict=True)) if keys is not None else tuple(results)


_steps: dict[tuple, Any] = {}


def interned(cls: Any, *args: Any) -> Any:
    """One step object for equal arguments: recordings are keyed by the identity of their steps."""
    key = (cls, *args)
    step = _steps.get(key)
    if step is None:
        step = _steps[key] = cls(*args)
    return step


def reaches(trace: Trace, x: Tensor, outs: list[Tensor]) -> bool:
    """Whether an output was computed from ``x``."""
    kept, trace.leaves = trace.leaves, {trace.ref_of(x)[0]: True}
    lifted, trace.lifted = trace.lifted, [t.detach() if t.__class__ is not Traced and t.requires_grad else t for t in trace.lifted]
    try:
        return any(isinstance(o, Traced) and o.tracer is trace and trace.requires_grad(o) for o in outs)
    finally:
        trace.leaves, trace.lifted = kept, lifted


def autograd_backward(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    grad_variables: Any = None,
    inputs: Any = None,
) -> None:
    """``.backward()`` inside a recording: gradients of the leaves that were made inside."""
    trace = current()
    assert trace is not None
    outs = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    gs = [grad_tensors] if grad_tensors is None or isinstance(grad_tensors, Tensor) else list(grad_tensors)
    if inputs is None:
        for t in trace.lifted:
            if t.requires_grad and t.is_leaf and t.__class__ is not Traced and reaches(trace, t, outs):
                raise CaptureError(
                    "`.backward()` inside a captured function would write the .grad of a tensor from outside"
                    f"{at(debug.user_line())}; return the gradient instead: torch.autograd.grad(...), or grad(f)"
                )
        leaves = [t for t in trace.leaf_tensors if trace.leaves.get(t.ref)]
        leaves = [t for t in (*leaves, *trace.retained) if reaches(trace, t, outs)]
    else:
        leaves = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    if not leaves:
        raise RuntimeError("element 0 of tensors does not require grad and does not have a grad_fn")
    for x, g in zip(leaves, autograd_grad(outs, leaves, gs, create_graph=create_graph), strict=True):
        x.grad = g if x.grad is None else x.grad + g


# ----- checkpoints and hooks -----------------------------------------------------------------------------------------

def checkpoint_region(fn: Any, *args: Any, **kwargs: Any) -> Any:
    """Non-reentrant checkpointing inside a recording: what runs meanwhile is tagged, to be computed again in the backward."""
    trace = current()
    if trace is None:
        yield from ORIGINALS["checkpoint"](fn, *args, **kwargs)
        return
    outer = trace.region
    trace.region = trace.regions = trace.regions + 1
    try:
        yield
    finally:
        trace.region = outer


def register_hook(t: Traced, hook: Callable) -> Any:
    """A tensor hook: from here on ``t`` is a value whose cotangent passes through the hook."""

    def backward(ctx: Any, g: Tensor) -> Tensor:
        changed = hook(g)
        return g if changed is None else changed

    hooked = call_function(
        "hook", [t], lambda ctx: t.view_as(t), Context(), lambda ctx, *g: backward(ctx, *g), None, None
    )
    t.ref = hooked.ref
    return _Handle()


class _Handle:
    def remove(self) -> None:
        raise CaptureError(f"a tensor hook cannot be removed inside a captured function{at(debug.user_line())}")


# ----- autograd.Function ---------------------------------------------------------------------------------------------


class Context(FunctionCtx):
    """What ``ctx`` is inside a recording."""

    saved: tuple = ()
    saved_for_forward: tuple = ()
    to_save: tuple = ()
    needs_input_grad: tuple = ()
    materialize_grads = True
    non_differentiable: tuple = ()
    dirty_tensors: tuple = ()

    @property
    def saved_tensors(self) -> tuple:
        return tuple(self.to_save) if self.to_save else tuple(self.saved_for_forward)

    def set_materialize_grads(self, value: bool) -> None:
        self.materialize_grads = value


def apply_function(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """``Function.apply`` inside a recording: forward is recorded, and marked as having the derivative that the Function says."""
    if cls is torch_checkpoint.CheckpointFunction:
        trace = current()
        assert trace is not None
        outer = trace.region
        trace.region = trace.regions = trace.regions + 1
        try:
            return args[0](*args[2:])
        finally:
            trace.region = outer
    new_style = cls.setup_context is not Function.setup_context
    if kwargs or new_style:
        bound = inspect.signature(cls.forward).bind(*(args if new_style else (None, *args)), **kwargs)
        bound.apply_defaults()
        args = bound.args if new_style else bound.args[1:]
    ctx = Context()
    ctx.needs_input_grad = tuple(isinstance(a, Tensor) and (a.is_floating_point() or a.is_complex()) for a in args)

    def forward(ctx: Any) -> Any:
        if not new_style:
            return cls.forward(ctx, *args)
        output = cls.forward(*args)
        cls.setup_context(ctx, args, output)
        return output

    backward = cls.backward if cls.backward is not Function.backward else cls.vjp
    if backward is Function.backward or backward is Function.vjp:
        backward = None
    jvp = cls.jvp if cls.jvp is not Function.jvp else None
    batching = None
    if cls.vmap is not Function.vmap:
        batching = custom_batching(cls, args)
    return call_function(cls.__name__, args, forward, ctx, backward, jvp, batching)


def call_function(
    name: str, args: Any, forward: Callable, ctx: Any, backward: Any, jvp: Any, batching: Any
) -> Any:
    """Record one Function call between a Begin and an End."""
    trace = current()
    assert trace is not None
    inputs = [a for a in args if isinstance(a, Tensor)]
    trace.record(BEGIN, inputs)
    with torch.no_grad():
        output = forward(ctx)
    single = not isinstance(output, tuple | list)
    outs = [output] if single else list(output)
    places = [i for i, o in enumerate(outs) if isinstance(o, Tensor)]
    raw = [outs[i] for i in places]
    vals = tuple(trace.ref_of(o)[1] for o in raw)
    frozen = {id(t) for t in ctx.non_differentiable}
    derivative, residuals = custom_derivative(trace, name, args, ctx, raw, vals, backward, jvp, batching)
    results = list(trace.record(interned(End, derivative), [*raw, *residuals]))
    dirty = {id(t): t for t in ctx.dirty_tensors or ()}
    for i, o, new in zip(places, raw, results, strict=True):
        if id(o) in dirty:
            dirty[id(o)].copy_(new)
            outs[i] = dirty[id(o)]
        else:
            outs[i] = new.detach() if id(o) in frozen else new
    return outs[0] if single else tuple(outs)


def custom_derivative(
    trace: Trace, name: str, args: Any, ctx: Any, raw: list, vals: tuple, backward: Any, jvp: Any, batching: Any
) -> tuple[CustomDerivative, list[Tensor]]:
    """The Function's backward (and jvp) recorded as programs of cotangents (tangents) and residuals."""
    inputs = [a for a in args if isinstance(a, Tensor)]
    residuals: list[Tensor] = []

    def program(rule: Callable, sigs: list, finish: Callable) -> Any:
        from .capture import Recording

        inner = Trace(trace.why_not)
        for sig in sigs:
            t = inner.new(sig)
            inner.inputs.append(t)
            inner.leaves[t.ref] = True
        inner.why_not = "the derivative of an autograd.Function is recorded without values"
        try:
            with recording(inner):
                result = finish(rule(ctx, *inner.inputs))
                rec = Recording(inner, result, lambda: ())
        except NotImplementedError as e:
            return CaptureError(f"{name} has no derivative: {e}")
        except CaptureError as e:
            return e
        return _with_gaps(rec), inner.lifted

    once = False
    if backward is not None and getattr(backward, "__wrapped__", None) is not None and backward.__code__ is _ONCE:
        backward, once = backward.__wrapped__, True

    def gradients(result: Any) -> list:
        grads = list(result) if isinstance(result, tuple | list) else [result]
        grads += [None] * (len(args) - len(grads))
        kept = [_summed(g, a) for g, a in zip(grads, args, strict=False) if isinstance(a, Tensor)]
        return [torch.ops.aotfunc.once(g) if once and g is not None else g for g in kept]

    diff_vals = [v for v in vals if v.differentiable]
    back: Any = CaptureError(f"{name} has no backward")
    lifted: list = []
    if backward is not None:
        slots = [v.differentiable for v in vals]

        def rule(ctx: Any, *cts: Tensor) -> Any:
            it = iter(cts)
            return backward(ctx, *[next(it) if yes else None for yes in slots])

        made = program(rule, [_dense(v) for v in diff_vals], gradients)
        back, lifted = made if isinstance(made, tuple) else (made, [])
    residuals += lifted
    fore = None
    if jvp is not None:
        floats = [isinstance(a, Tensor) and (a.is_floating_point() or a.is_complex()) for a in args]

        def push(ctx: Any, *ts: Tensor) -> Any:
            it = iter(ts)
            return jvp(ctx, *[next(it) if yes else None for yes in floats])

        sigs = [trace.ref_of(a)[1] for a, yes in zip(args, floats, strict=True) if yes]
        ctx_saved, ctx.to_save = ctx.to_save, ctx.saved_for_forward or ctx.to_save
        made = program(push, sigs, lambda r: list(r) if isinstance(r, tuple | list) else [r])
        ctx.to_save = ctx_saved
        if isinstance(made, tuple):
            fore, more = made
            fore = _shifted(fore, len(residuals), len(more))
            back = _shifted(back, 0, len(residuals), len(more)) if isinstance(back, Program) else back
            residuals += more
    index = {trace.ref_of(o)[0]: k for k, o in enumerate(raw)}
    saved = tuple(index.get(trace.ref_of(r)[0]) for r in residuals)
    d = interned_derivative(name, len(inputs), vals, back, fore, saved, batching)
    return d, residuals


def interned_derivative(name: str, n: int, vals: tuple, back: Any, fore: Any, saved: tuple, batching: Any) -> CustomDerivative:
    if isinstance(back, Exception) or batching is not None:
        return CustomDerivative(name, n, vals, back, fore, saved, batching)
    return interned(CustomDerivative, name, n, vals, back, fore, saved, None)


def _with_gaps(rec: Any) -> Program:
    """The recording's program with a result for each leaf, None where the leaf is None."""
    base = rec.program()
    if len(rec.tensors) == len(rec.leaves):
        return base
    program = base.cache.get(("gaps", tuple(rec.tensors), len(rec.leaves)))
    if program is None:
        from ..graph import output_node
        from .walk import builder

        b = builder()
        inputs = [b.placeholder(p.name, p.meta["val"]) for p in base.placeholders]
        outs = b.splice(base.graph, inputs, output_node(base.graph).args[0])
        full: list = [None] * len(rec.leaves)
        for i, o in zip(rec.tensors, outs, strict=False):
            full[i] = o
        program = Program(b.finish(full), base.n_inputs, len(full), (), "backward")
        base.cache[("gaps", tuple(rec.tensors), len(rec.leaves))] = program
    return program


def _shifted(program: Program, before: int, mine: int, after: int = 0) -> Program:
    """The program with unused residuals before and after its own, so that backward and forward share one list."""
    if not before and not after:
        return program
    key = ("shifted", before, mine, after)
    made = program.cache.get(key)
    if made is None:
        from ..graph import output_node
        from ..trace.shapes import make_sig
        from .walk import builder

        nothing = make_sig((), (), torch.float32, torch.device("cpu"))
        b = builder()
        own = program.placeholders
        inputs = [b.placeholder(p.name, p.meta["val"]) for p in own[: program.n_inputs]]
        for _ in range(before):
            b.placeholder("unused", nothing)
        inputs += [b.placeholder(p.name, p.meta["val"]) for p in own[program.n_inputs :]]
        for _ in range(after):
            b.placeholder("unused", nothing)
        outs = b.splice(program.graph, inputs, output_node(program.graph).args[0])
        made = program.cache[key] = Program(b.finish(outs), program.n_inputs, program.n_outputs, (), program.name)
    return made


def _summed(g: Any, a: Tensor) -> Any:
    """A gradient as autograd takes it: summed to the argument's shape, of its dtype; None for integers."""
    if g is None or not (a.is_floating_point() or a.is_complex()):
        return None
    if g.shape != a.shape:
        g = g.sum_to_size(a.shape)
    if g.dtype != a.dtype:
        g = (torch.real(g) if g.is_complex() and not a.is_complex() else g).to(a.dtype)
    return g


def _dense(sig: Any) -> Any:
    from .vjp import dense

    return dense(sig)


def custom_batching(cls: Any, args: Any) -> Callable:
    """The ``vmap`` staticmethod of a Function as the batching rule of its node."""
    places = [i for i, a in enumerate(args) if isinstance(a, Tensor)]

    def batching(walk: Any, n: Any) -> tuple[Any, Any]:
        from .walk import traced

        inputs, _, _ = n.target.parts(n)
        flags = [walk.has(x) for x in inputs]
        dims: list = [None] * len(args)
        for i, yes in zip(places, flags, strict=True):
            dims[i] = 0 if yes else None
        info = types.SimpleNamespace(batch_size=walk.size, randomness=walk.randomness)

        def body(*tensors: Tensor) -> Any:
            full = [None if isinstance(a, Tensor) else a for a in args]
            for i, t in zip(places, tensors, strict=True):
                full[i] = t
            outs, out_dims = cls.vmap(info, tuple(dims), *full)
            single = isinstance(outs, Tensor)
            outs, out_dims = ([outs], [out_dims]) if single else (list(outs), list(out_dims))
            return [
                o.movedim(d, 0) if d is not None else o.expand(walk.size, *o.shape)
                for o, d in zip(outs, out_dims, strict=True)
                if isinstance(o, Tensor)
            ]

        outs = traced(body)(walk.b, *[walk.env[x] for x in inputs])
        return outs, [True] * len(outs)

    return batching


@torch.autograd.function.once_differentiable  # type: ignore[type-var]
def _once(ctx: Any, g: Any) -> Any:
    return g


_ONCE = _once.__code__
