"""Instances that are trees: dataclasses, attrs classes, namespaces and named tuples with
attributes, with tensors in them.

PyTorch's trees know containers and the classes that were registered with them. An instance of a
plain data class becomes an :class:`Opened` before it is flattened. The children of that are what
the attributes hold, and the items of a dictionary that is a dataclass too. From its leaves an
instance of the class is made again, without its ``__init__``. An instance without a tensor is a
value like any other."""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from typing import Any

from torch import Size, Tensor, nn
from torch.fx._pytree import register_pytree_flatten_spec
from torch.utils import _pytree as pytree
from torch.utils._pytree import SUPPORTED_NODES, TreeSpec, register_pytree_node, tree_unflatten

from ..errors import CaptureError
from .plain_trees import flatten_plain, maker_of

#: classes whose instances hold items
CONTAINERS: tuple[Any, ...] = (OrderedDict, dict, list, tuple)


def container_of(cls: type) -> Any:
    """Return which of these a class derives from; None for other classes."""
    return next((c for c in CONTAINERS if issubclass(cls, c)), None)


class Opened:
    """The content of an instance: its attributes, then its items, those of a list or tuple by
    number, without those of a dictionary that are equal to an attribute. A dictionary may be its
    own ``__dict__``."""

    def __init__(self, x: Any) -> None:
        itself = getattr(x, "__dict__", None) is x
        attributes, base = {} if itself else attributes_of(x), container_of(type(x))
        items: dict[Any, Any] = {}
        if base is not None:  # a class may have another `items` or `__iter__`
            items = dict(base.items(x) if issubclass(base, dict) else enumerate(base.__iter__(x)))
        more = {k: v for k, v in items.items() if not (k in attributes and attributes[k] is v)}
        self.children = [*attributes.values(), *more.values()]
        self.context = (type(x), tuple(attributes), tuple(more), tuple(items), itself)


def rebuild(children: Any, context: Any) -> Any:
    """Return the instance with these children."""
    cls, attributes, more, items, itself = context
    values, base = dict(zip((*attributes, *more), children, strict=True)), container_of(cls)
    if base is tuple:
        x = tuple.__new__(cls, [values[i] for i in items])
    else:
        x = cls.__new__(cls)
    for name in attributes:
        object.__setattr__(x, name, values[name])
    if base is list:
        list.extend(x, [values[i] for i in items])
    elif base is not tuple:
        for key in items:
            base.__setitem__(x, key, values[key])
    if itself:
        x.__dict__ = x
    return x


def is_whole(x: Any) -> bool:
    """Return whether PyTorch's trees would take ``x`` for a plain tuple, which it is not: a shape,
    which is a value here, or a named tuple with attributes."""
    cls = type(x)
    return cls is Size or (
        cls is not tuple and issubclass(cls, tuple) and bool(getattr(x, "__dict__", None))
    )


def tree_flatten(tree: Any) -> tuple[list[Any], TreeSpec]:
    return pytree.tree_flatten(tree, is_leaf=is_whole)


def stored_names(context: Any) -> list[str]:
    """Return a name for each child."""
    _, attributes, more, *_ = context
    return list(map(str, (*attributes, *more)))


register_pytree_node(Opened, lambda x: (x.children, x.context), rebuild)
register_pytree_flatten_spec(Opened, lambda x, spec: Opened(x).children)


def attributes_of(x: Any) -> dict[str, Any]:
    """Return the attributes of an instance by name, fields first."""
    cls = type(x)
    fields = [
        *getattr(cls, "__dataclass_fields__", ()),
        *[a.name for a in getattr(cls, "__attrs_attrs__", ())],
    ]
    return {n: getattr(x, n) for n in (*fields, *getattr(x, "__dict__", ())) if hasattr(x, n)}


def is_data(x: Any) -> bool:
    """Return whether ``x`` is an instance of a class whose purpose is to hold data."""
    try:
        cls = x.__class__
    except Exception as e:
        raise without_class(x) from e
    if cls is types.SimpleNamespace or (
        issubclass(type(x), tuple) and cls is not Size and is_whole(x)
    ):
        return True
    data = hasattr(cls, "__dataclass_fields__") or hasattr(cls, "__attrs_attrs__")
    return data and not isinstance(x, Tensor | nn.Module | type) and cls not in SUPPORTED_NODES


def without_class(x: Any) -> CaptureError:
    return CaptureError(
        f"an object of the class {type(x).__name__} does not tell its __class__, by which it "
        "would be known; let its __getattribute__ leave names with two underscores to "
        "object.__getattribute__, or pass what is in it"
    )


def holds_tensor(x: Any, depth: int = 0) -> bool:
    if isinstance(x, Tensor):
        return True
    leaves = tree_flatten(x)[0]
    if depth < 16 and len(leaves) == 1 and leaves[0] is x:
        return is_data(x) and any(holds_tensor(v, depth + 1) for v in Opened(x).children)
    return any(holds_tensor(v, depth + 1) for v in leaves)


def flatten_tree(tree: Any) -> tuple[list[Any], TreeSpec]:
    """Return the leaves and the spec of a tree; instances that hold tensors are trees."""
    if (found := flatten_plain(tree)) is not None:
        return found
    leaves, spec = tree_flatten(tree)
    return tree_flatten(opened_in(tree)) if any(map(is_data, leaves)) else (leaves, spec)


def unflatten_tree(leaves: list[Any], spec: TreeSpec) -> Any:
    """Return the tree of these leaves."""
    make = maker_of(spec)
    return tree_unflatten(leaves, spec) if make is None else make(leaves)


def opened_instance(x: Any, always: bool) -> Any:
    """Return a leaf, or an instance's content as a tree if it holds tensors or ``always``."""
    if not (is_data(x) and (always or holds_tensor(x))):
        return x
    found = Opened(x)
    found.children = [opened_in(v, always) for v in found.children]
    return found


def opened_in(tree: Any, always: bool = False) -> Any:
    """Return a tree whose leaves are opened."""
    leaves, spec = tree_flatten(tree)
    return (
        tree_unflatten([opened_instance(x, always) for x in leaves], spec)
        if any(map(is_data, leaves))
        else tree
    )


def containers(tree: Any) -> list[Any]:
    """Return the lists, tuples, dictionaries and instances of a tree, outer ones first."""
    if isinstance(tree, Tensor):
        return []
    children, spec = one_level(tree)
    return [] if spec.is_leaf() else [tree, *[c for child in children for c in containers(child)]]


def remade(tree: Any, leaves: Iterator[Any], made: dict[int, Any]) -> Any:
    """Return the tree of these leaves; a container that occurs twice does so there, too."""
    children, spec = one_level(tree)
    if spec.is_leaf():
        return next(leaves)
    new = tree_unflatten([remade(c, leaves, made) for c in children], spec)
    return made.setdefault(id(tree), new)


def one_level(x: Any) -> tuple[list[Any], TreeSpec]:
    """Return the children of a container, and the container without them."""
    # `is_leaf` must not hold ``x``: pytree leaves a reference cycle behind
    first = chain((False,), repeat(True))
    x = Opened(x) if is_data(x) and holds_tensor(x) else x
    return pytree.tree_flatten(x, is_leaf=lambda v: next(first) or is_whole(v))


def reassigned(tree: Any, leaves: Sequence[Any]) -> bool:
    """Return whether the instances in a tree made of these leaves hold anything else by now."""
    if flatten_plain(tree) is not None or not any(map(is_data, tree_flatten(tree)[0])):
        return False
    return list(map(id, flatten_tree(tree)[0])) != list(map(id, leaves))
