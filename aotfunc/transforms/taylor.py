"""Taylor mode: carry the coefficients of a power series along with each value.

An op that is linear in what moves acts on each coefficient; a product is a convolution of them;
a quotient is solved for its next one. Any other op ``y = f(x)`` has the series of its derivative,
``y' = f'(x) x'``: its forward rule gives ``y'`` as a graph, in which ``y`` and ``x'`` are series
again, and the k-th coefficient of ``y`` is the (k-1)-th of ``y'`` divided by ``k``. So every op
with a forward rule has a series, and the k-th derivative costs a polynomial in k.

Source: Griewank and Walther, "Evaluating Derivatives" (2008), chapter 13; Bettencourt et al.,
"Taylor-Mode Automatic Differentiation for Higher-Order Derivatives in JAX" (2019)."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..debug import at
from ..errors import RuleError
from ..graph import Program, op_of
from ..trace.emit import paused_gc
from .activity import has_derivative, is_nondiff, sources
from .factors import alike, multiple, plus_product, sum_of
from .jvp import fit_tangents, forward, push, tangent_sig
from .lower import lowered
from .rules.table import entry_for
from .vjp import Copies, primals
from .walk import builder, filled_node, traced

aten = torch.ops.aten


class Series:
    """The coefficients, in the builder ``b``, of the values of a second graph, whose ops are those
    of the program and of its derivatives."""

    def __init__(self, order: int) -> None:
        self.b, self.ops, self.order = builder(), builder(), order
        self.given: dict[Node, Sequence[Node | None]] = {}  # input -> its derivatives
        self.derivatives: dict[Node, Node] = {}  # value -> the input that is its derivative
        self.integrals: dict[Node, Node] = {}  # input -> the value whose derivative it is
        self.aliases: dict[Node, Node] = {}  # value -> the input with its series
        self.originals: dict[Node, Node] = {}  # input -> the value with its series
        self.known: dict[tuple[Node, int], Any] = {}
        self.moves: dict[Node, bool] = {}
        self.slopes: dict[Node, tuple[list, bool]] = {}
        self.bodies: dict[Node, Any] = {}
        self.flows: dict[Node, list] = {}

    # ----- the graph of ops ----------------------------------------------------------------------

    def moving(self, n: Any) -> bool:
        """Return whether a value has coefficients beyond the first."""
        if n.__class__ is not Node or not has_derivative(n.meta["val"]):
            return False
        if n not in self.moves:
            if n.op == "placeholder":
                series = self.given.get(n)
                self.moves[n] = series is None or any(c is not None for c in series[1:])
            else:
                call = op_of(n)
                movers = {i: None for i in sources(call) if self.moving(i)}
                flat = n.target is aten.detach.default or is_nondiff(n, movers, False)
                self.moves[n] = bool(movers) and not flat
        return self.moves[n]

    def derivative(self, n: Node) -> Node:
        """Return an input whose series is the derivative of that of ``n``."""
        if n not in self.derivatives:
            d = self.ops.placeholder("d", tangent_sig(n.meta["val"]))
            self.derivatives[n], self.integrals[d] = d, n
        return self.derivatives[n]

    def alias(self, n: Node) -> Node:
        """Return an input whose series is that of ``n``: a rule's ops on it are not simplified
        together with the ops that make ``n``."""
        if n not in self.aliases:
            a = self.ops.placeholder("a", n.meta["val"])
            self.aliases[n], self.originals[a] = a, n
        return self.aliases[n]

    def slope(self, n: Node) -> tuple[list, bool]:
        """Return the derivatives of the outputs of a call, by its forward rule, and whether they
        are steady: linear in the derivatives of the arguments, with constant factors."""
        if n not in self.slopes:
            movers = [i for i in n._input_nodes if self.moving(i)]
            given = {i: self.derivative(i) for i in movers}
            read = {i: self.alias(i) for i in movers}
            found = push(self.ops, n, n, Copies(read), given)
            parts = found if isinstance(found, list) else [found]
            rest = {read[i]: d for i, d in given.items()}
            rest |= {o: self.derivative(o) for o in self.outputs(n)}
            ends = {*given.values(), *rest}
            forward(self.ops, nodes_between(ends, parts), Copies(), rest)  # type: ignore
            self.slopes[n] = parts, not any(p in rest for p in parts)
        return self.slopes[n]

    def outputs(self, n: Node) -> list[Node]:
        val = n.meta["val"]
        if not isinstance(val, tuple):
            return [n]
        return [self.ops.item(n, i) for i, v in enumerate(val) if has_derivative(v)]

    def opened(self, n: Node) -> Any:
        """Return the ops that a call is composed of, or None."""
        if n not in self.bodies:
            formula = entry_for(n.target).series
            if n.target is aten.pow.Tensor_Scalar and whole_power(n.args[1]):
                formula = lambda x, p: integer_power(x, int(p))
            self.bodies[n] = formula and traced(formula)(self.ops, *n.args)
        return self.bodies[n]

    # ----- coefficients --------------------------------------------------------------------------

    def coefficient(self, n: Any, k: int) -> Any:
        """Return a value's k-th coefficient, None for zero; a list for several outputs."""
        if n.__class__ is not Node:
            return n if k == 0 else None
        if (n, k) not in self.known:
            self.known[n, k] = self.input(n, k) if n.op == "placeholder" else self.call(n, k)
        return self.known[n, k]

    def input(self, n: Node, k: int) -> Node | None:
        if n in self.given:
            return self.given[n][k] if k < len(self.given[n]) else None
        if n in self.originals:
            return self.coefficient(self.originals[n], k)
        if k + 1 >= self.order:  # `call` adds what is linear in the last one
            return None
        c = self.coefficient(self.integrals[n], k + 1)
        return c if c is None or k == 0 else self.b.call(aten.mul.Tensor, c, k + 1)

    def call(self, n: Node, k: int) -> Any:
        b, env = self.b, Values(self)
        if n.target is operator.getitem and n.args[0] in self.flows:
            return self.flows[n.args[0]][n.args[1]][k]  # type: ignore[index]
        if hasattr(n.target, "bodies") and self.moving(n):
            return self.flow(n)
        if k == 0:
            return b.call_like(n, env, moved=True)
        if not self.moving(n):
            return None
        if n.target is operator.getitem:
            parts = self.coefficient(n.args[0], k)
            return parts and parts[n.args[1]]
        if (body := self.opened(n)) is not None:
            return fit_tangents(b, self.coefficient(body, k), n)
        if entry_for(n.target).bilinear:
            x, y = n.args
            product = self.convolved(n.target, x, y, range(k + 1), k, **n.kwargs)
            return fit_tangents(b, product, n)
        if n.target is aten.reciprocal.default or (
            n.target is aten.div.Tensor and self.moving(n.args[1])
        ):
            return fit_tangents(b, self.quotient(n, k), n)
        if n.target is aten.pow.Tensor_Scalar:
            return self.powered(n, k)
        slope, steady = self.slope(n)
        found: Any = None
        if not steady:
            parts = [multiple(self.b, self.coefficient(p, k - 1), Fraction(1, k)) for p in slope]
            found = parts if isinstance(n.meta["val"], tuple) else parts[0]
            if k < self.order:
                return found
        moved = {i: c for i in n._input_nodes if (c := self.coefficient(i, k)) is not None}
        linear = push(b, n, self.coefficient(n, 0), env, moved)
        if found is None or linear is None:
            return linear if found is None else found
        if isinstance(found, list):
            return [sum_of(self.b, pair) for pair in zip(linear, found, strict=True)]
        return sum_of(self.b, [linear, found])

    def flow(self, n: Node) -> list:
        """Return the coefficients of a loop's or a branch's results, all at once."""
        if n not in self.flows:
            target: Any = n.target
            if not hasattr(target, "series"):
                raise RuleError(
                    f"jet: {target.__name__} has no series{at(n.meta.get('line'))}: nest jvp "
                    "instead"
                )
            orders = range(self.order + 1)
            given = [[self.coefficient(a, k) for k in orders] for a in n.args]
            for row, a in zip(given, n.args, strict=True):
                row[0] = Values(self)[a]  # type: ignore[index]
            self.flows[n] = target.series(self.b, n, given, self.order)
        return self.flows[n]

    # ----- series of products, quotients and powers ----------------------------------------------

    def quotient(self, n: Node, k: int) -> Any:
        """Return the series of ``x = n y``: ``n_k = (x_k - sum n_j y_(k-j), j < k) / y_0``."""
        x, y = (1, *n.args)[-2:]
        known = self.convolved(aten.mul.Tensor, n, y, range(k), k)
        first = self.coefficient(x, k)
        if known is None:
            rest = first
        elif first is None:
            rest = self.b.call(aten.neg.default, known)
        else:
            rest = self.b.call(aten.sub.Tensor, first, known)
        return rest and self.b.call(aten.div.Tensor, rest, self.coefficient(y, 0))

    def powered(self, n: Node, k: int) -> Any:
        """Return the series of ``n' x = p n x'``: ``k x_0 n_k`` is the sum of ``(p j - k + j) x_j
        n_(k-j)`` for j from 1 to k (Knuth, "The Art of Computer Programming", volume 2, 4.7).
        Where ``x_0`` is 0 the sum is 0, and so is the coefficient of an order below p."""
        x, p = n.args
        if p == 0:
            return None
        terms = [
            multiple(self.b, self.times(aten.mul.Tensor, x, j, n, k - j), (p * j - k + j) / k)
            for j in range(1, k + 1)
        ]
        found, divisor = sum_of(self.b, terms), self.coefficient(x, 0)
        if found is None:
            return None
        if k < p.real:
            zero = self.b.call(aten.eq.Scalar, divisor, 0)
            divisor = self.b.call(aten.masked_fill.Scalar, divisor, zero, 1)
        return self.b.call(aten.div.Tensor, found, divisor)

    def convolved(self, op: Any, x: Any, y: Any, js: Sequence[int], k: int, **how: Any) -> Any:
        """Return the sum of ``op(x_j, y_(k-j))``; of a square each product once."""
        if x is y and op is aten.mul.Tensor and len(js) == k + 1:
            middle = None if k % 2 else self.times(op, x, k // 2, x, k // 2)
            if middle is not None:
                return self.products(op, x, x, range(k // 2), k, middle, 2)
            return multiple(self.b, self.products(op, x, x, range((k + 1) // 2), k), 2)
        return self.products(op, x, y, js, k, **how)

    def products(
        self,
        op: Any,
        x: Any,
        y: Any,
        js: Sequence[int],
        k: int,
        found: Any = None,
        factor: int = 1,
        **how: Any,
    ) -> Any:
        """Add the sum of ``op(x_j, y_(k-j))``, times ``factor``, to what was ``found``. Where
        there are many products of numbers, each is one op with its sum."""
        fused = op is aten.mul.Tensor and self.order > 2
        for j in reversed(js) if fused else js:
            left, right = self.coefficient(x, j), self.coefficient(y, k - j)
            if fused and all(map(alike, (found, found), (left, right))):
                found = plus_product(self.b, found, left, right, Fraction(factor))
            else:
                term = multiple(self.b, self.times(op, x, j, y, k - j, **how), factor)
                found = sum_of(self.b, [found, term])
        return found

    def times(self, op: Any, x: Any, i: int, y: Any, j: int, **how: Any) -> Any:
        left, right = self.coefficient(x, i), self.coefficient(y, j)
        return None if left is None or right is None else self.b.call(op, left, right, **how)


class Values(dict[Node, Any]):
    """The first coefficients by node; zeros where there is none."""

    def __init__(self, series: Series) -> None:
        self.series = series

    def __missing__(self, n: Node) -> Any:
        value = self.series.coefficient(n, 0)
        return filled_node(self.series.b, 0, n.meta["val"]) if value is None else value


def nodes_between(ends: set[Node], outs: Sequence[Any]) -> list[Node]:
    """Return the calls, in order, that ``outs`` depend on, after ``ends``."""
    found, waiting = set[Node](), [o for o in outs if o.__class__ is Node]
    while waiting:
        n = waiting.pop()
        if n not in found and n not in ends and n.op == "call_function":
            found.add(n)
            waiting += n._input_nodes
    return sorted(found)


def whole_power(p: Any) -> bool:
    return not isinstance(p, complex) and 2 <= p <= 64 and p == int(p)


def integer_power(x: Tensor, p: int) -> Tensor:
    """Return ``x ** p`` by squaring."""
    half = x if p < 4 else integer_power(x, p // 2)
    square = half * half
    return x * square if p % 2 else square


def taylor(
    program: Program,
    wrt: Sequence[int],
    given: Sequence[Sequence[bool]],
    order: int,
    n_out: int,
    scaled: bool = True,
) -> Program:
    """Return the series of a program: ``(inputs, derivatives of wrt, closed-over) -> (outputs,
    derivatives of the first n_out)``.

    ``given[i][k - 1]`` says whether input ``wrt[i]`` has a derivative of order ``k``: the others
    are zero. Derivatives of an output are its orders 1 to ``order``, None where zero. Those that
    are not ``scaled`` are coefficients, k-th derivatives divided by ``k!``."""
    factor = math.factorial if scaled else lambda k: 1
    program = lowered(program, frozenset({"calls"}))
    with paused_gc():
        series = Series(order)
        b, old = series.b, program.placeholders
        new = primals(b, old[: program.n_inputs])
        rows: dict[int, list] = {}
        for i, flags in zip(wrt, given, strict=True):
            sig = tangent_sig(old[i].meta["val"])
            rows[i] = [
                b.placeholder(f"{old[i].name}_{k}", sig, role="tangent") if yes else None
                for k, yes in enumerate(flags, 1)
            ]
        count = sum(map(sum, given))
        new += primals(b, old[program.n_inputs :])
        env = dict(zip(old, series.ops.inputs(old), strict=True))
        for i, (p, x) in enumerate(zip(old, new, strict=True)):
            each = [multiple(b, c, 1 / factor(k)) for k, c in enumerate(rows.get(i, ()), 1)]
            series.given[env[p]] = [x, *each]
        series.ops.copy(program.graph.nodes, env)
        for n in program.graph.nodes:  # in order: draws, and no deep recursion
            if n.op == "call_function":
                for k in range(order + 1):
                    series.coefficient(env[n], k)
        outs = [env[o] if isinstance(o, Node) else o for o in program.outputs]
        first = [series.coefficient(o, 0) for o in outs]
        rest = [
            multiple(b, series.coefficient(o, k), Fraction(factor(k)))
            for o in outs[:n_out]
            for k in range(1, order + 1)
        ]
        found = [*first[: program.n_outputs], *rest]
        graph = b.finish([*found, *first[program.n_outputs :]])
        mutated = [i if i < program.n_inputs else i + count for i in program.mutated]
        return Program(graph, program.n_inputs + count, len(found), mutated, "jet")
