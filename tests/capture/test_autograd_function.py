"""torch.autograd.Function in every style and by every name: its own rules are used, nested and
under vmap."""

import pytest
import torch
from torch.autograd import Function

import aotfunc
from aotfunc import aot_function, grad, jacrev, jit, jvp, make_fx, vjp, vmap
from aotfunc.capture.captured import Captured
from aotfunc.errors import AotfuncError
from tests.functions import SavesInputs
from tests.inputs import f64
from tests.reference import assert_same, grads, loop

# Every backward here is ten times the truth, so that it is seen whose rule is used.


class Tenfold(Function):
    """The derivative of x * x."""

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 20 * g * x


class Old(Tenfold):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x


class New(Tenfold, SavesInputs):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def jvp(ctx, t):
        (x,) = ctx.saved_tensors
        return 20 * t * x


class OwnVmap(Tenfold, SavesInputs):
    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def vmap(info, in_dims, x):
        assert info.batch_size == x.shape[in_dims[0]]
        return OwnVmap.apply(x), in_dims[0]


class SavesOnCtx(Function):
    @staticmethod
    def forward(ctx, x, n, flag):
        ctx.n, ctx.x = n, x
        assert flag is True
        return x**n

    @staticmethod
    def backward(ctx, g):
        return 10 * g * ctx.n * ctx.x ** (ctx.n - 1), None, None


class TwoOutputs(Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        index = (x * y).argmax()
        ctx.mark_non_differentiable(index)
        return x * y, x + y, index

    @staticmethod
    def backward(ctx, g, h, _):
        x, y = ctx.saved_tensors
        return 10 * (g * y + h), 10 * (g * x + h) if ctx.needs_input_grad[1] else None


class SavesItsOutput(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return 10 * g * y


class Nested(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return Old.apply(x) * 2

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return SavesItsOutput.apply(x) * g


class StraightThrough(Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


class Once(Old):
    backward = staticmethod(torch.autograd.function.once_differentiable(Tenfold.backward))


class NoMaterialize(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        return x * 1, x * 2

    @staticmethod
    def backward(ctx, g, h):
        assert g is None or h is None
        return 10 * (h if g is None else g)


sq = Old.apply  # an alias made before any capture
FUNCTIONS = {
    "old style": lambda x: Old.apply(x),
    "new style": lambda x: New.apply(x),
    "alias": lambda x: sq(x),
    "own vmap": lambda x: OwnVmap.apply(x),
    "values on ctx": lambda x: SavesOnCtx.apply(x, 3, True),
    "two outputs": lambda x: TwoOutputs.apply(x, x * 2)[0] + TwoOutputs.apply(x, x)[1],
    "saves its output": lambda x: SavesItsOutput.apply(x),
    "nested": lambda x: Nested.apply(x),
    "straight through": lambda x: StraightThrough.apply(x * 2) * x,
    "in the middle": lambda x: Old.apply(x.sin()).exp(),
    "twice": lambda x: Old.apply(Old.apply(x)),
    "no materialize": lambda x: NoMaterialize.apply(x)[1],
}
functions = pytest.mark.parametrize("name", FUNCTIONS)


def total(name):
    return lambda x: FUNCTIONS[name](x).sum()


@functions
def test_gradient_is_the_functions_own(name):
    x = f64(3)
    g, value = aotfunc.grad_and_value(total(name))(x)
    assert_same(value, total(name)(x))
    assert_same(g, grads(total(name))(x))


@functions
def test_captured(name):
    x = f64(3)
    assert_same(make_fx(FUNCTIONS[name])(x)(x), FUNCTIONS[name](x))
    assert_same(make_fx(grad(total(name)))(x)(x), grads(total(name))(x))


@functions
def test_second_order(name):
    x = f64(3)
    expected = grads(lambda x: grads(total(name), create_graph=True)(x).sum())(x)
    assert_same(grad(lambda x: grad(total(name))(x).sum())(x), expected)


@functions
def test_per_sample(name):
    x = f64(4, 3)
    assert_same(vmap(FUNCTIONS[name])(x), loop(FUNCTIONS[name])(x))
    assert_same(vmap(grad(total(name)))(x), loop(grads(total(name)))(x))


@functions
def test_jacobian(name):
    x = f64(3)
    assert_same(jacrev(FUNCTIONS[name])(x), torch.diag(grads(total(name))(x)))


@functions
def test_backward_outside(name):
    x = f64(3)
    for run in (
        aotfunc.jit(FUNCTIONS[name]),
        aotfunc.aot_function(FUNCTIONS[name], "eager"),
        vmap(FUNCTIONS[name]),
    ):
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(run(leaf).sum(), leaf)
        assert_same(g, grads(total(name))(x))


@functions
def test_grad_of_jit(name):
    x = f64(3)
    assert_same(grad(aotfunc.jit(total(name)))(x), grads(total(name))(x))


def test_jvp_uses_the_functions_jvp():
    x, t = f64(3), f64(3)
    assert_same(jvp(New.apply, (x,), (t,)), (x * x, 20 * t * x))


def test_jvp_without_a_rule_is_the_transposed_backward():
    x, t = f64(3), f64(3)
    (g,) = torch.autograd.grad(Old.apply(y := x.clone().requires_grad_()).sum(), y)
    assert_same(jvp(Old.apply, (x,), (t,))[1], t * g)


def test_closed_over_in_vmap_and_backward_outside():
    w = f64(3).requires_grad_()
    vmap(New.apply)(w).sum().backward()
    assert_same(w.grad, 20 * w.detach())


def test_apply_outside_a_capture_is_left_as_it_was():
    x = f64(3).requires_grad_()
    grad(total("old style"))(f64(3))
    (g,) = torch.autograd.grad(Old.apply(x).sum(), x)
    assert_same(g, 20 * x.detach())


def test_vjp_many_times():
    x, v = f64(3), f64(3)
    _, pull = vjp(Old.apply, x)
    for scale in (1.0, 2.0):
        assert_same(pull(scale * v), (20 * scale * v * x,))


def test_once_differentiable():
    x = f64(3)
    f = lambda x: Once.apply(x).sum()
    assert_same(grad(f)(x), 20 * x)


def test_inside_no_grad():
    def f(x):
        with torch.no_grad():
            y = Old.apply(x)
        return (x * y).sum()

    x = f64(3)
    assert_same(grad(f)(x), x * x)


def test_a_function_defined_inside_f():
    def f(x):
        class Local(Function):
            @staticmethod
            def forward(ctx, x):
                return x * 2

            @staticmethod
            def backward(ctx, g):
                return g * 7

        return Local.apply(x).sum()

    assert_same(grad(f)(f64(3)), torch.full((3,), 7.0, dtype=torch.float64))
    assert_same(grad(f)(f64(3)), torch.full((3,), 7.0, dtype=torch.float64))


def test_a_changed_closure_value_is_seen():
    scale = [1.0]

    class Scaled(Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, g):
            return g * scale[0]

    f = grad(lambda x: Scaled.apply(x).sum())
    x = f64(3)
    assert_same(f(x), torch.ones_like(x))
    scale[0] = 5.0
    assert_same(f(x), torch.full_like(x, 5.0))


def test_mark_dirty():
    class AddOne(Function):
        @staticmethod
        def forward(ctx, x):
            x.add_(1)
            ctx.mark_dirty(x)
            return x

        @staticmethod
        def backward(ctx, g):
            return 10 * g

    f = lambda x: (AddOne.apply(x * 2) * x).sum()
    x = f64(3)
    assert_same(grad(f)(x), grads(f)(x))


class ExpInPlace(Function):
    """exp, in the memory of its argument; its jvp is in place too, as autograd demands."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.exp_()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_dirty(*inputs)
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]

    @staticmethod
    def jvp(ctx, t):
        return t.mul_(ctx.saved_tensors[0])


IN_PLACE = {
    "jvp": lambda f, x, t: jvp(f, (x,), (t,)),
    "jvp vmap": lambda f, x, t: jvp(vmap(f), (x,), (t,)),
    "vmap jvp": lambda f, x, t: vmap(lambda x, t: jvp(f, (x,), (t,)))(x, t),
    "vjp jvp": lambda f, x, t: vjp(lambda x: jvp(f, (x,), (t,))[1], x)[1](t),
    "jvp jvp": lambda f, x, t: jvp(lambda x: jvp(f, (x,), (t,))[1], (x,), (t,)),
    "jvp vjp": lambda f, x, t: jvp(lambda x: vjp(f, x)[1](t)[0], (x,), (t,)),
    "vmap vjp jvp": lambda f, x, t: vmap(
        lambda x, t: vjp(lambda x: jvp(f, (x,), (t,))[1], x)[1](t)
    )(x, t),
    "jit": lambda f, x, t: jit(lambda x, t: jvp(f, (x,), (t,)))(x, t),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_jvp_in_place_of_a_dirty_argument(name):
    x, t = f64(2, 3), f64(2, 3)
    got = IN_PLACE[name](lambda x: ExpInPlace.apply(x * 1), x, t.clone())
    assert_same(got, IN_PLACE[name](torch.exp, x, t))


def test_jvp_in_place_of_an_argument_that_is_not_dirty_is_refused():
    class Exp(ExpInPlace):
        @staticmethod
        def forward(x):
            return x.exp()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_forward(output)

    with pytest.raises(AotfuncError, match="writes to what it was given"):
        jvp(Exp.apply, (f64(3),), (f64(3),))


class Counting(SavesInputs):
    """x * w; what backward returns is multiplied by how many gradients it was asked for."""

    @staticmethod
    def forward(x, w):
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        by_x, by_w = ctx.needs_input_grad
        g = g * sum(ctx.needs_input_grad)
        return g * w if by_x else None, g * x if by_w else None


NEEDED = {
    "grad by x": (lambda f, x, w: grad(lambda x: f(x, w).sum())(x), lambda x, w: w),
    "argnums": (lambda f, x, w: grad(lambda x, w: f(x, w).sum(), 1)(x, w), lambda x, w: x),
    "both": (
        lambda f, x, w: grad(lambda x, w: f(x, w).sum(), (0, 1))(x, w)[0],
        lambda x, w: 2 * w,
    ),
    "vmap in grad": (lambda f, x, w: grad(lambda x: vmap(f)(x, w).sum())(x), lambda x, w: w),
    "grad in vmap": (lambda f, x, w: vmap(grad(f))(x, w), lambda x, w: w),
    "jacfwd": (lambda f, x, w: aotfunc.jacfwd(lambda w: f(x, w))(w), lambda x, w: torch.diag(x)),
    "a detached value": (
        lambda f, x, w: grad(lambda x: f(x, x.detach()).sum())(x),
        lambda x, w: x,
    ),
    "jit in grad": (lambda f, x, w: grad(lambda x: aotfunc.jit(f)(x, w).sum())(x), lambda x, w: w),
    "a closed-over leaf": (
        lambda f, x, w: (lambda leaf: grad(lambda x: f(x, leaf).sum())(x))(
            w.clone().requires_grad_()
        ),
        lambda x, w: 2 * w,
    ),
}


@pytest.mark.parametrize("case", NEEDED)
def test_needs_input_grad_is_true_for_what_is_differentiated(case):
    call, right = NEEDED[case]
    x, w = torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(call(Counting.apply, x, w).detach(), right(x, w))


@pytest.mark.parametrize("compiled", [aotfunc.jit, lambda f: aotfunc.aot_function(f, "eager")])
def test_a_compiled_function_knows_what_needs_a_gradient(compiled):
    x, w = torch.randn(2, 3)
    compiled = compiled(lambda x, w: Counting.apply(x, w))
    compiled(x, w)
    a, b, one = x.clone().requires_grad_(), w.clone().requires_grad_(), torch.ones(3)
    assert torch.equal(torch.autograd.grad(compiled(a, w), a, one)[0], w)
    assert torch.equal(torch.autograd.grad(compiled(x, b), b, one)[0], x)
    assert torch.equal(torch.autograd.grad(compiled(a, b), a, one)[0], 2 * w)
    with torch.autograd.forward_ad.dual_level():  # a tangent for what did not require grad
        dual = torch.autograd.forward_ad.make_dual(x, one)
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(compiled(dual, w)).tangent, 2 * w)


class Asking(SavesInputs):
    """x * y, whose backward gives what is asked for and calls it again."""

    @staticmethod
    def forward(x, y):
        return x * y

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        by_x, by_y = ctx.needs_input_grad
        return Asking.apply(g, y) if by_x else None, Asking.apply(g, x) if by_y else None

    @staticmethod
    def jvp(ctx, t, u):
        x, y = ctx.saved_tensors
        return t * y + u * x

    @staticmethod
    def vmap(info, in_dims, x, y):
        x, y = (
            t.movedim(d, -1) if d is not None else t.unsqueeze(-1) for t, d in zip((x, y), in_dims)
        )
        return Asking.apply(x, y), -1


class CubeByAsking(Function):
    """(x³, 3x²), whose rules apply another Function to what the context saved."""

    @staticmethod
    def forward(x):
        return x**3, 3 * x**2

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output[1])
        ctx.save_for_forward(inputs[0], output[1])

    @staticmethod
    def backward(ctx, g, h):
        x, slope = ctx.saved_tensors
        return Asking.apply(g, slope) + 6 * Asking.apply(h, x)

    @staticmethod
    def jvp(ctx, t):
        x, slope = ctx.saved_tensors
        return Asking.apply(t, slope), 6 * Asking.apply(t, x)


@pytest.mark.parametrize(
    "f", [lambda x: CubeByAsking.apply(x)[0], lambda x: Asking.apply(x, Asking.apply(x, x))]
)
def test_a_rule_that_asks_what_is_needed_is_differentiated_again(f):
    x, v = torch.randn(2, 3, dtype=torch.float64)
    once, twice = 3 * x**2, 6 * x * v
    push = lambda x: aotfunc.jvp(f, (x,), (v,))[1]
    pull = lambda x: aotfunc.vjp(f, x)[1](v)[0]
    torch.testing.assert_close(aotfunc.grad(lambda x: f(x).sum())(x), once)
    for second in (
        aotfunc.vjp(push, x)[1](torch.ones_like(x))[0],
        aotfunc.vjp(pull, x)[1](torch.ones_like(x))[0],
        aotfunc.jvp(pull, (x,), (torch.ones_like(x),))[1],
        aotfunc.vmap(aotfunc.grad(lambda x, v: aotfunc.jvp(f, (x,), (v,))[1]))(x, v),
        aotfunc.grad(
            lambda x: aotfunc.vmap(lambda x, v: aotfunc.jvp(f, (x,), (v,))[1])(x, v).sum()
        )(x),
        aotfunc.vmap(aotfunc.grad(lambda x: aotfunc.grad(f)(x)))(x) * v,
        aotfunc.grad(lambda x: aotfunc.vmap(aotfunc.grad(f))(x).sum())(x) * v,
    ):
        torch.testing.assert_close(second, twice)
    third = aotfunc.grad(lambda x: aotfunc.vmap(aotfunc.grad(aotfunc.grad(f)))(x).sum())(x)
    torch.testing.assert_close(third, torch.full_like(x, 6.0))


class Project(Function):
    """Its backward and that of Lift call each other."""

    generate_vmap_rule = True
    scale = 1.0

    @staticmethod
    def forward(x):
        return x.sin() * Project.scale

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.power = 2

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return Lift.apply(g) * x.cos() * Project.scale**ctx.power


class Lift(SavesInputs):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * 3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return Project.apply(g) + x


def projected(x):
    return Lift.apply(Project.apply(x)).sum()


def square_of_gradient(A, x):
    return (A.grad(projected)(x) ** 2).sum()


MUTUAL = {
    "grad": lambda A, x: A.grad(projected)(x),
    "jacrev": lambda A, x: A.jacrev(A.grad(projected))(x),
    "second": lambda A, x: A.grad(lambda y: square_of_gradient(A, y))(x),
    "third": lambda A, x: A.grad(lambda y: A.grad(lambda z: square_of_gradient(A, z))(y).sum())(x),
    "vmap": lambda A, x: A.vmap(A.grad(projected))(x.expand(2, 3)),
}


@pytest.mark.parametrize("name", MUTUAL)
def test_functions_whose_backwards_call_each_other_are_captured_once(name, monkeypatch):
    made, build = [], Captured._build
    monkeypatch.setattr(Captured, "_build", lambda *args: made.append(1) or build(*args))
    for k in range(5):
        made.clear()
        MUTUAL[name](aotfunc, torch.full((3,), 0.1 * k))
    assert not made


@pytest.mark.parametrize("name", MUTUAL)
def test_functions_whose_backwards_call_each_other_read_what_has_changed(name, monkeypatch):
    x = f64(3)
    for scale in (1.0, 2.0, 0.5, 2.0):
        monkeypatch.setattr(Project, "scale", scale)
        assert_same(MUTUAL[name](aotfunc, x), MUTUAL[name](torch.func, x))


@pytest.mark.parametrize("way", [lambda f: f, jit], ids=["eager", "jit"])
def test_of_a_view_that_was_written(way):
    """Its value may lie otherwise in memory than the view did."""

    def f(x):
        v = (x * 1)[None].diagonal()
        v.sin_()
        return StraightThrough.apply(v) * v

    x = torch.arange(6.0).view(3, 2).t().requires_grad_()
    y = way(f)(x)
    (g,) = torch.autograd.grad(y.sum(), x)
    s = torch.tensor([0.0, 2.0, 4.0]).sin()
    assert_same(y.flatten(), s.round() * s)
    want = torch.zeros(2, 3)
    want[0] = (s + s.round()) * torch.tensor([0.0, 2.0, 4.0]).cos()
    assert_same(g, want)


# ----- one tensor in several places --------------------------------------------------------------


def in_two_places(ctx, x):
    y = x * 2
    return y, y


def in_two_of_three(ctx, x):
    y = x * 2
    return y, x * 3, y


def without_a_derivative(ctx, x):
    y = x * 2
    ctx.mark_non_differentiable(y)
    return x * 3, y, y


@pytest.mark.parametrize("how", [jit, aot_function, lambda f: f])
@pytest.mark.parametrize(
    "forward", [in_two_places, in_two_of_three, without_a_derivative, lambda ctx, x: (x, x)]
)
def test_one_tensor_in_several_places(forward, how):
    """It is one result, whose cotangent goes to the last place; an input is several."""

    class Repeats(torch.autograd.Function):
        @staticmethod
        def backward(ctx, *gs):
            return sum(k * g for k, g in enumerate(gs, 2) if g is not None)

    Repeats.forward = staticmethod(forward)

    def f(x):
        outs = Repeats.apply(x)
        same = [a is b for a in outs for b in outs]
        return sum(k * y.sin() for k, y in enumerate(outs, 1)), sum(
            x * 2**k for k, yes in enumerate(same) if yes
        )

    x = torch.arange(3.0, dtype=torch.float64, requires_grad=True)
    (y, told), (want, wanted) = how(f)(x), f(x)
    assert_same([y, told], [want, wanted])
    assert_same(torch.autograd.grad(y.sum(), x), torch.autograd.grad(want.sum(), x))
    assert_same(grad(lambda x: f(x)[0].sum())(x), torch.autograd.grad(f(x)[0].sum(), x)[0])
    outs, theirs = how(Repeats.apply)(x), Repeats.apply(x)
    assert [[a is b for a in outs] for b in outs] == [[a is b for a in theirs] for b in theirs]


def test_a_derivative_may_change_its_context():
    """Each call finds the context as the forward left it, however often it is recorded."""

    class Changing(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(x)
            ctx.save_for_forward(x)
            ctx.factor = 1
            return x * x, x.sin()

        @staticmethod
        def backward(ctx, g, h):
            ctx.factor *= 2
            (x,) = ctx.saved_tensors
            ctx.doubled = x * ctx.factor
            return (0 if g is None else g * ctx.doubled) + (0 if h is None else h * x.cos())

        @staticmethod
        def jvp(ctx, t):
            ctx.factor *= 2
            (x,) = ctx.saved_tensors
            return t * x * ctx.factor, t * x.cos()

    first, both = lambda x: Changing.apply(x)[0].sum(), lambda x: sum(Changing.apply(x)).sum()
    x = f64(3)
    assert_same(grad(first)(x), 2 * x)
    assert_same(grad(both)(x), 2 * x + x.cos())
    assert_same(jvp(both, (x,), (x,))[1], ((2 * x + x.cos()) * x).sum())

    def twice(x):  # autograd multiplies by 4 in the second call
        y = x * 1
        z = first(y)
        gradients = [torch.autograd.grad(z, y, retain_graph=True)[0] for _ in range(2)]
        return (sum(gradients) * x).sum()

    with pytest.raises(AotfuncError, match="reads what changes afterwards"):
        grad(twice)(x)
