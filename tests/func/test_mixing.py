"""Our transforms inside PyTorch's and the reverse: right, or an error of ours; never a silent
wrong number."""

import itertools

import pytest
import torch
import torch.autograd.forward_ad as fwAD

import aotfunc
from aotfunc import grad, jacrev, jvp, make_fx, vmap
from aotfunc.errors import AotfuncError, CaptureError
from tests.inputs import f64
from tests.reference import assert_same


def cube(x):
    return (x**3).sum()


def right_or_error(run, expected):
    """Our own error is an answer, too; anything else must be the right value."""
    try:
        out = run()
    except AotfuncError:
        return
    assert_same(out, expected)


# torch.func inside ours
# ----------------------------------------------------------------------------------------------

THEIRS_INSIDE = {
    "vmap(grad)": lambda x: vmap(torch.func.grad(lambda y: y**3))(x),
    "grad(grad)": lambda x: grad(lambda x: torch.func.grad(cube)(x).sum() / 2)(x) * x,
    "grad(vmap)": lambda x: grad(lambda x: torch.func.vmap(lambda y: y**3)(x).sum())(x),
    "jvp(grad)": lambda x: jvp(torch.func.grad(cube), (x,), (x,))[1] / 2,
    "grad(vjp)": lambda x: grad(lambda x: torch.func.vjp(torch.sin, x)[0].sum() * 0 + cube(x))(x),
    "jacrev(jvp)": lambda x: jacrev(
        lambda x: torch.func.jvp(lambda y: y**3, (x,), (torch.ones_like(x),))[0]
    )(x).sum(0),
    "grad(jacrev)": lambda x: grad(lambda x: torch.func.jacrev(cube)(x).sum() / 2)(x) * x,
    "grad(hessian)": lambda x: grad(lambda x: torch.func.hessian(cube)(x).sum() / 2)(x) * x**2,
    "jit(grad)": lambda x: aotfunc.jit(torch.func.grad(cube))(x),
    "make_fx(grad)": lambda x: make_fx(torch.func.grad(cube))(x)(x),
    "make_fx(vmap(grad))": lambda x: make_fx(torch.func.vmap(torch.func.grad(lambda y: y**3)))(x)(
        x
    ),
}

WITH_A_NUMBER = {
    "x * 3.5": lambda x: x * 3.5,
    "2 - x": lambda x: 2 - x,
    "x - 2": lambda x: x - 2,
    "x / 2": lambda x: x / 2,
    "2 / x": lambda x: 2 / x,
    "x // 2": lambda x: x // 2,
    "alpha": lambda x: torch.add(x, 2, alpha=3),
    "lerp": lambda x: torch.lerp(x, x * 2, 0.5),
    "integers": lambda x: x.long() * 2 + 1,
    "complex": lambda x: (x * (1 + 2j)).real,
    "in place": lambda x: x.clone().mul_(3),
}


@pytest.mark.parametrize("around", [aotfunc.jit, vmap, lambda f: lambda x: make_fx(f)(x)(x)])
@pytest.mark.parametrize("name", WITH_A_NUMBER)
def test_numbers_beside_scalars_inside_their_vmap(name, around):
    f, x = torch.func.vmap(WITH_A_NUMBER[name]), f64(2, 3)
    if around is vmap:
        assert_same(vmap(f)(x), WITH_A_NUMBER[name](x))
    else:
        assert_same(around(f)(x[0]), f(x[0]))


def test_a_changing_number_beside_scalars_inside_their_vmap():
    f, x = lambda x, s: torch.func.vmap(lambda y: y * s + s)(x), f64(3)
    compiled = aotfunc.jit(f)
    for s in (2.0, 3.5, 2, 4.0, True, 1 + 1j):
        assert_same(compiled(x, s), f(x, s))


# ours inside torch.func
# ----------------------------------------------------------------------------------------------

OURS_INSIDE = {
    "vmap(grad)": lambda x: torch.func.vmap(grad(lambda y: y**3))(x),
    "grad(grad)": lambda x: torch.func.grad(lambda x: grad(cube)(x).sum() / 2)(x) * x,
    "grad(vmap)": lambda x: torch.func.grad(lambda x: vmap(lambda y: y**3)(x).sum())(x),
    "jvp(grad)": lambda x: torch.func.jvp(grad(cube), (x,), (x,))[1] / 2,
    "jacrev(vmap)": lambda x: torch.func.jacrev(vmap(lambda y: y**3))(x).sum(0),
    "grad(jit)": lambda x: torch.func.grad(aotfunc.jit(cube))(x),
    "vmap(jit)": lambda x: torch.func.vmap(aotfunc.jit(lambda y: 3 * y**2))(x),
    "grad(aot_function)": lambda x: torch.func.grad(aotfunc.aot_function(cube, "eager"))(x),
    "theirs(ours(theirs))": lambda x: torch.func.vmap(grad(torch.func.grad(lambda y: y**4 / 4)))(
        x
    ),
}


def linearized(x):
    """Return the derivative of the product of ``sin x`` and ``2 x`` along ``(1, x)``."""

    def product(a, rest):
        return {"product": a.sin() * rest["b"]}

    _, push = torch.func.linearize(product, x, {"b": 2 * x})
    return push(torch.ones_like(x), {"b": x})["product"]


def sloped(x):
    """Return the derivative that :func:`linearized` returns, by hand."""
    return 2 * x * x.cos() + x * x.sin()


@pytest.mark.parametrize("around", [aotfunc.jit, vmap, lambda f: lambda x: make_fx(f)(x)(x)])
def test_their_linearize_inside_ours(around):
    x = f64(3)
    assert_same(around(linearized)(x), sloped(x))
    slopes = torch.autograd.functional.jacobian(sloped, x)
    for jacobian in (jacrev, aotfunc.jacfwd):
        assert_same(jacobian(around(linearized))(x), slopes)
    with pytest.raises(CaptureError, match="use aotfunc's transform there"):
        around(lambda x: torch.func.grad(lambda x: linearized(x).sum())(x))(x)


@pytest.mark.parametrize("name", THEIRS_INSIDE)
def test_theirs_inside_ours(name):
    x = f64(3)
    assert_same(THEIRS_INSIDE[name](x), 3 * x**2)


@pytest.mark.parametrize("name", OURS_INSIDE)
def test_ours_inside_theirs(name):
    x = f64(3)
    right_or_error(lambda: OURS_INSIDE[name](x), 3 * x**2)


class Cube(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return g * 3 * ctx.saved_tensors[0] ** 2


@pytest.mark.parametrize("around", [grad, aotfunc.functionalize, aotfunc.jit])
def test_ours_inside_theirs_inside_ours(around):
    """The derivative was lost, without a word."""
    x, known = f64(3), aotfunc.jit(lambda x: x**3, backend="eager")
    known(x), known(x[0])
    calls = {
        "a call": known,
        "a Function": Cube.apply,
        "a transform": lambda x: vmap(lambda x: x**3)(x),
        "a branch": lambda x: aotfunc.cond(x.sum() < 99, lambda x: x**3, torch.sin, x),
    }
    theirs = (torch.func.vmap, lambda f: torch.func.grad(lambda x: f(x).sum()))
    for f, transform in itertools.product(calls.values(), theirs):
        inner = transform(f)
        with pytest.raises(CaptureError, match="its derivative would be lost; use aotfunc's"):
            around(lambda x, inner=inner: inner(x[None])[0].sum())(x)


# a function of ours that closes over a value of torch.func's, which must not lose its derivative
CLOSING = {
    "grad": lambda a: grad(lambda x: (x * x * a).sum())(a.sin()),
    "a call": lambda a: grad(lambda x: torch.dot(x * x, a))(a.sin()),
    "values of its own": lambda a: grad(lambda x: (x * a.exp().clone()).sum())(a.sin()),
    "a list": lambda a: grad(lambda x: torch.stack([x, a, a * x]).prod())(a.sin()),
    "vmap": lambda a: vmap(lambda x: x * a)(torch.stack([a, a * a])).sum(0),
    "jvp": lambda a: jvp(lambda x: x * x * a, (a.sin(),), (a.cos(),))[1],
    "jacrev": lambda a: jacrev(lambda x: x * x * a)(a.sin()).sum(0),
    "jit": lambda a: aotfunc.jit(lambda x: x * a)(a.sin()),
    "aot_function": lambda a: aotfunc.aot_function(lambda x: x * a, "eager")(a.sin()),
    "nested": lambda a: grad(lambda x: grad(lambda y: (y**3 * a * x).sum())(x).sum())(a.sin()),
    "returned": lambda a: vmap(lambda x: (x, a), out_dims=(0, None))(a)[1] * a,
    "scan": lambda a: aotfunc.scan(lambda c, x: (c * a, c), a.sin(), torch.ones(2))[0],
}
AROUND = {
    "grad": lambda f: torch.func.grad(lambda a: f(a).sum()),
    "grad(grad)": lambda f: torch.func.grad(
        lambda a: torch.func.grad(lambda a: f(a).sum())(a).square().sum()
    ),
    "jvp": lambda f: lambda a: torch.func.jvp(f, (a,), (a,))[1],
    "vmap": lambda f: lambda a: torch.func.vmap(f)(torch.stack([a, 2 * a])),
    "vmap(grad)": lambda f: (
        lambda a: torch.func.vmap(torch.func.grad(lambda a: f(a).sum()))(torch.stack([a, 2 * a]))
    ),
    "jacrev": lambda f: torch.func.jacrev(f),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", CLOSING)
def test_ours_close_over_values_of_theirs(name, around):
    f, a = CLOSING[name], f64(3)
    with aotfunc.patch_torch_func():
        expected = AROUND[around](f)(a)
    right_or_error(lambda: AROUND[around](f)(a), expected)
    if around in ("grad", "vmap"):
        assert_same(AROUND[around](f)(a), expected)


def test_ours_inside_functionalize_of_theirs():
    x = f64(3)
    right_or_error(lambda: torch.func.functionalize(grad(cube))(x), 3 * x**2)


# other modes
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", ["grad", "vmap", "jit"])
def test_under_a_dual_level(transform):
    run = {
        "grad": grad(cube),
        "vmap": vmap(lambda y: 3 * y**2),
        "jit": aotfunc.jit(lambda y: 3 * y**2),
    }[transform]
    x, t = f64(3), f64(3)
    with fwAD.dual_level():
        dual = fwAD.make_dual(x, t)
        try:
            out = fwAD.unpack_dual(run(dual))
        except AotfuncError:
            return
        assert_same(out.primal, 3 * x**2)
        assert out.tangent is not None, "the tangent was dropped in silence"
        assert_same(out.tangent, 6 * x * t)


@pytest.mark.parametrize("name", ["grad", "vmap", "jvp", "jit"])
def test_inside_torch_compile(name):
    body = {
        "grad": grad(cube),
        "vmap": vmap(lambda y: 3 * y**2),
        "jvp": lambda x: jvp(lambda y: y**3, (x,), (torch.ones_like(x),))[1],
        "jit": aotfunc.jit(lambda y: 3 * y**2),
    }[name]
    torch._dynamo.reset()
    x = f64(3)
    compiled = torch.compile(lambda x: body(x.clone()) + 0, backend="eager")
    right_or_error(lambda: compiled(x), 3 * x**2)
    right_or_error(lambda: compiled(2 * x), 12 * x**2)


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        x = torch.randn(3, 4)
        try:
            out = grad(cube)(x)
        except AotfuncError:
            return
        assert isinstance(out, FakeTensor) and out.shape == (3, 4)


def test_meta_tensors():
    x = torch.randn(3, 4, device="meta")
    try:
        out = grad(cube)(x)
    except AotfuncError:
        return
    assert out.device.type == "meta" and out.shape == (3, 4)


# tensors that are not plain
# ------------------------------------------------------------------------------------------


class Tagged(torch.Tensor):
    """A subclass that the package does not know."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return super().__torch_dispatch__(func, types, args, kwargs)


UNKNOWN = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "subclass": lambda: torch.Tensor._make_subclass(Tagged, torch.ones(3)),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor.*deprecated")
@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_kinds_of_tensors_are_refused(name):
    x = UNKNOWN[name]()
    for run in (lambda: grad(lambda x: (x * 2).sum())(x), lambda: make_fx(lambda x: x * 2)(x)):
        with pytest.raises(AotfuncError):
            run()


def test_a_sparse_tensor_closed_over_is_refused_or_right():
    s = torch.eye(3).to_sparse()
    right_or_error(
        lambda: grad(lambda x: torch.sparse.mm(s, x).sum())(torch.ones(3, 2)), torch.ones(3, 2)
    )


def test_a_parameter_is_a_tensor():
    w = torch.nn.Parameter(f64(3))
    assert_same(grad(cube)(w), 3 * w.detach() ** 2)
    assert_same(vmap(lambda y: y**2)(w), w.detach() ** 2)
    assert_same(make_fx(lambda w: w * 2)(w)(w), w.detach() * 2)


def test_a_conjugate_view():
    z = torch.randn(3, dtype=torch.complex128)
    f = lambda z: (z * z).real.sum()
    zc = z.conj()
    leaf = zc.clone().resolve_conj().requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf), leaf)
    assert_same(grad(f)(zc).resolve_conj(), expected)
    assert_same(vmap(lambda z: z * 2)(zc).resolve_conj(), 2 * zc.resolve_conj())


def test_a_subprocess_of_threads():
    """Transforms used from several threads at once do not disturb each other."""
    from concurrent.futures import ThreadPoolExecutor

    x = f64(8, 3)

    def work(i):
        row = x[i]
        results = []
        for _ in range(10):
            results.append(grad(lambda y: (y**3 * i).sum())(row))
        return torch.stack(results)

    with ThreadPoolExecutor(4) as pool:
        out = list(pool.map(work, range(8)))
    for i, got in enumerate(out):
        assert_same(got, (3 * x[i] ** 2 * i).expand(10, 3).clone())


def test_other_threads_keep_their_eager_torch():
    import threading

    seen = []
    ready, done = threading.Event(), threading.Event()

    def other():
        ready.wait(10)
        seen.append(type(torch.ones(3) * 2))
        done.set()

    thread = threading.Thread(target=other)
    thread.start()

    def f(x):
        ready.set()
        done.wait(10)
        return (x * x).sum()

    x = f64(3)
    assert_same(grad(f)(x), 2 * x)
    thread.join()
    assert seen == [torch.Tensor]
