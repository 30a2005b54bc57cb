"""What it costs to call a kernel: the native form of a launch, its plain form, and eager PyTorch.

python -m benchmarks.launch [--quick] [--write]. Each row adds two vectors of float32."""

from __future__ import annotations

import time
import timeit

import torch

from aotfunc.backends.loops.launch import Launch, native_form
from aotfunc.backends.loops.native import PRELUDE, load_kernels
from benchmarks.measure import Report, arguments, ms

SOURCE = """
extern "C" void add(int64_t begin, int64_t end, const int64_t *, void *const *buffers) {
  const float *x = (const float *)buffers[0], *y = (const float *)buffers[1];
  float *out = (float *)buffers[2];
  for (int64_t i = begin; i < end; i += FLOATS)
    aot_put(out + i, aot_get<floats>(x + i, end - i) + aot_get<floats>(y + i, end - i), end - i);
}"""


def row(n: int, quick: bool) -> list[str]:
    launch = Launch(
        load_kernels(PRELUDE + SOURCE)["add"], n, (), [((n,), (1,), torch.float32)], (0, 1, 2)
    )
    x, y = torch.randn(2, n)
    assert torch.equal(launch(x, y), x + y)
    number, repeat = 10_000_000 // (n + 10_000), 5 if quick else 50
    calls = (launch.entry, launch, launch.plain, torch.add)
    # what others do on the machine meanwhile makes no call quicker
    times = [
        min(
            timeit.repeat(
                "f(x, y)", number=number, repeat=repeat, globals={"f": f, "x": x, "y": y}
            )
        )
        for f in calls
    ]
    return [f"{n:,}", *[f"{t / number * 1e6:.2f} µs" for t in times]]


def main() -> None:
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    found = native_form() is not None
    seconds = time.perf_counter() - start
    report = Report("launch", "The cost of calling a kernel", "python -m benchmarks.launch")
    report.note(f"The native form was {'made' if found else 'not to be had'} in {ms(seconds)}.")
    head = ["elements", "launch.entry", "launch", "plain form", "torch.add"]
    sizes = (0, 64, 4096, 1_000_000)
    report.table("Time per call, best of 50", head, [row(n, options.quick) for n in sizes])
    if options.write:
        report.write()


if __name__ == "__main__":
    main()
