"""The halves of a derivative as functions."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from aotfunc import fwd_and_bwd, grad, jit, vmap
from aotfunc.errors import ArgumentError, CaptureError
from aotfunc.partition import default_partition
from tests.reference import assert_same

x = torch.linspace(-1, 1, 6).view(2, 3)
w = torch.linspace(0, 2, 12).view(3, 4)


def layer(p, x):
    return {"y": (x @ p["w"]).tanh(), "n": x.sum()}


@pytest.mark.parametrize("backend", ["eager", "cpp"])
@pytest.mark.parametrize("argnums", [0, 1, (1, 0)])
def test_trees(backend, argnums):
    forward, backward = fwd_and_bwd(layer, {"w": w}, x, argnums=argnums, backend=backend)
    args = {"w": w + 1}, x * 2
    out, residuals = forward(*args)
    torch.testing.assert_close(out, layer(*args))
    assert isinstance(residuals, tuple) and all(isinstance(r, torch.Tensor) for r in residuals)
    cts = {"y": torch.ones(2, 4), "n": torch.tensor(3.0)}
    _, pull = torch.func.vjp(layer, *args)
    theirs = pull(cts)
    wanted = tuple(theirs[i] for i in argnums) if isinstance(argnums, tuple) else theirs[argnums]
    torch.testing.assert_close(backward(residuals, cts), wanted)
    torch.testing.assert_close(backward(residuals, cts), wanted)  # again


def test_residuals_may_be_batched():
    """A batch of forwards first, the batch of backwards later."""
    f = lambda x: (x.sin() * x).sum()
    forward, backward = fwd_and_bwd(f, x[0])
    rows = torch.randn(5, 3)
    values, residuals = vmap(forward)(rows)
    torch.testing.assert_close(values, torch.stack([f(r) for r in rows]))
    grads = vmap(backward)(residuals, torch.ones(5))
    torch.testing.assert_close(grads, torch.func.vmap(torch.func.grad(f))(rows))
    assert_same(jit(lambda *a: vmap(backward)(*a))(residuals, torch.ones(5)), grads)


def test_the_partition_decides_what_is_kept():
    f = lambda x: x.exp().tanh().cos()
    _, many = fwd_and_bwd(f, x, partition_fn=default_partition)[0](x)
    _, few = fwd_and_bwd(f, x, backend="cpp")[0](x)  # where it fuses
    assert len(few) < len(many)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x.detach() * x.sin(),
        lambda x: checkpoint(lambda t: t.exp() * t, x, use_reentrant=False),
        lambda x: F.dropout(x, 0.5) * x,
    ],
    ids=["detach", "checkpoint", "dropout"],
)
def test_derivatives_of_the_halves(f):
    forward, backward = fwd_and_bwd(f, x)

    def through_the_halves(x):
        torch.manual_seed(0)
        y, residuals = forward(x)
        return backward(residuals, y).sum()

    def by_autograd(x):
        torch.manual_seed(0)
        y = f(x)
        return torch.autograd.grad(y, x, y, create_graph=True)[0].sum()

    a, b = (x.clone().requires_grad_() for _ in range(2))
    ours, theirs = through_the_halves(a), by_autograd(b)
    torch.testing.assert_close(ours, theirs)
    (first,), (second,) = (torch.autograd.grad(v, t) for v, t in ((ours, a), (theirs, b)))
    torch.testing.assert_close(first, second)


def test_closed_over_tensors_are_read_by_reference():
    scale = torch.ones(3)
    forward, backward = fwd_and_bwd(lambda x: x.sin() * scale, x[0])
    scale.fill_(2)
    y, residuals = forward(x[0])
    assert_same(y, x[0].sin() * 2)
    torch.testing.assert_close(backward(residuals, torch.ones(3)), x[0].cos() * 2)


def test_refusals():
    forward, backward = fwd_and_bwd(layer, {"w": w}, x)
    with pytest.raises(
        ArgumentError, match=r"forward: x .argument 1. is float32\[1, 3\], and was float32\[2, 3\]"
    ):
        forward({"w": w}, x[:1])
    with pytest.raises(ArgumentError, match="forward: the arguments are"):
        forward({"v": w}, x)
    _, residuals = forward({"w": w}, x)
    with pytest.raises(ArgumentError, match="backward: the cotangents are"):
        backward(residuals, {"y": torch.ones(2, 4)})
    with pytest.raises(ArgumentError, match="backward: the cotangents are"):
        backward(residuals, {"y": torch.ones(2, 5), "n": torch.tensor(1.0)})
    with pytest.raises(CaptureError, match="writes to an argument"):
        fwd_and_bwd(lambda x: x.mul_(2), x.clone())
    with pytest.raises(ArgumentError, match="outputs must be tensors"):
        fwd_and_bwd(lambda x: (x, 1), x)
    with pytest.raises(ArgumentError, match="dtype"):
        fwd_and_bwd(lambda x: x * 1.0, torch.arange(3))
    double, _ = fwd_and_bwd(lambda x, k: x * k, x, 2)
    with pytest.raises(ArgumentError, match=r"forward: k .argument 1. is 3, and was 2"):
        double(x, 3)


def test_inside_a_transform():
    def f(x):
        forward, backward = fwd_and_bwd(torch.sin, x, backend="eager")
        y, residuals = forward(x)
        return backward(residuals, y).sum()

    a = torch.randn(3)
    torch.testing.assert_close(grad(f)(a), (2 * a).cos())


def test_values_that_are_equal_and_others():
    """1 is not True nor 1.0, and 0.0 is not -0.0: results have other dtypes and signs; NaN is
    itself."""
    x = torch.ones(2)
    for known, others in ((1, (True, 1.0)), (0.0, (-0.0, 0)), (True, (1,))):
        forward, _ = fwd_and_bwd(lambda x, k: x / torch.tensor(k), x, known)
        torch.testing.assert_close(forward(x, known)[0], x / known if known else x * torch.inf)
        for other in others:
            with pytest.raises(ArgumentError, match=f"is {other}, and was {known}"):
                forward(x, other)
    forward, _ = fwd_and_bwd(lambda x, k: x * k, x, float("nan"))
    assert forward(x, float("nan"))[0].isnan().all()


def test_residuals_of_another_call():
    forward, backward = fwd_and_bwd(lambda x: (x.sin() * x).exp(), torch.ones(3))
    y, residuals = forward(torch.ones(3))
    for wrong in (residuals[1:], (*residuals, y), tuple(r.double() for r in residuals), (None,)):
        with pytest.raises(ArgumentError, match="backward: the residuals are"):
            backward(wrong, y)
