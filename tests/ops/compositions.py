"""One op under vjp, jvp, vmap and three pairs of them, each against torch.autograd, forward AD or a loop.

A check gets a Call (an op with one sample, as a function of its floating leaves) and raises AssertionError on a wrong
result, NoReference where PyTorch itself has no answer to compare with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.autograd.forward_ad as fwAD
from torch.utils._pytree import tree_flatten, tree_leaves

import aotfunc

SEED = 11
TOLERANCE = {"rtol": 1e-6, "atol": 1e-7}


class NoReference(Exception):
    """PyTorch has no derivative here (or its own loop fails), so there is nothing to compare with."""


@dataclass
class Call:
    """An op and one sample as ``f(*primals)`` -> the list of its floating outputs."""

    f: Callable[..., list[torch.Tensor]]
    primals: list[torch.Tensor]
    others: list[torch.Tensor]  # the integer and boolean tensors among the arguments
    rebuilt: Callable[[list[torch.Tensor], list[torch.Tensor]], object]  # every tensor output, from both kinds

    @staticmethod
    def of(op, sample) -> Call:
        leaves, tree = tree_flatten((sample.input, sample.args, sample.kwargs))
        is_float = [isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex()) for x in leaves]
        is_other = [isinstance(x, torch.Tensor) and not m for x, m in zip(leaves, is_float)]

        def run(primals, others):
            floats, rest = iter(primals), iter(others)
            filled = [next(floats) if m else next(rest) if o else x for x, m, o in zip(leaves, is_float, is_other)]
            first, args, kwargs = tree.unflatten(filled)
            return sample.output_process_fn_grad(op.gradcheck_wrapper(op.get_op(), first, *args, **kwargs))

        def f(*primals):
            outs = [o for o in tree_leaves(run(primals, others)) if isinstance(o, torch.Tensor)]
            return [o for o in outs if o.is_floating_point() or o.is_complex()]

        primals = [x.detach() for x, m in zip(leaves, is_float) if m]
        others = [x for x, o in zip(leaves, is_other) if o]
        return Call(f, primals, others, lambda p, o: [x for x in tree_leaves(run(p, o)) if isinstance(x, torch.Tensor)])


def seeded(run: Callable):
    torch.manual_seed(SEED)
    return run()


def reference(run: Callable):
    """The reference's answer; its refusal is no failure of ours."""
    try:
        return seeded(run)
    except (TimeoutError, NoReference):
        raise
    except (RuntimeError, NotImplementedError, ValueError, IndexError, TypeError) as error:
        raise NoReference(str(error)) from None


def tolerance_of(dtypes: set[torch.dtype]) -> dict[str, float]:
    if torch.bfloat16 in dtypes:
        return {"rtol": 5e-2, "atol": 5e-2}
    return TOLERANCE if dtypes <= {torch.float64, torch.complex128} else {"rtol": 1e-3, "atol": 1e-3}


def close(got, want, what: str, like=()) -> None:
    """``like`` are tensors whose precision ``want`` was computed in, where it is not its own."""
    got, want = list(got), list(want)
    assert len(got) == len(want), f"{what}: {len(got)} results, {len(want)} expected"
    for i, (a, e) in enumerate(zip(got, want)):
        assert a.dtype == e.dtype, f"{what}[{i}]: {a.dtype}, expected {e.dtype}"
        assert a.shape == e.shape, f"{what}[{i}]: shape {tuple(a.shape)}, expected {tuple(e.shape)}"
        tolerance = tolerance_of({t.dtype for t in [e, *like]})
        if not (e.is_floating_point() or e.is_complex()):
            tolerance = {"rtol": 0, "atol": 0}
        a, e = a.detach().resolve_conj().resolve_neg(), e.detach().resolve_conj().resolve_neg()
        ok = torch.isclose(a, e, equal_nan=True, **tolerance)
        if what != "output":
            ok |= e.isnan()  # an indeterminate form of eager's formula; another formula may well be finite there
        if not ok.all():
            worst = (a - e)[~ok].abs().max().item() if e.dtype != torch.bool else 1
            raise AssertionError(f"{what}[{i}]: {int((~ok).sum())} of {ok.numel()} wrong, by up to {worst:.3g}")


def noise(tensors) -> list[torch.Tensor]:
    return [torch.randn(t.shape, dtype=t.dtype, generator=_generator()) for t in tensors]


def _generator(seed=[0]) -> torch.Generator:  # noqa: B006  a counter: reproducible, and another draw each time
    seed[0] += 1
    return torch.Generator().manual_seed(seed[0])


# references ----------------------------------------------------------------------------------------------------------


def backward(f, primals, cotangents, create_graph=False):
    """torch.autograd's vjp; zeros where nothing depends. primals must be leaves or non-leaves that require grad."""
    with torch.enable_grad():
        outs = f(*primals)
        pairs = [(o, c) for o, c in zip(outs, cotangents) if o.requires_grad]
        if not pairs:
            raise NoReference("no output requires grad")
        gs = torch.autograd.grad(
            [o for o, _ in pairs], primals, [c for _, c in pairs], create_graph=create_graph, allow_unused=True
        )
    return [torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g for g, p in zip(gs, primals)]


def leaf(tensors) -> list[torch.Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def forward_ad(f, primals, tangents):
    with fwAD.dual_level():
        duals = [fwAD.unpack_dual(o) for o in f(*[fwAD.make_dual(p.clone(), t) for p, t in zip(primals, tangents)])]
        return [torch.zeros_like(d.primal) if d.tangent is None else d.tangent for d in duals]


def inner(us, vs) -> torch.Tensor:
    """The real inner product of two lists of tensors."""
    return sum(((u.conj() * v).real.double().sum() for u, v in zip(us, vs)), torch.zeros((), dtype=torch.float64))


def finite(x: torch.Tensor) -> torch.Tensor:
    """An inner product that a NaN of the reference swallowed says nothing."""
    if not x.isfinite():
        raise NoReference("the reference is not finite")
    return x


def copies(tensors) -> list[torch.Tensor]:
    """For ops that write to their arguments (batch norm's statistics): the sample itself stays as it is."""
    return [t.clone() for t in tensors]


def moves(f, primals) -> list[bool]:
    """Which outputs depend on the primals by a derivative."""
    return [o.requires_grad for o in seeded(lambda: f(*leaf(primals)))]


# the checks ----------------------------------------------------------------------------------------------------------


def differentiable(call: Call):
    """(f, cotangent-like outputs) restricted to the outputs that have a derivative."""
    if not call.primals:
        raise NoReference("no floating argument")
    kept = reference(lambda: moves(call.f, call.primals))
    if not any(kept):
        raise NoReference("no output requires grad")

    def f(*primals):
        return [o for o, keep in zip(call.f(*primals), kept) if keep]

    return f, [o.detach() for o in seeded(lambda: call.f(*copies(call.primals)))], kept


def pull(f):
    """(primals, cotangents) -> gradients, by aotfunc."""

    def run(primals, cotangents):
        _, back = aotfunc.vjp(f, *primals)
        return list(back(list(cotangents)))

    return run


def setup(call: Call):
    """(f, cotangents); where f itself is not finite, derivatives are NaN in one formula and not in another."""
    f, outs, kept = differentiable(call)
    if not all(t.isfinite().all() for t in [*call.primals, *outs]):
        raise NoReference("not finite")
    return f, noise([o for o, keep in zip(outs, kept) if keep])


def check_vjp(call: Call, variant: int) -> None:
    f, cts = setup(call)
    want = reference(lambda: backward(f, leaf(call.primals), cts))
    close(seeded(lambda: pull(f)(copies(call.primals), cts)), want, "gradient")


def check_jvp(call: Call, variant: int) -> None:
    f, cts = setup(call)
    tangents = noise(call.primals)
    outs, got = seeded(lambda: aotfunc.jvp(f, tuple(copies(call.primals)), tuple(tangents)))
    close(outs, seeded(lambda: f(*copies(call.primals))), "output")
    try:
        return close(got, reference(lambda: forward_ad(f, call.primals, tangents)), "tangent")
    except (NoReference, AssertionError):
        # no forward AD there, or a wrong one (scatter_reduce's product): <ct, J t> = <J^T ct, t> decides
        gs = reference(lambda: backward(f, leaf(call.primals), cts))
        close([inner(cts, got)], [finite(inner(gs, tangents))], "inner product with the vjp", like=cts)


def batch(tensors, loop_ok: Callable[[list], object]) -> list[torch.Tensor]:
    """Stacks of two, the second scaled a little (kept equal where the op does not bear it)."""
    second = [t * 0.97 if t.is_floating_point() or t.is_complex() else t for t in tensors]
    try:
        seeded(lambda: loop_ok(second))
    except Exception:
        second = tensors
    return [torch.stack([a, b]) for a, b in zip(tensors, second)]


def check_vmap(call: Call, variant: int) -> None:
    """Variant 0 batches every tensor, 1 only the first, 2 the floating ones, at the last dimension."""
    primals, others = call.primals, call.others
    both = [*primals, *others]
    n = len(primals)
    if not both:
        raise NoReference("no tensor argument")
    stacked = batch(both, lambda ts: call.rebuilt(ts[:n], ts[n:]))
    mapped = {
        0: [True] * len(both),
        1: [i == 0 for i in range(len(both))],
        2: [i < max(n, 1) for i in range(len(both))],
    }[variant]
    at = -1 if variant == 2 else 0
    dims = tuple(at if m else None for m in mapped)
    args = [s.movedim(0, at) if m else t for s, t, m in zip(stacked, both, mapped)]
    run = lambda *ts: call.rebuilt(list(ts[:n]), list(ts[n:]))

    def loop():
        unmapped = [(t, t.clone()) for t, m in zip(args, mapped) if not m]
        rows = [run(*[t.select(at, i).clone() if m else t for t, m in zip(args, mapped)]) for i in range(2)]
        if not all(torch.equal(t, before) for t, before in unmapped if not t.isnan().any()):
            raise NoReference("writes to an unmapped argument")
        return [torch.stack(list(column)) for column in zip(*rows)]

    want = reference(loop)
    close(seeded(lambda: aotfunc.vmap(run, in_dims=dims)(*copies(args))), want, "output")


def check_vjpvjp(call: Call, variant: int) -> None:
    f, cts = setup(call)
    seconds = noise(call.primals)

    def want():
        p, c = leaf(call.primals), leaf(cts)
        gs = backward(f, p, c, create_graph=True)
        return backward(lambda *_: gs, [*p, *c], seconds)

    expected = reference(want)
    got = seeded(lambda: aotfunc.vjp(pull(f), copies(call.primals), list(cts))[1](seconds))
    close([*got[0], *got[1]], expected, "second gradient")


def check_jvpvjp(call: Call, variant: int) -> None:
    """<s, d(gradient)[t, u]> = <second gradient of s, [t, u]>."""
    f, cts = setup(call)
    tangents, ct_tangents, seconds = noise(call.primals), noise(cts), noise(call.primals)

    def want():
        p, c = leaf(call.primals), leaf(cts)
        gs = backward(f, p, c, create_graph=True)
        return backward(lambda *_: gs, [*p, *c], seconds)

    expected = finite(inner(reference(want), [*tangents, *ct_tangents]))
    run = lambda: aotfunc.jvp(pull(f), (copies(call.primals), list(cts)), (tangents, ct_tangents))
    gs, got = seeded(run)
    close(gs, reference(lambda: backward(f, leaf(call.primals), cts)), "gradient")
    close([inner(seconds, got)], [expected], "inner product with the second gradient", like=cts)


def check_vmapvjp(call: Call, variant: int) -> None:
    f, cts = setup(call)
    primals = batch(call.primals, lambda ts: backward(f, leaf(ts), cts))
    cts = [torch.stack([c, -0.5 * c]) for c in cts]

    def loop():
        rows = [backward(f, leaf([p[i] for p in primals]), [c[i] for c in cts]) for i in range(2)]
        return [torch.stack(list(column)) for column in zip(*rows)]

    want = reference(loop)
    close(seeded(lambda: aotfunc.vmap(pull(f))(primals, cts)), want, "gradient")


COMPOSITIONS = {
    "vjp": check_vjp,
    "jvp": check_jvp,
    "vmap": check_vmap,
    "vjpvjp": check_vjpvjp,
    "jvpvjp": check_jvpvjp,
    "vmapvjp": check_vmapvjp,
}
