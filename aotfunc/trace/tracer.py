"""Recording: runs a Python function on traced values and keeps a flat list of the aten ops it met.

A traced value (:class:`Traced`) is a tensor without data that knows its signature and its number in the recording.
Ops are recorded as they come, in-place ones and views too; :mod:`.functionalize` makes a graph of them. What autograd
would hide from us (no_grad regions, ``.data``, ``requires_grad``, hooks) is written down on the way: see
:mod:`.intent`. Traced values never take part in C++ autograd.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from .. import debug
from ..debug import Line, at
from ..errors import CaptureError
from . import shapes
from .shapes import SIMPLE, Facts, Instr, Sig, Slot, encode, fill, sig_of

aten = torch.ops.aten
_wrapper = torch.Tensor._make_wrapper_subclass
_grad_enabled = torch.is_grad_enabled


#: what the layer above knows how to record: ``register_hook(tensor, hook)``
HOOKS: dict[str, Callable] = {}


class _Stack(threading.local):
    def __init__(self) -> None:
        self.traces: list[Trace] = []


_stack = _Stack()


def current() -> Trace | None:
    """The innermost recording under way in this thread."""
    traces = _stack.traces
    return traces[-1] if traces else None


class Traced(Tensor):
    """A tensor that stands for a value of a recording: shape, dtype and device are real, there is no data."""

    tracer: Trace
    ref: int
    sig: Sig

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """An op outside of every recording: a value leaked. It has data if its recording can be run."""
        from torch.utils._pytree import tree_map_only

        args, kwargs = tree_map_only(Traced, lambda x: x.tracer.value(x), (args, kwargs or {}))
        return func(*args, **kwargs)

    # ----- what autograd would answer -------------------------------------------------------------------------------

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        return self.tracer.requires_grad(self)

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        if requires_grad and not self.sig.differentiable:
            raise RuntimeError("only Tensors of floating point and complex dtype can require gradients")
        self.tracer.mark_leaf(self, requires_grad)
        return self

    def detach_(self) -> Tensor:  # autograd answers this one itself: it would never be recorded
        self.ref = self.detach().ref
        return self

    @property
    def is_leaf(self) -> bool:  # type: ignore[override]
        return self.tracer.is_leaf(self)

    @property
    def grad_fn(self) -> Any:  # type: ignore[override]
        return self.tracer if self.requires_grad and not self.is_leaf else None

    @property
    def grad(self) -> Tensor | None:  # type: ignore[override]
        return self.__dict__.get("_grad")

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self.__dict__["_grad"] = value

    def retain_grad(self) -> None:
        self.tracer.retained.append(self)

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        with torch.no_grad():
            if value.shape == self.shape and value.dtype == self.dtype:
                self.copy_(value)
            else:
                raise CaptureError(f"`.data = ` with another shape or dtype is not captured{at(debug.user_line())}")

    def __getitem__(self, index: Any) -> Tensor:
        if (place := traced_place(index)) is not None:
            return _at_tensor(self, index, place)
        return Tensor.__getitem__(self, index)

    def backward(self, gradient=None, retain_graph=None, create_graph=False, inputs=None):  # type: ignore
        torch.autograd.backward(self, gradient, retain_graph, create_graph, inputs=inputs)

    def register_hook(self, hook: Callable) -> Any:
        return HOOKS["register_hook"](self, hook)

    # ----- what has no answer ----------------------------------------------------------------------------------------

    def numpy(self, *, force: bool = False) -> Any:
        with quiet():
            return _live(self).numpy(force=True)

    def tolist(self) -> Any:
        with quiet():
            return _live(self).tolist()

    def data_ptr(self) -> int:
        raise CaptureError(f"a traced value has no memory: .data_ptr() was asked for{at(debug.user_line())}")

    def __array__(self, dtype: Any = None) -> Any:
        with quiet():
            return _live(self).__array__(dtype) if dtype is not None else _live(self).__array__()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"traced({self.sig}, %{self.ref})" if hasattr(self, "sig") else "traced()"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        if not self.tracer.concrete_inputs:
            return repr(self)
        with quiet():
            return format(_live(self), spec)

    def __deepcopy__(self, memo: dict) -> Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise CaptureError(f"a traced value cannot be pickled{at(debug.user_line())}")


def traced_place(index: Any) -> int | None:
    """Where an index has a traced 0-dim integer, which PyTorch would ask for its value."""
    parts = index if isinstance(index, tuple) else (index,)
    found = [
        i
        for i, p in enumerate(parts)
        if p.__class__ is Traced and not p.sig.shape and not p.sig.differentiable and p.sig.dtype is not torch.bool
    ]
    plain = all(p is None or p is ... or isinstance(p, int | slice) for i, p in enumerate(parts) if i not in found)
    return found[0] if len(found) == 1 and plain else None


def _at_tensor(x: Tensor, index: Any, place: int) -> Tensor:
    """``x[..., i, ...]`` with a traced ``i``: the other parts first, then ``index_select`` along what is left of
    ``i``'s dimension.
    """
    parts = list(index) if isinstance(index, tuple) else [index]
    i = parts[place]
    parts[place] = slice(None)
    before = [p for p in parts[:place] if not isinstance(p, int)]
    dim = -sum(p is None or isinstance(p, slice) for p in parts[place:]) if ... in before else len(before)
    rest = Tensor.__getitem__(x, tuple(parts))
    size = rest.shape[dim]
    i = torch.where(i < 0, i + size, i)
    return rest.index_select(dim, i.reshape(1)).squeeze(dim)


def _live(x: Traced) -> Tensor:
    return (current() or x.tracer).value(x)


# A record is (instr, refs of its tensors, grad enabled?, region, line). `instr` is a shapes.Instr for an op, or an
# object of another layer with the same duty: `facts` and `lower(functionalizer, record)`, see functionalize.Step.
Record = tuple[Any, tuple[int, ...], bool, Any, Line | None]


class Trace(TorchDispatchMode):
    """One recording. Inputs are numbered 0, 1, …, then results as they come; lifted outside tensors -1, -2, …

    ``concrete_inputs`` are the real inputs where values may be asked for (``.item()``); ``why_not`` says why where
    they may not. Values that depend on no input may be asked for all the same: with ``constants`` on closed-over
    tensors too. Without ``intent`` autograd is left alone (derived rules use it).
    """

    def __init__(self, why_not: str | None = None, constants: bool = True, intent: bool = True) -> None:
        super().__init__()
        self.may_ask_constants = constants
        self.keeps_intent = intent
        self.records: list[Record] = []
        self.count = 0
        self.inputs: list[Traced] = []
        self.lifted: list[Tensor] = []  # outside tensors, by reference
        self._lift_refs: dict[int, int] = {}
        self._keep: list[Tensor] = []
        self.leaves: dict[int, bool] = {}  # refs that the user, or the transform, marked as requiring grad
        self.leaf_tensors: list[Traced] = []
        self.retained: list[Traced] = []
        self.protected: set[int] = set()  # inputs that autograd does not let be written to
        self.mutates = False
        self.region: int | None = None  # the checkpointed region that is being recorded
        self.regions = 0
        self.why_not = why_not
        self.concrete_inputs: list[Tensor] | None = None
        self.origins: list[Tensor] = []  # what the inputs stand for, or are samples of
        self._values: Replay | None = None
        self.finished = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else every dispatch is wrapped in a Dynamo guard

    # ----- values -----------------------------------------------------------------------------------------------------

    def new(self, sig: Sig) -> Traced:
        if sig.plain:
            t = _wrapper(Traced, sig.shape, dtype=sig.dtype, device=sig.device)
        else:
            t = _wrapper(
                Traced, sig.shape, strides=sig.stride, storage_offset=sig.offset, dtype=sig.dtype, device=sig.device
            )
        t.tracer = self
        t.ref = self.count
        t.sig = sig
        self.count += 1
        return t

    def input(self, real: Tensor) -> Traced:
        """A new input with the signature of ``real``."""
        check_kind(real)
        t = self.new(real.sig if real.__class__ is Traced else sig_of(real))
        self.inputs.append(t)
        return t

    def alias(self, t: Traced) -> Traced:
        """Another tensor object for the same value."""
        twin = self.new(t.sig)
        self.count -= 1
        twin.ref = t.ref
        return twin

    def lift(self, t: Tensor) -> int:
        """The number of an outside tensor: a constant by reference, or a value of an outer recording."""
        key = id(t)
        ref = self._lift_refs.get(key)
        if ref is None:
            self._keep.append(t)  # so that id(t) stays its own
            if t.__class__ is Traced and t.tracer.finished:
                check_leak(t)
                t = t.tracer.value(t)
            check_kind(t)
            self.lifted.append(t)
            ref = self._lift_refs[key] = -len(self.lifted)
        return ref

    def ref_of(self, t: Tensor) -> tuple[int, Sig]:
        if t.__class__ is Traced and t.tracer is self:
            return t.ref, t.sig
        ref = self.lift(t)
        real = self.lifted[-ref - 1]
        return ref, real.sig if real.__class__ is Traced else sig_of(real)

    # ----- recording --------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        special = SPECIAL.get(func)
        if special is not None:
            done = special(self, *args, **(kwargs or {}))
            if done is not NotImplemented:
                return done
        key = [func]
        refs: list[int] = []
        sigs: list[Sig] = []

        def sink(t: Tensor) -> tuple[Slot, Sig]:
            ref, sig = self.ref_of(t)
            refs.append(ref)
            sigs.append(sig)
            return Slot(len(sigs) - 1), sig

        add = key.append
        for a in args:
            cls = a.__class__
            if cls is Traced and a.tracer is self:
                refs.append(a.ref)
                add(a.sig)
                sigs.append(a.sig)
            elif cls in SIMPLE:
                add(cls)
                add(a)
            else:
                encode(a, key, sink)
        if kwargs:
            for k, v in kwargs.items():
                add(k)
                encode(v, key, sink)
        add(shapes.env_key())
        frozen = tuple(key)
        instr = shapes.find(frozen)
        if instr is None:
            instr = self._learn(frozen, func, args, kwargs or {}, tuple(sigs))
        line = debug.user_line(2)
        self.records.append((instr, tuple(refs), _grad_enabled(), self.region, line))
        outs = instr.outs
        facts = instr.facts
        if facts.pure:
            if outs.__class__ is Sig:
                return self.new(outs)
        elif facts.writes:
            self.mutates = True
            return self._written(facts, outs, args, kwargs)
        return self.wrap(outs, facts)

    def _learn(self, key: tuple, func: OpOverload, args: tuple, kwargs: dict, sigs: tuple) -> Instr:
        count = 0

        def template(a: Any) -> Any:
            nonlocal count
            if isinstance(a, Tensor):
                count += 1
                return Slot(count - 1)
            if isinstance(a, list | tuple):
                return type(a)(template(x) for x in a) if type(a) in (list, tuple) else [template(x) for x in a]
            return a

        targs = tuple(template(a) for a in args)
        tkwargs = {k: template(v) for k, v in kwargs.items()}
        outs = None
        facts = Facts(func)
        if facts.dynamic or not facts.returns_tensors:
            outs = self._by_value(func, targs, tkwargs, sigs, args, kwargs)
            key = (*key, outs)
            known = shapes.find(key)
            if known is not None:
                return known
        try:
            return shapes.intern(key, func, targs, tkwargs, sigs, outs)
        except CaptureError as e:
            raise CaptureError(f"{e}{at(debug.user_line())}") from None

    def _by_value(self, func: OpOverload, targs: Any, tkwargs: Any, sigs: tuple, args: tuple, kwargs: dict) -> Any:
        """The result's signature of an op whose shape depends on data: static if the meta kernel can, else by
        running.
        """
        try:
            return shapes.infer(func, targs, tkwargs, sigs)
        except Exception:
            from torch.utils._pytree import tree_map_only

            args, kwargs = tree_map_only(
                Tensor, lambda t: self.value(t, f"the shape of {func}'s result"), (args, kwargs)
            )
            with torch._C._DisableTorchDispatch(), torch.no_grad():
                return shapes.signatures(func(*args, **kwargs))

    def wrap(self, outs: Any, facts: Any = None) -> Any:
        """Traced values for signatures, in the same structure."""
        if outs.__class__ is Sig:
            return self.new(outs)
        if isinstance(outs, tuple):
            made = [self.wrap(o) for o in outs]
            return made if facts is not None and len(facts.same) == 1 else tuple(made)
        return outs

    def _written(self, facts: Any, outs: Any, args: tuple, kwargs: dict | None) -> Any:
        """Results of an op that writes: the written arguments themselves, refreshed where their metadata changed."""

        def argument(i: int) -> Any:
            return args[i] if i < len(args) else (kwargs or {}).get(facts.names[i])

        single = not isinstance(outs, tuple)
        results = []
        for sig, same in zip((outs,) if single else outs, facts.same, strict=False):
            if same is None:
                results.append(self.wrap(sig))
                continue
            t = argument(same)
            if t.__class__ is Traced and t.ref in self.protected and t.tracer is self and _grad_enabled():
                raise RuntimeError(
                    f"a leaf Variable that requires grad is being used in an in-place operation{at(debug.user_line(3))}"
                )
            if t.__class__ is Traced and t.tracer is self and sig is not t.sig and sig.__class__ is Sig:
                self._refresh(t, sig)
            results.append(t)
        return results[0] if single and results else tuple(results) if results else None

    def _refresh(self, t: Traced, sig: Sig) -> None:
        """``t`` has other metadata from here on (``unsqueeze_``, a resized ``out=``)."""
        fresh = _wrapper(
            Traced, sig.shape, strides=sig.stride, storage_offset=sig.offset, dtype=sig.dtype, device=sig.device
        )
        with quiet():
            Tensor.data.__set__(t, fresh)  # type: ignore[attr-defined]
        t.sig = sig

    def record(self, instr: Any, tensors: Sequence[Tensor]) -> Any:
        """Record a step of another layer (a nested program, a custom derivative); its results."""
        refs = tuple([self.ref_of(t)[0] for t in tensors])
        self.records.append((instr, refs, _grad_enabled(), self.region, debug.user_line(2)))
        if instr.mutates:
            self.mutates = True
        return self.wrap(instr.outs)

    def key(self) -> tuple:
        """What two recordings have in common that differ only in the data they would run on."""
        sigs = tuple([t.sig if t.__class__ is Traced else sig_of(t) for t in self.lifted])
        return (tuple([t.sig for t in self.inputs]), sigs, tuple([r[:4] for r in self.records]), self._alias_key())

    def _alias_key(self) -> Any:
        """Which inputs and lifted tensors share storage; asked only where something is written."""
        if not self.mutates:
            return None
        return tuple(self.storages())

    def storages(self) -> list[int]:
        """For each input, then each lifted tensor: the number of its storage among them."""
        numbers: dict[Any, int] = {}
        reals = [*(self.origins or self.inputs), *self.lifted]
        return [numbers.setdefault(storage_id(t), len(numbers)) for t in reals]

    def root(self, ref: int) -> int:
        """The value whose storage this one shares."""
        return self.roots()[0].get(ref, ref)

    def roots(self) -> tuple[dict[int, int], set[int]]:
        """For each view the value whose storage it shares, and which storages are written to."""
        roots: dict[int, int] = {}
        written: set[int] = set()
        number = len(self.inputs)
        for instr, refs, *_ in self.records:
            made = range(number, number + results_of(instr))
            number += len(made)
            if instr.facts.view_of is not None and refs:
                roots.update(dict.fromkeys(made, roots.get(refs[0], refs[0])))
            written.update(roots.get(refs[s], refs[s]) for s in written_slots(instr))
        return roots, written

    # ----- requires_grad, asked for by f ------------------------------------------------------------------------------

    def mark_leaf(self, t: Traced, value: bool) -> None:
        self.leaves[t.ref] = value
        if value:
            self.leaf_tensors.append(t)

    def is_leaf(self, t: Traced) -> bool:
        return t.ref in self.leaves or not self.requires_grad(t)

    def requires_grad(self, t: Traced) -> bool:
        """Whether autograd would record from here: a path of differentiable steps leads back to a leaf that requires
        grad.
        """
        if (known := self.leaves.get(t.ref)) is not None:
            return known
        if not t.sig.differentiable:
            return False
        active = {ref for ref, yes in self.leaves.items() if yes}
        active |= {-1 - i for i, x in enumerate(self.lifted) if x.requires_grad}
        number = len(self.inputs)
        for instr, refs, grad, *_ in self.records:
            outs = results_of(instr)
            made = range(number, number + outs)
            number += outs
            if grad and instr_op(instr) is not aten.detach.default and any(r in active for r in refs):
                active.update(m for m in made if self.leaves.get(m) is not False)
                active.update(refs[i] for i in written_slots(instr))
        return t.ref in active

    # ----- values on request ------------------------------------------------------------------------------------------

    def value(self, t: Tensor, what: str = "the value of a tensor") -> Tensor:
        """The real value of ``t``: what has been recorded so far is run on the concrete inputs."""
        if t.__class__ is Traced and t.tracer is not self:
            return t.tracer.value(t, what)
        ref = t.ref if t.__class__ is Traced else self._lift_refs.get(id(t))
        if ref is None or (t.__class__ is not Traced and not self.mutates):
            return t
        found = None
        if self.concrete_inputs is not None or not self.finished:
            if self._values is None:
                self._values = Replay(self)
            found = self._values.value(ref)
        if found is None:
            reason = self.why_not or "this value belongs to a capture that is over"
            raise CaptureError(
                f"{what} was asked for, but {reason}{at(debug.user_line())}. Return it from the function "
                "(has_aux=True), use torch.where instead of `if`, or pass the value as a Python argument."
            )
        return found


class Replay:
    """Runs a recording on its concrete inputs, as far as it has come, on copies of what it writes and from the saved
    RNG state.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.done = 0
        self.env: dict[int, Any] = {}
        self.storages: dict[Any, Tensor] = {}  # copies keep sharing memory as the originals do
        if trace.concrete_inputs is not None:
            with quiet():
                reals = [t.tracer.value(t) if t.__class__ is Traced else t for t in trace.concrete_inputs]
                self.env = {i: self.copy(t) for i, t in enumerate(reals)}
        self.rng = torch.default_generator.get_state()
        self.number = len(trace.inputs)

    def copy(self, t: Tensor) -> Tensor:
        t = t.detach()
        key = storage_id(t)
        if key not in self.storages:
            self.storages[key] = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage().clone())
        whole = self.storages[key]
        if whole.dtype != t.dtype:
            return t.clone()
        return whole.as_strided(t.shape, t.stride(), t.storage_offset())

    def value(self, ref: int) -> Tensor | None:
        """The value of a result; None if it depends on inputs that are not there."""
        trace = self.trace
        outside = torch.default_generator.get_state()
        torch.default_generator.set_state(self.rng)
        try:
            with quiet(), torch.no_grad():
                for i in range(len(trace.lifted)):
                    if -1 - i not in self.env and (trace.may_ask_constants or trace.concrete_inputs is not None):
                        outer = trace.lifted[i]
                        try:
                            real = outer.tracer.value(outer) if outer.__class__ is Traced else outer
                        except CaptureError:
                            continue
                        self.env[-1 - i] = self.copy(real)
                for instr, refs, *_ in trace.records[self.done :]:
                    if any(r not in self.env for r in refs):
                        for slot in written_slots(instr):
                            self.env.pop(refs[slot], None)
                        self.number += results_of(instr)
                        continue
                    for o in instr_run(instr, [self.env[r] for r in refs]):
                        self.env[self.number] = o
                        self.number += 1
                self.done = len(trace.records)
            self.rng = torch.default_generator.get_state()
        finally:
            torch.default_generator.set_state(outside)
        return self.env.get(ref)


def instr_run(instr: Any, values: list[Tensor]) -> list[Tensor]:
    """Run one recorded step; its new results, flat."""
    if not isinstance(instr, Instr):
        return instr.run(values)
    outs = instr.op(*fill(instr.args, values), **{k: fill(v, values) for k, v in instr.kwargs.items()})
    facts = instr.facts
    if facts.writes:
        return [
            x
            for o, same in zip(outs if isinstance(outs, tuple | list) else (outs,), facts.same, strict=False)
            if same is None
            for x in flat(o)
        ]
    return flat(outs)


def flat(outs: Any) -> list:
    if isinstance(outs, list | tuple):
        return [x for o in outs for x in flat(o)]
    return [outs] if isinstance(outs, Tensor | Sig) else []


def results_of(instr: Any) -> int:
    """How many new values a step makes."""
    if not instr.facts.writes:
        return len(flat(instr.outs))
    outs = instr.outs if isinstance(instr.outs, tuple) else (instr.outs,)
    return sum(len(flat(o)) for o, same in zip(outs, instr.facts.same, strict=False) if same is None)


def instr_op(instr: Any) -> Any:
    return getattr(instr, "op", None)


def written_slots(instr: Any) -> list[int]:
    """Which of a step's tensors it writes."""
    if not instr.facts.writes:
        return []
    if not isinstance(instr, Instr):
        return list(instr.facts.writes)
    found = []
    for i in instr.facts.writes:
        a = instr.args[i] if i < len(instr.args) else instr.kwargs.get(instr.facts.names[i])
        found += [int(s) for s in (a if isinstance(a, list | tuple) else [a]) if isinstance(s, Slot)]
    return found


def storage_id(t: Tensor) -> Any:
    if t.__class__ is Traced:
        return (id(t.tracer), t.tracer.root(t.ref))
    try:
        return t.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return id(t)


def check_leak(t: Traced) -> None:
    """A value of a finished transform is a constant, unless that transform ran inside one that still runs."""
    if any(x.__class__ is Traced and not x.tracer.finished for x in (*t.tracer.origins, *t.tracer.lifted)):
        raise CaptureError(
            f"a value leaked from an inner transform and is used outside of it{at(debug.user_line())}: "
            "return it from the inner function (has_aux=True)"
        )


def check_kind(t: Tensor) -> None:
    """Refuse the tensors that a recording cannot stand for."""
    if t.layout is not torch.strided or t.is_quantized:
        raise CaptureError(
            f"only dense tensors can be captured, not {t.layout} with dtype {t.dtype}{at(debug.user_line())}"
        )
    if (
        type(t) not in _KINDS
        and hasattr(type(t), "__torch_dispatch__")
        and type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__
    ):
        raise CaptureError(f"tensors of the subclass {type(t).__name__} cannot be captured{at(debug.user_line())}")


_KINDS = {Tensor, torch.nn.Parameter, Traced}


@contextmanager
def quiet() -> Iterator[None]:
    """No recording meanwhile."""
    with torch._C._DisableTorchDispatch():
        yield


@contextmanager
def recording(trace: Trace) -> Iterator[Trace]:
    """Record into ``trace`` meanwhile: with gradients on, autocast's cache and nn's fast paths off, functorch's
    levels aside.
    """
    with ExitStack() as stack:
        if torch._C._functorch.peek_interpreter_stack() is not None:
            from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

            stack.enter_context(temporarily_clear_interpreter_stack())
        if (compiling := torch._C._dynamo.eval_frame.get_eval_frame_callback()) is not None:
            torch._C._dynamo.eval_frame.set_eval_frame(None)  # Dynamo must not compile what f calls
            stack.callback(torch._C._dynamo.eval_frame.set_eval_frame, compiling)
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        cache = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(True)
        _stack.traces.append(trace)
        try:
            with trace:
                yield trace
        finally:
            _stack.traces.pop()
            torch._C._set_grad_enabled(grad)
            torch.set_autocast_cache_enabled(cache)
            torch.backends.mha.set_fastpath_enabled(fast)
            trace.finished = True


# ----- ops that the recording answers itself -------------------------------------------------------------------------


def _conj(trace: Trace, x: Tensor) -> Tensor:
    """Traced values have no lazy conjugate bit: conjugation is an op like any other."""
    with trace:
        return aten.conj_physical.default(x)


def _scalar(trace: Trace, x: Tensor) -> Any:
    with quiet():
        return trace.value(x, "a number").item()


def _equal(trace: Trace, a: Tensor, b: Tensor) -> bool:
    with quiet():
        return torch.equal(trace.value(a, "a truth value"), trace.value(b, "a truth value"))


def _batch_norm(trace: Trace, x, weight, bias, mean, var, training, momentum, eps, *cudnn):  # type: ignore[no-untyped-def]
    """``native_batch_norm`` updates the running statistics and does not say so; the functional op returns them."""
    if training and mean is not None:
        out, m, s, new_mean, new_var = aten._native_batch_norm_legit_functional(
            x, weight, bias, mean, var, True, momentum, eps
        )
        with torch.no_grad():
            mean.copy_(new_mean)
            var.copy_(new_var)
        return out, m, s
    if mean is None:
        return aten._native_batch_norm_legit.no_stats(x, weight, bias, training, momentum, eps)
    return aten._native_batch_norm_legit_no_training(x, weight, bias, mean, var, momentum, eps)


def _with_trace(special: Callable) -> Callable:
    def call(trace: Trace, *args: Any, **kwargs: Any) -> Any:
        with trace:
            return special(trace, *args, **kwargs)

    return call


def _cudnn_batch_norm(trace: Trace, x, weight, bias, mean, var, training, momentum, eps):  # type: ignore
    out, m, s = _batch_norm(trace, x, weight, bias, mean, var, training, momentum, eps)
    return out, m, s, x.new_empty(0, dtype=torch.uint8)


SPECIAL: dict[OpOverload, Callable] = {
    aten._local_scalar_dense.default: _scalar,
    aten.equal.default: _equal,
    aten._conj.default: _conj,
    aten.native_batch_norm.default: _with_trace(_batch_norm),
    aten.cudnn_batch_norm.default: _with_trace(_cudnn_batch_norm),
    aten.miopen_batch_norm.default: _with_trace(_batch_norm),
}
