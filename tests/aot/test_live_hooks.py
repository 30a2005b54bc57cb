"""Autograd itself calls the hooks that a compiled function registers on values inside, and those
of modules: with eager's values, in eager's order, at every call."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.modules import module as every
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from aotfunc import aot_function, aot_module, grad, jit, vmap
from aotfunc.errors import CaptureError
from tests.reference import assert_same

pytestmark = pytest.mark.filterwarnings("ignore:.*ull backward hook is firing")

WAYS = {
    "jit": jit,
    "aot": lambda f: (aot_module if isinstance(f, nn.Module) else aot_function)(f, "eager"),
    "jit in jit": lambda f: (lambda j: jit(lambda *xs: j(*xs)))(jit(f)),
}


def leaf():
    return torch.arange(1.0, 4.0, dtype=torch.float64).requires_grad_()


def kept(log, k=None):
    return lambda g: (log.append(g.clone()), None if k is None else g * k)[1]


def two_values(x, log):
    h = x * 2
    h.register_hook(kept(log, 3))
    h.register_hook(kept(log))
    k = h.sin()
    k.register_hook(kept(log))
    return (k * h).sum()


def used_before(x, log):
    h = x * 2
    y = h.sin()
    h.register_hook(kept(log, 2))
    return (y * h).sum()


def removed(x, log):
    h = x.sin()
    first = h.register_hook(kept(log, 5))
    h.register_hook(kept(log, 2))
    first.remove()
    x.register_hook(kept(log, 7)).remove()
    with h.register_hook(kept(log, 11)):
        pass
    return (h * x).sum()


def returned(x, log):
    h = x.sin()
    h.register_hook(kept(log, 2))
    h.retain_grad()
    return (h * h).sum() + h.sum(), h


def several_outputs(x, log):
    a, b = x.sort(descending=True).values.unbind()[:2]
    a.register_hook(kept(log, 2))
    return a * b + b.exp()


def drawn(x, log):
    h = torch.nn.functional.dropout(x * 2, 0.5)
    h.register_hook(kept(log))
    return torch.nn.functional.dropout(h * h, 0.5).sum()


def written(x, log):
    x = x * 1
    h = x + 1
    h.register_hook(kept(log, 2))
    x.mul_(3)
    return (h.sin() * x).sum()


def without_a_gradient(x, log):
    x.sin().register_hook(kept(log))
    return x.sum()


def not_used_again(x, log):
    h = x * 2
    y = h.sin()
    h.register_hook(kept(log, 2))
    return y.sum()


def used_between(x, log):
    h = x * 2
    h.register_hook(kept(log, 2))
    y = h.sin()
    h.register_hook(kept(log, 3))
    return (y + h * y).sum()


def written_argument(x, log):
    x.mul_(3)
    y = x * 2
    x.register_hook(kept(log, 2))
    return (y * x).sum()


def written_before(x, log):
    h = x * 2
    h.mul_(3)
    h[:2].register_hook(kept(log, 5))
    h.register_hook(kept(log, 2))
    return (h * x).sum()


def hooked_then_written(x, log):
    h = x * 2
    h.register_hook(kept(log, 2))
    h[0].mul_(3)
    return (h * x).sum()


def written_between_hooks(x, log):
    x.register_hook(kept(log, 3))
    x.mul_(2)
    x.register_hook(kept(log, 5))
    h = x * 2
    h.register_hook(kept(log, 3))
    h.mul_(x)
    h.register_hook(lambda g: g * x)
    h[0].mul_(2)
    h.register_hook(kept(log, 7))
    return (h * x).sum()


def two_kinds_on_one_value(x, log):
    h = x.sin()
    h.register_hook(lambda g: g * 2)
    h.register_hook(lambda g: g * h.detach())
    h.register_hook(lambda g: g * 3)
    return h.cos().sum()


def recorded_too(x, log):
    h = x.sin()
    h.register_hook(lambda g: g * h.detach())
    k = h * x
    k.register_hook(kept(log, 3))
    return k.sin().sum()


def in_a_gradient_inside(x, log):
    h = x**3
    h.register_hook(lambda g: g * 3)
    (g,) = torch.autograd.grad((h * h).sum(), x, create_graph=True)
    k = g.cos()
    k.register_hook(kept(log, 2))
    return k.sum()


def saved_results(x, log):
    h = x.exp()
    h.register_hook(kept(log, 3))
    k = h.softmax(0)
    k.register_hook(kept(log, 2))
    n = torch.nn.functional.dropout((k * h).tanh(), 0.5)
    n.register_hook(kept(log))
    return (n * k + h.norm().sqrt()).sin().sum()


def saved_with_others(x, log):
    q, r = torch.linalg.qr(x.outer(x) + torch.diag(x))
    q.register_hook(kept(log, 3))
    r.register_hook(kept(log, 2))
    h = (q @ r).sigmoid_()
    h.register_hook(kept(log, 2))
    return (h * r).sum().sin()


PROGRAMS = (
    *(two_values, used_before, removed, returned, several_outputs, drawn, written),
    *(without_a_gradient, recorded_too, in_a_gradient_inside, not_used_again, used_between),
    *(written_argument, written_before, hooked_then_written, two_kinds_on_one_value),
    *(saved_results, saved_with_others, written_between_hooks),
)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_values_inside(program, way, order):
    def run(wrap):
        torch.manual_seed(0)
        log, found = [], []
        f = wrap(lambda x: program(x, log))
        for k in range(1, 4):
            x = leaf()
            out = f(x * k)
            y = out[0] if isinstance(out, tuple) else out
            if order == 1:
                y.backward()
                found += [x.grad, out[1].grad if isinstance(out, tuple) else None]
            else:
                (g,) = torch.autograd.grad(y, x, create_graph=True)
                found.append(g)
                if g.requires_grad:
                    found += torch.autograd.grad(g.sum(), x)
        return found, log

    assert_same(run(WAYS[way]), run(lambda f: f))


class Cam(nn.Module):
    """Keeps what a hook sees, as GradCAM does."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.norm = nn.Linear(3, 4), nn.Linear(4, 2), nn.BatchNorm1d(4)
        self.double()
        self.calls, self.scale, self.seen, self.log = 0, 2.0, None, []

    def save(self, g):
        self.seen, self.calls = g, self.calls + 1
        self.log.append(g.sum())
        return g * self.scale

    def forward(self, x):
        self.h = torch.relu(self.first(x))
        self.h.register_hook(self.save)
        self.h.retain_grad()
        return self.last(self.norm(self.h))


@pytest.mark.parametrize("way", WAYS)
def test_a_module_that_keeps_gradients(way):
    """What a hook reads is what is there when autograd calls it; containers may be others by then,
    or at the next call."""

    def run(wrap):
        torch.manual_seed(0)
        m, found = Cam(), []
        f = wrap(m)
        for k in range(4):
            x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
            y = f(x).sum()
            m.scale = m.scale + 1
            y.backward()
            found += [m.seen, m.calls, m.h.grad, m.h.detach(), x.grad, list(m.log)]
            if k == 1:
                m.log = []
        return found, [p.grad for p in m.parameters()], list(m.buffers())

    assert_same(run(WAYS[way]), run(lambda m: m))


def with_module_hooks():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).double()
    log, acts = [], []
    m[0].register_forward_hook(lambda m, xs, out: acts.append(out.detach()))
    m[0].register_full_backward_hook(lambda *xs: log.append(xs[1:]))
    m[2].register_full_backward_pre_hook(lambda m, go: (log.append(go), (go[0] * 2,))[1])
    m[2].register_full_backward_hook(
        lambda m, gi, go: (log.append((m.weight.grad is None, gi, go)), (gi[0] * 3,))[1]
    )
    m.register_full_backward_hook(lambda *xs: log.append(xs[1:]))
    return m, log, acts


@pytest.mark.parametrize("way", WAYS)
def test_hooks_of_modules(way):
    def run(wrap):
        m, log, acts = with_module_hooks()
        m[1].inplace = False
        f, found = wrap(m), []
        for k in range(3):
            x = leaf()
            y = f(x * (k + 1))
            found.append(y._base is None)
            y.sum().backward()
            f(torch.ones(3, dtype=torch.float64)).sum().backward()
            found.append(x.grad)
        m[2]._backward_hooks.clear()
        f(leaf()).sum().backward()
        return found, log, [p.grad for p in m.parameters()]

    assert_same(run(WAYS[way]), run(lambda m: m))


class Reads(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f, self.weight = f, nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x, k=1, y=None):
        return self.f(self, x) * k


SOME_READ = {
    "nothing": lambda m, x: m.weight * 2,
    "its input": lambda m, x: x.sin(),
    "both, and views": lambda m, x: (x * m.weight)[:2],
    "the input itself": lambda m, x: x,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SOME_READ)
def test_what_a_module_reads(name, way):
    def run(wrap):
        m, log = Reads(SOME_READ[name]), []
        m.register_full_backward_pre_hook(lambda m, go: log.append(go))
        m.register_full_backward_hook(lambda m, gi, go: log.append((gi, go)))
        f, found = wrap(lambda x, y: m(x, 2, y=y).sum() + y.sum()), []
        for _ in range(2):
            x, y = leaf(), leaf()
            f(x * 1, y).backward()
            found += [x.grad, y.grad]
        return found, m.weight.grad, log

    assert_same(run(WAYS[way]), run(lambda f: f))


@pytest.mark.parametrize("way", [jit, lambda m: aot_module(m, "eager")], ids=["jit", "aot"])
def test_hooks_of_all_modules(way):
    """A compiled module is one module, with its own hooks and the original's."""

    def run(wrap, own):
        torch.manual_seed(0)
        m, log = nn.Sequential(nn.Linear(3, 3)).double(), []
        f = wrap(m)
        handles = [
            every.register_module_forward_pre_hook(lambda m, xs: (xs[0] + 1,)),
            every.register_module_forward_hook(lambda m, xs, y: y * 2),
            every.register_module_full_backward_pre_hook(lambda m, go: log.append(go)),
            every.register_module_full_backward_hook(lambda m, gi, go: (gi[0] * 3,)),
        ]
        if own:
            m.register_full_backward_hook(lambda m, gi, go: log.append("of the module"))
            g = f if isinstance(f, nn.Module) else m
            g.register_forward_hook(lambda m, xs, y: y + 1)
        try:
            found = []
            for _ in range(2):
                x = leaf()
                f(x).sum().backward()
                found.append(x.grad)
        finally:
            for h in handles:
                h.remove()
        return found, log, f(leaf())

    for own in (False, True):
        assert_same(run(way, own), run(lambda m: m, own))


def test_transforms_record_the_hooks_of_what_they_call():
    log = []

    def f(x):
        x.register_hook(lambda g: g * 5)
        h = x**2
        h.register_hook(lambda g: g * 3)
        return (h**2).sum()

    x = torch.arange(3.0)
    want = torch.func.grad(f)(x)
    for g in (grad(jit(f)), jit(grad(jit(f))), jit(grad(f)), torch.func.grad(jit(f))):
        assert_same(g(x), want)
    assert_same(vmap(grad(jit(f)))(x.expand(2, 3)), want.expand(2, 3))
    assert not log


def test_a_function_is_not_run_twice_where_it_is_inlined():
    state = {"calls": 0}

    def f(x):
        state["calls"] += 1
        h = x * 2
        h.register_hook(lambda g: g * state["calls"])
        return h.sum()

    j = jit(f)
    x = torch.ones(3, requires_grad=True)
    jit(lambda x: j(x) * 1)(x).backward()
    assert_same(x.grad, torch.full((3,), 2.0))


@pytest.mark.parametrize("way", WAYS)
def test_two_of_one_kind_have_hooks_of_their_own(way):
    def run(wrap):
        found, models = [], [Cam(), Cam()]
        f = wrap(lambda m, x: m(x))
        for m in (*models, *models):
            x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
            f(m, x).sum().backward()
            found.append([n.calls for n in models])
        return found

    assert_same(run(WAYS[way]), run(lambda f: f))


def test_what_a_hook_may_not_hold():
    def made(x):
        log = []
        x.register_hook(log.append)
        return x * 2

    def computed(x):
        y = x * 2
        x.register_hook(lambda g: g * y)
        return y

    def written(x):
        h = x * 2
        h.register_hook(print)
        h.detach().mul_(2)
        h.register_hook(print)  # in eager those of one node of autograd
        return h * x

    cases = (made, "holds a list"), (computed, "reads what is computed inside")
    for f, why in (*cases, (written, "shares memory, and one is written")):
        x = leaf()
        with pytest.raises(CaptureError, match=why):
            jit(f)(x)
        assert not x._backward_hooks


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["a list", "a dictionary", "a list in one"])
def test_a_recorded_hook_may_not_change_an_argument(kind, way):
    """It runs once, at the capture: a call would not see the change."""
    given = {"a list": [], "a dictionary": {}, "a list in one": {"log": []}}[kind]
    change = {
        "a list": lambda g, log: log.append(g),
        "a dictionary": lambda g, log: log.update(g=g),
        "a list in one": lambda g, log: log["log"].append(g),
    }[kind]

    def f(x, log):
        h = x.exp()
        d = h.detach()
        h.register_hook(lambda g: (change(g, log), g * d)[1])
        return h.sin()

    before, x = repr(given), leaf()
    with pytest.raises(CaptureError, match="changes the list or dictionary that is its argument"):
        WAYS[way](f)(x, given)
    assert repr(given) == before
    assert not x._backward_hooks


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_hooks_in_a_checkpoint(way, order):
    def run(wrap):
        log, found = [], []

        def body(x):
            h = x.exp()
            h.register_hook(lambda g: (log.append(g.clone()), g * 2)[1])
            return h * x

        f = wrap(lambda x: checkpoint(body, x * 2, use_reentrant=False))
        for k in (1, 2):
            x = leaf()
            (g,) = torch.autograd.grad(f(x * k).sin().sum(), x, create_graph=order == 2)
            found += [g, *(torch.autograd.grad(g.sum(), x) if order == 2 else ())]
        return found, log

    assert_same(run(WAYS[way]), run(lambda f: f))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("given", ["the argument", "a value", "a value of the outer one"])
def test_a_checkpoint_may_not_register_hooks_on_what_it_is_given(given, reentrant):
    """Eager registers them again in the backward, where they act a second time."""

    def body(x):
        x.register_hook(lambda g: g * 3)
        return x.sin()

    again = lambda f: lambda x: checkpoint(f, x, use_reentrant=reentrant)
    f = {
        "the argument": again(body),
        "a value": lambda x: again(body)(x * 2),
        "a value of the outer one": again(lambda x: again(body)(x * 2)),
    }[given]
    with pytest.raises(CaptureError, match="would do so again in the backward"):
        jit(f)(leaf())


def test_nothing_is_kept_alive():
    gc.collect()
    gc.disable()
    try:
        m = Cam()
        f = jit(m)
        x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
        y = f(x)
        y.sum().backward()
        h = weakref.ref(m.h)
        m.h = m.seen = None
        del y
        assert h() is None
    finally:
        gc.enable()
    m = weakref.ref(m)
    del f
    gc.collect()
    assert m() is None


@pytest.mark.parametrize("way", ["jit", "aot"])
def test_handles_are_those_of_pytorch(way):
    """As in eager mode, but for one that outlives the call: removing it, or a copy, is refused."""
    kinds = []

    def f(x):
        y = x * x
        handles = [t.register_hook(lambda g: g * 2) for t in (x, y, y)]
        kinds.extend(isinstance(h, RemovableHandle) for h in handles)
        handles[1].remove()
        handles[1].remove()
        with x.register_hook(lambda g: g * 3) as h:
            kinds.append(isinstance(h, RemovableHandle))
        return y.sum(), handles[2]

    found = []
    for g in (f, WAYS[way](f)):
        x = leaf()
        y, handle = g(x)
        y.backward()
        found.append(x.grad)
    assert_same(found[1], found[0])
    assert all(kinds) and isinstance(handle, RemovableHandle)
    with pytest.raises(CaptureError, match="cannot be removed"):
        handle.remove()
