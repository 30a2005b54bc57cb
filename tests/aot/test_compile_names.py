"""The names of functorch.compile."""

import importlib.util
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aotfunc import compile as names
from aotfunc import make_fx
from aotfunc.errors import ArgumentError, BackendError, CaptureError
from tests.reference import assert_same


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


def test_functorchs_names_are_there():
    functorch = pytest.importorskip("functorch.compile")
    assert not {n for n in vars(functorch) if not n.startswith("_") and not hasattr(names, n)}


@pytest.mark.parametrize("name", ["nnc_jit", "pythonkey_decompose"])
def test_names_without_a_meaning_say_so(name):
    with pytest.raises(BackendError, match=rf"{name} means nothing here: "):
        getattr(names, name)(None)


def test_aot_module_simplified():
    net, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    assert_same(names.aot_module_simplified(net, (x,), names.nop)(x), net(x))


def test_nop_and_print_compile(capsys):
    x = leaf(3)
    for compiler in (names.nop, names.print_compile):
        f = names.compiled_function(lambda x: x.sin(), compiler)
        torch.testing.assert_close(torch.autograd.grad(f(x).sum(), x)[0], x.detach().cos())
    text = capsys.readouterr().out
    assert text.count("def forward") == 2 and "aten.sin" in text and "aten.cos" in text


def test_debug_compile():
    x = leaf(3)
    f = names.aot_function(lambda x: (x * x).sqrt().sum(), names.debug_compile)
    torch.testing.assert_close(torch.autograd.grad(f(x), x)[0], x.detach().sign())
    g = names.jit(lambda x: (x - 10).log().sum(), names.debug_compile)  # the culprit
    with pytest.raises(CaptureError, match=r"log.*first value with a NaN.*the culprit"):
        g(torch.rand(3))

    def lying(gm, inputs):
        next(n for n in gm.graph.nodes if n.op == "call_function").meta["val"] = torch.empty(7)
        return names.debug_compile(gm, inputs)

    with pytest.raises(CaptureError, match="the graph says"):
        names.jit(torch.sin, lying)(torch.rand(3))


def test_boxed():
    seen = []

    def compiler(gm, inputs):
        return lambda *args: seen.append(len(args)) or gm(*args)

    boxed = names.make_boxed_compiler(compiler)
    run = boxed(lambda *args: args, [])
    assert run._boxed_call and run([1, 2]) == (1, 2)
    f = names.make_boxed_func(lambda a, b: a - b)
    assert f._boxed_call and f([3, 1]) == 2
    x = leaf(2)
    seen.clear()
    names.aot_function(lambda x, y: x * y, boxed)(x, x).sum().backward()
    assert len(seen) == 2


def test_recompilations_are_counted():
    names.clear_compile_cache()
    assert names.num_of_recompilations() == 0
    f, g = names.jit(lambda x: x * 2), names.aot_function(lambda x: x * 3, "eager")
    for n in (2, 2, 3):
        f(torch.ones(n))
    g(torch.ones(2))
    assert names.num_of_recompilations() == 3
    names.clear_compile_cache()
    assert names.num_of_recompilations() == 0 and not f.entries
    f(torch.ones(2))
    assert names.num_of_recompilations() == 1


def test_memory_efficient_fusion(monkeypatch):
    from aotfunc.backends import REGISTRY

    monkeypatch.setitem(REGISTRY, "inductor", names.nop)  # test_inductor.py runs the real one
    x, net = leaf(3), nn.Linear(3, 2)
    f = names.memory_efficient_fusion(lambda x: x.sin().cos())
    assert f.pipeline.partition is names.min_cut_rematerialization_partition
    torch.testing.assert_close(f(x), x.sin().cos())
    fused = names.memory_efficient_fusion(net)
    assert isinstance(fused, nn.Module)
    torch.testing.assert_close(fused(x), net(x))


def graph():
    from aotfunc import make_fx

    return make_fx(lambda x: torch.sin(x) * 2)(torch.ones(2))


def test_draw_graph(tmp_path):
    pytest.importorskip("pydot")
    names.draw_graph(graph(), str(tmp_path / "g.dot"))
    text = (tmp_path / "g.dot").read_text()
    assert "digraph" in text and "sin" in text
    if shutil.which("dot") is None:
        with pytest.raises(BackendError, match="install graphviz"):
            names.draw_graph(graph(), str(tmp_path / "g"))
    else:
        names.draw_graph(graph(), str(tmp_path / "g"))
        assert "<svg" in (tmp_path / "g.svg").read_text()
    torch.testing.assert_close(
        names.jit(torch.cos, names.draw_graph_compile(str(tmp_path / "c.dot")))(
            torch.ones(2)
        ).cos(),
        torch.ones(2).cos().cos(),
    )
    assert "cos" in (tmp_path / "c.dot").read_text()
    x = leaf(3)
    partition = lambda gm, inputs, **kw: names.draw_joint_graph(
        gm, inputs, str(tmp_path / "joint.dot"), **kw
    )
    names.aot_function(torch.sin, names.nop, partition_fn=partition)(x).sum().backward()
    assert "cos" in (tmp_path / "joint.dot").read_text()


@pytest.mark.skipif(importlib.util.find_spec("pydot") is not None, reason="pydot is installed")
def test_draw_graph_without_pydot(tmp_path):
    with pytest.raises(BackendError, match="pip install pydot"):
        names.draw_graph(graph(), str(tmp_path / "g.dot"))


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:The TorchScript type system")
def test_ts_compile():
    x, w = leaf(3), torch.randn(3)
    f = names.aot_function(lambda x, w: (x.sin() * w, 3), names.ts_compile)
    for _ in range(3):
        out, three = f(x, w)
        assert three == 3
        torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], x.detach().cos() * w)


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:The TorchScript type system")
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_compiler_may_run_the_graph(requires_grad):
    """What it draws from generators in doing so is not missing from the first call."""
    g, x = torch.Generator(), torch.randn(50, requires_grad=requires_grad)

    def runs(gm, inputs):
        gm(*inputs)
        return gm

    def drawn(f):
        torch.manual_seed(3)
        g.manual_seed(4)
        return f(x), torch.rand(3), torch.rand(3, generator=g)

    for f, compilers in (
        (lambda x: F.dropout(x) + torch.rand(50), [runs, names.ts_compile]),
        (lambda x: x * torch.rand(50, generator=g), [runs]),
    ):
        for compiler in compilers:
            compiled = names.aot_function(f, compiler)
            for _ in range(2):
                assert_same(drawn(compiled), drawn(f))


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:The TorchScript type system")
def test_a_mask_is_drawn_once_by_torchscript():
    x = torch.ones(50, requires_grad=True)
    compiled = names.aot_function(lambda x: F.dropout(x) * x, names.ts_compile)
    for _ in range(2):
        y = compiled(x)
        (g,) = torch.autograd.grad(y.sum(), x)
        assert_same(g, 2 * y.detach())


def test_the_graph_being_compiled_has_a_name():
    seen = []

    def compiler(gm, inputs):
        seen.append((names.get_aot_graph_name(), names.get_graph_being_compiled()))
        within, function, number = names.get_aot_compilation_context()
        assert within == [seen[-1][0]] and function == "aot_function"
        assert seen[-1][0].endswith(f"_{number}")
        return gm

    names.aot_function(torch.sin, compiler)(leaf(3)).sum().backward()
    (forward, same), (backward, _) = seen
    assert forward == same and "aot_function_forward_" in forward
    assert "aot_function_backward_" in backward
    with pytest.raises(BackendError, match="no graph is being compiled"):
        names.get_aot_graph_name()
    assert names.get_aot_compilation_context() == ([], "model", 0)


def test_decompositions_by_name():
    table, seen = names.get_decompositions([torch.ops.aten.gelu_backward]), []

    def compiler(gm, inputs):
        seen.append(gm.code)
        return gm

    x = leaf(5)
    f = names.aot_function(lambda x: F.gelu(x).sum(), compiler, decompositions=table)
    (g,) = torch.autograd.grad(f(x), x)
    assert "gelu_backward" not in "".join(seen)
    torch.testing.assert_close(g, torch.autograd.grad(F.gelu(x).sum(), x)[0])


# ----- the minifier ------------------------------------------------------------------------------


def calls(gm):
    return [n.target.overloadpacket.__name__ for n in gm.graph.nodes if n.op == "call_function"]


def test_minifier_finds_the_op_of_a_failing_compiler():
    def compiler(gm, inputs):
        if "aten.tanh.default" in gm.code:
            raise ValueError("no tanh")
        return gm

    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    with pytest.raises(BackendError) as error:
        names.jit(net, compiler)(x)
    gm = error.value.graph_module
    inputs = [
        x if n.meta["val"].shape == x.shape else torch.randn(n.meta["val"].shape)
        for n in gm.graph.find_nodes(op="placeholder")
    ]

    def fails(gm, inputs):
        try:
            compiler(gm, inputs)
        except ValueError:
            return True

    small, given = names.minifier(gm, inputs, fails)
    assert calls(small) == ["tanh"] and len(given) == 1
    assert fails(small, given)


def test_minifier_keeps_what_is_needed():
    """A wrong number where two ops meet, one of several results, and an error of its own."""
    gm = make_fx(lambda x: (x.exp().sin() * x.cos(), x.tan()))(torch.ones(2))

    def fails(gm, inputs):
        found = calls(gm)
        if "tan" in found and "exp" not in found:
            raise ZeroDivisionError
        return "sin" in found and "mul" in found

    dumped = []
    small, given = names.minifier(gm, [torch.ones(2)], fails, lambda *state: dumped.append(state))
    assert calls(small) == ["sin", "mul"] and len(given) == 2
    assert dumped[-1] == (small, given) and all(fails(*state) for state in dumped)
    torch.testing.assert_close(small(*given)[0], given[0].sin() * given[1])
    with pytest.raises(ArgumentError, match="not true of the graph"):
        names.minifier(gm, [torch.ones(2)], lambda gm, inputs: False)
