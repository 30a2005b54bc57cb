"""A function mode sees the calls of the user's function and none that a transform makes
itself."""

import functools

import pytest
import torch
from torch.overrides import TorchFunctionMode

import aotfunc as A


class Seen(TorchFunctionMode):
    """Notes what it is asked, and doubles sines."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append(getattr(func, "__name__", str(func)))
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.sin else result


def f(x):
    assert x.shape == (3,)
    return torch.sin(x).sum()


TRANSFORMS = {
    "grad": (A.grad(f), torch.ones(3)),
    "vmap": (A.vmap(f), torch.ones(2, 3)),
    "vmap of grad": (A.vmap(A.grad(f)), torch.ones(2, 3)),
    "jacrev": (A.jacrev(f), torch.ones(3)),
    "hessian": (A.hessian(f), torch.ones(3)),
    "vjp": (lambda x: A.vjp(f, x)[1](torch.tensor(1.0)), torch.ones(3)),
    "jvp": (lambda x: A.jvp(f, (x,), (torch.ones(3),)), torch.ones(3)),
    "make_fx": (lambda x: A.make_fx(f)(x).code, torch.ones(3)),
    "jit": (A.jit(f, backend="eager"), torch.ones(3)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_it_is_asked_of_nothing_but_the_function(name):
    transform, x = TRANSFORMS[name]
    with Seen() as mode:
        transform(x)
    others = [c for c in mode.calls if c not in ("tensor", "ones")]  # of the lambdas above
    assert others == ["__get__", "sin", "sum"]  # x.shape is the first


def test_it_acts_at_every_level():
    x = torch.rand(2, 3)
    with Seen():
        assert torch.allclose(A.vmap(A.grad(f))(x), 2 * x.cos())
        assert torch.allclose(A.grad(lambda x: A.vmap(f)(x).sum())(x), 2 * x.cos())
        assert torch.allclose(
            A.vmap(lambda x: torch.sin(x) + A.grad(f)(x))(x), 2 * (x.sin() + x.cos())
        )


def test_it_is_there_again_after_an_error():
    def failing(x):
        A.grad(f)(x)
        raise ValueError

    with Seen() as mode:
        with pytest.raises(ValueError):
            A.vmap(failing)(torch.ones(2, 3))
        mode.calls.clear()
        torch.cos(torch.ones(3))
    assert mode.calls[-1] == "cos"


def test_one_that_is_switched_off_stays_so():
    with Seen() as mode, torch._C.DisableTorchFunction():
        A.vmap(A.grad(f))(torch.ones(2, 3))
    assert mode.calls == []


@pytest.mark.parametrize("make", [torch.ones, functools.partial(torch.full, fill_value=1.0)])
def test_a_default_device_holds_in_the_function(make):
    with torch.device("meta"):
        made = A.vmap(lambda x: make((2,)).expand(2))(torch.ones(3, 1))
    assert made.device.type == "meta"
