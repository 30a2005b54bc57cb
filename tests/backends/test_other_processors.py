"""Without AVX2, FMA and Sleef the same sources compile, and their results are as accurate."""

import pytest
import torch
from torch.testing import assert_close

from aotfunc import jit
from aotfunc.backends.loops import matmul
from aotfunc.native import toolchain
from benchmarks.maths import BINARY, UNARY, largest
from tests.kernels import every_kernel

from .test_native import applied


@pytest.fixture(params=["-march=x86-64", "-march=x86-64-v2", "-march=x86-64-v3"])
def plain(request, cache, monkeypatch):
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("the flags are those of x86-64")
    flags = [request.param if f == "-march=native" else f for f in toolchain.FLAGS]
    monkeypatch.setattr(toolchain, "flags", lambda: tuple(flags))


@pytest.mark.parametrize("name", [*UNARY, *BINARY])
def test_units_in_the_last_place(plain, name):
    own = name not in ("log10", "erfc", "lgamma")  # the C library's
    assert largest(name, 10_000) <= (2 if own else 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves(plain, dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    assert_close(applied("x", x), x, rtol=0, atol=0, equal_nan=True)
    bits = torch.arange(-(2**19), 2**19, dtype=torch.int32) * 4096
    y = torch.cat([bits, bits + 1, bits + 2048]).view(torch.float32)
    name = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    assert_close(
        applied(f"aot_as_{name}(x)", y), y.to(dtype).float(), rtol=0, atol=0, equal_nan=True
    )


def test_kernels(plain):
    """Blocks of rows, values added where indices say, look-ups, transposed memory."""
    x, y, i = torch.randn(70, 37), torch.randn(37, 70), torch.randint(70, (50,))

    def f(x, y, i):
        e = (x * y.t()).exp()
        added = torch.zeros(70, 37).index_put((i,), x[i].sin(), accumulate=True)
        return e / e.sum(-1, keepdim=True), e.sum(0), added, y.t().contiguous()

    for a, b in zip(jit(f, backend=every_kernel)(x, y, i), f(x, y, i), strict=True):
        assert_close(a, b)


def test_products(plain):
    """Of matrices, with rows and columns left over."""
    matmul.kernel.cache_clear()
    try:
        x, y = torch.randn(53, 300), torch.randn(70, 300)
        for f in (lambda x, y: x @ y.t(), lambda x, y: y.t() @ y[:, :45], lambda x, y: x @ y[0]):
            assert_close(jit(f, backend=every_kernel)(x, y), f(x, y), rtol=1e-5, atol=1e-4)
    finally:
        matmul.kernel.cache_clear()
