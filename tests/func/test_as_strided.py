"""as_strided counts in memory, also where a tensor lies within a larger one, or apart in it."""

import pytest
import torch
from torch.autograd import forward_ad

from aotfunc import grad, jit, jvp, vjp, vmap
from aotfunc.errors import RuleError
from tests.inputs import f64
from tests.reference import assert_same, loop

#: parts of a table
PARTS = {
    "a row": lambda x: x[1],
    "a column": lambda x: x[:, 3],
    "every second": lambda x: x[0, ::2],
    "turned": lambda x: x.t()[1:4],
    "a window": lambda x: x[1:3, 2:7],
    "whole": lambda x: x,
}
#: what is read: elements of the part, and what lies beside and between them
READS = {
    "from its beginning": lambda x: x.as_strided((2,), (2,)),
    "from further on": lambda x: x.as_strided((2,), (2,), x.storage_offset() + 2),
    "rows": lambda x: x.as_strided((2, 2), (1, 10), x.storage_offset()),
    "overlapping": lambda x: x.as_strided((3, 2), (1, 1)).sin() * x.sum(),
    "of a value": lambda x: (x * 2).as_strided((2,), (1,)) * x.sum(),
    "a copy": lambda x: torch.as_strided_copy(x, (2,), (2,), x.storage_offset() + 2),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("part", PARTS)
def test_derivatives(part, read):
    x, f = PARTS[part](f64(4, 10)), READS[read]
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.clone())))
    for how in (f, jit(f)):
        assert_same(jvp(how, (x,), (x.clone(),)), (f(x), dual.tangent))
    leaf = x.detach().requires_grad_()
    out = f(leaf)
    g = torch.randn_like(out)
    assert_same(vjp(f, x)[1](g)[0], torch.autograd.grad(out, leaf, g)[0])


@pytest.mark.parametrize("part", PARTS)
def test_scatter(part):
    """It is linear, if all of it is laid out alike."""
    x, t = (PARTS[part](f64(4, 10)) for _ in range(2))
    src, ts = f64(2), f64(2)
    f = lambda x, src: torch.as_strided_scatter(x, src, (2,), (2,), t.storage_offset() + 2)
    for tangent in (t, t.clone(memory_format=torch.contiguous_format)):
        assert_same(jvp(f, (x, src), (tangent, ts)), (f(x, src), f(t, ts)))
    g = torch.randn_like(x)
    gx, gs = vjp(f, x, src)[1](g)
    assert_same((g * f(t, ts)).sum(), (gx * t).sum() + (gs * ts).sum())


@pytest.mark.parametrize("offset", [None, 4, 5])
@pytest.mark.parametrize("dim", [0, 1])
def test_batches_within_a_storage(dim, offset):
    """An offset counts in the storage for the first sample, and as far behind for the others."""
    x = f64(40)[4:28].view(4, 6)
    f = lambda x: x.as_strided((2,), (1,), offset)
    for how in (vmap, lambda f, dim: jit(vmap(f, dim)), lambda f, dim: vmap(jit(f), dim)):
        assert_same(how(f, dim)(x), torch.func.vmap(f, dim)(x))
    relative = lambda x: x.as_strided((2,), (1,), x.storage_offset() + (offset or 4) - 4)
    assert_same(vmap(relative, dim)(x), loop(relative, dim)(x))
    both = lambda x: vmap(vmap(f))(x.view(4, 2, 3))
    assert_same(both(x), torch.func.vmap(torch.func.vmap(f))(x.view(4, 2, 3)))


def test_a_batch_does_not_read_beside_its_samples():
    with pytest.raises(RuleError, match="no element of its sample"):
        vmap(lambda x: x.as_strided((3,), (6,)))(f64(4, 6))
    with pytest.raises(RuleError, match="no element of its sample"):
        vmap(lambda x: (x * 2).as_strided((2,), (9,)))(f64(4, 6))
    g = grad(lambda x: vmap(lambda x: x.as_strided((2,), (3,)))(x).square().sum())
    x = f64(4, 6)
    want = torch.zeros_like(x)
    want[:, ::3] = 2 * x[:, ::3]
    assert_same(g(x), want)
