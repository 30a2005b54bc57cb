"""How many ops the graphs of transformed functions have: aotfunc beside torch.func under torch's
make_fx, and JAX. ``python -m benchmarks.graphs [--quick] [--write]``.

The same functions of the same arguments, each written in the idiom of its library; that the three
return equal values is checked on the way. What is counted, after code that no result needs is gone
from each:

- aotfunc: calls in the graph of ``aotfunc.make_fx``; neither ``getitem`` nor constants
  (``get_attr``) are calls;
- torch: the same of ``make_fx(torch.func…)`` once ``detach`` and ``alias``, mere bookkeeping, are
  removed; "merged" is that graph after functorch's common-subexpression elimination, which make_fx
  itself does not do;
- JAX: equations of ``jax.make_jaxpr``, those of inner calls (pjit, custom_jvp_call, …) in place of
  the call. Its primitives are finer than aten's ops: there is no softmax, layer norm or cross
  entropy among them, and a conversion of type or shape is an equation. So the programs of plain
  arithmetic have a mean of their own.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch._functorch.compile_utils import fx_graph_cse
from torch.fx.experimental.proxy_tensor import make_fx as torch_make_fx
from torch.utils._pytree import tree_map_only

import aotfunc
from aotfunc import make_fx
from aotfunc.graph import n_ops

from .graph_programs import PLAIN, PROGRAMS
from .measure import Report, arguments

aten = torch.ops.aten


def ours(program: Callable, args: tuple) -> int:
    gm = make_fx(program(aotfunc))(*args)
    alike(gm(*args), program(torch.func)(*args))
    return n_ops(gm.graph)


def alike(mine: Any, theirs: Any) -> None:
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3, check_stride=False)


def torchs(program: Callable, args: tuple) -> tuple[int, int]:
    """Sizes of torch's own graph once bookkeeping and dead code are gone: as it is, and with equal
    nodes merged."""
    graph = torch_make_fx(program(torch.func))(*args).graph
    for n in list(graph.nodes):
        if n.target in (aten.detach.default, aten.alias.default):
            n.replace_all_uses_with(n.args[0])
            graph.erase_node(n)
    graph.eliminate_dead_code()
    return n_ops(graph), n_ops(fx_graph_cse(graph))


def jaxs() -> Callable[[str, tuple], int] | None:
    """(name, torch arguments) -> equations of the program in JAX; None where JAX is not
    installed."""
    try:
        import jax
        import jax.numpy as jnp
        from jax.extend import core
        from jax.interpreters import partial_eval
    except ImportError:
        return None
    from .jax_graph_programs import PROGRAMS as THEIRS

    def inner(params: dict) -> list:
        values = [v for p in params.values() for v in (p if isinstance(p, tuple | list) else [p])]
        return [
            getattr(v, "jaxpr", v) for v in values if isinstance(v, core.Jaxpr | core.ClosedJaxpr)
        ]

    def count(jaxpr: Any) -> int:
        return sum(
            sum(map(count, inner(eqn.params))) if inner(eqn.params) else 1 for eqn in jaxpr.eqns
        )

    def counted(name: str, args: tuple) -> int:
        mine = tree_map_only(torch.Tensor, lambda t: jnp.asarray(t.numpy()), args)
        result = jax.tree.map(lambda a: torch.from_numpy(np.array(a)), THEIRS[name](*mine))
        alike(PROGRAMS[name][0](aotfunc)(*args), result)
        jaxpr = jax.make_jaxpr(THEIRS[name])(*mine).jaxpr
        live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
        return count(live)

    return counted


def mean(counts: list[tuple[int, int]]) -> str:
    """The geometric mean of ours over theirs."""
    return (
        f"{statistics.geometric_mean(mine / theirs for mine, theirs in counts):.2f}"
        if counts
        else "-"
    )


def main() -> None:
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    report = Report("graphs", "Sizes of graphs", "python -m benchmarks.graphs")
    for line in (__doc__ or "").split("\n\n", 1)[1].strip().split("\n\n"):
        report.note(line)
    jax = jaxs()
    names = ["grad sum sin", "vmap grad MLP"] if options.quick else list(PROGRAMS)
    counts = {}
    for name in names:
        program, make = PROGRAMS[name]
        third = jax(name, make()) if jax else None
        counts[name] = (ours(program, make()), *torchs(program, make()), third)
    rows = [[name, *[str(n) if n else "-" for n in row]] for name, row in counts.items()]
    for caption, chosen in (
        ("all", names),
        ("plain arithmetic", [n for n in names if n in PLAIN]),
    ):
        peers = [[(counts[n][0], counts[n][i]) for n in chosen if counts[n][i]] for i in (1, 2, 3)]
        rows.append([f"aotfunc / peer, geometric mean, {caption}", "", *map(mean, peers)])
    report.table("Ops", ["program", "aotfunc", "torch.func, make_fx", "merged", "JAX"], rows)
    larger = [name for name, (mine, theirs, *_) in counts.items() if mine > theirs]
    report.note(f"Larger than torch's: {', '.join(larger) or 'none'} of {len(counts)}.")
    if options.write:
        report.write()


if __name__ == "__main__":
    main()
