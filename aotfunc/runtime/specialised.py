"""A graph module that refuses other shapes, dtypes, devices and values than its own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx._lazy_graph_module import _LazyGraphModule

from ..capture.instances import flatten_tree
from ..errors import ArgumentError

#: Python values that are compared; others (generators, objects) are not
PLAIN = (bool, int, float, complex, str, type(None), torch.dtype)


def leaf_facts(x: Any) -> Any:
    """Return the facts of one leaf that a graph was specialised to."""
    if isinstance(x, Tensor):
        return tuple(x.shape), x.dtype, x.device
    return (type(x), repr(x)) if isinstance(x, PLAIN) else None  # nan is itself, -0.0 is not 0.0


class Specialised(_LazyGraphModule):
    """A graph module that compares its arguments with ``made_for``, facts by parameter."""

    made_for = None  # not annotated: TorchScript reads annotations

    def made_for_these(self, names: Sequence[str], arguments: Sequence[Any]) -> None:
        facts_of = [list(map(leaf_facts, flatten_tree(a)[0])) for a in arguments]
        self.made_for = dict(zip(names, facts_of, strict=True))  # type: ignore[assignment]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.made_for:
            check_facts(self.made_for, {**dict(zip(self.made_for, args, strict=False)), **kwargs})
        return super().__call__(*args, **kwargs)

    def __deepcopy__(self, memo: dict) -> Any:
        twin = super().__deepcopy__(memo)
        twin.made_for = self.made_for
        return twin

    def __prepare_scriptable__(self) -> GraphModule:
        """Return a module whose forward is code that TorchScript reads: it names no overloads."""
        graph = copy.deepcopy(self.graph)
        for n in graph.nodes:
            n.target = getattr(n.target, "overloadpacket", n.target)
            devices = {k: str(v) for k, v in n.kwargs.items() if isinstance(v, torch.device)}
            n.kwargs = {**n.kwargs, **devices}
        return GraphModule(self, graph, self._get_name())

    def __reduce__(self) -> Any:
        return _restored, (*super().__reduce__()[:2], self.made_for)


def _restored(make: Any, arguments: tuple, made_for: Any) -> Specialised:
    plain = make(*arguments)
    module = Specialised(plain, plain.graph, plain._get_name())
    module.made_for = made_for
    return module


def check_facts(made_for: dict[str, list], given: dict[str, Any]) -> None:
    """Raise ArgumentError for other facts; the module's code tells other structures."""
    for name, x in given.items():
        wanted = made_for.get(name, ())
        for i, (leaf, want) in enumerate(zip(flatten_tree(x)[0], wanted, strict=False)):
            if want is not None and leaf_facts(leaf) != want:
                leaf_of = f"{name} (leaf {i})" if len(wanted) > 1 else name
                raise ArgumentError(
                    f"the module was made for {leaf_of} = {fact_text(want)}, "
                    f"not {fact_text(leaf_facts(leaf))}: "
                    "call make_fx again for these arguments, or make_fx(..., check_inputs=False)"
                )


def fact_text(fact: Any) -> str:
    if fact is None:
        return "another kind of object"
    if len(fact) == 2:
        return str(fact[1])
    shape, dtype, device = fact
    return f"{str(dtype).removeprefix('torch.')}{list(shape)} on {device}"
