"""Trees of tensors and plain values as plain data for a file, and back.

The classes of instances may be missing where the file is read: mappings become dictionaries, and
other instances namespaces."""

from __future__ import annotations

import types
from collections import namedtuple
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Size, Tensor

from ..capture.instances import attributes_of, is_data
from ..debug import at, user_line
from ..errors import ArgumentError
from .saved import as_data, from_data


class TensorTable:
    """The tensors of a tree in order; new ones are added."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors, self.tree = tensors, None
        self.index = {id(t): i for i, t in enumerate(tensors)}

    def of(self, t: Tensor) -> int:
        if id(t) not in self.index:
            self.index[id(t)] = len(self.tensors)
            self.tensors.append(t)
        return self.index[id(t)]


class Record(dict):
    """A dictionary whose items are also attributes, for an instance that was both."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


def pattern(x: Any, where: str, places: TensorTable) -> Any:
    """Return a tree of tensors and plain values as data: where each tensor stands."""
    if isinstance(x, Tensor):
        return {"place": places.of(x)}
    if type(x) is Size:
        return {"size": list(x)}
    if isinstance(x, Mapping):
        pairs = [[as_data(k, {}), pattern(v, f"{where}[{k!r}]", places)] for k, v in x.items()]
        attributes = [isinstance(k, str) and getattr(x, k, None) is v for k, v in x.items()]
        return {"record" if attributes and all(attributes) else "dict": pairs}
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        parts = [pattern(v, f"{where}.{k}", places) for k, v in zip(x._fields, x, strict=True)]
        return {"named": [type(x).__name__, list(x._fields), parts]}
    if isinstance(x, tuple | list):
        parts = [pattern(v, f"{where}[{i}]", places) for i, v in enumerate(x)]
        return {"list" if isinstance(x, list) else "tuple": parts}
    if is_data(x):
        fields = {k: pattern(v, f"{where}.{k}", places) for k, v in attributes_of(x).items()}
        return {"instance": [type(x).__name__, fields]}
    try:
        return {"is": as_data(x, {})}
    except RuntimeError:
        raise ArgumentError(
            f"export: {where} is of type {type(x).__name__}, which cannot be written to a file"
            f"{at(user_line(2))}: pass and return tensors, plain values, containers and instances"
        ) from None


def tree_of(data: Any, tensors: Sequence[Tensor]) -> Any:
    """Return the tree of a pattern, with tensors in their places."""
    ((kind, of),) = data.items()
    if kind == "place":
        return tensors[of]
    if kind in ("dict", "record"):
        items = {from_data(k, ()): tree_of(v, tensors) for k, v in of}
        return items if kind == "dict" else Record(items)
    if kind == "named":
        name, fields, parts = of
        cls: Any = namedtuple(name, fields)  # type: ignore[misc]
        return cls(*[tree_of(p, tensors) for p in parts])
    if kind in ("tuple", "list"):
        parts = [tree_of(p, tensors) for p in of]
        return parts if kind == "list" else tuple(parts)
    if kind == "instance":
        return types.SimpleNamespace(**{k: tree_of(v, tensors) for k, v in of[1].items()})
    return Size(of) if kind == "size" else from_data(of, ())


def collect(data: Any, x: Any, where: str, found: dict[int, tuple[str, Tensor]]) -> None:
    """Put an argument's tensors into ``found``. Raises ArgumentError for another tree."""
    ((kind, of),) = data.items()
    children: list[tuple[Any, Any, str]] = []
    if kind == "place" and isinstance(x, Tensor):
        found[of] = (where, x)
    elif kind in ("dict", "record") and isinstance(x, Mapping) and [*x] == keys(of):
        children = [
            (v, y, f"{where}[{k!r}]") for (k, y), (_, v) in zip(x.items(), of, strict=True)
        ]
    elif (
        (kind == "list" and isinstance(x, list))
        or (kind == "tuple" and isinstance(x, tuple) and not hasattr(x, "_fields"))
        or (kind == "named" and [*getattr(x, "_fields", ())] == of[1])
    ):
        parts = of[2] if kind == "named" else of
        if len(parts) != len(x):
            raise ArgumentError(
                f"{where} has {len(x)} elements, and was exported with {len(parts)}"
            )
        children = [(p, y, f"{where}[{i}]") for i, (p, y) in enumerate(zip(parts, x, strict=True))]
    elif kind == "instance" and is_data(x) and attributes_of(x).keys() == of[1].keys():
        children = [(p, getattr(x, k), f"{where}.{k}") for k, p in of[1].items()]
    elif not (kind in ("size", "is") and same_text(x, tree_of(data, ()))):
        raise ArgumentError(f"{where} is {leaf_text(x)}, and was exported as {told(data)}")
    for child in children:
        collect(*child, found)


def keys(pairs: Sequence) -> list:
    return [from_data(k, ()) for k, _ in pairs]


def same_text(x: Any, y: Any) -> bool:
    return type(x) is type(y) and repr(x) == repr(y)  # nan is itself, -0.0 is not 0.0


def leaf_text(x: Any) -> str:
    """Return the words for a leaf in an error."""
    dtype = str(x.dtype).removeprefix("torch.") if isinstance(x, Tensor) else ""
    return f"{dtype}{list(x.shape)}" if dtype else repr(x)


def told(data: Any) -> str:
    """Return the words for a pattern in an error."""
    ((kind, of),) = data.items()
    if kind == "place":
        return "a tensor"
    if kind == "is":
        return repr(from_data(of, ()))
    if kind in ("dict", "record"):
        return f"a dictionary with the keys {keys(of)}, in this order"
    if kind in ("named", "instance"):
        return f"a {of[0]} with the attributes {[*of[1]]}"
    return f"a {kind} of {len(of)}"
