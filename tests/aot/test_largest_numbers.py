"""Constants at the ends of what a dtype has: masks of attention are filled with them."""

import pytest
import torch

from aotfunc import aot_function, grad, jit, make_fx
from tests.reference import assert_same

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
ENDS = {
    "min": lambda i: i.min,
    "max": lambda i: i.max,
    "tiny": lambda i: i.tiny,
    "smallest": lambda i: i.smallest_normal * i.eps,
    "inf": lambda i: float("inf"),
}
PROGRAMS = {
    "masked_fill": lambda x, c: x.masked_fill(x > 0, c),
    "where": lambda x, c: torch.where(x > 0, x, c),
    "full": lambda x, c: torch.full((2,), c, dtype=x.dtype) + 0 * x[:2],
    "full_like and where": lambda x, c: torch.where(x > 0, torch.full_like(x, c), x),
    "a new tensor": lambda x, c: torch.maximum(x, x.new_tensor(c)),
    "times a mask": lambda x, c: (x > 0).to(x.dtype) * c,
    "clamp": lambda x, c: x.clamp(-abs(c), abs(c)),
}


@pytest.mark.parametrize("backend", ["eager", "cpp"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("program", PROGRAMS)
def test_numbers_at_the_end_of_a_dtype(program, dtype, backend):
    f, x = PROGRAMS[program], torch.tensor([-1.0, 2.0, 0.5], dtype=dtype)
    for end in ENDS.values():
        c = end(torch.finfo(dtype))
        want = f(x, c)
        assert_same(jit(f, backend=backend)(x, c), want)
        assert_same(jit(lambda x: f(x, c), backend=backend)(x), want)  # noqa: B023
        assert_same(make_fx(lambda x: f(x, c))(x)(x), want)  # noqa: B023
        assert_same(aot_function(lambda x: f(x, c), backend)(x), want)  # noqa: B023


def test_gradient_beside_a_mask():
    least = torch.finfo(torch.float32).min
    f = lambda x: torch.where(x > 0, x, torch.full((), least)).softmax(0)[0]
    x = torch.randn(5)
    leaf = x.clone().requires_grad_()
    f(leaf).backward()
    assert_same(grad(f)(x), leaf.grad)
