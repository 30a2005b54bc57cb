"""A pipeline that cuts a joint program as another process did."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..capture.calls import CompiledCall
from ..capture.capture import capture, parameter_names
from ..capture.tree import Arguments
from ..graph import Program
from ..trace.shapes.sig import Sig
from .aliasing import without_views
from .chains import made_by
from .halves import Halves
from .pipeline import Compiler, Partition, Pipeline


class Halved(Pipeline):
    """A pipeline with ``halves``: a "joint" program, and the "forward" and "backward" cut from it.
    Other programs are cut by the minimum cut."""

    def __init__(self, name: str, compiler: str | Compiler) -> None:
        super().__init__(name, compiler)
        self.halves: dict[str, Program] = {}

    def split(
        self, joint: Program, n_early: int, last: bool = False
    ) -> tuple[CompiledCall, CompiledCall]:
        if not (last and self.halves and same_programs(joint, self.halves["joint"])):
            return super().split(joint, n_early, last)
        compilers = {"forward": self.forward, "backward": self.backward}
        forward, backward = (
            CompiledCall(self.halves[half], run, self.split, f"{self.name}_{half}")
            for half, run in compilers.items()
        )
        return forward, backward


def same_programs(a: Program, b: Program) -> bool:
    """Return whether two programs are the same, which a text does not tell of shapes."""
    vals = ([n.meta["val"] for n in p.graph.nodes if n.op != "output"] for p in (a, b))
    return a.code == b.code and next(vals) == next(vals)


def halved_programs(
    run: Callable, signatures: Sequence[Sig], wrt: tuple[int, ...], partition: Partition
) -> dict[str, Program]:
    """Return the joint program of ``run`` for tensors like these, differentiated by those that
    ``wrt`` names, and its halves; none where no result has a derivative."""
    examples = [s.fresh().requires_grad_(i in wrt) for i, s in enumerate(signatures)]
    arguments = Arguments(examples, {})
    rec = capture(
        run,
        arguments.leaves,
        arguments.rebuilt,
        samples=dict(enumerate(signatures)),
        why_not="export captures the function once for all values",
        constants=False,
        name_of=parameter_names(run, arguments),
    )
    program, _ = without_views(rec)
    pipeline = Pipeline("export", "eager", partition=partition, exact=True)
    call = CompiledCall(program, pipeline.forward, pipeline.split, "export")
    call.made = made_by(rec)
    return Halves(call, wrt).programs()
