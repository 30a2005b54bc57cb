"""Per-sample gradients, clipped and added up: the program that is compiled."""

import torch
from expecttest import assert_expected_inline

from aotfunc import grad, jit, vmap
from aotfunc.backends import Backend
from tests.graphs.shown import readable


def test_clipped_sum_of_a_layer():
    def clipped_sum(w, x, y):
        loss = lambda w, x, y: ((w @ x).tanh() - y).square().sum()
        grads = vmap(grad(loss), (None, 0, 0))(w, x, y)
        norms = grads.square().sum((1, 2)).sqrt()
        return torch.einsum("b,boi->oi", (1 / norms).clamp(max=1), grads)

    graphs = []
    compiler = lambda gm, _: graphs.append(gm.code) or gm
    w, x, y = torch.randn(50, 40), torch.randn(20, 40), torch.randn(20, 50)
    jit(clipped_sum, backend=Backend(compiler, reassociates=True))(w, x, y)
    assert_expected_inline(
        readable(graphs[0]),
        """\
def forward(self, w, x, y):
    t = aten.t.default(w)
    mm = aten.mm.default(x, t)
    tanh = aten.tanh.default(mm)
    sub = aten.sub.Tensor(tanh, y)
    mul = aten.mul.Tensor(sub, 2)
    tanh_backward = aten.tanh_backward.default(mul, tanh)
    mul_1 = aten.mul.Tensor(x, x)
    sum_1 = aten.sum.dim_IntList(mul_1, [1])
    mul_2 = aten.mul.Tensor(tanh_backward, tanh_backward)
    sum_2 = aten.sum.dim_IntList(mul_2, [1])
    mul_3 = aten.mul.Tensor(sum_1, sum_2)
    sqrt = aten.sqrt.default(mul_3)
    reciprocal = aten.reciprocal.default(sqrt)
    clamp = aten.clamp.default(reciprocal, None, 1)
    unsqueeze = aten.unsqueeze.default(clamp, 1)
    mul_4 = aten.mul.Tensor(x, unsqueeze)
    t_1 = aten.t.default(tanh_backward)
    mm_1 = aten.mm.default(t_1, mul_4)
    view = aten.view.default(mm_1, [1, 1, 2000])
    return (view,)
""",
    )
