"""One value written to all that a boolean mask selects beside other indices, ``x[mask, j] = v``:
how many these are the shapes do not say. Against a loop of plain autograd."""

import itertools

import pytest
import torch

from aotfunc import grad, jacfwd, jacrev, jit, vmap
from tests.reference import assert_same

torch.manual_seed(0)
X, V = torch.randn(4, 5, 3, dtype=torch.float64), torch.randn(4, 1, dtype=torch.float64)
MASK, J = torch.tensor([True, False, True, True, False]), torch.tensor([0, 2, 1, 2])
NONE = torch.zeros(5, dtype=torch.bool)
#: another number in each sample, none and all among them
MASKS = torch.stack([MASK, ~MASK, NONE, ~NONE])


def put(x, mask, j, v):
    return x.index_put((mask, j), v)


def accumulate(x, mask, j, v):
    return x.index_put((mask, j.view(1)), v, accumulate=True)


def subtract(x, mask, j, v):
    y = x * 2
    y[mask, j.view(1)] -= v
    return y


def a_mask_without_dimensions(x, mask, j, v):
    y = x[0] * 2
    y[torch.ones((), dtype=torch.bool), j.view(1)] = v
    return y


def with_a_dimension_between(x, mask, j, v):
    y = x.t().unsqueeze(1) * torch.ones(2, 1)
    y[j.view(1), :, mask] = torch.cat([v, v * 2])
    return y


def with_a_dimension_before(x, mask, j, v):
    y = torch.stack([x, x * 2])
    y[:, mask, j.view(1)] = torch.stack([v, v * 2])
    return y


def two_masks(x, mask, j, v):
    y = x * 2
    y[mask, torch.arange(3) == j] = v
    return y


def a_number(x, mask, j, v):
    y = x * v
    y[mask, j.view(1)] = 2.0
    return y


FUNCTIONS = (
    put,
    accumulate,
    subtract,
    a_mask_without_dimensions,
    with_a_dimension_between,
    with_a_dimension_before,
)
FUNCTIONS += (two_masks, a_number)
TRANSFORMS = {
    "itself": lambda f: f,
    "jacrev": lambda f: (
        lambda x, mask, j, v: jacrev(lambda x, v: f(x, mask, j, v).sin(), (0, 1))(x, v)
    ),
    "jacfwd": lambda f: (
        lambda x, mask, j, v: jacfwd(lambda x, v: f(x, mask, j, v).sin(), (0, 1))(x, v)
    ),
}


def each(f, dims, args):
    outs = [
        f(*(t if d is None else t[i] for t, d in zip(args, dims, strict=True))) for i in range(4)
    ]
    return torch.utils._pytree.tree_map(lambda *xs: torch.stack(xs), *outs)


def jacobians(f):
    return lambda x, mask, j, v: torch.autograd.functional.jacobian(
        lambda x, v: f(x, mask, j, v).sin(), (x, v)
    )


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("mask", ["one", "none", "of each"])
@pytest.mark.parametrize("f", FUNCTIONS, ids=lambda f: f.__name__)
def test_batched(f, mask, transform):
    m = {"one": MASK, "none": NONE, "of each": MASKS}[mask]
    if f is subtract and mask == "of each":
        m = torch.stack(
            [MASK, MASK.roll(1), MASK.roll(2), MASK]
        )  # it is read, too: as many in each
    batched = itertools.product((X, X[0]), (J, J[1]), (V, V[0]))
    for x, j, v in batched if transform == "itself" else ((X, J, V), (X[0], J, V[0])):
        args = x, m, j, v
        dims = tuple(
            0 if t.dim() == batched.dim() else None
            for t, batched in zip(args, (X, MASKS, J, V), strict=True)
        )
        if 0 in dims:
            want = each(f if transform == "itself" else jacobians(f), dims, args)
            assert_same(vmap(TRANSFORMS[transform](f), dims)(*args), want)


@pytest.mark.parametrize(
    "f", [f for f in FUNCTIONS if f is not subtract], ids=lambda f: f.__name__
)
def test_compiled(f):
    def loss(x, v):
        return f(x, MASK, J[1], v).sin().sum()

    x, v = X[0].clone().requires_grad_(), V[0].clone().requires_grad_()
    want = torch.autograd.grad(loss(x, v), (x, v))
    assert_same(jit(grad(loss, (0, 1)))(X[0], V[0]), want)
    assert_same(torch.autograd.grad(jit(loss)(x, v), (x, v)), want)
