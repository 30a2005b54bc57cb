"""Record a user's function as a body of control flow, and check what it loops over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..capture.bodies import dense, row_sig, with_constants
from ..capture.capture import as_called, capture
from ..capture.captured import Captured
from ..capture.makers import as_makers
from ..capture.tree import flatten, leaf_paths, structure
from ..debug import at, user_line, where_defined
from ..errors import ArgumentError, CaptureError
from ..graph import Program
from ..runtime.called import called
from ..trace.emit import Builder, paused_gc
from ..trace.shapes.sig import Sig
from ..trace.tape import signature
from ..trace.traced import current
from ..transforms.fresh import fresh
from ..transforms.walk import builder


def tensors(name: str, what: str, leaves: Sequence[Any], spec: Any) -> list[Tensor]:
    """Return the leaves of a tree as contiguous tensors; numbers become tensors."""
    found = []
    for k, x in enumerate(leaves):
        if isinstance(x, bool | int | float | complex):
            x = torch.as_tensor(x)
        if not isinstance(x, Tensor):
            raise ArgumentError(
                f"{name}: {what}{path(spec, k)} is of type {type(x).__name__}; it must be a tensor"
                f"{at(user_line())}"
            )
        found.append(x.contiguous())
    return found


def one_element(name: str, what: str, x: Any) -> Tensor:
    """Return a tensor with one element as a 0-dim tensor."""
    if not isinstance(x, Tensor) or x.numel() != 1:
        shown = structure(x) if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise ArgumentError(
            f"{name}: {what} must be a tensor with one element, not {shown}{at(user_line())}"
        )
    return x.reshape(())


def path(spec: Any, k: int) -> str:
    """Return where leaf ``k`` is in a tree."""
    return leaf_paths(spec)[k] if spec is not None else ""


def trip_count(name: str, rows: Sequence[Tensor], spec: Any, length: int | None) -> int:
    """Return the steps of a loop over these stacks. Raises ArgumentError for several lengths."""
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
    """Return the signature of a carried value."""
    return dense(signature(x))


def one_row_sig(x: Tensor) -> Sig:
    """Return the signature of one row of a stack."""
    return row_sig(signature(x))


class Body:
    """A function recorded once, on values like ``sigs``, as the body of ``name``. ``rebuilt``
    makes its arguments of their leaves; ``arranged`` puts its results in order."""

    def __init__(
        self,
        name: str,
        f: Callable,
        rebuilt: Callable,
        sigs: Sequence[Sig],
        leaves: Sequence[Tensor],
        why_not: str,
        arranged: Callable = lambda result: result,
    ) -> None:
        self.name, self.f, self.sigs = name, f, sigs

        def call(*args: Any) -> Any:
            self.returned = arranged(f(*args))
            return self.returned

        self.rec: Captured = capture(
            as_called(call),
            leaves,
            rebuilt,
            samples=dict(enumerate(sigs)),
            why_not=why_not,
            constants=False,
        )

    def check_like(self, other: Body) -> None:
        """Refuse a body whose results are unlike the ``other``'s."""
        (mine, spec), (theirs, their_spec) = flatten(self.returned), flatten(other.returned)
        if spec != their_spec or not all(map(same_leaf, mine, theirs)):
            raise ArgumentError(
                f"{self.name}: branches must return trees of equal structure, shapes and dtypes: "
                f"{where_defined(other.f)} returned {structure(other.returned)}, "
                f"{where_defined(self.f)} {structure(self.returned)}"
            )

    def check_carry(self, before: Any, after: Any, new: tuple, spec: Any) -> None:
        """Refuse a carry of another tree, other shapes or dtypes than it had."""
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
        """Return the body as a program ``(closed-over tensors, arguments) -> results``. Raises
        CaptureError if it writes to one of these."""
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


def inside_torch_func() -> bool:
    """Return whether a transform of torch.func's is under way, without a recording in it."""
    return current() is None and torch._C._functorch.peek_interpreter_stack() is not None


def same_leaf(x: Any, y: Any) -> bool:
    """Return whether two leaves are tensors of one shape and dtype, or equal."""
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return (x.shape, x.dtype) == (y.shape, y.dtype)
    return type(x) is type(y) and bool(x == y)


def consts_first(program: Program) -> Program:
    """Return the program with its closed-over tensors as its first inputs."""
    with paused_gc():
        b = builder()
        old, n = program.placeholders, program.n_inputs
        new = b.inputs([*old[n:], *old[:n]])
        consts = len(old) - n
        outs = b.inlined(program, [*new[consts:], *new[:consts]])
        new_one = Program(b.finish(outs), len(old), program.n_outputs, (), program.name)
        return as_makers(program, new_one)


def sharing_constants(steps: Sequence[Body]) -> tuple[list[Tensor], list[Program]]:
    """Return the tensors that several functions close over, each once, and their bodies as
    programs of these tensors and their arguments."""
    found: dict[int, Tensor] = {}
    for step in steps:
        found |= {id(t): t for t in step.rec.closed_over}
    number = {i: k for k, i in enumerate(found)}
    sigs = [signature(t) for t in found.values()]
    bodies = [
        with_constants(step.body(), [number[id(t)] for t in step.rec.closed_over], sigs)
        for step in steps
    ]
    return list(found.values()), bodies


def run_flow(
    body: Program,
    key: tuple,
    build: Callable[[Builder, list], list],
    inputs: Sequence[Tensor],
    like: Program | None = None,
) -> tuple:
    """Build a program from ``body`` by ``build(builder, nodes)`` and return its results for these
    inputs; ``key`` has all else that the program depends on. They are those of a program ``like``
    it."""
    sigs = tuple([signature(x) for x in inputs])

    def program() -> Program:
        with paused_gc():
            b = builder()
            args = [b.placeholder("x", sig) for sig in sigs]
            outs = build(b, args)
            new = fresh(Program(b.finish(outs), len(args), len(outs), (), str(key[0])), ())
            return new if like is None else as_makers(like, new)

    return tuple(called(body.derived((*key, sigs), program), inputs))
