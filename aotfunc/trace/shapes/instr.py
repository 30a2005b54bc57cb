"""Instructions: an op together with its literals, the signatures of its tensors and of its
results.

An :class:`Instr` is interned, so that a recorded program is keyed by the identities of its
instructions. Keys hold ``(type, value)`` for literals and floats by their bits, since ``1 == 1.0
== True`` and ``-0.0 == 0.0`` in Python."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from ...cache import Cache
from ...errors import CaptureError
from .infer import _deterministic, infer
from .sig import Facts, Sig, moved_by

aten = torch.ops.aten


class Instr:
    """An op with its literals, argument signatures and result signatures, interned.

    ``anywhere`` is the Instr of the same call with every tensor at the beginning of its storage,
    if that changes only the signatures; ``number`` is the dtype in which a Python number among its
    arguments may be a tensor; ``simple`` says that it makes one new tensor and has no other
    effect; ``size`` is the number of elements of the largest argument."""

    runs = True  # see capture.calls.Step
    __slots__ = (
        *("op", "args", "kwargs", "sigs", "outs", "facts", "anywhere"),
        *("number", "made", "written", "simple", "size"),
    )

    def __init__(
        self,
        op: OpOverload,
        args: tuple,
        kwargs: dict,
        sigs: tuple,
        outs: Any,
        anywhere: Instr | None = None,
    ) -> None:
        self.op, self.args, self.kwargs, self.sigs, self.outs = op, args, kwargs, sigs, outs
        self.facts = facts = Facts(op)
        self.anywhere = anywhere
        self.number: torch.dtype | None = None
        self.made: list[Sig] | None = None  # see records.result_sigs
        self.written: list[int] | None = None  # see records.written_slots
        self.simple = outs.__class__ is Sig and bool(
            sigs and facts.pure and not (facts.random or facts.factory)
        )

        self.size = max([s.numel for s in sigs], default=0)

    def __repr__(self) -> str:
        return f"{self.op}{self.args}"


_memo = Cache(1 << 15)
#: the instruction for a key, or None
interned = _memo.get

SIMPLE = frozenset(
    {int, bool, str, type(None), type(...)}
    | {torch.dtype, torch.device, torch.layout, torch.memory_format}
)


_INTS = frozenset({int})


def env_key() -> tuple:
    """Return the global settings that inference depends on."""
    return (torch.get_default_dtype(), _deterministic())


def encode(a: Any, key: list, sink: Any) -> Any:
    """Append ``a`` to the key, each tensor as ``sink(tensor) -> Sig``. Return the template."""
    cls = a.__class__
    if cls in SIMPLE:
        key += (cls, a)
        return a
    if cls is float:
        key.append(a.hex())
        return a
    if cls is complex:
        key += (cls, a.real.hex(), a.imag.hex())
        return a
    if cls is Node or isinstance(a, Tensor):
        slot, sig = sink(a)
        key.append(sig)
        return slot
    if isinstance(a, list | tuple):
        if a and _INTS.issuperset(map(type, a)):
            key.append(list)  # what follows them in a key is no int
            key += a
            return list(a) if cls is not tuple else a
        key.append("[")
        result = [encode(x, key, sink) for x in a]
        key.append("]")
        return result if cls is not tuple else tuple(result)
    if isinstance(a, torch.Generator):
        key += (cls, id(a))
        return a
    if isinstance(a, float | int | str):  # numpy scalars, enums
        key += (cls, repr(a))
        return a
    if isinstance(a, torch.SymInt | torch.SymFloat | torch.SymBool):
        raise CaptureError(f"symbolic sizes are not captured yet: got {a}")
    key += (cls, id(a))
    return a


def intern(
    key: tuple, op: OpOverload, args: tuple, kwargs: dict, sigs: tuple, outs: Any = None
) -> Instr:
    """Return the instruction for this key; infer a new one's outputs unless given."""
    facts, anywhere = Facts(op), None
    if any(s.offset for s in sigs) and not facts.strided and not facts.writes:
        there = tuple([k.start if k.__class__ is Sig else k for k in key])
        anywhere = interned(there) or intern(
            there, op, args, kwargs, tuple([s.start for s in sigs]), outs
        )
        outs = outs if facts.view_of is None else moved_by(anywhere.outs, sigs[0].offset)
    if outs is None:
        outs = infer(op, args, kwargs, sigs)
    instr = Instr(op, args, kwargs, sigs, outs, anywhere)
    _memo.put(key, instr)
    return instr
