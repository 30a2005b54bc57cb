"""The node of a call like the last one: made without Python's detours, it is autograd's as any."""

import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from aotfunc import jit
from aotfunc.errors import AotfuncError
from aotfunc.runtime import repeated_node
from aotfunc.runtime.native_node import nodes

pytestmark = pytest.mark.limit(300)  # a compiler may run


def f(x, w):
    return torch.tanh(x * w).sum(-1) * x[:, 0]


def several(x, w):
    return torch.tanh(x * w), (x * w.exp()).sum()


def inputs():
    torch.manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    return x, torch.randn(4, dtype=torch.float64, requires_grad=True)


@pytest.fixture(autouse=True, params=["python", "native"])
def made_directly(request, monkeypatch):
    """Every call of these tests is one that is made again, by nodes of Python's and of C++."""
    if request.param == "native":
        library = request.getfixturevalue("node_library")
        monkeypatch.setattr(nodes(), "library", library)
    made, same_node = [], repeated_node.same_node

    def noted(*args):
        made.append(same_node(*args) is not None)
        return same_node(*args)

    monkeypatch.setattr("aotfunc.runtime.entry.same_node", noted)
    yield
    assert made and all(made)


def warm(f):
    compiled = jit(f, backend="cpp")
    for _ in range(3):
        compiled(*inputs())
    return compiled


def both(f, use):
    """Check ``use(f, *inputs)`` against eager."""
    expected, got = use(f, *inputs()), use(warm(f), *inputs())
    torch.testing.assert_close(got, expected)


def grad(outs, args, given=None, **kwargs):
    outs = [outs] if isinstance(outs, torch.Tensor) else outs
    given = [torch.full_like(o, 0.5) for o in outs] if given is None else given
    return torch.autograd.grad(outs, args, given, **kwargs)


def second_order(f, *args):
    first = grad(f(*args), args, create_graph=True)
    return first, grad(first, args)


def retained(f, *args):
    outs = f(*args)
    return grad(outs, args, retain_graph=True), grad(outs, args)


def expanded(f, *args):
    outs = f(*args)
    return grad(outs, args, [outs.new_full((), 2.0).expand(3)])


def strided(f, *args):
    return grad(f(*args), args, [torch.arange(6.0, dtype=torch.float64)[::2]])


def negated(f, *args):
    c = torch.complex(torch.ones(3), torch.arange(3.0)).to(torch.complex128)
    return grad(f(*args), args, [c.conj().imag])


def batched(f, *args):
    rows = torch.eye(3, dtype=torch.float64)
    return grad(f(*args), args, [rows], is_grads_batched=True)


def in_modes(f, *args):
    outs = f(*args)
    with torch.autocast("cpu"), torch.device("meta"):
        return grad(outs, args, [torch.ones(3, dtype=torch.float64, device="cpu")])


def with_another_default(f, *args):
    outs, before = f(*args), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return grad(outs, args)
    finally:
        torch.set_default_dtype(before)


def accumulated(f, *args):
    for _ in range(2):
        f(*args).sum().backward()
    return [x.grad for x in args]


def with_hooks(f, x, w):
    y = f(x, w)
    y.register_hook(lambda g: 2 * g)
    x.register_hook(lambda g: 3 * g)
    y.grad_fn.register_hook(lambda gi, go: tuple(4 * g for g in gi))
    return grad(y, (x, w))


def offloaded(f, *args):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(), torch.from_numpy):
        outs = f(*args)
    return grad(outs, args)


def detecting_anomalies(f, *args):
    with torch.autograd.set_detect_anomaly(True):
        return grad(f(*args), args)


USES = (
    *(second_order, retained, expanded, strided, negated, batched, in_modes),
    *(with_another_default, accumulated, with_hooks, offloaded),
    detecting_anomalies,
)


@pytest.mark.parametrize("use", USES)
def test_as_eager(use):
    both(f, use)


def one_of_several(f, *args):
    a, b = f(*args)
    return grad(b, args, retain_graph=True), grad(a, args, retain_graph=True), grad((a, b), args)


def batched_first(f, *args):
    rows = torch.eye(12, dtype=torch.float64).view(12, 3, 4)
    return grad(f(*args)[0], args, [rows], is_grads_batched=True)


def some_after_others(f, *args):
    """A backward of some results, with a graph, then of all."""
    a, b = f(*args)
    first = grad(a, args, create_graph=True)
    return first, grad([b, sum(g.sum() for g in first)], args, [None, None])


def hooks_of_results(f, x, w):
    a, b = f(x, w)
    seen = []
    a.register_hook(lambda g: seen.append(g) or 2 * g)
    b.register_hook(lambda g: seen.append(g) or 3 * g)
    first = grad((a, b), (x, w), create_graph=True)
    second = grad(first, (x, w), retain_graph=True)
    return first, second, grad(b, (x, w)), seen


def offloaded_twice(f, *args):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        first = grad(f(*args), args, create_graph=True)
        return grad(first, args)


def result_changed(f, *args):
    a, b = f(*args)
    return grad((a, b.mul_(2)), args)


SEVERAL = (
    *(one_of_several, second_order, retained, batched_first, some_after_others),
    *(hooks_of_results, offloaded_twice, result_changed, detecting_anomalies),
)


@pytest.mark.parametrize("use", SEVERAL)
def test_several_results(use):
    both(several, use)


def test_a_second_time():
    x, w = inputs()
    y = warm(f)(x, w).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="a second time"):
        y.backward()


def test_written_to_in_between():
    compiled, (x, w) = warm(f), inputs()
    y = compiled(x, w).sum()
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    y = compiled(x, w).sum()
    w.data = w.data.clone()
    with pytest.raises(AotfuncError, match=r"`\.data = ` gave a tensor of shape \[4\]"):
        y.backward()
    result = warm(lambda x, w: (x * w).softmax(-1))(x, w)
    result.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_parameters_and_threads():
    net = nn.Linear(4, 2).double()
    compiled = warm(lambda x, w: net(x).tanh().sum() + w.sum())
    (x, w), found = inputs(), []
    expected = torch.autograd.grad(net(x).tanh().sum() + w.sum(), (x, *net.parameters()))

    def run():
        for _ in range(50):
            found.append(torch.autograd.grad(compiled(x, w), (x, *net.parameters())))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 150
    for got in found:
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("create_graph", [False, True])
def test_threads_that_differentiate_one_graph(create_graph):
    """One of them frees it; the others get the gradient, or autograd's error."""
    f = jit(lambda a: (a.sin() * a, a.exp()))
    (x, _), found = inputs(), []
    for _ in range(3):
        sum(y.sum() for y in f(x)).backward()
    expected = (x.sin() + x * x.cos() + x.exp()).detach()

    def work(loss):
        try:
            found.append(torch.autograd.grad(loss, x, create_graph=create_graph)[0])
        except RuntimeError as e:
            assert "a second time" in str(e)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for k in range(50):
            loss = sum(y.sum() for y in f(x))
            with ThreadPoolExecutor(4) as pool:
                [*pool.map(work, [loss] * 4)]
            assert len(found) > k
    finally:
        sys.setswitchinterval(interval)
    for g in found:
        assert torch.allclose(g, expected)


def test_what_a_node_shows():
    x, w = inputs()
    y = warm(f)(x, w)
    node = y.grad_fn
    assert isinstance(node, torch.autograd.graph.Node)
    assert node.name() == "CompiledFunctionBackward"
    assert [n.variable is t for (n, _), t in zip(node.next_functions, (x, w), strict=True)]
    for o in warm(several)(x, w):
        [(node, _)] = o.grad_fn.next_functions
        assert node.name() == "CompiledFunctionBackward"


def test_errors_in_hooks():
    def refused(t):
        raise KeyError("refused")

    compiled, args = warm(f), inputs()
    hooks = torch.autograd.graph.saved_tensors_hooks
    with pytest.raises(KeyError, match="refused"), hooks(refused, lambda t: t):
        compiled(*args)
    with hooks(lambda t: t, refused):
        y = compiled(*args).sum()
    with pytest.raises(KeyError, match="refused"):
        y.backward()
    both(f, retained)


@pytest.mark.parametrize("use", [lambda y: None, lambda y: y.backward(retain_graph=True)])
def test_inputs_are_freed(use):
    (x, w), compiled = inputs(), warm(f)
    y, freed = compiled(x, w).sum(), weakref.ref(x)
    (g,) = torch.autograd.grad(y, x, create_graph=True)
    use(g.sum())
    del x, w, y, g
    assert freed() is None
