"""A number or an index that eager mode refuses is refused by compiled functions, whatever computes
them and also after the number has changed: rules and kernels of other backends would take it."""

import pytest
import torch
import torch.nn.functional as F

from aotfunc import jit, vmap

X = torch.tensor([1.0, -2.0, 3.0])
I, H = torch.tensor([1, 2, 3]), X.half()
MASK = torch.tensor([True, False, True])
PLACES = torch.tensor([0, 2])
BACKENDS = pytest.mark.parametrize("backend", ["eager", "cpp"])


def in_place(name):
    return lambda x, k: getattr(x.clone(), name)(k)


def set_element(x, k):
    x = x.clone()
    x[1] = k
    return x


#: ``name: (f, x, numbers that it takes, numbers that it refuses)``
TAKEN, LARGE = (2.25, 5.5, 6.5), (1e300, -1e300)
NUMBERS = {
    "alpha": (lambda x, k: torch.add(x, x, alpha=k), X, TAKEN, (True, *LARGE, 2j)),
    "alpha of integers": (lambda x, k: torch.sub(x, x, alpha=k), I, (5, 7), (2.5, 2j)),
    "rsub": (lambda x, k: torch.rsub(x, x, alpha=k), X, TAKEN, LARGE),
    "addcmul": (lambda x, k: torch.addcmul(x, x, x, value=k), X, TAKEN, LARGE),
    "addcdiv": (lambda x, k: torch.addcdiv(x, x, x, value=k), X, TAKEN, LARGE),
    "lerp": (lambda x, k: torch.lerp(x, 2 * x, k), X, TAKEN, LARGE),
    "mul_ of integers": (in_place("mul_"), I, (5, 7), (2.5, 2j)),
    "mul_ of truth values": (in_place("mul_"), MASK, (True,), (2, 2.5)),
    "add_ of reals": (in_place("add_"), X, TAKEN, (2j,)),
    "div_ of integers": (in_place("div_"), I, (), (2, 2.5)),
    "full": (lambda x, k: torch.full((3,), k, dtype=x.dtype) + x, H, TAKEN, (70000.0, *LARGE)),
    "full_like": (lambda x, k: torch.full_like(x, k) + x, X, TAKEN, (*LARGE, 2j)),
    "new_full": (lambda x, k: x.new_full((3,), k) + x, X, TAKEN, LARGE),
    "fill_": (lambda x, k: x.clone().fill_(k) + x, H, TAKEN, (70000.0,)),
    "masked_fill": (lambda x, k: x.masked_fill(MASK, k) + x, H, TAKEN, (70000.0,)),
    "index_fill": (lambda x, k: x.index_fill(0, PLACES, k) + x, H, TAKEN, (70000.0,)),
    "scatter": (lambda x, k: x.scatter(0, PLACES, k) + x, H, TAKEN, (70000.0,)),
    "pad": (lambda x, k: F.pad(x, (1, 1), value=k) * 2, H, TAKEN, (70000.0,)),
    "where": (lambda x, k: torch.where(MASK, x, k) * 2, X, TAKEN, LARGE),
    "an element": (set_element, X.to(torch.uint8), (5, 7), (300,)),
}
#: what eager mode turns into infinity
ROUNDED = {
    "where": (lambda x, k: torch.where(MASK, x, k) * 2, H, 70000.0),
    "an element": (set_element, H, 70000.0),
    "mul": (torch.mul, X, 1e300),
    "add": (torch.add, H, 70000.0),
}


@BACKENDS
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name, backend):
    f, x, taken, refused = NUMBERS[name]
    for before in ((), taken):
        compiled = jit(f, backend=backend)
        for k in before:
            torch.testing.assert_close(compiled(x, k), f(x, k))
        for k in refused:
            with pytest.raises(RuntimeError):
                f(x, k)
            with pytest.raises(RuntimeError):
                compiled(x, k)


@BACKENDS
@pytest.mark.parametrize("name", ROUNDED)
def test_numbers_that_become_infinite(name, backend):
    f, x, k = ROUNDED[name]
    compiled = jit(f, backend=backend)
    for number in (2.25, 5.5, k, 6.5, -k):
        assert torch.equal(compiled(x, number), f(x, number))


W = torch.arange(12.0).reshape(3, 4)
INDICES = {
    "[]": lambda i: W[i],
    "index_select": lambda i: W.index_select(0, i),
    "gather": lambda i: W.gather(0, i[None]),
    "embedding": lambda i: F.embedding(i, W),
    "scatter": lambda i: W.scatter(0, i[None], 1.0),
    "scatter_add": lambda i: W.scatter_add(0, i[None], W[:1, :2]),
    "index_add": lambda i: W.index_add(0, i, W[:2]),
    "one_hot": lambda i: F.one_hot(i, 3) * 2,
    "nll_loss": lambda i: F.nll_loss(W[:2, :3], i),
    "//": lambda i: torch.tensor([4, 5]) // (3 - i),
    "%": lambda i: torch.tensor([4, 5]) % (3 - i),
}


@BACKENDS
@pytest.mark.parametrize("name", INDICES)
def test_indices(name, backend):
    f = INDICES[name]
    compiled = jit(f, backend=backend)
    for i in (torch.tensor([0, 2]), torch.tensor([1, 1])):
        assert torch.equal(compiled(i), f(i))
    for call in (f, compiled):
        with pytest.raises((RuntimeError, IndexError)):
            call(torch.tensor([3, 1]))


def test_classes_of_samples():
    f = vmap(lambda i: F.one_hot(i, 3))
    assert torch.equal(f(torch.tensor([0, 2])), F.one_hot(torch.tensor([0, 2]), 3))
    with pytest.raises(RuntimeError, match="one_hot: class values"):
        f(torch.tensor([0, 3]))
