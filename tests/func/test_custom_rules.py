"""``custom_vjp``, ``custom_jvp`` and ``custom_vmap``: functions with rules of the user's.

A rule that says the true derivative must give what the plain function gives, under every pair of
transforms and in compiled functions; one that says another shows that it is asked."""

import types
from typing import NamedTuple

import pytest
import torch
from torch.autograd import forward_ad
from torch.testing import assert_close

import aotfunc
from aotfunc import (
    custom_jvp,
    custom_vjp,
    custom_vmap,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jit,
    jvp,
    linearize,
    make_fx,
    vjp,
    vmap,
)
from aotfunc.capture.calls import _steps
from aotfunc.errors import AotfuncError, ArgumentError, CaptureError


def plain(x, w):
    return torch.tanh(x * w) + x


def by_vjp():
    f = custom_vjp(lambda x, w: plain(x, w))

    def fwd(x, w):
        y = torch.tanh(x * w)
        return y + x, (y, 1 - y * y, x, w)

    def bwd(residuals, g):
        _, slope, x, w = residuals
        return g * (slope * w + 1), g * slope * x

    f.defvjp(fwd, bwd)
    return f


def by_itself():
    """The forward calls the function, and a residual is computed from what it returns."""
    f = custom_vjp(lambda x, w: plain(x, w))

    def fwd(x, w):
        out = f(x, w)
        return out, (out - x, x, w)

    def bwd(residuals, g):
        y, x, w = residuals
        slope = 1 - y * y
        return g * (slope * w + 1), g * slope * x

    f.defvjp(fwd, bwd)
    return f


def by_jvp():
    f = custom_jvp(lambda x, w: plain(x, w))

    @f.defjvp
    def rule(primals, tangents):
        (x, w), (tx, tw) = primals, tangents
        y = f(x, w) - x
        return y + x, (1 - y * y) * (w * tx + x * tw) + tx

    return f


def by_vmap():
    f = custom_vmap(lambda x, w: plain(x, w))

    @f.def_vmap
    def rule(size, in_batched, x, w):
        assert any(in_batched)
        return plain(x, w), True

    return f


def by_all():
    f = by_vjp()
    f.defjvp(lambda primals, tangents: jvp(plain, primals, tangents))
    f.def_vmap(lambda size, in_batched, x, w: (plain(x, w), True))
    return f


MAKERS = [by_vjp, by_itself, by_jvp, by_vmap, by_all]

TRANSFORMS = {
    "grad": lambda f: grad(lambda x, w: f(x, w).sum()),
    "grad of both": lambda f: lambda x, w: sum(grad(lambda *a: f(*a).sum(), (0, 1))(x, w)),
    "vjp": lambda f: lambda x, w: vjp(f, x, w)[1](x.cos())[1],
    "jvp": lambda f: lambda x, w: jvp(f, (x, w), (w.sin(), x.cos()))[1],
    "linearize": lambda f: lambda x, w: linearize(f, x, w)[1](w.sin(), x.cos()),
    "jacrev": lambda f: lambda x, w: jacrev(f)(x, w).sum(0),
    "jacfwd": lambda f: lambda x, w: jacfwd(f, 1)(x, w).sum(-1),
    "vmap": lambda f: lambda x, w: vmap(f)(torch.stack([x, w]), torch.stack([w, x])).sum(0),
    "vmap of one": lambda f: lambda x, w: vmap(lambda w: f(x, w))(torch.stack([w, x])).sum(0),
    "jit": lambda f: jit(f),
    "checkpoint": lambda f: (
        lambda x, w: torch.utils.checkpoint.checkpoint(f, x, w, use_reentrant=False)
    ),
}


def inputs():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(3, dtype=torch.float64, generator=g) for _ in range(2)]


@pytest.mark.parametrize("make", MAKERS, ids=lambda m: m.__name__)
@pytest.mark.parametrize("outer", TRANSFORMS)
def test_true_rules_give_what_the_function_gives(make, outer):
    for inner in TRANSFORMS.values():
        through = lambda f, inner=inner: TRANSFORMS[outer](inner(f))
        assert_close(through(make())(*inputs()), through(plain)(*inputs()))


@pytest.mark.parametrize("make", MAKERS, ids=lambda m: m.__name__)
def test_third_order(make):
    def third(f):
        along = lambda g: lambda x, w: jvp(g, (x, w), (w, x))[1]
        return along(along(along(f)))

    assert_close(third(make())(*inputs()), third(plain)(*inputs()))
    scalar = lambda f: lambda x: f(x, 2 * x).sum()
    nested = lambda f: grad(lambda x: (hessian(scalar(f))(x) ** 2).sum())
    assert_close(nested(make())(inputs()[0]), nested(plain)(inputs()[0]))


@pytest.mark.parametrize("make", MAKERS, ids=lambda m: m.__name__)
@pytest.mark.parametrize("through", ["called", "jit", "aot_function", "cpp"])
def test_under_autograd(make, through):
    wrap = {
        "called": lambda f: f,
        "jit": lambda f: jit(f, backend="eager"),
        "cpp": jit,
        "aot_function": lambda f: aotfunc.aot_function(f, lambda gm, _: gm),
    }[through]
    found = []
    for f in (wrap(make()), plain):
        x, w = (t.requires_grad_() for t in inputs())
        first = torch.autograd.grad((f(x, w) ** 2).sum(), (x, w), create_graph=True)
        found.append([*first, *torch.autograd.grad(sum((g**2).sum() for g in first), (x, w))])
    assert_close(*found)


@pytest.mark.parametrize("make", MAKERS, ids=lambda m: m.__name__)
def test_dual_tensors(make):
    x, w = inputs()

    def tangent(f):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, w), w)).tangent.clone()

    assert_close(tangent(make()), tangent(plain))


def test_rules_are_asked():
    f = custom_vjp(torch.sin)
    f.defvjp(lambda x: (x.sin(), None), lambda _, g: (10 * g,))
    f.defjvp(lambda primals, tangents: (primals[0].sin(), 100 * tangents[0]))
    f.def_vmap(lambda size, in_batched, x: (x + 1000, in_batched[0]))
    x = torch.zeros(2)
    assert grad(lambda x: f(x).sum())(x).tolist() == [10, 10]
    assert jvp(f, (x,), (x + 1,))[1].tolist() == [100, 100]
    assert vmap(f)(x).tolist() == [1000, 1000]
    assert vmap(grad(f))(x).tolist() == [10, 10]
    y = torch.zeros(2, requires_grad=True)
    f(y).sum().backward()
    assert y.grad.tolist() == [10, 10]


def test_graph_is_the_rules():
    f = custom_vjp(lambda x: torch.log1p(torch.exp(x)))
    f.defvjp(lambda x: (f(x), x), lambda x, g: (g * torch.sigmoid(x),))
    code = make_fx(grad(lambda x: f(x).sum()))(torch.ones(3)).code
    assert "sigmoid" in code and "exp" not in code


class Pair(NamedTuple):
    first: torch.Tensor
    second: dict


def test_trees_and_fixed_arguments():
    @custom_vjp(nondiff_argnames=("power", "mode"))
    def f(tree, power, mode="sum"):
        return Pair(tree["a"] ** power, {"b": tree["b"][0] * 2, "n": 3})

    def fwd(tree, power, mode):
        return f.f(tree, power, mode), {"a": tree["a"], "power": power}

    def bwd(power, mode, residuals, ct):
        assert mode == "mean" and residuals["power"] == power
        return (
            {"b": [ct.second["b"] * 2], "a": ct.first * power * residuals["a"] ** (power - 1)},
        )

    f.defvjp(fwd, bwd)
    tree = {"a": torch.tensor([1.0, 2.0]), "b": [torch.tensor([3.0])]}

    def loss(tree):
        out = f(tree, 3, mode="mean")
        assert out.second["n"] == 3
        return out.first.sum() + out.second["b"].sum()

    grads = grad(loss)(tree)
    assert grads["a"].tolist() == [3, 12] and grads["b"][0].tolist() == [2]
    assert jit(grad(loss))(tree)["a"].tolist() == [3, 12]


def test_fixed_tensor_and_integers():
    @custom_vjp(nondiff_argnums=1)
    def f(x, scale, index):
        return (x * scale)[index], index + 1

    def bwd(scale, index, g):
        assert g[1] is None
        return torch.zeros(3).index_put((index,), g[0] * scale), None

    f.defvjp(lambda x, scale, index: (f(x, scale, index), index), bwd)
    x, index = torch.ones(3), torch.tensor([0, 2])
    assert grad(lambda x: f(x, torch.tensor(5.0), index)[0].sum())(x).tolist() == [5, 0, 5]
    # fixed: without a derivative, though it has one
    assert grad(lambda s: f(x, s, index)[0].sum())(torch.tensor(5.0)) == 0


def test_symbolic_zeros():
    seen = []

    def make(symbolic_zeros):
        f = custom_vjp(lambda x: (x * 2, x * 3))

        def bwd(_, cts):
            seen.append([c is None for c in cts])
            return (sum(c for c in cts if c is not None),)

        f.defvjp(lambda x: (f(x), None), bwd, symbolic_zeros=symbolic_zeros)
        return f

    x = torch.ones(2)
    assert grad(lambda x: make(True)(x)[1].sum())(x).tolist() == [1, 1]
    assert [True, False] in seen
    seen.clear()
    assert grad(lambda x: make(False)(x)[1].sum())(x).tolist() == [1, 1]
    assert all(s == [False, False] for s in seen)


def test_none_is_zero():
    f = custom_vjp(lambda x, y: x * y)
    f.defvjp(lambda x, y: (x * y, y), lambda y, g: (g * y, None))
    x = torch.tensor(2.0)
    assert grad(f, 1)(x, x) == 0
    f.defjvp(lambda primals, tangents: (primals[0] * primals[1], None))
    assert jvp(f, (x, x), (x, x))[1] == 0


def test_methods_and_stacked_decorators():
    class Layer:
        @custom_vjp(nondiff_argnums=0)
        @custom_vmap
        def apply(self, x):
            return x * 2

        apply.defvjp(lambda self, x: (x * 2, None), lambda self, _, g: (g * 7,))
        apply.def_vmap(lambda size, in_batched, self, x: (x * 3, True))

    x = torch.ones(2)
    assert grad(lambda x: Layer().apply(x).sum())(x).tolist() == [7, 7]
    assert vmap(Layer().apply)(x).tolist() == [3, 3]


def test_random_residuals():
    """A mask that the forward draws is the backward's."""
    f = custom_vjp(lambda x: x * (torch.rand_like(x) > 0.5))

    def fwd(x):
        mask = torch.rand_like(x) > 0.5
        return x * mask, mask

    f.defvjp(fwd, lambda mask, g: (g * mask,))
    for through in (f, jit(f)):
        x = torch.ones(64, requires_grad=True)
        y = through(x)
        y.sum().backward()
        assert torch.equal(x.grad, y.detach()) and 0 < y.sum() < 64


def test_compiled_functions_see_changed_rules_and_state():
    scale = [2.0]
    f = custom_vjp(lambda x: x * 1)
    f.defvjp(lambda x: (x * 1, None), lambda _, g: (g * scale[0],))
    g = jit(grad(lambda x: f(x).sum()))
    x = torch.ones(2)
    assert g(x).tolist() == [2, 2]
    scale[0] = 5.0
    assert g(x).tolist() == [5, 5]
    f.defvjp(lambda x: (x * 1, None), lambda _, g: (g * 11,))
    assert g(x).tolist() == [11, 11]


ERRORS = {
    "no rules": (custom_vjp, lambda f: None, ArgumentError, "has no rules yet"),
    "fwd": (
        custom_vjp,
        lambda f: f.defvjp(lambda x: x, lambda r, g: (g,)),
        ArgumentError,
        r"the forward must return \(output, residuals\)",
    ),
    "bwd": (
        custom_vjp,
        lambda f: f.defvjp(lambda x: (x, x), lambda r, g: g),
        ArgumentError,
        "must return a tuple of 1, a gradient for each argument",
    ),
    "structure": (
        custom_vjp,
        lambda f: f.defvjp(lambda x: (x, x), lambda r, g: ([g],)),
        ArgumentError,
        "the backward's gradient of x is .* which does not have that argument's structure",
    ),
    "shape": (
        custom_vjp,
        lambda f: f.defvjp(lambda x: (x, x), lambda r, g: (g[:1],)),
        AotfuncError,
        r"the backward's gradient of x has shape \[1\]",
    ),
    "jvp": (
        custom_jvp,
        lambda f: f.defjvp(lambda primals, tangents: tangents[0]),
        ArgumentError,
        r"the jvp must return \(output, tangents\)",
    ),
    "tangent": (
        custom_jvp,
        lambda f: f.defjvp(lambda primals, tangents: (primals[0] * 2, tangents[0].sum())),
        ArgumentError,
        r"a tangent of the output has shape \[\], and its value \[3\]",
    ),
    "position": (
        lambda f: custom_vjp(f, nondiff_argnums=1),
        lambda f: f.defvjp(lambda x: (x, x), lambda n, r, g: (g,)),
        ArgumentError,
        r"nondiff_argnums=\(1,\): function got 1 arguments",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    decorator, define, error, words = ERRORS[case]
    f = decorator(lambda x: x * 2)
    define(f)
    with pytest.raises(error, match=words):
        grad(lambda x: f(x).sum())(torch.ones(3))


def test_closed_over_tensors_are_refused():
    w = torch.ones(2, requires_grad=True)
    f = custom_vjp(lambda x: x * w)
    f.defvjp(lambda x: (x * w, w), lambda w, g: (g * w,))
    with pytest.raises(CaptureError, match="closes over a tensor that requires grad"):
        f(torch.ones(2))

    def outer(v):
        g = custom_vjp(lambda x: x * v)
        g.defvjp(lambda x: (x * v, v), lambda v, ct: (ct * v,))
        return grad(lambda x: g(x).sum())(torch.ones(2)).sum()

    with pytest.raises(CaptureError, match="closes over a tensor that requires grad"):
        grad(outer)(torch.ones(2))
    with pytest.raises(ArgumentError, match="'m' is no parameter"):
        custom_vjp(lambda x, n: x, nondiff_argnames="m")
    with pytest.raises(ArgumentError, match="positions count from 0"):
        custom_vjp(lambda x, n: x, nondiff_argnums=-1)


def test_defaults_are_arguments():
    f = custom_vjp(lambda x, scale=3.0: x * scale)
    f.defvjp(lambda x, scale: (x * scale, scale), lambda scale, g: (g * scale, None))
    f.def_vmap(lambda size, in_batched, x, scale: (x * scale + 1, True))
    assert grad(f)(torch.tensor(1.0)) == 3
    assert vmap(f)(torch.ones(2)).tolist() == [4, 4]
    builtin = custom_vjp(torch.sin)
    builtin.defvjp(lambda x: (x.sin(), None), lambda _, g: (g * 7,))
    assert grad(builtin)(torch.tensor(1.0)) == 7


def test_recursive_rules_are_recorded_once():
    """A rule that calls its own function makes the same program at every call."""
    f = by_itself()
    x, w = inputs()
    through = lambda: (f(x, w), grad(lambda x: f(x, w).sum())(x))
    through()
    before = len(_steps)
    through()
    assert len(_steps) == before


TWO = torch.tensor(2.0, dtype=torch.float64)
READ = {"a tensor from outside": lambda: TWO, "a number": lambda: torch.tensor(2.0)}


@pytest.mark.parametrize("read", READ.values(), ids=READ)
@pytest.mark.parametrize("kind", ["jvp", "vjp", "function"])
def test_recursive_rules_close_over_tensors(kind, read):
    """tanh(2 x), with derivatives of any order by itself."""
    slope = lambda f, x: read() * (1 - f(x) ** 2)
    if kind == "jvp":
        f = custom_jvp(lambda x: (read() * x).tanh())
        f.defjvp(lambda primals, tangents: (f(*primals), tangents[0] * slope(f, *primals)))
    elif kind == "vjp":
        f = custom_vjp(lambda x: (read() * x).tanh())
        f.defvjp(lambda x: ((2 * x).tanh(), x), lambda x, g: (g * slope(f, x),))
    else:

        class Tanh(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return (2 * x).tanh()

            @staticmethod
            def backward(ctx, g):
                return g * slope(Tanh.apply, *ctx.saved_tensors)

        f = Tanh.apply
    x, reference = torch.tensor(0.3, dtype=torch.float64), lambda x: (2 * x).tanh()
    push = lambda f: lambda x: jvp(f, (x,), (x.cos(),))[1]
    for through in (
        lambda f: grad(grad(grad(f))),
        lambda f: push(push(push(f))),
        lambda f: lambda x: vmap(grad(push(f)))(torch.stack([x, -x])),
    ):
        torch.testing.assert_close(through(f)(x), through(reference)(x))


def test_a_batching_rule_reads_tensors_from_outside():
    w = torch.tensor([2.0, 3.0])
    f = custom_vmap(lambda x: x * w)
    f.def_vmap(lambda size, in_batched, x: (x * w + torch.tensor([100.0, 0.0]), True))
    batch = torch.ones(4, 2)
    assert vmap(f, 0)(batch).tolist() == [[102, 3]] * 4
    assert vmap(f, 1)(batch.mT).tolist() == [[102, 3]] * 4
    assert jit(vmap(f), backend="eager")(batch).tolist() == [[102, 3]] * 4
    f.def_vmap(lambda size, in_batched, x: (x * w + torch.tensor([[100.0] * 33] * 2).sum(1), True))
    with pytest.raises(CaptureError, match="the batching rule of function is recorded here"):
        jit(vmap(f))(batch)  # where it makes a tensor of many numbers
    f.def_vmap(lambda size, in_batched, x: (x * w + 100, True))
    for _ in range(2):  # recorded: as operands of the call
        want = vmap(f)(batch)
        assert_close(jit(vmap(f), backend="eager")(batch), want)
        assert_close(make_fx(vmap(f))(batch)(batch), want)
        assert_close(vmap(vmap(f))(batch[None]), want[None])
        w += 1
    box = types.SimpleNamespace(w=w)
    f.def_vmap(lambda size, in_batched, x: (x * box.w, True))
    with pytest.raises(CaptureError, match="the batching rule of function is recorded here"):
        jit(vmap(f))(batch)


def test_a_recorded_batching_rule_follows_what_it_closes_over():
    w, batch = torch.tensor([2.0, 3.0]), torch.ones(4, 2)
    f = custom_vmap(lambda x: x * w)
    scaled = lambda x: x * w * 10
    f.def_vmap(lambda size, in_batched, x: (scaled(x), True))
    compiled = jit(lambda x: vmap(f)(x).sum(0), backend="eager")
    for _ in range(2):
        assert_close(compiled(batch), 40 * w)
        w = w + 1  # another tensor
    w.requires_grad_()
    for run in (compiled, lambda x: vmap(f)(x).sum(0)):
        (slope,) = torch.autograd.grad(run(batch).square().sum(), w)
        assert_close(slope, 3200 * w.detach())
    w = torch.tensor([2.0, 3.0])
    assert_close(jacrev(lambda x: vmap(f)(x).sum(0))(batch), jacfwd(compiled)(batch))
    product = lambda x: vmap(f)(x).log().prod()
    assert_close(hessian(product)(batch), hessian(lambda x: scaled(x).log().prod())(batch))


def test_a_batching_rule_closes_over_what_a_transform_computes():
    def outer(x, rows):
        k = x.exp()
        f = custom_vmap(lambda y: y * k)
        f.def_vmap(lambda size, in_batched, y: (y * k, True))
        return vmap(f)(rows).sin().sum()

    plain = lambda x, rows: (rows * x.exp()).sin().sum()
    x, rows = torch.tensor([0.1, 0.2]), torch.ones(3, 2)
    for transform in (grad, hessian, lambda f: jit(grad(f), backend="eager")):
        assert_close(transform(outer)(x, rows), transform(plain)(x, rows))
    batched = lambda f: vmap(grad(f), (0, None))(torch.stack([x, x + 1]), rows)
    assert_close(batched(outer), batched(plain))


@pytest.mark.parametrize(
    "rule, words",
    [
        (lambda size, in_batched, x: (None, None), "True or False for each part"),
        (lambda size, in_batched, x: ({"a": x}, {"a": True}), "of another structure"),
        (lambda size, in_batched, x: ((x, x), True), "True or False for each part"),
        (lambda size, in_batched, x: (x, False), r"of shape \[4, 2\] .* say \[2\]"),
        (lambda size, in_batched, x: (x[:3], True), r"of shape \[3, 2\] .* say \[4, 2\]"),
        (lambda size, in_batched, x: (x.double(), True), "torch.float64, where f"),
    ],
)
def test_what_a_batching_rule_returns_is_checked(rule, words):
    f = custom_vmap(lambda x: x * 2)
    f.def_vmap(rule)
    with pytest.raises(ArgumentError, match=words):
        jit(vmap(f))(torch.ones(4, 2))


def clip(g):
    return g.clamp(-0.1, 0.1)


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, g):
        return clip(g)


def with_backward(back):
    f = custom_vjp(lambda x: x * 1)
    f.defvjp(lambda x: (x * 1, None), lambda _, g: (back(g),))
    return f


def with_forward(push):
    f = custom_jvp(lambda x: x * 1)
    f.defjvp(lambda primals, tangents: (primals[0] * 1, push(tangents[0])))
    return f


BY_TRANSPOSE = {
    "forward": {
        "jvp": lambda f: lambda x: jvp(f, (x,), (x,))[1],
        "jacfwd": jacfwd,
        "linearize": lambda f: lambda x: linearize(f, x)[1](x),
        "hessian": lambda f: hessian(lambda x: f(x).pow(2).sum()),
        "compiled": lambda f: jit(jacfwd(f), backend="eager"),
        "batched": lambda f: lambda x: vmap(jacfwd(f))(x[None]),
    },
    "reverse": {
        "grad": lambda f: grad(lambda x: f(x).sum()),
        "jacrev": jacrev,
        "batched": lambda f: lambda x: vmap(jacrev(f))(x[None]),
    },
}
NOT_LINEAR = {
    "clipped": clip,
    "squared": torch.square,
    "divided by its norm": lambda g: g / g.norm(),
    "by its sign": lambda g: torch.where(g > 0, g, 2 * g),
}


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_rules_that_have_no_transpose(name):
    """A rule that is not linear is called as it is, and its transpose, which has no value to be
    computed at, is refused: it read memory that nobody had written."""
    rule, x = NOT_LINEAR[name], torch.ones(3, dtype=torch.float64)
    back, push = with_backward(rule), with_forward(rule)
    ones = torch.ones_like(x)
    assert_close(grad(lambda x: back(x).sum())(x), rule(ones))
    assert_close(jvp(push, (x,), (ones,))[1], rule(ones))
    for mode, f in (("forward", back), ("reverse", push)):
        for transform in BY_TRANSPOSE[mode].values():
            with pytest.raises(CaptureError, match=f"{mode}.* is the transpose of .* not linear"):
                transform(f)(x)
    square = lambda x: back(x).pow(2).sum()
    assert jacrev(jacrev(square))(x).isfinite().all()


def test_functions_that_have_no_transpose():
    x = torch.ones(3, dtype=torch.float64)
    assert_close(grad(lambda x: Clipped.apply(x).sum())(x), clip(torch.ones_like(x)))
    for transform in BY_TRANSPOSE["forward"].values():
        with pytest.raises(CaptureError, match="forward mode of Clipped is the transpose"):
            transform(Clipped.apply)(x)


@pytest.mark.parametrize("rule", [lambda g: 3 * g, lambda g: g.flip(0).cumsum(0) * 2])
def test_rules_that_have_a_transpose(rule):
    """Forward mode by the transpose of a backward, and the other way, in every transform."""
    x = torch.ones(3, dtype=torch.float64)
    whole = torch.stack([rule(row) for row in torch.eye(3, dtype=x.dtype)])
    assert_close(jacrev(with_backward(rule))(x), whole)
    assert_close(jacfwd(with_backward(rule))(x), whole)
    assert_close(jacfwd(with_forward(rule))(x), whole.T)
    assert_close(jacrev(with_forward(rule))(x), whole.T)
