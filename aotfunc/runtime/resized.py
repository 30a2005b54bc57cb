"""Share code between the programs of a batched function for batches of several sizes, where the
size is proved to be a literal of the code and nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from torch import fx

from ..backends.eager import compile_graph
from ..capture.calls import on_eager
from ..capture.makers import made_in, unread_in
from ..graph import Program
from ..trace.shapes.sig import Sig, contiguous_stride
from ..transforms.apart.parts import Mixed
from ..transforms.lower import lowered
from ..transforms.sizes import size_multiples
from ..transforms.vmap import Axis
from .execute import has_control_flow, ours
from .own_nodes import may_lack_nodes

Dims = Sequence[int | None]


def resized_program(
    base: Program,
    dims: tuple,
    sigs: Sequence[Sig],
    axis: Axis,
    out_dims: tuple,
    own: tuple,
    make: Callable,
) -> Program:
    """Return the batched ``base`` of ``make`` for an axis of this size; ``dims`` and ``sigs`` are
    of its inputs, ``out_dims`` and ``own``, shared memory, of its results."""
    layouts = [batch_layout(sig, dim) for sig, dim in zip(sigs, dims, strict=True)]
    if axis.size < 2 or None in layouts:  # a dimension of one has any stride
        return make()
    key = ("sizes", dims, tuple(layouts), axis._replace(size=0), out_dims, own)
    shared = base.derived(key, lambda: SharedCode(make(), axis.size))
    return shared.program_of(axis.size, make, dims, out_dims)


def batch_layout(sig: Sig, dim: int | None) -> tuple | None:
    """Return a key that batches share which differ only in size; None if that is hard to say."""
    if dim is None:
        return (sig,)
    rest = [d for d in range(sig.ndim) if d != dim]
    shape = [sig.shape[d] for d in rest]
    first = [dim, *rest]
    in_front = contiguous_stride(tuple(sig.shape[d] for d in first)) == tuple(
        sig.stride[d] for d in first
    )
    if not sig.plain and (sig.offset or not in_front):
        return None
    return (*shape, sig.dtype, sig.device, sig.plain)


class SharedCode:
    """Programs that differ in the size of the batch, and the code made of one of them."""

    TRIES = 3  # a size may happen to be one of the function's own, too

    def __init__(self, program: Program, size: int) -> None:
        self.program, self.size, self.tries = program, size, 0
        self.code: Callable | None = None

    def program_of(
        self, size: int, make: Callable[[], Program], dims: Dims, out_dims: Dims
    ) -> Program:
        if size == self.size:
            return self.program
        if self.code is None and self.tries < self.TRIES:
            self.tries += 1
            whole = lowered(self.program)
            try:
                self.code = compile_graph(
                    whole.graph, size_multiples(whole, dims, out_dims, self.size)
                )
            except Mixed:
                self.program, self.size = make(), size
                return self.program
        return (
            make()
            if self.code is None
            else Resized(self.program, functools.partial(self.code, size), make)
        )


class Resized(Program):
    """A program that runs the code of one for another size; its graph is made on demand."""

    def __init__(self, like: Program, code: Callable, make: Callable[[], Program]) -> None:
        self.n_inputs, self.n_outputs = like.n_inputs, like.n_outputs
        self.mutated, self.name = (), like.name
        self.like, self.make = like, make
        self.cache = {on_eager: code, "made": made_in(like), "unread": unread_in(like)}
        self.cache |= {fact: fact(like) for fact in (ours, has_control_flow, may_lack_nodes)}

    @property
    def weight(self) -> int:
        return self.like.weight

    @functools.cached_property
    def graph(self) -> fx.Graph:  # type: ignore[override]
        return self.make().graph
