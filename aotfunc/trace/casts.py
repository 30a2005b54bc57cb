"""Keep autocast's cache for a recording: PyTorch's own would hand out traced values after it.

A leaf that requires grad, as a weight does, is cast once for all its uses, also in nested compiled
functions; the gradients of these are added in the narrow dtype. Any other tensor is cast anew for
each use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .shapes.instr import env_key, intern, interned
from .shapes.sig import Slot
from .traced import current, under_way

if TYPE_CHECKING:
    from .tracer import Trace

aten = torch.ops.aten
#: PyTorch's own
cache_enabled, enable_cache = torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled
clear_cache = torch.clear_autocast_cache


def record_cast(
    trace: Trace, x: Tensor | complex, *, dtype: torch.dtype | None = None, **kwargs: Any
) -> Any:
    """Record ``_to_copy``. Autocast's cast of a leaf is kept, and found again for later uses.
    torch.func.vmap casts the Python number that an op on scalars is given beside them."""
    if not isinstance(x, Tensor):
        with trace:
            return torch.full((), x, dtype=dtype)
    if (
        dtype is None
        or kwargs
        or x.dtype is not torch.float32
        or not (trace.caches_casts and nesting())
    ):
        return NotImplemented
    if dtype is not torch.get_autocast_dtype(x.device.type) or not (x.requires_grad and x.is_leaf):
        return NotImplemented
    if not torch.is_grad_enabled():
        return NotImplemented
    return kept(trace, x, dtype)


def kept(trace: Trace, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the cast of a leaf that all its uses share."""
    ref, sig = trace.ref_of(x)
    made = trace.casts.get((ref, dtype))
    if made is None:
        key = (aten._to_copy.default, sig, dtype, env_key())
        instr = interned(key) or intern(
            key, aten._to_copy.default, (Slot(0),), {"dtype": dtype}, (sig,)
        )
        made = trace.note(instr, (ref,))
        trace.casts = trace.casts or {}
        trace.casts[ref, dtype] = made
    return made


def nesting() -> int:
    """Return how many autocast contexts have been entered."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


# ----- what autocast's contexts call -------------------------------------------------------------


def is_enabled() -> bool:
    trace = current()
    return cache_enabled() if trace is None else trace.caches_casts


def set_enabled(enabled: bool) -> None:
    if (trace := current()) is None:
        enable_cache(enabled)
    else:
        trace.caches_casts = enabled


def clear() -> None:
    for trace in under_way.traces:
        trace.casts = {}
    clear_cache()


CONTEXTS = {
    (torch, "is_autocast_cache_enabled"): is_enabled,
    (torch, "set_autocast_cache_enabled"): set_enabled,
    (torch, "clear_autocast_cache"): clear,
}
