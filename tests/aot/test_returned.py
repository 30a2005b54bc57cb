"""Objects that a compiled function returns, and keeps outside, are those of eager: what is there
already itself, what it makes another one at each call."""

import collections
import dataclasses
import functools

import numpy as np
import pytest
import torch
from torch import nn

from aotfunc import aot_module, jit
from aotfunc.capture.instances import flatten_tree
from aotfunc.errors import CaptureError
from tests.aot.compiled_by import COMPILERS, every_compiler
from tests.reference import assert_same

X = torch.linspace(-1.0, 1.5, 4, dtype=torch.float64)


class Plain:
    pass


class Slotted:
    __slots__ = ("__hidden", "count", "state")

    def __init__(self):
        self.state, self.count, self.__hidden = None, 1, X * 0

    def step(self, x):
        self.__hidden = self.__hidden + x
        return self.__hidden


class MoreSlots(Slotted):
    __slots__ = ("more",)


@dataclasses.dataclass
class Pair:
    a: object
    b: object = None


@dataclasses.dataclass(slots=True)
class SlottedPair:
    a: object = None
    b: object = None


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    a: object = None


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4, dtype=torch.float64)
        self.table, self.rows, self.box = {"k": X * 2, "n": {"deep": X}}, [X, X + 1], Plain()
        self.pair, self.last, self.other = Pair(X, [X]), None, None


# ----- what is there outside ---------------------------------------------------------------------

#: of a module: what is returned, and which of the things outside that is
REACHED = {
    "dictionary": (lambda m, x: m.table, lambda m: m.table),
    "nested": (lambda m, x: m.table["n"], lambda m: m.table["n"]),
    "list": (lambda m, x: m.rows, lambda m: m.rows),
    "module": (lambda m, x: m.lin, lambda m: m.lin),
    "object": (lambda m, x: m.box, lambda m: m.box),
    "data": (lambda m, x: m.pair, lambda m: m.pair),
    "in data": (lambda m, x: m.pair.b, lambda m: m.pair.b),
}


@every_compiler
@pytest.mark.parametrize("name", REACHED)
def test_an_object_from_outside_is_itself(compiler, name):
    """Of each of two modules that share an entry, and after what was there has been replaced."""
    returned, expected = REACHED[name]
    f = COMPILERS[compiler](
        lambda m, x: (returned(m, x), [x * 2, returned(m, x)], Pair(x, returned(m, x)))
    )
    nets = [Net(), Net()]
    for m in (*nets, *nets):
        one, (twice, another), pair = f(m, X)
        assert one is expected(m) and another is one and pair.b is one
        assert_same((twice, pair.a), (X * 2, X))
        m.table, m.rows, m.box = {**m.table, "n": dict(m.table["n"])}, [*m.rows], Plain()
        m.pair = Pair(X, [X])


@every_compiler
def test_a_container_that_is_an_argument(compiler):
    def f(d, pair, *rest):
        return d, d["l"], pair, (pair.b, d["x"] * 2), rest[0]

    g = COMPILERS[compiler](f)
    for k in range(3):
        d, pair, rest = (
            {"l": [X, X + k], "x": X * k},
            Pair(X, (X, [X])),
            collections.OrderedDict(a=X),
        )
        out = g(d, pair, rest)
        assert (
            out[0] is d
            and out[1] is d["l"]
            and out[2] is pair
            and out[3][0] is pair.b
            and out[4] is rest
        )
        assert_same(out[3][1], X * k * 2)


@every_compiler
def test_what_is_written_into_what_is_returned(compiler):
    """The caller's container is changed, by the function and by the caller; a second call sees
    both."""
    pairs = []
    for call in (COMPILERS[compiler], lambda f: f):
        rows, table, seen = [X * 0, X * 0 + 1], {"k": X * 0}, []

        def f(x, rows=rows, table=table):
            rows[0] = rows[0] + x
            table["k"] = table["k"] * 2 + x
            return rows, table, x * 2

        f = call(f)
        for k in range(4):
            out = f(X + k)
            assert out[0] is rows and out[1] is table
            seen.append([t.clone() for t in (*rows, *table.values(), out[2])])
            out[0][1] = X * k
        pairs.append(seen)
    assert_same(*pairs)


def moved_in_a_list(m, x):
    m.rows.pop(0)
    m.rows.append(x * 2)
    return m.rows[0] + x


def swapped(m, x):
    m.last, m.other = m.other, m.last
    return x if m.last is None else x + m.last


def swapped_containers(m, x):
    m.rows, m.more = m.more, m.rows
    return m.rows[0] + x


def rotated(m, x):
    m.queue.append(x * 2)
    return m.queue[0] + x


def kept_and_returned(m, x):
    m.last = [x * 2, {"x": x}]
    m.other = m.last
    return m.last


def kept_data(m, x):
    m.last = Pair(x * 2, m.rows)
    return x


def kept_container_of_an_argument(m, x):
    m.last = {"rows": m.rows, "x": x * 3}
    return m.last["x"]


CHANGES = [moved_in_a_list, swapped, swapped_containers, rotated, kept_and_returned, kept_data]
CHANGES += [kept_container_of_an_argument]


@every_compiler
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_is_moved_or_bound_outside(compiler, change):
    seen = []
    for call in (COMPILERS[compiler], lambda f: f):
        m = Net()
        m.more, m.queue = [X - 1, X], collections.deque([X, X + 1], maxlen=2)
        m.last, m.other = (X * 3, X * 5) if change is swapped else (None, None)
        f, mine = call(change), []
        rows = m.rows
        for k in range(4):
            out = f(m, X + k)
            same = [
                out is m.last,
                m.last is m.other,
                m.rows is rows,
                getattr(m.last, "b", None) is rows,
            ]
            held = (m.rows, m.more, list(m.queue), m.last, m.other)
            mine.append((out, [vars(x) if isinstance(x, Pair) else x for x in held], same))
        seen.append(mine)
    assert_same(*seen)


LOG: list = []


@every_compiler
def test_what_is_only_added_to(compiler):
    """Logs are not looked at, whatever is in them; they get what eager gives them, without another
    capture."""
    seen = []
    for call in (COMPILERS[compiler], lambda f: f):
        m, log, recent = Net(), [], collections.deque([X, X + 1], maxlen=2)
        m.log, m.table = [0.5], {}
        LOG.clear()

        def f(x, m=m, log=log, recent=recent):
            LOG.append((x * 2, "twice"))
            m.log.append(x)
            m.log.extend([x + 1, x + 2])
            m.table.update(last=x * 3)
            log.insert(0, x * 4)
            recent.append(x * 5)
            return x

        f, mine = call(f), []
        for k in range(5):
            x = (X + k).requires_grad_()
            f(x)
            (g,) = torch.autograd.grad(LOG[-1][0].sum(), x)
            mine.append(
                ([*LOG], [*m.log], dict(m.table), [*log[:2]], [*recent], m.log[-3] is x, g)
            )
            if k == 2:
                del LOG[:2], log[:]
        seen.append(mine)
    assert_same(*seen)


@every_compiler
def test_a_log_is_not_looked_at(compiler):
    log: list = []

    def f(x):
        log.append(x * 2)
        return x

    g = COMPILERS[compiler](f)
    for k in range(5):
        g(X + k)
    assert g.captures == 1
    assert_same(log, [(X + k) * 2 for k in range(5)])


# ----- slots -------------------------------------------------------------------------------------


@every_compiler
@pytest.mark.parametrize("cls", [Slotted, MoreSlots, SlottedPair, Frozen, Plain])
@pytest.mark.parametrize("passed", [True, False])
def test_attributes_of_slots(compiler, cls, passed):
    if passed and dataclasses.is_dataclass(cls):
        pytest.skip(
            "one that holds tensors is a tree, and made anew: what is assigned to it is refused"
        )
    name = "state" if issubclass(cls, Slotted) else "a"
    seen = []
    for call in (COMPILERS[compiler], lambda f: f):
        o = cls()
        object.__setattr__(o, name, None)

        def f(x, o=o):
            old = getattr(o, name)
            object.__setattr__(o, name, x * 2 if old is None else old + x)
            return x + o.step(x) if hasattr(o, "step") else x

        f, mine = call(f), []
        for k in range(4):
            x = (X + k).requires_grad_()
            out = f(x, o) if passed else f(x)
            (g,) = torch.autograd.grad((getattr(o, name) * out).sum(), x, retain_graph=True)
            mine.append((out, getattr(o, name), g))
        seen.append(mine)
    assert_same(*seen)


def test_a_capture_that_fails_leaves_slots_and_sequences_as_they_were():
    o, rows, queue = Slotted(), [X, X + 1], collections.deque([X, X + 1], maxlen=2)
    before = (o.state, *rows, *queue)

    def f(x):
        o.state = x
        rows.pop(0)
        rows.append(x)
        queue.append(x)
        return float((x + queue[0]).sum())

    with pytest.raises(CaptureError, match="asked for"):
        jit(f)(X)
    assert all(a is b for a, b in zip((o.state, *rows, *queue), before, strict=True))


# ----- what the function makes -------------------------------------------------------------------

MADE = {
    "array": (lambda: np.arange(3.0), lambda a: a.__setitem__(0, 7)),
    "array of objects": (lambda: np.array([1, "a"], dtype=object), lambda a: a.__setitem__(0, 7)),
    "list": (lambda: [1, "a", [2]], lambda a: a[2].append(7)),
    "dictionary": (lambda: {"a": 1, "b": {}}, lambda a: a["b"].update(c=7)),
    "set": (lambda: {1, 2}, lambda a: a.add(7)),
    "counter": (lambda: collections.Counter("aab"), lambda a: a.update("z")),
    "queue": (lambda: collections.deque([1, 2]), lambda a: a.append(7)),
    "bytes": (lambda: bytearray(b"ab"), lambda a: a.extend(b"c")),
    "instance": (lambda: made_instance([1], {"k": np.zeros(2)}), lambda a: a.a.append(7)),
    "slots": (lambda: SlottedPair([1], {2}), lambda a: a.a.append(7)),
    "partial": (lambda: functools.partial(max, [1, 2]), lambda a: a.args[0].append(7)),
}


def made_instance(a, b):
    x = Plain()
    x.a, x.b = a, b
    return x


def told(x):
    return repr(vars(x)) if isinstance(x, Plain) else repr(x)


@every_compiler
@pytest.mark.parametrize("name", MADE)
def test_an_object_made_inside_is_each_callers_own(compiler, name):
    make, change = MADE[name]
    f = COMPILERS[compiler](lambda x: (make(), x * 2, {"again": make()}))
    mine = []
    for _ in range(3):
        made, _, again = f(X)
        assert told(made) == told(make()) and type(made) is type(make())
        mine += [made, again["again"]]
        for x in mine[-2:]:
            change(x)
    assert len({*map(id, mine)}) == 6


def test_what_cannot_be_copied_is_refused():
    m = Net()
    scale = 2.0

    def closure(x):
        y = x * scale
        return lambda z: z * y

    refused = {
        "holds tensors": [
            closure,
            lambda x: functools.partial(torch.mul, x * 2),
        ],
        "cannot be copied": [lambda x: (x, m.table.keys()), lambda x: made_instance(m, 0)],
    }
    for match, functions in refused.items():
        for f in functions:
            with pytest.raises(CaptureError, match=match):
                jit(f)(X)


def test_an_instance_that_hides_tensors_is_not_left_outside():
    m = Net()

    def f(x):
        m.last = made_instance([x * 2], 0)
        return x

    with pytest.raises(CaptureError, match="leaves a Plain that holds tensors"):
        jit(f)(X)
    assert m.last is None


def test_what_does_not_change_may_be_one_object():
    f = jit(
        lambda x: (
            x,
            Net,
            torch.float32,
            len,
            3,
            "a",
            np.float32(2),
            x.shape,
            x.device,
            slice(1, 2),
            ...,
            None,
        )
    )
    for _ in range(2):
        assert f(X)[1:] == (
            Net,
            torch.float32,
            len,
            3,
            "a",
            np.float32(2),
            X.shape,
            X.device,
            slice(1, 2),
            ...,
            None,
        )


@every_compiler
def test_shapes_stay_shapes(compiler):
    kept = {}

    def f(x, shape, pair):
        kept["shape"] = x.shape
        return (
            x.expand(shape) * shape.numel(),
            x.shape,
            [shape, x.sum().shape],
            Pair(x * 2, pair.b),
        )

    g = COMPILERS[compiler](f)
    for shape in (torch.Size([2, 4]), torch.Size([3, 4]), torch.Size([2, 4])):
        out, own, shapes, pair = g(X, shape, Pair(X, shape[:1]))
        assert_same(out, X.expand(shape) * shape.numel())
        assert_same(pair.a, X * 2)
        found = [own, *shapes, pair.b, kept.pop("shape")]
        assert found == [X.shape, shape, (), shape[:1], X.shape]
        assert all(type(s) is torch.Size for s in found)


def test_aot_module_returns_what_is_the_modules():
    class Returns(Net):
        def forward(self, x):
            self.table["k"] = self.table["k"] + x
            return self, self.table, self.lin(x)

    m = Returns()
    f = aot_module(m, "eager")
    for k in range(1, 4):
        itself, table, out = f(X)
        assert itself is m and table is m.table
        assert_same((table["k"], out), (X * (2 + k), m.lin(X)))


# ----- the same object in several places ---------------------------------------------------------

KEPT = [1]


def lists(x):
    one = [x * 2]
    return [one, one, [x]], lambda r: r[0] is r[1] is not r[2]


def empty(x):
    return [[]] * 2, lambda r: r[0] is r[1]


def tables(x):
    one = {"a": x * 2}
    return (one, [(one,)], one["a"]), lambda r: r[0] is r[1][0][0] and r[2] is r[0]["a"]


def tuples(x):
    one = (x + 1,)
    return (one, {"b": one}, (), ()), lambda r: r[0] is r[1]["b"]


def data(x):
    one = Pair(x * 2, [x])
    return (one, [one], one.b), lambda r: r[0] is r[1][0] and r[0].b is r[2]


def objects(x):
    one = Pair(1)
    return (one, [one], {"c": one}, x + 1), lambda r: r[0] is r[1][0] is r[2]["c"]


def with_outside(x):
    one = [x]
    return [one, KEPT, [KEPT, one]], lambda r: r[0] is r[2][1] and r[1] is KEPT is r[2][0]


def with_argument(x, rows):
    one = [rows]
    return [one, rows, one], lambda r: r[0] is r[2] and r[0][0] is r[1]


@every_compiler
@pytest.mark.parametrize(
    "f", [lists, empty, tables, tuples, data, objects, with_outside, with_argument]
)
def test_what_is_in_a_result_twice_is_one_object(f, compiler):
    compiled = COMPILERS[compiler](lambda *args: f(*args)[0])
    given = [X] if f is with_argument else None
    args = (X,) if given is None else (X, given)
    want, holds = f(*args)
    assert holds(want)
    first, second = compiled(*args), compiled(*args)
    assert holds(first) and holds(second)
    assert_same(flatten_tree(first)[0], flatten_tree(want)[0])
    assert all(
        a is not b or a is KEPT or a is given
        for a, b in zip(first, second, strict=True)
        if a != ()
    )
