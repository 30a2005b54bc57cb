"""The choice of an entry for a call of a compiled function, and how long entries are kept.

A :class:`Compiled` function is captured once per signature (:mod:`.entry`), and looks its entry up
by the signature of the call (:mod:`.guards`)."""

from __future__ import annotations

import copyreg
import functools
import sys
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..cache import Cache
from ..capture.calls import CompiledStep
from ..capture.capture import labelled
from ..capture.instances import containers
from ..capture.tree import Arguments
from ..debug import at, outside_dynamo, user_line
from ..errors import ArgumentError, CaptureError
from ..graph import weight
from ..trace.entering import entry, modes_are_on, without_function_modes
from ..trace.kinds import check_argument
from ..trace.memory import whereabouts
from ..trace.modes import OTHERS, function_modes_key, is_exporting
from ..trace.seeds import of_python, rewinder
from ..trace.traced import current
from .changing import Family, with_any_numbers
from .entry import Entry, captured_entry
from .guards.explain import Explanation, Facts, History, explained
from .guards.keys import describe_argument, environment_key, first_alike, reached_tensors
from .guards.reads import MoreState, Names
from .guards.state import State, look
from .guards.stores import undo_changes, undo_stores
from .lowering import Lowered
from .pipeline import Pipeline, title
from .raised import fail, refused
from .redraw import undrawn
from .repeated import OTHER, repeated_call

#: limits for one function: nodes of graphs, and signatures, kept; and captures before a warning
NODES, LIMIT, WARN_AT = 1 << 15, 1024, 64

#: all compiled functions, for clear_compile_cache
EVERY: weakref.WeakSet[Compiled] = weakref.WeakSet()


def weight_of(entry: Entry) -> int:
    return max(weight((entry.call, entry.call.plain)), NODES // LIMIT)


def describe_call(args: tuple, kwargs: dict) -> tuple[tuple, list[Tensor], list[Any]]:
    """Return a call's key without what its function reads; the tensors and objects in it."""
    parts: list = [len(args)]
    tensors: list[Tensor] = []
    objects: list[Any] = []
    for a in args:
        describe_argument(a, parts, tensors, objects)
    if kwargs:
        describe_argument(kwargs, parts, tensors, objects)
    if len(tensors) > 1 and (same := first_alike(tensors)) is not None:
        parts.append((same, first_alike(containers((args, kwargs)))))
    return (*parts, *environment_key()), tensors, objects


class Compiled:
    """A function compiled by two compilers; see :func:`jit` and :func:`aot_function`."""

    def __init__(self, f: Callable, pipeline: Pipeline) -> None:
        if not callable(f) and not isinstance(f, classmethod):
            raise ArgumentError(
                f"{pipeline.name}: {f!r} is not a function (options have names: "
                "backend='inductor')"
            )
        self.binds = type(f)
        if isinstance(f, staticmethod | classmethod):
            f = f.__func__
        functools.update_wrapper(
            self, f, updated=("__dict__",) if isinstance(f, types.FunctionType) else ()
        )
        self.f, self.pipeline, self.name = f, pipeline, pipeline.name
        self.entries = Cache(NODES, weight_of)
        self._recent = Cache(NODES, weight_of)  # the entry last used for arguments like these
        self._families = Cache(LIMIT)  # calls that differ in Python numbers alone
        self._repeated: Callable[[tuple, dict], Any] | None = None  # for a call like the last one
        #: entries that differ in Python numbers that are inputs of their program share one
        self._steps: weakref.WeakValueDictionary[tuple, CompiledStep] = (
            weakref.WeakValueDictionary()
        )
        self._names = Names()
        self.captures = 0  # how often f has been captured, for all signatures
        self._history = History()
        EVERY.add(self)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        instance = owner if self.binds is classmethod else instance
        free = instance is None or self.binds is staticmethod
        return self if free else types.MethodType(self, instance)

    def __repr__(self) -> str:
        count = len(self.entries)
        entries = "1 entry" if count == 1 else f"{count} entries"
        return f"<{self.name} of {title(self.f)}, {self.pipeline}: {entries}>"

    # ----- copying and pickling: what was captured stays behind ----------------------------------

    def __reduce__(self) -> Any:
        """Pickle by name if the name is bound to this function, else by its parts."""
        new = copyreg.__newobj__  # type: ignore[attr-defined]
        found: Any = sys.modules.get(getattr(self, "__module__", None) or "")
        for name in getattr(self, "__qualname__", "").split("."):
            found = getattr(found, name, None)
        return self.__qualname__ if found is self else (new, (Compiled,), (self.f, self.pipeline))

    def __setstate__(self, parts: tuple) -> None:
        Compiled.__init__(self, *parts)

    # ----- calling -------------------------------------------------------------------------------

    @outside_dynamo
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if modes_are_on():
            if is_exporting():
                return self.f(*args, **kwargs)
            return without_function_modes(self, *args, **kwargs)
        if self._repeated is not None:
            result = self._repeated(args, kwargs)
            if result is not OTHER:
                return result
        key, tensors, objects = describe_call(args, kwargs)
        try:
            entry = self._recent.get(key)
        except TypeError:
            raise self.unhashable(Arguments(args, kwargs)) from None
        if entry is not None:
            if entry.repeated is not None and entry.repeated is not self._repeated:
                self._repeated = entry.repeated
                result = entry.repeated(args, kwargs)
                if result is not OTHER:
                    return result
            found = entry.check.tensors(self.f, objects)
            if found is not None and entry.shared.again(tensors, found):
                closed = [*tensors, *entry.closed(found)]
                if entry.whereabouts is None or entry.whereabouts == whereabouts(closed):
                    if entry.repeated is None:
                        entry.repeated = repeated_call(
                            self.f, entry, tensors, found, (args, kwargs)
                        )
                    self._repeated = entry.repeated
                    return entry(closed, self.f, objects, (args, kwargs))
        return self.looked_up(key, tensors, objects, (args, kwargs))

    @entry
    def looked_up(
        self, key: tuple, tensors: list[Tensor], objects: list[Any], given: tuple
    ) -> Any:
        """Run the entry of a call that the last one does not fit; ``given``: the arguments."""
        if torch._C._get_tracing_state() is not None:  # the shapes of arguments are tensors
            raise CaptureError(
                f"torch.jit.trace does not trace {self.who}{at(user_line())}; trace the function "
                "that it was made from (.__wrapped__)"
            )
        alike, values = with_any_numbers(key)
        family = self._families.get(alike) if values and current() is None else None
        if family is not None:
            found = self.with_other_numbers(family, values, tensors, objects, given)
            if found is not None:
                return found[0]
        arguments, labels, state, full = self.seen(key, tensors, objects, given)
        entry = self.entries.get(full)
        if entry is not None and entry.whereabouts is not None:
            now = whereabouts([*tensors, *entry.closed(state.tensors)])
            # the reach of a write depends on which arguments share memory
            if entry.whereabouts != now:
                full = (*full, now)
                entry = self.entries.get(full)
        if entry is not None and entry.held is not None and not entry.held.require(state):
            entry = None
        if entry is not None:
            entry.check.renew(state)
            entry.repeated = None
            self._recent.put(key, entry)
            return entry([*tensors, *entry.closed(state.tensors)], self.f, objects, given)
        for t in tensors:
            check_argument(t, current() is None, self._names.all)
        before, learnt, rewind = of_python(), self._names.learnt, rewinder()
        more = False
        try:
            self.captures += 1
            entry, new = captured_entry(
                self, arguments, tensors, given, state, key, values, family
            )
            drew = of_python() != before
            if entry.inlined:  # it changes what it changes now
                undo_changes(state)
            with undrawn(entry.call):
                result = entry([*tensors, *entry.closed(state.tensors)], self.f, objects, given)
            if entry.gradients is not None:
                torch._C._set_grad_enabled(entry.gradients)
        except MoreState:
            self.captures -= 1
            undo_changes(state)
            rewind()
            more = True
        except BaseException as e:
            # an error of the function's own leaves what it did to numbers and texts, as in eager
            (undo_changes if refused(e) else undo_stores)(state)
            raise
        if more:  # is known to be asked for now
            return self.looked_up(key, tensors, objects, given)
        if entry.error is not None:
            fail(entry, result)
        after = look(self.f, objects, labels, self._names)
        # more functions ran than were known to, so more may be read
        known = learnt == self._names.learnt
        differs = known and after.key != state.key
        changed = (dict(state.facts), dict(after.facts)) if differs else None
        self._history.changed = changed
        # a function that changes the state it reads is captured at every call, until it stops
        # doing so
        again = known and changed is None and not drew and function_modes_key() is not OTHERS
        if entry.reusable and again:
            if values and current() is None and family is None:
                self._families.put(alike, Family(values))
            self.store(full, entry, state)
        if new or not again:
            self.watch_growth(entry.facts)
        return result

    def seen(
        self, key: tuple, tensors: list[Tensor], objects: list[Any], given: tuple
    ) -> tuple[Arguments, list[str], State, tuple]:
        """Return a call's arguments, names of ``objects``, the state read, and the key."""
        arguments = Arguments(*given)
        names = {id(x): name for name, x in zip(*labelled(self.f, arguments), strict=True)}
        labels = [
            x.__qualname__ if isinstance(x, type) else f"argument {names.get(id(x), '')}"
            for x in objects
        ]
        state = look(self.f, objects, labels, self._names)
        for x in objects:
            if type(x).__hash__ is None and any(x is o for o in state.opaque):
                raise self.unhashable(arguments)
        full = (key, reached_tensors(tensors, state.tensors), *state.key)
        return arguments, labels, state, full

    @entry
    def lower(self, *args: Any, **kwargs: Any) -> Lowered:
        """Return the function captured for arguments like these, and not called: its graphs, what
        they cost, and :meth:`~aotfunc.runtime.lowering.Lowered.compile`, ahead of the first call.
        The capture runs the function's Python code; what that binds or adds outside is undone.
        Raises what a first call raises.

        >>> low = jit(lambda x: torch.sin(x) * 2).lower(torch.ones(3))
        >>> print(low.code)
        def forward(self, x):
            sin = torch.ops.aten.sin.default(x);  x = None
            mul = torch.ops.aten.mul.Tensor(sin, 2);  sin = None
            return (mul,)
        >>> low.memory_analysis()
        {'arguments': 12, 'results': 12, 'function peak': 24}
        """
        given = (args, kwargs)
        key, tensors, objects = describe_call(*given)
        arguments, _, state, full = self.seen(key, tensors, objects, given)
        found = self.entries.get(full)
        if found is None:
            for t in tensors:
                check_argument(t, True, self._names.all)
            self.captures += 1
            try:
                found, _ = captured_entry(
                    self, arguments, tensors, given, state, key, [], None, may_fail=False
                )
            except MoreState:
                self.captures -= 1
            finally:
                undo_changes(state)
            if found is None:
                return self.lower(*args, **kwargs)
            self.store(full, found, state)
        return Lowered(self, found, [*tensors, *found.closed(state.tensors)])

    def with_other_numbers(
        self,
        family: Family,
        values: list[float],
        tensors: list[Tensor],
        objects: list[Any],
        given: tuple,
    ) -> tuple | None:
        """Return the result (in a tuple) of an entry that was captured for other numbers."""
        for kept, inputs in family.serving(values):
            found = kept.check.tensors(self.f, objects)
            if found is None or not kept.shared.again(tensors, found):
                continue
            closed = [*tensors, *kept.closed(found)]
            for i, t in inputs:
                closed[len(tensors) + i] = t
            if kept.whereabouts is None or kept.whereabouts == whereabouts(closed):
                return (kept(closed, self.f, objects, given),)
        return None

    def unhashable(self, arguments: Arguments) -> ArgumentError:
        """Return the error for an argument that cannot be part of a key."""
        for name, x in zip(*labelled(self.f, arguments), strict=True):
            try:
                hash(x)
            except TypeError as e:
                what = f"{self.name}: the argument {name} is neither a tensor nor hashable ({e})"
                return ArgumentError(
                    f"{what}{at(user_line(4))}; pass it as a tensor, or as a tuple of numbers"
                )
        return ArgumentError(
            f"{self.name}: something that the function reaches is not hashable, or an argument's "
            f"sizes are symbolic{at(user_line(4))}"
        )

    def store(self, full: tuple, entry: Entry, state: State) -> None:
        """Keep an entry as long as the objects live that its key names by ``id``."""
        mine = weakref.ref(self)

        def drop(_: Any) -> None:
            compiled = mine()
            if compiled is not None:
                compiled.drop(full)

        for x in state.opaque:
            try:
                entry.kept.append(weakref.ref(x, drop))
            except TypeError:
                entry.kept.append(x)
        self.entries.put(full, entry)
        self._recent.put(entry.key, entry)
        if entry.family is not None and entry.served is not None:
            entry.family.keep(entry.served, entry)

    def drop(self, full: tuple) -> None:
        """Forget an entry."""
        entry, self._repeated = self.entries.pop(full), None
        if entry is not None and self._recent.get(entry.key) is entry:
            self._recent.pop(entry.key)

    def forget(self) -> None:
        """Drop all entries."""
        self.entries.clear()
        self._recent.clear()
        self._families.clear()
        self._repeated = None
        self.captures, self._history = 0, History()

    def watch_growth(self, facts: Facts) -> None:
        """Warn, once, of a function that is captured again and again, and name the cause."""
        why = self._history.growth(facts, WARN_AT)
        if why is not None:
            times = f"{self.captures} times{at(user_line())}"
            warnings.warn(f"{self.who} has been captured {times}: {why}", stacklevel=4)

    def titled(self) -> str:
        return f"{self.name}: {title(self.f)}"

    @property
    def who(self) -> str:
        return f"{self.name} of {title(self.f)}"

    def explain(self) -> Explanation:
        """Return a text that says what each entry depends on (a call with all of it equal uses the
        entry again), what had changed at the last capture, and what the backend runs eagerly.

        >>> rate = [0.5]
        >>> f = jit(lambda x: x * rate[0])
        >>> _ = f(torch.ones(3))
        >>> rate[0] = 0.25
        >>> _ = f(torch.ones(3))
        >>> f.explain()
        jit of <lambda>(x): captured 2 times, 2 entries
        entry 0:
          argument x: float32[3]
          <lambda> is <lambda> at <doctest ...>:1
          ...rate == (0.5,)
        entry 1:
          argument x: float32[3]
          <lambda> is <lambda> at <doctest ...>:1
          ...rate == (0.25,)
        captured last because:
          ...rate was (0.5,), and is (0.25,)
        """
        eagerly = {
            f"{half}: {what}: {e}"
            for half, found in self.pipeline.eagerly
            for what, e in found.items()
        }
        entries = [e.facts for e in self.entries.values()]
        return explained(self.who, self.captures, entries, self._history.why(), sorted(eagerly))
