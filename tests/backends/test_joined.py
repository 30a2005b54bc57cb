"""Products that share a matrix are one product, where one kernel makes their rows and only
launches read them; results are those of products one by one."""

import pytest
import torch
from torch.testing import assert_close

from aotfunc import jit, jvp, laplacian
from tests.kernels import every_kernel

N = 9


def matrices(dtype=torch.float64) -> tuple:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(N, N, dtype=dtype, generator=generator) / 3 for _ in range(3))


def count_products(f, *args) -> int:
    """Compare a compiled function with the eager one; return its number of products."""
    before = len(every_kernel.multiplied)
    got, expected = jit(f, backend=every_kernel)(*args), f(*args)
    assert_close(got, expected)
    for a, b in zip(*[x if isinstance(x, tuple) else (x,) for x in (got, expected)], strict=True):
        assert a.stride() == b.stride()
    return len(every_kernel.multiplied) - before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_and_their_tangents(dtype):
    """Each layer behind the first is one product."""
    weights = matrices(dtype)

    def network(x):
        for w in weights:
            x = torch.tanh(x @ w)
        return x

    x = torch.linspace(-1, 1, 7 * N, dtype=dtype).reshape(7, N)
    assert count_products(lambda x, v: jvp(network, (x,), (v,)), x, x.cos()) == 4
    assert count_products(laplacian(lambda x: network(x).sum()), x[0]) == 4


def rows(x):
    """Return values that one kernel makes."""
    return x.sin(), x.cos(), x * 2


def stored(w, v, x):
    a, b, c = rows(x)
    return (a @ w).tanh(), (b @ w).tanh(), (c @ w).tanh()


def returned_product(w, v, x):
    a, b, c = rows(x)
    return (a @ w).tanh(), (b @ w).tanh(), c @ w


def returned_rows(w, v, x):
    a, b, c = rows(x)
    return (a @ w).tanh(), b, (b @ w).tanh(), (c @ w).tanh()


def two_matrices(w, v, x):
    a, b, c = rows(x)
    return tuple((r @ m).tanh() for m in (w, v) for r in (a, b, c))


def other_rows(w, v, x):
    a, b, c = rows(x)
    return (a @ w).tanh(), (b @ w).tanh(), (b @ v).tanh(), (c @ v).tanh(), (a @ v).tanh()


def twice(w, v, x):
    a, b, _ = rows(x)
    return ((a @ w) @ v).tanh(), ((b @ w) @ v).tanh()


def called(w, v, x):
    a, b, c = rows(x)
    return (a @ w).sort(0)[0], (b @ w).tanh(), (c @ w).tanh(), c.sort()[0]


def through_views(w, v, x):
    a, b, c = rows(x)
    p, q = a @ w, b @ w
    return p.t()[1:].tanh(), (q.reshape(27, 3) @ p[:3]).tanh(), p[:, 2] + (c @ w)[2]


def transposed(w, v, x):
    a, b, c = rows(x)
    return (w @ c).tanh(), (a @ w.t()).tanh(), (b @ w.t()).tanh()


def columns(w, v, x):
    a, b, _ = rows(x.t())
    return (w @ a.t()).tanh(), (w @ b.t()).tanh()


def also_factor(w, v, x):
    a, b, c = rows(x)
    return (a @ w).tanh(), (b @ w).tanh(), (c @ w).tanh() * (c @ b[0]), a.mT @ a


def early(w, v, x):
    """What reads the smaller product runs before the larger one would."""
    a = x.sin()
    b = a.sum(0)
    p = (b @ w).tanh()
    return (p.sort()[0] @ v).sort()[0], (a @ w).tanh()


def carried(w, v, x):
    """Rows that are products are made by no kernel."""
    for _ in range(3):
        a, b, c = rows(x)
        x = (a @ w) * (b @ w) + c @ w
    return x


@pytest.mark.parametrize(
    "program, count",
    [
        *((stored, 1), (returned_product, 2), (returned_rows, 2), (two_matrices, 2)),
        *((other_rows, None), (twice, None), (called, None), (through_views, None)),
        *((transposed, 2), (columns, None), (also_factor, None), (carried, 3), (early, None)),
    ],
    ids=lambda p: getattr(p, "__name__", ""),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_who_reads_them(program, count, dtype):
    w, v, x = matrices(dtype)
    found = count_products(program, w, v, x)
    assert count is None or found == count


def test_threads_and_tall_rows():
    """Blocks of rows are divided among threads as those of other products."""
    w, x = torch.randn(40, 30), torch.randn(300, 40)

    def f(x):
        a, b, c = rows(x)
        return (a @ w).tanh(), (b @ w).tanh(), (c @ w).tanh()

    before = torch.get_num_threads()
    for n in (1, 2):
        torch.set_num_threads(n)
        try:
            assert count_products(f, x) == 1
        finally:
            torch.set_num_threads(before)
