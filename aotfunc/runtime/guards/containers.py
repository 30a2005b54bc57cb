"""Containers as state: their type, their length and their elements."""

from __future__ import annotations

import array
import collections
import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from .description import by_bits, is_bare, is_plain
from .objects import Objects

#: number of objects in a container that are described; of larger ones only the length counts
LIMIT = 10_000

#: packages whose containers have no attributes that matter
_PLAIN = frozenset({"builtins", "collections", "torch", "numpy"})
BYTES = bytearray | array.array | memoryview
BYTES |= ctypes._SimpleCData | ctypes.Array | ctypes.Structure


class Containers(Objects):
    """Describes lists, tuples, dictionaries, sets and arrays."""

    def sequence(self, x: Any, v: str, label: str) -> None:
        self.key += (type(x), len(x))
        self.require(f"type({v})", type(x))
        if not isinstance(x, tuple):
            self.owners.append((x, v, dict(enumerate(x))))
        self.elements(x, v, label)
        self.extra(x, v, label)

    def elements(self, x: Sequence[Any], v: str, label: str) -> None:
        if not all(map(is_bare, x)):
            self.lines.append(f"if len({v}) != {len(x)}: return")
            for i, e in enumerate(x if len(x) <= LIMIT else ()):
                self.meet(e, f"{v}[{i}]", f"{label}[{i}]")
            return
        self.key.append(by_bits(tuple(x)))
        self.facts.append((label, tuple(x)))
        if len(x) <= 4:
            names = [f"{v}_{i}" for i in range(len(x))]
            self.lines.append(f"[{', '.join(names)}] = {v}")
            for name, e in zip(names, x, strict=True):
                self.require(name, e)
        else:
            k = self.constant(tuple(x))
            self.lines.append(f"if len({v}) != {len(x)} or not all(map(is_, {v}, {k})): return")

    def dictionary(self, x: Any, v: str, label: str) -> None:
        self.key += (type(x), len(x))
        self.lines.append(
            f"if type({v}) is not {self.constant(type(x))} or len({v}) != {len(x)}: return"
        )
        if isinstance(x, dict):
            self.owners.append((x, v, dict(x)))
        if isinstance(x, collections.defaultdict):
            self.meet(x.default_factory, f"{v}.default_factory", f"{label}.default_factory")
        whole = len(x) > LIMIT or (len(x) > 4 and all(map(is_plain, x.values())))
        if not whole and all(type(k) is str for k in x):
            self.key += x
            if len(x) > 1:
                self.lines.append(f"if [*{v}] != {self.constant([*x])}: return")
            for k, e in x.items():
                if k == "lr" and id(x) in self._groups:
                    self.rate(x, v, f"{label}['lr']")
                else:
                    self.meet(e, f"{v}[{k!r}]", f"{label}[{k!r}]")
        else:
            self.elements([*x], self.bind(f"[*{v}]"), f"{label}.keys()")
            self.elements([*x.values()], self.bind(f"[*{v}.values()]"), f"{label}.values()")
        self.extra(x, v, label)

    def unordered(self, x: set | frozenset, v: str, label: str) -> None:
        """Describe a set, in the order of iteration."""
        self.key += (type(x), len(x))
        self.require(f"type({v})", type(x))
        self.elements([*x], self.bind(f"[*{v}]"), label)
        self.extra(x, v, label)

    def content(self, x: Any, v: str, label: str) -> None:
        """Describe an array or a slice by its content."""
        if isinstance(x, np.ndarray) and x.dtype.kind == "O":
            self.key += (x.shape, x.strides)
            self.lines.append(f"if {v}.shape != {x.shape} or {v}.strides != {x.strides}: return")
            self.elements([*x.flat], self.bind(f"[*{v}.flat]"), label)
            self.extra(x, v, label)
            return
        now = content(x)
        if isinstance(x, np.ndarray):
            self.arrays.append((x, now[-1]))
        self.key.append(now)
        self.facts.append((label, now))
        self.lines.append(f"if content({v}) != {self.constant(now)}: return")
        if isinstance(x, np.ndarray):
            self.extra(x, v, label)

    def extra(self, x: Any, v: str, label: str) -> None:
        """Describe the attributes of a container of the user's own class."""
        if type(x).__module__.partition(".")[0] not in _PLAIN:
            self.class_of(type(x))
            if hasattr(x, "__dict__"):
                self.attributes(x, self.bind(f"{v}.__dict__"), label, self.wants)


def content(x: Any) -> Any:
    """Describe an array or a slice by what is equal where the elements are."""
    if isinstance(x, np.ndarray):
        return (x.dtype, x.shape, x.strides, x.tobytes())
    if isinstance(x, slice):
        return (slice, *[(type(i), i) for i in (x.start, x.stop, x.step)])
    return (type(x), getattr(x, "typecode", None) or getattr(x, "format", None), bytes(x))
