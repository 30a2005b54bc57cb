"""Batching: walks a graph and gives every op that meets the batch a form with one more dimension,
the batch at 0.

Ops that do not meet it are copied as they are: what is the same for all samples is computed once.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from ..debug import at
from ..errors import ArgumentError, CaptureError, RuleError
from ..graph import Program, draws
from ..trace.emit import Builder, carried, paused_gc, remap, remap_dict
from ..trace.marks import check_gradient, dead_end, fail, hidden_write, no_tangent, once
from ..trace.nested import mapped
from ..trace.shapes.sig import Facts, Sig, contiguous_stride, make_sig
from . import fallback, loops
from .rules.schema import full_args, tensor_args
from .rules.table import RULES
from .walk import apply, builder, errors_of, traced

aten = torch.ops.aten

#: ops that mean the same with the batch in front, whatever their arguments
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


class Batch:
    """One batching walk: the size, what random ops do, and which old nodes are batched in the new
    graph."""

    def __init__(self, b: Builder, size: int, randomness: str, strict: bool = False) -> None:
        self.b, self.size, self.randomness, self.strict = b, size, randomness, strict
        self.env: dict[Node, Any] = {}
        self.batched: dict[Node, Any] = {}
        #: the ops that were batched by a loop over the samples, and where the user called them
        self.loops: list[tuple[OpOverload, Any]] = []

    def has(self, a: Any) -> Any:
        return mapped(lambda x: isinstance(x, Node) and bool(self.batched.get(x)), a)

    def walk(self, nodes: Any) -> None:
        b = self.b
        for n in nodes:
            if n.op != "call_function":
                continue
            b.meta = carried(n)
            if any(self.batched.get(i) for i in n._input_nodes) or (
                draws(n) and self.once_each(n)
            ):
                self.env[n], self.batched[n] = self.batch(n)
            else:
                self.env[n] = b.node(
                    n.target,
                    remap(n.args, self.env),
                    remap_dict(n.kwargs, self.env),
                    n.meta["val"],
                )
        b.meta = {}

    def once_each(self, n: Node) -> bool:
        """Whether an unbatched draw is made once per sample."""
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
        if op in TRANSPARENT:
            return self.b.call(op, self.env[n.args[0]], *n.args[1:]), True
        if op is hidden_write:
            old, new = (self.expanded(a) for a in n.args)
            return self.b.node(op, (old, new), {}, new.meta["val"]), True
        if not isinstance(op, OpOverload):
            return op.batch(self, n)
        if (
            not op._schema.returns
        ):  # a check of values, such as _linalg_check_errors: as good for a batch of them
            args = remap(n.args, self.env)
            if op._schema.name == "aten::_assert_async":
                args = (self.b.call(aten.all.default, args[0]), *args[1:])
            elif op is aten._linalg_check_errors.default:
                n = self.b.node(op, args, {"is_matrix": False}, None)
                return n, False
            return self.b.node(op, args, remap_dict(n.kwargs, self.env), None), False
        if draws(n) and self.randomness == "error":
            self.once_each(n)
        args = full_args(op, n.args, n.kwargs)
        flags = tuple(self.has(args[i]) for i in tensor_args(op))
        new = remap(tuple(args), self.env)
        by_value = n.meta["val"] if torch.Tag.dynamic_output_shape in op.tags else None
        tag = (
            "vmap",
            op,
            self.randomness if draws(n) else "",
            tuple(_logical(args[i]) for i in tensor_args(op)),
            by_value,
        )
        out, looped = apply(self.b, tag, self.make(n), flags, self.size, *new)
        self.loops += [(loop, n.meta.get("line")) for loop in looped]
        return out, True

    def expanded(self, n: Node) -> Node:
        """The new value of an old node, given a batch dimension if it has none."""
        new = self.env[n]
        if self.batched.get(n):
            return new
        return self.b.call(aten.expand.default, new, [self.size, *new.meta["val"].shape])

    def make(self, n: Node) -> Any:
        """Build the batched op by the first that answers: our rule (it may return NotImplemented),
        PyTorch's batching rule, the decomposition, a loop. Return ``(result, looped ops)``."""
        op = n.target
        line = RULES.get(op)
        rule: Any = line.vmap if line is not None else None
        randomness = self.randomness
        where = tensor_args(op)
        want = n.meta["val"]

        def make(b: Builder, flags: tuple, size: int, *args: Any) -> Any:
            if not size:  # for every op
                return traced(lambda *_: loops.no_samples(want))(b, *args), []
            full = list(args)
            if rule is not None:
                if "batched" not in rule.wants:  # the rule wants every tensor batched
                    for i, yes in zip(where, flags, strict=True):
                        full[i] = _all_batched(b, full[i], yes, size)
                full = promoted(b, n, full)
                extras = {
                    "batched": flags,
                    "size": size,
                    "randomness": randomness,
                    "sample": _logical(n.args[0]),
                    "shape": want.shape
                    if isinstance(want, Sig)
                    else tuple(getattr(v, "shape", ()) for v in want),
                }
                with errors_of("batching", n, rule):
                    result = traced(lambda *xs: rule(*xs, **extras))(b, *full)
                    if result is not NotImplemented:
                        return checked_result(b, result, want, size), []
            elif Facts(op).random:
                raise RuleError(
                    f"{op} draws random numbers and has no batching rule{at(n.meta.get('line'))}"
                )
            result, looped = self.derived(b, n, flags, size, args)
            return checked_result(b, result, want, size), looped

        return make

    def derived(
        self, b: Builder, n: Node, flags: tuple, size: int, args: Any
    ) -> tuple[Any, list[OpOverload]]:
        op = n.target
        if Facts(op).dynamic:
            return loops.looped_by_value(b, n, flags, size, args), [op]
        body = fallback.decomposition(op)
        try:
            rule = fallback.batching_rule(op)
            return traced(lambda *xs: rule(*xs, batched=flags), intent=False)(b, *args), []
        except (fallback.NoFormula, CaptureError) as e:
            why = e
        if body is not None:
            return self.opened(b, n, body, flags, size, args)
        return loops.looped(b, n, flags, size, args, why), [op]

    def opened(
        self, b: Builder, n: Node, body: Any, flags: tuple, size: int, args: Any
    ) -> tuple[Any, list[OpOverload]]:
        """Batch what the op consists of."""
        inner = builder()
        where = tensor_args(n.target)
        sub = Batch(b, size, self.randomness, self.strict)

        def hole(a: Any, old: Any, yes: Any) -> Any:
            if isinstance(a, Node):
                p = inner.placeholder("x", old.meta["val"])
                sub.env[p], sub.batched[p] = a, yes
                return p
            return a

        holes = list(args)
        old = full_args(n.target, n.args, n.kwargs)
        for i, yes in zip(where, flags, strict=True):
            holes[i] = mapped(hole, args[i], old[i], yes)
        outs = traced(body)(inner, *holes)
        sub.walk(inner.graph.nodes)

        def result(o: Any) -> Any:
            return (
                [result(x) for x in o]
                if isinstance(o, list)
                else sub.expanded(o)
                if isinstance(o, Node)
                else o
            )

        return result(outs), [op for op, _ in sub.loops]


def _logical(a: Any) -> Any:
    """The unbatched signatures: a fragment also depends on them (ranks, dtype promotion)."""
    if isinstance(a, list | tuple):
        return tuple(_logical(x) for x in a)
    return a.meta["val"] if isinstance(a, Node) else None


def _all_batched(b: Builder, a: Any, yes: Any, size: int) -> Any:
    if isinstance(a, list | tuple):
        return [_all_batched(b, x, y, size) for x, y in zip(a, yes, strict=True)]
    if not isinstance(a, Node) or yes:
        return a
    return b.call(aten.expand.default, a, [size, *a.meta["val"].shape])


def promoted(b: Builder, n: Node, args: list) -> list:
    """A batched 0-dim tensor is no longer 0-dim, and would take part in dtype promotion: cast it
    as it would have been. One that is not batched is as precise as it was, where it can be."""
    op = n.target
    if torch.Tag.pointwise not in op.tags:
        return args
    old = full_args(op, n.args, n.kwargs)
    where = [i for i in tensor_args(op) if isinstance(old[i], Node)]
    sigs = [old[i].meta["val"] for i in where]
    if op is aten.where.self:  # its condition takes no part
        where, sigs = where[1:], sigs[1:]
    if len({s.dtype for s in sigs}) < 2 or not any(len(s.shape) == 0 for s in sigs):
        return args
    common = promotion(sigs)
    full = list(args)

    def cast(also_0_dim: bool) -> bool:
        for i, s in zip(where, sigs, strict=True):
            if len(s.shape) == 0 and s.dtype is not common and s.dtype is not torch.bool:
                if also_0_dim or full[i].meta["val"].shape:
                    full[i] = b.call(aten._to_copy.default, args[i], dtype=common)
        return promotion([full[i].meta["val"] for i in where]) is common

    if not cast(False):
        cast(True)
    return full


def promotion(sigs: Sequence[Sig]) -> torch.dtype:
    """The dtype that tensors of these signatures are computed in: 0-dim ones count only if they
    are of a higher category."""

    def category(d: torch.dtype) -> int:
        return 3 if d.is_complex else 2 if d.is_floating_point else 1 if d is not torch.bool else 0

    order = sorted(sigs, key=lambda s: not s.shape)
    common = order[0].dtype
    for s in order[1:]:
        if s.shape or not order[0].shape or category(s.dtype) > category(common):
            common = torch.promote_types(common, s.dtype)
    return common


def checked_result(b: Builder, result: Any, want: Any, size: int) -> Any:
    """The result of a rule, in the unbatched dtype. Raises ValueError where it is not of the
    unbatched shape behind the batch."""
    if isinstance(want, tuple):
        if not isinstance(result, list | tuple):
            result = [result]
        return [
            checked_result(b, r, w, size) if w.__class__ is Sig else r
            for r, w in zip(result, want, strict=False)
        ]
    if not isinstance(result, Node):
        raise ValueError(f"it returned {result!r}")
    val = result.meta["val"]
    if val.dtype is not want.dtype:
        result = b.call(aten._to_copy.default, result, dtype=want.dtype)
    if tuple(val.shape) != (size, *want.shape):
        raise ValueError(f"it returned shape {list(val.shape)} instead of {[size, *want.shape]}")
    return result


def vmap(
    program: Program,
    in_dims: Sequence[int | None],
    sigs: Sequence[Sig],
    size: int,
    randomness: str,
    out_dims: Sequence[int | None] | None = None,
    strict: bool = False,
) -> Program:
    """The batched program. ``in_dims`` and ``sigs``: one per input, for the *batched* inputs;
    ``out_dims``: one per result.

    A result with ``out_dims`` None must not be batched. A mutated input gets its new value back in
    its own layout. Ops that only a loop over the samples can batch are reported by a LoopWarning,
    or with ``strict`` refused (RuleError)."""
    with paused_gc():
        b = builder()
        batch = Batch(b, size, randomness, strict)
        closed = program.placeholders[len(in_dims) :]
        dims = [*in_dims, *[None] * len(closed)]
        sigs = [*sigs, *(p.meta["val"] for p in closed)]
        for p, sig in zip(program.placeholders, sigs, strict=True):
            batch.env[p] = b.placeholder(p.name, sig, role=p.meta.get("role"))
        for p, dim in zip(program.placeholders, dims, strict=True):
            if dim is not None:
                batch.env[p] = with_dim_moved(b, batch.env[p], dim, 0)
                batch.batched[p] = True
        batch.walk(program.graph.nodes)
        for op, line in batch.loops:
            loops.report(op, line, strict)
        results = []
        outs = program.outputs
        for i, o in enumerate(outs[: program.n_outputs]):
            results.append(placed(batch, o, 0 if out_dims is None else out_dims[i], i))
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
    """The error for writing a batched value to an unbatched tensor."""
    text = (
        f"vmap: a tensor that is the same for all samples ({target.name}) was written with a "
        f"value that differs between samples{at(value.meta.get('line'))}; make it an input with "
        "its own in_dims"
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


def placed(batch: Batch, o: Any, dim: int | None, i: int) -> Any:
    """A result with its batch dimension where it was asked for."""
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
    """``n`` with one dimension moved."""
    if source == target:
        return n
    order = list(range(len(n.meta["val"].shape)))
    order.insert(target, order.pop(source))
    return b.call(aten.permute.default, n, order)


def inserted(sig: Sig, dim: int, size: int) -> Sig:
    """The signature of a contiguous batched tensor whose samples have this shape."""
    shape = list(sig.shape)
    shape.insert(dim, size)
    return make_sig(tuple(shape), contiguous_stride(tuple(shape)), sig.dtype, sig.device)
