"""Complex numbers in kernels: their parts, at ordinary and special values, as in eager mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from aotfunc import grad, jit
from aotfunc.backends.loops import native
from tests.backends.test_cpp import SPECIAL, against_the_interpreter, floats, kernels_of
from tests.kernels import every_kernel
from tests.sweeps import every

pytestmark = pytest.mark.usefixtures("cache")
DTYPES = (torch.complex64, torch.complex128)

#: all pairs of these as numbers, and all pairs of such numbers
PARTS = [*SPECIAL[:5], 3e38, -1.5, 2.0]

FUNCTIONS = {
    "sums": lambda z, w: (z + w, z - w, 1 - z, z + 2.5, torch.add(z, w, alpha=2j)),
    "signs": lambda z, w: (-z, torch.conj_physical(z), z.sgn()),
    "products": lambda z, w: (z * w, z * 2.5, z * 1j, z * w.real, z.square(), z**2, z**3),
    "quotients": lambda z, w: (z / w, z / 2.5, 3 / z, z.reciprocal()),
    "both": lambda z, w: (torch.addcmul(z, z, w, value=2j), torch.addcdiv(z, z, w, value=2)),
    "reals": lambda z, w: (
        z.abs(),
        z.angle(),
        (z * 2).real,
        (z * 2).imag + z.real,
        z.imag.angle(),
    ),
    "made": lambda z, w: (torch.complex(z.real, w.imag), torch.polar(z.real, w.imag)),
    "choices": lambda z, w: (torch.where(z.real > 0, z, w), z.masked_fill(z.real > 0, 2 + 1j)),
    "comparisons": lambda z, w: (z == w, z != w, z == 2, z.isnan()),
    "dtypes": lambda z, w: (z.real * w, z.to(torch.complex128) * 2, (z.real > 0) * w),
    "exponentials": lambda z, w: (z.exp(),),
    "moved": lambda z, w: (torch.cat([z, w * 2]), torch.stack([z, w]) * 2, z.flip(0) + w),
}


def agree(f, *args: Tensor, kernels: int | None = None, rtol: float = 1e-5) -> None:
    """Compare numbers, of which parts that are not finite are equal, and layouts."""
    made = len(every_kernel.made)
    got, want = jit(f, backend=every_kernel)(*args), f(*args)
    pairs = zip(*[[x] if isinstance(x, Tensor) else x for x in (got, want)], strict=True)
    for a, b in pairs:
        assert a.dtype is b.dtype and a.stride() == b.stride()
        if a.is_complex():
            scale = b.abs().unsqueeze(-1)
            a, b = torch.view_as_real(a), torch.view_as_real(b.resolve_conj())
            near = (a - b).abs() <= rtol * scale
            a = torch.where(near & scale.isfinite(), b, a)
        assert_close(a, b, equal_nan=True, rtol=rtol, atol=0)
    assert kernels is None or len(every_kernel.made) - made == kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_functions(dtype):
    """All in one program, as each would take the compiler a second."""
    real = torch.tensor(PARTS, dtype=dtype.to_real())
    z = torch.complex(real.repeat_interleave(len(real)), real.repeat(len(real)))
    z, w = z.repeat_interleave(len(z)), z.repeat(len(z))
    outs = lambda z, w: tuple([y for f in FUNCTIONS.values() for y in f(z, w)])
    agree(outs, z, w)


def complexes(*shape: int, dtype=torch.complex64) -> Tensor:
    return torch.complex(*[floats(*shape, dtype=dtype.to_real()) for _ in range(2)])


LAID_OUT = {
    "rows": (lambda z, w: ((z * w).sum(1), (z + w).mean(-1)), (5, 19), (19,)),
    "columns": (lambda z, w: (z * w).sum(0), (37, 19), (19,)),
    "all": (lambda z, w: (z * w).sum(), (37, 19), (19,)),
    "transposed": (lambda z, w: z.t() * w + 1j, (19, 37), (19,)),
    "strided": (lambda z, w: z[::2, 1:] * w, (9, 20), (19,)),
    "a scan": (lambda z, w: (z * w).cumsum(0), (9, 20), (20,)),
    "indexed": (lambda z, w: (z * 2)[w.real.argsort()] * w[:, None], (9, 5), (9,)),
    "one number": (lambda z, w: z * w, (), ()),
    "nothing": (lambda z, w: z * w, (0, 3), (3,)),
    "parts": (lambda z, w: (z * w).real.sin() + (z * w).imag, (9, 5), (5,)),
    "parts of rows": (lambda z, w: (z * w).real.sum(0) * (z.abs() + 1), (9, 5), (5,)),
    "parts as numbers": (lambda z, w: torch.view_as_real(z * w) * 2, (9, 5), (5,)),
    "of parts": (
        lambda z, w: torch.view_as_complex(torch.view_as_real(z) * 2) * w + 1,
        (9, 5),
        (5,),
    ),
    "a conjugate": (lambda z, w: z.conj() * w.conj() + z.conj().real, (9, 5), (5,)),
}


@pytest.mark.parametrize("case", every(3, LAID_OUT))
def test_layouts(case):
    """Of values, and of the arguments' gradients, whose kernels are interpreted, too."""
    f, *shapes = LAID_OUT[case]
    args = [complexes(*shape) for shape in shapes]
    agree(f, *args)

    def loss(*args: Tensor) -> Tensor:
        outs = f(*args)
        return sum((y.abs() ** 2).sum() for y in (outs if isinstance(outs, tuple) else (outs,)))

    agree(grad(loss, argnums=(0, 1)), *args, rtol=1e-4)
    for kernel in kernels_of(grad(loss, argnums=(0, 1)), *args)[:1]:
        against_the_interpreter(kernel)


def test_gradients_of_the_second_order():
    f = lambda z: ((z * z / (z + 2)).exp().abs() * z.angle()).sum()
    z = complexes(7, dtype=torch.complex128).requires_grad_()
    seconds = []
    for g in (f, jit(f, backend="cpp")):
        (first,) = torch.autograd.grad(g(z), z, create_graph=True)
        seconds.append(torch.autograd.grad((first.abs() ** 2).sum(), z))
    assert_close(*seconds)


def test_conjugated_memory():
    """A function that was compiled for plain memory is called with conjugated, and back."""
    f = lambda z: (z * (1 + 2j)).exp() * 2
    plain = complexes(5, 3)
    ours = jit(f, backend="cpp")
    for z in (plain, plain.conj(), plain.t(), plain.conj().t(), plain, plain.conj()):
        assert_close(ours(z), f(z))
        assert_close(ours(z.detach().requires_grad_()), f(z))
    g = lambda z: (z.mH @ z).conj().real.exp() + (torch.linalg.eigh(z.mH @ z)[1].conj() * 2).abs()
    assert_close(jit(g, backend="cpp")(plain.to(torch.complex128)), g(plain.to(torch.complex128)))


def test_ten_sizes_are_compiled_once(cache):
    step = jit(grad(lambda w, z: ((z * w).mean(0).abs() ** 2).sum()), backend="cpp")
    for n in range(2, 12):
        step(complexes(19), complexes(n, 19))
    assert step.captures == 10 and len(native.LOADED) == 1


def test_vectors_lie_along_memory():
    """Not along the indices of a look-up; what is transposed is read in blocks."""
    z, i = complexes(16, 16), torch.arange(16)
    (kernel,) = kernels_of(lambda z, i: z[i], z, i)
    assert (kernel.vector, kernel.cross) == (1, -1)
    (kernel,) = kernels_of(lambda z, w: z.t() * w, z, z * 2)
    assert kernel.vector + kernel.cross == 1
