"""vmap: dimensions in and out, trees, in-place writes, dtypes, chunks, and what is refused."""

from collections import namedtuple

import pytest
import torch

from aotfunc import chunk_vmap, grad, vmap
from aotfunc.errors import AotfuncError
from tests.inputs import f64
from tests.reference import assert_same, grads, loop

Pair = namedtuple("Pair", "left right")


# (function, in_dims, out_dims, arguments): each against a Python loop
# -------------------------------------------------

DIMENSIONS = {
    "default": (torch.dot, 0, 0, lambda: (f64(3, 5), f64(3, 5))),
    "second dim": (torch.dot, 1, 0, lambda: (f64(5, 3), f64(5, 3))),
    "mixed": (torch.dot, (0, 1), 0, lambda: (f64(3, 5), f64(5, 3))),
    "negative": (torch.dot, (-1, -2), 0, lambda: (f64(5, 3), f64(3, 5))),
    "None": (torch.mv, (None, 0), 0, lambda: (f64(4, 5), f64(3, 5))),
    "out last": (torch.mv, (None, 0), 1, lambda: (f64(4, 5), f64(3, 5))),
    "out negative": (torch.mm, (0, 0), -1, lambda: (f64(3, 2, 4), f64(3, 4, 5))),
    "out middle": (torch.mm, (2, None), 1, lambda: (f64(2, 4, 3), f64(4, 5))),
    "tuple out": (lambda x: (x.sin(), x.sum()), 0, (1, 0), lambda: (f64(3, 5),)),
    "one out_dim for two": (lambda x: (x.sin(), x * 2), 0, 1, lambda: (f64(3, 5),)),
    "dict in": (
        lambda p, x: p["w"] @ x + p["b"],
        ({"w": 0, "b": None}, 0),
        0,
        lambda: ({"w": f64(3, 2, 4), "b": f64(2)}, f64(3, 4)),
    ),
    "dict under one dim": (
        lambda p: p["w"] @ p["b"],
        0,
        0,
        lambda: ({"w": f64(3, 2, 4), "b": f64(3, 4)},),
    ),
    "nested in": (
        lambda t: t[0] * t[1][0] + t[1][1],
        ((0, (None, 1)),),
        0,
        lambda: ((f64(3, 2), (f64(2), f64(2, 3))),),
    ),
    "list in": (lambda t: t[0] @ t[1], ([0, 1],), 0, lambda: ([f64(3, 4), f64(4, 3)],)),
    "namedtuple": (
        lambda p: Pair(p.left * 2, p.right + p.left),
        0,
        0,
        lambda: (Pair(f64(3, 2), f64(3, 2)),),
    ),
    "dict out": (lambda x: {"a": x.sin(), "b": [x.sum()]}, 0, 0, lambda: (f64(3, 5),)),
    "unbatched output": (lambda x: torch.ones(2, dtype=torch.float64), 0, 0, lambda: (f64(3, 5),)),
    "unbatched beside": (lambda x, w: (x @ w, w * 2), (0, None), 0, lambda: (f64(3, 4), f64(4))),
    "integers": (lambda i: i * 2 + 1, 0, 0, lambda: (torch.arange(6).view(3, 2),)),
    "booleans": (lambda m, x: torch.where(m, x, -x), 0, 0, lambda: (f64(3, 4) > 0, f64(3, 4))),
    "complex": (
        lambda z: z.abs() * z.conj(),
        0,
        0,
        lambda: (torch.randn(3, 4, dtype=torch.complex128),),
    ),
    "indexing by a batch": (
        lambda x, i: x[i],
        0,
        0,
        lambda: (f64(3, 4), torch.tensor([[0, 1], [3, 3], [2, 0]])),
    ),
    "indexing into one": (
        lambda x, i: x[i],
        (None, 0),
        0,
        lambda: (f64(4, 2), torch.tensor([0, 3, 1])),
    ),
    "a scalar index": (lambda x, i: x[i], 0, 0, lambda: (f64(3, 4), torch.tensor([0, 3, 1]))),
    "views": (lambda x: x.t().reshape(-1)[::2], 0, 0, lambda: (f64(3, 4, 2),)),
    "reductions": (
        lambda x: (x.sum(), x.mean(0), x.amax(-1), x.std()),
        0,
        0,
        lambda: (f64(3, 4, 2),),
    ),
    "sort": (lambda x: tuple(x.sort(descending=True)), 0, 0, lambda: (f64(3, 6),)),
    "topk": (lambda x: tuple(x.topk(2)), 0, 0, lambda: (f64(3, 6),)),
    "cumulative": (lambda x: x.cumsum(-1).cumprod(0), 0, 0, lambda: (f64(3, 4),)),
    "concatenation": (
        lambda x, y: torch.cat([x, y, x]),
        (0, None),
        0,
        lambda: (f64(3, 2), f64(2)),
    ),
    "stack": (lambda x, y: torch.stack([x, y], -1), (0, 1), 0, lambda: (f64(3, 2), f64(2, 3))),
    "linear algebra": (
        lambda a: torch.linalg.inv(a @ a.t() + torch.eye(2, dtype=a.dtype)),
        0,
        0,
        lambda: (f64(3, 2, 2),),
    ),
    "einsum": (
        lambda a, b: torch.einsum("ij,jk->ki", a, b),
        (0, 2),
        0,
        lambda: (f64(3, 2, 4), f64(4, 2, 3)),
    ),
    "convolution": (
        lambda x, w: torch.conv2d(x, w, padding=1),
        (0, None),
        0,
        lambda: (f64(3, 1, 2, 5, 5), f64(4, 2, 3, 3)),
    ),
    "convolution, batched weight": (
        lambda x, w: torch.conv2d(x, w),
        (None, 0),
        0,
        lambda: (f64(1, 2, 5, 5), f64(3, 4, 2, 3, 3)),
    ),
    "convolution, both": (
        lambda x, w: torch.conv2d(x, w),
        0,
        0,
        lambda: (f64(3, 1, 2, 5, 5), f64(3, 4, 2, 3, 3)),
    ),
    "expand": (lambda x: x.expand(2, 4), 0, 0, lambda: (f64(3, 4),)),
    "new_zeros": (lambda x: x.new_zeros(2) + x.sum(), 0, 0, lambda: (f64(3, 4),)),
    "full_like": (lambda x: torch.full_like(x, 2) * x, 0, 0, lambda: (f64(3, 4),)),
    "0-dim": (lambda x, y: x * y + 1, 0, 0, lambda: (f64(3), f64(3))),
    "masked_fill": (
        lambda x, m: x.masked_fill(m, -1),
        (0, None),
        0,
        lambda: (f64(3, 4), torch.tensor([1, 0, 1, 0]).bool()),
    ),
    "scatter": (
        lambda x, i, s: x.scatter(0, i, s),
        0,
        0,
        lambda: (f64(3, 4), torch.tensor([[1], [0], [3]]), f64(3, 1)),
    ),
    "gather": (
        lambda x, i: x.gather(0, i),
        0,
        0,
        lambda: (f64(3, 4), torch.tensor([[1], [0], [3]])),
    ),
    "len-one batch": (lambda x: x.sin().sum(), 0, 0, lambda: (f64(1, 4),)),
    "softmax and loss": (
        lambda x, t: torch.nn.functional.cross_entropy(x, t),
        0,
        0,
        lambda: (f64(3, 4, 5), torch.randint(5, (3, 4))),
    ),
}


@pytest.mark.parametrize("name", DIMENSIONS)
def test_equals_a_loop(name):
    f, in_dims, out_dims, make = DIMENSIONS[name]
    args = make()
    assert_same(
        vmap(f, in_dims=in_dims, out_dims=out_dims)(*args), loop(f, in_dims, out_dims)(*args)
    )


@pytest.mark.parametrize("name", DIMENSIONS)
def test_twice_equals_two_loops(name):
    f, in_dims, out_dims, make = DIMENSIONS[name]
    args = torch.utils._pytree.tree_map(
        lambda x: torch.stack([x, x.flip(-1) if x.dim() else x]), make()
    )
    if "index" in name or name in ("scatter", "gather"):
        args = torch.utils._pytree.tree_map(lambda x: torch.stack([x[0], x[0]]), args)
    assert_same(vmap(vmap(f, in_dims, out_dims))(*args), loop(loop(f, in_dims, out_dims))(*args))


def test_f_sees_samples():
    def f(x):
        assert x.shape == (5,) and x.dim() == 1 and x.numel() == 5 and len(x) == 5
        return x * x.shape[0]

    assert_same(vmap(f)(torch.ones(3, 5)), torch.full((3, 5), 5.0))


def test_keyword_arguments_are_not_mapped():
    x, w = f64(3, 4), f64(4)
    assert_same(vmap(lambda x, *, w, k: (x * w).sum() + k)(x, w=w, k=2), (x * w).sum(1) + 2)


def test_python_arguments_need_None():
    assert_same(
        vmap(lambda x, n: x * n, in_dims=(0, None))(f64(3, 2).fill_(1), 4),
        torch.full((3, 2), 4.0, dtype=torch.float64),
    )


def test_non_tensor_outputs_need_out_dims_None():
    with pytest.raises(AotfuncError):
        vmap(lambda x: (x, 3))(f64(3))
    x = f64(3)
    out, n = vmap(lambda x: (x * 2, 3), out_dims=(0, None))(x)
    assert_same(out, x * 2)
    assert n == 3


def test_out_dims_None_returns_an_unbatched_tensor_once():
    w = f64(4)
    a, b = vmap(lambda x, w: (x @ w, w * 2), in_dims=(0, None), out_dims=(0, None))(f64(3, 4), w)
    assert a.shape == (3,)
    assert_same(b, w * 2)


def test_out_dims_None_of_a_batched_tensor_is_refused():
    with pytest.raises(AotfuncError):
        vmap(lambda x: x * 2, out_dims=None)(f64(3))


def test_the_result_dtype_is_that_of_the_unbatched_op():
    wide, narrow = torch.randn(3, dtype=torch.float64), torch.randn(3, 2)
    f = lambda a, b: (
        a + b,
        a * b,
        torch.where(b > 0, a, b),
        torch.maximum(a, b),
        b.add(a, alpha=2),
    )
    assert all(y.dtype == torch.float32 for y in f(wide[0], narrow[0])[:2])
    assert_same(vmap(f)(wide, narrow), loop(f)(wide, narrow))


def test_integers_meet_zero_dim_floats():
    f = lambda i, x: (i * x, i + 1.5, i / 2, i.float() * x)
    args = torch.arange(6).view(3, 2), torch.randn(3, dtype=torch.float64)
    assert_same(vmap(f)(*args), loop(f)(*args))


def test_closed_over_tensors_are_not_mapped():
    w, x = f64(4), f64(3, 4)
    f = vmap(lambda x: x @ w)
    assert_same(f(x), x @ w)
    w.mul_(2)
    assert_same(f(x), x @ w)


def test_backward_continues_through_the_result():
    w, x = f64(4).requires_grad_(), f64(3, 4).requires_grad_()
    gx, gw = torch.autograd.grad(vmap(lambda x: (x @ w).sin())(x).sum(), (x, w))
    ex, ew = torch.autograd.grad((x @ w).sin().sum(), (x, w))
    assert_same((gx, gw), (ex, ew))


# chunks
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3, 7, 100])
def test_chunk_size(chunk_size):
    f = lambda x, y: ((x * y).sum(), {"y": y})
    args = f64(4, 7), f64(7, 4)
    run = vmap(f, in_dims=(1, 0), out_dims=(0, 1), chunk_size=chunk_size)
    assert_same(run(*args), loop(f, (1, 0), (0, 1))(*args))


@pytest.mark.parametrize("chunks", [1, 2, 3, 7])
def test_chunk_vmap(chunks):
    x = f64(7, 4)
    assert_same(chunk_vmap(torch.sum, chunks=chunks)(x), x.sum(1))


# in-place writes
# -------------------------------------------------------------------------------------------------


def test_in_place_on_a_factory():
    def f(x):  # torch.func refuses this: an unbatched tensor written with a batched value
        out = torch.zeros(3, dtype=x.dtype)
        out[1] = x
        out[2] += x * 2
        return out

    x = f64(4)
    assert_same(vmap(f)(x), loop(f)(x))


def test_in_place_on_a_factory_in_a_python_loop():
    def f(x):
        out = torch.empty(x.shape[0], dtype=x.dtype)
        total = torch.zeros((), dtype=x.dtype)
        for i in range(x.shape[0]):
            total += x[i]
            out[i] = total
        return out

    x = f64(4, 5)
    assert_same(vmap(f)(x), x.cumsum(1))


def test_in_place_on_a_mapped_input_is_written_back():
    x = f64(3, 4)
    expected = x * 2
    out = vmap(lambda row: row.mul_(2).sum())(x)
    assert_same(x, expected)
    assert_same(out, expected.sum(1))


def test_in_place_through_a_view_of_a_mapped_input():
    x = f64(4, 3)
    expected = x.clone()
    expected[0] += 1

    def f(col):
        col.view(2, 2)[0, 0] += 1
        return col.sum()

    assert_same(vmap(f, in_dims=1)(x), expected.sum(0))
    assert_same(x, expected)


def test_in_place_on_a_value_made_from_an_unmapped_argument():
    f = lambda w, x: w.clone().add_(x)
    w, x = f64(4), f64(3, 4)
    assert_same(vmap(f, in_dims=(None, 0))(w, x), w + x)


def test_a_closed_over_buffer_written_by_an_unbatched_value():
    count = torch.zeros(())

    def f(x):
        count.add_(1)
        return x * 2

    vmap(f)(f64(3))
    assert count == 1
    vmap(f)(f64(3))
    assert count == 2


def test_a_closed_over_buffer_written_by_a_batched_value_is_refused():
    total = torch.zeros((), dtype=torch.float64)

    def f(x):
        total.add_(x)
        return x

    with pytest.raises(AotfuncError):
        vmap(f)(f64(3))
    assert total == 0


def test_grad_of_a_function_that_counts_in_a_buffer():
    count = torch.zeros(())

    def f(x):
        count.add_(1)
        return (x * x).sum()

    x = f64(3)
    assert_same(grad(f)(x), 2 * x)
    assert count == 1


def test_a_failed_call_writes_nothing_back():
    count = torch.zeros(())

    def f(x):
        count.add_(1)
        return x  # no scalar: grad refuses

    with pytest.raises(AotfuncError):
        grad(f)(f64(3))
    assert count == 0


def test_out_argument_under_vmap():
    def f(x):
        out = torch.empty(4, dtype=x.dtype)
        torch.sin(x, out=out)
        return out

    x = f64(3, 4)
    assert_same(vmap(f)(x), x.sin())


# refused
# -------------------------------------------------------------------------------------------------

REFUSED = {
    "sizes differ": lambda: vmap(torch.add)(f64(3, 2), f64(4, 2)),
    "no mapped argument": lambda: vmap(torch.sin, in_dims=None)(f64(3)),
    "all None": lambda: vmap(torch.add, in_dims=(None, None))(f64(3), f64(3)),
    "no arguments": lambda: vmap(lambda: f64(3))(),
    "in_dims of another structure": lambda: vmap(torch.add, in_dims=(0,))(f64(3), f64(3)),
    "in_dims a float": lambda: vmap(torch.sin, in_dims=0.5)(f64(3)),
    "in_dim out of range": lambda: vmap(torch.sin, in_dims=2)(f64(3, 4)),
    "in_dim for a 0-dim tensor": lambda: vmap(torch.sin)(torch.tensor(1.0)),
    "in_dim for a number": lambda: vmap(torch.mul, in_dims=(0, 0))(f64(3), 2.0),
    "out_dims of another structure": lambda: vmap(lambda x: (x, x), out_dims=(0, 0, 0))(f64(3)),
    "out_dim out of range": lambda: vmap(torch.sin, out_dims=2)(f64(3)),
    "an output that is no tensor": lambda: vmap(lambda x: 3)(f64(3)),
    "an unknown randomness": lambda: vmap(torch.sin, randomness="other")(f64(3)),
    "chunk_size zero": lambda: vmap(torch.sin, chunk_size=0)(f64(3)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    with pytest.raises((AotfuncError, ValueError)):
        REFUSED[name]()


def test_a_branch_on_a_mapped_value_names_the_line():
    def f(x):
        if x.sum() > 0:  # the line to be named
            return x
        return -x

    with pytest.raises(AotfuncError, match=r"test_vmap\.py|torch\.where|x\.sum\(\) > 0"):
        vmap(f)(torch.tensor([[1.0, 2.0], [-3.0, 1.0], [2.0, 0.0]]))


@pytest.mark.parametrize(
    "ask", [lambda x: x.item(), float, int, bool, lambda x: x.tolist(), lambda x: x.numpy()]
)
def test_asking_for_a_value_that_differs_between_samples_is_an_error(ask):
    with pytest.raises(AotfuncError):
        vmap(lambda x: x * ask(x))(torch.arange(3.0))


def test_a_data_dependent_shape_is_an_error():
    x = torch.tensor([[1.0, -2.0], [0.0, -1.0], [2.0, 0.0]])
    with pytest.raises(AotfuncError):
        vmap(lambda x: x[x > 0].sum())(x)
    with pytest.raises(AotfuncError):
        vmap(lambda x: torch.nonzero(x))(x)


# per-sample gradients
# ------------------------------------------------------------------------------------------------


def test_per_sample_gradients_of_a_conv_net():
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(36, 3),
    ).double()
    params = dict(net.named_parameters())
    x, t = f64(5, 1, 8, 8), torch.randint(3, (5,))

    def loss(params, x, t):
        logits = torch.func.functional_call(net, params, x[None])
        return torch.nn.functional.cross_entropy(logits, t[None])

    expected = loop(grads(loss), (None, 0, 0))(params, x, t)
    assert_same(vmap(grad(loss), (None, 0, 0))(params, x, t), expected)


def test_an_empty_batch():
    out = vmap(lambda x: x.sin() * 2)(f64(0, 4))
    assert out.shape == (0, 4)


F = torch.nn.functional
OF_NO_SAMPLES = {
    "nll_loss, weights": (lambda x, t, w: F.nll_loss(x, t, w), [(3, 4), (3,), (4,)], 1),
    "searchsorted": (lambda x, t, w: torch.searchsorted(x, w), [(4,), (3,), (4,)], 1),
    "grid_sample": (
        lambda x, t, w: F.grid_sample(x, w, align_corners=False),
        [(1, 2, 4, 4), (3,), (1, 3, 3, 2)],
        1,
    ),
    "interpolate": (
        lambda x, t, w: F.interpolate(x, scale_factor=2.0),
        [(1, 2, 4), (3,), (4,)],
        1,
    ),
    "batch_norm": (
        lambda x, t, w: F.batch_norm(x, None, None, w, training=True),
        [(3, 4), (3,), (4,)],
        1,
    ),
    "solve": (lambda x, t, w: torch.linalg.solve(x, w), [(4, 4), (3,), (4,)], 1),
    "sort": (lambda x, t, w: x.sort()[0] + w, [(4,), (3,), (4,)], 1),
}


@pytest.mark.parametrize("name", OF_NO_SAMPLES)
def test_an_empty_batch_of_any_op(name):
    f, shapes, integer = OF_NO_SAMPLES[name]
    make = lambda i, shape: (
        torch.zeros(shape, dtype=torch.int64) if i == integer else torch.rand(shape)
    )
    one = f(*[make(i, shape) for i, shape in enumerate(shapes)])
    none = [make(i, (0, *shape)) for i, shape in enumerate(shapes)]
    got = vmap(f)(*none)
    assert got.shape == (0, *one.shape) and got.dtype == one.dtype
    if one.is_floating_point():
        shared = vmap(f, (None, 0, 0))
        assert torch.equal(
            grad(lambda x: shared(x, *none[1:]).sum())(make(0, shapes[0])), torch.zeros(shapes[0])
        )
