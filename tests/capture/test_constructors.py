"""``torch.tensor`` of lists that hold traced numbers: eager's value and dtype, and no derivative
through it."""

import pytest
import torch

from aotfunc import functionalize, grad, jit, jvp, make_fx, vmap

COUNT = torch.tensor(3)
FORMS = {
    "matrix": lambda x: torch.tensor([[x[0], -x[1]], [x[1], x[0]]]),
    "tuple": lambda x: torch.tensor((x[0], 2.0, True)),
    "dtype": lambda x: torch.tensor([x[0], 1], dtype=torch.float64),
    "integer dtype": lambda x: torch.tensor([x[0] > 0, 1.5], dtype=torch.int64),
    "as_tensor": lambda x: torch.as_tensor([[x[0]], [x[1]]]),
    "asarray": lambda x: torch.asarray([x[1], 1]),
    "new_tensor": lambda x: x.new_tensor([x[0], 1]),
    "one element": lambda x: torch.tensor([x[:1], x[1]]),
    "outside": lambda x: torch.tensor([COUNT, 2]) * x,
    "outside part": lambda x: torch.tensor([COUNT.view(1)[0], x[0]]),
    "mixed dtypes": lambda x: torch.tensor([COUNT, x[0].double(), 1]),
    "comparison": lambda x: torch.tensor([x[0] > 0, x[1] > 0]),
}
CALLS = {
    "jit": lambda f, x: jit(f)(x),
    "make_fx": lambda f, x: make_fx(f)(x)(x),
    "functionalize": lambda f, x: functionalize(f)(x),
    "jvp": lambda f, x: jvp(f, (x,), (x,))[0],
    "vmap": lambda f, x: vmap(f)(x[None])[0],
    "grad": lambda f, x: grad(lambda x: (x.sum(), f(x)), has_aux=True)(x)[1],
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("form", FORMS)
def test_value_and_dtype(form, call):
    x = torch.tensor([0.5, -1.25])
    want = FORMS[form](x)
    got = CALLS[call](FORMS[form], x)
    assert got.dtype == want.dtype and torch.equal(got, want)


def test_each_sample_has_its_own():
    x = torch.randn(4, 2)
    got = vmap(lambda x: torch.tensor([x[1], x[0]]))(x)
    assert torch.equal(got, x.flip(1))


def test_a_compiled_function_follows_its_inputs():
    compiled = jit(lambda x, c: torch.tensor([[x[0], c], [x[1], 1.0]]))
    for k in range(3):
        x, c = torch.randn(2), torch.tensor(float(k))
        assert torch.equal(compiled(x, c), torch.stack([x[0], c, x[1], torch.ones(())]).view(2, 2))


def test_it_cuts_the_derivative():
    x = torch.tensor([1.0, 2.0])
    assert torch.equal(grad(lambda x: (torch.tensor([x[0], x[1]]) * x).sum())(x), x)
    assert torch.equal(jvp(lambda x: torch.tensor([x[0], x[1]]), (x,), (x,))[1], torch.zeros(2))


def test_torch_is_as_it_was():
    before = torch.tensor, torch.as_tensor, torch.asarray
    jit(lambda x: torch.tensor([x[0]]))(torch.ones(2))
    assert (torch.tensor, torch.as_tensor, torch.asarray) == before


@pytest.mark.parametrize("call", ["jit", "make_fx"])
def test_more_than_one_element(call):
    with pytest.raises(ValueError, match="one element"):
        CALLS[call](lambda x: torch.tensor([x]), torch.ones(2))


@pytest.mark.parametrize("call", ["jit", "make_fx"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_a_dtype_that_would_lose_the_number(dtype, call):
    f = lambda x: torch.tensor([x[0]], dtype=dtype)
    with pytest.raises(TypeError):
        f(torch.ones(2))
    with pytest.raises(TypeError, match="does not become"):
        CALLS[call](f, torch.ones(2))


@pytest.mark.parametrize("make", [torch.DoubleTensor, torch.LongTensor])
def test_constructors_of_a_type_name_the_way_out(make):
    with pytest.raises(TypeError, match=r"test_constructors.py:\d+.*use torch.tensor"):
        jit(lambda x: make([x[0], x[1]]), backend="eager")(torch.ones(2))


def test_lengths():
    def f(x):
        assert len(x) == 2 and [len(row) for row in x] == [3, 3]
        with pytest.raises(TypeError, match="of a 0-d tensor"):
            len(x.sum())
        return x * 2

    x = torch.ones(2, 3)
    for compiled in (f, jit(f, backend="eager"), functionalize(f), make_fx(f)(x)):
        assert torch.equal(compiled(x), x * 2)
