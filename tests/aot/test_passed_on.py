"""What a Function was given and returns, or a module with backward hooks, shows the memory of what
it was given."""

import pytest
import torch
from torch import nn
from torch.autograd import Function

from aotfunc import aot_function, jit, make_fx
from tests.reference import assert_same


class Doubled(Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, g):
        return g * 2


class Row(Function):
    @staticmethod
    def forward(ctx, x):
        return x[0], x * 2

    @staticmethod
    def backward(ctx, g, h):
        return torch.stack([g * 3, g * 0]) + h


class Swap(Function):
    @staticmethod
    def forward(x, y):
        return y, x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g, h):
        return h * 2, g * 3


def hooked():
    m = nn.Sequential(nn.Identity(), nn.Dropout(0.5)).eval()
    m[0].register_full_backward_hook(lambda m, gi, go: tuple(g * 2 for g in gi))
    m[1].register_full_backward_pre_hook(lambda m, go: tuple(g * 3 for g in go))
    return m


M = hooked()


def fresh(x):
    y = x * 2
    return Doubled.apply(y), y[0]


def detached(x):
    y = Doubled.apply(x)
    return y.detach(), y


PROGRAMS = {
    "itself": lambda x: Doubled.apply(x),
    "a part": lambda x: Row.apply(x),
    "crossed": lambda x: Swap.apply(x, x * 2),
    "hooks": lambda x: M(x),
    "hooks and a view": lambda x: (M(x)[0], M(x.t())),
    "twice": lambda x: (lambda y: (y, Doubled.apply(y)))(Doubled.apply(x)),
    "of a fresh one": fresh,
    "of a fresh one alone": lambda x: M(x * 2),
    "detached": detached,
    "nested": lambda x: jit(lambda t: (Doubled.apply(t), t * 2))(x),
    "of a written one": lambda x: (x.mul_(2), Doubled.apply(x))[1],
    "without gradients": torch.no_grad()(lambda x: Doubled.apply(x)),
}


def seen(f):
    """What is visible of the results, that of a write which autograd does not see included."""
    leaf = torch.arange(1.0, 7).view(2, 3).requires_grad_()
    x = leaf * 1
    outs = f(x)
    outs = outs if isinstance(outs, tuple) else (outs,)
    said = [(o.requires_grad, o.stride(), o.storage_offset(), o is x) for o in outs]
    loss = sum((i + 1) * o.sin().sum() for i, o in enumerate(outs) if o.requires_grad)
    if any(o.requires_grad for o in outs):
        loss.backward()
    outs[0].detach().add_(1)
    return said, [o.detach().clone() for o in (x, *outs)], leaf.grad


@pytest.mark.parametrize(
    "how", [jit, lambda f: aot_function(f, "eager")], ids=["jit", "aot_function"]
)
@pytest.mark.parametrize("program", PROGRAMS)
def test_memory_is_shared(program, how):
    assert_same(seen(how(PROGRAMS[program])), seen(PROGRAMS[program]))


def test_writing_to_it_is_refused_as_in_eager():
    for f in (lambda x: x, jit):
        y = f(lambda x: M(x))(torch.ones(3, requires_grad=True))
        with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
            y.add_(1)


def test_a_graph_of_it():
    x = torch.ones(2, 3, requires_grad=True)
    assert_same(make_fx(PROGRAMS["itself"])(x)(x), x)
