"""Golden texts: programs that write, as graphs that do not."""
# ruff: noqa: E501 - printed graphs are as wide as they are

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn

from aotfunc import functionalize, grad, make_fx
from tests.graphs.shown import dense_scatter, shown
from tests.inputs import same

T = torch.func


def test_write_through_a_view():
    def f(x):
        y = x.clone()
        y.t()[1] += 1
        return y

    assert_expected_inline(
        shown(f, same(2, 3)),
        """\
def forward(self, x):
    t = aten.t.default(x)
    select = aten.select.int(t, 0, 1)
    add = aten.add.Tensor(select, 1)
    select_scatter = aten.select_scatter.default(t, add, 0, 1)
    t_1 = aten.t.default(select_scatter)
    return t_1
""",
    )


def test_write_through_a_view_of_a_view():
    def f(x):
        y = x * 2
        y[1:].view(-1)[::2].mul_(3)
        return y.sum(0)

    assert_expected_inline(
        shown(f, same(3, 2)),
        """\
def forward(self, x):
    mul = aten.mul.Tensor(x, 2)
    slice_1 = aten.slice.Tensor(mul, 0, 1, 9223372036854775807)
    view = aten.view.default(slice_1, [-1])
    slice_2 = aten.slice.Tensor(view, 0, 0, 9223372036854775807, 2)
    mul_1 = aten.mul.Tensor(slice_2, 3)
    slice_scatter = aten.slice_scatter.default(view, mul_1, 0, 0, 9223372036854775807, 2)
    view_1 = aten.view.default(slice_scatter, [2, 2])
    slice_scatter_1 = aten.slice_scatter.default(mul, view_1, 0, 1, 9223372036854775807)
    sum_1 = aten.sum.dim_IntList(slice_scatter_1, [0])
    return sum_1
""",
    )


def test_write_at_indices():
    def f(x, i, v):
        y = x.sin()
        y[i] = v
        return y

    assert_expected_inline(
        shown(f, same(4, 2), torch.tensor([2, 0]), same(2, 2)),
        """\
def forward(self, x, i, v):
    sin = aten.sin.default(x)
    index_put = aten.index_put.default(sin, [i], v)
    return index_put
""",
    )


def test_write_to_an_input_comes_last():
    def f(x, y):
        x.add_(y)
        return x * 2

    assert_expected_inline(
        shown(f, same(3), same(3)),
        """\
def forward(self, x, y):
    add = aten.add.Tensor(x, y)
    mul = aten.mul.Tensor(add, 2)
    copy_ = aten.copy_.default(x, add)
    return mul
""",
    )


def test_values_of_inputs_that_trade_places_are_copied_first():
    def f(x, y):
        old = x.clone()
        x.copy_(y)
        y.copy_(old)
        return x * 2

    x, y = torch.randn(2, 2), torch.randn(2, 2)
    gm = make_fx(f)(x.clone(), y.clone())
    assert_expected_inline(
        gm.code.strip(),
        """\
def forward(self, x, y):
    mul = torch.ops.aten.mul.Tensor(y, 2)
    clone = torch.ops.aten.clone.default(y)
    clone_1 = torch.ops.aten.clone.default(x)
    copy_ = torch.ops.aten.copy_.default(x, clone);  x = clone = copy_ = None
    copy__1 = torch.ops.aten.copy_.default(y, clone_1);  y = clone_1 = copy__1 = None
    return mul""",
    )
    mine, theirs = (x.clone(), y.clone()), (x.clone(), y.clone())
    assert torch.equal(gm(*mine), f(*theirs))
    assert all(map(torch.equal, mine, theirs))


def test_write_to_a_part_of_an_input():
    def f(x):
        x[0].zero_()
        return x.sum()

    assert_expected_inline(
        shown(f, same(2, 3)),
        """\
def forward(self, x):
    full = aten.full.default([3], 0, dtype = torch.float32, device = device(type='cpu'))
    select_scatter = aten.select_scatter.default(x, full, 0, 0)
    sum_1 = aten.sum.default(select_scatter)
    copy_ = aten.copy_.default(x, select_scatter)
    return sum_1
""",
    )


@dense_scatter
def test_gradient_through_a_write():
    def f(x):
        y = x * 2
        y[0] = x[1].sin() * x[0]
        return y.sum()

    assert_expected_inline(
        shown(grad(f), same(3), like=T.grad(f)),
        """\
def forward(self, x):
    select = aten.select.int(x, 0, 1)
    sin = aten.sin.default(select)
    select_1 = aten.select.int(x, 0, 0)
    full = aten.full.default([], 0, dtype = torch.float32, device = device(type='cpu'))
    full_1 = aten.full.default([3], 1, dtype = torch.float32, device = device(type='cpu'))
    select_scatter = aten.select_scatter.default(full_1, full, 0, 0)
    select_backward = aten.select_backward.default(sin, [3], 0, 0)
    cos = aten.cos.default(select)
    mul = aten.mul.Tensor(select_1, cos)
    select_backward_1 = aten.select_backward.default(mul, [3], 0, 1)
    add = aten.add.Tensor(select_backward, select_backward_1)
    mul_1 = aten.mul.Tensor(select_scatter, 2)
    add_1 = aten.add.Tensor(add, mul_1)
    return add_1
""",
    )


def test_functionalize():
    def f(x):
        y = torch.zeros(3)
        y.copy_(x)
        y.relu_()
        return y

    assert_expected_inline(
        shown(functionalize(f), same(3), like=f),
        """\
def forward(self, x):
    relu = aten.relu.default(x)
    return relu
""",
    )


def test_batch_norm_in_training_updates_its_statistics():
    net = nn.BatchNorm1d(2)
    f = lambda mean, var, x: F.batch_norm(
        x, mean, var, net.weight.detach(), net.bias.detach(), training=True
    )
    assert_expected_inline(
        shown(f, torch.zeros(2), torch.ones(2), same(4, 2)),
        """\
def forward(self, mean, var, x):
    param_constant0 = self._param_constant0
    param_constant1 = self._param_constant1
    detach = aten.detach.default(param_constant0)
    detach_1 = aten.detach.default(param_constant1)
    native_batch_norm_legit_functional = aten._native_batch_norm_legit_functional.default(x, detach, detach_1, mean, var, True, 0.1, 1e-05)
    getitem = native_batch_norm_legit_functional[0]
    getitem_1 = native_batch_norm_legit_functional[3]
    getitem_2 = native_batch_norm_legit_functional[4]
    copy_ = aten.copy_.default(mean, getitem_1)
    copy__1 = aten.copy_.default(var, getitem_2)
    return getitem
""",
    )
