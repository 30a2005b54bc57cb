"""Results of a vmap that show an argument's memory: those that torch.func's do, laid out alike, at
any depth, un-jitted and compiled; and unbatched arguments, which are passed as they are."""

import random

import pytest
import torch

import aotfunc
from aotfunc import jit, vmap

VIEWS = {
    "t": lambda a: a.mT if a.dim() > 1 else a,
    "movedim": lambda a: a.movedim(0, -1) if a.dim() else a,
    "[0]": lambda a: a[0] if a.dim() and len(a) else a,
    "[1:]": lambda a: a[1:] if a.dim() and len(a) > 1 else a,
    "[::2]": lambda a: a[..., ::2] if a.dim() else a,
    "[None]": lambda a: a[None],
    "unsqueeze": lambda a: a.unsqueeze(-1),
    "squeeze": lambda a: a.squeeze(),
    "expand": lambda a: a.expand(2, *a.shape),
    "flatten": lambda a: a.flatten(),
    "unflatten": lambda a: a.unflatten(0, (1, -1)) if a.dim() and a.numel() else a,
    "chunk": lambda a: a.chunk(2, -1)[-1] if a.dim() else a,
    "unbind": lambda a: a.unbind(0)[-1] if a.dim() and len(a) else a,
    "diagonal": lambda a: a.diagonal() if a.dim() > 1 else a,
    "unfold": lambda a: a.unfold(0, 1, 1) if a.dim() and len(a) else a,
    "detach": lambda a: a.detach(),
    "alias": lambda a: a.view_as(a),
    "contiguous": lambda a: a.contiguous(),
    "itself": lambda a: a,
    "computed": lambda a: a * 2,
}


def program(seed):
    """``(transform -> function of x, depth)``: a chain of views under as many vmaps."""
    rng = random.Random(seed)
    chain = rng.choices(list(VIEWS), k=rng.randint(1, 4))
    depth = rng.randint(1, 3)
    ins, outs = (
        [rng.choice((0, 0, 1)) for _ in range(depth)],
        [rng.choice((0, 0, -1)) for _ in range(depth)],
    )
    write = rng.random() < 0.3

    def body(a):
        if write:
            a.add_(1)
        for name in chain:
            a = VIEWS[name](a)
        return a

    def make(transform):
        f = body
        for i, o in zip(ins, outs, strict=True):
            f = transform(f, i, o)
        return f

    return make, depth


def shown(f, x):
    """The result, whether it shows the memory of ``x``, and where."""
    y = f(x)
    views = y.untyped_storage()._cdata == x.untyped_storage()._cdata
    strides = [s for s, n in zip(y.stride(), y.shape, strict=True) if n != 1]
    return y.clone(), views, (strides, y.storage_offset()) if views else None, x.clone()


@pytest.mark.parametrize("seed", range(60))
def test_random_views(seed):
    make, depth = program(seed)
    x = torch.randn([2, 3, 4, 2, 3][: depth + 2], generator=torch.Generator().manual_seed(seed))
    if seed % 3 == 0:
        x = x.mT
    try:
        want = shown(make(torch.func.vmap), x.clone())
    except (RuntimeError, ValueError, IndexError):
        pytest.skip("torch.func takes it not")
    for f in (make(vmap), jit(make(vmap))):
        got = shown(f, x.clone())
        torch.testing.assert_close((got[0], got[3]), (want[0], want[3]))
        assert got[1:3] == want[1:3]


@pytest.mark.parametrize(
    "f, depth",
    [
        *(
            (f, depth)
            for depth in (1, 2)
            for f in (
                lambda x: (x[0].add_(1), x[1])[1],
                lambda x: x.add_(1).t(),
                lambda x: (x.mul_(2), x[:, 1:], x * 1),
                lambda x: (x.detach(), x.detach()[0], x),
                lambda x: (x[0], x.detach()[1:], torch.no_grad()(lambda: x[1:])()),
            )
        ),
        (lambda x: (lambda y: (y, y.detach()))(x * 2), 1),
    ],
)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_several_results(f, depth, requires_grad):
    def run(transform):
        x = torch.arange(48.0).reshape(2, 2, 3, 4)
        g = transform(f) if depth == 1 else transform(transform(f))
        given = x[0] if depth == 1 else x
        given = (given.requires_grad_() * 1) if requires_grad else given
        results = g(given)
        results = results if isinstance(results, tuple) else (results,)
        places = [given.untyped_storage()._cdata, *[y.untyped_storage()._cdata for y in results]]
        return [places.index(p) for p in places], [y.stride() for y in results], given, results

    got, want = run(vmap), run(torch.func.vmap)
    assert got[:2] == want[:2]
    torch.testing.assert_close(got[2:], want[2:])
    assert [y.requires_grad for y in got[3]] == [y.requires_grad for y in want[3]]


def test_unbatched_arguments_are_passed_as_they_are():
    w, met = torch.randn(3), []

    def f(x, v, tree):
        met.append(v is w and tree["w"] is w)
        return x * v

    x = torch.randn(2, 3)
    torch.testing.assert_close(vmap(f, (0, None, None))(x, w, {"w": w}), x * w)
    torch.testing.assert_close(
        vmap(vmap(f, (0, None, None)), (0, None, None))(x[None], w, {"w": w})[0], x * w
    )
    assert met == [True, True]
    weight = torch.zeros(3)
    aotfunc.vmap(lambda x, w: (w.add_(1), x)[1], (0, None))(x, weight)
    assert torch.equal(weight, torch.ones(3))


def test_a_result_that_is_nothing():
    """A module's backward hook is given None for what has no gradient, beside a gradient that is a
    cotangent."""
    m, x = torch.nn.Identity(), torch.randn(2, 3)
    m.register_full_backward_hook(lambda module, given, due: None)

    def f(x):
        return (m(x) * 2 + m(x)).detach() + m(x)

    leaf = x.clone().requires_grad_()
    vmap(f)(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, torch.ones(2, 3))
