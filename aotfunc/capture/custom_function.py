"""Record a call of a function with the user's rules: mark its results with the derivative, and the
batching, of the rules.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..debug import at
from ..errors import ArgumentError, CaptureError
from ..trace.traced import current
from .autograd_function import call_function
from .custom_batching import with_batching
from .deferred import calls_late
from .function_rules import Context
from .function_vmap import on_real_batch
from .instances import flatten_tree, unflatten_tree
from .own_rule import keep_owners
from .tree import Operands, in_order_of, parameter, structure


class CustomRules:
    """A function and the rules that replace those of the transforms.

    Reverse mode is ``forward(*args) -> (output, residuals)`` and ``backward(*fixed, residuals,
    cotangents)``, forward mode ``tangents_of(*fixed, primals, tangents) -> (output, tangents)``,
    batching ``batched(size, in_batched, *args) -> (output, out_batched)``. The arguments at the
    positions ``places`` are ``fixed``: they have no derivative."""

    #: the key of a call
    PARTS = ("f", "places", "forward", "backward", "symbolic_zeros", "tangents_of", "batched")

    def __init__(self, f: Callable, places: tuple[int, ...]) -> None:
        self.f, self.places = f, places
        name = getattr(f, "__name__", type(f).__name__)
        self.__name__ = name if name.isidentifier() else "function"  # FX prints no lambda
        self.forward: Callable | None = None
        self.backward: Callable | None = None
        self.tangents_of: Callable | None = None
        self.batched: Callable | None = None
        self.symbolic_zeros = False

    def record(self, *args: Any) -> Any:
        """Return ``f(*args)``, recorded with the rules."""
        keep_owners([self])
        if self.backward is None and self.tangents_of is None:
            leaves, spec = self.body(args)
            return unflatten_tree(leaves, spec)
        calls_late(*[r for r in (self.forward, self.backward, self.tangents_of) if r is not None])
        context = Context()
        context.set_materialize_grads(not self.symbolic_zeros)
        leaves = call_function(
            self.__name__,
            flatten_tree(args)[0],
            lambda context: self.run(context, args),
            context,
            None if self.backward is None else Pullback(weakref.ref(self)),
            None if self.tangents_of is None else Pushforward(weakref.ref(self)),
        )
        return unflatten_tree(list(leaves), context.spec)

    def run(self, context: Any, args: tuple) -> tuple:
        """Return the leaves of the output, and put what the rules read into the context."""
        primals = Operands(args, opened=True)
        # without a derivative, or called by its own forward, it is its body; a backward that is
        # asked for after all asks the forward again
        context.again = self.backward is not None and (
            self in _running.rules or not any(t.requires_grad for t in primals.tensors)
        )
        with torch.enable_grad(), reads_checked(self, context, primals.tensors):
            if self.backward is None or context.again:
                leaves, context.spec = self.body(args)
                kept: Any = args
            else:
                output, kept = self.output_and_residuals(args)
                leaves, context.spec = flatten_tree(output)
        residuals = Operands((kept, self.fixed(args)), opened=True)
        context.save_for_forward(*primals.tensors)
        context.save_for_backward(*residuals.tensors)
        context.shapes = tuple([t.shape for t in primals.tensors])
        context.residuals, context.primals = residuals.without_tensors(), primals.without_tensors()
        context.places = tuple(i for i, x in enumerate(leaves) if isinstance(x, Tensor))
        return tuple(leaves)

    def output_and_residuals(self, args: tuple) -> tuple[Any, Any]:
        """Return the user's forward's results and residuals; it may call the function's body."""
        _running.rules.append(self)
        try:
            result = self.forward(*args)  # type: ignore[misc]
        finally:
            _running.rules.pop()
        return two_results(self, "the forward", "(output, residuals)", result)

    def fixed(self, args: Sequence[Any]) -> list:
        return [args[i] for i in self.places]

    def varying(self, args: Sequence[Any]) -> tuple:
        return tuple([a for i, a in enumerate(args) if i not in self.places])

    # ----- batching ------------------------------------------------------------------------------

    def body(self, args: tuple) -> tuple[list, Any]:
        """Return the leaves and the tree of ``f(*args)``, recorded with its batching."""
        if self.batched is None:
            return flatten_tree(self.f(*args))
        result = on_real_batch(Batched(self), args)
        if result is not NotImplemented:
            return flatten_tree(result)
        spec = None

        def call() -> tuple[Batched, list]:
            nonlocal spec
            output = self.f(*args)
            leaves, spec = flatten_tree(output)
            return Batched(self, output), leaves

        return with_batching(args, self.batched, call), spec


@dataclass(unsafe_hash=True)
class OneRule:
    """One of a function's rules. Caches, which hold it, do not keep the function alive."""

    of: weakref.ref[CustomRules]

    @property
    def rules(self) -> CustomRules:
        if (rules := self.of()) is None:
            raise CaptureError(
                "a function with rules is no longer there, and is asked for one: keep a reference "
                "to it while what it has computed is differentiated or batched"
            )
        return rules


class Batched(OneRule):
    """The user's batching rule in the form of an ``autograd.Function``'s, checked against
    ``sample``, the output of one call, if that is known."""

    generate_vmap_rule = False

    def __init__(self, rules: CustomRules, sample: Any = NotImplemented) -> None:
        super().__init__(weakref.ref(rules))
        self.__name__ = rules.__name__
        leaves, self.spec = flatten_tree(sample)
        self.like = tuple([(x.shape, x.dtype) if isinstance(x, Tensor) else None for x in leaves])
        self.checks = sample is not NotImplemented
        self.key = (self.of, self.spec, self.like, self.checks)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Batched) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def vmap(self, info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
        """Call the rule with the batch of each argument in front, whatever its ``in_dims``."""
        rules = self.rules
        dims, spec = flatten_tree(in_dims)
        front = [
            x.movedim(d, 0) if d is not None else x
            for x, d in zip(flatten_tree(args)[0], dims, strict=True)
        ]
        flags = unflatten_tree([d is not None for d in dims], spec)
        batched_args = unflatten_tree(front, spec)
        result = rules.batched(info.batch_size, list(flags), *batched_args)  # type: ignore[misc]
        output, batched = two_results(rules, "the batching rule", "(output, out_batched)", result)
        leaves, out_spec = flatten_tree(output)
        flags, flag_spec = flatten_tree(batched)
        if flag_spec != out_spec or not all(isinstance(yes, bool) for yes in flags):
            raise ArgumentError(
                f"{rules.__name__}: the batching rule's out_batched must be True or False for "
                f"each part of its output {structure(output)}, not {batched!r}"
            )
        if self.checks:
            self.check(info.batch_size, output, leaves, out_spec, flags)
        return output, unflatten_tree([0 if yes else None for yes in flags], out_spec)

    def check(self, size: int, output: Any, leaves: list, spec: Any, flags: list[bool]) -> None:
        """Refuse an output of another structure, other shapes or dtypes than one call's."""
        name = f"{self.__name__}: the batching rule's output"
        if spec != self.spec:
            raise ArgumentError(f"{name} is {structure(output)}, of another structure than f's")
        for x, want, yes in zip(leaves, self.like, flags, strict=True):
            if isinstance(x, Tensor) != (want is not None):
                raise ArgumentError(
                    f"{name} is {structure(output)}, with tensors in other places than f's"
                )
            if want is not None:
                whole = (*([size] if yes else []), *want[0])
                if (tuple(x.shape), x.dtype) != (whole, want[1]):
                    raise ArgumentError(
                        f"{name} has a tensor of shape {list(x.shape)} and {x.dtype}, where f and "
                        f"out_batched say {list(whole)} and {want[1]}"
                    )


class Pullback(OneRule):
    """The user's backward in the form of an ``autograd.Function``'s: a gradient for each leaf."""

    def __call__(self, context: Any, *cotangents: Any) -> list:
        rules, spec = self.rules, context.primals.spec
        residuals, fixed = context.residuals.rebuilt(context.to_save)
        if context.again:
            if context.draws:
                raise CaptureError(
                    f"{rules.__name__} draws random numbers, and its derivative was not known to "
                    "be wanted: let an argument require grad, and let the forward not call the "
                    "function itself"
                )
            _, residuals = rules.output_and_residuals(residuals)
        tree = unflatten_tree(list(cotangents), context.spec)
        grads = rules.backward(*fixed, residuals, tree)  # type: ignore[misc]
        args = unflatten_tree(list(context.primals.literals), spec)
        given = rules.varying(args)
        if not isinstance(grads, tuple | list) or len(grads) != len(given):
            raise ArgumentError(
                f"{rules.__name__}: the backward must return a tuple of {len(given)}, a gradient "
                f"for each argument that has one, not {structure(grads)}"
            )
        shapes, feed = iter(context.shapes), iter(grads)
        found: list = []
        for i, a in enumerate(args):
            leaves, leaf_spec = flatten_tree(a)
            here = [
                next(shapes) if k in context.primals.places else None
                for k in range(len(found), len(found) + len(leaves))
            ]
            grad = None if i in rules.places else next(feed)
            if grad is None:
                found += [None] * len(leaves)
            else:
                found += argument_gradients(rules, i, leaf_spec, in_order_of(a, grad), here)
        return found


def argument_gradients(
    rules: CustomRules, i: int, spec: Any, grad: Any, shapes: Sequence[torch.Size | None]
) -> list:
    """Return the leaves of argument ``i``'s gradient, of this tree and these shapes."""
    name = parameter(rules.f, i) or f"argument {i}"
    leaves, given = flatten_tree(grad)
    if given != spec:
        raise ArgumentError(
            f"{rules.__name__}: the backward's gradient of {name} is {structure(grad)}, which "
            "does not have that argument's structure"
        )
    check_shapes(f"{rules.__name__}: the backward's gradient of {name}", leaves, shapes)
    return leaves


class Pushforward(OneRule):
    """The user's jvp in the form of a Function's: a tangent for each output tensor."""

    def __call__(self, context: Any, *tangents: Any) -> list:
        rules, spec = self.rules, context.primals.spec
        primals = context.primals.rebuilt(context.saved_for_forward)
        given = unflatten_tree(list(tangents), spec)
        result = rules.tangents_of(  # type: ignore[misc]
            *rules.fixed(primals), rules.varying(primals), rules.varying(given)
        )
        output, found = two_results(rules, "the jvp", "(output, tangents)", result)
        leaves, out_spec = flatten_tree(in_order_of(output, found))
        if out_spec != context.spec:
            raise ArgumentError(
                f"{rules.__name__}: the tangents that the jvp returns are {structure(found)}, "
                f"which does not have the structure of its output {structure(output)}"
            )
        outputs = flatten_tree(output)[0]
        sizes = [x.shape if isinstance(x, Tensor) else None for x in outputs]
        check_shapes(f"{rules.__name__}: a tangent of the output", leaves, sizes)
        for x, t in zip(outputs, leaves, strict=True):
            if isinstance(x, Tensor) and isinstance(t, Tensor) and x.dtype != t.dtype:
                raise ArgumentError(
                    f"{rules.__name__}: a tangent of the output is {t.dtype}, and its value "
                    f"{x.dtype}"
                )
        return [leaves[i] for i in context.places]


def check_shapes(what: str, leaves: Sequence[Any], shapes: Sequence[torch.Size | None]) -> None:
    """Refuse a derivative of another shape than its value's."""
    for x, shape in zip(leaves, shapes, strict=True):
        if isinstance(x, Tensor) and shape is not None and x.shape != shape:
            raise ArgumentError(f"{what} has shape {list(x.shape)}, and its value {list(shape)}")


class _Running(threading.local):
    def __init__(self) -> None:
        self.rules: list[CustomRules] = []  # the functions whose forward is running


_running = _Running()


def two_results(rules: CustomRules, which: str, what: str, result: Any) -> Any:
    """Return the result of a rule that must return two things."""
    if isinstance(result, tuple) and len(result) == 2:
        return result
    raise ArgumentError(f"{rules.__name__}: {which} must return {what}, not {structure(result)}")


@contextmanager
def reads_checked(rules: CustomRules, context: Any, args: Sequence[Tensor]) -> Iterator[None]:
    """Refuse a function that closes over a tensor that requires grad, as no rule covers it; note
    whether the function draws random numbers."""
    trace = current()
    assert trace is not None
    start, count, known = len(trace.records), trace.count, {trace.ref_of(t)[0] for t in args}
    yield
    active, context.draws = trace.autograd.active(), False
    for instr, refs, grad, _, line in trace.records[start:]:
        context.draws |= instr.facts.random
        if grad and any(r in active for r in refs if r < count and r not in known):
            raise CaptureError(
                f"{rules.__name__} closes over a tensor that requires grad{at(line)}, and its "
                "rules are for its arguments: pass the tensor as one, or detach() it"
            )
