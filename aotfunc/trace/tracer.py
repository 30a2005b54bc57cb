"""Run a Python function on traced values and keep a flat list of the aten ops that it calls.

Ops are recorded in order, in-place ones and views too; :mod:`.functionalize` makes a graph of
them. What autograd hides from a dispatch mode (no_grad regions, ``.data``, ``requires_grad``,
hooks) is written down on the way: see :mod:`.autograd`, :mod:`.outside` and
:mod:`~aotfunc.capture.patches`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from .. import debug
from ..debug import at
from ..errors import CaptureError
from . import histories
from .arrays import OfArray, check_array_write
from .collectives import record_collective
from .dtensors import record_op
from .following import LOW, expressions_in, with_values
from .in_place import OVERWRITES, check_reshaped, write_results
from .kinds import dtensor_class
from .learning import follows_default, learn
from .memory import Span
from .overlaps import check_overlaps
from .records import written_slots
from .replay import Answering
from .scalars import FIRST, NUMBER, TAKES_NUMBER, beside_tensors, generic, may_be_input
from .shapes.infer import _deterministic
from .shapes.instr import SIMPLE, Instr, encode, intern, interned
from .shapes.sig import Sig, Slot
from .special import AT_A_PLACE, SPECIAL
from .traced import Traced

_grad_enabled = torch.is_grad_enabled
_tangents_enabled = torch._C._is_fwd_grad_enabled
_inference_mode = torch.is_inference_mode_enabled
_default_dtype = torch.get_default_dtype


class Trace(Answering, TorchDispatchMode):
    """One recording: PyTorch hands it every op while it is entered."""

    supports_higher_order_operators = True  # so that they are refused here
    arrays: tuple[OfArray, ...] = ()
    shown: tuple[tuple[Any, Span, int], ...] = ()  # arrays of values, where these lie
    buffer: Any = None  # the array, or buffer, of which a tensor is being made

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # without it each dispatch enters a Dynamo guard

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore
        if func.__class__ is not OpOverload:
            return of_objects(self, func, args)
        if types != _OURS and takes_dtensors(types):
            return record_op(self, func, args, kwargs or {})
        if self.autograd.made:
            self.autograd.adopt_leaves()
        call = func._op  # hashes in C, which an overload does not
        lifts = self.lifts_numbers and call in TAKES_NUMBER
        followed = None
        if self.following is not None:
            args, kwargs, followed = self._followed(args, kwargs, lifts)
        special = (SPECIAL if self.place is None else AT_A_PLACE).get(call)
        if special is not None:
            body = self.opened.get(func)
            done = (
                special(self, *args, **(kwargs or {}))
                if body is None
                else self._open(body, args, kwargs or {})
            )
            if done is not NotImplemented:
                return done
        if _inference_mode() and is_composite(func):  # elsewhere autograd has opened it
            with self:
                return func.decompose(*args, **(kwargs or {}))
        key: list[Any] = [call]
        refs: list[int] = []
        add = key.append
        count = len(self.numbers)
        for a in args:
            cls = a.__class__
            if cls is Traced and a.tracer is self:
                refs.append(a.ref)
                add(a.sig)
            elif lifts and may_be_input(a, args, kwargs):
                refs.append(self._number(a, followed))
                key += (cls, NUMBER)
            elif cls in SIMPLE:
                add(cls)
                add(a)
            elif cls is float:
                add(a.hex())
            elif cls is Tensor or cls is Parameter:
                ref, sig = self.ref_of(a)
                refs.append(ref)
                add(sig)
            else:
                encode(a, key, self._sink(refs))
        if kwargs:
            sink = self._sink(refs)
            for k, v in kwargs.items():
                add(k)
                if lifts and may_be_input(v, args, kwargs):
                    refs.append(self._number(v, followed))
                    key += (v.__class__, NUMBER)
                else:
                    encode(v, key, sink)
        env = (_default_dtype(), _deterministic())
        add(env)
        frozen = tuple(key)
        instr = interned(frozen)
        if instr is None:
            sigs = tuple([k for k in key if k.__class__ is Sig])
            instr = learn(self, frozen, func, args, kwargs or {}, sigs)
        if lifts and instr.number is None and NUMBER in instr.sigs:
            if followed is not None:
                followed.ask()
            return self._with_literal(func, types, args, kwargs, count)
        if env[0] is not self.dtype and follows_default(instr, kwargs or {}):
            return self._with_dtype(instr, types, args, kwargs or {})
        line = debug.user_line(2)
        self.records.append((instr, tuple(refs), _grad_enabled(), self.region, line))
        outs = instr.outs
        if instr.simple:
            t = self.new(outs)
            return t if _tangents_enabled() else self.without_tangents(t)
        facts = instr.facts
        if facts.random:
            self.seeds.draw([instr])
        if facts.pure:
            if outs.__class__ is Sig:
                t = self.new(outs)
                if facts.factory or not refs:
                    self.autograd.made += (weakref.ref(t),)
                return t if _tangents_enabled() else self.without_tangents(t)
        elif facts.writes:
            count = len(self.records) - 1, self.count
            try:
                if not facts.reshapes:
                    check_overlaps(self)
                if self.arrays or self.shown:
                    places = [(refs[s], instr.sigs[s]) for s in written_slots(instr)]
                    check_array_write(self, places)
                self.mutates = True
                if func in OVERWRITES and not self.may_ask_constants and _grad_enabled():
                    self.autograd.overwrite(refs, self.kin(refs[0]))
                if facts.reshapes:
                    self.reshapes = True
                    check_reshaped(self, func, args[0], outs)
                return write_results(self, func, outs, args, kwargs)
            except RuntimeError:  # it has not run: the function may catch the error and go on
                self.forget(*count)
                raise
        elif facts.strided:
            self.strided = True
        results = self.wrap(outs, facts)
        return (
            results
            if _tangents_enabled() or facts.view_of is not None
            else self.without_tangents(results)
        )

    def _sink(self, refs: list[int]) -> Callable[[Tensor], tuple[None, Sig]]:
        """Return the function that encodes a tensor among the arguments."""

        def sink(t: Tensor) -> tuple[None, Sig]:
            ref, sig = self.ref_of(t)
            refs.append(ref)
            return None, sig

        return sink

    def _with_dtype(self, instr: Instr, types: Any, args: tuple, kwargs: dict) -> Any:
        """Give an op the default dtype that ``f`` has set: its program runs under another one."""
        if "dtype" not in instr.facts.names:
            raise CaptureError(
                f"the dtype of {instr.op}'s result is the default dtype, which is another one "
                f"here than around the captured function{at(debug.user_line())}; convert its "
                "argument, say by .to(torch.get_default_dtype())"
            )
        return self.__torch_dispatch__(
            instr.op, types, args, {**kwargs, "dtype": instr.outs.dtype}
        )

    def _followed(self, args: tuple, kwargs: dict | None, lifts: bool) -> tuple:
        """Return an op's arguments with plain numbers, and the one that becomes an input."""
        found = [*expressions_in(args), *(expressions_in(kwargs) if kwargs else ())]
        if not found:
            return args, kwargs, None
        args, kwargs = with_values(args), with_values(kwargs)
        if lifts and beside_tensors(args, kwargs):
            assert self.following is not None
            low = self.following.rounds and any(getattr(a, "dtype", None) in LOW for a in args)
            if generic(found[0].value) and not low:
                return args, kwargs, found[0]
            found[0].literal = True
            return args, kwargs, None
        for e in found:
            e.ask()
        return args, kwargs, None

    def _number(self, a: float, followed: Any) -> int:
        """Return the reference of a number among an op's arguments."""
        if followed is not None:
            return self.lift(followed.input())
        self.numbers.append(a)
        return FIRST + 1 - len(self.numbers)

    def _with_literal(
        self, op: OpOverload, types: Any, args: tuple, kwargs: dict | None, count: int
    ) -> Any:
        """Record an op whose number cannot be an input."""
        del self.numbers[count:]
        self.lifts_numbers = False
        try:
            return self.__torch_dispatch__(op, types, args, kwargs)
        finally:
            self.lifts_numbers = True

    def _open(self, body: Callable, args: tuple, kwargs: dict) -> Any:
        opened, self.opened = self.opened, {}
        try:
            with self:
                return body(*args, **kwargs)
        finally:
            self.opened = opened

    def wrap(self, outs: Any, facts: Any = None) -> Any:
        """Return traced values for signatures, in the same structure."""
        if outs.__class__ is Sig:
            return self.new(outs)
        if isinstance(outs, tuple):
            made = [self.wrap(o) for o in outs]
            return made if facts is not None and len(facts.same) == 1 else tuple(made)
        return outs

    def record(self, instr: Any, tensors: Sequence[Tensor]) -> Any:
        """Record another layer's step (a nested program, a custom derivative); return results."""
        self.autograd.adopt_leaves()
        refs = tuple([self.ref_of(t)[0] for t in tensors])
        self.records.append((instr, refs, _grad_enabled(), self.region, debug.user_line(2)))
        if instr.mutates:
            if self.arrays or self.shown:
                check_array_write(self, [self.ref_of(tensors[s]) for s in written_slots(instr)])
            self.mutates = True
            if _grad_enabled():
                histories.follow_writes(self, [tensors[s] for s in written_slots(instr)])
        if instr.strided:
            self.strided = True
        if instr.facts.random and hasattr(instr, "program"):
            self.seeds.draw(instr.program.graph.nodes)
        results = self.wrap(instr.outs)
        return results if _tangents_enabled() else self.without_tangents(results)

    def without_tangents(self, results: Any) -> Any:
        """Return the results of an op that ran with forward-mode derivatives off."""
        if isinstance(results, tuple | list):
            return type(results)(map(self.without_tangents, results))
        if results.__class__ is not Traced or not results.sig.differentiable:
            return results
        sig, cut = results.sig, torch.ops.aotfunc.no_tangent.default
        key = (cut, sig)
        instr = interned(key) or intern(key, cut, (Slot(0),), {}, (sig,), sig)
        return self.note(instr, (results.ref,))

    def note(self, instr: Instr, refs: tuple[int, ...]) -> Any:
        """Record an op that the recording itself answers, and return its results."""
        self.records.append((instr, refs, _grad_enabled(), self.region, debug.user_line(2)))
        return self.wrap(instr.outs, instr.facts)


_OURS = (Traced,)


@cache
def is_composite(op: OpOverload) -> bool:
    """Return whether an op is composed: for some layouts a view, for others a copy."""
    return op._can_decompose()


def takes_dtensors(types: Sequence[type]) -> bool:
    """Return whether a DTensor is among the arguments of an op."""
    return any(issubclass(cls, dtensor_class()) for cls in types)


def of_objects(trace: Trace, func: Any, args: tuple) -> Any:
    """Return the result of an operator on other objects: the end of a profiler's named range,
    which ends with the capture, or a collective. Refuse other such operators."""
    space = getattr(func, "namespace", None)
    if space == "profiler":
        return func(*args)
    if space == "c10d":
        return record_collective(trace, func, args)
    raise on_functions(func.__name__)


def on_functions(name: str) -> CaptureError:
    """Return the error for an operator that takes functions, such as flex_attention."""
    return CaptureError(
        f"{name} calls functions that are given to it, which is not "
        f"captured{at(debug.user_line())}. Write it with aotfunc.cond, scan or while_loop, or "
        "with torch.where; attention by scaled_dot_product_attention with a mask"
    )
