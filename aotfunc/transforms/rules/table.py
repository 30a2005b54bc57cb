"""What is known about each op: one Rule per overload, stated with a few verbs.

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
  gradient, a list for a tensor list. A jvp rule gets one tangent per tensor argument in the same
  form and returns one tangent per output.
- The walkers own the chores: un-broadcasting, casting to the primal's dtype (real part of a
  complex cotangent of a real argument), accumulation, absent cotangents and tangents, moving the
  batch dimension to 0.
- A rule may ask for more by naming a keyword-only parameter: ``needs`` (vjp: a tuple of bools,
  which tensor arguments want a gradient), ``batched`` (vmap: which tensor arguments carry the
  batch at dimension 0; a list of bools for a tensor list; without it all tensor arguments arrive
  batched), ``size`` (vmap: the batch size), ``randomness`` (vmap: "different" or "same"),
  ``shape`` (vmap: the unbatched shape of the output, a tuple of them for several), ``sample``
  (vmap: the unbatched signature of the first argument).
- A vmap rule returns the output(s) with the batch at dimension 0.

Gradients of complex values follow PyTorch's convention: the cotangent of ``x`` is the conjugate
Wirtinger derivative, so that a step along its negative descends."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

aten = torch.ops.aten

Formula = Callable[..., Any]


@dataclass
class OpRules:
    """How one op behaves under each transform; ``None`` where nothing is written and the fallback
    decides."""

    vjp: Formula | None = None
    jvp: Formula | None = None
    vmap: Formula | None = None
    #: no derivative at all: every tangent and cotangent is zero
    nondiff: bool = False
    #: the derivative is zero, of real numbers at least, and autograd says that the result requires
    # grad
    zero: bool = False
    #: positions of the arguments by which the derivative is zero: no rule has it, but autograd does
    flat: tuple[int, ...] = ()
    #: positions (among the outputs) of the outputs that carry a derivative; None: all floating
    # ones
    diff_outputs: tuple[int, ...] | None = None
    verbs: list[str] = field(default_factory=list)


RULES: dict[OpOverload, OpRules] = {}
DECOMPOSITIONS: dict[OpOverload, Formula] = {}


def overload(op: OpOverload | OpOverloadPacket) -> OpOverload:
    """The overload that ``op`` names: itself, or a packet's ``default``."""
    return op.default if isinstance(op, OpOverloadPacket) else op


def rule_of(op: OpOverload | OpOverloadPacket) -> OpRules:
    """The table's line for ``op``, made empty if there is none yet."""
    return RULES.setdefault(overload(op), OpRules())


@cache
def tensor_args(op: OpOverload) -> tuple[int, ...]:
    """Positions of the tensor arguments (``Tensor``, ``Tensor?``, ``Tensor[]``, ``Tensor?[]``) in
    the schema."""
    kinds = ("Tensor", "Optional[Tensor]", "List[Tensor]", "List[Optional[Tensor]]")
    return tuple(i for i, a in enumerate(op._schema.arguments) if str(a.type) in kinds)


def full_args(op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """All arguments of the schema in order, keyword-only ones too, defaults filled in."""
    schema = op._schema.arguments
    full = list(args)
    for a in schema[len(args) :]:
        full.append(kwargs.get(a.name, a.default_value))
    return full


EXTRAS = ("needs", "batched", "size", "randomness", "shape", "sample")


def parameters(f: Formula) -> tuple[int, tuple[str, ...], bool]:
    """How many positional parameters ``f`` has, its keyword-only ones, and whether it takes any
    number of positional ones, as an op does. Read off the code: signatures of two thousand rules
    would take half the time of the import."""
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
    """Wrap ``rule`` so that it may be called with every argument and every extra; it is given what
    it names.

    ``leading`` is the number of parameters before the op's own arguments.
    """
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


def vjp_of(
    *ops: OpOverload | OpOverloadPacket, diff_outputs: tuple[int, ...] | None = None
) -> Callable[[Formula], Formula]:
    """Decorator: this function is the reverse rule ``(g, out, *args) -> cotangents`` of ``ops``.

    ``diff_outputs`` lists the outputs that carry a derivative, where it is not all floating ones.
    """

    def register(rule: Formula) -> Formula:
        for op in ops:
            line = rule_of(op)
            line.vjp, line.diff_outputs = adapt(rule, 2), diff_outputs
            line.verbs.append("vjp_of")
        return rule

    return register


def jvp_of(*ops: OpOverload | OpOverloadPacket) -> Callable[[Formula], Formula]:
    """Decorator: this function is the forward rule ``(tangents, out, *args) -> tangents`` of
    ``ops``.

    ``tangents`` is a tuple, one entry per tensor argument. Without a forward rule the reverse rule
    is transposed."""

    def register(rule: Formula) -> Formula:
        for op in ops:
            line = rule_of(op)
            line.jvp = adapt(rule, 2)
            line.verbs.append("jvp_of")
        return rule

    return register


def vmap_of(*ops: OpOverload | OpOverloadPacket) -> Callable[[Formula], Formula]:
    """Decorator: this function is the batching rule ``(*args) -> outputs``, batch at dimension 0,
    of ``ops``."""

    def register(rule: Formula) -> Formula:
        for op in ops:
            line = rule_of(op)
            line.vmap = adapt(rule, 0)
            line.verbs.append("vmap_of")
        return rule

    return register


def pointwise(op: OpOverload | OpOverloadPacket, *formulas: Formula | None) -> None:
    """``op`` acts on each element: a diagonal Jacobian, holomorphic where complex.

    One formula ``(g, out, *args)`` per tensor argument (``None``: no derivative), linear in ``g``:
    the cotangent from the output's cotangent and, the same thing, the output's tangent from the
    argument's tangent. Written without conjugates; the verb conjugates. No formula at all means
    zero derivative."""
    line = rule_of(op)
    op = overload(op)
    line.vmap = adapt(elementwise(op), 0)
    line.verbs.append("pointwise")
    if not any(formulas):
        line.nondiff = line.zero = True
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
            rule(t, out, *args)
            for rule, t in zip(rules, tangents, strict=False)
            if rule and t is not None
        )

    line.vjp, line.jvp = adapt(vjp, 2), adapt(jvp, 2)


def linear(
    op: OpOverload | OpOverloadPacket,
    *transposes: Formula | None,
    batch: Formula | None = None,
    jointly: bool = False,
) -> None:
    """``op`` is linear in each listed tensor argument (``None``: in that one it has no
    derivative).

    One transpose ``(g, *args)`` per tensor argument, written for the conjugate already where it
    matters (``g @ b.mH``). The tangent is the op on each tangent, summed; ``jointly`` says that
    the op is linear in all of them together (``scatter_add``, not ``mm``), and then it is the op
    on all tangents at once. ``batch`` is the vmap rule (see :func:`shifted`, :func:`elementwise`).
    """
    line = rule_of(op)
    op = overload(op)
    line.verbs.append("linear")
    where = tensor_args(op)
    rules = [adapt(t, 1) if t else None for t in transposes]

    def vjp(g: Tensor, out: Tensor, *args: Any, needs: tuple[bool, ...]) -> list[Tensor | None]:
        return [
            rule(g, *args) if rule and need else None
            for rule, need in zip(rules, needs, strict=False)
        ]

    def jvp(tangents: tuple[Tensor | None, ...], out: Tensor, *args: Any) -> Tensor | None:
        def on(i: int, t: Any) -> Tensor:
            if isinstance(
                t, list | tuple
            ):  # a list counts as one argument: absent tangents in it are zeros
                t = [
                    torch.zeros_like(x) if d is None else d
                    for d, x in zip(t, args[where[i]], strict=True)
                ]
            return call_op(op, [*args[: where[i]], t, *args[where[i] + 1 :]])

        return total(
            on(i, t)
            for i, (rule, t) in enumerate(zip(rules, tangents, strict=False))
            if rule and present(t)
        )

    def joint_jvp(tangents: tuple[Tensor | None, ...], out: Tensor, *args: Any) -> Tensor:
        full = list(args)
        for at, rule, t in zip(where, rules, tangents, strict=False):
            if rule:
                full[at] = torch.zeros_like(args[at]) if t is None else t
        return call_op(op, full)

    line.vjp, line.jvp = adapt(vjp, 2), adapt(joint_jvp if jointly else jvp, 2)
    if batch:
        line.vmap = adapt(batch, 0)


def nondiff(
    *ops: OpOverload | OpOverloadPacket,
    batch: Callable[[OpOverload], Formula] | None = None,
    zero: bool = False,
) -> None:
    """``ops`` have no derivative: integer-valued, comparisons, factories; or it is ``zero``, as
    that of a draw by its parameters. ``batch(op)`` makes the vmap rule."""
    for op in ops:
        line = rule_of(op)
        line.nondiff, line.zero = True, zero
        line.verbs.append("nondiff")
        if batch:
            line.vmap = adapt(batch(overload(op)), 0)


def zeros(g: Tensor, *_: Any) -> Tensor:
    """The formula of a derivative that is zero: no value of ``g`` counts, but where that is not
    there nothing is."""
    return aten.zero.default(g).detach()


def flat(*ops: OpOverload | OpOverloadPacket, by: tuple[int, ...] = (1,)) -> None:
    """``ops`` are piecewise constant in the arguments at the positions ``by``. Their rules have no
    derivative there, which keeps graphs short; autograd has zeros, and fills ``.grad`` with them.
    """
    for op in ops:
        line = rule_of(op)
        line.flat = by
        line.verbs.append("flat")


def decompose_as(op: OpOverload | OpOverloadPacket, body: Formula) -> None:
    """Where there is neither a rule nor a formula of PyTorch's, ``op`` is transformed as what
    ``body(*args)`` does."""
    DECOMPOSITIONS[overload(op)] = body
    rule_of(op).verbs.append("decompose_as")


# ----- what rules are made of --------------------------------------------------------------------


def call_op(op: OpOverload, args: Sequence[Any]) -> Any:
    """Call ``op`` with all its schema arguments given in order."""
    names = [a.name for a in op._schema.arguments if a.kwarg_only]
    split = len(args) - len(names)
    return op(*args[:split], **dict(zip(names, args[split:], strict=True)))


def present(t: Any) -> bool:
    """Whether a tangent is there: not ``None`` and not a list of nothing but ``None``."""
    return any(x is not None for x in t) if isinstance(t, list | tuple) else t is not None


def total(terms: Any) -> Tensor | None:
    """The sum of the terms, ``None`` of none."""
    result = None
    for term in terms:
        result = term if result is None else result + term
    return result


def broadcast_shapes(*shapes: Sequence[int]) -> torch.Size:
    """The shape that these broadcast to, which they do. (``torch.broadcast_shapes`` imports
    sympy.)"""
    sizes = zip_longest(*map(reversed, shapes), fillvalue=1)
    return torch.Size([next((n for n in along if n != 1), 1) for along in sizes][::-1])


def elementwise(op: OpOverload) -> Formula:
    """The vmap rule of an op that broadcasts its tensor arguments: align their ranks behind the
    batch, call the op."""
    where = tensor_args(op)

    def batch(*args: Any, batched: tuple[Any, ...]) -> Any:
        tensors = [args[i] for i in where]
        rank = max(
            x.dim() - b for x, b in zip(tensors, batched, strict=True) if isinstance(x, Tensor)
        )
        full = list(args)
        for i, x, b in zip(where, tensors, batched, strict=True):
            if b and x.dim() - 1 < rank:
                full[i] = x.reshape(x.shape[0], *[1] * (rank + 1 - x.dim()), *x.shape[1:])
        return call_op(op, full)

    return batch


def shifted(op: OpOverload | OpOverloadPacket, *names: str, first: str = "self") -> Formula:
    """The vmap rule of an op on one tensor argument whose ``names`` are dimensions: each is
    counted past the batch.

    A dimension that is ``None`` or an empty list stands for all of them and becomes all but the
    batch."""
    op = overload(op)
    schema = [a.name for a in op._schema.arguments]
    x_at, dims_at = schema.index(first), [schema.index(name) for name in names]

    def batch(*args: Any) -> Any:
        full = list(args)
        x = full[x_at]
        # PyTorch lets a 0-dim tensor have dimensions 0 and -1: give it one, and take it away again
        if x.dim() == 1:
            full[x_at] = x.unsqueeze(1)
        for at in dims_at:
            full[at] = past_batch(full[at], max(x.dim() - 1, 1))
        outs = call_op(op, full)
        if x.dim() > 1:
            return outs
        return (
            tuple(o.reshape(x.shape) for o in outs)
            if isinstance(outs, tuple)
            else outs.reshape(x.shape)
        )

    return batch


def past_batch(dim: Any, rank: int) -> Any:
    """Dimension(s) of an unbatched tensor of ``rank``, counted in the batched one (batch at 0)."""
    if isinstance(dim, int):
        return dim % rank + 1
    if not dim:
        return list(range(1, rank + 1))
    return [past_batch(d, rank) for d in dim]


def expand_lead(x: Tensor, batched: bool, size: Any) -> Tensor:
    """``x`` with the batch at 0, repeated over it if it had none."""
    return x if batched else x.expand(size, *x.shape)


def conj(x: Tensor) -> Tensor:
    """``x.conj()``, and nothing at all for a real ``x``."""
    return x.conj() if x.is_complex() else x


def named(*names: str) -> Any:
    """Overloads by name, those that this build of torch has."""
    found = []
    for name in names:
        packet, _, which = name.partition(".")
        if hasattr(aten, packet) and (which or "default") in getattr(aten, packet).overloads():
            found.append(getattr(getattr(aten, packet), which or "default"))
    return found
