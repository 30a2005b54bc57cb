"""Golden texts: what a batched function looks like as a graph."""

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline

from aotfunc import grad, jvp, vmap
from tests.graphs.shown import shown

T = torch.func


def r(*shape):
    torch.manual_seed(0)
    return torch.randn(shape)


def test_dot_products():
    assert_expected_inline(shown(vmap(torch.dot), r(5, 3), r(5, 3), like=T.vmap(torch.dot)), """\
def forward(self, arg_0, arg_1):
    mul = aten.mul.Tensor(arg_0, arg_1);  arg_0 = arg_1 = None
    sum_1 = aten.sum.dim_IntList(mul, [1])
    return sum_1
""")


def test_dimensions_and_broadcasting():
    run = lambda vmap: vmap(lambda x, y: x * y + y.sum(), in_dims=(1, None), out_dims=1)
    assert_expected_inline(shown(run(vmap), r(3, 5), r(3), like=run(T.vmap)), """\
def forward(self, x, y):
    t = aten.t.default(x)
    mul = aten.mul.Tensor(t, y)
    sum_1 = aten.sum.default(y)
    add = aten.add.Tensor(mul, sum_1);  mul = sum_1 = None
    t_1 = aten.t.default(add)
    return t_1
""")


def test_shared_weights_are_one_product():
    run = lambda vmap: vmap(lambda w, x: F.linear(x, w).relu(), in_dims=(None, 0))
    assert_expected_inline(shown(run(vmap), r(2, 3), r(5, 4, 3), like=run(T.vmap)), """""")


def test_pairwise_distances():
    run = lambda vmap: vmap(vmap(lambda x, y: (x - y).norm(), (None, 0)), (0, None))
    assert_expected_inline(shown(run(vmap), r(4, 3), r(5, 3), like=run(T.vmap)), """""")


def test_ensemble():
    run = lambda vmap: vmap(lambda p, x: F.linear(x, p["w"], p["b"]).tanh(), in_dims=(0, None))
    assert_expected_inline(shown(run(vmap), {"w": r(5, 2, 3), "b": r(5, 2)}, r(4, 3), like=run(T.vmap)), """""")


def test_per_sample_gradients_of_a_linear_layer():
    loss = lambda w, b, x, y: F.mse_loss(F.linear(x, w, b), y)
    run = lambda grad, vmap: vmap(grad(loss, (0, 1)), in_dims=(None, None, 0, 0))
    args = r(2, 3), r(2), r(5, 3), r(5, 2)
    assert_expected_inline(shown(run(grad, vmap), *args, like=run(T.grad, T.vmap)), """""")


def test_per_sample_gradients_of_two_layers():
    loss = lambda p, x, t: F.cross_entropy(torch.tanh(x @ p["in"]) @ p["out"], t)
    run = lambda grad, vmap: vmap(grad(loss), in_dims=(None, 0, 0))
    args = {"in": r(3, 4), "out": r(4, 2)}, r(5, 3), torch.tensor([0, 1, 1, 0, 1])
    assert_expected_inline(shown(run(grad, vmap), *args, like=run(T.grad, T.vmap)), """""")


def test_per_sample_gradients_of_a_convolution():
    loss = lambda w, x: F.conv2d(x[None], w, padding=1).relu().square().sum()
    run = lambda grad, vmap: vmap(grad(loss), in_dims=(None, 0))
    assert_expected_inline(shown(run(grad, vmap), r(2, 1, 3, 3), r(5, 1, 4, 4), like=run(T.grad, T.vmap)), """""")


def test_batched_tangents():
    f = lambda x: x.sin() * x
    run = lambda jvp, vmap: lambda x, ts: vmap(lambda t: jvp(f, (x,), (t,))[1])(ts)
    assert_expected_inline(shown(run(jvp, vmap), r(3), r(5, 3), like=run(T.jvp, T.vmap)), """""")


def test_gradient_of_a_batched_function():
    ours = lambda w, x: vmap(lambda x: (w @ x).sin())(x).sum()
    theirs = lambda w, x: T.vmap(lambda x: (w @ x).sin())(x).sum()
    assert_expected_inline(shown(grad(ours), r(2, 3), r(5, 3), like=T.grad(theirs)), """""")


def test_writing_to_a_mapped_value():
    def f(x):
        y = torch.zeros_like(x)
        y[0] = x[1]
        y.add_(1)
        return y

    assert_expected_inline(shown(vmap(f), r(5, 3), like=T.vmap(f)), """""")


def test_random_numbers_differ_along_the_batch():
    run = lambda vmap: vmap(lambda x: x + torch.randn(3), randomness="different")
    assert_expected_inline(shown(run(vmap), r(5, 3), like=run(T.vmap)), """""")


def test_random_numbers_are_the_same_along_the_batch():
    run = lambda vmap: vmap(lambda x: x + torch.randn(3), randomness="same")
    assert_expected_inline(shown(run(vmap), r(5, 3), like=run(T.vmap)), """""")
