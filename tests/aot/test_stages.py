"""The gradient of one result of a compiled call with respect to another that it was computed from,
as in eager."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aotfunc import aot_function, aot_module, debug, grad, jit, vmap
from aotfunc.compile import min_cut_rematerialization_partition
from tests.reference import assert_same


def features(x):
    h = x * 2
    return h.square().sum(), h


def flattened(x):
    """What is returned is a view, and what is computed from it."""
    h = (x @ x).sin().flatten()
    return h, (h**2).sum()


def only_alike(x):
    """The second result does not depend on the first, whatever merging equal nodes makes of it."""
    return x * 2, (x * 2).square().sum()


def neutral(x):
    h = x * 1
    return h, h.sin().sum()


def cloned(x):
    h = x.clone()
    return h, h.exp()


def view_of_an_argument(x):
    v = x.view(-1)
    return v, v.exp().sum()


def chunks(x):
    q, k = (x * 3).chunk(2)
    return q, k, (q * k.sin()).sum()


def split(x):
    q, k, v = x.repeat(1, 3).split(2, 1)
    return q, k, v, q @ k.t() @ v


def views_of_views(x):
    h = x.sin()
    v = h.view(-1)
    w = v[1:]
    return h, v, w, (w**2).sum(), (v**4).sum(), (h**3).sum()


def reshaped(x):
    v = x.sin().t()
    w = v.reshape(-1)
    return w, v, (v * 2).exp(), w.sin().sum()


def dropout(x):
    h = F.dropout(x.sin(), 0.5)
    return F.dropout(h.exp(), 0.5).sum(), h, torch.rand_like(x) * h


def written_later(x):
    h = x * 3
    y = h.sum()
    h.mul_(x)
    return y, h, h.sin()


def written_view(x):
    h = x * 2
    v = h[0]
    v.mul_(x[1])
    return h, v, (v**2).sum(), (h**2).sum()


def written_through_a_view(x):
    h = x * 2
    v = h.view(-1)
    v.mul_(3)
    return h, v.exp()


def detached(x):
    h = x.sin()
    return h, h.detach(), h.detach().exp().sum() + x.sum(), (h * 2).sum()


def without_grad(x):
    with torch.no_grad():
        h = x.sin()
    return h, (h * x).sum(), x


def largest(x):
    values, indices = x.max(0)
    return values, indices, values.exp()[indices].sum()


def hidden_states(x):
    states = []
    for _ in range(4):
        x = (x @ x).tanh()
        states.append(x)
    return (*states, x.sum(), states[1].sum())


def gradient_inside(x):
    h = x.sin()
    (g,) = torch.autograd.grad(h.square().sum(), x, create_graph=True)
    return h, g, (g * h).sum()


def twice(x):
    h = x.sin()
    return h, h, h.exp()


def buffers(x):
    mean, var = x.new_zeros(2), x.new_ones(2)
    h = F.batch_norm(x * 2, mean, var, training=True).exp()
    return h, F.batch_norm(h, mean, var, training=True).flatten(), mean


def siblings(x):
    return x.sin(), x.cos()


def two_levels(x):
    a, b = x.sin(), x.cos()
    c = (a * b).sum()
    return a, b, c, (c * b).exp()


def nested(x):
    h, y = jit(flattened)(x.sin())
    return y * h.sum(), h, y


def equal_views(x):
    h = x.sin()
    a, b = h.t(), h.t()
    return a, b.tanh(), b, a[0].exp()


def batched(x):
    def f(row):
        h = row.sin()
        return h, h**2

    return torch.func.vmap(f)(x)


PROGRAMS = [
    *(
        features,
        flattened,
        only_alike,
        neutral,
        cloned,
        view_of_an_argument,
        chunks,
        split,
        views_of_views,
        reshaped,
    ),
    *(
        dropout,
        written_later,
        written_view,
        written_through_a_view,
        detached,
        without_grad,
        largest,
        hidden_states,
    ),
    *(gradient_inside, twice, buffers, siblings, two_levels, nested, batched, equal_views),
]
COMPILED = {
    "jit": jit,
    "jit of jit": lambda f: jit(jit(f)),
    "aot_function": lambda f: aot_function(f, lambda gm, inputs: gm),
    "min-cut": lambda f: aot_function(
        f, "eager", partition_fn=min_cut_rematerialization_partition
    ),
}


def x():
    return torch.linspace(0.3, 1.7, 4, dtype=torch.float64).view(2, 2).requires_grad_()


def gradients(outs, given):
    """Of each result in each other, and the gradient of that."""
    found = []
    for y in outs:
        for h in outs:
            if y is h or not (y.requires_grad and h.requires_grad):
                continue
            (g,) = torch.autograd.grad(y.sum(), h, allow_unused=True, create_graph=True)
            found.append(g)
            if g is not None and g.requires_grad:
                found += torch.autograd.grad(
                    g.square().sum(), given, allow_unused=True, retain_graph=True
                )
    return found


@pytest.mark.parametrize("how", COMPILED)
@pytest.mark.parametrize("f", PROGRAMS, ids=lambda f: f.__name__)
def test_gradients_of_results_in_results(f, how):
    def found(f):
        torch.manual_seed(0)
        given = x()
        outs = f(given)
        flags = [o.requires_grad for o in outs]
        return outs, torch.rand(2), flags, gradients(outs, given)

    compiled = COMPILED[how](f)
    expected = found(f)
    assert_same(found(compiled), expected)
    assert_same(found(compiled), expected)


@pytest.mark.parametrize("how", COMPILED)
@pytest.mark.parametrize("f", PROGRAMS, ids=lambda f: f.__name__)
def test_hooks_and_retained_gradients(f, how):
    def found(f):
        torch.manual_seed(0)
        given, calls = x(), {}
        outs = f(given)
        inner = [o for o in outs if o.requires_grad and not o.is_leaf]

        def hook(g, k):
            calls.setdefault(k, []).append(g)
            return g * 2

        for k, o in enumerate(inner):
            o.register_hook(lambda g, k=k: hook(g, k))
            o.retain_grad()
        sum((k + 1) * o.sum() for k, o in enumerate(outs)).backward()
        return calls.keys(), [calls[k] for k in sorted(calls)], [o.grad for o in inner], given.grad

    assert_same([*found(COMPILED[how](f))][1:], [*found(f)][1:])


@pytest.mark.parametrize("how", COMPILED)
def test_backward_to_a_result_alone(how):
    given = x()
    loss, h = COMPILED[how](features)(given)
    loss.backward(inputs=[h])
    assert_same(h.grad, 4 * given.detach())
    assert given.grad is None


def test_a_buffer_written_from_a_result():
    def f(buffer, x):
        h = x.exp()
        buffer.copy_(h * 2)
        return h

    given, buffer = x(), torch.zeros(2, 2, dtype=torch.float64)
    h = jit(f)(buffer, given)
    assert_same(torch.autograd.grad(buffer.sum(), h, retain_graph=True)[0], torch.full_like(h, 2))
    assert_same(torch.autograd.grad(buffer.sum(), given)[0], 2 * given.exp())


@dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple


class Net(nn.Module):
    """Hidden states, flattened features and logits, with running statistics."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(8, 3)

    def forward(self, x):
        maps = torch.relu(self.norm(self.conv(x)))
        features = maps.flatten(1)
        return Output(self.fc(features), (maps, features))


@pytest.mark.parametrize("how", [jit, lambda m: aot_module(m, "eager")], ids=["jit", "aot_module"])
def test_class_activation_maps(how):
    """The gradient of one logit in the feature maps, and training that goes on."""

    def found(wrap):
        torch.manual_seed(0)
        module = Net()
        out = wrap(module)(torch.randn(2, 1, 4, 4))
        maps, features = out.hidden
        results = [
            *torch.autograd.grad(out.logits[:, 1].sum(), (maps, features), retain_graph=True)
        ]
        maps.retain_grad()
        features.retain_grad()
        out.logits.square().sum().backward()
        return (
            results,
            maps.grad,
            features.grad,
            [p.grad for p in module.parameters()],
            dict(module.named_buffers()),
        )

    assert_same(found(how), found(lambda m: m))


@pytest.mark.parametrize(
    ("f", "forward", "backward"),
    [(siblings, 1, 1), (only_alike, 1, 1), (features, 2, 2), (hidden_states, 5, 6)],
)
def test_how_many_graphs(f, forward, backward):
    """One of each half unless results depend on each other; one without gradients, and for other
    transforms. Results with no input in common (the last two of ``hidden_states``) have backwards
    of their own."""
    made = []

    def compiler(gm, inputs):
        made.append(gm)
        return gm

    compiled = aot_function(f, compiler)
    compiled(x().detach())
    assert len(made) == 1
    made.clear()
    outs = compiled(x())
    assert len(made) == forward
    sum(o.sum() for o in outs).backward()
    assert len(made) == forward + backward
    with torch.no_grad():
        compiled(x())
    assert len(made) <= forward + backward + 1


def test_transforms_take_the_call_as_a_whole():
    def loss(x):
        value, h = jit(features)(x)
        return value + h.sum()

    given = torch.stack([x().detach(), x().detach() + 1])
    assert_same(vmap(grad(loss))(given), 8 * given + 2)


def test_inductor():
    given = x()
    h, y = jit(flattened, backend="inductor")(given)
    assert_same(torch.autograd.grad(y, h, retain_graph=True)[0], 2 * h)
    (expected,) = torch.autograd.grad(flattened(given)[1], given)
    assert_same(torch.autograd.grad(y, given)[0], expected)


# ----- new values of written arguments -----------------------------------------------------------


def summed(x, y):
    x.mul_(2)
    return x.sum(), x.sin()


def both_written(x, y):
    x.mul_(2)
    y.add_(x)
    return (x * y).sum(), x * 3


def row_written(x, y):
    x[0].mul_(2)
    return x.sum(), x[1]


def viewed_then_written(x, y):
    v = x.view(-1)
    v.mul_(2)
    return v, v.exp(), x.sum()


def returned(x, y):
    x.mul_(2)
    return x, x.sum(), x[0], x.view(-1).exp()


def copied(x, y):
    z = y * 3
    x.copy_(z)
    return z, z.sum(), x.sum()


def exchanged(x, y):
    t = x.clone()
    x.copy_(y)
    y.copy_(t)
    return (x * 2).sum(), (y * 3).sum()


def between_writes(x, y):
    a = x * 2
    x.mul_(3)
    b = x + a.sin()
    x.add_(1)
    return b.sum(), (x + b).sin().sum()


def hidden_after(x, y):
    x.mul_(2)
    with torch.no_grad():
        x.mul_(5)
    return x.sin().sum()


def view_of_the_other(x, y):
    x.mul_(2)
    return y.view(-1), y.view(-1).exp(), x.sum()


def drawn(x, y):
    x.mul_(torch.rand(4, 4))
    return (x * torch.rand(4, 4)).sum()


def by_a_nested_function(x, y):
    return jit(summed)(x, y)[0] * x.sum()


WRITTEN = [
    summed,
    both_written,
    row_written,
    viewed_then_written,
    returned,
    copied,
    exchanged,
    between_writes,
]
WRITTEN += [hidden_after, view_of_the_other, drawn, by_a_nested_function]


@pytest.mark.parametrize("active", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(
    "way", [jit, lambda f: aot_function(f, "eager")], ids=["jit", "aot_function"]
)
@pytest.mark.parametrize("f", WRITTEN, ids=lambda f: f.__name__)
def test_written_arguments(f, way, active):
    """The gradient of every result, and of every argument as it is afterwards, in each of them."""

    def run(g):
        torch.manual_seed(0)
        leaves = [torch.rand(4, 4, requires_grad=yes) for yes in active]
        x, y = [t * 1 for t in leaves]
        results = g(x, y)
        tensors = [*(results if isinstance(results, tuple) else [results]), x, y, *leaves]
        found = [[t.detach().clone(), t.requires_grad] for t in tensors]
        for t in tensors:
            weights = torch.arange(1.0, 1 + t.numel()).view(t.shape)
            for of in tensors if t.requires_grad else ():
                if of.requires_grad:
                    (g,) = torch.autograd.grad(
                        (t * weights).sum(), of, allow_unused=True, retain_graph=True
                    )
                    found.append(g)
        return found

    compiled, want = way(f), run(f)
    for _ in range(2):
        assert_same(run(compiled), want)


def test_written_arguments_that_share_memory():
    def f(a, b):
        a.mul_(2)
        b.mul_(3)
        return a.sum() + b.sum()

    def run(g):
        w = torch.arange(1.0, 4.0, requires_grad=True)
        a = w * 1
        b = a.detach()
        out = g(a, b)
        return out.detach(), a.detach(), torch.autograd.grad(out, w)

    assert_same(run(jit(f)), run(f))


def test_views_of_a_view_made_without_gradients():
    """The first one is a leaf of autograd's, the next ones are not: where the call is cut into a
    chain, too."""

    def f(x, p):
        a = x * p
        b = a + 0
        b.data.mul_(2)
        with torch.no_grad():
            v, w = b[..., 1:], a.view(a.shape)
        return v, v[0], w[0], v.sum() * b.sum()

    def said(f):
        p = torch.ones(3, requires_grad=True)
        *views, y = f(torch.ones(2, 3), p)
        return [(t.requires_grad, t.is_leaf) for t in views], y, torch.autograd.grad(y, p)

    for how in (jit, lambda f: aot_function(f, "eager")):
        assert_same(said(how(f)), said(f))


RESHAPED = {
    "transposed": lambda w, y: (y.mul_(w), y.transpose_(0, 1), y * 2)[2],
    "read": lambda w, y: (y.mul_(w), y.t().reshape(-1) * 2, y.sum(1))[1:],
    "returned": lambda w, y: (y.add_(w), y.unsqueeze_(0), y.mT.exp(), y[0, 1])[2:],
}


@pytest.mark.parametrize(
    "way", [jit, lambda f: aot_function(f, "eager")], ids=["jit", "aot_function"]
)
@pytest.mark.parametrize("f", RESHAPED)
def test_written_arguments_with_gaps_in_memory(f, way, monkeypatch):
    """What is computed from the new value reads the argument, laid out as it is."""
    monkeypatch.setattr(debug, "LEVEL", 2)

    def run(g):
        w, y = torch.arange(1.0, 4.0, requires_grad=True), torch.ones(2, 6)[:, ::2]
        out = g(w, y)
        outs = [*(out if isinstance(out, tuple) else [out]), y]
        return [
            *outs,
            torch.autograd.grad(sum(o.sin().sum() for o in outs), w)[0],
            *[list(o.stride()) for o in outs],
        ]

    assert_same(run(way(RESHAPED[f])), run(RESHAPED[f]))
