"""Results that are containers of classes of their own: they are of that class, with the items and
attributes that the function gave them, however the class shows these."""

from collections import ChainMap, OrderedDict, UserDict, UserList, defaultdict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from aotfunc import aot_function, aot_module, jit
from aotfunc.errors import CaptureError
from tests.reference import assert_same


class Names(dict):
    def __getattr__(self, name: str) -> Any:
        return self[name]


class Itself(dict):
    """Items are attributes."""

    def __init__(self, **items: Any) -> None:
        super().__init__(items)
        self.__dict__ = self


class Both(OrderedDict):
    """As the outputs of transformers: items are kept as attributes, too."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        super().__setattr__(name, value)


class Batch(UserDict):
    def __init__(self, data: dict, tag: str) -> None:
        super().__init__(data)
        self.tag = tag


class Doubling(dict):
    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value * 2)


class Hiding(list):
    def __iter__(self) -> Any:
        return iter(())


class Silent(dict):
    items = values = __iter__ = lambda self: iter(())


class Short(tuple):
    def __len__(self) -> int:
        return 0


class Tagged(list):
    tag = "class"


class Pair(tuple):
    def __new__(cls, a: Any, b: Any) -> Any:
        return super().__new__(cls, (a, b))


class Slotted(tuple):
    __slots__ = ()


class Scores(NamedTuple):
    best: Any
    rest: Any

    def total(self) -> Tensor:
        return self.best + self.rest


def doubling(y, z):
    d = Doubling()
    d["y"], d["n"] = y, 3
    return d


def moved(y, z):
    d = Both(y=y, z=z)
    OrderedDict.move_to_end(d, "y")
    return d


def both(y, z):
    d = Both()
    d.y, d.count = y, 3
    return d


def tagged(y, z):
    x = Tagged([y, z])
    x.tag = {"mine": z}
    return x


def twice(y, z):
    d = Names(y=y)
    return [d, d, Tagged([d])]


MADE = {
    "dict": lambda y, z: Names(y=y, z=z, n=3),
    "keys": lambda y, z: Names({(1, "a"): y, torch.float32: z}),
    "its own attributes": lambda y, z: Itself(y=y, z=z),
    "attributes, too": both,
    "in another order": moved,
    "__setitem__": doubling,
    "list": lambda y, z: Tagged([y, 3, z]),
    "list with an attribute": tagged,
    "hidden items": lambda y, z: [Hiding([y, z]), Silent(y=y)],
    "tuple": lambda y, z: Pair(y, z),
    "no length": lambda y, z: Short([y, z]),
    "slots without names": lambda y, z: Slotted([y, z]),
    "named tuple": lambda y, z: Scores(y, z),
    "UserDict": lambda y, z: UserDict(y=y, z=z),
    "of UserDict": lambda y, z: Batch({"y": y}, "tag"),
    "UserList": lambda y, z: UserList([y, z]),
    "ChainMap": lambda y, z: ChainMap({"y": y}, {"z": z}),
    "nested": lambda y, z: Names(y=Tagged([Pair(y, {"z": z}), Names()])),
    "twice": twice,
    "of a tensor from outside": lambda y, z: Names(y=y, net=NET.weight),
}
NET = nn.Linear(2, 2)


def told(x):
    """Everything that there is in a result."""
    if isinstance(x, Tensor):
        return x.detach().clone(), x.requires_grad
    base = next((c for c in (OrderedDict, dict, list, tuple) if isinstance(x, c)), None)
    state = getattr(x, "__dict__", {})
    items: Any = x if base is None else ()
    if base in (list, tuple):
        items = [*map(told, base.__iter__(x))]
    elif base is not None:
        items = [(k, told(v)) for k, v in base.items(x)]
    if isinstance(x, UserDict | UserList | ChainMap):
        items = None
    own = state is x
    return type(x).__name__, own, items, [] if own else [(k, told(v)) for k, v in state.items()]


class Module(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make, self.scale = make, nn.Parameter(torch.tensor([2.0, 3.0]))

    def forward(self, x):
        return self.make((x * self.scale).sin(), x + self.scale)


WAYS = {"jit": jit, "aot_function": aot_function, "aot_module": aot_module}


@pytest.mark.parametrize("backend", ["eager", "cpp"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MADE)
def test_the_class_and_what_is_in_it(name, way, backend):
    m, made = Module(MADE[name]), []
    compiled = WAYS[way](m, backend)
    for k in range(3):
        x = torch.tensor([0.5, 1.0]) + k
        made.append(compiled(x))
        assert_same(told(made[-1]), told(m(x)))
    assert len({*map(id, made)}) == 3


def test_gradients_and_identity():
    f = jit(twice)
    y = torch.ones(2, requires_grad=True)
    first, second, (third,) = f(y * 2, y)
    assert first is second is third and type(third) is Names
    first.y.sum().backward()
    assert y.grad.tolist() == [2, 2]
    d = jit(lambda x: Itself(x=x * 2))(y)
    d.more = 3
    assert d["more"] == 3
    given = Names(y=y)
    assert jit(lambda d: d)(given) is given


@pytest.mark.parametrize("cls", [dict, OrderedDict])
def test_keys_that_are_tensors_are_those_of_the_call(cls):
    m = Module(None)
    f = jit(lambda x, y: cls([(x, y * 2), ((1, m.scale), {m.scale: x}), (y + 1, "n")]))
    for _ in range(3):
        x, y = torch.randn(2, 2)
        m.scale = nn.Parameter(torch.zeros(2))
        got = f(x, y)
        assert type(got) is cls
        first, (one, second), third = got
        assert first is x and one == 1 and second is m.scale
        assert_same((third, got[x], [*got.values()][1:]), (y + 1, y * 2, [{m.scale: x}, "n"]))
    f = jit(lambda x, y: [{x: y}] * 2)
    a, b = f(x, y)
    assert a is b and [*a] == [x]


class Copied(dict):
    def __reduce__(self) -> Any:
        return Copied, ()


class Extra(dict):
    __slots__ = ("extra",)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda y: Copied(y=y), "returns a Copied that holds tensors"),
        (lambda y: Extra(y=y), "returns a Extra that holds tensors"),
        (lambda y: Names({y: 1}), "returns a Names that holds tensors"),
        (lambda y: defaultdict(list, {y: 1}), "defaultdict with tensors as keys .*list of pairs"),
        (lambda y: {y}, "returns a set that holds tensors"),
    ],
)
def test_refused(make, words):
    with pytest.raises(CaptureError, match=words):
        jit(lambda x: make(x * 2))(torch.ones(2))
