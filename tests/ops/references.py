"""What is right: torch.autograd, forward AD, loops and, where those have no answer, central
differences in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.autograd.forward_ad as fwAD

SEED = 11
STEP = (
    2.0**-13
)  # of the differences: their error is of the order of STEP**4, rounding adds 1e-16 / STEP
WIDE = {torch.float32: torch.float64, torch.complex64: torch.complex128}
LOOSE = {"rtol": 1e-5, "atol": 1e-6}  # for what differences gave


class NoReference(Exception):
    """PyTorch has no derivative here (or its own loop fails), so there is nothing to compare
    with."""


class Wrong(Exception):
    """A result came, and it is not the right one."""


def seeded(run: Callable):
    torch.manual_seed(SEED)
    return run()


def reference(run: Callable):
    """The reference's answer; its refusal is no failure of the library's."""
    try:
        return seeded(run)
    except (
        RuntimeError,
        NotImplementedError,
        ValueError,
        IndexError,
        TypeError,
        AssertionError,
        Wrong,
    ) as error:
        raise NoReference(str(error)) from None


def judge(*ways: Callable[[], None]) -> None:
    """Right if one of the independent ways to look says so: autograd too is wrong in places, or
    has no answer."""
    verdicts: list[Exception] = []
    for way in ways:
        try:
            return way()
        except (NoReference, Wrong) as verdict:
            verdicts.append(verdict)
    raise next((v for v in verdicts if isinstance(v, Wrong)), verdicts[-1])


# comparing
# -------------------------------------------------------------------------------------------------


def tolerance_of(dtypes: set[torch.dtype]) -> dict[str, float]:
    if torch.bfloat16 in dtypes:
        return {"rtol": 5e-2, "atol": 5e-2}
    if dtypes & {torch.float16, torch.complex32}:
        return {"rtol": 1e-2, "atol": 1e-2}
    return (
        {"rtol": 1e-6, "atol": 1e-7}
        if dtypes <= {torch.float64, torch.complex128}
        else {"rtol": 1e-3, "atol": 1e-3}
    )


def same_kind(got, like, what: str) -> None:
    got, like = list(got), list(like)
    if len(got) != len(like):
        raise Wrong(f"{what}: {len(got)} results, {len(like)} expected")
    for i, (a, e) in enumerate(zip(got, like)):
        if a.dtype != e.dtype:
            raise Wrong(f"{what}[{i}]: {a.dtype}, expected {e.dtype}")
        if a.shape != e.shape:
            raise Wrong(f"{what}[{i}]: shape {tuple(a.shape)}, expected {tuple(e.shape)}")


def close(got, want, what: str, tolerance: dict[str, float] | None = None, like=()) -> None:
    """``like`` are tensors whose precision ``want`` was computed in, where it is not its own."""
    got, want = list(got), list(want)
    same_kind(got, want, what)
    for i, (a, e) in enumerate(zip(got, want)):
        bounds = tolerance or tolerance_of({t.dtype for t in [e, *like]})
        if not (e.is_floating_point() or e.is_complex()):
            bounds = {"rtol": 0, "atol": 0}
        a, e = a.detach().resolve_conj().resolve_neg(), e.detach().resolve_conj().resolve_neg()
        ok = torch.isclose(a, e, equal_nan=True, **bounds)
        if what != "output":
            ok |= (
                e.isnan()
            )  # an indeterminate form of eager's formula; another formula may well be finite there
        if not ok.all():
            worst = (a - e)[~ok].abs().max().item() if e.dtype != torch.bool else 1
            raise Wrong(
                f"{what}[{i}]: {int((~ok).sum())} of {ok.numel()} wrong, by up to {worst:.3g}"
            )


def noise(tensors, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, dtype=t.dtype, generator=generator) for t in tensors]


def inner(us, vs) -> torch.Tensor:
    """The real inner product of two lists of tensors."""
    return sum(
        ((u.conj() * v).real.double().sum() for u, v in zip(us, vs)),
        torch.zeros((), dtype=torch.float64),
    )


def finite(x: torch.Tensor) -> torch.Tensor:
    """An inner product that a NaN of the reference swallowed says nothing."""
    if not x.isfinite():
        raise NoReference("the reference is not finite")
    return x


# derivatives
# -------------------------------------------------------------------------------------------------


def copies(tensors) -> list[torch.Tensor]:
    """For ops that write to their arguments (batch norm's statistics): the sample itself stays as
    it is."""
    return [t.clone() for t in tensors]


def leaf(tensors) -> list[torch.Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def backward(f, primals, cotangents, create_graph=False):
    """torch.autograd's vjp; zeros where nothing depends. primals must be leaves or non-leaves that
    require grad."""
    with torch.enable_grad():
        outs = f(*primals)
        pairs = [(o, c) for o, c in zip(outs, cotangents) if o.requires_grad]
        if not pairs:
            raise NoReference("no output requires grad")
        gs = torch.autograd.grad(
            [o for o, _ in pairs],
            primals,
            [c for _, c in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
    return [
        torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g
        for g, p in zip(gs, primals)
    ]


def backward_twice(f, primals, cotangents, seconds):
    """The vjp of the vjp: gradients of primals and cotangents, for the cotangents ``seconds`` of
    the gradients."""
    p, c = leaf(primals), leaf(cotangents)
    gs = backward(f, p, c, create_graph=True)
    return backward(lambda *_: gs, [*p, *c], seconds)


def forward_ad(f, primals, tangents):
    with fwAD.dual_level():
        duals = [
            fwAD.unpack_dual(o)
            for o in f(*[fwAD.make_dual(p.clone(), t) for p, t in zip(primals, tangents)])
        ]
        return [torch.zeros_like(d.primal) if d.tangent is None else d.tangent for d in duals]


def forward_ad_agreed(f, primals, tangents, cotangents):
    """forward AD's answer where autograd's agrees with it: it has silent zeros for ops that it
    does not know."""
    ts = forward_ad(f, primals, tangents)
    try:
        want = inner(backward(f, leaf(primals), cotangents), tangents)
    except (RuntimeError, NotImplementedError):
        return ts
    close([inner(cotangents, ts)], [want], "forward AD", like=cotangents)
    return ts


def difference(f, primals, tangents):
    """The derivative of ``f`` along the tangents, by central differences of fourth order in
    float64.

    Where differences over two distances are far apart, ``f`` has no derivative that they would
    find."""
    p, t = ([x.to(WIDE.get(x.dtype, x.dtype)) for x in xs] for xs in (primals, tangents))

    def at(steps: float):
        outs = seeded(lambda: f(*[x + steps * STEP * d for x, d in zip(p, t)]))
        if not all(o.dtype in (torch.float64, torch.complex128) for o in outs):
            raise NoReference("not computed in float64")
        return [o.detach() for o in outs]

    near = [(a - b) / (2 * STEP) for a, b in zip(at(1), at(-1))]
    far = [(a - b) / (4 * STEP) for a, b in zip(at(2), at(-2))]
    if not all(
        torch.allclose(a, b, rtol=1e-2, atol=1e-2, equal_nan=True) for a, b in zip(near, far)
    ):
        raise NoReference("not smooth here")
    return [(4 * a - b) / 3 for a, b in zip(near, far)]


def second_difference(f, primals, cotangents, tangents, seconds) -> torch.Tensor:
    """<second gradient of ``seconds``, tangents of primals and cotangents>, without any derivative
    but of numbers.

    It is the mixed derivative of <c + h u, f(p + h t + k s)> by h and k.
    """
    wide = lambda xs: [x.to(WIDE.get(x.dtype, x.dtype)) for x in xs]
    p, c, t, s = map(wide, (primals, cotangents, tangents, seconds))
    n = len(p)

    def at(h: float, k: float) -> torch.Tensor:
        outs = seeded(lambda: f(*[x + h * d + k * e for x, d, e in zip(p, t, s)]))
        if not all(o.dtype in (torch.float64, torch.complex128) for o in outs):
            raise NoReference("not computed in float64")
        return inner([x + h * u for x, u in zip(c, t[n:])], outs)

    def mixed(h: float) -> torch.Tensor:
        return (at(h, h) - at(h, -h) - at(-h, h) + at(-h, -h)) / (4 * h * h)

    near, far = mixed(16 * STEP), mixed(32 * STEP)
    if not torch.allclose(near, far, rtol=1e-2, atol=1e-2):
        raise NoReference("not smooth here")
    return finite((4 * near - far) / 3)


def difference_of_backward(f, primals, cotangents, tangents):
    """The gradient's derivative along tangents of primals and cotangents."""
    n = len(primals)
    return difference(
        lambda *pc: backward(f, leaf(pc[:n]), pc[n:]), [*primals, *cotangents], tangents
    )
