"""Transforms called on real tensors: un-jitted and jit(backend="eager") beside torch.func eager.

python -m benchmarks.eager [--quick] [--write]. Rivals are timed in turns within one process;
"first" is the first call of a new function in a warm process, "again" the second and later ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

import aotfunc
from benchmarks.measure import Report, arguments, interleaved, ms, ratio, timed
from benchmarks.programs import conv_net

Case = tuple[Callable, Callable, tuple]


def pointwise(x):
    return (torch.sin(x) * x + torch.tanh(x)).sum()


def regression(w, x, t):
    return (torch.relu(w @ x) - t).square().mean()


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def relaxed(x):
    """A loop of 100 steps that do next to nothing."""
    for _ in range(100):
        x = x + 0.01 * (x.sin() - x)
    return x.sum()


def chain(angles):
    """The end of an arm of 8 links."""
    pose = torch.eye(3)
    for a in angles:
        zero, one = torch.zeros_like(a), torch.ones_like(a)
        turn = torch.stack(
            [a.cos(), -a.sin(), zero, a.sin(), a.cos(), zero, zero, zero, one]
        ).view(3, 3)
        pose = pose @ (turn + torch.eye(3))
    return pose[:, 2]


def with_new_sizes(f: Callable) -> Callable:
    """``f`` of another batch at each call, of a size that was not seen before (among the first
    400)."""
    sizes = itertools.cycle(range(4, 404))
    return lambda: f(torch.linspace(-1, 1, 8 * 404).view(404, 8)[: next(sizes)])


def both(build: Callable[[object], Callable], *args) -> Case:
    """The same transformed function from torch.func and from aotfunc."""
    return build(torch.func), build(aotfunc), args


def conv_case(batch: int, width: int, image: int) -> Case:
    loss, params = conv_net(width, image)
    x, t = torch.randn(batch, 1, image, image), torch.arange(batch) % 10
    return both(lambda m: m.vmap(m.grad(loss), in_dims=(None, 0, 0)), params, x, t)


def jacobian_case(batch: int, width: int, image: int) -> Case:
    net, x = conv_logits(width, image), torch.randn(batch, 1, image, image)
    return both(lambda m: m.vmap(m.jacrev(net)), x)


def conv_logits(width: int, image: int) -> Callable:
    kernel, out = torch.randn(width, 1, 3, 3), torch.randn(10, width * (image - 2) ** 2) / image

    def net(x):
        return out @ torch.nn.functional.conv2d(x.unsqueeze(0), kernel).relu().flatten()

    return net


CASES: dict[str, Callable[[], Case]] = {
    "vmap of two ops, tiny (8)": lambda: both(
        lambda m: m.vmap(lambda x: x.sin() * 2), torch.randn(8)
    ),
    "jvp of two ops, tiny (8)": lambda: both(
        lambda m: lambda x, t: m.jvp(lambda x: x.sin() * x, (x,), (t,)),
        torch.randn(8),
        torch.randn(8),
    ),
    "vjp of two ops, tiny (8)": lambda: both(
        lambda m: lambda x, t: m.vjp(lambda x: x.sin() * x, x)[1](t),
        torch.randn(8),
        torch.randn(8),
    ),
    "jacrev of two ops, tiny (8)": lambda: both(
        lambda m: m.jacrev(lambda x: x.sin() * x), torch.randn(8)
    ),
    "grad, tiny (10)": lambda: both(lambda m: m.grad(pointwise), torch.randn(10)),
    "grad, mid (300,000)": lambda: both(lambda m: m.grad(pointwise), torch.randn(300_000)),
    "vmap(grad), tiny (8 x 3x5)": lambda: both(
        lambda m: m.vmap(m.grad(regression), (None, 0, 0)),
        torch.randn(3, 5),
        torch.randn(8, 5),
        torch.randn(8, 3),
    ),
    "vmap(grad), mid (64 x 128x128)": lambda: both(
        lambda m: m.vmap(m.grad(regression), (None, 0, 0)),
        torch.randn(128, 128),
        torch.randn(64, 128),
        torch.randn(64, 128),
    ),
    "hessian, tiny (4)": lambda: both(lambda m: m.hessian(rosenbrock), torch.randn(4)),
    "hessian, mid (400)": lambda: both(lambda m: m.hessian(rosenbrock), torch.randn(400)),
    "grad, 100 steps, tiny (8)": lambda: both(lambda m: m.grad(relaxed), torch.randn(8)),
    "vmap(jacrev), conv net, tiny (4 x 8x8)": lambda: jacobian_case(4, 2, 8),
    "vmap(jacrev), conv net, mid (32 x 28x28)": lambda: jacobian_case(32, 8, 28),
    "vmap(jacrev), a new size each call (8 links)": lambda: both(
        lambda m: with_new_sizes(m.vmap(m.jacrev(chain)))
    ),
    "vmap(jacrev), one size (8 links)": lambda: both(
        lambda m: m.vmap(m.jacrev(chain)), torch.randn(16, 8)
    ),
    "per-sample conv net, tiny (4 x 8x8)": lambda: conv_case(4, 2, 8),
    "per-sample conv net, mid (64 x 28x28)": lambda: conv_case(64, 8, 28),
}
QUICK = [name for name in CASES if "tiny" in name]


def measure(name: str, quick: bool) -> list[str]:
    theirs, ours, args = CASES[name]()
    runs = {"torch": lambda: theirs(*args), "again": lambda: ours(*args)}
    if args:
        jitted = aotfunc.jit(ours, backend="eager")
        runs["jit"] = lambda: jitted(*args)
    for run in list(runs.values())[1:]:
        torch.testing.assert_close(run(), theirs(*args))
    _, anew, _ = CASES[name]()
    first = timed(lambda: anew(*args))
    t = interleaved(runs, rounds=1 if quick else 3, budget_s=0.05 if quick else 0.5)
    return [
        name,
        ms(t["torch"]),
        ms(first),
        ms(t["again"]),
        ms(t["jit"]) if args else "",
        ratio(t["torch"], t["again"]),
        ratio(t["torch"], t["jit"]) if args else "",
    ]


def main() -> None:
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    report = Report("eager", "Transforms on real tensors", "python -m benchmarks.eager")
    rows = [measure(name, options.quick) for name in (QUICK if options.quick else CASES)]
    head = [
        "case",
        "torch.func",
        "ours: first",
        "ours: again",
        "ours: jit",
        "torch/again",
        "torch/jit",
    ]
    report.table("Time per call, medians (above 1x we are faster)", head, rows)
    if options.write:
        report.write()


if __name__ == "__main__":
    main()
