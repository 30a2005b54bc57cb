"""numpy inside of captured functions: in an autograd.Function it is one node of the graph;
elsewhere values are asked for."""

import gc
import weakref

import numpy as np
import pytest
import torch
from torch.autograd import Function

import aotfunc
from aotfunc import grad, hessian, jacfwd, jit, jvp, make_fx, vjp, vmap
from aotfunc.errors import CaptureError, LoopWarning
from tests.functions import SavesInputs


class Product(SavesInputs):
    """x * y by numpy, and so are its derivatives, which call it again."""

    @staticmethod
    def forward(x, y):
        return torch.tensor(x.numpy() * y.numpy())

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return Product.apply(g, y), Product.apply(g, x)

    @staticmethod
    def jvp(ctx, t, u):
        x, y = ctx.saved_tensors
        return Product.apply(t, y) + Product.apply(x, u)


class Exp(Function):
    """Writes to its argument."""

    @staticmethod
    def forward(x):
        np.exp(x.numpy(), x.numpy())
        return x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_dirty(*inputs)
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return Product.apply(g, y)


class Recursive(SavesInputs):
    """sin(x), whose derivatives are itself at other places; no numpy."""

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * Recursive.apply(x + torch.pi / 2)


def square(x):
    return Product.apply(x, x)


def exponential(x):
    return Exp.apply(x * 1)


def sine(x):
    return Recursive.apply(x)


PAIRS = [(square, lambda x: x * x), (exponential, torch.exp), (sine, torch.sin)]
TRANSFORMS = {
    "grad": lambda f: grad(lambda x: (f(x) * x).sum()),
    "jvp": lambda f: lambda x: jvp(f, (x,), (x.cos(),))[1],
    "hessian": lambda f: hessian(lambda x: (f(x) * x).sum()),
    "third": lambda f: jacfwd(hessian(lambda x: f(x).sum())),
    "vjp of vjp": lambda f: lambda x: vjp(lambda x: vjp(f, x)[1](x.cos())[0], x)[1](x)[0],
    "jit": lambda f: jit(f),
    "grad of jit": lambda f: grad(lambda x: jit(f)(x).sum()),
    "vmap": lambda f: vmap(f),
    "vmap of grad": lambda f: vmap(grad(lambda x: f(x) ** 2)),
    "grad of vmap": lambda f: grad(lambda x: vmap(f)(x).sum()),
    "vmap of vmap": lambda f: lambda x: vmap(vmap(f))(torch.stack([x, -x])),
}


@pytest.mark.filterwarnings(
    "ignore::aotfunc.errors.LoopWarning", "ignore:The given NumPy array is not writable"
)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("f", "plain"), PAIRS, ids=["product", "exp", "recursive"])
def test_a_function_by_numpy_under(transform, f, plain):
    x = torch.randn(4, dtype=torch.float64)
    transformed = TRANSFORMS[transform](f)
    for _ in range(2):  # values are not those of the first capture
        torch.testing.assert_close(transformed(x), TRANSFORMS[transform](plain)(x))
        x = x + 1


def test_a_function_without_values_is_one_node_per_sample():
    x = torch.randn(3, 2, dtype=torch.float64)
    with pytest.warns(LoopWarning, match=r"Product\.forward"):
        graph = make_fx(vmap(square))(x)
    assert (
        sum(
            "Product_forward" in str(n.target.__name__)
            for n in graph.graph.nodes
            if n.op == "call_function"
        )
        == 3
    )
    torch.testing.assert_close(graph(x), x * x)


def test_memory_of_a_constant():
    indices = torch.tensor([2, 0, 1])
    f = lambda x: (
        x[torch.from_numpy(np.argsort(indices.numpy()))] * float(np.asarray(indices).sum())
    )
    x = torch.randn(3, dtype=torch.float64)
    torch.testing.assert_close(
        grad(lambda x: f(x)[0])(x), torch.tensor([0.0, 3.0, 0.0], dtype=torch.float64)
    )


def test_an_array_of_a_traced_value_is_not_written_to():
    def f(x):
        x.detach().numpy()[0] = 0
        return x * 2

    with pytest.raises(ValueError, match="read-only"):
        aotfunc.jvp(f, (torch.ones(2),), (torch.ones(2),))


ARRAYS = {
    "numpy": lambda x: torch.from_numpy(x.numpy() * 2),
    "asarray": lambda x: torch.as_tensor(np.sin(np.asarray(x))),
    "ufunc": lambda x: torch.as_tensor(np.sin(x)),
    "of a result": lambda x: torch.from_numpy((2 * x).numpy().copy()) + x,
}
DERIVATIVES = {
    "grad": lambda f, x: grad(lambda x: f(x).sum())(x),
    "vjp": lambda f, x: vjp(f, x),
    "jvp": lambda f, x: jvp(f, (x,), (x,)),
    "linearize": lambda f, x: aotfunc.linearize(f, x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "hessian": lambda f, x: hessian(lambda x: f(x).sum())(x),
    "vmap in grad": lambda f, x: grad(lambda x: vmap(f)(x).sum())(x),
    "grad in vmap": lambda f, x: vmap(grad(lambda r: f(r).sum()))(x),
    "vmap of a leaf": lambda f, x: vmap(f)(x.clone().requires_grad_()),
}


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("array", ARRAYS)
def test_an_array_of_a_differentiated_value_is_refused(array, derivative):
    """It would cut the derivative without a word; autograd refuses it, too."""
    with pytest.raises(CaptureError, match="has no derivative"):
        DERIVATIVES[derivative](ARRAYS[array], torch.ones(2))


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")  # ours are not
def test_an_array_of_a_detached_or_unrelated_value():
    x, y = torch.tensor([0.5, 1.0]), torch.tensor([2.0, 3.0])
    detached = lambda x: (x * torch.from_numpy(np.sin(x.detach().numpy()))).sum()
    torch.testing.assert_close(grad(detached)(x), x.sin())
    unrelated = lambda x, y: (x * torch.from_numpy(np.sin(y.numpy()))).sum()
    torch.testing.assert_close(grad(unrelated)(x, y), y.sin())
    torch.testing.assert_close(
        grad(lambda x: (x * torch.as_tensor(x.numpy(force=True))).sum())(x), x
    )
    torch.testing.assert_close(
        vmap(lambda x: torch.as_tensor(np.sin(x.numpy())))(torch.ones(3)), torch.ones(3).sin()
    )


def test_a_result_that_is_no_tensor_is_none_of_backward():
    class Pair(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return "a name", x.sin()

        @staticmethod
        def backward(ctx, nothing, g):
            assert nothing is None
            return g * ctx.saved_tensors[0].cos()

    x = torch.randn(3, dtype=torch.float64)
    torch.testing.assert_close(grad(lambda x: Pair.apply(x)[1].sum())(x), x.cos())


@pytest.mark.filterwarnings("ignore::aotfunc.errors.LoopWarning")
@pytest.mark.parametrize("f", [square, sine])
def test_a_derivative_of_a_derivative_keeps_no_tensor(f):
    x = torch.randn(3, dtype=torch.float64)
    seen = weakref.ref(x)
    grad(lambda x: f(x).sum())(x)
    vmap(lambda x: vjp(f, x)[1](x))(x)
    del x
    gc.collect()
    assert seen() is None
