"""What compilers are given: golden texts of forward and backward, metadata, example inputs,
Dynamo-style compilers."""
# ruff: noqa: E501 (printed code is as wide as it is)

import copy

import expecttest
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensor
from torch.utils._pytree import tree_leaves

from aotfunc import (
    aot_function,
    aot_module,
    default_partition,
    jit,
    min_cut_rematerialization_partition,
)
from aotfunc.compile import make_boxed_compiler
from tests.aot.compilers import Watched


def given(f, *args, partition=default_partition):
    """The code of each module that the compilers get in a forward and a backward."""
    modules = []

    def compiler(gm, example_inputs):
        check(gm, example_inputs)
        modules.append(gm)
        return gm

    out = aot_function(f, compiler, partition_fn=partition)(*args)
    if any(t.requires_grad for t in tree_leaves(out)):
        sum(t.sum() for t in tree_leaves(out) if t.requires_grad).backward()
    return "\n".join(gm.code.strip().replace("torch.ops.aten.", "") for gm in modules) + "\n"


def check(gm, example_inputs):
    assert isinstance(gm, torch.fx.GraphModule)
    for n in gm.graph.nodes:
        if n.op == "output":
            continue
        assert n.op in ("placeholder", "call_function")
        vals = tree_leaves(n.meta["val"])
        assert vals and all(isinstance(v, FakeTensor | int | float) for v in vals), n
    placeholders = [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"]
    assert len({v.fake_mode for v in placeholders}) <= 1
    assert len(placeholders) == len(example_inputs)
    for v, x in zip(placeholders, example_inputs):
        assert not isinstance(x, FakeTensor) and not x.requires_grad
        assert (v.shape, v.stride(), v.dtype, v.device) == (x.shape, x.stride(), x.dtype, x.device)


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


class TestGolden(expecttest.TestCase):
    maxDiff = None

    def test_pointwise(self):
        self.assertExpectedInline(
            given(lambda x: torch.sin(x) * 2, leaf(3)),
            """\
def forward(self, x):
    sin = sin.default(x)
    mul = mul.Tensor(sin, 2);  sin = None
    return (mul, x)
def forward(self, x, tangents_0):
    mul = mul.Tensor(tangents_0, 2);  tangents_0 = None
    cos = cos.default(x);  x = None
    mul_1 = mul.Tensor(mul, cos);  mul = cos = None
    return (mul_1,)
""",
        )

    def test_no_gradient_wanted(self):
        self.assertExpectedInline(
            given(lambda x: torch.sin(x) * 2, torch.randn(3)),
            """\
def forward(self, x):
    sin = sin.default(x);  x = None
    mul = mul.Tensor(sin, 2);  sin = None
    return (mul,)
""",
        )

    def test_linear_relu(self):
        f = lambda x, w, b: F.relu(F.linear(x, w, b)).sum()
        self.assertExpectedInline(
            given(f, torch.randn(2, 3), leaf(4, 3), leaf(4)),
            """\
def forward(self, x, w, b):
    t = t.default(w);  w = None
    addmm = addmm.default(b, x, t);  b = t = None
    relu = relu.default(addmm);  addmm = None
    sum_1 = sum.default(relu)
    return (sum_1, x, relu)
def forward(self, x, relu, tangents_0):
    threshold_backward = threshold_backward.default(tangents_0, relu, 0);  tangents_0 = relu = None
    t = t.default(threshold_backward)
    mm = mm.default(t, x);  t = x = None
    sum_1 = sum.dim_IntList(threshold_backward, [0]);  threshold_backward = None
    return (mm, sum_1)
""",
        )

    def test_min_cut_recomputes_cheap_values(self):
        f = lambda x: (x.sin().cos().sin().cos()).sum()
        got = given(f, leaf(8), partition=min_cut_rematerialization_partition)
        self.assertExpectedInline(
            got,
            """\
def forward(self, x):
    sin = sin.default(x)
    cos = cos.default(sin);  sin = None
    sin_1 = sin.default(cos);  cos = None
    cos_1 = cos.default(sin_1);  sin_1 = None
    sum_1 = sum.default(cos_1);  cos_1 = None
    return (sum_1, x)
def forward(self, x, tangents_0):
    sin = sin.default(x)
    cos = cos.default(sin)
    sin_1 = sin.default(cos)
    sin_2 = sin.default(sin_1);  sin_1 = None
    mul = mul.Tensor(tangents_0, sin_2);  tangents_0 = sin_2 = None
    cos_1 = cos.default(cos);  cos = None
    mul_1 = mul.Tensor(mul, cos_1);  mul = cos_1 = None
    sin_3 = sin.default(sin);  sin = None
    mul_2 = mul.Tensor(mul_1, sin_3);  mul_1 = sin_3 = None
    cos_2 = cos.default(x);  x = None
    mul_3 = mul.Tensor(mul_2, cos_2);  mul_2 = cos_2 = None
    return (mul_3,)
""",
        )

    def test_default_saves_them(self):
        self.assertExpectedInline(
            given(lambda x: (x.sin().cos().sin()).sum(), leaf(8)),
            """\
def forward(self, x):
    sin = sin.default(x)
    cos = cos.default(sin)
    sin_1 = sin.default(cos)
    sum_1 = sum.default(sin_1);  sin_1 = None
    return (sum_1, x, sin, cos)
def forward(self, x, sin, cos, tangents_0):
    cos_1 = cos.default(cos);  cos = None
    mul = mul.Tensor(tangents_0, cos_1);  tangents_0 = cos_1 = None
    sin_1 = sin.default(sin);  sin = None
    mul_1 = mul.Tensor(mul, sin_1);  mul = sin_1 = None
    cos_2 = cos.default(x);  x = None
    mul_2 = mul.Tensor(mul_1, cos_2);  mul_1 = cos_2 = None
    neg = neg.default(mul_2);  mul_2 = None
    return (neg,)
""",
        )

    def test_written_input_is_another_output(self):
        def f(x, state):
            state.add_(1)
            return x * state

        self.assertExpectedInline(
            given(f, leaf(3), torch.zeros(3)),
            """\
def forward(self, x, state):
    add = add.Tensor(state, 1);  state = None
    mul = mul.Tensor(x, add);  x = None
    return (mul, add, add)
def forward(self, add, tangents_0):
    mul = mul.Tensor(tangents_0, add);  tangents_0 = add = None
    return (mul,)
""",
        )

    def test_views_of_results_are_made_outside(self):
        self.assertExpectedInline(
            given(lambda x: (x.t(), (x * x).view(-1)), leaf(2, 3)),
            """\
def forward(self, x):
    mul = mul.Tensor(x, x)
    return (mul, x)
def forward(self, x, tangents_0):
    mul = mul.Tensor(tangents_0, x);  tangents_0 = x = None
    add = add.Tensor(mul, mul);  mul = None
    return (add,)
""",
        )

    def test_no_grad_region(self):
        def f(x):
            with torch.no_grad():
                s = x.sum()
            return x * s

        self.assertExpectedInline(
            given(f, leaf(3)),
            """\
def forward(self, x):
    sum_1 = sum.default(x)
    mul = mul.Tensor(x, sum_1);  x = None
    return (mul, sum_1)
def forward(self, sum_1, tangents_0):
    mul = mul.Tensor(tangents_0, sum_1);  tangents_0 = sum_1 = None
    return (mul,)
""",
        )

    def test_dropout(self):
        self.assertExpectedInline(
            given(lambda x: F.dropout(x, 0.5), leaf(4)),
            """\
def forward(self, x):
    empty_like = empty_like.default(x)
    bernoulli = bernoulli.p(empty_like, 0.5, generator = None);  empty_like = None
    div = div.Scalar(bernoulli, 0.5);  bernoulli = None
    mul = mul.Tensor(x, div);  x = None
    return (mul, div)
def forward(self, div, tangents_0):
    mul = mul.Tensor(tangents_0, div);  tangents_0 = div = None
    return (mul,)
""",
        )

    def test_batch_norm(self):
        m = nn.BatchNorm1d(3)
        self.assertExpectedInline(
            given(m, torch.randn(4, 3)),
            """\
def forward(self, args_0, const0, param1, param2, const3, const4):
    add = add.Tensor(const0, 1);  const0 = None
    native_batch_norm_legit_functional = _native_batch_norm_legit_functional.default(args_0, param1, param2, const3, const4, True, 0.1, 1e-05);  param2 = const3 = const4 = None
    getitem = native_batch_norm_legit_functional[1]
    getitem_1 = native_batch_norm_legit_functional[2]
    getitem_2 = native_batch_norm_legit_functional[0]
    getitem_3 = native_batch_norm_legit_functional[3]
    getitem_4 = native_batch_norm_legit_functional[4];  native_batch_norm_legit_functional = None
    return (getitem_2, add, getitem_3, getitem_4, args_0, param1, getitem, getitem_1)
def forward(self, args_0, param1, getitem_3, getitem_4, tangents_0):
    native_batch_norm_backward = native_batch_norm_backward.default(tangents_0, args_0, param1, None, None, getitem_3, getitem_4, True, 1e-05, [False, True, True]);  tangents_0 = args_0 = param1 = getitem_3 = getitem_4 = None
    getitem = native_batch_norm_backward[1]
    getitem_1 = native_batch_norm_backward[2];  native_batch_norm_backward = None
    return (getitem, getitem_1)
""",
        )

    def test_nested_jit_is_dissolved(self):
        inner = jit(lambda x: x.exp() * x)
        self.assertExpectedInline(
            given(lambda x: inner(x).sum(), leaf(3)),
            """\
def forward(self, x):
    exp = exp.default(x)
    mul = mul.Tensor(exp, x)
    sum_1 = sum.default(mul);  mul = None
    return (sum_1, x, exp)
def forward(self, x, exp, tangents_0):
    mul = mul.Tensor(tangents_0, exp)
    mul_1 = mul.Tensor(tangents_0, x);  tangents_0 = x = None
    mul_2 = mul.Tensor(mul_1, exp);  mul_1 = exp = None
    add = add.Tensor(mul, mul_2);  mul = mul_2 = None
    return (add,)
""",
        )


def test_two_compilers():
    forward, backward = Watched(), Watched()
    x = leaf(3)
    f = aot_function(lambda x: x.sin().sum(), forward.compiler, backward.compiler)
    y = f(x)
    assert (forward.calls, backward.calls) == (1, 0)
    y.backward()
    f(x).backward()
    assert (forward.calls, backward.calls) == (1, 1)


def test_a_compiler_for_calls_that_are_not_recorded():
    """Its graph returns no residuals, as with functorch; it is called where nothing requires
    grad, where gradients are off, and where no result has a derivative."""
    forward, whole = Watched(), Watched()
    f = aot_function(lambda x: x.exp(), forward.compiler, inference_compiler=whole.compiler)
    x = leaf(3)
    f(x.detach())
    with torch.no_grad():
        assert torch.equal(f(x), x.exp())
    assert (forward.calls, whole.calls) == (0, 2)
    assert f(x).requires_grad
    assert (forward.calls, whole.calls) == (1, 2)
    g = aot_function(lambda x: x.sign().long(), "eager", inference_compiler=whole.compiler)
    g(x)
    assert whole.calls == 3
    h = copy.deepcopy(aot_module(nn.ReLU(), "eager", inference_compiler=whole.compiler))
    assert torch.equal(h(x.detach()), x.relu())
    assert whole.calls == 4


def test_metadata_of_many_kinds():
    def f(x, i, z, h):
        v, k = x.topk(2)
        return (v * h.to(v.dtype)[:2]).sum() + x[i].sum() + z.abs().sum(), k

    args = (
        leaf(5),
        torch.tensor([0, 3]),
        torch.randn(2, dtype=torch.complex64),
        torch.ones(4, dtype=torch.bfloat16),
    )
    given(f, *args)
    given(lambda x: x.to(memory_format=torch.channels_last).relu(), leaf(1, 2, 3, 3))
    given(lambda x: x * 2, leaf(4)[1:].detach().requires_grad_())
    given(lambda x: x.sum(), leaf(3, 2).t().detach().requires_grad_())


@pytest.mark.parametrize("partition", [default_partition, min_cut_rematerialization_partition])
def test_lines_of_the_user(partition):
    """Both halves carry them in PyTorch's format, which its tools print."""
    texts = []

    def compiler(gm, example_inputs):
        texts.append(gm.print_readable(print_output=False))
        return gm

    def f(x):
        y = x.sin()
        return y * y.exp()

    aot_function(f, compiler, partition_fn=partition)(
        torch.ones(2, requires_grad=True)
    ).sum().backward()
    assert len(texts) == 2
    for text in texts:
        assert "in f, code: y = x.sin()" in text and "in f, code: return y * y.exp()" in text
        assert "No stacktrace" not in text


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:The TorchScript type system")
@pytest.mark.parametrize("name", ["eager", "aot_eager", "ts"])
def test_dynamo_backend(name):
    """A compiler written for torch.compile serves as it is."""
    from torch._dynamo.backends.registry import lookup_backend

    x = leaf(3)
    f = aot_function(lambda x: (x.sin() * x).sum(), lookup_backend(name))
    (g,) = torch.autograd.grad(f(x), x)
    torch.testing.assert_close(g, (x.cos() * x + x.sin()).detach())


@pytest.mark.parametrize("kind", [tuple, list])
def test_what_a_compiled_function_may_return(kind):
    x = leaf(3)
    for compiler in (
        lambda gm, _: lambda *args: kind(gm(*args)),
        make_boxed_compiler(lambda gm, _: gm),
        lambda gm, _: gm.forward,
    ):
        f = aot_function(lambda x: (x.sin(), x * 2), compiler)
        a, b = f(x)
        (g,) = torch.autograd.grad((a * b).sum(), x)
        torch.testing.assert_close(g, (x.cos() * x * 2 + x.sin() * 2).detach())


def test_decompositions_are_applied_to_both_halves():
    from torch._decomp import core_aten_decompositions, decomposition_table

    x = leaf(5)
    (want,) = torch.autograd.grad(F.gelu(x).sum(), x)
    for table in (decomposition_table, core_aten_decompositions()):
        w = Watched()
        (g,) = torch.autograd.grad(
            aot_function(lambda x: F.gelu(x).sum(), w.compiler, decompositions=table)(x), x
        )
        torch.testing.assert_close(g, want)
        if table is decomposition_table:
            assert len(w.modules) == 2 and not any("gelu" in gm.code for gm in w.modules)
