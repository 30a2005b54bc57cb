"""Hooks of values inside a compiled function that autograd itself calls. The graph has an identity
at each such value, where a call is cut (see :mod:`aotfunc.runtime.chains`).
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.fx import Node
from torch.utils.hooks import BackwardHook, RemovableHandle

from ..errors import CaptureError
from ..trace.emit import Builder
from .custom_derivative import CustomDerivative


class LiveHooks:
    """Hooks that every call registers. Programs hold them weakly; the capture's entry holds on."""

    #: the hooks, and the module passed to them
    held: Sequence[Any]


class Handle(RemovableHandle):
    """A hook of a tensor; once ``settled`` it belongs to the function."""

    def __init__(self, hook: Callable, where: str) -> None:
        super().__init__(OrderedDict())
        self.hook, self.where = hook, where
        self.removed = self.settled = False

    def remove(self) -> None:
        if self.settled and not self.removed:
            raise CaptureError(
                f"a tensor hook of a captured function{self.where} cannot be removed when a "
                "gradient was taken, or the function is over: let the hook return None, or "
                "register it outside"
            )
        self.removed = True

    def __getstate__(self) -> Any:
        return self.__dict__ | {"settled": True, "hooks_dict_ref": None}  # a copy removes nothing

    def __setstate__(self, state: Any) -> None:
        self.__dict__ |= state


class TensorHooks(LiveHooks):
    """Hooks of one value, the last one registered here; ``ref`` is the value after them."""

    def __init__(self, handles: Sequence[Handle]) -> None:
        self.handles = handles
        self.ref = 0

    @property
    def held(self) -> Sequence[Any]:  # type: ignore[override]
        return [h.hook for h in self.handles if not h.removed]

    def register(self, values: Sequence[Tensor]) -> list[Any]:
        (t,) = values
        if not self.handles[-1].removed:
            t.register_hook(self.handles[-1].hook)
        return [t, None]


class ModuleHooks(LiveHooks):
    """Backward hooks of one call of a module with ``n_inputs`` arguments, tensors at the places
    ``inputs``, and ``n_outputs`` results, tensors at ``outputs``."""

    def __init__(self, module: nn.Module, hooks: Sequence, pre_hooks: Sequence) -> None:
        self.module, self.hooks, self.pre_hooks = module, hooks, pre_hooks
        self.held = [module, *hooks, *pre_hooks]
        self.n_inputs = self.n_outputs = 0
        self.inputs: Sequence[int] = ()
        self.outputs: Sequence[int] = ()

    def begin(self) -> BackwardHook:
        return BackwardHook(self.module, self.hooks, self.pre_hooks)

    def front(self, values: Sequence[Tensor]) -> list[Any]:
        """Return the values before the module, and what its results are to meet."""
        given: list[Any] = [None] * self.n_inputs
        for i, x in zip(self.inputs, values, strict=True):
            given[i] = x
        hook = self.begin()
        found = hook.setup_input_hook(tuple(given))
        return [*(found[i] for i in self.inputs), hook]

    def behind(self, values: Sequence[Any]) -> list[Any]:
        """Return the values after the module; the last given one may be from its front."""
        given: list[Any] = [None] * self.n_outputs
        for i, x in zip(self.outputs, values, strict=False):
            given[i] = x
        if len(values) > len(self.outputs):
            hook = values[-1]
        else:
            hook = self.begin()
            hook.setup_input_hook((None,) * self.n_inputs)
            hook.input_tensors_index = self.inputs or None  # no node reads them
        found = hook.setup_output_hook(tuple(given))
        return [*(found[i] for i in self.outputs), None]


class SharedIdentity:
    """The common part of the identities of one value, or of one call of a module."""

    def __init__(self) -> None:
        self._live: Callable[[], LiveHooks | None] | None = None

    @property
    def live(self) -> LiveHooks | None:
        """Return the hooks that autograd calls; None if they are recorded."""
        return None if self._live is None else self._live()

    @live.setter
    def live(self, hooks: LiveHooks) -> None:
        self._live = weakref.ref(hooks)


class IgnoresTangents(CustomDerivative):
    """``(values, values, residuals) -> values`` with hooks, which ignore tangents."""

    def push(self, b: Builder, n: Node, new: Node, env: dict, tangents: dict) -> list:
        return [tangents.get(x) for x in self.parts(n)[0]]


class Identity(IgnoresTangents):
    """A node whose hooks autograd calls; one ``link`` for a module's front and end."""

    def __init__(self, name: str, vals: tuple, backward: tuple, link: SharedIdentity) -> None:
        super().__init__(name, len(vals), vals, backward, None, (), None)
        self.link = link

    def part(self, backward: dict[Any, Any], have: tuple[bool, ...]) -> Any:
        if self.link.live is not None:
            raise CaptureError(
                f"{self.__name__} inside a compiled function is called by autograd: the function "
                "has no backward graph of its own"
            )
        return super().part(backward, have)

    def call(self, hooks: Any) -> Callable[[Sequence[Any]], list[Any]]:
        """Return the function that lets autograd call the hooks on its values. It returns the
        values, and the inputs of the link's other identity."""
        return hooks.register


def live_hooks(n: Any) -> LiveHooks | None:
    """Return the hooks that autograd calls at this node."""
    return n.target.link.live if isinstance(n.target, Identity) else None
