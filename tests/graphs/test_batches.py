"""Golden texts: what a batched function looks like as a graph."""
# ruff: noqa: E501 - printed graphs are as wide as they are

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline

from aotfunc import grad, jvp, vmap
from tests.graphs.shown import dense_scatter, shown
from tests.inputs import same

T = torch.func


def test_dot_products():
    assert_expected_inline(
        shown(vmap(torch.dot), same(5, 3), same(5, 3), like=T.vmap(torch.dot)),
        """\
def forward(self, arg_0, arg_1):
    mul = aten.mul.Tensor(arg_0, arg_1)
    sum_1 = aten.sum.dim_IntList(mul, [1])
    return sum_1
""",
    )


def test_dimensions_and_broadcasting():
    run = lambda vmap: vmap(lambda x, y: x * y + y.sum(), in_dims=(1, None), out_dims=1)
    assert_expected_inline(
        shown(run(vmap), same(3, 5), same(3), like=run(T.vmap)),
        """\
def forward(self, x, y):
    t = aten.t.default(x)
    mul = aten.mul.Tensor(t, y)
    sum_1 = aten.sum.default(y)
    add = aten.add.Tensor(mul, sum_1)
    t_1 = aten.t.default(add)
    return t_1
""",
    )


def test_shared_weights_are_one_product():
    run = lambda vmap: vmap(lambda w, x: F.linear(x, w).relu(), in_dims=(None, 0))
    assert_expected_inline(
        shown(run(vmap), same(2, 3), same(5, 4, 3), like=run(T.vmap)),
        """\
def forward(self, w, x):
    t = aten.t.default(w)
    view = aten.view.default(x, [20, 3])
    mm = aten.mm.default(view, t)
    view_1 = aten.view.default(mm, [5, 4, 2])
    relu = aten.relu.default(view_1)
    return relu
""",
    )


def test_pairwise_distances():
    run = lambda vmap: vmap(vmap(lambda x, y: (x - y).norm(), (None, 0)), (0, None))
    assert_expected_inline(
        shown(run(vmap), same(4, 3), same(5, 3), like=run(T.vmap)),
        """\
def forward(self, x, y):
    view = aten.view.default(x, [4, 1, 3])
    sub = aten.sub.Tensor(view, y)
    linalg_vector_norm = aten.linalg_vector_norm.default(sub, 2, [2])
    return linalg_vector_norm
""",
    )


def test_ensemble():
    run = lambda vmap: vmap(lambda p, x: F.linear(x, p["w"], p["b"]).tanh(), in_dims=(0, None))
    assert_expected_inline(
        shown(run(vmap), {"w": same(5, 2, 3), "b": same(5, 2)}, same(4, 3), like=run(T.vmap)),
        """\
def forward(self, p, x):
    p_w, p_b, x, = fx_pytree.tree_flatten_spec(([p, x], {}), self._in_spec)
    view = aten.view.default(p_w, [10, 3])
    t = aten.t.default(x)
    mm = aten.mm.default(view, t)
    view_1 = aten.view.default(mm, [5, 2, 4])
    transpose = aten.transpose.int(view_1, 1, 2)
    view_2 = aten.view.default(p_b, [5, 1, 2])
    add = aten.add.Tensor(transpose, view_2)
    tanh = aten.tanh.default(add)
    return tanh
""",
    )


def test_per_sample_gradients_of_a_linear_layer():
    loss = lambda w, b, x, y: F.mse_loss(F.linear(x, w, b), y)
    run = lambda grad, vmap: vmap(grad(loss, (0, 1)), in_dims=(None, None, 0, 0))
    args = same(2, 3), same(2), same(5, 3), same(5, 2)
    assert_expected_inline(
        shown(run(grad, vmap), *args, like=run(T.grad, T.vmap)),
        """\
def forward(self, w, b, x, y):
    view = aten.view.default(x, [5, 1, 3])
    t = aten.t.default(w)
    addmm = aten.addmm.default(b, x, t)
    full = aten.full.default([5, 2], 0.5, dtype = torch.float32, device = device(type='cpu'))
    mse_loss_backward = aten.mse_loss_backward.default(full, addmm, y, 0)
    view_1 = aten.view.default(mse_loss_backward, [5, 1, 2])
    transpose = aten.transpose.int(view_1, 1, 2)
    bmm = aten.bmm.default(transpose, view)
    return (bmm, mse_loss_backward)
""",
    )


def test_per_sample_gradients_of_two_layers():
    loss = lambda p, x, t: F.cross_entropy(torch.tanh(x @ p["in"]) @ p["out"], t)
    run = lambda grad, vmap: vmap(grad(loss), in_dims=(None, 0, 0))
    args = {"in": same(3, 4), "out": same(4, 2)}, same(5, 3), torch.tensor([0, 1, 1, 0, 1])
    assert_expected_inline(
        shown(run(grad, vmap), *args, like=run(T.grad, T.vmap)),
        """\
def forward(self, p, x, t):
    p_in, p_out, x, t, = fx_pytree.tree_flatten_spec(([p, x, t], {}), self._in_spec)
    unsqueeze = aten.unsqueeze.default(x, 1)
    mm = aten.mm.default(x, p_in)
    tanh = aten.tanh.default(mm)
    unsqueeze_1 = aten.unsqueeze.default(tanh, 1)
    mm_1 = aten.mm.default(tanh, p_out)
    log_softmax = aten._log_softmax.default(mm_1, 1, False)
    nll_loss_forward = aten.nll_loss_forward.default(log_softmax, t, None, 0, -100)
    ne = aten.ne.Scalar(t, -100)
    to_copy = aten._to_copy.default(ne, dtype = torch.float32)
    reciprocal = aten.reciprocal.default(to_copy)
    getitem = nll_loss_forward[1]
    nll_loss_backward = aten.nll_loss_backward.default(reciprocal, log_softmax, t, None, 0, -100, getitem)
    log_softmax_backward_data = aten._log_softmax_backward_data.default(nll_loss_backward, log_softmax, 1, torch.float32)
    unsqueeze_2 = aten.unsqueeze.default(log_softmax_backward_data, 1)
    t_1 = aten.t.default(p_out)
    mm_2 = aten.mm.default(log_softmax_backward_data, t_1)
    transpose = aten.transpose.int(unsqueeze_1, 1, 2)
    bmm = aten.bmm.default(transpose, unsqueeze_2)
    tanh_backward = aten.tanh_backward.default(mm_2, tanh)
    unsqueeze_3 = aten.unsqueeze.default(tanh_backward, 1)
    transpose_1 = aten.transpose.int(unsqueeze, 1, 2)
    bmm_1 = aten.bmm.default(transpose_1, unsqueeze_3)
    return pytree.tree_unflatten([bmm_1, bmm], self._out_spec)
""",
    )


def test_per_sample_gradients_of_a_convolution():
    loss = lambda w, x: F.conv2d(x[None], w, padding=1).relu().square().sum()
    run = lambda grad, vmap: vmap(grad(loss), in_dims=(None, 0))
    assert_expected_inline(
        shown(run(grad, vmap), same(2, 1, 3, 3), same(5, 1, 4, 4), like=run(T.grad, T.vmap)),
        """\
def forward(self, w, x):
    convolution = aten.convolution.default(x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    view = aten.view.default(convolution, [5, 1, 2, 4, 4])
    relu = aten.relu.default(view)
    mul = aten.mul.Tensor(relu, 2)
    threshold_backward = aten.threshold_backward.default(mul, relu, 0)
    full = aten.full.default([], 0, dtype = torch.float32, device = device(type='cpu'))
    expand = aten.expand.default(full, [10, 1, 3, 3])
    view_1 = aten.view.default(threshold_backward, [1, 10, 4, 4])
    view_2 = aten.view.default(x, [1, 5, 4, 4])
    convolution_backward = aten.convolution_backward.default(view_1, view_2, expand, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 5, [False, True, False])
    getitem = convolution_backward[1]
    view_3 = aten.view.default(getitem, [5, 2, 1, 3, 3])
    return view_3
""",
    )


def test_batched_tangents():
    f = lambda x: x.sin() * x
    run = lambda jvp, vmap: lambda x, ts: vmap(lambda t: jvp(f, (x,), (t,))[1])(ts)
    assert_expected_inline(
        shown(run(jvp, vmap), same(3), same(5, 3), like=run(T.jvp, T.vmap)),
        """\
def forward(self, x, ts):
    sin = aten.sin.default(x)
    cos = aten.cos.default(x)
    mul = aten.mul.Tensor(ts, cos)
    mul_1 = aten.mul.Tensor(mul, x)
    mul_2 = aten.mul.Tensor(ts, sin)
    add = aten.add.Tensor(mul_1, mul_2)
    return add
""",
    )


def test_gradient_of_a_batched_function():
    ours = lambda w, x: vmap(lambda x: (w @ x).sin())(x).sum()
    theirs = lambda w, x: T.vmap(lambda x: (w @ x).sin())(x).sum()
    assert_expected_inline(
        shown(grad(ours), same(2, 3), same(5, 3), like=T.grad(theirs)),
        """\
def forward(self, w, x):
    t = aten.t.default(w)
    mm = aten.mm.default(x, t)
    cos = aten.cos.default(mm)
    t_1 = aten.t.default(cos)
    mm_1 = aten.mm.default(t_1, x)
    return mm_1
""",
    )


@dense_scatter
def test_writing_to_a_mapped_value():
    def f(x):
        y = torch.zeros_like(x)
        y[0] = x[1]
        y.add_(1)
        return y

    assert_expected_inline(
        shown(vmap(f), same(5, 3), like=T.vmap(f)),
        """\
def forward(self, x):
    select = aten.select.int(x, 1, 1)
    full = aten.full.default([5, 3], 0, dtype = torch.float32, device = device(type='cpu'))
    select_scatter = aten.select_scatter.default(full, select, 1, 0)
    add = aten.add.Tensor(select_scatter, 1)
    return add
""",
    )


def test_random_numbers_differ_along_the_batch():
    run = lambda vmap: vmap(lambda x: x + torch.randn(3), randomness="different")
    assert_expected_inline(
        shown(run(vmap), same(5, 3), like=run(T.vmap)),
        """\
def forward(self, x):
    randn = aten.randn.default([5, 3], device = device(type='cpu'), pin_memory = False)
    add = aten.add.Tensor(x, randn)
    return add
""",
    )


def test_random_numbers_are_the_same_along_the_batch():
    run = lambda vmap: vmap(lambda x: x + torch.randn(3), randomness="same")
    assert_expected_inline(
        shown(run(vmap), same(5, 3), like=run(T.vmap)),
        """\
def forward(self, x):
    randn = aten.randn.default([3], device = device(type='cpu'), pin_memory = False)
    add = aten.add.Tensor(x, randn)
    return add
""",
    )
