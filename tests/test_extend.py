"""What authors of ops and backends use: verbs, checks of rules, backends."""

import itertools

import pytest
import torch

from aotfunc import aot_function, grad, hessian, jit, jvp, vmap
from aotfunc.backends import REGISTRY
from aotfunc.errors import RuleError
from aotfunc.extend import (
    Backend,
    check_rule,
    decompose_as,
    elementwise,
    linear,
    nondiff,
    pointwise,
    register,
    vjp_of,
    vmap_of,
)

X = torch.linspace(-1, 1, 3)
aten = torch.ops.aten
LIBRARY = torch.library.Library("aotfunc_extend", "DEF")
NUMBERS = itertools.count()


def new(body, signature="(Tensor x) -> Tensor"):
    name = f"op{next(NUMBERS)}"
    LIBRARY.define(f"{name}{signature}")
    LIBRARY.impl(name, body, "CompositeExplicitAutograd")
    return getattr(torch.ops.aotfunc_extend, name)


def transposed(g, out, x):
    return g.mT


def swapped(x):
    return x.transpose(1, 2).clone()


def wrong(g, out, x):
    return 2 * g * x


def test_a_verb_makes_all_transforms():
    cube = new(lambda x: x**3)
    pointwise(cube, lambda g, out, x: 3 * g * x * x)
    check_rule(cube, (X,), (torch.randn(2, 3),), order=3)
    f = lambda x: cube(x).sum()
    torch.testing.assert_close(grad(f)(X), 3 * X**2)
    torch.testing.assert_close(hessian(f)(X), torch.diag(6 * X))
    torch.testing.assert_close(jvp(cube, (X,), (X,))[1], 3 * X**3)
    torch.testing.assert_close(vmap(cube)(X), X**3)
    double = new(lambda x: 2 * x)
    linear(double, lambda g, x: 2 * g, batch=elementwise(double.default))
    check_rule(double, (X,))
    steps = new(lambda x: x.round())
    nondiff(steps, batch=elementwise)
    torch.testing.assert_close(grad(lambda x: (steps(x) * x).sum())(X), X.round())
    both = new(lambda x: x.sin() * x)
    decompose_as(both, lambda x: x.sin() * x)
    check_rule(both, (X,))


def test_rules_of_an_op():
    op = new(lambda x: x.mT.clone())
    vjp_of(op)(transposed)
    vmap_of(op)(swapped)
    check_rule(op, (torch.randn(2, 3),))
    with pytest.raises(RuleError):
        check_rule(new(lambda x: x * 2), (X,))


def test_a_rule_comes_before_a_registered_backward():
    op = new(lambda x: x**2)
    torch.library.register_autograd(op.default, lambda ctx, g: torch.zeros_like(g))
    vjp_of(op)(wrong)
    for how in (grad, jit(grad)):
        torch.testing.assert_close(how(lambda x: op(x).sum())(X), 2 * X)


@pytest.mark.parametrize("verb, rule", [(vjp_of, wrong), (vmap_of, lambda x: x.flip(0) ** 3)])
def test_a_wrong_rule_is_found(verb, rule):
    cube = new(lambda x: x**3)
    pointwise(cube, lambda g, out, x: 3 * g * x * x)
    verb(cube)(rule)
    with pytest.raises(
        AssertionError, match=r"reverse mode is wrong|batching arguments \[0\] is wrong"
    ):
        check_rule(cube, (X,))


@pytest.mark.parametrize(
    "op, args",
    [
        (aten.atan2, (X, X + 2)),
        (aten.mm, (torch.randn(2, 3), torch.randn(3, 2))),
        (aten.index_select, (torch.randn(3, 2), 0, torch.tensor([2, 0]))),
        (aten.sort, (torch.randn(4),)),
        (aten.masked_fill.Scalar, (X, X > 0, 1.5)),
        (aten.acos, (X / 1.01,)),
    ],
)
def test_rules_of_ours(op, args):
    check_rule(op, args)


@pytest.mark.parametrize("table", [{aten.silu.default: lambda x: x * x.sigmoid()}, None])
@pytest.mark.parametrize("boxed", [True, False])
def test_a_backend(table, boxed, monkeypatch):
    seen, inputs = [], []

    def compiler(gm, example_inputs):
        seen.append({n.target for n in gm.graph.nodes if n.op == "call_function"})

        def call(*args):
            inputs.append(len(args))
            if boxed:
                (args,) = args
            return gm(*args)

        return call

    backend = Backend(compiler, lambda: table, boxed) if table else Backend(compiler, boxed=boxed)
    monkeypatch.setitem(REGISTRY, "mine", None)
    register("mine", backend)
    f = lambda x, y: torch.nn.functional.silu(x) * y
    for compiled in (jit(f, "mine"), jit(f, backend), aot_function(f, "mine")):
        seen.clear()
        torch.testing.assert_close(compiled(X, X + 1), f(X, X + 1))
        assert (aten.silu.default in seen[0]) == (table is None)
        assert inputs.pop() == (1 if boxed else 2)
        leaf = X.clone().requires_grad_()
        (got,) = torch.autograd.grad(compiled(leaf, X).sum(), leaf)
        (want,) = torch.autograd.grad(f(leaf, X).sum(), leaf)
        torch.testing.assert_close(got, want)
    assert "compiler" in repr(jit(f, backend))
