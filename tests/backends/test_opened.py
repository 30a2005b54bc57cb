"""Ops that become kernels of simpler ones: as near to float64 as eager mode, in each layout."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from aotfunc import jit
from tests.kernels import every_kernel

pytestmark = pytest.mark.usefixtures("cache")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def batch_norm(x, w, b):
    return F.batch_norm(x, None, None, w, b, True)


def with_statistics(training):
    def f(x, w, b):
        mean, var = b.detach() / 2, w.detach().abs() + 0.5
        return F.batch_norm(x, mean, var, w, b, training), mean, var

    return f


#: functions of x and of two vectors, one value for each channel
CHANNELS = {
    "batch norm": batch_norm,
    "batch norm in training": with_statistics(True),
    "batch norm in use": with_statistics(False),
    "batch norm alone": lambda x, w, b: F.batch_norm(x, None, None, None, None, True) * 2,
    "group norm": lambda x, w, b: F.group_norm(x, 2, w, b),
    "group norm alone": lambda x, w, b: F.group_norm(x, 3),
    "instance norm": lambda x, w, b: F.instance_norm(x, None, None, w, b),
}

#: functions of x and of two rows
ROWS = {
    "layer norm": lambda x, w, b: F.layer_norm(x, w.shape, w, b),
    "layer norm alone": lambda x, w, b: F.layer_norm(x, w.shape),
    "rms norm": lambda x, w, b: F.rms_norm(x, w.shape, w),
    "variances": lambda x, w, b: (x.std(-1), x.var(0), x.var((0, -1), correction=0)),
    "softmax": lambda x, w, b: (x.softmax(-1), (x + w).log_softmax(0)),
    "a loss": lambda x, w, b: F.mse_loss(x * w, (x + b).detach()),
}

LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
}
#: each dtype, and each layout
EACH = [("contiguous", d) for d in DTYPES] + [(k, torch.float32) for k in [*LAYOUTS][1:]]


def gradients(f, args, dtype):
    """Results, and gradients of sums of them that weigh each element differently."""
    leaves = [a.to(dtype).detach().requires_grad_() for a in args]
    outs = f(*leaves)
    outs = [outs] if isinstance(outs, torch.Tensor) else list(outs)
    loss = sum(
        [(o * torch.linspace(-1, 1, o.numel()).view(o.shape).to(o.dtype)).sum() for o in outs]
    )
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [*outs, *[g for g in found if g is not None]]


def error(found, exact):
    """The largest one, beside the largest value."""
    return [
        ((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-3)).item()
        for a, b in zip(found, exact, strict=True)
    ]


def near(f, args, dtype):
    """As near to float64 as eager mode is, or within few roundings."""
    args = [a.to(dtype) for a in args]
    exact = gradients(f, args, torch.float64)
    want = gradients(f, args, dtype)
    got = gradients(jit(f, backend=every_kernel), args, dtype)
    for g, w in zip(got, want, strict=True):
        assert g.dtype is w.dtype and g.stride() == w.stride()
    few = max(64 * torch.finfo(dtype).eps, 1e-11)
    for ours, eager in zip(error(got, exact), error(want, exact), strict=True):
        assert ours <= max(few, 2 * eager)


@pytest.mark.parametrize(("layout", "dtype"), EACH, ids=str)
@pytest.mark.parametrize("case", CHANNELS)
def test_channels(case, layout, dtype):
    x = LAYOUTS[layout](torch.randn(5, 6, 4, 7).to(dtype) * 2 + 1)
    near(CHANNELS[case], (x, torch.rand(6) + 0.5, torch.randn(6)), dtype)


@pytest.mark.parametrize(("layout", "dtype"), EACH, ids=str)
@pytest.mark.parametrize("case", ROWS)
def test_rows(case, layout, dtype):
    x = LAYOUTS[layout](torch.randn(19, 37).to(dtype) * 2 + 1)
    near(ROWS[case], (x, torch.rand(37) + 0.5, torch.randn(37)), dtype)


@pytest.mark.parametrize("shape", [(6, 3), (1, 3, 5), (2, 3, 1, 1), (2, 3, 0), (4, 3, 2, 2, 2)])
@pytest.mark.parametrize("case", [c for c in CHANNELS if "group" not in c])
def test_shapes(case, shape):
    x = torch.randn(shape)
    args = (x, torch.rand(3) + 0.5, torch.randn(3))
    try:
        want = CHANNELS[case](*args)
    except (ValueError, RuntimeError):
        return  # of one value there is no variance
    assert_close(jit(CHANNELS[case], backend=every_kernel)(*args), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*CHANNELS, *ROWS])
def test_special_values(case, dtype):
    """One element that is NaN or infinite."""
    f = (CHANNELS | ROWS)[case]
    compiled = jit(f, backend=every_kernel)
    if case in CHANNELS:
        args = (torch.randn(3, 6, 5).to(dtype), *[torch.rand(6).to(dtype) for _ in "wb"])
    else:
        args = (torch.randn(5, 37).to(dtype), *[torch.rand(37).to(dtype) for _ in "wb"])
    unit = max(1e-5, 8 * torch.finfo(dtype).eps)
    for value in (math.nan, math.inf, -math.inf):
        args[0].view(-1)[17] = value
        assert_close(compiled(*args), f(*args), equal_nan=True, rtol=unit, atol=unit)


def test_nothing_is_normalised():
    """Gradients of norms of no rows."""
    for f in (F.layer_norm, F.rms_norm):
        norm = lambda x, w, f=f: f(x, (5,), w)
        x, w = torch.randn(0, 3, 5), torch.rand(5)
        found = gradients(jit(norm, backend=every_kernel), (x, w), torch.float32)
        for got, want in zip(found, gradients(norm, (x, w), torch.float32), strict=True):
            assert_close(got, want)


@pytest.mark.parametrize("shape", [(), (5,), (1, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_small_product_and_a_bias(shape, dtype):
    """Dtypes that differ are refused, as by the op."""
    bias, x, y = torch.randn(shape), torch.randn(3, 4, dtype=dtype), torch.randn(4, 5, dtype=dtype)
    f = jit(torch.addmm, backend="cpp")
    if dtype is torch.float64:
        with pytest.raises(RuntimeError, match="same dtype"):
            f(bias, x, y)
    assert_close(f(bias.to(dtype), x, y), torch.addmm(bias.to(dtype), x, y))
    batch = torch.randn(2, 3, 4, dtype=dtype), torch.randn(2, 4, 5, dtype=dtype)
    biases = bias.to(dtype).expand(2, 3, 5)
    assert_close(jit(torch.baddbmm, backend="cpp")(biases, *batch), biases + batch[0] @ batch[1])


#: rows whose numbers are equal, or differ by less than they are rounded by
NEAR = {
    "equal": torch.full((4, 772), 1000.1),
    "equal, large": torch.full((4, 772), 1e8),
    "nearly equal": 1000.1 + 1e-4 * torch.arange(772.0).sin().repeat(4, 1),
    "far from zero": 1e6 + torch.arange(772.0).sin().repeat(4, 1),
}


@pytest.mark.parametrize("rows", NEAR)
def test_rows_far_from_zero(rows):
    """The mean is corrected by what it leaves: differences are float64's, and variances not
    negative."""
    x = NEAR[rows]
    split = (2, 4, 193, 2)

    def f(x):
        images = x.reshape(split)
        return [
            *(F.layer_norm(x, x.shape[1:]), F.group_norm(images, 2), F.instance_norm(images)),
            *(F.batch_norm(images, None, None, None, None, True), x.var(1), x.t().std(0)),
        ]

    want = [y.float() for y in f(x.double())]
    assert_close(jit(f, backend=every_kernel)(x), want, rtol=1e-5, atol=1e-5)
