"""Measure what computing a value again costs."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from ..trace.traced import quiet
from .cost import Roofline, moves, shape_of, strides_of
from .ops import once

#: nanoseconds for a byte of traffic, of what cannot be measured
_ESTIMATE = 0.1
#: bytes that are more than a core's own caches hold
_CACHES = 1 << 23


class Profiled:
    """Time in nanoseconds: each op is run on tensors like its own, once for equal ones, which are
    out of the core's caches by then, as in a backward that reads what the forward made.

    Ops that may run only once are not run here either; their time is estimated, as is that of ops
    that fail."""

    def __init__(self, repeat: int = 3) -> None:
        self.repeat = repeat
        self.known: dict[str, float] = {}

    def time(self, n: Node) -> float:
        if not moves(n):
            return 0.0
        facts = map_arg((n.args, n.kwargs), lambda i: Like(i.meta.get("val")))
        key = f"{n.target}{facts}"
        if key not in self.known:
            try:
                self.known[key] = self.measured(n)
            except Exception:
                self.known[key] = _ESTIMATE * Roofline(fused=1.0).time(n)
        return self.known[key]

    def measured(self, n: Node) -> float:
        if once(n):
            raise RuntimeError("may run only once")
        with quiet(), torch.no_grad():
            args, kwargs = map_arg((n.args, n.kwargs), lambda i: example(i.meta["val"]))
            least, other = float("inf"), torch.zeros(_CACHES, dtype=torch.uint8)
            for _ in range(1 + self.repeat):
                other.add_(1)
                start = time.perf_counter_ns()
                n.target(*args, **kwargs)  # type: ignore[operator]
                synchronize(args)
                least = min(least, time.perf_counter_ns() - start)
        return least


class Like:
    """A value as text, by which equal ones are known."""

    def __init__(self, val: Any) -> None:
        self.val = val

    def __repr__(self) -> str:
        vals = self.val if isinstance(self.val, tuple | list) else [self.val]
        return str(
            [f"{v.dtype}{shape_of(v)}{strides_of(v)}" if hasattr(v, "dtype") else v for v in vals]
        )


def example(val: Any) -> Any:
    """Make a value like this one, of random numbers; integers, perhaps indices, are 0."""
    if isinstance(val, tuple | list):
        return tuple(map(example, val))
    if not hasattr(val, "dtype"):
        return val
    shape, strides = shape_of(val), strides_of(val)
    made = torch.empty_strided(shape, strides, dtype=val.dtype, device=val.device)
    if not val.dtype.is_floating_point:
        return made.zero_()
    return made.copy_(
        torch.linspace(0.1, 0.9, max(made.numel(), 1))[: made.numel()].view(made.shape)
    )


def synchronize(args: Any) -> None:
    if any(isinstance(a, Tensor) and a.is_cuda for a in args):
        torch.cuda.synchronize()
