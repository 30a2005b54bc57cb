"""Modules of torch.distributed that talk to other processes around every call."""

from __future__ import annotations

import sys

from torch import nn

from ...debug import at, user_line
from ...errors import CaptureError

#: names of the classes, or of what has changed the module, and what they do
_WRAPPERS = {
    "FullyShardedDataParallel": "gathers parameters and frees them",
    "DistributedDataParallel": "averages gradients",
    "DataParallel": "copies its content to several devices",  # where there are several
    "replicate": "averages gradients",
}


def wrapper_of(m: nn.Module) -> str | None:
    """Return which of these a module is of."""
    contract = sys.modules.get("torch.distributed._composable.contract")
    if contract and "replicate" in (contract._get_registry(m) or ()):
        return "replicate"
    names = [cls.__name__ for cls in type(m).__mro__ if cls.__module__.startswith("torch.")]
    return next((name for name in names if name in _WRAPPERS), None)


def check_parallel(m: nn.Module, label: str, gradients: bool) -> None:
    """Raise CaptureError for a module that has to run Python code around each of its calls, or,
    with ``gradients``, of their derivatives."""
    name = wrapper_of(m)
    if name == "DataParallel" and len(m.device_ids) < 2:  # type: ignore[arg-type]
        return
    if name is None or (name == "DistributedDataParallel" and not gradients):
        return
    raise CaptureError(
        f"{label} is a module of {name}, which {_WRAPPERS[name]} around every "
        f"call{at(user_line())}, by code that is not compiled. Compile its content, "
        f"{name}(aot_module(part)), and leave what calls it uncompiled"
    )
