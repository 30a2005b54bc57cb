"""Errors that ops raise for values, and that the function catches: in a transform that runs once
they are raised where the op is called."""

import pytest
import torch

from aotfunc import grad, hessian, jit, vjp, vmap
from tests.reference import assert_same


def with_jitter(a):
    for jitter in (0.0, 0.1, 10.0):
        try:
            return torch.linalg.cholesky(a + jitter * torch.eye(2))
        except RuntimeError:
            pass
    raise ValueError


def by_definiteness(a):
    def is_positive():
        try:
            torch.linalg.cholesky(a)
        except torch.linalg.LinAlgError:
            return False
        return True

    return a * 3 if is_positive() else a * a


def inverse(a):
    try:
        return torch.linalg.inv(a)
    except RuntimeError:
        return torch.sin(a)


def solution_in_a_helper(a):
    def solve():
        with torch.enable_grad():
            return torch.linalg.solve(a, torch.ones(2))

    try:
        return solve()
    except Exception:
        return a * a
    finally:
        torch.ones(1)


FUNCTIONS = [with_jitter, by_definiteness, inverse, solution_in_a_helper]
MATRICES = [torch.eye(2), torch.tensor([[1.0, 2.0], [2.0, 4.0]]), -torch.eye(2)]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("k", range(3))
def test_as_eager(function, k):
    def f(a):
        return function(a * 1).sum()

    a = MATRICES[k].clone().requires_grad_()
    value = f(a)
    (want,) = torch.autograd.grad(value, a)
    given = a.detach()
    got, pull = vjp(f, given)
    assert_same((got, pull(torch.ones(()))[0], grad(f)(given)), (value.detach(), want, want))
    assert_same(vmap(grad(f))(torch.stack([given, given])), torch.stack([want, want]))
    twice = [
        g(lambda a, g=g: g(lambda b: f(b).sin())(a).sum())(given) for g in (grad, torch.func.grad)
    ]
    torch.testing.assert_close(*twice)
    hessian(f)(given)


def test_a_compiled_function_raises_the_error():
    for f in (with_jitter, by_definiteness):
        compiled = jit(lambda a, f=f: f(a).sum())
        assert_same(compiled(torch.eye(2)), f(torch.eye(2)).sum())
        with pytest.raises(torch.linalg.LinAlgError):
            compiled(-torch.eye(2))
