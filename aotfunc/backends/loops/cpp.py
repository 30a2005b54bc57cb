"""Print kernels as C++ functions. Extents and strides are arguments: the text depends only on
which strides are 0 or 1.

If all values are equally wide, the vector axis is computed a register of floats, doubles, integers
or bools at a time, else by single numbers. A reduction whose vector axis is not reduced runs
through memory row by row, with an accumulator for each point of a tile of that axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from .accumulators import Accumulators
from .arguments import BLOCK, given, named_sizes
from .blocks import ROWS
from .ir import SLOW, Apply, Const, Expr, Kernel, Load, Position, Reduce, Store, walk
from .native import EXPORTED
from .values import NUMBERS, memory

#: number of points of the vector axis that have accumulators at the same time
TILE = 1024


class Printer(Accumulators):
    """The C++ function of a kernel."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        #: whether rows are points of the vector axis
        self.split = self.columns and kernel.outer == 1
        #: whether values are kept for a tile that vary along it, but not inside
        self.tiled = self.columns and kernel.reduced > 0
        #: how many there are in a tile
        self.tiles = f"{TILE} / {self.lanes}" if self.tiled else ""

    def text(self) -> str:
        """Return the kernel as the text of an exported function."""
        kernel = self.kernel
        names = [name for name, _ in named_sizes(kernel)]
        for at, name in enumerate(names):
            self.say(f"const int64_t {name} = sizes[{at}];")
        for at, e in enumerate(given(kernel), len(names)):
            kind, name = NUMBERS[e.dtype], self.numbers[e]
            self.say(f"const {kind} {name} = ({kind})aot_number(sizes[{at}]);  // {e.value}")
        for i, a in enumerate(kernel.accesses):
            kind = self.pointer(i)
            start = f" + s{i}_start" * (a.start != 0)
            self.say(f"{kind} *const p{i} = ({kind} *)buffers[{i}]{start};  // {a.name}")
        self.emit(self.known(0))
        self.cleared()
        self.body()
        head = [f"// {line}" for line in kernel.comments]
        head.append(
            f"{EXPORTED} void {kernel.name}(int64_t begin, int64_t end, const int64_t *sizes, "
            "void *const *buffers) {"
        )
        return "\n".join([*head, *self.lines, "}"])

    def pointer(self, i: int) -> str:
        written = any(s.access == i for s in self.kernel.stores)
        return ("" if written else "const ") + memory(self.kernel.accesses[i].dtype)

    def known(self, level: int) -> list[Expr]:
        """List the values fixed for the call (0), or for a row (1), that need no reduction."""
        found, late = [], set()
        for e in walk(self.kernel.values):
            axes = self.kernel.axes(e)
            if isinstance(e, Reduce) or any(a in late for a in e.args):
                late.add(e)
            elif not isinstance(e, Const) and (not axes or (level and not self.wide(e))):
                if not axes & self.inner and self.vector not in axes:
                    found.append(e)
        return found

    # --- loops ---

    def body(self) -> None:
        kernel = self.kernel
        if self.split:
            self.pointers([])
            self.along("begin", "end")
            return
        outer = [k for k in range(kernel.outer) if k != self.vector]
        if kernel.blocks:
            self.block()
        first, last = ("first", "last") if kernel.blocks else ("begin", "end")
        self.open(f"for (int64_t row = {first}; row < {last}; row++)")
        if kernel.cross >= 0:
            self.crossed(outer)
            self.close()
            return
        self.point(outer, {k: (f"i{k}", f"n{k}") for k in outer})
        self.pointers(outer)
        self.emit(self.known(1))
        if self.columns:
            self.along("0", f"n{self.vector}")
        else:
            self.passes()
        self.close(1 + kernel.blocks)

    def cleared(self) -> None:
        """Write zeros before values are added, and let one call compute all rows."""
        if not self.kernel.scatters:
            return
        for s in self.kernel.scatters:
            self.say(f"for (int64_t i = 0; i < s{s.access}_size; i++) p{s.access}[i] = 0;")
        every = range(self.kernel.outer)
        axes = [k for k in every if self.split or k != self.vector]
        rows = " * ".join([f"n{k}" for k in axes]) or "1"
        self.say(
            f"end = ({rows} + {ROWS - 1}) / {ROWS};" if self.kernel.blocks else f"end = {rows};"
        )

    def block(self) -> None:
        """Open the loop over the rows of a block, with a pointer to the block's sums."""
        rows, size = [
            " * ".join([f"n{k}" for k in axes])
            for axes in (range(self.kernel.outer), sorted(self.inner))
        ]
        self.say(f"const int64_t rows = {rows}, size = {size};")
        self.open("for (int64_t block = begin; block < end; block++)")
        self.say(f"const int64_t first = block * {ROWS};")
        self.say(f"const int64_t last = rows - first < {ROWS} ? rows : first + {ROWS};")
        for i in [s.access for s in self.kernel.stores if s.blocks]:
            self.say(f"{self.pointer(i)} *const b{i} = p{i} + block * size;")
            self.say(f"for (int64_t i = 0; i < size; i++) b{i}[i] = 0;")

    def point(self, outer: list[int], counted: Mapping[int, tuple[str, str]]) -> None:
        """Compute the indices of a row: for each axis a name, and the size that it counts to."""
        if len(outer) > 1:
            self.say("int64_t rest = row;")
        for k in reversed(outer[1:]):
            name, size = counted[k]
            self.say(f"const int64_t {name} = rest % {size};")
            self.say(f"rest /= {size};")
        if outer:
            self.say(f"const int64_t {counted[outer[0]][0]} = {'rest' if outer[1:] else 'row'};")

    def crossed(self, outer: list[int]) -> None:
        """Run blocks of the cross axis beside those of the vector axis: they share cache lines."""
        k, v = self.kernel.cross, self.vector
        self.say(f"const int64_t blocks = (n{k} + {BLOCK - 1}) / {BLOCK};")
        self.point(outer, {j: (f"i{j}", f"n{j}") for j in outer} | {k: ("block", "blocks")})
        self.say(f"const int64_t first = block * {BLOCK};")
        self.say(f"const int64_t last = n{k} - first < {BLOCK} ? n{k} : first + {BLOCK};")
        turned = self.to_turn()
        step = self.lanes if turned else str(BLOCK)
        self.open(f"for (int64_t begin_ = 0; begin_ < n{v}; begin_ += {step})")
        self.say(f"const int64_t end_ = n{v} - begin_ < {step} ? n{v} : begin_ + {step};")
        for i in turned:
            strides = self.kernel.accesses[i].strides
            steps = [f" + i{j} * {self.stride(i, j)}" for j in outer if strides[j] and j != k]
            at = f"p{i}{''.join(steps)} + first + begin_ * {self.stride(i, v)}"
            self.say(f"floats t{i}[{BLOCK}];")
            self.say(
                f"aot_turn<{BLOCK}>(t{i}, {at}, {self.stride(i, v)}, end_ - begin_, last - first);"
            )
            self.turned[i] = f"t{i}[i{k} - first]"
        self.open(f"for (int64_t i{k} = first; i{k} < last; i{k}++)")
        self.pointers(outer)
        self.emit(self.known(1))
        self.along("begin_", "end_")
        self.close(2)

    def to_turn(self) -> list[int]:
        """List the buffers contiguous along the cross axis: they are transposed in registers."""
        k, v, found = self.kernel.cross, self.vector, dict[int, None]()
        for e in walk(self.kernel.values):
            if isinstance(e, Load) and not e.args and self.lanes == "FLOATS":
                a = self.kernel.accesses[e.access]
                if a.dtype is torch.float32 and a.strides[k] == 1 and a.strides[v] not in (0, 1):
                    found[e.access] = None
        return list(found)

    def pointers(self, axes: list[int]) -> None:
        """Declare pointers to this row of the buffers."""
        added_up = [s.access for s in self.kernel.stores if s.blocks]
        for i, a in enumerate(self.kernel.accesses):
            start = f"b{i}" if i in added_up else f"p{i}"
            steps = [f" + i{k} * {self.stride(i, k)}" for k in axes if a.strides[k]]
            self.say(f"{self.pointer(i)} *const q{i} = {start}{''.join(steps)};")

    def along(self, first: str, last: str) -> None:
        """Loop along the vector axis, which is one of the outer ones."""
        if self.tiled:
            self.open(f"for (int64_t begin_ = {first}; begin_ < {last}; begin_ += {TILE})")
            self.say(f"const int64_t end_ = {last} - begin_ < {TILE} ? {last} : begin_ + {TILE};")
            self.say(f"const int64_t tiles = (end_ - begin_ + {self.lanes} - 1) / {self.lanes};")
            self.passes()
        else:
            self.stepped(first, last)
            self.passes()
        self.close()

    def stepped(self, first: str, last: str, more: str = "") -> None:
        """Open a loop over the vector axis that takes as many points as there are lanes."""
        j, w = f"i{self.vector}", self.lanes
        start = f"{first}, t = 0" if more else first
        self.open(f"for (int64_t {j} = {start}; {j} < {last}; {j} += {w}{more})")
        if self.vectors:
            self.say(f"const int64_t n = {last} - {j} < {w} ? {last} - {j} : {w};")

    def tile(self) -> None:
        self.stepped("begin_", "end_", ", t++")

    def passes(self) -> None:
        """Write reductions in the order of their dependencies. Each value is stored as soon as it
        is computed; a slow one is kept in the memory of a later result."""
        values = list(walk(self.kernel.values))
        ranks: dict[Expr, int] = {}
        for e in values:
            ranks[e] = max([ranks[a] for a in e.args], default=0) + isinstance(e, Reduce)
        left = [s for s in self.kernel.stores if self.varies(s)]
        reduces = [e for e in values if isinstance(e, Reduce)]
        for rank in sorted({ranks[e] for e in reduces}):
            now = [e for e in reduces if ranks[e] == rank]
            stores = [s for s in left if max([ranks[e] for e in s.needs]) < rank]
            left = [s for s in left if s not in stores]
            later = [e for s in left for e in s.needs] + [
                e.value for e in reduces if ranks[e] > rank
            ]
            last = [s for s in left if ranks[s.value] == max(ranks.values())]
            self.reduce(now, stores, self.kept(now, later, last))
        self.put([s for s in self.kernel.stores if not self.varies(s)], inside=False)
        self.put(left, inside=True)

    def kept(self, now: Sequence[Reduce], later: Sequence[Expr], last: list[Store]) -> list[Store]:
        """Choose slow values that reductions compute now and later stores need: each is kept in
        the memory of one of the last results."""
        needed = set(walk(later))
        free = [s.access for s in last if s.access not in self.spilled.values()]
        found = []
        for e in walk([e.value for e in now]):
            if isinstance(e, Apply) and e.fn in SLOW and e in needed and e not in self.spilled:
                for access in free:
                    a = self.kernel.accesses[access]
                    walked = {k for k, stride in enumerate(a.strides) if stride}
                    if a.dtype is e.dtype and walked == self.kernel.axes(e):
                        found.append(Store(access, e))
                        free.remove(access)
                        break
        return found

    def put(self, stores: Sequence[Store], inside: bool) -> None:
        """Store these values, once or inside of the reduced axes."""
        if not stores:
            return
        values = [e for s in stores for e in s.needs]
        if inside:
            self.before(values)
            self.carries(values, self.tiles)
        names = dict(self.names)
        loops = self.loops() if inside else 0
        if self.tiled:
            self.tile()
            loops += 1
        self.emit(values)
        self.store_all(stores)
        self.close(loops)
        if loops:
            self.names = names

    def varies(self, s: Store) -> bool:
        """Return whether a value has several places in a row."""
        walked = any([self.kernel.accesses[s.access].strides[k] for k in self.inner])
        return walked or (s.shift is not None and bool(self.kernel.axes(s.shift) & self.inner))

    def before(self, values: Iterable[Expr]) -> None:
        """Compute what these values need and what does not vary in the loops to come."""
        inside = [e for e in walk(list(values)) if self.kernel.axes(e) & self.inner]
        needed = {a for e in inside for a in e.args} | set(values)
        early = [e for e in walk(list(values)) if e in needed and e not in inside]
        along = [e for e in early if self.tiled and self.vector in self.kernel.axes(e)]
        self.emit([e for e in early if e not in along])
        kept = [
            e for e in early if e not in self.names and not isinstance(e, Const | Load | Position)
        ]
        if not kept:
            return
        arrays = {e: self.fresh("t") for e in kept}
        for e, name in arrays.items():
            self.say(f"{self.type(e)} {name}[{self.tiles}];")
        names = dict(self.names)
        self.tile()
        self.emit(kept)
        for e, name in arrays.items():
            self.say(f"{name}[t] = {self.names[e]};")
        self.close()
        self.names = names | {e: f"{name}[t]" for e, name in arrays.items()}

    def loops(self) -> int:
        """Open the loops over the reduced axes and return their number."""
        for k in sorted(self.inner):
            if k == self.vector:
                self.stepped("0", f"n{k}")
            else:
                self.open(f"for (int64_t i{k} = 0; i{k} < n{k}; i{k}++)")
        return len(self.inner)

    # --- reductions ---

    def reduce(self, now: list[Reduce], stores: list[Store], kept: list[Store]) -> None:
        """Write one pass over the reduced axes: independent reductions, and stored values."""
        values = [e.value for e in now] + [e for s in stores for e in s.needs]
        self.before(values)
        self.carries(values, self.tiles)
        totals = {e: self.fresh("a") for e in now}
        long = [a for e, a in totals.items() if self.is_long(e)]
        some = self.fresh("k") if long else ""
        if long:
            self.say(f"unsigned {some} = 0;")
        tiles = self.tiles
        for e, a in totals.items():
            if self.tiled:
                self.say(f"{self.accumulator(e)} {a}[{tiles}];")
                self.say(f"for (int64_t t = 0; t < tiles; t++) {a}[t] = {self.start(e)};")
            else:
                self.say(f"{self.accumulator(e)} {a} = {self.start(e)};")
        names = dict(self.names)
        loops = self.loops()
        if self.tiled:
            self.tile()
            loops += 1
        self.emit(values)
        self.store_all([*stores, *kept])
        for e, a in totals.items():
            self.step(e, f"{a}[t]" if self.tiled else a)
        self.close(self.tiled)
        if long:
            each = "for (int64_t t = 0; t < tiles; t++) " * self.tiled
            carried = ", ".join([f"aot_carry({a}{'[t]' * self.tiled})" for a in long])
            self.say(f"if (__builtin_expect(++{some} % 32 == 0, 0)) {each}{carried};")
        self.close(loops - self.tiled)
        self.names = names
        self.spilled |= {s.value: s.access for s in kept}
        for e, a in totals.items():
            name = self.fresh("r")
            if self.tiled:
                self.say(f"{self.type(e)} {name}[{tiles}];")
                result = self.finish(e, f"{a}[t]")
                self.say(f"for (int64_t t = 0; t < tiles; t++) {name}[t] = {result};")
                self.names[e] = f"{name}[t]"
            else:
                self.say(f"const {self.type(e)} {name} = {self.finish(e, a)};")
                self.names[e] = name
