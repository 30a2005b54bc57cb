"""Parts of a tensor at places that 0-dim integer tensors know: views, as in eager."""

import operator

import numpy as np
import pytest
import torch

from aotfunc import grad, jit, make_fx, vmap
from aotfunc.errors import CaptureError
from tests.reference import assert_same, grads


def assign(x, index, value):
    x[index] = value
    return x


def add_to(x, index, value):
    x[index] += value
    return x


def write_to_a_part(x, i):
    x[i].mul_(5)
    return x


def write_to_the_whole(x, i):
    y = x[i, i]
    x.add_(1)
    y.mul_(3)
    return x * y.sum()


def move_the_place(x, i):
    i = i.clone()
    y = x[i]
    i.sub_(1)  # y stays where it is
    x.add_(1)
    return y * x[i]


PARTS = {
    "x[i]": lambda x, i: x[i],
    "x[i, i]": lambda x, i: x[i, i],
    "x[..., i]": lambda x, i: x[..., i],
    "x[i, ..., i]": lambda x, i: x[i, ..., i],
    "x[2:, i]": lambda x, i: x[2:, i],
    "x[1, i, ::2]": lambda x, i: x[1, i, ::2],
    "x[None, i]": lambda x, i: x[None, i],
    "x[i, :, None]": lambda x, i: x[i, :, None],
    "int32": lambda x, i: x[i.int()],
    "int16": lambda x, i: x[i.short()],
    "computed": lambda x, i: x[(i * 2 + 1) % 3],
    "select": lambda x, i: x.select(-1, i),
    "narrow": lambda x, i: x.narrow(1, i, 1),
    "narrow of two": lambda x, i: x.narrow(1, abs(i), 2),
    "x[i] = number": lambda x, i: assign(x * 1, i, 3.0),
    "x[i, 1:] = tensor": lambda x, i: assign(x * 1, (i, slice(1, None)), x[0, 1:] * 2),
    "x[i] += tensor": lambda x, i: add_to(x * 1, i, x[0]),
    "x[i] = part": lambda x, i: (y := x * 1, assign(y, i, y[i - 1]))[0],
    "x[i, i] += number": lambda x, i: add_to(x * 1, (i, i), 1),
    "a part": lambda x, i: write_to_a_part(x * 1, i),
    "the whole": lambda x, i: write_to_the_whole(x * 1, i),
    "moved": lambda x, i: move_the_place(x * 1, i),
    "part of a part": lambda x, i: (y := x * 1, y[i, :2].narrow(1, abs(i), 1).zero_())[0],
}
each = pytest.mark.parametrize("f", PARTS.values(), ids=PARTS)


def data():
    return torch.arange(64.0, dtype=torch.float64).reshape(4, 4, 4)


@each
def test_argument(f):
    compiled, x = jit(f), data()
    for i in map(torch.tensor, (1, 2, -1)):
        assert_same(compiled(x, i), f(x, i))
        summed = lambda x, i=i: f(x, i).square().sum()
        assert_same(grad(summed)(x), grads(summed)(x))


@each
def test_from_outside(f):
    x, place = data(), torch.tensor(1)
    compiled = jit(lambda x: f(x, place))
    gradient = jit(grad(lambda x: f(x, place).square().sum()))
    for i in (1, 2, -1):
        place.fill_(i)
        assert_same(compiled(x), f(x, place))
        assert_same(gradient(x), grads(lambda x: f(x, place).square().sum())(x))


@each
@pytest.mark.parametrize("compile", [lambda f: f, jit], ids=["vmap", "jit(vmap)"])
def test_batch_of_places_in_a_tensor_from_outside(f, compile):
    x, places = data(), torch.tensor([1, 0, -1])
    want = torch.stack([f(x, i) for i in places])
    if compile is not jit and f in (PARTS["select"], PARTS["narrow"], PARTS["narrow of two"]):
        # methods are exchanged only while something is compiled once, here or in another thread
        try:
            assert_same(vmap(lambda i: f(x, i))(places), want)
        except CaptureError as e:
            assert "samples" in str(e)
        return
    assert_same(compile(vmap(lambda i: f(x, i)))(places), want)
    both = compile(vmap(vmap(lambda x, i: f(x, i), in_dims=(None, 0)), in_dims=(0, None)))
    y = torch.stack([x, x + 1])
    assert_same(both(y, places), torch.stack([torch.stack([f(x, i) for i in places]) for x in y]))


def test_writes_to_a_tensor_from_outside():
    """As a cache of keys and values is filled."""

    def store(x, i):
        cache[:, i] = x
        return cache.sum(0)[i] * 1

    def run(f):
        cache.zero_()
        return [
            f(torch.full((2, 3), float(i + 1)), torch.tensor(i)) for i in range(4)
        ], cache.clone()

    cache = torch.zeros(2, 4, 3)
    assert_same(run(jit(store)), run(store))


def test_outside_of_the_tensor():
    for f in (
        lambda x, i: x[i],
        lambda x, i: x.narrow(0, i, 2),
        lambda x, i: assign(x * 1, i, 0.0),
    ):
        compiled = jit(f)
        compiled(data(), torch.tensor(0))
        for i in (7, -7):
            with pytest.raises((IndexError, RuntimeError)):
                compiled(data(), torch.tensor(i))


def test_what_a_number_would_be_needed_for():
    for f in (
        lambda x, i: x[:i],
        lambda x, i: x[i, torch.tensor([0, 1])],
        lambda x, i: x[i.to(torch.uint8)],
    ):
        with pytest.raises(CaptureError, match=r"asked for.*test_places\.py"):
            jit(f)(data(), torch.tensor(1))


@pytest.mark.parametrize("compile", [lambda f: f, jit], ids=["vmap", "jit(vmap)"])
def test_containers_and_slices_with_places(compile):
    x, numbers, text = data(), [1.0, 2.0, 3.0], "123"
    asking = [
        lambda i: x[0, 0] * numbers[i],
        lambda i: (numbers[i], x[0])[1],
        lambda i: numbers[i] * i,
        lambda i: x[0] * float(text[i]),
        lambda i: x[:2][: i + 2],
        lambda i: operator.getitem(x, i),
        lambda i: assign(x * 1, slice(i, None), 0.0),
        lambda i: x[int(i)],
    ]
    for f in asking:
        with pytest.raises(CaptureError, match=r"asked for.*test_places\.py"):
            compile(vmap(f))(torch.tensor([0, 1]))


def rotated(x):
    """Write to parts in the ways that assign what they have written to already, and in others."""
    y = x * 1
    y[..., 0, 0] += x[..., 1, 1]
    y[1:, 2] -= y[1:, 0].clone().sin()
    y[None, ..., 3] *= 2
    part = y[0]
    part += 1
    y[0] = part
    y[1] = y[0]
    y[0] = part * 2
    index = [0, 1]
    y[index] += 1  # a copy
    shown = y.transpose(0, 1)
    shown[0] += shown[1].clone()
    return y


def test_augmented_assignment():
    x = data()
    summed = lambda x: rotated(x).sin().sum()
    assert_same(jit(rotated)(x), rotated(x))
    assert_same(grad(summed)(x), grads(summed)(x))
    xs = torch.stack([x, x.sin()])
    assert_same(vmap(rotated)(xs), torch.stack([*map(rotated, xs)]))
    first, second = data(), data()
    assert_same(jit(add_to)(first, 1, 2.0), add_to(second, 1, 2.0))
    assert_same(first, second)
    graph = make_fx(lambda x: add_to(x * 1, (..., 0), x[..., 1]))(x).graph
    scatters = [n for n in graph.nodes if n.target is torch.ops.aten.select_scatter.default]
    assert len(scatters) == 1


class Index:
    """A number that may change."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value


def assigned_elsewhere(index, change):
    """Assign a view to another place than the one that it was taken from by the same index."""

    def f(x):
        y, at = x * 2, index()
        part = y[at]
        change(at)
        y[at] = part
        return y

    return f


def set_value(at, value=1):
    at.value = value


def of_no_grad(x):
    """Assign a view that is a constant for autograd."""
    y = x * 2
    with torch.no_grad():
        part = y[0]
    y[0] = part
    return y


MOVING = {
    "object": assigned_elsewhere(lambda: Index(0), set_value),
    "slice": assigned_elsewhere(lambda: slice(Index(0), 1), lambda at: set_value(at.start, 0)),
    "tuple": assigned_elsewhere(lambda: (..., Index(0)), lambda at: set_value(at[1])),
    "array": assigned_elsewhere(lambda: np.array(0), lambda at: at.fill(1)),
    "tensor": assigned_elsewhere(lambda: torch.tensor(0), lambda at: at.fill_(1)),
    "no_grad": of_no_grad,
}


@pytest.mark.parametrize("name", MOVING)
def test_a_view_that_is_assigned_to_another_place_or_as_a_constant(name):
    f = MOVING[name]
    summed, x = lambda x: f(x).sin().sum(), data()
    assert_same(vmap(f)(x), torch.stack([*map(f, x)]))
    assert_same(grad(summed)(x), grads(summed)(x))
    assert_same(vmap(grad(summed))(x), torch.stack([grads(summed)(row) for row in x]))
    if name != "array":  # a number that a compiled function would freeze
        assert_same(jit(f)(x), f(x))
        assert_same(grads(lambda x: jit(f)(x).sin().sum())(x), grads(summed)(x))


def test_a_view_of_a_leaf_that_is_assigned_to_it():
    def f(x):
        part = x[0]
        x[0] = part
        return x * 1

    leaf = data().requires_grad_()
    for call in (f, jit(f)):
        with pytest.raises(RuntimeError, match="leaf"):
            call(leaf)
        with torch.no_grad():
            assert_same(call(leaf), leaf.detach())
