"""One tensor passed twice, or passed and closed over, is one tensor inside a compiled function,
too."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from aotfunc import aot_function, aot_module, grad, jit, jvp, make_fx, vjp, vmap
from aotfunc.errors import CaptureError
from tests.aot.compiled_by import COMPILERS, every_compiler
from tests.reference import assert_same

X = torch.linspace(-1.0, 1.5, 6, dtype=torch.float64).view(2, 3)
W = torch.tensor([2.0, -3.0, 0.5], dtype=torch.float64)


def requires_grad_after(x, y):
    x = x * 1 if x is not y else x
    x += W.clone().requires_grad_() if y is None else y.new_tensor([1.0, 2.0, 3.0])
    return x * (2 if y.requires_grad else 3)


def written(x, y):
    x.mul_(y)
    y[0] = 1
    return x + y, x.sum()


def reshaped(how):
    def f(x, y):
        getattr(y, how[0])(*how[1:])
        return x * 0.5, y.shape[0] * y

    return f


def detached(x, y):
    x.detach_()
    return y * 2 if y.requires_grad else y * 3


def asked_to_require_grad(x, y):
    x.requires_grad_()
    return y * 2 if y.requires_grad else y * 3


def in_trees(x, more):
    d, (a, *_), k = more["d"], more["t"], more
    return x * (1 + 2 * (x is d) + 4 * (x is a) + 8 * (d is k["d"]))


TWICE = {
    "is": lambda x, y: x * (2 if x is y else 3),
    "neither": lambda x, y: x * y.sin(),
    "requires grad": requires_grad_after,
    "written": written,
    **{
        h[0]: reshaped(h)
        for h in (("t_",), ("transpose_", 0, 1), ("squeeze_",), ("unsqueeze_", 0))
    },
    "detached": detached,
    "asked": asked_to_require_grad,
    "returned": lambda x, y: (x, y, y * 2),
    "views": lambda x, y: (x[0], y.t(), x + y),
}


@every_compiler
@pytest.mark.parametrize("name", TWICE)
def test_one_tensor_passed_twice(compiler, name):
    """Each pattern of identities is what eager makes of it, in any order of calls."""
    f = COMPILERS[compiler](TWICE[name])
    for same in (True, False, True, True, False):
        calls = []
        for call in (f, TWICE[name]):
            x = X.clone()
            args = (x, x) if same else (x, X.clone())
            out = call(*args)
            leaves = out if isinstance(out, tuple) else (out,)
            calls.append(
                (
                    out,
                    args,
                    [t.requires_grad for t in (*leaves, *args)],
                    [[o is a for a in args] for o in leaves],
                )
            )
        assert_same(calls[0], calls[1])


@every_compiler
@pytest.mark.parametrize("same", [True, False])
def test_its_gradient(compiler, same):
    def f(x, y):
        return (x * x * y).sin() * (2 if x is y else 3)

    found = []
    for call in (COMPILERS[compiler](f), f):
        x = X.clone().requires_grad_()
        y = x if same else X.clone().requires_grad_()
        (first,) = torch.autograd.grad(call(x, y).sum(), x, create_graph=True)
        found.append((first, *torch.autograd.grad(first.sum(), x)))
    assert_same(*found)


@every_compiler
def test_in_trees(compiler):
    f = COMPILERS[compiler](in_trees)
    x, y, z = X.clone(), X.clone(), X.clone()
    for more in (
        {"d": x, "t": (y, x)},
        {"d": y, "t": (x, z)},
        {"d": x, "t": [x]},
        {"d": z, "t": (y, y)},
    ):
        assert_same(f(x, more), in_trees(x, more))


@every_compiler
def test_one_container_passed_twice(compiler):
    def f(a, b, *, c):
        known = 1 + 2 * (a is b) + 4 * (a is c) + 8 * (b is c["a"] if isinstance(c, dict) else 0)
        return (a, c, a[0] * known) if isinstance(a, list) else (a, c, a.x * known)

    g = COMPILERS[compiler](f)
    x, y = X.clone(), X.clone()
    one, other, data = [x, 2], [x, 2], SimpleNamespace(x=x, n=[y])
    for a, b, c in (
        *(
            (one, one, one),
            (one, other, one),
            (one, other, other),
            (one, one, {"a": one}),
            (other, one, {"a": one}),
        ),
        *(
            (data, data, data),
            (data, SimpleNamespace(x=x, n=[y]), data),
            (data, data.n, data),
            (data, data.n, {"a": data.n}),
        ),
    ):
        got, want = g(a, b, c=c), f(a, b, c=c)
        assert got[0] is a and got[1] is c
        assert_same(got[2], want[2])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(W.clone())
        self.register_buffer("b", X.clone())

    def forward(self, x):
        known = 1 + 2 * (x is self.w) + 4 * (x is self.b)
        with torch.no_grad():
            self.b.mul_(2)
        return x * known + self.w


@pytest.mark.parametrize("compiler", [*COMPILERS, "aot_module"])
def test_an_argument_that_is_closed_over(compiler):
    m, plain = Net(), Net()
    f = aot_module(m, "eager") if compiler == "aot_module" else COMPILERS[compiler](m)
    for name in ("w", "b", None, "b", "w", "w"):
        outs = []
        for call, net in ((f, m), (plain, plain)):
            out = call(X.clone() if name is None else getattr(net, name))
            (g,) = torch.autograd.grad(out.sum(), net.w)
            outs.append((out, g, net.b))
        assert_same(*outs)


@every_compiler
def test_a_closed_over_tensor_that_becomes_another_one(compiler):
    x, box = X.clone(), [X.clone(), X.clone()]
    f = COMPILERS[compiler](lambda x: x * (1 + 2 * (x is box[0]) + 4 * (box[0] is box[1])))
    for box[0] in (box[1], x, box[1], X.clone(), x):  # noqa: B020
        assert_same(f(x), x * (1 + 2 * (x is box[0]) + 4 * (box[0] is box[1])))


def test_a_view_is_another_tensor():
    def f(x, y):
        x.mul_(2)
        return y * (2 if x is y else 3)

    for call in (f, jit(f)):
        x = X.clone()
        assert_same(call(x, x[:]), X * 6)


def test_a_shape_changed_in_place_that_is_seen_from_outside_is_refused():
    w = X.clone()

    def f(x):
        x.t_()
        return w * 2

    for call in (
        jit(f),
        aot_function(f, "eager"),
        make_fx(f),
        lambda x: vmap(lambda _, x: f(x), (0, None))(X, x),
    ):
        with pytest.raises(CaptureError, match=r"in place|from outside"):
            call(w)
        assert_same(w, X)


# ----- transforms: as in torch.func, which wraps each argument that it differentiates or batches,
# and those beside ----


def scaled(x, y, z):
    return (x * y * z).sum() * (1 + 2 * (x is y) + 4 * (y is z) + 8 * (x is z))


TRANSFORMED = {
    "grad": (grad, torch.func.grad, {}),
    "of one": (grad, torch.func.grad, {"argnums": 1}),
    "of several": (grad, torch.func.grad, {"argnums": (0, 2)}),
    "vmap": (vmap, torch.func.vmap, {}),
    "some": (vmap, torch.func.vmap, {"in_dims": (0, None, None)}),
    "one of them": (vmap, torch.func.vmap, {"in_dims": (None, 0, None)}),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transforms(name):
    ours, theirs, options = TRANSFORMED[name]
    for args in ((X, X, X), (X, X.clone(), X), (X.clone(), X, X)):
        want = theirs(scaled, **options)(*args)
        assert_same(ours(scaled, **options)(*args), want)
        assert_same(jit(ours(scaled, **options))(*args), want)


def test_derivatives_along_one_tensor_passed_twice():
    def f(x, y):
        return (x.sin() * y).sum()

    out, pull = vjp(f, X, X)
    want, theirs = torch.func.vjp(f, X, X)
    assert_same((out, pull(torch.ones_like(out))), (want, theirs(torch.ones_like(want))))
    assert_same(jvp(f, (X, X), (X, X * 2)), torch.func.jvp(f, (X, X), (X, X * 2)))


def test_make_fx():
    def f(x, y):
        y.mul_(2)
        return x * (2 if x is y else 3)

    same, apart = X.clone(), X.clone()
    gm = make_fx(f)(same, same)
    x = X.clone()
    assert_same((gm(x, x), x), (X * 4, X * 2))
    gm = make_fx(f)(X.clone(), apart)
    assert_same(gm(X.clone(), X.clone()), X * 3)
