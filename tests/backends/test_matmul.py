"""Products of matrices by our own kernel: every layout, size and dtype, against float64."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from aotfunc import grad, jit, vmap
from aotfunc.backends.loops import matmul
from tests.kernels import every_kernel, with_threads

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture(scope="module")
def kernels():
    """The kernels are found once for all functions."""
    for dtype in matmul.DTYPES:
        assert all([matmul.kernel(dtype, way) for way in ("rows_of", "row_of", "dots_of")])


def floats(*shape: int, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, dtype=dtype, generator=generator)


def agree(f, *args, products: int = 1) -> None:
    before = len(every_kernel.multiplied)
    compiled = jit(f, backend=every_kernel)
    got, expected = compiled(*args), f(*[a.double() for a in args])
    assert len(every_kernel.multiplied) - before == products
    assert got.stride() == f(*args).stride() and got.dtype is args[0].dtype
    eps = torch.finfo(got.dtype).eps
    bound = f(*[a.double().abs() for a in args])  # of the sum of the products' sizes
    assert ((got - expected).abs() <= 8 * eps * bound + 1e-300).all()


LAYOUTS = {
    "rows": lambda x: x.contiguous(),
    "columns": lambda x: x.mT.contiguous().mT,
    "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "part": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
}
SIZES = [(1, 1, 2), (1, 7, 5), (7, 1, 300), (7, 5, 2), (13, 33, 17), (50, 70, 300), (97, 1100, 20)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("left, right", [*itertools.product(LAYOUTS, LAYOUTS)])
def test_layouts_and_sizes(left, right, dtype):
    f = lambda x, y: x @ y
    for m, n, k in SIZES:
        agree(
            f, LAYOUTS[left](floats(m, k, dtype=dtype)), LAYOUTS[right](floats(k, n, dtype=dtype))
        )


def test_every_remainder():
    """Tiles of rows and columns, whole and cut off."""
    for m, n in itertools.product((*range(1, 14), 24, 49), (1, 3, 15, 16, 17, 31, 32, 33, 47, 65)):
        agree(lambda x, y: x @ y, floats(m, 3), floats(3, n))


def test_short_rows_times_a_vector():
    """As many products at a time as a vector has lanes, and the rest."""
    for m, k in itertools.product((7, 8, 16, 17, 35), (1, 15, 16, 17, 31, 63, 64)):
        agree(lambda x, y: x @ y, floats(m, k), floats(k))
    agree(lambda x, y: x @ y, floats(17, 9, dtype=torch.float64), floats(9, dtype=torch.float64))
    agree(lambda x, y: (y[None] @ x.mT)[0], floats(17, 9), floats(9))


BATCHES = {
    "bmm": (torch.bmm, floats(3, 13, 7), floats(3, 7, 20)),
    "transposed": (lambda x, y: torch.bmm(x.mT, y.mT), floats(3, 7, 13), floats(3, 20, 7)),
    "one left": (lambda x, y: x @ y, floats(13, 7), floats(3, 7, 20)),
    "one right": (lambda x, y: x @ y, floats(3, 13, 7), floats(7, 20)),
    "one row each": (
        lambda x, y: torch.bmm(x, y.expand(5, 7, 20)),
        floats(5, 1, 7),
        floats(7, 20),
    ),
    "rows of their own": (torch.bmm, floats(5, 1, 7), floats(5, 7, 20)),
    "columns of their own": (torch.bmm, floats(5, 9, 7), floats(5, 7, 1)),
    "rows apart": (
        lambda x, y: torch.bmm(x[:, :3], y.expand(5, 7, 20)),
        floats(5, 9, 7),
        floats(7, 20),
    ),
    "heads": (
        lambda x, y: x.view(2, 5, 3, 4).transpose(1, 2) @ y.view(2, 5, 3, 4).permute(0, 2, 3, 1),
        floats(2, 5, 12),
        floats(2, 5, 12),
    ),
    "a slice": (lambda x, y: x[1, 2:, 1::2] @ y[:, 3:], floats(3, 9, 15), floats(7, 8)),
    "turned round": (lambda x, y: x @ y.flip(0), floats(4, 7), floats(7, 20)),
    "chosen": (lambda x, y: x.unbind(1)[2] @ y, floats(4, 3, 7), floats(7, 5)),
    "mv": (lambda x, y: x @ y, floats(40, 7), floats(7)),
    "vm": (lambda x, y: x @ y, floats(100), floats(100, 70)),
    "a column": (lambda x, y: x @ y[:, 3], floats(40, 70), floats(70, 5)),
    "dot": (torch.dot, floats(300), floats(300)),
    "dot in steps": (lambda x, y: x[::2] @ y[1::3], floats(20), floats(30)),
}


@pytest.mark.parametrize("case", BATCHES)
def test_batches_and_views(case):
    f, *args = BATCHES[case]
    agree(f, *args)
    agree(f, *[a.double() for a in args])


def test_sums_do_not_depend_on_threads():
    for shape in ((5, 100, 60), (3, 7, 400)):
        x, y = floats(*shape), floats(shape[0], shape[2], 150)
        one, *more = with_threads(jit(torch.bmm, backend="cpp"), x, y)
        assert all(torch.equal(one, other) for other in more)


def test_special_values():
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, 3e38, 1.0])
    x = special.expand(5, 8)
    for y in (torch.eye(8), special.expand(3, 8).t(), torch.full((8, 40), 1e-3)):
        got = jit(lambda x, y: x @ y, backend="cpp")(x, y)
        assert_close(got, (x.double() @ y.double()).float(), equal_nan=True, rtol=1e-5, atol=0)


def test_nothing_to_add_up():
    for m, n, k in ((0, 3, 2), (3, 0, 2), (3, 4, 0)):
        x, y = torch.ones(m, k), torch.ones(k, n)
        assert torch.equal(jit(lambda x, y: x @ y + 1, backend="cpp")(x, y), x @ y + 1)


def test_other_dtypes_are_called():
    for dtype in (torch.bfloat16, torch.complex64, torch.int64):
        x = torch.arange(12).reshape(3, 4).to(dtype)
        assert torch.equal(jit(lambda x: x @ x.t(), backend="cpp")(x), x @ x.t())


def test_transforms():
    x, w, v = floats(4, 6, 7), floats(4, 7, 5), floats(6, 5)

    def loss(w, x, v):
        return (torch.tanh(x @ w) * v).sum()

    for f, args in (
        (vmap(grad(loss), (0, 0, None)), (w, x, v)),
        (vmap(grad(loss), (0, None, None)), (w, x[0], v)),
        (vmap(grad(loss, argnums=1), (None, 0, None)), (w[0], x, v)),
        (vmap(vmap(grad(loss), (None, 0, 0)), (0, None, None)), (w, x[0], v)),
    ):
        expected = f(*[a.double() for a in args])
        assert_close(jit(f, backend="cpp")(*args).double(), expected, rtol=1e-4, atol=1e-5)


def test_without_a_compiler_products_are_called(monkeypatch):
    monkeypatch.setattr(matmul, "kernel", lambda dtype, way: None)
    agree(lambda x, y: x @ y, floats(3, 4), floats(4, 5), products=0)
