"""Golden texts: what the gradient of a function looks like as a graph."""
# ruff: noqa: E501 - printed graphs are as wide as they are

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline

from aotfunc import grad
from tests.graphs.shown import shown
from tests.inputs import same

T = torch.func


def test_sin():
    f = lambda x: torch.sin(x).sum()
    assert_expected_inline(
        shown(grad(f), same(3), like=T.grad(f)),
        """\
def forward(self, x):
    cos = aten.cos.default(x)
    return cos
""",
    )


def test_tanh_of_a_product():
    f = lambda x, y: torch.tanh(x * y).sum()
    assert_expected_inline(
        shown(grad(f, (0, 1)), same(3), same(3), like=T.grad(f, (0, 1))),
        """\
def forward(self, x, y):
    mul = aten.mul.Tensor(x, y)
    tanh = aten.tanh.default(mul)
    full = aten.full.default([], 1, dtype = torch.float32, device = device(type='cpu'))
    tanh_backward = aten.tanh_backward.default(full, tanh)
    mul_1 = aten.mul.Tensor(tanh_backward, y)
    mul_2 = aten.mul.Tensor(tanh_backward, x)
    return (mul_1, mul_2)
""",
    )


def test_broadcast_operands_are_summed():
    f = lambda x, y: (x / y).sum()
    assert_expected_inline(
        shown(grad(f, (0, 1)), same(2, 3), same(3), like=T.grad(f, (0, 1))),
        """\
def forward(self, x, y):
    div = aten.div.Tensor(x, y)
    full = aten.full.default([2, 3], 1, dtype = torch.float32, device = device(type='cpu'))
    div_1 = aten.div.Tensor(full, y)
    mul = aten.mul.Tensor(div_1, div)
    neg = aten.neg.default(mul)
    sum_1 = aten.sum.dim_IntList(neg, [0])
    return (div_1, sum_1)
""",
    )


def test_gelu():
    f = lambda x: F.gelu(x).sum()
    assert_expected_inline(
        shown(grad(f), same(3), like=T.grad(f)),
        """\
def forward(self, x):
    full = aten.full.default([3], 1, dtype = torch.float32, device = device(type='cpu'))
    gelu_backward = aten.gelu_backward.default(full, x)
    return gelu_backward
""",
    )


def test_relu():
    f = lambda x: F.relu(x).sum()
    assert_expected_inline(
        shown(grad(f), same(3), like=T.grad(f)),
        """\
def forward(self, x):
    relu = aten.relu.default(x)
    full = aten.full.default([], 1, dtype = torch.float32, device = device(type='cpu'))
    threshold_backward = aten.threshold_backward.default(full, relu, 0)
    return threshold_backward
""",
    )


def test_power():
    f = lambda x: (x**3).sum()
    assert_expected_inline(
        shown(grad(f), same(3), like=T.grad(f)),
        """\
def forward(self, x):
    pow_1 = aten.pow.Tensor_Scalar(x, 2)
    mul = aten.mul.Tensor(pow_1, 3)
    return mul
""",
    )


def test_square_norm_is_the_identity():
    f = lambda x: (x * x).sum() / 2
    assert_expected_inline(
        shown(grad(f), same(3), like=T.grad(f)),
        """\
def forward(self, x):
    mul = aten.mul.Tensor(x, 0.5)
    add = aten.add.Tensor(mul, mul)
    return add
""",
    )


def test_mean_and_variance():
    f = lambda x: x.mean() * x.var()
    assert_expected_inline(
        shown(grad(f), same(4), like=T.grad(f)),
        """\
def forward(self, x):
    mean = aten.mean.default(x)
    var = aten.var.correction(x)
    unsqueeze = aten.unsqueeze.default(mean, 0)
    mul = aten.mul.Tensor(unsqueeze, 0.6666666666666666)
    mean_1 = aten.mean.dim(x, [0], True)
    sub = aten.sub.Tensor(x, mean_1)
    mul_1 = aten.mul.Tensor(mul, sub)
    div = aten.div.Tensor(var, 4)
    add = aten.add.Tensor(mul_1, div)
    return add
""",
    )


def test_maximum_along_a_dimension():
    f = lambda x: x.max(1).values.sum()
    assert_expected_inline(
        shown(grad(f), same(2, 3), like=T.grad(f)),
        """\
def forward(self, x):
    max_1 = aten.max.dim(x, 1)
    getitem = max_1[1]
    unsqueeze = aten.unsqueeze.default(getitem, 1)
    full = aten.full.default([2, 3], 0, dtype = torch.float32, device = device(type='cpu'))
    full_1 = aten.full.default([2, 1], 1, dtype = torch.float32, device = device(type='cpu'))
    scatter = aten.scatter.src(full, 1, unsqueeze, full_1)
    return scatter
""",
    )


def test_logsumexp():
    f = lambda x: x.logsumexp(-1).sum()
    assert_expected_inline(
        shown(grad(f), same(2, 3), like=T.grad(f)),
        """\
def forward(self, x):
    logsumexp = aten.logsumexp.default(x, [1])
    unsqueeze = aten.unsqueeze.default(logsumexp, 1)
    sub = aten.sub.Tensor(x, unsqueeze)
    exp = aten.exp.default(sub)
    return exp
""",
    )


def test_softmax():
    f = lambda x, y: (torch.softmax(x, -1) * y).sum()
    assert_expected_inline(
        shown(grad(f), same(2, 3), same(2, 3), like=T.grad(f)),
        """\
def forward(self, x, y):
    softmax = aten._softmax.default(x, 1, False)
    softmax_backward_data = aten._softmax_backward_data.default(y, softmax, 1, torch.float32)
    return softmax_backward_data
""",
    )


def test_matmul():
    f = lambda a, b: (a @ b).sin().sum()
    assert_expected_inline(
        shown(grad(f, (0, 1)), same(2, 3), same(3, 4), like=T.grad(f, (0, 1))),
        """\
def forward(self, a, b):
    mm = aten.mm.default(a, b)
    cos = aten.cos.default(mm)
    t = aten.t.default(b)
    mm_1 = aten.mm.default(cos, t)
    t_1 = aten.t.default(a)
    mm_2 = aten.mm.default(t_1, cos)
    return (mm_1, mm_2)
""",
    )


def test_linear_regression():
    f = lambda w, b, x, y: F.mse_loss(F.linear(x, w, b), y)
    args = same(1, 3), same(1), same(5, 3), same(5, 1)
    assert_expected_inline(
        shown(grad(f, (0, 1)), *args, like=T.grad(f, (0, 1))),
        """\
def forward(self, w, b, x, y):
    t = aten.t.default(w)
    addmm = aten.addmm.default(b, x, t)
    full = aten.full.default([], 1, dtype = torch.float32, device = device(type='cpu'))
    mse_loss_backward = aten.mse_loss_backward.default(full, addmm, y, 1)
    t_1 = aten.t.default(mse_loss_backward)
    mm = aten.mm.default(t_1, x)
    sum_1 = aten.sum.dim_IntList(mse_loss_backward, [0])
    return (mm, sum_1)
""",
    )


def test_cross_entropy():
    f = lambda x, t: F.cross_entropy(x, t)
    assert_expected_inline(
        shown(grad(f), same(2, 3), torch.tensor([0, 2]), like=T.grad(f)),
        """\
def forward(self, x, t):
    log_softmax = aten._log_softmax.default(x, 1, False)
    nll_loss_forward = aten.nll_loss_forward.default(log_softmax, t, None, 1, -100)
    full = aten.full.default([], 1, dtype = torch.float32, device = device(type='cpu'))
    getitem = nll_loss_forward[1]
    nll_loss_backward = aten.nll_loss_backward.default(full, log_softmax, t, None, 1, -100, getitem)
    log_softmax_backward_data = aten._log_softmax_backward_data.default(nll_loss_backward, log_softmax, 1, torch.float32)
    return log_softmax_backward_data
""",
    )


def test_layer_norm():
    f = lambda x, w, b: F.layer_norm(x, (3,), w, b).sin().sum()
    assert_expected_inline(
        shown(grad(f, (0, 1, 2)), same(2, 3), same(3), same(3), like=T.grad(f, (0, 1, 2))),
        """\
def forward(self, x, w, b):
    native_layer_norm = aten.native_layer_norm.default(x, [3], w, b, 1e-05)
    getitem = native_layer_norm[0]
    cos = aten.cos.default(getitem)
    getitem_1 = native_layer_norm[1]
    getitem_2 = native_layer_norm[2]
    native_layer_norm_backward = aten.native_layer_norm_backward.default(cos, x, [3], getitem_1, getitem_2, w, b, [True, True, True])
    getitem_3 = native_layer_norm_backward[0]
    getitem_4 = native_layer_norm_backward[1]
    getitem_5 = native_layer_norm_backward[2]
    return (getitem_3, getitem_4, getitem_5)
""",
    )


def test_convolution_and_pooling():
    f = lambda w, b, x: F.max_pool2d(F.relu(F.conv2d(x, w, b)), 2).sum()
    assert_expected_inline(
        shown(
            grad(f, (0, 1)), same(2, 1, 3, 3), same(2), same(1, 1, 6, 6), like=T.grad(f, (0, 1))
        ),
        """\
def forward(self, w, b, x):
    convolution = aten.convolution.default(x, w, b, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    relu = aten.relu.default(convolution)
    max_pool2d_with_indices = aten.max_pool2d_with_indices.default(relu, [2, 2])
    getitem = max_pool2d_with_indices[1]
    full = aten.full.default([1, 2, 2, 2], 1, dtype = torch.float32, device = device(type='cpu'))
    max_pool2d_with_indices_backward = aten.max_pool2d_with_indices_backward.default(full, relu, [2, 2], [], [0, 0], [1, 1], False, getitem)
    threshold_backward = aten.threshold_backward.default(max_pool2d_with_indices_backward, relu, 0)
    convolution_backward = aten.convolution_backward.default(threshold_backward, x, w, [2], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, True])
    getitem_1 = convolution_backward[1]
    getitem_2 = convolution_backward[2]
    return (getitem_1, getitem_2)
""",
    )


def test_attention():
    f = lambda q, k, v: F.scaled_dot_product_attention(q, k, v).sin().sum()
    args = same(1, 2, 3, 4), same(1, 2, 3, 4) + 1, same(1, 2, 3, 4) + 2
    assert_expected_inline(
        shown(grad(f, (0, 1, 2)), *args, like=T.grad(f, (0, 1, 2))),
        """\
def forward(self, q, k, v):
    scaled_dot_product_flash_attention_for_cpu = aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v)
    getitem = scaled_dot_product_flash_attention_for_cpu[0]
    cos = aten.cos.default(getitem)
    getitem_1 = scaled_dot_product_flash_attention_for_cpu[1]
    scaled_dot_product_flash_attention_for_cpu_backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default(cos, q, k, v, getitem, getitem_1, 0.0, False)
    getitem_2 = scaled_dot_product_flash_attention_for_cpu_backward[0]
    getitem_3 = scaled_dot_product_flash_attention_for_cpu_backward[1]
    getitem_4 = scaled_dot_product_flash_attention_for_cpu_backward[2]
    return (getitem_2, getitem_3, getitem_4)
""",
    )


def test_indexing():
    f = lambda x, i: (x[i] * x[0]).sum()
    assert_expected_inline(
        shown(grad(f), same(3, 2), torch.tensor([2, 0, 2]), like=T.grad(f)),
        """\
def forward(self, x, i):
    index = aten.index.Tensor(x, [i])
    select = aten.select.int(x, 0, 0)
    full = aten.full.default([3, 2], 1, dtype = torch.float32, device = device(type='cpu'))
    mul = aten.mul.Tensor(full, select)
    sum_1 = aten.sum.dim_IntList(index, [0])
    select_backward = aten.select_backward.default(sum_1, [3, 2], 0, 0)
    full_1 = aten.full.default([3, 2], 0, dtype = torch.float32, device = device(type='cpu'))
    index_put = aten.index_put.default(full_1, [i], mul, True)
    add = aten.add.Tensor(select_backward, index_put)
    return add
""",
    )


def test_second_derivative():
    f = lambda x: torch.sin(x) * x
    assert_expected_inline(
        shown(grad(grad(f)), same(), like=T.grad(T.grad(f))),
        """\
def forward(self, x):
    sin = aten.sin.default(x)
    cos = aten.cos.default(x)
    mul = aten.mul.Tensor(x, sin)
    sub = aten.sub.Tensor(cos, mul)
    add = aten.add.Tensor(sub, cos)
    return add
""",
    )
