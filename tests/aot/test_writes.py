"""Writes and aliasing as in eager: constants made inside, views that change nothing, shapes
changed in place, writes in view of autograd and hidden from it. What cannot be so is refused, and
nothing outside has changed then."""

import numpy as np
import pytest
import torch
from torch import nn

from aotfunc import aot_function, aot_module, functionalize, grad, jit, jvp, make_fx, vjp, vmap
from aotfunc.errors import CaptureError
from tests.reference import assert_same

COMPILED = {
    "jit": jit,
    "aot": lambda f: aot_function(f, "eager"),
    "aot_module": lambda f: aot_module(Calls(f), "eager"),
    "nested": lambda f: jit(jit(f)),
    "inside": lambda f: jit(lambda *args: f(*args)),
    "functionalize": functionalize,
}
compiled = pytest.mark.parametrize("wrap", COMPILED.values(), ids=COMPILED)


class Calls(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, *args):
        return self.f(*args)


def tensors(tree):
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def relation(*trees):
    """For each tensor which storage it has, where it lies in it, and whether it is a tensor that
    came before."""
    storages, ids = {}, {}
    found = []
    for x in tensors(trees):
        storage = storages.setdefault(x.untyped_storage().data_ptr(), len(storages))
        found.append(
            (
                storage,
                tuple(x.shape),
                x.stride(),
                x.storage_offset(),
                ids.setdefault(id(x), len(ids)),
            )
        )
    return found


# ----- constants made inside ---------------------------------------------------------------------

CONSTANTS = {
    "tensor": lambda x: torch.tensor([1.0, 2.0, 3.0]),
    "scalar": lambda x: torch.tensor(1.0),
    "as_tensor": lambda x: torch.as_tensor([1.0, 2.0, 3.0]),
    "new_tensor": lambda x: x.new_tensor([1.0, 2.0, 3.0]),
    "Tensor": lambda x: torch.Tensor([1.0, 2.0, 3.0]),
    "asarray": lambda x: torch.asarray([1.0, 2.0, 3.0]),
    "of an array": lambda x: torch.tensor(np.ones(3, np.float32)),
    "zeros": lambda x: torch.zeros(3),
    "full": lambda x: torch.full((3,), 2.0),
    "full, cloned": lambda x: torch.full((3,), 2.0).clone(),
    "arange": lambda x: torch.arange(3.0),
    "scalar_tensor": lambda x: torch.scalar_tensor(2.0),
    "eye": lambda x: torch.eye(3),
    "of the argument": lambda x: x.clone(),
}


def returned(c, x):
    return c


def written(c, x):
    c += x.sum()
    return c


def accumulated(c, x):
    for row in x:
        c += row * row.sum()
    return c


def view(c, x):
    return c.unsqueeze(0)


def both(c, x):
    return c, c.unsqueeze(0), c[None, None]


def both_written(c, x):
    v = c.view(-1)
    v.mul_(x.sum())
    c.add_(1)
    return v, c, x.sum()


def listed(c, x):
    return {"a": [c, c], "b": (c * 1, c)}


def expanded(c, x):
    return c.expand(2, *c.shape)


def hidden(c, x):
    with torch.no_grad():
        c.add_(x.sum())
    return c, c.detach()


def data(c, x):
    c.data.mul_(3)
    return c, c.data


@compiled
@pytest.mark.parametrize(
    "use",
    [returned, written, accumulated, view, both, both_written, listed, expanded, hidden, data],
)
@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_made_inside(name, use, wrap):
    if use is accumulated and CONSTANTS[name](torch.ones(3)).dim() != 1:
        use = written
    f = lambda x: use(CONSTANTS[name](x), x)
    g = wrap(f)
    for _ in range(2):
        x, y = (torch.arange(1.0, 4.0).requires_grad_() for _ in range(2))
        got, want = g(x), f(y)
        assert_same(got, want)
        assert relation(got) == relation(want)
        assert [t.requires_grad for t in tensors(got)] == [t.requires_grad for t in tensors(want)]
        losses = [sum(t.sum() for t in tensors(r) if t.requires_grad) for r in (got, want)]
        if isinstance(losses[1], torch.Tensor):
            assert_same(torch.autograd.grad(losses[0], x), torch.autograd.grad(losses[1], y))
        with torch.no_grad():
            for t, e in zip(tensors(got), tensors(want)):
                if 0 not in t.stride():
                    t.add_(100)
                    e.add_(100)
                assert_same(got, want)


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_in_graphs_and_transforms(name):
    make, x = CONSTANTS[name], torch.arange(1.0, 4.0)
    for use in (returned, view, both, written):
        f = lambda x, use=use: use(make(x), x)
        gm = make_fx(f)(x)
        for _ in range(2):
            got = gm(x)
            assert_same(got, f(x))
            tensors(got)[0].add_(100)
    total = lambda x: sum((t * t).sum() for t in tensors(both_written(make(x), x)))
    assert_same(grad(total)(x), torch.func.grad(total)(x))
    f, other = (lambda x: written(make(x), x)), name == "of the argument"
    for _ in range(2):
        out, back = vjp(f, x)
        ones = torch.ones_like(out)
        assert_same(out, f(x))
        assert_same(back(ones), torch.func.vjp(f, x)[1](ones))
        out.add_(100)
        assert_same(jvp(f, (x,), (x,)), torch.func.jvp(f, (x,), (x,)))
        batch = vmap(make, out_dims=0 if other else None)(torch.stack([x, x]))
        assert_same(batch[0] if other else batch, make(x))
        batch.add_(100)


# ----- views that change nothing -----------------------------------------------------------------

NOTHING = {
    "[:]": lambda x: x[:],
    "view_as": lambda x: x.view_as(x),
    "view": lambda x: x.view(x.shape),
    "expand": lambda x: x.expand(x.shape),
    "t().t()": lambda x: x.t().t(),
    "transposed twice": lambda x: x.transpose(0, 1).transpose(0, 1),
    "unsqueezed and squeezed": lambda x: x.unsqueeze(0).squeeze(0),
    "alias": lambda x: torch.ops.aten.alias(x),
    "narrow": lambda x: x.narrow(0, 0, x.shape[0]),
    "reshape": lambda x: x.reshape(x.shape),
    "contiguous": lambda x: x.contiguous(),
    "to": lambda x: x.to(x.dtype),
    "detach": lambda x: x.detach(),
    "itself": lambda x: x,
}


@compiled
@pytest.mark.parametrize("name", NOTHING)
def test_views_that_change_nothing(name, wrap):
    f = NOTHING[name]
    g, leaf, other = (
        wrap(f),
        torch.ones(2, 3, requires_grad=True),
        torch.ones(2, 3, requires_grad=True),
    )
    assert relation(leaf, g(leaf)) == relation(other, f(other))
    got, want = g(leaf), f(other)
    assert (got.requires_grad, got.is_leaf) == (want.requires_grad, want.is_leaf)
    if got.requires_grad:
        for t in (got, want):
            t.register_hook(lambda g: g * 10)
        (leaf * 2 + g(leaf)).sum().backward()
        (other * 2 + f(other)).sum().backward()
        assert_same(leaf.grad, other.grad)
    x, y = torch.ones(2, 3), torch.ones(2, 3)
    got, want = g(x), f(y)
    got.unsqueeze_(0).mul_(2)
    want.unsqueeze_(0).mul_(2)
    assert relation(x, got) == relation(y, want)
    assert_same(x, y)


# ----- shapes and history changed in place -------------------------------------------------------


def t(x):
    x.t_()
    return x * 2


def unsqueezed(x):
    before = x[0]
    x.unsqueeze_(0).mul_(3)
    return x, x[0], before


def squeezed(x):
    x.unsqueeze_(1)
    y = x * 3
    x.squeeze_(1)
    return y, x


def saved(x):
    x.t_()
    return x.sin() * x, x


def transposed(x):
    x.transpose_(0, 1)
    x.add_(torch.arange(2.0))
    return x[0], x


def swapped(x):
    x.swapaxes_(0, 1)
    return x.sum(0)


def detached(x):
    y = x * 2
    x.detach_()
    return y, x * y, x


def strided(x):
    x.as_strided_((2, 2), (1, 3))
    return x * 1, x


def strided_from(x):
    x.as_strided_((2, 2), (3, 1), 1)
    return x[1] * 1


def smaller(x):
    x.resize_(2, 2)
    return x * 2


def several(x):
    x.t_()
    v = x[1:]
    x.unsqueeze_(0)
    v.mul_(5)
    return v, x


@compiled
@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize(
    "f",
    [
        t,
        unsqueezed,
        squeezed,
        transposed,
        swapped,
        detached,
        strided,
        strided_from,
        smaller,
        several,
        saved,
    ],
)
def test_shapes_changed_in_place(f, active, wrap):
    if f is smaller and active:
        return
    g = wrap(f)
    for _ in range(2):
        x0, y0 = (torch.arange(6.0).view(2, 3).requires_grad_(active) for _ in range(2))
        x, y = x0 * 1, y0 * 1
        got, want = g(x), f(y)
        assert_same((x, got), (y, want))
        assert relation(x, got) == relation(y, want)
        assert [a.requires_grad for a in tensors((x, got))] == [
            e.requires_grad for e in tensors((y, want))
        ]
        if active:
            losses = [sum((a * a).sum() for a in tensors(z)) for z in ((x, got), (y, want))]
            assert_same(torch.autograd.grad(losses[0], x0), torch.autograd.grad(losses[1], y0))


@pytest.mark.parametrize("f", [t, strided_from, several, smaller])
def test_shapes_changed_in_place_inside(f):
    inside = lambda x: sum((o * o).sum() for o in tensors(f(x * 1)))
    x = torch.arange(6.0).view(2, 3)
    if f is not smaller:
        assert_same(grad(inside)(x), torch.func.grad(inside)(x))
        assert_same(jit(grad(inside))(x), torch.func.grad(inside)(x))
    assert_same(make_fx(inside)(x)(x), inside(x))
    assert_same(vmap(inside)(torch.stack([x, x + 1])), torch.stack([inside(x), inside(x + 1)]))
    other, same = x.clone(), x.clone()
    scaled = lambda s, x: s * sum(o.sum() for o in tensors(f(x)))
    s = torch.tensor(2.0)
    assert_same(grad(scaled)(s, other), torch.func.grad(scaled)(s, same))
    assert relation(other) == relation(same)
    gm = make_fx(f)(x.clone())
    other, same = x.clone(), x.clone()
    assert_same(gm(other), f(same))
    assert relation(other) == relation(same)


@pytest.mark.parametrize("wrap", [jit, lambda f: jit(jit(f))])
def test_requires_grad_of_an_argument(wrap):
    def f(x):
        x.requires_grad_()
        y = (x * x).sum()
        return torch.autograd.grad(y, x, create_graph=True)[0], y

    x, y = torch.ones(3), torch.ones(3)
    got, want = wrap(f)(x), f(y)
    assert_same(got, want)
    assert x.requires_grad
    assert_same(
        torch.autograd.grad(got[0].sum() + got[1], x),
        torch.autograd.grad(want[0].sum() + want[1], y),
    )
    frozen = torch.ones(3, requires_grad=True)
    assert not wrap(lambda x: x.requires_grad_(False).mul_(2))(frozen).requires_grad
    assert not frozen.requires_grad


# ----- what is refused ---------------------------------------------------------------------------


def outside():
    return nn.Parameter(torch.ones(3)), torch.full((3,), 2.0)


#: what compiled functions do at every call
BY_TRANSFORMS = {"grad of a parameter"}
REFUSED = {
    "data of a buffer": lambda p, b: lambda x: setattr(b, "data", x) or b * x,
    "data of an argument": lambda p, b: lambda x: setattr(x, "data", b) or x * 2,
    "grad of a parameter": lambda p, b: lambda x: setattr(p, "grad", x * 2) or x,
    "swapped": lambda p, b: lambda x: torch.utils.swap_tensors(b, x * 1) or x,
    "set_": lambda p, b: lambda x: x.set_(b),
    "larger": lambda p, b: lambda x: x.resize_(9),
    "larger than nothing": lambda p, b: lambda x: x[:0].clone().resize_(1) * x,
    "shape of a buffer": lambda p, b: lambda x: b.unsqueeze_(0) * x,
    "shared data": lambda p, b: lambda x: (lambda y: setattr(y, "data", x) or y.add_(1))(x * 2),
    "data and an older view": lambda p, b: (
        lambda x: (lambda y, v: setattr(y, "data", x * 3) or y.add_(1) + v)(
            *(lambda y: (y, y[:]))(x * 2)
        )
    ),
}
ONCE = {
    "grad of an argument": lambda p, b: lambda x: setattr(x, "grad", x * 2) or x,
    "flag of a parameter": lambda p, b: lambda x: p.requires_grad_(False) * x,
    "history of a parameter": lambda p, b: lambda x: p.detach_() * x,
}


@pytest.mark.parametrize("name", [*REFUSED, *ONCE])
def test_refused(name):
    compiled = [jit, lambda f: aot_function(f, "eager")]
    wraps = compiled if name not in BY_TRANSFORMS else []
    if name in REFUSED:
        wraps += [functionalize, vmap, lambda f: lambda x: make_fx(f)(x)]
        wraps += [lambda f: grad(lambda x: f(x).sum())] if "larger" not in name else []
    for wrap in wraps:
        p, b = outside()
        x = torch.ones(1, 3) if wrap is vmap else torch.ones(3)
        memory = p.data_ptr(), b.data_ptr(), x.data_ptr()
        with pytest.raises(CaptureError, match="test_writes"):
            wrap((REFUSED | ONCE)[name](p, b))(x)
        assert (p.data_ptr(), b.data_ptr(), x.data_ptr()) == memory
        assert_same((p.data, b, x), (torch.ones(3), torch.full((3,), 2.0), torch.ones_like(x)))
        assert p.requires_grad
        assert p.grad is None
        assert x.grad is None
        (p * b).sum().backward()


def test_data_of_what_is_made_inside():
    def f(x):
        y = x * 2
        v = y.view(-1)
        y.data = (y.data * 5).round()
        z = x * 2
        z.data = z.data.round()
        z.mul_(x)
        return y, v, z

    x, z = (torch.rand(3).requires_grad_() for _ in range(2))
    z.data.copy_(x)
    got, want = jit(f)(x), f(z)
    assert_same(got, want)
    assert_same(torch.autograd.grad(sum(got).sum(), x), torch.autograd.grad(sum(want).sum(), z))


def test_data_of_a_parameter_is_by_reference():
    p = nn.Parameter(torch.ones(3))
    f = jit(lambda x: p.data.mul_(2) * x)
    f(torch.ones(3))
    p.data = torch.full((3,), 5.0)
    assert_same(f(torch.ones(3)), torch.full((3,), 10.0))
    assert_same(p.data, torch.full((3,), 10.0))


class WritesToWhatItSaved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        k = x.sin()
        ctx.save_for_backward(k)
        return x * k

    @staticmethod
    def backward(ctx, g):
        (k,) = ctx.saved_tensors
        return g * k.mul_(2)


@pytest.mark.parametrize(
    "wrap", [jit, lambda f: aot_function(f, "eager"), lambda f: grad(lambda x: f(x).sum())]
)
def test_a_backward_that_writes_to_what_it_saved_is_refused(wrap):
    with pytest.raises(
        CaptureError, match="WritesToWhatItSaved writes to what it was given or saved"
    ):
        wrap(lambda x: WritesToWhatItSaved.apply(x) * 1)(torch.ones(3, requires_grad=True))


# ----- arguments that share memory ---------------------------------------------------------------


def matrix():
    return torch.arange(1.0, 7.0).view(2, 3)


def with_detached(x):
    return x, x.detach()


def with_part_of_detached(x):
    return x, x.detach()[0]


def with_views(x):
    x = x * 1
    return x, x.view(-1), x.t()


@pytest.mark.parametrize("wrap", [jit, lambda f: aot_function(f, "eager"), lambda f: jit(jit(f))])
@pytest.mark.parametrize(
    ("share", "f"),
    [
        (with_detached, lambda x, y: (y.mul_(2), x * 3)[1]),
        (with_detached, lambda x, y: (y.add_(1), x * y, y)[1:]),
        (with_detached, lambda x, y: (x.detach().add_(y), y * 2)),
        (with_part_of_detached, lambda x, y: (y.mul_(2), x * 3)[1]),
        (with_views, lambda x, y, z: (y.detach().mul_(0.5), z)[1]),
        (with_views, lambda x, y, z: (z.mul_(2), y[1:], x)[1:]),
        (lambda x: (x, torch.zeros(2, 3)), lambda x, b: (b.copy_(x.detach()), x * 2)[1]),
        (lambda x: (x, torch.zeros(2, 3)), lambda x, b: (b.copy_(x), b * 2, b.zero_())[1]),
        (lambda x: (x * 1, torch.zeros(2, 3)), lambda x, b: (x.copy_(b), x * 2, x.t())[1:]),
    ],
)
def test_arguments_that_share_memory(share, f, wrap):
    def run(f):
        leaf = matrix().requires_grad_()
        args = share(leaf)
        outs = f(*args)
        found = tensors((outs, args))
        loss = sum((t * t).sum() for t in found if t.requires_grad)
        same = [[a is b for b in args] for a in tensors(outs)]
        return (
            found,
            [t.requires_grad for t in found],
            same,
            torch.autograd.grad(loss, leaf, allow_unused=True),
        )

    assert_same(run(wrap(f)), run(f))


def test_a_detached_parameter_that_is_written():
    layer = nn.Linear(3, 3)
    frozen = layer.weight.detach()
    before = frozen.clone()
    step = jit(lambda x: (frozen.add_(1), layer(x))[1])
    assert step(torch.ones(1, 3)).requires_grad
    assert_same(layer.weight.detach(), before + 1)
    assert layer.weight.is_leaf
    assert not frozen.requires_grad


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_results_have_memory_of_their_own(backend):
    functions = [
        lambda x: x * 1,
        lambda x: x / 1.0,
        lambda x: torch.stack([x])[0],
        lambda x: torch.cat([x]),
        lambda x: x.reshape(-1).clone(),
        lambda x: (x.sin(), x.sin()),
        lambda x: (x + 0, x.clone().t()),
        lambda x: torch.tensor([1.0, 2.0]) * 1,
    ]
    everything = lambda x: [f(x) for f in functions]
    for x in (matrix(), matrix().requires_grad_()):
        f = jit(everything, backend)
        for _ in range(2):
            outs = tensors(f(x))
            want = [t.detach().clone() for t in outs]
            assert len({t.untyped_storage().data_ptr() for t in (x, *outs)}) == 1 + len(outs)
            assert_same([t.detach() for t in outs], tensors(everything(x.detach())))
            with torch.no_grad():
                for i, t in enumerate(outs):
                    t.add_(100)
                    assert_same(outs[i + 1 :], want[i + 1 :])
            assert_same(x.detach(), matrix())
