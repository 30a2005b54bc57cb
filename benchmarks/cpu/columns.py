"""Who runs a workload: each column's ways to make a callable of it, peers first and then ours.

A way is "program" (the transformed function, compiled whole), "autograd" (of a training step: the
compiled function, differentiated by autograd) or "by hand" (plain PyTorch)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from benchmarks.cpu.workloads import Workload

#: a name of a way -> what makes the callable that takes the workload's arguments
Ways = dict[str, Callable[[], Callable]]
Column = Callable[[Workload, bool], Ways]

EAGER = "torch"


def by_autograd(f: Callable, wrt: int) -> Callable:
    """A training step of ``f``, compiled or not, whose backward autograd runs."""

    def run(cotangent: Tensor, *args: Any) -> tuple:
        out = f(*args)
        inputs, tree = tree_flatten(args[:wrt])
        return out, tree_unflatten(torch.autograd.grad(out, inputs, cotangent), tree)

    run.requires_grad = wrt  # type: ignore[attr-defined]
    return run


def both(w: Workload, transforms: Any, compiled: Callable) -> Ways:
    ways: Ways = {"program": lambda: compiled(w.program(transforms, w.f))}
    if w.wrt:
        ways["autograd"] = lambda: by_autograd(compiled(w.f), w.wrt)
    return ways


def eager(w: Workload, quick: bool) -> Ways:
    hand = {"by hand": lambda: w.by_hand} if w.by_hand else {}
    return both(w, torch.func, lambda f: f) | hand


def compile(w: Workload, quick: bool) -> Ways:
    return both(w, torch.func, torch.compile)


def aot_autograd(compiler: Callable[[], Callable], decompose: bool) -> Column:
    """``functorch.compile.aot_function`` with the min-cut partition."""

    def compiled(f: Callable) -> Callable:
        import functorch.compile as functorch
        from torch._inductor.decomposition import select_decomp_table

        return functorch.aot_function(
            f,
            compiler(),
            partition_fn=functorch.min_cut_rematerialization_partition,
            decompositions=select_decomp_table() if decompose else None,
        )

    def column(w: Workload, quick: bool) -> Ways:
        ways = both(w, torch.func, compiled)
        return {"autograd": ways["autograd"]} if w.wrt else ways

    return column


def nop() -> Callable:
    from functorch.compile import nop

    return nop


def inductor() -> Callable:
    from functorch.compile import make_boxed_func
    from torch._inductor.compile_fx import compile_fx_inner

    def compiler(gm: Any, inputs: list) -> Callable:
        fn: Any = compile_fx_inner(gm, inputs)
        return fn if hasattr(fn, "_boxed_call") else make_boxed_func(fn)

    return compiler


def jax(w: Workload, quick: bool) -> Ways:
    def make() -> Callable:
        import jax

        from benchmarks.cpu.in_jax import functions

        f = jax.jit(w.program(jax, functions(quick)[w.function]))
        return lambda *args: jax.block_until_ready(f(*args))

    return {"program": make}


def ours(backend: str) -> Column:
    def column(w: Workload, quick: bool) -> Ways:
        import aotfunc

        return both(w, aotfunc, lambda f: aotfunc.jit(f, backend=backend))

    return column


def ghost(w: Workload, quick: bool) -> Ways:
    return {"by hand": lambda: w.ghost} if w.ghost else {}


def exact(w: Workload, quick: bool) -> Ways:
    import aotfunc

    return both(w, aotfunc, lambda f: aotfunc.jit(f, backend="cpp", exact=True))


#: columns that are run where they are asked for by name
MORE: dict[str, Column] = {"ghost": ghost, "exact": exact}


def columns() -> dict[str, Column]:
    """Those that are installed; ours are the registered backends."""
    peers = {
        EAGER: eager,
        "compile": compile,
        "aot-nop": aot_autograd(nop, False),
        "aot-inductor": aot_autograd(inductor, True),
        "jax": jax,
    }
    if importlib.util.find_spec("jax") is None:
        del peers["jax"]
    return peers | {name: ours(name) for name in own()} | MORE


def own() -> list[str]:
    """Our backends; "auto" is one of the others."""
    from aotfunc.backends import REGISTRY

    return [name for name in REGISTRY if name != "auto"]


HEADS = {
    EAGER: "torch.func / autograd",
    "compile": "torch.compile",
    "aot-nop": "AOTAutograd, no compiler",
    "aot-inductor": "AOTAutograd, Inductor",
    "jax": "jax.jit",
    "ghost": "ghost clipping by hand",
}


def head(column: str) -> str:
    return HEADS.get(column, "ours, cpp, exact" if column == "exact" else f"ours, {column}")


def prepare(column: str) -> None:
    """Import what the column's first call would import, and run something in it: a first call
    measures compilation."""
    if column == "jax":
        start_jax()
    elif column in HEADS:
        for name in ("compile_fx", "codegen.cpp"):
            importlib.import_module(f"torch._inductor.{name}")

        torch.compile(lambda x: x + 1, backend="aot_eager")(torch.ones(1))
    else:
        import aotfunc

        aotfunc.jit(aotfunc.grad(lambda x: x.sin()))(torch.ones(()))


def start_jax() -> None:
    """With one thread: JAX makes as many as there are processors when it starts."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    import jax

    jax.jit(lambda x: x + 1)(1.0)
    os.sched_setaffinity(0, allowed)


def arguments(column: str, run: Callable, args: tuple) -> tuple:
    """The workload's arguments as the column wants them: leaves that require grad, or JAX's
    arrays."""
    if column == "jax":
        import jax.numpy as jnp

        return tree_map(lambda t: jnp.asarray(t.numpy()), args)
    wrt = getattr(run, "requires_grad", 0)
    chosen = tree_map(lambda t: t.clone().requires_grad_(), args[1 : 1 + wrt])
    return args[:1] + chosen + args[1 + wrt :] if wrt else args


def leaves(tree: Any) -> Iterable[Tensor]:
    """The results as tensors; those of dictionaries in the order of the keys, which is JAX's."""
    if isinstance(tree, dict):
        tree = [tree[k] for k in sorted(tree)]
    if isinstance(tree, (list, tuple)):
        return [leaf for part in tree for leaf in leaves(part)]
    if isinstance(tree, Tensor):
        return [tree.detach()]
    import numpy

    return [torch.from_numpy(numpy.array(tree))]
