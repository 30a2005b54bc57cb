"""Python attributes of arguments: tensors, numbers, texts, containers. Objects that do not tell
their class."""

import collections

import pytest
import torch

from aotfunc import aot_function, functionalize, grad, jit, make_fx, vmap
from aotfunc.errors import CaptureError
from tests.aot.compiled_by import COMPILERS, every_compiler
from tests.reference import assert_same

X = torch.linspace(-1.0, 1.5, 4, dtype=torch.float64)


def tagged(**attributes):
    x = X.clone()
    x.__dict__.update(attributes)
    return x


def scaled(x):
    return x * getattr(x, "tag", 1) + (x.w if hasattr(x, "w") else 0)


@every_compiler
def test_attributes_of_a_tensor(compiler):
    """They are read, and guarded; tensors among them are inputs, with gradients."""
    f, x, w = COMPILERS[compiler](scaled), tagged(tag=2), X.clone().requires_grad_()
    for change in (
        {},
        {"tag": 3},
        {"tag": 2.0},
        {"w": X},
        {"w": X + 1},
        {"tag": 2, "w": w},
        {"tag": X, "w": w},
    ):
        x.__dict__.update(change)
        assert_same(f(x), scaled(x))
    (g,) = torch.autograd.grad(f(x).sum(), w)
    assert_same(g, torch.ones_like(w))
    assert_same(f(X), X)
    del x.tag
    assert_same(f(x), X + w)


@every_compiler
def test_a_tensor_that_refers_to_itself(compiler):
    x = tagged()
    x.again = x
    f = COMPILERS[compiler](lambda x: x * (2 if x.again is x else 3))
    assert_same(f(x), X * 2)
    x.again = X.clone()
    assert_same(f(x), X * 3)
    del x.again


@pytest.mark.parametrize(
    "transform", [functionalize, vmap, lambda f: grad(lambda x: f(x).sum()), make_fx]
)
def test_transforms_read_them(transform):
    got = transform(scaled)(tagged(tag=3))
    want = torch.full_like(X, 3) if "lambda" in transform.__qualname__ else X * 3
    assert_same(got(X) if transform is make_fx else got, want)


@every_compiler
def test_an_attribute_that_is_set_is_refused(compiler):
    def f(x):
        x.seen = x * 2
        return x

    x = tagged(tag=1)
    with pytest.raises(CaptureError, match="sets the attribute seen of an argument"):
        COMPILERS[compiler](f)(x)
    assert vars(x) == {"tag": 1}


@every_compiler
def test_an_attribute_of_a_closed_over_tensor_is_set(compiler):
    pairs = []
    for call in (COMPILERS[compiler], lambda f: f):
        w, seen = X.clone(), []

        def f(x, w=w):
            w.last = x * 2 + getattr(w, "last", 0)
            return x + w

        f = call(f)
        for k in range(3):
            seen.append((f(X + k), w.last))
        pairs.append(seen)
    assert_same(*pairs)


# ----- attributes of results --------------------------------------------------------------------


class Source:
    def __init__(self, name):
        self.name = name


OUTSIDE, KEPT = Source("outside"), [None]


def given(y, **attributes):
    y.__dict__.update(attributes)
    return y


def of_itself(x):
    y = x * 2
    y.me = y
    return y


def kept_outside(x):
    KEPT[0] = given(x * 2, tag="kept")
    return x + 1


def one_list(x):
    y = given(x * 2, parts=[x + 1])
    return y, [y], y.parts


RESULTS = {
    "number": lambda x: given(x * 2, tag=1),
    "tensor": lambda x: given(x * 2, half=x / 2),
    "tree": lambda x: given(x * 2, parts=[x + 1, 2, {"a": x * 3}]),
    "object from outside": lambda x: given(x * 2, source=OUTSIDE),
    "object made inside": lambda x: given(x * 2, source=Source("inside")),
    "argument": lambda x: given(x * 2, source=x),
    "view": lambda x: given(x[:], tag=1),
    "one of two": lambda x: (x * 3, given(x * 2, tag=1)),
    "attributes of attributes": lambda x: given(x * 2, half=given(x / 2, tag=5)),
    "constant": lambda x: given(torch.tensor(3.0), tag=1),
    "parameter": lambda x: given(torch.nn.Parameter(x * 2), tag=1),
    "nested": lambda x: given(jit(lambda z: given(z * 2, tag=1))(x), other=2),
    "itself": of_itself,
    "kept outside": kept_outside,
    "one list": one_list,
}


def shown(x, depth=3):
    """The result and what its attributes hold."""
    if isinstance(x, torch.Tensor):
        inner = {k: shown(v, depth - 1) for k, v in vars(x).items()} if depth else {}
        return type(x), x.tolist(), x.requires_grad, inner
    if isinstance(x, (list, tuple)):
        return [shown(e, depth) for e in x]
    if isinstance(x, dict):
        return {k: shown(e, depth) for k, e in x.items()}
    return (x.name, x is OUTSIDE) if isinstance(x, Source) else x


@every_compiler
@pytest.mark.parametrize("name", RESULTS)
def test_attributes_of_results(compiler, name):
    f, plain = COMPILERS[compiler](RESULTS[name]), RESULTS[name]
    for x in (X.clone(), X + 1, X.clone().requires_grad_()):
        want = shown(plain(x)), shown(KEPT)
        KEPT[0] = None if name == "kept outside" else KEPT[0]
        assert (shown(f(x)), shown(KEPT)) == want
        assert not vars(x)


def test_attributes_of_results_are_the_same_objects():
    x, f = X.clone(), jit(one_list)
    for _ in range(2):
        y, (again,), parts = f(x)
        assert again is y and parts is y.parts
    y = jit(of_itself)(x)
    assert y.me is y
    first, second = (jit(RESULTS["object made inside"])(x).source for _ in range(2))
    assert first is not second


def test_attributes_of_results_have_derivatives():
    x = X.clone().requires_grad_()
    y = jit(lambda x: given((x * 2).sum(), square=(x * x).sum()))(x)
    (y + y.square).backward()
    assert_same(x.grad, 2 + 2 * X)


# ----- classes of the user's ---------------------------------------------------------------------


class Whole(int):
    def scaled(self):
        return self * self.scale


class Text(str):
    pass


class Number(float):
    pass


class Rows(list):
    pass


class Row(tuple):
    pass


class Table(dict):
    pass


class Ordered(collections.OrderedDict):
    pass


SUBCLASSED = [
    lambda: Whole(2),
    lambda: Text("a"),
    lambda: Number(2.0),
    lambda: Rows([1]),
    lambda: Row((1, 2)),
]
SUBCLASSED += [
    lambda: Table(a=1),
    lambda: Ordered(a=1),
    lambda: Rows([X]),
    lambda: Row((X,)),
    lambda: Table(a=X),
]
WAYS = {
    "argument": lambda compiler, o: (lambda f: lambda: f(X, o))(
        compiler(lambda x, o: x * o.scale)
    ),
    "nested": lambda compiler, o: (lambda f: lambda: f(X, {"o": [o]}))(
        compiler(lambda x, d: x * d["o"][0].scale)
    ),
    "closed over": lambda compiler, o: (lambda f: lambda: f(X))(compiler(lambda x: x * o.scale)),
}


@every_compiler
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "make", range(len(SUBCLASSED)), ids=lambda i: type(SUBCLASSED[i]()).__name__
)
def test_attributes_of_subclasses_are_guarded(compiler, way, make):
    o = SUBCLASSED[make]()
    o.scale = 2.0
    call = WAYS[way](COMPILERS[compiler], o)
    for o.scale in (2.0, 3.0, 2, 5.0):
        assert_same(call(), X * o.scale)


@every_compiler
def test_methods_of_subclasses_are_guarded(compiler, monkeypatch):
    o = Whole(2)
    o.scale = 2.0
    f, g = (
        COMPILERS[compiler](lambda x: x * o.scaled()),
        COMPILERS[compiler](lambda x, o: x * o.scaled()),
    )
    for scale in (2.0, 3.0):
        o.scale = scale
        assert_same((f(X), g(X, o)), (X * 2 * scale, X * 2 * scale))
    monkeypatch.setattr(Whole, "scaled", lambda self: 7.0)
    assert_same((f(X), g(X, o)), (X * 7, X * 7))


class Classless:
    def __getattribute__(self, name):
        return {"scale": 2.0}[name]


def test_an_object_that_does_not_tell_its_class_is_refused():
    o = Classless()
    calls = [
        lambda: jit(lambda x, o: x * o.scale)(X, o),
        lambda: jit(lambda x, d: x * d["o"].scale)(X, {"o": o}),
        lambda: jit(lambda x: x * o.scale)(X),
        lambda: aot_function(lambda x, *, o: x * o.scale, "eager")(X, o=o),
        lambda: grad(lambda x, o: (x * o.scale).sum())(X, o),
        lambda: vmap(lambda x, d: x * d["o"].scale, (0, None))(X, {"o": o}),
        lambda: make_fx(lambda x, o: x * o.scale)(X, o),
    ]
    for call in calls:
        with pytest.raises(CaptureError, match="class Classless does not tell its __class__"):
            call()


def test_attributes_of_a_compiled_function():
    """What a user keeps there is the user's."""

    @jit
    def f(x):
        return x * 2

    names = ("last", "changed", "warned", "recent", "history", "names", "steps")
    for k, name in enumerate(names):
        setattr(f, name, k)
    for x in (torch.ones(2), torch.ones(3), torch.ones(3, dtype=torch.float64)):
        torch.testing.assert_close(f(x), x * 2)
    assert [getattr(f, name) for name in names] == list(range(len(names)))
    assert "entry 2" in str(f.explain())
