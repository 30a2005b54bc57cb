"""Find which elements of a result depend on which elements of an input, by the graph.

Each value of the graph has a Boolean matrix, a row for each of its elements and a column for each
element of the input. An elementwise op joins the rows of its arguments. An op that is linear in an
argument is run on numbers that name elements: where it moves, sums up or leaves out elements, the
results say which. Products of matrices and convolutions have the pattern of their factors; of any
other op every element depends on all that its arguments do."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from ..graph import Program, draws
from ..trace.nested import leaves, mapped
from .activity import active_nodes
from .lower import lowered
from .rules.schema import call_op, full_args, tensor_args
from .rules.table import entry_for

aten = torch.ops.aten
Pattern = Any  # a scipy.sparse.csr_array of bools


class Dependence:
    """The patterns of the values of a program, for its input ``wrt``; ``tensors`` are its
    arguments."""

    def __init__(self, program: Program, wrt: int, tensors: Sequence[Tensor]) -> None:
        program = lowered(program, frozenset({"calls", "customs"}))
        self.placeholders, self.outputs = program.placeholders, program.outputs
        self.values: dict[Node, Any] = dict(zip(self.placeholders, tensors, strict=True))
        self.input = self.placeholders[wrt]
        self.active = active_nodes(program.graph.nodes, [self.input])
        #: what depends on random numbers: a value that no other run repeats, so it is never read
        self.drawn: set[Node] = set()
        for n in program.graph.nodes:
            if n.op == "call_function" and (draws(n) or not self.drawn.isdisjoint(n._input_nodes)):
                self.drawn.add(n)
        self.patterns: dict[Any, Pattern] = {}
        #: the arguments whose values the pattern depends on: indices, and factors with zeros
        self.read: set[int] = set()

    def of(self, n: Any) -> Pattern:
        """Return the pattern of a value, with a row for each of its elements."""
        if n not in self.patterns:
            self.patterns[n] = self.found(n)
        return self.patterns[n]

    def found(self, n: Any) -> Pattern:
        count = self.input.meta["val"].numel
        if not isinstance(n, Node) or n not in self.active:
            rows = n.meta["val"].numel if isinstance(n, Node) else 1
            return sparse.csr_array((rows, count), dtype=bool)
        if n is self.input:
            return sparse.eye_array(count, dtype=bool, format="csr")
        call, item = n.args if n.target is operator.getitem else (n, None)
        if not isinstance(call.target, OpOverload):
            return self.everything(call, n)
        op, args = call.target, full_args(call.target, call.args, call.kwargs)
        moving = [a for a in leaves(args) if isinstance(a, Node) and a in self.active]
        rules = entry_for(op)
        if rules.elementwise or torch.Tag.pointwise in op.tags:
            return joined([named_rows(a, n) @ self.of(a) for a in moving])
        if (factors := FACTORS.get(op)) is not None:
            found = factors(self, *args)
            return self.everything(call, n) if found is None else found
        if rules.along or op in ALONG:
            groups, dims = slices(moving[0].meta["val"].shape, args[ALONG.get(op, 1)])
            given, here = tuple(groups.shape), tuple(n.meta["val"].shape)
            kept = tuple(1 if i in dims else k for i, k in enumerate(given))
            numbers = torch.arange(math.prod(kept))
            rows = numbers.view(kept).expand(here) if len(here) == len(given) else numbers
            return in_groups(joined([self.of(a) for a in moving]), groups, rows)
        if op in NORMALISED and (item or 0) < (1 if "backward" in op._schema.name else 3):
            found = self.normalised(n, *NORMALISED[op](*args))
            return self.everything(call, n) if found is None else found
        places = [i for i in tensor_args(op) if any(a in self.active for a in leaves(args[i]))]
        if not rules.linear_in(places) or draws(call) or any(map(self.hidden, leaves(args))):
            return self.everything(call, n)
        parts = [self.linear(op, args, item, a) for a in dict.fromkeys(moving)]
        if any(p is None for p in parts):
            return self.everything(call, n)
        return joined(parts)

    def normalised(
        self, n: Node, full: Any, stats: Any, scales: Any, groups: Tensor, channels: Tensor
    ) -> Pattern | None:
        """Return the pattern of a normalisation, see ``NORMALISED``, or of its statistics, one for
        each group; None for others."""

        def rows(some: Sequence[Any], places: Tensor) -> list[Pattern]:
            own = [a for a in some if isinstance(a, Node) and a in self.active]
            if len(places):  # statistics that a mode does not use have no elements
                own = [a for a in own if a.meta["val"].numel]
            return [picks(places, a.meta["val"].numel) @ self.of(a) for a in own]

        size = n.meta["val"].numel
        mixed = [*rows(full, torch.arange(len(groups))), *rows(stats, groups)]
        scaled, whole = rows(scales, channels), size == len(groups)
        if not (whole or (mixed and size == int(groups.max()) + 1)):
            return None
        if len(full) > 1:  # the cotangent is scaled before
            mixed, scaled = mixed + scaled, []
        places = groups if whole else torch.arange(size)
        parts = [in_groups(joined(mixed), groups, places)] if mixed else []
        return joined([*parts, *(scaled if whole else ())])

    def everything(self, call: Node, n: Node) -> Pattern:
        """Return the pattern in which every element depends on all that any element of an argument
        depends on."""
        count = self.input.meta["val"].numel
        rows = [self.of(a).sum(0) > 0 for a in call._input_nodes if a in self.active]
        row = np.any(rows, 0) if rows else np.zeros(count, bool)
        return sparse.csr_array(np.broadcast_to(row, (n.meta["val"].numel, count)))

    def linear(self, op: OpOverload, args: list, item: int | None, x: Node) -> Pattern:
        """Return the pattern with respect to ``x`` of an op that is linear in it; None if the op
        mixes elements."""

        def run(t: Tensor) -> Tensor:
            zero = lambda a: t.new_zeros(a.meta["val"].shape, dtype=wide(a.meta["val"].dtype))
            put = lambda a: (
                wide(a)
                if not isinstance(a, Node)
                else t
                if a is x
                else zero(a)
                if a in self.active
                else self.value(a)
            )
            result = call_op(op, mapped(put, args))
            return result if item is None else result[item]

        picked = selection_pattern(run, x)
        return None if picked is None else picked @ self.of(x)

    def hidden(self, a: Any) -> bool:
        """Return whether an argument is random, and none that the pattern follows."""
        return a in self.drawn and a not in self.active

    def value(self, n: Any) -> Any:
        """Return the value of a node that does not depend on the input, nor on random numbers;
        floating numbers are float64, complex ones complex128."""
        if not isinstance(n, Node):
            return n
        if n.op == "placeholder":
            self.read.add(self.placeholders.index(n))
        if n not in self.values:
            op: Any = n.target
            args = mapped(self.value, list(n.args))
            self.values[n] = op(*args, **{k: self.value(v) for k, v in n.kwargs.items()})
        x = self.values[n]
        return x.to(wide(x.dtype)) if isinstance(x, Tensor) else x

    def nonzero(self, n: Any) -> Any:
        """Return where a factor may be nonzero: everywhere, if it depends on the input or on
        random numbers."""
        if n in self.active or n in self.drawn:
            return np.ones(n.meta["val"].shape, bool)
        return (self.value(n) != 0).numpy(force=True)


def wide(a: Any) -> Any:
    """Return the dtype that tells elements apart by their names, for ``a``; other values as they
    are."""
    if not isinstance(a, torch.dtype) or not (a.is_floating_point or a.is_complex):
        return a
    return torch.complex128 if a.is_complex else torch.float64


def joined(parts: Sequence[Pattern]) -> Pattern:
    found = parts[0]
    for part in parts[1:]:
        found = found + part
    return found


def picks(sources: Tensor, count: int) -> Pattern:
    """Return the matrix whose row i takes element ``sources[i]``, none for -1."""
    flat = sources.flatten().numpy(force=True)
    rows = np.flatnonzero(flat >= 0)
    return sparse.csr_array((np.ones(len(rows), bool), (rows, flat[rows])), (len(flat), count))


def named_rows(a: Node, n: Node) -> Pattern:
    """Return the matrix that broadcasts ``a`` to the shape of ``n``."""
    shape = a.meta["val"].shape
    return picks(
        torch.arange(a.meta["val"].numel).view(shape).expand(n.meta["val"].shape),
        a.meta["val"].numel,
    )


def selection_pattern(run: Any, x: Node) -> Pattern | None:
    """Return the pattern of a linear map of tensors like ``x`` whose every result is a multiple of
    one element, or whose every element goes to one result; None for other maps."""
    shape, count, dtype = x.meta["val"].shape, x.meta["val"].numel, wide(x.meta["val"].dtype)
    found = sources_of(run, shape, dtype)
    if found is not None:
        return picks(found, count)
    start = torch.zeros(shape, dtype=dtype, requires_grad=True)
    with torch.enable_grad():
        out = run(start)
    pull = lambda g: torch.autograd.grad(out, start, g, retain_graph=True)[0]
    targets = sources_of(pull, out.shape, out.dtype)
    return None if targets is None else picks(targets, out.numel()).T.tocsr()


def sources_of(apply: Any, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
    """Return, for each result of a map that is linear over the reals, the number of the one
    element that it depends on, -1 where it is zero; None for other maps. Elements have random
    numbers as names: complex ones have one phase, so that the ratio of two is real."""
    phase = 1 + 0.7j if dtype.is_complex else 1
    run = lambda names: apply((names * phase).view(shape))
    generator = torch.Generator().manual_seed(0)
    count = int(np.prod(shape))
    names, *checks = torch.rand(3, count, generator=generator, dtype=torch.float64) + 1
    ordered = torch.arange(1, count + 1, dtype=torch.float64)
    first = run(names)
    ratio = (run(names * ordered) / first).real
    number = torch.where(first == 0, 0, ratio).round().long() - 1
    known = number >= 0
    if not count or bool((number >= count).any()):
        return number.fill_(-1) if not count else None
    for other in checks:
        expected = first * (other / names)[number.clamp(min=0)]
        if not torch.allclose(run(other)[known], expected[known], rtol=1e-9, atol=0):
            return None
        if bool((run(other)[~known] != 0).any()):
            return None
    return number


# ----- along dimensions, normalisations ----------------------------------------------------------


def in_groups(rows: Pattern, groups: Tensor, results: Tensor) -> Pattern:
    """Return the pattern of results that depend on all elements of one group; ``groups`` numbers
    the elements, ``results`` the results."""
    count = int(groups.max()) + 1 if groups.numel() else 0
    return picks(results, count) @ (picks(groups, count).T.tocsr() @ rows)


def slices(shape: Sequence[int], dims: Any) -> tuple[Tensor, list[int]]:
    """Return the number of the slice along ``dims`` (None: all) that each element of a tensor lies
    in, and these dims."""
    given = dims if isinstance(dims, list | tuple) else [] if dims is None else [dims]
    every = [d % len(shape) for d in given] if shape else []
    every = every or list(range(len(shape)))
    kept = [1 if i in every else n for i, n in enumerate(shape)]
    return torch.arange(math.prod(kept)).view(kept).expand(tuple(shape)), every


#: ops whose results at a place depend on all of their arguments along dims; where these stand
ALONG: dict[Any, int] = {
    aten.linalg_vector_norm.default: 2,
    aten.norm.ScalarOpt_dim: 2,
    aten.norm.ScalarOpt_dim_dtype: 2,
    aten.kthvalue.default: 2,
    aten.topk.default: 2,
    aten.sort.stable: 2,
    aten._softmax_backward_data.default: 2,
    aten._log_softmax_backward_data.default: 2,
    **dict.fromkeys(
        (
            *(aten.var.correction, aten.std.correction),
            *(aten.var_mean.correction, aten.std_mean.correction),
            *(aten.max.dim, aten.min.dim, aten.median.dim, aten.nanmedian.dim, aten.mode.default),
            *(aten.sort.default, aten.cummax.default, aten.cummin.default),
        ),
        1,
    ),
}


def by_layers(x: Node, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the group and the channel of each element of ``x``."""
    places, size = torch.arange(x.meta["val"].numel), math.prod(shape)
    return places // size, places % size


def by_channels(x: Node, training: bool) -> tuple[Tensor, Tensor]:
    shape = x.meta["val"].shape
    places = torch.arange(x.meta["val"].numel)
    channels = places // math.prod(shape[2:]) % shape[1]
    return channels if training else places, channels


def by_groups(n: int, c: int, size: int, groups: int) -> tuple[Tensor, Tensor]:
    places = torch.arange(n * c * size)
    return places // (c // groups * size), places // size % c


#: for each: the arguments that have an element for each of the input's, for each group, for each
#: channel; the groups and the channels
NORMALISED: dict[Any, Any] = {
    aten.native_layer_norm.default: lambda x, shape, w, b, *_: (
        ((x,), (), (w, b), *by_layers(x, shape))
    ),
    aten.native_layer_norm_backward.default: lambda g, x, shape, mean, rstd, w, b, *_: (
        ((g, x), (mean, rstd), (w, b), *by_layers(x, shape))
    ),
    aten.native_group_norm.default: lambda x, w, b, n, c, size, groups, *_: (
        ((x,), (), (w, b), *by_groups(n, c, size, groups))
    ),
    aten.native_group_norm_backward.default: lambda g, x, mean, rstd, w, n, c, size, groups, *_: (
        ((g, x), (mean, rstd), (w,), *by_groups(n, c, size, groups))
    ),
    aten._native_batch_norm_legit.no_stats: lambda x, w, b, training, *_: (
        ((x,), (), (w, b), *by_channels(x, training))
    ),
    aten._native_batch_norm_legit_functional.default: lambda x, w, b, mean, var, training, *_: (
        ((x,), (), (w, b, mean, var), *by_channels(x, training))
    ),
    aten._native_batch_norm_legit_no_training.default: lambda x, w, b, mean, var, *_: (
        ((x,), (), (w, b, mean, var), *by_channels(x, False))
    ),
    aten.native_batch_norm_backward.default: (
        lambda g, x, w, mean, var, saved, inverse, training, *_: (
            ((g, x), (), (w, mean, var, saved, inverse), *by_channels(x, training))
        )
    ),
}


# ----- products of matrices, convolutions --------------------------------------------------------


def kron(a: Any, b: Any) -> Pattern:
    return sparse.kron(a, b, format="csr").astype(bool)


def matrix_products(d: Dependence, a: Node, b: Node) -> Pattern:
    """Return the pattern of a product of matrices, of batches of them, or with vectors."""
    left, right = np.atleast_2d(d.nonzero(a)), d.nonzero(b)
    *batch, m, k = left.shape
    n = 1 if right.ndim == 1 else right.shape[-1]
    rows, columns = sparse.eye_array(m, dtype=bool), sparse.eye_array(n, dtype=bool)
    by_right = [kron(s, columns) for s in left.reshape(*(batch or [1]), m, k)]
    by_left = [kron(rows, s.T) for s in right.reshape(*(batch or [1]), k, n)]
    blocks = lambda each: sparse.block_diag(each, format="csr").astype(bool)
    return joined([blocks(by_right) @ d.of(b), blocks(by_left) @ d.of(a)])


def matrix_product_and_sum(d: Dependence, x: Node, a: Node, b: Node, *_: Any) -> Pattern:
    shape = (a.meta["val"].shape[0], b.meta["val"].shape[1])
    count = x.meta["val"].numel
    spread = picks(torch.arange(count).view(x.meta["val"].shape).expand(shape), count)
    return joined([spread @ d.of(x), matrix_products(d, a, b)])


def convolution_taps(d: Dependence, x: Node, w: Node, bias: Any, *how: Any) -> Pattern | None:
    """Return the pattern of a convolution: the union of those of its taps, each of which moves
    elements."""
    if w in d.active or w in d.drawn or (bias is not None and bias in d.active):
        return None
    weight, outputs = d.value(w), 1 if how[3] else 0
    found = []
    for tap in (weight != 0).any(outputs).nonzero().tolist():
        place = (*tap[:outputs], slice(None), *tap[outputs:])
        one = torch.zeros_like(weight)
        one[place] = (weight[place] != 0).double()
        run = lambda t, one=one: aten.convolution.default(t, one, None, *how)
        picked = selection_pattern(run, x)
        if picked is None:
            return None
        found.append(picked @ d.of(x))
    return joined(found) if found else None


FACTORS: dict[Any, Any] = {
    **dict.fromkeys(
        (aten.mm.default, aten.mv.default, aten.bmm.default, aten.dot.default), matrix_products
    ),
    aten.addmm.default: matrix_product_and_sum,
    aten.convolution.default: convolution_taps,
}
