"""Instances of dataclasses and the like as arguments and as results: trees of what their
attributes hold."""

import collections
import dataclasses
import types
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import aotfunc as A
from aotfunc.errors import ArgumentError, CaptureError


@dataclasses.dataclass
class Data:
    x: Tensor
    w: Tensor


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Tensor
    w: Tensor


@dataclasses.dataclass(slots=True)
class Slots:
    x: Tensor
    w: Tensor


@dataclasses.dataclass
class Heir(Data):
    made: int = dataclasses.field(default=0, init=False)

    def __post_init__(self):
        assert type(self.x) is Tensor  # does not run again
        self.extra = {"more": self.x}


class Attrs:
    """As the library attrs makes them."""

    __slots__ = ("w", "x")
    __attrs_attrs__ = (types.SimpleNamespace(name="x"), types.SimpleNamespace(name="w"))

    def __init__(self, x, w):
        self.x, self.w = x, w


class Pair(NamedTuple):
    x: Tensor
    w: Tensor


@dataclasses.dataclass
class Output(collections.OrderedDict):
    """A dictionary whose items are also its attributes."""

    x: Tensor
    w: Tensor

    def __post_init__(self):
        for f in dataclasses.fields(self):
            self[f.name] = getattr(self, f.name)


class Single(NamedTuple):
    x: Tensor


class Tagged(Single):
    """A named tuple with an attribute."""


def tagged(x, w):
    p = Tagged(x)
    p.w = w
    return p


def namespace(x, w):
    return types.SimpleNamespace(x=x, w=w)


CLASSES = {
    "dataclass": Data,
    "frozen": Frozen,
    "slots": Slots,
    "attrs": Attrs,
    "NamedTuple": Pair,
    "namespace": namespace,
    "named tuple with an attribute": tagged,
    "dictionary": Output,
}


def f(p):
    return (p.x * p.w).sin().sum()


def operands(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, generator=g), torch.randn(3, generator=g)


def slopes(x, w):
    return (x * w).cos() * w, (x * w).cos() * x


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("compiler", ["jit", "aot_function"])
def test_an_argument_of_a_compiled_function(name, compiler):
    compiled = A.jit(f) if compiler == "jit" else A.aot_function(f, "eager")
    for seed in range(3):  # new tensors, one entry
        x, w = operands(seed)
        x.requires_grad_()
        y = compiled(CLASSES[name](x, w))
        torch.testing.assert_close(y, f(Data(x, w)))
        y.backward()
        torch.testing.assert_close(x.grad, slopes(x, w)[0].detach())
    assert len(compiled.entries) == 1


@pytest.mark.parametrize("name", CLASSES)
def test_an_argument_of_a_transform(name):
    make = CLASSES[name]
    x, w = operands()
    for g in (
        A.grad(f)(make(x, w)),
        A.vjp(f, make(x, w))[1](torch.tensor(1.0))[0],
        A.jacrev(f)(make(x, w)),
    ):
        assert type(g) is type(make(x, w))
        torch.testing.assert_close((g.x, g.w), slopes(x, w))
    value, tangent = A.jvp(f, (make(x, w),), (make(w, x),))
    torch.testing.assert_close(
        tangent, sum(s.dot(t) for s, t in zip(slopes(x, w), (w, x), strict=True))
    )
    batch = make(torch.stack([x, w]), torch.stack([w, w]))
    torch.testing.assert_close(A.vmap(f)(batch), torch.stack([f(Data(x, w)), f(Data(w, w))]))
    mixed = A.vmap(f, in_dims=(make(0, None),))(make(torch.stack([x, w]), w))
    torch.testing.assert_close(mixed, torch.stack([f(Data(x, w)), f(Data(w, w))]))
    torch.testing.assert_close(A.functionalize(f)(make(x, w)), f(Data(x, w)))
    torch.testing.assert_close(A.hessian(f)(make(x, w)).x.w, A.hessian(f)(Pair(x, w)).x.w)
    gm = A.make_fx(f)(make(x, w))
    torch.testing.assert_close(gm(make(w, w)), f(Data(w, w)))


@pytest.mark.parametrize("name", CLASSES)
def test_a_result(name):
    make = CLASSES[name]

    def g(x, w):
        return make(x * w, {"sum": x + w, "other": (x, 3)}["sum"])

    x, w = operands()
    compiled = A.jit(g)
    calls = {
        "jit": compiled,
        "functionalize": A.functionalize(g),
        "vmap": lambda x, w: A.vmap(g)(x, w),
        "linearize": lambda x, w: A.linearize(g, x, w)[0],
        "aux": lambda x, w: A.grad(lambda x, w: (x.sum(), g(x, w)), has_aux=True)(x, w)[1],
    }
    for call in calls.values():
        first, second = call(x, w), call(w, w)
        assert type(first) is type(make(x, w)) and first is not second
        torch.testing.assert_close((first.x, first.w), (x * w, x + w))
        torch.testing.assert_close((second.x, second.w), (w * w, w + w))
    y = compiled(x.requires_grad_(), w)
    (y.x * 2).sum().backward()
    torch.testing.assert_close(x.grad, 2 * w)


def test_a_dictionary_that_is_a_dataclass_keeps_its_items():
    x, w = operands()
    y = A.jit(lambda p: Output(p["x"] * 2, p.w))(Output(x, w))
    assert list(y) == ["x", "w"] and y["x"] is y.x
    torch.testing.assert_close(y.x, x * 2)


def test_nested_instances_and_what_is_no_tensor():
    @dataclasses.dataclass
    class Outer:
        inner: Any
        scale: float
        name: str = "name"
        rest: list = dataclasses.field(default_factory=list)

    def g(p):
        return Outer(
            Heir(p.inner[0].x * p.scale, p.rest[0]), p.scale + 1, p.name + "!", [p.inner[1]]
        )

    x, w = operands()
    compiled = A.jit(
        lambda p: Outer(
            [Frozen(p.inner[0].x * p.scale, w)], p.scale + 1, p.name + "!", [p.rest[1]]
        )
    )
    for scale in (2.0, 3.0):
        y = compiled(Outer([Heir(x, w), 7], scale, rest=[w, None]))
        torch.testing.assert_close(y.inner[0].x, x * scale)
        assert (y.scale, y.name, y.rest) == (scale + 1, "name!", [None]) and type(
            y.inner[0]
        ) is Frozen
    assert len(compiled.entries) == 2
    heir = A.grad(lambda p: (p.extra["more"] * p.w * p.x).sum(), argnums=0)
    with pytest.raises(ArgumentError, match="only tensors can be differentiated"):
        heir(Heir(x, w))  # its number


def test_init_does_not_run_again():
    x, w = operands()
    y = A.jit(lambda p: (p.extra["more"] * p.w, p.made))(Heir(x, w))
    torch.testing.assert_close(y, (x * w, 0))


def test_a_configuration_without_tensors_is_guarded():
    @dataclasses.dataclass
    class Config:
        k: float
        unread: int = 0

    x, _ = operands()
    compiled = A.jit(lambda x, c: x * c.k)
    for k, unread in ((2.0, 0), (2.0, 1), (3.0, 2)):
        torch.testing.assert_close(compiled(x, Config(k, unread)), x * k)


def test_a_field_that_is_written_to():
    def g(p):
        p.x.mul_(2)
        return p.x.sum()

    for call in (A.jit(g), A.functionalize(g)):
        for _ in range(2):
            x, w = operands()
            p = Data(x.clone(), w)
            kept = p.x
            torch.testing.assert_close(call(p), (2 * x).sum())
            assert p.x is kept
            torch.testing.assert_close(p.x, 2 * x)


@pytest.mark.parametrize("transform", [A.jit, A.grad, A.functionalize, A.make_fx])
def test_assigning_to_an_attribute_is_refused(transform):
    def g(p):
        p.x = p.x * 2
        return p.x.sum()

    x, w = operands()
    p = Data(x, w)
    with pytest.raises(CaptureError, match="assigns to an attribute of an argument"):
        transform(g)(p)
    assert p.x is x


def test_a_result_of_a_plain_class():
    """It is another object at each call; un-jitted transforms return trees of tensors."""

    class Box:
        def __init__(self, x):
            self.x = x

    x, f = operands()[0], lambda x: Box(x * 2)
    compiled = A.jit(f)
    first, second = compiled(x), compiled(x + 1)
    assert type(first) is type(second) is Box
    torch.testing.assert_close([first.x, second.x], [x * 2, x * 2 + 2])
    with pytest.raises(ArgumentError, match=r"must return tensors.*type Box"):
        A.vmap(f)(x)
