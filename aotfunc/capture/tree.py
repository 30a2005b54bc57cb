"""Turn the pytrees of a capture into leaves and back."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map

from ..trace.kinds import KINDS, ordinary_tensor
from ..trace.nested import with_items
from .instances import Opened, flatten_tree, is_data, is_whole, stored_names, unflatten_tree
from .plain_trees import flatten_plain


class Arguments:
    """The arguments of one call of ``f``, flat. ``leaves`` in order; ``spans[i]`` are the leaf
    positions of positional argument i."""

    def __init__(
        self, args: Sequence[Any], kwargs: dict[str, Any], f: Callable | None = None
    ) -> None:
        self.f = f
        self.kw_spec: TreeSpec | None = None
        #: each argument is a tensor
        self.flat = not kwargs and KINDS.issuperset(map(type, args))
        if self.flat:
            self.leaves: list[Any] = [*args]
            self.specs: list[TreeSpec | None] = [None] * len(args)
            self.spans = [*single_spans(len(args))]
            return
        self.leaves, self.specs, self.spans = [], [], []
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
        if kwargs:
            flat, self.kw_spec = flatten_tree(kwargs)
            self.leaves += flat
        self.leaves = list(map(ordinary_tensor, self.leaves))

    def with_leaves(self, leaves: list[Any]) -> Arguments:
        """Return the same trees with other leaves."""
        other = copy.copy(self)
        other.leaves = leaves
        return other

    def rebuilt(self, leaves: list[Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments with these leaves."""
        if self.flat:
            return leaves, {}
        args = [
            leaves[span.start]
            if spec is None
            else unflatten_tree(leaves[span.start : span.stop], spec)
            for span, spec in zip(self.spans, self.specs, strict=True)
        ]
        if self.kw_spec is None:
            return args, {}
        start = self.spans[-1].stop if self.spans else 0
        return args, unflatten_tree(list(leaves[start:]), self.kw_spec)

    def said(self, k: int) -> str:
        """Return the name of leaf ``k`` for an error: ``batch['x'] (argument 1)``."""
        for i, (span, spec) in enumerate(zip(self.spans, self.specs, strict=True)):
            if k in span:
                path = leaf_paths(spec)[k - span.start] if spec is not None else ""
                name = parameter(self.f, i)
                return f"argument {i}{path}" if name is None else f"{name}{path} (argument {i})"
        start = self.spans[-1].stop if self.spans else 0
        path = leaf_paths(self.kw_spec)[k - start]  # type: ignore[arg-type]
        return path.replace("['", "", 1).replace("']", "", 1)

    @property
    def key(self) -> tuple:
        """Return the trees as a cache key."""
        return (tuple(self.specs), self.kw_spec)


@functools.cache
def single_spans(count: int) -> tuple[range, ...]:
    """Return the positions of so many arguments of one leaf each."""
    return tuple([range(i, i + 1) for i in range(count)])


def in_order_of(template: Any, tree: Any) -> Any:
    """Return ``tree`` with the keys of its dictionaries in the order of ``template``."""
    if type(tree) is tuple and KINDS.issuperset(map(type, tree)):
        return tree
    plain = type(tree) in (tuple, list, dict)
    if not plain and (issubclass(type(tree), Tensor) or is_data(tree) or is_whole(tree)):
        return tree
    if isinstance(tree, dict) and isinstance(template, dict) and tree.keys() == template.keys():
        new = copy.copy(tree)
        new.clear()
        new.update({k: in_order_of(template[k], tree[k]) for k in template})
        return new
    if (
        isinstance(tree, tuple | list)
        and isinstance(template, tuple | list)
        and len(tree) == len(template)
    ):
        parts = [*map(in_order_of, template, tree)]
        if type(tree) in (tuple, list):
            return type(tree)(parts)
        return tree._make(parts) if hasattr(tree, "_make") else tree
    return tree


class Operands:
    """The arguments of an ``autograd.Function`` as torch.func sees them, in PyTorch's trees
    (``opened``: instances that hold tensors are trees, too). ``plain`` are the leaves with None
    for each tensor, ``places`` the tensors' positions. Two are equal if only their tensors
    differ."""

    def __init__(self, args: Sequence[Any], opened: bool = False) -> None:
        flat = flatten_tree if opened else tree_flatten
        leaves, self.spec = flatten_plain(tuple(args)) or flat(tuple(args))
        self.places = tuple(i for i, x in enumerate(leaves) if isinstance(x, Tensor))
        self.tensors = [leaves[i] for i in self.places]
        self.literals = tuple(None if isinstance(x, Tensor) else x for x in leaves)

    def without_tensors(self) -> Operands:
        """Return the operands without their tensors: keeping them keeps no tensor alive."""
        other = copy.copy(self)
        other.tensors = []
        return other

    def rebuilt(self, values: Sequence[Any]) -> tuple:
        """Return the arguments with ``values`` for the tensors."""
        return unflatten_tree(with_items(self.literals, self.places, values), self.spec)

    def dims(self, values: Sequence[int | None]) -> tuple:
        """Return the trees of dimensions: ``values`` for the tensors, None for others."""
        leaves = with_items([None] * len(self.literals), self.places, values)
        return unflatten_tree(leaves, self.spec)

    @property
    def key(self) -> tuple:
        # 1, 1.0, True are equal
        kinds = tuple((type(x), repr(x) if isinstance(x, float) else "") for x in self.literals)
        return (self.spec, self.places, self.literals, kinds)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Operands) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def flatten(tree: Any) -> tuple[list[Any], TreeSpec | None]:
    """Return leaves and spec; the spec of a bare tensor is None."""
    return ([tree], None) if isinstance(tree, Tensor) else flatten_tree(tree)


def unflatten(leaves: Sequence[Any], spec: TreeSpec | None) -> Any:
    return leaves[0] if spec is None else unflatten_tree(list(leaves), spec)


def parameter(f: Callable | None, i: int) -> str | None:
    """Return the parameter's name of positional argument ``i``; ``args[1]`` of a variadic one."""
    try:
        parameters = list(inspect.signature(f).parameters.values()) if f is not None else []
    except (TypeError, ValueError):
        return None
    for j, p in enumerate(parameters):
        if p.kind is p.VAR_POSITIONAL:
            return f"{p.name}[{i - j}]"
        if j == i:
            return p.name
    return None


def leaf_paths(spec: TreeSpec) -> list[str]:
    """Return ``['key']``, ``[0]`` or ``.field`` for each leaf of a tree, joined along the path."""
    if spec.is_leaf():
        return [""]
    paths = []
    for name, child in zip(child_names(spec), spec.children(), strict=True):
        step = f".{name}" if spec.type is Opened else f"[{name!r}]"
        paths += [step + rest for rest in leaf_paths(child)]
    return paths


def leaf_labels(spec: TreeSpec) -> list[str]:
    """Return ``_key`` or ``_0`` for each leaf of a tree, joined along the path."""
    if spec.is_leaf():
        return [""]
    children = zip(child_names(spec), spec.children(), strict=True)
    return [f"_{name}{rest}" for name, child in children for rest in leaf_labels(child)]


def child_names(spec: TreeSpec) -> list[Any]:
    """List the keys, attributes or numbers of a tree's children."""
    names = stored_names(spec.context) if spec.type is Opened else spec.context
    names = names if isinstance(names, list) else []
    return [*names[: spec.num_children], *range(len(names), spec.num_children)]


def structure(tree: Any) -> str:
    """Return a tree as an error shows it: tensors by dtype and shape, other leaves by type."""

    class Shown:
        def __init__(self, x: Any) -> None:
            self.x = x

        def __repr__(self) -> str:
            if isinstance(self.x, Tensor):
                return f"{str(self.x.dtype).removeprefix('torch.')}{list(self.x.shape)}"
            return type(self.x).__name__

    return repr(tree_map(Shown, tree))


def rebuilder(spec: TreeSpec | None) -> Callable[[list], Any]:
    """Return ``leaves -> tree``: directly for a flat tuple, list or dictionary."""
    if (
        spec is not None
        and spec.num_children == spec.num_leaves
        and all(c.is_leaf() for c in spec.children())
    ):
        if spec.type is tuple or spec.type is list:
            return spec.type
        if spec.type is dict:
            names = spec.context
            return lambda leaves: dict(zip(names, leaves, strict=True))
    return lambda leaves: unflatten(leaves, spec)
