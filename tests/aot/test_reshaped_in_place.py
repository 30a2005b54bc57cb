"""Views of a tensor whose shape a compiled function changes in place afterwards."""

import pytest
import torch
from torch import nn

from aotfunc import jit
from tests.reference import assert_same

VIEWS = {
    "view": lambda v: v.view(-1),
    "chain": lambda v: v.view(-1)[2:].view(2, 2),
    "part": lambda v: v[:, 1:],
    "t": lambda v: v.t(),
}
RESHAPES = {
    "t_": lambda v: v.t_(),
    "t_, unsqueeze_": lambda v: v.t_().unsqueeze_(1),
    "unsqueeze_, squeeze_, t_": lambda v: v.unsqueeze_(0).squeeze_(0).t_(),
}
WRITES = {"unwritten": lambda v: None, "written": lambda v: v.mul_(2)}


@pytest.mark.parametrize("before", WRITES)
@pytest.mark.parametrize("after", WRITES)
@pytest.mark.parametrize("reshape", RESHAPES)
@pytest.mark.parametrize("view", VIEWS)
def test_older_views(view, reshape, before, after):
    w = nn.Parameter(torch.arange(6.0).view(2, 3) + 1)

    def f(x):
        v = x * w
        shown = VIEWS[view](v)
        WRITES[before](v)
        RESHAPES[reshape](v)
        WRITES[after](v)
        shown[:1].mul_(1.5)
        return shown[0] * 2, v * 3

    found = []
    for run in (f, jit(f)):
        w.grad, x = None, torch.ones(2, 3, requires_grad=True)
        row, all_ = run(x)
        (row.square().sum() + all_.sum()).backward()
        found.append((row.detach(), all_.detach(), x.grad, w.grad))
    assert_same(found[1], found[0])


def test_versions_inside():
    def f(x):
        v, versions = x * 1, []
        for op in (lambda: v.mul_(2), lambda: v.t_(), lambda: v[0].add_(1), lambda: v.exp()):
            op()
            versions.append(v._version)
        return versions

    assert jit(f)(torch.ones(2, 3)) == f(torch.ones(2, 3)) == [1, 2, 3, 3]
