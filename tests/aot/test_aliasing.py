"""Results of compiled functions alias inputs, and one another, as those of the function itself
do."""

import pytest
import torch

from aotfunc import aot_function, functionalize, grad, hessian, jit, jvp, vmap
from aotfunc.errors import CaptureError
from tests.inputs import f64
from tests.reference import assert_same


def sine_and_its_transpose(x):
    y = x.sin()
    return y, y.t()


def twice_the_same(x):
    y = x.sin()
    return y, y


def written_and_returned(x):
    x.mul_(2)
    return x.t(), x * 3, x


def written_through_a_view(x):
    v = x[0]
    v.mul_(2)
    return v, x


def written_with_what_is_returned(x):
    y = x * 2
    x.copy_(y)
    return y, x


W = f64(2, 3)

RETURNS = {
    "the input": lambda x: x,
    "twice": lambda x: (x, x),
    "a view": lambda x: x.t(),
    "a view of a view": lambda x: x.t()[1:].unsqueeze(0),
    "a detached view": lambda x: (x.detach(), x * 2),
    "pieces": lambda x: x.unbind(),
    "chunks": lambda x: x.chunk(3, 1)[1],
    "expanded": lambda x: x[:, :1].expand(2, 4) * 1 + x[0, 0].expand(2, 4),
    "real view": lambda x: torch.view_as_complex(x.view(3, 2)).imag,
    "a new tensor": lambda x: x * 1,
    "a reshaped new tensor": lambda x: x.sin().view(3, 2),
    "two views of a new tensor": sine_and_its_transpose,
    "a new tensor twice": twice_the_same,
    "a closed-over tensor": lambda x: (W, W[0], x * W),
    "written and returned": written_and_returned,
    "written through a view": written_through_a_view,
    "written with what is returned": written_with_what_is_returned,
    "equal but apart": lambda x: (x * 2, x.detach() * 2, x * 2),
}


def memory(x, outs):
    """Which of these tensors share storage, and where in it they begin."""
    tensors = [x, *(outs if isinstance(outs, tuple | list) else [outs])]
    numbers = {}
    return [
        (
            numbers.setdefault(t.untyped_storage().data_ptr(), len(numbers)),
            t.storage_offset(),
            t.stride(),
        )
        for t in tensors
    ]


@pytest.mark.parametrize("leaf", [False, True], ids=["plain", "under autograd"])
@pytest.mark.parametrize("name", RETURNS)
def test_memory(name, leaf):
    f = RETURNS[name]
    x0 = f64(2, 3).requires_grad_(leaf)
    x, y = x0 * 1, x0 * 1
    g = jit(f)
    for _ in range(2):
        got, want = g(x), f(y)
        assert_same(got, want)
        assert_same(x, y)
        assert memory(x, got) == memory(y, want)
        same = lambda z, outs: [
            o is z for o in (outs if isinstance(outs, tuple | list) else [outs])
        ]
        assert same(x, got) == same(y, want)


WRITES = {
    k: RETURNS[k] for k in ("the input", "a view", "a view of a view", "a reshaped new tensor")
}
WRITES |= {
    k: RETURNS[k]
    for k in ("two views of a new tensor", "a new tensor twice", "written and returned")
}


@pytest.mark.parametrize("name", WRITES)
def test_writing_to_a_result(name):
    """The write is seen through all aliases, values and gradients."""
    x0 = f64(2, 3).requires_grad_()

    def run(f):
        x = x0 * 1
        outs = f(x)
        outs = outs if isinstance(outs, tuple) else (outs,)
        outs[0].mul_(2)
        loss = (x * x).sum() + sum((o * o).sum() for o in outs)
        return loss, torch.autograd.grad(loss, x0)[0]

    assert_same(run(jit(WRITES[name])), run(WRITES[name]))


def test_inside_another_capture():
    transposed, doubled = jit(lambda a: a.t()), jit(lambda a: a[0].mul_(2))

    def f(x, t=transposed, d=doubled):
        x = x * 1
        y = t(x)
        y.mul_(2)
        z = d(x)
        z.add_(1)
        return (x * x).sum()

    plain = lambda x: f(x, lambda a: a.t(), lambda a: a[0].mul_(2))
    x = f64(2, 3)
    assert_same(jit(f)(x), plain(x))


def test_derivatives_through_a_write_inside_another_capture():
    sine = jit(lambda a: (a.sin_(), None)[1])

    def f(x, write=sine):
        x = x * 1
        write(x)
        return (x * x).sum()

    plain, x = (lambda x: f(x, torch.sin_)), f64(3)
    assert_same(grad(f)(x), torch.func.grad(plain)(x))
    assert_same(hessian(f)(x), torch.func.hessian(plain)(x))
    assert_same(jvp(f, (x,), (x,)), torch.func.jvp(plain, (x,), (x,)))
    assert_same(
        vmap(grad(f))(torch.stack([x, x])),
        torch.func.vmap(torch.func.grad(plain))(torch.stack([x, x])),
    )


def test_swapped_arguments():
    def swap(a, b):
        t = a.clone()
        a.copy_(b)
        b.copy_(t)

    a, b = f64(3), f64(3)
    old = a.clone(), b.clone()
    assert jit(swap)(a, b) is None
    assert_same((b, a), old)


@pytest.mark.parametrize("order", [1, 2])
def test_written_argument_that_is_differentiated(order):
    x0 = f64(3).requires_grad_()

    def f(x):
        x.mul_(x.detach().cos())
        x.sin_()
        return x.sum()

    def run(f):
        x = x0 * 1
        y = f(x) * x
        for _ in range(order):
            (y,) = torch.autograd.grad(y.sum(), x0, create_graph=True)
        return y

    assert_same(run(jit(f)), run(f))


def test_written_leaf_is_refused():
    x = f64(3).requires_grad_()
    f = jit(lambda x: x.mul_(2))
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        f(x)
    f(x * 1)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        f(x)
    with torch.no_grad():
        f(x)


def test_constants_are_made_anew():
    f = jit(lambda x: (torch.zeros(3), x * 2))
    f(f64(3))[0].add_(1)
    assert_same(f(f64(3))[0], torch.zeros(3))


def test_structure_and_constants_of_results():
    f = lambda x, n: {"a": [x * n, (n, "s", None)], "b": torch.float64, "c": (x,)}
    x = f64(3)
    assert_same(jit(f)(x, 2), f(x, 2))
    assert jit(lambda x: None)(x) is None
    assert jit(lambda x: 3)(x) == 3
    assert jit(lambda x: ())(x) == ()


def rows(n=12):
    return (torch.arange(float(n)).view(3, 4),)


def part_of_a_buffer():
    buffer = torch.arange(12.0)
    return buffer[4:8], buffer


@pytest.mark.parametrize(
    ("f", "arguments"),
    [
        (lambda x: (x.clone(), x.add_(1))[0], rows),  # the value before the write
        (lambda x: (x * 1, x.add_(1))[0], rows),
        (lambda x: (x.clone().view(2, 6)[1:], x.add_(1))[0], rows),
        (lambda x: (x.contiguous(), x.add_(1))[0], rows),  # x itself
        (lambda x: x[1].add_(1), rows),  # views that were written to
        (lambda x: x[1:].mul_(2), rows),
        (lambda x: (x[:, ::2].mul_(2), x[1])[0], rows),
        (lambda a, b: a.add_(1), part_of_a_buffer),
        (
            lambda a, b: (a.mul_(2), a.as_strided((2,), (1,), a.storage_offset()))[1],
            part_of_a_buffer,
        ),
    ],
)
@pytest.mark.parametrize(
    "compiled", [jit, lambda f: aot_function(f, "eager"), lambda f: jit(jit(f))]
)
def test_results_and_writes_as_in_eager(compiled, f, arguments):
    mine, theirs = arguments(), arguments()
    got, want = compiled(f)(*mine), f(*theirs)
    for _ in range(2):
        assert_same([got, *mine], [want, *theirs])
        assert (got.stride(), got.storage_offset()) == (want.stride(), want.storage_offset())
        got.add_(1)
        want.add_(1)


def test_a_closed_over_value_from_before_the_write():
    w, norm = torch.zeros(2), torch.nn.BatchNorm1d(2)

    def step(x):
        old = w.clone()
        w.add_(x)
        return old

    assert_same(jit(step)(torch.ones(2)), torch.zeros(2))
    assert_same(
        jit(lambda x: (norm.running_mean.clone(), norm(x))[0])(torch.randn(4, 2) + 5),
        torch.zeros(2),
    )


# ----- a tensor and what is detached from it -----------------------------------------------------

PAIRS = {
    "the same": lambda u: (u, u.detach()),
    "a part": lambda u: (u, u.detach()[1:]),
    "the other way round": lambda u: (u.detach(), u),
}
TURNS = {
    "first": lambda a, b: (a.mul_(3), b * 2)[1],
    "second": lambda a, b: (b.mul_(3), a * 2)[1],
    "second, read again": lambda a, b: (b.mul_(3), b * 2)[1],
    "both": lambda a, b: (a.mul_(3), b.add_(1), (a * a).sum() + b.sum())[2],
    "both, in turn": lambda a, b: (b.add_(1), a.mul_(2), (a * a).sum() + b.sum())[2],
}


@pytest.mark.parametrize("writes", TURNS)
@pytest.mark.parametrize("both", PAIRS)
@pytest.mark.parametrize("closed_over", [False, True])
def test_detached_aliases(both, writes, closed_over):
    """Autograd does not see what is written through the detached one."""

    def run(compiled):
        w = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        a, b = PAIRS[both](w * 2)
        out = (
            compiled(lambda: TURNS[writes](a, b))()
            if closed_over
            else compiled(TURNS[writes])(a, b)
        )
        total = out.sum() + a.sum() + b.sum()
        (g,) = torch.autograd.grad(total, w, allow_unused=True) if total.requires_grad else (None,)
        return out, a, b, g, [t.requires_grad for t in (out, a, b)]

    multiplied = 1 if writes.startswith("second") else 0
    if closed_over and multiplied == (both == "the other way round"):  # not the detached one
        with pytest.raises(CaptureError, match="requires grad is written to"):
            run(jit)
    else:
        assert_same(run(jit), run(lambda f: f))


OUTSIDE_WRITES = {
    "a sum of losses": lambda total, layer, x: total.add_(layer(x).sum()),
    "a parameter": lambda total, layer, x: total.add_(layer.weight),
    "a product": lambda total, layer, x: total.add_(1).mul_(layer.weight * x),
    "a row": lambda total, layer, x: total[1].add_(layer.weight[0]),
    "a part": lambda total, layer, x: total[:1, 1:].copy_(layer.weight[1:, 1:] * x[0]),
}


@pytest.mark.parametrize("write", OUTSIDE_WRITES)
def test_the_history_of_what_is_written_outside_is_that_of_the_call(write):
    """Parameters take part while the function is recorded: autograd would give the outside tensor
    a history then."""
    layer = torch.nn.Linear(2, 2)

    def run(compiled):
        layer.zero_grad()
        total = torch.zeros(2, 2)
        compiled(lambda x: OUTSIDE_WRITES[write](total, layer, x))(torch.tensor([3.0, 5.0]))
        total.sum().backward()
        return total, layer.weight.grad

    assert_same(run(jit), run(lambda f: f))


def test_a_parameter_is_written_through_its_detached_alias():
    layer = torch.nn.Linear(2, 2)
    frozen = layer.weight.detach()
    twice = jit(lambda x: (layer(x), frozen.mul_(2))[0])
    before = frozen.clone()
    for _ in range(2):
        twice(torch.ones(2)).sum().backward()
    assert layer.weight.requires_grad and not frozen.requires_grad
    assert_same(layer.weight.detach(), 4 * before)


nested = jit(lambda p: (p.detach()[0].fill_(2.0), p.view(-1))[1])


def doubled_unseen(p):
    with torch.no_grad():
        p.mul_(2)
    return p.view(-1)


@pytest.mark.parametrize("update", [nested, doubled_unseen])
@pytest.mark.parametrize("alias", [lambda p: p.detach(), lambda p: p.data.view(-1)])
@pytest.mark.parametrize("compiled", [jit, lambda f: jit(jit(f))])
def test_a_parameter_is_written_beside_its_detached_alias(compiled, alias, update):
    """Autograd sees no write to the parameter, though it is one to the memory of both."""

    def f(x, p):
        return (update(p) * x.reshape(-1)).sum()

    found = []
    for run in f, compiled(f):
        torch.manual_seed(0)
        p = f64(3, 3).requires_grad_()
        x = alias(p)
        (g,) = torch.autograd.grad(run(x, p), p)
        found.append((g, p.detach(), x, x.requires_grad))
    assert_same(*found)


@pytest.mark.parametrize(
    "value", [lambda x: x.detach(), lambda x: x.detach() * 2, lambda x: x.data]
)
@pytest.mark.parametrize("compiled", [jit, lambda f: jit(jit(f)), functionalize])
def test_a_buffer_with_a_detached_value(compiled, value):
    """It does not come to require grad: an average of weights, a queue of features, statistics."""
    buffer, x = torch.zeros(2), torch.ones(2, requires_grad=True)
    out = compiled(lambda x: (x * 2, buffer.copy_(value(x)))[0])(x)
    assert out.requires_grad and not buffer.requires_grad
    assert_same(buffer, value(x))


@pytest.mark.parametrize("before", [lambda x: x, lambda x: x.detach()])
def test_a_result_that_was_written_through_a_view_can_be_written_to(before):
    """What a call computes is no view for autograd, which forbids to write to one made without
    gradients."""

    def f(x):
        y = (before(x) - 1).flatten()
        y.add_(y, alpha=2)
        return y[:]

    def run(f):
        x = torch.arange(6.0).view(2, 3).requires_grad_()
        y = f(x * 1)
        y.mul_(x.sum())
        return y, torch.autograd.grad(y.sum(), x)

    assert_same(run(jit(f)), run(f))


@pytest.mark.parametrize(
    "write", [lambda y: y.masked_fill_(y < 0, 0.5), lambda y: y.copy_(torch.ones(2, 3))]
)
def test_what_is_written_keeps_its_strides(write):
    def f(x):
        y = x.tanh()
        write(y)
        return y, y[0]

    x = torch.randn(3, 2).t()
    assert [t.stride() for t in jit(f)(x)] == [t.stride() for t in f(x)] == [(1, 2), (2,)]


EMPTY = {
    "steps": lambda: torch.ones(2, 6)[:, ::2][None][:, :0],
    "columns": lambda: torch.ones(4, 6)[:, ::2][:, :0],
    "rows": lambda: torch.ones(0, 6)[:, ::2],
    "transposed": lambda: torch.ones(3, 0).t(),
    "permuted": lambda: torch.ones(2, 3, 0, 4).permute(3, 1, 2, 0),
}
IN_PLACE = {
    "mul_": lambda y: y.mul_(2),
    "lerp_": lambda y: y.lerp_(y, 0.3),
    "copy_": lambda y: y.copy_(torch.ones(y.shape)),
    "fill_": lambda y: y.fill_(2),
    "masked_fill_": lambda y: y.masked_fill_(y > 0, 1.0),
}


@pytest.mark.parametrize("own", [False, True], ids=["the argument", "a clone"])
@pytest.mark.parametrize("write", IN_PLACE)
@pytest.mark.parametrize("layout", EMPTY)
def test_what_is_empty_keeps_its_strides(layout, write, own):
    def f(x):
        y = x.clone() if own else x
        IN_PLACE[write](y)
        return y.clone(), y * 1

    def strides(f, x):
        return [(t.shape, t.stride()) for t in f(x)]

    assert strides(jit(f), EMPTY[layout]()) == strides(f, EMPTY[layout]())
    if own:
        x = EMPTY[layout]().requires_grad_()
        assert jit(f)(x)[1].requires_grad == f(x)[1].requires_grad
        assert torch.autograd.grad(jit(f)(x)[0].sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("written", [lambda y: y, lambda y: y.data], ids=["seen", "hidden"])
@pytest.mark.parametrize("source", [lambda c: c[2:], lambda c: c[1:].view(-1)[1:]])
@pytest.mark.parametrize("compiled", [jit, lambda f: aot_function(f, "eager")])
def test_a_copy_of_a_part_is_no_part(compiled, source, written):
    """The memory of what a part was copied into begins where it begins, and is no larger."""

    def f(x, c):
        c.mul_(2)
        y = x.detach().clone()
        written(y).copy_(source(c))
        return y, y

    x, c = torch.ones(1, requires_grad=True), torch.arange(3.0)
    y, same = compiled(f)(x, c)
    assert y is same and y.storage_offset() == 0 and y.untyped_storage().nbytes() == 4
    assert_same((y, c), (torch.tensor([4.0]), torch.tensor([0.0, 2.0, 4.0])))


VIEWS = {
    "all": lambda g: g[:],
    "a part": lambda g: g[:, 1:],
    "a row": lambda g: g[0],
    "a row of columns": lambda g: g.t()[1:][0],
    "transposed": lambda g: g.t(),
    "longer": lambda g: g.unsqueeze(0),
    "twice": lambda g: g.expand(2, *g.shape),
    "detached": lambda g: g.detach(),
    "parts": lambda g: g.unbind(1),
    "flat": lambda g: g.reshape(-1),
}
LAYOUTS = {
    "a part of columns": lambda: torch.randn(2, 6)[:, ::2],
    "a part of rows": lambda: torch.randn(4, 3)[::2],
    "transposed": lambda: torch.randn(3, 2).t(),
    "one value for all": lambda: torch.randn(()).expand(2, 3),
    "one column": lambda: torch.randn(2, 2).t()[:, 1:].expand(2, 3),
}


@pytest.mark.parametrize("compiled", [jit, lambda f: jit(jit(f))])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", VIEWS)
def test_views_of_gradients(name, layout, compiled):
    """A gradient is laid out as it was computed, not as what it is the gradient of."""

    def f(x):
        g = torch.autograd.grad(x.exp().sum(), x)[0]
        return VIEWS[name](g), g

    x = LAYOUTS[layout]().requires_grad_()
    got, want = compiled(f)(x), f(x)
    assert_same(got, want)
    for a, b in zip(*(torch.utils._pytree.tree_leaves(o) for o in (got, want)), strict=True):
        assert (a.stride(), a._is_view()) == (b.stride(), b._is_view())


W3 = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
LOSSES = {
    "elementwise": lambda x: x.exp(),
    "transposed": lambda x: x.t() * W3,
    "a product": lambda x: x @ W3,
    "a transposed product": lambda x: W3 @ x.t(),
    "a row of the transpose": lambda x: x.t()[0].sin(),
    "written": lambda x: (x * 1).t().mul_(W3).sin(),
    "of a compiled function": lambda x: jit(lambda t: t.t() * W3)(x),
    "a convolution": lambda x: torch.conv2d(
        x[None, None].contiguous(memory_format=torch.channels_last), W3[None, None]
    ),
    "a mean": lambda x: x.mean(0),
}
SQUARES = {
    "contiguous": lambda: torch.randn(3, 3),
    "transposed": lambda: torch.randn(3, 3).t(),
    "a part of columns": lambda: torch.randn(3, 6)[:, ::2],
    "a part of rows": lambda: torch.randn(6, 3)[::2],
}
PERHAPS_VIEWS = {
    "reshaped": lambda g: g.reshape(-1),
    "flattened": lambda g: g.flatten(),
    "contiguous": lambda g: g.contiguous(),
    "transposed, contiguous": lambda g: g.t().contiguous(),
}


@pytest.mark.parametrize("view", PERHAPS_VIEWS)
@pytest.mark.parametrize("layout", SQUARES)
@pytest.mark.parametrize("loss", LOSSES)
def test_what_shares_memory_with_a_gradient(loss, layout, view):
    """Whether it does depends on how the gradient is laid out."""

    def f(x, first):
        g = torch.autograd.grad(LOSSES[loss](x).sum(), x)[0]
        v = PERHAPS_VIEWS[view](g)
        (v if first else g).mul_(2)
        return g * 1, v * 1

    x = SQUARES[layout]().requires_grad_()
    for first in (False, True):
        try:
            got = jit(f)(x, first)
        except CaptureError as e:  # expanded here, and in eager perhaps not
            assert loss == "a mean" and "expanded" in str(e)
        else:
            assert_same(got, f(x, first))
