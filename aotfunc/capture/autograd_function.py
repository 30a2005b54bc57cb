"""Record an ``autograd.Function``: its forward as ops, its backward and jvp as programs, and its
results marked as having that derivative
(:class:`~aotfunc.capture.custom_derivative.CustomDerivative`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from ..debug import Line
from ..errors import CaptureError
from ..trace.functionalize import Functionalizer
from ..trace.shapes.sig import floating
from ..trace.traced import current
from . import opaque
from .calls import Step, interned
from .custom_derivative import CustomDerivative
from .deferred import Deferred, calls_late
from .function_rules import Context, recorded_backward, recorded_jvp
from .function_vmap import on_real_batch
from .own_rule import OwnRule
from .tree import Operands


class Begin(Step):
    """The start of a Function. It keeps tensor arguments as ``forward`` gets them."""

    def emit(self, f: Functionalizer, refs: Sequence[int], grad: bool, line: Line | None) -> None:
        f.snapshots.append([f.read(r, True) for r in refs])

    def run(self, values: list[Tensor]) -> list[Tensor]:
        return []


class End(Step):
    """The end of a Function, ``(values, residuals, inputs) -> values`` with its derivative."""

    def __init__(self, derivative: CustomDerivative) -> None:
        super().__init__(derivative.vals)
        self.derivative = derivative

    def emit(self, f: Functionalizer, refs: Sequence[int], grad: bool, line: Line | None) -> None:
        d = self.derivative
        taken = f.snapshots.pop()
        inputs, operands = taken[: d.n_inputs], taken[d.n_inputs :]
        raw = [f.read(r, False) for r in refs[: d.n_outputs]]
        residuals = [f.read(r, True) for r in refs[d.n_outputs : len(refs) - d.n_inputs]]
        vals = tuple([r.meta["val"] for r in raw])  # a write may have changed their strides
        node = f.b.make("call_function", d, (*inputs, *raw, *residuals, *operands), {}, vals)
        self.bind(f, [f.b.item(node, i) for i in range(d.n_outputs)], grad)

    def live(self, given: Sequence[bool]) -> tuple[list[bool], list[bool]]:
        """Return which outputs require grad by the Function's inputs, the step's last ones."""
        d = self.derivative
        return [any(given[len(given) - d.n_inputs :])] * d.n_outputs, []

    def handed(self, refs: Sequence[int]) -> Sequence[int]:
        return refs[len(refs) - self.derivative.n_inputs :]

    def run(self, values: list[Tensor]) -> list[Tensor]:
        return values[: self.derivative.n_outputs]


BEGIN = Begin(())

#: how the Function is called that PyTorch makes for the op by which a collective's result waits
#: when it is read first: its tangent would not wait
_WAITS = "GeneratedBackwardFor__c10d_functional__wrap_tensor_autograd_default"


def apply_function(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """Run ``cls.apply(*args)`` inside a recording, with ``setup_context`` or without."""
    if cls.__name__ == _WAITS:
        return torch.ops._c10d_functional.wait_tensor(args[0])
    new_style = cls.setup_context is not Function.setup_context
    if kwargs or (new_style and not takes_as_given(cls.forward, args)):
        bound = inspect.signature(cls.forward).bind(
            *(args if new_style else (None, *args)), **kwargs
        )
        bound.apply_defaults()
        args = bound.args if new_style else bound.args[1:]
    batching = None
    if cls.vmap is not Function.vmap:
        results = on_real_batch(cls, args)
        if results is not NotImplemented:
            return results
        batching = OwnRule.of(cls, args)
    ctx = Context()
    ctx.needs_input_grad = tuple(map(floating, args))

    def forward(ctx: Any) -> Any:
        if not new_style:
            return cls.forward(ctx, *args)
        try:
            output = cls.forward(*args)
        except (CaptureError, ValueError) as why:
            # the forward asks for unknown values, or writes to numpy's memory
            output = opaque.record(cls, args, batching, why)
        cls.setup_context(ctx, args, output)
        return output

    backward = cls.backward if cls.backward is not Function.backward else cls.vjp
    if backward is Function.vjp:
        backward = None
    else:
        calls_late(backward)
    jvp = cls.jvp if cls.jvp is not Function.jvp else None
    return call_function(cls.__name__, args, forward, ctx, backward, jvp, batching)


def takes_as_given(forward: Any, args: Sequence[Any]) -> bool:
    """Return whether a function has one parameter for each of these arguments and no others."""
    code = getattr(forward, "__code__", None)
    return code is not None and code.co_argcount == len(args)


def call_function(
    name: str,
    args: Any,
    forward: Callable,
    ctx: Context,
    backward: Any,
    jvp: Any = None,
    batching: Any = None,
    kind: type[CustomDerivative] = CustomDerivative,
) -> Any:
    """Record one Function call between a Begin and an End with its derivative."""
    trace = current()
    assert trace is not None
    inputs = [a for a in args if isinstance(a, Tensor)]
    trace.record(BEGIN, inputs if batching is None else [*inputs, *Operands(args).tensors])
    with torch.no_grad():
        output = forward(ctx)
    single = not isinstance(output, tuple | list)
    returned = [output] if single else list(output)
    outs = list(returned)
    places = [i for i, o in enumerate(outs) if isinstance(o, Tensor)]
    raw = [outs[i] for i in places]
    forward_part, kept = recorded_jvp(trace, name, args, ctx, jvp)
    numbers = {trace.ref_of(o)[0]: k for k, o in enumerate(raw)}
    vals = tuple(trace.ref_of(o)[1] for o in raw)

    def end(backwards: tuple, narrow: Any, residuals: Sequence[int]) -> End:
        saved = tuple(map(numbers.get, residuals))
        saved += (None,) * (0 if batching is None else len(batching.operands.places))
        own = residuals[len(refs) :]
        unguarded = tuple(k for k, r in enumerate(own, len(refs)) if r not in guarded)
        fields = (name, len(inputs), vals, backwards, forward_part, saved, batching, narrow)
        parts = [forward_part, *(p for _, p in (*backwards, *(narrow[1] if narrow else ())))]
        unique = any(isinstance(p, Exception) for p in parts)
        make = kind if unique else functools.partial(interned, kind)
        return interned(End, make(*fields, unguarded))

    refs = [trace.ref_of(t)[0] for t in kept]
    guarded = {trace.ref_of(t)[0] for t in ctx.to_save if isinstance(t, Tensor)}
    results = trace.record(end((), None, refs), [*raw, *kept, *inputs])
    waiting = Deferred(trace, name, raw, results, ctx.to_save)
    rules = None if backward is None else recorded_backward(trace, name, args, ctx, outs, backward)
    frozen = {id(t) for t in ctx.non_differentiable}
    dirty = {id(t): t for t in ctx.dirty_tensors or ()}
    for i, o, new in zip(places, raw, results, strict=True):
        if id(o) in dirty:
            dirty[id(o)].copy_(new)
            outs[i] = o
        else:
            outs[i] = new.detach() if id(o) in frozen else new
    # one tensor in several places is one result, as autograd has it: the last; but not an input
    # that is returned as it is
    apart = {id(t) for t in inputs} - dirty.keys()
    last = {id(o): outs[i] for i, o in zip(places, raw, strict=True) if id(o) not in apart}
    outs[:] = [last.get(id(o), new) for o, new in zip(returned, outs, strict=True)]
    if rules is not None:

        def make(d: Deferred) -> tuple[End, list[int]]:
            backwards, narrow = rules(d.refs, residuals := list(refs))
            return end(backwards, narrow, residuals), residuals

        waiting.wait(make)
    return outs[0] if single else tuple(outs)
