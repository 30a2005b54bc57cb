"""functionalize: the same results, and a graph in which nothing writes and nothing aliases."""

import pytest
import torch

from aotfunc import functionalize, grad, make_fx, vmap
from tests.inputs import f64
from tests.reference import assert_same, fresh


def through_views(x):
    y = x.clone()
    y.view(-1)[1:].view(-1, 1).add_(1)
    y.t()[1] += 1
    y.diagonal().mul_(2)
    return y, y.view(-1)[0]


def writes_its_input(x):
    x.add_(1)
    return x.sum()


def masks(x):
    y = x.clone()
    y[y > 0] = 0
    y[[0, 1], [1, 0]] = 7
    y.masked_fill_(y < -1, 3)
    return y


def out_argument(x):
    out = torch.empty_like(x)
    torch.sin(x, out=out)
    return out.unsqueeze_(0)


def reads_an_older_view(x):
    y = x.clone()
    row = y[0]
    y.mul_(3)
    row.add_(1)
    return row * 2, y


PROGRAMS = [through_views, writes_its_input, masks, out_argument, reads_an_older_view]


@pytest.mark.parametrize("f", PROGRAMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("remove", ["mutations", "mutations_and_views"])
def test_equals_f(f, remove):
    x = f64(3, 3)
    mine, theirs = fresh((x, x.clone()))
    assert_same(functionalize(f, remove=remove)(mine), f(theirs))
    assert_same(mine, theirs)


@pytest.mark.parametrize("f", PROGRAMS, ids=lambda f: f.__name__)
def test_the_graph_mutates_nothing_but_its_inputs_at_the_end(f):
    gm = make_fx(functionalize(f))(f64(3, 3))
    placeholders = {n for n in gm.graph.nodes if n.op == "placeholder"}
    for node in gm.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            if node.target._schema.is_mutable:
                assert (
                    node.target is torch.ops.aten.copy_.default and node.args[0] in placeholders
                ), gm.code


def test_remove_is_checked():
    with pytest.raises(RuntimeError):
        functionalize(masks, remove="everything")(f64(3, 3))


def test_under_other_transforms():
    x = f64(2, 3, 3)
    f = lambda x: functionalize(through_views)(x)[0].sin().sum()
    plain = lambda x: through_views(x)[0].sin().sum()
    expected = torch.stack([torch.func.grad(plain)(row) for row in x])
    assert_same(vmap(grad(f))(x), expected)
