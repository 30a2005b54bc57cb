"""Cutting a graph by dependence: the early part once, the late part as often as one likes."""

from __future__ import annotations

import pytest
import torch
from joints import Hand, aten, sig, targets
from torch import fx

from aotfunc.partition import PartitionError, cut


def runnable(*graphs: fx.Graph) -> list[fx.GraphModule]:
    return [fx.GraphModule(torch.nn.Module(), g) for g in graphs]


def test_linear_part_is_late() -> None:
    """The jvp of sin(x * exp(x)): what does not depend on the tangent runs once."""
    h = Hand()
    a, t = h.input("a"), h.input("t")
    e = h(aten.exp.default, a)
    y = h(aten.mul.Tensor, a, e)
    slope = h(aten.mul.Tensor, h(aten.cos.default, y), h(aten.add.Tensor, e, y))
    out, tangent = h(aten.sin.default, y), h(aten.mul.Tensor, slope, t)
    h.module([out, tangent])
    early, late, count = cut(h.graph, [t])
    assert count == 1 and [n.target for n in late.nodes if n.op == "call_function"] == [aten.mul.Tensor]
    first, second = runnable(early, late)
    value = torch.randn(4)
    result, *kept = first(value)
    assert len(kept) == 1
    _, wanted = torch.func.jvp(lambda v: (v * v.exp()).sin(), (value,), (torch.ones(4),))
    torch.testing.assert_close(second(*kept, torch.ones(4))[0], wanted)
    torch.testing.assert_close(result, (value * value.exp()).sin())


def test_outputs_may_be_put_on_either_side() -> None:
    h = Hand()
    a, t = h.input("a"), h.input("t")
    zeros, y = h(aten.full.default, [4], 0.0), h(aten.sin.default, a)
    h.module([y, h(aten.mul.Tensor, y, t), zeros, a])
    early, late, count = cut(h.graph, [t], num_early_outputs=1)
    first, second = runnable(early, late)
    assert count == 3  # sin, zeros, a
    value = torch.randn(4)
    _, *kept = first(value)
    product, zero, same = second(*kept, torch.ones(4))
    assert torch.equal(product, value.sin()) and not zero.any() and same is value
    early, late, count = cut(h.graph, [t])
    assert len(late.output_node().args[0]) == 3
    with pytest.raises(PartitionError, match="depends on"):
        cut(h.graph, [t], num_early_outputs=2)


def test_tuples_stay_early_and_draws_in_order() -> None:
    h = Hand(4, 4)
    a, t = h.input("a"), h.input("t")
    pair = h(aten.sort.default, a, val=(sig(4, 4), sig(4, 4, dtype=torch.int64)))
    noise = h(aten.rand.default, [4, 4])
    late_noise = h(aten.rand_like.default, t)
    order = h.item(pair, 1)
    h.module([h(aten.add.Tensor, h(aten.gather.default, t, 1, order), h(aten.mul.Tensor, noise, late_noise))])
    early, late, count = cut(h.graph, [t])
    assert count == 2 and [n.name for n in late.nodes if n.op == "placeholder"] == ["rand", "getitem", "t"]
    assert targets(runnable(early)[0]).count(aten.rand.default) == 1
    assert aten.rand_like.default in targets(runnable(late)[0])


def test_nothing_late_nothing_early() -> None:
    h = Hand()
    a, t = h.input("a"), h.input("t")
    h.module([h(aten.sin.default, a)])
    early, late, count = cut(h.graph, [t])
    assert count == 0 and late.output_node().args[0] == () and len(early.output_node().args[0]) == 1
    early, late, count = cut(h.graph, [a, t])
    assert count == 0 and early.output_node().args[0] == () and len(late.output_node().args[0]) == 1
