"""Make the instruction for a call that recordings have not met before."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from ..cache import Cache
from ..debug import at, user_line
from ..errors import CaptureError, OpError
from .kinds import of_nested
from .nested import leaves, map_nested
from .outside import ONCE
from .scalars import NUMBER, with_number
from .shapes.infer import infer, signatures
from .shapes.instr import Instr, intern, interned
from .shapes.sig import Facts, Sig, Slot, fill
from .traced import quiet

if TYPE_CHECKING:
    from .tracer import Trace

aten = torch.ops.aten

#: ops whose result's shape depends on the values of masks and of no other tensor
SHAPED_BY_MASKS = (aten.index.Tensor, aten._unsafe_index.Tensor, aten.masked_select.default)


def learn(
    trace: Trace, key: tuple, func: OpOverload, args: tuple, kwargs: dict, sigs: tuple
) -> Instr:
    """Return the instruction for a call, and remember it under its key."""
    if "nested" in func._schema.name:
        raise of_nested()
    if func._schema.name == "inductor::resize_storage_bytes_":  # its schema says nothing of this
        raise CaptureError(f"a storage is resized{at(user_line())}; {ONCE}")
    if func._schema.name == "_c10d_functional::_wrap_tensor_autograd":
        # eager waits when the tensor is first read; a graph waits where it is made
        func = torch.ops._c10d_functional.wait_tensor.default
    slots = itertools.count()

    def template(a: Any) -> Any:
        return Slot(next(slots)) if isinstance(a, Tensor) else a

    targs = tuple([map_nested(template, a) for a in args])
    tkwargs = {k: map_nested(template, v) for k, v in kwargs.items()}
    outs = None
    facts = Facts(func)
    if facts.dynamic or not facts.returns_tensors:
        outs = by_value(trace, key, func, targs, tkwargs, sigs, args, kwargs)
        key = (*key, outs)
        known = interned(key)
        if known is not None:
            return known
    try:
        if NUMBER in sigs:
            return with_number(key, func, targs, tkwargs, sigs)
        return intern(key, func, targs, tkwargs, sigs, outs)
    except CaptureError as e:
        raise CaptureError(f"{e}{at(user_line())}") from None
    except (RuntimeError, IndexError, TypeError, ValueError) as e:
        if facts.dynamic and outs is None:  # inference has found just now that it is
            return learn(trace, key, func, args, kwargs, sigs)
        said = f"{func}({', '.join(map(str, sigs))}): {e}{at(user_line())}"
        raise OpError.like(e, said) from None


#: calls whose result's shape no meta kernel tells
_by_values_alone = Cache(4096)


def by_value(
    trace: Trace,
    key: tuple,
    func: OpOverload,
    targs: Any,
    tkwargs: Any,
    sigs: tuple,
    args: tuple,
    kwargs: dict,
) -> Any:
    """Return the result's signature of an op whose shape depends on data: by the meta kernel if it
    tells one, else by a run on real values."""
    if _by_values_alone.get(key) is None:
        try:
            return infer(func, targs, tkwargs, sigs)
        except Exception:
            _by_values_alone.put(key, True)
    tensors = [t for t in leaves([*args, *kwargs.values()]) if isinstance(t, Tensor)]
    asked = shaping(func, sigs)

    def shape(*values: Tensor) -> Any:
        known = dict(zip(asked, values, strict=True))
        every = [known[i] if i in known else zeros_of(sig) for i, sig in enumerate(sigs)]
        return signatures(
            func(*fill(targs, every), **{k: fill(v, every) for k, v in tkwargs.items()})
        )

    what = f"the shape of {func}'s result" if Facts(func).returns_tensors else "a truth value"
    return trace.answer(shape, [tensors[i] for i in asked], what)


def shaping(func: OpOverload, sigs: Sequence[Any]) -> list[int]:
    """Return which tensors among an op's arguments decide its result's shape by value."""
    if func not in SHAPED_BY_MASKS or 0 in sigs[0].shape:
        return list(range(len(sigs)))
    return [i for i, s in enumerate(sigs) if i and s.dtype in (torch.bool, torch.uint8)]


def follows_default(instr: Instr, kwargs: dict) -> bool:
    """Return whether the result has the default dtype, as of factories, or of integers."""
    outs = instr.outs
    made = (
        outs.__class__ is Sig
        and outs.differentiable
        and not any(s.differentiable for s in instr.sigs)
    )
    return made and kwargs.get("dtype") is None


def zeros_of(sig: Sig) -> Tensor:
    """Return a tensor of this signature, one zero everywhere."""
    with quiet():
        return torch.zeros((), dtype=sig.dtype, device=sig.device).expand(sig.shape)
