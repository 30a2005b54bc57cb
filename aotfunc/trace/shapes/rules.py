"""Our shape rules for the common algebra, so that no meta kernel has to run.

PyTorch's Python-written meta kernels import torch._dynamo and sympy on first use, seconds in a
fresh process; a rule here is a few lines and imports nothing. A rule takes the op's arguments with
signatures in place of tensors and gives the kernel's exact answer. It declines (:class:`Unsure`)
if it is not sure, invalid arguments included; then a kernel decides, see :func:`.infer.by_kernel`.
Views and copies have no rules: their meta kernels are C++, exact and quick.

Pointwise ops need no rule each. The kernel itself, run on tensors without elements, tells their
result dtype; shape and strides follow TensorIterator's rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from .sig import Facts, Sig, contiguous_stride, fill, make_sig

aten = torch.ops.aten

#: op -> rule(*args, **kwargs): called with signatures for tensors, returns signatures (None where
#: there is no tensor)
RULES: dict[OpOverload, Callable] = {}


class Unsure(Exception):
    """Raised by a rule to leave this call to the meta kernel."""


def shape_rule(*ops: Any) -> Callable[[Callable], Callable]:
    """Register the function as the rule of these overloads; a packet means ``default``."""

    def register(f: Callable) -> Callable:
        for op in ops:
            RULES[op if isinstance(op, OpOverload) else op.default] = f
        return f

    return register


def by_rule(op: OpOverload, args: tuple, kwargs: dict, sigs: tuple) -> Any:
    """Return the result signatures of ``op`` by its rule, or NotImplemented."""
    known = shape_rule_for(op)
    if known is None:
        return NotImplemented
    if len(sigs) > 1 and any(s.device != sigs[0].device for s in sigs):
        return NotImplemented
    try:
        return known(*fill(args, sigs), **{k: fill(v, sigs) for k, v in kwargs.items()})
    except (Unsure, IndexError):
        return NotImplemented


def sure(condition: Any) -> None:
    """Decline unless ``condition`` holds."""
    if not condition:
        raise Unsure


# ----- signatures --------------------------------------------------------------------------------


def new(
    like: Sig, shape: Iterable[int], dtype: torch.dtype | None = None, stride: tuple | None = None
) -> Sig:
    """Return a new tensor of the device of ``like``, and its dtype, unless given."""
    shape = tuple(shape)
    sure(all(n >= 0 for n in shape))
    return make_sig(
        shape,
        contiguous_stride(shape) if stride is None else stride,
        dtype or like.dtype,
        like.device,
    )


def sure_in_order(*sigs: Sig | None) -> None:
    """Decline dimensions out of natural order: contiguous, or expanded or sliced."""
    sure(all(s is None or ordinary(s) for s in sigs))


def axis(dim: int, ndim: int) -> int:
    """Return the dimension counted from the front. Raises IndexError for none."""
    if not -max(ndim, 1) <= dim < max(ndim, 1):
        raise IndexError
    return dim % max(ndim, 1)


def broadcast_shape(*shapes: Sequence[int]) -> tuple[int, ...]:
    """Return the broadcast shape."""
    result = [1] * max(map(len, shapes), default=0)
    for shape in shapes:
        for i in range(1, len(shape) + 1):
            n = shape[-i]
            if n != 1:
                sure(result[-i] in (1, n))
                result[-i] = n
    return tuple(result)


def ordered_strides(shape: tuple, order: Sequence[int]) -> tuple:
    """Return dense strides with the dimensions in this order in memory, outermost first."""
    strides, step = [0] * len(shape), 1
    for d in reversed(order):
        strides[d] = step
        step *= max(shape[d], 1)
    return tuple(strides)


CHANNELS_LAST = {torch.channels_last: (0, 2, 3, 1), torch.channels_last_3d: (0, 2, 3, 4, 1)}


def formatted(shape: tuple, memory_format: torch.memory_format) -> tuple:
    """Return the strides of a tensor in this memory format."""
    if memory_format is torch.contiguous_format:
        return contiguous_stride(shape)
    order = CHANNELS_LAST[memory_format]
    sure(len(order) == len(shape))
    return ordered_strides(shape, order)


def in_order(sig: Sig, order: Sequence[int]) -> bool:
    """Return whether the elements lie densely, with the dimensions in this order (strides of
    dimensions of size 1 do not count)."""
    step = 1
    for d in reversed(order):
        n = sig.shape[d]
        if n != 1:
            if sig.stride[d] != step:
                return False
            step *= n
    return True


def result_strides(shape: tuple, operands: Sequence[Sig]) -> tuple:
    """Return the strides of a pointwise result: dense, the dimensions in the operands' common
    order (TensorIterator's rule).

    Declines where kernels differ: no elements, and unusual layouts together with dimensions of
    size 1, overlap or broadcasting."""
    standard = contiguous_stride(shape)
    sure(0 not in shape)
    if all(s.stride == standard or natural(s) for s in operands):
        return standard
    operands = [s for s in operands if s.shape]
    contiguous, last = range(len(shape)), CHANNELS_LAST[torch.channels_last]
    if all(s.shape == shape for s in operands):
        fits = all(in_order(s, contiguous) for s in operands)
        if fits != (len(shape) == 4 and all(in_order(s, last) for s in operands)):
            stride = standard if fits else ordered_strides(shape, last)
            sure(all(n > 1 for n in shape) or all(s.stride == stride for s in operands))
            return stride
    sure(all(n > 1 for n in shape) and operands[0].shape == shape)
    sure(
        all(
            (s.shape == shape and 0 not in s.stride) or s.stride == contiguous_stride(s.shape)
            for s in operands
        )
    )
    return ordered_strides(shape, memory_order(shape, operands))


def ordinary(sig: Sig) -> bool:
    """Return whether dimensions, those of size 1 too, lie in natural order."""
    return sig.stride == contiguous_stride(sig.shape) or (1 not in sig.shape and natural(sig))


def natural(sig: Sig) -> bool:
    """Return whether the dimensions lie in memory in their own order, expanded ones ignored."""
    step, size = math.inf, 0
    for n, s in zip(sig.shape, sig.stride, strict=True):
        if s:
            if s > step or (s == step and n > size):
                return False
            step, size = s, n
    return True


def memory_order(shape: tuple, operands: Sequence[Sig]) -> list[int]:
    """Return the dimensions from outermost to innermost, by the operands' strides; broadcast
    dimensions do not count.

    This is an insertion sort, because the comparison may be undecided: earlier operands decide
    first, equal strides go by size."""
    ndim = len(shape)
    strides = []
    for s in operands:
        lead = ndim - s.ndim
        moved = zip(s.shape, s.stride, shape[lead:], strict=True)
        strides.append([0] * lead + [0 if n == 1 and m != 1 else step for n, step, m in moved])

    def compare(a: int, b: int) -> int:
        """Return 1 if dimension ``a`` is the outer one, -1 if inner, 0 if undecided."""
        for stride in strides:
            sa, sb = stride[a], stride[b]
            if sa and sb:
                if sa != sb:
                    return 1 if sa > sb else -1
                if shape[a] > shape[b]:
                    return 1
        return 0

    order = list(reversed(range(ndim)))  # innermost first
    for i in range(1, ndim):
        here = i
        for there in reversed(range(i)):
            says = compare(order[there], order[here])
            if says > 0:
                order[there], order[here] = order[here], order[there]
                here = there
            elif says < 0:
                break
    return order[::-1]


# ----- pointwise ops -----------------------------------------------------------------------------

#: pointwise ops without the tag
UNTAGGED = frozenset(
    """
    elu_backward hardtanh_backward leaky_relu_backward hardsigmoid_backward hardswish_backward
    softplus_backward softshrink_backward hardshrink_backward mish_backward hardswish complex polar
    rsub
    """.split()
)
#: pointwise ops that meta composes of others; their strides follow the rule only if all operands
#: are in natural order
COMPOSED = frozenset(
    """
    masked_fill mvlgamma div.Tensor_mode floor_divide rsub copysign xlogy special_xlog1py
    logical_and logical_or logical_xor pow.Scalar angle abs frexp nan_to_num rad2deg deg2rad
    threshold_backward hardswish_backward leaky_relu_backward logit_backward hardtanh_backward
    """.split()
)
#: tagged ops that the rule does not cover
LEFT_OUT = "clone ldexp select_scatter slice_scatter diagonal_scatter as_strided_scatter".split()


@cache
def shape_rule_for(op: OpOverload) -> Callable | None:
    """Return the op's own rule, its functional twin's, or that of pointwise ops."""
    # their rules register themselves
    from . import algebra, factories, indexing, nn, windows  # noqa: F401

    if op in RULES:
        return RULES[op]
    facts = Facts(op)
    name = op._schema.name.removeprefix("aten::")
    if op.namespace != "aten" or facts.random or name in LEFT_OUT:
        return None
    if facts.writes == (0,) and facts.same == (0,) and name.endswith("_"):
        twin = getattr(getattr(aten, name[:-1], None), op._overloadname, None)
        functional = (
            shape_rule_for(twin) if twin is not None and takes(twin) == takes(op) else None
        )
        return partial(in_place, functional) if functional is not None else None
    tagged = torch.Tag.pointwise in op.tags or name in UNTAGGED
    return (
        partial(pointwise_shape, op) if tagged and facts.pure and facts.returns_tensors else None
    )


def takes(op: OpOverload) -> list[str]:
    """Return the types of the overload's arguments: they distinguish the twin of ``pow_.Scalar``,
    ``pow.Tensor_Scalar``, from ``pow.Scalar``."""
    return [str(a.type) for a in op._schema.arguments]


def in_place(functional: Callable, x: Sig, *args: Any, **kwargs: Any) -> Sig:
    """Return the signature of ``x`` after a write of the functional op's result. Raises eager's
    RuntimeError for a result that the dtype of ``x`` does not hold; meta kernels take it."""
    out = functional(x, *args, **kwargs)
    if not torch.can_cast(out.dtype, x.dtype):
        raise RuntimeError(f"the result of {out.dtype} cannot be written to a {x.dtype}")
    sure(out.shape == x.shape and 0 not in x.stride)
    return x


@cache
def probe(dtype: torch.dtype, dimensions: bool) -> Tensor:
    """Return a tensor without elements, or a number, to ask a kernel for its dtype."""
    with torch._C._DisableTorchDispatch(), torch._C._DisableFuncTorch():  # wrapped by no mode
        return (
            torch.empty(0, dtype=dtype, device="cpu")
            if dimensions
            else torch.ones((), dtype=dtype, device="cpu")
        )


def pointwise_shape(op: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Return the result signatures of a pointwise op, by the rule for all of them."""
    operands = [a for a in (*args, *kwargs.values()) if a.__class__ is Sig]
    sure(operands and not any(isinstance(a, list | tuple) for a in args))
    outs = results_of_probes(op, args, kwargs)
    shape = operands[0].shape
    if any(s.shape != shape for s in operands):
        shape = broadcast_shape(*[s.shape for s in operands])
    name = op._schema.name.removeprefix("aten::")
    composed = name in COMPOSED or f"{name}.{op._overloadname}" in COMPOSED
    sure(not composed or all(ordinary(s) for s in operands))
    sure("backward" not in name or all(s.dtype is operands[0].dtype for s in operands))
    stride = result_strides(shape, operands)
    if outs.__class__ is Tensor:
        return new(operands[0], shape, outs.dtype, stride)
    return tuple([new(operands[0], shape, o.dtype, stride) for o in outs])


def results_of_probes(op: OpOverload, args: tuple, kwargs: dict) -> Any:
    """Run a pointwise op on probes and return the results or the kernel's error. It refuses
    numbers, as ``alpha=True``, that meta kernels and other backends' kernels take."""

    def asking(a: Any) -> Any:
        return probe(a.dtype, bool(a.shape)) if a.__class__ is Sig else a

    with torch._C._DisableTorchDispatch(), torch._C._DisableAutocast():
        try:
            return op(*map(asking, args), **{k: asking(v) for k, v in kwargs.items()})
        except NotImplementedError:  # no CPU kernel has this dtype
            raise Unsure from None
