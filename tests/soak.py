"""A long run: python -m tests.soak [calls] — memory, global state and lifetimes under everything
that changes.

Every call is of one kind: fresh closures, shapes, numbers, modules, threads, errors in the middle
of a capture, copies. A table of memory, live tensors and cache sizes is printed along the way. At
the end memory must have been flat over the last third (by then all caches but the memo of op
signatures are full): the blocks that Python's objects take, and what is resident, which also holds
the gaps that the allocator has left between them. The process must be as it was, and tensors must
have gone without the garbage collector."""

from __future__ import annotations

import copy
import gc
import itertools
import os
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

import aotfunc as A
from aotfunc import cache
from tests.aot.test_threads import state

CALLS = 20_000
#: what memory may grow by over the last third, in MiB: the allocator's noise, and what torch
# itself keeps
ALLOWED = 24.0
#: and the most blocks alive: the caches drop half of what they hold at a time, each at its own
BREATHING = 1.05


def layer(x: Tensor, w: Tensor, c: float) -> Tensor:
    return ((x * w * c).tanh() + x).sum()


def slope(x: Tensor, w: Tensor, c: float) -> Tensor:
    return w * c * (1 - (x * w * c).tanh() ** 2) + 1


def check(got: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(got.detach(), right.detach(), rtol=1e-4, atol=1e-5)


class Watch:
    """Tensors that must be gone when the call is over."""

    def __init__(self) -> None:
        self.refs: list[weakref.ref] = []

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        self.refs += map(weakref.ref, tensors)
        return list(tensors)

    def alive(self) -> int:
        count = sum(r() is not None for r in self.refs)
        self.refs.clear()
        return count


# ----- kinds of calls: (number of the call, watch) -> None ---------------------------------------


def fresh_closure(i: int, watch: Watch) -> None:
    x, w = watch(torch.randn(4), torch.randn(4))
    f = A.jit(lambda x: layer(x, w, 0.5))
    check(f(x), layer(x, w, 0.5))


def rebound_closure(i: int, watch: Watch) -> None:
    for _ in range(3):
        x, w = watch(torch.randn(4), torch.randn(4))
        REBOUND["w"] = w
        check(rebound(x), layer(x, w, 0.5))
    REBOUND.clear()


REBOUND: dict[str, Tensor] = {}
rebound = A.jit(lambda x: layer(x, REBOUND["w"], 0.5))


def fresh_shape(i: int, watch: Watch) -> None:
    x, w = watch(torch.randn(1 + i % 997), torch.randn(1 + i % 997))
    check(A.grad(layer)(x, w, 0.5), slope(x, w, 0.5))
    check(shaped(x, w, 0.5), layer(x, w, 0.5))


shaped = A.jit(layer)


def fresh_number(i: int, watch: Watch) -> None:
    x, w = watch(torch.randn(4, requires_grad=True), torch.randn(4))
    c = 1 + i / 9973
    check(A.grad(layer)(x.detach(), w, c), slope(x, w, c))
    numbered(x, w, c).backward()
    assert x.grad is not None
    check(x.grad, slope(x, w, c))


numbered = A.jit(layer)


def fresh_batch(i: int, watch: Watch) -> None:
    x, w = watch(torch.randn(2 + i % 499, 4), torch.randn(4))
    check(A.vmap(A.grad(layer), in_dims=(0, None, None))(x, w, 0.5), slope(x, w, 0.5))
    check(
        A.vmap(shaped, in_dims=(0, None, None))(x, w, 0.5)[:2],
        torch.stack([layer(v, w, 0.5) for v in x[:2]]),
    )


def fresh_module(i: int, watch: Watch) -> None:
    net = nn.Sequential(nn.Linear(3, 1 + i % 5), nn.Tanh(), nn.BatchNorm1d(1 + i % 5))
    watch(*net.parameters(), *net.buffers())
    (x,) = watch(torch.randn(4, 3))
    compiled = A.aot_function(net, "eager")
    twin = copy.deepcopy(net)
    watch(*twin.parameters())
    out, right = compiled(x), twin(x)
    check(out, right)
    out.sum().backward()
    check(net[2].running_mean, twin[2].running_mean)
    net.eval()
    twin.eval()
    check(compiled(x), twin(x))


def copied(i: int, watch: Watch) -> None:
    holder = nn.Linear(3, 2)
    holder.act = A.jit(torch.tanh)
    watch(*holder.parameters())
    twin = copy.deepcopy(holder)
    watch(*twin.parameters())
    (x,) = watch(torch.randn(2))
    check(twin.act(x), x.tanh())


def transforms(i: int, watch: Watch) -> None:
    x, w = watch(torch.randn(3), torch.randn(3))
    f = lambda x: layer(x, w, 0.5)
    check(A.vjp(f, x)[1](torch.tensor(1.0))[0], slope(x, w, 0.5))
    check(A.jvp(f, (x,), (w,))[1], slope(x, w, 0.5).dot(w))
    check(A.linearize(f, x)[1](w), slope(x, w, 0.5).dot(w))
    A.hessian(f)(x)
    check(A.functionalize(f)(x), f(x))
    check(
        A.make_fx(layer)(x, w, 0.5)(w, x, 0.5), layer(w, x, 0.5)
    )  # a module keeps what is closed over in a cycle


def second_order(i: int, watch: Watch) -> None:
    x, w = watch(torch.randn(4, requires_grad=True), torch.randn(4))
    (g,) = torch.autograd.grad(shaped(x, w, 0.5), x, create_graph=True)
    g.sum().backward()


def threads(i: int, watch: Watch) -> None:
    errors: list[BaseException] = []

    def work(k: int) -> None:
        try:
            x, w = torch.randn(3), torch.randn(3)
            check(A.grad(layer)(x, w, 1 + (i + k / 3) / 9973), slope(x, w, 1 + (i + k / 3) / 9973))
            check(shaped(x, w, 0.5), layer(x, w, 0.5))
        except BaseException as e:
            errors.append(e)

    pool = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for t in pool:
        t.start()
    for t in pool:
        t.join()
    if errors:
        raise errors[0]


ERRORS = itertools.cycle(
    [ValueError, KeyboardInterrupt, RuntimeError, StopIteration, NotImplementedError, MemoryError]
)
WRAPPERS = itertools.cycle(
    [A.grad, A.vmap, A.jit, A.make_fx, A.hessian, lambda f: A.vmap(A.grad(f))]
)


def error_inside(i: int, watch: Watch) -> None:
    error, wrapper = next(ERRORS), next(WRAPPERS)

    def f(x: Tensor) -> Tensor:
        with torch.no_grad():
            raise error(str((x * i).shape))

    (x,) = watch(torch.randn(2, 2))
    try:
        wrapper(f)(x)
    except (error, RuntimeError):
        return
    raise AssertionError("nothing was raised")


def leaked(i: int, watch: Watch) -> None:
    kept: list[Tensor] = []
    (x,) = watch(torch.randn(3))
    A.grad(lambda x: kept.append(x * 2) or x.sum())(x)  # type: ignore[func-returns-value]
    check(kept[0] + 0, x * 2)


def own_rules(i: int, watch: Watch) -> None:
    x, w = watch(torch.randn(4), torch.randn(4))
    f = A.custom_vmap(lambda x: layer(x, w, 0.5))
    f.defvjp(lambda x: (layer(x, w, 0.5), x), lambda x, g: (g * slope(x, w, 0.5),))
    f.def_vmap(lambda size, in_batched, x: (torch.stack([layer(v, w, 0.5) for v in x]), True))
    check(A.vmap(f)(x[None])[0], layer(x, w, 0.5))
    check(A.jit(A.grad(f))(x), slope(x, w, 0.5))


KINDS: list[Callable[[int, Watch], None]] = [
    *(
        fresh_closure,
        rebound_closure,
        fresh_shape,
        fresh_number,
        fresh_batch,
        fresh_module,
        copied,
    ),
    *(transforms, second_order, threads, error_inside, leaked, own_rules),
]


# ----- the run -----------------------------------------------------------------------------------


def resident() -> float:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def live_tensors() -> int:
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())


def caches() -> tuple[int, int]:
    """Entries of all caches, and what they weigh."""
    every = list(cache.EVERY)
    return sum(map(len, every)), sum(c.weigh(v) for c in every for v in c.values())


def soak(calls: int, rows: int = 10, out=sys.stdout) -> list[tuple[float, int]]:  # type: ignore
    """Make so many calls; at each row of the table the resident memory in MiB, and the blocks
    alive. Raises AssertionError where something is not as it was."""
    watch, held = Watch(), Counter()
    before, memory, start = state() | {"generator": 0}, [], time.perf_counter()
    print("  calls  seconds resident MiB    blocks  tensors  entries    nodes", file=out)
    for i in range(calls):
        kind = KINDS[i % len(KINDS)]
        gc.disable()
        try:
            kind(i, watch)
            held[kind.__name__] += (
                watch.alive() if i >= len(KINDS) else 0
            )  # what is imported late may catch errors
        finally:
            gc.enable()
        if (i + 1) % max(calls // rows, 1) == 0:
            gc.collect()
            memory.append((resident(), sys.getallocatedblocks()))
            (mib, blocks), (entries, nodes) = memory[-1], caches()
            seconds = time.perf_counter() - start
            alive = live_tensors()
            row = (
                f"{i + 1:7} {seconds:8.0f} {mib:12.1f} {blocks:9} {alive:8} {entries:8} {nodes:8}"
            )
            print(row, file=out, flush=True)
    assert state() | {"generator": 0} == before, (before, state())
    assert not +held, f"tensors that outlived their call: {dict(+held)}"
    return memory


def main() -> int:
    import warnings

    warnings.simplefilter("ignore")
    memory = soak(int(sys.argv[1]) if len(sys.argv) > 1 else CALLS)
    third = 2 * len(memory) // 3
    grown = memory[-1][0] - memory[third - 1][0]
    most = max(blocks for _, blocks in memory[third:]) / max(
        blocks for _, blocks in memory[:third]
    )
    print(
        f"over the last third resident memory grew by {grown:.1f} MiB (allowed: {ALLOWED}); the "
        f"most blocks alive were {most:.3f} of the most before (allowed: {BREATHING})"
    )
    return int(grown > ALLOWED or most > BREATHING)


if __name__ == "__main__":
    sys.exit(main())
