"""Tensors as factors of ``add``, ``addcmul`` and ``addcdiv``: what eager gives for their number or
a refusal."""

import pytest
import torch

from aotfunc import jit
from aotfunc.errors import CaptureError
from tests.reference import assert_same

VALUES = {
    "long": torch.arange(1, 4),
    "float": torch.tensor([0.5, 1.5, 2.5]),
    "double": torch.tensor([0.5, 1.5, 2.5], dtype=torch.float64),
    "bfloat16": torch.tensor([0.5, 1.5, 2.5], dtype=torch.bfloat16),
    "complex": torch.tensor([1 + 1j, 2, 3j]),
    "of no dimension": torch.tensor(0.7),
}
FACTORS = {
    "float": torch.tensor(0.3),
    "double": torch.tensor(0.3, dtype=torch.float64),
    "long": torch.tensor(2),
    "complex": torch.tensor(1j),
    "of one dimension": torch.tensor([0.3]),
}
METHODS = {"add": ("alpha", 1), "addcmul": ("value", 2), "addcdiv": ("value", 2)}
TAKEN = {"float", "double", "long"}


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("method", METHODS)
def test_promotion(method, name):
    key, count = METHODS[method]
    taken = 0
    for end in ("", "_"):
        for x in VALUES.values():
            for y in VALUES.values():

                def f(x, *others, call=method + end):
                    return getattr(x.clone(), call)(*others, **{key: FACTORS[name]})

                try:
                    want = f(x, *[y] * count)
                except (RuntimeError, TypeError):
                    continue
                try:
                    found = jit(f, backend="eager")(x, *[y] * count)
                except CaptureError:
                    continue
                taken += x.dtype is y.dtype
                assert_same(found, want)
    assert (taken >= 10) == (name in TAKEN)
