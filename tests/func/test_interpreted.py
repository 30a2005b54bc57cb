"""A graph gives the same results on the runs that go through its calls and on those of its
code."""

import weakref

import pytest
import torch

from aotfunc import grad, jvp, vmap
from aotfunc.backends import interpret
from aotfunc.backends.interpret import OFTEN, Calls, Interpreted
from aotfunc.trace.emit import Builder
from aotfunc.trace.shapes.sig import sig_of
from tests.inputs import f64

aten = torch.ops.aten


def several(x):
    """One of two outputs, lists of tensors and of None, a number that is not finite."""
    a, b = x.chunk(2)
    parts = torch.cat([a, b.sin(), x.max(0)[0][None]])
    written = x.clone()
    written[:, torch.tensor([1])] = x[0, 0]
    return torch.where(parts > 0, parts, -float("inf")), written


def marks(x):
    """Values that autograd does not see, and one that is written behind its back."""
    y, kept = x * 2, x.detach()
    with torch.no_grad():
        y[0] += kept[1]
        slope = y.exp()
    y.data.mul_(2)
    return x.detach(), kept * y, y, slope.detach()


PROGRAMS = {
    "several": several,
    "softmax": lambda x: torch.softmax(x, 0) @ x.new_ones(3),
    "grad": grad(lambda x: (x.sin() ** 2).sum()),
    "jvp": lambda x: jvp(lambda x: x.exp().cumsum(0), (x,), (x.cos(),)),
    "marks": marks,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_run_gives_the_same(name):
    f, x = PROGRAMS[name], f64(2, 4, 3)
    runs = [vmap(f)(x) for _ in range(OFTEN + 2)]
    for run in runs:
        torch.testing.assert_close(run, runs[-1], rtol=0, atol=0)
    samples = [f(sample) for sample in x]
    torch.testing.assert_close(
        runs[0], torch.utils._pytree.tree_map(lambda *s: torch.stack(s), *samples)
    )


def test_code_is_made_for_what_runs_often(monkeypatch):
    made = []
    compiled = interpret.compile_graph
    monkeypatch.setattr(interpret, "compile_graph", lambda g: made.append(g) or compiled(g))
    x, b = torch.randn(3), Builder()
    node = b.placeholder("x", sig_of(x))
    fn = Interpreted(b.finish([b.call(aten.sin.default, node), 2, node]))
    for run in range(1, OFTEN + 3):
        sine, two, same = fn(x)
        assert sine.equal(x.sin()) and two == 2 and same is x
        assert len(made) == (run >= OFTEN)


def test_values_are_dropped_after_their_last_use(monkeypatch):
    x, b = torch.randn(3), Builder()
    made, alive = [], []

    def watched(node):
        def call(*args):
            alive.append(sum(ref() is not None for ref in made))
            out = node.target(*args)
            made.append(weakref.ref(out))
            return out

        return call

    n = b.placeholder("x", sig_of(x))
    for op in (aten.sin, aten.cos, aten.exp, aten.tanh):
        n = b.call(op.default, n)
    n = b.call(aten.neg.default, b.call(aten.cat.default, [n, n]))
    monkeypatch.setattr(interpret, "call_of", watched)
    (out,) = Calls(b.finish([b.call(aten.exp.default, n)]))(x)
    assert out.equal(x.sin().cos().exp().tanh().repeat(2).neg().exp())
    assert alive == [0, 1, 1, 1, 1, 1, 1]  # what the op itself reads
