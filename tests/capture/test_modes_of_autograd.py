"""What people switch on around or inside transforms: anomaly detection, forward-mode off,
selective checkpoints; and what a traced conjugate says of itself."""

import functools

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import aotfunc
from aotfunc import grad, hessian, jacrev, jit, jvp, make_fx, vjp, vmap
from aotfunc.errors import CaptureError
from tests.reference import assert_same, grads

X = torch.randn(3, generator=torch.Generator().manual_seed(0))
W = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))


def singular(x):
    return (x * 0).sqrt().sum()


@pytest.mark.parametrize(
    "run",
    [
        grad(singular),
        jacrev(singular),
        lambda x: vjp(singular, x)[1](torch.tensor(1.0)),
        lambda x: grad(lambda x: torch.where(x > 9, 1 / (x * 0), x).sum())(x),
    ],
)
def test_anomalies_are_detected(run):
    run(X)
    with torch.autograd.set_detect_anomaly(True):
        with pytest.raises(
            RuntimeError, match=r"nan values; aten.*first .*test_modes_of_autograd.py"
        ):
            run(X)
        assert_same(grad(lambda x: x.sin().sum())(X), X.cos())
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        run(X)


@pytest.mark.parametrize(
    "run",
    [
        lambda x: vmap(grad(singular))(x[:, None]),
        lambda x: vmap(grad(lambda a: (a - 1).sqrt().sum()))(torch.tensor([[0.0], [2.0]])),
        lambda x: vmap(jacrev(lambda a: (a * 0).sqrt()))(x[:, None]),
        lambda x: vmap(lambda a: vjp(singular, a)[1](torch.tensor(1.0)))(x[:, None]),
        lambda x: grad(lambda b: grad(lambda a: singular(a * b))(x).sum())(x),
        lambda x: vmap(grad(lambda b: grad(lambda a: singular(a * b))(b).sum()))(x[:, None]),
        lambda x: hessian(singular)(x),
        lambda x: vmap(hessian(singular))(x[:, None]),
    ],
)
def test_anomalies_are_detected_inside_of_other_transforms(run):
    run(X)
    with torch.autograd.set_detect_anomaly(True):
        with pytest.raises(RuntimeError, match=r"nan values.*test_modes_of_autograd.py"):
            run(X)
        xs = X[:, None].clone().requires_grad_()
        assert_same(vmap(grad(lambda x: x.sin().sum()))(xs), xs.cos())
        (g,) = torch.autograd.grad(vmap(grad(lambda x: x.sin().sum()))(xs).sum(), xs)
        assert_same(g, -xs.sin())
        assert_same(vmap(hessian(lambda x: (x**3).sum()))(X[:, None]), 6 * X[:, None, None])
        f = jit(
            lambda x: vmap(grad(singular))(x[:, None])
        )  # compiled once, for when nothing is to be detected too
        f(X)
    f(X)
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        run(X)


def off(f):
    """``f`` with forward-mode derivatives switched off."""

    def call(x):
        with forward_ad._set_fwd_grad_enabled(False):
            return f(x)

    return call


square = off(lambda x: x * x)
#: what forward mode makes of a function, and what it is for reverse mode
SWITCHED_OFF = {
    "an op": lambda x: square(x) + x,
    "all of it": off(lambda x: x.sin() * x),
    "several results": lambda x: torch.cat(off(lambda x: torch.sort(x * 2))(x)[:1]) * x,
    "a view": lambda x: off(lambda x: x[:1])(x) * x,
    "switched on again": off(lambda x: x * forward_ad_on(x)),
    "an inner gradient": lambda x: off(grad_of(lambda x: (x**3).sum()))(x) * x,
    "an inner batch": lambda x: off(vmap_of(lambda x: x * x))(x) * x,
}


def forward_ad_on(x):
    with forward_ad._set_fwd_grad_enabled(True):
        return x * x


def grad_of(f):
    return lambda x: (
        torch.func if torch._C._functorch.maybe_current_level() is not None else aotfunc
    ).grad(f)(x)


def vmap_of(f):
    return lambda x: (
        torch.func if torch._C._functorch.maybe_current_level() is not None else aotfunc
    ).vmap(f)(x)


@pytest.mark.parametrize("name", SWITCHED_OFF)
def test_forward_mode_switched_off_inside(name):
    f = SWITCHED_OFF[name]
    for run in (
        lambda T: T.jvp(f, (X,), (X.cos(),)),
        lambda T: T.jacfwd(f)(X),
        lambda T: T.grad(lambda x: f(x).sum())(X),
        lambda T: T.hessian(lambda x: (f(x) ** 2).sum())(X),
        lambda T: T.jvp(lambda x: T.jvp(f, (x,), (x * x,)), (X,), (X.sin(),)),
        lambda T: T.vmap(lambda x: T.jvp(f, (x,), (x.cos(),)))(X[None]),
    ):
        assert_same(run(aotfunc), run(torch.func))
        assert torch._C._is_fwd_grad_enabled()
    leaf = X.clone().requires_grad_()
    jit(f)(leaf).sum().backward()
    assert_same(leaf.grad, torch.func.grad(lambda x: f(x).sum())(X))
    assert_same(jit(lambda x: jvp(f, (x,), (x,))[1])(X), torch.func.jvp(f, (X,), (X,))[1])


def test_forward_mode_switched_off():
    with forward_ad._set_fwd_grad_enabled(False):
        assert_same(
            jvp(torch.sin, (X,), (X,))[1], X.cos() * X
        )  # around a transform: as for torch.func
        assert not torch._C._is_fwd_grad_enabled()
    with pytest.raises(
        CaptureError, match=r"a write where forward-mode .*test_modes_of_autograd.py"
    ):
        jvp(off(lambda x: x.clone().mul_(2)), (X,), (X,))
    assert torch._C._is_fwd_grad_enabled()


def test_a_traced_conjugate_says_so():
    z = torch.randn(3, dtype=torch.cfloat)
    said = []

    def f(z):
        c = z.conj()
        said.append(
            [
                t.is_conj()
                for t in (
                    z,
                    c,
                    c.conj(),
                    c[0],
                    c.mT if c.dim() > 1 else c[1:],
                    c.resolve_conj(),
                    c * 1,
                )
            ]
        )
        return c.abs().sum()

    for run in (f, grad(f), lambda z: vmap(f)(z[None]), jit(f), lambda z: f(z)):
        run(z)
    assert said and all(
        s == said[0] == [False, True, False, True, True, False, False] for s in said
    )


def test_a_conjugated_argument_says_so():
    z, said = torch.randn(2, 3, dtype=torch.cfloat), []

    def f(z):
        said.append([t.is_conj() for t in (z, z[0], z.conj(), z.mT, z.resolve_conj(), z * 1)])
        return (z * z[0]).abs().sum() + (z.is_conj() * 10)

    for run in (f, grad(f), lambda z: vmap(f)(z[None]), jit(f), lambda z: vmap(grad(f))(z[None])):
        run(z.conj())
    assert all(s == [True, True, False, True, False, False] for s in said)
    compiled = jit(f)
    for x in (z, z.conj(), z, z.conj()):
        assert_same(compiled(x), f(x))


# ----- selective checkpoints ---------------------------------------------------------------------


def block(x):
    return ((x @ W).sin() @ W).cos()


def policy(ctx, op, *args, **kwargs):
    products = (torch.ops.aten.mm.default, torch.ops.aten.mv.default)
    return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE


CONTEXTS = {
    "policy": (functools.partial(create_selective_checkpoint_contexts, policy), 0),
    "ops": (
        functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default]),
        0,
    ),
    "other ops": (
        functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.sin.default]),
        1,
    ),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_saved_ops_are_not_computed_again(name):
    """How many products are computed again is said with the policy."""
    contexts, again = CONTEXTS[name]
    x = torch.randn(4, 3)
    f = lambda x: checkpoint(block, x, use_reentrant=False, context_fn=contexts).sin().sum()
    plain = lambda x: block(x).sin().sum()
    assert_same(grad(f)(x), grads(plain)(x))
    assert_same(jit(grad(f))(x), grads(plain)(x))
    assert_same(vmap(grad(f))(x[None]), grads(plain)(x)[None])
    products = lambda f: [n.target for n in make_fx(grad(f))(x).graph.nodes].count(
        torch.ops.aten.mm.default
    )
    whole = lambda x: checkpoint(block, x, use_reentrant=False).sin().sum()
    assert products(whole) > products(plain) + again
    assert products(f) == products(plain) + again


def test_contexts_of_ones_own():
    contexts = lambda: (
        torch.autograd.set_detect_anomaly(False),
        torch.autograd.set_detect_anomaly(False),
    )
    with pytest.raises(CaptureError, match="contexts of your own"):
        grad(lambda x: checkpoint(block, x, use_reentrant=False, context_fn=contexts).sum())(X)


# ----- gradients that a function turns on --------------------------------------------------------


def turned_on(x):
    before = x * 2
    with torch.enable_grad():
        inside = x.sin() * before
    return before, inside, inside + 1, x


TURNED_ON = {
    "vmap": lambda T: T.vmap(turned_on),
    "vmap of vmap": lambda T: T.vmap(T.vmap(turned_on)),
    "functionalize": lambda T: T.functionalize(turned_on),
}


@pytest.mark.parametrize("around", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("name", TURNED_ON)
def test_results_require_grad_where_the_function_turns_gradients_on(name, around):
    x = W.clone().requires_grad_()
    found = []
    for T in (aotfunc, torch.func):
        with around():
            outs = TURNED_ON[name](T)(x)
        total = sum(o.sum() for o in outs if o.requires_grad)
        found.append(([o.requires_grad for o in outs], *torch.autograd.grad(total, x)))
    assert found[0][0] == found[1][0]
    assert_same(found[0][1], found[1][1])


def test_inference_mode_stays_on():
    x = W.clone().requires_grad_()
    with torch.inference_mode():
        outs = vmap(turned_on)(x)
    assert not any(o.requires_grad for o in outs[:3])
