"""Nested lists and tuples: of nodes, tensors, signatures or what belongs to each of these."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


def mapped(f: Callable, tree: Any, *others: Any) -> Any:
    """Return ``f`` of each leaf of ``tree`` and the same parts of others, as nested lists."""
    if isinstance(tree, list | tuple):
        return [mapped(f, *xs) for xs in zip(tree, *others, strict=True)]
    return f(tree, *others)


def map_nested(f: Callable, tree: Any) -> Any:
    """Return ``f`` of each leaf, in the same lists and tuples."""
    if not isinstance(tree, list | tuple):
        return f(tree)
    found = [map_nested(f, x) for x in tree]
    return tuple(found) if type(tree) is tuple else found


def listed(result: Any) -> list:
    """Return the results of a call that has one or several, as a list."""
    return list(result) if isinstance(result, list | tuple) else [result]


def with_items(values: Iterable[Any], places: Iterable[int], new: Iterable[Any]) -> list:
    """Return the values with the ``new`` ones at these places."""
    found = list(values)
    for i, x in zip(places, new, strict=True):
        found[i] = x
    return found


def leaves(tree: Any) -> list:
    """List the leaves of nested lists and tuples."""
    return [x for part in tree for x in leaves(part)] if isinstance(tree, list | tuple) else [tree]
