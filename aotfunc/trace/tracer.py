"""Recording: runs a Python function on traced values and keeps a flat list of the aten ops it met.

Ops are recorded as they come, in-place ones and views too; :mod:`.functionalize` makes a graph of
them. What autograd would hide from us (no_grad regions, ``.data``, ``requires_grad``, hooks) is
written down on the way: see :mod:`.autograd`, :mod:`.outside` and :mod:`~aotfunc.capture.patches`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import debug
from ..debug import at
from ..errors import CaptureError, OpError
from . import histories
from .autograd import Autograd
from .memory import Place, layout
from .numbers import refusal
from .records import Record, Roots, written_slots
from .replay import Replay
from .scalars import FIRST, NUMBER, generic, has_number, with_number
from .seeds import Seeds
from .shapes.infer import infer, signatures
from .shapes.instr import SIMPLE, Instr, encode, env_key, intern, interned
from .shapes.sig import Facts, Sig, Slot, fill, sig_of
from .special import SPECIAL
from .traced import Traced, check_kind, check_leak, current, of_subclass, ordinary_tensor, quiet

aten = torch.ops.aten
_wrapper = torch.Tensor._make_wrapper_subclass
_grad_enabled = torch.is_grad_enabled
_tangents_enabled = torch._C._is_fwd_grad_enabled
_inference_mode = torch.is_inference_mode_enabled


class Trace(TorchDispatchMode):
    """One recording. Inputs are numbered 0, 1, …, then results as they come; lifted outside
    tensors -1, -2, …

    ``concrete_inputs`` are the real inputs where values may be asked for (``.item()``), None for
    those of which ``samples`` says that they are samples of a batch; ``why_not`` says why where
    they may not. Values that depend on no input may be asked for all the same: with ``constants``
    on closed-over tensors too. Without ``intent`` autograd is left alone (derived rules use it).
    ``ask(trace, question, tensors, what)`` answers what depends on inputs.
    """

    def __init__(
        self,
        why_not: str | None = None,
        constants: bool = True,
        intent: bool = True,
        ask: Callable | None = None,
    ) -> None:
        super().__init__()
        outer = current()
        #: not inside of anything that is compiled once, however deep
        self.may_ask_constants: bool = constants and (outer is None or outer.may_ask_constants)
        self.keeps_intent = intent
        #: its program may be differentiated by any of its values
        self.of_a_rule: bool = outer is not None and outer.of_a_rule
        self.records: list[Record] = []
        self.count = 0
        self.inputs: list[
            Sig
        ] = []  # traced values know their recording; it must not hold them when it is over
        self.arguments: list[Traced] = []  # the tensors themselves, while they are used
        self.finals: list[int] = []  # the values that they are in the end
        self.lifted: list[Tensor] = []  # outside tensors, by reference
        self.made_inside: set[int] = (
            set()
        )  # those among them that f makes anew on each run: torch.tensor(3)
        self.lifts_numbers = False  # see scalars
        self.numbers: list[float] = []  # which may be inputs
        self._lift_refs: dict[int, int] = {}
        self._keep: list[Tensor] = []
        #: outside tensors without a history, which have one meanwhile
        self.rewritten: list[Tensor] = []
        #: outside tensors, in the order in which they were met, and their versions by then
        self.versions: list[tuple[Tensor, int]] = []
        self.autograd = Autograd(self.inputs, self.lifted, self.records, self.rewritten)
        self.stand_ins: list[Any] = []  # see outside.py
        self.seeds = Seeds()
        self.caches_casts: bool = torch.is_autocast_cache_enabled()
        self.casts: dict[tuple[int, torch.dtype], Tensor] = {}  # see casts.py
        self.mutates = False
        self.strided = False  # counts from where a storage begins
        self.hooked: set[int] = set()  # inputs, as they are since a hook was registered
        self.differentiated: dict[
            int, str
        ] = {}  # of which inputs and lifted tensors a gradient was taken: (at line)
        self.reshapes = False  # in place
        self.region: int | None = None  # the checkpointed region that is being recorded
        self.regions = 0
        self.why_not, self.ask = why_not, ask
        self.dtype: torch.dtype = torch.get_default_dtype() if outer is None else outer.dtype
        self.concrete_inputs: list[Tensor | None] | None = None
        self.samples: Any = None
        self.origins: list[Tensor] = []  # what the inputs stand for, or are samples of
        self._values: Replay | None = None
        self.answered = False  # whether a value was asked for
        self.followed: Any = None  # see concretize.py
        self._roots: Roots | None = None
        self._places: tuple[Place, ...] | None = None
        self.finished = False
        self.refused: CaptureError | None = None  # a question that had no answer
        self.place: tuple | None = None  # an index that was asked for its number, see special
        self.in_lstsq = False
        self.opened: Mapping[
            OpOverload, Callable
        ] = {}  # decompositions, instead of an answer of SPECIAL's

    supports_higher_order_operators = True  # so that they come here, to be refused in words

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else every dispatch is wrapped in a Dynamo guard

    # ----- values --------------------------------------------------------------------------------

    def new(self, sig: Sig) -> Traced:
        if _inference_mode():
            self.autograd.inference.add(self.count)
            with torch.inference_mode(
                False
            ):  # a traced value of inference mode could not be a view of an argument
                return self.new(sig)
        if sig.plain:
            t = _wrapper(Traced, sig.shape, dtype=sig.dtype, device=sig.device)
        else:
            t = _wrapper(
                Traced,
                sig.shape,
                strides=sig.stride,
                storage_offset=sig.offset,
                dtype=sig.dtype,
                device=sig.device,
            )
        t.tracer = self
        t.ref = self.count
        t.sig = sig
        self.count += 1
        return t

    def input(self, real: Tensor) -> Traced:
        """A new input with the signature of ``real``."""
        check_kind(real)
        return self.input_like(signature(real))

    def input_like(self, sig: Sig) -> Traced:
        """A new input of this signature."""
        self.inputs.append(sig)
        self.arguments.append(self.new(sig))
        return self.arguments[-1]

    def alias(self, t: Traced) -> Traced:
        """Another tensor object for the same value."""
        twin = self.new(t.sig)
        self.count -= 1
        twin.ref = t.ref
        return twin

    def lift(self, t: Tensor) -> int:
        """The number of an outside tensor: a constant by reference, or a value of an outer
        recording."""
        key = id(t)
        ref = self._lift_refs.get(key)
        if ref is None:
            self._keep.append(t)  # so that id(t) stays its own
            if t.__class__ is Traced and t.tracer.finished:
                check_leak(t)
                t = t.tracer.value(t)
            ordinary = ordinary_tensor(t)
            if (
                ordinary is not t and not self.may_ask_constants
            ):  # it would not be found again at the next call
                raise of_subclass(t, "a tensor from outside")
            check_kind(ordinary)
            if ordinary.__class__ is not Traced and not ordinary.is_inference():
                self.versions.append((ordinary, ordinary._version))
            self.lifted.append(ordinary)
            ref = self._lift_refs[key] = -len(self.lifted)
        return ref

    def stand_for(self, t: Traced, real: Tensor) -> None:
        """Let ``t``, an input, be what is recorded where ``f`` reaches ``real`` by another way: it
        closes over it."""
        self._lift_refs[id(real)] = t.ref

    def seen_as(self, t: Tensor) -> int | None:
        """The number of an outside tensor, or of the argument that it is, if it has one."""
        return self._lift_refs.get(id(t))

    def ref_of(self, t: Tensor) -> tuple[int, Sig]:
        if t.__class__ is Traced and t.tracer is self:
            return t.ref, t.sig
        ref = self.lift(t)
        if ref >= 0:
            return ref, self._unchanged(ref)
        return ref, signature(self.lifted[-ref - 1])

    def _unchanged(self, ref: int) -> Sig:
        """The signature of an argument that ``f`` reaches from outside, too: there it is what it
        was."""
        now = self.arguments[ref] if self.arguments else None
        if now is not None and (now.ref, now.sig) != (ref, self.inputs[ref]):
            raise CaptureError(
                f"an argument of shape {list(self.inputs[ref].shape)} that the function also "
                f"closes over is reshaped or detached in place{at(debug.user_line())}; make a "
                "view of it"
            )
        return self.inputs[ref]

    # ----- recording -----------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore
        if func.__class__ is not OpOverload:
            raise on_functions(func.__name__)
        if self.autograd.made:
            self.autograd.adopt_leaves()
        call = func._op  # hashes in C, which an overload does not
        special = SPECIAL.get(call)
        if special is not None:
            body = self.opened.get(func)
            done = (
                special(self, *args, **(kwargs or {}))
                if body is None
                else self._open(body, args, kwargs or {})
            )
            if done is not NotImplemented:
                return done
        key = [call]
        refs: list[int] = []
        sigs: list[Sig] = []
        add = key.append
        lifts, count = self.lifts_numbers and not kwargs, len(self.numbers)
        for a in args:
            cls = a.__class__
            if cls is Traced and a.tracer is self:
                refs.append(a.ref)
                add(a.sig)
                sigs.append(a.sig)
            elif lifts and (cls is float or cls is int) and generic(a) and has_number(func, args):
                refs.append(FIRST - len(self.numbers))
                self.numbers.append(a)
                add(cls)
                add(NUMBER)
                sigs.append(NUMBER)
            elif cls in SIMPLE:
                add(cls)
                add(a)
            elif cls is float:
                add(a.hex())
            else:
                encode(a, key, self._sink(refs, sigs))
        if kwargs:
            sink = self._sink(refs, sigs)
            for k, v in kwargs.items():
                add(k)
                encode(v, key, sink)
        env = env_key()
        add(env)
        frozen = tuple(key)
        instr = interned(frozen)
        if instr is None:
            instr = self._learn(frozen, func, args, kwargs or {}, tuple(sigs))
        if instr.number is None and len(self.numbers) > count:
            return self._with_literal(func, types, args, count)
        if env[0] is not self.dtype and follows_default(instr, kwargs or {}):
            return self._with_dtype(instr, types, args, kwargs or {})
        line = debug.user_line(2)
        self.records.append((instr, tuple(refs), _grad_enabled(), self.region, line))
        outs = instr.outs
        facts = instr.facts
        if facts.random:
            self.seeds.draw([instr])
        if facts.pure:
            if outs.__class__ is Sig:
                t = self.new(outs)
                if facts.factory or not refs:
                    self.autograd.made.append(weakref.ref(t))
                return t if _tangents_enabled() else self.without_tangents(t)
        elif facts.writes:
            self.mutates = True
            if func in OVERWRITES and not self.may_ask_constants and _grad_enabled():
                self.autograd.overwrite(refs)
            if facts.reshapes:
                self.reshapes = True
                self._check_reshaped(func, args[0], outs)
            return self._written(facts, outs, args, kwargs)
        elif facts.strided:
            self.strided = True
        results = self.wrap(outs, facts)
        return (
            results
            if _tangents_enabled() or facts.view_of is not None
            else self.without_tangents(results)
        )

    def _sink(self, refs: list[int], sigs: list[Sig]) -> Callable[[Tensor], tuple[Slot, Sig]]:
        """How to encode a tensor among the arguments."""

        def sink(t: Tensor) -> tuple[Slot, Sig]:
            ref, sig = self.ref_of(t)
            refs.append(ref)
            sigs.append(sig)
            return Slot(len(sigs) - 1), sig

        return sink

    def _with_dtype(self, instr: Instr, types: Any, args: tuple, kwargs: dict) -> Any:
        """An op under a default dtype that ``f`` has set, and under which its program does not
        run: it is told."""
        if "dtype" not in instr.facts.names:
            raise CaptureError(
                f"the dtype of {instr.op}'s result is the default dtype, which is another one "
                f"here than around the captured function{at(debug.user_line())}; convert its "
                "argument, say by .to(torch.get_default_dtype())"
            )
        return self.__torch_dispatch__(
            instr.op, types, args, {**kwargs, "dtype": instr.outs.dtype}
        )

    def _with_literal(self, op: OpOverload, types: Any, args: tuple, count: int) -> Any:
        """An op whose number cannot be an input."""
        del self.numbers[count:]
        self.lifts_numbers = False
        try:
            return self.__torch_dispatch__(op, types, args)
        finally:
            self.lifts_numbers = True

    def _open(self, body: Callable, args: tuple, kwargs: dict) -> Any:
        opened, self.opened = self.opened, {}
        try:
            with self:
                return body(*args, **kwargs)
        finally:
            self.opened = opened

    def _learn(
        self, key: tuple, func: OpOverload, args: tuple, kwargs: dict, sigs: tuple
    ) -> Instr:
        if "nested" in func._schema.name:
            raise CaptureError(
                f"nested tensors are not captured{at(debug.user_line())}: pad them, and use a "
                "mask where it matters"
            )
        count = 0

        def template(a: Any) -> Any:
            nonlocal count
            if isinstance(a, Tensor):
                count += 1
                return Slot(count - 1)
            if isinstance(a, list | tuple):
                return (
                    type(a)(template(x) for x in a)
                    if type(a) in (list, tuple)
                    else [template(x) for x in a]
                )
            return a

        targs = tuple(template(a) for a in args)
        tkwargs = {k: template(v) for k, v in kwargs.items()}
        outs = None
        facts = Facts(func)
        if facts.dynamic or not facts.returns_tensors:
            outs = self._by_value(func, targs, tkwargs, sigs, args, kwargs)
            key = (*key, outs)
            known = interned(key)
            if known is not None:
                return known
        try:
            if NUMBER in sigs:
                return with_number(key, func, args, sigs)
            return intern(key, func, targs, tkwargs, sigs, outs)
        except CaptureError as e:
            raise CaptureError(f"{e}{at(debug.user_line())}") from None
        except (RuntimeError, IndexError, TypeError, ValueError) as e:
            if facts.dynamic and outs is None:  # as was learnt by asking
                return self._learn(key, func, args, kwargs, sigs)
            said = f"{func}({', '.join(map(str, sigs))}): {e}{at(debug.user_line())}"
            raise OpError.like(e, said) from None

    def _by_value(
        self, func: OpOverload, targs: Any, tkwargs: Any, sigs: tuple, args: tuple, kwargs: dict
    ) -> Any:
        """The result's signature of an op whose shape depends on data: static if the meta kernel
        can, else by running."""
        try:
            return infer(func, targs, tkwargs, sigs)
        except Exception:
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        given = [zeros(sigs[0])] if func in SHAPED_BY_THE_OTHERS else []

        def shape(*values: Tensor) -> Any:
            values = (*given, *values)
            return signatures(
                func(*fill(targs, values), **{k: fill(v, values) for k, v in tkwargs.items()})
            )

        what = f"the shape of {func}'s result" if Facts(func).returns_tensors else "a truth value"
        return self.answer(shape, tensors[len(given) :], what)

    def wrap(self, outs: Any, facts: Any = None) -> Any:
        """Traced values for signatures, in the same structure."""
        if outs.__class__ is Sig:
            return self.new(outs)
        if isinstance(outs, tuple):
            made = [self.wrap(o) for o in outs]
            return made if facts is not None and len(facts.same) == 1 else tuple(made)
        return outs

    def _written(self, facts: Any, outs: Any, args: tuple, kwargs: dict | None) -> Any:
        """Results of an op that writes: the written arguments themselves, refreshed where their
        metadata changed."""

        if not (_tangents_enabled() or torch.is_inference_mode_enabled()):
            raise CaptureError(
                "a write where forward-mode derivatives are switched "
                f"off{at(debug.user_line(3))}: assign a new tensor"
            )

        def argument(i: int) -> Any:
            return args[i] if i < len(args) else (kwargs or {}).get(facts.names[i])

        if self.hooked:
            self._keep_hooked([argument(i) for i in facts.writes])
        if _grad_enabled():
            given, to = (
                tree_leaves((args, kwargs)),
                tree_leaves([argument(i) for i in facts.writes]),
            )
            histories.keep_off(self, facts, [t for t in given if isinstance(t, Tensor)], to)
        single = not isinstance(outs, tuple)
        results = []
        for sig, same in zip((outs,) if single else outs, facts.same, strict=False):
            if same is None:
                results.append(self.wrap(sig))
                continue
            t = argument(same)
            if (
                t.__class__ is Traced
                and t.ref in self.autograd.protected
                and t.tracer is self
                and _grad_enabled()
            ):
                raise RuntimeError(
                    "a leaf Variable that requires grad is being used in an in-place "
                    f"operation{at(debug.user_line(3))}"
                )
            if sig.__class__ is Sig and sig.shape != tuple(t.shape) and not facts.reshapes:
                raise CaptureError(
                    f"out= has the shape {list(t.shape)}, the result has "
                    f"{list(sig.shape)}{at(debug.user_line(3))}; resizing is not captured: pass a "
                    "tensor of the result's shape"
                )
            if (
                t.__class__ is Traced
                and t.tracer is self
                and sig is not t.sig
                and sig.__class__ is Sig
            ):
                self.refresh(t, sig)
            results.append(t)
        return results[0] if single and results else tuple(results) if results else None

    def _check_reshaped(self, op: OpOverload, t: Tensor, new: Sig) -> None:
        """Refuse changes of a shape, in place, that the tensor outside or its memory would not
        follow."""
        name, line = op._schema.name.removeprefix("aten::"), at(debug.user_line(3))
        if t.__class__ is not Traced or t.tracer is not self:
            raise CaptureError(
                f"{name} changes the shape of a tensor from outside, of shape "
                f"{list(t.shape)}{line}; pass it as an argument, or make a view of it"
            )
        if not _grad_enabled() and t.ref >= len(self.inputs) and not t.is_leaf:
            raise CaptureError(f"{name} under no_grad{SHAPE_OF_GRADIENT}{line}")
        if name in ("set_", "resize_as_"):
            raise CaptureError(
                f"{name} gives a tensor the shape or memory of another{line}; assign a new tensor"
            )
        if name == "resize_" and self.autograd.requires_grad(t):
            raise RuntimeError(f"cannot resize variables that require grad{line}")
        if name == "resize_" and new.extent > t.sig.extent:
            raise CaptureError(
                f"{name} makes a tensor larger, by elements without a value{line}; make a new "
                "tensor"
            )

    def refresh(self, t: Traced, sig: Sig) -> None:
        """``t`` has other metadata from here on (``unsqueeze_``, a resized ``out=``)."""
        fresh = _wrapper(
            Traced,
            sig.shape,
            strides=sig.stride,
            storage_offset=sig.offset,
            dtype=sig.dtype,
            device=sig.device,
        )
        with quiet():
            torch._C.TensorBase.data.__set__(t, fresh)
        t.sig = sig

    def _keep_hooked(self, written: list) -> None:
        if any(
            t.__class__ is Traced and self.root(t.ref) in self.hooked for t in tree_leaves(written)
        ):
            line = at(debug.user_line(3))
            raise CaptureError(
                f"a write to an argument with a hook{line}: register the hook after it, on a new "
                "tensor"
            )

    def record(self, instr: Any, tensors: Sequence[Tensor]) -> Any:
        """Record a step of another layer (a nested program, a custom derivative); its results."""
        self.autograd.adopt_leaves()
        refs = tuple([self.ref_of(t)[0] for t in tensors])
        self.records.append((instr, refs, _grad_enabled(), self.region, debug.user_line(2)))
        if instr.mutates:
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
        """What an op returns where forward-mode derivatives are switched off."""
        if isinstance(results, tuple | list):
            return type(results)(map(self.without_tangents, results))
        if results.__class__ is not Traced or not results.sig.differentiable:
            return results
        sig, cut = results.sig, torch.ops.aotfunc.no_tangent.default
        key = (cut, sig)
        instr = interned(key) or intern(key, cut, (Slot(0),), {}, (sig,), sig)
        return self.note(instr, (results.ref,))

    def note(self, instr: Instr, refs: tuple[int, ...]) -> Any:
        """Record an op that the recording answers itself; its results."""
        self.records.append((instr, refs, _grad_enabled(), self.region, debug.user_line(2)))
        return self.wrap(instr.outs, instr.facts)

    def finish(self) -> None:
        """Nothing is recorded any more; traced values may live on, and go when their last user
        does."""
        self.finished = True
        self.autograd.settle()
        histories.take_back(self)
        self.finals = [t.ref for t in self.arguments]
        self.arguments.clear()
        self.casts.clear()
        self.autograd.finish()

    def forget(self, records: int, count: int) -> None:
        """Go back to when there were so many records and values."""
        del self.records[records:]
        self.count = count
        self._roots = None
        self.casts.clear()
        self.autograd.forget()
        if self._values is not None and self._values.done > records:
            self._values = None
        if self.followed is not None and self.followed.done > records:
            self.followed = None

    def key(self) -> tuple:
        """A key that is equal for recordings of the same ops, signatures and wiring."""
        memory = self.layout() if self.mutates else None
        if self.placed:
            records = tuple([r[:4] for r in self.records])
        else:
            records = tuple([(r[0].anywhere or r[0], r[1], r[2], r[3]) for r in self.records])
        return (
            len(self.inputs),
            *self.signatures(),
            records,
            memory,
            tuple(self.autograd.overwritten),
        )

    @property
    def placed(self) -> bool:
        """Whether it matters where in their storages the inputs begin: for writes, and for what
        counts from there."""
        return self.mutates or self.strided

    def signatures(self) -> list[Sig]:
        """Those of the inputs, then of the lifted tensors, as a program has them."""
        return self.as_placed([*self.inputs, *map(signature, self.lifted)])

    def as_placed(self, sigs: Sequence[Sig]) -> list[Sig]:
        """Signatures, at the beginning of a storage where it does not matter where in one they
        are."""
        return list(sigs) if self.placed else [s.start for s in sigs]

    def layout(self) -> tuple[Place, ...]:
        """For each input, then each lifted tensor: where it lies in memory."""
        if len(self.origins) != len(self.inputs):  # the inputs of a rule: nothing but values
            return tuple(Place(i, 0, None) for i in range(len(self.inputs) + len(self.lifted)))
        if self._places is None or len(self._places) != len(self.inputs) + len(self.lifted):
            dims = (
                None if self.samples is None else (*self.samples.dims, *[None] * len(self.lifted))
            )
            self._places = layout([*self.origins, *self.lifted], dims)
        return self._places

    def root(self, ref: int) -> int:
        """The value whose storage this one shares."""
        return self.roots().of.get(ref, ref)

    def roots(self) -> Roots:
        if self._roots is None:
            self._roots = Roots(
                len(self.inputs), [i for i, t in enumerate(self.origins) if t.is_conj()]
            )
        return self._roots.extended(self.records)

    def conjugated(self, ref: int) -> bool:
        """Whether this is a conjugate, or a view of one, which eager would not have computed
        yet."""
        return ref in self.roots().conjugates

    # ----- values on request ---------------------------------------------------------------------

    def value(self, t: Tensor, what: str = "the value of a tensor") -> Tensor:
        """The real value of ``t``: replay the recording on the concrete inputs."""
        return self.answer(lambda value: value, [t], what)

    def answer(self, question: Callable, tensors: Sequence[Tensor], what: str) -> Any:
        """``question(*values)`` for the real values of ``tensors``. Where there is one for each
        sample of a batch, all samples must give the same answer."""
        if not self.may_ask_constants and any(
            t.__class__ is not Traced and not self._made(t) for t in tensors
        ):
            raise refusal(what)
        values = [self._known(t) for t in tensors]
        if any(v is None for v in values):
            inner = (
                tensors[0].tracer if len(tensors) == 1 and tensors[0].__class__ is Traced else self
            )
            if inner.ask is None:
                raise inner.unanswered(what)
            return inner.ask(inner, question, tensors, what)
        with quiet(), torch.no_grad():
            return question(*values)

    def unanswered(self, what: str) -> CaptureError:
        reason = self.why_not or "this value belongs to a capture that is over"
        return CaptureError(
            f"{what} was asked for, but {reason}{at(debug.user_line())}. Return it from the "
            "function (has_aux=True), use torch.where instead of `if`, or pass the value as a "
            "Python argument."
        )

    def _made(self, t: Tensor) -> bool:
        """Whether ``f`` makes this tensor anew on each run, always the same."""
        return self._lift_refs.get(id(t)) in self.made_inside

    def _known(self, t: Tensor) -> Tensor | None:
        """The value of ``t`` if it depends on nothing but known inputs."""
        if t.__class__ is Traced and t.tracer is not self:
            return t.tracer._known(t)
        ref = t.ref if t.__class__ is Traced else self._lift_refs.get(id(t))
        if ref is None or (t.__class__ is not Traced and not self.mutates):
            return t
        if self.finished and self.concrete_inputs is None:
            return None
        self.answered = True
        if self._values is None:
            self._values = Replay(self)
        return self._values.value(self, ref)


def on_functions(name: str) -> CaptureError:
    """The refusal of an operator that takes functions: torch.cond, while_loop, scan, map,
    flex_attention, …"""
    return CaptureError(
        f"{name} calls functions that are given to it, which is not "
        f"captured{at(debug.user_line())}. Write it with torch.where, a Python `if` or a Python "
        "loop; attention by scaled_dot_product_attention with a mask"
    )


SHAPE_OF_GRADIENT = (
    " changes the shape of a tensor whose gradient would keep the old one; make a view of it"
)

#: writes after which nothing is left of the derivative of what they write to
OVERWRITES = frozenset(
    getattr(packet, name)
    for packet in (
        aten.copy_,
        aten.zero_,
        aten.fill_,
        aten.eq_,
        aten.ne_,
        aten.lt_,
        aten.le_,
        aten.gt_,
        aten.ge_,
    )
    for name in packet.overloads()
)

#: ops whose result has a shape that depends on the values of all tensors but the first
SHAPED_BY_THE_OTHERS = (aten.index.Tensor, aten._unsafe_index.Tensor, aten.masked_select.default)


def follows_default(instr: Instr, kwargs: dict) -> bool:
    """Whether the dtype of the result is the default dtype: that of a factory, or of an op on
    integers."""
    outs = instr.outs
    made = (
        outs.__class__ is Sig
        and outs.differentiable
        and not any(s.differentiable for s in instr.sigs)
    )
    return made and kwargs.get("dtype") is None


def signature(t: Tensor) -> Sig:
    """The signature of a tensor from outside, or of a value of any recording."""
    return t.sig if t.__class__ is Traced else sig_of(t)


def zeros(sig: Sig) -> Tensor:
    """A tensor of this signature, one zero everywhere."""
    with quiet():
        return torch.zeros((), dtype=sig.dtype, device=sig.device).expand(sig.shape)
