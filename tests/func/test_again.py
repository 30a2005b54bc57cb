"""The second and later calls: what a call leaves behind to be found again must not be found where
anything differs."""

import random
import threading
from contextlib import nullcontext

import pytest
import torch
from torch.testing import assert_close

from aotfunc import grad, jvp, vjp, vmap
from aotfunc.cache import clear_caches
from aotfunc.errors import AotfuncError
from tests.inputs import f64

OPS = [
    torch.sin,
    lambda x: x.sin() * x,
    lambda x: x + 0.3,
    lambda x: 2 - x,
    lambda x: x * 1.7,
    lambda x: x.flip(-1),
    lambda x: x.clone().mul_(3),
    lambda x: x / (x * x + 1),
    lambda x: x.detach() * x,
    lambda x: x.t() if x.dim() == 2 else x,
    lambda x: x - x.mean(),
    lambda x: x * x.sum(),
]


def branching(state):
    """A function whose ops depend on ``state`` and on values."""

    def f(x):
        y = x
        for k in state["ops"]:
            y = OPS[k](y)
        if state["looks"] and (y.sum() * 0 == 0):
            y = y * state["number"]
        return y.sum()

    return f


def transforms(f, x, t):
    return (
        grad(f)(x),
        jvp(f, (x,), (t,)),
        vjp(f, x)[1](torch.ones((), dtype=x.dtype)),
        vmap(f)(x),
        vmap(grad(f), in_dims=x.dim() - 1)(x),
    )


@pytest.mark.parametrize("seed", range(3))
def test_what_a_function_does_may_change_at_each_call(seed):
    draw = random.Random(seed)
    state = {}
    f, known = branching(state), []
    for step in range(9):
        if step % 3 == 0 or not known:
            ops = [draw.randrange(len(OPS)) for _ in range(draw.randrange(1, 4))]
            known.append((ops, draw.random() < 0.5, draw.choice([2, 0.5, 1.25, 0.7])))
        state["ops"], state["looks"], state["number"] = draw.choice(known)
        shape = draw.choice([(3,), (4,), (2, 3), (3, 2)])
        x = f64(*shape)
        if draw.random() < 0.3:
            x = torch.stack([x, x])[1]  # begins inside of its storage
        if draw.random() < 0.3 and x.dim() == 2:
            x = x.t()
        t = x.cos()
        found = transforms(f, x, t)
        clear_caches()
        assert_close(found, transforms(f, x, t), rtol=0, atol=0)
        leaf = x.detach().requires_grad_()
        assert_close(found[0], torch.autograd.grad(f(leaf), leaf, allow_unused=True)[0])
        assert_close(found[3], torch.stack([f(row) for row in x]))
        for _ in range(2):
            assert_close(transforms(f, x, t), found, rtol=0, atol=0)


def test_dimensions_that_are_none():
    x, f = torch.ones(3, 3), lambda x: x * 2
    for _ in range(2):
        assert_close(vmap(f, in_dims=1)(x), x * 2)
        assert_close(vmap(f, in_dims=(0,))(x), x * 2)
    for wrong in (True, (True,), 1.0, (1.0,), 2, (-3,), [0], None):
        for _ in range(2):
            with pytest.raises(AotfuncError):
                vmap(f, in_dims=wrong)(x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_arguments_of_another_kind():
    x, f = torch.ones(3, 3), lambda x, y=None: x * 2
    nested = torch.nested.nested_tensor([torch.ones(3), torch.ones(2)])
    for in_dims, args in (
        (0, (x.to_sparse(),)),
        ((0, None), (x, x.to_sparse())),
        (0, (nested,)),
        ((0, None), (x, nested)),
    ):
        vmap(f)(x)
        vmap(f, (0, None))(x, x)
        with pytest.raises(AotfuncError):
            vmap(f, in_dims)(*args)


def test_sizes_and_trees():
    f = lambda x: (x.sin() * 2).sum()
    for shape in ((3, 2), (4, 2), (3, 2), (3, 5), (0, 2), (3, 0), (1, 1), (3, 2)):
        x = f64(*shape)
        assert_close(vmap(f)(x), x.sin().sum(1) * 2)
        assert_close(vmap(lambda d: f(d["x"]))({"x": x}), x.sin().sum(1) * 2)
        assert_close(grad(lambda x: f(x).sum())(x), x.cos() * 2)
    with pytest.raises(AotfuncError, match="sizes"):
        vmap(torch.add)(f64(3, 2), f64(4, 2))


SITUATIONS = {
    "none": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "dtype": lambda: default_dtype(torch.float64),
    "device": lambda: torch.device("cpu"),
}


class default_dtype:
    def __init__(self, dtype):
        self.dtype = dtype

    def __enter__(self):
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_):
        torch.set_default_dtype(self.before)


@pytest.mark.parametrize("first", SITUATIONS)
def test_modes_around_a_call(first):
    w = torch.linspace(-1, 1, 9).reshape(3, 3).requires_grad_()

    def f(x):
        return torch.mm(x[None] * 2, w).sum() + torch.ones(3).sum() * x.mean() + x.sum()

    x = torch.linspace(0, 1, 12).reshape(4, 3)
    for name in (first, "none", first, *SITUATIONS, "none"):
        with SITUATIONS[name]():
            found, rows = vmap(f)(x), torch.stack([f(row) for row in x])
            assert (found.dtype, found.requires_grad) == (rows.dtype, rows.requires_grad)
            assert_close(found, rows)
            slope = (2 * w.sum(1) + 2).detach().to(x.dtype)
            assert_close(grad(f)(x[0]), slope, atol=0.03, rtol=0.03)


def test_modes_inside_a_function():
    state = {}

    def f(x):
        with SITUATIONS[state["mode"]]():
            y = x.sin() * 2
        return (y * x).sum() + x.sum()

    x = torch.linspace(0, 1, 3)
    for name in ("none", "no_grad", "none", "no_grad", "autocast", "none", "autocast"):
        state["mode"] = name
        leaf = x.clone().requires_grad_()
        assert_close(grad(f)(x), torch.autograd.grad(f(leaf), leaf)[0])


def test_tensors_from_outside():
    w = f64(3)
    f = lambda x: (x.sin() * w).sum()
    x = f64(2, 3)
    for step in range(6):
        if step == 2:
            w.mul_(2)
        elif step == 3:
            w = torch.ones(3, dtype=torch.float64)
        elif step == 4:
            w = torch.ones((), dtype=torch.float64, requires_grad=True)
        elif step == 5:
            w = torch.ones(2, 3, dtype=torch.float64)[1]
        assert_close(vmap(f)(x), (x.sin() * w).sum(1))
        assert_close(grad(f)(x[0]), x[0].cos() * w)
        assert vmap(f)(x).requires_grad is w.requires_grad


def test_an_error_in_the_middle():
    fails = [True]

    def f(x):
        y = x.sin()
        if fails[0]:
            raise KeyError("in the middle")
        return (y * 2).sum()

    x = f64(2, 3)
    for fail in (False, True, False, True, False):
        fails[0] = fail
        for run, right in ((vmap(f), x.sin().sum(1) * 2), (grad(lambda x: f(x)), x.cos() * 2)):
            if fail:
                with pytest.raises(KeyError):
                    run(x)
            else:
                assert_close(run(x), right)
    assert torch.is_grad_enabled() and not torch._C._len_torch_dispatch_stack()


def test_values_kept_by_the_function():
    kept = []

    def f(x):
        kept.append(x.sin())
        return kept[-1] * 2

    for k in range(3):
        x = f64(3) + k
        assert_close(vmap(f)(x), x.sin() * 2)
        assert_close(grad(lambda x: f(x).sum())(x), x.cos() * 2)
    assert len({id(t) for t in kept}) == 6


def test_calls_inside_of_calls_and_in_threads():
    def f(x, depth=2):
        inner = grad(lambda y: f(y, depth - 1).sum())(x) if depth else x
        return inner.sin() * 2

    x, wrong = f64(3), []
    right = vmap(f)(x)

    def many():
        for _ in range(20):
            if not torch.equal(vmap(f)(x), right):
                wrong.append(1)

    threads = [threading.Thread(target=many) for _ in range(3)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong
