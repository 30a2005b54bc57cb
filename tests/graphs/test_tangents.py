"""Golden texts: forward mode, joint graphs, Jacobians and Hessians."""

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline

from aotfunc import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp
from tests.graphs.shown import shown
from tests.inputs import same

T = torch.func


def test_jvp():
    f = lambda x: torch.exp(torch.sin(x))
    run = lambda jvp: lambda x, t: jvp(f, (x,), (t,))
    assert_expected_inline(
        shown(run(jvp), same(3), same(3), like=run(T.jvp)),
        """\
def forward(self, x, t):
    sin = aten.sin.default(x)
    cos = aten.cos.default(x)
    mul = aten.mul.Tensor(t, cos)
    exp = aten.exp.default(sin)
    mul_1 = aten.mul.Tensor(mul, exp)
    return (exp, mul_1)
""",
    )


def test_jvp_of_a_linear_layer():
    f = lambda w, x: F.linear(x, w).tanh()
    run = lambda jvp: lambda w, x, t: jvp(lambda w: f(w, x), (w,), (t,))[1]
    assert_expected_inline(
        shown(run(jvp), same(2, 3), same(4, 3), same(2, 3), like=run(T.jvp)),
        """\
def forward(self, w, x, t):
    t_1 = aten.t.default(w)
    t_2 = aten.t.default(t)
    mm = aten.mm.default(x, t_1)
    mm_1 = aten.mm.default(x, t_2)
    tanh = aten.tanh.default(mm)
    tanh_backward = aten.tanh_backward.default(mm_1, tanh)
    return tanh_backward
""",
    )


def test_forward_over_reverse():
    f = lambda x: (torch.sin(x) * x).sum()
    run = lambda grad, jvp: lambda x, v: jvp(grad(f), (x,), (v,))[1]
    assert_expected_inline(
        shown(run(grad, jvp), same(3), same(3), like=run(T.grad, T.jvp)),
        """\
def forward(self, x, v):
    sin = aten.sin.default(x)
    cos = aten.cos.default(x)
    mul = aten.mul.Tensor(v, cos)
    mul_1 = aten.mul.Tensor(v, sin)
    mul_2 = aten.mul.Tensor(mul_1, x)
    sub = aten.sub.Tensor(mul, mul_2)
    add = aten.add.Tensor(mul, sub)
    return add
""",
    )


def test_joint_graph():
    f = lambda x, y: (torch.sin(x) * y, y.exp())

    def joint(vjp):
        def run(x, y, g, h):
            outs, pull = vjp(f, x, y)
            return outs, pull((g, h))

        return run

    assert_expected_inline(
        shown(joint(vjp), same(3), same(3), same(3), same(3), like=joint(T.vjp)),
        """\
def forward(self, x, y, g, h):
    sin = aten.sin.default(x)
    mul = aten.mul.Tensor(sin, y)
    exp = aten.exp.default(y)
    cos = aten.cos.default(x)
    mul_1 = aten.mul.Tensor(h, exp)
    mul_2 = aten.mul.Tensor(g, y)
    mul_3 = aten.mul.Tensor(g, sin)
    add = aten.add.Tensor(mul_1, mul_3)
    mul_4 = aten.mul.Tensor(mul_2, cos)
    return ((mul, exp), (mul_4, add))
""",
    )


def test_jacrev():
    f = lambda x: torch.sin(x) * x.sum()
    assert_expected_inline(
        shown(jacrev(f), same(3), like=T.jacrev(f)),
        """\
def forward(self, x):
    sin = aten.sin.default(x)
    sum_1 = aten.sum.default(x)
    cos = aten.cos.default(x)
    eye = aten.eye.default(3, dtype = torch.float32, device = device(type='cpu'))
    mul = aten.mul.Tensor(eye, sum_1)
    mul_1 = aten.mul.Tensor(eye, sin)
    sum_2 = aten.sum.dim_IntList(mul_1, [1])
    mul_2 = aten.mul.Tensor(mul, cos)
    view = aten.view.default(sum_2, [3, 1])
    add = aten.add.Tensor(view, mul_2)
    return add
""",
    )


def test_jacrev_of_a_diagonal_function():
    assert_expected_inline(
        shown(jacrev(torch.sin), same(3), like=T.jacrev(torch.sin)),
        """\
def forward(self, arg_0):
    cos = aten.cos.default(arg_0)
    eye = aten.eye.default(3, dtype = torch.float32, device = device(type='cpu'))
    mul = aten.mul.Tensor(eye, cos)
    return mul
""",
    )


def test_jacfwd():
    f = lambda x: torch.sin(x) * x.sum()
    assert_expected_inline(
        shown(jacfwd(f), same(3), like=T.jacfwd(f)),
        """\
def forward(self, x):
    sin = aten.sin.default(x)
    sum_1 = aten.sum.default(x)
    cos = aten.cos.default(x)
    eye = aten.eye.default(3, dtype = torch.float32, device = device(type='cpu'))
    mul = aten.mul.Tensor(eye, cos)
    sum_2 = aten.sum.dim_IntList(eye, [1])
    mul_1 = aten.mul.Tensor(mul, sum_1)
    view = aten.view.default(sum_2, [3, 1])
    mul_2 = aten.mul.Tensor(view, sin)
    add = aten.add.Tensor(mul_1, mul_2)
    t = aten.t.default(add)
    return t
""",
    )


def test_jacobian_of_a_linear_map_is_its_matrix():
    f = lambda a, x: a @ x
    assert_expected_inline(
        shown(jacrev(f, 1), same(2, 3), same(3), like=T.jacrev(f, 1)),
        """\
def forward(self, a, x):
    eye = aten.eye.default(2, dtype = torch.float32, device = device(type='cpu'))
    mm = aten.mm.default(eye, a)
    return mm
""",
    )


def test_hessian():
    f = lambda x: (x * x).sum().sin()
    assert_expected_inline(
        shown(hessian(f), same(3), like=T.hessian(f)),
        """\
def forward(self, x):
    mul = aten.mul.Tensor(x, x)
    sum_1 = aten.sum.default(mul)
    cos = aten.cos.default(sum_1)
    sin = aten.sin.default(sum_1)
    eye = aten.eye.default(3, dtype = torch.float32, device = device(type='cpu'))
    mul_1 = aten.mul.Tensor(eye, x)
    add = aten.add.Tensor(mul_1, mul_1)
    sum_2 = aten.sum.dim_IntList(add, [1])
    mul_2 = aten.mul.Tensor(sum_2, sin)
    view = aten.view.default(mul_2, [3, 1])
    mul_3 = aten.mul.Tensor(view, x)
    mul_4 = aten.mul.Tensor(eye, cos)
    sub = aten.sub.Tensor(mul_4, mul_3)
    add_1 = aten.add.Tensor(sub, sub)
    t = aten.t.default(add_1)
    return t
""",
    )


def test_linearize():
    def run(x, t):
        y, push = linearize(torch.tanh, x)
        return y, push(t)

    like = lambda x, t: T.jvp(torch.tanh, (x,), (t,))
    assert_expected_inline(
        shown(run, same(3), same(3), like=like),
        """\
def forward(self, x, t):
    tanh = aten.tanh.default(x)
    tanh_backward = aten.tanh_backward.default(t, tanh)
    return (tanh, tanh_backward)
""",
    )
