"""Where a value of a batched graph holds the batch, and the question and answer of a rule that
follows it through an op (the rules are in the files beside it)."""

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
    """The dimension ``dim`` has ``each`` entries for every sample, one sample after the other.
    ``number``: the value of a sample is its number."""

    dim: int
    each: int = 1
    number: bool = False

    def to(self, dim: int) -> Part:
        return self._replace(dim=dim)

    def without(self, dims: Sequence[int]) -> Part:
        """Return the part after these dimensions are gone. Raises Mixed if one of them is its
        own."""
        if self.dim in dims:
            raise Mixed
        return self.to(self.dim - sum(d < self.dim for d in set(dims)))


class Mixed(Exception):
    """Raised for an op that is not known to keep the samples apart."""


class Walk:
    """The parts of the values of a graph for a batch of this size, and the arguments that depend
    on the size. ``multiples``: a new value whose length is a multiple of the size holds the batch,
    too."""

    def __init__(self, size: int, multiples: bool) -> None:
        self.size, self.multiples = size, multiples
        self.parts: dict[Node, Any] = {}
        self.args: dict[Node, tuple] = {}


class OpCall:
    """An op of the graph as its rule sees it; ``arg`` by the schema's names, ``val`` what it
    returns."""

    def __init__(self, walk: Walk, n: Node) -> None:
        self.walk, self.n, self.val = walk, n, n.meta["val"]
        op: Any = n.target
        self.names = Facts(op).names
        self.arg = dict(zip(self.names, full_args(op, n.args, n.kwargs), strict=True))
        #: the tensors among the arguments with their parts, those in lists too
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
        """Return the tensor of this name, if it alone is batched."""
        sig, part = self.of(name)
        if part is None or sum(p is not None for _, p in self.tensors) > 1:
            raise Mixed
        return sig, part

    def alike(self) -> tuple[Sig, Part]:
        """Return the first tensor, if all have the same part and rank."""
        sig, part = self.tensors[0]
        if part is None or any(p != part or s.ndim != sig.ndim for s, p in self.tensors):
            raise Mixed
        return sig, part

    def dims(self, rank: int, name: str = "dim") -> list[int]:
        """Return the dimensions that an argument names, counted from the front."""
        given = self.arg[name]
        given = list(given) if isinstance(given, list | tuple) else [given]
        if None in given or not given:  # all of them
            raise Mixed
        return [d % rank for d in given]

    def scaled(self, name: str, at: int | None, each: int) -> None:
        """Note that the argument (its entry ``at``, if it is a list) is ``each`` times the size,
        unless it is -1."""
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
        """Return the part of the result, or of each of several."""
        return [part] * len(self.val) if isinstance(self.val, tuple) else part


#: rules for the results of an op with a batched argument, a list for several; a rule raises Mixed
Rule = Callable[[OpCall], Any]
RULES: dict[OpOverload, Rule] = {}
#: rules for ops that make a batched value without a batched argument
FACTORIES: dict[OpOverload, Rule] = {}


def part_rule(names: str, table: dict = RULES) -> Callable[[Rule], Rule]:
    """Make a decorator: the function answers for these ops of aten, as far as PyTorch has them."""

    def register(f: Rule) -> Rule:
        for name in names.split():
            packet, _, overload = name.partition(".")
            op = getattr(getattr(aten, packet, None), overload or "default", None)
            if op is not None:
                table[op] = f
        return f

    return register


def broadcast_part(tensors: Sequence[tuple[Sig, Part | None]], rank: int) -> Part:
    """Return the part of the shape that these broadcast to."""
    found = {(sig.ndim - part.dim, part.each) for sig, part in tensors if part is not None}
    if len(found) != 1:
        raise Mixed
    ((back, each),) = found
    if any(part is None and spans(sig, back) for sig, part in tensors):
        raise Mixed
    return Part(rank - back, each)


def spans(sig: Sig, back: int) -> bool:
    """Return whether a tensor has more than one entry in the dimension so many from the back."""
    return sig.ndim >= back and sig.shape[-back] != 1
