"""vmap of autograd.Functions: with a vmap of their own, generated, by numpy; and out_dims of
results not batched."""

import numpy as np
import pytest
import torch
from torch.autograd import Function

from aotfunc import grad, hessian, jacrev, jvp, vjp, vmap
from tests.functions import SavesInputs
from tests.reference import assert_same, grads, hess, jacobian, loop

X = torch.tensor(
    [[3.0, -1.0, 2.0, 0.5], [0.1, 4.0, -2.0, 1.0], [5.0, 6.0, -7.0, 8.0]], dtype=torch.float64
)
W = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)


class Sort(Function):
    """Sorts by numpy; its derivative is another Function by numpy. Both say how they are
    batched."""

    @staticmethod
    def forward(x, dim):
        values = x.detach().numpy()
        order = np.argsort(values, axis=dim)
        back = np.argsort(order, axis=dim)
        return (
            torch.tensor(np.take_along_axis(values, order, axis=dim)),
            torch.tensor(order),
            torch.tensor(back),
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.dim = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx, g, *_):
        order, back = ctx.saved_tensors
        return Take.apply(g, back, order, ctx.dim), None

    @staticmethod
    def vmap(info, in_dims, x, dim):
        x = x.movedim(in_dims[0], 0)
        return Sort.apply(x, dim % (x.dim() - 1) + 1), (0, 0, 0)


class Take(Function):
    @staticmethod
    def forward(x, order, back, dim):
        return torch.tensor(np.take_along_axis(x.detach().numpy(), order.numpy(), axis=dim))

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, order, back, ctx.dim = inputs
        ctx.save_for_backward(order, back)

    @staticmethod
    def backward(ctx, g):
        order, back = ctx.saved_tensors
        return Take.apply(g, back, order, ctx.dim), None, None, None

    @staticmethod
    def vmap(info, in_dims, x, order, back, dim):
        rank = x.dim() - (in_dims[0] is not None)
        full = [
            t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
            for t, d in zip((x, order, back), in_dims)
        ]
        return Take.apply(*full, dim % rank + 1), 0


class Cube(Function):
    """The cube and its derivative; the batching rule is generated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3, 3 * x**2

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output[1])
        ctx.save_for_forward(inputs[0], output[1])

    @staticmethod
    def backward(ctx, g, of_slope):
        x, slope = ctx.saved_tensors
        return g * slope + 6 * x * of_slope

    @staticmethod
    def jvp(ctx, t):
        x, slope = ctx.saved_tensors
        return slope * t, 6 * x * t


class NumpyCube(SavesInputs):
    """No rule at all, and numpy: one call for each sample."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return torch.from_numpy(x.detach().numpy() ** 3)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


FUNCTIONS = {
    "sort by numpy": (lambda x: Sort.apply(x * 1.0, -1)[0], lambda x: x.sort(-1)[0]),
    "sort of the first dim": (
        lambda x: Sort.apply(x[:, None] + x, 0)[0],
        lambda x: (x[:, None] + x).sort(0)[0],
    ),
    "generated": (lambda x: sum(Cube.apply(x.sin())), lambda x: x.sin() ** 3 + 3 * x.sin() ** 2),
    "numpy, generated": (lambda x: NumpyCube.apply(x.sin()), lambda x: x.sin() ** 3),
}


def weighed(f):
    return lambda x: (f(x) * W).sin().sum()


@pytest.mark.filterwarnings("ignore::aotfunc.errors.LoopWarning")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_under_vmap(name):
    f, plain = FUNCTIONS[name]
    g, reference = weighed(f), weighed(plain)
    assert_same(vmap(f)(X), loop(plain)(X))
    assert_same(vmap(f, 1)(X.t()), loop(plain)(X))
    assert_same(vmap(grad(g))(X), loop(grads(reference))(X))
    assert_same(grad(lambda x: vmap(g)(x).sum())(X), loop(grads(reference))(X))
    assert_same(
        vmap(lambda x: vjp(f, x)[1](torch.ones_like(plain(x)))[0])(X),
        loop(grads(lambda x: plain(x).sum()))(X),
    )
    assert_same(
        vmap(vmap(grad(g)))(torch.stack([X, -X])),
        loop(loop(grads(reference)))(torch.stack([X, -X])),
    )
    assert_same(vmap(jacrev(f))(X), torch.stack([jacobian(plain, x) for x in X]))
    assert_same(vmap(jacrev(grad(g)))(X), torch.stack([hess(reference, x) for x in X]))
    unmapped = vmap(lambda i, x: f(x) * i, (0, None))(W, X[0])
    assert_same(unmapped, torch.stack([plain(X[0]) * w for w in W]))


def test_the_functions_own_jvp():
    f = lambda x: Cube.apply(x)[0]
    assert_same(vmap(lambda x: jvp(f, (x,), (x,))[1])(X), 3 * X**3)
    assert_same(vmap(hessian(lambda x: f(x).sum()))(X), torch.diag_embed(6 * X))


class Seen(Function):
    """A vmap that is told apart from the forward, and that notes what it was given."""

    notes: list = []

    @staticmethod
    def forward(x, y, scale):
        return x * y * scale, x.sum()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g, _):
        return g, g, None

    @staticmethod
    def vmap(info, in_dims, x, y, scale):
        Seen.notes.append((info.batch_size, info.randomness, in_dims, scale))
        x, y = (t if d is None else t.movedim(d, 0) for t, d in zip((x, y), in_dims))
        return (x + y * scale, torch.tensor(7.0)), (0, None)


@pytest.mark.parametrize("dims", [(0, 0), (1, 0), (0, None), (None, 1)])
def test_a_vmap_of_its_own_is_used(dims):
    x, y = (torch.ones(3, 3) if d is not None else torch.ones(3) for d in dims)
    run = lambda library: library(lambda x, y: Seen.apply(x, y, 2.0), dims, randomness="same")(
        x, y
    )
    Seen.notes.clear()
    expected = run(torch.func.vmap)
    (theirs,) = Seen.notes
    Seen.notes.clear()
    assert_same(run(vmap), expected)
    (mine,) = Seen.notes
    assert mine[:2] == theirs[:2] and mine[3] == theirs[3]
    assert [d is None for d in mine[2]] == [d is None for d in theirs[2]]


# out_dims of what is not batched
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [-1, -2, 0, 1])
def test_out_dims_of_an_unbatched_result(dim):
    f = lambda x, w: (x * 2, w * 2, torch.ones(2))
    run, reference = vmap(f, (0, None), out_dims=dim), loop(f, (0, None), (dim,) * 3)
    assert_same(run(X, W), reference(X, W))
    twice = vmap(run, (0, None), out_dims=dim)
    assert_same(
        twice(torch.stack([X, X]), W),
        loop(reference, (0, None), (dim,) * 3)(torch.stack([X, X]), W),
    )
    assert_same(grad(lambda w: run(X, w)[1].sin().sum())(W), 6 * (2 * W).cos())
    inside = vmap(grad(lambda w, x: run(X, w)[1].sin().sum() * x.sum()), (None, 0))
    assert_same(inside(W, X), torch.stack([6 * (2 * W).cos() * x.sum() for x in X]))
