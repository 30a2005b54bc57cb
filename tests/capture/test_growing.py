"""What a recording knows of itself grows with it: nothing is worked out, or run, again for each
question."""

import pytest
import torch

from aotfunc import grad, make_fx, vmap
from aotfunc.errors import CaptureError
from aotfunc.trace import autograd, records, replay
from aotfunc.trace.traced import current


def counting(monkeypatch, module, name):
    """A list that grows at each call of a function of the package."""
    calls, function = [], getattr(module, name)
    monkeypatch.setattr(
        module, name, lambda *args, **how: calls.append(1) or function(*args, **how)
    )
    return calls


def looks(n):
    def f(x):
        for _ in range(n):
            x = x * 0.99 + 0.01
            if x.abs().max() > 1e6:
                break
        return x.sum()

    return f


def test_a_loop_that_looks_at_values(monkeypatch):
    run = counting(monkeypatch, replay, "instr_run")
    listed = counting(monkeypatch, replay, "generators")
    assert torch.allclose(grad(looks(50))(torch.ones(3)), torch.tensor(0.99**50))
    assert len(run) == 50 * 5 and not listed  # each op once; nothing draws


def leaves(n):
    """An inner loop whose steps differentiate with respect to a new leaf, and close over a new
    tensor."""

    def f(x):
        total = x
        for k in range(n):
            w = torch.ones(2, requires_grad=True)
            v = (total.detach() + torch.tensor([float(k)])).requires_grad_()
            (g,) = torch.autograd.grad((w * v).prod().sin(), v)
            assert w.requires_grad and v.requires_grad and not g.requires_grad
            total = total * 0.9 + g * x + grad(lambda t, x=x: (t * x).sum())(v)
        return total.sum()

    return f


@pytest.mark.parametrize("batched", [False, True])
def test_a_loop_that_makes_leaves(monkeypatch, batched):
    def work(n):
        calls = []
        for module, name in (
            (autograd.Reach, "step"),
            (autograd, "n_new_values"),
            (records, "n_new_values"),
        ):
            calls.append(counting(monkeypatch, module, name))
        f, x = grad(leaves(n)), torch.rand(2, generator=torch.Generator().manual_seed(0))
        got = vmap(f)(x.expand(2, 2))[1] if batched else f(x)
        slope = torch.autograd.functional.jacobian(reference(n), x)
        torch.testing.assert_close(got, slope)
        monkeypatch.undo()
        return sum(map(len, calls))

    few, many = work(10), work(40)
    assert many < 5 * few


def reference(n):
    def f(x):
        total = x
        for k in range(n):
            v = (total.detach() + float(k)).requires_grad_()
            (g,) = torch.autograd.grad(v.prod().sin(), v)
            total = total * 0.9 + g * x + x
        return total.sum()

    return f


def test_views_and_conjugates(monkeypatch):
    work = counting(monkeypatch, records, "n_new_values")

    def f(x):
        for _ in range(30):
            x = x.conj().view(2, 1).resolve_conj().view(2) * 1j
        assert not current().conjugated(x.ref) and current().root(x.ref) == x.ref
        return x.abs().sum()

    z = torch.tensor([1 + 2j, 0.5 - 1j])
    grad(f)(z)
    assert len(work) < 30 * 12


def test_a_mark_concerns_what_comes():
    def f(x):
        z = torch.zeros(2)
        before, view = z * 2, z[:1]
        assert not z.requires_grad
        z.requires_grad_()
        after = z * 2
        assert (
            z.requires_grad
            and after.requires_grad
            and view.requires_grad
            and not before.requires_grad
        )
        return x.sum()

    def g(x):
        w = torch.ones(2, requires_grad=True)
        y = w * 3
        assert y.requires_grad
        w.requires_grad_(False)
        assert not w.requires_grad and not (w * 2).requires_grad and y.requires_grad
        return x.sum()

    for function in (f, g):
        function(torch.ones(2))  # plain tensors say the same
        grad(function)(torch.ones(2))


def test_the_value_of_a_tensor_from_outside_that_is_overwritten():
    """With a value that is not known while the graph is made: it is not what it was before."""
    c = torch.zeros(2)

    def f(x):
        c.copy_(x)
        return x * c.sum().item()

    assert torch.equal(grad(lambda x: f(x).sum())(torch.ones(2)), torch.full((2,), 2.0))
    assert torch.equal(c, torch.ones(2))
    for _ in range(2):
        with pytest.raises(CaptureError):
            make_fx(lambda x: (x.sum().sin(), f(x), f(x)), tracing_mode="fake")(torch.ones(2))
