"""A sample of the sweep of layouts (python -m tests.ops.layouts) for every run."""

import pytest
import torch

from aotfunc.backends.eager import compile_graph
from aotfunc.errors import GraphError
from aotfunc.trace.emit import Builder
from aotfunc.trace.shapes.sig import sig_of
from tests.ops import layouts, table
from tests.ops.test_ops import CORE

pytestmark = pytest.mark.usefixtures("compared")

PAIRS = [("vmap", "channels_last"), ("vjpjvp", "anyhow")]
CELLS = {
    "float64": [*PAIRS, ("vjp", "anyhow"), ("jvp", "column"), ("adjoint", "column")],
    "complex128": PAIRS,
}


@pytest.mark.limit(200)
@pytest.mark.parametrize("name", [n for n in CORE if n in table.OPS])
def test_op(name):
    wrong = []
    for dtype in CELLS.keys() & table.dtypes(table.OPS[name]):
        for composition, layout in CELLS[dtype]:
            if composition in layouts.compositions(name, dtype):
                outcome = layouts.check(name, dtype, composition, layout, count=2)
                if table.failed(outcome) and (name, composition) not in layouts.FAILURES:
                    wrong.append(f"{dtype} {composition} {layout}: {outcome}")
    assert not wrong, "\n".join(wrong)


def test_a_graph_that_says_something_else_is_an_error():
    x = torch.ones(2, 3).t()
    b = Builder()
    given = b.placeholder("x", sig_of(x))
    sine = b.make(
        "call_function", torch.ops.aten.sin.default, (given,), {}, sig_of(x.contiguous())
    )
    run = compile_graph(b.finish([sine]))
    with pytest.raises(
        GraphError, match=r"sin.* is \[\(\(3, 2\), \(1, 3\), torch.float32\)\], not .*\(2, 1\)"
    ):
        run(x)
