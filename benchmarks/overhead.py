"""What a call of a compiled function costs beside the function itself: tiny functions, where
Python is everything.

python -m benchmarks.overhead [--quick] [--write]. Each row times one call of the plain function,
of its torch.func or torch.autograd counterpart where there is one, and of the jitted function. The
second table times the part of it that looks whether the Python state is as it was, and fetches the
tensors: for networks the larger part. Where there is a C++ compiler they become native code after
many calls."""

from __future__ import annotations

import timeit
from collections.abc import Callable

import torch
from torch import nn

import aotfunc
from aotfunc.runtime.guards.check import Check
from aotfunc.runtime.guards.reads import Names
from aotfunc.runtime.guards.state import look
from benchmarks.measure import Report, arguments, ms
from benchmarks.programs import resnet_module

SCALE = 2.0


def case_pointwise() -> tuple[Callable, Callable | None, tuple]:
    return (lambda x: torch.sin(x) * 2), None, (torch.randn(4),)


def case_closure() -> tuple[Callable, Callable | None, tuple]:
    w, b = torch.randn(4), 0.5
    return (lambda x: torch.sin(x * w) * SCALE + b), None, (torch.randn(4),)


def case_numbers() -> tuple[Callable, Callable | None, tuple]:
    return (
        (lambda x, y, a, flag, n=2: x * a + y if flag else y),
        None,
        (torch.randn(4), torch.randn(4), 0.5, True),
    )


def case_tree() -> tuple[Callable, Callable | None, tuple]:
    params = {f"w{i}": torch.randn(4) for i in range(8)}
    return (lambda p, x: {"y": p["w0"] * x, "z": p["w7"] + x}), None, (params, torch.randn(4))


def case_gradient() -> tuple[Callable, Callable | None, tuple]:
    def f(x):
        return (torch.sin(x) * x).sum()

    return aotfunc.grad(f), torch.func.grad(f), (torch.randn(4),)


def case_module() -> tuple[Callable, Callable | None, tuple]:
    layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)]
    net = nn.Sequential(*layers).requires_grad_(False)
    return net, None, (torch.randn(2, 8),)


def case_backward() -> tuple[Callable, Callable | None, tuple]:
    return (lambda x: (torch.sin(x) * x).sum()), None, (torch.randn(4, requires_grad=True),)


CASES: dict[str, Callable[[], tuple[Callable, Callable | None, tuple]]] = {
    "sin(x) * 2": case_pointwise,
    "with a closure and a global": case_closure,
    "two tensors, three Python values": case_numbers,
    "dictionary of 8 in, of 2 out": case_tree,
    "gradient, jit(grad(f))": case_gradient,
    "module of 4 Linear and Tanh": case_module,
    "forward and backward": case_backward,
}


def best(run: Callable[[], object], quick: bool) -> float:
    """Seconds of the quickest of many calls: what others do on the machine meanwhile costs no call
    less."""
    return min(timeit.repeat(run, number=10, repeat=50 if quick else 1000)) / 10


def measure(name: str, quick: bool) -> list[str]:
    f, theirs, args = CASES[name]()
    jitted = aotfunc.jit(f, backend="eager")
    torch.testing.assert_close(jitted(*args), f(*args))

    def called(g: Callable) -> Callable:
        if name != "forward and backward":
            return lambda: g(*args)
        return lambda: torch.autograd.grad(g(*args), args)

    runs = {"plain": called(f), "jit": called(jitted)}
    if theirs is not None:
        runs["torch"] = called(theirs)
    t = {kind: best(run, quick) for kind, run in runs.items()}
    return [
        name,
        ms(t["plain"]),
        ms(t.get("torch")),
        ms(t["jit"]),
        f"{(t['jit'] - t['plain']) * 1e6:+.1f} µs",
    ]


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "1 Linear": lambda: nn.Linear(8, 8),
    "MLP, 16 Linear and Tanh": lambda: nn.Sequential(
        *[m for _ in range(16) for m in (nn.Linear(8, 8), nn.Tanh())]
    ),
    "transformer, 12 layers": transformer,
    "ResNet-50-like": lambda: resnet_module(statistics=True),
}


def guards(name: str, quick: bool) -> list[str]:
    net = NETWORKS[name]()
    state = look(net, (), (), Names())
    check = Check(state)
    check.quicken(state.lines, state.paths)
    assert check.tensors(net, ()) is not None
    seconds = best(lambda: check.python(net, ()), quick)
    native = best(lambda: check.tensors(net, ()), quick) if check.native else None
    counts = [len(list(x())) for x in (net.modules, net.parameters, net.buffers)]
    each = f"{(native or seconds) / counts[0] * 1e6:.2f} µs"
    return [name, *map(str, counts), ms(seconds), ms(native), each]


def main() -> None:
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    report = Report("overhead", "The cost of a call", "python -m benchmarks.overhead")
    head = ["case", "plain", "torch.func", "jit", "jit - plain"]
    report.table(
        "Time per call, best of 1000", head, [measure(name, options.quick) for name in CASES]
    )
    head = ["network", "modules", "parameters", "buffers", "guards", "native", "per module"]
    report.table(
        "What the guards cost per call, best of 1000",
        head,
        [guards(name, options.quick) for name in NETWORKS],
    )
    if options.write:
        report.write()


if __name__ == "__main__":
    main()
