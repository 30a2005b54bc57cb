"""Kernels write new values of a call's inputs into their memory, where no one can tell."""

import pytest
import torch
from torch import nn

from aotfunc import jit
from aotfunc.backends.loops import backend
from tests.reference import assert_same

pytestmark = pytest.mark.usefixtures("cache")


def parameter(n=40):
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(n))


def update(p, x):
    with torch.no_grad():
        p.mul_(0.9).add_(x.sin(), alpha=0.1)


def only_update(p, x):
    update(p, x)


def the_old_value_read_later(p, x):
    old = p.detach() * 1
    update(p, x)
    return old.exp() + p.detach()


def a_copy_of_the_old_value(p, x):
    old = p.detach().clone()
    update(p, x)
    return old


def a_copy_of_the_new_value(p, x):
    update(p, x)
    return p.detach().clone()


def a_view_of_a_copy(p, x):
    update(p, x)
    return p.detach().clone().view(4, -1).t()


def the_input_itself(p, x):
    update(p, x)
    return p


def a_view_of_the_input(p, x):
    update(p, x)
    return p.view(4, -1)


def by_another_order(p, x):
    with torch.no_grad():
        p.copy_(p.flip(0) + x)


def its_sum(p, x):
    with torch.no_grad():
        p.sub_(p.sum() * x)


def two_writes(p, x):
    update(p, x)
    y = p.detach() * x
    update(p, y)
    return y


def by_a_product(p, x):
    with torch.no_grad():
        p.add_((p.view(4, 10).t() @ p.view(4, 10))[:4].reshape(-1) * x)


PROGRAMS = [
    *(only_update, the_old_value_read_later, a_copy_of_the_old_value, a_copy_of_the_new_value),
    *(a_view_of_a_copy, the_input_itself, a_view_of_the_input, by_another_order, its_sum),
    *(two_writes, by_a_product),
]


def run_of(f, make, around=lambda f: f):
    """Return what three calls return, write and share; views of what they return are written."""
    p = make()
    g, found = around(lambda x: f(p, x)), []
    for k in range(3):
        before, memory = p._version, p.data_ptr()
        y = g(torch.linspace(0, 1, 40) + k)
        found += [None if y is None else y.detach().clone(), p.detach().clone()]
        found += [p._version > before, p.data_ptr() == memory]
        if y is not None:
            found.append(y is p)
            with torch.no_grad():
                y.add_(1)
            found.append(p.detach().clone())
    return found


MAKES = {
    "a parameter": parameter,
    "a buffer": lambda: parameter().detach(),
    "a part": lambda: parameter(100).detach()[30:70],
    "every other": lambda: parameter(80).detach()[::2],
}


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("f", PROGRAMS)
def test_updates(f, make):
    if make == "every other" and f in (a_view_of_the_input, by_a_product):
        pytest.skip("no view of it has this shape")
    compiled = run_of(f, MAKES[make], lambda f: jit(f, backend="cpp"))
    assert_same(compiled, run_of(f, MAKES[make]))


def shared(f):
    """Two tensors on one memory: whole and part, the same, and beside each other."""
    whole = parameter(60).detach()
    pairs = [
        (whole, whole[20:]),
        (whole[:40], whole[:40]),
        (whole.detach(), whole[20:].detach()),
        (whole[:30], whole[30:]),
    ]
    for p, q in pairs:

        def g(x, p=p, q=q):
            update(p, torch.cat([x, x])[: len(p)])
            return q * 2, p * 3

        around = f(g)
        for k in range(3):
            yield around(torch.linspace(0, 1, 40) + k)
            yield whole.clone()


def test_tensors_that_share_memory():
    compiled = [*shared(lambda f: jit(f, backend="cpp"))]
    assert_same(compiled, [*shared(lambda f: f)])


def test_a_call_that_fails_leaves_the_input():
    table = torch.randn(5)

    def f(p, x, i):
        y = table[i]
        update(p, x)
        return y

    p = parameter()
    g = jit(lambda x, i: f(p, x, i), backend="cpp")
    x = torch.ones(40)
    g(x, torch.tensor([1, 2]))
    before = p.detach().clone()
    with pytest.raises(IndexError):
        g(x, torch.tensor([1, 7]))
    assert_same(p.detach(), before)


def test_a_backward_from_before_sees_the_write():
    p = parameter()
    g = jit(lambda x: update(p, x), backend="cpp")
    y = (p * p).sum()
    g(torch.ones(40))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
@pytest.mark.parametrize("donates", [True, False])
def test_a_copy_is_saved(donates, monkeypatch):
    """The kernel takes the parameter's memory."""
    if not donates:
        monkeypatch.setattr(backend, "reuse", lambda *_: None)
    p = parameter()
    g = jit(lambda x: update(p, x), backend="cpp")
    g(torch.ones(40))
    with torch.profiler.profile() as profile:
        g(torch.ones(40))
    assert any("copy" in e.name for e in profile.events()) != donates
