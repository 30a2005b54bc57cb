"""A sample of the sweep of layouts (python -m tests.ops.layouts) for every run."""

import pytest
import torch

import aotfunc
from aotfunc import debug
from aotfunc.backends.eager import compile_graph
from aotfunc.errors import GraphError
from aotfunc.trace.emit import Builder
from aotfunc.trace.shapes.sig import sig_of
from tests.ops import layouts, table
from tests.ops.test_ops import CORE

CELLS = [
    ("vjp", "anyhow"),
    ("jvp", "column"),
    ("vmap", "channels_last"),
    ("vjpjvp", "anyhow"),
    ("adjoint", "column"),
]


@pytest.fixture(autouse=True)
def compared(monkeypatch):
    """Every value is compared with what the graph says of it, in code that is made now."""
    aotfunc.clear_caches()
    monkeypatch.setattr(debug, "LEVEL", 2)
    yield
    aotfunc.clear_caches()


@pytest.mark.limit(200)
@pytest.mark.parametrize("name", [n for n in CORE if n in table.OPS])
def test_op(name):
    wrong = []
    for dtype in {"float64", "complex128"} & set(table.dtypes(table.OPS[name])):
        for composition, layout in CELLS:
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
