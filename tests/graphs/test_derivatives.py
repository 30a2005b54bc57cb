"""Golden texts: what the derivative of a function looks like as a graph."""

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline

from aotfunc import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp
from tests.graphs.shown import shown

T = torch.func


def r(*shape):
    torch.manual_seed(0)
    return torch.randn(shape)


def test_sin():
    f = lambda x: torch.sin(x).sum()
    assert_expected_inline(shown(grad(f), r(3), like=T.grad(f)), """""")


def test_tanh_of_a_product():
    f = lambda x, y: torch.tanh(x * y).sum()
    assert_expected_inline(shown(grad(f, (0, 1)), r(3), r(3), like=T.grad(f, (0, 1))), """""")


def test_broadcast_operands_are_summed():
    f = lambda x, y: (x / y).sum()
    assert_expected_inline(shown(grad(f, (0, 1)), r(2, 3), r(3), like=T.grad(f, (0, 1))), """""")


def test_gelu():
    f = lambda x: F.gelu(x).sum()
    assert_expected_inline(shown(grad(f), r(3), like=T.grad(f)), """""")


def test_relu():
    f = lambda x: F.relu(x).sum()
    assert_expected_inline(shown(grad(f), r(3), like=T.grad(f)), """""")


def test_power():
    f = lambda x: (x**3).sum()
    assert_expected_inline(shown(grad(f), r(3), like=T.grad(f)), """""")


def test_square_norm_is_the_identity():
    f = lambda x: (x * x).sum() / 2
    assert_expected_inline(shown(grad(f), r(3), like=T.grad(f)), """""")


def test_mean_and_variance():
    f = lambda x: x.mean() * x.var()
    assert_expected_inline(shown(grad(f), r(4), like=T.grad(f)), """""")


def test_maximum_along_a_dimension():
    f = lambda x: x.max(1).values.sum()
    assert_expected_inline(shown(grad(f), r(2, 3), like=T.grad(f)), """""")


def test_logsumexp():
    f = lambda x: x.logsumexp(-1).sum()
    assert_expected_inline(shown(grad(f), r(2, 3), like=T.grad(f)), """""")


def test_softmax():
    f = lambda x, y: (torch.softmax(x, -1) * y).sum()
    assert_expected_inline(shown(grad(f), r(2, 3), r(2, 3), like=T.grad(f)), """""")


def test_matmul():
    f = lambda a, b: (a @ b).sin().sum()
    assert_expected_inline(shown(grad(f, (0, 1)), r(2, 3), r(3, 4), like=T.grad(f, (0, 1))), """""")


def test_linear_regression():
    f = lambda w, b, x, y: F.mse_loss(F.linear(x, w, b), y)
    args = r(1, 3), r(1), r(5, 3), r(5, 1)
    assert_expected_inline(shown(grad(f, (0, 1)), *args, like=T.grad(f, (0, 1))), """""")


def test_cross_entropy():
    f = lambda x, t: F.cross_entropy(x, t)
    assert_expected_inline(shown(grad(f), r(2, 3), torch.tensor([0, 2]), like=T.grad(f)), """""")


def test_layer_norm():
    f = lambda x, w, b: F.layer_norm(x, (3,), w, b).sin().sum()
    assert_expected_inline(shown(grad(f, (0, 1, 2)), r(2, 3), r(3), r(3), like=T.grad(f, (0, 1, 2))), """""")


def test_convolution_and_pooling():
    f = lambda w, b, x: F.max_pool2d(F.relu(F.conv2d(x, w, b)), 2).sum()
    assert_expected_inline(shown(grad(f, (0, 1)), r(2, 1, 3, 3), r(2), r(1, 1, 6, 6), like=T.grad(f, (0, 1))), """""")


def test_attention():
    f = lambda q, k, v: F.scaled_dot_product_attention(q, k, v).sin().sum()
    args = r(1, 2, 3, 4), r(1, 2, 3, 4) + 1, r(1, 2, 3, 4) + 2
    assert_expected_inline(shown(grad(f, (0, 1, 2)), *args, like=T.grad(f, (0, 1, 2))), """""")


def test_indexing():
    f = lambda x, i: (x[i] * x[0]).sum()
    assert_expected_inline(shown(grad(f), r(3, 2), torch.tensor([2, 0, 2]), like=T.grad(f)), """""")


def test_second_derivative():
    f = lambda x: torch.sin(x) * x
    assert_expected_inline(shown(grad(grad(f)), r(), like=T.grad(T.grad(f))), """""")


def test_jvp():
    f = lambda x: torch.exp(torch.sin(x))
    run = lambda jvp: lambda x, t: jvp(f, (x,), (t,))
    assert_expected_inline(shown(run(jvp), r(3), r(3), like=run(T.jvp)), """""")


def test_jvp_of_a_linear_layer():
    f = lambda w, x: F.linear(x, w).tanh()
    run = lambda jvp: lambda w, x, t: jvp(lambda w: f(w, x), (w,), (t,))[1]
    assert_expected_inline(shown(run(jvp), r(2, 3), r(4, 3), r(2, 3), like=run(T.jvp)), """""")


def test_forward_over_reverse():
    f = lambda x: (torch.sin(x) * x).sum()
    run = lambda grad, jvp: lambda x, v: jvp(grad(f), (x,), (v,))[1]
    assert_expected_inline(shown(run(grad, jvp), r(3), r(3), like=run(T.grad, T.jvp)), """""")


def test_joint_graph():
    f = lambda x, y: (torch.sin(x) * y, y.exp())

    def joint(vjp):
        def run(x, y, g, h):
            outs, pull = vjp(f, x, y)
            return outs, pull((g, h))

        return run

    assert_expected_inline(shown(joint(vjp), r(3), r(3), r(3), r(3), like=joint(T.vjp)), """""")


def test_jacrev():
    f = lambda x: torch.sin(x) * x.sum()
    assert_expected_inline(shown(jacrev(f), r(3), like=T.jacrev(f)), """""")


def test_jacrev_of_a_diagonal_function():
    assert_expected_inline(shown(jacrev(torch.sin), r(3), like=T.jacrev(torch.sin)), """""")


def test_jacfwd():
    f = lambda x: torch.sin(x) * x.sum()
    assert_expected_inline(shown(jacfwd(f), r(3), like=T.jacfwd(f)), """""")


def test_jacobian_of_a_linear_map_is_its_matrix():
    f = lambda a, x: a @ x
    assert_expected_inline(shown(jacrev(f, 1), r(2, 3), r(3), like=T.jacrev(f, 1)), """""")


def test_hessian():
    f = lambda x: (x * x).sum().sin()
    assert_expected_inline(shown(hessian(f), r(3), like=T.hessian(f)), """""")


def test_linearize():
    def run(x, t):
        y, push = linearize(torch.tanh, x)
        return y, push(t)

    like = lambda x, t: T.jvp(torch.tanh, (x,), (t,))
    assert_expected_inline(shown(run, r(3), r(3), like=like), """""")
