"""The transforms of the workloads, in terms that torch.func, aotfunc and jax have in common."""

from __future__ import annotations

from collections.abc import Callable


def itself(T, f):
    return f


def step(wrt: int) -> Callable:
    """Forward and backward in one program."""

    def program(T, f):
        def run(cotangent, *args):
            out, pull = T.vjp(lambda *chosen: f(*chosen, *args[wrt:]), *args[:wrt])
            return out, pull(cotangent)

        return run

    return program


def per_sample(T, f):
    return T.vmap(T.grad(f), (None, 0, 0))


def clipped_sum(T, f):
    """DP-SGD: each sample's gradient shortened to norm 1, and their sum."""

    def run(params, x, t):
        grads = per_sample(T, f)(params, x, t)
        flat = {k: g.reshape(g.shape[0], -1) for k, g in grads.items()}
        norms = sum((g * g).sum(1) for g in flat.values()) ** 0.5
        scale = (1 / norms).clip(None, 1.0)
        return {k: (scale @ flat[k]).reshape(g.shape[1:]) for k, g in grads.items()}

    return run


def ensemble(T, f):
    return T.vmap(T.grad(f), (0, None, None))


def maml(T, f):
    """The gradient of the mean loss over tasks after one inner step on each."""

    def task(p, x, y, x2, y2):
        grads = T.grad(f)(p, x, y)
        return f([w - 0.02 * g for w, g in zip(p, grads)], x2, y2)

    return T.grad(lambda p, *tasks: T.vmap(task, (None, 0, 0, 0, 0))(p, *tasks).mean())


def hessian(T, f):
    return T.hessian(f)


def jacrev(T, f):
    return T.jacrev(f)


def jacfwd(T, f):
    return T.jacfwd(f)


def grad(T, f):
    return T.grad(f)


def hessian_vector_product(T, f):
    return lambda x, v: T.jvp(T.grad(f), (x,), (v,))[1]


def tangent_kernel(T, f):
    """J(a) J(b)^T for all pairs of examples a and b."""

    def run(params, xa, xb):
        ja, jb = (T.vmap(T.jacrev(f), (None, 0))(params, x) for x in (xa, xb))
        outs = next(iter(ja.values())).shape[1]
        a, b = xa.shape[0], xb.shape[0]
        parts = [ja[k].reshape(a * outs, -1) @ jb[k].reshape(b * outs, -1).T for k in ja]
        return sum(parts).reshape(a, outs, b, outs)

    return run


def vmap(T, f):
    return T.vmap(f)
