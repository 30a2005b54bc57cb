"""Put our transforms in torch.func's place, for code that imports them from there."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from ..trace.patches import Exchange
from . import func, jacobians, vmap

OURS = {
    **{
        name: getattr(func, name)
        for name in ("functionalize", "grad", "grad_and_value", "jvp", "linearize", "vjp")
    },
    **{name: getattr(jacobians, name) for name in ("hessian", "jacfwd", "jacrev")},
    "vmap": vmap.vmap,
}
#: PyTorch's modules that have the transforms, and the names there
PLACES = {"torch.func": tuple(OURS), "functorch": tuple(OURS), "torch": ("vmap",)}


@cache
def exchange() -> Exchange:
    """Put our functions in the place of theirs, wherever this build of PyTorch has them."""
    new: dict[tuple[Any, str], Any] = {}
    for place, names in PLACES.items():
        try:
            module = importlib.import_module(place)
        except ImportError:
            continue
        new |= {(module, name): OURS[name] for name in names if hasattr(module, name)}
    return Exchange(new)


class Patch:
    """The handle that :func:`patch_torch_func` returns: ``undo()``, or the end of a ``with``
    block, puts PyTorch's functions back."""

    def __init__(self) -> None:
        self.undone = False
        exchange().__enter__()

    def undo(self) -> None:
        if not self.undone:
            self.undone = True
            exchange().__exit__()

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def patch_torch_func() -> Patch:
    """Put our transforms in the place of ``torch.func``'s, ``functorch``'s and ``torch.vmap``, in
    all threads: later look-ups and imports there find ours. Names imported earlier stay PyTorch's.

    Returns an object whose ``undo()`` puts PyTorch's back, and which is a context manager that
    does so at its end; of several patches the last one undone does.

    >>> with patch_torch_func():
    ...     torch.func.grad is grad
    True
    """
    return Patch()
