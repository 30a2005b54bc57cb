"""Forward and backward on a GPU: aot_function with Inductor beside eager PyTorch and
torch.compile.

python -m benchmarks.gpu [--cpu] [--tiny] [--write]. Fused pointwise chains and a transformer
block; results and gradients are compared before anything is timed."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

import aotfunc
from benchmarks.measure import Report, arguments, interleaved, ms, ratio, timed

Case = tuple[Callable, list[torch.Tensor]]


def chain(device: str, ops: int, size: int) -> Case:
    def f(x, y):
        for _ in range(ops // 4):
            x = torch.tanh(x * y + 0.5) + torch.sin(x)
        return x

    return f, [torch.randn(size, device=device, requires_grad=True) for _ in range(2)]


def bias_gelu_scale(device: str, rows: int, width: int) -> Case:
    """A bias, a GELU, a scale and a residual: what sits between two matrix products."""

    def f(x, bias, scale, residual):
        return F.gelu(x + bias) * scale + residual

    shapes = [(rows, width), (width,), (width,), (rows, width)]
    return f, [torch.randn(s, device=device, requires_grad=True) for s in shapes]


def transformer_block(device: str, batch: int, length: int, width: int, heads: int) -> Case:
    def f(x, qkv, out, up, down, g1, b1, g2, b2):
        h = F.layer_norm(x, (width,), g1, b1)
        q, k, v = (
            F.linear(h, qkv).view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        )
        scores = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(width // heads), -1)
        x = x + F.linear((scores @ v).transpose(1, 2).reshape(batch, length, width), out)
        h = F.layer_norm(x, (width,), g2, b2)
        return x + F.linear(F.gelu(F.linear(h, up)), down)

    weights = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    args = [torch.randn(batch, length, width)]
    args += [torch.randn(s) / math.sqrt(s[-1]) for s in weights]
    args += [torch.ones(width), torch.zeros(width), torch.ones(width), torch.zeros(width)]
    return f, [a.to(device).requires_grad_() for a in args]


def cases(device: str, tiny: bool) -> dict[str, Case]:
    n = 2**10 if tiny else 2**24
    rows, width = (8, 64) if tiny else (16384, 1024)
    block = (2, 8, 32, 4) if tiny else (8, 512, 1024, 16)
    return {
        f"chain of 16, {n:,}": chain(device, 16, n),
        f"chain of 64, {n:,}": chain(device, 64, n),
        f"bias, GELU, scale, residual, {rows}x{width}": bias_gelu_scale(device, rows, width),
        f"transformer block, {'x'.join(map(str, block[:3]))}": transformer_block(device, *block),
    }


def step(f: Callable, args: list[torch.Tensor]) -> Callable[[], tuple[torch.Tensor, ...]]:
    """One forward and backward, gradients returned instead of accumulated."""
    cotangent = torch.ones_like(f(*args))

    def run():
        out = f(*args)
        return (out, *torch.autograd.grad(out, args, cotangent))

    return run


def rivals(f: Callable, backends: list[str]) -> dict[str, Callable]:
    min_cut = aotfunc.min_cut_rematerialization_partition
    made = {
        f"aot_function, {b}": aotfunc.aot_function(f, b, partition_fn=min_cut) for b in backends
    }
    return {"eager": f, "torch.compile": torch.compile(f), **made}


def peak(run: Callable[[], object]) -> int:
    """Bytes above what was allocated before, at the worst moment of one step."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cpu", action="store_true", help="on the CPU (does it run?)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes")
    parser.add_argument(
        "--backends",
        nargs="+",
        default=["inductor"],
        help="backends of aot_function (default inductor)",
    )
    options = parser.parse_args()
    device = "cpu" if options.cpu or not torch.cuda.is_available() else "cuda"
    sync = torch.cuda.synchronize if device == "cuda" else None
    torch.manual_seed(0)
    if device == "cpu":
        torch.set_num_threads(options.threads)
    report = Report("gpu", "Forward and backward", "python -m benchmarks.gpu")
    rows = []
    for name, (f, args) in cases(device, options.tiny or options.quick).items():
        steps, first = {}, {}
        expected = step(f, args)()
        for rival, g in rivals(f, options.backends).items():
            first[rival] = timed(lambda g=g, args=args: step(g, args)(), sync)
            steps[rival] = step(g, args)
            torch.testing.assert_close(steps[rival](), expected, rtol=2e-2, atol=2e-2)
        times = interleaved(
            steps,
            rounds=1 if options.tiny else 3,
            budget_s=0.05 if options.tiny else 0.5,
            sync=sync,
        )
        for rival, seconds in times.items():
            memory = f"{peak(steps[rival]) / 2**20:.0f} MiB" if device == "cuda" else "-"
            rows.append(
                [
                    name,
                    rival,
                    ms(seconds),
                    ratio(times["eager"], seconds),
                    memory,
                    ms(first[rival]),
                ]
            )
    head = ["program", "by", "forward + backward", "eager/this", "peak above inputs", "first call"]
    report.table(f"Medians on {device}", head, rows)
    if options.write:
        report.write()


if __name__ == "__main__":
    main()
