"""The ways to run a backward, around compiled functions and inside of them: checkpoints,
saved_tensors_hooks, batches of gradients, whole Jacobians, forward mode, autograd.grad and
.backward()."""

import itertools

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import nn
from torch.autograd import functional as AF
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from aotfunc import aot_function, functionalize, grad, jit, make_fx
from aotfunc.errors import CaptureError
from tests.reference import assert_same

D = torch.float64
X, E = torch.tensor([0.3, -0.5, 0.7], dtype=D), torch.eye(3, dtype=D)
W = torch.tensor([1.0, 2.0, 3.0], dtype=D, requires_grad=True)
WAYS = {
    "jit": jit,
    "aot_function": lambda f: aot_function(f, "eager"),
    "jit in jit": lambda f: (lambda j: jit(lambda x: j(x)))(jit(f)),
    "functionalize": functionalize,
}
ways = pytest.mark.parametrize("way", WAYS)


def leaf():
    return X.clone().requires_grad_()


# ----- what autograd saves -----------------------------------------------------------------------


def trained(net, f, around):
    torch.manual_seed(1)
    x = torch.ones(2, 3, dtype=D, requires_grad=True)
    net.zero_grad()
    y = around(f, x)
    y.sum().backward()
    return y.detach(), x.grad, [p.grad for p in net.parameters()], torch.rand(1)


def offloaded(f, x):
    with torch.autograd.graph.save_on_cpu():
        return f(x)


def packed(f, x):
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (t.numpy(force=True), t.dtype), lambda p: torch.tensor(p[0])
    ):
        return f(x)


AROUND = {
    "checkpoint": lambda f, x: checkpoint(f, x, use_reentrant=False),
    "reentrant": lambda f, x: checkpoint(f, x, use_reentrant=True),
    "in checkpoints": lambda f, x: checkpoint(
        lambda x: checkpoint(f, x * 2, use_reentrant=False), x, use_reentrant=False
    ),
    "save_on_cpu": offloaded,
    "packed": packed,
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("way", ["jit", "aot_function", "jit in jit"])
def test_what_is_saved(way, around):
    """From the very first call: hooks do not see what the capture saves."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Dropout(0.5), nn.Linear(3, 3)).double()
    f = WAYS[way](net)
    want = trained(net, net, AROUND[around])
    for _ in range(3):
        assert_same(trained(net, f, AROUND[around]), want)


# ----- batches of gradients, whole Jacobians, forward mode ---------------------------------------


def hidden(x):
    y = x * W
    with torch.no_grad():
        y.mul_(2)
    return y * x.sin()


PROGRAMS = {
    "plain": lambda x: (x * W).sin() * x,
    "matmul": lambda x: torch.outer(x, W) @ x,
    "layer norm": lambda x: nn.functional.layer_norm(x * W, (3,)) * x,
    "detach": lambda x: x.sin() * x.detach() * W,
    "hidden write": hidden,
}
FORWARD = ("plain", "matmul", "layer norm")  # eager's tangents pass no_grad


def differentiated_twice(f, around):
    x = leaf()
    y = around(f, x)
    (g,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    return y, g, torch.autograd.grad(g.sin().sum() + y.sum(), [x, W])


@pytest.mark.parametrize("around", ["checkpoint", "in checkpoints", "save_on_cpu"])
@pytest.mark.parametrize("way", ["jit", "jit in jit"])
def test_second_derivatives_of_what_is_saved(way, around):
    """A checkpoint lets a node read what it has saved once for each backward."""
    for f in PROGRAMS.values():
        want = differentiated_twice(f, AROUND[around])
        assert_same(differentiated_twice(WAYS[way](f), AROUND[around]), want)


def batch(f):
    x = leaf()
    return torch.autograd.grad(f(x), [x, W], E * 2, is_grads_batched=True)


def batch_differentiable(f):
    x = leaf()
    grads = torch.autograd.grad(f(x), [x, W], E * 2, is_grads_batched=True, create_graph=True)
    return grads, torch.autograd.grad(grads[0].sin().sum(), [x, W])


def new_vmap(f):
    x = leaf()
    y = f(x)
    return torch.func.vmap(lambda g: torch.autograd.grad(y, [x, W], g, retain_graph=True))(E * 2)


def batch_of_batches(f):
    x = leaf()
    y = f(x)
    each = lambda g: torch.autograd.grad(y, x, g, retain_graph=True)[0]
    return torch.func.vmap(torch.func.vmap(each, in_dims=1))(
        torch.arange(18.0, dtype=D).reshape(2, 3, 3)
    )


def forward_over_reverse(f):
    with fwAD.dual_level():
        x = fwAD.make_dual(leaf(), E[0] * 2)
        y = f(x)
        (g,) = torch.autograd.grad(y.sum(), x)
        return [*fwAD.unpack_dual(y), *fwAD.unpack_dual(g)]


REVERSE_ASKED = {
    "batch": batch,
    "batch, differentiable": batch_differentiable,
    "the new vmap": new_vmap,
    "a batch of batches": batch_of_batches,
    "jacobian": lambda f: AF.jacobian(f, X, vectorize=True),
    "jacobian, differentiable": lambda f: AF.jacobian(
        f, leaf(), vectorize=True, create_graph=True
    ),
    "jacobian, row by row": lambda f: AF.jacobian(f, X),
    "hessian": lambda f: AF.hessian(lambda x: f(x).sum(), X, vectorize=True),
    "hvp": lambda f: AF.hvp(lambda x: f(x).sum(), X, E[0]),
    "jvp": lambda f: AF.jvp(f, X, E[1]),
}
FORWARD_ASKED = {
    "forward jacobian": lambda f: AF.jacobian(f, X, vectorize=True, strategy="forward-mode"),
    "forward hessian": lambda f: AF.hessian(
        lambda x: f(x).sum(), X, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "forward over reverse": forward_over_reverse,
}


@pytest.mark.parametrize("asked", REVERSE_ASKED)
@pytest.mark.parametrize("name", PROGRAMS)
@ways
def test_whole_jacobians(way, name, asked):
    f, ask = PROGRAMS[name], REVERSE_ASKED[asked]
    assert_same(ask(WAYS[way](f)), ask(f))


@pytest.mark.parametrize("asked", FORWARD_ASKED)
@pytest.mark.parametrize("name", FORWARD)
@ways
def test_whole_jacobians_forward(way, name, asked):
    f, ask = PROGRAMS[name], FORWARD_ASKED[asked]
    assert_same(ask(WAYS[way](f)), ask(f))


@pytest.mark.parametrize("name", FORWARD)
def test_gradcheck(name):
    f = jit(PROGRAMS[name])
    assert torch.autograd.gradcheck(f, (leaf(),), check_batched_grad=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(
        f, (leaf(),), check_batched_grad=True, check_fwd_over_rev=True
    )


def test_a_batch_of_gradients_sees_the_draws_of_the_forward():
    def all_of_it(f):
        torch.manual_seed(3)
        x = torch.ones(3, dtype=D, requires_grad=True)
        y = f(x)
        (g,) = torch.autograd.grad(y, x, E, is_grads_batched=True, create_graph=True)
        return y, g, torch.autograd.grad(g.sum(), x)[0], torch.rand(1)

    f = lambda x: nn.functional.dropout(x * x * x, 0.5)
    assert_same(all_of_it(jit(f)), all_of_it(f))


def written(x):
    BUFFER.add_(x * 2)
    return BUFFER * x


BUFFER = torch.zeros(3, dtype=D)
DUALS = {
    "results of all kinds": lambda x: (x * E[0], E[1] * 3, x.argmax(), x > 0),
    "views": lambda x: (x[1:], (x * x).view(3, 1), x.view(3, 1)),
    "dropout": lambda x: nn.functional.dropout(x, 0.5) * x,
    "a write": written,
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("name", DUALS)
@ways
def test_duals(way, name, mode, requires_grad):
    def parts(f):
        torch.manual_seed(0)
        BUFFER.detach_().zero_()
        found = []
        with mode(), fwAD.dual_level():
            x = X.clone().requires_grad_(requires_grad)
            for o in tree_leaves(f(fwAD.make_dual(x, E[0] - E[2]))):
                primal, tangent = fwAD.unpack_dual(o)
                found += [
                    primal.detach(),
                    tangent is None or tangent.detach().clone(),
                    primal.requires_grad,
                ]
            buffer = fwAD.unpack_dual(BUFFER)
            found += [
                buffer.primal.detach().clone(),
                buffer.tangent is None or buffer.tangent.detach().clone(),
            ]
        BUFFER.detach_()
        return found

    assert_same(parts(WAYS[way](DUALS[name])), parts(DUALS[name]))


@ways
@pytest.mark.parametrize("name", ["detach", "hidden write"])
def test_duals_that_meet_a_cut_are_refused(way, name):
    with fwAD.dual_level(), pytest.raises(CaptureError, match=r"use aotfunc\.jvp"):
        WAYS[way](PROGRAMS[name])(fwAD.make_dual(X, E[0]))


# ----- inside a captured function ----------------------------------------------------------------


def unused(x):
    return torch.autograd.grad(
        (W * x**3).sum(), [x, torch.ones(1, requires_grad=True)], allow_unused=True
    )[0]


def materialized(x):
    y = torch.ones(2, dtype=x.dtype, requires_grad=True)
    return torch.autograd.grad((W * W).sum() + x.sum(), [x, y], materialize_grads=True)


def zero_gradients(x):
    y = x * 3
    y.zero_()
    return torch.autograd.grad(y.sum() + x.sign().sum(), x, allow_unused=True)


def leaf_and_its_views(x):
    v, other = x.detach().requires_grad_(), torch.zeros(3, dtype=x.dtype)
    other.add_(1)
    part, whole = v[1:], v.view(-1)
    return torch.autograd.grad((part * part).sum() + (whole**3).sum() + v.sum(), v)


def leaf_made_without_gradients(x):
    with torch.no_grad():
        y = x * 2
    y.requires_grad_()
    other = torch.zeros(3, dtype=x.dtype)
    other.add_(1)
    return torch.autograd.grad((y * y).sum() + y[:2].sin().sum(), [y])


def twice(x):
    (g,) = torch.autograd.grad((x**3 * W).sum(), x, create_graph=True)
    return torch.autograd.grad((g * g).sum(), [x, W], create_graph=True)


def batches(x):
    grads = torch.autograd.grad(
        x * W * x.sin(), [x, W], E * 2, is_grads_batched=True, create_graph=True
    )
    y = (x @ torch.outer(x, W)).expand(2, 3) * x
    (more,) = torch.autograd.grad(
        y.t(), x, torch.arange(30.0, dtype=D).reshape(5, 3, 2), is_grads_batched=True
    )
    return *grads, more


def backward_to_leaves_inside(x):
    a, b = x.detach().requires_grad_(), torch.ones(3, dtype=x.dtype, requires_grad=True)
    h = a * b
    h.retain_grad()
    (h * h).sum().backward()
    (h.detach() * a).sum().backward()
    return a.grad, b.grad, h.grad


def by_values_of_each_other(x, hooked=False):
    """In any order; a hook sees the gradient that goes on."""
    h = x * W
    if hooked:
        h.register_hook(lambda g: g * 2)
    y = h.sin()
    if hooked:
        y.register_hook(lambda g: g * 3)
    first, *others = y.sum() + y.prod(), x, h, y
    return [
        torch.autograd.grad(first, wanted, retain_graph=True, create_graph=not hooked)
        for count in (1, 2, 3)
        for wanted in itertools.permutations(others, count)
    ]


def retained_on_the_way(x):
    a = x.detach().requires_grad_()
    h = a * 2
    h.retain_grad()
    h.register_hook(lambda g: g * 2)
    h.sin().sum().backward()
    return a.grad, h.grad


def written_between(x):
    """Uses before a write that is hidden from autograd count."""
    h = (x * W).clone()
    y = h * 2
    with torch.no_grad():
        h.mul_(3)
        h[0].add_(1)
    y = y.sum() + (h * 3).sum()
    h.mul_(2)
    h.data.add_(1)
    y = y + h.sum()
    a = x.detach().clone().requires_grad_()
    z = a.sum() * 5
    with torch.no_grad():
        a[1:].mul_(2)
    (z + (a * a).sum()).backward()
    return *torch.autograd.grad(y, [x, h], retain_graph=True), a.grad, h


def cut_before(x):
    h = (x * W).detach().requires_grad_()
    return torch.autograd.grad((h * x.sin()).sum(), [h, x])


INSIDE = [
    by_values_of_each_other,
    lambda x: by_values_of_each_other(x, True),
    retained_on_the_way,
    written_between,
    cut_before,
    unused,
    materialized,
    zero_gradients,
    leaf_and_its_views,
    leaf_made_without_gradients,
    twice,
    batches,
    backward_to_leaves_inside,
    lambda x: AF.jacobian(PROGRAMS["plain"], x, vectorize=True, create_graph=True),
    lambda x: AF.hessian(lambda x: PROGRAMS["plain"](x).sum(), x, vectorize=True),
]


@ways
@pytest.mark.parametrize("f", INSIDE)
def test_gradients_inside(f, way):
    x = leaf()
    want, got = (tree_leaves(g(x)) for g in (f, WAYS[way](f)))
    assert_same([t.detach() for t in got], [t.detach() for t in want])
    flags = [t.requires_grad for t in got]
    assert f is materialized or flags == [t.requires_grad for t in want]
    for a, b in zip(got, want, strict=True):
        if a.requires_grad and b.requires_grad and b.grad_fn is not None:
            assert_same(
                *(torch.autograd.grad(t.sin().sum(), x, retain_graph=True) for t in (a, b))
            )


def test_a_tensor_that_was_not_used():
    with pytest.raises(RuntimeError, match=r"not used to compute the outputs .*allow_unused=True"):
        jit(lambda x: torch.autograd.grad(x.sum(), W))(leaf())


def onto_the_argument(x):
    (x * x).sum().backward()
    return x


def onto_what_it_came_from(x):
    (x * INTERMEDIATE).sum().backward()
    return x


def onto_chosen_ones(x):
    (x * W).sum().backward(inputs=[x])
    return x


INTERMEDIATE = W * 2


@pytest.mark.parametrize("f", [onto_the_argument, onto_what_it_came_from, onto_chosen_ones])
@pytest.mark.parametrize("way", [*WAYS, "grad"])
def test_backward_onto_tensors_from_outside_is_refused(f, way):
    x, run = leaf(), (lambda f: grad(lambda x: f(x).sum())) if way == "grad" else WAYS[way]
    with pytest.raises(
        CaptureError,
        match=r"would write the \.grad of a tensor from outside .*return the gradient",
    ) as e:
        run(f)(x)
    assert "test_backward_modes.py" in str(e.value)
    assert x.grad is None and W.grad is None


def asks_for_the_tangent(x):
    primal, tangent = fwAD.unpack_dual(x)
    return primal if tangent is None else tangent


def makes_a_dual(x):
    return fwAD.unpack_dual(fwAD.make_dual(x, x * 3).sin()).tangent


@ways
def test_a_tangent_that_the_function_asks_for(way):
    """One from outside is refused; one that the function has given is known."""
    with fwAD.dual_level():
        for of in (lambda x: x, lambda x: x * 2):
            x = fwAD.make_dual(X, E[0])
            f = WAYS[way](lambda x, of=of: asks_for_the_tangent(of(x)))
            with pytest.raises(CaptureError, match="unpack_dual"):
                f(x)
        assert_same(WAYS[way](makes_a_dual)(X), makes_a_dual(X))
        assert_same(WAYS[way](asks_for_the_tangent)(X), X)


EMPTY = {
    "grad of a list": lambda x: torch.autograd.grad((x * x).sum(), []),
    "grad of a dict": lambda x: torch.autograd.grad((x * x).sum(), {}, allow_unused=True),
    "grad of what needs a cotangent": lambda x: torch.autograd.grad(x * x, ()),
    "backward": lambda x: (x * x).sum().backward(inputs=[]),
}


@pytest.mark.parametrize("name", EMPTY)
def test_gradients_in_nothing(name):
    """They are errors of eager's class, a ValueError or a RuntimeError by PyTorch's version."""
    f = EMPTY[name]
    with pytest.raises((RuntimeError, ValueError)) as eager:
        f(X.clone().requires_grad_())
    for way in (jit, lambda f: lambda x: make_fx(f)(x)):
        with pytest.raises(type(eager.value), match=r"inputs is empty \(at .*test_backward_modes"):
            way(f)(X.clone().requires_grad_())


def test_flags_that_exclude_each_other():
    f = lambda x: torch.autograd.grad(x.sum(), x, allow_unused=False, materialize_grads=True)
    for way in (lambda f: f, jit):
        with pytest.raises(ValueError, match="allow_unused"):
            way(f)(X.clone().requires_grad_())


def test_a_backward_of_nothing():
    f = lambda x: (torch.autograd.backward([]), x * 2)[1]
    assert_same(jit(f)(X), f(X))
