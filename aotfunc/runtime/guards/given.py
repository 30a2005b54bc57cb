"""Refuse changes of arguments that a capture would lose: arguments are rebuilt of traced values,
so the caller would see only writes to tensors."""

from __future__ import annotations

from torch.utils._pytree import tree_flatten

from ...capture.instances import containers
from ...debug import at, user_line
from ...errors import CaptureError
from ...trace.traced import Traced, attributes


class Snapshot:
    """The rebuilt arguments, as they were before the function ran."""

    def __init__(self, args: tuple, kwargs: dict) -> None:
        self.trees = (*args, kwargs)
        self.before = [tree_flatten(x) for x in self.trees]
        self.containers = containers((args, kwargs))
        self.tensors = [
            (t, attributes(t))
            for leaves, _ in self.before
            for t in leaves
            if t.__class__ is Traced
        ]

    def check(self, names: list[str], what: str) -> None:
        """Refuse changes of lists, dictionaries and attributes of tensors. ``names`` are the
        parameters'."""
        for name, tree, (leaves, spec) in zip(
            (*names, "given by keyword"), self.trees, self.before, strict=True
        ):
            now, now_spec = tree_flatten(tree)
            if spec != now_spec or any(x is not y for x, y in zip(leaves, now, strict=True)):
                raise CaptureError(
                    f"{what}: the function changes the list or dictionary that is its argument "
                    f"{name}, which a compiled function cannot{at(user_line())}; copy it first, "
                    "or return what is new"
                )
        for t, old in self.tensors:
            new = attributes(t)
            if changed := [
                k for k in {**old, **new} if k not in old or k not in new or old[k] is not new[k]
            ]:
                raise CaptureError(
                    f"{what}: the function sets the attribute {changed[0]} of an argument, a "
                    f"tensor of shape {list(t.shape)}, which a compiled function "
                    f"cannot{at(user_line())}; return the value instead"
                )
