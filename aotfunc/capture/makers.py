"""Which op makes a value, by its name: rewriting may put another op there than eager has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch._ops import OpOverload
from torch.fx import Node

from ..graph import Program, op_of

#: the name of what is no op: an autograd.Function, a hook
FUNCTION = "autograd.Function"
#: the name for a result that no derivative reads in eager mode: a gradient, a tangent
UNREAD = "derivative"


def op_name(target: Any) -> str:
    """Return the name of an op, in place or not."""
    return target._schema.name.rstrip("_") if isinstance(target, OpOverload) else FUNCTION


def maker(out: Any) -> str:
    """Return the op that makes an output of a program, by name, also inside a call."""
    if not isinstance(out, Node):
        return ""
    target = op_of(out).target
    known = dict(enumerate(getattr(target, "made", ())))
    return known.get(out.args[1], FUNCTION) if known else op_name(target)  # type: ignore


def made_in(program: Program) -> tuple[str, ...]:
    """Return the op that made each result in eager mode, by name; some programs know theirs."""
    return program.once("made", lambda: tuple(map(maker, program.outputs)))


def with_makers(program: Program, names: Sequence[str], unread: Iterable[int] = ()) -> Program:
    """Return the program, which knows now that these ops make its first results in eager mode, and
    that none reads the ``unread`` ones."""
    rest = map(maker, program.outputs[len(names) :])
    program.cache["made"] = (*names, *rest)
    program.cache["unread"] = frozenset(unread)
    return program


def twins_in(program: Program) -> list[int]:
    """Return those of the results that no op reads in eager mode which are computed once with
    equal values here."""
    outs = program.outputs
    nodes = [(k, o) for k in unread_in(program) if isinstance(o := outs[k], Node)]
    return [k for k, o in nodes if len(o.users) > 1 or outs.count(o) > 1]


def unread_in(program: Program) -> frozenset[int]:
    """Return the places of the results that no op reads in eager mode, if that is known."""
    return program.cache.get("unread", frozenset())


def of_derivatives(program: Program) -> Program:
    """Return the program, which knows now that nothing is computed from its results."""
    return with_makers(program, [UNREAD] * program.n_outputs)


def as_makers(base: Program, new: Program) -> Program:
    """Return a program with the results of ``base``, which knows of them what ``base`` does."""
    return with_makers(new, still_made(base, new, made_in(base)), unread_in(base))


def still_made(base: Program, new: Program, made: Sequence[str]) -> list[str]:
    """Return the ops that ``made`` the results of ``base``, for a program that is made of it."""
    each = zip(base.outputs, map(uncopied, base.outputs, new.outputs), made, strict=False)
    return [maker(y) if maker(x) == name else name for x, y, name in each]


def uncopied(old: Any, new: Any) -> Any:
    """Return what a result copies that was none of a copy before."""
    copy = "aten::clone"
    return new.args[0] if maker(new) == copy != maker(old) else new
