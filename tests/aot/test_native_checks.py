"""Native checks of the state come to the same end as the Python ones that they are made of."""

import contextlib
import contextvars
import copy
import functools
import gc
import os
import random
import resource
import sys
import threading
import types
import weakref
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from aotfunc import jit
from aotfunc.runtime.guards import check, native
from aotfunc.runtime.guards.check import Check
from aotfunc.runtime.guards.objects import Attributes
from aotfunc.runtime.guards.reads import Names
from aotfunc.runtime.guards.state import look
from tests.aot import test_guards
from tests.aot.test_guards import CASES

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*nn.utils.weight_norm. is deprecated:FutureWarning"),
    # the tests put lists in the place of what is an index
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence for multidimensional indexing"),
]


def outcome(run, *args):
    """What a check finds, by identity, or raises."""
    try:
        found = run(*args)
    except Exception as e:
        return type(e), str(e)
    return None if found is None else [*map(id, found)]


class Both:
    """The check of a state in both forms; neither asks the other."""

    def __init__(self, f):
        self.f = f
        self.state = look(f, (), (), Names())
        made = Check(self.state)
        parts = (made.source, self.state.lines, self.state.paths)
        self.python = made.python
        self.native = native.native_check(*parts, lambda f, objects: None, made.space)

    def agree(self):
        """Whether the state is the same, as both say."""
        want, got = outcome(self.python, self.f, ()), outcome(self.native, self.f, ())
        if isinstance(want, tuple):  # an error: then the native check leaves the word to Python
            want = None
        assert got == want
        return want is not None


@pytest.fixture
def compared(monkeypatch):
    """Every check of a compiled function is native, and compared with the Python one."""
    real, found = native.native_check, []

    def native_check(source, lines, paths, python, space):
        quick = real(source, lines, paths, lambda f, objects: None, space)

        def both(f, objects):
            want = outcome(python, f, objects)
            assert quick is None or outcome(quick, f, objects) == want
            return python(f, objects)

        found.append(quick is not None)
        return both

    monkeypatch.setattr(check, "MANY", 1)
    monkeypatch.setattr(check, "LARGE", 1)
    monkeypatch.setattr(native, "native_check", native_check)
    return found


@pytest.mark.parametrize("name", CASES)
def test_all_changes_that_guards_are_tested_with(compared, name):
    test_guards.test_changes_are_seen(name, "jit")
    assert compared


# ----- every fact changed in turn ----------------------------------------------------------------


def network():
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    net = nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.Flatten(), layer, nn.Dropout())
    net.register_forward_hook(lambda m, i, o: o * 2)
    return net, ()


def others(x):
    """Other values than ``x``, and one that is equal."""
    yield from (None, True, 0, "forward", object(), torch.ones(2), {}, [], nn.Linear(1, 1))
    if type(x) in (float, list, dict):
        yield float.fromhex(x.hex()) if type(x) is float else copy.copy(x)


def changes(owner, before):
    """What can be done to an entry of what the check looks into: ``state.owners`` says how it
    was."""
    for k in random.Random(0).sample([*before], min(len(before), 20)):
        for x in others(before[k]):
            yield lambda k=k, x=x: put(owner, k, x)
        yield lambda k=k: drop(owner, k)
    if hasattr(owner, "append"):
        yield lambda: owner.append(None)
    elif isinstance(owner, dict | Attributes):
        for k in ("forward", "another", "x"):
            yield lambda k=k: put(owner, k, None)


def put(owner, key, x):
    if type(owner) is types.CellType:
        owner.cell_contents = x
    else:
        owner[key] = x


def drop(owner, key):
    if type(owner) is types.CellType:
        del owner.cell_contents
    else:
        del owner[key]


def restore(owner, before):
    if hasattr(owner, "append"):
        owner.clear()
        owner.extend(before.values())
    elif isinstance(owner, dict):
        owner.clear()
        owner.update(before)
    elif type(owner) is types.CellType:
        for x in before.values():
            owner.cell_contents = x
        if not before:
            del owner.cell_contents
    else:
        for k, x in owner.items():
            if k not in before:
                del owner[k]
            elif x is not before[k]:
                owner[k] = before[k]
        for k in before.keys() - dict(owner.items()).keys():
            owner[k] = before[k]


class Fixed:
    __slots__ = ("x",)

    def __init__(self):
        self.x = 2.0


def many_kinds():
    """What is reached in other ways than through dictionaries and attributes."""
    space, fixed, box = SimpleNamespace(k=2.0, more=[1, 2.5]), Fixed(), OrderedDict(a=1.0)
    part, where = functools.partial(torch.add, alpha=2), contextvars.ContextVar("where")
    array, config, late, getenv = np.arange(3.0), test_guards.Config(), [], os.getenv

    def f(x):
        late.append(1)
        more = space.k + space.more[1] + fixed.x + box["a"] + array[1] + config.scale
        return part(x, x) * more * where.get(1.0) * float(getenv("NONE", "2"))

    return f, ()


@pytest.mark.parametrize(
    "make", [network, many_kinds, *CASES.values()], ids=lambda make: make.__name__
)
def test_every_entry_changed(make):
    f, *_ = make()
    both = Both(f)
    if both.native is None:
        pytest.skip("most of it stays Python")
    assert both.agree()
    for owner, _, before in both.state.owners:
        for change in changes(owner, before):
            try:
                with contextlib.suppress(AttributeError, TypeError):  # a slot, a read-only part
                    change()
                    both.agree()
            finally:
                restore(owner, before)
            assert both.agree()


METADATA = {
    "requires_grad": lambda t: t.requires_grad_(not t.requires_grad),
    "shape": lambda t: setattr(t, "data", torch.ones(3)),
    "strides": lambda t: setattr(t, "data", torch.ones(t.shape[::-1]).T),
    "dtype": lambda t: setattr(t, "data", t.data.double()),
    "class": lambda t: setattr(t, "__class__", torch.nn.Buffer),
    "an attribute": lambda t: setattr(t, "name_of_mine", 1),
    "values": lambda t: t.data.add_(1),
}


@pytest.mark.parametrize("what", METADATA)
def test_metadata_of_tensors(what):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    both = Both(net)
    assert both.agree()
    METADATA[what](net[0].weight)
    assert both.agree() == (what in ("an attribute", "values"))


class Fields(nn.Module):
    def forward(self, x, bias=2.0):
        return x * self.scale + bias

    scale = 1.0


def test_modules_changed_as_a_whole():
    net = nn.Sequential(Fields(), nn.Linear(3, 3))
    both = Both(net)
    assert both.agree()

    class Other(Fields):
        pass

    m, fields = net[0], net[0].__dict__
    m.__class__ = Other
    assert not both.agree()
    m.__class__ = Fields
    assert both.agree()
    m.__dict__ = dict(fields)
    assert both.agree()  # all of it is the same
    m.__dict__ = {**fields, "training": False}
    assert not both.agree()
    m.__dict__ = fields
    for name, x in (("__code__", (lambda self, x: x).__code__), ("__defaults__", (3.0,))):
        old = getattr(Fields.forward, name)
        setattr(Fields.forward, name, x)
        assert not both.agree()
        setattr(Fields.forward, name, old)
        assert both.agree()
    linear, forward = nn.Linear, nn.Linear.forward
    linear.forward = lambda self, x: forward(self, x)
    try:
        assert not both.agree()
    finally:
        linear.forward = forward
    net.register_forward_hook(lambda m, i, o: o).remove()
    assert both.agree()
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: o)
    assert not both.agree()
    handle.remove()
    net[1].weight = nn.Parameter(torch.ones(3, 3))  # another tensor of the same kind
    assert both.agree()


def test_classes_that_look_up_their_fields_in_another_way():
    class Hidden(nn.Module):
        def __getattribute__(self, name):
            return nn.Module.__getattribute__(self, name)

    class Shown(nn.Module):
        __dict__ = property(lambda self: {})

    for cls in (Hidden, Shown, type, type(Hidden.forward), type(torch)):
        assert not native.has_plain_fields(cls)
    for cls in (nn.Module, Fields, test_guards.Plain, nn.Parameter, torch.Tensor):
        assert native.has_plain_fields(cls)


# ----- how it is called --------------------------------------------------------------------------


def deep(n=40):
    return nn.Sequential(*[nn.Linear(2, 2) for _ in range(n)])


def test_native_after_many_calls(monkeypatch):
    monkeypatch.setattr(check, "MANY", 5)
    net, x = deep(), torch.ones(1, 2)
    f = jit(net)
    for _ in range(8):
        f(x)
    (entry,) = f.entries.values()
    assert entry.check.native and f.captures == 1
    net[3].weight = nn.Parameter(torch.zeros(2, 2))
    torch.testing.assert_close(f(x), net(x))
    net[3].eval()
    torch.testing.assert_close(f(x), net(x))
    small = Check(look(nn.Linear(2, 2), (), (), Names()))
    assert small.tensors is small.python


def test_renewed():
    """For the objects of an equal state."""
    first, second = deep(), deep()
    of = Check(look(first, (), (), Names()))
    state = look(first, (), (), Names())
    of.quicken(state.lines, state.paths)
    assert of.native and of.tensors(first, ()) is not None
    of.renew(look(second, (), (), Names()))
    assert of.native
    assert {*map(id, of.tensors(second, ()))} == {*map(id, second.parameters())}


def test_python_where_there_is_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("AOTFUNC_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(native, "steps_of", native.steps_of.__wrapped__)
    state = look(deep(), (), (), Names())
    of = Check(state)
    of.quicken(state.lines, state.paths)
    assert not of.native and of.tensors is of.python


def test_errors():
    """One that the check does not expect is the Python check's, and an interrupt gets through."""
    net = deep()
    both = Both(net)

    def python(f, objects):
        raise RuntimeError("the Python check")

    made = Check(both.state)
    of = native.native_check(made.source, both.state.lines, both.state.paths, python, made.space)
    assert of(net, ()) is not None
    for args in ((None, ()), (net[0], ())):
        with pytest.raises(RuntimeError, match="the Python check"):
            of(*args)
    for args in ((), (net,), (net, (), ())):
        with pytest.raises(TypeError):
            of(*args)

    def interrupted(*tensors):
        raise KeyboardInterrupt

    space = {**made.space, "alike": interrupted}
    of = native.native_check(made.source, both.state.lines, both.state.paths, python, space)
    with pytest.raises(KeyboardInterrupt):
        of(net, ())


def test_nothing_is_kept():
    net = deep()
    both = Both(net)
    objects = [net, net.__dict__, net[0], net[0].__dict__, net[0].weight, net[0]._parameters]
    counts = [sys.getrefcount(x) for x in objects]
    for _ in range(2):  # the first time memory may grow
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(3000):
            assert both.native(net, ()) is not None
            assert both.native(net[0], ()) is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1000  # KiB
    assert counts == [sys.getrefcount(x) for x in objects]


def test_a_check_goes_with_its_function():
    net = deep()
    both = Both(net)
    gone = weakref.ref(net[5])
    del net, both.f, both.state
    gc.collect()
    assert gone() is None and both.native(None, ()) is None


def test_changed_by_other_threads():
    """What is being looked at may go at any time."""
    net, done, found = deep(10), threading.Event(), []
    both = Both(net)

    def change():
        while not done.is_set():
            net[3].weight = nn.Parameter(torch.ones(2, 2))
            net[4] = nn.Linear(2, 2)
            net[5].__dict__ = dict(net[5].__dict__)

    def look_at():
        for _ in range(3000):
            found.append(both.native(net, ()))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        lookers = [threading.Thread(target=look_at) for _ in range(2)]
        changer = threading.Thread(target=change)
        for t in (changer, *lookers):
            t.start()
        for t in lookers:
            t.join()
    finally:
        done.set()
        changer.join()
        sys.setswitchinterval(interval)
    assert any(found) and all(x is None or len(x) == 20 for x in found)
