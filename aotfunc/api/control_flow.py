"""Loops and branches as users call them, trees in, trees out; ``f`` is recorded once for all
steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..capture.bodies import drawn, emit_flow, hoisted
from ..capture.scan import Scan
from ..capture.switch import Switch
from ..capture.tree import Arguments, flatten, in_order_of, structure, unflatten
from ..capture.unrolled import emit_unrolled
from ..capture.while_loop import While, as_condition, counted
from ..debug import at, user_line, where_defined
from ..errors import ArgumentError
from ..partition.policies import Policy, check_policy
from ..trace.emit import Builder
from ..trace.entering import entry
from ..trace.nested import with_items
from ..trace.traced import current, under_way
from ..transforms.vmap import inserted
from ..transforms.walk import filled_node
from .as_python import UNROLLS, scan_in_python, while_in_python
from .dynamo import read_as
from .flow_bodies import (
    Body,
    inside_torch_func,
    one,
    one_element,
    one_row_sig,
    path,
    run_flow,
    sharing_constants,
    signature,
    tensors,
    trip_count,
)
from .flow_readings import map_in_graph, scan_in_graph
from .segments import scan_in_segments
from .vmap import debug_unwrap, vmap

aten = torch.ops.aten


@read_as(scan_in_graph)
def scan(
    f: Callable,
    init: Any,
    xs: Any = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int = 1,
    checkpoint: int | str | Policy = 0,
    slots: int | None = None,
) -> tuple[Any, Any]:
    """Return ``(final carry, ys)`` of the loop ``carry, ys[t] = f(carry, xs[t])``, as one op of a
    graph.

    ``init``, ``xs`` and the results of ``f`` are trees of tensors. Tensors in ``xs`` and ``ys``
    have one row for each step along dimension 0; with ``xs=None`` there are ``length`` steps. The
    carry keeps its tree, shapes and dtypes. ``reverse`` goes from the last row to the first. ``f``
    is recorded once: graphs and compilation do not grow with the number of steps. It may close
    over tensors and write to tensors that it makes. With ``unroll=k`` the body of the loop is
    ``k`` steps. By default reverse mode keeps what the backward reads of each step; with
    ``checkpoint=k`` it keeps every ``k``-th carry, and runs the steps from there again. A policy
    (see :mod:`aotfunc.partition.policies`) says which values of a step may be kept, and a minimum
    cut chooses among them. With ``checkpoint="revolve"`` it keeps ``slots`` carries, and runs the
    other steps again as :func:`while_loop` does. Raises ArgumentError for a carry that changes
    between steps, stacks of several lengths and leaves that are not tensors, CaptureError if ``f``
    writes to a tensor from outside, RuleError as :func:`while_loop` for derivatives by revolve.

    >>> total, sums = scan(lambda c, x: (c + x, c + x), torch.tensor(0), torch.arange(4))
    >>> total, sums
    (tensor(6), tensor([0, 1, 3, 6]))
    """
    carry, spec = flatten(init)
    carry = tensors("scan", "init", carry, spec)
    rows, x_spec = ([], None) if xs is None else flatten(xs)
    rows = tensors("scan", "xs", rows, x_spec)
    steps = trip_count("scan", rows, x_spec, length)
    policy, every = (checkpoint, 0) if callable(checkpoint) else (None, checkpoint)
    check_policy(policy)
    if (every == "revolve") != (slots is not None):
        raise ArgumentError(
            "scan: slots is an int with checkpoint='revolve', and None without, not "
            f"checkpoint={checkpoint!r}, slots={slots!r}{at(user_line())}"
        )
    check_positive("scan", "slots", slots)
    every = 0 if slots else every
    if not isinstance(every, int) or isinstance(every, bool) or every < 0:
        raise ArgumentError(
            "scan: checkpoint is a number of steps, 0, a policy or 'revolve', not "
            f"{checkpoint!r}{at(user_line())}"
        )
    check_positive("scan", "unroll", unroll if unroll is not None else 0)
    if UNROLLS.on and steps:
        return scan_in_python(f, unflatten(carry, spec), xs, steps, reverse)
    if every := min(every, steps):
        return scan_in_segments(scan, f, init, xs, steps, reverse, unroll, every)
    count = len(carry)

    def rebuilt(leaves: Sequence[Any]) -> tuple[list, dict]:
        x = None if xs is None else unflatten(leaves[count:], x_spec)
        return [unflatten(leaves[:count], spec), x], {}

    sigs = [*[one(x) for x in carry], *[one_row_sig(x) for x in rows]]

    def arranged(result: Any) -> Any:
        pair = isinstance(result, tuple | list) and len(result) == 2
        return (in_order_of(init, result[0]), result[1]) if pair else result

    why = "scan records its body once for all steps"
    step = Body("scan", f, rebuilt, sigs, [*carry, *rows], why, arranged)
    given = step.returned
    if not (isinstance(given, tuple | list) and len(given) == 2):
        raise ArgumentError(
            f"scan: {where_defined(f)} must return (carry, y), not {structure(given)}"
        )
    new_carry, y_spec = flatten(given[0]), flatten(given[1])
    step.check_carry(init, given[0], new_carry, spec)
    places = [k for k, y in enumerate(y_spec[0]) if isinstance(y, Tensor)]
    for k, y in enumerate(y_spec[0]):
        if k not in places and y is not None:
            raise ArgumentError(
                f"scan: {where_defined(f)} must return tensors, but the result{path(y_spec[1], k)}"
                f" is of type {type(y).__name__}"
            )
    body = step.body()
    consts = step.rec.closed_over

    def build(b: Builder, args: list) -> list:
        if not steps:
            init = [b.call(aten.clone.default, x) for x in args[len(consts) :][:count]]
            return [*init, *[filled_node(b, 0, inserted(v, 0, 0)) for v in body.vals[count:]]]
        read, before, rest = hoisted(body, len(consts))
        fixed = [*[args[i] for i in read], *b.inlined(before, args)]
        target = Scan(rest, len(fixed), count, steps, reverse, policy, slots)
        given = [*fixed, *args[len(consts) :]]
        if unroll > 1:
            return emit_unrolled(b, target, given, unroll)
        return emit_flow(b, target, given)

    key = ("scan", count, steps, reverse, unroll, policy, slots)
    outs = run_flow(body, key, build, [*consts, *carry, *rows])
    ys = with_items(y_spec[0], places, outs[count:])
    return unflatten(outs[:count], spec), unflatten(ys, y_spec[1])


@read_as(map_in_graph)
def map(f: Callable, xs: Any, batch_size: int | None = None) -> Any:
    """Return ``f`` of each row of the tensors in ``xs``, one after another: the results as stacks.

    It takes the memory of one row at a time, or, compiled as C++, of a block of rows whose values
    take 1 MiB at most, unlike :func:`vmap`, which takes that of all, and ``f`` may branch
    (:func:`cond`) on each row. With ``batch_size`` so many rows at a time go
    through ``vmap(f)``. Errors are those of :func:`scan`; ArgumentError for a ``batch_size`` below
    1.

    >>> map(lambda x: x.sum() * x, torch.arange(6).view(3, 2))
    tensor([[ 0,  1],
            [10, 15],
            [36, 45]])
    """
    if batch_size is None:
        return scan(lambda _, x: ((), f(x)), (), xs)[1]
    leaves, spec = flatten(xs)
    rows = tensors("map", "xs", leaves, spec)
    count = trip_count("map", rows, spec, None)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ArgumentError(f"map: batch_size must be a positive int, not {batch_size!r}")
    whole = count - count % batch_size
    parts = []
    if whole:
        blocks = [x[:whole].unflatten(0, (-1, batch_size)) for x in rows]
        ys, y_spec = flatten(map(vmap(f), unflatten(blocks, spec)))
        parts.append([y.flatten(0, 1) for y in ys])
    if whole < count:
        ys, y_spec = flatten(vmap(f)(unflatten([x[whole:] for x in rows], spec)))
        parts.append(ys)
    return unflatten([torch.cat(y) for y in zip(*parts, strict=True)], y_spec)


@entry
def cond(pred: Any, true_fn: Callable, false_fn: Callable, *operands: Any) -> Any:
    """Return ``true_fn(*operands)`` if ``pred`` holds, else ``false_fn(*operands)``, as one op of
    a graph; only the chosen function runs.

    ``pred`` is a tensor with one element, or a bool. Operands may be any trees; the functions may
    close over tensors, and return trees of tensors of equal structure, shapes and dtypes. Under
    ``vmap`` with a ``pred`` that differs between samples both run, and each sample gets its own
    result: neither values nor derivatives of the other branch reach it, be they infinite or NaN.
    Raises ArgumentError for another ``pred`` and for results that differ, CaptureError if a branch
    writes to a tensor from outside.

    >>> f = lambda x: cond(x > 0, torch.log, lambda x: x * 0, x)
    >>> vmap(grad(f))(torch.tensor([2.0, 0.0]))
    tensor([0.5000, 0.0000])
    """
    if isinstance(pred, bool):
        return (true_fn if pred else false_fn)(*operands)
    holds = one_element("cond", "pred", pred)
    holds = holds if holds.dtype is torch.bool else holds != 0
    return choice("cond", holds, (false_fn, true_fn), operands)


@entry
def switch(index: Any, branches: Sequence[Callable], *operands: Any) -> Any:
    """Return ``branches[index](*operands)``, as one op of a graph: :func:`cond` for any number of
    branches. An ``index`` (an integer tensor with one element, or an int) below 0 or too large
    means the first or the last. Raises ArgumentError for no branches, for another ``index``, and
    otherwise as :func:`cond`.

    >>> switch(torch.tensor(1), [torch.sin, torch.neg, torch.cos], torch.tensor(2.0))
    tensor(-2.)
    """
    if not branches:
        raise ArgumentError(f"switch: there are no branches{at(user_line())}")
    if isinstance(index, int):
        return branches[min(max(index, 0), len(branches) - 1)](*operands)
    chosen = one_element("switch", "index", index)
    if chosen.is_floating_point() or chosen.is_complex():
        raise ArgumentError(
            f"switch: the index must be an integer, not {chosen.dtype}{at(user_line())}"
        )
    return choice("switch", chosen.long().clamp(0, len(branches) - 1), branches, operands)


def choice(name: str, index: Tensor, branches: Sequence[Callable], operands: tuple) -> Any:
    """Return the results of ``branches[index]``."""
    if UNROLLS.on:
        return branches[int(index)](*operands)
    arguments = Arguments(operands, {})
    places = [k for k, x in enumerate(arguments.leaves) if isinstance(x, Tensor)]
    given = [arguments.leaves[k] for k in places]

    def rebuilt(leaves: Sequence[Any]) -> tuple[list, dict]:
        return arguments.rebuilt(with_items(arguments.leaves, places, leaves))

    sigs = [signature(x).start for x in given]
    why = f"a branch of {name} is recorded whether or not it is taken"
    steps: list[Body] = []
    for f in branches:
        like = functools.partial(in_order_of, steps[0].returned) if steps else lambda x: x
        steps.append(Body(name, f, rebuilt, sigs, given, why, like))
    first, spec = flatten(steps[0].returned)
    for step in steps[1:]:
        step.check_like(steps[0])
    results = [k for k, x in enumerate(first) if isinstance(x, Tensor)]
    consts, bodies = sharing_constants(steps)
    target = Switch(bodies)
    if current() is None and not inside_torch_func():  # as eager: what is not taken is not there
        taken = target.bodies[int(index)]
        program = steps[int(index)].rec.program()
        build = lambda b, args: b.inlined(taken, args)
        outs = run_flow(taken, (name, program), build, [*consts, *given], program)
        alike = [same_results(steps[int(index)])]
    else:
        build = lambda b, args: emit_flow(b, target, args)
        outs = run_flow(bodies[0], (name, *bodies), build, [index, *consts, *given])
        alike = [same_results(step) for step in steps]
    if all(a == alike[0] for a in alike):
        outs = tuple([outs[k] for k in alike[0]])
    return unflatten(with_items(first, results, outs), spec)


def same_results(step: Body) -> list[int]:
    """Return the position of the first same tensor for each that a branch returns."""
    ids = [id(x) for x in flatten(step.returned)[0] if isinstance(x, Tensor)]
    return [ids.index(i) for i in ids]


@entry
def while_loop(
    cond_fn: Callable,
    body_fn: Callable,
    init: Any,
    max_steps: int | None = None,
    checkpoint: str | None = None,
    slots: int | None = None,
) -> Any:
    """Return the last carry of ``while cond_fn(carry): carry = body_fn(carry)``, which starts with
    ``init`` and takes at most ``max_steps`` steps; as one op of a graph.

    Trees, closures and errors are those of :func:`scan`; ``cond_fn`` returns a tensor with one
    element. Under ``vmap`` each sample stops at its own step. Reverse mode keeps values of each
    step and so needs a bound: ``max_steps``, or, in a transform that is not compiled, the number
    of steps, which it counts first. The backward takes the time of all ``max_steps``; surplus
    steps do nothing. With ``checkpoint="revolve"`` it needs no bound: the backward keeps ``slots``
    carries, that before the first step among them, and recomputes the others in the fewest steps
    (Griewank and Walther, 2000). Raises RuleError for derivatives of such a loop that draws random
    numbers, and for second derivatives through the user's rules.

    >>> while_loop(lambda x: x < 100, lambda x: x * x, torch.tensor(3.0))
    tensor(6561.)
    >>> def root(a):
    ...     far = lambda x: (x * x - a).abs() > 1e-6
    ...     return while_loop(far, lambda x: (x + a / x) / 2, a)
    >>> vmap(grad(root))(torch.tensor([4.0, 9.0]))
    tensor([0.2500, 0.1667])
    """
    check_positive("while_loop", "max_steps", max_steps)
    check_positive("while_loop", "slots", slots)
    if checkpoint not in (None, "revolve") or (checkpoint is None) != (slots is None):
        raise ArgumentError(
            "while_loop: checkpoint must be None or 'revolve', and slots an int with 'revolve' "
            f"alone, not checkpoint={checkpoint!r}, slots={slots!r}{at(user_line())}"
        )

    def limit(inputs: Sequence[Tensor], draws: bool) -> int | None:
        if max_steps is not None or slots or draws:  # a run that counts draws, too
            return max_steps
        return step_bound(cond_fn, body_fn, init, inputs)

    return while_loop_up_to(cond_fn, body_fn, init, limit, slots)


def while_loop_up_to(
    cond_fn: Callable, body_fn: Callable, init: Any, limit: Callable, slots: int | None = None
) -> Any:
    """Run :func:`while_loop` with at most ``limit(inputs, draws)`` steps, or one that draws."""
    carry, spec = flatten(init)
    carry = tensors("while_loop", "init", carry, spec)
    if UNROLLS.on:
        return while_in_python(cond_fn, body_fn, unflatten(carry, spec), limit((), True))

    def rebuilt(leaves: Sequence[Any]) -> tuple[list, dict]:
        return [unflatten(leaves, spec)], {}

    sigs = [one(x) for x in carry]
    why = "while_loop records its functions once for all steps"
    like = functools.partial(in_order_of, init)
    test = Body("while_loop", cond_fn, rebuilt, sigs, carry, why)
    step = Body("while_loop", body_fn, rebuilt, sigs, carry, why, like)
    holds = test.returned
    if not (isinstance(holds, Tensor) and holds.numel() == 1):
        raise ArgumentError(
            f"while_loop: {where_defined(cond_fn)} must return a tensor with one element, not "
            f"{structure(holds)}"
        )
    step.check_carry(init, step.returned, flatten(step.returned), spec)
    consts, (condition, body) = sharing_constants([test, step])
    inputs = [*consts, *carry]
    max_steps = limit(inputs, any([*drawn(condition), *drawn(body)]))

    def build(b: Builder, args: list) -> list:
        loop = While(as_condition(condition), body, len(consts), max_steps)
        if slots is None:
            return emit_flow(b, loop, args)
        loop, n = counted(loop, slots), len(consts)
        zero = filled_node(b, 0, loop.body.placeholders[n].meta["val"])
        return emit_flow(b, loop, [*args[:n], zero, *args[n:]])[1:]

    key = ("while_loop", condition, max_steps, slots)
    return unflatten(run_flow(body, key, build, inputs), spec)


def check_positive(name: str, what: str, value: Any) -> None:
    """Raise ArgumentError for another ``value`` than a positive int or None."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ArgumentError(
            f"{name}: {what} must be a positive int, not {value!r}{at(user_line())}"
        )


def step_bound(
    cond_fn: Callable, body_fn: Callable, init: Any, inputs: Sequence[Tensor]
) -> int | None:
    """Return a bound for the number of steps, if one is needed and known: an input may be
    differentiated, and values may be asked for."""
    hidden = any(t.why_not is not None for t in under_way.traces)
    if hidden or inside_torch_func() or not any(x.requires_grad for x in inputs):
        return None
    step = lambda c: (body_fn(c[0]), c[1] + 1)
    with torch.no_grad():
        start = init, torch.tensor(0)
        _, steps = while_loop_up_to(lambda c: cond_fn(c[0]), step, start, lambda *_: None)
    most = int(debug_unwrap(steps).max())
    return 1 << max(most - 1, 0).bit_length()
