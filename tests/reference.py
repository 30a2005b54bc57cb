"""What a result is compared with: plain autograd, forward AD and Python loops; nothing here knows
aotfunc."""

import os

import torch
import torch.autograd.forward_ad as fwAD
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

DIFFERENTIABLE = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
)


#: whether compiled functions give eager's bits
BITS = os.environ["AOTFUNC_BACKEND"] == "eager"


def assert_same(actual, expected, *, strides=False, **tolerance):
    """Equal trees; per tensor equal dtype, shape and values (NaN equals NaN); other leaves equal
    by type and value. Without tolerance they are equal in bits, if the tests' backend is eager."""
    if not (BITS or any(tolerance.values())):
        tolerance = {}
    got, got_tree = tree_flatten(actual)
    want, want_tree = tree_flatten(expected)
    assert got_tree == want_tree, f"trees differ: {got_tree} and {want_tree}"
    for a, e in zip(got, want):
        if isinstance(e, torch.Tensor):
            assert isinstance(a, torch.Tensor), f"{a!r} is no tensor"
            assert type(a) in (torch.Tensor, torch.nn.Parameter), (
                f"an ordinary tensor is due, not {type(a)}"
            )
            torch.testing.assert_close(a.detach(), e.detach(), equal_nan=True, **tolerance)
            if strides and e.is_contiguous():
                assert a.stride() == e.stride(), f"strides {a.stride()}, eager {e.stride()}"
        else:
            assert type(a) is type(e) and a == e, f"{a!r} and {e!r} differ"


def differentiable(x):
    return isinstance(x, torch.Tensor) and x.dtype in DIFFERENTIABLE


def fresh(tree):
    """A deep copy without autograd history, so that a program that writes to its inputs can be run
    twice."""
    memo = {}

    def copy(x):
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) not in memo:
            memo[id(x)] = x.detach().clone(memory_format=torch.preserve_format)
        return memo[id(x)]

    return tree_map(copy, tree)


def tracked(tree):
    """A copy whose floating and complex leaves require grad."""
    return tree_map(
        lambda x: x.detach().clone().requires_grad_() if differentiable(x) else x, tree
    )


def grads(f, argnums=0, create_graph=False):
    """torch.autograd's gradient of a scalar function with respect to the tree (or the tuple of
    trees) at argnums."""

    def run(*args, **kwargs):
        several = isinstance(argnums, tuple)
        nums = argnums if several else (argnums,)
        args = list(args)
        for i in nums:
            args[i] = tree_map(lambda x: _leaf(x, create_graph), args[i])
        wrt = [leaf for i in nums for leaf in tree_leaves(args[i])]
        with torch.enable_grad():
            out = f(*args, **kwargs)
        if out.requires_grad:
            gs = torch.autograd.grad(out, wrt, create_graph=create_graph, allow_unused=True)
        else:
            gs = [None] * len(wrt)
        given = iter([torch.zeros_like(x) if g is None else g for g, x in zip(gs, wrt)])
        picked = tuple(tree_map(lambda _: next(given), args[i]) for i in nums)
        return picked if several else picked[0]

    return run


def _leaf(x, create_graph):
    if create_graph and x.requires_grad:
        return x.view_as(x)
    return x.detach().clone().requires_grad_()


def vjps(f, primals, cotangents):
    """(outputs, gradients for every primal) by torch.autograd; cotangents is one tensor per tensor
    output."""
    primals = tracked(tuple(primals))
    with torch.enable_grad():
        out = f(*primals)
    outs = [o for o in tree_leaves(out)]
    pairs = [
        (o, c)
        for o, c in zip(outs, tree_leaves(cotangents))
        if isinstance(o, torch.Tensor) and o.requires_grad
    ]
    wrt = [p for p in tree_leaves(primals) if differentiable(p)]
    gs = [None] * len(wrt)
    if pairs:
        gs = torch.autograd.grad(
            [o for o, _ in pairs], wrt, [c for _, c in pairs], allow_unused=True
        )
    return out, tuple(torch.zeros_like(p) if g is None else g for g, p in zip(gs, wrt))


def jvps(f, primals, tangents):
    """(outputs, tangents) by torch's forward AD, zeros where an output does not move."""
    with fwAD.dual_level():
        duals = [fwAD.make_dual(p, t) for p, t in zip(primals, tangents)]
        out = f(*duals)
        leaves, tree = tree_flatten(out)
        unpacked = [fwAD.unpack_dual(o) for o in leaves]
        moved = [torch.zeros_like(u.primal) if u.tangent is None else u.tangent for u in unpacked]
        return tree.unflatten([u.primal for u in unpacked]), tree.unflatten(moved)


def jacobian(f, x):
    """The Jacobian of a one-tensor function by a loop of autograd calls over the outputs; shape
    out.shape + x.shape."""
    x = x.detach().clone().requires_grad_()
    y = f(x)
    rows = []
    for i in range(y.numel()):
        (g,) = torch.autograd.grad(y.reshape(-1)[i], x, retain_graph=True, allow_unused=True)
        rows.append(torch.zeros_like(x) if g is None else g)
    return torch.stack(rows).reshape(y.shape + x.shape).detach()


def hess(f, x):
    """The Hessian of a scalar function of one tensor by double backward."""
    return jacobian(lambda z: torch.autograd.grad(f(z), z, create_graph=True)[0], x)


def loop(f, in_dims=0, out_dims=0):
    """vmap by a Python loop; in_dims as vmap's own (an int, None, or a tree of them), out_dims an
    int or a tree."""

    def run(*args):
        dims = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(args)
        flat, tree = tree_flatten(args)
        flat_dims = []
        for arg, dim in zip(args, dims):
            flat_dims += _spread(dim, arg)
        size = next(x.shape[d] for x, d in zip(flat, flat_dims) if d is not None)
        results = []
        for i in range(size):
            one = [x if d is None else x.select(d, i) for x, d in zip(flat, flat_dims)]
            results.append(f(*tree.unflatten(one)))
        columns = [tree_flatten(r)[0] for r in results]
        out_tree = tree_flatten(results[0])[1]
        out_flat = _spread(out_dims, results[0])
        stacked = [
            torch.stack(list(col), 0).movedim(0, d) for col, d in zip(zip(*columns), out_flat)
        ]
        return out_tree.unflatten(stacked)

    return run


def _spread(dim, arg):
    if dim is None or isinstance(dim, int):
        return [dim] * len(tree_leaves(arg))
    if isinstance(dim, dict):
        return [d for k in arg for d in _spread(dim[k], arg[k])]
    return [d for sub_dim, sub in zip(dim, arg) for d in _spread(sub_dim, sub)]
