"""Accumulate reductions and scans in C++: the start, one step, and the result."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from .arguments import VECTORS
from .ir import Const, Expr, Kernel, Prefix, Reduce
from .values import NUMBERS, KernelText

#: START: reduction -> its start; STEP: reduction -> the function of a step, if another
START = {
    **{"sum": 0, "prod": 1, "max": -math.inf, "min": math.inf, "any": False, "all": True},
    "logsumexp": -math.inf,
}
STEP = {
    "prod": "mul",
    "max": "maximum",
    "min": "minimum",
    "any": "bitwise_or",
    "all": "bitwise_and",
}

#: scan -> the function that it applies
NEXT = {
    "sum": "aot_plus",
    "prod": "aot_times",
    "max": "aot_greatest",
    "min": "aot_smallest",
    "logsumexp": "aot_log_of_sum",
}


class Accumulators(KernelText):
    """The C++ of a kernel's reductions and scans."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        #: whether the vector axis is one of the outer ones
        self.columns = 0 <= self.vector < kernel.outer
        #: scan -> the name of its accumulator
        self.scans: dict[Expr, str] = {}

    @property
    def across(self) -> bool:
        """Return whether the lanes of an accumulator are one value."""
        return self.vectors and not self.columns

    def is_long(self, e: Reduce) -> bool:
        """Return whether a sum adds a few floats before they become doubles."""
        return self.vectors and e.fn == "sum" and e.dtype is torch.float32

    def accumulator(self, e: Reduce) -> str:
        if self.is_long(e):
            return "long_sums"
        if e.fn == "sum" and e.dtype is torch.float32:
            return "double"
        return VECTORS[self.lanes][e.dtype] if self.vectors else NUMBERS[e.dtype]

    def start(self, e: Reduce) -> str:
        if e.fn == "sum" and e.dtype.is_floating_point:
            return f"{self.accumulator(e)}{{}}"
        return self.constant(Const(e.dtype, neutral(e)), self.vectors)

    def step(self, e: Reduce, a: str) -> None:
        value = self.word(e.value, self.vectors)
        if self.across:
            rest = self.constant(Const(e.dtype, neutral(e)), True)
            value = f"aot_or({value}, {rest}, n)"
        if e.fn == "sum" and e.dtype.is_floating_point:
            self.say(f"aot_sum({a}, {value});")
        elif e.fn == "sum":
            self.say(f"{a} = aot_iadd({a}, {value});")
        else:
            self.say(f"{a} = {self.call(STEP[e.fn], e.dtype, [a, value], self.vectors)};")

    def finish(self, e: Reduce, a: str) -> str:
        summed = e.fn == "sum" and e.dtype.is_floating_point
        if not self.across:
            if not summed:
                return a
            if self.is_long(e):
                return f"aot_summed({a})"
            return f"({NUMBERS[e.dtype]}){a}" if not self.vectors else a
        if summed:
            return f"aot_across_sum({a})"
        fn = {"sum": "add", "prod": "mul"}.get(e.fn, STEP.get(e.fn, e.fn))
        kind = VECTORS[self.lanes][e.dtype]
        step = self.call(fn, e.dtype, ["x", "y"], True)
        total = f"aot_across({a}, []({kind} x, {kind} y) -> {kind} {{ return {step}; }})"
        return f"{total} != 0" if e.dtype is torch.bool else total

    # --- scans ---

    def carry(self, e: Prefix) -> str:
        """Return the type of what a scan has accumulated."""
        wide = self.vectors and not self.across
        if e.fn in ("sum", "prod", "logsumexp") and e.dtype is torch.float32:
            return "sums" if wide else "double"
        return VECTORS[self.lanes][e.dtype] if wide else NUMBERS[e.dtype]

    def first(self, e: Prefix) -> str:
        """Return the value of a scan's accumulator before the first point."""
        text = self.constant(Const(e.dtype, neutral(e)), False)
        return f"aot_{self.carry(e)}({text})" if self.vectors and not self.across else text

    def carries(self, values: Iterable[Expr], tiles: str) -> None:
        """Start the scans that these values need, one for each of the ``tiles``, if any."""
        for e in [e for e in self.missing(values) if isinstance(e, Prefix)]:
            name = self.scans[e] = self.fresh("s")
            if tiles:
                self.say(f"{self.carry(e)} {name}[{tiles}];")
                self.say(f"for (int64_t t = 0; t < tiles; t++) {name}[t] = {self.first(e)};")
                self.scans[e] = f"{name}[t]"
            else:
                self.say(f"{self.carry(e)} {name} = {self.first(e)};")

    def expression(self, e: Expr) -> str:
        if not isinstance(e, Prefix) or e in self.spilled:
            return super().expression(e)
        name = f"{'aot_scan_lanes' if self.across else 'aot_scan'}<{NEXT[e.fn]}>"
        if self.across and e.fn == "logsumexp":
            name = "aot_scan_logs"
        return f"{name}({self.scans[e]}, {self.word(e.value, self.vectors)})"


def neutral(e: Reduce | Prefix) -> bool | int | float:
    """Return the neutral value of a reduction or scan."""
    if e.fn in ("max", "min") and not e.dtype.is_floating_point:
        info = torch.iinfo(e.dtype)
        return info.min if e.fn == "max" else info.max
    return START[e.fn]
