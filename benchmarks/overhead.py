"""What a call of a compiled function costs beside the function itself: tiny functions, where
Python is everything.

python -m benchmarks.overhead [--quick] [--write]. Each row times one call of the plain function,
of its torch.func counterpart where there is one, and of the jitted function. The second table
times calls with their backward, beside torch.compile and AOTAutograd. The third times the part of
a call that looks whether the Python state is as it was, and fetches the tensors: for networks the
larger part. Where there is a C++ compiler they, and the nodes of autograd, become native code
after many calls: here before the first."""

from __future__ import annotations

import math
import timeit
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._functorch import aot_autograd
from torch._functorch.compilers import nop

import aotfunc
from aotfunc.runtime.guards.check import Check
from aotfunc.runtime.guards.reads import Names
from aotfunc.runtime.guards.state import look
from aotfunc.runtime.native_node import nodes
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


CASES: dict[str, Callable[[], tuple[Callable, Callable | None, tuple]]] = {
    "sin(x) * 2": case_pointwise,
    "with a closure and a global": case_closure,
    "two tensors, three Python values": case_numbers,
    "dictionary of 8 in, of 2 out": case_tree,
    "gradient, jit(grad(f))": case_gradient,
    "module of 4 Linear and Tanh": case_module,
}


def small(x: Tensor, w: Tensor) -> Tensor:
    return (torch.sin(x) * w).sum()


def several(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return torch.tanh(x * w), (x * w.exp()).sum()


#: functions with the tensors that they are differentiated by
BACKWARDS: dict[str, Callable[[], tuple[Callable, tuple]]] = {
    "three ops": lambda: (small, (torch.randn(4), torch.randn(4))),
    "two results": lambda: (several, (torch.randn(4), torch.randn(4))),
    "module of 4 Linear and Tanh": lambda: (case_module()[0], (torch.randn(2, 8),)),
}


def best(runs: dict[str, Callable[[], object]], quick: bool) -> dict[str, float]:
    """Return the seconds of the quickest of many calls, which take turns: what others do on the
    machine meanwhile costs no call less."""
    found = dict.fromkeys(runs, math.inf)
    for _ in range(50 if quick else 1000):
        for name, run in runs.items():
            found[name] = min(found[name], timeit.timeit(run, number=10) / 10)
    return found


def measure(name: str, quick: bool) -> list[str]:
    f, theirs, args = CASES[name]()
    jitted = aotfunc.jit(f, backend="eager")
    torch.testing.assert_close(jitted(*args), f(*args))
    runs = {"plain": lambda: f(*args), "jit": lambda: jitted(*args)}
    if theirs is not None:
        runs["torch"] = lambda: theirs(*args)
    t = best(runs, quick)
    return [
        name,
        ms(t["plain"]),
        ms(t.get("torch")),
        ms(t["jit"]),
        f"{(t['jit'] - t['plain']) * 1e6:+.1f} µs",
    ]


def measure_backward(name: str, quick: bool) -> list[str]:
    """Time a call and the gradients of the sum of its results."""
    f, args = BACKWARDS[name]()
    wrt = [x.requires_grad_() for x in args]
    if isinstance(f, nn.Module):
        wrt += f.requires_grad_().parameters()
    ways = {
        "plain": f,
        "eager": aotfunc.jit(f, backend="eager"),
        "cpp": aotfunc.jit(f, backend="cpp"),
        "torch.compile": torch.compile(f),
        "AOTAutograd": aot_autograd.aot_module(f, nop)
        if isinstance(f, nn.Module)
        else aot_autograd.aot_function(f, nop),
    }

    def called(f: Callable) -> Callable:
        def run() -> tuple:
            outs = f(*args)
            outs = (outs,) if isinstance(outs, Tensor) else outs
            return torch.autograd.grad([o.sum() for o in outs], wrt)

        return run

    runs = {way: called(g) for way, g in ways.items()}
    for run in runs.values():
        torch.testing.assert_close(run(), runs["plain"]())
    t = best(runs, quick)
    return [name, *[ms(x) for x in t.values()], *[f"{t[x] / t['plain']:.2f}" for x in OURS]]


#: our backends
OURS = ("eager", "cpp")


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
    runs = {"python": lambda: check.python(net, ())}
    if check.native:
        runs["native"] = lambda: check.tensors(net, ())
    seconds, native = (best(runs, quick).get(way) for way in ("python", "native"))
    counts = [len(list(x())) for x in (net.modules, net.parameters, net.buffers)]
    each = f"{(native or seconds) / counts[0] * 1e6:.2f} µs"
    return [name, *map(str, counts), ms(seconds), ms(native), each]


def main() -> None:
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    if nodes().library is None:
        nodes().compile()
    report = Report("overhead", "The cost of a call", "python -m benchmarks.overhead")
    head = ["case", "plain", "torch.func", "jit", "jit - plain"]
    report.table(
        "Time per call, best of 1000", head, [measure(name, options.quick) for name in CASES]
    )
    head = ["case", "plain", "jit, eager", "jit, cpp", "torch.compile", "AOTAutograd"]
    report.table(
        "Forward and backward, best of 1000",
        [*head, "eager : plain", "cpp : plain"],
        [measure_backward(name, options.quick) for name in BACKWARDS],
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
