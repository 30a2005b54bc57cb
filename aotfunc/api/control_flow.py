"""Loops and branches as users call them: trees in, trees out; what ``f`` does in one step is
recorded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..capture.bodies import dense, emit_flow, hoisted, row_sig
from ..capture.capture import as_called, capture
from ..capture.captured import Captured
from ..capture.scan import Scan
from ..capture.tree import flatten, leaf_paths, structure, unflatten
from ..debug import at, user_line, where_defined
from ..errors import ArgumentError, CaptureError
from ..graph import Program
from ..runtime.execute import execute
from ..trace.emit import Builder, paused_gc
from ..trace.entering import entry
from ..trace.shapes.sig import Sig, sig_of
from ..trace.traced import Traced
from ..transforms.fresh import fresh
from ..transforms.vmap import inserted
from ..transforms.walk import builder, filled_node
from .vmap import vmap

aten = torch.ops.aten


@entry
def scan(
    f: Callable,
    init: Any,
    xs: Any = None,
    length: int | None = None,
    reverse: bool = False,
) -> tuple[Any, Any]:
    """``(final carry, ys)`` of the loop ``carry, ys[t] = f(carry, xs[t])``, as one op of a graph.

    ``init``, ``xs`` and what ``f`` returns are trees of tensors. Those in ``xs`` have one row for
    each step along dimension 0, as have those in ``ys``; with ``xs=None`` there are ``length``
    steps. The carry keeps its tree, shapes and dtypes. ``reverse`` goes from the last row to the
    first. ``f`` is recorded once: graphs and compilation do not grow with the number of steps. It
    may close over tensors and write to what it makes. Raises ArgumentError for a carry that
    changes between steps, stacks of several lengths and leaves that are not tensors, CaptureError
    where ``f`` writes to a tensor from outside.

    >>> total, sums = scan(lambda c, x: (c + x, c + x), torch.tensor(0), torch.arange(4))
    >>> total, sums
    (tensor(6), tensor([0, 1, 3, 6]))
    """
    carry, spec = flatten(init)
    carry = tensors("scan", "init", carry, spec)
    rows, x_spec = ([], None) if xs is None else flatten(xs)
    rows = tensors("scan", "xs", rows, x_spec)
    steps = trip_count("scan", rows, x_spec, length)
    count = len(carry)

    def rebuilt(leaves: Sequence[Any]) -> tuple[list, dict]:
        x = None if xs is None else unflatten(leaves[count:], x_spec)
        return [unflatten(leaves[:count], spec), x], {}

    step = Body(
        "scan", f, rebuilt, [*[one(x) for x in carry], *[row(x) for x in rows]], [*carry, *rows]
    )
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
                f" is a {type(y).__name__}"
            )
    body = step.body()
    consts = step.rec.closed_over

    def build(b: Builder, args: list) -> list:
        if not steps:
            init = [b.call(aten.clone.default, x) for x in args[len(consts) :][:count]]
            return [*init, *[filled_node(b, 0, inserted(v, 0, 0)) for v in body.vals[count:]]]
        read, before, rest = hoisted(body, len(consts))
        fixed = [*[args[i] for i in read], *b.inlined(before, args)]
        target = Scan(rest, len(fixed), count, steps, reverse)
        return emit_flow(b, target, [*fixed, *args[len(consts) :]])

    outs = run_flow(body, ("scan", count, steps, reverse), build, [*consts, *carry, *rows])
    ys = list(y_spec[0])
    for k, y in zip(places, outs[count:], strict=True):
        ys[k] = y
    return unflatten(outs[:count], spec), unflatten(ys, y_spec[1])


@entry
def map(f: Callable, xs: Any, batch_size: int | None = None) -> Any:
    """``f`` of each row of the tensors in ``xs``, one after another: the results as stacks.

    It takes the memory of one row at a time where :func:`vmap` takes that of all, and ``f`` may
    branch (:func:`cond`) on each row. With ``batch_size`` so many rows at a time go through
    ``vmap(f)``. Errors are those of :func:`scan`.

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


# ----- what is looped over -----------------------------------------------------------------------


def tensors(name: str, what: str, leaves: Sequence[Any], spec: Any) -> list[Tensor]:
    """Leaves of a tree as contiguous tensors; numbers become tensors."""
    found = []
    for k, x in enumerate(leaves):
        if isinstance(x, bool | int | float | complex):
            x = torch.as_tensor(x)
        if not isinstance(x, Tensor):
            raise ArgumentError(
                f"{name}: {what}{path(spec, k)} is a {type(x).__name__}; it must be a tensor"
                f"{at(user_line())}"
            )
        found.append(x.contiguous())
    return found


def path(spec: Any, k: int) -> str:
    """Where leaf ``k`` is in a tree."""
    return leaf_paths(spec)[k] if spec is not None else ""


def trip_count(name: str, rows: Sequence[Tensor], spec: Any, length: int | None) -> int:
    for k, x in enumerate(rows):
        if not x.dim():
            raise ArgumentError(
                f"{name}: xs{path(spec, k)} has no dimension to go along{at(user_line())}"
            )
    counts = {x.shape[0] for x in rows} | ({length} if length is not None else set())
    if len(counts) == 1:
        return counts.pop()
    if not counts:
        raise ArgumentError(f"{name}: without xs the number of steps is length=…{at(user_line())}")
    said = [f"xs{path(spec, k)} has {x.shape[0]} rows" for k, x in enumerate(rows)]
    said += [f"length is {length}"] if length is not None else []
    raise ArgumentError(f"{name}: the numbers of steps differ: {'; '.join(said)}{at(user_line())}")


def one(x: Tensor) -> Sig:
    """The signature of what is carried."""
    return dense(signature(x))


def row(x: Tensor) -> Sig:
    """The signature of one row of a stack."""
    return row_sig(signature(x))


def signature(x: Tensor) -> Sig:
    return x.sig if x.__class__ is Traced else sig_of(x)


class Body:
    """A function recorded once, on values of the signatures ``sigs``, as the body of control flow
    called ``name``. ``rebuilt`` makes its arguments of their leaves."""

    def __init__(
        self,
        name: str,
        f: Callable,
        rebuilt: Callable,
        sigs: Sequence[Sig],
        leaves: Sequence[Tensor],
    ) -> None:
        self.name, self.f, self.sigs = name, f, sigs

        def call(*args: Any) -> Any:
            self.returned = f(*args)
            return self.returned

        self.rec: Captured = capture(
            as_called(call),
            leaves,
            rebuilt,
            samples=dict(enumerate(sigs)),
            why_not=f"{name} records {where_defined(f)} once for all steps",
            constants=False,
        )

    def check_carry(self, before: Any, after: Any, new: tuple, spec: Any) -> None:
        """The carry has the tree, shapes and dtypes that it had."""
        leaves, new_spec = new
        if new_spec != spec:
            raise ArgumentError(
                f"{self.name}: {where_defined(self.f)} must return the carry with the structure "
                f"that it had: it got {structure(before)} and returned {structure(after)}"
            )
        for k, x in enumerate(leaves):
            old = self.sigs[k]
            if not isinstance(x, Tensor) or (tuple(x.shape), x.dtype) != (old.shape, old.dtype):
                now = structure(x)
                raise ArgumentError(
                    f"{self.name}: the carry{path(spec, k)} must keep its shape and dtype: "
                    f"{where_defined(self.f)} got {old} and returned {now}"
                )

    def body(self) -> Program:
        """What it does as a program ``(closed-over tensors, arguments) -> results``. Raises
        CaptureError where it writes to one of these."""
        program = self.rec.program()
        if program.mutated:
            raise CaptureError(
                f"{self.name}: {where_defined(self.f)} writes to "
                f"{self.written(program)}, which would be done once for all steps; write to a "
                "clone(), and carry what has to last"
            )
        return program.once("body", lambda: consts_first(program))

    def written(self, program: Program) -> str:
        index = program.mutated[0]
        return "its argument" if index < program.n_inputs else "a tensor from outside"


def consts_first(program: Program) -> Program:
    """The program with its closed-over tensors as its first inputs."""
    with paused_gc():
        b = builder()
        old, n = program.placeholders, program.n_inputs
        new = b.inputs([*old[n:], *old[:n]])
        consts = len(old) - n
        outs = b.inlined(program, [*new[consts:], *new[:consts]])
        return Program(b.finish(outs), len(old), program.n_outputs, (), program.name)


def run_flow(
    body: Program,
    key: tuple,
    build: Callable[[Builder, list], list],
    inputs: Sequence[Tensor],
) -> tuple:
    """The results for these inputs of what ``build(builder, nodes)`` makes of ``body``; ``key``
    says what else that depends on."""
    sigs = tuple([signature(x) for x in inputs])

    def program() -> Program:
        with paused_gc():
            b = builder()
            args = [b.placeholder("x", sig) for sig in sigs]
            outs = build(b, args)
            return fresh(Program(b.finish(outs), len(args), len(outs), (), str(key[0])), ())

    return execute(body.derived((*key, sigs), program), inputs)
