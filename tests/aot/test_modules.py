"""``aot_module(m)`` is a module as ``m`` is one: names, state, mode, copies, and training."""

import copy
import io
from collections import OrderedDict
from dataclasses import dataclass, fields

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aotfunc import aot_module
from aotfunc.backends.loops import native
from aotfunc.debug import stages
from aotfunc.errors import RuleError
from tests.inputs import f64
from tests.reference import BITS, assert_same


def compiled(module):
    return aot_module(module, "eager")


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()


def gradients(module, *args, **kwargs):
    """The result, and every gradient by its name, None included."""
    module.zero_grad()
    out = module(*args, **kwargs)
    first(out).sin().sum().backward()
    return first(out), {name: p.grad for name, p in module.named_parameters()}


def first(out):
    while not isinstance(out, torch.Tensor):
        out = out[0] if isinstance(out, list | tuple) else next(iter(out.values()))
    return out


def same_gradients(make, *args, **kwargs):
    torch.manual_seed(0)
    module = make().double()
    twin = copy.deepcopy(module)
    for _ in range(2):
        assert_same(gradients(compiled(module), *args, **kwargs), gradients(twin, *args, **kwargs))
    assert_same(dict(module.named_buffers()), dict(twin.named_buffers()))


# ----- names and state ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", [net, lambda: nn.BatchNorm1d(3), lambda: nn.LSTM(3, 2)])
def test_names_are_the_modules(make):
    m = make()
    c = compiled(m)
    for names in ("named_parameters", "named_buffers", "named_children"):
        assert [*map(id, dict(getattr(c, names)()).values())] == [
            *map(id, dict(getattr(m, names)()).values())
        ]
        assert list(dict(getattr(c, names)())) == list(dict(getattr(m, names)()))
    assert list(c.state_dict()) == list(m.state_dict())


def test_state_goes_both_ways():
    m, other = net(), net()
    c = compiled(m)
    assert c.load_state_dict(other.state_dict()) == ([], [])
    assert_same(dict(m.state_dict()), dict(other.state_dict()))
    other(f64(5, 3))
    assert other.load_state_dict(c.state_dict()) == ([], [])
    missing = {k: v for k, v in m.state_dict().items() if k != "0.bias"} | {"more": f64(1)}
    assert c.load_state_dict(missing, strict=False) == (["0.bias"], ["more"])
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "more"'):
        c.load_state_dict(missing)


def test_state_of_a_compiled_part():
    whole = nn.ModuleDict({"body": compiled(net()), "norm": compiled(nn.BatchNorm1d(3))})
    plain = nn.ModuleDict({"body": net(), "norm": nn.BatchNorm1d(3)})
    assert list(whole.state_dict()) == list(plain.state_dict())
    assert list(dict(whole.named_parameters())) == list(dict(plain.named_parameters()))
    assert whole.load_state_dict(plain.state_dict()) == ([], [])
    assert_same(dict(whole.state_dict()), dict(plain.state_dict()))


def test_state_saved_before_a_buffer_was_there():
    """BatchNorm's own way to load state without num_batches_tracked is asked."""
    state = nn.BatchNorm1d(3).state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    assert compiled(nn.BatchNorm1d(3)).load_state_dict(state) == ([], [])


def test_dtype_and_mode():
    m = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout())
    c, x = compiled(m), torch.randn(4, 3)
    c(x)
    assert c.double() is c and m[0].weight.dtype == torch.float64
    assert c.eval() is c and not m.training and not m[2].training and not c.training
    assert_same(c(x.double()), m(x.double()))
    m.train()
    assert c.training
    assert c.requires_grad_(False) is c and not m[0].weight.requires_grad
    assert not c(x.double()).requires_grad


def test_a_mode_of_its_own():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def train(self, mode=True):
            super().train(mode)
            self.norm.eval()
            return self

        def forward(self, x):
            return self.norm(x)

    m = Frozen()
    compiled(m).train()
    assert m.training and not m.norm.training


def test_attributes_and_methods():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.weight = 2.0, nn.Parameter(f64(3))

        def forward(self, x):
            return x * self.weight * self.scale

        def twice(self, x):
            return self(self(x))

    m = Model()
    c, x = compiled(m), f64(3)
    assert c.scale == 2 and c.weight is m.weight
    assert_same(c.twice(x), m(m(x)))
    c.scale = 3.0
    assert m.scale == 3 and "scale" not in vars(c)
    assert_same(c(x), x * m.weight * 3)
    c.weight = nn.Parameter(f64(3))
    assert m.weight is c.weight and [*c.parameters()] == [m.weight]
    assert_same(c(x), x * m.weight * 3)
    c.register_buffer("seen", f64(1), persistent=False)
    assert m.seen is c.seen and "seen" not in c.state_dict()
    del c.scale
    assert not hasattr(m, "scale") and not hasattr(c, "scale")
    with pytest.raises(AttributeError, match="nothing"):
        c.nothing  # noqa: B018


def test_copies_are_independent():
    c, x = compiled(net()), f64(5, 3)
    c(x)
    linear, saved = compiled(nn.Linear(3, 2).double()), io.BytesIO()
    torch.save(linear, saved)
    saved.seek(0)
    for other, one in ((copy.deepcopy(c), c), (torch.load(saved, weights_only=False), linear)):
        assert type(other) is type(one) and other.orig_module is not one.orig_module
        assert [*map(id, other.parameters())] == [*map(id, other.orig_module.parameters())]
        before = other(x).detach()
        with torch.no_grad():
            for p in c.parameters():
                p.zero_()
        assert_same(other.eval()(x), other.orig_module(x))
        assert before.abs().sum() > 0
        other.double().train()
        other(x).sum().backward()
        assert all(p.grad is not None for p in other.parameters())
        assert all(p.grad is None for p in c.parameters())


# ----- what is called, and returned --------------------------------------------------------------


class Tied(nn.Module):
    """One matrix embeds and unembeds, as in language models."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids).tanh())


def test_tied_weights():
    ids = torch.tensor([[0, 3, 3], [6, 1, 0]])
    same_gradients(Tied, ids)
    c = compiled(Tied())
    for module in (c, copy.deepcopy(c), c.double()):
        assert module.head.weight is module.embed.weight and len([*module.parameters()]) == 1
        assert list(module.state_dict()) == ["embed.weight", "head.weight"]


def test_tied_weights_in_training():
    ids = torch.randint(7, (4, 5))
    losses = []
    for way in (lambda m: m, compiled):
        torch.manual_seed(0)
        m = way(Tied())
        optimizer = torch.optim.AdamW(m.parameters(), 0.1)
        losses.append([])
        for _ in range(20):
            optimizer.zero_grad()
            loss = F.cross_entropy(m(ids).flatten(0, 1), ids.flatten())
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.detach())
    assert_same(losses[1], losses[0])


def test_a_submodule_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net()

        def forward(self, x):
            return self.inner(x) + self.inner(x.flip(0)).sin()

    same_gradients(Twice, f64(5, 3))


@dataclass
class Output(OrderedDict):
    """A result as in transformers: a dictionary, a dataclass and a tuple of what is there."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    more: tuple | None = None

    def __post_init__(self):
        for field in fields(self):
            if getattr(self, field.name) is not None:
                super().__setitem__(field.name, getattr(self, field.name))

    def __getitem__(self, key):
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]


def returning(how):
    class Returning(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x, labels=None):
            return how(self.used(x).tanh())

    return Returning


@dataclass
class Pair:
    left: torch.Tensor
    right: object = None

    def values(self):
        return [self.left]


RESULTS = {
    "a dictionary": lambda y: {"y": y, "none": None, "name": "net"},
    "a list": lambda y: [y, None, (y * 2, 3)],
    "a dataclass": lambda y: Pair(y, {"twice": y * 2}),
    "a model's output": lambda y: Output(loss=y.mean(), logits=y, more=(y.exp(), None)),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_and_unused_parameters(name):
    same_gradients(returning(RESULTS[name]), f64(4, 3))
    m = returning(RESULTS[name])().double()
    out = compiled(m)(f64(4, 3))
    assert type(out) is type(m(f64(4, 3)))
    first(out).sum().backward()
    assert m.unused.weight.grad is None and m.used.weight.grad is not None


def test_a_models_output_is_one():
    m = returning(RESULTS["a model's output"])().double()
    x = f64(4, 3)
    got, want = compiled(m)(x), m(x)
    assert list(got) == list(want) == ["loss", "logits", "more"]
    assert_same(
        [got.loss, got["logits"], got[0], got.more], [want.loss, want[1], want[0], want.more]
    )
    assert got.more[1] is None and got.loss is got["loss"] is got[0]


# ----- training ----------------------------------------------------------------------------------


def test_static_arguments():
    class Choosing(nn.Module):
        def forward(self, x, times, *, how="sin"):
            return getattr(x, how)() * times

    x = f64(3)
    c = aot_module(Choosing(), "eager", static_argnums=(1,), static_argnames=("how",))
    assert_same(c(x, 2), x.sin() * 2)
    assert_same(c(x, 3, how="cos"), x.cos() * 3)


def test_a_last_batch_of_another_size_compiles_nothing(monkeypatch):
    sources, load = set(), native.load_kernels
    monkeypatch.setattr(native, "load_kernels", lambda source: sources.add(source) or load(source))
    m = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 16))
    c, known = aot_module(m, "cpp"), []
    for count in (64, 64, 40, 64, 40):
        x = torch.randn(count, 16)
        torch.testing.assert_close(gradients(c, x), gradients(m, x))
        known.append(len(sources))
    assert c._compiled.captures == 2 and known[0] == known[-1] > 0


def test_no_joint_graph_without_gradients():
    m, x = net(), f64(4, 3)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            seen = [stage.made_by for stage in stages(compiled(m))(x)]
            assert "vjp" not in seen and "backward" not in seen
            assert not compiled(m)(x).requires_grad
    frozen = compiled(copy.deepcopy(m).requires_grad_(False))
    assert "vjp" not in [stage.made_by for stage in stages(frozen)(x)]
    assert "vjp" in [stage.made_by for stage in stages(compiled(m))(x)]


def test_autocast_and_a_scaler():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2))
    x, results = torch.randn(4, 6), []
    for way in (lambda m: m, compiled):
        twin = copy.deepcopy(m)
        scaler, f = torch.amp.GradScaler("cpu", init_scale=2.0**10), way(twin)
        optimizer, losses = torch.optim.SGD(twin.parameters(), 0.1), []
        for _ in range(5):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = f(x).float().square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.detach())
        results.append((losses, scaler.get_scale()))
    # kernels in C++ round to bfloat16 less often
    assert_same(results[1], results[0], rtol=0 if BITS else 2**-8, atol=0)


def test_complex_parameters():
    class Waves(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 3, dtype=torch.complex128))

        def forward(self, x):
            return (x.to(self.w.dtype) @ self.w).exp().abs()

    torch.manual_seed(0)
    m, x = Waves(), f64(4, 3)
    twin = copy.deepcopy(m)
    for f, its in ((compiled(m), m), (twin, twin)):
        optimizer = torch.optim.Adam(its.parameters(), 0.01)
        for _ in range(3):
            optimizer.zero_grad()
            f(x).log().square().sum().backward()
            optimizer.step()
    assert_same(m.w, twin.w)


@pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_are_refused(make):
    m = make(5, 3, sparse=True)
    with pytest.raises(RuleError, match="would be sparse"):
        compiled(m)(torch.tensor([[0, 1], [4, 4]]))
    assert m.weight.grad is None
    with torch.no_grad():  # there is no gradient
        ids = torch.tensor([[0, 1], [4, 4]])
        assert_same(compiled(m)(ids), m(ids))


def test_third_order_through_a_module():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    x = f64(5, 3)

    def third(f):
        y = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(f(y).sum(), y, create_graph=True)
        (h,) = torch.autograd.grad(g.square().sum(), y, create_graph=True)
        return torch.autograd.grad(h.sin().sum(), [y, *m.parameters()], allow_unused=True)

    torch.testing.assert_close(third(compiled(m)), third(m))
