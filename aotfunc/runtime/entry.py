"""One capture of a compiled function: how it is made, and how a call goes through it.

An :class:`Entry` holds for one signature. It takes the tensors of a call to the captured program:
as one node of an outer capture, or as one node of autograd (:mod:`.autograd`). Around the program
it does what no graph can: assign to arguments, make leaves, and put results into their tree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..capture.axes import axes
from ..capture.calls import CompiledCall, CompiledStep
from ..capture.capture import argument_names, as_called, capture, labelled, parameter_names
from ..capture.captured import Captured
from ..capture.gathering import gathering
from ..capture.instances import containers, remade
from ..capture.tree import Arguments, rebuilder
from ..graph import Program, kept_alive
from ..trace.arrays import check_outside_arrays
from ..trace.following import Following
from ..trace.memory import whereabouts
from ..trace.modes import any_modes, without_modes
from ..trace.outside import check_outside_hooks
from ..trace.seeds import states
from ..trace.tensor_classes import is_extension
from ..trace.traced import Traced, current
from .aliasing import ALONE, Changes, alone_in_memory, change_in_place, without_views
from .autograd import call_compiled, differentiated, halves_of
from .casts import casts_of, record_sharing
from .chains import chained, made_by, program_to_cut
from .changing import Family, Served, followed
from .execute import run_eager
from .guards.check import Check
from .guards.explain import Facts, facts_of
from .guards.given import Snapshot
from .guards.hooked import Held, give_to_autograd, held_by
from .guards.keys import AnyNumber, Shared, environment_key, first_alike, noted
from .guards.rates import as_tensors, check_rates
from .guards.reads import MoreState, Names
from .guards.returned import Finish, recorded, skeleton
from .guards.state import State
from .guards.stores import Place, empty_caches, left_behind
from .late_state import Read, late_reader, read_late
from .leaves import Leaves, detached_results, made_in_inference_mode
from .parts import laid_as_inputs, on_parts
from .pipeline import Pipeline
from .raised import error_tensors, refused
from .repeated_node import same_node
from .usual import op_by_op

if TYPE_CHECKING:
    from .compiled import Compiled


class Entry:
    """The capture for one signature."""

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
        late: Read,
        names: Names,
        held: Held | None,
    ) -> None:
        #: hooks inside that autograd calls, and what hooks hold
        self.live_hooks, self.held = rec.trace.live_hooks, held
        #: the names by which its backward reads state when it is called, and that state
        self.late, self.names, self.watched = late, names, late is None or bool(late)
        self.reached, self.labels = state.facts, state.labels
        self.step, self.views, self.key, self.facts = step, views, key, facts
        self.call = call = step.call
        #: gradients were off, and the function turned them on in places, which its marks tell
        self.enables = enables
        self.spec, self.tensors = rec.spec, rec.tensors
        # the result's structure with its constants; the trace and the arguments may go
        self.leaves = [None if i in rec.tensors else x for i, x in enumerate(rec.leaves)]
        changes = Changes(rec)
        self.changes = changes if changes else None
        self.inside = inside if inside else None
        self.casts = casts_of(rec)
        self.inference = made_in_inference_mode(rec)
        self.differentiated = [
            (rec.trace.position(ref), line) for ref, line in rec.trace.differentiated.items()
        ]
        self.idle = (
            not call.program.n_outputs
            and not call.program.mutated
            and not any(
                n.op == "call_function" and kept_alive(n) for n in call.program.graph.nodes
            )
        )
        # closed-over tensors are inputs, found in the state; tensors that f made itself, or that
        # the state does not show, belong to the entry
        found = {id(t): i for i, t in enumerate(state.tensors)}
        self.sources = [found.get(id(t), t) for t in rec.closed_over]
        known = len(self.sources) > 1 and all(s.__class__ is int for s in self.sources)
        self.pick = itemgetter(*self.sources) if known else None
        self.shared = Shared(rec.trace.origins, state.tensors)
        self.whereabouts = (
            whereabouts([*rec.trace.origins, *rec.closed_over]) if rec.trace.placed else None
        )
        # values of an outer recording are only good for that one
        self.reusable = not (
            rec.trace.runs_always or any(t.__class__ is Traced for t in self.sources)
        )
        self.single = rec.spec is None
        self.rebuild = rebuilder(rec.spec)
        self.check = Check(state)
        self.finish = finish or None
        #: whether a call does nothing but run the program
        self.bare = (
            not (self.enables or self.inference or self.differentiated or self.idle)
            and self.changes is self.inside is self.views is call.plain is None
            and not self.watched
        )
        #: whether the function leaves gradients on or off, where it leaves a mode as it was not
        self.gradients: bool | None = None
        #: the error that the function has raised
        self.error: Exception | None = None
        self.kept: list[Any] = [*rec.trace.owners]
        #: the fast path for a call like the last one
        self.repeated: Callable[[tuple, dict], Any] | None = None
        #: the calls that it serves among those that differ in Python numbers alone
        self.served: Served | None = None
        self.family: Family | None = None

    def __repr__(self) -> str:
        return f"<entry of {self.call.__name__}: {self.call.program.signature}>"

    def closed(self, found: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the closed-over tensors, if these are the tensors of the state."""
        if self.pick is not None:
            return self.pick(found)
        return [found[s] if s.__class__ is int else s for s in self.sources]

    @property
    def inlined(self) -> bool:
        """Return whether a call runs the function itself, whose hooks belong to what is around."""
        return bool(self.live_hooks) and (current() is not None or op_by_op())

    def __call__(self, tensors: list[Tensor], *where: Any) -> Any:
        """Return the result of a call, in Python ``where = (f, objects, arguments)``."""
        if self.inlined:
            return where[0](*where[2][0], **where[2][1])
        if self.bare and current() is None and not any_modes():
            return self.tree(call_compiled(self.call, tensors), where)
        if (trace := current()) is not None:
            trace.late += (self.late,)
        elif self.watched:
            return late_reader(self, where[0], where[1], lambda: self.called(tensors, where))
        return self.called(tensors, where)

    def direct(self, tensors: Sequence[Tensor]) -> Callable | None:
        """Return ``(*tensors) -> the result`` for calls with tensors like these and no
        recording, transform of torch's or mode around them; None where there is more to do than
        to run compiled code, as a node of autograd or without."""
        call, count = self.call, self.call.program.n_outputs
        if not self.bare or self.finish is not None or call.program.mutated or not count:
            return None
        if any_modes() or op_by_op():
            return None
        tree: Callable[[Any], Any] = itemgetter(0) if self.single else self.tree
        if not self.single and [*self.tensors] == [*range(len(self.leaves))]:
            tree = self.rebuild  # all leaves are tensors
        wrt = [i for i, t in enumerate(tensors) if t.requires_grad]
        if wrt and torch.is_grad_enabled():
            halves = halves_of(call, wrt)
            if not halves.any_live or halves.late_reads is not None:
                return None
            return same_node(halves, tensors, tree) or (
                lambda *tensors: tree(differentiated(halves, tensors)[0])
            )
        run: Any = call.compiled(tensors)
        if getattr(run, "own", -1) < count or any(t.is_neg() or t.is_conj() for t in tensors):
            return None
        if self.single and run.alone is not None:
            return run.alone
        compute = run.unchecked.boxed
        return lambda *tensors: tree(compute([*tensors]))

    def called(self, tensors: list[Tensor], where: tuple) -> Any:
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
            check_outside_hooks(current(), tensors[i], line)
        with without_modes():
            inputs = tensors if self.changes is None else self.changes.before(tensors)
            trace = current()
            if trace is not None and not self.idle:
                outs = record_sharing(trace, self.step, self.casts, inputs)
            elif (
                trace is None
                and self.call.plain is not None
                and (found := chained(self.call, inputs)) is not None
            ):
                outs, shown = found
            elif not self.idle:
                outs = call_compiled(self.call, inputs)
            if self.inside is not None:
                self.inside.attach(outs, inputs)
            if self.views is not None:
                outs = self.views(*tensors, *outs)
            if shown:
                # an argument that shows another one is returned itself
                given = {*map(id, tensors)}
                outs = [o if id(o) in given else shown.get(k, o) for k, o in enumerate(outs)]
            if self.inside is not None:
                outs = self.inside.returns(outs)
            if self.changes is not None:
                outs = self.changes.rebind(tensors, outs)
                change_in_place(self.changes.ops, tensors)
        return self.tree(outs, where)

    def tree(self, outs: Sequence[Any], where: tuple = ()) -> Any:
        """Return the function's result with these tensors in it."""
        if self.single:
            return outs[0]
        leaves = list(self.leaves)
        for i, t in zip(self.tensors, outs, strict=True):
            leaves[i] = t
        return self.rebuild(leaves) if self.finish is None else self.finish(leaves, *where)


def captured_entry(
    compiled: Compiled,
    arguments: Arguments,
    tensors: list[Tensor],
    given: tuple,
    state: State,
    key: tuple,
    values: list[float],
    family: Family | None,
    may_fail: bool = True,
) -> tuple[Entry, bool]:
    """Capture the function for a call; return the entry and whether its program is new. If the
    function ``may_fail``, the entry does what it did until its error."""
    function, name = compiled.f, compiled.name
    places: list[Place] = []
    late: list[Read] = []
    shared: list[Any] = []
    gradients: list[bool] = []
    errors: list[Exception] = []
    checks: list[Callable[[], None]] = []
    traces: list[Any] = []

    def observed(*args: Any, **kwargs: Any) -> Any:
        before = environment_key()
        result = function(*args, **kwargs)
        if left := environment_key() != before:  # what it sets, it is to set at every call
            current().runs_always = True  # type: ignore[union-attr]
        gradients[:] = [torch.is_grad_enabled()] if left else []
        return result

    def f(*args: Any, **kwargs: Any) -> Any:
        mine = Snapshot(args, kwargs)
        trace: Any = current()
        trace.live_hooks, trace.rebound, trace.graded = [], {}, state.graded
        traces[:] = [trace]
        # axes outside are not in the key
        with compiled._names.watching(), axes({}), gathering():
            try:
                with as_tensors(state.rates):
                    result = detached_results(trace, called(*args, **kwargs))
            except Exception as e:
                if trace.following is not None or state.rates or not may_fail or refused(e):
                    raise
                errors.append(e)
                result = error_tensors(e)
        give_to_autograd(trace, state)
        late[:] = [read_late(trace.late, compiled._names.opened)]
        checks[:] = [partial(mine.check, argument_names(function, len(args)), name)]
        checks[0]()
        places.extend(left_behind(state, compiled.titled, containers(given)))
        returned = recorded(result, places, state, mine)
        shared[:] = [skeleton(returned[0] if places else returned)]
        return returned

    called, known = as_called(observed), states([*arguments.leaves, *state.opaque])

    def captured(following: Following | None) -> Captured:
        places.clear()
        errors.clear()
        empty_caches(state)
        try:
            rec = capture(
                f,
                arguments.leaves if following is None else following.among(arguments.leaves),
                # containers passed twice hold tensors twice
                arguments.rebuilt
                if first_alike(tensors) is None
                else lambda xs: remade(given, iter(xs), {}),
                why_not=f"{name} captures the function once for all values",
                constants=False,
                numbers=True,
                following=following,
                rolls=compiled.pipeline.rolls,
                outside={id(t) for t in state.tensors},
                name_of=parameter_names(function, arguments),
                dtensors=True,
            )
            check_rates(state.rates, rec, compiled._names)
            checks.pop()()  # recorded hooks have run; what holds the arguments goes
            return rec
        except BaseException as e:
            errors.clear()  # an error holds the frames that hold it
            misses = bool(traces) and traces[0].misses_gradients
            if isinstance(e, Exception) and compiled._names.learn(bool(state.rates), misses):
                raise MoreState from None
            raise
        finally:
            empty_caches(state)

    following = None
    if family is not None and not compiled._names.tells_apart:
        following = family.following(values, arguments.leaves, compiled.pipeline.rounds)
    rec = captured(None) if following is None else followed(captured, following, state)
    rec.trace.seeds.check_compiled(known, name)
    if state.arrays:
        check_outside_arrays(rec.trace, state.arrays)
    held = held_by(rec.trace, state)
    rec.literal = not compiled.pipeline.takes_numbers(rec)
    finish = Finish(rec, state, places, compiled.titled, *shared)
    quiet = called is not observed
    enables = quiet and rec.enables
    program, views = without_views(rec, quiet and not enables)
    program, placed = laid_as_inputs(program, [*rec.trace.origins, *rec.closed_over])
    # eager ops give results the classes that they have in eager mode
    classes = [c for t in tensors if is_extension(c := t.__class__)]
    # what requires grad decides where a call is cut
    alike = (
        program,
        (*classes,),
        environment_key(),
        frozenset(ref for ref, yes in rec.trace.autograd.leaves.items() if yes),
    )
    shares = rec.numbers or following is not None or compiled._names.ran is not None
    step = compiled._steps.get(alike) if shares else None
    if new := step is None:
        whole = Program(
            program.graph, len(program.placeholders), program.n_outputs, program.mutated, name
        )
        whole.cache[ALONE] = alone_in_memory(rec)
        # what ends in an error runs once
        pipeline = Pipeline(name, "eager") if errors or classes else compiled.pipeline
        call = CompiledCall(whole, pipeline.whole, pipeline.split, name)
        if placed:
            call = on_parts(call)
        else:
            call.plain, call.made = program_to_cut(rec, whole.mutated), made_by(rec)
        step = compiled._steps[alike] = CompiledStep(call, run_eager)
    described = {
        f"argument {n}": noted(x) for n, x in zip(*labelled(function, arguments), strict=True)
    }
    facts = facts_of(described, state.facts)
    compiled._history.note([e.facts for e in compiled.entries.values()], facts)
    inside = Leaves(rec, program.mutated)
    names = compiled._names
    entry = Entry(
        rec, step, views, state, key, facts, enables, finish, inside, late[0], names, held
    )
    entry.gradients = gradients[0] if gradients else None
    entry.error = errors.pop() if errors else None
    if following is not None:
        assert family is not None
        family.asked |= following.asked()
        if free := following.free():
            entry.family = family
            entry.served = Served(following, free, values, entry)
            labels = labelled(function, arguments)[0]
            for i in free:
                found = AnyNumber(type(values[i]).__name__)
                entry.facts = {**entry.facts, f"argument {labels[following.places[i]]}": found}
    return entry, new
