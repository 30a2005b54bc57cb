"""What the registered rules of a custom op close over: read at every call, guarded, or refused;
never kept."""

import pytest
import torch

from aotfunc import aot_function, grad, jit, make_fx, vmap
from aotfunc.errors import CaptureError, GraphError, RuleError
from tests.reference import assert_same

SCALE = {"a number": torch.tensor(2.0), "a vector": torch.tensor([1.0, 2.0, 3.0])}
RATE = [2.0]


def defined(name, backward):
    op = torch.library.custom_op(
        f"aotfunc_closures::{name}",
        lambda x: x * 2,
        mutates_args=(),
        schema="(Tensor x) -> Tensor",
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


@torch.library.custom_op("aotfunc_layouts::turned", mutates_args=())
def turned(x: torch.Tensor) -> torch.Tensor:
    return (x * 2).t().contiguous().t()


@torch.library.custom_op("aotfunc_layouts::longer", mutates_args=())
def longer(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x])


@torch.library.custom_op("aotfunc_layouts::positive", mutates_args=())
def positive(x: torch.Tensor) -> torch.Tensor:
    return x[x > 0]


turned.register_fake(lambda x: x.new_empty(x.shape))
longer.register_fake(lambda x: x.new_empty(x.shape))
positive.register_fake(lambda x: x.new_empty(torch.library.get_ctx().new_dynamic_size()))


@pytest.mark.filterwarnings("ignore::aotfunc.errors.LoopWarning")
def test_a_fake_that_says_other_strides():
    """What was captured on that ground holds."""
    x = torch.randn(2, 3)
    assert_same(jit(lambda x: turned(x).reshape(-1))(x), (x * 2).reshape(-1))
    assert_same(jit(lambda x: turned(x).sin().view(6))(x), (x * 2).sin().reshape(-1))
    assert_same(vmap(lambda x: turned(x).reshape(-1))(x.expand(2, 2, 3))[1], (x * 2).reshape(-1))


def test_a_fake_that_says_another_shape_is_refused():
    with pytest.raises(
        GraphError,
        match=r"longer.default returned .* shape \[4\], .* fake implementation says \[2\]",
    ):
        jit(lambda x: longer(x) * 2)(torch.ones(2))


@pytest.mark.parametrize("compiled", [jit, lambda f: aot_function(f, "eager")])
@pytest.mark.parametrize("own", [False, True])
def test_what_is_refused_on_the_way_draws_nothing(compiled, own):
    generator = torch.Generator().manual_seed(0) if own else torch.default_generator
    before = generator.get_state()
    f = compiled(lambda x: longer(x + torch.rand(2, generator=generator if own else None)))
    for x in torch.ones(2), torch.ones(2, requires_grad=True):
        with pytest.raises(GraphError, match="longer"):
            f(x)
        assert torch.equal(generator.get_state(), before)


def test_a_fake_that_asks_for_a_size_that_values_decide():
    x = torch.tensor([1.0, -1.0, 2.0])
    assert_same(grad(lambda x: positive(x.detach()).sum() * x.sum())(x), torch.full((3,), 3.0))
    assert_same(make_fx(lambda x: positive(x) * 2)(x)(x), torch.tensor([2.0, 4.0]))
    with pytest.raises(
        CaptureError, match=r"the shape of .*positive.*jit captures the function once"
    ):
        jit(lambda x: positive(x) * 2)(x)
