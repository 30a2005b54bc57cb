"""``vmap(axis_name=…)`` and what samples tell each other, against the formula on whole batches
under autograd."""

import pytest
import torch

import aotfunc
from aotfunc import (
    all_gather,
    axis_index,
    axis_size,
    grad,
    jit,
    jvp,
    pmax,
    pmean,
    pmin,
    psum,
    vmap,
)
from aotfunc.errors import AotfuncError, ArgumentError
from tests.reference import assert_same

X = torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

#: a function of a sample, and the same of the whole batch
PROGRAMS = {
    "softmax": (lambda x: x.exp() / psum(x.exp(), "i"), lambda x: x.exp() / x.exp().sum(0)),
    "batch norm": (
        lambda x: (x - pmean(x, "i")) / pmean((x - pmean(x, "i")).square(), "i").sqrt(),
        lambda x: (x - x.mean(0)) / (x - x.mean(0)).square().mean(0).sqrt(),
    ),
    "maximum": (lambda x: x.sin() * pmax(x, "i"), lambda x: x.sin() * x.amax(0)),
    "minimum": (lambda x: x.sin() * pmin(x * x, "i"), lambda x: x.sin() * (x * x).amin(0)),
    "gathered": (
        lambda x: (all_gather(x, "i").exp() * x).sum(0),
        lambda x: (x.exp()[None] * x[:, None]).sum(1),
    ),
    "gathered at the end": (
        lambda x: all_gather(x * x, "i", 1)[:, 1] * x,
        lambda x: (x * x)[1] * x,
    ),
    "index": (
        lambda x: x.sin() * axis_index("i") + axis_size("i"),
        lambda x: x.sin() * torch.arange(4)[:, None] + 4,
    ),
    "a constant": (
        lambda x: x * psum(torch.tensor(2.0), "i"),
        lambda x: x * 8,
    ),
    "a tree": (
        lambda x: psum({"a": x, "b": [x * x]}, "i")["b"][0] * x,
        lambda x: (x * x).sum(0) * x,
    ),
    "inside of a scan": (
        lambda x: aotfunc.scan(lambda c, r: (c + psum(r.sin() * c, "i"), c), x[0], x)[0] * x,
        lambda x: scanned(x)[:, None] * x,
    ),
    "inside of a branch": (
        lambda x: aotfunc.cond(psum(x, "i").sum() > 0, lambda x: psum(x, "i") * x, torch.sin, x),
        lambda x: x.sum(0) * x,
    ),
}


def scanned(x):
    c = x[:, 0]
    for t in range(3):
        c = c + (x[:, t].sin() * c).sum(0)
    return c


@pytest.fixture(params=PROGRAMS)
def program(request):
    f, whole = PROGRAMS[request.param]
    return vmap(f, axis_name="i"), whole, f


def weighted(f):
    return lambda x: (f(x) * torch.linspace(1, 2, 12, dtype=torch.float64).view(4, 3)).sum()


def autograd(f, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x), x, create_graph=True)[0]


def test_values(program):
    f, whole, _ = program
    assert_same(f(X), whole(X))
    assert_same(jit(f)(X), whole(X))


def test_gradients(program):
    f, whole, _ = program
    want = autograd(weighted(whole), X)
    assert_same(grad(weighted(f))(X), want)
    assert_same(jit(grad(weighted(f)))(X), want)
    assert_same(autograd(weighted(jit(f)), X), want)


def test_gradients_inside_are_those_of_what_all_samples_compute(program):
    _, whole, f = program
    inside = vmap(grad(lambda x: f(x).sin().sum()), axis_name="i")
    assert_same(inside(X), autograd(lambda x: whole(x).sin().sum(), X))


def test_second_derivatives(program):
    f, whole, _ = program
    want = torch.autograd.functional.hessian(weighted(whole), X)
    assert_same(aotfunc.hessian(weighted(f))(X), want)
    assert_same(aotfunc.jacrev(grad(weighted(f)))(X), want)


def test_tangents(program):
    f, whole, sample = program
    want = torch.autograd.functional.jvp(whole, X, X.cos())[1]
    assert_same(jvp(f, (X,), (X.cos(),))[1], want)
    inside = vmap(lambda x, t: jvp(sample, (x,), (t,))[1], axis_name="i")
    assert_same(inside(X, X.cos()), want)


def test_batches_of_batches(program):
    f, whole, _ = program
    xs = torch.stack([X, X.sin(), X * 2])
    assert_same(vmap(f)(xs), torch.stack([whole(x) for x in xs]))
    assert_same(vmap(f, 1)(xs.transpose(0, 1)), torch.stack([whole(x) for x in xs]))


def test_an_axis_outside_of_another(program):
    _, whole, sample = program
    xs = torch.stack([X, X.sin(), X * 2], 1)  # samples of "i" first
    got = vmap(vmap(sample, axis_name="j"), axis_name="i")(xs)
    assert_same(got, torch.stack([whole(xs[:, k]) for k in range(3)], 1))


def test_two_axes():
    f = lambda x: psum(x, "i") * pmean(x, "j") + axis_index("i") * axis_size("j")
    got = vmap(vmap(f, axis_name="j"), axis_name="i")(X)
    assert_same(got, X.sum(0) * X.mean(1, keepdim=True) + torch.arange(4)[:, None] * 3)


Y = torch.rand(4, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
#: of all axes of a tuple: a function of a sample, and the same of the whole batch
BOTH = ("i", "j")
TOGETHER = {
    "sum": (lambda y: y * psum(y, BOTH), lambda y: y * y.sum((0, 1))),
    "mean": (lambda y: y * pmean({"y": y}, BOTH)["y"], lambda y: y * y.mean((0, 1))),
    "maximum": (lambda y: y * pmax(y, BOTH), lambda y: y * y.amax((0, 1))),
    "minimum": (lambda y: y * pmin(y, BOTH), lambda y: y * y.amin((0, 1))),
    "gathered": (
        lambda y: all_gather(y, BOTH, 1).cumsum(1)[:, 7] * y,
        lambda y: y.flatten(0, 1).cumsum(0)[7] * y,
    ),
    "index": (
        lambda y: y.sin() * axis_index(BOTH) / axis_size(BOTH),
        lambda y: y.sin() * torch.arange(20).view(4, 5, 1) / 20,
    ),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_several_axes_at_once(name):
    of_sample, of_batch = TOGETHER[name]
    nests = (
        vmap(vmap(of_sample, axis_name="j"), axis_name="i"),
        vmap(vmap(of_sample, axis_name="i"), in_dims=1, out_dims=1, axis_name="j"),
    )
    for through in (*nests, jit(nests[0])):
        second = lambda f: jvp(grad(lambda y: f(y).sin().sum()), (Y,), (Y.cos(),))
        assert_same(through(Y), of_batch(Y), rtol=1e-12, atol=1e-12)
        assert_same(second(through), second(of_batch), rtol=1e-9, atol=1e-11)


def test_each_name_of_a_tuple_is_known():
    for names, said in ((("i", "k"), "axis_name='k'"), ((), r"axis_name=\(\)")):
        with pytest.raises(ArgumentError, match=f"no vmap around this call has {said}"):
            vmap(lambda x, names=names: psum(x, names), axis_name="i")(X)


def test_the_innermost_axis_of_a_name_counts():
    got = vmap(vmap(lambda x: psum(x, "i"), axis_name="i"), axis_name="i")(X)
    assert_same(got, X.sum(1, keepdim=True).expand(4, 3))


def test_every_size_has_its_own_numbers():
    f = vmap(lambda x: pmean(x, "i") + axis_size("i") + all_gather(x, "i").sum(), axis_name="i")
    compiled = jit(f)
    for n in (1, 2, 3, 5, 3, 1):
        x = torch.arange(1.0, n + 1)
        for run in (f, compiled):
            assert_same(run(x), (x.mean() + n + x.sum()).expand(n))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.bfloat16, torch.complex64])
def test_dtypes(dtype):
    x = (X > 0.5).to(dtype)
    got = vmap(lambda x: psum(x, "i"), axis_name="i", out_dims=0)(x)
    want = x.long().sum(0) if dtype == torch.bool else x.sum(0, dtype=dtype)
    assert_same(got, want.expand(4, 3))


def test_the_mean_of_bools_is_the_share_that_is_true():
    x = X > 0.5
    assert_same(vmap(lambda x: pmean(x, "i"), axis_name="i", out_dims=None)(x), x.float().mean(0))


def test_a_result_that_is_the_same_for_all_needs_no_dimension():
    assert_same(vmap(lambda x: psum(x, "i"), axis_name="i", out_dims=None)(X), X.sum(0))


def test_a_question_about_a_sum_has_one_answer():
    f = lambda x: x if psum(x, "i").sum() > 0 else -x
    assert_same(vmap(f, axis_name="i")(X), X)


REFUSED = {
    "no vmap": lambda: psum(X, "i"),
    "another name": lambda: vmap(lambda x: psum(x, "i"), axis_name="j")(X),
    "a compiled function inside": lambda: vmap(jit(lambda x: psum(x, "i")), axis_name="i")(X),
    "chunks": lambda: vmap(lambda x: psum(x, "i"), axis_name="i", chunk_size=2)(X),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    with pytest.raises(ArgumentError, match="axis_name"):
        REFUSED[name]()


def test_an_op_that_reaches_no_vmap_is_an_error():
    @aotfunc.custom_vmap
    def f(x):
        return x

    @f.def_vmap
    def _(size, batched, x):
        return psum(x, "i"), True

    with pytest.raises((AotfuncError, RuntimeError)):
        vmap(f, axis_name="i")(X)
