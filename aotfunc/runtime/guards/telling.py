"""Library functions that tell a part of the process's state, as code may depend on."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import _C

_TELLING = (
    torch.get_num_threads,
    torch.get_num_interop_threads,
    torch.get_float32_matmul_precision,
    torch.get_deterministic_debug_mode,
    torch.is_warn_always_enabled,
    torch.is_anomaly_enabled,
    torch.is_anomaly_check_nan_enabled,
    torch.is_deterministic_algorithms_warn_only_enabled,
    _C._get_float32_matmul_precision,
    sys.getrecursionlimit,
    torch.multiprocessing.get_sharing_strategy,
)
_KNOWN = {*map(id, _TELLING)}


def tells(x: Any) -> bool:
    """Return whether ``x`` is one of them."""
    return id(x) in _KNOWN
