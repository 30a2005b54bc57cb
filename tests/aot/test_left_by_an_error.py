"""An error of the user's own that leaves a compiled function: what the function did until then is
done, as in eager; a refusal of ours undoes it."""

import pytest
import torch
from torch import nn

from aotfunc import aot_function, jit
from aotfunc.errors import CaptureError
from tests.functions import Cube
from tests.reference import assert_same


class Stop(Exception):
    pass


class World:
    """What lies outside of the function."""

    def __init__(self):
        self.buffer, self.leaf = torch.zeros(3), torch.ones(3, requires_grad=True)
        self.kept, self.log, self.count, self.leaf_gradient = None, [], 0, None
        self.norm = nn.BatchNorm1d(3)

    def seen(self):
        return (
            [self.buffer, self.leaf, self.kept, *self.log, self.count, self.leaf_gradient],
            [(t.requires_grad, t is None or t._version > 0) for t in (self.buffer, self.leaf)],
            [*self.norm.buffers()],
            torch.get_rng_state(),
        )


def write(w, x):
    w.buffer.add_(x.detach())
    w.buffer[0] = 5.0


def write_what_requires_grad(w, x):
    w.buffer.copy_(x * w.leaf)


def write_quietly(w, x):
    with torch.no_grad():
        w.leaf.mul_(2)


def write_to_the_argument(w, x):
    x.detach().mul_(3)


def keep(w, x):
    w.kept = x * 2
    w.log.append(w.kept[1:])
    w.count += 1


def draw(w, x):
    w.buffer.add_(torch.rand(3))


def update_statistics(w, x):
    w.norm(torch.stack([x, x * 2]))


def keep_the_functions_result(w, x):
    w.kept = Cube.apply(x)
    (w.leaf_gradient,) = torch.autograd.grad((x**3).sum(), x)


def nested(w, x):
    jit(lambda x: write(w, x * 2))(x)


DONE = [
    *(write, write_what_requires_grad, write_quietly, write_to_the_argument, keep, draw),
    *(update_statistics, keep_the_functions_result, nested),
]
COMPILERS = {
    "jit": lambda f: jit(f, backend="eager"),
    "aot_function": lambda f: aot_function(f, "eager"),
}


def run(do, compiler, error=Stop, inside=False):
    torch.manual_seed(0)
    w, stops = World(), [True]

    def f(x):
        do(w, x)
        if stops[0]:
            raise error("stop")
        return x * w.buffer

    inner = compiler(f)
    g = compiler(lambda x: inner(x) * 2) if inside else inner
    found = []
    for stops[0] in (True, False, True, True):
        x = torch.linspace(1, 2, 3).requires_grad_() * 1
        try:
            found.append(g(x))
        except error:
            found.append(None)
        if w.kept is not None and w.kept.requires_grad:
            found.append(torch.autograd.grad(w.kept.sum(), x, retain_graph=True))
        found.append((x, w.seen()))
        w.buffer = w.buffer.detach().clone()
    return found


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "nested"])
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("do", DONE)
def test_what_was_done_is_done(do, compiler, inside):
    want = run(do, lambda f: f, inside=inside)
    assert_same(run(do, COMPILERS[compiler], inside=inside), want)


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("do", DONE)
def test_a_refusal_undoes_it(do, compiler):
    torch.manual_seed(0)
    w, x = World(), torch.linspace(1, 2, 3).requires_grad_() * 1
    before = [t.clone() if isinstance(t, torch.Tensor) else t for t in w.seen()[0]]

    def f(x):
        do(w, x)
        return x if x.sum() > 0 else -x

    state = torch.get_rng_state()
    with pytest.raises(CaptureError):
        COMPILERS[compiler](f)(x)
    assert_same((w.seen()[0], torch.get_rng_state()), (before, state))


@pytest.mark.parametrize("compiler", COMPILERS)
def test_an_error_that_carries_tensors(compiler):
    """As that of a hook that stops a network once it has what it wants."""

    def f(x):
        raise Stop("found", {"y": x * 2})

    x = torch.ones(3, requires_grad=True)
    with pytest.raises(Stop) as e:
        COMPILERS[compiler](f)(x)
    text, found = e.value.args
    assert_same(
        (text, found["y"], torch.autograd.grad(found["y"].sum(), x)[0]), ("found", x * 2, x + 1)
    )


def test_lowering_does_nothing():
    w = World()

    def f(x):
        write(w, x)
        raise Stop

    with pytest.raises(Stop):
        jit(f).lower(torch.ones(3))
    assert_same(w.buffer, torch.zeros(3))
