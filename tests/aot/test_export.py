"""Functions and modules as files."""

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict, namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import aotfunc
from aotfunc import export, grad, hessian, jacrev, jit, load, vmap
from aotfunc.errors import ArgumentError, CaptureError, GraphError
from aotfunc.partition import default_partition
from tests.functions import Cube
from tests.reference import assert_same


@pytest.fixture
def saved(tmp_path):
    """``(f, *args) -> what is loaded from the file``"""

    def saved(f, *args, **kwargs):
        export(f, *args, **kwargs).save(tmp_path / "f.aot")
        return load(tmp_path / "f.aot")

    return saved


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


def gradients(f, *args, to=None):
    outs = f(*args)
    return torch.autograd.grad(outs.square().sum(), args if to is None else to)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 3, bias=False)
        self.tied = self.last
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.tied(self.last(self.norm(self.first(x)).tanh()) @ self.first.weight.t())


# ----- modules -----------------------------------------------------------------------------------


def test_what_the_state_dict_leaves_out(saved):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()), persistent=False)
            self.register_buffer("kept", torch.ones(()))

        def forward(self, x):
            self.seen.add_(1)
            return x * self.seen + self.kept

    net = nn.Sequential(Inner(), Inner())
    net.register_buffer("outer", torch.ones(2), persistent=False)
    found, x = saved(net, torch.ones(2)), torch.randn(2)
    for _ in range(2):
        torch.testing.assert_close(found(x), net(x))
    for m in (found, copy.deepcopy(found), saved(found, x)):
        assert [*m.state_dict()] == [*net.state_dict()]
        net.load_state_dict(m.state_dict())
        assert_same(m.get_buffer("0.seen"), net.get_buffer("0.seen"))


@pytest.mark.parametrize("name", ["save", "graphs", "to_torch", "_data", "_run", "backend"])
def test_names_that_are_taken(saved, name):
    """Parameters and modules may be called as what an exported function has itself."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_parameter(name, nn.Parameter(torch.ones(2) * 3))
            self.inner = nn.ModuleDict({f"{name}_": nn.Linear(2, 2), f"{name}": nn.Linear(2, 2)})
            self.inner.register_buffer("shift", torch.ones(2))

        def forward(self, x):
            return self.inner[name](x) * getattr(self, name) + self.inner.shift

    for net in (Net(), nn.Sequential(OrderedDict({name: nn.Linear(2, 2)}))):
        found, x = saved(net, torch.ones(2)), torch.randn(2)
        for m in (found, copy.deepcopy(found), saved(found, x)):
            assert [*m.state_dict()] == [*net.state_dict()]
            torch.testing.assert_close(m(x), net(x))
            m(x).sum().backward()
        net(x).sum().backward()
        for p, q in zip(found.parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)


def test_module(saved):
    torch.manual_seed(0)
    net, x = Net(), torch.randn(5, 3)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = saved(net, x)
    assert_same(dict(net.state_dict()), before)  # nothing ran
    assert found.state_dict().keys() == net.state_dict().keys()
    assert found.get_parameter("tied.weight") is found.get_parameter("last.weight")
    assert [n for n, _ in found.named_parameters()] == [n for n, _ in net.named_parameters()]
    for _ in range(3):
        ours, theirs = found(x), net(x)
        torch.testing.assert_close(ours, theirs)
        ours.square().sum().backward()
        theirs.square().sum().backward()
    for (n, p), q in zip(found.named_parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=n)
    torch.testing.assert_close(found.norm.running_mean, net.norm.running_mean)
    assert int(found.norm.num_batches_tracked) == 3
    found.load_state_dict(before)
    net.load_state_dict(before)
    torch.testing.assert_close(found(x), net(x))


def test_modes_are_those_of_the_export(saved):
    net, x = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 3)), torch.randn(4, 3)
    training, evaluating = saved(net, x), saved(net.eval(), x)
    torch.testing.assert_close(evaluating(x), net(x))
    torch.manual_seed(3)
    ours = training(x)
    torch.manual_seed(3)
    torch.testing.assert_close(ours, net.train()(x))


def test_trained_further(saved):
    torch.manual_seed(0)
    net, x = Net(), torch.randn(5, 3)
    found = saved(net, x)
    for m in (net, found):
        optimizer = torch.optim.AdamW(m.parameters(), 0.1)
        for _ in range(5):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
    for p, q in zip(found.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)


def test_of_a_compiled_module_and_function(saved):
    net, x = Net(), torch.randn(5, 3)
    net.norm.eval()
    for f in (aotfunc.aot_module(net), jit(net), aotfunc.aot_function(net)):
        found = saved(f, x)
        torch.testing.assert_close(found(x), net(x))


# ----- trees -------------------------------------------------------------------------------------

Pair = namedtuple("Pair", ["a", "b"])


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    scale: float


class Output(OrderedDict):
    pass


@dataclasses.dataclass
class Both(OrderedDict):
    """A dictionary with attributes, as models of transformers return them."""

    loss: torch.Tensor
    state: torch.Tensor

    def __post_init__(self):
        self.update(loss=self.loss, state=self.state)


def test_trees(saved):
    def f(batch, pair, many, *, by, flag=True):
        y = batch.x * batch.scale + pair.a
        result = Output(y=y, n=3, none=None, name="f")
        return result, Pair(y.sin(), [pair.b, (many["k"][0] * by,)]), y.shape, Batch(y, 2.0)

    x = torch.randn(2, 3)
    args = (Batch(x, 0.5), Pair(x, x + 1), {"k": [x, 4], "j": None})
    found = saved(f, *args, by=2)
    plain, pair, shape, batch = found(*args, by=2)
    eager = f(*args, by=2)
    assert type(plain) is dict and plain["none"] is None and plain["name"] == "f"
    assert_same(plain, dict(eager[0]))
    assert pair._fields == Pair._fields and type(pair).__name__ == "Pair"
    assert_same(tuple(pair), tuple(eager[1]))
    assert shape == x.shape and type(shape) is torch.Size
    assert_same(batch.x, eager[3].x)
    assert batch.scale == 2.0
    # arguments by name, a namespace of the same attributes
    names = types.SimpleNamespace(x=x, scale=0.5)
    swapped = found(names, pair=args[1], many={"k": [x, 4], "j": None}, by=2)
    assert_same(swapped[0], plain)


def test_trees_that_a_function_tells_apart(saved):
    """The order of keys, the type of a sequence, the names of fields, another attribute."""
    x, y = torch.ones(2), torch.zeros(2)
    one, other = namedtuple("One", "a b"), namedtuple("One", "b a")
    for args, others in (
        ({"a": x, "b": y}, [{"b": x, "a": y}, {"a": x}]),
        ((x, y), [[x, y], one(x, y), (x,)]),
        ([x, y], [(x, y)]),
        (one(x, y), [other(x, y), (x, y)]),
        (types.SimpleNamespace(a=x), [types.SimpleNamespace(a=x, b=y), one(x, y)]),
    ):
        found = saved(lambda tree: (tree[0] if isinstance(tree, list) else x) * 2, args)
        torch.testing.assert_close(found(args), x * 2)
        for wrong in others:
            with pytest.raises(ArgumentError, match="exported"):
                found(wrong)
    found = saved(lambda d: d[0, "k"] * 2, {(0, "k"): x})
    torch.testing.assert_close(found({(0, "k"): x}), x * 2)


def test_an_instance_that_is_a_dictionary(saved):
    x = torch.randn(3)
    found = saved(lambda x: Both(x.sum(), x * 2), x)(x)
    assert found.keys() == {"loss", "state"} and not hasattr(found, "other")
    assert_same([found.loss, found["state"]], [x.sum(), x * 2])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((torch.ones(3), 3.0), r"argument k is 3\.0, and was exported as 2\.0"),
        (
            (torch.ones(4), 2.0),
            r"argument x is float32\[4\] on cpu, and was exported as float32\[3\]",
        ),
        ((torch.ones(3).double(), 2.0), r"float64\[3\]"),
        ((torch.ones(3, device="meta"), 2.0), "on meta"),
        (([torch.ones(3)], 2.0), "exported as a tensor"),
        ((torch.ones(3),), r"takes the arguments \['x', 'k'\], not 1 and \[\]"),
        ((torch.ones(3), True), "argument k is True"),
    ],
)
def test_arguments_that_do_not_fit(saved, args, words):
    def f(x, k):
        return x * k

    found = saved(f, torch.ones(3), 2.0)
    with pytest.raises(ArgumentError, match=words):
        found(*args)


def test_layouts(saved):
    found = saved(lambda x: x @ x.t(), torch.randn(3, 4))
    for x in (torch.randn(4, 3).t(), torch.randn(3, 8)[:, ::2], torch.randn(4).expand(3, 4)):
        torch.testing.assert_close(found(x), x @ x.t())


def test_one_tensor_in_two_places(saved):
    x, y = torch.randn(3), torch.randn(3)
    found = saved(lambda a, b: a.sin() * b, x, x)
    torch.testing.assert_close(found(x, y), x.sin() * y)


def test_names_of_arguments(saved):
    """Those of ``*args`` have none, and a keyword may be called as a positional argument is."""
    x, y, z = torch.randn(3, 3)

    def many(a, *rest, k, **kw):
        return a + sum(rest) * k + kw["z"]

    def same(x, /, **kw):
        return x + 2 * kw["x"]

    def all_of_them(*args, **kw):
        return args[0] - args[1] * kw["arg0"]

    found = saved(many, x, y, z, k=2, z=y)(z, x, y, k=2, z=z)
    torch.testing.assert_close(found, z + 2 * (x + y) + z)
    torch.testing.assert_close(saved(same, x, x=y)(y, x=z), y + 2 * z)
    torch.testing.assert_close(saved(all_of_them, x, y, arg0=z)(y, z, arg0=x), y - z * x)


# ----- memory ------------------------------------------------------------------------------------


def test_a_write_that_another_argument_sees(saved):
    """The captured program reads from before the write."""

    def f(x, y):
        x.add_(1)
        return y * 2

    found, z = saved(f, torch.zeros(3), torch.zeros(3)), torch.zeros(6)
    for x, y in ((z, z), (z[:4], z[2:])):
        with pytest.raises(ArgumentError, match="exported as"):
            found(x, y)
    for x, y in ((z[:3], z[:3]), (z[:3], z[2:5])):
        with pytest.raises(ArgumentError, match="argument x, which is written to, shares memory"):
            found(x, y)
        with pytest.raises(ArgumentError, match="shares memory with the argument y"):
            jit(found)(x, y)
    assert_same(z, torch.zeros(6))
    assert_same(found(z[:3], z[3:]), torch.zeros(3))
    assert_same(z, torch.tensor([1.0, 1, 1, 0, 0, 0]))


def test_a_write_to_a_buffer_that_is_given(saved):
    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("n", torch.zeros(()))

        def forward(self, x):
            self.n.add_(1)
            return x * 2

    found = saved(Counted(), torch.ones(()))
    with pytest.raises(ArgumentError, match="n, which is written to, shares memory"):
        found(found.n)
    assert_same(found.n, torch.zeros(()))


def test_writes_and_views(saved):
    def f(x, y):
        x.add_(1)
        return y[1:], x * 2, y.t()

    x, y = torch.zeros(3), torch.randn(3, 3)
    found = saved(f, x, y)
    assert_same(x, torch.zeros(3))
    part, twice, turned = found(x, y)
    assert_same(x, torch.ones(3))
    assert_same(twice, x * 2)
    y.mul_(5)
    assert_same(part, y[1:])
    assert_same(turned, y.t())


def test_closed_over(saved):
    w, table = leaf(3), torch.randn(5, 3)
    f = lambda i: table[i] * w
    found = saved(f, torch.tensor([1, 2]))
    i = torch.tensor([4, 0])
    torch.testing.assert_close(found(i), f(i))
    (p,) = [t for t in found.buffers() if t.requires_grad]
    assert_same(gradients(found, i, to=[p]), gradients(f, i, to=[w]))


# ----- derivatives -------------------------------------------------------------------------------


class Sevenfold(torch.autograd.Function):
    """Its derivative is another than that of what it computes, and applies it again."""

    @staticmethod
    def forward(ctx, x):
        return x * 7

    @staticmethod
    def backward(ctx, g):
        return Sevenfold.apply(g) * 2


def twisted(x):
    return Sevenfold.apply(Cube.apply(x))


def quiet(x):
    with torch.no_grad():
        c = x * 2
    return x.sin() * c + x.detach() ** 2


def forgetful(x):
    return checkpoint(lambda t: (t.sin() * t).exp(), x, use_reentrant=False) * 2


@pytest.mark.parametrize(
    "f",
    [twisted, quiet, forgetful, torch.sin, F.gelu],
    ids=["Functions", "quiet", "forgetful", "sin", "gelu"],
)
def test_derivatives(saved, f):
    x = leaf(4)
    wrapped = lambda x: f(x)
    found = saved(wrapped, x)
    assert_same(gradients(found, x), gradients(f, x))
    assert found.graphs.keys() == {"function", "joint", "forward", "backward"}
    orders = []
    for g in (found, f):
        value, seen = g(x).sum(), []
        for _ in range(2):
            (value,) = torch.autograd.grad((value * value).sum(), x, create_graph=True)
            seen.append(value)
        orders.append(seen)
    torch.testing.assert_close(*orders)


def test_transforms(saved):
    x = torch.randn(3)
    f = lambda x: (x.sin() * x).sum()
    found = saved(f, x)
    rows = torch.randn(5, 3)
    torch.testing.assert_close(vmap(grad(found))(rows), torch.func.vmap(torch.func.grad(f))(rows))
    torch.testing.assert_close(hessian(found)(x), torch.func.hessian(f)(x))
    torch.testing.assert_close(jit(jacrev(found))(x), torch.func.jacrev(f)(x))


def test_the_halves_are_those_of_the_file(saved, monkeypatch):
    def f(x):
        return x.sin().exp().cos()

    x = leaf(4)
    whole = saved(aotfunc.aot_function(f, "eager", partition_fn=default_partition), x)
    cut = saved(aotfunc.jit(f, backend="eager", memory_budget=0.0), x)
    assert len(whole.graphs["backward"].graph.nodes) < len(cut.graphs["backward"].graph.nodes)
    for found in (whole, cut):
        monkeypatch.setattr(aotfunc.runtime.pipeline, "cut_by", None)  # not called
        assert_same(gradients(found, x), gradients(f, x))


def test_another_need_for_gradients(saved):
    net, x = Net(), leaf(5, 3)
    found = saved(net, x)
    for m in (net, found):
        m.first.requires_grad_(False)
    ours, theirs = (m(x).square().sum() for m in (found, net))
    (a,), (b,) = (torch.autograd.grad(y, x) for y in (ours, theirs))
    torch.testing.assert_close(a, b)
    with torch.no_grad():
        assert not found(x).requires_grad


# ----- the file ----------------------------------------------------------------------------------


def test_in_another_process(tmp_path):
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(5, 3)
    export(net, x).save(tmp_path / "net.aot")
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch, aotfunc\n"
        f"net = aotfunc.load({str(tmp_path / 'net.aot')!r})\n"
        f"x = torch.load({str(tmp_path / 'x.pt')!r})\n"
        "y = net(x); y.square().sum().backward()\n"
        f"torch.save([y.detach(), net.first.weight.grad], {str(tmp_path / 'y.pt')!r})\n"
        "assert 'tests' not in sys.modules and 'sympy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    y, g = torch.load(tmp_path / "y.pt")
    torch.testing.assert_close(y, net(x))
    torch.testing.assert_close(g, gradients(net, x, to=[net.first.weight])[0])


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies(saved, copied):
    net, x = Net().eval(), torch.randn(5, 3)
    twin = copied(saved(net, x))
    assert twin.get_parameter("tied.weight") is twin.get_parameter("last.weight")
    torch.testing.assert_close(twin(x), net(x))
    with torch.no_grad():
        twin.last.weight.zero_()
    assert not twin(x).any() and net(x).any()


def test_to_torch(saved):
    torch.manual_seed(0)
    net, x = Net(), torch.randn(5, 3)
    module = saved(net, x).to_torch().module()
    torch.testing.assert_close(module(x), net(x))
    torch.testing.assert_close(module.get_buffer("norm.running_mean"), net.norm.running_mean)
    f = lambda a, *, k: {"r": [a["x"] * k]}
    program = saved(f, {"x": x}, k=3).to_torch()
    assert_same(program.module()({"x": x}, k=3), {"r": [x * 3]})


def test_files_that_cannot_be_read(tmp_path):
    file = tmp_path / "f.aot"
    export(torch.sin, torch.ones(3)).save(file)

    def changed(change):
        with zipfile.ZipFile(file) as z:
            data, raw = json.loads(z.read("program.json")), z.read("tensors.pt")
        change(data)
        with zipfile.ZipFile(tmp_path / "g.aot", "w") as z:
            z.writestr("program.json", json.dumps(data))
            z.writestr("tensors.pt", raw)
        return tmp_path / "g.aot"

    call = lambda name: lambda data: data["program"]["nodes"][1].update(call=name)
    for change, words in (
        (lambda data: data.update(version=99), "format 99"),
        (call("aten.no_such_op.default"), "no op aten.no_such_op.default"),
        (call("mine.op.default"), "no op mine.op.default"),
        (call("ops.load_library"), "no op ops.load_library"),
        (call("classes.load_library"), "no op"),
        (call("aten.from_file.default"), "no op"),
    ):
        with pytest.raises(ArgumentError, match=words):
            load(changed(change))
    node = lambda place: lambda data: data["program"]["nodes"][1].update(args=[{"node": place}])
    for change in (
        node(7),
        node(1),
        node(-1),
        lambda data: data["program"]["nodes"][1].update(args=[{"riddle": 1}]),
        lambda data: data["program"].update(outputs=[]),
        lambda data: data["program"].pop("nodes"),
        lambda data: data.update(state=["no.such"]),
        lambda data: data.update(positional="x"),
        lambda data: data.update(results={"place": 1}),
        lambda data: data["arguments"].update(arg0={"place": 2}),
        lambda data: data["program"]["nodes"][0]["value"].update(tensor=[3]),
        lambda data: data["tensors"].update(more=["more", True, True]),
        lambda data: data.clear(),
    ):
        with pytest.raises((ArgumentError, GraphError)):
            load(changed(change))
    (tmp_path / "h.aot").write_text("text")
    with pytest.raises(ArgumentError, match="not a file that export wrote"):
        load(tmp_path / "h.aot")


def test_tensors_left_outside():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = None
            self.register_buffer("n", torch.zeros(()))

        def forward(self, x):
            self.seen = x * 2
            return x * 3

    class Renews(Keeps):
        def forward(self, x):
            self.n = self.n + 1
            return x * self.n

    for net in (Keeps(), Renews()):
        n = net.n
        with pytest.raises(CaptureError, match=r"leaves tensors in '(seen|n)' outside"):
            export(net, torch.ones(2))
        assert net.seen is None and net.n is n


def test_what_cannot_be_exported():
    class Odd:
        pass

    x = torch.ones(3)
    with pytest.raises(CaptureError, match=r"export.*all values"):
        export(lambda x: x if x.sum() > 0 else -x, x)
    with pytest.raises(ArgumentError, match=r"the result.* is of type Odd"):
        export(lambda x: (x, Odd()), x)
    with pytest.raises(ArgumentError, match="shape of an argument"):
        export(lambda x: x.t_(), torch.ones(2, 3))
    g = torch.Generator()
    with pytest.raises(CaptureError, match="Generator"):
        export(lambda x: x + torch.rand(3, generator=g), x)
