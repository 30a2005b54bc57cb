"""What hooks on saved tensors unpack reaches compiled backwards as what was packed lay."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from aotfunc import jit
from aotfunc.errors import AotfuncError

FUNCTIONS = {
    "tanh": lambda x, w: (x * w).tanh() * x.exp(),
    "sqrt": lambda x, w: (x * x + 1).sqrt() * w.exp(),
    "amax": lambda x, w: (x * w).amax(0),
    "matmul": lambda x, w: (x.t() @ x).exp() * w[:, None],
}
UNPACKED = {
    "another dtype": lambda t: t.double(),
    "with gaps": lambda t: torch.stack([t, t], -1)[..., 0],
    "column by column": lambda t: t.t().contiguous().t() if t.dim() == 2 else t,
    "a copy": torch.clone,
}


def inputs():
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*s, generator=generator) / 2 for s in ((3, 4), (4,)))
    return x.requires_grad_(), w.requires_grad_()


def first_and_second(f):
    args = inputs()
    first = torch.autograd.grad(f(*args).square().sum(), args, create_graph=True)
    total = sum(g.square().sum() for g in first)
    return [g.detach() for g in first], torch.autograd.grad(total, args)


@pytest.mark.parametrize("backend", ["eager", "cpp"])
@pytest.mark.parametrize("unpacked", UNPACKED)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_dtypes_and_layouts(name, unpacked, backend):
    compiled = jit(FUNCTIONS[name], backend=backend)
    expected = first_and_second(FUNCTIONS[name])
    for _ in range(3):
        args = inputs()
        with saved_tensors_hooks(lambda t: t, UNPACKED[unpacked]):
            y = compiled(*args)
            second = first_and_second(compiled)
        first = torch.autograd.grad(y.square().sum(), args)
        torch.testing.assert_close([*first], expected[0], check_stride=True)
        torch.testing.assert_close(second, expected)


def test_another_shape():
    args = inputs()
    with saved_tensors_hooks(lambda t: t, lambda t: t.flatten()):
        y = jit(FUNCTIONS["tanh"])(*args)
    with pytest.raises(AotfuncError, match=r"shape \[12\] where jit has saved .*\[3, 4\]"):
        y.sum().backward()
