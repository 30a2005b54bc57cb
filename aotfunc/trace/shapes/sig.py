"""Signatures, which describe a tensor without its values, and the facts of an op's schema.

A tensor's signature (:class:`Sig`) is interned, so that signatures compare and hash by identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from ...cache import Cache
from ...errors import CaptureError

aten = torch.ops.aten


def reach(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Return how many elements of memory lie from the first one of a tensor to behind its last.

    >>> reach((2, 3), (10, 2)), reach((2, 0), (10, 2))
    (15, 0)
    """
    last = 0
    for n, s in zip(shape, stride, strict=True):
        if not n:
            return 0
        last += (n - 1) * s
    return last + 1


class Sig:
    """A tensor's shape, stride, dtype, device and offset; interned, so ``is`` compares."""

    __slots__ = ("device", "dtype", "form", "offset", "plain", "proto", "shape", "stride")

    def __init__(
        self, shape: tuple, stride: tuple, dtype: torch.dtype, device: torch.device, offset: int
    ) -> None:
        self.shape, self.stride, self.offset = shape, stride, offset
        self.dtype, self.device = dtype, device
        self.plain = offset == 0 and stride == contiguous_stride(shape)
        #: a tensor without data is made with these, after its class
        laid = (None, None) if self.plain else (stride, offset)
        self.form = (shape, *laid, None, dtype, torch.strided, device)
        with torch._C._DisableTorchDispatch():
            self.proto = self.fresh()

    def fresh(self) -> Tensor:
        """Return a new meta tensor with this signature."""
        if not self.offset:
            return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        return torch.empty(self.extent, dtype=self.dtype, device="meta").as_strided(
            self.shape, self.stride, self.offset
        )

    @property
    def extent(self) -> int:
        """Return how many elements the storage has up to the tensor's end."""
        return self.offset + reach(self.shape, self.stride)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def numel(self) -> int:
        return self.proto.numel()

    @property
    def start(self) -> Sig:
        """Return the same signature at storage offset 0."""
        return self.moved(-self.offset)

    def moved(self, by: int) -> Sig:
        """Return the same signature, ``by`` elements further on in the storage."""
        return (
            make_sig(self.shape, self.stride, self.dtype, self.device, self.offset + by)
            if by
            else self
        )

    @property
    def differentiable(self) -> bool:
        return self.dtype.is_floating_point or self.dtype.is_complex

    def __repr__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


def contiguous_stride(shape: tuple) -> tuple:
    """Return strides of a contiguous tensor of this shape."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


#: bounded: after one was forgotten, two equal signatures may differ; caches and rewritings then
#: miss
_sigs = Cache(1 << 14)


def make_sig(
    shape: Any, stride: Any, dtype: torch.dtype, device: torch.device, offset: int = 0
) -> Sig:
    """Return the one signature with these values."""
    key = (shape, stride, dtype, device, offset)
    sig = _sigs.get(key)
    if sig is None:
        sig = Sig(tuple(shape), tuple(stride), dtype, device, offset)
        _sigs.put(key, sig)
    return sig


def sig_of(t: Tensor, device: torch.device | None = None) -> Sig:
    """Return a tensor's signature; a meta tensor may stand for one of ``device``."""
    if t.layout is not torch.strided or t.is_quantized:
        raise CaptureError(
            f"only dense tensors can be captured, not one with layout {t.layout} and dtype "
            f"{t.dtype}"
        )
    key = t.shape, t.stride(), t.dtype, device or t.device, t.storage_offset()
    try:
        return _sigs[key] or make_sig(*key)
    except TypeError as e:  # a SymInt has no hash
        raise CaptureError(
            f"only tensors of known sizes can be captured, not one of shape {[*t.shape]}; give "
            "torch.export, or make_fx, static shapes"
        ) from e


def floating(x: Any) -> bool:
    """Return whether ``x`` is a tensor of floating or complex numbers."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


class Slot(int):
    """The position of the i-th tensor in an instruction's argument template."""

    def __repr__(self) -> str:
        return f"%{int(self)}"


UNTRACKED = frozenset(
    f"aten::{name}"
    for name in ("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like")
    + ("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided", "histc", "detach")
)


@cache
class Facts:
    """An overload's schema and tags: what it writes, what its returns alias, draws."""

    def __init__(self, op: OpOverload) -> None:
        schema = op._schema
        arguments, returns = schema.arguments, schema.returns
        written = [
            i
            for i, a in enumerate(arguments)
            if a.alias_info is not None and a.alias_info.is_write
        ]
        self.writes = tuple(written)
        self.names = tuple(a.name for a in arguments)
        #: for each return, the argument that it *is* (written in place), or None
        self.same: tuple[int | None, ...] = tuple(
            next(
                (
                    i
                    for i in written
                    if arguments[i].alias_info.before_set == r.alias_info.before_set
                ),
                None,
            )
            if r.alias_info is not None and r.alias_info.is_write
            else None
            for r in returns
        )
        views = [
            r.alias_info for r in returns if r.alias_info is not None and not r.alias_info.is_write
        ]
        #: the argument that the returns are views of, or None
        self.view_of: int | None = None
        # aten.lift_fresh makes a new constant on every run
        if views and op is not aten.lift_fresh.default:
            shared = views[0].before_set
            self.view_of = next(
                (
                    i
                    for i, a in enumerate(arguments)
                    if a.alias_info is not None and a.alias_info.before_set & shared
                ),
                0,
            )
        tags = op.tags
        self.random = torch.Tag.nondeterministic_seeded in tags
        self.reshapes = torch.Tag.inplace_view in tags
        self.dynamic = (
            torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags
        )
        self.accumulates = op in (torch.ops.aten.add_.Tensor, torch.ops.aten.sub_.Tensor)
        #: its offset counts from the storage, not from its argument
        self.strided = "as_strided" in op._schema.name
        self.pure = not (self.writes or self.strided) and self.view_of is None
        #: a factory: its result may be told to require grad (`requires_grad=True`)
        self.factory = "pin_memory" in self.names or op is aten.lift_fresh.default
        #: autograd lets no floating result of it require grad
        self.untracked = schema.name in UNTRACKED
        self.returns_tensors = all("Tensor" in str(r.type) for r in returns)
        #: returns nothing
        self.silent = not returns
        self.effect = (not returns and not written) or op.namespace == "aotfunc_effect"


def moved_by(outs: Any, by: int) -> Any:
    """Return view signatures moved ``by`` elements further on."""
    return outs.moved(by) if outs.__class__ is Sig else tuple([moved_by(o, by) for o in outs])


def fill(template: Any, values: Any) -> Any:
    """Return the template with each slot replaced by its value."""
    cls = template.__class__
    if cls is Slot:
        return values[template]
    if cls is not list and cls is not tuple:
        return template
    filled = [values[x] if x.__class__ is Slot else fill(x, values) for x in template]
    return filled if cls is list else tuple(filled)
