"""Ops that vmap can only batch by a loop: visible in the graph, reported once at the user's line,
refused if strict."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from aotfunc import chunk_vmap, grad, jacfwd, jit, make_fx, vmap
from aotfunc.errors import LoopWarning, RuleError
from tests.reference import assert_same, loop


@torch.library.custom_op("aotfunc_test_loops::ranked", mutates_args=())
def ranked(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """An op of the user's own, for vectors only, without a batching rule."""
    assert x.dim() == 1
    return x.sort()[0] * y


@ranked.register_fake
def _(x, y):
    return torch.empty_like(x)


def ranked_backward(ctx, g):
    x, y = ctx.saved_tensors
    return torch.zeros_like(x).scatter(0, x.argsort(), g * y), None


ranked.register_autograd(
    ranked_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


@torch.library.custom_op("aotfunc_test_loops::halves", mutates_args=())
def halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One with two results."""
    assert x.dim() == 1
    return x[:2].clone(), x[2:].clone()


@halves.register_fake
def _(x):
    return x.new_empty(2), x.new_empty(x.shape[0] - 2)


@torch.library.custom_op("aotfunc_test_loops::batchable", mutates_args=())
def batchable(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


batchable.register_fake(torch.empty_like)
batchable.register_vmap(lambda info, in_dims, x: (batchable(x), in_dims[0]))

X, Y = torch.tensor([[3.0, 1.0, 2.0], [5.0, 6.0, 4.0]]), torch.tensor([2.0, 3.0])


def targets(f, *args):
    return [str(n.target) for n in make_fx(f)(*args).graph.nodes if n.op == "call_function"]


@pytest.mark.filterwarnings("ignore::aotfunc.errors.LoopWarning")
@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (-1, 0), (1, None)])
def test_equals_a_loop_and_is_one_in_the_graph(in_dims):
    x = X if in_dims[0] == 0 else X.t()
    y = Y if in_dims[1] == 0 else Y[0]
    assert_same(vmap(ranked, in_dims)(x, y), loop(ranked, in_dims)(x, y))
    calls = targets(vmap(ranked, in_dims), x, y)
    assert calls.count("aotfunc_test_loops.ranked.default") == 2
    assert calls[-1] == "aten.stack.default"


@pytest.mark.filterwarnings("ignore::aotfunc.errors.LoopWarning")
def test_several_results_nested_and_empty():
    x = torch.randn(2, 3, 5)
    assert_same(vmap(vmap(halves))(x), loop(loop(halves))(x))
    empty = vmap(halves)(torch.randn(0, 5))
    assert [t.shape for t in empty] == [(0, 2), (0, 3)]


@pytest.mark.filterwarnings("ignore::aotfunc.errors.LoopWarning")
def test_with_derivatives():
    f = lambda x, y: ranked(x, y).square().sum()
    want = torch.stack([2 * x * y * y for x, y in zip(X, Y)])
    assert_same(vmap(grad(f))(X, Y), want)


def test_the_warning_names_op_line_and_way_out():
    with pytest.warns(LoopWarning) as caught:
        vmap(lambda x: ranked(x, Y[0]).cos())(X)  # this line
    (warning,) = caught
    assert warning.filename == __file__
    assert "# this line" in Path(__file__).read_text().splitlines()[warning.lineno - 1]
    text = str(warning.message)
    assert "aotfunc_test_loops.ranked.default" in text and "loop over the samples" in text
    assert "register_vmap" in text


def test_it_is_a_category_of_its_own_that_filters_work_on():
    assert issubclass(LoopWarning, UserWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoopWarning)
        for _ in range(2):  # a refused capture is not remembered as a good one
            with pytest.raises(LoopWarning):
                vmap(lambda x: ranked(x, Y[0]).tan())(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", LoopWarning)
        vmap(lambda x: ranked(x, Y[0]).tan())(X)


def test_once_per_op_in_a_process():
    """Through the warnings module's own mechanism, with Python's default filters."""
    script = """
import torch
from aotfunc import vmap
x = torch.tensor([[1, 1, 2], [3, 4, 4]])
for k in range(3):
    vmap(lambda x: torch.unique_consecutive(x) + k)(x)
vmap(torch.unique_consecutive)(x)
vmap(lambda x: torch.unique(x) * 2)(x)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    shown = [line for line in done.stderr.splitlines() if "LoopWarning" in line]
    assert len(shown) == 2, done.stderr
    assert "unique_consecutive" in shown[0] and "_unique2" in shown[1]


STRICT = {
    "plain": lambda: vmap(ranked, strict=True)(X, Y),
    "chunked": lambda: vmap(ranked, chunk_size=1, strict=True)(X, Y),
    "inside a gradient": lambda: vmap(grad(lambda x, y: ranked(x, y).square().sum()), strict=True)(
        X, Y
    ),
    "of a compiled function": lambda: vmap(jit(lambda x, y: ranked(x, y) + 1), strict=True)(X, Y),
    "in a compiled function": lambda: jit(vmap(lambda x, y: ranked(x, y) + 2, strict=True))(X, Y),
    "outside": lambda: vmap(vmap(lambda x: ranked(x, Y[0])), strict=True)(X.expand(3, 2, 3)),
    "by value": lambda: vmap(torch.unique_consecutive, strict=True)(
        torch.tensor([[1, 1, 2], [3, 4, 4]])
    ),
}


@pytest.mark.filterwarnings("ignore::aotfunc.errors.LoopWarning")
@pytest.mark.parametrize("name", STRICT)
@pytest.mark.parametrize("seen", [False, True])
def test_strict_refuses(name, seen):
    """Also what was captured before without strict."""
    if seen:
        vmap(ranked)(X, Y)
        vmap(torch.unique_consecutive)(torch.tensor([[1, 1, 2], [3, 4, 4]]))
    with pytest.raises(
        RuleError, match=r"strict=True.*(ranked|unique_consecutive).*loop over.*register_vmap"
    ):
        STRICT[name]()


def test_strict_names_the_line():
    with pytest.raises(RuleError, match=r"test_loops.py:\d+ in .*a line of its own"):
        vmap(lambda x: ranked(x, Y[1]).neg(), strict=True)(X)  # a line of its own


def test_strict_lets_everything_else_pass(recwarn):
    f = lambda x: torch.histc(x, 3, 0, 7) + torch.cumsum(x, 0)
    assert_same(vmap(f, strict=True)(X), loop(f)(X))
    assert_same(vmap(batchable, strict=True)(X), X.sin())
    assert targets(vmap(batchable, strict=True), X) == ["aotfunc_test_loops.batchable.default"]
    assert_same(chunk_vmap(batchable, chunks=2)(X), X.sin())
    jacfwd(torch.sin)(X[0])
    assert not [w for w in recwarn if w.category is LoopWarning]


def test_an_op_that_does_not_meet_the_batch_is_called_once(recwarn):
    f = lambda x: x * ranked(Y, Y[0])[0]
    assert_same(vmap(f, strict=True)(X), loop(f)(X))
    assert targets(vmap(f, strict=True), X).count("aotfunc_test_loops.ranked.default") == 1
    assert not [w for w in recwarn if w.category is LoopWarning]
