"""grad and grad_and_value: arguments, trees, aux, what is refused, and how plain autograd
continues outside."""

from collections import namedtuple

import pytest
import torch

import aotfunc
from aotfunc import grad, grad_and_value
from aotfunc.errors import AotfuncError
from tests.inputs import f32, f64
from tests.reference import assert_same, grads

Pair = namedtuple("Pair", "left right")


# what may stand where: (function, argnums, arguments, keyword arguments)
# ----------------------------------------------

PROGRAMS = {
    "one": (lambda x: x.sin().sum(), 0, lambda: (f64(3),), {}),
    "second": (lambda x, y: (x * y * y).sum(), 1, lambda: (f64(3), f64(3)), {}),
    "last": (lambda x, y: (x * y * y).sum(), -1, lambda: (f64(3), f64(3)), {}),
    "both": (lambda x, y: (x * y.exp()).sum(), (0, 1), lambda: (f64(3), f64(3)), {}),
    "one in a tuple": (lambda x, y: (x * y.exp()).sum(), (1,), lambda: (f64(3), f64(3)), {}),
    "reversed": (lambda x, y: (x * y.exp()).sum(), (1, 0), lambda: (f64(3), f64(3)), {}),
    "dict": (
        lambda p, x: (p["w"] @ x + p["b"]).tanh().sum(),
        0,
        lambda: ({"w": f64(2, 3), "b": f64(2)}, f64(3)),
        {},
    ),
    "list": (lambda p, x: (p[0] * x + p[1]).sum(), 0, lambda: ([f64(3), f64(3)], f64(3)), {}),
    "namedtuple": (
        lambda p: (p.left * p.right.sin()).sum(),
        0,
        lambda: (Pair(f64(3), f64(3)),),
        {},
    ),
    "nested": (
        lambda p: (p["a"][0] * p["a"][1]["b"]).sum(),
        0,
        lambda: ({"a": (f64(3), {"b": f64(3)})},),
        {},
    ),
    "two trees": (
        lambda p, q: (p["a"] * q[0]).sum(),
        (0, 1),
        lambda: ({"a": f64(3)}, [f64(3)]),
        {},
    ),
    "unused input": (lambda x, y: x.sum(), (0, 1), lambda: (f64(3), f64(2, 2)), {}),
    "unused leaf": (lambda p: p["a"].sum(), 0, lambda: ({"a": f64(3), "b": f64(2)},), {}),
    "constant": (lambda x: torch.ones((), dtype=torch.float64), 0, lambda: (f64(3),), {}),
    "kwargs": (
        lambda x, *, scale, power=2: (scale * x**power).sum(),
        0,
        lambda: (f64(3),),
        {"scale": 3.0, "power": 3},
    ),
    "tensor kwarg": (
        lambda x, *, y: (x * y).sum(),
        0,
        lambda: (f64(3),),
        {"y": torch.arange(3.0, dtype=torch.float64)},
    ),
    "Python leaves beside": (
        lambda x, n, flag, none, s: (
            (x * n).sum() if flag and none is None and s == "a" else x.sum()
        ),
        0,
        lambda: (f64(3), 2, True, None, "a"),
        {},
    ),
    "integer tensor beside": (
        lambda x, i: x[i].sum(),
        0,
        lambda: (f64(3), torch.tensor([2, 0, 2])),
        {},
    ),
    "broadcast": (lambda x, y: (x * y + y).sum(), (0, 1), lambda: (f64(2, 3), f64(3)), {}),
    "scalar": (lambda x: x * x * x, 0, lambda: (f64(),), {}),
    "float32": (lambda x: (x.sin() * x).sum(), 0, lambda: (f32(4),), {}),
    "float16": (
        lambda x: (x.sin() * x).sum(),
        0,
        lambda: (torch.randn(4, dtype=torch.float16),),
        {},
    ),
    "bfloat16": (
        lambda x: (x.sin() * x).sum(),
        0,
        lambda: (torch.randn(4, dtype=torch.bfloat16),),
        {},
    ),
    "complex in": (
        lambda z: (z.sin() * z.conj()).real.sum(),
        0,
        lambda: (torch.randn(3, dtype=torch.complex128),),
        {},
    ),
    "abs of complex": (
        lambda z: (z * z).abs().sum(),
        0,
        lambda: (torch.randn(3, dtype=torch.complex128),),
        {},
    ),
    "to a real and back": (
        lambda x: torch.complex(x, x * x).prod().imag,
        0,
        lambda: (f64(3),),
        {},
    ),
    "dtype changes on the way": (
        lambda x: x.float().sin().double().sum(),
        0,
        lambda: (f64(3),),
        {},
    ),
    "the same tensor twice": (lambda x, y: (x * y * y).sum(), (0, 1), lambda: (_T, _T), {}),
    "empty": (lambda x: x.sum(), 0, lambda: (f64(0, 3),), {}),
    "non-contiguous": (lambda x: (x.t().sin() @ x).sum(), 0, lambda: (f64(3, 4).t(),), {}),
    "Parameter": (lambda w: (w * w).sum(), 0, lambda: (torch.nn.Parameter(f64(3)),), {}),
}
_T = torch.linspace(-1, 1, 3, dtype=torch.float64)


@pytest.mark.parametrize("name", PROGRAMS)
def test_equals_autograd(name):
    f, argnums, make, kwargs = PROGRAMS[name]
    args = make()
    expected = grads(f, argnums)(*args, **kwargs)
    assert_same(grad(f, argnums=argnums)(*args, **kwargs), expected)
    assert_same(
        grad_and_value(f, argnums=argnums)(*args, **kwargs), (expected, f(*args, **kwargs))
    )


def test_has_aux():
    f = lambda x: ((x * x).sum(), {"twice": 2 * x, "sum": [x.sum()]})
    x = f64(3)
    aux = {"twice": 2 * x, "sum": [x.sum()]}
    assert_same(grad(f, has_aux=True)(x), (2 * x, aux))
    assert_same(grad_and_value(f, has_aux=True)(x), (2 * x, ((x * x).sum(), aux)))


def test_aux_need_not_be_tensors():
    f = lambda x: (x.sum(), {"steps": 3, "name": "a", "none": None, "t": x})
    x = f64(3)
    assert_same(grad(f, has_aux=True)(x)[1], {"steps": 3, "name": "a", "none": None, "t": x})


def test_aux_carries_no_derivative_of_the_inner_level():
    x = f64(3)
    _, aux = grad(lambda x: (x.sum(), x.sin()), has_aux=True)(x)
    assert not aux.requires_grad


def test_f_runs_once_per_call():
    calls = []

    def f(x):
        calls.append(1)
        return x.sin().sum()

    x = f64(3)
    for n in range(1, 4):
        assert_same(grad(f)(x), x.cos())
        assert len(calls) == n


def test_never_a_stale_result():
    state = {"scale": 2.0, "w": torch.ones(3, dtype=torch.float64)}
    f = grad(lambda x: (x * state["w"] * state["scale"]).sum())
    x = f64(3)
    assert_same(f(x), torch.full_like(x, 2.0))
    state["scale"] = -0.5
    assert_same(f(x), torch.full_like(x, -0.5))
    state["w"].mul_(4)
    assert_same(f(x), torch.full_like(x, -2.0))
    state["w"] = torch.zeros(3, dtype=torch.float64)
    assert_same(f(x), torch.zeros_like(x))


def test_shapes_and_dtypes_change_between_calls():
    f = grad(lambda x: (x**3).sum())
    for x in (f64(3), f64(4, 2), f64(3).float(), f64(3).t(), f64(5)):
        assert_same(f(x), 3 * x**2)


# plain autograd outside
# ----------------------------------------------------------------------------------------------


def test_backward_continues_through_the_result():
    x = f64(3).requires_grad_()
    (g,) = torch.autograd.grad(grad(lambda x: x.sin().sum())(x).sum(), x)
    assert_same(g, -x.sin())


def test_backward_to_the_third_order():
    x = f64(3).requires_grad_()
    first = grad(lambda x: (x**5).sum())(x)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    (third,) = torch.autograd.grad(second.sum(), x)
    assert_same(third, 60 * x**2)


def test_backward_reaches_closed_over_tensors():
    w, x = f64(3).requires_grad_(), f64(3)
    g = grad(lambda x: (w * x * x).sum())(x)
    assert_same(g, 2 * w * x)
    (gw,) = torch.autograd.grad(g.sum(), w)
    assert_same(gw, 2 * x)


def test_nothing_requires_grad_when_nothing_did():
    assert not grad(lambda x: x.sin().sum())(f64(3)).requires_grad


def test_no_grad_around_the_transform_does_not_cut():
    x = f64(3)
    with torch.no_grad():
        assert_same(grad(lambda x: x.sin().sum())(x), x.cos())


def test_inference_mode_around_the_transform():
    x = f64(3)
    with torch.inference_mode():
        g = grad(lambda x: x.sin().sum())(x)
    assert torch.equal(g, x.cos())


def test_leaves_grad_attributes_alone():
    x = f64(3).requires_grad_()
    grad(lambda x: x.sin().sum())(x)
    assert x.grad is None and x.requires_grad


# refused
# -------------------------------------------------------------------------------------------------

REFUSED = {
    "int leaf": (
        lambda x: x.sum().double(),
        0,
        lambda: (torch.arange(3),),
        "int64|integer|floating",
    ),
    "bool leaf": (
        lambda x: x.sum().double(),
        0,
        lambda: (torch.ones(3, dtype=torch.bool),),
        "bool|floating",
    ),
    "leaf in a tree": (
        lambda p: p["w"].sum(),
        0,
        lambda: ({"w": f64(2), "steps": torch.tensor(3)},),
        r"p\['steps'\] \(argument 0\)",
    ),
    "None": (lambda x, y: x.sum(), 1, lambda: (f64(3), None), "None|tensor"),
    "Python number": (lambda x, y: (x * y).sum(), 1, lambda: (f64(3), 2.0), "float|tensor"),
    "Python leaf in a tree": (
        lambda p: (p["w"] * p["n"]).sum(),
        0,
        lambda: ({"w": f64(3), "n": 2},),
        "n",
    ),
    "vector output": (lambda x: x, 0, lambda: (f64(3),), r"3"),
    "shape [1]": (lambda x: x.sum().reshape(1), 0, lambda: (f64(3),), r"1"),
    "complex output": (
        lambda x: x.sum(),
        0,
        lambda: (torch.randn(3, dtype=torch.complex128),),
        "complex",
    ),
    "number output": (lambda x: 1.0, 0, lambda: (f64(3),), "tensor|float"),
    "None output": (lambda x: None, 0, lambda: (f64(3),), "tensor|None"),
    "tuple output": (lambda x: (x.sum(), x), 0, lambda: (f64(3),), "has_aux|tuple|tensor"),
    "argnums out of range": (lambda x: x.sum(), 1, lambda: (f64(3),), "argnum|argument"),
    "empty argnums": (lambda x: x.sum(), (), lambda: (f64(3),), "argnums"),
    "argnums twice": (
        lambda x, y: x.sum(),
        (0, 0),
        lambda: (f64(3), f64(3)),
        "argnums|unique|duplicate|twice",
    ),
    "argnums of another type": (lambda x: x.sum(), "x", lambda: (f64(3),), "argnums"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name):
    f, argnums, make, reason = REFUSED[name]
    with pytest.raises(AotfuncError, match=reason):
        grad(f, argnums=argnums)(*make())


def test_has_aux_needs_a_pair():
    with pytest.raises(AotfuncError):
        grad(lambda x: x.sum(), has_aux=True)(f64(3))


def test_an_error_of_f_comes_through_unchanged():
    def f(x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        grad(f)(f64(3))
    assert_same(
        grad(lambda x: x.sum())(f64(3)), torch.ones(3, dtype=torch.float64)
    )  # and nothing is left behind


def test_a_shape_error_of_f_is_torchs():
    with pytest.raises(RuntimeError):
        grad(lambda x: (x @ x.new_zeros(7)).sum())(f64(3))


# a nested grad never confuses perturbations
# --------------------------------------------------------------------------


def test_perturbation_confusion():
    one = torch.ones((), dtype=torch.float64)
    # d/dx x * d/dy (x + y) is 1, not 2
    assert_same(grad(lambda x: x * grad(lambda y: x + y)(one))(one), one)
    # d/dx x * d/dy (x * y) is 2 x
    assert_same(grad(lambda x: x * grad(lambda y: x * y)(one))(3 * one), 6 * one)


def test_three_levels_with_a_grand_outer_value():
    x = f64()
    f = lambda x: grad(lambda y: grad(lambda z: x**2 * y**3 * z**4)(y))(x)
    # inner: 4 x^2 y^6; middle: 24 x^2 y^5 at y = x: 24 x^7
    assert_same(f(x), 24 * x**7)
    assert_same(grad(f)(x), 168 * x**6)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_repeated_grad(order):
    f, x = (lambda x: x**6), f64()
    factor = 1
    for k in range(order):
        f = grad(f)
        factor *= 6 - k
    assert_same(f(x), factor * x ** (6 - order))


def test_jit_of_the_same_function_agrees():
    x = f64(3)
    assert_same(aotfunc.jit(grad(lambda x: (x.sin() * x).sum()))(x), x.cos() * x + x.sin())
