"""Compiled by the C++ backend: values, gradients, dtypes and strides as in eager mode."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

import aotfunc
from aotfunc import aot_function, aot_module, grad, jacrev, jit, make_fx, vmap
from aotfunc.backends.loops import backend, native
from aotfunc.backends.loops.arguments import count_rows, sizes
from aotfunc.backends.loops.blocks import sum_in_blocks
from aotfunc.backends.loops.builder import build_kernel
from aotfunc.backends.loops.fuse import grouped, stored
from aotfunc.backends.loops.members import within_kernels
from aotfunc.backends.loops.pointwise import RULES
from aotfunc.backends.loops.schedule import schedule_kernel
from aotfunc.backends.loops.steps import in_steps
from aotfunc.errors import CompilerError, GraphError
from tests.backends.interpret import interpret
from tests.kernels import every_kernel
from tests.sweeps import seeds

pytestmark = pytest.mark.usefixtures("cache")
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38, 0.5, -1.0, 2.0]


def agree(f, *args, kernels: int | None = 1, **tolerance) -> None:
    made = len(every_kernel.made)
    got, want = jit(f, backend=every_kernel)(*args), f(*args)
    assert_close(got, want, equal_nan=True, **tolerance)
    for a, b in zip(*[[x] if isinstance(x, Tensor) else x for x in (got, want)], strict=True):
        assert a.stride() == b.stride() and a.dtype is b.dtype
    if kernels is not None:
        assert len(every_kernel.made) - made == kernels


#: what every table of arguments here is drawn from, whichever tests are imported before
GENERATOR = torch.Generator().manual_seed(0)


def floats(*shape: int, dtype=torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=GENERATOR)


POINTWISE = {
    "a chain": (lambda x, y: (x * y + x).tanh().exp() * 2.5 - y, floats(37, 19), floats(37, 19)),
    "a bias": (lambda x, b: F.gelu(x + b, approximate="tanh"), floats(37, 19), floats(19)),
    "a column": (lambda x, b: (x + b).sigmoid() * b, floats(37, 19), floats(37, 1)),
    "transposed": (lambda x, y: x.t() * y + 1, floats(19, 37), floats(37, 19)),
    "transposed blocks": (
        lambda x, y: x.transpose(0, 2) * y.sin(),
        floats(19, 3, 37),
        floats(37, 3, 19),
    ),
    "transposed with a row": (lambda x, y: x.t() * y + 1, floats(70, 37), floats(1, 70)),
    "transposed odd blocks": (
        lambda x, y: x.mT * y - x.mT.sin(),
        floats(2, 33, 47),
        floats(2, 47, 33),
    ),
    "two transposed": (lambda x, y: x.t() / y.t(), floats(40, 19), floats(40, 19)),
    "a short one transposed": (lambda x, y: x.mT * y, floats(3, 5, 70), floats(3, 70, 5)),
    "transposed and cut": (lambda x, y: x[:, 3:-2].t() * y, floats(40, 50), floats(45, 40)),
    "strided": (lambda x: x.sin() + 1, floats(40, 38)[::2, ::3]),
    "expanded": (lambda x: x.sin() + 1, floats(1, 7).expand(5, 7)),
    "doubles": (lambda x: torch.where(x > 0, x.log(), -x) * 3, floats(5, 7, dtype=torch.float64)),
    "bools": (lambda x, y: (x > y) & (x < 1), floats(33), floats(33)),
    "bools compare": (lambda x: (x > 0) < (x < 1), floats(33)),
    "dtypes": (lambda x, i: x * i + (i > 2), floats(33), torch.arange(33)),
    "wrapping": (lambda i, j: i * j + 7 - i, torch.arange(33) * 2**58, torch.arange(33)),
    "bytes": (lambda i: i * i + 100, torch.arange(-100, 100, dtype=torch.int8)),
    "special": (lambda x: torch.maximum(x.relu(), x * 2), torch.tensor(SPECIAL)),
    "one number": (lambda x: x.sin() * 2, floats()),
    "two results": (lambda x: (x.sin(), x.cos() * 2), floats(50, 3)),
    "a negative zero": (lambda x, b: (x / -0.0, x / b), floats(33), torch.tensor(-0.0)),
    "products that overflow": (
        lambda x: (x.addcmul(x, x, value=1e-30), x.addcdiv(x, 1 / x, value=1e-30)),
        torch.full((9,), 1e25),
    ),
}
REDUCED = {
    "rows": (lambda x: x.exp().sum(1), floats(37, 19)),
    "columns": (lambda x: x.exp().sum(0), floats(37, 19)),
    "columns and values": (lambda x: (x.exp(), x.exp().sum(0)), floats(300, 19)),
    "many columns": (lambda x: x.exp().sum(0), floats(3, 2300)),
    "all": (lambda x: x.exp().sum(), floats(37, 19)),
    "of doubles": (lambda x: x.exp().sum(1), floats(37, 19, dtype=torch.float64)),
    "columns of doubles": (lambda x: x.exp().sum(0), floats(37, 19, dtype=torch.float64)),
    "a mean": (lambda x: (x * x).mean(-1, keepdim=True) * x, floats(37, 19)),
    "outer and inner": (lambda x: (x * x).mean((0, 2)), floats(7, 5, 19)),
    "any": (lambda x: (x > 2).any(-1), floats(37, 19)),
    "all of columns": (lambda x: (x > -2).all(0), floats(37, 19)),
    "extremes": (lambda x: (x * 2).amax(1) - x.amin(1), floats(37, 19)),
    "nan is the largest": (
        lambda x: (x * 2).amax(1),
        torch.tensor([SPECIAL, SPECIAL[1:] + [0.0]]),
    ),
    "a product": (lambda x: (x * 2).prod(1), floats(37, 9)),
    "any and all of bytes": (
        lambda x: ((x + x).any(1), (x + x).all(1)),
        torch.tensor([[1, 2, 4], [0, 2, 4]], dtype=torch.uint8),
    ),
    "integers": (lambda x: (x * 2).sum(1), torch.arange(60).reshape(6, 10)),
    "largest integers": (lambda x: (x * 2).amax(1), torch.arange(-60, 0).reshape(6, 10).int()),
    "counting": (lambda x: (x > 0).sum(1), floats(6, 10)),
    "a sum of one": (lambda x: (x * 2).sum(1).sum(0).mean(), floats(1, 9)),
    "dtypes in columns": (lambda x: (x == x.amax(0)).sum(0) * x, floats(5, 19)),
    "columns of one number": (lambda x: x.exp().sum(0), floats().expand(9, 19)),
    "softmax": (lambda x: torch.softmax(x * 2, -1), floats(37, 19)),
    "softmax of columns": (lambda x: torch.softmax(x * 2, 0), floats(37, 19)),
    "in the middle": (lambda x: torch.log_softmax(x * 2, 1), floats(4, 37, 19)),
    "layer_norm": (
        lambda x, w, b: F.layer_norm(x, (19,), w, b),
        floats(4, 37, 19),
        floats(19),
        floats(19),
    ),
    "rms_norm": (
        lambda x, w: x * torch.rsqrt((x * x).mean(-1, True) + 1e-5) * w,
        floats(9, 19),
        floats(19),
    ),
}


@pytest.mark.parametrize("case", POINTWISE)
def test_pointwise(case):
    agree(*POINTWISE[case])


@pytest.mark.parametrize("case", REDUCED)
def test_reductions(case):
    agree(*REDUCED[case])


def test_nothing():
    """An empty tensor has no memory to read, not even where it is broadcast."""
    for x in (floats(0, 3), floats(1).expand(0), floats(3, 1).expand(3, 0)):
        agree(lambda x: (x.sin() + 1, (x.exp() * 2).sum()), x, kernels=0)


def test_the_sum_of_one_negative_zero():
    """It is 0, as sums begin with 0."""
    f = lambda x: ((x * 2).sum(0), (x * 2).mean(0), (x * 2).cumsum(0))
    for y in jit(f, backend=every_kernel)(torch.full((1, 9), -0.0)):
        assert not y.signbit().any()


def test_a_sum_beside_what_it_does_not_depend_on():
    agree(lambda x, y: (x > 0).any() * y.sum(0), floats(9), floats(4, 9), kernels=None)
    agree(lambda x: (x.expand(5, 9) * 2).amax(0), floats(5, 1), kernels=None)
    agree(lambda x: (x.expand(5, 9) * 2).sum(0), floats(5, 1), kernels=None)
    agree(
        lambda x, y: torch.where((x > 0).any(0), y, 0 * y), floats(9, 1), floats(9), kernels=None
    )


def test_one_kernel_does_not_read_in_two_orders():
    """Greatest of rows and of columns of a square matrix are two kernels."""
    agree(lambda x: (x.exp().amax(0), x.exp().amax(1)), floats(16, 16), kernels=None)
    agree(lambda x: x + x.t(), floats(5, 5), kernels=0)


GRADIENTS = {
    "layer_norm": (
        lambda x, w, b: F.gelu(F.layer_norm(x, (19,), w, b)),
        floats(4, 37, 19),
        floats(19),
        floats(19),
    ),
    "softmax": (lambda x, y: torch.softmax(x, -1) * y, floats(37, 19), floats(37, 19)),
    "mlp": (lambda x, w, b: torch.tanh(x @ w + b), floats(11, 19), floats(19, 5), floats(5)),
    "bias and gelu": (lambda x, b: F.gelu(x + b), floats(64, 64), floats(64)),
    "log_softmax": (lambda x: torch.log_softmax(x, 1)[:, 2], floats(11, 19)),
}


@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients(case):
    """Of the first and second order, through the compiled function and of it."""
    f, *primals = GRADIENTS[case]
    ours = jit(f, backend="cpp")
    loss = lambda f: lambda *a: f(*a).square().sum()
    every = tuple(range(len(primals)))
    want = grad(loss(f), argnums=every)(*primals)
    assert_close(jit(grad(loss(f), argnums=every), backend=every_kernel)(*primals), want)
    seconds = []
    for g, dtype in ((ours, torch.float32), (f, torch.float64)):
        leaves = [p.to(dtype, copy=True).requires_grad_() for p in primals]
        first = torch.autograd.grad(loss(g)(*leaves), leaves, create_graph=True)
        seconds.append(torch.autograd.grad(sum((a * a).sum() for a in first), leaves))
        assert_close(tuple(first), want, rtol=1e-4, atol=1e-4, check_dtype=False)
    assert_close(*seconds, rtol=1e-3, atol=1e-3, check_dtype=False)


def test_transforms_and_ahead_of_time():
    x, w = floats(11, 19), floats(19, 5)
    per_sample = vmap(grad(lambda w, x: torch.tanh(x @ w).square().mean()), (None, 0))
    assert_close(jit(per_sample, backend="cpp")(w, x), per_sample(w, x))
    f = lambda x: (x.sin() * x).sum(-1)
    assert_close(jit(jacrev(f), backend="cpp")(x), jacrev(f)(x))
    got = aot_function(f, "cpp", "cpp")(x.requires_grad_())
    assert_close(torch.autograd.grad(got.sum(), x)[0], x.cos() * x + x.sin())
    model = torch.nn.Sequential(torch.nn.Linear(19, 8), torch.nn.GELU(), torch.nn.LayerNorm(8))
    compiled = aot_module(model, "cpp", "cpp")
    assert_close(compiled(x.detach()), model(x.detach()))


def test_written_arguments_and_draws():
    def f(x, y):
        noise = torch.rand_like(x)
        x.mul_(2).add_(y)
        return x * noise + torch.rand_like(x)

    for seed in range(2):
        got, want = floats(5), None
        want, y = got.clone(), floats(5)
        torch.manual_seed(seed)
        a = jit(f, backend="cpp")(got, y)
        torch.manual_seed(seed)
        assert_close(a, f(want, y))
        assert_close(got, want)


def test_an_op_that_lays_its_result_out_otherwise():
    """Kernels read memory by the strides that the graph says: a result with others is copied, one
    of another shape or dtype refused."""
    x = floats(4, 6)
    gm = make_fx(lambda x: ((x @ x.t()).exp() * 2,))(x)
    (mm,) = [n for n in gm.graph.nodes if n.target is torch.ops.aten.mm.default]
    mm.target = lambda a, b: (b.t() @ a.t().exp()).t()
    run = backend.compile_cpp(gm, [x])
    assert_close(run(x)[0], (x.exp() @ x.t()).exp() * 2)
    for wrong in (lambda a, b: (a @ b)[0], lambda a, b: (a @ b).double()):
        mm.target = wrong
        with pytest.raises(GraphError, match="fake implementation"):
            backend.compile_cpp(gm, [x])(x)


def test_negated_memory():
    """The imaginary part of a conjugate is stored negated."""
    z = torch.randn(5, dtype=torch.complex64)
    y = z.conj().imag
    assert y.is_neg()
    assert_close(jit(lambda y: y.exp() * 2, backend="cpp")(y), y.exp() * 2)
    f = lambda z: z.conj().imag.exp() * 2
    assert_close(jit(f, backend="cpp")(z), f(z))


def test_ten_sizes_are_compiled_once(cache):
    def f(x, w):
        return F.layer_norm(torch.tanh(x @ w), (19,)).square().mean()

    step = jit(grad(f, argnums=1), backend="cpp")
    w = floats(7, 19)
    for n in range(2, 12):
        x = floats(n, 7)
        assert_close(step(x, w), grad(f, argnums=1)(x, w), rtol=1e-4, atol=1e-6)
    assert step.captures == 10 and len(native.LOADED) == 1


def test_equal_kernels_are_compiled_once():
    def f(x, y):
        return (x.tanh() * 2) @ (y.tanh() * 2)

    agree(f, floats(5, 5), floats(5, 5), kernels=2, rtol=1e-5, atol=1e-5)
    assert len({launch.__name__ for launch in every_kernel.made[-2:]}) == 1


def test_kernels_of_other_graphs_are_not_compiled_again(cache):
    f, g = (lambda x: x.tanh() * 2), (lambda y: y.cos() + 1)
    x, y = floats(5), floats(4, 7)
    jit(f, backend="cpp")(x), jit(g, backend="cpp")(y)
    count = len(native.LOADED)
    assert_close(jit(lambda x, y: (f(x), g(y)), backend="cpp")(x, y), (f(x), g(y)))
    assert len(native.LOADED) == count == 2


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    x = floats(5)
    with pytest.raises(CompilerError, match="no-such-compiler"):
        jit(lambda x: x.exp() + 1.2345678, backend="cpp")(x)


def test_a_person_can_read_it(capsys, monkeypatch):
    monkeypatch.setattr(aotfunc.debug, "LEVEL", 4)
    jit(lambda x, b: (x + b).tanh(), backend="cpp")(floats(3, 4), floats(4))
    said = capsys.readouterr().err
    assert "// tanh: float32 = aten.tanh.default(add)" in said and "void k_tanh(" in said
    stages = aotfunc.debug.stages(jit(lambda x: (x.sin() * 2).sum(), backend="cpp", exact=True))(
        floats(4)
    )
    assert "# cpp: 3 -> 1 nodes" in str(stages) and "void k_sum_1(" in str(stages)


# ----- kernels one by one ------------------------------------------------------------------------


def kernels_of(f, *args):
    gm = make_fx(f)(*args)
    in_steps(gm.graph)
    sum_in_blocks(gm.graph, within_kernels)
    return [
        schedule_kernel(build_kernel(u.nodes, stored(u.nodes), "k"))
        for u in grouped(gm.graph).units
        if u.kernel and u.nodes
    ]


def test_a_kernel_prints():
    (kernel,) = kernels_of(lambda x, b: (x + b).exp().sum(1), floats(4, 5), floats(5))
    assert str(kernel) == (
        "k: for i0<4, i1<5\n"
        "  v0: float32 = x[5*i0 + i1]\n"
        "  v1: float32 = b[i1]\n"
        "  v2: float32 = add(v0, v1)\n"
        "  v3: float32 = exp(v2)\n"
        "  v4: float32 = sum[i1](v3)\n"
        "  sum_1[i0] = v4"
    )


UNARY = [op for op in RULES if len(op._schema.arguments) == 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("op", UNARY, ids=str)
def test_special_values(op, dtype):
    """NaN, infinities, signed zeros, numbers near the ends of the range."""
    x = torch.tensor(SPECIAL * 2, dtype=dtype)
    if op in (torch.ops.aten.lgamma.default,):
        x = x[x.abs() != 1e-40]
    try:
        want = op(x)
    except RuntimeError:
        pytest.skip("not of this dtype")
    got = jit(lambda x: op(x), backend=every_kernel)(x)
    assert_close(got, want, equal_nan=True)
    if dtype.is_floating_point and got.dtype is dtype:
        real = ~want.isnan()
        assert torch.equal(got[real].signbit(), want[real].signbit())


def random_program(seed: int):
    """An expression of random ops on tensors of random layouts that broadcast."""
    rng = random.Random(seed)
    shape = [rng.choice([1, 2, 3, 5, 9, 17]) for _ in range(rng.randint(1, 3))]
    dtype = rng.choice([torch.float32, torch.float32, torch.float64, torch.int64, torch.int32])

    def tensor() -> Tensor:
        sizes = [1 if rng.random() < 0.25 else n for n in shape][rng.choice([0, 0, 0, 1]) :]
        steps = [rng.choice([1, 1, 1, 2]) for _ in sizes]
        t = torch.randn([n * s for n, s in zip(sizes, steps, strict=True)]) * 3
        t = t.to(dtype)[tuple([slice(None, None, s) for s in steps])]
        order = list(range(len(sizes)))
        rng.shuffle(order)
        back = sorted(order, key=order.__getitem__)
        return t.permute(order).contiguous().permute(back) if rng.random() < 0.4 else t

    args = [tensor() for _ in range(rng.randint(1, 3))]
    plan = [
        (rng.randrange(11), rng.random(), rng.random(), rng.random())
        for _ in range(rng.randint(2, 9))
    ]

    def f(*args: Tensor) -> tuple:
        values = list(args)
        for kind, i, j, k in plan:
            a, b = values[int(i * len(values))], values[int(j * len(values))]
            floating = a.dtype.is_floating_point
            if kind == 0:
                values.append(a + b)
            elif kind == 1:
                values.append(a * b - 1)
            elif kind == 2:
                values.append(torch.where(a > b, a, b * 2))
            elif kind == 3:
                values.append(a.tanh() if floating else a.abs())
            elif kind == 4:
                values.append(a.sigmoid() * 1.5 if floating else -a)
            elif kind == 5 and a.dim():
                values.append(a.sum(int(k * a.dim()), keepdim=k < 0.5))
            elif kind == 6 and a.dim():
                values.append(a.amax(int(k * a.dim()), keepdim=True) - a)
            elif kind == 7 and a.dim() > 1:
                values.append(a.transpose(0, -1).relu().transpose(0, -1))
            elif kind == 8:
                values.append(a.clamp(-1, 1).double() if floating else a.clamp(-1, 1))
            elif kind > 8 and a.dim():
                dim = int(k * a.dim())
                values.append(a.cumsum(dim) if kind == 9 else a.flip(dim).cumsum(dim).flip(dim))
        return tuple(values[len(args) :][-3:]) or (args[0] + 1,)

    return f, args


@pytest.mark.parametrize("seed", seeds(40))
def test_random_programs(seed):
    """Against eager, and each kernel against its interpretation."""
    f, args = random_program(seed)
    try:
        want = f(*args)
    except RuntimeError:  # shapes that do not broadcast
        return
    got = jit(f, backend=every_kernel)(*args)
    assert_close(got, want, equal_nan=True, rtol=1e-4, atol=1e-4)
    assert [a.stride() for a in got] == [b.stride() for b in want]
    assert [a.dtype for a in got] == [b.dtype for b in want]


def against_the_interpreter(kernel) -> None:
    """A kernel on random memory."""
    texts, names, _ = backend.text([kernel])
    source = "\n".join(texts.values())
    library = native.load_kernels(f"{native.PRELUDE}{source}\n")
    tensors = []
    for a in kernel.accesses:
        val = a.tensor.meta["val"]
        size = 1 + sum((n - 1) * s for n, s in zip(val.shape, val.stride(), strict=True))
        memory = (torch.randn(max(size, 1)) * 3).to(val.dtype)
        same = next((t for t, b in tensors if b.tensor is a.tensor), None)
        tensors.append((memory if same is None else same, a))
    apart, ours = [
        [copies[id(t)] for t, _ in tensors]
        for copies in ({id(t): t.clone() for t, _ in tensors} for _ in range(2))
    ]
    interpret(kernel, apart)
    library[names[kernel.name]](count_rows(kernel), sizes(kernel), ours)
    for a, b in itertools.zip_longest(ours, apart):
        assert_close(a, b, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_numbers_that_no_bool_is():
    """Infinity is not True. Beside longer elements bools are computed one by one."""
    x = torch.arange(40) % 3 == 0
    infinite = lambda x: [op(x) for op in (torch.isposinf, torch.isneginf, torch.isinf)]
    filled = lambda x: [x.masked_fill(x, 2), torch.full_like(x, 5) & x, x == 2, x < 0.5]
    f = lambda x: [*infinite(x), *filled(x), x.long() + 1, torch.deg2rad(x), x.prod()]
    for alone in (infinite, filled, f):
        assert_close(jit(alone, backend="cpp")(x), alone(x), rtol=0, atol=0)


@pytest.mark.parametrize("seed", seeds(20, 100))
def test_kernels_against_the_interpreter(seed):
    f, args = random_program(seed)
    try:
        f(*args)
    except RuntimeError:
        return
    for kernel in kernels_of(f, *args):
        against_the_interpreter(kernel)
