"""Results own their memory, and tidying changes no bit: NaN, infinities and signed zeros
included."""

import pytest
import torch

import aotfunc
from aotfunc import grad, jacrev, jvp, make_fx, vjp, vmap
from tests.reference import assert_same, grads


def storage(x):
    return x.untyped_storage().data_ptr()


# aliasing
# -------------------------------------------------------------------------------------------------

FRESH = {
    "x*x/2": lambda x: (x * x).sum() / 2,  # the gradient tidies to x itself
    "sum": lambda x: x.sum(),
    "dot with itself": lambda x: torch.dot(x, x) / 2,
}


@pytest.mark.parametrize("name", FRESH)
def test_a_gradient_never_aliases_the_input(name):
    x = torch.randn(3)
    before = x.clone()
    g = grad(FRESH[name])(x)
    assert storage(g) != storage(x)
    g = g.clone() if g.stride() == (0,) else g
    g.add_(1)
    assert_same(x, before)


def test_gradients_do_not_alias_each_other():
    x, y = torch.randn(2, 3).unbind()
    gx, gy = grad(lambda x, y: ((x + y) ** 2).sum(), argnums=(0, 1))(x.clone(), y.clone())
    assert storage(gx) != storage(gy)


def test_a_gradient_does_not_alias_aux_or_value():
    x = torch.randn(())
    g, (value, aux) = aotfunc.grad_and_value(lambda x: (x * x / 2, x * 1), has_aux=True)(x)
    assert len({storage(t) for t in (g, value, aux, x)}) == 4


def test_a_cotangent_is_not_handed_back():
    x, v = torch.randn(2, 3).unbind()
    x, v = x.clone(), v.clone()
    (g,) = vjp(lambda x: x + 1, x)[1](v)
    assert_same(g, v)
    assert storage(g) != storage(v)


def test_a_tangent_is_not_handed_back():
    x, v = torch.randn(3), torch.randn(3)
    _, t = jvp(lambda x: x + 1, (x,), (v,))
    assert_same(t, v)
    assert storage(t) != storage(v)


def test_a_constant_of_f_is_not_handed_out():
    w = torch.randn(3)
    g = grad(lambda x: (x * w).sum())(torch.randn(3))
    assert_same(g, w)
    assert storage(g) != storage(w)


def test_vmap_of_a_constant_is_not_the_constant():
    w = torch.randn(3)
    out = vmap(lambda x: w * 1)(torch.randn(2, 3))
    assert storage(out) != storage(w)


def test_successive_results_are_independent():
    x = torch.randn(3)
    f = grad(lambda x: (x * x).sum())
    first = f(x)
    kept = first.clone()
    f(x + 1)
    assert_same(first, kept)


def test_a_jacobian_of_the_identity_may_be_written():
    x = torch.randn(3)
    j = jacrev(lambda x: x)(x)
    j[0, 0] = 5
    assert_same(jacrev(lambda x: x)(x), torch.eye(3))


def test_a_factory_inside_f_is_fresh_on_each_run():
    def f(x):
        total = torch.tensor(0.0)
        total += x.sum()
        return total

    gm = make_fx(f)(torch.ones(3))
    for _ in range(3):
        assert_same(gm(torch.ones(3)), torch.tensor(3.0))


# bits
# -------------------------------------------------------------------------------------------------

SPECIAL = torch.tensor(
    [
        0.0,
        -0.0,
        1.0,
        -1.0,
        float("inf"),
        -float("inf"),
        float("nan"),
        5e-324,
        -5e-324,
        1e308,
        -1e308,
        0.1,
        3.0,
    ],
    dtype=torch.float64,
)

EXPRESSIONS = {
    "x*1": lambda x: x * 1,
    "1*x": lambda x: 1 * x,
    "x*0": lambda x: x * 0,
    "x*-0.0": lambda x: x * -0.0,
    "x*-1": lambda x: x * -1,
    "x-x": lambda x: x - x,
    "x+0": lambda x: x + 0,
    "x+0.0": lambda x: x + 0.0,
    "x+-0.0": lambda x: x + -0.0,
    "x-0.0": lambda x: x - 0.0,
    "0-x": lambda x: 0 - x,
    "0*x+x": lambda x: 0 * x + x,
    "x/1": lambda x: x / 1,
    "x/x": lambda x: x / x,
    "x/2": lambda x: x / 2,
    "x*0.5*2": lambda x: x * 0.5 * 2,
    "x/3*3": lambda x: x / 3 * 3,
    "x*10/10": lambda x: x * 10 / 10,
    "(x+1)-1": lambda x: (x + 1) - 1,
    "(x*3)*(1/3)": lambda x: (x * 3) * (1 / 3),
    "x**1": lambda x: x**1,
    "x**0": lambda x: x**0,
    "x**2": lambda x: x**2,
    "x**3": lambda x: x**3,
    "x**0.5": lambda x: x**0.5,
    "x**-1": lambda x: x**-1,
    "--x": lambda x: x.neg().neg(),
    "abs abs": lambda x: x.abs().abs(),
    "neg abs": lambda x: (-x).abs(),
    "exp log": lambda x: x.exp().log(),
    "sqrt square": lambda x: x.sqrt() ** 2,
    "relu relu": lambda x: x.relu().relu(),
    "max self": lambda x: torch.maximum(x, x),
    "where self": lambda x: torch.where(x > 0, x, x),
    "x+x": lambda x: x + x,
    "sum of products": lambda x: x * 2 + x * 3,
    "reciprocal twice": lambda x: x.reciprocal().reciprocal(),
    "x*y/y": lambda x: x * (x + 1) / (x + 1),
    "zeros*x": lambda x: torch.zeros_like(x) * x,
    "x+zeros": lambda x: x + torch.zeros_like(x),
    "zeros-x": lambda x: torch.zeros_like(x) - x,
    "x*ones": lambda x: x * torch.ones_like(x),
    "add alpha 0": lambda x: torch.add(x, x.exp(), alpha=0),
    "clamp": lambda x: x.clamp(-1, 1).clamp(-2, 2),
    "double cast": lambda x: x.float().double(),
    "float of float": lambda x: x.to(torch.float64).to(torch.float64),
    "int cast": lambda x: x.nan_to_num(0, 0, 0).clamp(-9, 9).long().double(),
    "sign": lambda x: x.sign() * x.abs(),
    "copysign": lambda x: torch.copysign(torch.ones_like(x), x),
    "sum of one": lambda x: x[:, None].sum(1),
    "mul 1 int": lambda x: x * torch.ones((), dtype=torch.int64),
}


def bits_equal(a, b):
    same = (a.view(torch.int64) == b.view(torch.int64)) | (a.isnan() & b.isnan())
    assert same.all(), (
        f"at {SPECIAL[~same].tolist()}: {a[~same].tolist()}, eager {b[~same].tolist()}"
    )


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_captured_to_the_bit(name):
    f = EXPRESSIONS[name]
    bits_equal(make_fx(f)(SPECIAL)(SPECIAL), f(SPECIAL))


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_jitted_and_vmapped_to_the_bit(name):
    f = EXPRESSIONS[name]
    bits_equal(aotfunc.jit(f, exact=True)(SPECIAL), f(SPECIAL))
    if name != "sum of one":
        bits_equal(vmap(f)(SPECIAL), f(SPECIAL))


# abs and its kin: autograd multiplies by sign(x); max, where, clamp: by masks; all of that is part
# of the formula
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_gradient_as_autograds(name):
    """Equal values with NaN and inf in the same places; the sign of a zero may follow another
    legal order of sums."""
    f = EXPRESSIONS[name]
    got = grad(lambda x: f(x).sum())(SPECIAL)
    expected = grads(lambda x: f(x).sum())(SPECIAL)
    assert_same(got, expected, rtol=1e-14, atol=0)


def test_literals_are_told_apart_by_their_bits():
    x = torch.ones(3, dtype=torch.float64)
    f = {"+": lambda x: x * 0.0, "-": lambda x: x * -0.0}
    for _ in range(2):
        for sign in "+-":
            assert torch.signbit(aotfunc.jit(f[sign])(x)).all() == (sign == "-")
            g = grad(lambda x, s=sign: f[s](x).sum())(x)
            assert torch.signbit(g).all() == (sign == "-")


def test_literals_are_told_apart_by_their_type():
    i = torch.arange(3)
    run = lambda n: vmap(lambda x: x * n)(i)
    for n in (1, 1.0, True, 1, True, 1.0, 0, 0.0, False, -0.0):
        assert_same(run(n), i * n)
    x = torch.arange(3.0).requires_grad_()
    for n in (2, 2.0, 3, 3.0):
        assert_same(grad(lambda x, n=n: (x**n).sum())(x), n * x.detach() ** (n - 1))


def test_default_dtype_is_part_of_every_key():
    i = torch.arange(3)
    run = lambda: vmap(lambda x: x * 2.5)(i)
    jitted = aotfunc.jit(lambda x: x * 2.5)
    assert run().dtype == jitted(i).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert run().dtype == jitted(i).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert run().dtype == jitted(i).dtype == torch.float32


def test_nan_constants():
    f = lambda x: torch.where(x > 0, x, float("nan"))
    x = torch.tensor([1.0, -1.0], dtype=torch.float64)
    for _ in range(2):
        bits_equal_nan = aotfunc.jit(f)(x)
        assert bits_equal_nan.isnan().tolist() == [False, True]
        assert_same(
            grad(lambda x: f(x).nansum())(x), torch.tensor([1.0, 0.0], dtype=torch.float64)
        )


# masks of bytes, which are deprecated
# -------------------------------------------------------------------------------


def written(c, x):
    y = x.clone()
    y[c] = x[:2] * 3
    return y


BYTES = {
    "where": lambda c, x: torch.where(c, x, x * 2),
    "where, a number": lambda c, x: torch.where(c, 1.0, x),
    "where, of it": lambda c, x: x.where(c, x * 2),
    "index": lambda c, x: x[c] * 2,
    "index among others": lambda c, x: torch.stack([x, x * 2])[:, c],
    "write": written,
    "index_put": lambda c, x: x.index_put((c,), x[:1] * 2, accumulate=True),
}


@pytest.mark.filterwarnings("ignore:.*uint8")
@pytest.mark.parametrize("name", BYTES)
def test_masks_of_bytes(name):
    c, x = torch.tensor([1, 0, 1], dtype=torch.uint8), torch.tensor([1.0, 2.0, 4.0])
    f = lambda x: (BYTES[name](c, x) ** 2).sum()
    want = grads(f)(x)
    assert_same(grad(f)(x), want)
    assert_same(torch.stack([jvp(f, (x,), (t,))[1] for t in torch.eye(3)]), want)
    assert_same(vmap(grad(f))(torch.stack([x, x])), torch.stack([want, want]))
    if not name.startswith("index"):  # the shape of what is selected depends on the mask
        assert_same(aotfunc.jit(f)(x), f(x))
        assert_same(aotfunc.jit(grad(lambda x, c: (BYTES[name](c, x) ** 2).sum()))(x, c), want)


# names of arguments
# -------------------------------------------------------------------------------------------------

OTHERS = (
    "torch",
    "inf",
    "nan",
    "device",
    "self",
    "fx_pytree",
    "pytree",
    "NoneType",
    "run",
    "f0",
    "c0",
    "c1",
    "c0_",
)


@pytest.mark.parametrize("name", OTHERS)
def test_an_argument_has_a_name_of_the_generated_code(name):
    f = eval(
        f"lambda x, {name}: at.where(x > {name}, at.inf, x).to(at.float64) * {name}", {"at": torch}
    )
    x, y = torch.tensor([1.0, 5.0, -1.0]), torch.tensor([2.0, 3.0, -2.0])
    for g in (vmap(f), aotfunc.functionalize(f), aotfunc.jit(f), make_fx(f)(x, y)):
        assert_same(g(x, y), f(x, y))
    h = lambda *xs: f(*xs).nan_to_num(posinf=7.0).sum()
    assert_same(aotfunc.grad(h, argnums=(0, 1))(x, y), grads(h, (0, 1))(x, y))
