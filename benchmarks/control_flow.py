"""Loops of 10 to 100,000 tiny steps: what capturing and compiling one takes, a step, and the
memory of its backward; beside JAX's scan and a Python loop under torch.autograd. And a loop on the
eager backend, in the time of a Python loop over its compiled step. And loops of other tiny steps,
alternating with JAX's in one process.

python -m benchmarks.control_flow [--quick] [--write]. The step is ``h = tanh(w @ h + x)`` of 16
numbers in float32. Every cell is a process of its own, of which the processor's time counts.
Memory is what the first gradient adds to the largest size that the process had, first calls of a
small loop included."""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable

from benchmarks.measure import Report, arguments, ms

STEPS = (10, 1000, 100_000)
WIDTH = 16
LIBRARIES = ("aotfunc eager", "aotfunc jit", "jax", "torch loop")

#: the same, of which the backward runs every step again
RECOMPUTED = {"aotfunc jit": "aotfunc jit, again", "jax": "jax, again"}


def of_jax(library: str, steps: int, gradient: bool) -> tuple[Callable, Callable]:
    """A new function, and a call of it."""
    import jax
    import jax.numpy as jnp

    w, h, xs = jnp.eye(WIDTH) * 0.5, jnp.zeros(WIDTH), jnp.ones((steps, WIDTH))

    def loss(w: jax.Array, xs: jax.Array) -> jax.Array:
        def step(h: jax.Array, x: jax.Array) -> tuple:
            h = jnp.tanh(w @ h + x)
            return h, h.sum()

        again = library == RECOMPUTED["jax"]
        return jax.lax.scan(jax.checkpoint(step) if again else step, h, xs)[1].sum()

    return lambda: jax.jit(jax.grad(loss) if gradient else loss), lambda f: jax.block_until_ready(
        f(w, xs)
    )


def of_torch(library: str, steps: int, gradient: bool) -> tuple[Callable, Callable]:
    import torch

    import aotfunc

    torch.set_num_threads(1)
    w, h, xs = torch.eye(WIDTH) * 0.5, torch.zeros(WIDTH), torch.ones(steps, WIDTH)
    again = library == RECOMPUTED["aotfunc jit"]

    def step(w: torch.Tensor) -> Callable:
        def run(h: torch.Tensor, x: torch.Tensor) -> tuple:
            h = torch.tanh(w @ h + x)
            return h, h.sum()

        return run

    def loss(w: torch.Tensor, xs: torch.Tensor) -> torch.Tensor:
        return aotfunc.scan(step(w), h, xs, checkpoint=int(again))[1].sum()

    def loop(w: torch.Tensor, xs: torch.Tensor) -> torch.Tensor:
        carry, found = h, []
        for x in xs.unbind(0):
            carry, y = step(w)(carry, x)
            found.append(y)
        return torch.stack(found).sum()

    def by_autograd(w: torch.Tensor, xs: torch.Tensor) -> tuple:
        w = w.detach().requires_grad_()
        return torch.autograd.grad(loop(w, xs), w)

    if library == "torch loop":
        return lambda: by_autograd if gradient else loop, lambda f: f(w, xs)
    f = aotfunc.grad(loss) if gradient else loss
    make = (lambda: f) if library == "aotfunc eager" else lambda: aotfunc.jit(f)
    return make, lambda f: f(w, xs)


def spent(run: Callable[[], object]) -> float:
    """Seconds that the processor takes for one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def child(library: str, steps: int, gradient: bool) -> None:
    """Print seconds of the first call, of a later one, and megabytes."""

    def functions(steps: int) -> tuple[Callable, Callable]:
        of = of_jax if library.startswith("jax") else of_torch
        return of(library, steps, gradient)

    make, call = functions(2)
    call(make())  # what is done once in a process
    make, call = functions(steps)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    f = make()
    first = spent(lambda: call(f))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    later = min(spent(lambda: call(f)) for _ in range(1 if first > 5 else 5))
    print(json.dumps([first, later, memory / 1024]))


def against_a_loop(steps: int) -> float:
    """Return the time of a compiled scan on the eager backend, in that of a Python loop over the
    step compiled alone."""
    import torch

    import aotfunc

    torch.set_num_threads(1)
    w, h, xs = torch.eye(WIDTH) * 0.5, torch.zeros(WIDTH), torch.ones(steps, WIDTH)

    def step(h: torch.Tensor, x: torch.Tensor) -> tuple:
        h = torch.tanh(w @ h + x)
        return h, h.sum()

    compiled = aotfunc.jit(step, backend="eager")

    def loop(h: torch.Tensor, xs: torch.Tensor) -> torch.Tensor:
        found = []
        for x in xs.unbind(0):
            h, y = compiled(h, x)
            found.append(y)
        return torch.stack(found)

    scan = aotfunc.jit(lambda h, xs: aotfunc.scan(step, h, xs)[1], backend="eager")
    runs = [lambda f=f: f(h, xs) for f in (scan, loop)]
    ours, plain = zip(*[[spent(run) for run in runs] for _ in range(8)], strict=True)
    return min(ours) / min(plain)


def beside_jax(steps: int) -> None:
    """Print, for other tiny steps and their gradients, seconds of ours and of JAX."""
    import jax
    import jax.numpy as jnp
    import torch

    import aotfunc

    torch.set_num_threads(1)
    w = torch.eye(WIDTH) * 0.5 + 0.01
    jw, found = jnp.array(w.numpy()), []
    maps: dict[str, tuple[Callable, Callable, tuple]] = {
        "map: x * x + sin(x)": (lambda x: x * x + x.sin(), lambda x: x * x + jnp.sin(x), ()),
        "map: tanh(w[0] * x)": (
            lambda x: (w[0] * x).tanh(),
            lambda x: jnp.tanh(jw[0] * x),
            (WIDTH,),
        ),
        "map: w[0] @ x": (lambda x: w[0] @ x, lambda x: jw[0] @ x, (WIDTH,)),
        "map: x / norm(x)": (
            lambda x: x / x.norm(),
            lambda x: x / jnp.linalg.norm(x),
            (WIDTH,),
        ),
        "map: sum(tanh(w @ x))": (
            lambda x: (w @ x).tanh().sum(),
            lambda x: jnp.tanh(jw @ x).sum(),
            (WIDTH,),
        ),
        "map: softmax(x)": (lambda x: x.softmax(0), jax.nn.softmax, (4,)),
        "map: cumsum(x)": (lambda x: x.cumsum(0), jnp.cumsum, (8,)),
    }

    def compared(f: Callable, g: Callable, x: torch.Tensor) -> None:
        jx = jnp.array(x.numpy())
        runs = [lambda: f(x), lambda: jax.block_until_ready(g(jx))]
        for run in runs:
            run()
        times = [[spent(run) for run in runs] for _ in range(12)]
        found.append([min(column) for column in zip(*times, strict=True)])

    for f, g, shape in maps.values():
        x = torch.linspace(-1, 1, steps * max(1, math.prod(shape))).view(steps, *shape)
        ours = lambda x, f=f: aotfunc.map(f, x)
        theirs = lambda x, g=g: jax.lax.map(g, x)
        compared(aotfunc.jit(ours), jax.jit(theirs), x)
        loss = aotfunc.grad(lambda x, ours=ours: ours(x).square().sum())
        compared(
            aotfunc.jit(loss), jax.jit(jax.grad(lambda x, f=theirs: jnp.square(f(x)).sum())), x
        )
    one = lambda loop: lambda x: loop(lambda c: c < steps, lambda c: c + 1.0, x)
    two = lambda loop, zero: (
        lambda x: loop(lambda c: c[1] < steps, lambda c: (c[0] * 0.999 + 0.5, c[1] + 1), (x, zero))
    )
    start = torch.tensor(0.0)
    loops = {
        "while_loop: x + 1": (one(aotfunc.while_loop), one(jax.lax.while_loop)),
        "while_loop: 0.999 x + 0.5, t + 1": (
            two(aotfunc.while_loop, torch.tensor(0)),
            two(jax.lax.while_loop, 0),
        ),
    }
    for f, g in loops.values():
        compared(aotfunc.jit(f), jax.jit(g), start)
    names = [n for name in maps for n in (name, f"{name}, gradient")]
    print(json.dumps(dict(zip([*names, *loops], found, strict=True))))


def in_process(*options: str) -> str:
    """Return the last line that this file prints with these options, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.control_flow", *options]
    env = os.environ | {"OMP_NUM_THREADS": "1", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def measured(library: str, steps: int, gradient: bool) -> list[float]:
    rest = ["gradient"] if gradient else []
    return json.loads(in_process("--child", library, str(steps), *rest))


def main() -> None:
    if "--child" in sys.argv:
        library, steps, *gradient = sys.argv[sys.argv.index("--child") + 1 :]
        return child(library, int(steps), bool(gradient))
    if "--beside-jax" in sys.argv:
        return beside_jax(int(sys.argv[-1]))
    options = arguments(__doc__).parse_args()
    report = Report("control_flow", "Loops", "python -m benchmarks.control_flow")
    head = ["library", *[f"{t:,} steps" for t in STEPS]]
    counts = STEPS[:2] if options.quick else STEPS
    for gradient in (False, True):
        found = {name: [measured(name, steps, gradient) for steps in counts] for name in LIBRARIES}
        what = "the gradient" if gradient else "the loop"
        rows = [
            [name, *[ms(max(first - later, 0)) for first, later, _ in found[name]]]
            for name in found
        ]
        report.table(
            f"First call of {what} beyond a later one: capture and compilation", head, rows
        )
        rows = [
            [name, *[ms(cell[1] / t) for cell, t in zip(found[name], counts, strict=True)]]
            for name in found
        ]
        report.table(f"A step of {what}, in a later call", head, rows)
    found |= {name: [measured(name, t, True) for t in counts] for name in RECOMPUTED.values()}
    rows = [[name, *[f"{memory:.1f} MB" for *_, memory in found[name]]] for name in found]
    report.table("Memory that the first gradient adds", head, rows)
    rows = [["scan", *[f"{against_a_loop(t):.2f}" for t in counts]]]
    report.table("Time on the eager backend, of a loop over the compiled step", head, rows)
    cells = json.loads(in_process("--beside-jax", str(STEPS[-1])))
    rows = [
        [name, *[f"{t / STEPS[-1] * 1e9:.3g} ns" for t in (ours, theirs)], f"{ours / theirs:.2f}"]
        for name, (ours, theirs) in cells.items()
    ]
    report.table(
        f"A step of other loops of {STEPS[-1]:,} steps",
        ["step", "aotfunc jit", "jax", "ratio"],
        rows,
    )
    if options.write:
        report.write()


if __name__ == "__main__":
    main()
