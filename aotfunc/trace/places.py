"""Read and write parts of a tensor at places that only a 0-dim integer tensor knows: ``x[i]``,
``x[i] = v``, ``narrow``, ``select``.

PyTorch would ask for the number. If it is not known, or would be frozen (a tensor from outside, in
a function compiled once), the part is recorded as a view all the same:
:data:`~aotfunc.trace.views.narrow_at`.
"""

from __future__ import annotations

import dis
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from .caught import raise_if_caught
from .shapes.infer import TOLD, infer
from .shapes.instr import env_key, intern, interned
from .shapes.sig import Sig, Slot, make_sig
from .traced import Traced, current, under_way
from .views import narrow_at

aten = torch.ops.aten
_getitem, _setitem = Tensor.__getitem__, Tensor.__setitem__
_narrow, _select = Tensor.narrow, Tensor.select
_grad_enabled = torch.is_grad_enabled
_CONSTANTS = frozenset({int, bool, type(None), type(...)})


def is_integer(x: Tensor) -> bool:
    """Return whether PyTorch takes ``x`` for a number in an index (uint8 and bool are masks)."""
    return not (
        x.dim() or x.is_floating_point() or x.is_complex() or x.dtype in (torch.bool, torch.uint8)
    )


def is_place(x: Tensor) -> bool:
    """Return whether ``x`` is an integer whose number is not asked for."""
    if not is_integer(x):
        return False
    if x.__class__ is Traced:
        return True
    trace = current()
    return trace is not None and not trace.may_ask_constants and not under_way.quiet


def places_in(index: Any) -> list[int]:
    """Return the positions of such integers in an index of numbers and slices."""
    parts = index if isinstance(index, tuple) else (index,)
    tensors = [i for i, p in enumerate(parts) if isinstance(p, Tensor)]
    if not tensors:  # most have none
        return tensors
    found = [i for i in tensors if is_place(parts[i])]
    others = [p for i, p in enumerate(parts) if i not in found]
    return found if all(p is None or p is ... or type(p) in (int, slice) for p in others) else []


def select_traced(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """Return the view ``x.select(dim, index)``."""
    whole = torch.empty(()).expand(x.shape)
    raise_if_caught(lambda i: whole.select(dim, int(i)), [index])
    return narrow_traced(x, dim, index, 1).squeeze(dim)


def narrow_traced(x: Tensor, dim: int, start: Tensor, length: int) -> Tensor:
    """Return the view ``x.narrow(dim, start, length)``."""
    trace = current()
    if trace is None:  # a value leaked
        return _narrow(x, dim, start, length)
    size = x.shape[dim]
    start = torch.where(start < 0, start + size, start).to(x.device)
    (ref, sig), (at, at_sig) = trace.ref_of(x), trace.ref_of(start)
    key = (narrow_at, sig, dim, at_sig, length, env_key())
    instr = interned(key) or intern(
        key, narrow_at, (Slot(0), dim, Slot(1), length), {}, (sig, at_sig)
    )
    return trace.note(instr, (ref, at))


def as_copied(x: Sig, dim: int, start: Sig, length: int) -> Sig:
    """Return the copy that a graph makes in place of the view, with the view's strides."""
    where = make_sig((length,), (1,), torch.int64, x.device)
    return infer(aten.index_select.default, (Slot(0), dim, Slot(1)), {}, (x, where))


TOLD[narrow_at] = as_copied


def rest(x: Tensor, index: Any, places: list[int]) -> tuple[Tensor, list[Tensor | None]]:
    """Return the view of ``x`` by the other parts of an index, and the index into it."""
    parts = list(index) if isinstance(index, tuple) else [index]
    numbers = [parts[p] for p in places]
    for p in places:
        parts[p] = slice(None)
    shown = _getitem(x, tuple(parts))
    indices: list[Tensor | None] = [None] * shown.dim()
    for p, i in zip(places, numbers, strict=True):
        # the dimensions of that view
        kept = [q is None or isinstance(q, slice) for q in parts]
        indices[-sum(kept[p:]) if ... in parts[:p] else sum(kept[:p])] = i
    return shown, indices


def getitem(self: Tensor, index: Any) -> Tensor:
    """Return ``self[index]`` where the index may have traced integers."""
    places = places_in(index)
    if not places:
        part = _getitem(self, index)
        if part.__class__ is Traced and part.tracer is self.tracer:
            self.tracer.taken = (self.ref, self.sig, index, part.ref, part.sig, _grad_enabled())
        return part
    shown, indices = rest(self, index, places)
    for dim, i in reversed(list(enumerate(indices))):
        if i is not None:
            shown = select_traced(shown, dim, i)
    return shown


def setitem(self: Tensor, index: Any, value: Any) -> None:
    if value.__class__ is Traced and is_last_taken(self, index, value):
        return
    if places := places_in(index):
        shown, indices = rest(self, index, places)
        aten.index_put_.default(shown, indices, assigned(shown, value, shown.dim() - len(places)))
    elif index.__class__ is Traced and not index.sig.shape and index.sig.dtype is torch.bool:
        self.copy_(torch.where(index, assigned(self, value, self.dim()), self))
    else:
        _setitem(self, index, value)


def is_last_taken(x: Tensor, index: Any, value: Traced) -> bool:
    """Return whether ``value`` is the view ``x[index]`` that was taken last, as in ``x[i] += 1``,
    which assigns what it has written to already."""
    trace = value.tracer
    if trace.taken is None or x.__class__ is not Traced or x.tracer is not trace:
        return False
    ref, sig, taken, part, part_sig, grad = trace.taken
    if index is not taken or (x.ref, value.ref) != (ref, part):
        return False
    if x.sig is not sig or value.sig is not part_sig or not cannot_change(index):
        return False
    root, on = trace.root(ref), _grad_enabled()
    # a view taken under no_grad is a constant elsewhere, and eager refuses to write to a leaf
    differs = on and (not grad or root in trace.autograd.protected)
    return root == trace.root(part) and not differs


def cannot_change(index: Any) -> bool:
    """Return whether an index is made of numbers, not of objects that hold them, which may have
    changed since it was used."""
    parts = index if type(index) is tuple else (index,)
    held = [q for p in parts for q in ((p.start, p.stop, p.step) if type(p) is slice else (p,))]
    return _CONSTANTS.issuperset(map(type, held))


def assigned(x: Tensor, value: Any, rank: int) -> Tensor:
    """Return ``value`` as it is assigned to a part of ``x`` of this rank."""
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=x.dtype, device=x.device)
    while value.dim() > rank and value.shape[0] == 1:
        value = value.squeeze(0)
    return value.to(x.dtype)


def narrow(self: Tensor, dim: Any, start: Any, length: Any) -> Tensor:
    if isinstance(start, Tensor) and is_place(start):
        whole = torch.empty(()).expand(self.shape)
        raise_if_caught(lambda i: whole.narrow(dim, int(i), length), [start])
        return narrow_traced(self, range(self.dim())[dim], start, length)
    return _narrow(self, dim, start, length)


def select(self: Tensor, dim: Any, index: Any) -> Tensor:
    if isinstance(index, Tensor) and is_place(index):
        return select_traced(self, range(self.dim())[dim], index)
    return _select(self, dim, index)


#: methods for outside tensors, too (with a ``__getitem__`` of Python's they would be sequences for
#: ``torch.tensor``)
METHODS = {"narrow": narrow, "select": select}
for name, method in {"__getitem__": getitem, "__setitem__": setitem, **METHODS}.items():
    setattr(Traced, name, method)


def subscript(frame: FrameType) -> tuple[int, int] | None:
    """Return the ``x[...]`` that a frame executes. If the frame itself asks for a number, ``x`` is
    a tensor: other containers call ``__index__``, a function of ours."""
    code, at = frame.f_code.co_code, frame.f_lasti
    name = dis.opname[code[at]]
    yes = name in ("BINARY_SUBSCR", "STORE_SUBSCR") or (
        name == "BINARY_OP" and code[at + 1] == _SUBSCRIPT
    )
    return (id(frame), at) if yes else None


_SIGNS = [sign for _, sign in dis._nb_ops]  # type: ignore[attr-defined]
_SUBSCRIPT = _SIGNS.index("[]") if "[]" in _SIGNS else None
