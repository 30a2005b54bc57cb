"""Modules of torch.distributed that talk to other processes around every call."""

from __future__ import annotations

from torch import nn

from ...debug import at, user_line
from ...errors import CaptureError

#: names of the classes, and what they do
_WRAPPERS = {
    "FullyShardedDataParallel": "gathers parameters and frees them",
    "DistributedDataParallel": "averages gradients",
}


def check_parallel(m: nn.Module, label: str, gradients: bool) -> None:
    """Raise CaptureError for a module that has to run Python code around each of its calls, or,
    with ``gradients``, of their derivatives."""
    for cls in type(m).__mro__:
        name = cls.__name__
        if name not in _WRAPPERS or not cls.__module__.startswith("torch."):
            continue
        if name == "DistributedDataParallel" and not gradients:
            continue
        raise CaptureError(
            f"{label} is a module of {name}, which {_WRAPPERS[name]} around every "
            f"call{at(user_line())}, by code that is not compiled. Compile its content, "
            f"{name}(aot_module(part)), and leave what calls it uncompiled"
        )
