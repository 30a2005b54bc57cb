"""``torch.inference_mode()`` inside a compiled function: its results are inference tensors where
eager's are."""

import pytest
import torch
from torch import nn

from aotfunc import aot_function, jit
from aotfunc.errors import CaptureError
from tests.reference import assert_same

LINEAR = nn.Linear(3, 3)


def within(f):
    return torch.inference_mode()(f)


def left_again(x):
    with torch.inference_mode():
        y = x * 2
    return y + 1, y.clone()


def switched_off(x):
    with torch.inference_mode(), torch.inference_mode(False):
        y = x * 2
    return y * x


def asks(x):
    with torch.inference_mode():
        y, v = x * 2, x[0]
    return x + sum(2**k for k, t in enumerate((x, y, v, y[0], y + 1)) if t.is_inference())


def copies_of_columns(x):
    """Of a tensor by columns these are copies, and what is written to them stays theirs."""
    y = (x * 2).t()
    with torch.inference_mode():
        copies = [y.flatten(), y.reshape(-1), y.contiguous(), y.to(torch.float64), y.T.T.ravel()]
        for t in copies:
            t.add_(1)
    return y.sum(), *[t.sum() for t in copies]


def views_of_rows(x):
    y = x * 2
    with torch.inference_mode():
        for t in (y.flatten(), y.reshape(-1), y.contiguous(), y.to(y.dtype), y.expand_as(y)):
            t.add_(1)
    return y.sum()


FUNCTIONS = {
    "copies of columns": copies_of_columns,
    "views of rows": views_of_rows,
    "pointwise": within(lambda x: x * 2),
    "module": within(lambda x: LINEAR(x)),
    "view of an argument inside": within(lambda x: x.view(-1)[1:] * 2),
    "view of a result": within(lambda x: (lambda y: (y, y[0]))(x * 2)),
    "made of nothing": within(lambda x: torch.ones(3)),
    "written argument": within(lambda x: (x.add_(1), x * 2)[1]),
    "written and returned": within(lambda x: (x.add_(1), x, x * 2)[1:]),
    "nested": lambda x: jit(within(lambda x: x * 2))(x),
    "in a nested one": within(lambda x: jit(lambda x: x[0] * 2)(x)),
    "left again": left_again,
    "switched off": switched_off,
    "asks": asks,
}


@pytest.mark.parametrize(
    "way", [jit, lambda f: aot_function(f, "eager")], ids=["jit", "aot_function"]
)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("active", [False, True])
def test_as_in_eager(name, way, active):
    f, found = FUNCTIONS[name], []
    compiled = way(f)
    for g in (f, compiled, compiled):
        x = torch.arange(9.0).view(3, 3).requires_grad_(active and "written" not in name)
        result = g(x)
        results = [*result, x] if isinstance(result, tuple) else [result, x]
        found.append([(t.is_inference(), t.requires_grad, t.detach().clone()) for t in results])
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


def test_tensors_made_inside_and_outside_of_the_mode_are_refused():
    def f(x):
        with torch.inference_mode():
            y = x * 2
        return y, x * 3

    def view(x):
        with torch.inference_mode():
            return x * 2, x[0]

    for g in (f, view):
        with pytest.raises(CaptureError, match="inference_mode"):
            jit(g)(torch.ones(3))
