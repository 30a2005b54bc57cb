"""Any composition: all ordered pairs of eleven transforms, and a list of triples, against double
backward.

Each transform is made an operator on functions from R^3 to R^3 in such a way that chains keep
their type; its reference is the same operator by torch.autograd with ``create_graph=True`` and
Python loops."""

import itertools

import pytest
import torch

import aotfunc
from tests.reference import assert_same

WEIGHTS = torch.tensor([0.7, -1.3, 0.4], dtype=torch.float64)
MATRIX = torch.tensor([[0.5, -0.2, 0.1], [0.3, 0.8, -0.6], [-0.4, 0.2, 0.9]], dtype=torch.float64)


def base(x):
    return torch.tanh(MATRIX @ x) * x + 0.1 * (x * x).sum()


# ours
# -------------------------------------------------------------------------------------------------


def by_vmap(f):
    return lambda x: aotfunc.vmap(f)(torch.stack([x, x.sin()])).sum(0)


def by_grad(f):
    return aotfunc.grad(lambda x: (f(x) * WEIGHTS).sum())


def by_vjp(f):
    def run(x):
        out, pull = aotfunc.vjp(f, x)
        return pull(out.cos())[0]

    return run


def by_jvp(f):
    return lambda x: aotfunc.jvp(f, (x,), (x.cos(),))[1]


def by_jacrev(f):
    return lambda x: WEIGHTS @ aotfunc.jacrev(f)(x)


def by_jacfwd(f):
    return lambda x: WEIGHTS @ aotfunc.jacfwd(f)(x)


def by_hessian(f):
    return lambda x: torch.einsum("i,ijk,j->k", WEIGHTS, aotfunc.hessian(f)(x), x)


def by_linearize(f):
    def run(x):
        out, push = aotfunc.linearize(f, x)
        return push(x.cos()) + push(out)

    return run


def by_functionalize(f):
    def write(x):
        y = f(x).clone()
        y[1:].mul_(2)
        y.view(1, 3)[0, 0] += x[1]
        return y

    return aotfunc.functionalize(write)


def by_jit(f):
    return aotfunc.jit(lambda x: f(x) * x)


def by_aot(f):
    return aotfunc.aot_function(lambda x: f(x) * x, "eager")


# references
# -------------------------------------------------------------------------------------------------


def derivative(f, x):
    """(z, f(z), J(z)) with everything still a function of x."""
    z = x.view_as(x) if x.requires_grad else x.clone().requires_grad_()
    y = f(z)
    rows = [
        torch.autograd.grad(y[i], z, create_graph=True, allow_unused=True)[0] for i in range(3)
    ]
    return z, y, torch.stack([torch.zeros_like(z) if row is None else row for row in rows])


def ref_pull(weights):
    def transform(f):
        def run(x):
            _, y, jac = derivative(f, x)
            return weights(y) @ jac

        return run

    return transform


def ref_push(tangent):
    def transform(f):
        def run(x):
            _, y, jac = derivative(f, x)
            return jac @ tangent(x, y)

        return run

    return transform


def ref_hessian(f):
    def run(x):
        rows = [derivative(lambda z, i=i: derivative(f, z)[2][i], x)[2] for i in range(3)]
        return torch.einsum("i,ijk,j->k", WEIGHTS, torch.stack(rows), x)

    return run


def ref_functionalize(f):
    def run(x):
        y = f(x)
        return y * torch.tensor([1.0, 2.0, 2.0], dtype=y.dtype) + torch.stack(
            [x[1], 0 * x[1], 0 * x[1]]
        )

    return run


TRANSFORMS = {
    "vmap": (by_vmap, lambda f: lambda x: f(x) + f(x.sin())),
    "grad": (by_grad, ref_pull(lambda y: WEIGHTS)),
    "vjp": (by_vjp, ref_pull(lambda y: y.cos())),
    "jvp": (by_jvp, ref_push(lambda x, y: x.cos())),
    "jacrev": (by_jacrev, ref_pull(lambda y: WEIGHTS)),
    "jacfwd": (by_jacfwd, ref_pull(lambda y: WEIGHTS)),
    "hessian": (by_hessian, ref_hessian),
    "linearize": (by_linearize, ref_push(lambda x, y: x.cos() + y)),
    "functionalize": (by_functionalize, ref_functionalize),
    "jit": (by_jit, lambda f: lambda x: f(x) * x),
    "aot_function": (by_aot, lambda f: lambda x: f(x) * x),
}

TRIPLES = [
    "vmap grad grad",
    "grad vmap grad",
    "vmap vmap grad",
    "vmap jvp grad",
    "jvp vmap grad",
    "grad jvp vmap",
    "vmap jacrev jacfwd",
    "vmap jacfwd jacrev",
    "jacfwd vmap jacrev",
    "vmap hessian jit",
    "jit hessian jit",
    "jit vmap grad",
    "vmap jit grad",
    "vmap grad jit",
    "grad jit grad",
    "vmap aot_function grad",
    "grad aot_function vmap",
    "aot_function vmap grad",
    "jvp jvp jvp",
    "grad grad grad",
    "vmap vmap vmap",
    "linearize linearize grad",
    "vmap linearize grad",
    "grad linearize vmap",
    "linearize vmap vjp",
    "functionalize vmap grad",
    "vmap functionalize grad",
    "grad functionalize vmap",
    "vjp vjp vjp",
    "jacrev jacrev jacrev",
    "jacfwd jacfwd jacfwd",
]


def check(names, wrap=lambda f: f, ours=base, reference=base):
    for name in reversed(names):
        mine, theirs = TRANSFORMS[name]
        ours, reference = mine(ours), theirs(reference)
    x = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64)
    expected = reference(x).detach()
    ours = wrap(ours)
    assert_same(ours(x), expected)
    return ours, reference, x


@pytest.mark.parametrize("name", TRANSFORMS)
def test_one(name):
    check([name])


@pytest.mark.parametrize(
    "pair", [*itertools.product(TRANSFORMS, TRANSFORMS)], ids=lambda p: "-".join(p)
)
def test_pair(pair):
    check(pair)


@pytest.mark.parametrize("triple", TRIPLES)
def test_triple(triple):
    check(triple.split())


@pytest.mark.parametrize(
    "pair", ["vmap grad", "jvp grad", "jacfwd jacrev", "linearize vmap", "vmap jit", "grad jit"]
)
def test_backward_outside_a_pair(pair):
    ours, reference, x = check(pair.split())
    x = x.requires_grad_()
    got = torch.autograd.grad((ours(x) * WEIGHTS).sum(), x)
    assert_same(got, torch.autograd.grad((reference(x) * WEIGHTS).sum(), x))


@pytest.mark.parametrize(
    "pair",
    ["vmap grad", "jvp grad", "grad grad", "hessian jit", "jit linearize", "grad functionalize"],
)
def test_capture_of_a_pair(pair):
    def captured(f):
        gm = None

        def run(x):
            nonlocal gm
            gm = gm or aotfunc.make_fx(f)(torch.randn_like(x))
            return gm(x)

        return run

    check(pair.split(), wrap=captured)
