"""Print a kernel's values as C++ expressions, of vectors if they vary along the vector axis."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from .arguments import VECTORS, given, lanes_of
from .ir import Access, Apply, Cast, Const, Expr, Kernel, Load, Position, Ramp, Store, walk
from .schedule import side_by_side

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

#: dtype that is computed as another one -> its type in memory
MEMORY = {torch.bool: "uint8_t", torch.bfloat16: "bf16", torch.float16: "f16"}

OPERATORS = {
    **{"add": "+", "sub": "-", "mul": "*", "div": "/"},
    **{"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="},
    **{"bitwise_and": "&", "bitwise_or": "|", "bitwise_xor": "^"},
}


class KernelText:
    """The text of a kernel so far, and the names of its values in it."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.lanes = lanes_of(kernel)
        self.vectors = self.lanes != "1"
        self.vector = kernel.vector
        self.inner = frozenset(range(kernel.outer, len(kernel.extents)))
        self.names: dict[Expr, str] = {}
        self.numbers = {e: f"c{i}" for i, e in enumerate(given(kernel))}
        #: values kept in the memory of a later result
        self.spilled: dict[Expr, int] = {}
        #: the names of accesses whose memory is in registers
        self.turned: dict[int, str] = {}
        #: accesses written so far, and pairs ``(read, written)`` where one is read after that
        self.written: list[int] = []
        self.late: set[tuple[int, int]] = set()
        self.lines: list[str] = []
        self.depth = 1
        self.count = 0

    def say(self, line: str) -> None:
        self.lines.append("  " * self.depth + line)

    def open(self, line: str) -> None:
        self.say(line + " {")
        self.depth += 1

    def close(self, loops: int = 1) -> None:
        for _ in range(loops):
            self.depth -= 1
            self.say("}")

    def fresh(self, letter: str) -> str:
        self.count += 1
        return f"{letter}{self.count - 1}"

    def wide(self, e: Expr) -> bool:
        """Return whether a value is a vector."""
        return self.vectors and self.vector in self.kernel.axes(e)

    def type(self, e: Expr) -> str:
        return VECTORS[self.lanes][e.dtype] if self.wide(e) else NUMBERS[e.dtype]

    def emit(self, values: Iterable[Expr]) -> None:
        """Write lines for these values and what they need, unless they have names."""
        for e in self.missing(values):
            name = self.fresh("v")
            self.say(f"const {self.type(e)} {name} = {self.expression(e)};")
            self.names[e] = name

    def missing(self, values: Iterable[Expr]) -> list[Expr]:
        found: list[Expr] = []
        seen: set[Expr] = set()

        def visit(e: Expr) -> None:
            if e in seen or e in self.names or isinstance(e, Const):
                return
            seen.add(e)
            for a in () if e in self.spilled else e.args:
                visit(a)
            found.append(e)

        for e in values:
            visit(e)
        return found

    def word(self, e: Expr, wide: bool) -> str:
        """Return a value as an operand; ``wide``: in all lanes."""
        if isinstance(e, Const):
            return self.constant(e, wide)
        name = self.names[e]
        if not wide or self.wide(e):
            return name
        return self.filled(e.dtype, name)

    def filled(self, dtype: torch.dtype, number: str) -> str:
        """Return a number in all lanes."""
        vector = VECTORS[self.lanes][dtype]
        if dtype is torch.bool:
            return f"aot_mask({vector}{{}}, {number})"
        return f"aot_{vector}({number})"

    def constant(self, e: Const, wide: bool) -> str:
        text = self.numbers.get(e) or cpp_literal(e)
        return self.filled(e.dtype, text) if wide else text

    def expression(self, e: Expr) -> str:
        wide = self.wide(e)
        if e in self.spilled:
            return self.load(Load(e.dtype, self.spilled[e]), wide)
        if isinstance(e, Load):
            return self.load(e, wide)
        if isinstance(e, Position):
            return self.position(e, wide)
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
        if fn in ("add", "sub", "mul", "fmod") and not floating:
            return f"aot_i{fn}({args[0]}, {args[1]})"
        if fn == "neg" and not floating:
            return f"aot_isub({self.constant(Const(dtype, 0), wide)}, {args[0]})"
        if fn == "abs" and not floating:
            return f"{args[0]} < 0 ? {self.call('neg', dtype, args, wide)} : {args[0]}"
        if fn == "neg":
            return f"-{args[0]}"
        if fn == "bitwise_not":
            if wide:
                return f"~{args[0]}"
            return f"!{args[0]}" if dtype is torch.bool else f"({kind})~{args[0]}"
        if dtype is torch.bool and wide and fn in ("lt", "le", "gt", "ge"):
            args = args[::-1]  # true is -1
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

    def stride(self, i: int, k: int) -> str:
        return self.pace(f"s{i}", self.kernel.accesses[i], k)

    def pace(self, name: str, walked: Access | Ramp, k: int) -> str:
        step = walked.strides[k]
        return "1" if step == 1 and k == self.vector else f"{name}_{k}" if step else "0"

    def place(self, i: int) -> str:
        """Return the address of this point in buffer ``i``."""
        a = self.kernel.accesses[i]
        axes = [k for k in range(len(a.strides)) if a.strides[k]]
        if not axes:
            return f"p{i}"
        axes = [k for k in axes if k in self.inner or k == self.vector]
        steps = [f" + i{k} * {self.stride(i, k)}" for k in axes]
        return f"q{i}{''.join(steps)}".replace(" * 1", "")

    def load(self, e: Load, wide: bool) -> str:
        i = e.access
        self.late.update([(i, out) for out in self.written])
        if i in self.turned:
            return self.turned[i]
        at, shift, mask = self.place(i), "", ""
        if e.shift is not None and self.wide(e.shift):
            shift = self.word(e.shift, True)
        elif e.shift is not None:
            at += f" + {self.word(e.shift, False)}"
        if e.mask is not None:
            mask = self.word(e.mask, self.wide(e.mask))
        truth = " != 0" * (e.dtype is torch.bool)
        if not wide:
            text = f"*({at})" if at != f"p{i}" else f"*p{i}"
            zero = cpp_literal(Const(e.dtype, 0))  # 0 would make a bfloat16 an integer
            text = f"({mask} ? {text} : {zero})" if mask else text
            return f"{text}{truth}"
        kind, step = self.type(e), self.stride(i, self.vector)
        if e.mask is not None and self.wide(e.mask):
            moved = f", {shift}" if shift else ""
            text = f"aot_masked<{kind}>({at}, n, {step}, {mask}{moved})"
        else:
            if shift:
                found = any(isinstance(a, Load) for a in walk(e.args))
                name = "aot_looked_up" if found else "aot_nearby"
                text = f"{name}<{kind}>({at}, n, {step}, {shift})"
            elif step == "1":
                text = f"aot_get<{kind}>({at}, n)"
            elif self.neighbours(i):
                text = f"aot_get_part<{kind}, {self.kernel.accesses[i].part}>({at}, n)"
            else:
                text = f"aot_gather<{kind}>({at}, n, {step})"
            if mask:
                text = f"{mask} ? {text} : {kind}{{}}"
        return f"({text}){truth}" if truth else text

    def position(self, e: Position, wide: bool) -> str:
        ramp, name = self.kernel.ramps[e.ramp], f"r{e.ramp}"
        terms = [f"{name}_start"] * (ramp.start != 0)
        terms += [
            f"i{k} * {self.pace(name, ramp, k)}".removesuffix(" * 1")
            for k in range(len(ramp.strides))
            if ramp.strides[k]
        ]
        first = f"({NUMBERS[e.dtype]})({' + '.join(terms) or 0})"
        step = self.pace(name, ramp, self.vector)
        return f"aot_ramp<{self.type(e)}>({first}, {step})" if wide else first

    def neighbours(self, i: int) -> bool:
        """Return whether a buffer's parts of complex numbers lie along the vector axis."""
        a = self.kernel.accesses[i]
        return a.part is not None and side_by_side(a, self.vector)

    def store_all(self, stores: Sequence[Store]) -> None:
        """Store these values, both parts of complex numbers at once."""
        left = {s.access: s for s in stores}
        for i, s in list(left.items()):
            part = self.kernel.accesses[i].part
            if part == 0 and i + 1 in left and self.vectors and self.neighbours(i):
                real, imag = self.word(s.value, True), self.word(left.pop(i + 1).value, True)
                self.written += [i, i + 1]
                self.say(f"aot_put_parts({self.place(i)}, {real}, {imag}, n);")
            elif i in left:
                self.store(s)

    def store(self, s: Store) -> None:
        i, e, at = s.access, s.value, self.place(s.access)
        self.written.append(i)
        apart = s.shift is not None and self.wide(s.shift)
        wide = apart or (self.vectors and self.kernel.accesses[i].strides[self.vector] != 0)
        value = self.word(e, wide)
        if s.shift is not None and not apart:
            at += f" + {self.word(s.shift, False)}"
        if not wide:
            self.say(f"*({at}) {'=' if not (s.blocks or s.shift) else '+='} {value};")
            return
        if e.dtype is torch.bool:
            value = f"-{value}"
        step = self.stride(i, self.vector)
        if apart and s.shift is not None:
            self.say(f"aot_add_each({at}, {value}, n, {step}, {self.word(s.shift, True)});")
            return
        put, get = ("aot_put", "aot_get") if step == "1" else ("aot_scatter", "aot_gather")
        rest = "n" if step == "1" else f"n, {step}"
        if s.blocks or s.shift is not None:
            value = f"{get}<{VECTORS[self.lanes][e.dtype]}>({at}, {rest}) + {value}"
        self.say(f"{put}({at}, {value}, {rest});")


def memory(dtype: torch.dtype) -> str:
    return MEMORY.get(dtype) or NUMBERS[dtype]


def cpp_literal(e: Const) -> str:
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
