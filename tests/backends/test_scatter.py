"""Values added where indices say: places that repeat, gradients of look-ups, fused with what is
added; refusals as eager's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from aotfunc import grad, jit
from aotfunc.backends.loops import native
from tests.backends.test_cpp import against_the_interpreter, agree, floats, kernels_of
from tests.kernels import every_kernel, with_threads

pytestmark = pytest.mark.usefixtures("cache")

index = torch.tensor([3, 0, 3, 3, 6, -7, 1, 0, 2, 3, 5, 4, 3, 3, 3, 3, 3, 0, 1])
few, table = index[:5] % 7, index[:18].reshape(6, 3) % 7


def put(size, indices, value):
    zeros = torch.zeros(size, dtype=value.dtype)
    return torch.ops.aten.index_put(zeros, list(indices), value, True)


CASES = {
    "elements": (lambda v: put((7,), (index,), v.exp()), floats(19)),
    "rows": (lambda v: put((7, 3), (index,), v * 2), floats(19, 3)),
    "wide rows": (lambda v: put((7, 70), (index,), v * 2), floats(19, 70)),
    "columns": (lambda v: put((5, 7), (None, index), v.sin()), floats(5, 19)),
    "a row for all": (lambda v: put((7, 3), (index,), v), floats(3)),
    "two indices": (lambda v: put((7, 7), (few, few.flip(0)), v + 1), floats(5)),
    "two apart": (lambda v: put((7, 4, 7), (few, None, few.flip(0)), v + 1), floats(5, 4)),
    "a table": (lambda v: put((7, 2), (table,), v + 1), floats(6, 3, 2)),
    "transposed": (lambda v: put((7, 3), (index,), v.t()), floats(3, 19)),
    "sums": (lambda v: put((7,), (index,), v.exp().sum(1)), floats(19, 33)),
    "sums and what is summed": (
        lambda v: (put((7, 33), (index,), v / v.exp().sum(1, True)), v.exp().sum(1)),
        floats(19, 33),
    ),
    "scatter_add": (
        lambda v: torch.zeros(5, 7).scatter_add(1, index.expand(5, 19) % 7, v),
        floats(5, 19),
    ),
    "index_add": (lambda v: torch.zeros(5, 7).index_add(1, index % 7, v.cos()), floats(5, 19)),
    "index_add rows": (lambda v: torch.zeros(7, 18).index_add(0, index % 7, v), floats(19, 18)),
    "onto numbers": (lambda v: torch.ones(7).index_add(0, index % 7, v.cos()), floats(19)),
    "onto a tensor": (lambda v, x: x.index_add(0, index % 7, v.cos()), floats(19), floats(7)),
    "read at once": (lambda v: put((7,), (index,), v.exp()).sin() + 1, floats(19)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_added(case, dtype):
    f, *args = CASES[case]
    args = [a.to(dtype) for a in args]
    if dtype is torch.float64 and case.startswith(("scatter", "index_add", "onto numbers")):
        pytest.skip("zeros of float32")
    agree(f, *args, kernels=None)
    for kernel in kernels_of(f, *args):
        if not kernel.checks:  # its indices would be any
            against_the_interpreter(kernel)


def test_what_is_added_is_in_the_same_kernel():
    agree(CASES["rows"][0], floats(19, 3), kernels=1)
    agree(CASES["sums and what is summed"][0], floats(19, 33), kernels=1)


GATHERS = {
    "index": lambda x: x[index].exp().sum(),
    "two indices": lambda x: (x[few, few.flip(0)] ** 2).sum(),
    "gather": lambda x: x.gather(0, table).sin().sum(),
    "index_select": lambda x: x.index_select(1, few).sin().sum(),
    "pairs": lambda x: 1 / ((x[few[:3]] - x[3 + few[:3] // 2]) ** 2).sum(-1).add(1).sum(),
    "embedding": lambda x: F.embedding(table, x).square().sum(),
}


@pytest.mark.parametrize("case", GATHERS)
def test_gradients_of_look_ups(case):
    f, x = GATHERS[case], floats(7, 7)
    leaf = x.double().requires_grad_()
    (want,) = torch.autograd.grad(f(leaf), leaf)
    assert_close(jit(grad(f), backend=every_kernel)(x).double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [7, -8])
def test_out_of_range(bad):
    where = index.clone()
    where[4] = bad
    f = lambda v, i: torch.zeros(7).index_put((i,), v * 2, accumulate=True)
    g = jit(f, backend=every_kernel)
    g(floats(19), index)
    with pytest.raises(IndexError, match="out of bounds"):
        f(floats(19), where)
    with pytest.raises(IndexError, match="out of bounds"):
        g(floats(19), where)


def test_special_values():
    v = floats(19)
    v[2], v[6], v[8] = float("nan"), float("inf"), -0.0
    agree(lambda v: put((7,), (index,), v * 1), v, kernels=None)


def test_any_number_of_threads():
    where = torch.randint(50, (100_000,))
    v = floats(100_000, 3)
    f = jit(lambda v, i: put((50, 3), (i,), v.exp()), backend="cpp")
    results = with_threads(f, v, where)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    want = torch.zeros(50, 3, dtype=torch.float64).index_add(0, where, v.double().exp())
    assert_close(results[0].double(), want, rtol=1e-4, atol=1e-4)


def test_other_sizes_compile_nothing(cache):
    from aotfunc.backends.loops import native

    f = jit(lambda v, i: put((50, 3), (i,), v.exp()), backend="cpp")
    for n in range(20, 30):
        f(floats(n, 3), torch.randint(50, (n,)))
    assert len(native.LOADED) == 1


@pytest.mark.parametrize("rows", [1, 3, 32, 33, 100])
def test_sums_over_rows_beside_what_is_added(rows, monkeypatch):
    """One kernel that adds into an embedding and sums over blocks of rows: its blocks are counted,
    and no memory behind the sums is written to."""
    sources, load = [], native.load_kernels
    monkeypatch.setattr(
        native, "load_kernels", lambda source: sources.append(source) or load(source)
    )
    torch.manual_seed(0)
    table, weight, bias = torch.randn(7, 24), torch.randn(24), torch.randn(24)

    def f(table, weight, bias, x, ids):
        y = x + table[ids]
        return y.sin() + F.layer_norm(y, (24,), weight, bias) @ torch.ones(24, 24)

    x, ids = torch.randn(2, rows, 24), torch.randint(7, (2, rows))
    leaves = [t.clone().requires_grad_() for t in (table, weight, bias)]
    want = torch.autograd.grad(f(*leaves, x, ids).square().sum(), leaves)
    got = torch.autograd.grad(jit(f, backend="cpp")(*leaves, x, ids).square().sum(), leaves)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    kernels = [k for s in sources for k in s.split('extern "C"') if "k_index_put(" in k]
    both = [k for k in kernels if "block * size" in k]
    assert all("+ 31) / 32;" in k.partition("end = ")[2][:20] for k in both)
    assert both or rows < 32
