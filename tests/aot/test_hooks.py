"""Hooks on modules and tensors act in compiled and transformed functions as they do in eager."""

import copy

import pytest
import torch
from torch import nn

import aotfunc
from aotfunc import aot_function, aot_module, grad, grad_and_value, jit, vjp, vmap
from aotfunc.errors import CaptureError
from tests.inputs import f64
from tests.reference import assert_same


class Several(nn.Module):
    """Several arguments and results, also such as are no tensors or have no derivative."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x, scale, c):
        y = self.linear(x)
        return y * scale, (x * c).sum(), y.argmax(), scale


class Net(nn.Module):
    def __init__(self, used=(0, 1)):
        super().__init__()
        self.first, self.several, self.last, self.used = (
            nn.Linear(3, 3),
            Several(),
            nn.Linear(3, 1),
            used,
        )

    def forward(self, x):
        outs = self.several(torch.tanh(self.first(x)), 2.0, torch.ones(3, dtype=x.dtype))
        y = outs[0] if 0 in self.used else x
        return self.last(y).sum() + (outs[1].sin() if 1 in self.used else 0)


def scaled(k):
    return lambda module, gi, go: tuple(None if g is None else g * k for g in gi)


def by_outputs(module, gi, go):
    """Reads the gradients of the outputs that are there."""
    return tuple(
        None if g is None else g * (2 + sum(o.sum() for o in go if o is not None)) for g in gi
    )


def with_parameter(module, gi, go):
    return (gi[0] * next(module.parameters()).sum(),)


def pre(module, go):
    return tuple(None if g is None else g * 3 for g in go)


def pre_nothing(module, go):
    return None


HOOKS = {
    "full": lambda m: m.last.register_full_backward_hook(scaled(3)),
    "full, of the first": lambda m: m.first.register_full_backward_hook(lambda *_: None),
    "pre": lambda m: m.last.register_full_backward_pre_hook(pre),
    "pre, of the first": lambda m: m.first.register_full_backward_pre_hook(pre),
    "both": lambda m: (
        m.last.register_full_backward_pre_hook(pre),
        m.last.register_full_backward_hook(by_outputs),
        m.last.register_full_backward_hook(scaled(-2)),
    ),
    "several": lambda m: m.several.register_full_backward_hook(by_outputs),
    "several, pre": lambda m: (
        m.several.register_full_backward_pre_hook(pre_nothing),
        m.several.register_full_backward_pre_hook(pre),
        m.several.register_full_backward_hook(by_outputs),
    ),
    "with a parameter": lambda m: m.last.register_full_backward_hook(with_parameter),
    "on the whole": lambda m: m.register_full_backward_hook(scaled(5)),
    "a forward hook too": lambda m: (
        m.first.register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
        m.first.register_forward_hook(lambda m, args, out: out.sin()),
        m.first.register_full_backward_hook(scaled(3)),
    ),
    "a removed one": lambda m: m.last.register_full_backward_hook(scaled(3)).remove(),
}
WAYS = {
    "jit": jit,
    "aot_module": lambda m: aot_module(m, "eager"),
    "jit in jit": lambda m: (lambda j: jit(lambda x: j(x)))(jit(m)),
    "vmap": lambda m: lambda x: vmap(m)(x.unsqueeze(0)).squeeze(0),
}


def outcome(f, m, x, order=1):
    m.zero_grad()
    x = x.clone().requires_grad_()
    y = f(x)
    if order == 1:
        y.backward()
        return y.detach(), x.grad, [p.grad for p in m.parameters()]
    (g,) = torch.autograd.grad(y, x, create_graph=True)
    return (
        y.detach(),
        g.detach(),
        torch.autograd.grad(g.square().sum(), [x, m.first.weight], allow_unused=True),
    )


@pytest.mark.filterwarnings("ignore:.*ull backward hook is (firing|called)")
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", HOOKS)
def test_backward_hooks_of_modules(name, way, used, order):
    torch.manual_seed(0)
    m, x = Net(used).double(), torch.randn(2, 3, dtype=torch.float64)
    HOOKS[name](m)
    want = outcome(m, m, x, order)
    f = WAYS[way](m)
    for _ in range(2):
        assert_same(outcome(f, m, x, order), want)


@pytest.mark.filterwarnings("ignore:.*ull backward hook is (firing|called)")
@pytest.mark.parametrize("name", HOOKS)
def test_under_transforms(name):
    torch.manual_seed(0)
    m, xs = Net().double(), torch.randn(4, 2, 3, dtype=torch.float64)
    HOOKS[name](m)
    want = torch.stack([outcome(m, m, x)[1] for x in xs])
    assert_same(vmap(grad(m))(xs), want)
    assert_same(jit(vmap(grad_and_value(m)))(xs)[0], want)
    assert_same(vjp(jit(m), xs[0])[1](torch.tensor(1.0, dtype=torch.float64))[0], want[0])


@pytest.mark.filterwarnings("ignore:.*ull backward hook is firing")
def test_weights_alone_require_grad():
    """The hook is called with the outputs' gradients alone."""
    torch.manual_seed(0)
    m, x, seen = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), torch.randn(2, 3), []
    m[1].register_full_backward_pre_hook(lambda m, go: (go[0] * 2,))
    m[0].register_full_backward_hook(lambda m, gi, go: seen.append((gi, [g.shape for g in go])))
    m(x).sum().backward()
    want, m[0].weight.grad = m[0].weight.grad, None
    with pytest.warns(UserWarning, match="[Ff]ull backward hook"):
        jit(m)(x).sum().backward()
    assert_same(m[0].weight.grad, want)
    assert seen[0] == seen[-1]


def test_a_hook_that_returns_the_wrong_number():
    m, x = nn.Linear(3, 3), torch.ones(2, 3, requires_grad=True)
    m.register_full_backward_hook(lambda m, gi, go: (gi[0], gi[0]))
    with pytest.raises(RuntimeError, match="invalid number of grad_input, got 2, but expected 1"):
        jit(m)(x).sum().backward()


def test_a_gradient_that_a_hook_keeps_under_a_transform_is_no_number():
    m, x, kept = nn.Linear(3, 3), torch.ones(2, 3), []
    m.register_full_backward_hook(lambda m, gi, go: kept.append(go[0]))
    grad(lambda x: m(x).sum())(x)
    with pytest.raises(CaptureError, match=r"a hook inside .* register it outside"):
        kept[0].tolist()


# ----- tensors -----------------------------------------------------------------------------------


def hooked_inside(x):
    h = x * 2
    h.register_hook(lambda g: g * 3)
    return (h * h).sum()


def hooked_twice(x):
    h = x.sin()
    h.register_hook(lambda g: g * g)
    h.register_hook(lambda g: None)
    k = h * 2
    k.register_hook(lambda g: g + h.detach())
    return (k * h).sum()


@pytest.mark.parametrize("way", ["jit", "jit in jit", "vmap"])
@pytest.mark.parametrize("f", [hooked_inside, hooked_twice])
def test_hooks_of_tensors(f, way):
    x = torch.randn(3, dtype=torch.float64)
    assert_same(outcome(WAYS[way](f), nn.Module(), x), outcome(f, nn.Module(), x))


def not_linear(x):
    h = x.tanh()
    h.register_hook(lambda g: g * g)
    k = h.exp()
    k.register_hook(lambda g: g * h)
    return (k * k).sum()


NESTED = {
    "grad of grad": lambda t, f: t.grad(lambda x: t.grad(f)(x).sum()),
    "jacrev of jacrev": lambda t, f: t.jacrev(t.jacrev(f)),
    "hessian": lambda t, f: t.hessian(f),
    "jvp of grad": lambda t, f: lambda x: t.jvp(t.grad(f), (x,), (x.cos(),)),
    "vjp of vjp": lambda t, f: (
        lambda x: t.vjp(lambda x: t.vjp(f, x)[1](torch.ones_like(x[0]))[0], x)[1](x.sin())
    ),
    "backward of grad": lambda t, f: (
        lambda x: torch.autograd.grad(t.grad(f)(y := x.clone().requires_grad_()).sum(), y)
    ),
}


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize("f", [hooked_inside, hooked_twice, not_linear])
def test_hooks_inside_of_a_transform_are_those_of_the_innermost(f, name):
    x = torch.linspace(0.3, 1.2, 3, dtype=torch.float64)
    want = NESTED[name](torch.func, f)(x)
    assert_same(NESTED[name](aotfunc, f)(x), want)
    if name != "backward of grad":
        assert_same(jit(NESTED[name](aotfunc, f))(x), want)


def test_hooks_outside_of_parameters_and_arguments():
    """Autograd's own: on leaves, on arguments and results, after accumulation; removed ones do not
    act."""

    def run(wrap):
        torch.manual_seed(0)
        m, log = nn.Linear(3, 3).double(), []
        leaf = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
        f = wrap(m)
        m.weight.register_hook(lambda g: g * 2)
        m.bias.register_post_accumulate_grad_hook(lambda p: log.append(p.grad.clone()))
        removed = m.weight.register_hook(lambda g: g * 100)
        for _ in range(2):
            x = leaf * 2
            x.register_hook(lambda g: g * 5)
            y = f(x)
            y.register_hook(lambda g: g * 7)
            y.sum().backward()
            removed.remove()
        return leaf.grad, m.weight.grad, m.bias.grad, log

    assert_same(run(jit), run(lambda m: m))
    assert_same(run(lambda m: aot_function(m, "eager")), run(lambda m: m))


REFUSED = {
    "a node's hook": (
        lambda h: h.grad_fn.register_hook(lambda *_: None),
        "hooks may be registered on tensors",
    ),
    "a node's pre-hook": (
        lambda h: h.grad_fn.register_prehook(lambda *_: None),
        "hooks may be registered",
    ),
    "the next nodes": (
        lambda h: h.grad_fn.next_functions,
        "nodes of autograd's graph are not there",
    ),
    "after accumulation": (
        lambda h: h.register_post_accumulate_grad_hook(lambda *_: None),
        "register it outside",
    ),
    "several tensors": (
        lambda h: torch.autograd.graph.register_multi_grad_hook([h, h * 2], lambda *_: None),
        "hooks of several tensors",
    ),
    "removed after a gradient": (
        lambda h: (
            r := h.register_hook(lambda g: g * 2),
            torch.autograd.grad(h.sum(), h),
            r.remove(),
        ),
        "cannot be removed",
    ),
}


def fixed_point_outside(f, z):
    """As :func:`fixed_point_inside`; the step is computed before there is a gradient."""
    start = z.detach().requires_grad_()
    step = f(start)
    z.register_hook(lambda g: g + torch.autograd.grad(step, start, g, retain_graph=True)[0])
    return z


def fixed_point_inside(f, z):
    """The derivative of a fixed point: its cotangent passes through the step again."""

    def hook(g):
        with torch.enable_grad():
            start = z.detach().requires_grad_()
            step = f(start)
        for _ in range(20):
            g = g + torch.autograd.grad(step, start, g / 2, retain_graph=True)[0]
        return g

    z.register_hook(hook)
    return z


def test_a_hook_that_takes_a_gradient():
    m, x = nn.Linear(4, 4), f64(3, 4)
    m = m.double()
    step = lambda z: torch.tanh(m(z) + x)
    solution, results = lambda x: fixed_point_inside(step, step(x)), []
    for f in (solution, jit(solution), aot_function(solution, "eager")):
        m.zero_grad()
        f(x).square().sum().backward()
        results.append([p.grad.clone() for p in m.parameters()])
    assert_same(results[1:], [results[0]] * 2)
    with pytest.raises(CaptureError, match="compute that inside"):
        jit(lambda x: fixed_point_outside(step, step(x)))(x)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, why = REFUSED[name]

    def f(x):
        h = x * 2
        call(h)
        return h

    with pytest.raises(CaptureError, match=why) as e:
        jit(f)(torch.ones(2, requires_grad=True))
    assert "test_hooks.py" in str(e.value)


def test_the_deprecated_backward_hook_is_refused():
    m = nn.Linear(3, 3)
    m.register_backward_hook(lambda m, gi, go: None)
    with pytest.raises(CaptureError, match="register_full_backward_hook"):
        jit(m)(torch.ones(2, 3))


def test_the_plain_module_is_as_before():
    """After captures hooks still run in eager."""
    m, x = nn.Linear(3, 3), torch.ones(2, 3, requires_grad=True)
    m.register_full_backward_hook(scaled(3))
    jit(m)(x)
    twin = copy.deepcopy(m)
    twin._backward_hooks.clear()
    (g,) = torch.autograd.grad(m(x).sum(), x)
    assert_same(g, torch.autograd.grad(twin(x).sum(), x)[0] * 3)


def inner_gradient(w):
    return torch.autograd.grad((w**3).sum(), w)[0].detach()


INNER = {
    "argument": lambda compiler, w: lambda: compiler(inner_gradient)(w),
    "argument twice": lambda compiler, w: lambda: compiler(lambda w, v: inner_gradient(v))(w, w),
    "closed over": lambda compiler, w: (lambda f: lambda: f(torch.ones(3)))(
        compiler(lambda x: inner_gradient(w) * x)
    ),
    "nested": lambda compiler, w: (lambda f: lambda: f(w))(
        compiler(lambda w: jit(inner_gradient)(w) * 1)
    ),
    "nested, closed over": lambda compiler, w: (lambda f: lambda: f(torch.ones(3)))(
        compiler(lambda x: jit(lambda x: inner_gradient(w) * x)(x) * 1)
    ),
    "under vmap": lambda compiler, w: (lambda f: lambda: f(torch.ones(1, 3))[0])(
        compiler(vmap(lambda x: inner_gradient(w) * x))
    ),
}


@pytest.mark.parametrize(
    "before", [True, False], ids=["registered before the capture", "registered later"]
)
@pytest.mark.parametrize(
    "compiler", [jit, lambda f: aot_function(f, lambda gm, _: gm)], ids=["jit", "aot_function"]
)
@pytest.mark.parametrize("name", INNER)
def test_a_gradient_taken_inside_does_not_leave_out_hooks_from_outside(name, compiler, before):
    """autograd.grad calls the hooks of the tensors that it differentiates."""
    w = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    call, want = INNER[name](compiler, w), 3 * torch.tensor([1.0, 4.0, 9.0])
    if not before:
        assert_same(call(), want)
    handle = w.register_hook(lambda g: g * 2)
    assert_same(inner_gradient(w), 2 * want)
    with pytest.raises(CaptureError, match="has hooks"):
        call()
    handle.remove()
    assert_same(call(), want)


def test_a_gradient_taken_inside_of_what_retains_its_gradient():
    """autograd.grad leaves it there."""
    w = torch.ones(3, requires_grad=True) * 2
    f = jit(inner_gradient)
    assert_same(f(w), torch.full((3,), 12.0))
    w.retain_grad()
    with pytest.raises(CaptureError, match="retains its gradient"):
        f(w)
    inner_gradient(w)
    assert_same(w.grad, torch.full((3,), 12.0))
    assert_same(jit(lambda w: inner_gradient(w.view_as(w)))(w), torch.full((3,), 12.0))


SEEN: list = []
OF_ARGUMENTS = {
    "first": lambda x: (x.register_hook(lambda g: g * 5), x * 2)[1],
    "after it was read": lambda x: (x * 2, x.register_hook(lambda g: g * g))[0],
    "and returned": lambda x: (x.register_hook(lambda g: g * 5), x[:1] * 1, x)[1:],
    "twice": lambda x: (x.register_hook(lambda g: g + 1), x.register_hook(SEEN.append), x.sin())[
        2
    ],
    "before a write": lambda x: (x.register_hook(lambda g: g * 5), x.mul_(2), x * 1)[2],
    "of a view": lambda x: (x.view(-1).register_hook(lambda g: g * 5), x * 2)[1],
    "and retained": lambda x: (x.retain_grad(), x.register_hook(lambda g: g * 3), x.exp())[2],
}


@pytest.mark.parametrize("way", ["jit", "jit in jit"])
@pytest.mark.parametrize("name", OF_ARGUMENTS)
def test_hooks_of_arguments(name, way):
    """They see the gradient of the argument's other uses, too."""

    def run(wrap):
        SEEN.clear()
        f, found = wrap(OF_ARGUMENTS[name]), []
        for _ in range(3):
            leaf = torch.linspace(1, 2, 3, dtype=torch.float64).requires_grad_()
            x = leaf * 1
            y = f(x)
            sum(t.sum() for t in (*(y if isinstance(y, tuple) else [y]), x)).backward()
            found.append((y, x, leaf.grad, x.grad if x.retains_grad else None, [*SEEN]))
        return found

    assert_same(run(WAYS[way]), run(lambda f: f))


@pytest.mark.parametrize("way", [jit, lambda f: aot_function(f, "eager")])
@pytest.mark.parametrize("name", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_of_a_tensor_from_outside_is_registered_there(name, way):
    """Eager registers one more at each call."""
    w = torch.ones(3, requires_grad=True)
    tensors = [w, nn.Linear(3, 3).weight, *([w * 2] if name == "register_hook" else [])]
    for t in tensors:
        f = way(lambda x, t=t: (getattr(t, name)(lambda g: None), x * t)[1])
        with pytest.raises(CaptureError, match=rf"{name}\(\) of a tensor from outside"):
            f(torch.ones(3))
        assert not t._backward_hooks and not t._post_accumulate_grad_hooks


def test_a_transform_registers_hooks_at_every_call():
    w, calls = torch.ones(3, requires_grad=True), []
    for _ in range(2):
        grad(lambda x: (w.register_hook(calls.append), (x * w).sum())[1])(torch.ones(3))
    (w * 1).sum().backward()
    assert len(calls) == 2
