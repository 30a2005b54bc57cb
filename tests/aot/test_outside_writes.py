"""A tensor from outside that is written to answers as in eager, inside of what is compiled and
afterwards."""

import pytest
import torch

from aotfunc import aot_function, jit, vjp
from aotfunc.errors import CaptureError


def answers(t):
    return t.requires_grad, t.is_leaf, t.grad_fn is None


def times(w, p, see):
    w.mul_(p)
    see(w)
    return w * 2 if w.requires_grad else w * 3


def what_was_computed_before(w, p, see):
    y = w * 2
    w.mul_(p)
    see(y)
    see(w)
    w.add_(p)
    w.mul_(2)
    return y + w


def through_a_view(w, p, see):
    v = w[1:]
    v.mul_(p[1:])
    see(w)
    see(v)
    v.mul_(p[:2])
    return w * v.sum()


def without_gradients(w, p, see):
    with torch.no_grad():
        w.mul_(p)
    see(w)
    return w * p


def of_constants(w, p, see):
    w.mul_(p.detach())
    see(w)
    return w * p


def overwritten(w, p, see):
    w.copy_(p)
    w.zero_()
    see(w)
    see(w.detach())
    return w * p


def again_and_again(w, p, see):
    for _ in range(3):
        w.mul_(p)
        see(w)
    w.add_(w)
    return w * p


inner = jit(lambda w, p: w.mul_(p))


def by_a_nested_call(w, p, see):
    inner(w, p)
    see(w)
    return w * 2


def differentiated(w, p, see):
    w.mul_(p)
    see(w)
    return torch.autograd.grad((w * w).sum(), p, create_graph=True)[0]


PROGRAMS = (
    times,
    what_was_computed_before,
    through_a_view,
    without_gradients,
    of_constants,
    overwritten,
)
PROGRAMS += (again_and_again, by_a_nested_call, differentiated)

WAYS = {
    "closed over": lambda f, w, p: jit(lambda p: f(w, p))(p),
    "argument": lambda f, w, p: jit(f)(w, p),
    "argument and closed over": lambda f, w, p: jit(lambda p, v: f(w, p))(p, w),
    "aot_function": lambda f, w, p: aot_function(
        lambda p: f(w, p), lambda g, _: g, lambda g, _: g
    )(p),
    "jit in jit": lambda f, w, p: jit(lambda p: jit(lambda q: f(w, q))(p))(p),
    "vjp in jit": lambda f, w, p: jit(lambda w, p: vjp(lambda p: f(w, p), p)[0])(w, p),
    "vjp in jit, closed over": lambda f, w, p: jit(lambda p: vjp(lambda p: f(w, p), p)[0])(p),
    "vjp": lambda f, w, p: vjp(lambda p: f(w, p), p)[0],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("f", PROGRAMS, ids=lambda f: f.__name__)
def test_it_requires_grad_from_the_write_on(f, way):
    def outcome(run):
        w, p = torch.ones(3), torch.arange(3.0, requires_grad=True) + 1
        seen = []
        out = run(lambda w, p: f(w, p, lambda t: seen.append(answers(t))), w, p)
        return seen, out.tolist(), out.requires_grad, w.tolist(), way == "vjp" or answers(w)

    assert outcome(WAYS[way]) == outcome(lambda f, w, p: f(w, p))


def test_a_capture_that_fails_leaves_no_trace():
    w, p = torch.ones(3), torch.ones(3, requires_grad=True)
    saved = (w * p).sum()

    def f(p):
        w.mul_(p)
        return w if w.sum() > 0 else p

    with pytest.raises(CaptureError):
        jit(f)(p)
    assert answers(w) == (False, True, True) and w._version == 0 and w.tolist() == [1.0] * 3
    saved.backward()  # w is as it was saved


@pytest.mark.parametrize(
    "reshape", [lambda x: x.squeeze_(), lambda x: x.t_(), lambda x: x.unsqueeze_(0)]
)
def test_a_view_from_outside_is_reshaped_in_place_and_written_with_what_requires_grad(reshape):
    w = torch.arange(3.0, requires_grad=True)

    def f(x, z):
        reshape(x)
        x.copy_(w)

    outcomes = []
    for way in (f, jit(f)):
        x = torch.zeros(2, 3)[0]
        z = x.view(-1)
        way(x, z)
        outcomes.append((x.tolist(), x.requires_grad, z.requires_grad))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(
    "write",
    [
        lambda c, w: c.copy_(c.detach()),
        lambda c, w: [c.add_(1) for _ in range(3)],
        lambda c, w: (c[1:].mul_(2), c.detach().zero_()),
        lambda c, w: (c[:1].copy_(w[:1].detach()), torch.sin(w.detach(), out=c)),
        lambda c, w: (c.detach().zero_(), c.add_(1)),
        lambda c, w: jit(lambda c: c.mul_(2))(c),
    ],
)
def test_a_recorded_write_counts_when_it_is_run(write):
    """What autograd has saved of a tensor is good until then, and is not any more after it."""
    w = torch.ones(3, requires_grad=True)

    def f(x, asked):
        write(c, w)
        return x.item() if asked else x * 2

    for asked in (True, False):
        c = torch.arange(3.0)
        y, before = (w * c).sum(), c._version
        for _ in range(2):
            if asked:
                with pytest.raises(CaptureError):
                    jit(f)(torch.ones(()), asked)
                assert c._version == before
            else:
                jit(f)(torch.ones(()), asked)
        if asked:
            assert torch.autograd.grad(y, w)[0].tolist() == [0.0, 1.0, 2.0]
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.backward()
