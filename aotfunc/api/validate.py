"""Validate results: ``validate=True`` compares the first call with eager PyTorch.

Values are compared with the function's own (under ``vmap``, for each sample), derivatives with
autograd's, after a product with random cotangents if there are many, and with central differences
in float64. If a result differs, each op of the function goes through the same transform alone, and
the first that differs is named. :mod:`.checks` has the comparison for each transform.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from ..capture.tree import Arguments
from ..debug import at
from ..errors import AotfuncError, ArgumentError, ValidationError
from ..graph import Program
from ..trace.emit import remap, remap_dict
from ..trace.entering import entry
from ..trace.shapes.sig import floating
from ..transforms.lower import CALLS, lowered, marked
from .as_python import as_python
from .by_definition import defines_derivative
from .call import Call, positions
from .rehearse import EagerRun, Outside, rehearsed, widened
from .validated import NESTED, check_outermost, compared_inside

#: the steps of differences, in float64, in fractions of the largest number
STEPS = (1e-5, 1e-7, 1e-9)
#: of each floating result its slope and the error of that
Slopes = list[tuple[Tensor, Tensor]]


# ----- comparing ---------------------------------------------------------------------------------


class Validation:
    """A transform of ``f``, and the comparison of its first result."""

    #: whether it differentiates in any grad mode
    derives = True
    #: whether to search for the op that differs
    locates = True
    #: whether to compare it inside of what is compared
    nests = True
    #: whether it is inside of what is compared
    inner = False

    def __init__(self, transform: Callable, f: Callable, options: dict[str, Any]) -> None:
        self.transform, self.f, self.options = transform, f, options
        self.done = False
        self.name, self.has_aux = transform.__name__, options.get("has_aux", False)

    def first(self, f: Callable, *args: Any, **options: Any) -> Callable:
        """Return the transformed function, whose first call is compared."""
        made, self.how = self.transform(f, *args, **options), (args, options)

        @entry
        @functools.wraps(made, updated=())
        def call(*args: Any, **kwargs: Any) -> Any:
            result = made(*args, **kwargs) if self.done else self.compared(made, args, kwargs)
            self.done = True
            return result

        for method in ("lower", "explain"):
            if hasattr(made, method):
                setattr(call, method, getattr(made, method))
        return call

    def compared(self, made: Callable, args: tuple, kwargs: dict) -> Any:
        """Return ``made(*args, **kwargs)``, compared. Errors of the call itself come first."""
        if self.inner:  # what cannot be compared counts as right
            try:
                return self.compare(made, args, kwargs, NESTED.seen)
            except ArgumentError:
                return made(*args, **kwargs)
        return self.compare(made, args, kwargs, set())

    def compare(self, made: Callable, args: tuple, kwargs: dict, seen: set | None) -> Any:
        check_outermost(self.name)
        self.seed = 0
        self.w: list[Tensor] | None = None
        self.closed: list[Tensor] | None = None
        self.arguments = arguments = Arguments(args, kwargs, self.f)
        before = [x.detach().clone() if isinstance(x, Tensor) else x for x in arguments.leaves]
        failed = None
        self.outside = Outside(f := self.f, arguments.leaves)
        try:
            with NESTED.kept(seen):
                self.f = compared_inside(f)
                self.expect()
        except AotfuncError:
            raise
        except Exception as e:
            failed = e
        finally:
            self.f = f
        with NESTED.kept(None):
            result = made(*args, **kwargs)
        self.outside.remember()
        if failed is not None:
            raise ArgumentError(
                f"{self.name}(validate=True): there is nothing to compare with, as eager PyTorch "
                f"raises {type(failed).__name__}: {failed}"
            ) from failed
        try:
            with torch.no_grad(), NESTED.kept(None):
                self.check(result)
                self.equal("what it leaves in an argument", arguments.leaves, self.run.given)
        except ValidationError as e:
            if not self.locates:
                raise
            self.arguments = arguments.with_leaves(before)
            with NESTED.kept(None):
                raise ValidationError(f"{e}; {self.first_op()}") from None
        return result

    def reference(self, *args: Any, **kwargs: Any) -> Any:
        """Return what eager PyTorch gives."""
        return self.f(*args, **kwargs)

    def more(self, outs: Sequence[Any], roots: Sequence[Tensor]) -> list[Tensor]:
        """Return the closed-over tensors whose gradients are compared."""
        return []

    # ----- what is expected ----------------------------------------------------------------------

    def expect(self) -> None:
        """Run the function, as it is and in float64, and compute its differences."""
        leaves = self.arguments.leaves
        self.wrt = self.differentiated()
        self.run = EagerRun(self, leaves)
        NESTED.seen = None  # once is enough
        self.d = self.directions([leaves[k] for k in self.wrt])
        self.slopes: Slopes | None = None
        floats = [x for x in (*leaves, *self.run.outs) if floating(x)]
        self.eps = max([torch.finfo(x.dtype).eps for x in floats], default=0.0)
        self.repeats(leaves)
        try:
            self.wide = EagerRun(self, leaves, wide=True)
            pairs = zip(self.wrt, self.d, strict=True)
            # some functions read one half of symmetric matrices
            if all(symmetric(d) or not symmetric(leaves[k]) for k, d in pairs):
                self.slopes = self.differences()
        except Exception:  # not every function runs in float64, which measures the rounding
            self.slopes = None
            self.wide, self.eps = self.run, max(self.eps, self.run.eps)

    def differentiated(self) -> list[int]:
        """Return the positions of the differentiated leaves of the arguments."""
        every = tuple(range(len(self.arguments.spans)))
        return positions(self.name, self.arguments, self.options.get("argnums", every))

    def cotangents(self, outs: Sequence[Any]) -> list[Tensor]:
        """Return cotangents of the floating results, the same for each run; one for a number, as
        rules of the user's need not be linear."""
        if self.w is None:
            one = lambda x: torch.ones_like(widened(x.detach()))
            self.w = [self.random(x) if x.dim() else one(x) for x in filter(floating, outs)]
        return self.w

    def directions(self, xs: Sequence[Tensor]) -> list[Tensor]:
        found = []
        for x in map(Tensor.detach, xs):
            d = self.random(x) * ((float(x.abs().max()) if x.numel() else 0.0) or 1.0)
            found.append((d + d.mH) / 2 if symmetric(x) else d)
        return found

    def random(self, x: Tensor) -> Tensor:
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(x.shape, dtype=widened(x.dtype), generator=generator).to(x.device)

    def repeats(self, leaves: Sequence[Any]) -> None:
        """Raise ArgumentError unless another run gives the same."""
        again = EagerRun(self, leaves)
        try:
            for name in ("outs", "aux", "pulled"):
                self.equal("it", getattr(again, name), getattr(self.run, name))
        except ValidationError as e:
            raise ArgumentError(
                f"{self.name}(validate=True): there is nothing to compare with, as the function "
                "gives another result in a second run: it changes what it reads (an iterator, a "
                "clock); pass that as an argument"
            ) from e

    def differences(self) -> Slopes | None:
        """Return the slopes with the first step that autograd's derivative fits, or with the
        largest one. Those with a smaller one count where their error is small."""
        if not self.wrt:
            return None
        value, size = self.along(self.wide.pulled)
        noise = 10 * abs(self.along(self.run.pulled)[0] - value)
        first: Slopes | None = None
        for step in STEPS:
            self.slopes = self.slopes_at(step)
            sharp = first is None or self.slope()[1] <= 1e-2 * size
            if sharp and self.fits(noise, value, size):
                return self.slopes
            first = first or self.slopes
        return first

    def slopes_at(self, step: float) -> Slopes:
        """Return central differences of the floating results along ``d``, in float64, and their
        error: as much as one-sided differences, and another step, differ."""

        def at(k: int) -> list[Tensor]:
            leaves = list(self.arguments.leaves)
            for i, d in zip(self.wrt, self.d, strict=True):
                leaves[i] = widened(leaves[i].detach()) + k * step * d
            return list(filter(floating, EagerRun(self, leaves, wide=True).outs))

        found = []
        here = list(filter(floating, self.wide.outs))
        for c, a, b, d, e in zip(here, *map(at, (-2, -1, 1, 2)), strict=True):
            slope, bend = (d - b) / (2 * step), (d - 2 * c + b) / step
            found.append((slope, bend.abs() + (slope - (e - a) / (4 * step)).abs()))
        return found

    # ----- whether it is so ----------------------------------------------------------------------

    def check(self, result: Any) -> None:
        """Raise ValidationError if the result differs from the expected one."""
        raise NotImplementedError

    def equal(
        self,
        what: str,
        got: Sequence[Any],
        want: Sequence[Any],
        wide: Sequence[Any] | None = None,
        size: float = 0.0,
    ) -> None:
        """Raise ValidationError unless tensors are equal up to rounding: ten times the change by
        float64, and a fraction of the largest number. ``size``: that of the terms of a sum."""
        for i, (g, x, y) in enumerate(zip(got, want, want if wide is None else wide, strict=True)):
            if not isinstance(g, Tensor) or not isinstance(x, Tensor):
                continue
            which = f"{what} {i}" if len(got) > 1 else what
            if g.shape != x.shape or g.dtype != x.dtype:
                raise self.differs(
                    f"{which}, {g.dtype}{list(g.shape)}, has in eager PyTorch the type "
                    f"{x.dtype}{list(x.shape)}"
                )
            if not x.numel():
                continue
            if not floating(x):
                if not torch.equal(g, x):
                    raise self.differs(f"{which} differs from eager PyTorch's")
                continue
            g, x, y = widened(g.detach()), widened(x.detach()), widened(y.detach())
            largest = max(float(x.abs().nan_to_num(0.0, 0.0, 0.0).max()), size)
            noise = 10 * (x - y).abs().nan_to_num(0.0, 0.0, 0.0).max() + self.floor(largest)
            apart = torch.where((g == x) | (g.isnan() & x.isnan()), 0.0, (g - x).abs()).max()
            if not apart <= noise:
                raise self.differs(
                    f"{which} differs from eager PyTorch's by {apart:.2g}; numbers up to "
                    f"{largest:.2g} are rounded by {noise:.2g}"
                )

    def floor(self, largest: Any) -> Any:
        """Return the rounding allowed to numbers of this size."""
        return self.eps**0.5 * largest + (1e-7 if self.eps < 1e-10 else 1e-5)

    def derivative(
        self,
        got: list[Tensor],
        want: list[Tensor],
        wide: list[Tensor],
        along: Callable,
        size: float = 0.0,
    ) -> None:
        """Check a derivative against autograd's. If the two differ, differences along
        ``along(derivative)`` decide, unless the function states its derivative."""
        wrong = None
        try:
            self.equal("the derivative", got, want, wide, size)
        except ValidationError as e:
            wrong = e
        noise = 10 * abs(along(want)[0] - along(wide)[0])
        fits = self.fits(noise, *along(got))
        if wrong is not None and (not fits or self.fits(noise, *along(want)) or self.has_rules()):
            raise wrong
        if wrong is None and not fits and not self.has_rules():
            raise self.differs("the derivative, though it is autograd's, is not differences'")

    def fits(self, noise: float, value: float, size: float) -> bool:
        """Return whether a product with the derivative agrees with differences, within their
        error. ``noise``: its rounding; ``size``: that of its terms."""
        if self.slopes is None:
            return True
        slope, doubt = self.slope()
        size = max(size, abs(slope))
        return not abs(value - slope) > doubt + noise + 1e-6 * size + self.floor(size)

    def slope(self) -> tuple[float, float]:
        """Return the product of the slopes with the cotangents, and its error."""
        pairs = [(w, *s) for w, s in zip(self.cotangents(()), self.slopes or (), strict=True)]
        return (
            sum(dot(w, slope)[0] for w, slope, _ in pairs),
            sum(dot(w.abs(), doubt)[0] for w, _, doubt in pairs),
        )

    def along(self, pulled: Sequence[Tensor]) -> tuple[float, float]:
        """Return the product of cotangents with ``d``, and the size of its terms."""
        parts = [dot(g, d) for g, d in zip(pulled, self.d, strict=False)]
        return sum(p[0] for p in parts), sum(p[1] for p in parts)

    def has_rules(self) -> bool:
        """Return whether derivatives are stated: by ``detach``, custom rules, or definition."""
        program, _ = self.captured(self.arguments.leaves)
        return marked(program) or defines_derivative(program)

    def differs(self, what: str) -> ValidationError:
        return ValidationError(f"{self.name}(validate=True): {what}")

    # ----- which op it is ------------------------------------------------------------------------

    def captured(self, leaves: Sequence[Any]) -> tuple[Program, list[Tensor]]:
        """Return the function as a program, and its inputs."""
        arguments = self.arguments.with_leaves([*leaves])
        with self.outside.kept(), as_python():
            call = Call(self.name, self.f, arguments, self.wrt, self.has_aux)
            return lowered(call.program, CALLS), call.inputs

    def first_op(self) -> str:
        """Return text that names the first op that differs when it is transformed alone."""
        program, values = self.values()
        for n in program.graph.nodes:
            if not isinstance(n.target, OpOverload):
                continue
            try:
                self.alone(n, values)
            except ValidationError:
                return f"the first op that differs by itself is {n.target}{at(n.meta.get('line'))}"
            except Exception:  # an op alone may refuse the transform
                continue
        return "no op of the function differs by itself"

    def values(self) -> tuple[Program, dict[Node, Any]]:
        """Return the function as a program, and the values of its nodes."""
        program, inputs = self.captured(self.arguments.leaves)
        return program, node_values(program, inputs)

    def alone(self, n: Node, values: dict[Node, Any]) -> None:
        """Compare the op of a node under the transform as the function was."""
        raise NotImplementedError

    def again(self, f: Callable, *args: Any, **options: Any) -> Any:
        """Return ``f``, transformed, whose first call is compared but not searched."""
        own = inspect.signature(self.transform).bind(f, *args, **options)
        own.apply_defaults()
        check = type(self)(self.transform, f, own.arguments)
        check.locates = False
        return check.first(f, *args, **options)


def call_node(n: Node, *xs: Any) -> Any:
    """Call the op of a node on values of the nodes that it reads."""
    env = dict(zip(n.all_input_nodes, xs, strict=True))
    op: Any = n.target
    return op(*remap(n.args, env), **remap_dict(n.kwargs, env))


def node_values(program: Program, inputs: Sequence[Tensor]) -> dict[Node, Any]:
    env: dict[Node, Any] = dict(zip(program.placeholders, inputs, strict=True))
    with rehearsed(), torch.no_grad():
        for n in program.graph.nodes:
            if n.op == "call_function":
                env[n] = call_node(n, *[env[i] for i in n.all_input_nodes])
    return env


def symmetric(x: Tensor) -> bool:
    return x.dim() > 1 and x.shape[-1] == x.shape[-2] and torch.allclose(x, x.mH)


def dot(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Return the real product of two tensors, and the size of its terms."""
    terms = widened(a.detach()).conj() * widened(b.detach())
    return float(terms.sum().real), float(terms.abs().sum())
