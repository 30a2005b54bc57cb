"""Carry tangents or Taylor coefficients through the bodies of loops and branches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch.fx import Node

from ..graph import Program
from ..trace.emit import Builder, paused_gc
from ..trace.views import laid_out
from ..transforms.jvp import jvp
from ..transforms.taylor import taylor
from ..transforms.walk import builder, filled_node
from .bodies import Flow, dense, emit_flow


class SeriesLayout(NamedTuple):
    """The order of values and coefficients side by side: those ``wrt`` have coefficients up to
    ``order``, after all values of their group."""

    groups: tuple[range, ...]
    wrt: tuple[int, ...]
    order: int

    def count(self, k: int) -> int:
        """Return the size of group ``k``, coefficients included."""
        group = self.groups[k]
        return len(group) + self.order * sum(i in group for i in self.wrt)

    def joined(self, values: Sequence[Any], coefficients: Any) -> list:
        """Return values in order, each group followed by ``coefficients(i)`` of its values."""
        found: list = []
        for group in self.groups:
            found += [values[i] for i in group]
            found += [c for i in group if i in self.wrt for c in coefficients(i)]
        return found

    def parted(self, found: Sequence[Any]) -> list[list]:
        """Undo :meth:`joined`: return for each value a list of it and of its coefficients."""
        rows: list[list] = []
        rest = iter(found)
        for group in self.groups:
            rows += [[next(rest)] for _ in group]
            for i in group:
                rows[i] += [next(rest) if i in self.wrt else None for _ in range(self.order)]
        return rows


def has_coefficients(given: Sequence[Sequence[Node | None]]) -> list[bool]:
    """Return which arguments have coefficients beyond the first."""
    return [any(c is not None for c in row[1:]) for row in given]


def body_tangents(body: Program, inputs: SeriesLayout, results: SeriesLayout) -> Program:
    """Return the body with tangents of its inputs and results; zeros for absent ones."""
    joint = lambda: jvp(body, inputs.wrt, zeros=False)
    return body.once(("tangents", inputs, results), lambda: beside(body, inputs, results, joint()))


def body_series(body: Program, inputs: SeriesLayout, results: SeriesLayout) -> Program:
    """Return the body with coefficients of its inputs and results; zeros for absent ones."""
    wrt, order, count = inputs.wrt, inputs.order, len(body.vals)
    joint = lambda: taylor(body, wrt, [(True,) * order] * len(wrt), order, count, scaled=False)
    return body.once(("series", inputs, results), lambda: beside(body, inputs, results, joint()))


def beside(body: Program, inputs: SeriesLayout, results: SeriesLayout, joint: Program) -> Program:
    """Return ``joint`` with coefficients in the order of the groups, not behind all values."""
    wrt, order, vals = inputs.wrt, inputs.order, body.vals
    given = joint.placeholders
    planned = {i: given[len(given) - len(wrt) * order + k * order] for k, i in enumerate(wrt)}
    with paused_gc():
        b = builder()
        sigs = [p.meta["val"] for p in body.placeholders]
        made = inputs.joined(sigs, lambda i: [dense(sigs[i])] * order)
        rows = inputs.parted([b.placeholder("x", sig) for sig in made])
        terms = [laid_out(b, c, planned[i].meta["val"]) for i in wrt for c in rows[i][1:]]
        outs = b.inlined(joint, [*[row[0] for row in rows], *terms])

        def found(j: int) -> list:
            part = outs[len(vals) + j * order :][:order]
            return [filled_node(b, 0, vals[j]) if c is None else c for c in part]

        ends = results.joined(outs, found)
        return Program(b.finish(ends), len(made), len(ends), (), "series")


def emit_series(
    b: Builder,
    target: Any,
    given: Sequence[Sequence[Node | None]],
    inputs: SeriesLayout,
    results: SeriesLayout,
    first: Sequence[Node] = (),
) -> list[list]:
    """Add control flow whose bodies carry coefficients, with arguments for these ``given`` behind
    the ``first``; return the coefficients of each result."""
    return results.parted(emit_flow(b, target, [*first, *arguments(b, given, inputs)]))


def arguments(b: Builder, given: Sequence[Sequence[Node | None]], inputs: SeriesLayout) -> list:
    """Return values and their coefficients in the order of ``inputs``; absent ones are zeros."""
    values = [row[0] for row in given]

    def terms(i: int) -> list:
        sig = dense(values[i].meta["val"])  # type: ignore[union-attr]
        return [
            filled_node(b, 0, sig) if c is None else laid_out(b, c, sig, exactly=True)
            for c in given[i][1:]
        ]

    return inputs.joined(values, terms)


class Tangents:
    """A loop that carries tangents beside its values: ``ts`` by number of argument."""

    def __init__(
        self, b: Builder, loop: Any, args: Sequence[Node], ts: Mapping[int, Node]
    ) -> None:
        self.b = b
        given = [i in ts for i in range(len(args))]
        self.loop, self.inputs, self.ends = loop.coefficients(given, 1, body_tangents)
        self.args = arguments(b, [[a, ts.get(i)] for i, a in enumerate(args)], self.inputs)
        #: of each value, and of its tangent, if it has one: the number of the argument
        self.places = self.inputs.parted(range(len(self.args)))
        #: the same for results
        self.results = self.ends.parted(range(len(self.loop.vals)))

    def emit(self) -> list[Node | None]:
        """Add the loop, and return the tangent of each result."""
        return [t for _, t in self.ends.parted(emit_flow(self.b, self.loop, self.args))]


class Loop(Flow):
    """Control flow that can carry tangents or coefficients beside its values."""

    coefficients: Callable

    def push(self, b: Builder, n: Node, new: Node, env: dict, tangents: dict) -> list:
        """Add a loop beside this one that carries the tangents with the values."""
        ts = {i: tangents[a] for i, a in enumerate(n.args) if a in tangents}
        return Tangents(b, self, new.args, ts).emit()  # type: ignore[arg-type]

    def series(self, b: Builder, n: Node, given: Sequence[Sequence], order: int) -> list[list]:
        """Let the loop also carry, and stack, coefficients."""
        loop, inputs, results = self.coefficients(has_coefficients(given), order, body_series)
        return emit_series(b, loop, given, inputs, results)
