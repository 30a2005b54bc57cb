"""Batch: walk a graph and give every op with a batched argument one more dimension, the batch at
0.

Other ops are copied: what is the same for all samples is computed once.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload
from torch.fx import Node

from ..debug import at
from ..errors import ArgumentError
from ..graph import Program, draws
from ..progress import with_progress
from ..trace.emit import Builder, paused_gc, remap, remap_dict
from ..trace.marks import check_gradient, dead_end, fail, hidden_write, no_tangent, once
from ..trace.shapes.sig import Facts, Sig, contiguous_stride, make_sig
from . import loops
from .batched_op import batched_op
from .rules import axes
from .walk import builder

aten = torch.ops.aten

#: ops that need no change for a batch in front, whatever their arguments
TRANSPARENT = {
    once,
    no_tangent,
    check_gradient,
    fail,
    dead_end,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh.default,
}


class Axis(NamedTuple):
    """The dimension that batching adds: the number of samples, which draws they share, whether
    ``strict`` refuses a loop over them, the name that collectives know it by, and whether control
    flow in which they differ goes sample by sample."""

    size: int
    randomness: str = "error"
    strict: bool = False
    name: str | None = None
    maps: bool = False


class Batch:
    """One batching walk: the axis, and the batched old nodes in the new graph."""

    def __init__(self, b: Builder, axis: Axis, apart: bool = False) -> None:
        self.b, self.axis, self.apart = b, axis, apart
        self.size, self.randomness = axis.size, axis.randomness
        self.maps = axis.maps and axis.size > 0
        self.env: dict[Node, Any] = {}
        self.batched: dict[Node, Any] = {}
        #: the ops that were batched by a loop over the samples, and the user's lines that call
        #: them
        self.loops: list[tuple[OpOverload, Any]] = []

    def has(self, a: Any) -> Any:
        if isinstance(a, list | tuple):
            return [self.has(x) for x in a]
        return a.__class__ is Node and bool(self.batched.get(a))

    def walk(self, nodes: Any) -> None:
        def visit(b: Builder, n: Node, env: dict[Node, Any]) -> Any:
            met = any([self.batched.get(i) for i in n._input_nodes]) or self.names(n)
            if not (met or (draws(n) and self.once_each(n))):
                return NotImplemented
            new, self.batched[n] = self.batch(n)
            if self.apart and n.target not in TRANSPARENT:  # y.clone(), y * 1
                if any(new is env.get(i) for i in n._input_nodes):
                    return b.call(aten.clone.default, new)
            return new

        self.b.copy(nodes, self.env, visit)

    def names(self, n: Node) -> bool:
        """Return whether a node is a collective over this batch's axis."""
        return n.target in axes.OPS and n.args[-1] == self.axis.name

    def over_samples(self, n: Node) -> tuple[Node, bool]:
        """Return the collective as an op over the batch, and whether samples differ in it."""
        x: Any = n.args[0]
        if n.target is axes.axis_index:
            sig = n.meta["val"]
            shape = [self.size, *sig.shape]
            index = self.b.call(aten.arange.default, self.size, device=sig.device)
            return self.b.call(aten.view.default, index, shape), True
        if n.target is axes.all_gather:
            if n.args[1] != self.size:
                raise ArgumentError(
                    f"vmap: {n.args[1]} samples are gathered along {self.axis.name!r}, which has "
                    f"{self.size}{at(n.meta.get('line'))}"
                )
            return self.expanded(x), False
        if not self.batched.get(x):
            return self.b.call(aten.mul.Tensor, self.env[x], self.size), False
        dtype = n.meta["val"].dtype
        return self.b.call(aten.sum.dim_IntList, self.env[x], [0], dtype=dtype), False

    def once_each(self, n: Node) -> bool:
        """Return whether an unbatched draw is made once per sample."""
        if self.randomness == "error":
            raise ArgumentError(
                f"vmap: {n.target} draws random numbers{at(n.meta.get('line'))}; say with "
                "randomness='same' or 'different' whether all samples share them"
            )
        return self.randomness == "different"

    def batch(self, n: Node) -> tuple[Any, Any]:
        op = n.target
        if op is operator.getitem:
            parent, i = n.args
            flags = self.batched[parent]
            return self.b.item(self.env[parent], i), flags[i] if isinstance(flags, list) else flags
        if self.names(n):
            return self.over_samples(n)
        if op in TRANSPARENT:
            return self.b.call(op, self.env[n.args[0]], *n.args[1:]), True
        if op is hidden_write:
            old, new = (self.expanded(a) for a in n.args)
            return self.b.node(op, (old, new), {}, new.meta["val"]), True
        if not isinstance(op, OpOverload):
            return op.batch(self, n)
        # a check of values, such as _linalg_check_errors, takes a batch of them
        if Facts(op).silent:
            args = remap(n.args, self.env)
            if op._schema.name == "aten::_assert_async":
                args = (self.b.call(aten.all.default, args[0]), *args[1:])
            elif op is aten._linalg_check_errors.default:
                n = self.b.node(op, args, {"is_matrix": False}, None)
                return n, False
            return self.b.node(op, args, remap_dict(n.kwargs, self.env), None), False
        random = draws(n)
        if random and self.randomness == "error":
            self.once_each(n)
        out, looped = batched_op(self, n, self.randomness if random else "")
        self.loops += [(loop, n.meta.get("line")) for loop in looped]
        return out, True

    def expanded(self, n: Node) -> Node:
        """Return the new value of an old node, with a batch dimension added if it has none."""
        new = self.env[n]
        if self.batched.get(n):
            return new
        return self.b.call(aten.expand.default, new, [self.size, *new.meta["val"].shape])

    def inside(self, b: Builder) -> Batch:
        """Return a walk over the ops inside of one, for the same batch, into ``b``."""
        return Batch(b, self.axis)


def vmap(
    program: Program,
    in_dims: Sequence[int | None],
    sigs: Sequence[Sig],
    axis: Axis,
    out_dims: Sequence[int | None] | None = None,
    apart: bool = False,
) -> Program:
    """Return the batched program. ``in_dims`` and ``sigs``: one per input, for the *batched*
    inputs; ``out_dims``: one per result. With ``apart`` equal values stay several.

    A result with ``out_dims`` None must not be batched. A mutated input gets its new value in its
    own layout. An op that only a loop over the samples can batch is reported by a LoopWarning; a
    strict axis refuses it (RuleError)."""
    with paused_gc():
        b = Builder(None, merge=False) if apart else builder()
        batch = Batch(b, axis, apart)
        closed = program.placeholders[len(in_dims) :]
        dims = [*in_dims, *[None] * len(closed)]
        sigs = [*sigs, *(p.meta["val"] for p in closed)]
        for p, sig in zip(program.placeholders, sigs, strict=True):
            batch.env[p] = b.placeholder(p.name, sig, role=p.meta.get("role"))
        for p, dim in zip(program.placeholders, dims, strict=True):
            if dim is not None:
                batch.env[p] = with_dim_moved(b, batch.env[p], dim, 0)
                batch.batched[p] = True
        batch.walk(with_progress("vmap", list(program.graph.nodes)))
        for op, line in batch.loops:
            loops.report(op, line, axis.strict)
        results = []
        outs = program.outputs
        for i, o in enumerate(outs[: program.n_outputs]):
            results.append(with_batch_dim(batch, o, 0 if out_dims is None else out_dims[i], i))
        written = []
        for index, o in zip(program.mutated, outs[program.n_outputs :], strict=True):
            dim = dims[index]
            if dim is None:
                if batch.has(o):
                    raise ArgumentError(shared_write(program.placeholders[index], o))
                written.append(batch.env[o])
            else:
                written.append(with_dim_moved(b, batch.expanded(o), 0, dim))
        return Program(
            b.finish([*results, *written]),
            program.n_inputs,
            program.n_outputs,
            program.mutated,
            "vmap",
        )


def shared_write(target: Node, value: Node) -> str:
    """Return the error for writing a batched value to an unbatched tensor."""
    text = (
        f"vmap: a tensor of shape {list(target.meta['val'].shape)} that is the same for all "
        "samples was written with a value that differs between "
        f"samples{at(value.meta.get('line'))}; make it an input with its own in_dims"
    )
    near = {value}
    for _ in range(4):
        near |= {i for n in near for i in n._input_nodes}
    if not any("batch_norm" in getattr(n.target, "__name__", "") for n in near):
        return text
    return (
        f"{text}. These are the running statistics of a batch norm in training mode, which cannot "
        "take one update for each sample. Either leave them out (replace_all_batch_norm_modules_, "
        "or track_running_stats=False), or give each sample its own (functional_call with buffers "
        "that have a batch dimension), or call eval() first."
    )


def with_batch_dim(batch: Batch, o: Any, dim: int | None, i: int) -> Any:
    """Return a result with its batch dimension at ``dim``."""
    if not isinstance(o, Node):
        if dim is not None:
            raise ArgumentError(
                f"vmap: output {i} is {o!r} of type {type(o).__name__}, not a tensor: only "
                "out_dims=None returns such values"
            )
        return o
    if dim is None:
        if batch.has(o):
            raise ArgumentError(f"vmap: output {i} is batched, but out_dims says None for it")
        return batch.env[o]
    rank = len(o.meta["val"].shape) + 1
    if not isinstance(dim, int):
        raise ArgumentError(
            f"vmap: out_dims has {dim!r} for output {i}; it must be an int or None"
        )
    if not -rank <= dim < rank:
        raise ArgumentError(
            f"vmap: out_dims has {dim} for output {i}, which has {rank} dimensions with the batch"
        )
    return with_dim_moved(batch.b, batch.expanded(o), 0, dim % rank)


def with_dim_moved(b: Builder, n: Node, source: int, target: int) -> Node:
    """Return ``n`` with one dimension moved."""
    if source == target:
        return n
    order = list(range(len(n.meta["val"].shape)))
    order.insert(target, order.pop(source))
    return b.call(aten.permute.default, n, order)


def inserted(sig: Sig, dim: int, size: int) -> Sig:
    """Return the signature of a contiguous batched tensor whose samples have this shape."""
    shape = list(sig.shape)
    shape.insert(dim, size)
    return make_sig(tuple(shape), contiguous_stride(tuple(shape)), sig.dtype, sig.device)
