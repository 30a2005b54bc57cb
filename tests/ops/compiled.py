"""Every op's forward and backward through a compiling backend: python -m tests.ops.compiled
[PATTERN …] [--backend inductor|cpp] [--log FILE] …

Samples of each op (one, or --samples of them), in float32 (in the first dtype that it takes where
that is none) or in another --dtype. With cpp a kernel is made also where calling the op would be
as good. Ops are compiled a few at a time, and each by itself where not all are right. With
--log each outcome is appended to FILE as it comes, and what FILE holds already is not run again.
--write puts the outcomes into the backend's page in docs. Status 1 if one is wrong or an error.
"""

from __future__ import annotations

import json
import random
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import aotfunc
from tests.kernels import every_kernel
from tests.ops import table
from tests.ops.__main__ import Worker, chosen, sweep_parser
from tests.ops.compositions import Call
from tests.ops.references import (
    NoReference,
    Wrong,
    backward,
    close,
    leaf,
    noise,
    reference,
    seeded,
)

DOCS = Path(__file__).parents[2] / "docs"
TOGETHER = 8
LIMIT_S = 60.0

INDUCTOR = """# Every op through Inductor

`python -m tests.ops.compiled --write` (torch {version}, CPU): one sample of every op of PyTorch's
own database, forward and backward through `jit(f, backend="inductor")`, against eager with the
same seed; in bfloat16 (`--dtype bfloat16`) those that normalise, sum, or are functions of one
value.

{counts}

*Right* is right numbers, dtypes and strides. *Eagerly* means that Inductor failed on an op or on
the graph: it is run by PyTorch's own kernels, and a BackendWarning names the reason. (Inductor
itself calls PyTorch's kernels for many ops, which is not counted here.) *None* is no reference:
eager has no answer to compare with, or `jit` refuses the op with any backend.

{listed}"""

CPP = """# Every op through the C++ backend

`python -m tests.ops.compiled --backend cpp --samples 12 --write` (torch {version}, CPU): up to
twelve samples of every op of PyTorch's own database, forward and backward through
`jit(f, backend="cpp")`, against eager with the same seed, in each dtype that kernels compute in.

{counts}

*Right* is right numbers, dtypes and strides, and at least one kernel. *Called* is right too, but
no part of it is a kernel: ops are called as they are. *None* is no reference: eager has no answer
to compare with, or `jit` refuses the op with any backend.

## What is called as it is

- *Random ops.* A seed gives eager's numbers: PyTorch's generator draws in blocks that depend on
  the processor, and Bernoulli numbers (dropout) from MKL's generator. Kernels read what these
  drew.
- *Sums where indices say* are kernels, on one thread, in the order of the indices: results
  do not depend on the number of threads. The gradient of `embedding` is PyTorch's own kernel.
- *Softmax and gradients of group norm in bfloat16 and float16*, group norm in bfloat16, remainders
  and floor division, whose kernels would be slower than PyTorch's, and cumulative ops along
  contiguous memory if they are alone and large, which would be as fast.
- *Images* where PyTorch's kernels are as fast: gradients of padding, and of resizing to fewer
  elements; `linear` resizing, `bilinear` in float64, both in other layouts than the plain one;
  padded windows of images of fewer than 65536 elements, and dilated ones.
- *Complex numbers*, sorting, linear algebra, convolutions, Fourier transforms, special functions
  that are not in `aotfunc/backends/loops/pointwise.py`.

## What has no reference

{listed}"""

#: backend -> its page and what is compiled with
BACKENDS: dict[str, tuple[str, Any]] = {
    "inductor": (INDUCTOR, "inductor"),
    "cpp": (CPP, every_kernel),
}


@dataclass
class Sample:
    """One op on one sample, as a function of its primals that returns its tensors."""

    name: str
    f: Callable
    primals: list[torch.Tensor]

    @staticmethod
    def some(name: str, dtype: str, count: int) -> list[Sample]:
        """Up to so many samples; raises NoReference where there is none."""
        op = table.OPS[name]
        try:
            found = table.samples(name, dtype)
        except Exception as error:
            raise NoReference(f"PyTorch makes no sample: {error}") from None
        random.Random(0).shuffle(rest := found[1:])
        samples: list[Sample] = []
        why = NoReference("no sample")
        for sample in [*found[:1], *rest][:count]:
            try:
                samples.append(Sample.of(name, op, sample))
            except NoReference as error:
                why = error
        if not samples:
            raise why
        return samples

    @staticmethod
    def of(name: str, op: Any, sample: Any) -> Sample:
        call = Call.of(op, sample)
        part = call.differentiated() if op.supports_autograd else call
        f = (
            part.f
            if part is not call
            else lambda *primals: call.rebuilt(list(primals), call.others)
        )
        reference(lambda: f(*leaf(part.primals)))
        try:
            seeded(lambda: aotfunc.jit(f)(*leaf(part.primals)))
        except Exception as error:
            raise NoReference(f"jit refuses it whatever the backend: {error}") from None
        return Sample(name, f, part.primals)


def compare(samples: list[Sample], backend: Any) -> None:
    """Raises Wrong where jit with this backend does not give what eager gives, for all of these in
    one function."""

    def outputs(*primals):
        feed = iter(primals)
        return [o for s in samples for o in s.f(*[next(feed) for _ in s.primals])]

    primals = [p for s in samples for p in s.primals]
    compiled = aotfunc.jit(outputs, backend=backend)
    want = reference(lambda: outputs(*leaf(primals)))
    got = seeded(lambda: compiled(*leaf(primals)))
    close(got, want, "output")
    for a, e in zip(got, want):
        if e.numel() and a.stride() != e.stride():
            raise Wrong(f"strides {a.stride()}, expected {e.stride()}")
    live = [i for i, o in enumerate(got) if o.requires_grad]
    if live:
        cts = noise([want[i] for i in live], seed=1)
        some = lambda f: lambda *primals: [o for i, o in enumerate(f(*primals)) if i in live]
        gradients = lambda f: reference(lambda: backward(some(f), leaf(primals), cts))
        found = seeded(lambda: backward(some(compiled), leaf(primals), cts))
        try:
            close(found, gradients(outputs), "gradient")
        except Wrong:  # as autograd is in places: python -m tests.ops asks differences
            close(found, gradients(aotfunc.jit(outputs)), "gradient")


def text(error: object) -> str:
    """A message on one line, shortened, files without the folder that they are installed in."""
    return re.sub(r"/\S*/site-packages/", "", " ".join(str(error).split()))[:250]


def outcome(samples: list[Sample], backend: Any) -> str:
    """'right', 'called', 'eagerly: what and why', 'wrong: how', 'error: what' or 'none: why there
    is no reference'."""
    made = len(every_kernel.made)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with table.limited(LIMIT_S):
                compare(samples, backend)
        except NoReference as error:
            return f"none: {text(error)}"
        except Wrong as error:
            return f"wrong: {text(error)}"
        except Exception as error:
            return f"error: {type(error).__name__}: {text(error)}"
    said = [
        text(w.message).removeprefix("inductor: ")
        for w in caught
        if w.category.__name__ == "BackendWarning"
    ]
    if said:
        return f"eagerly: {'; '.join(dict.fromkeys(said))}"
    return "called" if backend is every_kernel and len(every_kernel.made) == made else "right"


def outcomes(names: list[str], dtype: str, backend: str, count: int) -> dict[str, str]:
    """The outcome of each op, as far as they can be told apart: 'right' for all, or for none but a
    single one."""
    found: dict[str, str] = {}
    samples: list[Sample] = []
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                samples += Sample.some(name, dtype, count)
            except NoReference as error:
                found[name] = f"none: {text(error)[:160]}"
    if samples:
        result = outcome(samples, BACKENDS[backend][1])
        if result == "right" or len(names) == 1:
            found |= {s.name: result for s in samples}
    return found


def work() -> None:
    """A worker: the arguments of ``outcomes`` come in, what it returns goes out, a line of JSON
    each."""
    for name in ("bfloat16", "bool", "uint8", "int8", "int32"):
        table.DTYPES.setdefault(name, getattr(torch, name))
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(outcomes(*json.loads(line))), flush=True)


def run(
    todo: list[tuple[str, str]], keep: Callable[[str, str, str], None], backend: str, count: int
) -> None:
    """Ask for these (op, dtype), a few at a time and then the others one by one."""
    worker = Worker(("-m", "tests.ops.compiled", "--worker"), 900.0)
    together = TOGETHER if backend == "inductor" else 1
    for dtype in dict.fromkeys(d for _, d in todo):
        names = [name for name, d in todo if d == dtype]
        for i in range(0, len(names), together):
            batch = names[i : i + together]
            found = worker.ask((batch, dtype, backend, count)) if len(batch) > 1 else {}
            for name in batch:
                answer = (
                    found
                    if isinstance(found, dict) and name in found
                    else worker.ask(([name], dtype, backend, count))
                )
                keep(name, dtype, answer[name] if isinstance(answer, dict) else answer)
    worker.stop()


def dtype_of(name: str, dtype: str) -> str | None:
    op = table.OPS[name]
    if dtype == "float32":
        return next(iter(table.dtypes(op)), None)
    return dtype if getattr(torch, dtype) in op.supported_dtypes("cpu") else None


def write(results: dict[tuple[str, str], str], backend: str) -> None:
    kinds = Counter((d, o.split(":")[0]) for (_, d), o in results.items())
    counts = ["| dtype | outcome | ops |", "| --- | --- | --- |"]
    counts += [f"| {d} | {kind} | {count} |" for (d, kind), count in sorted(kinds.items())]
    lines = ["| op | dtype | outcome |", "| --- | --- | --- |"]
    lines += [
        f"| {n} | {d} | {o.replace('|', '/')} |"
        for (n, d), o in sorted(results.items())
        if o not in ("right", "called")
    ]
    version = torch.__version__.split("+")[0]
    (DOCS / f"{backend}.md").write_text(
        BACKENDS[backend][0].format(
            version=version, counts="\n".join(counts), listed="\n".join(lines) + "\n"
        )
    )


def main() -> int:
    parser = sweep_parser(__doc__)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--backend", default="inductor", choices=BACKENDS)
    parser.add_argument("--samples", type=int, default=1, help="how many of each op")
    parser.add_argument(
        "--write",
        action="store_true",
        help="put the outcomes, the log's too, into the backend's page",
    )
    options = parser.parse_args()
    if options.worker:
        work()
        return 0
    results: dict[tuple[str, str], str] = {}
    if options.log and options.log.exists():
        results = {(n, d): o for n, d, o in map(json.loads, options.log.read_text().splitlines())}

    def keep(name: str, dtype: str, outcome: str) -> None:
        results[name, dtype] = outcome
        if options.log:
            with options.log.open("a") as out:
                out.write(json.dumps([name, dtype, outcome]) + "\n")

    asked = [(n, d) for n in chosen(table.OPS, options) if (d := dtype_of(n, options.dtype))]
    run([key for key in asked if key not in results], keep, options.backend, options.samples)
    bad = {key: o for key, o in results.items() if table.failed(o)}
    for key, o in sorted(bad.items()):
        print(*key, o)
    print(Counter(o.split(":")[0] for o in results.values()))
    if options.write:
        write(results, options.backend)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
