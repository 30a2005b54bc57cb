"""Libraries whose functions name hundreds of others, as those of models do: state is read of what
has run, and no result is stale."""

import importlib.util
import logging
import sys

import pytest
import torch

from aotfunc import aot_function, aot_module, grad, jit, vmap
from tests.reference import assert_same

COUNT = 400
SOURCE = """
import functools, logging
import torch
from torch import nn

SCALE, TABLE, EXPORTS = 2.0, {{}}, False
logger = logging.getLogger(__name__)

def decorated(f):
    @functools.wraps(f)
    def wrapper(*args, **kwargs):
        return f(*args, **kwargs)
    return wrapper

@decorated
def scaled(x):
    if EXPORTS:
        return f0(x)
    logger.debug("scaled")
    return x * SCALE + len(TABLE)

class Cache:
    def __init__(self, x):
        self.layers, self.kind = [Layer(x)], "dynamic"

class Layer:
    def __init__(self, x):
        self.keys, self.seen, self.empty = x, x.shape[0], None

class Store:
    def __init__(self):
        self.layers, self.updates = [Layer(torch.zeros(0))], 0

    def touch(self):
        self.updates += 1

    def update(self, x):
        layer = self.layers[0]
        layer.keys = torch.cat([layer.keys, x])
        return layer.keys

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.calls, self.last = nn.Parameter(torch.ones(3)), 0, None
        self.keeps = True

    def forward(self, x, store=None):
        self.calls += 1
        y = scaled(x) * self.w
        if store is not None:
            y = y + store.update(y).sum()
        if self.keeps:
            self.last = y
        return {{"y": y, "cache": Cache(y.exp())}}

{functions}
def f{count}(x):
    return x * THREE

THREE = 3.0
"""


@pytest.fixture
def library(tmp_path):
    folder = tmp_path / "site-packages"
    folder.mkdir()
    functions = "\n".join(f"def f{i}(x):\n    return f{i + 1}(x)\n" for i in range(COUNT))
    (folder / "largelibrary.py").write_text(SOURCE.format(functions=functions, count=COUNT))
    spec = importlib.util.spec_from_file_location("largelibrary", folder / "largelibrary.py")
    module = sys.modules["largelibrary"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["largelibrary"]


X = torch.arange(3.0)


def same(c, m):
    got, want = c(X), m(X)
    assert_same(got["y"], want["y"])
    assert_same(got["cache"].layers[0].keys, want["cache"].layers[0].keys)


def test_state_of_what_runs_is_never_stale(library):
    m = library.Model()
    c = aot_module(m, "eager")
    for _ in range(4):
        same(c, m)
    assert c._compiled.captures == 2 and len(c._compiled.entries) == 1
    library.SCALE = 5.0
    for _ in range(3):
        same(c, m)
    library.TABLE["k"] = 1
    same(c, m)
    with torch.no_grad():
        m.w.mul_(2)
    same(c, m)
    captures = c._compiled.captures
    library.THREE = 4.0  # no function that has run reads it
    same(c, m)
    assert c._compiled.captures == captures


@pytest.mark.parametrize("first", ["with a store", "without"])
def test_tensors_kept_in_an_argument(library, first):
    m = library.Model()
    c = aot_module(m, "eager")
    if first == "without":
        same(c, m)
    store, other = library.Store(), library.Store()
    with torch.no_grad():
        for _ in range(3):
            assert_same(c(X, store)["y"], m(X, store=other)["y"])
    assert_same(store.layers[0].keys, other.layers[0].keys)


def test_tensors_kept_in_what_is_closed_over(library):
    m = library.Model()
    store, other = library.Store(), library.Store()
    f = jit(lambda x: m(x, store)["y"], "eager")
    with torch.no_grad():
        for _ in range(3):
            assert_same(f(X), m(X, other)["y"])
    assert_same(store.layers[0].keys, other.layers[0].keys)


def test_a_counter_in_an_argument(library):
    m, store = library.Model(), library.Store()
    f = jit(lambda x, store: store.touch() or m(x)["y"], "eager")
    for _ in range(5):
        assert_same(f(X, store), m(X)["y"])
    assert f.captures <= 3


@pytest.mark.parametrize("keeps", [True, False])
def test_tensors_kept_in_a_module(library, keeps):
    m = library.Model()
    m.keeps = keeps
    c = aot_module(m, "eager")
    for _ in range(3):
        y = c(X)["y"]
        assert not m.keeps or torch.equal(m.last, y)
        m.keeps = True


def test_functions_that_run_later(library):
    old = sys.getrecursionlimit()
    sys.setrecursionlimit(10_000)
    m = library.Model()
    c = aot_module(m, "eager")
    for _ in range(3):
        same(c, m)
    library.EXPORTS = True
    for three in (3.0, 3.0, 3.0, 7.0, 3.0):
        library.THREE = three
        same(c, m)
    sys.setrecursionlimit(old)


def test_under_a_profiler_nothing_is_stale(library):
    m = library.Model()
    c = aot_module(m, "eager")
    seen = []
    sys.setprofile(lambda frame, event, arg: seen.append(event))
    try:
        for scale in (2.0, 2.0, 3.0):
            library.SCALE = scale
            same(c, m)
    finally:
        sys.setprofile(None)
    library.SCALE = 4.0
    for _ in range(3):
        same(c, m)
    assert seen and sys.getprofile() is None


def test_levels_of_loggers(library):
    log = logging.getLogger("largelibrary.chatty")
    f = jit(lambda x: x * (2 if log.isEnabledFor(logging.DEBUG) else 3))
    assert_same(f(X), X * 3)
    log.setLevel(logging.DEBUG)
    assert_same(f(X), X * 2)
    log.addHandler(logging.NullHandler())
    assert_same(f(X), X * 2)
    assert f.captures == 2


# ----- instances of plain classes as results -----------------------------------------------------


class Box:
    def __init__(self, x, more=None):
        self.x, self.more = x, more


class Counted(Box):
    made = 0

    def __init__(self, x):
        super().__init__(x, {"twice": [x * 2, 3], "name": "box"})
        Counted.made += 1

    def total(self):
        return self.x.sum() + self.more["twice"][0].sum()


@pytest.mark.parametrize("compiled", [jit, lambda f: aot_function(f, "eager")])
def test_instances_that_hold_tensors(compiled):
    f = compiled(lambda x: [Box(x * 2, Box(x + 1)), Box(None, None), x])
    for _ in range(3):
        x = torch.randn(3, requires_grad=True)
        first, second, same_x = f(x)
        assert type(first) is Box and type(first.more) is Box and second.x is None
        assert same_x is x
        assert_same([first.x, first.more.x], [x * 2, x + 1])
        (first.x * first.more.x).sum().backward()
        assert_same(x.grad, 4 * x.detach() + 2)
    assert f(x)[0] is not f(x)[0] and f(x)[1] is not f(x)[1]


def test_methods_and_what_init_does():
    f = jit(lambda x: Counted(x.sin()))
    found = [f(X * k) for k in range(3)]
    assert_same([b.total() for b in found], [3 * (X * k).sin().sum() for k in range(3)])
    assert found[0].more is not found[1].more and found[0].more["name"] == "box"


def test_one_instance_in_two_places():
    def f(x):
        box, alone = Box(x * 2), Box(x.exp())
        return {"first": box, "second": [box, Box(box)], "third": alone}

    out = jit(f)(X)
    assert out["first"] is out["second"][0] is out["second"][1].x
    assert_same([out["first"].x, out["third"].x], [X * 2, X.exp()])


def test_an_instance_that_holds_itself_is_refused():
    def f(x):
        box = Box(x * 2)
        box.more = box
        return box

    with pytest.raises(Exception, match="holds tensors"):
        jit(f)(X)


def test_an_instance_with_a_way_of_its_own_to_be_copied_is_refused():
    class Own(Box):
        def __deepcopy__(self, memo):
            return self

    with pytest.raises(Exception, match="holds tensors"):
        jit(lambda x: Own(x * 2))(X)


def test_a_warning_that_transformers_would_give():
    class Warning:
        def warn_if_padding_and_no_attention_mask(self, ids):
            if 0 in ids[:, [-1, 0]]:
                logging.getLogger(__name__).warning("padding")

    warning = Warning()

    def f(ids):
        warning.warn_if_padding_and_no_attention_mask(ids)
        return ids * 2

    ids = torch.tensor([[0, 1], [1, 2]])
    assert_same(jit(f)(ids), ids * 2)


def test_masks_that_transformers_would_leave_out():
    """A mask is applied whatever its values are; so does a batch whose samples differ."""
    space = {"__name__": "transformers.masking_utils"}
    exec("def masked(x, m): return x if m.all() else x.masked_fill(~m, 0.0)", space)
    masked, masks = space["masked"], torch.tensor([[True, True], [True, False]])
    x = torch.ones(2, requires_grad=True)
    compiled = jit(lambda x, m: masked(x, m).sin())
    for m in masks:
        y = compiled(x, m)
        torch.testing.assert_close(y, masked(x, m).sin())
        (g,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(g, x.detach().cos() * m)
    assert compiled.captures == 1
    found = vmap(grad(lambda x, m: masked(x, m).sin().sum()), in_dims=(None, 0))(x.detach(), masks)
    torch.testing.assert_close(found, x.detach().cos() * masks)
