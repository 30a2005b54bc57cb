"""Kernels are called on tensors, with any number of threads, and float16 and bfloat16 are stored
as PyTorch stores them."""

import os
import threading

import pytest
import torch

from aotfunc.backends.loops.native import PRELUDE, load_kernels

C_TYPE = {
    torch.float32: ("float", "floats"),
    torch.bfloat16: ("bf16", "floats"),
    torch.float16: ("f16", "floats"),
    torch.float64: ("double", "doubles"),
}


def pointwise(name: str, expression: str, dtype: torch.dtype) -> str:
    """A kernel that computes ``expression`` of ``x``, element by element."""
    t, v = C_TYPE[dtype]
    return f"""
extern "C" void {name}(int64_t begin, int64_t end, const int64_t *, void *const *buffers) {{
  const {t} *in = (const {t} *)buffers[0];
  {t} *out = ({t} *)buffers[1];
  for (int64_t i = begin; i < end; i += aot_lanes<{v}>) {{
    auto x = aot_get<{v}>(in + i, end - i);
    aot_put(out + i, {expression}, end - i);
  }}
}}
"""


def applied(expression: str, x: torch.Tensor) -> torch.Tensor:
    """``expression`` of every element of ``x``."""
    out = torch.empty_like(x)
    kernel = load_kernels(PRELUDE + pointwise("kernel", expression, x.dtype))["kernel"]
    kernel(x.numel(), (), (x, out))
    return out


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 100_003])
@pytest.mark.parametrize("dtype", C_TYPE)
def test_every_element_once(two_threads, dtype, n):
    x = torch.randn(n).to(dtype)
    assert torch.equal(applied("x + x", x), x + x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half(dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    torch.testing.assert_close(applied("x", x), x, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype, name", [(torch.bfloat16, "bf16"), (torch.float16, "f16")])
def test_rounding_to_halves(dtype, name):
    """Every float whose upper 24 bits are any and whose lowest are 0 or 1."""
    bits = torch.arange(-(2**23), 2**23, dtype=torch.int32) * 256
    x = torch.cat([bits, bits + 1]).view(torch.float32)
    expected = x.to(dtype).float()
    torch.testing.assert_close(
        applied(f"aot_as_{name}(x)", x), expected, rtol=0, atol=0, equal_nan=True
    )


def test_strides_and_tails():
    source = """
extern "C" void kernel(int64_t begin, int64_t end, const int64_t *sizes, void *const *buffers) {
  for (int64_t i = begin; i < end; i++)
    aot_put((float *)buffers[1] + i * 5,
            aot_gather<floats>((float *)buffers[0] + i, 5, sizes[0]), 5);
}"""
    x, out = torch.randn(5, 3), torch.empty(3, 5)
    load_kernels(PRELUDE + source)["kernel"](3, (3,), (x, out))
    assert torch.equal(out, x.T)


def test_from_several_threads(two_threads):
    x = torch.randn(300_000)
    outs = []
    workers = [threading.Thread(target=lambda: outs.append(applied("x * x", x))) for _ in range(8)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert len(outs) == 8 and all(torch.equal(out, x * x) for out in outs)


def test_in_a_forked_child(two_threads):
    x = torch.randn(300_000)
    applied("x * 3", x)  # the parent's threads run
    pid = os.fork()
    if not pid:
        os._exit(0 if bool((applied("x * 3", x).numpy() == x.numpy() * 3).all()) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
