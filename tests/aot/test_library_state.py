"""Objects of Python's and numpy's own that a function reads: used or changed between two calls
they are never stale."""

import array
import collections
import ctypes
import dataclasses
import enum
import functools
import importlib
import itertools
import operator
import os
import queue
import random
import sys
import threading
import types

import numpy as np
import pytest
import torch

from aotfunc import aot_function, jit
from aotfunc.errors import CaptureError
from tests.reference import assert_same

X = torch.arange(1.0, 5.0)
COMPILERS = {"jit": jit, "aot_function": lambda f: aot_function(f, "eager")}

#: ``make() -> (f, change)``
CASES = {}


def case(make):
    CASES[make.__name__] = make
    return make


class Holder:
    def __init__(self, k=2.0):
        self.k = k

    def get(self):
        return self.k

    def __str__(self):
        return str(self.k)

    __repr__ = __str__


def unchanged():
    pass


# ----- what moves on by itself -------------------------------------------------------------------


def drawing(new):
    """A case of an object that is another one after each use."""

    def make(use):
        x = new()
        return lambda t: t * use(x), unchanged

    return make


MOVING = {
    "iterator": (lambda: iter([1.0, 2.0, 3.0, 4.0, 5.0]), next),
    "generator": (lambda: (2.0**i for i in range(9)), next),
    "count": (itertools.count, next),
    "cycle": (lambda: itertools.cycle([1.0, 2.0]), next),
    "Random": (lambda: random.Random(0), lambda r: r.random()),
    "numpy Generator": (lambda: np.random.default_rng(0), lambda r: r.random()),
    "numpy RandomState": (lambda: np.random.RandomState(0), lambda r: r.rand()),
    "numpy PCG64": (lambda: np.random.PCG64(0), lambda r: float(r.random_raw() % 1000)),
    "numpy SeedSequence": (
        lambda: np.random.SeedSequence(0),
        lambda s: s.spawn(1)[0].spawn_key[0],
    ),
}
for name, (new, use) in MOVING.items():
    CASES[name] = lambda new=new, use=use: drawing(new)(use)


# ----- containers --------------------------------------------------------------------------------


@case
def objects_in_a_set():
    o = Holder()
    s = {o}
    return lambda x: x * sum(e.k for e in s), lambda: setattr(o, "k", o.k + 1)


@case
def order_of_a_set():
    s = [{1, 9}]

    def f(x):
        for e in s[0]:
            x = x * 2 + e
        return x

    return f, lambda: s.__setitem__(0, {9, 1})


@case
def objects_in_an_array():
    o = Holder()
    a = np.array([o], dtype=object)
    return lambda x: x * a[0].k, lambda: setattr(o, "k", o.k + 1)


@case
def array_array():
    a = array.array("d", [2.0])
    return lambda x: x * a[0], lambda: a.append(a.pop() + 1)


@case
def memory_view():
    b = bytearray([2])
    m = memoryview(b)
    return lambda x: x * m[0], lambda: b.__setitem__(0, b[0] + 1)


@case
def view_of_a_dictionary():
    d = {"a": 1.0}
    v = d.values()
    return lambda x: x * sum(v), lambda: d.update(a=d["a"] + 1)


@case
def default_factory():
    d = collections.defaultdict(lambda: 3.0)
    return lambda x: x * d.default_factory(), lambda: setattr(d, "default_factory", lambda: 8.0)


class Numbers(list):
    factor = 2.0


class Array(np.ndarray):
    pass


@case
def attribute_of_a_list():
    a = Numbers([1.0])
    return lambda x: x * a[0] * a.factor, lambda: setattr(a, "factor", a.factor + 1)


@case
def attribute_of_an_array():
    a = np.ones(1).view(Array)
    a.factor = 2.0
    return lambda x: x * float(a[0]) * a.factor, lambda: setattr(a, "factor", a.factor + 1)


@case
def polynomial():
    p = np.poly1d([1.0, 2.0])
    return lambda x: x * float(p(1.0)), lambda: p.coeffs.__setitem__(0, p.coeffs[0] + 1)


@case
def structure_of_c():
    c = ctypes.c_double(2.0)
    return lambda x: x * c.value, lambda: setattr(c, "value", c.value + 1)


@case
def event_of_threads():
    e = threading.Event()
    return lambda x: x * 2 if e.is_set() else x * 3, lambda: e.clear() if e.is_set() else e.set()


@case
def size_of_a_queue():
    q = queue.Queue()
    return lambda x: x * q.qsize(), lambda: q.put(1)


@case
def method_of_a_list():
    a = [2.0]
    get = a.__getitem__
    return lambda x: x * get(0), lambda: a.__setitem__(0, a[0] + 1)


@case
def method_of_a_dictionary():
    d = {"a": 2.0}
    get = d.get
    return lambda x: x * get("b", 7.0), lambda: d.update(b=d.get("b", 1.0) + 1)


# ----- instances of plain values -----------------------------------------------------------------

FACTOR = [2.0]


def grows():
    FACTOR[0] += 1


class Kind(enum.Enum):
    FIRST = 1.0
    SECOND = [2.0]

    @property
    def scaled(self):
        return self.value * FACTOR[0]


class Text(str):
    k = 2.0


@case
def property_of_an_enum():
    held = [Kind.FIRST]
    return lambda x: x * held[0].scaled, grows


@case
def enum_in_a_tuple():
    held = [(Kind.FIRST, 1.0)]
    return lambda x: x * held[0][0].scaled, grows


@case
def list_of_an_enum():
    return lambda x: x * Kind.SECOND.value[0], lambda: Kind.SECOND.value.append(
        Kind.SECOND.value.pop() + 1
    )


@case
def class_of_texts():
    texts = [Text("a")]
    return lambda x: x * texts[0].k, lambda: setattr(Text, "k", Text.k + 1)


# ----- read without its name ---------------------------------------------------------------------


@case
def attribute_getter():
    o, get = Holder(Holder()), operator.attrgetter("k.k")
    return lambda x: x * get(o), lambda: setattr(o.k, "k", o.k.k + 1)


@case
def method_caller():
    o, get = Holder(), operator.methodcaller("get")
    return lambda x: x * get(o), lambda: setattr(o, "k", o.k + 1)


@case
def text_of_an_object():
    o = Holder()
    return lambda x: x * float(f"{o}"), lambda: setattr(o, "k", o.k + 1)


@case
def repr_of_a_dataclass():
    @dataclasses.dataclass
    class Config:
        size: int = 2

    c = Config()
    return lambda x: x * len(repr(c)), lambda: setattr(c, "size", c.size * 10)


@case
def bases_of_a_class():
    class First:
        def k(self):
            return 2.0

    class Second:
        def k(self):
            return 5.0

    class Child(First):
        pass

    o = Child()
    return lambda x: x * o.k(), lambda: setattr(Child, "__bases__", (Second,))


@case
def partial_method():
    class Scaler:
        k = 2.0

        def times(self, x, n):
            return x * n * self.k

        twice = functools.partialmethod(times, n=2)

    return lambda x: Scaler().twice(x), lambda: setattr(Scaler, "k", Scaler.k + 1)


@case
def the_only_instance():
    class Single:
        made = None

        def __new__(cls):
            if cls.made is None:
                cls.made = super().__new__(cls)
                cls.made.k = 2.0
            return cls.made

    return lambda x: x * Single().k, lambda: setattr(Single(), "k", Single().k + 1)


@case
def items_of_a_class():
    class Table:
        items = {"a": 2.0}

        def __class_getitem__(cls, name):
            return cls.items[name]

    return lambda x: x * Table["a"], lambda: Table.items.update(a=Table["a"] + 1)


@case
def subclasses():
    class Base:
        pass

    made = []
    return lambda x: x * (1 + len(Base.__subclasses__())), lambda: made.append(
        type("Child", (Base,), {})
    )


@case
def text_of_a_function():
    def f():
        """2"""

    return lambda x: x * float(f.__doc__), lambda: setattr(f, "__doc__", f.__doc__ + "1")


@case
def a_module_that_is_not_there_yet():
    name = "state_that_comes_later"
    sys.modules.pop(name, None)

    def f(x):
        try:
            import state_that_comes_later
        except ImportError:
            return x
        return x * state_that_comes_later.K

    def change():
        m = sys.modules.setdefault(name, types.ModuleType(name))
        m.K = getattr(m, "K", 1.0) + 1

    return f, change


@case
def precision_of_matrices():
    torch.set_float32_matmul_precision("highest")
    other = {"highest": "high", "high": "highest"}
    return (
        lambda x: x * len(torch.get_float32_matmul_precision()),
        lambda: torch.set_float32_matmul_precision(other[torch.get_float32_matmul_precision()]),
    )


SCALE = 2.0


@case
def globals_by_name():
    globals()["SCALE"] = 2.0
    return lambda x: x * globals()["SCALE"], lambda: globals().update(SCALE=globals()["SCALE"] + 1)


@case
def imported_by_name():
    m = sys.modules["state_of_this_test"] = types.ModuleType("state_of_this_test")
    m.K = 2.0
    return lambda x: x * importlib.import_module("state_of_this_test").K, lambda: setattr(
        m, "K", m.K + 1
    )


@case
def imported_beside_quotes():
    m = sys.modules["state_of_this_test"] = types.ModuleType("state_of_this_test")
    m.K = 2.0

    def f(x):
        if x.dim() > 3:
            raise ValueError("'x' has too many dimensions,\n'4' or more \\")
        return x * importlib.import_module("state_of_this_test").K

    return f, lambda: setattr(m, "K", m.K + 1)


@case
def module_by_its_name():
    m = sys.modules["state_of_this_test"] = types.ModuleType("state_of_this_test")
    m.K = 2.0
    return lambda x: x * sys.modules["state_of_this_test"].K, lambda: setattr(m, "K", m.K + 1)


@case
def module_that_this_is():
    globals()["SCALE"] = 2.0
    return lambda x: x * sys.modules[__name__].SCALE, lambda: globals().update(
        SCALE=globals()["SCALE"] + 1
    )


@case
def evaluated():
    globals()["SCALE"] = 2.0
    return lambda x: eval("x * SCALE"), lambda: globals().update(SCALE=globals()["SCALE"] + 1)


VARIABLE = "AOTFUNC_TEST_SCALE"
ENVIRONMENT = {
    "environ[]": lambda: os.environ[VARIABLE],
    "environ.get": lambda: os.environ.get(VARIABLE, "7"),
    "getenv": lambda: os.getenv(VARIABLE),
}


def environment_case(read):
    os.environ[VARIABLE] = "2"
    return lambda x: x * float(read()), lambda: os.environ.update(
        {VARIABLE: str(float(os.environ[VARIABLE]) + 1)}
    )


for name, read in ENVIRONMENT.items():
    CASES[name] = lambda read=read: environment_case(read)


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("name", CASES)
def test_never_stale(name, compiler, monkeypatch):
    want = []
    monkeypatch.setitem(globals(), "FACTOR", [2.0])
    before = torch.get_float32_matmul_precision()
    f, change = CASES[name]()
    for _ in range(3):
        want.append(f(X))
        change()
    FACTOR[0], Text.k, Kind.SECOND.value[0] = 2.0, 2.0, 2.0
    f, change = CASES[name]()
    compiled = COMPILERS[compiler](f)
    for w in want:
        assert_same(compiled(X), w)
        change()
    os.environ.pop(VARIABLE, None)
    torch.set_float32_matmul_precision(before)
    sys.modules.pop("state_that_comes_later", None)
    Text.k, Kind.SECOND.value[0] = 2.0, 2.0


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("size", [128, None, 1])
def test_tensors_that_a_function_keeps(size, compiler):
    """``functools.lru_cache``: no other capture, and nobody outside, finds traced values there."""
    table = functools.lru_cache(size)(lambda n: torch.arange(1.0, n + 1))
    f = COMPILERS[compiler](lambda x: x * table(x.shape[-1]) + table(x.shape[-1]))
    for x in (X, X[:3], X.expand(2, 4), X * 2):
        assert_same(f(x), x * table(x.shape[-1]) + table(x.shape[-1]))
    table.cache_clear()
    f(X.double())
    assert_same(table(4) * 1, X)


def test_an_iterator_as_argument():
    f, it = jit(lambda x, it: x * next(it)), iter([1.0, 2.0])
    assert_same(f(X, it), X)
    assert_same(f(X, it), X * 2)


def test_texts_of_errors_are_no_reason_to_capture_again():
    o = Holder()

    def f(x):
        if x.dim() != 1:
            raise ValueError(f"{o} wants one dimension, not {x.dim()}")
        return x * 2

    g = jit(f)
    for k in range(3):
        o.k = k
        g(X)
    assert g.captures == 1


# ----- variables that are bound anew -------------------------------------------------------------

STATE = torch.zeros(4)


def steps_a_global(x):
    global STATE
    STATE = STATE * 0.5 + x
    return STATE * 2


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_global_tensor_bound_by_the_function(compiler, monkeypatch):
    monkeypatch.setitem(globals(), "STATE", torch.zeros(4))
    f, want = COMPILERS[compiler](steps_a_global), torch.zeros(4)
    for k in range(4):
        want = want * 0.5 + X * k
        assert_same(f(X * k), want * 2)
        assert_same(STATE, want)


def test_a_global_after_an_error(monkeypatch):
    """The function's own leaves what it did; a refusal leaves what was there."""
    before = torch.zeros(4)
    monkeypatch.setitem(globals(), "STATE", before)

    def refused(x):
        return float(steps_a_global(x).sum())

    def fails(x):
        steps_a_global(x)
        raise KeyError("mine")

    with pytest.raises(CaptureError):
        jit(refused)(X)
    assert STATE is before
    with pytest.raises(KeyError, match="mine"):
        jit(fails)(X)
    assert_same(STATE, X)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_closure_variable_bound_by_the_function(compiler):
    state = torch.zeros(4)

    def step(x):
        nonlocal state
        state = state * 0.5 + x
        return state * 2

    f, want = COMPILERS[compiler](step), torch.zeros(4)
    for k in range(4):
        want = want * 0.5 + X * k
        assert_same(f(X * k), want * 2)
        assert_same(state, want)
