"""Compiled functions: captured once per signature, partitioned, compiled, and differentiable to
any order.

A :class:`Compiled` function looks its entry up by the signature of the call (:mod:`.guards`). An
entry carries its program. Inside a capture a call of it is one node that transforms rewrite;
outside it is one node of autograd (:mod:`.autograd`): forward half, saved residuals, backward
half."""

from __future__ import annotations

import copyreg
import functools
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

from ..cache import Cache
from ..capture.calls import CompiledCall, CompiledStep
from ..capture.capture import argument_names, as_called, capture, parameter_names
from ..capture.captured import Captured
from ..capture.instances import containers, remade
from ..capture.tree import Arguments, leaf_labels, unflatten
from ..debug import at, entry, outside_dynamo, user_line
from ..errors import ArgumentError, CaptureError
from ..graph import Program, kept_alive, weight
from ..trace.memory import whereabouts
from ..trace.modes import OTHERS, function_modes_key, without_modes
from ..trace.outside import check_hooks
from ..trace.seeds import of_python, states
from ..trace.traced import Traced, check_kind, current
from .aliasing import Changes, without_views
from .autograd import run
from .chains import as_recorded, chained
from .changing import Numbers
from .execute import run_eager
from .guards.check import Check
from .guards.explain import Explanation, Facts, differences, explained, facts_of, growth
from .guards.given import Given
from .guards.keys import Shared, describe_argument, environment_key, noted, reached, repeated
from .guards.reads import Names
from .guards.returned import Finish, recorded
from .guards.state import State, look
from .guards.stores import Place, left_behind, put_back
from .leaves import Leaves, made_in_inference_mode
from .pipeline import Pipeline, title

#: nodes of graphs, and signatures, kept of one function, and captures after which it is time to
# say that there are many
NODES, LIMIT, WARN_AT = 1 << 15, 1024, 64

#: all compiled functions, for clear_compile_cache
EVERY: weakref.WeakSet[Compiled] = weakref.WeakSet()


class Entry:
    """What was captured for one signature."""

    def __init__(
        self,
        rec: Captured,
        step: CompiledStep,
        views: Callable[..., tuple] | None,
        state: State,
        key: tuple,
        facts: Facts,
        enables: bool,
        finish: Finish,
        inside: Leaves,
    ) -> None:
        self.step, self.views, self.key, self.facts = step, views, key, facts
        self.call = call = step.call
        #: gradients were off, and the function turned them on in places: its marks say where
        self.enables = enables
        self.spec, self.tensors = rec.spec, rec.tensors
        # the structure with what is constant in it; what was traced, and the arguments, may go
        self.leaves = [None if i in rec.tensors else x for i, x in enumerate(rec.leaves)]
        changes = Changes(rec)
        self.changes = changes if changes else None
        self.inside = inside if inside else None
        self.inference = made_in_inference_mode(rec)
        count = len(rec.trace.inputs)
        self.differentiated = [
            (i if i >= 0 else count - 1 - i, line) for i, line in rec.trace.differentiated.items()
        ]
        self.idle = (
            not call.program.n_outputs
            and not call.program.mutated
            and not has_effects(call.program)
        )
        # closed-over tensors are inputs, found in the state; what f made itself, or hides from us,
        # is the entry's own
        found = {id(t): i for i, t in enumerate(state.tensors)}
        self.sources = [found.get(id(t), t) for t in rec.closed_over]
        known = len(self.sources) > 1 and all(s.__class__ is int for s in self.sources)
        self.pick = itemgetter(*self.sources) if known else None
        self.shared = Shared(rec.trace.origins, state.tensors)
        self.whereabouts = (
            whereabouts([*rec.trace.origins, *rec.closed_over]) if rec.trace.placed else None
        )
        # values of an outer recording are only good for that one
        self.reusable = not any(t.__class__ is Traced for t in self.sources)
        self.plain = rec.spec is None
        self.rebuild = rebuilder(rec.spec)
        self.check = Check(state)
        self.finish = finish or None
        self.kept: list[Any] = []
        #: its key whatever the numbers are that it takes, and what these inputs are
        self.any: tuple | None = None
        self.numbers: tuple = ()

    def __repr__(self) -> str:
        return f"<entry of {self.call.__name__}: {self.call.program.signature}>"

    def closed(self, found: Sequence[Tensor]) -> Sequence[Tensor]:
        """The closed-over tensors, where these are the tensors of the state."""
        if self.pick is not None:
            return self.pick(found)
        return [found[s] if s.__class__ is int else s for s in self.sources]

    def __call__(self, tensors: list[Tensor], *where: Any) -> Any:
        """The result for these tensors of a call that is, in Python, ``where = (f, objects,
        arguments)``."""
        if self.inference:
            with torch.inference_mode():
                return self.results(tensors, where)
        if self.enables and not torch.is_inference_mode_enabled():
            with torch.enable_grad():
                return self.results(tensors, where)
        return self.results(tensors, where)

    def results(self, tensors: list[Tensor], where: tuple) -> Any:
        outs: Sequence[Any] = ()
        shown: dict[int, Tensor] = {}
        for i, line in self.differentiated:
            check_hooks(current(), tensors[i], line)
        with without_modes():
            inputs = tensors if self.changes is None else self.changes.before(tensors)
            trace = current()
            if trace is not None and not self.idle:
                outs = trace.record(self.step, inputs)
            elif (
                trace is None
                and self.call.plain is not None
                and (found := chained(self.call, inputs)) is not None
            ):
                outs, shown = found
            elif not self.idle:
                outs = run(self.call, inputs)
            if self.inside is not None:
                self.inside.attach(outs, inputs)
            if self.views is not None:
                outs = self.views(*tensors, *outs)
            if shown:
                given = {
                    *map(id, tensors)
                }  # an argument that shows another one is returned itself
                outs = [o if id(o) in given else shown.get(k, o) for k, o in enumerate(outs)]
            if self.inside is not None:
                outs = self.inside.returns(outs)
            if self.changes is not None:
                self.changes.after(tensors)
        if self.plain:
            return outs[0]
        leaves = list(self.leaves)
        for i, t in zip(self.tensors, outs, strict=True):
            leaves[i] = t
        return self.rebuild(leaves) if self.finish is None else self.finish(leaves, *where)


def rebuilder(spec: TreeSpec | None) -> Callable[[list], Any]:
    """``leaves -> tree``: directly for a flat tuple, list or dictionary."""
    if (
        spec is not None
        and spec.num_children == spec.num_leaves
        and all(c.is_leaf() for c in spec.children())
    ):
        if spec.type is tuple or spec.type is list:
            return spec.type
        if spec.type is dict:
            names = spec.context
            return lambda leaves: dict(zip(names, leaves, strict=True))
    return lambda leaves: unflatten(leaves, spec)


def weight_of(entry: Entry) -> int:
    return max(weight((entry.call, entry.call.plain)), NODES // LIMIT)


def has_effects(program: Program) -> bool:
    return any(n.op == "call_function" and kept_alive(n) for n in program.graph.nodes)


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
        #: entries that differ in Python numbers that are inputs of their program share one
        self._steps: weakref.WeakValueDictionary[tuple, CompiledStep] = (
            weakref.WeakValueDictionary()
        )
        self._names = Names()
        self.captures = 0  # how often f has been captured, for all signatures
        self._history: list[Facts] = []  # of the first captures of a program each
        self._warned = False
        self._last: tuple[list[Facts], Facts] | None = (
            None  # the entries before the last capture, and that
        )
        self._changed: tuple[Facts, Facts] | None = None  # what the last capture itself changed
        EVERY.add(self)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        instance = owner if self.binds is classmethod else instance
        return (
            self
            if instance is None or self.binds is staticmethod
            else types.MethodType(self, instance)
        )

    def __repr__(self) -> str:
        count = len(self.entries)
        entries = "1 entry" if count == 1 else f"{count} entries"
        return f"<{self.name} of {title(self.f)}, {self.pipeline}: {entries}>"

    # ----- copying and pickling: what was captured stays behind ----------------------------------

    def __reduce__(self) -> Any:
        """By its name where that is this compiled function, as a decorated one is; else by its
        parts."""
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
        parts: list = [len(args)]
        tensors: list[Tensor] = []
        objects: list[Any] = []
        for a in args:
            describe_argument(a, parts, tensors, objects)
        if kwargs:
            describe_argument(kwargs, parts, tensors, objects)
        if len(tensors) > 1 and (same := repeated(tensors)) is not None:
            parts.append((same, repeated(containers((args, kwargs)))))
        key = (*parts, *environment_key())
        try:
            entry = self._recent.get(key)
        except TypeError:
            raise self.unhashable(Arguments(args, kwargs)) from None
        if entry is not None:
            found = entry.check.tensors(self.f, objects)
            if found is not None and entry.shared.again(tensors, found):
                closed = [*tensors, *entry.closed(found)]
                if entry.whereabouts is None or entry.whereabouts == whereabouts(closed):
                    return entry(closed, self.f, objects, (args, kwargs))
        return self.looked_up(key, tensors, objects, (args, kwargs))

    @entry
    def looked_up(
        self, key: tuple, tensors: list[Tensor], objects: list[Any], given: tuple
    ) -> Any:
        """A call, with the arguments ``given``, for which the entry last used is not the right
        one."""
        if torch._C._get_tracing_state() is not None:  # the shapes of arguments are tensors
            raise CaptureError(
                f"torch.jit.trace does not trace {self.who}{at(user_line())}; trace the function "
                "that it was made from (.__wrapped__)"
            )
        numbers = Numbers(self.f, *given)
        if numbers and current() is None:
            found = self.with_other_numbers(numbers, tensors, objects, given)
            if found is not None:
                return found[0]
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
        full = (key, reached(tensors, state.tensors), *state.key)
        entry = self.entries.get(full)
        if entry is not None and entry.whereabouts is not None:
            now = whereabouts([*tensors, *entry.closed(state.tensors)])
            if (
                entry.whereabouts != now
            ):  # what a write reaches depends on which arguments share memory
                full = (*full, now)
                entry = self.entries.get(full)
        if entry is not None:
            entry.check.renew(state)
            self._recent.put(key, entry)
            return entry([*tensors, *entry.closed(state.tensors)], self.f, objects, given)
        for t in tensors:
            check_kind(t)
        before = of_python()
        try:
            entry, new = self.capture(arguments, tensors, given, state, key, numbers)
            drew = of_python() != before
            result = entry([*tensors, *entry.closed(state.tensors)], self.f, objects, given)
        except BaseException:
            put_back(state)
            raise
        after = look(self.f, objects, labels, self._names)
        self._changed = (dict(state.facts), dict(after.facts)) if after.key != state.key else None
        # a function that changes what it reads is captured at every call, until it does not change
        # any more
        alike = self._changed is None and not drew and function_modes_key() is not OTHERS
        if entry.reusable and alike:
            if entry.numbers:
                entry.any = numbers.key(*given)
            self.store(full, entry, state)
        if new or not alike:
            self.watch_growth(entry.facts)
        return result

    def with_other_numbers(
        self, numbers: Numbers, tensors: list[Tensor], objects: list[Any], given: tuple
    ) -> tuple | None:
        """The result (in a tuple) by an entry that was captured for other values of these
        numbers."""
        entry = self._recent.get(numbers.key(*given))
        found = entry and entry.check.tensors(self.f, objects)
        if found is None or not entry.shared.again(tensors, found):
            return None
        closed = [*tensors, *entry.closed(found)[: -len(entry.numbers)]]
        closed += numbers.tensors(entry.numbers)
        if entry.whereabouts is not None and entry.whereabouts != whereabouts(closed):
            return None
        return (entry(closed, self.f, objects, given),)

    def unhashable(self, arguments: Arguments) -> ArgumentError:
        """The error for an argument that cannot be part of a key."""
        for name, x in zip(*labelled(self.f, arguments), strict=True):
            try:
                hash(x)
            except TypeError as e:
                what = f"{self.name}: the argument {name} is neither a tensor nor hashable ({e})"
                return ArgumentError(
                    f"{what}{at(user_line(4))}; pass it as a tensor, or as a tuple of numbers"
                )
        return ArgumentError(
            f"{self.name}: something that the function reaches is not hashable{at(user_line(4))}"
        )

    def store(self, full: tuple, entry: Entry, state: State) -> None:
        """Keep an entry as long as what its key names by ``id`` lives."""
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
        if entry.any is not None:
            self._recent.put(entry.any, entry)

    def drop(self, full: tuple) -> None:
        """Forget an entry."""
        entry = self.entries.pop(full)
        for key in (entry.key, entry.any) if entry is not None else ():
            if key is not None and self._recent.get(key) is entry:
                self._recent.pop(key)

    def forget(self) -> None:
        """Drop all entries."""
        self.entries.clear()
        self._recent.clear()
        self._history.clear()
        self.captures, self._warned, self._last, self._changed = 0, False, None, None

    def capture(
        self,
        arguments: Arguments,
        tensors: list[Tensor],
        given: tuple,
        state: State,
        key: tuple,
        numbers: Numbers,
    ) -> tuple[Entry, bool]:
        """The entry for this call, and whether its program is new."""
        self.captures += 1
        places: list[Place] = []

        def f(*args: Any, **kwargs: Any) -> Any:
            mine = Given(args, kwargs)
            if watches:
                args, kwargs = numbers.watched(args, kwargs)
            result = called(*args, **kwargs)
            mine.check(argument_names(self.f, len(args)), self.name)
            places.extend(left_behind(state, self.titled, containers(given)))
            return recorded(result, places, state, mine.containers)

        watches = bool(numbers) and current() is None and not self._names.operators
        called, known = as_called(self.f), states([*arguments.leaves, *state.opaque])
        rec = capture(
            f,
            arguments.leaves,
            # containers passed twice hold tensors twice
            arguments.rebuilt
            if repeated(tensors) is None
            else lambda xs: remade(given, iter(xs), {}),
            why_not=f"{self.name} captures the function once for all values",
            constants=False,
            numbers=True,
            outside={id(t) for t in state.tensors},
            name_of=parameter_names(self.f, arguments),
        )
        rec.trace.seeds.check_compiled(known, self.name)
        rec.literal = not self.pipeline.takes_numbers(rec)
        finish = Finish(rec, state, places, self.titled)
        quiet = as_called(self.f) is not self.f
        enables = quiet and any(grad for _, _, grad, *_ in rec.trace.records)
        program, views = without_views(rec, quiet and not enables)
        # what requires grad decides where a call is cut
        alike = (
            program,
            environment_key(),
            frozenset(ref for ref, yes in rec.trace.autograd.leaves.items() if yes),
        )
        step = self._steps.get(alike) if rec.numbers else None
        if new := step is None:
            whole = Program(
                program.graph,
                len(program.placeholders),
                program.n_outputs,
                program.mutated,
                self.name,
            )
            call = CompiledCall(whole, self.pipeline.forward, self.pipeline.split, self.name)
            call.plain = as_recorded(rec, whole.mutated)
            step = self._steps[alike] = CompiledStep(call, run_eager)
        described = {
            f"argument {n}": noted(x) for n, x in zip(*labelled(self.f, arguments), strict=True)
        }
        facts = facts_of(described, state.facts)
        self._last = ([e.facts for e in self.entries.values()], facts)
        inside = Leaves(rec, program.mutated)
        entry = Entry(rec, step, views, state, key, facts, enables, finish, inside)
        if watches and rec.numbers:
            entry.numbers = numbers.inputs(rec) or ()
        if entry.numbers:
            entry.facts = {**facts, **numbers.facts()}
        return entry, new

    def watch_growth(self, facts: Facts) -> None:
        """Warn, once, of a function that is captured again and again, and say what is to blame."""
        if self._warned:
            return
        self._history.append(facts)
        if len(self._history) == WARN_AT:
            times = f"{self.captures} times{at(user_line())}"
            text = f"{self.who} has been captured {times}: {growth(self._history)}"
            self._history.clear()
            self._warned = True
            warnings.warn(text, stacklevel=4)

    def titled(self) -> str:
        return f"{self.name}: {title(self.f)}"

    @property
    def who(self) -> str:
        return f"{self.name} of {title(self.f)}"

    def explain(self) -> Explanation:
        """What each entry depends on (a call with all of it equal uses the entry again), what was
        different when the function was last captured, and what its backend runs eagerly. A text
        that shows itself.

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
        why: list[str] = []
        if self._last is not None and self._last[0]:
            why = min([[*differences(old, self._last[1])] for old in self._last[0]], key=len)
            why = why or [
                "what it reads is arranged in another way, or arguments are one tensor or share "
                "memory"
            ]
        if self._changed is not None:
            why += [
                f"it changed while it ran, and is not kept: {x}"
                for x in differences(*self._changed)
            ]
        eagerly = {
            f"{half}: {what}: {e}"
            for half, found in self.pipeline.eagerly
            for what, e in found.items()
        }
        return explained(
            self.who, self.captures, [e.facts for e in self.entries.values()], why, sorted(eagerly)
        )


def labelled(f: Callable, arguments: Arguments) -> tuple[list[str], list[Any]]:
    """A name for each leaf of a call, and the leaf."""
    names: list[str] = []
    for base, spec in zip(argument_names(f, len(arguments.specs)), arguments.specs, strict=True):
        names += [f"{base}{rest}" for rest in (leaf_labels(spec) if spec is not None else [""])]
    if arguments.kw_spec is not None:
        names += [label.lstrip("_") for label in leaf_labels(arguments.kw_spec)]
    return names, arguments.leaves
