"""A compiled call on real tensors: one autograd node, whose backward is compiled too and is
differentiable in turn.

Results that have no input in common are nodes of their own, and so are those that differ in inputs
with hooks or a graph: a backward of one must not visit what the others were computed from. A node
keeps the residuals of the partition for a plain backward. Where the backward is itself to be
differentiated (``create_graph=True``) the gradient program of the inputs runs instead, as a
compiled call like any other; random numbers that it draws again are those of the forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..capture.calls import CompiledCall
from ..debug import outside_dynamo
from ..trace.emit import remap
from ..trace.modes import without_modes
from ..transforms.lower import CALLS, lowered
from .aliasing import with_own_memory
from .batched import call_batched
from .execute import before_writes, execute, lay_cotangents, strided_copy, write_back
from .halves import Halves
from .late_reads import Versions, check_memory, check_unwritten, storages, versions
from .late_state import at_moment, moment
from .lifted import known_results, lifted
from .parts import OnParts, check_whole
from .redraw import generator_states, redrawn
from .refused import check_reached, related, relation, unchanged
from .unpacked import unpacked
from .unseen import Watched
from .usual import op_by_op, unaffected

aten = torch.ops.aten
keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph


def call_compiled(
    call: CompiledCall, tensors: Sequence[Tensor], written: Sequence[Tensor] = ()
) -> Sequence:
    """Return a compiled call's results on real tensors, perhaps differentiable, which do not
    depend on what the caller writes to ``written`` tensors afterwards."""
    program = call.program
    if op_by_op():
        check_whole(call, tensors)
        return execute(program.once("op by op", lambda: lowered(program, CALLS)), tensors)
    wrt = (
        tuple([i for i, t in enumerate(tensors) if t.requires_grad])
        if torch.is_grad_enabled()
        else ()
    )
    read_late = None
    if not wrt:
        outs = own_results(call, program.n_outputs, tensors)
    else:
        halves = halves_of(call, wrt)
        if halves.late_reads is not None:
            tensors = before_writes(written, tensors, range(len(tensors)))
        if halves.any_live:
            outs, read_late = differentiated(halves, tensors, written)
        else:
            with torch.no_grad():
                outs = unviewed(own_results(call, program.n_outputs, tensors))
    if program.mutated:
        write_back(program, tensors, with_own_memory(program, tensors, outs))
    if read_late is not None and halves.late_reads is not None:
        read_late += versions(halves.late_reads, tensors, outs)
    return outs[: program.n_outputs]


def halves_of(call: CompiledCall, wrt: Sequence[int]) -> Halves:
    """Return the halves of a call for the gradients of these inputs."""
    wrt = (*wrt,)
    return call.program.once(("halves", wrt), lambda: Halves(call, wrt))


def run_half(call: CompiledCall, tensors: list[Tensor]) -> Sequence:
    """Run a half of a compiled call, and return its results. The list may be empty then: a tensor
    that is only in there is free after its last use."""
    if op_by_op():
        check_whole(call, tensors)
        return execute(call.program, tensors)
    return call.compiled(tensors)(tensors)


def own_results(call: CompiledCall, count: int, tensors: Sequence[Tensor]) -> Sequence:
    """Return the results of compiled code, the first ``count`` with memory of their own."""
    run = call.compiled(tensors)
    if isinstance(run, OnParts):
        return run.results(tensors, lambda call, parts: own_results(call, count, parts))
    outs = run([*tensors])
    return outs if getattr(run, "own", -1) >= count else distinct_results(outs, count, tensors)


def distinct_results(outs: Sequence, count: int, tensors: Sequence[Tensor]) -> Sequence:
    """Return the results, copied where one of the first ``count`` is an input or another one, or
    shares memory. A graph without its marks of intent may compute two results in one node; a
    compiler may hand out the memory of an input, of another result, or of a constant that it
    keeps."""
    found, seen = outs, {*map(id, tensors)}
    for i, o in enumerate(outs[:count]):
        if isinstance(o, Tensor):
            known = id(o)
            if known in seen or (
                users(o) > 1 and not among_views(o, outs[count:], (*tensors, *outs[:i]))
            ):
                found = list(found) if found is outs else found
                found[i] = strided_copy(o)  # type: ignore[index]
            seen.add(known)
    return found


def users(t: Tensor) -> int:
    """Return how many tensors use the memory of this one."""
    # the count has the storage that is asked for it, too
    return storage_users(t.untyped_storage()._cdata) - 1 if t.__class__ is Tensor else 1


storage_users = torch._C._storage_Use_Count


def among_views(t: Tensor, residuals: Sequence, others: Sequence) -> bool:
    """Return whether residuals alone share the memory of ``t``, with what they are views of, not
    the ``others``. Autograd sees through such views when ``t`` is written."""
    base, memory = t if t._base is None else t._base, t.untyped_storage()._cdata
    views = {id(o) for o in residuals if isinstance(o, Tensor) and o._base is base}
    if users(t) != len(views | {id(t), id(base)}):
        return False
    return not any(isinstance(o, Tensor) and o.untyped_storage()._cdata == memory for o in others)


def unviewed(outs: Sequence) -> Sequence:
    """Return the results, none of them a view for autograd: it would refuse to have one written to
    that was made where no gradients are recorded."""
    if any(isinstance(o, Tensor) and o._is_view() for o in outs):
        return [o.detach() if isinstance(o, Tensor) and o._is_view() else o for o in outs]
    return outs


def differentiated(
    halves: Halves, tensors: Sequence[Tensor], written: Sequence[Tensor] = ()
) -> tuple[Sequence, Versions | None]:
    """Return the results of a call and the new values of written inputs, if some of them have a
    derivative; where its backward looks for what is not to be written to."""
    written = [*written, *(tensors[i] for i in halves.call.program.mutated)]
    nodes = halves.parts(tensors)
    shared = frozenset([n for outs, _ in nodes[1:] for n in halves.shared(outs)])
    if shared and (steps := halves.stages(shared)):
        return staged(halves, steps, tensors, written), None
    read_late: Versions | None = None if halves.late_reads is None else []
    count, tasks = halves.count, dict[Any, int]()
    given = before_writes(written, tensors, halves.needed)
    before = generator_states(halves.call.program)
    torch._C._set_grad_enabled(False)  # a tenth of the time of torch.no_grad()
    try:
        outs = own_results(halves.forward, halves.early, given)
        results = dict(enumerate(unviewed(outs[: halves.early])))
        residuals = outs[halves.early :]
    finally:
        torch._C._set_grad_enabled(True)
    needed = [given[i] for i in halves.needed]
    if len(nodes) > 1:  # residuals may be results of another node: they must not hold each other
        residuals = [r.detach() if isinstance(r, Tensor) else r for r in residuals]
    every = dict(enumerate(residuals))
    for part in nodes:
        mine, inputs = part
        met = halves.met_by(mine)
        shown = [results[count + i] for i in met or ()]
        kept = every if len(nodes) == 1 else {i: every[i] for i in halves.residuals_of(mine)}
        new = apply(
            facts(halves, part, kept, before, read_late, met, tasks),
            (
                [*[results[i] for i in mine], *shown],
                [
                    *[r for r in kept.values() if isinstance(r, Tensor)],
                    *[results[i] for i in mine if i in halves.keeping],
                    *shown,
                ],
                needed,
            ),
            *halves.reached(given, inputs),
        )
        results.update(zip(mine, new, strict=False))
        node = new[0].grad_fn
        if len(new) > 1:
            mine = [i for i in mine if i < halves.call.program.n_outputs]
            outs, node.lifts = lifted([results[i] for i in mine], halves.lifts(mine))
            results.update(zip(mine, outs, strict=True))
        if halves.unseen:
            node.watched = {k: Watched(results[k]) for k in mine if k in halves.unseen}
    return [results[i] for i in range(count)], read_late


def staged(
    halves: Halves,
    steps: Sequence[tuple[CompiledCall, list, list]],
    tensors: Sequence[Tensor],
    written: Sequence[Tensor],
) -> Sequence:
    """Return the results of a call in stages, with memory of their own."""
    program = halves.program
    values = dict(zip(program.placeholders, tensors, strict=True))
    for call, reads, outs in steps:
        found = call_compiled(call, [values[i] for i in reads], written)
        values.update(zip(outs, found, strict=True))
    found = list(remap(program.outputs, values))
    for k, o in enumerate(found):
        if isinstance(o, Tensor) and any(o is x for x in (*tensors, *found[:k])):
            found[k] = o.clone()
    return found


def facts(
    halves: Halves,
    part: tuple[list[int], list[int]],
    residuals: dict[int, Any],
    states: list,
    read_late: Versions | None,
    met: tuple[int, ...] | None = (),
    tasks: dict[Any, int] | None = None,
) -> dict[str, Any]:
    """Return what a node knows beside tensors, by name. ``tasks`` are the last backwards of the
    Functions that the nodes of a call have in common."""
    return {
        "halves": halves,
        "part": part,
        "met": met,
        "tasks": tasks,
        "kin": relation(),
        "watched": {},
        "keeping": [k for k in part[0] if k in halves.keeping],
        "lifts": {},
        "residuals": {i: None if isinstance(r, Tensor) else r for i, r in residuals.items()},
        "states": states,
        "read_late": read_late,
        "moment": moment() if halves.reads_state else None,
        "dtype": torch.get_default_dtype(),
        "usual": halves.usual if part == halves.whole else None,
    }


class CompiledFunction(torch.autograd.Function):
    """Results of a compiled call, as a node of autograd."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, known: dict[str, Any], values: tuple, *inputs: Tensor
    ) -> tuple:
        results, kept, needed = values
        versions = [0 if t.is_inference() else t._version for t in needed]
        give_to_node(ctx, known, (*kept,), needed, versions, storages(needed))
        return (*results,)

    @staticmethod
    @outside_dynamo
    def backward(ctx: Any, *cts: Tensor | None) -> tuple:
        known, read = ctx.known, None
        # read before what is saved, which another thread lets go of first
        inputs, memory = ctx.inputs, ctx.memory
        usual = known["usual"]
        if usual is not None and not ctx.done and unaffected(known["dtype"]):
            read = [*ctx.saved_tensors]
            values = [*read[: usual.count], *cts]
            if (run := usual.run(values)) is not None:
                check_memory(inputs, memory, usual.name)
                if not keeps_graph():
                    ctx.maybe_clear_saved_tensors()
                    ctx.done, ctx.memory, ctx.inputs = usual.done, None, None
                    read = cts = inputs = memory = ()  # type: ignore[assignment]
                return None, None, *run(values)
            del values
        if memory is not None:
            check_memory(inputs, memory, known["halves"].call.__name__)
        del inputs, memory
        vars(ctx).update({**known, **vars(ctx)})
        return None, None, *general_backward(ctx, cts, read)


def general_backward(
    ctx: Any, cts: Sequence[Tensor | None], read: list[Tensor] | None
) -> list[Tensor | None]:
    """Return the gradients of any node. ``read``: what it has saved, if that has been read; it
    becomes empty."""
    halves = ctx.halves
    if ctx.read_late is not None:
        check_unwritten(ctx.read_late, halves.call.__name__)
    if ctx.moment is not None:
        ctx.moment.check(halves.call.__name__)
    if ctx.met is None or ctx.watched or halves.bent:
        check_reached(ctx, [i for i, c in zip(ctx.part[0], cts, strict=False) if c is not None])
    # reading them raises an error the second time, unless the graph was retained, even if
    # there are none
    outs, wrt = ctx.part
    further: Sequence[Tensor | None] = ()
    met: tuple[int, ...] = ()
    if ctx.met:
        cts, further = cts[: len(outs)], cts[len(outs) :]
        met = tuple([i for i, c in zip(ctx.met, further, strict=True) if c is not None])
    there = frozenset([i for i, c in zip(outs, cts, strict=True) if c is not None])
    # of another result, which had nothing in common with those: computed again
    again = bool(ctx.done and ctx.inputs is not None and halves.apart(ctx.done, there))
    if read is None:
        saved = ctx.saved_tensors if ctx.keeps and not again else ()
    else:
        saved = [*read]
        read.clear()
    have = tuple([i in there for i, yes in enumerate(halves.live) if yes])
    with without_modes(ctx.dtype):
        vals = [halves.vals[i] for i in outs]
        vals += [halves.met[i].meta["val"] for i in ctx.met or ()]
        plan, given = lay_cotangents([*cts, *further], vals)
        sigs = tuple([sig for sig in plan if sig is not None])
        second = torch.is_grad_enabled()
        if again or second or met or (halves.materializes and not all(have)):
            known = known_results(ctx, there, again, saved) if second else {}
            gradient = halves.gradient(have, sigs, met, tuple(known))
            first, read_again = unchanged(ctx, gradient), [*known.values()]
            unpacked(read_again, gradient.program.placeholders[len(first) :], gradient.__name__)
            values = [*first, *read_again, *given]
            with redrawn(ctx.states), at_moment(ctx.moment), related(ctx):
                let_go(ctx, there)
                grads = call_batched(call_compiled, gradient, values)
        else:
            half, reads = halves.backward_for(have, sigs)
            feed = iter(saved)
            kept = {i: next(feed) if r is None else r for i, r in ctx.residuals.items()}
            values = [kept[i] for i in reads]
            unpacked(values, half.program.placeholders, half.__name__)
            values += given
            let_go(ctx, there)
            del saved, feed, kept, given
            grads = call_batched(run_half, half, values)
    found = dict(zip(halves.wrt, grads, strict=True))
    return [halves.zero(i, there) if found[i] is None else found[i] for i in wrt]


def give_to_node(
    ctx: Any,
    known: dict[str, Any],
    kept: tuple[Tensor, ...],
    needed: Sequence[Tensor],
    versions: list[int],
    memory: list[torch.UntypedStorage],
) -> None:
    """Give a node what its backward needs."""
    ctx.known = known
    # what `save_for_backward` and `set_materialize_grads` do
    ctx.to_save, ctx.materialize_grads = kept, False
    # not saved tensors: a plain backward must not mind if one that it does not read has
    # changed
    ctx.inputs = needed  # their gradients may depend on it, though the results do not
    ctx.versions, ctx.memory = versions, memory
    if not (needed or kept):
        ctx.keeps = False


def let_go(ctx: Any, outs: frozenset[int]) -> None:
    """Let a node forget what it has saved, unless the graph is retained. Results that have nothing
    in common with ``outs``, whose gradients are taken, keep the inputs."""
    if keeps_graph():
        return
    ctx.maybe_clear_saved_tensors()
    ctx.done |= outs
    rest = [k for k in ctx.part[0] if k not in ctx.done]
    if not any(ctx.halves.apart(ctx.done, frozenset([k])) for k in rest):
        ctx.memory = ctx.inputs = ctx.read_late = ctx.moment = None


#: ``CompiledFunction.apply`` without the look for torch.func's wrappers: there are none here
apply = super(torch.autograd.Function, CompiledFunction).apply

node_class: Any = CompiledFunction._backward_cls  # type: ignore[attr-defined]
#: without PyTorch's own looks for a vjp and for boxed gradients
node_class.apply = CompiledFunction.backward
#: what most nodes begin with: something is saved, and no result's gradient was taken, with which
#: what was saved for it goes
node_class.keeps, node_class.done = True, frozenset()
