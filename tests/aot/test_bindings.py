"""The Python bindings that code on the eager backend calls compute what the overloads in the graph
do."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from aotfunc import jit
from aotfunc.backends.eager import BINDINGS
from tests.reference import assert_same

aten = torch.ops.aten
X, Y = torch.linspace(-2, 2, 12).view(3, 4), torch.linspace(0.5, 3, 12).view(3, 4)
OPERANDS = {
    "float": (X, Y),
    "turned": (X.t(), Y.t()),
    "double and float": (X.double(), Y),
    "whole": (X.int(), Y.long()),
    "complex": (X + 1j * Y, Y),
    "a number without dimensions": (X, torch.tensor(2.5, dtype=torch.float64)),
    "a number": (X, 2.5),
    "a whole number": (X.int(), 3),
    "a number and low precision": (X.bfloat16(), 0.1),
    "truth": (X > 0, True),
}
OTHERS = {
    aten.mm.default: (X, Y.t()),
    aten.bmm.default: (X.view(3, 2, 2), Y.view(3, 2, 2)),
    aten.mv.default: (X, Y[0]),
    aten.dot.default: (X[0], Y[0]),
    aten.addmm.default: (X[:, :3], X, Y.t()),
    aten.baddbmm.default: (X[0, :2], X.view(3, 2, 2), Y.view(3, 2, 2)),
    aten.cat.default: ([X, Y], -1),
    aten.maximum.default: (X, Y.double()),
    aten.minimum.default: (X, Y.t().contiguous().t()),
    aten.sum.dim_IntList: (X, [0, -1], True),
    aten.mean.dim: (X, [1]),
    aten.amax.default: (X, [0], True),
    aten.amin.default: (X, []),
    aten.native_layer_norm.default: (X, [4], Y[0], None, 1e-5),
    aten._softmax.default: (X, -1, False),
    aten._log_softmax.default: (X, 0, False),
    aten._softmax_backward_data.default: (X, Y, 1, torch.float32),
    aten._log_softmax_backward_data.default: (X, Y, 1, torch.float32),
    aten.where.self: (X > 0, X, torch.tensor(2.5, dtype=torch.float64)),
    aten.select.int: (X, 1, -1),
    aten.squeeze.dim: (X[:1], 0),
    aten.t.default: (X,),
    aten.unsqueeze.default: (X, -1),
    aten.permute.default: (X.view(3, 2, 2), [2, 0, 1]),
    aten.transpose.int: (X.view(3, 2, 2), 0, -1),
    aten.view.default: (X, [2, -1]),
    aten.expand.default: (X[0], [5, -1]),
}


def result(f, args):
    try:
        return f(*args)
    except (RuntimeError, TypeError) as e:
        return type(e)


def dispatched(f, args):
    """The ops that a call runs, with how many arguments."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((func, len(args), kwargs))
            return func(*args, **(kwargs or {}))

    with Watch():
        result(f, args)
    return seen


@pytest.mark.parametrize("op", BINDINGS, ids=str)
def test_a_binding_is_the_overload(op):
    binary = len([a for a in op._schema.arguments if str(a.type) == "Tensor"]) == 2
    cases = (
        [OTHERS[op]]
        if op in OTHERS
        else [pair if binary else pair[:1] for pair in OPERANDS.values()]
    )
    for args in cases:
        assert_same(result(BINDINGS[op], args), result(op, args), strides=True, rtol=0, atol=0)
        assert dispatched(BINDINGS[op], args) == dispatched(op, args)


def test_modes_do_not_see_the_bindings():
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    f = jit(lambda x: (x.sin() * 2).t())
    want = (X.sin() * 2).t()
    with Watch():
        f(X)
        seen.clear()
        got = f(X)
    assert_same(got, want)
    assert (
        torch.Tensor.sin in seen and torch.sin not in seen and torch.mul not in seen
    )  # f's own calls, and no others
