"""Pytrees in and out of a capture: arguments to leaves, leaves to arguments."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_unflatten

from .instances import flatten_tree


class Arguments:
    """The arguments of one call, flat. ``leaves`` in order; ``spans[i]`` are the leaf positions of positional
    argument i.
    """

    def __init__(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self.leaves: list[Any] = []
        self.specs: list[TreeSpec | None] = []
        self.spans: list[range] = []
        for a in args:
            start = len(self.leaves)
            if issubclass(type(a), Tensor):  # isinstance asks the object
                self.leaves.append(a)
                self.specs.append(None)
            else:
                flat, spec = flatten_tree(a)
                self.leaves += flat
                self.specs.append(spec)
            self.spans.append(range(start, len(self.leaves)))
        self.kw_spec: TreeSpec | None = None
        if kwargs:
            flat, self.kw_spec = flatten_tree(kwargs)
            self.leaves += flat

    def with_leaves(self, leaves: list[Any]) -> Arguments:
        """The same trees of other leaves."""
        other = copy.copy(self)
        other.leaves = leaves
        return other

    def rebuilt(self, leaves: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments with these leaves instead."""
        args = [
            leaves[span.start] if spec is None else tree_unflatten(leaves[span.start : span.stop], spec)
            for span, spec in zip(self.spans, self.specs, strict=True)
        ]
        if self.kw_spec is None:
            return args, {}
        start = self.spans[-1].stop if self.spans else 0
        return args, tree_unflatten(list(leaves[start:]), self.kw_spec)

    @property
    def key(self) -> tuple:
        """The trees, for a cache key."""
        return (tuple(self.specs), self.kw_spec)


def flatten(tree: Any) -> tuple[list[Any], TreeSpec | None]:
    """Leaves and spec; the spec of a bare tensor is None."""
    return ([tree], None) if isinstance(tree, Tensor) else flatten_tree(tree)


def unflatten(leaves: Sequence[Any], spec: TreeSpec | None) -> Any:
    return leaves[0] if spec is None else tree_unflatten(list(leaves), spec)
