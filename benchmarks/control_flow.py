"""Loops of 10 to 100,000 tiny steps: what capturing and compiling one takes, a step, and the
memory of its backward; beside JAX's scan and a Python loop under torch.autograd.

python -m benchmarks.control_flow [--quick] [--write]. The step is ``h = tanh(w @ h + x)`` of 16
numbers in float32. Every cell is a process of its own, of which the processor's time counts.
Memory is what the first gradient adds to the largest size that the process had, first calls of a
small loop included."""

from __future__ import annotations

import json
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


def of_jax(steps: int, gradient: bool) -> tuple[Callable, Callable]:
    """A new function, and a call of it."""
    import jax
    import jax.numpy as jnp

    w, h, xs = jnp.eye(WIDTH) * 0.5, jnp.zeros(WIDTH), jnp.ones((steps, WIDTH))

    def loss(w: jax.Array, xs: jax.Array) -> jax.Array:
        def step(h: jax.Array, x: jax.Array) -> tuple:
            h = jnp.tanh(w @ h + x)
            return h, h.sum()

        return jax.lax.scan(step, h, xs)[1].sum()

    return lambda: jax.jit(jax.grad(loss) if gradient else loss), lambda f: jax.block_until_ready(
        f(w, xs)
    )


def of_torch(library: str, steps: int, gradient: bool) -> tuple[Callable, Callable]:
    import torch

    import aotfunc

    torch.set_num_threads(1)
    w, h, xs = torch.eye(WIDTH) * 0.5, torch.zeros(WIDTH), torch.ones(steps, WIDTH)

    def step(w: torch.Tensor) -> Callable:
        def run(h: torch.Tensor, x: torch.Tensor) -> tuple:
            h = torch.tanh(w @ h + x)
            return h, h.sum()

        return run

    def loss(w: torch.Tensor, xs: torch.Tensor) -> torch.Tensor:
        return aotfunc.scan(step(w), h, xs)[1].sum()

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
    make = (lambda: aotfunc.jit(f)) if library == "aotfunc jit" else lambda: f
    return make, lambda f: f(w, xs)


def spent(run: Callable[[], object]) -> float:
    """Seconds that the processor takes for one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def child(library: str, steps: int, gradient: bool) -> None:
    """Print seconds of the first call, of a later one, and megabytes."""

    def functions(steps: int) -> tuple[Callable, Callable]:
        return of_jax(steps, gradient) if library == "jax" else of_torch(library, steps, gradient)

    make, call = functions(2)
    call(make())  # what is done once in a process
    make, call = functions(steps)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    f = make()
    first = spent(lambda: call(f))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    later = min(spent(lambda: call(f)) for _ in range(1 if first > 5 else 5))
    print(json.dumps([first, later, memory / 1024]))


def measured(library: str, steps: int, gradient: bool) -> list[float]:
    command = [sys.executable, "-m", "benchmarks.control_flow", "--child", library, str(steps)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
    command += ["gradient"] if gradient else []
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if "--child" in sys.argv:
        library, steps, *gradient = sys.argv[sys.argv.index("--child") + 1 :]
        return child(library, int(steps), bool(gradient))
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
    rows = [[name, *[f"{memory:.1f} MB" for *_, memory in found[name]]] for name in found]
    report.table("Memory that the first gradient adds", head, rows)
    if options.write:
        report.write()


if __name__ == "__main__":
    main()
