"""Tensors that a function binds in the state it reaches are real ones afterwards, those of eager,
at every call."""

import types
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from aotfunc import aot_function, aot_module, jit
from aotfunc.errors import CaptureError
from tests.reference import assert_same

X = torch.linspace(-1.0, 1.5, 12).view(3, 4)
COMPILERS = {
    "jit": jit,
    "aot_function": lambda f: aot_function(f, "eager"),
    "aot_module": lambda f: aot_module(f, "eager"),
    "jit of jit": lambda f: jit(jit(f)),
}


class Box:
    def __init__(self):
        self.one = 1.0


class Recurrent(nn.Module):
    """A state bound anew at every call, and one that is made at the first."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.eye(4))
        self.register_buffer("running", torch.zeros(4))
        self.state, self.last, self.table, self.cache = None, None, None, None
        self.box, self.hist, self.flag = {"k": torch.zeros(4), "n": {}}, [torch.zeros(4)], False

    def forward(self, x):
        if self.table is None:
            self.table = torch.arange(4.0) + x.new_zeros(4)
        h = x @ self.w + self.table
        h = h if self.state is None else h + self.state
        self.state = h.detach() * 0.5
        self.running = self.running * 0.9 + x.mean(0) * 0.1
        self.last = (h, [x * 2, {"x": x}])
        self.attention = h.softmax(-1)
        self.cache = (h, h + 1) if self.cache is None else (self.cache[0] * 2, self.cache[1] + h)
        self.box["k"] = self.box["k"] + x.sum(0)
        self.hist[0] = self.hist[0] - x.sum(0)
        return h + self.running + self.box["k"] + self.hist[0]


def state_of(m):
    names = ("state", "running", "last", "table", "attention", "cache", "box", "hist")
    return [getattr(m, n) for n in names]


@pytest.mark.parametrize("compiler", COMPILERS)
def test_state_bound_anew(compiler):
    m, plain = Recurrent(), Recurrent()
    f = COMPILERS[compiler](m)
    for i in range(6):
        x = X + i
        got, want = f(x), plain(x)
        assert_same(got, want)
        assert_same(state_of(m), state_of(plain))
        assert [t.requires_grad for t in m.last[:1]] == [t.requires_grad for t in plain.last[:1]]
        (got + m.last[0] + m.attention * 2).sum().backward()
        (want + plain.last[0] + plain.attention * 2).sum().backward()
        assert_same(m.w.grad, plain.w.grad)
        m.cache, plain.cache = [tuple(t.detach() for t in n.cache) for n in (m, plain)]
    assert isinstance(m.running, torch.Tensor) and "running" in dict(m.named_buffers())


@pytest.mark.parametrize("compiler", ["jit", "aot_function"])
def test_it_settles(compiler):
    m, k, box = Recurrent(), torch.zeros(4), SimpleNamespace(last=None)

    def f(x, o):
        nonlocal k
        k = k + x.sum(0)
        o.seen = box.last = k * 2
        return m(x) + k + o.one

    g = COMPILERS[compiler](f)
    with torch.no_grad():
        for i in range(5):
            o = Box()
            g(X, o)
            assert_same(
                (k, box.last, o.seen),
                (X.sum(0) * (i + 1), X.sum(0) * 2 * (i + 1), X.sum(0) * 2 * (i + 1)),
            )
    assert g.captures <= 3


def test_a_capture_that_fails_leaves_the_state_as_it_was():
    m, k = Recurrent(), None
    m.cells = []

    def f(x):
        nonlocal k
        m(x)
        k = x
        m.cells.append(x)
        m.new = x
        if len(m.cells) > 1:
            raise KeyError("mine")
        return float(x.sum())

    before, w = state_of_new(m), m.w
    with pytest.raises(CaptureError, match="asked for"):
        jit(f)(X)
    assert state_of_new(m) == before and m.w is w and k is None and m.cells == []
    assert not hasattr(m, "new") and not hasattr(m, "attention")


def state_of_new(m):
    tables = (m.__dict__, m._buffers, m.box)
    return [{k: id(v) for k, v in t.items() if not k.startswith("_")} for t in tables] + [
        list(map(id, m.hist))
    ]


@pytest.mark.parametrize(
    "f",
    [
        lambda xs: xs["a"].append(xs["a"][0] * 2) or xs["a"][0],
        lambda xs: xs.__setitem__("b", xs["a"][0] * 2) or xs["a"][0],
        lambda xs: xs.__setitem__("a", [xs["a"][0] * 2]) or xs["a"][0],
        lambda xs: xs.pop("a")[0],
    ],
)
def test_a_container_that_is_an_argument_is_not_changed(f):
    xs = {"a": [X]}
    with pytest.raises(CaptureError, match="list or dictionary that is its argument xs"):
        jit(f)(xs)
    assert list(xs) == ["a"] and len(xs["a"]) == 1 and xs["a"][0] is X


def test_a_container_that_is_an_argument_and_closed_over_is_not_changed():
    rows, table, box = [X, X * 2], {"a": X}, SimpleNamespace(a=X)

    def sets(given):
        rows[0] = given[1] + 5
        return given[0]

    def grows(given):
        rows.append(given[1] + 5)
        return given[-1]

    def fills(given):
        table["b"] = given["a"] * 2
        return given["a"]

    def assigns(given):
        box.a = given.a * 2
        return given.a

    for f, x in ((sets, rows), (grows, rows), (fills, table), (assigns, box)):
        with pytest.raises(
            CaptureError, match=f"{f.__name__}.* an argument and that it reaches by another way"
        ):
            jit(f)(x)
    assert len(rows) == 2 and rows[0] is X and list(table) == ["a"] and box.a is X
    assert_same(jit(lambda given: given[0] + rows[1])(rows), X * 3)
    assert_same(jit(grows)([X, X]), X)  # another list
    assert_same(rows, [X, X * 2, X + 5])


# ----- attributes of classes, functions and Python modules ---------------------------------------


def kept_by_a_class():
    class Total:
        value, seen, table = torch.zeros(2), [], {}

        @classmethod
        def add(cls, x):
            cls.value = cls.value + x
            cls.seen.append(x * 3)
            cls.table["last"] = x * 4

    def f(x):
        Total.add(x)
        Total.new = x * 5
        return x * Total.value

    return f, lambda: [Total.value, *Total.seen, Total.table, Total.new]


def kept_by_a_subclass():
    class Base:
        value = torch.zeros(2)

    class Derived(Base):
        pass

    def f(x):
        Derived.value = Derived.value + x
        return Derived.value * 2

    return f, lambda: [Base.value, Derived.value]


def kept_by_the_class_of_a_module():
    class Counts(nn.Module):
        value = torch.zeros(2)

        def forward(self, x):
            type(self).value = self.value + x
            return self.value * 2

    return Counts(), lambda: [Counts.value]


def kept_by_a_function():
    def helper(x):
        helper.last = x * 2
        helper.seen.append(x)
        return x + 1

    helper.seen = []
    return (lambda x: helper(x) * 2), lambda: [helper.last, *helper.seen]


def kept_by_the_function_itself():
    def f(x):
        f.last = x * 2
        return x + 1

    itself = f
    return itself, lambda: [itself.last]


def kept_by_a_python_module():
    place = types.ModuleType("place")
    place.value, place.seen = torch.zeros(2), []

    def f(x):
        place.value = place.value + x
        place.seen.append(x)
        return place.value * 2

    return f, lambda: [place.value, *place.seen]


def kept_by_the_globals():
    def f(x):
        globals()["_kept"] = x * 2
        return x + 1

    return f, lambda: [globals().pop("_kept")]


KEPT = [v for k, v in list(globals().items()) if k.startswith("kept_by_")]


@pytest.mark.parametrize(
    "compiler", [jit, lambda f: aot_function(f, "eager"), lambda f: jit(jit(f))]
)
@pytest.mark.parametrize("make", KEPT)
def test_tensors_kept_by_classes_functions_and_modules(make, compiler):
    (f, kept), (g, kept_compiled) = make(), make()
    g = compiler(g)
    for k in range(4):
        x = torch.tensor([1.0, -2.0]) * (k + 1)
        want = f(x), kept()
        assert_same((g(x), kept_compiled()), want)


def test_a_capture_that_fails_leaves_classes_as_they_were():
    class Total:
        value, seen = torch.zeros(2), []

    def f(x):
        Total.value = Total.value + x
        Total.new = x
        Total.seen.append(x)
        return x.sum().item()

    before = Total.value
    with pytest.raises(CaptureError):
        jit(f)(torch.ones(2))
    assert Total.value is before and not Total.seen and not hasattr(Total, "new")
