"""Python state that a function, and what it calls, reads: changed between two calls it is never
the old one."""

import collections
import contextlib
import contextvars
import dataclasses
import dis
import enum
import functools
import inspect
import threading
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm

from aotfunc import aot_function, aot_module, grad, jit, vmap
from aotfunc.runtime.guards.reads import instructions_of, reads_of
from tests.aot import state_helper
from tests.aot.state_helper import through
from tests.reference import assert_same

X = torch.linspace(-1.0, 1.5, 12).view(3, 4)


class Calling(nn.Module):
    """A function as a module."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, *args):
        return self.f(*args)


COMPILERS = {
    "jit": jit,
    "aot_function": lambda f: aot_function(f, "eager"),
    "aot_module": lambda f: aot_module(f if isinstance(f, nn.Module) else Calling(f), "eager"),
    "jit of jit": lambda f: jit(jit(f)),
    "jit of grad": lambda f: jit(lambda *args: grad(lambda x, *rest: f(x, *rest).sum())(*args)),
}

CASES = {}


def case(make):
    """``make() -> (f, args, change, …)``: right after every change, and with all of them."""
    CASES[make.__name__] = make
    return make


def new(*shape):
    return nn.Parameter(torch.randn(shape))


def setting(x, name, value):
    return lambda: setattr(x, name, value)


# ----- attributes of modules and objects ---------------------------------------------------------


class Scaled(nn.Module):
    kind = "sum"
    offset = 0.25

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.beta, self.n, self.flag, self.name = 0.5, 2, True, "tanh"
        self.array, self.scalar = np.array([1.0, 2.0, 3.0, 4.0]), np.float32(0.5)
        self.table = {"a": 1.0, "b": [2.0, (3.0, {"c": 4.0})]}
        self.chosen = {1, 2}
        self.plain = SimpleNamespace(inner=SimpleNamespace(k=2.0))

    @property
    def twice(self):
        return self.beta * 2

    def forward(self, x):
        y = self.layer(x) * self.beta + self.n + self.twice + self.offset
        if self.flag:
            y = getattr(torch, self.name)(y)
        y = y * self.table["a"] + self.table["b"][1][1]["c"] + self.plain.inner.k
        y = y + torch.from_numpy(self.array).float() * float(self.scalar)
        return y * (2 if 1 in self.chosen else 3) if self.kind == "sum" else y.sin()


@case
def attributes_of_a_module():
    m = Scaled()
    return (
        m,
        (X,),
        setting(m, "beta", 0.25),
        setting(m, "beta", 1),
        setting(m, "beta", True),
        setting(m, "beta", -0.0),
        setting(m, "beta", 0.0),
        setting(m, "n", 3),
        setting(m, "flag", False),
        setting(m, "flag", True),
        setting(m, "name", "sin"),
        setting(m, "offset", 3.0),
        setting(m, "kind", "other"),
        setting(m, "kind", "sum"),
        lambda: m.table.__setitem__("a", 5.0),
        lambda: m.table["b"][1][1].__setitem__("c", 7.0),
        lambda: m.table["b"].__setitem__(1, (1.0, {"c": 8.0})),
        lambda: m.chosen.discard(1),
        setting(m.plain.inner, "k", 5.0),
        setting(m.plain, "inner", SimpleNamespace(k=6.0)),
        setting(m, "array", np.ones(4)),
        lambda: m.array.__setitem__(2, 9.0),
        setting(m, "scalar", np.float32(0.75)),
        lambda: delattr(m, "offset"),
        setting(m, "twice_", 3),
    )


@case
def attributes_of_torchs_modules():
    m = nn.Sequential(
        nn.LeakyReLU(0.1), nn.Dropout(0.5), nn.LayerNorm(4), nn.ELU(), nn.Softmax(1), nn.Hardtanh()
    )
    return (
        m,
        (X,),
        setting(m[0], "negative_slope", 0.5),
        setting(m[1], "p", 0.25),
        setting(m[1], "training", False),
        setting(m[1], "training", True),
        setting(m[1], "inplace", True),
        m.eval,
        setting(m[2], "eps", 0.5),
        setting(m[3], "alpha", 3.0),
        setting(m[4], "dim", 0),
        setting(m[5], "max_val", 0.25),
    )


class Plain:
    k = 2.0
    count = 0

    def __init__(self, m=None):
        self.m, self.own = m, 1.0

    def __call__(self, x):
        return self.method(x)

    def method(self, x):
        y = x if self.m is None else self.m(x)
        return y * self.k + self.own + self.made() + self.still(2.0)

    @classmethod
    def made(cls):
        return cls.k

    @staticmethod
    def still(k):
        return k


class Derived(Plain):
    def method(self, x):
        return super().method(x) + getattr(self, "more", 0.0) + getattr(self, f"{'ow'}n")


@case
def bound_method():
    p = Plain()
    return p.method, (X,), setting(p, "k", 3.0), setting(p, "own", 2.0), lambda: delattr(p, "k")


@case
def object_that_is_called():
    p = Derived(nn.Dropout(0.5))
    return (
        p,
        (X,),
        p.m.eval,
        p.m.train,
        setting(p.m, "p", 0.25),
        setting(p, "more", 2.0),
        setting(p, "m", nn.Tanh()),
        setting(p, "m", None),
        setting(p, "method", lambda x: x * 7),
    )


@case
def class_attributes():
    class A(Plain):
        pass

    class B(A):
        pass

    b = B()
    return (
        lambda x: b(x),
        (X,),
        setting(B, "k", 3.0),
        setting(A, "k", 4.0),
        lambda: delattr(B, "k"),
        setting(A, "made", classmethod(lambda cls: 5.0)),
        setting(B, "still", staticmethod(lambda k: 6.0)),
        setting(A, "method", lambda self, x: x * self.k),
        setting(B, "method", lambda self, x: x + self.k),
        lambda: setattr(b, "__class__", Plain),
    )


@case
def slots_and_properties():
    class S:
        __slots__ = ("_a", "b")

        def __init__(self):
            self._a = 1.0

        @property
        def a(self):
            return self._a

        @functools.cached_property
        def c(self):
            return 5.0

    class T(S):
        @functools.cached_property
        def late(self):
            return self._a * 10

    s, t = S(), T()
    return (
        lambda x: x * s.a + (s.b if hasattr(s, "b") else 0.0) + t.late,
        (X,),
        setting(s, "_a", 2.0),
        setting(s, "b", 3.0),
        lambda: delattr(s, "b"),
        lambda: t.__dict__.pop("late"),
        lambda: (t.__dict__.pop("late", None), setattr(t, "_a", 4.0)),
        setting(S, "a", property(lambda self: 9.0)),
    )


class Mode(enum.Enum):
    SUM = 1
    MEAN = 2


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


@case
def enums():
    c = SimpleNamespace(mode=Mode.SUM, level=Level.LOW)
    f = lambda x: (
        (x.sum(0) if c.mode is Mode.SUM else x.mean(0))
        * c.level
        * (2 if isinstance(c.level, Level) else 3)
    )
    return (
        f,
        (X,),
        setting(c, "mode", Mode.MEAN),
        setting(c, "level", Level.HIGH),
        setting(c, "level", 2),
    )


@dataclasses.dataclass
class Inner:
    rate: float = 0.5
    sizes: list = dataclasses.field(default_factory=lambda: [1, 2])


@dataclasses.dataclass
class Config:
    inner: Inner = dataclasses.field(default_factory=Inner)
    act: object = torch.tanh
    scale: float = 2.0


class Triple(collections.namedtuple("Triple", "a b c")):
    __slots__ = ()


@case
def dataclasses_and_named_tuples():
    box = SimpleNamespace(config=Config(), triple=Triple(1.0, 2.0, [3.0]))

    def f(x):
        c = box.config
        return (
            c.act(x) * c.inner.rate * c.scale + sum(c.inner.sizes) + box.triple.a + box.triple.c[0]
        )

    return (
        f,
        (X,),
        setting(box.config, "scale", 3.0),
        setting(box.config.inner, "rate", 0.25),
        lambda: box.config.inner.sizes.append(5),
        setting(box.config, "act", torch.sin),
        setting(box.config, "act", lambda x: x * 3),
        setting(box, "config", Config(scale=7.0)),
        setting(box, "triple", Triple(4.0, 5.0, [6.0])),
        lambda: box.triple.c.__setitem__(0, 8.0),
        lambda: setattr(box, "config", dataclasses.replace(box.config, inner=Inner(9.0))),
    )


@case
def containers_of_objects():
    parts = {"a": [Plain(), Plain()], "b": (Inner(), {"deep": Plain()})}

    def f(x):
        for p in parts["a"]:
            x = p(x)
        return x * parts["b"][0].rate + parts["b"][1]["deep"].k

    return (
        f,
        (X,),
        setting(parts["a"][1], "k", 5.0),
        setting(parts["b"][0], "rate", 5.0),
        setting(parts["b"][1]["deep"], "k", 5.0),
        lambda: parts["a"].append(Plain()),
        lambda: parts["a"].reverse(),
        lambda: parts["a"].pop(),
    )


REGISTRY = {"relu": torch.relu}


def register(f):
    REGISTRY[f.__name__] = f
    return f


@register
def special(x):
    return x * state_helper.RATE


@case
def registry_and_names_made_at_run_time():
    class Net:
        def __init__(self):
            self.w0, self.w1, self.which = 1.0, 2.0, "special"

        def __call__(self, x):
            for i in range(2):
                x = x * getattr(self, f"w{i}")
            return REGISTRY[self.which](x)

    n = Net()
    return (
        n,
        (X,),
        setting(n, "w1", 3.0),
        setting(n, "which", "relu"),
        setting(n, "which", "special"),
        setting(state_helper, "RATE", 0.75),
        lambda: REGISTRY.__setitem__("special", torch.sin),
        setting(state_helper, "RATE", 0.5),
    )


# ----- functions: globals, closures, defaults, helpers -------------------------------------------


@case
def another_modules_constant():
    return (
        lambda x: x * state_helper.RATE + state_helper.TABLE["rate"],
        (X,),
        setting(state_helper, "RATE", 2.0),
        lambda: state_helper.TABLE.__setitem__("rate", 3.0),
        setting(state_helper, "RATE", 0.5),
        lambda: state_helper.TABLE.__setitem__("rate", 0.5),
    )


@case
def helper_in_another_module():
    old = state_helper.helper
    return (
        lambda x: through(x),
        (X,),
        setting(state_helper, "RATE", 2.0),
        lambda: state_helper.TABLE["deep"][1].__setitem__("x", 3.0),
        setting(state_helper, "helper", lambda x: x * 9),
        setting(state_helper, "helper", old),
        setting(state_helper, "RATE", 0.5),
        lambda: state_helper.TABLE["deep"][1].__setitem__("x", 2.0),
    )


@case
def import_inside():
    def f(x):
        import tests.aot.state_helper as h
        from tests.aot.state_helper import TABLE, helper

        return helper(x) * h.RATE + TABLE["rate"]

    return (
        f,
        (X,),
        setting(state_helper, "RATE", 2.0),
        lambda: state_helper.TABLE.__setitem__("rate", 3.0),
        setting(state_helper, "RATE", 0.5),
        lambda: state_helper.TABLE.__setitem__("rate", 0.5),
    )


GAIN = 2.0


def by_global(x):
    return inner_by_global(x) + 1


def inner_by_global(x):
    return x * GAIN


def set_gain(value):
    global GAIN
    GAIN = value


@case
def global_read_by_a_helper():
    return by_global, (X,), lambda: set_gain(3.0), lambda: set_gain(2), lambda: set_gain(2.0)


@case
def monkeypatched_helper():
    old = inner_by_global

    def put(f):
        globals()["inner_by_global"] = f

    return by_global, (X,), lambda: put(lambda x: x * 5), lambda: put(torch.sin), lambda: put(old)


@case
def closures_of_closures():
    k, ks = 2.0, [1.0]

    def inner(x):
        return x * k * ks[0]

    def outer(x):
        return next(g(x) for g in (inner, lambda y: y + k)) + (lambda z: z * k)(x)

    def set_k(value):
        nonlocal k
        k = value

    return (
        outer,
        (X,),
        lambda: set_k(3.0),
        lambda: set_k(3),
        lambda: ks.__setitem__(0, 5.0),
        lambda: ks.insert(0, 6.0),
    )


@case
def defaults():
    def helper(x, k=2.0, *, m=1.0, ks=[1.0]):  # noqa: B006
        return x * k + m + ks[0]

    return (
        lambda x: helper(x),
        (X,),
        setting(helper, "__defaults__", (3.0,)),
        setting(helper, "__kwdefaults__", {"m": 4.0, "ks": [2.0]}),
        lambda: helper.__kwdefaults__["ks"].__setitem__(0, 7.0),
        setting(helper, "__code__", (lambda x, k=2.0, *, m=1.0, ks=(): x - k - m).__code__),
    )


@case
def partial_members():
    ks = [2.0]
    p = functools.partial(lambda x, k, ks, m: x * k * ks[0] + m, k=3.0, ks=ks)
    box = {"f": functools.partial(p, m=1.0)}
    return (
        lambda x: box["f"](x),
        (X,),
        lambda: ks.__setitem__(0, 5.0),
        lambda: p.keywords.__setitem__("k", 4.0),
        lambda: box["f"].keywords.__setitem__("m", 4.0),
        lambda: box.__setitem__("f", functools.partial(p, m=2.0)),
    )


@case
def lambdas_in_dictionaries():
    k = 2.0
    acts = {"a": lambda x: x * k, "b": torch.tanh}

    def set_k(value):
        nonlocal k
        k = value

    return (
        lambda x: acts["b"](acts["a"](x)),
        (X,),
        lambda: set_k(3.0),
        lambda: acts.__setitem__("a", lambda x: x * 7),
        lambda: acts.__setitem__("b", torch.sin),
        lambda: acts.__setitem__("b", acts["a"]),
    )


@case
def wrapped_and_decorated():
    k = 2.0

    def decorate(f):
        @functools.wraps(f)
        def wrapper(*args):
            return f(*args) * k

        return wrapper

    @decorate
    @torch.no_grad()
    def scaled(x):
        return x * GAIN

    @functools.singledispatch
    def single(x):
        return x + GAIN

    def set_k(value):
        nonlocal k
        k = value

    return (
        lambda x: scaled(x) + x + single(x),
        (X,),
        lambda: set_k(3.0),
        lambda: set_gain(5.0),
        lambda: set_gain(2.0),
    )


@case
def custom_function():
    class Twice(torch.autograd.Function):
        k = 2.0

        @staticmethod
        def forward(ctx, x):
            return x * Twice.k

        @staticmethod
        def backward(ctx, g):
            return g * Twice.k * GAIN

    return (
        Twice.apply,
        (X,),
        setting(Twice, "k", 3.0),
        lambda: set_gain(5.0),
        lambda: set_gain(2.0),
    )


@case
def sets_and_other_keys():
    s, d, q = {1, 2}, {1: 2.0, (1, "a"): 3.0, Mode.SUM: 4.0}, collections.deque([1.0, 2.0])
    return (
        lambda x: (
            x * len(s) + d[1] + d[1, "a"] + d[Mode.SUM] + q[0] + (type(next(iter(d))) is int)
        ),
        (X,),
        lambda: s.add(3),
        lambda: d.__setitem__((1, "a"), 5.0),
        lambda: d.__setitem__(Mode.SUM, 6.0),
        lambda: q.rotate(),
        lambda: (d.pop(1), d.__setitem__(1.0, 2.0)),
        lambda: (d.clear(), d.update({True: 2.0, (1, "a"): 3.0, Mode.SUM: 4.0})),
    )


@case
def long_containers():
    numbers = [float(i) for i in range(50)]
    words = {f"w{i}": i for i in range(12_000)}
    return (
        lambda x: x * sum(numbers) + words["w7"] + next(iter(words.values())),
        (X,),
        lambda: words.__setitem__("w7", 8),
        lambda: words.__setitem__("w7", 8.5),
        lambda: words.__setitem__("w0", words.pop("w0")),
        lambda: numbers.__setitem__(40, -1.0),
        lambda: numbers.__setitem__(0, 1),
        lambda: numbers.pop(),
    )


@case
def lookups_that_classes_answer_themselves():
    class Meta(type):
        def __getattr__(cls, name):
            return cls.table[name]

    class A(metaclass=Meta):
        table = {"late": 2.0}

    class Answers:
        def __init__(self):
            self.values = {"k": 2.0, "list": [1.0, 2.0]}

        def __getattr__(self, name):
            return self.__dict__["values"][name]

        def __getitem__(self, i):
            return self.values["list"][i]

        def __len__(self):
            return len(self.values["list"])

    class Described:
        def __init__(self, k):
            self.k = k

        def __get__(self, instance, owner):
            return self.k

    class Uses:
        a = Described(2.0)

    b, u = Answers(), Uses()
    return (
        lambda x: x * A.late + b.k + b[1] + len(b) + u.a,
        (X,),
        lambda: A.table.__setitem__("late", 3.0),
        lambda: b.values.__setitem__("k", 3.0),
        lambda: b.values["list"].__setitem__(1, 4.0),
        lambda: b.values["list"].append(4.0),
        setting(Uses.__dict__["a"], "k", 7.0),
        setting(Uses, "a", 8.0),
    )


@case
def caches_views_and_context_variables():
    @functools.lru_cache
    def cached(n):
        return n * GAIN

    table, var = {"a": 1.0}, contextvars.ContextVar("var", default=1.0)
    view, chain = types.MappingProxyType(table), collections.ChainMap({}, table)
    made = collections.defaultdict(lambda: GAIN)
    w = nn.Parameter(torch.ones(4))
    w.kind = 2.0
    return (
        lambda x: x * cached(2) + view["a"] + chain["a"] + made["q"] + var.get() + w * w.kind,
        (X,),
        lambda: table.__setitem__("a", 5.0),
        lambda: made.clear(),
        lambda: var.set(6.0) and None,
        setting(w, "kind", 3.0),
    )


class Sub(nn.Dropout):
    def forward(self, x):
        return super().forward(x) * 2


@case
def what_torchs_own_methods_read():
    s, lstm, layer = (
        Sub(0.5),
        nn.LSTM(4, 4, 2, dropout=0.5),
        nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
    )
    return (
        lambda x: layer(lstm(s(x)[None])[0]),
        (X,),
        setting(s, "p", 0.25),
        s.eval,
        lstm.eval,
        lstm.train,
        setting(lstm, "dropout", 0.0),
        setting(lstm, "weight_ih_l0", new(16, 4)),
        layer.eval,
        setting(layer.self_attn, "num_heads", 1),
        setting(layer, "norm_first", True),
        setting(layer, "activation", torch.tanh),
        layer.train,
        setting(layer.dropout1, "p", 0.0),
    )


# ----- modules -----------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.lists = nn.ModuleList([nn.Linear(4, 4), nn.Tanh()])
        self.dicts = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Dropout(0.5)})
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))])
        self.register_buffer("scale", torch.full((4,), 2.0))
        self.skip = None

    def forward(self, x):
        for layer in self.lists:
            x = layer(x)
        for name in self.dicts:
            x = self.dicts[name](x)
        for w in self.weights:
            x = x * w
        x = x * self.scale if hasattr(self, "scale") else x
        return x if self.skip is None else x + self.skip(x)


@case
def parts_of_modules():
    m = Block()
    return (
        m,
        (X,),
        m.eval,
        m.train,
        lambda: m.dicts["b"].eval(),
        lambda: m.lists.append(nn.Linear(4, 4)),
        lambda: m.lists.__setitem__(1, nn.ReLU()),
        lambda: m.dicts.update({"c": nn.Sigmoid()}),
        lambda: m.dicts.pop("b"),
        setting(m, "skip", nn.Linear(4, 4)),
        setting(m, "skip", m.lists[0]),
        setting(m, "skip", None),
        lambda: m.weights.append(new(4)),
        lambda: m.weights.__setitem__(0, new(4)),
        setting(m, "scale", torch.full((4,), 3.0)),
        setting(m, "scale", torch.full((1,), 3.0)),
        lambda: m.register_buffer("scale", torch.full((4, 1, 4), 5.0)),
        lambda: delattr(m, "scale"),
        lambda: m.register_buffer("scale", torch.full((4,), 7.0)),
        lambda: setattr(m.lists[0], "bias", None),
        lambda: m.lists[0].weight.requires_grad_(False),
        lambda: m.lists[0].weight.data.mul_(3),
        lambda: setattr(m.lists[0].weight, "data", torch.ones(4, 4)),
        lambda: setattr(m.lists[0].weight, "data", torch.arange(16.0).view(4, 4).t()),
        lambda: setattr(m.dicts["a"], "weight", m.lists[0].weight),
        lambda: setattr(m.dicts["a"], "weight", new(4, 4)),
        lambda: setattr(m, "forward", lambda x: x * 2),
    )


@case
def modules_changed_as_a_whole():
    m = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    return (
        lambda x: m(x.to(next(m.parameters()).dtype)),
        (X,),
        m.double,
        m.bfloat16,
        m.float,
        lambda: m.requires_grad_(False),
        lambda: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
        lambda: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}, assign=True),
        lambda: m.__setitem__(0, nn.Linear(4, 4, bias=False)),
        lambda: m.append(nn.Tanh()),
        lambda: m.insert(0, nn.Tanh()),
        lambda: m[1].register_forward_hook(lambda m, i, o: o * 2),
    )


@case
def hooks_of_modules():
    m = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    k, handles = SimpleNamespace(k=2.0), []

    def hook(m, i, o):
        return o * k.k

    def global_hook(m, i, o):
        return o + k.k if isinstance(m, nn.Linear) else None

    return (
        lambda x: m(x),
        (X,),
        lambda: handles.append(m[0].register_forward_hook(hook)),
        setting(k, "k", 3.0),
        lambda: handles.append(m[1].register_forward_pre_hook(lambda m, i: (i[0] * 5,))),
        lambda: handles.append(
            m.register_forward_hook(lambda m, i, kw, o: o - 1, with_kwargs=True)
        ),
        lambda: handles.pop(0).remove(),
        lambda: handles.append(nn.modules.module.register_module_forward_hook(global_hook)),
        setting(k, "k", 4.0),
        lambda: handles.pop().remove(),
        lambda: handles.append(
            nn.modules.module.register_module_forward_pre_hook(lambda m, i: (i[0] + 3,))
        ),
        lambda: [h.remove() for h in handles],
    )


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.k = 2.0

    def forward(self, w):
        return w * self.k


@case
def parametrizations_of_modules():
    m, d = nn.Linear(4, 4), Doubled()
    return (
        m,
        (X,),
        lambda: parametrize.register_parametrization(m, "weight", d),
        setting(d, "k", 3.0),
        lambda: parametrize.remove_parametrizations(m, "weight"),
        lambda: parametrizations.weight_norm(m),
    )


@case
def old_weight_norm():
    m = weight_norm(nn.Linear(4, 4))
    return (
        m,
        (X,),
        lambda: m.weight_g.data.mul_(2),
        lambda: setattr(m, "weight_g", new(4, 1)),
        lambda: nn.utils.remove_weight_norm(m),
    )


@case
def old_spectral_norm():
    m = spectral_norm(nn.Linear(4, 4)).eval()
    return m, (X,), lambda: m.weight_orig.data.mul_(2), m.train, m.eval


@case
def replaced_methods_of_classes():
    class Mine(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    m, old = Mine(4, 4), nn.Linear.forward
    return (
        m,
        (X,),
        setting(Mine, "forward", lambda self, x: x * 3),
        lambda: delattr(Mine, "forward"),
        setting(nn.Linear, "forward", lambda self, x: x * 4),
        setting(nn.Linear, "forward", old),
    )


@case
def distributions():
    box = SimpleNamespace(
        normal=torch.distributions.Normal(torch.zeros(4), torch.ones(4), validate_args=False)
    )
    return (
        lambda x: box.normal.log_prob(x),
        (X,),
        setting(
            box,
            "normal",
            torch.distributions.Normal(torch.ones(4), torch.ones(4), validate_args=False),
        ),
        setting(box.normal, "scale", torch.full((4,), 2.0)),
        setting(
            box,
            "normal",
            torch.distributions.Laplace(torch.ones(4), torch.ones(4), validate_args=False),
        ),
    )


@case
def learning_rate_of_an_optimizer():
    opt = torch.optim.SGD([new(4)], lr=0.5)
    return (
        lambda x: x * opt.param_groups[0]["lr"],
        (X,),
        lambda: opt.param_groups[0].__setitem__("lr", 0.25),
    )


# ----- arguments ---------------------------------------------------------------------------------


@case
def module_as_argument():
    m = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    return (
        lambda x, m: m(x),
        (X, m),
        m.eval,
        m.train,
        setting(m[1], "p", 0.25),
        lambda: setattr(m[0], "weight", new(4, 4)),
        lambda: m[0].weight.requires_grad_(False),
        lambda: m.append(nn.Tanh()),
        lambda: m[0].register_forward_hook(lambda m, i, o: o * 2) and None,
    )


@case
def objects_as_arguments():
    c, p = Config(), Plain(nn.Dropout(0.5))
    return (
        lambda x, c, ps: ps[0](x) * c.inner.rate + sum(c.inner.sizes) + c.scale,
        (X, c, [p]),
        setting(c, "scale", 5.0),
        setting(c.inner, "rate", 5.0),
        lambda: c.inner.sizes.append(4),
        p.m.eval,
        setting(p, "own", 7.0),
        setting(Plain, "count", 1),
        setting(c, "inner", Inner(11.0)),
    )


@case
def functions_as_arguments():
    k = 2.0

    def g(x):
        return x * k

    def set_k(value):
        nonlocal k
        k = value

    return (
        lambda x, g: g(x),
        (X, g),
        lambda: set_k(3.0),
        setting(g, "__code__", (lambda x: (x, k)[0]).__code__),
    )


def seeded(f, args):
    torch.manual_seed(0)
    return f(*args)


def kept_state(modules, f, args):
    """What ``f`` returns, with the buffers of the modules as they were before."""
    states = [(b, b.clone()) for m in modules for b in m.buffers()]
    result = seeded(f, args)
    for b, old in states:
        b.copy_(old)
    return result


def gradient(f):
    def of_first(x, *rest):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(f(x, *rest).sum(), x)[0]

    return of_first


def modules_in(f, args):
    found = [x for x in (f, *args) if isinstance(x, nn.Module)]
    cells = [c.cell_contents for c in getattr(f, "__closure__", None) or ()]
    return found + [x for x in cells if isinstance(x, nn.Module)]


@pytest.mark.filterwarnings("ignore:.*nn.utils.weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("name", CASES)
def test_changes_are_seen(name, compiler):
    torch.manual_seed(1)
    f, args, *changes = CASES[name]()
    compiled = COMPILERS[compiler](f)
    reference = f
    if compiler == "jit of grad":
        reference = gradient(f)

    def check(what):
        want = kept_state(modules_in(f, args), reference, args)
        got = kept_state(modules_in(f, args), compiled, args)
        assert_same(got, want)
        assert compiler == "jit of grad" or got.requires_grad == want.requires_grad, what

    with contextlib.ExitStack() as stack:
        state = {k: v for k, v in vars(state_helper).items() if not k.startswith("__")}
        stack.callback(lambda: vars(state_helper).update(state))
        check("at first")
        check("unchanged")
        for i, change in enumerate(changes):
            change()
            check(f"after change {i}")
            check(f"again after change {i}")


def test_threads_with_modules_of_one_architecture():
    nets = [Block().eval() for _ in range(4)]
    f, errors = jit(lambda x, m: m(x)), []

    def work(k):
        try:
            for i in range(60):
                m = nets[(i * k) % 4]
                assert_same(f(X, m), m(X))
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(k,)) for k in (1, 2, 3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors and len(f.entries) == 1


# ----- state that a function changes itself ------------------------------------------------------


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls, self.seen, self.counts = 0, [], {"n": 0}

    def forward(self, x):
        self.calls += 1
        self.seen.append(1)
        self.counts["n"] += 1
        return x * 2


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_counter_that_nothing_reads_is_no_reason_to_capture_again(compiler):
    m = Counting()
    f = COMPILERS[compiler](m)
    for _ in range(5):
        f(X)
    assert m.calls == len(m.seen) == m.counts["n"] <= 2


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.filterwarnings("error")
def test_a_counter_that_is_read(compiler):
    def make():
        box = SimpleNamespace(n=0, flag=True)

        def f(x):
            box.n += 1
            box.flag = not box.flag
            return x * box.n + (1 if box.flag else -1)

        return f

    f = COMPILERS[compiler](make())
    want = make() if compiler != "jit of grad" else gradient(make())
    for _ in range(6):
        assert_same(f(X), want(X))


@pytest.mark.parametrize("compiler", COMPILERS)
def test_caches_filled_at_the_first_call(compiler):
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.ready, self.sizes, self.runs = False, {}, 0

        def forward(self, x):
            self.runs += 1
            if not self.ready:
                self.factor, self.ready = 3.0, True
            n = x.shape[-1]
            if n not in self.sizes:
                self.sizes[n] = 1 / n
            return x * self.factor * self.sizes[n]

    m, plain = Lazy(), Lazy()
    f = COMPILERS[compiler](m)
    want = gradient(plain) if compiler == "jit of grad" else plain
    for x in (X, X, X, X[:, :2].clone(), X, X[:, :2].clone(), X):
        assert_same(f(x), want(x))
    assert m.runs <= 6


def test_the_warning_names_what_changes():
    box = SimpleNamespace(n=0)

    def f(x):
        box.n = box.n + 1
        return x * box.n

    g = jit(f)
    with pytest.warns(UserWarning, match=r"captured 64 times.*box\.n, keeps changing"):
        for _ in range(70):
            g(X)
    assert not g.entries and "box.n" in g.explain()


# ----- explain -----------------------------------------------------------------------------------


@pytest.mark.parametrize("compiler", ["jit", "aot_function", "aot_module"])
def test_explain(compiler):
    m = Scaled()
    f = COMPILERS[compiler](m)
    f(X)
    text = repr(f.explain())
    for line in (
        "argument x: float32[3, 4]",
        ".beta == 0.5",
        ".layer.weight: float32[4, 4], requires grad",
    ):
        assert line in text
    assert "captured 1 time, 1 entry" in text and "captured last" not in text
    m.beta = 0.25
    f(X)
    assert f.explain().count("captured last because") == 1
    assert ".beta was 0.5, and is 0.25" in f.explain()
    m.eval()
    f(X)
    assert ".training was True, and is False" in f.explain()
    f(X[:2].clone())
    assert "argument x was float32[3, 4], and is float32[2, 4]" in f.explain()
    with torch.no_grad():
        f(X)
    assert "grad mode was True, and is False" in f.explain()
    helper = state_helper.helper
    g = COMPILERS[compiler](lambda x: through(x))
    g(X)
    try:
        state_helper.helper = lambda x: x
        g(X)
    finally:
        state_helper.helper = helper
    assert "helper was helper at state_helper.py" in g.explain()


def test_explain_says_the_options_of_transforms_and_not_how_they_are_entered():
    f = jit(vmap(grad(lambda x: x.sin().sum()), in_dims=1))
    f(torch.ones(2, 3))
    text = f.explain()
    assert ".in_dims == 1" in text and ".argnums == 0" in text
    assert "in_graph" not in text and "dynamo" not in text


def test_attributes_of_any_name():
    """Python 3.13 loads two local variables by one instruction."""
    by_name = lambda o, name: getattr(o, name, None)
    by_constant = lambda o: getattr(o, "name", None)
    assert reads_of(by_name.__code__).any_name and not reads_of(by_constant.__code__).any_name


@pytest.mark.parametrize("module", [collections, contextlib, dataclasses, dis, enum, types])
def test_instructions_are_those_of_dis(module):
    named = {*dis.hasname, *dis.haslocal, *dis.hasfree}

    def check(code):
        steps = [i for i in dis.get_instructions(code) if type(i.argval) is not tuple]
        expected = [(i.opname, i.argval) for i in steps if i.opcode in named]
        found = [(i.opname, i.argval) for i in instructions_of(code)]
        # one instruction for two locals is two
        assert [i for i in found if i in expected] == expected
        for const in code.co_consts:
            if isinstance(const, types.CodeType):
                check(const)

    check(compile(inspect.getsource(module), module.__file__, "exec"))
