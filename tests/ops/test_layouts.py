"""A sample of the sweep of layouts (python -m tests.ops.layouts) for every run."""

import pytest

import aotfunc
from aotfunc import debug
from tests.ops import layouts, table
from tests.ops.test_ops import CORE

CELLS = [("vjp", "anyhow"), ("jvp", "column"), ("vmap", "channels_last"), ("vjpjvp", "anyhow"), ("adjoint", "column")]


@pytest.fixture(autouse=True)
def compared(monkeypatch):
    """Every value is compared with what the graph says of it, in code that is made now."""
    aotfunc.clear_caches()
    monkeypatch.setattr(debug, "LEVEL", 1)
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
    import torch

    from aotfunc.errors import GraphError
    from aotfunc.trace.shapes import make_sig

    gm = aotfunc.make_fx(lambda x: x.t().sin())(torch.randn(2, 3))
    program = aotfunc.jit(lambda x: x.t().sin())
    assert torch.equal(program(torch.ones(2, 3)), gm(torch.ones(2, 3)))
    from aotfunc.backends.eager import compile_graph

    (sin,) = (n for n in gm.graph.nodes if n.target is torch.ops.aten.sin.default)
    said = make_sig((3, 2), (2, 1), torch.float32, torch.device("cpu"))
    for n in gm.graph.nodes:
        if n.op == "output":
            n.args = ((sin,),)
    sin.meta["val"] = said
    with pytest.raises(GraphError, match=r"sin.* is \[\(\(3, 2\), \(1, 3\), torch.float32\)\], not .*\(2, 1\)"):
        compile_graph(gm.graph)(torch.ones(2, 3))
