"""What autograd says of the results of a compiled function is what eager says: leaves that the
function makes, views that it makes under no_grad, what has a derivative of zero, checkpoints,
hooks, and results with nothing in common."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from aotfunc import aot_function, jit
from aotfunc.errors import CaptureError
from tests.reference import assert_same

HOWS = [jit, aot_function]


def both(f):
    """``run(lambda f: f)`` in eager mode, and compiled each way: ``f(compiled)`` is the whole
    program."""
    want = f(lambda g: g)
    for how in HOWS:
        assert_same(f(how), want)


def said(*tensors):
    """What autograd says of tensors."""
    return [(t.requires_grad, t.is_leaf, t.grad_fn is None) for t in tensors]


def numbered(loss_of):
    """The sum of the results, each weighed differently."""
    return sum((k + 1) * t.sin().sum() for k, t in enumerate(loss_of) if t.requires_grad)


# ----- leaves made inside ------------------------------------------------------------------------


def unreachable(x, w):
    return torch.zeros_like(x).requires_grad_() * 2, x.detach() * 2


def alone(x, w):
    return x.detach().requires_grad_(), w * x, torch.ones_like(x, requires_grad=True)


def penalty(x, w):
    v = x.detach().requires_grad_()
    y = (v * w).sin().sum()
    (g,) = torch.autograd.grad(y, v, create_graph=True)
    return (g.norm() - 1).square(), y


@pytest.mark.parametrize("f", [unreachable, alone, penalty])
@pytest.mark.parametrize("tracked", [True, False])
def test_leaves_made_inside(f, tracked):
    """They are leaves when they are returned, and make what is computed from them require grad."""

    def program(how):
        x, w = (
            torch.arange(3.0).requires_grad_(tracked),
            torch.tensor([0.5, -1.0, 2.0], requires_grad=True),
        )
        outs = how(f)(x, w)
        told = said(*outs)
        numbered(outs).backward()
        return told, [o.grad for o in outs if o.is_leaf], x.grad, w.grad

    both(program)


#: made under no_grad: ``made(x, w)``, and what happens to it where gradients are on
QUIETLY_MADE = {
    "written by what requires grad": (lambda x, w: torch.arange(3.0), lambda v, w: v.add_(w)),
    "computed, and written": (lambda x, w: w * 2, lambda v, w: v.mul_(w)),
    "written in part": (lambda x, w: x * 2, lambda v, w: v[1:].copy_(w[1:])),
    "written by what does not": (lambda x, w: w * 2, lambda v, w: v.mul_(2)),
    "made a leaf": (lambda x, w: x * 2, lambda v, w: v.requires_grad_()),
    "a view": (lambda x, w: w[:], lambda v, w: None),
    "detached": (lambda x, w: w.detach().clone(), lambda v, w: v.mul_(w)),
}


@pytest.mark.parametrize("name", QUIETLY_MADE)
def test_a_function_asks_whether_what_no_grad_made_is_a_leaf(name):
    made, then = QUIETLY_MADE[name]

    def program(how):
        x, w = torch.ones(3), torch.tensor([0.5, -1.0, 2.0], requires_grad=True)

        def f(x):
            with torch.no_grad():
                v = made(x, w)
            then(v, w)
            told = said(v)[0]
            return w * v * (1 + told[0] + 2 * told[1] + 4 * told[2])

        y = how(f)(x)
        y.sum().backward()
        return y, w.grad

    both(program)


def test_leaves_that_are_refused():
    def differentiated(x):
        v = torch.ones(3, requires_grad=True)
        (v * x).sum().backward()
        return v

    with pytest.raises(CaptureError, match=r"made inside is returned, and has a \.grad"):
        jit(differentiated)(torch.ones(3))


# ----- views made under no_grad, derivatives of zero ---------------------------------------------


def test_views_made_under_no_grad():
    """They require grad, and have no derivative; so does what is computed from them."""

    def f(x, w):
        y = x * w
        with torch.no_grad():
            v, u, t, d = y[1:], w[1:], x[1:], (x * w)[1:]
        seen = [
            x * (1 + s.requires_grad + 2 * s.is_leaf + 4 * (s.grad_fn is None))
            for s in (y, v, u, t, d)
        ]
        return v * 2, u * 2, t * w[1:], d * 2, v * y[1:], *seen

    def program(how):
        x, w = torch.arange(3.0), torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
        outs = how(f)(x, w)
        numbered(outs).backward()
        return said(*outs), outs, w.grad

    both(program)


def unused(x):
    with torch.no_grad():
        v = x[1:]
    return torch.autograd.grad((v * 3).sum(), x, allow_unused=True)[0] is None


def test_a_gradient_does_not_pass_them():
    for how in HOWS:
        assert how(unused)(torch.ones(3, requires_grad=True)) is True


FLAT = [torch.floor, torch.ceil, torch.trunc, torch.round, torch.sign]
IN_PLACE = [
    "zero_()",
    "fill_(2)",
    "normal_()",
    "uniform_()",
    "random_(3)",
    "log_normal_()",
    "geometric_(0.5)",
    "floor_()",
]
IN_PLACE += [
    "cauchy_()",
    "exponential_()",
    "bernoulli_(0.5)",
    "sign_()",
    "gt_(0)",
    "ne_(1)",
    "round_(decimals=1)",
]


@pytest.mark.parametrize("op", [*FLAT, *IN_PLACE], ids=lambda op: getattr(op, "__name__", op))
def test_a_derivative_of_zero(op):
    """The result requires grad, and the gradient is zeros."""

    def f(x):
        y = x * 2
        if isinstance(op, str):
            eval(f"y.{op}")
            return y, y * 2
        return op(y), op(y) * x

    def program(how):
        x = torch.tensor([0.3, -1.2, 2.0], requires_grad=True)
        torch.manual_seed(0)
        y, z = how(f)(x)
        told = said(y, z)
        first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
        return (
            told,
            first,
            torch.autograd.grad(z.sum(), x)[0],
            how(lambda x: f(x)[0].requires_grad)(x),
        )

    both(program)


def test_what_is_made_like_a_tensor_does_not_require_grad():
    def f(w):
        made = [
            torch.zeros_like(w),
            torch.rand_like(w),
            w.new_ones(3),
            torch.full_like(w, 2),
            (w > 0).double(),
            w.floor(),
        ]
        return [w.detach() * (2 if t.requires_grad else 3) for t in made]

    both(lambda how: how(f)(torch.tensor([0.5, -1.0, 2.0], requires_grad=True)))


# ----- checkpoints, hooks, shapes ----------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize(
    "part", [lambda t: t.detach() * 2, lambda t: torch.ones(3), lambda t: t * 2]
)
@pytest.mark.parametrize("tracked", [True, False])
def test_results_of_a_reentrant_checkpoint(part, tracked):
    """They require grad if an argument does, whatever they were computed from."""

    def f(x):
        v = checkpoint(part, x, use_reentrant=True)
        return v, v * 2

    both(lambda how: said(*how(f)(torch.ones(3, requires_grad=tracked))))


@pytest.mark.parametrize("how", [jit, lambda f: aot_function(f, "eager")])
def test_gradients_through_a_reentrant_checkpoint_are_those_of_backward(how):
    """However they are asked for: eager leaves out what the checkpoint closes over, or refuses."""
    w, x = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    f = lambda x: checkpoint(lambda t: w.sin() * t.exp(), x, use_reentrant=True) * w
    f(x).sum().backward()
    want = w.grad, x.grad
    assert_same(torch.autograd.grad(how(f)(x).sum(), [w, x]), want)
    assert_same(torch.autograd.grad(how(f)(x).sum(), w), want[:1])
    w.grad = x.grad = None
    how(f)(x).sum().backward(inputs=[w])
    assert_same(w.grad, want[0]) and x.grad is None


def test_a_reentrant_checkpoint_that_writes_to_its_argument():
    def f(x):
        return checkpoint(lambda t: t.mul_(2) + 1, x, use_reentrant=True)

    for x in torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True) * 1:
        with pytest.raises(CaptureError, match="a checkpoint writes to its argument"):
            jit(f)(x)
        assert_same(x.detach(), torch.ones(3))
    assert_same(jit(f)(torch.ones(3)), torch.full((3,), 3.0))


def test_hooks_where_gradients_are_off():
    def f(x):
        y = x * 2
        with torch.no_grad():
            y.register_hook(lambda g: g * 5)
            v = y[1:]
        v.register_hook(lambda g: g * 7)
        return y * 3, v * 2

    def program(how):
        x = torch.ones(3, requires_grad=True)
        outs = how(f)(x)
        outs[0].sum().backward()
        return said(*outs), x.grad

    both(program)


def hooked_view(x):
    v = x[1:]
    v.register_hook(lambda g: g * 2)
    return v


def hooked_argument(x):
    x.register_hook(lambda g: g * 2)
    return x.detach()


def hooked_twice(x):
    x.register_hook(lambda g: g * 2)
    x.register_hook(lambda g: g * 3)
    return x[:]


def hooked_and_seen(x):
    y = x * 2
    d = y.detach()
    y.register_hook(lambda g: g * 2)
    return y * 1, d, y


@pytest.mark.parametrize("f", [hooked_argument, hooked_twice])
def test_a_hooked_argument_and_a_view_of_it(f):
    def program(how):
        x = torch.ones(3, requires_grad=True)
        y = x * 2
        out = how(f)(y)
        (y * 5 + (out if out.requires_grad else 0)).sum().backward()
        return said(out), out._base is y, x.grad

    both(program)


@pytest.mark.parametrize("f", [hooked_view, hooked_and_seen])
def test_hooked_tensors_that_share_memory_are_refused(f):
    for how in HOWS:
        with pytest.raises(CaptureError, match=r"a tensor with a hook.*shares memory"):
            how(f)(torch.ones(3, requires_grad=True) * 1)


def test_shapes_changed_in_place():
    """Also of a view to whose base a derivative came, and under no_grad where the call is."""

    def f(w, y):
        y.mul_(w)
        y.transpose_(0, 1)
        with torch.enable_grad():
            return y * 2

    def program(how):
        w, y = torch.arange(3.0, requires_grad=True), torch.ones(3, 3)[:2]
        out = how(f)(w, y)
        out.sum().backward()
        z = torch.ones(2, 3, requires_grad=True)
        with torch.no_grad():
            quiet = how(f)(w, z)
        return out, y, w.grad, said(out, y), quiet, z.shape, said(quiet, z)

    both(program)


def test_a_gradient_taken_inside_has_passed_the_hooks():
    def f(x):
        y = x * 2
        y.register_hook(lambda g: g * 5)
        y.register_hook(lambda g: g + 1)
        return torch.autograd.grad((y**3).sum(), y, create_graph=True)[0], torch.autograd.grad(
            y.sum(), x
        )[0]

    both(lambda how: how(f)(torch.arange(3.0, requires_grad=True)))


def test_shapes_changed_in_place_under_no_grad():
    def argument(x):
        with torch.no_grad():
            x.t_()
        return x * 2

    def inside(x):
        y = x * 2
        with torch.no_grad():
            y.t_()
        return y * 2

    for f in argument, inside:
        x = torch.ones(2, 3, requires_grad=True)
        with pytest.raises(
            CaptureError, match="under no_grad changes the shape of a tensor whose gradient"
        ):
            jit(f)(x)
        assert x.shape == (2, 3)


# ----- backwards of some of the results ----------------------------------------------------------


class Pair(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x)
        return x * 2, y * 3

    @staticmethod
    def backward(ctx, g, h):
        return g * 2, h * ctx.saved_tensors[0] + 1


@pytest.mark.parametrize("create_graph", [True, False])
@pytest.mark.parametrize("which", [0, 1])
def test_a_function_gets_zeros_where_there_is_no_gradient(which, create_graph):
    def program(how):
        x, y = torch.arange(3.0, requires_grad=True), torch.ones(3, requires_grad=True)
        out = how(Pair.apply)(x, y)[which]
        return torch.autograd.grad(out.sum(), [x, y], allow_unused=True, create_graph=create_graph)

    both(program)


class Halved(torch.autograd.Function):
    """Says of each gradient that is not there that there is none."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.set_materialize_grads(False)
        return x * 2, y * 3

    @staticmethod
    def backward(ctx, g, h):
        return None if g is None else g * 2, None if h is None else h * 3


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    "flat", [torch.floor, torch.zero_, lambda t: t.detach() + t.round(), lambda t: t.exp()]
)
def test_zeros_pass_a_function_as_other_gradients_do(flat, which):
    def program(how):
        x, y = torch.arange(3.0, requires_grad=True), torch.ones(3, requires_grad=True)
        out = how(lambda x, y: (flat(Halved.apply(x * 1, y * 1)[which]), x * y))(x, y)
        return torch.autograd.grad(out[0].sum(), [x, y], allow_unused=True)

    both(program)


def test_zeros_pass_the_hooks_of_a_module():
    m = nn.Dropout(0.0)
    m.register_full_backward_hook(
        lambda m, gi, go: tuple(None if g is None else g * 2 for g in gi)
    )

    def program(how):
        x, w = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
        f = lambda x, w: (m((x * 2)[:2]) + x[:2]).copy_(w[:2])
        return torch.autograd.grad(how(f)(x, w).sum(), [x, w])

    both(program)


@pytest.mark.parametrize("view", [lambda t: t, lambda t: t[:], lambda t: t[1:]])
@pytest.mark.parametrize("write", [torch.Tensor.copy_, lambda t, y: t.fill_(y.sum())])
def test_what_is_written_over_gets_zeros(view, write):
    def f(x, y):
        v = x * x
        write(view(v), y)
        return v, view(v) * 2

    def program(how):
        x, y = (
            torch.tensor([1.0, 2.0, 3.0], requires_grad=True),
            torch.tensor(2.0, requires_grad=True),
        )
        v, w = how(f)(x, y)
        grads = torch.autograd.grad(
            (v.sin() * 3).sum(), [x, y], allow_unused=True, retain_graph=True
        )
        return (
            v,
            w,
            [
                g + 0
                for g in (*grads, *torch.autograd.grad(w.exp().sum(), [x, y], allow_unused=True))
            ],
        )

    both(program)


def test_results_with_no_input_in_common():
    """A backward of one visits nothing of the others: a graph that was freed, hooks, which would
    get None."""

    def program(how):
        x, w = torch.arange(3.0, requires_grad=True), torch.ones(3, requires_grad=True)
        y = x.exp()
        y.register_hook(lambda g: g * 2)
        y.sum().backward()
        a, b = how(lambda y, w: (y.sin(), w.sin()))(y, w)
        b.sum().backward()
        return a, b, x.grad, w.grad, said(a, b)

    both(program)


@pytest.mark.parametrize("count", [2, 3, 12])
def test_results_with_some_inputs_in_common(count):
    """Hooks of the others' inputs are not called, those of theirs once, with the whole
    gradient."""

    def f(*xs):
        return [(x * xs[0]).sin() for x in xs[1:]], xs[0].cos(), sum(xs).tanh()

    def program(how):
        leaves = [torch.arange(3.0).add(k).requires_grad_() for k in range(count)]
        xs, called = [t.sin() if k % 2 else t for k, t in enumerate(leaves)], {}
        for k, x in enumerate(xs):
            x.register_hook(lambda g, k=k: called.setdefault(k, []).append(g.clone()))
        outs, *rest = how(f)(*xs)
        for o in (
            [outs[0], rest[0], outs[-1] + outs[0], *rest] if count < 12 else [outs[0] + rest[1]]
        ):
            o.sum().backward(retain_graph=True)
        return sorted(called.items()), [t.grad for t in leaves]

    both(program)


def test_an_input_that_no_gradient_reaches_keeps_its_graph():
    def program(how):
        x, y = torch.arange(3.0, requires_grad=True), torch.ones(3, requires_grad=True)
        h = y.exp()
        a, b = how(lambda x, h: (x.sin(), x * h))(x, h)
        a.sum().backward()
        first = y.grad
        b.sum().backward()
        return first, x.grad, y.grad

    both(program)


def test_a_graph_that_keeps_nothing_is_never_spent():
    def program(how):
        w, x = torch.ones(3, requires_grad=True), torch.zeros(2, 3)
        f = how(lambda x: (x.sub_(w), x * 3)[1])
        for _ in range(3):
            f(x).sum().backward()
        y = how(lambda w: w.expand(2, 3) - 2)(w)
        y.sum().backward()
        y.sin().sum().backward()
        return w.grad

    both(program)


def test_hooks_of_results_that_no_gradient_reaches():
    def program(how):
        x = torch.arange(3.0, requires_grad=True)
        a, b = how(lambda x: (x.sin(), x.cos()))(x)
        b.register_hook(lambda g: g * 2)
        a.sum().backward(retain_graph=True)
        first = x.grad.clone()
        b.sum().backward()
        return first, x.grad

    both(program)


def test_a_hidden_write_gives_no_way_back():
    def f(w, y):
        y.detach()[0].fill_(0.5)
        return w.sin()

    def program(how):
        w, x = torch.arange(3.0, requires_grad=True), torch.ones(3, requires_grad=True)
        y = x.exp()
        y.sum().backward()
        how(f)(w, y).sum().backward()
        return w.grad, x.grad, y

    both(program)


def test_two_views_of_one_result_are_two_tensors():
    def f(w):
        v = (w * 2).squeeze()
        return v, v.view(-1), nn.functional.relu(v)

    def program(how):
        outs = how(f)(torch.arange(3.0, requires_grad=True))
        return [a is b for a in outs for b in outs], outs

    both(program)


@pytest.mark.parametrize(
    "write", [lambda y: y.detach().add_(1), lambda y: y.data.mul_(2), lambda y: y.mul_(2)]
)
def test_a_hooked_view_that_is_written_to_is_refused(write):
    """Eager makes the history of such a view anew, and forgets the hook."""

    def f(x):
        y = (x * 1)[..., ::2]
        y.register_hook(lambda g: g * 2)
        write(y)
        return y[:]

    x = torch.arange(6.0).view(2, 3).requires_grad_()
    for how in HOWS:
        with pytest.raises(CaptureError, match="a tensor with a hook"):
            how(f)(x)


@pytest.mark.parametrize("view", [lambda x: x[:, 1:], lambda x: x.view(-1), lambda x: x])
def test_a_returned_argument_that_shows_a_written_one_is_itself(view):
    def f(x, y):
        x.mul_(2)
        return y, x * 3, y[:1]

    def program(how):
        leaf = torch.arange(6.0).view(2, 3).requires_grad_()
        x = leaf * 1
        y = view(x)
        out = how(f)(x, y)
        loss = sum((k + 1) * t.sin().sum() for k, t in enumerate(out))
        return out[0] is y, out[2]._base is x, out, torch.autograd.grad(loss, leaf)

    both(program)


VIEWS_OF_A_LEAF = {
    "a part": lambda v, w: w[1:],
    "written": lambda v, w: (w[1:], v.add_(w.sin()))[0],
    "of a view": lambda v, w: (w.view(-1)[1:], v.mul_(w))[0],
}


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("view", VIEWS_OF_A_LEAF)
def test_a_view_of_a_leaf_in_the_memory_of_something_else_is_refused(view, how):
    def f(x):
        v = x * 2
        return VIEWS_OF_A_LEAF[view](v, v.detach().requires_grad_())

    with pytest.raises(
        CaptureError, match="a view of a tensor that was made inside and requires grad"
    ):
        how(f)(torch.ones(3))


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize(
    "made", [lambda w: w.detach().requires_grad_(), lambda w: nn.Parameter(torch.ones(3))]
)
def test_a_leaf_made_inside_is_written_to_tensors_from_outside(which, made):
    """To any of them, in any order in which the function reads them."""

    def program(how):
        w, kept = torch.ones(3, requires_grad=True), [torch.ones(3) for _ in range(3)]

        def f(x):
            leaf = made(w)
            for k in range(which + 1):
                x = x * kept[k]
            kept[which].add_(leaf)
            return x * 2

        out = how(f)(torch.arange(3.0))
        return [t.requires_grad for t in (out, *kept)], [t.detach() for t in (out, *kept)]

    both(program)
