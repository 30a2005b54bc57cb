"""What the registered rules of a custom op close over: read at every call, guarded, or refused; never kept."""

import pytest
import torch

from aotfunc import aot_function, grad, jit, vmap
from aotfunc.errors import RuleError
from tests.reference import assert_same

SCALE = {"a number": torch.tensor(2.0), "a vector": torch.tensor([1.0, 2.0, 3.0])}
RATE = [2.0]


def defined(name, backward):
    op = torch.library.custom_op(
        f"aotfunc_closures::{name}", lambda x: x * 2, mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    op.register_fake(torch.empty_like)
    op.register_autograd(backward)
    return op


SCALED = {
    "a number": defined("number", lambda ctx, g: g * SCALE["a number"]),
    "a vector": defined("vector", lambda ctx, g: g * SCALE["a vector"]),
}
rated = defined("rated", lambda ctx, g: g * RATE[0])


def by_autograd(way):
    def gradient_of(op):
        f = way(lambda x: op(x).sum())

        def gradient(x):
            x = x.clone().requires_grad_()
            return torch.autograd.grad(f(x), x)[0]

        return gradient

    return gradient_of


WAYS = {
    "grad": lambda op: grad(lambda x: op(x).sum()),
    "jit of grad": lambda op: jit(grad(lambda x: op(x).sum())),
    "grad of jit": lambda op: grad(jit(lambda x: op(x).sum())),
    "vmap of grad": lambda op: lambda x: vmap(grad(lambda x: op(x).sum()))(x[None])[0],
    "autograd of jit": by_autograd(jit),
    "autograd of aot_function": by_autograd(lambda f: aot_function(f, "eager")),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", SCALED)
def test_a_backward_reads_the_tensor_as_it_is(kind, way):
    x, c = torch.ones(3), SCALE[kind]
    gradient, before = WAYS[way](SCALED[kind]), c.clone()
    assert_same(gradient(x), x * c)
    try:
        c.mul_(10)
        assert_same(gradient(x), x * 10 * before)
    finally:
        c.copy_(before)


@pytest.mark.parametrize("way", WAYS)
def test_a_backward_reads_the_python_number_as_it_is(way):
    x, gradient = torch.ones(3), WAYS[way](rated)
    assert_same(gradient(x), 2 * x)
    try:
        RATE[0] = 5.0
        assert_same(gradient(x), 5 * x)
    finally:
        RATE[0] = 2.0


def test_a_batching_rule_that_closes_over_a_tensor_is_refused():
    op, c = defined("batched", lambda ctx, g: g * 2), torch.tensor(3.0)
    op.register_vmap(lambda info, in_dims, x: (x * c, in_dims[0]))
    with pytest.raises(RuleError, match="closes over a tensor"):
        vmap(op)(torch.ones(2, 3))
