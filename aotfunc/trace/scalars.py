"""Let Python numbers among the arguments of ops be inputs of a program: a number that changes from
call to call (a learning rate, a time step) then makes no new program.

A recording keeps a number as it keeps a value; the look-up of the program decides whether it is a
literal or an input. As an input it is a 0-dim float64 tensor on the CPU, as PyTorch makes of a
number before it computes. If such a tensor would decide the dtype of the result, and a number
would not, it is cast first, or stays a literal. Numbers that rewritings and kernels look at (0, 1,
2, 0.5 and their like) are always literals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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

#: a recording numbers its Python numbers FIRST, FIRST - 1, …: after all lifted tensors
FIRST = -(1 << 40)

#: ``(call, *arguments) -> result``: an op where a tensor stands for the number; ``call`` makes a
#: node or infers its signature
Form = Callable[..., Any]


def as_it_is(op: OpOverload) -> Form:
    return lambda call, *args: call(op, *args)


def scaled(op: OpOverload, **sign: int) -> Form:
    """Return the form of a sum. ``addcmul`` rounds once, as a sum with ``alpha`` does."""
    return lambda call, x, y, *alpha: (
        call(aten.addcmul.default, x, y, *alpha, **sign) if alpha else call(op, x, y)
    )


def first_scaled(op: OpOverload) -> Form:
    """Return the form of ``addcmul`` or ``addcdiv``."""
    return lambda call, x, y, z, value: call(op, x, call(aten.mul.Tensor, y, value), z)


#: op -> its form with the number as an input
FORMS: dict[OpOverload, Form] = {
    aten.add.Tensor: scaled(aten.add.Tensor),
    aten.sub.Tensor: scaled(aten.sub.Tensor, value=-1),
    aten.mul.Tensor: as_it_is(aten.mul.Tensor),
    aten.div.Tensor: as_it_is(aten.div.Tensor),
    **{
        getattr(aten, name).Scalar: as_it_is(getattr(aten, name).Tensor)
        for name in ("lt", "le", "gt", "ge", "eq", "ne", "remainder", "fmod", "lerp")
    },
    aten.rsub.Scalar: lambda call, x, n: call(aten.sub.Tensor, n, x),
    aten.rsub.Tensor: lambda call, x, y, n: call(aten.addcmul.default, y, x, n, value=-1),
    aten.pow.Scalar: as_it_is(aten.pow.Tensor_Tensor),
    aten.addcmul.default: first_scaled(aten.addcmul.default),
    aten.addcdiv.default: first_scaled(aten.addcdiv.default),
}
#: the same ops in place
IN_PLACE = (
    *(getattr(aten, name).Tensor for name in ("add_", "sub_", "mul_", "div_")),
    *(aten.lerp_.Scalar, aten.addcmul_.default, aten.addcdiv_.default),
)

#: the functions behind all of these ops, which hash in C
TAKES_NUMBER = frozenset([op._op for op in (*FORMS, *IN_PLACE)])


def generic(x: float) -> bool:
    """Return whether no rewriting, kernel or dtype check depends on which number ``x`` is."""
    if x.__class__ is int:
        return 3 < abs(x) < 1 << 53
    return abs(x) <= LARGEST and not (abs(x) <= 3 and (2 * x).is_integer())


def bits_of(numbers: Iterable[float]) -> tuple:
    """Return a key that equal numbers share; zeros and NaN are not generic."""
    return tuple([(x.__class__, x) for x in numbers])


#: the largest number that each of WIDE holds
LARGEST = torch.finfo(torch.float32).max
WIDE = (torch.float32, torch.float64, torch.complex64, torch.complex128)
#: (dtype, device) of tensors that a number and a 0-dim tensor scale to the same bits
SCALED = {(dtype, "cpu") for dtype in WIDE}


def beside_tensors(args: tuple, kwargs: dict | None) -> bool:
    """Return whether one of an op's arguments is a number, and the others are tensors."""
    given = (*args, *kwargs.values()) if kwargs else args
    return sum([not isinstance(a, Tensor) for a in given]) == 1 < len(given)


def may_be_input(a: Any, args: tuple, kwargs: dict | None) -> bool:
    """Return whether ``a``, one of these arguments, may be an input of the program."""
    cls = a.__class__
    return (cls is float or cls is int) and generic(a) and beside_tensors(args, kwargs)


def with_number(
    key: tuple, op: OpOverload, args: tuple, kwargs: dict, sigs: tuple[Sig, ...]
) -> Instr:
    """Return the instruction for a call with a number among its arguments. The tensors are slots;
    NUMBER stands for the number's signature."""
    outs = infer(op, args, kwargs, tuple([s for s in sigs if s is not NUMBER]))
    slots = tuple([Slot(i) for i in range(len(sigs))])
    named = dict(zip(kwargs, slots[len(args) :], strict=True))
    instr = intern(key, op, slots[: len(args)], named, sigs, outs)
    instr.number = dtype_of_number(op, sigs, outs)
    return instr


def dtype_of_number(op: OpOverload, sigs: tuple, outs: Any) -> torch.dtype | None:
    """Return the dtype of a number as a tensor, by the results ``outs``, or None."""
    tensors = [s for s in sigs if s is not NUMBER]
    if outs.__class__ is not Sig or not any(s.differentiable for s in tensors):
        return None
    kinds = {(s.dtype, s.device.type) for s in tensors}
    if len(tensors) > 1 and (len(kinds) > 1 or not kinds.issubset(SCALED)):
        return None
    plain = twin_of(op) or op
    for dtype in (torch.float64, torch.float32):
        number = make_sig((), (), dtype, NUMBER.device)
        try:
            found = FORMS[plain](inferred, *[number if s is NUMBER else s for s in sigs])
        except RuntimeError:
            continue
        if found is outs or (plain is not op and found.dtype is outs.dtype):
            return dtype
    return None


def inferred(op: OpOverload, *sigs: Sig, **kwargs: Any) -> Any:
    """Return the signature of the result."""
    return infer(op, tuple([Slot(i) for i in range(len(sigs))]), kwargs, sigs)
