"""Every op on arguments that lie otherwise in memory, and pairs of transforms that the table of
compositions lacks: python -m tests.ops.layouts [PATTERN …] [--log FILE] [--write] …

A cell is an op, a dtype, a composition and a layout, right when all of up to 14 samples are.
AOTFUNC_DEBUG is on: each value of each graph is compared with the shape, strides and dtype that
the graph says it has. --write runs nothing and puts what the log has into docs/layouts.md. Status
1 if a cell is wrong or an error that FAILURES does not list."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

import aotfunc
from aotfunc import debug
from tests.ops import table
from tests.ops.__main__ import Worker, chosen, logged, sweep, sweep_parser
from tests.ops.compositions import COMPOSITIONS, Call, batch, pull, push, rows_of, setup
from tests.ops.references import (
    NoReference,
    Wrong,
    backward_twice,
    close,
    copies,
    finite,
    inner,
    leaf,
    noise,
    reference,
    same_kind,
    seeded,
    tolerance_of,
)
from tests.ops.references import backward as pulled

DOC = Path(__file__).parents[2] / "docs" / "layouts.md"
SAMPLES = 14
LIMIT_S = 60.0
DTYPES = ("float64", "complex128", "int64", "bool")  # float32 has the same rules

#: what is known to fail: (op, composition), and why
FAILURES = {
    **{
        (
            f"nn_functional_{name}",
            "adjoint",
        ): "padding_idx and scale_grad_by_freq change the gradient, by definition"
        for name in ("embedding", "embedding_bag")
    },
    **{
        (
            name,
            composition,
        ): "as in autograd, unique values have no derivative; differences have one"
        for name in ("unique", "unique_consecutive")
        for composition in ("vjp", "jvp", "adjoint", "vjpjvp", "jvpjvp")
    },
    **{
        (
            "CubeGenVmapAutogradFunction",
            composition,
        ): "its backward adds six times the derivative to any cotangent's"
        for composition in ("adjoint", "vjpjvp", "jvpjvp", "vmapvjpjvp")
    },
    **{
        (
            f"nn_functional_max_unpool{n}d",
            "adjoint",
        ): "samples with an index twice: one value is written, both are read"
        for n in (1, 2, 3)
    },
    (
        "native_group_norm",
        "vmap",
    ): "called as it is, the kernel takes a weight with gaps for dense: eager is wrong",
    (
        "tensor_split",
        "vmap",
    ): "sections in a tensor that is mapped: their number shapes the result",
}


# layouts
# -------------------------------------------------------------------------------------------------


def column(x: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Column-major: the first dimension is innermost."""
    order = list(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def channels_last(x: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """The second dimension is innermost."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 2 else x.clone()


def anyhow(x: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Dimensions in any order, with gaps or at an offset."""
    order = rng.sample(range(x.dim()), x.dim())
    memory = x.permute(order)
    step = rng.choice((1, 2))
    gaps = memory.new_zeros([*memory.shape[:-1], step * memory.shape[-1] + 1])[..., 1::step]
    return (
        gaps[..., : memory.shape[-1]]
        .copy_(memory)
        .permute(sorted(range(x.dim()), key=order.__getitem__))
    )


LAYOUTS = {"column": column, "channels_last": channels_last, "anyhow": anyhow}


def laid_out(call: Call, layout: str, seed: int) -> Call:
    """The call with its tensors in this layout."""
    rng = random.Random(seed)
    put = lambda x: LAYOUTS[layout](x, rng) if x.dim() and x.layout is torch.strided else x
    return dataclasses.replace(
        call, primals=[put(x) for x in call.primals], others=[put(x) for x in call.others]
    )


# more compositions
# -------------------------------------------------------------------------------------------------


def precision(call: Call) -> dict[str, float]:
    """That of the least precise argument."""
    return tolerance_of({x.dtype for x in call.primals})


def check_value(lib, call: Call, variant: int) -> None:
    """The function itself, compiled: values, and strides where they are not a matter of copies."""
    if not call.primals:
        raise NoReference("no floating argument")
    want = [o.detach() for o in reference(lambda: call.f(*copies(call.primals)))]
    close(
        seeded(lambda: aotfunc.make_fx(call.f)(*copies(call.primals))(*copies(call.primals))),
        want,
        "output",
    )


def check_adjoint(lib, call: Call, variant: int) -> None:
    """<cotangents, jvp(tangents)> = <vjp(cotangents), tangents>."""
    f, cts = setup(call)
    tangents = noise(call.primals, seed=2)
    moved = seeded(lambda: push(lib, f)(copies(call.primals), tangents))
    gradients = seeded(lambda: pull(lib, f)(copies(call.primals), cts))
    close(
        [finite(inner(cts, moved))],
        [inner(gradients, tangents)],
        "inner product",
        like=[*cts, *call.primals],
    )


def curved(f, primals, cts, tangents) -> list[torch.Tensor]:
    """By autograd: the gradient of <cotangents, J tangents> with respect to the primals, then to
    the cotangents."""
    return reference(lambda: backward_twice(f, primals, cts, tangents))


def pulled_push(lib, f, primals, cts, tangents) -> list[torch.Tensor]:
    """The gradient of <cotangents, J tangents> by the primals: reverse over forward."""
    return pull(lib, lambda *p: push(lib, f)(list(p), tangents))(primals, cts)


def check_vjpjvp(lib, call: Call, variant: int) -> None:
    f, cts = setup(call)
    tangents = noise(call.primals, seed=3)
    want = curved(f, call.primals, cts, tangents)[: len(call.primals)]
    got = seeded(lambda: pulled_push(lib, f, copies(call.primals), cts, tangents))
    same_kind(got, call.primals, "gradient of the tangent")
    close(got, want, "gradient of the tangent", precision(call))


def check_jvpjvp(lib, call: Call, variant: int) -> None:
    f, cts = setup(call)
    tangents, seconds = noise(call.primals, seed=3), noise(call.primals, seed=4)
    want = curved(f, call.primals, cts, tangents)[: len(call.primals)]
    run = lambda: push(lib, lambda *p: push(lib, f)(list(p), tangents))(
        copies(call.primals), seconds
    )
    got, primals = seeded(run), call.primals
    same_kind(got, cts, "tangent of the tangent")
    close(
        [inner(cts, got)],
        [finite(inner(want, seconds))],
        "inner product with the gradient",
        like=[*cts, *primals],
    )


def check_vmapvjpjvp(lib, call: Call, variant: int) -> None:
    f, cts = setup(call)
    if call.writes:
        raise NoReference("writes to an unmapped argument")
    primals = batch(call.primals, lambda ts: pulled(f, leaf(ts), cts))
    tangents = noise(primals, seed=3)
    cts = [torch.stack([c, -0.5 * c]) for c in cts]
    n = len(primals)
    rows = lambda p, ct: curved(f, p[:n], ct, p[n:])[:n]
    want = rows_of([*primals, *tangents], cts, rows)
    got = seeded(
        lambda: lib.vmap(lambda p, ct, t: pulled_push(lib, f, p, ct, t))(
            copies(primals), cts, tangents
        )
    )
    close(got, want, "gradient of the tangent", precision(call))


CHECKS = {
    "value": check_value,
    **{name: COMPOSITIONS[name] for name in ("vjp", "jvp", "vmap", "vmapvjp")},
    "adjoint": check_adjoint,
    "vjpjvp": check_vjpjvp,
    "jvpjvp": check_jvpjvp,
    "vmapvjpjvp": check_vmapvjpjvp,
}


# cells
# -------------------------------------------------------------------------------------------------


def check(name: str, dtype: str, composition: str, layout: str, count: int = SAMPLES) -> str:
    """'right', 'error: what', 'wrong: how' or 'none: why there is no reference'."""
    compared, reason = 0, "no sample"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with table.limited(LIMIT_S):
                for k, sample in enumerate(table.samples(name, dtype, count)):
                    call = Call.of(
                        table.OPS[name], sample, trusted=name not in table.WRONG_IN_AUTOGRAD
                    )
                    try:
                        call = call if composition == "vmap" else call.differentiated()
                        CHECKS[composition](aotfunc, laid_out(call, layout, k), k % 3)
                        compared += 1
                    except NoReference as none:
                        reason = table.text(none)
        except Wrong as error:
            return f"wrong: {table.text(error)}"
        except Exception as error:
            return f"error: {type(error).__name__}: {table.text(error)}"
    return "right" if compared else f"none: {reason}"


def compositions(name: str, dtype: str) -> list[str]:
    """Those of an op in this dtype."""
    if table.compositions(name, dtype) == ["vmap"]:
        return ["vmap"] if dtype not in ("float64", "complex128") else ["value", "vmap"]
    return [c for c in CHECKS if not (name in table.RANDOM | table.RAGGED and "vmap" in c)]


def cells(name: str) -> list[tuple[str, str]]:
    """Every (dtype, composition@layout) of an op."""
    dtypes = [d for d in table.dtypes(table.OPS[name]) if d in DTYPES]
    return [
        (d, f"{c}@{layout}") for d in dtypes for c in compositions(name, d) for layout in LAYOUTS
    ]


def work() -> None:
    """A worker: a cell comes in, its outcome goes out, a line of JSON each."""
    torch.set_num_threads(1)
    debug.LEVEL = 2
    for line in sys.stdin:
        _, name, dtype, cell = json.loads(line)
        print(json.dumps(check(name, dtype, *cell.split("@"))), flush=True)


TEXT = """# Every op in other layouts

`python -m tests.ops.layouts` (torch {version}, CPU, at commit {commit}): each op of PyTorch's own
database on up to {samples} samples whose tensors are column-major, channels_last, or in any order
with gaps (*anyhow*), in float64 and complex128 (one integer type for ops that take none of them).
*value* is the captured graph, *adjoint* compares ⟨ct, J t⟩ with ⟨Jᴴ ct, t⟩, *vjpjvp* is reverse
over forward, and so on; references are autograd, forward AD, loops and differences, as in
`coverage.md`. Every value of every graph is compared with the shape, strides and dtype that the
graph says it has.

**{done:,} of {total:,} cells were run**, *value*, *vjp*, *jvp* and *vmap* before the pairs, and
of each, ops from the whole database at any time. Cells that had failed were run again when that
was mended.

{counts}

{listed}"""


def write(results: dict[tuple, str], cells: list[tuple], commit: str) -> None:
    counts = [
        "| composition | layout | cells | run | right | without a reference | wrong or error |"
    ]
    counts += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for composition in CHECKS:
        for layout in LAYOUTS:
            mine = [cell for cell in cells if cell[-1] == f"{composition}@{layout}"]
            found = [results[cell] for cell in mine if cell in results]
            bad, right = sum(map(table.failed, found)), found.count("right")
            row = (
                composition,
                layout,
                len(mine),
                len(found),
                right,
                len(found) - right - bad,
                bad,
            )
            counts.append(f"| {' | '.join(map(str, row))} |")
    failed = [(key, o) for key, o in sorted(results.items()) if table.failed(o)]
    lines = ["| op | dtype | cell | why | outcome |", "| --- | --- | --- | --- | --- |"]
    for (_, name, dtype, cell), o in failed:
        why = FAILURES.get((name, cell.split("@")[0]), "not known")
        lines.append(f"| {name} | {dtype} | {cell} | {why} | {o.replace('|', '/')} |")
    text = TEXT.format(
        version=torch.__version__.split("+")[0],
        commit=commit,
        samples=SAMPLES,
        done=len(results),
        total=len(cells),
        counts="\n".join(counts),
        listed="\n".join(lines) + "\n" if failed else "All are right.\n",
    )
    DOC.write_text(text)


def main() -> int:
    parser = sweep_parser(__doc__)
    parser.add_argument(
        "--cells", default="*", help="a shell pattern of composition@layout (default all)"
    )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument(
        "--write",
        metavar="COMMIT",
        help="put what the log has, found at COMMIT, into docs/layouts.md",
    )
    options = parser.parse_args()
    if options.worker:
        work()
        return 0
    todo = [
        ("aotfunc", n, d, c)
        for n in chosen(table.OPS, options)
        for d, c in cells(n)
        if fnmatch.fnmatch(c, options.cells)
    ]
    if options.write:
        write(logged(options.log, todo), todo, options.write)
        return 0
    worker: Callable[[], Worker] = lambda: Worker(("-m", "tests.ops.layouts", "--worker"))
    results = sweep(todo, options.jobs, options.log, worker)
    bad = {key: o for key, o in results.items() if table.failed(o)}
    for (_, name, dtype, cell), o in sorted(bad.items()):
        print(name, dtype, cell, FAILURES.get((name, cell.split("@")[0]), "NEW"), o)
    print(Counter(o.split(":")[0] for o in results.values()))
    return int(any((name, cell.split("@")[0]) not in FAILURES for _, name, _, cell in bad))


if __name__ == "__main__":
    sys.exit(main())
