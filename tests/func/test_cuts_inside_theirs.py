"""What cuts derivatives, in functions of ours inside of torch.func's transforms."""

import pytest
import torch

import aotfunc
from aotfunc import vmap
from tests.inputs import f64
from tests.reference import assert_same


def written_unseen(x):
    y = x * 2
    with torch.no_grad():
        y.mul_(3)
    return y * x


CUT = {
    "detach": lambda x: x * x.detach(),
    "detach only": lambda x: x.detach() * 2 + x * 0,
    "write under no_grad": written_unseen,
}
OURS_AROUND = {
    "jit": aotfunc.jit,
    "vjp": lambda f: lambda x: aotfunc.vjp(f, x)[0],
    "vmap": lambda f: lambda x: vmap(f)(x[None])[0],
}


@pytest.mark.parametrize("cut", CUT)
@pytest.mark.parametrize("ours", OURS_AROUND)
def test_cuts_hold_where_their_transforms_are_differentiated(ours, cut):
    """A batch of theirs does not say that what it is a batch of requires grad."""
    f, x = CUT[cut], f64(2, 3)
    g = OURS_AROUND[ours](f)
    twice = lambda h: torch.func.vmap(torch.func.vmap(h))
    leaf = x.clone().requires_grad_()
    for around in (
        lambda h: torch.autograd.grad(torch.func.vmap(h)(leaf).sum(), leaf)[0],
        lambda h: torch.autograd.grad(twice(h)(leaf[None]).sum(), leaf)[0],
        lambda h: torch.func.grad(lambda x: torch.func.vmap(h)(x).sum())(x),
        lambda h: torch.func.grad(lambda x: h(x).sum())(x),
        lambda h: torch.func.vmap(torch.func.grad(lambda x: h(x).sum()))(x),
        lambda h: torch.func.jacrev(h)(x[0]),
        lambda h: torch.func.grad(
            lambda x: torch.func.grad(lambda x: (torch.func.vmap(h)(x) ** 2).sum())(x).sum()
        )(x),
    ):
        for _ in range(2):
            assert_same(around(g), around(f))


def written_in_place(x, w):
    w.mul_(x)
    return w.sin() * x


def written_and_cut(x, w):
    with torch.no_grad():
        w.add_(1)
    return x * x.detach() * w


@pytest.mark.parametrize("f", [written_in_place, written_and_cut])
@pytest.mark.parametrize("ours", ["jit", "vjp"])
def test_writes_inside_their_transforms(ours, f):
    """Autograd keeps the values that were there before."""
    x, w = f64(2, 3), f64(2, 3)
    g = aotfunc.jit(f) if ours == "jit" else lambda *xs: aotfunc.vjp(f, *xs)[0]
    leaf, mapped = x.clone().requires_grad_(), torch.func.vmap
    for around in (
        lambda h: torch.autograd.grad(mapped(h)(leaf, w * 1).sum(), leaf)[0],
        lambda h: torch.func.grad(lambda x: h(x, w[0] * 1).sum())(x[0]),
        lambda h: torch.func.grad(lambda x: h(x, x * 2).sum())(x[0]),
        lambda h: torch.func.grad(lambda x: mapped(h)(x, x * 2).sum())(x),
        lambda h: mapped(torch.func.grad(lambda x, w: h(x, w * 1).sum()))(x, w),
    ):
        for _ in range(2):
            assert_same(around(g), around(f))
