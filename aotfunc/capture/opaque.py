"""Make the forward of an ``autograd.Function`` that needs values (of numpy, say) one node of the
graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from ..debug import Line
from ..trace.emit import Builder, remap
from ..trace.functionalize import Functionalizer
from ..trace.modes import Surroundings
from ..trace.nested import listed
from ..trace.shapes.sig import Sig, sig_of
from ..trace.traced import current, no_recording, quiet
from .calls import Step, interned
from .tree import Operands

aten = torch.ops.aten


class ForwardCall(NamedTuple):
    """A call ``cls.forward(*args)``."""

    cls: Any
    operands: Operands
    surroundings: Surroundings


class OpaqueForward(Step):
    """A call of ``forward`` on real tensors as the graph runs, with the Function's derivative."""

    def __init__(self, call: ForwardCall, vals: tuple[Sig, ...]) -> None:
        super().__init__(vals)
        self.call = call
        self.__name__ = f"{call.cls.__name__}_forward"
        self.batching: Callable | None = None

    def __repr__(self) -> str:
        return f"{self.call.cls.__name__}.forward"

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """Return the tensors among the results of the Function, which may write to its copies."""
        output, _ = forward_result(self.call, tensors)
        return [o for o in listed(output) if isinstance(o, Tensor)]

    # ----- as a recorded step --------------------------------------------------------------------

    def emit(self, f: Functionalizer, refs: Sequence[int], grad: bool, line: Line | None) -> None:
        node = f.b.node(self, tuple(f.read(r, False) for r in refs), {}, self.outs)
        self.bind(f, [f.b.item(node, i) for i in range(len(self.outs))], grad)

    def run(self, values: list[Tensor]) -> list[Tensor]:
        return self(*values)

    # ----- as a node -----------------------------------------------------------------------------

    dissolved_with = None

    def inline(self, b: Builder, args: Sequence[Any], inner: Callable | None = None) -> list:
        node = b.node(self, tuple(args), {}, self.outs)
        return [b.item(node, i) for i in range(len(self.outs))]

    def pull(
        self, b: Builder, n: Node, g: dict[int, Node], active: Any, again: Any
    ) -> tuple[list, list]:
        return [], []

    def push(self, b: Builder, n: Node, new: Node, env: dict, tangents: dict) -> list:
        return [None] * len(self.outs)

    def batch(self, walk: Any, n: Node) -> tuple[Any, Any]:
        if self.batching is not None:
            return self.batching(walk, n.args, n.meta.get("line"))
        b = walk.b
        flags, args = [walk.has(a) for a in n.args], remap(n.args, walk.env)
        pairs = list(zip(args, flags, strict=True))
        rows = [
            self.inline(b, [b.call(aten.select.int, a, 0, k) if yes else a for a, yes in pairs])
            for k in range(walk.size)
        ]
        walk.loops.append((self, n.meta.get("line")))
        columns = zip(*rows, strict=True)
        return [b.call(aten.stack.default, list(column)) for column in columns], [True] * len(
            self.outs
        )


def forward_result(call: ForwardCall, tensors: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
    """Run ``cls.forward`` on copies, outside of recordings; return its result and them."""
    with no_recording(), quiet(), torch.no_grad():
        copies = [t.detach().clone(memory_format=torch.preserve_format) for t in tensors]
        with call.surroundings.again():
            return call.cls.forward(*call.operands.rebuilt(copies)), copies


def record(cls: Any, args: Sequence[Any], batching: Callable | None, why: Exception) -> Any:
    """Record ``cls.forward(*args)`` as one step and return its results. Their shapes are those of
    a run on zeros.

    Raises ``why`` if that run fails, if a result other than a tensor may depend on values, or if
    the forward writes to an argument that it does not return."""
    trace = current()
    assert trace is not None
    operands = Operands(args)
    tensors = operands.tensors
    call = ForwardCall(cls, operands.without_tensors(), Surroundings.now())
    sigs = [trace.ref_of(t)[1] for t in tensors]
    with quiet():
        zeros = [
            torch.empty_strided(s.shape, s.stride, dtype=s.dtype, device=s.device).zero_()
            for s in sigs
        ]
        try:
            output, given = forward_result(call, zeros)
        except Exception as error:
            raise why from error
        outs = listed(output)
        returned = [next((i for i, x in enumerate(given) if o is x), None) for o in outs]
        kept = [
            torch.equal(x, z) or i in returned
            for i, (x, z) in enumerate(zip(given, zeros, strict=True))
        ]
        if not all(kept) or not all(o is None or isinstance(o, Tensor) for o in outs):
            raise why
        vals = tuple(sig_of(o.detach()) for o in outs if isinstance(o, Tensor))
    try:
        step = interned(OpaqueForward, call, vals)
    except TypeError:  # an argument without a hash
        step = OpaqueForward(call, vals)
    step.batching = batching
    results = iter(trace.record(step, tensors))
    made: list[Any] = []
    for o, at in zip(outs, returned, strict=True):
        new = next(results) if isinstance(o, Tensor) else None
        made.append(new if at is None else tensors[at].copy_(new))
    return tuple(made) if isinstance(output, tuple | list) else made[0]
