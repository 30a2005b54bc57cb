"""Record the backward and the jvp of an ``autograd.Function`` as programs.

A rule reads its context; a program takes the context's contents. A rule that is asked for while it
is being recorded, because its derivative calls its own Function, is recorded on demand.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils._pytree import TreeSpec
from torch.utils.weak import WeakIdRef

from ..cache import Cache
from ..errors import CaptureError
from ..trace.marks import once
from ..trace.nested import listed
from ..trace.shapes.instr import SIMPLE
from ..trace.shapes.sig import Sig, floating
from ..trace.traced import Traced, current
from ..trace.tracer import Trace
from ..transforms.vjp import contiguous_sig
from .custom_derivative import Later, RuleProgram
from .recorded_rule import recorded_now, recorded_rule, with_numbers
from .tree import Operands


class Context(FunctionCtx):
    """The ``ctx`` of a Function inside a recording."""

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


def requires_grad(a: Any) -> bool:
    return isinstance(a, Tensor) and a.requires_grad


def recorded_backward(
    trace: Trace, name: str, args: Any, ctx: Context, outs: Sequence[Any], backward: Callable
) -> Callable[[Callable, list[int]], tuple[tuple, Any]]:
    """Return ``record(refs, residuals)``, which records a Function's backward as programs: for all
    inputs, and for those that require grad. It appends the values that they read."""
    wanted = BackwardCall.of(args, backward)
    diff = [floating(o) for o in outs]
    sigs = [contiguous_sig(trace.ref_of(o)[1]) if floating(o) else None for o in outs]
    tensors, floats = [isinstance(a, Tensor) for a in args], tuple(map(floating, args))
    # any value of a derivative may be differentiated
    narrows = sum(floats) > 1 and not trace.of_a_rule
    requiring = tuple(map(requires_grad, args)) if narrows else floats

    def record(refs: Callable, residuals: list[int]) -> tuple[tuple, Any]:
        own = ctx

        def recorded(needed: tuple[bool, ...]) -> tuple:
            nonlocal own
            found = []
            for have in patterns(sum(diff), ctx.materialize_grads):
                own = with_kept(ctx, lambda x: x)  # which a backward may change
                own.needs_input_grad = needed
                present = iter(have or (True,) * sum(diff))
                given = tuple([yes and next(present) for yes in diff])
                here = [sig for sig, yes in zip(sigs, given, strict=True) if sig and yes]
                rule = Gaps(wanted, given)
                found.append(
                    (have, rule_program(name, own, rule, here, backward, refs, residuals))
                )
            return tuple(found)

        narrow = None
        if any(requiring) and requiring != floats:
            mask = tuple(itertools.compress(requiring, tensors))
            narrow = (mask, recorded(requiring))
        every = recorded(floats)
        # another call sees what this one has changed
        ctx.__dict__.update({k: x for k, x in vars(own).items() if not isinstance(x, Tensor)})
        return every, narrow

    return record


def recorded_jvp(
    trace: Trace, name: str, args: Any, ctx: Context, jvp: Any
) -> tuple[RuleProgram | Later | Exception | None, list[Tensor]]:
    """Record a Function's jvp, which autograd calls at once, and the tensors it reads."""
    kept: list[Tensor] = []
    if jvp is None:
        return None, kept
    floats = tuple(map(floating, args))
    sigs = [trace.ref_of(a)[1] for a, yes in zip(args, floats, strict=True) if yes]
    dirty = {*map(id, ctx.dirty_tensors or ())}
    rule = Gaps(JvpCall(jvp, tuple([id(a) in dirty for a in args])), floats)
    own = with_kept(ctx, lambda x: x)
    own.to_save = ctx.saved_for_forward or ctx.to_save
    return rule_program(name, own, rule, sigs, jvp, lambda tensors: tensors, kept), kept


def rule_program(
    name: str,
    ctx: Context,
    rule: Callable,
    sigs: Sequence[Sig],
    calls: Any,
    seen: Callable,
    residuals: list,
) -> Any:
    """Return a rule as a program, or its error; append what it reads to ``residuals``."""
    under_way = recorded_now.of(calls)
    if under_way is not None:
        bare, read = held(ctx)
        known = known_by(bare)
        closed = under_way.closed_over(known is None)
        read += [t for t in closed if not any(t is r for r in read)]
    else:
        own = ctx if known_by(held(ctx)[0]) is not None else with_kept(ctx, twin)
        made = recorded_rule(name, lambda *xs: rule(own, *xs), sigs, calls, saved_values(own))
        if isinstance(made, Exception):
            return made
        program, trace = made
        read = trace.lifted
    found = seen(read)
    if isinstance(found, Exception):
        return found
    first = len(residuals)
    residuals += found
    if under_way is not None:
        return later(name, rule, bare, first, sigs, read, closed, calls, known)
    return RuleProgram(program, first, len(read))


def patterns(count: int, materialize: bool) -> list[tuple[bool, ...] | None]:
    """Return the sets of cotangents that a backward is recorded for: ``[None]`` with materialised
    gradients, where absent ones are zeros; otherwise every set that is not empty."""
    if materialize or count > 4:
        return [None]
    return [p for p in itertools.product((True, False), repeat=count) if any(p)]


@dataclass(frozen=True)
class Gaps:
    """A call of the rule with ``None`` for absent values."""

    rule: Callable
    given: tuple[bool, ...]

    def __call__(self, ctx: Any, *values: Tensor) -> Any:
        feed = iter(values)
        return self.rule(ctx, *[next(feed) if yes else None for yes in self.given])


@dataclass(frozen=True)
class JvpCall:
    """A call of the jvp that returns a list. It writes to the tangents of arguments that the
    forward has ``written``, as autograd demands, and gets copies of these."""

    jvp: Callable
    written: tuple[bool, ...]

    def __call__(self, ctx: Any, *tangents: Any) -> list:
        pairs = zip(tangents, self.written, strict=True)
        given = [t.clone() if yes and t is not None else t for t, yes in pairs]
        return listed(self.jvp(ctx, *given))


@dataclass(frozen=True)
class BackwardCall:
    """A call of the backward that returns one gradient per tensor argument, as autograd takes it:
    of the argument's shape and dtype, None for integers. It runs without autocast."""

    backward: Callable
    places: tuple[int, ...]  # positions of the tensors
    wanted: tuple[tuple[torch.Size, torch.dtype] | None, ...]

    @classmethod
    def of(cls, args: Any, backward: Callable) -> BackwardCall:
        places = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
        wanted = [(args[i].shape, args[i].dtype) if floating(args[i]) else None for i in places]
        return cls(backward, tuple(places), tuple(wanted))

    def __call__(self, ctx: Any, *cts: Any) -> list:
        body: Any = self.backward
        last = hasattr(body, "__wrapped__") and body.__code__ is _ONCE
        body = body.__wrapped__ if last else body
        with torch._C._DisableAutocast():
            grads = dict(enumerate(listed(body(ctx, *cts))))
        pairs = zip(self.places, self.wanted, strict=True)
        return [fitted_gradient(grads.get(i), want, last) for i, want in pairs]


def fitted_gradient(g: Any, want: tuple[torch.Size, torch.dtype] | None, last: bool) -> Any:
    """Return a gradient of this shape and dtype; the ``last`` one has no derivative."""
    if g is None or want is None:
        return None
    shape, dtype = want
    if g.shape != shape:
        g = g.sum_to_size(shape)
    if g.dtype != dtype:
        g = (torch.real(g) if g.is_complex() and not dtype.is_complex else g).to(dtype)
    return once(g) if last else g


@torch.autograd.function.once_differentiable  # type: ignore[type-var]
def _once_differentiable(ctx: Any, g: Any) -> Any:
    return g


#: the code of every function decorated with @once_differentiable
_ONCE = _once_differentiable.__code__  # type: ignore[attr-defined]


class SavedPlace(int):
    """The place of the i-th tensor that a context keeps."""


def saved_values(ctx: Context) -> list[Tensor]:
    """Return the tensors that a context keeps."""
    kept = [*ctx.to_save, *ctx.saved_for_forward, *vars(ctx).values()]
    return [t for t in kept if isinstance(t, Tensor)]


def twin(x: Any) -> Any:
    """Return another tensor object for a value: functions that a context keeps may close over
    tensors that it keeps, too, and are to be told from it."""
    return x.tracer.alias(x) if x.__class__ is Traced else x


def held(ctx: Context) -> tuple[Context, list[Tensor]]:
    """Return a copy of a context with SavedPlaces for tensors, and these, each once."""
    tensors = list({id(t): t for t in saved_values(ctx)}.values())
    numbers = {id(t): SavedPlace(i) for i, t in enumerate(tensors)}
    bare = with_kept(ctx, lambda x: numbers[id(x)] if isinstance(x, Tensor) else x)
    bare.dirty_tensors = bare.non_differentiable = ()
    return bare, tensors


def with_kept(ctx: Context, put: Callable[[Any], Any]) -> Context:
    """Return a copy of ``ctx`` with ``put`` applied to each value that it keeps."""
    new = type(ctx)()
    new.__dict__.update({name: put(value) for name, value in vars(ctx).items()})
    new.to_save = tuple(map(put, ctx.to_save))
    new.saved_for_forward = tuple(map(put, ctx.saved_for_forward))
    return new


def later(
    name: str,
    rule: Callable,
    ctx: Context,
    first: int,
    sigs: Sequence[Sig],
    read: Sequence[Tensor],
    closed_over: Sequence[Tensor],
    calls: Any,
    known: Any,
) -> Later:
    """Return the rule as a RuleProgram to be recorded on demand: a program of its given values
    (``sigs``) and of what it ``read``: the context's contents, and tensors that it closes over. It
    holds no tensor. ``known`` is the key of the context, None if it has none."""
    more = [current().ref_of(t)[1] for t in read]  # type: ignore[union-attr]
    seen, closed = [*map(WeakIdRef, read)], tuple(map(WeakIdRef, closed_over))

    def on(*xs: Tensor) -> Any:
        trace, given, kept = current(), xs[: len(sigs)], xs[len(sigs) :]
        assert trace is not None
        alive = [t() for t in seen]
        for x, real in zip(kept, alive, strict=True):
            if real is not None:
                trace.stand_for(x, real)
                if WeakIdRef(real) in closed:
                    trace.autograd.leaves[x.ref] = real.requires_grad
        return rule(with_kept(ctx, lambda x: kept[x] if isinstance(x, SavedPlace) else x), *given)

    def make() -> Any:
        alive = [t for c in closed if (t := c()) is not None]
        made = recorded_rule(name, on, [*sigs, *more], calls, closed=alive)
        if isinstance(made, Exception):
            return made
        program, trace = made
        if trace.foreign():
            return CaptureError(
                f"{name}: a derivative that calls {name} again reads a tensor that it did not "
                "read when it was applied: pass it through ctx"
            )
        return RuleProgram(with_numbers(program, trace.lifted), first, len(more))

    new = Later(make, first, len(more))
    key = (name, rule, known, first, tuple(sigs), tuple(more), calls, closed)
    return new if known is None else earlier(key, new)


def known_by(ctx: Context) -> Any:
    """Return a key for a context without tensors, None if it keeps other than plain values."""
    try:
        return tuple((name, plain_key(x)) for name, x in vars(ctx).items())
    except TypeError:
        return None


#: rules to be recorded on demand
_later = Cache(4096)


def earlier(key: tuple, new: Later) -> Later:
    """Return the equal rule of an earlier call, so that programs that hold it are equal, too;
    ``new`` if recording the earlier one again would give another."""
    known = _later.get(key)
    if known is not None and known.made is not None and key not in recorded_now.compared:
        recorded_now.compared.append(key)
        try:
            known = known if new.part() == known.made else None
        finally:
            recorded_now.compared.remove(key)
    if known is None:
        _later.put(key, known := new)
    return known


def plain_key(x: Any) -> Any:
    """Return a key for a plain value. Raises TypeError for others."""
    if type(x) in _PLAIN:
        return type(x), repr(x)
    if isinstance(x, tuple):
        return type(x), tuple(map(plain_key, x))
    if isinstance(x, Operands) and not x.tensors:
        return type(x), x.spec, x.places, plain_key(x.literals)
    if isinstance(x, TreeSpec):
        return x
    raise TypeError(f"{type(x).__name__} is no plain value")


_PLAIN = SIMPLE | {float, complex, SavedPlace}
