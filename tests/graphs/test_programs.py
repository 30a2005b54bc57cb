"""Golden texts: trees of arguments, names, lines, nested compiled calls, random numbers."""
# ruff: noqa: E501 - printed graphs are as wide as they are

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn

from aotfunc import functional_call, grad, jit, make_fx
from tests.graphs.sample import waves, written
from tests.graphs.shown import by_autograd, readable, shown
from tests.inputs import same

T = torch.func


def test_dict_and_tuple_of_inputs():
    f = lambda params, pair: {"out": params["w"] * pair[0] + params["b"], "kept": [pair[1]]}
    assert_expected_inline(
        shown(f, {"w": same(3), "b": same(3)}, (same(3), same(3))),
        """\
def forward(self, params, pair):
    params_w, params_b, pair_0, pair_1, = fx_pytree.tree_flatten_spec(([params, pair], {}), self._in_spec)
    mul = aten.mul.Tensor(params_w, pair_0)
    add = aten.add.Tensor(mul, params_b)
    return pytree.tree_unflatten([add, pair_1], self._out_spec)
""",
    )


def test_keywords_and_python_values():
    f = lambda x, power=2, *, scale: (x**power) * scale
    assert_expected_inline(
        shown(f, same(3), power=3, scale=same(3)),
        """\
def forward(self, x, power, scale):
    x, static, scale, = fx_pytree.tree_flatten_spec(([x], {'power':power, 'scale':scale}), self._in_spec)
    pow_1 = aten.pow.Tensor_Scalar(x, 3)
    mul = aten.mul.Tensor(pow_1, scale)
    return mul
""",
    )


def test_names_are_those_of_the_parameters():
    def step(weights, batch, momentum):
        return weights - 0.1 * (batch.mean(0) + momentum)

    assert_expected_inline(
        shown(step, same(3), same(5, 3), same(3)),
        """\
def forward(self, weights, batch, momentum):
    mean = aten.mean.dim(batch, [0])
    add = aten.add.Tensor(mean, momentum)
    mul = aten.mul.Tensor(add, 0.1)
    sub = aten.sub.Tensor(weights, mul)
    return sub
""",
    )


def test_closed_over_parameters():
    layer = nn.Linear(3, 2)
    shift = same(2)
    assert_expected_inline(
        shown(lambda x: layer(x) + shift, same(4, 3), like=lambda x: (layer(x) + shift).detach()),
        """\
def forward(self, x):
    param_constant0 = self._param_constant0
    param_constant1 = self._param_constant1
    tensor_constant2 = self._tensor_constant2
    t = aten.t.default(param_constant0)
    addmm = aten.addmm.default(param_constant1, x, t)
    add = aten.add.Tensor(addmm, tensor_constant2)
    return add
""",
    )


def test_gradient_of_a_module():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    params = {k: v.detach() for k, v in net.named_parameters()}
    f = lambda params, x: functional_call(net, params, (x,)).sum()
    assert_expected_inline(
        shown(grad(f), params, same(5, 3), like=T.grad(f)),
        """\
def forward(self, params, x):
    params_0_weight, params_0_bias, params_2_weight, params_2_bias, x, = fx_pytree.tree_flatten_spec(([params, x], {}), self._in_spec)
    t = aten.t.default(params_0_weight)
    addmm = aten.addmm.default(params_0_bias, x, t)
    tanh = aten.tanh.default(addmm)
    full = aten.full.default([], 1, dtype = torch.float32, device = device(type='cpu'))
    expand = aten.expand.default(full, [5, 1])
    mm = aten.mm.default(expand, params_2_weight)
    expand_1 = aten.expand.default(full, [1, 5])
    mm_1 = aten.mm.default(expand_1, tanh)
    full_1 = aten.full.default([1], 5, dtype = torch.float32, device = device(type='cpu'))
    tanh_backward = aten.tanh_backward.default(mm, tanh)
    t_1 = aten.t.default(tanh_backward)
    mm_2 = aten.mm.default(t_1, x)
    sum_1 = aten.sum.dim_IntList(tanh_backward, [0])
    return pytree.tree_unflatten([mm_2, sum_1, mm_1, full_1], self._out_spec)
""",
    )


def test_constant_and_passed_through_results():
    assert_expected_inline(
        shown(lambda x, y: (x, 3, None, y.sin()), same(3), same(3)),
        """\
def forward(self, x, y):
    sin = aten.sin.default(y)
    return (x, 3, None, sin)
""",
    )


def test_equal_expressions_are_computed_once():
    assert_expected_inline(
        shown(lambda x: x.sin() * x.sin() + (x + 1.0) * (1.0 + x), same(3)),
        """\
def forward(self, x):
    sin = aten.sin.default(x)
    mul = aten.mul.Tensor(sin, sin)
    add = aten.add.Tensor(x, 1.0)
    mul_1 = aten.mul.Tensor(add, add)
    add_1 = aten.add.Tensor(mul, mul_1)
    return add_1
""",
    )


def test_dead_code_is_gone():
    def f(x):
        x.exp()
        return x.sin()

    assert_expected_inline(
        shown(f, same(3)),
        """\
def forward(self, x):
    sin = aten.sin.default(x)
    return sin
""",
    )


def test_lines_of_the_user():
    assert_expected_inline(
        readable(make_fx(waves, verbose=True)(same(3)).code),
        """\
def forward(self, x):
    sin = aten.sin.default(x)  # sample.py:7 in waves: y = torch.sin(x)
    mul = aten.mul.Tensor(sin, sin)  # sample.py:8 in waves: y = y * y
    sum_1 = aten.sum.default(mul)  # sample.py:9 in waves: return y.sum()
    return sum_1
""",
    )


def test_lines_of_the_user_under_a_transform():
    assert_expected_inline(
        readable(make_fx(grad(waves), verbose=True)(same(3)).code),
        """\
def forward(self, x):
    sin = aten.sin.default(x)  # sample.py:7 in waves: y = torch.sin(x)
    add = aten.add.Tensor(sin, sin)  # sample.py:8 in waves: y = y * y
    cos = aten.cos.default(x)  # sample.py:7 in waves: y = torch.sin(x)
    mul = aten.mul.Tensor(add, cos)  # sample.py:7 in waves: y = torch.sin(x)
    return mul
""",
    )


def test_lines_of_a_write():
    assert_expected_inline(
        readable(make_fx(written, verbose=True)(same(3)).code),
        """\
def forward(self, x):
    tensor_constant0 = self._tensor_constant0
    select_scatter = aten.select_scatter.default(x, tensor_constant0, 0, 0)  # sample.py:14 in written: y[0] = 1
    return select_scatter
""",
    )


# nested compiled calls, random numbers
# -------------------------------------------------------------------------------


def test_jit_inside_a_gradient_is_inlined():
    g = jit(lambda x: torch.sin(x) * x)
    f = lambda x: (g(x) ** 2).sum()
    like = T.grad(lambda x: ((torch.sin(x) * x) ** 2).sum())
    assert_expected_inline(
        shown(grad(f), same(3), like=like),
        """\
def forward(self, x):
    sin = aten.sin.default(x)
    mul = aten.mul.Tensor(sin, x)
    mul_1 = aten.mul.Tensor(mul, 2)
    mul_2 = aten.mul.Tensor(mul_1, sin)
    mul_3 = aten.mul.Tensor(mul_1, x)
    cos = aten.cos.default(x)
    mul_4 = aten.mul.Tensor(mul_3, cos)
    add = aten.add.Tensor(mul_2, mul_4)
    return add
""",
    )


def test_jit_of_a_gradient_is_inlined():
    f = jit(grad(lambda x: torch.sin(x).sum()))
    assert_expected_inline(
        shown(lambda x: f(x) + 1, same(3), like=lambda x: x.cos() + 1),
        """\
def forward(self, x):
    cos = aten.cos.default(x)
    add = aten.add.Tensor(cos, 1)
    return add
""",
    )


def test_dropout():
    f = lambda x: F.dropout(x, 0.5).sin().sum()
    assert_expected_inline(
        shown(grad(f), same(8), like=by_autograd(f)),
        """\
def forward(self, x):
    empty_like = aten.empty_like.default(x)
    bernoulli = aten.bernoulli.p(empty_like, 0.5, generator = None)
    div = aten.div.Scalar(bernoulli, 0.5)
    mul = aten.mul.Tensor(x, div)
    cos = aten.cos.default(mul)
    mul_1 = aten.mul.Tensor(cos, div)
    return mul_1
""",
    )


def test_draws_stay_in_order_even_when_nobody_reads_them():
    def f(x):
        torch.randn(2)
        return x * torch.rand(3) + torch.randn_like(x)

    assert_expected_inline(
        shown(f, same(3)),
        """\
def forward(self, x):
    randn = aten.randn.default([2], device = device(type='cpu'), pin_memory = False)
    rand = aten.rand.default([3], device = device(type='cpu'), pin_memory = False)
    mul = aten.mul.Tensor(x, rand)
    randn_like = aten.randn_like.default(x, pin_memory = False)
    add = aten.add.Tensor(mul, randn_like)
    return add
""",
    )


def test_a_cached_program_does_not_keep_its_first_names():
    x = same(3)
    first, second = (make_fx(f)(x, x).code for f in (lambda a, b: a * b, lambda u, v: u * v))
    assert "def forward(self, a, b)" in first and "def forward(self, u, v)" in second
