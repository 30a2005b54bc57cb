"""The rules of each op: one OpRules per overload, stated with a few verbs.

A rule is plain tensor code. It is written once, called by the walkers while they trace it into a
fragment, and may as well be called in a Python shell. Conventions, the same for every verb:

- A rule is called with **all** arguments of the op's schema, positionally, in schema order
  (keyword-only ones last), defaults filled in. A rule that takes fewer parameters is given the
  leading ones only.
- First come the cotangent(s) or tangent(s), then the output(s), then the op's own arguments. An op
  with several outputs passes and returns tuples for them; in such a tuple of cotangents an absent
  (zero) one is ``None``.
- *Tensor arguments* are those whose schema type is ``Tensor``, ``Tensor?``, ``Tensor[]`` or
  ``Tensor?[]``. A vjp rule returns one cotangent per tensor argument, in order: ``None`` for no
  gradient, a list for a tensor list; those left out at the end have none. A jvp rule gets one
  tangent per tensor argument in the same form and returns one tangent per output.
- The walkers own the chores: un-broadcasting, casting to the primal's dtype (real part of a
  complex cotangent of a real argument), accumulation, absent cotangents and tangents, moving the
  batch dimension to 0.
- A rule may ask for more by naming a keyword-only parameter: ``needs`` (vjp: a tuple of bools,
  which tensor arguments want a gradient), ``batched`` (vmap: which tensor arguments carry the
  batch at dimension 0; a list of bools for a tensor list; without it all tensor arguments arrive
  batched), ``size`` (vmap: the batch size), ``randomness`` (vmap: "different" or "same"),
  ``shape`` (vmap: the unbatched shape of the output, a tuple of them for several), ``sample``
  (vmap: the unbatched signature of the first argument).
- A vmap rule returns the output(s), all of them, with the batch at dimension 0.

Gradients of complex values follow PyTorch's convention: the cotangent of ``x`` is the conjugate
Wirtinger derivative, so that a step along its negative descends."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from .batching import elementwise
from .schema import Formula, aten, call_op, overload, tensor_args


@dataclass
class OpRules:
    """The rules of one op under each transform; ``None`` where the fallback decides."""

    vjp: Formula | None = None
    jvp: Formula | None = None
    vmap: Formula | None = None
    #: no derivative: every tangent and cotangent is zero
    nondiff: bool = False
    #: the derivative is zero, of real numbers at least, and autograd says that the result requires
    #: grad
    zero: bool = False
    #: positions of the arguments by which the derivative is zero: rules leave it out, autograd has
    #: zeros
    flat: tuple[int, ...] = ()
    #: a result's element depends on one element of each argument
    elementwise: bool = False
    #: a result's element depends on all of the first argument along the dims that the second names
    along: bool = False
    #: positions of the arguments in which it is linear, in all together if ``jointly``
    linear: tuple[int, ...] = ()
    jointly: bool = False
    #: its decomposition, if the series of that is shorter than the one by its derivative
    series: Formula | None = None
    #: the results of which autograd has a wrong derivative or none, unlike the rules: see
    #: :func:`wrong_in_autograd`
    wrong_in_autograd: str = ""
    #: positions (among the outputs) of the outputs that carry a derivative; None: all floating
    #: ones
    diff_outputs: tuple[int, ...] | None = None

    def linear_in(self, places: Sequence[int]) -> bool:
        """Return whether the op is linear in the arguments at ``places`` together."""
        return (self.jointly or len(places) == 1) and set(places).issubset(self.linear)

    @property
    def bilinear(self) -> bool:
        """Return whether it is linear in each of two arguments, and has no other derivative."""
        return len(self.linear) == 2 and not self.jointly


RULES: dict[OpOverload, OpRules] = {}
DECOMPOSITIONS: dict[OpOverload, Formula] = {}


_EMPTY = OpRules()


#: the namespace of ops that a module of torch's defines, which may not be imported yet -> what
#: states their rules
_LATE: dict[str, Callable[[], None]] = {}


def rules_of(namespace: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Make a decorator: the function states the rules of the ops of ``namespace``, when the table
    is asked for one of them."""
    return lambda state: _LATE.setdefault(namespace, state)


def entry_for(op: Any) -> OpRules:
    """Return the table's entry for ``op``, to be read; an empty one if there is none."""
    if op.__class__ is OpOverload and (state := _LATE.get(op.namespace)) is not None:
        state()
        _LATE.pop(op.namespace, None)
    return RULES.get(op, _EMPTY)


def writable_entry(op: OpOverload | OpOverloadPacket) -> OpRules:
    """Return the table's entry for ``op``, to be written; made empty if there is none yet."""
    return RULES.setdefault(overload(op), OpRules())


EXTRAS = ("needs", "batched", "size", "randomness", "shape", "sample")


def parameters(f: Formula) -> tuple[int, tuple[str, ...], bool]:
    """Return how many positional parameters ``f`` has, its keyword-only ones, and whether it takes
    any number of positional ones, as an op does. Read off the code: signatures of two thousand
    rules would take half the time of the import."""
    code = getattr(f, "__code__", None)
    if code is None:
        return 0, (), True
    count, keyword_only = code.co_argcount, code.co_kwonlyargcount
    return (
        count,
        code.co_varnames[count : count + keyword_only],
        bool(code.co_flags & inspect.CO_VARARGS),
    )


def adapt(rule: Formula, leading: int) -> Formula:
    """Wrap ``rule`` so that it may be called with every argument and every extra; it gets those
    that it names.

    ``leading`` is the number of parameters before the op's own arguments."""
    count, wants, variadic = parameters(rule)
    if unknown := [name for name in wants if name not in EXTRAS]:
        raise TypeError(f"a rule may ask for {', '.join(EXTRAS)}, not {', '.join(unknown)}")

    def call(*args: Any, **extras: Any) -> Any:
        given = args if variadic else args[:count]
        return rule(*given, **{name: extras[name] for name in wants})

    call.wants = wants  # type: ignore[attr-defined]
    call.__wrapped__ = rule  # type: ignore[attr-defined]
    return call


# ----- the verbs ---------------------------------------------------------------------------------


def stating(
    transform: str, ops: Sequence[OpOverload | OpOverloadPacket], leading: int, **fields: Any
) -> Callable[[Formula], Formula]:
    """Make a decorator: the function is the rule of ``ops`` under this transform."""

    def register(rule: Formula) -> Formula:
        for op in ops:
            vars(writable_entry(op)).update({transform: adapt(rule, leading), **fields})
        return rule

    return register


def vjp_of(
    *ops: OpOverload | OpOverloadPacket, diff_outputs: tuple[int, ...] | None = None
) -> Callable[[Formula], Formula]:
    """Make a decorator: the function is the reverse rule ``(g, out, *args) -> cotangents`` of
    ``ops``.

    ``diff_outputs`` lists the outputs that carry a derivative, where it is not all floating ones.
    """
    return stating("vjp", ops, 2, diff_outputs=diff_outputs)


def jvp_of(*ops: OpOverload | OpOverloadPacket) -> Callable[[Formula], Formula]:
    """Make a decorator: the function is the forward rule ``(tangents, out, *args) -> tangents`` of
    ``ops``.

    ``tangents`` is a tuple, one entry per tensor argument. An op without a forward rule has its
    reverse rule transposed."""
    return stating("jvp", ops, 2)


def vmap_of(
    *ops: OpOverload | OpOverloadPacket, elementwise: bool = False
) -> Callable[[Formula], Formula]:
    """Make a decorator: the function is the batching rule ``(*args) -> outputs``, batch at
    dimension 0, of ``ops``; ``elementwise`` says that they are (:attr:`OpRules.elementwise`)."""
    return stating("vmap", ops, 0, **({"elementwise": True} if elementwise else {}))


def pointwise(
    op: OpOverload | OpOverloadPacket, *formulas: Formula | None, linear: tuple[int, ...] = ()
) -> None:
    """State that ``op`` acts on each element: its Jacobian is diagonal, and holomorphic if
    complex.

    One formula ``(g, out, *args)`` per tensor argument (``None``: no derivative), linear in ``g``,
    maps the output's cotangent to the argument's and the argument's tangent to the output's. Write
    it without conjugates; the verb conjugates. No formula at all means zero derivative. ``linear``
    lists the arguments that a product is linear in."""
    entry = writable_entry(op)
    op = overload(op)
    entry.vmap, entry.elementwise, entry.linear = adapt(elementwise(op), 0), True, linear
    if not any(formulas):
        entry.nondiff = entry.zero = True
        return
    rules = [adapt(f, 2) if f else None for f in formulas]

    def vjp(g: Tensor, out: Tensor, *args: Any, needs: tuple[bool, ...]) -> list[Tensor | None]:
        def one(rule: Formula) -> Tensor:
            return rule(g.conj(), out, *args).conj() if g.is_complex() else rule(g, out, *args)

        return [
            one(rule) if rule and need else None for rule, need in zip(rules, needs, strict=False)
        ]

    def jvp(tangents: tuple[Tensor | None, ...], out: Tensor, *args: Any) -> Tensor | None:
        return total(
            *(
                rule(t, out, *args)
                for rule, t in zip(rules, tangents, strict=False)
                if rule and t is not None
            )
        )

    entry.vjp, entry.jvp = adapt(vjp, 2), adapt(jvp, 2)


def linear(
    op: OpOverload | OpOverloadPacket,
    *transposes: Formula | None,
    batch: Formula | None = None,
    jointly: bool = False,
) -> None:
    """State that ``op`` is linear in each listed tensor argument (``None``: in that one it has no
    derivative).

    One transpose ``(g, *args)`` per tensor argument, written for the conjugate already where it
    matters (``g @ b.mH``). The tangent is the op on each tangent, summed; ``jointly`` says that
    the op is linear in all of them together (``scatter_add``, not ``mm``), and then it is the op
    on all tangents at once. ``batch`` is the vmap rule (see :func:`shifted`, :func:`elementwise`).
    """
    entry = writable_entry(op)
    op = overload(op)
    where = tensor_args(op)
    rules = [adapt(t, 1) if t else None for t in transposes]
    entry.linear = tuple([i for i, rule in zip(where, rules, strict=False) if rule])
    entry.jointly = jointly

    def vjp(g: Tensor, out: Tensor, *args: Any, needs: tuple[bool, ...]) -> list[Tensor | None]:
        return [
            rule(g, *args) if rule and need else None
            for rule, need in zip(rules, needs, strict=False)
        ]

    def jvp(tangents: tuple[Tensor | None, ...], out: Tensor, *args: Any) -> Tensor | None:
        def on(i: int, t: Any) -> Tensor:
            # a list counts as one argument: absent tangents in it are zeros
            if isinstance(t, list | tuple):
                t = [
                    torch.zeros_like(x) if d is None else d
                    for d, x in zip(t, args[where[i]], strict=True)
                ]
            return call_op(op, [*args[: where[i]], t, *args[where[i] + 1 :]])

        return total(
            *(
                on(i, t)
                for i, (rule, t) in enumerate(zip(rules, tangents, strict=False))
                if rule and present(t)
            )
        )

    def joint_jvp(tangents: tuple[Tensor | None, ...], out: Tensor, *args: Any) -> Tensor:
        full = list(args)
        for at, rule, t in zip(where, rules, tangents, strict=False):
            if rule:
                full[at] = torch.zeros_like(args[at]) if t is None else t
        return call_op(op, full)

    entry.vjp, entry.jvp = adapt(vjp, 2), adapt(joint_jvp if jointly else jvp, 2)
    if batch:
        entry.vmap = adapt(batch, 0)


def nondiff(
    *ops: OpOverload | OpOverloadPacket,
    batch: Callable[[OpOverload], Formula] | None = None,
    zero: bool = False,
) -> None:
    """State that ``ops`` have no derivative (integer-valued, comparisons, factories), or that it
    is ``zero``, as that of a draw by its parameters. ``batch(op)`` makes the vmap rule."""
    for op in ops:
        entry = writable_entry(op)
        entry.nondiff, entry.zero = True, zero
        if batch:
            entry.vmap = adapt(batch(overload(op)), 0)


def zeros(g: Tensor, *_: Any) -> Tensor:
    """Return a zero derivative: None if ``g`` is absent, else zeros for any ``g``."""
    return aten.zero.default(g).detach()


def flat(*ops: OpOverload | OpOverloadPacket, by: tuple[int, ...] = (1,)) -> None:
    """State that ``ops`` are piecewise constant in the arguments ``by``. Rules have no derivative
    there, for short graphs; autograd fills ``.grad`` with zeros."""
    for op in ops:
        writable_entry(op).flat = by


def along_dims(*ops: OpOverload | OpOverloadPacket) -> None:
    """State that an element of a result of ``ops`` depends on the elements of their first argument
    along the dims that the second names, on all of them and on no others."""
    for op in ops:
        writable_entry(op).along = True


def wrong_in_autograd(which: str, *ops: OpOverload | OpOverloadPacket) -> None:
    """State that autograd has a wrong derivative, or none, of ``which`` results of ``ops``: "all",
    "complex" ones, or the "statistics" that a normalisation returns beside its result."""
    for op in ops:
        writable_entry(op).wrong_in_autograd = which


def series_as(op: OpOverload | OpOverloadPacket, body: Formula) -> None:
    """Let ``jet`` take the series of ``op`` from ``body(*args)``: shorter than by rules."""
    writable_entry(op).series = body


def decompose_as(op: OpOverload | OpOverloadPacket, body: Formula) -> None:
    """Let ``op`` be transformed as ``body(*args)`` without a rule or PyTorch's formula."""
    DECOMPOSITIONS[overload(op)] = body


# ----- what rules are made of --------------------------------------------------------------------


def present(t: Any) -> bool:
    """Return whether a tangent is there: neither ``None`` nor a list of ``None`` only."""
    return any(x is not None for x in t) if isinstance(t, list | tuple) else t is not None


def total(*terms: Any) -> Any:
    """Return the sum of the terms that are not ``None``; ``None`` if all are."""
    result = None
    for term in terms:
        if term is not None:
            result = term if result is None else result + term
    return result


def broadcast_shapes(*shapes: Sequence[int]) -> torch.Size:
    """Broadcast shapes that fit. (``torch.broadcast_shapes`` imports sympy.)"""
    sizes = zip_longest(*map(reversed, shapes), fillvalue=1)
    return torch.Size([next((n for n in along if n != 1), 1) for along in sizes][::-1])


def times(x: Tensor, by: Any) -> Tensor:
    """Return ``x * by`` without the multiplication by one."""
    return x if not isinstance(by, Tensor) and by == 1 else x * by


def conj(x: Any) -> Any:
    """Return the conjugate of a tensor or a number, and ``x`` itself if that is real."""
    if isinstance(x, Tensor):
        return x.conj() if x.is_complex() else x
    return x.conjugate() if isinstance(x, complex) else x


def refuse_sparse(sparse: bool) -> None:
    """Refuse an op whose gradient is sparse in eager: graphs hold dense tensors."""
    if sparse:
        raise NotImplementedError(
            "its gradient would be sparse, and programs compute dense ones; say sparse=False"
        )
