"""The contents of a recording: its inputs, the tensors from outside, its ops, and the numbers of
its values.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from .. import debug
from ..debug import at
from ..errors import AotfuncError, CaptureError
from . import histories
from .above import above
from .autograd import Autograd
from .kinds import check_kind, innermost, of_subclass, ordinary_tensor
from .memory import MemoryPlace, places_of, version
from .records import Record, Roots
from .seeds import Seeds
from .shapes.sig import Sig, sig_of
from .traced import Traced, check_leak, under_way

if TYPE_CHECKING:
    from .following import Following
    from .replay import Replay

_wrapper = torch.Tensor._make_wrapper_subclass
_inference_mode, _of_inference_mode = torch.is_inference_mode_enabled, Tensor.is_inference
_ref_of, _offset_of, _version_of = map(attrgetter, ("ref", "offset", "_version"))


class Tape:
    """The contents of one recording. Inputs are numbered 0, 1, …, then results in order; lifted
    outside tensors -1, -2, …

    ``concrete_inputs`` are the real inputs whose values may be asked for (``.item()``), None for
    samples of a batch, which ``samples`` describes; ``why_not`` is the reason if they may not be
    asked for. Values that depend on no input may be asked for all the same, those of closed-over
    tensors with ``constants`` only. Without ``intent`` autograd is ignored (derived rules use
    it). ``ask(trace, question, tensors, what)`` answers questions about values that depend on
    inputs."""

    # (an instance that has more than 30 attributes in a dictionary is slow to make)
    __slots__ = (
        *("may_ask_constants", "keeps_intent", "of_a_rule", "records", "inputs", "arguments"),
        *("lifted", "numbers", "following", "_lift_refs", "_keep", "rewritten", "versions"),
        *("autograd", "seeds", "caches_casts", "ask", "dtype", "origins", "why_not", "count"),
        *("deferred", "__dict__"),
    )

    depth = 0  # of the mode stack inside of this recording
    lifts_numbers = False  # see scalars
    rolls = False  # records recurrent layers as loops
    mutates = False
    strided = False  # has ops whose offset counts from the storage
    runs_always = False  # has unseen effects: runs anew at every call
    reshapes = False  # in place
    region: Any = None  # the checkpointed region that is being recorded
    regions = 0
    concrete_inputs: list[Tensor | None] | None = None
    samples: Any = None
    #: functions whose batching rules its program asks for: no cache keeps them
    owners: frozenset = frozenset()
    _values: Replay | None = None
    followed: Any = None  # see capture/followed.py
    looked_at: Any = None  # see capture/function_vmap.py
    _roots: Roots | None = None
    _places: tuple[MemoryPlace, ...] | None = None
    finished = False
    last_versions: Sequence[int] = ()  # of the inputs and lifted tensors, when it ended
    refused: AotfuncError | None = None  # the error of a question without an answer
    place: tuple | None = None  # the index asked for its number, see special
    taken: tuple | None = None  # the view x[index] taken last, see places.is_last_taken
    expanded: tuple | None = None  # the matrix that has become a batch last, see folding
    in_lstsq = False
    dtensors = False  # whether it may have DTensors
    #: input or lifted tensor that gets other memory (`x.data = y`) -> its value there, the value
    #: that was made with that memory, and the place in it; None: refused
    rebound: dict[int, tuple[int, int, Sig]] | None = None
    #: of a compiled function: ids of the tensors from outside whose ``.grad`` each call looks at
    graded: Collection[int] | None = None
    misses_gradients = False  # the function has asked for another one's
    #: values whose graph a ``.backward()`` has freed, and results that are these, detached
    spent: tuple[int, ...] = ()
    detached: tuple[int, ...] = ()
    gathering: Any = None  # what FSDP2's modules have gathered, see capture.gathering
    # what few recordings have is made where it is needed
    finals: Sequence[int] = ()  # the refs of the inputs' tensors at the end
    #: lifted tensors that f makes anew on each run: torch.tensor(3)
    made_inside: frozenset[int] = frozenset()
    stand_ins: tuple[Any, ...] = ()  # see outside.py
    #: functions that autograd calls after the function is over; names by which they read values
    late: tuple[Any, ...] = ()
    casts: dict[tuple[int, torch.dtype], Tensor] = {}  # see casts.py
    casts_left: tuple[tuple[int, torch.dtype], ...] = ()  # which outer regions hold at the end
    hooked: frozenset[int] = frozenset()  # refs of inputs with recorded hooks
    #: hooks that each call registers on an input: (input, handle)
    given_hooks: tuple[tuple[int, Any], ...] = ()
    #: hooks of inner values that each call gives to autograd; None: hooks are recorded
    live_hooks: list[Any] | None = None
    #: input or lifted tensor whose gradient was taken -> the user's line
    differentiated: Mapping[int, str] = {}
    named: dict[int, str] = {}  # record -> the user's name for its result
    #: op -> the decomposition to record in place of SPECIAL's answer
    opened: Mapping[OpOverload, Callable] = {}

    def __init__(
        self,
        why_not: str | None = None,
        constants: bool = True,
        intent: bool = True,
        ask: Callable | None = None,
    ) -> None:
        # (TorchDispatchMode makes its flags when it is entered)
        outer = traces[-1] if (traces := under_way.traces) else None
        #: false at any depth inside a function compiled once
        self.may_ask_constants: bool = constants and (outer is None or outer.may_ask_constants)
        self.keeps_intent = intent
        #: its program is a rule's, which any of its values may differentiate
        self.of_a_rule: bool = outer is not None and outer.of_a_rule
        self.records: list[Record] = []
        #: signatures: traced values know their recording, which must not hold them when it is over
        self.inputs: list[Sig] = []
        self.count = 0  # of values
        self.arguments: list[Traced] = []  # the tensors, until the recording is over
        self.lifted: list[Tensor] = []  # outside tensors, by reference
        self.numbers: list[float] = []  # Python numbers that may be inputs
        self.following: Following | None = None if outer is None else outer.following
        self._lift_refs: dict[int, int] = {}
        self._keep: list[Tensor] = []
        #: outside tensors that have a history only while recording
        self.rewritten: list[Tensor] = []
        #: outside tensors, in the order of their first use, and their versions then
        self.versions: list[tuple[Tensor, int]] = []
        self.autograd = Autograd(self.inputs, self.lifted, self.records, self.rewritten)
        self.deferred: list[Any] = []  # backwards that are recorded later, see deferred.py
        self.seeds = Seeds()
        self.caches_casts: bool = torch.is_autocast_cache_enabled()
        self.why_not, self.ask = why_not, ask
        self.dtype: torch.dtype = torch.get_default_dtype() if outer is None else outer.dtype
        self.origins: list[Tensor] = []  # the tensors behind the inputs

    def new(self, sig: Sig) -> Traced:
        if _inference_mode():
            self.autograd.inference.add(self.count)
            # a traced value of inference mode could not be a view of an argument
            with torch.inference_mode(False):
                return self.new(sig)
        t = _wrapper(Traced, *sig.form)
        t.tracer, t.sig, t.ref = self, sig, self.count
        self.count += 1
        return t

    def input(self, real: Tensor) -> Traced:
        """Return a new input with the signature of ``real``."""
        check_kind(real, self.dtensors)
        return self.input_like(signature(real))

    def input_like(self, sig: Sig) -> Traced:
        """Return a new input of this signature."""
        self.inputs.append(sig)
        t = self.new(sig)
        self.arguments.append(t)
        return t

    def alias(self, t: Traced) -> Traced:
        """Return another tensor object for the same value."""
        twin = self.new(t.sig)
        self.count -= 1
        twin.ref = t.ref
        return twin

    def lift(self, t: Tensor) -> int:
        """Return an outside tensor's number: a constant, or an outer recording's value."""
        key = id(t)
        ref = self._lift_refs.get(key)
        if ref is None:
            self._keep.append(t)  # no other tensor may get id(t)
            if t.__class__ is Traced and t.tracer.finished and not stands_around(t):
                check_leak(t)
                t = above("leaked_value", t)
            check_levels(t)
            ordinary = ordinary_tensor(t)
            # the next call would not find it
            if ordinary is not t and not self.may_ask_constants:
                raise of_subclass(t, "a tensor from outside")
            check_kind(ordinary, self.dtensors)
            if ordinary.__class__ is not Traced and not ordinary.is_inference():
                self.versions.append((ordinary, ordinary._version))
            self.lifted.append(ordinary)
            ref = self._lift_refs[key] = -len(self.lifted)
        return ref

    def outside_value(self, t: Tensor) -> Traced:
        """Return an outside tensor as a value."""
        ref = self.lift(t)
        twin = self.new(self._unchanged(ref) if ref >= len(self.inputs) else signature(t))
        self.count -= 1
        twin.ref = ref
        return twin

    def stand_for(self, t: Traced, real: Tensor) -> None:
        """Let ``t`` stand for ``real``, which ``f`` also reaches by closing over it."""
        self._lift_refs[id(real)] = t.ref

    def seen_as(self, t: Tensor) -> int | None:
        """Return the number of an outside tensor, or of an argument; None if it has none."""
        return self._lift_refs.get(id(t))

    def ref_of(self, t: Tensor) -> tuple[int, Sig]:
        if t.__class__ is Traced and t.tracer is self:
            return t.ref, t.sig
        ref = self.lift(t)
        if ref >= 0:
            return ref, self._unchanged(ref)
        return ref, signature(self.lifted[-ref - 1])

    def _unchanged(self, ref: int) -> Sig:
        """Return the signature of an argument that ``f`` also closes over, or of one with other
        memory. Refuse it if ``f`` changed its metadata, which closed-over tensors do not show."""
        if ref >= len(self.inputs):
            return next(s.start for now, _, s in (self.rebound or {}).values() if now == ref)
        now = self.arguments[ref] if self.arguments else None
        if now is not None and (now.ref, now.sig) != (ref, self.inputs[ref]):
            raise CaptureError(
                f"an argument of shape {list(self.inputs[ref].shape)} that the function also "
                f"closes over is reshaped or detached in place{at(debug.user_line())}; make a "
                "view of it"
            )
        return self.inputs[ref]

    def settle(self) -> None:
        """Record the deferred backwards now: a gradient is taken, or the recording ends."""
        for waiting in self.deferred:
            waiting.settle()

    def finish(self) -> None:
        """End the recording; traced values live on while they are referenced."""
        self.finished = True
        if self.lifted or self.rewritten:
            self.autograd.settle()
        if self.versions or self.rewritten:
            histories.take_back(self)
        if self.why_not is None and self.keeps_intent:
            given = self.origins + self.lifted if self.lifted else self.origins
            self.last_versions = (
                [0 if t.__class__ is Traced else version(t) for t in given]
                if Traced in map(type, given) or any(map(_of_inference_mode, given))
                else [*map(_version_of, given)]
            )
        self.finals = [*map(_ref_of, self.arguments)]
        if self.stand_ins:  # an argument with a recorded hook keeps its value
            before = {s.new: s.value for s in self.stand_ins if s.hooks}
            self.finals = [before.get(r, r) for r in self.finals]
        self.arguments.clear()
        self.deferred.clear()
        self.late = ()
        if self.casts:
            self.casts_left, self.casts = tuple(self.casts), {}
        self.autograd.finish()

    def forget(self, records: int, count: int) -> None:
        """Cut the recording back to this many records and values."""
        del self.records[records:]
        self.named = {k: name for k, name in self.named.items() if k < records}
        self.deferred = [d for d in self.deferred if d.record < records]
        self.count = count
        self._roots = None
        self.casts = {}
        self.autograd.forget()
        if self._values is not None and self._values.done > records:
            self._values = None
        if self.followed is not None and self.followed.done > records:
            self.followed = None
        self.looked_at = self.taken = None

    def key(self) -> tuple:
        """Return a key that is equal for recordings of the same ops, signatures and wiring."""
        memory = self.layout() if self.mutates else None
        if self.mutates or self.strided:
            records = tuple([r[:4] for r in self.records])
        else:
            records = tuple(
                [(i.anywhere or i, refs, on, where) for i, refs, on, where, _ in self.records]
            )
        return (
            len(self.inputs),
            *self.signatures(),
            records,
            memory,
            tuple(self.autograd.overwritten),
            tuple(self.named.items()),
        )

    @property
    def placed(self) -> bool:
        """Return whether inputs' storage offsets matter: by writes, or ops that count so."""
        return self.mutates or self.strided

    def signatures(self) -> list[Sig]:
        """Return the signatures of the inputs, then of the lifted tensors, as a program expects
        them."""
        return self.as_placed([*self.inputs, *map(signature, self.lifted)])

    def as_placed(self, sigs: Sequence[Sig]) -> list[Sig]:
        """Return the signatures, with storage offset 0 if the program does not depend on it."""
        if self.mutates or self.strided or not any(map(_offset_of, sigs)):
            return list(sigs)
        return [s.start for s in sigs]

    def layout(self) -> tuple[MemoryPlace, ...]:
        """Return the place in memory of each input, then of each lifted tensor."""
        if len(self.origins) != len(self.inputs):  # a rule's inputs share no memory
            return tuple(
                MemoryPlace(i, 0, None) for i in range(len(self.inputs) + len(self.lifted))
            )
        if self._places is None or len(self._places) != len(self.inputs) + len(self.lifted):
            dims = (
                None if self.samples is None else (*self.samples.dims, *[None] * len(self.lifted))
            )
            self._places = places_of([*self.origins, *self.lifted], dims)
        return self._places

    def kin(self, ref: int) -> set[int]:
        """Return the tensors from outside that autograd knows as views of the same tensor as the
        one that ``ref`` shows, and that overlap with it."""
        root, count = self.root(ref), len(self.inputs)
        if root >= count or count + len(self.lifted) < 2:
            return set()
        places = self.layout()
        group, _, _, kin = places[self.position(root)]
        return {self.ref_at(i) for i, p in enumerate(places) if (p.group, p.kin) == (group, kin)}

    def given_refs(self) -> list[int]:
        """Return the numbers of a program's placeholders: inputs, then lifted tensors."""
        return [*range(len(self.inputs)), *range(-1, -1 - len(self.lifted), -1)]

    def foreign(self) -> list[Tensor]:
        """Return the lifted tensors that ``f`` has not made itself, as it reads them."""
        return [t for i, t in enumerate(self._keep) if -1 - i not in self.made_inside]

    def position(self, ref: int) -> int:
        """Return the position of an input or lifted tensor among the program's placeholders."""
        return ref if ref >= 0 else len(self.inputs) - 1 - ref

    def ref_at(self, position: int) -> int:
        """Return the number of the tensor at this position."""
        count = len(self.inputs)
        return position if position < count else count - 1 - position

    def root(self, ref: int) -> int:
        """Return the value whose storage the value ``ref`` shares."""
        return self.roots().of.get(ref, ref)

    def roots(self) -> Roots:
        if self._roots is None:
            self._roots = Roots(
                len(self.inputs), [i for i, t in enumerate(self.origins) if t.is_conj()]
            )
        return self._roots.extended(self.records)

    def of_inference_mode(self, ref: int) -> bool:
        """Return whether eager's tensor was made in inference mode: an argument or a tensor from
        outside by itself, any other value where the function switched the mode on."""
        root = self.root(ref)
        if root < 0:
            return self.lifted[-root - 1].is_inference()
        if root < len(self.origins):
            return self.origins[root].is_inference()
        return root in self.autograd.inference

    def conjugated(self, ref: int) -> bool:
        """Return whether ``ref`` is a conjugate, or its view, which eager would hold lazily."""
        return ref in self.roots().conjugates


def check_levels(t: Tensor) -> None:
    """Refuse a recorded value that torch.func follows: it would lose its derivative."""
    inner = innermost(t)
    if inner is not t and inner.__class__ is Traced:
        raise CaptureError(
            "a call of a Function, a loop, a transform or a compiled function in a transform of "
            f"torch.func's that is captured itself{at(debug.user_line())}: its derivative would "
            "be lost; use aotfunc's transform there"
        )


def stands_around(t: Tensor) -> bool:
    """Return whether a recording under way has a number for ``t``."""
    return any(trace.seen_as(t) is not None for trace in under_way.traces)


def signature(t: Tensor) -> Sig:
    """Return the signature of a tensor from outside, or of a value of any recording."""
    return t.sig if t.__class__ is Traced else sig_of(t)
