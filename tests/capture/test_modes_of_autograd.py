"""What people switch on around or inside transforms: anomaly detection, forward-mode off, selective checkpoints; and
what a traced conjugate says of itself."""

import functools

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from aotfunc import grad, jacrev, jit, jvp, make_fx, vjp, vmap
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
        with pytest.raises(RuntimeError, match=r"nan values; aten.*first .*test_modes_of_autograd.py"):
            run(X)
        assert_same(grad(lambda x: x.sin().sum())(X), X.cos())
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        run(X)


def test_forward_mode_switched_off_inside():
    def f(x):
        with forward_ad._set_fwd_grad_enabled(False):
            y = x * x
        return y * x

    for run in (lambda: jvp(f, (X,), (X,)), lambda: grad(lambda x: f(x).sum())(X), lambda: jit(f)(X)):
        with pytest.raises(CaptureError, match=r"forward-mode derivatives off .*test_modes_of_autograd.py.*detach"):
            run()
    assert_same(f(X), X**3)
    with forward_ad._set_fwd_grad_enabled(True):
        assert_same(jvp(torch.sin, (X,), (X,))[1], X.cos() * X)


def test_a_traced_conjugate_says_so():
    z = torch.randn(3, dtype=torch.cfloat)
    said = []

    def f(z):
        c = z.conj()
        said.append(
            [t.is_conj() for t in (z, c, c.conj(), c[0], c.mT if c.dim() > 1 else c[1:], c.resolve_conj(), c * 1)]
        )
        return c.abs().sum()

    for run in (f, grad(f), lambda z: vmap(f)(z[None]), jit(f), lambda z: f(z)):
        run(z)
    assert said and all(s == said[0] == [False, True, False, True, True, False, False] for s in said)


# ----- selective checkpoints ------------------------------------------------------------------------------------------


def block(x):
    return ((x @ W).sin() @ W).cos()


def policy(ctx, op, *args, **kwargs):
    products = (torch.ops.aten.mm.default, torch.ops.aten.mv.default)
    return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE


CONTEXTS = {
    "policy": (functools.partial(create_selective_checkpoint_contexts, policy), 0),
    "ops": (functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default]), 0),
    "other ops": (functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.sin.default]), 1),
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
    products = lambda f: [n.target for n in make_fx(grad(f))(x).graph.nodes].count(torch.ops.aten.mm.default)
    whole = lambda x: checkpoint(block, x, use_reentrant=False).sin().sum()
    assert products(whole) > products(plain) + again
    assert products(f) == products(plain) + again


def test_contexts_of_ones_own():
    contexts = lambda: (torch.autograd.set_detect_anomaly(False), torch.autograd.set_detect_anomaly(False))
    with pytest.raises(CaptureError, match="contexts of your own"):
        grad(lambda x: checkpoint(block, x, use_reentrant=False, context_fn=contexts).sum())(X)
