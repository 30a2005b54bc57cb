"""Call functions of modules that import this one: they are imported at the call."""

from __future__ import annotations

from importlib import import_module
from typing import Any

#: name -> the module that has this function
_MODULES = {
    "check_grad": "trace.outside",
    "check_inputs": "capture.leaked",
    "leaked_value": "capture.leaked",
    "run_outside": "capture.leaked",
    "shown_array": "trace.arrays",
    "give_memory": "trace.outside",
    "register_hook": "capture.hooks",
    "torch_cond": "api.operators",
    "torch_while_loop": "api.operators",
    "torch_scan": "api.operators",
    "torch_map": "api.operators",
    "torch_associative_scan": "api.operators",
    "linearize": "api.func",
    "recurrent": "api.recurrent",
}


def above(name: str, *args: Any) -> Any:
    """Call the function with this name."""
    return getattr(import_module(f"aotfunc.{_MODULES[name]}"), name)(*args)
