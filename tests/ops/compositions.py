"""One op under vjp, jvp, vmap and four pairs of them: a library's answer against an independent
one.

A check gets the library (``lib.vjp``, ``lib.jvp``, ``lib.vmap``) and a Call (an op with one
sample, as a function of its floating leaves). It raises Wrong on a wrong result, NoReference where
nothing has an answer to compare with, and lets the library's own errors through. The reference is
always asked first, so an error is the library's alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch.utils._pytree import tree_flatten, tree_leaves

from tests.ops.references import (
    LOOSE,
    NoReference,
    backward,
    backward_twice,
    close,
    copies,
    difference,
    difference_of_backward,
    finite,
    forward_ad_agreed,
    inner,
    judge,
    leaf,
    noise,
    reference,
    same_kind,
    second_difference,
    seeded,
)


@dataclass
class Call:
    """An op and one sample as ``f(*primals)`` -> the list of its floating outputs."""

    f: Callable[..., list[torch.Tensor]]
    primals: list[torch.Tensor]
    others: list[torch.Tensor]  # the integer and boolean tensors among the arguments
    rebuilt: Callable[
        [list[torch.Tensor], list[torch.Tensor]], object
    ]  # every tensor output, from both kinds
    trusted: bool = True  # autograd's own derivative is right
    writes: bool = False  # to an argument that is not among the primals

    @staticmethod
    def of(op, sample, trusted: bool = True) -> Call:
        leaves, tree = tree_flatten((sample.input, sample.args, sample.kwargs))
        is_float = [
            isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())
            for x in leaves
        ]
        is_other = [isinstance(x, torch.Tensor) and not m for x, m in zip(leaves, is_float)]

        def run(primals, others):
            floats, rest = iter(primals), iter(others)
            filled = [
                next(floats) if m else next(rest) if o else x
                for x, m, o in zip(leaves, is_float, is_other)
            ]
            first, args, kwargs = tree.unflatten(filled)
            return sample.output_process_fn_grad(
                op.gradcheck_wrapper(op.get_op(), first, *args, **kwargs)
            )

        def f(*primals):
            outs = [o for o in tree_leaves(run(primals, others)) if isinstance(o, torch.Tensor)]
            return [o for o in outs if o.is_floating_point() or o.is_complex()]

        primals = [x.detach() for x, m in zip(leaves, is_float) if m]
        others = [x for x, o in zip(leaves, is_other) if o]
        tensors = lambda p, o: [x for x in tree_leaves(run(p, o)) if isinstance(x, torch.Tensor)]
        return Call(f, primals, others, tensors, trusted)

    def differentiated(self) -> Call:
        """The call as a function of those primals that autograd differentiates it by (batch norm's
        statistics not)."""

        def takes(chosen: list[bool]) -> bool:
            try:
                seeded(
                    lambda: self.f(
                        *[t.requires_grad_(yes) for t, yes in zip(copies(self.primals), chosen)]
                    )
                )
            except (RuntimeError, NotImplementedError):
                return False
            return True

        n = len(self.primals)
        if n < 2 or takes([True] * n):
            return self
        chosen = [takes([i == k for i in range(n)]) for k in range(n)]
        if not any(chosen) or all(chosen):
            return self

        def f(*primals):
            feed, fixed = iter(primals), copies(self.primals)
            return self.f(*[next(feed) if yes else t for t, yes in zip(fixed, chosen)])

        tried = copies(self.primals)
        seeded(lambda: self.f(*tried))
        wrote = any(
            not torch.equal(t, x) for t, x, yes in zip(tried, self.primals, chosen) if not yes
        )
        kept = [t for t, yes in zip(self.primals, chosen) if yes]
        return Call(f, kept, self.others, self.rebuilt, self.trusted, wrote)

    def judge(self, *by_autograd: Callable[[], None], by_numbers: Callable[[], None]) -> None:
        judge(*(by_autograd if self.trusted else ()), by_numbers)


def moves(f, primals) -> list[bool]:
    """Which outputs depend on the primals by a derivative; all of them where autograd does not
    know."""
    try:
        return [o.requires_grad for o in seeded(lambda: f(*leaf(primals)))]
    except NotImplementedError:
        return [True for _ in seeded(lambda: f(*copies(primals)))]


def setup(call: Call):
    """(f restricted to the outputs that have a derivative, cotangents, all of it finite).

    Where f itself is not finite, derivatives are NaN in one formula and not in another.
    """
    if not call.primals:
        raise NoReference("no floating argument")
    kept = reference(lambda: moves(call.f, call.primals))
    if not any(kept):
        raise NoReference("no output requires grad")

    def f(*primals):
        return [o for o, keep in zip(call.f(*primals), kept) if keep]

    outs = [o.detach() for o in reference(lambda: f(*copies(call.primals)))]
    if not all(t.isfinite().all() for t in [*call.primals, *outs]):
        raise NoReference("not finite")
    return f, noise(outs, seed=1)


def pull(lib, f):
    """(primals, cotangents) -> gradients."""

    def run(primals, cotangents):
        _, back = lib.vjp(f, *primals)
        return list(back(list(cotangents)))

    return run


def push(lib, f):
    """(primals, tangents) -> tangents of the outputs."""
    return lambda primals, tangents: list(lib.jvp(f, tuple(primals), tuple(tangents))[1])


def check_vjp(lib, call: Call, variant: int) -> None:
    f, cts = setup(call)
    tangents = noise(call.primals, seed=2)

    @cache
    def got():
        gs = seeded(lambda: pull(lib, f)(copies(call.primals), cts))
        same_kind(gs, call.primals, "gradient")
        return gs

    def by_autograd():
        want = reference(lambda: backward(f, leaf(call.primals), cts))
        close(got(), want, "gradient")

    def by_differences():
        want = finite(inner(cts, reference(lambda: difference(f, call.primals, tangents))))
        close(
            [inner(got(), tangents)], [want], "inner product with differences", tolerance_for(cts)
        )

    call.judge(by_autograd, by_numbers=by_differences)


def check_jvp(lib, call: Call, variant: int) -> None:
    f, cts = setup(call)
    tangents = noise(call.primals, seed=2)

    @cache
    def got():
        outs, ts = seeded(lambda: lib.jvp(f, tuple(copies(call.primals)), tuple(tangents)))
        close(outs, seeded(lambda: f(*copies(call.primals))), "output")
        same_kind(ts, outs, "tangent")
        return ts

    def by_forward_ad():
        want = reference(lambda: forward_ad_agreed(f, call.primals, tangents, cts))
        close(got(), want, "tangent")

    def by_autograd():
        want = finite(inner(reference(lambda: backward(f, leaf(call.primals), cts)), tangents))
        close([inner(cts, got())], [want], "inner product with the vjp", like=cts)

    def by_differences():
        want = reference(lambda: difference(f, call.primals, tangents))
        close(widened(got()), want, "difference", tolerance_for(cts))

    call.judge(by_forward_ad, by_autograd, by_numbers=by_differences)


def widened(tensors):
    return [t.to(torch.complex128 if t.is_complex() else torch.float64) for t in tensors]


def tolerance_for(cts) -> dict[str, float] | None:
    """For what differences gave: looser in float64, and in float32 as ever."""
    wide = all(c.dtype in (torch.float64, torch.complex128) for c in cts)
    return LOOSE if wide else {"rtol": 1e-3, "atol": 1e-3}


def batch(tensors, loop_ok: Callable[[list], object]) -> list[torch.Tensor]:
    """Stacks of two, the second scaled a little (kept equal where the op does not bear it)."""
    second = [t * 0.97 if t.is_floating_point() or t.is_complex() else t for t in tensors]
    try:
        seeded(lambda: loop_ok(second))
    except Exception:
        second = tensors
    return [torch.stack([a, b]) for a, b in zip(tensors, second)]


def check_vmap(lib, call: Call, variant: int) -> None:
    """Variant 0 batches every tensor, 1 only the first, 2 the floating ones, at the last
    dimension."""
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
        rows = [
            run(*[t.select(at, i).clone() if m else t for t, m in zip(args, mapped)])
            for i in range(2)
        ]
        if not all(torch.equal(t, before) for t, before in unmapped if not t.isnan().any()):
            raise NoReference("writes to an unmapped argument")
        return [torch.stack(list(column)) for column in zip(*rows)]

    want = reference(loop)
    close(seeded(lambda: lib.vmap(run, in_dims=dims)(*copies(args))), want, "output")


def rows_of(primals, cts, run: Callable):
    """The two samples of a batch, one after another: ``run(primals, cts)`` gives a list, and so
    does this, stacked."""
    rows = [run([p[i] for p in primals], [c[i] for c in cts]) for i in range(2)]
    return [torch.stack(list(column)) for column in zip(*rows)]


def check_vmapvjp(lib, call: Call, variant: int) -> None:
    f, cts = setup(call)
    if call.writes:
        raise NoReference("writes to an unmapped argument")
    primals = batch(call.primals, lambda ts: backward(f, leaf(ts), cts))
    tangents = noise(call.primals, seed=2)
    cts = [torch.stack([c, -0.5 * c]) for c in cts]

    @cache
    def got():
        gs = seeded(lambda: lib.vmap(pull(lib, f))(copies(primals), cts))
        same_kind(gs, primals, "gradient")
        return gs

    def by_loop():
        want = reference(lambda: rows_of(primals, cts, lambda p, c: backward(f, leaf(p), c)))
        close(got(), want, "gradient")

    def by_differences():
        along = lambda p, c: [finite(inner(c, difference(f, p, tangents)))]
        (want,) = reference(lambda: rows_of(primals, cts, along))
        found = torch.stack([inner([g[i] for g in got()], tangents) for i in range(2)])
        close([found], [want], "inner product with differences", tolerance_for(cts))

    call.judge(by_loop, by_numbers=by_differences)


def check_vmapjvp(lib, call: Call, variant: int) -> None:
    f, cts = setup(call)
    if call.writes:
        raise NoReference("writes to an unmapped argument")
    primals = batch(call.primals, lambda ts: f(*ts))
    tangents = noise(primals, seed=2)

    @cache
    def got():
        return seeded(lambda: lib.vmap(push(lib, f))(copies(primals), tangents))

    def by_loop():
        want = reference(
            lambda: rows_of(primals, tangents, lambda p, t: forward_ad_agreed(f, p, t, cts))
        )
        close(got(), want, "tangent")

    def by_autograd():
        along = lambda p, t: [finite(inner(backward(f, leaf(p), cts), t))]
        (want,) = reference(lambda: rows_of(primals, tangents, along))
        same_kind([o[0] for o in got()], cts, "tangent")
        found = torch.stack([inner(cts, [o[i] for o in got()]) for i in range(2)])
        close([found], [want], "inner product with the vjp", like=cts)

    def by_differences():
        want = reference(lambda: rows_of(primals, tangents, lambda p, t: difference(f, p, t)))
        same_kind([o[0] for o in got()], cts, "tangent")
        close(widened(got()), want, "difference", tolerance_for(cts))

    call.judge(by_loop, by_autograd, by_numbers=by_differences)


def check_vjpvjp(lib, call: Call, variant: int) -> None:
    f, cts = setup(call)
    inputs, seconds = [*call.primals, *cts], noise(call.primals, seed=3)
    tangents = noise(inputs, seed=4)

    @cache
    def got():
        first, second = seeded(
            lambda: lib.vjp(pull(lib, f), copies(call.primals), list(cts))[1](seconds)
        )
        same_kind([*first, *second], inputs, "second gradient")
        return [*first, *second]

    def by_two_passes():
        want = reference(lambda: backward_twice(f, call.primals, cts, seconds))
        close(got(), want, "second gradient")

    def by_differences():
        moved = reference(lambda: difference_of_backward(f, call.primals, cts, tangents))
        want = finite(inner(seconds, moved))
        close(
            [inner(got(), tangents)], [want], "inner product with differences", tolerance_for(cts)
        )

    def by_second_differences():
        want = reference(lambda: second_difference(f, call.primals, cts, tangents, seconds))
        close(
            [inner(got(), tangents)],
            [want],
            "inner product with second differences",
            tolerance_for(cts),
        )

    call.judge(by_two_passes, by_differences, by_numbers=by_second_differences)


def check_jvpvjp(lib, call: Call, variant: int) -> None:
    """<s, d(gradient)[t, u]> = <second gradient of s, [t, u]>."""
    f, cts = setup(call)
    tangents, ct_tangents, seconds = (
        noise(call.primals, seed=4),
        noise(cts, seed=5),
        noise(call.primals, seed=3),
    )

    @cache
    def got():
        run = lambda: lib.jvp(
            pull(lib, f), (copies(call.primals), list(cts)), (tangents, ct_tangents)
        )
        gs, moved = seeded(run)
        same_kind(moved, call.primals, "tangent of the gradient")
        return gs, moved

    def by_two_passes():
        expected = reference(lambda: backward_twice(f, call.primals, cts, seconds))
        want = finite(inner(expected, [*tangents, *ct_tangents]))
        close(got()[0], reference(lambda: backward(f, leaf(call.primals), cts)), "gradient")
        close(
            [inner(seconds, got()[1])], [want], "inner product with the second gradient", like=cts
        )

    def by_differences():
        want = reference(
            lambda: difference_of_backward(f, call.primals, cts, [*tangents, *ct_tangents])
        )
        close(widened(got()[1]), want, "difference of the gradient", tolerance_for(cts))

    def by_second_differences():
        want = reference(
            lambda: second_difference(f, call.primals, cts, [*tangents, *ct_tangents], seconds)
        )
        close(
            [inner(seconds, got()[1])],
            [want],
            "inner product with second differences",
            tolerance_for(cts),
        )

    call.judge(by_two_passes, by_differences, by_numbers=by_second_differences)


COMPOSITIONS = {
    "vjp": check_vjp,
    "jvp": check_jvp,
    "vmap": check_vmap,
    "vmapvjp": check_vmapvjp,
    "jvpvjp": check_jvpvjp,
    "vjpvjp": check_vjpvjp,
    "vmapjvp": check_vmapjvp,
}
