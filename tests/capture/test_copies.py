"""Copies of tensors and modules inside a transform: by copy, by pickle and by torch.save."""

import copy
import pickle

import pytest
import torch

from aotfunc import grad, jit, vmap
from aotfunc.errors import CaptureError
from tests.copies import COPIES
from tests.reference import assert_same, grads, loop

D = torch.float64
X = torch.randn(4, 3, dtype=D, generator=torch.Generator().manual_seed(0))
OUT = torch.randn(3, dtype=D, generator=torch.Generator().manual_seed(1))
PARAMETER = torch.nn.Parameter(OUT.cos())
torch.manual_seed(0)
LINEAR, NORM = torch.nn.Linear(3, 2).to(D), torch.nn.BatchNorm1d(3).to(D)
NORM(X)


WAYS = {**COPIES, "copy": copy.copy}
PROGRAMS = {
    "tensor": lambda made, x: (made(OUT) * x).sin().sum(),
    "parameter": lambda made, x: (made(PARAMETER) * x).sin().sum(),
    "module": lambda made, x: made(LINEAR)(x).sin().sum(),
    "module with buffers": lambda made, x: made(NORM).eval()(x[None]).sin().sum(),
    "state": lambda made, x: (made(dict(LINEAR.state_dict()))["weight"] @ x).sin().sum(),
    "views": lambda made, x: (made([OUT, OUT[1:]])[1].sum() * x).sin().sum(),
    "expanded": lambda made, x: (made(OUT[:1].expand(3)) * x).sin().sum(),
    "twice": lambda made, x: (lambda pair: (pair[0] * pair[1] * x).sin().sum())(made([OUT, OUT])),
}


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_copies_of_what_is_outside(name, how):
    f = lambda x: PROGRAMS[name](WAYS[how], x)
    for _ in range(2):
        assert_same(grad(f)(X[0]), grads(f)(X[0]))
        assert_same(vmap(f)(X), loop(f)(X))
        assert_same(vmap(grad(f))(X), loop(grads(f))(X))
    if how == "deepcopy":
        assert_same(jit(f)(X[0]), f(X[0]))


@pytest.mark.parametrize("how", ["pickle", "save"])
def test_compiled_functions_do_not_freeze_what_is_pickled(how):
    f = lambda x: PROGRAMS["tensor"](WAYS[how], x)
    with pytest.raises(CaptureError, match="compiled once"):
        jit(f)(X[0])
    data = pickle.dumps(OUT)
    with pytest.raises(CaptureError, match="unpickled in a function that is compiled once"):
        jit(lambda x: (pickle.loads(data) * x).sum())(X[0])


def test_deepcopy_of_an_argument_is_a_leaf_of_its_own():
    f = lambda x: (copy.deepcopy(x) * x + copy.deepcopy({"x": x})["x"]).sum()
    assert_same(grad(f)(X[0]), grads(f)(X[0]))
    assert_same(vmap(lambda x: copy.deepcopy(x.sin()) * x)(X), X.sin() * X)
    with pytest.raises(RuntimeError, match=r"[Oo]nly.*leaves"):
        grad(lambda x: copy.deepcopy(x * 2).sum())(X[0])
    twice = lambda x: (lambda pair: (pair[0].add_(1), pair[1] * x)[1])(copy.deepcopy([x, x]))
    assert_same(vmap(twice)(X), (X + 1) * X)


def test_a_copy_of_a_value():
    assert_same(vmap(lambda x: copy.copy(x.sin()) * x)(X), X.sin() * X)
    with pytest.raises(CaptureError, match=r"copy\.copy of a value that requires grad.*clone\(\)"):
        grad(lambda x: (copy.copy(x * 2) * x).sum())(X[0])


@pytest.mark.parametrize("how", ["pickle", "save"])
def test_differentiated_and_batched_values_are_not_pickled(how):
    for run in (
        grad(lambda x: (WAYS[how](x * 2) * x).sum()),
        lambda x: vmap(WAYS[how])(x[None]),
    ):
        with pytest.raises(CaptureError, match="cannot be pickled"):
            run(X[0])
