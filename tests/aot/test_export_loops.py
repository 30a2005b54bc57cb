"""Loops and branches in files: what is loaded is called, differentiated and batched as before."""

import pytest
import torch

from aotfunc import cond, export, grad, hessian, jacrev, load, scan, vmap, while_loop
from aotfunc.errors import ArgumentError
from aotfunc.runtime.saved_flow import restored_flow
from tests.reference import assert_same

W = torch.tensor([[0.5, -0.2, 0.1], [0.3, 0.8, -0.6], [-0.4, 0.2, 0.9]], dtype=torch.float64)
H = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64)
XS = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)


def looped(h, xs):
    """Every kind of control flow, inside of one another and one behind the other."""

    def step(h, x):
        h = cond(x[0] > 0, lambda h: torch.tanh(W @ h) + x, torch.sin, h)
        h = while_loop(lambda h: h.abs().sum() > 1, lambda h: h * 0.7, h, 9)
        return h, h.sum()

    h, ys = scan(step, h, xs, reverse=True)
    grow = lambda h: h * 1.3 + 0.1 * W @ h
    h = while_loop(lambda h: h.abs().sum() < 5, grow, h, checkpoint="revolve", slots=2)
    return h.sum() + ys.sin().sum()


def test_loops(tmp_path):
    files = iter(range(9))

    def saved(f, *args):
        path = tmp_path / f"{next(files)}.aot"
        export(f, *args).save(path)
        return load(path, backend="eager")

    h = H.clone().requires_grad_()
    found = saved(looped, h, XS)
    assert_same(found(H, XS), looped(H, XS))
    [first] = torch.autograd.grad(found(h, XS), h, create_graph=True)
    assert_same(first, grad(looped)(H, XS))
    second = hessian(looped)(H, XS)
    assert_same(torch.autograd.grad(first.sum(), h)[0], second.sum(0))
    assert_same(hessian(lambda h: saved(found, H, XS)(h, XS))(H), second)
    backward = saved(grad(looped), H, XS)
    assert_same(backward(H, XS), grad(looped)(H, XS))
    assert_same(jacrev(lambda h: backward(h, XS))(H), second)
    batch = torch.stack([H, H * 2])
    assert_same(
        saved(vmap(looped, (0, None)), batch, XS)(batch, XS), vmap(looped, (0, None))(batch, XS)
    )


def test_control_flow_of_a_later_version():
    with pytest.raises(ArgumentError, match="no control flow fold in this version"):
        restored_flow({"flow": "fold", "bodies": [], "facts": {}, "loop": None}, lambda data: data)
