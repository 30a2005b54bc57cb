"""The empirical neural tangent kernel, computed in two ways that cost very differently.

For a network f with parameters p, K(a, b) = J(a) J(b)^T with J = df/dp: how far a gradient step on
example b moves the output at a. The direct way builds all Jacobians and contracts them. The other
never builds one: K(a, b) v is v pulled back through f at b (vjp) and pushed forward through f at a
(jvp)."""

import torch
from torch import nn
from torch.testing import assert_close

from aotfunc import functional_call, jacrev, jvp, vjp, vmap


def kernel_by_jacobians(f, params, xa, xb):
    """K of shape (a, b, out, out), from Jacobians of every parameter."""
    ja = vmap(jacrev(f), in_dims=(None, 0))(params, xa)
    jb = vmap(jacrev(f), in_dims=(None, 0))(params, xb)
    return sum(torch.einsum("aif,bjf->abij", ja[k].flatten(2), jb[k].flatten(2)) for k in params)


def kernel_by_products(f, params, xa, xb):
    """The same K: each unit vector is pulled back at b and pushed forward at a."""

    def pair(a, b):
        out, pull = vjp(lambda p: f(p, b), params)

        def column(v):
            (cotangent,) = pull(v)
            return jvp(lambda p: f(p, a), (params,), (cotangent,))[1]

        return vmap(column, out_dims=1)(torch.eye(out.shape[0], dtype=out.dtype))

    return vmap(vmap(pair, in_dims=(None, 0)), in_dims=(0, None))(xa, xb)


def kernel_by_loops(net, xa, xb):
    """The reference: one backward per output and example."""

    weights = list(net.parameters())

    def row(output):
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(output, weights, retain_graph=True)]
        )

    def jacobians(xs):
        return torch.stack([torch.stack([row(output) for output in net(x)]) for x in xs])

    return torch.einsum("aif,bjf->abij", jacobians(xa), jacobians(xb))


def main(quick: bool = False):
    torch.manual_seed(0)
    n, m = (6, 4) if quick else (20, 8)
    conv = nn.Conv2d(1, 8, 3, padding=1)
    net = nn.Sequential(
        nn.Unflatten(0, (1, 8)), conv, nn.ReLU(), nn.Flatten(0), nn.Linear(512, 3)
    ).double()
    params = {name: p.detach() for name, p in net.named_parameters()}
    xa, xb = torch.randn(n, 8, 8, dtype=torch.float64), torch.randn(m, 8, 8, dtype=torch.float64)

    def f(params, x):
        return functional_call(net, params, x)

    k = kernel_by_jacobians(f, params, xa, xb)
    assert_close(k, kernel_by_products(f, params, xa, xb))
    assert_close(k, kernel_by_loops(net, xa, xb))
    print(
        f"kernel {tuple(k.shape)}: by Jacobians, by products and by loops of plain autograd, all "
        "equal"
    )

    # As a matrix over (example, output) it is symmetric and has no negative eigenvalue.
    kxx = kernel_by_jacobians(f, params, xa, xa).permute(0, 2, 1, 3).reshape(3 * n, 3 * n)
    assert_close(kxx, kxx.T)
    low, high = torch.linalg.eigvalsh(kxx)[[0, -1]].tolist()
    assert low > -1e-9 * high
    print(f"symmetric, eigenvalues from {low:.3g} to {high:.3g}")

    # What the kernel is for: one small gradient step on b moves the outputs at a by -lr K (f(b) -
    # target).
    target, lr = torch.randn(m, 3, dtype=torch.float64), 1e-7
    residual = torch.stack([net(x) for x in xb]).detach() - target
    grads = torch.autograd.grad(
        0.5 * sum(((net(x) - t) ** 2).sum() for x, t in zip(xb, target)), list(net.parameters())
    )
    stepped = {name: p - lr * g for (name, p), g in zip(params.items(), grads)}
    moved = vmap(f, in_dims=(None, 0))(stepped, xa) - vmap(f, in_dims=(None, 0))(params, xa)
    predicted = -lr * torch.einsum("abij,bj->ai", k, residual)
    assert_close(moved, predicted, rtol=1e-3, atol=1e-3 * predicted.abs().max().item())
    print(
        f"predicts a gradient step to {((moved - predicted).norm() / predicted.norm()).item():.1e}"
    )


if __name__ == "__main__":
    main()
