"""Control flow as a graph module's code calls it: functions that take modules as bodies, run, and
can be captured again; and torch's own operators on functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from torch import Tensor, fx
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._pytree import tree_map

from ..capture.bodies import emit_flow
from ..capture.scan import Scan
from ..capture.unwind import Unwind
from ..capture.while_loop import While, as_condition
from ..runtime.graph_module import graph_module
from ..trace.emit import Builder
from . import control_flow
from .associative_scan import associative_scan
from .flow_bodies import Body, one, one_row_sig, run_flow, sharing_constants


def scan(
    body: Callable,
    constants: Sequence[Tensor],
    init: Sequence[Tensor],
    xs: Sequence[Tensor],
    length: int,
    reverse: bool,
    slots: int | None = None,
) -> list[Tensor]:
    """Run :func:`aotfunc.scan` with ``body(*constants, *carry, *row) -> (*carry, *result)``."""

    if has_torch_function(given := (*constants, *init, *xs)):  # torch.fx traces it
        return handle_torch_function(
            scan, given, body, constants, init, xs, length, reverse, slots
        )

    def step(carry: list, x: list) -> tuple[list, list]:
        outs = list(body(*constants, *carry, *x))
        return outs[: len(init)], outs[len(init) :]

    options: dict[str, Any] = {"checkpoint": "revolve", "slots": slots} if slots else {}
    carry, ys = control_flow.scan(step, list(init), list(xs), length, reverse, **options)
    return [*carry, *ys]


def switch(*bodies_and_operands: Any) -> Any:
    """Run :func:`aotfunc.switch` as ``switch(*bodies, index, operands)``."""
    *bodies, index, operands = bodies_and_operands
    if has_torch_function(given := (index, *operands)):
        return handle_torch_function(switch, given, *bodies_and_operands)
    return control_flow.switch(index.long(), bodies, *operands)


def while_loop(
    condition: Callable,
    body: Callable,
    constants: Sequence[Tensor],
    init: Sequence[Tensor],
    max_steps: int | None,
    slots: int | None = None,
) -> list[Tensor]:
    """Run :func:`aotfunc.while_loop` on ``condition`` and ``body`` of (*constants, *carry)."""
    if has_torch_function(given := (*constants, *init)):
        return handle_torch_function(
            while_loop, given, condition, body, constants, init, max_steps, slots
        )
    return control_flow.while_loop(
        lambda carry: condition(*constants, *carry)[0],
        lambda carry: list(body(*constants, *carry)),
        list(init),
        max_steps,
        "revolve" if slots else None,
        slots,
    )


def unwind(*bodies_and_groups: Any, wrt: Sequence[int], **options: Any) -> list[Tensor]:
    """Return the cotangents of the arguments ``wrt`` of a :func:`scan` or a :func:`while_loop`
    with these ``options``, for those of its results, after so many ``steps``.

    It is called as ``unwind(body, back, steps, constants, init, xs, cotangents)`` for a scan, as
    ``unwind(condition, body, back, steps, constants, init, cotangents)`` for a while_loop; the
    backward of one step is ``back(*constants, *carry, *row, *sums, *cotangents) -> (*sums,
    *cotangents)``."""
    count = 2 if "length" in options else 3
    functions, (steps, *groups) = bodies_and_groups[:count], bodies_and_groups[count:]
    if has_torch_function(given := (steps, *chain(*groups))):
        return handle_torch_function(unwind, given, *bodies_and_groups, wrt=wrt, **options)
    constants, init, *xs, cotangents = groups
    values, n, k = [*constants, *init, *chain(*xs)], len(constants), len(init)
    sums = [values[i].contiguous() for i in wrt if i < n]
    kept = sum(n <= i < n + k for i in wrt)  # cotangents of the carry, before those of stacks
    late = [*values, *sums, *cotangents]
    sigs = [*map(one, values[: n + k]), *map(one_row_sig, chain(*xs)), *map(one, sums)]
    sigs += [*map(one, cotangents[:kept]), *map(one_row_sig, cotangents[kept:])]
    why = "unwind records its functions once for all steps"

    def body(f: Callable, m: int) -> Body:
        return Body("unwind", f, lambda leaves: ([*leaves], {}), sigs[:m], late[:m], why)

    *tests, step, last = functions
    recorded = [body(f, len(values)) for f in (*tests, step)]
    consts, programs = sharing_constants([*recorded, body(last, len(late))])
    more = len(consts)
    *tests, step, last = programs
    loop: Scan | While
    if tests:
        programs = [as_condition(tests[0]), step, last]
        loop = While(programs[0], step, more + n, options["max_steps"], options["slots"])
    else:
        length, reverse, slots = (options[x] for x in ("length", "reverse", "slots"))
        loop = Scan(step, more + n, k, length, reverse, None, slots)
    target = Unwind(loop, [i + more for i in wrt], programs)

    def build(b: Builder, args: list) -> list:
        shared, start, rest = args[:more], args[more], args[more + 1 :]
        return emit_flow(b, target, [start, *shared, *rest])

    key = ("unwind", *programs, tuple(wrt), *options.values())
    return list(run_flow(step, key, build, [*consts, steps, *late[: len(values)], *cotangents]))


OPERATORS: dict[str, Callable] = {
    "scan": scan,
    "switch": switch,
    "while_loop": while_loop,
    "unwind": unwind,
}


def with_operators(gm: fx.GraphModule, dissolve: frozenset[str]) -> fx.GraphModule:
    """Return the module with its control flow as calls of :data:`OPERATORS` on submodules."""
    found = [n for n in gm.graph.nodes if hasattr(n.target, "bodies")]
    for n in found:
        target: Any = n.target
        with gm.graph.inserting_before(n):
            bodies = []
            for k, body in enumerate(target.bodies):
                name = f"{n.name}_body_{k}" if k or len(target.bodies) > 1 else f"{n.name}_body"
                inner = graph_module(body, name, dissolve=dissolve)
                gm.add_submodule(name, with_operators(inner, dissolve))
                bodies.append(gm.graph.get_attr(name))
            args, kwargs = target.form(n.args)
        n.target, n.args, n.kwargs = OPERATORS[target.__name__], (*bodies, *args), kwargs
    if found:
        gm.recompile()
    return gm


# ----- torch's own -------------------------------------------------------------------------------


def torch_cond(pred: Any, true_fn: Callable, false_fn: Callable, operands: Sequence) -> Any:
    """Run ``torch.cond`` inside a captured function."""
    if not isinstance(pred, Tensor):
        pred = bool(pred)
    return control_flow.cond(pred, true_fn, false_fn, *operands)


def torch_while_loop(cond_fn: Callable, body_fn: Callable, carried: Sequence) -> Any:
    """Run torch's ``while_loop``, whose functions take the carried values as arguments."""
    step = lambda carry: tuple(body_fn(*carry))
    return control_flow.while_loop(lambda carry: cond_fn(*carry), step, tuple(carried))


def torch_scan(f: Callable, init: Any, xs: Any, dim: int, reverse: bool) -> Any:
    """Run torch's ``scan``, which goes along any dimension."""
    rows = tree_map(lambda x: x.movedim(dim, 0), xs)
    carry, ys = control_flow.scan(f, init, rows, reverse=reverse)
    return carry, tree_map(lambda y: y.movedim(0, dim) if dim < y.dim() else y, ys)


def torch_map(f: Callable, xs: Any, *args: Any) -> Any:
    """Run torch's ``map``, whose further arguments are the same for all rows."""
    return control_flow.map(lambda x: f(x, *args), xs)


def torch_associative_scan(f: Callable, xs: Any, dim: int, reverse: bool) -> Any:
    return associative_scan(f, xs, reverse, dim)
