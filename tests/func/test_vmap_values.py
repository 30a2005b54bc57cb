"""vmap of what depends on values: masks that select, indices that are written to, questions that
all samples answer alike. Each against a Python loop, also under vmap of vjp, vjp of vmap, and vmap
of vmap."""

import pytest
import torch
import torch.nn.functional as F

from aotfunc import grad, jacrev, jit, jvp, make_fx, vmap
from aotfunc.capture import capture
from aotfunc.errors import AotfuncError
from tests.functions import SavesInputs
from tests.inputs import f64
from tests.reference import assert_same, grads, jvps, loop

B = 3


def scalar(f):
    """A scalar of f's floating results that weighs their elements differently."""

    def call(*args):
        outs = [o for o in torch.utils._pytree.tree_leaves(f(*args)) if o.is_floating_point()]
        return sum(
            (o * torch.arange(1.0, o.numel() + 1, dtype=o.dtype).reshape(o.shape).cos()).sum()
            for o in outs
        )

    return call


def dims_of(in_dims, args):
    return in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(args)


def check(f, in_dims, args):
    """f under vmap, twice under vmap, with its derivative inside and outside."""
    dims = dims_of(in_dims, args)
    expected = loop(f, dims)(*args)
    assert_same(vmap(f, dims)(*args), expected)
    wrt = tuple(i for i, x in enumerate(args) if x.is_floating_point())
    differentiable = any(o.is_floating_point() for o in torch.utils._pytree.tree_leaves(expected))
    if wrt and differentiable:
        inside = vmap(grad(scalar(f), wrt), dims)
        assert_same(inside(*args), loop(grads(scalar(f), wrt), dims)(*args))
        whole, reference = scalar(vmap(f, dims)), scalar(loop(f, dims))
        assert_same(grad(whole, wrt)(*args), grads(reference, wrt)(*args))
        tangents = tuple(torch.randn_like(args[i]) for i in wrt)

        def of(run):
            def call(*primals):
                full = list(args)
                for i, p in zip(wrt, primals):
                    full[i] = p
                return run(*full)

            return call

        primals = tuple(args[i] for i in wrt)
        assert_same(
            jvp(of(whole), primals, tangents)[1], jvps(of(reference), primals, tangents)[1]
        )
    twice = [torch.stack([x, x]) if d is not None else x for x, d in zip(args, dims)]
    outer = tuple(None if d is None else 0 for d in dims)
    assert_same(vmap(vmap(f, dims), outer)(*twice), loop(loop(f, dims), outer)(*twice))


# what is the same for all samples may be asked
# ------------------------------------------------------------------------

MASK = torch.tensor([True, False, True, True])
COUNTS = torch.tensor([2, 0, 1, 3])
WEIGHTS = torch.tensor([0.5, -1.0, 2.0, 3.0], dtype=torch.float64)

UNMAPPED = {
    "closed-over mask": (lambda x: x[MASK] * 2, 0, lambda: (f64(B, 4),)),
    "mask argument": (lambda x, m: x[m] * x.sum(), (0, None), lambda: (f64(B, 4), MASK)),
    "mask of the second dim": (
        lambda x, m: x[:, m].sin(),
        (0, None),
        lambda: (f64(B, 2, 4), MASK),
    ),
    "mask of the first of two": (lambda x, m: x[m], (0, None), lambda: (f64(B, 4, 2), MASK)),
    "mask of two dims": (
        lambda x, m: x[m],
        (0, None),
        lambda: (f64(B, 2, 4), torch.stack([MASK, ~MASK])),
    ),
    "mask of a batch at the end": (lambda x, m: x[m], (1, None), lambda: (f64(4, B), MASK)),
    "mask made of an argument": (
        lambda x, w: x[w > 0] * w[w > 0],
        (0, None),
        lambda: (f64(B, 4), WEIGHTS),
    ),
    "mask made inside": (lambda x: x[torch.arange(4) > 1], 0, lambda: (f64(B, 4),)),
    "empty mask": (lambda x: x[torch.zeros(4, dtype=torch.bool)], 0, lambda: (f64(B, 4),)),
    "mask of x and an unmapped one": (
        lambda x, w: w[MASK] * x,
        (0, None),
        lambda: (f64(B, 3), f64(4)),
    ),
    "masked_select": (lambda x, m: x.masked_select(m), (0, None), lambda: (f64(B, 2, 4), MASK)),
    "masked_select, broadcast": (
        lambda x, m: x.masked_select(m),
        (0, None),
        lambda: (f64(B, 4), torch.stack([MASK] * 2)),
    ),
    "nonzero": (lambda x, m: x[torch.nonzero(m).squeeze(1)], (0, None), lambda: (f64(B, 4), MASK)),
    "nonzero as tuple": (
        lambda x, m: x[m.nonzero(as_tuple=True)],
        (0, None),
        lambda: (f64(B, 4), MASK),
    ),
    "where of one argument": (
        lambda x, m: x[torch.where(m)[0]],
        (0, None),
        lambda: (f64(B, 4), MASK),
    ),
    "argwhere": (lambda x, m: x[torch.argwhere(m)[:, 0]], (0, None), lambda: (f64(B, 4), MASK)),
    "repeat_interleave": (
        lambda x, n: x.repeat_interleave(n),
        (0, None),
        lambda: (f64(B, 4), COUNTS),
    ),
    "repeat_interleave, closed over": (
        lambda x: x.repeat_interleave(COUNTS, 0),
        0,
        lambda: (f64(B, 4, 2),),
    ),
    "one_hot": (lambda x, n: x @ F.one_hot(n).to(x.dtype), (0, None), lambda: (f64(B, 4), COUNTS)),
    "bincount": (lambda x, n: x * torch.bincount(n), (0, None), lambda: (f64(B, 4), COUNTS)),
    "unique": (
        lambda x, n: x[torch.unique(n)],
        (0, None),
        lambda: (f64(B, 4), torch.tensor([2, 0, 2, 3, 0])),
    ),
    "unique with counts": (
        lambda x, n: torch.unique(n, return_counts=True)[1] * x,
        (0, None),
        lambda: (f64(B, 3), torch.tensor([2, 0, 2, 3, 0])),
    ),
    "item": (lambda x, w: x * w.sum().item(), (0, None), lambda: (f64(B, 4), WEIGHTS)),
    "float": (
        lambda x, w: x * float(w[0]) + x[int(w[2])],
        (0, None),
        lambda: (f64(B, 4), WEIGHTS),
    ),
    "if": (
        lambda x, w: x * 2 if w.sum() > 0 else x.sin(),
        (0, None),
        lambda: (f64(B, 4), WEIGHTS),
    ),
    "while": (
        lambda x, w: x * sum(1 for _ in range(int(w[3]))),
        (0, None),
        lambda: (f64(B, 4), WEIGHTS),
    ),
    "tolist": (
        lambda x, n: torch.cat(x.split([1, 3])) * sum(n.tolist()),
        (0, None),
        lambda: (f64(B, 4), COUNTS),
    ),
    "split by tensor": (
        lambda x, n: x.split(n.tolist())[3] * 2,
        (0, None),
        lambda: (f64(B, 6), COUNTS),
    ),
    "written before": (
        lambda x, w: x[w.clone().mul_(-1) > 0] if w.max() > 0 else x,
        (0, None),
        lambda: (f64(B, 4), WEIGHTS),
    ),
}


@pytest.mark.parametrize("name", UNMAPPED)
def test_unmapped_values_may_be_asked(name):
    f, dims, make = UNMAPPED[name]
    check(f, dims, make())


# masks and indices that differ between samples
# ------------------------------------------------------------------------

MASKS = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()
PAIRS = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0], [0, 1, 0, 1]]).bool()  # two each
SQUARES = torch.tensor(
    [[[1, 0, 1], [0, 1, 0]], [[0, 1, 1], [1, 0, 0]], [[1, 1, 0], [0, 0, 1]]]
).bool()  # three each
INDEX = torch.tensor([[3, 0], [1, 1], [2, 3]])


def put(mask_or_index):
    def f(x, m, v):
        y = x * 2
        y[mask_or_index(m)] = v
        return y

    return f


def assigned(x, m, v):
    y = x.clone()
    y[m] = v
    return y * x


def added(x, m, v):
    y = x.clone()
    y[m] += v
    return y


def accumulated(x, i, v):
    return x.index_put((i,), v, accumulate=True)


MAPPED = {
    "x[mask] = number": (lambda x, m: assigned(x, m, 3.0), 0, lambda: (f64(B, 4), MASKS)),
    "x[mask] = number, unmapped x": (
        lambda x, m: assigned(x, m, 3.0),
        (None, 0),
        lambda: (f64(4), MASKS),
    ),
    "x[mask] = number, unmapped mask": (
        lambda x, m: assigned(x, m, 3.0),
        (0, None),
        lambda: (f64(B, 4), MASK),
    ),
    "x[mask] = 0-dim": (assigned, 0, lambda: (f64(B, 4), MASKS, f64(B))),
    "x[mask] = 0-dim, unmapped": (assigned, (0, 0, None), lambda: (f64(B, 4), MASKS, f64())),
    "x[mask] = 0-dim, unmapped mask": (assigned, (0, None, 0), lambda: (f64(B, 4), MASK, f64(B))),
    "x[mask] = 0-dim, only v mapped": (assigned, (None, None, 0), lambda: (f64(4), MASK, f64(B))),
    "x[mask] = one": (assigned, 0, lambda: (f64(B, 4), MASKS, f64(B, 1))),
    "x[mask] = row": (assigned, 0, lambda: (f64(B, 4, 2), MASKS, f64(B, 2))),
    "x[mask] = row, unmapped": (assigned, (0, 0, None), lambda: (f64(B, 4, 2), MASKS, f64(2))),
    "x[mask] = rows": (assigned, 0, lambda: (f64(B, 4, 3), PAIRS, f64(B, 2, 3))),
    "x[mask] = one for each": (assigned, 0, lambda: (f64(B, 4), PAIRS, f64(B, 2))),
    "x[mask] = one for each, unmapped v": (
        assigned,
        (0, 0, None),
        lambda: (f64(B, 4), PAIRS, f64(2)),
    ),
    "x[mask] = one for each, unmapped mask": (
        assigned,
        (0, None, 0),
        lambda: (f64(B, 4), PAIRS[0], f64(B, 2)),
    ),
    "x[mask of two dims] = number": (
        lambda x, m: assigned(x, m, 0.5),
        0,
        lambda: (f64(B, 2, 4), f64(B, 2, 4) > 0),
    ),
    "x[:, mask] = number": (
        lambda x, m: put(lambda m: (slice(None), m))(x, m, 2.0),
        0,
        lambda: (f64(B, 2, 4), MASKS),
    ),
    "x[:, mask] = column": (
        put(lambda m: (slice(None), m)),
        0,
        lambda: (f64(B, 2, 4), MASKS, f64(B, 2, 1)),
    ),
    "x[:, mask] = two each": (
        put(lambda m: (slice(None), m)),
        0,
        lambda: (f64(B, 2, 4), PAIRS, f64(B, 2, 2)),
    ),
    "x[i] = v": (
        assigned,
        0,
        lambda: (f64(B, 4), torch.tensor([[3, 0], [1, 2], [2, 3]]), f64(B, 2)),
    ),
    "x[i] = number": (lambda x, i: assigned(x, i, 2.0), 0, lambda: (f64(B, 4), INDEX)),
    "x[i] = v, unmapped x": (
        assigned,
        (None, 0, 0),
        lambda: (f64(4), torch.tensor([[3, 0], [1, 2], [2, 3]]), f64(B, 2)),
    ),
    "x[i] = v, unmapped i": (
        assigned,
        (0, None, 0),
        lambda: (f64(B, 4), torch.tensor([3, 1]), f64(B, 2)),
    ),
    "x[i] = v, only i mapped": (
        assigned,
        (None, 0, None),
        lambda: (f64(4), torch.tensor([[3], [1], [2]]), f64(1)),
    ),
    "x[i, mask] of unmapped": (lambda x, m: x[:, m][0], (0, None), lambda: (f64(B, 2, 4), MASK)),
    "accumulate": (accumulated, 0, lambda: (f64(B, 4), INDEX, f64(B, 2))),
    "accumulate, unmapped x": (accumulated, (None, 0, 0), lambda: (f64(4), INDEX, f64(B, 2))),
    "accumulate, unmapped i": (
        accumulated,
        (0, None, 0),
        lambda: (f64(B, 4), torch.tensor([1, 1]), f64(B, 2)),
    ),
    "accumulate, unmapped v": (accumulated, (0, 0, None), lambda: (f64(B, 4), INDEX, f64(2))),
    "accumulate, only i mapped": (accumulated, (None, 0, None), lambda: (f64(4), INDEX, f64(2))),
    "accumulate by mask": (accumulated, 0, lambda: (f64(B, 4), MASKS, f64(B, 1))),
    "accumulate by mask, one each": (accumulated, 0, lambda: (f64(B, 4), PAIRS, f64(B, 2))),
    "masked_fill": (lambda x, m: x.masked_fill(m, 2.0), 0, lambda: (f64(B, 4), MASKS)),
    "masked_fill, unmapped x": (
        lambda x, m: x.masked_fill(m, 2.0),
        (None, 0),
        lambda: (f64(4), MASKS),
    ),
    "masked_fill, unmapped mask": (
        lambda x, m: x.masked_fill(m, 2.0),
        (0, None),
        lambda: (f64(B, 4), MASK),
    ),
    "masked_fill by tensor": (
        lambda x, m, v: x.masked_fill(m, v),
        0,
        lambda: (f64(B, 4), MASKS, f64(B)),
    ),
    "masked_fill by tensor, only v": (
        lambda x, m, v: x.masked_fill(m, v),
        (None, None, 0),
        lambda: (f64(4), MASK, f64(B)),
    ),
    "masked_fill, broadcast": (
        lambda x, m: x.masked_fill(m, 2.0),
        0,
        lambda: (f64(B, 2, 4), MASKS),
    ),
    "masked_fill_": (
        lambda x, m: x.clone().masked_fill_(m, 2.0) * x,
        0,
        lambda: (f64(B, 4), MASKS),
    ),
    "masked_scatter": (
        lambda x, m, s: x.masked_scatter(m, s),
        0,
        lambda: (f64(B, 4), MASKS, f64(B, 5)),
    ),
    "masked_scatter, unmapped x": (
        lambda x, m, s: x.masked_scatter(m, s),
        (None, 0, 0),
        lambda: (f64(4), MASKS, f64(B, 5)),
    ),
    "masked_scatter, unmapped mask": (
        lambda x, m, s: x.masked_scatter(m, s),
        (0, None, 0),
        lambda: (f64(B, 4), MASK, f64(B, 5)),
    ),
    "masked_scatter, only mask mapped": (
        lambda x, m, s: x.masked_scatter(m, s),
        (None, 0, None),
        lambda: (f64(4), MASKS, f64(5)),
    ),
    "masked_scatter, broadcast": (
        lambda x, m, s: x.masked_scatter(m, s),
        0,
        lambda: (f64(B, 2, 4), MASKS, f64(B, 8)),
    ),
    "where": (lambda m, x, y: torch.where(m, x, y), 0, lambda: (MASKS, f64(B, 4), f64(B, 4))),
    "where, only mask mapped": (
        lambda m, x, y: torch.where(m, x, y),
        (0, None, None),
        lambda: (MASKS, f64(4), f64(4)),
    ),
    "where, only x mapped": (
        lambda m, x, y: torch.where(m, x, y),
        (None, 0, None),
        lambda: (MASK, f64(B, 4), f64(4)),
    ),
    "where with numbers": (
        lambda m, x: torch.where(m, x, 0.0) + torch.where(m, 1.0, x),
        0,
        lambda: (MASKS, f64(B, 4)),
    ),
    "where, broadcast": (
        lambda m, x, y: torch.where(m, x, y),
        0,
        lambda: (MASKS, f64(B, 2, 4), f64(B)),
    ),
    "+= by mask, number": (lambda x, m: x.masked_fill(m, 0) + x, 0, lambda: (f64(B, 4), MASKS)),
    "+= by mask that selects alike": (added, 0, lambda: (f64(B, 4), PAIRS, f64(B, 2))),
    "x[mask] that selects alike": (lambda x, m: x[m] ** 2, 0, lambda: (f64(B, 4), PAIRS)),
    "x[mask] that selects alike, unmapped x": (
        lambda x, m: x[m] ** 2,
        (None, 0),
        lambda: (f64(4), PAIRS),
    ),
    "x[:, mask] that selects alike": (
        lambda x, m: x[:, m].sin(),
        0,
        lambda: (f64(B, 2, 4), PAIRS),
    ),
    "masked_select that selects alike": (
        lambda x, m: x.masked_select(m),
        0,
        lambda: (f64(B, 2, 4), PAIRS),
    ),
    "nonzero that finds alike": (lambda m, x: x[m.nonzero()[:, 0]], 0, lambda: (PAIRS, f64(B, 4))),
    "unique that finds alike": (
        lambda n, x: x[n.unique()],
        0,
        lambda: (torch.tensor([[1, 1, 0], [2, 3, 3], [1, 2, 2]]), f64(B, 4)),
    ),
    "bincount as long": (
        lambda n, x: x * n.bincount(),
        0,
        lambda: (torch.tensor([[1, 3], [3, 3], [0, 3]]), f64(B, 4)),
    ),
    "repeat_interleave as long": (
        lambda x, n: x.repeat_interleave(n),
        0,
        lambda: (f64(B, 3), torch.tensor([[1, 2, 0], [3, 0, 0], [1, 1, 1]])),
    ),
    "nonzero_static": (
        lambda m, x: m.nonzero_static(size=3, fill_value=0)[:, 0] + x,
        0,
        lambda: (MASKS, f64(B, 3)),
    ),
    "nonzero_static, size 0": (lambda x: x.nonzero_static(size=0), 0, lambda: (f64(B, 2, 4),)),
    "nonzero_static of nothing": (
        lambda x: x.nonzero_static(size=2, fill_value=7),
        0,
        lambda: (f64(B, 0, 4),),
    ),
    "nonzero_static of a number": (lambda x: x.nonzero_static(size=2), 0, lambda: (f64(B),)),
    "nonzero_static of an empty batch": (
        lambda m: m.nonzero_static(size=2),
        0,
        lambda: (torch.ones(1, 4).bool(),),
    ),
    "x[mask of two dims]": (lambda x, m: x[m], 0, lambda: (f64(B, 2, 3, 4), SQUARES)),
    "x[mask of two dims] = row": (assigned, 0, lambda: (f64(B, 2, 3, 4), SQUARES, f64(B, 4))),
    "x[mask of two dims] = rows": (assigned, 0, lambda: (f64(B, 2, 3, 4), SQUARES, f64(B, 3, 4))),
    "x[mask of two dims] = rows, unmapped v": (
        assigned,
        (0, 0, None),
        lambda: (f64(B, 2, 3, 4), SQUARES, f64(3, 4)),
    ),
    "x[mask, 0]": (lambda x, m: x[m, 0], 0, lambda: (f64(B, 4, 2), PAIRS)),
    "x[mask, None]": (lambda x, m: x[m, None], 0, lambda: (f64(B, 4, 2), PAIRS)),
    "x[mask, 1:]": (lambda x, m: x[m, 1:], 0, lambda: (f64(B, 4, 2), PAIRS)),
    "x[mask, index]": (lambda x, m: x[m, torch.tensor([0, 1])], 0, lambda: (f64(B, 4, 2), PAIRS)),
    "x[mask, index], unmapped mask": (
        lambda x, m, i: x[m, i],
        (0, None, 0),
        lambda: (f64(B, 4, 4), PAIRS[0], INDEX),
    ),
    "x[mask of one, index]": (
        lambda x, m, i: x[m, i],
        0,
        lambda: (f64(B, 4, 4), torch.eye(4)[:B].bool(), INDEX),
    ),
    "x[mask, mask]": (lambda x, m: x[m, m], 0, lambda: (f64(B, 4, 4), PAIRS)),
    "x[mask, mask of one]": (
        lambda x, m, n: x[m, n],
        0,
        lambda: (f64(B, 4, 4), PAIRS, torch.eye(4)[:B].bool()),
    ),
    "x[mask, 0] = v": (put(lambda m: (m, 0)), 0, lambda: (f64(B, 4, 2), MASKS, f64(B))),
    "x[1:3, mask] = v": (
        put(lambda m: (slice(1, 3), m)),
        0,
        lambda: (f64(B, 5, 4), MASKS, f64(B)),
    ),
    "x[mask, index] = v": (
        put(lambda m: (m, torch.tensor([0, 1]))),
        0,
        lambda: (f64(B, 4, 2), PAIRS, f64(B)),
    ),
    "x[mask, index] = v for each": (
        put(lambda m: (m, torch.tensor([0, 1]))),
        0,
        lambda: (f64(B, 4, 2), PAIRS, f64(B, 2)),
    ),
    "x[mask, mask] = v for each": (
        put(lambda m: (m, m)),
        0,
        lambda: (f64(B, 4, 4), PAIRS, f64(B, 2)),
    ),
    "x[mask of one number]": (
        lambda x, m: x[m],
        (0, None),
        lambda: (f64(B, 4), torch.tensor(True)),
    ),
    "x[mask of one number] = v": (
        assigned,
        0,
        lambda: (f64(B, 4), torch.tensor([True, False, True]), f64(B, 4)),
    ),
    "x[mask of one number] = number": (
        lambda x, m: assigned(x, m, 2),
        0,
        lambda: (f64(B, 4), torch.tensor([True, False, True])),
    ),
    "indices apart": (lambda x, i: x[i, :, i], 0, lambda: (f64(B, 4, 2, 4), INDEX)),
    "indices apart, written": (
        lambda x, i, v: put(lambda i: (i, slice(None), i))(x, i, v),
        0,
        lambda: (f64(B, 4, 2, 4), torch.tensor([[3, 0], [1, 2], [2, 3]]), f64(B, 2, 2)),
    ),
    "put_": (
        lambda x, i, v: x.clone().put_(i, v, accumulate=True) * x,
        0,
        lambda: (f64(B, 4), INDEX, f64(B, 2)),
    ),
    "take by nonzero_static": (
        lambda x, m: torch.where(
            m.sum() > torch.arange(4), x[m.nonzero_static(size=4, fill_value=0)[:, 0]], 0.0
        ),
        0,
        lambda: (f64(B, 4), MASKS),
    ),
}


@pytest.mark.filterwarnings("ignore::aotfunc.errors.LoopWarning")  # that of unique
@pytest.mark.parametrize("name", MAPPED)
def test_masks_and_indices_that_differ(name):
    f, dims, make = MAPPED[name]
    check(f, dims, make())


def store(statement):
    """``statement`` on a copy of x, as an expression."""
    code = compile(statement, "store", "exec")

    def f(x, *arguments):
        y = x.clone()
        exec(code, dict(zip("yijv", (y, *arguments))))
        return y * x

    return f


I, J = torch.tensor([0, 2, -1]), torch.tensor([1, 0, -4])
SCALARS = {
    "x[i]": (lambda x, i: x[i], (0, 0), lambda: (f64(B, 3, 4), I)),
    "x[i, j]": (lambda x, i, j: x[i, j], (0, 0, 0), lambda: (f64(B, 3, 4), I, J)),
    "x[:, j]": (lambda x, j: x[:, j], (0, 0), lambda: (f64(B, 3, 4), J)),
    "x[..., j]": (lambda x, j: x[..., j], (0, 0), lambda: (f64(B, 3, 4), J)),
    "x[1, j]": (lambda x, j: x[1, j], (0, 0), lambda: (f64(B, 3, 4), J)),
    "x[i, None, 1:]": (lambda x, i: x[i, None, 1:], (0, 0), lambda: (f64(B, 3, 4), I)),
    "x[None, i, ..., j]": (
        lambda x, i, j: x[None, i, ..., j],
        (0, 0, 0),
        lambda: (f64(B, 3, 2, 4), I, J),
    ),
    "x[i, j], unmapped x": (lambda x, i, j: x[i, j] * 2, (None, 0, 0), lambda: (f64(3, 4), I, J)),
    "x[i, j], unmapped i": (
        lambda x, i, j: x[i, j] * 2,
        (0, None, 0),
        lambda: (f64(B, 3, 4), I[1], J),
    ),
    "narrow": (
        lambda x, i: x.narrow(1, i, 2),
        (0, 0),
        lambda: (f64(B, 3, 4), torch.tensor([0, 2, 1])),
    ),
    "x[i] = v": (store("y[i] = v"), 0, lambda: (f64(B, 3, 4), I, J, f64(B))),
    "x[i] = row": (store("y[i] = v"), 0, lambda: (f64(B, 3, 4), I, J, f64(B, 4))),
    "x[i] = row with ones": (
        store("y[i] = v[None, None]"),
        0,
        lambda: (f64(B, 3, 4), I, J, f64(B, 4)),
    ),
    "x[i, j] = v": (store("y[i, j] = v"), 0, lambda: (f64(B, 3, 4), I, J, f64(B))),
    "x[i, j] = number": (store("y[i, j] = 3"), 0, lambda: (f64(B, 3, 4), I, J)),
    "x[i, j] = integer": (store("y[i, j] = i"), 0, lambda: (f64(B, 3, 4), I, J)),
    "x[i, j] += v": (store("y[i, j] += v"), 0, lambda: (f64(B, 3, 4), I, J, f64(B))),
    "x[:, j] = v": (store("y[:, j] = v"), 0, lambda: (f64(B, 3, 4), I, J, f64(B, 3))),
    "x[..., j] = v": (store("y[..., j] = v"), 0, lambda: (f64(B, 3, 4), I, J, f64(B))),
    "x[i, 1:3] = v": (store("y[i, 1:3] = v"), 0, lambda: (f64(B, 3, 4), I, J, f64(B, 2))),
    "x[None, i, None, j] = v": (
        store("y[None, i, None, j] = v"),
        0,
        lambda: (f64(B, 3, 4), I, J, f64(B)),
    ),
    "x[i] = v, unmapped x": (
        store("y[i] = v"),
        (None, 0, 0, 0),
        lambda: (f64(3, 4), I, J, f64(B)),
    ),
    "x[i, j] = v, only v mapped": (
        store("y[i, j] = v"),
        (None, None, None, 0),
        lambda: (f64(3, 4), I[1], J[0], f64(B)),
    ),
}


@pytest.mark.parametrize("name", SCALARS)
def test_an_index_that_is_one_number_of_each_sample(name):
    f, dims, make = SCALARS[name]
    args = make()
    check(f, dims, args)
    single = [a if d is None else a[0] for a, d in zip(args, dims_of(dims, args))]
    assert_same(jit(f)(*single), f(*single))


def test_a_failed_factorization_is_the_samples_own():
    for f in (torch.linalg.cholesky, torch.linalg.inv):
        with pytest.raises(torch.linalg.LinAlgError, match="Batch element 1"):
            vmap(f)(torch.stack([torch.eye(2), torch.zeros(2, 2)]))


SELECTED = {
    "x[mask]": lambda x, m: x[m].sum(),
    "masked_select": lambda x, m: x.masked_select(m).sum(),
    "nonzero": lambda x, m: m.nonzero().sum(),
    "argwhere": lambda x, m: torch.argwhere(m).sum(),
    "unique": lambda x, m: m.unique().sum(),
    "y[mask] += v": lambda x, m: added(x, m, 2.0),
}


@pytest.mark.parametrize("name", SELECTED)
def test_a_mask_that_selects_another_number_in_each_sample_says_why_and_the_way_out(name):
    with pytest.raises(
        AotfuncError,
        match=r"shape of .* samples .*test_vmap_values\.py.*torch\.where.*nonzero_static",
    ):
        vmap(SELECTED[name])(f64(B, 4), MASKS)


def test_more_values_than_a_mask_selects():
    with pytest.raises(RuntimeError):
        loop(assigned)(f64(B, 4), MASKS, f64(B, 2))
    with pytest.raises(RuntimeError):
        vmap(assigned)(f64(B, 4), MASKS, f64(B, 2))


def test_an_op_that_reads_memory_itself():
    """tensor_split reads its sections past every dispatch."""
    x, s = f64(B, 4), torch.tensor([[1, 3]] * B)
    check(lambda x, s: x.tensor_split(s)[1] * 2, 0, (x, s))
    check(lambda x, s: x.tensor_split(s.tolist())[1] * 2, 0, (x, s))
    check(lambda x, n: x.tensor_split(n)[1] * 2, 0, (x, torch.tensor([2] * B)))


# questions that all samples answer alike
# ------------------------------------------------------------------------------


def checked_gaussian(mean, target, variance):
    return F.gaussian_nll_loss(mean, target, variance)


def normalized(x):
    if not torch.isfinite(x).all():
        raise ValueError("not finite")
    while x.abs().max() > 100:
        x = x / 10
    return x / x.norm() if x.norm() > 0 else x


def agreeing(x):
    y = x * 2 if (x.abs() < 1e9).all() else x
    z = torch.zeros(3, dtype=x.dtype)
    z[: int((y * 0).sum()) + 2] = y[:2]
    assert torch.equal(z[2:], torch.zeros(1, dtype=x.dtype))
    return z * x[0]


ALIKE = {
    "a check": (normalized, 0, lambda: (f64(B, 3),)),
    "numbers and equality": (agreeing, 0, lambda: (f64(B, 3),)),
    "gaussian_nll_loss": (checked_gaussian, 0, lambda: (f64(B, 4), f64(B, 4), f64(B, 4).exp())),
    "gaussian_nll_loss, unmapped variance": (
        checked_gaussian,
        (0, 0, None),
        lambda: (f64(B, 4), f64(B, 4), f64(4).exp()),
    ),
    "cov": (lambda x: x.cov(), 0, lambda: (f64(B, 3, 5),)),
    "cov, weights": (
        lambda x, f, a: x.cov(fweights=f, aweights=a),
        0,
        lambda: (f64(B, 3, 4), torch.tensor([[1, 2, 0, 1]] * B), f64(B, 4).exp()),
    ),
    "corrcoef": (lambda x: x.corrcoef(), 0, lambda: (f64(B, 3, 5),)),
    "combinations": (lambda x: torch.combinations(x, 2, True), 0, lambda: (f64(B, 4),)),
    "stft and back": (
        lambda x: torch.istft(
            torch.stft(x, 8, window=torch.hann_window(8, dtype=x.dtype), return_complex=True),
            8,
            window=torch.hann_window(8, dtype=x.dtype),
        ),
        0,
        lambda: (f64(B, 32),),
    ),
    "a mapped window": (
        lambda x, w: torch.istft(torch.stft(x, 8, window=w, return_complex=True), 8, window=w),
        0,
        lambda: (f64(B, 32), f64(B, 8).exp()),
    ),
}


@pytest.mark.parametrize("name", ALIKE)
def test_questions_that_all_samples_answer_alike(name):
    f, dims, make = ALIKE[name]
    check(f, dims, make())


def branch(x):
    return x * 2 if x.sum() > 0 else x.sin()


def test_the_question_is_asked_anew_at_each_call():
    x = f64(B, 4).abs()
    run = vmap(branch)
    assert_same(run(x), x * 2)
    assert_same(run(-x), (-x).sin())
    assert_same(run(x), x * 2)


def test_samples_that_disagree_are_an_error_that_names_the_line():
    x = f64(B, 4).abs()
    x[1] *= -1
    for run in (
        vmap(branch),
        vmap(grad(scalar(branch))),
        grad(scalar(vmap(branch))),
        jacrev(vmap(branch)),
    ):
        with pytest.raises(
            AotfuncError,
            match=r"samples .* do not agree.*test_vmap_values\.py.*branch.*torch\.where",
        ):
            run(x)
    with pytest.raises(AotfuncError, match="samples"):
        vmap(vmap(branch))(torch.stack([x.abs(), -x.abs()]))
    assert_same(vmap(branch, chunk_size=1)(x), loop(branch)(x))  # one sample agrees with itself


def test_a_check_that_fails_in_one_sample_does_not_pass():
    variance = f64(B, 4).exp()
    variance[1, 2] = -1
    with pytest.raises(RuntimeError, match="negative"):
        vmap(checked_gaussian)(f64(B, 4), f64(B, 4), variance)
    with pytest.raises(ValueError, match="negative"):
        vmap(checked_gaussian)(f64(B, 4), f64(B, 4), -variance.abs())


def test_an_empty_batch_has_no_answer():
    with pytest.raises(AotfuncError, match="empty"):
        vmap(branch)(f64(0, 4))


def test_nan_and_signed_zeros_are_answers_of_their_own():
    f = lambda x: x * 0 + x.item()
    assert vmap(f)(torch.full((3,), torch.nan)).isnan().all()
    with pytest.raises(AotfuncError, match="samples"):
        vmap(f)(torch.tensor([0.0, -0.0]))


def test_jit_captures_without_values_inside_and_outside():
    x = f64(B, 4).abs()
    for run in (jit(vmap(branch)), vmap(jit(branch))):
        with pytest.raises(AotfuncError, match=r"test_vmap_values\.py"):
            run(x)


def test_make_fx_is_specialised():
    x = f64(B, 4).abs()
    gm = make_fx(vmap(branch))(x)
    assert_same(gm(x), x * 2)
    assert_same(gm(-x), -x * 2)


def test_asking_writes_and_draws_nothing():
    seen = []

    def f(x, buffer):
        seen.append(1)
        x.mul_(2)
        noise = torch.rand(4, dtype=x.dtype)
        if (x + noise).abs().sum() > 0:
            x.add_(1)
        return x * noise

    for mode in ("same", "different"):
        x = f64(B, 4)
        kept = x.clone()
        torch.manual_seed(3)
        out = vmap(f, (0, None), randomness=mode)(x, torch.zeros(1))
        after = torch.get_rng_state()
        assert_same(x, kept * 2 + 1)
        torch.manual_seed(3)
        noise = torch.rand(4, dtype=x.dtype) if mode == "same" else torch.rand(B, 4, dtype=x.dtype)
        assert_same(out, x * noise)
        assert torch.equal(torch.get_rng_state(), after)
    assert len(seen) == 2


def test_a_number_drawn_for_each_sample_is_not_one_number():
    f = lambda x: x * torch.rand(()).item()
    with pytest.raises(AotfuncError, match="samples"):
        vmap(f, randomness="different")(torch.ones(3))
    torch.manual_seed(0)
    out = vmap(f, randomness="same")(torch.ones(3))
    torch.manual_seed(0)
    assert_same(out, torch.full((3,), torch.rand(()).item()))


@pytest.mark.parametrize(
    "inner", [grad, lambda f: lambda x: jvp(f, (x,), (torch.ones_like(x),))[1]]
)
def test_a_draw_before_the_question_inside_nested_transforms(inner):
    """The inner transform's question is answered from where the outer one's draws have left the
    generator."""

    def f(x):
        a = torch.rand((), dtype=x.dtype)

        def g(y):
            n = int(torch.randint(2, 6, ()))
            return (y**n).sum()

        return (inner(g)(x) * a).sum()

    x = f64(3)
    torch.manual_seed(1)
    a, n = torch.rand((), dtype=x.dtype), int(torch.randint(2, 6, ()))
    torch.manual_seed(1)
    assert_same(grad(f)(x), a * n * (n - 1) * x ** (n - 2))
    torch.manual_seed(1)
    assert_same(
        vmap(f, randomness="same")(x.expand(2, 3)), (a * n * (x ** (n - 1)).sum()).expand(2)
    )


def test_inputs_without_values():
    """FakeTensors, and the samples of a torch.func.vmap outside: an error, no crash."""
    from torch._subclasses import FakeTensorMode

    x = f64(2, B, 4).abs()
    with pytest.raises(AotfuncError, match="no values"):
        torch.func.vmap(vmap(branch))(x)
    sample = x[0].clone()
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(sample)
        assert vmap(torch.sin)(fake).shape == (B, 4)
        with pytest.raises(AotfuncError, match="no values"):
            vmap(branch)(fake)
    assert_same(torch.func.grad(lambda x: vmap(branch)(x).sum())(x[0]), torch.full_like(x[0], 2))


def test_where_the_question_is_asked():
    x = f64(B, 4).abs()

    def under_autocast(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = x.float()[None] @ x.float()[:, None]
            return y * 2 if y.sum() > 0 else y

    assert_same(vmap(under_autocast)(x), loop(under_autocast)(x))
    assert_same(vmap(torch.no_grad()(branch))(x), x * 2)
    with torch.inference_mode():
        assert_same(vmap(branch)(x), x * 2)
    inside = lambda x: torch.utils.checkpoint.checkpoint(scalar(branch), x, use_reentrant=False)
    assert_same(vmap(grad(inside))(x), loop(grads(scalar(branch)))(x))
    through = lambda x: torch.autograd.grad(scalar(branch)(x.requires_grad_()), x)[0]
    assert_same(vmap(through)(x), loop(grads(scalar(branch)))(x))


class Asks(SavesInputs):
    """Its backward asks about what it saved."""

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * 2 * x if (x > 0).all() else g * 7


def test_a_backward_that_asks_about_what_it_saved():
    x = f64(B, 4).abs()
    total = lambda x: Asks.apply(x * 1.0).sum()
    for sample in (x, -x):
        expected = loop(grads(total))(sample)
        assert_same(vmap(grad(total))(sample), expected)
        assert_same(grad(lambda x: vmap(total)(x).sum())(sample), expected)
        assert_same(grad(total)(sample[0]), expected[0])
    x[1] *= -1
    with pytest.raises(AotfuncError, match="samples"):
        vmap(grad(total))(x)


def test_an_outer_write_is_seen():
    def f(x, w):
        w = w.clone()
        w.mul_(-1)
        return vmap(lambda v: v * 2 if (w < 0).all() and (v * w < 0).all() else v * 3)(x).sum()

    x, w = f64(B, 4).abs(), f64(4).abs()
    assert_same(grad(f)(x, w), torch.full_like(x, 2))
    assert_same(vmap(f, (0, None))(x[None], w), 2 * x.sum()[None])


def test_masks_of_a_single_number():
    select = lambda x, m: x.masked_select(m)
    ones, yes = torch.tensor([1.0, 2.0]), torch.ones(2, dtype=torch.bool)
    assert torch.equal(vmap(select)(ones, yes), ones[:, None])
    assert torch.equal(vmap(select, (None, 0))(ones[1], yes), torch.full((2, 1), 2.0))


def test_a_mask_beside_an_index_asks_for_the_mask_only(monkeypatch):
    """The shape of ``x[mask, index]`` depends on the mask; what differs between the samples is not
    asked for."""
    mask = torch.tensor([True, False, True, True])

    def f(x):
        index = (x.sum(1) > 0)[mask].long()
        return x[mask, index]

    x = f64(B, 4, 4)
    expected = loop(f, (0,))(x)
    monkeypatch.setattr(capture, "agreed", None)  # asking would call it
    assert_same(vmap(f)(x), expected)


def test_an_index_out_of_range_beside_a_mask_raises():
    mask = torch.tensor([True, False])
    with pytest.raises(IndexError):
        vmap(lambda x: x[mask, (x[0, :1] > 0).long() + 7])(f64(B, 2, 4))


def test_a_mask_beside_an_index_into_nothing():
    mask = torch.zeros(2, dtype=torch.bool)
    f = lambda x: x[:, :0][mask, (x[0, :1] > 0).long()[:0]]
    x = f64(B, 2, 4)
    assert_same(vmap(f)(x), loop(f, (0,))(x))
