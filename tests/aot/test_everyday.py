"""Compiled functions in everyday use: as decorators, as methods, printed, and when a compiler
fails."""

import inspect

import pytest
import torch
from torch import nn

import aotfunc as A
from aotfunc.errors import AotfuncError, ArgumentError, BackendError, CaptureError

X = torch.linspace(-1, 1, 3)


def wave(x, scale: float = 2.0):
    """A wave."""
    return (x * scale).sin()


DECORATORS = {
    "jit": A.jit,
    "jit()": A.jit(),
    "jit(backend)": A.jit(backend="eager"),
    "aot_function": A.aot_function,
    "aot_function(compilers)": A.aot_function(
        fw_compiler="eager", bw_compiler=lambda gm, inputs: gm
    ),
}


@pytest.mark.parametrize("name", DECORATORS)
def test_a_decorator(name):
    f = DECORATORS[name](wave)
    x = X.clone().requires_grad_()
    torch.testing.assert_close(f(x), wave(x))
    (g,) = torch.autograd.grad(f(x, scale=3.0).sum(), x)
    torch.testing.assert_close(g, 3 * (3 * X).cos())
    assert f.__name__ == "wave" and f.__doc__ == "A wave." and f.__wrapped__ is wave
    assert inspect.signature(f) == inspect.signature(wave)


@pytest.mark.parametrize("name", DECORATORS)
def test_methods(name):
    decorate = DECORATORS[name]

    class Base:
        k = 2.0

    class Thing(Base):
        def __init__(self, c):
            self.c = c

        @decorate
        def method(self, x, n=1):
            return x * self.c * n

        @staticmethod
        @decorate
        def static(x):
            return x + 1

        @decorate
        @staticmethod
        def static_inside(x):
            return x + 2

        @classmethod
        @decorate
        def of_class(cls, x):
            return x * cls.k

        @decorate
        @classmethod
        def of_class_inside(cls, x):
            return x * cls.k + 1

        @property
        @decorate
        def doubled(self):
            return X * self.c * 2

    class Heir(Thing):
        k = 5.0

    for thing, k in ((Thing(3.0), 2.0), (Heir(4.0), 5.0), (Thing(5.0), 2.0)):
        torch.testing.assert_close(thing.method(X, n=2), X * thing.c * 2)
        torch.testing.assert_close(type(thing).method(thing, X), X * thing.c)
        torch.testing.assert_close(thing.doubled, X * thing.c * 2)
        for owner in (thing, type(thing)):
            torch.testing.assert_close(owner.static(X), X + 1)
            torch.testing.assert_close(owner.static_inside(X), X + 2)
            torch.testing.assert_close(owner.of_class(X), X * k)
            torch.testing.assert_close(owner.of_class_inside(X), X * k + 1)
    assert list(inspect.signature(Thing(1.0).method).parameters) == ["x", "n"]
    assert Thing(1.0).method.__self__.c == 1.0 and Thing(1.0).method.__name__ == "method"
    thing = Thing(3.0)
    thing.method(X)
    thing.c = 7.0
    torch.testing.assert_close(thing.method(X), X * 7.0)


def test_an_option_without_its_name():
    with pytest.raises(ArgumentError, match=r"'inductor' is not a function .options have names"):
        A.jit("inductor")


def test_a_decorated_forward():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        @A.jit
        def forward(self, x):
            return (x * self.w).sum()

    nets = Net(), Net()
    for i, net in enumerate(nets):
        net.w.data.mul_(i + 2)
        net(X).backward()
        torch.testing.assert_close(net.w.grad, X)
        torch.testing.assert_close(net(X), X.sum() * (i + 2))


def iterated(x):
    yield x * 2


async def awaited(x):
    return x * 2


@pytest.mark.parametrize("transform", [A.jit, A.vmap, A.functionalize, A.make_fx])
@pytest.mark.parametrize(
    "f", [iterated, awaited, lambda x: map(torch.sin, x), lambda x: {"y": zip(x, x, strict=True)}]
)
@pytest.mark.filterwarnings("ignore:coroutine")
def test_what_would_go_on_after_the_capture_is_refused(f, transform):
    with pytest.raises(CaptureError, match="would go on when the capture is over"):
        transform(f)(X[None])


# ----- reprs -------------------------------------------------------------------------------------


def test_reprs():
    f = A.jit(wave)
    assert repr(f) == "<jit of wave(x, scale: float = 2.0), compiled by auto: 0 entries>"
    f(X)
    (entry,) = f.entries.values()
    assert repr(f).endswith("1 entry>")
    assert repr(entry) == "<entry of jit: (float32[3]) -> (float32[3])>"
    assert repr(entry.call) == "<compiled call jit: (float32[3]) -> (float32[3]), 2 nodes>"
    assert repr(entry.call.program).startswith(
        "<jit: (float32[3]) -> (float32[3]), 2 nodes>\ngraph():"
    )
    g = A.aot_function(nn.Linear(3, 1), "eager", lambda gm, inputs: gm)
    assert "aot_function of a Linear" in repr(g) and "eager and " in repr(g)


# ----- compilers that fail -----------------------------------------------------------------------


def broken(gm, inputs):
    raise LookupError("no such kernel")


def test_a_compiler_that_fails_on_the_forward():
    f = A.jit(wave, backend=broken)
    with pytest.raises(BackendError, match=r"jit: forward: the compiler broken failed") as caught:
        f(X)
    assert isinstance(caught.value.__cause__, LookupError) and "no such kernel" in str(
        caught.value
    )
    torch.testing.assert_close(
        caught.value.graph_module(X)[0], wave(X)
    )  # the graph is kept, and runs
    assert "torch.ops.aten.sin.default" in str(caught.value)
    with pytest.raises(BackendError):
        f(X)  # and again


def test_a_compiler_that_fails_on_the_backward():
    f = A.aot_function(wave, "eager", broken)
    torch.testing.assert_close(f(X), wave(X))
    x = X.clone().requires_grad_()
    y = f(x)
    with pytest.raises(
        BackendError, match="aot_function: backward: the compiler broken"
    ) as caught:
        y.sum().backward()
    assert "cos" in caught.value.graph_module.code and x.grad is None


def test_a_compiled_function_that_fails_when_it_runs():
    def compiler(gm, inputs):
        def run(*args):
            raise LookupError("on the way")

        return run

    with pytest.raises(LookupError, match="on the way"):
        A.jit(wave, compiler)(X)


def test_our_own_errors_pass():
    def compiler(gm, inputs):
        raise CaptureError("ours")

    with pytest.raises(AotfuncError, match=r"^ours$"):
        A.jit(wave, compiler)(X)


def test_what_is_interrupted_is_not_wrapped():
    def compiler(gm, inputs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        A.jit(wave, compiler)(X)


def test_what_belongs_to_a_compiled_function_may_be_reached():
    inner = A.jit(wave)
    pipeline, call = inner.pipeline, inner(X) is None

    @A.jit
    def f(x):
        return inner(x) * len(pipeline.name) + call

    torch.testing.assert_close(f(X), wave(X) * 3)
    entry = next(iter(inner.entries.values()))
    torch.testing.assert_close(A.jit(lambda x: x * len(entry.call.__name__))(X), X * 3)
