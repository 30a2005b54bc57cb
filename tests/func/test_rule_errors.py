"""What goes wrong inside a rule is told with the op, the rule's line and the user's."""

import itertools
import re

import pytest
import torch

from aotfunc import grad, hessian, jit, jvp, vmap
from aotfunc.errors import RuleError
from aotfunc.extend import jvp_of, vjp_of, vmap_of

X = torch.linspace(-1, 1, 3)
LIBRARY = torch.library.Library("aotfunc_rule_errors", "DEF")
NUMBERS = itertools.count()


def defined():
    """A new op ``x**3``, registered for devices only."""
    name = f"cube{next(NUMBERS)}"
    LIBRARY.define(f"{name}(Tensor x) -> Tensor")
    LIBRARY.impl(name, lambda x: x**3, "CompositeExplicitAutograd")
    return getattr(torch.ops.aotfunc_rule_errors, name).default


def divided(*_):
    return 1 / 0


def mismatched(*_):
    return torch.ones(2) + torch.ones(3)


def of_another_shape(*_):
    return torch.ones(7)


def no_tensor(*_):
    return "x"


def too_many(*args):
    return args[-1], args[-1]


def looked_at(*args):
    return args[0] if float(torch.ones(())) and float(args[-1].sum()) else args[-1]


def not_made_for_it(*_):
    raise NotImplementedError("the moon is full")


TRANSFORMS = {
    "reverse": (vjp_of, lambda op: grad(lambda x: op(x).sum())(X)),
    "forward": (jvp_of, lambda op: jvp(op, (X,), (X,))),
    "batching": (vmap_of, lambda op: vmap(op)(X)),
}


RULES = [divided, mismatched, of_another_shape, no_tensor, too_many, looked_at]


@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_that_fails(rule, kind):
    register, called = TRANSFORMS[kind]
    op = defined()
    register(op)(rule)
    with pytest.raises(RuleError) as caught:
        called(op)
    place = rf"test_rule_errors.py:\d+ in {rule.__name__}"
    users = r" \(at test_rule_errors.py:\d+ in <lambda>: .*\)"
    assert re.match(
        rf"the {kind} rule of {re.escape(str(op))} \({place}: .*\) failed{users}: ",
        str(caught.value),
    )
    assert str(caught.value).count("<lambda>: ") == 1


def test_a_batching_rule_returns_all_results():
    LIBRARY.define("halves(Tensor x) -> Tensor[]")
    LIBRARY.impl("halves", lambda x: [x / 2, x / 2], "CompositeExplicitAutograd")
    op = torch.ops.aotfunc_rule_errors.halves.default
    vmap_of(op)(lambda x, *, batched, size: [x / 2])
    with pytest.raises(RuleError, match="returned 1 results where there are 2"):
        vmap(lambda x: op(x)[0])(X)


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_a_rule_that_is_not_made_for_its_arguments(kind):
    register, called = TRANSFORMS[kind]
    op = defined()
    register(op)(not_made_for_it)
    with pytest.raises(
        RuleError, match=rf"no {kind} rule for {re.escape(str(op))} \(at .*\): the moon is full"
    ):
        called(op)


def test_a_failing_rule_of_a_compiled_function():
    op = defined()
    vjp_of(op)(divided)
    with pytest.raises(RuleError, match=r"reverse rule of .* in divided: .*ZeroDivisionError"):
        jit(op)(X.clone().requires_grad_()).sum().backward()


@pytest.mark.parametrize(
    "ask",
    [
        lambda f: grad(lambda x: f(x).sum())(X),
        lambda f: jvp(f, (X,), (X,)),
        lambda f: hessian(lambda x: f(x).sum())(X),
        lambda f: vmap(grad(f))(X),
        lambda f: jit(grad(lambda x: f(x).sum()))(X),
        lambda f: jit(f)(X.clone().requires_grad_()).sum().backward(),
    ],
)
def test_an_op_without_derivative_formula(ask):
    """PyTorch takes its derivative for zero, and warns."""
    op = defined()
    torch.testing.assert_close(jit(op)(X), X**3)
    torch.testing.assert_close(grad(lambda x: (op(x.detach()) * x).sum())(X), X**3)
    with pytest.raises(
        RuleError, match=rf"{re.escape(str(op))} \(at .*register_autograd\('{op.name()}'"
    ):
        ask(op)


def test_the_formula_that_was_asked_for():
    op = defined()
    torch.library.register_autograd(
        op.name(),
        lambda ctx, g: 3 * g * ctx.saved_tensors[0] ** 2,
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
        lib=LIBRARY,
    )
    torch.testing.assert_close(grad(lambda x: op(x).sum())(X), 3 * X**2)
    torch.testing.assert_close(hessian(lambda x: op(x).sum())(X), torch.diag(6 * X))
