"""Kernels as C++ functions. Extents and strides are arguments: the text says which strides are 0 or
1 and nothing else of them.

Where all values are as wide as each other the vector axis is computed 8 floats or 4 doubles at a
time, integers and bools likewise; elsewhere by single numbers."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from .ir import Access, Apply, Cast, Const, Expr, Kernel, Load, Reduce, Store, walk

SUPPORT = (Path(__file__).parent / "lanes.h").read_text()

NUMBERS = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bool: "bool",
    torch.uint8: "uint8_t",
    torch.int8: "int8_t",
    torch.int16: "int16_t",
    torch.int32: "int32_t",
    torch.int64: "int64_t",
}

#: types of vectors, by the number of lanes
VECTORS = {
    8: {torch.float32: "f8", torch.int32: "m8", torch.bool: "m8"},
    4: {torch.float64: "d4", torch.int64: "m4", torch.bool: "m4"},
}

OPERATORS = {
    **{"add": "+", "sub": "-", "mul": "*", "div": "/"},
    **{"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="},
    **{"bitwise_and": "&", "bitwise_or": "|", "bitwise_xor": "^"},
}

#: what a reduction begins with, of floating point or not, and how it goes on
START = {"sum": 0, "prod": 1, "max": -math.inf, "min": math.inf, "any": False, "all": True}
STEP = {"prod": "mul", "max": "maximum", "min": "minimum", "any": "bitwise_or", "all": "bitwise_and"}


def lanes_of(kernel: Kernel) -> int:
    """How many points are computed at a time."""
    values = walk(kernel.values)
    dtypes = {e.dtype for e in values} | {kernel.accesses[s.access].dtype for s in kernel.stores}
    fits = [w for w, types in VECTORS.items() if dtypes <= set(types)]
    return fits[0] if fits and kernel.extents else 1


def sizes(kernel: Kernel) -> tuple[int, ...]:
    """The numbers that the printed function of a kernel gets: extents, strides, the bits of doubles."""
    steps = [kernel.accesses[i].strides[k] for i, k in strides(kernel)]
    numbers = [struct.unpack("q", struct.pack("d", c.value))[0] for c in given(kernel)]
    return (*kernel.extents, *steps, *numbers)


def given(kernel: Kernel) -> list[Const]:
    """The numbers that are arguments."""
    return [e for e in walk(kernel.values) if isinstance(e, Const) and e.given]


def strides(kernel: Kernel) -> Iterator[tuple[int, int]]:
    """(access, axis) of each stride that is an argument."""
    for i, a in enumerate(kernel.accesses):
        for k, s in enumerate(a.strides):
            if s and not (s == 1 and k == kernel.vector):
                yield i, k


def rows(kernel: Kernel) -> int:
    """How many rows a kernel's function divides its work into."""
    outer = kernel.extents[: kernel.outer]
    if not kernel.reduced and kernel.outer == 1:
        return outer[0]
    if kernel.vector == kernel.outer - 1 and kernel.outer > 1:
        outer = outer[:-1]
    elif kernel.vector == kernel.outer - 1 and kernel.outer == 1:
        return outer[0]
    return math.prod(outer)


def function(kernel: Kernel) -> str:
    """The kernel as the text of an exported function."""
    return Printer(kernel).text()


class Printer:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.lanes = lanes_of(kernel)
        self.vector = kernel.vector
        self.inner = frozenset(range(kernel.outer, len(kernel.extents)))
        #: rows are points of the vector axis
        self.split = self.vector == 0 and kernel.outer == 1
        #: the vector axis is one of the outer ones
        self.columns = 0 <= self.vector < kernel.outer
        self.names: dict[Expr, str] = {}
        self.numbers: dict[Const, str] = {}
        self.lines: list[str] = []
        self.depth = 1
        self.count = 0

    # --- text ---

    def say(self, line: str) -> None:
        self.lines.append("  " * self.depth + line)

    def open(self, line: str) -> None:
        self.say(line + " {")
        self.depth += 1

    def close(self) -> None:
        self.depth -= 1
        self.say("}")

    def text(self) -> str:
        kernel = self.kernel
        for k in range(len(kernel.extents)):
            self.say(f"const int64_t n{k} = sizes[{k}];")
        start = len(kernel.extents)
        for at, (i, k) in enumerate(strides(kernel), start):
            self.say(f"const int64_t {self.stride(i, k)} = sizes[{at}];")
        start += len(list(strides(kernel)))
        for at, e in enumerate(given(kernel)):
            self.numbers[e] = f"c{at}"
            kind = NUMBERS[e.dtype]
            self.say(f"const {kind} c{at} = ({kind})aot_number(sizes[{start + at}]);  // {e.value}")
        written = {s.access for s in kernel.stores}
        for at, (i, a) in enumerate(buffers(kernel)):
            const = "" if i in written else "const "
            kind = memory(a.dtype)
            self.say(f"{const}{kind} *const p{i} = ({const}{kind} *)buffers[{at}];  // {a.name}")
        self.emit(self.at_level(0))
        self.body()
        head = [f"// {line}" for line in kernel.comments]
        head.append(
            f'extern "C" __attribute__((visibility("default"))) void {kernel.name}(int64_t begin, '
            "int64_t end, const int64_t *sizes, void *const *buffers) {"
        )
        return "\n".join([*head, *self.lines, "}"])

    def stride(self, i: int, k: int) -> str:
        a = self.kernel.accesses[i]
        return "1" if a.strides[k] == 1 and k == self.vector else f"s{i}_{k}"

    # --- loops ---

    def body(self) -> None:
        kernel = self.kernel
        if self.split:
            self.pointers("", [])
            self.lane_loop("begin", "end")
            return
        outer = list(range(kernel.outer))
        if self.columns:
            outer.remove(self.vector)
        self.open("for (int64_t row = begin; row < end; row++)")
        if len(outer) == 1:
            self.say(f"const int64_t i{outer[0]} = row;")
        elif outer:
            self.say("int64_t rest = row;")
            for k in reversed(outer[1:]):
                self.say(f"const int64_t i{k} = rest % n{k};")
                self.say(f"rest /= n{k};")
            self.say(f"const int64_t i{outer[0]} = rest;")
        self.pointers("", outer)
        self.emit(self.at_level(1))
        if self.columns:
            self.lane_loop("0", f"n{self.vector}")
        else:
            self.passes()
        self.close()

    def pointers(self, why: str, axes: list[int]) -> None:
        """The buffers at this row."""
        written = {s.access for s in self.kernel.stores}
        for i, a in buffers(self.kernel):
            steps = [f" + i{k} * {self.stride(i, k)}" for k in axes if a.strides[k]]
            const = "" if i in written else "const "
            self.say(f"{const}{memory(a.dtype)} *const q{i} = p{i}{''.join(steps)};")

    def lane_loop(self, first: str, last: str) -> None:
        """Along the vector axis, one of the outer ones: all reductions are in its body."""
        j = f"i{self.vector}"
        self.open(f"for (int64_t {j} = {first}; {j} < {last}; {j} += {self.lanes})")
        if self.lanes > 1:
            self.say(f"const int64_t n = {last} - {j} < {self.lanes} ? {last} - {j} : {self.lanes};")
        self.passes()
        self.close()

    def passes(self) -> None:
        """Reductions in the order in which they need each other, then what is stored."""
        stores = self.kernel.stores
        reduces = [e for e in walk(self.kernel.values) if isinstance(e, Reduce)]
        ranks: dict[Expr, int] = {}
        for e in walk(self.kernel.values):
            ranks[e] = max([ranks[a] for a in e.args], default=0) + isinstance(e, Reduce)
        for rank in range(1, max([ranks[e] for e in reduces], default=0) + 1):
            now = [e for e in reduces if ranks[e] == rank]
            self.reduce(now)  # type: ignore[arg-type]
        inside = [s for s in stores if self.varies(s.access)]
        once = [s for s in stores if not self.varies(s.access)]
        self.emit([s.value for s in once])
        for s in once:
            self.store(s)
        if inside:
            self.before([s.value for s in inside])
            names = dict(self.names)
            self.inner_loops()
            self.emit([s.value for s in inside])
            for s in inside:
                self.store(s)
            self.end_inner_loops()
            self.names = names

    def varies(self, access: int) -> bool:
        return any(self.kernel.accesses[access].strides[k] for k in self.inner)

    def before(self, values: Iterable[Expr]) -> None:
        """What these values need that does not vary inside the loops to come."""
        self.emit([e for e in walk(list(values)) if not self.kernel.axes(e) & self.inner])

    def inner_loops(self) -> None:
        for k in sorted(self.inner):
            step = self.lanes if k == self.vector else 1
            self.open(f"for (int64_t i{k} = 0; i{k} < n{k}; i{k} += {step})")
            if step > 1:
                self.say(f"const int64_t n = n{k} - i{k} < {step} ? n{k} - i{k} : {step};")

    def end_inner_loops(self) -> None:
        for _ in self.inner:
            self.close()

    # --- reductions ---

    def reduce(self, now: list[Reduce]) -> None:
        """One pass over the reduced axes, for reductions that do not need each other."""
        self.before([e.value for e in now])
        for i, e in enumerate(now):
            kind = self.accumulator(e)
            start = self.start(e)
            self.say(f"{kind} a{self.count + i} = {start};")
        names = dict(self.names)
        self.inner_loops()
        self.emit([e.value for e in now])
        for i, e in enumerate(now):
            self.step(e, f"a{self.count + i}")
        self.end_inner_loops()
        self.names = names
        for i, e in enumerate(now):
            name = f"r{self.count + i}"
            self.say(f"const {self.type(e)} {name} = {self.finish(e, f'a{self.count + i}')};")
            self.names[e] = name
        self.count += len(now)

    @property
    def across(self) -> bool:
        """Whether the lanes of an accumulator are one value."""
        return self.lanes > 1 and not self.columns

    def accumulator(self, e: Reduce) -> str:
        wide = self.lanes > 1
        if e.fn == "sum" and e.dtype is torch.float32:
            return "d8" if wide else "double"
        return VECTORS[self.lanes][e.dtype] if wide else NUMBERS[e.dtype]

    def start(self, e: Reduce) -> str:
        if e.fn == "sum" and e.dtype.is_floating_point:
            return "{}" if self.lanes > 1 else "0"
        value = START[e.fn]
        if e.fn in ("max", "min") and not e.dtype.is_floating_point:
            info = torch.iinfo(e.dtype)
            value = info.min if e.fn == "max" else info.max
        return self.constant(Const(e.dtype, value), self.lanes > 1)

    def step(self, e: Reduce, a: str) -> None:
        wide, value = self.lanes > 1, self.word(e.value, self.lanes > 1)
        if self.across:
            neutral = self.constant(Const(e.dtype, self.neutral(e)), True)
            value = f"(n < {self.lanes} ? (aot_first{self.lanes}(n) ? {value} : {neutral}) : {value})"
        if e.fn == "sum" and e.dtype.is_floating_point:
            self.say(f"aot_sum({a}, {value});")
        elif e.fn == "sum":
            self.say(f"{a} = aot_iadd({a}, {value});")
        else:
            self.say(f"{a} = {self.call(STEP[e.fn], e.dtype, [a, value], wide)};")

    def neutral(self, e: Reduce) -> bool | int | float:
        value = START[e.fn]
        if e.fn in ("max", "min") and not e.dtype.is_floating_point:
            info = torch.iinfo(e.dtype)
            return info.min if e.fn == "max" else info.max
        return value

    def finish(self, e: Reduce, a: str) -> str:
        summed = e.fn == "sum" and e.dtype.is_floating_point
        if not self.across:
            if not summed:
                return a
            return f"aot_summed({a})" if self.accumulator(e) == "d8" else f"({NUMBERS[e.dtype]}){a}" \
                if self.lanes == 1 else a
        if summed:
            return f"aot_across_sum({a})"
        fn = {"sum": "add", "prod": "mul"}.get(e.fn, STEP.get(e.fn, e.fn))
        parts = [f"{a}[{i}]" for i in range(self.lanes)]
        if e.dtype is torch.bool:
            parts = [f"({p} != 0)" for p in parts]
        elif not e.dtype.is_floating_point:
            parts = [f"({NUMBERS[e.dtype]}){p}" for p in parts]
        while len(parts) > 1:
            half = len(parts) // 2
            parts = [
                f"({self.call(fn, e.dtype, [parts[i], parts[half + i]], False)})"
                for i in range(half)
            ]
        return parts[0]

    # --- values ---

    def at_level(self, level: int) -> list[Expr]:
        """Values that hold for the whole call (0), or for a row (1), and need no reduction."""
        kernel = self.kernel
        found, late = [], set()
        for e in walk(kernel.values):
            axes = kernel.axes(e)
            if isinstance(e, Reduce) or any(a in late for a in e.args):
                late.add(e)
            elif not isinstance(e, Const) and (not axes or (level and not self.wide(e))):
                if not axes & self.inner and self.vector not in axes:
                    found.append(e)
        return found

    def wide(self, e: Expr) -> bool:
        """Whether a value is a vector."""
        return self.lanes > 1 and self.vector in self.kernel.axes(e)

    def type(self, e: Expr) -> str:
        return VECTORS[self.lanes][e.dtype] if self.wide(e) else NUMBERS[e.dtype]

    def emit(self, values: Iterable[Expr]) -> None:
        """Lines for these values and what they need, unless they are there already."""
        for e in self.missing(values):
            name = f"v{len(self.names)}"
            while name in self.names.values():
                name += "_"
            self.say(f"const {self.type(e)} {name} = {self.expression(e)};")
            self.names[e] = name

    def missing(self, values: Iterable[Expr]) -> list[Expr]:
        found: list[Expr] = []
        seen: set[Expr] = set()

        def visit(e: Expr) -> None:
            if e in seen or e in self.names or isinstance(e, Const):
                return
            seen.add(e)
            for a in e.args:
                visit(a)
            found.append(e)

        for e in values:
            visit(e)
        return found

    def word(self, e: Expr, wide: bool) -> str:
        """A value as an operand, in all lanes if ``wide``."""
        if isinstance(e, Const):
            return self.constant(e, wide)
        name = self.names[e]
        if not wide or self.wide(e):
            return name
        if e.dtype is torch.bool:
            return f"aot_mask{self.lanes}({name})"
        return f"aot_all<{VECTORS[self.lanes][e.dtype]}>({name})"

    def constant(self, e: Const, wide: bool) -> str:
        text = self.numbers.get(e) or literal(e)
        if not wide:
            return text
        if e.dtype is torch.bool:
            return f"aot_mask{self.lanes}({text})"
        return f"aot_all<{VECTORS[self.lanes][e.dtype]}>({text})"

    def expression(self, e: Expr) -> str:
        wide = self.wide(e)
        if isinstance(e, Load):
            return self.load(e, wide)
        if isinstance(e, Cast):
            return self.cast(e, wide)
        assert isinstance(e, Apply)
        args = [self.word(a, wide) for a in e.args]
        return self.call(e.fn, e.args[-1].dtype, args, wide)

    def call(self, fn: str, dtype: torch.dtype, args: list[str], wide: bool) -> str:
        floating = dtype.is_floating_point
        kind = NUMBERS[dtype]
        if fn == "where":
            return f"{args[0]} ? {args[1]} : {args[2]}"
        if fn in ("maximum", "minimum"):
            if floating:
                return f"aot_{fn[:3]}({', '.join(args)})"
            return f"{args[0]} {'>' if fn == 'maximum' else '<'} {args[1]} ? {args[0]} : {args[1]}"
        if fn in ("add", "sub", "mul") and not floating:
            return f"aot_i{fn}({args[0]}, {args[1]})"
        if fn == "neg" and not floating:
            return f"aot_isub({self.constant(Const(dtype, 0), wide)}, {args[0]})"
        if fn == "abs" and not floating:
            return f"{args[0]} < 0 ? {self.call('neg', dtype, args, wide)} : {args[0]}"
        if fn == "neg":
            return f"-{args[0]}"
        if fn == "bitwise_not":
            return f"!{args[0]}" if dtype is torch.bool and not wide else f"({kind})~{args[0]}" \
                if not wide else f"~{args[0]}"
        if fn in OPERATORS:
            text = f"{args[0]} {OPERATORS[fn]} {args[1]}"
            return f"({kind})({text})" if fn.startswith("bitwise") and not wide else text
        return f"aot_{fn}({', '.join(args)})"

    def cast(self, e: Cast, wide: bool) -> str:
        x, source = self.word(e.value, wide), e.value.dtype
        if e.dtype is torch.bool:
            return f"{x} != 0"
        if not wide:
            if e.dtype in (torch.uint8, torch.int8, torch.int16) and source.is_floating_point:
                return f"({NUMBERS[e.dtype]})(int64_t){x}"
            return f"({NUMBERS[e.dtype]}){x}"
        if source is torch.bool:
            x = f"-{x}"
            if not e.dtype.is_floating_point:
                return x
        return f"__builtin_convertvector({x}, {VECTORS[self.lanes][e.dtype]})"

    # --- memory ---

    def place(self, i: int, skip: int | None = None) -> str:
        """The address of this point; without its step along ``skip``."""
        a = self.kernel.accesses[i]
        axes = [k for k in range(len(a.strides)) if a.strides[k]]
        axes = [k for k in axes if k in self.inner or k == self.vector]
        steps = [f" + i{k} * {self.stride(i, k)}" for k in axes]
        return f"q{i}{''.join(steps)}".replace(" * 1", "")

    def load(self, e: Load, wide: bool) -> str:
        i = e.access
        strides = self.kernel.accesses[i].strides
        if not any(strides):
            return f"*p{i}" + " != 0" * (e.dtype is torch.bool)
        if not wide:
            return f"*({self.place(i)})" + " != 0" * (e.dtype is torch.bool)
        kind, step = self.type(e), self.stride(i, self.vector)
        text = (
            f"aot_get<{kind}>({self.place(i)}, n)"
            if step == "1"
            else f"aot_gather<{kind}>({self.place(i)}, n, {step})"
        )
        return f"{text} != 0" if e.dtype is torch.bool else text

    def store(self, s: Store) -> None:
        i, e = s.access, s.value
        wide = self.lanes > 1 and self.kernel.accesses[i].strides[self.vector] != 0
        value = self.word(e, wide)
        if not wide:
            self.say(f"*({self.place(i)}) = {value};")
            return
        if e.dtype is torch.bool:
            value = f"-{value}"
        step = self.stride(i, self.vector)
        self.say(
            f"aot_put({self.place(i)}, {value}, n);"
            if step == "1"
            else f"aot_scatter({self.place(i)}, {value}, n, {step});"
        )


def buffers(kernel: Kernel) -> Iterator[tuple[int, Access]]:
    """The accesses that are memory."""
    return ((i, a) for i, a in enumerate(kernel.accesses) if a.tensor is not None)


def memory(dtype: torch.dtype) -> str:
    return "uint8_t" if dtype is torch.bool else NUMBERS[dtype]


def literal(e: Const) -> str:
    value, suffix = e.value, "f" if e.dtype is torch.float32 else ""
    if e.dtype is torch.bool:
        return "true" if value else "false"
    if not e.dtype.is_floating_point:
        text = "(-9223372036854775807 - 1)" if value == -(2**63) else str(int(value))
        return f"({NUMBERS[e.dtype]}){text}"
    if math.isnan(value):
        return f'__builtin_nan{suffix}("")'
    if math.isinf(value):
        return f"{'-' if value < 0 else ''}__builtin_inf{suffix}()"
    return f"{float(value)!r}{suffix}"
