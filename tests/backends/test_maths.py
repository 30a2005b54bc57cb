"""The C++ backend's maths: two units in the last place at most, right on special values, the same
for a number as in any lane of a vector; and the polynomials are those that are fitted."""

import re
from pathlib import Path

import pytest
import torch

from aotfunc.backends.loops import native
from aotfunc.backends.loops.native import PRELUDE, load_kernels
from benchmarks import fit_polynomials
from benchmarks.maths import BINARY, UNARY, error, largest, largest_double, ours, right, samples


@pytest.mark.parametrize("name", [*UNARY, *BINARY])
def test_units_in_the_last_place(name):
    assert largest(name, 100_000) <= 2
    assert largest_double(name, 20) <= 2


@pytest.mark.parametrize("name", [*UNARY, *BINARY])
def test_special_values_of_doubles(name):
    """NaN, infinities and signed zeros are where PyTorch's are."""
    x, y = samples(torch.float64, 0)
    out, expected = ours(name, x, y), right(name, x, y)
    if name in ("sinh", "cosh", "sigmoid", "lgamma"):  # differ in how far they reach
        keep = x.abs() < (88 if name == "sigmoid" else 700)
        x, y, out, expected = x[keep], y[keep], out[keep], expected[keep]
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())
    zero = expected == 0
    assert torch.equal(out[zero].signbit(), expected[zero].signbit())
    assert torch.equal(out[zero].abs(), expected[zero])


@pytest.mark.parametrize("t, dtype", [("float", torch.float32), ("double", torch.float64)])
def test_a_number_as_in_a_vector(t, dtype):
    body = "".join(
        f"out[{i} * n + i] = aot_{name}(x[i]{', y[i]' if name in BINARY else ''});"
        for i, name in enumerate([*UNARY, *BINARY])
    )
    source = f"""
extern "C" void kernel(int64_t begin, int64_t end, const int64_t *sizes, void *const *buffers) {{
  {t} *out = ({t} *)buffers[0], *x = ({t} *)buffers[1], *y = ({t} *)buffers[2];
  int64_t n = sizes[0];
  for (int64_t i = begin; i < end; i++) {{ {body} }}
}}"""
    x, y = samples(dtype, 100)
    out = torch.empty(len(UNARY) + len(BINARY), len(x), dtype=dtype)
    load_kernels(PRELUDE + source)["kernel"](len(x), (len(x),), (out, x, y))
    for one, name in zip(out, [*UNARY, *BINARY]):
        torch.testing.assert_close(one, ours(name, x, y), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "name", ["max", "min", "relu", "abs", "sign", "round", "trunc", "copysign"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_ones(name, dtype, monkeypatch):
    two = name in ("max", "min", "copysign")
    if two:
        monkeypatch.setattr("benchmarks.maths.BINARY", (name,))
    x, y = samples(dtype, 1000)
    f = {"max": torch.maximum, "min": torch.minimum}.get(name) or getattr(torch, name)
    expected = f(x, y) if two else f(x)
    torch.testing.assert_close(ours(name, x, y), expected, rtol=0, atol=0, equal_nan=True)


def test_the_error_is_measured():
    x = torch.tensor([1.0, 2.0, float("inf"), -0.0])
    assert error(x, x.double()).max() == 0
    off = torch.tensor([1.0, 2.0, 0.0]).nextafter(torch.tensor(9.0))
    assert error(off, torch.tensor([1.0, 2.0, 0.0]).double()).tolist() == [1, 1, 1]
    assert error(torch.tensor([0.0]), torch.tensor([-0.0]).double()).item() == torch.inf


#: a coefficient, as C++ and as Python write it
NUMBER = re.compile(r"(-?0x[0-9a-f.]+p[-+]?\d+)f?")


def test_polynomials_are_those_that_are_fitted():
    """But for what least squares make of another processor's roundings."""
    there = Path(native.__file__).with_name("polynomials.h").read_text()
    fitted = fit_polynomials.header()
    assert NUMBER.sub("#", fitted).split() == NUMBER.sub("#", there).split()
    for x, y in zip(NUMBER.findall(fitted), NUMBER.findall(there), strict=True):
        assert float.fromhex(x) == pytest.approx(float.fromhex(y), rel=1e-3)
