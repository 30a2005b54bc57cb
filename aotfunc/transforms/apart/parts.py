"""Say where a value of a batched graph holds the batch, and define what a rule that follows it
through an op gets and returns (the rules are in the files beside it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload
from torch.fx import Node

from ...graph import Times
from ...trace.shapes.sig import Facts, Sig
from ..rules.schema import full_args, tensor_args

aten = torch.ops.aten


class Part(NamedTuple):
    """The dimension ``dim`` has ``each`` entries for every sample, sample after sample.
    ``number``: the value of a sample is its number."""

    dim: int
    each: int = 1
    number: bool = False

    def to(self, dim: int) -> Part:
        return self._replace(dim=dim)

    def without(self, dims: Sequence[int]) -> Part:
        """Return the part after these dimensions are removed. Raises Mixed if its own is one."""
        if self.dim in dims:
            raise Mixed
        return self.to(self.dim - sum(d < self.dim for d in set(dims)))


class Mixed(Exception):
    """Raised for an op that may mix samples."""


class Walk:
    """The parts of a graph's values for a batch of this size, and the arguments that depend on it.
    ``multiples``: factories hold the batch in multiples of the size, too."""

    def __init__(self, size: int, multiples: bool) -> None:
        self.size, self.multiples = size, multiples
        self.parts: dict[Node, Any] = {}
        self.args: dict[Node, tuple] = {}


class OpCall:
    """A call of an op as its rule sees it: ``arg`` by the schema's names, ``val`` the result."""

    def __init__(self, walk: Walk, n: Node) -> None:
        self.walk, self.n, self.val = walk, n, n.meta["val"]
        op: Any = n.target
        self.names = Facts(op).names
        self.arg = dict(zip(self.names, full_args(op, n.args, n.kwargs), strict=True))
        #: (tensor argument, part), also of those in lists
        self.tensors: list[tuple[Sig, Part | None]] = []
        for i in tensor_args(op):
            given = self.arg[self.names[i]]
            for x in given if isinstance(given, list | tuple) else [given]:
                if isinstance(x, Node):
                    self.tensors.append((x.meta["val"], walk.parts[x]))
        self.batched = any(part is not None for _, part in self.tensors)

    def of(self, name: str) -> tuple[Any, Part | None]:
        """Return a tensor argument's signature, and its part."""
        x = self.arg[name]
        return (x.meta["val"], self.walk.parts[x]) if isinstance(x, Node) else (None, None)

    def only(self, name: str) -> tuple[Sig, Part]:
        """Return the tensor of this name, if no other argument is batched."""
        sig, part = self.of(name)
        if part is None or sum(p is not None for _, p in self.tensors) > 1:
            raise Mixed
        return sig, part

    def alike(self) -> tuple[Sig, Part]:
        """Return the first tensor, if all have one part and one rank."""
        sig, part = self.tensors[0]
        if part is None or any(p != part or s.ndim != sig.ndim for s, p in self.tensors):
            raise Mixed
        return sig, part

    def dims(self, rank: int, name: str = "dim") -> list[int]:
        """Return the dimensions that an argument names, not negative."""
        given = self.arg[name]
        given = list(given) if isinstance(given, list | tuple) else [given]
        if None in given or not given:  # (None names all dimensions)
            raise Mixed
        return [d % rank for d in given]

    def scaled(self, name: str, at: int | None, each: int) -> None:
        """Note that an argument (or its entry ``at``) is ``each`` times the size, or -1."""
        i = self.names.index(name)
        args = list(self.walk.args.get(self.n, self.n.args))
        if i >= len(args):
            raise Mixed
        if at is None:
            args[i] = Times(each)
        elif args[i][at] != -1:
            args[i] = [*args[i][:at], Times(each), *args[i][at + 1 :]]
        self.walk.args[self.n] = tuple(args)

    def each(self, part: Part) -> Any:
        """Return the part of the result, or a list of it for several results."""
        return [part] * len(self.val) if isinstance(self.val, tuple) else part


#: op -> rule for results of batched arguments, a list for several; a rule raises Mixed
Rule = Callable[[OpCall], Any]
RULES: dict[OpOverload, Rule] = {}
#: op -> rule for a batched result without a batched argument
FACTORIES: dict[OpOverload, Rule] = {}


def part_rule(names: str, table: dict = RULES) -> Callable[[Rule], Rule]:
    """Make a decorator: register the function as the rule of aten's ops of these names."""

    def register(f: Rule) -> Rule:
        for name in names.split():
            packet, _, overload = name.partition(".")
            op = getattr(getattr(aten, packet, None), overload or "default", None)
            if op is not None:
                table[op] = f
        return f

    return register


def broadcast_part(tensors: Sequence[tuple[Sig, Part | None]], rank: int) -> Part:
    """Return the part of the broadcast shape."""
    found = {(sig.ndim - part.dim, part.each) for sig, part in tensors if part is not None}
    if len(found) != 1:
        raise Mixed
    ((back, each),) = found
    if any(part is None and spans(sig, back) for sig, part in tensors):
        raise Mixed
    return Part(rank - back, each)


def spans(sig: Sig, back: int) -> bool:
    """Return whether a tensor has more than one entry in the dimension ``back`` from the end."""
    return sig.ndim >= back and sig.shape[-back] != 1
