"""A saved function's tensors: a module's by name, put into another module."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn


def detached_copy(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_(t.requires_grad)


def own_copy(t: Tensor) -> Tensor:
    new = detached_copy(t)
    return nn.Parameter(new.detach(), t.requires_grad) if isinstance(t, nn.Parameter) else new


def state_of(f: Callable, used: Sequence[Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Find and name all tensors of a module, and others that were ``used``."""
    held: dict[str, Tensor] = {}
    if isinstance(f, nn.Module):
        held.update(f.named_parameters(remove_duplicate=False))
        held.update(f.named_buffers(remove_duplicate=False))
    known = {id(t): name for name, t in reversed(held.items())}
    for t in used:
        if id(t) not in known:
            known[id(t)] = f"constant{len(held)}"
            held[known[id(t)]] = t
    return held, [known[id(t)] for t in used]


def not_persistent(f: Callable) -> list[str]:
    """Return the buffers of a module that its ``state_dict`` leaves out."""
    modules = f.named_modules(remove_duplicate=False) if isinstance(f, nn.Module) else ()
    return [f"{at}.{n}".lstrip(".") for at, m in modules for n in m._non_persistent_buffers_set]


def set_tensor(module: nn.Module, name: str, t: Tensor, persistent: bool = True) -> None:
    """Let a module hold a tensor under a name with dots, even one that a method has."""
    *path, last = name.split(".")
    for part in path:
        module = module._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
    if isinstance(t, nn.Parameter):
        module._parameters[last] = t
        return
    module._buffers[last] = t
    if not persistent:
        module._non_persistent_buffers_set.add(last)


def tensor_at(module: nn.Module, name: str) -> Tensor:
    *path, last = name.split(".")
    for part in path:
        module = module._modules[part]  # type: ignore[assignment]
    held = module._parameters if last in module._parameters else module._buffers
    return held[last]  # type: ignore[return-value]
