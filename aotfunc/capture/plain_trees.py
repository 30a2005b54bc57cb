"""Flatten and rebuild, by a look-up, trees of lists, tuples, dictionaries with names, tensors and
plain values, as most calls have. PyTorch's trees know many more kinds and ask every leaf for its
kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten

from ..cache import Cache
from ..trace.traced import Traced

_LEAVES = frozenset({Tensor, nn.Parameter, Traced, int, float, bool, str, type(None)})
_NAMES = frozenset({str})
_specs = Cache(4096)
#: ``id`` of a spec -> (the spec, the function from leaves to its tree)
_makers = Cache(4096)


def flatten_plain(tree: Any) -> tuple[list[Any], TreeSpec] | None:
    """Return leaves and spec as PyTorch does; None if the tree has another kind."""
    leaves: list[Any] = []
    key: list[Any] = []
    if not describe_tree(tree, leaves, key):
        return None
    return leaves, _specs.once(tuple(key), lambda: spec_of(tree))


def describe_tree(x: Any, leaves: list[Any], key: list[Any]) -> bool:
    cls = type(x)
    if cls in _LEAVES:
        leaves.append(x)
        key.append(None)
        return True
    if cls is dict:
        key += (cls, len(x), *x)
        if not _NAMES.issuperset(map(type, x)):
            return False
        x = x.values()
    elif cls is list or cls is tuple:
        key += (cls, len(x))
    else:
        return False
    if _LEAVES.issuperset(map(type, x)):
        leaves += x
        key += repeat(None, len(x))
        return True
    for child in x:
        if type(child) in _LEAVES:
            leaves.append(child)
            key.append(None)
        elif not describe_tree(child, leaves, key):
            return False
    return True


def spec_of(tree: Any) -> TreeSpec:
    """Return the spec of a tree, and remember how to make one from leaves."""
    spec = tree_flatten(tree)[1]
    count = iter(range(spec.num_leaves))
    _makers.put(id(spec), (spec, eval(f"lambda x: {expression(spec, count)}")))
    return spec


def expression(spec: TreeSpec, places: Any) -> str:
    """Return Python text for the tree of the leaves ``x``."""
    if spec.is_leaf():
        return f"x[{next(places)}]"
    children = [expression(c, places) for c in spec.children()]
    if spec.type is dict:
        return (
            "{"
            + ", ".join(f"{k!r}: {c}" for k, c in zip(spec.context, children, strict=True))
            + "}"
        )
    if spec.type is list:
        return f"[{', '.join(children)}]"
    return f"({''.join(f'{c}, ' for c in children)})"


def maker_of(spec: TreeSpec) -> Callable[[Sequence[Any]], Any] | None:
    """Return the function from leaves to the tree, if its spec was met here."""
    found = _makers.get(id(spec))
    return found[1] if found is not None and found[0] is spec else None
