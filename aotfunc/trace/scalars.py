"""Python numbers among the arguments of ops that may be inputs of a program: a number that changes
from call to call (a learning rate, a time step) then makes no new program.

A number stands in a recording as a value does; whether it is a literal of the program or an input
of it is decided when the program is looked up. As an input it is a 0-dim float64 tensor on the
CPU, as PyTorch makes of a number before it computes. Where such a tensor would decide the dtype of
the result, and a number would not, it is cast first, or stays a literal. Numbers that
rewritings and kernels look at (0, 1, 2, 0.5 and their like) are always literals."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from .shapes.infer import infer
from .shapes.instr import Instr, intern
from .shapes.sig import Sig, Slot, make_sig
from .writes import twin_of

aten = torch.ops.aten

#: the stand-in for the signature of a number, and its signature as a tensor
NUMBER = Sig((), (), torch.float64, torch.device("cpu"), 0)
TENSOR = make_sig(NUMBER.shape, NUMBER.stride, NUMBER.dtype, NUMBER.device)

#: the first number of a recording has the reference FIRST, the next FIRST - 1: behind all lifted
#: tensors
FIRST = -(1 << 40)

#: ops whose number may be an input -> the op that takes a tensor in its place
FORMS: dict[OpOverload, OpOverload] = {
    **{op: op for name in ("add", "sub", "mul", "div") for op in (getattr(aten, name).Tensor,)},
    **{
        op: op for name in ("add_", "sub_", "mul_", "div_") for op in (getattr(aten, name).Tensor,)
    },
    **{
        getattr(aten, name).Scalar: getattr(aten, name).Tensor
        for name in ("lt", "le", "gt", "ge", "eq", "ne", "remainder", "fmod")
    },
    aten.rsub.Scalar: aten.rsub.Tensor,
    aten.pow.Scalar: aten.pow.Tensor_Tensor,
}


def generic(x: float) -> bool:
    """Return whether nothing depends on which number this is."""
    if x.__class__ is int:
        return 3 < abs(x) < 1 << 53
    return math.isfinite(x) and not (abs(x) <= 3 and (2 * x).is_integer())


def bits_of(numbers: Iterable[float]) -> tuple:
    """Return a key that equal numbers share; none is a zero or NaN, see generic."""
    return tuple([(x.__class__, x) for x in numbers])


def with_tensor(op: OpOverload, args: tuple) -> tuple[OpOverload, tuple]:
    """Return the call with a tensor in place of the number."""
    form = FORMS.get(op, op)
    return (aten.sub.Tensor, args[::-1]) if form is aten.rsub.Tensor else (form, args)


#: these ops by the functions that they call, which hash in C
TAKES_NUMBER = frozenset(op._op for op in FORMS)


def beside_tensor(args: tuple) -> bool:
    """Return whether a number among these arguments is one of two, and the other is a tensor."""
    return len(args) == 2 and (isinstance(args[0], Tensor) or isinstance(args[1], Tensor))


def with_number(key: tuple, op: OpOverload, args: tuple, sigs: tuple) -> Instr:
    """Return the instruction for a call with a number among its arguments; NUMBER stands for the
    number's signature."""
    tensors = tuple([s for s in sigs if s is not NUMBER])
    outs = infer(op, tuple([Slot(0) if isinstance(a, Tensor) else a for a in args]), {}, tensors)
    instr = intern(key, op, (Slot(0), Slot(1)), {}, sigs, outs)
    instr.number = dtype_of_number(op, sigs, outs)
    return instr


def dtype_of_number(op: OpOverload, sigs: tuple, outs: Any) -> torch.dtype | None:
    """Return the dtype with which the number may be a tensor; None where it may not. ``outs``:
    what the op returns."""
    if outs.__class__ is not Sig or not any(s.differentiable for s in sigs if s is not NUMBER):
        return None
    plain = twin_of(op) or op
    target, args = with_tensor(plain, (Slot(0), Slot(1)))
    for dtype in (torch.float64, torch.float32):
        number = make_sig((), (), dtype, NUMBER.device)
        try:
            found = infer(target, args, {}, tuple([number if s is NUMBER else s for s in sigs]))
        except RuntimeError:
            continue
        if found is outs or (plain is not op and found.dtype is outs.dtype):
            return dtype
    return None
