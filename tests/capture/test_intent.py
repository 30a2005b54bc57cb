"""What the user meant is kept: no_grad regions, hidden writes, detach and .data, checkpoints,
custom ops, hooks."""

import pytest
import torch
import torch.utils.checkpoint
from torch.utils.checkpoint import checkpoint

import aotfunc
from aotfunc import grad, hessian, jacfwd, jacrev, jit, jvp, linearize, make_fx, vjp, vmap
from aotfunc.errors import AotfuncError
from tests.inputs import f64
from tests.reference import assert_same, grads, loop

early_checkpoint = checkpoint  # a name bound before any capture


# no_grad and hidden writes; the gradient is autograd's
# ----------------------------------------------------------------


def region_cut(x):
    with torch.no_grad():
        y = x * 2
    return (x * y).sum()


def region_enabled_again(x):
    with torch.no_grad():
        with torch.enable_grad():
            y = x * 2
        z = x * 3
    return (y * z).sum()


def set_grad_enabled(x):
    torch.set_grad_enabled(False)
    y = x.sin()
    torch.set_grad_enabled(True)
    return (x * y).sum()


def decorated(x):
    @torch.no_grad()
    def frozen(x):
        return x.exp()

    return (frozen(x) * x).sum()


def detached(x):
    return (x.detach() * x).sum() + (x.data * x).sum()


def detached_in_place(x):
    y = x * 2
    y.detach_()
    return (y * x).sum()


def hidden_multiply(x):
    y = x * 2
    with torch.no_grad():
        y.mul_(3)
    return y.sum()


def hidden_by_detach(x):
    y = x * 2
    y.detach().mul_(3)
    return (y * x).sum()


def hidden_by_data(x):
    y = x * 2
    y.data.mul_(3)
    return (y * x).sum()


def hidden_through_a_view(x):
    y = x * 2
    y.view(-1).detach()[1:].mul_(3)
    return (y * x).sum()


def hidden_write_of_a_view(x):
    y = x * 2
    v = y[1:]
    with torch.no_grad():
        v.mul_(3)
    return (y * x).sum() + v.sum()


def hidden_copy(x):
    y = x * 2
    with torch.no_grad():
        y.copy_(x + 10)
    return (y * x).sum()


def hidden_then_visible(x):
    y = x * 2
    with torch.no_grad():
        y.mul_(3)
    y.add_(x * x)
    with torch.no_grad():
        y.zero_()
    return (y * x).sum() + y.sum()


def hidden_optimizer_step(x):
    w = x * 1
    for _ in range(3):
        g = w.detach() * 2
        with torch.no_grad():
            w -= 0.1 * g
    return (w * w).sum()


def hidden_slice_assignment(x):
    y = x * 2
    with torch.no_grad():
        y[0] = 7
    return (y * x).sum()


def straight_through(x):
    hard = x.round()
    return ((hard - x).detach() + x).square().sum()


def clamped_without_gradient(x):
    y = x * 2
    y.data.clamp_(-1, 1)
    return (y**3).sum()


INTENT = [
    region_cut,
    region_enabled_again,
    set_grad_enabled,
    decorated,
    detached,
    detached_in_place,
    hidden_multiply,
    hidden_by_detach,
    hidden_by_data,
    hidden_through_a_view,
    hidden_write_of_a_view,
    hidden_copy,
    hidden_then_visible,
    hidden_optimizer_step,
    hidden_slice_assignment,
    straight_through,
    clamped_without_gradient,
]
intent = pytest.mark.parametrize("f", INTENT, ids=lambda f: f.__name__)


@intent
def test_value_and_gradient(f):
    x = f64(3)
    g, value = aotfunc.grad_and_value(f)(x)
    assert_same(value, f(x.clone()))
    assert_same(g, grads(f)(x))


@intent
def test_captured_value(f):
    x = f64(3)
    assert_same(make_fx(f)(x)(x), f(x.clone()))


@intent
def test_captured_gradient(f):
    x = f64(3)
    assert_same(make_fx(grad(f))(x)(x), grads(f)(x))


@intent
def test_gradient_of_a_captured_graph(f):
    """The graph that make_fx hands out can itself be differentiated, and still knows what was
    meant."""
    x = f64(3)
    assert_same(grad(make_fx(f)(x))(x), grads(f)(x))


@intent
def test_gradient_through_jit(f):
    x = f64(3)
    assert_same(grad(aotfunc.jit(f))(x), grads(f)(x))


@intent
def test_backward_through_jit_and_aot_function(f):
    for run in (aotfunc.jit(f), aotfunc.aot_function(f, "eager")):
        x = f64(3)
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(run(leaf), leaf)
        assert_same(g, grads(f)(x))


@intent
def test_forward_mode_agrees_with_reverse(f):
    x, v = f64(3), f64(3)
    expected = (grads(f)(x) * v).sum()
    assert_same(jvp(f, (x,), (v,))[1], expected)
    assert_same(linearize(f, x)[1](v), expected)
    assert_same(jacfwd(f)(x), grads(f)(x))


@intent
def test_per_sample(f):
    x = f64(4, 3)
    assert_same(vmap(grad(f))(x), loop(grads(f))(x))


@intent
def test_second_order(f):
    x = f64(3)
    expected = grads(lambda x: grads(f, create_graph=True)(x).sum())(x)
    assert_same(grad(lambda x: grad(f)(x).sum())(x), expected)


def test_hidden_write_has_gradient_two():
    assert_same(grad(hidden_multiply)(torch.ones(3)), torch.full((3,), 2.0))


def test_assignment_to_data_is_refused_or_right():
    def f(x):
        y = x * 2
        y.data = (x * 5).data  # goes past the dispatcher
        return (y * x).sum()

    x = f64(3)
    try:
        out = aotfunc.grad_and_value(f)(x)
    except AotfuncError:
        return
    assert_same(out, (grads(f)(x), f(x)))


def test_an_inner_transform_inside_a_region_still_differentiates():
    def f(x):
        with torch.no_grad():
            g = grad(lambda y: (y**3).sum())(x)
        return (g * x).sum()

    x = f64(3)
    assert_same(make_fx(f)(x)(x), (3 * x**3).sum())
    assert_same(grad(f)(x), 3 * x**2)  # g is a constant for the outer level


def test_no_grad_around_is_not_inside():
    x = f64(3)
    with torch.no_grad():
        assert_same(grad(hidden_multiply)(x), torch.full_like(x, 2))
        assert_same(jacrev(torch.sin)(x), torch.diag(x.cos()))


def test_inside_f_a_differentiated_input_requires_grad():
    seen = []

    def f(x, y):
        seen.append(
            (x.requires_grad, (x * 2).requires_grad, y.requires_grad, torch.is_grad_enabled())
        )
        with torch.no_grad():
            seen.append((x * 2).requires_grad)
        return (x * y).sum()

    grad(f)(f64(3), f64(3))
    assert seen == [(True, True, False, True), False]


def test_is_leaf_and_grad_fn_questions_do_not_fail():
    def f(x):
        y = x * 2
        return y.sum() if y.requires_grad and not y.is_leaf else x.sum()

    x = f64(3)
    assert_same(grad(f)(x), torch.full_like(x, 2))


LATE_HOOKS = {
    "used before": lambda x: (y := x * 2, z := y**2, y.register_hook(lambda g: g * 10), z)[-1],
    "written before": lambda x: (x.mul_(2), x.register_hook(lambda g: g * 10), x * 1)[-1],
}


@pytest.mark.parametrize("name", LATE_HOOKS)
def test_a_hook_that_autograd_would_run_on_more(name):
    """Of a use before the registration, or of an argument that was written to."""
    found = []
    for f in (jit(LATE_HOOKS[name]), LATE_HOOKS[name]):
        leaf = torch.ones(3, requires_grad=True)
        x = leaf * 1
        y = f(x)
        y.sum().backward()
        found.append((y.detach(), x.detach(), leaf.grad))
    assert_same(*found)


HOOKED_THEN_WRITTEN = {
    "whole": lambda x: (x.register_hook(lambda g: g * 10), x.mul_(2), x * 1)[-1],
    "a part": lambda x: (x.register_hook(lambda g: g * 10), x[0].mul_(2), x * 1)[-1],
}


@pytest.mark.parametrize("name", HOOKED_THEN_WRITTEN)
def test_a_hook_of_an_argument_that_is_written_afterwards(name):
    """It is the hook of the value before."""
    found = []
    for f in (jit(HOOKED_THEN_WRITTEN[name]), HOOKED_THEN_WRITTEN[name]):
        for _ in range(2):
            w = torch.ones(3, requires_grad=True)
            x = w * 3
            f(x).sum().backward()
            found.append((x.tolist(), w.grad.tolist()))
    assert found[:2] == found[2:]


def test_a_hook_after_a_write_to_a_new_tensor():
    def f(x):
        y = x * 2
        y.mul_(3)
        y.register_hook(lambda g: g * 10)
        return y**2

    x = torch.ones(3, requires_grad=True)
    assert_same(torch.autograd.grad(jit(f)(x).sum(), x), torch.autograd.grad(f(x).sum(), x))


# checkpoint
# -------------------------------------------------------------------------------------------------


def block(x, w):
    return (x @ w).tanh().sin()


CHECKPOINTS = {
    "reentrant": lambda x, w: checkpoint(block, x, w, use_reentrant=True),
    "non-reentrant": lambda x, w: checkpoint(block, x, w, use_reentrant=False),
    "bound early": lambda x, w: early_checkpoint(block, x, w, use_reentrant=False),
    "bound early, reentrant": lambda x, w: early_checkpoint(block, x, w, use_reentrant=True),
    "by module path": lambda x, w: torch.utils.checkpoint.checkpoint(
        block, x, w, use_reentrant=False
    ),
    "keyword": lambda x, w: checkpoint(lambda x, *, w: block(x, w), x, w=w, use_reentrant=False),
    "nested": lambda x, w: checkpoint(
        lambda x: checkpoint(block, x, w, use_reentrant=False) * 2, x, use_reentrant=False
    ),
    "sequential": lambda x, w: torch.utils.checkpoint.checkpoint_sequential(
        [lambda x: block(x, w), lambda x: x * 2], 2, x, use_reentrant=False
    ),
    "closed over": lambda x, w: checkpoint(lambda x: block(x, w), x, use_reentrant=False),
}
checkpoints = pytest.mark.parametrize("name", CHECKPOINTS)


@checkpoints
def test_checkpoint_gradients(name):
    f = lambda x, w: CHECKPOINTS[name](x, w).square().sum()
    plain = lambda x, w: (
        (block(x, w) * (2 if name in ("nested", "sequential") else 1)).square().sum()
    )
    x, w = f64(2, 3), f64(3, 3)
    expected = grads(plain, (0, 1))(x, w)
    assert_same(grad(f, (0, 1))(x, w), expected)
    assert_same(make_fx(grad(f, (0, 1)))(x, w)(x, w), expected)


@checkpoints
def test_checkpoint_under_vmap_and_forward_mode(name):
    f = lambda x, w: CHECKPOINTS[name](x, w)
    plain = lambda x, w: block(x, w) * (2 if name in ("nested", "sequential") else 1)
    x, w, t = f64(4, 2, 3), f64(3, 3), f64(2, 3)
    assert_same(vmap(f, (0, None))(x, w), plain(x, w))
    assert_same(
        jvp(lambda x: f(x, w), (x[0],), (t,)), torch.func.jvp(lambda x: plain(x, w), (x[0],), (t,))
    )


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_recomputes_in_the_gradient_graph(use_reentrant):
    """The region's sin is computed twice: its values are not kept from the forward."""
    f = lambda x: checkpoint(lambda x: x.exp().sin(), x, use_reentrant=use_reentrant).sum()
    gm = make_fx(aotfunc.grad_and_value(f))(f64(3))
    exps = [n for n in gm.graph.nodes if n.target is torch.ops.aten.exp.default]
    assert len(exps) == 2, gm.code


def test_checkpoint_replays_its_random_numbers():
    def f(x):
        return checkpoint(
            lambda x: torch.nn.functional.dropout(x, 0.5, training=True) ** 2,
            x,
            use_reentrant=False,
        ).sum()

    x = torch.ones(100)
    torch.manual_seed(0)
    g, value = aotfunc.grad_and_value(f)(x)
    assert set(g.tolist()) == {0.0, 8.0}  # one mask in both: 2 * 2x * 2 where kept
    assert_same(g.sum(), 2 * value)


def test_backward_outside_over_a_checkpoint():
    x, w = f64(2, 3).requires_grad_(), f64(3, 3).requires_grad_()
    out = aotfunc.jit(CHECKPOINTS["non-reentrant"])(x, w)
    assert_same(
        torch.autograd.grad(out.sum(), (x, w)), torch.autograd.grad(block(x, w).sum(), (x, w))
    )


# custom ops
# -------------------------------------------------------------------------------------------------


@torch.library.custom_op("aotfunc_tests::triple_sin", mutates_args=())
def triple_sin(x: torch.Tensor) -> torch.Tensor:
    return 3 * x.sin()


@triple_sin.register_fake
def _(x):
    return torch.empty_like(x)


def _triple_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def _triple_backward(ctx, g):
    (x,) = ctx.saved_tensors
    return 30 * g * x.cos()  # ten times the truth, so that it is seen whose rule is used


triple_sin.register_autograd(_triple_backward, setup_context=_triple_setup)


@triple_sin.register_vmap
def _(info, in_dims, x):
    return triple_sin(x), in_dims[0]


def test_custom_op_uses_its_registered_rules():
    x = f64(3)
    assert_same(make_fx(triple_sin)(x)(x), 3 * x.sin())
    assert_same(grad(lambda x: triple_sin(x).sum())(x), 30 * x.cos())
    xs = f64(4, 3)
    assert_same(vmap(triple_sin)(xs), 3 * xs.sin())
    assert_same(vmap(grad(lambda x: triple_sin(x).sum()))(xs), 30 * xs.cos())
    assert_same(vjp(triple_sin, x)[1](x)[0], 30 * x * x.cos())


def test_custom_op_is_one_node():
    gm = make_fx(lambda x: triple_sin(x) + 1)(f64(3))
    assert any("triple_sin" in str(n.target) for n in gm.graph.nodes)


def test_custom_op_backward_outside():
    x = f64(3).requires_grad_()
    (g,) = torch.autograd.grad(aotfunc.jit(triple_sin)(x).sum(), x)
    assert_same(g, 30 * x.cos())


@torch.library.custom_op("aotfunc_tests::no_rules", mutates_args=())
def no_rules(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def test_custom_op_without_rules_is_an_error_that_names_it():
    with pytest.raises((AotfuncError, RuntimeError), match="no_rules"):
        grad(lambda x: no_rules(x).sum())(f64(3))


def test_an_op_without_a_meta_kernel_is_captured_or_named():
    x = f64(3)
    try:
        gm = make_fx(lambda x: no_rules(x) + 1)(x)
    except RuntimeError as error:  # PyTorch's own text says how to register one
        assert "no_rules" in str(error)
    else:
        assert_same(gm(x), x * 2 + 1)


@torch.library.custom_op("aotfunc_tests::add_one_", mutates_args=("x",))
def add_one_(x: torch.Tensor) -> None:
    x.add_(1)


def test_custom_op_that_mutates():
    def f(x):
        y = x.clone()
        add_one_(y)
        return y * 2

    x = f64(3)
    try:
        gm = make_fx(f)(x)
    except AotfuncError as error:
        assert "add_one_" in str(error)
    else:
        assert_same(gm(x), (x + 1) * 2)


# hooks
# -------------------------------------------------------------------------------------------------


def test_module_hooks_run_as_in_eager():
    net = torch.nn.Linear(3, 3).double()
    seen = []
    net.register_forward_hook(lambda module, args, out: out * 2)
    net.register_forward_pre_hook(lambda module, args: seen.append(1))
    x = f64(3)
    expected = grads(lambda x: net(x).sum())(x)
    seen.clear()
    assert_same(grad(lambda x: net(x).sum())(x), expected)
    assert seen == [1]


def test_a_tensor_hook_changes_the_gradient():
    def f(x):
        y = x * 2
        y.register_hook(lambda g: g * 10)
        return y.sum()

    x = f64(3)
    try:
        g = grad(f)(x)
    except AotfuncError:
        return
    assert_same(g, grads(f)(x))


def test_save_on_cpu_inside():
    """Where a tensor is kept meanwhile changes no value."""

    def f(x):
        with torch.autograd.graph.save_on_cpu(pin_memory=False):
            y = (x.sin() * x).exp()
        return (y * x).sum()

    x, xs = f64(3), f64(2, 3)
    want = grads(f)(x)
    assert_same(grad(f)(x), want)
    assert_same(vmap(grad(f))(xs), torch.stack([grads(f)(x) for x in xs]))
    with torch.autograd.graph.save_on_cpu():
        assert_same(grad(f)(x), want)
    leaf = x.clone().requires_grad_()
    jit(f)(leaf).backward()
    assert_same(leaf.grad, want)
    assert_same(hessian(f)(x), torch.autograd.functional.hessian(f, x))


def test_saved_tensors_hooks_are_refused_or_run():
    def f(x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t * 2):
            return (x.sin() * x).sum()

    x = f64(3)
    try:
        g = grad(f)(x)
    except AotfuncError as error:
        assert "hook" in str(error)
    else:
        assert_same(g, grads(f)(x))
