"""Our transforms in torch.func's place, for code that imports them from there."""

from __future__ import annotations

import importlib
import threading
from typing import Any

from . import func, jacobians, vmap

OURS = {
    **{
        name: getattr(func, name)
        for name in ("functionalize", "grad", "grad_and_value", "jvp", "linearize", "vjp")
    },
    **{name: getattr(jacobians, name) for name in ("hessian", "jacfwd", "jacrev")},
    "vmap": vmap.vmap,
}
#: the modules of PyTorch that have them, and under which names
PLACES = {"torch.func": tuple(OURS), "functorch": tuple(OURS), "torch": ("vmap",)}

_lock = threading.Lock()
_before: dict[tuple[Any, str], Any] = {}
_patches: list[Patch] = []


class Patch:
    """What :func:`patch_torch_func` returns: ``undo()``, or the end of a ``with`` block, puts back
    what was there."""

    def undo(self) -> None:
        with _lock:
            if self in _patches:
                _patches.remove(self)
            for (module, name), theirs in _before.items() if not _patches else ():
                setattr(module, name, theirs)
            if not _patches:
                _before.clear()

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def patch_torch_func() -> Patch:
    """Put our transforms in the place of ``torch.func``'s, ``functorch``'s and ``torch.vmap``, in
    all threads: what is looked up or imported there from now on is ours. What was imported before
    stays PyTorch's.

    Returns an object whose ``undo()`` puts PyTorch's back, and which is a context manager that
    does so at its end; of several patches the last one undone does.

    >>> with patch_torch_func():
    ...     torch.func.grad is grad
    True
    """
    patch = Patch()
    with _lock:
        for place, names in PLACES.items() if not _patches else ():
            try:
                module = importlib.import_module(place)
            except ImportError:
                continue
            for name in names:
                if hasattr(module, name):
                    _before[module, name] = getattr(module, name)
                    setattr(module, name, OURS[name])
        _patches.append(patch)
    return patch
